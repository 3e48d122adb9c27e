"""The library against Milvus, in this process and on a real server: the same tests for both."""

import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.chassis.errors import BadInput, Transient
from services.chassis.rpc import deadline
from services.retrieval.library import ExemplarLibrary, LibraryError
from tests.harness.process import free_port, running, wait_for_port
from tests.retrieval.exemplars import HOSTILE_CATEGORIES, make_reference, make_vectors

DIMENSION = 8
NOT_THERE = "0" * 64


@pytest.fixture
def library(uri: str) -> Iterator[ExemplarLibrary]:
    opened = ExemplarLibrary(uri, "encoder-1", DIMENSION)
    yield opened
    opened.close()


def test_the_nearest_come_first_and_never_the_image_itself(library: ExemplarLibrary) -> None:
    images = [make_reference(f"n{i}") for i in range(40)]
    vectors = make_vectors(40, DIMENSION)
    assert library.add("bottle", images, vectors) == 40
    expected = sorted(range(40), key=lambda i: -float(vectors[i] @ vectors[7]))
    found = library.nearest("bottle", vectors[7], 5, NOT_THERE)
    assert [entry.image for entry in found] == [images[i] for i in expected[:5]]
    assert [entry.similarity for entry in found] == pytest.approx(
        [vectors[i] @ vectors[7] for i in expected[:5]], abs=1e-4
    )
    others = library.nearest("bottle", vectors[7], 5, images[7].sha256)
    assert [entry.image for entry in others] == [images[i] for i in expected[1:6]]


def test_adding_twice_changes_nothing(library: ExemplarLibrary) -> None:
    images, vectors = [make_reference(f"n{i}") for i in range(5)], make_vectors(5, DIMENSION)
    assert library.add("bottle", images[:3], vectors[:3]) == 3
    assert library.add("bottle", images, vectors) == 2
    assert library.add("bottle", [images[0], images[0]], vectors[[0, 0]]) == 0
    assert len(library.page("bottle", 100, "")[0]) == 5


def test_categories_are_apart(library: ExemplarLibrary) -> None:
    image, vectors = make_reference("same"), make_vectors(1, DIMENSION)
    assert library.add("bottle", [image], vectors) == 1
    assert library.add("cap", [image], vectors) == 1
    assert [entry.category for entry in library.nearest("cap", vectors[0], 5, NOT_THERE)] == ["cap"]
    assert library.nearest("screw", vectors[0], 5, NOT_THERE) == []
    assert library.remove("cap", []) == 1
    assert [entry.category for entry in library.page("", 10, "")[0]] == ["bottle"]


def test_an_empty_library_answers(library: ExemplarLibrary) -> None:
    assert library.nearest("bottle", make_vectors(1, DIMENSION)[0], 3, NOT_THERE) == []
    assert library.page("", 10, "") == ([], "")
    assert library.remove("bottle", []) == 0


@pytest.mark.parametrize("size", [1, 7, 25, 26, 1000])
def test_pages_hold_each_entry_once(library: ExemplarLibrary, size: int) -> None:
    library.add("bottle", [make_reference(f"n{i}") for i in range(25)], make_vectors(25, DIMENSION))
    library.add("cap", [make_reference(f"c{i}") for i in range(4)], make_vectors(4, DIMENSION))
    for category, count in (("bottle", 25), ("cap", 4), ("", 29)):
        seen, token, pages = [], "", 0
        while True:
            entries, token = library.page(category, size, token)
            seen += [(entry.category, entry.image.sha256) for entry in entries]
            pages += 1
            if not token:
                break
            assert len(entries) == size
        assert len(seen) == len(set(seen)) == count
        assert pages == max(1, -(-count // size))


@pytest.mark.parametrize("token", ["x", '0" or id > "', "0" * 127, "A" * 128, "0" * 129])
def test_a_page_token_that_is_none_is_refused(library: ExemplarLibrary, token: str) -> None:
    with pytest.raises(BadInput):
        library.page("bottle", 10, token)


def test_some_or_all_of_a_category_can_be_removed(library: ExemplarLibrary) -> None:
    images = [make_reference(f"n{i}") for i in range(10)]
    library.add("bottle", images, make_vectors(10, DIMENSION))
    assert library.remove("bottle", [images[0].sha256, images[0].sha256, images[1].sha256, NOT_THERE]) == 2
    assert library.remove("bottle", [images[0].sha256]) == 0
    assert len(library.page("bottle", 100, "")[0]) == 8
    assert library.remove("bottle", []) == 8
    assert library.page("bottle", 100, "") == ([], "")


def test_more_rows_than_a_call_takes(library: ExemplarLibrary) -> None:
    count = 2500
    assert (
        library.add("bottle", [make_reference(f"n{i}") for i in range(count)], make_vectors(count, DIMENSION)) == count
    )
    assert library.remove("bottle", []) == count


def test_no_category_name_reaches_another_category(library: ExemplarLibrary) -> None:
    vectors = make_vectors(1, DIMENSION)
    library.add("bottle", [make_reference("secret")], vectors)
    for category in HOSTILE_CATEGORIES:
        if category == "":
            with pytest.raises(BadInput):
                library.nearest(category, vectors[0], 5, NOT_THERE)
            with pytest.raises(BadInput):
                library.remove(category, [])
            continue
        assert library.nearest(category, vectors[0], 5, NOT_THERE) == []
        assert library.remove(category, []) == 0
        assert library.add(category, [make_reference("mine")], vectors) == 1
        found = library.nearest(category, vectors[0], 5, NOT_THERE)
        assert [(entry.category, entry.image) for entry in found] == [(category, make_reference("mine"))]
        assert [entry.category for entry in library.page(category, 10, "")[0]] == [category]
        assert library.remove(category, [make_reference("mine").sha256]) == 1
    assert len(library.page("bottle", 10, "")[0]) == 1


@pytest.mark.parametrize("digest", ["", "abc", "A" * 64, '" or sha256 != "', "0" * 63 + '"', "0" * 64 + "\n"])
def test_a_digest_that_is_none_is_refused(library: ExemplarLibrary, digest: str) -> None:
    with pytest.raises(BadInput):
        library.nearest("bottle", make_vectors(1, DIMENSION)[0], 5, digest)
    with pytest.raises(BadInput):
        library.remove("bottle", [digest])


def test_it_is_there_again_after_a_restart(uri: str) -> None:
    images, vectors = [make_reference(f"n{i}") for i in range(5)], make_vectors(5, DIMENSION)
    first = ExemplarLibrary(uri, "encoder-1", DIMENSION)
    first.add("bottle", images, vectors)
    first.close()
    second = ExemplarLibrary(uri, "encoder-1", DIMENSION)
    assert [entry.image for entry in second.nearest("bottle", vectors[2], 1, NOT_THERE)] == [images[2]]
    second.close()


@pytest.mark.parametrize("dimension", [DIMENSION, 2 * DIMENSION])
def test_another_encoder_is_refused_with_what_to_do(uri: str, dimension: int) -> None:
    first = ExemplarLibrary(uri, "encoder-1", DIMENSION)
    first.add("bottle", [make_reference("n")], make_vectors(1, DIMENSION))
    first.close()
    with pytest.raises(
        LibraryError, match=r"made with the encoder encoder-1, this is encoder-2.*add the exemplars again"
    ):
        ExemplarLibrary(uri, "encoder-2", dimension)
    again = ExemplarLibrary(uri, "encoder-1", DIMENSION)
    assert len(again.page("", 10, "")[0]) == 1
    again.close()


def test_an_empty_library_takes_any_encoder(uri: str) -> None:
    ExemplarLibrary(uri, "encoder-1", DIMENSION).close()
    wider = ExemplarLibrary(uri, "encoder-2", 2 * DIMENSION)
    assert wider.add("bottle", [make_reference("n")], make_vectors(1, 2 * DIMENSION)) == 1
    wider.close()


def test_no_time_left_is_transient(library: ExemplarLibrary) -> None:
    with deadline(0), pytest.raises(Transient):
        library.page("", 10, "")


def test_nobody_at_the_address_is_said() -> None:
    with deadline(2), pytest.raises(LibraryError, match="cannot be opened"):
        ExemplarLibrary("http://127.0.0.1:1", "encoder-1", DIMENSION)


@contextmanager
def server_on(port: int, folder: Path) -> Iterator[None]:
    """A Milvus server over a folder that outlives it; killed at the end."""
    command = [str(Path(sys.executable).parent / "milvus-lite"), "server", "--data-dir", f"{folder}/data"]
    process = running([*command, "--host", "127.0.0.1", "--port", str(port)], folder / "log.txt")
    try:
        wait_for_port(port, process, folder / "log.txt", 60)
        yield
    finally:
        process.kill()
        process.wait()


def test_a_server_may_go_away_and_come_back(tmp_path: Path) -> None:
    port, image, vector = free_port(), make_reference("n"), make_vectors(1, DIMENSION)
    with server_on(port, tmp_path):
        library = ExemplarLibrary(f"http://127.0.0.1:{port}", "encoder-1", DIMENSION)
        library.add("bottle", [image], vector)
    calls = [
        lambda: library.nearest("bottle", vector[0], 1, NOT_THERE), lambda: library.page("", 10, ""),
        lambda: library.add("bottle", [make_reference("m")], vector), lambda: library.remove("bottle", []),
    ]  # fmt: skip
    for call in calls:
        with deadline(1), pytest.raises(Transient):
            call()
    with server_on(port, tmp_path):
        until = time.monotonic() + 60
        while True:  # as a caller who is told UNAVAILABLE does
            try:
                found = library.nearest("bottle", vector[0], 1, NOT_THERE)
                break
            except Transient:
                assert time.monotonic() < until
                time.sleep(0.2)
        assert [entry.image for entry in found] == [image]
    library.close()


def open_and_hold(
    uri: str, opened: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event"
) -> None:
    library = ExemplarLibrary(uri, "encoder-1", DIMENSION)
    opened.set()
    done.wait(60)
    library.close()


def test_a_file_that_another_process_has_open_is_said(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    opened, done = spawn.Event(), spawn.Event()
    uri = str(tmp_path / "library.db")
    other = spawn.Process(target=open_and_hold, args=(uri, opened, done))
    other.start()
    try:
        assert opened.wait(60)
        with pytest.raises(LibraryError, match="another process"):
            ExemplarLibrary(uri, "encoder-1", DIMENSION)
    finally:
        done.set()
        other.join(60)
    ExemplarLibrary(uri, "encoder-1", DIMENSION).close()
