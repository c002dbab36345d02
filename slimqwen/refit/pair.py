"""A cut model and the one that it was cut from, with the text that goes through both."""

import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open

from slimqwen.artifacts import atomic_folder
from slimqwen.artifacts.disk import check_space
from slimqwen.calibration.text import CalibrationText
from slimqwen.checkpoint.readable import check_companions
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.shards import TensorInfo
from slimqwen.checkpoint.writer import CheckpointWriter, copy_companions
from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.errors import UserError
from slimqwen.core.progress import say
from slimqwen.layerwise.memory import allot, settings_of
from slimqwen.layerwise.ranks import share_of
from slimqwen.layerwise.side_by_side import SideBySide
from slimqwen.layerwise.stream import Stream
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.parallel.job import Job
from slimqwen.planning.plan import Plan
from slimqwen.recipe import Execution, TextSettings
from slimqwen.refit.projection import Projection

FORMAT = "slimqwen.layerwise/2"  # of the folder in which finished layers are kept


class Pair:
    """The student as `prune` made it of the teacher by the plan, perhaps changed layer by layer since, and some text.

    rows: the text, int64 [rows, sequence_length + 1]; parts: of each row its source and half; own: the rows that go through the
    layers on this rank of the job.
    """

    def __init__(
        self,
        student: Path,
        teacher: Path,
        *,
        plan: Path | Plan,
        tokens: Path | Mapping[str, Path],
        text: TextSettings,
        samples: int,
        execution: Execution,
        job: Job,
    ) -> None:
        """Read both models, the plan and the text.

        Raises UserError where plan, student and teacher do not belong together, and where the student was trained since.
        """
        self.student, self.teacher = Checkpoint(student), Checkpoint(teacher)
        check_companions(student)
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        check_belong_together(self.student, self.teacher, self.plan)
        self.projection = Projection(self.teacher, self.plan, plan if isinstance(plan, Path) else None)
        self.projection.check(self.student, self.teacher)
        sequences = CalibrationText(
            tokens, self.student, samples=samples, sequence_length=text.sequence_length, seed=text.seed
        )
        sequences.warn_where_short()
        self.rows, self.parts = sequences.read()
        self.own = share_of(len(self.rows), *job.share)
        self.device = resolve_device(execution.device)
        self.dtype = resolve_dtype(text.dtype, self.device)
        own_rows = max(self.own.stop - self.own.start, 1)
        self._allotments = [
            allot(checkpoint, execution, rows=own_rows, sequence_length=text.sequence_length, dtype=self.dtype)
            for checkpoint in (self.student, self.teacher)
        ]
        self._text, self._settings, self._job = sequences.fingerprint, settings_of(execution), job

    @property
    def made_from(self) -> list[Any]:
        """Everything that the walk depends on, the number of ranks apart, which only rounds."""
        return [
            FORMAT,
            self.student.fingerprint(),
            self.teacher.fingerprint(),
            self.plan.model_dump(mode="json"),
            self._text,
            self._settings,
            str(self.dtype),
            self.device.type,
        ]

    @property
    def rows_per_pass(self) -> int:
        """Rows that the student's layers take at once."""
        return self._allotments[0].rows_per_pass

    def side_by_side(self) -> tuple[Stream, Stream, SideBySide]:
        """Return the student's stream, the teacher's, and the walk over both."""
        student, teacher = (
            Stream(checkpoint, self.rows[self.own], allotment, self.dtype, self.device, first_row=self.own.start)
            for checkpoint, allotment in zip((self.student, self.teacher), self._allotments, strict=True)
        )
        return student, teacher, SideBySide(student, teacher, self.plan.kept_layers, self.projection.after, self._job)

    def write(self, changed: Iterable[Path], out: Path) -> None:
        """Write the student with the changed tensors in these files to the folder `out`, with what lies beside the weights.

        The first rank does; the others wait.
        """

        def write() -> str:
            with atomic_folder(out) as partial:
                write_changed(self.student, changed, partial)
                copy_companions(self.student.folder, partial)
            return str(out)

        self._job.lead(write)

    def announce(self, folder: Path, title: str, scratch_sizes: int = 0) -> None:
        """Print what the work will take. Raises StageFailed where the disk is too small.

        scratch_sizes: the student's hidden states that a layer keeps in files beside the streams before and after it.
        """
        tokens = self.rows[:, 1:].numel()
        hidden = (2 + scratch_sizes) * self.student.config["hidden_size"] + 2 * self.teacher.config["hidden_size"]
        needed = 4 * tokens * hidden + 2 * self.student.bytes()  # the changed tensors, and the result
        free = shutil.disk_usage(folder).free
        layers = sum(block.recall is not None for block in self.student.family.blocks(self.student.config))
        say(
            f"{title}: {layers} layers on {tokens:,} tokens; it takes "
            f"{bytes_in_words(needed)} of disk, {bytes_in_words(free)} are free"
        )
        check_space(folder.parent, needed, free, "use fewer samples")


def check_belong_together(student: Checkpoint, teacher: Checkpoint, plan: Plan) -> None:
    """Raise UserError where the plan was made for another teacher, or leaves another student."""
    if plan.checkpoint != teacher.fingerprint():
        raise UserError(
            f"the plan was not made for {teacher.folder}, or by an earlier version of slimqwen: give the teacher that was pruned."
        )
    for field, wanted in plan.target.model_dump(exclude_none=True).items():
        if student.config[field] != wanted:
            raise UserError(
                f"{student.folder} has {field} {student.config[field]} and the plan leaves {wanted}: give what `slimqwen prune` "
                "made by this plan."
            )
    if plan.kept_layers != sorted(plan.kept_layers):
        raise UserError("the plan changes the order of the layers, and this follows the teacher's: keep the order.")
    if not student.family.moe_blocks(student.config):
        raise UserError(
            f"{student.folder} has no layer with routed experts left, and slimqwen compresses mixtures of experts: keep one."
        )


def write_changed(student: Checkpoint, changed: Iterable[Path], folder: Path) -> None:
    """Write the student with some of its tensors replaced into an existing (temporary) folder.

    changed: the files that hold these, under their own names.
    """
    planned = [TensorInfo(name, student.dtype(name), spec.shape) for name, spec in student.specs.items()]
    with CheckpointWriter(folder, planned) as writer, ExitStack() as stack:
        replaced: dict[str, Any] = {}
        for path in changed:
            file = stack.enter_context(safe_open(path, framework="pt"))
            replaced |= dict.fromkeys(file.keys(), file)
        for name, dtype, _ in writer.missing():
            tensor = replaced[name].get_tensor(name) if name in replaced else student.read(name)
            writer.add(name, tensor.to(dtype))
        writer.finish(student.family.to_disk(student.config))
