"""Properties of the settings: what is valid survives TOML, what is not is one line."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptnorm.config import Config
from gptnorm.errors import UserError
from gptnorm.recipe import Layer, Recipe, dump_toml, to_tree
from gptnorm.reference import list_settings
from gptnorm.typed import read_table

KEYS = [s.key for s in list_settings() if s.key not in ("strategy.OPTION", "model.preset", "model.strategy")]

texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)
trees = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries(
            {"d_model": st.sampled_from([16, 48]), "n_heads": st.sampled_from([2, 4])},
            optional={
                "backbone": st.sampled_from(["gpt2", "llama2", "llama3"]),
                "n_kv_heads": st.sampled_from([1, 2]),
                "tied": st.booleans(),
                "vocab_size": st.integers(1, 10**6),
            },
        ),
        "strategy": st.dictionaries(texts, st.one_of(st.booleans(), st.integers(-(2**60), 2**60), texts), max_size=3),
        "init": st.fixed_dictionaries({"std": st.one_of(st.sampled_from(["twin", "published"]), st.floats(1e-30, 9))}),
        "data": st.fixed_dictionaries({"path": st.one_of(texts, st.lists(texts, max_size=3))}),
        "optim": st.fixed_dictionaries(
            {
                "lr": st.floats(0, 1e30),
                "betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
                "warmup": st.floats(0, 1),
            }
        ),
        "run": st.fixed_dictionaries({"dir": texts}),
        "seed": st.integers(0, 2**62),
    },
)


@given(trees)
@settings(deadline=None)
def test_toml_round_trip(tree):
    config = read_table(Config, tree)
    assert read_table(Config, tomllib.loads(dump_toml(config))) == config


def recipe(tree):
    return Recipe(name="x", layers=(Layer(tree={"model": {"strategy": "prenorm"}}), Layer(tree=tree)), study={})


@given(trees.filter(lambda tree: "strategy" not in tree))
@settings(deadline=None, max_examples=50)
def test_a_resolved_config_is_a_recipe(tree):
    config = recipe(tree).resolve()
    again = Recipe(name="x", layers=(Layer(tree=tomllib.loads(dump_toml(config))),), study={})
    assert again.resolve() == config


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=2)),
    max_leaves=4,
)


def complaint(tree):
    """What is wrong with the settings, None if nothing is; any other exception is a failure."""
    try:
        read_table(Config, tree)
    except UserError as error:
        return str(error)
    return None


@given(st.sampled_from(KEYS), values)
@settings(deadline=None, max_examples=300)
def test_any_value_is_taken_or_refused_by_name(key, value):
    table, _, leaf = key.rpartition(".")
    tree = {table: {leaf: value}} if table else {leaf: value}
    message = complaint(tree)
    # Where two keys contradict each other either may be named.
    assert message is None or (table or leaf) in message


@given(st.sampled_from(["", "model.", "optim.", "train.", "data."]), st.from_regex(r"[a-z_]{1,12}", fullmatch=True))
@settings(deadline=None)
def test_unknown_keys_are_named(prefix, leaf):
    key = prefix + leaf
    tables = {k.partition(".")[0] for k in KEYS} | {"strategy"}
    if key in KEYS or key in tables or key in ("model.preset", "model.strategy"):
        return
    tree = {prefix[:-1]: {leaf: 1}} if prefix else {leaf: 1}
    with pytest.raises(UserError) as caught:
        read_table(Config, tree)
    assert str(caught.value).startswith(f"{key}: unknown key")
    assert "\n" not in str(caught.value)


def test_defaults_are_valid():
    assert read_table(Config, to_tree(Config())) == Config()


def test_precisions():
    assert complaint({"train": {"precision": "fp8"}}) is None
    assert "parallel.tensor = 2: must be 1 with train.precision" in str(
        complaint({"train": {"precision": "fp8"}, "parallel": {"tensor": 2}})
    )
    wrong = str(complaint({"train": {"precision": "fp16"}}))
    assert wrong.startswith("train.precision")
    assert all(word in wrong for word in ("fp16", "fp32", "bf16", "fp8"))
