"""The page's colours can be read by day and by night."""

import re
from importlib.resources import files
from itertools import pairwise

import pytest

from dpguard.report.style import BANDS

SHEET = (files("dpguard.report") / "templates" / "style.css").read_text("utf-8")
ROOTS = re.findall(r":root \{(.*?)\}", SHEET, flags=re.DOTALL)
DAY = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", ROOTS[0]))
NIGHT = {**DAY, **dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", ROOTS[1]))}
TEXT = [
    *[(front, back) for front in ("ink", "muted", "accent") for back in ("paper", "card")],
    ("muted", "soft"), ("accent", "accent-soft"), ("ink", "accent-soft"), ("muted", "accent-soft"),
    ("warn", "warn-soft"), ("bad", "bad-soft"), ("ink", "leak"),
]  # fmt: skip


def luminance(colour):
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    """WCAG 2.2 contrast ratio."""
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [DAY, NIGHT], ids=["day", "night"])
@pytest.mark.parametrize(("front", "back"), TEXT)
def test_text_has_contrast(palette, front, back):
    assert contrast(palette[front], palette[back]) >= 4.5


@pytest.mark.parametrize("palette", [DAY, NIGHT], ids=["day", "night"])
def test_marks_have_contrast(palette):
    assert contrast(palette["open"], palette["card"]) >= 3
    assert contrast(palette["bad"], palette["card"]) >= 3


@pytest.mark.parametrize("shade", ["colour", "night"])
def test_the_epsilon_scale_goes_from_cool_to_warm(shade):
    """A large epsilon in green would read as the safest of all."""
    parts = [[int(getattr(band, shade)[n : n + 2], 16) for n in (1, 3, 5)] for band in BANDS]
    assert all(blue > green > red for red, green, blue in parts[:2])
    assert all(red > green > blue for red, green, blue in parts[2:])


@pytest.mark.parametrize("shade", ["colour", "night"])
def test_the_epsilon_scale_is_a_scale_without_hue(shade):
    levels = [luminance(getattr(band, shade)) for band in BANDS]
    assert levels == sorted(levels)
    assert all(contrast(getattr(a, shade), getattr(b, shade)) >= 1.3 for a, b in pairwise(BANDS))
