"""Servers on 127.0.0.1 from which tests download shards."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


class FileServer(ThreadingHTTPServer):
    """Serves a folder over http. `faults[name]` are the faults of the next requests for a file: a status, or timeout,
    truncate, corrupt. `requests` counts requests by name. `release` ends all timeouts. Every response is delayed by
    `delay` seconds."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[int | str]] = {}
        self.requests: Counter[str] = Counter()
        self.release = threading.Event()
        self.delay = 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Do not print errors of clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self):
        self._start(200, (self.server.folder / self._name).stat().st_size)

    def do_GET(self):
        server = self.server
        server.requests[self._name] += 1
        time.sleep(server.delay)
        pending = server.faults.get(self._name)
        fault = pending.pop(0) if pending else 200
        if isinstance(fault, int) and fault != 200:
            reason = EXPIRED if fault == 400 else b""
            self._start(fault, len(reason))
            self.wfile.write(reason)
            return
        if not (server.folder / self._name).exists():
            self._start(404, 0)
            return
        content = bytearray((server.folder / self._name).read_bytes())
        half = len(content) // 2
        if fault == "corrupt":
            content[half + server.requests[self._name]] ^= 255
        self._start(200, len(content))
        self.wfile.write(content[:half])
        if fault == "timeout":
            server.release.wait(20)
        if fault != "truncate":
            self.wfile.write(content[half:])

    def _start(self, status: int, length: int):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    @property
    def _name(self) -> str:
        return self.path.rpartition("/")[2]

    def log_message(self, *args):
        """Do not print requests."""


@contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serve_s3(folder: Path) -> Iterator[str]:
    """Serve a folder's files as the bucket `shards` of an S3 server. Yields the server's URL."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
        )
        client.create_bucket(Bucket="shards")
        for path in folder.iterdir():
            client.upload_file(str(path), "shards", path.name)
        yield url
    finally:
        server.stop()


def use_s3(monkeypatch, endpoint):
    S3FileSystem.clear_instance_cache()  # connected to other servers
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def without_credentials(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
