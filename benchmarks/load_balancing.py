"""Compare the two counts of the load-balancing loss, `running` and `exact`, in pretrainings of the built-in teacher's shape.

    python benchmarks/load_balancing.py OUT [--steps 1000] [--seeds 3] [--sequence-length 256] [--rows 2] [--measured-tokens 16384]
    python benchmarks/load_balancing.py OUT --table
    python benchmarks/load_balancing.py OUT --force [--batches 16] [--batch-size 64] [--sequence-length 256] [--rows 8]

Each arm and seed is one training from random weights, with the settings of recipes/builtin-teacher.yaml (8 sequences a step) and
portions of --rows sequences where the counts run. A seed is that of the weights and of the order of the text, the same in both arms.
A training that is interrupted goes on from its last saved state; a finished one is a line of OUT/results.jsonl and not made
again. --table prints, of each arm, mean and standard deviation over the seeds of

    lm               cross entropy over the last tenth of the steps, nats per token
    heldout_lm       of the trained model on held-out text
    balance          the load-balancing loss of the held-out text, by exact counts of all of it: 1 where all experts are chosen alike
    busiest          tokens of a block's busiest expert over the mean of its experts, mean over blocks

--force trains nothing: it compares, in the trained built-in teacher, the force of the loss on each expert's logit (its gradient,
summed over the tokens of a batch) by running counts with that by exact ones: the cosine of the two over all experts of all
blocks, per batch and of their sums over all batches, and the ratio of their norms.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from slimqwen.artifacts.json_lines import append, read_lines, value_of
from slimqwen.builtin import checkpoint_folder
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.checkpoint.writer import copy_companions
from slimqwen.data.store import training_stream
from slimqwen.data.tokenize import tokenize
from slimqwen.evaluation.fidelity import heldout_rows
from slimqwen.losses.balance import expert_counts, load_balancing_loss
from slimqwen.losses.loss import LossWeights, align, chunked_loss
from slimqwen.model.model import initialise, load, save
from slimqwen.model.routing import observe_routing
from slimqwen.parallel.ranks import ALONE
from slimqwen.recipe import BalancingCounts, DistilRecipe, Execution, Source, TextSettings
from slimqwen.training.balancing import StepCounts
from slimqwen.training.distil import distil
from slimqwen.training.inputs import TrainingInputs
from slimqwen.training.metrics import StepLog

BATCH_SIZE = 8
ARMS = ("exact", "running")
MEASURES = ("lm", "heldout_lm", "balance", "busiest")


def train(work: Path, tokens: Path, arm: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train one arm with one seed; return what is measured of it."""
    teacher, student, out = Checkpoint(checkpoint_folder("builtin")), work / f"initial-{seed}", work / f"{arm}-{seed}"
    if not student.exists():
        partial = work / f"partial-{seed}"
        partial.mkdir(exist_ok=True)
        model = initialise(teacher.config, seed)
        save(model, partial, None, teacher.config, dtype=torch.float32)
        copy_companions(teacher.folder, partial)
        partial.rename(student)
    steps = options.steps
    counts = {"kind": arm} | ({"rows": options.rows} if arm == "running" else {})
    recipe = DistilRecipe.model_validate(
        {
            "tokens": steps * BATCH_SIZE * options.sequence_length,
            "batch_size": BATCH_SIZE,
            "terms": ["lm", "mtp_lm"],
            "learning_rate": 3e-3,
            "final_learning_rate": 1e-4,
            "warmup": f"{max(steps // 12, 1)} steps",
            "load_balancing_coefficient": 0.01,
            "load_balancing_counts": counts,
        }
    )
    metrics = work / f"{arm}-{seed}.jsonl"
    if not out.exists():
        text = TextSettings(sequence_length=options.sequence_length, seed=seed)
        execution = Execution.model_validate({"device": "cpu", "save_every": "50 steps", "keep_states": 1})
        distil(
            TrainingInputs(student, tokens), out, recipe=recipe, text=text, execution=execution, log=StepLog(metrics)
        )
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    late = lines[-max(steps // 10, 1) :]
    return {"lm": statistics.mean(line["lm"] for line in late)} | measure(out, tokens, options)


@torch.no_grad()
def measure(folder: Path, tokens: Path, options: argparse.Namespace) -> dict[str, float]:
    """Measure a trained model on the held-out text."""
    model = load(folder)
    rows = heldout_rows(tokens, options.sequence_length, options.measured_tokens)
    blocks = [block for block in model.family.moe_blocks(model.config) if not block.is_mtp]
    with observe_routing(model, blocks) as seen:
        hidden = model(rows.tokens, with_mtp=False)
    predictions = align(rows.tokens, hidden.main)
    _, sums = chunked_loss(predictions, model.head, LossWeights(1.0, 0.0, 0.0, 0.0), chunk_tokens=1024)
    logits, mask = [seen[block.name].logits for block in blocks], predictions.main_mask
    counts = [expert_counts(seen[block.name].experts, mask, logits[0].shape[-1]) for block in blocks]
    balance = load_balancing_loss(logits, mask, counts, int(mask.sum()), model.family.router_scores)
    return {
        "heldout_lm": sums.means()["lm"],
        "balance": float(balance),
        "busiest": statistics.mean(float(of_block.max() / of_block.double().mean()) for of_block in counts),
    }


def compare_forces(tokens: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return cosines and ratios of the force by running counts and that by exact ones."""
    model, rows = load(checkpoint_folder("builtin")), options.batch_size
    stream = training_stream(tokens, options.sequence_length, 0)
    blocks = [block for block in model.family.moe_blocks(model.config) if not block.is_mtp]
    forces: dict[str, list[torch.Tensor]] = {arm: [] for arm in ARMS}
    for number in range(options.batches):
        batch = stream.batch(number * rows, rows)
        with torch.no_grad(), observe_routing(model, blocks) as seen:
            model(batch.tokens, with_mtp=False)
        routing = [seen[block.name] for block in blocks]
        mask = torch.ones(rows * options.sequence_length, dtype=torch.bool)
        for arm in ARMS:
            logits = [of_block.logits.detach().requires_grad_() for of_block in routing]
            counts = StepCounts(ALONE, BalancingCounts.model_validate({"kind": arm, "rows": options.rows}), rows)
            met = counts.meet(routing, mask, rows)
            loss = load_balancing_loss(logits, None, met, len(mask), model.family.router_scores)
            gradients = torch.autograd.grad(loss, logits)
            forces[arm].append(torch.stack([gradient.double().sum(0) for gradient in gradients]).flatten())

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(one, other, dim=0))

    pairs = list(zip(*(forces[arm] for arm in ARMS), strict=True))
    sums = [torch.stack(forces[arm]).sum(0) for arm in ARMS]
    return {
        "cosine": statistics.mean(cosine(*pair) for pair in pairs),
        "lowest_cosine": min(cosine(*pair) for pair in pairs),
        "norm_ratio": statistics.mean(float(running.norm() / exact.norm()) for exact, running in pairs),
        "cosine_of_sums": cosine(*sums),
        "norm_ratio_of_sums": float(sums[1].norm() / sums[0].norm()),
    }


def print_table(results: list[dict[str, float | str]]) -> None:
    """Print mean and standard deviation over the seeds, by settings and arm."""
    for settings in sorted({(r["steps"], r["sequence_length"], r["rows"]) for r in results}):
        ours = [r for r in results if (r["steps"], r["sequence_length"], r["rows"]) == settings]
        print("{} steps of 8 x {} tokens, portions of {}".format(*settings))
        for arm in ARMS:
            of_arm = [r for r in ours if r["arm"] == arm]
            if not of_arm:
                continue
            cells = []
            for name in MEASURES:
                values = [float(r[name]) for r in of_arm]
                spread = statistics.stdev(values) if len(values) > 1 else float("nan")
                cells.append(f"{name} {statistics.mean(values):.4f} ± {spread:.4f}")
            print(f"  {arm:8} {len(of_arm)} seeds  " + "  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--measured-tokens", type=int, default=16384)
    parser.add_argument("--force", action="store_true", help="Compare forces, and train nothing.")
    parser.add_argument("--batches", type=int, default=16, help="Of --force.")
    parser.add_argument("--batch-size", type=int, default=64, help="Of --force.")
    parser.add_argument("--table", action="store_true", help="Print what is measured, and measure nothing.")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.jsonl"
    settings = {"steps": options.steps, "sequence_length": options.sequence_length, "rows": options.rows}
    tokens = options.out / "tokens"
    if not options.table and not tokens.exists():
        tokenize([Source(builtin="python-stdlib", keep_fraction=0.2)], checkpoint_folder("builtin"), tokens)
    if options.force:
        names = ("batch_size", "sequence_length", "rows", "batches")
        shape = {name: getattr(options, name) for name in names}
        print(json.dumps(shape | compare_forces(tokens, options)))
        return
    results = [value for line in read_lines(file) if (value := value_of(line))]
    if not options.table:
        work = options.out / "-".join(map(str, settings.values()))
        work.mkdir(exist_ok=True)
        for seed in range(options.seeds):
            for arm in ARMS:
                key = settings | {"arm": arm, "seed": seed}
                if not any(key.items() <= result.items() for result in results):
                    results.append(key | train(work, tokens, arm, seed, options))
                    append(file, results[-1])
    print_table(results)


if __name__ == "__main__":
    main()
