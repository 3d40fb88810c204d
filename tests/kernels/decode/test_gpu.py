"""The decode loop on a CUDA device: every operation against the formula, whole models against transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.kernels.decode.cases import ATTENTION, attention, distance, textbook
from tests.kernels.decode.test_loop import theirs
from tests.zoo import build
from torch import nn

from aerogel.kernels.cuda.record import recording
from aerogel.kernels.decode import ops
from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.decode.merge import merge
from aerogel.kernels.decode.prompt_graphs import unfit
from aerogel.kernels.decode.reading import parts_of
from aerogel.kernels.decode.sample import Sampling
from aerogel.kernels.gemm.cuda_tune import random_weight
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.linear import Linear
from aerogel.quantize.grids import IntGrid, quantized

pytestmark = pytest.mark.gpu
BUDGET = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_the_formula_and_repeats_bit_for_bit(case: Any, dtype: torch.dtype) -> None:
    given = attention(case, dtype, "cuda")
    expected = textbook(given)
    found = torch.ops.aerogel.attend(*given.values())
    assert distance(found, expected) < BUDGET[dtype]
    for _ in range(20):
        assert torch.equal(torch.ops.aerogel.attend(*given.values()), found)
    b, n = 0, int(given["slot"])
    assert torch.equal(given["values"][b, :, n], given["v"][b, :, 0])


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("N", [32, 100, 576, 4096, 5000])
def test_norms_and_gates_equal_plain_torch(N: int, dtype: torch.dtype) -> None:
    torch.manual_seed(N)
    x, y, w, pair = (torch.randn(s, device="cuda", dtype=dtype) for s in ((3, 1, N), (3, 1, N), (N,), (3, 1, 2 * N)))
    wide = [tensor.double() for tensor in (x, y, w)]
    for first in (True, False):
        expected = ops.add_rms_norm(*wide, 1e-5, first)
        for found, sure in zip(torch.ops.aerogel.add_rms_norm(x, y, w, 1e-5, first), expected, strict=True):
            assert distance(found, sure) < BUDGET[dtype]
        assert (
            distance(torch.ops.aerogel.rms_norm(x, w, 1e-5, first), ops.rms_norm(wide[0], wide[2], 1e-5, first)) < BUDGET[dtype]
        )
    for act in ("silu", "gelu", "gelu_tanh"):
        for both in (pair, torch.randn(300, 2 * N, device="cuda", dtype=dtype)):
            g, u = both[..., :N], both[..., N:]
            assert distance(torch.ops.aerogel.gate(g, u, act), ops.gate(g.double(), u.double(), act)) < BUDGET[dtype]


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
def test_a_rotated_prompt_equals_plain_torch(dtype: torch.dtype) -> None:
    for B, H, T, D in ((1, 32, 65, 128), (3, 5, 7, 80)):
        x = torch.randn(B, T, 2 * H, D, device="cuda").to(dtype)[:, :, :H].transpose(1, 2)
        cos, sin = torch.randn(2, B, T, D, device="cuda").to(dtype)
        for angles in ((cos, sin), (cos[:1], sin[:1])):
            expected = ops.rotate(x.double(), *(angle.double() for angle in angles))
            assert distance(torch.ops.aerogel.rotate(x, *angles), expected) < BUDGET[dtype]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_a_prompt_read_with_our_parts_has_the_models_logits(name: str) -> None:
    model, ids = build(name).cuda().bfloat16(), torch.randint(3, 100, (2, 70), generator=torch.Generator().manual_seed(0))
    parts = parts_of(model)
    assert parts.forwards and parts.rotations
    with torch.no_grad():
        expected = model(ids.cuda()).logits
        with parts.replaced():
            assert distance(model(ids.cuda()).logits, expected) < BUDGET[torch.bfloat16]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gpt2", "opt", "mixtral", "gpt_oss", "mamba2"])
def test_tokens_are_those_of_transformers(name: str) -> None:
    model = build(name).cuda()
    ids = torch.randint(3, 100, (3, 7), generator=torch.Generator().manual_seed(1))
    model.generation_config.eos_token_id = None
    expected = model.generate(
        ids.cuda(), attention_mask=torch.ones_like(ids).cuda(), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    merge(model)
    decoder = Decoder(model)
    for _ in range(2):
        assert list(decoder.stream(list(ids), 12)) == expected[:, 7:].T.tolist(), decoder.facts()
    assert decoder.facts()["graph"] == (decoder.way != "plain")


def packed(model: Any) -> Any:
    """The same model with weights of 4 bits, but its head."""
    grid = IntGrid(bits=4, group_size=16, scale_dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            dense = module.weight.detach().float()
            layer = Linear.from_codes(quantized(grid, dense, grid.fit(dense)), bias=module.bias, dtype=torch.bfloat16)
            assert layer.kernel_name == "cuda"
            model.set_submodule(name, layer)
    return model


@pytest.mark.parametrize("batch", [32, 64])
def test_large_batches(batch: int) -> None:
    """Prompts of many lengths. In float32 the tokens are those of transformers; with packed weights in bfloat16, where last
    bits depend on how many tokens there are, the model, reading it all at once, likes every token best or nearly so."""
    generator = torch.Generator().manual_seed(batch)
    prompts = [torch.randint(3, 100, (3 + row * 5 % 17,), generator=generator) for row in range(batch)]
    dense = build("llama").cuda()
    expected = theirs(dense, prompts, 10)
    merge(dense)
    decoder = Decoder(dense)
    assert list(decoder.stream(prompts, 10)) == expected, decoder.facts()
    assert decoder.facts()["graph"]
    plain, merged = packed(build("llama").cuda().bfloat16()), packed(build("llama").cuda().bfloat16())
    merge(merged)
    decoder = Decoder(merged)
    made = torch.tensor(list(decoder.stream(prompts, 10))).T
    assert decoder.facts()["graph"]
    with torch.no_grad():
        for prompt, new in zip(prompts, made, strict=True):
            logits = plain(torch.cat([prompt, new])[None].cuda()).logits[0, len(prompt) - 1 : -1].float()
            behind = logits.amax(1) - logits.gather(1, new[:, None].cuda())[:, 0]
            assert bool((behind <= 0.05 * logits.std(1)).all()), behind


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_prompts_of_rounded_lengths_are_read_as_transformers_reads_them(name: str) -> None:
    """37 and 45 tokens are both read as 48: the first time as the model is, then by one graph."""
    model = build(name).cuda()
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 100, (2, tokens), generator=generator) for tokens in (37, 45, 37, 19)]
    expected = [
        model.generate(ids.cuda(), max_new_tokens=8, do_sample=False, pad_token_id=0)[:, ids.shape[1] :] for ids in prompts
    ]
    merge(model)
    decoder = Decoder(model)
    for _ in range(2):
        for ids, wanted in zip(prompts, expected, strict=True):
            assert list(decoder.stream(list(ids), 8)) == wanted.T.tolist(), decoder.facts()
    reason = decoder.facts().get("not", {}).get("prompt graph")  # masks and routes may talk to the host
    assert set(decoder.session._prompts._captured) == (set() if reason else {48, 32})
    assert name != "llama" or reason is None
    uneven = [prompts[0][0], prompts[1][1]]
    assert list(decoder.stream(uneven, 8)) == list(Decoder(model).stream(uneven, 8))


def test_a_prompt_is_the_same_work_each_time() -> None:
    model = build("llama").to("cuda", torch.bfloat16)
    decoder, ids = Decoder(model), torch.arange(3, 48)[None]
    list(decoder.stream(list(ids), 2))
    with torch.inference_mode():
        logits = [decoder.session.fill(ids.cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")) for _ in range(4)]
    assert all(torch.equal(found, logits[0]) for found in logits)
    assert decoder.session._prompts._captured


def test_a_recording_that_fails_leaves_random_numbers_as_they_were() -> None:
    """A number that is read inside ends it; torch alone would refuse every random number of the process from then on."""
    x, device = torch.ones(8, device="cuda"), torch.device("cuda")
    torch.manual_seed(5)
    wanted = torch.randn(8, device=device)
    torch.manual_seed(5)
    with pytest.raises(RuntimeError), recording(torch.cuda.CUDAGraph(), device):
        (2 * x).sum().item()
    assert torch.equal(torch.randn(8, device=device), wanted)
    graph = torch.cuda.CUDAGraph()
    with recording(graph, device):
        y = 3 * x
    graph.replay()
    assert torch.equal(y, 3 * x)


@pytest.mark.parametrize("factor", [None, 4.0])
def test_a_rotation_that_depends_on_the_length_gets_no_graph(factor: float | None) -> None:
    model = build("llama")
    kind = {"rope_type": "default"} if factor is None else {"rope_type": "dynamic", "factor": factor}
    model.config.rope_parameters = {**model.config.rope_parameters, **kind}
    reason = unfit(model.cuda())
    assert reason is None if factor is None else "dynamic" in str(reason)


def test_draws_repeat_with_the_seed() -> None:
    model = build("llama").cuda()
    decoder, ids = Decoder(model), [torch.arange(3, 9)]
    draw = lambda seed: list(decoder.stream(ids, 20, sampling=Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=seed)))  # noqa: E731
    first = draw(1)
    assert draw(1) == first
    assert draw(2) != first


def test_launches_that_overlap_give_what_launches_apart_give() -> None:
    """Norms, matmuls and gates that begin before their predecessor has ended, replayed: the bits of each run by itself."""
    ops.missing(torch.device("cuda"))  # registers the operators
    weight = partial(random_weight, bits=4, group_size=128, device="cuda")
    layers = [(weight(6144, 1024, seed=i), weight(1024, 3072, seed=9 + i)) for i in range(3)]
    norm = torch.rand(1024, device="cuda").bfloat16()
    x = torch.randn(4, 1024, device="cuda").bfloat16()

    def times(weight: TileWeight, rows: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aerogel.tiles_linear(
            rows, weight.codes, weight.scale, weight.zero, None, None, None, weight.group_size, weight.N
        )
        return y

    def chain(apart: bool) -> torch.Tensor:
        def step(value: Any) -> Any:
            if apart:
                torch.cuda.synchronize()
            return value

        h, branch = x, torch.zeros_like(x)
        for up, down in layers:
            h, y = step(torch.ops.aerogel.add_rms_norm(h, branch, norm, 1e-5, True))
            wide = step(times(up, y))
            branch = step(times(down, step(torch.ops.aerogel.gate(wide[:, :3072], wide[:, 3072:], "silu"))))
        return step(h + branch)

    expected = chain(apart=True)
    assert torch.isfinite(expected).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            found = chain(apart=False)
    for _ in range(50):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, expected)
