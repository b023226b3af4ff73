"""An in-memory Hugging Face Hub on the loopback address, with the part of its protocol that push, list and pull need.

    with LoopbackHub() as hub:
        subprocess.run(command, env=os.environ | hub.environment(home))
        hub.repos["dataset", "org/name"].files()

`huggingface_hub` reads its endpoint when it is imported, so the client runs in a subprocess with `environment()` set.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from loopback_server import LoopbackServer

RESET, LOST = 0, -1  # instead of a status: the connection ends before or after the request is served
LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".png")
REPO = r"/(?:api/)?(?P<type>models/|datasets/|spaces/|)(?P<name>[^/]+/[^/]+?)"


class File(NamedTuple):
    content: bytes
    is_lfs: bool

    @property
    def etag(self) -> str:
        """SHA-256 of an LFS file, git's SHA-1 of any other file."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.etag}
        lfs = {"oid": self.etag, "size": len(self.content), "pointerSize": 130}
        return entry | ({"lfs": lfs} if self.is_lfs else {})


@dataclass
class Repo:
    """`commits` holds all files at each commit, oldest first; a new repository has an empty first commit."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.commits[self.branches.get(revision, revision)].items()}


class LoopbackHub(LoopbackServer):
    """`fails` maps the end of a request's path to the error status to answer, or to RESET or LOST."""

    def __init__(self, fails: dict[str, int] | None = None):
        super().__init__(Handler)
        self.fails = fails or {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []  # method and path of every request
        self.lock = threading.Lock()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a client of this server whose caches are below `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }


class Answer(Exception):  # noqa: N818
    """Ends a request."""

    def __init__(self, body=b"", status: int = 200, **headers: str):
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.headers = status, headers


def missing(code: str, **headers: str) -> Answer:
    return Answer({"error": code}, 404, **{"X-Error-Code": code}, **headers)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        url = urlsplit(self.path)
        self.server.requests.append((self.command, url.path))
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fails = [status for end, status in self.server.fails.items() if unquote(url.path).endswith(end)]
        try:
            if fails and fails[0] != LOST:
                raise Answer({"error": "made to fail"}, fails[0])
            with self.server.lock:
                self.route(unquote(url.path))
        except Answer as answer:
            if fails and fails[0] in (RESET, LOST):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def route(self, path: str):
        """Call the handler of a path; each handler raises its answer."""
        for pattern, function in ROUTES:
            if match := re.fullmatch(pattern, path):
                groups = match.groupdict()
                if "name" in groups:
                    key = ((groups.pop("type") or "models/")[:-2], groups.pop("name"))
                    if key not in self.server.repos:
                        raise missing("RepoNotFound")
                    groups["repo"] = self.server.repos[key]
                if "revision" in groups:
                    groups["sha"] = self.find(groups["repo"], groups["revision"] or "main")
                function(self, **groups)
        raise missing("EntryNotFound")

    def find(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise missing("RevisionNotFound")
        return sha

    def whoami(self):
        raise Answer({"type": "user", "name": "org", "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self):
        raise Answer({"errors": [], "warnings": []})

    def create(self):
        asked = json.loads(self.body)
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or 'org'}/{asked['name']}"
        status = 409 if (kind, name) in self.server.repos else 200
        if status == 200:
            self.server.repos[kind, name] = repo = Repo(asked.get("private") or asked.get("visibility") == "private")
            repo.commit("main", {})
        raise Answer({"url": f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"}, status)

    def branch(self, repo: Repo, new: str):
        repo.branches.setdefault(new, repo.branches["main"])
        raise Answer({})

    def refs(self, repo: Repo):
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
        raise Answer({"branches": branches, "tags": [], "converts": []})

    def info(self, repo: Repo, revision: str | None, sha: str):
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        raise Answer({"id": "org/name", "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, repo: Repo, revision: str, sha: str, folder: str | None):
        below = f"{folder.strip('/')}/" if folder else ""
        files = {path: file for path, file in repo.commits[sha].items() if path.startswith(below)}
        parents = {str(parent) for path in files for parent in Path(path).parents}
        entries = [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            for path in sorted(parents)
            if path != "." and path.startswith(below)
        ]
        entries += [file.entry(path) for path, file in sorted(files.items())]
        if self.query.get("recursive", [""])[0].lower() not in ("true", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(below)]
        raise Answer(entries) if entries or not below else missing("EntryNotFound")

    def paths_info(self, repo: Repo, revision: str, sha: str):
        is_json = self.body.startswith(b"{")
        paths = (json.loads(self.body) if is_json else parse_qs(self.body.decode()))["paths"]
        raise Answer([repo.commits[sha][path].entry(path) for path in paths if path in repo.commits[sha]])

    def preupload(self, repo: Repo, revision: str, sha: str):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
        raise Answer(
            {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
        )

    def lfs_batch(self, repo: Repo):
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.blobs:
                upload, verify = (f"{self.server.url}/lfs/{verb}/{item['oid']}" for verb in ("upload", "verify"))
                item["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        raise Answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer({"error": "wrong content"}, 400)
        self.server.blobs[oid] = self.body
        raise Answer()

    def lfs_verify(self, oid: str):
        raise Answer(status=200 if len(self.server.blobs[oid]) == json.loads(self.body)["size"] else 422)

    def commit(self, repo: Repo, revision: str, sha: str):
        files = dict(repo.commits[sha])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = File(self.server.blobs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        sha = repo.commit(revision, files)
        raise Answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/org/name/commit/{sha}"})

    def resolve(self, repo: Repo, revision: str, sha: str, path: str):
        if path not in repo.commits[sha]:
            raise missing("EntryNotFound", **{"X-Repo-Commit": sha})
        file = repo.commits[sha][path]
        content, headers = file.content, {"ETag": f'"{file.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            raise Answer(content, **headers)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        raise Answer(content[first : last + 1], 206, **headers)


ROUTES = [
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/validate-yaml", Handler.validate_yaml),
    (r"/api/repos/create", Handler.create),
    (r"/lfs/upload/(?P<oid>\w+)", Handler.lfs_upload),
    (r"/lfs/verify/(?P<oid>\w+)", Handler.lfs_verify),
    (REPO + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (REPO + r"/branch/(?P<new>[^/]+)", Handler.branch),
    (REPO + r"/refs", Handler.refs),
    (REPO + r"(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    (REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    (REPO + r"/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (REPO + r"/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (REPO + r"/commit/(?P<revision>[^/]+)", Handler.commit),
]
