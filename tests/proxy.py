"""A proxy before an S3 that counts the bytes it hands out, and is as unreliable as it is told."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

PASSED_ON = {"connection", "transfer-encoding", "keep-alive"}


@dataclass
class Unreliable:
    """How a store fails, and what it did."""

    upstream: str
    address: str = ""
    error_share: float = 0.0
    """Of requests: answered with 503, or, half of those that write, after they were carried out."""
    truncated_share: float = 0.0
    """Of bodies read: cut short, the connection closed."""
    lying_share: float = 0.0
    """Of ranges read: shorter than asked for, and declared so."""
    unconditional: bool = False
    """Whether it takes no notice of conditions on writes."""
    stale_share: float = 0.0
    """Of listings: as they were when the same was asked before."""
    flipped: str = ""
    """Part of a key whose bodies have a bit turned."""
    latency_s: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    lock: threading.Lock = field(default_factory=threading.Lock)
    bytes_sent: Counter[str] = field(default_factory=Counter)
    """By key."""
    faults: Counter[str] = field(default_factory=Counter)
    listings: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """The last true answer, by what was asked."""

    def draws(self, kind: str, share: float) -> bool:
        """Whether a fault of a kind happens now."""
        with self.lock:
            happens = self.rng.random() < share
            self.faults[kind] += happens
            return happens


class Handler(BaseHTTPRequestHandler):
    """One request, passed on as it is: signatures cover the address that the client knows."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def pass_on(self) -> None:
        how: Unreliable = self.server.how
        body = self._body()
        time.sleep(how.latency_s)
        if how.unconditional:
            del self.headers["If-None-Match"]
        writes = self.command in ("PUT", "POST", "DELETE")
        fails = how.draws("error", how.error_share)
        if fails and not (writes and how.draws("late error", 0.5)):
            self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        upstream = http.client.HTTPConnection(urlsplit(how.upstream).netloc, timeout=60)
        upstream.request(self.command, self.path, body=body, headers=dict(self.headers.items()))
        response = upstream.getresponse()
        data = response.read()
        headers = {k: v for k, v in response.getheaders() if k.lower() not in PASSED_ON}
        upstream.close()
        if fails:  # carried out, and nobody told: the client writes twice
            self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
            return
        key = unquote(urlsplit(self.path).path)
        if self.command == "GET" and response.status < 300 and data:
            if "list-type" in self.path:
                data = self._dated(how, data)
            data = self._damaged(how, key, data, headers)
            with how.lock:
                how.bytes_sent[key] += len(data or b"")
            if data is None:
                return
        self._answer(response.status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def _dated(self, how: Unreliable, data: bytes) -> bytes:
        """What is sent of a listing."""
        before = how.listings.get(self.path, data)
        how.listings[self.path] = data
        return before if before != data and how.draws("stale", how.stale_share) else data

    def _damaged(
        self, how: Unreliable, key: str, data: bytes, headers: dict[str, str]
    ) -> bytes | None:
        """What is sent of a body; None if the connection broke in the middle of it."""
        if how.flipped and how.flipped in key:
            how.faults["flipped"] += 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        if "Range" in self.headers and how.draws("lie", how.lying_share):
            return data[: len(data) // 2]
        if how.draws("truncated", how.truncated_share):
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        return data

    def _body(self) -> bytes | None:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length) if length else None
        parts: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        del self.headers["Transfer-Encoding"]
        self.headers["Content-Length"] = str(sum(map(len, parts)))
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        # The size of what a HEAD tells about stays that.
        size = headers.get("Content-Length") if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", size or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def proxied(upstream: str, **how: Any) -> Generator[Unreliable]:
    """A proxy before the server at an address, until the block ends."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.how = Unreliable(upstream=upstream, **how)
    server.how.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.how
    finally:
        server.shutdown()
        server.server_close()
