"""Checkpoints as people have them: what every loader reads is read, and what nobody can read is told in one sentence."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import FORWARD, error
from safetensors.torch import load_file
from test_checkpoint import sharded, with_config, with_tensors
from test_fuzz import keep_everything
from test_pipeline import tiny_recipe
from tiny import QWEN3_NEXT, tiny_tokens, write_tiny_checkpoint, write_tiny_tokens
from tiny_families import FAMILIES_NATIVE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from slimqwen.artifacts.warning_file import kept_in
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint import reader, writer
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.shards import TensorInfo
from slimqwen.checkpoint.writer import CheckpointWriter, copy_companions
from slimqwen.core.errors import UserError
from slimqwen.families import FAMILIES, family_of
from slimqwen.model.model import load, save
from slimqwen.model.native import native_config
from slimqwen.pruning.prune import prune
from slimqwen.recipe import DistilRecipe, Execution, TextSettings
from slimqwen.runs.recipe_run import run
from slimqwen.serving import check
from slimqwen.serving.check import check_checkpoint, describe
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs

TOKENS = tiny_tokens(rows=2, columns=13)
Tensors = dict[str, Tensor]


def sentence(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        work()
    message = str(refused.value)
    assert "\n" not in message and message.endswith(".")
    return message


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = load(folder)
    return model(TOKENS).main @ model.head.T


@torch.no_grad()
def transformers_logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(TOKENS[:, :-1], use_cache=False).logits


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.3 and error(found, expected) <= FORWARD


# --- what config.json says of other things than the model -------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "no_such_thing"},
        {"_experts_implementation": "no_such_thing"},
        {"quantization_config": {}},
        {"quantization_config": None},
        {"compression_config": {}},
        {"return_dict": False, "output_hidden_states": True},
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}},
    ],
)
def test_words_that_are_no_property_of_the_model(tmp_path: Path, words: dict[str, Any]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    expected = logits(folder)
    with_config(folder, **words)
    told: list[str] = []
    checkpoint = Checkpoint(folder, on_note=told.append)
    assert torch.equal(logits(folder), expected)
    assert not words.keys() & checkpoint.family.to_disk(checkpoint.config).keys()
    said = [word for word, value in words.items() if value]
    assert all(word in told[0] for word in said) and bool(told) == bool(said)
    assert [f"note: {warning}" for warning in check_checkpoint(folder).warnings[: len(told)]] == told


@pytest.mark.parametrize(
    "words",
    [
        {"max_position_embeddings": None},
        {"tie_word_embeddings": None},
        {"rms_norm_eps": "small"},
        {"hidden_act": "swash"},
        {"quantization_config": []},
        {"dtype": ["float32"]},
        {"torch_dtype": {}},
        {"dtype": "float33"},
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 10000.0}},
        {"rope_scaling": {"rope_type": "yarn", "rope_theta": 10000.0}},
        {"rope_scaling": ["yarn"]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.5}},
        {"attention_dropout": "much"},
    ],
)
def test_check_and_load_refuse_the_same_in_one_sentence(tmp_path: Path, words: dict[str, Any]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    with_config(folder, **words)
    assert "tiny" in sentence(lambda: check_checkpoint(folder))
    assert "tiny" in sentence(lambda: load(folder))


def test_a_generation_config_that_cannot_be_read_costs_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load(folder).backbone.generation_config.eos_token_id == 7
    (folder / "generation_config.json").write_text("{")
    assert load(folder).backbone.generation_config.eos_token_id == 0
    assert "generation_config.json cannot be read" in capsys.readouterr().err


def test_the_check_of_a_config_leaves_it_alone() -> None:
    config: dict[str, Any] = QWEN3_NEXT | {
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "max_position_embeddings": 512,
    }
    before = json.dumps(config)
    native_config(config, "here")
    assert json.dumps(config) == before


# --- tensors beside the table's ---------------------------------------------------------------------------------------


def with_tied_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def with_another_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = 0.2 * tensors["model.embed_tokens.weight"].flip(0)


def with_buffers(tensors: Tensors) -> None:
    tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.layers.3.self_attn.masked_bias"] = torch.ones(())
    tensors["model.layers.3.attn.bias"] = torch.ones(2, 2, dtype=torch.uint8)


def with_counters(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.tokens_seen"] = torch.arange(3)
    tensors["num_updates"] = torch.tensor(3, dtype=torch.int32)


def with_vision(tensors: Tensors) -> None:
    tensors["model.visual.blocks.0.norm1.weight"] = torch.ones(3)


def below(root: str) -> Callable[[Tensors], None]:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                tensors[root + name.removeprefix("model.")] = tensors.pop(name)

    return rename


def nothing(tensors: Tensors) -> None:
    pass


TIED = {"tie_word_embeddings": True}
NEXT, TEXT, MOE, GLM = "qwen3_next", "qwen3_5_moe_text", "qwen3_moe", "glm4_moe"


@pytest.mark.rounding
@pytest.mark.parametrize(
    ("family", "words", "change", "note"),
    [
        pytest.param(NEXT, TIED, with_tied_head, "a copy of the embedding", id="tied head stored"),
        pytest.param(MOE, TIED, with_another_head, "it is read untied, as by Transformers", id="another head stored"),
        pytest.param(NEXT, {}, with_buffers, "left out buffers", id="buffers"),
        pytest.param(NEXT, {}, with_counters, "left out whole numbers", id="counters"),
        pytest.param(TEXT, {}, with_vision, "left out a vision tower", id="vision of a text model"),
        pytest.param(TEXT, {}, below("model.language_model."), None, id="below language_model"),
        pytest.param(MOE, TIED, below(""), None, id="saved without a head"),
    ],
)
def test_what_transformers_reads_is_read(
    tmp_path: Path, family: str, words: dict[str, Any], change: Callable[[Tensors], None], note: str | None
) -> None:
    native = FAMILIES_NATIVE[family] | words
    folder = write_tiny_checkpoint(tmp_path / "tiny", native=native)
    with_tensors(folder, change)
    told: list[str] = []
    source = Checkpoint(folder, on_note=told.append)
    assert (note is None and not told) or (note is not None and len(told) == 1 and note in told[0])
    assert_same_logits(logits(folder), transformers_logits(folder))

    out = prune(folder, tmp_path / "pruned", plan=keep_everything(source))
    written = Checkpoint(out)
    assert not written.notes and written.specs.keys() == source.specs.keys()
    assert load_file(out / "model.safetensors").keys() == source.specs.keys()
    assert_same_logits(logits(out), logits(folder))
    saved = tmp_path / "saved"
    saved.mkdir()
    save(load(folder), saved, source, source.config)
    assert (
        load_file(saved / "model.safetensors").keys() == source.specs.keys()
        and not check_checkpoint(saved).warnings[:0]
    )


@pytest.mark.rounding
@pytest.mark.parametrize("family", [NEXT, TEXT, GLM])
def test_an_mtp_module_that_the_config_denies_is_left_out(tmp_path: Path, family: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", native=FAMILIES_NATIVE[family])
    key = "mtp_num_hidden_layers" if family == TEXT else "num_nextn_predict_layers"
    for absent in ("num_nextn_predict_layers", "num_mtp_layers", "mtp_layer_types"):
        config = json.loads((folder / "config.json").read_text())
        config.pop(absent, None)
        (folder / "config.json").write_text(json.dumps(config))
    with_config(folder, **{key: 0})
    told: list[str] = []
    source = Checkpoint(folder, on_note=told.append)
    assert len(told) == 1 and "left out an MTP module" in told[0] and not source.has_mtp
    assert_same_logits(logits(folder), transformers_logits(folder))
    out = prune(folder, tmp_path / "pruned", plan=keep_everything(source))
    assert not Checkpoint(out).notes and not Checkpoint(out).has_mtp


def test_a_layer_too_many_is_no_mtp_module(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", native=FAMILIES_NATIVE[GLM] | {"num_nextn_predict_layers": 0})
    with_config(folder, num_hidden_layers=2)
    assert "does not account for (model.layers.2." in sentence(lambda: Checkpoint(folder))


def wrapper(folder: Path, change: Callable[[Tensors], None], **of_text: Any) -> Path:
    native = FAMILIES_NATIVE["qwen3_5_moe"]
    write_tiny_checkpoint(folder, native=native | {"text_config": native["text_config"] | of_text})
    with_tensors(folder, change)
    return folder


def without_vision(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.visual.")]:
        del tensors[name]


@pytest.mark.rounding
def test_a_wrapper_without_its_vision_tower_is_the_language_model(tmp_path: Path) -> None:
    folder = wrapper(tmp_path / "tiny", without_vision)
    told: list[str] = []
    source = Checkpoint(folder, on_note=told.append)
    assert source.family.model_type == TEXT and len(told) == 1 and "no vision tower" in told[0]
    assert_same_logits(logits(folder), transformers_logits(folder))
    out = prune(folder, tmp_path / "pruned", plan=keep_everything(source))
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert_same_logits(logits(out), transformers_logits(out))
    assert not Checkpoint(out).notes


@pytest.mark.rounding
def test_a_wrapper_that_describes_no_vision_tower(tmp_path: Path) -> None:
    folder = wrapper(tmp_path / "tiny", without_vision)
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(folder).family.model_type == TEXT
    assert_same_logits(logits(folder), transformers_logits(folder))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_what_a_program_put_before_every_name(tmp_path: Path, prefix: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    expected = logits(folder)
    with_tensors(folder, lambda tensors: [tensors.update({prefix + name: tensors.pop(name)}) for name in list(tensors)])
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize(("root", "tower"), [("model.", "model.visual."), ("language_model.model.", "visual.")])
def test_a_wrapper_in_other_words(tmp_path: Path, root: str, tower: str) -> None:
    folder = wrapper(tmp_path / "tiny", nothing)
    expected, names = logits(folder), Checkpoint(folder).specs.keys()

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            ours = name.replace("model.language_model.", root).replace("model.visual.", tower)
            tensors["language_model." + name if name == "lm_head.weight" and tower == "visual." else ours] = (
                tensors.pop(name)
            )

    with_tensors(folder, rename)
    assert torch.equal(logits(folder), expected) and Checkpoint(folder).specs.keys() == names


def test_part_of_a_vision_tower_is_none(tmp_path: Path) -> None:
    folder = wrapper(tmp_path / "tiny", lambda tensors: tensors.pop("model.visual.pos_embed.weight"))
    assert "lacks 1 tensor (model.visual.pos_embed.weight)" in sentence(lambda: Checkpoint(folder))


@pytest.mark.rounding
@pytest.mark.parametrize("outer", [None, False, True])
def test_tied_within_the_wrapper_only(tmp_path: Path, outer: bool | None) -> None:
    """Transformers' text model goes by text_config; where a head is stored, it counts."""
    folder = wrapper(tmp_path / "tiny", lambda tensors: tensors.pop("lm_head.weight"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    config |= {} if outer is None else {"tie_word_embeddings": outer}
    if outer is None:
        del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    source = Checkpoint(folder)
    assert source.config["tie_word_embeddings"] and "lm_head.weight" not in source.specs
    assert_same_logits(logits(folder), transformers_logits(folder))
    written = source.family.to_disk(source.config)
    assert written["tie_word_embeddings"] is True and written["text_config"]["tie_word_embeddings"] is True
    assert "text_is_tied" not in json.dumps(written)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(4)}), "does not account for"),
        (lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight": torch.ones(8, 32, dtype=torch.int64)}), "quantised"),
        (lambda tensors: tensors.update({"model.norm.weight_packed": torch.ones(1, dtype=torch.int32)}), "quantised"),
        (lambda tensors: tensors.update({"model.norm.bytes": torch.ones(1, dtype=torch.uint8)}), "quantised"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(2, 2)}), "has shape"),
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks 1 tensor"),
    ],
)  # fmt: skip
def test_what_is_wrong_stays_wrong(tmp_path: Path, change: Callable[[Tensors], None], words: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", tie_word_embeddings=True)
    with_tensors(folder, change)
    assert words in sentence(lambda: Checkpoint(folder))


def test_a_note_is_said_once_and_kept_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    with_tensors(folder, with_counters)
    for step in ("one", "two"):
        with kept_in(tmp_path / "warnings.jsonl", step=step, key="k"):
            Checkpoint(folder)
    assert capsys.readouterr().err.count("left out whole numbers") == 1
    assert (tmp_path / "warnings.jsonl").read_text().count("left out whole numbers") == 2


# --- what is written --------------------------------------------------------------------------------------------------

YARN = {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_moe", "olmoe", "mixtral", "glm4_moe"])
@pytest.mark.parametrize("form", ["new", "old", "older"])
def test_a_stretched_rope_is_written_in_old_and_new_words(family: str, form: str) -> None:
    native = dict(FAMILIES_NATIVE[family])
    own = {key: value for key, value in native.pop("rope_parameters").items() if key != "rope_type"} | {
        "rope_theta": 5e5
    }
    if form == "new":
        native["rope_parameters"] = own | YARN | {"rope_type": "yarn"}
    else:
        native |= own | {"rope_scaling": YARN | {"rope_type" if form == "old" else "type": "yarn"}}
    config = FAMILIES[family].normalise(native)
    written = FAMILIES[family].to_disk(config)
    assert written["rope_scaling"] == YARN | {"rope_type": "yarn", "type": "yarn"}
    assert written["rope_theta"] == 5e5
    assert written["rope_parameters"] == own | YARN | {"rope_type": "yarn"}
    expected, found = AutoConfig.for_model(**json.loads(json.dumps(native))), native_config(written, "here")
    assert without_type(found.rope_parameters) == without_type(expected.rope_parameters)
    assert FAMILIES[family].to_disk(FAMILIES[family].normalise(written)) == written


def without_type(rope: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key != "type"}


@pytest.mark.rounding
def test_a_stretched_rope_computes_the_same_before_and_after(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(
        tmp_path / "tiny", rope_parameters=QWEN3_NEXT["rope_parameters"] | YARN | {"rope_type": "yarn"}
    )
    plain = write_tiny_checkpoint(tmp_path / "plain")
    out = prune(folder, tmp_path / "pruned", plan=keep_everything(Checkpoint(folder)))
    assert_same_logits(logits(out), transformers_logits(folder))
    assert (logits(out) - logits(plain)).abs().max() > 1e-2


def test_the_dtype_is_the_same_in_both_words(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    with_config(folder, torch_dtype="bfloat16")
    source = Checkpoint(folder)
    out = tmp_path / "out"
    out.mkdir()
    save(load(folder), out, source, source.config)
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "float32"


def test_companions_are_chosen_by_name(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    out.mkdir()
    wanted = [
        "chat_template.json",
        "NOTICE",
        "NOTICE.txt",
        "LICENSE-MODEL.md",
        "preprocessor_config.json",
        "vocab.json",
    ]
    unwanted = [
        "trainer_state.json",
        "training_args.json",
        "all_results.json",
        "optimizer.model.bin",
        "requirements.txt",
    ]
    unwanted += ["scheduler.json", "latest", "tokenization_x.py", "notes.txt", "adapter_config.json"]
    for name in wanted + unwanted:
        (source / name).write_text(name)
    for name in ("rag.jinja", "tool.jinja", "code.py"):
        (source / "additional_chat_templates" / name).write_text(name)
    tokenizer = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "name": "é"}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    copy_companions(source, out)
    assert {path.name for path in out.iterdir()} == {*wanted, "tokenizer_config.json", "additional_chat_templates"}
    assert {path.name for path in (out / "additional_chat_templates").iterdir()} == {"rag.jinja", "tool.jinja"}
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"tokenizer_class": "X", "name": "é"}


# --- folders that are something else ----------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4998000000\n"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer(tmp_path: Path, file: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    (folder / file).write_bytes(POINTER)
    message = sentence(lambda: Checkpoint(folder))
    assert f"{file} is a git-lfs pointer" in message and "git lfs pull" in message


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
        (["model_index.json"], "diffusers"),
        (["model-Q4_K_M.gguf"], "gguf_file='model-Q4_K_M.gguf'"),
        (["config.json", "pytorch_model.bin"], "a pickle that could run code"),
        (["config.json", "consolidated.00.pth"], "a pickle that could run code"),
        (["config.json", "tf_model.h5"], "another framework"),
        (["config.json", "weights.safetensors"], "weights.safetensors"),
        (["model.safetensors"], "put the model's config.json beside them"),
        (["checkpoint-500/config.json"], "checkpoint-500"),
        (["README.md"], "no config.json"),
    ],
)
def test_what_a_folder_is_instead(tmp_path: Path, files: list[str], words: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    if "config.json" in files:
        write_tiny_checkpoint(tmp_path / "x")
        shutil.copy(tmp_path / "x" / "config.json", tmp_path / "config.json")
    assert words in sentence(lambda: Checkpoint(tmp_path))
    assert words in sentence(lambda: check_checkpoint(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_link_to_nothing(tmp_path: Path, file: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    (folder / file).unlink()
    (folder / file).symlink_to("../../blobs/gone")
    assert f"its '{file}' is a link to nothing" in sentence(lambda: Checkpoint(folder))


def test_a_gguf_file(tmp_path: Path) -> None:
    assert "GGUF" in sentence(lambda: checkpoint_folder(str(tmp_path / "x.gguf")))


def test_shards_without_an_index(tmp_path: Path) -> None:
    single = write_tiny_checkpoint(tmp_path / "single")
    folder = sharded(single, tmp_path / "tiny", 100_000)
    (folder / "model.safetensors.index.json").unlink()
    told: list[str] = []
    checkpoint = Checkpoint(folder, on_note=told.append)
    assert len(told) == 1 and "has no model.safetensors.index.json" in told[0]
    assert torch.equal(checkpoint.read("model.norm.weight"), Checkpoint(single).read("model.norm.weight"))
    assert len(checkpoint.files) > 2
    next(folder.glob("model-00002-of*")).unlink()
    total = len(checkpoint.files)
    assert f"{total - 1} shards of {total}" in sentence(lambda: Checkpoint(folder))


def test_the_root_of_the_hubs_cache(tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    one = write_tiny_checkpoint(root / "snapshots" / "aaa")
    assert checkpoint_folder(str(root)) == one
    two = Path(shutil.copytree(one, root / "snapshots" / "bbb"))
    assert f"2 snapshots, and refs/main names none of them: give one, such as {one}" in sentence(
        lambda: checkpoint_folder(str(root))
    )
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("bbb\n")
    assert checkpoint_folder(str(root)) == two
    (root / "refs" / "main").write_text("../../../elsewhere")
    assert "2 snapshots" in sentence(lambda: checkpoint_folder(str(root)))
    assert "models--org--name" in sentence(lambda: Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen3_mo"}, "did you mean 'qwen3_moe'"),
        ({"model_type": "qwen2_moe"}, "another architecture, nearest to qwen3_moe"),
        ({"model_type": "llama"}, "(it is another architecture)"),
        ({"architectures": ["MixtralForCausalLM"]}, "did you mean 'mixtral', the model_type of its MixtralForCausalLM"),
        (
            {"model_type": "my_model", "architectures": [["x"], "Glm4MoeForCausalLM"]},
            "did you mean 'glm4_moe', the model_type of its Glm4MoeForCausalLM",
        ),
    ],
)
def test_a_model_type_that_is_not_supported(config: dict[str, Any], words: str) -> None:
    message = sentence(lambda: family_of(config, "config.json"))
    assert words in message and ("did you mean" in words or "did you mean" not in message)


def test_the_architectures_are_those_of_the_families() -> None:
    assert {native["architectures"][0]: family for family, native in FAMILIES_NATIVE.items()} == {
        family.architecture: model_type for model_type, family in FAMILIES.items()
    }


# --- what check reads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_number_that_is_not_finite_is_found_anywhere(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    sampled = check_checkpoint(folder).sampled
    name = next(name for name in Checkpoint(folder).specs if name not in sampled)

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = torch.finfo(dtype).max
        tensors[name].view(-1)[-2] = torch.finfo(dtype).min

    with_tensors(folder, change)
    assert check_checkpoint(folder).read_tensors == len(Checkpoint(folder).specs)
    with_tensors(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    assert f"'{name}' holds NaN or infinity" in sentence(lambda: check_checkpoint(folder))
    quick = check_checkpoint(folder, quick=True)
    assert quick.read_tensors == len(quick.sampled) == 16
    assert f"16 of {quick.tensors} tensors" in describe(quick) and "were not read" in describe(quick)


def test_no_more_than_a_chunk_is_looked_at_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    seen: list[int] = []
    is_finite = check._is_finite
    monkeypatch.setattr(check, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(check, "_is_finite", lambda chunk: seen.append(chunk.nbytes) or is_finite(chunk))
    result = check_checkpoint(folder)
    assert max(seen) <= 1000 and sum(seen) == result.weight_bytes == result.read_bytes


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_not_usable(tmp_path: Path, file: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    assert not check_checkpoint(folder).has_tokenizer
    (folder / file).write_bytes(POINTER)
    assert "tokenizer" in sentence(lambda: check_checkpoint(folder))


def test_a_thousand_shards_do_not_take_a_thousand_handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sharded(write_tiny_checkpoint(tmp_path / "single"), tmp_path / "tiny", 1)
    files = len(list(folder.glob("*.safetensors")))
    assert files > 4 * reader.OPEN_FILES
    opened: list[int] = [0, 0]

    class Handle:
        def __init__(self, file: Path) -> None:
            self.tensors = load_file(file)
            opened[0] += 1
            opened[1] = max(opened)

        def __del__(self) -> None:
            opened[0] -= 1

        def get_tensor(self, name: str) -> Tensor:
            return self.tensors[name]

    monkeypatch.setattr(reader, "open_weights", Handle)
    assert check_checkpoint(folder).files == files
    assert opened[1] <= reader.OPEN_FILES + 1


def test_a_vocabulary_that_the_embedding_lacks(tmp_path: Path) -> None:
    tokenizer, _ = write_tiny_tokens(tmp_path)
    folder = write_tiny_checkpoint(tmp_path / "tiny", tokenizer=tokenizer)
    assert check_checkpoint(folder).has_tokenizer
    assert not [warning for warning in check_checkpoint(folder).warnings if "tokenizer" in warning]
    small = write_tiny_checkpoint(tmp_path / "small", tokenizer=tokenizer, vocab_size=200)
    assert [warning for warning in check_checkpoint(small).warnings if "the embedding only 200 rows" in warning]


# --- what is known before the work ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", MOE])
def test_training_has_no_noise_that_nothing_seeds(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, tokens = write_tiny_tokens(tmp_path)
    noise = {"attention_dropout": 0.5} | ({"router_jitter_noise": 0.4} if family == "mixtral" else {})
    outs = []
    for name, words in (("quiet", {}), ("noisy", noise), ("again", noise)):
        student = write_tiny_checkpoint(
            tmp_path / f"{name}-student", tokenizer=tokenizer, native=FAMILIES_NATIVE[family]
        )
        with_config(student, **words)
        recipe = DistilRecipe.model_validate(
            {"tokens": 3 * 32, "batch_size": 2, "learning_rate": 1e-3, "warmup": "1 steps", "terms": ["lm"]}
        )
        out = distil(
            TrainingInputs(student, tokens),
            tmp_path / name,
            recipe=recipe,
            text=TextSettings(sequence_length=16),
            execution=Execution(device="cpu"),
        )
        outs.append((out / "model.safetensors").read_bytes())
        written = json.loads((out / "config.json").read_text())
        assert all(written[word] == value for word, value in words.items())
        said = capsys.readouterr().err
        assert all((f"{word} {value}" in said) == bool(words) for word, value in noise.items())
    assert outs[0] == outs[1] == outs[2]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"hidden_size": 23}, "hidden size is a multiple of 4, and it is 23 after stage 1"),
        ({"moe_intermediate_size": 10}, "intermediate size is a multiple of 4, and it is 10 after stage 1"),
    ],
)
def test_experts_that_no_kernel_takes_are_told_before_any_work(
    tmp_path: Path, target: dict[str, int], words: str
) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "run", target=target, schedule="one_shot")
    assert words in sentence(lambda: run(recipe))
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_transformers_cannot_build_is_told_before_any_work(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "run")
    with_config(tmp_path / "teacher", hidden_act="swash")
    assert "swash" in sentence(lambda: run(recipe))
    assert not (tmp_path / "run").exists()


def test_a_thousand_shards_are_not_written_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is slower than the work: shards wait for it, and those that wait are open."""
    most = 0

    def slow(descriptor: int) -> None:
        nonlocal most
        most = max(most, len(list(tmp_path.glob("out/.*.partial"))))
        time.sleep(0.001)

    monkeypatch.setattr(os, "fsync", slow)
    out = tmp_path / "out"
    out.mkdir()
    planned = [TensorInfo(f"t{number}", torch.float32, (1,)) for number in range(200)]
    with CheckpointWriter(out, planned, shard_bytes=4) as files:
        for tensor in files.missing():
            files.add(tensor.name, torch.ones(1))
        files.finish({})
    assert len(list(out.glob("*.safetensors"))) == 200
    assert 1 <= most <= writer.MOST_FLUSHES + 2


def test_no_descriptor_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")

    class Exhausted:
        def __init__(self, file: Path) -> None:
            pass

        def get_tensor(self, name: str) -> Tensor:
            raise RuntimeError("unable to open file <x> in read-only mode: Too many open files (24)")

    checkpoint = Checkpoint(folder)
    checkpoint._opened = Exhausted
    assert "Too many open files" in sentence(lambda: checkpoint.read("model.norm.weight"))
