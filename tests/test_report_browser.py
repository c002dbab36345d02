"""The pages in headless Chromium: every chart drawn, no console message, tables that sort, axes that change."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_full_run, write_recipe

from slimqwen.reporting.compare import compare
from slimqwen.reporting.report import report
from slimqwen.study.page import write_page
from slimqwen.study.result import Arm, CurvePoint, Run, Study, Verdict
from slimqwen.study.scales import load_scale

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")


class Browsed:
    """A page after its charts were drawn and `script`, if any, has run; `seen` is what the script put into it."""

    def __init__(self, page: Path, folder: Path, script: str = "", *, width: int = 1200) -> None:
        opened = folder / "opened.html"
        later = f"<script>const seen = {{}};{AFTER_DRAWING % script}</script>" if script else ""
        opened.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{later}</body>"), encoding="utf-8")
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
        command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
        done = subprocess.run(
            [*command, "--virtual-time-budget=20000", "--dump-dom", opened.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        self.dom = done.stdout
        self.console = re.findall(r"CONSOLE.*", done.stderr)  # errors, and what the content security policy blocked
        seen = re.search(r'data-seen="(.*?)"', self.dom)
        self.seen: dict[str, Any] = json.loads(html.unescape(seen[1])) if seen else {}

    @property
    def charts(self) -> tuple[int, int]:
        """How many there are, and how many were drawn with ticks on their axis."""
        plots = re.split(r'<div class="plot(?=[ "])', self.dom)[1:]
        return len(plots), sum(re.search(r'class="x\d?tick', plot) is not None for plot in plots)


AFTER_DRAWING = """
const look = () => {
  if (document.body.dataset.charts !== "drawn") return;
  observer.disconnect();
  %s
  document.body.dataset.seen = JSON.stringify(seen);
};
const observer = new MutationObserver(look);
observer.observe(document.body, { attributes: true, attributeFilter: ["data-charts"] });
look();
"""

SORT_TWICE = """
const [table] = document.querySelectorAll("#results table");
const loss = table.querySelectorAll("thead button")[3];
for (const order of ["first", "second"]) {
  loss.click();
  seen[order] = {
    rows: [...table.tBodies[0].rows].map((row) => row.cells[0].textContent),
    order: [...table.tHead.rows[0].cells].map((header) => header.getAttribute("aria-sort")),
  };
}
seen.reachable = [...document.querySelectorAll("button, .axes input, .scroll")].every((element) => element.tabIndex === 0);
"""

CHOOSE_HOURS = """
const titles = () => [...new Set([...document.querySelectorAll(".xtitle, .x2title")].map((title) => title.textContent))];
seen.before = titles();
document.querySelector(".axes input[value=hours]").click();
seen.after = titles();
"""

WAIT_FOR_FRAMES = """
const timer = setInterval(() => {
  const pages = [...document.querySelectorAll("iframe")].map((frame) => frame.contentDocument);
  if (!pages.every((page) => page?.body?.dataset.charts === "drawn")) return;
  clearInterval(timer);
  document.body.dataset.seen = JSON.stringify({
    widths: pages.map((page) => [page.defaultView.innerWidth, page.documentElement.scrollWidth]),
    drawn: pages.map((page) => page.querySelectorAll(".plot .main-svg:first-child").length),
  });
}, 100);
"""

BROKEN = "fetch('https://example.org/').catch(() => {}); throw new Error('on purpose');"
WIDTH = "seen.page = document.documentElement.scrollWidth; seen.window = innerWidth;"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_full_run(tmp_path_factory.mktemp("runs") / "one")


def test_a_run_s_page_draws_sorts_and_fits_a_phone(run: Path, tmp_path: Path) -> None:
    page = Browsed(report(run), tmp_path, SORT_TWICE + WIDTH, width=500)  # as narrow as a window can be
    assert page.console == []
    total, drawn = page.charts
    assert total == drawn == 20
    rising, falling = page.seen["first"], page.seen["second"]
    assert rising["rows"] == ["teacher", "slimqwen", "pruned + LM only", "random init + KD", "pruned, no training"]
    assert falling["rows"] == rising["rows"][::-1]
    assert rising["order"][3] == "ascending" and falling["order"][3] == "descending"
    assert set(rising["order"]) == {"none", "ascending"} and page.seen["reachable"]
    assert page.seen["page"] <= page.seen["window"] <= 500


def test_pages_fit_a_phone_of_390_pixels(run: Path, tmp_path: Path) -> None:
    """In frames of that width: a window of Chromium is never so narrow."""
    other = write_full_run(tmp_path / "two")
    pages = [report(run), compare([run, other], tmp_path / "comparison.html")]
    frames = "".join(
        f'<iframe style="width: 390px; height: 844px; border: 0" srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"></iframe>'
        for page in pages
    )
    (tmp_path / "phones.html").write_text(f"<body>{frames}<script>{WAIT_FOR_FRAMES}</script></body>", encoding="utf-8")
    page = Browsed(tmp_path / "phones.html", tmp_path)
    assert page.console == []
    assert page.seen["drawn"] == [20, 7]
    assert all(window == 390 and content <= window for window, content in page.seen["widths"])


def test_compared_curves_follow_the_chosen_axis(run: Path, tmp_path: Path) -> None:
    other = write_full_run(tmp_path / "two")
    page = Browsed(compare([run, other], tmp_path / "comparison.html"), tmp_path, CHOOSE_HOURS)
    assert page.console == []
    total, drawn = page.charts
    assert total == drawn == 7
    assert page.seen == {"before": ["training tokens"], "after": ["hours of training"]}


def test_a_study_s_page(tmp_path: Path) -> None:
    write_page(small_study(), tmp_path / "index.html")
    page = Browsed(tmp_path / "index.html", tmp_path)
    assert page.console == []  # its drawings are in the page: it has no script, and allows none
    assert page.dom.count("<svg") >= 2 and "<script" not in page.dom


def test_an_error_and_a_request_would_be_seen(tmp_path: Path) -> None:
    """The referee of the tests above: without charts to draw, so that it is quick."""
    write_recipe(tmp_path)
    console = " ".join(Browsed(report(tmp_path), tmp_path, BROKEN).console)
    assert "on purpose" in console and "example.org" in console


def small_study() -> Study:
    arms = [
        Arm(name=name, title=title, paper={"MMLU": 60.0}) for name, title in (("a", "all <at> once"), ("b", "slowly"))
    ]
    return Study(
        name="schedule",
        title="Is slow better?",
        scale="cpu",
        paper_source="Table 1",
        command="slimqwen study schedule",
        started="2026-11-22T13:00:00Z",
        seconds=60.0,
        machine="2 cores",
        commit="",
        versions={"torch": "2.13.0"},
        recipe=load_scale("cpu").model_dump(mode="json"),
        text={"training_tokens": 100, "heldout_tokens": 10},
        seeds=[0, 1],
        baseline="a",
        arms=arms,
        teacher={"loss": 2.0, "kl_to_teacher": 0.0},
        runs=[
            Run(
                arm=arm.name,
                seed=seed,
                changes={},
                training_tokens=100,
                total_parameters=10,
                active_parameters=5,
                one_shot=None,
                metrics={"loss": 3.0 - index - 0.1 * seed, "kl_to_teacher": 1.0 - 0.3 * index - 0.1 * seed},
                curve=[CurvePoint(tokens=50, lm=4.0), CurvePoint(tokens=100, lm=3.0 - index)],
            )
            for index, arm in enumerate(arms)
            for seed in (0, 1)
        ],
        verdicts=[
            Verdict(
                name="slow",
                statement="slow is better",
                quantity="KL saved",
                judgement="confirmed",
                gains=[0.3, 0.3],
                mean=0.3,
                standard_deviation=0.0,
                interval=(0.3, 0.3),
                sentence="Confirmed: slow is better.",
            )
        ],
    )
