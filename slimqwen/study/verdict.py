"""From paired runs to a verdict: no sentence about a finding is written by hand."""

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
    """A statement of the paper (or ours) that runs can bear out.

    gain: of one seed's runs, which share their text and its order, a number that is positive where the statement holds.
    quantity: what the number is, in words.
    """

    name: str
    statement: str
    quantity: str
    gain: Callable[[Runs], float]


def lower(metric: str, better: str, worse: str, *, one_shot: bool = False) -> Callable[[Runs], float]:
    """The gain of a finding that says: `metric` is lower in the arm `better` than in `worse`."""

    def gain(runs: Runs) -> float:
        return measured(runs[worse], one_shot)[metric] - measured(runs[better], one_shot)[metric]

    return gain


def higher(metric: str, better: str, worse: str, *, one_shot: bool = False) -> Callable[[Runs], float]:
    """The same of a metric that is higher in the arm `better`."""
    return lower(metric, worse, better, one_shot=one_shot)


def measured(run: Run, one_shot: bool) -> dict[str, float]:
    """A run's numbers before or after training."""
    found = run.one_shot if one_shot else run.metrics
    assert found is not None, f"{run.arm} was not measured {'before' if one_shot else 'after'} training"
    return found


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean of paired differences (Student's t); None of a single one."""
    if len(differences) < 2:
        return None
    half = (
        float(student_t.ppf(0.5 + CONFIDENCE / 2, len(differences) - 1)) * stdev(differences) / len(differences) ** 0.5
    )
    return fmean(differences) - half, fmean(differences) + half


def signed(value: float) -> str:
    """`+0.123`, and `+0.0012` of a smaller one: a number that decides must not read as zero."""
    return f"{value:+.3f}" if abs(value) >= 0.01 or value == 0.0 else f"{value:+.2g}"


def judged(finding: Finding, by_seed: Sequence[Runs]) -> Verdict:
    """The verdict: the interval lies above zero, below it, or on both sides; a single seed has none and is not judged."""
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
