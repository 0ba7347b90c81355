"""A hub of our own: a server that `huggingface_hub` uploads to and fetches from, and its cache."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPOSITORY = "me/adapter"


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


_COMMIT = commit_of("main")


def cached(cache: Path, hub_id: str, revisions: dict[str, Path]) -> None:
    """Lay out a cache with folders as the revisions of a repository."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for revision, folder in revisions.items():
        commit = commit_of(revision)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)


@dataclass
class Hub:
    """A hub with one repository.

    Attributes:
        files: Its files.
        address: Where it is served.
        asked: The paths that were asked for.
    """

    files: dict[str, bytes]
    address: str = ""
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

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
                    self.hub.files[entry["value"]["path"]] = content
            self._answer({"commitUrl": f"{address}/commit/{_COMMIT}", "commitOid": _COMMIT})
        else:
            self._answer({"errors": [], "warnings": []})  # of the card's head

    def do_GET(self) -> None:
        """List a repository, or give a file of it."""
        self.hub.asked.append(self.path)
        resolved = re.fullmatch(rf"/{REPOSITORY}/resolve/\w+/(.+)", self.path)
        if resolved and resolved[1] in self.hub.files:
            self._send(self.hub.files[resolved[1]], "application/octet-stream")
        elif self.path.startswith(f"/api/models/{REPOSITORY}/tree"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _COMMIT}
                for name, content in self.hub.files.items()
            ]
            self._answer(tree)
        elif self.path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in self.hub.files]
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
def local_hub(folder: Path | None = None) -> Iterator[Hub]:
    """A hub whose repository has the files of a folder, or none yet."""
    files = [] if folder is None else sorted(folder.iterdir())
    hub = Hub({path.name: path.read_bytes() for path in files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
