"""Evaluates the settings of a bucket that affect a tier's objects: lifecycle rules, versioning and object lock. Pure.

A lifecycle rule deletes or moves objects without notice, so that the last copies of a tier may expire.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tiercache.tier.stores import RESTORED_FIRST

if TYPE_CHECKING:
    from tiercache.store.archive import BucketSettings

Kind: TypeAlias = Literal["expiration", "transition", "versions", "object_lock", "unread"]


@dataclass(frozen=True, slots=True)
class BucketFinding:
    """An effect of a bucket's settings on a tier's objects.

    Attributes:
        tier: Name of the tier.
        kind: Kind of the setting; "unread": a setting that could not be read.
        lifecycle_rule: ID of the lifecycle rule; None: another setting.
        is_danger: Whether objects are deleted, or become unreadable, without tiercache.
        text: Message for people.
    """

    tier: str
    kind: Kind
    lifecycle_rule: str | None
    is_danger: bool
    text: str


def bucket_findings(tier: str, folder: str, class_of: str, settings: BucketSettings) -> tuple[BucketFinding, ...]:
    """Return the effects of a bucket's settings on the objects of a tier.

    Args:
        tier: Name of the tier.
        folder: Prefix of all its keys in the bucket; "" or ending in "/".
        class_of: Storage class of its copies.
        settings: Settings of the bucket.
    """
    return tuple(_findings(tier, folder, class_of, settings))


def _findings(tier: str, folder: str, class_of: str, settings: BucketSettings) -> Iterator[BucketFinding]:
    where = f"tiers.{tier}"
    has_versions = settings.versioning in ("Enabled", "Suspended")
    rules = [rule for rule in settings.lifecycle if _applies(rule, folder)]
    for rule in rules:
        name = str(rule.get("ID") or "without ID")
        says = f"{where}: the bucket's lifecycle rule {name!r}{_of(rule)}"
        if when := _when(rule.get("Expiration", {})):
            kept = " (old versions stay, hidden)" if has_versions else ""
            text = f"{says} deletes objects of this tier {when}{kept}, last copies too: take the tier out of its prefix"
            yield BucketFinding(tier, "expiration", name, True, text)
        for transition in rule.get("Transitions", ()):
            target = str(transition.get("StorageClass", ""))
            if target != class_of:
                more = "; they cannot be read before a restore" if target in RESTORED_FIRST else ""
                text = f"{says} moves objects of this tier to {target} {_when(transition) or 'at once'}{more}"
                yield BucketFinding(tier, "transition", name, target in RESTORED_FIRST, text)
    if has_versions:
        yield BucketFinding(tier, "versions", None, False, f"{where}: {_versions(settings.versioning, rules)}")
    if settings.lock is not None:
        text = f"{where}: the bucket has object lock{_retention(settings.lock)}: a deletion adds only a delete marker"
        yield BucketFinding(tier, "object_lock", None, False, f"{text}, and what is locked stays and is billed")
    for name, why in settings.unread.items():
        text = f"{where}: the bucket's {name} could not be read, and is not checked: {why}"
        yield BucketFinding(tier, "unread", None, False, text)


def _versions(versioning: str, rules: Sequence[Mapping[str, Any]]) -> str:
    """Describe what happens to versions that tiercache deletes."""
    state = "the bucket keeps versions" if versioning == "Enabled" else "the bucket has kept versions"
    days = [
        one["NoncurrentDays"]
        for one in (rule.get("NoncurrentVersionExpiration", {}) for rule in rules if not _conditions(rule))
        if "NoncurrentDays" in one
    ]
    if days:
        return f"{state}, and deletes old ones after {min(days)} days: what is deleted can be had back until then"
    return f"{state}, and no lifecycle rule expires all old ones: what is deleted stays, and is billed"


def _applies(rule: Mapping[str, Any], folder: str) -> bool:
    """Return whether an enabled lifecycle rule affects objects in the folder, or some below it."""
    prefix = _prefix(rule)
    return rule.get("Status") == "Enabled" and (folder.startswith(prefix) or prefix.startswith(folder))


def _prefix(rule: Mapping[str, Any]) -> str:
    given = rule.get("Filter", {})
    found = given.get("And", given).get("Prefix")
    return str(rule.get("Prefix", "") if found is None else found)  # rules older than 2016 have no Filter


def _conditions(rule: Mapping[str, Any]) -> list[str]:
    """Return the conditions of a rule other than the prefix, for people."""
    given = rule.get("Filter", {})
    both = given.get("And", given)
    tags = [*both.get("Tags", ()), *([given["Tag"]] if "Tag" in given else [])]
    found = [f"tag {tag['Key']}={tag['Value']}" for tag in tags]
    if "ObjectSizeGreaterThan" in both:
        found.append(f"more than {both['ObjectSizeGreaterThan']} bytes")
    if "ObjectSizeLessThan" in both:
        found.append(f"less than {both['ObjectSizeLessThan']} bytes")
    return found


def _of(rule: Mapping[str, Any]) -> str:
    """Describe the objects that a rule affects, for people."""
    facts = [f"prefix {_prefix(rule)!r}" if _prefix(rule) else "the whole bucket", *_conditions(rule)]
    return f" ({', '.join(facts)})"


def _when(action: Mapping[str, Any]) -> str:
    """Describe when an action of a rule takes effect; "": never (it expires delete markers only)."""
    if "Days" in action:
        return f"{action['Days']} days after they were written"
    return f"on {action['Date']:%Y-%m-%d}" if "Date" in action else ""


def _retention(lock: Mapping[str, Any]) -> str:
    default = lock.get("Rule", {}).get("DefaultRetention", {})
    length = next((f"{default[unit]} {unit.lower()}" for unit in ("Days", "Years") if default.get(unit)), "")
    return f" ({default.get('Mode', '')}, {length} by default)" if length else ""
