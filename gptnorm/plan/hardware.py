"""Peak rates of common GPUs."""

from __future__ import annotations

import math

from gptnorm.errors import bad_value

PEAK_TFLOPS = {
    "a100": 312.0,
    "h100": 989.0,
    "h100-pcie": 756.0,
    "h200": 989.0,
    "b200": 2250.0,
    "l40s": 362.0,
    "rtx3090": 71.0,
    "rtx4090": 165.0,
    "mi300x": 1307.0,
}
"""Dense bf16 matrix products with fp32 accumulation, 1e12 FLOP/s, without sparsity; h100 and h200 are the SXM boards.

From the vendors' data sheets, which often print twice the number, for 2:4 sparsity: NVIDIA A100 80GB (2021), H100
(2023), H200 (2024), HGX B200 (2024), L40S (2023); whitepapers of GA102 (RTX 3090) and AD102 (RTX 4090); AMD MI300X.
"""


def peak_flops(gpu: str, tflops: float | None = None) -> float:
    """FLOP/s of a GPU by its name, "h100" for one, or as told; UserError for a name that is not in the table."""
    if tflops is not None:
        if not 0 < tflops < math.inf:
            raise bad_value("--peak-tflops", tflops, "must be a number above 0")
        return 1e12 * tflops
    if gpu.lower() not in PEAK_TFLOPS:
        raise bad_value("--gpu", gpu, f"must be one of {', '.join(PEAK_TFLOPS)}; or give --peak-tflops")
    return 1e12 * PEAK_TFLOPS[gpu.lower()]
