"""What Ctrl-C strikes, and what must be true after it: chapters of a cache, verbs and loops."""

from __future__ import annotations

import gc
import os
import shutil
from abc import ABC, abstractmethod
from contextlib import closing
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tests.stress.errno_rounds import copy_sparse
from tests.stress.inspection import Inspection
from tests.stress.jobs import change_heads
from tests.stress.scene import Model, Scene
from tests.support.forks import run_forked
from tests.support.interrupts import DROPPED, RAISED, Interrupted, Lines, interrupted, lines_of
from tests.support.records import SCHEMA, ids_of, make_columns

import tiercache as tc
from tiercache.cli.app import app as command
from tiercache.shard.versions import find_latest
from tiercache.store import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.stress.life import Chapter
    from tests.support.forks import ChildEnd, SendLine

DEADLINE_S = 60.0
SAID = "tiercache: interrupted: "


class Life(ABC):
    """Work in a folder of its own that can be interrupted again and again. Problems are texts."""

    name: str
    then: Callable[[SendLine], object] | None = None
    """What the same process does after it."""

    @abstractmethod
    def lay(self) -> None:
        """Bring the folder to where it was before."""

    @abstractmethod
    def work(self, tell: SendLine) -> None:
        """What is interrupted."""

    @abstractmethod
    def look(self, done: Interrupted) -> Iterator[str]:
        """What is wrong afterwards."""

    def learn(self) -> Lines:
        """The lines that it comes to."""
        self.lay()
        return lines_of(self.work, deadline_s=DEADLINE_S)

    def interrupt(self, nth: int) -> Interrupted:
        """Do it, interrupted at its nth line."""
        self.lay()
        return interrupted(self.work, nth, then=self.then, deadline_s=DEADLINE_S)


def fault_of(ended: ChildEnd, what: str) -> list[str]:
    """What is wrong with how a child ended."""
    return [f"{what} {'hung' if ended.hung else 'failed'}: {ended.error}"] if ended.code else []


def asked(question: Callable[[], Iterable[str]]) -> list[str]:
    """What a child answers, and what is wrong with its end: whoever looks at data sets may start threads."""
    ended = run_forked(lambda tell: [tell(answer) for answer in question()], deadline_s=DEADLINE_S)
    return [*fault_of(ended, "a look"), *ended.lines]


class CacheLife(Life):
    """A chapter of a cache's life; the same process lives it once more, to its end."""

    def __init__(self, root: Path, chapter: Chapter) -> None:
        self.name, self._chapter = f"cache {chapter.work.__name__}", chapter
        self._scene, self._before = Scene(root), root / "before"

    @cached_property
    def _is_ready(self) -> bool:
        prepare = self._chapter.prepare
        if prepare is not None:
            ended = run_forked(lambda _tell: prepare(self._scene), deadline_s=DEADLINE_S)
            assert not ended.code, ended.error
            copy_sparse(self._scene.cache_root, self._before)
        return prepare is not None

    def lay(self) -> None:
        is_ready = self._is_ready
        shutil.rmtree(self._scene.cache_root, ignore_errors=True)
        if is_ready:
            copy_sparse(self._before, self._scene.cache_root)
            change_heads(self._scene.cache_root)

    def work(self, tell: SendLine) -> None:
        self._chapter.work(self._scene, tell)

    def then(self, tell: SendLine) -> None:
        gc.collect()
        self._chapter.work(self._scene, tell)

    def look(self, done: Interrupted) -> Iterator[str]:
        yield from fault_of(done.ended, "it")
        scene = self._scene
        model = Model({scene.names[key]: scene.data[key] for key in scene.names})
        if not done.ended.hung:
            model.take_in(done.ended.lines)
        model.have.clear()  # it may have been interrupted before it had anything
        yield from Inspection(scene, model, seed=1).problems()


class VerbLife(Life):
    """A verb of the command: it ends with 130 and one line that is true; the same command goes on from there.

    arguments: of the verb, where {root} is the folder that it works in; prepare: makes what must be there before.
    """

    def __init__(self, root: Path, arguments: list[str], prepare: Callable[[Path], object]) -> None:
        self.name = f"verb {' '.join(word for word in arguments if '{' not in word)}"
        self._root, self._prepare = root, prepare
        self._arguments = [word.format(root=root / "here") for word in arguments]

    @cached_property
    def _is_ready(self) -> bool:
        kept = self._root / "kept"
        kept.mkdir(parents=True)
        ended = run_forked(lambda _tell: self._prepare(kept), deadline_s=DEADLINE_S)
        assert not ended.code, ended.error
        return True

    def lay(self) -> None:
        assert self._is_ready
        shutil.rmtree(self._root / "here", ignore_errors=True)
        copy_sparse(self._root / "kept", self._root / "here")

    def work(self, tell: SendLine) -> None:
        with (self._root / "said").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                command(self._arguments)
            except SystemExit as end:
                tell(f"code {end.code}")

    def look(self, done: Interrupted) -> Iterator[str]:
        yield from fault_of(done.ended, "it")
        said = (self._root / "said").read_text()
        code = int(done.ended.lines[-1].removeprefix("code ")) if done.ended.lines else None
        if code == 0 and "Exception ignored in" in said:
            return  # Python drops what rises out of __del__
        if code == 130 and not said and done.where.startswith(("cli/app.py", "cli/common.py")):
            return  # the verb had not begun
        last = (said.splitlines() or [""])[-1]  # before it, what it did: it may have been closing when it was struck
        if code != 130 or not last.startswith(SAID) or said.count(SAID) != 1 or "Traceback" in said:
            yield f"it ended with {code} and said {said!r}"
        yield from asked(lambda: self.left(last.removeprefix(SAID)))
        if "over" not in asked(lambda: ["over"] if self.is_over() else []):
            again = run_forked(self.work, deadline_s=DEADLINE_S)
            if again.code or again.lines != ("code 0",):
                yield f"the same command: {again}, and said {(self._root / 'said').read_text()!r}"
        yield from asked(self.wrong)

    @property
    def here(self) -> Path:
        """The folder that the verb works in."""
        return self._root / "here"

    def left(self, said: str) -> Iterator[str]:
        """What is wrong with what the interrupted one has left, said being true."""
        yield from ()

    def is_over(self) -> bool:
        """Whether what was interrupted had done its work, so that it must not be done again."""
        return False

    def wrong(self) -> Iterator[str]:
        """What is wrong in the end."""
        yield from ()


N_PACKED = 300


def write_source(here: Path) -> None:
    """Lines of JSON to be packed."""
    (here / "in.jsonl").write_text("".join(f'{{"x": {i}}}\n' for i in range(N_PACKED)))


def write_set(here: Path) -> None:
    """The same, and packed once."""
    write_source(here)
    with tc.Writer(here / "out", schema={"x": "int64"}, shard_size="1KiB") as writer:
        writer.write_batch({"x": list(range(N_PACKED))})


def write_cached(here: Path) -> None:
    """A packed one, of which a copy of each shard is in a cache."""
    write_set(here)
    assert cached_values(here) == list(range(N_PACKED))


def cached_values(here: Path) -> list[int]:
    """All records, read through the cache."""
    with tc.Cache(here / "cache", size="50MB") as cache, closing(tc.Dataset(here / "out", cache=cache)) as data:
        return data[:]["x"].tolist()


class PackLife(VerbLife):
    """pack: before it is committed nothing is left; records are there once."""

    def __init__(self, root: Path, mode: str, n_before: int) -> None:
        arguments = ["pack", "{root}/in.jsonl", "{root}/out", "--shard-size", "1KiB", "--mode", mode]
        super().__init__(root, arguments, write_set if n_before else write_source)
        self._n_before = n_before

    def _n_records(self) -> int:
        with closing(open_store(self.here / "out")) as store:
            version = find_latest(store)
        return 0 if version is None else version.n_records

    def left(self, said: str) -> Iterator[str]:
        is_committed, is_unknown = self._n_records() != self._n_before, "check whether the version exists" in said
        if is_committed and not is_unknown and "is committed" not in said:
            yield f"it was committed, and it said {said!r}"
        files = [path for path in (self.here / "out").rglob("*") if path.is_file()]
        if not is_committed and not is_unknown and len(files) != self._n_files:
            yield f"{len(files)} files, {self._n_files} before"

    @cached_property
    def _n_files(self) -> int:
        return sum(path.is_file() for path in (self._root / "kept" / "out").rglob("*"))

    def is_over(self) -> bool:
        return self._n_records() != self._n_before

    def wrong(self) -> Iterator[str]:
        with closing(tc.Dataset(self.here / "out")) as data:
            found = data[:]["x"].tolist()
        expected = list(range(N_PACKED)) * (1 + self._n_before // N_PACKED)
        if found != expected:
            yield f"{len(found)} records instead of {len(expected)}, or others"


class CachedLife(VerbLife):
    """A verb that works on a cache: what is read through it is right, whatever was interrupted."""

    def wrong(self) -> Iterator[str]:
        if cached_values(self.here) != list(range(N_PACKED)):
            yield "records are wrong"


class LoopLife(Life):
    """A loop over batches: who goes on, by the iterator or by the state, gets what was not served, nothing twice.

    One batch may be lost: it was taken, and had not come into the loop, when Ctrl-C struck.
    """

    N_RECORDS = 90
    BATCH = 8

    def __init__(self, root: Path, *, by_state: bool, cached: bool) -> None:
        self.name = f"loop, on by {'state' if by_state else 'iterator'}{', cached' if cached else ''}"
        self._root, self._by_state, self._cached = root, by_state, cached

    def lay(self) -> None:
        import_module("tiercache.load.engine")  # torch, once in the warm parent: two seconds in each child
        if not self._root.exists():
            self._root.mkdir(parents=True)
            with tc.Writer(self._root / "set", schema=SCHEMA, shard_size="4KiB", block_size="1KiB") as writer:
                writer.write_batch(make_columns(self.N_RECORDS))
        shutil.rmtree(self._root / "cache", ignore_errors=True)
        self._loader: tc.DataLoader | None = None
        self._iterator: Iterator | None = None
        self._served: list[list[int]] = []

    def _make(self) -> tc.DataLoader:
        cache = tc.Cache(self._root / "cache", size="50MB") if self._cached else None
        dataset = tc.Dataset(self._root / "set", cache=cache)
        options = tc.LoaderOptions(seed=5, shuffle_group_bytes="16KiB", shuffle_window_bytes="4KiB")
        return tc.DataLoader(dataset, batch_size=self.BATCH, shuffle=True, options=options)

    @cached_property
    def _expected(self) -> list[list[int]]:
        loader = self._make()
        epochs = ids_of(loader) + ids_of(loader)
        loader.dataset.close()
        return epochs

    def work(self, tell: SendLine) -> None:
        self._loader = self._make()
        self._iterator = iter(self._loader)
        for batch in self._iterator:
            self._served.append(batch["id"].tolist())

    def then(self, tell: SendLine) -> None:
        if self._loader is None:
            return
        served = list(self._served)
        if self._by_state:
            again = self._make()
            again.load_state_dict(self._loader.state_dict())
            rest = ids_of(again)
            again.dataset.close()
        else:
            rest = ids_of(self._loader if self._iterator is None else self._iterator)
        self._loader.dataset.close()
        found = served + rest
        all_of_it = self._expected
        n = len(served)
        one_epoch = len(all_of_it) // 2
        right = [all_of_it[:one_epoch], all_of_it[:n] + all_of_it[n + 1 : one_epoch], all_of_it]
        right.append(all_of_it[: one_epoch - 1] + all_of_it[one_epoch:])
        assert found in right, f"served {served}, then {rest}"

    def look(self, done: Interrupted) -> Iterator[str]:
        yield from fault_of(done.ended, "it")
        if done.where and done.outcome not in (RAISED, DROPPED):
            yield f"the interrupt was {done.outcome}"
