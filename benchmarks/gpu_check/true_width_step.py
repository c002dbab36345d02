"""A distillation step at the widths of Qwen3-Next-80B-A3B and SlimQwen-23A2B, at two depths, extrapolated layer by layer.

One layer of full attention; the same and a DeltaNet layer; the same and another of full attention. The differences are the
time of a layer of each kind, teacher's and student's together; the whole models have 36 and 12 (teacher), 27 and 9 (student)
of them. Extrapolated are milliseconds for one micro-batch on one GPU that would hold everything: without any traffic.
"""

import gc
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from section import Part, Section, median_seconds, wait
from step import DEMO, profile_step, random_model, random_stream
from torch.profiler import ProfilerActivity, profile

from slimqwen.checkpoint.config import read_config
from slimqwen.families import Config, Family
from slimqwen.model.device import resolve_dtype
from slimqwen.model.kernels import kernels_of
from slimqwen.model.live_bytes import measured_peak
from slimqwen.model.peaks import dense_bf16_flops
from slimqwen.recipe import DistilRecipe, Duration, Execution, Target
from slimqwen.recipe.file import load_recipe
from slimqwen.shapes.target import completed, target_config
from slimqwen.training.dry_run import held_bytes, predict_memory
from slimqwen.training.speed import flops_per_token
from slimqwen.training.teacher import LiveTeacher
from slimqwen.training.trainer import Span, Student, Trainer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10_000
ATTENTION, WITH_DELTANET, WITH_ATTENTION = "attention", "attention + DeltaNet", "attention + attention"
LAYERS = {  # of the source, by name of the part; every fourth layer has full attention
    ATTENTION: [3],
    WITH_DELTANET: [0, 3],
    WITH_ATTENTION: [3, 7],
}
TEACHER_LAYERS, STUDENT_LAYERS = {"deltanet": 36, "attention": 12}, {"deltanet": 27, "attention": 9}
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def configs(quick: bool, kept: list[int]) -> tuple[Family, Config, Config]:
    """Return the family, and the configs of teacher and student with layers of these kinds."""
    name = "slimqwen/builtin/teacher/config.json" if quick else "recipes/qwen3-next-80b-a3b.json"
    family, config = read_config(ROOT / name)
    target = DEMO if quick else load_recipe(ROOT / "recipes/slimqwen-23a2b.yaml", model=Target)
    target = target.model_copy(update={"num_hidden_layers": len(kept)})
    teacher = family.resized(config, family.sizes(config), kept, config["num_experts_per_tok"])
    student = target_config(family, teacher, completed(family, target, teacher))
    return family, teacher | {"num_nextn_predict_layers": 0}, student


def build(section: Section, folder: Path, kept: list[int]) -> Trainer:
    """Build a trainer of random models with one row to a micro-batch."""
    device = torch.device(section.device)
    family, teacher_config, student_config = configs(section.quick, kept)
    teacher = random_model(teacher_config, device, resolve_dtype("auto", device)).eval().requires_grad_(False)
    student = random_model(student_config, device, torch.float32).train()
    length = 32 if section.quick else 4096
    folder.mkdir()
    stream = random_stream(folder, student_config["vocab_size"], 64 * length, length)
    recipe = DistilRecipe(tokens=STEPS * length, batch_size=1, warmup=Duration(0, "steps"))
    return Trainer(
        Student(student, family, student_config),
        LiveTeacher(teacher, teaches_mtp=False),
        stream,
        recipe,
        Span(0, STEPS, STEPS),
        execution=Execution(device=section.device),
    )


def count_launches(trainer: Trainer) -> tuple[str, int]:
    """Count the kernels that a step launches, or on a CPU the operations that it calls."""
    on_gpu = trainer.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        trainer.step(8)
        wait(trainer.device.type)
    counts = {event.key: event.count for event in seen.key_averages()}
    if on_gpu:
        return "launches", sum(count for name, count in counts.items() if name in LAUNCHES)
    return "operations", sum(count for name, count in counts.items() if name.startswith("aten::"))


def count_synchronisations(trainer: Trainer) -> int:
    """Count how often a step waits for the GPU, as PyTorch's own debugging mode sees it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        trainer.step(9)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def measure(section: Section, part: Part, trainer: Trainer) -> dict[str, float]:
    """Measure steps; return the seconds of the teacher and of all else."""
    device, length = section.device, trainer.stream.sequence_length
    predicted, held = predict_memory(trainer).peak_bytes, held_bytes(trainer)
    with measured_peak(trainer.device) as peak:
        trainer.step(0)
    took = median_seconds(lambda: trainer.step(1), device, rounds=2 if section.quick else 8)
    profiled = profile_step(trainer, 2)
    teacher = profiled["teacher"] / profiled["step"] * took
    part.note(milliseconds=1e3 * took, teacher_milliseconds=1e3 * teacher, tokens_per_second=length / took)
    ceiling = dense_bf16_flops(trainer.device)
    if ceiling is not None:
        part.note(mfu=flops_per_token(trainer) * length / took / ceiling)
    part.note(peak_gb=(held + peak.extra_bytes) / 1e9, peak_over_predicted=(held + peak.extra_bytes) / predicted)
    what, count = count_launches(trainer)
    part.note(**{what: count})
    if section.on_gpu:
        part.note(synchronisations=count_synchronisations(trainer))
    return {"teacher": teacher, "rest": took - teacher, "launches": count}


def extrapolate(measured: dict[str, dict[str, float]], part: Part) -> None:
    """Add up what layers of each kind take, as often as the whole models have them."""

    def whole(what: str, layers: dict[str, int]) -> float:
        least = measured[ATTENTION][what]
        deltanet = measured[WITH_DELTANET][what] - least
        attention = measured[WITH_ATTENTION][what] - least
        part.note(**{f"{what}_per_deltanet": deltanet, f"{what}_per_attention": attention})
        return least + layers["deltanet"] * deltanet + (layers["attention"] - 1) * attention

    teacher, rest = whole("teacher", TEACHER_LAYERS), whole("rest", STUDENT_LAYERS)
    part.note(seconds_per_micro_batch=teacher + rest, launches=round(whole("launches", STUDENT_LAYERS)))


def main() -> None:
    with Section() as section, tempfile.TemporaryDirectory() as temporary:
        measured: dict[str, dict[str, float]] = {}
        for name, kept in LAYERS.items():
            with section.part(name) as part:
                trainer: Any = build(section, Path(temporary) / name.replace(" ", ""), kept)
                measured[name] = measure(section, part, trainer)
                used = kernels_of(trainer.student.family, trainer.student.config, trainer.device)
                part.note(kernels={kernel.part: kernel.used for kernel in used})
            trainer = None
            gc.collect()
            if section.on_gpu:
                torch.cuda.empty_cache()
        with section.part("extrapolated to 48 and 36 layers") as part:
            if measured.keys() != LAYERS.keys():
                raise RuntimeError("a depth was not measured")
            extrapolate(measured, part)


if __name__ == "__main__":
    main()
