"""The rungs of a depth or width ladder: which settings each sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gptnorm.config import Config, ModelConfig, WidthRuleName
from gptnorm.errors import bad_value

Axis = Literal["depth", "width"]

FEWEST: dict[Axis, int] = {"depth": 2, "width": 3}
"""Rungs without which there is no ladder."""

SETS: dict[Axis, tuple[str, ...]] = {
    "depth": ("model.n_layers",),
    "width": ("model.d_model", "model.n_heads", "model.n_kv_heads", "model.d_ff", "optim.width_rule"),
}
"""The settings that may differ from rung to rung."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One model size, and in a width ladder one rule for what follows the width."""

    axis: Axis
    size: int
    """model.n_layers or model.d_model."""
    rule: WidthRuleName | None
    """optim.width_rule; None in a depth ladder."""
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Names the rung's folder."""
        return f"{self.axis}-{self.size}" + (f"-{self.rule}" if self.rule else "")

    @property
    def overrides(self) -> list[str]:
        """The settings as `key=value` arguments."""
        return [f"{key}={value}" for key, value in self.settings.items()]


def depth_rungs(depths: tuple[int, ...]) -> list[Rung]:
    """More blocks, and nothing else."""
    return [Rung(axis="depth", size=n, rule=None, settings={"model.n_layers": n}) for n in sorted(depths)]


def width_rungs(widths: tuple[int, ...], rules: tuple[WidthRuleName, ...], config: Config) -> list[Rung]:
    """The widths under each rule, with more heads of the same width.

    The feed-forward's width follows by the backbone's own rule; where the recipe sets it, or the number of
    key/value heads, it follows in proportion.

    Args:
        rules: left empty, the config's own.
        config: the recipe's, at its own width.

    Raises:
        UserError: a width that the heads, or what follows in proportion, do not fit.
    """
    return [
        Rung(
            axis="width",
            size=width,
            rule=rule,
            settings={**sizes_at(width, config.model, "study.widths"), "optim.width_rule": rule},
        )
        for width in sorted(widths)
        for rule in rules or (config.optim.width_rule,)
    ]


def sizes_at(width: int, model: ModelConfig, key: str) -> dict[str, int]:
    """The model's shape at another width, its heads as wide as before; `key` names the width in errors.

    Raises:
        UserError: the heads, or what follows in proportion, do not fit.
    """
    head = model.d_model // model.n_heads
    if width % head:
        allowed = f"must be a multiple of the head width {head} (model.d_model / model.n_heads), which stays"
        raise bad_value(key, width, allowed)
    sizes = {"model.d_model": width, "model.n_heads": width // head}
    for name, value in (("n_kv_heads", model.n_kv_heads), ("d_ff", model.d_ff)):
        if value is None:
            continue
        if value * width % model.d_model:
            allowed = f"does not go with model.{name} = {value} at model.d_model = {model.d_model}, kept in proportion"
            raise bad_value(key, width, allowed)
        sizes[f"model.{name}"] = value * width // model.d_model
    return sizes
