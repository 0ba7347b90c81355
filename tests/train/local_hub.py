"""A hub on this machine: what `huggingface_hub` asks for to upload a folder and fetch it."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPOSITORY = "me/adapter"
_COMMIT = "0123456789" * 4


class _Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Make a repository, choose how files are uploaded, take a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/{REPOSITORY}"
        if self.path.endswith("/repos/create"):
            self._answer({"url": address, "name": REPOSITORY})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            self._answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[entry["value"]["path"]] = content
            self._answer({"commitUrl": f"{address}/commit/{_COMMIT}", "commitOid": _COMMIT})
        else:
            self._answer({"errors": [], "warnings": []})  # of the card's head

    def do_GET(self) -> None:
        """List a repository, or give a file of it."""
        resolved = re.fullmatch(rf"/{REPOSITORY}/resolve/\w+/(.+)", self.path)
        if resolved and resolved[1] in self.files:
            self._send(self.files[resolved[1]], "application/octet-stream")
        elif self.path.startswith(f"/api/models/{REPOSITORY}/tree"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _COMMIT}
                for name, content in self.files.items()
            ]
            self._answer(tree)
        elif self.path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in self.files]
            self._answer({"id": REPOSITORY, "sha": _COMMIT, "siblings": siblings})
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815 - the name that the server looks for

    def _answer(self, content: Any) -> None:
        self._send(json.dumps(content).encode(), "application/json")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        headers = {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in {
            **headers,
            "ETag": f'"{hash(content)}"',
            "X-Repo-Commit": _COMMIT,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def local_hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """The address of a hub with one repository, and its files."""
    files: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
