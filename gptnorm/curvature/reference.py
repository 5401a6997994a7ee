"""Kernels that can be differentiated twice, in place of fast ones, while curvature is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptnorm.model import GPT
from gptnorm.model.gpt import Block
from gptnorm.model.moe import ExpertProjection, MixtureOfExperts
from gptnorm.model.projection import Projection


@contextlib.contextmanager
def reference_paths(model: GPT) -> Iterator[None]:
    """The model as plain products: eager, nothing recomputed, no dropout, nothing counted, attention in its plain form
    (fused attention has no second derivative), no autocast, experts in their reference form, without float8's rounding
    (whose derivative is zero almost everywhere). Afterwards everything is as it was.
    """
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    experts = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    rounded = [module for module in model.modules() if isinstance(module, Projection | ExpertProjection)]
    training = {module: module.training for module in model.modules()}
    before = [b.run for b in blocks], [e.reference for e in experts], [r.float8 for r in rounded]
    model.eval()
    try:
        for block in blocks:
            block.run = None
        for part in experts:
            part.reference = True
        for module in rounded:
            module.float8 = False
        device = model.embed.weight.device.type
        plain = torch.autocast(device, enabled=False)
        with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), plain:
            yield
    finally:
        runs, references, float8 = before
        for module, was in training.items():
            module.training = was
        for block, run in zip(blocks, runs, strict=True):
            block.run = run
        for part, reference in zip(experts, references, strict=True):
            part.reference = reference
        for module, value in zip(rounded, float8, strict=True):
            module.float8 = value
