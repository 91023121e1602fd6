"""The emulated AVX-512 intrinsics against what the processor does at half the width, and against plain numpy."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or "avx2" not in Path("/proc/cpuinfo").read_text(), reason="needs g++ and AVX2"
)

# Intrinsics that work within 128 bits or lane by lane: each half must be what AVX2's own instruction gives.
LANE_WISE = {
    "a": "abs_epi8 abs_epi16 abs_epi32 cvtepi32_ps",
    "a, b": """add_epi8 add_epi16 add_epi32 add_epi64 and_si512 andnot_si512 or_si512 xor_si512 max_epi8 max_epi16
        max_epi32 max_epu8 max_epu16 max_epu32 min_epi8 min_epi32 min_epu8 min_epu32 madd_epi16 maddubs_epi16 mul_epi32
        mul_epu32
        mullo_epi16 mullo_epi32 packs_epi16 packs_epi32 packus_epi16 packus_epi32 sad_epu8 shuffle_epi8 sllv_epi32
        sllv_epi64 srav_epi32 srlv_epi32 srlv_epi64 sub_epi8 sub_epi16 sub_epi32 sub_epi64 unpackhi_epi8 unpackhi_epi16
        unpackhi_epi32 unpackhi_epi64 unpacklo_epi8 unpacklo_epi16 unpacklo_epi32 unpacklo_epi64""",
    "a, c": "sllv_epi32 srav_epi32 srlv_epi32 shuffle_epi8",
    "x": "sqrt_ps cvtps_epi32 cvttps_epi32",
    "x, y": "add_ps sub_ps mul_ps div_ps max_ps min_ps unpacklo_ps unpackhi_ps and_ps xor_ps",
    "x, y, z": "fmadd_ps fnmadd_ps",
}
IMMEDIATES = {
    "_mm512_slli_epi16(a, {})": (0, 1, 7, 15, 16), "_mm512_srli_epi16(a, {})": (0, 1, 7, 15, 16),
    "_mm512_srai_epi16(a, {})": (0, 1, 7, 15, 16), "_mm512_slli_epi32(a, {})": (0, 1, 7, 31, 40),
    "_mm512_srli_epi32(a, {})": (0, 1, 7, 31, 40), "_mm512_srai_epi32(a, {})": (0, 1, 7, 31, 40),
    "_mm512_slli_epi64(a, {})": (0, 33, 64), "_mm512_srli_epi64(a, {})": (0, 33, 64),
    "_mm512_alignr_epi8(a, b, {})": (0, 1, 5, 15, 16, 20, 32),
    "_mm512_shuffle_epi32(a, {})": (0, 0x1B, 0x4E, 0xB1, 0xE4),
    "_mm512_permutex_epi64(a, {})": (0, 0x1B, 0x4E, 0xB1, 0xE4),
}  # fmt: skip
AGAINST_AVX2 = [f"_mm512_{name}({args})" for args, names in LANE_WISE.items() for name in names.split()]
AGAINST_AVX2 += [call.format(imm) for call, values in IMMEDIATES.items() for imm in values]
AGAINST_AVX2 += [f"_mm512_cmp_ps_mask(x, y, {predicate})" for predicate in range(32)]


def bits(mask, n):
    return np.array([mask >> i & 1 for i in range(n)], bool)


def as_mask(flags):
    return sum(int(flag) << i for i, flag in enumerate(flags))


def expanded(off, mask, values):
    out, flags = off.copy(), bits(mask, off.size)
    out[flags] = values[: flags.sum()]
    return out


def compressed(off, mask, values):
    out, kept = off.copy(), values[bits(mask, off.size)]
    out[: kept.size] = kept
    return out


def dot(acc, a, b, lanes):
    products = a.astype(np.int64) * b.astype(np.int64)
    return (acc.astype(np.int64) + products.reshape(16, lanes).sum(1)).astype(np.int32)


def multishift(index, a):
    words = [int(w) for w in a.view(np.uint64) for _ in range(8)]
    rotated = [(w >> (i & 63) | w << (64 - (i & 63))) & 0xFF for w, i in zip(words, map(int, index), strict=True)]
    return np.array(rotated, np.uint8)


def blocks(a, b, imm):
    from_a, from_b = a.reshape(4, -1), b.reshape(4, -1)
    return np.stack([from_a[imm & 3], from_a[imm >> 2 & 3], from_b[imm >> 4 & 3], from_b[imm >> 6 & 3]]).ravel()


def clipped(a, dtype):
    return a.clip(np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)


def i8(a):
    return a.view(np.int8)


def i16(a):
    return a.view(np.int16)


def i32(a):
    return a.view(np.int32)


# expression over a, b, c (64 bytes each), `mask` and x = 16 floats -> what numpy says. `a`, `b`, `c` are uint8 arrays.
AGAINST_NUMPY = {
    "_mm512_maskz_expand_epi8(mask, a)": lambda a, b, c, m, x: expanded(0 * a, m, a),
    "_mm512_mask_expand_epi8(b, mask, a)": lambda a, b, c, m, x: expanded(b, m, a),
    "_mm512_maskz_expand_epi16(mask, a)": lambda a, b, c, m, x: expanded(0 * i16(a), m, i16(a)),
    "_mm512_maskz_expand_epi32(mask, a)": lambda a, b, c, m, x: expanded(0 * i32(a), m, i32(a)),
    "_mm512_mask_expand_ps(x, mask, _mm512_castsi512_ps(a))": lambda a, b, c, m, x: expanded(
        x.view(np.int32), m, i32(a)
    ),
    "_mm512_maskz_expandloadu_epi8(mask, &a)": lambda a, b, c, m, x: expanded(0 * a, m, a),
    "_mm512_maskz_compress_epi8(mask, a)": lambda a, b, c, m, x: compressed(0 * a, m, a),
    "_mm512_mask_compress_epi16(b, mask, a)": lambda a, b, c, m, x: compressed(i16(b), m, i16(a)),
    "_mm512_maskz_compress_epi32(mask, a)": lambda a, b, c, m, x: compressed(0 * i32(a), m, i32(a)),
    "_mm512_maskz_compress_ps(mask, x)": lambda a, b, c, m, x: compressed(0 * i32(a), m, x.view(np.int32)),
    "_mm512_maskz_loadu_epi8(mask, &a)": lambda a, b, c, m, x: np.where(bits(m, 64), a, 0),
    "_mm512_maskz_loadu_epi16(mask, &a)": lambda a, b, c, m, x: np.where(bits(m, 32), i16(a), 0),
    "_mm512_mask_loadu_epi32(b, mask, &a)": lambda a, b, c, m, x: np.where(bits(m, 16), i32(a), i32(b)),
    "_mm512_mask_mov_epi8(b, mask, a)": lambda a, b, c, m, x: np.where(bits(m, 64), a, b),
    "_mm512_mask_blend_epi32(mask, a, b)": lambda a, b, c, m, x: np.where(bits(m, 16), i32(b), i32(a)),
    "_mm512_maskz_add_epi32(mask, a, b)": lambda a, b, c, m, x: np.where(bits(m, 16), i32(a) + i32(b), 0),
    "_mm512_mask_sub_epi8(c, mask, a, b)": lambda a, b, c, m, x: np.where(bits(m, 64), a - b, c),
    "_mm512_dpbusd_epi32(a, b, c)": lambda a, b, c, m, x: dot(i32(a), b, i8(c), 4),
    "_mm512_dpwssd_epi32(a, b, c)": lambda a, b, c, m, x: dot(i32(a), i16(b), i16(c), 2),
    "_mm512_permutexvar_epi8(a, b)": lambda a, b, c, m, x: b[a % 64],
    "_mm512_permutexvar_epi16(a, b)": lambda a, b, c, m, x: i16(b)[i16(a) % 32],
    "_mm512_permutexvar_epi32(a, b)": lambda a, b, c, m, x: i32(b)[i32(a) % 16],
    "_mm512_permutexvar_epi64(a, b)": lambda a, b, c, m, x: b.view(np.int64)[a.view(np.int64) % 8],
    "_mm512_permutexvar_ps(a, x)": lambda a, b, c, m, x: x[i32(a) % 16],
    "_mm512_permutex2var_epi32(a, b, c)": lambda a, b, c, m, x: np.concatenate([i32(a), i32(c)])[i32(b) % 32],
    "_mm512_permutex2var_epi8(a, b, c)": lambda a, b, c, m, x: np.concatenate([a, c])[b % 128],
    "_mm512_permutex_epi64(a, 0x1b)": lambda a, b, c, m, x: a.view(np.int64)[[3, 2, 1, 0, 7, 6, 5, 4]],
    "_mm512_multishift_epi64_epi8(a, b)": lambda a, b, c, m, x: multishift(a, b),
    "_mm512_shuffle_i32x4(a, b, 0x4e)": lambda a, b, c, m, x: blocks(a, b, 0x4E),
    "_mm512_shuffle_i32x4(a, b, 0xd8)": lambda a, b, c, m, x: blocks(a, b, 0xD8),
    "_mm512_alignr_epi32(a, b, 5)": lambda a, b, c, m, x: np.concatenate([i32(b), i32(a)])[5:21],
    "_mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1)": lambda a, b, c, m, x: np.concatenate([a[:32], b[:32]]),
    "_mm512_inserti32x4(a, _mm512_castsi512_si128(b), 2)": lambda a, b, c, m, x: np.concatenate(
        [a[:32], b[:16], a[48:]]
    ),
    "_mm512_extracti64x4_epi64(a, 1)": lambda a, b, c, m, x: a[32:],
    "_mm512_extracti32x4_epi32(a, 3)": lambda a, b, c, m, x: a[48:],
    "_mm512_broadcast_i32x4(_mm512_castsi512_si128(a))": lambda a, b, c, m, x: np.tile(a[:16], 4),
    "_mm512_broadcast_i64x4(_mm512_castsi512_si256(a))": lambda a, b, c, m, x: np.tile(a[:32], 2),
    "_mm512_zextsi128_si512(_mm512_castsi512_si128(a))": lambda a, b, c, m, x: np.concatenate([a[:16], 0 * a[16:]]),
    "_mm512_set1_epi8(-3)": lambda a, b, c, m, x: np.full(64, -3, np.int8),
    "_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)": lambda a, b, c, m, x: np.arange(16),
    "_mm512_cvtepi8_epi32(_mm512_castsi512_si128(a))": lambda a, b, c, m, x: i8(a)[:16].astype(np.int32),
    "_mm512_cvtepi8_epi16(_mm512_castsi512_si256(a))": lambda a, b, c, m, x: i8(a)[:32].astype(np.int16),
    "_mm512_cvtepu16_epi32(_mm512_castsi512_si256(a))": lambda a, b, c, m, x: a.view(np.uint16)[:16].astype(np.int32),
    "_mm512_cvtepi32_epi8(a)": lambda a, b, c, m, x: i32(a).astype(np.int8),
    "_mm512_cvtepi32_epi16(a)": lambda a, b, c, m, x: i32(a).astype(np.int16),
    "_mm512_cvtsepi32_epi8(_mm512_srai_epi32(a, 22))": lambda a, b, c, m, x: clipped(i32(a) >> 22, np.int8),
    "_mm512_cvtsepi32_epi16(a)": lambda a, b, c, m, x: clipped(i32(a), np.int16),
    "_mm512_cvtps_ph(x, 0)": lambda a, b, c, m, x: x.astype(np.float16),
    "_mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))": lambda a, b, c, m, x: x.astype(np.float16).astype(
        np.float32
    ),
    "_mm512_roundscale_ps(x, 0)": lambda a, b, c, m, x: np.rint(x),
    "_mm512_roundscale_ps(x, 0x29)": lambda a, b, c, m, x: np.floor(x * 4) / 4,
    "_mm512_abs_ps(x)": lambda a, b, c, m, x: abs(x),
    "_mm512_ternarylogic_epi32(a, b, c, 0x96)": lambda a, b, c, m, x: a ^ b ^ c,
    "_mm512_ternarylogic_epi32(a, b, c, 0xca)": lambda a, b, c, m, x: (a & b) | (~a & c),
    "_mm512_movepi8_mask(a)": lambda a, b, c, m, x: as_mask(i8(a) < 0),
    "_mm512_movm_epi8(mask)": lambda a, b, c, m, x: -bits(m, 64).astype(np.int8),
    "_mm512_test_epi8_mask(a, b)": lambda a, b, c, m, x: as_mask((a & b) != 0),
    "_mm512_testn_epi32_mask(a, _mm512_set1_epi32(5))": lambda a, b, c, m, x: as_mask((i32(a) & 5) == 0),
    "_mm512_cmp_epi8_mask(a, b, _MM_CMPINT_LE)": lambda a, b, c, m, x: as_mask(i8(a) <= i8(b)),
    "_mm512_cmp_epi32_mask(a, b, _MM_CMPINT_NLT)": lambda a, b, c, m, x: as_mask(i32(a) >= i32(b)),
    "_mm512_cmpgt_epu32_mask(a, b)": lambda a, b, c, m, x: as_mask(a.view(np.uint32) > b.view(np.uint32)),
    "_mm512_cmple_epu32_mask(a, b)": lambda a, b, c, m, x: as_mask(a.view(np.uint32) <= b.view(np.uint32)),
    "_mm512_cmplt_epi32_mask(a, b)": lambda a, b, c, m, x: as_mask(i32(a) < i32(b)),
    "_mm512_reduce_add_epi32(a)": lambda a, b, c, m, x: np.add.reduce(i32(a), dtype=np.int32),
    "_mm512_reduce_max_epi32(a)": lambda a, b, c, m, x: i32(a).max(),
    "_mm512_reduce_max_epu32(a)": lambda a, b, c, m, x: a.view(np.uint32).max(),
    "_mm512_reduce_max_ps(_mm512_cvtepi32_ps(a))": lambda a, b, c, m, x: i32(a).max().astype(np.float32),
    "_mm512_lzcnt_epi32(a)": lambda a, b, c, m, x: np.array([32 - int(v).bit_length() for v in a.view(np.uint32)]),
    "_mm512_i32gather_epi32(_mm512_and_si512(a, _mm512_set1_epi32(15)), &b, 4)": lambda a, b, c, m, x: i32(b)[
        i32(a) & 15
    ],
}


PRELUDE = """
#include <cstring>
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define FUNCTION(name) extern "C" TARGET void name(const char* in, unsigned long mask, char* out)
template <class T> void put(char* out, const T& result) { memcpy(out, &result, sizeof result); }
#define VARIABLES(I, F, at) I a, b, c; F x, y, z; \\
    memcpy(&a, in + at, sizeof a), memcpy(&b, in + 64 + at, sizeof b), memcpy(&c, in + 128 + at, sizeof c); \\
    memcpy(&x, in + 192 + at, sizeof x), memcpy(&y, in + 256 + at, sizeof y), memcpy(&z, in + 320 + at, sizeof z);
#define WIDE VARIABLES(__m512i, __m512, 0)
#define HALF(i) VARIABLES(__m256i, __m256, 32 * i)
"""


def halved(call):
    call = call.replace("_mm512_", "_mm256_").replace("_si512", "_si256").replace("permutex_epi64", "permute4x64_epi64")
    if "cmp_ps" in call:
        return f"static_cast<char>(_mm256_movemask_ps({call.replace('_mask', '')}))"
    return call


def source():
    """A C function for each expression, and for those of AGAINST_AVX2 another that does it by halves."""
    calls = [*AGAINST_AVX2, *AGAINST_NUMPY]
    text = [PRELUDE] + [f"FUNCTION(wide{i}) {{ WIDE put(out, {call}); }}" for i, call in enumerate(calls)]
    for i, call in enumerate(AGAINST_AVX2):
        step = 1 if "_mask" in call else 32
        halves = [f"{{ HALF({h}) put(out + {h * step}, {halved(call)}); }}" for h in (0, 1)]
        text.append(f"FUNCTION(halves{i}) {{ {' '.join(halves)} }}")
    return "\n".join(text)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation")
    (folder / "cases.cpp").write_text(source())
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-Wno-psabi"]
    command += ["-DENGINE_EMULATE_AVX512", "-include", HERE / "avx512_emulation.h", folder / "cases.cpp", "-o"]
    subprocess.run([*command, folder / "cases.so"], check=True)
    return ctypes.CDLL(str(folder / "cases.so"))


def call_in(library, name, inputs, mask):
    out = np.zeros(64, np.uint8)
    getattr(library, name)(
        inputs.ctypes.data_as(ctypes.c_void_p), ctypes.c_ulong(mask), out.ctypes.data_as(ctypes.c_void_p)
    )
    return out


def inputs(rng):
    """a, b: any bytes, extremes often; c: small numbers; x, y, z: floats with what is special among them."""
    integers = rng.choice([0, 1, 127, 128, 255], (3, 64)).astype(np.uint8)
    integers[:2] = np.where(rng.random((2, 64)) < 0.2, integers[:2], rng.integers(0, 256, (2, 64)))
    integers[2].view(np.int32)[:] = rng.integers(-2, 35, 16)
    floats = (rng.standard_normal((3, 16)) * 10.0 ** rng.integers(-6, 7, (3, 16))).astype(np.float32)
    special = rng.choice(np.array([0, -0.0, 0.5, 1.5, 2.5, np.inf, -np.inf, np.nan, 3e9, -3e9], np.float32), (3, 16))
    floats = np.where(rng.random((3, 16)) < 0.3, special, floats)
    mask = (
        int(rng.choice([0, 1, 2**64 - 1, 0xF0F0F0F0F0F0F0F0]))
        if rng.random() < 0.3
        else int(rng.integers(2**63)) * 2 + 1
    )
    return np.concatenate([integers, floats.view(np.uint8)]), mask


@pytest.mark.parametrize("i", range(len(AGAINST_AVX2)), ids=AGAINST_AVX2)
def test_is_what_avx2_does_by_halves(library, i):
    rng = np.random.default_rng(i)
    dtype = np.float32 if "_ps(" in AGAINST_AVX2[i] else np.uint8  # floats, so that one NaN is as good as another
    for _ in range(20):
        data, mask = inputs(rng)
        got, want = (call_in(library, f"{kind}{i}", data, mask).view(dtype) for kind in ("wide", "halves"))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("i", range(len(AGAINST_NUMPY)), ids=AGAINST_NUMPY)
def test_is_what_numpy_says(library, i):
    rng = np.random.default_rng(i)
    truth = list(AGAINST_NUMPY.values())[i]
    for _ in range(20):
        data, mask = inputs(rng)
        with np.errstate(all="ignore"):
            want = np.atleast_1d(truth(*data[:3], mask, data[3].view(np.float32)))
        if "_mask(" in list(AGAINST_NUMPY)[i]:
            want = want.astype(np.uint64)
        elif want.dtype == np.int64 and want.size in (16, 1):
            want = want.astype(np.int32)
        got = call_in(library, f"wide{i + len(AGAINST_AVX2)}", data, mask)[: want.nbytes].view(want.dtype)
        np.testing.assert_array_equal(got, want)
