"""What a client takes of the processor for a body: the worker's, and those that could take its place, in one run.

A process on the loopback sends zeros, without TLS, which costs each of them the same. Only the processor time of this process
counts. It decides which client fetches weights, because ComfyUI wants the processor meanwhile. The worker has to see what each
receive gives, as it comes, in the buffer that it writes to disk: another connection takes over from a slow one. With urllib3
that is `read1` and a copy; its `readinto` reads bytes and copies them as well, and a chunk of 4 MB is silent until it is full.
"""

from __future__ import annotations

import http.client
import multiprocessing
import socket
import sys
import time
from typing import TYPE_CHECKING, Final

import httpx2
import urllib3

from bench.report import Figure, parse_args, report
from worker.fetch.http import HttpChannel, Network

if TYPE_CHECKING:
    from collections.abc import Callable

BOUND = 1.0
BYTES, SHORT_BYTES = 10**9, 10**8
BUFFER_BYTES: Final = 1 << 20


def serve(listener: socket.socket, size_bytes: int) -> None:
    """Answer each connection's one request with so many zeros, until the process is ended."""
    zeros = memoryview(bytes(1 << 20))
    while True:
        connection, _ = listener.accept()
        with connection:
            while b"\r\n\r\n" not in connection.recv(1 << 16):
                pass
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {size_bytes}\r\nConnection: close\r\n\r\n".encode())
            left = size_bytes
            while left:
                left -= connection.send(zeros[:left])


def by_worker(url: str) -> int:
    """Read it as `worker.fetch.ranges` does."""
    channel, buffer = HttpChannel(Network()), memoryview(bytearray(BUFFER_BYTES))
    response = channel.get(url, {})
    total = 0
    while length := response.readinto1(buffer):
        total += length
    channel.close()
    return total


def by_http_client(url: str) -> int:
    """Read it with the standard library alone."""
    parts = urllib3.util.parse_url(url)
    connection, buffer = http.client.HTTPConnection(str(parts.host), parts.port), memoryview(bytearray(BUFFER_BYTES))
    connection.request("GET", "/")
    response = connection.getresponse()
    total = 0
    while length := response.readinto(buffer):
        total += length
    connection.close()
    return total


def by_urllib3(url: str) -> int:
    """Read it with urllib3, which boto3 brings, as each receive gives it."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with urllib3.PoolManager() as pool:
        response = pool.request("GET", url, preload_content=False)
        total = 0
        while data := response.read1(BUFFER_BYTES, decode_content=False):
            buffer[: len(data)] = data
            total += len(data)
    return total


def by_urllib3_chunks(url: str) -> int:
    """Read it with urllib3 in chunks of 4 MB."""
    with urllib3.PoolManager() as pool:
        response = pool.request("GET", url, preload_content=False)
        return sum(map(len, response.stream(4 << 20, decode_content=False)))


def by_httpx2(url: str) -> int:
    """Read it with httpx2, which has no way to read into a buffer."""
    with httpx2.Client(trust_env=False) as client, client.stream("GET", url) as response:
        return sum(map(len, response.iter_raw()))


CLIENTS: Final[dict[str, Callable[[str], int]]] = {
    "worker": by_worker,
    "http_client": by_http_client,
    "urllib3": by_urllib3,
    "urllib3_chunks": by_urllib3_chunks,
    "httpx2": by_httpx2,
}


def s_per_gb(read: Callable[[str], int], url: str, size_bytes: int) -> float:
    """Read one body; return the processor time for a GB. Raises RuntimeError for a short one."""
    began_s = time.process_time()
    if (length := read(url)) != size_bytes:
        raise RuntimeError(f"{length} of {size_bytes} bytes came")
    return (time.process_time() - began_s) / size_bytes * 1e9


def main() -> int:
    """Measure and report."""
    options = parse_args(__doc__, samples=7)
    size_bytes = SHORT_BYTES if options.short else BYTES
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = multiprocessing.get_context("fork").Process(target=serve, args=(listener, size_bytes), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        rounds = [{name: s_per_gb(read, url, size_bytes) for name, read in CLIENTS.items()} for _ in range(options.samples + 1)]
        server.terminate()
    rounds = rounds[1:]  # the first warms up
    return report(
        [
            *(Figure.of(f"body_{name}_cpu_s_per_gb", [taken[name] for taken in rounds], "s") for name in CLIENTS),
            Figure.of("body_worker_per_urllib3", [taken["worker"] / taken["urllib3"] for taken in rounds], "x", BOUND),
        ],
        options,
    )


if __name__ == "__main__":
    sys.exit(main())
