"""Means with standard errors, medians with spread, and the paired test that tells a real loss from luck.

McNemar's exact test (Biometrika 12:153, 1947): two models answer the same documents. Documents on which both are right
or both are wrong say nothing about the difference; of the n that only one of them got right, each falls to either side
with probability 1/2 if the models are equally good. p is the two-sided binomial tail at that 1/2. It needs no
independence between the two models' answers, which is why it sees differences that two overlapping error bars hide.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean, s / sqrt(n) with the n-1 deviation; the error is None for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def exponential(value: float) -> float:
    """e ** value, infinite where that leaves the range of a float (a model that was broken still gets a report)."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Spread:
    """Repeated measurements: median, smallest, largest, interquartile range, and the values in the order measured."""

    median: float
    min: float
    max: float
    iqr: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise at least one measurement; quartiles are interpolated between the measured values."""
        values = tuple(float(sample) for sample in samples)
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(statistics.median(values), min(values), max(values), quartiles[2] - quartiles[0], values)

    def as_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return {**asdict(self), "samples": list(self.samples)}


@dataclass(frozen=True)
class Pairing:
    """Two models on the same documents: how many each answered, and the exact two-sided McNemar p.

    lost: right in dense only. gained: right in compressed only. Their sum is the number of flips.
    """

    both_right: int
    both_wrong: int
    lost: int
    gained: int
    p: float

    def as_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)


def mcnemar(dense: Sequence[bool], compressed: Sequence[bool]) -> Pairing:
    """Compare per-document correctness of two models on the same documents in the same order.

    p = P(|X - n/2| >= |lost - n/2|) for X ~ Binomial(n = lost + gained, 1/2); 1.0 when nothing flipped.
    Raises ValueError when the two lists differ in length (a programming error: the documents were not paired).
    """
    from scipy.stats import binomtest

    pairs = list(zip(dense, compressed, strict=True))
    lost = sum(before and not after for before, after in pairs)
    gained = sum(after and not before for before, after in pairs)
    both = sum(before and after for before, after in pairs)
    flips = lost + gained
    p = float(binomtest(lost, flips, 0.5).pvalue) if flips else 1.0
    return Pairing(both, len(pairs) - both - flips, lost, gained, p)
