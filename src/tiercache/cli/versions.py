"""The verbs for the versions of a data set: versions and tag."""

from __future__ import annotations

from typing import Annotated

from tiercache.cli.common import (
    Output,
    StorageOptions,
    Url,
    VersionNumber,
    argument,
    count,
    flag,
    verb,
)
from tiercache.cli.data import open_data_set_store, version_facts
from tiercache.model import format_bytes
from tiercache.shard.versions import delete_tag, put_tag, read_versions


@verb(after_ctrl_c="nothing was changed; run the same command again")
def versions(output: Output, url: Url, storage_option: StorageOptions = None) -> None:
    """List the versions of a data set, with their tags."""
    with open_data_set_store(url, storage_option) as store:
        found = read_versions(store)
    texts = [
        {
            "version": str(v.number),
            "kind": v.kind,
            "created": v.created,
            "records": f"{v.n_records:,}",
            "shards": f"{v.n_shards:,}",
            "size": format_bytes(v.n_bytes),
            "tags": ", ".join(v.tags),
        }
        for v in found
    ]
    output.table("version", [version_facts(v) | {"tags": list(v.tags)} for v in found], texts)
    output.summary({"versions": len(found)}, count(len(found), "version"))


@verb(after_ctrl_c="run `tiercache versions` to see whether the tag was changed")
def tag(
    output: Output,
    url: Url,
    name: Annotated[str, argument("NAME", "Name of the tag: letters, digits, '.', '_' and '-'; not a number.")],
    at: VersionNumber = None,
    replace: Annotated[bool, flag("--replace", "Move a tag that names another version.")] = False,
    delete: Annotated[bool, flag("--delete", "Delete the tag; its version stays.")] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Give a version of a data set a name, or remove a name.

    --at NAME then means this version in every command, and so does tiercache.Dataset(URL, version=NAME). `gc` keeps it.
    """
    if delete and (replace or at is not None):
        raise ValueError("--delete removes the tag from whatever version it names: give neither --at nor --replace")
    with open_data_set_store(url, storage_option) as store:
        found = delete_tag(store, name) if delete else put_tag(store, name, at, replace=replace)
        text = f"deleted the tag {name} of version {found.number}" if delete else f"{name} is version {found.number}"
        output.summary({"url": store.url, "tag": name, "version": found.number, "deleted": delete}, text)
