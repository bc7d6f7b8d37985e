"""Batches on a CUDA device: what the fake device of test_device.py cannot show."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.support.records import ids_of

import tiercache as tc

pytestmark = pytest.mark.gpu

N = 403
SLEEP_CYCLES = 20_000_000  # some 10 ms


def loader_of(dataset, **options):
    more = {"seed": 3, "device": "cuda"} | options
    return tc.DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True, options=tc.LoaderOptions(**more))


@pytest.fixture
def dataset(make_dataset):
    return tc.Dataset(make_dataset(N), columns=["id", "tokens", "flag"])


def expected_of(dataset):
    return [{name: value.clone() for name, value in batch.items()} for batch in loader_of(dataset, device=None)]


def test_every_column_is_right_on_the_device(make_dataset):
    path = make_dataset(N)
    assert ids_of(loader_of(tc.Dataset(path))) == ids_of(loader_of(tc.Dataset(path), device=None))
    batch = next(iter(loader_of(tc.Dataset(path, layouts={"boxes": "buffer", "text": "nested", "blob": "padded"}))))
    assert all(
        t.is_cuda for t in (batch["id"], batch["boxes"].values, batch["text"], batch["blob"], batch["score.valid"])
    )


@pytest.mark.parametrize("buffers", ["new", "fixed"])
def test_copies_come_from_pinned_memory_and_later_epochs_take_no_more_of_the_device_or_the_host(dataset, buffers):
    loader = loader_of(dataset, device_buffers=buffers)
    found = []
    for _ in range(3):
        for batch in loader:
            del batch  # the memory of a new buffer is used again
            torch.cuda._sleep(SLEEP_CYCLES)
        torch.cuda.synchronize()
        blocks = loader._engine._device.pinned._blocks
        assert all(block.is_pinned() for block, _ in blocks.values())
        found.append((torch.cuda.memory_stats()["segment.all.allocated"], sorted(blocks)))
    assert found[1:] == found[:1] * 2
    assert loader.stats()["unpinned"] == 0


def test_copies_are_made_while_the_device_works_and_exposed_waits_are_told(dataset):
    loader = loader_of(dataset)
    for _ in loader:
        torch.cuda._sleep(SLEEP_CYCLES)
    torch.cuda.synchronize()
    exposed = loader.stats()["exposed_wait_s"]
    assert 0 <= exposed["mean"] <= exposed["total"]
    assert exposed["mean"] < 0.005  # of some 10 ms of work between two batches


@pytest.mark.parametrize("buffers", ["new", "fixed"])
def test_batches_are_right_while_the_device_is_busy(dataset, buffers):
    # Nothing is read on the host until the end, so the host runs ahead of the device as far as it may.
    found = []
    for batch in loader_of(dataset, device_buffers=buffers, memory_bytes=1):
        torch.cuda._sleep(SLEEP_CYCLES)
        found.append({name: value.clone() for name, value in batch.items()})
        del batch
    for batch, other in zip(found, expected_of(dataset), strict=True):
        assert all(torch.equal(batch[name].cpu(), other[name]) for name in other)


def test_batches_are_right_when_the_current_stream_changes(dataset):
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    found = []
    iterator = iter(loader_of(dataset, device_batches=3))
    for stream in itertools.cycle(streams):
        with torch.cuda.stream(stream):
            batch = next(iterator, None)
            if batch is None:
                break
            torch.cuda._sleep(SLEEP_CYCLES)
            found.append({name: value.clone() for name, value in batch.items()})
            del batch
    torch.cuda.synchronize()
    for batch, other in zip(found, expected_of(dataset), strict=True):
        assert all(torch.equal(batch[name].cpu(), other[name]) for name in other)


def test_a_captured_graph_reads_the_batches_of_fixed_buffers(dataset):
    iterator = iter(loader_of(dataset, device_buffers="fixed"))
    batch = next(iterator)
    addresses = {name: value.data_ptr() for name, value in batch.items()}
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        batch["tokens"].long().sum(1)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = batch["tokens"].long().sum(1) + batch["id"]
    sums = []
    while batch is not None:
        assert {name: value.data_ptr() for name, value in batch.items()} == addresses
        graph.replay()
        sums.append(out.clone())
        batch = next(iterator, None)
    for got, other in zip(sums, expected_of(dataset), strict=True):
        assert torch.equal(got.cpu(), other["tokens"].long().sum(1) + other["id"])


@pytest.mark.parametrize("buffers", ["new", "fixed"])
def test_a_compiled_step_takes_the_batches(dataset, buffers):
    @torch.compile
    def step(batch):
        return batch["tokens"].float().mean(1) + batch["id"] * batch["flag"]

    found = [step(batch).clone() for batch in loader_of(dataset, device_buffers=buffers)]
    for got, other in zip(found, expected_of(dataset), strict=True):
        assert torch.allclose(got.cpu(), other["tokens"].float().mean(1) + other["id"] * other["flag"])
