"""The final table of a run on the terminal."""

from slimqwen.core.terminal import DataTable
from slimqwen.evaluation.result import Evaluation, ModelEvaluation
from slimqwen.reporting.titles import title_of


def print_table(evaluation: Evaluation) -> None:
    """Print every model's parameters and quality to stdout."""
    depth = max(len(model.mtp_acceptance) for model in evaluation.models.values())
    columns = ["total", "active", "loss", "perplexity", "bits/byte", "KL to teacher", "top-1 agree"]
    draft_columns = [*(f"acc_{k}" for k in range(depth)), "tokens/pass"] if depth else []
    table = DataTable("model", *columns, *draft_columns, title=f"held-out text, {evaluation.tokens:,} tokens")
    for name, model in evaluation.models.items():
        table.add(
            title_of(name),
            f"{model.total_parameters:,}",
            f"{model.active_parameters:,}",
            f"{model.loss:.4f}",
            f"{model.perplexity:.2f}",
            f"{model.bits_per_byte:.4f}",
            "-" if model.kl_to_teacher is None else f"{model.kl_to_teacher:.4f}",
            "-" if model.top1_agreement is None else f"{model.top1_agreement:.1%}",
            *(_draft_cells(model) or ["-"] * len(draft_columns)),
        )
    table.show()


def _draft_cells(model: ModelEvaluation) -> list[str]:
    """Format the acceptance of a model's drafts; empty without an MTP module."""
    if not model.mtp_acceptance:
        return []
    per_pass = "-" if model.tokens_per_verification is None else f"{model.tokens_per_verification:.2f}"
    return [*(f"{share:.1%}" for share in model.mtp_acceptance), per_pass]
