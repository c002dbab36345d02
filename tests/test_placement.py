"""What fits the GPUs that there are: which settings are recommended, their traffic and time by hand, and what is printed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import assert_one_sentence, slimqwen
from tiny import tiny_config

from slimqwen.checkpoint.config import read_config
from slimqwen.cli.placing import hardware_of
from slimqwen.core.errors import UserError
from slimqwen.families.qwen3_next import QWEN3_NEXT
from slimqwen.recipe.file import load_recipe
from slimqwen.runs.placing import as_set, memory_note, work_of
from slimqwen.shapes.hardware import GPUS, Hardware, gpu_of
from slimqwen.shapes.placement import Student, Work, counts_ahead, layouts, needed_bytes, place
from slimqwen.shapes.placement_table import overrides, placements_text
from slimqwen.shapes.step_time import COMPUTE_FRACTION, LINK_FRACTION, estimate
from slimqwen.shapes.traffic import predict_traffic
from slimqwen.shapes.training_memory import TrainingSettings, measure, training_memory

RECIPES = Path(__file__).parent.parent / "recipes"
RECIPE, TEACHER = RECIPES / "qwen3-next-80b-a3b-to-23b-a2b.yaml", RECIPES / "qwen3-next-80b-a3b.json"


def tiny_work(**changes: Any) -> Work:
    config = tiny_config()
    return replace(Work(QWEN3_NEXT, config, (Student(config),), rows=16, sequence_length=64), **changes)


def machines(**changes: Any) -> Hardware:
    return Hardware(**{"gpus": 8, "gpus_per_node": 8, "gpu_memory": 80_000_000_000} | changes)


def paper_work(*changes: str) -> Work:
    return work_of(load_recipe(RECIPE, changes), *read_config(TEACHER))


# --- which settings ---------------------------------------------------------------------------------------------------


def test_with_memory_to_spare_nothing_is_given_up() -> None:
    best = place(tiny_work(), machines()).fitting[0]
    assert best.change == [] and best.settings.teacher == "live" and best.settings.offload == "none"
    assert not best.settings.recompute_activations and best.async_save


def test_what_fits_is_within_the_memory_and_what_changes_the_result_comes_last() -> None:
    found = place(paper_work(), machines(gpus=64))
    severities = [sum({"cache": 1, "frozen": 3}[change] for change in p.change) for p in found.fitting]
    assert severities == sorted(severities) and severities[0] == 0 < severities[-1]
    for placement in found.fitting:
        assert placement.needed_bytes == needed_bytes(placement.memory.peak_bytes, 64) <= 80e9
    same = [p.tokens_per_second for p, severity in zip(found.fitting, severities, strict=True) if severity == 0]
    assert same == sorted(same, reverse=True)


def test_more_memory_is_never_slower_and_never_changes_more() -> None:
    work = paper_work("schedule=one_shot")
    found = [place(work, machines(gpu_memory=size * 10**9)).fitting for size in (40, 60, 80, 96, 141)]
    best = [placements[0] for placements in found]
    assert not any(placement.change for placement in best)
    rates = [placement.tokens_per_second for placement in best]
    assert rates == sorted(rates) and best[0].settings.offload != "none" == best[-1].settings.offload
    little = place(work, machines(host_memory=10**11)).fitting
    assert little[0].change == [] and little[0].settings.teacher == "layer_by_layer"
    text = placements_text(place(work, machines(host_memory=10**11)))
    assert "With a cached teacher, number " in text and "times as fast (estimated), and another training." in text


def test_the_largest_student_of_the_schedule_counts() -> None:
    staged, at_once = paper_work(), paper_work("schedule=one_shot")
    assert [student.token_fraction for student in staged.students] == [0.1, 0.9]
    assert len(at_once.students) == 1 and at_once.students[0] == replace(staged.students[1], token_fraction=1.0)
    hardware = machines(gpus=64)
    first = replace(staged, students=(replace(staged.students[0], token_fraction=1.0),))
    both, alone = place(staged, hardware).smallest, place(first, hardware).smallest
    assert both.needed_bytes == alone.needed_bytes > place(at_once, hardware).smallest.needed_bytes
    assert both.settings == alone.settings and both.step.seconds < alone.step.seconds
    mean = staged.rows * 4096 / both.tokens_per_second
    assert mean == pytest.approx(0.1 * alone.step.seconds + 0.9 * both.step.seconds)


def test_one_gpu_has_three_ways() -> None:
    found = place(tiny_work(), machines(gpus=1))
    ways = {(p.settings.teacher, p.settings.offload, p.settings.optimizer, p.settings.frozen) for p in found.fitting}
    for way in (
        ("live", "none", "adamw", ("routed_experts",)),
        ("live", "all", "adamw", ()),
        ("cache", "none", "adamw", ()),
        ("layer_by_layer", "student", "adamw", ()),
    ):
        assert way in ways
    assert found.fitting[0].settings.offload == "none"


def test_without_a_teacher_none_is_listed() -> None:
    found = place(tiny_work(is_taught=False), machines(gpus=1))
    assert {placement.settings.offload for placement in found.fitting} == {"none", "student"}
    text = placements_text(found)
    assert "live" not in text and "cache" not in text.replace("page cache", "") and "\nnone  " in text


def test_the_memory_of_a_node_counts_too() -> None:
    work = tiny_work()
    parameters = training_memory(QWEN3_NEXT, tiny_config(), None, TrainingSettings(gpus=1)).gradient_bytes // 4
    found = place(work, machines(gpus=1, host_memory=11 * parameters))
    few = found.fitting
    assert few[0].host_bytes == 0 and not few[0].async_save  # a state's copy has 12 bytes per parameter
    assert "execution.async_save=false" in overrides(found, few[0])
    assert place(work, machines(gpus=1, host_memory=12 * parameters)).fitting[0].async_save
    assert all(placement.settings.offload == "none" for placement in few if not placement.change)


def test_where_nothing_fits_what_is_lacking_is_printed_and_what_would_do() -> None:
    work = replace(paper_work("schedule=one_shot"), teacher_kind="cache", frozen=("routed_experts",))
    small = machines(gpu_memory=14 * 10**9, host_memory=20 * 10**9)
    found = place(work, small)
    assert found.fitting == [] and found.smallest.needed_bytes > small.gpu_memory
    assert found.enough_gpus is not None and found.enough_gpus > 8
    assert place(work, small.model_copy(update={"gpus": found.enough_gpus})).fitting
    assert not place(work, small.model_copy(update={"gpus": found.enough_gpus // 2})).fitting
    text = placements_text(found)
    assert "Nothing fits" in text and f"It would fit on {found.enough_gpus} such GPUs." in text
    with pytest.raises(UserError, match="muon is for one GPU alone: choose adamw"):
        place(tiny_work(optimizer="muon"), machines())
    with pytest.raises(UserError, match="batch of 16 sequences is not a multiple of the 3 GPUs"):
        place(tiny_work(), machines(gpus=3, gpus_per_node=3))


def test_experts_are_shared_within_a_node_by_divisors_of_both_models_experts() -> None:
    work = tiny_work()
    experts = work.teacher["num_experts"]
    assert experts == 8
    assert layouts(work, machines(gpus=16, gpus_per_node=4)) == [
        (shard, shared) for shard in (4, 8, 16) for shared in (1, 2, 4)
    ]
    assert layouts(work, machines(gpus=1)) == [(1, 1)]
    three = replace(work, students=(Student(work.teacher | {"num_experts": 6}),))
    assert layouts(three, machines(gpus=4, gpus_per_node=4)) == [(4, 1), (4, 2)]


def test_a_step_counts_ahead_where_its_micro_batches_cut_the_groups_of_the_load_balancing() -> None:
    work = tiny_work()
    for gpus, size, ahead in ((1, 1, True), (1, 8, False), (1, 16, False), (8, 1, False), (4, 1, True), (4, 2, False)):
        assert counts_ahead(work, TrainingSettings(gpus=gpus, micro_batch_size=size)) == ahead
    exact = paper_work("distil.load_balancing_counts=exact")
    assert counts_ahead(exact, TrainingSettings(gpus=64)) and not counts_ahead(paper_work(), TrainingSettings(gpus=64))


# --- traffic and time by hand -----------------------------------------------------------------------------------------


def test_traffic_by_hand() -> None:
    config = tiny_config()
    settings = TrainingSettings(gpus=4, shard_ranks=2, expert_ranks=2, sequence_length=64)
    model = measure(QWEN3_NEXT, config, settings, trains=True)
    traffic = predict_traffic(model, None, settings)
    layers = sum(unit.dense for unit in model.weights.layers)
    assert traffic.gathered_bytes == 2 * (2 * layers + model.weights.around.dense) // 2
    assert traffic.reduced_bytes == 4 * (layers + model.weights.around.dense) // 2
    assert traffic.experts_gathered_bytes == traffic.experts_reduced_bytes == 0  # no two ranks of a copy have the same
    blocks, rows = len(model.weights.layers), 64 * config["num_experts_per_tok"]
    assert traffic.exchanged_bytes == 2 * 2 * blocks * rows * 2 * config["hidden_size"] // 2
    assert traffic.all_reduced_bytes == 2 * (4 * model.weights.all.total // 2) // 2
    alone = predict_traffic(model, None, TrainingSettings(gpus=1))
    assert set(alone.model_dump().values()) == {0}


def test_the_time_of_a_step_by_hand() -> None:
    settings = TrainingSettings(gpus=1, micro_batches=4, sequence_length=1024, recompute_activations=True)
    model = measure(QWEN3_NEXT, tiny_config(), settings, trains=True)
    traffic = predict_traffic(model, model, settings)
    flops = 10**12
    step = estimate(model, model, settings, machines(gpus=1), traffic, (flops, 2 * flops))
    assert step.compute_seconds == pytest.approx(1024 * (4 + 2) * flops / (COMPUTE_FRACTION * 989e12))
    assert step.exchange_seconds == step.weights_seconds == step.once_seconds == 0
    assert step.seconds == 4 * step.compute_seconds
    cached = settings.model_copy(update={"teacher": "cache"})
    step = estimate(model, model, cached, machines(gpus=1), traffic, (flops, 2 * flops))
    assert step.compute_seconds == pytest.approx(1024 * 4 * flops / (COMPUTE_FRACTION * 989e12))
    assert step.cache_seconds_per_token == pytest.approx(2 * flops / (COMPUTE_FRACTION * 989e12))


def test_what_is_offloaded_crosses_the_bus_in_every_micro_batch() -> None:
    """The student up twice and its gradients down, in float32; the teacher once, in bfloat16."""
    found = []
    for offload in ("none", "student", "all"):
        settings = TrainingSettings(gpus=1, micro_batches=4, offload=offload)
        model = measure(QWEN3_NEXT, tiny_config(), settings, trains=True)
        traffic = predict_traffic(model, model, settings)
        step = estimate(model, model, settings, machines(gpus=1), traffic, (1, 1))
        found.append(step.weights_seconds * LINK_FRACTION * GPUS["h100"].host)
    total = model.weights.all.total
    assert found == pytest.approx([0, 12 * total, 14 * total])


def test_a_kind_of_gpu_is_known_by_its_name() -> None:
    assert all(gpu.flops > 1e14 for gpu in GPUS.values())
    with pytest.raises(UserError, match="'h100'"):
        gpu_of("h10")
    assert hardware_of(8, 8, "80GB", None, "RTX 4090").gpu == "rtx4090"


def test_a_run_prints_whether_its_own_settings_fit() -> None:
    family, config = read_config(TEACHER)
    recipe = load_recipe(RECIPE, ["schedule=one_shot"])
    note, fits = memory_note(recipe, family, config, machines(gpus=64))
    assert fits and re.fullmatch(r"training is predicted to take [\d.]+ GB of a GPU's 80.0 GB", note)
    note, fits = memory_note(load_recipe(RECIPE), family, config, machines())
    assert not fits and "`slimqwen plan RECIPE.yaml --gpus 8 --gpu-memory 80GB` lists the settings that fit" in note
    one_gpu, alone = ["schedule=one_shot", "distil.train=no_experts", "execution.micro_batch_size=1"], machines(gpus=1)
    own = [
        load_recipe(RECIPE, [*one_gpu, f"execution.streaming_teacher={value}"]) for value in ("null", "true", "false")
    ]
    placed = [as_set(recipe, family, config, alone) for recipe in own]
    assert placed[0] == placed[1] and placed[1].settings.teacher == "layer_by_layer"  # as it goes where it does not fit
    assert placed[2].settings.teacher == "live" and placed[2].needed_bytes > placed[0].needed_bytes
    settings = as_set(recipe, family, config, machines(gpus=64)).settings
    assert (settings.shard_ranks, settings.expert_ranks) == (16, 8)  # a copy does not fit into the GPUs of one node
    assert settings.recompute_activations and settings.micro_batch_size == 1 and settings.micro_batches == 16
    for gpus, memory in ((8, 80), (64, 80), (8, 141)):  # the recommended lines are what is predicted for them
        hardware = machines(gpus=gpus, gpu_memory=memory * 10**9)
        found = place(work_of(recipe, family, config), hardware)
        best = found.fitting[0]
        again = as_set(load_recipe(RECIPE, ["schedule=one_shot", *overrides(found, best)]), family, config, hardware)
        assert again == best


# --- what is printed --------------------------------------------------------------------------------------------------


def test_the_recommended_lines_are_fields_of_a_recipe() -> None:
    found = place(paper_work(), machines(gpus=8, host_memory=10**12))
    alone = place(paper_work("schedule=one_shot"), machines(gpus=1, host_memory=200 * 10**9))
    placements = [(listed, placement) for listed in (found, alone) for placement in listed.fitting]
    assert len({tuple(overrides(*placement)) for placement in placements}) > 8
    for listed, placement in placements:
        recipe = load_recipe(RECIPE, overrides(listed, placement))
        assert recipe.execution.micro_batch_size == placement.settings.micro_batch_size
        work = work_of(recipe, *read_config(TEACHER))
        assert work.frozen == placement.settings.frozen and work.optimizer == placement.settings.optimizer
    text = placements_text(found)
    assert "Recommended: the first." in text and "estimated" in text and "predicted" in text
    assert "It changes the result: the routed experts stay as the cut left them." in text
    assert all(f"    --set {line}" in text for line in overrides(found, found.fitting[0]))
    assert max(map(len, text.splitlines())) <= 150


def test_what_the_recipe_has_otherwise_is_set_back() -> None:
    """A recipe for one small GPU, on a large one: pasted, the lines make the very settings that are recommended."""
    one_gpu, teacher = RECIPES / "qwen3-30b-a3b-to-15b-a2b.yaml", read_config(RECIPES / "qwen3-30b-a3b.json")
    own = ["distil.optimizer.kind=adamw", "execution.reshard_student=false", "execution.memory_budget=5GB"]
    hardware = machines(gpus=1, gpu_memory=400 * 10**9)
    found = place(work_of(load_recipe(one_gpu, own), *teacher), hardware)
    lines = overrides(found, found.fitting[0])
    assert {"execution.offload=none", "execution.streaming_teacher=false", "execution.reshard_student=true"} <= set(
        lines
    )
    for placement in found.fitting:
        recipe = load_recipe(one_gpu, [*own, *overrides(found, placement)])
        assert as_set(recipe, *teacher, hardware).settings == placement.settings


@pytest.mark.parametrize("train", ["[router, norm, routed_experts]", "routed_experts"])
def test_parts_that_the_recipe_freezes_stay_frozen(train: str) -> None:
    own = ["schedule=one_shot", f"distil.train={train}"]
    found = place(paper_work(*own), machines(gpu_memory=70 * 10**9))
    frozen = [placement for placement in found.fitting if "frozen" in placement.change]
    assert bool(frozen) == (train != "routed_experts")  # else nothing would be trained
    for placement in frozen:
        lines = overrides(found, placement)
        assert "distil.train=[norm, router]" in lines
        assert "--set 'distil.train=[norm, router]'" in placements_text(
            found.model_copy(update={"fitting": [placement]})
        )
        assert paper_work(*own, *lines).frozen == placement.settings.frozen


def test_the_guide_prints_what_plan_prints() -> None:
    guide = (RECIPES.parent / "docs" / "how-to" / "which-gpus.md").read_text()
    blocks = re.findall(r"```\n\$ slimqwen (.*)\n((?:.*\n)*?)```\n", guide)
    assert len(blocks) == 4
    for command, printed in blocks[2:]:  # the two others take some seconds
        assert slimqwen(*command.split(), cwd=RECIPES.parent).stdout == printed


def test_plan_shows_what_fits() -> None:
    shown = slimqwen("plan", RECIPE, "--set", f"teacher={TEACHER}", "--gpus", "64", "--gpu-memory", "80GB", "--json")
    found = json.loads(shown.stdout)
    assert found["hardware"]["gpus"] == 64 and found["tokens"] == 400_000_000_000
    assert found["fitting"][0]["change"] == [] and found["fitting"][0]["needed_bytes"] < 80e9
    target = ("--target", RECIPES / "slimqwen-23a2b.yaml")
    one = slimqwen("plan", TEACHER, *target, "--gpus", "1", "--gpu-memory", "80GB", "--host-memory", "200GB")
    assert "1 x H100 with 80.0 GB each" in one.stdout and "--set distil.train=no_experts" in one.stdout
    assert_one_sentence(slimqwen("plan", TEACHER, "--gpu-memory", "80GB", "--out", "x"), 2, "--out make a plan")
    assert_one_sentence(slimqwen("plan", RECIPE), 2, "give --gpus and --gpu-memory too")
    assert_one_sentence(slimqwen("plan", RECIPE, "--gpu-memory", "80GB"), 2, "--set teacher=FILE")
    assert_one_sentence(slimqwen("plan", TEACHER, "--gpus", "12", "--gpu-memory", "80GB"), 2, "not whole nodes of 8")
    ramp = ("--set", f"teacher={TEACHER}", "--set", "distil.batch_size_ramp={start: 4, tokens: 1B}")
    refused = slimqwen("plan", RECIPE, *ramp, "--gpus", "8", "--gpu-memory", "80GB")
    assert_one_sentence(refused, 2, "batch_size_ramp.start 4 cannot be shared by 8 ranks")
    assert_one_sentence(slimqwen("plan", TEACHER, "--host-memory", "80GB"), 2, "--host-memory is for what fits")
    assert_one_sentence(slimqwen("plan", TEACHER, "--gpu-memory", "80"), 2, "'80' is 80 bytes, less than 1 GB")
