"""docs/study/README.md is what benchmarks/study_index.py makes of the results beside it."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "docs" / "study"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for results in STUDIES.glob("*/results.json"):
        (tmp_path / results.parent.name).mkdir()
        shutil.copy(results, tmp_path / results.parent.name)
    shutil.copy(STUDIES / "README.md", tmp_path)
    return tmp_path


def test_the_index_is_up_to_date(folder: Path) -> None:
    from study_index import main

    main(folder)
    made = (folder / "README.md").read_text(encoding="utf-8")
    assert made == (STUDIES / "README.md").read_text(encoding="utf-8"), "run `python benchmarks/study_index.py`"


def test_only_the_text_between_the_markers_is_replaced(folder: Path) -> None:
    from study_index import main

    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    expected = f"By hand.\n\n{text}\nBy hand, too.\n"
    stale = expected.replace("<!-- runs -->\n", "<!-- runs -->\nstale\n")
    stale = stale.replace("<!-- findings -->\n", "<!-- findings -->\nstale\n")
    assert stale.count("stale") == 2
    readme.write_text(stale, encoding="utf-8")
    main(folder)
    assert readme.read_text(encoding="utf-8") == expected


def test_a_readme_without_markers_stays(folder: Path) -> None:
    from study_index import main

    (folder / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no line <!-- runs -->"):
        main(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
