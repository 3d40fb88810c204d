from __future__ import annotations

import subprocess
import sys


def test_heavy_libraries_wait_until_they_are_needed() -> None:
    modules = "quality tasks offline_tasks speed run gate junit report table html card plots significance"
    code = (
        "import sys\n"
        f"for name in {modules.split()!r}: __import__('aerogel.eval.' + name)\n"
        "found = {'lm_eval', 'datasets', 'matplotlib', 'rich', 'typer'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(found)) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
