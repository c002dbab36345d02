"""Tiny models, text and tokens for the tests, and referees that share no code with slimqwen.

Every size differs from every other that it could be mistaken for, and the random weights are large: a permutation or a
cut that one tensor misses must be seen in the logits.
"""

import json
import re
import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from slimqwen.data.packed import PackedTokens, PackedWriter
from slimqwen.data.stream import TokenStream
from slimqwen.data.tokenize import tokenize
from slimqwen.data.tokenizer import train_tokenizer
from slimqwen.families import FAMILIES, Config
from slimqwen.families.family import Layout, TensorSpec
from slimqwen.recipe import Source

VOCAB_SIZE = 300

WORDS = [
    "left",
    "right",
    "index",
    "value",
    "total",
    "count",
    "items",
    "result",
    "buffer",
    "offset",
    "head",
    "tail",
    "layer",
    "expert",
    "router",
    "token",
]

QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20,
    "intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "dtype": "float32",
}


ONE_PLUS_WEIGHT = {"qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"}  # what their norms multiply by


def tiny_config(**overrides: Any) -> Config:
    """Qwen3-Next, canonical and with all keys that slimqwen writes: 3 linear-attention layers, 1 of full attention, MTP."""
    return canonical(QWEN3_NEXT | overrides)


def canonical(native: Config) -> Config:
    """A canonical config with all the keys that its family writes to config.json."""
    family = FAMILIES[native["model_type"]]
    return family.normalise(family.to_disk(family.normalise(native)))


def tiny_tensors(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors for a config, one per expert, by checkpoint name; A_log stays float32, as engines hold it."""
    generator = torch.Generator().manual_seed(seed)
    family = FAMILIES[config["model_type"]]
    layouts = dict.fromkeys(family.detect_layouts(config, set()), "per_expert")
    one = 0.0 if config["model_type"] in ONE_PLUS_WEIGHT else 1.0
    return {spec.name: _random(spec, generator, one, dtype) for spec in family.tensors(config, layouts)}


def _random(spec: TensorSpec, generator: torch.Generator, one: float, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, scaled to what the tensor does. one: what a norm's gain is random around."""
    values = torch.randn(spec.shape, generator=generator)
    if spec.pattern.endswith("A_log"):
        return 0.7 * values
    if spec.pattern.endswith("linear_attn.norm.weight"):  # always multiplies by weight, not by 1 + weight
        return (1.0 + 0.3 * values).to(dtype)
    if len(spec.shape) == 1:
        return ((one if spec.pattern.endswith("norm.weight") else 0.0) + 0.3 * values).to(dtype)
    if spec.pattern == "model.embed_tokens.weight":
        return values.to(dtype)
    gain = 2.0 if spec.part == "router" else 1.0  # clear choices of experts
    return (gain * prod(spec.shape[1:]) ** -0.5 * values).to(dtype)


def fused(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The same checkpoint with each block's experts stacked, as Transformers' modules hold them (formats.md 2)."""
    stacked = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.experts\.\d+\.", name)}
    for experts in sorted({re.split(r"\d+\.\w+\.weight$", name)[0] for name in tensors.keys() - stacked.keys()}):
        mixtral = f"{experts}0.w1.weight" in tensors
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")

        def of_all(projection: str, experts: str = experts) -> list[Tensor]:
            return [tensors[f"{experts}{e}.{projection}.weight"] for e in range(config["num_experts"])]

        pairs = zip(of_all(gate), of_all(up), strict=True)
        stacked[f"{experts}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        stacked[f"{experts}down_proj"] = torch.stack(of_all(down))
    return stacked


def write_tiny_checkpoint(
    folder: Path,
    seed: int = 0,
    layout: Layout = "per_expert",
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
    native: Config = QWEN3_NEXT,
    **overrides: Any,
) -> Path:
    """Write `model.safetensors`, config.json (`native` with `overrides`) and, if given, the tokenizer; `folder`."""
    config = canonical(native | overrides | {"dtype": str(dtype).removeprefix("torch.")})
    tensors = tiny_tensors(config, seed, dtype)
    folder.mkdir(parents=True)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    tensors = fused(tensors, config) if layout == "fused" else tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    put_json(folder / "config.json", FAMILIES[config["model_type"]].to_disk(config))
    return folder


def put_json(path: Path, value: Any) -> None:
    """Over whatever is there, as a user's editor would."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def tiny_text(seed: int, lines: int = 40) -> str:
    """A small module of Python-like text, another for every seed."""
    generator = torch.Generator().manual_seed(seed)

    def word() -> str:
        return WORDS[int(torch.randint(len(WORDS), (), generator=generator))]

    body = "".join(f"    {word()} = {word()}[{word()}] + {word()}({line % 10})\n" for line in range(lines))
    return f"def {word()}_{word()}({word()}):\n{body}    return {word()}\n"


def write_tiny_text(folder: Path, files: int = 8) -> Path:
    """A folder of small .py and .txt files."""
    folder.mkdir(parents=True)
    for i in range(files):
        (folder / f"module_{i}.{'txt' if i % 4 == 3 else 'py'}").write_text(tiny_text(i), encoding="utf-8")
    return folder


def write_tiny_tokens(folder: Path, vocab_size: int = VOCAB_SIZE) -> tuple[Path, Path]:
    """`folder/text` and `folder/heldout_text` tokenized; (tokenizer folder, tokens folder)."""
    text = write_tiny_text(folder / "text")
    heldout = folder / "heldout_text"
    heldout.mkdir()
    for i in range(3):
        (heldout / f"heldout_{i}.py").write_text(tiny_text(100 + i), encoding="utf-8")
    texts = (file.read_text(encoding="utf-8") for file in sorted(text.iterdir()))
    train_tokenizer(texts, vocab_size, folder / "tokenizer")
    tokenize([Source(path=text)], folder / "tokenizer", folder / "tokens", heldout_sources=[Source(path=heldout)])
    return folder / "tokenizer", folder / "tokens"


def tiny_stream(
    folder: Path, documents: list[list[int]], sequence_length: int, seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> TokenStream:
    """A training stream of token ids written out in the test."""
    folder.mkdir(parents=True, exist_ok=True)
    with PackedWriter(folder / "train", vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return TokenStream(PackedTokens(folder / "train"), sequence_length, seed)


def tiny_tokens(rows: int = 2, columns: int = 21, seed: int = 0) -> Tensor:
    """Random token ids, [rows, columns]."""
    return torch.randint(VOCAB_SIZE, (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def transformers_mtp_hidden(backbone: PreTrainedModel, tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The referee of MTP: Transformers' own MtpModel on a checkpoint's `mtp.*` tensors (experts fused or not).

    tokens: [batch, seq + 1]. Returns the hidden states for lm_head, [batch, seq, hidden].
    """
    module = MtpModel(backbone, 1).to(backbone.dtype)
    names = {
        "pre_fc_norm_embedding.": "enorm.",
        "pre_fc_norm_hidden.": "hnorm.",
        "fc.": "eh_proj.",
        "layers.0.": "mtp_block.",
        "norm.": "post_norm.",
    }
    mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    if any(".experts.0." in name for name in mtp):
        mtp = fused(mtp, {"num_experts": backbone.config.num_experts})
    state = {}
    for name, tensor in mtp.items():
        ours = next(prefix for prefix in names if name.startswith(f"mtp.{prefix}"))
        state["layers.0." + names[ours] + name.removeprefix(f"mtp.{ours}")] = tensor
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith(("embed_tokens.", "shared_head.")) for name in missing)
    inputs = tokens[:, :-1]
    hidden = backbone.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
    return transformers_mtp_step(module.eval(), hidden, tokens[:, 1:])


def transformers_mtp_step(module: MtpModel, hidden: Tensor, following: Tensor) -> Tensor:
    """One step of Transformers' MtpModel: states [batch, seq, hidden] and the tokens that follow, [batch, seq], to states."""
    positions = torch.arange(following.shape[1]).unsqueeze(0)
    if hasattr(module, "forward_layer"):
        return module.forward_layer(0, hidden, positions, None, input_ids=following)
    # In Transformers 5.17 these steps are part of `forward`, which goes on to draft tokens.
    embeddings = module.embed_tokens(following)
    by_axis = positions.expand(3, -1, -1) if hasattr(module.rotary_emb, "mrope_section") else positions
    return module.layers[0](
        embeddings,
        hidden,
        position_embeddings=module.rotary_emb(embeddings, position_ids=by_axis),
        position_ids=positions,
        past_key_values=None,
        **module.create_masks_for_mtp_layer(0, embeddings, None, positions),
    )
