"""Sweeps on a GPU: columns decided in runs are what columns decided one by one are."""

from __future__ import annotations

import pytest
from tests.kernels.rounding_cases import failures


@pytest.mark.gpu
def test_runs_of_columns_are_what_single_columns_are() -> None:
    assert failures("cuda") == []
