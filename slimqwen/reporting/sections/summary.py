"""The head of a run's page: its setup, an assessment, and the main results."""

from dataclasses import dataclass

from slimqwen.core.progress import duration
from slimqwen.recipe import BUILTIN_TEACHER
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections.amounts import amount, percent
from slimqwen.reporting.titles import MAIN_RUN, title_of

CLEARLY_LESS = 0.8  # a KL at most this share of a baseline's is "clearly" better


@dataclass(frozen=True)
class Assessment:
    """Whether the run succeeded, by its KL to the teacher beside its baselines'."""

    tone: str  # "good", "mixed", "bad", or "plain" without a basis for judgement
    headline: str
    sentence: str


@dataclass(frozen=True)
class Tile:
    """A main result, shown large."""

    label: str
    value: str
    context: str


def describe_setup(run: Run) -> str:
    """Describe the run's setup in a sentence."""
    recipe = run.recipe
    teacher = "the built-in teacher" if recipe.teacher == BUILTIN_TEACHER else recipe.teacher
    how = "trained from random weights" if recipe.init == "random" else f"pruned in {_stage_words(run)}, then distilled"
    if not {"kd", "mtp_kd"} & set(recipe.distil.terms):
        how = how.replace("distilled", "trained on text alone")
    return f"From {teacher}, {how}, on {recipe.distil.tokens:,} tokens."


def _stage_words(run: Run) -> str:
    """Describe the stages, `2 stages (depth first)`; a schedule's number is unknown until its last plan is made."""
    count = len(run.recipe.stages) if run.recipe.stages is not None else len(run.plans) if run.evaluation else 0
    stages = "one stage" if count == 1 else f"{count} stages" if count else "stages"
    return stages if run.recipe.stages is not None else f"{stages} ({run.recipe.schedule.replace('_', ' ')})"


def assess(run: Run) -> Assessment:
    """Assess whether the run was better than training from random weights, and how close it is to the teacher."""
    teacher, result = run.teacher, run.result
    if teacher is None or result is None:
        return Assessment("plain", "Not evaluated yet.", _progress_sentence(run))
    sentence = (
        f"{percent(result.total_parameters / teacher.total_parameters)} of the teacher’s parameters; "
        f"held-out loss {result.loss:.2f} against the teacher’s {teacher.loss:.2f}"
    )
    random, pruned = run.kl("random_init"), run.kl("pruned")
    kl = result.kl_to_teacher
    if kl is None:
        return Assessment("plain", "Trained and evaluated.", f"{sentence}.")
    sentence += f"; KL to the teacher {kl:.2f}"
    if run.recipe.init == "random":
        return Assessment("plain", "Trained from random weights: a baseline for a pruned run.", f"{sentence}.")
    if random is not None:
        sentence += f", random initialisation trained on the same tokens: {random:.2f}"
    if pruned is not None and (random is None or kl >= pruned):
        sentence += f", the same cut before any training: {pruned:.2f}"
    tone, headline = _judge(kl, random, pruned)
    return Assessment(tone, headline, f"{sentence}.")


def _judge(kl: float, random: float | None, pruned: float | None) -> tuple[str, str]:
    """Return tone and headline for a pruned and trained model's KL to the teacher beside those of its baselines."""
    if pruned is not None and kl >= pruned:
        return "bad", "It did not work: after training, the model is no nearer to the teacher than after the cut alone."
    if random is not None and kl >= random:
        return "bad", "It did not work: starting from random weights came as near to the teacher, or nearer."
    if random is not None and kl > CLEARLY_LESS * random:
        return "mixed", "It worked, narrowly: pruning the teacher beat starting from random weights by a little."
    if random is not None:
        return "good", "It worked: pruning the teacher clearly beat starting from random weights."
    if pruned is not None:
        return "good", "Training brought the pruned model back towards the teacher."
    return "plain", "Trained and evaluated; the recipe has no baseline to compare with."


def _progress_sentence(run: Run) -> str:
    steps = run.steps.get(MAIN_RUN)
    if steps is None:
        return "No training step is complete yet; run the recipe again to continue."
    done = min(steps.tokens[-1] / run.recipe.distil.tokens, 1.0)
    return f"Training has seen {steps.tokens[-1]:,.0f} tokens, {percent(done)} of the recipe’s; run the recipe again to continue."


def list_tiles(run: Run) -> list[Tile]:
    """List the main results."""
    found = []
    teacher, result = run.teacher, run.result
    if teacher is not None and result is not None:
        found = [
            _share_tile("Parameters", teacher.total_parameters, result.total_parameters),
            _share_tile("Active per token", teacher.active_parameters, result.active_parameters),
            Tile("Held-out loss", f"{result.loss:.2f}", f"nats per token; teacher {teacher.loss:.2f}"),
        ]
        if result.kl_to_teacher is not None:
            random = run.kl("random_init")
            context = "0 is the teacher" if random is None else f"{title_of('random_init')} {random:.2f}"
            found.append(Tile("KL to the teacher", f"{result.kl_to_teacher:.2f}", f"nats per token; {context}"))
        if result.top1_agreement is not None:
            context = "of predictions are the teacher’s"
            found.append(Tile("Top-1 agreement", percent(result.top1_agreement), context))
    if run.times:
        found.append(Tile("Time", duration(sum(step.seconds for step in run.times)), f"{len(run.times)} steps"))
    return found


def _share_tile(label: str, before: int, after: int) -> Tile:
    return Tile(label, percent(after / before), f"{amount(after)} of {amount(before)}")
