"""A causal language model with its MTP module: loading, random initialisation, the forward pass, saving."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.shards import TensorInfo
from slimqwen.checkpoint.writer import CheckpointWriter
from slimqwen.errors import UserError
from slimqwen.families import Config, Family, family_of
from slimqwen.families.axes import Sizes, size
from slimqwen.families.family import Block, Layout, TensorSpec
from slimqwen.modeling.device import aligned
from slimqwen.modeling.kernels import check_rows
from slimqwen.modeling.mtp import MTP_PREFIX, MtpModule

transformers.utils.logging.set_verbosity_error()  # its load report repeats that `mtp.*` is ignored: we load it ourselves
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass(frozen=True)
class HiddenStates:
    """Inputs of lm_head. `main[:, i]` predicts t_{i+1}, `mtp[:, i]` predicts t_{i+2}; both [batch, seq, hidden]."""

    main: torch.Tensor
    mtp: torch.Tensor | None


class MtpCausalLM(nn.Module):
    """`backbone` (Transformers' ...ForCausalLM) and `mtp` (None where the checkpoint has none)."""

    def __init__(self, backbone: PreTrainedModel, mtp: MtpModule | None, family: Family, config: Config) -> None:
        super().__init__()
        self.backbone = backbone
        self.mtp = mtp
        self.family = family
        self.config = config

    @property
    def head(self) -> torch.Tensor:
        """lm_head's weight, [vocab, hidden], shared by both heads."""
        return self.backbone.get_output_embeddings().weight

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None, with_mtp: bool = True) -> HiddenStates:
        """Hidden states of both heads, without the vocabulary-sized logits.

        Args:
            tokens: rows of seq + 1 tokens, [batch, seq + 1]: the backbone reads the first seq of each; the MTP module
                at position i also reads token i + 1.
            mask: True for real tokens, [batch, seq + 1]; None where there is no padding.
            with_mtp: False leaves the MTP module out.
        """
        decoder = self.backbone.get_decoder()
        inputs_mask = None if mask is None else mask[:, :-1]
        main = decoder(input_ids=tokens[:, :-1], attention_mask=inputs_mask, use_cache=False).last_hidden_state
        if self.mtp is None or not with_mtp:
            return HiddenStates(main, None)
        next_embeddings = decoder.embed_tokens(tokens[:, 1:])
        return HiddenStates(main, self.mtp(main, next_embeddings, decoder.rotary_emb, inputs_mask))

    def set_experts_implementation(self, name: str) -> None:
        """Choose how routed experts are computed (a key of Transformers' ALL_EXPERTS_FUNCTIONS), in both parts."""
        self.backbone.config._experts_implementation = name
        if self.mtp is not None:
            self.mtp.config._experts_implementation = name

    def module_of(self, tensor: str) -> nn.Module:
        """The module that owns a checkpoint tensor: 'model.norm.weight' -> backbone.model.norm."""
        path = self.family.module_name(tensor, self.config).rpartition(".")[0]
        return self.get_submodule(path if path.startswith(MTP_PREFIX) else f"backbone.{path}")

    def tensors(self, with_mtp: bool = True) -> dict[str, torch.Tensor]:
        """Parameters by their name in Transformers' modules, experts fused; tied ones once. MTP's begin with `mtp.`."""
        tensors = dict(self.backbone.named_parameters())
        if self.mtp is not None and with_mtp:
            tensors |= {MTP_PREFIX + name: parameter for name, parameter in self.mtp.named_parameters()}
        return tensors

    def held(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint keeps: `tensors`, and buffers that are no parameters (a router's correction bias)."""
        held = dict(self.backbone.state_dict(keep_vars=True))
        if self.mtp is not None:
            held |= {MTP_PREFIX + name: tensor for name, tensor in self.mtp.state_dict(keep_vars=True).items()}
        return held


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> MtpCausalLM:
    """Load a checkpoint folder with its MTP module. Local files only; no code from the folder runs.

    Raises UserError for experts of a size that cannot be computed in `dtype`.
    """
    checkpoint = Checkpoint(folder)
    backbone = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False)
    mtp = None
    if checkpoint.has_mtp:
        mtp = MtpModule(backbone, checkpoint.family)
        for parameter in mtp.parameters():  # not the buffers: a router's correction bias is float32 in any model
            parameter.data = parameter.data.to(dtype)
        blocks = [block for block in checkpoint.family.blocks(checkpoint.config) if block.is_mtp]
        fill(mtp, MTP_PREFIX, checkpoint, blocks)
    model = MtpCausalLM(backbone, mtp, checkpoint.family, checkpoint.config).to(device)
    for tensor in model.held().values():  # on a CPU Transformers leaves what needs no other dtype mapped from the file
        tensor.data = aligned(tensor.data)
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):  # routed experts
            check_rows(module, dtype)
    model.eval()
    return model


def weightless(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> MtpCausalLM:
    """What `load` builds, on the meta device: every module, no weights, parameters in `dtype`.

    The rotary table, which is computed and not stored, is on `device`.
    """
    native = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(native, dtype=dtype)
        mtp = MtpModule(backbone, checkpoint.family) if checkpoint.has_mtp else None
    for parameter in mtp.parameters() if mtp is not None else ():
        parameter.data = parameter.data.to(dtype)
    decoder = backbone.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(device)
    return MtpCausalLM(backbone, mtp, checkpoint.family, checkpoint.config).eval()


@torch.no_grad()
def fill(module: nn.Module, prefix: str, checkpoint: Checkpoint, blocks: list[Block]) -> None:
    """Copy the tensors of some blocks into the module whose names begin with `prefix` in the model; others are left."""
    held = {prefix + name: tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    filled = set()
    for block in blocks:
        for name in block.module_tensors():
            own = checkpoint.family.module_name(name, checkpoint.config)
            if own in held:  # GLM's MTP layer carries copies of the embeddings, which the module shares
                held[own].copy_(read_stacked(checkpoint, block, name))
                filled.add(own)
    assert filled == held.keys(), f"{checkpoint.family.model_type}: no tensor fills {held.keys() - filled}"


def read_stacked(checkpoint: Checkpoint, block: Block, name: str) -> torch.Tensor:
    """A tensor as Transformers' modules hold it: as stored, or stacked from the per-expert tensors on disk."""
    if name in checkpoint.specs:
        return checkpoint.read(name)
    assert block.experts is not None
    joined = block.experts.fused[name.removeprefix(block.prefix)]
    experts = range(checkpoint.family.sizes(checkpoint.config)[block.experts.axis])
    return torch.stack(
        [torch.cat([checkpoint.read(block.prefix + part.format(expert=e)) for part in joined]) for e in experts]
    )


def initialise(config: Config, seed: int, device: str | torch.device = "cpu") -> MtpCausalLM:
    """A randomly initialised float32 model of this shape, as Transformers initialises it; the same for the same seed."""
    family = family_of(config, "config.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        native = AutoConfig.for_model(**family.to_disk(config))
        backbone = AutoModelForCausalLM.from_config(native, dtype=torch.float32)
        mtp = MtpModule(backbone, family) if config["num_nextn_predict_layers"] else None
    return MtpCausalLM(backbone, mtp, family, config).to(device)


def save(
    model: MtpCausalLM, folder: Path, like: Checkpoint | None, config: Config, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write weights, MTP included, and config.json into an existing (temporary) folder.

    Tensor layout and dtypes are those of `like` (A_log may be float32 in a bfloat16 checkpoint); without it, the
    family's default layout in `dtype`, and a generation_config.json, which otherwise comes along from `like`'s folder.
    """
    family = family_of(config, "config.json")
    layouts: Mapping[str, Layout] | None = like.layouts if like is not None else None
    sizes = family.sizes(config)
    held = model.held()
    specs = {spec.name: spec for spec in family.tensors(config, layouts)}
    planned = [
        TensorInfo(name, dtype if like is None else like.dtype(name), spec.shape) for name, spec in specs.items()
    ]
    with CheckpointWriter(folder, planned) as writer:
        for name, kept_as, _ in writer.missing():
            if specs[name].part == "vision":  # carried along: the language model does not hold it
                if like is None:
                    raise UserError(f"random weights for {name} cannot be made: start from a checkpoint that has it.")
                tensor = like.read(name)
            else:
                tensor = disk_tensor(specs[name], family, config, held, sizes).detach().cpu()
            writer.add(name, tensor.to(kept_as))
        stored = dtype if like is None else like.dtype(next(iter(like.specs)))
        writer.finish(family.to_disk({**config, "dtype": str(stored).removeprefix("torch.")}))
    if like is None:
        GenerationConfig.from_model_config(model.backbone.config).save_pretrained(folder)


def disk_tensor(
    spec: TensorSpec, family: Family, config: Config, held: Mapping[str, torch.Tensor], sizes: Sizes
) -> torch.Tensor:
    """A checkpoint tensor out of the module's tensors: the same one, or one expert's rows of a fused one."""
    own = family.module_name(spec.name, config)
    if own in held:
        return held[own]
    experts = spec.block.experts
    if experts is None or spec.expert is None:
        raise UserError(f"the model holds no tensor '{spec.name}', which its config asks for.")
    fused, joined = next((name, parts) for name, parts in experts.fused.items() if spec.pattern in parts)
    before = joined[: joined.index(spec.pattern)]
    start = sum(size(experts.per_expert[part][0], sizes) for part in before)
    own = family.module_name(spec.block.prefix + fused, config)
    return held[own][spec.expert, start : start + spec.shape[0]]
