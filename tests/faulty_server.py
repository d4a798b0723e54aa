"""A local HTTP server over a folder that fails when told to: errors, resets, short, wrong and stalled bodies."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STATUSES = {"500": 500, "503": 503, "403": 403, "404": 404, "429": 429}


class FaultyServer(ThreadingHTTPServer):
    """faults: for each file name, what happens to its next requests, in turn; the key "*" is for every other file.
    A list that ends leaves the file sound; a plain word is for ever. requests: names in the order they came."""

    daemon_threads = True
    handler: type["Handler"]

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), self.handler)
        self.folder, self.lock = folder, threading.Lock()
        self.faults: dict[str, list[str] | str] = {}
        self.requests: list[str] = []
        self.released = threading.Event()  # lets stalled answers go
        self.watch: Callable[[], None] = lambda: None  # called at each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data"

    def shards(self) -> list[str]:
        return [name for name in self.requests if name.endswith(".tfrecord")]

    def next_fault(self, name: str) -> str:
        with self.lock:
            self.requests.append(name)
            faults = self.faults.get(name, self.faults.get("*", []))
            if isinstance(faults, str):
                return faults
            return faults.pop(0) if faults else ""

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are no news."""


class Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        self.server.watch()
        fault = self.server.next_fault(name)
        file = self.server.folder / name
        if fault in STATUSES or not file.is_file():
            self.send_error(STATUSES.get(fault, 404))
            return
        self._answer(file.read_bytes(), fault)

    def _answer(self, data: bytes, fault: str) -> None:
        if fault == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(200)
        if fault != "cut":  # without a length only the end of the connection ends the body
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self._send_body(data, fault)

    def _send_body(self, data: bytes, fault: str) -> None:
        half = len(data) // 2
        self.wfile.write(data[:half] if fault in ("reset", "short", "cut", "stall") else data)
        self.wfile.flush()
        if fault == "stall":
            self.server.released.wait(60)
        if fault in ("reset", "stall"):  # a reset instead of an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


FaultyServer.handler = Handler


class _RangeHandler(Handler):
    """Answers HEAD, and requests for parts of a file, as GDAL makes them."""

    def do_HEAD(self) -> None:
        file = self.server.folder / self.path.partition("?")[0].removeprefix("/data/")
        fault = self.server.next_fault(file.name)
        if fault in STATUSES or not file.is_file():
            self.send_error(STATUSES.get(fault, 404))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(file.stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        file = self.server.folder / self.path.partition("?")[0].removeprefix("/data/")
        self.server.watch()
        fault = self.server.next_fault(file.name)
        if fault in STATUSES or not file.is_file():
            self.send_error(STATUSES.get(fault, 404))
            return
        data, asked = file.read_bytes(), self.headers.get("Range", "")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            if start >= len(data):
                self.send_error(416)
                return
        else:
            start, end = 0, len(data) - 1
        part = data[start : end + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.end_headers()
        self._send_body(part, fault)


class RangeServer(FaultyServer):
    """Serves the folders below its folder too."""

    handler = _RangeHandler


@contextlib.contextmanager
def serving(folder: Path, kind: type[FaultyServer] = FaultyServer) -> Iterator[FaultyServer]:
    server = kind(folder)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
