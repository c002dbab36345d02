"""Update docs/study/README.md with the studies in the folders beside it: their runs and findings.

    python benchmarks/study_index.py [FOLDER]

Only the text between the markers `<!-- runs -->` or `<!-- findings -->` and `<!-- end -->` is replaced.
"""

import re
import sys
from pathlib import Path

from slimqwen.artifacts import rewrite_text
from slimqwen.study.catalogue import STUDIES
from slimqwen.study.result import Study


def main(folder: Path) -> None:
    """Update `folder`/README.md."""
    results = {path.parent.name: Study.load(path) for path in sorted(folder.glob("*/results.json"))}
    by_study = {name: {key: study for key, study in results.items() if study.name == name} for name in STUDIES}
    lines = ["| study | question | runs so far |", "|---|---|---|"]
    for name, definition in STUDIES.items():
        runs = "; ".join(run_of(key, study) for key, study in by_study[name].items()) or "not run"
        lines.append(f"| {name} | {definition.title} ({definition.paper_source}) | {runs} |")
    findings = [
        f"### {key}\n\n" + "".join(f"- {verdict.sentence}\n" for verdict in study.verdicts)
        for studies in by_study.values()
        for key, study in studies.items()
    ]
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    for marker, made in (("runs", "\n".join(lines) + "\n"), ("findings", "\n".join(findings))):
        pattern = rf"(<!-- {marker} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text, re.DOTALL):
            sys.exit(f"{readme} has no line <!-- {marker} --> with a line <!-- end --> after it: nothing was written.")
        text = re.sub(pattern, lambda found, made=made: f"{found[1]}\n{made}\n{found[2]}", text, flags=re.DOTALL)
    rewrite_text(readme, text)
    print(readme)


def run_of(key: str, study: Study) -> str:
    """Describe a study's runs, with a link to its page."""
    return (
        f"[{key}](./{key}/index.html), {len(study.seeds)} seeds, {len(study.runs)} runs, {study.seconds / 60:.0f} min"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "study")
