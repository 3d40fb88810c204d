"""Runs a model on the meta device one block at a time.

`prologue` loads what lies before the blocks, lets each batch run into the first block, and keeps what arrives there:
hidden states, and the other arguments (rotary embeddings, masks) that the model hands to every block. After that a block
is a function from hidden states to hidden states, and only its own weights need to be in memory.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aerogel.errors import BadInput
from aerogel.model.naming import materialise, place, release
from aerogel.model.structure import Structure
from aerogel.model.tape import Finished
from aerogel.model.trim import trim


class Activations:
    """Hidden states of each batch between two blocks, in memory or on disk."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="activations-", dir=folder)) if folder is not None else None
        self.held: dict[int, Tensor] = {}

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        if self.folder is None:
            self.held[batch] = hidden
        else:
            save_file({"hidden": hidden.contiguous()}, self.folder / f"{batch}.safetensors")

    def __getitem__(self, batch: int) -> Tensor:
        if self.folder is None:
            return self.held[batch]
        return load_file(self.folder / f"{batch}.safetensors")["hidden"]

    def close(self) -> None:
        """Frees memory and deletes what was spilled."""
        self.held.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder)


class _Stub(nn.Module):
    """Stands in for a block: notes its arguments and passes the hidden states on in the shape the model expects."""

    def __init__(self, note: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor], as_tuple: bool) -> None:
        super().__init__()
        self.note, self.as_tuple = note, as_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = split_hidden(args, kwargs)
        result = self.note(hidden, args, kwargs)
        return (result,) if self.as_tuple else result


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with the hidden states taken out."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


class Runner:
    """The blocks of a structure as functions of hidden states.

    Args:
        structure: the model on the meta device.
        fetch: returns a checkpoint tensor by name, on the compute device.
        dtype: the floating-point type to compute in.
    """

    def __init__(self, structure: Structure, fetch: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.structure, self.fetch, self.dtype, self.device = structure, fetch, dtype, device
        self.model = structure.model
        path, _, _ = structure.block_names[0].rpartition(".")
        self.blocks: nn.ModuleList = self.model.get_submodule(path)  # type: ignore[assignment]
        self.arguments: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.as_tuple = False

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its weights in memory."""
        materialise(self.model, self.structure.block_groups(index), self.fetch, self.dtype)
        return self.blocks[index]

    def release_block(self, index: int) -> None:
        """Frees the weights of block `index`."""
        release(self.model, self.structure.block_groups(index))
        trim()

    def _outside(self, ids: Tensor, stubs: list[_Stub]) -> Any:
        """The model's own forward with every block replaced by a stub. Gradients flow where they are switched on."""
        real = list(self.blocks)
        try:
            for i, stub in enumerate(stubs):
                self.blocks[i] = stub
            return self.model(input_ids=ids.to(self.device), use_cache=False)
        except Finished:
            return None
        finally:
            for i, block in enumerate(real):
                self.blocks[i] = block

    def _non_head_groups(self) -> list[Any]:
        head = self.structure.head
        names = {name for name, module in self.model.named_modules() if module is head}
        tied = set(self.structure.tied.values())
        return [
            g
            for g in self.structure.outer_groups
            if not any(out.rpartition(".")[0] in names and out not in tied for out in g.outputs)
        ]

    def prologue(self, batches: Iterable[Tensor], activations: Activations, *, probe: bool = True) -> None:
        """Fills `activations` with what enters block 0, and notes the arguments of every block per batch size.

        Raises:
            BadInput: the blocks get arguments that depend on the text; such a model cannot be walked block by block.
        """
        groups = self._non_head_groups()
        materialise(self.model, groups, self.fetch, self.dtype)
        for number, ids in enumerate(batches):
            if number == 0 and probe:
                self.as_tuple = self._returns_tuple(ids[:1])
            self._record(number, ids, activations)
        release(self.model, groups)

    def _returns_tuple(self, ids: Tensor) -> bool:
        """Whether blocks return a tuple: block 0 is run once on one row, as it arrives."""
        found: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            found.append((hidden, args, kwargs))
            raise Finished

        with torch.no_grad():
            self._outside(ids[:, :8], [_Stub(note, False)] + [_Stub(note, False) for _ in list(self.blocks)[1:]])
        hidden, args, kwargs = found[0]
        block = self.load_block(0)
        with torch.no_grad():
            result = block(hidden, *args, **kwargs)
        self.release_block(0)
        return isinstance(result, tuple)

    def _record(self, number: int, ids: Tensor, activations: Activations) -> None:
        last = len(self.blocks) - 1

        def stub(index: int) -> _Stub:
            def note(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
                if index == 0:
                    activations[number] = hidden
                before = self.arguments.setdefault((index, len(ids)), (args, kwargs))
                if not _same(before, (args, kwargs)):
                    raise BadInput(
                        f"the blocks of a {self.structure.config.model_type} model take arguments that change with the text;"
                        " aerogel cannot compress such a model one block at a time yet"
                    )
                if index == last:
                    raise Finished
                return hidden

            return _Stub(note, self.as_tuple)

        with torch.no_grad():
            self._outside(ids, [stub(i) for i in range(last + 1)])

    def run(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states behind `block`, which is block `index` or a copy of it, for hidden states [B, L, H]."""
        args, kwargs = self.arguments[index, len(hidden)]
        with torch.no_grad():
            result = block(hidden, *args, **kwargs)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def _behind(self, hidden: Tensor) -> Any:
        """The model's forward from behind the last block on. The ids stand for nothing: every block passes on `hidden`."""
        stubs = [_Stub(lambda h, a, k: hidden, self.as_tuple) for _ in self.blocks]
        return self._outside(torch.zeros(hidden.shape[:2], dtype=torch.int64), stubs)

    @contextlib.contextmanager
    def whole_head(self) -> Iterator[None]:
        """While open, everything outside the blocks is in memory, a tied head too, and `logits` can be asked for."""
        groups = self.structure.outer_groups
        materialise(self.model, groups, self.fetch, self.dtype)
        for tied, stored in self.structure.tied.items():
            place(self.model, tied, self.model.get_parameter(stored).data)
        try:
            yield
        finally:
            release(self.model, groups)
            for tied, stored in self.structure.tied.items():
                place(self.model, tied, self.model.get_parameter(stored).data)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits for hidden states [B, L, H] behind the last block, differentiable; see `whole_head`."""
        found: Tensor = self._behind(hidden).logits
        return found

    def epilogue(self, batch_hidden: Iterable[Tensor]) -> Iterator[Tensor]:
        """What arrives at the output head for each batch of hidden states behind the last block (final norm and all)."""
        head = self.structure.head
        if head is None:
            raise BadInput(
                f"a {self.structure.config.model_type} model has no output head; leave it out of the stage's targets"
            )
        groups = self._non_head_groups()
        materialise(self.model, groups, self.fetch, self.dtype)
        seen: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise Finished

        for hidden in batch_hidden:
            seen.clear()
            handle = head.register_forward_pre_hook(catch)
            try:
                with torch.no_grad():
                    self._behind(hidden)
            finally:
                handle.remove()
            yield seen[0]
        release(self.model, groups)


def _same(a: Any, b: Any) -> bool:
    """Whether two sets of block arguments are equal, tensors by value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or type(a) is type(b)
