"""The loop: batch → loss → optimizer → after_step → metrics → checkpoint. It knows no strategy."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptnorm.config import Config
from gptnorm.curvature.gauge import Gauge, flat
from gptnorm.data import Shards
from gptnorm.errors import SharedError, UserError, bad_value
from gptnorm.model import GPT, build_gpt
from gptnorm.model.moe import Routing, describe_routing
from gptnorm.train.agree import cpu_group, is_loss_of_another, largest, together
from gptnorm.train.checkpoint import load_checkpoint, model_tensors
from gptnorm.train.feed import Feed
from gptnorm.train.guard import Guard
from gptnorm.train.inputs import autocast, check_vocab, open_batches, same_everywhere, verify_small
from gptnorm.train.monitors import TensorBoard
from gptnorm.train.nonfinite import first_nonfinite
from gptnorm.train.optim import build_optimizer
from gptnorm.train.pace import Pace
from gptnorm.train.parallel import World, clip_gradients, mean_over_data, parallelize
from gptnorm.train.progress import Silent, Watcher
from gptnorm.train.result import Result
from gptnorm.train.run_folder import RunFolder, Status
from gptnorm.train.saver import Saver
from gptnorm.train.schedule import lr_factor
from gptnorm.train.stop import StopWish
from gptnorm.train.validation import validation_loss
from gptnorm.train.watch import Watch, summarize

_FAILED = 1 << 16
"""Stands among the numbers of signals for a checkpoint that could not be written."""


class Trainer:
    """One run in memory, or one process's share of it."""

    def __init__(
        self, config: Config, shards: Shards, world: World, watcher: Watcher, stop: StopWish | None = None
    ) -> None:
        train = config.train
        if train.threads:
            torch.set_num_threads(train.threads)
        self.config = config
        self.world = world
        self.group = cpu_group()
        self.watcher = watcher if world.main else Silent()
        self.stop = stop or StopWish()
        self.device = world.device
        with together(self.group):
            self.vocab = check_vocab(config, shards)
            verify_small(shards)
            sampler, self.validation = open_batches(config, shards)
        self.feed = Feed(config, sampler, world, self.vocab)
        self.fingerprint = shards.fingerprint
        same_everywhere(config, self.fingerprint, self.vocab, self.group)
        self.model = _build(config, self.vocab, world)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.guard = Guard(config.guard, self.device)
        # It reads gains and updates of whole weights, which no process has where they are sharded.
        watch = config.watch if world.mesh is None else replace(config.watch, every=0)
        self.watch = Watch(self.model, watch, self._autocast)
        self.gauge = Gauge(self.model, self.optimizer, config, world.mesh)
        self.pace = Pace()
        self.refused = False
        """Whether it was said that a reading of the gauge was refused."""
        self.step = 0
        self.seconds = 0.0
        self.val_loss: float | None = None
        """The last one."""
        self.best: tuple[float, int] | None = None
        """The lowest validation loss so far, and its step."""

    def tensors(self) -> dict[str, Tensor]:
        """All that changes and does not follow from config and step, as batches, rates and random numbers do."""
        found = model_tensors(self.model)
        found |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors(self.model)}
        return found | {f"guard/{name}": tensor for name, tensor in self.guard.tensors().items()}

    def restore(self, checkpoint: Path) -> None:
        """Everything from a verified checkpoint."""
        self.optimizer.prime()
        state = load_checkpoint(checkpoint, self.tensors(), self.group)
        try:
            step, seconds, val_loss, best, data = (
                state[key] for key in ("step", "seconds", "val_loss", "best", "data")
            )
            self.step, self.seconds = int(step), float(seconds)
            self.best = (float(best[0]), int(best[1])) if best else None
            self.val_loss = val_loss
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(f"{checkpoint / 'state.json'}: not the state of a run") from None
        if data != self.fingerprint:
            raise bad_value("data.path", self.config.data.path, "the text is not what it was when this run began")
        self.guard.look()

    def run(self, folder: RunFolder) -> Result:
        """From the current step to the last one.

        Raises:
            UserError: the folder can no longer be written, a full disk for one.
        """
        started = time.monotonic() - self.seconds
        saver = Saver(folder.checkpoints, self.config.checkpoint, self.device)
        board = None
        try:
            folder.set_status("running", self.step)
            board = TensorBoard(folder.path, self.step, off=not self.world.main)
            self.watcher.start(self.step, self.config.train.steps)
            status, reason = self._train(folder, board, saver, started)
            saver.wait()
            return self._end(folder, status, reason)
        except BaseException as error:
            # A second Ctrl-C, a full disk, a reader of our output that left: the run can be resumed.
            with contextlib.suppress(OSError):
                folder.set_status("interrupted", self.step, skipped=self.guard.skipped)
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise folder.unwritable(error) from None
            if self.group is not None and is_loss_of_another(error):
                raise UserError(f"{folder.path}: another process of the run has gone; it can be resumed") from None
            raise
        finally:
            self.watcher.stop()
            # What these could still say has been said: a full disk, or a lost process, fails each of them again.
            for close in (*((board.close,) if board else ()), saver.close, folder.close):
                with contextlib.suppress(OSError, UserError, *((RuntimeError,) if self.group is not None else ())):
                    close()

    def _train(self, folder: RunFolder, board: TensorBoard, saver: Saver, started: float) -> tuple[Status, str | None]:
        """Steps until the last one, or until something ends the run; how it ended, and why."""
        train, checkpoint = self.config.train, self.config.checkpoint
        while self.step < train.steps:
            self._update(folder, board, started)
            last = self.step == train.steps
            # One word for both, so that a step has one exchange.
            word = _FAILED if saver.failed() else 0 if last else self.stop.signal or 0
            stopping = largest(word, self.group)
            if stopping == _FAILED:
                saver.wait()
                raise SharedError(f"{folder.checkpoints}: another process could not write its part")
            if stopping:
                self.guard.look()
            if self.guard.nonfinite_at:
                self.step = self.guard.nonfinite_at - 1
                return "diverged", self._explain()
            new_best = False
            if self._due(train.eval_every, self.step) or last:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # the last update is still under way
                began = time.monotonic()
                new_best = self._validate(folder, board)
                # What a step takes does not hang on how often, and on how much text, its model is judged.
                started += time.monotonic() - began
                if self.val_loss is None:
                    return "diverged", "validation loss"
            self.seconds = time.monotonic() - started
            due = self._due(checkpoint.every, self.step) or (last and checkpoint.final)
            if due or stopping or (new_best and checkpoint.best):
                folder.sync()
                self._save(saver)
            if stopping:
                return "interrupted", signal.Signals(stopping).name
        return "finished", None

    def _update(self, folder: RunFolder, board: TensorBoard, started: float) -> None:
        """One update of the weights, unless the guard leaves it out."""
        config, update, began = self.config, self.step + 1, time.monotonic()
        micros = self.feed.micro_batches(self.step)
        if self.step == 0:
            with self._autocast():
                self.model.calibrate(micros[0])
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        routings = []
        for number, tokens in enumerate(micros):
            self.feed.seed_dropout(self.step, number)
            with self._autocast():
                objective = self.model.objective(tokens)
            (objective.total / len(micros)).backward()
            loss += objective.loss.detach() / len(micros)
            if objective.routing is not None:
                routings.append(objective.routing)
        loss = mean_over_data(loss, self.world)
        norm = clip_gradients(self.model, config.optim.clip or math.inf, self.world)
        leave_out = self.guard.judge(update, loss, norm)
        lr = config.optim.lr * lr_factor(self.step, config.train.steps, config.optim)

        numbers = self.guard.look(loss, norm) if self._looks(update) else None
        if self.guard.nonfinite_at:
            return
        self.optimizer.set_lr(lr)
        curvature = self._read_gauge(update, lr)
        self.watch.before_step(update, micros[0])
        self.optimizer.step(leave_out)
        self.model.after_step()
        self.step = update
        reading = self.watch.after_step()
        if reading is not None:
            folder.log_watch(step=self.step, **reading)
            board.log(self.step, "watch", summarize(reading))

        self.pace.add(time.monotonic() - began - curvature.get("gauge_seconds", 0.0), waited=numbers is not None)
        self.seconds = time.monotonic() - started
        if numbers is not None and (self._logs(update) or curvature):
            tokens_seen = update * config.train.batch_size * config.train.seq_len
            seen = [Routing(*(mean_over_data(field, self.world) for field in routing)) for routing in routings]
            values = {"loss": numbers[0], "lr": lr, "grad_norm": numbers[1], **describe_routing(seen)}
            if config.guard.sigmas is not None:
                values["skipped"] = self.guard.skipped
            self.watcher.step(update, numbers[0], tokens_seen / max(self.seconds, 1e-9))
            seconds = round(self.seconds, 3)
            folder.log(step=update, split="train", **values, **curvature, tokens=tokens_seen, seconds=seconds)
            board.log(update, "train", values)
            board.log(update, "gauge", flat(curvature))

    def _read_gauge(self, update: int, lr: float) -> dict[str, Any]:
        """The gauge's reading and what it cost, if it is due: seconds, and as many steps as take as long."""
        if not self.gauge.due(update):
            return {}
        began = time.monotonic()
        reading = self.gauge.read(self.feed.gauged(self.step), lr)
        if "gauge_refused" in reading and not self.refused:
            self.refused = True
            self.watcher.note(update, f"gauge: no reading: {reading['gauge_refused']}")
        seconds = time.monotonic() - began
        cost = {"gauge_seconds": float(f"{seconds:.3g}")}
        if self.pace.step is not None:
            cost["gauge_steps"] = float(f"{seconds / self.pace.step:.3g}")
        return {**reading, **cost}

    def _logs(self, update: int) -> bool:
        return self._due(self.config.train.log_every, update) or update == self.config.train.steps

    def _looks(self, update: int) -> bool:
        """Whether the host waits for this update's numbers: to log them, or because something rests on the weights."""
        rests = (self.config.train.eval_every, self.config.checkpoint.every)
        now_and_then = self.watch.due(update) or self.gauge.due(update)
        return self._logs(update) or now_and_then or any(self._due(every, update) for every in rests)

    def _explain(self) -> str:
        """Names what was non-finite first, micro-batch by micro-batch, without the compiler."""
        if self.world.mesh is not None:
            return "loss or norm of the gradient"
        micros = self.feed.micro_batches(self.step)

        def repeat(number: int) -> Callable[[], Tensor]:
            def loss() -> Tensor:
                self.feed.seed_dropout(self.step, number)
                with self._autocast():
                    return self.model.objective(micros[number]).total

            return loss

        reasons = [first_nonfinite(self.model, repeat(number)) for number in range(len(micros))]
        return next((r for r in reasons if r != "norm of the gradient"), reasons[0])

    def _validate(self, folder: RunFolder, board: TensorBoard) -> bool:
        """The validation loss, into `val_loss` (None: not finite); whether it is the best so far."""
        loss = validation_loss(self.model, self.validation, self.config, self.world, vocab=self.vocab)
        finite = math.isfinite(loss)
        self.val_loss = loss if finite else None
        folder.log(step=self.step, split="val", loss=self.val_loss)
        board.log(self.step, "val", {"loss": loss})
        self.watcher.validation(self.step, loss)
        is_best = finite and (self.best is None or loss < self.best[0])
        if is_best:
            self.best = (loss, self.step)
        return is_best

    def _save(self, saver: Saver) -> None:
        state = {"seconds": self.seconds, "data": self.fingerprint, "val_loss": self.val_loss, "best": self.best}
        best = self.best[1] if self.best and self.config.checkpoint.best else None
        saver.save(self.step, self.tensors(), {**state, "processes": self.world.size}, best)

    def _end(self, folder: RunFolder, status: Status, reason: str | None) -> Result:
        val_loss = self.val_loss if status == "finished" else None
        folder.set_status(status, self.step, val_loss=val_loss, reason=reason, skipped=self.guard.skipped)
        return Result(
            status=status,
            step=self.step,
            val_loss=val_loss,
            reason=reason,
            parameters=sum(p.numel() for p in self.model.parameters()),
            seconds=self.seconds,
            skipped=self.guard.skipped,
        )

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.config, self.device)


def _build(config: Config, vocab: int, world: World) -> GPT:
    """The model of the config's seed, spread over the processes and compiled as the config says."""
    if world.mesh is None:
        model = build_gpt(config, vocab=vocab, device=world.device)
        parallelize(model, world, config)
        return model
    # Drawn shard by shard: the whole of a large model need not fit into one process.
    model = build_gpt(config, vocab=vocab, device="meta")
    parallelize(model, world, config)
    model.to_empty(device=world.device)
    model.init_weights(config.seed)
    return model
