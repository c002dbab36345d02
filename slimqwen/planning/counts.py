"""A model before and after a target, from config.json alone: parameters and footprint, as data and as a table."""

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from slimqwen.bytesize import bytes_in_words
from slimqwen.families import Config, Family
from slimqwen.families.count import Counts, count
from slimqwen.planning.footprint import Footprint, TrainingSettings, footprint
from slimqwen.planning.shapes import completed, target_config
from slimqwen.recipe import Target
from slimqwen.terminal import DataTable


class Footprints(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    before: Footprint
    after: Footprint


class Comparison(BaseModel):
    """What `slimqwen plan` prints. The footprint's training is distillation from the model before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: Counts
    after: Counts
    footprint: Footprints


def compare(
    family: Family,
    config: Config,
    target: Target,
    layers: list[int] | None = None,
    *,
    context_length: int = 32_768,
    training: TrainingSettings | None = None,
) -> Comparison:
    """The model and what a target leaves of it: the first layers, where none are named.

    training: None for `TrainingSettings` as they are. Raises UserError for a target larger than the source.
    """
    training = training or TrainingSettings()
    after = target_config(family, config, completed(family, target, config), layers)
    return Comparison(
        before=count(family, config),
        after=count(family, after),
        footprint=Footprints(
            before=footprint(family, config, config, context_length, training),
            after=footprint(family, after, config, context_length, training),
        ),
    )


def comparison_table(comparison: Comparison) -> str:
    """The comparison side by side, and what each number means, as text."""
    before, after = comparison.before, comparison.after
    table = DataTable("", "before", "after", "after/before")

    def row(name: str, old: int, new: int, written: Callable[[int], str] = "{:,}".format) -> None:
        table.add(name, written(old), written(new), f"{new / old:.1%}" if old else "-")

    row("parameters [1]", before.total_parameters, after.total_parameters)
    for part, number in before.parts.items():
        row(f"  {part.replace('_', ' ')}", number, after.parts.get(part, 0))
    row("active [2]", before.active_parameters, after.active_parameters)
    row("active without input embedding", before.active_without_input_embedding, after.active_without_input_embedding)
    row("MTP module, apart", before.mtp_parameters, after.mtp_parameters)
    row("MTP module, active", before.mtp_active_parameters, after.mtp_active_parameters)

    old, new = comparison.footprint.before, comparison.footprint.after
    row(f"checkpoint, {old.dtype}, with MTP", old.checkpoint_bytes, new.checkpoint_bytes, bytes_in_words)
    tokens = f"{old.context_length:,} tokens"
    row(f"KV cache of {tokens} [3]", old.kv_cache_bytes, new.kv_cache_bytes, bytes_in_words)
    if old.state_bytes:
        row("DeltaNet state of a sequence [3]", old.state_bytes, new.state_bytes, bytes_in_words)
    row(f"forward FLOPs per token at {tokens} [4]", old.forward_flops_per_token, new.forward_flops_per_token, _in_flops)

    train, trained = old.training, new.training
    settings = train.settings
    row(f"training, per GPU of {settings.gpus} [5]", train.peak_bytes, trained.peak_bytes, bytes_in_words)
    for name, field in (
        ("student and AdamW's moments", "student_bytes"),
        ("gradients", "gradient_bytes"),
        ("teacher", "teacher_bytes"),
        ("gathered layers", "gathered_bytes"),
        ("loss", "loss_bytes"),
        (f"activations of {settings.tokens:,} tokens", "activation_bytes"),
    ):
        row(f"  {name}", getattr(train, field), getattr(trained, field), bytes_in_words)
    peaks = (old.checkpointed_training.peak_bytes, new.checkpointed_training.peak_bytes)
    row("  with activation_checkpointing", *peaks, bytes_in_words)
    return f"{table.as_text(120)}\n\n{footnotes(old)}"


def footnotes(costs: Footprint) -> str:
    """The convention behind each number, a line or two each."""
    settings = costs.training.settings
    return "\n".join(
        (
            "[1] The main model, as names like 80B-A3B count it; the MTP module is counted apart.",
            "[2] What a token meets: all but the routed experts that were not chosen, with input embedding and lm_head. For",
            "    Qwen3-Next-80B-A3B and SlimQwen-23A2B the paper prints 3.8B and 2.0B, and no convention gives both: with the",
            "    input embedding 3.87B and 2.11B (nearer), without 3.56B and 1.88B, without either table 3.25B and 1.65B.",
            f"[3] One sequence; {costs.dtype}, but DeltaNet's recurrent state in float32, as Transformers keeps it; without MTP.",
            "[4] Mean over a prefill of that length: 2 per multiply-add of a matrix with a token (embedding looked up), of",
            "    attention with the past, and 4 multiply-adds per element of the recurrent state; without MTP.",
            "[5] Predicted (not measured on a GPU): the peak of distilling from the model before, a forward pass of "
            f"{settings.micro_batch_size} x {settings.sequence_length:,}",
            "    tokens per GPU, sharded (FSDP2), MTP included; student in float32 (16 bytes per parameter), teacher in bfloat16.",
            "    Gradients and activations peak at different moments: the parts add up to more.",
        )
    )


def in_parameters(number: int) -> str:
    """`23.18B`"""
    return _in_unit(number, {"B": 1e9, "M": 1e6, "K": 1e3, "": 1})


def _in_flops(number: int) -> str:
    return _in_unit(number, {" TFLOP": 1e12, " GFLOP": 1e9, " MFLOP": 1e6, " kFLOP": 1e3, " FLOP": 1})


def _in_unit(number: int, units: dict[str, float]) -> str:
    """`number` in the largest unit that it has one of; `units` from largest to smallest."""
    unit, amount = next(((unit, amount) for unit, amount in units.items() if number >= amount), list(units.items())[-1])
    return f"{number / amount:,.2f}{unit}" if amount > 1 else f"{number}{unit}"
