"""What is measured of activations: each a number on the tensor's own device, in fp32 or better, without a graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = 2**24
"""Attention logits that `largest_logits` holds in memory at a time (64 MiB in fp32)."""


def exact(x: Tensor) -> Tensor:
    """The same numbers in fp32 or better, cut from the graph."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def mean_square(x: Tensor) -> Tensor:
    r"""$\mathrm{mean}(x^2)$ over tokens and features: the variance about zero, RMS squared."""
    return exact(x).square().mean()


def mean_norm(x_BTD: Tensor) -> Tensor:
    r"""$\mathrm{mean}_t \lVert x_t \rVert_2$ over tokens."""
    return torch.linalg.vector_norm(exact(x_BTD), dim=-1).mean()


def step_cosine(before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
    r"""$\mathrm{mean}_t \cos(x_t, x'_t)$: 1 if a block changes no direction."""
    return F.cosine_similarity(exact(before_BTD), exact(after_BTD), dim=-1, eps=1e-30).mean()


def token_cosine(x_BTD: Tensor) -> Tensor:
    r"""Mean cosine of two different tokens of a sequence, over pairs and sequences: 1 is rank collapse.

    With unit vectors $u_t$ it is $(\lVert \sum_t u_t \rVert^2 - \sum_t \lVert u_t \rVert^2) / (T (T - 1))$; nan for one
    token.
    """
    u_BTD = F.normalize(exact(x_BTD), dim=-1, eps=1e-30)
    length = u_BTD.shape[1]
    together_B = u_BTD.sum(1).square().sum(-1) - u_BTD.square().sum((1, 2))
    return (together_B / (length * (length - 1) or float("nan"))).mean()


def logit_bounds(q_BHTE: Tensor, k_BGTE: Tensor, scale: float) -> Tensor:
    r"""$|\text{scale}|\,\max_t \lVert q_t \rVert\,\max_t \lVert k_t \rVert$ of each head within a sequence, the largest
    over sequences, (H,): no attention logit is beyond it (Cauchy-Schwarz)."""
    q_BH, k_BG = (torch.linalg.vector_norm(exact(z), dim=-1).amax(-1) for z in (q_BHTE, k_BGTE))
    k_BH = k_BG.repeat_interleave(q_BH.shape[1] // k_BG.shape[1], dim=1)
    return abs(scale) * (q_BH * k_BH).amax(0)


def largest_logits(q_BHTE: Tensor, k_BGTE: Tensor, scale: float) -> Tensor:
    r"""$\max_{s \le t}\ \text{scale}\; q_t \cdot k_s$ of each head, (H,): the largest logit that no mask hides, before
    any soft-cap. In pieces, so that no (T, T) matrix of all heads is held."""
    q, k = exact(q_BHTE), exact(k_BGTE)
    heads, length = q.shape[1], q.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    rows = max(1, min(length, LOGITS_AT_ONCE // (heads * length)))
    found = []
    for q_HTE, k_HTE in zip(q, k, strict=True):
        for start in range(0, length, rows):
            end = min(start + rows, length)
            logits_HRS = scale * (q_HTE[:, start:end] @ k_HTE[:, :end].mT)
            hidden = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu(start + 1)
            found.append(logits_HRS.masked_fill(hidden, float("-inf")).amax((1, 2)))
    return torch.stack(found).amax(0)
