"""HTTP answers whose header must be complete in time.

The time-out of a socket holds for each read alone: a server that sends a byte of its header now and then would hold a
reader for ever.
"""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.request
from contextlib import suppress
from typing import Any


def opened_in_time(request: urllib.request.Request, timeout: float) -> Any:
    """`urllib.request.urlopen`, with `timeout` in seconds for each read and for the whole header.

    Raises what that raises; TimeoutError if the header does not end.
    """
    return urllib.request.build_opener(_HttpHandler, _HttpsHandler).open(request, timeout=timeout)


class _InTime:
    """A connection that is shut when its time is over and the header of the answer is not complete."""

    def getresponse(self) -> Any:
        over = threading.Event()

        def give_up() -> None:
            over.set()
            with suppress(OSError, TypeError):  # closed by now
                # The plain socket's: that of TLS would take its state from under the thread that reads.
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # type: ignore[attr-defined]

        timer = threading.Timer(self.timeout, give_up)  # type: ignore[attr-defined]
        timer.daemon = True
        timer.start()
        try:
            response = super().getresponse()  # type: ignore[misc]
        except Exception:
            if not over.is_set():
                raise
        finally:
            timer.cancel()
        if over.is_set():  # also where half a header was taken for all of it
            raise TimeoutError("the header of its answer does not end")
        return response


class _Http(_InTime, http.client.HTTPConnection):
    pass


class _Https(_InTime, http.client.HTTPSConnection):
    pass


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Http, request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Https, request)
