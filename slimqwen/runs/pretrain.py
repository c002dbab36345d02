"""`pretrain`: a small teacher from text alone, by the same trainer with the terms lm and mtp_lm."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from slimqwen.artifacts import alone_in, atomic_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.writer import companions_fingerprint, copy_companions
from slimqwen.data.division import divide
from slimqwen.data.identity import text_contents
from slimqwen.data.sources import check_sources, describe, documents, is_mixture
from slimqwen.data.tokenizer import train_tokenizer
from slimqwen.families import Config, family_of
from slimqwen.model.device import resolve_device
from slimqwen.model.model import load, save
from slimqwen.recipe import DataRecipe, Execution, PretrainRecipe
from slimqwen.runs.places import check_apart, text_of
from slimqwen.runs.record import Steps
from slimqwen.runs.stage import Stage
from slimqwen.runs.stages import Tokenizing, source_settings
from slimqwen.runs.store import RunStore
from slimqwen.runs.training_stages import Initialising
from slimqwen.training.distil import distil, state_folder_of
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.metrics import StepLog


def pretrain(recipe: PretrainRecipe, command: str = "slimqwen pretrain") -> Path:
    """Train a tokenizer and a model from random weights; the checkpoint folder `run_dir/final`.

    Finished steps whose inputs have not changed are skipped, and the training resumes from its last saved state.
    """
    run_dir, data = recipe.run_dir, recipe.data
    family = family_of(recipe.config, "the recipe's config")
    config = family.normalise(recipe.config)
    vocab_size = family.sizes(config)[family.vocab]
    check_sources(data.sources, data.heldout_sources)
    check_apart("run_dir", run_dir, text_of(data))
    resolve_device(recipe.execution.device)

    with alone_in(run_dir):
        return _pretrain(recipe, config, vocab_size, command)


def _pretrain(recipe: PretrainRecipe, config: Config, vocab_size: int, command: str) -> Path:
    run_dir, data = recipe.run_dir, recipe.data
    steps = Steps(run_dir, command)
    stages = (TokenizerTraining, Tokenizing, Initialising, Pretraining, Rounding)
    steps.check(run_dir / stage.file for stage in stages)
    steps.begin(recipe)
    store = RunStore.of(steps, recipe.execution)
    tokenizer = store.get(TokenizerTraining(data, recipe.tokenizer_documents, vocab_size))
    tokens = store.get(Tokenizing(data, tokenizer))
    initial = store.get(InitialisingWithTokenizer(config, recipe.seed, tokenizer))
    trained = store.get(Pretraining(recipe, initial, tokens))
    return store.get(Rounding(trained, recipe.dtype))


@dataclass(frozen=True)
class TokenizerTraining(Stage):
    """The tokenizer that the first documents of the training text give."""

    data: DataRecipe
    documents: int
    vocab_size: int

    file = "tokenizer"
    revision = 1

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"text": text_contents(self.data)}

    @property
    def method(self) -> Mapping[str, Any]:
        return {**source_settings(self.data), "documents": self.documents, "vocab_size": self.vocab_size}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        train_tokenizer(islice(training_texts(self.data), self.documents), self.vocab_size, out)


@dataclass(frozen=True)
class InitialisingWithTokenizer(Initialising):
    """Random weights beside the tokenizer that was trained, which the result gets from here."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"tokenizer": companions_fingerprint(self.companions)}


@dataclass(frozen=True)
class Pretraining(Stage):
    """The training from random weights, without a teacher."""

    recipe: PretrainRecipe
    initial: Path
    tokens: Path

    file = "trained"
    revision = 1

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"initial": self.initial, "tokens": self.tokens}

    @property
    def method(self) -> Mapping[str, Any]:
        return {"recipe": self.recipe.training, "text": self.recipe.text}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        distil(
            TrainingInputs(self.initial, self.tokens),
            out,
            recipe=self.recipe.training,
            text=self.recipe.text,
            execution=execution,
            log=StepLog(run=self.recipe.name),
            title=self.recipe.name,
            keep_state=True,
        )

    def scratch_of(self, out: Path) -> Sequence[Path]:
        return [state_folder_of(out)]


@dataclass(frozen=True)
class Rounding(Stage):
    """The trained checkpoint with its weights in `dtype`."""

    trained: Path
    dtype: str

    file = "final"
    revision = 1

    @property
    def inputs(self) -> Mapping[str, Any]:
        return {"trained": self.trained}

    @property
    def method(self) -> Mapping[str, Any]:
        return {"dtype": self.dtype}

    def make(self, out: Path, execution: Execution, title: str) -> None:
        source = Checkpoint(self.trained)
        with atomic_folder(out) as folder:
            save(load(self.trained), folder, None, source.config, dtype=getattr(torch, self.dtype))
            copy_companions(self.trained, folder)


def training_texts(data: DataRecipe) -> Iterator[str]:
    """Texts of the training split only: not even the tokenizer sees what is held out."""
    mixed = is_mixture(data.sources)  # then the text of each source is divided apart
    for sources in [[source] for source in data.sources] if mixed else [data.sources]:
        found = chain.from_iterable(documents(source) for source in sources if source.megatron is None)
        if data.heldout_sources:
            yield from (document.text for document in found)
        else:
            whose = ", ".join(map(describe, sources))
            yield from (d.text for d, heldout in divide(found, data.heldout_fraction, whose) if not heldout)
