"""The stage `repair`: a freshly pruned checkpoint, its teacher and tokens in, the same checkpoint with refitted matrices out."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from slimqwen.artifacts import atomic_folder, fingerprint_value, makes_folder, scratch_folder
from slimqwen.bytesize import bytes_in_words
from slimqwen.calibration.memory import Allotment, allot
from slimqwen.calibration.statistics import Part
from slimqwen.calibration.text import TRAINING_TEXT, CalibrationText
from slimqwen.checkpoint.readable import check_companions
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.shards import TensorInfo
from slimqwen.checkpoint.writer import CheckpointWriter, copy_companions
from slimqwen.errors import StageFailed, UserError
from slimqwen.modeling.device import reproducible, resolve_device, resolve_dtype
from slimqwen.planning.plan import Plan
from slimqwen.progress import say
from slimqwen.repair.layers import RIDGE, SWEEPS, LayerByLayer
from slimqwen.repair.projection import Projection
from slimqwen.repair.stream import Stream


@makes_folder("student", "teacher", "tokens", "plan", kind="checkpoint")
def repair(
    student: Path,
    out: Path,
    *,
    teacher: Path,
    plan: Path | Plan,
    tokens: Path | Mapping[str, Path],
    samples: int = 512,
    batch_size: int = 8,
    sequence_length: int = 256,
    memory_budget_bytes: int = 2_000_000_000,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    title: str = "repair",
) -> Path:
    """Refit the output matrices of `student`'s experts (routed, shared) and dense MLPs, MTP's too; returns `out`.

    Layer after layer, on the student's own stream, they are solved for in closed form (ridge regression, float64) so that the
    stream is where the teacher's is after the same layer. Nothing else changes, layout and dtypes neither. Only one layer's
    weights are needed at a time; the text's hidden states lie in files. Interrupted, it continues with the layer under way.

    Args:
        student: what `prune` made of `teacher` by `plan`, not trained since.
        tokens: folder written by `tokenize`, or several by the names of their sources; the first `samples` sequences of their training
            orders of `seed` are used. How far a layer's refit is taken is what text left out says: each source in turn, or of
            one each half.
        batch_size: sequences that a token mixer takes at once, at most; changes speed, and the result by rounding.
        memory_budget_bytes: for activations.

    Raises UserError where plan, student and teacher do not belong together, where the student was trained since, and where
    the disk is too small.
    """
    sources = {TRAINING_TEXT: tokens} if isinstance(tokens, Path) else tokens
    cut, source = Checkpoint(student), Checkpoint(teacher)
    check_companions(student)
    chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
    check_belong_together(cut, source, chosen)
    projection = Projection(source, chosen, plan if isinstance(plan, Path) else None)
    projection.check(cut, source)
    text = CalibrationText(sources, cut, samples=samples, sequence_length=sequence_length, seed=seed)
    text.say_what_is_short()
    batches = list(text.batches(batch_size))
    rows = torch.cat([batch for _, batch in batches])
    parts = [part for part, batch in batches for _ in batch]
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)

    def allotted(checkpoint: Checkpoint) -> Allotment:
        return allot(
            checkpoint,
            parts=0,
            rows=len(rows),
            sequence_length=sequence_length,
            batch_size=batch_size,
            budget_bytes=memory_budget_bytes,
            dtype=torch_dtype,
            device=torch_device,
        )

    allotments = [allotted(checkpoint) for checkpoint in (cut, source)]
    made_from = [
        version("slimqwen"),
        cut.fingerprint(),
        source.fingerprint(),
        chosen.model_dump(mode="json"),
        text.fingerprint,
        [(allotment.rows_per_pass, allotment.rows_per_chunk) for allotment in allotments],
        str(torch_dtype),
        torch_device.type,
        RIDGE,
        SWEEPS,
    ]
    layers = out.with_name(f"{out.name}.layers")
    with (
        scratch_folder(layers, fingerprint_value(made_from)) as folder,
        reproducible(torch_device),
        torch.inference_mode(),
    ):
        streams = [
            Stream(checkpoint, rows, allotment, torch_dtype, torch_device)
            for checkpoint, allotment in zip((cut, source), allotments, strict=True)
        ]
        _announce(folder, cut, source, rows[:, 1:].numel(), title)
        layer_by_layer = LayerByLayer(streams[0], streams[1], chosen.kept_layers, projection, folds_of(parts))
        refitted = layer_by_layer.run(folder, title)
        with atomic_folder(out) as partial:
            write_refitted(cut, refitted, partial)
            copy_companions(student, partial)
    return out


def folds_of(parts: Sequence[Part]) -> list[torch.Tensor]:
    """What is left out in turn, bool [rows], of rows that lie in these parts: every source, or of one source each half."""
    sources = dict.fromkeys(part.source for part in parts)
    kinds: list[str | int] = [part.source if len(sources) > 1 else part.half for part in parts]
    distinct = dict.fromkeys(kinds)
    return [torch.tensor([kind == one for kind in kinds]) for one in distinct] if len(distinct) > 1 else []


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
        raise UserError("the plan changes the order of the layers, and repair follows the teacher's: keep the order.")
    if not student.family.moe_blocks(student.config):
        raise UserError(
            f"{student.folder} has no layer with routed experts left, and slimqwen compresses mixtures of experts: keep one."
        )


def write_refitted(student: Checkpoint, refitted: Iterable[Path], folder: Path) -> None:
    """The student with some of its tensors replaced, into an existing (temporary) folder.

    refitted: the files that hold these, under their own names.
    """
    planned = [TensorInfo(name, student.dtype(name), spec.shape) for name, spec in student.specs.items()]
    with CheckpointWriter(folder, planned) as writer, ExitStack() as stack:
        replaced: dict[str, Any] = {}
        for path in refitted:
            file = stack.enter_context(safe_open(path, framework="pt"))
            replaced |= dict.fromkeys(file.keys(), file)
        for name, dtype, _ in writer.missing():
            tensor = replaced[name].get_tensor(name) if name in replaced else student.read(name)
            writer.add(name, tensor.to(dtype))
        writer.finish(student.family.to_disk(student.config))


def _announce(folder: Path, student: Checkpoint, teacher: Checkpoint, tokens: int, title: str) -> None:
    """Say what the work will take. Raises StageFailed where the disk is too small."""
    hidden = (
        4 * student.config["hidden_size"] + 2 * teacher.config["hidden_size"]
    )  # before and after a layer; asked; scratch
    needed = 4 * tokens * hidden + 2 * student.bytes()  # the refitted matrices, and the result
    free = shutil.disk_usage(folder).free
    layers = sum(block.recall is not None for block in student.family.blocks(student.config))
    say(
        f"{title}: {layers} layers on {tokens:,} tokens; it takes "
        f"{bytes_in_words(needed)} of disk, {bytes_in_words(free)} are free"
    )
    if needed > free:
        raise StageFailed(
            f"{bytes_in_words(needed)} are to be written to {folder.parent}, and {bytes_in_words(free)} are free: make room, "
            "write to another disk, or repair on fewer samples."
        )
