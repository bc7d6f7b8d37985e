from typing import final

import numpy as np
from numpy.typing import NDArray

MAX_N: int

def permute(key: tuple[int, int] | bytes, n: int, start: int, out: NDArray[np.uint64]) -> None: ...
def permute_at(key: tuple[int, int] | bytes, n: int, positions: NDArray[np.int64], out: NDArray[np.int64]) -> None: ...
def permute_one(key: tuple[int, int] | bytes, n: int, position: int) -> int: ...
def invert_one(key: tuple[int, int] | bytes, n: int, record: int) -> int: ...

@final
class RowFinder:
    n_rows: int
    n_blocks: int
    def __new__(
        cls, first: NDArray[np.int64], key: tuple[int, int] | bytes | None, row_start: NDArray[np.uint32] | None = None
    ) -> RowFinder: ...
    def find(self, start: int, block: NDArray[np.uint32], row: NDArray[np.uint32]) -> None: ...
