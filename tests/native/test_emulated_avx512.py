"""Every op's tests of its AVX-512 and AVX-VNNI variants where the processor has no AVX-512: all kernels built over
emulated intrinsics.

The emulation is exact and slow (tests/native/avx512_emulation.h). Where the processor has AVX-512, the tests of the ops
run it already and this file skips.
"""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from build_tools import CXX, LINK, ROOT, cached, headers_text, run, run_pytest

import engine

HEADER = ROOT / "tests/native/avx512_emulation.h"
COMPILE = [*CXX, "-Wno-psabi", "-DENGINE_EMULATE_AVX512", "-include", HEADER, "-I", ROOT / "csrc", "-c"]


@pytest.fixture(scope="session")
def emulated_library():
    """All CPU kernels in one library whose AVX-512 and AVX-VNNI variants run on AVX2."""
    if "avx512" in engine.backends.cpu_variants():
        pytest.skip("this processor has AVX-512: the tests of the ops ran it natively")
    if "avx2" not in engine.backends.cpu_variants():
        pytest.skip("the emulation is made of AVX2, which this processor or this build lacks")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    shared = [*COMPILE, headers_text("csrc", "tests/native")]

    def compile_one(source):
        def compile_to(path):
            run([*COMPILE, source, "-o", path])

        return cached(f"emulated_{source.stem}.o", [*shared, source.read_text()], compile_to)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted((ROOT / "csrc/cpu").glob("*.cpp"))))
    return cached("emulated_avx512.so", objects, lambda path: run(["g++", "-shared", *objects, "-o", path, *LINK]))


def test_ops_with_emulated_avx512(emulated_library):
    arguments = [ROOT / "tests/ops", "-k", "avx512 or avx_vnni", "-vv", "-rN"]
    out = run_pytest(arguments, ENGINE_CPU_LIBRARY=str(emulated_library))
    uses_variant = re.compile(r"def test_\w+\([^)]*\bvariant\b")
    wanted = {p.stem for p in (ROOT / "tests/ops").glob("test_*.py") if uses_variant.search(p.read_text())}
    for variant in ("avx512", "avx_vnni"):
        passed = set(re.findall(rf"ops/(test_\w+)\.py::\S*\[.*{variant}.*\] PASSED", out))
        assert wanted and wanted == passed, f"no emulated {variant} test passed in {sorted(wanted - passed)}"
