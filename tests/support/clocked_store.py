"""A store whose clock stands still until a test moves it."""

from dataclasses import replace
from typing import ClassVar

from tiercache.store import MemoryStore


class ClockedStore(MemoryStore):
    """Objects in memory that were written at `now_s`, which all stores of one name share."""

    clocks: ClassVar[dict[str, float]] = {}

    @property
    def now_s(self) -> float:
        return self.clocks.setdefault(self.name, 1e9)

    def advance(self, duration_s: float) -> None:
        self.clocks[self.name] = self.now_s + duration_s

    def _new_object(self, key, data):
        data, info = super()._new_object(key, data)
        return data, replace(info, modified_s=self.now_s)
