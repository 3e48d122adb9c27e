"""Whatever a person can mend is said in one sentence, and the exit status is 2."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from PIL import Image

from services.chassis import rpc
from services.chassis.errors import BadInput, Exhausted, NotFound, Transient
from services.chassis.problems import sentence
from services.cli import demo
from services.data.readers import BadDataError
from services.policy.settings import PolicySettings
from services.retrieval import service as retrieval_service
from services.retrieval.library import ExemplarLibrary, LibraryError
from services.retrieval.settings import RetrievalSettings
from services.trainer.folders import OccupiedError
from tests.cli.commands import agentiad
from tests.harness.process import free_port


def raised(action: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        action()
    return caught.value


def refused(code: grpc.StatusCode) -> Exception:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "outside the image roots")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BadInput("a picture\n is broken"), "a picture is broken"),
        (NotFound("gone"), "gone"),
        (Exhausted("full"), "full"),
        (Transient("later"), "later"),
        (BadDataError("no pictures"), "no pictures"),
        (LibraryError("locked"), "locked"),
        (OccupiedError("another run's"), "another run's"),
        (refused(grpc.StatusCode.INVALID_ARGUMENT), "outside the image roots"),
        (refused(grpc.StatusCode.UNIMPLEMENTED), None),
        (raised(lambda: PolicySettings(max_batch=0)), "MAX_BATCH: Input should be greater than or equal to 1"),
        (raised(lambda: Path("/gone").read_text()), "/gone: No such file or directory"),
        (OSError("no file's"), None),
        (KeyError("typo"), None),
    ],
)
def test_sentence(error: Exception, said: str | None) -> None:
    assert sentence(error) == said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A picture, an empty folder, and one that holds a file that is no picture."""
    Image.new("RGB", (64, 64)).save(tmp_path / "part.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.png").write_text("not a picture")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("inspect part.png --normals gone", "--normals gone: there is no such folder"),
        ("inspect part.png --normals empty", "--normals empty: there are no pictures"),
        ("inspect part.png --normals mine", "notes.png: not a PNG"),
        ("inspect part.png --model gone", "gone: no such folder"),
        ("inspect part.png --model empty", "empty holds no safetensors files"),
        ("inspect part.png --data-dir part.png", "part.png"),
        ("up --model gone", "gone holds no checkpoint"),
        ("demo --out mine", "mine holds files that no demo made"),
        ("demo --out part.png", "part.png: File exists"),
        ("train sft --out run --preset typo", "'typo' is none of pocket, pocket-undertrained, pretrained"),
    ],
)
def test_a_command_says_what_is_wrong(words: str, said: str, folder: Path) -> None:
    result = agentiad(*words.split(), cwd=folder, COLUMNS="200")
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert (folder / "mine" / "notes.png").exists()


def test_a_library_that_another_process_has(folder: Path) -> None:
    library = ExemplarLibrary(str(folder / "out" / "exemplars.db"), "encoder", 4)
    try:
        result = agentiad("inspect", "part.png", cwd=folder)
    finally:
        library.close()
    assert result.returncode == 2, result.stderr
    assert "another process" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


async def test_exemplars_outside_the_roots_of_the_running_stack(folder: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    settings = RetrievalSettings(data_dir=folder / "stack", image_roots=(str(folder / "empty"),))
    async with retrieval_service.hosted(settings) as servicer, rpc.serve(address, [servicer]):
        result = await asyncio.to_thread(
            agentiad, "exemplars", "add", "part.png", "-c", "bolt", cwd=folder, RETRIEVAL_ADDRESS=address
        )
    assert result.returncode == 2, result.stderr
    assert "part.png: outside the image roots" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_demo_removes_nothing_but_a_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    demo.make_folder(out)
    (out / "old.png").touch()
    demo.make_folder(out)
    assert not (out / "old.png").exists()
    (out / demo.MARK).unlink()
    demo.make_folder(out)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(BadInput):
        demo.make_folder(tmp_path)
    assert (tmp_path / "mine.txt").exists()
