"""results.json of a study: every run with its numbers, and the verdict on each finding."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from slimqwen.artifacts.json_file import load_model

FORMAT = "slimqwen.study/1"

Judgement = Literal["confirmed", "not distinguishable", "contradicted", "not judged"]


class Strict(BaseModel):
    """Frozen part of results.json, without unknown fields and non-finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CurvePoint(Strict):
    """Means over a few optimiser steps, nats per token; `tokens`: those trained on until the last of these steps."""

    tokens: int
    lm: float
    kd: float | None = None


class Run(Strict):
    """One variation with one seed. The keys of `metrics` and `one_shot` are those of evaluation.json, and acc_0, acc_1, ...

    one_shot: the cut model before any training; None where it was reached in several stages.
    metrics: after training; None where the variation is not trained.
    """

    arm: str
    seed: int
    changes: dict[str, Any]
    training_tokens: int
    total_parameters: int
    active_parameters: int
    one_shot: dict[str, float] | None
    metrics: dict[str, float] | None
    curve: list[CurvePoint]


class Verdict(Strict):
    """Verdict of the runs on one statement.

    gains: one number per seed, positive where the statement holds. interval: of their mean, 95 %, by Student's t; None
    with a single seed.
    """

    name: str
    statement: str
    quantity: str
    judgement: Judgement
    gains: list[float]
    mean: float
    standard_deviation: float | None
    interval: tuple[float, float] | None
    sentence: str


class Arm(Strict):
    """Name and title of a variation, with the paper's numbers for it."""

    name: str
    title: str
    paper: dict[str, float]


class Study(Strict):
    """Content of results.json."""

    format: Literal["slimqwen.study/1"] = "slimqwen.study/1"
    name: str
    title: str
    scale: str
    paper_source: str
    command: str
    started: str
    seconds: float
    machine: str
    commit: str
    versions: dict[str, str]
    recipe: dict[str, Any]
    text: dict[str, int]
    seeds: list[int]
    baseline: str
    arms: list[Arm]
    teacher: dict[str, float]
    runs: list[Run]
    verdicts: list[Verdict]

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Read `path`. Raises UserError for a file that is missing or is not the result of a study."""
        return load_model(path, cls, what="the result of a study", advice="run `slimqwen study` to make it.")
