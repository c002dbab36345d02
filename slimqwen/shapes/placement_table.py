"""What fits the GPUs that there are, in words: a table, the recommended settings as they go into a recipe, what is assumed."""

import shlex

from slimqwen.core.bytesize import bytes_in_words
from slimqwen.core.terminal import DataTable
from slimqwen.recipe import Execution
from slimqwen.shapes import placement as placing
from slimqwen.shapes import step_time
from slimqwen.shapes.hardware import GPUS
from slimqwen.shapes.placement import Placement, Placements

TEACHERS = {"live": "live", "layer_by_layer": "layer by layer", "cache": "cache"}
OFFLOADED = {"none": "GPU", "student": "host", "all": "host"}
FASTER = 1.5  # times as fast, from which a choice that changes the result is named
NAMED = {"cache": "a cached teacher", "adamw_8bit": "moments in 8 bits", "frozen": "frozen experts"}
CHANGES = {
    "cache": "the teacher's most likely tokens and the sum of the others instead of its whole distribution",
    "adamw_8bit": "the optimiser's moments in 8 bits",
    "frozen": "the routed experts stay as the cut left them",
}


def placements_text(found: Placements) -> str:
    """Render the settings that fit and the recommended one, or by how much none does."""
    hardware = found.hardware
    name = GPUS[hardware.gpu].name
    lines = [
        f"{hardware.gpus} x {name} with {bytes_in_words(hardware.gpu_memory)} each, a step of {found.rows:,} sequences of "
        f"{found.smallest.settings.sequence_length:,} tokens:"
    ]
    if not found.fitting:
        return "\n".join([*lines, "", *_nothing_fits(found)])
    best = found.fitting[0]
    return "\n".join(
        [
            *lines,
            "",
            _table(found),
            "",
            f"Recommended: the first. {_fit_in_words(best, hardware.gpu_memory)}",
            *(f"It changes the result: {CHANGES[change]}." for change in best.change),
            *_faster(found),
            "",
            *_to_paste(found, best),
            "",
            *footnotes(found),
        ]
    )


def overrides(found: Placements, placement: Placement) -> list[str]:
    """Return a choice as fields of the recipe, each as `--set` takes it; what the recipe has otherwise is set back."""
    s, execution = placement.settings, found.execution
    fields: dict[str, object] = {}
    if s.gpus > 1:
        fields |= {"shard_ranks": s.copy_ranks, "expert_ranks": s.expert_ranks}
    fields |= {"micro_batch_size": s.micro_batch_size, "recompute_activations": s.recompute_activations}
    for name in ("reshard_student", "reshard_teacher", "offload"):
        usual = Execution.model_fields[name].default
        if getattr(s, name) != usual or getattr(execution, name) != usual:
            fields[name] = getattr(s, name)
    if s.teacher == "layer_by_layer":
        fields["streaming_teacher"] = True
    elif execution.streaming_teacher and s.teacher == "live":
        fields["streaming_teacher"] = False
    if not placement.async_save:
        fields["async_save"] = False
    lines = [f"execution.{name}={_as_yaml(value)}" for name, value in fields.items()]
    if "cache" in placement.change:
        lines.append("distil.teacher.kind=cache")
    if "adamw_8bit" in placement.change:
        lines.append("distil.optimizer.kind=adamw_8bit")
    if "frozen" in placement.change:
        others = [part for part in found.trained if part not in s.frozen]
        only_experts = s.frozen == ("routed_experts",)
        lines.append(f"distil.train={'no_experts' if only_experts else '[' + ', '.join(others) + ']'}")
    return lines


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _to_paste(found: Placements, placement: Placement) -> list[str]:
    """Return the options as a shell takes them, at the end of a command."""
    options = [f"    --set {shlex.quote(override)}" for override in overrides(found, placement)]
    return [f"{option} \\" for option in options[:-1]] + options[-1:]


def _table(found: Placements) -> str:
    many = found.hardware.gpus > 1
    columns = [
        "teacher",
        "student",
        "experts",
        "moments",
        "rows at once",
        "recompute",
        "of a GPU",
        "of a node's memory",
    ]
    columns += ["tokens/s, estimated", "GPU hours, estimated"]
    table = DataTable(*(["GPUs per copy, sharing experts"] if many else []), *columns, left=5 if many else 4)
    for placement in found.fitting:
        s = placement.settings
        layout = f"{s.copy_ranks}, {s.expert_ranks if s.expert_ranks > 1 else 'none'}"
        table.add(
            *([layout] if many else []),
            _teacher_in_words(placement),
            OFFLOADED[s.offload],
            "frozen" if "routed_experts" in s.frozen else "trained",
            "8 bits" if s.optimizer == "adamw_8bit" else "32 bits",
            str(s.micro_batch_size),
            "yes" if s.recompute_activations else "no",
            bytes_in_words(placement.needed_bytes),
            bytes_in_words(placement.host_bytes),
            f"{placement.tokens_per_second:,.0f}",
            "-" if placement.gpu_hours is None else f"{placement.gpu_hours:,.0f}",
        )
    return table.as_text(150)


def _teacher_in_words(placement: Placement) -> str:
    s = placement.settings
    if s.offload == "all":
        return "live, host"
    if s.teacher == "live" and placement.memory.teacher_bytes == 0:
        return "none"  # the loss needs none
    return TEACHERS[s.teacher] if s.reshard_teacher else "live, kept whole"


def _fit_in_words(placement: Placement, memory: int) -> str:
    step = placement.step
    bound = max(
        ("what the kernels compute", step.compute_seconds),
        ("launching kernels", step.launch_seconds),
        ("weights and gradients on their way", step.weights_seconds),
        key=lambda term: term[1],
    )[0]
    return (
        f"It takes {bytes_in_words(placement.needed_bytes)} of {bytes_in_words(memory)} (predicted), and a step "
        f"{step.seconds:,.1f} s (estimated; the longest part is {bound})."
    )


def _faster(found: Placements) -> list[str]:
    """Describe what would be much faster and change the result more, by the first of each kind."""
    best, lines, seen = found.fitting[0], [], {tuple(found.fitting[0].change)}
    for number, other in enumerate(found.fitting, start=1):
        times = other.tokens_per_second / best.tokens_per_second
        if tuple(other.change) not in seen and times >= FASTER:
            changed = ", ".join(NAMED[change] for change in other.change)
            lines.append(
                f"With {changed}, number {number} is {times:.1f} times as fast (estimated), and another training."
            )
        seen.add(tuple(other.change))
    return lines


def _nothing_fits(found: Placements) -> list[str]:
    least, memory = found.smallest, found.hardware.gpu_memory
    lines = [
        f"Nothing fits: of {found.tried:,} choices of settings the smallest takes {bytes_in_words(least.needed_bytes)} of a GPU and "
        f"{bytes_in_words(least.host_bytes)} of a node's memory (predicted):",
        "",
        *_to_paste(found, least),
        "",
    ]
    if least.needed_bytes > memory:
        lines.append(f"That is {bytes_in_words(least.needed_bytes - memory)} more than a GPU has.")
    host = found.hardware.host_memory
    if host is not None and least.host_bytes > host:
        lines.append(f"That is {bytes_in_words(least.host_bytes - host)} more than a node has.")
    if found.enough_host_memory is not None:
        lines.append(f"It would fit with {bytes_in_words(found.enough_host_memory)} of memory in each node.")
    if found.enough_gpus is not None:
        lines.append(f"It would fit on {found.enough_gpus} such GPUs.")
    return [*lines, "", *footnotes(found)]


def footnotes(found: Placements) -> list[str]:
    """List what is predicted, what is estimated, and what both assume."""
    context = placing.CONTEXT_BYTES + (placing.NCCL_BYTES if found.hardware.gpus > 1 else 0)
    gpu = GPUS[found.hardware.gpu]
    return [
        f"Of a GPU: tensors as predicted, {placing.FRAGMENTS_FRACTION:.0%} for what the allocator cannot use, and "
        f"{bytes_in_words(context)} for CUDA{' and NCCL' * (found.hardware.gpus > 1)} (assumed).",
        f"Where experts are shared, the busiest GPU may get {placing.IMBALANCE:.2f} times the mean of the tokens (assumed). "
        "The largest student of the schedule counts.",
        "Of a node's memory: what is offloaded, tensors that PyTorch pins rounded up to a power of two bytes, and the copy from which",
        "states are written; not the page cache.",
        f"Estimated, not measured: {step_time.COMPUTE_FRACTION:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s, "
        f"{step_time.LINK_FRACTION:.0%} of {gpu.links / 1e9:,.0f} GB/s in a node and {gpu.network / 1e9:,.1f} GB/s between nodes, "
        f"{step_time.LAUNCH_SECONDS * 1e6:.0f} us per kernel;",
        f"a node's CPUs update {step_time.HOST_SPEED / 1e9:.0f} GB/s of optimiser state, and its disk reads {step_time.DISK_SPEED / 1e9:.0f} GB/s.",
    ]
