"""Every CPU kernel compiles for 64-bit Arm, and the portable inner loops become NEON there."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from build_tools import CXX, ROOT, cached, headers_text, run

CROSS, OBJDUMP = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
pytestmark = pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which(OBJDUMP) is None,
    reason=f"no {CROSS}: Debian and Ubuntu have it in the package g++-aarch64-linux-gnu",
)
COMPILE = [CROSS, *CXX[1:], "-O3", "-I", ROOT / "csrc", "-c"]
SOURCES = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
# Loops that the compiler must turn into vector instructions: the file, and what they are made of.
VECTORISED = {
    "int8_linear": r"\bsmlal2?\s+v\d+\.4s, v\d+\.[48]h",
    "block_int8_linear": r"\bsmlal2?\s+v\d+\.4s, v\d+\.[48]h",
    "semi_structured_int8_linear": r"\bsmlal2?\s+v\d+\.4s, v\d+\.[48]h",
    "bitmap_linear": r"\bfmul\s+v\d+\.4s",
    "int8_quantize": r"\bf(max|min|abs|mul)\s+v\d+\.4s|\bumax\s+v\d+\.4s",
}


@pytest.fixture(scope="module")
def objects():
    """Object files by the name of their source."""
    shared = [*COMPILE, headers_text("csrc")]

    def compile_one(source):
        make = lambda path: run([*COMPILE, source, "-o", path])  # noqa: E731
        return cached(f"aarch64_{source.stem}.o", [*shared, source.read_text()], make)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((source.stem for source in SOURCES), pool.map(compile_one, SOURCES), strict=True))


@pytest.mark.slow
def test_every_file_compiles(objects):
    assert len(objects) == len(SOURCES) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("name", VECTORISED)
def test_inner_loops_are_neon(objects, name):
    assert re.search(VECTORISED[name], run([OBJDUMP, "-d", "--no-show-raw-insn", objects[name]]))
