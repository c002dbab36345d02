"""What a training reads, opened and checked before any weight is loaded."""

from dataclasses import dataclass
from pathlib import Path

from slimqwen.artifacts import fingerprint
from slimqwen.checkpoint.readable import check_companions
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.data.store import TokenManifest, check_vocabulary, load_manifest
from slimqwen.parallel.expert_parallel import check_expert_ranks
from slimqwen.parallel.ranks import Ranks
from slimqwen.recipe import DistilRecipe
from slimqwen.training.moments import check_moments
from slimqwen.training.optimizer import check_optimizer, check_trained


@dataclass(frozen=True)
class TrainingInputs:
    """The artefacts that a training reads.

    student: checkpoint folder; its layout and dtypes are kept. Trained in float32.
    tokens: folder written by `tokenize`, made with the student's tokenizer.
    teacher: checkpoint folder; needed by the terms kd and mtp_kd, ignored without them. Of `teacher: cache` it is only
        compared with the one that the cache is of.
    teacher_cache: folder written by `write_teacher_cache`, for `teacher: cache`.
    moments: folder written by `carry`, with which AdamW begins; None: zeros.
    """

    student: Path
    tokens: Path
    teacher: Path | None = None
    teacher_cache: Path | None = None
    moments: Path | None = None


@dataclass(frozen=True)
class OpenInputs:
    """The same, opened. teacher: the checkpoint that runs beside the student; None where none does."""

    paths: TrainingInputs
    student: Checkpoint
    teacher: Checkpoint | None
    manifest: TokenManifest

    @classmethod
    def open(cls, paths: TrainingInputs, recipe: DistilRecipe) -> "OpenInputs":
        """Open them. Raises UserError where they do not belong together, or lack something that the recipe needs."""
        student, manifest = Checkpoint(paths.student), load_manifest(paths.tokens)
        check_vocabulary(manifest, paths.tokens, paths.student, student.config["vocab_size"])
        is_live = recipe.is_taught and recipe.teacher.kind == "live"
        teacher = Checkpoint(paths.teacher) if is_live and paths.teacher is not None else None
        check_companions(paths.student)
        check_terms(recipe, student, teacher)
        if paths.moments is not None:
            check_moments(paths.moments, student, recipe.optimizer)
        return cls(paths, student, teacher, manifest)

    def identity(self) -> dict[str, object]:
        """Return what the training depends on of them; a teacher cache has an identity of its own."""
        moments = self.paths.moments
        return {
            "student": self.student.fingerprint(),
            "teacher": None if self.teacher is None else self.teacher.fingerprint(),
            "tokens": self.manifest.model_dump(mode="json"),
            "moments": None if moments is None else fingerprint(moments),
        }


def check_terms(recipe: DistilRecipe, student: Checkpoint, teacher: Checkpoint | None) -> None:
    """Raise UserError where the terms of the loss need something that the student or the live teacher lacks."""
    terms = set(recipe.terms)
    if not student.has_mtp and not terms & {"lm", "kd"}:
        raise UserError(
            f"{student.folder} has no MTP module, and distil.terms has nothing else to train: add lm or kd."
        )
    if not recipe.is_taught or recipe.teacher.kind == "cache":  # which `open_teacher_cache` checks
        return
    if teacher is None:
        raise UserError(
            "the loss has the terms kd or mtp_kd, which need a teacher: give one, or set distil.terms to [lm, mtp_lm]."
        )
    if student.config["vocab_size"] != teacher.config["vocab_size"]:
        raise UserError(
            f"teacher {teacher.folder} has {teacher.config['vocab_size']:,} tokens in its vocabulary and student "
            f"{student.folder} {student.config['vocab_size']:,}: distillation compares whole distributions and needs the "
            "same vocabulary."
        )
    if recipe.is_taught_by_mtp and not teacher.has_mtp:
        raise UserError(
            f"distil.mtp_target is 'mtp', but teacher {teacher.folder} has no MTP module: use mtp_target: main."
        )


def check_ranks(inputs: OpenInputs, recipe: DistilRecipe, ranks: Ranks, offloads: bool = False) -> None:
    """Raise UserError where these ranks cannot share the batch, the optimiser's work or a model's experts.

    offloads: whether the student's weights lie in the host's memory.
    """
    check_batch(recipe, ranks.size)
    check_optimizer(recipe.optimizer, inputs.student, ranks.size, offloads=offloads)
    check_trained(recipe, inputs.student)
    for checkpoint in (inputs.student, inputs.teacher):
        if checkpoint is not None and ranks.experts_mesh is not None:
            check_expert_ranks(checkpoint, ranks.experts_mesh["expert"].size())


def check_batch(recipe: DistilRecipe, ranks: int) -> None:
    """Raise UserError where a batch cannot be divided evenly among that many ranks."""
    name, rows = "batch_size", recipe.batch_size
    if recipe.batch_size_ramp is not None:  # whose batches are multiples of the first
        name, rows = "batch_size_ramp.start", recipe.batch_size_ramp.start
    if rows % ranks:
        raise UserError(f"distil.{name} {rows} cannot be shared by {ranks} ranks: make it a multiple of {ranks}.")
