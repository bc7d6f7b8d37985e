"""Symbolic links of a run, which follow the copies that they lead to when a copy leaves a local tier for another.

Lightning's `last.ckpt -> step-2.ckpt` is rewritten to the copy in the other tier, so that it still opens the
checkpoint; a link inside a checkpoint's folder is made again in the other folder. A link within a tier is relative, as
its writer made it; a link into another tier is absolute. No object store can hold a link: a copy that a link needs
stays then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from tiercache.errors import StoreError
from tiercache.store import LocalFolder

if TYPE_CHECKING:
    from tiercache.tier.model import Symlink
    from tiercache.tier.stores import Stores


def carry_links(stores: Stores, path: str, src: str, dst: str, symlinks: Sequence[Symlink]) -> None:
    """Rewrite the links to a group's copy in src, and make the links inside its folder again in dst.

    The caller drops the copy in src afterwards. A link that leads elsewhere by now stays. Every step may be repeated.

    Args:
        stores: Stores of the tiers; src and dst are local folders.
        path: Path of the group.
        src: Name of the tier that the copy leaves.
        dst: Name of the tier that has the other copy.
        symlinks: Links of all local tiers.

    Raises:
        StoreError: A link cannot be written: the copy in src must stay.
    """
    source, target = stores.store(src), stores.store(dst)
    if not isinstance(source, LocalFolder) or not isinstance(target, LocalFolder):
        return
    for link in symlinks:
        folder = stores.store(link.tier)
        is_target = link.target_tier == src and f"{link.target}/".startswith(f"{path}/")
        is_inner = link.tier == src and link.key.startswith(f"{path}/")
        if not isinstance(folder, LocalFolder) or not (is_target or is_inner):
            continue
        before = _path_of(stores, link.target_tier, link.target)
        if folder.link_target(link.key) != before:
            continue
        after = _path_of(stores, dst, link.target) if is_target else before
        if is_inner:
            target.put_link(link.key, _text(target, link.key, after))
        else:
            folder.put_link(link.key, _text(folder, link.key, after))


def remove_inner_links(stores: Stores, path: str, src: str, symlinks: Sequence[Symlink]) -> None:
    """Remove the links inside a group's folder in src, which would keep the empty folder."""
    source = stores.store(src)
    if isinstance(source, LocalFolder):
        for link in symlinks:
            if link.tier == src and link.key.startswith(f"{path}/"):
                with suppress(StoreError):  # only the empty folder stays
                    source.remove_link(link.key)


def _path_of(stores: Stores, tier: str, key: str) -> str:
    store = stores.store(tier)
    if not isinstance(store, LocalFolder):
        raise StoreError("a link leads to a local folder, which this tier is not", url=store.url)
    return os.path.join(os.path.realpath(store.root), key)  # noqa: PTH118 - compared with realpath


def _text(folder: LocalFolder, key: str, path: str) -> str:
    """Return the text of a link: relative if the target lies below the same root."""
    root = os.path.realpath(folder.root)
    if path.startswith(f"{root}/"):
        return os.path.relpath(path, os.path.dirname(f"{root}/{key}"))  # noqa: PTH120 - a text
    return path
