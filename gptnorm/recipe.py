"""From recipe files and `key=value` arguments to a resolved `Config`.

A recipe is a TOML file with the tables of `Config`, and three things beside them:

* `extends = "base.toml"`: the file whose settings it builds on, relative to itself;
* `[own.…]`: settings that only the strategy of this file needs. Like `[strategy]`, its options,
  they are left out where another strategy is chosen;
* `[study]`: strategies, learning rates and seeds of a comparison.

Who wins, highest first: command line, recipe, the recipe it extends, the strategy's defaults, the
project's defaults. A preset stands for its sizes in the layer that names it.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter

from gptnorm.config import BUILT_IN_CORPORA, BUILT_IN_TOKENIZERS, Config, ModelConfig
from gptnorm.errors import UserError, bad_value
from gptnorm.model.presets import preset_settings
from gptnorm.strategies import find_strategy, make_strategy
from gptnorm.tables import Tree, flatten, merge, nest, within
from gptnorm.typed import read_table


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One file, or the command line."""

    tree: Tree
    own: Tree = field(default_factory=dict)
    """What is dropped when another strategy than this layer's is chosen."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe file and those it extends, the lowest first."""

    name: str
    layers: tuple[Layer, ...]
    study: Tree

    def said(self, overrides: Iterable[str] = ()) -> Tree:
        """What its files and the `key=value` arguments say, whatever the strategy: no defaults, no preset unfolded."""
        tree: Tree = {}
        for layer in self.layers:
            merge(tree, layer.tree)
        merge(tree, parse_overrides(overrides))
        return tree

    def resolve(self, overrides: Iterable[str] = (), *, strategy: str | None = None) -> Config:
        """The settings of a run.

        Args:
            overrides: `key=value` arguments, such as "optim.lr=3e-3".
            strategy: stands in for every `model.strategy`; a study asks for one after the other.

        Raises:
            UserError: an unknown key, a wrong value, an unknown strategy or preset.
        """
        layers = [*self.layers, Layer(tree=parse_overrides(overrides))]
        strategy = str(strategy or _last(layers, "model", "strategy") or "")
        backbone = _last(layers, "model", "backbone") or ModelConfig.backbone

        tree: Tree = {}
        for key, value in find_strategy(strategy).recipe_defaults.items():
            merge(tree, nest(key, value))
        # A file that names no strategy speaks for the one of the file below it, or, at the bottom, for the first above.
        owner = next((name for layer in self.layers if (name := _get(layer.tree, "model", "strategy"))), None)
        for layer in layers:
            owner = _get(layer.tree, "model", "strategy") or owner
            shared = layer.tree if owner in (None, strategy) else _without(layer.tree, "strategy")
            for part in (shared, layer.own if owner == strategy else {}):
                merge(tree, _expand_preset(part, backbone))
        if isinstance(tree.setdefault("model", {}), dict):
            tree["model"]["strategy"] = strategy
        config = read_table(Config, tree)
        make_strategy(strategy, config.strategy, config.options)
        return _with_absolute_paths(config)


def load_recipe(name: str) -> Recipe:
    """A recipe by its path, or by the name of one that ships with the package (`laptop/base`)."""
    path = _find_recipe(name)
    layers: list[Layer] = []
    study: Tree = {}
    seen: list[Path] = []
    following: Path | None = path
    while following:
        if following.resolve() in seen:
            raise bad_value("extends", str(following), "a recipe cannot extend itself")
        seen.append(following.resolve())
        tree = _read_toml(following)
        below = _pop_table(tree, "study")
        # These two stand for the places and settings of a study as a whole, to which a key more would add.
        merge(below, {key: value for key, value in study.items() if key not in ("map", "tune")})
        below.update({key: study[key] for key in ("map", "tune") if key in study})
        study = below
        extends = tree.pop("extends", None)
        layers.insert(0, Layer(tree=tree, own=_pop_table(tree, "own")))
        if extends is not None and not isinstance(extends, str):
            raise bad_value("extends", extends, "must be the path of a recipe")
        following = following.parent / extends if extends else None
    return Recipe(name=path.stem, layers=tuple(layers), study=study)


def parse_overrides(arguments: Iterable[str]) -> Tree:
    """`["optim.lr=3e-3"]` → `{"optim": {"lr": 0.003}}`; a value that is not TOML is text."""
    tree: Tree = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{argument!r}: a setting is written KEY=VALUE, such as optim.lr=3e-3")
        merge(tree, nest(key, _parse_value(text)))
    return tree


def dump_toml(config: Config) -> str:
    """The resolved config as TOML; what is left out stands for "as the docs say"."""
    return tomli_w.dumps(_without_none(to_tree(config)))


def to_tree(config: Config) -> Tree:
    """The config as nested plain tables."""
    return TypeAdapter(Config).dump_python(config, mode="json")


def read_config(path: Path) -> Config:
    """A resolved config, as `dump_toml` wrote it."""
    return read_table(Config, _read_toml(path))


def changed(config: Config, settings: Iterable[str], allowed: Sequence[str], reason: str) -> Config:
    """A run's config with some settings changed.

    Args:
        settings: `key=value` arguments.
        allowed: keys and tables of keys that may be changed.
        reason: why no other may be.

    Raises:
        UserError: another key, or a wrong value.
    """
    overrides = parse_overrides(settings)
    for key, value in flatten(overrides).items():
        if not within(key, allowed):
            raise bad_value(key, value, f"{reason}; may be set: {', '.join(allowed)}")
    tree = to_tree(config)
    merge(tree, overrides)
    return read_table(Config, tree)


HOW = ("parallel", "train.accumulate", "train.compile", "train.device", "train.recompute", "train.threads")
"""Settings, and tables of settings, that say how a run computes and not what, so that it may go on with others."""


def adjusted(config: Config, settings: Sequence[str]) -> Config:
    """The config of a run that goes on with other settings, of `HOW` alone; see `changed`.

    A new `parallel.tensor` takes back `parallel.data`, unless that is given, too.
    """
    if "parallel.tensor" in flatten(parse_overrides(settings)):
        config = replace(config, parallel=replace(config.parallel, data=None))
    return changed(config, settings, HOW, "a run goes on with the settings it began with")


def recipe_root() -> Path:
    """The folder of the recipes that ship with the package."""
    installed = Path(str(files("gptnorm"))) / "recipes"
    return installed if installed.is_dir() else installed.parent.parent / "recipes"


def shipped_recipes() -> list[str]:
    """The names of the recipes that ship with the package."""
    root = recipe_root()
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.toml"))


def _find_recipe(name: str) -> Path:
    relative = name.removeprefix("recipes/").removesuffix(".toml") + ".toml"
    for path in (Path(name), recipe_root() / relative):
        # A name that is too long for a file is an error of its own, even here.
        with contextlib.suppress(OSError):
            if path.is_file():
                return path
    if (own := Path(name) / "config.toml").is_file():
        raise UserError(f"recipe {name!r}: is a run's folder; its settings are a recipe, too: {own}")
    known = shipped_recipes()
    close = difflib.get_close_matches(relative.removesuffix(".toml"), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
    raise UserError(f"recipe {name!r}: no such file, and no such recipe{hint}")


def _read_toml(path: Path) -> Tree:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None


def _pop_table(tree: Tree, name: str) -> Tree:
    table = tree.pop(name, {})
    if not isinstance(table, dict):
        raise bad_value(name, table, f"must be a table; write its keys as {name}.KEY")
    return table


def _without(tree: Tree, name: str) -> Tree:
    return {key: value for key, value in tree.items() if key != name}


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    value = parsed.pop("value")
    # Whatever else the text said, on a second line, must not be lost.
    return value if isinstance(value, bool | int | float | str | list) and not parsed else text


def _get(tree: Tree, table: str, key: str) -> Any:
    inner = tree.get(table)
    return inner.get(key) if isinstance(inner, dict) else None


def _last(layers: list[Layer], table: str, key: str) -> Any:
    """The value that the highest layer gives."""
    return next((v for layer in reversed(layers) if (v := _get(layer.tree, table, key)) is not None), None)


def _expand_preset(tree: Tree, backbone: Any) -> Tree:
    """A layer in which `model.preset` is written out; its own keys win over the preset's."""
    name = _get(tree, "model", "preset")
    if name is None:
        return tree
    if backbone not in ("gpt2", "llama2", "llama3"):
        raise bad_value("model.backbone", backbone, "must be 'gpt2', 'llama2' or 'llama3'")
    if not isinstance(name, str):
        raise bad_value("model.preset", name, "must be text")
    # A preset is the published model: its initialisation, too.
    expanded: Tree = {"init": {"std": "published"}}
    merge(expanded, preset_settings(backbone, name))
    merge(expanded, tree)
    return expanded


def _with_absolute_paths(config: Config) -> Config:
    """Local files by their full path: a run can then be resumed from any folder."""

    def absolute(path: str) -> str:
        # Path.expanduser raises where there is no such home.
        local = Path(os.path.expanduser(path))
        return str(local.absolute()) if path not in BUILT_IN_CORPORA and local.exists() else path

    data = config.data
    path = absolute(data.path) if isinstance(data.path, str) else tuple(map(absolute, data.path))
    tokenizer = data.tokenizer if data.tokenizer in BUILT_IN_TOKENIZERS else absolute(data.tokenizer)
    return replace(config, data=replace(data, path=path, tokenizer=tokenizer))


def _without_none(tree: Tree) -> Tree:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in tree.items() if v is not None}
