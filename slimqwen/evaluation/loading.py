"""How a model is loaded to be measured: into memory, sharded over the ranks of a job, or layer by layer where it does not fit."""

import gc
import json
from collections import Counter
from math import gcd, prod

import torch

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core import torchrun
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.free_memory import available_bytes
from slimqwen.core.progress import say
from slimqwen.evaluation.examinee import Examinee, InMemory
from slimqwen.evaluation.layer_by_layer import LayerByLayer
from slimqwen.model.model import MtpCausalLM, load
from slimqwen.parallel.job import Job
from slimqwen.parallel.lockstep import begin_forward_passes
from slimqwen.parallel.ranks import join_ranks
from slimqwen.parallel.sharded_checkpoint import load_sharded
from slimqwen.parallel.shares import Shares, choose_shares
from slimqwen.recipe import Execution


def load_examinee(
    checkpoint: Checkpoint,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    job: Job,
    execution: Execution,
) -> Examinee:
    """Load a model to be measured, on all ranks of the job. shape: of the text of each, how many rows and positions of a row."""
    shares = agree_on_shares(checkpoint, execution, dtype, device, job)
    if shares is None:
        return LayerByLayer(checkpoint, shape, dtype, device, job, execution)
    model = load_shared(checkpoint, shares, execution, dtype, device)
    return InMemory(model, checkpoint, execution.batch_size, job)


def load_for_all(
    checkpoint: Checkpoint, execution: Execution, dtype: torch.dtype, device: torch.device, job: Job
) -> MtpCausalLM:
    """Load a model for forward passes on all ranks of the job, into memory whether it fits or not."""
    shares = agree_on_shares(checkpoint, execution.model_copy(update={"streaming": False}), dtype, device, job)
    assert shares is not None
    return load_shared(checkpoint, shares, execution, dtype, device)


def agree_on_shares(
    checkpoint: Checkpoint, execution: Execution, dtype: torch.dtype, device: torch.device, job: Job
) -> Shares | None:
    """Choose for all ranks of a job the same (`choose_way`)."""
    ranks, node = job.share[1], gcd(*job.gather(torchrun.local_world_size()))
    found = json.loads(job.lead(lambda: json.dumps(choose_way(checkpoint, dtype, device, ranks, node, execution))))
    return None if found is None else Shares(*found)


def choose_way(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, ranks: int, node: int, execution: Execution
) -> Shares | None:
    """Choose how `ranks` ranks, `node` of them on each node, share a model; None: layer by layer, as set or where it does not fit.

    Routed experts are shared by `execution.expert_ranks` ranks where these divide them, and else gathered like other weights.
    """
    if execution.streaming:
        return None
    available = available_bytes(device)
    processes = torchrun.local_world_size() if device.type == "cpu" and ranks > 1 else 1
    experts = checkpoint.config["num_experts"]
    if execution.expert_ranks != "auto" and experts % execution.expert_ranks:
        execution = execution.model_copy(update={"expert_ranks": 1})

    def needed(shares: Shares) -> int:
        return processes * (dtype.itemsize * _held_numbers(checkpoint, shares) + execution.memory_budget)

    def fits(shard_ranks: int) -> bool:
        return available is None or needed(Shares(shard_ranks, 1)) <= available

    shares = choose_shares(ranks, min(node, ranks), [experts], execution, fits)
    if execution.streaming is False or available is None or needed(shares) <= available:
        return shares
    of_each = f" for {processes} processes" if processes > 1 else ""
    say(
        f"layer by layer: {checkpoint.folder} in {str(dtype).removeprefix('torch.')} and its activations take "
        f"{bytes_in_words(needed(shares))}{of_each}, and {bytes_in_words(available)} of memory are free"
    )
    return None


def load_shared(
    checkpoint: Checkpoint, shares: Shares, execution: Execution, dtype: torch.dtype, device: torch.device
) -> MtpCausalLM:
    """Load a model for forward passes: all of it, or sharded over the ranks of the job, as in training."""
    if shares.shard_ranks == 1:
        return load(checkpoint.folder, dtype, device)
    gc.collect()  # the modules of a sharded model refer to one another: the one before would stay for a while
    with join_ranks(device, *shares) as ranks:
        reshards = execution.reshard_teacher
        model = load_sharded(checkpoint, ranks, dtype, device, trains=False, reshard_after_forward=reshards)
        begin_forward_passes(model, device)
        return model


def _held_numbers(checkpoint: Checkpoint, shares: Shares) -> int:
    """Return the numbers of a model that one rank holds at once.

    Of several ranks each holds its shard, the gathered embedding and lm_head, and two gathered layers: one is on its way while the
    other computes.
    """
    layers: Counter[str] = Counter()
    embeddings = total = 0
    for spec in checkpoint.specs.values():
        numbers = 0 if spec.part == "vision" else prod(spec.shape)
        total += numbers
        if spec.part == "embedding":
            embeddings += numbers
        else:
            layers[spec.block.name] += numbers
    if shares.shard_ranks == 1:
        return total
    gathered = 2 * max(layers.values()) // shares.expert_ranks
    return min(total, total // shares.shard_ranks + embeddings + gathered)
