"""The model card, README.md of the final checkpoint: parents, shapes, evaluation, and how it was made."""

import yaml

from slimqwen.evaluation.result import Evaluation, ModelEvaluation
from slimqwen.recipe import BUILTIN_TEACHER, Recipe
from slimqwen.reporting.titles import MAIN_RUN, title_of


def model_card(recipe: Recipe, evaluation: Evaluation, command: str) -> str:
    """Markdown with Hugging Face front matter. Every number comes from `evaluation`."""
    models = evaluation.models
    this = models[MAIN_RUN]
    teacher_name = "the built-in teacher of slimqwen" if recipe.teacher == BUILTIN_TEACHER else f"`{recipe.teacher}`"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["slimqwen", "moe", "pruned", "distilled"],
    }
    start = "Pruned from" if recipe.init == "pruned" else "Randomly initialised at a shape cut from"
    training = "with knowledge distillation" if {"kd", "mtp_kd"} & set(recipe.distil.terms) else "on text alone"
    rows = "\n".join(_row(title_of(name), models[name]) for name in models)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {recipe.name}

{start} {teacher_name} to {this.total_parameters:,} parameters ({this.active_parameters:,} active, MTP module of
{this.mtp_parameters:,} apart) and trained {training} on {recipe.distil.tokens:,} tokens. The method is SlimQwen's
(arXiv 2605.08738), as implemented by slimqwen.

| model | total | active | loss (nats/token) | perplexity | bits/byte | KL to teacher | top-1 agreement | MTP acceptance |
|---|---|---|---|---|---|---|---|---|
{rows}

Measured on {evaluation.tokens:,} held-out tokens, sequence length {evaluation.sequence_length}. MTP acceptance: the share of
positions at which the first 1, 2, ... drafted tokens are all what the model itself generates greedily; it is measured on each
model's own continuations, and a model that repeats itself is easy to draft for.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

The MTP module's tensors (`mtp.*`) are in the checkpoint for serving engines; Transformers ignores them.

## How it was made

`{command}` with this recipe:

```yaml
{yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).strip()}
```
"""


def _row(title: str, model: ModelEvaluation) -> str:
    acceptance = " / ".join(f"{share:.1%}" for share in model.mtp_acceptance) or "-"
    kl = "-" if model.kl_to_teacher is None else f"{model.kl_to_teacher:.4f}"
    agreement = "-" if model.top1_agreement is None else f"{model.top1_agreement:.1%}"
    return (
        f"| {title} | {model.total_parameters:,} | {model.active_parameters:,} | {model.loss:.4f} | {model.perplexity:.2f} "
        f"| {model.bits_per_byte:.4f} | {kl} | {agreement} | {acceptance} |"
    )
