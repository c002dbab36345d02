"""AdamW's moments, carried over the cut between two stages: cut by the same plan and table as their weights.

A cut selects, and so do the moments, index by index. Where experts are merged, E~ = sum_i w_i E_i, both moments are
merged with the same weights w_i. Of the first, a mean of gradients, that is the same linear map. Of the second, a mean of
squared gradients, it is an upper bound whatever the correlation of the members' gradients, since a square is convex:
(sum_i w_i g_i)^2 <= sum_i w_i g_i^2. So no merged update is larger than those it comes from; with w_i^2, which is
right for independent gradients, it could be.
"""

import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from slimqwen.artifacts import atomic_folder, makes_folder, write_json
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.reader import Checkpoint, open_weights
from slimqwen.core.errors import UserError
from slimqwen.families.family import Config, Family, Layout, TensorSpec
from slimqwen.parallel.sharded_checkpoint import fill_own
from slimqwen.planning.plan import Plan
from slimqwen.pruning.planned import planned_cut
from slimqwen.recipe import OptimizerRecipe
from slimqwen.training.state import saved_states

MOMENTS = ("exp_avg", "exp_avg_sq")
STEPS_FILE = "steps.json"


class Moments:
    """One moment of a saved training state, a `TensorSource` that a cut reads like a checkpoint: float32, experts stacked.

    Tensors that were not trained (a frozen part, a vision tower, a buffer) have no moment and read as zeros. A tensor may be
    spread over the files of several ranks.

    Args:
        state: the folder of one state, `.NAME.state/step-N`.
        trained: the checkpoint that the training wrote, which has the same tensors.
    """

    def __init__(self, state: Path, moment: str, trained: Checkpoint) -> None:
        self.folder = state
        self.moment = moment
        self.family: Family = trained.family
        self.config: Config = trained.config
        self.layouts: dict[str, Layout] = dict.fromkeys(trained.layouts, "fused")
        self.specs: dict[str, TensorSpec] = {spec.name: spec for spec in self.family.tensors(self.config, self.layouts)}
        self._pieces: dict[str, list[tuple[tuple[int, ...], Path]]] = {}
        for index, where in dcp.HuggingFaceStorageReader(str(state)).read_metadata().storage_data.items():
            self._pieces.setdefault(index.fqn, []).append((tuple(index.offset or ()), Path(where.relative_path)))
        files = {file for pieces in self._pieces.values() for _, file in pieces}
        self._handles = {file: open_weights(file) for file in files}
        self._joined = lru_cache(maxsize=2)(self._join)  # a layer's experts are read alternately from two stacks
        self._lock = threading.Lock()

    def read(self, name: str) -> Tensor:
        """Return the moment of one weight; a view of the mapped file where one process saved it."""
        key = f"{self.moment}.{self.family.module_name(name, self.config)}"
        if key not in self._pieces:
            return torch.zeros(self.specs[name].shape)
        with self._lock:
            return self._joined(key)

    def steps(self) -> float:
        """Return AdamW's step count, which is the same for every parameter."""
        return float(self._join(next(key for key in self._pieces if key.startswith("step."))))

    def dtype(self, name: str) -> torch.dtype:
        """Return float32, the dtype of every moment."""
        return torch.float32

    def _join(self, key: str) -> Tensor:
        """Put together the parts that the ranks saved."""
        pieces: list[Tensor] = [self._handles[file].get_tensor(key) for _, file in self._pieces[key]]
        if len(pieces) == 1:
            return pieces[0]
        places = [
            tuple(slice(start, start + size) for start, size in zip(offset, piece.shape, strict=True))
            for (offset, _), piece in zip(self._pieces[key], pieces, strict=True)
        ]
        joined = pieces[0].new_empty([max(place[dim].stop for place in places) for dim in range(pieces[0].dim())])
        for place, piece in zip(places, pieces, strict=True):
            joined[place] = piece
        return joined


@makes_folder("states", "trained", "plan")
def carry(states: Path, trained: Path, out: Path, *, plan: Path, title: str = "moments") -> Path:
    """Cut the moments at the end of a training as `plan` cuts its result; `out` is for `TrainingInputs.moments`.

    `out` holds `exp_avg` and `exp_avg_sq`, each in the form of a checkpoint of the cut model, and the number of steps.
    The cut is streamed, like one of weights.

    Args:
        states: the folder of the training's saved states, `.NAME.state`.
        trained: the checkpoint that it wrote.

    Raises UserError where there is no saved state, and where the plan was made for another checkpoint.
    """
    saved = saved_states(states)
    if not saved:
        raise UserError(
            f"{states} has no training state, which `slimqwen distil --keep-state` and a recipe's distil.optimizer.at_cut: carry "
            f"leave there: train {trained} again, or train on without moments."
        )
    source, chosen = Checkpoint(trained), Plan.load(plan)
    if chosen.checkpoint != source.fingerprint():
        raise UserError(f"{plan} was not made for {trained}: carry moments by the plan that its weights are pruned by.")
    with atomic_folder(out) as folder:
        for name in MOMENTS:
            moments = Moments(saved[-1], name, source)
            (folder / name).mkdir()
            planned_cut(moments, chosen).write(folder / name, f"{title}/{name}")
        write_json(folder / STEPS_FILE, {"steps": moments.steps()})
    return out


def check_moments(folder: Path, student: Checkpoint, settings: OptimizerRecipe) -> None:
    """Raise UserError where `folder` does not hold moments of this student for AdamW."""
    if settings.kind != "adamw":
        raise UserError(f"{folder} holds AdamW's moments, and distil.optimizer is {settings.kind}: leave them out.")
    if not (folder / STEPS_FILE).is_file():
        raise UserError(f"{folder} holds no moments: `slimqwen carry` writes them.")
    found, wanted = _stacked_shapes(Checkpoint(folder / MOMENTS[0])), _stacked_shapes(student)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{folder} holds moments of another shape than {student.folder}: '{name}' is {found.get(name)} there and "
                f"{wanted.get(name)} here; carry them by the plan that the student was pruned by."
            )


def _stacked_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, with experts stacked whatever their layout on disk."""
    layouts: dict[str, Layout] = dict.fromkeys(checkpoint.layouts, "fused")
    return {spec.name: spec.shape for spec in checkpoint.family.tensors(checkpoint.config, layouts)}


@torch.no_grad()
def load_moments(folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Load carried moments into AdamW, on each rank its own rows."""
    for name in MOMENTS:
        fill_own(
            {own: optimizer.state[parameter][name] for own, parameter in parameters.items()}, Checkpoint(folder / name)
        )
    for parameter in parameters.values():
        optimizer.state[parameter]["step"].fill_(read_json(folder / STEPS_FILE)["steps"])
