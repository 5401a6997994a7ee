r"""Width rules: what a wider model changes so that the learning rate need not be tuned again.

With $s = d / d_\mathrm{base}$, relative to the draw and the rate of the same recipe at `optim.base_width`:

| rule | group | initial variance | learning rate |
|---|---|---|---|
| both | embedding, positions, gains, learned scales | 1 | 1 |
| both | hidden matrices, experts | 1/s | 1/s |
| align | head, router | 1/s | 1/s |
| mup | head, router | 1/s² | 1/s |

The router is head-like, since its input alone grows with the width (our reading: neither table names it).

Learned scales that are stored apart from what they stand for start and are stored as at the base width. One that is
stored at 1/√d would move by √d times the learning rate, and an embedding that a scale of √d makes up for would, too.

AdamW decays by (learning rate) x (weight decay), so where the rate is divided by s the decay is multiplied by it, and
what a step takes off a weight stays the same. The rules hold depth, batch, length of training and the head width
constant; the logits' 1/√head_dim (mup asks for 1/head_dim) is then a constant, too. Adam's eps has to stay far below
the gradients' size, which falls with the width: 1e-12 or less for large s.

Weights that are put back to norm 1 keep the projection's scale whatever the draw was; for them a rule is its learning
rates alone. Rows of norm 1 have entries of 1/√d, so that for embedding, positions and head, whose rows are vectors of
the stream, the rate is divided by √s under both rules (ours): a step then turns a row by the same angle at every width.

Sources: align is "Adam LR full align" in standard parameterisation (Everett et al. 2024, arXiv 2407.05872), as
LongCat-Flash used it (2509.01322); mup is table 3 of Yang et al. 2022 (2203.03466), its column for Adam. That both
multiply the decay by s is what the authors' `mup` package does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from gptnorm.config import OptimConfig
from gptnorm.errors import bad_value
from gptnorm.norms import After, LearnedScale
from gptnorm.shape import Role, Shape
from gptnorm.strategies.base import Attention, Draw, Group, Strategy
from gptnorm.strategies.compose import Wrapper

PublishedDraw = Callable[[Role, int, Shape], Draw]
"""(role, layer, shape) to the backbone's own draw of a weight."""


@dataclass(frozen=True, kw_only=True)
class WidthRule(Wrapper):
    """`inner` with initial scale, learning rate and decay by role as the module's table has them."""

    inner: Strategy
    mup: bool
    """Whether head and router follow mup; else they are aligned like a hidden matrix."""
    base: Shape
    """The same model at the base width."""
    published: PublishedDraw
    """Asked at the base width: some published draws follow the width themselves, others do not."""

    def projection(self, role: Role, layer: int, shape: Shape) -> tuple[After, ...]:
        real, base = (self.inner.projection(role, layer, at) for at in (shape, self.base))
        return _with_scales_of(base, real)

    def attention(self, layer: int, shape: Shape) -> Attention:
        real, base = (self.inner.attention(layer, at) for at in (shape, self.base))
        if real.qk_scale is None or base.qk_scale is None:
            return real
        return replace(real, qk_scale=_at_base(base.qk_scale, real.qk_scale))

    def block_parts(self, layer: int, shape: Shape) -> dict[str, After]:
        real, base = (self.inner.block_parts(layer, at) for at in (shape, self.base))
        return dict(zip(real, _with_scales_of(base.values(), real.values()), strict=True))

    def end_parts(self, shape: Shape) -> dict[str, After]:
        real, base = (self.inner.end_parts(at) for at in (shape, self.base))
        return dict(zip(real, _with_scales_of(base.values(), real.values()), strict=True))

    def init(self, role: Role, layer: int, shape: Shape, published: Draw) -> Draw:
        draw = self.inner.init(role, layer, self.base, self.published(role, layer, self.base))
        if _embedding_like(role):
            return draw
        factor = self._scale(shape) ** (-1.0 if self.mup and role in ("head", "router") else -0.5)
        return replace(draw, std=draw.std * factor, cut=None if draw.cut is None else draw.cut * factor)

    def group(self, role: Role | None, layer: int, shape: Shape) -> Group:
        own = self.inner.group(role, layer, shape)
        if role in ("embed", "position", "head") and self.inner.constraint(role, layer, shape):
            factor = self._scale(shape) ** 0.5
        else:
            factor = 1.0 if _embedding_like(role) else self._scale(shape)
        return Group(lr=own.lr / factor, weight_decay=own.weight_decay * factor)

    def _scale(self, shape: Shape) -> float:
        return shape.d / self.base.d


def _embedding_like(role: Role | None) -> bool:
    """Whether one side of the weight alone grows with the width, and it is the output; None: gains and scales."""
    return role in (None, "embed", "position")


def _with_scales_of(base: Iterable[After], real: Iterable[After]) -> tuple[After, ...]:
    """`real`, its learned scales with the numbers of those of `base`; they come in the same order."""
    scales = (step for step in base if isinstance(step, LearnedScale))
    return tuple(_at_base(next(scales), step) if isinstance(step, LearnedScale) else step for step in real)


def _at_base(base: LearnedScale, real: LearnedScale) -> LearnedScale:
    return replace(real, init=base.init, scale=base.scale)


def apply_width_rule(strategy: Strategy, config: OptimConfig, shape: Shape, published: PublishedDraw) -> Strategy:
    """The strategy under `optim.width_rule`, or as it is where that is "none".

    Raises:
        UserError: a tied head, or a base width that the heads do not divide.
    """
    if config.width_rule == "none":
        return strategy
    assert config.base_width is not None, "OptimConfig asks for it"
    if shape.tied:
        raise bad_value(
            "optim.width_rule",
            config.width_rule,
            "treats embedding and head differently, and here they are one weight; set model.tied = false",
        )
    if config.base_width % shape.head_dim:
        raise bad_value(
            "optim.base_width",
            config.base_width,
            f"must be a multiple of the head width {shape.head_dim} (model.d_model / model.n_heads), which stays",
        )
    base = shape_at_width(shape, config.base_width)
    return WidthRule(inner=strategy, mup=config.width_rule == "mup", base=base, published=published)


def shape_at_width(shape: Shape, width: int) -> Shape:
    """The same shape at another width: head width, query heads per key head and d_ff / d stay."""
    heads = width // shape.head_dim
    share = shape.n_heads // shape.n_kv_heads
    return replace(
        shape,
        d=width,
        n_heads=heads,
        # A base narrower than one group has one key head; no draw depends on it.
        n_kv_heads=max(1, heads // share),
        d_ff=max(1, round(shape.d_ff * width / shape.d)),
    )
