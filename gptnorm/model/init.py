r"""How weights are drawn: each backbone's published initialisation, and its twin at other widths.

| backbone | embedding | q, k, v, gate | up | o, down | head |
|---|---|---|---|---|---|
| Llama 2/3 (SimpleGPT's code) | 1 (tied: 0.02) | s | s / √(2(l+1)) | s / √(2(l+1)) | d^(-1/2), cut at ±3 std |
| GPT-2 (nanoGPT) | 0.02, positions too | s | s | s / √(2L) | tied (else 0.02) |

Standard deviations of a normal, with s = 0.02 and l the block, from 0. Llama's block matrices are
cut at ±2 (an absolute bound, so hardly ever). 0.02 ≈ 1/√2048: at another width the faithful twin
is s √(2048/d). The embedding and the head do not change with the width. A tied Llama is our extrapolation: at
std 1 its logits would start at the size of d, so it takes GPT-2's 0.02. The factors with l or L are
the depth factors that a strategy or `options.scale_mode` may replace.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor, nn

from gptnorm.activations import second_moment
from gptnorm.config import BackboneName, InitConfig
from gptnorm.model.backbones import BACKBONES
from gptnorm.shape import Role, Shape
from gptnorm.sharding import all_squares_along, here, is_cut, part_of, squares_along
from gptnorm.strategies.base import Draw

PUBLISHED_STD = 0.02
TWIN_WIDTH = 2048


def block_std(config: InitConfig, role: Role, shape: Shape) -> float:
    """s of the table above."""
    std = named_std(config.std, shape.d)
    if std is not None:
        return std
    fan_in = shape.in_features(role)
    # Random vectors of variance 1 leave act(z), or act(z) * u, with the activation's second moment.
    return (fan_in * second_moment(shape.activation, 1.0) if role == "down" else fan_in) ** -0.5


def named_std(std: float | Literal["published", "twin", "unit"], d: int) -> float | None:
    """s at width d, where it is the same for every map: None for "unit"."""
    if std == "published":
        return PUBLISHED_STD
    if std == "twin":
        return PUBLISHED_STD * (TWIN_WIDTH / d) ** 0.5
    return None if std == "unit" else float(std)


def published_draw(backbone: BackboneName, role: Role, layer: int, shape: Shape, config: InitConfig) -> Draw:
    """One entry of the table above; the router, which neither backbone has, is drawn like q."""
    gpt2 = BACKBONES[backbone].init == "gpt2"
    if role in ("embed", "position"):
        return Draw(std=PUBLISHED_STD if shape.tied or gpt2 else 1.0)
    if role == "head":
        return Draw(std=PUBLISHED_STD) if gpt2 else Draw(std=shape.d**-0.5, cut=3 * shape.d**-0.5)
    std = block_std(config, role, shape)
    depth = 1.0
    if config.std != "unit":
        if gpt2 and role in ("o", "down"):
            depth = (2 * shape.n_layers) ** -0.5
        if not gpt2 and role in ("o", "down", "up"):
            depth = (2 * (layer + 1)) ** -0.5
    return Draw(std=std, depth=depth) if gpt2 or config.std == "unit" else Draw(std=std, cut=2.0, depth=depth)


@torch.no_grad()
def drawn(size: torch.Size, draw: Draw, seed: int, name: str) -> Tensor:
    """A whole weight, fp32 on the CPU. Its numbers depend on (seed, name, size) alone, not on the other weights.

    Two strategies of one backbone therefore start from the same numbers wherever they share a weight.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    fresh = torch.empty(size, dtype=torch.float32, device="cpu")
    std = draw.std * draw.depth
    if draw.cut is None:
        fresh.normal_(0.0, std, generator=generator)
    else:
        nn.init.trunc_normal_(fresh, 0.0, std, -draw.cut, draw.cut, generator=generator)
    return fresh


@torch.no_grad()
def normalize_(weight: Tensor, axis: int, *, only_longer: bool = False) -> None:
    """Brings the vectors along `axis` to L2 norm 1, in fp32 or better; `only_longer`: those above 1 alone.

    A weight may be spread over processes; where its vectors are cut, their squares are summed.
    """
    part = here(weight)
    exact = part.to(torch.promote_types(weight.dtype, torch.float32))
    if is_cut(weight, axis):
        norm = squares_along(weight, axis).sqrt()
    else:
        norm = torch.linalg.vector_norm(exact, dim=axis, keepdim=True)
    part.copy_(exact / norm.clamp_min(1.0 if only_longer else 1e-12))


@torch.no_grad()
def pull_back_(weight: Tensor, axis: int, multiplier: Tensor) -> None:
    """lambda <- max(0, lambda + 2 (|w|^2 - 1) / n), then w <- (1 - lambda) w, for vectors w of n numbers along `axis`.

    Args:
        multiplier: lambda, of the weight's shape without `axis`; changed in place. Whole on every process, also where
            the weight is spread over them.
    """
    excess = all_squares_along(weight, axis).squeeze(axis).to(multiplier.dtype) - 1
    multiplier.add_(2 * excess / weight.shape[axis]).clamp_min_(0.0)
    here(weight).mul_(1 - part_of(multiplier.unsqueeze(axis), like=weight))
