"""Whole models on a CPU: our decode loop beside llama.cpp, in one run.

    python benchmarks/cpu_models.py --ours w4=DIR w4-int8=DIR+int8 dense=DIR --gguf Q4_0=FILE Q4_1=FILE --peer-python PYTHON
    python benchmarks/cpu_models.py --ours w4=DIR w2=DIR --gguf Q4_0=random.gguf ... --prompt 32 --rounds 3
    python benchmarks/cpu_models.py --write-gguf random.gguf          random weights of TinyLlama's shape in Q4_0
    python benchmarks/cpu_models.py --write-checkpoint DIR --bits 4   the same shape (1.1 billion), native, with an 8-bit head

A contender of --ours is a checkpoint, run in bfloat16; `+int8` rounds activations to int8, as llama.cpp always does, and
`+fused` loads it through transformers although it could be loaded directly. Every contender lives in a process of its own and
is stopped while others run; in a round each takes one turn: a prompt, then new tokens one at a time, always the likeliest.
Given are medians of tokens per second (`prefill`, `decode`), resident memory before the model is loaded (`imports`) and after
a turn, seconds from the start of the script to the loaded model and to its first token behind a prompt of 8, all imports
included (`ready_seconds`, `first_seconds`), and ratios of medians. --without hides modules from our processes: triton, which
torch's builds for CPUs do not bring, takes 76 MB where it is installed and transformers' modules are. llama.cpp runs in
--peer-python (llama-cpp-python, compiled for the machine) through its C interface, with the same numbers of tokens and
threads and `use_extra_bufts = False`: its repacking for AMX has crashed with such weights.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()
HERE = Path(__file__).parent
TINYLLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory, shared pages included."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ours(spec: str, threads: int, prompt: int, new: int) -> Iterator[dict[str, Any]]:
    """First what was loaded, then one turn after the other."""
    import torch

    from aerogel.eval.decode import facts
    from aerogel.kernels.decode.loop import Decoder
    from aerogel.kernels.linear import round_activations
    from aerogel.model.direct import load_to_decode

    torch.set_num_threads(threads)
    place, *how = spec.split("+")
    imports, start = resident(), time.perf_counter()
    model: Any = load_to_decode(place, loop="fused" if "fused" in how else "auto", dtype=torch.bfloat16)
    if "int8" in how:
        round_activations(model)
    ready = time.perf_counter()
    decoder = Decoder(model)
    ids = torch.randint(model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0))
    held = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    marks = [time.perf_counter() for _ in decoder.stream([ids[:8]], 4)]
    times = {"load_seconds": ready - start, "ready_seconds": ready - BEGIN, "first_seconds": marks[0] - BEGIN}
    yield {**times, "imports": imports, "bytes": sum(held.values()), "ran": facts(decoder)}
    while True:
        start = first = time.perf_counter()
        for number, _ in enumerate(decoder.stream([ids], new + 1)):
            first = time.perf_counter() if number == 0 else first
        yield {"prefill": prompt / (first - start), "decode": new / (time.perf_counter() - first), "resident": resident()}


def theirs(path: str, threads: int, prompt: int, new: int) -> Iterator[dict[str, Any]]:
    """The same through llama.cpp."""
    import llama_cpp as cpp
    import numpy

    cpp.llama_backend_init()
    start = time.perf_counter()
    how = cpp.llama_model_default_params()
    how.use_extra_bufts = False
    model = cpp.llama_model_load_from_file(path.encode(), how)
    seconds = time.perf_counter() - start
    settings = cpp.llama_context_default_params()
    settings.n_ctx = prompt + new + 16
    settings.n_batch = settings.n_ubatch = max(prompt, 32)
    settings.n_threads = settings.n_threads_batch = threads
    context = cpp.llama_init_from_model(model, settings)
    vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    ids = [(7919 * i + 13) % vocab for i in range(prompt)]

    def step(tokens: list[int]) -> int:
        array = (cpp.llama_token * len(tokens))(*tokens)
        if cpp.llama_decode(context, cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return int(numpy.ctypeslib.as_array(cpp.llama_get_logits_ith(context, -1), (vocab,)).argmax())

    yield {"load_seconds": seconds, "bytes": Path(path).stat().st_size, "version": cpp.__version__}
    while True:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        token = step(ids)
        first = time.perf_counter()
        for _ in range(new):
            token = step([token])
        yield {"prefill": prompt / (first - start), "decode": new / (time.perf_counter() - first), "resident": resident()}


def write_checkpoint(folder: Path, bits: int) -> None:
    """The same shape as a native checkpoint: random codes in groups of 64, an 8-bit head."""
    sys.path.insert(0, str(HERE))
    import torch
    from load import make

    from aerogel.pack.export import export_layout
    from aerogel.quantize.grids import IntGrid

    size, inner, layers, heads, shared, vocab = TINYLLAMA.values()
    shape = {"hidden": size, "inner": inner, "blocks": layers, "heads": heads, "key_heads": shared, "vocabulary": vocab}
    portable = folder.with_name(folder.name + "-portable")
    make(portable, shape | {"head": size // heads}, "cpu", IntGrid(bits=bits, group_size=64, scale_dtype=torch.bfloat16))
    export_layout(portable, folder, "native-cpu")


def serve(kind: str, spec: str, threads: int, prompt: int, new: int) -> None:
    """A contender: one line of JSON for each line that comes in."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else a library prints
    turns = (ours if kind == "ours" else theirs)(spec, threads, prompt, new)
    for _ in sys.stdin:
        out.write(json.dumps(next(turns)) + "\n")
        out.flush()


class Contender:
    """A child process that runs only while it is asked something."""

    def __init__(self, python: str, kind: str, spec: str, given: argparse.Namespace) -> None:
        command = [
            python,
            __file__,
            "--serve",
            kind,
            spec,
            "--threads",
            given.threads,
            "--prompt",
            given.prompt,
            "--new",
            given.new,
            *(["--without", *given.without] if kind == "ours" and given.without else []),
        ]
        quiet = None if given.verbose else subprocess.DEVNULL
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True
        )
        self.facts = self.turn()

    def turn(self) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a contender ended: {self.process.args}; run with --verbose")
        self.process.send_signal(signal.SIGSTOP)
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def write_gguf(path: Path) -> None:
    """TinyLlama's shape with random weights: linears Q4_0, head Q6_K, as llama.cpp's own quantizer leaves them."""
    import gguf
    import numpy

    random, kinds = numpy.random.default_rng(0), gguf.GGMLQuantizationType
    size, inner, layers, heads, shared, vocab = TINYLLAMA.values()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size // heads)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def add(name: str, rows: int, columns: int, kind: Any = kinds.Q4_0) -> None:
        block, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
        raw = random.integers(0, 256, (rows, columns // block, bytes_of_block), dtype=numpy.uint8)
        at = 0 if kind == kinds.Q4_0 else bytes_of_block - 2  # where the block's float16 scale lies
        raw[..., at : at + 2] = numpy.array([0.002 if kind == kinds.Q4_0 else 1e-5], dtype=numpy.float16).view(numpy.uint8)
        writer.add_tensor(name, raw.reshape(rows, -1), raw_dtype=kind)

    add("token_embd.weight", vocab, size)
    add("output.weight", vocab, size, kinds.Q6_K)
    writer.add_tensor("output_norm.weight", numpy.ones(size, numpy.float32))
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", numpy.ones(size, numpy.float32))
        for name, rows, columns in (
            *(("attn_q", size, size), ("attn_output", size, size), ("ffn_down", size, inner)),
            *((f"attn_{name}", size * shared // heads, size) for name in "kv"),
            *((f"ffn_{name}", inner, size) for name in ("gate", "up")),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def requantize(source: Path, to: Path) -> None:
    """A GGUF file as Q4_0, by llama.cpp's own quantizer."""
    import llama_cpp as cpp

    how = cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True, 2
    if cpp.llama_model_quantize(str(source).encode(), str(to).encode(), ctypes.byref(how)):
        sys.exit("llama_model_quantize failed")


def compare(given: argparse.Namespace) -> dict[str, Any]:
    places = [("ours", sys.executable, each) for each in given.ours] + [
        ("peer", given.peer_python, each) for each in given.gguf
    ]
    running = {each.partition("=")[0]: Contender(python, kind, each.partition("=")[2], given) for kind, python, each in places}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    for number in range(given.rounds + 1):
        for name, contender in running.items():
            found = contender.turn()
            if number:  # the first warms up
                turns[name].append(found)
    rows = {}
    for name, contender in running.items():
        middle = {key: statistics.median(turn[key] for turn in turns[name]) for key in ("prefill", "decode", "resident")}
        rows[name] = contender.facts | middle | {"turns": turns[name]}
        contender.close()
    peers = [each.partition("=")[0] for each in given.gguf]
    for name in (each.partition("=")[0] for each in given.ours):
        for key in ("prefill", "decode"):
            rows[name][f"{key}_over"] = {p: rows[name][key] / rows[p][key] for p in rows if p in peers or p in given.over}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME=SPEC")
    parser.add_argument("--gguf", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--over", nargs="*", default=[], help="names of ours that ratios are given against, too")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--without", nargs="*", default=[], metavar="MODULE", help="modules that our processes do not find")
    parser.add_argument("--write-gguf", type=Path)
    parser.add_argument("--write-checkpoint", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--requantize", type=Path, nargs=2, metavar=("GGUF", "TO"), help="run with --peer-python's Python")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write_gguf:
        write_gguf(given.write_gguf)
        return 0
    if given.write_checkpoint:
        write_checkpoint(given.write_checkpoint, given.bits)
        return 0
    if given.requantize:
        requantize(*given.requantize)
        return 0
    if given.serve:
        sys.modules.update(dict.fromkeys(given.without))  # type: ignore[arg-type]
        serve(*given.serve, given.threads, given.prompt, given.new)
        return 0
    from aerogel.eval.machine import machine, versions

    rows = compare(given)
    for name, row in rows.items():
        short = {key: round(row[key], 2) for key in ("prefill", "decode", "load_seconds")}
        over = {key: {p: round(r, 2) for p, r in row[key].items()} for key in row if key.endswith("_over")}
        held = f"{row['resident'] / 1e6:.0f} MB, {row.get('imports', 0) / 1e6:.0f} before, of {row['bytes'] / 1e6:.0f}"
        sys.stdout.write(f"{name:16} {short} {held} {over}\n")
    if given.out:
        report = {
            "command": " ".join(["benchmarks/cpu_models.py", *sys.argv[1:]]),
            "machine": machine(),
            "versions": versions(),
            "prompt": given.prompt,
            "new": given.new,
            "threads": given.threads,
            "rows": rows,
        }
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
