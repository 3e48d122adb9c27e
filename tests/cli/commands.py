"""`agentiad` as a person runs it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

AGENTIAD = [sys.executable, "-m", "services.cli"]


def agentiad(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AGENTIAD, *map(str, words)], cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
