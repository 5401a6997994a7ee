r"""The curvature of the loss in what one module reads: H_xx of a slot, and its split into L and C.

A *slot* is a module that reads x and returns y = φ(x), token by token: a linear map with what its strategy puts after
it (a norm: φ(x) = γ ⊙ √d Wx / ‖Wx‖), or a norm of the wiring or of queries and keys. x is a leaf at its
input only, not the stream that also feeds the skip and the sibling maps. With g = ∂ℓ/∂y and J = ∂y/∂x,

$$H_{xx} = L + C, \qquad L = J^\top H_{yy} J, \qquad C = \sum_k g_k\, \nabla^2_x y_k.$$

L is the Gauss-Newton part; C is the curvature of φ itself, 0 for a linear map with nothing after it.

x is that of one token, the others fixed, or of a whole sequence; ℓ is the mean cross-entropy over the tokens of that
sequence. Closed forms for a norm after a linear map are ours (tests/curvature).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gptnorm.curvature.operators import FiniteDifference, Hessian, Jacobian, Loss
from gptnorm.curvature.reference import reference_paths
from gptnorm.curvature.vectors import Space
from gptnorm.errors import bad_value
from gptnorm.model import GPT
from gptnorm.model.attention import HeadNorm
from gptnorm.model.moe import ExpertProjection
from gptnorm.model.projection import Projection
from gptnorm.model.router import Router
from gptnorm.norms import DynamicTanhModule, FrozenModule, NormModule

SLOTS = (Projection, HeadNorm, NormModule, FrozenModule, DynamicTanhModule)
"""Modules that can be slots."""


def slots_of(model: GPT) -> dict[str, nn.Module]:
    """Every slot by its module's name. What follows a linear map is part of its slot; routers and maps of experts are
    none, since a token passes through several at once."""
    found: dict[str, nn.Module] = {}
    inner: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in inner):
            continue
        if isinstance(module, SLOTS):
            found[name] = module
        if isinstance(module, (*SLOTS, ExpertProjection, Router)):
            inner.append(f"{name}.")
    return found


def used_once(model: GPT, tokens: Tensor, names: Iterable[str]) -> list[str]:
    """Those of the slots that one forward pass over a sequence (T + 1,) goes through exactly once."""
    calls = dict.fromkeys(names, 0)
    slots = slots_of(model)

    def count(name: str) -> None:
        calls[name] += 1

    with contextlib.ExitStack() as stack, torch.no_grad(), reference_paths(model):
        for name in calls:
            hook = slots[name].register_forward_hook(lambda *_, name=name: count(name))
            stack.enter_context(_hooked(hook))
        model.loss(tokens[None])
    return [name for name, found in calls.items() if found == 1]


def find_slot(model: GPT, name: str) -> nn.Module:
    """The slot of that name; UserError, with some that there are, if there is none."""
    slots = slots_of(model)
    if name not in slots:
        some = [slot for slot in slots if slot.startswith("blocks.0.")] or list(slots)
        raise bad_value("--slot", name, f"no such slot; there are {', '.join(some)}, and so on in the other blocks")
    return slots[name]


class SlotLoss:
    """The loss of one sequence as a function of what a slot reads.

    Its operators are to be used inside `with slot_loss.measuring():`.

    Args:
        tokens: one sequence, (T + 1,).
        name: of the slot.
        token: position 0 … T - 1 whose x is the variable; None: those of the whole sequence.
    """

    def __init__(self, model: GPT, tokens: Tensor, name: str, token: int | None = None) -> None:
        self._model, self._tokens, self._token = model, tokens[None], token
        self._length = tokens.shape[0] - 1
        if token is not None and not 0 <= token < self._length:
            raise bad_value("--token", token, f"must be 0 … {self._length - 1}, a position of the sequence")
        self.name, self._slot = name, find_slot(model, name)
        with self.measuring(), torch.no_grad():
            self.x, self.y = self._read()
        self.space = Space([self.x])
        self._output_hessian: Hessian | None = None

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Kernels that can be differentiated twice; no parameter has a gradient."""
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            with reference_paths(self._model):
                yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def hessian(self) -> Hessian:
        """H_xx."""
        return self._at(self.x, before=True)

    def output_hessian(self) -> Hessian:
        """H_yy; one operator, whose graph is kept, for all that is made of it."""
        if self._output_hessian is None:
            self._output_hessian = self._at(self.y, before=False)
        return self._output_hessian

    def gradient(self) -> Tensor:
        """∂ℓ/∂x, of the shape of x."""
        return self.hessian().gradient().view_as(self.x)

    def finite_difference(self) -> FiniteDifference:
        """H_xx from four gradients."""
        offset, loss = self._shifted(self.x, before=True)

        def gradient() -> Tensor:
            return torch.autograd.grad(loss(), offset)[0].reshape(-1)

        return FiniteDifference(gradient, [offset], size=self.x.norm(), extrapolated=True)

    def gauss_newton(self) -> SlotGaussNewton:
        """L."""
        x = self.x.clone().requires_grad_()
        return SlotGaussNewton(Jacobian(self._slot(x), [x]), self.output_hessian(), self.space)

    def curvature(self) -> Hessian:
        """C."""
        g = self.output_hessian().gradient().view_as(self.y)
        x = self.x.clone().requires_grad_()

        def pairing() -> Tensor:
            return (g * self._slot(x)).sum()

        return Hessian([pairing], [x])

    def _read(self) -> tuple[Tensor, Tensor]:
        """x and y of the chosen tokens."""
        found: dict[str, Tensor] = {}

        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if found:
                raise bad_value("--slot", self.name, "is used more than once in a forward pass, so x is not one input")
            found["x"], found["y"] = self._chosen(inputs[0]), self._chosen(output)

        with _hooked(self._slot.register_forward_hook(see)):
            self._model.loss(self._tokens)
        return found["x"].clone(), found["y"].clone()

    def _at(self, leaf: Tensor, *, before: bool) -> Hessian:
        """The Hessian in an offset, of the shape of `leaf`, of what the slot reads or returns."""
        offset, loss = self._shifted(leaf, before=before)
        return Hessian([loss], [offset])

    def _shifted(self, leaf: Tensor, *, before: bool) -> tuple[Tensor, Loss]:
        """An offset and the loss as a function of it."""
        offset = torch.zeros_like(leaf, requires_grad=True)

        def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self._moved(inputs[0], offset), *inputs[1:])

        def leave(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self._moved(output, offset)

        def loss() -> Tensor:
            slot = self._slot
            with _hooked(slot.register_forward_pre_hook(enter) if before else slot.register_forward_hook(leave)):
                return self._model.loss(self._tokens)

        return offset, loss

    def _by_token(self, x: Tensor) -> Tensor:
        """(1, T, …), or (T, …) as a router reads it, → (T, …)."""
        return x.flatten(0, 1) if x.shape[:2] == (1, self._length) else x

    def _chosen(self, x: Tensor) -> Tensor:
        rows = self._by_token(x)
        return rows if self._token is None else rows[self._token]

    def _moved(self, x: Tensor, offset: Tensor) -> Tensor:
        rows = self._by_token(x)
        if self._token is None:
            return (rows + offset).view_as(x)
        where = torch.tensor([self._token], device=x.device)
        return rows.index_add(0, where, offset[None]).view_as(x)


class SlotGaussNewton:
    """L = Jᵀ H_yy J of a slot."""

    def __init__(self, jacobian: Jacobian, output_hessian: Hessian, space: Space) -> None:
        self.space = space
        self._jacobian, self._output_hessian = jacobian, output_hessian

    def __call__(self, v: Tensor) -> Tensor:
        pushed = self._jacobian.push(self.space.split(v))
        (found,) = self._jacobian.pull(self._output_hessian(pushed.reshape(-1)).view_as(pushed))
        return found.reshape(-1)


@contextlib.contextmanager
def _hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
