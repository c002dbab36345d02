"""Verdicts from paired runs: every sentence about a finding is computed, none is written by hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student_t

from slimqwen.study.result import Judgement, Run, Verdict

CONFIDENCE = 0.95

Runs = Mapping[str, Run]
"""The runs of one seed, by arm."""


@dataclass(frozen=True)
class Finding:
    """Statement of the paper (or ours) that runs can confirm or contradict.

    gain: computes from one seed's runs, which share their text and its order, a number that is positive where the statement
        holds.
    quantity: describes that number.
    """

    name: str
    statement: str
    quantity: str
    gain: Callable[[Runs], float]


def lower(metric: str, better: str, worse: str, *, one_shot: bool = False) -> Callable[[Runs], float]:
    """Return the gain of the finding that `metric` is lower in the arm `better` than in `worse`."""

    def gain(runs: Runs) -> float:
        return measured(runs[worse], one_shot)[metric] - measured(runs[better], one_shot)[metric]

    return gain


def higher(metric: str, better: str, worse: str, *, one_shot: bool = False) -> Callable[[Runs], float]:
    """Return the gain of the finding that `metric` is higher in the arm `better` than in `worse`."""
    return lower(metric, worse, better, one_shot=one_shot)


def measured(run: Run, one_shot: bool) -> dict[str, float]:
    """Return a run's numbers before training (`one_shot`) or after it."""
    found = run.one_shot if one_shot else run.metrics
    assert found is not None, f"{run.arm} was not measured {'before' if one_shot else 'after'} training"
    return found


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean of paired differences (Student's t); None for a single one."""
    if len(differences) < 2:
        return None
    half = (
        float(student_t.ppf(0.5 + CONFIDENCE / 2, len(differences) - 1)) * stdev(differences) / len(differences) ** 0.5
    )
    return fmean(differences) - half, fmean(differences) + half


def signed(value: float) -> str:
    """Format as `+0.123`, or `+0.0012` where it is smaller: a number that decides must not read as zero."""
    return f"{value:+.3f}" if abs(value) >= 0.01 or value == 0.0 else f"{value:+.2g}"


def judged(finding: Finding, by_seed: Sequence[Runs]) -> Verdict:
    """Judge a finding by whether the interval is above zero, below it or around it; a single seed is not judged."""
    gains = [finding.gain(runs) for runs in by_seed]
    bounds, mean = interval(gains), fmean(gains)
    judgement: Judgement = "not distinguishable"
    if bounds is None:
        judgement = "not judged"
    elif bounds[0] > 0:
        judgement = "confirmed"
    elif bounds[1] < 0:
        judgement = "contradicted"
    if bounds is None:
        spread = "one seed, no interval"
    elif bounds[0] == bounds[1]:
        spread = f"the same with each of {len(gains)} seeds"
    else:
        spread = f"95 % interval {signed(bounds[0])} to {signed(bounds[1])}, {len(gains)} seeds"
    words = {"not distinguishable": "not distinguishable at this scale"}.get(judgement, judgement)
    return Verdict(
        name=finding.name,
        statement=finding.statement,
        quantity=finding.quantity,
        judgement=judgement,
        gains=gains,
        mean=mean,
        standard_deviation=stdev(gains) if len(gains) > 1 else None,
        interval=bounds,
        sentence=f"{finding.statement}: {words}. {finding.quantity[0].upper()}{finding.quantity[1:]}: {signed(mean)} ({spread}).",
    )
