"""Exponents of power laws that are known, and widths and checks as a person writes them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptnorm.errors import UserError
from gptnorm.theory.checks import CHECKS, parse_checks, parse_widths
from gptnorm.theory.finding import verdict_of
from gptnorm.theory.fits import exponent, exponent_over, holds_zero


def test_exponents():
    x = [1.0, 2.0, 5.0]
    assert exponent(x, [3 * value**-0.5 for value in x]) == pytest.approx(-0.5)
    assert math.isnan(exponent(x, [1.0, 0.0, 1.0]))
    assert math.isnan(exponent([2.0, 2.0], [1.0, 1.0]))
    found = exponent_over({0: x, 1: [value**2 for value in x], 2: [value**3 for value in x]}, x)
    # Slopes 1, 2, 3: sd 1, t(2) = 4.303.
    assert found.value == pytest.approx(2.0)
    assert found.low == pytest.approx(2 - 4.3027 / np.sqrt(3), abs=1e-3)
    assert holds_zero(found)
    assert not holds_zero(found, 5.0)


def test_verdict_of():
    assert (verdict_of([True]), verdict_of([False]), verdict_of([True, False])) == ("holds", "does not hold", "depends")


def test_widths_and_checks():
    assert parse_widths("32:512") == [32, 64, 128, 256, 512]
    assert parse_widths("48, 16,16") == [16, 48]
    assert parse_widths("32:100") == [32, 64]
    assert parse_checks([]) == list(CHECKS)
    assert parse_checks(["kinds", "scale", "kinds"]) == ["scale", "kinds"]
    for text in ("", "x", "32", "32:32", "64:32", "32:64:128", "4:64", "32,99999", "32,-64", "32,,64", "３２,64"):
        with pytest.raises(UserError, match="--widths"):
            parse_widths(text)
