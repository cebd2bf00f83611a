"""`make bench-growth` on its smallest sizes, and its arithmetic."""

import math

import pytest

from benchmarks.growth import KINDS, SMALL, Cost, Kind, exponent, measure, table_of
from tests.factories import make_tokenizer


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_runs_on_its_smallest_size(kind: Kind) -> None:
    cost = measure(kind.name, kind.few[0], (SMALL, make_tokenizer()))
    assert cost.seconds > 0 and cost.mib >= 0


def test_the_exponent_is_the_slope_of_the_logarithms() -> None:
    sizes = (1, 2, 4, 8)
    assert exponent(sizes, [3.0 * size for size in sizes]) == pytest.approx(1)
    assert exponent(sizes, [3.0 * size**2 for size in sizes]) == pytest.approx(2)
    assert exponent(sizes, [5.0] * 4) == pytest.approx(0, abs=1e-12)
    assert math.isnan(exponent(sizes, [0.0, 1.0, 1.0, 1.0]))


def test_the_table_says_what_grows_and_how() -> None:
    table = table_of({"tokens": {64: Cost(1.0, 10.0), 512: Cost(8.0, 10.0)}})
    assert table.rows == [("tokens", "64 to 512", "1.00 to 8.00", "1.00", "10 to 10", "0.00")]
