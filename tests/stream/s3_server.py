"""SeaweedFS on loopback, and a proxy before it that breaks requests by turns."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for scripts and benchmarks
from free_ports import free_ports

KEY, SECRET = "crossgate-test", "not-a-secret"
FAULTS = ("500", "503", "slow down", "reset", "truncated", "wrong length", "stall")
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>by the proxy</Message></Error>"


def binary() -> str | None:
    """Returns the path of the server, or None where it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def seaweed(folder: Path, ip: str = "127.0.0.1") -> Iterator[str]:
    """Runs a server that knows `KEY` alone; gives its URL. It checks signatures, unlike a mock."""
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = free_ports(8)
    options = {
        "dir": folder,
        "ip": ip,
        "ip.bind": ip,
        "master.port": master,
        "master.port.grpc": master_grpc,
        "master.volumeSizeLimitMB": 64,
        "volume.port": volume,
        "volume.port.grpc": volume_grpc,
        "volume.max": 40,
        "filer.port": filer,
        "filer.port.grpc": filer_grpc,
        "s3.port": s3,
        "s3.port.grpc": s3_grpc,
        "s3.port.iceberg": 0,  # catalogues on ports of their own, where two servers on a machine meet
        "s3.port.lance": 0,
        "s3.config": folder / "s3.json",
    }
    command = [binary(), "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in options.items())]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for(f"http://{ip}:{s3}", process, folder / "log")
        yield f"http://{ip}:{s3}"
    finally:
        process.kill()
        process.wait()


def client(url: str):
    """Returns a boto3 client with the right credentials."""
    patience = Config(connect_timeout=2, read_timeout=20, retries={"max_attempts": 0})
    return boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=patience,
    )


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(BotoCoreError, ClientError):
            client(url).create_bucket(Bucket="ready")
            client(url).put_object(Bucket="ready", Key="x", Body=b"x")
            return
        time.sleep(0.1)
    raise AssertionError(f"SeaweedFS did not start:\n{log.read_text()[-2000:]}")


class Proxy:
    """Passes requests on to a server; every `every`-th one meets the next of `FAULTS` instead.

    Attributes:
        url: where it listens.
        requests: how many came.
        injected: the faults so far, in order.
        every: 0 for no faults at all.
    """

    def __init__(self, upstream: str, stall: float) -> None:
        self._host, self._port = upstream.removeprefix("http://").split(":")
        self._stall = stall
        self.url, self.requests, self.every = "", 0, 0
        self.injected: list[str] = []

    async def serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        """Handles one connection, request by request."""
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while head := await client_in.readuntil(b"\r\n\r\n"):
                if b"expect: 100-continue" in head.lower():
                    client_out.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
                body = await client_in.readexactly(_length(head))
                self.requests += 1
                fault = ""
                if self.every and self.requests % self.every == 0:
                    fault = FAULTS[len(self.injected) % len(FAULTS)]
                    self.injected.append(fault)
                if not await self._answer(head, body, fault, client_out):
                    break
        client_out.close()

    async def _answer(self, head: bytes, body: bytes, fault: str, out: asyncio.StreamWriter) -> bool:
        """Answers; says whether the connection goes on."""
        if fault in ("500", "503", "slow down"):
            status = "500 Internal Server Error" if fault == "500" else "503 Service Unavailable"
            code = {"500": "InternalError", "503": "ServiceUnavailable", "slow down": "SlowDown"}[fault]
            text = b"" if head.startswith(b"HEAD") else _ERROR.format(code).encode()
            out.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
            await out.drain()
            return True
        if fault == "stall":
            await asyncio.sleep(self._stall)
            return False
        if fault == "reset":
            out.transport.abort()
            return False
        answer_head, answer = await self._ask(head, body)
        if fault == "wrong length":  # fewer bytes than asked for, and the header agrees with them
            answer = answer[: len(answer) // 2]
            lines = [line for line in answer_head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
            answer_head = b"\r\n".join([*lines[:-2], f"Content-Length: {len(answer)}".encode(), b"", b""])
        out.write(answer_head + (answer[: len(answer) // 2] if fault == "truncated" else answer))
        await out.drain()
        return fault != "truncated"

    async def _ask(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        up_in, up_out = await asyncio.open_connection(self._host, int(self._port))
        up_out.write(head + body)
        answer_head = await up_in.readuntil(b"\r\n\r\n")
        if head.startswith(b"HEAD") or b" 204 " in answer_head[:16] or b" 304 " in answer_head[:16]:
            answer = b""
        else:
            assert b"chunked" not in answer_head.lower(), "the server is expected to say how long its answers are"
            answer = await up_in.readexactly(_length(answer_head))
        up_out.close()
        return answer_head, answer


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@contextmanager
def faulty(upstream: str, *, stall: float) -> Iterator[Proxy]:
    """Runs a proxy before a server, in a thread."""
    proxy, loop = Proxy(upstream, stall), asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(proxy.serve, "127.0.0.1", 0))
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.close()
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
