"""What must hold for every strategy on every backbone: the conformance suite."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import CASES, ROW_OF, shake, tiny_gpt, tokens
from saving import load, save
from strategies.plain import PLAIN, Plain
from torch import Tensor

import gptnorm
from gptnorm.config import BackboneName, OptimConfig
from gptnorm.model import GPT, Objective
from gptnorm.model.moe import frozen_routing
from gptnorm.model.projection import WeightOwner
from gptnorm.strategies import STRATEGIES
from gptnorm.train.optim import Optimizers, build_optimizer

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
    """The whole objective in one graph, and its gradients; fp32, where experts take the reference path."""
    model = tiny_gpt(strategy, backbone, moe=moe)
    torch._dynamo.reset()
    compiled = torch.compile(model.objective, backend="aot_eager", fullgraph=True)

    def total_and_gradients(objective: Callable[[Tensor], Objective]) -> tuple[Tensor, ...]:
        total = objective(tokens()).total
        return (total.detach(), *torch.autograd.grad(total, list(model.parameters())))

    names = ("total", *(name for name, _ in model.named_parameters()))
    pairs = zip(names, total_and_gradients(compiled), total_and_gradients(model.objective), strict=True)
    for name, ours, theirs in pairs:
        # Sums in another order; a gradient is as exact as its largest entry.
        tolerance = 1e-5 * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


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
    """Exactly the table's, along its axes, experts one by one: at the start and after each of fifty steps."""
    model = tiny_gpt(strategy, backbone, moe=moe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    constraints = ROW_OF[strategy].constraints
    longer = dict.fromkeys(constraints, 0)
    for name, owner, matrix in matrices(model):
        if owner.role in constraints:
            norms = matrix.norm(dim=constraints[owner.role][0])
            torch.testing.assert_close(norms, torch.ones_like(norms), msg=name)
    for step in range(50 if constraints else 2):
        optimizer.zero_grad()
        model.loss(tokens(seed=step)).backward()
        optimizer.step()
        before = {name: matrix.clone() for name, _, matrix in matrices(model)}
        model.after_step()
        for name, owner, matrix in matrices(model):
            if owner.role not in constraints:
                assert torch.equal(matrix, before[name]), name
                continue
            axis, kind = constraints[owner.role]
            norms = before[name].norm(dim=axis, keepdim=True)
            longer[owner.role] += int((norms > 1).sum())
            divisor = norms if kind == "unit" else norms.clamp_min(1.0)
            torch.testing.assert_close(matrix, before[name] / divisor, rtol=1e-6, atol=1e-7, msg=name)
    present = {owner.role for _, owner in model.weights()}
    assert all(longer[role] for role in present & longer.keys()), "no step put it to the test"


def matrices(model: GPT) -> Iterator[tuple[str, WeightOwner, Tensor]]:
    """Every weight as it stands; experts one by one."""
    for name, owner in model.weights():
        for n, matrix in enumerate(owner.weight.detach().reshape(-1, *owner.weight.shape[-2:])):
            yield f"{name}[{n}]", owner, matrix


@pytest.mark.parametrize("lr", [1e-2, 1e-1])
@pytest.mark.parametrize("moe", [False, True])
def test_a_penalty_keeps_rows_near_norm_1(moe: bool, lr: float) -> None:
    """Multipliers grow until they undo what an update adds, and no row turns round on the way.

    One batch again and again lengthens the rows: left alone half of them are longer than 1.5 after fifty
    steps at 1e-2. Pulled back, all are below 1.05 there, and below 1.25 at 1e-1, where one update may add 0.5.
    """
    model = tiny_gpt("angpt", "llama2", moe=moe, own={"bound": "penalty"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def norms() -> Tensor:
        return torch.cat([matrix.norm(dim=-1) for _, _, matrix in matrices(model)])

    pushed = 0.0
    for _ in range(50):
        optimizer.zero_grad()
        model.loss(tokens()).backward()
        optimizer.step()
        pushed += float((norms() > 1 + 1e-6).float().mean()) / 50
        updated = [matrix.clone() for _, _, matrix in matrices(model)]
        model.after_step()
        for before, (name, _, after) in zip(updated, matrices(model), strict=True):
            assert ((before * after).sum(-1) >= 0).all(), name
    assert pushed > 0.3
    assert norms().max() < (1.05 if lr == 1e-2 else 1.25)
    assert norms().median() > (0.9 if lr == 1e-2 else 0.75)


@every_case
def test_checkpoint_round_trip(strategy: str, backbone: BackboneName, moe: bool, tmp_path: Path) -> None:
    """Saved after two updates and loaded into another draw: the third update comes out bit for bit."""
    config = OptimConfig()

    def update(model: GPT, optimizer: Optimizers, seed: int) -> None:
        optimizer.zero_grad()
        model.objective(tokens(seed=seed)).total.backward()
        optimizer.step()
        model.after_step()

    def make(seed: int) -> tuple[GPT, Optimizers]:
        model = tiny_gpt(strategy, backbone, moe=moe, seed=seed)
        return model, build_optimizer(model, config)

    model, optimizer = make(seed=1)
    update(model, optimizer, 0)
    update(model, optimizer, 1)
    folder = save(tmp_path, 2, model, optimizer)
    other, other_optimizer = make(seed=2)
    load(folder, other, other_optimizer)
    for pair in ((model, optimizer), (other, other_optimizer)):
        update(*pair, 2)
    expected = model.state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


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
