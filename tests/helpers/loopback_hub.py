"""A small Hugging Face Hub on 127.0.0.1 for the tests: real HTTP, everything held in memory.

Purpose: the tests push to it and pull from it with the real `huggingface_hub` client. Mocking the client would only
show that the mock is called; what matters (no-op commits, resumed uploads, lost replies, which exception a refusal
becomes) is settled between the client and the wire, so the wire is what is imitated here.

How to run: the client reads its settings when it is imported, so run it in a subprocess under `env()`, or in forks of
one; `reset()` lets several tests share a hub, and with it the processes that know its address:

    with LoopbackHub() as hub:
        hub.add_repo("user/model", {"config.json": b"{}"})
        subprocess.run([sys.executable, "-c", code], env=os.environ | hub.env(tmp_path), check=True)
        assert hub.files("user/model")["config.json"] == b"{}"
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import yaml

USER = "user"
LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".png")
LFS_SIZE = 10_000_000  # larger files are LFS whatever their name


class Reply(NamedTuple):
    body: Any  # bytes as they are, anything else as JSON
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012 - a named tuple's default, never changed


class HubError(Exception):
    """A refusal; the client picks its exception type by the status and these headers."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "", **body: Any) -> None:
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.reply = Reply({"error": message} | body, status, {k: v for k, v in headers.items() if v})


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


def card_data(readme: bytes) -> dict[str, Any]:
    match = re.match(rb"---\r?\n(.*?)\r?\n---\s*(\n|$)", readme, re.DOTALL)
    card = yaml.safe_load(match[1]) if match else {}
    if not isinstance(card, dict) or not isinstance(card.get("base_model", ""), str | list):
        raise yaml.YAMLError("the metadata must be a mapping, and base_model in it a string or a list")
    return card


class Commit(NamedTuple):
    sha: str
    parent: str | None
    title: str
    date: str
    files: dict[str, str]  # path -> oid: 40 hex digits for a git blob, 64 (SHA-256) for an LFS one


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool | str = False
    blobs: dict[str, bytes] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=lambda: {"heads": {}, "tags": {}})

    def __post_init__(self) -> None:
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("main", "initial commit", {".gitattributes": self.keep(attributes.encode(), lfs=False)})

    def keep(self, data: bytes, lfs: bool) -> str:
        oid = hashlib.sha256(data).hexdigest() if lfs else git_oid(data)
        self.blobs[oid] = data
        return oid

    def commit(self, branch: str, title: str, files: dict[str, str]) -> str:
        parent = self.refs["heads"].get(branch)
        sha = hashlib.sha1(json.dumps([parent, title, sorted(files.items())]).encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.history[sha] = Commit(sha, parent, title, date, files)
        self.refs["heads"][branch] = sha
        return sha

    def add(self, files: dict[str, str], path: str, content: str = "", oid: str = "", **_: Any) -> None:
        oid = oid or self.keep(base64.b64decode(content), lfs=False)
        if oid not in self.blobs:
            raise HubError(400, f"{path} points to an LFS object that was never uploaded")
        files[path] = oid

    def delete(self, files: dict[str, str], path: str) -> None:
        gone = [name for name in files if f"{name}/".startswith(path.rstrip("/") + "/")]
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]

    def at(self, rev: str) -> Commit:
        sha = (self.refs["tags"] | self.refs["heads"]).get(rev, rev)
        if sha not in self.history:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return self.history[sha]

    def point(self, kind: str, name: str, rev: str) -> dict[str, str]:
        if name in self.refs[kind]:
            raise HubError(409, f"Reference {name} already exists")
        self.refs[kind][name] = self.at(rev).sha
        return {}

    def log(self, rev: str) -> list[Commit]:
        commits = [self.at(rev)]
        while commits[-1].parent:
            commits.append(self.history[commits[-1].parent])
        return commits

    def describe(self, path: str, oid: str) -> dict[str, Any]:
        """A file as the tree lists it (path, oid) and as model info does (rfilename, blobId, sha256)."""
        size, git, lfs = len(self.blobs[oid]), oid, {}
        if len(oid) == 64:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
            git, lfs = git_oid(pointer), {"oid": oid, "sha256": oid, "size": size, "pointerSize": len(pointer)}
        names = {"type": "file", "path": path, "rfilename": path, "oid": git, "blobId": git, "size": size}
        return names | ({"lfs": lfs} if lfs else {})


class LoopbackHub(ThreadingHTTPServer):
    """The server and what it holds. Use it as a context manager; every repo begins with a .gitattributes commit.

    What came in: `requests`, each (method, path), and `uploads`, each (oid, bytes) of an LFS body received in full.
    Faults, set by a test and used up one by one (the client itself tries an upload 6 times, over 23 seconds):
    `cut_uploads`: after how many body bytes to drop each of the next LFS PUTs, storing nothing;
    `lose_commit_reply`: how many of the next commits to apply without answering;
    `fail_status`: {(method, path regex): (status, how many times)} to answer instead.
    """

    def __init__(self, token: str = "hf_loopback") -> None:
        self.token = token
        self.reset()
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Connection)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def reset(self) -> None:
        """Hold nothing, as at the start, and have no faults to come."""
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[tuple[str, int]] = []
        self.cut_uploads: list[int] = []
        self.lose_commit_reply = 0
        self.fail_status: dict[tuple[str, str], tuple[int, int]] = {}

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.serve_forever, args=(0.02,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def env(self, home: Path, token: str | None = "") -> dict[str, str]:
        """Settings of a client: `token` is this hub's own unless given, None for a client that is not logged in."""
        names = "HUB_DISABLE_XET", "HUB_DISABLE_TELEMETRY", "HUB_DISABLE_PROGRESS_BARS"
        switches = {"DISABLE_SAFETENSORS_CONVERSION": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        sent = "" if token is None else token or self.token  # set even when empty: it hides a token of the developer's
        where = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": sent}
        return where | switches | {f"HF_{name}": "1" for name in names}

    def add_repo(
        self, repo_id: str, files: dict[str, bytes], *, private: bool = False, gated: bool | str = False
    ) -> str:
        """Commit `files` to main of a new or existing repo; `gated="manual"` shuts out even this hub's own token."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id, private, gated))
        added = {path: repo.keep(data, is_lfs(path, len(data))) for path, data in files.items()}
        return repo.commit("main", "Add files", repo.at("main").files | added)

    def commits(self, repo_id: str) -> list[str]:
        return [commit.sha for commit in self.repos[repo_id].log("main")]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return {path: repo.blobs[oid] for path, oid in repo.at(revision).files.items()}

    def tags(self, repo_id: str) -> dict[str, str]:
        return dict(self.repos[repo_id].refs["tags"])


class Connection(BaseHTTPRequestHandler):
    """One client connection: reads a request, finds its row in ROUTES, sends what that handler returns."""

    server: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; Nagle would hold the second back by 40 ms

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client was killed
            super().handle()

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr: tests read `LoopbackHub.requests`."""

    def serve(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.server.requests.append((self.command, path))
        result = self.answer(path) if self.read_body() else None
        if result is None:
            self.close_connection = True
            return
        body, status, headers = result if isinstance(result, Reply) else Reply(result)
        data = body if isinstance(body, bytes) else json.dumps(body, default=str).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self) -> bool:
        """Whether the body came whole: neither cut by a test nor left off by a client that went away."""
        length = int(self.headers.get("Content-Length", 0))
        with self.server.lock:
            cut = self.server.cut_uploads.pop(0) if self.command == "PUT" and self.server.cut_uploads else None
        self.body = self.rfile.read(length if cut is None else min(cut, length))
        return cut is None and len(self.body) == length

    def answer(self, path: str) -> Any:
        """What to send: JSON or a Reply; None to drop the connection without a word."""
        with self.server.lock:
            try:
                self.inject_failure(path)
                return self.dispatch(path)
            except HubError as error:
                return error.reply

    def inject_failure(self, path: str) -> None:
        for (method, pattern), (status, count) in self.server.fail_status.items():
            if count and method == self.command and re.search(pattern, path):
                self.server.fail_status[method, pattern] = (status, count - 1)
                raise HubError(status, "Injected failure")

    def dispatch(self, path: str) -> Any:
        self.signed_in = "Authorization" in self.headers
        if self.signed_in and self.headers["Authorization"] != f"Bearer {self.server.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        for methods, pattern, needs_token, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                values: dict[str, Any] = {key: unquote(value) for key, value in match.groupdict().items() if value}
                if "repo" in values:
                    values["repo"] = self.find_repo(values["repo"], needs_token)
                elif needs_token and not self.signed_in:
                    raise HubError(401, "Invalid username or password.")
                return handler(self, **values)
        raise HubError(404, f"No such route: {self.command} {path}")

    def find_repo(self, repo_id: str, needs_token: bool) -> Repo:
        repo = self.server.repos.get(repo_id)
        if not self.signed_in and (repo is None or repo.private or needs_token):
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def whoami(self) -> Any:
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}

    def create_repo(self) -> Any:
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization'] or USER}/{wanted['name']}"
        url = f"{self.server.url}/{'spaces/' if wanted.get('type') == 'space' else ''}{repo_id}"
        if repo_id in self.server.repos:
            raise HubError(409, "You already created this model repo", url=url)
        self.server.repos[repo_id] = Repo(repo_id, private=wanted.get("visibility") == "private")
        return {"url": url}

    def validate_yaml(self) -> Any:
        try:
            card = card_data(json.loads(self.body)["content"].encode())
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid metadata in README.md", errors=[{"message": str(error)}]) from error
        return {"errors": [], "warnings": [] if card else [{"message": "empty or missing yaml metadata"}]}

    def info(self, repo: Repo, rev: str = "main") -> Any:
        sha, _, _, date, files = repo.at(rev)
        card = card_data(repo.blobs[files["README.md"]]) if "README.md" in files else {}
        full = "blobs" in self.query
        siblings = [repo.describe(path, oid) if full else {"rfilename": path} for path, oid in files.items()]
        about = {"id": repo.id, "private": repo.private, "gated": repo.gated, "sha": sha, "lastModified": date}
        return about | {"siblings": siblings, "cardData": card, "tags": card.get("tags", [])}

    def tree(self, repo: Repo, rev: str, path: str = "") -> Any:
        commit, folder = repo.at(rev), f"{path}/" if path else ""
        inside = {name: oid for name, oid in commit.files.items() if name.startswith(folder)}
        if path and not inside:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound", commit.sha)
        deep = self.query.get("recursive") == ["true"]
        return [repo.describe(name, oid) for name, oid in inside.items() if deep or "/" not in name[len(folder) :]]

    def paths_info(self, repo: Repo, rev: str) -> Any:
        wanted, files = parse_qs(self.body.decode())["paths"], repo.at(rev).files
        return [repo.describe(path, files[path]) for path in wanted if path in files]

    def list_commits(self, repo: Repo, rev: str) -> Any:
        by = {"message": "", "authors": [{"user": USER}]}
        return [{"id": commit.sha, "title": commit.title, "date": commit.date} | by for commit in repo.log(rev)]

    def list_refs(self, repo: Repo) -> Any:
        def listed(kind: str) -> list[dict[str, str]]:
            refs = repo.refs[kind].items()
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs]

        return {"branches": listed("heads"), "tags": listed("tags"), "converts": []}

    def create_branch(self, repo: Repo, name: str) -> Any:
        return repo.point("heads", name, json.loads(self.body).get("startingPoint", "main"))

    def create_tag(self, repo: Repo, rev: str) -> Any:
        return repo.point("tags", json.loads(self.body)["tag"], rev)

    def delete_tag(self, repo: Repo, name: str) -> Any:
        if repo.refs["tags"].pop(name, None) is None:
            raise HubError(404, f"No tag {name}", "RevisionNotFound")
        return {}

    def preupload(self, repo: Repo, rev: str) -> Any:
        held = repo.at(rev).files

        def planned(path: str, size: int) -> dict[str, Any]:
            mode = "lfs" if is_lfs(path, size) else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": held.get(path)}

        return {"files": [planned(file["path"], file["size"]) for file in json.loads(self.body)["files"]]}

    def lfs_batch(self, repo: Repo) -> Any:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in repo.blobs:  # no actions: the client takes the object as uploaded
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{repo.id}/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, target: str, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The body is not the announced object")
        self.server.repos[target].keep(self.body, lfs=True)
        self.server.uploads.append((oid, len(self.body)))
        return {}

    def commit(self, repo: Repo, rev: str) -> Any:
        head = repo.at(repo.refs["heads"].get(rev, f"branch {rev}"))
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", head.sha) != head.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            change = repo.delete if operation["key"].startswith("deleted") else repo.add
            change(files, **operation["value"])
        sha = repo.commit(rev, header["value"]["summary"], files)
        if self.server.lose_commit_reply:
            self.server.lose_commit_reply -= 1
            return None
        return {"commitOid": sha, "commitUrl": f"{self.server.url}/{repo.id}/commit/{sha}"}

    def resolve(self, repo: Repo, rev: str, path: str) -> Any:
        if repo.gated == "manual" or (repo.gated and not self.signed_in):
            raise HubError(403 if self.signed_in else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")
        commit = repo.at(rev)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.sha)
        oid = commit.files[path]
        data = repo.blobs[oid]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if len(oid) == 64:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return Reply(data, 200, headers)
        part = data[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
        headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}"
        return Reply(part, 206, headers)


REPO, REV, NAME, PATH = r"(?P<repo>[^/]+(?:/[^/]+)?)", "(?P<rev>[^/]+)", "(?P<name>[^/]+)", "(?P<path>.+)"
API = f"/api/(?:models|spaces)/{REPO}"
ROUTES = [  # methods, path, whether a token is needed even for a public repo, handler
    (["GET"], "/api/whoami-v2", True, Connection.whoami),
    (["POST"], "/api/repos/create", True, Connection.create_repo),
    (["POST"], "/api/validate-yaml", False, Connection.validate_yaml),
    (["GET"], f"{API}(?:/revision/{REV})?", False, Connection.info),
    (["GET"], f"{API}/tree/{REV}(?:/{PATH})?", False, Connection.tree),
    (["POST"], f"{API}/paths-info/{REV}", False, Connection.paths_info),
    (["GET"], f"{API}/commits/{REV}", False, Connection.list_commits),
    (["GET"], f"{API}/refs", False, Connection.list_refs),
    (["POST"], f"{API}/branch/{NAME}", True, Connection.create_branch),
    (["POST"], f"{API}/tag/{REV}", True, Connection.create_tag),
    (["DELETE"], f"{API}/tag/{NAME}", True, Connection.delete_tag),
    (["POST"], f"{API}/preupload/{REV}", True, Connection.preupload),
    (["POST"], f"{API}/commit/{REV}", True, Connection.commit),
    (["POST"], rf"/{REPO}\.git/info/lfs/objects/batch", True, Connection.lfs_batch),
    (["PUT"], "/lfs/(?P<target>.+)/(?P<oid>[0-9a-f]{64})", False, Connection.lfs_upload),  # comes without a token
    (["GET", "HEAD"], f"/{REPO}/resolve/{REV}/{PATH}", False, Connection.resolve),
]
