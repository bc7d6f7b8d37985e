"""Numbered log: objects 1, 2, 3, ... below a prefix of a store, of which the highest number holds the newest state.

Versions of a data set, placements and the tier lock are such logs. A writer puts the next number only if it is absent,
so exactly one of several racing writers succeeds. A reader probes upward from a number that it knows, and lists where
that number is missing. Where a log deletes its old objects, a number can become free again::

    1. a writer has read number 7, and sleeps
    2. others write 8 to 18, and delete 8
    3. the writer wakes, and puts its 8: the number is free, but nobody will ever read it

So put_newest() lists after the put, and withdraws an object that is not the newest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from tiercache.errors import NotFound, StoreError
from tiercache.model import ObjectInfo
from tiercache.store.contract import Store, unwrapped
from tiercache.store.remote import RemoteStore, call_threads

_FORBIDDEN = 403
_DIGITS = 20
_MAX_TRIES = 100
_MAX_PUTS = 3
# Probe distance across deleted numbers, where the store cannot list.
_MAX_GAP = 40
# A number that no writer reaches, and how many numbers a reader finds before it makes sure that this one is missing.
_IMPOSSIBLE, _SUSPICIOUS = 10**_DIGITS - 1, 8


@dataclass(frozen=True, slots=True)
class NumberedLog:
    """The objects `prefix` + 20 digits + `suffix` of a store. Stateless and thread-safe. Methods raise StoreError.

    hides_missing: "Forbidden" means missing: so answers a bucket that may not be listed. most_bytes: That get()
    returns, from the end of the object; None: all.
    """

    store: Store
    prefix: str
    suffix: str = ""
    hides_missing: bool = False
    most_bytes: int | None = None

    def key(self, number: int) -> str:
        return f"{self.prefix}{number:0{_DIGITS}d}{self.suffix}"

    # -- reading ----------------------------------------------------------------------------------------------------

    def get(self, number: int, *, is_listed: bool = False) -> bytes | None:
        """Return an object; None if it is missing. is_listed: A listing has it, so that "forbidden" is an error."""
        if number < 1:
            return None
        try:
            if self.most_bytes is None:
                return self.store.get(self.key(number))
            return self.store.read_tail(self.key(number), self.most_bytes)[0]
        except NotFound:
            return None
        except StoreError as error:
            if self.hides_missing and not is_listed and is_forbidden(error):
                return None
            raise

    def numbers(self) -> list[int]:
        return list(self.listed())

    def listed(self) -> dict[int, ObjectInfo]:
        """Return the objects by their numbers, in rising order."""
        name = re.compile(f"{re.escape(self.prefix)}([0-9]{{{_DIGITS}}}){re.escape(self.suffix)}")
        matches = ((name.fullmatch(info.key), info) for info in self.store.list(self.prefix))
        return dict(sorted((int(match[1]), info) for match, info in matches if match and int(match[1])))

    def highest(self) -> int | None:
        """Return the highest listed number, 0 if there is none; None if the store cannot list."""
        try:
            return max(self.numbers(), default=0)
        except StoreError as error:
            if error.retryable:
                raise
            return None

    def probe(self, number: int, *, is_listed: bool = False) -> tuple[int, bytes] | None:
        """Return the last of number, number + 1, ... before the first gap; None if `number` is missing.

        From a remote store, the first two are requested at once: normally the first is the newest.
        """
        if number >= 1 and isinstance(unwrapped(self.store), RemoteStore):
            with call_threads(1, "tiercache-probe") as pool:
                second = pool.submit(self.get, number + 1)
                first = self.get(number, is_listed=is_listed)
                newer = None if first is None else second.result()
        else:
            first = self.get(number, is_listed=is_listed)
            newer = None if first is None else self.get(number + 1)
        found = None if first is None else (number, first)
        for steps in count(1):
            if newer is None:
                return found
            number += 1
            if steps == _SUSPICIOUS and self.get(_IMPOSSIBLE) is not None:
                url = self.store.url_of(self.key(_IMPOSSIBLE))
                message = "it exists, although nobody can have written it: the server answers every request alike"
                raise StoreError(f"{message}; is it a login page or a proxy in place of the store?", url=url)
            found, newer = (number, newer), self.get(number + 1)
        return found

    def newest(self, start: int) -> tuple[int, bytes] | None:
        """Return the newest object and its number; None if there is none. start: Number that may exist."""
        found = self.probe(start or 1)
        for _ in range(_MAX_TRIES):
            if found is not None:
                return found
            listed = self.highest()
            if listed is None:
                further = range(start + 1, start + 1 + _MAX_GAP) if start else ()
                return self.probe(next((number for number in further if self.get(number) is not None), 0))
            if not listed:
                return None
            found = self.probe(listed, is_listed=True)  # missing only if newer ones have replaced it since
        raise StoreError(f"{self.prefix} changes faster than it can be read", url=self.store.url, retryable=True)

    # -- writing ----------------------------------------------------------------------------------------------------

    def put(self, number: int, data: bytes) -> bool:
        """Put an object if its number is free. Return False if another writer has the number.

        If an answer is lost, the object is read back: a refusal may mean that the first attempt has written it. An
        error with .maybe_done says that even this did not tell.
        """
        self.store.require_conditional_put()
        failure: StoreError | None = None
        maybe_done = False
        for _ in range(_MAX_PUTS):
            try:
                if self.store.put_if_absent(self.key(number), data):
                    return True
                failure = None
            except StoreError as error:
                failure = error
                maybe_done = maybe_done or error.maybe_done
            try:
                found = self.get(number)
            except StoreError as error:
                if failure is not None and not maybe_done:
                    raise failure from error
                error.maybe_done = True
                raise
            if found is not None:
                return found == data
            if failure is not None and not maybe_done:
                raise failure
        message = "an object may have been written: the store's response was lost, and the object cannot be found"
        raise failure or StoreError(message, url=self.store.url_of(self.key(number)), retryable=True, maybe_done=True)

    def put_newest(self, number: int, data: bytes) -> bool:
        """Put the next number. Return False if another writer has it, or if it is not the newest number any more."""
        if not self.put(number, data):
            return False
        try:
            if (self.highest() or 0) <= number:
                return True
        except StoreError as error:
            error.maybe_done = True
            raise
        if self.get(number) == data:
            self.store.delete([self.key(number)])
        return False

    def delete(self, numbers: Iterable[int]) -> None:
        if keys := [self.key(number) for number in numbers]:
            self.store.delete(keys)


def is_forbidden(error: StoreError) -> bool:
    """Return whether the store forbids an object. A client that may not list gets this for a missing object too."""
    return error.status == _FORBIDDEN and not error.retryable
