"""Tables of what the loaders of Transformers, vLLM, SGLang and llama.cpp accept, from their released source.

Read by hand: the files in `Engine.source`, at `Engine.version`. Run: Transformers (tests/test_every_family.py) and
llama.cpp's converter, on tiny checkpoints of every family and layout. Not run: vLLM, SGLang and llama.cpp's C++ loader,
which need hardware or a build. Older and newer versions may differ. `requirements.check_loader` uses these tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Names = frozenset[str]
"""Tensor names on disk, with `*` for every number between dots."""


@dataclass(frozen=True)
class Loader:
    """The requirements of an engine's loader for one model_type. Sizes have canonical names, `keys` and `fixed` config.json's.

    `architecture`: the entry of config.json's architectures that selects the code; None: model_type does.
    `names`: the backbone's tensors; `mtp`: the MTP module's, empty where the engine does not use it.
    `unchecked`: prefix of tensors whose names were not compared -> a note about them.
    `needs`: tensors that the engine requires although tied embeddings omit them.
    `keys`: required keys of config.json -> what the engine does if one is missing.
    `counts_layers`: it derives the layers' types from full_attention_interval and ignores layer_types.
    `equal`: products of sizes that must be equal. `fixed`: key -> the value used in place of config.json's.
    `mtp_like_first_layer`: the MTP layer is dense if layer 0 is in mlp_only_layers.
    `without_mtp`: a note for checkpoints without an MTP module.
    """

    architecture: str | None
    names: Names
    mtp: Names = frozenset()
    unchecked: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    counts_layers: bool = False
    equal: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    mtp_like_first_layer: bool = False
    without_mtp: str | None = None


@dataclass(frozen=True)
class Engine:
    """An engine: the version and files whose source was read, and its loaders by model_type. `note`: for every checkpoint."""

    name: str
    version: str
    source: str
    loaders: Mapping[str, Loader]
    note: str | None = None


# --- tensor names, below a layer --------------------------------------------------------------------------------------

NORMS = "input_layernorm.weight post_attention_layernorm.weight "
PROJECTIONS = "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight "
BIASES = "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias "
QK_NORMS = "self_attn.q_norm.weight self_attn.k_norm.weight "
DELTANET = (
    "linear_attn.conv1d.weight linear_attn.A_log linear_attn.dt_bias linear_attn.norm.weight "
    "linear_attn.out_proj.weight "
)
JOINT_INPUT = "linear_attn.in_proj_qkvz.weight linear_attn.in_proj_ba.weight "
SPLIT_INPUT = (
    "linear_attn.in_proj_qkv.weight linear_attn.in_proj_z.weight linear_attn.in_proj_b.weight "
    "linear_attn.in_proj_a.weight "
)
DENSE = "mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight "
ROUTER = "mlp.gate.weight "
EACH = "mlp.experts.*.gate_proj.weight mlp.experts.*.up_proj.weight mlp.experts.*.down_proj.weight "
FUSED = "mlp.experts.gate_up_proj mlp.experts.down_proj "
SHARED = (
    "mlp.shared_expert.gate_proj.weight mlp.shared_expert.up_proj.weight mlp.shared_expert.down_proj.weight "
    "mlp.shared_expert_gate.weight "
)


def _model(layer: str, root: str = "model.") -> Names:
    """Return the names of a backbone from those of a layer."""
    around = {"lm_head.weight", f"{root}embed_tokens.weight", f"{root}norm.weight"}
    return frozenset(around | {f"{root}layers.*.{name}" for name in layer.split()})


# --- Qwen3-Next and Qwen3.5 -------------------------------------------------------------------------------------------

MIXERS = NORMS + PROJECTIONS + QK_NORMS + DELTANET
LAYER = MIXERS + JOINT_INPUT + ROUTER + SHARED
LAYER_3_5 = MIXERS + SPLIT_INPUT + ROUTER + SHARED
LANGUAGE_MODEL = "model.language_model."


def _qwen_mtp(experts: str) -> Names:
    layer = NORMS + PROJECTIONS + QK_NORMS + ROUTER + SHARED + experts
    around = "fc.weight pre_fc_norm_embedding.weight pre_fc_norm_hidden.weight norm.weight"
    return frozenset(f"mtp.{name}" for name in around.split()) | {f"mtp.layers.*.{name}" for name in layer.split()}


# --- Mixtral and GLM-4 ------------------------------------------------------------------------------------------------

MIXTRAL = NORMS + PROJECTIONS + "block_sparse_moe.gate.weight "
MIXTRAL_EACH = " ".join(f"block_sparse_moe.experts.*.w{n}.weight" for n in (1, 2, 3))
MIXTRAL_FUSED = " block_sparse_moe.experts.gate_up_proj block_sparse_moe.experts.down_proj"

GLM_MIXER = NORMS + PROJECTIONS + BIASES + QK_NORMS
GLM_MOE = (
    "mlp.gate.weight mlp.gate.e_score_correction_bias mlp.shared_experts.gate_proj.weight "
    "mlp.shared_experts.up_proj.weight mlp.shared_experts.down_proj.weight "
)
GLM_MTP = (
    "eh_proj.weight enorm.weight hnorm.weight shared_head.norm.weight embed_tokens.weight shared_head.head.weight "
    + GLM_MIXER
    + GLM_MOE
    + EACH
)
GLM_MTP_NAMES: Names = frozenset(f"model.layers.*.{name}" for name in GLM_MTP.split())

# --- the engines ------------------------------------------------------------------------------------------------------

UNTIED = ("lm_head.weight",)
OLMOE_SPAN = ((("head_dim", "num_attention_heads"), ("hidden_size",)),)
OLMOE_EPS = {"rms_norm_eps": 1e-5}
OTHER_TOWER = {"model.visual.": "the vision tower's names were not compared"}
MOE_LAYER = NORMS + PROJECTIONS + QK_NORMS + ROUTER

TRANSFORMERS = Engine(
    name="transformers",
    version="5.23.0",
    source="run: saved, loaded and compared with tiny models",
    loaders={
        "qwen3_next": Loader(None, _model(LAYER + EACH + FUSED + DENSE)),
        "qwen3_5_moe_text": Loader(None, _model(LAYER_3_5 + EACH + FUSED)),
        "qwen3_5_moe": Loader(
            None,
            _model(LAYER_3_5 + EACH + FUSED, LANGUAGE_MODEL),
            unchecked={"model.visual.": "AutoModelForCausalLM loads the language model without the vision tower"},
        ),
        "qwen3_moe": Loader(None, _model(MOE_LAYER + EACH + FUSED + DENSE)),
        "olmoe": Loader(None, _model(MOE_LAYER + EACH + FUSED), equal=OLMOE_SPAN),
        "mixtral": Loader(None, _model(MIXTRAL + MIXTRAL_EACH + MIXTRAL_FUSED)),
        "glm4_moe": Loader(None, _model(GLM_MIXER + GLM_MOE + EACH + FUSED + DENSE)),
    },
)

# Experts go through RoutedExperts.load_weights, which splits fused tensors too (of names gate_up_proj and w13 only).
VLLM = Engine(
    name="vllm",
    version="0.33.0",
    source="read: model_executor/models/{qwen3_next,qwen3_next_mtp,qwen3_5,qwen3_5_mtp,qwen3_moe,olmoe,mixtral,glm4_moe,"
    "glm4_moe_mtp,registry}.py, layers/fused_moe/routed_experts.py, config/speculative.py",
    loaders={
        "qwen3_next": Loader(
            "Qwen3NextForCausalLM",
            _model(LAYER + EACH + FUSED + DENSE),
            _qwen_mtp(EACH + FUSED),
            needs=UNTIED,
            mtp_like_first_layer=True,
        ),
        "qwen3_5_moe_text": Loader("Qwen3_5MoeForCausalLM", _model(LAYER_3_5 + EACH + FUSED), _qwen_mtp(EACH + FUSED)),
        "qwen3_5_moe": Loader(
            "Qwen3_5MoeForConditionalGeneration",
            _model(LAYER_3_5 + EACH + FUSED, LANGUAGE_MODEL),
            _qwen_mtp(EACH + FUSED),
            unchecked=OTHER_TOWER,
        ),
        "qwen3_moe": Loader("Qwen3MoeForCausalLM", _model(MOE_LAYER + EACH + FUSED + DENSE)),
        "olmoe": Loader(
            "OlmoeForCausalLM",
            _model(MOE_LAYER + EACH + FUSED),
            needs=UNTIED,
            equal=OLMOE_SPAN,
            fixed={"clip_qkv": None, **OLMOE_EPS},
        ),
        "mixtral": Loader("MixtralForCausalLM", _model(MIXTRAL + MIXTRAL_EACH)),
        "glm4_moe": Loader(
            "Glm4MoeForCausalLM", _model(GLM_MIXER + GLM_MOE + EACH + FUSED + DENSE), GLM_MTP_NAMES, needs=UNTIED
        ),
    },
)

COUNTED = {"full_attention_interval": "it derives the type of every layer from it and fails without it"}

# Unknown names raise a KeyError in some of its loaders and are skipped without a message in others (qwen3_moe,
# glm4_moe), which leaves parameters uninitialised: either way the model does not load.
SGLANG = Engine(
    name="sglang",
    version="0.5.23",
    source="read: srt/models/{qwen3_next,qwen3_next_mtp,qwen3_5,qwen3_5_text,qwen3_5_mtp,qwen3_moe,olmoe,mixtral,glm4_moe,"
    "glm4_moe_nextn}.py, srt/configs/{qwen3_next,qwen3_5,model_config}.py, srt/arg_groups/speculative_hook.py",
    loaders={
        "qwen3_next": Loader(
            "Qwen3NextForCausalLM",
            _model(LAYER + EACH),
            _qwen_mtp(EACH),
            needs=UNTIED,
            keys={
                **COUNTED,
                "rope_theta": "its config class defaults to 10000",
                "partial_rotary_factor": "its config class defaults to 0.25",
            },
            counts_layers=True,
        ),
        "qwen3_5_moe_text": Loader(
            "Qwen3_5MoeForCausalLM",
            _model(LAYER_3_5 + EACH + FUSED),
            _qwen_mtp(EACH + FUSED),
            keys=COUNTED,
            counts_layers=True,
        ),
        "qwen3_5_moe": Loader(
            "Qwen3_5MoeForConditionalGeneration",
            _model(LAYER_3_5 + EACH + FUSED, LANGUAGE_MODEL),
            _qwen_mtp(EACH + FUSED),
            unchecked=OTHER_TOWER,
            keys=COUNTED,
            counts_layers=True,
        ),
        "qwen3_moe": Loader("Qwen3MoeForCausalLM", _model(MOE_LAYER + EACH), needs=UNTIED),
        "olmoe": Loader(
            "OlmoeForCausalLM",
            _model(MOE_LAYER + EACH),
            needs=UNTIED,
            equal=OLMOE_SPAN,
            fixed={"clip_qkv": None, **OLMOE_EPS},
        ),
        # MixtralAttention computes the size of a head and ignores head_dim.
        "mixtral": Loader("MixtralForCausalLM", _model(MIXTRAL + MIXTRAL_EACH), needs=UNTIED, equal=OLMOE_SPAN),
        "glm4_moe": Loader(
            "Glm4MoeForCausalLM", _model(GLM_MIXER + GLM_MOE + EACH + DENSE), GLM_MTP_NAMES, needs=UNTIED
        ),
    },
)

SAME_STATE = ((("linear_key_head_dim",), ("linear_value_head_dim",)),)  # head_v_dim = ssm_d_state in the C++ loader
NO_MTP = "convert with --no-mtp: without an MTP module the converter stops (an assertion)"

LLAMA_CPP = Engine(
    name="llama.cpp",
    version="0c1e57098",
    note="its converter recognises a tokenizer by a hash, which was not compared",
    source="run: conversion/{base,qwen,olmo,llama,glm}.py (convert_hf_to_gguf.py); read: src/models/{qwen3next,qwen35moe,"
    "qwen3moe,olmoe,llama,glm4-moe}.cpp; the commit that llama-cpp-python 0.3.36 carries",
    loaders={
        "qwen3_next": Loader(
            "Qwen3NextForCausalLM",
            _model(LAYER + EACH + FUSED),
            _qwen_mtp(EACH + FUSED),
            equal=SAME_STATE,
            without_mtp=NO_MTP,
        ),
        "qwen3_5_moe_text": Loader(
            "Qwen3_5MoeForCausalLM",
            _model(LAYER_3_5 + EACH + FUSED),
            _qwen_mtp(EACH + FUSED),
            equal=SAME_STATE,
            without_mtp=NO_MTP,
        ),
        "qwen3_5_moe": Loader(
            "Qwen3_5MoeForConditionalGeneration",
            _model(LAYER_3_5 + EACH + FUSED, LANGUAGE_MODEL),
            _qwen_mtp(EACH + FUSED),
            unchecked={
                "model.visual.": "the vision tower is a file of its own (--mmproj), whose names were not compared"
            },
            equal=SAME_STATE,
            without_mtp=NO_MTP,
        ),
        "qwen3_moe": Loader("Qwen3MoeForCausalLM", _model(MOE_LAYER + EACH + FUSED)),
        # olmoe.cpp gives q_norm and k_norm hidden_size entries each: no grouped queries.
        "olmoe": Loader(
            "OlmoeForCausalLM",
            _model(MOE_LAYER + EACH),
            needs=UNTIED,
            equal=(*OLMOE_SPAN, (("num_key_value_heads",), ("num_attention_heads",))),
            fixed={"clip_qkv": None, **OLMOE_EPS},
        ),
        "mixtral": Loader("MixtralForCausalLM", _model(MIXTRAL + MIXTRAL_EACH)),
        "glm4_moe": Loader("Glm4MoeForCausalLM", _model(GLM_MIXER + GLM_MOE + EACH + DENSE), GLM_MTP_NAMES),
    },
)

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP)}
