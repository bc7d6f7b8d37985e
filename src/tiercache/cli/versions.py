"""The verbs for the versions of a data set: versions, tag, drop and gc."""

from __future__ import annotations

from typing import Annotated

from tiercache.cli.common import (
    DryRun,
    Jobs,
    Output,
    StorageOptions,
    Url,
    VersionNumber,
    argument,
    count,
    errors_name,
    flag,
    option,
    parse_age,
    verb,
)
from tiercache.cli.data import open_data_set_store, version_facts
from tiercache.cli.expressions import parse_condition
from tiercache.data.drop import drop as drop_from
from tiercache.model import format_bytes
from tiercache.shard.gc import collect_garbage
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


@verb(after_ctrl_c="nothing was dropped; run the same command again")
def drop(
    output: Output,
    url: Url,
    where: Annotated[
        str | None,
        option(
            "--where", "CONDITION", "Drop the records for which it is true, e.g. \"label == 3 and split != 'val'\"."
        ),
    ] = None,
    columns: Annotated[
        list[str] | None, option("--column", "NAME", "Drop a column of all records. May be repeated.")
    ] = None,
    jobs: Jobs = 4,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
) -> None:
    """Make a version of a data set without some records or columns.

    CONDITION has comparisons of columns and values, `in` and `not in` with a list of values, `is None`, and `and`, `or`
    and `not`; a comparison with a null is not true. Earlier versions keep everything until `gc` removes them.
    """
    with errors_name("--where"):
        condition = None if where is None else parse_condition(where)
    with open_data_set_store(url, storage_option) as store, output.byte_progress("dropping") as advance:
        report = drop_from(store, condition, columns or (), jobs=jobs, dry_run=dry_run, on_progress=advance)
    facts = {
        "url": store.url,
        "version": report.version.number,
        "dropped": report.n_records,
        "columns": columns or [],
        "rewritten": report.n_rewritten,
        "removed": report.n_removed,
    }
    if not (report.n_records or columns):
        output.summary(facts, f"no record matches: version {report.version.number} stays the newest")
        return
    what = [count(report.n_records, "record")] if where is not None else []
    what += [count(len(columns), "column")] if columns else []
    text = f"{' and '.join(what)}: {count(report.n_rewritten, 'shard')} rewritten, {report.n_removed} left out"
    if dry_run:
        output.summary(facts | {"dry_run": True}, f"would drop {text}")
    else:
        left = f"version {report.version.number} has {count(report.version.n_records, 'record')}"
        output.summary(facts, f"dropped {text}; {left}")


_MOST_SHOWN = 5


@verb(after_ctrl_c="what was removed was not needed; run the same command again")
def gc(
    output: Output,
    url: Url,
    older_than: Annotated[
        str,
        option(
            "--older-than",
            "AGE",
            "Safety age, e.g. 12h: what is younger stays, and a writer that has written within it is live.",
        ),
    ] = "7d",
    keep_versions: Annotated[
        int | None,
        option(
            "--keep-versions",
            "N",
            "Also delete versions older than AGE, except the newest N and those with a tag.",
            min=1,
        ),
    ] = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
) -> None:
    """Remove what no version of a data set needs: leftovers of killed writers, old versions.

    Leftovers are shards, lists of shards, temporary files and parts of uploads. No version is deleted without
    --keep-versions. A writer must not pause for longer than AGE between two shards, or before its commit.
    """
    older_than_s = parse_age("--older-than", older_than)
    with open_data_set_store(url, storage_option) as store:
        report = collect_garbage(store, older_than_s=older_than_s, keep_versions=keep_versions, dry_run=dry_run)
    for kind, names in (
        ("version", report.versions),
        ("shard", report.shards),
        ("segment", report.segments),
        ("upload", report.uploads),
        ("packing", report.packings),
    ):
        for number, name in enumerate(names):
            shown = None if number >= _MOST_SHOWN else f"{kind} {name}"
            output.event("removed", {"kind": kind, "name": name}, shown)
        if len(names) > _MOST_SHOWN and not output.as_json:
            output.event("removed", {}, f"{count(len(names) - _MOST_SHOWN, 'more ' + kind)} (--json names all)")
    if report.elsewhere:
        text = (
            f"{count(len(report.elsewhere), 'shard')} that no version needs were moved to other tiers, and stay there"
        )
        output.event("elsewhere", {"names": list(report.elsewhere)}, f"{text}, e.g. {report.elsewhere[0]}")
    if report.uploads_unknown:
        text = f"unfinished uploads were not looked for: {report.uploads_unknown}"
        output.event("uploads_unknown", {"reason": report.uploads_unknown}, text)
    facts = {
        "url": store.url,
        "versions": len(report.versions),
        "shards": len(report.shards),
        "segments": len(report.segments),
        "uploads": len(report.uploads),
        "packings": len(report.packings),
        "bytes": report.n_bytes,
        "young": report.n_young,
    }
    what = [
        count(len(report.versions), "version"),
        count(len(report.shards), "shard"),
        count(len(report.segments), "segment"),
        count(len(report.uploads), "unfinished upload"),
    ]
    young = f"; {count(report.n_young, 'object')} of writers that may be live stay" if report.n_young else ""
    text = f"{'would remove' if dry_run else 'removed'} {', '.join(what)}, {format_bytes(report.n_bytes)}{young}"
    output.summary(facts | ({"dry_run": True} if dry_run else {}), text)
