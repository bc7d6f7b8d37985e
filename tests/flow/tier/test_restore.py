"""Restores of archived objects: cost, requests, waits, and the copy to the home tier."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from tests.support.clock import FakeClock

from tiercache.errors import StoreError
from tiercache.model import ObjectInfo
from tiercache.prices import Prices, RestorePrice
from tiercache.store import MemoryStore
from tiercache.tier.recall import plan_restore, request_restore, wait_restored
from tiercache.tier.rules import RuleFile, Tier
from tiercache.tier.stores import Stores

HOUR_S = 3600.0
GLACIER = Prices(
    "glacier",
    restore={"standard": RestorePrice(gb=0.01, per_1000=0.05, hours=5), "bulk": RestorePrice(gb=0.0, hours=12)},
)
FREE = Prices("free")
_numbers = count()


class Vault:
    """An archive over a MemoryStore: every object is in GLACIER, and a restore takes five hours of its clock."""

    def __init__(self, clock):
        self.store = MemoryStore(f"vault-{next(_numbers)}")
        self.clock = clock
        self.ready_s: dict[str, float] = {}

    def head(self, key):
        info, said = self.store.head(key), None
        if key in self.ready_s:
            is_ready = self.ready_s[key] <= self.clock.monotonic()
            done = 'ongoing-request="false", expiry-date="Fri, 21 Dec 2040 00:00:00 GMT"'
            said = done if is_ready else 'ongoing-request="true"'
        return ObjectInfo(key, info.n_bytes, info.etag, storage_class="GLACIER", restore=said)

    def restore(self, key, *, days, speed):
        self.ready_s[key] = self.clock.monotonic() + 5 * HOUR_S
        return "started"


class World:
    """Two tiers: home, and a vault."""

    def __init__(self, clock):
        self.vault, home = Vault(clock), MemoryStore(f"home-{next(_numbers)}")
        vault = Tier(name="vault", url=self.vault.store.url, storage_class="GLACIER")
        tiers = (Tier(name="home", url=home.url), vault)
        self.file = RuleFile(path=Path("/etc/tiers.toml"), sha256="of the file", tiers=tiers)
        stores = {"home": home, "vault": self.vault.store}
        self.stores = Stores(self.file, stores=stores, s3_classes={"vault": self.vault})

    def plan(self, *keys, prices=(FREE, GLACIER), **more):
        return plan_restore(self.file, self.stores, [("vault", key) for key in keys], prices, to="home", **more)

    def archive(self, **objects):
        for key, n_bytes in objects.items():
            self.vault.store.put(key, bytes(n_bytes))


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def world(clock):
    return World(clock)


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_restore_costs_the_temporary_copy_and_the_copy_to_home(world):
    world.archive(a=1 << 24, b=1 << 24)  # 1/32 GiB, of two parts each
    home = Prices("home", put_1000=0.005)
    archive = replace(GLACIER, get_1000=0.0004, standard_gb_month=0.023)
    retrieved = 0.01 / 32 + 2 * 0.05 / 1000
    copied = world.plan("a", "b", prices=(home, archive)).cost
    requests = (2 * 2 * 0.0004 + 2 * 4 * 0.005) / 1000  # two parts, a begin and an end each
    assert copied == pytest.approx(retrieved + 0.023 / 32 * 3 / 30 + requests)


def test_an_unsupported_speed_is_refused_with_the_supported_ones(world):
    world.archive(a=1)
    with pytest.raises(ValueError, match="'expedited' for restores; it has standard, bulk"):
        world.plan("a", speed="expedited")


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_a_wait_ends_when_all_objects_can_be_read(world, clock):
    world.archive(**{f"k{number}": 1 for number in range(40)})
    plan, told = world.plan(*(f"k{number}" for number in range(40))), []
    request_restore(world.stores, plan)
    start_s = clock.monotonic()
    plan = world.plan(*(one.key for one in plan.objects))
    assert wait_restored(world.stores, plan, clock=clock, on_progress=lambda n, of: told.append((n, of))) == ()
    assert 5 * HOUR_S <= clock.monotonic() - start_s <= 5 * HOUR_S + 61
    assert told[-1] == (40, 40)


def test_an_object_that_is_not_being_restored_is_an_error(world, clock):
    world.archive(a=1)
    with pytest.raises(StoreError, match="neither restored nor being restored"):
        wait_restored(world.stores, world.plan("a"), clock=clock)


# -- moto -------------------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_on_seaweedfs_a_restore_reports_that_classes_are_only_labels(s3_server):
    tier = Tier(
        name="vault", url=f"{s3_server.url}/restore-{os.urandom(4).hex()}", storage_class="GLACIER",
        storage_options=s3_server.storage_options,
    )  # fmt: skip
    file = RuleFile(path=Path("t.toml"), sha256="", tiers=(tier,))
    with Stores(file) as stores:
        with stores.s3_classes("vault").create("a", storage_class="GLACIER") as upload:
            upload.put_part(0, b"x")
            upload.complete()
        with pytest.raises(StoreError, match="only labels"):
            request_restore(stores, plan_restore(file, stores, [("vault", "a")], [None], to="vault"))
