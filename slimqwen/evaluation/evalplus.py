"""EvalPlus (arXiv 2305.01210) through its own package: HumanEval and MBPP, with their original and many additional tests.

It runs code that the model generates, in processes with limits but without a sandbox, and downloads its problems by default.
So it is used only where the user has installed it, sets EVALPLUS_RUN_CODE=1 and names the files with the problems.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from slimqwen.artifacts import fingerprint
from slimqwen.core.errors import StageFailed, UserError
from slimqwen.evaluation.harness import GroupMetric, GroupScores, Metric, Scores, TaskScores

EVALPLUS = "evalplus"
DATA_VARIABLES = {"humaneval": "HUMANEVAL_OVERRIDE_PATH", "mbpp": "MBPP_OVERRIDE_PATH"}  # the package's own
CONSENT = "EVALPLUS_RUN_CODE"
MEAN = "pass@1,mean"


def evalplus_identity() -> dict[str, Any]:
    """Return what a score depends on beside the model. Raises UserError where the package, consent or a file is missing."""
    if importlib.util.find_spec("evalplus") is None:
        raise UserError("the package evalplus is not installed: pip install evalplus.")
    if os.environ.get(CONSENT) != "1":
        raise UserError(
            f"evalplus runs code that the model generates, without a sandbox: set {CONSENT}=1 if that is acceptable."
        )
    files = {variable: Path(os.environ.get(variable, "")) for variable in DATA_VARIABLES.values()}
    for variable, file in files.items():
        if not file.is_file():
            raise UserError(
                f"evalplus would download its problems, and slimqwen downloads nothing: set {variable} to the .jsonl file "
                "of their release, which evalplus caches when it is run once with network access."
            )
    return {
        "task": EVALPLUS,
        "evalplus": importlib.metadata.version("evalplus"),
        "data": {variable: fingerprint(file) for variable, file in files.items()},
    }


def run_evalplus(checkpoint: Path, folder: Path, dtype: str) -> Scores:
    """Measure greedy pass@1 on the two sets of problems, each with both sets of tests, and the mean of the four.

    dtype: PyTorch's name. Raises StageFailed with the last line of the package's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".evalplus-") as root:
        for dataset in DATA_VARIABLES:
            command = [sys.executable, "-m", "evalplus.evaluate", "--model", str(checkpoint.resolve())]
            command += ["--dataset", dataset, "--backend", "hf", "--greedy", "--root", root]
            command += ["--dtype", dtype.removeprefix("torch.")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found = sorted(Path(root).rglob(f"{dataset}/**/*eval_results.json"))
            if done.returncode != 0 or not found:
                last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
                raise StageFailed(f"evalplus on {dataset} failed with exit code {done.returncode} ({last[:300]}).")
            tasks[dataset] = read_results(found[-1])
    means = [task.metrics[MEAN] for task in tasks.values()]
    mean = GroupMetric(
        value=sum(mean.value for mean in means) / len(means),
        stderr=math.sqrt(sum((mean.stderr or 0.0) ** 2 for mean in means)) / len(means),
        by_size=False,
    )
    return Scores(tasks=tasks, groups={EVALPLUS: GroupScores(tasks=list(tasks), metrics={MEAN: mean})})


def read_results(file: Path) -> TaskScores:
    """Read from the package's eval_results.json whether the one solution of each problem passes.

    `base` are the original tests, `plus` the additional ones too, `mean` the mean of both per problem, since their
    errors are not independent.
    """
    solved = json.loads(file.read_bytes())["eval"]
    base = [float(solved[problem][0]["base_status"] == "pass") for problem in sorted(solved)]
    plus = [
        b * float(solved[problem][0]["plus_status"] == "pass") for b, problem in zip(base, sorted(solved), strict=True)
    ]
    by_filter = {"base": base, "plus": plus, "mean": [(b + p) / 2 for b, p in zip(base, plus, strict=True)]}
    return TaskScores(
        documents=len(solved), metrics={f"pass@1,{name}": _mean(scores) for name, scores in by_filter.items()}
    )


def _mean(scores: list[float]) -> Metric:
    stderr = float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return Metric(value=sum(scores) / len(scores), stderr=stderr, scores=scores)
