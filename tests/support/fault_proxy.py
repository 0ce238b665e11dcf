"""A proxy on loopback before a real S3 server: it records the requests, and spoils some responses, in a fixed order."""

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

SLOW_DOWN = (
    b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)
DENIED = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
READING = (b"GET", b"HEAD")
# busy: 503 SlowDown. reset: the connection is cut before the request reaches the server. lost: the server executes the request,
# but its response is lost. cut: half of the response's body. slow: a pause in the body. stalled: half of the body, then nothing
FAULTS = ("busy", "reset", "lost", "cut", "slow", "stalled")


class FaultProxy:
    """A proxy that applies the next of `faults` to every `every`-th request.

    Args:
        upstream: endpoint of the server, http://host:port.
        faults: names of faults from `FAULTS`, repeated in this order.
        every: one in this many requests gets a fault. 0: none does.
        pause: seconds before the second half of a slow body.
        stall: seconds before the second half of a stalled body.
        unreachable: requests with this string in their path always get 503 SlowDown.
        read_only: deny all requests except GET and HEAD.
    """

    def __init__(
        self,
        upstream: str,
        faults: Iterable[str] = FAULTS,
        every: int = 3,
        pause: float = 0.2,
        stall: float = 30,
        unreachable: str = "",
        read_only: bool = False,
    ) -> None:
        self._upstream = urlsplit(upstream)
        self._faults = itertools.cycle(faults)
        self._every, self._pause, self._stall, self._unreachable = every, pause, stall, unreachable
        self._is_read_only, self._n_requests = read_only, 0
        self.suffered: Counter[str] = Counter()
        self.requests: list[str] = []
        """Requests in the order of their arrival, as "METHOD /bucket/key". A listing has the method LIST."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = starting.result(10)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        serving = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    def _fault_of(self, head: bytes) -> str:
        if self._unreachable and self._unreachable.encode() in head.partition(b"\r\n")[0]:
            return "busy"
        self._n_requests += 1
        return next(self._faults) if self._every and self._n_requests % self._every == 0 else ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # One request per connection, so the end of the connection marks the end of the response.
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # one side closed the connection, and the client sees that
        finally:
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request, *lines = head.rstrip().split(b"\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        if b"expect" in fields:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
        self.requests.append(_told(request.decode()))
        if self._is_read_only and not request.startswith(READING):
            await _refuse(writer, request, b"403 Forbidden", DENIED)
            return
        fault = self._fault_of(request + b"\r\n")
        if fault:
            self.suffered[fault] += 1
        if fault == "busy":
            await _refuse(writer, request, b"503 Slow Down", SLOW_DOWN)
            return
        if fault == "reset":
            writer.transport.abort()
            return
        kept = [line for line in lines if line.partition(b":")[0].lower() not in (b"connection", b"expect")]
        answer = await self._ask(b"\r\n".join([request, *kept, b"Connection: close\r\n\r\n"]) + body)
        if fault == "lost":
            writer.transport.abort()
            return
        middle = (answer.find(b"\r\n\r\n") + 4 + len(answer)) // 2
        writer.write(answer[:middle])
        await writer.drain()
        if fault in ("slow", "stalled"):
            await asyncio.sleep(self._pause if fault == "slow" else self._stall)
        if fault != "cut":
            writer.write(answer[middle:])
            await writer.drain()

    async def _ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
        try:
            writer.write(request)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


def _told(request: str) -> str:
    method, target, _ = request.split(" ")
    path, _, query = target.partition("?")
    return f"{'LIST' if 'list-type=' in query else method} {unquote(path)}"


async def _refuse(writer: asyncio.StreamWriter, request: bytes, status: bytes, body: bytes) -> None:
    writer.write(
        b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        + (b"" if request.startswith(b"HEAD") else body)
    )
    await writer.drain()
