"""The optimiser of a student's parameters: which of them are trained, at which rate, and by which algorithm."""

import importlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families import Config, Family
from slimqwen.families.family import Layout, Part
from slimqwen.model.model import MtpCausalLM
from slimqwen.model.mtp import MTP_PREFIX
from slimqwen.recipe import DistilRecipe, OptimizerRecipe
from slimqwen.recipe.distil import TrainedPart

EPS = 1e-8
# Muon is for matrices that map hidden states to hidden states. Embeddings, lm_head and routers map from or to tokens and
# experts. An 80B has 49,152 matrices of routed experts: torch's Muon would update them one by one, with 20 kernels each.
MUON_PARTS: set[Part] = {"attention", "deltanet", "dense_mlp", "shared_experts", "mtp_projection"}


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimisers as one, each with its own parameters: all groups, one state, one step."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = optimizers
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no caller here reads a loss
        """Make a step of every optimiser."""
        for optimizer in self.optimizers:
            optimizer.step(closure)


def build_optimizer(
    parameters: Mapping[str, Tensor], parts: Mapping[str, Part], settings: OptimizerRecipe
) -> torch.optim.Optimizer:
    """Build the recipe's optimiser, its state allocated as before the first step.

    Weight decay applies to matrices, not to norms, biases, A_log and dt_bias, which are all vectors. Each group has its
    `learning_rate_scale` (`set_learning_rate`).

    Args:
        parts: the part of the model that each parameter belongs to (`parts_of`).
    """
    first, second = settings.betas
    betas = (first, second)
    by_muon = {
        name: parameter
        for name, parameter in parameters.items()
        if settings.kind == "muon" and parts[name] in MUON_PARTS and parameter.dim() == 2
    }
    others = {name: parameter for name, parameter in parameters.items() if name not in by_muon}
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        groups = _group_parameters(others, parts, settings)
        if settings.kind == "adamw_8bit":
            optimizers.append(import_adamw_8bit()(groups, betas=betas, eps=EPS))
        else:
            optimizers.append(torch.optim.AdamW(groups, betas=betas, eps=EPS, fused=True))
    if by_muon:
        optimizers.append(torch.optim.Muon(_group_parameters(by_muon, parts, settings), adjust_lr_fn="match_rms_adamw"))
    optimizer = optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(*optimizers)
    _allocate_state(optimizer)
    return optimizer


def import_adamw_8bit() -> Any:
    """Import torchao's AdamW8bit. Raises UserError where torchao is not installed."""
    try:
        return importlib.import_module("torchao.optim").AdamW8bit
    except ImportError as error:
        raise UserError(
            f"distil.optimizer adamw_8bit needs torchao ({error}): `pip install torchao`, or choose adamw."
        ) from error


def parts_of(family: Family, config: Config) -> dict[str, Part]:
    """Return the part of the model that each parameter belongs to, by the parameter's name in the model."""
    stacked: dict[str, Layout] = {block.name: "fused" for block in family.moe_blocks(config)}
    return {family.module_name(spec.name, config): spec.part for spec in family.tensors(config, stacked)}


def untrained(checkpoint: Checkpoint, recipe: DistilRecipe) -> set[str]:
    """Return the names of the tensors that the recipe does not train; the MTP module's too, where the loss has no MTP term."""
    family, config = checkpoint.family, checkpoint.config
    return {
        name
        for name, part in parts_of(family, config).items()
        if part not in recipe.trained_parts or (name.startswith(MTP_PREFIX) and not recipe.has_mtp_terms)
    }


def untrained_parts(family: Family, config: Config, recipe: DistilRecipe) -> tuple[TrainedPart, ...]:
    """Return the parts of a model that the recipe does not train."""
    found = set(parts_of(family, config).values())
    return tuple(part for part in get_args(TrainedPart) if part in found and part not in recipe.trained_parts)


def freeze_untrained(
    model: MtpCausalLM, parts: Mapping[str, Part], trained_parts: Collection[str], *, with_mtp: bool
) -> dict[str, Tensor]:
    """Freeze the parameters of all other parts than `trained_parts`, and return those of these by name."""
    trained = {}
    for name, parameter in model.tensors(with_mtp).items():
        if parts[name] in trained_parts:
            trained[name] = parameter
        else:
            parameter.requires_grad_(False)
    return trained


def check_trained(recipe: DistilRecipe, student: Checkpoint) -> None:
    """Raise UserError where `distil.train` names a part that the student lacks, and where nothing of the student is trained."""
    parts = parts_of(student.family, student.config)
    found = set(parts.values())
    for word in recipe.train:
        if not word.parts & found:
            raise UserError(
                f"distil.train names '{word}', which {student.folder} lacks: its parts are {', '.join(sorted(found))}."
            )
    if not {name for name, part in parts.items() if part != "vision"} - untrained(student, recipe):
        raise UserError(
            f"distil.train [{', '.join(recipe.train)}] leaves nothing to train of {student.folder}: name another part, or leave "
            "distil.train out; distil.optimizer.learning_rate_scale 0 freezes a part too, and without an MTP term the MTP module is frozen."
        )


def check_optimizer(settings: OptimizerRecipe, student: Checkpoint, ranks: int = 1, *, offloads: bool = False) -> None:
    """Raise UserError for parts that the student lacks, and for an optimiser that is missing or does not support sharded weights."""
    parts = set(parts_of(student.family, student.config).values())
    for setting in ("weight_decay_exempt", "learning_rate_scale"):
        for part in getattr(settings, setting):
            if part not in parts:
                raise UserError(
                    f"distil.optimizer.{setting} names '{part}', which {student.folder} lacks: its parts are {', '.join(sorted(parts))}."
                )
    if all(_scale(settings, part) == 0.0 for part in parts - {"vision"}):
        raise UserError(
            "distil.optimizer.learning_rate_scale is 0 for every part of the model: leave out one that is to be trained."
        )
    if settings.kind == "adamw_8bit":
        import_adamw_8bit()
    if settings.kind != "adamw" and ranks > 1:  # PyTorch's Muon 2.13 cannot write its update into sharded matrices
        raise UserError(
            f"distil.optimizer {settings.kind} is for one device, and there are {ranks} ranks: choose adamw."
        )
    if settings.kind == "muon" and offloads:  # whose weights are sharded, over one rank
        raise UserError("distil.optimizer muon does not go with execution.offload: choose adamw, or leave offload out.")


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set every group's learning rate, times its `learning_rate_scale`."""
    for group in optimizer.param_groups:
        scaled = learning_rate * group["learning_rate_scale"]
        if isinstance(group["lr"], Tensor):  # torchao's compiled step reads this very tensor
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def _scale(settings: OptimizerRecipe, part: Part) -> float:
    """Return a part's factor on the learning rate."""
    return next((scale for name, scale in settings.learning_rate_scale.items() if name == part), 1.0)


def _group_parameters(
    parameters: Mapping[str, Tensor], parts: Mapping[str, Part], settings: OptimizerRecipe
) -> list[dict[str, Any]]:
    """Group the parameters by weight decay and factor on the learning rate; sharded ones apart, as no kernel takes both."""
    groups: dict[tuple[float, float, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in parameters.items():
        decays = parameter.dim() >= 2 and parts[name] not in settings.weight_decay_exempt
        decay = settings.weight_decay if decays else 0.0
        groups[decay, _scale(settings, parts[name]), isinstance(parameter, DTensor)].append(parameter)
    return [
        {"params": members, "weight_decay": decay, "learning_rate_scale": scale}
        for (decay, scale, _), members in groups.items()
    ]


@torch.no_grad()
def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the optimiser's state, so that it can be saved, loaded and extended before the first step.

    PyTorch's optimisers allocate it in their first step. One with zero gradients at learning rate 0 changes no weight, and
    leaves zeros once its step count is reset.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
