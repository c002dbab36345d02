"""Comparison of a model before and after a cut, from config.json alone: parameters and footprint, as data and as a table."""

from collections.abc import Callable, Mapping

from pydantic import BaseModel, ConfigDict

from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.terminal import DataTable
from slimqwen.families import FAMILIES, Config, Family
from slimqwen.families.count import Counts, count
from slimqwen.families.family import Layout
from slimqwen.recipe import Target
from slimqwen.serving.loadable import Loadable, describe, loadable
from slimqwen.shapes.footprint import Footprint, footprint
from slimqwen.shapes.target import completed, size_of, target_config
from slimqwen.shapes.training_memory import TrainingSettings


class Footprints(BaseModel):
    """The footprints of a model before and after a cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: Footprint
    after: Footprint


class Comparison(BaseModel):
    """The output of `slimqwen plan`. The footprint's training is distillation from the model before the cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str
    before: Counts
    after: Counts
    footprint: Footprints
    serving: Loadable


def compare(
    family: Family,
    config: Config,
    target: Target,
    layers: list[int] | None = None,
    *,
    context_length: int = 32_768,
    training: TrainingSettings | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Comparison:
    """Compare a model before and after a cut to `target`, which keeps `layers`, by default the first ones.

    training: None for the defaults of `TrainingSettings`. layouts: the layout of the experts on disk by block name; None: that
    of the family's releases. Raises UserError for a target larger than the source.
    """
    training = training or TrainingSettings()
    target = completed(family, target, config)
    layers = list(range(size_of(target.num_hidden_layers))) if layers is None else layers
    after = target_config(family, config, target, layers)
    return Comparison(
        model_type=family.model_type,
        before=count(family, config),
        after=count(family, after),
        footprint=Footprints(
            before=footprint(family, config, config, context_length, training),
            after=footprint(family, after, config, context_length, training),
        ),
        serving=loadable(family, config, after, layouts, layers=layers),
    )


def comparison_table(comparison: Comparison) -> str:
    """Render the comparison side by side, with footnotes on each number."""
    before, after = comparison.before, comparison.after
    table = DataTable("", "before", "after", "after/before")

    def row(name: str, old: int, new: int, written: Callable[[int], str] = "{:,}".format) -> None:
        table.add(name, written(old), written(new), f"{new / old:.1%}" if old else "-")

    row("parameters [1]", before.total_parameters, after.total_parameters)
    for part, number in before.parts.items():
        row(f"  {part.replace('_', ' ')}", number, after.parts.get(part, 0))
    row("active [2]", before.active_parameters, after.active_parameters)
    row("active without input embedding", before.active_without_input_embedding, after.active_without_input_embedding)
    has_mtp = bool(before.mtp_parameters)
    if has_mtp:
        row("MTP module, apart", before.mtp_parameters, after.mtp_parameters)
        row("MTP module, active", before.mtp_active_parameters, after.mtp_active_parameters)

    old, new = comparison.footprint.before, comparison.footprint.after
    stored = f"checkpoint, {old.dtype}{', with MTP' if has_mtp else ''}"
    row(stored, old.checkpoint_bytes, new.checkpoint_bytes, bytes_in_words)
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
        ("gathered for the whole step", "gathered_bytes"),
        ("weights around a layer in its backward pass", "layer_weights_bytes"),
        ("loss", "loss_bytes"),
        (f"activations of {settings.tokens:,} tokens", "activation_bytes"),
    ):
        row(f"  {name}", getattr(train, field), getattr(trained, field), bytes_in_words)
    peaks = (old.checkpointed_training.peak_bytes, new.checkpointed_training.peak_bytes)
    row("  with recompute_activations", *peaks, bytes_in_words)
    serving = "\n".join(f"  {line}" for line in describe(comparison.serving))
    return f"{table.as_text(120)}\n\n{footnotes(comparison)}\n\nServing, by each engine's source (docs/serving.md):\n{serving}"


def footnotes(comparison: Comparison) -> str:
    """Explain the convention behind each number, for the parts that this model has."""
    costs = comparison.footprint.before
    settings = costs.training.settings
    has_mtp, has_state = bool(comparison.before.mtp_parameters), bool(costs.state_bytes)
    without_mtp = "; without MTP" * has_mtp
    published = FAMILIES[comparison.model_type].published_active
    state = ", but DeltaNet's recurrent state in float32, as Transformers keeps it" * has_state
    recurrent = (
        ("    attention with the past, and 4 multiply-adds per element of the recurrent state" + without_mtp + ".",)
        if has_state
        else ("    attention with the past" + without_mtp + ".",)
    )
    return "\n".join(
        (
            "[1] The main model, as names like 80B-A3B count it; the MTP module is counted apart."
            if has_mtp
            else "[1] Every tensor of the checkpoint.",
            "[2] What a token meets: all but the routed experts that were not chosen, with input embedding and lm_head.",
            *(f"    {line}" for line in published),
            f"[3] One sequence; {costs.dtype}{state}{without_mtp}.",
            "[4] Mean over a prefill of that length: 2 per multiply-add of a matrix with a token (embedding looked up), of",
            *recurrent,
            "[5] Predicted (not measured on a GPU): the peak of distilling from the model before, a forward pass of "
            f"{settings.micro_batch_size} x {settings.sequence_length:,}",
            f"    tokens per GPU, sharded (FSDP2){', MTP included' * has_mtp}; student in float32 (16 bytes per parameter), "
            "teacher in bfloat16.",
            "    Gradients and activations peak at different moments: the parts add up to more.",
        )
    )


def in_parameters(number: int) -> str:
    """Format a number of parameters, such as `23.18B`."""
    return _in_unit(number, {"B": 1e9, "M": 1e6, "K": 1e3, "": 1})


def _in_flops(number: int) -> str:
    return _in_unit(number, {" TFLOP": 1e12, " GFLOP": 1e9, " MFLOP": 1e6, " kFLOP": 1e3, " FLOP": 1})


def _in_unit(number: int, units: dict[str, float]) -> str:
    """Format `number` in the largest unit that it reaches; `units` from largest to smallest."""
    unit, amount = next(((unit, amount) for unit, amount in units.items() if number >= amount), list(units.items())[-1])
    return f"{number / amount:,.2f}{unit}" if amount > 1 else f"{number}{unit}"
