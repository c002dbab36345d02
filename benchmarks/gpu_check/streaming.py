"""Calibration layer by layer, the weights read from the disk: tokens/s, and its peak of memory over what it allotted."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from material import write_tokens
from section import Section
from synthetic import write_synthetic

from slimqwen.builtin import TEACHER
from slimqwen.calibration import calibrate as calibrate_module
from slimqwen.checkpoint.config import read_json
from slimqwen.layerwise.memory import Allotment
from slimqwen.recipe import CalibrationRecipe, Execution, TextSettings
from slimqwen.training.speed import peak_memory

ROOT = Path(__file__).resolve().parents[2]
TRUE_WIDTHS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 128,  # of 512: a quarter of the bytes on the disk, and still many
    "num_nextn_predict_layers": 0,
}


def main() -> None:
    with Section() as section, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = TEACHER
        with section.part("checkpoint") as part:
            if not section.quick:
                checkpoint = folder / "checkpoint"
                checkpoint.mkdir()
                started = time.perf_counter()
                write_synthetic(checkpoint, read_json(ROOT / "recipes/qwen3-next-80b-a3b.json") | TRUE_WIDTHS)
                part.note(seconds=time.perf_counter() - started)
            part.note(gb=sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 1e9)
        with section.part("calibrate --streaming") as part:
            tokens = write_tokens(folder, "slimqwen/training" if section.quick else "slimqwen")
            samples, length = (4, 64) if section.quick else (128, 1024)
            allotted: list[Allotment] = []

            def allot(*arguments: Any, **named: Any) -> Allotment:
                allotted.append(usual(*arguments, **named))
                return allotted[-1]

            usual, calibrate_module.allot = calibrate_module.allot, allot
            before = peak_memory(torch.device(section.device))
            started = time.perf_counter()
            calibrate_module.calibrate(
                checkpoint,
                folder / "statistics.safetensors",
                tokens=tokens,
                recipe=CalibrationRecipe(samples=samples),
                text=TextSettings(sequence_length=length),
                execution=Execution(device=section.device, streaming=True),
            )
            took = time.perf_counter() - started
            peak = peak_memory(torch.device(section.device))
            allotment = allotted[0].on_gpu_bytes if section.on_gpu else allotted[0].total_bytes
            part.note(
                tokens_per_second=samples * length / took,
                seconds=took,
                peak_gb=peak / 1e9,
                peak_gb_before=before / 1e9,
                allotted_gb=allotment / 1e9,
                peak_over_allotted=peak / allotment,
            )


if __name__ == "__main__":
    main()
