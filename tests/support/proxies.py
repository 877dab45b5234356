"""Serve an object store through a proxy that adds faults or latency."""

import contextlib
import math
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

UNAVAILABLE = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: 50\r\nConnection: close\r\n\r\n"
    b"<Error><Code>SlowDown</Code><Message/></Error>    "
)


class _Proxy:
    """A proxy before a server, with a thread for every client.

    `_make_handler` returns the function that serves the next client.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("http://").partition(":")
        self._backend = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._make_handler(), args=(client,), daemon=True).start()

    def _make_handler(self) -> Callable[[socket.socket], None]:
        raise NotImplementedError


class FlakyProxy(_Proxy):
    """A proxy with random faults.

    One connection in twenty is reset, and one in twenty gets the answer 503. Every other connection is reset after 3 kB
    to 1 MB of answers, so downloads end early, in their headers or in their bodies. `faults` counts the faults by kind.
    """

    def __init__(self, address: str, seed: int) -> None:
        self._random = random.Random(seed)
        self.faults = {"reset": 0, "unavailable": 0, "cut": 0}
        super().__init__(address)

    def _make_handler(self) -> Callable[[socket.socket], None]:
        draw, budget = self._random.random(), int(math.exp(self._random.uniform(8, 14)))
        return lambda client: self._serve(client, draw, budget)

    def _serve(self, client: socket.socket, draw: float, budget: int) -> None:
        with client, contextlib.suppress(OSError):
            if draw < 0.05:
                self._reset(client, "reset")
            elif draw < 0.1:
                client.recv(1 << 16)
                client.sendall(UNAVAILABLE)
                self.faults["unavailable"] += 1
            else:
                self._forward(client, budget)

    def _forward(self, client: socket.socket, budget: int) -> None:
        with socket.create_connection(self._backend) as server:
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            while data := server.recv(1 << 14):
                client.sendall(data[:budget])
                budget -= len(data)
                if budget <= 0:
                    self._reset(client, "cut")
                    return

    def _reset(self, client: socket.socket, fault: str) -> None:
        """Reset the connection, so that the peer sees no orderly end."""
        self.faults[fault] += 1
        # This wakes the thread that reads from the socket and would keep it open.
        client.shutdown(socket.SHUT_RD)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()


class DelayProxy(_Proxy):
    """A proxy that forwards each request after `latency_s`.

    Between `stall` and `resume` it holds all requests or those that match. `held` is set as soon as it holds one.
    """

    def __init__(self, address: str, latency_s: float = 0.0) -> None:
        self._latency_s = latency_s
        self._open, self.held = threading.Event(), threading.Event()
        self._held_pattern = b""
        self.resume()
        super().__init__(address)

    def stall(self, pattern: str = "") -> None:
        """Hold requests whose first line matches a regular expression.

        Connections stay open.
        """
        self._held_pattern = pattern.encode()
        self.held.clear()
        self._open.clear()

    def resume(self) -> None:
        """Forward requests again, and also the held ones."""
        self._open.set()

    def _make_handler(self) -> Callable[[socket.socket], None]:
        return self._serve

    def _serve(self, client: socket.socket) -> None:
        """Connect to the server after the first request.

        A server with one client at a time would otherwise wait for the request.
        """
        with client, contextlib.suppress(OSError):
            request = self._receive(client)
            with socket.create_connection(self._backend) as server:
                server.sendall(request)
                threading.Thread(target=self._forward_requests, args=(client, server), daemon=True).start()
                while data := server.recv(1 << 16):
                    client.sendall(data)

    def _forward_requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := self._receive(client):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _receive(self, client: socket.socket) -> bytes:
        data = client.recv(1 << 16)
        time.sleep(self._latency_s)
        if not self._open.is_set() and re.search(self._held_pattern, data.partition(b"\r\n")[0]):
            self.held.set()
            self._open.wait()
        return data


@contextmanager
def serve_delayed(address: str, latency_s: float = 0.0) -> Iterator[DelayProxy]:
    """Serve a server through a `DelayProxy` until the block ends."""
    proxy = DelayProxy(address, latency_s)
    try:
        yield proxy
    finally:
        proxy.resume()
        proxy.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 14):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def serve_flaky(address: str, seed: int) -> Iterator[FlakyProxy]:
    """Serve a server through a `FlakyProxy` until the block ends."""
    proxy = FlakyProxy(address, seed)
    try:
        yield proxy
    finally:
        proxy.close()
