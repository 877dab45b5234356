"""A proxy in front of a real server that behaves as an object store does on a bad day."""

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
    """Listens in front of a server; every client is served by a thread of its own, in the way that `_way` returns."""

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
                threading.Thread(target=self._way(), args=(client,), daemon=True).start()

    def _way(self) -> Callable[[socket.socket], None]:
        raise NotImplementedError


class FlakyProxy(_Proxy):
    """One connection in twenty is reset, one in twenty answered 503; every other is cut after 3 kB to 1 MB of answers.

    So downloads end short, in their headers or in their bodies. `faults` counts what was done to clients.
    """

    def __init__(self, address: str, seed: int) -> None:
        self._random = random.Random(seed)
        self.faults = {"reset": 0, "unavailable": 0, "cut": 0}
        super().__init__(address)

    def _way(self) -> Callable[[socket.socket], None]:
        lot, budget = self._random.random(), int(math.exp(self._random.uniform(8, 14)))
        return lambda client: self._serve(client, lot, budget)

    def _serve(self, client: socket.socket, lot: float, budget: int) -> None:
        with client, contextlib.suppress(OSError):
            if lot < 0.05:
                self._reset(client, "reset")
            elif lot < 0.1:
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
        """Close at once: the peer sees `connection reset`, not an orderly end."""
        self.faults[fault] += 1
        client.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it, which would keep it open
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()


class DelayProxy(_Proxy):
    """Passes everything on, each request `latency_s` late; between `stall` and `resume` it answers nothing at all, or
    not what it was told to hold. `held` is set as soon as there is such a request.
    """

    def __init__(self, address: str, latency_s: float = 0.0) -> None:
        self._latency_s = latency_s
        self._open, self.held = threading.Event(), threading.Event()
        self._holding = b""
        self.resume()
        super().__init__(address)

    def stall(self, holding: str = "") -> None:
        """Stop answering requests whose first line has a match of this expression; connections stay open."""
        self._holding = holding.encode()
        self.held.clear()
        self._open.clear()

    def resume(self) -> None:
        """Answer again, also what was asked meanwhile."""
        self._open.set()

    def _way(self) -> Callable[[socket.socket], None]:
        return self._serve

    def _serve(self, client: socket.socket) -> None:
        """The server is called once there is something to tell it: one that serves a client at a time would wait."""
        with client, contextlib.suppress(OSError):
            asked = self._asked(client)
            with socket.create_connection(self._backend) as server:
                server.sendall(asked)
                threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()
                while data := server.recv(1 << 16):
                    client.sendall(data)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := self._asked(client):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _asked(self, client: socket.socket) -> bytes:
        data = client.recv(1 << 16)
        time.sleep(self._latency_s)
        if not self._open.is_set() and re.search(self._holding, data.partition(b"\r\n")[0]):
            self.held.set()
            self._open.wait()
        return data


@contextmanager
def serve_delayed(address: str, latency_s: float = 0.0) -> Iterator[DelayProxy]:
    """Serve a server's address through a DelayProxy for the length of a `with`."""
    relay = DelayProxy(address, latency_s)
    try:
        yield relay
    finally:
        relay.resume()
        relay.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 14):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def serve_flaky(address: str, seed: int) -> Iterator[FlakyProxy]:
    """Serve a server's address badly for the length of a `with`."""
    proxy = FlakyProxy(address, seed)
    try:
        yield proxy
    finally:
        proxy.close()
