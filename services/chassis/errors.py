"""The kinds of error, as exceptions. Anything else that is raised is a bug: it crashes, and the event comes again.

They are decided on at the boundary only: `rpc` turns them into gRPC statuses and back, the bus into retries and DLQ
records. Their text is shown to the caller, so it says what is wrong with his input and holds no secret.
"""


class BadInput(Exception):  # noqa: N818
    """The input itself is wrong and will be wrong next time: INVALID_ARGUMENT, or the DLQ with the reason."""


class NotFound(BadInput):
    """What the input names does not exist: NOT_FOUND, or the DLQ with the reason."""


class Exhausted(Exception):  # noqa: N818
    """There is no room right now: RESOURCE_EXHAUSTED. The caller backs off and tries again."""


class Transient(Exception):  # noqa: N818
    """Something beyond the input failed or timed out and may work soon: UNAVAILABLE. Retried within a deadline."""
