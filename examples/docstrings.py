"""Texts that every machine has: the standard library's docstrings, split by file into training and retrieval sets."""

import ast
import re
import sysconfig
from pathlib import Path

HELD_OUT = 5  # every so many files, one is held back
SHORTEST = 40  # characters of a text to train on
SKIPPED = {"site-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
MOST_ALIKE = 0.5  # share of words that two texts of the retrieval set may have in common


def by_file() -> dict[str, list[list[str]]]:
    """For each source file its docstrings, each a list of its paragraphs, white space made single spaces."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[list[str]]] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        docstrings = [[" ".join(part.split()) for part in text.split("\n\n")] for text in texts if text.isascii()]
        if any(docstrings):
            found[str(relative)] = [[part for part in parts if part] for parts in docstrings]
    return found


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _distinct(text: str, others: list[set[str]]) -> bool:
    """Whether no other text shares most of its words with this one (Jaccard); if so it joins them."""
    words = _words(text)
    if any(len(words & other) > MOST_ALIKE * len(words | other) for other in others):
        return False
    others.append(words)
    return True


def training_and_retrieval(seed: int = 0) -> tuple[list[str], list[tuple[str, str]]]:
    """Texts to train on, and pairs of a query and its document from files that none of these come from.

    A query is a docstring's first paragraph, its document the rest of it. No two queries and no two documents share
    more than half of their words: which document is nearest shall not hang on which of two copies of a sentence it is.
    `seed` says which fifth of the files is held out.
    """
    train: dict[str, None] = {}
    pairs: list[tuple[str, str]] = []
    queries: list[set[str]] = []
    documents: list[set[str]] = []
    for i, parts_of in enumerate(by_file().values()):
        for parts in parts_of:
            if (i - seed) % HELD_OUT:
                train.update(dict.fromkeys(part for part in parts if len(part) >= SHORTEST))
                continue
            query, document = parts[0] if parts else "", " ".join(parts[1:])
            fit = 20 <= len(query) <= 300 and len(document) >= 100
            if fit and _distinct(query, queries) and _distinct(document, documents):
                pairs.append((query, document))
    held_out = {text for pair in pairs for text in pair}
    return [text for text in train if text not in held_out], pairs
