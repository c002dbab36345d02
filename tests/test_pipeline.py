"""The whole of it, on a tiny random model: the artefacts, skipping, kill -9, the baselines, the checkpoint."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from ranks import Ranks, run_ranks
from settings import paper
from tiny import write_tiny_checkpoint, write_tiny_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimqwen.artifacts import atomic_folder, claim_folder, write_json
from slimqwen.artifacts.json_lines import read_lines, value_of
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import StageFailed, UserError
from slimqwen.evaluation.result import Evaluation
from slimqwen.planning.plan import Plan
from slimqwen.recipe import Execution, Recipe
from slimqwen.recipe.file import load_recipe
from slimqwen.runs.recipe_run import Pipeline, run
from slimqwen.training.distil import state_folder_of


def tiny_recipe(folder: Path, run_dir: Path, **overrides: object) -> Recipe:
    """A run from a tiny random teacher: 4 -> 2 layers (a whole period), 32 -> 24 channels, 8 -> 4 experts, in two stages."""
    if not (folder / "teacher").exists():
        tokenizer, _ = write_tiny_tokens(folder / "data")
        write_tiny_checkpoint(
            folder / "teacher", tokenizer=tokenizer, layer_types=["linear_attention", "full_attention"] * 2
        )
    values = {
        "name": "tiny",
        "run_dir": run_dir,
        "teacher": str(folder / "teacher"),
        "target": {"num_hidden_layers": 2, "hidden_size": 24, "num_experts": 4, "num_experts_per_tok": 1},
        "data": {
            "sources": [{"path": folder / "data" / "text"}],
            "heldout_sources": [{"path": folder / "data" / "heldout_text"}],
            "sequence_length": 16,
        },
        "calibration": {"samples": 4},
        "first_stage_token_fraction": 0.3,
        "distil": {
            "tokens": 16 * 2 * 10,
            "batch_size": 2,
            "warmup": "2 steps",
            "learning_rate": 1e-3,
        },
        "execution": {"save_every": "2 steps"},
        "baselines": ["pruned", "random_init", "lm_only"],
        "evaluation": {
            "tokens": 64,
            "acceptance": {"prompts": 2, "prompt_tokens": 8, "new_tokens": 12, "depth": 3},
        },
    }
    return Recipe.model_validate({**values, **overrides})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = tiny_recipe(folder, folder / "run")
    run(recipe)
    return recipe


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_run_leaves_the_artefacts_that_other_tools_rely_on(finished: Recipe) -> None:
    run_dir = finished.run_dir
    for name in ("recipe.resolved.yaml", "metrics.jsonl", "evaluation.json", "report.html", "final/config.json"):
        assert (run_dir / name).is_file(), name
    for stage in (1, 2):
        for name in ("plan.json", "pruned/config.json", "distilled/config.json"):
            assert (run_dir / f"stage-{stage}" / name).is_file(), name
    assert load_recipe(run_dir / "recipe.resolved.yaml") == finished
    assert json.loads((run_dir / "provenance.json").read_text())["threads"] == torch.get_num_threads()

    expected = {"run", "stage", "step", "tokens", "lm", "kd", "mtp_lm", "mtp_kd", "lambda", "beta"}
    expected |= {"learning_rate", "grad_norm", "tokens_per_second", "loss", "load_balancing"}
    lines = metrics(run_dir)
    assert all(expected <= line.keys() for line in lines if line["run"] != "lm_only")
    for name in ("slimqwen", "random_init", "lm_only"):
        assert [line["step"] for line in lines if line["run"] == name] == list(range(10))
    assert [line["stage"] for line in lines if line["run"] == "slimqwen"] == [1] * 3 + [2] * 7

    models = json.loads((run_dir / "evaluation.json").read_text())["models"]
    assert list(models) == ["teacher", "pruned", "random_init", "lm_only", "slimqwen"]
    for model in models.values():
        for key in ("total_parameters", "active_parameters", "loss", "perplexity", "bits_per_byte", "kl_to_teacher"):
            assert isinstance(model[key], int | float), key
        assert 0.0 <= model["top1_agreement"] <= 1.0
        assert len(model["mtp_acceptance"]) == 3
    assert models["teacher"]["kl_to_teacher"] == 0.0
    assert models["pruned"]["total_parameters"] == models["slimqwen"]["total_parameters"]


def test_schedules_run_over_the_whole_run_and_not_per_stage(finished: Recipe) -> None:
    lines = [line for line in metrics(finished.run_dir) if line["run"] == "slimqwen"]
    other = [line for line in metrics(finished.run_dir) if line["run"] == "random_init"]
    for name in ("lambda", "beta", "learning_rate", "tokens"):
        assert [line[name] for line in lines] == [line[name] for line in other], name
    assert (lines[0]["lambda"], lines[-1]["lambda"]) == (1.0, 0.75)
    assert lines[0]["beta"] == pytest.approx(0.3) and lines[-1]["beta"] == pytest.approx(0.1)


def test_the_schedule_cuts_depth_first(finished: Recipe) -> None:
    first, last = (Checkpoint(finished.run_dir / f"stage-{n}" / "distilled").config for n in (1, 2))
    assert (first["num_hidden_layers"], first["hidden_size"], first["num_experts"]) == (2, 32, 8)
    assert (last["num_hidden_layers"], last["hidden_size"], last["num_experts"]) == (2, 24, 4)


def test_final_checkpoint_loads_in_transformers_and_generates(finished: Recipe) -> None:
    final = finished.run_dir / "final"
    model, info = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(final)
    prompt = tokenizer("def f(", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape[1] == prompt["input_ids"].shape[1] + 5
    assert Checkpoint(final).has_mtp
    card = (final / "README.md").read_text()
    assert "2605.08738" in card and str(finished.teacher) in card and "| teacher |" in card


def test_a_second_run_does_nothing_again(finished: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    watched = [*finished.run_dir.rglob("*.safetensors"), finished.run_dir / "metrics.jsonl"]
    before = {file: file.stat().st_mtime_ns for file in watched}
    run(finished)
    assert {file: file.stat().st_mtime_ns for file in watched} == before
    said = capsys.readouterr().err
    assert "done already" in said and "was begun with" not in said


def test_another_execution_makes_nothing_again(finished: Recipe) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.run_dir.rglob("*.safetensors")}
    execution = {"batch_size": 2, "micro_batch_size": 1, "save_every": "9 min", "loss_chunk_tokens": 7}
    run(finished.model_copy(update={"execution": Execution.model_validate(execution)}), "slimqwen run --set and more")
    assert {file: file.stat().st_mtime_ns for file in finished.run_dir.rglob("*.safetensors")} == before
    assert "final" in {file.parent.name for file in before}
    steps = [json.loads(line) for line in (finished.run_dir / "stages.jsonl").read_text().splitlines()]
    assert all(step["skipped"] for step in steps if step["command"].endswith("and more"))


def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "run", baselines=["pruned"])
    run(recipe)
    kept = [
        tmp_path / "run" / name for name in ("tokens/train.bin", "stage-1/statistics.safetensors", "stage-1/plan.json")
    ]
    before = {file: file.stat().st_mtime_ns for file in kept}
    trained = (tmp_path / "run/stage-1/distilled/model.safetensors").read_bytes()
    run(
        tiny_recipe(
            tmp_path,
            tmp_path / "run",
            baselines=["pruned"],
            distil={**recipe.distil.model_dump(), "learning_rate": 2e-3},
        )
    )
    assert {file: file.stat().st_mtime_ns for file in kept} == before
    assert (tmp_path / "run/stage-1/distilled/model.safetensors").read_bytes() != trained
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(10))


def test_a_damaged_artefact_is_made_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "run", baselines=[])
    run(recipe)
    trained = tmp_path / "run/stage-2/distilled/model.safetensors"
    good = trained.read_bytes()
    trained.write_bytes(good[:-8])
    with pytest.raises(UserError, match=r"model\.safetensors in .*stage-2/distilled was changed since slimqwen wrote"):
        run(recipe)  # who knows what it is worth to whom
    trained.unlink()
    run(recipe)
    assert trained.read_bytes() == good


def test_init_random_trains_the_target_shape_in_one_stage(tmp_path: Path, finished: Recipe) -> None:
    folder = Path(finished.teacher).parent
    recipe = tiny_recipe(folder, tmp_path / "run", init="random", baselines=[])
    run(recipe)
    # one switch, the same code: it is the random_init baseline of the other run, bit for bit
    ours = (tmp_path / "run/final/model.safetensors").read_bytes()
    assert ours == (finished.run_dir / "random_init/distilled/model.safetensors").read_bytes()
    assert not (tmp_path / "run/stage-1/plan.json").exists()


def test_lm_only_by_one_switch_is_the_lm_only_baseline(tmp_path: Path, finished: Recipe) -> None:
    folder = Path(finished.teacher).parent
    settings = {**finished.distil.model_dump(), "terms": ["lm", "mtp_lm"]}
    run(tiny_recipe(folder, tmp_path / "run", baselines=[], distil=settings))
    ours = (tmp_path / "run/final/model.safetensors").read_bytes()
    assert ours == (finished.run_dir / "lm_only/stage-2/distilled/model.safetensors").read_bytes()


def test_stages_by_hand(tmp_path: Path, finished: Recipe) -> None:
    folder = Path(finished.teacher).parent
    stages = [
        {"target": {"num_hidden_layers": 3}, "token_fraction": 0.2},
        {"target": {"hidden_size": 24}, "token_fraction": 0.3},
        {"target": {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 1}, "token_fraction": 0.5},
    ]
    run(tiny_recipe(folder, tmp_path / "run", target=None, stages=stages, baselines=[]))
    shapes = [Checkpoint(tmp_path / f"run/stage-{n}/distilled").config for n in (1, 2, 3)]
    assert "after stage 3" in (tmp_path / "run/report.html").read_text()
    assert [c["num_hidden_layers"] for c in shapes] == [3, 3, 2]
    assert [c["hidden_size"] for c in shapes] == [32, 24, 24]
    assert [c["num_experts"] for c in shapes] == [8, 8, 4]

    run(tiny_recipe(folder, tmp_path / "run", baselines=[]))  # two stages in the same run directory
    assert not (tmp_path / "run/stage-3").exists()
    assert "after stage 3" not in (tmp_path / "run/report.html").read_text()


def test_an_irregular_stack_says_so_and_keeps_its_config(
    tmp_path: Path, finished: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """full_attention_interval stands only where it is true: SGLang reads it instead of layer_types (formats.md 1)."""
    folder = Path(finished.teacher).parent
    pruning = {"depth": "block_influence"}
    target = {"num_hidden_layers": 3}
    run(tiny_recipe(folder, tmp_path / "run", target=target, pruning=pruning, schedule="one_shot", baselines=[]))
    kinds = Checkpoint(tmp_path / "run/final").config["layer_types"]
    full = [kind == "full_attention" for kind in kinds]
    regular = any(full == [(i + 1) % interval == 0 for i in range(3)] for interval in (1, 2, 3))
    for name in ("stage-1/pruned", "stage-1/distilled", "final"):
        config = json.loads((tmp_path / "run" / name / "config.json").read_text())
        assert ("full_attention_interval" in config) == regular, name
    assert ("SGLang" in capsys.readouterr().err) != regular


def test_nothing_is_written_when_the_recipe_cannot_work(
    tmp_path: Path, finished: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(finished.teacher).parent
    with pytest.raises(UserError, match="hidden_size"):
        run(tiny_recipe(folder, tmp_path / "run", target={"hidden_size": 64}))
    with pytest.raises(UserError, match="nowhere"):
        run(tiny_recipe(folder, tmp_path / "run", data={"sources": [{"path": tmp_path / "nowhere"}]}))
    text = {"sources": [{"path": folder / "data" / "text"}], "separator": "<|nope|>"}
    with pytest.raises(UserError, match=r"data\.separator '<\|nope\|>' is not a token"):
        run(tiny_recipe(folder, tmp_path / "run", data=text))
    distil = {"tokens": 64, "batch_size": 2, "warmup": "0 steps"}
    with pytest.raises(UserError, match=r"distil\.train names 'dense_mlp', which .*teacher lacks"):
        run(tiny_recipe(folder, tmp_path / "run", distil=distil | {"train": "dense_mlp"}))
    muon, offload = distil | {"optimizer": "muon"}, {"offload": "student"}
    with pytest.raises(UserError, match=r"muon does not go with execution\.offload"):
        run(tiny_recipe(folder, tmp_path / "run", distil=muon, execution=offload))

    def refuse(*_: object) -> None:
        raise UserError("Triton 3.5.0 computes wrong gradients")

    monkeypatch.setattr("slimqwen.runs.checks.check_gradients", refuse)
    with pytest.raises(UserError, match="wrong gradients"):
        run(tiny_recipe(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


TOLD = {  # when and where it was made, and what depends on that
    *("provenance.json", "recipe.resolved.yaml", "stages.jsonl", "warnings.jsonl", "report.html"),
    *("final/README.md", "final/.slimqwen", ".steps/evaluation.json", ".steps/final.json"),
}


def artefacts(run_dir: Path) -> dict[str, object]:
    """All that a run has written, by name, without times and its own path."""
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    found: dict[str, object] = {
        str(path.relative_to(run_dir)): path.read_bytes().replace(str(run_dir).encode(), b"") for path in files
    }
    costs = {"seconds", "tokens_per_second", "memory_bytes"}
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if k not in costs} for line in metrics(run_dir)]
    assert found.keys() > TOLD
    return {name: content for name, content in found.items() if name not in TOLD}


def assert_same_artefacts(one: Path, other: Path, seed: int | None = None) -> None:
    found, expected = artefacts(one), artefacts(other)
    assert found.keys() == expected.keys(), seed
    assert not [name for name in expected if found[name] != expected[name]], seed


def test_another_process_leaves_the_same_bytes(tmp_path: Path, finished: Recipe) -> None:
    """Statistics, plans, weights, tokens, metrics, evaluation: the same recipe with the same number of threads."""
    recipe = tiny_recipe(Path(finished.teacher).parent, tmp_path / "run")
    run_ranks(1, run, recipe)
    assert_same_artefacts(recipe.run_dir, finished.run_dir)


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_bytes(tmp_path: Path, finished: Recipe) -> None:
    """kill -9 four times, after a random number of training steps and a random moment more; then left to finish."""
    recipe = tiny_recipe(Path(finished.teacher).parent, tmp_path / "run")
    log = recipe.run_dir / "metrics.jsonl"
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    for steps in sorted(chance.sample(range(30), 4)):  # three training runs of ten steps
        ranks = Ranks(1, run, recipe)
        (process,) = ranks.processes
        while not (log.exists() and len(log.read_text().splitlines()) > steps):
            assert process.is_alive(), f"ended by itself before step {steps} (seed {seed})"
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        ranks.end()
        assert not (recipe.run_dir / "final").exists() or steps == 29
    run_ranks(1, run, recipe)
    assert_same_artefacts(recipe.run_dir, finished.run_dir, seed)


def test_ours_and_the_papers_cut_in_one_run(tmp_path: Path) -> None:
    """The paper's baselines share the teacher's statistics, cut by its criteria, and are what a run of its own gives."""
    recipe = tiny_recipe(tmp_path, tmp_path / "run", baselines=["pruned", "paper_pruned", "paper"])
    run(recipe)
    plans = {
        name: Plan.load(tmp_path / "run" / name / "plan.json") for name in ("stage-2", "paper/stage-2", "one_shot")
    }
    ours, papers = plans["stage-2"].pruning, plans["paper/stage-2"].pruning
    assert (ours.width, ours.refit_readers, ours.experts.compression, ours.refit_outputs) == (
        "rotation",
        True,
        "prune",
        True,
    )
    assert papers == paper()
    for folder in ("stage-1", "stage-2", "one_shot"):
        assert (tmp_path / "run" / folder / "refitted" / "model.safetensors").is_file()
        assert not (tmp_path / "run" / "paper" / folder / "refitted").exists()
    assert not (tmp_path / "run" / "paper" / "stage-1" / "statistics.safetensors").exists()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert final.config.hidden_size == 24
    assert Checkpoint(tmp_path / "run" / "stage-2" / "refitted").config["num_experts"] == 4
    models = Evaluation.load(tmp_path / "run" / "evaluation.json").models
    assert list(models) == ["teacher", "paper_pruned", "pruned", "paper", "slimqwen"]
    pipeline = Pipeline(recipe, "slimqwen run")
    assert {recipe.run_dir / record.made for record in pipeline.steps.records()} <= set(pipeline.outputs())

    stages = [
        {"target": stage.target.model_dump(exclude_none=True), "token_fraction": share}
        for stage, share in zip(pipeline.stages, (0.3, 0.7), strict=True)
    ]
    published = {"pruning": paper(), "baselines": [], "target": None, "stages": stages}
    run(tiny_recipe(tmp_path, tmp_path / "published", **published))
    trained = Path("stage-2") / "distilled" / "model.safetensors"
    alone, beside = (tmp_path / folder / trained for folder in ("published", "run/paper"))
    assert alone.read_bytes() == beside.read_bytes()


def test_a_model_that_cannot_be_rotated_is_refused_at_once(tmp_path: Path) -> None:
    tokenizer, _ = write_tiny_tokens(tmp_path / "data")
    layers = ["linear_attention", "full_attention"] * 2
    write_tiny_checkpoint(tmp_path / "teacher", tokenizer=tokenizer, layer_types=layers, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"tied to the embedding.*set pruning.width: norm_activation"):
        run(tiny_recipe(tmp_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def written(folder: Path, name: str, content: str = "") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content or f"the content of {name}")
    return folder / name


def files_in(folder: Path) -> set[str]:
    """Without bookkeeping."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)}


def test_what_another_schedule_left_is_removed_and_nothing_else(finished: Recipe, tmp_path: Path) -> None:
    """Case by case: only what a record of this run says, and that as it was made."""
    pipeline = Pipeline(finished.model_copy(update={"run_dir": tmp_path}), "slimqwen run")

    def made(name: str) -> None:
        def make() -> None:
            if name.endswith(".json"):
                write_json(tmp_path / name, {"format": "slimqwen.test/1", "name": name})
                return
            with atomic_folder(tmp_path / name) as folder:
                written(folder, "config.json")
                written(folder, "model.safetensors")

        pipeline.steps.step(name.removesuffix(".json"), tmp_path / name, {}, make)

    for name in ("stage-2/plan.json", "stage-3/plan.json", "stage-3/pruned", "stage-4/distilled"):
        made(name)
    for name in ("paper/stage-3/pruned", "paper/stage-3/refitted", "stage-5/pruned", "stage-6/plan.json"):
        made(name)
    claim_folder(state_folder_of(tmp_path / "stage-4" / "distilled"), "key")
    users = {
        "stage-final/weights.bin",  # the user's own folder
        "stage-3-notes/a.txt",
        "stage-7/plan.json",  # of another run, of which this one has no record
        "within/stage-3/plan.json",
        "within/stage-3/pruned/config.json",
        "stage-3/notes.txt",  # beside what we made, and in it
        "paper/stage-3/refitted/notes.txt",
        "stage-5/pruned/config.json",  # in the place of what we made
        "stage-6/plan.json",
    }
    shutil.rmtree(tmp_path / "stage-5" / "pruned")
    for name in users:
        written(tmp_path, name, "the user's")
    pipeline.forget_other_schedules()
    assert files_in(tmp_path) == users | {"stage-2/plan.json", "stages.jsonl"}
    assert all((tmp_path / name).read_text() == "the user's" for name in users)
    assert not (tmp_path / "stage-4").exists() and not (tmp_path / "paper/stage-3/pruned").exists()
    assert [record.made for record in pipeline.steps.records()] == ["stage-2/plan.json"]
    pipeline.forget_other_schedules()  # and a second time there is nothing to do
    assert files_in(tmp_path) == users | {"stage-2/plan.json", "stages.jsonl"}


def test_what_version_0_1_called_otherwise_stays_and_is_named(
    finished: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline(finished.model_copy(update={"run_dir": tmp_path}), "slimqwen run")

    def make(name: str) -> None:
        with atomic_folder(tmp_path / name) as folder:
            written(folder, "config.json")

    for name in ("stage-1/repaired", "stage-1/pruned"):
        pipeline.steps.step(name, tmp_path / name, {}, lambda name=name: make(name))
    written(tmp_path, "stage-2/repaired/config.json", "the user's, of which this run has no record")
    before = files_in(tmp_path)
    capsys.readouterr()
    pipeline.forget_other_schedules()
    pipeline.announce_old_names()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {tmp_path}/stage-1/repaired is called refitted since 0.2")
    assert files_in(tmp_path) == before


def test_init_random_leaves_somebodys_plan_alone(tmp_path: Path, finished: Recipe) -> None:
    plan = written(tmp_path / "run", "stage-1/plan.json", "somebody's")
    recipe = tiny_recipe(Path(finished.teacher).parent, tmp_path / "run", init="random", baselines=[])
    Pipeline(recipe, "slimqwen run").forget_other_schedules()
    assert plan.read_text() == "somebody's"


def test_every_place_that_a_run_writes_to_is_checked_before_it(finished: Recipe) -> None:
    pipeline = Pipeline(finished, "slimqwen run")
    made = {finished.run_dir / record.made for record in pipeline.steps.records()}
    assert len(made) > 10 and made <= set(pipeline.outputs())


def test_what_lies_beside_the_teacher_redoes_nothing_and_a_companion_makes_final_again(
    finished: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, final = Path(finished.teacher), finished.run_dir / "final"
    weights = (final / "model.safetensors").read_bytes()

    def redone() -> list[str]:
        before = len(read_lines(finished.run_dir / "stages.jsonl"))
        run(finished)
        lines = read_lines(finished.run_dir / "stages.jsonl")[before:]
        return [step["step"] for step in map(value_of, lines) if step is not None and not step["skipped"]]

    beside = [written(teacher, name) for name in ("README.md", "notes.txt.bak", "onnx/config.json")]
    os.utime(teacher / "model.safetensors", (0, 0))
    for file in (Path(finished.data.sources[0].path or ""), Path(finished.data.heldout_sources[0].path or "")):
        for text in file.rglob("*"):
            os.utime(text, (0, 0))
    notes = written(final, "notes.md", "the user's, in what we made")
    companion = teacher / "generation_config.json"
    original = companion.read_bytes() if companion.exists() else None
    try:
        assert redone() == [] and notes.exists()
        notes.unlink()
        companion.write_text('{"temperature": 0.25}')
        assert redone() == ["tokens", "final"]  # what ends a document may stand there
        assert json.loads((final / "generation_config.json").read_bytes()) == {"temperature": 0.25}
        assert (final / "model.safetensors").read_bytes() == weights
        assert "thread" not in capsys.readouterr().err
    finally:
        for file in beside:
            file.unlink()
        (teacher / "onnx").rmdir()
        notes.unlink(missing_ok=True)
        companion.unlink() if original is None else companion.write_bytes(original)
        run(finished)


def test_what_only_the_card_tells_is_read_before_the_work_and_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "run")
    (Path(recipe.teacher) / "README.md").write_bytes("---\nauthor: André\nlicense: mit\n---\n".encode("latin-1"))
    recipe.run_dir.mkdir()
    (recipe.run_dir / "benchmarks.json").write_text("{}")

    def stop(_: object) -> None:
        raise StageFailed("the first step")

    monkeypatch.setattr("slimqwen.runs.recipe_run.Pipeline.tokens", stop)
    with pytest.raises(StageFailed, match="the first step"):
        run(recipe)
    said = capsys.readouterr().err
    kept = [json.loads(line)["text"] for line in (recipe.run_dir / "warnings.jsonl").read_text().splitlines()]
    for words in ("README.md is not UTF-8", "no benchmarks"):
        assert words in said and any(words in line for line in kept)
