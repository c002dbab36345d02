"""Adding a criterion, a divergence and a family, done as CONTRIBUTING.md says, in a copy of the package.

The copy has what the section lists and nothing else: a row in an enum and a function below its module, or a table and its line
in the list of families. A process of its own then plans by the criteria, takes the divergence's gradient, and cuts a model of the family.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slimqwen.core.registry import Registry
from slimqwen.families import FAMILIES
from slimqwen.losses.divergence import FORMULAS
from slimqwen.planning.depth import DROPPED
from slimqwen.planning.experts import UNTOUCHED
from slimqwen.planning.importance import EXPERT_IMPORTANCE, EXPERT_SIMILARITY, WIDTH
from slimqwen.recipe.criteria import (
    Criterion,
    DepthCriterion,
    DivergenceName,
    ExpertCompression,
    ExpertImportance,
    ExpertSimilarity,
    WidthCriterion,
)

ROOT = Path(__file__).parent.parent
FUNCTIONS: dict[type[Criterion], Any] = {
    DepthCriterion: DROPPED,
    WidthCriterion: WIDTH,
    ExpertImportance: EXPERT_IMPORTANCE,
    ExpertCompression: UNTOUCHED,
    ExpertSimilarity: EXPERT_SIMILARITY,
    DivergenceName: FORMULAS,
}
CRITERIA = [criterion for names in FUNCTIONS for criterion in names]

ROWS = {  # a row of each enum
    "DepthCriterion": 'FIRST = ("first", "being first", "the first ones", "The first layers went.")',
    "WidthCriterion": 'LOUDEST = ("loudest", "loudest norm output", "the channels that one norm makes large", "all of it")',
    "ExpertImportance": 'MEAN_OUTPUT = ("mean_output", "length of the mean output", "how long its mean output is")',
    "ExpertSimilarity": 'ANY = ("any", "nothing", "nothing: all are alike")',
    "DivergenceName": 'HELLINGER = ("hellinger", "squared Hellinger distance", "the squared Hellinger distance")',
}
BELOW = {  # a function at the end of each module
    "planning/depth.py": """
@DROPPED.entry(DepthCriterion.FIRST)
def first_layers(num_layers: int, keep: int) -> Iterable[int]:
    return range(num_layers - keep)
""",
    "planning/importance.py": """
@WIDTH.entry(WidthCriterion.LOUDEST)
def loudest(abs_sums: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    return torch.stack([abs_sum / tokens for abs_sum, tokens in zip(abs_sums, counts, strict=True)]).amax(dim=0)


@EXPERT_IMPORTANCE.entry(ExpertImportance.MEAN_OUTPUT)
def mean_output(output_sums: Tensor, assignments: Tensor) -> Tensor:
    return output_sums.norm(dim=-1) / _nonzero(assignments)


@EXPERT_SIMILARITY.entry(ExpertSimilarity.ANY)
def any_similarity(assignments: Tensor) -> Tensor:
    return torch.ones(len(assignments), len(assignments), dtype=torch.float64)
""",
    "losses/divergence.py": """
@FORMULAS.entry(DivergenceName.HELLINGER)
def hellinger(p: Distribution, q: Distribution, _: Divergence, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    overlaps = (0.5 * (p.log_probs + q.log_probs)).exp()
    overlap = overlaps.sum(1)
    return 1.0 - overlap, 0.5 * (q.probs * overlap[:, None] - overlaps)
""",
}
FAMILY = '''"""Other-MoE: every layer attends in full and routes to experts; tensors as in its released checkpoints."""

from slimqwen.families.canonical import (
    check_layers_and_experts,
    full_attention_only,
    with_both_rope_forms,
    without_full_attention_only,
)
from slimqwen.families.family import Block, Config, Family
from slimqwen.families.tables import (
    ATTENTION_FIELDS,
    EXPERT,
    HIDDEN,
    MLP_INPUT,
    PER_HEAD_NORMS,
    VOCAB,
    around_the_layers,
    attention,
    decoder_layer,
    routed_experts,
)


def layer_blocks(config: Config) -> list[Block]:
    router, experts = {"sparse.gate.weight": (EXPERT, MLP_INPUT)}, routed_experts("sparse.experts.")
    layers = range(config["num_hidden_layers"])
    return [decoder_layer(layer, attention(norms=PER_HEAD_NORMS), {"router": router}, experts) for layer in layers]


def normalise(config: Config) -> Config:
    check_layers_and_experts(config)
    return full_attention_only(config) | {"mlp_layer_types": ["sparse"] * config["num_hidden_layers"]}


def to_disk(config: Config) -> Config:
    config = without_full_attention_only(config)
    return with_both_rope_forms({key: value for key, value in config.items() if key != "mlp_layer_types"})


OTHER_MOE = Family(
    model_type="other_moe",
    architecture="OtherMoeForCausalLM",
    vocab=VOCAB,
    hidden=HIDDEN,
    expert=EXPERT,
    router="sparse.gate.weight",
    fields=ATTENTION_FIELDS,
    normalise=normalise,
    to_disk=to_disk,
    layer_blocks=layer_blocks,
    surroundings=around_the_layers,
    module_name=lambda name, config: name.replace(".sparse.", ".mlp."),
    default_layout="per_expert",
)
'''


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process `added.py` found out with the copy of the package."""
    folder = tmp_path_factory.mktemp("added")
    package = folder / "slimqwen"
    shutil.copytree(ROOT / "slimqwen", package, ignore=shutil.ignore_patterns("__pycache__", "teacher"))
    for name, row in ROWS.items():
        add_row(package / "recipe" / "criteria.py", name, row)
    for file, functions in BELOW.items():
        with (package / file).open("a") as module:
            module.write(f"\n{functions}")
    (package / "families" / "other_moe.py").write_text(FAMILY)
    families = package / "families" / "__init__.py"
    text = families.read_text().replace("GLM4_MOE)", "GLM4_MOE, OTHER_MOE)")
    families.write_text(f"from slimqwen.families.other_moe import OTHER_MOE\n{text}")
    subprocess.run(
        [sys.executable, Path(__file__).with_name("added.py"), folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")])},
        check=True,
    )
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert found["package"] == str(package)
    return found


def add_row(file: Path, enum: str, row: str) -> None:
    """Write `row` as the last of an enum."""
    text = file.read_text()
    start = text.index(f"class {enum}(")
    end = text.find("\n\n\n", start)
    end = len(text.rstrip()) if end < 0 else end
    file.write_text(f"{text[:end]}\n    {row}\n{text[end:]}")


def test_a_new_criterion_of_each_kind_plans(added: dict[str, Any]) -> None:
    """2 of 4 layers, 20 of 32 channels, 4 of 8 experts: each as the new functions say, computed apart from them."""
    pruning = {"depth": "first", "width": "loudest", "importance": "mean_output", "similarity": "any"}
    assert {name: added["pruning"][name] for name in ("depth", "width")} == {"depth": "first", "width": "loudest"}
    assert added["pruning"]["experts"]["importance"] == pruning["importance"]
    assert added["pruning"]["experts"]["similarity"] == pruning["similarity"]
    assert added["kept_layers"] == [2, 3]
    assert added["channels"] == added["expected_channels"]
    assert added["bases"] == added["expected_bases"]
    assert added["absorbers"] == 1  # all are alike: the most important base takes in every other


def test_its_words_are_in_help_plan_and_report(added: dict[str, Any]) -> None:
    for label in (
        "being first ('first')",
        "loudest norm output ('loudest')",
        "length of the mean output ('mean_output')",
    ):
        assert label in added["plan_text"]
    for words in (
        "The first layers went.",
        "loudest norm output",
        "of all of it",
        "Length of the mean output, as multiples",
    ):
        assert words in added["report"]
    for description in ("mean_output: how long its mean output is", "hellinger: the squared Hellinger distance"):
        assert description in added["help"]
    assert "norm_activation | rotation | weight_magnitude | random | loudest" in added["help"]


def test_a_misspelt_new_name_is_recognised(added: dict[str, Any]) -> None:
    assert "did you mean 'mean_output'" in added["misspelt"]


def test_a_new_divergence_has_its_gradient(added: dict[str, Any]) -> None:
    """0 of a teacher to itself, its definition of two distributions, and autograd's gradient of that."""
    assert added["divergence_to_itself"] == pytest.approx([0.0] * 3, abs=1e-12)
    assert added["divergence"] == pytest.approx(added["expected_divergence"], rel=1e-12)
    assert added["gradcheck"]


def test_a_new_family_is_cut_and_loaded(added: dict[str, Any]) -> None:
    """Keeping everything is the same model; cut along three axes Transformers loads what is left."""
    assert added["same_when_whole"]
    assert added["cut_shape"] == {"num_hidden_layers": 2, "hidden_size": 24, "num_experts": 4}
    assert added["cut_logits"] == [2, 9, 300]
    assert added["finite"]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: f"{type(criterion).__name__}.{criterion.name}")
def test_every_criterion_has_words_a_function_and_a_place_in_the_method(criterion: Criterion) -> None:
    assert criterion.label and criterion.description
    assert not criterion.description.endswith(".")  # `described` puts it into a sentence
    assert callable(FUNCTIONS[type(criterion)][criterion])
    assert re.search(rf"`(pruning\.width: )?{criterion}`", (ROOT / "docs" / "method.md").read_text())


def test_no_criterion_has_two_functions() -> None:
    registry: Registry[ExpertImportance, Any] = Registry(ExpertImportance)
    registry.entry(ExpertImportance.REAP)(len)
    assert registry["reap"] is len
    with pytest.raises(AssertionError, match="reap has a function"):
        registry.entry(ExpertImportance.REAP)(max)


def test_the_places_that_contributing_names_are_those_of_this_test() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Adding ") :]
    for place in ("recipe/criteria.py", *BELOW, "families/__init__.py"):
        assert f"`slimqwen/{place}`" in section
        assert (ROOT / "slimqwen" / place).is_file()
    for name in ROWS:
        assert f"`{name}`" in section
    for registry in ("DROPPED", "WIDTH", "EXPERT_IMPORTANCE", "EXPERT_SIMILARITY", "FORMULAS"):
        assert f"`{registry}`" in section


def test_every_family_is_one_table_with_its_own_words() -> None:
    assert len({family.architecture for family in FAMILIES.values()}) == len(FAMILIES)
    for model_type, family in FAMILIES.items():
        assert family.model_type == model_type
