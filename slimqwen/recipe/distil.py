"""Training: the loss, the optimiser, their course over the run, and what is kept of the teacher."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, WrapValidator, model_validator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from slimqwen.recipe.criteria import DivergenceName, TrainedParts, described
from slimqwen.recipe.section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Tagged,
    as_list,
)
from slimqwen.recipe.units import Duration, TokenCount, in_units

LossTerm = Literal["lm", "kd", "mtp_lm", "mtp_kd"]
OptimizerName = Literal["adamw", "muon", "adamw_8bit"]
TrainedPart = Literal[
    "embedding",
    "norm",
    "attention",
    "deltanet",
    "dense_mlp",
    "router",
    "routed_experts",
    "shared_experts",
    "mtp_projection",
]

AUTO_REFERENCE = 4e-4  # the learning rate that final_learning_rate belongs to where learning_rate is auto
_NUMBER: TypeAdapter[float] = TypeAdapter(PositiveFloat)


def _rate(value: Any, _handler: ValidatorFunctionWrapHandler) -> Any:
    """Read `auto` as it is and all else as a number, so that a wrong number is one problem and not one for each type."""
    if isinstance(value, str) and value != "auto":
        raise ValueError(f'must be a number or auto, is "{value}"')
    return value if value == "auto" else _NUMBER.validate_python(value, strict=True)


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
LearningRate = Annotated[PositiveFloat | Literal["auto"], WrapValidator(_rate)]


class Ramp(Section):
    """A weight that moves over the whole run, up or down; one number is a weight that stays."""

    start: Fraction = Field(description="At the first step of the run.")
    end: Fraction = Field(description="At the last step of the run.")

    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, values: Any) -> Any:
        is_number = isinstance(values, (int, float)) and not isinstance(values, bool)
        return {"start": values, "end": values} if is_number else values


class BatchSizeRamp(Section):
    """A batch that grows at the beginning of the run: `start` sequences, 2 x `start` and so on, to batch_size.

    Each size lasts for the same number of tokens, or the step that passes it.
    """

    start: PositiveInt = Field(description="Sequences of the first optimiser step; divides batch_size.")
    tokens: TokenCount = Field(description="Training tokens before the batch has batch_size sequences.")


class OptimizerRecipe(Tagged):
    """The optimiser; `optimizer: muon` is `optimizer: {kind: muon}`."""

    kind: OptimizerName = Field(
        "adamw",
        description="'muon': PyTorch's Muon for the two-dimensional weights of attention, DeltaNet, dense and shared MLPs and the "
        "MTP projection, its updates scaled to AdamW's (arXiv 2502.16982), and AdamW for all else: vectors, embeddings, routers, "
        "and the routed experts, which are too many small matrices to orthogonalise one by one. "
        "'adamw_8bit': moments in 8 bits, by torchao. Both are for one device.",
    )
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="AdamW's decay of the first moment and of the second."
    )
    weight_decay: NonNegativeFloat = Field(
        0.1, description="AdamW's decay, on matrices only (not norms, biases, A_log, dt_bias)."
    )
    weight_decay_exempt: list[TrainedPart] = Field(
        [], description="Parts of the model whose matrices do not decay either, e.g. [router, embedding]."
    )
    learning_rate_scale: dict[TrainedPart, NonNegativeFloat] = Field(
        {},
        description="Factors on the learning rate by part of the model, e.g. {router: 0.1}; 0 is as to leave the part out of distil.train. Weight decay, "
        "which AdamW multiplies by the learning rate, follows. 'embedding' is lm_head too, 'norm' the norms around the layers' "
        "mixers and MLPs.",
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradients are scaled down to this global norm.")
    at_cut: Literal["reset", "carry"] = Field(
        "reset",
        description="What becomes of AdamW's moments at a stage's cut: they start anew, or they are cut as the weights are and "
        "go on. Carrying takes 8 bytes of disk per parameter while the next stage trains.",
    )

    @model_validator(mode="after")
    def _carries_what_it_can(self) -> "OptimizerRecipe":
        if self.at_cut == "carry" and self.kind != "adamw":
            raise ValueError(f"at_cut: carry is for the optimizer adamw, not for {self.kind}")
        return self


class DivergenceRecipe(Tagged):
    """What the KD terms minimise; `divergence: jsd` is `divergence: {kind: jsd}`."""

    kind: DivergenceName = Field(
        DivergenceName.FORWARD_KL,
        description=described("What the KD terms minimise.", DivergenceName)
        + " The reported kd is KL(teacher || student) in each case.",
    )
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="The teacher's share of the mixture that 'jsd' compares teacher and student with."
    )
    temperature: PositiveFloat = Field(
        1.0, description="Of teacher and student in the KD terms, which are multiplied by its square."
    )


class BalancingCounts(Tagged):
    """Counts of the load-balancing loss; `load_balancing_counts: exact` is `load_balancing_counts: {kind: exact}`."""

    kind: Literal["running", "exact"] = Field(
        "running",
        description="How often each expert was chosen, which the probabilities of a row are multiplied with. 'running': by the rows of the "
        "step up to this one, in portions of `rows` (the buffer of arXiv 2501.11873). 'exact': by all rows of the step; one of several "
        "micro-batches then takes one more forward pass of the student, to count. A step of one portion is the same in both.",
    )
    rows: PositiveInt = Field(
        8,
        description="Of 'running': sequences of a portion. A multiple of it must go through the model at one time, on all devices together "
        "(ranks x execution.micro_batch_size), or the step counts ahead as 'exact' does.",
    )


class TeacherRecipe(Tagged):
    """How the teacher is there while training; `teacher: cache` is `teacher: {kind: cache}`."""

    kind: Literal["live", "cache"] = Field(
        "live",
        description="'live': the teacher runs beside the student. 'cache': its predictions are read from disk, where `slimqwen "
        "teacher-cache` has written them, and the teacher itself is not loaded.",
    )
    top_k: PositiveInt = Field(
        64, description="Of a cache: most likely tokens to keep of each prediction, beside the sum of the others."
    )
    exact: bool = Field(
        False,
        description="Of a cache: log-probabilities as float32 instead of 16 bits. With top_k of the whole vocabulary: the live teacher.",
    )


class DistilRecipe(Section):
    """Training: loss (method.md section 5), optimiser and learning rate (section 6)."""

    tokens: TokenCount = Field(description="Training tokens of the whole run, over all stages: 400B, 2_000_000.")
    batch_size: PositiveInt = Field(8, description="Sequences per optimiser step.")
    batch_size_ramp: BatchSizeRamp | None = Field(
        None,
        description="Begin with fewer sequences per step. What moves over the run, and the stages' shares of it, goes by tokens.",
    )
    terms: list[LossTerm] = Field(
        ["lm", "kd", "mtp_lm", "mtp_kd"],
        min_length=1,
        description="Terms of the loss. Without 'kd' and 'mtp_kd' no teacher is loaded: [lm, mtp_lm] is the LM-only baseline. "
        "Where a head has only one of its two terms, that term has its full weight.",
    )
    teacher: TeacherRecipe = Field(TeacherRecipe(), description="The teacher while training.")
    divergence: DivergenceRecipe = Field(DivergenceRecipe(), description="What the KD terms minimise.")
    kd_weight: Ramp = Field(
        Ramp(start=1.0, end=0.75),
        description="lambda: weight of KD against LM, linear over the run; one number for all of it.",
    )
    mtp_weight: Ramp = Field(
        Ramp(start=0.3, end=0.1),
        description="beta: weight of the MTP terms, cosine over the run; one number for all of it.",
    )
    mtp_target: Literal["main", "mtp"] = Field(
        "main",
        description="What the MTP head learns from: the teacher's next-token distribution, or the teacher's own MTP head.",
    )
    load_balancing_coefficient: NonNegativeFloat = Field(
        0.001, description="Weight of the load-balancing loss over the global batch; 0 turns it off."
    )
    load_balancing_counts: BalancingCounts = Field(
        BalancingCounts(), description="The counts of the load-balancing loss."
    )
    learning_rate: LearningRate = Field(
        4e-4,
        description="Peak learning rate. 'auto': short forks of each stage's training from its own start, at several rates, are "
        "measured on held-out text, by the KL to the teacher where there is one, and the rate is chosen by them. It costs at most "
        "3 % more training tokens; of a short run more, which is said (docs/learning-rate.md).",
    )
    final_learning_rate: NonNegativeFloat = Field(
        3e-5,
        description="Learning rate at the end of the cosine. With learning_rate: auto, for a peak of 4e-4, and scaled with the one "
        "that is chosen.",
    )
    warmup: Annotated[Duration, in_units("steps", "tokens", zero=True)] = Field(
        Duration(2000, "steps"),
        description="Linear warm-up, once per run: '2000 steps', or '8B tokens', which takes the steps that train on as many.",
    )
    train: Annotated[list[TrainedParts], Field(min_length=1), BeforeValidator(as_list)] = Field(
        [TrainedParts.ALL],
        description=described("What is trained, one of these or a list of several:", TrainedParts)
        + " What is not trained has no gradient and no optimiser state; its matrices stay in the student's dtype on disk, and the "
        "result has them bit for bit.",
    )
    optimizer: OptimizerRecipe = Field(OptimizerRecipe(), description="The optimiser.")
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="Also keep an exponential moving average of the weights, in float32: average = decay x average + "
        "(1 - decay) x weights after each step. The average is then what a stage writes, and what the next stage is cut from. "
        "After t steps of a stage the decay is at most (1 + t) / (10 + t), so that the beginning is forgotten. What is measured "
        "on the way (execution.evaluate_every) is the weights themselves. Default: none.",
    )

    @property
    def trained_parts(self) -> set[str]:
        """The parts that are trained, whether the student has them or not; without those whose factor on the learning rate is 0."""
        stopped = {part for part, scale in self.optimizer.learning_rate_scale.items() if scale == 0.0}
        return set().union(*(word.parts for word in self.train)) - stopped

    @property
    def has_mtp_terms(self) -> bool:
        """Whether the loss has a term of the MTP head."""
        return not {"mtp_lm", "mtp_kd"}.isdisjoint(self.terms)

    @property
    def is_taught(self) -> bool:
        """Whether the loss needs a teacher."""
        return not {"kd", "mtp_kd"}.isdisjoint(self.terms)

    @property
    def is_taught_by_mtp(self) -> bool:
        """Whether it needs the teacher's own MTP head too."""
        return self.mtp_target == "mtp" and "mtp_kd" in self.terms

    @property
    def peak_learning_rate(self) -> float:
        """The peak learning rate as a number, which `auto` has none of (`at_learning_rate`)."""
        assert self.learning_rate != "auto", "the learning rate is chosen before the first step"
        return self.learning_rate

    def at_learning_rate(self, rate: float) -> "DistilRecipe":
        """Return the recipe of `learning_rate: auto` at a peak of `rate`; the end rate is scaled with it."""
        end = self.final_learning_rate * rate / AUTO_REFERENCE
        return self.model_copy(update={"learning_rate": rate, "final_learning_rate": end})

    @model_validator(mode="after")
    def _terms_are_distinct(self) -> "DistilRecipe":
        if len(set(self.terms)) < len(self.terms):
            raise ValueError(f"terms names one twice: {', '.join(self.terms)}")
        return self

    @model_validator(mode="after")
    def _learning_rate_falls(self) -> "DistilRecipe":
        peak, name = self.learning_rate, "learning_rate"
        if peak == "auto":
            peak, name = AUTO_REFERENCE, "with learning_rate: auto"
        if self.final_learning_rate > peak:
            raise ValueError(f"final_learning_rate {self.final_learning_rate:g} is more than the peak, {name} {peak:g}")
        return self

    @model_validator(mode="after")
    def _the_ramp_ends_at_the_batch(self) -> "DistilRecipe":
        ramp = self.batch_size_ramp
        if ramp is not None and (ramp.start == self.batch_size or self.batch_size % ramp.start):
            raise ValueError(
                f"batch_size_ramp.start must be a divisor of batch_size {self.batch_size} below it, is {ramp.start}"
            )
        return self
