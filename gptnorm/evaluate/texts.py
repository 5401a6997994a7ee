"""What is scored: a run's own validation split, or another text under the run's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from gptnorm.config import Config, DataConfig
from gptnorm.data import Shards, Tokenizer, load_tokenizer, prepare
from gptnorm.data.build import cache_folder, ready_folder
from gptnorm.data.corpora import Corpus, FilesReading, open_corpus
from gptnorm.data.encoder import batches
from gptnorm.data.names import expand, is_hub_name
from gptnorm.data.progress import Watcher
from gptnorm.data.tokenizer import ByteTokenizer
from gptnorm.errors import UserError, bad_value
from gptnorm.evaluate.documents import CHUNK, Document, count_bytes, is_lossless, split_documents
from gptnorm.evaluate.trained_on import TrainedOn
from gptnorm.train.inputs import verify_small

What = Literal["held out", "all"]


class Text(Protocol):
    """Documents to score."""

    name: str
    what: What
    """The held-out part of the run's own corpus, or all of another one."""
    left_out: int
    """Documents met so far that the run was trained on; they are not given."""

    @property
    def text_bytes(self) -> int | None:
        """Bytes of all of it, where they are known beforehand."""
        ...

    def comparable(self, trained_on: TrainedOn) -> bool:
        """Whether it can be told of its documents which of them the run was trained on."""
        ...

    def documents(self, trained_on: TrainedOn | None = None) -> Iterator[Document]:
        """Each document but those that the run was trained on; None: every document."""
        ...

    def share(self) -> float | None:
        """How much of it lies behind the document that was given last, 0 to 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a run was trained on, as far as it is at hand."""

    shards: Shards | None
    """None: it is not at hand, or is not what it was; the run's tokens are then bytes."""
    tokenizer: Tokenizer | None
    """None: the shards have none, since nanoGPT wrote them."""
    missing: UserError | None = None
    """What is wrong with the text, where there are no shards."""

    @property
    def end_of_text(self) -> int | None:
        """The id that ends a document; None: nobody knows."""
        return self.tokenizer.end_of_text if self.tokenizer else None


def open_own(config: Config, fingerprint: str | None, texts: Sequence[str], watcher: Watcher) -> Own:
    """A run's own shards and tokenizer: from its `data.path`, or from one of `texts` that are the same shards.

    Where they are not to be had, a run on bytes still has its tokenizer.

    Args:
        fingerprint: of the shards the run is trained on; None: any will do.

    Raises:
        UserError: neither.
    """
    try:
        shards = prepare(config.data, watcher)
        if fingerprint not in (None, shards.fingerprint):
            raise bad_value("data.path", config.data.path, "the text is not what it was when this run began")
    except UserError as error:
        # The shards may have been moved, and be what is to be scored.
        same = (shards for text in texts if (shards := _ready(text)) and shards.fingerprint == fingerprint)
        shards = next(same, None)
        if shards is None:
            # `data.tokenizer` says nothing if the path was a folder of shards; the vocabulary then does.
            if config.data.tokenizer == ByteTokenizer.name and config.model.vocab_size is None:
                return Own(shards=None, tokenizer=ByteTokenizer(), missing=error)
            reason = "without the shards or the text it was trained on, the run has no tokenizer"
            raise UserError(f"{error}; {reason}") from None
    verify_small(shards)
    return Own(shards=shards, tokenizer=load_tokenizer(shards.folder) if shards.manifest else None)


def own_text(config: Config, own: Own) -> Text:
    """The run's own validation split.

    Raises:
        UserError: it is not at hand.
    """
    if own.shards is None:
        assert own.missing is not None
        raise own.missing
    path = config.data.path
    return ShardsText(path if isinstance(path, str) else ", ".join(path), own.shards, own.tokenizer, "held out")


def open_text(name: str, config: Config, own: Own, text_field: str, watcher: Watcher) -> Text:
    """The text that a name stands for, anything that `data.path` takes.

    It is the run's own if its files (names and contents), its tokens or its path are those of the run: then only what
    was held out is scored.

    Args:
        text_field: see `DataConfig`.

    Raises:
        UserError: there is none, it has other tokens than the run, or is the run's own and not what it was.
    """
    if not name:
        raise bad_value("--data", name, "name a file, a folder, or shards")
    if is_hub_name(name):
        how = f"first build its shards, with 'gptnorm data build {name} --dir FOLDER', then give that FOLDER"
        raise bad_value("--data", name, f"is a dataset of the Hugging Face Hub; {how}")
    shards = _ready(name)
    if shards is not None:
        if own.shards is not None and shards.fingerprint == own.shards.fingerprint:
            return ShardsText(name, shards, own.tokenizer, "held out")
        _check_tokenizer(name, shards, own)
        return ShardsText(name, shards, own.tokenizer, "all")
    has_own_path = _is_same_path(name, config.data.path) and text_field == config.data.text_field
    if has_own_path and own.missing is not None:
        raise own.missing
    if own.tokenizer is None:
        reason = "is text, and the shards that the run was trained on have no tokenizer; give shards of its tokens"
        raise bad_value("--data", name, reason)
    if not has_own_path or own.shards is None:
        data = replace(config.data, path=name, text_field=text_field)
        corpus = open_corpus(data, memory=cache_folder(config.data) / ".hashes", watcher=watcher, whole=True)
        if own.shards is None or not _is_of_corpus(own.shards, corpus):
            return CorpusText(name, corpus, own.tokenizer)
    return ShardsText(name, own.shards, own.tokenizer, "held out")


class ShardsText:
    """Documents of ready shards: of the validation split, or of both; see `Text`."""

    def __init__(self, name: str, shards: Shards, tokenizer: Tokenizer | None, what: What) -> None:
        self.name = name
        self.what: What = what
        self.left_out = 0
        self._shards = shards
        self._tokenizer = tokenizer
        self._splits = ("val",) if what == "held out" else ("train", "val")
        self._read = 0

    @property
    def text_bytes(self) -> int | None:
        """See `Text`."""
        if not self._shards.manifest:
            return None
        return sum(self._shards.manifest[split]["text_bytes"] for split in self._splits)

    def share(self) -> float:
        """See `Text`."""
        return self._read / sum(len(getattr(self._shards, split)) for split in self._splits)

    def comparable(self, trained_on: TrainedOn) -> bool:
        """See `Text`: pieces are cut out of the text, which a tokenizer may not give back."""
        return not trained_on.by_pieces or (self._tokenizer is not None and is_lossless(self._tokenizer))

    def documents(self, trained_on: TrainedOn | None = None) -> Iterator[Document]:
        """See `Text`."""
        end, tokenizer = self._shards.end_of_text, self._tokenizer
        exact = tokenizer if tokenizer is not None and is_lossless(tokenizer) else None
        for split in self._splits:
            tokens = getattr(self._shards, split)
            if end is None:
                for at in range(0, len(tokens), CHUNK):
                    self._read += len(tokens[at : at + CHUNK])
                    yield Document(tokens[at : at + CHUNK], None, has_end=False)
                continue
            for document in split_documents(tokens, end):
                self._read += len(document) + 1
                if trained_on is not None:
                    text = exact.decode(document) if exact is not None and trained_on.by_pieces else None
                    if trained_on.has(document, text):
                        self.left_out += 1
                        continue
                yield Document(document, None if exact is None else count_bytes(exact, document))


class CorpusText:
    """Documents of files, each whole; see `Text`."""

    def __init__(self, name: str, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.name = name
        self.what: What = "all"
        self.left_out = 0
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._reading: FilesReading | None = None

    @property
    def text_bytes(self) -> None:
        """See `Text`: each document has its own."""
        return None

    def share(self) -> float | None:
        """See `Text`."""
        return self._reading and self._reading.share()

    def comparable(self, trained_on: TrainedOn) -> bool:
        """See `Text`."""
        return True

    def documents(self, trained_on: TrainedOn | None = None) -> Iterator[Document]:
        """See `Text`."""
        self._reading = self._corpus.read()
        for batch in batches(self._reading):
            texts = [text.decode("utf-8") for text in batch.texts]
            encoded = self._tokenizer.encode_batch(texts)
            for content, text, tokens in zip(batch.texts, texts, encoded, strict=True):
                if trained_on is not None and trained_on.has(tokens, text):
                    self.left_out += 1
                    continue
                yield Document(tokens, len(content))


def refuse_unknown_ids(documents: Iterator[Document], vocab: int, name: str) -> Iterator[Document]:
    """The same documents, as long as the model's embedding knows their ids.

    Raises:
        UserError: an id is beyond it.
    """
    for document in documents:
        largest = int(document.tokens.max(initial=0))
        if largest >= vocab:
            raise bad_value("--data", name, f"holds the token id {largest}, and the model has {vocab} ids from 0 on")
        yield document


def _ready(name: str) -> Shards | None:
    try:
        folder = ready_folder(DataConfig(path=name)) if name else None
    except OSError as error:
        raise bad_value("--data", name, f"cannot be read ({error.strerror})") from None
    return None if folder is None else Shards.open(folder)


def _check_tokenizer(name: str, shards: Shards, own: Own) -> None:
    """Raises UserError unless equal ids mean equal text, as far as the shards say."""
    if not shards.manifest:
        if own.tokenizer is None:
            return
        raise bad_value("--data", name, "shards without a manifest.json do not say which tokenizer they are of")
    if own.shards is None:
        mine = (None, ByteTokenizer.end_of_text)
    elif own.shards.manifest:
        mine = own.shards.tokenizer
    else:
        reason = "the shards that the run was trained on have no manifest.json to compare its tokenizer with"
        raise bad_value("--data", name, reason)
    if shards.tokenizer != mine:
        reason = "its shards are of another tokenizer than the run's; give the text itself, which the run's will read"
        raise bad_value("--data", name, reason)


def _is_of_corpus(shards: Shards, corpus: Corpus) -> bool:
    known = shards.manifest.get("corpus", {})
    return (known.get("fingerprint"), known.get("text_field")) == (corpus.fingerprint, corpus.text_field)


def _is_same_path(name: str, path: str | tuple[str, ...]) -> bool:
    if not isinstance(path, str):
        return False
    one, other = expand(name), expand(path)
    return name == path or (one.exists() and one.resolve() == other.resolve())
