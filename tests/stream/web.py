"""A file server on loopback that honours ranges, notes what it gave, and can be told to misbehave."""

from __future__ import annotations

import http.server
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Meddle = Callable[[str, int, bytes], bytes]
"""File name, first byte, body -> the body that is sent."""


class Web:
    """A running server.

    Attributes:
        url: of the folder.
        given: file name -> bytes sent.
        meddle: changes bodies of ranges, or waits.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.given, self.url = folder, Counter[str](), ""
        self.meddle: Meddle = lambda name, start, body: body


@contextmanager
def serving(folder: Path) -> Iterator[Web]:
    """Serves a folder until the block is left."""
    web = Web(folder)

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *args) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
            if not path.is_file() or not wanted:
                super().do_GET()
                return
            first, last = (int(x) for x in wanted.removeprefix("bytes=").split("-"))
            size = path.stat().st_size
            body = web.meddle(path.name, first, path.read_bytes()[first : last + 1])
            web.given[path.name] += len(body)
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
