"""What became non-finite first, for a run that must stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def first_nonfinite(model: nn.Module, loss: Callable[[], Tensor]) -> str:
    """Names the first non-finite thing of the forward pass, else of the backward pass.

    `loss` repeats the batch; the weights must still be those that met it. A weight that is itself
    non-finite comes first, then the first module whose output is, then the loss, then the gradient
    nearest to the loss.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"weight {name}"

    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not found and not all(tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(f"output of {name or 'the model'}")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        model.zero_grad(set_to_none=True)
        # Compiled blocks would not ask for the hooks.
        with torch.compiler.set_stance("force_eager"):
            value = loss()
        if not found and value.isfinite():
            value.backward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    if not value.isfinite():
        return "loss"
    # Backward runs from the head to the embedding, so the last parameter is met first.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"gradient of {name}"
    return "norm of the gradient"


def _tensors(output: object) -> Iterator[Tensor]:
    """Every tensor of a module's output: a router's logits and gates, a mixture's sum and losses, a block's streams."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple):
        for part in output:
            yield from _tensors(part)
