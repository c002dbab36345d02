"""The stage `prune`: a checkpoint and a plan in, a smaller checkpoint out, MTP module included, piece by piece."""

import shutil
from importlib.metadata import version
from pathlib import Path

import torch

from slimqwen.artifacts import fingerprint_value, joined_folder, makes_folder, resumable_folder
from slimqwen.artifacts.disk import check_space
from slimqwen.checkpoint.readable import check_companions
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.shards import DEFAULT_SHARD_BYTES
from slimqwen.checkpoint.writer import CheckpointWriter, copy_companions
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.errors import UserError
from slimqwen.core.progress import quiet, say
from slimqwen.families.family import Layout
from slimqwen.model.native import computed_config
from slimqwen.parallel.job import join_job
from slimqwen.planning.plan import Plan
from slimqwen.pruning.cut import Cut
from slimqwen.pruning.planned import planned_cut, planned_residual
from slimqwen.pruning.stream import PIECE_BYTES, one_thread_each, peak_bytes
from slimqwen.serving.check import check_checkpoint, tensor_hash

# Measured with the 75,944 tensors of Qwen3-Next-80B-A3B and the 28,931 that 36 layers of 256 experts leave: 154 MB once
# torch is imported, 275 MB before the first byte is written.
PROCESS_BYTES = 200_000_000
BYTES_PER_TENSOR = 1_500


@makes_folder("checkpoint", "plan", kind="checkpoint")
def prune(
    checkpoint: Path,
    out: Path,
    *,
    plan: Path | Plan,
    layout: Layout | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    title: str = "prune",
) -> Path:
    """Write the checkpoint that `plan` leaves of `checkpoint`, in the same dtypes; returns `out`.

    Interrupted, it continues with the first shard that is not complete when it is called again, and the result has the
    same bytes. All processes that torchrun started may call it together: each writes shards of its own.

    Args:
        layout: how experts lie in the result; None: block by block as in the source.
        shard_bytes: largest size of a file.

    Raises UserError where the plan was made for another checkpoint, and where the disk is too small.
    """
    source = Checkpoint(checkpoint)
    check_companions(checkpoint)
    chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
    made_from = {
        "version": version("slimqwen"),
        "plan": chosen.model_dump(mode="json"),
        "layout": layout,
        "shard_bytes": shard_bytes,
    }
    with join_job(torch.device("cpu")) as job, quiet(not job.is_first):
        job.lead(lambda: _check_plan(chosen, source))
        residual = planned_residual(source, chosen, plan if isinstance(plan, Path) else None)
        cut = planned_cut(source, chosen, layout, residual)
        computed_config(cut.family, cut.config, str(checkpoint))  # raises where Transformers does not take it
        is_first = job.share[0] == 0
        with resumable_folder(out, fingerprint_value(made_from)) if is_first else joined_folder(out) as folder:
            with CheckpointWriter(folder, cut.tensors, shard_bytes, share=job.share, lead=job.lead) as writer:
                job.lead(lambda: announce(writer, cut, title))
                cut.stream(writer, title)
                writer.complete()
                job.wait()
                if is_first:
                    writer.finish(cut.family.to_disk(cut.config))
            if is_first:
                copy_companions(checkpoint, folder)
                with one_thread_each():  # as when it was made: more threads may add the products up in another order
                    expected = sample(cut, writer)
                check_checkpoint(folder, expected=expected)
    return out


def _check_plan(plan: Plan, source: Checkpoint) -> str:
    if plan.checkpoint != source.fingerprint():
        raise UserError(
            f"the plan was not made for {source.folder}, or by an earlier version of slimqwen: run `slimqwen plan` on it first."
        )
    return ""


def announce(writer: CheckpointWriter, cut: Cut, title: str) -> str:
    """Say what the work will take, and return "". Raises StageFailed where the disk is too small."""
    free = shutil.disk_usage(writer.folder).free
    needed = writer.missing_file_bytes
    there = f"; {len(writer.found)} are there already" if writer.found else ""
    say(
        f"{title}: {bytes_in_words(writer.total_bytes)} in {len(writer.shards)} shards{there}; it takes "
        f"{bytes_in_words(predicted_memory_bytes(cut))} of memory (page cache apart) and {bytes_in_words(needed)} of disk, "
        f"{bytes_in_words(free)} are free"
    )
    check_space(writer.folder.parent, needed, free)
    return ""


def predicted_memory_bytes(cut: Cut) -> int:
    """Predict the anonymous memory at the peak: the process, its records of each tensor, and each thread's piece."""
    tensors = BYTES_PER_TENSOR * (len(cut.source.specs) + len(cut.tensors))
    rotation = 0 if cut.residual is None else cut.residual.memory_bytes()
    return PROCESS_BYTES + tensors + rotation + peak_bytes(rotated=rotation > 0)


def sample(cut: Cut, writer: CheckpointWriter) -> dict[str, str]:
    """Make a tensor of every shard from the source once more, and return the hash of what it must be by its name."""
    hashes = {}
    for shard in writer.shards:
        small = [tensor.name for tensor in shard.tensors if tensor.nbytes <= PIECE_BYTES]
        if small:
            name = small[len(small) // 2]
            hashes[name] = tensor_hash(cut.tensor(name))
    return hashes
