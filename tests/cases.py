"""The one table of what must hold for every strategy: its rows, and small models to try it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import pytest
import torch

from gptnorm.config import BackboneName, InitConfig, ModelConfig, MoEConfig
from gptnorm.model import GPT
from gptnorm.model.backbones import make_shape
from gptnorm.shape import Role, Shape
from gptnorm.strategies import STRATEGIES, find_strategy, make_strategy
from gptnorm.strategies.registry import preset_options

BACKBONES: tuple[BackboneName, ...] = get_args(BackboneName)
VOCAB, CONTEXT = 61, 16


class Row(NamedTuple):
    """What the conformance suite expects of one strategy."""

    strategy: str
    extra: Callable[[Shape], int]
    """Parameters beyond those of the bare matrices and tables."""
    constraints: Mapping[Role, tuple[Literal[-1, -2], Literal["unit", "bound"]]] = {}
    """Weights that it puts back after every step: vectors along the axis (-1: rows, -2: columns) to norm 1 or below."""
    own: Mapping[str, Any] = {}
    """Its own options here, where two blocks of the default would not show all of it."""


def _norms(per_block: int, ends: int) -> Callable[[Shape], int]:
    return lambda s: (per_block * s.n_layers + ends) * s.d


def feedforwards(s: Shape) -> int:
    """How many feed-forwards a block has, each with what follows its matrices."""
    return 1 if s.experts is None else s.experts.routed + s.experts.shared


def _after_every_matrix(s: Shape) -> int:
    copies = dict.fromkeys(("gate", "up", "down"), feedforwards(s))
    return s.n_layers * sum(copies.get(role, 1) * s.out_features(role) for role in s.matrix_roles) + s.d


def _scales_of_ngpt(s: Shape) -> int:
    """alpha twice, s_qk, s_u and (gated) s_v per block; s_z."""
    in_feedforward = (2 if s.gated else 1) * s.d_ff * feedforwards(s)
    return s.n_layers * (2 * s.d + s.d_kv + in_feedforward) + s.vocab


READING: tuple[Role, ...] = ("q", "k", "v", "gate", "up", "router")
"""What reads the stream."""
WRITING: tuple[Role, ...] = ("o", "down")
ENDS: tuple[Role, ...] = ("embed", "position", "head")

ROWS = (
    Row("prenorm", _norms(2, 1)),
    Row("prenorm_qknorm", lambda s: _norms(2, 1)(s) + s.n_layers * (s.d + s.d_kv)),
    Row("qkv_norm", lambda s: _norms(2, 1)(s) + 3 * s.n_layers * s.head_dim),
    Row("lns", _norms(2, 1)),
    # a gain and an alpha each; the scale of the embedding
    Row("dyt", lambda s: (2 * s.n_layers + 1) * (s.d + 1) + 1),
    Row("postnorm", _norms(2, 0)),
    Row("deepnorm", _norms(2, 0)),
    Row("b2t", _norms(2, 0)),
    # N0; the norm of the embedding where the head shares it
    Row("spannorm", lambda s: _norms(2, 2 if s.tied else 1)(s)),
    Row("keel", _norms(4, 0)),
    # by default no block of two is PostNorm
    Row("mixln", _norms(2, 1), own={"fraction": 0.5}),
    Row("hybridnorm", lambda s: _norms(1, 1)(s) + 3 * s.n_layers * s.head_dim),
    Row("sandwich", _norms(4, 1)),
    Row("periln", _norms(4, 2)),
    Row("reordered", lambda s: _norms(2, 1)(s) + s.n_layers * (s.d + s.d_kv)),
    Row("simplenorm", _after_every_matrix),
    # alpha twice per block; s_Z. Weight vectors along the input, for every matrix (angpt.md section 2)
    Row(
        "angpt",
        lambda s: s.n_layers * 2 * s.d + s.vocab,
        constraints={role: (-1, "bound") for role in (*ENDS, *READING, *WRITING)},
    ),
    # Vectors along the embedding dimension, which is the output of the maps that write (angpt.md section 6)
    Row(
        "ngpt",
        _scales_of_ngpt,
        constraints={role: (-2 if role in WRITING else -1, "unit") for role in (*ENDS, *READING, *WRITING)},
    ),
    Row("residual_dual", _norms(2, 1)),
    # four norms and the scale of X per block
    Row("siamesenorm", lambda s: _norms(5, 3)(s) + 3 * s.n_layers * s.head_dim),
)
assert [row.strategy for row in ROWS] == list(STRATEGIES), "every strategy has one row here"
ROW_OF = {row.strategy: row for row in ROWS}

MOE = MoEConfig(experts=4, top_k=2, shared=1, branch_gain="sqrt_k")
"""What `moe=True` means; the gain is one that a plain transcription can write down."""

DENSE = [(row.strategy, backbone) for row in ROWS for backbone in BACKBONES]
CASES = [
    *((strategy, backbone, False) for strategy, backbone in DENSE),
    *((row.strategy, "llama2", True) for row in ROWS),
    *(pytest.param(row.strategy, "llama3", True, marks=pytest.mark.slow) for row in ROWS),
]
"""Strategy, backbone, and whether the feed-forward is a mixture of experts."""


def tiny_shape(backbone: BackboneName, moe: bool | MoEConfig = False, **changes: Any) -> Shape:
    """Two blocks of width 32, four heads (two key/value heads for llama3), experts of width 24."""
    settings: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 24 if moe else 80, **changes}
    if backbone == "llama3":
        settings.setdefault("n_kv_heads", 2)
    return make_shape(ModelConfig(backbone=backbone, **settings), _moe(moe), vocab=VOCAB, context=CONTEXT)


def _moe(moe: bool | MoEConfig) -> MoEConfig | None:
    return (MOE if moe else None) if isinstance(moe, bool) else moe


def tiny_gpt(
    strategy: str,
    backbone: BackboneName,
    *,
    seed: int = 0,
    own: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    moe: bool | MoEConfig = False,
    dropout: float = 0.0,
    **changes: Any,
) -> GPT:
    """A model of `tiny_shape`, on whatever device is current.

    Args:
        own: the strategy's own options (the `[strategy]` table); left out, those of its row.
        options: those that compose with any (the `[options]` table), over the strategy's presets.
        moe: a mixture of experts, `MOE` or another.
    """
    own = dict(ROW_OF[strategy].own) if own is None else own
    presets = preset_options(find_strategy(strategy)())
    return GPT(
        tiny_shape(backbone, moe, **changes),
        make_strategy(strategy, own, replace(presets, **(options or {}))),
        backbone=backbone,
        init=InitConfig(std="twin"),
        moe=_moe(moe),
        dropout=dropout,
        seed=seed,
    )


def tokens(batch: int = 3, length: int = CONTEXT, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def shake(model: GPT, seed: int = 7) -> GPT:
    """Moves every gain and scale off its initial value, so that forgetting one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("weight"):
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model
