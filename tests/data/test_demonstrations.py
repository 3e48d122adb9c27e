"""What was stored is read back as it was, and what cannot be read is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from services.data import demonstrations, source
from services.data.demonstrations import EPISODES, MANIFEST, StoredSet
from services.data.readers import BadDataError
from tests.data.make_sets import make_episodes, make_source


def make_set(folder: Path, count: int = 4, samples: int = 4) -> Path:
    lines = "".join(f"{episode.line()}\n" for episode in make_episodes(folder, count))
    (folder / EPISODES).write_text(lines)
    manifest = {"samples": samples, "view": "composite", "labels": ["mark"], "categories": ["woven"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_a_stored_demonstration_is_the_demonstration(tmp_path: Path) -> None:
    stored = StoredSet(make_set(tmp_path, 12, 12))
    assert len(stored) == 12
    for index in range(12):
        demo = source.demonstration(index, make_source())
        again = stored[index]
        assert again.trajectory == demo.trajectory
        assert again.truth == demo.truth
        assert again.imitate == demo.imitate
        assert [view.marks for view in again.views] == [view.marks for view in demo.views]
        for mine, theirs in zip(again.views, demo.views, strict=True):
            assert np.array_equal(np.asarray(mine.image), np.asarray(theirs.image))


def test_a_torn_line_is_cut(tmp_path: Path) -> None:
    path = make_set(tmp_path) / EPISODES
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"trajectory":')
    assert demonstrations.cut_torn_line(path) == 4
    assert path.read_bytes() == whole
    assert demonstrations.cut_torn_line(path) == 4


def test_an_unfinished_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="4 of 5 episodes"):
        StoredSet(make_set(tmp_path, samples=5))


def test_a_line_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = make_set(tmp_path) / EPISODES
    lines = path.read_text().splitlines()
    lines[1] = '{"trajectory":{"turns":7}}'
    sha256 = json.loads(lines[2])["views"][0]["sha256"]
    lines[3] = lines[3].replace(json.loads(lines[3])["views"][0]["sha256"], "../../secret")
    path.write_text("\n".join(lines) + "\n")
    demonstrations.image_path(tmp_path, sha256).unlink()
    stored = StoredSet(tmp_path)
    assert stored[0].views
    with pytest.raises(BadDataError, match="line 2"):
        stored[1]
    with pytest.raises(BadDataError, match=f"line 3: .*{sha256}"):
        stored[2]
    with pytest.raises(BadDataError, match=r"line 4: .*no digest"):
        stored[3]


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"samples":4,"view":"odd","labels":[],"categories":[]}'])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, manifest: str) -> None:
    (make_set(tmp_path) / MANIFEST).write_text(manifest)
    with pytest.raises(BadDataError, match=MANIFEST):
        StoredSet(tmp_path)
