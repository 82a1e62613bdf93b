"""The hub on the loopback: what huggingface_hub's client asks of it to look up, download and commit, over plain HTTP and git-lfs."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LARGE = re.compile(r".*\.(safetensors|onnx|data|bin|npz|engine)")  # what the hub keeps as git-lfs objects
TOKEN = "hf_right"


@dataclass
class Repo:
    """Its commits, each all its files, by branch; the last is the newest."""

    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        sha = hashlib.sha1(json.dumps([branch, len(self.messages), sorted(files)]).encode()).hexdigest()
        self.branches.setdefault(branch, []).append((sha, files))
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for commits in self.branches.values() for commit in commits if commit[0] == revision), None)


class Hub(ThreadingHTTPServer):
    """The repositories by id. `asked` are paths of files that were downloaded, with their Range; `cut` names files of which one answer
    each breaks off half way; `failing_after` are those that are answered 500 from then on, with "tree" the listing 418. `tokens` may read
    and write everything."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.cut: set[str] = set()
        self.failing_after: set[str] = set()
        self.tokens = {TOKEN}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, id: str, files: dict[str, bytes], **facts: Any) -> Repo:
        self.repos[id] = repo = Repo(**facts)
        repo.commit(files)
        return repo

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    do_PUT = do_POST  # noqa: N815  the name that http.server calls

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.wfile.flush()
            self.close_connection = True

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        self._send(status, json.dumps({"error": message or code}).encode(), {"X-Error-Code": code, "X-Error-Message": message or code})

    @property
    def _trusted(self) -> bool:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") in self.server.tokens

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        if "Authorization" in self.headers and not self._trusted:
            return self._refuse(401, message="Invalid credentials in Authorization header")
        if match := re.fullmatch(r"/objects/(\w+)", path):  # where git-lfs puts what it was told to; S3 on the real hub
            self.server.objects[match[1]] = body
            return self._send(200)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        match = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?", path)
        repo = self.server.repos.get(match[1]) if match else None
        if match is None or repo is None or (repo.private and not self._trusted):
            return self._refuse(404 if self._trusted else 401, "RepoNotFound", "Repository not found")
        return self._repo(match[1], repo, match[2] or "", body)

    def _create(self, asked: dict[str, Any]) -> None:
        id = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if not self._trusted:
            return self._refuse(401, message="Invalid username or password.")
        if id.startswith("other/"):
            return self._refuse(403, message='You don\'t have the rights to create a model under the namespace "other"')
        if id in self.server.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.server.url}/{id}"}, 409)
        self.server.add(id, {".gitattributes": b"*.onnx filter=lfs\n"}, private=asked.get("visibility") == "private")
        return self._json({"url": f"{self.server.url}/{id}"})

    def _repo(self, id: str, repo: Repo, rest: str, body: bytes) -> None:
        kind, _, more = rest.partition("/")
        if kind in ("branch", "preupload", "commit", "info") and not self._trusted:
            return self._refuse(401, message="Invalid username or password.")
        if kind == "branch":
            repo.branches.setdefault(more, list(repo.branches["main"]))
            return self._json({})
        if kind == "preupload":
            files = [{"path": each["path"], "size": each["size"]} for each in json.loads(body)["files"]]
            modes = [each | {"uploadMode": "lfs" if LARGE.fullmatch(each["path"]) else "regular", "shouldIgnore": False} for each in files]
            return self._json({"files": modes})
        if kind == "info":  # .git/info/lfs/objects/batch
            objects = json.loads(body)["objects"]
            actions = [each | {"actions": {"upload": {"href": f"{self.server.url}/objects/{each['oid']}"}}} for each in objects]
            return self._json({"transfer": "basic", "objects": actions})
        if kind == "commit":
            return self._commit(id, repo, more, [json.loads(line) for line in body.splitlines()])
        revision, _, file = more.partition("/") if kind in ("revision", "tree", "resolve") else ("main", "", "")
        if (commit := repo.at(revision)) is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, files_there = commit
        if kind == "tree" and "tree" in self.server.failing_after:
            return self._refuse(418, message="Not today")  # of which the client does not try again, as it does of 500
        if kind == "tree":
            return self._json([_entry(name, content) for name, content in files_there.items()])
        if kind == "resolve":
            return self._file(repo, sha, file, files_there.get(file))
        siblings = [{"rfilename": name} for name in files_there]
        return self._json({"_id": id, "id": id, "modelId": id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def _file(self, repo: Repo, sha: str, name: str, content: bytes | None) -> None:
        if repo.gated and not self._trusted:
            return self._refuse(401, "GatedRepo", "Access to this model is restricted")
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        if self.command == "GET":
            self.server.asked.append((name, self.headers.get("Range")))
            if name in self.server.failing_after and name not in self.server.cut:
                return self._refuse(500, message="Internal error")
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        entry = _entry(name, content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        half = name in self.server.cut and self.command == "GET"
        if half:
            self.server.cut.remove(name)
        self._send(206 if start else 200, content[start:], headers, sent=(len(content) - start) // 2 if half else None)

    def _commit(self, id: str, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> None:
        head, files = repo.branches[branch][-1]
        header = lines[0]["value"]
        if header.get("parentCommit", head) != head:
            return self._refuse(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            else:
                del files[value["path"]]
        sha = repo.commit(files, branch, header["summary"])
        return self._json({"commitUrl": f"{self.server.url}/{id}/commit/{sha}", "commitOid": sha, "success": True})


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as the tree lists it: by git's hash, and those in git-lfs by their own."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "oid": oid, "size": len(content), "path": name}
    if LARGE.fullmatch(name):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that is asked on the loopback."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def environment(hub: Hub, cache: str, token: str | None = None, offline: bool = False) -> dict[str, str]:
    """What sends the real client of another process there."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": cache, "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    return variables | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})


def direct(patch: pytest.MonkeyPatch, hub: Hub, cache: str, token: str | None = None) -> None:
    """Send the client of this process there, whose settings were read when it was imported; small pieces of downloads are kept."""
    from huggingface_hub import constants

    for name, value in environment(hub, cache, token).items():
        patch.setenv(name, value)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    settings: dict[str, Any] = {"ENDPOINT": hub.url, "HF_HUB_CACHE": f"{cache}/hub", "HF_TOKEN_PATH": f"{cache}/token"}
    settings |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "DOWNLOAD_CHUNK_SIZE": 1024}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in settings.items():
        patch.setattr(constants, name, value)
