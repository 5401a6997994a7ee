"""Building shards: documents to tokens, into a folder that is complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptnorm.config import BUILT_IN_TOKENIZERS, DataConfig
from gptnorm.data.corpora import Corpus, Document, open_corpus
from gptnorm.data.shards import (
    DTYPES,
    FORMAT,
    MANIFEST_FILE,
    SPLITS,
    CorpusManifest,
    Manifest,
    Shards,
    SplitManifest,
)
from gptnorm.data.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    read_tokenizer_json,
    train_bpe,
)
from gptnorm.errors import bad_value
from gptnorm.files import sha256_file, sync_folder, write_atomic

BATCH_DOCUMENTS = 1000
BATCH_CHARACTERS = 1 << 22
"""Documents are encoded in batches of at most this many, or of little more than this much text."""


def prepare(config: DataConfig) -> Shards:
    """The shards of the configured corpus: ready ones, those in the cache, or newly built there.

    A folder given as `data.path` that holds train.bin or val.bin is ready, and the
    other settings are not asked. Several processes may prepare the same shards at once.

    Raises:
        UserError: a setting or a file is no good; nothing is left behind.
    """
    if (ready := _ready_folder(config)) is not None:
        return Shards.open(ready)
    tokenizer = _given_tokenizer(config)
    corpus = open_corpus(config)
    folder = cache_folder(config) / _key(config, corpus)
    if not folder.exists():
        try:
            _build_aside(config, corpus, tokenizer, folder)
        except OSError as error:
            raise bad_value("data.cache", str(folder.parent), f"cannot be written ({error.strerror})") from None
    return Shards.open(folder)


def cache_folder(config: DataConfig) -> Path:
    """Where shards are kept: data.cache, $GPTNORM_CACHE, $XDG_CACHE_HOME/gptnorm or ~/.cache/gptnorm."""
    if chosen := config.cache or os.environ.get("GPTNORM_CACHE"):
        return Path(chosen).expanduser()
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "gptnorm"
    return Path("~/.cache/gptnorm").expanduser()


def split_of(document: Document, val_fraction: float) -> str:
    """Either "val" or "train", by the SHA-256 of the text alone: not by its name, place or neighbours."""
    first = hashlib.sha256(document.text.encode("utf-8")).digest()[:8]
    return "val" if int.from_bytes(first, "big") / 2**64 < val_fraction else "train"


def _ready_folder(config: DataConfig) -> Path | None:
    if not isinstance(config.path, str):
        return None
    folder = Path(config.path).expanduser()
    return folder if any((folder / f"{split}.bin").is_file() for split in SPLITS) else None


def _given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The configured tokenizer, None where it is yet to be trained."""
    if config.tokenizer not in BUILT_IN_TOKENIZERS:
        return read_tokenizer_json(config.tokenizer, config.end_of_text)
    if config.end_of_text not in (None, END_OF_TEXT):
        allowed = f"the tokenizer {config.tokenizer!r} has {END_OF_TEXT!r} only"
        raise bad_value("data.end_of_text", config.end_of_text, allowed)
    return ByteTokenizer() if config.tokenizer == "bytes" else None


def _key(config: DataConfig, corpus: Corpus) -> str:
    """Name of the shards' folder: a hash of all that decides their content."""
    if config.tokenizer == "bytes":
        tokenizer = "bytes"
    elif config.tokenizer == "bpe":
        tokenizer = f"bpe {config.bpe_vocab}"
    else:
        tokenizer = f"{sha256_file(Path(config.tokenizer).expanduser())} {config.end_of_text}"
    decisive = [FORMAT, corpus.fingerprint, config.text_field, tokenizer, config.val_fraction]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]


def _build_aside(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer | None, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        _build(config, corpus, tokenizer or _train(config, corpus), aside)
        try:
            aside.rename(folder)
        except OSError:
            # Another process was first; what it built is the same.
            if not (folder / MANIFEST_FILE).exists():
                raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _train(config: DataConfig, corpus: Corpus) -> Tokenizer:
    """A BPE of the training documents: those held out shall be new to the tokenizer too."""
    documents = corpus.documents()
    texts = (document.text for document in documents if split_of(document, config.val_fraction) == "train")
    return train_bpe(texts, config.bpe_vocab)


def _build(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, aside: Path) -> None:
    tokenizer.save(aside)
    dtype = "uint16" if tokenizer.vocab_size - 1 <= np.iinfo(np.uint16).max else "uint32"
    writers = {split: _SplitWriter(aside / f"{split}.bin", DTYPES[dtype], tokenizer.end_of_text) for split in SPLITS}
    try:
        for batch in _batches(corpus.documents()):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                writers[split_of(document, config.val_fraction)].write(document, ids)
    finally:
        for writer in writers.values():
            writer.file.close()
    _refuse_empty_split(config, writers)
    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    tokenizer_file = aside / TOKENIZER_FILE
    manifest = Manifest(
        format=FORMAT,
        tokenizer=tokenizer.name,
        tokenizer_sha256=sha256_file(tokenizer_file) if tokenizer_file.exists() else None,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        dtype=dtype,
        val_fraction=config.val_fraction,
        corpus=CorpusManifest(
            path=paths,
            files=len(corpus.files),
            fingerprint=corpus.fingerprint,
            text_field=config.text_field,
            piece_size=corpus.piece_size,
            python=platform.python_version() if "stdlib" in paths else None,
        ),
        train=writers["train"].manifest(),
        val=writers["val"].manifest(),
    )
    for path in aside.iterdir():
        _sync(path)
    write_atomic(aside / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")


class _SplitWriter:
    """Appends documents to one .bin file and counts them."""

    def __init__(self, path: Path, dtype: np.dtype, end_of_text: int) -> None:
        self.file = path.open("wb")
        self._dtype = dtype
        self._end = np.array([end_of_text], dtype)
        self._sha256 = hashlib.sha256()
        self.documents = self._tokens = self._text_bytes = 0

    def write(self, document: Document, ids: np.ndarray) -> None:
        content = np.concatenate([ids.astype(self._dtype), self._end]).tobytes()
        self.file.write(content)
        self._sha256.update(content)
        self.documents += 1
        self._tokens += len(ids) + 1
        self._text_bytes += len(document.text.encode("utf-8"))

    def manifest(self) -> SplitManifest:
        return SplitManifest(
            tokens=self._tokens,
            documents=self.documents,
            text_bytes=self._text_bytes,
            sha256=self._sha256.hexdigest(),
        )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _refuse_empty_split(config: DataConfig, writers: dict[str, _SplitWriter]) -> None:
    total = sum(writer.documents for writer in writers.values())
    for split, change in (("train", "lower"), ("val", "raise")):
        if not writers[split].documents:
            allowed = f"of {total} documents none fell into the {split} split; {change} it, or give more text"
            raise bad_value("data.val_fraction", config.val_fraction, allowed)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
