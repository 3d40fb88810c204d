"""The compiled small operations of a decode step against their definitions, on every instruction-set path of this machine:
types, shared heads, windows, ragged sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.kernels.decode import native_ops, ops
from aerogel.kernels.native import library

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

TYPES = (torch.float32, torch.float16, torch.bfloat16)
CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture(params=library.PATHS, autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs every test as on machines whose best path is each of those that this one has."""
    name: str = request.param
    if name not in library.paths():
        pytest.skip(f"{name}: not built, or this machine has not its instructions")
    with library.only(name):
        yield name


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("H", "J", "D", "E"), [(1, 1, 2, 2), (9, 3, 64, 64), (4, 4, 40, 24), (8, 2, 128, 128)])
def test_attention_of_one_token(dtype: torch.dtype, H: int, J: int, D: int, E: int) -> None:
    random = torch.Generator().manual_seed(H * D)
    for batch, slots, slot, window in ((1, 8, 0, 0), (1, 300, 257, 0), (2, 64, 40, 16), (3, 64, 63, 0), (2, 900, 899, 330)):
        make = lambda *shape: torch.randn(*shape, generator=random).to(dtype)  # noqa: E731
        q, k, v = make(batch, H, 1, D), make(batch, J, 1, D), make(batch, J, 1, E)
        angles = torch.rand(batch, 1, D, generator=random) * 6
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        keys, values = make(batch, J, slots, D), make(batch, J, slots, E)
        start = torch.tensor([0, 3, 7][:batch]).clamp(max=slot)
        for turned in ((cos, sin), (None, None)):
            held = [(keys.clone(), values.clone()) for _ in range(2)]
            rest = (torch.tensor([slot]), start, D**-0.5, window, 0.0, None)
            found = native_ops.attend(q, k, v, *turned, *held[0], *rest)
            wanted = ops.attend(q, k, v, *turned, *held[1], *rest)
            assert found.shape == wanted.shape and found.dtype == dtype
            assert relative(found, wanted) < CLOSE[dtype], (batch, slot, window)
            assert relative(held[0][0], held[1][0]) < CLOSE[dtype] and torch.equal(held[0][1], held[1][1])
            # Nothing but the new slot was written.
            assert torch.equal(held[0][0][:, :, :slot], keys[:, :, :slot])
            assert torch.equal(held[0][0][:, :, slot + 1 :], keys[:, :, slot + 1 :])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_attention_of_one_token_is_the_same_with_any_number_of_threads(dtype: torch.dtype) -> None:
    B, H, J, D, slots = 2, 9, 3, 64, 1200
    q, k, v = (torch.randn(B, heads, 1, D).to(dtype) for heads in (H, J, J))
    keys, values = (torch.randn(B, J, slots, D).to(dtype) for _ in range(2))
    rest = (torch.tensor([slots - 1]), torch.tensor([0, 1000]), 0.125, 0, 0.0, None)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(native_ops.attend(q, k, v, None, None, keys, values, *rest))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_attention_of_one_token_hides_no_number_that_is_none(bad: float) -> None:
    q = torch.ones(1, 2, 1, 16)
    for key, value in ((bad, 1.0), (1.0, bad)):
        keys, values = torch.ones(1, 2, 200, 16), torch.ones(1, 2, 200, 16)
        keys[0, 0, 130] *= key
        values[0, 0, 130] *= value
        rest = (torch.tensor([199]), torch.tensor([0]), 1.0, 0, 0.0, None)
        found = native_ops.attend(q, q, q, None, None, keys, values, *rest)
        assert not torch.isfinite(found[0, 0, 0]).any() and torch.isfinite(found[0, 0, 1]).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("round_first", [False, True])
def test_norms(dtype: torch.dtype, round_first: bool) -> None:
    for shape in ((1, 1, 576), (3, 37), (2, 1, 5)):
        a, b, weight = (torch.randn(*size).to(dtype) for size in (shape, shape, shape[-1:]))
        wanted = ops.add_rms_norm(a, b, weight, 1e-5, round_first)
        found = native_ops.add_rms_norm(a, b, weight, 1e-5, round_first)
        assert torch.equal(found[0], wanted[0]) and relative(found[1], wanted[1]) < CLOSE[dtype]
        alone = native_ops.rms_norm(a, weight, 1e-5, round_first)
        assert relative(alone, ops.rms_norm(a, weight, 1e-5, round_first)) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gates(dtype: torch.dtype) -> None:
    for lead, size in (((1, 1), 1536), ((2, 3), 70), ((1,), 2100)):
        both = (torch.randn(*lead, 2 * size) * 4).to(dtype)
        g, u = both[..., :size], both[..., size:]
        for act in ("silu", "gelu"):
            found = native_ops.gate(g, u, act)
            assert found.shape == g.shape and relative(found, ops.gate(g, u, act)) < CLOSE[dtype]
    extreme = torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0]]).to(dtype)
    torch.testing.assert_close(native_ops.gate(extreme, torch.ones_like(extreme), "silu"), torch.nn.functional.silu(extreme))


def test_a_path_is_chosen_among_those_asked_for(path: str) -> None:

    assert library.best("exact") == path, "not the path that this test is for"
    with library.only("portable"):
        assert library.best("exact") == library.best("int8") == "portable"


def test_slots_out_of_range_are_refused() -> None:
    q = torch.randn(1, 2, 1, 16)
    keys, values = torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)
    for slot, start in ((8, 0), (3, 4)):
        with pytest.raises(BadInput, match="shape"):
            native_ops.attend(q, q, q, None, None, keys, values, torch.tensor([slot]), torch.tensor([start]), 1.0, 0, 0.0, None)


def test_a_rotation_of_an_odd_size_is_refused() -> None:
    q, keys = torch.randn(1, 2, 1, 15), torch.zeros(1, 2, 8, 15)
    angle = torch.zeros(1, 1, 15)
    with pytest.raises(BadInput, match="shape"):
        native_ops.attend(q, q, q, angle, angle, keys, keys.clone(), torch.tensor([3]), torch.tensor([0]), 1.0, 0, 0.0, None)


def test_shapes_that_do_not_belong_together_never_reach_the_compiled_code() -> None:
    B, H, J, L, D, E = 2, 4, 2, 16, 8, 6
    good = {
        "out": torch.empty(B, 1, H, E),
        "q": torch.zeros(B, H, 1, D),
        "k": torch.zeros(B, J, 1, D),
        "v": torch.zeros(B, J, 1, E),
        "cos": torch.zeros(B, 1, D),
        "sin": torch.zeros(B, 1, D),
        "keys": torch.zeros(B, J, L, D),
        "values": torch.zeros(B, J, L, E),
        "slot": torch.tensor([3]),
        "start": torch.zeros(B, dtype=torch.int64),
    }
    rest = {"scale": 1.0, "window": 0, "softcap": 0.0, "sinks": None}
    assert native_ops.attend_arguments(**good, **rest) is not None
    wrong = {
        "k": torch.zeros(B, J, 1, D + 1),
        "v": torch.zeros(B, J + 1, 1, E),
        "cos": torch.zeros(B, 1, D // 2),
        "sin": torch.zeros(B + 1, 1, D),
        "keys": torch.zeros(B, 1, L, D),
        "values": torch.zeros(B, J, L - 1, E),
        "slot": torch.tensor([3], dtype=torch.int32),
        "start": torch.zeros(B + 1, dtype=torch.int64),
    }
    for name, tensor in wrong.items():
        assert native_ops.attend_arguments(**{**good, name: tensor}, **rest) is None, name


def test_heads_of_several_sequences_may_lie_inside_wider_rows() -> None:
    B, H, J, D, slots = 3, 4, 2, 16, 9
    whole = torch.randn(B, 1, H + 2 * J, D).transpose(1, 2)
    q, k, v = whole[:, :H], whole[:, H : H + J], whole[:, H + J :]
    rest = (torch.tensor([5]), torch.tensor([0, 2, 5]), 0.25, 0, 0.0, None)
    held = [(torch.randn(B, J, slots, D), torch.randn(B, J, slots, D))]
    held.append((held[0][0].clone(), held[0][1].clone()))
    out = torch.empty(B, 1, H, D)
    arguments = native_ops.attend_arguments(out, q, k, v, None, None, *held[0], *rest)
    assert arguments is not None and not q.is_contiguous()
    library.check(library.library().aerogel_native_attend(ctypes.byref(arguments)), "attention")
    assert relative(out, ops.attend(q, k, v, None, None, *held[1], *rest)) < CLOSE[torch.float32]
    assert torch.equal(held[0][0], held[1][0]) and torch.equal(held[0][1], held[1][1])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "J", "T", "D", "R"), [(1, 9, 3, 40, 64, 40), (2, 4, 2, 13, 24, 5), (3, 2, 1, 1, 8, 1)])
def test_a_prompt_rotates_keeps_its_keys_and_begins_where_it_is_told(
    dtype: torch.dtype, B: int, H: int, J: int, T: int, D: int, R: int
) -> None:
    whole = torch.randn(B, T, H + 2 * J, D).to(dtype).transpose(1, 2)
    q, k, v = whole[:, :H], whole[:, H : H + J], whole[:, H + J :]
    angles = torch.rand(B, T, D) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = torch.full((B, J, T + 3, D), 7.0).to(dtype), torch.full((B, J, T + 3, D), 7.0).to(dtype)
    start = torch.tensor([0, 3, 0][:B]).clamp(max=T - 1)
    out = torch.empty(B, R, H, D, dtype=dtype)
    arguments = native_ops.prompt_arguments(out, q, k, v, 0.2, cos, sin, keys, values, start)
    library.check(library.library().aerogel_native_prompt(ctypes.byref(arguments)), "attention of a prompt")
    turned_q, turned_k = ops.rotate(q, cos, sin), ops.rotate(k, cos, sin)
    assert relative(keys[:, :, :T], turned_k) < (1e-6 if dtype == torch.float32 else 1e-9)
    assert torch.equal(values[:, :, :T], v) and bool((keys[:, :, T:] == 7).all()) and bool((values[:, :, T:] == 7).all())
    places = torch.arange(T)
    seen = (places[None, :, None] >= places[None, None]) & (places[None, None] >= start[:, None, None])
    scores = turned_q.double() @ turned_k.double().repeat_interleave(H // J, 1).transpose(2, 3) * 0.2
    shares = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), -1).nan_to_num(0.0)
    wanted = (shares @ v.double().repeat_interleave(H // J, 1)).transpose(1, 2)[:, T - R :]
    assert relative(out, wanted) < CLOSE[dtype]
    before = (places[T - R :][None] < start[:, None])[..., None, None]
    assert bool((out.masked_select(before.expand_as(out)) == 0).all())


def test_prompts_whose_parts_do_not_belong_together_are_refused() -> None:
    q = torch.zeros(1, 2, 6, 8)
    slots, angles = torch.zeros(1, 2, 6, 8), torch.zeros(1, 6, 8)
    good: dict[str, torch.Tensor] = {"cos": angles, "sin": angles, "keys": slots, "values": slots, "start": torch.tensor([0])}
    native_ops.prompt_arguments(torch.empty(1, 6, 2, 8), q, q, q, 1.0, **good)
    wrong = {
        "cos": torch.zeros(1, 5, 8),
        "keys": torch.zeros(1, 2, 5, 8),
        "values": torch.zeros(1, 1, 6, 8),
        "start": torch.tensor([0, 0]),
    }
    for name, tensor in wrong.items():
        with pytest.raises(ValueError, match="belong"):
            native_ops.prompt_arguments(torch.empty(1, 6, 2, 8), q, q, q, 1.0, **{**good, name: tensor})
    with pytest.raises(ValueError, match="belong"):
        native_ops.prompt_arguments(torch.empty(1, 7, 2, 8), q, q, q, 1.0)
    start = torch.tensor([6])  # arguments hold addresses only
    late = native_ops.prompt_arguments(torch.empty(1, 6, 2, 8), q, q, q, 1.0, start=start)
    with pytest.raises(BadInput, match="shape"):
        library.check(library.library().aerogel_native_prompt(ctypes.byref(late)), "a prompt")
