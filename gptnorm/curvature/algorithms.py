r"""What can be learned of a symmetric operator from its products.

| function | finds | says how sure it is by |
|---|---|---|
| `power_iteration` | the eigenvalue of largest modulus | its residual $\lVert A v - \lambda v \rVert$ |
| `lanczos` | the largest and smallest eigenvalues | each one's residual |
| `ritz_value` | the largest eigenvalue, or that of largest modulus | its residual, as the recurrence knows it |
| `spectral_density` | the distribution of eigenvalues | the spread over probes |
| `hutchinson`, `hutch_pp` | the trace | the standard error over probes |

A symmetric operator has an eigenvalue within the residual of λ. That it is the outermost one no number of products
proves: a direction on which the start has no weight stays hidden. A tighter estimate, the residual squared over the gap
to the other values found, is not used: where the outermost eigenvalues are close, it is small before the last of them
has come out.

Everything is drawn from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptnorm.curvature.operators import Operator
from gptnorm.curvature.vectors import Space
from gptnorm.errors import UserError

MOST_STEPS = 200
"""Products after which an iteration gives up."""

FEWEST_STEPS = 10
"""Products before Lanczos may stop: an unlucky start hides an eigenvalue from the first few."""

_ROUNDING = 16
"""Roundings of the dtype below which a number is none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Eigenpair:
    """An eigenvalue with its vector, as far as it has converged."""

    value: float
    vector: Tensor
    """Of length 1."""
    residual: float
    """‖A v - λ v‖: some eigenvalue is no further from `value`."""
    products: int
    """Products that it took, those of the other pairs of the same call included."""

    def converged(self, tolerance: float) -> bool:
        """Whether the residual is at most that part of the value."""
        return self.residual <= tolerance * abs(self.value)


def power_iteration(
    operator: Operator,
    *,
    tolerance: float = 1e-3,
    most: int = MOST_STEPS,
    seed: int = 0,
    start: Tensor | None = None,
) -> Eigenpair:
    """The eigenvalue of largest modulus.

    Args:
        tolerance: of the residual, relative to the value; it stops there, or after `most` products.
        start: a vector to begin with, not 0; None: drawn from the seed.
    """
    space = operator.space
    v = _unit(space, _draw(operator, seed) if start is None else start)
    for count in range(1, most + 1):
        w = operator(v)
        value = float(space.inner(v, w))
        residual = float(space.norm(w - value * v))
        length = space.norm(w)
        if residual <= tolerance * abs(value) or length == 0 or count == most:
            return Eigenpair(value=value, vector=v, residual=residual, products=count)
        v = w / length
    raise AssertionError("most must be 1 or more")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tridiagonal:
    """A on a Krylov space: Q's rows are orthonormal, Q A Qᵀ is tridiagonal."""

    alphas: list[float]
    """Its diagonal."""
    betas: list[float]
    """Beside it; the last is the norm of what leaves the space, 0 where it is invariant."""
    basis: Tensor
    """Q, (steps, size)."""

    def eigen(self) -> tuple[Tensor, Tensor]:
        """See `eigen`."""
        return eigen(self.alphas, self.betas)


def eigen(alphas: Sequence[float], betas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Ritz values, ascending, and the eigenvectors of the tridiagonal matrix as columns, both in fp64."""
    diagonal, beside = (torch.tensor(x, dtype=torch.float64) for x in (alphas, betas[:-1]))
    return torch.linalg.eigh(torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1))


class Krylov:
    """A Lanczos recurrence that can go on.

    Args:
        whole: keep a vector for each step and make each new one orthogonal to all of them. If not, two are kept: the
            ends of the spectrum still come out, some of them again later on, as copies (Paige 1980), without vectors.
    """

    def __init__(self, operator: Operator, start: Tensor, *, whole: bool = True) -> None:
        self._operator, self._space, self._whole = operator, operator.space, whole
        self._kept = _unit(self._space, start)[None]
        self._count = 1
        self.alphas: list[float] = []
        self.betas: list[float] = []

    def step(self) -> bool:
        """One product more; False if the space is invariant, so that nothing is left to find."""
        space, basis = self._space, self._kept[: self._count]
        w = self._operator(basis[-1])
        self.alphas.append(float(space.inner(basis[-1], w)))
        if not math.isfinite(self.alphas[-1]):
            raise UserError("curvature: a Hessian product is not finite; are the weights?")
        for _ in range(2):  # twice is enough: once leaves an error of the size of what was taken away
            w = w - basis.mT @ space.inner(basis, w)
        beta = float(space.norm(w))
        self.betas.append(beta)
        scale = max(map(abs, (*self.alphas, *self.betas)))
        if len(self.alphas) == space.dimension or beta <= _ROUNDING * torch.finfo(w.dtype).eps * scale:
            self.betas[-1] = 0.0
            return False
        self._keep(w / beta)
        return True

    @property
    def found(self) -> Tridiagonal:
        """What the steps so far have found."""
        assert self._whole, "vectors were not kept"
        return Tridiagonal(alphas=list(self.alphas), betas=list(self.betas), basis=self._kept[: len(self.alphas)])

    def _keep(self, v: Tensor) -> None:
        if not self._whole:
            self._kept, self._count = torch.stack((self._kept[-1], v)), 2
            return
        if self._count == len(self._kept):
            room = min(2 * self._count, self._space.dimension) - self._count
            self._kept = torch.cat([self._kept, self._kept.new_empty(room, len(v))])
        self._kept[self._count] = v
        self._count += 1


def lanczos(
    operator: Operator,
    *,
    largest: int = 1,
    smallest: int = 0,
    tolerance: float = 1e-3,
    most: int = MOST_STEPS,
    seed: int = 0,
    start: Tensor | None = None,
) -> tuple[list[Eigenpair], list[Eigenpair]]:
    """The eigenvalues at both ends of the spectrum.

    Eigenvalues that are equal are found once: a Krylov space holds one vector of each eigenspace.

    Args:
        largest, smallest: how many of each.
        tolerance: of each residual, relative to the largest modulus found; it stops where all keep it at two steps
            running, where nothing is left to find, or after `most` products.
        start: as for `power_iteration`.

    Returns:
        The largest, descending, and the smallest, ascending; fewer where the space is exhausted. Each residual is that
        of a product more: the recurrence's own, in fp32, falls below what rounding leaves.
    """
    space, krylov = operator.space, Krylov(operator, _draw(operator, seed) if start is None else start)

    def settled(values: Tensor, residuals: Tensor) -> bool:
        count = len(values)
        wanted = [*range(count - largest, count), *range(smallest)]
        return count >= len(wanted) and bool((residuals[wanted] <= tolerance * values.abs().max()).all())

    _iterate(krylov, settled, most, FEWEST_STEPS)
    found = krylov.found
    values, vectors = found.eigen()
    count = len(values)
    ends = [*(count - 1 - i for i in range(min(largest, count))), *range(min(smallest, count))]

    def pair(index: int) -> Eigenpair:
        v, value = _unit(space, found.basis.mT @ vectors[:, index].to(found.basis)), float(values[index])
        residual = float(space.norm(operator(v) - value * v))
        return Eigenpair(value=value, vector=v, residual=residual, products=count + len(ends))

    pairs = [pair(index) for index in ends]
    return pairs[: min(largest, count)], pairs[min(largest, count) :]


@dataclass(frozen=True, kw_only=True)
class RitzValue:
    """An eigenvalue without its vector; as `Eigenpair`, but with the recurrence's own residual."""

    value: float
    residual: float
    products: int


def ritz_value(
    operator: Operator,
    *,
    modulus: bool = False,
    tolerance: float = 1e-3,
    most: int = MOST_STEPS,
    fewest: int = FEWEST_STEPS,
    seed: int = 0,
) -> RitzValue:
    """The largest eigenvalue, with three vectors in memory in place of one for each product, and no product for its
    residual, which is no less than the dtype's rounding of the largest modulus.

    Meant for tolerances far above that rounding, near which the vectors lose their orthogonality.

    Args:
        modulus: that of the largest modulus instead; it stops only where the other end of what was found is less far
            out, its residual added.
        tolerance: of the residual, relative to the value.
        most: as for `lanczos`.
        fewest: products before it may stop.
    """

    def chosen(values: Tensor) -> int:
        return int(values.abs().argmax()) if modulus else len(values) - 1

    def settled(values: Tensor, residuals: Tensor) -> bool:
        index = chosen(values)
        other = 0 if index else len(values) - 1
        certain = not modulus or index == other or abs(values[other]) + residuals[other] <= abs(values[index])
        return bool(certain) and bool(residuals[index] <= tolerance * abs(values[index]))

    krylov = Krylov(operator, _draw(operator, seed), whole=False)
    _iterate(krylov, settled, most, fewest)
    values, vectors = eigen(krylov.alphas, krylov.betas)
    index, rounding = chosen(values), _ROUNDING * torch.finfo(operator.space.dtype).eps * float(values.abs().max())
    residual = float(_residuals(krylov, vectors)[index])
    return RitzValue(value=float(values[index]), residual=max(residual, rounding), products=len(values))


Settled = Callable[[Tensor, Tensor], bool]
"""Whether all that is wanted has been found, given Ritz values, ascending, and their residuals."""


def _iterate(krylov: Krylov, settled: Settled, most: int, fewest: int) -> None:
    """Steps until it is settled twice running, nothing is left to find, or `most` products."""
    running = 0
    for count in range(1, most + 1):
        more = krylov.step()
        values, vectors = eigen(krylov.alphas, krylov.betas)
        running = running + 1 if settled(values, _residuals(krylov, vectors)) else 0
        if not more or (running > 1 and count >= fewest):
            break


def _residuals(krylov: Krylov, vectors: Tensor) -> Tensor:
    """Of each Ritz pair, by the recurrence."""
    return krylov.betas[-1] * vectors[-1].abs()


@dataclass(frozen=True, kw_only=True, eq=False)
class Density:
    """A spectrum as points with weights that sum to 1."""

    values: Tensor
    """Eigenvalues, (probes, steps), fp64."""
    weights: Tensor
    """Of each, (probes, steps); a row sums to 1."""

    def mean(self, f: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The mean of f(λ) over the spectrum, and its standard error over probes: nan from one probe."""
        value, error = _mean_and_error((self.weights * f(self.values)).sum(1).tolist())
        return value, math.nan if error is None else error

    def on_grid(self, grid: Tensor, width: float) -> Tensor:
        """The density at each point of a grid, each eigenvalue a Gaussian of that standard deviation."""
        gaps = (grid[:, None, None] - self.values) / width
        bumps = torch.exp(-0.5 * gaps.square()) / (width * math.sqrt(2 * math.pi))
        return (bumps * self.weights).sum(-1).mean(-1)


def spectral_density(operator: Operator, *, steps: int = 60, probes: int = 4, seed: int = 0) -> Density:
    r"""Stochastic Lanczos quadrature: Gauss quadrature of the spectral measure of random vectors.

    Of the moments up to 2 · steps - 1 only the probes' randomness is an error.

    Source: Ghorbani, Krishnan and Xiao 2019 (arXiv 1901.10159); Ubaru, Chen and Saad 2017.
    """
    generator = torch.Generator().manual_seed(seed)
    values, weights = torch.zeros(2, probes, steps, dtype=torch.float64)
    for probe in range(probes):
        krylov = Krylov(operator, operator.space.draw(generator))
        for _ in range(steps):
            if not krylov.step():
                break
        nodes, vectors = krylov.found.eigen()
        values[probe, : len(nodes)] = nodes
        weights[probe, : len(nodes)] = vectors[0].square()
    return Density(values=values, weights=weights)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """An estimate of a trace."""

    value: float
    error: float | None
    """Standard error over probes; None where there is none to be had."""
    products: int


def hutchinson(operator: Operator, *, probes: int = 32, seed: int = 0) -> Trace:
    """The mean of zᵀ A z over vectors z of random signs."""
    generator = torch.Generator().manual_seed(seed)
    found = [_form(operator, _signs(operator, generator)) for _ in range(probes)]
    value, error = _mean_and_error(found)
    return Trace(value=value, error=error, products=probes)


def hutch_pp(operator: Operator, *, probes: int = 32, seed: int = 0) -> Trace:
    """Hutch++: a third of the products finds a subspace that holds most of A, whose trace is then exact; the rest is
    estimated on what is orthogonal to it.

    The error falls as 1 / probes where that of `hutchinson` falls as its root.

    Source: Meyer, Musco, Musco and Woodruff 2021 (arXiv 2010.09649), Algorithm 1.
    """
    third = max(1, probes // 3)
    generator = torch.Generator().manual_seed(seed)
    # Normal vectors, not signs: in few dimensions those may be equal.
    space = operator.space
    sketch = torch.stack([operator(space.draw(generator)) for _ in range(min(third, space.dimension))])
    q = _orthonormal(space, sketch)
    exact = sum(_form(operator, row) for row in q)
    found = []
    for _ in range(third):
        z = _signs(operator, generator)
        found.append(_form(operator, z - q.mT @ space.inner(q, z)))
    value, error = _mean_and_error(found)
    return Trace(value=exact + value, error=error, products=2 * len(q) + third)


def _orthonormal(space: Space, rows: Tensor) -> Tensor:
    """An orthonormal basis of what the rows span, in their place: Gram-Schmidt, twice."""
    count = 0
    for index in range(len(rows)):
        row, length = rows[index], space.norm(rows[index])
        for _ in range(2):
            row = row - rows[:count].mT @ space.inner(rows[:count], row)
        if space.norm(row) > _ROUNDING * torch.finfo(rows.dtype).eps * length:
            rows[count] = _unit(space, row)
            count += 1
    return rows[:count]


def _form(operator: Operator, v: Tensor) -> float:
    return float(operator.space.inner(v, operator(v)))


def _draw(operator: Operator, seed: int) -> Tensor:
    return operator.space.draw(torch.Generator().manual_seed(seed))


def _signs(operator: Operator, generator: torch.Generator) -> Tensor:
    return operator.space.draw(generator).sign()


def _unit(space: Space, v: Tensor) -> Tensor:
    return v / space.norm(v)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
