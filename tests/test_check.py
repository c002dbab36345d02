"""The loadability gate: what it refuses, what it warns of, and that it looks at the bytes."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import sharded, with_config, with_tensors
from test_cli import slimqwen as run_command
from tiny import write_tiny_checkpoint
from tiny_families import FAMILIES_NATIVE

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.serving import check
from slimqwen.serving.check import CheckResult, check_checkpoint, describe, tensor_hash


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint; read-only."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("check") / "original")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def sentence(folder: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        check_checkpoint(folder, **arguments)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and folder.name in message
    return message


def one_warning(folder: Path, word: str) -> str:
    (found,) = [warning for warning in check_checkpoint(folder).warnings if word in warning]
    return found


# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_good_checkpoint(tmp_path: Path, layout: Any) -> None:
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", layout=layout, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    result = check_checkpoint(folder)
    assert (result.files, result.tensors) == (1, len(tensors))
    assert result.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert result.dtypes == {"bfloat16": len(tensors) - 3, "float32": 3}  # A_log of the three DeltaNet layers
    assert result.layouts == {layout: 5} and result.has_mtp and result.model_type == "qwen3_next"
    assert len(result.sampled) == 16
    for name, digest in result.sampled.items():
        assert digest == hashlib.sha256(tensors[name].view(torch.uint8).numpy().tobytes()).hexdigest(), name


@pytest.mark.parametrize("family", FAMILIES_NATIVE)
def test_every_family(tmp_path: Path, family: str) -> None:
    result = check_checkpoint(write_tiny_checkpoint(tmp_path / "checkpoint", native=FAMILIES_NATIVE[family]))
    assert result.model_type == family and "num_attention_heads 4" in result.tensor_parallel[8]
    assert not any("linear_" in size for size in result.tensor_parallel[8]) or family.startswith(
        ("qwen3_next", "qwen3_5")
    )


def test_the_sample_is_spread_over_the_files_and_always_the_same(original: Path, tmp_path: Path) -> None:
    folder = sharded(original, tmp_path / "sharded", 40_000)
    checkpoint, result = Checkpoint(folder), check_checkpoint(folder)
    assert 8 < len(checkpoint.files) < 16
    assert {checkpoint.file_of(name) for name in result.sampled} == set(checkpoint.files)
    assert check_checkpoint(Path(shutil.copytree(folder, tmp_path / "copy"))).sampled == result.sampled


def test_large_tensors_are_not_sampled_and_chunks_are_no_boundary(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = check_checkpoint(original).sampled
    monkeypatch.setattr(check, "CHUNK_BYTES", 64)
    assert check_checkpoint(original).sampled == whole
    monkeypatch.setattr(check, "SAMPLED_BYTES", 1000)
    sampled = check_checkpoint(original).sampled
    assert len(sampled) >= 7 and sum(map(Checkpoint(original).nbytes, sampled)) <= 1000


def test_a_hash_is_that_of_the_bytes_as_written() -> None:
    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    expected = hashlib.sha256(tensor.T.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    assert tensor_hash(tensor.T) == expected != tensor_hash(tensor)


def test_what_was_written_is_recognised(folder: Path) -> None:
    name, other = "mtp.fc.weight", "model.embed_tokens.weight"
    tensors = load_file(folder / "model.safetensors")
    written = {name: tensor_hash(tensors[name]), other: tensor_hash(tensors[other])}
    assert check_checkpoint(folder, expected=written).sampled == written
    with_tensors(folder, lambda tensors: tensors[name][5].add_(1e-3))
    assert f"'{name}' is not what was written" in sentence(folder, expected=written)
    assert "lacks 'lm_tail.weight'" in sentence(folder, expected={"lm_tail.weight": written[other]})


def test_a_download_of_the_hub_is_a_folder_of_links(original: Path, tmp_path: Path) -> None:
    sharded(original, tmp_path / "blobs", 100_000)
    folder = tmp_path / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        blob = file.rename(file.with_name(hashlib.sha256(file.name.encode()).hexdigest()))
        (folder / file.name).symlink_to(Path("../../blobs") / blob.name)
    assert check_checkpoint(folder).sampled.keys() <= Checkpoint(original).specs.keys()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    with_tensors(folder, lambda tensors: [tensor.view(-1)[-1:].fill_(value) for tensor in tensors.values()])
    assert "holds NaN or infinity" in sentence(folder)


def test_weights_of_nobody(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "adapter.safetensors")
    assert "'adapter.safetensors'" in sentence(folder)


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_an_mtp_module_that_config_promises(folder: Path, key: str) -> None:
    with_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")])
    config = json.loads((folder / "config.json").read_text())
    del config["num_nextn_predict_layers"], config["num_mtp_layers"], config["mtp_layer_types"]
    (folder / "config.json").write_text(json.dumps(config | {key: 1}))
    assert f"has {key} 1, but the checkpoint's tensors are for 0" in sentence(folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert "num_nextn_predict_layers to 0" in one_warning(folder, "MTP")
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    assert not [warning for warning in check_checkpoint(folder).warnings if "MTP" in warning]


def test_mtp_keys_that_disagree(folder: Path) -> None:
    with_config(folder, num_mtp_layers=2)
    assert "has num_mtp_layers 2, but the checkpoint's tensors are for 1" in sentence(folder)


@pytest.mark.parametrize(
    "wrong",
    [{"rms_norm_eps": "small"}, {"hidden_act": None}, {"max_position_embeddings": 0.5}],
)
def test_a_config_that_transformers_does_not_take(folder: Path, wrong: dict[str, Any]) -> None:
    with_config(folder, **wrong)
    message = sentence(folder)
    assert "Transformers does not accept config.json" in message and next(iter(wrong)) in message


def test_more_experts_per_token_than_experts(folder: Path) -> None:
    with_config(folder, num_experts_per_tok=9)
    assert "num_experts_per_tok 9 is more than num_experts 8" in sentence(folder)


# --- what is warned of ------------------------------------------------------------------------------------------------


def test_ranks_that_do_not_divide(original: Path) -> None:
    result = check_checkpoint(original)
    assert result.tensor_parallel[1] == result.tensor_parallel[2] == []
    assert result.tensor_parallel[4] == ["linear_num_key_heads 2"]
    assert set(result.tensor_parallel[8]) == {
        "linear_num_key_heads 2",
        "linear_num_value_heads 4",
        "num_attention_heads 4",
        "shared_expert_intermediate_size 20",
    }
    assert "num_key_value_heads 2" in result.tensor_parallel[3]  # neither shared evenly nor replicated
    assert result.replicated_kv_heads == [4, 6, 8]
    assert [ranks for ranks, sizes in result.expert_parallel.items() if not sizes] == [1, 2, 4, 8]
    assert "tensor parallel 4 does not divide linear_num_key_heads 2." in result.warnings
    assert not [warning for warning in result.warnings if "parallel 2 " in warning or "expert parallel" in warning]


def test_an_odd_number_of_experts(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", num_experts=6)
    assert one_warning(folder, "expert parallel 4") == "expert parallel 4 does not divide num_experts 6."


def test_only_sizes_that_the_model_has_are_named(tmp_path: Path) -> None:
    def named(name: str, **overrides: Any) -> str:
        result = check_checkpoint(write_tiny_checkpoint(tmp_path / name, **overrides))
        return " ".join([*result.warnings, *(word for sizes in result.tensor_parallel.values() for word in sizes)])

    attention_only = named("attention", layer_types=["full_attention"] * 4)
    assert "linear_" not in attention_only and "intermediate_size 40" not in attention_only
    dense = named("dense", mlp_only_layers=[0])
    assert "linear_num_key_heads 2" in dense and " intermediate_size 40" in dense


def test_sizes_that_kernels_do_not_like(tmp_path: Path, original: Path) -> None:
    warning = one_warning(original, "multiple of 128")
    assert "hidden_size 32" in warning and "shared_expert_intermediate_size 20" in warning and "head_dim 8" in warning
    folder = write_tiny_checkpoint(
        tmp_path / "checkpoint",
        hidden_size=128,
        head_dim=128,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
        layer_types=["full_attention"],
        num_hidden_layers=1,
    )
    assert not [warning for warning in check_checkpoint(folder).warnings if "128" in warning]


def test_layers_that_do_not_alternate(tmp_path: Path) -> None:
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    assert "SGLang" in one_warning(write_tiny_checkpoint(tmp_path / "checkpoint", layer_types=kinds), "regularly")


def test_no_attention_at_all(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", layer_types=["linear_attention"] * 4)
    assert one_warning(folder, "no layer has full attention")


def test_a_total_that_is_none(original: Path, tmp_path: Path) -> None:
    folder = sharded(original, tmp_path / "sharded", 100_000)
    assert not [warning for warning in check_checkpoint(folder).warnings if "total_size" in warning]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 1
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "total_size" in one_warning(folder, "total_size")


def test_a_dtype_that_config_does_not_name(folder: Path) -> None:
    with_config(folder, dtype="bfloat16")
    assert "'bfloat16', but the weights are mostly float32" in one_warning(folder, "dtype")


def test_a_config_without_architectures(folder: Path) -> None:
    with_config(folder, architectures=None)
    assert one_warning(folder, "architectures")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(original: Path) -> None:
    plain, as_json = run_command("check", original), run_command("check", original, "--json")
    assert plain.returncode == as_json.returncode == 0 and not plain.stderr
    assert CheckResult.model_validate_json(as_json.stdout) == check_checkpoint(original)
    lines = plain.stdout.splitlines()
    assert lines[-1] == "loadable" and describe(check_checkpoint(original)) == "\n".join(lines)
    (parallel,) = [line for line in lines if line.startswith("tensor parallel")]
    assert parallel.split("  ")[-1] == "1, 2 divide; 3, 4, 5, 6, 7, 8 do not"


def test_the_command_names_where_kv_heads_are_replicated(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(
        tmp_path / "checkpoint", linear_num_key_heads=4, shared_expert_intermediate_size=24, num_key_value_heads=1
    )
    assert "1, 2, 4 divide (2, 4: KV heads replicated); 3, 5, 6, 7, 8 do not" in run_command("check", folder).stdout


def test_the_command_on_what_is_broken(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    result = run_command("check", folder)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
