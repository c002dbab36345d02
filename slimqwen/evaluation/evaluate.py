"""The stage `evaluate`: from checkpoints and held-out tokens to evaluation.json."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from slimqwen.artifacts import fingerprint, makes_file, write_json
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import StageFailed, UserError, did_you_mean
from slimqwen.core.progress import Progress, quiet, say
from slimqwen.data.packed import bin_path
from slimqwen.data.store import TokenManifest, check_vocabulary, load_manifest
from slimqwen.data.tokenizer import load_tokenizer
from slimqwen.evaluation.acceptance import heldout_prompts
from slimqwen.evaluation.breakdown import Breakdown, breakdown, token_ranks
from slimqwen.evaluation.examinee import Examinee
from slimqwen.evaluation.fidelity import ALONE, Recording, compare, heldout_rows
from slimqwen.evaluation.kept import KeptRecording, keep_numbers, kept_folder
from slimqwen.evaluation.loading import load_examinee
from slimqwen.evaluation.result import FORMAT, Evaluation, ModelEvaluation, Sample
from slimqwen.evaluation.shares import Share
from slimqwen.families.count import count
from slimqwen.losses.loss import count_targets
from slimqwen.model.device import resolve_device, resolve_dtype
from slimqwen.parallel.job import Job, join_job
from slimqwen.recipe import EvaluationRecipe, Execution, TextSettings

LARGEST_LOSS = 700.0  # e^710 is beyond float64
SPECULATED_PROMPTS = 4  # one at a time: 64 tokens after each take the built-in teacher 6 s of a CPU core


@makes_file("models", "tokens", kind="evaluation")
def evaluate(
    models: Mapping[str, Path],
    out: Path,
    *,
    tokens: Path,
    recipe: EvaluationRecipe,
    text: TextSettings,
    teacher: str | None = "teacher",
    execution: Execution = Execution(),  # noqa: B008 - immutable
    title: str = "evaluate",
) -> Evaluation:
    """Measure checkpoints on the same held-out text and write `out`, a JSON file (`Evaluation`).

    One model is in memory at a time, or where it does not fit one of its layers (`layer_by_layer`); the teacher's final hidden states and lm_head are kept for the comparisons. Each model's
    results, and the teacher's hidden states, are written at once into a hidden folder beside `out` (`kept`): a repeated
    command, after an interruption or with other models, measures only what is missing.

    All processes that torchrun started may call it together: each model is sharded over them, each measures a share of the text
    and of the prompts, and the sums are added up. Another number of processes continues what was begun.

    Args:
        models: name -> checkpoint folder, all over the same vocabulary.
        tokens: folder written by `tokenize`, made with the models' tokenizer.
        recipe: the amounts to measure.
        text: its dtype is that of the forward passes, for all models; its seed is not used.
        teacher: the name in `models` that all are compared with; None: no comparisons.
        title: shown with the progress.
    Raises:
        UserError: for a checkpoint or token folder that is broken or incompatible with the others; too little held-out text.
        StageFailed: for a model whose loss is not finite.
    """
    checkpoints = _open(models, teacher, tokens)
    with join_job(resolve_device(execution.device)) as job, quiet(not job.is_first):
        examination = Examination(
            next(iter(checkpoints.values())),
            None if teacher is None else checkpoints[teacher],
            tokens=tokens,
            recipe=recipe,
            text=text,
            execution=execution,
            keep=kept_folder(out),
            job=job,
        )
        evaluations = _measure(examination, checkpoints, out, job, title)
        predicted, _ = count_targets(examination.rows.tokens, examination.rows.mask)
        evaluation = Evaluation(
            format=FORMAT, tokens=predicted, sequence_length=text.sequence_length, models=evaluations
        )
        if job.is_first:
            write_json(out, evaluation.model_dump(mode="json"))
        job.wait()
    return evaluation


def _measure(
    examination: "Examination", checkpoints: Mapping[str, Checkpoint], out: Path, job: Job, title: str
) -> dict[str, ModelEvaluation]:
    """Measure every model whose numbers are not kept beside `out`. What is there the first rank decides, and it alone writes."""
    evaluations = {}
    with keep_numbers(out, examination.made_from) if job.is_first else nullcontext() as kept:
        if job.is_first:
            examination.forget_other_recordings()
        for name, checkpoint in checkpoints.items():
            identity = checkpoint.fingerprint()

            def find(identity: str = identity) -> str:
                found = None if kept is None else kept.find(identity)
                return "" if found is None else found.model_dump_json()

            if found := job.lead(find):
                numbers = ModelEvaluation.model_validate_json(found)
                say(f"{title} {name}: measured already")
            else:
                numbers = examination.of(name, checkpoint, f"{title} {name}")
                if kept is not None:
                    kept.keep(identity, numbers)
            evaluations[name] = numbers.model_copy(update={"checkpoint": str(checkpoint.folder)})
    return evaluations


class Examination:
    """The held-out text and prompts on which models are measured, one after another, with the teacher's predictions.

    like: a checkpoint with the common vocabulary and tokenizer. keep: a folder for the teacher's hidden states, so that
    another process need not run it again (`kept.KeptRecording`). job: whose ranks measure together; default: this process alone.
    The other arguments are those of `evaluate`. Raises UserError where the text is too short.
    """

    def __init__(
        self,
        like: Checkpoint,
        teacher: Checkpoint | None,
        *,
        tokens: Path,
        recipe: EvaluationRecipe,
        text: TextSettings,
        execution: Execution = Execution(),  # noqa: B008 - immutable
        keep: Path | None = None,
        job: Job = ALONE,
    ) -> None:
        self._job = job
        self.rows = heldout_rows(tokens, text.sequence_length, recipe.tokens, text.documents)
        self._teacher = teacher
        self._recipe = recipe
        self._execution = execution
        self._sequence_length = text.sequence_length
        self._manifest = load_manifest(tokens)
        self._tokenizer = load_tokenizer(like.folder)
        counted = tokens / "train" if bin_path(tokens / "train").exists() else tokens / "heldout"  # else a mixture
        self._ranks = token_ranks(counted, like.config["vocab_size"])
        self._device = resolve_device(execution.device)
        self._dtype = resolve_dtype(text.dtype, self._device)
        self._own_rows = Share.of(len(self.rows.tokens), job).rows(self.rows)
        prompts = heldout_prompts(tokens, recipe.acceptance.prompts, recipe.acceptance.prompt_tokens)
        self._prompts = prompts.to(self._device)
        self._teachers_recording: Recording | None = None
        read = {
            "tokens": fingerprint(tokens),
            "sequence_length": text.sequence_length,
            "documents": text.documents,
            "dtype": str(self._dtype),
            "device": self._device.type,
            "teacher": None if teacher is None else teacher.fingerprint(),
        }
        # What numbers depend on beside the model; how many sequences are computed at once is rounding.
        self.made_from = read | {"evaluation": recipe.model_dump(mode="json")}
        recorded_from = read | {"measured_tokens": recipe.tokens}
        self._kept = None if keep is None or teacher is None else KeptRecording(keep, recorded_from, job)

    @torch.no_grad()
    def of(self, name: str, checkpoint: Checkpoint, title: str) -> ModelEvaluation:
        """Measure one model, on all ranks of the job. Raises StageFailed where its loss is not finite."""
        is_teacher = self._teacher is not None and checkpoint.folder == self._teacher.folder
        if self._teacher is not None and self._teachers_recording is None and not is_teacher:
            self._teachers_recording = self._kept_recording(self._teacher)
            if self._teachers_recording is None:
                self._teachers_recording = self._load(self._teacher).record(
                    self._own_rows, f"{title}: the teacher first"
                )
                self._keep(self._teachers_recording)
        model = self._load(checkpoint)
        recording = model.record(self._own_rows, title)
        if is_teacher:
            self._teachers_recording = recording
        means = compare(recording, self._teachers_recording, title=f"{title}: losses", job=self._job)
        _check_loss(name, checkpoint.folder, means["lm"])
        if is_teacher:
            self._keep(recording)
        acceptance, sample = self._generate(model, title)
        yielded = self._speculate(model, f"{title}: speculative decoding")
        del model
        where = breakdown(
            recording, self._sequence_length, self._ranks, title=f"{title}: where the loss is", job=self._job
        )
        return _summary(checkpoint, self._manifest, means, where, recording.utilisation, acceptance, yielded, sample)

    def forget_other_recordings(self) -> None:
        """Remove recordings of another teacher, or on other text, from the folder."""
        if self._kept is not None:
            self._kept.forget_others()

    def _keep(self, recording: Recording) -> None:
        """Write the teacher's recording, for other processes."""
        if self._kept is not None:
            self._kept.keep(recording, self.rows)

    def _kept_recording(self, teacher: Checkpoint) -> Recording | None:
        """Read an earlier process's recording of the teacher; None where there is none."""
        if self._kept is None:
            return None
        return self._kept.find(teacher, self.rows, self._execution.batch_size, self._dtype, self._device)

    def _load(self, checkpoint: Checkpoint) -> Examinee:
        acceptance = self._recipe.acceptance
        rows, length = self._own_rows.tokens[:, 1:].shape
        shape = (rows, max(length, acceptance.prompt_tokens + acceptance.new_tokens))
        return load_examinee(checkpoint, shape, self._dtype, self._device, self._job, self._execution)

    def _generate(self, model: Examinee, title: str) -> tuple[list[float], Sample]:
        """Generate continuations. Returns MTP acceptance (empty without an MTP module), and a sample: the first prompt's."""
        recipe = self._recipe.acceptance
        new_tokens, prompt_tokens = recipe.new_tokens, recipe.prompt_tokens
        share = Share.of(len(self._prompts), self._job)
        batches = model.batches(self._prompts[share.numbers if model.has_mtp else [0]])
        sequences, accepted = [], []
        what = "drafts" if model.has_mtp else "a sample"
        with Progress(f"{title}: {what}", total=sum(map(len, batches)) * new_tokens, unit="tokens") as progress:
            for batch in batches:
                sequences.append(model.continue_greedily(batch, new_tokens, progress.advance))
                if model.has_mtp:
                    accepted.append(model.accepted_drafts(sequences[-1], prompt_tokens, recipe.depth))
        prompt, completion = torch.tensor(self._job.gather(sequences[0][0].tolist())[0]).split(
            [prompt_tokens, new_tokens]
        )
        sample = Sample(prompt=self._tokenizer.decode(prompt), completion=self._tokenizer.decode(completion))
        if not accepted:
            return [], sample
        own = torch.cat(accepted)[: share.own].double().cpu()
        positions = len(self._prompts) * own.shape[1]
        return (self._job.total(own.sum(dim=(0, 1))) / positions).tolist(), sample

    def _speculate(self, model: Examinee, title: str) -> float | None:
        """Measure the tokens per forward pass of the backbone with drafts of the MTP module; None without one.

        Every n-th of the prompts is continued greedily, as by `slimqwen generate`.
        """
        if not model.has_mtp:
            return None
        few = self._prompts[:: math.ceil(len(self._prompts) / SPECULATED_PROMPTS)]
        return model.tokens_per_verification(few, self._recipe.acceptance.new_tokens, title)


def _open(models: Mapping[str, Path], teacher: str | None, tokens: Path) -> dict[str, Checkpoint]:
    """Open the checkpoints by name, the teacher first, and check that they can be compared on these tokens."""
    manifest = load_manifest(tokens)
    if manifest.heldout.documents == 0:
        raise UserError(
            f"{tokens} holds no held-out text: it is a source of the mixture in {tokens.parent}, which has it."
        )
    if not models:
        raise UserError("there is no model to evaluate: give at least one checkpoint folder.")
    if teacher is not None and teacher not in models:
        raise UserError(
            f"the teacher '{teacher}' is not among the models{did_you_mean(teacher, models)}: "
            f"name one of {', '.join(models)}, or no teacher."
        )
    checkpoints = {name: Checkpoint(models[name]) for name in sorted(models, key=lambda name: name != teacher)}
    first_name, first = next(iter(checkpoints.items()))
    vocab_size = first.config["vocab_size"]
    for name, checkpoint in checkpoints.items():
        check_vocabulary(manifest, tokens, checkpoint.folder, checkpoint.config["vocab_size"])
        if checkpoint.config["vocab_size"] != vocab_size:
            raise UserError(
                f"'{name}' ({checkpoint.folder}) has {checkpoint.config['vocab_size']:,} tokens in its vocabulary and "
                f"'{first_name}' ({first.folder}) {vocab_size:,}: evaluate them separately, with each one's own tokens."
            )
    return checkpoints


def _check_loss(name: str, path: Path, loss: float) -> None:
    """Raise StageFailed where a model's loss is not finite, or too large for its perplexity to be."""
    if not loss < LARGEST_LOSS:  # false for NaN too
        raise StageFailed(
            f"'{name}' ({path}) has a loss of {loss:g} nats per token on held-out text: its weights are broken; make it again."
        )


def _summary(
    checkpoint: Checkpoint,
    manifest: TokenManifest,
    means: Mapping[str, float],
    where: Breakdown,
    utilisation: dict[str, list[float]],
    acceptance: list[float],
    tokens_per_verification: float | None,
    sample: Sample,
) -> ModelEvaluation:
    loss = means["lm"]
    counts = count(checkpoint.family, checkpoint.config)
    return ModelEvaluation(
        checkpoint=str(checkpoint.folder),
        total_parameters=counts.total_parameters,
        active_parameters=counts.active_parameters,
        mtp_parameters=counts.mtp_parameters,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss / math.log(2) * manifest.heldout.tokens / manifest.heldout.text_bytes,
        kl_to_teacher=means.get("kd"),
        top1_agreement=means.get("top1_agreement"),
        mtp_loss=means.get("mtp_lm"),
        mtp_kl_to_teacher=means.get("mtp_kd"),
        mtp_acceptance=acceptance,
        tokens_per_verification=tokens_per_verification,
        loss_by_position=where.loss_by_position,
        loss_by_frequency=where.loss_by_frequency,
        calibration_error=where.calibration_error,
        expert_utilisation=utilisation,
        sample=sample,
    )
