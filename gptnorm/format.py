"""Numbers and settings as text, one way for every table, plot and sentence, and which of many are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

MISSING = "–"
"""What stands where there is no number."""


def lr_text(lr: float) -> str:
    """A learning rate, compact: 0.001 → "1e-3", 0.00025 → "2.5e-4", 1.0 → "1"."""
    mantissa, exponent = f"{lr:.5e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return mantissa if int(exponent) == 0 else f"{mantissa}e{int(exponent)}"


def short_text(number: float) -> str:
    """A computed rate, or a count too long to read, to three significant digits: "1.48e-2", "1.03e12"."""
    return lr_text(float(f"{number:.3g}"))


def digits_text(number: float | None) -> str:
    """A measured quantity to three significant digits, zeros at the end among them: "0.500", "17.8", "123"."""
    return MISSING if number is None or math.isnan(number) else f"{number:#.3g}".rstrip(".")


def loss_text(loss: float | None) -> str:
    """A loss or a spread of losses in nats, with four decimals."""
    return MISSING if loss is None else f"{loss:.4f}"


def spread_text(mean: float | None, sd: float | None) -> str:
    """ "3.4123 ± 0.0061", or the mean alone where there is no spread."""
    return loss_text(mean) if mean is None or sd is None else f"{loss_text(mean)} ± {loss_text(sd)}"


def count_text(count: float | None) -> str:
    """A whole number with thousands separators."""
    return MISSING if count is None else f"{count:,.0f}"


def duration_text(seconds: float | None) -> str:
    """Wall time with its two leading units: 75 → "1 min 15 s"."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def value_text(value: Any) -> str:
    """A setting as a person would write it in a TOML file."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def settings_text(settings: Iterable[tuple[str, Any]]) -> str:
    """ "model.d_model = 64, options.scale_mode = forward"; empty where there is none."""
    return ", ".join(f"{key} = {value_text(value)}" for key, value in settings)


def names_text(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plural(count: int, noun: str, several: str | None = None) -> str:
    """ "1 seed", "3 seeds"; `several` where it is not the noun with an s."""
    return f"{count} {noun if count == 1 else several or f'{noun}s'}"


def evenly_chosen(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 … count - 1, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
