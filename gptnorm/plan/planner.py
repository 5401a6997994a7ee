"""From a config and some GPUs to a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from gptnorm.config import Config
from gptnorm.errors import UserError, bad_value
from gptnorm.plan.flops import FlopCount, count_flops
from gptnorm.plan.memory import MemoryModel, MemoryUse, usable
from gptnorm.plan.params import ParameterCount, count_parameters, model_on_meta, vocabulary
from gptnorm.plan.sizes import amount

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes. Memory is in bytes and per GPU, rates in FLOP/s."""

    config: Config
    gpus: int
    memory: int
    """Of one GPU."""
    mfu: float
    """Assumed model FLOPs utilisation."""
    peak: float
    """Dense peak rate of one GPU."""
    parameters: ParameterCount
    flops: FlopCount
    largest: int
    """The most sequences per micro-batch and GPU that fit; at most the GPU's share of a batch."""
    micro_batch: int
    """The most of these that divide the batch."""
    use: MemoryUse
    """With `micro_batch`."""

    @property
    def data(self) -> int:
        """Processes of data parallelism."""
        return self.gpus // self.config.parallel.tensor

    @property
    def accumulate(self) -> int:
        """`train.accumulate` for `micro_batch`."""
        return self.config.train.batch_size // (self.data * self.micro_batch)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.seq_len

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.config.train.steps * self.tokens_per_step

    @property
    def run_flops(self) -> int:
        """Model FLOPs of the whole run."""
        return self.tokens * self.flops.model

    @property
    def days(self) -> float:
        """Model FLOPs over GPUs x peak x MFU; validation and checkpoints not counted."""
        return self.run_flops / (self.gpus * self.peak * self.mfu) / SECONDS_PER_DAY

    def notes(self) -> list[str]:
        """What a reader should know about this very plan."""
        train, parallel = self.config.train, self.config.parallel
        notes = []
        if train.compile:
            notes.append("train.compile=true is not traced: memory is that of eager code; compiled code keeps less")
        gathers = self.gpus > 1 and parallel.param_dtype == "fp32"
        if gathers and train.precision == "bf16" and self.use.copies > 2**30:
            notes.append(
                f"{amount(self.use.copies)} are autocast's copies of whole weights; parallel.param_dtype=bf16 has none"
            )
        if train.precision == "fp32":
            notes.append("train.precision=fp32, but the peak rate is that of bf16: it will take longer")
        if train.precision == "fp8":
            notes.append("train.precision=fp8 is simulated: products run at bf16's rate, and the rounding takes longer")
        return notes

    def record(self) -> dict[str, Any]:
        """Every number, as plain values."""
        return {
            "gpus": self.gpus,
            "data": self.data,
            "tensor": self.config.parallel.tensor,
            "memory": self.memory,
            "usable": usable(self.memory),
            "parameters": asdict(self.parameters),
            "flops_per_token": {
                **asdict(self.flops),
                "model": self.flops.model,
                "hardware": self.flops.hardware(self.config.train.recompute),
            },
            "bytes": {**asdict(self.use), "total": self.use.total},
            "largest_micro_batch": self.largest,
            "micro_batch": self.micro_batch,
            "accumulate": self.accumulate,
            "steps": self.config.train.steps,
            "tokens_per_step": self.tokens_per_step,
            "tokens": self.tokens,
            "flops": self.run_flops,
            "mfu": self.mfu,
            "peak_flops": self.peak,
            "days": self.days,
            "notes": self.notes(),
        }


def make_plan(config: Config, *, gpus: int, memory: int, mfu: float, peak: float) -> Plan:
    """The plan of a run.

    Args:
        memory: bytes of one GPU.
        mfu: assumed model FLOPs utilisation, above 0 and at most 1.
        peak: dense peak rate of one GPU, FLOP/s.

    Raises:
        UserError: the GPUs cannot share the run, or not even one sequence fits: then by how much, and what would help.
    """
    if not 0 < mfu <= 1:
        raise bad_value("--mfu", mfu, "must be above 0 and at most 1")
    data = _data(config, gpus)
    vocab = vocabulary(config)
    model = model_on_meta(config, vocab)
    share = config.train.batch_size // data
    memory_model = MemoryModel(config, vocab, gpus)
    largest = memory_model.largest(memory, share)
    if largest == 0:
        raise _does_not_fit(config, vocab, gpus, memory, memory_model.use(1).total)
    micro_batch = max(size for size in range(1, largest + 1) if share % size == 0)
    return Plan(
        config=config,
        gpus=gpus,
        memory=memory,
        mfu=mfu,
        peak=peak,
        parameters=count_parameters(model),
        flops=count_flops(model, config.train.seq_len),
        largest=largest,
        micro_batch=micro_batch,
        use=memory_model.use(micro_batch),
    )


def _data(config: Config, gpus: int) -> int:
    """Processes of data parallelism; UserError if there is no such layout."""
    tensor, wanted = config.parallel.tensor, config.parallel.data
    if gpus % tensor:
        raise bad_value("parallel.tensor", tensor, f"must divide the {gpus} GPUs")
    data = gpus // tensor
    if wanted is not None and wanted != data:
        raise bad_value("parallel.data", wanted, f"times parallel.tensor = {tensor} must be the {gpus} GPUs")
    if config.train.batch_size % data:
        allowed = f"must be a multiple of the {data} processes of data parallelism that share it"
        raise bad_value("train.batch_size", config.train.batch_size, allowed)
    return data


def _does_not_fit(config: Config, vocab: int, gpus: int, memory: int, needed: int) -> UserError:
    room = usable(memory)
    if room <= 0:
        allowed = f"leaves nothing for a model: {amount(memory - room)} of it go to CUDA and to fragmentation"
        raise bad_value("--memory", amount(memory), allowed)
    beyond = f"{amount(needed - room)} more than the {amount(room)} usable"
    says = f"one sequence per GPU needs {amount(needed)}, {beyond}"
    fitting = []
    for setting, other, number in _ways_out(config, gpus):
        try:
            total = MemoryModel(other, vocab, number).use(1).total
        except UserError:
            continue
        if total <= room:
            fitting.append(f"{setting} ({amount(total)})")
        if len(fitting) == 2:
            break
    ways = f"it would fit with {' or '.join(fitting)}" if fitting else "take a smaller model or a shorter train.seq_len"
    return bad_value("--memory", amount(memory), f"{says}; {ways}")


def _ways_out(config: Config, gpus: int) -> Iterator[tuple[str, Config, int]]:
    """What may help, the least costly first: the settings, the config with them, and the GPUs."""
    said, best = "", config
    if gpus > 1 and config.train.precision != "fp32" and config.parallel.param_dtype == "fp32":
        said, best = "parallel.param_dtype=bf16", replace(config, parallel=replace(config.parallel, param_dtype="bf16"))
        yield said, best, gpus
    if not config.parallel.reshard and gpus > 1:
        said, best = f"{said} parallel.reshard=true", replace(best, parallel=replace(best.parallel, reshard=True))
        yield said.strip(), best, gpus
    for mode in ("selective", "full"):
        if config.train.recompute not in ("full", mode):
            more, other = f"{said} train.recompute={mode}", replace(best, train=replace(best.train, recompute=mode))
            yield more.strip(), other, gpus
            if mode == "full":
                said, best = more.strip(), other
    if gpus == 1 and config.train.precision != "fp32":
        # Several gather whole weights; one has nothing to gather.
        said = f"parallel.param_dtype=bf16 {said}".strip()
        best = replace(best, parallel=replace(best.parallel, param_dtype="bf16"))
    for factor in (2, 4, 8, 16, 32):
        if config.train.batch_size % (gpus * factor // config.parallel.tensor) == 0:
            yield f"--gpus {gpus * factor} {said}".strip(), best, gpus * factor
    for tensor in (2, 4, 8) if config.train.precision != "fp8" else ():
        if gpus % tensor == 0 and tensor > config.parallel.tensor:
            other = replace(best, parallel=replace(best.parallel, tensor=tensor, data=None))
            yield f"parallel.tensor={tensor} {said}".strip(), other, gpus
