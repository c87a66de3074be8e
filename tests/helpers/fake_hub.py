"""A local stand-in for the Hugging Face hub: the few routes that creating, uploading, listing and downloading use.

Repositories are in memory. Files named `*.safetensors`, `*.h5` and `*.png` are uploaded as large files (LFS), others in
the commit itself. The fake offers no Xet storage, so `huggingface_hub` must run with it disabled.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from smalti.core.errors import UserError

TOKEN = "hf_writes"
READER = "hf_reads"
LARGE = (".safetensors", ".h5", ".png")

Tree = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits by their hash, and the branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Tree] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> Tree:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class FakeHub:
    """The state of the server.

    Attributes:
        endpoint: its address.
        repos: the repositories by their paths, `models/owner/name` or `datasets/owner/name`.
        large: the contents of large files by their SHA-256.
        requests: every request: method and path.
        refusal: the status and message with which commits are refused; None for none.
    """

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refusal: tuple[int, str] | None = None


class RefusedError(Exception):
    """An answer with an error's status."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    """Returns the request handler of a hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Leaves out the log on standard error."""

        def serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length) if length else self.chunks()
            self.path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {self.path}")
            try:
                status, headers, body = answer(hub, self)
            except RefusedError as refused:
                status, body = refused.status, json.dumps({"error": refused.message}).encode()
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.send_response(status)
            for name, value in headers.items():
                if value:
                    self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def chunks(self) -> bytes:
            """Reads a body of chunks, if it is one."""
            parts = []
            while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)

        do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815 - the base class's names

    return Handler


def answer(hub: FakeHub, request: Any) -> tuple[int, dict[str, str], bytes]:
    """Returns the status, headers and body of an answer."""
    token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
    path, method = request.path, request.command
    if token not in ("", TOKEN, READER):
        raise RefusedError(401, message="Invalid credentials in Authorization header")
    if match := re.fullmatch(r"/lfs/(\w+)", path):
        if method == "PUT":
            assert hashlib.sha256(request.body).hexdigest() == match[1]
            hub.large[match[1]] = request.body
            return 200, {}, b""
        return 200, {}, hub.large[match[1]]
    if path == "/api/validate-yaml":
        return 200, {}, b'{"errors": [], "warnings": []}'
    if path == "/api/repos/create":
        return create(hub, json.loads(request.body), token)
    if match := re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(\w+)/(.+)|)", path):
        repo = find(hub, f"{match[1]}/{match[2]}", token)
        if method == "POST" and token != TOKEN:
            raise RefusedError(403, message="you need write access")
        return api(hub, repo, f"{match[1]}/{match[2]}", match[3] or "revision", match[4] or "main", request)
    if match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
        find(hub, f"{match[1] or 'models/'}{match[2]}", token)
        wanted = json.loads(request.body)["objects"]
        actions = [
            {"oid": each["oid"], "size": each["size"]}
            | (
                {}
                if each["oid"] in hub.large
                else {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}"}}}
            )
            for each in wanted
        ]
        return 200, {}, json.dumps({"transfer": "basic", "objects": actions}).encode()
    if match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
        repo = find(hub, f"{match[1] or 'models/'}{match[2]}", token)
        return resolve(hub, repo, match[3], match[4])
    raise RefusedError(404, message=f"the fake has no route {method} {path}")


def find(hub: FakeHub, name: str, token: str) -> Repo:
    """Returns a repository that the token may read."""
    repo = hub.repos.get(name)
    if repo is None or (repo.private and not token):
        raise RefusedError(404 if token else 401, "RepoNotFound", "Repository not found")
    if repo.gated and token != TOKEN:
        raise RefusedError(403, "GatedRepo", "Access is restricted")
    return repo


def create(hub: FakeHub, wanted: dict[str, Any], token: str) -> tuple[int, dict[str, str], bytes]:
    if token != TOKEN:
        raise RefusedError(403 if token else 401, message="you need write access" if token else "log in")
    name = f"{wanted['organization']}/{wanted['name']}"
    key = f"{wanted.get('type') or 'model'}s/{name}"
    address = json.dumps({"url": f"{hub.endpoint}/{key.removeprefix('models/')}"}).encode()
    if key in hub.repos:
        return 409, {}, address
    hub.repos[key] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return 200, {}, address


def api(
    hub: FakeHub, repo: Repo, name: str, action: str, revision: str, request: Any
) -> tuple[int, dict[str, str], bytes]:
    """Answers what is asked of one repository."""
    if action == "branch":
        if revision in repo.branches:
            raise RefusedError(409, message="the branch exists")
        repo.branches[revision] = repo.branches["main"]
        return 200, {}, b"{}"
    if revision not in repo.branches and revision not in repo.commits:
        raise RefusedError(404, "RevisionNotFound", "Invalid rev id")
    sha, files = repo.branches.get(revision, revision), repo.files(revision)
    if action == "revision":
        listed = [{"rfilename": path} for path in files]
        found = {"id": name.partition("/")[2], "sha": sha, "private": repo.private, "siblings": listed, "tags": []}
        return 200, {}, json.dumps({**found, "downloads": 0, "likes": 0}).encode()
    if action == "tree":
        return 200, {}, json.dumps([described(path, contents) for path, contents in files.items()]).encode()
    if action == "preupload":
        wanted = [each["path"] for each in json.loads(request.body)["files"]]
        modes = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": described(path, files[path])["oid"] if path in files and not path.endswith(LARGE) else None,
            }
            for path in wanted
        ]
        return 200, {}, json.dumps({"files": modes}).encode()
    assert action == "commit"
    if hub.refusal:
        raise RefusedError(hub.refusal[0], message=hub.refusal[1])
    return commit(hub, repo, name, revision, request.body)


def commit(hub: FakeHub, repo: Repo, name: str, branch: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    files = dict(repo.files(branch))
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "header":
            repo.messages.append(value["summary"])
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "deletedFile":
            del files[value["path"]]
        else:
            assert line["key"] == "lfsFile"
            files[value["path"]] = hub.large[value["oid"]]
    sha = hashlib.sha1(repr((sorted(files), len(repo.commits))).encode()).hexdigest()
    repo.commits[sha], repo.branches[branch] = files, sha
    address = f"{hub.endpoint}/{name.removeprefix('models/')}/commit/{sha}"
    return 200, {}, json.dumps({"success": True, "commitOid": sha, "commitUrl": address}).encode()


def described(path: str, contents: bytes) -> dict[str, Any]:
    """Returns a file's entry in a listing."""
    oid = hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(contents), "oid": oid}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(contents).hexdigest(), "size": len(contents), "pointerSize": 130}
    return entry


def resolve(hub: FakeHub, repo: Repo, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
    """Answers with a file; large ones are elsewhere, as on the hub."""
    if revision not in repo.branches and revision not in repo.commits:
        raise RefusedError(404, "RevisionNotFound", "Invalid rev id")
    if path not in repo.files(revision):
        raise RefusedError(404, "EntryNotFound", "Entry not found")
    contents, entry = repo.files(revision)[path], described(path, repo.files(revision)[path])
    headers = {"X-Repo-Commit": repo.branches.get(revision, revision), "ETag": f'"{entry["oid"]}"'}
    if "lfs" in entry:
        oid = entry["lfs"]["oid"]
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(contents))}
        other_host = hub.endpoint.replace("127.0.0.1", "localhost")  # redirects within the hub itself are followed
        return 302, {**headers, **linked, "Location": f"{other_host}/lfs/{oid}"}, b""
    return 200, headers, contents


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Serves an empty hub in a thread while a block runs."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def in_use(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Any]:
    """Serves a fake hub that `huggingface_hub` of this process uses within the block; see `use`."""
    with serving() as served:
        use(monkeypatch, served.endpoint, str(cache))
        yield served


def error_of(load: Callable[[str], Any], source: str) -> str:
    """Returns the one line with which a hub id is refused."""
    with pytest.raises(UserError) as refused:
        load(source)
    assert str(refused.value).isprintable()
    return str(refused.value)


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: str, token: str | None = TOKEN) -> None:
    """Makes `huggingface_hub` of this process use an endpoint, an empty cache and a token, without Xet.

    It reads the environment when it is imported, so its constants are set instead.
    """
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
