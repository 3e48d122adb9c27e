"""`agentiad` as a person runs it: real processes, what they print, how they end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.data.procedural import write_set
from services.data.readers import Sample, read
from tests.cli.commands import AGENTIAD, agentiad
from tests.harness.process import free_port

SHARED = Path(__file__).parents[3] / "shared" / "data"
ROW = {
    "image", "decision", "anomaly", "score", "type", "box", "turns", "tools", "category", "category_known",
    "policy_version", "trace",
}  # fmt: skip


def rows_of(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return read(write_set(tmp_path_factory.mktemp("parts"), ("pin_board",), per_category=4, variants_per_category=2))


def test_inspect_prints_a_row_an_image_and_says_what_it_could_not_read(samples: list[Sample], tmp_path: Path) -> None:
    parts = [sample.image for sample in samples if sample.split != "train"]
    normals = next(sample.image.parent for sample in samples if sample.split == "train")
    (tmp_path / "notes.png").write_text("not a picture")
    result = agentiad(
        "inspect", *parts, tmp_path / "notes.png", tmp_path / "gone.png", "--json", "--out", tmp_path / "report",
        "--category", "pin_board", "--normals", normals, cwd=tmp_path, MILVUS_URI=f"http://127.0.0.1:{free_port()}",
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    rows = {Path(row["image"]).name: row for row in rows_of(result)}
    assert set(rows) == {part.name for part in parts} | {"notes.png", "gone.png"}
    assert "not a PNG" in rows["notes.png"]["error"]
    assert "gone.png" in rows["gone.png"]["error"]
    for part in parts:
        row = rows[part.name]
        assert set(row) == ROW
        assert row["decision"] in {"pass", "reject", "review"}
        assert 0 <= row["score"] <= 1
        assert row["category_known"]
        trace = json.loads((tmp_path / row["trace"]).read_text())
        assert trace["trajectory"]["turns"]
    page = (tmp_path / "report" / "index.html").read_text()
    for name in rows:
        assert name in page
    assert len(list((tmp_path / "report" / "evidence").iterdir())) == len(parts)


def test_inspect_compares_with_exemplars_that_were_added_before(samples: list[Sample], tmp_path: Path) -> None:
    parts = [sample.image for sample in samples if sample.split != "train"]
    normals = next(sample.image.parent for sample in samples if sample.split == "train")
    nobody = {"RETRIEVAL_ADDRESS": f"127.0.0.1:{free_port()}"}
    added = agentiad("exemplars", "add", normals, "-c", "pin_board", cwd=tmp_path, **nobody)
    assert added.returncode == 0, added.stderr
    result = agentiad("inspect", *parts, "--json", "-c", "pin_board", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    traces = [json.loads((tmp_path / row["trace"]).read_text()) for row in rows_of(result)]
    turns = [turn for trace in traces for turn in trace["trajectory"]["turns"]]
    compared = [turn["observation"] for turn in turns if "exemplar" in turn.get("observation", {})]
    assert compared
    assert all(seen["image"]["uri"] for seen in compared)
    assert {seen["exemplar"]["uri"].rpartition("/")[0] for seen in compared} == {normals.as_uri()}


def test_inspect_says_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    result = agentiad("inspect", tmp_path, "--json", cwd=tmp_path)
    assert result.returncode == 1
    assert "no pictures" in result.stderr


@pytest.mark.parametrize(("data", "count"), [("magnetic_tile", 6), ("deeppcb", 4)])
def test_inspect_reaches_a_verdict_on_real_images(data: str, count: int, tmp_path: Path) -> None:
    if not (SHARED / data).exists():
        pytest.skip(f"{SHARED / data} is not here")
    rows = [json.loads(line) for line in (SHARED / data / "manifest.jsonl").read_text().splitlines()]
    images = [SHARED / data / row["image"] for row in rows[:: len(rows) // count][:count]]
    result = agentiad("inspect", *images, "--json", "--out", tmp_path / "report", "-c", data, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = rows_of(result)
    assert len(found) == count
    assert all(row["decision"] in {"pass", "reject", "review"} and not row["category_known"] for row in found)
    assert "not trained on the category" in result.stderr
    assert len(list((tmp_path / "report" / "evidence").iterdir())) == count


def test_exemplars_are_added_listed_and_removed(samples: list[Sample], tmp_path: Path) -> None:
    normals = next(sample.image.parent for sample in samples if sample.split == "train")
    nobody = {"RETRIEVAL_ADDRESS": f"127.0.0.1:{free_port()}"}
    first = agentiad("exemplars", "add", normals, "-c", "pin_board", cwd=tmp_path, **nobody)
    assert first.returncode == 0, first.stderr
    assert "2 new exemplars" in first.stderr
    again = agentiad("exemplars", "add", normals, "-c", "pin_board", cwd=tmp_path, **nobody)
    assert "0 new exemplars" in again.stderr
    listed = agentiad("exemplars", "list", cwd=tmp_path, **nobody).stdout.splitlines()
    assert [line.split("\t")[0] for line in listed] == ["pin_board"] * 2
    digest = listed[0].split("\t")[1]
    assert agentiad("exemplars", "remove", "-c", "pin_board", cwd=tmp_path, **nobody).returncode == 2
    removed = agentiad("exemplars", "remove", "-c", "pin_board", digest, cwd=tmp_path, **nobody)
    assert "1 exemplars removed" in removed.stderr
    assert len(agentiad("exemplars", "list", cwd=tmp_path, **nobody).stdout.splitlines()) == 1
    elsewhere = f"http://127.0.0.1:{free_port()}"
    other = agentiad("exemplars", "list", cwd=tmp_path, MILVUS_URI=elsewhere, **nobody)
    assert other.returncode == 2
    assert f"Library at {elsewhere}" in other.stderr
    file = agentiad("exemplars", "list", cwd=tmp_path, MILVUS_URI=str(tmp_path / "other.db"), **nobody)
    assert (file.returncode, file.stdout) == (0, "")


def test_config_masks_secrets_and_says_what_is_wrong(tmp_path: Path) -> None:
    good = agentiad("config", cwd=tmp_path, REDIS_URL="redis://:hunter2@127.0.0.1:6379/0", COLUMNS="200")
    assert good.returncode == 0
    assert "REDIS_URL" in good.stdout
    assert "hunter2" not in good.stdout + good.stderr
    bad = agentiad("config", cwd=tmp_path, MAX_IN_FLIGHT="none", BIND="nowhere", COLUMNS="200")
    assert bad.returncode == 2
    assert "MAX_IN_FLIGHT" in bad.stdout
    assert "BIND" in bad.stdout


def test_a_service_with_wrong_settings_says_everything_at_once_and_exits_2(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "services.agent"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "MAX_IN_FLIGHT": "0", "BIND": "nowhere", "THRESHOLD": "7"},
    )  # fmt: skip
    assert result.returncode == 2
    assert {line.split(":")[0] for line in result.stderr.splitlines()} == {"MAX_IN_FLIGHT", "BIND", "THRESHOLD"}


def free_addresses() -> dict[str, str]:
    return {
        name: f"127.0.0.1:{free_port()}" for name in ("POLICY_ADDRESS", "ZOOM_ADDRESS", "RETRIEVAL_ADDRESS", "BIND")
    }


async def ready_stack(folder: Path, agents: int, **environment: str) -> asyncio.subprocess.Process:
    """`agentiad up` that has said that it is ready."""
    up = await asyncio.create_subprocess_exec(
        *AGENTIAD, "up", "--agents", str(agents), "--data-dir", "plant", cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert up.stderr is not None
    while b"Ready." not in (line := await up.stderr.readline()):
        assert line, "the stack ended before it was ready"
    return up


async def test_a_stack_ends_with_its_redis(tmp_path: Path) -> None:
    up = await ready_stack(tmp_path, 1, **free_addresses())
    assert up.stderr is not None
    children = Path(f"/proc/{up.pid}/task/{up.pid}/children").read_text().split()
    (redis,) = (int(pid) for pid in children if "redis" in Path(f"/proc/{pid}/comm").read_text())
    os.kill(redis, signal.SIGKILL)
    rest = await up.stderr.read()
    assert await up.wait() == 1
    assert b"redis ended with status" in rest


async def test_a_plant_on_the_embedded_stack(samples: list[Sample], tmp_path: Path) -> None:
    """up, exemplars add, publish, watch, Ctrl-C: the README's walk."""
    parts = next(sample.image.parents[1] for sample in samples if sample.split != "train")
    addresses = free_addresses()
    up = await ready_stack(tmp_path, 2, IMAGE_ROOTS=str(samples[0].image.parents[3]), **addresses)
    assert up.stderr is not None
    try:
        normals = next(sample.image.parent for sample in samples if sample.split == "train")
        added = await asyncio.to_thread(
            agentiad, "exemplars", "add", normals, "-c", "pin_board", cwd=tmp_path, **addresses
        )
        assert "stack that runs here" in added.stderr
        # From other folders, with the same data.
        data = ("--data-dir", tmp_path / "plant")
        published = await asyncio.to_thread(
            agentiad, "publish", parts, "--line", "L1", "-c", "pin_board", *data, cwd=parts, **addresses
        )
        assert published.returncode == 0, published.stderr
        watched = await asyncio.to_thread(
            agentiad, "watch", "--from-beginning", "--json", "--count", "4", *data, cwd=parts, **addresses
        )
        assert {Path(row["image"]).name for row in rows_of(watched)} == {
            sample.image.name for sample in samples if sample.split != "train"
        }
    finally:
        up.send_signal(signal.SIGINT)
        rest = await up.stderr.read()
    assert await up.wait() == 0, rest.decode()
    assert b"agents finish what they have begun" in rest
