"""Compiling before it is needed: every kernel that a model will run with so many tokens, side by side instead of one by one.

A kernel that is compiled at run time is compiled when a number of tokens is first seen, a second for each shape of weight; a
model of five shapes waits a minute for its first token. Here they are planned in threads, and what is compiled is kept on disk.

What is compiled depends on shapes and types alone, and these are known before a weight is read. So the kernels of a model that
is being loaded are compiled meanwhile (`begin`), for outlines of its weights (`layouts.outline`). What no outline has, outliers
and the like beside codes, is compiled behind the reading.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from aerogel.errors import BadInput, RunFailed
from aerogel.kernels import layouts
from aerogel.kernels.dispatch import choose
from aerogel.kernels.linear import Linear
from aerogel.kernels.problem import Kernel, Layout, Problem

if TYPE_CHECKING:
    from aerogel.kernels.cuda.sources import Wanted

logger = logging.getLogger(__name__)

Weights = Mapping[tuple[type[Kernel], torch.device], Sequence[tuple[Layout, Problem]]]
"""Layouts and their problems, by the kernel that runs them and the device where it does."""


def compile_ahead(model: nn.Module, tokens: Iterable[int]) -> None:
    """Makes the kernels of a model's packed linears ready for these numbers of tokens. Says how many it compiled.

    Nothing depends on it: where it fails, that is said, and each kernel is compiled when it is first used.
    """
    _compile(_wanted(Linear.by_kernel(model), tokens))


def begin(problems: Iterable[Problem], device: torch.device, tokens: Iterable[int]) -> threading.Thread:
    """The same in a thread of its own, for weights that will be on `device`. problems: of `problems_of`.

    What is wanted is found before the thread starts: beside Python code that reads weights it would wait for its turns.
    """
    found: dict[tuple[type[Kernel], torch.device], list[tuple[Layout, Problem]]] = {}
    for problem in problems:
        _, kernel = choose(problem)
        with _forgiving():
            outline = layouts.outline(kernel, problem) if kernel.wanted is not Kernel.wanted else {}
            if outline:
                found.setdefault((kernel, device), []).append((outline, problem))
    thread = threading.Thread(target=_compile, args=(_wanted(found, tokens),), name="compiling ahead")
    thread.start()
    return thread


def problems_of(model: nn.Module, groups: Iterable[Sequence[str]], device: torch.device) -> list[Problem]:
    """The matmuls of a model whose linears are empty still, on the device where they will be, each kind once.

    groups: names of linears that will be merged (`decode.merge.siblings`). Linears with something beside their codes are left
    out: what it is decides what is compiled.
    """
    from aerogel.kernels.decode.merge import alike, whole_problem

    linears = {name: module for name, module in model.named_modules() if type(module) is Linear}
    problems = {name: replace(linear.problem(), device=device.type) for name, linear in linears.items()}
    wholes: dict[tuple[object, ...], Problem | None] = {}  # a model has hundreds of linears of a handful of kinds
    for names in groups:
        if not all(name in linears for name in names) or not alike([linears[name] for name in names]):
            continue
        members = [problems[name] for name in names]
        key = tuple(map(_kind, members))
        if key not in wholes:
            wholes[key] = whole_problem(members)
        whole = wholes[key]
        if whole is not None:
            problems[names[0]] = whole
            for name in names[1:]:
                del problems[name]
    return list({_kind(problem): problem for problem in problems.values()}.values())


def _kind(problem: Problem) -> tuple[object, ...]:
    return problem.format, str(problem.grid), problem.N, problem.K, problem.dtype, problem.activations


def _wanted(weights: Weights, tokens: Iterable[int]) -> list[tuple[Wanted, torch.device]]:
    """What these weights have to have compiled, and where."""
    numbers = sorted({count for count in tokens if count > 0})
    found: list[tuple[Wanted, torch.device]] = []
    for (kernel, device), held in weights.items():
        with _forgiving():
            found += [(one, device) for one in (kernel.wanted(held, numbers, device) if numbers else ())]
    return found


def _compile(wanted: Sequence[tuple[Wanted, torch.device]]) -> None:
    """Compiles and loads it, and says how many were not compiled before."""
    if not wanted:
        return
    from aerogel.kernels.cuda.nvrtc import Compiled, cache_folder, listening
    from aerogel.kernels.cuda.sources import load_all

    fresh: list[Compiled] = []
    started = time.perf_counter()
    with listening(lambda done: None if done.cached else fresh.append(done)), _forgiving():
        load_all(wanted)
    if fresh:
        seconds = time.perf_counter() - started
        logger.warning("compiled %d kernels for this GPU in %.1f s, kept in %s", len(fresh), seconds, cache_folder())


@contextmanager
def _forgiving() -> Iterator[None]:
    """Says what failed, and goes on."""
    try:
        yield
    except (RuntimeError, OSError, RunFailed, BadInput) as error:
        logger.warning("compiling ahead failed (%s); kernels are compiled when they are first used", error)
