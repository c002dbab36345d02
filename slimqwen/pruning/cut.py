"""A selection of layers, axes and expert groups of one checkpoint: what each tensor of the result is made of."""

from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path

import torch

from slimqwen.checkpoint.shards import DEFAULT_SHARD_BYTES, TensorInfo
from slimqwen.checkpoint.source import ExpertReader, TensorSource
from slimqwen.checkpoint.writer import CheckpointWriter
from slimqwen.core.errors import UserError
from slimqwen.families.axes import Axis, Term, axes_of, size
from slimqwen.families.family import Config, Layout, TensorSpec
from slimqwen.families.slicing import kept_indices
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.units import Units
from slimqwen.pruning.residual import Residual
from slimqwen.pruning.rows import All, Kept, Project, Select, merge
from slimqwen.pruning.stream import Matrix, Piece, batches_of, stream

MERGED_AT_ONCE = 1 << 18  # elements, whose float32 sums stay in a core's cache: a third faster than a whole expert


class Cut:
    """What remains of a checkpoint, ready to produce any rows of any tensor of it.

    Args:
        kept_layers: source layers in their new order.
        kept: axis name -> the units that stay, blocks by their source name. Where every expert keeps neurons of its
            own, all members of a group are cut to their base's: a mean of different neurons would be neither.
        expert_groups: source block name -> the groups that become its experts, in order; blocks not named keep theirs.
        num_experts_per_tok: top-k of the result; None: the source's.
        layout: how experts lie in the result; None: block by block as in the source.
        residual: what is done to the residual stream beyond choosing channels; with a rotation, `kept` of the
            hidden axis numbers the coordinates that stay.

    Raises UserError where experts are to be stacked that have different dtypes.
    """

    def __init__(
        self,
        source: TensorSource,
        kept_layers: list[int],
        kept: Mapping[str, Units],
        expert_groups: Mapping[str, list[ExpertGroup]],
        num_experts_per_tok: int | None = None,
        layout: Layout | None = None,
        residual: Residual | None = None,
    ) -> None:
        self.source = source
        self.residual = residual
        self.family = source.family
        self.sizes = self.family.sizes(source.config)
        axes = {axis.name: axis for axis in self.sizes}
        self._kept = {axes[name]: units for name, units in kept.items()}
        self._expert_groups = expert_groups
        self.config = self._new_config(kept_layers, num_experts_per_tok or source.config["num_experts_per_tok"])
        self.new_sizes = self.family.sizes(self.config)
        self._sources = self.family.sources(source.config, self.config, kept_layers)
        self.layouts = {
            name: layout or source.layouts[block.name] for name, block in self._sources.items() if block.experts
        }
        self._kept_in = cache(self._kept_in_block)
        self._groups = cache(self._groups_of_block)
        self._experts = {
            block.name: ExpertReader(source, block) for block in self._sources.values() if block.experts is not None
        }
        self.specs = {spec.name: spec for spec in self.family.tensors(self.config, self.layouts)}
        self.tensors = [TensorInfo(spec.name, self._dtype(spec), spec.shape) for spec in self.specs.values()]

    def write(self, folder: Path, title: str, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        """Write the result into an existing (temporary) folder; complete shards that are there already stay."""
        with CheckpointWriter(folder, self.tensors, shard_bytes) as writer:
            self.stream(writer, title)
            writer.finish(self.family.to_disk(self.config))

    def stream(self, writer: CheckpointWriter, title: str) -> None:
        """Make and write the tensors that the writer misses."""
        matrices = (matrix for tensor in writer.missing() for matrix in self._matrices(self.specs[tensor.name]))
        stream(writer, batches_of(matrices), sources=self._sources_of, make=self.rows, title=title)

    def tensor(self, name: str) -> torch.Tensor:
        """Make one whole tensor of the result."""
        rows = [self.rows(Piece(matrix, 0, matrix.rows)) for matrix in self._matrices(self.specs[name])]
        return torch.cat(rows).reshape(self.specs[name].shape)

    def rows(self, piece: Piece) -> torch.Tensor:
        """Make some rows of a matrix of the result, `[stop - start, ...]`, from the source.

        Experts are merged where their group has several members: E~ = sum_i w_i E_i per weight tensor, in float32
        (method.md section 4), cast once. All else, router rows included, is selected. Where the residual stream is
        rotated, its dimensions are multiplied instead.
        """
        matrix = piece.matrix
        if self.residual is not None and self._is_residual_norm(matrix):
            return self._norm(matrix)[piece.start : piece.stop]
        weights = [1.0] if matrix.group is None else matrix.group.weights
        sources = self._sources_of(matrix)
        kept_rows, *kept_others = (self._kept_of(term, matrix, sources[0].dtype) for term in matrix.dims)
        projects_rows = isinstance(kept_rows, Project)  # then a row of the result is made of all rows of the sources

        def make(start: int, stop: int) -> torch.Tensor:
            rows = kept_rows.part(start, stop)
            tensors = sources if projects_rows else [rows.apply(tensor, 0) for tensor in sources]
            result = tensors[0] if len(tensors) == 1 else merge(tensors, weights)
            for dim, kept in enumerate(kept_others, start=1):
                result = kept.apply(result, dim)
            if projects_rows:
                result = rows.apply(result, 0)
            return result.to(sources[0].dtype)

        if len(sources) == 1 or projects_rows:
            return make(piece.start, piece.stop)
        step = max(1, MERGED_AT_ONCE // sources[0][0].numel())
        return torch.cat([make(at, min(at + step, piece.stop)) for at in range(piece.start, piece.stop, step)])

    def _kept_of(self, term: Term, matrix: Matrix, dtype: torch.dtype) -> Kept:
        """Return what becomes of a dimension: products where the residual stream is rotated, the units that stay elsewhere."""
        if self.residual is not None and self.residual.is_rotated and self.family.hidden in axes_of(term):
            return Project(self.residual.matrix(term, matrix.block, self.specs[matrix.name].part, dtype))
        unit = None if matrix.group is None else matrix.group.base
        indices = kept_indices(term, self.sizes, self._kept_in(matrix.block.name), unit)
        return All() if indices is None else Select(indices)

    def _is_residual_norm(self, matrix: Matrix) -> bool:
        return self.specs[matrix.name].part == "norm" and matrix.dims == (self.family.hidden,)

    def _norm(self, matrix: Matrix) -> torch.Tensor:
        """Make the weight of a norm over the residual stream."""
        assert self.residual is not None
        name = matrix.block.prefix + matrix.pattern
        weight = self.source.read(name)
        kept = self._kept_in(matrix.block.name).get(self.family.hidden)
        return self.residual.norm(name, weight if kept is None else weight[kept])

    def _matrices(self, spec: TensorSpec) -> Iterator[Matrix]:
        """Yield a tensor of the result as one matrix; one of stacked experts as theirs, one below the other."""
        block = self._sources[spec.block.name]
        if spec.expert is None and spec.part == "routed_experts":
            assert block.experts is not None
            row_bytes = spec.shape[2] * self._dtype(spec).itemsize
            first_row = 0
            for group in self._groups(block.name):
                for pattern in block.experts.fused[spec.pattern]:
                    dims = block.experts.per_expert[pattern]
                    rows = size(dims[0], self.new_sizes)
                    yield Matrix(spec.name, first_row, rows, row_bytes, block, pattern, dims, group)
                    first_row += rows
        else:
            row_bytes = prod(spec.shape[1:]) * self._dtype(spec).itemsize
            own = None if spec.expert is None else self._groups(block.name)[spec.expert]
            yield Matrix(spec.name, 0, spec.shape[0], row_bytes, block, spec.pattern, spec.dims, own)

    def _dtype(self, spec: TensorSpec) -> torch.dtype:
        """Return the dtype of a tensor of the result: its source's; its base's, of a mean."""
        block = self._sources[spec.block.name]
        if spec.part != "routed_experts":
            return self.source.dtype(block.prefix + spec.pattern)
        groups, experts = self._groups(block.name), self._experts[block.name]
        if spec.expert is not None:
            return self.source.dtype(experts.stored_name(spec.pattern, groups[spec.expert].base))
        assert block.experts is not None
        joined = block.experts.fused[spec.pattern]
        stacked = [experts.stored_name(part, group.base) for part in joined for group in groups]
        by_dtype = {self.source.dtype(name): name for name in stacked}
        if len(by_dtype) > 1:
            differing = " and ".join(f"'{name}' is {dtype}" for dtype, name in by_dtype.items())
            raise UserError(
                f"{self.source.folder}: {differing.replace('torch.', '')}, and what is stacked in one tensor has one "
                "dtype: keep the layout per_expert."
            )
        return next(iter(by_dtype))

    def _sources_of(self, matrix: Matrix) -> list[torch.Tensor]:
        """Return the tensors that a matrix is selected or merged from, the base's first: views of the mapped files."""
        block, pattern = matrix.block, matrix.pattern
        if matrix.group is None:
            return [self.source.read(block.prefix + pattern)]
        return [self._experts[block.name].read(pattern, expert) for expert in matrix.group.members]

    def _new_config(self, kept_layers: list[int], num_experts_per_tok: int) -> Config:
        sizes = dict(self.sizes)
        for axis, units in self._kept.items():
            sizes[axis] = _count(units)
        expert_counts = {len(groups) for groups in self._expert_groups.values()}
        assert len(expert_counts) <= 1, "config.json has one num_experts for all layers"
        for number in expert_counts:
            sizes[self.family.expert] = number
        return self.family.resized(self.source.config, sizes, kept_layers, num_experts_per_tok)

    def _groups_of_block(self, block: str) -> list[ExpertGroup]:
        if block in self._expert_groups:
            return self._expert_groups[block]
        return [ExpertGroup(base=e, members=[e], weights=[1.0]) for e in range(self.sizes[self.family.expert])]

    def _kept_in_block(self, block: str) -> dict[Axis, torch.Tensor]:
        """Return the kept indices per axis, as they apply to one block's tensors."""
        kept = {}
        for axis, units in self._kept.items():
            here = units.get(block) if isinstance(units, Mapping) else units
            if here is not None:
                kept[axis] = torch.tensor(here)
        if block in self._expert_groups:
            kept[self.family.expert] = torch.tensor([group.base for group in self._expert_groups[block]])
        return kept


def _count(units: Units) -> int:
    """Return the number of kept units, whatever the nesting: it is the same in every block and unit (one scalar per config)."""
    indices = next(iter(units.values())) if isinstance(units, Mapping) else units
    return len(indices[0]) if isinstance(indices[0], list) else len(indices)
