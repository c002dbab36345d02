"""The model card, README.md of the final checkpoint: parents, shapes, evaluation, and how it was made."""

from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCardData

from slimqwen.core import strict_yaml
from slimqwen.core.terminal import visible
from slimqwen.evaluation.benchmark_results import Benchmarks
from slimqwen.evaluation.result import Evaluation, ModelEvaluation
from slimqwen.generation import DEFAULT_DRAFT
from slimqwen.recipe import BUILTIN_TEACHER, Recipe
from slimqwen.reporting.after_cut import describe_after_cut
from slimqwen.reporting.markdown import block, code, plain
from slimqwen.reporting.parentage import Parentage
from slimqwen.reporting.titles import MAIN_RUN, title_of
from slimqwen.training.learning_rate import RateChoice, in_words

ABOUT_DRAFTS = f""" MTP acceptance: the share of
positions at which the first 1, 2, ... drafted tokens all equal the model's own greedy continuation; it is measured on each
model's own text, and a model that repeats itself is easy to draft for. Tokens/pass: tokens per forward pass in greedy
speculative decoding with drafts of {DEFAULT_DRAFT}, on a few prompts; 1 without drafting."""
ABOUT_MTP = """The MTP module's tensors are in the checkpoint for serving engines; Transformers ignores them.

"""


def model_card(
    recipe: Recipe,
    parentage: Parentage,
    evaluation: Evaluation,
    command: str,
    made_from: Mapping[str, str],
    benchmarks: Benchmarks | None = None,
    learning_rates: Mapping[str, RateChoice] | None = None,
) -> str:
    """Write the card: Markdown with Hugging Face front matter. All numbers are from `evaluation` and `benchmarks`.

    parentage: the fields inherited from the teacher's card (`parentage_of` its folder).
    made_from: input of the run -> fingerprint.
    benchmarks: included only where the model itself (MAIN_RUN) is among its models.
    learning_rates: the choice of `learning_rate: auto` by stage.
    """
    this = evaluation.models[MAIN_RUN]
    teacher = "the built-in teacher of slimqwen" if recipe.teacher == BUILTIN_TEACHER else code(recipe.teacher)
    start = "Pruned from" if recipe.init == "pruned" else "Randomly initialised at a shape cut from"
    training = "with knowledge distillation" if {"kd", "mtp_kd"} & set(recipe.distil.terms) else "on text alone"
    after_cut = "".join(f"\n{sentence}" for sentence in describe_after_cut(recipe))
    apart = f", MTP module of {this.mtp_parameters:,} apart" if this.mtp_parameters else ""
    hashes = "\n".join(f"- {what}: {code(fingerprint)}" for what, fingerprint in made_from.items())
    return f"""---
{front_matter(recipe.name, parentage, evaluation, benchmarks).to_yaml()}
---

# {plain(recipe.name)}

{start} {teacher} to {this.total_parameters:,} parameters ({this.active_parameters:,} active{apart})
and trained {training} on {recipe.distil.tokens:,} tokens. The method is SlimQwen's (arXiv 2605.08738), as implemented by
slimqwen.{after_cut}

{result_table(evaluation)}

{benchmark_table(benchmarks)}## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

{ABOUT_MTP * bool(this.mtp_parameters)}## How it was made

{code(command)} with this recipe:

{block(strict_yaml.dump(recipe.model_dump(mode="json")).strip(), "yaml")}

{chosen_rates(learning_rates or {})}Made from (SHA-256; of files over 64 MiB, of their size and 64 KiB of every 4 MiB):

{hashes}
"""


def front_matter(
    name: str, parentage: Parentage, evaluation: Evaluation, benchmarks: Benchmarks | None
) -> ModelCardData:
    """Return the fields of the card that the hub reads."""
    this = evaluation.models[MAIN_RUN]
    base_model = parentage.base_model
    return ModelCardData(
        model_name=visible(name),
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation=None if base_model is None else "finetune",
        tags=["slimqwen", "moe", "pruned", "distilled"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"held-out text, {evaluation.tokens:,} tokens",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in (("loss", this.loss), ("perplexity", this.perplexity))
        ]
        + benchmark_results(benchmarks),
        **parentage.inherited,
    )


def result_table(evaluation: Evaluation) -> str:
    """Return the table of all models with a note on its columns; without those about drafts where no model drafts."""
    drafts = any(model.mtp_acceptance for model in evaluation.models.values())
    columns = ["model", "total", "active", "loss (nats/token)", "perplexity", "bits/byte"]
    columns += ["KL to teacher", "top-1 agreement", *["MTP acceptance", "tokens/pass"] * drafts]
    rows = "\n".join(_row(title_of(name), model, drafts) for name, model in evaluation.models.items())
    measured = f"Measured on {evaluation.tokens:,} held-out tokens, sequence length {evaluation.sequence_length}."
    header = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    return f"{header}\n{rows}\n\n{measured}{ABOUT_DRAFTS * drafts}"


def chosen_rates(learning_rates: Mapping[str, RateChoice]) -> str:
    """Return a paragraph for each stage whose learning rate was found by forks of its training."""
    return "".join(f"{plain(stage)}: {plain(in_words(choice))}.\n\n" for stage, choice in learning_rates.items())


def benchmark_results(benchmarks: Benchmarks | None) -> list[EvalResult]:
    """Return the model's own benchmark scores, in the form that the hub's leaderboards read."""
    lines = {} if benchmarks is None else benchmarks.lines()
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=result.metric,
            metric_name=metric,
            metric_value=result.value,
        )
        for (task, metric), by_model in lines.items()
        if (result := by_model.get(MAIN_RUN)) is not None
    ]


def benchmark_table(benchmarks: Benchmarks | None) -> str:
    """Return a section with one task per row: the model, its teacher, and the paired difference; empty without results."""
    if benchmarks is None or MAIN_RUN not in benchmarks.models:
        return ""
    rows = []
    for (task, metric), by_model in benchmarks.lines().items():
        own, teachers = by_model.get(MAIN_RUN), by_model.get(benchmarks.teacher or "")
        if own is None:
            continue
        teacher = "-" if teachers is None else teachers.score
        rows.append(
            f"| {plain(task)}, {plain(metric)} | {own.documents:,} | {own.score} | {teacher} | {own.change or '-'} |"
        )
    limit = "" if benchmarks.limit is None else f" Only the first {benchmarks.limit:,} questions of each task."
    shots = "each task's own number" if benchmarks.shots is None else str(benchmarks.shots)
    return "\n".join(
        [
            "## Benchmarks",
            "",
            f"By lm-evaluation-harness, ± standard error; solved examples: {shots}.{limit} The difference is computed",
            "per question.",
            "",
            "| task | questions | this model | teacher | difference |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "",
        ]
    )


def _row(title: str, model: ModelEvaluation, drafts: bool) -> str:
    """Return a row of the table. drafts: whether it has the columns about drafts."""
    acceptance = " / ".join(f"{share:.1%}" for share in model.mtp_acceptance) or "-"
    per_pass = "-" if model.tokens_per_verification is None else f"{model.tokens_per_verification:.2f}"
    kl = "-" if model.kl_to_teacher is None else f"{model.kl_to_teacher:.4f}"
    agreement = "-" if model.top1_agreement is None else f"{model.top1_agreement:.1%}"
    return (
        f"| {plain(title)} | {model.total_parameters:,} | {model.active_parameters:,} | {model.loss:.4f} | {model.perplexity:.2f} "
        f"| {model.bits_per_byte:.4f} | {kl} | {agreement} |" + f" {acceptance} | {per_pass} |" * drafts
    )
