"""Logs of a real process: a JSON object a line, on stderr only."""

import asyncio
import json
import subprocess
import sys
from typing import Any

from services.chassis import telemetry


def lines_of(script: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", "from services.chassis import telemetry\n" + script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_a_line_names_service_event_and_episode() -> None:
    [line] = lines_of(
        "telemetry.configure('zoom')\n"
        "with telemetry.bind(event_id='e-1', episode_id='p-1'):\n"
        "    telemetry.log.info('cropped', box=[0, 1], text='two\\nlines é')\n"
    )
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "service": "zoom",
        "event": "cropped",
        "level": "info",
        "event_id": "e-1",
        "episode_id": "p-1",
        "box": [0, 1],
        "text": "two\nlines é",
    }


def test_the_level_holds_for_libraries_too() -> None:
    lines = lines_of(
        "import logging, warnings\n"
        "telemetry.configure('zoom', 'WARNING')\n"
        "telemetry.log.info('quiet')\n"
        "logging.getLogger('kafka').info('quiet')\n"
        "with telemetry.bind(event_id='e-1'):\n"
        "    logging.getLogger('kafka').warning('broker %s is away', 1)\n"
        "warnings.warn('odd')\n"
    )
    assert [(line["level"], line["logger"]) for line in lines] == [("warning", "kafka"), ("warning", "py.warnings")]
    assert lines[0]["event"] == "broker 1 is away"
    assert lines[0]["service"] == "zoom"
    assert lines[0]["event_id"] == "e-1"


def test_an_exception_is_one_line() -> None:
    [line] = lines_of("try:\n    1 / 0\nexcept ZeroDivisionError:\n    telemetry.log.exception('oh')\n")
    assert "ZeroDivisionError" in line["exception"]


async def test_ids_belong_to_their_task() -> None:
    async def one(name: str) -> dict[str, str]:
        with telemetry.bind(event_id=name):
            await asyncio.sleep(0)
            with telemetry.bind(episode_id=f"{name}/1"):
                await asyncio.sleep(0)
                return telemetry.current_ids()

    assert await asyncio.gather(*map(one, "abc")) == [{"event_id": n, "episode_id": f"{n}/1"} for n in "abc"]
    assert telemetry.current_ids() == {}


async def test_adopted_ids_end_with_the_task() -> None:
    async def adopt() -> dict[str, str]:
        telemetry.adopt({"event_id": "e-1"})
        return telemetry.current_ids()

    assert await asyncio.create_task(adopt()) == {"event_id": "e-1"}
    assert telemetry.current_ids() == {}
