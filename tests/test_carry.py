"""AdamW's moments over a cut: kept whole they make two stages one, cut they are the slices that a hand would take."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from settings import paper, sections
from test_pipeline import tiny_recipe
from tiny import fused, write_tiny_checkpoint, write_tiny_tokens
from torch import Tensor
from typer.testing import CliRunner

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.cli import app
from slimqwen.core.errors import UserError
from slimqwen.families.count import count
from slimqwen.planning.choose import Scores
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.plan import Plan
from slimqwen.pruning.prune import prune
from slimqwen.recipe import DistilRecipe, Target, TextSettings
from slimqwen.runs.recipe_run import run
from slimqwen.shapes.target import completed
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.metrics import StepLog
from slimqwen.training.moments import MOMENTS, carry
from slimqwen.training.trainer import Span, Trainer

SEQUENCE_LENGTH = 16
BATCH_SIZE = 4
STEPS = 6
LAYER_TYPES = ["linear_attention", "full_attention"] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`student` and `tokens`; read-only."""
    folder = tmp_path_factory.mktemp("carry")
    tokenizer, _ = write_tiny_tokens(folder)
    write_tiny_checkpoint(folder / "student", tokenizer=tokenizer, layer_types=LAYER_TYPES)
    return folder


def train(
    folder: Path,
    student: Path,
    out: Path,
    span: Span,
    stage: int = 1,
    moments: Path | None = None,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Some steps without a teacher, whose last state stays; by one process or, called in each, by several."""
    usual = {
        "tokens": STEPS * BATCH_SIZE * SEQUENCE_LENGTH,
        "batch_size": BATCH_SIZE,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "warmup": "2 steps",
        "terms": ["lm", "mtp_lm"],
        "optimizer": {"at_cut": "carry"},
    }
    return distil(
        TrainingInputs(student, folder / "tokens", moments=moments),
        out,
        **sections(DistilRecipe, usual | (changes or {})),
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        span=span,
        log=StepLog(stage=stage),
        keep_state=True,
    )


def write_plan(
    path: Path,
    source: Path,
    target: Target | None = None,
    layers: list[int] | None = None,
    kept: dict[str, Any] | None = None,
    groups: list[ExpertGroup] | None = None,
) -> Path:
    """A plan written by hand, the same groups in every block; whatever is left out keeps everything."""
    checkpoint = Checkpoint(source)
    family, config = checkpoint.family, checkpoint.config
    layers = layers or list(range(config["num_hidden_layers"]))
    experts = range(config["num_experts"])
    groups = groups or [ExpertGroup(base=expert, members=[expert], weights=[1.0]) for expert in experts]
    blocks = [block for block in family.moe_blocks(config) if block.layer is None or block.layer in layers]
    counts = count(family, config)
    Plan(
        checkpoint=checkpoint.fingerprint(),
        statistics_data="none",
        target=completed(family, target or Target(), config),
        pruning=paper(),
        kept_layers=layers,
        kept=kept or {},
        expert_groups={block.name: groups for block in blocks},
        before=counts,
        after=counts,
        scores=Scores(layer_similarity=[], layer_block_influence=[], hidden=[], experts={}),
    ).save(path)
    return path


def states(out: Path) -> Path:
    return out.parent / f".{out.name}.state"


def saved(out: Path) -> dict[str, Tensor]:
    """The last state of a training by one process."""
    files = sorted(states(out).glob("step-*"))[-1].glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what measures time and memory, and without the stage."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left_out = {"tokens_per_second", "seconds", "memory_bytes", "stage"}
    return [{name: value for name, value in line.items() if name not in left_out} for line in lines]


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


def test_two_stages_that_keep_everything_are_one(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Parameters, moments and metrics, bit for bit; also where the second stage is killed and goes on."""
    whole = train(folder, folder / "student", tmp_path / "whole" / "out", Span(0, STEPS, STEPS))
    first = train(folder, folder / "student", tmp_path / "first", Span(0, 3, STEPS))
    plan = write_plan(tmp_path / "plan.json", first)
    student = prune(first, tmp_path / "pruned", plan=plan)
    moments = carry(states(first), first, tmp_path / "moments", plan=plan)
    assert Checkpoint(moments / "exp_avg").layouts.keys() == Checkpoint(first).layouts.keys()

    second = tmp_path / "second"
    original = Trainer.step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def step_or_stop(self: Trainer, step: int) -> dict[str, float]:
            if step == 5:
                raise KeyboardInterrupt
            return original(self, step)

        patch.setattr(Trainer, "step", step_or_stop)
        changes = {"save_every": "4 steps"}
        train(folder, student, second, Span(3, STEPS, STEPS), 2, moments, changes)
    train(folder, student, second, Span(3, STEPS, STEPS), 2, moments)

    assert metrics(tmp_path) == metrics(tmp_path / "whole")
    assert (second / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    expected, found = saved(whole), saved(second)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    reset = train(folder, student, tmp_path / "reset" / "out", Span(3, STEPS, STEPS), 2)
    assert (reset / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


def write_cut(folder: Path, trained: Path) -> tuple[Path, list[int], list[ExpertGroup]]:
    """A plan that drops a layer, permutes and drops channels, drops and merges experts: file, channels, groups."""
    channels = [30, *range(0, 28, 2), 1]
    groups = [
        ExpertGroup(base=5, members=[5, 2, 7], weights=[0.5, 0.3, 0.2]),
        ExpertGroup(base=0, members=[0], weights=[1.0]),
        ExpertGroup(base=3, members=[3, 1], weights=[0.75, 0.25]),
    ]
    target = Target(num_hidden_layers=3, hidden_size=16, num_experts=3, num_experts_per_tok=2)
    return write_plan(folder / "plan.json", trained, target, [0, 1, 3], {"hidden": channels}, groups), channels, groups


def test_a_cut_takes_the_slices_that_a_hand_would_take(folder: Path, tmp_path: Path) -> None:
    trained = train(folder, folder / "student", tmp_path / "first", Span(0, 2, STEPS))
    plan, channels, groups = write_cut(tmp_path, trained)
    moments = carry(states(trained), trained, tmp_path / "moments", plan=plan)
    state = saved(trained)
    for moment in MOMENTS:
        found = weights(moments / moment)

        def before(name: str, moment: str = moment) -> Tensor:
            tensor = state[f"{moment}.{name}"]
            assert tensor.any(), name
            return tensor

        norm, mixer = "input_layernorm.weight", "linear_attn.in_proj_qkvz.weight"
        assert torch.equal(found["model.embed_tokens.weight"], before("model.embed_tokens.weight")[:, channels])
        assert torch.equal(found[f"model.layers.2.{norm}"], before(f"model.layers.3.{norm}")[channels])
        assert torch.equal(found[f"model.layers.0.{mixer}"], before(f"model.layers.0.{mixer}")[:, channels])
        both = channels + [32 + channel for channel in channels]
        assert torch.equal(found["mtp.fc.weight"], before("mtp.fc.weight")[channels][:, both])
        for new, old in (("model.layers.2", "model.layers.3"), ("mtp.layers.0", "mtp.layers.0")):
            router = before(f"{old}.mlp.gate.weight")
            assert torch.equal(found[f"{new}.mlp.gate.weight"], router[[5, 0, 3]][:, channels])
            for stack, along in (("gate_up_proj", 2), ("down_proj", 1)):
                experts = before(f"{old}.mlp.experts.{stack}")
                expected = torch.stack(
                    [sum(w * experts[e] for e, w in zip(group.members, group.weights, strict=True)) for group in groups]
                )
                merged = found[f"{new}.mlp.experts.{stack}"]
                torch.testing.assert_close(merged, expected.index_select(along, torch.tensor(channels)))
                assert torch.equal(merged[1], expected[1].index_select(along - 1, torch.tensor(channels)))
    assert json.loads((moments / "steps.json").read_text()) == {"steps": 2.0}


def test_a_merged_update_is_no_larger_than_adams(folder: Path, tmp_path: Path) -> None:
    """|first| <= sqrt(second) holds of every mean of gradients and of their squares, and does after merging."""
    trained = train(folder, folder / "student", tmp_path / "first", Span(0, 2, STEPS))
    plan, _, _ = write_cut(tmp_path, trained)
    moments = carry(states(trained), trained, tmp_path / "moments", plan=plan)
    first, second = (weights(moments / moment) for moment in MOMENTS)
    for name, tensor in first.items():  # both without their bias after 2 steps
        unbiased = tensor / (1 - 0.9**2), second[name] / (1 - 0.95**2)
        assert (unbiased[0].abs() <= 1.01 * unbiased[1].sqrt() + 1e-9).all(), name


def test_states_of_two_ranks_are_carried_too(folder: Path, tmp_path: Path) -> None:
    """Put together from the rows of both, or from the one file of what is whole on both; and taken up by both, each its own rows."""
    first = tmp_path / "first"
    run_ranks(2, train, folder, folder / "student", first, Span(0, 2, STEPS))
    plan, _, _ = write_cut(tmp_path, first)
    student = prune(first, tmp_path / "pruned", plan=plan)
    moments = carry(states(first), first, tmp_path / "moments", plan=plan)
    files = [load_file(file) for file in sorted(next(states(first).glob("step-*")).glob("*.safetensors"))]
    for name, places in (("layers.0.linear_attn.conv1d.weight", 2), ("layers.1.self_attn.q_norm.weight", 1)):
        saved = [file[key] for file in files if (key := f"exp_avg_sq.model.{name}") in file]
        assert len(saved) == places
        assert torch.equal(weights(moments / "exp_avg_sq")[f"model.{name}"], torch.cat(saved))

    span = Span(2, 4, STEPS)
    run_ranks(2, train, folder, student, tmp_path / "pair" / "out", span, 2, moments)
    alone = weights(train(folder, student, tmp_path / "alone" / "out", span, 2, moments))
    reset = weights(train(folder, student, tmp_path / "reset" / "out", span, 2))
    for name, tensor in weights(tmp_path / "pair" / "out").items():
        difference, effect = (tensor - alone[name]).norm(), (reset[name] - alone[name]).norm()
        assert difference <= 0.01 * effect + 1e-6, name


def test_fused_and_per_expert_checkpoints_have_the_same_moments(folder: Path, tmp_path: Path) -> None:
    """The state has the module's layout, with experts stacked, whatever the checkpoint's."""
    trained = train(folder, folder / "student", tmp_path / "first", Span(0, 1, STEPS))
    moments = carry(states(trained), trained, tmp_path / "moments", plan=write_plan(tmp_path / "plan.json", trained))
    stacked = fused(weights(trained), Checkpoint(trained).config)
    assert weights(moments / "exp_avg").keys() == stacked.keys()


def test_what_was_not_trained_has_no_moments(folder: Path, tmp_path: Path) -> None:
    changes = {"terms": ["lm"], "optimizer": {"at_cut": "carry", "learning_rate_scale": {"router": 0.0}}}
    trained = train(folder, folder / "student", tmp_path / "first", Span(0, 1, STEPS), changes=changes)
    moments = carry(states(trained), trained, tmp_path / "moments", plan=write_plan(tmp_path / "plan.json", trained))
    for name, tensor in weights(moments / "exp_avg_sq").items():
        assert tensor.any() != (name.startswith("mtp.") or name.endswith("mlp.gate.weight")), name
    train(folder, trained, tmp_path / "second", Span(1, 2, STEPS), 2, moments, changes)


def test_a_state_that_is_gone(folder: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.json", folder / "student")
    with pytest.raises(UserError, match=r"has no training state, .* or train on without moments"):
        carry(tmp_path / ".out.state", folder / "student", tmp_path / "moments", plan=plan)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_stages_by_hand(folder: Path, tmp_path: Path) -> None:
    """The same from the command line: the second training's moments have made the steps of both."""
    recipe = tmp_path / "distil.yaml"
    recipe.write_text(json.dumps({"tokens": 4 * BATCH_SIZE * 16, "batch_size": BATCH_SIZE, "terms": ["lm", "mtp_lm"]}))
    usual = f"--tokens {folder}/tokens --recipe {recipe} --sequence-length 16 --device cpu --keep-state"

    def slimqwen(command: str) -> None:
        result = CliRunner().invoke(app, command.split(), catch_exceptions=False)
        assert result.exit_code == 0, result.output

    slimqwen(f"distil {folder}/student --out {tmp_path}/first --steps 0:2 {usual}")
    plan, _, _ = write_cut(tmp_path, tmp_path / "first")
    slimqwen(f"prune {tmp_path}/first --plan {plan} --out {tmp_path}/pruned")
    slimqwen(f"carry {tmp_path}/.first.state {tmp_path}/first --plan {plan} --out {tmp_path}/moments")
    slimqwen(f"distil {tmp_path}/pruned --out {tmp_path}/second --steps 2:4 --moments {tmp_path}/moments {usual}")
    assert {float(tensor) for name, tensor in saved(tmp_path / "second").items() if name.startswith("step.")} == {4.0}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["run"], line["step"]) for line in lines] == [("first", 0), ("first", 1), ("second", 2), ("second", 3)]
    assert [line["lambda"] for line in lines] == pytest.approx([1.0, 0.9166667, 0.8333333, 0.75])  # one ramp over both


def test_moments_of_something_else_are_refused(folder: Path, tmp_path: Path) -> None:
    trained = train(folder, folder / "student", tmp_path / "first", Span(0, 1, STEPS))
    plan, _, _ = write_cut(tmp_path, trained)
    with pytest.raises(UserError, match=r"plan\.json was not made for .*student"):
        carry(states(trained), folder / "student", tmp_path / "moments", plan=plan)
    moments = carry(states(trained), trained, tmp_path / "moments", plan=plan)
    span = Span(1, 2, STEPS)
    with pytest.raises(UserError, match=r"of another shape than .*student: '.*' is \(.*\) there and \(.*\) here"):
        train(folder, folder / "student", tmp_path / "second", span, 2, moments)
    with pytest.raises(UserError, match="holds no moments: `slimqwen carry` writes them"):
        train(folder, folder / "student", tmp_path / "second", span, 2, trained)
    changes = {"optimizer": "muon"}
    student = prune(trained, tmp_path / "pruned", plan=plan)
    with pytest.raises(UserError, match=r"holds AdamW's moments, and distil\.optimizer is muon"):
        train(folder, student, tmp_path / "second", span, 2, moments, changes)


def test_the_schedule_carries_and_tidies_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at the second stage's first step, it carries once; at the end neither state nor moments are left."""
    distilling = tiny_recipe(tmp_path, tmp_path / "run").distil.model_dump() | {"optimizer": {"at_cut": "carry"}}
    published = paper()  # moments cannot follow a rotation
    recipe = tiny_recipe(tmp_path, tmp_path / "run", distil=distilling, pruning=published, baselines=[])
    original, begun = Trainer.step, []

    def step_or_stop(self: Trainer, step: int) -> dict[str, float]:
        if self.span.first_step == step > 0:
            steps = {float(state["step"]) for state in self.optimizer.state.values()}
            begun.append(steps)
            assert any(state["exp_avg"].any() for state in self.optimizer.state.values())
            if len(begun) == 1:
                raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Trainer, "step", step_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    assert (tmp_path / "run/stage-2/moments").is_dir() and not (tmp_path / "run/stage-1/.distilled.state").exists()
    run(recipe)
    assert begun == [{3.0}, {3.0}]
    left = [path.name for path in (tmp_path / "run").rglob("*") if path.name in ("moments", ".distilled.state")]
    assert left == []
    final = (tmp_path / "run/final/model.safetensors").read_bytes()
    run(recipe)
    assert (tmp_path / "run/final/model.safetensors").read_bytes() == final and len(begun) == 2
