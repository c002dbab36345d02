"""`pretrain`: a small teacher from text alone, by the same trainer with the terms lm and mtp_lm."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch

from slimqwen.artifacts import alone_in, atomic_folder, fingerprint
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.writer import companions_fingerprint, copy_companions
from slimqwen.data.division import divide
from slimqwen.data.identity import text_contents
from slimqwen.data.sources import check_sources, describe, documents, is_mixture
from slimqwen.data.tokenize import FIELDS_WITHOUT_EFFECT, tokenize
from slimqwen.data.tokenizer import train_tokenizer
from slimqwen.families import Config, family_of
from slimqwen.model.device import resolve_device
from slimqwen.model.model import initialise, load, save
from slimqwen.recipe import DataRecipe, PretrainRecipe
from slimqwen.runs.places import check_apart, text_of
from slimqwen.runs.record import Steps
from slimqwen.training.distil import distil, remove_state


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
    run_dir, data, training = recipe.run_dir, recipe.data, recipe.training
    steps = Steps(run_dir, command)
    tokenizer, tokens, initial, trained, final = outputs = [
        run_dir / name for name in ("tokenizer", "tokens", "initial", "trained", "final")
    ]
    steps.check(outputs)
    steps.begin(recipe)
    text = {
        "data": data.model_dump(mode="json", exclude=FIELDS_WITHOUT_EFFECT),
        "text": text_contents(data),
        "documents": recipe.tokenizer_documents,
    }
    steps.step(
        "tokenizer",
        tokenizer,
        {**text, "vocab_size": vocab_size},
        lambda: train_tokenizer(islice(training_texts(data), recipe.tokenizer_documents), vocab_size, tokenizer),
    )
    steps.step(
        "tokens",
        tokens,
        {**text, "tokenizer": companions_fingerprint(tokenizer)},
        lambda: tokenize(
            data.sources,
            tokenizer,
            tokens,
            heldout_sources=data.heldout_sources,
            heldout_fraction=data.heldout_fraction,
            separator=data.separator,
            execution=recipe.execution,
        ),
    )
    steps.step(
        "initial",
        initial,
        {"config": config, "seed": recipe.seed, "tokenizer": companions_fingerprint(tokenizer)},
        lambda: write_initial(config, recipe.seed, initial, companions=tokenizer),
    )
    steps.step(
        "trained",
        trained,
        {
            "initial": Checkpoint(initial).fingerprint(),
            "tokens": fingerprint(tokens),
            "training": training.model_dump(mode="json"),
            "sequence_length": data.sequence_length,
            "documents": data.documents,
            "seed": recipe.seed,
        },
        lambda: distil(
            initial,
            trained,
            tokens=tokens,
            recipe=training,
            sequence_length=data.sequence_length,
            documents=data.documents,
            seed=recipe.seed,
            execution=recipe.execution,
            run=recipe.name,
            title=recipe.name,
            keep_state=True,
        ),
    )
    remove_state(trained)
    dtype = getattr(torch, recipe.dtype)
    inputs = {"trained": Checkpoint(trained).fingerprint(), "dtype": recipe.dtype}
    return steps.step("final", final, inputs, lambda: write_rounded(trained, final, dtype))


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


def write_initial(config: Config, seed: int, out: Path, *, companions: Path) -> Path:
    """A checkpoint of randomly initialised float32 weights: where pretraining and the random baseline start.

    The tokenizer and generation config come from the folder `companions`.
    """
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
