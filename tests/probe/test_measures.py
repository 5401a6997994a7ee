"""The formulas against closed forms and dense computations."""

from __future__ import annotations

import math

import pytest
import torch

from gptnorm.probe import measures


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_token_cosine_has_its_closed_forms() -> None:
    x = randn(1, 1, 8)
    assert measures.token_cosine(x.expand(2, 5, 8)).item() == pytest.approx(1.0)
    assert measures.token_cosine(torch.eye(6)[None]).item() == pytest.approx(0.0, abs=1e-7)
    # Three unit vectors 120 degrees apart.
    angle = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3])
    assert measures.token_cosine(7 * torch.stack((angle.cos(), angle.sin()), -1)[None]).item() == pytest.approx(-0.5)
    assert math.isnan(measures.token_cosine(x).item()), "one token has no pair"


def test_token_cosine_is_the_mean_over_pairs() -> None:
    x = randn(2, 5, 8)
    pairs = [
        torch.cosine_similarity(x[b, s], x[b, t], dim=0).item()
        for b in range(2)
        for s in range(5)
        for t in range(5)
        if s != t
    ]
    assert measures.token_cosine(x).item() == pytest.approx(sum(pairs) / len(pairs))


def test_step_cosine() -> None:
    x = randn(2, 3, 4)
    assert measures.step_cosine(x, 5 * x).item() == pytest.approx(1.0)
    assert measures.step_cosine(x, -x).item() == pytest.approx(-1.0)
    # x + y with y of the same length and at a right angle: 1 / sqrt(2).
    a, b = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])
    assert measures.step_cosine(a, a + b).item() == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("at_once", [1, 40, 2**24])
def test_largest_logits_are_those_of_dense_attention(monkeypatch, heads, groups, at_once) -> None:
    monkeypatch.setattr(measures, "LOGITS_AT_ONCE", at_once)
    q, k = randn(2, heads, 7, 6, seed=1), randn(2, groups, 7, 6, seed=2)
    dense = torch.full((heads,), -math.inf, dtype=torch.float64)
    for b in range(2):
        for h in range(heads):
            for t in range(7):
                for s in range(t + 1):
                    dense[h] = max(dense[h], 0.3 * q[b, h, t] @ k[b, h // (heads // groups), s])
    found = measures.largest_logits(q, k, 0.3)
    torch.testing.assert_close(found, dense)
    bound = measures.logit_bounds(q, k, 0.3)
    assert (bound >= found).all()
    for h in range(heads):
        by_hand = max(
            0.3 * q[b, h].norm(dim=-1).max() * k[b, h // (heads // groups)].norm(dim=-1).max() for b in range(2)
        )
        assert bound[h].item() == pytest.approx(float(by_hand))
