"""Checkpoint folders: what is written is read back, and every broken one gets one sentence."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import FORWARD, error
from safetensors.torch import load_file, save_file
from tiny import fused, put_json, tiny_config, tiny_tensors, tiny_tokens, write_tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from slimqwen.checkpoint.config import read_config
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.shards import TensorInfo
from slimqwen.checkpoint.writer import CheckpointWriter, copy_companions
from slimqwen.core.errors import UserError
from slimqwen.model.model import load, save

pytestmark = pytest.mark.rounding

Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint; read-only."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "original")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def sharded(source: Path, out: Path, shard_bytes: int) -> Path:
    """The same checkpoint in shards."""
    out.mkdir()
    checkpoint = Checkpoint(source)
    tensors = [TensorInfo(name, checkpoint.dtype(name), spec.shape) for name, spec in checkpoint.specs.items()]
    with CheckpointWriter(out, tensors, shard_bytes) as writer:
        for tensor in writer.missing():
            writer.add(tensor.name, checkpoint.read(tensor.name))
        writer.finish(checkpoint.family.to_disk(checkpoint.config))
    return out


def with_tensors(folder: Path, change: Change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    put_json(folder / "config.json", config | changes)


def sentence(folder: Path) -> str:
    """The error that opening the folder raises: one line that names the folder and ends."""
    with pytest.raises(UserError) as error:
        Checkpoint(folder)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and folder.name in message
    return message


# --- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", seed=3, dtype=dtype)
    checkpoint = Checkpoint(folder)
    expected = tiny_tensors(tiny_config(), seed=3, dtype=dtype)
    assert checkpoint.specs.keys() == expected.keys()
    assert checkpoint.has_mtp and checkpoint.config == tiny_config(dtype=str(dtype).removeprefix("torch."))
    for name, tensor in expected.items():
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.dtype("model.layers.0.linear_attn.A_log") == torch.float32
    assert checkpoint.bytes() == (folder / "model.safetensors").stat().st_size


def test_where_a_tensor_lies_and_a_part_of_it(original: Path, tmp_path: Path) -> None:
    config, tensors = tiny_config(), load_file(original / "model.safetensors")
    folder = Path(shutil.copytree(original, tmp_path / "fused"))
    save_file(fused(tensors, config), folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint, name = Checkpoint(folder), "model.layers.1.mlp.experts.gate_up_proj"
    assert checkpoint.file_of(name) == folder / "model.safetensors"
    assert checkpoint.nbytes(name) == 8 * 32 * 32 * 4
    assert torch.equal(checkpoint.read_slice(name, 5)[:16], tensors["model.layers.1.mlp.experts.5.gate_proj.weight"])
    assert checkpoint.read(name).data_ptr() == checkpoint.read(name).data_ptr()  # a view of the file, not a copy


@pytest.mark.parametrize("shard_bytes", [1, 50_000])
def test_shards_hold_the_same_as_one_file(original: Path, tmp_path: Path, shard_bytes: int) -> None:
    folder = sharded(original, tmp_path / "sharded", shard_bytes)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {file: load_file(folder / file) for file in files}

    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*files, "config.json", "model.safetensors.index.json"]
    )
    assert index["weight_map"] == {name: file for file in files for name in stored[file]}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in stored.values() for t in tensors.values())
    for tensors in stored.values():  # a shard goes over the limit only where one tensor does
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes

    one, many = Checkpoint(original), Checkpoint(folder)
    assert list(one.specs) == list(many.specs)
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.specs)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = tiny_tokens()
    with torch.no_grad():
        expected, ours = (load(path).backbone(tokens, use_cache=False).logits for path in (original, folder))
        assert torch.equal(ours, expected)
        theirs = model.eval()(tokens, use_cache=False).logits  # from weights that lie as they do in the file
        assert error(theirs, expected) < FORWARD


def test_one_shard_is_a_file_without_an_index(original: Path, tmp_path: Path) -> None:
    folder = sharded(original, tmp_path / "single", 10**9)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
    assert (folder / "config.json").read_bytes() == (original / "config.json").read_bytes()


def test_layouts_may_mix(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    mtp = {name: tensor for name, tensor in stored.items() if name.startswith("mtp.")}
    main = {name: tensor for name, tensor in stored.items() if name not in mtp}
    with_tensors(folder, lambda tensors: (tensors.clear(), tensors.update(fused(main, tiny_config()) | mtp))[0])
    layouts = Checkpoint(folder).layouts
    assert layouts.pop("mtp.layers.0") == "per_expert"
    assert set(layouts.values()) == {"fused"} and len(layouts) == 4


@pytest.mark.parametrize("said", [None, 1, 0])
def test_a_checkpoint_without_mtp_loads_and_is_saved_without(folder: Path, tmp_path: Path, said: int | None) -> None:
    with_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")])
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_nextn_predict_layers", "num_mtp_layers", "mtp_layer_types"):
        del config[key]
    put_json(folder / "config.json", config if said is None else config | {"num_nextn_predict_layers": said})

    checkpoint = Checkpoint(folder)
    assert not checkpoint.has_mtp and checkpoint.config["num_nextn_predict_layers"] == 0
    model = load(folder)
    assert model.mtp is None
    with torch.no_grad():
        assert model(tiny_tokens()).mtp is None

    again = tmp_path / "again"
    again.mkdir()
    save(model, again, checkpoint, checkpoint.config)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not Checkpoint(again).has_mtp
    assert json.loads((again / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_the_config_of_a_checkpoint_that_lost_its_mtp_module_does_not_promise_one(folder: Path) -> None:
    with_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")])
    checkpoint = Checkpoint(folder)  # its config.json still says num_mtp_layers 1
    written = checkpoint.family.to_disk(checkpoint.config)
    assert written["num_nextn_predict_layers"] == 0
    assert "num_mtp_layers" not in written and "mtp_layer_types" not in written


def test_a_config_can_be_read_without_weights(original: Path, tmp_path: Path) -> None:
    shutil.copy(original / "config.json", tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == read_config(original) == read_config(tmp_path)


def test_the_fingerprint_is_that_of_the_contents(original: Path, folder: Path) -> None:
    assert Checkpoint(folder).fingerprint() == Checkpoint(original).fingerprint()
    with_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1.0))
    assert Checkpoint(folder).fingerprint() != Checkpoint(original).fingerprint()


def test_companions_come_along_and_code_does_not(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    wanted = "tokenizer.json tokenizer_config.json generation_config.json vocab.json merges.txt chat_template.jinja"
    wanted = [*wanted.split(), "LICENSE", "LICENSE.md", "tokenizer.model"]
    unwanted = "modeling_qwen.py pytorch_model.bin training_args.pt README.md config.json .hidden.json"
    unwanted = [*unwanted.split(), "model.safetensors", "model.safetensors.index.json"]
    for name in wanted + unwanted:
        (source / name).write_text(name)
    (source / "folder.json").mkdir()
    copy_companions(source, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(wanted)
    assert (out / "LICENSE").read_text() == "LICENSE"


# --- broken folders ---------------------------------------------------------------------------------------------------


def test_not_a_folder(tmp_path: Path) -> None:
    assert "does not exist" in sentence(tmp_path / "nowhere")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in sentence(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a mapping"),
        ("\xff", "read"),
        ('{"a": NaN}', "not finite, 'NaN'"),
        ('{"a": -Infinity}', "not finite, '-Infinity'"),
        ('{"a": 1e999}', "not finite, '1e999'"),
        ('{"a": 1, "a": 2}', "it has 'a' twice"),
        ("[" * 10**6, "nested too deep"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested more than 32 deep"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_config_that_is_none(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert message in sentence(folder)


def test_another_family(folder: Path) -> None:
    with_config(folder, model_type="llama")
    assert "'llama' is not supported" in sentence(folder)


@pytest.mark.parametrize("section", ["quantization_config", "compression_config", "text_config"])
def test_a_quantised_checkpoint(folder: Path, section: str) -> None:
    fp8 = {"quant_method": "fp8"}
    with_config(folder, **{section: {"quantization_config": fp8} if section == "text_config" else fp8})
    assert "use the original, unquantised checkpoint" in sentence(folder)


QUANTISED = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantised_weights(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.linear_attn.out_proj.weight"
    with_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    message = sentence(folder)
    assert name in message and QUANTISED[dtype] in message and "use the original, unquantised checkpoint" in message


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "qweight", "qzeros", "scales"])
def test_what_lies_beside_quantised_weights(folder: Path, suffix: str) -> None:
    name = f"model.layers.0.linear_attn.out_proj.{suffix}"
    with_tensors(folder, lambda tensors: tensors.update({name: torch.ones(2)}))
    assert f"quantised ('{name}'" in sentence(folder)


def test_pickled_weights_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors only" in sentence(folder)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:5], id="within the length"),
        pytest.param(lambda data: data[:500], id="within the header"),
        pytest.param(lambda data: data[:-100], id="within the last tensor"),
        pytest.param(lambda data: b"\xff" * 8 + data[8:], id="length"),
        pytest.param(lambda data: data[:8] + b"[" * 20 + data[28:], id="header"),
        pytest.param(lambda data: data + b"more", id="longer"),
    ],
)
def test_a_corrupt_or_truncated_file(folder: Path, broken: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(broken(file.read_bytes()))
    assert "model.safetensors is not a readable safetensors file" in sentence(folder)


def test_a_missing_shard(original: Path, tmp_path: Path) -> None:
    folder = sharded(original, tmp_path / "sharded", 100_000)
    next(folder.glob("model-00002-*")).unlink()
    assert "lacks model-00002-of-" in sentence(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", "..", ""])
def test_an_index_that_leads_out_of_the_folder(original: Path, tmp_path: Path, file: str) -> None:
    folder = sharded(original, tmp_path / "sharded", 100_000)
    shutil.copy(original / "model.safetensors", tmp_path / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = file
    put_json(folder / "model.safetensors.index.json", index)
    assert f"names '{file}'" in sentence(folder)


def test_an_index_that_names_an_absent_tensor(original: Path, tmp_path: Path) -> None:
    folder = sharded(original, tmp_path / "sharded", 100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.norm.weight"] = next(iter(index["weight_map"].values()))
    put_json(folder / "model.safetensors.index.json", index)
    assert "places 'model.layers.9.norm.weight'" in sentence(folder)


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": []}, {"weight_map": {"model.norm.weight": 1}}, {"weight_map": {"a": ["b"]}}]
)
def test_an_index_that_is_none(folder: Path, index: Any) -> None:
    put_json(folder / "model.safetensors.index.json", index)
    assert "has no weight_map" in sentence(folder)


def test_an_index_beside_a_single_file(folder: Path) -> None:
    names = Checkpoint(folder).specs
    put_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "model.safetensors")})
    assert Checkpoint(folder).specs.keys() == names.keys()
    file = shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    put_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, Path(file).name)})
    assert "remove the one that is stale" in sentence(folder)


def test_a_tensor_in_two_files(original: Path, tmp_path: Path) -> None:
    folder = sharded(original, tmp_path / "sharded", 100_000)
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(one).items()))
    save_file(load_file(other) | {name: tensor.clone()}, other)
    message = sentence(folder)
    assert f"'{name}' twice" in message and one.name in message and other.name in message


def test_a_tensor_that_the_index_places_elsewhere_or_nowhere(original: Path, tmp_path: Path) -> None:
    folder = sharded(original, tmp_path / "sharded", 100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    places, name = index["weight_map"], "model.norm.weight"
    there = places[name]
    places[name] = next(file for file in places.values() if file != there)
    put_json(folder / "model.safetensors.index.json", index)
    assert f"places '{name}' in {places[name]}, which does not hold it" in sentence(folder)
    del places[name]
    put_json(folder / "model.safetensors.index.json", index)
    assert f"{there} holds '{name}', which the index does not name" in sentence(folder)


def test_a_shard_that_is_no_regular_file(original: Path, tmp_path: Path) -> None:
    folder = sharded(original, tmp_path / "sharded", 100_000)
    shard = next(folder.glob("model-00002-*"))
    shard.unlink()
    os.mkfifo(shard)  # reading it would wait for ever
    assert f"lacks {shard.name}" in sentence(folder)


def test_links_may_lead_anywhere_and_names_may_not(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    for file in original.iterdir():  # as in the cache of the Hugging Face hub
        (folder / file.name).symlink_to(Path("..") / os.path.relpath(file, tmp_path))
    assert torch.equal(Checkpoint(folder).read("mtp.fc.weight"), Checkpoint(original).read("mtp.fc.weight"))


def with_header(folder: Path, header: Any) -> None:
    """Another header (a mapping, or text) before the same data."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :])


def header_of(folder: Path) -> dict[str, Any]:
    data = (folder / "model.safetensors").read_bytes()
    return dict(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"shape": [-32, -64]}, "describes 'mtp.fc.weight'", id="negative"),
        pytest.param({"shape": [2**70, 64]}, "describes 'mtp.fc.weight'", id="huge"),
        pytest.param({"shape": [32.0, 64]}, "describes 'mtp.fc.weight'", id="float"),
        pytest.param({"shape": [True, 2048]}, "describes 'mtp.fc.weight'", id="bool"),
        pytest.param({"shape": [1] * 10**6 + [2048]}, "describes 'mtp.fc.weight'", id="a million dims"),
        pytest.param({"shape": "32, 64"}, "describes 'mtp.fc.weight'", id="text"),
        pytest.param({"shape": [32, 32]}, "describes 'mtp.fc.weight'", id="shorter than its bytes"),
        pytest.param({"dtype": "F17"}, "describes 'mtp.fc.weight'", id="dtype"),
        pytest.param({"dtype": ["F32"]}, "describes 'mtp.fc.weight'", id="list of dtypes"),
        pytest.param({"data_offsets": [0]}, "describes 'mtp.fc.weight'", id="one offset"),
        pytest.param({"data_offsets": [-8192, 0]}, "describes 'mtp.fc.weight'", id="before the data"),
        pytest.param({"data_offsets": [2**62, 2**62 + 8192]}, "does not follow the one before it", id="after the data"),
        pytest.param({"data_offsets": [4, 8196]}, "overlaps the one before it", id="overlap"),
    ],
)
def test_a_header_that_lies(folder: Path, change: dict[str, Any], reason: str) -> None:
    header = header_of(folder)
    header["mtp.fc.weight"] |= change
    with_header(folder, header)
    message = sentence(folder)
    assert reason in message and len(message) < 800


@pytest.mark.parametrize("header", [b"[]", b"1", b'{"a": 1}', b'{"a": NaN}', b"[" * 10**6, b"\xff\xff", b"{}"])
def test_a_header_that_is_none(folder: Path, header: bytes) -> None:
    with_header(folder, header)
    assert "is not a readable safetensors file" in sentence(folder)


def test_a_name_twice_in_one_header(folder: Path) -> None:
    header = header_of(folder)
    text = json.dumps(header)[:-1] + f', "mtp.fc.weight": {json.dumps(header["mtp.fc.weight"])}}}'
    with_header(folder, text.encode())
    assert "it has 'mtp.fc.weight' twice" in sentence(folder)


def test_names_of_any_kind_stay_on_one_line(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors.update({"a\nb": torch.zeros(1), "c" * 10**6: torch.zeros(1)}))
    assert "a\\nb" in sentence(folder) and len(sentence(folder)) < 800


def test_a_wrong_shape(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors.update({"mtp.fc.weight": tensors["mtp.fc.weight"].T.contiguous()}))
    message = sentence(folder)
    assert "'mtp.fc.weight' has shape (64, 32), config.json implies (32, 64)" in message


def test_a_missing_tensor(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors.pop("model.layers.2.mlp.experts.7.up_proj.weight"))
    assert "lacks 1 tensor (model.layers.2.mlp.experts.7.up_proj.weight)" in sentence(folder)


def test_a_missing_tensor_of_the_mtp_module(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors.pop("mtp.norm.weight"))
    assert "lacks 1 tensor (mtp.norm.weight)" in sentence(folder)


def test_an_unknown_tensor(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(1)}))
    assert "model.layers.0.self_attn.q_proj.bias" in sentence(folder)


def test_a_config_with_another_number_of_layers(folder: Path) -> None:
    with_config(folder, num_hidden_layers=5, layer_types=[*tiny_config()["layer_types"], "linear_attention"])
    assert "model.layers.4." in sentence(folder)


@pytest.mark.parametrize("wrong", [None, "32", 32.0, True, [32], {}, -1, 0, 10**30])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_experts", "num_experts_per_tok", "head_dim"])
def test_a_config_of_the_wrong_type(folder: Path, key: str, wrong: Any) -> None:
    with_config(folder, **{key: wrong})
    assert key in sentence(folder)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**9, "layer_types": None}, {"num_experts": 2**31 - 1}])
def test_a_config_of_billions_is_not_built(folder: Path, changes: dict[str, Any]) -> None:
    with_config(folder, **changes)
    message = sentence(folder)
    assert "lacks at least" in message or "num_hidden_layers" in message
