r"""Exact numbers of parameters, read off the model itself, which is built without memory (`meta` device)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gptnorm.config import BUILT_IN_TOKENIZERS, Config
from gptnorm.data.build import ready_folder
from gptnorm.data.shards import read_manifest
from gptnorm.errors import UserError
from gptnorm.model import GPT, build_gpt
from gptnorm.model.backbones import make_shape
from gptnorm.shape import Role


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model; every one is counted once, a tied head as the embedding."""

    total: int
    active: int
    """Those that one token meets: of the routed experts, top_k."""
    by_role: dict[Role, int]
    """Weights of linear maps and tables."""
    gains: int
    """All others: gains and learned scales."""


def count_parameters(model: GPT) -> ParameterCount:
    """The parameters of a model on any device."""
    roles: Counter[Role] = Counter()
    weights: set[int] = set()
    for _, owner in model.weights():
        roles[owner.role] += owner.weight.numel()
        weights.add(id(owner.weight))
    total = sum(p.numel() for p in model.parameters())
    return ParameterCount(
        total=total,
        active=total - idle_parameters(model),
        by_role=dict(roles),
        gains=sum(p.numel() for p in model.parameters() if id(p) not in weights),
    )


def idle_parameters(model: GPT, *, matrices_only: bool = False) -> int:
    """Parameters of the routed experts that a token does not go to.

    Args:
        matrices_only: their gains not counted.
    """
    experts = model.shape.experts
    if experts is None:
        return 0
    # Every parameter in there has the experts as its first axis.
    routed = sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".routed." in name and (not matrices_only or name.endswith(".weight"))
    )
    return routed * (experts.routed - experts.top_k) // experts.routed


def model_on_meta(config: Config, vocab: int) -> GPT:
    """The config's model without numbers; UserError where its sizes are beyond what torch can index."""
    shape = make_shape(config.model, config.moe, vocab=vocab, context=config.train.seq_len)
    largest = max(shape.d * max(shape.d, shape.d_ff, shape.vocab, shape.context), 1)
    if largest * (shape.experts.routed + shape.experts.shared if shape.experts else 1) >= 2**60:
        raise UserError(f"model.d_model = {shape.d}: one weight alone would have over 2^60 numbers")
    return build_gpt(config, vocab=vocab, device="meta")


def vocabulary(config: Config) -> int:
    """Rows of the embedding without a look at any text; of shards, what their manifest says.

    Raises:
        UserError: they follow from a tokenizer that is not built in, or from shards that do not say it.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    folder = ready_folder(config.data)
    if folder is not None:
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError("model.vocab_size: must be set, as the shards of data.path have no manifest.json")
        return manifest.vocab_size
    if config.data.tokenizer in BUILT_IN_TOKENIZERS:
        return 257 if config.data.tokenizer == "bytes" else config.data.bpe_vocab
    raise UserError(
        f"model.vocab_size: must be set, as data.tokenizer = {config.data.tokenizer!r} is not read here; "
        "Llama 2's tokens: 32000, GPT-2's: 50257"
    )
