"""A small text and a small recipe; a run of it takes a tenth of a second."""

from __future__ import annotations

from pathlib import Path

import pytest

RECIPE = """
[model]
strategy = "prenorm"
d_model = 16
n_layers = 1
n_heads = 2
d_ff = 32

[data]
path = "{text}"

[train]
steps = 6
batch_size = 4
seq_len = 16
threads = 1
device = "cpu"
eval_batches = 2
"""


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The quick brown fox number {i} jumps over {i * i} dogs.\n" for i in range(600)))
    return path


@pytest.fixture(scope="session")
def recipe(text: Path) -> Path:
    path = text.with_name("tiny.toml")
    path.write_text(RECIPE.format(text=text))
    return path
