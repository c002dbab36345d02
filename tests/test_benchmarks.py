"""Benchmarks through lm-evaluation-harness: a task written here, run for real, on a tiny model and with a referee."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_cli import assert_one_sentence, slimqwen
from tiny import write_tiny_checkpoint, write_tiny_tokens

from slimqwen.core.errors import StageFailed, UserError
from slimqwen.core.torchrun import rank
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.evaluation.benchmarks import (
    Benchmarks,
    Tasks,
    benchmark,
    difference,
    group_difference,
    print_benchmarks,
    suite_tasks,
)
from slimqwen.evaluation.evalplus import CONSENT, DATA_VARIABLES, EVALPLUS, evalplus_identity, run_evalplus
from slimqwen.evaluation.harness import GroupMetric, GroupScores, Harness, Metric, Scores, TaskScores
from slimqwen.model.model import load
from slimqwen.parallel.lockstep import FirstRanksScores
from slimqwen.recipe import Execution

datasets = pytest.importorskip("datasets")
pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": f"left = {word}[", "choices": ["index] + ", "head(3)\n", "]", "total"], "answer": i % 4}
    for i, word in enumerate(["value", "items", "buffer", "offset", "layer", "expert", "router", "count", "tail"])
]

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""

GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "index"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""

GROUP = """
group: tiny_group
task: [tiny_choice, tiny_generate]
aggregate_metric_list: [{metric: acc, weight_by_size: true}, {metric: exact_match, weight_by_size: false}]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """teacher/, student/ and tasks/."""
    folder = tmp_path_factory.mktemp("benchmarks")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    tokenizer, _ = write_tiny_tokens(folder / "data")
    layers = ["linear_attention", "full_attention"]
    for seed, name in enumerate(("teacher", "student")):
        write_tiny_checkpoint(folder / name, seed, tokenizer=tokenizer, num_hidden_layers=2, layer_types=layers)
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tasks / "choice.yaml").write_text(CHOICE.format(folder=tasks))
    (tasks / "generate.yaml").write_text(GENERATE.format(folder=tasks))
    (tasks / "group.yaml").write_text(GROUP)
    yield folder
    patch.undo()


def models(world: Path) -> dict[str, Path]:
    return {"student": world / "student", "teacher": world / "teacher"}


@torch.inference_mode()
def referee(checkpoint: Path) -> list[float]:
    """1 where the likeliest choice after the question is the right one; token by token, one sequence at a time."""
    backbone, tokenizer = load(checkpoint).backbone, load_tokenizer(checkpoint)
    scores = []
    for question in QUESTIONS:
        likelihoods = []
        for choice in question["choices"]:
            context = tokenizer.encode(question["question"])
            whole = tokenizer.encode(question["question"] + choice)
            log_probs = backbone(torch.tensor([whole])).logits[0].log_softmax(-1)
            continuation = range(len(context), len(whole))
            likelihoods.append(sum(float(log_probs[i - 1, whole[i]]) for i in continuation))
        scores.append(float(likelihoods.index(max(likelihoods)) == question["answer"]))
    return scores


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_multiple_choice_task_scores_as_the_referee_does(world: Path, batch_size: int) -> None:
    harness = Harness(["tiny_choice"], world / "tasks")
    of = {}
    for name in ("student", "teacher"):
        model, tokenizer = load(world / name), load_tokenizer(world / name)
        of[name] = harness.run(model, tokenizer, "tiny_choice", batch_size).tasks["tiny_choice"].metrics["acc,none"]
        assert of[name].scores == referee(world / name)
    assert of["student"].scores != of["teacher"].scores


def test_side_by_side_with_paired_differences(world: Path, tmp_path: Path) -> None:
    tasks = Tasks(["tiny_group"], world / "tasks")
    result = benchmark(models(world), tmp_path / "benchmarks.json", tasks, teacher="teacher")
    rows = {(row.model, row.task, row.metric): row for row in result.results}

    assert list(result.models) == ["teacher", "student"]
    assert Benchmarks.model_validate_json((tmp_path / "benchmarks.json").read_bytes()) == result
    student, teacher = referee(world / "student"), referee(world / "teacher")
    row = rows["student", "tiny_choice", "acc"]
    by_document = torch.tensor(student, dtype=torch.float64) - torch.tensor(teacher, dtype=torch.float64)
    assert row.value == pytest.approx(sum(student) / 9) and row.documents == 9
    assert row.difference == pytest.approx(float(by_document.mean()))
    assert row.difference_stderr == pytest.approx(float(by_document.std() / 3))
    assert row.part_of == "tiny_group"
    group = rows["student", "tiny_group", "acc"]  # only one of the two tasks has an accuracy
    assert group.part_of is None
    assert (group.value, group.difference, group.documents) == (row.value, row.difference, 9)
    for model in result.models:
        assert (model, "tiny_generate", "exact_match") in rows
    for row in result.results:
        if row.model == "teacher":
            assert row.difference == 0 and row.difference_stderr == 0


def answer(world: Path, out: Path) -> None:
    """Both tasks, with the data of `world`. The second rank alone would choose other tokens, and end at another one."""
    if rank() == 1:
        own_scores = FirstRanksScores.__call__
        FirstRanksScores.__call__ = lambda self, ids, scores: own_scores(self, ids, -scores)  # type: ignore[method-assign]
    datasets.config.HF_DATASETS_CACHE = world / "cache"
    one = {"student": world / "student"}
    benchmark(one, out, Tasks(["tiny_group"], world / "tasks"), execution=Execution(device="cpu", expert_ranks=2))


@pytest.mark.rounding
def test_two_ranks_that_share_a_model_score_as_one(world: Path, tmp_path: Path) -> None:
    answer(world, tmp_path / "one.json")
    run_ranks(2, answer, world, tmp_path / "many.json")
    one, many = (Benchmarks.model_validate_json((tmp_path / f"{name}.json").read_bytes()) for name in ("one", "many"))
    assert one == many and len(one.results) == 4
    kept = {name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "many")}
    assert kept["one"] == kept["many"]
    scores = [json.loads((tmp_path / name / kept[name][0]).read_text())["scores"] for name in ("one", "many")]
    assert scores[0] == scores[1]  # question by question


def test_the_same_command_continues(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    really_run = Harness.run

    def run(self, model, tokenizer, name, batch_size):  # type: ignore[no-untyped-def]
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(name)
        return really_run(self, model, tokenizer, name, batch_size)

    def again(batch_size: int = 8, limit: int | None = None) -> Benchmarks:
        return benchmark(
            models(world),
            tmp_path / "benchmarks.json",
            Tasks(["tiny_choice", "tiny_generate"], world / "tasks", limit),
            teacher="teacher",
            execution=Execution(batch_size=batch_size),
        )

    monkeypatch.setattr(Harness, "run", run)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert not (tmp_path / "benchmarks.json").exists()
    ran.clear()
    first = again()
    assert ran == ["tiny_generate"]  # of the student
    ran.clear()
    assert again() == first and ran == []
    again(batch_size=2)
    assert ran == []  # changes no score
    assert all(row.documents == 4 for row in _unlimited(again, limit=4, ran=ran).results)


def _unlimited(again, limit: int, ran: list[str]) -> Benchmarks:  # type: ignore[no-untyped-def]
    with pytest.raises(KeyboardInterrupt):
        again(limit=limit)  # three tasks, and the interruption
    ran.clear()
    return again(limit=limit)


def test_a_difference_by_hand() -> None:
    student = Metric(value=0.25, stderr=None, scores=[1.0, 0.0, 0.0, 0.0])
    teacher = Metric(value=0.5, stderr=None, scores=[1.0, 1.0, 0.0, 0.0])
    assert difference(student, teacher) == (-0.25, 0.25)
    assert difference(student, student) == (0.0, 0.0)
    no_mean = Metric(value=7.0, stderr=0.1, scores=None)
    assert difference(no_mean, teacher) == (6.5, None)


@pytest.mark.parametrize(("by_size", "weight"), [(True, 0.75), (False, 0.5)])
def test_the_difference_of_a_group(by_size: bool, weight: float) -> None:
    """Tasks of 6 and 2 documents, of which the first has one difference: its sd is 1 / sqrt(6), its error 1 / 6."""
    teacher = _group([1, 1, 0, 0, 0, 0], [1, 0], by_size)
    student = _group([0, 1, 0, 0, 0, 0], [1, 0], by_size)
    assert group_difference("g", "acc,none", student, teacher) == pytest.approx((-weight / 6, weight / 6))


def _group(first: list[int], second: list[int], by_size: bool) -> Scores:
    tasks = {}
    for name, scores in (("a", first), ("b", second)):
        metric = Metric(value=sum(scores) / len(scores), stderr=None, scores=[float(score) for score in scores])
        tasks[name] = TaskScores(documents=len(scores), metrics={"acc,none": metric})
    metrics = {"acc,none": GroupMetric(value=0.0, stderr=None, by_size=by_size)}
    return Scores(tasks=tasks, groups={"g": GroupScores(tasks=["a", "b"], metrics=metrics)})


def test_the_command_line(world: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", world / "student", "--teacher", world / "teacher", "--out", tmp_path / "evaluation.json"]
    arguments += ["--tasks", "tiny_choice", "--tasks-dir", world / "tasks"]
    result = slimqwen(*arguments)
    assert result.returncode == 0, result.stderr
    assert "tiny_choice" in result.stdout and "±" in result.stdout and "benchmarks.json" in result.stdout
    assert (tmp_path / "benchmarks.json").exists() and not (tmp_path / "evaluation.json").exists()
    assert_one_sentence(slimqwen("evaluate", world / "student"), 2, "--tokens")
    assert_one_sentence(slimqwen("evaluate", "builtin", "--suite", "slimqwn"), 2, "did you mean 'slimqwen'")


def test_a_missing_data_set_is_one_sentence(world: Path, tmp_path: Path) -> None:
    (tmp_path / "away.yaml").write_text("task: away\ndataset_path: nobody/nothing\ntest_split: test\n")
    local = CHOICE.replace("tiny_choice", "gone").format(folder=tmp_path / "nowhere")
    (tmp_path / "gone.yaml").write_text(local)
    arguments = ["evaluate", world / "student", "--tasks-dir", tmp_path, "--out", tmp_path / "evaluation.json"]
    result = slimqwen(*arguments, "--tasks", "away,gone")
    assert_one_sentence(result, 2, "'nobody/nothing'")
    assert "away (" in result.stderr and "gone (" in result.stderr and "load(['away', 'gone'])" in result.stderr
    assert not (tmp_path / "benchmarks").exists()


def test_broken_tasks_are_one_sentence(world: Path, tmp_path: Path) -> None:
    questions = CHOICE.format(folder=world / "tasks")
    (tmp_path / "broken.yaml").write_text(questions.replace("tiny_choice", "broken").replace("answer", "no_such_field"))
    arguments = ["evaluate", world / "student", "--tasks-dir", tmp_path, "--out", tmp_path / "evaluation.json"]
    result = slimqwen(*arguments, "--tasks", "broken")
    assert result.returncode in (1, 2) and "'broken'" in result.stderr and "Traceback" not in result.stderr
    assert_one_sentence(slimqwen(*arguments[:3], tmp_path / "nowhere", "--tasks", "x"), 2, "is not a folder")


FAKE_EVALPLUS = """
import json, pathlib, sys
given = {a: b for a, b in zip(sys.argv, sys.argv[1:]) if a.startswith("--")}
assert given["--backend"] == "hf" and "--greedy" in sys.argv and given["--dtype"] == "float32"
if not (pathlib.Path(given["--model"]) / "config.json").is_file():
    sys.exit("no such model")
folder = pathlib.Path(given["--root"]) / given["--dataset"]
folder.mkdir()
statuses = [("pass", "pass"), ("pass", "fail"), ("fail", "pass"), ("timeout", "fail")]
solved = {f"P/{i}": [{"base_status": b, "plus_status": p}] for i, (b, p) in enumerate(statuses)}
(folder / "model_eval_results.json").write_text(json.dumps({"eval": solved}))
"""


def test_evalplus_runs_as_its_own_program(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package: what it is given, and what is made of its file of results."""
    package = tmp_path / "site" / "evalplus"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "evaluate.py").write_text(FAKE_EVALPLUS)
    (tmp_path / "site" / "evalplus-0.3.1.dist-info").mkdir()
    (tmp_path / "site" / "evalplus-0.3.1.dist-info" / "METADATA").write_text("Name: evalplus\nVersion: 0.3.1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.delenv(CONSENT, raising=False)
    with pytest.raises(UserError, match="EVALPLUS_RUN_CODE=1"):
        evalplus_identity()
    monkeypatch.setenv(CONSENT, "1")
    with pytest.raises(UserError, match="HUMANEVAL_OVERRIDE_PATH"):
        evalplus_identity()
    for variable in DATA_VARIABLES.values():
        monkeypatch.setenv(variable, str(world / "tasks" / "questions.jsonl"))
    assert EVALPLUS in suite_tasks("slimqwen")

    result = benchmark(
        models(world),
        tmp_path / "out.json",
        Tasks([EVALPLUS]),
        teacher="teacher",
        execution=Execution(device="cpu"),
        dtype="float32",
    )
    rows = {(row.model, row.task, row.filter): row for row in result.results}
    assert rows["student", "humaneval", "base"].value == 0.5
    assert rows["student", "mbpp", "plus"].value == 0.25  # the added tests count with the original ones
    both = rows["student", EVALPLUS, "mean"]
    assert (both.value, both.documents, both.difference, both.difference_stderr) == (0.375, 8, 0.0, 0.0)
    with pytest.raises(StageFailed, match="no such model"):
        run_evalplus(tmp_path, tmp_path / "parts", "torch.float32")


def test_a_suite_leaves_out_what_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = suite_tasks("slimqwen")
    assert "mmlu" in tasks and EVALPLUS not in tasks
    assert "without EvalPlus" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [1, 3])
def test_a_few_documents(world: Path, tmp_path: Path, limit: int) -> None:
    tasks = Tasks(["tiny_choice"], world / "tasks", limit)
    result = benchmark(models(world), tmp_path / "benchmarks.json", tasks, teacher="teacher")
    assert all(row.documents == limit for row in result.results)
    assert all((row.stderr is None) == (limit == 1) for row in result.results)


def test_the_table_shows_what_was_asked_for(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = Tasks(["tiny_group"], world / "tasks")
    result = benchmark({"a": world / "teacher"}, tmp_path / "benchmarks.json", tasks)
    print_benchmarks(result)
    printed = capsys.readouterr().out
    assert "tiny_group" in printed and "tiny_choice" not in printed
