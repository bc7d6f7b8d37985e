"""The Hugging Face Hub: its client and store, and URLs with the commit of a revision."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from threading import Lock
from typing import Any, cast

from tiercache.errors import NotFound
from tiercache.model import ByteRange, ObjectInfo
from tiercache.store.access import CallOptions
from tiercache.store.contract import ProcessLocal
from tiercache.store.fsspec import FsspecClient, FsspecStore

# What to do about an error of huggingface_hub, by its class.
_OF_THE_HUB = {
    "GatedRepoError": "accept the conditions of this repository on its page, with the account of the token",
    "RepositoryNotFoundError": (
        "no such repository, or it is private: give a token that may read it, as storage_options={'token': ...}, in "
        "the environment as HF_TOKEN, or by `hf auth login`"
    ),
    "RevisionNotFoundError": "the repository has no branch, tag or commit of this name",
}
_REPOSITORY = len(("hf:", "", "datasets", "owner", "name"))
_COMMIT = re.compile(r"@[0-9a-f]{40}(?=/|$)")


# The files of the last commits that this process has read, by endpoint, token and commit.
_listings: dict[tuple[str, str, str], Mapping[str, Mapping[str, Any]]] = {}
_listings_lock = ProcessLocal(Lock, lambda _lock: None)
_MOST_LISTINGS = 8


class HubClient(FsspecClient):
    """The Hugging Face Hub by its own file system. Files of a commit do not change, so a process lists them once."""

    @property
    def checks_etag(self) -> bool:  # type: ignore[override]
        return _COMMIT.search(self.url) is not None

    def describe(self, fs: Any, path: str) -> Mapping[str, Any]:
        files = self._files(fs, path)
        if files is None:
            return super().describe(fs, path)
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    def describe_below(self, fs: Any, folder: str) -> Mapping[str, Mapping[str, Any]]:
        files = self._files(fs, folder)
        return super().describe_below(fs, folder) if files is None else files

    def _files(self, fs: Any, path: str) -> Mapping[str, Mapping[str, Any]] | None:
        """Return all files of the commit that a path names; None if it names none. The Hub limits such requests."""
        commit = _COMMIT.search(path)
        if commit is None:
            return None
        name = fs.endpoint, str(fs.token), path[: commit.end()]
        with _listings_lock.get():
            if name not in _listings:
                _listings[name] = fs.find(name[-1], detail=True)
                if len(_listings) > _MOST_LISTINGS:
                    del _listings[next(iter(_listings))]
            return _listings[name]

    @contextmanager
    def errors(self, key: str, doing: str) -> Iterator[None]:
        with super().errors(key, doing):
            try:
                yield
            except Exception as error:
                names = [kind.__name__ for one in (error, error.__cause__) for kind in type(one).__mro__]
                known = next((text for name, text in _OF_THE_HUB.items() if name in names), None)
                if known is None:
                    raise
                raise NotFound(known, url=self.url_of(key)) from None

    def range(
        self,
        key: str,
        byte_range: ByteRange,
        if_match: str | None,  # noqa: ARG002 - see checks_etag
    ) -> tuple[ObjectInfo | None, Iterable[memoryview]]:
        fs, path = self.at(key)
        # No bytes beyond the range are read, and no description of the file, whose size is this or more.
        plain = {"cache_type": "none", "size": byte_range.end}
        data = fs.cat_file(path, start=byte_range.start, end=byte_range.end, **plain)
        return None, (memoryview(data),)

    def pinned(self) -> str:
        """Return the URL with the commit that its revision names now."""
        fs, path = self.at("")
        found = fs.resolve_path(path)
        if not hasattr(found, "repo_id"):
            return self.url  # a bucket has no revisions
        api = importlib.import_module("huggingface_hub").HfApi(endpoint=fs.endpoint, token=fs.token)
        commit = api.repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision).sha
        kind = "" if found.repo_type == "model" else f"{found.repo_type}s/"
        return f"hf://{kind}{found.repo_id}@{commit}/{found.path_in_repo}".rstrip("/")


class HubStore(FsspecStore):
    """Files of repositories of the Hub."""

    def _client_type(self) -> type[FsspecClient]:
        return HubClient

    def pinned(self) -> str:
        """Return the URL of a repository of the Hub with the commit that its revision names now. Raises StoreError."""
        return self._read("", "find the commit", lambda client, _attempt: cast("HubClient", client).pinned())


def store_type(url: str) -> type[FsspecStore]:
    """Return the class of the store of a URL that fsspec opens."""
    return HubStore if url.startswith("hf://") else FsspecStore


def pin_revision(url: str, options: Mapping[str, Any]) -> str:
    """Return a URL of the Hugging Face Hub with the commit that its revision names now; other URLs as they are."""
    if not url.startswith("hf://") or _COMMIT.search(url):
        return url
    call, others = CallOptions.take(options)
    with closing(HubStore(url, url, others, call)) as store:
        return store.pinned()


def without_commit(url: str) -> str:
    """Return a URL of the Hub without its commit: the repository, which keeps files from one commit to the next."""
    return _COMMIT.sub("", url) if url.startswith("hf://") else url


def folders_above(url: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders above the URL of a split in a repository of the Hub, and the names below each: two, or one."""
    segments = url.rstrip("/").split("/")
    for n in (2, 1):
        if url.startswith("hf://datasets/") and len(segments) - n >= _REPOSITORY:
            yield "/".join(segments[:-n]), segments[-n:]
