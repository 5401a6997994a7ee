r"""PreNorm with normed queries and keys: the SimpleGPT paper's baseline.

    q = heads(N_q(W_q N(x))),  k = heads(N_k(W_k N(x))),  then RoPE;  v is left alone

The norm runs over all heads together, before they are split (`options.qk_norm = "full"`); per head
(`"head"`, as in Qwen 3) is another method under the same name.

Source: Henry et al. 2020 (arXiv 2010.04245) for the idea, the reference code of SimpleGPT
(arXiv 2602.01212, `preqknorm_model.py`) for this form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic.dataclasses import dataclass

from gptnorm.config import STRICT, Scalar
from gptnorm.strategies.prenorm import PreNorm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreNormQKNorm(PreNorm):
    """PreNorm with the attention option preset."""

    card = replace(
        PreNorm.card,
        title="PreNorm + QK-norm",
        paper="SimpleGPT's baseline (arXiv 2602.01212); QK-norm: Henry et al. 2020, arXiv 2010.04245",
        equation="PreNorm, with q ← N(q) and k ← N(k) over the full width (or per head) before RoPE",
        norms="PreNorm's, and one each on q and k over all heads together (or per head), eps 1e-5",
        rope="query/key norm, then split into heads, then RoPE",
        folds="as PreNorm's; without RoPE the gains of q and k merge into one vector, never into W_q or W_k",
        claims="survives 7B at rate 1e-3 with visible loss spikes: 2.393 at 20K steps, 2.290 at 60K (training loss)",
        published_with="Llama 2 (1B, 7B) and Llama 3 (8B), dense; a dense GPT-2 with a form of QK-norm not known here; "
        "experts on Llama 2's blocks (OLMoE)",
        ours="on gpt2 the norms run over the full width, too",
    )

    recipe_defaults: ClassVar[Mapping[str, Scalar]] = {"options.qk_norm": "full"}
