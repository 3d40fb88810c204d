from __future__ import annotations

import math
import random
import statistics

import pytest

from aerogel.eval.significance import Spread, exponential, mcnemar, mean_and_error


def by_hand(lost: int, gained: int) -> float:
    """Two-sided binomial tail at 1/2: twice the smaller tail, at most 1."""
    total = lost + gained
    tail = sum(math.comb(total, k) for k in range(min(lost, gained) + 1)) / 2**total
    return min(1.0, 2 * tail)


def pairs(both: int, neither: int, lost: int, gained: int) -> tuple[list[bool], list[bool]]:
    rows = [(True, True)] * both + [(False, False)] * neither + [(True, False)] * lost + [(False, True)] * gained
    random.Random(0).shuffle(rows)
    return [before for before, _ in rows], [after for _, after in rows]


@pytest.mark.parametrize(("lost", "gained"), [(0, 1), (5, 0), (10, 2), (7, 7), (1, 9), (30, 12), (0, 6)])
def test_mcnemar_is_the_exact_binomial_tail(lost: int, gained: int) -> None:
    found = mcnemar(*pairs(11, 4, lost, gained))
    assert (found.both_right, found.both_wrong, found.lost, found.gained) == (11, 4, lost, gained)
    assert found.p == pytest.approx(by_hand(lost, gained), rel=1e-9)


def test_known_values() -> None:
    assert mcnemar(*pairs(5, 5, 6, 0)).p == pytest.approx(0.03125)
    assert mcnemar(*pairs(5, 5, 8, 2)).p == pytest.approx(0.109375)


def test_a_model_against_itself_is_not_different() -> None:
    answers = [True, False, True]
    found = mcnemar(answers, answers)
    assert (found.p, found.lost, found.gained) == (1.0, 0, 0)


def test_unpaired_documents_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True], [])


def test_mean_and_error() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    mean, error = mean_and_error(values)
    assert mean == 3.75
    assert error == pytest.approx(statistics.stdev(values) / 2)
    assert mean_and_error([2.0]) == (2.0, None)


def test_spread() -> None:
    spread = Spread.of([5, 1, 2, 4, 3])
    assert (spread.median, spread.min, spread.max, spread.iqr) == (3, 1, 5, 2)
    assert spread.as_dict()["samples"] == [5, 1, 2, 4, 3]
    assert Spread.of([7]).iqr == 0


def test_a_loss_too_large_for_a_perplexity_is_infinite() -> None:
    assert exponential(1e6) == math.inf
