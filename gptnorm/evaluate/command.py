"""The command `gptnorm eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gptnorm.config import Config
from gptnorm.data.command import read_count
from gptnorm.data.progress import Progress, Watcher, make_watcher
from gptnorm.data.tokenizer import ByteTokenizer
from gptnorm.environment import describe_environment
from gptnorm.errors import UserError, bad_value, said_as
from gptnorm.evaluate.documents import limit
from gptnorm.evaluate.numbers import Score
from gptnorm.evaluate.score import Mode, Reach, Scorer
from gptnorm.evaluate.texts import Own, Text, open_own, open_text, own_text, refuse_unknown_ids
from gptnorm.evaluate.trained_on import TrainedOn
from gptnorm.format import count_text, plural, spread_text
from gptnorm.model import GPT
from gptnorm.probe.show import plain
from gptnorm.recipe import changed, parse_overrides, to_tree
from gptnorm.tables import flatten
from gptnorm.train.inputs import check_vocab, resolve_device, within_memory
from gptnorm.train.run_folder import RunFolder
from gptnorm.train.snapshot import Snapshot, open_snapshot

MAY_BE_SET = (
    "data.cache",
    "data.text_field",
    "train.batch_size",
    "train.device",
    "train.precision",
    "train.threads",
)
"""What may be set for an evaluation: how it computes, and how the given text is read."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A text and how it was predicted."""

    text: Text
    score: Score
    compared: bool
    """Whether it was looked for documents that the run was trained on."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A run at a checkpoint on some texts."""

    run: Path
    trained: Config
    """The run's settings."""
    step: int
    scorer: Scorer
    limit: int | None
    """Most tokens scored of each text."""
    rows: list[Row]

    def record(self) -> dict[str, Any]:
        """Everything as plain JSON values; see docs/evaluate.md."""
        scorer = self.scorer
        return {
            "run": str(self.run),
            "step": self.step,
            "documents": scorer.mode,
            "window": scorer.window,
            "stride": scorer.stride,
            "end_of_text": scorer.end_of_text,
            "batch_size": scorer.batch_size,
            "precision": _precision(scorer),
            "tokens_limit": self.limit,
            "rows": [_row_record(row) for row in self.rows],
            "config": to_tree(self.trained),
            "environment": describe_environment(scorer.device),
        }


def run_eval(
    run: Path,
    settings: Sequence[str],
    texts: Sequence[str],
    *,
    step: int | None,
    mode: Mode,
    window: int | None,
    stride: int | None,
    tokens: str | None,
    console: Console,
) -> Evaluation:
    """Score texts under a run's model.

    Args:
        settings: `key=value` arguments of `MAY_BE_SET`.
        texts: anything that `data.path` takes; none: the run's own validation split.
        step: see `open_snapshot`.
        window, stride: see `Scorer`; None: train.seq_len, half the window.
        tokens: how much of each text is scored, such as "1M"; None: all.
        console: where progress is shown.

    Raises:
        UserError: the run, a text or a setting is no good.
    """
    most = None if tokens is None else read_count("--tokens", tokens)
    folder = RunFolder.open(run)
    trained = folder.config()
    config = _config(trained, settings)
    window, stride = _windows(config, window, stride)
    device = resolve_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    snapshot = open_snapshot(folder, config, step)
    watcher = make_watcher(console)
    with within_memory(config):
        try:
            own = open_own(config, snapshot.text, texts, watcher)
            field = _value(settings, "data.text_field") or trained.data.text_field
            opened = [_open(name, config, own, field, watcher) for name in texts] or [own_text(config, own)]
            scorer = Scorer(
                window=window,
                stride=stride,
                mode=mode,
                end_of_text=own.end_of_text,
                batch_size=config.train.batch_size,
                device=device,
                bf16=config.train.precision == "bf16",
            )
            if scorer.end_of_text is None and mode == "separate":
                reason = "the shards do not say which token ends a document; take --documents stream"
                raise bad_value("--documents", mode, reason)
            model = _model(snapshot, own, scorer)
            trained_on = None
            if any(text.what == "all" for text in opened) and own.shards is not None and own.tokenizer is not None:
                trained_on = TrainedOn(own.shards, own.tokenizer, watcher)
            rows = [_row(text, model, scorer, most, own, trained_on, watcher) for text in opened]
        finally:
            watcher.end()
    return Evaluation(run=run, trained=trained, step=snapshot.step, scorer=scorer, limit=most, rows=rows)


def _open(name: str, config: Config, own: Own, field: str, watcher: Watcher) -> Text:
    with said_as("--data", "data.path"):
        return open_text(name, config, own, field, watcher)


def print_evaluation(found: Evaluation, console: Console) -> None:
    """What was done, a row for each text, and what the numbers do not say."""
    scorer, model, seq_len = found.scorer, found.trained.model, found.trained.train.seq_len
    when = f"after {plural(found.step, 'step')}" if found.step else "at initialisation"
    documents = "documents apart" if scorer.mode == "separate" else "documents as one stream"
    precision = f"{_precision(scorer)} on {scorer.device.type}"
    lines = [
        f"{model.strategy} on {model.backbone}, {when}: {documents}, windows of {scorer.window}, stride "
        f"{scorer.stride}, {precision}"
    ]
    if scorer.window > seq_len:
        lines.append(f"the windows are longer than those of training, {seq_len}")
    if found.limit is not None:
        lines[0] += f", at most {found.limit:,} tokens of each text"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("text", overflow="fold")
    table.add_column("scored", no_wrap=True)
    for name in ("docs", "tokens", "bytes", "nats per\ntoken", "perplexity", "bits per\nbyte"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        score = row.score
        counts = map(count_text, (score.documents, score.tokens, score.text_bytes))
        table.add_row(
            escape(row.text.name),
            row.text.what,
            *counts,
            f"{score.nats_per_token:.4f}",
            f"{score.perplexity:,.4g}",
            spread_text(score.bits_per_byte, score.bits_per_byte_error),
        )
        lines += _remarks(row)
    _say(lines[:1], console)
    console.print(table)
    _say(lines[1:], console)


def _remarks(row: Row) -> list[str]:
    if row.text.left_out:
        return [f"{row.text.name}: left out {plural(row.text.left_out, 'document')} that the run was trained on"]
    if not row.compared:
        return [f"{row.text.name}: not compared with what the run was trained on, which is not at hand"]
    return []


def _say(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _row_record(row: Row) -> dict[str, Any]:
    score = row.score
    return plain(
        {
            "data": row.text.name,
            "scored": row.text.what,
            "documents": score.documents,
            "left_out": row.text.left_out,
            "compared_with_training": row.compared,
            "tokens": score.tokens,
            "bytes": score.text_bytes,
            "nats": score.nats,
            "end_tokens": score.end_tokens,
            "end_nats": score.end_nats,
            "nats_per_token": score.nats_per_token,
            "nats_per_token_error": score.nats_per_token_error,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "bits_per_byte_error": score.bits_per_byte_error,
        }
    )


def _row(
    text: Text,
    model: GPT,
    scorer: Scorer,
    most: int | None,
    own: Own,
    trained_on: TrainedOn | None,
    watcher: Watcher,
) -> Row:
    """Score one text."""
    is_other = text.what == "all"
    if not is_other or (trained_on is not None and not text.comparable(trained_on)):
        trained_on = None
    documents = refuse_unknown_ids(text.documents(trained_on), model.shape.vocab, text.name)
    if most is not None:
        documents = limit(documents, most, own.tokenizer)

    def report(reach: Reach) -> None:
        # Whichever end comes first.
        share = max(reach.share * (text.share() or 0), reach.tokens / most if most else 0)
        watcher.update(
            Progress(share=share, text_bytes=reach.text_bytes, documents=reach.documents, tokens=reach.tokens)
        )

    watcher.begin("scoring")
    score = scorer.score(model, documents, report)
    watcher.end()
    if score is None:
        empty = "the run was trained on every document of it; nothing is left" if text.left_out else "holds no text"
        raise bad_value("--data", text.name, empty)
    if most is None and not text.left_out and text.text_bytes not in (None, score.text_bytes):
        # What the shards count is exact, whatever the tokenizer makes of it.
        score = replace(score, text_bytes=text.text_bytes, bits_per_byte_error=None)
    return Row(text=text, score=score, compared=not is_other or trained_on is not None)


def _model(snapshot: Snapshot, own: Own, scorer: Scorer) -> GPT:
    """The run's model.

    Raises:
        UserError: it has no positions for the windows, or its tokens are no bytes and its own text is not at hand.
    """
    config = snapshot.config
    vocab = ByteTokenizer.vocab_size if own.shards is None else check_vocab(config, own.shards)
    try:
        model = snapshot.model(vocab=vocab, device=scorer.device)
    except UserError as error:
        raise own.missing or error from None
    if model.position is not None and scorer.window > config.train.seq_len:
        allowed = f"at most train.seq_len = {config.train.seq_len}: the model has learned no positions beyond it"
        raise bad_value("--window", scorer.window, allowed)
    return model


def _config(trained: Config, settings: Sequence[str]) -> Config:
    """The run's settings, as far as an evaluation asks for them, with those that are given."""
    train = trained.train
    # As many windows at once as the run has in a micro-batch.
    base = replace(trained, train=replace(train, batch_size=train.batch_size // train.accumulate, accumulate=1))
    given = "data.path" in flatten(parse_overrides(settings))
    reason = "the text to score is given with --data" if given else "a run is evaluated as it was trained"
    config = changed(base, settings, MAY_BE_SET, reason)
    asked = _value(settings, "train.precision")
    if asked == "fp8":
        reason = "a float8 scale is that of a whole batch, so that a text's score would depend on its neighbours"
        raise bad_value("train.precision", asked, f'must be "fp32" or "bf16": {reason}')
    if asked is None and resolve_device(config.train.device).type == "cpu":
        config = replace(config, train=replace(config.train, precision="fp32"))
    elif config.train.precision == "fp8":
        config = replace(config, train=replace(config.train, precision="bf16"))
    return replace(config, data=replace(config.data, text_field=trained.data.text_field))


def _value(settings: Sequence[str], key: str) -> Any:
    """What is given for a key, None if nothing is."""
    return flatten(parse_overrides(settings)).get(key)


def _windows(config: Config, window: int | None, stride: int | None) -> tuple[int, int]:
    window = window or config.train.seq_len
    if stride is not None and stride > window:
        raise bad_value("--stride", stride, f"at most the window, {window}")
    return window, stride or max(1, window // 2)


def _precision(scorer: Scorer) -> str:
    return "bf16" if scorer.bf16 else "fp32"
