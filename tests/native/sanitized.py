"""Runs a command with the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

python tests/native/sanitized.py pytest tests/ops
python tests/native/sanitized.py python tests/fuzz_checkpoint.py --count 100000
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from build_tools import CACHE, CXX, LINK, ROOT, cached, headers_text, run

# Undefined behaviour stops the run, signed overflow too.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]


def build() -> Path:
    """The sanitized library, made anew where a source has changed."""
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    objects = CACHE / "sanitized"
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = objects / f"{source.stem}.o"
        run([*CXX, *SANITIZE, f"-I{ROOT / 'csrc'}", "-c", source, "-o", target])
        return target

    def make(path: Path) -> None:
        with ThreadPoolExecutor(2) as pool:
            compiled = list(pool.map(compile_one, sources))
        run(["g++", "-shared", *SANITIZE, *compiled, "-o", path, *LINK])

    depends_on = [headers_text("csrc"), *(source.read_text() for source in sources), *SANITIZE]
    return cached("sanitized.so", depends_on, make)


def main() -> int:
    """Runs the command line's arguments; pytest and python by this environment's own."""
    # Python isn't linked to libstdc++: loaded after the sanitizer, its exceptions could not be thrown.
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "ENGINE_CPU_LIBRARY": str(build()),
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
    }
    tool, *arguments = sys.argv[1:]
    return subprocess.run([Path(sys.executable).with_name(tool), *arguments], env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
