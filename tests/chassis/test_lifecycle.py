"""A process from start to stop: real processes, real signals."""

import json
import signal
import subprocess
import sys

import pytest

BODY = """
import asyncio, sys
from services.chassis import lifecycle

async def main(stop):
{body}

lifecycle.run(main)
"""


def start(*lines: str) -> subprocess.Popen[str]:
    body = "\n".join(f"    {line}" for line in lines)
    return subprocess.Popen(
        [sys.executable, "-c", BODY.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_gracefully(number: signal.Signals) -> None:
    process = start("print('up', flush=True)", "await stop.wait()", "print('closed')")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "closed\n")
    assert json.loads(err)["signal"] == number.name


def test_a_signal_during_slow_imports_is_kept() -> None:
    process = start(
        "print('importing', flush=True)",
        "sys.stdin = __import__('time').sleep(0.5)",
        "await stop.wait()",
        "print('closed')",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "closed\n")


def test_the_end_of_main_is_the_end() -> None:
    process = start("pass")
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


def test_a_crash_is_logged_and_tells() -> None:
    process = start("raise KeyError('what')")
    _, err = process.communicate(timeout=30)
    line = json.loads(err)
    assert process.returncode == 1
    assert (line["level"], line["event"]) == ("critical", "crashed")
    assert "KeyError: 'what'" in line["exception"]


def test_an_exit_status_passes() -> None:
    process = start("sys.exit(2)")
    process.communicate(timeout=30)
    assert process.returncode == 2
