"""Machines serve their caches to each other: the service on its Unix socket, nginx in front of it, and whole jobs."""

import http.client
import random
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from tests.support.cache_world import turn
from tests.support.clock import FakeClock
from tests.support.faults import Fault, FaultStore
from tests.support.http_server import HttpFaultServer
from tests.support.peer_machines import Machine, data_set_objects, read_all_records
from tests.support.stores import GateStore

import tiercache as tc
from tiercache.errors import StoreError
from tiercache.peers.server import (
    REFRESH_EVERY_S,
    PeerService,
    Refusal,
    ServedDataSet,
    ServerOptions,
    run_service,
)
from tiercache.shard.versions import latest, read_shards
from tiercache.store import LocalFolder, open_store
from tiercache.store.remote import RequestTimes
from tiercache.waiting import wait_for

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (package nginx-light)")


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The objects of a data set of 2.4 MB in ten shards."""
    return data_set_objects(tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def records(objects, tmp_path_factory):
    """The records of that data set, read without a cache."""
    return read_all_records(str(folder_of(objects, tmp_path_factory.mktemp("records"))), False)


@pytest.fixture
def origin(objects):
    with HttpFaultServer(dict(objects)) as server:
        yield server


def folder_of(objects, folder):
    for path, data in objects.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder / "ds"


# -- the configuration -------------------------------------------------------------------------------------------------


def options_in(tmp_path, **more):
    return ServerOptions(tmp_path / "cache", tmp_path / "s", "0" * 32, **more)


def test_values_that_could_change_the_configuration_are_refused(tmp_path):
    for more in (
        {"token": 'x"; return 200; #'},
        {"token": "short"},
        {"address": "0.0.0.0; root /"},
        {"port": 0},
        {"tls_cert": Path("/cert.pem")},
        {"tls_cert": Path("/cert;.pem"), "tls_key": Path("/key.pem")},
    ):
        with pytest.raises(ValueError, match=r"token|address|port|TLS|nginx"):
            options_in(tmp_path, **more)
    for name in ("a;b", "a$b", 'a"b', "a\nb", "a{b}"):
        with pytest.raises(ValueError, match="nginx"):
            options_in(tmp_path / name)


# -- the service -------------------------------------------------------------------------------------------------------


class Service:
    """A service over a data set in a local folder, and requests to it."""

    def __init__(self, tmp_path, source, size="64MB"):
        self.path = tmp_path / "s"
        self.cache = tc.Cache(tmp_path / "cache", size=size, min_free="0%")
        self.store = self.cache.store(source)
        self.service = PeerService([self.store])
        self.version = latest(source)
        self.shards = read_shards(source, self.version)
        self.names = [
            self.store.spec_of(info.name, info.identity(self.version.dataset_id)).name for info in self.shards.infos()
        ]

    def get(self, path, headers=None, method="GET"):
        """Status, header fields and body of an answer; of a complete copy, as nginx sends it."""
        with closing(UnixConnection(str(self.path))) as connection:
            connection.request(method, path, headers=headers or {})
            answer = connection.getresponse()
            body, file = answer.read(), answer.headers.get("X-Accel-Redirect")
        if file is not None:
            assert body == b""
            body = (self.cache.path / "copies" / file.removeprefix("/complete/")).read_bytes()
        return answer.status, dict(answer.headers), body


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


@pytest.fixture
def source(objects, tmp_path):
    return LocalFolder(folder_of(objects, tmp_path / "source"))


@pytest.fixture
def service(tmp_path, source):
    service = Service(tmp_path, source)
    with run_service(service.cache, service.service, service.path):
        yield service


def shard_bytes(service, i):
    return service.store.inner.get(service.shards.info(i).name)


def test_ranges_of_a_copy_that_is_not_cached_are_fetched_and_served(service):
    data = shard_bytes(service, 3)
    status, headers, body = service.get(f"/copies/{service.names[3]}", {"Range": "bytes=100-5099"})
    assert (status, body) == (206, data[100:5100])
    assert headers["Content-Range"] == f"bytes 100-5099/{len(data)}"
    assert service.get(f"/copies/{service.names[3]}")[::2] == (200, data)
    assert service.get(f"/copies/{service.names[4]}", {"Range": "bytes=5-99999999"})[2] == shard_bytes(service, 4)[5:]


def test_other_requests_are_refused(service):
    copy = f"/copies/{service.names[0]}"
    for text in ("bytes=9-5", "bytes=-5", "bytes=5-", "bytes=0-1,5-6", "lines=1-2", "bytes=x-y"):
        assert service.get(copy, {"Range": text})[0] == 400, text
    assert service.get(copy, {"Range": "bytes=99999999-999999999"})[0] == 416
    assert service.get("/copies/" + "0" * 40)[0] == 503  # the versions were read a moment ago
    for path in ("/copies/" + "0" * 39, "/tiercache-cache.json", "http://example.com/x"):
        assert service.get(path)[0] == 404, path
    assert service.get(copy, {"X-Tiercache-Reader": service.cache.folder_id})[0] == 421, "of the own folder"


def test_what_the_cache_has_no_space_for_is_refused(tmp_path, source):
    service = Service(tmp_path, source, size="100KB")
    with run_service(service.cache, service.service, service.path):
        assert service.get(f"/copies/{service.names[0]}")[0] == 503


def test_a_store_that_fails_is_a_bad_gateway(tmp_path, source):
    faults = FaultStore(source, [Fault("read_into", keys="shards/*", retryable=False, times=99)])
    service = Service(tmp_path, faults)
    with run_service(service.cache, service.service, service.path):
        assert service.get(f"/copies/{service.names[0]}")[0] == 502


def test_a_copy_whose_bytes_on_disk_are_wrong_is_not_served(service):
    name = service.names[2]
    service.get(f"/copies/{name}", {"Range": "bytes=0-4095"})
    part = service.cache.path / "copies" / f"{name}.part"
    with part.open("r+b") as file:
        file.write(b"\1" * 100)
    status, _, body = service.get(f"/copies/{name}", {"Range": "bytes=0-4095"})
    assert status == 503 or body == shard_bytes(service, 2)[:4096]
    assert service.get(f"/copies/{name}", {"Range": "bytes=0-4095"})[::2] == (206, shard_bytes(service, 2)[:4096])


def test_more_requests_than_it_can_hold_are_told_to_ask_elsewhere(tmp_path, source, monkeypatch):
    monkeypatch.setattr("tiercache.peers.server.MOST_REQUESTS", 2)
    gated = GateStore(source)
    with gated.stop_at("before_read_into", "shards/*") as gate:
        service = Service(tmp_path, gated)
        with run_service(service.cache, service.service, service.path), ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(service.get, f"/copies/{service.names[0]}") for _ in range(2)]
            gate.wait_reached()
            assert wait_for(lambda: service.get("/copies/" + "0" * 40)[0] == 503, 30)
            gate.open()
            assert {answer.result()[0] for answer in answers} == {200}
            assert service.get(f"/copies/{service.names[0]}")[0] == 200


def test_a_version_that_is_committed_later_is_served_after_a_moment(tmp_path, source):
    clock, cache = FakeClock(), tc.Cache(tmp_path / "cache", size="64MB", min_free="0%")
    with cache:
        served = ServedDataSet(cache.store(source), clock=clock)
        first = latest(source)
        old = names_of_version(cache.store(source), first)
        assert all(served.find(name) for name in old)
        with tc.Writer(source.root, mode="overwrite", schema={"id": "int64", "data": "bytes"}) as writer:
            writer.write({"id": 0, "data": b"new"})
        (new,) = names_of_version(cache.store(source), latest(source))
        with pytest.raises(Refusal):  # it may have it: the versions were read a moment ago
            served.find(new)
        clock.advance(REFRESH_EVERY_S)
        assert served.find(new) is not None
        later = ServedDataSet(cache.store(source), clock=clock)  # a server that starts now
        assert later.find(old[0]) is not None
        clock.advance(REFRESH_EVERY_S)
        assert later.find("0" * 40) is None


def test_a_data_set_that_is_created_again_at_the_same_url_is_served_and_not_the_former_one(tmp_path, source):
    clock = FakeClock()
    with tc.Cache(tmp_path / "cache", size="64MB", min_free="0%") as cache:
        store = cache.store(source)
        service = PeerService([store], clock=clock)
        old_names = names_of_version(store, latest(source))
        assert service.data_sets[0].find(old_names[0])
        shutil.rmtree(source.root)
        with tc.Writer(source.root, schema={"id": "int64"}) as writer:
            writer.write({"id": 0})
        clock.advance(REFRESH_EVERY_S)
        (new_name,) = names_of_version(store, latest(source))
        assert service.data_sets[0].find(new_name)


def names_of_version(store, version):
    infos = read_shards(store.inner, version).infos()
    return [store.spec_of(info.name, info.identity(version.dataset_id)).name for info in infos]


def test_a_data_set_whose_store_fails_does_not_keep_others_from_being_served(tmp_path, source, objects):
    other = LocalFolder(folder_of(objects, tmp_path / "other"))
    failing = FaultStore(other, [Fault("get", retryable=False, times=999)])
    with tc.Cache(tmp_path / "cache", size="64MB", min_free="0%") as cache:
        store = cache.store(source)
        service = PeerService([cache.store(failing), store])
        (name, *_) = names_of_version(store, latest(source))
        with pytest.raises(StoreError):
            service.open("0" * 40)
        with pytest.raises(Refusal):  # the store is not asked again at once
            service.open("0" * 40)
        lease, *_ = service.open(name)
        lease.close()


# -- nginx -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def machines(origin, tmp_path):
    """Four machines, each with a folder and an nginx of its own."""
    machines = [Machine(tmp_path / f"m{i}", [f"{origin.url}/ds"]) for i in range(4)]
    urls = [machine.url for machine in machines]
    with ExitStack() as stack:
        for machine in machines:
            machine.folder.mkdir()
            stack.enter_context(machine.run(urls))
        yield machines


def raw_status(machine, request):
    """The status of the answer to these bytes."""
    with closing(socket.create_connection(("127.0.0.1", machine.port), 30)) as connection:
        connection.sendall(request)
        return int(connection.makefile("rb").readline().split()[1])


@needs_nginx
def test_nginx_serves_nothing_but_copies_by_name(origin, tmp_path):
    machine = Machine(tmp_path, [f"{origin.url}/ds"])
    with machine.open_cache() as cache:
        read_all_records(f"{origin.url}/ds", cache)
        name = sorted(path.name for path in (cache.path / "copies").iterdir() if "." not in path.name)[0]
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "cache/copies" / ("f" * 40)).symlink_to(tmp_path / "secret")
    with machine.run():
        assert raw_status(machine, b"GET /copies/%s HTTP/1.0\r\n\r\n" % name.encode()) == 200
        for path in (
            "/", "/copies", "/copies/", "/tiercache-cache.json", "/catalog.sqlite", f"/copies/{name}.json",
            f"/copies/{name}.pin", f"/copies/{name}/", f"/copies/{name}%00", f"/copies/{name}%0a", "/copies/%0a",
            f"//copies/{name}.json", f"/copies//{name}.json",
            "/copies/../tiercache-cache.json", "/copies/..%2ftiercache-cache.json", "/copies/%2e%2e/catalog.sqlite",
            "/copies/" + "f" * 40, "/copies/" + "../" * 20 + "etc/passwd", "/locks/" + name, f"/copies/{name.upper()}",
            "/objects/x/latest", "/@fetch",
        ):  # fmt: skip
            assert raw_status(machine, f"GET {path} HTTP/1.0\r\n\r\n".encode()) in (400, 403, 404, 503), path
        for method in ("PUT", "POST", "DELETE", "MKCOL", "COPY", "MOVE", "PATCH", "TRACE", "OPTIONS"):
            request = f"{method} /copies/{name} HTTP/1.0\r\nContent-Length: 0\r\n\r\n".encode()
            assert raw_status(machine, request) in (405, 501), method
        own = f"GET /copies/{name} HTTP/1.0\r\nX-Tiercache-Reader: {cache.folder_id}\r\n\r\n".encode()
        assert raw_status(machine, own) == 421
        assert raw_status(machine, b"GET /complete/%s HTTP/1.0\r\n\r\n" % name.encode()) in (404, 503)
    assert (tmp_path / "cache/copies" / name).exists()


@needs_nginx
def test_copies_of_data_sets_that_were_not_named_are_not_served(origin, tmp_path):
    with tc.Writer(tmp_path / "named", schema={"id": "int64"}) as writer:
        writer.write({"id": 0})
    machine = Machine(tmp_path, [str(tmp_path / "named")])
    with machine.open_cache() as cache:
        read_all_records(f"{origin.url}/ds", cache)
        names = [path.name for path in (cache.path / "copies").iterdir() if "." not in path.name]
    with machine.run():
        statuses = {raw_status(machine, f"GET /copies/{name} HTTP/1.0\r\n\r\n".encode()) for name in names}
    assert statuses <= {404, 503}


@needs_nginx
def test_readers_are_told_that_a_machine_serves_another_data_set(origin, tmp_path, records, caplog):
    with tc.Writer(tmp_path / "named", schema={"id": "int64"}) as writer:
        writer.write({"id": 0})
    machine = Machine(tmp_path, [str(tmp_path / "named")])
    with machine.run(), tc.Cache(tmp_path / "r", size="64MB", min_free="0%", peers=[machine.url]) as cache:
        assert read_all_records(f"{origin.url}/ds", cache) == records
        assert cache.stats()["peer_not_served"] > 0
    assert caplog.text.count(f"peer {machine.url} does not serve the data set of {origin.url}/ds/") == 1


@needs_nginx
def test_corrupt_copies_of_a_machine_are_named_by_their_reader_and_repaired(origin, tmp_path, records, caplog):
    machine = Machine(tmp_path / "m", [f"{origin.url}/ds"])
    machine.folder.mkdir()
    with machine.open_cache() as cache:
        read_all_records(f"{origin.url}/ds", cache)
        cache.warm(*shards_of(origin))
        copies = [path for path in (cache.path / "copies").iterdir() if "." not in path.name]
        whole = {path: path.read_bytes() for path in copies if path.stat().st_size > 100_000}
        assert len(whole) >= 9
    for path, data in whole.items():
        turn(path, 4096 if path.name < "8" else len(data) - 40)  # in a block, or in the footer
    with machine.run(), tc.Cache(tmp_path / "r", size="64MB", min_free="0%", peers=[machine.url]) as cache:
        assert read_all_records(f"{origin.url}/ds", cache) == records
        assert cache.stats()["peer_corrupt"] >= len(whole)
        assert cache.stats()["poisoned"] == 0
        assert f"peer {machine.url} sent corrupt bytes of {origin.url}/ds/shards" in caplog.text
        assert wait_for(lambda: all(not path.exists() or path.read_bytes() == whole[path] for path in whole), 60)


def shards_of(origin):
    store = open_store(f"{origin.url}/ds")
    version = latest(store)
    return store, [(info.name, info.identity(version.dataset_id)) for info in read_shards(store, version).infos()]


@pytest.fixture
def no_repeats(monkeypatch):
    """No request is hedged or sent again because it is late: a test that counts bytes may run on a loaded machine."""
    monkeypatch.setattr(RequestTimes, "take_hedge", lambda *_: False)


@needs_nginx
@pytest.mark.usefixtures("no_repeats")
def test_the_origin_sends_one_copy_to_four_machines_that_read_at_once(machines, origin, objects, records):
    urls = [machine.url for machine in machines]

    def read(i):
        with machines[i].open_cache(peers=urls) as cache:
            order = np.random.default_rng(i).permutation(len(records))
            return read_all_records(f"{origin.url}/ds", cache, order), cache.stats()

    with ThreadPoolExecutor(4) as pool:
        for found, stats in pool.map(read, range(4)):
            assert found == records
            assert stats["peer_failures"] == 0
            assert stats["peer_bytes"] > 0
    assert origin.n_bytes_sent <= 1.05 * sum(map(len, objects.values()))


@needs_nginx
def test_killing_peers_changes_nothing_but_the_time(machines, origin, records, monkeypatch):
    """One machine after the other reads all records with an empty cache, while another one is killed and returns."""
    rng = random.Random(5)
    monkeypatch.setattr("tiercache.peers.readers.FIRST_ABSENCE_S", 0.05)
    urls = [machine.url for machine in machines]
    for i in range(3):
        reader, victim = rng.sample(machines, 2)
        with reader.open_cache(peers=urls) as cache, ThreadPoolExecutor(1) as pool:
            cache.evict()
            order = np.random.default_rng(i).permutation(len(records))
            reading = pool.submit(read_all_records, f"{origin.url}/ds", cache, order)
            victim.kill()
            victim.start(urls)
            assert reading.result() == records


@needs_nginx
def test_peers_demand_their_token_and_are_reached_by_tls(origin, records, tmp_path, certificate):
    authority, own = certificate
    token = "0123456789abcdef"
    machine = Machine(tmp_path, [f"{origin.url}/ds"], token=token, tls_cert=own, tls_key=own)
    with machine.run():
        for i, (given, ca, is_served) in enumerate(
            [
                (token, authority, True),
                (token.upper(), authority, False),
                (None, authority, False),
                (token, None, False),
            ]
        ):
            options = {"peers": [machine.url], "peers_token": given, "peers_ca": ca}
            with tc.Cache(tmp_path / f"r{i}", size="64MB", min_free="0%", **options) as cache:
                assert read_all_records(f"{origin.url}/ds", cache) == records
                assert (cache.stats()["peer_bytes"] > 0) == is_served
