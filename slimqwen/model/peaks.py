"""How fast devices can multiply: what a training's speed is compared with. No torch, so that a prediction can import it."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense bfloat16 FLOPs per second with float32 accumulation, from the makers' data sheets, which often give the doubled
# figure for sparse matrices. A device is the first line whose words are all in its name.
DENSE_BF16_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def dense_bf16_flops(device: "torch.device") -> float | None:
    """Return the FLOPs per second that the device can do at most, None where that is not known (every CPU)."""
    if device.type != "cuda":
        return None
    import torch

    return peak_of(torch.cuda.get_device_name(device))


def peak_of(device_name: str) -> float | None:
    """Return that of a device by its name, e.g. "NVIDIA H100 80GB HBM3"."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    return next((flops for name, flops in DENSE_BF16_FLOPS.items() if set(name.lower().split()) <= words), None)
