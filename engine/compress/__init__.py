"""Whole models: recipes, the verbs that apply them, and the report."""

from engine.compress.model import compress_, prune_, quantize_
from engine.compress.recipe import Prune, Quantize, Recipe
from engine.compress.report import Report

__all__ = ["Prune", "Quantize", "Recipe", "Report", "compress_", "prune_", "quantize_"]
