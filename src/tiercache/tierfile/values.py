"""The values of a rule file as they are held: seconds, bytes, shares, tuples. An error says what was expected."""

from __future__ import annotations

import math
import re
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

from tiercache.model import parse_bytes, parse_duration

_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")
_LONGEST_S = 10_000 * 365.0 * 86400.0
_SET = re.compile(r"\[!?\]?[^\]]*\]")  # of a glob: [a-z], [!x], []]


def read_seconds(value: object) -> float:
    """Seconds of "30d", or a number of them. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a duration such as '30d', '12h' or a number of seconds, got {value!r}")
    try:
        seconds = parse_duration(value)
    except OverflowError:  # an integer of hundreds of digits
        seconds = math.inf
    if not 0 <= seconds <= _LONGEST_S:
        raise ValueError(f"a duration has an end, within 10,000 years, and is not negative, got {value!r}")
    return seconds


def read_bytes(value: object) -> int:
    """Bytes of "2TB", or a number of them. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"expected a size such as '64KiB', '2TB' or a number of bytes, got {value!r}")
    return parse_bytes(value)


def read_rate(value: object) -> int:
    """Bytes a second of "200MB/s" or "200MB". Raises ValueError."""
    n_bytes = read_bytes(value.strip().removesuffix("/s") if isinstance(value, str) else value)
    if n_bytes < 1:
        raise ValueError(f"expected 1 byte a second or more, got {value!r}")
    return n_bytes


def read_share(value: object) -> float:
    """0 to 1, of "90%" or 0.9. Raises ValueError."""
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    share = float(match[1]) / 100 if match else value
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"expected a share such as '90%' or 0.9, got {value!r}")
    return float(share)


def read_capacity(value: object) -> str:
    """A size, or a share of a disk, as it is written. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"expected a size such as '2TB' or a share of the disk such as '80%', got {value!r}")
    parse_bytes(value, whole_bytes=1)
    return str(value)


def read_texts(value: object) -> tuple[str, ...]:
    """A text or a list of them. Raises ValueError."""
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"expected a text or a list of texts, none of them empty, got {value!r}")
    return tuple(texts)


def some(values: tuple[str, ...]) -> tuple[str, ...]:
    """The values, if there are any. Raises ValueError."""
    if not values:
        raise ValueError("expected one or more, got an empty list")
    return values


def read_globs(value: object) -> tuple[str, ...]:
    """A glob or a list of them. Raises ValueError for what can match no path."""
    globs = read_texts(value)
    for glob in globs:
        if glob.startswith("/") or "//" in glob or "\\" in glob:
            raise ValueError(
                f"a glob is of paths below a tier's URL: no '/' at its start, no '//' and no '\\', got {glob!r}"
            )
        plain = _SET.sub("", glob)
        if "[" in plain or plain.count("{") != plain.count("}"):
            raise ValueError(f"a '[' or '{{' is not closed in {glob!r}")
    return globs


def read_moment(value: object) -> float:
    """Seconds since the epoch of a time, or of the end of a date; UTC where no offset is given. Raises ValueError."""
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
    """A path of a text, "~" being home; what is none is left to be refused."""
    return Path(value).expanduser() if isinstance(value, str) and value else value
