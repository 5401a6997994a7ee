"""The backbones: what is fixed about GPT-2, Llama 2 and Llama 3 beside their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gptnorm.config import BackboneName, ModelConfig, MoEConfig
from gptnorm.shape import Experts, NormKind, Shape


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A family of architectures, as it was published."""

    gated: bool
    activation: Literal["silu", "gelu"]
    rope_theta: float | None
    tied: bool
    norm: NormKind
    ffn_factor: float
    """Widens int(8 d / 3), the Llama rule; unused without a gate, where d_ff = 4 d."""
    ffn_multiple: int
    init: Literal["gpt2", "llama"]
    """Which published initialisation; see `gptnorm.model.init`."""


BACKBONES: dict[BackboneName, Backbone] = {
    # nanoGPT: no bias, LayerNorm with gain only, exact GELU.
    "gpt2": Backbone(
        gated=False,
        activation="gelu",
        rope_theta=None,
        tied=True,
        norm="layernorm",
        ffn_factor=1.0,
        ffn_multiple=1,
        init="gpt2",
    ),
    "llama2": Backbone(
        gated=True,
        activation="silu",
        rope_theta=10_000.0,
        tied=False,
        norm="rmsnorm",
        ffn_factor=1.0,
        ffn_multiple=256,
        init="llama",
    ),
    "llama3": Backbone(
        gated=True,
        activation="silu",
        rope_theta=500_000.0,
        tied=False,
        norm="rmsnorm",
        ffn_factor=1.3,
        ffn_multiple=1024,
        init="llama",
    ),
}


def make_shape(config: ModelConfig, moe: MoEConfig | None = None, *, vocab: int, context: int) -> Shape:
    """The sizes of a model: the config's, and the backbone's own where the config is silent.

    Args:
        vocab: rows of the embedding if the config does not set them.
        context: longest sequence.
    """
    backbone = BACKBONES[config.backbone]
    return Shape(
        d=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads or config.n_heads,
        d_ff=config.d_ff or _d_ff(config, backbone),
        vocab=config.vocab_size or vocab,
        context=context,
        gated=backbone.gated,
        activation=backbone.activation,
        rope_theta=backbone.rope_theta,
        tied=backbone.tied if config.tied is None else config.tied,
        norm=backbone.norm,
        experts=Experts(routed=moe.experts, top_k=moe.top_k, shared=moe.shared) if moe and moe.experts else None,
    )


def _d_ff(config: ModelConfig, backbone: Backbone) -> int:
    if not backbone.gated:
        return 4 * config.d_model
    width = int(backbone.ffn_factor * int(8 * config.d_model / 3))
    multiple = config.ffn_multiple or backbone.ffn_multiple
    return multiple * -(-width // multiple)
