"""Converts values of a rule file to seconds, bytes, fractions and tuples; each ValueError says what was expected."""

from __future__ import annotations

import math
import re
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

from tiercache.model import parse_bytes, parse_duration

_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")
_LONGEST_S = 10_000 * 365.0 * 86400.0
_SET = re.compile(r"\[!?\]?[^\]]*\]")  # a character class of a glob: [a-z], [!x], []]


def read_seconds(value: object) -> float:
    """Return the seconds of a duration such as "30d", or of a number of seconds. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a duration such as '30d', '12h' or a number of seconds, got {value!r}")
    try:
        seconds = parse_duration(value)
    except OverflowError:  # an integer of hundreds of digits
        seconds = math.inf
    if not 0 <= seconds <= _LONGEST_S:
        raise ValueError(f"expected a duration from 0 to 10,000 years, got {value!r}")
    return seconds


def read_bytes(value: object) -> int:
    """Return the bytes of a size such as "2TB", or of a number of bytes. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"expected a size such as '64KiB', '2TB' or a number of bytes, got {value!r}")
    return parse_bytes(value)


def read_rate(value: object) -> int:
    """Return the bytes per second of "200MB/s" or "200MB". Raises ValueError."""
    n_bytes = read_bytes(value.strip().removesuffix("/s") if isinstance(value, str) else value)
    if n_bytes < 1:
        raise ValueError(f"expected a rate of at least 1 byte per second, got {value!r}")
    return n_bytes


def read_fraction(value: object) -> float:
    """Return the fraction, 0 to 1, of "90%" or 0.9. Raises ValueError."""
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    share = float(match[1]) / 100 if match else value
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"expected a fraction such as '90%' or 0.9, got {value!r}")
    return float(share)


def read_capacity(value: object) -> str:
    """Return a size, or a percentage of a disk, as it is written in the file. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"expected a size such as '2TB' or a percentage of the disk such as '80%', got {value!r}")
    parse_bytes(value, whole_bytes=1)
    return str(value)


def read_texts(value: object) -> tuple[str, ...]:
    """Return a string, or a list of strings, as a tuple. Raises ValueError."""
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"expected a string or a list of strings, none of them empty, got {value!r}")
    return tuple(texts)


def require_values(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the values. Raises ValueError if there are none."""
    if not values:
        raise ValueError("expected one or more values, got an empty list")
    return values


def read_globs(value: object) -> tuple[str, ...]:
    """Return a glob, or a list of globs, as a tuple. Raises ValueError for a glob that cannot match any path."""
    globs = read_texts(value)
    for glob in globs:
        if glob.startswith("/") or "//" in glob or "\\" in glob:
            raise ValueError(
                f"a glob matches paths below a tier's URL: no '/' at its start, no '//' and no '\\', got {glob!r}"
            )
        plain = _SET.sub("", glob)
        if "[" in plain or plain.count("{") != plain.count("}"):
            raise ValueError(f"'[' or '{{' is not closed in {glob!r}")
    return globs


def read_moment(value: object) -> float:
    """Return the seconds since the epoch of a time, or of the end of a date.

    A time without an offset is in UTC. Raises ValueError.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LONGEST_S:
        return float(value)
    found = _from_text(value) if isinstance(value, str) else value
    if isinstance(found, date) and not isinstance(found, datetime):
        return datetime.combine(found, time(), UTC).timestamp() + timedelta(days=1).total_seconds()
    if not isinstance(found, datetime):
        raise ValueError(f"expected a date or time such as 2027-06-30 or 2027-06-30T12:00:00Z, got {value!r}")
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _from_text(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if len(text) == len("2027-06-30") else datetime.fromisoformat(text)
    except ValueError:
        return None


def read_path(value: object) -> object:
    """Return a string as a path, with "~" expanded; pydantic rejects other values."""
    return Path(value).expanduser() if isinstance(value, str) and value else value
