"""An embedding without a table of its own: it looks up rows of the packed output head that it is tied to.

    y = (q[ids] - z[ids]) * s[ids]

In a small model the table is a fifth of all weights, and read in full by the head at every token; packed once for both, a
model of 135 million parameters loses a quarter of its bytes. A CPU's compiled code decodes the wanted rows where they lie.
Elsewhere rows cannot be cut out of the kernel's layout, and the dense table is made when it is first needed.

Shape legend: N tokens of the vocabulary, K features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aerogel.kernels.gemm.cpu import Native, weight_of
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library


class PackedEmbedding(nn.Module):
    """`y = W[ids]` with W [N, K] the weight of a packed linear, which stays the owner of its tensors.

    Args:
        head: the linear.
    """

    def __init__(self, head: Linear) -> None:
        super().__init__()
        # In a list, because a module set as an attribute would be registered as a child, and its tensors twice.
        self._head = [head]
        self._dense: Tensor | None = None

    @property
    def head(self) -> Linear:
        """The linear whose rows are looked up."""
        return self._head[0]

    @property
    def num_embeddings(self) -> int:
        """N."""
        return self.head.out_features

    @property
    def embedding_dim(self) -> int:
        """K."""
        return self.head.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., K] in the head's activations' dtype. Raises BadInput for an id that is no row."""
        if self.head._problem is None:
            self.head.prepare()
        weight = self.weight()
        if weight is None:
            return nn.functional.embedding(ids, self.dense())
        ids = ids.contiguous()
        y = torch.empty(*ids.shape, self.embedding_dim, dtype=self.head.compute_dtype)
        status = library.library().aerogel_native_rows(ctypes.byref(weight), ctypes.byref(wanted(ids, y)))
        library.check(status, f"an embedding of {self.num_embeddings} tokens")
        return y

    def weight(self) -> library.Weight | None:
        """The struct of the head's weight where compiled code can read its rows."""
        head = self.head
        if (
            not head.kernel_is_all
            or not issubclass(head._kernel, Native)
            or head.column_order is not None
            or head.device.type != "cpu"
        ):
            return None
        layout, group = head.held(), head.scheme.grid.group_size or 0
        return weight_of(layout["codes"], layout["scale"], layout.get("zero"), head.out_features, head.in_features, group)

    def dense(self) -> Tensor:
        """The table [N, K], made at the first call and again where the head has moved or changed its type."""
        head = self.head
        if self._dense is None or (self._dense.device, self._dense.dtype) != (head.device, head.compute_dtype):
            self._dense = head.dequantize()
        return self._dense

    def straight(self) -> Callable[[Tensor], Tensor]:
        """`forward` as a function that knows its module, for a traced step."""

        def look_up(ids: Tensor) -> Tensor:
            return PackedEmbedding.forward(self, ids)  # its own, whatever stands in its place while a step is traced

        look_up.module = self  # type: ignore[attr-defined]
        return look_up

    def extra_repr(self) -> str:
        """Shape."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rows of the packed head"


def wanted(ids: Tensor, y: Tensor) -> library.Rows:
    """The struct of one look-up of contiguous int64 ids into y [..., K]: valid while both live."""
    return library.Rows(ids.data_ptr(), y.data_ptr(), ids.numel(), y.nbytes, library.TYPES[y.dtype])
