"""Datasets of the Hugging Face Hub, streamed through the `datasets` library.

A folder laid out like a repository of the Hub goes through the same code.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptnorm.data.corpora import Document, State
from gptnorm.data.names import HubName, expand
from gptnorm.errors import UserError, bad_value

SHOWN = 20
"""How many names an error lists."""

QUIET = ("datasets", "huggingface_hub", "fsspec", "httpx")
"""Loggers that would write between the lines of ours; what ends a build is an error anyway."""


class HubDataset:
    """A split of a dataset; see `Source`."""

    def __init__(self, name: HubName, text_field: str, revision: str | None = None) -> None:
        """Nothing is opened yet.

        Args:
            text_field: the column that holds the text.
            revision: the commit to read, wins over that of the name.
        """
        self.name = name
        self.text_field = text_field
        self._revision = revision
        self._builder: Any = None

    @property
    def identity(self) -> dict[str, str]:
        """See `Source`; of a folder, with the names, sizes and times of its files."""
        name = self.name
        parts = [str(part) for part in (name.repository, name.revision, name.config, name.split)]
        return {"dataset": ":".join([*parts, *([_state_of_folder(expand(name.repository))] if name.is_local else [])])}

    @property
    def text_bytes(self) -> int | None:
        """See `Source`: the Hub does not say."""
        return None

    @property
    def revision(self) -> str | None:
        """The commit that is read; None for a folder.

        Raises:
            UserError: see `read`.
        """
        return None if self.name.is_local else self._open().hash

    @property
    def full_name(self) -> str:
        """REPOSITORY@COMMIT:CONFIG:SPLIT.

        Raises:
            UserError: see `read`.
        """
        name = self.name
        commit = f"@{self.revision}" if self.revision else ""
        return f"{name.repository}{commit}:{self._open().config.name}:{name.split}"

    def read(self, state: State = None) -> HubReading:
        """See `Source`.

        Raises:
            UserError: `datasets` is not installed; no such dataset, config, split or column; the Hub is out of reach.
        """
        builder = self._open()
        try:
            stream = builder.as_streaming_dataset(split=self.name.split)
        except Exception as error:  # the library raises whatever its own libraries do
            raise self._refusal(error) from None
        columns = stream.column_names
        if columns is not None:
            self._check(columns)
            stream = stream.select_columns([self.text_field])
        infos = builder.info.splits or {}
        total = infos[self.name.split].num_examples if self.name.split in infos else None
        return HubReading(self, stream, total, state)

    def _open(self) -> Any:
        if self._builder is None:
            datasets = _import(self.name)
            path = str(expand(self.name.repository).absolute()) if self.name.is_local else None
            try:
                self._builder = datasets.load_dataset_builder(
                    path or self.name.repository, self.name.config, revision=self._revision or self.name.revision
                )
            except Exception as error:  # the library raises whatever its own libraries do
                raise self._refusal(error) from None
        return self._builder

    def _check(self, columns: list[str]) -> None:
        if self.text_field not in columns:
            shown = ", ".join(map(repr, columns[:SHOWN])) + (", ..." if len(columns) > SHOWN else "")
            raise bad_value("data.text_field", self.text_field, f"{self.name.source!r} has the columns {shown}")

    def _refusal(self, error: Exception) -> UserError:
        """The one line for what went wrong in the library."""
        kinds = {kind.__name__ for kind in type(error).__mro__}
        reason = " ".join(str(error).split()) or type(error).__name__
        if "DatasetNotFoundError" in kinds:
            reason = f"{reason} A private one needs a login (hf auth login)"
        elif kinds & {"ConnectionError", "TimeoutError", "TransportError", "HfHubHTTPError", "ClientError"}:
            reason = f"the Hub cannot be reached: {reason}; with a network, the same command goes on where it was"
        elif "ModuleNotFoundError" in kinds or "ImportError" in kinds:
            reason = f"cannot be read without another package: {reason}"
        return bad_value("data.path", self.name.source, _shorten(reason))


class HubReading:
    """One pass over a dataset; see `Reading`."""

    def __init__(self, dataset: HubDataset, stream: Any, total: int | None, state: State) -> None:
        self._dataset = dataset
        self._stream = stream
        self._total = total
        self._rows: int = state["rows"] if state else 0
        self._begins_at = state
        if state is not None:
            stream.load_state_dict(state["datasets"])
        self._documents = self._read()

    def __iter__(self) -> Iterator[Document]:
        return self._documents

    def _read(self) -> Iterator[Document]:
        dataset = self._dataset
        source, field = dataset.name.source, dataset.text_field
        rows = iter(self._stream)
        while True:
            try:
                row = next(rows, None)
            except UserError:
                raise
            except Exception as error:  # the library raises whatever its own libraries do
                raise dataset._refusal(error) from None
            if row is None:
                return
            self._rows += 1
            self._begins_at = None
            if field not in row:
                dataset._check(list(row))
            text = row[field]
            # Published datasets have rows without text, which nobody here can mend.
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise bad_value("data.text_field", field, f"in {source!r}, row {self._rows}, it holds {kind}, not text")
            if text:
                yield Document(f"{source}:{self._rows}", text)

    def state(self) -> State:
        """See `Reading`."""
        # Before its first row a stream does not say where it was told to begin.
        return self._begins_at or {"rows": self._rows, "datasets": self._stream.state_dict()}

    def share(self) -> float | None:
        """See `Reading`: by rows where the dataset says how many it has, else by its files."""
        if self._total:
            return min(1.0, self._rows / self._total)
        # The innermost is the place that the library itself goes on from; the others may lag behind after a resume.
        begun, files = list(_numbers(self.state()["datasets"], "shard_idx")), self._stream.num_shards
        return min(1.0, begun[-1] / files) if begun and files > 1 else None


def _import(name: HubName) -> Any:
    for logger in QUIET:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        import datasets
    except ImportError:
        raise bad_value("data.path", name.source, "reading it needs: pip install 'gptnorm[data]'") from None
    for logger in QUIET:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


def _state_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            found = os.stat(os.path.join(place, name))
            digest.update(f"{os.path.relpath(place, folder)} {name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _numbers(state: Any, key: str) -> Iterator[int]:
    """The numbers of that name in nested tables: how they are nested is the library's own business."""
    if isinstance(state, dict):
        if isinstance(found := state.get(key), int):
            yield found
        for inner in state.values():
            yield from _numbers(inner, key)


def _shorten(text: str, length: int = 400) -> str:
    return text if len(text) <= length else text[:length] + " …"
