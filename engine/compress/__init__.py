"""Whole models: recipes, the verbs that apply them, and the report."""

from engine.compress.calibrate import Calibration, calibrate
from engine.compress.decompress import decompress_
from engine.compress.distill import Distillation, distill
from engine.compress.model import compress_, prune_, quantize_
from engine.compress.recipe import Prune, Quantize, Recipe
from engine.compress.report import Report
from engine.compress.search import CANDIDATES, search
from engine.compress.search_result import Search

__all__ = [
    "CANDIDATES",
    "Calibration",
    "Distillation",
    "Prune",
    "Quantize",
    "Recipe",
    "Report",
    "Search",
    "calibrate",
    "compress_",
    "decompress_",
    "distill",
    "prune_",
    "quantize_",
    "search",
]
