"""Published sizes, as the settings they stand for.

Llama sizes: the configurations in SimpleGPT's reference code (`models/llama/__init__.py`), with the
vocabularies of the public tokenizers. GPT-2 sizes: nanoGPT. The paper does not give the shape of
its GPT-2 1.4B; 48 blocks of width 1536 is our guess (1.436B parameters).
"""

from __future__ import annotations

from gptnorm.config import BackboneName
from gptnorm.errors import bad_value

_GPT2_VOCAB = 50_304  # GPT-2's 50,257 tokens, rounded up by nanoGPT to a multiple of 64
_LLAMA2_VOCAB = 32_000
_LLAMA3_VOCAB = 128_256


def _size(d: int, layers: int, heads: int, vocab: int, kv_heads: int | None = None) -> dict[str, int]:
    sizes = {"d_model": d, "n_layers": layers, "n_heads": heads, "vocab_size": vocab}
    return sizes if kv_heads is None else {**sizes, "n_kv_heads": kv_heads}


PRESETS: dict[BackboneName, dict[str, dict[str, int]]] = {
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
    },
    "llama3": {
        "8B": _size(4096, 32, 32, _LLAMA3_VOCAB, kv_heads=8),
    },
}


def preset_sizes(backbone: BackboneName, name: str) -> dict[str, int]:
    """The model settings that a preset stands for; UserError if the backbone has none of that name."""
    if name not in PRESETS[backbone]:
        raise bad_value("model.preset", name, f"{backbone} has {', '.join(PRESETS[backbone])}")
    return PRESETS[backbone][name]
