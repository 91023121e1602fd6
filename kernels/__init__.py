"""Triton kernels, one file an op; installed as `engine.kernels`."""
