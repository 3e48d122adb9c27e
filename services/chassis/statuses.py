"""The one map between our errors and gRPC statuses, both ways.

| raised while serving            | status             | raised at the caller |
|---------------------------------|--------------------|----------------------|
| NotFound                        | NOT_FOUND          | NotFound             |
| BadInput                        | INVALID_ARGUMENT   | BadInput             |
| Exhausted                       | RESOURCE_EXHAUSTED | Exhausted            |
| Transient                       | UNAVAILABLE        | Transient            |
| TimeoutError, the call's end    | DEADLINE_EXCEEDED  | Transient            |
| anything else: a bug            | INTERNAL           | Transient            |

Somebody else's bug is transient to the caller: he tries again a few times and then lays the event aside, instead of
crashing over it as well. A message over gRPC's own size limit is a BadInput, though gRPC calls it RESOURCE_EXHAUSTED:
waiting won't make it smaller. Statuses that speak of a wrong deployment (UNIMPLEMENTED, …) stay what they are.
"""

import grpc

from services.chassis.errors import BadInput, Exhausted, NotFound, Transient

# Trailing metadata is limited to 8 KiB, and percent-encoding may triple it.
_MAX_DETAILS = 1000

_TO_ERROR: dict[grpc.StatusCode, type[Exception]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.INVALID_ARGUMENT: BadInput,
    grpc.StatusCode.OUT_OF_RANGE: BadInput,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.UNAVAILABLE: Transient,
    grpc.StatusCode.DEADLINE_EXCEEDED: Transient,
    grpc.StatusCode.ABORTED: Transient,
    grpc.StatusCode.CANCELLED: Transient,
    grpc.StatusCode.INTERNAL: Transient,
    grpc.StatusCode.UNKNOWN: Transient,
}


def from_rpc_error(error: grpc.aio.AioRpcError) -> Exception:
    """What to raise at the caller, with the server's words. The error itself where none of ours fits."""
    details = error.details() or ""
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in details:
        return BadInput(details)
    kind = _TO_ERROR.get(error.code())
    return error if kind is None else kind(details or error.code().name)


def to_status(error: Exception) -> tuple[grpc.StatusCode, str] | None:
    """The status and its details, or None for a bug, about which the caller is told nothing but INTERNAL."""
    if isinstance(error, grpc.aio.AioRpcError):
        error = from_rpc_error(error)
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED, "timed out"
    for kind, code in (
        (NotFound, grpc.StatusCode.NOT_FOUND),
        (BadInput, grpc.StatusCode.INVALID_ARGUMENT),
        (Exhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Transient, grpc.StatusCode.UNAVAILABLE),
    ):
        if isinstance(error, kind):
            return code, str(error).encode("utf-8", "backslashreplace").decode()[:_MAX_DETAILS]
    return None
