"""One transformer, its backbones and its published sizes."""

from gptnorm.model.gpt import GPT, build_gpt

__all__ = ["GPT", "build_gpt"]
