"""One transformer for every backbone and strategy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptnorm.config import BackboneName, Config, InitConfig
from gptnorm.model.attention import CausalAttention
from gptnorm.model.backbones import make_shape
from gptnorm.model.feedforward import FeedForwardBranch
from gptnorm.model.init import block_std, draw_, normalize_, published_draw
from gptnorm.model.projection import Projection, Table
from gptnorm.model.rope import rotations
from gptnorm.norms import After
from gptnorm.shape import Shape
from gptnorm.strategies import Strategy, make_strategy
from gptnorm.strategies.base import State


class Parts(nn.Module):
    """What a strategy's wiring owns, by the names it gave."""

    def __init__(self, specs: dict[str, After]) -> None:
        super().__init__()
        for name, spec in specs.items():
            self.add_module(name, spec.build())

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Block(nn.Module):
    """One block: two branches, wired by the strategy."""

    def __init__(self, layer: int, shape: Shape, strategy: Strategy) -> None:
        super().__init__()
        self.layer = layer
        self.n_layers = shape.n_layers
        self.strategy = strategy
        self.attn = CausalAttention(layer, shape, strategy)
        self.ffn = FeedForwardBranch(layer, shape, strategy)
        self.own = Parts(strategy.block_parts(layer, shape))

    def forward(self, state: State, rotation: tuple[Tensor, Tensor] | None) -> State:
        def attn(x_BTD: Tensor) -> Tensor:
            return self.attn(x_BTD, rotation)

        return self.strategy.block(state, attn, self.ffn, self.own, self.layer, self.n_layers)


class GPT(nn.Module):
    """tokens (B, T) → logits (B, T, V).

    Built on the `meta` device it holds no numbers; `to_empty(device=…)` and `init_weights(seed)`
    then give the same model as building it directly.
    """

    def __init__(
        self, shape: Shape, strategy: Strategy, *, backbone: BackboneName, init: InitConfig, seed: int = 0
    ) -> None:
        super().__init__()
        self.shape = shape
        self.strategy = strategy
        self.backbone: BackboneName = backbone
        self.init = init
        self.embed = Table("embed", shape.vocab, shape, strategy)
        self.position = Table("position", shape.context, shape, strategy) if shape.rope_theta is None else None
        self.blocks = nn.ModuleList(Block(layer, shape, strategy) for layer in range(shape.n_layers))
        self.own = Parts(strategy.end_parts(shape))
        self.head = Projection("head", 0, shape, strategy)
        self._tie()
        if not self.embed.weight.is_meta:
            self.init_weights(seed)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.head(self.features(tokens_BT))

    def features(self, tokens_BT: Tensor) -> Tensor:
        """What the head reads, (B, T, d)."""
        h_BTD = self.embed(tokens_BT)
        rotation = None
        length = tokens_BT.shape[1]
        if self.shape.rope_theta is not None:
            rotation = rotations(length, self.shape.head_dim, self.shape.rope_theta, like=h_BTD)
        elif self.position is not None:
            h_BTD = h_BTD + self.position(torch.arange(length, device=tokens_BT.device))
        state = self.strategy.open(h_BTD, self.own)
        for block in self.blocks:
            state = block(state, rotation)
        return self.strategy.close(state, self.own)

    def loss(self, tokens_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats of predicting tokens 1 … T-1 from those before them."""
        logits = self(tokens_BT[:, :-1]).flatten(0, 1)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(exact, tokens_BT[:, 1:].flatten())

    def weights(self) -> Iterator[tuple[str, Projection | Table]]:
        """Every owner of a weight with its name; a tied head is its embedding and comes once."""
        for name, module in self.named_modules():
            if isinstance(module, Projection | Table) and not (module is self.head and self.shape.tied):
                yield name, module

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draws every weight and resets every gain and scale, from the seed alone."""
        self._tie()
        std = block_std(self.init, self.shape.d)
        for name, owner in self.weights():
            published = published_draw(self.backbone, owner.role, owner.layer, self.shape, std)
            draw_(owner.weight, self.strategy.init(owner.role, owner.layer, self.shape, published), seed, name)
            constraint = self.strategy.constraint(owner.role, owner.layer, self.shape)
            if constraint:
                normalize_(owner.weight, constraint.axis)
        for module in self.modules():
            reset = getattr(module, "reset", None)
            if callable(reset):
                reset()

    def _tie(self) -> None:
        """Makes the head the embedding, where it is; `to_empty` takes tied weights apart."""
        if self.shape.tied:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def after_step(self) -> None:
        """Puts back the weights that the strategy constrains; call it after every optimizer step."""
        for _, owner in self.weights():
            constraint = self.strategy.constraint(owner.role, owner.layer, self.shape)
            if constraint:
                normalize_(owner.weight, constraint.axis, only_longer=constraint.kind == "bound")


def build_gpt(config: Config, *, vocab: int, device: torch.device | str = "cpu") -> GPT:
    """The model that a config describes, drawn from its seed.

    Args:
        vocab: rows of the embedding where the config does not set them.
    """
    shape = make_shape(config.model, vocab=vocab, context=config.train.seq_len)
    strategy = make_strategy(config.model.strategy, config.strategy)
    with torch.device(device):
        return GPT(shape, strategy, backbone=config.model.backbone, init=config.init, seed=config.seed)
