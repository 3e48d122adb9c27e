"""The image store on good pictures: writing, describing, regions, the cache."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from agentiad.v1.trajectory_pb2 import Image
from services.chassis.decoding import ImageLimits
from services.chassis.errors import BadInput, NotFound, Transient
from services.chassis.images import ImageStore, make_image_store
from services.chassis.settings import ImageSettings
from tests.chassis.make_images import corners, encode, make_bytes, make_noise, make_picture, make_turned


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore([], str(tmp_path / "store"))


def write(store: ImageStore, tmp_path: Path, data: bytes) -> Image:
    path = tmp_path / "store" / "input.img"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return Image(reference=store.describe(path))


def test_put_then_load_gives_the_same_pixels(store: ImageStore, tmp_path: Path) -> None:
    picture = make_noise(60, 40)
    reference = store.put(picture)
    assert reference.uri == (tmp_path / f"store/{reference.sha256[:2]}/{reference.sha256}.png").as_uri()
    assert (reference.width, reference.height, reference.media_type) == (60, 40, "image/png")
    assert np.array_equal(store.load(Image(reference=reference)), picture)
    assert store.describe(reference.uri) == reference


def test_put_twice_writes_once_and_leaves_nothing_else(store: ImageStore, tmp_path: Path) -> None:
    first = store.put(make_picture())
    [path] = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    written = path.stat().st_mtime_ns, path.stat().st_ino
    assert store.put(make_picture()) == first
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == [path]


def test_put_mends_a_file_that_a_power_cut_left_empty(store: ImageStore) -> None:
    reference = store.put(make_picture())
    Path(reference.uri.removeprefix("file://")).write_bytes(b"")
    store.put(make_picture())
    assert corners(store.load(Image(reference=reference))) == "rgbw"


def test_put_from_many_threads(store: ImageStore, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        references = list(pool.map(lambda seed: store.put(make_noise(32, 32, seed % 2)), range(32)))
    assert len({reference.sha256 for reference in references}) == 2
    assert len([path for path in (tmp_path / "store").rglob("*") if path.is_file()]) == 2


def test_put_does_not_write_the_orientation_of_its_source(store: ImageStore) -> None:
    source = store.load(Image(content=make_turned("JPEG", 6)))
    assert corners(store.load(Image(reference=store.put(source)))) == corners(source)
    turned = PilImage.open(BytesIO(make_turned("PNG", 6)))
    turned.load()
    assert corners(store.load(Image(reference=store.put(turned)))) == "rgbw"


def test_put_refuses_what_could_not_be_read_again(store: ImageStore) -> None:
    with pytest.raises(BadInput, match="a side must have 8"):
        store.put(make_picture(7, 30))


def test_put_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Transient, match="cannot be written"):
        ImageStore([], str(tmp_path / "file")).put(make_picture())


def test_put_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="IMAGE_STORE"):
        ImageStore([str(tmp_path)]).put(make_picture())


def test_an_object_store(tmp_path: Path) -> None:
    store = ImageStore([], "memory://images/out")
    reference = store.put(make_picture())
    assert reference.uri.startswith("memory://images/out/")
    assert corners(store.load(Image(reference=reference))) == "rgbw"
    assert store.describe(reference.uri) == reference
    missing = type(reference)()
    missing.CopyFrom(reference)
    missing.uri += "x"
    with pytest.raises(NotFound):
        ImageStore(["memory://images"]).load(Image(reference=missing))


def test_describe_takes_paths(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "größe 1#2?.jpg").write_bytes(make_turned("JPEG", 6))
    monkeypatch.chdir(folder)
    described = store.describe("größe 1#2?.jpg")
    assert described == store.describe(folder / "größe 1#2?.jpg") == store.describe(described.uri)
    assert described.uri.isascii()
    assert (described.width, described.height, described.media_type) == (32, 48, "image/jpeg")
    assert store.read(described) == (folder / "größe 1#2?.jpg").read_bytes()


@pytest.mark.parametrize(
    ("path", "fragment"), [("../x.png", "outside"), ("nothing.png", "not found"), ("a\0b", "control")]
)
def test_describe_of_bad_paths(
    path: str, fragment: str, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "x.png").write_bytes(make_bytes())
    monkeypatch.chdir(tmp_path / "store")
    with pytest.raises(BadInput, match=fragment):
        store.describe(path)


def test_a_file_that_changed_after_it_was_described(store: ImageStore, tmp_path: Path) -> None:
    image = write(store, tmp_path, make_bytes())
    write(store, tmp_path, make_bytes("PNG", 48, 33))
    with pytest.raises(BadInput, match="another sha256"):
        store.load(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_region_of_a_turned_picture(orientation: int, store: ImageStore) -> None:
    image = Image(content=make_turned("JPEG", orientation, 480, 320))
    whole = store.load(image)
    box = (whole.width // 2 - 40, whole.height // 2 - 40, whole.width // 2 + 40, whole.height // 2 + 40)
    assert np.array_equal(store.load_region(image, box, 10**6), whole.crop(box))
    shrunk = store.load_region(image, box, 400)
    assert shrunk.size == (20, 20)
    assert corners(shrunk) == corners(whole.crop(box))


@pytest.mark.parametrize(
    ("file_format", "max_pixels", "size"),
    [
        ("JPEG", 600 * 400, (600, 400)),
        ("JPEG", 600 * 400 // 4, (300, 200)),
        ("JPEG", 600 * 400 // 4 + 1, (600, 400)),
        ("JPEG", 600 * 400 // 64, (75, 50)),
        ("JPEG", 1, (75, 50)),
        ("PNG", 1, (600, 400)),
    ],
)
def test_region_keeps_as_many_pixels_as_are_wanted(
    file_format: str, max_pixels: int, size: tuple[int, int], store: ImageStore
) -> None:
    image = Image(content=make_bytes(file_format, 800, 600))
    assert store.load_region(image, (8, 16, 608, 416), max_pixels).size == size


def test_region_on_odd_sides(store: ImageStore) -> None:
    image = Image(content=make_bytes("JPEG", 801, 603, quality=95))
    for box in ((0, 0, 801, 603), (793, 595, 801, 603), (3, 5, 798, 600)):
        region = store.load_region(image, box, 1)
        assert region.width in {(box[2] - box[0]) // 8, (box[2] - box[0]) // 8 + 1, (box[2] - box[0]) // 8 + 2}
        assert min(region.size) >= 1
    assert corners(store.load_region(image, (0, 0, 801, 603), 1)) == "rgbw"


@pytest.mark.parametrize("box", [(0, 0, 0, 8), (9, 0, 8, 8), (-1, 0, 8, 8), (0, 0, 49, 8), (0, 0, 8, 33), (0, 8, 8, 8)])
def test_region_outside(box: tuple[int, int, int, int], store: ImageStore) -> None:
    with pytest.raises(BadInput, match="box"):
        store.load_region(Image(content=make_bytes()), box, 100)


def test_regions_do_not_depend_on_what_was_loaded_before(store: ImageStore) -> None:
    image = Image(content=encode(make_noise(256, 256), "JPEG"))
    box = (10, 10, 250, 250)
    cold = store.load_region(image, box, 1000)
    store.load(image)
    assert np.array_equal(store.load_region(image, box, 1000), cold)


def test_cache_is_bounded_and_forgets_the_oldest(tmp_path: Path) -> None:
    store = ImageStore([], None, cache_bytes=4 * 100 * 100 * 2)
    images = [Image(content=encode(make_noise(100, 100, seed))) for seed in range(3)]
    first = store.load(images[0])
    assert store.load(images[0]) is first
    store.load(images[1])
    assert store.load(images[0]) is first
    store.load(images[2])
    assert store.load(images[0]) is first, "it was used after the second"
    second = store.load(images[1])
    assert store.load(images[1]) is second
    big = Image(content=encode(make_noise(200, 101)))
    assert store.load(big) is not store.load(big), "larger than the cache: not kept"
    assert store.load(images[1]) is second, "and nothing was dropped for it"


def test_cache_from_many_threads() -> None:
    store = ImageStore([], None, cache_bytes=4 * 64 * 64 * 3)
    images = [Image(content=encode(make_noise(64, 64, seed))) for seed in range(6)]
    expected = [np.asarray(make_noise(64, 64, seed)) for seed in range(6)]
    start = threading.Barrier(4)

    def read_all(offset: int) -> bool:
        start.wait()
        turns = itertools.islice(itertools.cycle(range(6)), offset, offset + 60)
        return all(np.array_equal(store.load(images[index]), expected[index]) for index in turns)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read_all, range(4)))


def test_limits_beyond_pillows_own_are_refused() -> None:
    top = ImageSettings.model_fields["image_max_pixels"].metadata[1].le
    assert ImageLimits(max_pixels=top).max_pixels == PilImage.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="max_pixels"):
        ImageLimits(max_pixels=top + 1)


def test_made_from_settings(tmp_path: Path) -> None:
    settings = ImageSettings(image_roots=(str(tmp_path),), image_store=str(tmp_path / "out"), image_max_pixels=1000)
    store = make_image_store(settings)
    with pytest.raises(BadInput, match="limit of 1000"):
        store.put(make_picture())


@pytest.mark.parametrize("root", ["nosuch://x", "file://host/x", "simplecache::file:///x", "file:x"])
def test_roots_that_cannot_be_used(root: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        ImageStore([root])
