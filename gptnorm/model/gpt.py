"""One transformer for every backbone and strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptnorm.config import BackboneName, Config, InitConfig, MoEConfig
from gptnorm.errors import UserError
from gptnorm.model.attention import CausalAttention
from gptnorm.model.backbones import make_shape
from gptnorm.model.feedforward import FeedForwardBranch
from gptnorm.model.init import drawn, normalize_, published_draw
from gptnorm.model.moe import MixtureOfExperts, Routing
from gptnorm.model.parts import Parts
from gptnorm.model.projection import Projection, Table, WeightOwner
from gptnorm.model.rope import rotations
from gptnorm.model.router import BiasBalancer
from gptnorm.norms import FrozenModule, calibration
from gptnorm.shape import Shape
from gptnorm.sharding import here, part_of
from gptnorm.strategies import Strategy, make_strategy
from gptnorm.strategies.base import Logits, State
from gptnorm.strategies.width import apply_width_rule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Block(nn.Module):
    """One block: two branches, wired by the strategy."""

    run: Callable[[State, tuple[Tensor, Tensor] | None], tuple[State, Routing | None]] | None = None
    """Another way to compute `wired`: compiled, or keeping less for the backward pass (`gptnorm.train.blocks`)."""

    def __init__(self, layer: int, shape: Shape, strategy: Strategy, moe: MoEConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = layer
        self.n_layers = shape.n_layers
        self.strategy = strategy
        self.attn = CausalAttention(layer, shape, strategy)
        self.ffn = (
            MixtureOfExperts(layer, shape, strategy, moe)
            if shape.experts
            else FeedForwardBranch(layer, shape, strategy)
        )
        self.scale = strategy.branch_scale(layer, shape)
        self.dropout = dropout
        self.own = Parts(strategy.block_parts(layer, shape))

    def forward(self, state: State, rotation: tuple[Tensor, Tensor] | None) -> tuple[State, Routing | None]:
        return (self.run or self.wired)(state, rotation)

    def wired(self, state: State, rotation: tuple[Tensor, Tensor] | None) -> tuple[State, Routing | None]:
        """The block equation, with what its router did."""
        routing: Routing | None = None

        def attn(x_BTD: Tensor) -> Tensor:
            return self._branch(self.scale.attn, self.attn(x_BTD, rotation))

        def ffn(x_BTD: Tensor) -> Tensor:
            nonlocal routing
            if isinstance(self.ffn, MixtureOfExperts):
                y_BTD, routing = self.ffn(x_BTD)
            else:
                y_BTD = self.ffn(x_BTD)
            return self._branch(self.scale.ffn, y_BTD)

        state = self.strategy.block(state, attn, ffn, self.own, self.layer, self.n_layers)
        return state, routing

    def _branch(self, factor: float, y: Tensor) -> Tensor:
        return _dropped(y if factor == 1.0 else y * factor, self.dropout, self.training)


def _dropped(x: Tensor, p: float, training: bool) -> Tensor:
    return F.dropout(x, p) if p and training else x


class Objective(NamedTuple):
    """What training minimises, and what of it is reported."""

    total: Tensor
    """The cross-entropy and every auxiliary loss, in nats per token; what is differentiated."""
    loss: Tensor
    """The cross-entropy alone."""
    routing: Routing | None
    """Router statistics, each with a leading axis of blocks; None without experts."""


class GPT(nn.Module):
    """tokens (B, T) → logits (B, T, V).

    Built on the `meta` device it holds no numbers; `to_empty(device=…)` and `init_weights(seed)`
    then give the same model as building it directly.

    In training mode QK-clip and bias balancing count what passes, for their next `after_step`; `eval()`
    leaves every buffer alone, so that a measurement changes nothing (and forward-mode derivatives work).
    Dropout, too, is there in training mode only: on what leaves the embedding (learned positions added) and on each
    branch's output, before any norm of the wiring after it.

    Frozen norms (`options.norm_scale`) have no constants until `calibrate` has measured them or a checkpoint was
    loaded; before that every forward pass is a UserError.

    The parameters may be DTensors over the processes of a run (`gptnorm.train.parallel`).
    """

    calibrated: bool
    """Whether every frozen norm is known to have its constant; where it is not, the next forward pass looks."""

    def __init__(
        self,
        shape: Shape,
        strategy: Strategy,
        *,
        backbone: BackboneName,
        init: InitConfig,
        moe: MoEConfig | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.strategy = strategy
        self.backbone: BackboneName = backbone
        self.init = init
        self.moe = moe or MoEConfig()
        self.dropout = dropout
        self.logits = strategy.logits(shape)
        self.score = score
        self.embed = Table("embed", shape.vocab, shape, strategy)
        self.position = Table("position", shape.context, shape, strategy) if shape.rope_theta is None else None
        self.blocks = nn.ModuleList(Block(layer, shape, strategy, self.moe, dropout) for layer in range(shape.n_layers))
        self.own = Parts(strategy.end_parts(shape))
        self.head = Projection("head", 0, shape, strategy)
        self.tie()
        self.calibrated = not self.frozen_norms()
        if not self.embed.weight.is_meta:
            self.init_weights(seed)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        h_BTD, _ = self._run(tokens_BT)
        return self.read_out(h_BTD)

    def features(self, tokens_BT: Tensor) -> Tensor:
        """What the head reads, (B, T, d)."""
        h_BTD, _ = self._run(tokens_BT)
        return h_BTD

    def read_out(self, h: Tensor) -> Tensor:
        """The logits of features, (…, d) → (…, V), each position for itself."""
        return _capped(self.head(h), self.logits.softcap)

    def loss(self, tokens_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats of predicting tokens 1 … T-1 from those before them.

        What is reported; what is trained is `objective`, which differs by the auxiliary losses.
        """
        return _cross_entropy(self(tokens_BT[:, :-1]), tokens_BT[:, 1:])

    def objective(self, tokens_BT: Tensor) -> Objective:
        """The loss with the auxiliary losses of options and experts; without them `total` is `loss`."""
        h_BTD, routings = self._run(tokens_BT[:, :-1])
        loss, total = self.score(self.head(h_BTD), tokens_BT[:, 1:], self.logits)
        if not routings:
            return Objective(total=total, loss=loss, routing=None)
        routing = Routing(*(torch.stack(values) for values in zip(*routings, strict=True)))
        if self.moe.balance == "loss":
            total = total + self.moe.balance_weight * routing.balance.mean()
        total = total + self.moe.z_loss * routing.z.mean()
        return Objective(total=total, loss=loss, routing=routing)

    def _run(self, tokens_BT: Tensor) -> tuple[Tensor, list[Routing]]:
        if not self.calibrated:
            self._look_for_constants()
        h_BTD = self.embed(tokens_BT)
        rotation = None
        length = tokens_BT.shape[1]
        if self.shape.rope_theta is not None:
            rotation = rotations(length, self.shape.head_dim, self.shape.rope_theta, like=h_BTD)
        elif self.position is not None:
            h_BTD = h_BTD + self.position(torch.arange(length, device=tokens_BT.device))
        h_BTD = _dropped(h_BTD, self.dropout, self.training)
        state = self.strategy.open(h_BTD, self.own)
        routings = []
        for block in self.blocks:
            state, routing = block(state, rotation)
            if routing is not None:
                routings.append(routing)
        return self.strategy.close(state, self.own), routings

    def weights(self) -> Iterator[tuple[str, WeightOwner]]:
        """Every owner of a weight with its name; a tied head is its embedding and comes once."""
        for name, module in self.named_modules():
            if isinstance(module, WeightOwner) and not (module is self.head and self.shape.tied):
                yield name, module

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws every weight and resets every gain and scale, from the seed alone."""
        self.tie()
        for name, owner in self.weights():
            weight = owner.weight
            published = published_draw(self.backbone, owner.role, owner.layer, self.shape, self.init)
            draw = self.strategy.init(owner.role, owner.layer, self.shape, published)
            # Whole, whatever part of it is kept: a vector's norm and the numbers themselves are then the same bit by
            # bit on any number of processes.
            full = drawn(weight.shape, draw, seed, name).to(weight.dtype)
            if owner.constraint:
                normalize_(full, owner.constraint.axis)
            here(weight).copy_(part_of(full, like=weight))
        for module in self.modules():
            reset = getattr(module, "reset", None)
            if callable(reset):
                reset()
        self.calibrated = not self.frozen_norms()

    def frozen_norms(self) -> list[FrozenModule]:
        """Every norm whose scale is a constant."""
        return [module for module in self.modules() if isinstance(module, FrozenModule)]

    @torch.no_grad()
    def calibrate(self, tokens_BT: Tensor) -> None:
        """Measures the constants of the frozen norms on tokens (B, T + 1), of which T are read; without any, no work.

        One forward pass, eager, in eval mode (no dropout, nothing is counted), in the caller's autocast: each norm
        takes the mean square of its input, to which the norms before it, frozen already, have led. Every process of a
        run calls it with its own rows; all rows count.

        A norm after an expert's map takes the tokens of all experts together, those that `MixtureOfExperts` computes:
        each expert's own, or, on the reference path, every token for every expert.
        """
        frozen = self.frozen_norms()
        if not frozen:
            return
        training, self.calibrated = self.training, True
        with torch.compiler.set_stance("force_eager"):
            self.eval()
            try:
                with calibration(frozen):
                    self(tokens_BT[:, :-1])
            finally:
                self.train(training)

    def _look_for_constants(self) -> None:
        if not all(norm.known for norm in self.frozen_norms()):
            raise UserError(
                "options.norm_scale = 'frozen': these weights have no constants for their norms yet; a checkpoint of a "
                "run has them, and GPT.calibrate(tokens) measures them"
            )
        self.calibrated = True

    def tie(self) -> None:
        """Makes the head the embedding, where it is; `to_empty` takes tied weights apart."""
        if self.shape.tied:
            self.head.weight = self.embed.weight

    def count_over(self, mesh: DeviceMesh) -> None:
        """Has QK-clip, bias balancing and `calibrate` count what passes on all of a mesh ("data", "tensor")."""
        for module in self.modules():
            if isinstance(module, CausalAttention | BiasBalancer | FrozenModule):
                module.mesh = mesh

    @torch.no_grad()
    def after_step(self) -> None:
        """What has to happen to the weights after every optimizer step: constraints, clips, balancing."""
        for module in self.modules():
            hook = getattr(module, "after_step", None)
            if callable(hook) and module is not self and not (module is self.head and self.shape.tied):
                hook()


def score(logits_BTV: Tensor, targets_BT: Tensor, spec: Logits) -> tuple[Tensor, Tensor]:
    """The cross-entropy of the head's output, and with the auxiliary losses of the logits added."""
    logits_BTV = _capped(logits_BTV, spec.softcap)
    loss = total = _cross_entropy(logits_BTV, targets_BT)
    if spec.z_loss:
        exact = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        total = total + spec.z_loss * exact.logsumexp(-1).square().mean()
    return loss, total


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    logits = logits_BTV.flatten(0, 1)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, targets_BT.flatten())


def build_gpt(config: Config, *, vocab: int, device: torch.device | str = "cpu") -> GPT:
    """The model that a config describes, drawn from its seed.

    Args:
        vocab: rows of the embedding where the config does not set them.
    """
    shape = make_shape(config.model, config.moe, vocab=vocab, context=config.train.seq_len)
    strategy = make_strategy(config.model.strategy, config.strategy, config.options)
    published = partial(published_draw, config.model.backbone, config=config.init)
    strategy = apply_width_rule(strategy, config.optim, shape, published)
    with torch.device(device):
        return GPT(
            shape,
            strategy,
            backbone=config.model.backbone,
            init=config.init,
            moe=config.moe,
            dropout=config.model.dropout,
            seed=config.seed,
        )
