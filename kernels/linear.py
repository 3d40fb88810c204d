"""A linear layer whose weight stays packed.

The buffers carry the names that the checkpoint gives the tensors (`weight_packed`, `weight_scale`, ...; in a native
checkpoint those of a kernel's layout), so that loading is an ordinary assignment. `prepare` then asks the dispatcher which
kernel will run, and brings the buffers into that kernel's layout where it differs; the memory stays that of the packed
weight. Where activation order put the columns in another order, `column_order` permutes the input.

    y = W[:, order] x[order] + b

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from aerogel.errors import BadInput
from aerogel.kernels import graphs, layouts
from aerogel.kernels.dispatch import choose, explain
from aerogel.kernels.gemm.ref import Reference
from aerogel.kernels.gradients import inference_only
from aerogel.kernels.packed import Packed
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.pack.config import choose_format, format_of
from aerogel.pack.format import Activations, Shapes
from aerogel.pack.scheme import Scheme
from aerogel.pack.source import Columns
from aerogel.quantize.grids import Codes


def problem_of(scheme: Scheme, N: int, K: int, dtype: torch.dtype) -> Problem:
    """The matmul of a weight on the device whose layout its scheme names ("cpu" where it names none)."""
    device = "cpu" if scheme.layout is None else layouts.device_of(scheme.layout)
    return Problem(format=scheme.format, grid=scheme.grid, N=N, K=K, dtype=dtype, device=device, activations=scheme.activations)


def stored_shapes(scheme: Scheme, N: int, K: int) -> Shapes:
    """The tensors that a file has for a weight [N, K], as shapes and dtypes."""
    if scheme.layout is None:
        return format_of(scheme.format).shapes(N, K, scheme.grid)
    return layouts.owner(scheme.layout).shapes(problem_of(scheme, N, K, torch.float32))


class Linear(Packed):
    """`y = x @ W.T + b` with W [out_features, in_features] packed by `scheme`.

    A new one holds empty buffers of the stored shapes: fill them (or load a state dict) and call `prepare`.

    Args:
        in_features, out_features: K and N.
        scheme: format, grid and activations of the weight.
        bias: whether there is one; a parameter of `dtype`.
        dtype: of the bias, and of the activations that `prepare` plans for.
        device: where the buffers are made, the default device unless given.
    """

    kernel_is_all: ClassVar[bool] = True
    """Whether `forward` is the kernel's product and nothing else."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.compute_dtype, self.layout = scheme, dtype, scheme.layout
        self.fast_activations = False
        self.kernel_name: str | None = None
        self._kernel: type[Kernel] = Reference
        self._problem: Problem | None = None
        self._graph_name: str | None = None
        self.column_order: Tensor | None
        for name, (shape, kind) in stored_shapes(scheme, out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.register_buffer("column_order", None)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_codes(
        cls,
        codes: Codes,
        *,
        activations: Activations = "none",
        bias: Tensor | None = None,
        order: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        wanted: str = "auto",
    ) -> Self:
        """A layer from codes [N, K], ready to run.

        Args:
            codes: the weight.
            activations: how inputs are rounded.
            bias: [N] or None.
            order: int64 [K], where column j of `codes` stands in the input; None for its own place.
            dtype: of the activations it will mostly see.
            wanted: the format to keep it in, or "auto".
        """
        fmt = choose_format(codes.grid, activations, wanted)
        scheme = Scheme(format=fmt.name, grid=codes.grid, activations=activations)
        N, K = codes.values_NK.shape
        layer = cls(K, N, scheme, bias=bias is not None, dtype=dtype, device=codes.values_NK.device)
        for name, tensor in fmt.encode(codes).items():
            layer._buffers[name] = tensor
        layer.column_order = order
        if bias is not None and layer.bias is not None:
            layer.bias.data = bias.detach().to(dtype)
        layer.prepare()
        return layer

    def problem(self, dtype: torch.dtype | None = None, tokens: int | None = None) -> Problem:
        """The matmul this layer stands for, on the device where it is."""
        return Problem(
            format=self.scheme.format,
            grid=self.scheme.grid,
            N=self.out_features,
            K=self.in_features,
            M=tokens,
            dtype=dtype or self.compute_dtype,
            device=self.device.type,
            activations=self.scheme.activations,
            fast=self.fast_activations,
        )

    def prepare(self, dtype: torch.dtype | None = None, *, overwrite: bool = False) -> Self:
        """Chooses the kernel for activations of `dtype` and brings the weight into its layout.

        Args:
            dtype: the one planned for, unless given.
            overwrite: on a GPU, the weight's own memory is used for the new layout where that is possible; nobody else may
                hold these tensors.

        Raises:
            BadInput: the stored shape is not this layer's.
        """
        self.restore()
        self.compute_dtype = dtype or self.compute_dtype
        shape = self._buffers.get("weight_shape")
        if shape is not None and shape.tolist() != [self.out_features, self.in_features]:
            raise BadInput(
                f"a packed weight says it is {shape.tolist()}, the model wants [{self.out_features}, {self.in_features}];"
                " the checkpoint does not belong to this config"
            )
        problem = self.problem()
        self._settle(*choose(problem), problem)
        if not self.runs_as_stored:
            overwrite = overwrite and problem.device == "cuda"  # on a CPU they may be pages of a file
            self.fill(layouts.packed(self._kernel, self, problem, overwrite=overwrite))
        return self

    @property
    def runs_as_stored(self) -> bool:
        """Whether the chosen kernel runs the tensors of the file, so that `prepare` had nothing to do."""
        if self.layout is not None:
            return self._kernel.layout == self.layout
        return self._problem is None or self._kernel.runs_stored(self._problem)

    def restore(self) -> None:
        """Brings the weight back into the layout of the file; `prepare` undoes it."""
        if self._problem is not None and not self.runs_as_stored:
            self.fill(self.encoded(self._kernel.unpack(self._tensors(), self._problem)))
        self._problem, self.kernel_name = None, None

    def adopt(self, tensors: dict[str, Tensor], kernel_name: str, kernel: type[Kernel], problem: Problem) -> None:
        """Takes tensors that lie in the layout of `kernel` already, as if `prepare` had made them."""
        self.fill(tensors)
        self._settle(kernel_name, kernel, problem)

    def _settle(self, kernel_name: str, kernel: type[Kernel], problem: Problem) -> None:
        """Takes a kernel for its weight; under which name graphs find it, where they cannot hold what it does."""
        self.kernel_name, self._kernel, self._problem = kernel_name, kernel, problem
        self._graph_name = None if kernel.traceable else graphs.keep(kernel, problem)

    def encoded(self, codes: Codes) -> dict[str, Tensor]:
        """Codes as the tensors that the file has for them."""
        if self.layout is None:
            return format_of(self.scheme.format).encode(codes)
        N, K = codes.values_NK.shape
        return layouts.owner(self.layout).pack(codes, problem_of(self.scheme, N, K, self.compute_dtype))

    def operands(self) -> dict[str, Tensor]:
        """What its kernel is called with."""
        return self._tensors()

    def held(self) -> dict[str, Tensor]:
        """The weight's tensors as they lie in memory now."""
        return self._tensors()

    def codes_of_rows(self, start: int, stop: int) -> Codes:
        """The codes of rows start..stop of a weight as the file has it; start is a multiple of `ROW_STEP`."""
        if self.layout is not None:
            kernel = layouts.owner(self.layout)
            problem = problem_of(self.scheme, stop - start, self.in_features, self.compute_dtype)
            return kernel.unpack(layouts.cut(kernel, self._tensors(), start, stop), problem)
        return format_of(self.scheme.format).to_codes(self.stored_rows(start, stop), self.scheme.grid)

    def stored_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of rows start..stop of a weight in its format; nothing for one in a native layout."""
        if self.layout is not None:
            return {}
        tensors = self._tensors()
        if (start, stop) == (0, self.out_features):
            return tensors
        return format_of(self.scheme.format).rows(tensors, self.scheme.grid, start, stop)

    @staticmethod
    def by_kernel(model: nn.Module) -> dict[tuple[type[Kernel], torch.device], list[tuple[Layout, Problem]]]:
        """The weights of a model that are ready to run, by the kernel that runs them and the device where they are."""
        found: dict[tuple[type[Kernel], torch.device], list[tuple[Layout, Problem]]] = {}
        for module in model.modules():
            if isinstance(module, Linear) and module._problem is not None and module._tensors():
                found.setdefault((module._kernel, module.device), []).append((module.operands(), module._problem))
        return found

    @inference_only
    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        if self._problem is None:
            self.prepare(x.dtype)
        return self.product(x.reshape(-1, self.in_features), self.bias).reshape(*x.shape[:-1], self.out_features)

    def product(self, x_MK: Tensor, bias_N: Tensor | None) -> Tensor:
        """x @ W.T (+ bias), [M, N] in x's dtype, by the kernel of a prepared layer."""
        problem = self._problem or self.problem()
        rows = x_MK.to(problem.dtype)
        if self.column_order is not None:
            rows = rows.index_select(1, self.column_order)
        rows = rows.contiguous()
        if self._graph_name is not None and torch.compiler.is_compiling():
            y_MN = graphs.linear(rows, self.operands(), bias_N, problem.N, self._graph_name)
        else:
            y_MN = self._kernel.run(rows, self.operands(), problem, bias_N)
        return y_MN.to(x_MK.dtype)

    def columns(self) -> Columns:
        """The weight's codes and the order of its columns."""
        if self._problem is None:
            return Columns(self._stored_codes(), self.column_order)
        return Columns(self._kernel.unpack(self._tensors(), self._problem), self.column_order)

    def allow_fast_activations(self, allowed: bool = True) -> Self:
        """Lets a kernel round this layer's inputs to int8 where that is faster, or forbids it again.

        What runs then is named by `kernel_name`; the numbers change by about half a percent of the output's norm.
        """
        self.fast_activations = allowed
        problem = self.problem()
        name, kernel = choose(problem)
        if self._problem is None or kernel.pack is not self._kernel.pack or kernel.runs_stored(problem):
            return self.prepare()
        # Both kernels read the same layout.
        self._settle(name, kernel, problem)
        return self

    @property
    def rounds_activations(self) -> bool:
        """Whether its kernel rounds inputs although the checkpoint does not say so."""
        problem = self._problem
        return problem is not None and problem.fast and self._kernel.refuses(replace(problem, fast=False)) is not None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K], in the planned dtype unless given; bit for bit what the file decodes to."""
        return self.columns().dense(dtype or self.compute_dtype)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weight as it lies in memory, bias not counted."""
        held = [*self._tensors().values(), *([] if self.column_order is None else [self.column_order])]
        return sum(tensor.nbytes for tensor in held)

    def extra_repr(self) -> str:
        """Shape, numbers, kernel, and whether there is a bias."""
        return f"{super().extra_repr()}, bias={self.bias is not None}"

    def _tensors(self) -> dict[str, Tensor]:
        return {name: held for name, held in super()._tensors().items() if name != "column_order"}

    def _stored_codes(self) -> Codes:
        return self.codes_of_rows(0, self.out_features)


def round_activations(model: nn.Module) -> int:
    """Lets every packed linear of a loaded model round its inputs to int8; returns how many do.

    Raises:
        BadInput: none does: the model is dense, or no kernel for its weights rounds on this device.
    """
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    rounding = sum(linear.allow_fast_activations().rounds_activations for linear in linears)
    if not rounding:
        reasons = dict(explain(linears[0].problem())) if linears else {}
        reason = reasons.get("cpu-int8") or "it has no packed linears"
        raise BadInput(f"activations int8: no layer of this model can round its inputs here ({reason}); leave the option out")
    return rounding
