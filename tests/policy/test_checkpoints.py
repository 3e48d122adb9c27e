from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from services.chassis.errors import BadInput, NotFound
from services.policy.checkpoints import CheckpointStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "one é"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def make_store(*roots: object, data_dir: Path = Path("unused")) -> CheckpointStore:
    return CheckpointStore([str(root) for root in roots], data_dir)


async def test_a_folder_by_its_path_and_by_its_uri(folder: Path) -> None:
    store = make_store(folder.parent)
    assert await store.fetch(str(folder)) == folder
    assert await store.fetch(folder.as_uri()) == folder
    # The root itself, too: a single checkpoint may be allowed.
    assert await make_store(folder.as_uri()).fetch(str(folder)) == folder


async def test_nothing_outside_the_roots(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "link").symlink_to(tmp_path)
    (tmp_path / "models2").mkdir()
    store = make_store(folder.parent, "memory://allowed")
    for uri in (
        str(tmp_path), "/", f"{folder}/../..", f"{tmp_path}/models/link", f"{tmp_path}/models2", "file:///etc",
        "memory://other/one", "memory://allowedtoo", "memory://allowed/../other", "memory://allowed/%2e%2e/x",
        "s3://bucket/one", "https://example.org/one",
    ):  # fmt: skip
        with pytest.raises(BadInput, match="outside"):
            await store.fetch(uri)


async def test_a_folder_that_is_not_there(folder: Path) -> None:
    with pytest.raises(NotFound):
        await make_store(folder.parent).fetch(str(folder.parent / "two"))


async def test_an_address_that_no_file_system_takes(folder: Path) -> None:
    (folder.parent / "loop").symlink_to("loop")
    store = make_store(folder.parent)
    for uri in (f"{folder}/{'x' * 300}", f"{folder.as_uri()}%00", "file://[x", f"{folder.parent}/loop"):
        with pytest.raises(BadInput, match="readable folder"):
            await store.fetch(uri)


async def test_an_object_stores_checkpoint_is_fetched_once(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/one/config.json": b"{}", "/bucket/one/model.safetensors": b"weights"})
    store = make_store("memory://bucket", data_dir=tmp_path)
    path = await store.fetch("memory://bucket/one")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    memory.rm("/bucket/one", recursive=True)
    assert await store.fetch("memory://bucket/one") == path


async def test_what_an_object_store_does_not_have(tmp_path: Path) -> None:
    store = make_store("memory://bucket", data_dir=tmp_path)
    with pytest.raises(NotFound):
        await store.fetch("memory://bucket/none")
    assert not any((tmp_path / "checkpoints").iterdir())
