"""Rows that fill whole rounds of the device, and what is left in smaller tiles.

A launch takes as many rounds as its tiles need, and in the last one multiprocessors without a tile wait for the others: 224
tiles on 132 multiprocessors take as long as 264. Where the last round is badly filled its rows get a launch of their own, whose
tiles are so much smaller that they fill the device for a shorter time. It fills its rings while the first one ends.

Shape legend: M tokens, R row tiles of 16.
"""

from __future__ import annotations

from collections.abc import Iterator

from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import Config, candidates, ceil_divide, microseconds_of_tiles

MOST = 0.95
"""Of the estimated time of one launch two may take: less is not sure to be a gain. Measured for codes of 4 bits: integers
win 8 to 11 % where 9 to 10 are estimated, tables 5 to 9 where 8. Other widths were not measured and stay one launch."""


def in_rounds(weight: TileWeight, config: Config, M: int, multiprocessors: int) -> list[tuple[int, Config]]:
    """Runs of rows and their cuts: all with `config`, or its whole rounds, and the rest with the cut that is estimated to be
    the fastest there."""
    R, seats = weight.codes.shape[0], multiprocessors * config.resident
    tiles = ceil_divide(R, config.row_tiles)
    whole = tiles // seats * seats
    if weight.bits != 4 or weight.planes or config.cluster > 1 or config.tokens < M or whole in (0, tiles):
        return [(weight.N, config)]
    first = whole * config.row_tiles

    def estimate(cut: Config, rows: int) -> float:
        return microseconds_of_tiles(weight, cut, ceil_divide(rows, cut.row_tiles), weight.nbytes * rows / R, multiprocessors)

    rest = min(_smaller(weight, config, M), key=lambda cut: estimate(cut, R - first), default=config)
    if estimate(config, first) + estimate(rest, R - first) > MOST * estimate(config, R):
        return [(weight.N, config)]
    return [(16 * first, config), (weight.N - 16 * first, rest)]


def _smaller(weight: TileWeight, config: Config, M: int) -> Iterator[Config]:
    """Cuts of fewer rows and as many tokens."""
    for cut in candidates(weight, M):
        if cut.tokens == config.tokens and cut.cluster == 1 and cut.row_tiles < config.row_tiles:
            yield cut
