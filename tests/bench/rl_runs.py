"""RL as a user runs it, on real Kafka and real Triton, for several seeds and rewards: how much better does a policy
get, and what does it cost?

    .venv/bin/python -m tests.bench.rl_runs --base DIR --out DIR --seeds 0 1 2 --rewards gated [--set steps=…]

Each run's folder holds its curves, metrics, rollouts and `report.json`; a line a run goes to OUT/runs.jsonl.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from services.trainer import measure
from tests.harness.kafka import kafka
from tests.harness.triton import triton


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rewards", nargs="+", default=["gated"])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--parts", type=int, default=100, help="held-out parts a category")
    parser.add_argument("--embedded", action="store_true", help="no Kafka, no Triton")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that Kafka and Triton end, too
    asked.out.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds:
        for reward in asked.rewards:
            row = one(asked, seed, reward)
            with (asked.out / "runs.jsonl").open("a") as lines:
                lines.write(json.dumps(row) + "\n")


def one(asked: argparse.Namespace, seed: int, reward: str) -> dict[str, object]:
    out = (asked.out / f"{reward}-{seed}").resolve()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    changes = [word for change in [*asked.set, "measured=0", "threads=1"] for word in ("--set", change)]
    with ExitStack() as running:
        environment = {**os.environ, "DATA_DIR": str(out.with_name(f"{out.name}-data"))}
        if not asked.embedded:
            environment |= {
                "KAFKA_BOOTSTRAP_SERVERS": running.enter_context(kafka()).address,
                "ENGINE_HOST": "triton",
                "TRITON_URL": running.enter_context(triton()),
            }
        command = [Path(sys.executable).with_name("agentiad"), "train", "rl", "--base", asked.base, "--out", out]
        command += ["--seed", str(seed), "--reward", reward, *changes]
        subprocess.run(command, env=environment, check=True)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    newest = max((out / "versions").iterdir())
    found = measure.report(asked.base, newest, reward, asked.parts, out / "report.json", Console())
    row = {name: vars(change) for name, change in found["greedy"].items()}
    return {"seed": seed, "reward": reward, "wall_s": seconds, "cpu_s": cpu_s, "greedy": row,
            "sampled": {name: vars(change) for name, change in found["sampled"].items()}}  # fmt: skip


if __name__ == "__main__":
    main()
