"""Searching a shape for a budget: the fast grid against the obvious loop, the paper's shapes, what is refused."""

import itertools
from pathlib import Path

import pytest
from tiny import canonical, tiny_config
from tiny_families import FAMILIES_NATIVE

from slimqwen.checkpoint.config import read_config
from slimqwen.core.errors import UserError
from slimqwen.families import FAMILIES, Config
from slimqwen.families.count import count
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.recipe import Target
from slimqwen.recipe.file import load_recipe
from slimqwen.shapes.budget import parse
from slimqwen.shapes.fit import SEARCHED, Candidate, candidates_table, fit, period, write_target
from slimqwen.shapes.target import completed, target_config

RECIPES = Path(__file__).parent.parent / "recipes"


def shape(candidate: Candidate) -> tuple[int, ...]:
    return tuple(getattr(candidate.target, field) for field in SEARCHED)


def small_config() -> Config:
    """8 layers in two 3:1 blocks, 24 experts top-4: small enough to try every shape."""
    return QWEN3_NEXT.normalise(
        tiny_config(
            num_hidden_layers=8,
            layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
            mlp_layer_types=["sparse"] * 8,
            num_experts=24,
            num_experts_per_tok=4,
        )
    )


def every_shape(config: Config) -> dict[tuple[int, ...], tuple[int, int]]:
    """(layers, hidden, experts, expert size, top-k) -> (total, active), one by one."""
    counted = {}
    choices = (range(4, 9), (8, 16, 24, 32), (8, 16, 24), (8, 16), (2, 3, 4))
    for sizes in itertools.product(*choices):
        target = completed(QWEN3_NEXT, Target(**dict(zip(SEARCHED, sizes, strict=True))), config)
        counts = count(QWEN3_NEXT, target_config(QWEN3_NEXT, config, target))
        counted[sizes] = (counts.total_parameters, counts.active_parameters)
    return counted


def test_the_search_finds_what_a_loop_over_all_shapes_finds() -> None:
    config = small_config()
    assert config["moe_intermediate_size"] == 16
    counted = every_shape(config)
    found = fit(QWEN3_NEXT, config, "total=0.1M,active=0.07M", align=8, limit=10**6)
    met = {s for s, (total, active) in counted.items() if 50_000 <= total <= 150_000 and 65_000 <= active <= 75_000}
    assert {sizes[0] for sizes in met} == {4, 5, 6, 7, 8}, "an example with broken blocks too"
    assert {shape(candidate) for candidate in found} == met
    for candidate in found:
        total, active = counted[shape(candidate)]
        assert (candidate.counts.total_parameters, candidate.counts.active_parameters) == (total, active)
        assert candidate.deviations == pytest.approx({"total": total / 100_000 - 1, "active": active / 70_000 - 1})
    whole = [candidate.target.num_hidden_layers % 4 == 0 for candidate in found]
    assert whole == sorted(whole, reverse=True), "whole 3:1 blocks come first"
    for _, group in itertools.groupby(found, key=lambda candidate: candidate.target.num_hidden_layers % 4 == 0):
        distance = [candidate.distance for candidate in group]
        assert distance == sorted(distance)


@pytest.mark.parametrize(
    ("source", "budgets", "target"),
    [
        ("qwen3-next-80b-a3b.json", "total=23B,active=2B", "slimqwen-23a2b.yaml"),
        ("qwen3-next-24b-a2b.json", "total=6B,active=1B", "slimqwen-6a1b.yaml"),
    ],
)
def test_the_papers_own_shapes_are_among_the_first(source: str, budgets: str, target: str) -> None:
    family, config = read_config(RECIPES / source)
    wanted = load_recipe(RECIPES / target, model=Target).model_dump(exclude_none=True)
    found = fit(family, config, budgets)
    assert len(found) == 10
    places = [wanted.items() <= candidate.target.model_dump().items() for candidate in found]
    assert any(places[:3])


def test_alignment_holds_for_every_candidate() -> None:
    family, config = read_config(RECIPES / "qwen3-next-80b-a3b.json")
    for candidate in fit(family, config, "total=30B", align=256, limit=50):
        layers, hidden, experts, neurons, chosen = shape(candidate)
        assert (layers % 4, hidden % 256, experts % 8, neurons % 256) == (0, 0, 0, 0)
        assert 5 <= chosen <= 10
        assert abs(candidate.counts.total_parameters / 30e9 - 1) <= 0.03


def test_bytes_are_never_exceeded() -> None:
    family, config = read_config(RECIPES / "qwen3-next-80b-a3b.json")
    found = fit(family, config, "checkpoint=40GB")
    assert all(0.97 * 40e9 <= candidate.checkpoint_bytes <= 40e9 for candidate in found)
    for candidate in found:
        assert candidate.checkpoint_bytes == 2 * (candidate.counts.total_parameters + candidate.counts.mtp_parameters)
    assert all(c.checkpoint_bytes > 40e9 for c in fit(family, config, "checkpoint=40GiB"))


def test_pinned_sizes_stay() -> None:
    family, config = read_config(RECIPES / "qwen3-next-80b-a3b.json")
    pins = {"num_hidden_layers": 37, "hidden_size": 1000, "linear_num_key_heads": 8}
    text = ",".join(f"{field}={size}" for field, size in pins.items())
    for candidate in fit(family, config, f"active_without_input_embedding=1.00B,{text}"):
        assert pins.items() <= candidate.target.model_dump().items()
        again = target_config(family, config, completed(family, candidate.target, config))
        assert again["linear_num_value_heads"] == 16  # its ratio to the key heads
        assert count(family, again) == candidate.counts


def test_a_written_target_is_the_candidate(tmp_path: Path) -> None:
    family, config = read_config(RECIPES / "qwen3-next-24b-a2b.json")
    found = fit(family, config, "total=6B,active=1B")
    write_target(found[1], tmp_path / "target.yaml")
    assert load_recipe(tmp_path / "target.yaml", model=Target) == found[1].target
    table = candidates_table(found)
    assert [line.split()[0] for line in table.splitlines()[1:11]] == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("model_type", FAMILIES_NATIVE)
def test_every_family_can_be_fitted(model_type: str) -> None:
    family, config = FAMILIES[model_type], canonical(FAMILIES_NATIVE[model_type])
    total = count(family, config).total_parameters
    for candidate in fit(family, config, f"total={int(0.8 * total)}", align=2):
        assert 0.77 * total <= candidate.counts.total_parameters <= 0.83 * total
        again = target_config(family, config, completed(family, candidate.target, config))
        assert count(family, again) == candidate.counts


@pytest.mark.parametrize(
    ("written", "lowest", "highest"),
    [
        ("total=2B", 1.5e9, 2.5e9),  # what rounds to 2B
        ("total=2.0B", 1.94e9, 2.06e9),  # the tolerance is wider than the rounding
        ("total=600M", 582e6, 618e6),
        ("total=23000000000", 22.31e9, 23.69e9),
        ("checkpoint=40GB", 38.8e9, 40e9),
        ("checkpoint=1.5gib", 0.97 * 1.5 * 2**30, 1.5 * 2**30),
    ],
)
def test_what_meets_a_budget(written: str, lowest: float, highest: float) -> None:
    (budget,), _ = parse(written)
    assert (budget.lowest, budget.highest) == pytest.approx((lowest, highest))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("totl=3B", "did you mean 'total'"),
        ("total=3XB", "must be a number and one of K, M, B, T"),
        ("total=-3B", "must be a number"),
        ("total=0B", "must be a number"),
        ("checkpoint=40XB", "'40XB' is not a size in bytes"),
        ("total=3B,total=4B", "once"),
        ("total", "total=..."),
        ("hidden_size=1024", "needs a budget"),
        ("total=3B,hidden_size=wide", "hidden_size must be a positive whole number, is 'wide'"),
        ("total=3B,hidden_size=0", "hidden_size must be a positive whole number"),
        ("total=3B,hidden_size=4096", "more than the source's 2048"),
        (
            "total=20M",
            r"can't be reached: the smallest shape has total [0-9,]+ \(num_hidden_layers 4, hidden_size 128,",
        ),
        ("checkpoint=1MB", r"the smallest shape has checkpoint [0-9,]+ bytes"),
        ("total=90B", "the largest shape has total 79,674,391,296"),
        ("total=23B,active=400M", r"no shape meets total=23B,active=400M; the nearest has total [0-9,]+, active"),
    ],
)
def test_what_cannot_be_met_is_one_sentence(wanted: str, words: str) -> None:
    family, config = read_config(RECIPES / "qwen3-next-80b-a3b.json")
    with pytest.raises(UserError, match=words):
        fit(family, config, wanted)


def test_period() -> None:
    assert period(["linear", "linear", "full"] * 3) == 3
    assert period(["linear", "linear", "full", "linear"]) == 3
    assert period(["full"] * 5) == 1
    assert period(["full", "linear", "linear"]) == 3
