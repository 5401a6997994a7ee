r"""Bytes on one GPU, and the largest micro-batch that leaves room.

| item | bytes |
|---|---|
| parameters | 4 n / D, fp32 |
| gradients | 4 n / D, fp32, as they are from the second micro-batch on |
| optimizer | AdamW 8 n / D; Muon 4 n / D for the matrices it takes |
| gathered weights | what FSDP2 has of whole weights and gradients at once, see `moments` |
| weights in bf16 | autocast's copies, kept from a weight's forward pass to its backward pass |
| activations | what the forward pass keeps for the backward pass, under fp8 the rounded weights, too |
| passing | the most that lives for a moment beside all that: gradients of logits, of one weight, of one block |

n: the parameters of one tensor-parallel share; D: the processes of data parallelism. The last three come from a trace
(`gptnorm.plan.trace`) at the very micro-batch that is asked for, so nothing in them is extrapolated.

What is not in the table is put into the reserve: the CUDA context and the libraries' workspaces (1 GiB), and 5 % of the
memory for what the allocator cannot use between blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import nn

from gptnorm.config import Config
from gptnorm.model import GPT
from gptnorm.plan.params import model_on_meta
from gptnorm.plan.share import pretended_processes
from gptnorm.plan.trace import Live, Trace, fake_model, trace_pass
from gptnorm.sharding import here
from gptnorm.train.blocks import prepare_blocks
from gptnorm.train.tensor_parallel import check_tensor_parallel, split_tensors

CONTEXT_BYTES = 2**30
FRAGMENTATION = 0.05


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Parameters that FSDP2 gathers together, of one tensor-parallel share: as `gptnorm.train.parallel` groups them."""

    blocks: tuple[int, ...]
    embed: int
    """0 where the head shares its weight."""
    head: int
    """0 where it shares the embedding's."""
    rest: int

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.embed + self.head + self.rest


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on one GPU at the step's peak."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    copies: int
    activations: int
    passing: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def usable(memory: int) -> int:
    """What a plan may fill of a GPU's memory."""
    return int(memory * (1 - FRAGMENTATION)) - CONTEXT_BYTES


def parameter_groups(model: GPT) -> Groups:
    """How FSDP2 groups the parameters of a model."""
    sizes = tuple(_numbers(block) for block in model.blocks)
    embed, head, total = _numbers(model.embed), _numbers(model.head), _numbers(model)
    if model.shape.tied:
        embed = head = 0
    return Groups(blocks=sizes, embed=embed, head=head, rest=total - sum(sizes) - embed - head)


def moments(trace: Trace, groups: Groups, *, itemsize: int, reshard: bool, data: int) -> list[tuple[Live, int]]:
    """The moments of a step that may be its worst under FSDP2, each with the bytes that FSDP2 has beside the shards.

    | moment | whole weights and gradients, in numbers of `itemsize` | buffers of reductions, fp32 |
    |---|---|---|
    | the loss | head and rest, which stay gathered from the forward pass to the end | none |
    | the head's backward pass | these, the last block on its way | none |
    | the head's gradient is reduced | these, its gradient, the last block on its way | its own |
    | a block's backward pass | these, it, the one before on its way, its gradient, the rest's | that of its successor |
    | the embedding's backward pass | these, it, its gradient, the rest's | that of the first block |
    | the embedding's gradient is reduced | these, its gradient, the rest's | its own |

    Args:
        itemsize: bytes of a number of a gathered weight, and of its gradient until it is reduced.
        reshard: whether blocks and embedding are let go after their forward pass; else all stay gathered.
        data: processes of data parallelism.
    """
    block, head = max(groups.blocks), groups.head
    last = max(groups.embed, groups.rest)
    stays = head + groups.rest if reshard else groups.total
    gathered = int(reshard)

    def whole(live: Live, numbers: int, buffers: int) -> tuple[Live, int]:
        return live, itemsize * (stays + numbers) + buffers

    def buffers(numbers: int) -> int:
        # What goes into the reduction, and this process's part of what comes out.
        return 4 * numbers + -(-4 * numbers // data)

    return [
        whole(trace.loss_peak, 0, 0),
        whole(trace.head_peak, gathered * block, 0),
        whole(trace.blocks[-1], head + gathered * block, buffers(head)),
        whole(trace.backward_peak, gathered * 2 * block + block + groups.rest, 4 * max(block, head)),
        whole(trace.opened, gathered * groups.embed + groups.embed + groups.rest, 4 * block),
        whole(trace.opened, groups.embed + groups.rest, buffers(last)),
    ]


class MemoryModel:
    """The memory of one GPU of a run as a function of the micro-batch.

    Args:
        vocab: rows of the embedding.
        cuda: whether kernels keep what CUDA's do, or the CPU's.
    """

    def __init__(self, config: Config, vocab: int, gpus: int, *, cuda: bool = True) -> None:
        self.config = config
        self.cuda = cuda
        self.vocab = vocab
        self.data = gpus // config.parallel.tensor
        self.gathers = gpus > 1 or config.parallel.param_dtype == "bf16"
        self.dtype = torch.bfloat16 if config.parallel.param_dtype == "bf16" else torch.float32
        with self._share() as model:
            self.groups = parameter_groups(model)
            self.optimizer_numbers = optimizer_numbers(model, config)
        self.trace: Callable[[int], Trace] = cache(self._trace)

    def use(self, sequences: int) -> MemoryUse:
        """The peak of a step with micro-batches of so many sequences per GPU."""
        trace = self.trace(sequences)
        if self.gathers:
            size, reshard = self.dtype.itemsize, self.config.parallel.reshard
            worst = moments(trace, self.groups, itemsize=size, reshard=reshard, data=self.data)
        else:
            worst = [(trace.loss_peak, 0), (trace.head_peak, 0), (trace.backward_peak, 0)]
        peak, beside = max(worst, key=lambda moment: moment[0].total + moment[1])
        kept = min(trace.kept.total - trace.kept.copies, peak.total - peak.copies)
        shard = -(-4 * self.groups.total // self.data)
        return MemoryUse(
            parameters=shard,
            gradients=shard,
            optimizer=-(-4 * self.optimizer_numbers // self.data),
            gathered=beside,
            copies=peak.copies,
            activations=kept,
            passing=peak.total - peak.copies - kept,
        )

    def largest(self, memory: int, most: int) -> int:
        """The most sequences per micro-batch, at most `most`, that fit into a GPU's memory; 0 if not even one does.

        Memory grows with the micro-batch, so this is a false position between what fits and what does not.
        """
        room = usable(memory)
        fits, fails = 0, most + 1
        last, guess = (0, 0), 1
        while fails - fits > 1:
            total = self.use(guess).total
            fits, fails = (guess, fails) if total <= room else (fits, guess)
            slope = (total - last[1]) / (guess - last[0])
            # The first step knows no slope yet: what does not grow with the micro-batch is in its total.
            estimate = guess + round((room - total) / slope - 0.5) if last[0] and slope > 0 else 2 * guess
            last = (guess, total)
            guess = min(max(estimate, fits + 1), fails - 1)
        return fits

    @contextlib.contextmanager
    def _share(self) -> Iterator[GPT]:
        """The model on `meta`, as one GPU has it before FSDP2 cuts it."""
        tensor = self.config.parallel.tensor
        model = model_on_meta(self.config, self.vocab)
        with pretended_processes(tensor) as mesh:
            if mesh is not None:
                check_tensor_parallel(model.shape, model.strategy, tensor)
                split_tensors(model, mesh)
            train = self.config.train
            prepare_blocks(model, train.recompute, compiled=False, float8=train.precision == "fp8")
            yield model

    def _trace(self, sequences: int) -> Trace:
        train = self.config.train
        with self._share() as share, fake_model(share, self.dtype) as model:
            size = {"sequences": sequences, "seq_len": train.seq_len}
            return trace_pass(model, **size, precision=train.precision, cuda=self.cuda)


def cpu_step_bytes(config: Config, vocab: int) -> int:
    """Most bytes that tensors take in a training step in one process on a CPU, uncompiled, with gradients in full.

    Without `train.accumulate` gradients come up as activations go, and it is up to 4 bytes a parameter less.
    """
    train = config.train
    return MemoryModel(config, vocab, gpus=1, cuda=False).use(train.batch_size // train.accumulate).total


def optimizer_numbers(model: GPT, config: Config) -> int:
    """Numbers that the optimizer keeps: two per parameter, one per parameter of a matrix that Muon takes."""
    total = 2 * _numbers(model)
    if config.optim.name == "muon":
        roles = model.shape.matrix_roles
        total -= sum(here(o.weight).numel() for _, o in model.weights() if o.role in roles and o.weight.ndim == 2)
    return total


def _numbers(module: nn.Module) -> int:
    return sum(here(p).numel() for p in module.parameters())
