"""The block equations, transcribed from the papers as plain functions of named tensors; no module of ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptnorm.model import GPT


def rms(z: Tensor, gain: Tensor | None = None) -> Tensor:
    y = z / (z.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return y if gain is None else y * gain


def layer(z: Tensor, gain: Tensor) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    return gain * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class Plain:
    """One sequence through one model, written without any module of ours."""

    def __init__(self, model: GPT) -> None:
        self.p = {name: p.detach() for name, p in model.named_parameters()}
        self.s = model.shape
        self.norm = layer if self.s.norm == "layernorm" else rms

    def attend(
        self, x: Tensor, here: str, after: Callable[[str, Tensor], Tensor], tweak: Callable[[str, Tensor], Tensor]
    ) -> Tensor:
        """Attention, position by position; `after` follows a matrix, `tweak` a head's q or k (with RoPE done)."""
        s, heads = self.s, []
        raw = {role: after(role, x @ self.p[f"{here}.attn.{role}.weight"].T) for role in "qkv"}
        for h in range(s.n_heads):
            g = h // (s.n_heads // s.n_kv_heads)
            q = raw["q"][:, h * s.head_dim : (h + 1) * s.head_dim]
            k, v = (raw[role][:, g * s.head_dim : (g + 1) * s.head_dim] for role in "kv")
            q, k = tweak(f"q{g}", self.turn(q)), tweak(f"k{g}", self.turn(k))
            rows = []
            for t in range(len(x)):
                weights = torch.softmax(self.scale * (k[: t + 1] @ q[t]), dim=0)
                rows.append(weights @ v[: t + 1])
            heads.append(torch.stack(rows))
        return after("o", torch.cat(heads, -1) @ self.p[f"{here}.attn.o.weight"].T)

    scale: float

    def turn(self, x: Tensor) -> Tensor:
        """RoPE as multiplication by e^{i t θ^(-2j/d_h)}."""
        if self.s.rope_theta is None:
            return x
        j = torch.arange(self.s.head_dim // 2, dtype=torch.float64)
        angle = torch.outer(torch.arange(len(x), dtype=torch.float64), self.s.rope_theta ** (-2 * j / self.s.head_dim))
        pairs = torch.view_as_complex(x.reshape(len(x), -1, 2)) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(pairs).reshape(len(x), -1)

    def feed(self, x: Tensor, here: str, after: Callable[[str, Tensor], Tensor], pre: float = 1.0) -> Tensor:
        up = after("up", x @ self.p[f"{here}.ffn.up.weight"].T)
        if self.s.gated:
            a = F.silu(pre * after("gate", x @ self.p[f"{here}.ffn.gate.weight"].T)) * up
        else:
            a = F.gelu(pre * up)
        return after("down", a @ self.p[f"{here}.ffn.down.weight"].T)

    def embed(self, tokens_T: Tensor) -> Tensor:
        h = self.p["embed.weight"][tokens_T]
        return h if self.s.rope_theta else h + self.p["position.weight"][: len(tokens_T)]

    def head(self, h: Tensor) -> Tensor:
        return h @ self.p["embed.weight" if self.s.tied else "head.weight"].T


def nothing(_: str, z: Tensor) -> Tensor:
    return z


def plain_prenorm(m: Plain, tokens_T: Tensor, after: Callable[[str], Callable[[str, Tensor], Tensor]] | None = None):
    x = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        post = after(here) if after else nothing
        x = x + m.attend(m.norm(x, m.p[f"{here}.own.attn_norm.gain"]), here, post, nothing)
        x = x + m.feed(m.norm(x, m.p[f"{here}.own.ffn_norm.gain"]), here, nothing)
    return m.head(m.norm(x, m.p["own.final_norm.gain"]))


def plain_prenorm_qknorm(m: Plain, tokens_T: Tensor) -> Tensor:
    def after(here: str) -> Callable[[str, Tensor], Tensor]:
        def full_width(role: str, z: Tensor) -> Tensor:
            return m.norm(z, m.p[f"{here}.attn.{role}_norm.norm.gain"]) if role in "qk" else z

        return full_width

    return plain_prenorm(m, tokens_T, after)


def plain_postnorm(m: Plain, tokens_T: Tensor) -> Tensor:
    x = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        x = m.norm(x + m.attend(x, here, nothing, nothing), m.p[f"{here}.own.attn_norm.gain"])
        x = m.norm(x + m.feed(x, here, nothing), m.p[f"{here}.own.ffn_norm.gain"])
    return m.head(x)


def plain_simplenorm(m: Plain, tokens_T: Tensor) -> Tensor:
    x = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"

        def psi(role: str, z: Tensor, here: str = here) -> Tensor:
            branch = "attn" if role in "qkvo" else "ffn"
            return rms(z, m.p[f"{here}.{branch}.{role}.after.0.gain"])

        x = x + m.attend(x, here, psi, nothing)
        x = x + m.feed(x, here, psi)
    return m.head(rms(x, m.p["own.final_norm.gain"]))


def plain_ngpt(m: Plain, tokens_T: Tensor) -> Tensor:
    d = m.s.d
    h = unit(m.embed(tokens_T))
    m.scale = m.s.head_dim**0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        s_qk = m.p[f"{here}.attn.qk_scale.stored"] * d**0.5

        def after(role: str, z: Tensor, here: str = here) -> Tensor:
            if role in ("o", "down"):
                return unit(z)
            return z if role in "qkv" else z * m.p[f"{here}.ffn.{role}.after.0.stored"]

        def tweak(which: str, z: Tensor, s_qk: Tensor = s_qk) -> Tensor:
            group = int(which[1:])
            return s_qk[group * m.s.head_dim : (group + 1) * m.s.head_dim] * unit(z)

        for branch in ("attn", "ffn"):
            alpha = (m.p[f"{here}.own.alpha_{branch}.stored"] * (0.05 * d**0.5)).abs()
            out = m.attend(h, here, after, tweak) if branch == "attn" else m.feed(h, here, after, pre=d**0.5)
            h = unit(h + alpha * (out - h))
    return m.head(h) * m.p["head.after.0.stored"] * d**0.5


def plain_residual_dual(m: Plain, tokens_T: Tensor) -> Tensor:
    x = r = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        f = m.attend(x, here, nothing, nothing)
        x, r = m.norm(x + f, m.p[f"{here}.own.attn_norm.gain"]), r + f
        f = m.feed(x, here, nothing)
        x, r = m.norm(x + f, m.p[f"{here}.own.ffn_norm.gain"]), r + f
    return m.head(x + m.norm(r, m.p["own.dual_norm.gain"]))


PLAIN = {
    "prenorm": plain_prenorm,
    "prenorm_qknorm": plain_prenorm_qknorm,
    "postnorm": plain_postnorm,
    "simplenorm": plain_simplenorm,
    "ngpt": plain_ngpt,
    "residual_dual": plain_residual_dual,
}
