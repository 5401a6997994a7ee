r"""The mixture-of-experts branch.

$$y = \Bigl(\sum_{s} F_s(x) + \gamma \sum_{e \in T(x)} g_e(x) F_e(x)\Bigr) / \sqrt{1 + S}$$

with the shared experts s, the k routed experts T(x) of a token and their gates $g_e$ (`gptnorm.model.router`); every
$F$ is the dense feed-forward at the width of one expert, with what the strategy puts after each of its maps, gains of
its own included. $\sqrt{1 + S}$ is there with a branch gain γ only (`MoEConfig.branch_gain`).

No token is dropped and there is no capacity. Two ways of computing the routed sum:

* grouped: the N k pairs are sorted by expert, and one product over all segments serves each of the three maps
  (`F.grouped_mm`); fp32 and bf16;
* reference: every expert on every token, the others' gates 0. E / k times the work; for whatever grouped_mm does not
  take: fp64, fp32 under torch.compile (its shape function knows bf16 alone), forward-mode derivatives, widths that
  are no multiple of 16 bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptnorm.activations import ACTIVATIONS
from gptnorm.config import Config, MoEConfig
from gptnorm.model.float8 import float8_experts, product_dtype
from gptnorm.model.projection import WeightOwner
from gptnorm.model.router import Choice, Router, Routing, auto_gain, describe_routing, frozen_routing
from gptnorm.shape import Role, Shape
from gptnorm.strategies import Strategy

__all__ = ["MixtureOfExperts", "Routing", "describe_routing", "frozen_routing", "reference_experts", "slow_experts"]


class ExpertProjection(WeightOwner):
    """One map of each of several experts, W of shape (experts, out_features, in_features)."""

    float8: bool = False
    """As of `Projection`."""

    def __init__(self, role: Role, layer: int, shape: Shape, strategy: Strategy, experts: int) -> None:
        super().__init__(role, layer, shape, strategy, (experts, shape.out_features(role), shape.in_features(role)))

    def forward(self, x: Tensor, expert: Tensor, ends: Tensor | None) -> Tensor:
        y = float8_experts(x, self.weight, expert, ends) if self.float8 else self._product(x, ends)
        for step in self.after:
            y = step(y, expert)
        return y

    def _product(self, x: Tensor, ends: Tensor | None) -> Tensor:
        weight = self.weight.to(x.dtype)
        return x @ weight.mT if ends is None else F.grouped_mm(x, weight.mT, offs=ends)


class ExpertFeedForward(nn.Module):
    """The feed-forwards of several experts."""

    def __init__(self, layer: int, shape: Shape, strategy: Strategy, experts: int) -> None:
        super().__init__()
        spec = strategy.feedforward(layer, shape)
        self.count = experts
        self.gate = ExpertProjection("gate", layer, shape, strategy, experts) if shape.gated else None
        self.up = ExpertProjection("up", layer, shape, strategy, experts)
        self.down = ExpertProjection("down", layer, shape, strategy, experts)
        self.act = ACTIVATIONS[shape.activation]
        self.pre_activation = spec.pre_activation
        self.post_activation = spec.post_activation

    def forward(self, x_PD: Tensor, expert_P: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by expert, `ends_E` (int32) the end of each expert's segment: (P, d) → (P, d)."""
        return self._apply_maps(x_PD, expert_P, ends_E)

    def all(self, x_ND: Tensor) -> Tensor:
        """Every expert on every row: (N, d) → (experts, N, d)."""
        return self._apply_maps(x_ND, torch.arange(self.count, device=x_ND.device)[:, None], None)

    def _apply_maps(self, x: Tensor, expert: Tensor, ends: Tensor | None) -> Tensor:
        z = self.gate(x, expert, ends) if self.gate else self.up(x, expert, ends)
        a = self.act(z if self.pre_activation == 1.0 else z * self.pre_activation)
        if self.gate:
            a = a * self.up(x, expert, ends)
        return self.down(a if self.post_activation == 1.0 else a * self.post_activation, expert, ends)


class MixtureOfExperts(nn.Module):
    """(B, T, d) → ((B, T, d), Routing)."""

    def __init__(self, layer: int, shape: Shape, strategy: Strategy, config: MoEConfig) -> None:
        super().__init__()
        assert shape.experts is not None, "a dense model has no experts"
        experts = shape.experts
        self.shape = shape
        self.config = config
        self.router = Router(layer, shape, strategy, config)
        self.routed = ExpertFeedForward(layer, shape, strategy, experts.routed)
        self.shared = ExpertFeedForward(layer, shape, strategy, experts.shared) if experts.shared else None
        self.total_gain = 1.0 if config.branch_gain == "none" else (1 + experts.shared) ** -0.5
        self.reference = False
        self.gain = None
        if config.branch_gain == "sqrt_k":
            self.gain = experts.top_k**0.5
        elif isinstance(config.branch_gain, float):
            self.gain = config.branch_gain
        if config.branch_gain == "auto":
            # A buffer: it belongs to the initial weights, which a checkpoint no longer has.
            self.register_buffer("auto_gain", torch.empty(()))

    @torch.no_grad()
    def reset(self) -> None:
        """Sets γ from the router's weight, which has been drawn by now."""
        if self.config.branch_gain == "auto":
            self.get_buffer("auto_gain").fill_(auto_gain(self.router.logit_std(), self.config))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.flatten(0, -2)
        choice = self.router(x_ND)
        # grouped_mm is not on autocast's list.
        x_ND = x_ND.to(product_dtype(x_ND))
        grouped = not self.reference and takes_grouped_mm(x_ND, self.shape.d, self.shape.d_ff)
        y_ND, counts_E = self._grouped(x_ND, choice) if grouped else self._reference(x_ND, choice)
        if self.config.branch_gain == "auto":
            y_ND = y_ND * self.get_buffer("auto_gain")
        elif self.gain is not None:
            y_ND = y_ND * self.gain
        if self.shared is not None:
            y_ND = y_ND + self.shared.all(x_ND).sum(0)
        if self.total_gain != 1.0:
            y_ND = y_ND * self.total_gain
        return y_ND.view_as(x_BTD), self.router.account(choice, counts_E)

    def _grouped(self, x_ND: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """The routed sum, and how many pairs each expert computed."""
        top_k = choice.expert_NK.shape[1]
        expert_P, order_P = choice.expert_NK.flatten().sort(stable=True)
        experts = torch.arange(self.routed.count, device=x_ND.device)
        ends_E = torch.searchsorted(expert_P, experts, right=True, out_int32=True)
        y_PD = self.routed(x_ND[order_P // top_k], expert_P, ends_E)
        # Back in the order of the tokens by a gather, whose gradient is deterministic on a GPU, too.
        place_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=x_ND.device))
        y_NKD = y_PD[place_P].unflatten(0, (-1, top_k))
        y_ND = (y_NKD * choice.gate_NK[..., None]).sum(1)
        return y_ND.to(x_ND.dtype), ends_E.diff(prepend=ends_E.new_zeros(1))

    def _reference(self, x_ND: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """The same, from every expert on every token."""
        gates_NE = torch.zeros_like(choice.probs_NE).scatter(1, choice.expert_NK, choice.gate_NK)
        chosen_NE = torch.zeros_like(choice.probs_NE, dtype=torch.int64).scatter(1, choice.expert_NK, 1)
        y_ND = (self.routed.all(x_ND) * gates_NE.T[..., None]).sum(0)
        return y_ND.to(x_ND.dtype), chosen_NE.sum(0)


def takes_grouped_mm(x: Tensor, *widths: int) -> bool:
    """Whether `F.grouped_mm` can do these products, as of torch 2.11 to 2.13."""
    if x.device.type not in ("cpu", "cuda") or any(width * x.dtype.itemsize % 16 for width in widths):
        return False
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and not torch.compiler.is_compiling())


def slow_experts(config: Config) -> str | None:
    """A warning, if the run will pass every token through every expert though it need not."""
    moe, train = config.moe, config.train
    if not (moe.experts > moe.top_k and train.compile and train.precision == "fp32"):
        return None
    return (
        "train.compile with train.precision=fp32 runs every routed expert on every token, "
        f"{moe.experts / moe.top_k:.3g} times the work; train.precision=bf16 or train.compile=false avoids it"
    )


@contextlib.contextmanager
def reference_experts(model: nn.Module) -> Iterator[None]:
    """Every mixture of experts takes its reference path in here, which has derivatives of any order and mode."""
    branches = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    for branch in branches:
        branch.reference = True
    try:
        yield
    finally:
        for branch in branches:
            branch.reference = False
