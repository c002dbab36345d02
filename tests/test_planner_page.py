"""The planner page: its formulas against the counts of Python, and the page itself in headless Chromium."""

import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_families import FAMILIES_NATIVE

from slimqwen.checkpoint.config import read_config
from slimqwen.core.errors import UserError
from slimqwen.families import Config, Family, family_of
from slimqwen.recipe import Target
from slimqwen.reporting.planner_page import formulas, start, write_planner_page
from slimqwen.shapes.counts import compare
from slimqwen.shapes.polynomial import Polynomial

RECIPES = Path(__file__).parents[1] / "recipes"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def expected(family: Family, config: Config, target: dict[str, int], context_length: int) -> dict[str, int]:
    """What `slimqwen plan` says."""
    after = compare(family, config, Target(**target), context_length=context_length)
    costs = after.footprint.after
    return {
        "total_parameters": after.after.total_parameters,
        "active_parameters": after.after.active_parameters,
        "mtp_parameters": after.after.mtp_parameters,
        "checkpoint_bytes": costs.checkpoint_bytes,
        "kv_cache_bytes": costs.kv_cache_bytes,
        "state_bytes": costs.state_bytes,
        "forward_flops_per_token": costs.forward_flops_per_token,
    }


def test_polynomials_by_hand() -> None:
    a, b = Polynomial.unknown("a"), Polynomial.unknown("b")
    assert (2 * a + 3) * b + a * b == Polynomial(((("a", "b"), 3), (("b",), 3)))
    assert sum([a, a, 1], 0) == Polynomial((((), 1), (("a",), 2)))


@pytest.mark.parametrize("native", FAMILIES_NATIVE.values(), ids=FAMILIES_NATIVE)
def test_formulas_count_as_the_table_does(native: dict[str, Any]) -> None:
    family = family_of(native, "test")
    config = family.normalise(native)
    data = formulas(family, config)

    def value(quantity: str, kinds: list[int]) -> int:
        total = 0
        for kind in kinds:
            for axes, coefficient in data["blocks"][kind][quantity]:
                for axis in axes:
                    coefficient *= data["sizes"][axis]
                total += coefficient
        return total

    main = [*data["around"], *data["layers"]]
    counts = compare(family, config, Target()).before
    assert sum(value(quantity, main) for quantity in ("dense", "routed", "vision")) == counts.total_parameters
    assert sum(value(quantity, data["mtp"]) for quantity in ("dense", "routed")) == counts.mtp_parameters
    assert len(data["layers"]) == config["num_hidden_layers"]


def test_a_target_that_cannot_be_cut_is_refused() -> None:
    family, config = read_config(RECIPES / "qwen3-next-80b-a3b.json")
    with pytest.raises(UserError, match="num_experts 1024 is more than the source's 512"):
        start(family, config, Target(num_experts=1024))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
@pytest.mark.parametrize(
    ("source", "target", "context_length"),
    [
        (
            "qwen3-next-80b-a3b.json",
            {"num_hidden_layers": 36, "hidden_size": 1536, "num_experts": 256, "num_experts_per_tok": 8},
            32_768,
        ),
        ("qwen3-next-24b-a2b.json", {"num_hidden_layers": 21, "moe_intermediate_size": 384}, 4096),
    ],
)
def test_the_page_computes_what_plan_says(
    source: str, target: dict[str, int], context_length: int, tmp_path: Path
) -> None:
    family, config = read_config(RECIPES / source)
    page = tmp_path / "planner.html"
    write_planner_page(family, config, Target(), page)
    sliders = "&".join(f"{field}={size}" for field, size in target.items())
    dom = browse(f"{page.as_uri()}#{sliders}&context={context_length}", tmp_path)
    rows = {
        name: (int(before), int(after))
        for name, after, before in re.findall(r'<tr id="(\w+)" data-value="(\d+)" data-before="(\d+)">', dom)
    }
    assert {name: after for name, (_, after) in rows.items() if name != "serving_bytes"} == expected(
        family, config, target, context_length
    )
    assert rows["total_parameters"][0] == compare(family, config, Target()).before.total_parameters
    yaml = html.unescape(re.search(r'<pre id="yaml"[^>]*>(.*?)</pre>', dom, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert yaml == "".join(f"{field}: {size}\n" for field, size in target.items())


def browse(url: str, profile: Path) -> str:
    """The page's DOM after its scripts have run."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", url], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_without_mtp_and_state_has_no_rows_for_them(tmp_path: Path) -> None:
    def rows_of(name: str) -> tuple[set[str], str]:
        family = family_of(FAMILIES_NATIVE[name], "test")
        page = tmp_path / f"{name}.html"
        write_planner_page(family, family.normalise(FAMILIES_NATIVE[name]), Target(), page)
        body = page.read_text().partition("<script")[0]
        return set(re.findall(r'<tr id="(\w+)">', body)), body

    full, words = rows_of("qwen3_next")
    assert "MTP module" in words
    plain, words = rows_of("mixtral")
    assert full - plain == {"mtp_parameters", "state_bytes"}
    assert "MTP" not in words and "state" not in words
    if CHROMIUM is not None:  # the script passes over the rows that are not there
        dom = browse((tmp_path / "mixtral.html").as_uri(), tmp_path)
        assert set(re.findall(r'<tr id="(\w+)" data-value="\d+"', dom)) == plain
