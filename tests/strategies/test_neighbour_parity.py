"""Logits and gradients in fp32 against the models of `transformers` that are normed like one of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import CONTEXT, shake, tiny_gpt, tokens
from model.test_parity import close, halves, llama_settings
from torch import Tensor

from gptnorm.model import GPT
from gptnorm.shape import Shape

transformers = pytest.importorskip("transformers")

Named = dict[str, Tensor]


def renamed(ours: Named, s: Shape, norms: dict[str, str]) -> Named:
    """Under the Llama family's names; `norms` says what each norm of a block is called there."""
    theirs = {
        "model.embed_tokens.weight": ours["embed.weight"],
        "model.norm.weight": ours["own.final_norm.gain"],
        "lm_head.weight": ours["head.weight"],
    }
    for layer in range(s.n_layers):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        for role in "qkvo":
            weight = ours[f"{here}.attn.{role}.weight"]
            theirs[f"{there}.self_attn.{role}_proj.weight"] = halves(weight, s.head_dim) if role in "qk" else weight
        for role in ("gate", "up", "down"):
            theirs[f"{there}.mlp.{role}_proj.weight"] = ours[f"{here}.ffn.{role}.weight"]
        for mine, name in norms.items():
            theirs[f"{there}.{name}.weight"] = ours[f"{here}.own.{mine}.gain"]
    return theirs


def with_qk_norm(ours: Named, s: Shape) -> Named:
    """OLMo 2 and EXAONE 4: a norm on each branch's output, and on queries and keys."""
    norms = {"attn_norm": "post_attention_layernorm", "ffn_norm": "post_feedforward_layernorm"}
    theirs = renamed(ours, s, norms)
    for layer in range(s.n_layers):
        for role in "qk":
            gain = ours[f"blocks.{layer}.attn.{role}_norm.norm.gain"]
            theirs[f"model.layers.{layer}.self_attn.{role}_norm.weight"] = halves(gain, s.head_dim)
    return theirs


GEMMA2 = {
    "attn_in": "input_layernorm",
    "attn_out": "post_attention_layernorm",
    "ffn_in": "pre_feedforward_layernorm",
    "ffn_out": "post_feedforward_layernorm",
}


def gemma2_weights(ours: Named, s: Shape) -> Named:
    """Gains are kept as what they have beyond 1; the embedding is multiplied by √d on its way in."""
    theirs = {name: t - 1 if "norm" in name else t for name, t in renamed(ours, s, GEMMA2).items()}
    theirs["model.embed_tokens.weight"] = theirs["model.embed_tokens.weight"] / s.d**0.5
    return theirs


def gemma2_gradients(ours: Named, s: Shape) -> Named:
    theirs = renamed(ours, s, GEMMA2)
    theirs["model.embed_tokens.weight"] = theirs["model.embed_tokens.weight"] * s.d**0.5
    return theirs


def glm4(ours: Named, s: Shape) -> Named:
    """Rotary pairs interleaved as ours are; gate and up in one matrix."""
    norms = {
        "attn_in": "input_layernorm",
        "attn_out": "post_self_attn_layernorm",
        "ffn_in": "post_attention_layernorm",
        "ffn_out": "post_mlp_layernorm",
    }
    theirs = renamed(ours, s, norms)
    for layer in range(s.n_layers):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        for role in "qk":
            theirs[f"{there}.self_attn.{role}_proj.weight"] = ours[f"{here}.attn.{role}.weight"]
        gate, up = (theirs.pop(f"{there}.mlp.{role}_proj.weight") for role in ("gate", "up"))
        theirs[f"{there}.mlp.gate_up_proj.weight"] = torch.cat((gate, up))
    return theirs


def their_olmo2(s: Shape) -> torch.nn.Module:
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**llama_settings(s)))


def their_exaone4(s: Shape) -> torch.nn.Module:
    # Its layers without a window have no RoPE; a window longer than the text is none.
    config = transformers.Exaone4Config(
        **llama_settings(s),
        head_dim=s.head_dim,
        sliding_window=10 * CONTEXT,
        layer_types=["sliding_attention"] * s.n_layers,
    )
    return transformers.Exaone4ForCausalLM(config)


def their_gemma2(s: Shape) -> torch.nn.Module:
    config = transformers.Gemma2Config(
        **llama_settings(s),
        head_dim=s.head_dim,
        query_pre_attn_scalar=s.head_dim,
        hidden_activation="silu",
        attn_logit_softcapping=0.7,
        final_logit_softcapping=1.5,
    )
    return transformers.Gemma2ForCausalLM(config)


def their_glm4(s: Shape) -> torch.nn.Module:
    settings = llama_settings(s)
    settings["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": s.rope_theta,
        "partial_rotary_factor": 1.0,
    }
    return transformers.Glm4ForCausalLM(transformers.Glm4Config(**settings, head_dim=s.head_dim, attention_bias=False))


class Case(NamedTuple):
    ours: Callable[[], GPT]
    theirs: Callable[[Shape], torch.nn.Module]
    weights: Callable[[Named, Shape], Named]
    gradients: Callable[[Named, Shape], Named]


CAPS = {"attention_softcap": 0.7, "logit_softcap": 1.5}
CASES = {
    "OLMo 2": Case(lambda: tiny_gpt("reordered", "llama2"), their_olmo2, with_qk_norm, with_qk_norm),
    "OLMo 2, grouped queries": Case(lambda: tiny_gpt("reordered", "llama3"), their_olmo2, with_qk_norm, with_qk_norm),
    "EXAONE 4: QK-norm per head": Case(
        lambda: tiny_gpt("reordered", "llama3", options={"qk_norm": "head"}), their_exaone4, with_qk_norm, with_qk_norm
    ),
    "Gemma 2": Case(
        lambda: tiny_gpt("sandwich", "llama3", options=CAPS), their_gemma2, gemma2_weights, gemma2_gradients
    ),
    "GLM-4": Case(lambda: tiny_gpt("sandwich", "llama2"), their_glm4, glm4, glm4),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name: str) -> None:
    case = CASES[name]
    ours = shake(case.ours())
    theirs = case.theirs(ours.shape).eval()
    weights = case.weights(dict(ours.named_parameters()), ours.shape)
    missing, unexpected = theirs.load_state_dict({k: v.detach() for k, v in weights.items()}, strict=False)
    assert not unexpected
    assert not missing

    batch = tokens()
    logits = theirs(batch).logits
    close(ours(batch), logits, "logits")

    ours.loss(batch).backward()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(ours.parameters()))
    compared = case.gradients(gradients, ours.shape)
    assert set(compared) == set(their_gradients)
    for parameter, gradient in compared.items():
        close(gradient, their_gradients[parameter], f"gradient of {parameter}")
