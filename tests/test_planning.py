"""The pure functions of planning, against values worked out by hand and against invariances."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from slimqwen.core.errors import UserError
from slimqwen.planning import importance
from slimqwen.planning.depth import kept_layers
from slimqwen.planning.experts import ExpertGroup, expert_roles, group_experts
from slimqwen.planning.progressive import stage_steps, stage_targets
from slimqwen.planning.width import kept_channels
from slimqwen.recipe import Target
from slimqwen.shapes.target import check_target


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


def float64(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- importance -------------------------------------------------------------------------------------------------------


def test_norm_activation_is_the_mean_over_norms_of_means_over_tokens() -> None:
    # Channel 0: (6/3 + 2/1) / 2 = 2; channel 1: (3/3 + 8/1) / 2 = 4.5. (Pooling all tokens would give 8/4 and 11/4.)
    assert importance.norm_activation([float64(6, 3), float64(2, 8)], [3, 1]).tolist() == [2.0, 4.5]


def test_weight_magnitude_is_the_mean_share_of_squared_weights() -> None:
    # [3, 1] / 4, [5, 15] / 20, and a matrix of zeros, which says nothing for any channel.
    assert importance.weight_magnitude([float64(3, 1), float64(5, 15), float64(0, 0)]).tolist() == [1 / 3, 1 / 3]
    assert importance.weight_magnitude([float64(3, 1)]).tolist() == [0.75, 0.25]


def test_norm_activation_refuses_a_norm_without_its_count() -> None:
    with pytest.raises(ValueError):
        importance.norm_activation([float64(1), float64(1)], [1])


def test_expert_scores_of_four_tokens_and_three_experts() -> None:
    # Top-2 of 3 experts. (expert: gate weight, output norm) per token:
    #   t0  0: .75, 4   1: .25, 8        t2  0: .5, 4   1: .5, 2
    #   t1  0: .75, 2   1: .25, 4        t3  0: .5, 1   1: .5, 1         expert 2 is never chosen
    assignments = float64(4, 4, 0)
    gate_sums = float64(0.75 + 0.75 + 0.5 + 0.5, 0.25 + 0.25 + 0.5 + 0.5, 0)
    gated_norm_sums = float64(3 + 1.5 + 2 + 0.5, 2 + 1 + 1 + 0.5, 0)  # z * norm: 7 and 4.5
    assert importance.frequency(assignments, 4).tolist() == [1.0, 1.0, 0.0]
    assert importance.soft_logits(gate_sums, 4).tolist() == [0.625, 0.375, 0.0]
    assert importance.reap(gated_norm_sums, assignments).tolist() == [1.75, 1.125, 0.0]


def test_reap_divides_by_the_tokens_routed_to_the_expert_alone() -> None:
    # The second expert is chosen once, and matters as much when it is: both score 2.
    assert importance.reap(float64(20, 2), float64(10, 1)).tolist() == [2.0, 2.0]


def test_output_norm_divides_by_all_tokens() -> None:
    assert importance.output_norm(torch.tensor([6.0, 1.0]), tokens=4).tolist() == [1.5, 0.25]


def test_reap_divides_by_what_weighting_leaves_of_the_assignments() -> None:
    # Sources weighted down: 20 and 2 tokens at a scale of 1/100 are fewer than one, and the ratio stands.
    assert importance.reap(float64(0.4, 0.02, 0), float64(0.2, 0.02, 0)).tolist() == [2.0, 1.0, 0.0]


def test_layer_similarity_compares_the_mean_before_with_the_mean_after() -> None:
    # (3, 4) -> (6, 8): same direction, 1. (6, 8) -> (8, 6): 96 / 100. (8, 6) -> 0: no direction, 0.
    c = importance.similarity(float64([3, 4], [6, 8], [8, 6], [0, 0]))
    torch.testing.assert_close(c, float64(1.0, 0.96, 0.0), rtol=0, atol=1e-15)


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    assert importance.block_influence(float64(4, 3, -1), 4).tolist() == [0.0, 0.25, 1.25]


def test_router_logits_similarity_from_the_gram_matrix_is_the_cosine_of_the_logits() -> None:
    logits = float64([3, 4, 0], [4, 3, 0])  # two tokens, three experts; columns (3, 4), (4, 3), (0, 0)
    cosines = importance.router_logits_similarity(logits.T @ logits)
    expected = float64([1, 0.96, 0], [0.96, 1, 0], [0, 0, 0])  # 24 / 25
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-15)


def test_router_weights_similarity_ignores_length() -> None:
    cosines = importance.router_weights_similarity(float64([1, 0], [-5, 0], [0, 0], [7, 7]))
    half = 0.5**0.5
    expected = float64([1, -1, 0, half], [-1, 1, 0, -half], [0, 0, 0, 0], [half, -half, 0, 1])
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-15)


def test_expert_output_similarity_of_an_expert_never_routed_to_is_zero() -> None:
    # Means (1, 0), (3, 4), none.
    cosines = importance.expert_output_similarity(float64([2, 0], [9, 12], [0, 0]), float64(2, 3, 0))
    torch.testing.assert_close(cosines, float64([1, 0.6, 0], [0.6, 1, 0], [0, 0, 0]), rtol=0, atol=1e-15)


def test_two_runs_added_score_as_one_run() -> None:
    a, b = torch.rand(2, 5, 3, dtype=torch.float64)  # two runs of 5 tokens, 3 channels
    added = importance.norm_activation([a.sum(0) + b.sum(0)], [10])
    torch.testing.assert_close(added, torch.cat([a, b]).mean(0), rtol=0, atol=1e-15)


# --- depth ------------------------------------------------------------------------------------------------------------


def test_last_drops_the_last_quarter() -> None:
    assert kept_layers("last", 48, 36) == list(range(36))


def test_similarity_drops_the_run_that_starts_at_the_best_start_that_fits() -> None:
    # Keep 4 of 6: a run of 2 may start at 0..4. Layer 5 scores highest but its run does not fit, so 2 and 3 go.
    assert kept_layers("similarity", 6, 4, similarity=float64(0.1, 0.2, 0.8, 0.3, 0.7, 0.9)) == [0, 1, 4, 5]


def test_similarity_may_drop_the_run_at_either_end() -> None:
    assert kept_layers("similarity", 4, 2, similarity=float64(0.9, 0.1, 0.1, 0.1)) == [2, 3]
    assert kept_layers("similarity", 4, 2, similarity=float64(0.1, 0.1, 0.9, 0.1)) == [0, 1]


def test_similarity_tie_drops_the_later_run() -> None:
    assert kept_layers("similarity", 4, 3, similarity=float64(0.5, 0.9, 0.9, 0.5)) == [0, 1, 3]


def test_block_influence_drops_the_lowest_wherever_they_are() -> None:
    assert kept_layers("block_influence", 5, 3, block_influence=float64(0.1, 0.5, 0.2, 0.4, 0.3)) == [1, 3, 4]


def test_block_influence_tie_drops_the_later_layer() -> None:
    assert kept_layers("block_influence", 4, 2, block_influence=float64(0.3, 0.3, 0.3, 0.3)) == [0, 1]


def test_block_influence_keeps_the_best_full_attention_layer_in_place_of_the_worst_kept() -> None:
    # By score alone 0 and 1 stay. Of the full-attention layers 3 and 7, 7 is the better: it takes the place of 1.
    scores = float64(0.9, 0.8, 0.7, 0.1, 0.6, 0.5, 0.4, 0.2)
    assert kept_layers("block_influence", 8, 2, block_influence=scores) == [0, 1]
    assert kept_layers("block_influence", 8, 2, block_influence=scores, must_keep_one_of=[3, 7]) == [0, 7]
    assert kept_layers("block_influence", 8, 1, block_influence=scores, must_keep_one_of=[3, 7]) == [7]


def test_block_influence_is_left_alone_where_a_full_attention_layer_stays_anyway() -> None:
    scores = float64(0.1, 0.2, 0.3, 0.9)
    assert kept_layers("block_influence", 4, 2, block_influence=scores, must_keep_one_of=[3]) == [2, 3]


def test_a_run_that_takes_every_full_attention_layer_is_refused() -> None:
    assert kept_layers("last", 8, 4, must_keep_one_of=[3, 7]) == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"'last' to num_hidden_layers 3 drops layers 3 to 7 .*\(3, 7\)"):
        kept_layers("last", 8, 3, must_keep_one_of=[3, 7])
    with pytest.raises(UserError, match=r"'similarity' to num_hidden_layers 2 drops layers 2 to 3"):
        kept_layers("similarity", 4, 2, similarity=float64(0, 0, 1, 0), must_keep_one_of=[3])


@pytest.mark.parametrize("criterion", ["last", "similarity", "block_influence"])
def test_keeping_every_layer_keeps_them_in_order(criterion: str) -> None:
    scores = float64(0.4, 0.1, 0.3)
    assert kept_layers(criterion, 3, 3, similarity=scores, block_influence=scores, must_keep_one_of=[2]) == [0, 1, 2]


# --- width ------------------------------------------------------------------------------------------------------------


def test_the_highest_channels_stay_in_ascending_order() -> None:
    assert kept_channels(float64(0.1, 0.9, 0.5, 0.7), 3) == [1, 2, 3]
    assert kept_channels(float64(0.1, 0.9, 0.5, 0.7), 4) == [0, 1, 2, 3]


def test_channel_tie_keeps_the_lower() -> None:
    assert kept_channels(float64(0.5, 0.2, 0.5, 0.5), 2) == [0, 2]


def test_permuting_channels_permutes_what_is_kept() -> None:
    scores, order = torch.rand(64, dtype=torch.float64), torch.randperm(64)
    kept = kept_channels(scores[order], 24)  # channel c of the permuted model is channel order[c] of the original
    assert sorted(order[kept].tolist()) == kept_channels(scores, 24)


# --- experts ----------------------------------------------------------------------------------------------------------

# Ranked by importance: 1 (.40), 3 (.30), 7 (.25), 4 (.20), 6 (.15), 0 (.10), 2 (.05), 5 (never routed to).
IMPORTANCE = float64(0.10, 0.40, 0.05, 0.30, 0.20, 0.00, 0.15, 0.25)
SIMILARITY = float64(
    # to: 0    1    2    3    4    5    6    7
    [1.0, 0.3, 0.0, 0.2, 0.1, 0.0, 0.0, 0.8],
    [0.3, 1.0, 0.4, 0.0, 0.2, 0.0, 0.9, 0.1],
    [0.0, 0.4, 1.0, 0.0, -0.2, 0.0, 0.0, 0.3],
    [0.2, 0.0, 0.0, 1.0, 0.0, 0.0, 0.1, 0.0],
    [0.1, 0.2, -0.2, 0.0, 1.0, 0.0, 0.5, 0.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.9, 0.0, 0.1, 0.5, 0.0, 1.0, 0.2],
    [0.8, 0.1, 0.3, 0.0, 0.0, 0.0, 0.2, 1.0],
)


def as_tuples(groups: list[ExpertGroup]) -> list[tuple[list[int], list[float]]]:
    return [(group.members, pytest.approx(group.weights, abs=1e-15)) for group in groups]


def test_partial_merge_of_eight_experts_to_four() -> None:
    # N = 4: the top 2 (1, 3) stay untouched, the next 2 (7, 4) are bases, the rest (6, 0, 2, 5) join 7 or 4:
    #   0: .8 to 7, .1 to 4                                          -> 7
    #   2: .3 to 7, -.2 to 4                                         -> 7  (its .4 to 1 does not count: 1 is untouched)
    #   5: 0 to both, as it was never routed to: the more important  -> 7
    #   6: .2 to 7, .5 to 4                                          -> 4  (its .9 to 1 does not count)
    # Weights: base 4: .20 and .15 of .35; base 7: .25, .10, .05 and 0 of .40.
    groups = group_experts("partial", IMPORTANCE, SIMILARITY, keep=4)
    assert as_tuples(groups) == [
        ([1], [1.0]),
        ([3], [1.0]),
        ([4, 6], [4 / 7, 3 / 7]),
        ([7, 0, 2, 5], [0.625, 0.25, 0.125, 0.0]),
    ]
    assert [group.base for group in groups] == [1, 3, 4, 7]
    assert expert_roles(groups, 8) == ["absorbed", "kept", "absorbed", "kept", "base", "absorbed", "absorbed", "base"]


def test_merge_of_eight_experts_to_four() -> None:
    # All of 1, 3, 7, 4 are bases: 6 (.9) and 2 (.4) join 1 now, 0 joins 7, and 5 the most important base, 1.
    groups = group_experts("merge", IMPORTANCE, SIMILARITY, keep=4)
    assert as_tuples(groups) == [
        ([1, 2, 5, 6], [0.40 / 0.60, 0.05 / 0.60, 0.0, 0.15 / 0.60]),
        ([3], [1.0]),
        ([4], [1.0]),
        ([7, 0], [0.25 / 0.35, 0.10 / 0.35]),
    ]
    # 3 and 4 were bases that absorbed nobody: their weights are unchanged, so they are 'kept'.
    assert expert_roles(groups, 8) == ["absorbed", "base", "absorbed", "kept", "kept", "absorbed", "absorbed", "base"]


def test_prune_keeps_the_top_and_drops_the_others() -> None:
    groups = group_experts("prune", IMPORTANCE, None, keep=4)
    assert as_tuples(groups) == [([1], [1.0]), ([3], [1.0]), ([4], [1.0]), ([7], [1.0])]
    assert expert_roles(groups, 8) == ["dropped", "kept", "dropped", "kept", "kept", "dropped", "dropped", "kept"]


def test_partial_of_an_odd_number_gives_the_bases_the_larger_half() -> None:
    # N = 3: 1 stays, 3 and 7 are bases. N = 1: nobody stays untouched, 1 absorbs everyone.
    odd = group_experts("partial", IMPORTANCE, SIMILARITY, keep=3)
    assert [group.members for group in odd] == [[1], [3, 4, 5], [7, 0, 2, 6]]
    one = group_experts("partial", IMPORTANCE, SIMILARITY, keep=1)
    assert [group.members for group in one] == [[1, 0, 2, 3, 4, 5, 6, 7]]
    assert sum(one[0].weights) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("compression", ["prune", "merge", "partial"])
def test_keeping_every_expert_leaves_each_alone_with_weight_exactly_one(compression: str) -> None:
    groups = group_experts(compression, IMPORTANCE, SIMILARITY, keep=8)  # expert 5 has importance 0
    assert [(group.base, group.members, group.weights) for group in groups] == [(e, [e], [1.0]) for e in range(8)]


def test_protected_experts_stay_as_they_are() -> None:
    """Importance 0 to 7; of 8 the three lowest are protected: they are untouched and no bases, and the best others fill up."""
    scores = torch.arange(8, dtype=torch.float64)
    alike = torch.eye(8, dtype=torch.float64)
    for compression in ("prune", "merge", "partial"):
        groups = group_experts(compression, scores, alike, 5, protected=[0, 1, 2])  # type: ignore[arg-type]
        assert [group.base for group in groups] == [0, 1, 2, 6, 7]
        assert all(group.members == [group.base] for group in groups if group.base < 3)
        absorbed = [member for group in groups for member in group.members[1:]]
        assert sorted(absorbed) == ([] if compression == "prune" else [3, 4, 5])
    full = group_experts("merge", scores, alike, 2, protected=[0, 1, 2])
    assert [(group.base, group.members) for group in full] == [(1, [1]), (2, [2])]


def test_outliers_are_far_above_the_median_of_what_was_seen() -> None:
    assert importance.outliers(torch.tensor([1.0, 2.0, 0.0, 30.0]), 5.0) == [3]
    assert importance.outliers(torch.tensor([1.0, 2.0, 0.0, 10.0]), 5.0) == []
    assert importance.outliers(torch.zeros(3), 5.0) == []
    norms = importance.mean_output_norm(torch.tensor([6.0, 0.0]), torch.tensor([1.5, 0.0]))
    assert norms.tolist() == [4.0, 0.0]


def test_where_no_member_has_importance_the_base_takes_all() -> None:
    # Nobody was ever routed to: the lower experts rank first, and everyone joins 0.
    groups = group_experts("merge", torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64), keep=2)
    assert [(group.members, group.weights) for group in groups] == [([0, 2, 3], [1.0, 0.0, 0.0]), ([1], [1.0])]


def test_importance_tie_ranks_the_lower_expert_first() -> None:
    groups = group_experts("prune", float64(1, 2, 2, 2), None, keep=2)
    assert [group.base for group in groups] == [1, 2]


def test_similarity_tie_goes_to_the_more_important_base() -> None:
    # Bases 1 (3.0) and 0 (2.0); expert 2 is as near to either.
    similarity = float64([1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1])
    groups = group_experts("merge", float64(2, 3, 1), similarity, keep=2)
    assert [(group.members, group.weights) for group in groups] == [([0], [1.0]), ([1, 2], [0.75, 0.25])]


@pytest.mark.parametrize("compression", ["prune", "merge", "partial"])
def test_permuting_experts_permutes_the_groups(compression: str) -> None:
    scores, vectors = torch.rand(32, dtype=torch.float64), torch.randn(32, 6, dtype=torch.float64)
    order = torch.randperm(32)  # expert e of the permuted model is expert order[e] of the original

    def weight_of_each_member(scores: Tensor, vectors: Tensor, name: list[int]) -> dict[int, dict[int, float]]:
        groups = group_experts(compression, scores, importance.router_weights_similarity(vectors), keep=11)
        return {name[g.base]: {name[m]: w for m, w in zip(g.members, g.weights, strict=True)} for g in groups}

    original = weight_of_each_member(scores, vectors, list(range(32)))
    permuted = weight_of_each_member(scores[order], vectors[order], order.tolist())
    assert permuted.keys() == original.keys()
    for base, members in original.items():
        assert permuted[base] == pytest.approx(members, abs=1e-15)


def test_every_expert_is_in_exactly_one_group_unless_dropped() -> None:
    scores, vectors = torch.rand(32, dtype=torch.float64), torch.randn(32, 6, dtype=torch.float64)
    similarity = importance.router_weights_similarity(vectors)
    for compression, keep in itertools.product(["merge", "partial"], range(1, 33)):
        groups = group_experts(compression, scores, similarity, keep)
        assert len(groups) == keep
        assert sorted(member for group in groups for member in group.members) == list(range(32))


def test_a_group_survives_json_exactly_and_refuses_nonsense() -> None:
    for group in group_experts("partial", IMPORTANCE, SIMILARITY, keep=4):
        assert ExpertGroup.model_validate_json(group.model_dump_json()) == group
    nonsense = [([1, 0], [0.5, 0.5]), ([0, 0], [0.5, 0.5]), ([0, 1], [1.0]), ([0, 1], [0.5, 0.6]), ([], [])]
    for members, weights in nonsense:
        with pytest.raises(ValidationError):
            ExpertGroup(base=0, members=members, weights=weights)


# --- progressive ------------------------------------------------------------------------------------------------------


def shape(layers: int, hidden: int, experts: int, top_k: int) -> Target:
    return Target(num_hidden_layers=layers, hidden_size=hidden, num_experts=experts, num_experts_per_tok=top_k)


TEACHER, SLIMQWEN = shape(48, 2048, 512, 10), shape(36, 1536, 256, 8)


def test_the_papers_stages() -> None:
    assert stage_targets("one_shot", TEACHER, SLIMQWEN) == [SLIMQWEN]
    assert stage_targets("depth_first", TEACHER, SLIMQWEN) == [shape(42, 2048, 512, 10), SLIMQWEN]
    assert stage_targets("depth_first", TEACHER, SLIMQWEN, layers_at_once=4) == [shape(44, 2048, 512, 10), SLIMQWEN]
    assert stage_targets("width_first", TEACHER, SLIMQWEN) == [shape(48, 1792, 384, 9), SLIMQWEN]
    assert stage_targets("joint", TEACHER, SLIMQWEN) == [shape(42, 1792, 384, 9), SLIMQWEN]


@pytest.mark.parametrize(("layers", "after_stage_1"), [(36, 42), (46, 47), (45, 47), (40, 44), (47, 47)])
def test_the_smaller_half_goes_first_and_a_single_layer_at_once(layers: int, after_stage_1: int) -> None:
    first, _ = stage_targets("depth_first", TEACHER, shape(layers, 1536, 256, 8))
    assert first == shape(after_stage_1, 2048, 512, 10)


@pytest.mark.parametrize(
    ("source", "target", "halfway"),
    [
        (2048, 1536, 1792),
        (2048, 1816, 1936),  # 232 = 29 x 8: 14 x 8 first
        (128, 96, 112),
        (128, 112, 120),
        (100, 90, 95),  # not multiples of 8 to begin with
        (128, 110, 119),
    ],
)
def test_half_a_hidden_size_stays_a_multiple_of_eight(source: int, target: int, halfway: int) -> None:
    first, _ = stage_targets("width_first", shape(8, source, 32, 4), shape(6, target, 16, 2))
    assert first == shape(8, halfway, 24, 3)


def test_a_stage_that_would_change_nothing_is_left_out() -> None:
    experts_only = shape(48, 2048, 256, 8)
    assert stage_targets("depth_first", TEACHER, experts_only) == [experts_only]
    assert stage_targets("width_first", TEACHER, shape(36, 2048, 512, 10)) == [shape(36, 2048, 512, 10)]
    assert stage_targets("depth_first", TEACHER, shape(47, 2048, 512, 10)) == [shape(47, 2048, 512, 10)]
    assert stage_targets("joint", TEACHER, TEACHER) == [TEACHER]


def test_every_stage_lies_between_source_and_target_and_is_itself_a_valid_shape() -> None:
    # All experts/top-k pairs up to 6: halfway there are never fewer experts than top-k.
    shapes = [shape(8, 128, experts, top_k) for experts in range(1, 7) for top_k in range(1, experts + 1)]
    for source, target in itertools.product(shapes, shapes):
        if target.num_experts > source.num_experts or target.num_experts_per_tok > source.num_experts_per_tok:
            continue
        for schedule in ["one_shot", "depth_first", "width_first", "joint"]:
            stages = stage_targets(schedule, source, target)
            assert stages[-1] == target
            for before, after in itertools.pairwise([source, *stages]):
                check_target(before, after)


@pytest.mark.parametrize(
    ("fractions", "total", "steps"),
    [
        ([1.0], 7, [7]),
        ([0.1, 0.9], 1000, [100, 900]),
        ([0.05, 0.05, 0.9], 1000, [50, 50, 900]),
        ([1 / 3, 1 / 3, 1 / 3], 10, [3, 4, 3]),
        ([0.1, 0.9], 3, [1, 2]),  # 0.3 of a step rounds to none: every stage has one
        ([0.9, 0.05, 0.05], 3, [1, 1, 1]),
        ([0.001, 0.001, 0.998], 100, [1, 1, 98]),
        ([0.3333333, 0.6666666], 10**8, [33333330, 66666670]),  # the shares may sum to 1 - 1e-7
    ],
)
def test_steps_of_each_stage(fractions: list[float], total: int, steps: list[int]) -> None:
    assert stage_steps(fractions, total) == steps


def test_fewer_steps_than_stages_is_refused() -> None:
    with pytest.raises(UserError, match=r"2 optimiser steps, and each of the schedule's 3 stages needs one"):
        stage_steps([0.05, 0.05, 0.9], 2)


def test_check_target_names_every_problem_in_one_sentence() -> None:
    check_target(TEACHER, SLIMQWEN)
    check_target(TEACHER, TEACHER)
    with pytest.raises(UserError) as raised:
        check_target(shape(8, 128, 32, 4), shape(9, 256, 6, 8))
    assert str(raised.value) == (
        "the target can't be cut out of the source, change target: num_hidden_layers 9 is more than the source's 8; "
        "hidden_size 256 is more than the source's 128; num_experts_per_tok 8 is more than the source's 4; "
        "num_experts 6 is less than num_experts_per_tok 8."
    )
