"""The three quantities that move over a run, over the WHOLE run and not per stage, as pure functions."""

import math

from slimqwen.recipe import Ramp


def kd_weight(progress: float, ramp: Ramp) -> float:
    """lambda, the weight of KD against LM: a straight line from `ramp.start` at progress 0 to `ramp.end` at 1.

    `progress` in [0, 1] is the share of the run's tokens that were trained on.
    """
    return ramp.start + (ramp.end - ramp.start) * progress


def mtp_weight(progress: float, ramp: Ramp) -> float:
    """beta, the weight of the MTP terms: half a cosine from `ramp.start` at progress 0 to `ramp.end` at 1."""
    return ramp.end + (ramp.start - ramp.end) * _cosine(progress)


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, final: float) -> float:
    """Learning rate of optimiser step `step`, counted from 0 over all stages of the run.

    Linear warm-up, in which step 0 already learns at peak / warmup_steps, to `peak` at the last warm-up step (the first
    step if there is no warm-up); then half a cosine to `final` at the last step of the run, total_steps - 1:

        step               0                     warmup_steps - 1    total_steps - 1
        learning rate      peak / warmup_steps   peak                final

    A run no longer than its warm-up only warms up: it stops on the way to `peak`, or at it, without decay. That
    keeps a short trial of a long recipe at the learning rates which the long run starts with.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    peak_step = max(warmup_steps - 1, 0)
    decay_steps = total_steps - 1 - peak_step
    if decay_steps <= 0:
        return peak
    return final + (peak - final) * _cosine((step - peak_step) / decay_steps)


def _cosine(progress: float) -> float:
    """Half a cosine, from 1 at progress 0 to 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
