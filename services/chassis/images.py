"""The image store: claim checks in, checked pixels out, and the way back.

Invariants: no pixels leave it unless the bytes have the reference's sha256, media type and size and lie under an
allowed root; what it writes it can read again; what it returns does not depend on what is cached. All calls block
(asyncio.to_thread) and are safe from several threads. Returned images are shared through the cache: read them, crop
them, resize them, but never draw into them.
"""

import hashlib
import os
import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import PIL.Image

from agentiad.v1.trajectory_pb2 import Image, ImageReference
from services.chassis.decoding import MEDIA_TYPES, Decoded, ImageLimits, decode, media_type_of
from services.chassis.errors import BadInput, Transient
from services.chassis.locations import Roots, has_scheme, parse_root, path_to_uri, shown
from services.chassis.settings import ImageSettings

__all__ = ["ImageLimits", "ImageStore", "make_image_store"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
# zlib's fastest: crops are written once and read within the second.
_PNG_LEVEL = 1
_CACHE_BYTES = 256 * 2**20
_DEFAULT_LIMITS = ImageLimits()


class ImageStore:
    """Reads images under `roots` (folders or URIs) and under `store`, where it writes."""

    def __init__(
        self,
        roots: Sequence[str],
        store: str | None = None,
        limits: ImageLimits = _DEFAULT_LIMITS,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        """cache_bytes: for decoded images. ValueError for a root that cannot be used."""
        self.limits = limits
        self._roots = Roots([*roots, *([store] if store else [])])
        self._store = parse_root(store) if store else None
        self._cache = _DecodedCache(cache_bytes)

    def read(self, reference: ImageReference) -> bytes:
        """The encoded bytes; sha256, media type and limits are checked. BadInput, NotFound, Transient."""
        _check_claims(reference)
        data = self._roots.locate(reference.uri).read(self.limits.max_bytes)
        if hashlib.sha256(data).hexdigest() != reference.sha256:
            raise BadInput(f"{shown(reference.uri)}: the bytes have another sha256 than the reference")
        with _about(reference.uri):
            _check_media_type(media_type_of(data, self.limits), reference)
        return data

    def load(self, image: Image) -> PIL.Image.Image:
        """The whole picture: RGB, upright, 8 bits. BadInput, NotFound, Transient, Exhausted."""
        return self._decoded(image, shrink=1).image

    def load_region(self, image: Image, box_px: tuple[int, int, int, int], max_pixels: int) -> PIL.Image.Image:
        """The part inside box_px = (left, top, right, bottom), pixels of the upright picture, the last two excluded.

        Where that is far more than max_pixels, a JPEG is decoded at 1/2, 1/4 or 1/8 of its sides, so that at least
        max_pixels are left (the box then grows to whole pixels). BadInput (also for a box that is empty or sticks out),
        NotFound, Transient, Exhausted.
        """
        left, top, right, bottom = box_px
        if not (0 <= left < right and 0 <= top < bottom):
            raise BadInput(f"box {box_px} is empty or negative")
        shrink = 1
        if self._media_type(image) == "image/jpeg":
            area = (right - left) * (bottom - top)
            shrink = next((s for s in (8, 4, 2) if area >= s * s * max_pixels), 1)
        decoded = self._decoded(image, shrink)
        if right > decoded.width or bottom > decoded.height:
            raise BadInput(f"box {box_px} sticks out of {decoded.width}×{decoded.height} pixels")
        return decoded.image.crop((left // shrink, top // shrink, -(-right // shrink), -(-bottom // shrink)))

    def describe(self, uri_or_path: str | os.PathLike[str]) -> ImageReference:
        """The reference of a picture, checked by decoding it; for publishers. A relative path is allowed here.

        BadInput, NotFound, Transient, Exhausted.
        """
        is_uri = isinstance(uri_or_path, str) and has_scheme(uri_or_path)
        uri = str(uri_or_path) if is_uri else path_to_uri(uri_or_path)
        data = self._roots.locate(uri).read(self.limits.max_bytes)
        with _about(uri):
            decoded = decode(data, self.limits)
        sha256 = hashlib.sha256(data).hexdigest()
        return _reference(uri, sha256, decoded.media_type, decoded.width, decoded.height)

    def put(self, image: PIL.Image.Image) -> ImageReference:
        """Write a PNG under store/ab/<sha256>.png, at once or not at all; the same pixels give the same reference.

        BadInput outside the limits, Transient when it cannot be written now.
        """
        if self._store is None:
            raise RuntimeError("this image store was made without a place to write (IMAGE_STORE)")
        buffer = BytesIO()
        plain = image.convert("RGB")
        plain.info = {}  # an orientation or a profile of the source must not be written along
        plain.save(buffer, "PNG", compress_level=_PNG_LEVEL)
        data = buffer.getvalue()
        media_type_of(data, self.limits)
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{sha256[:2]}/{sha256}.png"
        if self._store.filesystem is not None:
            uri = self._store.path + name
            _write_object(self._store.filesystem, uri, data)
        else:
            path = Path(self._store.path, name)
            uri = path.as_uri()
            _write_file(path, data)
        return _reference(uri, sha256, "image/png", image.width, image.height)

    def _media_type(self, image: Image) -> str:
        """As claimed: _decoded compares it with the bytes."""
        if image.WhichOneof("source") == "content":
            return media_type_of(image.content, self.limits)
        return image.reference.media_type

    def _decoded(self, image: Image, shrink: int) -> Decoded:
        match image.WhichOneof("source"):
            case "reference":
                return self._decoded_reference(image.reference, shrink)
            case "content":
                return self._decoded_content(image.content, shrink)
            case _:
                raise BadInput("the image has neither a reference nor content")

    def _decoded_reference(self, reference: ImageReference, shrink: int) -> Decoded:
        _check_claims(reference)
        decoded = self._cache.get((reference.sha256, shrink))
        if decoded is None:
            data = self.read(reference)
            with _about(reference.uri):
                decoded = decode(data, self.limits, shrink)
            self._cache.put((reference.sha256, shrink), decoded)
        else:
            # The pixels are known, but the caller must be allowed to read them where he says they are.
            self._roots.locate(reference.uri)
        _check_media_type(decoded.media_type, reference)
        if (decoded.width, decoded.height) != (reference.width, reference.height):
            raise BadInput(
                f"{shown(reference.uri)}: is {decoded.width}×{decoded.height} pixels, "
                f"the reference says {reference.width}×{reference.height}"
            )
        return decoded

    def _decoded_content(self, content: bytes, shrink: int) -> Decoded:
        if len(content) > self.limits.max_bytes:
            raise BadInput(f"image content: more than the limit of {self.limits.max_bytes} bytes")
        key = (hashlib.sha256(content).hexdigest(), shrink)
        decoded = self._cache.get(key)
        if decoded is None:
            with _about("image content"):
                decoded = decode(content, self.limits, shrink)
            self._cache.put(key, decoded)
        return decoded


def make_image_store(settings: ImageSettings) -> ImageStore:
    """The store that the settings describe."""
    limits = ImageLimits(max_bytes=settings.image_max_bytes, max_pixels=settings.image_max_pixels)
    return ImageStore(settings.image_roots, settings.image_store, limits)


class _DecodedCache:
    """The last decoded images by (sha256, shrink), bounded by their bytes in memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[tuple[str, int], Decoded] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int]) -> Decoded | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: tuple[str, int], decoded: Decoded) -> None:
        with self._lock:
            if key in self._entries or _memory(decoded) > self._max_bytes:
                return
            self._entries[key] = decoded
            self._bytes += _memory(decoded)
            while self._bytes > self._max_bytes:
                _, evicted = self._entries.popitem(last=False)
                self._bytes -= _memory(evicted)


def _memory(decoded: Decoded) -> int:
    # Pillow keeps RGB in four bytes a pixel.
    return 4 * decoded.image.width * decoded.image.height


def _check_claims(reference: ImageReference) -> None:
    if _SHA256.fullmatch(reference.sha256) is None:
        raise BadInput(f"{shown(reference.uri)}: sha256 must be 64 lower-case hexadecimal digits")
    if reference.media_type not in MEDIA_TYPES.values():
        raise BadInput(f"{shown(reference.uri)}: media type {shown(reference.media_type)!r} is not accepted")


def _check_media_type(actual: str, reference: ImageReference) -> None:
    if actual != reference.media_type:
        raise BadInput(f"{shown(reference.uri)}: is {actual}, the reference says {reference.media_type}")


def _reference(uri: str, sha256: str, media_type: str, width: int, height: int) -> ImageReference:
    return ImageReference(uri=uri, sha256=sha256, media_type=media_type, width=width, height=height)


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Say in a BadInput which image it is about."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{shown(what)}: {error}") from error


def _write_file(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # The size is compared because a power cut can leave a name without its bytes.
        if path.exists() and path.stat().st_size == len(data):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise Transient(f"{shown(str(path))}: cannot be written: {os.strerror(error.errno or 0)}") from error


def _write_object(filesystem: object, uri: str, data: bytes) -> None:
    try:
        filesystem.pipe_file(uri, data)  # type: ignore[attr-defined]
    except Exception as error:
        # As for reading: no common base to name.
        raise Transient(f"{shown(uri)}: cannot be written now: {type(error).__name__}") from error
