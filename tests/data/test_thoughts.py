"""Thoughts from an endpoint, over the wire: what it writes replaces words alone, and whatever it does is survived."""

import asyncio
import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from services.agent import protocol
from services.data import checks, thoughts
from services.data.demonstrations import Episode
from services.data.endpoint import EndpointDownError, EndpointRefusalError, EndpointSettings
from tests.data.make_sets import (
    GOOD,
    Play,
    Reply,
    Request,
    Server,
    make_completion,
    make_episodes,
    make_server,
    words_of,
)

KINDS = ("scratch", "dent", "spots", "missing", "displaced", "extra", "wrong_element")


def write(episodes: list[Episode], folder: Path, settings: EndpointSettings) -> None:
    asyncio.run(thoughts.write_all(episodes, folder, KINDS, settings, folder / "cache"))


def total(episodes: list[Episode], key: str) -> int:
    return sum(episode.thoughts[key] for episode in episodes)


def reasons(episodes: list[Episode]) -> set[str]:
    return {reason for episode in episodes for reason in episode.thoughts["rejected"]}


def thoughts_in(episodes: list[Episode]) -> list[str]:
    turns = (turn for episode in episodes for turn in episode.trajectory.turns)
    return [thought for thought in map(thoughts.thought_of, turns) if thought is not None]


def play_good(_: Request) -> Reply:
    return make_completion(f"  {GOOD}\n")


def run_with(play: Play, folder: Path, **changes: Any) -> tuple[list[Episode], Server]:
    episodes = make_episodes(folder)
    with make_server(play) as server:
        write(episodes, folder, server.settings(**changes))
    return episodes, server


def test_a_good_answer_replaces_the_words_of_the_thought_alone(tmp_path: Path) -> None:
    before = make_episodes(tmp_path, 24)
    after = copy.deepcopy(before)
    with make_server(play_good) as server:
        write(after, tmp_path, server.settings())
    assert total(after, "written") == len(server.requests) > 24
    assert total(after, "kept") == 0
    assert server.keys == {"Bearer secret"}
    for old, new in zip(before, after, strict=True):
        learns = iter(new.imitate)
        for mine, theirs in zip(new.trajectory.turns, old.trajectory.turns, strict=True):
            if theirs.HasField("generation"):
                learnt = next(learns) and thoughts.thought_of(theirs) is not None
                assert thoughts.thought_of(mine) == (GOOD if learnt else thoughts.thought_of(theirs))
                assert mine.message.segments[-1].text == mine.generation.text
                mine.generation.text = mine.message.segments[-1].text = theirs.generation.text
        assert new.trajectory == old.trajectory
        assert (new.truth, new.imitate, new.views) == (old.truth, old.imitate, old.views)


def test_the_request_shows_the_pictures_so_far_in_three_steps(tmp_path: Path) -> None:
    _, server = run_with(play_good, tmp_path)
    steps = {}
    for request in server.requests:
        assert request["model"] == "writer"
        parts = request["messages"][1]["content"]
        images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        assert all(url.startswith("data:image/png;base64,iVBOR") for url in images)
        steps[parts[-1]["text"].split(":")[0]] = len(images)
    assert steps["Step 1, why compare"] == steps["Step 1, why look here"] == 1
    assert steps["Step 2, what the crop shows"] > 1
    assert steps["Step 3, what the comparison shows"] > 1


def test_the_truth_is_told_where_it_can_be_seen_and_nowhere_else(tmp_path: Path) -> None:
    episodes = make_episodes(tmp_path, 30)
    told: set[tuple[bool, bool]] = set()
    for episode in episodes:
        hidden = copy.deepcopy(episode.truth)
        hidden.anomaly_present = not hidden.anomaly_present
        turns = episode.trajectory.turns
        images = [b"png"] * len(episode.views)
        for index, turn in enumerate(turns):
            if turn.HasField("generation") and thoughts.thought_of(turn) is not None:
                seen = any(earlier.observation.HasField("image") for earlier in turns[:index])
                asked = thoughts.request(turns[: index + 1], episode.truth, images, seen)
                other = thoughts.request(turns[: index + 1], hidden, images, seen)
                known = thoughts.knows(turns[: index + 1], seen)
                assert (asked != other) == known
                told.add((turn.tool_call.name == protocol.QUERY, known))
                if not seen or turn.tool_call.name == protocol.QUERY:
                    assert not known
    assert {(False, True), (False, False), (True, False)} == told


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("The part is defective, so I look closer.", checks.VERDICT),
        ('Look here: {"bbox_2d":[0.1,0.2,0.3,0.4]} it is.', checks.MARKUP),
        ("</think><answer>it is so</answer>", checks.MARKUP),
        ("\ud800 half a character is no text", checks.ENCODING),
    ],
)
def test_a_bad_answer_is_asked_again_twice_and_then_the_template_stays(
    tmp_path: Path, content: str, reason: str
) -> None:
    before = thoughts_in(make_episodes(tmp_path))
    episodes, server = run_with(lambda _: make_completion(content), tmp_path)
    assert thoughts_in(episodes) == before
    assert total(episodes, "written") == 0
    assert reasons(episodes) == {reason}
    assert sum(episode.thoughts["rejected"][reason] for episode in episodes) == 3 * total(episodes, "kept")
    assert len(server.requests) == 3 * total(episodes, "kept")
    last = max((request["messages"] for request in server.requests), key=len)
    assert len(last) == 6
    assert reason in last[-1]["content"]


def test_a_leak_is_mended_when_the_reason_is_told(tmp_path: Path) -> None:
    def play(request: Request) -> Reply:
        if len(request["messages"]) > 2:
            return make_completion(GOOD)
        known = "for you alone" in words_of(request)
        return make_completion("The part is anomalous." if known else "I think there may be a scratch.")

    episodes, _ = run_with(play, tmp_path)
    assert total(episodes, "kept") == 0
    assert reasons(episodes) == {checks.VERDICT, checks.TYPE}
    assert not any("scratch" in thought or "anomalous" in thought for thought in thoughts_in(episodes))


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b'{"choices":[]}', b'{"choices":[{"message":{"content":null}}]}', b"\xff\xfe{"]
)
def test_what_is_no_completion_leaves_the_template(tmp_path: Path, body: bytes) -> None:
    episodes, _ = run_with(lambda _: (200, {}, body), tmp_path)
    assert total(episodes, "written") == 0
    assert reasons(episodes) == {"not a chat completion"}


def test_a_slow_call_ends_at_its_deadline(tmp_path: Path) -> None:
    release = threading.Event()

    def play(_: Request) -> Reply:
        release.wait()
        return make_completion(GOOD)

    episodes = make_episodes(tmp_path, 2)
    with make_server(play) as server:
        try:
            write(episodes, tmp_path, server.settings(deadline=0.2))
        finally:
            release.set()
    assert total(episodes, "written") == 0
    assert reasons(episodes) == {"no answer within the deadline"}


@pytest.mark.parametrize(("status", "headers"), [(429, {"retry-after": "0"}), (503, {}), (500, {})])
def test_a_busy_endpoint_is_asked_again(tmp_path: Path, status: int, headers: dict[str, str]) -> None:
    refused: set[str] = set()

    def play(request: Request) -> Reply:
        body = json.dumps(request)
        if body in refused:
            return make_completion(GOOD)
        refused.add(body)
        return status, headers, b""

    episodes, server = run_with(play, tmp_path)
    assert total(episodes, "kept") == 0
    assert len(server.requests) == 2 * total(episodes, "written")


def test_an_endpoint_that_stays_busy_ends_the_work_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(EndpointDownError, match=r"status 503.*run the same command"):
        run_with(lambda _: (503, {}, b""), tmp_path, tries=2)


def test_an_endpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with make_server(play_good) as server:
        gone = server.settings()
    with pytest.raises(EndpointDownError, match=rf"{gone.url}/chat/completions cannot be used"):
        write(make_episodes(tmp_path, 1), tmp_path, gone)


def test_a_refused_key_is_said_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(EndpointRefusalError, match=r"answers 401: who are you.*THOUGHTS_API_KEY") as raised:
        run_with(lambda _: (401, {}, b"who are you"), tmp_path)
    assert "secret" not in str(raised.value)


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    first, server = run_with(play_good, tmp_path)
    again = make_episodes(tmp_path)
    with make_server(play_good) as other:
        write(again, tmp_path, other.settings())
    assert server.requests
    assert not other.requests
    assert [episode.line() for episode in again] == [episode.line() for episode in first]
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "cache").iterdir())


def test_calls_are_bounded(tmp_path: Path) -> None:
    lock, both = threading.Lock(), threading.Barrier(2)
    asked, now, most = 0, 0, 0

    def play(_: Request) -> Reply:
        nonlocal asked, now, most
        with lock:
            asked, now = asked + 1, now + 1
            most, first = max(most, now), asked <= 2
        if first:
            both.wait(30)
        with lock:
            now -= 1
        return make_completion(GOOD)

    run_with(play, tmp_path, concurrency=2)
    assert most == 2
