"""Runs `engine.bench.gpu` from a checkout that is not installed: `python bench/from_checkout.py [--only OP ...]`.

An installed package has `kernels/` and `bench/` as `engine.kernels` and `engine.bench`; here they are found as such.
"""

import importlib.abc
import importlib.util
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"engine": ROOT / "engine", "engine.kernels": ROOT / "kernels", "engine.bench": ROOT / "bench"}


class Checkout(importlib.abc.MetaPathFinder):
    """Finds the packages whose folders have another name."""

    def find_spec(self, fullname: str, path: object, target: object = None):
        folder = FOLDERS.get(fullname)
        if folder is None:
            return None
        where = [str(folder)]
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=where
        )


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are not top-level ones
    sys.meta_path.insert(0, Checkout())
    runpy.run_module("engine.bench.gpu", run_name="__main__")
