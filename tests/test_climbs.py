"""How often a recipe climbs on its way through a run: is handed from a function to one in a higher room."""

from pathlib import Path

import pytest
from climbs import climbs_of
from test_pipeline import tiny_recipe

from slimqwen.runs.recipe_run import run


@pytest.mark.slow
def test_a_recipe_climbs_under_ten_times_on_its_way_through_a_run(tmp_path: Path) -> None:
    short = {"tokens": 16 * 2 * 2, "batch_size": 2, "warmup": "1 steps", "learning_rate": 1e-3}
    recipe = tiny_recipe(tmp_path, tmp_path / "run", distil=short, baselines=[])
    climbs = climbs_of(lambda: run(recipe))
    assert 0 < len(climbs) < 10, climbs
