"""Which stage's revision must be raised where golden results change.

A run recognises what it made before by the stage's inputs, its method and its revision. Where the code gives another result,
the revision is what makes a run do the stage again.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from golden.compare import differences
from golden.summary import Artefact, digest
from slimqwen.runs.stage import Stage
from slimqwen.runs.stages import (
    Calibrating,
    DepthMeasuring,
    Healing,
    Planning,
    Pruning,
    Refitting,
    TeacherCaching,
    Tokenizing,
)
from slimqwen.runs.training_stages import Carrying, Distilling, Evaluating, Initialising

REVISIONS = "revisions"  # the name in golden.json
# In the order in which a run makes them: what follows from a result that changed changes with it.
STAGES: dict[type[Stage], str] = {  # stage -> names of its artefacts in golden.json
    Tokenizing: r"tokens",
    TeacherCaching: r".*/teacher_cache",
    Calibrating: r".*/statistics",
    DepthMeasuring: r".*/depth\.json",
    Planning: r".*/plan\.json",
    Pruning: r".*/(pruned|fused/.*)",
    Refitting: r".*/refitted",
    Healing: r".*/healed(/added)?",
    Initialising: r".*/initial",
    Carrying: r".*/moments/.*",
    Distilling: r".*/(distilled|trained|metrics)",
    Evaluating: r".*/evaluation",
}


def revision_lines() -> list[str]:
    """Return what golden.json holds of the revisions, a line for each stage."""
    return [line_of(stage) for stage in STAGES]


def line_of(stage: type[Stage]) -> str:
    return f"{stage.__name__}: {stage.revision}"


def to_raise(golden: Mapping[str, Any], found: Mapping[str, Artefact]) -> str | None:
    """Return the sentence that names the first stage with other results and the same revision as in golden.json; or None."""
    held = golden.get(REVISIONS, {"lines": ""})["lines"].split()
    for stage, names in stages_that_changed(golden, found):
        if digest(line_of(stage)) not in held:
            return None  # raised: what comes after it follows from it
        return (
            f"{', '.join(names)}: another result by the same revision of {stage.__name__}, {stage.revision}. A run would take "
            f"what the code made before for done: raise {stage.__name__}.revision in {stage.__module__}."
        )
    return None


def stages_that_changed(
    golden: Mapping[str, Any], found: Mapping[str, Artefact]
) -> Iterator[tuple[type[Stage], list[str]]]:
    """Yield each stage whose artefacts are others than golden.json's, and their names; new and removed ones do not count."""
    both = golden.keys() & found.keys()
    changed = {name for name in both if differences({name: golden[name]}, {name: found[name]})}
    for stage, pattern in STAGES.items():
        names = sorted(name for name in changed if re.fullmatch(pattern, name))
        if names:
            yield stage, names
