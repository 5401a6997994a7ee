"""Logits and gradients in fp32 against `transformers`, weights mapped across."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import CONTEXT, VOCAB, shake, tiny_gpt, tokens
from torch import Tensor

from gptnorm.model import GPT
from gptnorm.shape import Shape

transformers = pytest.importorskip("transformers")

Mapping = Callable[[dict[str, Tensor], Shape], dict[str, Tensor]]
"""Our named tensors (weights or their gradients alike) under the other library's names."""


def gpt2_names(ours: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    """Conv1D keeps (in, out); q, k and v are one matrix."""
    theirs = {
        "transformer.wte.weight": ours["embed.weight"],
        "transformer.wpe.weight": ours["position.weight"],
        "transformer.ln_f.weight": ours["own.final_norm.gain"],
    }
    for layer in range(s.n_layers):
        here, there = f"blocks.{layer}", f"transformer.h.{layer}"
        qkv = torch.cat([ours[f"{here}.attn.{role}.weight"] for role in "qkv"])
        theirs |= {
            f"{there}.attn.c_attn.weight": qkv.T,
            f"{there}.attn.c_proj.weight": ours[f"{here}.attn.o.weight"].T,
            f"{there}.mlp.c_fc.weight": ours[f"{here}.ffn.up.weight"].T,
            f"{there}.mlp.c_proj.weight": ours[f"{here}.ffn.down.weight"].T,
            f"{there}.ln_1.weight": ours[f"{here}.own.attn_norm.gain"],
            f"{there}.ln_2.weight": ours[f"{here}.own.ffn_norm.gain"],
        }
    return theirs


def halves(rows: Tensor, head_dim: int) -> Tensor:
    """From interleaved pairs to first halves and second halves, head by head, along the rows."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def llama_names(ours: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    theirs = {
        "model.embed_tokens.weight": ours["embed.weight"],
        "model.norm.weight": ours["own.final_norm.gain"],
        "lm_head.weight": ours["head.weight"],
    }
    for layer in range(s.n_layers):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        theirs |= {
            f"{there}.self_attn.q_proj.weight": halves(ours[f"{here}.attn.q.weight"], s.head_dim),
            f"{there}.self_attn.k_proj.weight": halves(ours[f"{here}.attn.k.weight"], s.head_dim),
            f"{there}.self_attn.v_proj.weight": ours[f"{here}.attn.v.weight"],
            f"{there}.self_attn.o_proj.weight": ours[f"{here}.attn.o.weight"],
            f"{there}.input_layernorm.weight": ours[f"{here}.own.attn_norm.gain"],
            f"{there}.post_attention_layernorm.weight": ours[f"{here}.own.ffn_norm.gain"],
        }
        for role in ("gate", "up", "down"):
            theirs[f"{there}.mlp.{role}_proj.weight"] = ours[f"{here}.ffn.{role}.weight"]
    return theirs


def with_qk_norm(ours: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    theirs = llama_names(ours, s)
    for layer in range(s.n_layers):
        for role in "qk":
            gain = ours[f"blocks.{layer}.attn.{role}_norm.norm.gain"]
            theirs[f"model.layers.{layer}.self_attn.{role}_norm.weight"] = halves(gain, s.head_dim)
    return theirs


def with_one_expert(ours: dict[str, Tensor], s: Shape) -> dict[str, Tensor]:
    """OLMoE's experts keep gate and up in one (experts, 2 d_ff, d) tensor."""
    theirs = with_qk_norm(ours, s)
    for layer in range(s.n_layers):
        there = f"model.layers.{layer}.mlp"
        gate, up, down = (theirs.pop(f"{there}.{role}_proj.weight") for role in ("gate", "up", "down"))
        theirs[f"{there}.experts.gate_up_proj"] = torch.cat((gate, up))[None]
        theirs[f"{there}.experts.down_proj"] = down[None]
    return theirs


def llama_settings(s: Shape) -> dict[str, object]:
    return {
        "vocab_size": s.vocab,
        "hidden_size": s.d,
        "intermediate_size": s.d_ff,
        "num_hidden_layers": s.n_layers,
        "num_attention_heads": s.n_heads,
        "num_key_value_heads": s.n_kv_heads,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": s.rope_theta},
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        # A padding token would get no gradient.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def their_gpt2(s: Shape) -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=s.d,
        n_layer=s.n_layers,
        n_head=s.n_heads,
        n_inner=s.d_ff,
        activation_function="gelu",
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        layer_norm_epsilon=1e-5,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


def their_olmoe(s: Shape) -> torch.nn.Module:
    config = transformers.OlmoeConfig(
        **llama_settings(s), num_experts=1, num_experts_per_tok=1, norm_topk_prob=False, clip_qkv=None
    )
    return transformers.OlmoeForCausalLM(config)


def their_llama(s: Shape) -> torch.nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_settings(s)))


def their_qwen3(s: Shape) -> torch.nn.Module:
    config = transformers.Qwen3Config(**llama_settings(s), head_dim=s.head_dim)
    return transformers.Qwen3ForCausalLM(config)


CASES = {
    "gpt2": (lambda: tiny_gpt("prenorm", "gpt2"), their_gpt2, gpt2_names),
    "llama2": (lambda: tiny_gpt("prenorm", "llama2"), their_llama, llama_names),
    "llama3, grouped queries": (lambda: tiny_gpt("prenorm", "llama3"), their_llama, llama_names),
    "QK-norm per head, grouped queries": (
        lambda: tiny_gpt("prenorm_qknorm", "llama3", options={"qk_norm": "head"}),
        their_qwen3,
        with_qk_norm,
    ),
    "QK-norm over the full width": (lambda: tiny_gpt("prenorm_qknorm", "llama2"), their_olmoe, with_one_expert),
    "QK-norm over the full width, grouped queries": (
        lambda: tiny_gpt("prenorm_qknorm", "llama3"),
        their_olmoe,
        with_one_expert,
    ),
}


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Relative to the tensor's own norm, within 1e-5."""
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error < 1e-5, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str) -> None:
    build_ours, build_theirs, names = CASES[case]
    ours: GPT = shake(build_ours())
    theirs = build_theirs(ours.shape).eval()
    mapped = names(dict(ours.named_parameters()), ours.shape)
    missing, unexpected = theirs.load_state_dict({k: v.detach() for k, v in mapped.items()}, strict=False)
    assert not unexpected
    assert all(n.endswith(("bias", "lm_head.weight", "mlp.gate.weight", "inv_freq")) for n in missing), missing

    batch = tokens()
    logits = theirs(batch).logits
    close(ours(batch), logits, "logits")

    ours.loss(batch).backward()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    compared = names(gradients, ours.shape)
    assert len(gradients) == len(list(ours.parameters()))
    for name, gradient in compared.items():
        close(gradient, their_gradients[name], f"gradient of {name}")
