"""How far plans from two halves of the text agree: Jaccard indices that can be counted by hand."""

from pathlib import Path

import pytest
import torch
from settings import paper
from tiny import write_tiny_checkpoint
from torch import Tensor

from slimqwen.calibration.statistics import Half, Part, Statistics
from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.planning.choose import Choice, Scores
from slimqwen.planning.experts import ExpertGroup
from slimqwen.planning.plan import Plan, plan
from slimqwen.planning.stability import compare, jaccard, stability_text
from slimqwen.recipe import ExpertRecipe, PruningRecipe, Target

TARGET = Target(num_hidden_layers=3, hidden_size=24, num_experts=4)
FREQUENCY = paper(depth="block_influence", experts=ExpertRecipe(importance="frequency", compression="prune"))
TOKENS = 100


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 layers (the last with full attention), 32 channels, 8 experts, and the MTP module."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("stability") / "checkpoint")


def favouring(units: list[int], size: int) -> Tensor:
    """2 for the favoured units, 1 for the others."""
    values = torch.ones(size, dtype=torch.float64)
    values[units] = 2.0
    return values


def invented(checkpoint: Path, favourites: dict[Part, dict[str, list[int]]]) -> Statistics:
    """Statistics whose parts favour units 0, 1, .. of every axis, but for their own `favourites`, by name.

    Names: "hidden" for channels, "layers" for layers that turn the hidden state most, a block's for its experts.
    """
    source = Checkpoint(checkpoint)
    sums = {}
    for part, own in favourites.items():
        for _, norm in source.family.residual_norms(source.config):
            sums[f"{part.prefix}norm/{norm}/abs_sums"] = favouring(own.get("hidden", list(range(24))), 32)
        for block in source.family.moe_blocks(source.config):
            experts = own.get(block.name, list(range(4)))
            sums[f"{part.prefix}experts/{block.name}/assignments"] = favouring(experts, 8)
            for name in ("gate_sums", "gated_norm_sums"):
                sums[f"{part.prefix}experts/{block.name}/{name}"] = torch.ones(8, dtype=torch.float64)
        sums[f"{part.prefix}layers/hidden_sums"] = torch.ones(5, 32, dtype=torch.float64)
        sums[f"{part.prefix}layers/cosine_sums"] = TOKENS / 3 * (3 - favouring(own.get("layers", [0, 1, 3]), 4))
    tokens = {part: {"main": TOKENS, "mtp": TOKENS} for part in favourites}
    return Statistics(source.fingerprint(), "invented", tokens, sums)


def stable(checkpoint: Path, out: Path, statistics: Statistics, pruning: PruningRecipe = FREQUENCY) -> Plan:
    return plan(checkpoint, out / "plan.json", statistics=statistics, target=TARGET, pruning=pruning, stability=True)


def halves(**odd: list[int]) -> dict[Part, dict[str, list[int]]]:
    """Both halves of one source; `odd` says what the odd rows favour instead."""
    return {Part("text", 0): {}, Part("text", 1): {name.replace("_", "."): units for name, units in odd.items()}}


def test_jaccard_is_the_shared_part_of_what_either_keeps() -> None:
    assert jaccard([0, 1, 2], [3, 2, 1]) == 2 / 4
    assert jaccard([5, 7], [7, 5]) == 1.0
    assert jaccard([0], [1]) == 0.0


def test_halves_that_want_different_experts_in_one_layer(checkpoint: Path, tmp_path: Path) -> None:
    # Layer 1: experts 0 1 2 3 against 2 3 4 5, 2 of 6 shared. Channels 0..23 against 8..31: 16 of 32 shared.
    # Layers: 0 1 3 against 1 2 3: 2 of 4 shared; blocks 1 and 3 are in both choices, and so is MTP.
    odd = {"model_layers_1": [2, 3, 4, 5], "hidden": list(range(8, 32)), "layers": [1, 2, 3]}
    made = stable(checkpoint, tmp_path, invented(checkpoint, halves(**odd)))
    assert made.stability is not None
    (agreement,) = made.stability
    assert agreement.between == ("even rows", "odd rows")
    assert agreement.axes["layer"].jaccard == {"model": 0.5}
    assert agreement.axes["hidden"].jaccard == {"model": 0.5}
    assert agreement.axes["expert"].jaccard == {"model.layers.1": 2 / 6, "model.layers.3": 1.0, "mtp.layers.0": 1.0}
    assert agreement.axes["expert"].mean == pytest.approx(7 / 9)
    assert agreement.axes["expert"].lowest == "model.layers.1"
    # Two random halves of 8 experts: 2 of 4 are expected in both, and 6 in either.
    assert agreement.axes["expert"].chance == pytest.approx(2 / 6)
    assert agreement.axes["hidden"].chance == pytest.approx(24 / 40)
    assert Plan.load(tmp_path / "plan.json").stability == made.stability

    text = stability_text(made.stability)
    assert text.splitlines()[-1] == (
        "even rows against odd rows: layer Jaccard 0.50; hidden Jaccard 0.50; "
        "expert mean Jaccard 0.78, lowest 0.33 in model.layers.1"
    )
    cells = [line.split() for line in text.splitlines()]
    assert ["model", "0.50", "0.50"] in cells and ["model.layers.1", "0.33"] in cells
    assert ["mean", "0.50", "0.50", "0.78"] in cells and ["by", "chance", "0.60", "0.60", "0.33"] in cells


def test_halves_that_agree(checkpoint: Path, tmp_path: Path) -> None:
    made = stable(checkpoint, tmp_path, invented(checkpoint, halves()))
    assert made.stability is not None
    for axis in made.stability[0].axes.values():
        assert set(axis.jaccard.values()) == {1.0}


def test_the_plan_is_the_choice_of_all_the_text(checkpoint: Path, tmp_path: Path) -> None:
    """`stability` changes nothing else; sources and their weights are written down."""
    statistics = invented(checkpoint, halves(hidden=[*range(20), 24, 25, 26, 27]))
    looked = stable(checkpoint, tmp_path, statistics)
    made = plan(checkpoint, tmp_path / "plan.json", statistics=statistics, target=TARGET, pruning=FREQUENCY)
    assert made.stability is None
    assert looked.model_copy(update={"stability": None}) == made
    assert made.sources == {"text": 2 * TOKENS} and made.pruning.source_weights is None


def two_sources(checkpoint: Path) -> Statistics:
    """`code` wants experts 0..3 and `wiki` 4..7 in layer 3; within each the halves agree."""
    both: tuple[Half, Half] = (0, 1)
    wishes = {"code": {}, "wiki": {"model.layers.3": [4, 5, 6, 7]}}
    return invented(checkpoint, {Part(source, half): own for source, own in wishes.items() for half in both})


def test_sources_against_each_other(checkpoint: Path, tmp_path: Path) -> None:
    made = stable(checkpoint, tmp_path, two_sources(checkpoint))
    assert made.stability is not None and made.sources == {"code": 200, "wiki": 200}
    rows, sources = made.stability
    assert set(rows.axes["expert"].jaccard.values()) == {1.0}
    assert sources.between == ("code", "wiki") and sources.axes["expert"].jaccard["model.layers.3"] == 0.0
    assert stability_text(made.stability).splitlines()[-1].startswith("code against wiki: layer Jaccard 1.00")


@pytest.mark.parametrize(("wiki", "kept"), [(0.4, [0, 1, 2, 3]), (0.6, [4, 5, 6, 7])])
def test_weights_decide_between_sources(checkpoint: Path, tmp_path: Path, wiki: float, kept: list[int]) -> None:
    weights = {"wiki": wiki, "code": 1 - wiki}
    pruning = FREQUENCY.model_copy(update={"source_weights": weights})
    made = stable(checkpoint, tmp_path, two_sources(checkpoint), pruning)
    assert [group.base for group in made.expert_groups["model.layers.3"]] == kept
    assert Plan.load(tmp_path / "plan.json").pruning.source_weights == weights
    # 100 + 100 tokens of each: experts' shares are weighted means of 2 and 1 in 100
    scores = made.scores.experts["model.layers.3"]
    assert scores == pytest.approx([(2 - wiki) / 100] * 4 + [(1 + wiki) / 100] * 4)


def test_weights_for_other_sources_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    pruning = FREQUENCY.model_copy(update={"source_weights": {"text": 1.0}})
    with pytest.raises(UserError, match=r"pruning\.source_weights names 'text'"):
        stable(checkpoint, tmp_path, two_sources(checkpoint), pruning)
    assert not (tmp_path / "plan.json").exists()


def test_one_sequence_has_no_halves(checkpoint: Path, tmp_path: Path) -> None:
    statistics = invented(checkpoint, {Part("text", 0): {}})
    with pytest.raises(UserError, match="'text' was measured on one sequence"):
        stable(checkpoint, tmp_path, statistics)


def test_axes_with_a_set_in_each_unit_are_averaged_over_them() -> None:
    """KV heads per block; neurons per expert: {0, 1} and {0, 2} share 1 of 3, {4, 5} twice is 1."""

    def choice(heads: list[int], neurons: list[list[int]]) -> Choice:
        scores = Scores(layer_similarity=[], layer_block_influence=[], hidden=[], experts={})
        groups = {"a": [ExpertGroup(base=e, members=[e], weights=[1.0]) for e in (0, 1)]}
        kept = {"kv_head": {"a": heads, "b": [0]}, "expert_neuron": {"a": neurons}}
        return Choice([0], kept, groups, scores)  # type: ignore[arg-type]

    sizes = {"layer": 2, "kv_head": 2, "expert_neuron": 8, "expert": 2}
    axes = compare(("x", "y"), choice([0], [[0, 1], [4, 5]]), choice([1], [[0, 2], [5, 4]]), sizes, "expert").axes
    assert axes["kv_head"].jaccard == {"a": 0.0, "b": 1.0}
    assert axes["kv_head"].chance == pytest.approx(1 / 3)
    assert axes["expert_neuron"].jaccard == {"a": pytest.approx((1 / 3 + 1) / 2)}
    assert axes["expert_neuron"].chance == pytest.approx(2 / 14)
    assert axes["expert"].chance == 1.0
