"""Starts the ranks of a test: one process each, killed whatever happens."""

import subprocess
import sys
from pathlib import Path


def run(script: str, names: str, world_size: int, folder: Path, seconds: float = 240) -> list[str]:
    """`python SCRIPT NAMES RANK WORLD_SIZE FOLDER` for every rank; the outputs. Each must print "done" and end well."""
    command = [sys.executable, str(Path(__file__).parent / script), names]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen([*command, str(rank), str(world_size), str(folder)], **pipes) for rank in range(world_size)
    ]
    texts = []
    try:
        for process in ranks:
            text, _ = process.communicate(timeout=seconds)
            texts.append(text)
            assert process.returncode == 0 and "done" in text, text
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return texts
