"""The whole configuration of a run: strict, documented where it is declared, checked all at once.

A recipe is YAML. Every key is a field below and every field has a description; unknown keys are errors with
a suggestion. `load_recipe` reads the file, applies `--set key=value` overrides and reports all problems together.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

BUILTIN_TEACHER = "builtin"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]

DepthCriterion = Literal["last", "similarity", "block_influence"]
WidthCriterion = Literal["norm_activation", "rotation", "weight_magnitude", "random"]
ExpertImportance = Literal["frequency", "soft_logits", "reap"]
ExpertCompression = Literal["prune", "merge", "partial"]
ExpertSimilarity = Literal["router_logits", "router_weights", "expert_output"]
LossTerm = Literal["lm", "kd", "mtp_lm", "mtp_kd"]
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]
OnBadStep = Literal["stop", "skip", "roll_back"]
LoggerName = Literal["tensorboard", "wandb", "trackio"]
Schedule = Literal["one_shot", "depth_first", "width_first", "joint"]
BuiltinSource = Literal["python-stdlib", "python-packages"]
Dtype = Literal["auto", "float32", "bfloat16"]
Baseline = Literal["pruned", "random_init", "lm_only"]
DocumentBoundaries = Literal["packed", "isolated"]
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


class Section(BaseModel):
    """A group of recipe fields; unknown keys are refused, values are not mutated after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Section):
    """One source of text. Give exactly one of `builtin`, `path` and `megatron`."""

    builtin: BuiltinSource | None = Field(
        None,
        description="'python-stdlib': the standard library of the running interpreter; "
        "'python-packages': the packages installed beside slimqwen. Nothing is downloaded.",
    )
    path: Path | None = Field(
        None,
        description="A .txt file (one document), .jsonl or .parquet (one document per row), a source file, or a folder: "
        "all such files below it, each source file a document.",
    )
    megatron: Path | None = Field(
        None,
        description="PREFIX of token ids made elsewhere, PREFIX.bin and PREFIX.idx, with the teacher's tokenizer. They are read "
        "where they are, and all of them are for training: the held-out text comes from other sources.",
    )
    name: str | None = Field(
        None,
        description="What it is called in a mixture: its folder among the tokens. Default: the last part of its path.",
    )
    weight: PositiveFloat | None = Field(
        None,
        description="Share of the training tokens drawn from this source, beside the others' weights; its text is repeated "
        "or left unused as that takes. Give every source a weight, or none: then each text is read once per epoch.",
    )
    text_field: str = Field("text", description="The column that holds the text, in .jsonl and .parquet.")
    keep_fraction: PositiveFloat = Field(
        1.0, description="Share of this source's documents to keep, at most 1.", le=1.0
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if [self.builtin, self.path, self.megatron].count(None) != 2:
            raise ValueError("give exactly one of 'builtin', 'path' and 'megatron'")
        if self.megatron is not None and self.keep_fraction < 1.0:
            raise ValueError(
                "keep_fraction chooses among documents of text, and 'megatron' is token ids: give a weight"
            )
        return self


class DataRecipe(Section):
    """What the model is trained, calibrated and evaluated on."""

    sources: list[Source] = Field(
        [Source(builtin="python-stdlib")], min_length=1, description="Where the text comes from."
    )
    heldout_sources: list[Source] = Field(
        [],
        description="Text for evaluation only. Empty: a share of `sources` is held out by a hash of each document's path.",
    )
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.05, description="Share of documents held out when `heldout_sources` is empty."
    )
    sequence_length: Annotated[int, Field(ge=8)] = Field(256, description="Tokens in one training sequence.")
    documents: DocumentBoundaries = Field(
        "packed",
        description="How training and evaluation cut rows. 'packed': documents back to back, and a row's tokens see the document "
        "before theirs. 'isolated': a row holds one document, or a piece of a long one, and padding, which distil.tokens "
        "counts and no loss does. Calibration reads packed rows, which have no padding, in either case.",
    )
    workers: PositiveInt | None = Field(
        None, description="Processes that tokenize. Changes speed, not the result. Default: one per usable core."
    )


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


class StageRecipe(Section):
    """One stage of a progressive schedule written out by hand."""

    target: Target = Field(description="The shape that this stage ends with.")
    token_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        description="Share of `distil.tokens` spent after this stage's cut."
    )


class Ramp(Section):
    """A weight that moves over the whole run, up or down."""

    start: Fraction = Field(description="At the first step of the run.")
    end: Fraction = Field(description="At the last step of the run.")


class BatchSizeRamp(Section):
    """A batch that grows at the beginning of the run: `start` sequences, 2 x `start` and so on, to batch_size.

    Each size lasts for the same number of tokens, or the step that passes it.
    """

    start: PositiveInt = Field(description="Sequences of the first optimiser step; divides batch_size.")
    tokens: PositiveInt = Field(description="Training tokens before the batch has batch_size sequences.")


class DistilRecipe(Section):
    """Training: loss (method.md section 5), optimiser and learning rate (section 6)."""

    tokens: PositiveInt = Field(description="Training tokens of the whole run, over all stages.")
    batch_size: PositiveInt = Field(8, description="Sequences per optimiser step.")
    batch_size_ramp: BatchSizeRamp | None = Field(
        None,
        description="Begin with fewer sequences per step. What moves over the run, and the stages' shares of it, goes by tokens.",
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="Sequences per forward pass; must divide batch_size. Default: batch_size."
    )
    terms: list[LossTerm] = Field(
        ["lm", "kd", "mtp_lm", "mtp_kd"],
        min_length=1,
        description="Terms of the loss. Without 'kd' and 'mtp_kd' no teacher is loaded: [lm, mtp_lm] is the LM-only baseline. "
        "Where a head has only one of its two terms, that term has its full weight.",
    )
    teacher: Literal["live", "cache"] = Field(
        "live",
        description="'live': the teacher runs beside the student. 'cache': what it said is read from disk, where `slimqwen "
        "teacher-cache` has written it, and the teacher itself is not loaded.",
    )
    kd_weight: Ramp = Field(
        Ramp(start=1.0, end=0.75), description="lambda: weight of KD against LM, linear over the run."
    )
    mtp_weight: Ramp = Field(
        Ramp(start=0.3, end=0.1), description="beta: weight of the MTP terms, cosine over the run."
    )
    mtp_target: Literal["main", "mtp"] = Field(
        "main",
        description="What the MTP head learns from: the teacher's next-token distribution, or the teacher's own MTP head.",
    )
    load_balancing_coefficient: Annotated[float, Field(ge=0.0)] = Field(
        0.001, description="Weight of the load-balancing loss over the global batch; 0 turns it off."
    )
    learning_rate: PositiveFloat = Field(4e-4, description="Peak learning rate.")
    final_learning_rate: Annotated[float, Field(ge=0.0)] = Field(
        3e-5, description="Learning rate at the end of the cosine."
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps of linear warm-up, once per run. Default: 2,000, where warmup_tokens is not given."
    )
    warmup_tokens: PositiveInt | None = Field(
        None, description="The warm-up in tokens, instead of warmup_steps: it takes the steps that train on as many."
    )
    optimizer: OptimizerName = Field(
        "adamw",
        description="'muon': PyTorch's Muon for the two-dimensional weights of attention, DeltaNet, dense and shared MLPs and the "
        "MTP projection, its updates scaled to AdamW's (arXiv 2502.16982), and AdamW for all else: vectors, embeddings, routers, "
        "and the routed experts, which are too many small matrices to orthogonalise one by one. "
        "'adamw_8bit': moments in 8 bits, by torchao. Both are for one device.",
    )
    optimizer_state: Literal["reset", "carry"] = Field(
        "reset",
        description="What becomes of AdamW's moments at a stage's cut: they start anew, or they are cut as the weights are and "
        "go on. Carrying takes 8 bytes of disk per parameter while the next stage trains.",
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="AdamW's decay, on matrices only (not norms, biases, A_log, dt_bias)."
    )
    weight_decay_exempt: list[TrainedPart] = Field(
        [], description="Parts of the model whose matrices do not decay either, e.g. [router, embedding]."
    )
    learning_rate_scale: dict[TrainedPart, Annotated[float, Field(ge=0.0)]] = Field(
        {},
        description="Factors on the learning rate by part of the model, e.g. {router: 0.1}; 0 freezes the part. Weight decay, "
        "which AdamW multiplies by the learning rate, follows. 'embedding' is lm_head too, 'norm' the norms around the layers' "
        "mixers and MLPs.",
    )
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="Also keep an exponential moving average of the weights, in float32: average = decay x average + "
        "(1 - decay) x weights after each step. The average is then what a stage writes, and what the next stage is cut from. "
        "After t steps of a stage the decay is at most (1 + t) / (10 + t), so that the beginning is forgotten. What is measured "
        "on the way (evaluate_every_tokens) is the weights themselves. Default: none.",
    )
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="AdamW's first moment decay.")
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.95, description="AdamW's second moment decay.")
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradients are scaled down to this global norm.")
    loss_chunk_tokens: PositiveInt = Field(
        1024, description="Tokens whose logits exist at one time. Changes memory, not the result."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    save_every_steps: PositiveInt = Field(100, description="Steps between resumable training states.")
    save_every_tokens: PositiveInt | None = Field(
        None, description="Also save when these many more tokens were trained on. Default: by steps alone."
    )
    save_every_minutes: PositiveFloat | None = Field(
        None, description="Also save when this long has passed since the last time. Default: by steps alone."
    )
    keep_states: PositiveInt = Field(2, description="Resumable training states to keep, the newest.")
    async_save: bool | None = Field(
        None,
        description="Train on while a state is written, from a copy of it in the host's memory: parameters and optimiser state once "
        "more, shared among the ranks. Default: on GPUs.",
    )
    on_bad_step: OnBadStep = Field(
        "stop",
        description="What to do where a step's loss or gradient is not finite, or its loss a spike: stop; leave the step out, where "
        "more than ten in a row stop the training; or go back to the last saved state and leave out the rows of all steps "
        "since, at most ten times. All of it is logged.",
    )
    spike_factor: Annotated[float, Field(gt=1.0)] | None = Field(
        None,
        description="A loss is a spike if it is more than so many times the median of the last 64. Default: no loss is.",
    )
    evaluate_every_tokens: PositiveInt | None = Field(
        None,
        description="Measure the student on held-out text each time that these many more tokens were trained on: loss, KL to a live "
        "teacher, MTP acceptance. Training is not changed by it. Default: only at the end, by the evaluation.",
    )
    evaluate_tokens: PositiveInt = Field(65_536, description="Held-out tokens of each such measurement.")
    loggers: list[LoggerName] = Field(
        [],
        description="Where the metrics go beside metrics.jsonl: any of tensorboard, wandb, trackio. Each needs its library: "
        "pip install 'slimqwen[tensorboard]'.",
    )
    shard_ranks: PositiveInt | None = Field(
        None,
        description="On many devices: ranks that share one copy of the models. Default: all. The GPUs of one node: weights are "
        "gathered within a node, and only gradients cross between nodes.",
    )
    expert_ranks: PositiveInt | None = Field(
        None,
        description="On many devices: ranks that share the routed experts of each layer between them and send each other "
        "tokens, instead of gathering all experts. Divides shard_ranks and both models' experts. Default: none do.",
    )
    reshard_student: bool = Field(
        True,
        description="On many devices: drop each gathered layer after its forward pass. Without it the whole student stays in "
        "bfloat16 on each device during a step, and less is sent.",
    )
    reshard_teacher: bool = Field(
        True, description="The same of the teacher, which without it stays whole on each device from the first step on."
    )
    divergence: DivergenceName = Field(
        "forward_kl",
        description="What the KD terms minimise: KL(teacher || student), KL(student || teacher), or the Jensen-Shannon "
        "divergence. The reported kd is KL(teacher || student) in each case.",
    )
    temperature: PositiveFloat = Field(
        1.0, description="Of teacher and student in the KD terms, which are multiplied by its square."
    )
    jsd_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="The teacher's share of the mixture that 'jsd' compares teacher and student with."
    )

    @property
    def is_taught(self) -> bool:
        """Whether the loss needs a teacher."""
        return not {"kd", "mtp_kd"}.isdisjoint(self.terms)

    @property
    def is_taught_by_mtp(self) -> bool:
        """Whether it needs the teacher's own MTP head too."""
        return self.mtp_target == "mtp" and "mtp_kd" in self.terms

    @model_validator(mode="after")
    def _terms_are_distinct(self) -> "DistilRecipe":
        if len(set(self.terms)) < len(self.terms):
            raise ValueError(f"terms names one twice: {', '.join(self.terms)}")
        return self

    @model_validator(mode="after")
    def _learning_rate_falls(self) -> "DistilRecipe":
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate {self.final_learning_rate:g} is more than the peak, learning_rate {self.learning_rate:g}"
            )
        return self

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> "DistilRecipe":
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self

    @model_validator(mode="after")
    def _the_ramp_ends_at_the_batch(self) -> "DistilRecipe":
        ramp = self.batch_size_ramp
        if ramp is not None and (ramp.start == self.batch_size or self.batch_size % ramp.start):
            raise ValueError(
                f"batch_size_ramp.start must be a divisor of batch_size {self.batch_size} below it, is {ramp.start}"
            )
        return self

    @model_validator(mode="after")
    def _one_warmup(self) -> "DistilRecipe":
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            raise ValueError("give the warm-up as warmup_steps or as warmup_tokens, not as both")
        return self

    @model_validator(mode="after")
    def _carries_what_it_can(self) -> "DistilRecipe":
        if self.optimizer_state == "carry" and self.optimizer != "adamw":
            raise ValueError(f"optimizer_state: carry is for the optimizer adamw, not for {self.optimizer}")
        return self


class TeacherCacheRecipe(Section):
    """What is kept of the teacher for `distil.teacher: cache`."""

    top_k: PositiveInt = Field(
        64, description="Most likely tokens to keep of each prediction, beside the sum of the others."
    )
    exact: bool = Field(
        False,
        description="Log-probabilities as float32 instead of 16 bits. With top_k of the whole vocabulary: the live teacher.",
    )
    batch_size: PositiveInt = Field(
        8, description="Sequences per forward pass. Changes speed and memory, not the result."
    )
    shard_bytes: PositiveInt = Field(
        256_000_000,
        description="Size of a file: what an interruption costs. Layer by layer the checkpoint is read once for each, and the hidden "
        "states of its tokens are in memory.",
    )
    streaming: bool | None = Field(
        None,
        description="Run the teacher layer by layer, the other weights left on disk. Default: where it does not fit into memory.",
    )
    memory_budget_bytes: PositiveInt = Field(
        2_000_000_000, description="Memory for activations when running layer by layer."
    )


class EvaluationRecipe(Section):
    """What is measured on held-out text at the end."""

    tokens: PositiveInt = Field(65_536, description="Held-out tokens to measure loss, KL and agreement on.")
    batch_size: PositiveInt = Field(8, description="Sequences per forward pass.")
    acceptance_prompts: PositiveInt = Field(
        32, description="Held-out prompts whose greedy continuations the MTP head drafts."
    )
    acceptance_prompt_tokens: PositiveInt = Field(64, description="Tokens of each prompt.")
    acceptance_new_tokens: PositiveInt = Field(64, description="Tokens of each greedy continuation.")
    acceptance_depth: PositiveInt = Field(4, description="Tokens drafted per position: acc_0 .. acc_{depth-1}.")

    @model_validator(mode="after")
    def _continuations_hold_a_draft(self) -> "EvaluationRecipe":
        if self.acceptance_new_tokens <= self.acceptance_depth:
            raise ValueError(
                f"acceptance_new_tokens {self.acceptance_new_tokens} must be more than acceptance_depth {self.acceptance_depth}"
            )
        return self


class Recipe(Section):
    """One run: from a teacher and a target to a smaller model, its evaluation and its report."""

    name: str = Field("slimqwen", description="Shown in the report and on the model card.")
    run_dir: Path = Field(description="Folder of every artefact of the run.")
    teacher: str = Field(
        BUILTIN_TEACHER, description="A checkpoint folder, or 'builtin': the small teacher inside the package."
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of the data order and of random initialisation.")
    device: str = Field("auto", description="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'.")
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
    teacher_cache: TeacherCacheRecipe = Field(TeacherCacheRecipe(), description="With `distil.teacher: cache`.")
    distil: DistilRecipe = Field(description="Training.")
    baselines: list[Baseline] = Field(
        [],
        description="Also make, on the same tokens: 'pruned' (the final shape in one cut, no training), "
        "'random_init' (the final shape from random weights + KD), 'lm_only' (the same cuts, no teacher).",
    )
    evaluation: EvaluationRecipe = Field(EvaluationRecipe(), description="Measuring the result.")

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
        return self


class PretrainRecipe(Section):
    """A teacher from nothing: tokenizer, random weights, language modelling. The built-in teacher was made by one."""

    name: str = Field("pretrain", description="Shown with the progress.")
    run_dir: Path = Field(description="Folder of every artefact of the run; the result is its `final/`.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of the weights and of the data order.")
    device: str = Field("auto", description="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Of the final weights; training is in float32."
    )
    config: dict[str, Any] = Field(description="The model's config.json; vocab_size is also the tokenizer's.")
    tokenizer_documents: PositiveInt = Field(4000, description="Training documents that the tokenizer learns from.")
    data: DataRecipe = Field(DataRecipe(), description="Text.")
    training: DistilRecipe = Field(description="Training; terms must be among lm and mtp_lm: there is no teacher.")

    @model_validator(mode="after")
    def _no_teacher(self) -> "PretrainRecipe":
        if not set(self.training.terms) <= {"lm", "mtp_lm"}:
            raise ValueError("training.terms must be among lm and mtp_lm: pretraining has no teacher")
        return self
