"""CPU time of GPTQ at 4 bits over a small model, beside llm-compressor's GPTQ on the same machine and token ids.

    python benchmarks/compress_speed.py MODEL --ids IDS.safetensors --peer-python PEER/bin/python --out RESULT.json

PEER is an environment with llmcompressor 0.14. The two run one after the other, each in a process of its own and with the
same number of threads; CPU seconds are user plus system time of the compression, imports and loading not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from aerogel.eval.machine import machine, versions

PEER = "llm-compressor 0.14 GPTQ"
OURS = """
import json, sys, time
from aerogel.model.compress import compress
import aerogel.pack.config, aerogel.quantize.gptq, transformers.models.llama.modeling_llama
start, cpu = time.perf_counter(), time.process_time()
report = compress(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu,
                  "bits_per_weight": report["size"]["bits_per_weight"]}))
"""


def run(command: list[str], threads: int) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def shares(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """CPU seconds of each over those of the peer; empty without one."""
    peer = rows.get(PEER)
    return {} if peer is None else {name: row["cpu_seconds"] / peer["cpu_seconds"] for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--only", choices=["gptq, no refit", "gptq", "gptq + gptaq"], help="one of ours instead of all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    ids = given.ids.resolve()
    quantize = {"method": "gptq", "bits": 4, "group_size": 64, "symmetric": True}
    recipes = {"gptq, no refit": {**quantize, "refit": 0}, "gptq": quantize, "gptq + gptaq": {**quantize, "gptaq": True}}
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if given.peer_python:
            peer = [given.peer_python, str(Path(__file__).with_name("peer_gptq.py")), given.model, str(ids)]
            rows[PEER] = run([*peer, str(given.rows), str(given.length), f"{folder}/peer"], given.threads)
        for name, stage in recipes.items():
            if given.only not in (None, name):
                continue
            calibration = {"source": f"{ids}:calibration", "samples": given.rows, "sequence_length": given.length}
            recipe = {"aerogel": 1, "calibration": calibration, "stages": [{"quantize": stage}]}
            out = f"{folder}/{len(rows)}"
            rows[name] = run([sys.executable, "-W", "ignore", "-c", OURS, given.model, json.dumps(recipe), out], given.threads)
            sys.stdout.write(json.dumps({name: rows[name]}) + "\n")
            sys.stdout.flush()
    result = {
        "command": "python benchmarks/compress_speed.py MODEL --ids IDS --peer-python PEER --out OUT",
        "machine": machine(),
        "versions": versions(),
        "threads": given.threads,
        "rows": rows,
        "share_of_peer": shares(rows),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
