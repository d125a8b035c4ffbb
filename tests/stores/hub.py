"""A small Hub on loopback: the endpoints that `huggingface_hub` uses for repositories, commits and files.

    with serving_hub() as hub: HubStore(parse("hf://user/runs"), hub.url) ...

Tokens: "writer" may write to `user/`, "reader" may read, none sees public repositories alone. Files of 10 MB,
with a zero byte in their first 512, or with a name that ends in .safetensors, are large (LFS), as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from x1_pretrain.stores.address import parse
from x1_pretrain.stores.hub_store import HubStore

RUNS = "models/user/runs"
LARGE = bytes(range(256)) * 8192  # 2 MiB, not text

API = r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree|paths-info|preupload|commit)/([^/]+)(?:/(.+))?"
LARGE_BYTES = 10_000_000
PAGE = 3  # entries of a listing: small, so that tests see several pages


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool
    commit: str = ""
    date: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        content = f"oid sha256:{self.sha256}".encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def info(self, path: str, dated: bool) -> dict[str, Any]:
        known: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.lfs:
            known["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        if dated:
            known["lastCommit"] = {"id": self.commit, "title": "x", "date": self.date}
        return known


@dataclass
class Commit:
    sha: str
    files: dict[str, File]


@dataclass
class Repo:
    private: bool
    commits: list[Commit]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((one for one in self.commits if one.sha == revision), None)


@dataclass
class Hub:
    """What is really there."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)  # "models/user/name" or "datasets/user/name"
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    part_bytes: int | None = None  # uploads come in parts of this size
    commits_left: int | None = None  # then 429, until set anew
    ranges: bool = True  # else the whole of it is sent for a part, as some proxies do
    requests: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    counter: Iterator[int] = field(default_factory=itertools.count)

    def new(self, name: str, private: bool = False) -> Repo:
        self.repos[name] = Repo(private, [])
        self.commit(name, {".gitattributes": File(b"*.safetensors filter=lfs", False)}, set())
        return self.repos[name]

    def commit(self, name: str, added: dict[str, File], gone: set[str]) -> str:
        with self.lock:
            repo = self.repos[name]
            sha = hashlib.sha1(f"{name} {next(self.counter)}".encode()).hexdigest()
            date = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.000Z}"
            files = dict(repo.commits[-1].files) if repo.commits else {}
            for path, file in added.items():
                if path not in files or files[path].oid != file.oid:
                    files[path] = replace(file, commit=sha, date=date)
            files = {path: file for path, file in files.items() if path not in gone}
            repo.commits.append(Commit(sha, files))
            return sha

    def files(self, name: str = "models/user/runs") -> dict[str, bytes]:
        files = self.repos[name].commits[-1].files
        return {path: file.data for path, file in files.items() if path != ".gitattributes"}

    def count(self, what: str) -> int:
        with self.lock:
            return sum(what in one for one in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answered()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answered(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = b"".join(self._chunks())
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {unquote(self.path)}")
            status, headers, content = self._route()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _chunks(self) -> Iterator[bytes]:
        while (size := int(self.rfile.readline(), 16)) > 0:
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    # ---- answers

    def _json(self, content: object, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/json", **headers}, json.dumps(content).encode()

    def _error(self, status: int, code: str = "", **headers: str) -> tuple[int, dict[str, str], bytes]:
        return self._json({"error": code}, status, **({"X-Error-Code": code} if code else {}), **headers)

    def _route(self) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        if path == "/api/repos/create":
            return self._create()
        if found := re.fullmatch(r"/blobs/([0-9a-f]{64})(?:/(\d+))?", path):
            return self._blob(found[1], found[2])
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._allowed(found[1], found[2], True) or self._batch()
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._allowed(found[1], found[2], False) or self._resolve(found[3], found[4])
        if not (found := re.fullmatch(API, path)):
            return self._error(404, "NoSuchEndpoint")
        kind, name, what, revision, rest = found.groups()
        refused = self._allowed(
            kind + "/" if kind == "datasets" else "", name, what in ("preupload", "commit")
        )
        if refused:
            return refused
        commit = self.repo.at(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        if what == "revision":
            return self._json({"id": name, "sha": commit.sha, "siblings": [], "tags": [], "private": True})
        if what == "tree":
            return self._tree(commit, rest or "")
        if what == "paths-info":
            form = parse_qs(self.body.decode())
            dated = form.get("expand", ["false"])[0].lower() == "true"
            asked = form.get("paths", [])
            return self._json([commit.files[p].info(p, dated) for p in asked if p in commit.files])
        return self._preupload(commit) if what == "preupload" else self._commit(self.name)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _allowed(
        self, datasets: str | None, name: str, write: bool
    ) -> tuple[int, dict[str, str], bytes] | None:
        self.name = f"{'datasets' if datasets else 'models'}/{name}"
        if self._token() not in ("", "writer", "reader"):
            return self._error(401, **{"X-Error-Message": "Invalid credentials in Authorization header"})
        repo = self.hub.repos.get(self.name)
        if not self._token() and (repo is None or repo.private or write):
            return self._error(401)
        if repo is None:
            return self._error(404, "RepoNotFound")
        self.repo = repo
        return self._error(403) if write and self._token() != "writer" else None

    def _create(self) -> tuple[int, dict[str, str], bytes]:
        asked = json.loads(self.body)
        if self._token() != "writer" or asked["organization"] != "user":
            return self._error(403 if self._token() else 401)
        name = f"{asked.get('type', 'model')}s/user/{asked['name']}"
        if name in self.hub.repos:
            return self._error(409)
        self.hub.new(name, asked.get("private") or asked.get("visibility") == "private")
        return self._json({"url": f"{self._here()}/{name}"})

    def _here(self) -> str:
        return f"http://{self.headers['Host']}"

    def _tree(self, commit: Commit, folder: str) -> tuple[int, dict[str, str], bytes]:
        below = {p: f for p, f in commit.files.items() if not folder or p.startswith(folder + "/")}
        if folder and not below:
            return self._error(404, "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        dated = self.query.get("expand", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(below.items()):
            rest = path[len(folder) + 1 :] if folder else path
            if "/" in rest:
                first = path[: len(path) - len(rest)] + rest.split("/")[0]
                entries[first] = {"type": "directory", "path": first, "oid": "0" * 40, "size": 0}
            if recursive or "/" not in rest:
                entries[path] = file.info(path, dated)
        start = int(self.query.get("cursor", ["0"])[0])
        page = list(entries.values())[start : start + PAGE]
        more = f"{self._here()}{urlsplit(self.path).path}?recursive={recursive}&expand={dated}"
        link = {"Link": f'<{more}&cursor={start + PAGE}>; rel="next"'} if start + PAGE < len(entries) else {}
        return self._json(page, 200, **link)

    def _resolve(self, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        commit = self.repo.at(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        if path not in commit.files:
            return self._error(404, "EntryNotFound")
        file = commit.files[path]
        known = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"'}
        if file.lfs:
            self.hub.blobs[file.sha256] = file.data
            return 302, known | {"Location": f"{self._here()}/blobs/{file.sha256}"}, b""
        return self._ranged(file.data, known)

    def _ranged(self, data: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (found and self.hub.ranges):
            return 200, headers, data
        start, end = int(found[1]), min(int(found[2]) + 1, len(data))
        if start >= len(data):
            return self._error(416)
        return 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end]

    # ---- writes

    def _preupload(self, commit: Commit) -> tuple[int, dict[str, str], bytes]:
        told = []
        for one in json.loads(self.body)["files"]:
            there = commit.files.get(one["path"])
            mode = "lfs" if is_large(one["path"], base64.b64decode(one["sample"]), one["size"]) else "regular"
            oid = (there.sha256 if there.lfs else there.oid) if there else None
            told.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": told})

    def _batch(self) -> tuple[int, dict[str, str], bytes]:
        told: list[dict[str, Any]] = []
        for one in json.loads(self.body)["objects"]:
            actions: dict[str, Any] = {"upload": {"href": f"{self._here()}/blobs/{one['oid']}"}}
            if self.hub.part_bytes and one["size"] > self.hub.part_bytes:
                count = -(-one["size"] // self.hub.part_bytes)
                header = {str(n): f"{self._here()}/blobs/{one['oid']}/{n}" for n in range(1, count + 1)}
                actions["upload"]["header"] = header | {"chunk_size": str(self.hub.part_bytes)}
            there = one["oid"] in self.hub.blobs
            told.append(one | ({} if there else {"actions": actions}))
        return self._json({"transfer": "basic", "objects": told})

    def _blob(self, sha256: str, part: str | None) -> tuple[int, dict[str, str], bytes]:
        if self.command in ("GET", "HEAD"):
            return self._ranged(self.hub.blobs[sha256], {})
        if part:
            self.hub.parts[sha256, int(part)] = self.body
            return 200, {"ETag": f'"{part}"'}, b""
        if self.command == "POST":  # all parts are there
            count = len(json.loads(self.body)["parts"])
            self.body = b"".join(self.hub.parts.pop((sha256, n + 1)) for n in range(count))
        if hashlib.sha256(self.body).hexdigest() != sha256:
            return self._error(400, "BadDigest")
        self.hub.blobs[sha256] = self.body
        return self._json({})

    def _commit(self, name: str) -> tuple[int, dict[str, str], bytes]:
        if self.hub.commits_left is not None:
            if self.hub.commits_left == 0:
                return self._error(429, **{"Retry-After": "1800"})
            self.hub.commits_left -= 1
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit", self.repo.commits[-1].sha) != self.repo.commits[-1].sha:
            return self._error(412)
        added, gone = {}, set()
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._error(400, "LfsMissing")
                added[value["path"]] = File(self.hub.blobs[value["oid"]], True)
            else:
                if value["path"] not in self.repo.commits[-1].files:
                    return self._error(404, "EntryNotFound")
                gone.add(value["path"])
        sha = self.hub.commit(name, added, gone)
        return self._json({"commitUrl": f"{self._here()}/{name}/commit/{sha}", "commitOid": sha})


def is_large(path: str, sample: bytes, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LARGE_BYTES or b"\0" in sample


def opened(hub: Hub, address: str = "hf://user/runs", **more: float) -> HubStore:
    return HubStore(parse(address), hub.url, 1, **more)


@contextmanager
def serving_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
