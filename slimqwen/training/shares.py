"""Which ranks share a copy of the models, and which a layer's experts, where a recipe leaves that open (`auto`)."""

from collections.abc import Callable, Sequence
from math import gcd
from typing import NamedTuple

import torch

from slimqwen.core import torchrun
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.progress import say
from slimqwen.model.device import resolve_device
from slimqwen.parallel.job import Job
from slimqwen.recipe import Execution
from slimqwen.shapes.footprint import TrainingSettings, training_memory
from slimqwen.training.inputs import OpenInputs

RESERVED_BYTES = (
    3_000_000_000  # of a GPU, for CUDA's context, NCCL's buffers and fragments: an assumption, not measured
)


class Shares(NamedTuple):
    """How many ranks share one copy of the models, and how many of these the experts of each layer."""

    shard_ranks: int
    expert_ranks: int


def agree_on_shares(job: Job, inputs: OpenInputs, execution: Execution, rows: int, sequence_length: int) -> Shares:
    """Choose for all ranks of a job the same (`choose_shares`); the first prints the choice where the recipe left it open.

    rows: of a step, of all ranks. On GPUs the memory is predicted and compared with the smallest GPU's; a CPU's is not.
    """
    if job.size == 1:
        return Shares(1, 1)
    student, teacher = inputs.student, inputs.teacher
    device = resolve_device(execution.device)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 0
    found = job.gather([torchrun.local_world_size(), memory])
    node, room = gcd(*(ranks for ranks, _ in found)), min(size for _, size in found) - RESERVED_BYTES
    models = [student] if teacher is None else [student, teacher]
    experts = [model.config["num_experts"] for model in models if model.family.moe_blocks(model.config)]
    micro_batch_size = min(execution.micro_batch_size or rows, max(rows // job.size, 1))

    def predict(ranks: int) -> int:
        settings = TrainingSettings(
            gpus=ranks,
            micro_batch_size=micro_batch_size,
            micro_batches=-(-rows // (job.size * micro_batch_size)),
            sequence_length=sequence_length,
            recompute_activations=execution.recompute_activations,
            loss_chunk_tokens=execution.loss_chunk_tokens,
            device="cuda",
        )
        config = None if teacher is None else teacher.config
        return training_memory(student.family, student.config, config, settings).peak_bytes

    shares = choose_shares(job.size, node, experts, execution, lambda ranks: not on_gpu or predict(ranks) <= room)
    if job.is_first and "auto" in (execution.shard_ranks, execution.expert_ranks):
        needed = f"; {bytes_in_words(predict(shares.shard_ranks))} of a GPU's memory predicted" if on_gpu else ""
        say(f"{in_words(shares, job.size, node)}{needed}")
    return shares


def choose_shares(
    ranks: int, node: int, experts: Sequence[int], execution: Execution, fits: Callable[[int], bool]
) -> Shares:
    """Choose the settings of `execution` that are `auto`, for `ranks` ranks, `node` of them on each node.

    Weights are gathered in every layer and pass, gradients cross once a step: so a copy of the models is shared by the ranks of one
    node where it fits there, else of the fewest nodes in which it does. A layer's experts are larger than the tokens that travel
    to them: they are shared by the most ranks of a node that divide the node, the copy, and both models' experts.

    Example: 64 ranks on nodes of 8, 512 and 256 experts: shard_ranks 8 where a copy fits into 8 ranks, or else 16, 32 or 64;
    expert_ranks 8. Nodes of 6: shard_ranks 6, expert_ranks 2.

    Args:
        experts: the number of experts of each model that has any.
        fits: whether the models fit where so many ranks share a copy.
    """
    asked = execution.expert_ranks
    if execution.shard_ranks == "auto":
        nodes = ranks // node
        sizes = [node * count for count in range(1, nodes + 1) if nodes % count == 0]
        sizes = [size for size in sizes if asked == "auto" or size % asked == 0]
        shard_ranks = next((size for size in sizes if fits(size)), ranks)
    else:
        shard_ranks = ranks if execution.shard_ranks == "all" else execution.shard_ranks
    if asked == "auto":
        asked = gcd(node, shard_ranks, *experts) if experts else 1
    return Shares(shard_ranks, asked)


def in_words(shares: Shares, ranks: int, node: int) -> str:
    """Describe a choice and its reason in one clause."""
    shard, expert = shares.shard_ranks, shares.expert_ranks
    if shard == ranks:
        where = f"all {ranks} ranks share one copy of the models"
    elif shard == node:
        where = f"the {shard} ranks of each node share a copy of the models, and only gradients cross between the {ranks // node} nodes"
    else:
        where = (
            f"{shard} ranks share a copy of the models, and only gradients cross between the {ranks // shard} copies"
        )
    if expert == 1:
        return where
    return f"{where}; {expert} ranks share each layer's experts and exchange tokens"
