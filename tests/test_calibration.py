"""Calibration: every sum against a slow walk through the layers that uses no hooks and runs each expert by hand."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_tokens, write_tiny_checkpoint, write_tiny_tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask

from slimqwen.calibration.calibrate import calibrate
from slimqwen.calibration.observe import observe
from slimqwen.calibration.statistics import Statistics
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.data.packed import PackedTokens
from slimqwen.data.stream import TokenStream
from slimqwen.errors import UserError
from slimqwen.modeling.model import MtpCausalLM, load
from slimqwen.recipe import CalibrationRecipe

SEQUENCE_LENGTH = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, tokens), made with the same tokenizer."""
    folder = tmp_path_factory.mktemp("calibration")
    tokenizer, tokens = write_tiny_tokens(folder)
    return write_tiny_checkpoint(folder / "checkpoint", tokenizer=tokenizer), tokens


def observed(checkpoint: Path, batches: list[Tensor], model: MtpCausalLM | None = None) -> Statistics:
    """The statistics of these rows, batch by batch."""
    source, model = Checkpoint(checkpoint), model or load(checkpoint)
    tokens = sum(rows[:, 1:].numel() for rows in batches)
    statistics = Statistics(source.fingerprint(), "test", {"main": tokens, "mtp": tokens if source.has_mtp else 0}, {})
    with observe(model, source.family, source.config, statistics), torch.inference_mode():
        for rows in batches:
            model(rows)
    return statistics


def assert_same_sums(one: Statistics, other: Statistics, relative: float) -> None:
    """Equal up to `relative` of the largest entry of each sum."""
    assert one.sums.keys() == other.sums.keys() and one.tokens == other.tokens
    for name, expected in other.sums.items():
        found = one.sums[name]
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item(), msg=name)


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
            x = x + layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)[0]
        normed = self.norm(f"{name}.post_attention_layernorm", layer.post_attention_layernorm, x)
        return x + self.experts(name, layer.mlp, normed.flatten(0, 1)).view_as(x)

    def experts(self, name: str, mlp: nn.Module, tokens: Tensor) -> Tensor:
        """sum_{e in TopK} z_e E_e(x) + sigmoid(x w_sh) Shared(x), token by token (method.md 1)."""
        experts = mlp.gate.weight.shape[0]
        logits = tokens @ mlp.gate.weight.T
        sums = {
            "assignments": torch.zeros(experts, dtype=torch.float64),
            "gate_sums": torch.zeros(experts, dtype=torch.float64),
            "gated_norm_sums": torch.zeros(experts, dtype=torch.float64),
            "output_sums": torch.zeros(experts, tokens.shape[1], dtype=torch.float64),
            "logit_gram": logits.double().T @ logits.double(),
        }
        outputs = []
        for x, token_logits in zip(tokens, logits, strict=True):
            chosen = token_logits.argsort(descending=True)[:2].tolist()
            gates = token_logits[chosen].softmax(-1)
            output = torch.sigmoid(mlp.shared_expert_gate.weight @ x) * mlp.shared_expert(x)
            for expert, z in zip(chosen, gates, strict=True):
                gate, up = (mlp.experts.gate_up_proj[expert] @ x).split(16)
                expert_output = mlp.experts.down_proj[expert] @ (F.silu(gate) * up)
                sums["assignments"][expert] += 1
                sums["gate_sums"][expert] += z
                sums["gated_norm_sums"][expert] += z * expert_output.norm()
                sums["output_sums"][expert] += expert_output
                output = output + z * expert_output
            outputs.append(output)
        self.sums |= {f"experts/{name}/{key}": value for key, value in sums.items()}
        return torch.stack(outputs)


def test_every_sum_equals_the_referees(files: tuple[Path, Path]) -> None:
    model, rows = load(files[0]), tiny_tokens(rows=3, columns=17)
    statistics = observed(files[0], [rows], model)
    expected = Statistics(statistics.checkpoint, "test", {"main": 48, "mtp": 48}, Referee(model).walk(rows))
    assert_same_sums(statistics, expected, relative=1e-5)
    for block in [f"model.layers.{layer}" for layer in range(4)] + ["mtp.layers.0"]:
        assert statistics.sums[f"experts/{block}/assignments"].sum() == 48 * 2
        assert statistics.sums[f"experts/{block}/gate_sums"].sum().item() == pytest.approx(48, rel=1e-6)


# --- how they add up --------------------------------------------------------------------------------------------------


def test_watching_does_not_change_the_forward_pass(files: tuple[Path, Path]) -> None:
    source, model, rows = Checkpoint(files[0]), load(files[0]), tiny_tokens(rows=3, columns=17)
    with torch.inference_mode():
        usual = model(rows)
        with observe(model, source.family, source.config, Statistics("", "", {}, {})):
            watched = model(rows)
        after = model(rows)
    torch.testing.assert_close(watched.main, usual.main, rtol=0, atol=2e-6)
    torch.testing.assert_close(watched.mtp, usual.mtp, rtol=0, atol=2e-6)
    assert torch.equal(after.main, usual.main)  # and nothing is left behind
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(hasattr(module, "slimqwen_observer") for module in model.modules())


def test_halves_add_up(files: tuple[Path, Path]) -> None:
    model, rows = load(files[0]), tiny_tokens(rows=6, columns=17)
    first, second = observed(files[0], [rows[:2]], model), observed(files[0], [rows[2:]], model)
    assert_same_sums(first + second, observed(files[0], [rows], model), relative=1e-6)
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
    recipe = CalibrationRecipe(samples=5, batch_size=batch_size)
    found = calibrate(
        checkpoint,
        tmp_path / "s.safetensors",
        tokens=tokens,
        recipe=recipe,
        sequence_length=SEQUENCE_LENGTH,
        device="cpu",
        seed=3,
    )
    stream = TokenStream(PackedTokens(tokens / "train"), SEQUENCE_LENGTH, seed=3)
    assert_same_sums(found, observed(checkpoint, [stream.batch(0, 5)]), relative=1e-6)
    assert found.tokens == {"main": 80, "mtp": 80}


def test_saved_is_what_is_loaded(files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    recipe = CalibrationRecipe(samples=2)
    made = calibrate(files[0], path, tokens=files[1], recipe=recipe, sequence_length=SEQUENCE_LENGTH, device="cpu")
    loaded = Statistics.load(path)
    assert (loaded.checkpoint, loaded.data, loaded.tokens) == (made.checkpoint, made.data, made.tokens)
    assert_same_sums(loaded, made, relative=0.0)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    again = calibrate(
        files[0],
        tmp_path / "again",
        tokens=files[1],
        recipe=recipe,
        sequence_length=SEQUENCE_LENGTH,
        device="cpu",
        seed=1,
    )
    assert again.data != made.data and again.checkpoint == made.checkpoint


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_checkpoint_without_mtp_is_measured_without(tmp_path: Path, layout: str) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", layout=layout, num_nextn_predict_layers=0)  # type: ignore[arg-type]
    statistics = observed(checkpoint, [tiny_tokens()])
    assert statistics.tokens["mtp"] == 0 and not any("mtp." in name for name in statistics.sums)


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_statistics_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path, value: float) -> None:
    path = tmp_path / "statistics.safetensors"
    sums = {"experts/model.layers.1/gate_sums": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    statistics = Statistics("checkpoint", "data", {"main": 1, "mtp": 0}, sums)
    statistics.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    sums["experts/model.layers.1/gate_sums"][0] = value
    save_file(sums, path, metadata=metadata)
    with pytest.raises(UserError, match=r"not finite, in experts/model\.layers\.1/gate_sums"):
        Statistics.load(path)
    with pytest.raises(UserError, match=r"not finite, in experts/model\.layers\.1/gate_sums"):
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
            sequence_length=SEQUENCE_LENGTH,
            device="cpu",
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


def test_tokens_of_another_tokenizer_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = write_tiny_tokens(tmp_path, vocab_size=280)
    with pytest.raises(UserError, match="another tokenizer"):
        calibrate(
            files[0],
            tmp_path / "s",
            tokens=other,
            recipe=CalibrationRecipe(),
            sequence_length=SEQUENCE_LENGTH,
            device="cpu",
        )
    small = write_tiny_checkpoint(tmp_path / "small", vocab_size=270)
    with pytest.raises(UserError, match="270"):
        calibrate(
            small,
            tmp_path / "s",
            tokens=files[1],
            recipe=CalibrationRecipe(),
            sequence_length=SEQUENCE_LENGTH,
            device="cpu",
        )
