"""An OpenAI-compatible chat endpoint: asked at most once for the same thing, patiently, and never for ever.

What was answered is kept on disk under the digest of the whole request body, so that a rerun asks for the rest alone.
The key travels in a header: neither the digest, the disk nor an error holds it.
"""

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from services.chassis.errors import BadInput, Transient
from services.data.demonstrations import write_whole

Messages = list[dict[str, Any]]

_LONGEST_PAUSE = 60.0
_CONNECT_SECONDS = 10.0
_TOO_MANY_REQUESTS = 429


@dataclass(frozen=True)
class EndpointSettings:
    url: str  # …/v1
    model: str
    key: str = field(default="", repr=False)
    concurrency: int = 8  # calls at a time
    deadline: float = 120.0  # seconds a call, from connecting to the last byte
    tries: int = 6  # of a call that is refused for now (429, 5xx) or breaks off
    pause: float = 1.0  # seconds before the second try; doubled each time


class EndpointRefusalError(BadInput):
    """The endpoint does not take such requests, now or later."""


class EndpointDownError(Transient):
    """The endpoint could not be reached or served nothing within all tries."""


class NoAnswerError(Exception):
    """This one request brought nothing to use; the text is a reason to be counted."""


class Endpoint:
    """One client for many calls: `async with Endpoint(settings, cache) as endpoint`."""

    def __init__(self, settings: EndpointSettings, cache: Path) -> None:
        self.settings, self.cache = settings, cache
        self.address = f"{settings.url.rstrip('/')}/chat/completions"
        self._calls = asyncio.Semaphore(settings.concurrency)
        self._reached = False

    async def __aenter__(self) -> Self:
        self.cache.mkdir(parents=True, exist_ok=True)
        headers = {"authorization": f"Bearer {self.settings.key}"} if self.settings.key else {}
        # A whole call has its own deadline: the client's other timeouts are from one byte to the next.
        self._client = httpx2.AsyncClient(headers=headers, timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def ask(self, messages: Messages) -> str:
        """The answer's text. Raises NoAnswerError, EndpointRefusalError or EndpointDownError."""
        body = json.dumps({"model": self.settings.model, "messages": messages}, sort_keys=True).encode()
        path = self.cache / f"{hashlib.sha256(body).hexdigest()}.json"
        if path.exists():
            return str(json.loads(path.read_bytes()))
        async with self._calls:
            content = _content(await self._post(body))
        write_whole(path, json.dumps(content).encode())
        return content

    async def _post(self, body: bytes) -> httpx2.Response:
        problem = ""
        for attempt in range(self.settings.tries):
            pause = self.settings.pause * 2**attempt
            try:
                async with asyncio.timeout(self.settings.deadline):
                    response = await self._client.post(
                        self.address, content=body, headers={"content-type": "application/json"}
                    )
            except TimeoutError:
                raise NoAnswerError("no answer within the deadline") from None
            except (httpx2.TransportError, httpx2.InvalidURL) as error:
                problem = str(error) or type(error).__name__
                if not self._reached:  # an address that never answered is a wrong one more often than a broken one
                    break
            else:
                self._reached = True
                if response.status_code != _TOO_MANY_REQUESTS and response.status_code < 500:
                    return self._accepted(response)
                problem = f"status {response.status_code}"
                pause = _asked_pause(response, pause)
            if attempt + 1 < self.settings.tries:
                await asyncio.sleep(min(pause, _LONGEST_PAUSE))
        raise EndpointDownError(
            f"{self.address} cannot be used ({problem}): what is written stays; run the same command when it answers"
        )

    def _accepted(self, response: httpx2.Response) -> httpx2.Response:
        if response.status_code != httpx2.codes.OK:
            raise EndpointRefusalError(
                f"{self.address} answers {response.status_code}: {response.text[:200]} "
                "(see --thoughts-url, --thoughts-model and THOUGHTS_API_KEY)"
            )
        return response


def _content(response: httpx2.Response) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise NoAnswerError("not a chat completion") from None
    if not isinstance(content, str):
        raise NoAnswerError("not a chat completion")
    return content


def _asked_pause(response: httpx2.Response, default: float) -> float:
    """Seconds that `Retry-After` asks for; its date form is as good as none."""
    asked = response.headers.get("retry-after", "")
    return float(asked) if asked.isdecimal() else default
