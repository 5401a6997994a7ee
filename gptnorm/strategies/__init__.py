"""One file per strategy; `base` is the contract, `registry` the list."""

from gptnorm.strategies.base import Strategy
from gptnorm.strategies.registry import STRATEGIES, find_strategy, make_strategy

__all__ = ["STRATEGIES", "Strategy", "find_strategy", "make_strategy"]
