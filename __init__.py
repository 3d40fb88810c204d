"""aerogel makes language models light: one command turns a dense checkpoint into a compressed one, and says how good it is.

The public API is the five functions below; the command line calls nothing else. They are imported when first used, so that
`import aerogel` costs nothing. Importing aerogel also lets `transformers.AutoModelForCausalLM.from_pretrained` load
compressed checkpoints onto the bundled kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aerogel.model.register import install_hook
from aerogel.version import __version__ as __version__

if TYPE_CHECKING:
    from aerogel.eval.run import benchmark as benchmark
    from aerogel.eval.run import evaluate as evaluate
    from aerogel.model.compress import compress as compress
    from aerogel.model.loading import load as load
    from aerogel.model.plan import plan as plan

__all__ = ["benchmark", "compress", "evaluate", "load", "plan"]

_HOME = {
    "compress": "aerogel.model.compress",
    "load": "aerogel.model.loading",
    "evaluate": "aerogel.eval.run",
    "benchmark": "aerogel.eval.run",
    "plan": "aerogel.model.plan",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'aerogel' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


install_hook()
