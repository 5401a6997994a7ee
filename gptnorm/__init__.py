"""gptnorm: choose, train and understand how a GPT is normalised."""

__version__ = "0.1.0"
