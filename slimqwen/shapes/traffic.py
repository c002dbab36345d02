"""What each GPU receives from others while it trains, predicted from the configs and the settings. No weights, no torch."""

from pydantic import BaseModel, ConfigDict, computed_field

from slimqwen.shapes.training_memory import Model, TrainingSettings

FLOAT32 = 4


class Traffic(BaseModel):
    """The bytes that a GPU receives from others: of a group of n, (n - 1) / n of the tensor that is gathered, summed or exchanged.

    gathered_bytes, experts_gathered_bytes: weights, of one micro-batch: the student's in the forward and in the backward pass (once
        where it is not resharded), the teacher's in its forward pass; what surrounds the student's layers once, and the teacher's, which stays gathered, not. The routed experts' apart: where ranks
        share them, the rest of each share is gathered among the ranks that have the same one.
    reduced_bytes, experts_reduced_bytes: gradients in float32, of one micro-batch.
    exchanged_bytes: rows of tokens on their way to experts and back, of one micro-batch: two exchanges per layer and pass, over the
        passes of the student (forward, backward, recomputation) and the teacher's one.
    all_reduced_bytes: gradients between copies of the model, once per step; as in a ring, twice the share of a rank.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gathered_bytes: int
    experts_gathered_bytes: int
    reduced_bytes: int
    experts_reduced_bytes: int
    exchanged_bytes: int
    all_reduced_bytes: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def micro_batch_bytes(self) -> int:
        """The bytes of one micro-batch, all together."""
        gathered = self.gathered_bytes + self.experts_gathered_bytes
        return gathered + self.reduced_bytes + self.experts_reduced_bytes + self.exchanged_bytes


def predict_traffic(student: Model, teacher: Model | None, settings: TrainingSettings) -> Traffic:
    """Predict what a GPU receives, from the numbers of `training_memory.measure`."""
    share, experts = settings.copy_ranks, settings.expert_ranks
    same = share // experts  # ranks that have the same experts
    compute = settings.precision.compute_bytes
    trained, live = student.weights.all, teacher if settings.teacher == "live" else None
    passes = (2 if settings.reshard_student else 1) + settings.counts_ahead
    dense = passes * sum(unit.dense for unit in student.weights.layers) + student.weights.around.total
    routed = passes * sum(unit.routed for unit in student.weights.layers)
    exchanges = _exchange(student, settings, 2 + settings.counts_ahead, with_mtp=True)
    if settings.recompute_activations:
        exchanges += _exchange(student, settings, 1, with_mtp=False)
    if live is not None:
        if settings.reshard_teacher:
            run = live.weights.layers[: len(live.layers)]  # without MTP
            dense += sum(unit.dense for unit in run)
            routed += sum(unit.routed for unit in run)
        exchanges += _exchange(live, settings, 1, with_mtp=False)
    copies = settings.gpus // share
    own = FLOAT32 * trained.trained // share
    return Traffic(
        gathered_bytes=_received(compute * dense, share),
        experts_gathered_bytes=_received(compute * routed // experts, same),
        reduced_bytes=_received(FLOAT32 * trained.trained_dense, share),
        experts_reduced_bytes=_received(FLOAT32 * trained.trained_routed // experts, same),
        exchanged_bytes=_received(exchanges, experts),
        all_reduced_bytes=2 * _received(own, copies),
    )


def _received(size: int, ranks: int) -> int:
    """Return the share of a tensor that a rank receives from the other ranks."""
    return size * (ranks - 1) // ranks


def _exchange(model: Model, settings: TrainingSettings, passes: int, *, with_mtp: bool) -> int:
    """Return the bytes of the rows that go to experts and back in so many passes, those that stay on their rank included."""
    units = model.weights.layers if with_mtp else model.weights.layers[: len(model.layers)]
    blocks = sum(unit.routed > 0 for unit in units)
    row = settings.precision.compute_bytes * model.hidden
    return 2 * passes * blocks * settings.tokens * model.num_experts_per_tok * row
