"""Number formats of few bits: what a tensor is after it was stored in one and read back.

Every format works along the last axis, on finite numbers. A last block that is not full is scaled by what it holds.
Zeros stay zeros; NaN stays NaN and moves no scale. The rules are those of the formats' definitions, so that numbers are
the same on every machine; `models.precision.library_round_trip` gives those of torchao, bitsandbytes and gguf.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from persona_probe.errors import unknown

RoundTrip = Callable[[Tensor], Tensor]
"""A float32 tensor to what is left of it; the same shape, dtype and device."""

# --- Elements: one number without its scale


@dataclass(frozen=True)
class Element:
    """Floats of a few bits: a sign, an exponent, and a mantissa whose length may depend on the exponent."""

    smallest: int
    """Smallest exponent; smaller numbers are multiples of its step."""
    largest: float
    """Largest magnitude; what is above it becomes it."""
    mantissa: Callable[[Tensor], Tensor] | int
    """Bits of the mantissa, or a function from exponents (int32) to them."""
    ties: str = "even"
    """`even`: to the neighbour whose last bit is 0 (IEEE 754). `away`: to the larger magnitude."""

    def __call__(self, x: Tensor) -> Tensor:
        """The nearest value of each number; exact, since steps are powers of two."""
        exponent = _exponent(x).clamp(min=self.smallest)
        bits = self.mantissa(exponent) if callable(self.mantissa) else self.mantissa
        step = _power(exponent - bits)
        quotient = x.abs() / step
        steps = quotient.round() if self.ties == "even" else _half_up(quotient)
        return torch.copysign((steps * step).clamp(max=self.largest), x)


def _half_up(x: Tensor) -> Tensor:
    """Round halves up. Adding 0.5 first would take the largest number below a half with them."""
    whole = x.floor()
    return whole + (x - whole >= 0.5)


def _exponent(x: Tensor) -> Tensor:
    """Exponents of float32 numbers (int32): of the largest power of two that is not above the magnitude."""
    return ((x.float().contiguous().view(torch.int32) >> 23) & 255) - 127


def _power(exponent: Tensor) -> Tensor:
    """Two to the power of an exponent (int32, -126 to 127), in float32."""
    return ((exponent.clamp(-126, 127) + 127) << 23).view(torch.float32)


def _tapered(exponent: Tensor) -> Tensor:
    """Bits of HiFloat8's mantissa: 3 near 1, then 2, 1, and none below 2^-15."""
    size = exponent.abs()
    return 3 - (size > 3).int() - (size > 7).int() - (size > 15).int()


E2M1 = Element(0, 6.0, 1)
"""FP4 of OCP's Microscaling Formats 1.0: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
HIF8 = Element(-22, 2.0**15, _tapered, "away")
"""HiFloat8 (Luo et al. 2024, arXiv 2409.16626). The code of 1.5 x 2^15 stands for infinity: 2^15 is the largest."""
S1P2 = Element(0, 1.75, 2, "away")
"""A sign, one bit before the point and two after it, the elements of HiFloat4: 0 to 1.75 in steps of 0.25."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""NormalFloat of 4 bits: quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314)."""
E4M3_LARGEST = 448.0


def e4m3(x: Tensor) -> Tensor:
    """FP8 with 4 bits of exponent and 3 of mantissa, no infinities (`torch.float8_e4m3fn`); saturates at 448."""
    return x.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).to(x.dtype)


E6M2 = Element(-48, 49152.0, 2)
"""The scale of HiFloat4, which has no sign and no zero: 6 bits of exponent (bias 48), 2 of mantissa."""


def e6m2(x: Tensor) -> Tensor:
    """The nearest scale of HiFloat4, 2^-48 to 49152, ties to even."""
    return E6M2(x.clamp(min=2.0**-48))


# --- Blocks


def _blocked(trip: RoundTrip, size: int, x: Tensor) -> Tensor:
    """Apply `trip` to (..., blocks, size); the last block is filled with its last value, which moves no extreme."""
    rest = -x.shape[-1] % size
    whole = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], rest)], dim=-1) if rest else x
    return trip(whole.unflatten(-1, (-1, size))).flatten(-2)[..., : x.shape[-1]]


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of each block, shape (..., 1), leaving NaN out."""
    return x.abs().nan_to_num(nan=0.0).amax(dim=-1, keepdim=True)


def _scaled(element: RoundTrip, largest: float, x: Tensor) -> Tensor:
    """Elements times one float scale, such that the largest magnitude becomes `largest`; zeros stay zeros."""
    scale = _largest(x) / largest
    scale = torch.where(scale > 0, scale, 1.0)
    return element(x / scale) * scale


def _integer(bits: int, x: Tensor) -> Tensor:
    """Symmetric integers, ties to even, with one scale: the largest magnitude over 2^(bits - 1) - 1."""
    top = 2 ** (bits - 1) - 1
    return _scaled(lambda value: value.round().clamp(-top - 1, top), top, x)


def _asymmetric(bits: int, x: Tensor) -> Tensor:
    """Integers between the smallest and the largest value of each block."""
    low, high = (getattr(x.nan_to_num(nan=0.0), name)(dim=-1, keepdim=True) for name in ("amin", "amax"))
    top = 2**bits - 1
    scale = (high - low) / top
    steps = torch.where(scale > 0, (x - low) / torch.where(scale > 0, scale, 1.0), 0.0)
    return torch.where(x.isnan(), x, steps.round().clamp(0, top) * scale + low)


def _q4_1(x: Tensor) -> Tensor:
    """GGUF's Q4_1: a minimum and a step in float16, and 4 bits; the quotient is rounded half up."""
    low, high = (getattr(x.nan_to_num(nan=0.0), name)(dim=-1, keepdim=True) for name in ("amin", "amax"))
    step = (high - low) / 15
    inverse = torch.where(step > 0, 1 / torch.where(step > 0, step, 1.0), 0.0)
    code = ((x - low) * inverse + 0.5).trunc().clamp(0, 15)
    return torch.where(x.isnan(), x, code * step.half().float() + low.half().float())


def _nf4(x: Tensor) -> Tensor:
    """NormalFloat with one float scale a block; a tie goes to the smaller value, as in bitsandbytes."""
    values = torch.tensor(NF4, device=x.device)
    middles = (values[1:] + values[:-1]) / 2
    scale = _largest(x)
    unit = (x / torch.where(scale > 0, scale, 1.0)).nan_to_num(nan=0.0).contiguous()
    return torch.where(x.isnan(), x, values[torch.bucketize(unit, middles)] * scale)


def _flat(trip: RoundTrip, size: int, x: Tensor) -> Tensor:
    """Blocks of the flattened tensor, across rows, as bitsandbytes takes them."""
    return _blocked(trip, size, x.flatten()).reshape(x.shape)


def _microscaled(element: RoundTrip, exponent: int, x: Tensor) -> Tensor:
    """A power of two as the scale: that of the largest magnitude, minus the element's largest exponent (OCP MX 1.0)."""
    scale = _power(_exponent(_largest(x)) - exponent)
    return element(x / scale) * scale


def _nvfp4(each_row: bool, x: Tensor) -> Tensor:
    """E2M1 in blocks of 16 with an E4M3 scale each, and one float32 scale for the tensor, or for each of its rows."""
    tensor = _largest(x if each_row else x.flatten()).unsqueeze(-1)
    tensor = torch.where(tensor > 0, tensor / (E4M3_LARGEST * E2M1.largest), 1.0)
    return _blocked(partial(_nvfp4_blocks, tensor), 16, x)


def _nvfp4_blocks(tensor: Tensor, x: Tensor) -> Tensor:
    """Scales are at least 2^-6, the smallest normal E4M3; products in the order in which NVIDIA's kernels have them."""
    scale = e4m3((_largest(x) / E2M1.largest / tensor).clamp(min=2.0**-6))
    return E2M1(x * ((1.0 / tensor) / scale)) * (scale * tensor)


def _hif4(x: Tensor) -> Tensor:
    """64 S1P2 elements with an E6M2 scale, and one further bit of exponent for each 8 and for each 4 of them."""
    parts = x.unflatten(-1, (8, 2, 4))
    fours = _largest(parts)
    eights = fours.amax(dim=-2, keepdim=True)
    scale = e6m2((eights.amax(dim=-3, keepdim=True) / 7).to(torch.bfloat16).to(x.dtype))
    by_eight = torch.where(eights / scale >= 4, 2.0, 1.0)
    by_four = torch.where(fours / (scale * by_eight) >= 2, 2.0, 1.0)
    whole = scale * by_eight * by_four
    return (S1P2(parts / whole) * whole).flatten(-3)


# --- The formats by name


@dataclass(frozen=True)
class Format:
    """A number format, and what it does to weights and to activations."""

    name: str
    bits: float
    """Bits for each weight, its share of the scales included (of a long row where there is one scale a row)."""
    what: str
    """Elements and scales, in words."""
    weights: RoundTrip
    """For a weight, (d_out, d_in)."""
    activations: RoundTrip | None = None
    """For the inputs of linear layers, (..., d_in), scaled token by token; None for formats of weights alone."""

    @property
    def is_reference(self) -> bool:
        """Whether it leaves all as it is."""
        return self.name == REFERENCE


REFERENCE = "none"
"""Weights as they are."""


def _same(x: Tensor) -> Tensor:
    return x


def _both(name: str, bits: float, what: str, trip: RoundTrip) -> Format:
    return Format(name, bits, what, trip, trip)


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format(REFERENCE, 32, "weights as they are", _same, _same),
        _both("int8", 8, "integers, symmetric; a scale a row", partial(_integer, 8)),
        _both("fp8", 8, "E4M3; a scale a row", partial(_scaled, e4m3, E4M3_LARGEST)),
        _both("hif8", 8, "HiFloat8, tapered; a scale a row", partial(_scaled, HIF8, 8.0)),
        _both("mxfp8", 8.25, "E4M3; blocks of 32, E8M0", partial(_blocked, partial(_microscaled, e4m3, 8), 32)),
        Format("nf4", 4.5, "NormalFloat; blocks of 64, float32", partial(_flat, _nf4, 64)),
        _both("mxfp4", 4.25, "E2M1; blocks of 32, E8M0", partial(_blocked, partial(_microscaled, E2M1, 2), 32)),
        Format(
            *("nvfp4", 4.5, "E2M1; blocks of 16, E4M3, and float32"),
            partial(_nvfp4, False),
            partial(_nvfp4, True),
        ),
        _both("hif4", 4.5, "HiFloat4: S1P2; blocks of 64, E6M2, 24 bits", partial(_blocked, _hif4, 64)),
        _both("int4", 4.25, "integers, symmetric; blocks of 64, float16", partial(_blocked, partial(_integer, 4), 64)),
        Format("q4_1", 5, "GGUF's Q4_1: integers, asymmetric; blocks of 32", partial(_blocked, _q4_1, 32)),
        Format("int3", 4, "integers, asymmetric; blocks of 32", partial(_blocked, partial(_asymmetric, 3), 32)),
    )
}
"""By name, the reference first."""


def formats_named(names: tuple[str, ...] = ()) -> list[Format]:
    """Formats by name, the reference first and each once; all of them without names.

    Raises:
        InputError: no such format.
    """
    if wrong := [name for name in names if name not in FORMATS]:
        raise unknown("format", wrong[0], FORMATS)
    return [one for name, one in FORMATS.items() if not names or name in (REFERENCE, *names)]
