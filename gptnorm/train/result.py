"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass

from gptnorm.train.run_folder import Status


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is known of a run that came to an end."""

    status: Status
    step: int
    """Updates done, those that were left out counted."""
    val_loss: float | None
    """Validation loss in nats per token after the last update; None if there was none."""
    reason: str | None
    """What was non-finite first, if it diverged; the signal, if one stopped it."""
    parameters: int
    seconds: float
    """Wall-clock time of the loop without its validations, resumed parts added up."""
    skipped: int = 0
    """Updates left out (`guard.sigmas`)."""
