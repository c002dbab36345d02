"""What the tables of engines.py say of checkpoints: which engine takes which, and why another does not."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import with_config, with_tensors
from test_cli import slimqwen as run_command
from tiny import canonical, write_tiny_checkpoint
from tiny_families import FAMILIES_NATIVE

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families import FAMILIES
from slimqwen.serving.check import CheckResult, check_checkpoint, describe
from slimqwen.serving.engines import ENGINES
from slimqwen.serving.requirements import LoadResult, check_loader

# What the tiny configs have and some engines do not take: checked one by one below.
PLAIN: dict[str, dict[str, Any]] = {
    "qwen3_next": {"linear_value_head_dim": 8},
    "qwen3_5_moe_text": {"linear_value_head_dim": 8},
    "qwen3_5_moe": {
        "text_config": {**FAMILIES_NATIVE["qwen3_5_moe"]["text_config"], "linear_value_head_dim": 8},
    },
    "qwen3_moe": {"mlp_only_layers": []},
    "olmoe": {"num_key_value_heads": 4, "clip_qkv": None, "rms_norm_eps": 1e-5},
}
WITH_MTP = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe", "glm4_moe")


def plain(folder: Path, family: str = "qwen3_next", **overrides: Any) -> Path:
    """A checkpoint that every engine takes, but for what overrides do to it."""
    overrides = PLAIN.get(family, {}) | overrides
    return write_tiny_checkpoint(folder / "checkpoint", native=FAMILIES_NATIVE[family], **overrides)


def verdicts(folder: Path) -> dict[str, LoadResult]:
    return check_checkpoint(folder, engines=["all"]).engines


def refusing(folder: Path) -> dict[str, str]:
    return {name: "; ".join(found.problems) for name, found in verdicts(folder).items() if found.problems}


# --- the tables -------------------------------------------------------------------------------------------------------


def test_every_engine_names_its_version_and_every_family() -> None:
    assert list(ENGINES) == ["transformers", "vllm", "sglang", "llama.cpp"]
    for name, engine in ENGINES.items():
        assert engine.name == name and engine.version and engine.source and engine.loaders.keys() == FAMILIES.keys()


def test_no_name_in_a_table_is_misspelt() -> None:
    """Each is a tensor's name in some checkpoint of the family: with dense layers, biases, norms and MTP's copies."""
    variants: dict[str, Any] = {"qwen3_next": {"mlp_only_layers": [0]}, "glm4_moe": {}}
    for family, native in FAMILIES_NATIVE.items():
        config = canonical(native | variants.get(family, {}))
        config |= {"mtp_copies": ["embed_tokens.weight", "shared_head.head.weight"]} if family == "glm4_moe" else {}
        table = FAMILIES[family]
        known: set[str] = set()
        for layout in ("per_expert", "fused"):
            layouts: Any = dict.fromkeys(table.detect_layouts(config, set()), layout)
            known |= {re.sub(r"\.\d+(?=\.)", ".*", spec.name) for spec in table.tensors(config, layouts)}
        for engine in ENGINES.values():
            loader = engine.loaders[family]
            assert loader.names | loader.mtp | set(loader.needs) <= known, (engine.name, family)


# --- what loads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES_NATIVE)
def test_every_engine_takes_a_plain_checkpoint_of_every_family(tmp_path: Path, family: str) -> None:
    found = verdicts(plain(tmp_path, family))
    assert not [problem for result in found.values() for problem in result.problems]
    drafting = {name for name, result in found.items() if result.drafts}
    assert drafting == ({"vllm", "sglang", "llama.cpp"} if family in WITH_MTP else set())
    assert any("ignores the MTP module" in note for note in found["transformers"].notes) == (family in WITH_MTP)


def test_without_engines_nothing_is_said_of_them(tmp_path: Path) -> None:
    result = check_checkpoint(plain(tmp_path))
    assert result.engines == {} and describe(result).endswith("\nloadable")


# --- what does not ----------------------------------------------------------------------------------------------------


def test_a_family_that_an_engine_does_not_know(tmp_path: Path) -> None:
    older = dataclasses.replace(ENGINES["vllm"], loaders={})
    found = check_loader(older, Checkpoint(plain(tmp_path)))
    assert found.problems == ["it does not support model_type qwen3_next"] and not found.drafts


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_layers_that_do_not_alternate(tmp_path: Path, family: str) -> None:
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    found = refusing(plain(tmp_path, family, layer_types=kinds))
    assert found.keys() == {"sglang"} and "do not alternate regularly" in found["sglang"]


def test_a_missing_key(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    with_config(folder, full_attention_interval=None)
    assert refusing(folder).keys() == {"sglang"}
    assert refusing(folder)["sglang"].startswith("config.json lacks full_attention_interval: ")
    with_config(folder, full_attention_interval=2)
    assert "full_attention_interval 2 does not give the layers" in refusing(folder)["sglang"]
    with_config(folder, full_attention_interval=4, rope_theta=None)
    assert refusing(folder) == {"sglang": "config.json lacks rope_theta: its config class defaults to 10000"}


@pytest.mark.parametrize("architectures", [None, ["Qwen3NextModel"]])
def test_architectures_that_name_another_model(tmp_path: Path, architectures: list[str] | None) -> None:
    folder = plain(tmp_path)
    with_config(folder, architectures=architectures)
    found = refusing(folder)
    assert found.keys() == {"vllm", "sglang", "llama.cpp"}
    assert "must include 'Qwen3NextForCausalLM'" in found["vllm"]


@pytest.mark.parametrize(
    ("family", "engines"),
    [
        ("qwen3_next", {"sglang"}),
        ("qwen3_5_moe_text", set()),
        ("qwen3_moe", {"sglang"}),
        ("olmoe", {"sglang", "llama.cpp"}),
        ("mixtral", {"vllm", "sglang", "llama.cpp"}),
        ("glm4_moe", {"sglang", "llama.cpp"}),
    ],
)
def test_fused_experts(tmp_path: Path, family: str, engines: set[str]) -> None:
    found = refusing(plain(tmp_path, family, layout="fused"))
    assert found.keys() == engines
    for sentence in found.values():
        assert "experts.gate_up_proj' of shape [" in sentence and "--layout per_expert" in sentence


def test_an_mtp_module_whose_layout_is_not_taken(tmp_path: Path) -> None:
    """vLLM reads GLM's layers in both layouts and its MTP layer in one."""
    found = verdicts(plain(tmp_path, "glm4_moe", layout="fused"))["vllm"]
    assert not found.problems and not found.drafts
    assert (
        "the MTP module does not load: it has no place for 'model.layers.3.mlp.experts.gate_up_proj'" in found.notes[0]
    )


def test_dense_layers(tmp_path: Path) -> None:
    folder = plain(tmp_path / "next", mlp_only_layers=[0])
    assert refusing(folder).keys() == {"sglang", "llama.cpp"}
    assert "'model.layers.0.mlp.gate_proj.weight' of shape [40, 32] and 2 more" in refusing(folder)["sglang"]
    assert verdicts(folder)["vllm"].notes == ["the MTP module does not load: it is made dense, as layer 0 is"]
    assert verdicts(plain(tmp_path / "other", mlp_only_layers=[1]))["vllm"].drafts
    assert refusing(plain(tmp_path / "moe", "qwen3_moe", mlp_only_layers=[0])).keys() == {"sglang", "llama.cpp"}


@pytest.mark.parametrize(
    ("family", "overrides", "engine", "words"),
    [
        (
            "qwen3_next",
            {"linear_value_head_dim": 12},
            "llama.cpp",
            "linear_key_head_dim 8 to equal linear_value_head_dim 12",
        ),
        ("olmoe", {"num_key_value_heads": 2}, "llama.cpp", "num_key_value_heads 2 to equal num_attention_heads 4"),
        ("mixtral", {"head_dim": 12}, "sglang", "head_dim 12 x num_attention_heads 4 to equal hidden_size 32"),
    ],
)
def test_sizes_that_must_agree(tmp_path: Path, family: str, overrides: dict[str, Any], engine: str, words: str) -> None:
    found = refusing(plain(tmp_path, family, **overrides))
    assert found.keys() == {engine} and words in found[engine]


def test_tied_embeddings(tmp_path: Path) -> None:
    found = refusing(plain(tmp_path / "next", tie_word_embeddings=True))
    assert found == dict.fromkeys(("vllm", "sglang"), "it needs 'lm_head.weight', which tied embeddings omit")
    assert refusing(plain(tmp_path / "text", "qwen3_5_moe_text", tie_word_embeddings=True)) == {}


# --- what loads, but --------------------------------------------------------------------------------------------------


def test_no_mtp_module(tmp_path: Path) -> None:
    folder = plain(tmp_path, num_nextn_predict_layers=0)
    found = verdicts(folder)
    assert not any(result.drafts or result.problems for result in found.values())
    assert [name for name, result in found.items() if result.notes] == ["llama.cpp"]
    assert "--no-mtp" in found["llama.cpp"].notes[0]


def test_keys_that_an_engine_ignores(tmp_path: Path) -> None:
    notes = verdicts(plain(tmp_path, "olmoe", clip_qkv=2.0, rms_norm_eps=1e-6))["vllm"].notes
    assert notes == [
        "it ignores clip_qkv 2.0: outputs differ",
        "it uses rms_norm_eps 1e-05, not 1e-06: outputs differ",
    ]


def test_a_vision_tower(tmp_path: Path) -> None:
    found = verdicts(plain(tmp_path, "qwen3_5_moe"))
    assert all(any("vision tower" in note for note in result.notes) for result in found.values())
    assert "--mmproj" in found["llama.cpp"].notes[0]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    good = run_command("check", folder, "--engine", "vllm", "--engine", "llama.cpp")
    assert good.returncode == 0 and not good.stderr
    vllm, llama_cpp, last = good.stdout.splitlines()[-3:]
    assert vllm == "vllm 0.33.0: loads, and drafts with the MTP module" and last == "loadable"
    assert llama_cpp.startswith("llama.cpp ") and "tokenizer by a hash" in llama_cpp

    with_config(folder, full_attention_interval=None)
    bad = run_command("check", folder, "--engine", "all", "--json")
    result = CheckResult.model_validate_json(bad.stdout)
    assert bad.returncode == 1 and result.refusing() == ["sglang"] and len(result.engines) == 4
    assert describe(result).splitlines()[-1] == "not loadable in sglang"
    assert run_command("check", folder, "--engine", "transformers").returncode == 0


def test_an_engine_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine 'vlm' is not known \(did you mean 'vllm'\?\): give one of .*, all\.$"):
        check_checkpoint(plain(tmp_path), engines=["vlm"])


def test_a_broken_checkpoint_is_bad_input_for_any_engine(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    with_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match="lacks 1 tensor"):
        check_checkpoint(folder, engines=["all"])


def test_the_page_names_the_versions_of_the_tables() -> None:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    for engine in ENGINES.values():
        assert engine.version in page, engine.name
