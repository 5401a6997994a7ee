"""The feed-forward branch, gated (SwiGLU) or not."""

from __future__ import annotations

from torch import Tensor, nn

from gptnorm.activations import ACTIVATIONS
from gptnorm.model.projection import Projection
from gptnorm.shape import Shape
from gptnorm.strategies import Strategy


class FeedForwardBranch(nn.Module):
    """down(act(gate(x)) * up(x)) or down(act(up(x))), with the strategy's factors around act."""

    def __init__(self, layer: int, shape: Shape, strategy: Strategy) -> None:
        super().__init__()
        spec = strategy.feedforward(layer, shape)
        self.gate = Projection("gate", layer, shape, strategy) if shape.gated else None
        self.up = Projection("up", layer, shape, strategy)
        self.down = Projection("down", layer, shape, strategy)
        self.act = ACTIVATIONS[shape.activation]
        self.pre_activation = spec.pre_activation
        self.post_activation = spec.post_activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        z = self.gate(x_BTD) if self.gate else self.up(x_BTD)
        a = self.act(z if self.pre_activation == 1.0 else z * self.pre_activation)
        if self.gate:
            a = a * self.up(x_BTD)
        return self.down(a if self.post_activation == 1.0 else a * self.post_activation)
