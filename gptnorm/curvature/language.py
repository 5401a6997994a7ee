r"""The loss of a GPT on some batches as operators on its parameters.

The loss is what training minimises, the mean over the batches of `GPT.objective`: cross-entropy in nats per token, with
the auxiliary losses of options and experts. The Gauss-Newton matrix is that of cross-entropy and z-loss as functions of
the logits after any soft-cap; losses of routers are no function of the logits, and are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gptnorm.curvature.operators import FiniteDifference, GaussNewton, Hessian, Part, PartInRows, Rows
from gptnorm.curvature.reference import reference_paths
from gptnorm.errors import bad_value
from gptnorm.model import GPT

MOST_LOGITS = 1 << 24
"""Of a micro-batch, above which the Gauss-Newton matrix, which holds several copies, makes them in turns."""


class LanguageLoss:
    """A model and the batches on which its loss is differentiated.

    Everything is to be used inside `with loss.measuring():`, which puts kernels in place that can be differentiated
    twice, and lets only the chosen parameters have gradients.

    Args:
        batches: tokens (B, T + 1) each, of the same T: micro-batches, one in memory at a time. Rows count equally.
        names: of parameters; by default all of them. See `parameters_of`.
    """

    def __init__(self, model: GPT, batches: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
        assert batches
        parameters = dict(model.named_parameters(remove_duplicate=names is None))
        self.model, self._batches = model, list(batches)
        self.names = list(parameters) if names is None else list(names)
        self.leaves = [parameters[name] for name in self.names]
        self._rows = sum(len(tokens) for tokens in self._batches)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """See the class."""
        every = list(self.model.parameters())
        before = [parameter.requires_grad for parameter in every]
        chosen = set(map(id, self.leaves))
        try:
            for parameter in every:
                parameter.requires_grad_(id(parameter) in chosen)
            with reference_paths(self.model):
                yield
        finally:
            for parameter, had in zip(every, before, strict=True):
                parameter.requires_grad_(had)

    def value(self) -> float:
        """The loss."""
        with torch.no_grad():
            return sum(float(loss()) for loss in self._losses())

    def gradient(self) -> Tensor:
        """Of the loss, flat: a backward pass for each micro-batch."""
        total: Tensor | None = None
        for loss in self._losses():
            found = torch.autograd.grad(loss(), self.leaves, allow_unused=True, materialize_grads=True)
            flat = torch.cat([part.reshape(-1) for part in found])
            total = flat if total is None else total + flat
        assert total is not None
        return total

    def hessian(self, *, keep: bool | None = None) -> Hessian:
        """Of the loss; `keep` as there."""
        return Hessian(self._losses(), self.leaves, keep=keep)

    def gauss_newton(self, *, keep: bool | None = None, most_logits: int = MOST_LOGITS) -> GaussNewton:
        """Of the loss; `keep` as there.

        Args:
            most_logits: in memory at once; where a micro-batch has more, each product goes through the head again.
        """
        return GaussNewton([self._part(tokens, most_logits) for tokens in self._batches], self.leaves, keep=keep)

    def finite_difference(self, *, step: float | None = None, extrapolated: bool = False) -> FiniteDifference:
        """The Hessian from two gradients, or four; arguments as there."""
        return FiniteDifference(self.gradient, self.leaves, step=step, extrapolated=extrapolated)

    def _losses(self) -> list[Callable[[], Tensor]]:
        def part(tokens: Tensor) -> Callable[[], Tensor]:
            return lambda: self.model.objective(tokens).total * (len(tokens) / self._rows)

        return [part(tokens) for tokens in self._batches]

    def _part(self, tokens: Tensor, most_logits: int) -> Part | PartInRows:
        targets, vocab = tokens[:, 1:].flatten(), self.model.shape.vocab
        share = len(tokens) / self._rows / len(targets)
        if len(targets) * vocab <= most_logits:
            return Part(
                outputs=lambda: self.model(tokens[:, :-1]).flatten(0, 1),
                loss=lambda logits: share * self._summed(logits, targets),
            )

        def rows(at: slice) -> Rows:
            return Rows(
                at=at,
                outputs=self.model.read_out,
                loss=lambda logits: share * self._summed(logits, targets[at]),
            )

        step = max(1, most_logits // vocab)
        return PartInRows(
            hidden=lambda: self.model.features(tokens[:, :-1]).flatten(0, 1),
            rows=[rows(slice(start, start + step)) for start in range(0, len(targets), step)],
        )

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of rows of logits (N, V), summed over them."""
        total = F.cross_entropy(logits, targets, reduction="sum")
        if z_loss := self.model.logits.z_loss:
            total = total + z_loss * logits.logsumexp(-1).square().sum()
        return total


def parameters_of(model: GPT, part: str) -> list[str]:
    """The names of the parameters of a part: "all", a module such as "blocks.2" or "blocks.0.attn.q", or one parameter.

    Raises:
        UserError: there is none of that name.
    """
    # A tied head is its embedding, once in "all", and by either name else.
    names = [name for name, _ in model.named_parameters(remove_duplicate=part == "all")]
    found = [name for name in names if part in ("all", name) or name.startswith(f"{part}.")]
    if not found:
        example = names[len(names) // 2]
        raise bad_value("--part", part, f'no parameter is called so; "all", "blocks.0", or one such as {example}')
    return found
