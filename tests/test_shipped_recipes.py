"""Every recipe that ships resolves, builds, and says what its source says."""

from __future__ import annotations

import pytest

from gptnorm.model import build_gpt
from gptnorm.recipe import load_recipe, shipped_recipes, to_tree
from gptnorm.tables import flatten

RUNNABLE = [
    name
    for name in shipped_recipes()
    if any(layer.tree.get("model", {}).get("strategy") for layer in load_recipe(name).layers)
]

TOKENS_PER_STEP = {"1B": 131_072, "7B": 393_216, "8B": 393_216, "1.4B": 491_520, "124M": 491_520, "0.5B": 524_288}
"""simplegpt.md section 2.2 and 2.3; angpt.md section 6."""


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
    size = name.rpartition("/")[2].partition("-")[0]
    assert config.train.batch_size * config.train.seq_len == TOKENS_PER_STEP[size]
    assert config.init.std == "published" or size == "0.5B"


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
