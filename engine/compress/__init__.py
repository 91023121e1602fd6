"""Whole models: recipes, the verbs that apply them, and the report."""

from engine.compress.calibrate import Calibration, calibrate
from engine.compress.distill import Distillation, distill
from engine.compress.model import compress_, prune_, quantize_
from engine.compress.recipe import Prune, Quantize, Recipe
from engine.compress.report import Report

__all__ = [
    "Calibration",
    "Distillation",
    "Prune",
    "Quantize",
    "Recipe",
    "Report",
    "calibrate",
    "compress_",
    "distill",
    "prune_",
    "quantize_",
]
