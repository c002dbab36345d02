"""The stage `refit`: a freshly pruned checkpoint, its teacher and tokens in, the same checkpoint with refitted matrices out."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from slimqwen.artifacts import fingerprint_value, makes_folder
from slimqwen.calibration.statistics import Part
from slimqwen.core.progress import quiet
from slimqwen.layerwise.ranks import shared_scratch_folder
from slimqwen.model.device import reproducible, resolve_device
from slimqwen.parallel.job import join_job
from slimqwen.planning.plan import Plan
from slimqwen.recipe import Execution, TextSettings
from slimqwen.refit.layers import RIDGE, SWEEPS, Refit
from slimqwen.refit.pair import Pair


@makes_folder("student", "teacher", "tokens", "plan", kind="checkpoint")
def refit(
    student: Path,
    out: Path,
    *,
    teacher: Path,
    plan: Path | Plan,
    tokens: Path | Mapping[str, Path],
    text: TextSettings,
    samples: int = 512,
    execution: Execution = Execution(),  # noqa: B008 - immutable
    title: str = "refit",
) -> Path:
    """Refit the output matrices of `student`'s experts (routed, shared) and dense MLPs, MTP's too; returns `out`.

    Layer after layer, on the student's own stream, they are solved for in closed form (ridge regression, float64) so that the
    stream is where the teacher's is after the same layer. Nothing else changes, layout and dtypes neither. Only one layer's
    weights are needed at a time; the text's hidden states lie in files. Interrupted, it continues with the layer under way.

    All processes that torchrun started may call it together: each takes a share of the sequences through the layers, and what
    the matrices are solved from is added up.

    Args:
        student: what `prune` made of `teacher` by `plan`, not trained since.
        tokens: folder written by `tokenize`, or several by the names of their sources; the first `samples` sequences of their training
            orders of `text.seed` are used. How far a layer's refit is taken is measured on text left out: each source in turn, or of
            one each half.
        execution: its batch_size is how many sequences a token mixer takes at once, at most.

    Raises UserError where plan, student and teacher do not belong together, where the student was trained since, and where
    the disk is too small.
    """
    with join_job(resolve_device(execution.device)) as job, quiet(not job.is_first):
        pair = Pair(
            student, teacher, plan=plan, tokens=tokens, text=text, samples=samples, execution=execution, job=job
        )
        layers = out.with_name(f"{out.name}.layers")
        key = fingerprint_value([version("slimqwen"), *pair.made_from, RIDGE, SWEEPS])
        with shared_scratch_folder(layers, key, job) as folder, reproducible(pair.device), torch.inference_mode():
            pair.announce(folder, title, scratch_sizes=2)  # the networks' inputs, and what is to be explained
            stream, _, side_by_side = pair.side_by_side()
            folds = [left_out[pair.own] for left_out in folds_of(pair.parts)]
            refitted = side_by_side.run(Refit(stream, job, folds), folder, title)
            pair.write(refitted, out)
    return out


def folds_of(parts: Sequence[Part]) -> list[torch.Tensor]:
    """Return what is left out in turn, bool [rows], of rows that lie in these parts: every source, or of one source each half."""
    sources = dict.fromkeys(part.source for part in parts)
    kinds: list[str | int] = [part.source if len(sources) > 1 else part.half for part in parts]
    distinct = dict.fromkeys(kinds)
    return [torch.tensor([kind == one for kind in kinds]) for one in distinct] if len(distinct) > 1 else []
