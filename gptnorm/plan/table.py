"""A plan, for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from gptnorm.plan.memory import CONTEXT_BYTES, FRAGMENTATION, usable
from gptnorm.plan.planner import Plan
from gptnorm.plan.sizes import amount, duration

MEANING = {
    "parameters": "fp32, this GPU's shard",
    "gradients": "fp32, this GPU's shard",
    "optimizer": "fp32 moments, this GPU's shard",
    "gathered": "whole weights and gradients, FSDP2",
    "copies": "weights in the products' dtype, autocast",
    "activations": "kept for the backward pass",
    "passing": "for a moment: gradients of logits and the like",
}


def print_plan(plan: Plan, console: Console) -> None:
    """All of it."""
    config = plan.config
    model, train, parallel = config.model, config.train, config.parallel
    say = _plain(console)
    say(f"{model.strategy} on {model.backbone}: {model.n_layers} blocks of width {model.d_model}")
    say(
        f"{plan.gpus} GPU{'s' * (plan.gpus > 1)} (data {plan.data} x tensor {parallel.tensor}), "
        f"precision {train.precision}, gathered in {parallel.param_dtype}, reshard {str(parallel.reshard).lower()}, "
        f"recompute {train.recompute}, {config.optim.name}"
    )
    say("")
    for title, rows in (("parameters", _parameters(plan)), ("FLOPs per token", _flops(plan)), ("", _memory(plan))):
        table = Table(box=None, pad_edge=False, title=title, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True, style="bold")
        table.add_column(style="dim")
        table.title = title or f"memory per GPU, micro-batch of {plan.micro_batch} x {train.seq_len} tokens"
        for row in rows:
            table.add_row(*row)
        console.print(table)
        say("")
    say(f"largest micro-batch that fits: {plan.largest} sequence{'s' * (plan.largest > 1)} per GPU")
    say(
        f"batch of {train.batch_size}: {plan.micro_batch} per GPU x {plan.data} x "
        f"train.accumulate={plan.accumulate}, {plan.tokens_per_step:,} tokens per step"
    )
    say(f"{train.steps:,} steps, {plan.tokens:,} tokens, {plan.run_flops:.3g} model FLOPs")
    say(
        f"{duration(plan.days)} ({plan.days * 24 * plan.gpus:,.0f} GPU hours) at {plan.mfu:.0%} of "
        f"{plan.peak / 1e12:,.0f} TFLOP/s"
    )
    for note in plan.notes():
        say(f"note: {note}")


def _parameters(plan: Plan) -> Iterator[tuple[str, str, str]]:
    count = plan.parameters
    for role, number in count.by_role.items():
        yield role, f"{number:,}", "and the head" if role == "embed" and "head" not in count.by_role else ""
    yield "gains and scales", f"{count.gains:,}", ""
    yield "total", f"{count.total:,}", ""
    if count.active != count.total:
        yield "active", f"{count.active:,}", "what one token meets"


def _flops(plan: Plan) -> Iterator[tuple[str, str, str]]:
    flops, train = plan.flops, plan.config.train
    products, attention = 6 * flops.products, 3 * flops.attention_forward
    yield "6 N", f"{products:,}", f"N = {flops.products:,} weights in products, head included"
    yield "12 L a T", f"{attention:,}", "attention over all T keys; a causal mask needs half"
    yield "model", f"{flops.model:,}", "forward and backward; what MFU is of"
    hardware = flops.hardware(train.recompute)
    if hardware != flops.model:
        yield "hardware", f"{hardware:,}", "with the blocks' second forward pass"


def _memory(plan: Plan) -> Iterator[tuple[str, str, str]]:
    total, room = plan.use.total, usable(plan.memory)
    for name, meaning in MEANING.items():
        yield name, amount(getattr(plan.use, name), total), meaning
    yield "peak", amount(total), ""
    reserve = f"{amount(plan.memory)} less {FRAGMENTATION:.0%} and {amount(CONTEXT_BYTES)} for the CUDA context"
    yield "usable", amount(room), reserve


def _plain(console: Console) -> Callable[[str], None]:
    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    return say
