"""Which device and dtype to compute on, from the recipe's words."""

import torch

from slimqwen.errors import UserError


def resolve_device(name: str) -> torch.device:
    """'auto' is a GPU if there is one. Raises UserError for a device that this machine or PyTorch lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device '{name}' cannot be used here: {str(error).splitlines()[0]} Try device: auto."
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
