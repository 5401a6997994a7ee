"""What must hold for every strategy on every backbone: the conformance suite."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import CASES, ROWS, shake, tiny_gpt, tokens
from strategies.plain import PLAIN, Plain
from torch import Tensor

import gptnorm
from gptnorm.config import BackboneName, OptimConfig
from gptnorm.model import GPT
from gptnorm.model.moe import frozen_routing
from gptnorm.strategies import STRATEGIES
from gptnorm.train.checkpoint import load_checkpoint, save_checkpoint
from gptnorm.train.optim import build_optimizer

every_case = pytest.mark.parametrize(("strategy", "backbone", "moe"), CASES)


@every_case
def test_block_equation(strategy: str, backbone: BackboneName, moe: bool) -> None:
    model = shake(tiny_gpt(strategy, backbone, moe=moe)).double()
    batch = tokens(batch=1)
    with torch.no_grad():
        ours = model(batch)[0]
    theirs = PLAIN[strategy](Plain(model), batch[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# --- initialisation, gradients, hooks -------------------------------------------------------------------------------


@every_case
def test_meta_init_equals_direct_init(strategy: str, backbone: BackboneName, moe: bool) -> None:
    direct = tiny_gpt(strategy, backbone, moe=moe, seed=3)
    with torch.device("meta"):
        deferred = tiny_gpt(strategy, backbone, moe=moe, seed=99)
    deferred.to_empty(device="cpu")
    for tensor in (*deferred.parameters(), *deferred.buffers()):
        tensor.data.fill_(float("nan"))
    deferred.init_weights(3)
    state = deferred.state_dict()
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(direct(tokens()), deferred(tokens()))


@every_case
def test_every_parameter_gets_a_finite_gradient(strategy: str, backbone: BackboneName, moe: bool) -> None:
    model = tiny_gpt(strategy, backbone, moe=moe)
    loss = model.loss(tokens())
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@every_case
def test_bf16_is_close_to_fp32(strategy: str, backbone: BackboneName, moe: bool) -> None:
    model = tiny_gpt(strategy, backbone, moe=moe)
    exact = model.loss(tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.loss(tokens())
    assert abs(rough - exact) < 0.02 * exact


@every_case
def test_future_tokens_do_not_matter(strategy: str, backbone: BackboneName, moe: bool) -> None:
    model = tiny_gpt(strategy, backbone, moe=moe)
    batch = tokens()
    changed = batch.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % model.shape.vocab
    assert torch.allclose(model(batch)[:, :9], model(changed)[:, :9], atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "backbone", "moe"),
    # Experts take seconds to compile and are built alike for every strategy: most wait for the slow suite.
    [
        pytest.param(*case, marks=pytest.mark.slow)
        if case[2:] == (True,) and case[0] not in ("simplenorm", "ngpt")
        else case
        for case in CASES
    ],
)
def test_compiled_equals_eager(strategy: str, backbone: BackboneName, moe: bool) -> None:
    model = tiny_gpt(strategy, backbone, moe=moe)
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), model.loss(tokens()), rtol=1e-5, atol=1e-6)


@every_case
def test_twice_differentiable(strategy: str, backbone: BackboneName, moe: bool) -> None:
    """A Hessian-vector product by two backward passes against finite differences of the gradient."""
    model = shake(tiny_gpt(strategy, backbone, moe=moe)).double()
    batch, parameters = tokens(), list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def gradient(create_graph: bool = False) -> tuple[Tensor, ...]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.autograd.grad(model.objective(batch).total, parameters, create_graph=create_graph)

    def gradient_at(step: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for p, w in zip(parameters, v, strict=True):
                p.add_(w, alpha=step)
        found = gradient()
        with torch.no_grad():
            for p, w in zip(parameters, v, strict=True):
                p.sub_(w, alpha=step)
        return found

    slope = sum((g * w).sum() for g, w in zip(gradient(create_graph=True), v, strict=True))
    assert isinstance(slope, Tensor)
    product = torch.autograd.grad(slope, parameters)

    h = 1e-5
    # A token that changed its experts on the way would make the gradient jump.
    with frozen_routing(model):
        gradient()
        differences = [(a - b) / (2 * h) for a, b in zip(gradient_at(h), gradient_at(-h), strict=True)]
    error = sum((a - b).pow(2).sum() for a, b in zip(product, differences, strict=True)) ** 0.5
    size = sum(a.pow(2).sum() for a in product) ** 0.5
    assert error / size < 1e-4


@every_case
def test_constraints_hold_after_every_step(strategy: str, backbone: BackboneName, moe: bool) -> None:
    model = tiny_gpt(strategy, backbone, moe=moe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constrained = 0
    row = next(row for row in ROWS if row.strategy == strategy)
    for step in range(50 if row.constrained else 2):
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
    assert (constrained > 0) == row.constrained


@every_case
def test_checkpoint_round_trip(strategy: str, backbone: BackboneName, moe: bool, tmp_path: Path) -> None:
    """Saved after two updates and loaded into another draw: the third update comes out bit for bit."""
    config = OptimConfig()

    def update(model: GPT, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        model.objective(tokens(seed=seed)).total.backward()
        optimizer.step()
        model.after_step()

    def make(seed: int) -> tuple[GPT, torch.optim.AdamW]:
        model = tiny_gpt(strategy, backbone, moe=moe, seed=seed)
        return model, build_optimizer(model, config)

    model, optimizer = make(seed=1)
    update(model, optimizer, 0)
    update(model, optimizer, 1)
    folder = save_checkpoint(tmp_path, 2, model, optimizer, {})
    other, other_optimizer = make(seed=2)
    load_checkpoint(folder, other, other_optimizer)
    for pair in ((model, optimizer), (other, other_optimizer)):
        update(*pair, 2)
    expected = model.state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


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


def test_every_option_says_what_it_means() -> None:
    """Inherited ones too."""
    from gptnorm.reference import list_settings

    for name, strategy in STRATEGIES.items():
        for setting in list_settings(strategy, "strategy."):
            assert setting.meaning, f"{name}: {setting.key}"
