"""One transformer, its backbones and its published sizes."""

from gptnorm.model.gpt import GPT, Objective, build_gpt

__all__ = ["GPT", "Objective", "build_gpt"]
