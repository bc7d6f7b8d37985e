"""A device mesh without processes."""

from __future__ import annotations

from itertools import product
from math import prod


class FakeMesh:
    """A DeviceMesh over ranks 0 to n as one of its ranks sees it, as far as it communicates with nobody."""

    def __init__(self, sizes: dict[str, int], rank: int) -> None:
        self.mesh_dim_names = tuple(sizes)
        self._sizes = tuple(sizes.values())
        self._rank = rank

    def get_rank(self) -> int:
        return self._rank

    def get_coordinate(self) -> list[int] | None:
        coordinates = list(product(*map(range, self._sizes)))
        return list(coordinates[self._rank]) if self._rank < len(coordinates) else None

    def size(self, dim: int | None = None) -> int:
        return prod(self._sizes) if dim is None else self._sizes[dim]
