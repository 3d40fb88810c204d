"""What a kernel is asked to do, and what a kernel is.

A kernel multiplies activations with one packed weight, `y_MN = x_MK @ W_NK.T`. It runs on one layout of the weight: either
the tensors as they are stored, or its own, which `pack` makes from the codes once, when a model is loaded. It refuses
what it cannot do, with a reason a person can read, and never fails later for something it could have refused.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm.small_floats import mantissa_bits
from aerogel.pack.config import format_of
from aerogel.pack.format import Activations, Format, Grid, Shapes
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.formats.complex import Complex
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid
from aerogel.quantize.planes import PlaneGrid
from aerogel.quantize.tables import TableGrid

if TYPE_CHECKING:
    from aerogel.kernels.cuda.sources import Wanted

NUMBERS: dict[type, str] = {
    IntGrid: "integers",
    Affine: "integers with floating zero points",
    Fp8Grid: "e4m3 floats",
    TableGrid: "codes into tables",
    PlaneGrid: "bit planes",
    Complex: "complex codes",
}
"""What a refusal calls the numbers of a grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One matmul with a packed weight.

    format: a key of `aerogel.pack.FORMATS`.
    grid: the weight's numbers: bits, group_size, symmetric, scale_dtype.
    N, K: the weight's shape. M: tokens, or None for "any number", which is what a layer must be ready for.
    dtype: of the activations and the result. device: "cpu", "cuda", ...
    activations: how the input is rounded at run time.
    fast: whether a kernel may round the input to int8 although the checkpoint does not say so.
    outliers: whether sparse outliers stand beside the weight; a kernel is chosen without asking, `tune` measures with them.
    mantissa: bits of mantissa of the small float that holds the codes (`gemm/small_floats.py`); 0 where numbers are looked up.
    It follows from the grid, and is found here because a graph that is being compiled cannot look for it.
    """

    format: str
    grid: Grid
    N: int
    K: int
    M: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    activations: Activations = "none"
    fast: bool = False
    outliers: bool = False
    mantissa: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mantissa", mantissa_bits(self.grid))

    @property
    def integer(self) -> IntGrid | None:
        """The grid when it is an integer one."""
        return self.grid if isinstance(self.grid, IntGrid) else None

    @property
    def stored(self) -> type[Format]:
        """The format's class."""
        return format_of(self.format)

    # What many kernels need of a problem: each the reason why it is refused (what is needed, what was found, how to have it
    # otherwise; the kernel is the subject), or None.

    def needs_device(self, *devices: str) -> str | None:
        """Refuses all other device types."""
        if self.device in devices:
            return None
        return f"needs device {_either(devices)}, found {self.device}; load the model with --device {devices[0]}"

    def needs_dtype(self, *dtypes: torch.dtype) -> str | None:
        """Refuses activations of all other types."""
        if self.dtype in dtypes:
            return None
        found, *names = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, *dtypes))
        return f"needs activations in {_either(names)}, found {found}; load the model with dtype=torch.{names[0]}"

    def needs_activations(self, *roundings: Activations) -> str | None:
        """Refuses all other ways to round the input."""
        if self.activations in roundings:
            return None
        return f"needs activations: {_either(roundings)}, found {self.activations}; the recipe's quantize stage sets it"

    def needs_numbers(self, *grids: type) -> str | None:
        """Refuses all other kinds of numbers; `grids` are keys of `NUMBERS`."""
        if isinstance(self.grid, grids):
            return None
        found = next((name for kind, name in NUMBERS.items() if isinstance(self.grid, kind)), type(self.grid).__name__)
        return f"needs {_either([NUMBERS[kind] for kind in grids])}, found {found}; the recipe's quantize stage chooses them"

    def needs_groups(self, step: int) -> str | None:
        """Refuses groups along K that are no multiple of `step`. A scale per output is no group."""
        size = self.grid.group_size
        if size is None or size % step == 0:
            return None
        return f"needs group_size null or a multiple of {step}, found {size}; the recipe's quantize stage sets it"

    def needs_multiples(self, n: int, k: int) -> str | None:
        """Refuses weights that a kernel which does not pad cannot take."""
        if self.N % n == 0 and self.K % k == 0:
            return None
        return f"needs N a multiple of {n} and K of {k}, found {self.N} and {self.K}; kernels with a layout pad them"


def _either(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


Layout = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What `Kernel.tune` found: a line per number of tokens (text for people), and the file that keeps it."""

    found: Mapping[int, str]
    kept: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Weights whose layouts can be put one behind the other, along the first axis of every tensor.

    rows: what each but the last must have a multiple of. shared: tensors that are the same for all and do not grow.
    """

    rows: int
    shared: frozenset[str] = frozenset()


class Kernel(ABC):
    """One way to run a `Problem`. Never instantiated: all methods are static, all state is in the layout's tensors."""

    about: ClassVar[str]
    """One line for `aerogel list kernels`."""
    layout: ClassVar[str | None] = None
    """The name under which checkpoints keep its layout, a key of `kernels.layouts.LAYOUTS`; None where they do not."""
    rows: ClassVar[int] = 0
    """Output rows per step of the first axis of the layout's tensors, so that weights can be cut and stacked there; 0 where
    the layout has no such axis."""
    adds_beside: ClassVar[bool] = False
    """Whether `run` adds what stands beside the weight itself, as it is stored (`kernels.beside.ref.NAMES`)."""
    shared: ClassVar[frozenset[str]] = frozenset()
    """Tensors of the layout that do not grow with N."""
    traceable: ClassVar[bool] = True
    """Whether a graph that is being compiled can hold what `run` does; else a layer calls it as one operator (`graphs`)."""

    @staticmethod
    @abstractmethod
    def refuses(problem: Problem) -> str | None:
        """Why this kernel cannot run the problem, or None. Never raises; may look at the machine."""

    @classmethod
    def runs_stored(cls, problem: Problem) -> bool:
        """True when the layout is what the format stores, so that loading costs no work: where `pack` is the default."""
        return cls.pack is Kernel.pack

    @classmethod
    def refuses_layout(cls, problem: Problem) -> str | None:
        """Why the problem's weight cannot lie in this layout, whatever machine this is; None when it can."""
        return f"{cls.__name__} has no layout of its own"

    @staticmethod
    def shapes(problem: Problem) -> Shapes:
        """What `pack` gives, as shapes and dtypes. By default what the format stores."""
        return problem.stored.shapes(problem.N, problem.K, problem.grid)

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """The layout's tensors, made from codes [N, K]. By default what the format stores."""
        return problem.stored.encode(codes)

    @classmethod
    def pieces(cls, problem: Problem) -> Pieces | None:
        """How a weight's layout can be made of those of its rows; None where it is packed as a whole only."""
        in_rows = cls.rows > 0 and isinstance(problem.grid, IntGrid | Affine | Fp8Grid)  # the tensors of others have other axes
        return Pieces(rows=cls.rows, shared=cls.shared) if in_rows else None

    @staticmethod
    def rearrange(stored: Layout, problem: Problem) -> dict[str, Tensor] | None:
        """What `pack` makes of the codes in a file's tensors, made without decoding them; None where it cannot, the default."""
        return None

    @staticmethod
    def lay_beside(beside: Beside, layout: Layout, problem: Problem, place_K: Tensor | None = None) -> dict[str, Tensor] | None:
        """What stands beside the weight as `run` takes it together with the layout, made once; None where it does not add
        it, the default. place_K: which of the kernel's columns each input is; None for its own."""
        return None

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The inverse of `pack`, exactly."""
        return problem.stored.to_codes(layout, problem.grid)

    @staticmethod
    def wanted(weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int], device: torch.device) -> list[Wanted]:
        """What is compiled to run these weights on `device` with so many tokens, what takes longest first. Only shapes and
        dtypes of the layouts count: they may be on the meta device. By default nothing is compiled."""
        return []

    @staticmethod
    def tune(problem: Problem, tokens: Sequence[int]) -> Tuned | None:
        """Measures on this machine which configuration is fastest for the problem at each number of tokens, and keeps it
        where `run` looks. None where there is nothing to choose, the default."""
        return None

    @staticmethod
    @abstractmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """x @ W.T (+ bias): [M, N] in x's dtype. M may be 0. `x_MK` is contiguous and of `problem.dtype`."""
