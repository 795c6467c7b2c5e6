"""A stand-in for the hub on this machine: the HTTP endpoints that huggingface_hub uses to create, upload and download.

It keeps one repository in memory, speaks the LFS protocol (not Xet) and can refuse writing or fail the n-th LFS upload.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standin0000secret"


class HubServer:
    """Serve one repository; `files` is what has been committed, `fail_upload` the LFS upload (1, 2, ...) that fails."""

    def __init__(self, *, writable: bool = True, fail_upload: int = 0) -> None:
        self.writable, self.fail_upload = writable, fail_upload
        self.exists, self.uploads, self.commits = False, 0, 0
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


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

    def _handle(self) -> None:
        hub, path = self.state, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.log.append(f"{self.command} {path}")
        if path.startswith("/lfs/"):
            hub.uploads += 1
            if hub.uploads == hub.fail_upload:
                return self._send(403, {"error": "the store refuses this part"})
            hub.objects[path.removeprefix("/lfs/")] = body
            return self._send(200)
        guarded = self.command == "POST" or "whoami" in path or "auth-check" in path
        if guarded and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials"})
        if path == "/api/whoami-v2":
            return self._send(200, {"name": "owner", "type": "user", "auth": {}})
        if path == "/api/repos/create":
            if not hub.exists and not hub.writable:
                return self._send(403, {"error": "no right"})
            status, hub.exists = (409 if hub.exists else 200), True
            return self._send(status, {"url": f"{hub.url}/owner/name", "name": "owner/name"})
        if path.endswith("/auth-check/write"):
            return self._send(200 if hub.writable else 403, {})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            names = [f["path"] for f in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            files = [{"path": n, "uploadMode": mode[n.endswith((".safetensors", ".png"))], "shouldIgnore": False} for n in names]  # fmt: skip
            return self._send(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            for item in map(json.loads, body.splitlines()):
                value = item["value"]
                if item["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            hub.commits += 1
            url = f"{hub.url}/owner/name/commit/{hub.sha}"
            return self._send(200, {"commitUrl": url, "commitOid": hub.sha, "success": True})
        if "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in hub.files.items()]  # fmt: skip
            return self._send(200, tree)
        if found := re.fullmatch(r"/owner/name/resolve/[^/]+/(.+)", path):
            data = hub.files.get(found[1])
            headers = {"X-Repo-Commit": hub.sha}
            if data is None:
                return self._send(404, {}, {**headers, "X-Error-Code": "EntryNotFound"})
            return self._send(200, data, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        if path.startswith("/api/models/owner/name"):
            siblings = [{"rfilename": n} for n in hub.files]
            return self._send(200, {"id": "owner/name", "modelId": "owner/name", "sha": hub.sha, "siblings": siblings,
                                    "private": False, "tags": []})  # fmt: skip
        return self._send(404, {"error": path})

    do_GET = do_HEAD = do_POST = do_PUT = _handle
