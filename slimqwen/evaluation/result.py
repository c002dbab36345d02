"""The format of evaluation.json: names and meaning of its values. Without torch, because the report reads it too."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimqwen.artifacts.json_file import load_model

FORMAT = "slimqwen.evaluation/1"

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Sample(BaseModel):
    """A held-out prompt and its greedy completion."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    completion: str


class ModelEvaluation(BaseModel):
    """The measurements of one model. None: not measured, without a teacher or an MTP module."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    checkpoint: str
    total_parameters: int  # without the MTP module, as `families.count` counts
    active_parameters: int
    mtp_parameters: int
    loss: float  # nats per token
    perplexity: float  # e^loss
    bits_per_byte: float  # of UTF-8 text, so that models with different tokenizers compare
    kl_to_teacher: float | None  # KL(teacher || model), nats per token
    top1_agreement: Share | None  # share of predictions whose most likely token is the teacher's
    mtp_loss: float | None  # nats per token, of predicting the token after the next
    mtp_kl_to_teacher: float | None  # against the teacher's main distribution for that token
    mtp_acceptance: list[Share]  # acc_0 ..: the first k + 1 drafts are all accepted; empty without an MTP module
    tokens_per_verification: Annotated[float, Field(ge=1.0)] | None = None  # of real speculative decoding, 1 is no gain
    loss_by_position: dict[str, float] = {}  # tokens read, "1", "2-3", .. -> nats
    loss_by_frequency: dict[str, float] = {}  # the predicted token's rank in the text -> nats
    calibration_error: Share | None = None  # mean gap between confidence and accuracy; 0 is perfectly calibrated
    expert_utilisation: dict[str, list[Share]]  # MoE block -> share of assignments per expert
    sample: Sample


class Evaluation(BaseModel):
    """The content of evaluation.json: every model on the same held-out tokens."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal["slimqwen.evaluation/1"]
    tokens: int  # predictions measured, per model
    sequence_length: int
    models: dict[str, ModelEvaluation]  # the teacher first

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Load the file. Raises UserError where it is missing or not an evaluation."""
        return load_model(path, cls, what=f"an evaluation of {FORMAT}", advice="run `slimqwen evaluate` to make it.")
