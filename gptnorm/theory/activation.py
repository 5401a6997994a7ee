r"""The scale of activations: ‖y‖ = Θ(√d) after a norm, whatever the initialisation.

RMSNorm gives γ_min √d ≤ ‖y‖ ≤ γ_max √d (γ_min, γ_max of |γ|; ε shortens y by at most √(m / (m + ε)), m = mean(z²)), so
that RMS(y) does not move with the width. Without a norm ‖y‖ = ‖Wx‖ is what the initialisation makes of it: with the
published std of 0.02 it grows as √d · √d, with the fan-in twin s ∝ 1/√d as √d.

A recipe's models are built at several widths and see one sequence of random tokens. The exponent is that of √d RMS(y)
in d, 1/2 where the claim holds: that of ‖y‖, if y is as long as the model is wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from gptnorm.config import Config
from gptnorm.curvature.activation import slots_of
from gptnorm.model import GPT, build_gpt
from gptnorm.model.projection import Projection
from gptnorm.norms import Norm, NormModule
from gptnorm.recipe import Recipe
from gptnorm.report.panels import Panel
from gptnorm.study.measures import Estimate, geometric_mean, mean_of
from gptnorm.theory import draws
from gptnorm.theory.finding import Cell, Finding, Table, verdict_of
from gptnorm.theory.fits import exponent
from gptnorm.theory.layer import NormName, build

TOKENS = 64
VOCAB = 256
INITS: tuple[Literal["published", "twin"], ...] = ("published", "twin")
CLOSE = 0.1
"""How far from 1/2 an exponent may be: a rounded d_ff and few widths bend it."""
SLACK = 1e-12


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a slot at one width."""

    d: int
    x: float
    """RMS of what it reads."""
    y: float
    """RMS of what it returns."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A strategy with an initialisation, over widths and seeds."""

    name: str
    slots: Mapping[str, Mapping[int, Sequence[Sizes]]]
    """By role and seed, over widths."""
    normed: frozenset[str]
    """The roles that are linear maps with a norm after them."""
    linear: frozenset[str]
    """The roles that are linear maps."""

    def exponent(self, role: str) -> Estimate:
        """Of √d RMS(y) in d."""
        rows = self.slots[role].values()
        return mean_of([exponent([one.d for one in row], [one.y * one.d**0.5 for one in row]) for row in rows])

    def keeps(self) -> bool:
        """Whether every linear map's ‖y‖ goes as the root of its length."""
        return all(abs(self.exponent(role).value - 0.5) <= CLOSE for role in self.linear)


def strategies_of(recipe: Recipe) -> list[str | None]:
    """Those that its [study] table compares; None: the one that it names."""
    listed = recipe.study.get("strategies")
    return [str(name) for name in listed] if isinstance(listed, list) and listed else [None]


def configs(recipe: Recipe, width: int, seed: int) -> Iterable[tuple[str, Config]]:
    """Each strategy with each initialisation at a width, by a name for both."""
    for strategy in strategies_of(recipe):
        config = recipe.resolve([f"model.d_model={width}", f"seed={seed}"], strategy=strategy)
        for init in INITS:
            yield (
                f"{config.model.strategy} ({init})",
                replace(config, init=replace(config.init, std=init)),
            )


def read(model: GPT, tokens: Tensor) -> dict[str, tuple[Sizes, nn.Module]]:
    """RMS of x and y of every slot in the blocks, over one batch (B, T + 1)."""
    found: dict[str, tuple[Sizes, nn.Module]] = {}
    handles = []
    for name, slot in slots_of(model).items():
        if not name.startswith("blocks."):
            continue

        def see(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
            found[name] = (Sizes(d=model.shape.d, x=_rms(inputs[0]), y=_rms(y)), module)

        handles.append(slot.register_forward_hook(see))
    try:
        with torch.no_grad():
            model.loss(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure(recipe: Recipe, seeds: Sequence[int], widths: Sequence[int]) -> list[Model]:
    """Every strategy of a recipe with every initialisation."""
    slots: dict[str, dict[str, dict[int, list[Sizes]]]] = {}
    kinds: dict[str, dict[str, nn.Module]] = {}
    for seed in seeds:
        for width in widths:
            for name, config in configs(recipe, width, seed):
                vocab = config.model.vocab_size or VOCAB
                length = min(TOKENS, config.train.seq_len)
                # The same for every width and strategy.
                tokens = torch.randint(0, vocab, (1, length + 1), generator=torch.Generator().manual_seed(seed))
                model = build_gpt(config, vocab=vocab).eval()
                model.calibrate(tokens)
                for role, sizes, module in _by_role(read(model, tokens)):
                    slots.setdefault(name, {}).setdefault(role, {}).setdefault(seed, []).append(sizes)
                    kinds.setdefault(name, {})[role] = module
    return [
        Model(
            name=name,
            slots=rows,
            normed=frozenset(role for role, module in kinds[name].items() if _is_normed(module)),
            linear=frozenset(role for role, module in kinds[name].items() if isinstance(module, Projection)),
        )
        for name, rows in slots.items()
    ]


def _by_role(found: Mapping[str, tuple[Sizes, nn.Module]]) -> Iterable[tuple[str, Sizes, nn.Module]]:
    """Geometric means over blocks, by the name within the block."""
    roles: dict[str, list[tuple[Sizes, nn.Module]]] = {}
    for name, one in found.items():
        roles.setdefault(name.split(".", 2)[2], []).append(one)
    for role, ones in roles.items():
        sizes = [size for size, _ in ones]
        x, y = (geometric_mean([getattr(size, what) for size in sizes]).value for what in ("x", "y"))
        yield role, Sizes(d=sizes[0].d, x=x, y=y), ones[0][1]


def _is_normed(module: nn.Module) -> bool:
    return isinstance(module, Projection) and any(isinstance(step, NormModule) for step in module.after)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@dataclass(frozen=True, kw_only=True)
class Band:
    """‖y‖ / √d over random z with a drawn gain, beside γ_min and γ_max."""

    kind: str
    d: int
    low: float
    high: float
    least: float
    """γ_min."""
    most: float
    """γ_max."""

    @property
    def kept(self) -> bool:
        return self.least * (1 - SLACK) <= self.low and self.high <= self.most * (1 + SLACK)


Spread = Callable[[Tensor, Tensor], Tensor]
"""y of z (…, d) and a gain."""


def _normed(kind: NormName) -> Spread:
    return lambda z, gain: build(Norm(kind=kind, size=z.shape[-1], eps=0.0), gain)(z)


SPREADS: Mapping[str, Spread] = {kind: _normed(kind) for kind in ("rmsnorm", "layernorm")}


def bands(seeds: Sequence[int], widths: Sequence[int], spreads: Mapping[str, Spread] = SPREADS) -> list[Band]:
    """Of z of sizes from 1e-3 to 1e3, along single axes too, where the bounds are met."""
    found = []
    for kind, spread in spreads.items():
        for d in widths:
            ends: list[tuple[float, float, float, float]] = []
            for seed in seeds:
                gain = draws.uniform(seed, "gain", 0.25, 4.0, d)
                sizes = 10 ** draws.uniform(seed, "sizes", -3.0, 3.0, 64)
                z = torch.cat([sizes[:, None] * draws.normal(seed, "z", 64, d), torch.eye(d, dtype=torch.float64)])
                lengths = spread(z, gain).norm(dim=-1) / d**0.5
                ends.append((float(lengths.min()), float(lengths.max()), float(gain.min()), float(gain.max())))
            low, high, least, most = zip(*ends, strict=True)
            # The worst seed of each end: the bound holds seed by seed.
            below = min(range(len(ends)), key=lambda at: low[at] / least[at])
            above = max(range(len(ends)), key=lambda at: high[at] / most[at])
            found.append(Band(kind=kind, d=d, low=low[below], high=high[above], least=least[below], most=most[above]))
    return found


def check_activation(
    seeds: Sequence[int], widths: Sequence[int], recipe: Recipe, spreads: Mapping[str, Spread] = SPREADS
) -> Finding:
    """How ‖y‖ goes with the width, model by model.

    Args:
        recipe: whose models are built; if its [study] table names strategies, each of them.
        spreads: what is claimed to keep between γ_min √d and γ_max √d.

    Raises:
        UserError: a width that the recipe's models cannot have.
    """
    models = measure(recipe, seeds, widths)
    found = bands(seeds, widths, spreads)
    kept = [band.kept for band in found]
    keeps = {model.name: model.keeps() for model in models}
    reason = f"{_told(models, keeps)}; γ_min √d ≤ ‖y‖ ≤ γ_max √d {'holds' if all(kept) else 'is broken'} for "
    reason += f"{', '.join(spreads)} without ε."
    return Finding(
        name="activation",
        title="Activation scale",
        claim="The output of a linear map has ‖y‖ = Θ(√d) under every initialisation: a norm after it sees to that, "
        "with γ_min √d ≤ ‖y‖ ≤ γ_max √d.",
        source="SimpleGPT (arXiv 2602.01212), its definition of the operator",
        verdict=verdict_of(list(keeps.values())) if all(kept) else "does not hold",
        reason=reason,
        tables=[
            Table(
                title="Exponent of ‖y‖ in d, linear maps",
                head=["model", "maps with a norm", "maps without", "lowest exponent", "highest exponent"],
                rows=[_model_row(model) for model in models],
            ),
            Table(
                title="‖y‖ / √d after a norm with gains in 0.25 … 4",
                head=["norm", "d", "γ_min", "lowest", "highest", "γ_max"],
                rows=[[band.kind, str(band.d), band.least, band.low, band.high, band.most] for band in found],
                words=2,
            ),
            Table(
                title="Every slot",
                head=[
                    "model",
                    "slot",
                    *(f"RMS({what}), d = {d}" for what in ("x", "y") for d in (widths[0], widths[-1])),
                    "exponent of ‖y‖",
                ],
                rows=[row for model in models for row in _slot_rows(model)],
                words=2,
                detail=True,
            ),
        ],
        panels=[
            Panel(
                name=f"activation{number}",
                title=model.name,
                x_label="width d",
                x=widths,
                lines={
                    role: [geometric_mean([row[at].y for row in rows.values()]).value for at in range(len(widths))]
                    for role, rows in model.slots.items()
                    if role in model.linear
                },
                alt=f"RMS of y over width for the linear maps of {model.name}: flat where ‖y‖ goes as the root of the "
                "width. The exponents are in the tables.",
                log_x=True,
                log_y=True,
            )
            for number, model in enumerate(models, 1)
        ],
        notes=[
            f"Models: the recipe {recipe.name} with another model.d_model, init.std and seed, at initialisation "
            f"(gains 1), on {TOKENS} random tokens. Figures: RMS(y), flat where the claim holds.",
            "x, y: what a linear map reads, and what it returns with all that follows it; RMS over tokens and "
            "features, geometric mean over blocks.",
            "Exponent: slope of log √d RMS(y) on log d, mean over seeds: that of ‖y‖, if y is of length d. A row "
            f"keeps the claim if those of all its linear maps are within {CLOSE:g} of 1/2.",
            "init.std published: 0.02 at every width. twin: 0.02 √(2048/d), the same at width 2048.",
            "Gains 0.25 … 4: z is normal with sizes from 1e-3 to 1e3, and every axis once, where the bounds are met.",
        ],
        numbers={
            f"exponent.{model.name}.{role}": model.exponent(role).value
            for model in models
            for role in sorted(model.linear)
        },
    )


def _extremes(model: Model) -> tuple[tuple[str, float], tuple[str, float]]:
    slopes = sorted((model.exponent(role).value, role) for role in model.linear)
    (low, low_role), (high, high_role) = slopes[0], slopes[-1]
    return (low_role, low), (high_role, high)


def _told(models: Sequence[Model], keeps: Mapping[str, bool]) -> str:
    kept, lost = [model.name for model in models if keeps[model.name]], []
    for model in models:
        if not keeps[model.name]:
            role, slope = max(_extremes(model), key=lambda end: abs(end[1] - 0.5))
            lost.append(f"{model.name}: {slope:.2f} at {role}")
    told = [f"kept by {', '.join(kept)}"] if kept else []
    return "; ".join([*told, *([f"not kept by {', '.join(lost)}"] if lost else [])])


def _model_row(model: Model) -> list[Cell]:
    low, high = _extremes(model)
    return [
        model.name,
        len(model.normed),
        len(model.linear - model.normed),
        model.exponent(low[0]),
        model.exponent(high[0]),
    ]


def _slot_rows(model: Model) -> Iterable[list[Cell]]:
    for role, rows in model.slots.items():
        ends = [[row[at] for row in rows.values()] for at in (0, -1)]
        means = [geometric_mean([getattr(one, what) for one in ones]).value for what in ("x", "y") for ones in ends]
        yield [model.name, role, *means, model.exponent(role)]
