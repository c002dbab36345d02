"""What is used of Transformers' modules and configs without being promised by it: each name here and nowhere else.

`tests/test_internals.py` fails where a release of Transformers changes one of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.moe import _grouped_linear as grouped_linear

from slimqwen.model.patching import overridden

__all__ = [
    "apply_gate",
    "computed_by",
    "grouped_linear",
    "initialise",
    "mark_as_initialised",
    "one_sequence_per_row",
    "set_experts_function",
]


def apply_gate(experts: Any, gate_up: Tensor) -> Tensor:
    """Compute act(gate) * up of an experts module from its stacked product, [..., 2 x neurons] to [..., neurons]."""
    neurons: Tensor = experts._apply_gate(gate_up)
    return neurons


def set_experts_function(config: Any, name: str) -> None:
    """Choose how routed experts are computed (a key of Transformers' ALL_EXPERTS_FUNCTIONS) wherever this config is used."""
    config._experts_implementation = name


@contextmanager
def computed_by(name: str, experts: Any) -> Iterator[None]:
    """Let an experts module compute by the function `name` while open; blocks share a config, which the last to leave restores."""
    usual = experts.config._experts_implementation
    set_experts_function(experts.config, name)
    try:
        yield
    finally:
        set_experts_function(experts.config, usual)


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Keep Transformers from looking for several sequences in a row, by their positions, while open.

    Where it builds a mask without padding it reads from the device whether there are any: the host would wait for all that the
    device is at, once in the backbone and once in the MTP module. Our rows have positions of one sequence.
    """
    with overridden(masking_utils, find_packed_sequence_indices=lambda position_ids: None):
        yield


def initialise(backbone: PreTrainedModel, module: nn.Module) -> None:
    """Draw random parameters of one module, children left out, as the backbone does of its own."""
    backbone._init_weights(module)


def mark_as_initialised(tensor: Tensor) -> None:
    """Keep Transformers from drawing a loaded tensor anew when something is built on its model."""
    vars(tensor)["_is_hf_initialized"] = True
