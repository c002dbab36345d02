"""Calibration: every sum against a slow walk through the layers that uses no hooks and runs each expert by hand."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rounding import FORWARD, SUM, error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_tokens, write_tiny_checkpoint, write_tiny_tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask

from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.observe import observe
from slimqwen.calibration.statistics import HALVES, Part, Statistics, Sums
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.data.packed import PackedTokens
from slimqwen.data.stream import TokenStream
from slimqwen.model.model import MtpCausalLM, load
from slimqwen.recipe import CalibrationRecipe, Execution, TextSettings

pytestmark = pytest.mark.rounding

SEQUENCE_LENGTH = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, tokens), made with the same tokenizer."""
    folder = tmp_path_factory.mktemp("calibration")
    tokenizer, tokens = write_tiny_tokens(folder)
    return write_tiny_checkpoint(folder / "checkpoint", tokenizer=tokenizer), tokens


TEXT = Part("text", 0)


def observed(
    checkpoint: Path, batches: list[Tensor], model: MtpCausalLM | None = None, part: Part = TEXT
) -> Statistics:
    """The statistics of these rows, batch by batch, in one part."""
    source, model = Checkpoint(checkpoint), model or load(checkpoint)
    tokens = sum(rows[:, 1:].numel() for rows in batches)
    statistics = Statistics(source.fingerprint(), "test", {part: {"main": tokens, "mtp": tokens * source.has_mtp}})
    with observe(model, statistics), statistics.part(part), torch.inference_mode():
        for rows in batches:
            model(rows)
    return statistics


def assert_same_sums(one: Statistics | Sums, other: Statistics | Sums, relative: float) -> None:
    """Equal up to `relative` of the largest entry of each sum, to the bit where it is 0."""
    assert one.sums.keys() == other.sums.keys() and one.tokens == other.tokens
    for name, expected in other.sums.items():
        found = one.sums[name]
        assert found.dtype == torch.float64
        assert error(found, expected) <= relative, name


# --- the referee ------------------------------------------------------------------------------------------------------


class Referee:
    """Walks through the model one module at a time and adds up in float64 what calibration should."""

    def __init__(self, model: MtpCausalLM) -> None:
        self.model = model
        self.decoder = model.backbone.get_decoder()
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def walk(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.decoder.embed_tokens(tokens[:, :-1])
        hidden_sums, cosine_sums = [x.double().sum((0, 1))], []
        for number, layer in enumerate(self.decoder.layers):
            before = x
            x = self.layer(f"model.layers.{number}", layer, x)
            hidden_sums.append(x.double().sum((0, 1)))
            cosine_sums.append(F.cosine_similarity(before.double(), x.double(), dim=-1).sum())
        self.sums["layers/hidden_sums"] = torch.stack(hidden_sums)
        self.sums["layers/cosine_sums"] = torch.stack(cosine_sums)
        main = self.norm("model.norm", self.decoder.norm, x)

        mtp = self.model.mtp
        assert mtp is not None
        embedding = self.norm(
            "mtp.pre_fc_norm_embedding", mtp.pre_fc_norm_embedding, self.decoder.embed_tokens(tokens[:, 1:])
        )
        hidden = self.norm("mtp.pre_fc_norm_hidden", mtp.pre_fc_norm_hidden, main)
        x = self.layer("mtp.layers.0", mtp.layers[0], mtp.fc(torch.cat([embedding, hidden], -1)))
        self.norm("mtp.norm", mtp.norm, x)
        return self.sums

    def norm(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        """x / rms(x) * (1 + weight), by hand."""
        scale = (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        output = x * scale * (1.0 + module.weight)
        self.sums[f"norm/{name}.weight/abs_sums"] = output.double().abs().sum((0, 1))
        return output

    def layer(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        normed = self.norm(f"{name}.input_layernorm", layer.input_layernorm, x)
        if hasattr(layer, "linear_attn"):
            with self.heads(f"{name}.linear_attn.out_proj", layer.linear_attn.out_proj, dim=12):
                x = x + layer.linear_attn(normed)
        else:
            positions = torch.arange(x.shape[1])[None]
            mask = create_causal_mask(
                config=self.model.backbone.config,
                inputs_embeds=x,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            )
            rotary = self.decoder.rotary_emb(x, positions)
            with self.heads(f"{name}.self_attn.o_proj", layer.self_attn.o_proj, dim=8):
                x = x + layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)[0]
        normed = self.norm(f"{name}.post_attention_layernorm", layer.post_attention_layernorm, x)
        return x + self.experts(name, layer.mlp, normed.flatten(0, 1)).view_as(x)

    @contextmanager
    def heads(self, name: str, projection: nn.Module, dim: int) -> Iterator[None]:
        """The norms of what each of 2 x 2 heads hands to a projection, while it is open."""
        seen: list[Tensor] = []
        usual = projection.forward
        projection.forward = lambda x: usual(seen.append(x) or x)  # type: ignore[func-returns-value]
        yield
        projection.forward = usual
        heads = [seen[0][..., head * dim : (head + 1) * dim].double() for head in range(4)]
        norms = torch.stack([head.pow(2).sum(-1).sqrt().sum() for head in heads])
        self.sums[f"input/{name}.weight/norm_sums"] = norms.view(2, 2)

    def experts(self, name: str, mlp: nn.Module, tokens: Tensor) -> Tensor:
        """sum_{e in TopK} z_e E_e(x) + sigmoid(x w_sh) Shared(x), token by token (method.md 1)."""
        experts = mlp.gate.weight.shape[0]
        logits = tokens @ mlp.gate.weight.T
        sums = {
            "assignments": torch.zeros(experts, dtype=torch.float64),
            "gate_sums": torch.zeros(experts, dtype=torch.float64),
            "gated_norm_sums": torch.zeros(experts, dtype=torch.float64),
            "output_sums": torch.zeros(experts, tokens.shape[1], dtype=torch.float64),
            "neuron_abs_sums": torch.zeros(experts, 16, dtype=torch.float64),
            "logit_gram": logits.double().T @ logits.double(),
        }
        shared = F.silu(tokens @ mlp.shared_expert.gate_proj.weight.T) * (tokens @ mlp.shared_expert.up_proj.weight.T)
        self.sums[f"input/{name}.mlp.shared_expert.down_proj.weight/abs_sums"] = shared.double().abs().sum(0)
        outputs = []
        for x, token_logits in zip(tokens, logits, strict=True):
            chosen = token_logits.argsort(descending=True)[:2].tolist()
            gates = token_logits[chosen].softmax(-1)
            output = torch.sigmoid(mlp.shared_expert_gate.weight @ x) * mlp.shared_expert(x)
            for expert, z in zip(chosen, gates, strict=True):
                gate, up = (mlp.experts.gate_up_proj[expert] @ x).split(16)
                neurons = F.silu(gate) * up
                expert_output = mlp.experts.down_proj[expert] @ neurons
                sums["assignments"][expert] += 1
                sums["gate_sums"][expert] += z
                sums["gated_norm_sums"][expert] += z * expert_output.norm()
                sums["output_sums"][expert] += expert_output
                sums["neuron_abs_sums"][expert] += neurons.abs()
                output = output + z * expert_output
            outputs.append(output)
        self.sums |= {f"experts/{name}/{key}": value for key, value in sums.items()}
        return torch.stack(outputs)


def test_every_sum_equals_the_referees(files: tuple[Path, Path]) -> None:
    model, rows = load(files[0]), tiny_tokens(rows=3, columns=17)
    statistics = observed(files[0], [rows], model)
    measured = statistics.weighted()
    assert_same_sums(measured, Sums({"main": 48, "mtp": 48}, Referee(model).walk(rows)), relative=FORWARD)
    for block in [f"model.layers.{layer}" for layer in range(4)] + ["mtp.layers.0"]:
        assert measured[f"experts/{block}/assignments"].sum() == 48 * 2
        assert measured[f"experts/{block}/gate_sums"].sum().item() == pytest.approx(48, rel=SUM)


# --- how they add up --------------------------------------------------------------------------------------------------


def test_watching_does_not_change_the_forward_pass(files: tuple[Path, Path]) -> None:
    model, rows = load(files[0]), tiny_tokens(rows=3, columns=17)
    with torch.inference_mode():
        usual = model(rows)
        statistics = Statistics("", "", {TEXT: {"main": 0, "mtp": 0}})
        with observe(model, statistics), statistics.part(TEXT):
            watched = model(rows)
        after = model(rows)
    assert error(watched.main, usual.main) < FORWARD and error(watched.mtp, usual.mtp) < FORWARD
    assert torch.equal(after.main, usual.main)  # and nothing is left behind
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(hasattr(module, "slimqwen_observer") for module in model.modules())


def test_halves_add_up(files: tuple[Path, Path]) -> None:
    model, rows = load(files[0]), tiny_tokens(rows=6, columns=17)
    first, second = observed(files[0], [rows[:2]], model), observed(files[0], [rows[2:]], model)
    assert_same_sums(first + second, observed(files[0], [rows], model), relative=FORWARD)
    assert_same_sums(first + second, observed(files[0], [rows[:2], rows[2:]], model), relative=0.0)


def test_statistics_of_other_checkpoints_do_not_add_up(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows = tiny_tokens()
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="two different checkpoints"):
        observed(files[0], [rows]) + observed(other, [rows])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_does_not_matter(files: tuple[Path, Path], tmp_path: Path, batch_size: int) -> None:
    """And the rows are the first of the training order, each once."""
    checkpoint, tokens = files
    recipe = CalibrationRecipe(samples=5)
    found = calibrate(
        checkpoint,
        tmp_path / "s.safetensors",
        tokens=tokens,
        recipe=recipe,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH, seed=3),
        execution=Execution(device="cpu", batch_size=batch_size),
    )
    stream = TokenStream(PackedTokens(tokens / "train"), SEQUENCE_LENGTH, seed=3)
    assert_same_sums(found.weighted(), observed(checkpoint, [stream.batch(0, 5).tokens]).weighted(), relative=FORWARD)
    even, odd = Part("training", 0), Part("training", 1)
    assert found.tokens == {even: {"main": 48, "mtp": 48}, odd: {"main": 32, "mtp": 32}}
    for part in (even, odd):
        rows = stream.batch(part.half, 3 - part.half, step=2).tokens
        assert rows.equal(stream.batch(0, 5).tokens[part.half :: 2])
        assert_same_sums(found.weighted(half=part.half), observed(checkpoint, [rows]).weighted(), relative=FORWARD)


TWO_SOURCES = {Part("code", 0): 1, Part("code", 1): 2, Part("wiki", 0): 3, Part("wiki", 1): 1}


@pytest.fixture(scope="module")
def two_sources(files: tuple[Path, Path]) -> tuple[Statistics, list[Statistics]]:
    """Rows of two sources in four parts, observed into one `Statistics`, and each part's alone."""
    source, model = Checkpoint(files[0]), load(files[0])
    texts = {part: tiny_tokens(rows, columns=17, seed=seed) for seed, (part, rows) in enumerate(TWO_SOURCES.items())}
    apart = [observed(files[0], [rows], model, part) for part, rows in texts.items()]
    whole = Statistics(
        source.fingerprint(), "test", {p: dict.fromkeys(("main", "mtp"), 16 * n) for p, n in TWO_SOURCES.items()}
    )
    with observe(model, whole), torch.inference_mode():
        for part, rows in texts.items():
            with whole.part(part):
                model(rows)
    return whole, apart


def test_parts_are_kept_apart_and_add_up(two_sources: tuple[Statistics, list[Statistics]]) -> None:
    whole, apart = two_sources
    added = apart[0] + apart[1] + apart[2] + apart[3]
    assert added.tokens == whole.tokens and added.sources == {"code": 48, "wiki": 64}
    assert_same_sums(added, whole, relative=0.0)
    code_0, code_1, wiki_0, wiki_1 = (dict(statistics.weighted().sums) for statistics in apart)
    both = {name: code_0[name] + code_1[name] + wiki_0[name] + wiki_1[name] for name in code_0}
    assert_same_sums(whole.weighted(), Sums({"main": 112, "mtp": 112}, both), relative=0.0)
    odd = {name: code_1[name] + wiki_1[name] for name in code_1}
    assert_same_sums(whole.weighted(half=1), Sums({"main": 48, "mtp": 48}, odd), relative=0.0)
    assert not any(torch.equal(code_0[name], wiki_1[name]) for name in code_0 if "assignments" not in name)


def test_weights_are_a_mixture_of_as_many_tokens(two_sources: tuple[Statistics, list[Statistics]]) -> None:
    """Every sum, assignments too, is that of code repeated and wiki repeated, in proportion."""
    whole, apart = two_sources
    # code has 48 tokens of 112, wiki 64. Shares 3 : 1 of 112 tokens are 84 and 28: code x 7/4, wiki x 7/16.
    weighted = whole.weighted({"code": 3, "wiki": 1})
    code, wiki = (apart[0] + apart[1]).weighted(), (apart[2] + apart[3]).weighted()
    expected = {name: 1.75 * code[name] + 0.4375 * wiki[name] for name in code.sums}
    assert_same_sums(weighted, Sums({"main": 112, "mtp": 112}, expected), relative=1e-15)

    # 3 : 1 by tokens is 4 : 1 by repetition: 4 x 48 tokens of code for 1 x 64 of wiki.
    repeated = apart[0] + apart[1]
    for _ in range(3):
        repeated = repeated + apart[0] + apart[1]
    mixture = (repeated + apart[2] + apart[3]).weighted()
    assert mixture.tokens["main"] == 256
    assert_same_sums(scaled(mixture, 112 / 256), weighted, relative=1e-15)

    assert_same_sums(whole.weighted({"code": 48, "wiki": 64}), whole.weighted(), relative=1e-15)  # the default
    assert_same_sums(whole.weighted({"code": 1, "wiki": 0}, half=1), scaled(apart[1].weighted(), 1.5), relative=1e-15)


def scaled(sums: Sums, factor: float) -> Sums:
    tokens = {module: factor * count for module, count in sums.tokens.items()}
    return Sums(tokens, {name: factor * value for name, value in sums.sums.items()})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"code": 1, "wikki": 1}, r"'wikki' \(did you mean 'wiki'\?\)"),
        ({"code": 1}, "leaves out wiki"),
        ({"code": 0, "wiki": 0}, "at least one of them more than 0"),
        ({"code": -1, "wiki": 2}, "0 or more"),
        ({"code": torch.nan, "wiki": 2}, "0 or more"),
    ],
)
def test_weights_that_say_nothing(
    two_sources: tuple[Statistics, list[Statistics]], weights: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        two_sources[0].weighted(weights)


def test_sources_are_measured_apart(files: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, tokens = files
    shutil.copytree(tokens, tmp_path / "more")
    recipe = CalibrationRecipe(sources={"code": tokens, "more": tmp_path / "more"}, samples=5)
    found = calibrate(
        checkpoint,
        tmp_path / "s",
        recipe=recipe,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        execution=Execution(device="cpu"),
    )
    assert {part: counts["main"] for part, counts in found.tokens.items()} == {
        Part("code", 0): 32,
        Part("code", 1): 16,
        Part("more", 0): 16,
        Part("more", 1): 16,
    }
    stream = TokenStream(PackedTokens(tokens / "train"), SEQUENCE_LENGTH, seed=0)
    more = observed(checkpoint, [stream.batch(0, 2).tokens]).weighted()  # same text, so its first two rows
    only_more = found.weighted({"code": 0, "more": 1})
    assert_same_sums(only_more, scaled(more, 80 / 32), relative=FORWARD)
    with pytest.raises(UserError, match="1 samples cannot be spread over 2 sources"):
        calibrate(
            checkpoint,
            tmp_path / "s",
            recipe=recipe.model_copy(update={"samples": 1}),
            text=TextSettings(sequence_length=SEQUENCE_LENGTH),
            execution=Execution(device="cpu"),
        )


def test_a_source_shorter_than_its_samples_is_announced(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = CalibrationRecipe(samples=12)
    calibrate(
        files[0],
        tmp_path / "s",
        tokens=files[1],
        recipe=recipe,
        text=TextSettings(sequence_length=512),
        execution=Execution(device="cpu"),
    )
    assert "note: 'training' has" in capsys.readouterr().err


def test_layers_measured_apart_are_joined_without_reading_them(
    two_sources: tuple[Statistics, list[Statistics]], tmp_path: Path
) -> None:
    whole, _ = two_sources
    names = list(whole.sums)
    pieces = []
    for number in range(3):
        sums = {name: whole.sums[name] for name in names[number::3]}
        # A piece lacks the names of another part: only the joined file must be complete.
        pieces.append(Statistics(whole.checkpoint, whole.data, whole.tokens, sums))
    Statistics.joined(pieces).save(tmp_path / "joined")
    whole.save(tmp_path / "whole")
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()


def test_saved_is_what_is_loaded(files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    recipe = CalibrationRecipe(samples=2)
    made = calibrate(
        files[0],
        path,
        tokens=files[1],
        recipe=recipe,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        execution=Execution(device="cpu"),
    )
    loaded = Statistics.load(path)
    assert (loaded.checkpoint, loaded.data, loaded.tokens) == (made.checkpoint, made.data, made.tokens)
    assert_same_sums(loaded, made, relative=0.0)
    assert_same_sums(loaded.weighted(), made.weighted(), relative=0.0)
    assert_same_sums(loaded + made, made + made, relative=0.0)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    again = calibrate(
        files[0],
        tmp_path / "again",
        tokens=files[1],
        recipe=recipe,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH, seed=1),
        execution=Execution(device="cpu"),
    )
    assert again.data != made.data and again.checkpoint == made.checkpoint


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_checkpoint_without_mtp_is_measured_without(tmp_path: Path, layout: str) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", layout=layout, num_nextn_predict_layers=0)  # type: ignore[arg-type]
    statistics = observed(checkpoint, [tiny_tokens()])
    assert statistics.tokens[TEXT]["mtp"] == 0 and not any("mtp." in name for name in statistics.sums)


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_statistics_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path, value: float) -> None:
    path = tmp_path / "statistics.safetensors"
    sums = {"text/0/experts/model.layers.1/gate_sums": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    statistics = Statistics("checkpoint", "data", {TEXT: {"main": 1, "mtp": 0}}, sums)
    statistics.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    sums["text/0/experts/model.layers.1/gate_sums"][0] = value
    save_file(sums, path, metadata=metadata)
    with pytest.raises(UserError, match=r"not finite, in text/0/experts/model\.layers\.1/gate_sums"):
        Statistics.load(path).weighted()["experts/model.layers.1/gate_sums"]
    with pytest.raises(UserError, match=r"not finite, in text/0/experts/model\.layers\.1/gate_sums"):
        statistics.save(tmp_path / "again.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_model_that_overflows_is_found_out_by_the_one_who_measures_it(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Not by an assertion deep in the planner, and without leaving a file that looks like statistics."""
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", seed=0)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.shared_expert.down_proj.weight"][3, 3] = torch.inf
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "statistics.safetensors"
    with pytest.raises(UserError, match="not finite"):
        calibrate(
            checkpoint,
            out,
            tokens=files[1],
            recipe=CalibrationRecipe(samples=2),
            text=TextSettings(sequence_length=SEQUENCE_LENGTH),
            execution=Execution(device="cpu"),
        )
    assert not out.exists()


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_file_that_is_not_statistics(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "statistics.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable statistics file"):
        Statistics.load(path)


def test_another_safetensors_file_is_not_statistics(files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="is not a statistics file"):
        Statistics.load(files[0] / "model.safetensors")


def test_an_older_file_is_measured_again(tmp_path: Path) -> None:
    sums = {"layers/cosine_sums": torch.ones(2, dtype=torch.float64)}
    old = {"format": "slimqwen.statistics/1", "checkpoint": "c", "data": "d", "tokens.main": "2", "tokens.mtp": "2"}
    save_file(sums, tmp_path / "old", metadata=old)
    with pytest.raises(UserError, match="run `slimqwen calibrate` again"):
        Statistics.load(tmp_path / "old")


@pytest.mark.parametrize("damage", ["header", "names", "parts"])
def test_a_damaged_file_is_found_out(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s"
    sums = {
        f"text/{half}/layers/{name}": torch.ones(2).double()
        for half in (0, 1)
        for name in ("cosine_sums", "hidden_sums")
    }
    tokens = {Part("text", half): {"main": 2, "mtp": 0} for half in HALVES}
    Statistics("checkpoint", "data", tokens, sums).save(path)
    assert Statistics.load(path).tokens == tokens
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if damage == "header":
        metadata = {key: value[:-5] for key, value in metadata.items()}
    elif damage == "names":
        del sums["text/1/layers/cosine_sums"]
    else:
        sums["other/0/layers/cosine_sums"] = torch.ones(2).double()
    save_file(sums, path, metadata=metadata)
    with pytest.raises(UserError, match="run `slimqwen calibrate` again"):
        Statistics.load(path)


def test_a_sum_that_was_not_measured(two_sources: tuple[Statistics, list[Statistics]]) -> None:
    with pytest.raises(UserError, match=r"hold no 'input/x/abs_sums'.*run `slimqwen calibrate` again"):
        two_sources[0].weighted()["input/x/abs_sums"]


def test_tokens_of_another_tokenizer_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = write_tiny_tokens(tmp_path, vocab_size=280)
    with pytest.raises(UserError, match="another tokenizer"):
        calibrate(
            files[0],
            tmp_path / "s",
            tokens=other,
            recipe=CalibrationRecipe(),
            text=TextSettings(sequence_length=SEQUENCE_LENGTH),
            execution=Execution(device="cpu"),
        )
    small = write_tiny_checkpoint(tmp_path / "small", vocab_size=270)
    with pytest.raises(UserError, match="270"):
        calibrate(
            small,
            tmp_path / "s",
            tokens=files[1],
            recipe=CalibrationRecipe(),
            text=TextSettings(sequence_length=SEQUENCE_LENGTH),
            execution=Execution(device="cpu"),
        )
