"""Number formats: every code point, every tie, what saturates, blocks, zeros and NaN; libraries give the same."""

import importlib.util
import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.models.formats import E2M1, FORMATS, HIF8, NF4, S1P2, Element, RoundTrip, e4m3, e6m2, formats_named
from persona_probe.models.precision import LIBRARIES, library_round_trip, library_version

# --- Code points, decoded bit by bit from the formats' definitions: not with the code under test


def float_of(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> Fraction:
    """The magnitude of a code of an ordinary small float, denormals included."""
    exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
    if exponent == 0:
        return Fraction(mantissa, 2**mantissa_bits) * Fraction(2) ** (1 - bias)
    return (1 + Fraction(mantissa, 2**mantissa_bits)) * Fraction(2) ** (exponent - bias)


def hifloat8(code: int) -> Fraction | None:
    """The magnitude of a HiFloat8 code below 128: its dot field says how many bits of exponent follow."""
    text = f"{code:07b}"
    for dot, width in (("11", 4), ("10", 3), ("01", 2), ("001", 1), ("0001", 0)):
        if text.startswith(dot):
            field, mantissa = text[len(dot) : len(dot) + width], text[len(dot) + width :]
            size = int("1" + field[1:], 2) if width else 0
            exponent = -size if field[:1] == "1" else size
            if exponent == 15 and mantissa == "1":
                return None  # infinity
            return (1 + Fraction(int(mantissa, 2), 2 ** len(mantissa))) * Fraction(2) ** exponent
    denormal = int(text[4:], 2)
    return Fraction(2) ** (denormal - 23) if denormal else Fraction(0)


TABLES: dict[str, tuple[RoundTrip, list[Fraction], str]] = {
    "e2m1": (E2M1, [float_of(code, 2, 1, 1) for code in range(8)], "even"),
    "e4m3": (e4m3, [float_of(code, 4, 3, 7) for code in range(127)], "even"),
    "hif8": (HIF8, sorted(v for code in range(128) if (v := hifloat8(code)) is not None), "away"),
    "s1p2": (S1P2, [Fraction(code, 4) for code in range(8)], "away"),
}


def nearest(value: Fraction, table: list[Fraction], ties: str) -> Fraction:
    """The nearest entry of a sorted table, by exact arithmetic; the index of an entry is its code."""
    size = min(abs(value), table[-1])
    distance = min(abs(size - one) for one in table)
    hits = [code for code, one in enumerate(table) if abs(size - one) == distance]
    code = hits[-1] if ties == "away" else next((c for c in hits if c % 2 == 0), hits[0])
    return table[code] if value >= 0 else -table[code]


def test_the_tables_are_those_of_the_definitions() -> None:
    assert [float(v) for v in TABLES["e2m1"][1]] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert float(TABLES["e4m3"][1][-1]) == 448 and float(TABLES["e4m3"][1][1]) == 2**-9
    values = [float(v) for v in TABLES["hif8"][1]]
    assert len(values) == 127 and values[1] == 2**-22 and values[-1] == 2**15
    bits = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert bits.tolist() == [float(v) for v in TABLES["e4m3"][1]]


@pytest.mark.parametrize("name", TABLES)
def test_every_code_stays(name: str) -> None:
    trip, table, _ = TABLES[name]
    values = torch.tensor([float(v) for v in table])
    assert torch.equal(trip(values), values) and torch.equal(trip(-values), -values)


@pytest.mark.parametrize("name", TABLES)
def test_every_tie_and_its_neighbours_go_where_the_definition_says(name: str) -> None:
    trip, table, ties = TABLES[name]
    middles = torch.tensor([float((a + b) / 2) for a, b in itertools.pairwise(table)])
    inputs = torch.cat([torch.nextafter(middles, torch.zeros(())), middles, torch.nextafter(middles, 2 * middles)])
    inputs = torch.cat([inputs, -inputs])
    wanted = [float(nearest(Fraction(float(x)), table, ties)) for x in inputs]
    assert trip(inputs).tolist() == wanted


@pytest.mark.parametrize("name", TABLES)
def test_what_is_too_large_saturates_and_what_is_tiny_vanishes(name: str) -> None:
    trip, table, _ = TABLES[name]
    largest, smallest = float(table[-1]), float(table[1])
    assert trip(torch.tensor([largest * 1.01, largest * 1e6, -3e38])).tolist() == [largest, largest, -largest]
    assert trip(torch.tensor([0.0, smallest * 0.49, -smallest * 0.01, 1e-45])).abs().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", TABLES)
def test_random_numbers_go_to_the_nearest(name: str) -> None:
    trip, table, ties = TABLES[name]
    draws = torch.randn(200, generator=torch.Generator().manual_seed(1)) * torch.logspace(-8, 6, 200, base=2.0)
    assert trip(draws).tolist() == [float(nearest(Fraction(float(x)), table, ties)) for x in draws]


@pytest.mark.parametrize("trip", [E2M1, HIF8, S1P2, e4m3])
def test_a_number_that_is_none_stays_none(trip: RoundTrip) -> None:
    out = trip(torch.tensor([math.nan, 1.0]))
    assert out[0].isnan() and out[1] == 1


def test_scales_of_hifloat4_are_e6m2() -> None:
    codes = [float((1 + Fraction(m, 4)) * Fraction(2) ** (e - 48)) for e in range(64) for m in range(4)][:-1]
    values = torch.tensor(codes)
    assert torch.equal(e6m2(values), values) and codes[0] == 2**-48 and codes[-1] == 49152
    assert e6m2(torch.tensor([0.0, 1e-30, 1e9, 1.125, 1.375])).tolist() == [2**-48, 2**-48, 49152, 1.0, 1.5]


def test_an_element_may_keep_the_bits_of_any_small_float() -> None:
    e5m2 = Element(-14, 57344.0, 2)
    values = torch.arange(124, dtype=torch.uint8).view(torch.float8_e5m2).float()
    draws = torch.randn(500, generator=torch.Generator().manual_seed(2)) * torch.logspace(-20, 15, 500, base=2.0)
    assert torch.equal(e5m2(values), values)
    assert torch.equal(e5m2(draws), draws.to(torch.float8_e5m2).float())


# --- Whole formats

ROUNDING = [name for name, form in FORMATS.items() if not form.is_reference]
LARGEST_ERROR = {
    **{"int8": 1 / 254, "fp8": 1 / 28, "hif8": 1 / 16, "mxfp8": 1 / 8, "nf4": 0.152, "mxfp4": 1 / 4, "nvfp4": 0.18},
    **{"hif4": 0.16, "int4": 1 / 14, "q4_1": 1 / 14, "int3": 1 / 6},
}
"""Of an element, over the largest magnitude of its block, in the worst case."""


def weights(rows: int = 12, columns: int = 192, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ROUNDING)
def test_errors_are_bounded_by_the_largest_magnitude_around(name: str) -> None:
    x = weights()
    error = (FORMATS[name].weights(x) - x).abs()
    assert 0 < float(error.max()) <= LARGEST_ERROR[name] * float(x.abs().max())


@pytest.mark.parametrize("name", ROUNDING)
def test_a_second_round_trip_changes_almost_nothing(name: str) -> None:
    once = FORMATS[name].weights(weights())
    twice = FORMATS[name].weights(once)
    assert float((twice - once).norm() / once.norm()) < 0.25 * float((once - weights()).norm() / once.norm())


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("columns", [1, 31, 33, 65, 100])
def test_blocks_that_are_not_full_have_the_values_of_full_ones(name: str, columns: int) -> None:
    """The last block alone is scaled by what it holds: it rounds as a row of its own does."""
    x = weights(1, columns)
    out = FORMATS[name].weights(x)
    assert out.shape == x.shape and bool(out.isfinite().all())
    size = {"mxfp8": 32, "mxfp4": 32, "q4_1": 32, "int3": 32, "hif4": 64, "int4": 64, "nf4": 64}.get(name)
    if size is not None and columns > size:
        assert torch.equal(out[:, size:], FORMATS[name].weights(x[:, size:]))


@pytest.mark.parametrize("name", ROUNDING)
def test_zeros_stay_and_nothing_divides_by_zero(name: str) -> None:
    x = weights()
    x[0], x[1, :70] = 0, 0
    out = FORMATS[name].weights(x)
    assert not out[0].any() and not out[1, :64].any() and bool(out.isfinite().all())
    assert not FORMATS[name].weights(torch.zeros(2, 64)).any()


@pytest.mark.parametrize("name", ROUNDING)
def test_nan_stays_where_it_is_and_moves_nothing_else(name: str) -> None:
    x = weights()
    with_nan = x.clone()
    with_nan[2, 5], x[2, 5] = math.nan, 0
    out, without = FORMATS[name].weights(with_nan), FORMATS[name].weights(x)
    assert out[2, 5].isnan()
    out[2, 5], without[2, 5] = 0, 0
    assert torch.equal(out, without)


@pytest.mark.parametrize("name", [n for n in ROUNDING if FORMATS[n].activations is not None])
def test_activations_are_scaled_token_by_token(name: str) -> None:
    """A token's values do not depend on the other tokens of its batch."""
    trip = FORMATS[name].activations
    assert trip is not None
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 100.0, 1e-4])[:, None]
    assert torch.equal(trip(x)[1, 2], trip(x[1:, 2:])[0, 0])
    assert trip(x).shape == x.shape


def test_signs_are_symmetric_but_for_formats_that_are_not() -> None:
    x = weights()
    for name in ROUNDING:
        mirrored = torch.equal(FORMATS[name].weights(-x), -FORMATS[name].weights(x))
        assert mirrored == (name not in ("nf4", "q4_1", "int3"))


def test_nf4_has_its_sixteen_values_and_ties_go_down() -> None:
    block = torch.tensor([*NF4, *[0.0] * 48])[None]
    assert torch.equal(FORMATS["nf4"].weights(block), block)
    middle = (NF4[8] + NF4[9]) / 2
    block[0, 20] = middle
    assert FORMATS["nf4"].weights(block)[0, 20].item() == pytest.approx(NF4[8])


def test_a_block_of_hifloat4_by_hand() -> None:
    """Scale 1 (largest 7); eights with a value of 4 or more get an exponent, fours with 2 or more of what is left."""
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 1], x[0, 4], x[0, 8], x[0, 9] = 7.0, 3.2, 1.9, 1.6, -0.9
    out = FORMATS["hif4"].weights(x)[0]
    # first four: 7 / 2 >= 2, so steps of 1; second four of that eight: 1.9 / 2 < 2, steps of 0.5; next eight: 0.25
    assert out[[0, 1, 4, 8, 9]].tolist() == [7.0, 3.0, 2.0, 1.5, -1.0]


def test_mxfp4_scales_are_powers_of_two() -> None:
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([7.9, 2.5, -3.5, 0.2])  # scale 2^(2 - 2) = 1: 7.9 saturates at 6; ties to even
    assert FORMATS["mxfp4"].weights(x)[0, :4].tolist() == [6.0, 2.0, -4.0, 0.0]


# --- Against libraries


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_libraries_give_the_same_value_by_value(name: str, dtype: torch.dtype) -> None:
    library = LIBRARIES[name]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    x = weights(16, 256, seed=4).to(dtype).float()
    x[3, :70] = 0
    x[5] *= 1e-5
    theirs = library_round_trip(name, x)
    assert theirs is not None and torch.equal(theirs, FORMATS[name].weights(x))
    assert library in library_version(name)


def test_a_format_that_no_library_has_is_not_asked_for() -> None:
    assert library_round_trip("hif4", weights()) is None and library_version("hif4") == ""


def test_formats_are_named_once_and_the_reference_comes_first() -> None:
    assert [one.name for one in formats_named(("int8", "int8", "nf4"))] == ["none", "int8", "nf4"]
    assert [one.name for one in formats_named()] == list(FORMATS) and len(FORMATS) == 12
    with pytest.raises(InputError, match="fp9"):
        formats_named(("fp9",))
