"""Ordering of numbered parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def parts_in_order(parts: Mapping[int, T], key: str) -> list[T]:
    """Return the parts in the order of their numbers.

    Raises:
        ValueError: A number is missing.
    """
    missing = [number for number in range(len(parts)) if number not in parts]
    if missing:
        raise ValueError(f"{key}: part {missing[0]} is missing; parts are numbered 0, 1, 2, ... without gaps")
    return [parts[number] for number in range(len(parts))]
