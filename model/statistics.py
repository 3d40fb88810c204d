"""What calibration learns about the inputs of a block's linears, wave by wave.

`BlockStatistics` runs the batches through one block as often as its waves need. A pass for wave w stops as soon as the
last input of that wave was seen, and outputs that can no longer change (linears already compressed, sub-modules whose
linears all are) are remembered between passes, so that the passes of all waves together cost little more than one.

Linears that multiply the very same tensor share one sum. Each expert of a mixture has its own; experts that the router
sends too few tokens are shown all of them (`top_up`), and what every expert saw is counted for the report.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.errors import RunFailed
from aerogel.model.capture import Accumulator
from aerogel.model.layer import Stats
from aerogel.model.runner import Activations, Runner
from aerogel.model.tape import ATTENTION, Finished, Slot, Tape, Weights, trace
from aerogel.model.trim import trim

REMEMBERED_BYTES = 256 * 1024 * 1024
SUMS_BYTES = 1024 * 1024 * 1024


@dataclass
class Memory:
    """Outputs of one batch that will not change any more, up to a budget shared by all batches."""

    outputs: dict[tuple[str, int], Any] = field(default_factory=dict)


class Budget:
    """Bytes left for remembered outputs."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, value: Tensor) -> bool:
        """Whether `value` still fits; it is counted if so."""
        if value.nbytes > self.left:
            return False
        self.left -= value.nbytes
        return True


class BlockStatistics:
    """The passes of the calibration batches through one block.

    Args:
        runner, index, block: the block, its weights in memory.
        names: parameters of the block that will be compressed.
        hidden: what enters the block, batch by batch; `sizes` the batch sizes.
        hidden_dense: the same for the uncompressed model, where some stage asks for the cross moment.
        top_up: whether starved experts are shown all tokens.
        min_expert_tokens: how few are too few.
    """

    def __init__(
        self,
        runner: Runner,
        index: int,
        block: nn.Module,
        names: Iterable[str],
        hidden: Activations,
        batches: int,
        *,
        hidden_dense: Activations | None = None,
        top_up: bool = True,
        min_expert_tokens: int = 1,
    ) -> None:
        self.runner, self.index, self.block, self.batches = runner, index, block, batches
        self.hidden, self.hidden_dense = hidden, hidden_dense
        self.top_up, self.min_expert_tokens = top_up, min_expert_tokens
        self.prefix = runner.structure.block_names[index] + "."
        self.names = list(names)
        self.final: set[str] = set()
        self.remembered = [Memory() for _ in range(batches)]
        self.budget = Budget(REMEMBERED_BYTES)
        self.expert_tokens: dict[str, Counter[int]] = {}
        self.expert_seen: dict[str, Counter[int]] = {}
        # The twin keeps the dense weights: it shares their memory until the block's own are replaced.
        self.twin = copy.deepcopy(block, {id(p): p for p in block.parameters()}) if hidden_dense is not None else None
        self.trace, self.first_output = trace(self._weights(block), lambda: runner.run(index, block, hidden[0]))

    def _weights(self, module: nn.Module) -> Weights:
        return Weights({name: module.get_parameter(name.removeprefix(self.prefix)) for name in self.names})

    def waves(self) -> list[list[str]]:
        """Parameters by wave: those in a later one depend on outputs of an earlier one.

        Raises:
            RunFailed: a parameter is not used at all when the block runs.
        """
        unseen = [name for name in self.names if name not in self.trace.waves]
        if unseen:
            raise RunFailed(
                f"calibration never reaches {unseen[0]} ({len(unseen)} such weights in this block); add it to the stage's"
                " ignore, or use a method without data for it"
            )
        order: dict[int, list[str]] = {}
        for name in self.names:
            order.setdefault(self.trace.waves[name], []).append(name)
        return [order[depth] for depth in sorted(order)]

    def leader(self, name: str) -> str:
        """The parameter whose input sum stands for that of `name` too."""
        return self.trace.shared[name]

    def portions(self, slots: list[Slot], width: Callable[[str], int], cross: bool) -> Iterator[list[Slot]]:
        """`slots` cut so that the sums of one portion stay within `SUMS_BYTES`; equal inputs stay together."""
        by_leader: dict[Slot, list[Slot]] = {}
        for name, expert in slots:
            by_leader.setdefault((self.leader(name), expert), []).append((name, expert))
        portion: list[Slot] = []
        held = 0
        for (name, _), members in by_leader.items():
            need = 4 * width(name) ** 2 * (2 if cross else 1)
            if portion and held + need > SUMS_BYTES:
                yield portion
                portion, held = [], 0
            portion += members
            held += need
        if portion:
            yield portion

    def collect(self, slots: list[Slot], width: Callable[[str], int], *, cross: bool) -> dict[Slot, Stats]:
        """Statistics of the inputs of `slots`, one pass over all batches (two where experts are topped up).

        Raises:
            RunFailed: an expert saw fewer tokens than asked for, or too many tokens are not finite.
        """
        leaders = {(self.leader(name), expert) for name, expert in slots}
        # Routing differs between the two streams, so an expert's tokens have no partners: it gets no cross moment.
        sums = {
            s: Accumulator(width(s[0]), cross=cross and s[1] is None, device=self.runner.device)
            for s in sorted(leaders, key=str)
        }
        for batch in range(self.batches):
            dense: dict[Slot, Tensor] = {}
            paired = {slot for slot in leaders if slot[1] is None}
            if cross and paired and self.twin is not None and self.hidden_dense is not None:
                self._pass(self.twin, self.hidden_dense[batch], dense.__setitem__, paired, None)

            def add(slot: Slot, x: Tensor, dense: dict[Slot, Tensor] = dense) -> None:
                if slot in sums:
                    sums[slot].add(x, dense.get(slot))

            self._pass(self.block, self.hidden[batch], add, leaders, self.remembered[batch])
        self._count_experts(sums)
        found = {slot: total.stats(slot[0]) for slot, total in sums.items()}
        trim()
        return found

    def _pass(
        self,
        block: nn.Module,
        hidden: Tensor,
        collect: Callable[[Slot, Tensor], None],
        leaders: set[Slot],
        memory: Memory | None,
    ) -> None:
        wanted = frozenset(name for name, _ in leaders)
        experts = any(expert is not None for _, expert in leaders)
        tape = Tape(
            self._weights(block),
            collect,
            wanted,
            stop_after=frozenset() if experts else wanted,
            remember=self._remember(memory) if memory is not None else None,
        )
        with contextlib.suppress(Finished), self._remembering(block, memory), tape:
            self.runner.run(self.index, block, hidden)

    def _remember(self, memory: Memory) -> Callable[[str, int, Callable[[], Tensor]], Tensor]:
        def answer(name: str, use: int, compute: Callable[[], Tensor]) -> Tensor:
            # An expert's n-th use says nothing about which expert it is; only plain linears are remembered.
            if not self._is_final(name, use) or name in self.expert_tokens:
                return compute()
            held: Tensor | None = memory.outputs.get((name, use))
            if held is None:
                held = compute()
                if self.budget.take(held):
                    memory.outputs[name, use] = held
            return held

        return answer

    def _is_final(self, name: str, use: int) -> bool:
        """Whether a product, or the n-th attention, depends on nothing that is still to be compressed."""
        if name != ATTENTION:
            return name in self.final
        waves = self.trace.waves
        depth = self.trace.attention[use] if use < len(self.trace.attention) else len(waves)
        return all(n in self.final for n in self.names if waves[n] < depth)

    @contextlib.contextmanager
    def _remembering(self, block: nn.Module, memory: Memory | None) -> Iterator[None]:
        """Direct children of the block whose linears are all final run once per batch and are remembered."""
        patched = []
        if memory is not None:
            for path, child in block.named_children():
                inside = [n for n in self.names if n.startswith(f"{self.prefix}{path}.")]
                if len(inside) > 1 and self.final.issuperset(inside):
                    child.forward = self._once(path, child.forward, inside, memory)
                    patched.append(child)
        try:
            yield
        finally:
            for child in patched:
                del child.forward

    def _once(self, path: str, forward: Callable[..., Any], inside: list[str], memory: Memory) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            key = (path, -1)
            if key not in memory.outputs:
                result = forward(*args, **kwargs)
                tensors = result if isinstance(result, tuple) else (result,)
                kept = [t for t in tensors if isinstance(t, Tensor)]
                if not all(self.budget.take(t) for t in kept):
                    return result
                # With the child's own result at hand, nothing inside it is asked for again.
                for used in [k for k in memory.outputs if k[0] in inside or k[0] == ATTENTION]:
                    self.budget.left += memory.outputs.pop(used).nbytes
                memory.outputs[key] = (result, [t._version for t in kept], kept)
            result, versions, kept = memory.outputs[key]
            if [t._version for t in kept] != versions:
                raise RunFailed(
                    f"{self.prefix}{path} had its output changed in place; this architecture needs a fix in aerogel"
                )
            return result

        return run

    def _count_experts(self, sums: Mapping[Slot, Accumulator]) -> None:
        starved: dict[str, list[int]] = {}
        for (name, expert), total in sums.items():
            if expert is not None:
                self.expert_tokens.setdefault(name, Counter())[expert] = total.tokens
                if total.tokens < self.min_expert_tokens:
                    starved.setdefault(name, []).append(expert)
        if starved and self.top_up:
            self._top_up(starved, sums)
        for (name, expert), total in sums.items():
            if expert is not None:
                self.expert_seen.setdefault(name, Counter())[expert] = total.tokens
        for name, experts in starved.items():
            short = [e for e in experts if sums[name, e].tokens < self.min_expert_tokens]
            if short:
                raise RunFailed(
                    f"expert {short[0]} of {name} saw {sums[name, short[0]].tokens} calibration tokens, fewer than"
                    f" calibration.min_expert_tokens={self.min_expert_tokens} ({len(short)} such experts); raise"
                    " calibration.samples, or set calibration.experts: top_up"
                )

    def expert_rows(self) -> list[dict[str, Any]]:
        """For each stack of experts the tokens that the router sent, and those that calibration saw after topping up."""
        return [
            {
                "module": name,
                "tokens": [routed[e] for e in sorted(routed)],
                "seen": [self.expert_seen[name][e] for e in sorted(routed)],
            }
            for name, routed in self.expert_tokens.items()
        ]

    def _top_up(self, starved: Mapping[str, list[int]], sums: Mapping[Slot, Accumulator]) -> None:
        """Shows all tokens to the experts in `starved`, whatever the router says; their outputs are thrown away."""
        for name, experts in starved.items():
            module = self.block.get_submodule(name.removeprefix(self.prefix).rpartition(".")[0])
            for expert in experts:
                sums[name, expert].tokens = 0
                sums[name, expert].second_KK.zero_()
                sums[name, expert].peak_K.zero_()
            plain = module.forward

            def forward(*args: Any, plain: Any = plain, name: str = name, experts: Any = experts, **kwargs: Any) -> Any:
                for expert in experts:

                    def add(slot: Slot, x: Tensor, only: Slot = (name, expert)) -> None:
                        if slot == only:
                            sums[slot].add(x)

                    shown = Tape(self._weights(self.block), add, frozenset({name}))
                    new_args, new_kwargs = _routed_to(expert, args, kwargs)
                    with shown:
                        plain(*new_args, **new_kwargs)
                return plain(*args, **kwargs)

            module.forward = forward
            try:
                for batch in range(self.batches):
                    self.runner.run(self.index, self.block, self.hidden[batch])
            finally:
                del module.forward

    def output(self, batch: int) -> Tensor:
        """What leaves the block for one batch as it now stands; what is remembered of that batch is let go."""
        tape = Tape(
            self._weights(self.block), lambda slot, x: None, frozenset(), remember=self._remember(self.remembered[batch])
        )
        with self._remembering(self.block, self.remembered[batch]), tape:
            result = self.runner.run(self.index, self.block, self.hidden[batch])
        self.remembered[batch] = Memory()
        return result

    def advance(self, into: Activations, first: Tensor) -> None:
        """Runs the finished block over all batches but the first, whose output is `first`, and keeps what leaves it."""
        into[0] = first
        for batch in range(1, self.batches):
            into[batch] = self.output(batch)


def _routed_to(expert: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of an experts module changed so that every token goes to `expert`, once.

    The routing is recognised by its type: an integer tensor [T, k] of expert numbers, and weights of the same shape.
    """
    index = next(a for a in [*args, *kwargs.values()] if isinstance(a, Tensor) and not a.is_floating_point())

    def changed(argument: Any) -> Any:
        if not isinstance(argument, Tensor) or argument.shape != index.shape:
            return argument
        return argument[:, :1] if argument.is_floating_point() else torch.full_like(argument[:, :1], expert)

    return [changed(a) for a in args], {key: changed(a) for key, a in kwargs.items()}
