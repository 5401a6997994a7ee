"""Published sizes, as the settings they stand for.

Llama sizes: the configurations in SimpleGPT's reference code (`models/llama/__init__.py`), with the
vocabularies of the public tokenizers. GPT-2 sizes: nanoGPT. The paper does not give the shape of
its GPT-2 1.4B; 48 blocks of width 1536 is our guess (1.436B parameters). 1B-7B: OLMoE (arXiv
2409.02060), 64 experts, 8 of them for each token; 1.3B of its 6.9B parameters are active.
"""

from __future__ import annotations

from gptnorm.config import BackboneName
from gptnorm.errors import bad_value
from gptnorm.tables import Tree

_GPT2_VOCAB = 50_304  # GPT-2's 50,257 tokens, rounded up by nanoGPT to a multiple of 64
_LLAMA2_VOCAB = 32_000
_LLAMA3_VOCAB = 128_256
_NEOX_VOCAB = 50_304  # GPT-NeoX's tokens, rounded up


def _size(d: int, layers: int, heads: int, vocab: int, **others: int) -> Tree:
    """A dense model; what it has no word for is the backbone's."""
    void = dict.fromkeys(("n_kv_heads", "d_ff", "ffn_multiple", "tied"))
    sizes = {"d_model": d, "n_layers": layers, "n_heads": heads, "vocab_size": vocab}
    return {"model": {**void, **sizes, **others}, "moe": {"experts": 0}}


def _with_experts(dense: Tree, experts: int, top_k: int, *, renormalize: bool) -> Tree:
    """The same with experts, each `d_ff` wide, and a softmax router."""
    moe = {"experts": experts, "top_k": top_k, "shared": 0, "gate": "softmax", "renormalize": renormalize}
    return {**dense, "moe": moe}


PRESETS: dict[BackboneName, dict[str, Tree]] = {
    "gpt2": {
        "124M": _size(768, 12, 12, _GPT2_VOCAB),
        "350M": _size(1024, 24, 16, _GPT2_VOCAB),
        "774M": _size(1280, 36, 20, _GPT2_VOCAB),
        "1.4B": _size(1536, 48, 24, _GPT2_VOCAB),
    },
    "llama2": {
        "20M": _size(256, 4, 4, _LLAMA2_VOCAB),
        "39M": _size(384, 8, 6, _LLAMA2_VOCAB),
        "67M": _size(512, 10, 8, _LLAMA2_VOCAB),
        "102M": _size(640, 12, 10, _LLAMA2_VOCAB),
        "134M": _size(768, 12, 12, _LLAMA2_VOCAB),
        "162M": _size(768, 16, 12, _LLAMA2_VOCAB),
        "271M": _size(1024, 16, 16, _LLAMA2_VOCAB),
        "1B": _size(2048, 18, 16, _LLAMA2_VOCAB),
        "7B": _size(4096, 32, 32, _LLAMA2_VOCAB),
        "1B-7B": _with_experts(_size(2048, 16, 16, _NEOX_VOCAB, d_ff=1024), 64, 8, renormalize=False),
    },
    "llama3": {
        "8B": _size(4096, 32, 32, _LLAMA3_VOCAB, n_kv_heads=8),
    },
}


def preset_settings(backbone: BackboneName, name: str) -> Tree:
    """The tables that a preset stands for; UserError if the backbone has none of that name.

    They name every setting of the architecture: what a lower layer of a recipe said about it is void.
    """
    if name not in PRESETS[backbone]:
        raise bad_value("model.preset", name, f"{backbone} has {', '.join(PRESETS[backbone])}")
    return PRESETS[backbone][name]
