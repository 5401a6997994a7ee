"""Mixtures of experts in fp32 against `transformers`: logits, losses of the router, and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import VOCAB, shake, tiny_gpt, tokens
from model.test_parity import close, llama_names, llama_settings, with_qk_norm
from torch import Tensor

from gptnorm.config import MoEConfig
from gptnorm.model import GPT
from gptnorm.shape import Shape

transformers = pytest.importorskip("transformers")

RENORMALIZED = MoEConfig(experts=6, top_k=2)
RAW = MoEConfig(experts=6, top_k=3, renormalize=False)
QK = {"qk_norm": "head"}


def with_experts(names: Callable[[dict[str, Tensor], Shape], dict[str, Tensor]]):
    """Gate and up lie in one (experts, 2 d_ff, d) tensor there."""

    def mapped(ours: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
        dense = dict(ours)
        for layer in range(s.n_layers):
            for role in ("gate", "up", "down"):
                dense[f"blocks.{layer}.ffn.{role}.weight"] = ours[f"blocks.{layer}.ffn.routed.{role}.weight"]
        theirs = names(dense, s)
        for layer in range(s.n_layers):
            there = f"model.layers.{layer}.mlp"
            gate, up, down = (theirs.pop(f"{there}.{role}_proj.weight") for role in ("gate", "up", "down"))
            theirs[f"{there}.experts.gate_up_proj"] = torch.cat((gate, up), 1)
            theirs[f"{there}.experts.down_proj"] = down
            theirs[f"{there}.gate.weight"] = ours[f"blocks.{layer}.ffn.router.weight"]
        return theirs

    return mapped


def mixtral(s: Shape, moe: MoEConfig) -> torch.nn.Module:
    config = transformers.MixtralConfig(
        **llama_settings(s), num_local_experts=moe.experts, num_experts_per_tok=moe.top_k, sliding_window=None
    )
    return transformers.MixtralForCausalLM(config)


def olmoe(s: Shape, moe: MoEConfig) -> torch.nn.Module:
    config = transformers.OlmoeConfig(
        **llama_settings(s), num_experts=moe.experts, num_experts_per_tok=moe.top_k, norm_topk_prob=moe.renormalize
    )
    return transformers.OlmoeForCausalLM(config)


def qwen3(s: Shape, moe: MoEConfig) -> torch.nn.Module:
    config = transformers.Qwen3MoeConfig(
        **llama_settings(s),
        moe_intermediate_size=s.d_ff,
        head_dim=s.head_dim,
        num_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=moe.renormalize,
    )
    return transformers.Qwen3MoeForCausalLM(config)


CASES = {
    "Mixtral": (lambda: tiny_gpt("prenorm", "llama3", moe=RENORMALIZED), mixtral, llama_names),
    "OLMoE": (lambda: tiny_gpt("prenorm_qknorm", "llama2", moe=RAW), olmoe, with_qk_norm),
    "Qwen3-MoE": (
        lambda: tiny_gpt("prenorm_qknorm", "llama3", moe=RENORMALIZED, options=QK),
        qwen3,
        with_qk_norm,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_losses_and_gradients(case: str) -> None:
    build_ours, build_theirs, names = CASES[case]
    ours: GPT = shake(build_ours())
    theirs = build_theirs(ours.shape, ours.moe).eval()
    names = with_experts(names)
    mapped = names(dict(ours.named_parameters()), ours.shape)
    missing, unexpected = theirs.load_state_dict({k: v.detach() for k, v in mapped.items()}, strict=False)
    assert not unexpected
    assert all(name.endswith("inv_freq") for name in missing), missing

    batch = tokens()
    answer = theirs(batch[:, :-1], output_router_logits=True)
    close(ours(batch[:, :-1]), answer.logits, "logits")
    objective = ours.objective(batch)
    assert objective.routing is not None

    # Theirs counts a token's k choices and pools all layers; ours is the mean of the layers, a k-th of that each.
    module = __import__(type(theirs).__module__, fromlist=["load_balancing_loss_func"])
    balance = [
        module.load_balancing_loss_func((logits,), ours.moe.experts, ours.moe.top_k) / ours.moe.top_k
        for logits in answer.router_logits
    ]
    z = [logits.logsumexp(-1).square().mean() for logits in answer.router_logits]
    for layer in range(ours.shape.n_layers):
        close(objective.routing.balance[layer], balance[layer], f"balancing loss {layer}")
        close(objective.routing.z[layer], z[layer], f"z-loss {layer}")
    loss = F.cross_entropy(answer.logits.reshape(-1, VOCAB), batch[:, 1:].flatten())
    total = loss + 0.01 * sum(balance) / len(balance) + 0.001 * sum(z) / len(z)
    close(objective.loss, loss, "loss")
    close(objective.total, total, "total")

    objective.total.backward()
    total.backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(ours.parameters()))
    compared = names(gradients, ours.shape)
    assert len(compared) == len(their_gradients)
    for name, gradient in compared.items():
        close(gradient, their_gradients[name], f"gradient of {name}")
