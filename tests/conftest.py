"""What every test gets: one thread (small tensors gain nothing from more), a cache of its own, and, for the
asking, a small text and a recipe whose run takes a tenth of a second."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
eval_sequences = 8
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GPTNORM_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


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
