"""The cut: the shape to reach, what importance is measured on, and the criterion for each axis."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from slimqwen.core import strict_yaml
from slimqwen.recipe.criteria import (
    DepthCriterion,
    ExpertCompression,
    ExpertImportance,
    ExpertSimilarity,
    WidthCriterion,
    described,
)
from slimqwen.recipe.distil import LearningRate
from slimqwen.recipe.section import NonNegativeFloat, PathField, PositiveInt, Section

PAPER = Path(__file__).with_name("paper.yaml")  # the criteria of SlimQwen as published, as a `pruning` section


class CalibrationRecipe(Section):
    """The forward pass that the importance scores are measured on."""

    sources: dict[str, PathField] = Field(
        {},
        description="Text to measure on, by name: folders written by `slimqwen tokens`. Statistics are kept apart per source. "
        "Default: the training text, each of its sources apart where they have weights.",
    )
    samples: PositiveInt = Field(
        1024, description="Sequences to measure on (the paper: 1,024), spread evenly over the sources."
    )
    depth_samples: PositiveInt = Field(
        32, description="With `depth: measured`: sequences to measure on what leaving layers out does."
    )


class Target(Section):
    """The shape to reach; a field left out keeps the source's value. Names are config.json's, Qwen's in every family."""

    num_hidden_layers: PositiveInt | None = Field(None, description="Decoder layers.")
    hidden_size: PositiveInt | None = Field(None, description="Width of the residual stream.")
    num_experts: PositiveInt | None = Field(None, description="Routed experts per MoE block.")
    num_experts_per_tok: PositiveInt | None = Field(None, description="Experts that each token is routed to (top-k).")
    moe_intermediate_size: PositiveInt | None = Field(None, description="Neurons of a routed expert.")
    shared_expert_intermediate_size: PositiveInt | None = Field(None, description="Neurons of the shared expert.")
    intermediate_size: PositiveInt | None = Field(None, description="Neurons of a dense layer, where there are any.")
    num_key_value_heads: PositiveInt | None = Field(
        None, description="KV heads of full attention; each takes its query heads along."
    )
    num_attention_heads: PositiveInt | None = Field(
        None, description="Query heads of full attention. Default: as many per KV head as the source has."
    )
    linear_num_key_heads: PositiveInt | None = Field(
        None, description="Key heads of linear attention; each takes its value heads along."
    )
    linear_num_value_heads: PositiveInt | None = Field(
        None, description="Value heads of linear attention. Default: as many per key head as the source has."
    )


class ExpertRecipe(Section):
    """Which experts stay and what becomes of the others (method.md section 4)."""

    importance: ExpertImportance = Field(
        ExpertImportance.SOFT_LOGITS, description=described("How an expert is scored.", ExpertImportance)
    )
    compression: ExpertCompression = Field(
        ExpertCompression.PRUNE,
        description=described("What becomes of the experts that are not the best.", ExpertCompression),
    )
    similarity: ExpertSimilarity = Field(
        ExpertSimilarity.EXPERT_OUTPUT,
        description=described("What merging compares of two experts, by cosine.", ExpertSimilarity),
    )
    keep_outliers: bool = Field(
        True,
        description="Keep experts whose mean output is more than 5 times their layer's median, whatever their importance: some write the "
        "massive activations of first tokens, and few tokens go to them. (The paper has none of it.)",
    )


class HealingRecipe(Section):
    """Training every layer of the cut model alone, towards the teacher's residual stream (docs/healing.md)."""

    samples: PositiveInt = Field(512, description="Sequences of the calibration text, spread evenly over its sources.")
    epochs: PositiveInt = Field(2, description="Times that each layer sees them.")
    batch_size: PositiveInt = Field(8, description="Sequences per optimiser step.")
    learning_rate: LearningRate = Field(
        "auto",
        description="AdamW's, at its peak: a short warm-up comes before it, and half a cosine to 0 after it. 'auto': each layer is trained for "
        "a tenth of the steps at several rates first, and its error on sequences left out decides.",
    )


class PruningRecipe(Section):
    """The criterion for each axis. What is left out is slimqwen's own choice, which left the smallest error."""

    depth: DepthCriterion = Field(DepthCriterion.MEASURED, description=described("Which layers go.", DepthCriterion))
    width: WidthCriterion = Field(
        WidthCriterion.ROTATION, description=described("What stays of the residual stream.", WidthCriterion)
    )
    compensate: bool = Field(
        True,
        description="Multiply the gain of each norm by sqrt(hidden size before / after): its mean is over fewer channels.",
    )
    refit_readers: bool = Field(
        True,
        description="With `width: rotation`: refit every matrix that reads a norm to what is left, by least squares. Other widths "
        "leave nothing to refit.",
    )
    refit_outputs: bool = Field(
        True,
        description="After a cut of more than channels, solve for the output matrices of experts and dense MLPs in closed form, layer by layer, on "
        "`calibration.samples` sequences of the calibration text, so that each layer ends where its source's does, as far as text left out "
        "agrees. No training. (The paper has none of it.)",
    )
    experts: ExpertRecipe = Field(ExpertRecipe(), description="Which experts stay.")
    source_weights: dict[str, NonNegativeFloat] | None = Field(
        None, description="What each of calibration.sources counts for. Default: as much as it has tokens."
    )

    @model_validator(mode="before")
    @classmethod
    def _readers_are_refitted_after_a_rotation(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("width", "rotation") != "rotation":
            return {"refit_readers": False, **values}
        return values

    @model_validator(mode="after")
    def _readers_are_of_rotated_channels(self) -> "PruningRecipe":
        if self.refit_readers and self.width != "rotation":
            raise ValueError("refit_readers rewrites the readers of rotated channels: set width: rotation too")
        return self

    def as_published(self) -> "PruningRecipe":
        """Return the paper's criteria (paper.yaml) on the same calibration text."""
        criteria = strict_yaml.load(PAPER.read_text(encoding="utf-8"))
        return PruningRecipe.model_validate(criteria | {"source_weights": self.source_weights})
