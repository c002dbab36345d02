"""The stage `heal`: a cut checkpoint, its teacher and tokens in, the same checkpoint with every layer trained alone out."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from slimqwen.artifacts import fingerprint_value, makes_folder
from slimqwen.calibration.statistics import Part
from slimqwen.core.errors import UserError
from slimqwen.core.progress import quiet
from slimqwen.healing.layers import ARITHMETIC, Healing, Split
from slimqwen.layerwise.ranks import shared_scratch_folder
from slimqwen.model.device import reproducible, resolve_device
from slimqwen.model.kernels import check_gradients
from slimqwen.parallel.job import join_job
from slimqwen.planning.plan import Plan
from slimqwen.recipe import Execution, HealingRecipe, TextSettings
from slimqwen.refit.pair import Pair

HELD_FOR_GRADIENTS = 3  # times as much memory for activations as without gradients, about
LEFT_OUT = 16  # of each source every 16th sequence is left out of the training


@makes_folder("student", "teacher", "tokens", "plan", kind="checkpoint")
def heal(
    student: Path,
    out: Path,
    *,
    teacher: Path,
    plan: Path | Plan,
    tokens: Path | Mapping[str, Path],
    text: TextSettings,
    recipe: HealingRecipe = HealingRecipe(),  # noqa: B008 - immutable
    execution: Execution = Execution(),  # noqa: B008 - immutable
    title: str = "heal",
) -> Path:
    """Train every layer of `student` alone so that it ends where the teacher's does, MTP's too; returns `out`.

    Layer after layer, on the student's own stream: what goes into a layer is the output of the healed layers before it, and its
    target is the teacher's stream after the same layer, in the student's coordinates. Every weight of the layer trains, in float32
    (bfloat16 products on a GPU). Embeddings, the final norm and lm_head stay, as do layout and dtypes. In memory there
    are one layer's weights five times (itself, where it began, gradients and AdamW's moments), and with the last layer both lm_heads and
    a few rows of logits; hidden states lie in files. Interrupted, it continues with the layer under way. All processes that torchrun
    started may call it together: each takes a share of the sequences through the layers, and gradients are added up.

    Args:
        student: what `prune` made of `teacher` by `plan`, refitted or not, embeddings not trained since.
        tokens: folder written by `tokenize`, or several by the names of their sources; the first sequences of their training orders of
            `text.seed` are used. Of each source every 16th is left out, to measure whether a layer has become better.
        execution: its memory_budget is for activations; the batches are those of the training, `recipe.batch_size`.
        text: its seed is also that of the order in which a layer sees the sequences.

    Raises UserError where plan, student and teacher do not belong together, where the embeddings were trained since, for one
    sequence, and where the disk is too small.
    """
    check_samples(recipe.samples, 1 if isinstance(tokens, Path) else len(tokens))
    budget = execution.memory_budget // HELD_FOR_GRADIENTS
    passes = execution.model_copy(update={"batch_size": recipe.batch_size, "memory_budget": budget})
    with join_job(resolve_device(execution.device)) as job, quiet(not job.is_first):
        pair = Pair(
            student, teacher, plan=plan, tokens=tokens, text=text, samples=recipe.samples, execution=passes, job=job
        )
        check_gradients(pair.student.family, pair.student.config, pair.device)
        split = _split(pair)
        layers = out.with_name(f"{out.name}.layers")
        key = fingerprint_value(
            [version("slimqwen"), *pair.made_from, recipe.model_dump(mode="json"), *ARITHMETIC, LEFT_OUT]
        )
        with shared_scratch_folder(layers, key, job) as folder, reproducible(pair.device):
            pair.announce(folder, title)
            ours, theirs, side_by_side = pair.side_by_side()
            healing = Healing(
                ours, theirs, recipe, seed=text.seed, split=split, rows_per_pass=pair.rows_per_pass, job=job
            )
            changed = side_by_side.run(healing, folder, title)
            pair.write(changed, out)
    return out


def _split(pair: Pair) -> Split:
    """Return the rows that are left out and those to train on. Raises UserError where there is none to train on."""
    left_out = left_out_of(pair.parts)
    in_training = training_of(pair.rows, left_out)
    if not in_training.any():
        raise UserError(
            "healing leaves one sequence of each source out of its training, and this text has no other: give more of it, or "
            "shorter sequences."
        )
    return Split(left_out, in_training)


def check_samples(samples: int, sources: int) -> None:
    """Raise UserError for fewer sequences than one to train on and one to leave out of each source."""
    if samples < 2 * sources:
        raise UserError(
            f"healing leaves one sequence of each source out of its training, and {samples} of {sources} source"
            f"{'s' if sources > 1 else ''} leave nothing to train on: raise samples to at least {2 * sources}."
        )


def left_out_of(parts: Sequence[Part]) -> torch.Tensor:
    """Return the rows to measure whether a layer has become better, bool [rows]: every 16th of each source, one at least."""
    result = torch.zeros(len(parts), dtype=torch.bool)
    for source in dict.fromkeys(part.source for part in parts):
        rows = [row for row, part in enumerate(parts) if part.source == source]
        result[rows[LEFT_OUT - 1 :: LEFT_OUT] or rows[-1:]] = True
    return result


def training_of(rows: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """Return the rows to train on, bool [rows]: those that are not left out, and none that is the same text as one of these.

    A source with fewer sequences than samples has some of them twice. rows: int64 [rows, sequence_length + 1].
    """
    seen = {tuple(row) for row in rows[left_out].tolist()}
    return torch.tensor([tuple(row) not in seen for row in rows.tolist()], dtype=torch.bool)
