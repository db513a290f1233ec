"""A scriptable local web server for the tests of downloads."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """How to answer one request. By default the requested range of the file is sent."""

    status: int | None = None  # an error instead of the file
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # close the connection after so many bytes of the body
    reset: bool = False  # close it without an answer
    slow: float = 0.0  # seconds to wait after each kilobyte
    chunked: bool = False  # without a Content-Length


@dataclass
class Server:
    """Files by path (with a query, or for any), and the answers to the next requests.

    `asked` records path, Range and If-Range of past ones.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"1"'
    modified: str | None = None
    ranges: bool = True
    heeds_if_range: bool = True
    length: bool = True
    head: bool = False  # whether HEAD requests are answered; otherwise with 501
    stated: int | None = None  # a length that is sent instead of the true one
    next: list[Answer] = field(default_factory=list)
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    url: str = ""
    http: ThreadingHTTPServer | None = None

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Carry out the next answer, or send the file."""
        given = handler.headers
        self.asked.append((handler.path, given["Range"], given["If-Range"]))
        self.authorizations.append(given["Authorization"])
        todo = self.next.pop(0) if self.next else Answer()
        data = self.files.get(handler.path, self.files.get(handler.path.partition("?")[0]))
        if todo.reset:
            return
        if todo.status or data is None:
            handler.send_response(todo.status or 404)
            for name, value in todo.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = self._head(handler, data, todo)
        if handler.command == "HEAD":
            return
        for start in range(0, len(body[: todo.cut]), 1024):
            part = body[start : min(start + 1024, todo.cut or len(body))]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if todo.chunked else part)
            time.sleep(todo.slow)
        if todo.chunked and todo.cut is None:
            handler.wfile.write(b"0\r\n\r\n")

    def _head(self, handler: BaseHTTPRequestHandler, data: bytes, todo: Answer) -> bytes:
        """Send status and headers; returns the body."""
        given = handler.headers
        same = given["If-Range"] in (None, self.etag, self.modified) or not self.heeds_if_range
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", given["Range"] or "")
        start, end = (int(found[1]), int(found[2] or len(data) - 1)) if found else (0, len(data) - 1)
        partly = self.ranges and same and given["Range"] is not None
        if partly and start >= len(data):
            handler.send_response(416)
            body = b""
        else:
            handler.send_response(206 if partly else 200)
            body = data[start : end + 1] if partly else data
            if partly:
                handler.send_header("Content-Range", f"bytes {start}-{end}/{self.stated or len(data)}")
        lengths = (
            {"Transfer-Encoding": "chunked"}
            if todo.chunked
            else {"Content-Length": str(len(body) if partly else self.stated or len(body))}
        )
        tags = {"ETag": self.etag, "Last-Modified": self.modified}
        for name, value in {**(lengths if self.length else {}), **tags, **todo.headers}.items():
            if value is not None:
                handler.send_header(name, value)
        handler.end_headers()
        return body


@contextmanager
def serving(server: Server | None = None) -> Iterator[Server]:
    """A server at `url`, for the length of a `with` block."""
    server = server or Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.close_connection = True
            with suppress(ConnectionError):  # the client hung up
                server.answer(self)

        def do_HEAD(self):
            if server.head:
                self.do_GET()
            else:
                self.send_error(501)

        def end_headers(self):
            self.send_header("Connection", "close")  # or a client may ask again on the connection that is about to go
            super().end_headers()

        def log_message(self, *words):
            pass

    class Listener(ThreadingHTTPServer):
        request_queue_size = 128  # or connections that are opened at once wait for a second

    with Listener(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        server.url, server.http = f"http://127.0.0.1:{http.server_port}", http
        yield server
        http.shutdown()
