"""Resumable training state: parameters, Adam moments and the step, in safetensors.

Nothing else is needed to go on bit for bit: the data cursor and every schedule are functions of the step, and the
models have no dropout.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from slimqwen.artifacts import atomic_folder

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_state(folder: Path, step: int, parameters: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Write `folder/step-N` atomically, then remove older ones: at every moment there is a complete one."""
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
    current = folder / f"step-{step:09d}"
    with atomic_folder(current) as partial:
        save_file(tensors, partial / "state.safetensors")
    for older in folder.glob("step-*"):
        if older != current:
            shutil.rmtree(older)


def load_state(folder: Path, parameters: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> int | None:
    """Put the newest state into parameters and optimiser; the number of steps done, or None if there is none."""
    states = sorted(folder.glob("step-*"))
    if not states:
        return None
    device = next(iter(parameters.values())).device
    tensors = load_file(states[-1] / "state.safetensors", device=str(device))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            optimizer.state[parameter] = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
    return int(states[-1].name.removeprefix("step-"))
