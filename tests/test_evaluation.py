"""Evaluation against slow referees that hold all logits, and draft token by token."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rounding import FORWARD
from tiny import canonical
from torch import nn
from transformers import GenerationConfig

from slimqwen.core.errors import StageFailed, UserError
from slimqwen.data.packed import PackedWriter
from slimqwen.data.store import load_manifest
from slimqwen.data.tokenize import tokenize
from slimqwen.data.tokenizer import load_tokenizer, train_tokenizer
from slimqwen.evaluation.acceptance import accepted_drafts, continue_greedily, heldout_prompts
from slimqwen.evaluation.evaluate import evaluate
from slimqwen.evaluation.fidelity import compare, heldout_rows, record
from slimqwen.evaluation.kept import kept_folder
from slimqwen.evaluation.result import Evaluation
from slimqwen.families import Config, family_of
from slimqwen.families.count import count
from slimqwen.generation import DEFAULT_DRAFT
from slimqwen.generation.speculative import speculate
from slimqwen.model.model import MtpCausalLM, initialise, load, save
from slimqwen.recipe import EvaluationRecipe, Execution, Source, TextSettings

pytestmark = pytest.mark.rounding

SEQUENCE_LENGTH = 16
VOCAB_SIZE = 300
CONFIG: Config = canonical(
    {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "intermediate_size": 32,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.3,  # far from uniform predictions, so that a wrong number is a visible one
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 1,
        "eos_token_id": 0,
    }
)
FAMILY = family_of(CONFIG, "the test")
RECIPE = EvaluationRecipe(
    tokens=6 * SEQUENCE_LENGTH,
    acceptance={"prompts": 3, "prompt_tokens": 6, "new_tokens": 8, "depth": 3},
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(iter([f"def f{i}(x):\n    return x + {i}\n" for i in range(50)]), VOCAB_SIZE, folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "train.txt").write_text("def f(x):\n    return x\n" * 20)
    (folder / "heldout.txt").write_text("".join(f"def g{i}(y):\n    return y * {i} - é\n" for i in range(40)))
    heldout = [Source(path=folder / "heldout.txt")]
    tokenize([Source(path=folder / "train.txt")], tokenizer, folder / "tokens", heldout_sources=heldout)
    return folder / "tokens"


def write_checkpoint(folder: Path, model: MtpCausalLM, config: Config, tokenizer: Path) -> Path:
    shutil.copytree(tokenizer, folder)
    save(model, folder, None, config, torch.float32)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    return write_checkpoint(folder, initialise(CONFIG, seed=1), CONFIG, tokenizer)


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer) -> Path:
    """Another width, another number of experts."""
    config = CONFIG | {"hidden_size": 24, "num_experts": 4}
    folder = tmp_path_factory.mktemp("models") / "student"
    return write_checkpoint(folder, initialise(config, seed=2), config, tokenizer)


# The referees: everything at once, nothing cached.


@torch.no_grad()
def logits(model: MtpCausalLM, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits of rows [rows, seq + 1]: main ones for tokens 1 .., MTP's for tokens 2 .."""
    hidden = model(rows)
    return hidden.main @ model.head.T, (hidden.mtp @ model.head.T)[:, :-1]


def kl(teacher: torch.Tensor, student: torch.Tensor) -> float:
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@torch.no_grad()
def greedy(model: MtpCausalLM, prompt: list[int], new_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model.backbone(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


@torch.no_grad()
def drafts_from(model: MtpCausalLM, prefix: list[int], depth: int) -> list[int]:
    """What MTP drafts after `prefix`, whose last token the backbone has just said: it reads its own drafts."""
    decoder = model.backbone.get_decoder()
    known = list(prefix)
    hidden = decoder(torch.tensor([prefix[:-1]]), use_cache=False).last_hidden_state
    for k in range(depth):
        hidden = model.mtp(hidden, decoder.embed_tokens(torch.tensor([known[k + 1 :]])), decoder.rotary_emb)
        known.append(int((hidden[0, -1] @ model.head.T).argmax()))
    return known[len(prefix) :]


# Fidelity


def test_rows_are_evenly_spaced_over_the_held_out_stream(tmp_path):
    with PackedWriter(tmp_path / "heldout", 100) as writer:
        writer.add(list(range(31)))  # ten rows of 3 + 1 tokens

    def starts(wanted_tokens: int) -> list[int]:
        return [int(row[0]) // 3 for row in heldout_rows(tmp_path, 3, wanted_tokens).tokens]

    assert starts(12) == [0, 2, 5, 7]
    assert starts(14) == [0, 2, 5, 7]  # 14 tokens do not pay for a fifth row
    assert starts(1000) == list(range(10))
    assert starts(2) == [0]
    assert heldout_rows(tmp_path, 3, 6).tokens[1].tolist() == [15, 16, 17, 18]


def test_fidelity_equals_the_full_logits(teacher, student, tokens):
    rows = heldout_rows(tokens, SEQUENCE_LENGTH, 5 * SEQUENCE_LENGTH)
    t, s = load(teacher), load(student)
    (t_main, _), (s_main, s_mtp) = logits(t, rows.tokens), logits(s, rows.tokens)
    means = compare(*(record(m, FAMILY, config_of(m), rows, batch_size=2, title="") for m in (s, t)))

    with torch.no_grad():
        plain_loss = s.backbone(input_ids=rows.tokens, labels=rows.tokens).loss
    mtp_loss = nn.functional.cross_entropy(s_mtp.flatten(0, 1), rows.tokens[:, 2:].flatten())
    assert means["lm"] == pytest.approx(float(plain_loss), rel=FORWARD)
    assert means["mtp_lm"] == pytest.approx(float(mtp_loss), rel=FORWARD)
    assert means["kd"] == pytest.approx(kl(t_main, s_main), rel=FORWARD)
    assert means["mtp_kd"] == pytest.approx(kl(t_main[:, 1:], s_mtp), rel=FORWARD)
    assert means["top1_agreement"] == float((t_main.argmax(-1) == s_main.argmax(-1)).double().mean())
    assert means["kd"] > 0.1


def test_the_batch_size_changes_nothing(teacher, student, tokens):
    rows = heldout_rows(tokens, SEQUENCE_LENGTH, 5 * SEQUENCE_LENGTH)
    s, t = load(student), load(teacher)
    results = []
    for batch_size in (1, 3, 5):
        recordings = [record(m, FAMILY, config_of(m), rows, batch_size=batch_size, title="") for m in (s, t)]
        results.append((compare(*recordings), recordings[0].utilisation))
    for means, utilisation in results[1:]:
        assert means == pytest.approx(results[0][0], rel=FORWARD)
        assert utilisation == results[0][1]


def test_utilisation_counts_what_the_routers_chose(teacher, tokens):
    model = load(teacher)
    rows = heldout_rows(tokens, SEQUENCE_LENGTH, 5 * SEQUENCE_LENGTH)
    utilisation = record(model, FAMILY, CONFIG, rows, batch_size=2, title="").utilisation

    assert list(utilisation) == [f"model.layers.{i}" for i in range(4)] + ["mtp.layers.0"]
    with torch.no_grad():
        output = model.backbone(rows.tokens[:, :-1], output_router_logits=True)
    for layer, router_logits in enumerate(output.router_logits):
        chosen = router_logits.topk(2).indices.flatten()
        assert (
            utilisation[f"model.layers.{layer}"]
            == (torch.bincount(chosen, minlength=8).double() / len(chosen)).tolist()
        )
    for shares in utilisation.values():
        assert len(shares) == 8
        assert sum(shares) == pytest.approx(1.0)


def config_of(model: MtpCausalLM) -> Config:
    config = model.backbone.config
    return CONFIG | {"hidden_size": config.hidden_size, "num_experts": config.num_experts}


# Acceptance


PROMPT_TOKENS, NEW_TOKENS = 5, 10


@pytest.fixture(scope="module")
def narrow() -> tuple[MtpCausalLM, torch.Tensor]:
    """A random model that says one of three tokens, eos among them, so that random drafts are sometimes right; and
    four greedy continuations, made without a cache."""
    model = initialise(CONFIG, seed=8).eval()
    with torch.no_grad():
        model.head[2:] = 0.0
    prompts = torch.randint(VOCAB_SIZE, (4, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    return model, torch.tensor([greedy(model, prompt, NEW_TOKENS) for prompt in prompts.tolist()])


def test_acceptance_equals_drafting_step_by_step(narrow):
    depth = 3
    model, sequences = narrow
    accepted = accepted_drafts(model, sequences, PROMPT_TOKENS, depth)

    expected = []
    for ids in sequences.tolist():
        runs = []
        for said in range(PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS - depth):  # the token that the backbone said last
            right = [d == t for d, t in zip(drafts_from(model, ids[: said + 1], depth), ids[said + 1 :], strict=False)]
            runs.append([all(right[: k + 1]) for k in range(depth)])
        expected.append(runs)
    assert accepted.tolist() == expected

    shares = accepted.double().mean(dim=(0, 1))
    assert 0.9 > shares[0] > shares[1] > shares[2] > 0.0, "the example is too easy or too hard to show a mistake"


class Spelled(nn.Module):
    """Stands in for the MTP module: `says[depth]` maps the token read to the token drafted, both one-hot states."""

    def __init__(self, says: list[dict[int, int]]) -> None:
        super().__init__()
        self.says = iter(says)

    def forward(self, hidden, next_embeddings, rotary):
        says = next(self.says)
        drafts = next_embeddings.argmax(-1).apply_(lambda token: says.get(token, 31))
        return nn.functional.one_hot(drafts, 32).float()


def one_hot_model(says: list[dict[int, int]]) -> MtpCausalLM:
    model = initialise(CONFIG, seed=0).eval()
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight.copy_(torch.eye(VOCAB_SIZE, 32))
        model.head.copy_(torch.eye(VOCAB_SIZE, 32))
    model.mtp = Spelled(says)
    return model


def test_the_docstrings_example():
    a, b, c, d, e, f, g, h, x, y = range(10)
    model = one_hot_model([{d: e, e: x, f: g}, {e: f, f: g, g: y}])
    accepted = accepted_drafts(model, torch.tensor([[a, b, c, d, e, f, g, h]]), prompt_tokens=3, depth=2)
    assert accepted[0].tolist() == [[True, True], [False, False], [True, False]]


@pytest.mark.parametrize(("step", "share"), [(1, 1.0), (2, 0.0)])
def test_a_module_that_always_agrees_and_one_that_never_does(step, share):
    model = one_hot_model([{token: (token + step) % 20 for token in range(20)}] * 4)
    counting = torch.arange(24).remainder(20).expand(2, -1)
    accepted = accepted_drafts(model, counting, prompt_tokens=6, depth=4)
    assert accepted.shape == (2, 14, 4)
    assert accepted.double().mean(dim=(0, 1)).tolist() == [share] * 4


def test_continuations_ignore_the_generation_config_and_go_on_after_end_of_text(narrow):
    model, expected = narrow
    assert (expected[:, PROMPT_TOKENS:-1] == 0).any(), "no end-of-text in the middle: the test shows nothing"
    model.backbone.generation_config = GenerationConfig(
        eos_token_id=0, pad_token_id=0, repetition_penalty=3.0, do_sample=True
    )
    assert continue_greedily(model.backbone, expected[:, :PROMPT_TOKENS], NEW_TOKENS).equal(expected)


def test_prompts_are_evenly_spaced_windows(tmp_path):
    with PackedWriter(tmp_path / "heldout", 100) as writer:
        writer.add(list(range(12)))
    assert heldout_prompts(tmp_path, 3, 4).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert heldout_prompts(tmp_path, 1, 12).tolist() == [list(range(12))]
    with pytest.raises(UserError, match=r"12 tokens, fewer than the 13 of one prompt"):
        heldout_prompts(tmp_path, 1, 13)


# The stage


def run(models: dict[str, Path], out: Path, tokens: Path, **options) -> Evaluation:
    options = {"recipe": RECIPE, "execution": Execution(device="cpu", batch_size=4)} | options
    return evaluate(models, out, tokens=tokens, text=TextSettings(sequence_length=SEQUENCE_LENGTH), **options)


def test_evaluation(teacher, student, tokens, tmp_path):
    out = tmp_path / "run" / "evaluation.json"
    evaluation = run({"slimqwen": student, "teacher": teacher}, out, tokens)

    assert Evaluation.load(out) == evaluation
    assert list(evaluation.models) == ["teacher", "slimqwen"]
    assert (evaluation.tokens, evaluation.sequence_length) == (96, 16)
    same, other = evaluation.models["teacher"], evaluation.models["slimqwen"]
    assert (same.kl_to_teacher, same.top1_agreement) == (0.0, 1.0)
    assert same.mtp_kl_to_teacher > 0.0
    assert other.kl_to_teacher > 0.0
    assert other.top1_agreement < 1.0
    assert other.checkpoint == str(student)

    counts = count(FAMILY, CONFIG)
    assert same.total_parameters == counts.total_parameters
    assert same.active_parameters == counts.active_parameters
    assert same.mtp_parameters == counts.mtp_parameters
    heldout = load_manifest(tokens).heldout
    assert same.perplexity == pytest.approx(math.exp(same.loss))
    # The loss in bits of all held-out tokens, spread over their bytes.
    total_bits = same.loss * math.log2(math.e) * heldout.tokens
    assert same.bits_per_byte * heldout.text_bytes == pytest.approx(total_bits)

    prompts = heldout_prompts(tokens, 3, 6)
    text = load_tokenizer(teacher)
    for folder, result in ((teacher, same), (student, other)):
        model = load(folder)
        sequences = torch.tensor([greedy(model, prompt, 8) for prompt in prompts.tolist()])
        accepted = accepted_drafts(model, sequences, 6, 3)
        assert result.mtp_acceptance == accepted.double().mean(dim=(0, 1)).tolist()
        spoken = [speculate(model, prompt, draft=DEFAULT_DRAFT, max_new_tokens=8) for prompt in prompts]
        tokens_after_first = sum(len(made.tokens) - 1 for made in spoken)
        assert result.tokens_per_verification == tokens_after_first / sum(made.verifications for made in spoken)
        assert result.sample.prompt == text.decode(prompts[0])
        assert result.sample.completion == text.decode(sequences[0, 6:])


def test_the_file_has_the_names_that_other_tools_rely_on(student, tokens, tmp_path):
    run({"teacher": student}, tmp_path / "evaluation.json", tokens)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(written) == ["format", "tokens", "sequence_length", "models"]
    assert written["format"] == "slimqwen.evaluation/1"
    assert set(written["models"]["teacher"]) == {
        "checkpoint",
        "total_parameters",
        "active_parameters",
        "mtp_parameters",
        "loss",
        "perplexity",
        "bits_per_byte",
        "kl_to_teacher",
        "top1_agreement",
        "loss_by_position",
        "loss_by_frequency",
        "calibration_error",
        "mtp_loss",
        "mtp_kl_to_teacher",
        "mtp_acceptance",
        "tokens_per_verification",
        "expert_utilisation",
        "sample",
    }
    assert set(written["models"]["teacher"]["sample"]) == {"prompt", "completion"}


def test_a_file_of_before_speculative_decoding_was_measured(student, tokens, tmp_path):
    path = tmp_path / "evaluation.json"
    run({"teacher": student}, path, tokens)
    written = json.loads(path.read_text())
    assert written["models"]["teacher"].pop("tokens_per_verification") >= 1.0
    path.write_text(json.dumps(written))
    assert Evaluation.load(path).models["teacher"].tokens_per_verification is None


def test_without_a_teacher_and_without_mtp(teacher, tokenizer, tokens, tmp_path, capsys):
    config = CONFIG | {"num_nextn_predict_layers": 0}
    plain = write_checkpoint(tmp_path / "plain", initialise(config, seed=1), config, tokenizer)
    evaluation = run({"plain": plain, "full": teacher}, tmp_path / "evaluation.json", tokens, teacher=None)
    for result in evaluation.models.values():
        assert result.kl_to_teacher is result.top1_agreement is result.mtp_kl_to_teacher is None
    result = evaluation.models["plain"]
    assert result.mtp_loss is None
    assert result.mtp_acceptance == [] and result.tokens_per_verification is None
    assert result.mtp_parameters == 0
    assert "mtp.layers.0" not in result.expert_utilisation
    assert result.sample.completion
    assert len(evaluation.models["full"].mtp_acceptance) == 3
    shown = capsys.readouterr().err.splitlines()
    for part in ("losses", "where the loss is"):  # the products with the vocabulary: a third of the time
        assert any(line.startswith(f"evaluate plain: {part}") for line in shown)
    assert not any("plain" in line and "draft" in line for line in shown)  # it has nothing to draft with


def test_a_model_that_is_not_finite_stops_the_stage(teacher, tokenizer, tokens, tmp_path):
    model = initialise(CONFIG, seed=1)
    with torch.no_grad():
        model.head[0, 0] = math.nan
    broken = write_checkpoint(tmp_path / "broken", model, CONFIG, tokenizer)
    with pytest.raises(StageFailed, match=r"'student' \(.*broken\) has a loss of nan"):
        run({"teacher": teacher, "student": broken}, tmp_path / "evaluation.json", tokens)
    assert not (tmp_path / "evaluation.json").exists()


def test_what_a_user_can_get_wrong(teacher, tokenizer, tokens, tmp_path):
    out = tmp_path / "evaluation.json"
    with pytest.raises(UserError, match=r"'techer' is not among the models \(did you mean 'teacher'\?\)"):
        run({"teacher": teacher}, out, tokens, teacher="techer")
    with pytest.raises(UserError, match="no model to evaluate"):
        run({}, out, tokens, teacher=None)
    with pytest.raises(UserError, match="does not exist"):
        run({"teacher": tmp_path / "nowhere"}, out, tokens)
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        run({"teacher": teacher}, out, tmp_path / "nowhere")

    config = CONFIG | {"vocab_size": VOCAB_SIZE + 20}
    wider = write_checkpoint(tmp_path / "wider", initialise(config, seed=1), config, tokenizer)
    with pytest.raises(UserError, match=r"'wider' \(.*\) has 320 tokens in its vocabulary and 'teacher' \(.*\) 300"):
        run({"wider": wider, "teacher": teacher}, out, tokens)

    other = tmp_path / "tokenizer"
    train_tokenizer(iter(["other text altogether"]), VOCAB_SIZE, other)
    foreign = write_checkpoint(tmp_path / "foreign", initialise(CONFIG, seed=1), CONFIG, other)
    with pytest.raises(UserError, match="made with another tokenizer"):
        run({"teacher": teacher, "foreign": foreign}, out, tokens)

    assert not out.exists()


def test_what_is_not_an_evaluation(student, tokens, tmp_path):
    path = tmp_path / "evaluation.json"
    with pytest.raises(UserError, match="cannot be read"):
        Evaluation.load(path)
    run({"teacher": student}, path, tokens)
    good = json.loads(path.read_text())
    junk = {
        "{": "whole file",
        '{"models": 3}': "format",
        json.dumps(good | {"format": "slimqwen.plan/1"}): "format",
        json.dumps(good | {"modles": {}}): "modles",
        json.dumps(
            good | {"models": {"teacher": good["models"]["teacher"] | {"loss": math.nan}}}
        ): "models.teacher.loss",
        json.dumps(
            good | {"models": {"teacher": good["models"]["teacher"] | {"top1_agreement": 1.5}}}
        ): "top1_agreement",
    }
    for text, where in junk.items():
        path.write_text(text)
        with pytest.raises(UserError, match=rf"is not an evaluation of slimqwen.evaluation/1 \(.*{where}"):
            Evaluation.load(path)


# What is kept of each model


@pytest.fixture
def recorded(monkeypatch) -> list[str]:
    """The titles under which a model was run over the text, as they come."""
    titles: list[str] = []

    def watch(*arguments, title, **options):
        titles.append(title)
        return record(*arguments, title=title, **options)

    monkeypatch.setattr("slimqwen.evaluation.examinee.record", watch)
    return titles


def test_an_interrupted_evaluation_goes_on_after_the_models_that_are_measured(
    teacher, student, tokens, tmp_path, recorded, monkeypatch, capsys
):
    models = {"teacher": teacher, "student": student}
    undisturbed = run(models, tmp_path / "undisturbed" / "evaluation.json", tokens)
    assert recorded == ["evaluate teacher", "evaluate student"]
    out = tmp_path / "here" / "evaluation.json"

    original = continue_greedily
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:  # the first is the teacher's
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("slimqwen.evaluation.examinee.continue_greedily", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(models, out, tokens)
    assert not out.exists()
    recorded.clear()
    again = run(models, out, tokens)
    assert recorded == ["evaluate student"]  # the teacher is not run again, for its numbers or for what it said
    assert again == undisturbed  # to the bit: the hidden states are kept in the dtype that they were computed in
    assert "evaluate teacher: measured already" in capsys.readouterr().err


def test_one_model_more_is_all_that_is_measured(teacher, student, tokenizer, tokens, tmp_path, recorded):
    out = tmp_path / "evaluation.json"
    first = run({"teacher": teacher, "student": student}, out, tokens)
    other = write_checkpoint(tmp_path / "other", initialise(CONFIG, seed=3), CONFIG, tokenizer)
    moved = shutil.copytree(student, tmp_path / "moved")
    recorded.clear()
    second = run({"teacher": teacher, "student": moved, "other": other}, out, tokens)
    assert recorded == ["evaluate other"]
    assert second.models["teacher"] == first.models["teacher"]
    assert second.models["student"] == first.models["student"].model_copy(update={"checkpoint": str(moved)})

    fresh = run({"teacher": teacher, "other": other}, tmp_path / "fresh" / "evaluation.json", tokens)
    assert second.models["other"] == fresh.models["other"]

    # Other text to measure on, another context or other teacher: everything anew.
    for options in ({"recipe": RECIPE.model_copy(update={"tokens": 32})}, {"teacher": "student"}, {"teacher": None}):
        recorded.clear()
        run({"teacher": teacher, "student": student}, out, tokens, **options)
        assert len(recorded) == 2
    recorded.clear()
    run({"teacher": teacher, "student": student}, out, tokens)
    assert recorded == []  # what was measured first is still there


def test_what_is_kept_is_small_and_the_last_teachers(teacher, student, tokens, tmp_path, recorded, monkeypatch, capsys):
    out = tmp_path / "evaluation.json"
    run({"teacher": teacher, "student": student}, out, tokens)
    (file,) = kept_folder(out).glob("*.safetensors")
    assert file.stat().st_size < 96 * 32 * 4 + 1024  # tokens x hidden_size float32, and a header
    run({"teacher": student}, out, tokens)
    assert not file.exists() and len(list(kept_folder(out).glob("*.safetensors"))) == 1

    # A damaged file is no reason to stop, nor is a teacher of which too much would be kept.
    for file in kept_folder(out).iterdir():
        if file.is_file() and file.name != ".slimqwen":
            file.write_bytes(file.read_bytes()[:200])
    run({"teacher": student, "other": teacher}, out, tokens)
    monkeypatch.setattr("slimqwen.evaluation.kept.LARGEST_RECORDING_BYTES", 100)
    elsewhere = tmp_path / "elsewhere" / "evaluation.json"
    run({"teacher": teacher}, elsewhere, tokens)
    assert not list(kept_folder(elsewhere).glob("*.safetensors"))
    assert "are not kept: the next call runs the teacher again" in capsys.readouterr().err
    recorded.clear()
    run({"teacher": teacher, "student": student}, elsewhere, tokens)
    assert recorded == ["evaluate student: the teacher first", "evaluate student"]


def test_a_folder_of_the_users_in_the_place_of_what_is_kept_is_refused(teacher, tokens, tmp_path, recorded):
    out = tmp_path / "evaluation.json"
    kept_folder(out).mkdir()
    (kept_folder(out) / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and was not written by slimqwen"):
        run({"teacher": teacher}, out, tokens)
    assert recorded == [] and (kept_folder(out) / "notes.txt").read_text() == "mine"


def test_nothing_is_left_beside_a_result_that_was_not_reached(teacher, tokenizer, tokens, tmp_path):
    model = initialise(CONFIG, seed=1)
    with torch.no_grad():
        model.head[0, 0] = math.nan
    broken = write_checkpoint(tmp_path / "broken", model, CONFIG, tokenizer)
    with pytest.raises(StageFailed):
        run({"broken": broken}, tmp_path / "place" / "evaluation.json", tokens, teacher=None)
    assert not (tmp_path / "place").exists()
