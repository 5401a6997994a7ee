"""What a strategy's wiring owns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from gptnorm.norms import After


class Parts(nn.Module):
    """Norms and scales, built, by the names that the strategy gave them."""

    def __init__(self, specs: dict[str, After]) -> None:
        super().__init__()
        for name, spec in specs.items():
            self.add_module(name, spec.build())

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
