"""Text to batches: corpora, tokenizers, shards, and which tokens stand in which batch."""

from gptnorm.data.build import build_shards, prepare
from gptnorm.data.sampler import Sampler, validation_windows
from gptnorm.data.shards import Shards
from gptnorm.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Sampler", "Shards", "Tokenizer", "build_shards", "load_tokenizer", "prepare", "validation_windows"]
