"""A hub in this process that speaks the real HTTP calls: ranges, LFS uploads, commits."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# Files from this size on go by LFS, whatever they are; and weights always.
LFS_BYTES = 10_000
Files = dict[str, bytes]


@dataclass
class Hub:
    """Repositories as lists of commits, newest last, and what was asked."""

    address: str = ""
    token: str = "hf_secret_of_the_test"
    repos: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    buckets: dict[str, Files] = field(default_factory=dict[str, Files])
    """Files of buckets, which have no commits."""
    lfs: Files = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    bytes_sent: Counter[str] = field(default_factory=Counter)
    """By file."""
    failures: dict[str, list[int]] = field(default_factory=dict)
    """HTTP statuses with which the next calls of a kind are answered."""

    def commit(self, repo: str, files: Files) -> str:
        """Add or replace files of a repository; the commit's sha."""
        history = self.repos.setdefault(repo, [])
        held = (history[-1][1] if history else {}) | files
        text = f"{repo} {len(history)} {sorted(held)}".encode() + b"".join(held.values())
        history.append((hashlib.sha1(text).hexdigest(), held))
        return history[-1][0]

    def tags(self, repo: str) -> set[str]:
        """What a repository is listed by: its card's tags and `base_model`."""
        card = self.repos[repo][-1][1].get("README.md", b"").decode().split("---")
        front = (yaml.safe_load(card[1]) if len(card) > 2 else None) or {}
        base = front.get("base_model")
        kind = front.get("base_model_relation", "finetune")
        return {*front.get("tags", []), *([f"base_model:{kind}:{base}"] if base else [])}

    def at(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """The commit that a revision names."""
        history = self.repos.get(repo, [])
        if revision in ("main", "HEAD") and history:
            return history[-1]
        return next((c for c in history if c[0] == revision), None)


def entry(path: str, data: bytes) -> dict[str, Any]:
    """How the hub lists a file."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    listed: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if by_lfs(path, len(data)):
        sha256 = hashlib.sha256(data).hexdigest()
        listed["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return listed


def by_lfs(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LFS_BYTES


class Handler(BaseHTTPRequestHandler):
    """One request; the hub is the server's."""

    protocol_version = "HTTP/1.1"
    server: Any

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for kind, verb, pattern in ROUTES:
            if verb == method.replace("HEAD", "GET") and (match := pattern.fullmatch(path)):
                self.hub.asked[kind] += 1
                if self.hub.failures.get(kind):
                    self.fail(self.hub.failures[kind].pop(0))
                    return
                getattr(self, kind)(body, **match.groupdict())
                return
        self.fail(404)

    def answer(self, data: object, *, status: int = 200, **headers: str) -> None:
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        if not isinstance(data, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def fail(self, status: int, code: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        if status == 429:
            headers |= {"RateLimit": '"api";r=0;t=1', "Retry_After": "1"}
        self.answer({"error": f"status {status}"}, status=status, **headers)

    def refused(self, repo: str) -> bool:
        """Whether the caller may not see the repository, and was told so."""
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo not in self.hub.repos or (repo in self.hub.private and not allowed):
            self.fail(404 if allowed else 401, "RepoNotFound")
            return True
        return False

    def found(self, repo: str, revision: str) -> tuple[str, Files] | None:
        if self.refused(repo):
            return None
        commit = self.hub.at(repo, revision)
        if commit is None:
            self.fail(404, "RevisionNotFound")
        return commit

    # --- reading ---

    def listing(self, body: bytes) -> None:
        """Models whose cards name a base and tags, and that the caller may see; one a page."""
        asked = parse_qs(urlsplit(self.path).query)
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        author, start = asked.get("author", [""])[0], int(asked.get("cursor", ["0"])[0])
        found = [
            {"id": repo, "modelId": repo, "tags": sorted(tags)}
            for repo, tags in sorted((r, self.hub.tags(r)) for r in self.hub.repos)
            if set(asked.get("filter", [])) <= tags and repo.startswith(author)
            and (allowed or repo not in self.hub.private)
        ]  # fmt: skip
        query = "&".join(f"filter={f}" for f in asked.get("filter", [])) + f"&author={author}"
        following = f"{self.hub.address}/api/models?{query}&cursor={start + 1}"
        more = {"Link": f'<{following}>; rel="next"'} if start + 1 < len(found) else {}
        self.answer(found[start : start + 1], **more)

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        commit = self.found(repo, revision or "main")
        if commit is not None:
            siblings = [{"rfilename": name} for name in commit[1]]
            self.answer(
                {"id": repo, "modelId": repo, "sha": commit[0], "private": repo in self.hub.private,
                 "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
            )  # fmt: skip

    def tree(self, body: bytes, repo: str, revision: str, path: str | None = None) -> None:
        commit = self.found(repo, revision)
        if commit is None:
            return
        start = f"{path.strip('/')}/" if path else ""
        below = {n: d for n, d in commit[1].items() if n.startswith(start)}
        if not below and commit[1]:
            self.fail(404, "EntryNotFound")
            return
        deep = "recursive=true" in self.path.lower()
        listed = [entry(n, d) for n, d in below.items() if deep or "/" not in n[len(start) :]]
        folders = {start + n[len(start) :].split("/")[0] for n in below if "/" in n[len(start) :]}
        self.answer(listed + [{"type": "directory", "path": f, "oid": "0" * 40} for f in folders])

    def paths(self, body: bytes, repo: str, revision: str) -> None:
        commit = self.found(repo, revision)
        if commit is None:
            return
        text = body.decode()
        if text.startswith("{"):
            wanted = json.loads(text)["paths"]
        else:
            wanted = parse_qs(text).get("paths", [])
        listed: list[dict[str, Any]] = []
        for name in wanted:
            if name in commit[1]:
                listed.append(entry(name, commit[1][name]))
            elif any(n.startswith(f"{name}/") for n in commit[1]):
                listed.append({"type": "directory", "path": name, "oid": "0" * 40})
        self.answer(listed)

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        commit = self.found(repo, revision)
        if commit is None:
            return
        if path not in commit[1]:
            self.fail(404, "EntryNotFound")
            return
        data = commit[1][path]
        headers = {"X_Repo_Commit": commit[0], "ETag": f'"{entry(path, data)["oid"]}"'}
        self.send(path, data, **headers)

    def send(self, path: str, data: bytes, **headers: str) -> None:
        """A file, or the range of it that was asked for."""
        headers |= {"Accept_Ranges": "bytes", "X_Linked_Size": str(len(data))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = data
        if span:
            part = data[int(span[1]) : int(span[2]) + 1 if span[2] else None]
            last = int(span[1]) + len(part) - 1
            headers["Content_Range"] = f"bytes {span[1]}-{last}/{len(data)}"
        if self.command != "HEAD":
            self.hub.bytes_sent[path] += len(part)
        self.answer(part, status=206 if span else 200, **headers)

    # --- buckets ---

    def bucket(self, body: bytes, repo: str) -> None:
        if repo not in self.hub.buckets:
            self.fail(404, "RepoNotFound")
            return
        files = self.hub.buckets[repo]
        self.answer(
            {"id": repo, "private": False, "createdAt": "2026-01-01T00:00:00.000Z",
             "size": sum(map(len, files.values())), "totalFiles": len(files)}
        )  # fmt: skip

    def bucket_tree(self, body: bytes, repo: str, prefix: str | None = None) -> None:
        below = {n: d for n, d in self.hub.buckets[repo].items() if n.startswith(prefix or "")}
        listed = [
            {"type": "file", "path": n, "size": len(d), "xetHash": hashlib.sha256(d).hexdigest(),
             "mtime": "2026-01-01T00:00:00.000Z"}
            for n, d in below.items()
        ]  # fmt: skip
        if "recursive=true" not in self.path.lower():
            start = f"{prefix}/" if prefix else ""
            inside = [n for n in below if "/" in n.removeprefix(start)]
            folders = {start + n.removeprefix(start).split("/")[0] for n in inside}
            listed = [x for x in listed if x["path"] not in inside]
            listed += [{"type": "directory", "path": f} for f in sorted(folders)]
        self.answer(listed)

    def bucket_file(self, body: bytes, repo: str, path: str) -> None:
        if path not in self.hub.buckets.get(repo, {}):
            self.fail(404, "EntryNotFound")
            return
        self.send(path, self.hub.buckets[repo][path])

    # --- writing ---

    def authorised(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self.fail(403)
        return False

    def create(self, body: bytes) -> None:
        if not self.authorised():
            return
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if repo in self.hub.repos else 200
        if status == 200:
            self.hub.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repo)
        self.answer({"url": f"{self.hub.address}/{repo}", "name": repo}, status=status)

    def validate(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        commit = self.found(repo, revision)
        if commit is None:
            return
        files = [
            {
                "path": f["path"], "shouldIgnore": False,
                "uploadMode": "lfs" if by_lfs(f["path"], f["size"]) else "regular",
                "oid": entry(f["path"], commit[1][f["path"]])["oid"]
                if f["path"] in commit[1] else None,
            }
            for f in json.loads(body)["files"]
        ]  # fmt: skip
        self.answer({"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        if not self.authorised():
            return
        objects: list[dict[str, Any]] = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            found: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
            if oid not in self.hub.lfs:  # what is there already is not asked for again
                href = f"{self.hub.address}/lfs/{oid}"
                found["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(found)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.fail(422)
            return
        self.hub.lfs[oid] = body
        self.answer(b"")

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self.authorised():
            return
        added: Files = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    self.fail(400)
                    return
                added[value["path"]] = self.hub.lfs[value["oid"]]
        sha = self.hub.commit(repo, added)
        url = f"{self.hub.address}/{repo}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_AT = r"(?P<revision>[^/]+)"
ROUTES = [
    (kind, verb, re.compile(pattern))
    for kind, verb, pattern in [
        ("listing", "GET", r"/api/models"),
        ("create", "POST", r"/api/repos/create"),
        ("validate", "POST", r"/api/validate-yaml"),
        ("preupload", "POST", rf"/api/models/{_REPO}/preupload/{_AT}"),
        ("commit", "POST", rf"/api/models/{_REPO}/commit/{_AT}"),
        ("paths", "POST", rf"/api/models/{_REPO}/paths-info/{_AT}"),
        ("tree", "GET", rf"/api/models/{_REPO}/tree/{_AT}(?P<path>/.*)?"),
        ("info", "GET", rf"/api/models/{_REPO}(/revision/{_AT})?"),
        ("bucket", "GET", rf"/api/buckets/{_REPO}"),
        ("bucket_tree", "GET", rf"/api/buckets/{_REPO}/tree(/(?P<prefix>.*))?"),
        ("bucket_file", "GET", rf"/buckets/{_REPO}/resolve/(?P<path>.+)"),
        ("batch", "POST", rf"/{_REPO}\.git/info/lfs/objects/batch"),
        ("upload", "PUT", r"/lfs/(?P<oid>\w+)"),
        ("resolve", "GET", rf"/{_REPO}/resolve/{_AT}/(?P<path>.+)"),
    ]
]


@contextmanager
def serving() -> Generator[Hub]:
    """A hub that answers until the block ends."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(address=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
