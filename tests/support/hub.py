"""The endpoint of the Hugging Face Hub on loopback, as far as huggingface_hub asks it for data sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.http_server import HttpFault, HttpFaultServer


class Hub:
    """Repositories of data sets. push() makes commits; a repository with a token is private.

    heads: The commit of each branch by (repository, branch). faults: Of the next
    requests, the last one first. `with Hub() as hub:` serves hub.url, for HF_ENDPOINT.
    """

    def __init__(self) -> None:
        self.server = HttpFaultServer({})
        self.heads: dict[tuple[str, str], str] = {}
        self._commits: dict[tuple[str, str], Mapping[str, bytes]] = {}
        self.tokens: dict[str, str] = {}
        self.faults: list[HttpFault] = []

    def __enter__(self) -> Hub:
        self.server.__enter__()
        self.server.admit(self._answer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.__exit__(kind, error, trace)

    @property
    def url(self) -> str:
        return self.server.url

    def push(self, repository: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make a commit with these files, and return it."""
        content = json.dumps({path: _oid(data) for path, data in files.items()}) + repository
        commit = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        self._commits[repository, commit] = dict(files)
        self.heads[repository, branch] = commit
        for path, data in files.items():
            self.server.objects[f"datasets/{repository}/resolve/{commit}/{path}"] = data
        return commit

    def requests(self, part: str) -> list[str]:
        """Return the paths of the requests that contain this text."""
        return [seen.path for seen in self.server.log if part in seen.path]

    def _answer(self, path: str, headers: Mapping[str, str]) -> HttpFault | None:
        if self.faults:
            return self.faults.pop()
        segments = [unquote(one) for one in urlsplit(path).path.strip("/").split("/")]
        is_api = segments[0] == "api"
        repository = "/".join(segments[1 + is_api : 3 + is_api])
        if not any(repository == one for one, _ in self.heads) or (
            repository in self.tokens and headers.get("authorization") != f"Bearer {self.tokens[repository]}"
        ):
            return _failure(401, "RepoNotFound")
        if not is_api:
            commit = self.heads.get((repository, segments[4]), segments[4])
            data = self._commits.get((repository, commit), {}).get("/".join(segments[5:]))
            if data is None:
                return _failure(404, "EntryNotFound")
            if "range" in headers:
                return None  # the server has the files of a commit
            header = (("ETag", f'"{_oid(data)}"'), ("X-Repo-Commit", commit))
            return HttpFault("status", status=200, body=data, header=header)
        verb, revision, inside = (segments[4:5] or ["revision"])[0], (segments[5:6] or ["main"])[0], segments[6:]
        commit = self.heads.get((repository, revision), revision)
        if (repository, commit) not in self._commits:
            return _failure(404, "RevisionNotFound")
        if verb == "revision":
            return _json({"id": repository, "sha": commit, "siblings": [], "private": False, "tags": []})
        recursive = "recursive=true" in path.lower()
        entries = _entries(self._commits[repository, commit], "".join(f"{one}/" for one in inside), recursive)
        return _json(entries) if entries else _failure(404, "EntryNotFound")


def _entries(files: Mapping[str, bytes], prefix: str, recursive: bool) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path, data in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.split("/")
        for n in range(prefix.count("/") + 1, len(parts)):
            folder = "/".join(parts[:n])
            found[folder] = {"type": "directory", "oid": _oid(folder.encode()), "size": 0, "path": folder}
        found[path] = {"type": "file", "oid": _oid(data), "size": len(data), "path": path}
    depth = prefix.count("/")
    return [one for one in found.values() if recursive or one["path"].count("/") == depth]


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _json(body: object) -> HttpFault:
    header = (("Content-Type", "application/json"),)
    return HttpFault("status", status=200, body=json.dumps(body).encode(), header=header)


def _failure(status: int, code: str) -> HttpFault:
    return HttpFault("status", status=status, body=b"{}", header=(("X-Error-Code", code),))
