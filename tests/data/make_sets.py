"""Built sets and written thoughts for the tests: few episodes, and a real HTTP server that plays the endpoint."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from agentiad.v1 import trajectory_pb2 as pb
from services.data import demonstrations, source
from services.data.build import BuildSettings
from services.data.demonstrations import Episode
from services.data.endpoint import EndpointSettings
from services.data.source import Source
from services.data.words import Words

GOOD = "I see how the surface looks here and go on from that."

Request = dict[str, Any]
# Of a request: status, headers and body. An answer that blocks is a slow one.
Reply = tuple[int, dict[str, str], bytes]
Play = Callable[[Request], Reply]


def make_settings(out: Path, samples: int = 6, **changes: Any) -> BuildSettings:
    return BuildSettings(out=out, samples=samples, seed=3, **changes)


def make_source(words: Words = Words.VARIED) -> Source:
    return Source(source.PROCEDURAL, 3, pb.COMPARISON_VIEW_COMPOSITE, words=words)


def make_episodes(folder: Path, count: int = 6) -> list[Episode]:
    (folder / demonstrations.IMAGES).mkdir(parents=True, exist_ok=True)
    return [demonstrations.store(source.demonstration(i, make_source()), folder) for i in range(count)]


def make_completion(content: object) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


class Server:
    """An endpoint under `url` that answers as `play` says and remembers what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Request] = []
        self.keys: set[str | None] = set()

    def settings(self, **changes: Any) -> EndpointSettings:
        return EndpointSettings(**{"url": self.url, "model": "writer", "key": "secret", "pause": 0.01, **changes})


@contextmanager
def make_server(play: Play) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/chat/completions"
            with lock:
                server.requests.append(request)
                server.keys.add(self.headers["authorization"])
            status, headers, body = play(request)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    lock = threading.Lock()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def words_of(request: Request) -> str:
    """All text of a request's first two messages."""
    system, user = request["messages"][:2]
    return "\n".join([system["content"], *(part["text"] for part in user["content"] if part["type"] == "text")])
