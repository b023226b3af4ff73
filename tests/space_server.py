"""A static Space on the loopback address, with the headers that its `custom_headers` ask the Hub to send."""

import hashlib
import mimetypes
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

from loopback_server import LoopbackServer

ISOLATED = {
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "cross-origin",
}
mimetypes.add_type("text/javascript", ".mjs")
mimetypes.add_type("application/wasm", ".wasm")


class SpaceServer(LoopbackServer):
    """Serves files from the first of `folders` that holds them; `requests` lists method and path of every request."""

    def __init__(self, *folders: Path, port: int = 0):
        super().__init__(Handler, port)
        self.folders = folders
        self.requests: list[tuple[str, str]] = []
        self.tags: dict[Path, str] = {}

    def tag(self, path: Path) -> str:
        if path not in self.tags:
            self.tags[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return f'"{self.tags[path]}"'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):  # noqa: N802
        name = urlsplit(self.path).path.lstrip("/") or "index.html"
        self.server.requests.append((self.command, name))
        path = next((folder / name for folder in self.server.folders if (folder / name).is_file()), None)
        body = path.read_bytes() if path else b""
        headers = dict(ISOLATED) | {"Content-Length": str(len(body)), "Cache-Control": "no-cache"}
        if path:
            headers |= {
                "ETag": self.server.tag(path),
                "Content-Type": mimetypes.guess_type(name)[0] or "application/octet-stream",
            }
        self.send_response(200 if path else 404)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815
