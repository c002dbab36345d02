"""How much memory calibration takes, in one go or layer by layer, and how much there is."""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from slimqwen.bytesize import bytes_in_words
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.families.axes import Sizes, size
from slimqwen.families.family import Block, Part, Table
from slimqwen.progress import say

# Anonymous memory beside weights, sums and activations, measured: Python with PyTorch and Transformers; a name and a shape.
PROCESS_BYTES = 450_000_000
BYTES_PER_TENSOR = 2_000
# Numbers that a token mixer holds at once, per token, over those that come out of its projections and go in. Measured on
# layers of Qwen3-Next-80B, Qwen3-30B and Mixtral with 1 to 8 sequences of 256, and one of 2,048 and 4,096: DeltaNet without
# its fused kernels 3.4 to 6.0, attention 0.6 to 2.6. A dense network holds its neurons four times.
HELD_AT_ONCE: dict[Part, float] = {"deltanet": 6.0, "attention": 2.6, "dense_mlp": 2.0}


@dataclass(frozen=True)
class Allotment:
    """How much of the text goes through a layer at once, and the memory that this takes at its peak, in bytes.

    Token mixers see `rows_per_pass` sequences at once, experts `rows_per_chunk`. weights_bytes: of the largest layer, but
    on a CPU of one routed expert only. sums_bytes: of the largest layer's statistics. What the layers read from the
    checkpoint and from the file of hidden states is page cache, which the system takes back as it needs.
    """

    rows_per_pass: int
    rows_per_chunk: int
    weights_bytes: int
    sums_bytes: int
    activations_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.sums_bytes + self.activations_bytes + self.process_bytes


def allot(
    checkpoint: Checkpoint,
    *,
    parts: int,
    rows: int,
    sequence_length: int,
    batch_size: int,
    budget_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    second_moments: bool = False,
) -> Allotment:
    """As many rows at once as the budget for activations allows: at least 1, passes of at most `batch_size`.

    parts: how many are measured apart; rows: of the largest of them.
    """
    family, config = checkpoint.family, checkpoint.config
    sizes = family.sizes(config)
    layers = [block for block in family.blocks(config) if block.recall is not None]
    hidden, experts = sizes[family.hidden], sizes[family.expert]
    row = dtype.itemsize * sequence_length
    chosen = config["num_experts_per_tok"]
    passing = row * max(_held_in_a_pass(block, sizes, hidden) for block in layers)
    waiting = row * 3 * hidden  # while others pass: the residual stream so far, the experts' inputs, their copy
    asking = row * max(_held_by_experts(block, sizes, hidden, chosen) for block in layers if block.experts is not None)
    rows_per_pass = int(min(batch_size, rows, max(1, budget_bytes // 2 // passing)))
    left = budget_bytes - rows_per_pass * passing
    rows_per_chunk = int(min(rows, max(rows_per_pass, min(left // waiting, budget_bytes // asking))))
    resident = device.type != "cpu"
    return Allotment(
        rows_per_pass=rows_per_pass,
        rows_per_chunk=rows_per_chunk,
        weights_bytes=dtype.itemsize * max(_weights(block, sizes, experts if resident else 1) for block in layers),
        sums_bytes=8 * parts * max(_sums(block, sizes, hidden, experts, second_moments) for block in layers),
        activations_bytes=int(max(rows_per_pass * passing + rows_per_chunk * waiting, rows_per_chunk * asking)),
        process_bytes=PROCESS_BYTES + BYTES_PER_TENSOR * len(checkpoint.specs),
    )


def fits(
    checkpoint: Checkpoint,
    *,
    parts: int,
    budget_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    second_moments: bool = False,
) -> bool:
    """Whether the whole model and its statistics fit beside a budget for activations, and say so where they do not."""
    sizes = checkpoint.family.sizes(checkpoint.config)
    hidden, experts = sizes[checkpoint.family.hidden], sizes[checkpoint.family.expert]
    numbers = sum(prod(spec.shape) for spec in checkpoint.specs.values() if spec.part != "vision")
    blocks = checkpoint.family.blocks(checkpoint.config)
    sums = sum(_sums(block, sizes, hidden, experts, second_moments) for block in blocks)
    needed, available = numbers * dtype.itemsize + 8 * parts * sums, available_bytes(device)
    if available is None or needed + budget_bytes <= available:
        return True
    say(
        f"layer by layer (--streaming): the model in {str(dtype).removeprefix('torch.')} and its statistics take "
        f"{bytes_in_words(needed)}, and {bytes_in_words(available)} of memory are free"
    )
    return False


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be had without swapping; on a GPU the less of its own and the machine's, through which models pass.

    None where the system does not tell.
    """
    amounts = [_free_of_the_machine(), _free_of_the_container()]
    if device.type == "cuda":
        amounts.append(torch.cuda.mem_get_info(device)[0])
    return min((amount for amount in amounts if amount is not None), default=None)


def _free_of_the_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: all there is
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
        return prod(os.sysconf(name) for name in names) if known else None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_the_container() -> int | None:
    """Of a control group (version 2) with a limit: what it leaves, page cache counted as free."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return None
    return limit - used + int(counters["inactive_file"]) + int(counters["active_file"])


def _held_in_a_pass(block: Block, sizes: Sizes, hidden: int) -> float:
    """Numbers per token, of the token mixer or of a dense network."""
    return max(
        held * (_outputs(block.tables[part], sizes) + hidden)
        for part, held in HELD_AT_ONCE.items()
        if part in block.tables
    )


def _held_by_experts(block: Block, sizes: Sizes, hidden: int, chosen: int) -> int:
    """Numbers per token: seven of the residual stream; each output of router and shared experts three times; and what is
    known of each chosen expert (indices of 8 bytes among it).
    """
    tables = [block.tables[part] for part in ("shared_experts", "router") if part in block.tables]
    return 7 * hidden + 3 * sum(_outputs(table, sizes) for table in tables) + 10 * chosen


def _outputs(table: Table, sizes: Sizes) -> int:
    """Rows of all matrices."""
    return sum(size(dims[0], sizes) for dims in table.values() if len(dims) == 2)


def _weights(block: Block, sizes: Sizes, experts: int) -> int:
    """Numbers in a block's dense tensors and in some of its experts."""
    dense = [table for part, table in block.tables.items() if part not in ("embedding", "vision")]
    numbers = sum(prod(size(term, sizes) for term in dims) for table in dense for dims in table.values())
    each = block.experts.per_expert.values() if block.experts else ()
    return numbers + experts * sum(prod(size(term, sizes) for term in dims) for dims in each)


def _sums(block: Block, sizes: Sizes, hidden: int, experts: int, second_moments: bool) -> int:
    """Numbers in the sums over a block, nearly all of them its experts' (outputs, neurons and the logits' products) and the
    second moments of its norms, where they are asked for.
    """
    moments = second_moments * len(block.tables.get("norm", {})) * hidden**2
    if block.experts is None:
        return moments
    neurons = sum(size(axis, sizes) for axis in sizes if axis.scope == "expert")
    return moments + experts * (hidden + neurons + experts)
