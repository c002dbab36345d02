"""How a recipe is carried out: what changes speed, memory or bookkeeping, and no result beyond rounding."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from slimqwen.recipe.section import LARGEST, PositiveInt, Section, Tagged, as_list
from slimqwen.recipe.units import ByteCount, Duration, TokenCount, in_units

LoggerName = Literal["tensorboard", "wandb", "trackio"]
OnBadStep = Literal["stop", "skip", "roll_back"]
Offload = Literal["none", "student", "all"]

SaveTime = Annotated[Duration, in_units("steps", "tokens", "min")]


def _none_is_auto(value: Any) -> Any:
    return "auto" if value is None else value


class BadSteps(Tagged):
    """What to do at a step that would otherwise stop the training; `bad_steps: skip` is `bad_steps: {action: skip}`."""

    tag: ClassVar[str] = "action"

    action: OnBadStep = Field(
        "stop",
        description="Where a step's loss or gradient is not finite, or its loss a spike: stop; leave the step out, where "
        "more than ten in a row stop the training; or go back to the last saved state and leave out the rows of all steps "
        "since, at most ten times. All of it is logged.",
    )
    spike_factor: Annotated[float, Field(gt=1.0, le=LARGEST)] | None = Field(
        None,
        description="A loss is a spike if it is more than so many times the median of the last 64. Default: no loss is.",
    )


class Execution(Section):
    """How the work is done: devices, memory, saving, logging. It changes no result beyond rounding.

    The exception is `bad_steps`, which decides what a training does at a step that would otherwise stop it. A run may be continued
    with other settings of this section, and nothing that is finished is made again.
    """

    device: str = Field("auto", description="'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'.")
    batch_size: PositiveInt = Field(
        8,
        description="Sequences per forward pass where nothing is trained: calibration, teacher cache, refit, evaluation.",
    )
    micro_batch_size: PositiveInt | None = Field(
        None,
        description="Sequences per forward pass of training; must divide distil.batch_size. Default: distil.batch_size.",
    )
    recompute_activations: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    save_every: Annotated[list[SaveTime], Field(min_length=1), BeforeValidator(as_list)] = Field(
        [Duration(100, "steps")],
        description="Time between resumable training states: '500 steps', '2B tokens', '30 min', or a list of several.",
    )
    evaluate_every: Annotated[Duration, in_units("tokens", "steps")] | None = Field(
        None,
        description="Measure the student on held-out text at these intervals, '2B tokens' or '500 steps': loss, KL to a live "
        "teacher, MTP acceptance. Default: only at the end, by the evaluation.",
    )
    loggers: list[LoggerName] = Field(
        [],
        description="Where the metrics go beside metrics.jsonl: any of tensorboard, wandb, trackio. Each needs its library: "
        "pip install 'slimqwen[tensorboard]'.",
    )
    streaming_teacher: bool | None = Field(
        None,
        description="Run a live teacher layer by layer on all sequences of an optimiser step, each layer's weights read once per "
        "step, the others left on disk. Default: where the teacher does not fit beside the student.",
    )
    offload: Offload = Field(
        "none",
        description="What lies in the host's memory while training, and is copied to the GPU layer by layer when it is used. "
        "'student': its weights, gradients and optimiser state, and the optimiser computes on the CPU; 'all': the teacher's weights too.",
    )
    workers: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Processes that tokenize. Default: one per usable core."
    )
    streaming: bool | None = Field(
        None,
        description="Calibrate, evaluate, and run the teacher for its cache, layer by layer, the other weights left on disk. "
        "Default: where the model does not fit into memory.",
    )
    memory_budget: ByteCount = Field(
        2_000_000_000, description="Memory for activations when working layer by layer: 2GB, 512MiB."
    )
    bad_steps: BadSteps = Field(BadSteps(), description="Steps whose loss or gradient is not finite, or a spike.")
    keep_states: PositiveInt = Field(2, description="Resumable training states to keep, the newest.")
    async_save: bool | None = Field(
        None,
        description="Train on while a state is written, from a copy of it in the host's memory: parameters and optimiser state once "
        "more, shared among the ranks. Default: on GPUs.",
    )
    evaluate_tokens: TokenCount = Field(65_536, description="Held-out tokens of each measurement of evaluate_every.")
    loss_chunk_tokens: PositiveInt = Field(1024, description="Tokens whose logits exist at one time.")
    cache_file_bytes: ByteCount = Field(
        256_000_000,
        description="Size of a file of the teacher cache: what an interruption costs where the teacher is in memory. Layer by layer "
        "the tokens of several files go through each layer together.",
    )
    hidden_states_bytes: ByteCount | None = Field(
        None,
        description="Memory of each process for hidden states when the teacher runs layer by layer for its cache: the checkpoint "
        "is read once for as many tokens as fit, or as take half an hour. At least those of one file. Default: half of what is "
        "free, shared by the processes of a machine.",
    )
    shard_ranks: Annotated[PositiveInt | Literal["auto", "all"], BeforeValidator(_none_is_auto)] = Field(
        "auto",
        description="On many devices: ranks that share one copy of the models; gradients alone cross between copies. 'auto': those of "
        "one node, or of the fewest nodes in whose GPUs a copy fits. 'all': one copy over all of them.",
    )
    expert_ranks: Annotated[PositiveInt | Literal["auto"], BeforeValidator(_none_is_auto)] = Field(
        "auto",
        description="On many devices: ranks that share the routed experts of each layer between them and send each other tokens, "
        "instead of gathering all experts. Divides shard_ranks and both models' experts; 1: none do. 'auto': the most of a node.",
    )
    reshard_student: bool = Field(
        True,
        description="On many devices: drop each gathered layer after its forward pass. Without it the whole student stays in "
        "bfloat16 on each device during a step, and less is sent.",
    )
    reshard_teacher: bool = Field(
        True, description="The same of the teacher, which without it stays whole on each device from the first step on."
    )

    def check_batch_size(self, batch_size: int, key: str = "distil.batch_size") -> None:
        """Raise ValueError where the micro-batches do not fill a batch of `batch_size` sequences, which `key` sets."""
        if self.micro_batch_size is not None and batch_size % self.micro_batch_size:
            raise ValueError(f"execution.micro_batch_size {self.micro_batch_size} does not divide {key} {batch_size}")
