"""Curvature of the loss of a GPT: operators known by their products, and what can be learned from those.

- `language.LanguageLoss`: Hessian and Gauss-Newton matrix over parameters;
- `activation.SlotLoss`: the Hessian in what one module reads, split into L and C;
- `algorithms`: extreme eigenvalues, spectra and traces of any operator, each with how sure it is;
- `checks`: whether a product can be believed; `rates`: how large a step the loss bears.
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
    ritz_value,
    spectral_density,
)
from gptnorm.curvature.checks import refuse_wrong_products
from gptnorm.curvature.language import LanguageLoss, parameters_of
from gptnorm.curvature.operators import FiniteDifference, GaussNewton, Hessian, Operator, Part, Scaled
from gptnorm.curvature.rates import CriticalRate, critical_rate
from gptnorm.curvature.vectors import Space

__all__ = [
    "CriticalRate",
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
    "critical_rate",
    "hutch_pp",
    "hutchinson",
    "lanczos",
    "parameters_of",
    "power_iteration",
    "refuse_wrong_products",
    "ritz_value",
    "slots_of",
    "spectral_density",
]
