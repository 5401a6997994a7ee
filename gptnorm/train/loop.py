"""The loop: batch → loss → optimizer → after_step → metrics → checkpoint. It knows no strategy."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptnorm.config import Config
from gptnorm.data import Sampler, Shards, validation_windows
from gptnorm.environment import describe_environment
from gptnorm.errors import UserError, bad_value
from gptnorm.model import Objective, build_gpt
from gptnorm.model.moe import describe_routing
from gptnorm.train.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from gptnorm.train.monitors import TensorBoard
from gptnorm.train.nonfinite import first_nonfinite
from gptnorm.train.optim import build_optimizer, set_lr
from gptnorm.train.progress import Silent, Watcher
from gptnorm.train.run_folder import RunFolder, Status
from gptnorm.train.schedule import lr_factor
from gptnorm.train.watch import Watch, summarize


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended."""

    status: Status
    step: int
    """Updates done."""
    val_loss: float | None
    """Validation loss in nats per token after the last update; None if the run diverged."""
    reason: str | None
    """What was non-finite first, if it diverged."""
    parameters: int
    seconds: float
    """Wall-clock time of the loop, validations included, resumed parts added up."""


def start_run(config: Config, shards: Shards, path: Path, watcher: Watcher | None = None) -> Result:
    """Trains a new run into `path`; everything that can be wrong with the input is found before it is made."""
    with within_memory(config):
        trainer = _Trainer(config, shards, watcher or Silent())
        return trainer.run(RunFolder.create(path, config, describe_environment(trainer.device)))


def resume_run(path: Path, shards: Shards, watcher: Watcher | None = None) -> Result:
    """Continues a run from its newest complete checkpoint."""
    folder = RunFolder.open(path)
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise UserError(f"{path}: has no checkpoint to resume from; checkpoint.every sets how often one is written")
    config = folder.config()
    with within_memory(config):
        trainer = _Trainer(config, shards, watcher or Silent())
        trainer.restore(checkpoint)
        folder.rewind(trainer.step)
        return trainer.run(folder)


class _Trainer:
    """One run in memory."""

    def __init__(self, config: Config, shards: Shards, watcher: Watcher) -> None:
        train = config.train
        if train.threads:
            torch.set_num_threads(train.threads)
        self.config = config
        self.watcher = watcher
        self.device = resolve_device(train.device)
        self.vocab = check_vocab(config, shards)
        self.fingerprint = shards.fingerprint
        self.sampler, self.validation = open_batches(config, shards)
        self.model = build_gpt(config, vocab=self.vocab, device=self.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.loss: Callable[[Tensor], Tensor] = self.model.loss
        self.objective: Callable[[Tensor], Objective] = self.model.objective
        if train.compile:
            self.loss, self.objective = torch.compile(self.loss), torch.compile(self.objective)
        self.watch = Watch(self.model, config.watch, self._autocast)
        self.step = 0
        self.seconds = 0.0

    def restore(self, checkpoint: Path) -> None:
        """Model, optimizer and step from a checkpoint."""
        state = load_checkpoint(checkpoint, self.model, self.optimizer)
        if state.get("data") != self.fingerprint:
            raise bad_value("data.path", self.config.data.path, "the text is not what it was when this run began")
        self.step, self.seconds = state["step"], state["seconds"]

    def run(self, folder: RunFolder) -> Result:
        """From the current step to the last one."""
        steps = self.config.train.steps
        folder.set_status("running", self.step)
        self.watcher.start(self.step, steps)
        started = time.monotonic() - self.seconds
        board = TensorBoard(folder.path, self.step)
        val_loss = None
        try:
            while self.step < steps:
                reason = self._update(folder, board, started)
                self.seconds = time.monotonic() - started
                if reason:
                    return self._end(folder, "diverged", None, reason)
                if self._due(self.config.train.eval_every) or self.step == steps:
                    val_loss = self._validate(folder, board)
                self.seconds = time.monotonic() - started
                last = self.step == steps and self.config.checkpoint.final
                if self._due(self.config.checkpoint.every) or last:
                    state = {"seconds": self.seconds, "data": self.fingerprint}
                    save_checkpoint(folder.checkpoints, self.step, self.model, self.optimizer, state)
                    prune_checkpoints(folder.checkpoints, self.config.checkpoint.keep)
            if val_loss is None:
                # Resumed after the last step: its validation was written before its checkpoint.
                val_loss = _last_validation(folder)
            if val_loss is None or not math.isfinite(val_loss):
                return self._end(folder, "diverged", None, "validation loss")
            return self._end(folder, "finished", val_loss, None)
        except BaseException:
            # Ctrl-C, a full disk, a reader of our output that left: the run can be resumed.
            folder.set_status("interrupted", self.step)
            raise
        finally:
            self.watcher.stop()
            board.close()
            folder.close()

    def _update(self, folder: RunFolder, board: TensorBoard, started: float) -> str | None:
        """One update of the weights; what was non-finite, if it could not be made."""
        config = self.config
        micros = self._micro_batches(self.sampler.batch(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        routings = []
        for tokens in micros:
            with self._autocast():
                objective = self.objective(tokens)
            (objective.total / len(micros)).backward()
            loss += objective.loss.detach() / len(micros)
            if objective.routing is not None:
                routings.append(objective.routing)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip or math.inf)
        loss_value, norm_value = torch.stack((loss, norm.to(loss.dtype))).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            return self._explain(micros)

        lr = config.optim.lr * lr_factor(self.step, config.train.steps, config.optim)
        set_lr(self.optimizer, lr)
        self.watch.before_step(self.step + 1, micros[0])
        self.optimizer.step()
        self.model.after_step()
        self.step += 1
        reading = self.watch.after_step()
        if reading is not None:
            folder.log_watch(step=self.step, **reading)
            board.log(self.step, "watch", summarize(reading))

        seconds = time.monotonic() - started
        tokens_seen = self.step * config.train.batch_size * config.train.seq_len
        self.watcher.step(self.step, loss_value, tokens_seen / max(seconds, 1e-9))
        if self._due(config.train.log_every) or self.step == config.train.steps:
            values = {"loss": loss_value, "lr": lr, "grad_norm": norm_value, **describe_routing(routings)}
            folder.log(step=self.step, split="train", **values, tokens=tokens_seen, seconds=round(seconds, 3))
            board.log(self.step, "train", values)
        return None

    def _micro_batches(self, batch: np.ndarray) -> list[Tensor]:
        return [check_ids(part, self.vocab).to(self.device) for part in np.split(batch, self.config.train.accumulate)]

    def _explain(self, micros: list[Tensor]) -> str:
        """Names what was non-finite first, micro-batch by micro-batch, without the compiler."""

        def repeat(tokens: Tensor) -> Callable[[], Tensor]:
            def loss() -> Tensor:
                with self._autocast():
                    return self.model.objective(tokens).total

            return loss

        reasons = [first_nonfinite(self.model, repeat(tokens)) for tokens in micros]
        return next((r for r in reasons if r != "norm of the gradient"), reasons[0])

    @torch.no_grad()
    def _validate(self, folder: RunFolder, board: TensorBoard) -> float:
        """Mean loss over the fixed validation windows."""
        total, count = 0.0, 0
        self.model.eval()
        for windows in self.validation:
            with self._autocast():
                total += self.loss(check_ids(windows, self.vocab).to(self.device)).item() * len(windows)
            count += len(windows)
        self.model.train()
        loss = total / count
        folder.log(step=self.step, split="val", loss=loss if math.isfinite(loss) else None)
        board.log(self.step, "val", {"loss": loss})
        self.watcher.validation(self.step, loss)
        return loss

    def _end(self, folder: RunFolder, status: Status, val_loss: float | None, reason: str | None) -> Result:
        folder.set_status(status, self.step, val_loss=val_loss, reason=reason)
        parameters = sum(p.numel() for p in self.model.parameters())
        return Result(
            status=status,
            step=self.step,
            val_loss=val_loss,
            reason=reason,
            parameters=parameters,
            seconds=self.seconds,
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.train.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def resolve_device(name: str) -> torch.device:
    """The device that a config means; UserError if this machine has none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise bad_value("train.device", name, "must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise bad_value("train.device", name, f"this machine has {count} CUDA devices that torch can use")
    return device


def check_vocab(config: Config, shards: Shards) -> int:
    """Rows of the embedding; UserError if the tokenizer has more ids than that."""
    wanted = config.model.vocab_size
    if wanted is None and shards.vocab_size is None:
        raise UserError("model.vocab_size: the shards have no manifest, so it must be set (GPT-2's tokens: 50257)")
    ids = np.iinfo(shards.train.dtype).max + 1
    if wanted is not None and shards.vocab_size is None and wanted > ids:
        # Without a manifest uint32 would be read as twice as many uint16.
        raise bad_value("model.vocab_size", wanted, f"at most {ids}, what the shards' {shards.train.dtype} can hold")
    if wanted is not None and shards.vocab_size is not None and wanted < shards.vocab_size:
        raise bad_value("model.vocab_size", wanted, f"at least {shards.vocab_size}, the tokenizer's vocabulary")
    return wanted or shards.vocab_size or 0


def open_batches(config: Config, shards: Shards) -> tuple[Sampler, list[np.ndarray]]:
    """The training batches and the validation windows; UserError if the text is too short for them.

    The first of each is looked at here, so that ids beyond the embedding show before a run is made.
    """
    train = config.train
    sampler = Sampler(shards.train, train.batch_size, train.seq_len, config.seed)
    micro = train.batch_size // train.accumulate
    # As many windows however the batch is cut, so that accumulation does not change what is measured.
    batches = train.eval_batches * train.accumulate
    validation = list(validation_windows(shards.val, micro, train.seq_len, batches))
    vocab = check_vocab(config, shards)
    for tokens in (sampler.batch(0), *validation):
        refuse_unknown_ids(tokens, vocab)
    return sampler, validation


@contextlib.contextmanager
def within_memory(config: Config) -> Iterator[None]:
    """Tells in one line that a model or a batch does not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU allocator of torch has no exception of its own.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        size = config.train.batch_size
        raise bad_value(
            "train.batch_size", size, "out of memory; lower it, raise train.accumulate, or take a smaller model"
        ) from None


def refuse_unknown_ids(tokens: np.ndarray, vocab: int) -> None:
    """A token id outside the embedding would be a crash on a GPU."""
    largest = int(tokens.max())
    if largest >= vocab:
        raise bad_value("model.vocab_size", vocab, f"the shards hold the token id {largest}, so more are needed")


def check_ids(tokens: np.ndarray, vocab: int) -> Tensor:
    """The batch as a tensor, its ids known to the embedding."""
    refuse_unknown_ids(tokens, vocab)
    return torch.from_numpy(tokens)


def _last_validation(folder: RunFolder) -> float | None:
    lines = [line for line in folder.metrics() if line["split"] == "val"]
    return lines[-1]["loss"] if lines else None
