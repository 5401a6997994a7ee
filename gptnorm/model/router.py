r"""Which experts a token goes to, with which weights, and how the load is kept even.

Symbols: N tokens, E routed experts, k of them for each token, logits $z = W_r x$.

    p    = softmax(z)   or   sigmoid(z), whose share p_e / sum p then counts as the distribution over experts
    T    = the k largest of p (+ b, a bias on the choice alone)
    g_e  = p_e for e in T, divided by their sum if renormalised

$f_e$ is the share of the N k (token, choice) pairs that went to expert e. Balancing loss:
$E \sum_e f_e \bar p_e$ (Switch, arXiv 2101.03961, over all k choices as in megablocks), 1 at an even load.
z-loss: $\mathrm{mean}[(\log\sum_e e^{z_e})^2]$ (ST-MoE, arXiv 2202.08906). Loss-free balancing:
$b_e \leftarrow b_e + u\,\mathrm{sign}(\bar c - c_e)$ after each step, $c_e$ the pairs of expert e
(arXiv 2408.15664, DeepSeek-V3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptnorm.config import MoEConfig
from gptnorm.model.projection import WeightOwner
from gptnorm.norms import FrozenModule, Norm, NormModule
from gptnorm.shape import Shape
from gptnorm.sharding import sum_over, whole
from gptnorm.strategies import Strategy
from gptnorm.strategies.base import EPS

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Routing(NamedTuple):
    """What one router did with a batch; only `balance` and `z` carry a gradient.

    On several processes a batch is one process's part of a micro-batch: the balancing loss, which is not linear in the
    load, keeps every part even, as it does every micro-batch.
    """

    balance: Tensor
    """Balancing loss, a scalar: E sum_e f_e p_e, 1 if the load is even."""
    z: Tensor
    """Mean squared logsumexp of the router's logits, a scalar."""
    load: Tensor
    """(E,): the share of the (token, choice) pairs that went to each expert; sums to 1."""
    entropy: Tensor
    """Mean entropy in nats of the router's distribution over experts, a scalar."""
    dropped: Tensor
    """The share of the (token, choice) pairs that no expert computed, a scalar: 0 by construction, as there is no
    capacity; to be compared with implementations that have one."""


class Choice(NamedTuple):
    """What a router wants; fp32 or better."""

    expert_NK: Tensor
    gate_NK: Tensor
    logits_NE: Tensor
    probs_NE: Tensor
    """The distribution over experts; rows sum to 1."""


class Router(WeightOwner):
    """x (N, d) → `Choice`. Everything in it is in fp32 or better, under autocast too."""

    def __init__(self, layer: int, shape: Shape, strategy: Strategy, config: MoEConfig) -> None:
        assert shape.experts is not None, "a dense model has no router"
        super().__init__("router", layer, shape, strategy, (shape.experts.routed, shape.d))
        self.experts = shape.experts
        self.gate_kind: Literal["softmax", "sigmoid"] = config.gate
        self.renormalize = config.renormalize
        if config.router_norm:
            # With a gain whatever the strategy's own norm is: logits of a fixed length could never become decisive.
            self.after.append(Norm(kind="rmsnorm", size=self.experts.routed, eps=EPS).build())
        self.balancer = BiasBalancer(self.experts.routed, config.bias_rate) if config.balance == "bias" else None
        self.freezing = False
        self.frozen: Tensor | None = None

    def forward(self, x_ND: Tensor) -> Choice:
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.to(exact), self.weight.to(exact))
            for step in self.after:
                logits_NE = step(logits_NE)
        scores_NE = scores(logits_NE, self.gate_kind)
        expert_NK = self._choose(scores_NE.detach())
        probs_NE = scores_NE
        if self.gate_kind == "sigmoid":
            probs_NE = _shares(scores_NE)
        gate_NK = scores_NE.gather(-1, expert_NK)
        if self.renormalize:
            gate_NK = _shares(gate_NK)
        return Choice(expert_NK=expert_NK, gate_NK=gate_NK, logits_NE=logits_NE, probs_NE=probs_NE)

    def _choose(self, scores_NE: Tensor) -> Tensor:
        if self.balancer is not None:
            scores_NE = scores_NE + self.balancer.get_buffer("bias").to(scores_NE.dtype)
        expert_NK = scores_NE.topk(self.experts.top_k, dim=-1).indices
        if self.freezing:
            self.frozen = expert_NK if self.frozen is None else self.frozen
            expert_NK = self.frozen
        return expert_NK

    def account(self, choice: Choice, counts_E: Tensor) -> Routing:
        """Losses and statistics, given how many pairs each expert really computed."""
        if self.balancer is not None and self.training:
            self.balancer.add(counts_E)
        pairs = choice.expert_NK.numel()
        load_E = counts_E.to(choice.probs_NE.dtype) / pairs
        return Routing(
            balance=self.experts.routed * (load_E * choice.probs_NE.mean(0)).sum(),
            z=choice.logits_NE.logsumexp(-1).square().mean(),
            load=load_E,
            entropy=torch.special.entr(choice.probs_NE.detach()).sum(-1).mean(),
            dropped=(pairs - counts_E.sum()).to(load_E.dtype) / pairs,
        )

    def logit_std(self) -> float:
        """Standard deviation of the logits for inputs of RMS 1, by the weight as it stands.

        A constant after the map is not counted: strategies have it where the stream's vectors are not of RMS 1.
        """
        if any(isinstance(step, NormModule | FrozenModule) for step in self.after):
            return 1.0
        # Of the whole weight, in the order in which a single process would add.
        return whole(self.weight.detach()).float().square().sum(-1).mean().sqrt().item()


class BiasBalancer(nn.Module):
    """The bias on the choice, moved after each step against the load of that step's micro-batches.

    The load of all processes counts. A block that is computed again for its backward pass counts twice, all experts
    alike, which does not change the sign.
    """

    mesh: DeviceMesh | None = None
    """The processes of the run, if there are several."""

    def __init__(self, experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("bias", torch.empty(experts))
        self.register_buffer("load", torch.empty(experts))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        self.get_buffer("bias").zero_()
        self.get_buffer("load").zero_()

    @torch.no_grad()
    def add(self, counts_E: Tensor) -> None:
        load_E = self.get_buffer("load")
        load_E.add_(counts_E.to(load_E.dtype))

    @torch.no_grad()
    def after_step(self) -> None:
        load_E = self.get_buffer("load")
        sum_over(load_E, self.mesh, "data")
        self.get_buffer("bias").add_(torch.sign(load_E.mean() - load_E), alpha=self.rate)
        load_E.zero_()


def scores(logits: Tensor, gate: Literal["softmax", "sigmoid"]) -> Tensor:
    """p of the module's table."""
    return logits.softmax(-1) if gate == "softmax" else logits.sigmoid()


def _shares(p: Tensor) -> Tensor:
    # Sigmoids may all underflow to 0.
    return p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def auto_gain(std: float, config: MoEConfig) -> float:
    r"""$\gamma = (\mathrm{E} \sum_{e \in T} g_e^2)^{-1/2}$ for independent logits $z_e \sim N(0, \sigma^2)$.

    With it a sum of experts whose outputs are alike in size and independent has the variance of one of them. The
    mean is over a fixed sample of 4096 tokens, which leaves γ an error of about one percent.

    Args:
        std: standard deviation σ of the logits.
    """
    generator = torch.Generator().manual_seed(0)
    logits = std * torch.randn(4096, config.experts, generator=generator)
    gates = scores(logits, config.gate).topk(config.top_k, dim=-1).values
    if config.renormalize:
        gates = _shares(gates)
    return gates.square().sum(-1).mean().item() ** -0.5


@contextlib.contextmanager
def frozen_routing(model: nn.Module) -> Iterator[None]:
    """Every router keeps to the experts that it chose in its first forward pass in here; the gates still follow.

    For derivatives by finite differences: the choice jumps, and the gradient with it. All passes must
    be over the same tokens.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.freezing, router.frozen = True, None
    try:
        yield
    finally:
        for router in routers:
            router.freezing, router.frozen = False, None


def describe_routing(routings: list[Routing]) -> dict[str, float]:
    """Router statistics for the metrics; nothing without experts.

    Args:
        routings: one per micro-batch, each field with a leading axis of blocks.

    Returns:
        router_load_max, router_load_min: the load of the busiest and of the idlest expert of any block over all
        micro-batches together, relative to an even load (1); router_entropy (nats), router_balance, router_z and
        dropped: means over micro-batches and blocks.
    """
    if not routings:
        return {}
    mean = Routing(*(torch.stack(values).detach().mean(0) for values in zip(*routings, strict=True)))
    relative_LE = mean.load * mean.load.shape[-1]
    values = {
        "router_load_max": relative_LE.max(),
        "router_load_min": relative_LE.min(),
        "router_entropy": mean.entropy.mean(),
        "router_balance": mean.balance.mean(),
        "router_z": mean.z.mean(),
        "dropped": mean.dropped.mean(),
    }
    return dict(zip(values, torch.stack(tuple(values.values())).tolist(), strict=True))
