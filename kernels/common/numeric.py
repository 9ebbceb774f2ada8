"""Stored numbers: float8 e4m3 as bytes, and products of tiles.

e4m3 (1 sign, 4 exponent, 3 mantissa bits, bias 7, no infinity; Micikevicius et al., 2022) is
written with integer arithmetic, and read so too where the chip has no such type: before sm_89, AMD.
"""

import triton
import triton.language as tl

# How a cache stores its numbers: as they are, or as e4m3 decoded by us, by us on a chip that
# multiplies tf32, or by the chip, which has tf32 then.
PLAIN = tl.constexpr(0)
E4M3_BYTES = tl.constexpr(1)
E4M3_BYTES_TF32 = tl.constexpr(2)
E4M3_NATIVE = tl.constexpr(3)


@triton.jit
def decode_e4m3(bits):
    """uint8 to float32, exact."""
    bits = bits.to(tl.int32)
    magnitude = bits & 0x7F
    # The same bits as a float16 are 2^8 times too small: the biases are 7 and 15. Of 0x7F, which is
    # NaN, all exponent bits are set; arithmetic takes fewer registers here than a comparison.
    nan = ((magnitude + 1) & 0x80) * (0x7C00 // 0x80)
    half = ((bits & 0x80) << 8) | (magnitude << 7) | nan
    return half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def encode_e4m3(x):
    """float32 to uint8, rounded to nearest even; values beyond 448 saturate, NaN stays NaN."""
    sign = tl.where(x < 0, 0x80, 0)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFFF + ((bits >> 20) & 1)
    normal = (rounded >> 20) - ((127 - 7) << 3)
    # Below 2^-6 values are multiples of 2^-9; adding 2^23 leaves the rounded multiple in the
    # mantissa.
    small = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    encoded = tl.where(magnitude < 0.015625, small, normal)
    encoded = tl.where(x != x, 0x7F, encoded)
    return (encoded | sign).to(tl.uint8)


@triton.jit
def load_stored(pointers, mask, DTYPE: tl.constexpr, E4M3: tl.constexpr):
    """Values of a cache in DTYPE, 0 where masked."""
    if E4M3 == E4M3_NATIVE:
        bits = tl.load(pointers, mask=mask, other=0)
        return bits.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    if E4M3 != PLAIN:
        return decode_e4m3(tl.load(pointers, mask=mask, other=0)).to(DTYPE)
    return tl.load(pointers, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def unit_of(largest, EXPONENT: tl.constexpr):
    """The powers of two u, of the shape of `largest` (float32, not negative), for which largest / u
    lies between 2^EXPONENT and 2^(EXPONENT + 1)."""
    HIGHEST: tl.constexpr = 254 if EXPONENT >= 0 else 254 + 2 * EXPONENT
    exponent = largest.to(tl.int32, bitcast=True) >> 23  # biased
    exponent = tl.minimum(tl.maximum(exponent, 127 - 100), HIGHEST)
    return ((exponent - EXPONENT) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(unit):
    """1 / unit, exact."""
    bits = unit.to(tl.int32, bitcast=True)
    return ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def unit_of_rows(x):
    """The units [M] of rows of a bfloat16 x [M, N] that a float16 then holds to 2^-39 of the
    largest number in them."""
    return unit_of(tl.max(tl.abs(x.to(tl.float32)), 1), 14)


@triton.jit
def in_unit(x, unit):
    """x [M, N] as float16, row m in the unit `unit[m]`."""
    return (x.to(tl.float32) * inverse_of(unit)[:, None]).to(tl.float16)


@triton.jit
def product(a, b, INTERPRETED: tl.constexpr):
    """a @ b in float32; float32 operands are not rounded to tf32.

    The interpreter cannot multiply bfloat16.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def product_of_wide(a, b, E4M3: tl.constexpr, INTERPRETED: tl.constexpr):
    """a [M, K] of 2 bytes times the transpose of b [N, K] float32, on tensor cores.

    As tf32, where there is that: 11 digits of b, which is as many as float16 has, and few
    registers. Elsewhere b is split into two numbers of a's dtype: 16 digits or more, two products.
    """
    if E4M3 >= E4M3_BYTES_TF32:
        # The chip cuts the last 13 bits off; adding half of what goes first rounds to nearest.
        rounded = (b.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
        return tl.dot(a.to(tl.float32), tl.trans(rounded), input_precision="tf32")
    high = b.to(a.dtype)
    low = (b - high.to(tl.float32)).to(a.dtype)
    return product(a, tl.trans(high), INTERPRETED) + product(a, tl.trans(low), INTERPRETED)
