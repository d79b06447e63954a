"""A small Hugging Face Hub on the loopback, for tests of upload and download.

It serves model repositories with one branch, `main`. Clients need `HF_ENDPOINT` set to the
server's `endpoint` and `HF_HUB_DISABLE_XET=1`, both before `huggingface_hub` is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

Files = dict[str, Path]  # path in the repository -> file on disk that holds its bytes

_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_LFS_SIZE = 5_000_000
_PIECE = 1 << 20
_DATE = "2025-01-01T00:00:00.000Z"
_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(_LFS_SUFFIXES) or size > _LFS_SIZE)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class LocalHub:
    """A Hub on 127.0.0.1 whose repositories live in a folder."""

    def __init__(self, root: Path, token: str = "hf_test") -> None:
        self.token = token
        self.user = "user"  # namespace of a repository created without one
        self.blobs = root / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.repositories: dict[str, Files] = {}  # id -> files of main
        self.heads: dict[str, str] = {}  # id -> commit sha of main
        self.commits: dict[tuple[str, str], Files] = {}  # (id, sha) -> files
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, Range header)
        self.fail_next = 0  # that many next requests are answered with status 500
        self.lock = threading.RLock()
        self._server = _Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering. A stopped hub cannot be started again."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> LocalHub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def store(self, data: bytes) -> Path:
        """Keep the bytes of a regular file under their git id."""
        blob = self.blobs / _git_oid(data)
        with self.lock:
            if not blob.exists():
                blob.write_bytes(data)
        return blob

    def commit(self, repo_id: str, files: Files) -> str:
        """Make `files` the whole content of main, creating the repository if needed; returns the sha."""
        with self.lock:
            listing = sorted((path, blob.name) for path, blob in files.items())
            seed = repr((repo_id, self.heads.get(repo_id), len(self.commits), listing))
            sha = hashlib.sha1(seed.encode(), usedforsecurity=False).hexdigest()
            self.commits[repo_id, sha] = self.repositories[repo_id] = files
            self.heads[repo_id] = sha
        return sha

    def add_folder(self, repo_id: str, folder: Path) -> str:
        """Make a local folder the whole content of main, without HTTP; returns the sha."""
        files: Files = {}
        for source in sorted(path for path in folder.rglob("*") if path.is_file()):
            path = source.relative_to(folder).as_posix()
            if _is_lfs(path, source.stat().st_size):
                with source.open("rb") as file:
                    files[path] = self.blobs / hashlib.file_digest(file, "sha256").hexdigest()
                shutil.copyfile(source, files[path])
            else:
                files[path] = self.store(source.read_bytes())
        return self.commit(repo_id, files)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: LocalHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # HTTP/1.0, the default: one request per connection

    def log_message(self, *_args: Any, **_kwargs: Any) -> None:
        """Say nothing on stderr."""

    def _serve(self) -> None:
        self.hub = self.server.hub
        self.body = self._read_body()
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        verb = "GET" if self.command == "HEAD" else self.command
        try:
            with self.hub.lock:
                self.hub.requests.append((self.command, unquote(path), self.headers["Range"]))
                failing = self.hub.fail_next > 0
                self.hub.fail_next -= failing
            if failing:
                raise _RefusedError(500, "Failure ordered by the test")
            for route_verb, pattern, action in _ROUTES:
                if verb == route_verb and (match := re.fullmatch(pattern, path)):
                    action(self, *map(unquote, match.groups("")))
                    return
            raise _RefusedError(404, "No such page on the test server")
        except _RefusedError as refusal:
            self._json({"error": str(refusal)}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read_body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0 and (piece := self.rfile.read(min(left, _PIECE))):
            left -= len(piece)
            yield piece

    def _head(self, status: int, headers: dict[str, str]) -> None:
        for _ in self.body:
            pass  # closing on unread bytes would reset the connection before the answer is read
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        kind = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        self._head(status, {**kind, **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _authorized(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {self.hub.token}"

    def _require_token(self) -> None:
        if not self._authorized():
            given = "Authorization" in self.headers
            invalid = "credentials in Authorization header" if given else "username or password."
            raise _RefusedError(401, f"Invalid {invalid}")

    def _files(self, repo_id: str, revision: str = "main") -> tuple[str, Files]:
        """The commit that a revision names, and its files; refused as the Hub would refuse it."""
        if repo_id in self.hub.private and not self._authorized():
            raise _RefusedError(401, "Repository not found", "RepoNotFound")
        if repo_id not in self.hub.repositories:
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        with self.hub.lock:
            sha = self.hub.heads[repo_id] if revision == "main" else revision
            if (repo_id, sha) not in self.hub.commits:
                raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return sha, self.hub.commits[repo_id, sha]

    @staticmethod
    def _entry(path: str, blob: Path) -> dict[str, Any]:
        size, oid = blob.stat().st_size, blob.name
        entry = {"type": "file", "path": path, "rfilename": path, "size": size}
        if len(oid) == 40:
            return {**entry, "oid": oid, "blobId": oid}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
        git_oid = _git_oid(pointer.encode())
        lfs = {"oid": oid, "sha256": oid, "size": size, "pointerSize": len(pointer)}
        return {**entry, "oid": git_oid, "blobId": git_oid, "lfs": lfs}

    def _entries(self, files: Files) -> dict[str, dict[str, Any]]:
        found = {path: self._entry(path, blob) for path, blob in files.items()}
        for folder in {str(parent) for path in files for parent in list(Path(path).parents)[:-1]}:
            oid = _git_oid(folder.encode())
            found[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
        return dict(sorted(found.items()))

    def whoami(self) -> None:
        self._require_token()
        self._json({"type": "user", "name": self.hub.user, "fullname": self.hub.user, "orgs": []})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def create(self) -> None:
        self._require_token()
        asked = json.loads(b"".join(self.body))
        if asked.get("type", "model") != "model":
            raise _RefusedError(400, "The test server has model repositories only")
        repo_id = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        with self.hub.lock:
            exists = repo_id in self.hub.repositories
            if not exists:
                if asked.get("private") or asked.get("visibility") == "private":
                    self.hub.private.add(repo_id)
                self.hub.commit(repo_id, {".gitattributes": self.hub.store(_ATTRIBUTES)})
        if exists:
            self._json({**answer, "error": "You already created this model repo"}, 409)
        else:
            self._json(answer)

    def preupload(self, repo_id: str, revision: str) -> None:
        self._require_token()
        files = self._files(repo_id, revision)[1]
        answer = []
        for asked in json.loads(b"".join(self.body))["files"]:
            path = asked["path"]
            mode = "lfs" if _is_lfs(path, asked["size"]) else "regular"
            oid = files[path].name if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        self._require_token()
        self._files(repo_id)
        objects = []
        for asked in json.loads(b"".join(self.body))["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.hub.blobs / asked["oid"]).exists():
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs-upload/{asked['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.hub.blobs, delete=False) as file:
            for piece in self.body:
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != oid:
            Path(file.name).unlink()
            raise _RefusedError(400, "The bytes do not have the announced sha256")
        Path(file.name).replace(self.hub.blobs / oid)
        self._json({})

    def commit(self, repo_id: str, revision: str) -> None:
        self._require_token()
        if revision != "main":
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in b"".join(self.body).splitlines() if line]
        with self.hub.lock:
            head, current = self._files(repo_id)
            files = dict(current)
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "header" and value.get("parentCommit", head) != head:
                    raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
                if key == "file":
                    files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    files[value["path"]] = self.hub.blobs / value["oid"]
                    if not files[value["path"]].exists():
                        raise _RefusedError(400, f"The LFS object of {value['path']} was not uploaded")
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise _RefusedError(404, f"{value['path']} does not exist", "EntryNotFound")
                elif key == "deletedFolder":
                    folder = value["path"].rstrip("/") + "/"
                    files = {path: blob for path, blob in files.items() if not path.startswith(folder)}
            sha = self.hub.commit(repo_id, files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, repo_id: str, revision: str = "main") -> None:
        sha, files = self._files(repo_id, revision)
        entries = (self._entry(path, files[path]) for path in sorted(files))
        keys = ("rfilename", "size", "blobId", "lfs") if "blobs" in self.query else ("rfilename",)
        answer: dict[str, Any] = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0]}
        answer |= {"sha": sha, "lastModified": _DATE, "createdAt": _DATE, "tags": [], "disabled": False}
        answer |= {"private": repo_id in self.hub.private, "downloads": 0, "likes": 0}
        answer["gated"] = "manual" if repo_id in self.hub.gated else False
        answer["siblings"] = [{key: entry[key] for key in keys if key in entry} for entry in entries]
        self._json(answer)

    def tree(self, repo_id: str, revision: str, folder: str) -> None:
        entries = self._entries(self._files(repo_id, revision)[1])
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise _RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        prefix = folder + "/" if folder else ""
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = [path for path in entries if path.startswith(prefix)]
        self._json([entries[path] for path in inside if deep or "/" not in path[len(prefix) :]])

    def paths_info(self, repo_id: str, revision: str) -> None:
        entries = self._entries(self._files(repo_id, revision)[1])
        asked = parse_qs(b"".join(self.body).decode()).get("paths", [])
        self._json([entries[path] for path in asked if path in entries])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self._files(repo_id, revision)
        if repo_id in self.hub.gated:
            raise _RefusedError(403, f"Access to model {repo_id} is restricted", "GatedRepo")
        if path not in files:
            raise _RefusedError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
        blob = files[path]
        start, end, size = 0, blob.stat().st_size, blob.stat().st_size
        asked = re.fullmatch(r"bytes=(?=.*\d)(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            if start >= end:
                raise _RefusedError(416, "Requested range not satisfiable", Content_Range=f"bytes */{size}")
        headers = {"ETag": f'"{blob.name}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(end - start)}
        if len(blob.name) == 64:
            headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{blob.name}"'}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        with blob.open("rb") as file:
            self._head(206 if asked else 200, headers)
            if self.command != "HEAD" and end > start:
                self.connection.sendfile(file, start, end - start)


_ID = r"([^/]+(?:/[^/]+)?)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"/api/models/{_ID}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{_ID}/commit/([^/]+)", _Handler.commit),
    ("POST", f"/api/models/{_ID}/paths-info/([^/]+)", _Handler.paths_info),
    ("GET", f"/api/models/{_ID}/revision/([^/]+)", _Handler.info),
    ("GET", f"/api/models/{_ID}/tree/([^/]+)(?:/(.*))?", _Handler.tree),
    ("GET", f"/api/models/{_ID}", _Handler.info),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs-upload/([0-9a-f]{64})", _Handler.lfs_upload),
    ("GET", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
