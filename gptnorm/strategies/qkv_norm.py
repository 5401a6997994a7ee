r"""PreNorm with normed queries, keys and values: HybridNorm's attention in a PreNorm block.

    q, k, v = N_q(heads(W_q N(x))), N_k(heads(W_k N(x))), N_v(heads(W_v N(x))),  then RoPE on q and k

`options.qk_norm` and `options.v_norm` are preset to "head"; "full" norms all heads together.

Source: Zhuo et al. 2025 (arXiv 2503.04598) for the norms on all three, Henry et al. 2020
(arXiv 2010.04245) for those on queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT, Scalar
from gptnorm.strategies.prenorm import PreNorm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QKVNorm(PreNorm):
    """PreNorm with both attention options preset."""

    card = replace(
        PreNorm.card,
        title="PreNorm + QKV-norm",
        paper="the attention of HybridNorm (Zhuo et al. 2025, arXiv 2503.04598) in PreNorm",
        equation="PreNorm, with q ← N(q), k ← N(k) and v ← N(v) per head (or over the full width), before RoPE",
        norms="PreNorm's, and one each on q, k and v over one head (or over all together), eps 1e-5",
        rope="query/key norm, then RoPE",
        folds="as PreNorm's, and the gain of v into W_o; those of q and k stay (RoPE)",
        claims="none of its own: HybridNorm without its PostNorm half, to tell the two apart",
        published_with="nothing, since the combination is ours; for its attention see HybridNorm",
        ours="the combination; the backbone's published initialisation is kept",
    )

    recipe_defaults: ClassVar[Mapping[str, Scalar]] = {"options.qk_norm": "head", "options.v_norm": "head"}
