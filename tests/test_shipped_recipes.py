"""Every recipe that ships resolves, builds, and says what its source says."""

from __future__ import annotations

import pytest

from gptnorm.model import build_gpt
from gptnorm.model.backbones import make_shape
from gptnorm.model.init import published_draw
from gptnorm.recipe import load_recipe, shipped_recipes, to_tree
from gptnorm.tables import flatten

RUNNABLE = [
    name
    for name in shipped_recipes()
    if any(layer.tree.get("model", {}).get("strategy") for layer in load_recipe(name).layers)
]

TOKENS_PER_STEP = {"1B": 131_072, "7B": 393_216, "8B": 393_216, "1.4B": 491_520, "124M": 491_520, "0.5B": 524_288}
TOKENS_PER_STEP["1B-7B"] = 1024 * 4096
"""simplegpt.md section 2.2 and 2.3; angpt.md section 6; spannorm.md section 4."""


def resolved(name: str) -> dict[str, object]:
    return flatten(to_tree(load_recipe(name).resolve()))


@pytest.mark.parametrize("name", RUNNABLE)
def test_resolves_and_builds(name: str) -> None:
    config = load_recipe(name).resolve()
    model = build_gpt(config, vocab=257, device="meta")
    assert sum(p.numel() for p in model.parameters()) > 100_000
    # its own file name says which strategy it is
    assert name.endswith(config.model.strategy)


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name.startswith("papers/")])
def test_tokens_per_step(name: str) -> None:
    config = load_recipe(name).resolve()
    size = name.rpartition("/")[2].removesuffix(f"-{config.model.strategy}")
    assert config.train.batch_size * config.train.seq_len == TOKENS_PER_STEP[size]
    assert config.init.std == "published" or size in ("0.5B", "1B-7B")


def test_total_tokens_of_simplegpt() -> None:
    for size, total in (("1B", 26.2e9), ("7B", 7.9e9), ("8B", 7.9e9)):
        train = load_recipe(f"papers/simplegpt/{size}-simplenorm").resolve().train
        assert train.steps * train.batch_size * train.seq_len == pytest.approx(total, rel=0.01)


def test_the_one_baseline_with_settings_of_its_own() -> None:
    tuned, fair = (resolved(f"papers/simplegpt/7B-{s}") for s in ("prenorm", "prenorm_qknorm"))
    assert (tuned["optim.lr"], tuned["optim.weight_decay"]) == (3e-4, 0.1)
    assert (fair["optim.lr"], fair["optim.weight_decay"]) == (1e-3, 0.05)
    # chosen from another file, that strategy's own settings do not leak
    other = load_recipe("papers/simplegpt/7B-prenorm").resolve(strategy="simplenorm")
    assert other.optim.lr == 1e-3


def test_laptop_recipes_differ_in_the_strategys_own_settings_only() -> None:
    base = resolved("laptop/prenorm")
    for name in RUNNABLE:
        if name.startswith("laptop/"):
            config = load_recipe(name).resolve()
            differing = {key for key, value in resolved(name).items() if base.get(key) != value}
            own = set(type_defaults(config.model.strategy)) | own_keys(name)
            assert differing <= own | {"model.strategy"}, name


def own_keys(name: str) -> set[str]:
    return {key for layer in load_recipe(name).layers for key in flatten(layer.own)}


def type_defaults(strategy: str) -> dict[str, object]:
    from gptnorm.strategies import find_strategy

    return dict(find_strategy(strategy).recipe_defaults)


def test_presets_are_published_models() -> None:
    """Choosing a preset over a laptop recipe gives the published shape and init, not a mixture."""
    config = load_recipe("laptop/simplenorm").resolve(["model.preset=20M"])
    assert (config.model.d_model, config.model.ffn_multiple, config.init.std) == (256, None, "published")
    assert sum(p.numel() for p in build_gpt(config, vocab=257, device="meta").parameters()) == 19_803_392


def test_olmoe() -> None:
    """spannorm.md section 4: shape, router, initialisation, warm-up."""
    config = load_recipe("papers/olmoe/1B-7B-prenorm_qknorm").resolve()
    model = build_gpt(config, vocab=50_280, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 6_919_161_856
    assert (config.moe.experts, config.moe.top_k, config.moe.gate, config.moe.renormalize) == (64, 8, "softmax", False)
    assert (config.moe.balance, config.moe.balance_weight, config.moe.z_loss) == ("loss", 0.01, 0.001)
    assert config.optim.warmup * config.train.batch_size * config.train.seq_len == pytest.approx(10.5e9, rel=1e-3)
    assert config.init.std == pytest.approx((2 / (5 * 2048)) ** 0.5, rel=1e-4)
    for role in ("q", "o", "gate", "up", "down", "router"):
        published = published_draw("llama2", role, 3, model.shape, config.init)
        draw = model.strategy.init(role, 3, model.shape, published)
        assert draw.std * draw.depth == pytest.approx(0.013975 * (32**-0.5 if role in ("o", "down") else 1)), role


def test_laptop_experts_are_as_active_as_the_dense_laptop_model() -> None:
    dense, moe = (load_recipe(f"{folder}/simplenorm").resolve() for folder in ("laptop", "laptop-moe"))
    widths = [make_shape(config.model, config.moe, vocab=257, context=96).d_ff for config in (dense, moe)]
    assert moe.moe.top_k * widths[1] == widths[0]


def test_a_preset_says_whether_there_are_experts() -> None:
    for below, preset, experts in (("laptop-moe", "20M", 0), ("laptop", "1B-7B", 64)):
        config = load_recipe(f"{below}/simplenorm").resolve([f"model.preset={preset}"])
        assert config.moe.experts == experts
    assert load_recipe("laptop/simplenorm").resolve(["model.preset=1B-7B", "moe.top_k=4"]).moe.top_k == 4
