"""A stand-in for the hub on this machine: the HTTP endpoints that huggingface_hub uses to create, upload and download.

It keeps one repository that can be written to, owner/name, and others that can be read, all in memory; speaks the LFS
protocol (not Xet) and can refuse, stumble or hang up where it is told to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
import yaml

TOKEN = "hf_standin0000secret"
LARGE = (".safetensors", ".png")
Fault = Callable[[int], str]


class HubServer:
    """Serve owner/name; `files` is what has been committed to its main branch.

    Args:
        writable: whether the token may write.
        fail_upload: the LFS upload (1, 2, ...) that is refused for good.
        on_upload: fault of LFS upload number n: "" none, "500", or "drop": the connection is cut within the body.
        on_commit: fault of commit request number n: "" none, "500", "drop": cut before, "lost": done, the answer cut.
    """

    def __init__(
        self,
        *,
        writable: bool = True,
        fail_upload: int = 0,
        on_upload: Fault | None = None,
        on_commit: Fault | None = None,
    ) -> None:
        self.writable = writable
        self.on_upload = on_upload or (lambda n: "403" if n == fail_upload else "")
        self.on_commit = on_commit or (lambda n: "")
        self.exists = self.private = False
        self.uploads = self.commits = self.commit_requests = 0
        self.branches: dict[str, dict[str, bytes]] = {"main": {}}
        self.others: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.stored: list[str] = []  # ids of LFS objects in the order of their arrival
        self.log: list[str] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]

    def sha(self, branch: str = "main") -> str:
        return hashlib.sha1(f"{branch} {self.commits}".encode()).hexdigest()

    def at(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Return the files of a repository at a branch or commit."""
        if repo != "owner/name":
            return self.others.get(repo)
        return next((files for name, files in self.branches.items() if revision in (name, self.sha(name))), None)

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def reach(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, token: str = "") -> None:
    """Send this process to that hub, with that token and a cache in that folder; nothing of the user's is read or written."""
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}", "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"), "HF_STORED_TOKENS_PATH": str(home / "tokens"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    # transformers keeps a client of its own from the first call on, perhaps of a server that is gone.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _hang_up(self) -> None:
        # With linger 0 the peer gets a reset, as from a machine that went away, and not an end of file.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile = self.rfile = open("/dev/null", "r+b", buffering=0)  # type: ignore[assignment] # noqa: SIM115
        self.connection.close()

    def _handle(self) -> None:
        hub, path = self.state, self.path.split("?")[0]
        size = int(self.headers.get("Content-Length") or 0)
        with hub.lock:
            hub.log.append(f"{self.command} {path}")
            hub.uploads += path.startswith("/lfs/")
            hub.commit_requests += "/commit/" in path
            fault = ""
            if path.startswith("/lfs/"):
                fault = hub.on_upload(hub.uploads)
            elif "/commit/" in path:
                fault = hub.on_commit(hub.commit_requests)
        if fault == "drop":
            self.rfile.read(size // 2)
            return self._hang_up()
        body = self.rfile.read(size)
        if fault in ("403", "500"):
            return self._send(int(fault), {"error": "the store refuses this part"})
        if path.startswith("/lfs/"):
            name = path.removeprefix("/lfs/")
            with hub.lock:
                hub.objects[name] = body
                hub.stored.append(name)
            return self._send(200)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        guarded = self.command == "POST" or "whoami" in path or "auth-check" in path
        if not known and (guarded or (hub.private and "owner/name" in path)):
            return self._send(
                401, {"error": "Invalid credentials"}, {} if guarded else {"X-Error-Code": "RepoNotFound"}
            )
        if path == "/api/whoami-v2":
            return self._send(200, {"name": "owner", "type": "user", "auth": {}})
        if path == "/api/repos/create":
            if not hub.exists and not hub.writable:
                return self._send(403, {"error": "no right"})
            if not hub.exists:
                given = json.loads(body)
                hub.private = bool(given.get("private")) or given.get("visibility") == "private"
            status, hub.exists = (409 if hub.exists else 200), True
            return self._send(status, {"url": f"{hub.url}/owner/name", "name": "owner/name"})
        if path.endswith("/auth-check/write"):
            return self._send(200 if hub.writable else 403, {})
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if found := re.fullmatch(r"/api/models/owner/name/branch/([^/]+)", path):
            name = unquote(found[1])
            status = 409 if name in hub.branches else 200
            hub.branches.setdefault(name, dict(hub.files))
            return self._send(status, {})
        if found := re.fullmatch(r"/api/models/owner/name/preupload/([^/]+)", path):
            there = hub.at("owner/name", unquote(found[1])) or {}
            names = [f["path"] for f in json.loads(body)["files"]]
            files = [
                {"path": n, "uploadMode": "lfs" if n.endswith(LARGE) else "regular", "shouldIgnore": False,
                 **({"oid": _oid(n, there[n])} if n in there else {})}
                for n in names
            ]  # fmt: skip
            return self._send(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                # Without actions: the store has this object already.
                {"oid": o["oid"], "size": o["size"], **({} if o["oid"] in hub.objects else
                 {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}})}
                for o in json.loads(body)["objects"]
            ]  # fmt: skip
            return self._send(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/owner/name/commit/([^/]+)", path):
            branch = unquote(found[1])
            for item in map(json.loads, body.splitlines()):
                value = item["value"]
                if item["key"] == "file":
                    hub.branches[branch][value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    hub.branches[branch][value["path"]] = hub.objects[value["oid"]]
            hub.commits += 1
            if fault == "lost":
                return self._hang_up()
            url = f"{hub.url}/owner/name/commit/{hub.sha(branch)}"
            return self._send(200, {"commitUrl": url, "commitOid": hub.sha(branch), "success": True})
        if found := re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/(.+)", path):
            revision = unquote(found[2])
            files_there = hub.at(found[1], revision)
            data = None if files_there is None else files_there.get(unquote(found[3]))
            headers = {"X-Repo-Commit": hub.sha(revision if revision in hub.branches else "main")}
            if data is None:
                return self._send(404, {}, {**headers, "X-Error-Code": "EntryNotFound"})
            return self._send(200, data, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        if found := re.fullmatch(r"/api/models/(\w+/\w+)(?:/(revision|tree)/([^/]+))?(/.*)?", path):
            revision = unquote(found[3] or "main")
            if (files_there := hub.at(found[1], revision)) is None:
                return self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
            if found[2] == "tree":
                return self._send(200, [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in files_there.items()])  # fmt: skip
            sha = hub.sha(revision) if revision in hub.branches else revision
            siblings = [{"rfilename": n} for n in files_there]
            return self._send(200, {"id": found[1], "modelId": found[1], "sha": sha, "siblings": siblings,
                                    "private": hub.private, "tags": []})  # fmt: skip
        return self._send(404, {"error": path})

    def _validate(self, content: str) -> None:
        """Refuse a card whose head is no YAML mapping, or names no licence, as the hub does."""
        try:
            head = yaml.safe_load(content.split("\n---\n", maxsplit=1)[0].removeprefix("---\n"))
            good = isinstance(head, dict) and isinstance(head.get("license"), str)
        except yaml.YAMLError:
            good = False
        errors = [] if good else [{"message": "the head of the card is broken"}]
        self._send(200 if good else 400, {"errors": errors, "warnings": []})

    do_GET = do_HEAD = do_POST = do_PUT = _handle


def _oid(name: str, data: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
