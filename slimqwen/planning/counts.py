"""Parameters before and after a target, from config.json alone: no weights, no torch."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from slimqwen.checkpoint.config import read_config
from slimqwen.families.count import Counts, count
from slimqwen.planning.shapes import completed, target_config
from slimqwen.recipe import Target


def before_and_after(config_or_checkpoint: Path, target: Target) -> dict[str, Counts]:
    """`{"before": ..., "after": ...}`. Raises UserError for a target larger than the source."""
    family, config = read_config(config_or_checkpoint)
    after = target_config(family, config, completed(target, config))
    return {"before": count(family, config), "after": count(family, after)}


def counts_table(counts: dict[str, Counts]) -> str:
    """The counts side by side, as text."""
    before, after = counts["before"], counts["after"]
    table = Table(box=None, pad_edge=False)
    table.add_column("parameters")
    for column in ("before", "after", "after/before"):
        table.add_column(column, justify="right")

    def row(name: str, old: int, new: int) -> None:
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new / old:.1%}" if old else "-")

    row("total", before.total_parameters, after.total_parameters)
    row("active", before.active_parameters, after.active_parameters)
    row("active without input embedding", before.active_without_input_embedding, after.active_without_input_embedding)
    for part, number in before.parts.items():
        row(f"  {part.replace('_', ' ')}", number, after.parts.get(part, 0))
    row("MTP module, apart", before.mtp_parameters, after.mtp_parameters)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
