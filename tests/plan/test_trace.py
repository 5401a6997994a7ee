"""The trace on fake tensors against what real tensors keep and allocate."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from allocator import allocated_peak, under
from cases import ROWS, VOCAB, tiny_gpt
from torch import Tensor

from gptnorm.config import BackboneName, Precision
from gptnorm.model import GPT
from gptnorm.plan.trace import Trace, cuda_kernels, fake_model, trace_pass
from gptnorm.train.blocks import prepare_blocks

LENGTH = 16
Recompute = Literal["none", "selective", "full"]


def trace(
    strategy: str,
    backbone: BackboneName,
    *,
    sequences: int = 3,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
    cuda: bool = False,
    **changes: Any,
) -> Trace:
    with torch.device("meta"):
        model = tiny_gpt(strategy, backbone, **changes)
    prepare_blocks(model, recompute, compiled=False, float8=precision == "fp8")
    with fake_model(model) as fake:
        return trace_pass(fake, sequences=sequences, seq_len=LENGTH, precision=precision, cuda=cuda)


def real(
    strategy: str, backbone: BackboneName, precision: Precision, recompute: Recompute = "none", **changes: Any
) -> GPT:
    model = tiny_gpt(strategy, backbone, **changes)
    prepare_blocks(model, recompute, compiled=False, float8=precision == "fp8")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def text(sequences: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (sequences, LENGTH + 1))


def saved_bytes(model: GPT, tokens: Tensor, precision: Precision) -> int:
    """What autograd keeps, storages counted once, weights and tokens left out."""
    known = {x.untyped_storage().data_ptr() for x in (*model.parameters(), tokens)}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), under(precision):
        model.objective(tokens)
    return sum(storage.nbytes() for storage in storages.values())


KEPT: list[tuple[str, Precision]] = [
    *((row.strategy, "fp32") for row in ROWS),
    ("simplenorm", "bf16"),
    ("ngpt", "bf16"),
    ("simplenorm", "fp8"),
]


@pytest.mark.parametrize(("strategy", "precision"), KEPT)
def test_kept_is_what_autograd_saves(strategy: str, precision: Precision) -> None:
    found = trace(strategy, "llama3", precision=precision).kept.total
    # The loss itself is alive and not saved; a mean's weight is saved and has no storage of its own on fake tensors.
    assert found == pytest.approx(saved_bytes(real(strategy, "llama3", precision), text(), precision), abs=64)


PEAKS: list[tuple[str, BackboneName, Precision, Recompute, dict[str, Any]]] = [
    ("simplenorm", "llama2", "bf16", "none", {}),
    ("simplenorm", "llama2", "fp32", "selective", {}),
    ("siamesenorm", "llama3", "fp32", "full", {}),
    ("siamesenorm", "llama3", "bf16", "full", {}),
    ("ngpt", "gpt2", "bf16", "none", {}),
    ("prenorm", "gpt2", "fp32", "none", {"options": {"attention_softcap": 30.0}}),
    ("prenorm", "llama2", "fp32", "none", {"moe": True, "d_ff": 48}),
    ("prenorm", "llama2", "bf16", "none", {"moe": True, "d_ff": 48}),
    ("prenorm", "llama2", "fp8", "none", {}),
    ("simplenorm", "llama3", "fp8", "selective", {}),
    ("prenorm", "llama2", "fp8", "full", {"moe": True, "d_ff": 48}),
]


@pytest.mark.parametrize(("strategy", "backbone", "precision", "recompute", "changes"), PEAKS)
def test_peak_is_what_the_allocator_saw(
    strategy: str, backbone: BackboneName, precision: Precision, recompute: Recompute, changes: dict[str, Any]
) -> None:
    changes = {"d_model": 128, "d_ff": 352, **changes}
    found = trace(strategy, backbone, sequences=8, precision=precision, recompute=recompute, **changes)
    peak = max(found.loss_peak, found.head_peak, found.backward_peak).total
    seen = allocated_peak(real(strategy, backbone, precision, recompute, **changes), text(8), precision)
    # Some products in bf16 have scratch memory on a CPU.
    assert peak == pytest.approx(seen, rel=1e-3 if precision == "fp32" else 0.03)


def test_what_is_kept_is_linear_in_the_sequences_and_less_with_recomputation() -> None:
    kept = {
        recompute: [
            trace("simplenorm", "llama3", sequences=n, precision="bf16", recompute=recompute).kept.total
            # A single sequence's targets need no copy.
            for n in (2, 3, 5)
        ]
        for recompute in ("none", "selective", "full")
    }
    for two, three, five in kept.values():
        assert five - three == 2 * (three - two)
    assert kept["none"][0] > kept["selective"][0] > kept["full"][0]


def test_copies_are_the_weights_that_autocast_casts() -> None:
    found = trace("prenorm", "llama2", precision="bf16")
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 80) + VOCAB * 32
    assert found.kept.copies == 2 * matrices
    assert trace("prenorm", "llama2").kept.copies == 0


def test_fused_norm_keeps_its_input_and_one_number_a_row() -> None:
    x, gain = torch.zeros(6, 10, requires_grad=True), torch.ones(10, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    plain = F.rms_norm
    with cuda_kernels(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.rms_norm(x, (10,), gain, 1e-5)
    assert sorted(kept) == [6, 10, 60]
    assert F.rms_norm is plain
    fused, apart = (trace("simplenorm", "llama2", cuda=cuda).kept.total for cuda in (True, False))
    # A second fp32 copy of what every norm is of: seven per block, and the final one.
    rows = 3 * LENGTH
    assert apart - fused == 4 * rows * (2 * (4 * 32 + 2 * 80 + 32) + 32)
