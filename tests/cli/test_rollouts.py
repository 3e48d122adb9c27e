"""Rollouts of a run as a page: what was done, what it was worth, what the truth was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.reward_pb2 import Reward
from services.chassis.errors import BadInput
from services.chassis.images import ImageStore
from services.cli.rollouts import as_inspection, write_page
from services.trainer.journal import Journal
from tests.cli.inspections import NORMAL, Script, make_truth, make_verdict
from tests.cli.test_page import ATTACK, Page

DENT = (0.2, 0.2, 0.3, 0.3)
SEEN = "#01F002"


@dataclass(kw_only=True)
class StoredScript(Script):
    """Its pictures lie in a store, where the page finds them."""

    store: ImageStore

    def _put(self, uri: str, image: Image.Image) -> pb.ImageReference:
        return self.store.put(image)


def make_scored(
    trajectory: pb.Trajectory, member: int, truth: pb.GroundTruth, **components: float
) -> events_pb2.TrajectoryScored:
    completed = events_pb2.TrajectoryCompleted(
        event_id=f"e{member}", group_id="g7", member=member, group_size=8, ground_truth=truth, trajectory=trajectory
    )
    reward = Reward(total=sum(components.values()), components=components, preset="gated-format")
    return events_pb2.TrajectoryScored(event_id=f"s{member}", completed=completed, reward=reward)


def make_run(folder: Path) -> Path:
    """A step with two rollouts of a dented part: one zooms and finds it, the other passes it at first sight."""
    store = ImageStore([], str(folder / "images"))
    truth = make_truth("dent", DENT)
    good = StoredScript(store=store)
    good.crop("a dark smudge", (0.1, 0.1, 0.5, 0.5), Image.new("RGB", (224, 224), SEEN))
    good.trajectory.turns[2].forced_anomaly_probability = 0.31
    good.answer("sharp edges", make_verdict("dent", DENT), 0.93)
    bad = StoredScript(store=store)
    bad.answer("fine", NORMAL, 0.62)  # sampled against the odds
    journal = Journal(folder / "run", 10)
    journal.keep(
        1,
        [
            make_scored(good.trajectory, 0, truth, verdict=1.0, tools=0.25),
            make_scored(bad.trajectory, 1, truth, verdict=0.0, tools=-0.125),
        ],
    )
    journal.close()
    return folder / "run"


def read_page(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def pixels(picture: Path, colour: tuple[int, int, int]) -> int:
    """How many are nearly of the colour; JPEG changes them a little."""
    with Image.open(picture) as image:
        return int((np.abs(np.asarray(image, dtype=int) - colour).max(axis=2) < 12).sum())


def test_the_page_tells_what_was_done_and_what_it_was_worth(tmp_path: Path) -> None:
    out = tmp_path / "page"
    assert write_page(make_run(tmp_path), out, [str(tmp_path / "images")]) == 2
    page = read_page(out / "index.html")
    (good_kinds, good), (bad_kinds, bad) = page.articles
    assert good_kinds == ["reject"]
    for words in (
        "step 1", "reward 1.25", "reward: verdict", "+1.000", "reward: tools", "+0.250", "gated-format",
        "g7, member 1 of 8", "Asked to answer instead: score 0.310", "0.930", "truth: dent", "a dark smudge",
    ):  # fmt: skip
        assert words in good, words
    assert bad_kinds == ["pass", "wrong"]
    assert "reward -0.12" in bad
    assert "0.620" in bad
    assert "Asked to answer instead" not in bad
    assert "threshold" not in page.text
    assert "2rollouts" in page.text


def test_pictures_and_traces_lie_beside_the_page(tmp_path: Path) -> None:
    out = tmp_path / "page"
    write_page(make_run(tmp_path), out, [str(tmp_path / "images")])
    page = read_page(out / "index.html")
    for link in page.all("a"):
        assert (out / str(link["href"])).is_file()
    pictures = [out / str(image["src"]) for image in page.all("img")]
    assert [pixels(picture, (1, 240, 2)) > 40_000 for picture in pictures] == [True, False]
    trace = json.loads((out / "traces/000001-0.json").read_text())
    assert trace["reward"]["total"] == 1.25
    assert len(trace["completed"]["trajectory"]["turns"]) == 5


def test_pictures_outside_the_roots_are_not_shown(tmp_path: Path) -> None:
    out = tmp_path / "page"
    assert write_page(make_run(tmp_path), out, [str(tmp_path / "run")]) == 2
    assert pixels(out / "evidence/000001-0.jpg", (1, 240, 2)) == 0


def test_hostile_words_of_a_rollout_are_only_words(tmp_path: Path) -> None:
    script = Script(category=ATTACK, name=ATTACK.replace("/", "_"))
    script.answer(ATTACK, NORMAL, 0.1)
    scored = make_scored(script.trajectory, 0, make_truth(ATTACK, DENT), **{ATTACK: 1.0})
    scored.reward.preset = scored.completed.group_id = ATTACK
    journal = Journal(tmp_path, 1)
    journal.keep(1, [scored])
    journal.close()
    write_page(tmp_path, tmp_path / "page", [])
    page = read_page(tmp_path / "page/index.html")
    assert page.all("script") == []
    assert page.text.count("<script>alert(1)</script>{{ 7 * 7 }}") >= 5
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_a_folder_without_rollouts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no rollouts"):
        write_page(tmp_path, tmp_path / "page", [])
    assert not (tmp_path / "page").exists()


def test_the_decision_is_the_answer_whatever_the_score() -> None:
    script = Script()
    script.answer("fine", NORMAL, 0.9)
    scored = make_scored(script.trajectory, 0, pb.GroundTruth())
    assert as_inspection(scored).decision == events_pb2.DECISION_PASS
    assert as_inspection(scored).raw_score == pytest.approx(0.9)
    unfinished = as_inspection(make_scored(Script().trajectory, 0, pb.GroundTruth()))
    assert unfinished.decision == events_pb2.DECISION_UNSPECIFIED
    assert not unfinished.HasField("raw_score")


def test_the_latency_is_that_of_the_episode() -> None:
    trajectory = Script().trajectory
    trajectory.started_at.FromSeconds(100)
    trajectory.ended_at.FromSeconds(103)
    assert as_inspection(make_scored(trajectory, 0, pb.GroundTruth())).latency.seconds == 3
