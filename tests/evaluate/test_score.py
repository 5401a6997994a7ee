"""Scores against closed forms, a token-by-token evaluation, and the formulas of a ratio's error."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptnorm.evaluate import Document, Scorer, ratio_error

END = 4
"""Ids 0 to 3 stand for text here."""


class Bigram:
    """p(next | last) from a table; its features are the ids themselves."""

    def __init__(self, table: Tensor) -> None:
        self.log_p = table.log()

    def eval(self) -> None: ...

    def features(self, tokens: Tensor) -> Tensor:
        return tokens[..., None]

    def read_out(self, h: Tensor) -> Tensor:
        # Any constant may be added to logits.
        return self.log_p[h[..., 0]] + 3.0


@pytest.fixture(scope="module")
def bigram() -> tuple[Bigram, np.ndarray]:
    table = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    table = table / table.sum(-1, keepdim=True)
    return Bigram(table), -np.log(table.double().numpy())


def scorer(**changes) -> Scorer:
    base = Scorer(
        window=8, stride=4, mode="separate", end_of_text=END, batch_size=3, device=torch.device("cpu"), bf16=False
    )
    return dataclasses.replace(base, **changes)


def documents_of(lists) -> list[Document]:
    return [Document(np.array(ids, np.uint16), 3 * len(ids)) for ids in lists]


corpora = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=8)


@given(lists=corpora, mode=st.sampled_from(["separate", "stream"]), stride=st.integers(1, 8), batch=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_a_bigram_model_has_a_closed_form(bigram, lists, mode, stride, batch):
    """It looks at the last token alone, so that neither windows nor what precedes a document matter."""
    model, cost = bigram
    paths = [[END, *ids, END] for ids in lists]
    nats = np.array([sum(cost[a, b] for a, b in pairwise(path)) for path in paths])
    tokens = np.array([len(ids) + 1 for ids in lists])
    text_bytes = 3 * (tokens - 1)
    found = scorer(mode=mode, stride=stride, batch_size=batch).score(model, documents_of(lists))
    assert (found.documents, found.tokens, found.text_bytes) == (len(lists), tokens.sum(), text_bytes.sum())
    assert found.nats == pytest.approx(nats.sum(), rel=1e-6)
    assert found.end_tokens == len(lists)
    assert found.end_nats == pytest.approx(sum(cost[ids[-1], END] for ids in lists), rel=1e-6)
    assert found.nats_per_token == found.nats / found.tokens
    assert found.perplexity == pytest.approx(math.exp(nats.sum() / tokens.sum()), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / text_bytes.sum(), rel=1e-6)
    if mode == "separate" and len(lists) > 1:
        assert found.nats_per_token_error == pytest.approx(ratio_error(nats, tokens), rel=1e-4, abs=1e-6)
        expected = ratio_error(nats, text_bytes) / math.log(2)
        assert found.bits_per_byte_error == pytest.approx(expected, rel=1e-4, abs=1e-6)
    else:
        assert found.nats_per_token_error is None
        assert found.bits_per_byte_error is None


def test_a_uniform_model_has_its_vocabulary_as_perplexity():
    found = scorer().score(Bigram(torch.full((5, 5), 0.2)), documents_of([[0, 1, 2], [3] * 20]))
    assert found.perplexity == pytest.approx(5)
    assert found.bits_per_byte == pytest.approx(math.log2(5) * 25 / (3 * 23))
    assert found.nats_per_token_error == pytest.approx(0, abs=1e-6)


CASES = [("prenorm", "llama2", False), ("postnorm", "gpt2", False), ("simplenorm", "llama3", False)]
CASES += [("angpt", "llama2", True)]


@pytest.mark.parametrize(("strategy", "backbone", "moe"), CASES)
@pytest.mark.parametrize("mode", ["separate", "stream"])
def test_a_gpt_against_one_token_at_a_time(strategy, backbone, moe, mode):
    """Each token with exactly the context that `cut_windows` promises, alone in its batch, by the whole model."""
    window, stride, end = 12, 5, 60
    model = tiny_gpt(strategy, backbone, moe=moe, options={"logit_softcap": 5.0}).double()
    draw = np.random.default_rng(0)
    documents = [Document(draw.integers(0, end, n).astype(np.uint16), n) for n in (1, 3, 11, 12, 13, 37)]
    model.train()
    found = scorer(mode=mode, window=window, stride=stride, end_of_text=end, batch_size=4).score(model, documents)
    assert not model.training
    paths = [np.array([end, *document.tokens, end], np.int64) for document in documents]
    if mode == "stream":
        paths = [np.concatenate([paths[0], *(path[1:] for path in paths[1:])])]
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for path in paths:
            for j in range(1, len(path)):
                context = j if j <= window else window - stride + 1 + (j - window - 1) % stride
                logits = model(torch.from_numpy(path[None, j - context : j]))[0, -1]
                nats -= float(logits.log_softmax(-1)[path[j]])
                tokens += 1
    assert found.tokens == tokens
    assert found.nats == pytest.approx(nats, rel=1e-9)


def test_unknown_ends_give_one_stream_as_it_is(bigram):
    """As nanoGPT's shards are: the first token is context alone."""
    model, cost = bigram
    chunks = [Document(np.array(ids, np.uint16), None, has_end=False) for ids in ([0, 1, 2, 3, 0], [1, 1], [2])]
    found = scorer(mode="stream", end_of_text=None).score(model, chunks)
    path = [0, 1, 2, 3, 0, 1, 1, 2]
    assert found.nats == pytest.approx(sum(cost[a, b] for a, b in pairwise(path)), rel=1e-6)
    assert (found.tokens, found.documents, found.text_bytes, found.bits_per_byte) == (7, None, None, None)


def test_progress_ends_with_everything(bigram):
    seen = []
    found = scorer().score(bigram[0], documents_of([[0, 1] * 300, [2], [3] * 90]), seen.append)
    shares = [reach.share for reach in seen]
    assert [reach.tokens for reach in seen] == sorted({reach.tokens for reach in seen})
    assert shares[0] < 0.2
    assert shares[-1] == 1
    last = seen[-1]
    assert (last.documents, last.tokens, last.text_bytes) == (found.documents, found.tokens, found.text_bytes)


def test_nothing_is_no_score(bigram):
    assert scorer().score(bigram[0], []) is None
    assert scorer(mode="stream").score(bigram[0], []) is None


def test_bf16_is_near_fp32():
    model = tiny_gpt("prenorm", "llama2")
    documents = [Document(np.arange(50, dtype=np.uint16), 50)]
    exact, near = (scorer(end_of_text=60, bf16=bf16).score(model, documents) for bf16 in (False, True))
    assert near.nats != exact.nats
    assert near.nats == pytest.approx(exact.nats, rel=1e-2)


def test_the_error_of_a_ratio():
    """Equal sizes: the standard error of a mean. Unequal ones: what draws of a large population spread by."""
    draw = np.random.default_rng(0)
    y = draw.normal(3, 1, 50)
    assert ratio_error(2 * y, np.full(50, 2.0)) == pytest.approx(y.std(ddof=1) / math.sqrt(50))
    assert ratio_error(y[:1], np.ones(1)) is None
    x = draw.integers(1, 30, (4000, 200)).astype(float)
    y = x * (2 + 0.3 * draw.normal(size=x.shape)) + draw.normal(size=x.shape)
    spread = (y.sum(1) / x.sum(1)).std(ddof=1)
    errors = [ratio_error(a, b) for a, b in zip(y[:300], x[:300], strict=True)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.05)
