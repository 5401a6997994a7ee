"""What must hold for every strategy on every backbone: the conformance suite."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, ROWS, shake, tiny_gpt, tokens
from torch import Tensor

import gptnorm
from gptnorm.config import BackboneName
from gptnorm.model import GPT
from gptnorm.strategies import STRATEGIES

every_case = pytest.mark.parametrize(("strategy", "backbone"), CASES)


# --- the block equations, transcribed from the papers as plain functions of named tensors ---------------------------


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


@every_case
def test_block_equation(strategy: str, backbone: BackboneName) -> None:
    model = shake(tiny_gpt(strategy, backbone)).double()
    batch = tokens(batch=1)
    with torch.no_grad():
        ours = model(batch)[0]
    theirs = PLAIN[strategy](Plain(model), batch[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# --- initialisation, gradients, hooks -------------------------------------------------------------------------------


@every_case
def test_meta_init_equals_direct_init(strategy: str, backbone: BackboneName) -> None:
    direct = tiny_gpt(strategy, backbone, seed=3)
    with torch.device("meta"):
        deferred = tiny_gpt(strategy, backbone, seed=99)
    deferred.to_empty(device="cpu")
    for tensor in (*deferred.parameters(), *deferred.buffers()):
        tensor.data.fill_(float("nan"))
    deferred.init_weights(3)
    state = deferred.state_dict()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(direct(tokens()), deferred(tokens()))


@every_case
def test_every_parameter_gets_a_finite_gradient(strategy: str, backbone: BackboneName) -> None:
    model = tiny_gpt(strategy, backbone)
    loss = model.loss(tokens())
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@every_case
def test_bf16_is_close_to_fp32(strategy: str, backbone: BackboneName) -> None:
    model = tiny_gpt(strategy, backbone)
    exact = model.loss(tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.loss(tokens())
    assert abs(rough - exact) < 0.02 * exact


@every_case
def test_future_tokens_do_not_matter(strategy: str, backbone: BackboneName) -> None:
    model = tiny_gpt(strategy, backbone)
    batch = tokens()
    changed = batch.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % model.shape.vocab
    assert torch.allclose(model(batch)[:, :9], model(changed)[:, :9], atol=1e-6)


@every_case
def test_compiled_equals_eager(strategy: str, backbone: BackboneName) -> None:
    model = tiny_gpt(strategy, backbone)
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), model.loss(tokens()), rtol=1e-5, atol=1e-6)


@every_case
def test_twice_differentiable(strategy: str, backbone: BackboneName) -> None:
    """A Hessian-vector product by two backward passes against finite differences of the gradient."""
    model = shake(tiny_gpt(strategy, backbone)).double()
    batch, parameters = tokens(), list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def gradient(create_graph: bool = False) -> tuple[Tensor, ...]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.autograd.grad(model.loss(batch), parameters, create_graph=create_graph)

    slope = sum((g * w).sum() for g, w in zip(gradient(create_graph=True), v, strict=True))
    assert isinstance(slope, Tensor)
    product = torch.autograd.grad(slope, parameters)

    def gradient_at(step: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for p, w in zip(parameters, v, strict=True):
                p.add_(w, alpha=step)
        found = gradient()
        with torch.no_grad():
            for p, w in zip(parameters, v, strict=True):
                p.sub_(w, alpha=step)
        return found

    h = 1e-5
    differences = [(a - b) / (2 * h) for a, b in zip(gradient_at(h), gradient_at(-h), strict=True)]
    error = sum((a - b).pow(2).sum() for a, b in zip(product, differences, strict=True)) ** 0.5
    size = sum(a.pow(2).sum() for a in product) ** 0.5
    assert error / size < 1e-4


@every_case
def test_constraints_hold_after_every_step(strategy: str, backbone: BackboneName) -> None:
    model = tiny_gpt(strategy, backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrained = 0
    for step in range(10):
        optimizer.zero_grad()
        model.loss(tokens(seed=step)).backward()
        optimizer.step()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.after_step()
        for name, owner in model.weights():
            constraint = model.strategy.constraint(owner.role, owner.layer, model.shape)
            if constraint is None:
                assert torch.equal(owner.weight, before[f"{name}.weight"]), name
                continue
            constrained += 1
            norms = owner.weight.norm(dim=constraint.axis)
            if constraint.kind == "unit":
                assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6), name
            else:
                assert (norms <= 1 + 1e-6).all(), name
    row = next(row for row in ROWS if row.strategy == strategy)
    assert (constrained > 0) == row.constrained


def test_unit_axes_follow_the_stream() -> None:
    """nGPT: reading maps have unit rows, writing maps unit columns (angpt.md section 6)."""
    model = tiny_gpt("ngpt", "llama2")
    for name, owner in model.weights():
        norms = owner.weight.norm(dim=0 if owner.role in ("o", "down") else 1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6), name


# --- nobody else knows a strategy -----------------------------------------------------------------------------------


def test_no_strategy_name_outside_strategies() -> None:
    package = Path(gptnorm.__file__).parent
    words = re.compile(rf"\b({'|'.join(STRATEGIES)})\b", re.IGNORECASE)
    leaks = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in sorted(package.rglob("*"))
        if path.suffix in (".py", ".css", ".toml")
        and not {"strategies", "recipes"} & set(path.relative_to(package).parts)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert not leaks, "\n".join(leaks)


def test_shared_recipes_leave_a_strategys_own_settings_alone() -> None:
    """A shared base that set, say, the warm-up would overrule the strategies that want none."""
    from gptnorm.recipe import load_recipe
    from gptnorm.tables import flatten

    own = {key for strategy in STRATEGIES.values() for key in strategy.recipe_defaults}
    for name in ("laptop/base", "quickstart"):
        for layer in load_recipe(name).layers:
            assert not own & set(flatten(layer.tree)), name


def test_every_strategy_has_a_card_a_laptop_recipe_and_a_page() -> None:
    from gptnorm.recipe import shipped_recipes

    docs = Path(__file__).parents[2] / "docs" / "strategies"
    for name, strategy in STRATEGIES.items():
        assert strategy.card.equation
        assert f"laptop/{name}" in shipped_recipes()
        assert (docs / f"{name}.md").is_file(), f"docs/strategies/{name}.md"
