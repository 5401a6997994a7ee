"""Curvature of the loss of a GPT: operators known by their products, and what can be learned from those.

- `language.LanguageLoss`: Hessian and Gauss-Newton matrix over parameters;
- `activation.SlotLoss`: the Hessian in what one module reads, split into L and C;
- `algorithms`: extreme eigenvalues, spectra and traces of any operator, each with how sure it is.
"""

from gptnorm.curvature.activation import SlotLoss, slots_of
from gptnorm.curvature.algorithms import (
    Density,
    Eigenpair,
    Trace,
    hutch_pp,
    hutchinson,
    lanczos,
    power_iteration,
    spectral_density,
)
from gptnorm.curvature.language import LanguageLoss, parameters_of
from gptnorm.curvature.operators import FiniteDifference, GaussNewton, Hessian, Operator, Part, Scaled
from gptnorm.curvature.vectors import Space

__all__ = [
    "Density",
    "Eigenpair",
    "FiniteDifference",
    "GaussNewton",
    "Hessian",
    "LanguageLoss",
    "Operator",
    "Part",
    "Scaled",
    "SlotLoss",
    "Space",
    "Trace",
    "hutch_pp",
    "hutchinson",
    "lanczos",
    "parameters_of",
    "power_iteration",
    "slots_of",
    "spectral_density",
]
