"""What a device can compute at most, for model FLOPs utilization (MFU; Chowdhery et al., 2022, appendix B)."""

from __future__ import annotations

import time

import torch

# TFLOP/s of dense bf16 matrix products (fp16: the same) from the makers' datasheets, without sparsity. The first whose
# words are all in the name of a GPU, as its driver tells it, is the one.
PEAK_BF16_TFLOPS = (
    ("GB300", 2500),
    ("GB200", 2500),
    ("B300", 2250),
    ("B200", 2250),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),
    ("H800 PCIe", 756.5),
    ("H800", 989.4),
    ("A100", 312),
    ("A800", 312),
    ("A40", 149.7),
    ("A30", 165),
    ("A10G", 70),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71),
    ("MI300X", 1307.4),
)

# Seconds that measuring a device's peak takes, and the size of the matrices.
MEASURED_FOR = 0.3
MEASURED_SIZE = {"cpu": 1024}
MEASURED_SIZE_ELSEWHERE = 8192


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of matrix products of 16 bits on a GPU that is in the table, else None."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(name: str) -> float | None:
    """FLOP/s, or None for a GPU that is not in the table, or a part of one."""
    words = name.replace("-", " ").split()
    if "MIG" in words:
        return None
    found = (tflops for model, tflops in PEAK_BF16_TFLOPS if set(model.split()) <= set(words))
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square matrix products, with as many threads as there are. Draws no random number
    that anything else would draw.
    """
    size = MEASURED_SIZE.get(device.type, MEASURED_SIZE_ELSEWHERE)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out, best, deadline = torch.empty_like(a), float("inf"), time.perf_counter() + MEASURED_FOR
    while best == float("inf") or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
