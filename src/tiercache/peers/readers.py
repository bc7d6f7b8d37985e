"""The reader's side of peers: who is alive, who owns a copy, and the store that asks its owner first.

A rendezvous hash over the live machines chooses the owner of each copy. The owner fetches from the origin, and the
others fetch from the owner. A reader tries at most N_TRIED machines, and then the origin. Nothing that a peer sends is
trusted more than the origin: shards and segments are compared with their checksums. A reader that finds a copy corrupt
tells the peers that sent it (`/suspects/NAME`), which verify their own copies.

Two processes never wait for each other for a shard: a server reads shards only from its own cache and from the origin.
It refuses requests of readers of its own cache folder (status 421), by which a reader learns which peer is its own
machine.
"""

from __future__ import annotations

import logging
import re
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from http import HTTPStatus
from itertools import product
from random import SystemRandom
from threading import Event, Lock, Thread, current_thread
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tiercache import config
from tiercache.errors import NotFound, StoreError
from tiercache.model import ByteRange
from tiercache.stats import Counters
from tiercache.store import CloudStore, Span, Store, open_store, redact
from tiercache.store.access import CloudOptions
from tiercache.store.contract import Receive, WrapperStore
from tiercache.store.remote import ReadSettings, RemoteStore, RetryPolicy
from tiercache.waiting import SYSTEM_CLOCK, Clock

T = TypeVar("T")

logger = logging.getLogger("tiercache")

DEFAULT_PORT = 9740
READER_HEADER = "X-Tiercache-Reader"
OWN_REQUEST = 421  # status of a server that got a request from a reader of its own cache folder
# The owner, and the machine that owns the copy while the owner is away. Of 1,000 machines that lose an owner, each then
# asks the same second machine, and not the origin.
N_TRIED = 2
# A machine that lost its power answers nothing: its connections fail after CONNECT_S, and open ones after STALL_S. An
# owner sends what it fetches when a request of up to 8 MiB has come, so an origin below about 1 MB/s for each request
# makes it look dead; the reader then asks the origin itself.
CONNECT_S = 2.0
STALL_S = 10.0
SLOWEST_BYTES_S = 1e6
FIRST_ABSENCE_S, LONGEST_ABSENCE_S = 5.0, 60.0
RESOLVE_EVERY_S = 30.0
MOST_IDLE_STORES = 64  # a store keeps some threads and connections
MOST_SENDERS = 4096  # copies whose senders are remembered: corruption is found soon after the bytes came
_UNIT_BYTES = 4096  # of what a peer has sent

_jitter = SystemRandom()  # not the seeded generator: machines must not try in step
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
_ADDRESS = re.compile(rf"(?:(https?)://)?({_HOST})(?::([0-9]{{1,5}}))?/?")
_SOURCE = re.compile(rf"(slurm)(?::([0-9]{{1,5}}))?|dns:({_HOST})(?::([0-9]{{1,5}}))?")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{8,512}")


# -- configuration -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """The machines of a job, and how they are reached.

    Attributes:
        members: Addresses, or one source of addresses: "dns:NAME[:PORT]" (all addresses of a DNS name) or
            "slurm[:PORT]".
        ca_file: File of trusted certificates (PEM); then addresses without a scheme are reached by TLS.
    """

    members: tuple[str, ...]
    token: str | None = field(default=None, repr=False)
    ca_file: str | None = None

    @classmethod
    def parse(
        cls, members: str | Sequence[str] | None, token: str | None = None, ca_file: str | None = None
    ) -> PeerOptions | None:
        texts = members.split(",") if isinstance(members, str) else members or ()
        stripped = tuple(text.strip() for text in texts if text.strip())
        return cls(stripped, token, ca_file) if stripped else None

    def __post_init__(self) -> None:
        if any(_SOURCE.fullmatch(text) for text in self.members) and len(self.members) > 1:
            raise ValueError(f"peers are a list of addresses or one source of addresses, got {self.members!r}")
        for text in self.members:
            match = _SOURCE.fullmatch(text) or _ADDRESS.fullmatch(text)
            if match is None or not all(0 < int(port) < 65536 for port in match.groups() if port and port.isdigit()):
                raise ValueError(
                    f"not an address of a peer: {text!r}; expected 'host', 'host:port', 'https://host:port', "
                    "'dns:NAME:PORT' or 'slurm'"
                )
        if self.token is not None:
            check_token(self.token)
        if self.ca_file is not None:
            CloudOptions.parse("http", {"root_certificate": self.ca_file})

    def urls(self) -> list[str]:
        """Return the URLs of all servers, sorted. Raises OSError if a DNS name has no address."""
        source = _SOURCE.fullmatch(self.members[0])
        if source is None:
            return sorted({self._url(text) for text in self.members})
        _, slurm_port, name, name_port = source.groups()
        if name is None:
            hosts, port = expand_hosts(config.slurm_hosts()), slurm_port
        else:
            hosts, port = look_up_host(name.strip("[]"), int(name_port or DEFAULT_PORT)), name_port
        shown = [f"[{host}]" if ":" in host else host for host in hosts]
        return sorted({self._url(f"{host}:{port or DEFAULT_PORT}") for host in shown})

    def _url(self, text: str) -> str:
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(f"not an address of a peer: {text!r}")
        scheme = match[1] or ("http" if self.ca_file is None else "https")
        return f"{scheme}://{match[2]}:{match[3] or DEFAULT_PORT}"


def check_token(token: str) -> str:
    """Return the token if a header and nginx's configuration can hold it. Raises ValueError, without the token."""
    if not _TOKEN.fullmatch(token):
        raise ValueError("a token of peers is 8 to 512 characters of A-Z a-z 0-9 . _ ~ + / = -")
    return token


def look_up_host(name: str, port: int) -> list[str]:
    return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)})


def expand_hosts(text: str) -> list[str]:
    """Return the hosts of a list in Slurm's form: "gpu[001-003,7],login" names five hosts. Raises ValueError."""
    hosts: list[str] = []
    for item in filter(None, (item.strip() for item in re.split(r",(?![^\[]*\])", text))):
        if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]+\])+", item):
            raise ValueError(f"not a list of hosts: {text!r}")
        # Every second piece is the inside of a pair of brackets.
        pieces = re.split(r"[\[\]]", item)
        choices = [[piece] if i % 2 == 0 else _expand_numbers(piece, text) for i, piece in enumerate(pieces)]
        hosts += ["".join(chosen) for chosen in product(*choices)]
    return hosts


def _expand_numbers(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        if match is None:
            raise ValueError(f"not a list of hosts: {text!r}")
        first, last = match[1], match[2] or match[1]
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


# -- choice of the owner -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Members:
    urls: tuple[str, ...]
    seeds: NDArray[np.uint64]

    @classmethod
    def of(cls, urls: Sequence[str]) -> Members:
        ordered = tuple(sorted(set(urls)))
        hashes = [int.from_bytes(blake2b(url.encode(), digest_size=8).digest(), "big") for url in ordered]
        return cls(ordered, np.array(hashes, np.uint64))

    def order(self, key: int) -> Iterator[str]:
        """Yield the URLs in the order in which they own the thing with this key (rendezvous hashing)."""
        order = np.argsort(_mix(self.seeds ^ np.uint64(key)), kind="stable").tolist()
        return map(self.urls.__getitem__, order)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return splitmix64's finalizer of each value: a permutation of all 64-bit numbers without visible structure."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


# -- readers -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Peer:
    url: str
    store: RemoteStore | None = None
    n_users: int = 0
    is_live: bool = True
    n_failures: int = 0
    absent_until_s: float = 0.0
    is_own: bool = False
    lacks_data_set: bool = False  # and a warning has said so
    silent: Event = field(default_factory=Event)  # set to end the requests that run now


class _AnyEvent(Event):
    """An event that is set once one of others is."""

    def __init__(self, *others: Event | None) -> None:
        super().__init__()
        self._others = [other for other in others if other is not None]

    def is_set(self) -> bool:
        return any(other.is_set() for other in self._others)


class Peers:
    """The peers of one process: who is alive, who owns a copy, and the requests to them. Safe from any thread.

    The lock guards the table of peers; requests and DNS queries run outside it. A peer that fails is left out for
    FIRST_ABSENCE_S, and twice as long after each further failure; then a thread tries it, while requests still go on
    without it. If a request fails late, all that run at this peer end with it: a machine whose link is down costs the
    time limit once.
    """

    def __init__(
        self,
        options: PeerOptions,
        reader_id: str,
        *,
        open_peer: Callable[[str, PeerOptions, str], RemoteStore] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._options, self._reader_id, self._clock = options, reader_id, clock
        self._open_peer = open_peer or open_peer_store
        self.counters = Counters("peer_requests", "peer_bytes", "peer_failures", "peer_corrupt", "peer_not_served")
        self._lock, self._resolving = Lock(), Lock()
        self._members: Members | None = None
        self._resolve_at_s = -np.inf
        self._peers: dict[str, _Peer] = {}
        self._distrusted: set[str] = set()
        self._senders: OrderedDict[str, set[str]] = OrderedDict()  # URLs by the name of the copy
        self._threads: set[Thread] = set()
        self._closed = Event()

    def store_for(self, name: str, key: str, n_bytes: int, origin: Store) -> Store:
        """Return the store from which the copy with this name is fetched: its peers, and behind them the origin."""
        return origin if name in self._distrusted else PeerSource(self, name, key, n_bytes, origin)

    def report_corrupt(self, name: str, source: str) -> bool:
        """Fetch a copy from the origin from now on; tell the peers that sent it. Returns whether a peer is known to.

        Args:
            name: Name of the copy.
            source: URL of the object at the origin, without credentials.
        """
        with self._lock:
            self._distrusted.add(name)
            senders = [self._peers[url] for url in sorted(self._senders.pop(name, ()))]
        for peer in senders:
            self.counters.add("peer_corrupt")
            logger.warning(
                "peer %s sent corrupt bytes of %s: they are fetched from the store, and the peer verifies its copy",
                peer.url,
                source,
            )
            with suppress(StoreError, OSError), self._store_of(peer) as store:
                store.get(f"suspects/{name}")
        return bool(senders)

    def ask(
        self,
        name: str,
        request: Callable[[RemoteStore, Event], T],
        refused: set[str],
        cancel: Event | None = None,
        *,
        source: str = "",
    ) -> T | None:
        """Return request(store of the owner of the copy, event that ends it); None: the caller must ask the origin.

        refused: URLs of peers that do not have it, or are too busy; this method adds to them. source: URL at the
            origin, for messages.
        """
        n_tried = 0
        for url in self._current().order(int(name[:16], 16)):
            if n_tried == N_TRIED:
                break
            peer = None if url in refused else self._live(url)
            if peer is None:
                continue
            if peer.is_own:
                break
            n_tried += 1
            self.counters.add("peer_requests")
            start_s, silent = self._clock.monotonic(), peer.silent
            try:
                with self._store_of(peer) as store:
                    found = request(store, _AnyEvent(silent, cancel))
            except (StoreError, OSError) as error:  # OSError: a network error that the store did not convert
                if cancel is not None and cancel.is_set():
                    break
                status = error.status if isinstance(error, StoreError) else None
                if isinstance(error, NotFound) or status == HTTPStatus.SERVICE_UNAVAILABLE:
                    refused.add(url)
                    if isinstance(error, NotFound):
                        self._note_lack(peer, source)
                elif status == OWN_REQUEST:
                    peer.is_own = True
                    break
                elif not silent.is_set():  # else another request has found it silent
                    self._failed(peer, error, self._clock.monotonic() - start_s)
            else:
                peer.n_failures, peer.is_live = 0, True
                self._note_sender(name, url)
                return found
        return None

    def _note_lack(self, peer: _Peer, source: str) -> None:
        self.counters.add("peer_not_served")
        if not peer.lacks_data_set:
            peer.lacks_data_set = True
            logger.warning(
                "peer %s does not serve the data set of %s: name its URL at `tiercache serve` on that machine",
                peer.url,
                source,
            )

    def _note_sender(self, name: str, url: str) -> None:
        with self._lock:
            self._senders.setdefault(name, set()).add(url)
            if len(self._senders) > MOST_SENDERS:
                self._senders.popitem(last=False)

    def _current(self) -> Members:
        """Return the members; a DNS name or a launcher's list is read again every RESOLVE_EVERY_S."""
        known = self._members
        if known is not None and self._clock.monotonic() < self._resolve_at_s:
            return known
        if known is not None and not self._resolving.acquire(blocking=False):
            return known  # another thread asks the resolver, which may take seconds
        if known is None:
            self._resolving.acquire()
        try:
            known = self._members
            if known is None or self._clock.monotonic() >= self._resolve_at_s:
                known = self._members = self._resolved(known)
                self._resolve_at_s = self._clock.monotonic() + RESOLVE_EVERY_S
            return known
        finally:
            self._resolving.release()

    def _resolved(self, known: Members | None) -> Members:
        try:
            urls = tuple(self._options.urls())
        except (OSError, ValueError) as error:
            logger.warning("peers %s cannot be resolved: %s", ",".join(self._options.members), error)
            return known or Members.of(())
        return known if known is not None and known.urls == urls else Members.of(urls)

    def _live(self, url: str) -> _Peer | None:
        now_s = self._clock.monotonic()
        with self._lock:
            peer = self._peers.setdefault(url, _Peer(url))
            if peer.is_live:
                return peer
            if now_s < peer.absent_until_s or self._closed.is_set():
                return None
            peer.absent_until_s = now_s + LONGEST_ABSENCE_S  # until its result is known
            thread = Thread(target=self._try_again, args=(peer,), name="tiercache-peer", daemon=True)
            with suppress(RuntimeError):  # no more threads are allowed
                thread.start()
                self._threads.add(thread)
        return None

    def _try_again(self, peer: _Peer) -> None:
        """Let requests use a peer again if it answers anything to a request that nobody waits for."""
        start_s = self._clock.monotonic()
        try:
            with self._store_of(peer) as store:
                one_byte = [(ByteRange(0, 1), memoryview(bytearray(1)))]
                store.read_into("alive", one_byte, deadline_s=2 * CONNECT_S, cancel=self._closed)
        except (StoreError, OSError) as error:
            status = error.status if isinstance(error, StoreError) else None
            if isinstance(error, NotFound) or status in (HTTPStatus.SERVICE_UNAVAILABLE, OWN_REQUEST):
                peer.is_live = True
            elif not self._closed.is_set():
                self._failed(peer, error, self._clock.monotonic() - start_s)
        else:
            peer.is_live = True
        finally:
            with self._lock:
                self._threads.discard(current_thread())

    def _failed(self, peer: _Peer, error: Exception, lasted_s: float) -> None:
        self.counters.add("peer_failures")
        with self._lock:
            peer.n_failures += 1
            peer.is_live = False
            longest_s = min(FIRST_ABSENCE_S * 2.0 ** min(peer.n_failures - 1, 10), LONGEST_ABSENCE_S)
            absence_s = longest_s * _jitter.uniform(0.5, 1.0)
            peer.absent_until_s = self._clock.monotonic() + absence_s
            if lasted_s >= CONNECT_S:
                peer.silent.set()
                peer.silent = Event()
        is_refused = isinstance(error, StoreError) and error.status == HTTPStatus.UNAUTHORIZED
        hint = "; check peers_token" if is_refused else ""
        level = logging.WARNING if peer.n_failures == 1 else logging.INFO
        logger.log(level, "peer %s is left out for %.0f s: %s%s", peer.url, absence_s, error, hint)

    @contextmanager
    def _store_of(self, peer: _Peer) -> Iterator[RemoteStore]:
        with self._lock:
            if peer.store is None:
                try:
                    peer.store = self._open_peer(peer.url, self._options, self._reader_id)
                except ValueError as error:  # the file of certificates is gone
                    raise StoreError(str(error), url=peer.url) from error
            store = peer.store
            peer.n_users += 1
            idle = [one for one in self._peers.values() if one.store is not None and not one.n_users]
            for one in idle[MOST_IDLE_STORES:]:
                closed, one.store = one.store, None
                if closed is not None:
                    closed.close()
        try:
            yield store
        finally:
            with self._lock:
                peer.n_users -= 1

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(STALL_S)
        with self._lock:
            stores = [peer.store for peer in self._peers.values() if peer.store is not None]
            for peer in self._peers.values():
                peer.store = None
        for store in stores:
            with suppress(StoreError):
                store.close()


def open_peer_store(url: str, options: PeerOptions, reader_id: str) -> RemoteStore:
    """Return the HTTP store of a peer. Failed requests are not repeated: another peer, or the origin, is faster."""
    headers = {READER_HEADER: reader_id}
    if options.token is not None:
        headers["Authorization"] = f"Bearer {options.token}"
    given: dict[str, Any] = {"timeout": STALL_S, "connect_timeout": CONNECT_S, "read_timeout": STALL_S}
    if options.ca_file is not None:
        given["root_certificate"] = options.ca_file
    store = open_store(url, default_headers=headers, **given)
    if not isinstance(store, CloudStore):
        raise ValueError(f"not an address of a peer: {url!r}")
    return CloudStore(
        store.folder, store.options, ReadSettings(policy=RetryPolicy(n_attempts=1), n_requests=4, hedges=False)
    )


class _ReceiverError(Exception):
    """The receiver of pieces failed, such as a full disk of this machine: no fault of a peer."""


class PeerSource(WrapperStore):
    """Store of one object that is read from its owner, and from the origin if that fails.

    No byte is read from peers twice. A second request of the same bytes means that they were corrupt, or lost by a disk
    fault: then they come from the origin.
    """

    def __init__(self, peers: Peers, name: str, key: str, n_bytes: int, origin: Store) -> None:
        super().__init__(origin)
        self._peers, self._name, self._key = peers, name, key
        self._lock = Lock()
        self._taken = np.zeros(-(-n_bytes // _UNIT_BYTES), bool)
        self._refused: set[str] = set()
        self._source = f"{redact(origin.url)}/{key}"

    def report_corrupt(self) -> None:
        """Say that what was read is corrupt."""
        self._peers.report_corrupt(self._name, self._source)

    def read_into(
        self, key: str, spans: Sequence[Span], *, if_match: str | None = None, cancel: Event | None = None
    ) -> None:
        def read(store: RemoteStore, name: str, limit_s: float, end: Event) -> None:
            store.read_into(name, spans, deadline_s=limit_s, cancel=end)

        if not self._read_from_peer(key, [span for span, _ in spans], read, cancel):
            self.inner.read_into(key, spans, if_match=if_match, cancel=cancel)

    def read_pieces(
        self,
        key: str,
        ranges: Sequence[ByteRange],
        receive: Receive,
        *,
        if_match: str | None = None,
        cancel: Event | None = None,
    ) -> None:
        def receive_or_end(offset: int, data: memoryview) -> None:
            try:
                receive(offset, data)
            except Exception as error:
                raise _ReceiverError from error

        def read(store: RemoteStore, name: str, limit_s: float, end: Event) -> None:
            store.read_pieces(name, ranges, receive_or_end, deadline_s=limit_s, cancel=end)

        try:
            is_read = self._read_from_peer(key, ranges, read, cancel)
        except _ReceiverError as error:
            raise error.__cause__ or error  # noqa: B904 - the caller's own error, as it raised it
        if not is_read:
            self.inner.read_pieces(key, ranges, receive, if_match=if_match, cancel=cancel)

    def _read_from_peer(
        self,
        key: str,
        ranges: Sequence[ByteRange],
        read: Callable[[RemoteStore, str, float, Event], None],
        cancel: Event | None,
    ) -> bool:
        """Read ranges from a peer, if one has them and none of them was read from a peer before."""
        n_bytes = sum(span.n_bytes for span in ranges)
        if key != self._key or not n_bytes or not self._take(ranges):
            return False
        limit_s = STALL_S + n_bytes / SLOWEST_BYTES_S

        def request(store: RemoteStore, end: Event) -> bool:
            read(store, f"copies/{self._name}", limit_s, end)
            return True

        if self._peers.ask(self._name, request, self._refused, cancel, source=self._source) is None:
            return False
        self._peers.counters.add("peer_bytes", n_bytes)
        return True

    def _take(self, ranges: Sequence[ByteRange]) -> bool:
        units = [slice(span.start // _UNIT_BYTES, -(-span.end // _UNIT_BYTES)) for span in ranges]
        with self._lock:
            is_new = not any(self._taken[unit].any() for unit in units)
            for unit in units:
                self._taken[unit] = True
        return is_new
