"""Every strategy by its name: the only list of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from gptnorm.config import OptionsConfig, Scalar
from gptnorm.errors import UserError, bad_value
from gptnorm.strategies.angpt import AnGPT
from gptnorm.strategies.b2t import B2T
from gptnorm.strategies.base import Strategy
from gptnorm.strategies.compose import compose, preset_options
from gptnorm.strategies.deepnorm import DeepNorm
from gptnorm.strategies.dyt import DyT
from gptnorm.strategies.hybridnorm import HybridNorm
from gptnorm.strategies.keel import Keel
from gptnorm.strategies.lns import LNS
from gptnorm.strategies.mixln import MixLN
from gptnorm.strategies.ngpt import NGPT
from gptnorm.strategies.periln import PeriLN
from gptnorm.strategies.postnorm import PostNorm
from gptnorm.strategies.prenorm import PreNorm
from gptnorm.strategies.prenorm_qknorm import PreNormQKNorm
from gptnorm.strategies.qkv_norm import QKVNorm
from gptnorm.strategies.reordered import Reordered
from gptnorm.strategies.residual_dual import ResidualDual
from gptnorm.strategies.sandwich import Sandwich
from gptnorm.strategies.siamesenorm import SiameseNorm
from gptnorm.strategies.simplenorm import SimpleNorm
from gptnorm.strategies.spannorm import SpanNorm
from gptnorm.typed import read_table

STRATEGIES: dict[str, type[Strategy]] = {
    "prenorm": PreNorm,
    "prenorm_qknorm": PreNormQKNorm,
    "qkv_norm": QKVNorm,
    "lns": LNS,
    "dyt": DyT,
    "postnorm": PostNorm,
    "deepnorm": DeepNorm,
    "b2t": B2T,
    "spannorm": SpanNorm,
    "keel": Keel,
    "mixln": MixLN,
    "hybridnorm": HybridNorm,
    "sandwich": Sandwich,
    "periln": PeriLN,
    "reordered": Reordered,
    "simplenorm": SimpleNorm,
    "angpt": AnGPT,
    "ngpt": NGPT,
    "residual_dual": ResidualDual,
    "siamesenorm": SiameseNorm,
}


def find_strategy(name: str) -> type[Strategy]:
    """The class of a strategy; UserError if there is none of that name."""
    if not name:
        raise UserError(f"model.strategy: is missing; one of {', '.join(STRATEGIES)}")
    if name not in STRATEGIES:
        close = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise bad_value("model.strategy", name, f"one of {', '.join(STRATEGIES)}{hint}")
    return STRATEGIES[name]


def make_strategy(name: str, table: Mapping[str, Scalar], options: OptionsConfig | None = None) -> Strategy:
    """The strategy with its own options (the `[strategy]` table) and those that compose with any.

    Args:
        options: the `[options]` table; left out, what the strategy itself presets.

    Raises:
        UserError: a key that does not fit, or options that make no sense with the strategy.
    """
    strategy = read_table(find_strategy(name), dict(table), key="strategy")
    return compose(strategy, preset_options(strategy) if options is None else options)
