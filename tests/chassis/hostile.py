"""How the tables of hostile input state what must come out, and the folder that they play in."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image as PilImage

from tests.chassis.make_images import corners, make_bytes

MAX_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Refused:
    error: type[Exception]
    fragment: str


@dataclass(frozen=True)
class Accepted:
    """The upright size; the corners' colours, where make_picture was used; a pixel in the middle, within 2."""

    size: tuple[int, int] = (48, 32)
    corners: str | None = None
    pixel: tuple[int, int, int] | None = None


Outcome = Refused | Accepted
UPRIGHT = Accepted(corners="rgbw")


def check(load: Callable[[], PilImage.Image], outcome: Outcome) -> None:
    if isinstance(outcome, Refused):
        with pytest.raises(outcome.error) as raised:
            load()
        assert type(raised.value) is outcome.error
        assert outcome.fragment in str(raised.value)
        assert str(raised.value).isprintable()
        return
    image = load()
    assert (image.mode, image.size) == ("RGB", outcome.size)
    if outcome.corners:
        assert corners(image) == outcome.corners
    if outcome.pixel:
        middle = image.getpixel((image.width // 2, image.height // 2))
        assert middle == pytest.approx(outcome.pixel, abs=2)


def make_site(tmp_path: Path) -> Path:
    """An allowed root with good pictures and every kind of thing that can lie in a folder; secrets beside it."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    (tmp_path / "root-evil").mkdir()
    for path in ("root/good.png", "root/sub/deep.png", "outside/secret.png", "root-evil/secret.png"):
        (tmp_path / path).write_bytes(make_bytes())
    for name in ("größe 1#2?.png", "100%.png", "good%2epng", "a:b.png"):
        (root / name).write_bytes(make_bytes())
    Path(os.fsdecode(os.fsencode(root) + b"/\xe9t\xe9.png")).write_bytes(make_bytes())
    (root / "empty.png").touch()
    with (root / "huge.png").open("wb") as file:
        file.truncate(2**40)
    os.mkfifo(root / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket.png"))
    for link, target in {
        "link-inside.png": "good.png",
        "link-outside.png": "../outside/secret.png",
        "link-absolute.png": "/etc/hostname",
        "link-folder": "../outside",
        "link-device.png": "/dev/zero",
        "link-loop.png": "link-loop.png",
        "link-dangling.png": "nothing.png",
        "link-fifo.png": "fifo.png",
    }.items():
        (root / link).symlink_to(target)
    return root
