"""How much memory calibration takes, in one go or layer by layer, and whether there is as much."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod

import torch

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core import torchrun
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.free_memory import available_bytes, limit_bytes
from slimqwen.core.progress import say
from slimqwen.core.warning import warn
from slimqwen.families.axes import Sizes, size
from slimqwen.families.family import Block, Part, Table
from slimqwen.model.device import resolve_device
from slimqwen.recipe import Execution

ADDED_AT_ONCE = 1 << 18  # numbers of a sum: PyTorch copies what it adds into the wider dtype first
# Anonymous memory beside weights, sums and activations, measured: Python with PyTorch and Transformers; a name and a shape.
PROCESS_BYTES = 450_000_000
BYTES_PER_TENSOR = 2_000
GPU_PROCESS_BYTES = 1_000_000_000  # of a GPU's memory, for CUDA and its libraries; not measured
PAIR_INDICES = 40  # bytes of a (token, chosen expert) pair: its place in several orders, and its gate
# Numbers that a token mixer holds at once, per token, over those that come out of its projections and go in. Measured on
# layers of Qwen3-Next-80B, Qwen3-30B and Mixtral with 1 to 8 sequences of 256, and one of 2,048 and 4,096: DeltaNet without
# its fused kernels 3.4 to 6.0, attention 0.6 to 2.6. A dense network holds its neurons four times.
HELD_AT_ONCE: dict[Part, float] = {"deltanet": 6.0, "attention": 2.6, "dense_mlp": 2.0}


@dataclass(frozen=True)
class Allotment:
    """How much of the text goes through a layer at once, and the memory that this takes at its peak, in bytes.

    Token mixers see `rows_per_pass` sequences at once, experts `rows_per_chunk`. weights_bytes: of the largest layer, but
    on a CPU of one routed expert only. sums_bytes: of the largest layer's statistics; copies_bytes: what is added to them at
    one time. What the layers read from the checkpoint and from the file of hidden states is page cache, which the system takes
    back as it needs. On a GPU lie the weights, copies and activations; sums and process take the host's memory.
    """

    rows_per_pass: int
    rows_per_chunk: int
    weights_bytes: int
    sums_bytes: int
    copies_bytes: int
    activations_bytes: int
    process_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """Whatever goes through a layer at once."""
        return self.weights_bytes + self.sums_bytes + self.copies_bytes + self.process_bytes

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.activations_bytes

    @property
    def on_gpu_bytes(self) -> int:
        """What of it lies in the GPU's memory, where there is one."""
        return self.weights_bytes + self.copies_bytes + self.activations_bytes


def settings_of(execution: Execution) -> list[int]:
    """Return what the user sets of how many rows go through a layer at once, whatever it comes to on one machine or another."""
    return [execution.batch_size, execution.memory_budget]


def allot(
    checkpoint: Checkpoint,
    execution: Execution,
    *,
    rows: int,
    sequence_length: int,
    dtype: torch.dtype,
    parts: int = 0,
    second_moments: bool = False,
    beside_bytes: int = 0,
) -> Allotment:
    """Return as many rows at once as `execution.memory_budget` allows: at least 1, passes of at most `execution.batch_size`.

    The budget is for activations. It is what the memory limit of this process leaves, where that is less: a limit, and not what is
    free at the moment, so that the same command does the same. On a CPU the processes of the job on this machine share it; a
    GPU's is its size. Where it leaves too little for one row, that is a warning.

    Args:
        rows: of the text, or of the largest of its parts.
        parts: how many of the text are measured apart, 0 where no statistics are.
        beside_bytes: held in the host's memory by the caller meanwhile.
    """
    device, budget_bytes = resolve_device(execution.device), execution.memory_budget
    family, config = checkpoint.family, checkpoint.config
    sizes = family.sizes(config)
    layers = [block for block in family.blocks(config) if block.recall is not None]
    fixed = _fixed(checkpoint, dtype, device, parts, second_moments)
    limit = _limit(device)
    taken = fixed.fixed_bytes + beside_bytes if device.type == "cpu" else fixed.on_gpu_bytes
    if limit is not None:
        budget_bytes = max(0, min(budget_bytes, limit - taken))
    row, hidden = dtype.itemsize * sequence_length, sizes[family.hidden]
    passing = row * max(_held_in_a_pass(block, sizes, hidden) for block in layers)
    waiting = row * 3 * hidden  # while others pass: the residual stream so far, the experts' inputs, their copy
    in_experts = sequence_length * _held_by_a_token(checkpoint, layers, dtype, device)
    rows_per_pass = int(min(execution.batch_size, rows, max(1, budget_bytes // 2 // passing)))
    left = budget_bytes - rows_per_pass * passing
    rows_per_chunk = int(min(rows, max(rows_per_pass, min(left // waiting, budget_bytes // in_experts))))
    allotment = replace(
        fixed,
        rows_per_pass=rows_per_pass,
        rows_per_chunk=rows_per_chunk,
        activations_bytes=int(max(rows_per_pass * passing + rows_per_chunk * waiting, rows_per_chunk * in_experts)),
    )
    if limit is not None:
        _warn_beyond(limit, taken + allotment.activations_bytes)
    return allotment


def _fixed(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, parts: int, second_moments: bool
) -> Allotment:
    """Return what is there whatever goes through a layer at once, of one row without activations."""
    sizes, steps = checkpoint.family.sizes(checkpoint.config), _steps(checkpoint)
    resident = 1 if device.type == "cpu" else sizes[checkpoint.family.expert]
    return Allotment(
        rows_per_pass=1,
        rows_per_chunk=1,
        weights_bytes=dtype.itemsize * max(sum(_weights(b, sizes, resident) for b in blocks) for blocks in steps),
        sums_bytes=8 * parts * max(_sums(blocks, checkpoint, second_moments) for blocks in steps),
        copies_bytes=_copies_bytes(checkpoint, second_moments) if parts else 0,
        activations_bytes=0,
        process_bytes=PROCESS_BYTES + BYTES_PER_TENSOR * len(checkpoint.specs),
    )


def _limit(device: torch.device) -> int | None:
    """Return the memory that this process may have for its work: on a GPU of the GPU's, else a share of the machine's."""
    if device.type == "cuda":
        return gpu_bytes(device) - GPU_PROCESS_BYTES
    limit = limit_bytes() if device.type == "cpu" else None
    return None if limit is None else limit // torchrun.local_world_size()


def gpu_bytes(device: torch.device) -> int:
    """Return the size of a GPU's memory."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def _warn_beyond(limit: int, needed: int) -> None:
    if needed > limit:
        warn(
            f"layer by layer it takes {bytes_in_words(needed)} of memory, and this process may have {bytes_in_words(limit)}: it may "
            "be killed; give it more, or shorter sequences"
        )


def fits(
    checkpoint: Checkpoint,
    *,
    parts: int,
    budget_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    second_moments: bool = False,
    processes: int = 1,
) -> bool:
    """Return whether the whole model and its statistics fit beside a budget for activations; print it where they do not.

    processes: of this machine, each with statistics and a model of its own. On a GPU of its own lie the model and what a batch
    adds; the statistics of all are in the host's memory.
    """
    in_words = f"the model in {str(dtype).removeprefix('torch.')} and "
    model = dtype.itemsize * sum(prod(spec.shape) for spec in checkpoint.specs.values() if spec.part != "vision")
    copies = _copies_bytes(checkpoint, second_moments)
    sums = 8 * parts * _sums(checkpoint.family.blocks(checkpoint.config), checkpoint, second_moments)
    if device.type == "cpu":
        everywhere = [
            (device, in_words + "its statistics", processes * (model + sums + copies), processes * budget_bytes)
        ]
    else:
        everywhere = [
            (device, in_words + "what a batch adds", model + copies, budget_bytes),
            (torch.device("cpu"), "the host's statistics", processes * sums, 0),
        ]
    of_each = f" for each of {processes} processes" if processes > 1 else ""
    for place, what, needed, beside in everywhere:
        available = available_bytes(place)
        if available is not None and needed + beside > available:
            say(
                f"layer by layer (--streaming): {what}{of_each} take {bytes_in_words(needed)}, and {bytes_in_words(available)} of "
                "memory are free"
            )
            return False
    return True


def _held_in_a_pass(block: Block, sizes: Sizes, hidden: int) -> float:
    """Return numbers per token, of the token mixer or of a dense network."""
    return max(
        held * (_outputs(block.tables[part], sizes) + hidden)
        for part, held in HELD_AT_ONCE.items()
        if part in block.tables
    )


def _held_by_a_token(
    checkpoint: Checkpoint, layers: Collection[Block], dtype: torch.dtype, device: torch.device
) -> int:
    """Return the bytes of a token while the experts of the largest of some layers compute.

    They are seven of the residual stream; each output of router and shared experts three times; and what is kept of each
    chosen expert: on a CPU, where one expert computes at a time, indices and gates, on a GPU the inputs and outputs of all.
    """
    sizes = checkpoint.family.sizes(checkpoint.config)
    hidden, _, neurons = _expert_sizes(checkpoint)
    chosen = checkpoint.config["num_experts_per_tok"]
    pair = 10 * dtype.itemsize if device.type == "cpu" else _held_by_a_pair(hidden, neurons, dtype.itemsize)
    outputs = max(
        sum(_outputs(block.tables[part], sizes) for part in ("shared_experts", "router") if part in block.tables)
        for block in layers
        if block.experts is not None
    )
    return dtype.itemsize * (7 * hidden + 3 * outputs) + chosen * pair


def _held_by_a_pair(hidden: int, neurons: int, itemsize: int) -> int:
    """Return the bytes of a (token, chosen expert) pair where all experts compute at once, in `itemsize` bytes a number.

    The most of these moments: the outputs weighted and put in order again beside the inputs (Transformers' grouped product); its
    neurons gated; outputs, neurons and what is summed up of either in float32 (`model.experts.grouped`). And PAIR_INDICES.
    """
    inputs, each = itemsize * hidden, itemsize * neurons
    summed = inputs + each + max(4 * hidden, 8 * neurons)
    return max(4 * inputs, inputs + 4 * each, summed, 3 * inputs + each) + PAIR_INDICES


def _outputs(table: Table, sizes: Sizes) -> int:
    """Return the rows of all matrices."""
    return sum(size(dims[0], sizes) for dims in table.values() if len(dims) == 2)


def _weights(block: Block, sizes: Sizes, experts: int) -> int:
    """Return the numbers in a block's dense tensors and in some of its experts."""
    dense = [table for part, table in block.tables.items() if part not in ("embedding", "vision")]
    numbers = sum(prod(size(term, sizes) for term in dims) for table in dense for dims in table.values())
    each = block.experts.per_expert.values() if block.experts else ()
    return numbers + experts * sum(prod(size(term, sizes) for term in dims) for dims in each)


def _steps(checkpoint: Checkpoint) -> list[list[Block]]:
    """Return the blocks that are there at the same time, as in `steps_of`: a decoder layer, the last with the final norm; MTP."""
    blocks = checkpoint.family.blocks(checkpoint.config)
    steps = [[block] for block in blocks if block.layer is not None]
    steps[-1] += [block for block in blocks if block.layer is None and not block.is_mtp]
    mtp = [block for block in blocks if block.is_mtp]
    return [*steps, mtp] if mtp else steps


def _sums(blocks: Collection[Block], checkpoint: Checkpoint, second_moments: bool) -> int:
    """Return the numbers in the sums over these blocks.

    Nearly all of them are their experts' (outputs, neurons and the logits' products) and, with `second_moments`, those of
    their norms.
    """
    hidden, experts, neurons = _expert_sizes(checkpoint)
    norms = [block for block, _ in checkpoint.family.residual_norms(checkpoint.config) if block in blocks]
    routing = [block for block in blocks if block.experts is not None]
    return second_moments * len(norms) * hidden**2 + len(routing) * experts * (hidden + neurons + experts)


def _copies_bytes(checkpoint: Checkpoint, second_moments: bool) -> int:
    """Return the bytes of what one batch adds, float32: second moments of one norm, or outputs and neurons of a layer's experts."""
    hidden, experts, neurons = _expert_sizes(checkpoint)
    return 4 * max(second_moments * hidden**2, experts * (hidden + neurons)) + 8 * ADDED_AT_ONCE


def _expert_sizes(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Return hidden size, experts of a layer, neurons of one."""
    family, sizes = checkpoint.family, checkpoint.family.sizes(checkpoint.config)
    neurons = sum(count for axis, count in sizes.items() if axis.scope == "expert")
    return sizes[family.hidden], sizes[family.expert], neurons
