"""What stands beside a packed weight, added to its product, by torch's own operators: the definition, on any device.

    out_MN = y_MN + x_MK S^T + x_MK[:, index_C] kept_NC^T        S [N, K] sparse, by rows; sums in float32

The sparse product is the library's (MKL on a CPU, cuSPARSE on CUDA) and reads 8 bytes per outlier.

Shape legend: M tokens, N out features, K in features, C kept columns, E outliers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

with warnings.catch_warnings():
    # torch says once per process that CSR tensors are in beta, and some versions that nothing checks them: here, where nobody
    # can act on it. Models are built with meta as the default device.
    warnings.simplefilter("ignore", UserWarning)
    _one = torch.zeros(1, 1, device="cpu").to_sparse_csr()
    _parts = _one.crow_indices(), _one.col_indices(), _one.values()
    torch.sparse_csr_tensor(*_parts, (1, 1), device="cpu", check_invariants=False)


NAMES = ("beside_start", "beside_column", "beside_value", "beside_index", "beside_kept")
"""Under which these tensors go to a kernel that adds them itself, in the order of the fields."""
TILES = "beside_tiles"
"""The same for what was made of them."""


@dataclass(frozen=True, slots=True)
class Beside:
    """The tensors, as they are stored; see `aerogel.quantize.outliers` and `columns`. None where a kind is missing.

    start_N1 int32 [N + 1], column_E int16 or int32 [E], value_E [E] of 16 bits; index_C int32 [C], kept_NC [N, C] of 16 bits or
    of x's type. Columns and indices lie below K: nothing checks them again.

    tiles: uint8, the outliers once more as the CPU's kernels take few tokens to them (`beside.cpu.tiles_of`); None is
    always right.
    """

    start_N1: Tensor | None = None
    column_E: Tensor | None = None
    value_E: Tensor | None = None
    index_C: Tensor | None = None
    kept_NC: Tensor | None = None
    tiles: Tensor | None = None

    def all(self) -> tuple[Tensor | None, ...]:
        """What is stored, in order."""
        return self.start_N1, self.column_E, self.value_E, self.index_C, self.kept_NC

    @property
    def device(self) -> torch.device:
        """Where the tensors are. There must be some."""
        return next(tensor.device for tensor in self.all() if tensor is not None)

    def operands(self) -> dict[str, Tensor]:
        """What is there, by the names of `NAMES` and `TILES`."""
        named = zip((*NAMES, TILES), (*self.all(), self.tiles), strict=True)
        return {name: tensor for name, tensor in named if tensor is not None}

    @staticmethod
    def among(tensors: Mapping[str, Tensor]) -> Beside | None:
        """The inverse of `operands`, among other tensors; None where there is nothing."""
        found = [tensors.get(name) for name in (*NAMES, TILES)]
        return None if found[0] is None and found[3] is None else Beside(*found)


def add(y_MN: Tensor, x_MK: Tensor, beside: Beside) -> Tensor:
    """The sum, in y's dtype, a new tensor. Each kind is rounded to that dtype once."""
    if beside.index_C is not None and beside.kept_NC is not None:
        y_MN = torch.addmm(y_MN, x_MK[:, beside.index_C.long()], beside.kept_NC.to(x_MK.dtype).T)
    if beside.start_N1 is None or beside.column_E is None or beside.value_E is None:
        return y_MN
    size = (y_MN.shape[1], x_MK.shape[1])
    sparse_NK = torch.sparse_csr_tensor(
        beside.start_N1, beside.column_E.int(), beside.value_E.float(), size, check_invariants=False
    )
    one = len(x_MK) == 1
    return (y_MN + (sparse_NK @ x_MK[0].float() if one else (sparse_NK @ x_MK.float().T).T)).to(y_MN.dtype)
