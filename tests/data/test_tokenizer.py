from __future__ import annotations

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from gptnorm.data import load_tokenizer
from gptnorm.data.tokenizer import (
    CARD_FILE,
    END_OF_TEXT,
    TOKENIZER_FILE,
    ByteTokenizer,
    JsonTokenizer,
    read_tokenizer_json,
    train_bpe,
)

any_text = st.text(st.characters(exclude_categories=["Cs"]))

SAMPLE = ["the quick brown fox jumps over the lazy dog, " * 3, "naïve café 😀 " * 5]


@cache
def bpe() -> JsonTokenizer:
    return train_bpe(SAMPLE, 300)


def write_word_level(path: Path, words: list[str], **changes: object) -> Path:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path.write_text(json.dumps({**json.loads(inner.to_str()), **changes}))
    return path


@given(st.lists(any_text, max_size=4))
@settings(deadline=None)
def test_bytes_are_utf8(texts):
    for text, ids in zip(texts, ByteTokenizer().encode_batch(texts), strict=True):
        assert ids.tolist() == list(text.encode())
        assert ByteTokenizer().decode([*ids, 256]) == text


@given(any_text)
@settings(deadline=None)
def test_bpe_gives_back_any_text(text):
    (ids,) = bpe().encode_batch([text])
    assert bpe().decode(ids) == text
    assert bpe().decode([*ids, bpe().end_of_text]) == text


def test_bpe_has_the_size_asked_for():
    assert bpe().vocab_size == 300
    assert train_bpe([], 257).vocab_size == 257
    ids = bpe().encode_batch(SAMPLE)
    assert len(ids[0]) < len(SAMPLE[0].encode()) / 2
    assert max(map(max, ids)) < 300


def merged_by_hand(text: str, tokenizer_json: dict) -> list[int]:
    """GPT-2's algorithm for ASCII text: split into words, then merge the best-ranked pair until none is left."""
    ranks = {tuple(pair): rank for rank, pair in enumerate(tokenizer_json["model"]["merges"])}
    ids = []
    for word in re.findall(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text):
        parts = list(word.replace(" ", "\u0120").replace("\n", "\u010a"))
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            i = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
            parts[i : i + 2] = ["".join(best)]
        ids += [tokenizer_json["model"]["vocab"][part] for part in parts]
    return ids


@given(st.text(st.sampled_from("the quickbrownfx,'s\n19"), max_size=60))
@settings(deadline=None)
def test_bpe_agrees_with_merging_by_hand(text):
    assert bpe().encode_batch([text])[0].tolist() == merged_by_hand(text, json.loads(bpe()._inner.to_str()))


def test_training_is_deterministic(start):
    script = """if True:
        from gptnorm.config import DataConfig
        from gptnorm.data.corpora import open_corpus
        from gptnorm.data.tokenizer import train_bpe
        import itertools, hashlib
        documents = itertools.islice(open_corpus(DataConfig()).documents(), 20)
        tokenizer = train_bpe((document.text for document in documents), 1000)
        print(hashlib.sha256(tokenizer._inner.to_str().encode()).hexdigest())
    """
    processes = [start(script) for _ in range(2)]
    first, second = (process.communicate(timeout=60)[0] for process in processes)
    assert len(first.strip()) == 64
    assert first == second


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe()])
def test_text_cannot_end_itself(tokenizer):
    text = f"before{END_OF_TEXT}after"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe()])
def test_saved_and_loaded(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.name, loaded.vocab_size, loaded.end_of_text) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    for a, b in zip(loaded.encode_batch(SAMPLE), tokenizer.encode_batch(SAMPLE), strict=True):
        np.testing.assert_array_equal(a, b)


def test_ids_out_of_range_have_no_text():
    assert ByteTokenizer().decode([104, 300, 105]) == "hi"
    assert bpe().decode([9999]) == ""


def test_another_tools_settings_are_switched_off(tmp_path):
    """Truncation, padding and a post-processor that adds tokens."""
    words = ["<unk>", "</s>", "a", "b"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["</s>"])
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer_json(str(tmp_path / "tokenizer.json"))
    assert tokenizer.end_of_text == 1
    assert [ids.tolist() for ids in tokenizer.encode_batch(["a b a b", "a", ""])] == [[2, 3, 2, 3], [2], []]


def test_vocabulary_with_holes(tmp_path):
    path = write_word_level(tmp_path / "t.json", ["<unk>", "</s>"])
    content = json.loads(path.read_text())
    content["model"]["vocab"]["far"] = 1000
    path.write_text(json.dumps(content))
    assert read_tokenizer_json(str(path)).vocab_size == 1001


def test_end_of_text_is_found_or_named(tmp_path, refused):
    both = str(write_word_level(tmp_path / "both.json", ["<unk>", "<eos>", "</s>", "stop"]))
    assert read_tokenizer_json(both).end_of_text == 2
    assert read_tokenizer_json(both, "stop").end_of_text == 3
    assert read_tokenizer_json(both, "stop").decode([3]) == ""
    refused(["data.end_of_text = 'no'", "both.json"], read_tokenizer_json, both, "no")
    none = str(write_word_level(tmp_path / "none.json", ["<unk>", "a"]))
    refused(["data.end_of_text", "</s>", "none.json"], read_tokenizer_json, none)


@pytest.mark.parametrize("content", ["", "{}", "[1", "\udcff", '{"model": 3}', '{"model":{"type":"BPE"}}'])
def test_bad_tokenizer_json(tmp_path, refused, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, errors="surrogateescape")
    refused(["data.tokenizer", "tokenizer.json"], read_tokenizer_json, str(path))


def test_empty_vocabulary(tmp_path, refused):
    path = write_word_level(tmp_path / "t.json", [])
    refused(["data.tokenizer", "empty"], read_tokenizer_json, str(path))


def test_missing_tokenizer_json(tmp_path, refused):
    refused(["data.tokenizer", '"bytes", "bpe"'], read_tokenizer_json, "gpt-2")
    refused(["data.tokenizer"], read_tokenizer_json, str(tmp_path))


@pytest.mark.parametrize(
    "card", ["", "[]", "{}", '{"name": 3, "end_of_text": 0}', '{"name": "bpe", "end_of_text": 999}']
)
def test_bad_card(tmp_path, refused, card):
    refused([str(tmp_path), "no tokenizer"], load_tokenizer, tmp_path)
    bpe().save(tmp_path)
    (tmp_path / CARD_FILE).write_text(card)
    refused([CARD_FILE], load_tokenizer, tmp_path)


def test_card_without_tokenizer(tmp_path, refused):
    bpe().save(tmp_path)
    (tmp_path / TOKENIZER_FILE).unlink()
    refused([TOKENIZER_FILE], load_tokenizer, tmp_path)
