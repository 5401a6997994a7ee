"""Perplexity and bits per byte of a trained run on any text.

- `windows.cut_windows` says which tokens are read together, and which are scored; it needs no torch;
- `score.Scorer` asks a model for the log-likelihood of documents; `numbers.Score` is what comes out;
- `texts` finds a run's own text and tokenizer and opens others, `trained_on` knows what the run was trained on.
"""

from gptnorm.evaluate.documents import Document
from gptnorm.evaluate.numbers import Score, ratio_error
from gptnorm.evaluate.score import Scorer
from gptnorm.evaluate.windows import Window, cut_windows

__all__ = ["Document", "Score", "Scorer", "Window", "cut_windows", "ratio_error"]
