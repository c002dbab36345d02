"""Streaming calibration: the same sums as in memory, in every family and layout; the same bits after any interruption."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import Ranks
from rounding import FORWARD, error
from settings import sections
from tiny import write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextExperts
from typer.testing import CliRunner

from slimqwen.calibration import calibrate as calibrate_module
from slimqwen.calibration import statistics as statistics_module
from slimqwen.calibration import walk
from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.observe import add_layer_sums
from slimqwen.calibration.statistics import ADDED_AT_ONCE, Part, Statistics, check_finite
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.cli import app
from slimqwen.core.errors import UserError
from slimqwen.core.stopwatch import Stopwatch
from slimqwen.families import FAMILIES
from slimqwen.layerwise import memory, stream, weights
from slimqwen.layerwise.memory import allot
from slimqwen.model.device import ALIGNMENT_BYTES
from slimqwen.model.experts import ExpertsObserver, Pairs, grouped
from slimqwen.model.live_bytes import measured_peak
from slimqwen.recipe import CalibrationRecipe, Execution, TextSettings

pytestmark = pytest.mark.rounding

SEQUENCE_LENGTH = 16
SAMPLES = 10  # of two sources with two halves: parts of 3 and 2 rows
BATCH_SIZE = 2


class Texts(NamedTuple):
    tokenizer: Path
    sources: dict[str, Path]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    tokenizer, tokens = write_tiny_tokens(tmp_path_factory.mktemp("texts"))
    return Texts(tokenizer, {"code": tokens, "prose": tokens})


@pytest.fixture(scope="module")
def checkpoint(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("walk") / "checkpoint", tokenizer=texts.tokenizer)


def measured(checkpoint: Path, out: Path, texts: Texts, second_moments: bool = False, **options: Any) -> Statistics:
    usual = {"sources": texts.sources, "samples": SAMPLES, "batch_size": BATCH_SIZE}
    return calibrate(
        checkpoint,
        out,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        second_moments=second_moments,
        **sections(CalibrationRecipe, usual | options),
    )


def assert_same(found: Statistics, expected: Statistics, tolerance: float = 0.0) -> None:
    """All sums, up to `tolerance` of the largest entry of each; to the bit where it is 0."""
    assert found.sums.keys() == expected.sums.keys()
    assert (found.checkpoint, found.data, found.tokens) == (expected.checkpoint, expected.data, expected.tokens)
    for name, value in expected.sums.items():
        assert error(found.sums[name], value) <= tolerance, name


# --- the same sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_layer_by_layer_is_all_at_once(tmp_path: Path, texts: Texts, model_type: str) -> None:
    """To rounding: experts see more tokens at once, and their weights lie elsewhere in memory."""
    native = FAMILIES_NATIVE[model_type]
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", native=native, tokenizer=texts.tokenizer)
    recipe = CalibrationRecipe(sources=texts.sources, samples=SAMPLES)
    at_once = calibrate(
        checkpoint,
        tmp_path / "at_once",
        recipe=recipe,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        execution=Execution(device="cpu", batch_size=1, streaming=False),
        second_moments=True,
    )
    tight = measured(checkpoint, tmp_path / "tight", texts, second_moments=True, streaming=True, memory_budget=1)
    assert_same(tight, at_once, FORWARD)
    wide = measured(checkpoint, tmp_path / "wide", texts, second_moments=True, streaming=True)
    assert_same(wide, at_once, FORWARD)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "at_once", "tight", "wide"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_on_disk_does_not_matter(tmp_path: Path, texts: Texts, dtype: torch.dtype) -> None:
    results = {}
    for layout in ("per_expert", "fused"):
        folder = tmp_path / layout
        write_tiny_checkpoint(folder, tokenizer=texts.tokenizer, layout=layout, dtype=dtype)  # type: ignore[arg-type]
        results[layout] = measured(folder, tmp_path / f"{layout}.safetensors", texts, streaming=True)
    for name, value in results["fused"].sums.items():
        assert torch.equal(results["per_expert"].sums[name], value), name
    at_once = measured(tmp_path / "fused", tmp_path / "at_once", texts, streaming=False)
    assert_same(results["fused"], at_once, FORWARD)


def test_a_layer_has_its_dense_weights_while_it_runs_and_its_experts_never(
    checkpoint: Path, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after it nothing is there."""
    models = []
    without_weights = weights.without_weights

    def seen(*arguments: Any) -> Any:
        models.append(without_weights(*arguments))
        return models[-1]

    def held(*arguments: Any) -> None:
        names = {
            name for module in models[0].modules() for name, value in vars(module).items() if isinstance(value, Tensor)
        }
        stacked = [value for value in models[0].tensors().values() if value.dim() == 3]
        assert "weight" in names and all(value.is_meta for value in stacked)
        lent = [vars(module).get("weight") for module in models[0].backbone.get_decoder().layers.modules()]
        assert not any(weight.data_ptr() % ALIGNMENT_BYTES for weight in lent if weight is not None)
        add_layer_sums(*arguments)

    monkeypatch.setattr(stream, "without_weights", seen)
    monkeypatch.setattr(walk, "add_layer_sums", held)
    measured(checkpoint, tmp_path / "s", texts, streaming=True)
    (model,) = models
    assert all(tensor.is_meta for tensor in model.held().values())
    lent = {path for path, module in model.named_modules() if any(isinstance(v, Tensor) for v in vars(module).values())}
    assert lent == {"backbone.model.embed_tokens"}  # mapped from the file


# --- interrupted ------------------------------------------------------------------------------------------------------


def interrupting(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    def stop(statistics: Statistics, number: int, *rest: Any) -> None:
        if number == layer:
            raise KeyboardInterrupt
        add_layer_sums(statistics, number, *rest)

    monkeypatch.setattr(walk, "add_layer_sums", stop)


def test_ctrl_c_loses_the_layer_under_way_and_nothing_else(
    checkpoint: Path, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = measured(checkpoint, tmp_path / "uninterrupted", texts, streaming=True)
    out = tmp_path / "statistics"
    interrupting(monkeypatch, layer=2)
    with pytest.raises(KeyboardInterrupt):
        measured(checkpoint, out, texts, streaming=True)
    assert not out.exists() and "the same command continues" in capsys.readouterr().err
    left = tmp_path / ".statistics.layers.partial"
    assert {path.name for path in tmp_path.iterdir()} == {"uninterrupted", left.name}
    assert sorted(path.name for path in left.iterdir()) == [".slimqwen", "000", "001"]
    assert [path.parent.name for path in left.glob("*/hidden_states.0-10")] == ["001"]

    monkeypatch.undo()
    again: list[int] = []
    monkeypatch.setattr(walk, "add_layer_sums", lambda *a: again.append(a[1]) or add_layer_sums(*a))
    assert_same(measured(checkpoint, out, texts), expected)  # without --streaming: what was begun is finished
    assert set(again) == {2, 3}
    assert {path.name for path in tmp_path.iterdir()} == {"uninterrupted", "statistics"}


def test_other_settings_begin_again(
    checkpoint: Path, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hidden states of other batches would be a mixture."""
    out = tmp_path / "statistics"
    with monkeypatch.context() as patch:
        interrupting(patch, layer=2)
        with pytest.raises(KeyboardInterrupt):
            measured(checkpoint, out, texts, streaming=True)
    tight = measured(checkpoint, out, texts, streaming=True, memory_budget=1)
    assert "is removed" in capsys.readouterr().err
    assert_same(tight, measured(checkpoint, tmp_path / "tight", texts, streaming=True, memory_budget=1))


def calibrate_until_killed(command: list[str]) -> None:
    """kill -9 by itself in the third layer."""

    def kill(statistics: Statistics, number: int, *rest: Any) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        add_layer_sums(statistics, number, *rest)

    walk.add_layer_sums = kill
    app(command)


def test_killed_and_called_again(checkpoint: Path, texts: Texts, tmp_path: Path) -> None:
    out = tmp_path / "statistics"
    options = ["--samples", str(SAMPLES), "--batch-size", str(BATCH_SIZE), "--sequence-length", str(SEQUENCE_LENGTH)]
    for name, folder in texts.sources.items():
        options += ["--tokens", f"{name}={folder}"]
    options += ["--streaming", "--no-second-moments", "--device", "cpu"]
    command = ["calibrate", str(checkpoint), "--out", str(out), *options]
    codes, printed = Ranks(1, calibrate_until_killed, command).end()
    assert codes == [-signal.SIGKILL], printed
    assert not out.exists() and (tmp_path / ".statistics.layers.partial").is_dir()

    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["statistics"]
    assert_same(Statistics.load(out), measured(checkpoint, tmp_path / "uninterrupted", texts, streaming=True))


# --- how much at once -------------------------------------------------------------------------------------------------


def test_a_budget_is_shared_out(checkpoint: Path) -> None:
    def allotted(budget_bytes: int) -> memory.Allotment:
        return allot(
            Checkpoint(checkpoint),
            Execution(device="cpu", batch_size=8, memory_budget=budget_bytes),
            rows=64,
            sequence_length=SEQUENCE_LENGTH,
            dtype=torch.float32,
            parts=2,
        )

    smallest, largest = allotted(1), allotted(10**9)
    assert (smallest.rows_per_pass, smallest.rows_per_chunk) == (1, 1)
    assert (largest.rows_per_pass, largest.rows_per_chunk) == (8, 64)
    before = smallest
    for budget in (200_000, 400_000, 800_000, 1_600_000):
        some = allotted(budget)
        assert some.activations_bytes <= budget and some.rows_per_pass <= some.rows_per_chunk
        assert some.rows_per_pass >= before.rows_per_pass and some.rows_per_chunk >= before.rows_per_chunk
        before = some
    assert smallest.rows_per_chunk < before.rows_per_chunk < 64


def test_what_does_not_fit_is_streamed(
    checkpoint: Path, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = sum(torch.Size(spec.shape).numel() for spec in Checkpoint(checkpoint).specs.values())
    sums = 4 * 5 * 8 * (32 + 16 + 8)  # parts x blocks x experts x (hidden + neurons + experts), of 8 bytes
    copies = 4 * 8 * (32 + 16) + 8 * ADDED_AT_ONCE  # of a batch's sums: experts x (hidden + neurons), of 4 bytes
    budget = 1_000_000
    for spare, streamed in ((0, False), (-1, True)):
        monkeypatch.setattr(
            memory, "available_bytes", lambda _, spare=spare: 4 * parameters + 8 * sums + copies + budget + spare
        )
        measured(checkpoint, tmp_path / f"{streamed}", texts, memory_budget=budget)
        assert ("layer by layer" in capsys.readouterr().err) is streamed


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_next"]
)  # the latter with an MTP module, which has norms of its own
def test_second_moments_are_within_what_is_promised(
    family: str, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By counting live bytes, layer by layer, where second moments are nearly all there is; the last layer has three norms."""
    wide = write_tiny_checkpoint(
        tmp_path / "wide", tokenizer=texts.tokenizer, native=FAMILIES_NATIVE[family], hidden_size=512
    )
    promised, peaks = [], []
    allotted, taken = calibrate_module.allot, walk.Walk._take

    def allot_and_record(*arguments: Any, **options: Any) -> memory.Allotment:
        promised.append(allotted(*arguments, **options))
        return promised[-1]

    def take_and_measure(*arguments: Any) -> None:
        with measured_peak(torch.device("cpu")) as peak:
            taken(*arguments)
        peaks.append(peak.extra_bytes)

    monkeypatch.setattr(calibrate_module, "allot", allot_and_record)
    monkeypatch.setattr(walk.Walk, "_take", take_and_measure)
    measured(wide, tmp_path / "s", texts, second_moments=True, streaming=True)
    (promise,) = promised
    assert promise.sums_bytes > 4 * 3 * 8 * 512**2  # of four parts
    assert promise.sums_bytes < max(peaks) <= promise.total_bytes - promise.process_bytes


def test_a_memory_limit_lowers_the_budget(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def allotted(limit: int | None, beside_bytes: int = 0) -> memory.Allotment:
        monkeypatch.setattr(memory, "limit_bytes", lambda: limit)
        return allot(
            Checkpoint(checkpoint),
            Execution(device="cpu", batch_size=8, memory_budget=10**9),
            rows=64,
            sequence_length=SEQUENCE_LENGTH,
            dtype=torch.float32,
            parts=2,
            beside_bytes=beside_bytes,
        )

    free = allotted(None)
    least = free.fixed_bytes + 400_000
    tight = allotted(least)
    assert tight.activations_bytes <= 400_000 < free.activations_bytes and tight.total_bytes <= least
    assert allotted(least + 5_000_000, beside_bytes=5_000_000) == tight
    assert allotted(10**12) == free and capsys.readouterr().err == ""
    assert allotted(1_000_000).rows_per_chunk == 1
    assert "this process may have 1.0 MB: it may be killed" in capsys.readouterr().err


def test_the_processes_of_a_job_share_the_limit_of_their_machine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allotted(limit: int, processes: int) -> memory.Allotment:
        monkeypatch.setattr(memory, "limit_bytes", lambda: limit)
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        settings: dict[str, Any] = {"rows": 64, "sequence_length": SEQUENCE_LENGTH, "dtype": torch.float32}
        return allot(Checkpoint(checkpoint), Execution(device="cpu", memory_budget=10**9), **settings)

    limit = allotted(10**12, 1).fixed_bytes + 400_000
    assert allotted(4 * limit, 4) == allotted(limit, 1) != allotted(4 * limit, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "neurons", "experts", "chosen"), [(256, 64, 16, 4), (64, 128, 8, 2)])
def test_what_all_experts_hold_at_once(
    dtype: torch.dtype, hidden: int, neurons: int, experts: int, chosen: int
) -> None:
    """Counted on a CPU: the products that a GPU computes by, with sums and without, never hold more than promised, and not far less."""
    sizes = {"hidden_size": hidden, "moe_intermediate_size": neurons}
    config = Qwen3NextConfig(num_experts=experts, num_experts_per_tok=chosen, num_hidden_layers=1, **sizes)
    module: Any = Qwen3NextExperts(config).to(dtype)
    tokens = 1024
    x = torch.randn(tokens, hidden, dtype=dtype)
    picked = torch.stack([torch.randperm(experts)[:chosen] for _ in range(tokens)])
    gates = torch.rand(tokens, chosen).to(dtype)
    observer = ExpertsObserver(lambda _name, _value: None, Stopwatch())
    held = []
    for compute in (
        lambda: grouped(module, x, Pairs.of(picked, gates, experts), observer),
        lambda: grouped_mm_experts_forward(module, x, picked, gates),
    ):
        with torch.inference_mode(), measured_peak(torch.device("cpu")) as peak:
            compute()
        held.append(peak.extra_bytes / tokens / chosen)
    promised = memory._held_by_a_pair(hidden, neurons, dtype.itemsize)
    assert 0.9 * promised < max(held) <= promised


def test_on_a_gpu_the_budget_holds_what_lies_there(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the GPU: all of a layer's experts beside the activations of all pairs, and the host's sums apart."""
    monkeypatch.setattr(memory, "gpu_bytes", lambda _: size)
    size, source = 10**12, Checkpoint(checkpoint)

    def allotted(device: str, budget: int) -> memory.Allotment:
        monkeypatch.setattr(memory, "resolve_device", lambda _: torch.device(device))
        settings: dict[str, Any] = {"rows": 64, "sequence_length": SEQUENCE_LENGTH, "dtype": torch.float32}
        return allot(source, Execution(batch_size=8, memory_budget=budget), parts=2, **settings)

    on_gpu, on_cpu = allotted("cuda", 10**6), allotted("cpu", 10**6)
    experts, hidden, neurons, chosen = 8, 32, 16, 2
    assert on_gpu.weights_bytes - on_cpu.weights_bytes == 4 * (experts - 1) * 3 * hidden * neurons
    pairs = chosen * on_gpu.rows_per_chunk * SEQUENCE_LENGTH
    assert pairs * memory._held_by_a_pair(hidden, neurons, 4) < on_gpu.activations_bytes <= 10**6
    assert on_gpu.rows_per_chunk < on_cpu.rows_per_chunk
    assert on_gpu.total_bytes - on_gpu.on_gpu_bytes == on_gpu.sums_bytes + on_gpu.process_bytes
    size = memory.GPU_PROCESS_BYTES + on_gpu.on_gpu_bytes  # a smaller one
    assert allotted("cuda", 10**9) == on_gpu


def test_on_gpus_each_process_has_a_model_and_the_host_all_statistics(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the GPUs."""
    source, cpu = Checkpoint(checkpoint), torch.device("cpu")
    model = 4 * sum(torch.Size(spec.shape).numel() for spec in source.specs.values())
    sums = 8 * 4 * 5 * 8 * (32 + 16 + 8)  # as in the test above
    copies = 4 * 8 * (32 + 16) + 8 * ADDED_AT_ONCE

    def found(on_gpu: int, on_host: int) -> bool:
        monkeypatch.setattr(memory, "available_bytes", lambda device: on_host if device == cpu else on_gpu)
        settings: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cuda"), "budget_bytes": 1000}
        return memory.fits(source, parts=4, processes=8, **settings)

    least = model + copies + 1000
    assert found(least, 8 * sums)
    assert not found(least - 1, 8 * sums) and not found(least, 8 * sums - 1)


def test_sums_are_added_a_few_rows_at_a_time_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part("text", 0)
    batches = [torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = sum(batch.double() for batch in batches)
    for numbers in (1, 10, 1 << 18):
        monkeypatch.setattr(statistics_module, "ADDED_AT_ONCE", numbers)
        statistics = Statistics("", "", {part: {"main": 1, "mtp": 0}})
        with statistics.part(part):
            for batch in batches:
                statistics.add("square", batch)
                statistics.add("line", batch[0])
        assert torch.equal(statistics.sums["text/0/square"], expected)
        assert torch.equal(statistics.sums["text/0/line"], expected[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_sums_that_are_not_finite_are_refused(value: float) -> None:
    sums = torch.zeros(3, 4, dtype=torch.float64)
    check_finite("sums", sums, Path("s"))
    sums[1, 2] = value
    with pytest.raises(UserError, match="not finite"):
        check_finite("sums", sums, Path("s"))


def test_a_disk_too_small(checkpoint: Path, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"1\.0 kB are free: make room"):
        measured(checkpoint, tmp_path / "statistics", texts, streaming=True)
    assert not list(tmp_path.iterdir())


def test_a_budget_that_is_no_size(checkpoint: Path, texts: Texts, tmp_path: Path) -> None:
    command = ["calibrate", str(checkpoint), "--tokens", str(texts.sources["code"]), "--out", str(tmp_path / "s")]
    result = CliRunner().invoke(app, [*command, "--memory-budget", "plenty"])
    assert isinstance(result.exception, UserError) and "'plenty' is not a size in bytes" in str(result.exception)
