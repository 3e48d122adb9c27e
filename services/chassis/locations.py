"""Where images may be read from: addresses, the allowed roots, and bounded reading.

Invariants: nothing outside the roots is opened, after symlinks, '..' and percent-encoding are resolved (decoded once,
like every reader of file URIs does). Only regular files are opened, so a pipe or a device can neither block nor be
touched. No read is longer than its limit. Files are read directly; every other scheme goes through fsspec, and only if
a root has it. Keys of object stores are taken literally, as fsspec and the stores' own tools take them.
"""

import errno
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import fsspec

from services.chassis.errors import BadInput, NotFound, Transient

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Linux's PATH_MAX, and more than any object store's key.
_MAX_ADDRESS = 4096
_SHOWN = 200
_REFUSED = {errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL, errno.ENXIO}


def shown(address: str) -> str:
    """An address as error texts show it: short, printable, valid UTF-8."""
    text = address.encode("utf-8", "backslashreplace").decode()
    text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def has_scheme(address: str) -> bool:
    """Whether it is a URI. A file whose name has a colon in its first part is named ./like:this."""
    return _SCHEME.match(address) is not None


@dataclass(frozen=True)
class Location:
    """One object under an allowed root. `filesystem` is None for a local file."""

    uri: str
    path: str
    filesystem: Any = None

    def read(self, max_bytes: int) -> bytes:
        """All bytes. BadInput when there are more than max_bytes or it is no regular file; NotFound; Transient."""
        return self._read_file(max_bytes) if self.filesystem is None else self._read_object(max_bytes)

    def _read_file(self, max_bytes: int) -> bytes:
        try:
            _check_regular(os.lstat(self.path), self.uri)
            # Again after opening, and without following or waiting: the name may have been given to something else.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                _check_regular(status, self.uri)
                _check_size(status.st_size, max_bytes, self.uri)
                data = file.read(max_bytes + 1)
        except OSError as error:
            raise _os_error(error, self.uri) from error
        _check_size(len(data), max_bytes, self.uri)
        return data

    def _read_object(self, max_bytes: int) -> bytes:
        try:
            info = self.filesystem.info(self.path)
            if info["type"] != "file":
                raise BadInput(f"{shown(self.uri)}: not a file")
            if not isinstance(info["size"], int):
                raise BadInput(f"{shown(self.uri)}: its size is unknown")
            _check_size(info["size"], max_bytes, self.uri)
            data: bytes = self.filesystem.cat_file(self.path, start=0, end=info["size"])
        except BadInput:
            raise
        except FileNotFoundError as error:
            raise NotFound(f"{shown(self.uri)}: not found") from error
        except PermissionError as error:
            raise BadInput(f"{shown(self.uri)}: permission denied") from error
        except Exception as error:
            # Every store's client has error classes of its own for a network that fails: no common base to name here.
            raise Transient(f"{shown(self.uri)}: cannot be read now: {type(error).__name__}") from error
        return data


def _check_regular(status: os.stat_result, uri: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{shown(uri)}: not a regular file")


def _check_size(size: int, max_bytes: int, uri: str) -> None:
    if size == 0:
        raise BadInput(f"{shown(uri)}: empty file")
    if size > max_bytes:
        raise BadInput(f"{shown(uri)}: more than the limit of {max_bytes} bytes")


def _os_error(error: OSError, uri: str) -> Exception:
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return NotFound(f"{shown(uri)}: not found")
    reason = os.strerror(error.errno or 0)
    if error.errno in _REFUSED:
        return BadInput(f"{shown(uri)}: {reason}")
    return Transient(f"{shown(uri)}: {reason}")


@dataclass(frozen=True)
class Root:
    """A folder (`path`, absolute) or, with a `filesystem`, the prefix of an object store's URIs."""

    path: str
    filesystem: Any = None
    protocol: str = "file"

    def locate(self, uri: str, path: str | None) -> Location | None:
        """Where `uri` lies (`path`: its decoded path if it is a file URI), or None if not under this root."""
        if self.filesystem is not None:
            under = path is None and uri.startswith(self.path)
            return Location(uri, self.filesystem._strip_protocol(uri), self.filesystem) if under else None
        if path is None:
            return None
        # The root too: it may be a symlink, and may come to exist later (a mount).
        real, root = os.path.realpath(path), os.path.realpath(self.path)
        return Location(uri, real) if real.startswith(root.rstrip("/") + "/") else None


def parse_root(root: str) -> Root:
    """A folder's path or URI. ValueError says what is wrong with it."""
    if not has_scheme(root) or root.lower().startswith("file:"):
        try:
            return Root(_file_path(root) if has_scheme(root) else os.path.abspath(root))
        except BadInput as error:
            raise ValueError(str(error)) from error
    protocol = root.partition(":")[0].lower()
    if "://" not in root or "::" in root:
        raise ValueError(f"must be a folder or SCHEME://…, not {shown(root)}")
    try:
        filesystem = fsspec.filesystem(protocol)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{shown(root)} cannot be used: {error}") from error
    return Root(root.rstrip("/") + "/", filesystem, protocol)


def _file_path(uri: str) -> str:
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise BadInput(f"{shown(uri)}: malformed: {error}") from error
    if parts.netloc not in {"", "localhost"}:
        raise BadInput(f"{shown(uri)}: a file URI names no host")
    if parts.query or parts.fragment:
        raise BadInput(f"{shown(uri)}: '?' and '#' in a file's name must be percent-encoded")
    if not parts.path.startswith("/"):
        raise BadInput(f"{shown(uri)}: a file URI needs an absolute path")
    # Names are bytes on Linux: fsdecode keeps those that are not UTF-8.
    path = os.fsdecode(unquote_to_bytes(parts.path))
    if _CONTROL.search(path):
        raise BadInput(f"{shown(uri)}: control characters in the path")
    return "/" + path.lstrip("/")


class Roots:
    """The allowed roots of a process."""

    def __init__(self, roots: Sequence[str]) -> None:
        """ValueError for a root that cannot be used."""
        self._roots = [parse_root(root) for root in roots]
        self._schemes = {root.protocol for root in self._roots}

    def locate(self, uri: str) -> Location:
        """Where a URI leads. BadInput when it is malformed, of another scheme, or outside every root."""
        if len(uri) > _MAX_ADDRESS:
            raise BadInput(f"{shown(uri)}: an address has at most {_MAX_ADDRESS} characters")
        # Before urlsplit, which drops some of them silently.
        if _CONTROL.search(uri) or uri != uri.strip():
            raise BadInput(f"{shown(uri)}: control characters or outer blanks in the address")
        match = _SCHEME.match(uri)
        if match is None:
            raise BadInput(f"{shown(uri)}: not a URI (file:///…, s3://…)")
        scheme = match[1].lower()
        if scheme not in self._schemes or "::" in uri:
            raise BadInput(f"{shown(uri)}: scheme {shown(scheme)!r} is not allowed: no image root has it")
        path = None
        if scheme == "file":
            path = _file_path(uri)
        else:
            _check_key(uri)
        for root in self._roots:
            location = root.locate(uri, path)
            if location is not None:
                return location
        raise BadInput(f"{shown(uri)}: outside the image roots")


def _check_key(uri: str) -> None:
    if not {".", ".."}.isdisjoint(unquote(uri).split("/")):
        raise BadInput(f"{shown(uri)}: '.' and '..' are not allowed in an object's key")


def path_to_uri(path: str | os.PathLike[str]) -> str:
    """file:///… of a path, relative ones from the working directory. '..' stays: symlinks decide what it means."""
    text = os.fspath(path)
    if "\0" in text:
        raise BadInput(f"{shown(text)}: control characters in the path")
    return Path(os.getcwd(), text).as_uri()
