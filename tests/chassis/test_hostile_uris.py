"""What the image store answers to hostile addresses and claims: each case by name, with its documented outcome."""

import hashlib
from pathlib import Path

import fsspec
import pytest

from agentiad.v1.trajectory_pb2 import Image, ImageReference
from services.chassis.decoding import ImageLimits
from services.chassis.errors import BadInput, NotFound
from services.chassis.images import ImageStore
from tests.chassis.hostile import MAX_BYTES, UPRIGHT, Outcome, Refused, check, make_site
from tests.chassis.make_images import make_bytes

# A pipe that is opened would block until this.
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path)


@pytest.fixture
def store(site: Path) -> ImageStore:
    return ImageStore([str(site)], None, ImageLimits(max_bytes=MAX_BYTES))


def make_reference(uri: str, data: bytes, **changes: object) -> ImageReference:
    fields = {
        "uri": uri,
        "sha256": hashlib.sha256(data).hexdigest(),
        "media_type": "image/png",
        "width": 48,
        "height": 32,
    }
    return ImageReference(**{**fields, **changes})  # type: ignore[arg-type]


OUTSIDE = Refused(BadInput, "outside the image roots")
MISSING = Refused(NotFound, "not found")
NO_SCHEME = Refused(BadInput, "no image root has it")
NOT_URI = Refused(BadInput, "not a URI")
CONTROL = Refused(BadInput, "control characters")

# {root} is the allowed folder.
URIS: dict[str, tuple[str, Outcome]] = {
    "good": ("file://{root}/good.png", UPRIGHT),
    "capital scheme": ("FILE://{root}/good.png", UPRIGHT),
    "localhost": ("file://localhost{root}/good.png", UPRIGHT),
    "one slash": ("file:{root}/good.png", UPRIGHT),
    "four slashes": ("file:///{root}/good.png", UPRIGHT),
    "missing": ("file://{root}/nothing.png", MISSING),
    "a file taken for a folder": ("file://{root}/good.png/more.png", MISSING),
    "no scheme": ("{root}/good.png", NOT_URI),
    "relative path": ("good.png", NOT_URI),
    "empty": ("", NOT_URI),
    "folder": ("file://{root}/sub", Refused(BadInput, "not a regular file")),
    "the root itself": ("file://{root}", OUTSIDE),
    "outside": ("file:///etc/passwd", OUTSIDE),
    "a root's name and more": ("file://{root}-evil/secret.png", OUTSIDE),
    "other case": ("file://{ROOT}/good.png", OUTSIDE),
    "..": ("file://{root}/../outside/secret.png", OUTSIDE),
    ".. and back": ("file://{root}/../root/good.png", UPRIGHT),
    ".. through a folder": ("file://{root}/sub/../good.png", UPRIGHT),
    "encoded ..": ("file://{root}/%2e%2e/outside/secret.png", OUTSIDE),
    "encoded slash": ("file://{root}/..%2foutside%2fsecret.png", OUTSIDE),
    "encoded twice": ("file://{root}/%252e%252e/outside/secret.png", MISSING),
    "decoded once only": ("file://{root}/good%252epng", UPRIGHT),
    "many ..": ("file://{root}" + "/.." * 40 + "/etc/passwd", OUTSIDE),
    "backslashes are no slashes": ("file://{root}/..\\outside\\secret.png", MISSING),
    ".. through a symlinked folder": ("file://{root}/link-folder/../outside/secret.png", OUTSIDE),
    "symlink inside": ("file://{root}/link-inside.png", UPRIGHT),
    "symlink out of the root": ("file://{root}/link-outside.png", OUTSIDE),
    "absolute symlink": ("file://{root}/link-absolute.png", OUTSIDE),
    "symlinked folder": ("file://{root}/link-folder/secret.png", OUTSIDE),
    "symlink to a device": ("file://{root}/link-device.png", OUTSIDE),
    "symlink to itself": ("file://{root}/link-loop.png", Refused(BadInput, "not a regular file")),
    "dangling symlink": ("file://{root}/link-dangling.png", MISSING),
    "FIFO": ("file://{root}/fifo.png", Refused(BadInput, "not a regular file")),
    "symlink to a FIFO": ("file://{root}/link-fifo.png", Refused(BadInput, "not a regular file")),
    "socket": ("file://{root}/socket.png", Refused(BadInput, "not a regular file")),
    "empty file": ("file://{root}/empty.png", Refused(BadInput, "empty file")),
    "a terabyte": ("file://{root}/huge.png", Refused(BadInput, "more than the limit")),
    "name of 300 letters": ("file://{root}/" + "x" * 300, Refused(BadInput, "File name too long")),
    "address of 5,000 letters": ("file://{root}/" + "x" * 5000, Refused(BadInput, "at most 4096 characters")),
    "zero byte": ("file://{root}/good.png\0.txt", CONTROL),
    "encoded zero byte": ("file://{root}/good.png%00.txt", CONTROL),
    "line break": ("file://{root}/go\nod.png", CONTROL),
    "encoded line break": ("file://{root}/good.png%0aforged log line", CONTROL),
    "blank in front": (" file://{root}/good.png", Refused(BadInput, "outer blanks")),
    "blank behind": ("file://{root}/good.png ", Refused(BadInput, "outer blanks")),
    "another host": ("file://evil.example{root}/good.png", Refused(BadInput, "names no host")),
    "user in a file URI": ("file://me@localhost{root}/good.png", Refused(BadInput, "names no host")),
    "broken host": ("file://[{root}/good.png", Refused(BadInput, "malformed")),
    "query": ("file://{root}/good.png?x=1", Refused(BadInput, "percent-encoded")),
    "fragment": ("file://{root}/good.png#x", Refused(BadInput, "percent-encoded")),
    "relative file URI": ("file:good.png", Refused(BadInput, "absolute path")),
    "stray percent sign": ("file://{root}/100%.png", UPRIGHT),
    "UTF-8 in the name": ("file://{root}/gr%C3%B6%C3%9Fe%201%232%3F.png", UPRIGHT),
    "name that is not UTF-8": ("file://{root}/%e9t%e9.png", UPRIGHT),
    "missing name that is not UTF-8": ("file://{root}/%ff.png", MISSING),
    "colon in the name": ("file://{root}/a:b.png", UPRIGHT),
    "unknown scheme": ("gopher://host/good.png", NO_SCHEME),
    "http": ("http://169.254.169.254/latest/meta-data/", NO_SCHEME),
    "https": ("https://example.com/good.png", NO_SCHEME),
    "data": ("data:image/png;base64,iVBORw0KGgo=", NO_SCHEME),
    "javascript": ("javascript:alert(1)", NO_SCHEME),
    "s3 without a root there": ("s3://bucket/good.png", NO_SCHEME),
    "memory without a root there": ("memory://good.png", NO_SCHEME),
    "fsspec chain": ("simplecache::file://{root}/good.png", NO_SCHEME),
    "fsspec chain behind a file": ("file://{root}/good.png::zip://x", NO_SCHEME),
    "local, fsspec's other name for file": ("local://{root}/good.png", NO_SCHEME),
}


@pytest.mark.parametrize("name", URIS)
def test_uris(name: str, store: ImageStore, site: Path) -> None:
    template, outcome = URIS[name]
    uri = template.replace("{root}", str(site)).replace("{ROOT}", str(site).upper())
    check(lambda: store.load(Image(reference=make_reference(uri, make_bytes()))), outcome)


MEMORY: dict[str, tuple[str, Outcome]] = {
    "good": ("memory://bucket/in/good.png", UPRIGHT),
    "missing": ("memory://bucket/in/nothing.png", MISSING),
    "outside the prefix": ("memory://bucket/secret.png", OUTSIDE),
    "a root's name and more": ("memory://bucket/in-evil/secret.png", OUTSIDE),
    "..": ("memory://bucket/in/../secret.png", Refused(BadInput, "'..' are not allowed")),
    "encoded ..": ("memory://bucket/in/%2e%2e/secret.png", Refused(BadInput, "'..' are not allowed")),
    "folder": ("memory://bucket/in/sub", Refused(BadInput, "not a file")),
    "empty": ("memory://bucket/in/empty.png", Refused(BadInput, "empty file")),
    "over the limit": ("memory://bucket/in/huge.png", Refused(BadInput, "more than the limit")),
    "local file": ("file:///etc/passwd", NO_SCHEME),
}


@pytest.mark.parametrize("name", MEMORY)
def test_uris_of_an_object_store(name: str) -> None:
    files = fsspec.filesystem("memory")
    for key in ("in/good.png", "in/sub/deep.png", "secret.png", "in-evil/secret.png"):
        files.pipe_file(f"/bucket/{key}", make_bytes())
    files.pipe_file("/bucket/in/empty.png", b"")
    files.pipe_file("/bucket/in/huge.png", bytes(MAX_BYTES + 1))
    store = ImageStore(["memory://bucket/in"], None, ImageLimits(max_bytes=MAX_BYTES))
    uri, outcome = MEMORY[name]
    check(lambda: store.load(Image(reference=make_reference(uri, make_bytes()))), outcome)


CLAIMS: dict[str, tuple[dict[str, object], Outcome]] = {
    "all right": ({}, UPRIGHT),
    "wrong sha256": ({"sha256": "0" * 64}, Refused(BadInput, "another sha256")),
    "no sha256": ({"sha256": ""}, Refused(BadInput, "64 lower-case")),
    "short sha256": ({"sha256": "abc"}, Refused(BadInput, "64 lower-case")),
    "capital sha256": (
        {"sha256": hashlib.sha256(make_bytes()).hexdigest().upper()},
        Refused(BadInput, "64 lower-case"),
    ),
    "sha256 with a line break": ({"sha256": "0" * 64 + "\n"}, Refused(BadInput, "64 lower-case")),
    "wrong media type": (
        {"media_type": "image/jpeg"},
        Refused(BadInput, "is image/png, the reference says image/jpeg"),
    ),
    "media type that is not accepted": ({"media_type": "image/gif"}, Refused(BadInput, "'image/gif' is not accepted")),
    "no media type": ({"media_type": ""}, Refused(BadInput, "is not accepted")),
    "media type of many letters": ({"media_type": "x" * 9999}, Refused(BadInput, "is not accepted")),
    "wrong width": ({"width": 49}, Refused(BadInput, "is 48×32 pixels, the reference says 49×32")),
    "wrong height": ({"height": 31}, Refused(BadInput, "the reference says 48×31")),
    "width and height swapped": ({"width": 32, "height": 48}, Refused(BadInput, "the reference says 32×48")),
    "no size": ({"width": 0, "height": 0}, Refused(BadInput, "the reference says 0×0")),
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", CLAIMS)
def test_claims_of_a_reference(name: str, cached: bool, store: ImageStore, site: Path) -> None:
    changes, outcome = CLAIMS[name]
    uri = (site / "good.png").as_uri()
    if cached:
        store.load(Image(reference=make_reference(uri, make_bytes())))
    check(lambda: store.load(Image(reference=make_reference(uri, make_bytes(), **changes))), outcome)


def test_a_cached_picture_is_not_shown_from_outside_the_roots(store: ImageStore, site: Path) -> None:
    store.load(Image(reference=make_reference((site / "good.png").as_uri(), make_bytes())))
    outside = make_reference((site.parent / "outside/secret.png").as_uri(), make_bytes())
    check(lambda: store.load(Image(reference=outside)), OUTSIDE)


def test_no_source(store: ImageStore) -> None:
    check(lambda: store.load(Image()), Refused(BadInput, "neither a reference nor content"))


def test_no_roots_allow_nothing(site: Path) -> None:
    check(
        lambda: ImageStore([]).load(Image(reference=make_reference(f"file://{site}/good.png", make_bytes()))), NO_SCHEME
    )


def test_a_device_under_a_root_is_not_opened() -> None:
    check(
        lambda: ImageStore(["/dev"]).load(Image(reference=make_reference("file:///dev/zero", make_bytes()))),
        Refused(BadInput, "not a regular file"),
    )
