r"""What becomes of the norms while a run trains, read now and then: `watch.jsonl` in the run folder.

At a watched step one more forward pass over a few of its sequences, with the weights before the update, gives per block

| key | meaning |
|---|---|
| stream_norm, stream_rms | mean over tokens of $\lVert h \rVert_2$ after the block, and its RMS |
| attn_norm, ffn_norm | the same of the branches' outputs, before any norm of the wiring after them |
| attn_variance, ffn_variance | their mean squares |
| cosine, token_cosine | $\cos(h_{l-1}, h_l)$; mean cosine of two tokens of a sequence (1: rank collapse) |
| logit_bound, logit_max | scale max‖q‖ max‖k‖, and the largest attention logit of these sequences; the worst head |
| heads | the same two of every head |
| gains | by norm or scale (numbered where a map has several): `mean` and `max` of $\lvert\gamma\rvert$ |
| update | by role: $\lVert \Delta W \rVert_F / \lVert W \rVert_F$ of the whole update, `after_step` included |

`update` needs the weights before the step: those of at most `UPDATED_BLOCKS` blocks, of the embedding and of the head
are copied, when the activations of the step are freed already, and let go after it.

The pass draws no random number, runs in eval mode, and goes around the compiled graph, so losses are the same bit by
bit with and without it.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gptnorm.config import WatchConfig
from gptnorm.model import GPT
from gptnorm.norms import DynamicTanhModule, FrozenModule, LearnedScaleModule, NormModule
from gptnorm.probe.measures import exact
from gptnorm.probe.trace import BlockTrace, traced

UPDATED_BLOCKS = 8
"""At most as many blocks, evenly chosen, have their updates measured."""

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]
Numbers = dict[str, list[float | None]]


class Watch:
    """Readings of one model; `before_step` and `after_step` stand around each update."""

    def __init__(self, model: GPT, config: WatchConfig, autocast: Autocast) -> None:
        self.model = model
        self.config = config
        self.autocast = autocast
        last, count = len(model.blocks) - 1, min(len(model.blocks), UPDATED_BLOCKS)
        self.updated_blocks = [round(i * last / max(1, count - 1)) for i in range(count)]
        self._read: dict[str, Any] | None = None
        self._old: list[tuple[str, int, Tensor, Tensor]] = []

    def due(self, step: int) -> bool:
        """Whether update number `step` (from 1) is watched: the first, and then every so many."""
        return self.config.every > 0 and (step == 1 or step % self.config.every == 0)

    def before_step(self, step: int, tokens_BT: Tensor) -> None:
        """Reads the forward pass and keeps the weights, if the step is due."""
        if not self.due(step):
            return
        self._read = self._forward(tokens_BT[: self.config.sequences])
        self._old = [
            (owner.role, owner.layer if name.startswith("blocks.") else -1, owner.weight, owner.weight.detach().clone())
            for name, owner in self.model.weights()
            if not name.startswith("blocks.") or owner.layer in self.updated_blocks
        ]

    def after_step(self) -> dict[str, Any] | None:
        """The whole reading, once the weights are updated; None if the step is not due."""
        if self._read is None:
            return None
        reading, self._read = self._read, None
        reading["update"] = self._updates()
        return reading

    @torch.no_grad()
    def _forward(self, tokens_BT: Tensor) -> dict[str, Any]:
        with traced(self.model) as trace, self.autocast():
            self.model.features(tokens_BT[:, :-1])
        columns: dict[str, list[Tensor]] = defaultdict(list)
        for seen in trace.blocks:
            for name, value in _block(seen).items():
                columns[name].append(value)
        gains = self._gains()
        # One wait for the device for everything.
        tensors = [value for column in columns.values() for value in column]
        tensors += [value for pair in gains.values() for column in pair.values() for value in column]
        heads = {"logit_bound": _stack(s.logit_bound_H for s in trace.blocks)}
        heads["logit_max"] = _stack(s.logit_max_H for s in trace.blocks)
        numbers = iter(_to_numbers([*tensors, *(value for table_LH in heads.values() for value in table_LH)]))
        reading: dict[str, Any] = {name: [next(numbers) for _ in column] for name, column in columns.items()}
        reading["gains"] = {
            name: {key: [next(numbers) for _ in column] for key, column in pair.items()} for name, pair in gains.items()
        }
        reading["heads"] = {
            name: [[next(numbers) for _ in row_H] for row_H in table_LH] for name, table_LH in heads.items()
        }
        return reading

    def _gains(self) -> dict[str, dict[str, list[Tensor]]]:
        """Mean and largest |gain| by the norm's place in a block; a block without that norm has nan."""
        nothing = torch.full((), math.nan, device=self.model.embed.weight.device)
        gains: list[tuple[int, str, str, Tensor]] = []
        for layer, block in enumerate(self.model.blocks):
            for name, module in block.named_modules():
                value = _gain(module)
                if value is not None:
                    owner, _, index = name.replace(".norm", "").removeprefix("own.").partition(".after.")
                    gains.append((layer, owner, index, value))
        counts = Counter((layer, owner) for layer, owner, _, _ in gains)
        several = {owner for (_, owner), count in counts.items() if count > 1}
        found: dict[str, dict[str, list[Tensor]]] = {}
        for layer, owner, index, value in gains:
            pair = found.setdefault(
                f"{owner}.{index}" if owner in several else owner,
                {"mean": [nothing] * len(self.model.blocks), "max": [nothing] * len(self.model.blocks)},
            )
            size = exact(value).abs()
            pair["mean"][layer], pair["max"][layer] = size.mean(), size.max()
        return found

    @torch.no_grad()
    def _updates(self) -> dict[str, Any]:
        """‖ΔW‖ / ‖W‖ by role: of the blocks in `blocks` (from 1), and of the weights outside."""
        squares: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
        while self._old:
            role, layer, new, old = self._old.pop()
            change = exact(new) - exact(old)
            squares[role, layer].append(torch.stack((change.square().sum(), exact(old).square().sum())))
        totals = {key: torch.stack(parts).sum(0) for key, parts in squares.items()}
        ratios = _to_numbers([(total[0] / total[1]).sqrt() for total in totals.values()])
        found = dict(zip(totals, ratios, strict=True))
        inside = dict.fromkeys(role for role, layer in reversed(found) if layer >= 0)
        return {
            "blocks": [layer + 1 for layer in self.updated_blocks],
            "ends": {role: ratio for (role, layer), ratio in reversed(found.items()) if layer < 0},
            "roles": {role: [found.get((role, layer)) for layer in self.updated_blocks] for role in inside},
        }


def summarize(reading: dict[str, Any]) -> dict[str, float]:
    """The few numbers that TensorBoard gets: the worst over blocks."""
    updates = [*reading["update"]["ends"].values(), *(r for row in reading["update"]["roles"].values() for r in row)]
    worst = {
        "stream_rms": reading["stream_rms"],
        "attn_variance": reading["attn_variance"],
        "ffn_variance": reading["ffn_variance"],
        "logit_bound": reading["logit_bound"],
        "logit_max": reading["logit_max"],
        "update_ratio": updates,
    }
    return {name: max(known) for name, values in worst.items() if (known := [v for v in values if v is not None])}


def _block(seen: BlockTrace) -> dict[str, Tensor]:
    m = seen.measured
    assert seen.logit_bound_H is not None
    assert seen.logit_max_H is not None
    return {
        "stream_norm": m["stream_norm"],
        "stream_rms": m["stream_square"].sqrt(),
        "attn_norm": m["attn_norm"],
        "ffn_norm": m["ffn_norm"],
        "attn_variance": m["attn_square"],
        "ffn_variance": m["ffn_square"],
        "cosine": m["cosine"],
        "token_cosine": m["token_cosine"],
        "logit_bound": seen.logit_bound_H.max(),
        "logit_max": seen.logit_max_H.max(),
    }


def _gain(module: torch.nn.Module) -> Tensor | None:
    if isinstance(module, NormModule | FrozenModule | DynamicTanhModule):
        return module.gain
    return module.value() if isinstance(module, LearnedScaleModule) else None


def _stack(rows: Iterable[Tensor | None]) -> Tensor:
    return torch.stack([row for row in rows if row is not None])


def _to_numbers(tensors: list[Tensor]) -> list[float | None]:
    """Plain numbers of six digits, None for what JSON cannot hold."""
    if not tensors:
        return []
    exactly = torch.cat([t.double().reshape(-1) for t in tensors]).tolist()
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in exactly]
