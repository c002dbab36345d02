"""The ranks of a training: how many share a copy of the models, by the memory that is predicted."""

from math import gcd

import torch

from slimqwen.core import torchrun
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.progress import say
from slimqwen.model.device import resolve_device
from slimqwen.parallel.job import Job
from slimqwen.parallel.shares import Shares, choose_shares, in_words
from slimqwen.recipe import DistilRecipe, Execution
from slimqwen.shapes.placement import IMBALANCE, needed_bytes
from slimqwen.shapes.training_memory import TrainingSettings, training_memory
from slimqwen.training.inputs import OpenInputs
from slimqwen.training.optimizer import untrained_parts


def agree_on_shares(
    job: Job, inputs: OpenInputs, recipe: DistilRecipe, execution: Execution, rows: int, sequence_length: int
) -> Shares:
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
    node, memory = gcd(*(ranks for ranks, _ in found)), min(size for _, size in found)
    models = [student] if teacher is None else [student, teacher]
    experts = [model.config["num_experts"] for model in models if model.family.moe_blocks(model.config)]
    micro_batch_size = min(execution.micro_batch_size or rows, max(rows // job.size, 1))

    def predict(ranks: int) -> int:
        shared = choose_shares(job.size, node, experts, execution, lambda chosen: chosen == ranks).expert_ranks
        settings = TrainingSettings(
            gpus=job.size,
            shard_ranks=ranks,
            expert_ranks=shared,
            expert_imbalance=IMBALANCE if shared > 1 else 1.0,
            micro_batch_size=micro_batch_size,
            micro_batches=-(-rows // (job.size * micro_batch_size)),
            sequence_length=sequence_length,
            recompute_activations=execution.recompute_activations,
            reshard_student=execution.reshard_student,
            reshard_teacher=execution.reshard_teacher,
            loss_chunk_tokens=execution.loss_chunk_tokens,
            device="cuda",
            optimizer=recipe.optimizer.kind,
            frozen=untrained_parts(student.family, student.config, recipe),
            offload=execution.offload,
            teacher="layer_by_layer" if execution.streaming_teacher else "live",
            memory_budget=execution.memory_budget,
        )
        config = None if teacher is None else teacher.config
        return needed_bytes(training_memory(student.family, student.config, config, settings).peak_bytes, job.size)

    shares = choose_shares(job.size, node, experts, execution, lambda ranks: not on_gpu or predict(ranks) <= memory)
    if job.is_first and "auto" in (execution.shard_ranks, execution.expert_ranks):
        needed = f"; {bytes_in_words(predict(shares.shard_ranks))} of a GPU's memory predicted" if on_gpu else ""
        say(f"{in_words(shares, job.size, node)}{needed}")
    return shares
