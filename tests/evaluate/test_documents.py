from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from gptnorm.data import tokenizer as makers
from gptnorm.evaluate import documents as module
from gptnorm.evaluate.documents import Document, count_bytes, is_lossless, limit, split_documents

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), min_size=1, max_size=6)
BYTES = makers.ByteTokenizer()
BPE = makers.train_bpe(["the quick brown fox, élan vital, 한국어 한국어 😀😀"] * 4, 300)


def lossy() -> makers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<|endoftext|>": 2}, "a"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return makers.JsonTokenizer(inner, "lossy", 2)


def read(tokenizer: makers.Tokenizer, drawn: list[str]) -> list[Document]:
    encoded = tokenizer.encode_batch(drawn)
    return [Document(ids, len(text.encode())) for ids, text in zip(encoded, drawn, strict=True)]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@given(drawn=texts, most=st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_a_limit_cuts_between_characters_and_counts_their_bytes(tokenizer, drawn, most):
    whole = read(tokenizer, drawn)
    kept = list(limit(whole, most, tokenizer))
    sizes = [len(document.tokens) + document.has_end for document in kept]
    available = sum(len(document.tokens) + 1 for document in whole)
    assert sum(sizes) <= most
    assert sum(sizes) >= min(most, available) - 4, "a character has at most four bytes"
    for number, (document, text) in enumerate(zip(kept, drawn, strict=False)):
        shown = tokenizer.decode(document.tokens)
        assert document.text_bytes == len(shown.encode())
        assert text.startswith(shown)
        assert document.has_end == (shown == text and sizes[number] == len(whole[number].tokens) + 1)
        assert document.has_end or number == len(kept) - 1


def test_a_tokenizer_that_changes_text_is_noticed():
    assert is_lossless(BYTES)
    assert is_lossless(BPE)
    assert not is_lossless(lossy())
    long, short = (Document(np.array(ids, np.uint32), 9) for ids in ([0, 1, 1, 0], [0]))
    assert list(limit([short, long], 4, lossy())) == [short], "nobody knows the bytes of a part"
    (first,) = limit([long, short], 2, lossy())
    assert (first.tokens.tolist(), first.text_bytes, first.has_end) == ([0, 1], None, False)


def test_without_texts_a_limit_is_exact():
    documents = [Document(np.arange(10, dtype=np.uint16), None, has_end=False)] * 2
    assert [len(document.tokens) for document in limit(documents, 13, None)] == [10, 3]


@given(lists=st.lists(st.lists(st.integers(0, 8), max_size=7), max_size=9), chunk=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_documents_of_a_shard(lists, chunk):
    tokens = np.array([token for ids in lists for token in [*ids, 9]], np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        assert [ids.tolist() for ids in split_documents(tokens, 9)] == lists


def test_bytes_of_tokens():
    for tokenizer in (BYTES, BPE):
        assert count_bytes(tokenizer, tokenizer.encode_batch(["한국 é"])[0]) == len("한국 é".encode())
