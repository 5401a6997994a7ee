"""Shards: a corpus as two flat files of token ids.

A folder holds train.bin and val.bin (little-endian uint16, or uint32 where an id
would not fit; the format that nanoGPT reads and writes) and, if it was built here,
manifest.json and the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from gptnorm.data.tokenizer import CARD_FILE, TOKENIZER_FILE
from gptnorm.errors import UserError, bad_value
from gptnorm.files import sha256_file

FORMAT = 2
"""Raised whenever the same settings would give other tokens or another manifest; older ones are still read."""

MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "val")

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

SAMPLES = 64
"""How many blocks of a file without a manifest stand for it in the fingerprint."""
SAMPLE_BYTES = 1 << 16
"""Bytes of each of those blocks."""


class Table(BaseModel):
    """Part of manifest.json."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SplitManifest(Table):
    """What one .bin file holds."""

    tokens: PositiveInt
    documents: PositiveInt
    text_bytes: PositiveInt
    """Bytes of the documents in UTF-8, end-of-text tokens not counted."""
    sha256: str
    repeats: NonNegativeInt = 0
    """Documents left out because their text was in the split, or with `deduplicate` in either, already."""


class CorpusManifest(Table):
    """Where the text came from."""

    path: list[str]
    files: NonNegativeInt
    """Local files."""
    fingerprint: str
    """SHA-256 over the names and contents of the files; over that of each part where there are several."""
    datasets: list[str] = []
    """Datasets of the Hugging Face Hub, as REPOSITORY@COMMIT:CONFIG:SPLIT."""
    text_field: str
    piece_size: PositiveInt | None
    """Characters of the pieces that documents were cut into; None: documents are whole."""
    python: str | None
    """Version of Python, whose standard library "stdlib" is."""


class LimitsManifest(Table):
    """Settings that bound the shards; see `DataConfig`."""

    val_tokens: PositiveInt
    max_tokens: PositiveInt | None
    max_documents: PositiveInt | None
    deduplicate: bool


class Manifest(Table):
    """All of manifest.json."""

    format: Literal[1, 2]
    tokenizer: str
    tokenizer_sha256: str | None
    """Of the tokenizer.json beside it; None for bytes."""
    vocab_size: PositiveInt
    end_of_text: int
    dtype: Literal["uint16", "uint32"]
    val_fraction: float
    val_below: str | None = None
    """A document was held out if the first 16 hex digits of its text's SHA-256 are below these."""
    limits: LimitsManifest | None = None
    plan: str | None = None
    """SHA-256 of all the settings and sources that decide what the shards hold."""
    corpus: CorpusManifest
    train: SplitManifest
    val: SplitManifest


@dataclass(frozen=True, eq=False)
class Shards:
    """The tokens of a corpus, memory-mapped read-only."""

    folder: Path
    train: np.ndarray
    """Token ids of the training split: one-dimensional, uint16 or uint32."""
    val: np.ndarray
    """Token ids of the validation split, likewise."""
    vocab_size: int | None
    """One more than the largest id the tokenizer has; None without a manifest."""
    end_of_text: int | None
    """The id after each document; None without a manifest."""
    manifest: dict[str, Any]
    """The content of manifest.json; empty for shards that nanoGPT wrote."""
    fingerprint: str
    """Equal for equal tokens. With a manifest it is over the hashes there; without one over
    the sizes and 64 blocks of each file, since hashing tens of gigabytes at each start won't do."""

    @property
    def val_bytes_per_token(self) -> float | None:
        """Bytes of validation text per validation token, which turns a loss into bits per byte."""
        if not self.manifest:
            return None
        return self.manifest["val"]["text_bytes"] / self.manifest["val"]["tokens"]

    @property
    def tokenizer(self) -> tuple[str | None, int] | None:
        """Equal where equal ids mean equal text; None without a manifest, which says nothing."""
        if not self.manifest:
            return None
        return self.manifest["tokenizer_sha256"], self.manifest["end_of_text"]

    @classmethod
    def open(cls, folder: str | Path) -> Shards:
        """Map the shards in a folder and check their sizes; `verify` checks their contents.

        Without a manifest the files are taken for nanoGPT's: uint16, vocabulary unknown
        (a meta.pkl is not read, since reading a pickle runs its code).

        Raises:
            UserError: a file is missing, empty or cut short, or the manifest is broken.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        dtype = DTYPES[manifest.dtype if manifest else "uint16"]
        train, val = (_map(folder / f"{split}.bin", dtype, manifest and getattr(manifest, split)) for split in SPLITS)
        return cls(
            folder=folder,
            train=train,
            val=val,
            vocab_size=manifest.vocab_size if manifest else None,
            end_of_text=manifest.end_of_text if manifest else None,
            manifest=manifest.model_dump(mode="json") if manifest else {},
            fingerprint=_fingerprint(manifest) if manifest else _sampled_fingerprint(folder),
        )

    def verify(self) -> list[str]:
        """Compare the files with the hashes in the manifest and name those compared (none without a manifest).

        Raises:
            UserError: a file is missing or is not what was written.
        """
        if not self.manifest:
            return []
        expected = {f"{split}.bin": self.manifest[split]["sha256"] for split in SPLITS}
        if self.manifest["tokenizer_sha256"] is not None:
            expected[TOKENIZER_FILE] = self.manifest["tokenizer_sha256"]
        for name, sha256 in expected.items():
            path = self.folder / name
            try:
                found = sha256_file(path)
            except OSError as error:
                raise _unreadable(path, error) from None
            if found != sha256:
                raise damaged(path, f"its content is not what {MANIFEST_FILE} says")
        return list(expected)


def damaged(path: Path, what: str) -> UserError:
    """The error for a file of shards that is not as it was written."""
    return bad_value("data.path", str(path), f"{what}; delete the folder and let the shards be built again")


def _unreadable(path: Path, error: OSError) -> UserError:
    return bad_value("data.path", str(path), f"cannot be read ({error.strerror})")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder of shards, None where nanoGPT wrote them.

    Raises:
        UserError: it is broken, or the shards were built here and it is missing.
    """
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        if (folder / CARD_FILE).exists():
            # Tokens of ours without a manifest are a build that was interrupted, not nanoGPT's.
            raise damaged(path, "is missing") from None
        return None
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise damaged(path, f"is no manifest of format {FORMAT} ({where}: {' '.join(first['msg'].split())})") from None


def _map(path: Path, dtype: np.dtype[Any], split: SplitManifest | None) -> np.ndarray:
    try:
        size = path.stat().st_size
        if split is not None and size != split.tokens * dtype.itemsize:
            raise damaged(path, f"holds {size} bytes, {MANIFEST_FILE} says {split.tokens * dtype.itemsize}")
        if size == 0:
            raise bad_value("data.path", str(path), "holds no tokens")
        if size % dtype.itemsize:
            raise bad_value("data.path", str(path), f"holds {size} bytes, which is no whole number of {dtype.name}")
        return np.memmap(path, dtype, mode="r")
    except FileNotFoundError:
        raise bad_value("data.path", str(path), "no such file; shards are train.bin and val.bin") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _fingerprint(manifest: Manifest) -> str:
    content = [manifest.dtype, manifest.vocab_size, manifest.end_of_text, manifest.train.sha256, manifest.val.sha256]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _sampled_fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        path = folder / f"{split}.bin"
        size = path.stat().st_size
        digest.update(f"{split} {size} ".encode())
        last = max(0, size - SAMPLE_BYTES)
        with path.open("rb") as file:
            for offset in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
