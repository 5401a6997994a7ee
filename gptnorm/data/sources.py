"""Where documents come from: local files, datasets of the Hub, or several of them one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Protocol

from gptnorm.config import DataConfig
from gptnorm.data.corpora import Corpus, Document, State, open_corpus
from gptnorm.data.hub import HubDataset
from gptnorm.data.names import is_hub_name, parse_hub_name
from gptnorm.data.progress import Watcher
from gptnorm.errors import bad_value


class Reading(Protocol):
    """One pass over the documents of a source."""

    def __iter__(self) -> Iterator[Document]:
        """The documents from where the reading was told to begin; always the same iterator.

        Raises:
            UserError: the source cannot be read any further.
        """
        ...

    def state(self) -> State:
        """The place after the document that was given last: a reading begun there gives the following ones."""
        ...

    def share(self) -> float | None:
        """How much of the source lies behind that place, 0 to 1; None: nobody knows."""
        ...


class Source(Protocol):
    """Documents in a fixed order."""

    @property
    def identity(self) -> dict[str, str]:
        """What tells it from other sources: a half-built folder is not continued from another one."""
        ...

    @property
    def text_bytes(self) -> int | None:
        """About how much text it holds; None: nobody knows."""
        ...

    def read(self, state: State = None) -> Reading:
        """Begin at a place that an earlier reading was at; None: at the first document."""
        ...


class Chain:
    """Sources one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = parts

    @property
    def identity(self) -> dict[str, str]:
        """See `Source`."""
        return {f"{i} {key}": value for i, part in enumerate(self.parts) for key, value in part.identity.items()}

    @property
    def text_bytes(self) -> int | None:
        """See `Source`."""
        known = [part.text_bytes for part in self.parts]
        return None if None in known else sum(size or 0 for size in known)

    def read(self, state: State = None) -> ChainReading:
        """See `Source`."""
        return ChainReading(self.parts, state)


class ChainReading:
    """One pass over a chain; see `Reading`."""

    def __init__(self, parts: Sequence[Source], state: State) -> None:
        self._parts = parts
        self._number, inner = state or (0, None)
        self._reading = parts[self._number].read(inner)
        self._documents = self._read()

    def __iter__(self) -> Iterator[Document]:
        return self._documents

    def _read(self) -> Iterator[Document]:
        for number in range(self._number, len(self._parts)):
            if number != self._number:
                self._number, self._reading = number, self._parts[number].read()
            yield from self._reading

    def state(self) -> State:
        """See `Reading`."""
        return [self._number, self._reading.state()]

    def share(self) -> float | None:
        """See `Reading`; each part counts alike, since their sizes are not known in one unit."""
        share = self._reading.share()
        return None if share is None else (self._number + share) / len(self._parts)


def open_source(
    config: DataConfig, *, revisions: Mapping[str, str] | None = None, memory: Path, watcher: Watcher
) -> Source:
    """The source that `data.path` names. Local files are found and hashed here, the Hub is asked when it is read.

    Args:
        revisions: the commits at which datasets of the Hub are read, by their names in `data.path`; of others the
            newest is taken.
        memory, watcher: see `hash_files`.

    Raises:
        UserError: a path is missing, of an unknown extension, or holds nothing to read.
    """
    paths = (config.path,) if isinstance(config.path, str) else config.path
    if not paths:
        raise bad_value("data.path", paths, "name at least one file, folder or dataset")
    groups = [(hub, tuple(group)) for hub, group in groupby(paths, key=is_hub_name)]
    parts: list[Source] = []
    for hub, group in groups:
        if hub:
            names = [parse_hub_name(path) for path in group]
            parts += [HubDataset(name, config.text_field, (revisions or {}).get(name.source)) for name in names]
        else:
            alone = len(groups) == 1
            parts.append(open_corpus(replace(config, path=group), memory=memory, watcher=watcher, whole=not alone))
    return parts[0] if len(parts) == 1 else Chain(parts)


def parts_of(source: Source) -> list[Source]:
    """The sources that a source is made of, itself if it is no chain."""
    return list(source.parts) if isinstance(source, Chain) else [source]


def corpora_of(source: Source) -> list[Corpus]:
    """Those of local files."""
    return [part for part in parts_of(source) if isinstance(part, Corpus)]


def datasets_of(source: Source) -> list[HubDataset]:
    """Those read through the `datasets` library."""
    return [part for part in parts_of(source) if isinstance(part, HubDataset)]
