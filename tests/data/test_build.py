"""`data build` from end to end: a kill loses nothing, another command line is refused, the end is summed up."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.data import demonstrations, source
from services.data.__main__ import app
from services.data.build import ANSWERS, OccupiedError, build
from services.data.demonstrations import EPISODES, IMAGES
from services.data.endpoint import EndpointDownError
from services.data.procedural import write_set
from services.data.readers import BadDataError
from tests.data.make_sets import GOOD, Reply, Request, make_completion, make_server, make_settings


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "set"
    build(make_settings(folder, 120))
    return folder


def test_a_set_is_summed_up(tmp_path: Path) -> None:
    heard: list[int] = []
    summary = build(make_settings(tmp_path / "set", 21), done=heard.append)
    assert heard == [0, 21]
    assert summary.episodes == 21
    assert 0 < summary.anomalous < 21
    assert summary.perceptive > 0
    assert summary.comparative > 0
    assert (summary.written, summary.kept) == (0, 0)


def test_images_are_named_by_their_digest(built: Path) -> None:
    shown = {view.sha256 for episode in demonstrations.read_episodes(built) for view in episode.views}
    assert {path.stem for path in (built / IMAGES).iterdir()} == shown


def test_a_killed_build_goes_on_to_the_same_set(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    command = [sys.executable, "-m", "services.data", "build", "--out", str(folder), "--samples", "120", "--seed", "3"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not (folder / EPISODES).exists() or not (folder / EPISODES).stat().st_size:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = (folder / EPISODES).read_bytes()
    (folder / EPISODES).write_bytes(lines[:-7])  # as if the kill had come in the middle of the last line
    heard: list[int] = []
    build(make_settings(folder, 120), done=heard.append)
    assert heard[0] == lines.count(b"\n") - 1 > 0
    assert (folder / EPISODES).read_bytes() == (built / EPISODES).read_bytes()


def test_another_command_line_is_refused(built: Path) -> None:
    for changes in ({"view": "side-by-side"}, {"thoughts_model": "writer"}, {"samples": 121}):
        with pytest.raises(OccupiedError, match="other settings"):
            build(make_settings(built, **{"samples": 120, **changes}))
    assert build(make_settings(built, 120)).episodes == 120


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OccupiedError, match="something else"):
        build(make_settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_builds_never_write_at_once(built: Path) -> None:
    with (built / EPISODES).open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OccupiedError, match="another process"):
            build(make_settings(built, 120))


def test_a_built_set_is_no_data_to_build_from(built: Path, tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="built set already"):
        build(make_settings(tmp_path / "set", data=str(built)))


def test_a_set_on_disk_is_built_from_its_boxes(tmp_path: Path) -> None:
    write_set(tmp_path / "data", ("woven", "pin_board"), per_category=4, variants_per_category=2)
    settings = make_settings(tmp_path / "set", 12, data=str(tmp_path / "data"), view="side-by-side")
    assert build(settings).episodes == 12
    stored = demonstrations.StoredSet(settings.out)
    assert stored.categories == ("pin_board", "woven")
    assert stored.labels == source.labels(settings.source())
    assert stored[5].trajectory == source.demonstration(5, settings.source()).trajectory


def test_written_thoughts_are_counted_over_all_runs(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "set", thoughts_model="writer")

    def play(request: Request) -> Reply:
        first = len(request["messages"]) == 2
        return make_completion("It is 12 px wide, I think." if first else GOOD)

    with make_server(play) as server:
        gone = server.settings()
        summary = build(settings, server.settings())
    assert summary.written > 6
    assert summary.kept == 0
    assert sum(summary.rejected.values()) == summary.written
    # Nothing is left to ask: the endpoint may be gone.
    (settings.out / EPISODES).write_bytes(b"")
    assert build(settings, gone) == summary


def test_an_endpoint_that_goes_away_costs_nothing(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "set", thoughts_model="writer")
    answered = 0

    def play(_: Request) -> Reply:
        nonlocal answered
        answered += 1
        return make_completion(GOOD) if answered <= 3 else (503, {}, b"")

    with make_server(play) as server, pytest.raises(EndpointDownError):
        build(settings, server.settings(concurrency=1, tries=1))
    assert len(list((settings.out / ANSWERS).iterdir())) == 3
    with make_server(lambda _: make_completion(GOOD)) as server:
        summary = build(settings, server.settings())
    assert len(server.requests) == summary.written - 3


def test_the_command_says_what_it_built(tmp_path: Path) -> None:
    with make_server(lambda _: make_completion("It is normal.")) as server:
        arguments = ["build", "--out", str(tmp_path / "set"), "--samples", "4", "--thoughts-url", server.url]
        result = CliRunner().invoke(app, [*arguments, "--thoughts-model", "writer"], env={"THOUGHTS_API_KEY": "secret"})
    assert result.exit_code == 0
    assert server.keys == {"Bearer secret"}
    words = " ".join(result.output.split())
    assert "4 episodes" in words
    assert "perceptive" in words
    assert "0 written" in words
    assert "x It must not state the verdict." in words
    assert CliRunner().invoke(app, arguments).exit_code == 2
