r"""Which updates are left out, decided on the device: no step waits for the host to look at a number.

With the losses $\ell$ and gradient norms $g$ of the last `window` steps, an update is left out if

$$\ell_t > \bar\ell + k\,s_\ell \quad\text{or}\quad g_t > \bar g + k\,s_g,$$

mean and standard deviation (ddof 1) over the steps before t, k = `guard.sigmas` (the rule of OLMo's skip-step
optimizer). A spike that was left out enters the window too, so that a level that stays is accepted in time.

Whatever is not finite is left out as well, and so is every update after it: when the host looks, be it many steps
later, the weights are still those that met the first such number, but for what follows every step whatever came of it
(constraints, QK-clip, the bias of routers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptnorm.config import GuardConfig


class Guard:
    """Judges updates; its tensors belong to a checkpoint."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self.sigmas = config.sigmas
        self.nonfinite_at = 0
        """The first update (from 1) with a loss or gradient norm that is not finite, as of the last look; 0: none."""
        self.skipped = 0
        """Updates left out as spikes, as of the last look."""
        self._nonfinite_at = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        self._window = torch.zeros(2, config.window, dtype=torch.float64, device=device)

    def judge(self, update: int, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 where the update must be left out, else 0.0: a float32 scalar on the device.

        Args:
            update: its number, from 1.
            loss, norm: scalars on the device.
        """
        values = torch.stack((loss.double(), norm.double()))
        finite = values.isfinite().all()
        self._nonfinite_at.copy_(torch.where(finite | (self._nonfinite_at > 0), self._nonfinite_at, update))
        leave_out = self._nonfinite_at > 0
        if self.sigmas is not None:
            mean, sd = self._window.mean(1), self._window.std(1)
            full = self._seen >= self._window.shape[1]
            spike = full & (values > mean + self.sigmas * sd).any() & ~leave_out
            self._skipped += spike
            place = torch.arange(self._window.shape[1], device=loss.device) == self._seen % self._window.shape[1]
            self._window.copy_(torch.where(place & finite, values[:, None], self._window))
            self._seen += finite
            leave_out = leave_out | spike
        return leave_out.float()

    def look(self, *values: Tensor) -> list[float]:
        """Waits for the device, once: `nonfinite_at` and `skipped` as they are now, and the scalars as numbers."""
        everything = (self._nonfinite_at, self._skipped, *values)
        nonfinite_at, skipped, *numbers = torch.stack([value.double() for value in everything]).tolist()
        self.nonfinite_at, self.skipped = int(nonfinite_at), int(skipped)
        return numbers

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name; filled in place when one is read."""
        if self.sigmas is None:
            return {}
        return {"skipped": self._skipped, "seen": self._seen, "window": self._window}
