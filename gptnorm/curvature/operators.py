r"""Symmetric linear maps of flat vectors, known by their products alone.

| operator | product |
|---|---|
| `Hessian` | $\nabla^2 \ell\; v$, by differentiating $\langle \nabla \ell, v \rangle$ |
| `GaussNewton` | $J^\top H_{zz} J\, v$ of $\ell(z(\theta))$ with outputs z, J their Jacobian |
| `FiniteDifference` | $(\nabla \ell(\theta + h v) - \nabla \ell(\theta - h v)) / 2h$ |
| `Scaled` | $S A S\, v$ with a diagonal S: what a preconditioner makes of A |

A loss may come in parts that sum to it, one per micro-batch: then one part's graph is in memory at a time. The graph of
a single part is kept between products, which makes each of them cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gptnorm.curvature.vectors import Space

Loss = Callable[[], Tensor]
"""Computes a scalar from leaves that require gradients."""


class Operator(Protocol):
    """A symmetric linear map of vectors (size,)."""

    @property
    def space(self) -> Space:
        """Where its vectors live."""
        ...

    def __call__(self, v: Tensor) -> Tensor:
        """The product with v."""
        ...


class Hessian:
    """Of a loss with respect to some leaves.

    Args:
        losses: parts that sum to the loss.
        leaves: tensors that require gradients; what does not enter a loss has zeros.
        keep: whether the graph of the gradient stays in memory between products; by default if there is one part.
            Whatever it was computed from must not change meanwhile.
    """

    def __init__(self, losses: Sequence[Loss], leaves: Sequence[Tensor], *, keep: bool | None = None) -> None:
        self.space = Space(leaves)
        self._losses, self._leaves = list(losses), list(leaves)
        self._keep = len(self._losses) == 1 if keep is None else keep
        self._kept: list[list[Tensor]] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        parts = self.space.split(v)
        for index in range(len(self._losses)):
            total += self._product(self._gradient(index), parts)
        return total

    def gradient(self) -> Tensor:
        """Of the loss itself."""
        total = torch.zeros(self.space.size, dtype=self.space.dtype, device=self.space.device)
        for index in range(len(self._losses)):
            total += self.space.join([part.detach() for part in self._gradient(index)])
        return total

    def _gradient(self, index: int) -> list[Tensor]:
        """Of a part, with its graph."""
        if not self._keep:
            return gradient_graph(self._losses[index](), self._leaves)
        if self._kept is None:
            self._kept = [gradient_graph(loss(), self._leaves) for loss in self._losses]
        return self._kept[index]

    def _product(self, gradient: list[Tensor], parts: list[Tensor]) -> Tensor:
        # A gradient that does not depend on any leaf has no graph: its derivative is 0.
        pairs = [(g, v) for g, v in zip(gradient, parts, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros(self.space.size, dtype=self.space.dtype, device=self.space.device)
        outputs, vectors = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs, self._leaves, vectors, retain_graph=self._keep, allow_unused=True, materialize_grads=True
        )
        return self.space.join(found)


def gradient_graph(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient, itself differentiable; zeros for leaves that the loss does not depend on."""
    return list(torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True))


class Part(NamedTuple):
    """One of several losses that sum to the loss."""

    outputs: Callable[[], Tensor]
    """z, from the leaves."""
    loss: Callable[[Tensor], Tensor]
    """ℓ of z."""


class Rows(NamedTuple):
    """Some rows of z = head(h), and what they add to the loss."""

    at: slice
    """Which rows of h."""
    outputs: Callable[[Tensor], Tensor]
    """Those of z, from those of h and the leaves."""
    loss: Callable[[Tensor], Tensor]
    """ℓ of them."""


class PartInRows(NamedTuple):
    """A part whose outputs are too large to be in memory at once: they are made of h some rows at a time."""

    hidden: Callable[[], Tensor]
    """h, (N, …), from the leaves."""
    rows: Sequence[Rows]


class GaussNewton:
    """Of losses of outputs, with respect to some leaves: the Hessian without the second derivatives of the outputs.

    Args: as those of `Hessian`.
    """

    def __init__(
        self, parts: Sequence[Part | PartInRows], leaves: Sequence[Tensor], *, keep: bool | None = None
    ) -> None:
        self.space = Space(leaves)
        self._parts, self._leaves = list(parts), list(leaves)
        self._keep = len(self._parts) == 1 if keep is None else keep
        self._kept: list[Jacobian] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        total, vectors = torch.zeros_like(v), self.space.split(v)
        for index, part in enumerate(self._parts):
            linear = self._linear(index)
            if isinstance(part, Part):
                u = second_derivative(part.loss, linear.z, linear.push(vectors))
            else:
                u, own = self._through_rows(part, linear, vectors)
                total += own
            total += self.space.join(linear.pull(u))
        return total

    def _through_rows(self, part: PartInRows, linear: Jacobian, vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What comes back to h, and to the leaves by other ways than through h, such as the head's own weight."""
        pushed, back = linear.push(vectors), torch.zeros_like(linear.z)
        own = torch.zeros(self.space.size, dtype=self.space.dtype, device=self.space.device)
        for rows in part.rows:
            h = linear.z[rows.at].clone().requires_grad_()
            head = Jacobian(rows.outputs(h), [h, *self._leaves])
            u = second_derivative(rows.loss, head.z, head.push([pushed[rows.at], *vectors]))
            back[rows.at], *found = head.pull(u)
            own += self.space.join(found)
        return back, own

    def _linear(self, index: int) -> Jacobian:
        if not self._keep:
            return self._outputs(index)
        if self._kept is None:
            self._kept = [self._outputs(i) for i in range(len(self._parts))]
        return self._kept[index]

    def _outputs(self, index: int) -> Jacobian:
        part = self._parts[index]
        return Jacobian(part.outputs() if isinstance(part, Part) else part.hidden(), self._leaves)


class Jacobian:
    """Products with the Jacobian J of outputs z."""

    def __init__(self, z: Tensor, leaves: Sequence[Tensor]) -> None:
        self._graph, self._leaves = z, list(leaves)
        self.z = z.detach()
        # Jᵀu is linear in u: differentiated with respect to u, whatever u is, it gives J v. No forward mode is needed,
        # which not every kernel has.
        self._u = torch.zeros_like(z, requires_grad=True)
        self._pulled: list[Tensor] | None = None

    def push(self, parts: Sequence[Tensor]) -> Tensor:
        """J v."""
        if self._pulled is None:
            self._pulled = list(self._pull(self._u, create_graph=True))
        pairs = [(p, v) for p, v in zip(self._pulled, parts, strict=True) if p.requires_grad]
        if not pairs:
            return torch.zeros_like(self.z)
        outputs, vectors = zip(*pairs, strict=True)
        (found,) = torch.autograd.grad(outputs, self._u, vectors, retain_graph=True)
        return found

    def pull(self, u: Tensor) -> Sequence[Tensor]:
        """Jᵀ u."""
        return self._pull(u, create_graph=False)

    def _pull(self, u: Tensor, *, create_graph: bool) -> Sequence[Tensor]:
        if not self._graph.requires_grad:  # the outputs depend on no leaf
            return [torch.zeros_like(leaf) for leaf in self._leaves]
        return torch.autograd.grad(
            self._graph,
            self._leaves,
            u,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )


def second_derivative(loss: Callable[[Tensor], Tensor], z: Tensor, u: Tensor) -> Tensor:
    """The Hessian of a loss at z, times u; nothing of z's own history enters."""
    z = z.detach().requires_grad_()
    (gradient,) = gradient_graph(loss(z), [z])
    if not gradient.requires_grad:
        return torch.zeros_like(z)
    (found,) = torch.autograd.grad(gradient, z, u, allow_unused=True, materialize_grads=True)
    return found


class FiniteDifference:
    r"""A Hessian from gradients at two points: central differences, with an error of order $h^2$.

    It needs kernels with one derivative only, and changes the leaves in place, to put them back afterwards bit by bit.

    Args:
        gradient: of the loss at the leaves as they are, flat.
        leaves: where they are.
        step: h, of a vector v scaled to the norm of the leaves; by default $\epsilon^{2/5}$ of the dtype, since
            $\epsilon^{1/3}$, which is usual, assumes a loss smoother than that of a network.
        extrapolated: whether to take the differences at h and h / 2, from whose combination the error of order $h^2$
            falls out (Richardson), for twice the gradients.
        size: a norm to take in place of that of the leaves, which may be offsets from something.
        space: of the leaves, if they are parts of tensors that are spread over processes.
        by_leaf: whether v is scaled so that no leaf moves by more than h of its own norm, with h = $\epsilon^{3/5}$ by
            default. A vector that lives in a few entries, as an eigenvector may, would otherwise move these by many
            times their size; for the same reason h is smaller.
    """

    def __init__(
        self,
        gradient: Callable[[], Tensor],
        leaves: Sequence[Tensor],
        *,
        step: float | None = None,
        size: Tensor | None = None,
        extrapolated: bool = False,
        space: Space | None = None,
        by_leaf: bool = False,
    ) -> None:
        self.space, self._size, self._extrapolated = space or Space(leaves), size, extrapolated
        self._by_leaf = by_leaf
        self.doubt: Tensor | None = None
        """How far apart the two estimates of the last extrapolated product are: no less than their error, as a rule."""
        self._gradient, self._leaves = gradient, list(leaves)
        self._step = torch.finfo(self.space.dtype).eps ** (0.6 if by_leaf else 0.4) if step is None else step

    def __call__(self, v: Tensor) -> Tensor:
        length = self.space.norm(v)
        if length == 0:
            return torch.zeros_like(v)
        before = [leaf.detach().clone() for leaf in self._leaves]
        h, parts = self._step / self._share(v, before, length), self.space.split(v)
        try:
            found = self._central(before, parts, h)
            if not self._extrapolated:
                return found
            half = self._central(before, parts, h / 2)
            self.doubt = half - found
            return half + self.doubt / 3
        finally:
            self._move(before, parts, torch.zeros_like(h))

    def _share(self, v: Tensor, before: Sequence[Tensor], length: Tensor) -> Tensor:
        """How long v is beside what it moves."""
        flat = self.space.join(before)
        if self._by_leaf:
            moved, sizes = self.space.norms(v), self.space.norms(flat)
            return (moved / torch.where(sizes > 0, sizes, self.space.norm(flat))).max()
        scale = self.space.norm(flat) if self._size is None else self._size
        return length / (scale if scale > 0 else torch.ones_like(scale))

    def _central(self, before: Sequence[Tensor], parts: Sequence[Tensor], h: Tensor) -> Tensor:
        return (self._at(before, parts, h) - self._at(before, parts, -h)) / (2 * h)

    def _at(self, before: Sequence[Tensor], parts: Sequence[Tensor], h: Tensor) -> Tensor:
        self._move(before, parts, h)
        return self._gradient()

    @torch.no_grad()
    def _move(self, before: Sequence[Tensor], parts: Sequence[Tensor], h: Tensor) -> None:
        for leaf, old, part in zip(self._leaves, before, parts, strict=True):
            # `data`: graphs that others keep stay good, since everything is put back bit by bit.
            leaf.data.copy_(old if h == 0 else old + h * part)


class Scaled:
    """S A S with a diagonal S.

    With $S = P^{-1/2}$ its eigenvalues are those of $P^{-1} A$: what a step of $-\\eta P^{-1} \\nabla \\ell$ sees.
    """

    def __init__(self, operator: Operator, diagonal: Tensor) -> None:
        assert diagonal.shape == (operator.space.size,)
        self.space = operator.space
        self._operator, self._diagonal = operator, diagonal

    def __call__(self, v: Tensor) -> Tensor:
        return self._diagonal * self._operator(self._diagonal * v)
