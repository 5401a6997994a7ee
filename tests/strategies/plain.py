"""The block equations, transcribed from the papers as plain functions of named tensors; no module of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

    router = 1.0
    """What the router's logits are multiplied by."""

    def feed(self, x: Tensor, here: str, after: Callable[[str, Tensor], Tensor], pre: float = 1.0) -> Tensor:
        """The feed-forward, or the mixture of `cases.MOE` token by token: (Σ_s F_s + √k Σ g_e F_e) / √(1 + S)."""
        if self.s.experts is None:
            return self.feed_dense(x, here, after, pre)
        k, shared, rows = self.s.experts.top_k, self.s.experts.shared, []
        for row in x:
            p = torch.softmax(self.router * (self.p[f"{here}.ffn.router.weight"] @ row), dim=0)
            chosen = p.argsort(descending=True)[:k].tolist()
            mixed = [p[e] / p[chosen].sum() * self.feed_expert("routed", e, row, here, after, pre) for e in chosen]
            always = [self.feed_expert("shared", e, row, here, after, pre) for e in range(shared)]
            rows.append((sum(always) + k**0.5 * sum(mixed)) / (1 + shared) ** 0.5)
        return torch.cat(rows)

    def feed_expert(self, kind: str, e: int, row: Tensor, here: str, after: Any, pre: float) -> Tensor:
        """Expert e by its slices, put where a dense feed-forward's tensors are."""
        stored, there = self.p, f"{here}.ffn.{kind}."
        slices = {name.replace(there, f"{here}.ffn."): p[e] for name, p in stored.items() if name.startswith(there)}
        self.p = stored | slices
        try:
            return self.feed_dense(row[None], here, after, pre)
        finally:
            self.p = stored

    def feed_dense(self, x: Tensor, here: str, after: Callable[[str, Tensor], Tensor], pre: float) -> Tensor:
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
    m.router = d**0.5
    m.scale = m.s.head_dim**0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        s_qk = m.p[f"{here}.attn.qk_scale.stored"] * d**0.5

        def after(role: str, z: Tensor, here: str = here) -> Tensor:
            return z * m.p[f"{here}.ffn.{role}.after.0.stored"] if role in ("gate", "up") else z

        def tweak(which: str, z: Tensor, s_qk: Tensor = s_qk) -> Tensor:
            group = int(which[1:])
            return s_qk[group * m.s.head_dim : (group + 1) * m.s.head_dim] * unit(z)

        for branch in ("attn", "ffn"):
            alpha = (m.p[f"{here}.own.alpha_{branch}.stored"] * (0.05 * d**0.5)).abs()
            out = m.attend(h, here, after, tweak) if branch == "attn" else m.feed(h, here, after, pre=d**0.5)
            h = unit(h + alpha * (unit(out) - h))
    return m.head(h) * m.p["head.after.0.stored"] * d**0.5


def plain_angpt(m: Plain, tokens_T: Tensor) -> Tensor:
    """angpt.md section 2; E[act(ν_uz g)²] as a Riemann sum instead of Gauss-Hermite."""
    d, d_h, d_ff, learned_positions = m.s.d, m.s.head_dim, m.s.d_ff, not m.s.rope_theta
    h = m.embed(tokens_T) * (0.5**0.5 if learned_positions else 1.0)
    m.router = d**0.5
    m.scale = d_h**0.5
    nu_uz = (d / d_ff) ** 0.5
    g = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-(g**2) / 2) / (2 * torch.pi) ** 0.5
    act = F.silu if m.s.gated else F.gelu
    moment = (act(nu_uz * g) ** 2 * density).sum() * (g[1] - g[0])
    nu_acf = float(moment**-0.5) if m.s.gated else float((d_ff * moment) ** -0.5)
    nu = {"q": (d / d_h) ** 0.5, "k": (d / d_h) ** 0.5, "v": (d / d_h) ** 0.5, "o": (d_h / d) ** 0.5}
    nu |= {"gate": nu_uz, "up": nu_uz, "down": (d_ff / d) ** 0.5 * nu_acf}

    def after(role: str, z: Tensor) -> Tensor:
        return nu[role] * z

    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        for branch in ("attn", "ffn"):
            alpha = m.p[f"{here}.own.alpha_{branch}.stored"] * (0.01 * d**0.5)
            x = m.attend(h, here, after, lambda _, z: unit(z)) if branch == "attn" else m.feed(h, here, after, d**0.5)
            h = (h + alpha * (x - h)) / (alpha**2 + (1 - alpha) ** 2).sqrt()
    return m.head(h) * m.p["head.after.0.stored"] * d**0.5


def plain_spannorm(m: Plain, tokens_T: Tensor) -> Tensor:
    """spannorm.md section 0, reading A."""
    x = m.embed(tokens_T)
    if m.s.tied:
        x = m.norm(x, m.p["own.embed_norm.gain"])
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        read = m.norm(x, m.p[f"{here}.own.n0.gain"]) if n == 0 else x
        y = m.norm(x + m.attend(read, here, nothing, nothing), m.p[f"{here}.own.n1.gain"])
        x = m.norm(x + m.feed(y, here, nothing) / (2 * m.s.n_layers) ** 0.5, m.p[f"{here}.own.n2.gain"])
    return m.head(x)


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


# --- the neighbours: where a norm stands, by the papers' equations --------------------------------------------------


def per_head(m: Plain, here: str, roles: tuple[str, ...] = ("q", "k", "v")) -> Callable[[str, Tensor], Tensor]:
    """Norms of one head's features each, before RoPE, with one gain for all heads."""

    def after(role: str, z: Tensor) -> Tensor:
        if role not in roles:
            return z
        heads = z.split(m.s.head_dim, -1)
        return torch.cat([m.norm(head, m.p[f"{here}.attn.{role}_norm.norm.gain"]) for head in heads], -1)

    return after


def plain_qkv_norm(m: Plain, tokens_T: Tensor) -> Tensor:
    return plain_prenorm(m, tokens_T, lambda here: per_head(m, here))


def plain_lns(m: Plain, tokens_T: Tensor) -> Tensor:
    x = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here, root = f"blocks.{n}", (n + 1) ** 0.5
        x = x + m.attend(m.norm(x, m.p[f"{here}.own.attn_norm.gain"]) / root, here, nothing, nothing)
        x = x + m.feed(m.norm(x, m.p[f"{here}.own.ffn_norm.gain"]) / root, here, nothing)
    return m.head(m.norm(x, m.p["own.final_norm.gain"]))


def plain_dyt(m: Plain, tokens_T: Tensor) -> Tensor:
    def dyt(z: Tensor, name: str) -> Tensor:
        e = torch.exp(-2 * m.p[f"{name}.alpha"] * z)
        return m.p[f"{name}.gain"] * (1 - e) / (1 + e)

    x = m.p["own.embed_scale.stored"] * m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        x = x + m.attend(dyt(x, f"{here}.own.attn_tanh"), here, nothing, nothing)
        x = x + m.feed(dyt(x, f"{here}.own.ffn_tanh"), here, nothing)
    return m.head(dyt(x, "own.final_tanh"))


def plain_deepnorm(m: Plain, tokens_T: Tensor) -> Tensor:
    x = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    alpha = (2 * m.s.n_layers) ** (1 / 4)
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        x = m.norm(alpha * x + m.attend(x, here, nothing, nothing), m.p[f"{here}.own.attn_norm.gain"])
        x = m.norm(alpha * x + m.feed(x, here, nothing), m.p[f"{here}.own.ffn_norm.gain"])
    return m.head(x)


def plain_b2t(m: Plain, tokens_T: Tensor) -> Tensor:
    x = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        y = m.norm(x + m.attend(x, here, nothing, nothing), m.p[f"{here}.own.attn_norm.gain"])
        x = m.norm(x + y + m.feed(y, here, nothing), m.p[f"{here}.own.ffn_norm.gain"])
    return m.head(x)


def plain_keel(m: Plain, tokens_T: Tensor) -> Tensor:
    x = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    alpha = 2 * m.s.n_layers
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        gain = {name: m.p[f"{here}.own.{name}.gain"] for name in ("attn_in", "attn_out", "ffn_in", "ffn_out")}
        x = m.norm(alpha * x + m.attend(m.norm(x, gain["attn_in"]), here, nothing, nothing), gain["attn_out"])
        x = m.norm(alpha * x + m.feed(m.norm(x, gain["ffn_in"]), here, nothing), gain["ffn_out"])
    return m.head(x)


def plain_mixln(m: Plain, tokens_T: Tensor, post_blocks: int | None = None) -> Tensor:
    """Half of the blocks are PostNorm, as in the table of cases, if `post_blocks` does not say how many."""
    post_blocks = m.s.n_layers // 2 if post_blocks is None else post_blocks
    x = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        first, second = (m.p[f"{here}.own.{name}_norm.gain"] for name in ("attn", "ffn"))
        if n < post_blocks:
            x = m.norm(x + m.attend(x, here, nothing, nothing), first)
            x = m.norm(x + m.feed(x, here, nothing), second)
        else:
            x = x + m.attend(m.norm(x, first), here, nothing, nothing)
            x = x + m.feed(m.norm(x, second), here, nothing)
    return m.head(m.norm(x, m.p["own.final_norm.gain"]))


def plain_hybridnorm(m: Plain, tokens_T: Tensor, starred: bool = False) -> Tensor:
    """`starred`: the first block reads a normed input and keeps the raw skip (HybridNorm*)."""
    x = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        first = starred and n == 0
        read = m.norm(x, m.p[f"{here}.own.attn_norm.gain"]) if first else x
        y = x + m.attend(read, here, per_head(m, here), nothing)
        z = m.norm(y, m.p[f"{here}.own.ffn_norm.gain"])
        x = (y if first else z) + m.feed(z, here, nothing)
    return m.head(m.norm(x, m.p["own.final_norm.gain"]))


def plain_sandwich(m: Plain, tokens_T: Tensor, embedding_gain: Tensor | None = None) -> Tensor:
    x = m.embed(tokens_T)
    if embedding_gain is not None:
        x = m.norm(x, embedding_gain)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        gain = {name: m.p[f"{here}.own.{name}.gain"] for name in ("attn_in", "attn_out", "ffn_in", "ffn_out")}
        x = x + m.norm(m.attend(m.norm(x, gain["attn_in"]), here, nothing, nothing), gain["attn_out"])
        x = x + m.norm(m.feed(m.norm(x, gain["ffn_in"]), here, nothing), gain["ffn_out"])
    return m.head(m.norm(x, m.p["own.final_norm.gain"]))


def plain_periln(m: Plain, tokens_T: Tensor) -> Tensor:
    return plain_sandwich(m, tokens_T, m.p["own.embed_norm.gain"])


def plain_reordered(m: Plain, tokens_T: Tensor) -> Tensor:
    x = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"

        def full_width(role: str, z: Tensor, here: str = here) -> Tensor:
            return m.norm(z, m.p[f"{here}.attn.{role}_norm.norm.gain"]) if role in ("q", "k") else z

        x = x + m.norm(m.attend(x, here, full_width, nothing), m.p[f"{here}.own.attn_norm.gain"])
        x = x + m.norm(m.feed(x, here, nothing), m.p[f"{here}.own.ffn_norm.gain"])
    return m.head(m.norm(x, m.p["own.final_norm.gain"]))


def plain_siamesenorm(m: Plain, tokens_T: Tensor) -> Tensor:
    """The published code for language models (HybridNorm as the X stream)."""
    x = y = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here, c = f"blocks.{n}", (2 * n + 2) ** 0.5
        gain = {name: m.p[f"{here}.own.{name}.gain"] for name in ("attn_y", "attn_x", "ffn_y", "ffn_in")}
        read = m.p[f"{here}.own.x_scale.stored"] * x + m.norm(y, gain["attn_y"])
        o = m.attend(read, here, per_head(m, here), nothing)
        x, y = m.norm(x + o / c, gain["attn_x"]), y + o
        o = m.feed(m.norm(x + m.norm(y, gain["ffn_y"]), gain["ffn_in"]), here, nothing)
        x, y = x + o / c, y + o
    x, y = m.norm(x, m.p["own.x_norm.gain"]), m.norm(y, m.p["own.y_norm.gain"])
    return m.head(m.norm(x + y, m.p["own.final_norm.gain"]))


def plain_siamesenorm_equation(m: Plain, tokens_T: Tensor) -> Tensor:
    """The paper's equation as it is reported, with PostNorm as the X stream."""
    x = y = m.embed(tokens_T)
    m.scale = m.s.head_dim**-0.5
    for n in range(m.s.n_layers):
        here = f"blocks.{n}"
        for branch in ("attn", "ffn"):
            gain = {name: m.p[f"{here}.own.{branch}_{name}.gain"] for name in ("y", "x", "in")}
            read = m.norm(x + m.norm(y, gain["y"]), gain["in"])
            o = m.attend(read, here, nothing, nothing) if branch == "attn" else m.feed(read, here, nothing)
            x, y = m.norm(x + o / (n + 1) ** 0.5, gain["x"]), y + o
    return m.head(x + m.norm(y, m.p["own.y_norm.gain"]))


PLAIN = {
    "prenorm": plain_prenorm,
    "prenorm_qknorm": plain_prenorm_qknorm,
    "postnorm": plain_postnorm,
    "simplenorm": plain_simplenorm,
    "angpt": plain_angpt,
    "ngpt": plain_ngpt,
    "spannorm": plain_spannorm,
    "residual_dual": plain_residual_dual,
    "qkv_norm": plain_qkv_norm,
    "lns": plain_lns,
    "dyt": plain_dyt,
    "deepnorm": plain_deepnorm,
    "b2t": plain_b2t,
    "keel": plain_keel,
    "mixln": plain_mixln,
    "hybridnorm": plain_hybridnorm,
    "sandwich": plain_sandwich,
    "periln": plain_periln,
    "reordered": plain_reordered,
    "siamesenorm": plain_siamesenorm,
}
