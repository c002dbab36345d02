"""The cut: the shape to reach, what importance is measured on, and the criterion for each axis."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimqwen.recipe.section import PositiveInt, Section

DepthCriterion = Literal["last", "similarity", "block_influence"]
WidthCriterion = Literal["norm_activation", "rotation", "weight_magnitude", "random"]
ExpertImportance = Literal["frequency", "soft_logits", "reap"]
ExpertCompression = Literal["prune", "merge", "partial"]
ExpertSimilarity = Literal["router_logits", "router_weights", "expert_output"]


class CalibrationRecipe(Section):
    """The forward pass that the importance scores are measured on."""

    sources: dict[str, Path] = Field(
        {},
        description="Text to measure on, by name: folders written by `slimqwen tokens`. Statistics are kept apart per source. "
        "Default: the training text.",
    )
    samples: PositiveInt = Field(
        1024, description="Sequences to measure on (the paper: 1,024), spread evenly over the sources."
    )
    batch_size: PositiveInt = Field(
        8, description="Sequences per forward pass. Changes speed and memory, not the result."
    )
    streaming: bool | None = Field(
        None,
        description="Measure layer by layer, the other weights left on disk. Default: where the model does not fit into memory.",
    )
    memory_budget_bytes: PositiveInt = Field(
        2_000_000_000, description="Memory for activations when measuring layer by layer."
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

    importance: ExpertImportance = Field("reap", description="How an expert is scored.")
    compression: ExpertCompression = Field(
        "partial",
        description="'prune': drop the others; 'merge': average each into its most similar kept expert; "
        "'partial': the top half stays untouched, the next half are bases that absorb the others.",
    )
    similarity: ExpertSimilarity = Field("expert_output", description="What merging compares, by cosine.")
    refit: bool = Field(
        False,
        description="After the cut, solve for the experts' output matrices in closed form, layer by layer, on `calibration.samples` "
        "sequences of the training text, so that each layer ends where its source's does. No training.",
    )


class PruningRecipe(Section):
    """The criterion for each axis."""

    depth: DepthCriterion = Field(
        "last", description="Which layers go: the last ones (the paper's choice), or by a score."
    )
    width: WidthCriterion = Field(
        "norm_activation",
        description="What stays of the residual stream: the channels with the largest norm outputs (the paper's choice), or, after "
        "one rotation of the whole model, its principal directions, which needs statistics with second moments. For "
        "comparison: the channels with the largest weights, and random ones.",
    )
    compensate: bool = Field(
        False,
        description="Multiply the gain of each norm by sqrt(hidden size before / after): its mean is over fewer channels.",
    )
    repair: bool = Field(
        False,
        description="With `width: rotation`: refit every matrix that reads a norm to what is left, by least squares.",
    )
    experts: ExpertRecipe = Field(ExpertRecipe(), description="Which experts stay.")
    source_weights: dict[str, Annotated[float, Field(ge=0.0)]] | None = Field(
        None, description="What each of calibration.sources counts for. Default: as much as it has tokens."
    )

    @model_validator(mode="after")
    def _repair_knows_what_is_left(self) -> "PruningRecipe":
        if self.repair and self.width != "rotation":
            raise ValueError("repair rewrites the readers of rotated channels: set width: rotation too")
        return self
