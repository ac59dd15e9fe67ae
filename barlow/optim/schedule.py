"""Learning rates as plain functions of the step: a run that resumes needs to remember nothing."""

from __future__ import annotations

import math


def scaled(lr: float, batch_size: int) -> float:
    """The rate for a global batch of `batch_size`, given the rate for one of 256."""
    return lr * batch_size / 256


def warmup_cosine(step: int, total: int, warmup: float, peak: float, end: float) -> float:
    """The rate at `step` of `total`: a straight line from 0 up to `peak` at step `warmup`, half a cosine down to `end`.

    Step 0 has rate 0, and `end` would be reached at step `total`, one after the last. A run shorter than its warm-up
    ends on the way up.
    """
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * share + end * (1 - share)


def fixmatch_cosine(step: int, total: int, peak: float) -> float:
    """peak cos(7 pi k / 16 K) at step k of K, as FixMatch has it: down to 0.195 of the peak."""
    return peak * math.cos(7 * math.pi * step / (16 * total))


def half_cosine(step: int, total: int, peak: float) -> float:
    """Half a cosine from the peak at step 0 down to 0 at step `total`, one after the last."""
    return warmup_cosine(step, total, 0, peak, 0.0)
