"""What ships inside the package: the teacher is a real model of Python source, and the demo's recipe cuts it as promised."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimqwen.builtin import DEMO_RECIPE, TEACHER
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.sources import documents, is_heldout
from slimqwen.data.tokenize import tokenize
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.families.count import count
from slimqwen.recipe import DistilRecipe, EvaluationRecipe, PretrainRecipe, PruningRecipe, Source, TextSettings
from slimqwen.recipe.file import load_recipe
from slimqwen.shapes.target import completed, target_config
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs

ROOT = Path(__file__).parent.parent


def test_the_teacher_is_what_it_says() -> None:
    teacher = Checkpoint(TEACHER)
    config = teacher.config
    assert config["num_hidden_layers"] >= 8 and config["num_experts"] >= 32 and teacher.has_mtp
    assert config["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * (config["num_hidden_layers"] // 4)
    assert teacher.bytes() <= 30_000_000
    recipe = load_recipe(ROOT / "recipes" / "builtin-teacher.yaml", model=PretrainRecipe)
    assert {key: config[key] for key in recipe.config} == recipe.config


def test_the_demo_recipe_cuts_to_a_third_on_all_three_axes() -> None:
    recipe, teacher = load_recipe(DEMO_RECIPE), Checkpoint(TEACHER)
    assert recipe.target is not None
    small = target_config(teacher.family, teacher.config, completed(teacher.family, recipe.target, teacher.config))
    before, after = count(teacher.family, teacher.config), count(teacher.family, small)
    assert after.total_parameters <= 0.35 * before.total_parameters
    with_mtp = [c.total_parameters + c.mtp_parameters for c in (before, after)]
    assert with_mtp[1] <= 0.35 * with_mtp[0]
    shares = {
        field: small[field] / teacher.config[field] for field in ("num_hidden_layers", "hidden_size", "num_experts")
    }
    assert shares == {"num_hidden_layers": 0.75, "hidden_size": 0.75, "num_experts": 0.5}
    assert small["num_experts_per_tok"] < teacher.config["num_experts_per_tok"]
    assert recipe.schedule == "depth_first" and recipe.pruning == PruningRecipe()
    assert recipe.pruning.as_published().experts.compression == "partial"
    assert recipe.baselines == ["pruned", "paper_pruned", "paper", "random_init"]


def test_the_demo_holds_out_what_the_teacher_never_saw() -> None:
    demo = load_recipe(DEMO_RECIPE).data
    training = load_recipe(ROOT / "recipes" / "builtin-teacher.yaml", model=PretrainRecipe).data
    assert demo.heldout_fraction == training.heldout_fraction
    assert demo.sources[0].builtin in [source.builtin for source in training.sources]
    assert not demo.heldout_sources and not training.heldout_sources


@pytest.mark.slow
def test_the_teacher_knows_python_it_has_not_seen(tmp_path: Path) -> None:
    """Held-out standard library: far below a bigram model (4.6 nats at this vocabulary), and the MTP head drafts."""
    source = Source(builtin="python-stdlib", keep_fraction=0.4)
    assert any(is_heldout(d.name, 0.05) for d in documents(source))
    tokenize([source], TEACHER, tmp_path / "tokens")
    recipe = EvaluationRecipe(tokens=4096, acceptance={"prompts": 4, "new_tokens": 24})
    evaluation = evaluate(
        {"teacher": TEACHER},
        tmp_path / "e.json",
        tokens=tmp_path / "tokens",
        recipe=recipe,
        text=TextSettings(sequence_length=256),
    )
    teacher = evaluation.models["teacher"]
    assert teacher.loss < 4.0
    assert teacher.mtp_loss is not None and teacher.mtp_loss < teacher.loss + 1.0
    assert teacher.mtp_acceptance[0] > 0.3
    assert min(max(shares) for shares in teacher.expert_utilisation.values()) < 0.5  # experts are in use


def test_two_threads_train_to_the_same_bits_twice(tmp_path: Path) -> None:
    """Resumed = uninterrupted needs it; a tiny model would not do: its work is not worth a second thread.

    Of this one two steps on 512 tokens suffice: without `reproducible` they differed each time.
    """
    tokenize([Source(builtin="python-stdlib", keep_fraction=0.02)], TEACHER, tmp_path / "tokens", heldout_fraction=0.2)
    recipe = DistilRecipe(tokens=4 * 256, batch_size=2, terms=["lm", "mtp_lm"], learning_rate=1e-3, warmup="0 steps")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in ("once", "again"):
            distil(
                TrainingInputs(TEACHER, tmp_path / "tokens"),
                tmp_path / name,
                recipe=recipe,
                text=TextSettings(sequence_length=256),
            )
    finally:
        torch.set_num_threads(threads)
    once, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "again"))
    assert once == again


def test_the_teacher_writes_python() -> None:
    """A greedy completion goes on with indented Python."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    prompt = (
        'class Reader:\n    def __init__(self, name):\n        self.name = name\n\n    def read(self):\n        """Read'
    )
    ids = tokenizer(prompt, return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=48, do_sample=False)[0])[len(prompt) :]
    assert "\n" in text and any(word in text for word in ("self", "return", "def ", "if "))


def test_the_log_of_the_training_is_there() -> None:
    lines = [json.loads(line) for line in (ROOT / "docs" / "builtin-teacher-metrics.jsonl").read_text().splitlines()]
    assert len(lines) > 100 and lines[-1]["lm"] < lines[0]["lm"] / 2
    assert all({"step", "tokens", "lm", "mtp_lm", "learning_rate"} <= line.keys() for line in lines)
