"""Tokenizers: text to ids and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptnorm.data.names import expand
from gptnorm.errors import bad_value

END_OF_TEXT = "<|endoftext|>"
"""The end-of-text token of a tokenizer made here."""

USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Names under which published tokenizers have their end-of-text token, looked for in this order."""

CARD_FILE = "gptnorm_tokenizer.json"
"""Names the tokenizer kept in a folder, and its end-of-text id."""

TOKENIZER_FILE = "tokenizer.json"
"""The tokenizer itself, as the `tokenizers` library writes it; the bytes need none."""


class Tokenizer(Protocol):
    """What the data needs of a tokenizer."""

    @property
    def name(self) -> str:
        """Either "bytes", "bpe", or the path of the tokenizer.json it was read from."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def end_of_text(self) -> int:
        """The id put after each document."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text: one-dimensional arrays of an unsigned type, no special token added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens and ids it does not have are left out, broken UTF-8 becomes U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs into an existing folder."""
        ...


class ByteTokenizer:
    """The UTF-8 bytes themselves: ids 0 to 255, and 256 for the end of a text."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return bytes(token for i in ids if (token := int(i)) < self.end_of_text).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        _write_card(folder, self)


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library: one trained here, or any tokenizer.json.

    A special token's name that occurs in a text is encoded as the text it is, so
    that no document can end itself early.
    """

    def __init__(self, inner: tokenizers.Tokenizer, name: str, end_of_text: int) -> None:
        # Published files often carry the truncation and padding of another use.
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self.name = name
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_text = end_of_text

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        # The end-of-text token may be an ordinary one, which `skip_special_tokens` would show.
        kept = [token for i in ids if (token := int(i)) != self.end_of_text]
        return self._inner.decode(kept, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        (folder / TOKENIZER_FILE).write_text(self._inner.to_str(pretty=True), encoding="utf-8", newline="\n")
        _write_card(folder, self)


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Train a byte-level BPE, GPT-2's kind, on a stream of texts.

    Any text goes through it and back unchanged, since its alphabet holds all 256
    bytes. A small corpus may yield fewer than `vocab_size` tokens.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return JsonTokenizer(inner, "bpe", inner.get_vocab()[END_OF_TEXT])


def read_tokenizer_json(path: str, end_of_text: str | None = None) -> JsonTokenizer:
    """Read a tokenizer.json; its end-of-text token is the named one, else the first of `USUAL_ENDS` it has.

    Raises:
        UserError: the file is missing or no tokenizer, or has no such end-of-text token.
    """
    inner = _read_inner(path)
    for token in (end_of_text,) if end_of_text is not None else USUAL_ENDS:
        if (found := inner.token_to_id(token)) is not None:
            return JsonTokenizer(inner, path, found)
    if end_of_text is not None:
        raise bad_value("data.end_of_text", end_of_text, f"not a token of {path!r}")
    raise bad_value("data.end_of_text", None, f"{path!r} has none of {', '.join(USUAL_ENDS)}; name the token to use")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in a folder, such as one of shards.

    Raises:
        UserError: the folder holds none, or a broken one.
    """
    card_path = Path(folder) / CARD_FILE
    try:
        card: Any = json.loads(card_path.read_bytes())
        name, end_of_text = card["name"], card["end_of_text"]
    except OSError:
        raise bad_value("data.path", str(folder), f"holds no tokenizer (no {CARD_FILE})") from None
    except (ValueError, RecursionError, KeyError, TypeError):
        raise bad_value("data.path", str(card_path), "does not describe a tokenizer") from None
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    inner = _read_inner(str(Path(folder) / TOKENIZER_FILE))
    if not isinstance(name, str) or type(end_of_text) is not int or inner.id_to_token(end_of_text) is None:
        raise bad_value("data.path", str(card_path), f"does not describe the {TOKENIZER_FILE} beside it")
    return JsonTokenizer(inner, name, end_of_text)


def _read_inner(path: str) -> tokenizers.Tokenizer:
    file = expand(path)
    if not file.is_file():
        raise bad_value("data.tokenizer", path, 'no such file; "bytes", "bpe", or the path of a tokenizer.json')
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise bad_value("data.tokenizer", path, f"not a tokenizer.json ({reason})") from None
    if not inner.get_vocab_size(with_added_tokens=True):
        raise bad_value("data.tokenizer", path, "its vocabulary is empty")
    return inner


def _write_card(folder: Path, tokenizer: Tokenizer) -> None:
    card = {"name": tokenizer.name, "end_of_text": tokenizer.end_of_text}
    (folder / CARD_FILE).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
