"""Building shards: documents to tokens, into a folder that a kill at any moment does not harm.

Every few seconds the files are synced and a journal is replaced that says how long they are and how far the source
was read. A build that was cut off cuts the files to those lengths and reads on from that place, so that no document
is lost or doubled and the shards are, bit for bit, those of a build that was left alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gptnorm.config import BUILT_IN_TOKENIZERS, DataConfig
from gptnorm.data.card import DATA_CARD_FILE, data_card
from gptnorm.data.corpora import NAMES
from gptnorm.data.encoder import Batch, Encoder, batches
from gptnorm.data.folder import Journal, Target, is_empty, is_half_built
from gptnorm.data.names import expand, is_hub_name
from gptnorm.data.progress import Lines, Progress, Watcher
from gptnorm.data.shards import (
    FORMAT,
    MANIFEST_FILE,
    SPLITS,
    CorpusManifest,
    LimitsManifest,
    Manifest,
    Shards,
    SplitManifest,
    read_manifest,
)
from gptnorm.data.sources import Reading, Source, corpora_of, datasets_of, open_source, parts_of
from gptnorm.data.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    read_tokenizer_json,
    train_bpe,
)
from gptnorm.data.writer import TRAIN, Counts, Rules, Tally, Writer
from gptnorm.errors import UserError, bad_value
from gptnorm.files import sha256_file, write_atomic
from gptnorm.limits import cores
from gptnorm.lock import Taken, locked

COMMIT_SECONDS = 5.0
"""How much work a kill can cost."""

BPE_BYTES = 1 << 28
"""Bytes of text that a BPE is trained on: of a larger corpus a sample, since its memory grows with the text."""


def prepare(config: DataConfig, watcher: Watcher | None = None) -> Shards:
    """The shards of the configured corpus: ready ones, those in the cache, or newly built there.

    A folder given as `data.path` that holds train.bin or val.bin is ready, and the
    other settings are not asked. Several processes may prepare the same shards at once:
    one builds, the others wait. What was begun and cut off goes on where it was.

    Args:
        watcher: is told how it goes; left out: plain lines, if it takes more than some seconds.

    Raises:
        UserError: a setting or a file is no good; nothing is left behind.
    """
    if (ready := ready_folder(config)) is not None:
        return Shards.open(ready)
    _refuse_hub(config)
    watcher = watcher or Lines(Console())
    tokenizer = _given_tokenizer(config)
    cache = cache_folder(config)
    source = open_source(config, memory=cache / ".hashes", watcher=watcher)
    plan = _plan(config, source)
    folder = cache / _digest(plan)[:32]
    # Shards without their manifest are damaged, which opening them tells.
    if is_empty(folder) or is_half_built(folder):
        _build(Target(folder, "data.cache", wait=True, keep=False), config, source, plan, tokenizer, None, watcher)
    return Shards.open(folder)


def build_shards(
    config: DataConfig, folder: Path, watcher: Watcher | None = None, workers: int | None = None
) -> Shards:
    """Build the shards of the configured corpus into a folder; go on if it is half built, do nothing if complete.

    Args:
        watcher: is told how it goes; left out: plain lines, if it takes more than some seconds.
        workers: processes that tokenise; left out: as many as there are cores. The shards do not depend on it.

    Raises:
        UserError: a setting, a file or a dataset is no good; another process builds there; the folder holds
            something else, or was begun with other settings; the disk is full.
    """
    watcher = watcher or Lines(Console())
    target = Target(folder, "--dir", wait=False, keep=True)
    try:
        if target.is_foreign():
            raise target.refuse("holds files that are no shards built here; name a new folder, or an empty one")
        for path in (config.path,) if isinstance(config.path, str) else config.path:
            if path in NAMES or not expand(path).is_dir():
                continue
            if folder.resolve().is_relative_to(expand(path).resolve()):
                raise target.refuse(f"lies in the source {path!r}, which it would change; name a folder outside it")
    except OSError as error:
        raise target.refuse(f"is no folder that can be used ({error.strerror})") from None
    tokenizer = _given_tokenizer(config)
    journal = target.journal()
    revisions = (journal or {}).get("revisions")
    source = open_source(config, revisions=revisions, memory=cache_folder(config) / ".hashes", watcher=watcher)
    _build(target, config, source, _plan(config, source), tokenizer, workers, watcher)
    return Shards.open(folder)


def cache_folder(config: DataConfig) -> Path:
    """Where shards are kept: data.cache, $GPTNORM_CACHE, $XDG_CACHE_HOME/gptnorm or ~/.cache/gptnorm."""
    if chosen := config.cache or os.environ.get("GPTNORM_CACHE"):
        return expand(chosen)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "gptnorm"
    return expand("~/.cache/gptnorm")


def ready_folder(config: DataConfig) -> Path | None:
    """The folder of ready shards that `data.path` is, None where it is anything else.

    Raises:
        UserError: the folder is half built.
    """
    if not isinstance(config.path, str):
        return None
    folder = expand(config.path)
    if is_half_built(folder):
        reason = "is half built; the same 'gptnorm data build' that was cut off goes on where it was"
        raise bad_value("data.path", config.path, reason)
    return folder if any((folder / f"{split}.bin").is_file() for split in SPLITS) else None


def _refuse_hub(config: DataConfig) -> None:
    for path in (config.path,) if isinstance(config.path, str) else config.path:
        if is_hub_name(path):
            how = f"first build its shards, with 'gptnorm data build {path} --dir FOLDER', then set data.path=FOLDER"
            raise bad_value("data.path", path, f"is a dataset of the Hugging Face Hub; {how}")


def _given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The configured tokenizer, None where it is yet to be trained."""
    if config.tokenizer not in BUILT_IN_TOKENIZERS:
        return read_tokenizer_json(config.tokenizer, config.end_of_text)
    if config.end_of_text not in (None, END_OF_TEXT):
        allowed = f"the tokenizer {config.tokenizer!r} has {END_OF_TEXT!r} only"
        raise bad_value("data.end_of_text", config.end_of_text, allowed)
    return ByteTokenizer() if config.tokenizer == "bytes" else None


def _plan(config: DataConfig, source: Source) -> dict[str, Any]:
    """All that decides what the shards hold, by the names of the settings."""
    if config.tokenizer == "bytes":
        tokenizer = "bytes"
    elif config.tokenizer == "bpe":
        tokenizer = f"bpe of {config.bpe_vocab}"
    else:
        tokenizer = f"{sha256_file(expand(config.tokenizer))} {config.end_of_text}"
    names = ("text_field", "val_fraction", "val_tokens", "max_tokens", "max_documents", "deduplicate")
    settings = {f"data.{name}": getattr(config, name) for name in names}
    return {"format": FORMAT, **settings, "data.tokenizer": tokenizer, "source": source.identity}


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _build(
    target: Target,
    config: DataConfig,
    source: Source,
    plan: dict[str, Any],
    tokenizer: Tokenizer | None,
    workers: int | None,
    watcher: Watcher,
) -> None:
    """Build, or go on building, under the folder's lock."""
    is_new = not target.folder.exists()
    try:
        with locked(target.lock, wait=target.wait):
            try:
                if not _is_complete(target, plan):
                    _build_locked(target, config, source, plan, tokenizer, workers, watcher)
            except (UserError, OSError) as error:
                # A cache is to be forgotten; in a folder of the user's what was done stays, if it is worth anything.
                worth = isinstance(error, OSError) or target.holds_documents()
                if not (target.keep and (worth or (config.tokenizer == "bpe" and target.journal()))):
                    target.clear(whole=is_new or not target.keep)
                raise
            finally:
                watcher.end()
                if target.is_complete():
                    shutil.rmtree(target.work, ignore_errors=True)
    except Taken:
        raise target.refuse("another process builds there; wait for it, or name another folder") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        if not target.keep:
            raise bad_value(target.option, str(target.folder.parent), f"cannot be written ({reason})") from None
        raise target.refuse(f"cannot be written ({reason}); the same command goes on once it can") from None


def _is_complete(target: Target, plan: dict[str, Any]) -> bool:
    """Whether the shards are there already.

    Raises:
        UserError: they are, but of other settings or other text.
    """
    if not target.is_complete():
        return False
    manifest = read_manifest(target.folder)
    if manifest is None or manifest.plan != _digest(plan):
        raise target.refuse("holds shards of other settings or other text (see its card.md); name another folder")
    return True


def _build_locked(
    target: Target,
    config: DataConfig,
    source: Source,
    plan: dict[str, Any],
    tokenizer: Tokenizer | None,
    workers: int | None,
    watcher: Watcher,
) -> None:
    work = target.work
    journal = target.journal()
    if journal is not None:
        _refuse_other_plan(target, journal["plan"], plan)
    if (work / MANIFEST_FILE).exists():
        target.publish()
        return
    if journal is None:
        tokenizer = tokenizer or _train(config, source, watcher)
        target.sweep()
        tokenizer.save(work)
        for path in work.iterdir():
            _sync(path)
    else:
        tokenizer = load_tokenizer(work)
    dtype = "uint16" if tokenizer.vocab_size - 1 <= np.iinfo(np.uint16).max else "uint32"
    rules = Rules(
        dtype=dtype,
        val_fraction=config.val_fraction,
        val_tokens=config.val_tokens,
        max_tokens=config.max_tokens,
        max_documents=config.max_documents,
        deduplicate=config.deduplicate,
    )
    writer = Writer(work, rules, Tally.from_json(journal["tally"]) if journal else None)
    try:
        if journal is None or not journal["is_read"]:
            _fill(target, source, plan, writer, Encoder(tokenizer, work, dtype, workers or cores()), journal, watcher)
        _refuse_empty_split(target, config, writer.tally)
        watcher.begin("checking")
        writer.write_val(work / "val.bin")
    finally:
        writer.close()
    manifest = _manifest(target, config, source, plan, tokenizer, dtype, writer.tally)
    write_atomic(work / DATA_CARD_FILE, data_card(manifest))
    write_atomic(work / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")
    target.publish()


def _fill(
    target: Target,
    source: Source,
    plan: dict[str, Any],
    writer: Writer,
    encoder: Encoder,
    journal: Journal | None,
    watcher: Watcher,
) -> None:
    """Read the source to its end, or to the limits, and write every document."""
    watcher.begin("tokenising")
    reading, place = _reading(target, source, journal)

    def commit(is_read: bool) -> None:
        tally = writer.commit()
        revisions = {part.name.source: part.revision for part in datasets_of(source) if part.revision is not None}
        target.write_journal(
            {"plan": plan, "revisions": revisions, "place": place, "is_read": is_read, "tally": tally.to_json()}
        )

    commit(False)
    committed = time.monotonic()
    with encoder:
        for batch, tokens in encoder.encode(batches(reading)):
            taken = writer.write(batch, tokens)
            place = _place(batch)
            watcher.update(_progress(writer, batch.share))
            if taken < len(batch.digests) or writer.is_full():
                break
            if time.monotonic() - committed >= COMMIT_SECONDS:
                commit(False)
                committed = time.monotonic()
    commit(True)
    watcher.end()


def _place(batch: Batch) -> dict[str, Any]:
    """How a later build finds the end of a batch: it reads the batch again and compares."""
    return {"before": batch.state, "documents": len(batch.digests), "sha256": _digest_of(batch.digests)}


def _reading(target: Target, source: Source, journal: Journal | None) -> tuple[Reading, dict[str, Any] | None]:
    """The documents that are not in the files yet.

    The last batch is read again: if it is not what it was, the source has changed, or does not find back to the
    place it gave, and to go on would lose or double documents.

    Raises:
        UserError: so it is.
    """
    place = journal and journal["place"]
    if not place:
        return source.read(), None
    reading = source.read(place["before"])
    again = islice(reading, place["documents"])
    digests = [hashlib.sha256(document.text.encode("utf-8")).digest() for document in again]
    if len(digests) != place["documents"] or _digest_of(digests) != place["sha256"]:
        raise target.refuse(f"cannot be continued: its source gives other documents now; delete {target.work}")
    return reading, place


def _digest_of(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _progress(writer: Writer, share: float | None) -> Progress:
    train, val, rules = writer.tally.train, writer.tally.val, writer.rules
    documents, tokens = train.documents + val.documents, train.tokens + val.tokens
    # Whichever end comes first.
    ends = [
        share,
        rules.max_tokens and tokens / rules.max_tokens,
        rules.max_documents and documents / rules.max_documents,
    ]
    return Progress(
        share=max((min(1.0, end) for end in ends if end is not None), default=None),
        text_bytes=train.text_bytes + val.text_bytes,
        documents=documents,
        tokens=tokens,
    )


def _train(config: DataConfig, source: Source, watcher: Watcher) -> Tokenizer:
    """A BPE of the training documents: those held out shall be new to the tokenizer too.

    Of more than `BPE_BYTES` of local files it sees a sample, drawn by the documents' hashes over all of them; of a
    dataset, or of a corpus with an end set to it, what comes first.
    """
    watcher.begin("training the tokenizer")
    has_end = config.max_tokens is not None or config.max_documents is not None
    size = None if has_end else source.text_bytes
    share = 1.0 if size is None else min(1.0, BPE_BYTES / max(1, size))

    def texts() -> Iterator[str]:
        taken = 0
        reading = source.read()
        for document in islice(reading, config.max_documents):
            text = document.text.encode("utf-8")
            digest = hashlib.sha256(text).digest()
            split, sample = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8))
            if split < config.val_fraction or sample >= share:
                continue
            taken += len(text)
            watcher.update(Progress(share=max(reading.share() or 0, taken / (2 * BPE_BYTES)), text_bytes=taken))
            yield document.text
            if taken >= (BPE_BYTES if size is None else 2 * BPE_BYTES):
                return

    return train_bpe(texts(), config.bpe_vocab)


def _refuse_empty_split(target: Target, config: DataConfig, tally: Tally) -> None:
    total = tally.train.documents + tally.val.documents
    for split, counts, change in (("train", tally.train, "lower"), ("val", tally.val, "raise")):
        if not counts.documents:
            target.clear(whole=False)
            if not total:
                raise bad_value("data.path", config.path, "holds no text")
            # With three of them in the split on the mean, one in twenty texts has none.
            needed = min(0.5, math.ceil(300 / total) / 100) if total > 1 else 0.0
            enough = f" to {needed:g}" if split == "val" and needed > config.val_fraction else ""
            what = f"documents, or pieces where a text of few is cut, none fell into the {split} split"
            allowed = f"of {total} {what}; {change} it{enough}, or give more text"
            raise bad_value("data.val_fraction", config.val_fraction, allowed)


def _refuse_other_plan(target: Target, begun: dict[str, Any], plan: dict[str, Any]) -> None:
    for key, now in plan.items():
        if (then := begun.get(key)) != now:
            what = "from other text" if key == "source" else f"with {key} = {then!r}, not {now!r}"
            raise target.refuse(f"is half built {what}; give the same again, or name another folder, or delete it")


def _manifest(
    target: Target,
    config: DataConfig,
    source: Source,
    plan: dict[str, Any],
    tokenizer: Tokenizer,
    dtype: str,
    tally: Tally,
) -> Manifest:
    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    tokenizer_file = target.work / TOKENIZER_FILE
    corpora = corpora_of(source)
    parts = parts_of(source)
    alone = corpora[0] if corpora and len(parts) == 1 else None
    identities = json.dumps([part.identity for part in parts]).encode()
    datasets = [part.full_name for part in datasets_of(source)]
    return Manifest(
        format=FORMAT,
        tokenizer=tokenizer.name,
        tokenizer_sha256=sha256_file(tokenizer_file) if tokenizer_file.exists() else None,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        dtype="uint16" if dtype == "uint16" else "uint32",
        val_fraction=config.val_fraction,
        val_below=f"{min(tally.below, 2**64 - 1):016x}",
        limits=LimitsManifest(
            val_tokens=config.val_tokens,
            max_tokens=config.max_tokens,
            max_documents=config.max_documents,
            deduplicate=config.deduplicate,
        ),
        plan=_digest(plan),
        corpus=CorpusManifest(
            path=paths,
            files=sum(len(corpus.files) for corpus in corpora),
            fingerprint=alone.fingerprint if alone else hashlib.sha256(identities).hexdigest(),
            datasets=datasets,
            text_field=config.text_field,
            piece_size=alone.piece_size if alone else None,
            python=platform.python_version() if "stdlib" in paths else None,
        ),
        train=_split(tally.train, target.work / TRAIN),
        val=_split(tally.val, target.work / "val.bin"),
    )


def _split(counts: Counts, path: Path) -> SplitManifest:
    return SplitManifest(
        tokens=counts.tokens,
        documents=counts.documents,
        text_bytes=counts.text_bytes,
        sha256=sha256_file(path),
        repeats=counts.repeats,
    )


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
