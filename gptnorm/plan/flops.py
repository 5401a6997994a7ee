r"""Floating-point operations of training, per token.

A multiplication and an addition are two operations. With $N$ the weights that multiply an activation (the matrices of
the blocks, the router and the head; of the routed experts the top_k that a token goes to; not the embedding, which is
looked up, and no gains), L blocks, a attention features (heads times head width, d here) and T tokens per sequence:

$$\text{forward} = 2N + 4 L a T, \qquad \text{model} = 3 \cdot \text{forward} = 6N + 12 L a T$$

for a backward pass costs twice a forward pass. Attention is counted over all T keys of every query, as in PaLM's
appendix B (Chowdhery et al. 2022, arXiv 2204.02311), nanoGPT and nanochat, so that utilisations can be compared; a
causal mask needs (T + 1) / 2T of it. Norms, softmax, rotary positions and activations are not counted.

Model FLOPs are what utilisation (MFU) is of. Hardware FLOPs count what is computed twice, too: with `train.recompute =
"full"` the forward pass of the blocks, $2 N_\text{blocks} + 4 L a T$; "selective" repeats no product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptnorm.model import GPT
from gptnorm.plan.params import idle_parameters


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Per token of a training step, forward and backward."""

    products: int
    """N: weights that multiply an activation."""
    products_in_blocks: int
    """Those of them that are not the head's."""
    attention_forward: int
    """4 L a T."""

    @property
    def forward(self) -> int:
        return 2 * self.products + self.attention_forward

    @property
    def model(self) -> int:
        """6 N + 12 L a T."""
        return 3 * self.forward

    def hardware(self, recompute: Literal["none", "selective", "full"]) -> int:
        """With what is computed a second time."""
        again = 2 * self.products_in_blocks + self.attention_forward
        return self.model + (again if recompute == "full" else 0)


def count_flops(model: GPT, seq_len: int) -> FlopCount:
    """The count for a model on any device."""
    shape = model.shape
    in_blocks = sum(
        owner.weight.numel() for _, owner in model.weights() if owner.role not in ("embed", "position", "head")
    ) - idle_parameters(model, matrices_only=True)
    attention = shape.n_heads * shape.head_dim
    return FlopCount(
        products=in_blocks + model.head.weight.numel(),
        products_in_blocks=in_blocks,
        attention_forward=4 * shape.n_layers * attention * seq_len,
    )
