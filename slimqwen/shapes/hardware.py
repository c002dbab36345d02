"""Kinds of GPU with their speeds, and the machines that a training is planned for. No torch."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from slimqwen.core.errors import UserError, did_you_mean
from slimqwen.model.peaks import DENSE_BF16_FLOPS


@dataclass(frozen=True)
class Gpu:
    """The speeds of a kind of GPU, from data sheets, in bytes per second and direction.

    links: to the other GPUs of its node, by NVLink or PCIe. network: to other nodes, a GPU's share of a node as clouds offer it. host:
    to the host's memory, by PCIe.
    """

    name: str
    links: float
    network: float
    host: float

    @property
    def flops(self) -> float:
        """The dense bfloat16 FLOPs per second."""
        return DENSE_BF16_FLOPS[self.name]


GPUS = {
    gpu.name.lower().replace(" ", ""): gpu
    for gpu in (
        Gpu("A100", links=300e9, network=25e9, host=32e9),
        Gpu("H100", links=450e9, network=50e9, host=64e9),
        Gpu("H200", links=450e9, network=50e9, host=64e9),
        Gpu("B200", links=900e9, network=50e9, host=64e9),
        Gpu("L40S", links=32e9, network=12.5e9, host=32e9),
        Gpu("RTX 4090", links=32e9, network=12.5e9, host=32e9),
    )
}


def gpu_of(name: str) -> Gpu:
    """Return a kind of GPU by its name in lower case without spaces. Raises UserError for one that is not known."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}{did_you_mean(name, GPUS)}: must be one of {', '.join(GPUS)}.")
    return GPUS[name]


class Hardware(BaseModel):
    """The machines of a training. host_memory: bytes of a node; None: not known, and not checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: int
    gpus_per_node: int
    gpu_memory: int
    host_memory: int | None = None
    gpu: str = "h100"

    @property
    def node_gpus(self) -> int:
        """The GPUs of a node that are used."""
        return min(self.gpus, self.gpus_per_node)
