"""Thirty-two blocks: where the norm and where the depth factor stand, each at its own best learning rate.

    python benchmarks/deep_stacks.py docs/results

The recipe is `study/deep32`, the page `docs/results/deep-stacks.md`; own_best.py says how rates are picked.
"""

from __future__ import annotations

from pathlib import Path

from own_best import Comparison, Row, main

HEAD = """# Thirty-two blocks: where the norm and the depth factor stand

Llama 2 backbone, d 64, 32 blocks, 64 bytes of Python source, 200 steps of 4 sequences, every map of unit gain at the
start (`init.std=unit`), AdamW with epsilon 1e-12, the same data in the same order for every cell of a seed. The depth
factor (2L)^-½ stands in the initialisation of W_o and W_down (init), or multiplies both branches in the forward pass,
or the feed-forward branch alone (SpanNorm's preset). The rate was picked on seed 0, the losses are of seeds 1 to 5.
Small and short: it tells how unsteady a placement is, not how good at the end. Made by
`python benchmarks/deep_stacks.py docs/results` from the ledgers beside this page.

"""


def _row(strategy: str, mode: str, target: str) -> Row:
    return Row(
        name=f"{strategy}-{mode}",
        strategy=strategy,
        setting=f"{mode}, {'both branches' if target == 'both' else 'feed-forward'}",
        settings=(f"options.scale_mode={mode}", f"options.scale_target={target}"),
    )


COMPARISON = Comparison(
    prefix="deep32",
    recipe="study/deep32",
    column="factor",
    rows=(
        _row("prenorm", "init", "both"),
        _row("prenorm", "forward", "both"),
        _row("postnorm", "init", "both"),
        _row("postnorm", "forward", "both"),
        _row("spannorm", "init", "both"),
        _row("spannorm", "forward", "ffn"),
    ),
    baseline="prenorm-init",
)


def page(root: Path) -> str:
    """docs/results/deep-stacks.md."""
    return COMPARISON.page(root, HEAD)


if __name__ == "__main__":
    main(COMPARISON, HEAD, "deep-stacks.md", __doc__)
