"""How fast the packed matmuls are on a GPU: against a dense one, against reading the weight, against the best peers.

    python benchmarks/gpu_gemm.py --out benchmarks/results/gpu_gemm.json            (all: about two minutes of an H100)
    python benchmarks/gpu_gemm.py --tokens 1 16 --bits 4 2 --shapes 4096x4096 --implementation few

Measured per shape (the linears of Llama-3-8B and 70B, N out x K in features), width and number of tokens M. All contenders of
a point take three turns, of which the median counts; from 256 tokens on, where the device's power is the limit, each turn
comes after a pause and is short enough for the highest clock:

    us        our operator: median over replays of a CUDA graph that goes round over >= 200 MB of copies of the weight
    dense     torch's bfloat16 matmul in the same way
    floor     up to 16 tokens: a kernel that only reads as many bytes as codes and scales have, in the same way
    us_sustained, dense_sustained   with 4096 tokens: the same two when they run for a second, at the clock that their own power
              leaves them; what else is here is measured at the highest one
    peer      the best W4A16 kernel of nine measured on another H100 (figures below), times dense here / dense there, or of
              those that --peers measures beside ours in this run (`gpu_peers.py`), whichever is faster

Groups of 128, symmetric, bfloat16 scales and activations. Rows say which implementation ran. The summary holds the geometric
mean and the least of peer / us, the shares of the floor, and the gain of fewer bits over our own four. With `--compile`
nothing is timed: every kernel, the peers' too, is brought into its cache on disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aerogel.kernels.cuda import nvrtc
from aerogel.kernels.cuda.launch import Function, Launch
from aerogel.kernels.cuda.timing import copies, graph_microseconds, in_turn, sustained_microseconds
from aerogel.kernels.gemm import cuda
from aerogel.kernels.gemm.cuda_tune import random_weight, weight_copies
from aerogel.kernels.gemm.cuda_weight import TileWeight

if TYPE_CHECKING:
    from gpu_peers import Calls, Contender

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
SHAPES = ("4096x4096", "6144x4096", "28672x4096", "4096x14336", "57344x8192", "8192x28672")
ROUNDS, HOT_TOKENS, PAUSE = 3, 256, 0.1
"""How often contenders take turns; from how many tokens on, where a device grows hot and slow, after a pause; its seconds."""
FEW_TOKENS = 16
"""Up to so many tokens the floor is measured, and fewer bits than four."""
SUSTAINED_TOKENS, SECONDS = 4096, 1.0
"""From how many tokens on, and over how many seconds, sustained times are taken."""
Row = dict[str, Any]
NARROW_SHAPES = ("28672x4096", "57344x8192", "8192x28672")
"""Where fewer than four bits are compared with four."""

# Microseconds on an H100 80GB, 2026-11-21: dense bfloat16 and the best of nine W4A16 kernels, by the tokens above.
THERE: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "4096x4096": (
        (16.6, 16.5, 16.4, 16.5, 16.8, 14.6, 14.9, 15.4, 17.8, 27.9, 48.1, 189),
        (6.7, 6.9, 8.6, 9.0, 9.8, 11.0, 12.4, 15.8, 21.4, 29.2, 55.2, 190.0),
    ),
    "6144x4096": (
        (20.6, 20.6, 20.6, 20.8, 21.1, 21.5, 20.4, 21.1, 23.6, 38.6, 77.2, 289),
        (9.9, 10.2, 10.8, 10.8, 11.4, 12.4, 14.1, 18.6, 26.6, 42.1, 76.0, 303.5),
    ),
    "28672x4096": (
        (81.8, 81.9, 82.2, 82.6, 83.0, 84.6, 86.6, 88.7, 102, 186, 355, 1259),
        (26.0, 26.3, 26.6, 26.8, 28.0, 29.5, 40.1, 51.9, 90.5, 168.5, 327.3, 1283.9),
    ),
    "4096x14336": (
        (44.7, 44.5, 44.5, 44.7, 45.3, 46.0, 47.3, 53.5, 59.1, 88.0, 173, 673),
        (16.2, 16.3, 16.2, 16.7, 17.8, 21.2, 23.2, 30.0, 49.3, 88.9, 174.9, 638.8),
    ),
    "57344x8192": (
        (328, 326, 327, 327, 329, 328, 336, 342, 379, 712, 1321, 5325),
        (87.1, 87.5, 87.8, 88.5, 91.0, 106.0, 136.5, 184.1, 332.7, 648.4, 1218.6, 5260.8),
    ),
    "8192x28672": (
        (165, 165, 165, 165, 164, 168, 172, 182, 186, 361, 701, 2615),
        (45.2, 45.3, 45.4, 45.7, 46.9, 58.9, 69.3, 95.6, 170.1, 325.2, 632.8, 2520.5),
    ),
}

READ = """
struct Arguments { const uint4* from; unsigned* to; long long count; };
extern "C" __global__ void __launch_bounds__(512) read_only(const __grid_constant__ Arguments p) {
  unsigned sum = 0;
  const long long step = (long long)gridDim.x * blockDim.x;
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  for (; i + 7 * step < p.count; i += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; j++)
      asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w) : "l"(p.from + i + j * step));
#pragma unroll
    for (int j = 0; j < 8; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < p.count; i += step) { const uint4 v = p.from[i]; sum ^= v.x ^ v.y ^ v.z ^ v.w; }
  if (sum == 0x9E3779B9u) p.to[0] = sum;
}
"""


def floor_calls(nbytes: int) -> list[Callable[[], object]]:
    """The floor: of a few grids the fastest kernel that reads `nbytes` and writes nothing, for each of several copies."""
    import ctypes

    class Arguments(ctypes.Structure):
        _fields_ = [("from_", ctypes.c_void_p), ("to", ctypes.c_void_p), ("count", ctypes.c_longlong)]

    code = nvrtc.cubin("read_only.cu", {"read_only.cu": READ}, {}, torch.cuda.get_device_capability())
    function = Function(code, "read_only")
    count = nbytes // 16
    buffers = [torch.randint(0, 255, (count * 16,), dtype=torch.uint8, device="cuda") for _ in range(copies(nbytes))]

    def call(buffer: Tensor, blocks: int) -> Callable[[], object]:
        launch = Launch(function, Arguments(buffer.data_ptr(), buffer.data_ptr(), count), grid=(blocks,), block=512)
        return lambda _keep=buffer: launch(torch.cuda.current_stream().cuda_stream)

    grids = [[call(buffer, blocks) for buffer in buffers] for blocks in (132, 264, 528)]
    return min(grids, key=graph_microseconds)


def dense_calls(N: int, K: int) -> Calls:
    """torch's own matmul."""
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * N * K))]

    def at(M: int) -> list[Callable[[], object]]:
        x, y = torch.randn(M, K, device="cuda").bfloat16(), torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
        return [lambda w=w: torch.mm(x, w.T, out=y) for w in weights]

    return at


def runner_of(weight: TileWeight, M: int, implementation: str) -> tuple[str, Callable[[Tensor, Tensor | None, Tensor], None]]:
    """The implementation that dispatch chooses, or the one asked for by name, planned."""
    capability = torch.cuda.get_device_capability()
    if implementation == "auto":
        found = cuda.choose(weight, M, torch.bfloat16, capability)
    else:
        found = next(one for one in cuda.implementations() if one.name == implementation)
        reason = found.refuses(weight, M, torch.bfloat16, capability)
        if reason:
            return "", lambda *_: None
    return found.name, found.plan(weight, M, torch.bfloat16)


def packed_rows(shape: str, bits: int, tokens: tuple[int, ...], implementation: str, beside: dict[str, Calls]) -> list[Row]:
    """Times for each number of tokens, ours and those of the contenders `beside` it, with the implementation that ran and its
    relative error against a dense product."""
    from aerogel.kernels.gemm.cuda_dense import dequantize

    N, K = map(int, shape.split("x"))
    weights = weight_copies(random_weight(N, K, bits, 128, "cuda"))
    reference = dequantize(weights[0], torch.bfloat16)
    reading = floor_calls(weights[0].nbytes)
    rows = []
    for M in tokens:
        x = torch.randn(M, K, device="cuda").bfloat16()
        y = torch.full((M, N), torch.nan, device="cuda", dtype=torch.bfloat16)
        runners = [runner_of(weight, M, implementation) for weight in weights]
        name, run = runners[0]
        if not name:
            continue
        run(x, None, y)
        wanted = (x @ reference.T).float()
        error = ((y.float() - wanted).norm() / wanted.norm()).item()
        calls: dict[str, list[Callable[[], object]]] = {"us": [lambda run=run: run(x, None, y) for _, run in runners]}  # noqa: B023
        calls |= {other: at(M) for other, at in beside.items()}
        calls |= {"floor": reading} if M <= FEW_TOKENS else {}
        times = in_turn(calls, rounds=ROUNDS, pause=PAUSE if M >= HOT_TOKENS else 0.0)
        if M >= SUSTAINED_TOKENS:
            times |= {f"{name}_sustained": sustained_microseconds(calls[name], seconds=SECONDS) for name in ("us", "dense")}
        config = getattr(run, "config", None)
        facts = {"by": name, "config": str(config or ""), "error": error, "bytes": weights[0].nbytes}
        rows.append({"shape": shape, "bits": bits, "M": M, **times, **facts})
    return rows


def compile_all(asked: argparse.Namespace, peers: Iterable[Contender]) -> None:
    """Every kernel that is asked for into its cache on disk: ours side by side, the peers' by running each once."""
    from aerogel.kernels.gemm.cuda_dense import dequantize

    for shape in asked.shapes:
        N, K = map(int, shape.split("x"))
        weights = [random_weight(N, K, bits, 128, "cuda") for bits in asked.bits]
        with ThreadPoolExecutor(16, initializer=torch.cuda.set_device, initargs=(0,)) as pool:
            list(pool.map(lambda pair: runner_of(*pair, asked.implementation), itertools.product(weights, asked.tokens)))
            list(pool.map(lambda weight: dequantize(weight, torch.bfloat16), weights))
        for contender in peers:
            at = contender(N, K, tuple(asked.tokens))
            for M in asked.tokens:
                at(M)[0]()
        torch.cuda.synchronize()


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows come to: peers, floors, fewer bits."""
    four = {(row["shape"], row["M"]): row for row in rows if row["bits"] == 4}
    ratios = {f"{shape} M={M}": row["peer"] / row["us"] for (shape, M), row in four.items() if row.get("peer")}
    found: dict[str, Any] = {}
    if ratios:
        found["peer_geometric_mean"] = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        found["peer_least"] = min(ratios.items(), key=lambda item: item[1])
    found["floor_share"] = {f"{s} M={M}": round(row["floor"] / row["us"], 3) for (s, M), row in four.items() if "floor" in row}
    found["over_four_bits"] = {
        f"{row['bits']} bits {row['shape']} M={row['M']}": round(four[row["shape"], row["M"]]["us"] / row["us"], 3)
        for row in rows
        if row["bits"] != 4 and (row["shape"], row["M"]) in four
    }
    for kind in ("", "_sustained"):
        found[f"over_dense{kind}"] = {
            f"{s} M={M}": round(row[f"dense{kind}"] / row[f"us{kind}"], 3) for (s, M), row in four.items() if f"us{kind}" in row
        }
    return found


def write(asked: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """What was measured so far, with where and how."""
    from gpu_peers import PEERS, version_of

    if not asked.out or not rows:
        return
    rows = sorted(rows, key=lambda row: (*SHAPES, row["shape"]).index(row["shape"]))
    facts = torch.cuda.get_device_properties(0)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"gpu": facts.name, "multiprocessors": facts.multi_processor_count, "cpu": platform.processor()},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "nvrtc": nvrtc.compiler().version}
        | {name: version_of(PEERS[name][0]) for name in asked.peers},
        "summary": summary(rows),
        "rows": rows,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    from gpu_peers import COMPILE, PEERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2, 1])
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--peers", nargs="*", default=[], choices=sorted(PEERS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which no further shape is begun")
    asked = parser.parse_args()
    for name in asked.peers:
        began = time.perf_counter()
        count = COMPILE[name](asked.shapes, asked.tokens)
        print(f"{name}: {count} kernels or points compiled in {time.perf_counter() - began:.0f} s", flush=True)
    if asked.compile:
        compile_all(asked, [PEERS[name][1] for name in asked.peers])
        return
    started, rows = time.perf_counter(), []
    for shape in asked.shapes:
        N, K = map(int, shape.split("x"))
        there = {M: pair for M, *pair in zip(TOKENS, *THERE.get(shape, ((), ())), strict=False)}
        contenders = {"dense": dense_calls(N, K)}
        contenders |= {name: PEERS[name][1](N, K, tuple(asked.tokens)) for name in asked.peers}
        for bits in asked.bits:
            if bits < 4 and shape not in NARROW_SHAPES:
                continue
            if time.perf_counter() - started > asked.limit:
                print("time limit: ends before", shape, bits, flush=True)
                break
            tokens = tuple(M for M in asked.tokens if bits == 4 or M <= FEW_TOKENS)
            beside = contenders if bits == 4 else {"dense": contenders["dense"]}
            found = packed_rows(shape, bits, tokens, asked.implementation, beside)
            for row in found:
                M = row["M"]
                if bits == 4:
                    scaled = [there[M][1] * row["dense"] / there[M][0]] if M in there else []
                    peers = [*scaled, *(row[name] for name in asked.peers)]
                    row |= {"peer": min(peers)} if peers else {}
                peer = f" peer/ours {row['peer'] / row['us']:.2f}" if "peer" in row else ""
                peer += "".join(f" {name} {row[name]:.1f}" for name in asked.peers if bits == 4)
                peer += f" sustained {row['dense_sustained'] / row['us_sustained']:.2f}" if "us_sustained" in row else ""
                floor = f" floor {row['floor'] / row['us']:.1%}" if "floor" in row else ""
                print(f"{shape} W{bits} M={M:<5}{row['us']:8.2f} us {row['by']:6}{floor}"
                      f" dense/ours {row['dense'] / row['us']:.2f}{peer} err {row['error']:.1e}", flush=True)  # fmt: skip
            rows += found
        write(asked, rows)  # after each shape: a run that is cut off has measured what it has measured
    print(json.dumps({key: value for key, value in summary(rows).items() if key.startswith("peer")}), flush=True)


if __name__ == "__main__":
    main()
