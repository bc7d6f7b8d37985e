"""What must be true of tiers whatever happens, told from outside: it shares no code with the library.

The world says what people do: write, remove, pin, and which bits it turns itself. After every step, and at every named
point inside of one, the oracle looks at all objects as they lie and compares them with what lay there before.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

DAY_S = 86_400.0
NEVER = float("inf")


@dataclass(frozen=True)
class Seen:
    data: bytes
    storage_class: str = ""
    readable: bool = True


Picture = Mapping[str, Mapping[str, Seen]]
"""Place to key to what lies there. A place is a URL: two tiers may share one."""


@dataclass(frozen=True)
class Group:
    """A group of objects that moves as one.

    last: Key that completes the group; "": none, it is complete when nothing has changed for settle_s. run, step:
    Of a checkpoint. delete_after_s: Of its rule. keep_last: Number of checkpoints of a run that are never deleted.
    """

    name: str
    keys: tuple[str, ...]
    last: str = ""
    run: str = ""
    step: int = -1
    delete_after_s: float = NEVER
    keep_last: int = 0


@dataclass
class Oracle:
    """The record, and the checks.

    alive: key to contents to the place where somebody has written them and not replaced or removed them himself.
    ever: all contents that a key has had.
    rotten: (place, key) to the bytes that the world itself has spoilt there; spoilt: key to all of these.
    first_seen_s: (place, key, contents) to when they were seen there first; once_seen_s: of those that are gone from
    there. pinned: keys; pinned_late: of these, those that were pinned while it was decided already what goes;
    removed_late: groups of which somebody has removed or replaced something then; replaced_late: key to the contents
    that somebody has replaced or written then; is_decided: it is so now. is_last_look: the objects of a batch of
    deletions are looked at for the last time, so that some of them have been.
    asked_s: path of a group to when a plan of it was applied first. apart: (place, group)
    that looked whole and were not when the step began; in_parts: that people have left in parts; whole_at: that were
    whole since nothing of them was there. protected: run to its newest complete checkpoint, when it began.
    """

    grace_s: float
    settle_s: float
    groups: dict[str, Group] = field(default_factory=dict)
    alive: dict[str, dict[bytes, set[str]]] = field(default_factory=dict)
    ever: dict[str, set[bytes]] = field(default_factory=dict)
    rotten: dict[tuple[str, str], bytes] = field(default_factory=dict)
    spoilt: dict[str, set[bytes]] = field(default_factory=dict)
    written_s: dict[str, float] = field(default_factory=dict)
    changed_s: dict[str, float] = field(default_factory=dict)
    first_seen_s: dict[tuple[str, str, bytes], float] = field(default_factory=dict)
    once_seen_s: dict[tuple[str, str, bytes], float] = field(default_factory=dict)
    apart: set[tuple[str, str]] = field(default_factory=set)
    in_parts: set[tuple[str, str]] = field(default_factory=set)
    whole_at: set[tuple[str, str]] = field(default_factory=set)
    pinned: set[str] = field(default_factory=set)
    pinned_late: set[str] = field(default_factory=set)
    removed_late: set[str] = field(default_factory=set)
    replaced_late: dict[str, set[bytes]] = field(default_factory=dict)
    is_decided: bool = False
    is_last_look: bool = False
    asked_s: dict[str, float] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    removed_by_hand: set[str] = field(default_factory=set)
    before: Picture = field(default_factory=dict)
    group_of: dict[str, str] = field(default_factory=dict)
    protected: dict[str, str] = field(default_factory=dict)

    # -- what people do ---------------------------------------------------------------------------------------------

    def knows(self, group: Group) -> None:
        self.groups[group.name] = group
        for key in group.keys:
            self.group_of[key] = group.name

    def wrote(self, place: str, key: str, data: bytes, now_s: float) -> None:
        """Somebody has written these bytes there: they supersede all that nobody has laid elsewhere himself.

        Where he lays back what lay there before, grace goes on: it is for readers who are not told yet, and these find
        there what they were told of. A store says the same size and ETag of it, and nobody can see that it was away.

        But while a batch of deletions is announced and made, what he replaces may be the copy that one of them relies
        on, and then what it was copied from goes (as in removed()); or it may be the object that is deleted, and then a
        server that does not look at ETags deletes what he has written. What is still there afterwards stays.
        """
        self.rotten.pop((place, key), None)
        self.spoilt.get(key, set()).discard(data)
        if (place, key, data) in self.once_seen_s:
            self.first_seen_s[place, key, data] = self.once_seen_s[place, key, data]
        contents = self.alive.setdefault(key, {})
        if self.is_decided:
            self.removed_late.add(self.group_of[key])
            replaced = {other for other in contents if _lies(self.before.get(place, {}), key, other)}
            self.replaced_late.setdefault(key, set()).update({data}, replaced)
        elif self.is_last_look:
            self.replaced_late.setdefault(key, set()).add(data)
        for other in [*contents]:
            contents[other].discard(place)
            if not any(_lies(self.before.get(p, {}), key, other) for p in contents[other]):
                del contents[other]
        contents.setdefault(data, set()).add(place)
        self.ever.setdefault(key, set()).add(data)
        self.written_s.setdefault(key, now_s)
        self.changed_s[key] = now_s
        self.deleted.discard(self.group_of[key])

    def removed(self, place: str, key: str) -> None:
        """Somebody has removed it from there; where it lies elsewhere, he relies on that.

        But while a batch of deletions is announced and made, he may remove the copy that one of them relies on: no
        store can be asked to delete one object only while another is there.
        """
        self.rotten.pop((place, key), None)
        if self.is_decided:
            self.removed_late.add(self.group_of[key])
        contents = self.alive.get(key, {})
        for data in [*contents]:
            if _lies(self.before.get(place, {}), key, data):
                contents[data].discard(place)
                others = (objects for other, objects in self.before.items() if other != place)
                if self.is_decided or not any(_lies(objects, key, data) for objects in others):
                    del contents[data]

    def rotted(self, place: str, key: str, data: bytes) -> None:
        if self.is_decided:
            self.removed_late.add(self.group_of[key])
        self.rotten[place, key] = data
        self.spoilt.setdefault(key, set()).add(data)
        self.ever[key].add(data)
        lies = self.before.get(place, {}).get(key)
        contents = self.alive.get(key, {})
        if lies is not None and lies.data in contents:
            contents[lies.data].discard(place)
            if not any(_lies(objects, key, lies.data) for other, objects in self.before.items() if other != place):
                del contents[lies.data]  # the world has spoilt the last of it

    def asked(self, paths: Iterable[str], now_s: float) -> None:
        for path in paths:
            self.asked_s.setdefault(path, now_s)

    def pins(self, keys: Iterable[str]) -> None:
        keys = {*keys}
        new = keys - self.pinned if self.is_decided else set()
        self.pinned, self.pinned_late = keys, (self.pinned_late & keys) | new

    def decides(self, *, is_decided: bool) -> None:
        """The library says that it has looked at pins for the last time before it deletes; or that this is over.

        Between a look and a deletion lies an instant, and nobody can promise that no pin comes in it. So it is promised
        for all pins but those; and what they name and is still there when that deletion is over stays, like all else.
        """
        self.is_decided = is_decided
        if not is_decided:
            self.is_last_look = False
            # What somebody has removed meanwhile may be gone for good: from now on another one is the newest.
            self.protected = {
                run: name
                for run, name in self.protected.items()
                if name not in self.removed_late or self._whole_in(self.groups[name], self.before)
            }
            self.pinned_late, self.removed_late, self.replaced_late = set(), set(), {}

    def looks_for_the_last_time(self) -> None:
        """The library begins to look at the objects of a batch of deletions for the last time.

        A server that does not look at ETags deletes what somebody writes after the look at its object.
        """
        self.is_last_look = True

    # -- looking ----------------------------------------------------------------------------------------------------

    def begins(self, picture: Picture, now_s: float) -> None:
        """A step begins: what lies there by the hands of people is as it should be."""
        self._note_seen(picture, now_s)
        self.before, self.is_last_look = picture, False
        if not self.is_decided:
            self.protected = self.newest_complete(picture, now_s)
        self.apart = {(place, group) for place, group, _ in self._looks_whole_and_is_not(picture)}

    def look(self, picture: Picture, now_s: float) -> list[str]:
        """Return what is wrong with the changes that the library has made since the picture before."""
        was_whole = {*self.whole_at}
        self._note_seen(picture, now_s)
        found = [
            *self._lost(picture, now_s),
            *self._strange(picture),
            *self._half(picture),
            *self._newest(picture),
            *self._pins(picture, was_whole),
            *self._early(picture, now_s, was_whole),
        ]
        self.before = picture
        return found

    def _note_seen(self, picture: Picture, now_s: float) -> None:
        for place, objects in picture.items():
            for key, seen in objects.items():
                self.first_seen_s.setdefault((place, key, seen.data), now_s)
        for place, key, data in [*self.first_seen_s]:
            if not _lies(picture.get(place, {}), key, data):
                self.once_seen_s[place, key, data] = self.first_seen_s.pop((place, key, data))
        for group in self.groups.values():
            for place, objects in picture.items():
                n_there = sum(key in objects for key in group.keys)
                if n_there == len(group.keys):
                    self.whole_at.add((place, group.name))
                elif not n_there:
                    self.whole_at.discard((place, group.name))

    def _lost(self, picture: Picture, now_s: float) -> list[str]:
        found = []
        for key, contents in self.alive.items():
            for data in [*contents]:
                if any(_lies(objects, key, data) for objects in picture.values()):
                    continue
                del contents[data]
                if data in self.replaced_late.get(key, ()):
                    continue
                if why := self.may_not_delete(self.group_of[key], now_s):
                    found.append(f"{key}: its {len(data)} bytes lie nowhere any more, and must: {why}")
                if not any(key in objects for objects in picture.values()):  # other bytes still count as the group
                    self.deleted.add(self.group_of[key])
        return found

    def may_not_delete(self, name: str, now_s: float) -> str:
        """Return why no rule may delete a group now; "": one may."""
        if name in self.removed_by_hand:
            return ""
        group = self.groups[name]
        age_s = now_s - min(self.written_s[key] for key in group.keys if key in self.written_s)
        if group.delete_after_s == NEVER:
            return "no rule deletes it"
        if age_s < group.delete_after_s:
            return f"it is {age_s / DAY_S:.1f} days old"
        if (self.pinned - self.pinned_late) & set(group.keys):
            return "it is pinned"
        if self.protected.get(group.run) == name:  # _newest() sees that some tier has it whole
            return "it is the newest complete checkpoint of its run"
        newer = [other for other in self.groups.values() if other.run == group.run and self._is_newer(other, group)]
        here = [other for other in newer if other.name not in self.deleted and self._counted(other)]
        if group.run and len(here) < group.keep_last:
            return f"it is among the last {group.keep_last}"
        return ""

    def _is_newer(self, other: Group, group: Group) -> bool:
        """Whether another checkpoint may be newer: by its step, or because some of it was written later."""
        changed_s = [self.changed_s[key] for key in other.keys if key in self.changed_s]
        written_s = [self.written_s[key] for key in group.keys if key in self.written_s]
        is_later = max(changed_s, default=0.0) > min(written_s, default=NEVER)
        # A bucket dates an object whose bits turned anew.
        return other.step > group.step or is_later or any(self.spoilt.get(key) for key in other.keys)

    def _counted(self, group: Group) -> bool:
        """Whether it is one of the newer ones: also if somebody has removed it when it was decided what goes."""
        return group.name in self.removed_late or self._looks_whole(group)

    def _strange(self, picture: Picture) -> list[str]:
        found = []
        for place, objects in picture.items():
            for key, seen in objects.items():
                if key in self.ever and seen.data not in self.ever[key]:
                    found.append(f"{place}/{key}: {len(seen.data)} bytes that nobody wrote")
                if key not in self.ever:
                    found.append(f"{place}/{key}: nobody wrote an object of that name")
        return found

    def _half(self, picture: Picture) -> list[str]:
        return [
            f"{place}/{name}: looks complete and lacks {', '.join(missing)}"
            for place, name, missing in self._looks_whole_and_is_not(picture)
            if (place, name) not in self.apart | self.in_parts
        ]

    def _looks_whole_and_is_not(self, picture: Picture) -> Iterator[tuple[str, str, list[str]]]:
        for group in self.groups.values():
            for place, objects in picture.items():
                missing = self._missing(group, place, picture)
                if missing and group.last in objects:
                    yield place, group.name, missing

    def _missing(self, group: Group, place: str, picture: Picture) -> list[str]:
        """Keys that lie elsewhere and not there: what nobody has, somebody has taken away himself."""
        return [
            key
            for key in group.keys
            if key not in picture[place] and any(key in now for now in (*picture.values(), *self.before.values()))
        ]

    def at_rest(self, picture: Picture, handled: Collection[str] = ()) -> list[str]:
        """What is wrong when everything was done: a group in parts that nobody has taken apart.

        handled: Groups that people have changed object by object: parts that stay of these may be what they want, or
        differ from what another tier has, which only people can decide.
        """
        found = []
        for group in self.groups.values():
            # What is pinned stays as it is. Of two different objects under one name, only people know which is wanted.
            if group.name in handled or self.pinned & {*group.keys} or self._is_in_conflict(group, picture):
                continue
            for place, objects in picture.items():
                # A spoilt part is not known to be the mover's own, so it stays.
                there = [
                    key for key in group.keys if key in objects and self.rotten.get((place, key)) != objects[key].data
                ]
                missing = [key for key in self._missing(group, place, picture) if self._is_good_somewhere(key, picture)]
                if there and missing and (place, group.name) not in self.in_parts:
                    found.append(f"{place}/{group.name}: {len(there)} of its {len(group.keys)} objects were left")
        return found

    def _is_in_conflict(self, group: Group, picture: Picture) -> bool:
        """Whether two places have different contents under a key of the group, none of which has rotted."""
        for key in group.keys:
            seen = {(place, objects[key].data) for place, objects in picture.items() if key in objects}
            if len({data for place, data in seen if self.rotten.get((place, key)) != data}) > 1:
                return True
        return False

    def _is_good_somewhere(self, key: str, picture: Picture) -> bool:
        """Whether it could be copied: of what is spoilt wherever it lies nobody can make a copy."""
        places = [place for place, objects in picture.items() if key in objects]
        return any(self.rotten.get((place, key)) != picture[place][key].data for place in places)

    def note_parts(self, place: str, key: str, picture: Picture) -> None:
        """Somebody has just done something to an object by hand: if its group lies there in parts, he knows."""
        group = self.groups[self.group_of[key]]
        is_apart = 0 < sum(one in picture[place] for one in group.keys) < len(group.keys)
        (self.in_parts.add if is_apart else self.in_parts.discard)((place, group.name))

    def newest_complete(self, picture: Picture, now_s: float) -> dict[str, str]:
        """Run to its newest checkpoint that looks whole, if it is so, and can be read, in some place now."""
        newest: dict[str, Group] = {}
        for group in self.groups.values():
            known = newest.get(group.run)
            is_newer = bool(group.run) and (known is None or group.step > known.step)
            if is_newer and self._looks_whole(group) and self._is_complete(group, now_s):
                newest[group.run] = group
        return {run: group.name for run, group in newest.items() if self._whole_in(group, picture)}

    def _looks_whole(self, group: Group) -> bool:
        """Whether what makes it whole lies somewhere: that people have taken away or spoilt it cannot be seen."""
        wanted = (group.last,) if group.last else group.keys
        return all(any(key in objects for objects in self.before.values()) for key in wanted)

    def _is_complete(self, group: Group, now_s: float) -> bool:
        if group.last:
            return True
        times = [self.changed_s[key] for key in group.keys if key in self.changed_s]
        return bool(times) and max(times) + self.settle_s <= now_s

    def _whole_in(self, group: Group, picture: Picture) -> list[str]:
        return [place for place, objects in picture.items() if all(self._right(objects.get(k), k) for k in group.keys)]

    def _right(self, seen: Seen | None, key: str) -> bool:
        return seen is not None and seen.readable and seen.data in self.alive.get(key, {})

    def _newest(self, picture: Picture) -> list[str]:
        return [
            f"{name} is the newest complete checkpoint of {run}, and no place has it whole and readable"
            for run, name in self.protected.items()
            if name not in self.removed_late and not self._whole_in(self.groups[name], picture)
        ]

    def _pins(self, picture: Picture, was_whole: Collection[tuple[str, str]]) -> list[str]:
        found = []
        for place, objects in self.before.items():
            for key in (self.pinned - self.pinned_late) & set(objects):
                now = picture.get(place, {}).get(key)
                if now is None:
                    if self._may_be_withdrawn(place, key, objects[key].data, picture, was_whole):
                        continue  # a pin ends a copy that was interrupted
                    found.append(f"{place}/{key} is pinned, and gone from there")
                elif now.storage_class != objects[key].storage_class:
                    found.append(f"{place}/{key} is pinned, and its class is {now.storage_class!r} now")
        return found

    def _early(self, picture: Picture, now_s: float, was_whole: Collection[tuple[str, str]]) -> list[str]:
        """Return the copies that vanished or became unreadable before the grace period of another copy was over.

        was_whole: As whole_at, before the picture.
        """
        found = []
        for place, objects in self.before.items():
            for key, seen in objects.items():
                now = picture.get(place, {}).get(key)
                if now is not None and not (seen.readable and not now.readable):
                    continue
                # Spoilt bytes have no grace, also where the library has copied them and takes that back, being wrong.
                if key not in self.group_of or seen.data in self.spoilt.get(key, ()):
                    continue
                if not self.may_not_delete(self.group_of[key], now_s):
                    continue
                if now is None and self._may_be_withdrawn(place, key, seen.data, picture, was_whole):
                    continue
                since_s = [
                    first_s
                    for (other, name, data), first_s in self.first_seen_s.items()
                    if (name, data) == (key, seen.data) and other != place
                ]
                if now is not None:
                    since_s = [self.asked_s.get(self.group_of[key], NEVER)]
                if since_s and min(since_s) + self.grace_s > now_s + 1.0:
                    found.append(
                        f"{place}/{key} {'went' if now is None else 'became unreadable'} "
                        f"{now_s - min(since_s):.0f} s after another was there, grace is {self.grace_s:.0f} s"
                    )
        return found

    def _may_be_withdrawn(
        self, place: str, key: str, data: bytes, picture: Picture, was_whole: Collection[tuple[str, str]]
    ) -> bool:
        """Whether an object is what an interrupted copy has left, and what it was copied from is still there.

        Nobody was told of such a copy: it is a part of a group that was never whole there, or no tier has got another
        copy since, to which readers could have been led instead.
        """
        if place in self.alive.get(key, {}).get(data, ()):
            return False  # somebody has written it there himself
        others = [
            self.first_seen_s[other, key, data]
            for other, objects in picture.items()
            if other != place and _lies(objects, key, data)
        ]
        is_part = (place, self.group_of[key]) not in was_whole
        return bool(others) and (is_part or max(others) <= self.once_seen_s[place, key, data])


def _lies(objects: Mapping[str, Seen], key: str, data: bytes) -> bool:
    return key in objects and objects[key].data == data
