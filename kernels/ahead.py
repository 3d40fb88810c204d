"""Compiling before it is needed: every kernel that a model will run with so many tokens, side by side instead of one by one.

A kernel that is compiled at run time is compiled when a number of tokens is first seen, a second for each shape of weight; a
model of five shapes waits a minute for its first token. Here they are planned in threads, and what is compiled is kept on disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from torch import nn

from aerogel.errors import RunFailed

logger = logging.getLogger(__name__)


def compile_ahead(model: nn.Module, tokens: Iterable[int]) -> None:
    """Makes the kernels of a model's packed linears ready for these numbers of tokens. Says how many it compiled.

    Nothing depends on it: where it fails, that is said, and each kernel is compiled when it is first used.
    """
    from aerogel.kernels.cuda.nvrtc import Compiled, cache_folder, listening
    from aerogel.kernels.linear import Linear

    fresh: list[Compiled] = []
    started = time.perf_counter()
    wanted = sorted({count for count in tokens if count > 0})
    if not wanted:
        return
    with listening(lambda done: None if done.cached else fresh.append(done)):
        for kernel, weights in Linear.by_kernel(model).items():
            try:
                kernel.warm(weights, wanted)
            except (RuntimeError, OSError, RunFailed) as error:
                logger.warning("compiling ahead failed (%s); kernels are compiled when they are first used", error)
    if fresh:
        seconds = time.perf_counter() - started
        logger.warning("compiled %d kernels for this GPU in %.1f s, kept in %s", len(fresh), seconds, cache_folder())
