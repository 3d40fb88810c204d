"""Experts that stay packed: one weight for all of a layer, and the way a token takes through those that it is routed to.

transformers keeps the experts of a layer as 3-D parameters, `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I], in a module
that is called with the tokens and what the router chose. `ExpertLinear` takes the place of such a parameter; the module
itself stays and gets `PackedExperts.forward`, so that its activation, its biases and its attributes are its own:

    u_s = W_up[e_s] x_t + b          h_s = gate(u_s)          y_t = sum over the experts of t of  p_s (W_down[e_s] h_s + b)

Shape legend: E experts, M tokens, S = M * k pairs of token and expert, N out features, K in features, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from aerogel.errors import BadInput, RunFailed
from aerogel.kernels import graphs
from aerogel.kernels.decode import ops
from aerogel.kernels.decode.reading import ACTIVATIONS
from aerogel.kernels.dispatch import choose_grouped
from aerogel.kernels.expert_linears import ExpertLinears
from aerogel.kernels.gradients import inference_only
from aerogel.kernels.grouped.kernel import Grouped, Routes
from aerogel.kernels.grouped.ref import Reference
from aerogel.kernels.packed import Packed
from aerogel.kernels.problem import Problem
from aerogel.pack.config import format_of
from aerogel.pack.scheme import Scheme
from aerogel.quantize.codes import Codes


class ExpertLinear(Packed):
    """`y_s = W[e_s] x_s + b[e_s]` with W [experts, out_features, in_features] packed by `scheme`.

    A new one holds empty buffers: those of the format for one expert, stacked. Fill them and call `prepare`.

    Args:
        experts, in_features, out_features: E, K and N.
        scheme: format, grid and activations of every expert's weight.
        dtype: of the activations that `prepare` plans for.
        device: where the buffers are made, the default device unless given.
    """

    input_scale: Tensor | None

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.scheme, self.compute_dtype = scheme, dtype
        self.kernel_name: str | None = None
        self._kernel: type[Grouped] = Reference
        self._problem: Problem | None = None
        self._graph_name: str | None = None
        self.more: ExpertRows | None = None
        for name, (shape, kind) in format_of(scheme.format).shapes(out_features, in_features, scheme.grid).items():
            self.register_buffer(name, torch.empty(experts, *shape, dtype=kind, device=device))
        static = scheme.activations.endswith("-static")
        self.register_buffer("input_scale", torch.empty(experts, 1, device=device) if static else None)

    def operands(self) -> dict[str, Tensor]:
        """What its kernel is called with: the weight, and the scales of inputs where they are stored."""
        return self._tensors() | ({} if self.input_scale is None else {"input_scale": self.input_scale})

    def problem(self, dtype: torch.dtype | None = None) -> Problem:
        """The matmul of one expert, on the device where the weight is."""
        return Problem(
            format=self.scheme.format,
            grid=self.scheme.grid,
            N=self.out_features,
            K=self.in_features,
            dtype=dtype or self.compute_dtype,
            device=self.device.type,
            activations=self.scheme.activations,
        )

    def prepare(self, dtype: torch.dtype | None = None) -> Self:
        """Chooses the kernel for activations of `dtype` and brings one expert after the other into its layout."""
        self.restore()
        self.compute_dtype = dtype or self.compute_dtype
        problem = self.problem()
        name, kernel = choose_grouped(problem)
        tensors = self._tensors()
        if not kernel.base_of(problem).runs_stored(problem):
            tensors = stacked(lambda e: kernel.base_of(problem).pack(self.codes_of(e), problem), self.experts)
        self.adopt(tensors, name, kernel, problem)
        if self.more is not None:
            self.more.linear.prepare(dtype)
        return self

    def adopt(self, tensors: dict[str, Tensor], kernel_name: str, kernel: type[Grouped], problem: Problem) -> None:
        """Takes tensors that lie in the layout of `kernel` already, as if `prepare` had made them."""
        self.fill(tensors)
        self.kernel_name, self._kernel, self._problem = kernel_name, kernel, problem
        self._graph_name = None if kernel.traceable else graphs.keep(kernel, problem)

    def restore(self) -> None:
        """Brings the weight back into the layout of the file; `prepare` undoes it."""
        problem, self.kernel_name = self._problem, None
        if problem is not None and not self._kernel.base_of(problem).runs_stored(problem):
            self.fill(stacked(lambda e: problem.stored.encode(self.codes_of(e)), self.experts))
        self._problem = None

    def codes_of(self, expert: int) -> Codes:
        """The weight of one expert, [N, K]."""
        one = {name: tensor[expert] for name, tensor in self._tensors().items()}
        if self._problem is None:
            return format_of(self.scheme.format).to_codes(one, self.scheme.grid)
        return self._kernel.base_of(self._problem).unpack(one, self._problem)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weights [E, N, K]; bit for bit what the file decodes to."""
        dense_ENK = torch.stack([self.codes_of(e).decode(dtype or self.compute_dtype) for e in range(self.experts)])
        return dense_ENK if self.more is None else self.more.put(dense_ENK)

    def routes(self, expert_S: Tensor) -> Routes:
        """What the kernel makes of the routing; good for every weight of the same experts."""
        if self._problem is None:
            self.prepare()
        return self._kernel.route(expert_S, self.experts)

    def spread(self, x_MK: Tensor, routes: Routes) -> Tensor:
        """x as the first product takes it; see `Grouped.spread`."""
        return self._kernel.spread(x_MK.to(self.compute_dtype).contiguous(), routes).to(x_MK.dtype)

    def add(self, y_SN: Tensor, weight_Mk: Tensor, routes: Routes) -> Tensor:
        """Each token's sum [M, N] over its pairs, weighted, in y's dtype; see `Grouped.add`."""
        return self._kernel.add(y_SN.to(self.compute_dtype), weight_Mk, routes).to(y_SN.dtype)

    @inference_only
    def forward(self, x_MK: Tensor, expert_S: Tensor, routes: Routes, bias_EN: Tensor | None = None) -> Tensor:
        """y [S, N] in x's dtype: each pair with the weight of its expert_S (int64). x comes from `spread`, or from another
        product of the same routing; rows are in the kernel's order until `add` sums them up."""
        if self._problem is None:
            self.prepare(x_MK.dtype)
        problem = self._problem or self.problem()
        rows = x_MK.to(problem.dtype).contiguous()
        if self._graph_name is not None:  # for a step of decoding that is traced, too
            y_SN = graphs.experts(rows, expert_S, routes, self.operands(), bias_EN, problem.N, self._graph_name)
        else:
            y_SN = self._kernel.run(rows, expert_S, routes, self.operands(), problem, bias_EN)
        y_SN = y_SN.to(x_MK.dtype)
        return y_SN if self.more is None else self.more(y_SN, x_MK, self._kernel.in_order(expert_S, routes))

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights as they lie in memory."""
        beside = 0 if self.more is None else self.more.linear.packed_bytes + self.more.index_ER.nbytes
        return sum(tensor.nbytes for tensor in self._tensors().values()) + beside

    def _tensors(self) -> dict[str, Tensor]:
        return {name: held for name, held in super()._tensors().items() if name != "input_scale"}

    def extra_repr(self) -> str:
        """Experts, shape, numbers and kernel."""
        return f"experts={self.experts}, {super().extra_repr()}"


class ExpertRows(nn.Module):
    """What some rows of every expert lack (`quantize/rows.py`): R more outputs of each, which are added to those rows.

    All experts have as many: where one has fewer rows of more bits, the rest are zeros that are added to its row 0.

    Args:
        experts, in_features, rows: E, K and R.
        scheme: of what is added.
    """

    index_ER: Tensor

    def __init__(
        self,
        experts: int,
        in_features: int,
        rows: int,
        scheme: Scheme,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("index_ER", torch.empty(experts, rows, dtype=torch.int32, device=device))
        self.linear = ExpertLinear(experts, in_features, rows, scheme, dtype=dtype, device=device)

    def forward(self, y_SN: Tensor, x_MK: Tensor, expert_S: Tensor) -> Tensor:
        """y with what its rows lack added. expert_S: whose each row of y is; x has as many rows, or one for S / M of them."""
        routes = self.linear.routes(expert_S)
        rows_SR = self.linear(self.linear.spread(x_MK, routes), expert_S, routes)
        more_SR = self.linear.add(rows_SR, rows_SR.new_ones(len(expert_S), 1), routes)  # in y's order again
        # Nobody's expert adds zeros, to whichever rows.
        index_SR = self.index_ER[expert_S.clamp(max=len(self.index_ER) - 1)].long()
        return y_SN.scatter_add(1, index_SR, more_SR)

    def put(self, dense_ENK: Tensor) -> Tensor:
        """The dense weights with it added."""
        more_ERK = self.linear.dequantize(dense_ENK.dtype)
        return dense_ENK.scatter_add(1, self.index_ER.long()[:, :, None].expand_as(more_ERK), more_ERK)


def stacked(of_expert: Callable[[int], dict[str, Tensor]], experts: int) -> dict[str, Tensor]:
    """The tensors of every expert, stacked; those of one expert at a time are in memory beside the result."""
    whole: dict[str, Tensor] = {}
    for e in range(experts):
        for name, tensor in of_expert(e).items():
            if e == 0:
                whole[name] = tensor.new_empty(experts, *tensor.shape)
            whole[name][e] = tensor
    return whole


class PackedExperts(nn.Module):
    """What an experts module of transformers becomes: its own class with this `forward` in front, see `packed_class`."""

    num_experts: int
    gate_act: str | None

    @inference_only
    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """[..., H] -> [..., H].

        Args:
            hidden_states: the tokens.
            routing, named: experts of each token, int [M, k], and their weights [M, k], in the order and by the names that
                the model's own code uses. Experts numbered E or more are nobody: they add nothing.

        Raises:
            RunFailed: a routing of another shape.
        """
        index, weight = (*routing, *named.values())
        if index.is_floating_point() or index.shape != weight.shape:
            raise RunFailed(
                f"{type(self).__name__} was called with {index.dtype} {list(index.shape)} and {list(weight.shape)}, where"
                " packed experts want the experts and weights of each token; please report this model"
            )
        x_MH = hidden_states.reshape(-1, hidden_states.shape[-1])
        return packed_forward(self, x_MH, index, weight).reshape(hidden_states.shape)


def packed_forward(module: Any, x_MH: Tensor, index_Mk: Tensor, weight_Mk: Tensor) -> Tensor:
    """The equations at the head of this file, with the weights and the activation of `module`."""
    gated = module.has_gate
    up, down = getattr(module, UP[gated]), module.down_proj
    expert_S = index_Mk.reshape(-1).long()
    routes = up.routes(expert_S)
    u_SI = up(up.spread(x_MH, routes), expert_S, routes, getattr(module, f"{UP[gated]}_bias", None))
    h_SI = gate(module, u_SI) if gated else module.act_fn(u_SI)
    y_MH: Tensor = down.add(down(h_SI, expert_S, routes, getattr(module, "down_proj_bias", None)), weight_Mk, routes)
    return y_MH


def gate(module: Any, u_SI: Tensor) -> Tensor:
    """What `module` makes of its gate and up halves [S, 2 I]: one kernel where that is all that it does. A compiler makes its
    own, from the module's code."""
    if module.gate_act is None or not u_SI.is_cuda or torch.compiler.is_compiling() or ops.missing(u_SI.device) is not None:
        h_SI: Tensor = module._apply_gate(u_SI)
    else:
        g, u = u_SI.chunk(2, -1)
        h_SI = torch.ops.aerogel.gate.default(g, u, module.gate_act)
    return h_SI


def gate_act(module: Any) -> str | None:
    """Which of `ops.gate`'s activations the module's gate is, found out with a few numbers; None for any other gate."""
    if not module.has_gate or type(module)._apply_gate.__module__ != PLAIN_GATE:
        return None
    g, u = torch.linspace(-6, 6, 64, device="cpu").reshape(2, 32).chunk(2, -1)
    h = module._apply_gate(torch.cat([g, u], -1))
    return next((act for act in ACTIVATIONS if torch.allclose(h, ops.gate(g, u, act), rtol=1e-6, atol=1e-6)), None)


PLAIN_GATE = "transformers.integrations.moe"
"""Where act(g) * u is defined that modules of experts have unless they bring a gate of their own."""
UP = {True: "gate_up_proj", False: "up_proj"}
"""The name of the first product's weight, by whether it holds a gate."""


def packed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with `PackedExperts.forward`. Its name stays, and instances are still instances of `cls`."""
    return type(cls.__name__, (PackedExperts, cls), {"__module__": cls.__module__})


def replace_experts(module: nn.Module, name: str, weight: ExpertLinear | ExpertLinears) -> None:
    """Puts `weight` in the place of the parameter `name` of an experts module.

    Raises:
        BadInput: the module has no such parameter.
    """
    if module._parameters.pop(name, None) is None:
        raise BadInput(f"{type(module).__name__} has no parameter {name}; the checkpoint belongs to another model")
    module.add_module(name, weight)
    if not isinstance(module, PackedExperts):
        module.__class__ = packed_class(type(module))
        vars(module)["gate_act"] = gate_act(module)
    # Some models initialise experts by the names of their parameters; transformers leaves alone what says it is initialised.
    module._is_hf_initialized = True  # type: ignore[assignment]


def unpack_experts(module: Any, dtype: torch.dtype | None = None) -> None:
    """The inverse of `replace_experts` for all of a module: its own class with dense parameters."""
    for name, weight in list(module.named_children()):
        if isinstance(weight, ExpertLinear | ExpertLinears):
            dense = weight.dequantize(dtype)
            del module._modules[name]
            turned = dense.transpose(1, 2).contiguous() if module.is_transposed else dense
            module.register_parameter(name, nn.Parameter(turned, requires_grad=False))
    module.__class__ = type(module).__mro__[2]
