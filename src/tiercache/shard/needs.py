"""What a file says that its reader must know: the number of its format, features by name, and the release with both.

Version 1 is frozen. What later releases add, older ones either pass by (unknown keys, sections, columns) or must not:
then the file names a feature here, and a reader that has not heard of it says which release has.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tiercache.errors import UnsupportedFormat
from tiercache.version import __version__

FORMAT_VERSION = 1
SOFTWARE = f"tiercache {__version__}"
# The first release that reads what this one writes: (major, minor).
RELEASE = (0, 1)
RELEASE_TEXT = "{}.{}".format(*RELEASE)
# Features that a file may demand and this release has, by the names of version files; those of shards are bits.
FEATURES: frozenset[str] = frozenset()
SHARD_FEATURES = 0


def check_format(found: int, release: str, *, what: str, url: str) -> None:
    """See that this release reads the format. what: "shard" or "data set"; release: the first that does, "" if unknown.

    Raises:
        UnsupportedFormat: it does not.
    """
    if found == FORMAT_VERSION:
        return
    if found < FORMAT_VERSION:
        raise _unsupported(
            f"the {what} has format {found}, of builds before the first release, which no release reads: pack the data "
            "again from its source (or read it with the build that wrote it, and pack that)",
            url=url,
            found=found,
        )
    raise _unsupported(f"the {what} has format {found}, which {_who(release)}", url=url, found=found, release=release)


def check_features(needed: Collection[str], release: str, *, what: str, url: str, doing: str = "reading") -> None:
    """See that this release has every feature that is needed for what is to be done with the shard or data set at url.

    Raises:
        UnsupportedFormat: it has not; .needs names those that are missing.
    """
    missing = tuple(sorted(set(needed) - FEATURES))
    if missing:
        raise _unsupported(
            f"{doing} this {what} needs {', '.join(missing)}, which {_who(release)}",
            url=url,
            release=release,
            needs=missing,
        )


def names_of_bits(bits: int) -> list[str]:
    """Names of the features in a shard's tail that this release has not."""
    unknown = bits & ~SHARD_FEATURES
    return [f"feature bit {bit}" for bit in range(unknown.bit_length()) if unknown >> bit & 1]


def _who(release: str) -> str:
    newer = f"tiercache {release} and later know" if release else "a later tiercache knows"
    return f"{newer}; this is {__version__}: pip install -U tiercache"


def _unsupported(message: str, *, url: str, found: int = FORMAT_VERSION, **facts: Any) -> UnsupportedFormat:
    return UnsupportedFormat(message, url=url, found=found, supported=FORMAT_VERSION, **facts)
