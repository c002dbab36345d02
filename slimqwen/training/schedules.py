"""The schedules of lambda, beta and the learning rate, over the WHOLE run and not per stage, as pure functions."""

import math

from slimqwen.recipe import Ramp
from slimqwen.training.course import Course


def kd_weight(progress: float, ramp: Ramp) -> float:
    """Return lambda, the weight of KD against LM: a straight line from `ramp.start` at progress 0 to `ramp.end` at 1.

    `progress` in [0, 1] is the share of the run's tokens trained on so far.
    """
    return ramp.start + (ramp.end - ramp.start) * progress


def mtp_weight(progress: float, ramp: Ramp) -> float:
    """Return beta, the weight of the MTP terms: half a cosine from `ramp.start` at progress 0 to `ramp.end` at 1."""
    return ramp.end + (ramp.start - ramp.end) * _cosine(progress)


def learning_rate(step: int, course: Course, peak: float, final: float) -> float:
    """Return the learning rate of optimiser step `step`, counted from 0 over all stages of the run.

    Linear warm-up, in which step 0 already learns at peak / warmup_steps, to `peak` at the last warm-up step (the first
    step if there is no warm-up); then half a cosine, over the tokens that remain, to `final` at the last step of the
    run, total_steps - 1:

        step               0                     warmup_steps - 1    total_steps - 1
        learning rate      peak / warmup_steps   peak                final

    A run no longer than its warm-up ends below or at `peak`, without decay, so that a short trial of a long recipe has
    the learning rates that the long run starts with.
    """
    if step < course.warmup_steps:
        return peak * (step + 1) / course.warmup_steps
    peak_step, last_step = max(course.warmup_steps - 1, 0), course.total_steps - 1
    if last_step <= peak_step:
        return peak
    peak_row = course.first_row(peak_step)
    done = (course.first_row(step) - peak_row) / (course.first_row(last_step) - peak_row)
    return final + (peak - final) * _cosine(done)


def _cosine(progress: float) -> float:
    """Return half a cosine, from 1 at progress 0 to 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
