"""After a round: the folder as it lies, the next process, which gets no help, and the folder again."""

import random
from pathlib import Path

from tests.stress.jobs import Job, read_object
from tests.stress.scene import OBJECTS, Model, Scene
from tests.support.folder_check import FolderCheck
from tests.support.forks import run_forked

FOREIGN = {"README-mine.txt": b"mine", "copies/notes.txt": b"mine too", "locks.txt": b"also mine"}
DEADLINE_S = 120.0


class Inspection:
    """Looks at one scene between rounds. model: what has been promised."""

    def __init__(self, scene: Scene, model: Model, seed: int) -> None:
        self.scene, self.model = scene, model
        self.random = random.Random(seed)

    def plant(self) -> None:
        """Lay files that are not the cache's into its folder, if there is one, unless they are there."""
        if not self.model.foreign and (self.scene.cache_root / "copies").is_dir():
            for file, data in FOREIGN.items():
                (self.scene.cache_root / file).write_bytes(data)
            self.model.foreign = dict(FOREIGN)

    def problems(self) -> list[str]:
        """What is wrong now, and what the next process cannot put right."""
        found = []
        look = FolderCheck(self.scene.cache_root, self.model.expected())
        found += [f"as it lies: {problem}" for problem in look.crash_problems()]
        seed = self.random.random()
        ended = run_forked(lambda tell: self.use(tell, seed), deadline_s=DEADLINE_S)
        if not ended.hung:
            self.model.take_in(ended.lines)
        if ended.code:
            found.append(f"the next process {'hung' if ended.hung else 'failed'}: {ended.error}")
        look = FolderCheck(self.scene.cache_root, self.model.expected())
        found += [f"after the next process: {problem}" for problem in look.problems()]
        found += [
            f"the copy {name[:8]} was there, and nobody dropped it" for name in self.model.have if self.lacks(name)
        ]
        self.model.settle({path.stem for path in (self.scene.cache_root / "copies").glob("*.pin")})
        return found

    def lacks(self, name: str) -> bool:
        copies: Path = self.scene.cache_root / "copies"
        return not (copies / name).is_file() and not (copies / f"{name}.part").is_file()

    def use(self, tell, seed: float) -> None:
        """Open the cache as it is, read everything, and let go of a pin now and then."""
        job = Job(self.scene, tell, random.Random(seed))
        with self.scene.cache() as cache:
            store = cache.store(self.scene.source)
            for key, name in self.scene.names.items():
                if name in self.model.rotten:
                    store.remove_if_corrupt(key, self.scene.identity(key))  # as a reader does whose checks fail
                job.read_whole(store, key)
            for key in OBJECTS:
                read_object(job, store, key)
            stats = cache.stats()
            assert stats["bytes_used"] <= stats["limit_bytes"], stats
            for entry in cache.entries():
                if entry.pinned and job.random.random() < 0.3:
                    tell(f"unpinning {entry.name}")
                    cache.unpin([entry.name])
                    tell(f"unpinned {entry.name}")
