"""What is claimed of the curvature of a norm after a linear map, as experiments that can come out either way.

- `layer.Layer`: ℓ(N(Wx)) with its L, C and H as operators; `losses`, `draws`: what it is made of;
- `closed`: the closed forms that it is checked against;
- `scale`, `width`, `activation`, `alignment`, `kinds`: a check each, listed in `checks`;
- `finding.Finding`: what a check found, as plain data; `command` runs and prints them.
"""

from gptnorm.theory import closed, draws
from gptnorm.theory.checks import CHECKS, Asked
from gptnorm.theory.finding import Finding, Table
from gptnorm.theory.layer import Layer, dense

__all__ = ["CHECKS", "Asked", "Finding", "Layer", "Table", "closed", "dense", "draws"]
