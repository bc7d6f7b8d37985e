"""Compatibility of files and releases: format number, features by name, and the first release that supports a file.

Format 1 is frozen. Older releases ignore what later ones add (unknown keys, sections, columns); if they must not ignore
an addition, the file names a feature, and a reader without the feature raises an error that names the required release.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tiercache.errors import UnsupportedFormat
from tiercache.version import __version__

FORMAT_VERSION = 1
SOFTWARE = f"tiercache {__version__}"
# First release that reads the files that this one writes: (major, minor).
RELEASE = (0, 1)
RELEASE_TEXT = "{}.{}".format(*RELEASE)
# Features that this release supports: names in version files, bits in shards.
FEATURES: frozenset[str] = frozenset()
SHARD_FEATURES = 0


def check_format(found: int, release: str, *, what: str, url: str) -> None:
    """Check that this release reads the format.

    Args:
        found: Number of the format in the file.
        release: First release that reads the format; "" if unknown.
        what: "shard" or "data set", for the message.
        url: URL of the file, for errors.

    Raises:
        UnsupportedFormat: This release does not read the format.
    """
    if found == FORMAT_VERSION:
        return
    if found < FORMAT_VERSION:
        raise _unsupported(
            f"the {what} has format {found} of a build before the first release, which no release reads: pack the data "
            "again from its source, or read it with the build that wrote it and pack the result",
            url=url,
            found=found,
        )
    raise _unsupported(f"the {what} has format {found}, which {_who(release)}", url=url, found=found, release=release)


def check_features(needed: Collection[str], release: str, *, what: str, url: str, doing: str = "reading") -> None:
    """Check that this release has every feature that an operation on a shard or data set needs.

    Args:
        needed: Names of the needed features.
        release: First release that has the features; "" if unknown.
        what: "shard" or "data set", for the message.
        url: URL of the shard or data set, for errors.
        doing: The operation, for the message.

    Raises:
        UnsupportedFormat: Features are missing; .needs lists them.
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
    """Return names for the feature bits in a shard's tail that this release does not support."""
    unknown = bits & ~SHARD_FEATURES
    return [f"feature bit {bit}" for bit in range(unknown.bit_length()) if unknown >> bit & 1]


def _who(release: str) -> str:
    newer = f"tiercache {release} and later know" if release else "a later tiercache knows"
    return f"{newer}; this is {__version__}: pip install -U tiercache"


def _unsupported(message: str, *, url: str, found: int = FORMAT_VERSION, **facts: Any) -> UnsupportedFormat:
    return UnsupportedFormat(message, url=url, found=found, supported=FORMAT_VERSION, **facts)
