"""A causal language model with its MTP module: loading, random initialisation, the forward pass, saving."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.shards import TensorInfo
from slimqwen.checkpoint.source import ExpertReader
from slimqwen.checkpoint.writer import CheckpointWriter
from slimqwen.core.errors import UserError
from slimqwen.core.warning import warn
from slimqwen.families import Config, Family, family_of
from slimqwen.families.axes import Sizes
from slimqwen.families.family import Block, Layout, TensorSpec
from slimqwen.model.frozen import freeze_as_stored, stored_dtypes
from slimqwen.model.internals import mark_as_initialised, one_sequence_per_row, set_experts_function
from slimqwen.model.kernels import check_rows
from slimqwen.model.mtp import MTP_PREFIX, MtpModule
from slimqwen.model.native import build_backbone

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
        self._products_dtype: torch.dtype | None = None  # once parts are frozen

    @property
    def head(self) -> torch.Tensor:
        """lm_head's weight, [vocab, hidden], shared by both heads; a frozen one in the dtype of products with it."""
        weight: torch.Tensor = self.backbone.get_output_embeddings().weight
        if self._products_dtype is None or torch.is_autocast_enabled(weight.device.type):
            return weight
        return weight.to(self._products_dtype)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None, with_mtp: bool = True) -> HiddenStates:
        """Compute the hidden states of both heads, without the vocabulary-sized logits and without waiting for the device.

        Args:
            tokens: rows of seq + 1 tokens, [batch, seq + 1]: the backbone reads the first seq of each; the MTP module
                at position i also reads token i + 1.
            mask: True for real tokens, [batch, seq + 1]; None where there is no padding.
            with_mtp: False leaves the MTP module out.
        """
        decoder = self.backbone.get_decoder()
        inputs_mask = None if mask is None else mask[:, :-1]
        with one_sequence_per_row():
            main = decoder(input_ids=tokens[:, :-1], attention_mask=inputs_mask, use_cache=False).last_hidden_state
            if self.mtp is None or not with_mtp:
                return HiddenStates(main, None)
            next_embeddings = decoder.embed_tokens(tokens[:, 1:])
            return HiddenStates(main, self.mtp(main, next_embeddings, decoder.rotary_emb, inputs_mask))

    def set_experts_implementation(self, name: str) -> None:
        """Choose how routed experts are computed (a key of Transformers' ALL_EXPERTS_FUNCTIONS), in both parts."""
        set_experts_function(self.backbone.config, name)
        if self.mtp is not None:
            set_experts_function(self.mtp.config, name)

    def module_of(self, tensor: str) -> nn.Module:
        """Return the module that owns a checkpoint tensor: 'model.norm.weight' -> backbone.model.norm."""
        path = self.family.module_name(tensor, self.config).rpartition(".")[0]
        return self.get_submodule(path if path.startswith(MTP_PREFIX) else f"backbone.{path}")

    def tensors(self, with_mtp: bool = True) -> dict[str, torch.Tensor]:
        """Return the parameters by their name in Transformers' modules, experts fused; tied ones once. MTP's begin with `mtp.`."""
        tensors = dict(self.backbone.named_parameters())
        if self.mtp is not None and with_mtp:
            tensors |= {MTP_PREFIX + name: parameter for name, parameter in self.mtp.named_parameters()}
        return tensors

    def freeze(self, names: Collection[str], checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Freeze the parameters of these names, which are on the meta device, and give matrices the checkpoint's dtype.

        dtype: of the products with them where there is no autocast (`model/frozen.py`).
        """
        frozen = {name: tensor for name, tensor in self.tensors().items() if name in names}
        freeze_as_stored(self, frozen, stored_dtypes(checkpoint), dtype)
        self._products_dtype = dtype

    def held(self) -> dict[str, torch.Tensor]:
        """Return all that a checkpoint keeps: `tensors`, and buffers that are no parameters (a router's correction bias)."""
        held = dict(self.backbone.state_dict(keep_vars=True))
        if self.mtp is not None:
            held |= {MTP_PREFIX + name: tensor for name, tensor in self.mtp.state_dict(keep_vars=True).items()}
        return held


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    frozen: Collection[str] = (),
) -> MtpCausalLM:
    """Load a checkpoint folder with its MTP module. Local files only; no code from the folder runs.

    frozen: names of parameters that are not trained, and keep the dtype that they have on disk (`MtpCausalLM.freeze`).

    Raises UserError for experts of a size that cannot be computed in `dtype`.
    """
    checkpoint = Checkpoint(folder)
    device = torch.device(device)
    model = weightless(checkpoint, dtype, device)
    if frozen:
        model.freeze(frozen, checkpoint, dtype)
    allocate(model, device)
    fill(model.held(), checkpoint)
    for tensor in model.held().values():
        mark_as_initialised(tensor)
    model.backbone.generation_config = generation_config(folder, model.backbone)
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):  # routed experts
            check_rows(module, dtype)
    return model


def weightless(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> MtpCausalLM:
    """Build what `load` does, on the meta device: every module, no weights, parameters in `dtype`.

    The rotary table, which is computed and not stored, is on `device`.
    """
    with torch.device("meta"):
        backbone = build_backbone(checkpoint.family, checkpoint.config, dtype, str(checkpoint.folder))
        mtp = MtpModule(backbone, checkpoint.family) if checkpoint.has_mtp else None
    for parameter in mtp.parameters() if mtp is not None else ():
        parameter.data = parameter.data.to(dtype)
    decoder = backbone.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config).to(device)
    return MtpCausalLM(backbone, mtp, checkpoint.family, checkpoint.config).eval()


def head_name(checkpoint: Checkpoint, model: MtpCausalLM) -> str:
    """Return the tensor in the checkpoint that is lm_head's weight: its own, or the embedding that it is tied to."""
    modules = (model.backbone.get_output_embeddings(), model.backbone.get_input_embeddings())
    specs = [spec for spec in checkpoint.specs.values() if spec.part == "embedding"]
    return next(spec.name for module in modules for spec in specs if model.module_of(spec.name) is module)


def allocate(model: nn.Module, device: torch.device, sharded_on: torch.device | None = None) -> None:
    """Allocate memory for every tensor on the meta device, for sharded ones elsewhere if so. `to_empty` would part tied tensors."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.device.type != "meta":
                continue
            if id(tensor) not in made:
                is_parameter = isinstance(tensor, nn.Parameter)
                own = sharded_on or device if isinstance(tensor, DTensor) else device
                empty = torch.empty_like(tensor, device=own)
                made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            setattr(module, name, made[id(tensor)])


class Rows(NamedTuple):
    """Rows of a tensor that this process holds: from number `first` on, and of each the part `inner` (empty: all of it)."""

    tensor: torch.Tensor
    first: int = 0
    inner: tuple[slice, ...] = ()


@torch.no_grad()
def fill(
    held: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    own_rows: Callable[[torch.Tensor], Rows] = Rows,
) -> None:
    """Copy a checkpoint into tensors that go by their names in the model; of sharded ones, what `own_rows` gives of each."""
    family, config = checkpoint.family, checkpoint.config
    filled = set()
    for block in family.blocks(config):
        for name in block.module_tensors():
            own = family.module_name(name, config)
            is_copy = block.is_mtp and not own.startswith(MTP_PREFIX)  # of an embedding, in GLM's MTP layer
            if own in held and not is_copy:  # the vision tower is not held
                _fill_rows(own_rows(held[own]), checkpoint, block, name)
                filled.add(id(held[own]))
    unfilled = [name for name, tensor in held.items() if id(tensor) not in filled]
    assert not unfilled, f"{family.model_type}: no tensor fills {unfilled}"


def _fill_rows(rows: Rows, checkpoint: Checkpoint, block: Block, name: str) -> None:
    """Copy rows of a checkpoint tensor, or of the experts that the module holds stacked."""
    numbers = range(rows.first, rows.first + len(rows.tensor))
    if name in checkpoint.specs:
        found = checkpoint.read_slice(name, slice(numbers.start, numbers.stop))
        rows.tensor.copy_(found[(slice(None), *rows.inner)] if rows.inner else found)
        return
    experts = ExpertReader(checkpoint, block)
    for row, expert in zip(rows.tensor, numbers, strict=True):
        row.copy_(torch.cat(experts.read_joined(name.removeprefix(block.prefix), expert))[rows.inner])


def generation_config(folder: Path, backbone: PreTrainedModel) -> GenerationConfig:
    """Read generation_config.json, or else config.json. One that cannot be read is named in a warning and left out."""
    if (folder / "generation_config.json").is_file():
        try:
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of any class: it is the library's verdict
            reason = " ".join(str(error).split())[:200].rstrip(".")
            warn(f"warning: {folder / 'generation_config.json'} cannot be read and is left out: {reason}.")
    return GenerationConfig.from_model_config(backbone.config)


def initialise(config: Config, seed: int, device: str | torch.device = "cpu") -> MtpCausalLM:
    """Make a randomly initialised float32 model of this shape, as Transformers initialises it; the same for the same seed."""
    family = family_of(config, "config.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(family, config, torch.float32, "config.json")
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
    """Return a checkpoint tensor out of the module's tensors: the same one, or one expert's rows of a fused one."""
    own = family.module_name(spec.name, config)
    if own in held:
        return held[own]
    experts = spec.block.experts
    if experts is None or spec.expert is None:
        raise UserError(f"the model holds no tensor '{spec.name}', which its config asks for.")
    own = family.module_name(spec.block.prefix + experts.holder(spec.pattern), config)
    return held[own][spec.expert, experts.rows(spec.pattern, sizes)]
