"""The long half of the conformance suite: every row at 64 blocks, and every row through inductor."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cases import CASES, tiny_gpt, tokens

from gptnorm.config import BackboneName

every_case = pytest.mark.parametrize(("strategy", "backbone", "moe"), CASES)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@every_case
def test_sixty_four_blocks(strategy: str, backbone: BackboneName, moe: bool, precision: str) -> None:
    """Finite loss and gradients before and after an update."""
    model = tiny_gpt(strategy, backbone, moe=moe, n_layers=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with autocast:
            objective = model.objective(tokens(seed=step))
        optimizer.zero_grad()
        objective.total.backward()
        assert objective.total.isfinite()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
        model.after_step()


@pytest.mark.slow
@every_case
def test_inductor_equals_eager(strategy: str, backbone: BackboneName, moe: bool) -> None:
    """One block is enough for the compiler's view of a strategy, and two for its view of the layers."""
    model = tiny_gpt(strategy, backbone, moe=moe)
    torch._dynamo.reset()
    compiled = torch.compile(model.objective, fullgraph=True)
    exact = model.objective(tokens())
    exact.total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rough = compiled(tokens())
    rough.total.backward()
    torch.testing.assert_close(rough.total, exact.total, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-3, atol=1e-5, msg=name)
