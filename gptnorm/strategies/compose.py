r"""Options that compose with any strategy: one more strategy around it.

| option | changes |
|---|---|
| qk_norm, v_norm | norms on queries and keys (before RoPE) and on values, per head or over all heads |
| attention_softcap, logit_softcap | $c \tanh(s / c)$ of attention logits, of the head's logits |
| z_loss | adds $\lambda\,\mathrm{mean}(\log\sum_i e^{z_i})^2$ to the training objective |
| qk_clip | shrinks W_q, W_k of a head whose logits went beyond τ, after the step |
| scale_* | the depth factor $(2L)^{-p}$ or $L^{-p}$ (ScaleInit): of W_o, W_down at the start, or of the branches |
| norm_scale | every rmsnorm and l2 norm becomes $\gamma \odot c z$ with a constant c (`gptnorm.norms.Frozen`) |

Which pairs make no sense is not a list of names: it follows from what a strategy answers, asked on a
small probe. What does not follow, a strategy says itself (`refuses`).

Sources: QK-norm arXiv 2010.04245, 2302.05442; soft-caps Gemma 2 (2408.00118); z-loss PaLM (2204.02311);
QK-clip Kimi K2 (2507.20534); the name ScaleInit from SpanNorm (2601.22580), whose formula is not
published: the factor is that of GPT-2, the forward form our reading. norm_scale is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from gptnorm.config import OptionsConfig
from gptnorm.errors import bad_value
from gptnorm.norms import FREEZABLE, After, Axis, DynamicTanh, Frozen, Norm
from gptnorm.shape import Role, Shape
from gptnorm.strategies.base import (
    Attention,
    Branch,
    BranchScale,
    Constraint,
    Draw,
    FeedForward,
    Group,
    Logits,
    State,
    Strategy,
)
from gptnorm.typed import read_table

_Step = TypeVar("_Step")


class Wrapper(Strategy):
    """Answers as `inner` does; a subclass changes some of the answers."""

    inner: Strategy

    def projection(self, role: Role, layer: int, shape: Shape) -> tuple[After, ...]:
        return self.inner.projection(role, layer, shape)

    def attention(self, layer: int, shape: Shape) -> Attention:
        return self.inner.attention(layer, shape)

    def feedforward(self, layer: int, shape: Shape) -> FeedForward:
        return self.inner.feedforward(layer, shape)

    def branch_scale(self, layer: int, shape: Shape) -> BranchScale:
        return self.inner.branch_scale(layer, shape)

    def logits(self, shape: Shape) -> Logits:
        return self.inner.logits(shape)

    def make_norm(self, size: int, shape: Shape, axis: Axis = "width") -> Norm:
        return self.inner.make_norm(size, shape, axis)

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        return self.inner.block_parts(layer, shape)

    def end_parts(self, shape: Shape) -> dict[str, After]:
        return self.inner.end_parts(shape)

    def open(self, h: Tensor, own: Any) -> State:
        return self.inner.open(h, own)

    def block(self, state: State, attn: Branch, ffn: Branch, own: Any, layer: int, n_layers: int) -> State:
        return self.inner.block(state, attn, ffn, own, layer, n_layers)

    def close(self, state: State, own: Any) -> Tensor:
        return self.inner.close(state, own)

    def stream(self, state: State) -> Tensor:
        return self.inner.stream(state)

    def init(self, role: Role, layer: int, shape: Shape, published: Draw) -> Draw:
        return self.inner.init(role, layer, shape, published)

    def constraint(self, role: Role, layer: int, shape: Shape) -> Constraint | None:
        return self.inner.constraint(role, layer, shape)

    def refuses(self, options: OptionsConfig) -> dict[str, str]:
        return self.inner.refuses(options)

    def group(self, role: Role | None, layer: int, shape: Shape) -> Group:
        return self.inner.group(role, layer, shape)


@dataclass(frozen=True)
class Composed(Wrapper):
    """`inner` with `options`; see the module's table."""

    inner: Strategy
    options: OptionsConfig

    def projection(self, role: Role, layer: int, shape: Shape) -> tuple[After, ...]:
        return tuple(self._scaled(step) for step in self.inner.projection(role, layer, shape))

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        return {name: self._scaled(part) for name, part in self.inner.block_parts(layer, shape).items()}

    def end_parts(self, shape: Shape) -> dict[str, After]:
        return {name: self._scaled(part) for name, part in self.inner.end_parts(shape).items()}

    def attention(self, layer: int, shape: Shape) -> Attention:
        answer, options = self.inner.attention(layer, shape), self.options
        if options.qk_norm == "head":
            norm = self.make_norm(shape.head_dim, shape, "head")
            answer = replace(answer, q=norm, k=norm)
        elif options.qk_norm == "full":
            answer = replace(answer, q=self.make_norm(shape.d, shape), k=self.make_norm(shape.d_kv, shape))
        if options.v_norm == "head":
            answer = replace(answer, v=self.make_norm(shape.head_dim, shape, "head"))
        elif options.v_norm == "full":
            answer = replace(answer, v=self.make_norm(shape.d_kv, shape))
        answer = replace(answer, q=self._scaled(answer.q), k=self._scaled(answer.k), v=self._scaled(answer.v))
        return replace(answer, softcap=options.attention_softcap or answer.softcap, clip=options.qk_clip or answer.clip)

    def logits(self, shape: Shape) -> Logits:
        answer = self.inner.logits(shape)
        return Logits(softcap=self.options.logit_softcap or answer.softcap, z_loss=self.options.z_loss or answer.z_loss)

    def branch_scale(self, layer: int, shape: Shape) -> BranchScale:
        answer = self.inner.branch_scale(layer, shape)
        if self.options.scale_mode not in ("forward", "both"):
            return answer
        return BranchScale(
            attn=answer.attn * self._depth_factor("attn", shape), ffn=answer.ffn * self._depth_factor("ffn", shape)
        )

    def init(self, role: Role, layer: int, shape: Shape, published: Draw) -> Draw:
        mode = self.options.scale_mode
        if mode != "published":
            depth = 1.0
            if mode in ("init", "both") and role in ("o", "down"):
                depth = self._depth_factor("attn" if role == "o" else "ffn", shape)
            published = replace(published, depth=depth)
        return self.inner.init(role, layer, shape, published)

    def _scaled(self, step: _Step) -> _Step | Frozen:
        """The step itself, or what is left of a norm without its statistics.

        Raises:
            UserError: the backbone's norm, which only the shape knows, cannot be frozen.
        """
        if self.options.norm_scale == "live" or not isinstance(step, Norm):
            return step
        if step.kind not in FREEZABLE:
            raise bad_value(
                "options.norm_scale", "frozen", f'{step.kind}: {_CENTRES}; strategy.norm="rmsnorm" can be frozen'
            )
        return Frozen(norm=step)

    def _depth_factor(self, branch: str, shape: Shape) -> float:
        if self.options.scale_target not in ("both", branch):
            return 1.0
        count = 2 * shape.n_layers if self.options.scale_count == "2L" else shape.n_layers
        return count**-self.options.scale_power


def compose(strategy: Strategy, options: OptionsConfig) -> Strategy:
    """The strategy with the options around it; UserError if the pair makes no sense.

    Settings of a depth factor that there is none of are ignored, so that strategies with and without them are equal.
    """
    options = _without_idle_settings(options)
    if options == OptionsConfig():
        return strategy
    for key, reason in refusals(strategy, options).items():
        raise bad_value(f"options.{key}", getattr(options, key), f"{strategy.card.title} refuses it: {reason}")
    return Composed(strategy, options)


def _without_idle_settings(options: OptionsConfig) -> OptionsConfig:
    """What is said of a depth factor only where our own is used, else as it is by default."""
    if options.scale_mode not in ("published", "none"):
        return options
    usual = OptionsConfig()
    return replace(
        options, scale_target=usual.scale_target, scale_count=usual.scale_count, scale_power=usual.scale_power
    )


def refusals(strategy: Strategy, options: OptionsConfig) -> dict[str, str]:
    """The options that make no sense with the strategy, each with the reason."""
    found = {}
    traits = _traits(strategy)
    if options.qk_norm != "none" and traits.qk_normed:
        found["qk_norm"] = "its queries and keys are normed already"
    if options.v_norm != "none" and traits.v_normed:
        found["v_norm"] = "its values are normed already"
    # A frozen norm passes smaller queries and keys on.
    normed = options.norm_scale == "live" and (traits.qk_normed or options.qk_norm != "none")
    if options.qk_clip and normed:
        found["qk_clip"] = "queries and keys are normed, so smaller weights would change nothing"
    elif options.qk_clip and traits.pinned:
        found["qk_clip"] = "its weights are put back to norm 1 after every step, which would undo the clip"
    if options.scale_mode in ("init", "both"):
        if traits.constrained:
            found["scale_mode"] = "its weights are brought to norm 1 at initialisation, which would undo the factor"
        elif traits.output_normed:
            found["scale_mode"] = "its branches' outputs are normed: smaller weights would not change the forward pass"
        elif traits.own_depth:
            found["scale_mode"] = "its initialisation has a depth factor of its own"
    if options.scale_mode == "none" and traits.own_depth and not traits.constrained:
        found["scale_mode"] = "its initialisation has a depth factor of its own, which would stay"
    if options.scale_mode in ("forward", "both") and traits.wiring_norms:
        found.setdefault("scale_mode", "a norm follows each branch, which would undo the factor")
    if options.norm_scale == "frozen" and (reason := _cannot_freeze(strategy, options)):
        found["norm_scale"] = reason
    for key, reason in strategy.refuses(options).items():
        found.setdefault(key, reason)
    return found


OFFERED: dict[str, dict[str, Any]] = {
    "qk_norm=head": {"qk_norm": "head"},
    "qk_norm=full": {"qk_norm": "full"},
    "v_norm=head": {"v_norm": "head"},
    "v_norm=full": {"v_norm": "full"},
    "attention_softcap": {"attention_softcap": 50.0},
    "logit_softcap": {"logit_softcap": 30.0},
    "z_loss": {"z_loss": 1e-4},
    "qk_clip": {"qk_clip": 100.0},
    "scale_mode=none": {"scale_mode": "none"},
    "scale_mode=init": {"scale_mode": "init"},
    "scale_mode=forward": {"scale_mode": "forward"},
    "scale_mode=both": {"scale_mode": "both"},
    "norm_scale=frozen": {"norm_scale": "frozen"},
}
"""What can be set on top of a strategy's presets, one at a time."""


def offers(strategy: Strategy) -> dict[str, str | None]:
    """For each of `OFFERED`, why the strategy refuses it, or None if it takes it."""
    presets = preset_options(strategy)
    return {
        name: next(iter(refusals(strategy, replace(presets, **change)).values()), None)
        for name, change in OFFERED.items()
    }


def preset_options(strategy: Strategy) -> OptionsConfig:
    """The `options.…` among a strategy's recipe defaults."""
    defaults = {key.partition(".")[::2]: value for key, value in strategy.recipe_defaults.items()}
    table = {key: value for (table, key), value in defaults.items() if table == "options"}
    return read_table(OptionsConfig, table, key="options")


_PROBE = Shape(
    d=8,
    n_layers=4,
    n_heads=2,
    n_kv_heads=2,
    d_ff=16,
    vocab=5,
    context=4,
    gated=True,
    activation="silu",
    rope_theta=10_000.0,
    tied=False,
    norm="rmsnorm",
)
"""What is asked here does not depend on the sizes."""


@dataclass(frozen=True, kw_only=True)
class _Traits:
    qk_normed: bool
    v_normed: bool
    constrained: bool
    """Whether W_o or W_down are brought to norm 1 at initialisation."""
    pinned: bool
    """Whether W_q or W_k are put back to norm 1 after every step, and not merely kept from growing."""
    wiring_norms: bool
    """Whether the block norms both branches' outputs before it adds them."""
    output_normed: bool
    """The same, or the output projections themselves are normed."""
    own_depth: bool
    """Whether it replaces the depth factor of the published initialisation."""


@cache
def _traits(strategy: Strategy) -> _Traits:
    shape, layers = _PROBE, range(_PROBE.n_layers)
    attention = [strategy.attention(layer, shape) for layer in layers]

    def normed(role: Role) -> bool:
        return any(isinstance(step, Norm) for layer in layers for step in strategy.projection(role, layer, shape))

    wiring = all(_norms_its_branches(strategy, layer) for layer in layers)
    probe = Draw(std=1.0, depth=0.5)
    return _Traits(
        qk_normed=any(a.q or a.k for a in attention) or normed("q") or normed("k"),
        v_normed=any(a.v for a in attention) or normed("v"),
        constrained=any(strategy.constraint(role, n, shape) for role in ("o", "down") for n in layers),
        pinned=any(
            c.kind == "unit" for role in ("q", "k") for n in layers if (c := strategy.constraint(role, n, shape))
        ),
        wiring_norms=wiring,
        output_normed=wiring or (normed("o") and normed("down")),
        own_depth=any(
            strategy.init(role, layer, shape, probe).depth != 0.5 for role in ("o", "down") for layer in layers
        ),
    )


_CENTRES = "a constant would still have to take the mean of each token away"


def _cannot_freeze(strategy: Strategy, options: OptionsConfig) -> str | None:
    """Why `norm_scale = "frozen"` makes no sense with the strategy and the other options; None if it does."""
    steps = list(_steps(Composed(strategy, replace(options, norm_scale="live"))))
    if any(isinstance(step, DynamicTanh) for step in steps):
        return "it has tanh where others have norms, which has no statistics to freeze"
    kinds = {step.kind for step in steps if isinstance(step, Norm)}
    if not kinds:
        return "it has no norm that could be frozen"
    return None if kinds <= set(FREEZABLE) else _CENTRES


def _steps(strategy: Strategy) -> Iterator[After]:
    """Whatever a strategy puts after maps, into attention, into the wiring and at the ends."""
    for layer in range(_PROBE.n_layers):
        for role in get_args(Role):
            yield from strategy.projection(role, layer, _PROBE)
        attention = strategy.attention(layer, _PROBE)
        yield from (norm for norm in (attention.q, attention.k, attention.v) if norm)
        yield from strategy.block_parts(layer, _PROBE).values()
    yield from strategy.end_parts(_PROBE).values()


def _norms_its_branches(strategy: Strategy, layer: int) -> bool:
    """Whether doubling what both branches put out leaves the block's output where it was."""
    # Imported here: the model is built from strategies, not the other way round.
    from gptnorm.model.parts import Parts

    with torch.device("cpu"), torch.no_grad():
        own = Parts(strategy.block_parts(layer, _PROBE)).double()
        ends = Parts(strategy.end_parts(_PROBE)).double()
        generator = torch.Generator().manual_seed(0)
        h, a, f = (torch.randn(1, 3, _PROBE.d, generator=generator, dtype=torch.float64) for _ in range(3))

        def output(factor: float) -> State:
            state = strategy.open(h, ends)
            return strategy.block(state, lambda _: factor * a, lambda _: factor * f, own, layer, _PROBE.n_layers)

        return all(torch.allclose(x, y, atol=1e-3) for x, y in zip(output(1.0), output(2.0), strict=True))
