"""How a model is loaded to be measured: into memory, sharded over the ranks of a job, or layer by layer where it does not fit."""

from collections import Counter
from math import prod

import torch

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core import torchrun
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.free_memory import available_bytes
from slimqwen.core.progress import say
from slimqwen.evaluation.examinee import Examinee, InMemory, expert_ranks_of, load_for_all
from slimqwen.evaluation.layer_by_layer import LayerByLayer
from slimqwen.parallel.job import Job
from slimqwen.recipe import Execution

LAYER_BY_LAYER, IN_MEMORY = "layer by layer", "in memory"


def load_examinee(
    checkpoint: Checkpoint,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    job: Job,
    execution: Execution,
) -> Examinee:
    """Load a model to be measured, on all ranks of the job. shape: of the text of each, how many rows and positions of a row."""
    ranks = job.share[1]

    def choose_way() -> str:
        if execution.streaming is not None:
            return LAYER_BY_LAYER if execution.streaming else IN_MEMORY
        return IN_MEMORY if fits(checkpoint, dtype, device, ranks, execution) else LAYER_BY_LAYER

    if job.lead(choose_way) == LAYER_BY_LAYER:
        return LayerByLayer(checkpoint, shape, dtype, device, job, execution)
    return InMemory(load_for_all(checkpoint, execution, dtype, device, job), checkpoint, execution.batch_size, job)


def fits(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, ranks: int, execution: Execution) -> bool:
    """Return whether a model fits into memory, sharded over `ranks` ranks, beside a budget for activations; print it where not.

    Of several ranks each holds its shard, the gathered embedding and lm_head, and two gathered layers: one is on its way while the
    other computes.
    """
    needed = dtype.itemsize * _held_numbers(checkpoint, ranks, execution) + execution.memory_budget
    processes = torchrun.local_world_size() if device.type == "cpu" and ranks > 1 else 1
    available = available_bytes(device)
    if available is None or processes * needed <= available:
        return True
    of_each = f" for each of {processes} processes" if processes > 1 else ""
    say(
        f"layer by layer: {checkpoint.folder} in {str(dtype).removeprefix('torch.')} and its activations take "
        f"{bytes_in_words(needed)}{of_each}, and {bytes_in_words(available)} of memory are free"
    )
    return False


def _held_numbers(checkpoint: Checkpoint, ranks: int, execution: Execution) -> int:
    """Return the numbers of a model that one rank holds at once."""
    layers: Counter[str] = Counter()
    embeddings = total = 0
    for spec in checkpoint.specs.values():
        numbers = 0 if spec.part == "vision" else prod(spec.shape)
        total += numbers
        if spec.part == "embedding":
            embeddings += numbers
        else:
            layers[spec.block.name] += numbers
    if ranks == 1:
        return total
    gathered = 2 * max(layers.values()) // (expert_ranks_of(checkpoint, execution) or 1)
    return min(total, total // (execution.shard_ranks or ranks) + embeddings + gathered)
