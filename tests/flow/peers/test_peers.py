"""Who owns a copy, who is asked, and what happens if nobody answers; without a network."""

import errno
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count, islice
from threading import Barrier, Event

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.clock import FakeClock
from tests.support.http_server import HttpFault, HttpFaultServer

from tiercache import config
from tiercache.cache import Cache
from tiercache.cache.names import copy_spec
from tiercache.errors import NotFound, StoreError
from tiercache.model import ByteRange
from tiercache.peers.readers import (
    FIRST_ABSENCE_S,
    LONGEST_ABSENCE_S,
    RESOLVE_EVERY_S,
    STALL_S,
    Members,
    PeerOptions,
    Peers,
    expand_hosts,
)
from tiercache.store import MemoryStore
from tiercache.store.contract import WrapperStore
from tiercache.waiting import wait_for

KEYS = st.integers(0, 2**64 - 1)
URLS = st.lists(st.integers(0, 10_000).map(lambda n: f"http://m{n}:9740"), min_size=1, max_size=40, unique=True)

# -- configuration -----------------------------------------------------------------------------------------------------


def test_a_list_of_addresses_is_a_list_of_urls():
    for members, urls in (
        ("a, b:1234", ["http://a:9740", "http://b:1234"]),
        (["b", "https://a:1"], ["http://b:9740", "https://a:1"]),
        ("[fe80::1]:77", ["http://[fe80::1]:77"]),
        ("10.0.0.1,10.0.0.1", ["http://10.0.0.1:9740"]),
    ):
        assert PeerOptions.parse(members).urls() == urls


def test_what_is_no_address_is_refused():
    for members in ("http://a/path", "a:0", "a:70000", "a b", "dns:", "slurm,a", "http://user:secret@a", "file:///etc"):
        with pytest.raises(ValueError, match="peer"):
            PeerOptions.parse(members)


def test_a_certificate_file_means_tls(certificate, tmp_path):
    assert PeerOptions.parse("a,http://b", ca_file=str(certificate[0])).urls() == ["http://b:9740", "https://a:9740"]
    with pytest.raises(ValueError, match="root_certificate"):
        PeerOptions.parse("a", ca_file=str(tmp_path / "missing.pem"))


def test_a_dns_name_stands_for_all_its_addresses(monkeypatch):
    seen, addresses = [], ["10.0.0.2", "10.0.0.1", "fd00::1"]
    monkeypatch.setattr("tiercache.peers.readers.look_up_host", lambda *asked: seen.append(asked) or addresses)
    found = PeerOptions.parse("dns:peers.job.svc:81").urls()
    assert found == ["http://10.0.0.1:81", "http://10.0.0.2:81", "http://[fd00::1]:81"]
    assert seen == [("peers.job.svc", 81)]


def test_slurm_lists_of_nodes_are_expanded():
    for text, hosts in (
        ("gpu1", ["gpu1"]),
        ("gpu[001-003,7],login", ["gpu001", "gpu002", "gpu003", "gpu7", "login"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
        ("", []),
    ):
        assert expand_hosts(text) == hosts
    for text in ("gpu[1-", "gpu[a-b]", "gpu[]", "gpu]1["):
        with pytest.raises(ValueError, match="not a list of hosts"):
            expand_hosts(text)


def test_slurm_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
    assert PeerOptions.parse("slurm").urls() == ["http://gpu1:9740", "http://gpu2:9740"]
    assert PeerOptions.parse("slurm:80").urls() == ["http://gpu1:80", "http://gpu2:80"]


def test_the_settings_name_peers_and_never_show_the_token(monkeypatch, tmp_path):
    (tmp_path / "tiercache.toml").write_text('peers = ["a", "b:81"]\npeers_ca = "ca.pem"\n')
    monkeypatch.setenv("TIERCACHE_PEERS_TOKEN", "secret-token")
    settings = config.read_settings(tmp_path)
    assert (settings.peers, settings.peers_token) == ("a,b:81", "secret-token")
    assert settings.peers_ca == tmp_path / "ca.pem"
    assert "secret" not in repr(settings) + repr(PeerOptions.parse(settings.peers, settings.peers_token))


def test_a_token_that_a_header_cannot_hold_is_refused_without_being_shown(tmp_path):
    with pytest.raises(ValueError, match="token") as caught:
        Cache(tmp_path / "cache", size="1MB", peers=["a"], peers_token="bad token\r\n")
    assert "bad token" not in str(caught.value)


def test_the_default_cache_has_the_configured_peers_unless_it_is_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("TIERCACHE_PEERS", "a")
    with Cache.default(path=tmp_path / "cache", size="1MB") as cache:
        assert "peer_bytes" in cache.stats()
        with Cache.default(path=tmp_path / "cache", size="1MB", peers=False) as own:
            assert "peer_bytes" not in own.stats()


# -- choice of the owner -----------------------------------------------------------------------------------------------


@given(URLS, KEYS, st.randoms())
def test_all_machines_agree_on_the_order_of_owners(urls, key, rng):
    shuffled = rng.sample(urls, len(urls))
    order = list(Members.of(urls).order(key))
    assert list(Members.of(shuffled).order(key)) == order
    assert sorted(order) == sorted(urls)


@given(URLS, KEYS, st.data())
def test_if_a_machine_leaves_the_order_of_the_others_stays(urls, key, data):
    gone = data.draw(st.sampled_from(urls))
    left = [url for url in Members.of(urls).order(key) if url != gone]
    assert list(Members.of([url for url in urls if url != gone]).order(key)) == left


@pytest.mark.parametrize("n_machines", [2, 4, 7, 12])
def test_owners_are_balanced_and_what_a_lost_machine_owned_is_spread_over_all_others(n_machines):
    members = Members.of([f"http://10.0.{i // 256}.{i % 256}:9740" for i in range(n_machines)])
    keys = [random.Random(i).getrandbits(64) for i in range(n_machines * 400)]
    orders = [list(islice(members.order(key), 2)) for key in keys]
    owned = Counter(order[0] for order in orders)
    assert len(owned) == n_machines
    assert all(abs(n - 400) < 5 * 20 for n in owned.values())  # five standard deviations of a binomial count
    lost = max(owned)
    heirs = Counter(order[1] for order in orders if order[0] == lost)
    expected = sum(heirs.values()) / (n_machines - 1)
    assert all(abs(heirs[url] - expected) < 5 * expected**0.5 for url in members.urls if url != lost)


# -- asking ------------------------------------------------------------------------------------------------------------


class Answers:
    """Stores of scripted peers: each returns its URL, or raises its error. Records who was asked."""

    def __init__(self, urls):
        self.errors, self.asked, self.tried = dict.fromkeys(urls), [], []
        self.before_try = lambda: None

    def open(self, url, _options, _reader_id):
        answers = self

        class PeerStore(WrapperStore):
            def get(self, key):
                answers.asked.append(url)
                if answers.errors[url] is not None:
                    raise answers.errors[url]
                return url.encode()

            def read_into(self, key, spans, **_limits):
                answers.tried.append(url)
                answers.before_try()
                raise answers.errors[url] or NotFound("nothing", url=url)

        return PeerStore(MemoryStore(url.partition("//")[2].replace(":", "-"), ""))


class Asker:
    """Peers of a reader over scripted answers, with the owners of one key in order."""

    def __init__(self, n_machines=3):
        self.urls = [f"http://m{i}:9740" for i in range(n_machines)]
        self.answers, self.clock = Answers(self.urls), FakeClock()
        options = PeerOptions.parse([f"m{i}" for i in range(n_machines)])
        self.peers = Peers(options, "r" * 32, open_peer=self.answers.open, clock=self.clock)
        self.owners = list(Members.of(self.urls).order(0x7777777777777777))
        self.refused = set()

    def ask(self, cancel=None):
        del self.answers.asked[:]
        found = self.peers.ask("7" * 40, lambda store, _end: store.get("x"), self.refused, cancel)
        return None if found is None else found.decode()

    def finish_tries(self):
        assert wait_for(lambda: not self.peers._threads, 60)


def unreachable():
    return StoreError("cannot connect", url="http://m", retryable=True)


@pytest.fixture
def asker():
    asker = Asker()
    with closing(asker.peers):
        yield asker


def test_the_owner_is_asked_and_nobody_else(asker):
    assert asker.ask() == asker.owners[0]
    assert asker.answers.asked == asker.owners[:1]


def test_if_the_owner_fails_the_next_one_is_asked_and_the_owner_is_left_out_for_a_time(asker):
    asker.answers.errors[asker.owners[0]] = unreachable()
    assert asker.ask() == asker.owners[1]
    assert asker.ask() == asker.owners[1]
    assert asker.answers.asked == [asker.owners[1]]
    asker.answers.errors[asker.owners[0]] = None
    asker.clock.advance(FIRST_ABSENCE_S)
    asker.ask()
    asker.finish_tries()
    assert asker.ask() == asker.owners[0]


def test_a_peer_that_keeps_failing_is_tried_less_and_less_often_and_never_by_a_request(asker):
    asker.answers.errors[asker.owners[0]] = unreachable()
    asker.ask()
    for _ in range(600):
        assert asker.ask() == asker.owners[1]
        assert asker.owners[0] not in asker.answers.asked
        asker.finish_tries()
        asker.clock.advance(1.0)
    assert 600 / LONGEST_ABSENCE_S <= len(asker.answers.tried) <= 4 + 600 / (LONGEST_ABSENCE_S / 2)


def test_while_a_peer_is_tried_again_requests_go_on_without_it(asker):
    asker.answers.errors[asker.owners[0]] = unreachable()
    asker.ask()
    asker.answers.errors[asker.owners[0]] = None
    asker.clock.advance(FIRST_ABSENCE_S)
    is_answered = Event()
    asker.answers.before_try = lambda: is_answered.wait(60)
    assert [asker.ask() for _ in range(3)] == [asker.owners[1]] * 3
    is_answered.set()
    asker.finish_tries()
    assert asker.ask() == asker.owners[0]
    assert asker.answers.tried == [asker.owners[0]]


def test_a_request_that_fails_late_ends_the_others_at_the_same_peer(asker):
    others_run = Barrier(4)

    def request(store, end):
        url = store.get("x").decode()
        if url == asker.owners[0]:
            if others_run.wait(60) == 0:
                asker.clock.advance(STALL_S)
            else:
                assert wait_for(end.is_set, 60)
            raise unreachable()
        return url

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(asker.peers.ask, "7" * 40, request, set()) for _ in range(4)]
        assert [one.result() for one in found] == [asker.owners[1]] * 4
    assert asker.peers.counters.snapshot()["peer_failures"] == 1


def test_a_peer_that_does_not_serve_the_data_set_is_named_once_and_counted(asker, caplog):
    asker.answers.errors = dict.fromkeys(asker.urls, NotFound("no", url="m"))
    for _ in range(3):
        asker.refused = set()
        assert asker.ask() is None
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 2
    for url in asker.owners[:2]:
        assert sum(f"{url} does not serve" in text and "tiercache serve" in text for text in warnings) == 1
    assert asker.peers.counters.snapshot()["peer_not_served"] == 6


def test_at_most_two_machines_are_asked(asker):
    for url in asker.urls:
        asker.answers.errors[url] = unreachable()
    assert asker.ask() is None
    assert asker.answers.asked == asker.owners[:2]


@pytest.mark.parametrize("error", [NotFound("no", url="m"), StoreError("busy", url="m", status=503, retryable=True)])
def test_a_peer_that_cannot_serve_a_name_or_is_busy_still_serves_others(asker, error):
    asker.answers.errors[asker.owners[0]] = error
    assert asker.ask() == asker.owners[1]
    assert asker.refused == {asker.owners[0]}
    asker.answers.errors[asker.owners[0]] = None
    asker.refused = set()
    assert asker.ask() == asker.owners[0]
    assert asker.peers.counters.snapshot()["peer_failures"] == 0


def test_what_this_machine_owns_it_reads_from_the_origin(asker):
    asker.answers.errors[asker.owners[0]] = StoreError("misdirected", url="http://m", status=421)
    assert asker.ask() is None
    assert asker.ask() is None
    assert asker.answers.asked == []


def test_a_cancelled_request_says_nothing_about_the_peer(asker):
    cancel = Event()
    cancel.set()
    asker.answers.errors[asker.owners[0]] = unreachable()
    assert asker.ask(cancel) is None
    asker.answers.errors[asker.owners[0]] = None
    assert asker.ask() == asker.owners[0]


def test_few_idle_connections_stay_open(monkeypatch):
    monkeypatch.setattr("tiercache.peers.readers.MOST_IDLE_STORES", 2)
    asker = Asker(9)
    with closing(asker.peers):
        for key in range(40):
            assert asker.peers.ask(f"{key:040x}"[::-1], lambda store, _end: store.get("x"), set())
        assert sum(peer.store is not None for peer in asker.peers._peers.values()) <= 3


def test_addresses_behind_a_name_are_read_again_and_kept_while_the_resolver_fails(monkeypatch):
    addresses, clock = [["10.0.0.1"], ["10.0.0.1", "10.0.0.2"], OSError("no resolver"), ["10.0.0.2"]], FakeClock()

    def look_up(_name, _port):
        found = addresses.pop(0)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr("tiercache.peers.readers.look_up_host", look_up)
    peers = Peers(PeerOptions.parse("dns:job"), "r", clock=clock)
    seen = []
    for _ in range(4):
        seen.append([url[7:15] for url in peers._current().urls])
        clock.advance(RESOLVE_EVERY_S)
    assert seen == [["10.0.0.1"], ["10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2"], ["10.0.0.2"]]


# -- copies and versions through the cache -----------------------------------------------------------------------------


class ScriptedPeer(WrapperStore):
    """A peer that serves objects by the names of their copies, and records its answers."""

    def __init__(self):
        super().__init__(MemoryStore("peer", ""))
        self.copies, self.reads, self.suspects = {}, [], []

    def get(self, key):
        self.suspects.append(key.removeprefix("suspects/"))
        return b""

    def read_into(self, key, spans, **_limits):
        data = self.copies.get(key.removeprefix("copies/"))
        if data is None:
            raise NotFound("no such copy", url="http://m")
        for span, buffer in spans:
            self.reads.append(span)
            buffer[:] = data[span.start : span.end]

    def read_pieces(self, key, ranges, receive, **_limits):
        super().read_pieces(key, ranges, receive)


@pytest.fixture
def peer(monkeypatch):
    peer = ScriptedPeer()
    monkeypatch.setattr("tiercache.peers.readers.open_peer_store", lambda *_: peer)
    return peer


def name_of(world, key):
    return copy_spec(world.folder, key, world.identity(key)).name


def test_a_copy_comes_from_its_owner_and_not_from_the_origin(world, peer):
    world.put("a", 3_000_000)
    peer.copies[name_of(world, "a")] = world.data["a"]
    cache = world.cache(peers=["m"])
    world.fetch(world.store(cache), "a")
    assert world.n_reads() == 0
    assert cache.stats()["peer_bytes"] == 3_000_000


@pytest.mark.parametrize("n_bytes", [5_000, 20_000_000])
def test_bytes_that_a_peer_sends_wrong_are_fetched_from_the_origin_and_reported(world, peer, n_bytes, caplog):
    world.put("a", n_bytes)
    wrong = bytearray(world.data["a"])
    wrong[n_bytes // 2] ^= 1
    peer.copies[name_of(world, "a")] = bytes(wrong)
    cache = world.cache(size="50MB", peers=["m"])
    world.fetch(world.store(cache), "a")
    assert world.n_reads() > 0
    assert cache.stats()["poisoned"] == 0
    assert sum(span.n_bytes for span in peer.reads) == n_bytes  # each byte once
    assert cache.stats()["peer_corrupt"] == 1
    assert peer.suspects == [name_of(world, "a")]
    assert "peer http://m:9740 sent corrupt bytes of" in caplog.text


def test_a_partial_copy_that_readers_find_wrong_is_fetched_from_the_origin(world, peer):
    world.put("a", 3_000_000)
    peer.copies[name_of(world, "a")] = bytes(3_000_000)
    cache = world.cache(peers=["m"])
    store = world.store(cache)
    span = ByteRange(0, 8192)
    for _ in range(2):
        with store.open_local("a", world.identity("a")) as lease:
            assert lease.wait([span])
            data = memoryview(bytearray(8192))
            assert lease.read([(span, data)])
        if bytes(data) == world.data["a"][:8192]:
            break
        assert store.remove_if_corrupt("a", world.identity("a"))
    assert bytes(data) == world.data["a"][:8192]
    assert (cache.stats()["peer_corrupt"], peer.suspects) == (1, [name_of(world, "a")])


def test_ranges_past_the_cache_come_from_the_owner_once_and_then_from_the_origin(world, peer):
    world.put("a")
    peer.copies[name_of(world, "a")] = world.data["a"]
    store = world.store(world.cache(peers=["m"]))
    source = store.store_for("a", world.identity("a"), world.inner)
    for n_reads in (0, 1):
        data = memoryview(bytearray(100))
        source.read_into("a", [(ByteRange(9_000, 9_100), data)])
        assert bytes(data) == world.data["a"][9_000:9_100]
        assert world.n_reads() == n_reads


def test_an_error_of_the_receiver_is_raised_and_is_no_failure_of_the_peer(world, peer):
    world.put("a")
    peer.copies[name_of(world, "a")] = world.data["a"]
    cache = world.cache(peers=["m"])
    source = world.store(cache).store_for("a", world.identity("a"), world.inner)

    def full_disk(_offset, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        source.read_pieces("a", [ByteRange(0, 10_000)], full_disk)
    assert (len(peer.reads), world.n_reads(), cache.stats()["peer_failures"]) == (1, 0, 0)


@pytest.mark.parametrize(
    "fault",
    [
        HttpFault("status", status=500),
        HttpFault("status", status=503),
        HttpFault("status", status=416),
        HttpFault("status", status=302, header=(("Location", "http://127.0.0.1:1/"),)),
        HttpFault("status", status=200, body=b"<html>not what was asked for</html>"),
        HttpFault("reset"),
        HttpFault("reset", n_bytes=0),
        HttpFault("short"),
        HttpFault("stall"),
        HttpFault("silence"),
        HttpFault("whole"),
        HttpFault("replace"),
        HttpFault("drop"),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.n_bytes}",
)
def test_whatever_a_peer_answers_the_copy_is_right(world, monkeypatch, fault):
    monkeypatch.setattr("tiercache.peers.readers.STALL_S", 0.3)
    for key in ("a", "b", "c"):
        world.put(key, 300_000)
    answers = count()
    with HttpFaultServer({f"copies/{name_of(world, key)}": world.data[key] for key in "abc"}) as server:
        server.when(lambda _method, _path: fault if next(answers) % 3 else None)
        for key in "abc":
            # A process each: one that met a fault leaves the peer out.
            with closing(world.cache(name=f"cache-{key}", peers=[server.url])) as cache:
                world.fetch(world.store(cache), key)
                assert cache.stats()["poisoned"] == 0
        assert next(answers) >= 3
