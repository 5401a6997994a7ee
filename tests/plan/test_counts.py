"""Parameters and FLOPs against closed forms and torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import MOE, ROW_OF, ROWS, VOCAB, tiny_gpt
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptnorm.config import BackboneName
from gptnorm.errors import UserError
from gptnorm.model import GPT
from gptnorm.model.moe import reference_experts
from gptnorm.plan.flops import count_flops
from gptnorm.plan.params import count_parameters, idle_parameters, model_on_meta, vocabulary
from gptnorm.recipe import load_recipe
from gptnorm.train.blocks import prepare_blocks

CASES = [
    *((row.strategy, "gpt2", False) for row in ROWS),
    *((row.strategy, "llama3", True) for row in ROWS),
]


def on_meta(strategy: str, backbone: BackboneName, moe: bool = False, **changes: Any) -> GPT:
    with torch.device("meta"):
        return tiny_gpt(strategy, backbone, moe=moe, **changes)


@pytest.mark.parametrize(("strategy", "backbone", "moe"), CASES)
def test_parts_of_the_count(strategy: str, backbone: BackboneName, moe: bool) -> None:
    model = on_meta(strategy, backbone, moe)
    count = count_parameters(model)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert sum(count.by_role.values()) + count.gains == count.total
    assert count.gains == ROW_OF[strategy].extra(model.shape)
    assert ("head" in count.by_role) == (not model.shape.tied)


def test_of_the_routed_experts_top_k_are_active() -> None:
    config = load_recipe("papers/olmoe/1B-7B-prenorm_qknorm").resolve()
    count = count_parameters(model_on_meta(config, 0))
    assert count.total == 6_919_161_856
    # 16 blocks; 8 of 64 experts of 3 matrices 2048 x 1024
    assert count.total - count.active == 16 * (64 - 8) * 3 * 2048 * 1024
    assert tiny_active("simplenorm") == tiny_active("prenorm") + 2 * (MOE.top_k + MOE.shared) * (24 + 24 + 32) + 2 * (
        32 + 16 + 16 + 32 - 2 * 32
    )


def tiny_active(strategy: str) -> int:
    return count_parameters(on_meta(strategy, "llama3", moe=True)).active


SHAPES: list[tuple[str, BackboneName, dict[str, Any]]] = [
    ("prenorm", "gpt2", {}),
    ("simplenorm", "gpt2", {"n_layers": 3, "d_ff": 96}),
    ("simplenorm", "llama2", {"d_model": 64}),
    ("siamesenorm", "llama2", {}),
    ("prenorm_qknorm", "llama3", {"n_heads": 8, "n_kv_heads": 2}),
    ("prenorm", "llama2", {"tied": True}),
]


@pytest.mark.parametrize(("strategy", "backbone", "changes"), SHAPES)
def test_flops_are_those_of_torchs_counter(strategy: str, backbone: BackboneName, changes: dict[str, Any]) -> None:
    model, batch, length = on_meta(strategy, backbone, **changes), 3, 7
    flops = count_flops(model, length)
    tokens = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as forward:
        logits = model(tokens)
    assert forward.get_total_flops() == batch * length * flops.forward
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize("strategy", ["prenorm", "ngpt"])
def test_flops_of_experts(strategy: str) -> None:
    model = tiny_gpt(strategy, "llama2", moe=True).double()
    flops = count_flops(model, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), reference_experts(model):
        model(torch.zeros(2, 16, dtype=torch.int64))
    # The reference path passes every token through every expert.
    idle = 2 * idle_parameters(model, matrices_only=True)
    assert counter.get_total_flops() == 2 * 16 * (flops.forward + idle)
    assert idle == 2 * 2 * (MOE.experts - MOE.top_k) * 3 * 32 * 24


def test_full_recomputation_adds_the_blocks_forward_pass() -> None:
    model = on_meta("simplenorm", "llama2")
    flops = count_flops(model, 16)
    prepare_blocks(model, "full", compiled=False)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 16, dtype=torch.int64, device="meta")).sum().backward()
    assert counter.get_total_flops() == 2 * 16 * flops.hardware("full")
    assert flops.hardware("full") == flops.model + 2 * flops.products_in_blocks + flops.attention_forward
    assert flops.hardware("selective") == flops.hardware("none") == flops.model


def test_flops_of_llama2_7b_by_hand() -> None:
    config = load_recipe("papers/simplegpt/7B-prenorm").resolve()
    flops = count_flops(model_on_meta(config, 0), config.train.seq_len)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32_000 * 4096
    assert flops.model == 6 * weights + 12 * 32 * 4096 * 2048


def test_vocabulary_needs_no_text() -> None:
    laptop = load_recipe("laptop/simplenorm")
    assert vocabulary(laptop.resolve()) == 257
    assert vocabulary(laptop.resolve(["data.tokenizer=bpe", "data.bpe_vocab=1000"])) == 1000
    assert vocabulary(laptop.resolve([f"model.vocab_size={VOCAB}"])) == VOCAB
    with pytest.raises(UserError, match=r"^model\.vocab_size: must be set"):
        vocabulary(laptop.resolve(["data.tokenizer=tokenizer.json"]))
