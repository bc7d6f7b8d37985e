"""A plain packer, one piece at a time: what packed rows must be. It has no code in common with csrc/packing.c."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

IGNORED = -100


@dataclass
class Plain:
    """Arguments of the packer."""

    length: int
    mode: str = "concatenate"
    end: int | None = None
    pad: int = 0
    mask_borders: bool = False

    def rows(self, documents: list[list[int]]) -> list[Row]:
        """The rows of one unit."""
        return {"concatenate": self._in_turn, "separate": self._in_turn, "best_fit": self._best}[self.mode](documents)

    def _cut(self, rest: Rest, room: int) -> Piece:
        """The next piece of a document in a row that has this room."""
        n = min(len(rest.tokens), room)
        tokens, rest.tokens = rest.tokens[:n], rest.tokens[n:]
        ends = rest.ends and not rest.tokens and n < room
        rest.ends = rest.ends and not ends
        following = rest.tokens[0] if rest.tokens else self.end if rest.ends else None
        return Piece([*tokens, self.end] if ends else tokens, following)

    def _size(self, rest: Rest) -> int:
        return len(rest.tokens) + rest.ends

    def _rests(self, documents: list[list[int]]) -> list[Rest]:
        return [Rest(list(d), self.end is not None) for d in documents]

    def _in_turn(self, documents: list[list[int]]) -> list[Row]:
        rows: list[list[Piece]] = []
        room = 0
        for rest in self._rests(documents):
            if self.mode == "separate":
                room = 0
            while rest.tokens or rest.ends:
                if not room:
                    rows.append([])
                    room = self.length
                rows[-1].append(self._cut(rest, room))
                room -= rows[-1][-1].size
        return self._written(rows)

    def _best(self, documents: list[list[int]]) -> list[Row]:
        full, shared, rests = [], [], self._rests(documents)
        for rest in rests:
            while self._size(rest) > self.length:
                full.append([self._cut(rest, self.length)])
        of_size = sorted(
            (i for i, rest in enumerate(rests) if self._size(rest)), key=lambda i: (-self._size(rests[i]), i)
        )
        for change, i in enumerate(of_size):
            size = self._size(rests[i])
            fitting = [row for row in shared if row["room"] >= size]
            if not fitting:
                shared.append({"room": self.length, "documents": []})
                fitting = shared[-1:]
            row = min(fitting, key=lambda row: (row["room"], -row.get("changed", -1)))  # of equal ones the last changed
            row["documents"].append(i)
            row["room"] -= size
            row["changed"] = change
        return self._written(
            [*full, *([self._cut(rests[i], self.length) for i in sorted(r["documents"])] for r in shared)]
        )

    def _written(self, rows: list[list[Piece]]) -> list[Row]:
        written = []
        for pieces in rows:
            row = Row(self.length, self.pad)
            for at, piece in enumerate(pieces):
                last = piece.following
                if last is None:
                    last = IGNORED if at + 1 == len(pieces) or self.mask_borders else pieces[at + 1].tokens[0]
                row.add(piece.tokens, [*piece.tokens[1:], last], at)
            row.close()
            written.append(row)
        return written


@dataclass
class Rest:
    """The tokens of a document that are not packed yet."""

    tokens: list[int]
    ends: bool


@dataclass
class Piece:
    """A piece of a document. following: the document's next token, if it is in a later row."""

    tokens: list[int]
    following: int | None

    @property
    def size(self) -> int:
        return len(self.tokens)


@dataclass
class Row:
    """A row, built piece by piece."""

    length: int
    pad: int
    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    document_ids: list[int] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])

    def add(self, tokens: list[int], labels: list[int], number: int) -> None:
        self.tokens += tokens
        self.labels += labels
        self.position_ids += range(len(tokens))
        self.document_ids += [number] * len(tokens)
        self.bounds.append(len(self.tokens))

    def close(self) -> None:
        n = self.length - len(self.tokens)
        self.add([self.pad] * n, [IGNORED] * n, -1)
        if not n:
            self.bounds.pop()

    def as_record(self, column: str) -> dict[str, Any]:
        """The row as a record of a packed data set."""
        names = {column: "tokens", "labels": "labels", "position_ids": "position_ids", "document_ids": "document_ids"}
        record: dict[str, Any] = {name: np.array(getattr(self, own), np.int64) for name, own in names.items()}
        return {**record, "cu_seqlens": np.array(self.bounds, np.int32)}
