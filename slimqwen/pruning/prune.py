"""The stage `prune`: a checkpoint and a plan in, a smaller checkpoint out, MTP module included, tensor by tensor."""

from pathlib import Path

import torch

from slimqwen.artifacts import atomic_folder, check_replaceable
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.writer import CheckpointWriter, copy_companions
from slimqwen.errors import UserError
from slimqwen.families.axes import Axis, Stack
from slimqwen.families.family import Block, Config, TensorSpec
from slimqwen.families.slicing import select
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.plan import Plan
from slimqwen.progress import Progress


def prune(checkpoint: Path, out: Path, *, plan: Path | Plan, title: str = "prune") -> Path:
    """Write the checkpoint that `plan` leaves of `checkpoint`, in the same layout and dtypes; returns `out`.

    Raises UserError where the plan was made for another checkpoint.
    """
    check_replaceable(out, checkpoint)
    source = Checkpoint(checkpoint)
    chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
    if chosen.checkpoint != source.fingerprint():
        raise UserError(f"the plan was not made for {checkpoint}: run `slimqwen plan` on it first.")
    check_plan(chosen, source)
    cut = Cut(source, chosen.kept_layers, chosen.kept, chosen.expert_groups, chosen.target.num_experts_per_tok)
    with atomic_folder(out) as folder:
        cut.write(folder, title)
        copy_companions(checkpoint, folder)
    return out


def check_plan(plan: Plan, source: Checkpoint) -> None:
    """Raise UserError where a plan, edited by hand perhaps, names what the checkpoint does not have."""
    sizes = source.family.sizes(source.config)
    by_name = {axis.name: size for axis, size in sizes.items()}
    experts = sizes[source.family.expert]
    kept_blocks = [b.name for b in source.family.moe_blocks(source.config) if b.layer in (None, *plan.kept_layers)]

    def within(indices: list[int], size: int) -> bool:
        return bool(indices) and len(set(indices)) == len(indices) and all(0 <= index < size for index in indices)

    problems = {
        "kept_layers": within(plan.kept_layers, source.config["num_hidden_layers"]),
        "kept": all(name in by_name and within(kept, by_name[name]) for name, kept in plan.kept.items()),
        "the blocks of expert_groups": set(plan.expert_groups) == set(kept_blocks),
        "expert_groups": all(
            len(groups) == plan.target.num_experts and all(within(group.members, experts) for group in groups)
            for groups in plan.expert_groups.values()
        ),
        "target.num_experts_per_tok": 1 <= (plan.target.num_experts_per_tok or 0) <= (plan.target.num_experts or 0),
    }
    wrong = [name for name, fits in problems.items() if not fits]
    if wrong:
        raise UserError(
            f"the plan does not fit {source.folder}, in {', '.join(wrong)}: make it again with `slimqwen plan`."
        )


class Cut:
    """A selection of layers, axes and expert groups of one checkpoint, ready to produce any tensor of the result.

    kept_layers: source layers in their new order. kept: axis name -> indices for the whole model, or block name ->
    indices, or, for axes with a set per enclosing unit, block name -> a list of lists. expert_groups: block name ->
    the groups that become its experts, in order; blocks not named keep theirs.
    """

    def __init__(
        self,
        source: Checkpoint,
        kept_layers: list[int],
        kept: dict[str, list[int] | dict[str, list[int] | list[list[int]]]] | dict[str, list[int]],
        expert_groups: dict[str, list[ExpertGroup]],
        num_experts_per_tok: int | None = None,
    ) -> None:
        self.source = source
        self.family = source.family
        self.sizes = self.family.sizes(source.config)
        self.kept_layers = kept_layers
        self.expert_groups = expert_groups
        axes = {axis.name: axis for axis in self.sizes}
        self._kept = {axes[name]: indices for name, indices in kept.items()}
        self.config = self._new_config(num_experts_per_tok or source.config["num_experts_per_tok"])
        self.layouts = {
            block.name: source.layouts[self._source_name(block)] for block in self._blocks() if block.experts
        }

    def write(self, folder: Path, title: str) -> None:
        """Write every tensor of the result into an existing (temporary) folder."""
        specs = list(self.family.tensors(self.config, self.layouts))
        writer = CheckpointWriter(folder)
        with Progress(title, total=len(specs), unit="tensors") as progress:
            for spec in specs:
                writer.add(spec.name, self.tensor(spec))
                progress.advance(1)
            writer.finish(self.config)

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """One tensor of the result, pulled out of the source.

        Experts are merged where their group has several members: E~ = sum_i w_i E_i per weight tensor, in float32
        (method.md section 4). All else, router rows included, is selected.
        """
        block = self._source_name(spec.block)
        prefix = block + "." if block else ""
        kept = self._kept_in(block)
        groups = self._groups(block) if spec.part == "routed_experts" else []
        if spec.expert is not None:  # one tensor per expert on disk
            members = groups[spec.expert]
            names = [prefix + spec.pattern.format(expert=expert) for expert in members.members]
            return _merged(
                [
                    select(self.source.read(name), spec.dims, self.sizes, kept, unit=expert)
                    for name, expert in zip(names, members.members, strict=True)
                ],
                members.weights,
            )
        tensor = self.source.read(prefix + spec.pattern)
        if isinstance(spec.dims[0], Stack):  # experts stacked in one tensor: the same, slice by slice
            return torch.stack(
                [
                    _merged(
                        [select(tensor[e], spec.dims[1:], self.sizes, kept, unit=e) for e in group.members],
                        group.weights,
                    )
                    for group in groups
                ]
            )
        return select(tensor, spec.dims, self.sizes, kept)

    def _new_config(self, num_experts_per_tok: int) -> Config:
        sizes = dict(self.sizes)
        for axis, indices in self._kept.items():
            sizes[axis] = _count(indices)
        expert_counts = {len(groups) for groups in self.expert_groups.values()}
        assert len(expert_counts) <= 1, "config.json has one num_experts for all layers"
        for number in expert_counts:
            sizes[self.family.expert] = number
        return self.family.resized(self.source.config, sizes, self.kept_layers, num_experts_per_tok)

    def _blocks(self) -> list[Block]:
        return self.family.blocks(self.config)

    def _source_name(self, block: Block) -> str:
        """The block of the source that a block of the result comes from."""
        if block.layer is None:
            return block.name
        return next(b.name for b in self.family.blocks(self.source.config) if b.layer == self.kept_layers[block.layer])

    def _groups(self, block: str) -> list[ExpertGroup]:
        if block in self.expert_groups:
            return self.expert_groups[block]
        return [ExpertGroup(base=e, members=[e], weights=[1.0]) for e in range(self.sizes[self.family.expert])]

    def _kept_in(self, block: str) -> dict[Axis, torch.Tensor]:
        """Kept indices per axis, as they apply to one block's tensors."""
        kept = {}
        for axis, indices in self._kept.items():
            here = indices.get(block) if isinstance(indices, dict) else indices
            if here is not None:
                kept[axis] = torch.tensor(here)
        if block in self.expert_groups:
            kept[self.family.expert] = torch.tensor([group.base for group in self.expert_groups[block]])
        return kept


def _merged(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0]
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.to(total.dtype)
    return total.to(tensors[0].dtype)


def _count(indices: object) -> int:
    """Number of kept units, whatever the nesting: it is the same in every block and unit (one scalar per config)."""
    while isinstance(indices, dict):
        indices = next(iter(indices.values()))
    assert isinstance(indices, list)
    return len(indices[0]) if isinstance(indices[0], list) else len(indices)
