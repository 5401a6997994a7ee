r"""A tolerance study as data: tracks (`gptnorm.report.track`), pairs of them, and the places where they are compared.

How far up the baseline's best loss is kept (`Pair.beats`) is no mean of numbers per seed: it is where the mean loss
crosses, `kept`, from the rate that is best on the mean of all seeds, $\eta^*$, which is the one that is printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from gptnorm.format import settings_text
from gptnorm.report.results import About, RunLine
from gptnorm.report.track import Track
from gptnorm.report.tuning import tuned
from gptnorm.study.cell import Pairs
from gptnorm.study.measures import (
    Bound,
    Estimate,
    Kept,
    kept,
    paired_difference,
    rate_ratio,
)
from gptnorm.study.outcome import Stability
from gptnorm.study.search import Search

HowMany = Literal["all", "some", "none"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A strategy against the baseline, each at its own best rate."""

    ours: Track
    theirs: Track

    @property
    def difference(self) -> Estimate | None:
        """Our loss minus theirs, seed by seed; None where a seed of either failed."""
        if self.ours.failed or self.theirs.failed:
            return None
        return paired_difference(self.ours.losses, self.theirs.losses)

    def difference_on(self, text: str) -> Estimate | None:
        """`difference`, on another text."""
        return paired_difference(self.ours.elsewhere_by_seed(text), self.theirs.elsewhere_by_seed(text))

    @property
    def edge_ratio(self) -> Bound | None:
        """How many times as far out our edge is."""
        return rate_ratio(*({s: edge.bracket for s, edge in t.edges.items()} for t in (self.ours, self.theirs)))

    @property
    def near_ratio(self) -> Bound | None:
        """How many times as far up our loss stays within epsilon of our best as theirs does of theirs."""
        return rate_ratio(self.ours.near_by_seed, self.theirs.near_by_seed)

    def ratio_at(self, factor: float) -> Bound | None:
        """The same of a loss of at most so many times the own best: the edge, were that where a run has failed."""
        return rate_ratio(*(t.reaches(lambda loss: factor * loss) for t in (self.ours, self.theirs)))

    @property
    def beats(self) -> Kept | None:
        """Up to which rate, from our best one, our mean loss is at most theirs at their best rate.

        None where a seed of either failed at the best rate.
        """
        if self.ours.failed or self.theirs.failed or self.ours.best is None:
            return None
        curves = {seed: self.ours.curve(seed) for seed in self.ours.losses}
        return kept(curves, self.theirs.losses, self.ours.best.lr)

    @property
    def at_end(self) -> bool:
        """Whether a best rate of either, or what was chosen beside it, is the lowest or highest tried."""
        return self.ours.at_end or self.theirs.at_end


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where strategies are compared: one combination of what was mapped."""

    settings: Pairs
    told: Pairs
    """Those of the settings that differ from place to place; of a single place all. A text has its short name."""
    tracks: tuple[Track, ...]
    """Every strategy with every setting that was tried."""
    baseline: str
    shortlist: float
    """`study.shortlist`, nats."""
    entropy: float | None
    """Unigram entropy of its text, in nats."""

    @property
    def name(self) -> str:
        """In words; empty where nothing was mapped."""
        return settings_text(self.told)

    @cached_property
    def own(self) -> dict[str, Track]:
        """Each strategy as it comes."""
        return {track.strategy: track for track in self.tracks if not track.variant}

    @property
    def same_seeds(self) -> bool:
        """Whether all that have a loss, as they come, have it of the same seeds; others cannot be ranked by means."""
        return len({frozenset(track.losses) for track in self.own.values() if track.loss}) < 2

    @cached_property
    def tuned(self) -> dict[str, Track]:
        """Each strategy with the best of its settings."""
        names = dict.fromkeys(track.strategy for track in self.tracks)
        tried = {name: [track for track in self.tracks if track.strategy == name] for name in names}
        return {name: tuned(tracks, self.shortlist) for name, tracks in tried.items()}

    def pairs(self, *, tuned: bool) -> dict[str, Pair]:
        """Every other strategy against the baseline, both as they come or both tuned."""
        tracks = self.tuned if tuned else self.own
        theirs = tracks.get(self.baseline)
        return {
            name: Pair(ours=track, theirs=theirs)
            for name, track in tracks.items()
            if theirs is not None and name != self.baseline
        }


@dataclass(frozen=True, kw_only=True)
class ToleranceStudy:
    """A tolerance study's folder, read."""

    about: About
    places: tuple[Place, ...]
    baseline: str
    pick: tuple[int, ...]
    seeds: tuple[int, ...]
    """Those reported; none: a screening."""
    grid: tuple[float, ...]
    epsilon: float
    follows_rates: bool
    """Whether edges were looked for, so that it is known how far a rate can be pushed."""
    search: Search
    stability: Stability
    tune: dict[str, list[Any]]
    refused: tuple[str, ...]
    """Why a strategy is not trained with a setting of `tune`."""
    shortlist: float
    """`study.shortlist`, nats."""
    evaluated: Mapping[str, str]
    """Texts that every run was evaluated on beside its own, each with the name that it is shown by."""
    complete: bool
    """Whether the study had come to its end when it was last worked on."""
    wanted_places: int
    """How many the study asks for."""
    cells: tuple[RunLine, ...]

    @property
    def screening(self) -> bool:
        """Whether the numbers are those of the seeds that pick."""
        return not self.seeds

    @property
    def crossing(self) -> HowMany:
        """Of which tracks each seed stands at the rate that all others pick, so that intervals hold the error of it."""
        tracks = [track for place in self.places for track in (*place.own.values(), *place.tuned.values())]
        return _how_many(track.crossed for track in tracks if track.best)

    @property
    def tuned_by_all(self) -> HowMany:
        """Of which strategies the setting was chosen on all seeds, not on those alone that pick."""
        tracks = [track for place in self.places for track in place.tuned.values()]
        return _how_many(track.by_all for track in tracks if track.best)

    @property
    def mapped(self) -> tuple[str, ...]:
        """The settings that differ from place to place."""
        return tuple(key for key, _ in self.places[0].told) if self.places else ()

    @property
    def heads(self) -> tuple[str, ...]:
        """The same without their tables, "steps" for "train.steps", where that is clear."""
        short = tuple(key.rpartition(".")[2] for key in self.mapped)
        return short if len(set(short)) == len(short) else self.mapped

    @property
    def entropy(self) -> float | None:
        """Unigram entropy of the text; None where it is not known, or each place has its own."""
        found = {place.entropy for place in self.places} or {self.about.unigram_entropy}
        return found.pop() if len(found) == 1 else None

    @property
    def others(self) -> tuple[str, ...]:
        """Every strategy but the baseline."""
        return tuple(name for name in self.about.strategies if name != self.baseline)

    def ranked(self, tracks: Mapping[str, Track]) -> list[str]:
        """Every strategy, that of the lowest loss first.

        Those without a loss come after, by what the picking seeds found, and last those without a track.
        """

        def key(name: str) -> tuple[float, float]:
            track = tracks.get(name)
            if track is None:
                return math.inf, math.inf
            return (math.inf if track.loss is None else track.loss.value), _loss_of(track)

        return sorted(self.about.strategies, key=key)

    @property
    def unfinished(self) -> bool:
        """Whether strategies are missing somewhere, or reported seeds at a best rate."""
        if not self.complete or len(self.places) < self.wanted_places:
            return True
        tracks = [track for place in self.places for tracks in (place.own, place.tuned) for track in tracks.values()]
        return any(len(place.own) < len(self.about.strategies) for place in self.places) or any(
            not track.picked or (track.best is not None and track.ended < len(track.seeds)) for track in tracks
        )


def _how_many(found: Iterable[bool]) -> HowMany:
    values = list(found)
    return "none" if not any(values) else "all" if all(values) else "some"


def _loss_of(track: Track) -> float:
    return math.inf if track.best is None or track.best.loss is None else track.best.loss
