"""Evaluation on several ranks (gloo): the numbers of one rank, with every model sharded over all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from rounding import FORWARD, error
from safetensors.torch import load_file
from tiny import write_tiny_checkpoint, write_tiny_tokens

from slimqwen.core.errors import StageFailed
from slimqwen.core.torchrun import rank, world_size
from slimqwen.data.stream import Batch
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.evaluation.fidelity import Recording
from slimqwen.evaluation.kept import KeptRecording, kept_folder
from slimqwen.evaluation.result import Evaluation, ModelEvaluation
from slimqwen.evaluation.shares import Share
from slimqwen.generation import speculative, state
from slimqwen.losses.loss import align
from slimqwen.parallel.job import Job, join_job
from slimqwen.recipe import EvaluationRecipe, Execution, TextSettings

SEQUENCE_LENGTH = 16
LAYERS = ["linear_attention", "full_attention"]
# Of five rows and three prompts two ranks have unequal shares; of one row and one prompt the second has none.
RECIPE = EvaluationRecipe(
    tokens=5 * SEQUENCE_LENGTH, acceptance={"prompts": 3, "prompt_tokens": 6, "new_tokens": 8, "depth": 3}
)
ONE_ROW = EvaluationRecipe(tokens=1, acceptance={"prompts": 1, "prompt_tokens": 6, "new_tokens": 8, "depth": 3})
WAYS: dict[str, dict[str, Any]] = {
    "taught": {"execution": {"expert_ranks": 1}},
    "expert_ranks": {"execution": {"expert_ranks": 2}},
    "continued": {},
    "streaming": {"execution": {"streaming": True}},
    "untaught": {"teacher": None, "models": ["plain", "student"], "documents": "isolated", "recipe": ONE_ROW},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokens`, a `teacher`, a wider `student`, and `plain` without an MTP module, with one table for both ends; `one/WAY.json` of one rank."""
    folder = tmp_path_factory.mktemp("shared_evaluation")
    tokenizer, _ = write_tiny_tokens(folder)
    sizes: dict[str, Any] = {"tokenizer": tokenizer, "num_hidden_layers": 2, "layer_types": LAYERS}
    write_tiny_checkpoint(folder / "teacher", **sizes)
    write_tiny_checkpoint(folder / "student", 1, **sizes, hidden_size=40, num_experts=4)
    write_tiny_checkpoint(folder / "plain", 2, **sizes, num_nextn_predict_layers=0, tie_word_embeddings=True)
    measure(folder, folder / "one", ("taught", "untaught"))
    return folder


def measure(folder: Path, out: Path, ways: tuple[str, ...]) -> None:
    """Evaluate in each of the ways, to `out/WAY.json`. In speculative decoding the second rank would accept every draft, if it could."""
    if world_size() > 1:
        state.MOST_RECOMPUTED_TOKENS = 1  # so that few tokens take every way
    if rank() == 1:
        speculative.accept = lambda target, drafted, drafts, generator: (len(drafts), 0)
    with join_job(torch.device("cpu")):
        for name in ways:
            way = WAYS[name]
            evaluate(
                {model: folder / model for model in way.get("models", ["teacher", "student"])},
                out / f"{name}.json",
                tokens=folder / "tokens",
                recipe=way.get("recipe", RECIPE),
                text=TextSettings(
                    sequence_length=SEQUENCE_LENGTH, documents=way.get("documents", "packed"), dtype="float32"
                ),
                teacher=way.get("teacher", "teacher"),
                execution=Execution(device="cpu", batch_size=2, **way.get("execution", {})),
            )


def values_of(numbers: ModelEvaluation) -> dict[str, Any]:
    """All numbers of a model under flat names."""
    flat: dict[str, Any] = {}
    for name, value in numbers.model_dump(exclude={"checkpoint", "sample"}).items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for key, part in parts:
            for place, number in enumerate(part if isinstance(part, list) else [part]):
                flat[f"{name} {key} {place}"] = -1.0 if number is None else number  # not measured
    return flat


def assert_the_same_numbers(found: Path, expected: Path, not_measured: str | None = None) -> None:
    """Of the numbers of each model all but one, which is not measured layer by layer."""
    mine, other = (Evaluation.load(path) for path in (found, expected))
    assert mine.tokens == other.tokens and list(mine.models) == list(other.models)
    for name, numbers in other.models.items():
        assert mine.models[name].sample == numbers.sample
        if not_measured is not None:
            assert getattr(mine.models[name], not_measured) is None
            numbers = numbers.model_copy(update={not_measured: None})
        assert values_of(mine.models[name]) == pytest.approx(values_of(numbers), rel=FORWARD, abs=FORWARD), name


def test_shares_have_every_thing_once_and_are_equally_large() -> None:
    for things in range(1, 8):
        for ranks in range(1, 5):
            shares = [Share.of(things, Job(rank, ranks)) for rank in range(ranks)]
            assert len({len(share.numbers) for share in shares}) == 1
            assert [number for share in shares for number in share.numbers[: share.own]] == list(range(things))


@pytest.mark.rounding
def test_a_model_that_does_not_fit_is_measured_layer_by_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slimqwen.evaluation.loading.available_bytes", lambda device: 2_000_000_000)  # the budget
    measure(folder, tmp_path, ("taught",))
    said = capsys.readouterr().err
    assert f"layer by layer: {folder / 'teacher'} in float32" in said and "2.0 GB of memory are free" in said
    assert "read once for each of 8 new tokens" in said and "speculative decoding: not measured layer by layer" in said
    assert_the_same_numbers(tmp_path / "taught.json", folder / "one" / "taught.json", "tokens_per_verification")


@pytest.mark.rounding
def test_a_disk_that_is_full_for_a_ranks_share_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("slimqwen.evaluation.kept.save_file", fail)
    kept = KeptRecording(tmp_path, {}, Job(1, 2))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    recording = Recording([align(tokens, torch.zeros(1, 3, 2))], torch.zeros(2, 2), {})
    with pytest.raises(StageFailed, match="the disk is full"):
        kept.keep(recording, Batch(tokens))


def test_two_ranks_measure_what_one_does(folder: Path, tmp_path: Path) -> None:
    """With and without a teacher and an MTP module, with shared experts, and after one rank, whose teacher's hidden states they read."""
    kept = shutil.copytree(kept_folder(folder / "one" / "taught.json"), kept_folder(tmp_path / "continued.json"))
    (hidden,) = kept.glob("*.safetensors")
    written = hidden.stat().st_mtime_ns
    for path in kept.glob("*.json"):
        if json.loads(path.read_text())["numbers"]["kl_to_teacher"] != 0.0:
            path.unlink()  # the student's

    run_ranks(2, measure, folder, tmp_path, tuple(WAYS))
    for name in WAYS:
        expected = folder / "one" / ("untaught.json" if name == "untaught" else "taught.json")
        leaves_out = "tokens_per_verification" if name == "streaming" else None
        assert_the_same_numbers(tmp_path / f"{name}.json", expected, leaves_out)
    assert hidden.stat().st_mtime_ns == written
    (shared,) = kept_folder(tmp_path / "taught.json").glob("*.safetensors")
    assert error(load_file(shared)["hidden"], load_file(hidden)["hidden"]) < FORWARD
    assert not [path for path in shared.parent.iterdir() if path.name.startswith(".teacher")]
