"""A hub of our own: a cache laid out as huggingface_hub does, and a server that it fetches from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


def cached(cache: Path, hub_id: str, revisions: dict[str, Path]) -> None:
    """Lay out a cache with folders as the revisions of a repository."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for revision, folder in revisions.items():
        commit = commit_of(revision)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def served(hub_id: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as a repository; the address, and the paths that are asked for."""
    asked: list[str] = []
    commit = commit_of("main")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            asked.append(self.path)
            path = self.path.partition("?")[0]
            file = folder / path.rpartition("/")[2]
            files = sorted(path.name for path in folder.iterdir())
            if path.startswith(f"/api/models/{hub_id}/tree/"):
                listed = [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size}
                    | {"oid": commit_of(name)}
                    for name in files
                ]
                self._send(json.dumps(listed).encode(), body=body)
            elif path.startswith(f"/api/models/{hub_id}"):
                siblings = [{"rfilename": name} for name in files]
                content = {"id": hub_id, "sha": commit, "siblings": siblings, "private": False}
                self._send(json.dumps(content).encode(), body=body)
            elif path.startswith(f"/{hub_id}/resolve/") and file.is_file():
                self._send(file.read_bytes(), body=body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _send(self, content: bytes, *, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
