"""A Hugging Face hub on this machine, for tests of downloads: the endpoints that huggingface_hub asks, and faults.

    with Hub() as hub:
        hub.add("me/words", {"data/00.jsonl": b"...", "README.md": b"..."}, repo_type="dataset")
        hub.fail("*/resolve/*/data/00.jsonl", cut_after=1000, times=2)
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})
    assert "Bearer hf_mine" in hub.authorizations("*/resolve/*")

Answers, headers and errors are those of the real one, for files that are not in LFS or Xet.
"""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, quote, unquote, urlsplit

KINDS = {"model": "models", "dataset": "datasets"}
CHUNK = 64 * 1024


class ErrorAnswer(Exception):
    """An answer with a status of 400 or more; `code` is X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Repository:
    """`files` maps paths to contents, or to files on the disk. `licensed` are the tokens that may read a gated one."""

    repo_id: str
    repo_type: str
    files: dict[str, bytes | Path]
    gated: bool = False
    private: bool = False
    licensed: frozenset[str] = frozenset()

    def content(self, path: str) -> bytes:
        source = self.files[path]
        return source if isinstance(source, bytes) else source.read_bytes()

    def commit(self) -> str:
        """The hash of the one commit there is: branch `main` now."""
        listing = json.dumps([(path, self.blob_id(path)) for path in sorted(self.files)])
        return hashlib.sha1(listing.encode()).hexdigest()

    def blob_id(self, path: str) -> str:
        """git's own hash of a file, which is its ETag, too."""
        content = self.content(path)
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What happens to requests whose path matches `pattern` (of fnmatch), for the first `times` of them (None: all).

    With `cut_after` the connection breaks after so many bytes of the body; else `status` is the answer, with
    X-Error-Code and X-Error-Message where given. (A download goes on from where it was cut only behind its first
    10 MiB: huggingface_hub writes pieces of that size.)
    """

    pattern: str
    status: int = 500
    code: str | None = None
    message: str | None = None
    cut_after: int | None = None
    times: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One that came in: `path` is decoded and without the query; `authorization` and `range` are headers."""

    method: str
    path: str
    query: str
    authorization: str | None
    range: str | None


class Hub:
    """The server, from entering to leaving the `with`; faults may be added while it runs.

    `tokens`, where not None, are the tokens that exist; any other one that is sent gets a 401. `page_size` is the
    entries of a page of a tree listing (the real hub has 1000).
    """

    def __init__(self, tokens: Iterable[str] | None = None, page_size: int = 1000) -> None:
        self.tokens = None if tokens is None else set(tokens)
        self.page_size = page_size
        self.requests: list[Request] = []
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "Hub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        # Before closing, which would wait for clients that keep their connections open.
        self._server.block_on_close = False
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that make huggingface_hub use this hub, with `home` for its cache and login, and no proxy."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path] | Path,
        repo_type: str = "model",
        gated: bool = False,
        private: bool = False,
        licensed: Iterable[str] = (),
    ) -> Repository:
        """Serve a repository, of contents by path or of a folder as it is now; one of the same name is replaced.

        A gated one shows its listing to all and its files to `licensed` tokens; a private one is there only for these.
        """
        if isinstance(files, Path):
            files = {file.relative_to(files).as_posix(): file for file in files.rglob("*") if file.is_file()}
        contents = {path: value.encode() if isinstance(value, str) else value for path, value in files.items()}
        repository = Repository(repo_id, repo_type, contents, gated, private, frozenset(licensed))
        self._repositories[repo_type, repo_id] = repository
        return repository

    def fail(
        self,
        pattern: str,
        status: int = 500,
        code: str | None = None,
        message: str | None = None,
        cut_after: int | None = None,
        times: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Fault:
        """From now on, see Fault. The first fault that matches a request is the one that happens."""
        fault = Fault(pattern, status, code, message, cut_after, times, headers or {})
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """From now on, no faults."""
        with self._lock:
            self._faults.clear()

    def paths(self, method: str = "GET", pattern: str = "*") -> list[str]:
        """The paths asked for so far by `method`, in order."""
        return [
            request.path for request in self.requests if request.method == method and fnmatchcase(request.path, pattern)
        ]

    def authorizations(self, pattern: str = "*") -> set[str | None]:
        """The Authorization headers of requests for such paths; None stands for none."""
        return {request.authorization for request in self.requests if fnmatchcase(request.path, pattern)}

    def _take_fault(self, path: str, has_body: bool) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                # Only an answer with a body can be cut in it.
                if fnmatchcase(path, fault.pattern) and fault.times != 0 and (has_body or fault.cut_after is None):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def _find(self, repo_type: str, repo_id: str, token: str | None) -> Repository:
        if token is not None and self.tokens is not None and token not in self.tokens:
            raise ErrorAnswer(401, "Invalid credentials in Authorization header")
        repository = self._repositories.get((repo_type, repo_id))
        if repository is None or (repository.private and token not in repository.licensed):
            # Whether there is a private one is told to nobody; who has no token might have one that could see it.
            raise ErrorAnswer(401 if token is None else 404, "Repository not found", "RepoNotFound")
        return repository


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "hub"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: Hub = self.server.hub
        url = urlsplit(self.path)
        request = Request(
            self.command, unquote(url.path), url.query, self.headers.get("Authorization"), self.headers.get("Range")
        )
        hub.requests.append(request)
        fault = hub._take_fault(request.path, has_body=self.command == "GET")
        try:
            if fault is not None and fault.cut_after is None:
                self._send_error(fault.status, fault.message, fault.code, fault.headers)
            else:
                self._route(hub, url.path, request, fault.cut_after if fault else None)
        except ErrorAnswer as error:
            self._send_error(error.status, error.message, error.code)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, hub: Hub, path: str, request: Request, cut_after: int | None) -> None:
        token = request.authorization.removeprefix("Bearer ") if request.authorization else None
        resolve = re.fullmatch(r"/(?:(datasets)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path)
        if resolve and not path.startswith("/api/"):
            kind, repo_id, revision, file = resolve.groups()
            repository = hub._find("dataset" if kind else "model", repo_id, token)
            self._send_file(repository, unquote(revision), unquote(file), token, cut_after)
            return
        tree = re.fullmatch(r"/api/(models|datasets)/(.+?)/tree/([^/]+)(?:/(.+))?", path)
        if tree:
            repository = hub._find(tree[1].removesuffix("s"), tree[2], token)
            self._check_revision(repository, unquote(tree[3]))
            self._send_tree(hub, repository, unquote(tree[4] or ""), path, request.query, cut_after)
            return
        info = re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/revision/([^/]+))?", path)
        if info:
            repository = hub._find(info[1].removesuffix("s"), info[2], token)
            self._check_revision(repository, unquote(info[3] or "main"))
            self._send_json(_repository_info(repository, parse_qs(request.query)), cut_after=cut_after)
            return
        raise ErrorAnswer(404, "Sorry, we can't find the page you are looking for.")

    def _check_revision(self, repository: Repository, revision: str) -> None:
        if revision not in ("main", repository.commit()):
            raise ErrorAnswer(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _send_file(
        self, repository: Repository, revision: str, file: str, token: str | None, cut_after: int | None
    ) -> None:
        name = repository.repo_id
        if repository.gated and token is None:
            raise ErrorAnswer(
                401,
                f"Access to {repository.repo_type} {name} is restricted. You must have access to it and be "
                "authenticated to access it. Please log in.",
                "GatedRepo",
            )
        if repository.gated and token not in repository.licensed:
            raise ErrorAnswer(
                403,
                f"Access to {repository.repo_type} {name} is restricted and you are not in the authorized list. "
                f"Visit https://huggingface.co/{name} to ask for access.",
                "GatedRepo",
            )
        self._check_revision(repository, revision)
        if file not in repository.files:
            raise ErrorAnswer(404, "Entry not found", "EntryNotFound")
        content = repository.content(file)
        headers = {
            "ETag": f'"{repository.blob_id(file)}"',
            "X-Repo-Commit": repository.commit(),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self._send(200, content, headers, cut_after)
            return
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if start >= len(content):
            self._send(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], headers, cut_after)

    def _send_tree(
        self, hub: Hub, repository: Repository, folder: str, path: str, query: str, cut_after: int | None
    ) -> None:
        options = parse_qs(query)
        entries = _tree_entries(repository, folder, options.get("recursive", ["false"])[0].lower() == "true")
        if folder and not entries:
            raise ErrorAnswer(404, f"{folder} does not exist on {quote(repository.repo_id)!r}", "EntryNotFound")
        start = int(options.get("cursor", ["0"])[0])
        headers = {}
        if start + hub.page_size < len(entries):
            kept = re.sub(r"&?cursor=\d+", "", query)
            next_page = f"{hub.url}{path}?{kept}{'&' if kept else ''}cursor={start + hub.page_size}"
            headers["Link"] = f'<{next_page}>; rel="next"'
        self._send_json(entries[start : start + hub.page_size], headers, cut_after)

    def _send_json(self, value: object, headers: Mapping[str, str] | None = None, cut_after: int | None = None) -> None:
        body = json.dumps(value).encode()
        self._send(200, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, cut_after)

    def _send_error(
        self, status: int, message: str | None, code: str | None, headers: Mapping[str, str] | None = None
    ) -> None:
        described = {"X-Error-Code": code, "X-Error-Message": message}
        given = {name: value for name, value in described.items() if value is not None}
        body = json.dumps({"error": message}).encode() if message else b""
        self._send(status, body, {"Content-Type": "application/json; charset=utf-8", **given, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], cut_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut_after is not None and cut_after < len(body):
            self.wfile.write(body[:cut_after])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)
            return
        for start in range(0, len(body), CHUNK):
            self.wfile.write(body[start : start + CHUNK])


def _repository_info(repository: Repository, options: Mapping[str, list[str]]) -> dict[str, object]:
    siblings: list[dict[str, object]] = []
    for path in sorted(repository.files):
        siblings.append({"rfilename": path})
        if options.get("blobs", ["false"])[0].lower() == "true":
            siblings[-1] |= {"size": len(repository.content(path)), "blobId": repository.blob_id(path)}
    return {
        "_id": repository.commit()[:24],
        "id": repository.repo_id,
        "author": repository.repo_id.partition("/")[0],
        "sha": repository.commit(),
        "lastModified": "2024-01-01T00:00:00.000Z",
        "createdAt": "2024-01-01T00:00:00.000Z",
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }


def _tree_entries(repository: Repository, folder: str, recursive: bool) -> list[dict[str, object]]:
    """Files and folders under `folder`; without `recursive`, those right in it."""
    prefix = f"{folder.strip('/')}/" if folder else ""
    entries: dict[str, dict[str, object]] = {}
    for path in sorted(repository.files):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            entries[name] = {
                "type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name,
            }  # fmt: skip
        if recursive or len(parts) == 1:
            size = len(repository.content(path))
            entries[path] = {"type": "file", "oid": repository.blob_id(path), "size": size, "path": path}
    return [entries[path] for path in sorted(entries)]
