"""Crops and comparisons of stored images, into the store.

Each pair of images is registered once: later zooms of a comparison find the registration here. All calls block.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image

from agentiad.v1.trajectory_pb2 import Image, ImageReference
from services.chassis import telemetry
from services.chassis.errors import BadInput, NotFound
from services.chassis.images import ImageStore
from services.chassis.locations import shown
from services.zoom import compare, crop
from services.zoom.registration import Registration


@dataclass(frozen=True)
class Drawn:
    """An image that was stored, and the region of the source that it shows."""

    image: ImageReference
    region: crop.Region


class Drawing:
    """Draws from `store` into it, and remembers at most `registrations_kept` registrations."""

    def __init__(self, store: ImageStore, registrations_kept: int) -> None:
        self._store = store
        self._kept = registrations_kept
        self._registrations: OrderedDict[tuple[str, str], Registration] = OrderedDict()
        self._lock = threading.Lock()

    def crop(self, image: Image, box: Sequence[float]) -> Drawn:
        """ToolError for the box; BadInput, NotFound, Transient, Exhausted for the image."""
        cut = crop.cut_of(self._size(image), box)
        shown = self._store.load_region(image, cut.pixels, crop.DEFAULTS.max_output_pixels)
        return Drawn(self._store.put(crop.fit(shown)), cut.region)

    def compare(
        self, part: Image, exemplar: Image, box: Sequence[float] | None, view: compare.View
    ) -> tuple[Drawn, Registration]:
        """Errors as for crop; an exemplar that is gone or broken is a ToolError: the part can still be judged."""
        key = (_identity(part), _identity(exemplar))
        with self._lock:
            known = self._registrations.get(key)
        drawn = compare.compare(self._store.load(part), self._exemplar(exemplar), box, view, known)
        self._remember(key, drawn.registration)
        return Drawn(self._store.put(drawn.image), drawn.region), drawn.registration

    def _exemplar(self, image: Image) -> PIL.Image.Image:
        try:
            return self._store.load(image)
        except (BadInput, NotFound) as error:
            telemetry.log.warning("exemplar cannot be read", uri=shown(image.reference.uri), reason=str(error))
            raise crop.ToolError("The normal image cannot be read.") from error

    def _size(self, image: Image) -> tuple[int, int]:
        if image.WhichOneof("source") != "reference":
            return self._store.load(image).size
        # As claimed, so that nothing is decoded for a box that is wrong; the store compares it with the pixels.
        size = (image.reference.width, image.reference.height)
        if min(size) < 1:
            raise BadInput("the image reference has no width or height")
        return size

    def _remember(self, key: tuple[str, str], registration: Registration) -> None:
        with self._lock:
            self._registrations[key] = registration
            self._registrations.move_to_end(key)
            while len(self._registrations) > self._kept:
                self._registrations.popitem(last=False)


def _identity(image: Image) -> str:
    if image.WhichOneof("source") == "content":
        return hashlib.sha256(image.content).hexdigest()
    return image.reference.sha256
