"""The section on the balance of tokens over experts, before and after."""

from collections.abc import Mapping, Sequence

import numpy as np

from slimqwen.reporting.charts.heatmaps import block_label, expert_use
from slimqwen.reporting.charts.models import routing
from slimqwen.reporting.run_folder import Run
from slimqwen.reporting.sections.chart import Chart
from slimqwen.reporting.titles import MAIN_RUN, title_of


def draw_utilisation(run: Run) -> list[Chart]:
    """Make charts of routing entropy and the busiest expert's load over depth, then of every expert's use."""
    models = run.evaluation.models if run.evaluation else {}
    shares = {
        name: models[name].expert_utilisation
        for name in ("teacher", "pruned", MAIN_RUN)
        if name in models and models[name].expert_utilisation
    }
    if not shares:
        return []
    entropy = {name: [_entropy(values) for values in blocks.values()] for name, blocks in shares.items()}
    busiest = {name: [max(values) * len(values) for values in blocks.values()] for name, blocks in shares.items()}
    layers = {name: _layers(run, name, blocks) for name, blocks in shares.items()}
    found = [
        Chart.of(
            "Routing before and after",
            routing(entropy, busiest, layers),
            "Above: 1 means that all experts are used equally, 0 that one expert gets every token. Below: the load of the "
            "busiest expert, as a multiple of an even share. Training should bring the result near the teacher.",
        )
    ]
    return found + [
        Chart.of(
            f"Expert use: {title_of(name)}",
            expert_use(shares[name]),
            "Share of the held-out tokens, as multiples of an even share; brown on the right means rarely used experts, "
            "a short dark left means that the load concentrates on few experts.",
        )
        for name in ("teacher", MAIN_RUN)
        if name in shares
    ]


def _entropy(shares: Sequence[float]) -> float:
    """Return -sum p log p / log(experts) of the shares of one block: 1 is even."""
    values = np.asarray(shares, dtype=np.float64)
    used = values[values > 0] / (values.sum() or 1.0)
    return float(-(used * np.log(used)).sum() / np.log(max(len(values), 2)))


def _layers(run: Run, name: str, blocks: Mapping[str, object]) -> list[str]:
    """Return the teacher's layer that each block of a model was, since layers are renumbered at each cut."""
    labels = [block_label(block) for block in blocks]
    if name == "teacher" or not run.plans:
        return labels
    origin = list(range(len(run.plans[0].scores.layer_block_influence)))
    for plan in run.plans:
        origin = [origin[layer] for layer in plan.kept_layers]
    return [str(origin[int(label)]) if label.isdigit() and int(label) < len(origin) else label for label in labels]
