"""GRPO here against TRL's GRPOTrainer: trained trajectories a second, on the same model, prompts, group size, reward
function and machine, in one run.

    make bench-trl        (or .venv/bin/python -m tests.bench.bench_trl)

Ours is run as a user runs it (bus, agent, zoom, retrieval and reward as processes), synchronous and asynchronous; TRL
calls the same tools in its process. What TRL leaves out stands in trl_grpo.py. A step is 64 trajectories; the first
steps are not counted. Ours counts groups that were trained; TRL trains all, those of equal rewards too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from services.data.procedural import write_set

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "services" / "vlm" / "checkpoints" / "pocket"
UNCOUNTED = 3
TRAJECTORIES = 64
# What the reward's probes cost would be ours alone; AdamW at TRL's rate.
OURS = ("steps=12", "prompts=144", "measured=0", "adam_lr=1e-5", "warmup_updates=1", "final_rate=1", "threads=1")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="agentiad-trl-") as name:
        folder = Path(name)
        figures = {
            "TRL": trl(folder),
            "ours, synchronous": ours(folder / "sync", "max_staleness=0"),
            "ours, asynchronous": ours(folder / "async", "max_staleness=1"),
        }
    for label, figure in figures.items():
        print(f"{label}: {figure:.2f} trained trajectories/s, {figure / figures['TRL']:.2f} of TRL's")


def trl(folder: Path) -> float:
    write_set(folder / "parts")
    command = [ROOT / ".venv-trl" / "bin" / "python", "-m", "tests.bench.trl_grpo", "--checkpoint", POCKET]
    command += ["--parts", folder / "parts", "--steps", "6", "--groups", "8", "--out", folder / "trl.json"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return float(json.loads((folder / "trl.json").read_text())["summary"]["trajectories_s"])


def ours(out: Path, staleness: str) -> float:
    command = [Path(sys.executable).with_name("agentiad"), "train", "rl", "--base", POCKET, "--out", out]
    command += ["--reward", "gated-tools", *(word for change in (*OURS, staleness) for word in ("--set", change))]
    subprocess.run(command, check=True, env={**os.environ, "DATA_DIR": str(out.with_name(f"{out.name}-data"))})
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    counted = [step["speed/step_s"] for step in steps[UNCOUNTED:]]
    return TRAJECTORIES * len(counted) / sum(counted)


if __name__ == "__main__":
    main()
