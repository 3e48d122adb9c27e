"""Where checkpoints may be loaded from: folders of this machine, or an object store's, fetched once."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec

from services.chassis.errors import BadInput, NotFound, Transient
from services.chassis.locations import has_scheme, shown


class CheckpointStore:
    """`roots`: allowed folders and URI prefixes, each with all below it. `data_dir` keeps what was fetched."""

    def __init__(self, roots: Sequence[str], data_dir: Path) -> None:
        self._folders = [_path(root).resolve() for root in roots if _is_local(root)]
        self._prefixes = [root.rstrip("/") for root in roots if not _is_local(root)]
        self._fetched = data_dir / "checkpoints"

    async def fetch(self, uri: str) -> Path:
        """The checkpoint as a folder. Raises BadInput: outside the roots; NotFound; Transient: not to be had now."""
        return await asyncio.to_thread(self._local if _is_local(uri) else self._remote, uri)

    def _local(self, uri: str) -> Path:
        try:
            path = _path(uri).resolve()
            if not any(path == folder or folder in path.parents for folder in self._folders):
                raise BadInput(f"{shown(uri)}: outside the checkpoint roots")
            if not path.is_dir():
                raise NotFound(f"{shown(uri)}: no such folder")
        except (OSError, RuntimeError, ValueError) as error:
            # A name that is too long, a parent that may not be read; a loop of links; a NUL, a malformed URI.
            raise BadInput(f"{shown(uri)}: not the path of a readable folder ({type(error).__name__})") from error
        return path

    def _remote(self, uri: str) -> Path:
        inside = any(uri == prefix or uri.startswith(prefix + "/") for prefix in self._prefixes)
        if not inside or {".", ".."} & set(unquote(uri).split("/")):
            raise BadInput(f"{shown(uri)}: outside the checkpoint roots")
        target = self._fetched / hashlib.sha256(uri.encode()).hexdigest()
        if target.is_dir():
            return target
        self._fetched.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=self._fetched, prefix="."))
        try:
            filesystem, path = fsspec.url_to_fs(uri)
            filesystem.get(path.rstrip("/") + "/", str(partial) + "/", recursive=True)
            partial.rename(target)
        except FileNotFoundError as error:
            raise NotFound(f"{shown(uri)}: not found") from error
        except Exception as error:
            # Every store's client has error classes of its own for a network that fails: no common base to name here.
            raise Transient(f"{shown(uri)}: cannot be fetched now: {type(error).__name__}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target


def _is_local(uri: str) -> bool:
    return not has_scheme(uri) or uri.lower().startswith("file:")


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path)) if has_scheme(uri) else Path(uri)
