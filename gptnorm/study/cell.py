"""One run of a study."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptnorm.config import Config
from gptnorm.study.ladder import Rung
from gptnorm.tables import toml_value

Pairs = tuple[tuple[str, Any], ...]
"""Dotted settings with their values."""

TEXT = "data.path"
"""The setting that says what a run trains on."""

LONGEST = 200
"""Bytes of a folder's name; file systems take 255."""

Measured = Literal["signal", "nonlinearity"]
"""What is measured of a run's model beside its loss."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a tolerance study sets for a run beside strategy, rate and seed."""

    place: Pairs = ()
    """Where strategies are compared."""
    variant: Pairs = ()
    """What is tuned, as far as it is other than the strategy has it anyway."""
    follows: Pairs = ()
    """What goes with the place: heads and feed-forward with the width."""

    @property
    def label(self) -> str:
        """Names the setup's folder; empty where nothing is set."""
        return ",".join(f"{key}={value}" for key, value in (*self.place, *self.variant))

    @property
    def overrides(self) -> list[str]:
        """The settings as `key=value` arguments."""
        return as_overrides(dict((*self.follows, *self.place, *self.variant)))


def text_name(path: str | Sequence[str]) -> str:
    """What a text is called: `data.path`, of a list its entries."""
    return path if isinstance(path, str) else ", ".join(path)


def hashable(value: Any) -> Any:
    """A setting's value, lists as tuples."""
    return tuple(map(hashable, value)) if isinstance(value, list) else value


def as_pairs(settings: Mapping[str, Any] | None) -> Pairs:
    """Settings as a ledger or a recipe has them, by name."""
    return tuple((key, hashable(value)) for key, value in sorted((settings or {}).items()))


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """`key=value` arguments, their values in TOML."""
    return [f"{key}={toml_value(value)}" for key, value in settings.items()]


def _folder_name(label: str) -> str:
    """A path among the settings is no folder; what is too long for one ends in a hash."""
    name = label.replace("%", "%25").replace("/", "%2F")
    if len(name.encode()) <= LONGEST:
        return name
    start = name.encode()[: LONGEST - 17].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(label.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    strategy: str
    lr: float
    seed: int
    config: Config
    rung: Rung | None = None
    """Its place on a ladder."""
    setup: Setup = Setup()
    """What a tolerance study sets."""
    measured: Measured | None = None
    evaluated: tuple[str, ...] = ()
    """Texts that the trained model is evaluated on beside its own; `gptnorm.study.texts`."""

    @property
    def text(self) -> str:
        """The name of what it trains on, as the place says it, if it does."""
        return text_name(dict(self.setup.place).get(TEXT, self.config.data.path))

    @property
    def label(self) -> str:
        """The rung's or the setup's; empty where there is none."""
        return self.rung.label if self.rung else self.setup.label

    @property
    def folder(self) -> str:
        """Relative to the study folder."""
        label = f"{_folder_name(self.label)}/" if self.label else ""
        return f"cells/{self.strategy}/{label}lr-{self.lr!r}-seed-{self.seed}"

    @property
    def cost(self) -> float:
        """How long it takes, in an arbitrary unit: tokens times width times depth, good enough for the time left."""
        train, model = self.config.train, self.config.model
        return train.steps * train.batch_size * train.seq_len * model.d_model * model.n_layers

    @property
    def facts(self) -> dict[str, Any]:
        """What the ledger says of the run before its outcome."""
        found: dict[str, Any] = {"strategy": self.strategy, "lr": self.lr, "seed": self.seed}
        if self.rung:
            found |= {"size": self.rung.size, "rule": self.rung.rule}
        for key in ("place", "variant"):
            if settings := getattr(self.setup, key):
                found[key] = dict(settings)
        return found
