"""Grouped matmuls on Hopper whose weights lie in the tile layout as other problems than their own, or whose inputs are rounded.

What a kernel for one weight does before its product (`gemm/cuda_around.py`), it does to each row for itself: so it does to
rows that are sorted by expert, and then the grouped product runs. Inputs that a checkpoint wants rounded, int8 or e4m3, are
rounded to these numbers and multiplied in 16 bits, as the kernels for one weight do with few tokens; in long runs those in int8
are multiplied in integers.

Shape legend: E experts, S pairs of token and expert, N out features, K in features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels.gemm import cuda_groups, cuda_int8, cuda_plane, cuda_planes, cuda_rounded
from aerogel.kernels.gemm.cuda_around import AroundCuda
from aerogel.kernels.gemm.ref import round_input
from aerogel.kernels.grouped.cuda_grouped import Cuda
from aerogel.kernels.grouped.kernel import Routes
from aerogel.kernels.problem import Kernel, Layout, Problem


class CudaPlane(Cuda):
    """One plane, as signs."""

    about: ClassVar[str] = "as cuda, for a single bit plane"
    base: ClassVar[type[Kernel]] = cuda_plane.CudaPlane


class CudaAround(Cuda):
    """A step before the grouped product, of x as it was before rows were filled up to whole pieces. Never instantiated."""

    around: ClassVar[type[AroundCuda]]

    @classmethod
    def run(
        cls, x_SK: Tensor, expert_S: Tensor, routes: Routes, layout: Layout, problem: Problem, bias_EN: Tensor | None = None
    ) -> Tensor:
        """The step before, then one call of the operator."""
        stored = of_rows(layout, cls.in_order(expert_S, routes))
        made_SK = cls.around.operand(x_SK[:, : problem.K].contiguous(), stored, problem)
        return Cuda.run(made_SK, expert_S, routes, layout, cls.around.inner(problem), bias_EN)


class CudaPlanes(CudaAround):
    """Planes as codes into tables of groups."""

    about: ClassVar[str] = "as cuda, for bit planes, nested ones too"
    base: ClassVar[type[Kernel]] = cuda_planes.CudaPlanes
    around: ClassVar[type[AroundCuda]] = cuda_planes.CudaPlanes


class CudaGroups(CudaAround):
    """Groups that are filled up."""

    about: ClassVar[str] = "as cuda, for groups that are no multiple of 16"
    base: ClassVar[type[Kernel]] = cuda_groups.CudaGroups
    around: ClassVar[type[AroundCuda]] = cuda_groups.CudaGroups


class CudaRounded(CudaAround):
    """e4m3 weights with e4m3 inputs."""

    about: ClassVar[str] = "as cuda, with inputs rounded to e4m3"
    base: ClassVar[type[Kernel]] = cuda_rounded.CudaRounded
    around: ClassVar[type[AroundCuda]] = cuda_rounded.CudaRounded


class CudaInt8(Cuda):
    """Packed integers with int8 inputs."""

    about: ClassVar[str] = "as cuda, with inputs rounded to int8"
    base: ClassVar[type[Kernel]] = cuda_int8.CudaInt8

    @staticmethod
    def run(
        x_SK: Tensor, expert_S: Tensor, routes: Routes, layout: Layout, problem: Problem, bias_EN: Tensor | None = None
    ) -> Tensor:
        """One call of an operator; with stored scales inputs are rounded by torch's, and multiplied in 16 bits."""
        if problem.activations == "int8":
            y_SN: Tensor = torch.ops.aerogel.grouped_tiles_linear_int8.default(
                x_SK,
                routes[2],
                layout["tile_codes"],
                layout["tile_scale"],
                layout.get("tile_zero"),
                layout["tile_row_scale"],
                bias_EN,
                problem.grid.group_size or 0,
                problem.N,
            )
            return y_SN
        stored = of_rows(layout, CudaInt8.in_order(expert_S, routes))
        x8_SK = round_input(x_SK.float(), problem, stored["input_scale"]).to(x_SK.dtype)
        return Cuda.run(x8_SK, expert_S, routes, layout, problem, bias_EN)


def of_rows(layout: Layout, expert_S: Tensor) -> Layout:
    """The layout with the scale of each row's inputs [S, 1] in the place of each expert's [E, 1]; nobody's is anybody's."""
    scale_E1 = layout.get("input_scale")
    return layout if scale_E1 is None else {**layout, "input_scale": scale_E1[expert_S.clamp(max=len(scale_E1) - 1)]}
