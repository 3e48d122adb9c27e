"""The exemplar library in Milvus: one collection, a row for each (category, image).

Invariants: all vectors of a collection come from one encoder, which each row names; a row's id follows from its
category and its image, so adding twice changes nothing; filters hold hexadecimal digests only, so no category name can
change what they mean. All calls block, and end with Transient when Milvus does not answer in time.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from agentiad.v1.trajectory_pb2 import ImageReference
from services.chassis.errors import BadInput, Transient
from services.chassis.rpc import remaining

# pymilvus reads MILVUS_URI too, once, and refuses the path of a file there.
_uri = os.environ.pop("MILVUS_URI", None)
try:
    from pymilvus import DataType, MilvusClient
    from pymilvus.client.types import Status
    from pymilvus.exceptions import ConnectError, MilvusException, MilvusUnavailableException
finally:
    if _uri is not None:
        os.environ["MILVUS_URI"] = _uri

COLLECTION = "exemplars"
MAX_CATEGORY_BYTES = 256
_MAX_URI_BYTES = 4096  # as the image store accepts
# Milvus counts the length of a VARCHAR in bytes.
_TEXTS = {"category": MAX_CATEGORY_BYTES, "uri": _MAX_URI_BYTES, "media_type": 64, "encoder": 256}
_DIGESTS = {"category_key": 64, "sha256": 64}
_SHOWN = ["category", "uri", "sha256", "media_type", "width", "height"]
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{128}")
_TIMEOUT_S = 10.0
_ROWS_A_CALL = 1000
# pymilvus pings an idle connection every 10 s, for which milvus-lite's server closes it ("too many pings").
GRPC_OPTIONS = {"grpc.keepalive_permit_without_calls": 0}
_NOT_LOADED = 101  # merr.ErrCollectionNotLoaded of Milvus; milvus-lite has the same

Vector = npt.NDArray[np.float32]


class LibraryError(Exception):
    """The library cannot be opened as configured; the text says why and what to do."""


@dataclass(frozen=True)
class Entry:
    category: str
    image: ImageReference
    similarity: float = 0.0  # cosine, in [-1, 1]; only in answers to a query


class ExemplarLibrary:
    """Opens the collection, or makes it on first use for this encoder's vectors."""

    def __init__(self, uri: str, encoder: str, dimension: int, token: str = "") -> None:
        """LibraryError: nobody answers at the uri, another process has the file, or another encoder filled it."""
        self._encoder, self._uri = encoder, uri
        self._client = _connected(uri, token)
        try:
            with _answering() as timeout:
                version = self._client.get_server_version(timeout=timeout)
            # What it has not flushed, milvus-lite searches row by row: 0.6 ms each (3.2.2). Milvus itself flushes when
            # it is time, and limits how often it may be asked to.
            self._is_lite = version.startswith("milvus_lite")
            self._prepare(dimension)
        except BaseException:
            self.close()
            raise

    def add(self, category: str, images: Sequence[ImageReference], vectors: Vector) -> int:
        """Vectors [n, dimension] of n images. Returns how many were new."""
        _check_category(category)
        rows = {
            _row_id(category, image.sha256): self._row(category, image, vector)
            for image, vector in zip(images, vectors, strict=True)
        }
        known = self._existing(list(rows))
        new = [row for row_id, row in rows.items() if row_id not in known]
        for some in _in_parts(new):
            self._ask(self._client.upsert, data=some)
        if self._is_lite:
            self._ask(self._client.flush)
        return len(new)

    def nearest(self, category: str, vector: Vector, limit: int, without_sha256: str) -> list[Entry]:
        """The exemplars of the category by falling similarity, never the image of that digest."""
        _check_category(category)
        _check_sha256(without_sha256)
        (hits,) = self._ask(
            self._client.search,
            data=[vector.tolist()],
            filter=f'category_key == "{_key(category)}" and sha256 != "{without_sha256}"',
            limit=limit,
            output_fields=_SHOWN,
        )
        return [_entry(hit["entity"], float(hit["distance"])) for hit in hits]

    def page(self, category: str, size: int, token: str) -> tuple[list[Entry], str]:
        """One page of a category, or of all (category empty), and the token of the next page: empty after the last."""
        if token and not _ID.fullmatch(token):
            raise BadInput("page_token is not one that an answer gave")
        filters = [f'id > "{token}"'] if token else []
        if category:
            _check_category(category)
            filters.append(f'category_key == "{_key(category)}"')
        rows = self._query(" and ".join(filters), [*_SHOWN, "id"], size + 1)
        more = len(rows) > size
        return [_entry(row) for row in rows[:size]], str(rows[size - 1]["id"]) if more else ""

    def remove(self, category: str, sha256: Sequence[str]) -> int:
        """Some images, or the whole category. Returns how many were there."""
        _check_category(category)
        if not sha256:
            return self._remove_category(category)
        for digest in sha256:
            _check_sha256(digest)
        known = self._existing(list({_row_id(category, digest) for digest in sha256}))
        self._delete(list(known))
        return len(known)

    def close(self) -> None:
        self._client.close()
        if self._uri.endswith(".db"):
            # Its server runs in this process, and holds the lock on the folder until it is told to go.
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self._uri)

    def _prepare(self, dimension: int) -> None:
        self._open(dimension)
        rows = self._query("", ["encoder"], 1)
        if rows and rows[0]["encoder"] != self._encoder:
            raise LibraryError(
                f"the library at {self._uri} was made with the encoder {rows[0]['encoder']}, this is {self._encoder}: "
                "their vectors cannot be compared. Give the old encoder, or a new library and add the exemplars again."
            )
        fields = self._ask(self._client.describe_collection)["fields"]
        (length,) = (field["params"]["dim"] for field in fields if field["name"] == "vector")
        if int(length) != dimension:
            # Empty, and made for vectors of another length.
            self._ask(self._client.drop_collection)
            self._open(dimension)

    def _open(self, dimension: int) -> None:
        """Each step is made where it is missing: whoever was here before may have died between two."""
        if not self._ask(self._client.has_collection):
            # Strong: an exemplar is found as soon as its addition was answered, by any replica.
            self._ask(self._client.create_collection, schema=_schema(dimension), consistency_level="Strong")
        if not self._ask(self._client.list_indexes):
            index = MilvusClient.prepare_index_params()
            # AUTOINDEX is what a cluster, a server and milvus-lite all have; the rest is theirs to choose. Nothing to
            # wait for (sync) while it is empty, and waiting takes a call that milvus-lite has not.
            index.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
            self._ask(self._client.create_index, index_params=index, sync=False)
        self._ask(self._client.load_collection)

    def _row(self, category: str, image: ImageReference, vector: Vector) -> dict[str, Any]:
        _check_sha256(image.sha256)
        if len(image.uri.encode()) > _MAX_URI_BYTES:
            raise BadInput(f"an exemplar's uri can have {_MAX_URI_BYTES} bytes")
        return {
            "id": _row_id(category, image.sha256),
            "category_key": _key(category),
            "category": category,
            "encoder": self._encoder,
            "vector": vector.tolist(),
            **{name: getattr(image, name) for name in ("uri", "sha256", "media_type", "width", "height")},
        }

    def _existing(self, ids: list[str]) -> set[str]:
        found: set[str] = set()
        for some in _in_parts(ids):
            found |= {row["id"] for row in self._ask(self._client.query, ids=some, output_fields=["id"])}
        return found

    def _query(self, condition: str, fields: list[str], limit: int) -> list[dict[str, Any]]:
        """The first rows by id. The last two arguments are how pymilvus' own iterator asks for that order."""
        rows: list[dict[str, Any]] = self._ask(
            self._client.query, filter=condition, output_fields=fields, limit=limit,
            iterator="True", reduce_stop_for_best=True,
        )  # fmt: skip
        return rows

    def _remove_category(self, category: str) -> int:
        removed = 0
        while rows := self._query(f'category_key == "{_key(category)}"', ["id"], _ROWS_A_CALL):
            self._delete([row["id"] for row in rows])
            removed += len(rows)
        return removed

    def _delete(self, ids: list[str]) -> None:
        for some in _in_parts(ids):
            self._ask(self._client.delete, ids=some)

    def _ask(self, method: Callable[..., Any], **arguments: Any) -> Any:
        """One request about the collection."""
        with _answering() as timeout:
            try:
                return method(COLLECTION, timeout=timeout, **arguments)
            except MilvusException as error:
                if error.code != _NOT_LOADED:
                    raise
            # A server that was restarted has the collection on disk only, until somebody asks for it.
            self._client.load_collection(COLLECTION, timeout=timeout)
            return method(COLLECTION, timeout=timeout, **arguments)


def _schema(dimension: int) -> Any:
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, max_length=128, is_primary=True)
    for name, length in {**_DIGESTS, **_TEXTS}.items():
        schema.add_field(name, DataType.VARCHAR, max_length=length)
    for name in ("width", "height"):
        schema.add_field(name, DataType.INT64)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
    return schema


def _connected(uri: str, token: str) -> MilvusClient:
    if uri.endswith(".db"):
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
    try:
        return MilvusClient(uri=uri, token=token, timeout=_TIMEOUT_S, grpc_options=GRPC_OPTIONS)
    except MilvusException as error:
        reason = error.message
        if uri.endswith(".db"):
            reason += " (is it open in another process? milvus-lite lets one in; `milvus-lite server` shares it)"
        raise LibraryError(f"the library at {uri} cannot be opened: {reason}") from error


@contextmanager
def _answering() -> Iterator[float]:
    """Yields the seconds that one request to Milvus may take, its retries included."""
    left = remaining()
    timeout = _TIMEOUT_S if left is None else min(left, _TIMEOUT_S)
    if timeout <= 0:
        raise Transient("no time is left to ask Milvus")
    try:
        yield timeout
    except grpc.RpcError as error:
        raise Transient("Milvus does not answer") from error
    except MilvusException as error:
        # `code` is a gRPC status when pymilvus gave up retrying, CONNECT_FAILED when it gave up reconnecting.
        unreachable = isinstance(error.code, grpc.StatusCode) or error.code == Status.CONNECT_FAILED
        if unreachable or error.retriable or isinstance(error, ConnectError | MilvusUnavailableException):
            raise Transient(f"Milvus does not answer: {error.message}") from error
        raise


def _entry(row: dict[str, Any], similarity: float = 0.0) -> Entry:
    image = ImageReference(**{name: row[name] for name in ("uri", "sha256", "media_type", "width", "height")})
    return Entry(str(row["category"]), image, similarity)


def _in_parts(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), _ROWS_A_CALL):
        yield items[start : start + _ROWS_A_CALL]


def _row_id(category: str, sha256: str) -> str:
    return _key(category) + sha256


def _key(category: str) -> str:
    return hashlib.sha256(category.encode()).hexdigest()


def _check_category(category: str) -> None:
    if not 0 < len(category.encode()) <= MAX_CATEGORY_BYTES:
        raise BadInput(f"a category's name has 1 to {MAX_CATEGORY_BYTES} bytes")


def _check_sha256(digest: str) -> None:
    if not _SHA256.fullmatch(digest):
        raise BadInput("sha256 must be 64 lower-case hexadecimal digits")
