"""Text is readable in both themes: WCAG 2.2's contrast of 4.5 to 1, computed from the style sheet."""

import re

import pytest

from persona_probe.report.page import asset

INK = ("ink", "muted", "link", "good", "bad")


def palettes() -> list[dict[str, str]]:
    """Colours of every block of the style sheet that sets a theme."""
    blocks = re.findall(r"\{([^{}]*--page:[^{}]*)\}", asset("report.css"))
    return [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in blocks]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_and_white_is_21() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_every_theme_sets_the_same_colours_and_chosen_ones_equal_the_systems() -> None:
    light, dark, chosen_light, chosen_dark = palettes()
    assert {k: light[k] for k in chosen_light} == chosen_light and dark == chosen_dark != chosen_light


@pytest.mark.parametrize("ground", ["page", "soft"])
@pytest.mark.parametrize("ink", INK)
def test_text_stands_out_from_its_ground(ink: str, ground: str) -> None:
    for palette in palettes():
        assert contrast(palette[ink], palette[ground]) >= 4.5, palette
