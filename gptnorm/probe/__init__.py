"""Signal propagation: one forward and backward pass of a model, as plain numbers.

- `reading.probe` measures a model on a batch; `trace` holds the hooks that it shares with the watch of a
  training run; `measures` the formulas;
- `source.open_source` finds the model and the batch that a recipe or a run folder means;
- `show` makes the terminal's tables and the JSON record; the page is `gptnorm.report.probe_page`.
"""

from __future__ import annotations

from gptnorm.probe.reading import BlockReading, Probe, Slot, probe

__all__ = ["BlockReading", "Probe", "Slot", "probe"]
