"""A stand-in for the Hugging Face Hub: the calls with which huggingface_hub makes, fills and reads a repository."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub.constants
import pytest

COMMIT = "1234567890" * 4
TOKEN = "hf_secretSECRETsecret"


class Hub:
    """What it holds and was asked. Set `refuse` to have it answer every request with that status and its token."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.is_private: dict[str, bool] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.commits = 0
        self.refuse: int | None = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, body: bytes | dict | list, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self) -> None:
        hub, body, path = self.server.hub, self._body(), unquote(self.path.split("?")[0])
        token = self.headers.get("Authorization")
        hub.requests.append((self.command, path, token))
        if hub.refuse is not None:
            says = f"no access for {token}"
            self._answer({"error": says}, hub.refuse, {"X-Error-Message": says})
        elif path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields['organization']}/{fields['name']}" if fields.get("organization") else fields["name"]
            hub.repos.setdefault(name, {})
            hub.is_private[name] = fields.get("private") or fields.get("visibility") == "private"
            self._answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|revision|tree)/[^/]+.*", path):
            self._repo(match[1], match[2], body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = hub.repos.get(match[1], {}).get(match[2])
            if data is None:
                self._answer({"error": "none"}, 404, {"X-Error-Code": "EntryNotFound"})
            else:
                self._answer(data, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        else:
            self._answer({"error": f"{self.command} {path} is not stood in for"}, 501)

    def _repo(self, name: str, call: str, body: bytes) -> None:
        files = self.server.hub.repos.get(name)
        if files is None:
            self._answer({"error": "none"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif call == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            self._answer({"files": modes})
        elif call == "commit":
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.server.hub.commits += 1
            self._answer({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        elif call == "revision":
            self._answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})
        else:
            files = {path: (len(data), hashlib.sha1(data).hexdigest()) for path, data in files.items()}
            self._answer([{"type": "file", "path": path, "size": n, "oid": oid} for path, (n, oid) in files.items()])

    do_GET = do_HEAD = do_POST = _handle


@contextmanager
def standing_in(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """huggingface_hub talks to the stand-in, as with HF_ENDPOINT, and keeps what it loads in the folder `cache`."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.hub = hub
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
