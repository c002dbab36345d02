"""`pretrain`: a small teacher from text alone, by the same trainer with the terms lm and mtp_lm."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from slimqwen.artifacts import atomic_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.writer import copy_companions
from slimqwen.data.sources import documents, is_heldout
from slimqwen.data.tokenize import tokenize
from slimqwen.data.tokenizer import train_tokenizer
from slimqwen.distillation.distil import distil
from slimqwen.families import Config, family_of
from slimqwen.modeling.model import initialise, load, save
from slimqwen.progress import say
from slimqwen.recipe import DataRecipe, PretrainRecipe
from slimqwen.recipe_file import dump_recipe


def pretrain(recipe: PretrainRecipe) -> Path:
    """Train a tokenizer and a model from random weights; the checkpoint folder `run_dir/final`.

    Each step is skipped where its artefact exists already, and the training resumes from its last saved state.
    """
    run_dir = recipe.run_dir
    dump_recipe(recipe, run_dir / "recipe.resolved.yaml")
    if not (run_dir / "tokenizer").exists():
        say(f"tokenizer: learning {recipe.config['vocab_size']:,} tokens")
        texts = islice(training_texts(recipe.data), recipe.tokenizer_documents)
        train_tokenizer(texts, recipe.config["vocab_size"], run_dir / "tokenizer")
    if not (run_dir / "tokens").exists():
        tokenize(
            recipe.data.sources,
            run_dir / "tokenizer",
            run_dir / "tokens",
            heldout_sources=recipe.data.heldout_sources,
            heldout_fraction=recipe.data.heldout_fraction,
        )
    if not (run_dir / "initial").exists():
        write_initial(recipe.config, recipe.seed, run_dir / "initial", companions=run_dir / "tokenizer")
    if not (run_dir / "trained").exists():
        distil(
            run_dir / "initial",
            run_dir / "trained",
            tokens=run_dir / "tokens",
            recipe=recipe.training,
            sequence_length=recipe.data.sequence_length,
            seed=recipe.seed,
            device=recipe.device,
            run=recipe.name,
            title=recipe.name,
        )
    return write_rounded(run_dir / "trained", run_dir / "final", getattr(torch, recipe.dtype))


def training_texts(data: DataRecipe) -> Iterator[str]:
    """Texts of the training split only: not even the tokenizer sees what is held out."""
    for source in data.sources:
        for document in documents(source):
            if data.heldout_sources or not is_heldout(document.name, data.heldout_fraction):
                yield document.text


def write_initial(config: Config, seed: int, out: Path, *, companions: Path) -> Path:
    """A checkpoint of randomly initialised float32 weights: where pretraining and the random baseline start.

    The tokenizer and generation config come from the folder `companions`.
    """
    family = family_of(config, "config")
    config = family.with_serving_keys(family.normalise(config))
    model = initialise(config, seed)
    with atomic_folder(out) as folder:
        save(model, folder, None, config, dtype=model.head.dtype)
        copy_companions(companions, folder)
    return out


def write_rounded(checkpoint: Path, out: Path, dtype: torch.dtype) -> Path:
    """The same checkpoint with its weights in `dtype`."""
    source = Checkpoint(checkpoint)
    with atomic_folder(out) as folder:
        save(load(checkpoint), folder, None, source.config, dtype=dtype)
        copy_companions(checkpoint, folder)
    return out
