"""The rotation of inputs, compiled for every instruction set of this machine and for a GPU, against its definition."""

from __future__ import annotations

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.kernels.cuda import nvrtc, sources
from aerogel.kernels.hadamard import choose, cpu, cuda
from aerogel.kernels.native import library
from aerogel.quantize.hadamard import hadamard, random_signs

needs_library = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
SPACING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Of numbers of a type beside their size, half of it for float32's sums."""
SIZES = [(1, 1), (6, 2), (20, 4), (40, 4), (24, 8), (48, 16), (96, 32), (576, 64), (256, 128), (1536, 512), (4096, 4096)]


def signs_of(K: int) -> torch.Tensor:
    return random_signs(K, torch.Generator().manual_seed(K)).to(torch.int8)


def check(found: torch.Tensor, x: torch.Tensor, signs_K: torch.Tensor, block: int) -> None:
    """One rounding of the transform of these very numbers, and sums in float32."""
    wanted = hadamard(x.double(), signs_K, block)
    assert found.shape == x.shape and found.dtype == x.dtype
    scale = wanted.abs() + 2.0**-20 * wanted.abs().amax(-1, keepdim=True) / SPACING[x.dtype]
    assert bool(((found.double() - wanted).abs() <= SPACING[x.dtype] * scale).all())


@needs_library
@pytest.mark.parametrize("path", library.PATHS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_compiled_rotation_is_the_defined_one(path: str, dtype: torch.dtype) -> None:
    if path not in library.paths():
        pytest.skip(f"{path}: not built, or this machine has not its instructions")
    with library.only(path):
        for K, block in SIZES:
            for M in (1, 3, 50):
                x, signs_K = torch.randn(M, K).to(dtype), signs_of(K)
                assert cpu.takes(x, signs_K)
                check(choose.turned(x, signs_K, block), x, signs_K, block)


@needs_library
def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, signs_K, found, before = torch.randn(70, 1536).bfloat16(), signs_of(1536), [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(choose.turned(x, signs_K, 128))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_library
def test_the_compiled_code_refuses_blocks_that_do_not_fit() -> None:
    for K, block in ((48, 32), (48, 24), (48, 0), (48, -16)):
        with pytest.raises(BadInput, match="shape"):
            cpu.turned(torch.randn(1, K), signs_of(K), block)


def test_what_no_compiled_code_takes_is_rotated_by_torch() -> None:
    x, signs_K = torch.randn(5, 64), signs_of(64)
    assert not cpu.takes(x.double(), signs_K) and not cpu.takes(x.T[:, :4], signs_K[:4]) and not cpu.takes(x, signs_K.float())
    torch.testing.assert_close(choose.turned(x.double(), signs_K, 16), hadamard(x, signs_K, 16).double())
    assert choose.turned(x, signs_K, 16).data_ptr() != x.data_ptr()


def test_a_graph_sees_one_operator() -> None:
    x, signs_K = torch.randn(3, 64), signs_of(64)
    compiled = torch.compile(lambda x: choose.turned(x, signs_K, 16) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), hadamard(x, signs_K, 16) + 1)
    torch.library.opcheck(torch.ops.aerogel.hadamard.default, (x, signs_K, 16), test_utils=("test_schema", "test_faketensor"))


def _compiler() -> nvrtc.Compiler | None:
    try:
        return nvrtc.compiler()
    except ImportError:
        return None


@pytest.mark.skipif(_compiler() is None, reason="needs NVRTC")
@pytest.mark.parametrize(("block", "capability"), [(8, (8, 0)), (64, (9, 0)), (256, (9, 0)), (8192, (9, 0))])
def test_the_source_compiles(block: int, capability: tuple[int, int]) -> None:
    compiler = _compiler()
    assert compiler is not None
    for dtype in cuda.HALVES:
        macros = cuda.macros(block, dtype)
        assert macros["THREADS"] * cuda.PIECE >= block and macros["THREADS"] <= 1024
        assert compiler.compile(cuda.SOURCE, sources.sources_of(cuda.SOURCE), macros, capability)[:4] == b"\x7fELF"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", cuda.HALVES, ids=str)
def test_a_gpu_rotates_in_one_launch(dtype: torch.dtype) -> None:
    for K, block in ((24, 8), (48, 16), (576, 64), (1536, 512), (4096, 32), (4096, 4096), (14336, 256), (16384, 8192)):
        for M in (1, 3, 300):
            x, signs_K = torch.randn(M, K, device="cuda").to(dtype), signs_of(K).cuda()
            assert cuda.takes(x, signs_K, block)
            check(choose.turned(x, signs_K, block), x, signs_K, block)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_s_graph_rotates_new_inputs_and_others_take_torch() -> None:
    x, signs_K = torch.randn(4, 576, device="cuda").bfloat16(), signs_of(576).cuda()
    choose.turned(x, signs_K, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = choose.turned(choose.turned(x, signs_K, 64), signs_K, 64)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, choose.turned(choose.turned(x, signs_K, 64), signs_K, 64))
    for other, block in ((x.float(), 64), (x, 4), (x[:, 1:65].contiguous().view(-1)[4:].view(1, -1)[:, :192], 64)):
        signs = signs_of(other.shape[-1]).cuda()
        assert not cuda.takes(other, signs, block)
        check(choose.turned(other.contiguous(), signs, block), other, signs, block)
