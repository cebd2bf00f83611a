"""A Hugging Face hub of one process: as much of its HTTP interface as uploads and downloads of one repository use."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet")
"""Endings that the hub stores outside git."""
COMMIT = "c" * 40


class FakeHub:
    """What the server holds, and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        """Method and path of every request."""
        self.tokens: set[str] = set()
        """Values of the Authorization header."""
        self.refuse: int | None = None
        """A status that every request is answered with."""
        self.url = ""

    def info(self, repo: str) -> dict[str, Any]:
        siblings = [{"rfilename": name} for name in self.repos[repo]]
        return {"id": repo, "modelId": repo, "private": self.private[repo], "sha": COMMIT, "siblings": siblings}

    def tree(self, repo: str) -> list[dict[str, Any]]:
        files = self.repos[repo].items()
        return [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in files]

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.large[value["oid"]]


class Answers(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _send(self, body: bytes | Any, status: int = 200, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.hub.asked.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)
        if self.hub.refuse is not None:
            self._send({"error": "refused"}, self.hub.refuse)
        elif path.startswith("/lfs/"):
            self.hub.large[path.removeprefix("/lfs/")] = body
            self._send(b"")
        elif path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}"
            self.hub.repos[name], self.hub.private[name] = {}, said.get("visibility") == "private"
            self._send({"url": f"{self.hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            href = {o["oid"]: {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}} for o in objects}
            self._send({"transfer": "basic", "objects": [{**o, "actions": href[o["oid"]]} for o in objects]})
        else:
            self._of_repo(path, body)

    def _of_repo(self, path: str, body: bytes) -> None:
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, act, rest = "/".join(parts[:2]), [*parts, "", ""][2], "/".join(parts[4:])
        if repo not in self.hub.repos:
            self._send({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif act == "preupload":
            files = [one["path"] for one in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in files}
            self._send({"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in files]})
        elif act == "commit":
            self.hub.commit(repo, [json.loads(line) for line in body.splitlines()])
            url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
            self._send({"commitUrl": url, "commitOid": COMMIT, "success": True, "hookOutput": ""})
        elif act == "resolve":
            content = self.hub.repos[repo].get(rest)
            if content is None:
                self._send({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            else:
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self._send(content, X_Repo_Commit=COMMIT, ETag=etag)
        elif act == "tree":
            self._send(self.hub.tree(repo))
        else:
            self._send(self.hub.info(repo))

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_POST = do_PUT = do_HEAD = _answer


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub on a free port."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Answers,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
