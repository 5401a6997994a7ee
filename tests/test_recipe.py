from __future__ import annotations

import pytest

from gptnorm.errors import UserError
from gptnorm.recipe import load_recipe, parse_overrides, shipped_recipes


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_who_wins(tmp_path):
    """One key is set in each layer above the last, `ngpt` itself asking for no decay and no warm-up."""
    base = '[model]\nstrategy = "ngpt"\n[optim]\nlr = 1.0\nclip = 1.5\nfloor = 0.3\n'
    write(tmp_path, "base.toml", base)
    top = write(tmp_path, "top.toml", 'extends = "base.toml"\n[optim]\nlr = 2.0\nclip = 2.5\n')
    optim = load_recipe(top).resolve(["optim.lr=3"]).optim
    assert (optim.lr, optim.clip, optim.floor) == (3.0, 2.5, 0.3)
    assert (optim.weight_decay, optim.warmup) == (0.0, 0.0)  # the strategy's
    assert optim.eps == 1e-8  # the project's


def test_another_strategy_drops_options_and_own_settings_and_takes_its_own_defaults(tmp_path):
    text = (
        '[model]\nstrategy = "ngpt"\n[strategy]\nalpha_init = 0.1\n'
        "[own.optim]\nlr = 0.5\n[own.model]\nn_layers = 9\n[optim]\nclip = 0.7\n"
    )
    recipe = load_recipe(write(tmp_path, "r.toml", text))
    own, other = recipe.resolve(), recipe.resolve(["model.strategy=prenorm"])
    assert (own.optim.lr, own.model.n_layers, own.strategy) == (0.5, 9, {"alpha_init": 0.1})
    assert (other.optim.lr, other.model.n_layers, other.strategy) == (4e-3, 4, {})
    assert own.optim.clip == other.optim.clip == 0.7
    assert (own.optim.weight_decay, other.optim.weight_decay) == (0.0, 0.1)
    assert recipe.resolve(strategy="prenorm") == other


def test_each_file_speaks_for_the_strategy_that_it_names(tmp_path):
    write(tmp_path, "a.toml", '[model]\nstrategy="dyt"\n[strategy]\nalpha_attn=0.8\n[own.optim]\nlr=0.1\n')
    top = write(tmp_path, "b.toml", 'extends="a.toml"\n[model]\nstrategy="ngpt"\n[strategy]\nalpha_init=0.1\n')
    recipe = load_recipe(top)
    assert recipe.resolve().strategy == {"alpha_init": 0.1}
    below = recipe.resolve(strategy="dyt")
    assert (below.strategy, below.optim.lr) == ({"alpha_attn": 0.8}, 0.1)
    assert recipe.resolve(strategy="prenorm").strategy == {}


def test_a_base_without_a_strategy_speaks_for_the_first_above_it(tmp_path):
    write(tmp_path, "base.toml", "[strategy]\nalpha_attn=0.7\n[own.optim]\nlr=0.1\n")
    recipe = load_recipe(write(tmp_path, "top.toml", 'extends="base.toml"\n[model]\nstrategy="dyt"\n'))
    assert (recipe.resolve().strategy, recipe.resolve().optim.lr) == ({"alpha_attn": 0.7}, 0.1)
    assert recipe.resolve(strategy="prenorm").strategy == {}
    alone = load_recipe(write(tmp_path, "alone.toml", "[strategy]\nalpha_attn=0.7\n"))
    assert alone.resolve(strategy="dyt").strategy == {"alpha_attn": 0.7}


def test_a_study_s_table_is_merged_key_by_key_as_every_other(tmp_path):
    write(tmp_path, "a.toml", "[study]\ntitle = 'a'\nlrs = [1.0]\n[study.search]\nreach = 9\noptimum = 3.0\n")
    top = write(tmp_path, "b.toml", 'extends="a.toml"\n[study]\nlrs = [2.0]\n[study.search]\nedge = 1.3\n')
    expected = {"title": "a", "lrs": [2.0], "search": {"reach": 9, "optimum": 3.0, "edge": 1.3}}
    assert load_recipe(top).study == expected


def test_places_and_tuned_settings_of_a_study_are_replaced_as_a_whole(tmp_path):
    write(tmp_path, "a.toml", "[study.map]\noptim.warmup = [0.1, 0.3]\n[study.tune]\ninit.std = [0.02]\n")
    top = write(tmp_path, "b.toml", 'extends="a.toml"\n[study.map]\nmodel.n_layers = [2, 4]\n[study.tune]\n')
    assert load_recipe(top).study == {"map": {"model": {"n_layers": [2, 4]}}, "tune": {}}


def test_own_settings_lose_to_the_command_line(tmp_path):
    recipe = load_recipe(write(tmp_path, "r.toml", '[model]\nstrategy = "prenorm"\n[own.optim]\nlr = 0.5\n'))
    assert recipe.resolve(["optim.lr=0.25"]).optim.lr == 0.25


def test_preset_expands_where_it_stands(tmp_path):
    write(tmp_path, "base.toml", '[model]\nstrategy="prenorm"\npreset="20M"\nn_layers=7\n[init]\nstd=0.5\n')
    top = load_recipe(write(tmp_path, "top.toml", 'extends="base.toml"\n[model]\nd_model=512\n'))
    config = top.resolve()
    assert (config.model.d_model, config.model.n_layers, config.model.n_heads) == (512, 7, 4)
    assert config.init.std == 0.5
    config = top.resolve(["model.preset=39M"])
    assert (config.model.d_model, config.model.n_layers, config.model.n_heads) == (384, 8, 6)
    assert config.init.std == "published"
    assert top.resolve(["model.preset=39M", "model.n_layers=2"]).model.n_layers == 2


@pytest.mark.parametrize(
    ("argument", "value"),
    [("3e-3", 0.003), ("3", 3), ("true", True), ("abc", "abc"), ("", ""), ("[1, 2]", [1, 2]), ('"a b"', "a b"),
     ("a=b", "a=b"), ("{a=1}", "{a=1}"), ("1979-05-27", "1979-05-27"), ("3\nb = 4", "3\nb = 4"), 
     ("9" * 5000, "9" * 5000)],
)  # fmt: skip
def test_values_of_the_command_line(argument, value):
    assert parse_overrides([f"optim.lr={argument}"]) == {"optim": {"lr": value}}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("own = 3", "own = 3"),
        ("study = 3", "study = 3"),
        ("extends = 3", "extends = 3"),
        ('extends = "."', "cannot be read"),
        ('extends = "bad.toml"', "extends"),
        ('extends = "none.toml"', "none.toml: no such file"),
        ("a b", "not a TOML file"),
        ('model = "x"\n', "model.strategy"),
        ('[model]\nstrategy = "prenorm"\n[optim]\nlr = 1979-05-27', "optim.lr"),
        ('[model]\nstrategy = "prenorm"\npreset = [1]', "model.preset"),
        ('strategy = 3\n[model]\nstrategy = "prenorm"\n', "strategy = 3"),
        ('[model]\nstrategy = "prenorm"\n[data]\npath = ""', "data.path"),
    ],
)
def test_bad_recipes_are_one_line(tmp_path, text, word):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, "bad.toml", text)).resolve()
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if n.startswith("laptop/")])
def test_laptop_recipes_resolve(name):
    recipe = load_recipe(name)
    if name != "laptop/base":
        assert recipe.resolve().model.strategy == name.rpartition("/")[2]
