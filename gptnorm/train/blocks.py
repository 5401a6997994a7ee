"""What a block keeps for its backward pass, how it is compiled, and whether it multiplies in float8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gptnorm.model import GPT
from gptnorm.model.gpt import Block
from gptnorm.model.moe import ExpertProjection
from gptnorm.model.projection import Projection

_aten = torch.ops.aten

KEPT = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten._grouped_mm.default,
        torch.ops._c10d_functional.all_reduce.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Results that "selective" keeps: of matrix products, of fused attention, and of sums over processes."""


def prepare_blocks(
    model: GPT,
    recompute: Literal["none", "selective", "full"],
    *,
    compiled: bool,
    float8: bool = False,
    **options: Any,
) -> None:
    """Sets what every block keeps for its backward pass, and compiles it by itself; names of weights stay.

    Kept are all intermediate results ("none"), the block's inputs and `KEPT` ("selective"), or its inputs ("full"). The
    rest is computed again, with the same random numbers; gradients are the same.

    Blocks of the same equation share their compiled code, whatever the depth. The loss is compiled from the head's
    output on. `torch.compiler.set_stance("force_eager")` goes around all of it for a while.

    Args:
        float8: whether the blocks' linear maps, those of experts included, round what they multiply
            (`gptnorm.model.float8`); embedding, head and routers never do.
        options: of `torch.compile`.
    """
    if compiled:
        # A strategy may differ in every block, and each has versions for training and for validation. What was
        # compiled for earlier models of this process counts, too, and beyond the limit blocks would run uncompiled.
        versions = 4 * len(model.blocks) + 8
        config: Any = torch._dynamo.config
        config.recompile_limit += versions
        config.accumulated_recompile_limit += versions
        # Sizes that were seen before, by another model perhaps, must not make a run's code another.
        options = {"dynamic": False, **options}
        model.score = torch.compile(model.score, **options)
    for block in model.blocks:
        assert isinstance(block, Block)
        for module in block.modules():
            if isinstance(module, Projection | ExpertProjection):
                module.float8 = float8
        run = block.wired
        # What is kept of a block's inside, the compiler has to know. That nothing is, it need not, and torch 2.13
        # fails where it does: checkpoint(attention over DTensors) inside a compiled function.
        if compiled and recompute != "selective":
            run = torch.compile(run, **options)
        if recompute != "none":
            run = _checkpointed(run, recompute == "selective", drops=block.dropout > 0)
        if compiled and recompute == "selective":
            run = torch.compile(run, **options)
        block.run = None if run == block.wired else run


def _checkpointed(function: Callable[..., Any], selective: bool, *, drops: bool) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": drops}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(*args: Any) -> Any:
        return checkpoint(function, *args, **options)

    return run


def _policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
