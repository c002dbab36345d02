"""A whole run, and what is measured at its end."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slimqwen.recipe.data import DataRecipe
from slimqwen.recipe.distil import DistilRecipe
from slimqwen.recipe.execution import Execution
from slimqwen.recipe.pruning import CalibrationRecipe, HealingRecipe, PruningRecipe, Target
from slimqwen.recipe.section import CheckpointField, PathField, PositiveInt, Section, SeedInt
from slimqwen.recipe.text import Dtype, TextSettings
from slimqwen.recipe.units import TokenCount

BUILTIN_TEACHER = "builtin"

Schedule = Literal["one_shot", "depth_first", "width_first", "joint"]
Baseline = Literal["pruned", "paper_pruned", "paper", "random_init", "lm_only"]


class AcceptanceRecipe(Section):
    """How often the backbone accepts the MTP module's drafts, in greedy continuations of held-out prompts."""

    prompts: PositiveInt = Field(32, description="Held-out prompts to continue.")
    prompt_tokens: PositiveInt = Field(64, description="Tokens of each prompt.")
    new_tokens: PositiveInt = Field(64, description="Tokens of each greedy continuation.")
    depth: PositiveInt = Field(4, description="Tokens drafted per position: acc_0 .. acc_{depth-1}.")

    @model_validator(mode="after")
    def _continuations_hold_a_draft(self) -> "AcceptanceRecipe":
        if self.new_tokens <= self.depth:
            raise ValueError(f"new_tokens {self.new_tokens} must be more than depth {self.depth}")
        return self


class EvaluationRecipe(Section):
    """What is measured on held-out text at the end."""

    tokens: TokenCount = Field(65_536, description="Held-out tokens to measure loss, KL and agreement on.")
    acceptance: AcceptanceRecipe = Field(AcceptanceRecipe(), description="Measuring the MTP module's drafts.")


class StageRecipe(Section):
    """One stage of a progressive schedule written out by hand."""

    target: Target = Field(description="The shape that this stage ends with.")
    token_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        description="Share of `distil.tokens` spent after this stage's cut."
    )


class DistilFile(DistilRecipe):
    """The recipe of `slimqwen distil` alone: the `distil` section as a file, with the section `execution` beside its keys."""

    execution: Execution = Field(Execution(), description="How it is carried out.")

    def settings(self) -> DistilRecipe:
        """Return the `distil` section alone."""
        return DistilRecipe.model_validate({name: getattr(self, name) for name in DistilRecipe.model_fields})

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> "DistilFile":
        self.execution.check_batch_size(self.batch_size, "batch_size")
        return self


class Recipe(Section):
    """One run: from a teacher and a target to a smaller model, its evaluation and its report."""

    name: str = Field("slimqwen", description="Shown in the report and on the model card.")
    run_dir: PathField = Field(
        description="Folder of every artefact of the run. In this and every other path ~ is the home folder, $NAME or ${NAME} a "
        "variable, and $$ a dollar sign."
    )
    teacher: CheckpointField = Field(
        BUILTIN_TEACHER, description="A checkpoint folder, or 'builtin': the small teacher inside the package."
    )
    seed: SeedInt = Field(0, description="Seed of the data order and of random initialisation.")
    dtype: Dtype = Field(
        "auto",
        description="Compute dtype of the teacher. 'auto': bfloat16 on a GPU, float32 on a CPU. The student trains in float32.",
    )
    init: Literal["pruned", "random"] = Field(
        "pruned", description="'random': the target shape from random weights, on all the tokens at once."
    )
    target: Target | None = Field(None, description="The final shape. Needed unless `stages` is written out.")
    pruning: PruningRecipe = Field(PruningRecipe(), description="Criteria.")
    schedule: Schedule = Field("depth_first", description="How the cuts are spread over stages (method.md section 7).")
    first_stage_token_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="Share of the tokens spent in the first stage of a two-stage schedule."
    )
    stages: list[StageRecipe] | None = Field(
        None, min_length=1, description="Stages by hand, instead of `target` and `schedule`."
    )
    data: DataRecipe = Field(DataRecipe(), description="Text.")
    calibration: CalibrationRecipe = Field(CalibrationRecipe(), description="Measuring importance.")
    distil: DistilRecipe = Field(description="Training.")
    healing: HealingRecipe | None = Field(
        None,
        description="After the cut (and the refit) train each layer alone, by gradient, so that it ends where its source's does: one layer in "
        "memory at a time. `healing: {}` takes the settings as they are. Default: no healing.",
    )
    baselines: list[Baseline] = Field(
        [],
        description="Also make, on the same tokens: 'pruned' (the final shape in one cut, no training), 'paper' (the same stages "
        "by the paper's criteria), 'paper_pruned' (its final shape in one cut, no training), "
        "'random_init' (the final shape from random weights + KD), 'lm_only' (the same cuts, no teacher). None of them is healed.",
    )
    evaluation: EvaluationRecipe = Field(EvaluationRecipe(), description="Measuring the result.")
    execution: Execution = Field(Execution(), description="How it is carried out.")

    @property
    def text(self) -> TextSettings:
        """How every stage reads the text."""
        data = self.data
        return TextSettings(
            sequence_length=data.sequence_length, documents=data.documents, seed=self.seed, dtype=self.dtype
        )

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> "Recipe":
        self.execution.check_batch_size(self.distil.batch_size)
        return self

    @model_validator(mode="after")
    def _stages_or_target(self) -> "Recipe":
        if (self.target is None) == (self.stages is None):
            raise ValueError("give exactly one of 'target' (with 'schedule') and 'stages'")
        if self.stages is not None:
            total = sum(stage.token_fraction for stage in self.stages)
            if abs(total - 1.0) > 1e-6:
                raise ValueError(f"the stages' token_fraction must sum to 1, not {total:g}")
            if self.init == "random":
                raise ValueError("'init: random' trains one shape on all the tokens: give 'target' instead of 'stages'")
        if {"paper", "paper_pruned"} & set(self.baselines) and self.pruning == self.pruning.as_published():
            raise ValueError("baselines: 'paper' and 'paper_pruned' are this run itself: its pruning is the paper's")
        return self


class PretrainRecipe(Section):
    """A teacher from nothing: tokenizer, random weights, language modelling. The built-in teacher was made by one."""

    name: str = Field("pretrain", description="Shown with the progress.")
    run_dir: PathField = Field(description="Folder of every artefact of the run; the result is its `final/`.")
    seed: SeedInt = Field(0, description="Seed of the weights and of the data order.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Of the final weights; training is in float32."
    )
    config: dict[str, Any] = Field(description="The model's config.json; vocab_size is also the tokenizer's.")
    tokenizer_documents: PositiveInt = Field(4000, description="Training documents that the tokenizer learns from.")
    data: DataRecipe = Field(DataRecipe(), description="Text.")
    training: DistilRecipe = Field(description="Training; terms must be among lm and mtp_lm: there is no teacher.")
    execution: Execution = Field(Execution(), description="How it is carried out.")

    @property
    def text(self) -> TextSettings:
        """How the training reads the text; there is no teacher that would have a dtype."""
        return TextSettings(sequence_length=self.data.sequence_length, documents=self.data.documents, seed=self.seed)

    @model_validator(mode="after")
    def _no_teacher(self) -> "PretrainRecipe":
        if not set(self.training.terms) <= {"lm", "mtp_lm"}:
            raise ValueError("training.terms must be among lm and mtp_lm: pretraining has no teacher")
        self.execution.check_batch_size(self.training.batch_size, "training.batch_size")
        return self
