"""Batches on a device: slots, order, events, errors and close on a fake device, and the rules of stream memory."""

from __future__ import annotations

import random
import threading
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.flow.load.test_on_corrupt import strike
from tests.support.fake_device import FakeDevice, install
from tests.support.records import check_batch, ids_of
from torch.utils._python_dispatch import TorchDispatchMode

import tiercache as tc
from tiercache.data.output_spec import Buffer
from tiercache.load.device import BatchDevice, DevicePipeline
from tiercache.load.planner import NextEpoch
from tiercache.stats import WaitHistogram

FAKE = "privateuseone"
N = 203


@pytest.fixture
def eager(monkeypatch) -> list[FakeDevice]:
    """Fake devices that do everything at once, as the loaders make them."""
    return install(monkeypatch, is_eager=True)


@pytest.fixture
def lazy(monkeypatch) -> list[FakeDevice]:
    """Fake devices that do nothing until a test says so or the host waits."""
    return install(monkeypatch)


def loader_of(path: Path | tc.Dataset, *, batch_size: int = 8, shuffle: bool = True, drop_last=False, **options):
    dataset = path if isinstance(path, tc.Dataset) else tc.Dataset(path)
    given = {"seed": 3, "device": FAKE, "threads": 2} | options
    return tc.DataLoader(
        dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, options=tc.LoaderOptions(**given)
    )


def fixed_columns(path: Path) -> tc.Dataset:
    return tc.Dataset(path, columns=["id", "tokens", "flag"])


class Stage:
    """A stage before the device that returns what a test gives.

    Those are batches, functions that return a batch, and exceptions, which it raises.
    """

    corrupt_shard = None

    def __init__(self, results: list[Any], *, runs_in_caller: bool = False) -> None:
        self.results = list(results)
        self.runs_in_caller = runs_in_caller
        self.n_taken = 0
        self.is_closed = False

    def take(self, timeout_s: float = -1.0) -> Any:
        if not self.results:
            return None
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        result = result() if callable(result) else result
        self.n_taken += 1
        return result

    def figures(self) -> dict[str, float]:
        return {"samples": 2.0 * self.n_taken, "batches": float(self.n_taken), "bytes_served": 0.0, "skipped": 0.0}

    def close(self) -> None:
        self.is_closed = True


def batch_device(n_copied: int = 2, *, is_fixed: bool = False, is_eager: bool = True) -> BatchDevice:
    return BatchDevice(FakeDevice(torch.device(FAKE), is_eager=is_eager), n_copied, is_fixed=is_fixed)


def pipeline_over(stage: Any, device: BatchDevice) -> tuple[DevicePipeline, FakeDevice]:
    """A device stage over another stage, and the fake device."""
    work: Any = SimpleNamespace(waits=WaitHistogram(), first_batch=0)
    backend: Any = device.backend
    return DevicePipeline(work, device, stage), backend


def pipeline_of(results: list[Any], **options: Any) -> tuple[DevicePipeline, FakeDevice]:
    return pipeline_over(Stage(results), batch_device(**options))


def batch_of(number: int) -> dict[str, Any]:
    return {"x": torch.full((4,), number), "name": [f"batch {number}"]}


def test_a_batch_takes_one_copy_from_memory_that_is_pinned_once(make_dataset, eager, monkeypatch):
    go_on, prepare = threading.Event(), NextEpoch.prepare
    # The memory is free for the next epoch although the planner of the epoch before still runs.
    monkeypatch.setattr(NextEpoch, "prepare", lambda self, *given: (go_on.wait(30), prepare(self, *given)))
    loader = loader_of(fixed_columns(make_dataset(N)))
    for _ in range(3):
        for _ in loader:
            pass
    go_on.set()
    [device] = eager
    assert device.n_copies == 3 * len(loader)
    assert len(device.pinned_bytes) == 1
    assert loader.stats()["unpinned"] == 0


def test_columns_on_the_device_share_a_block_and_are_aligned(make_dataset, eager):
    loader = loader_of(tc.Dataset(make_dataset(N), layouts={"boxes": "buffer", "blob": "padded", "text": "nested"}))
    for batch in loader:
        tensors = [batch["id"], batch["tokens"], batch["flag"], batch["blob"], batch["score.valid"]]
        tensors += [batch["blob.lengths"]]
        tensors += [batch["boxes"].values, batch["boxes"].offsets, batch["text"].values()]
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}) == 1
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors if tensor.numel())
        lengths = batch["blob.lengths"].tolist()
        for row, i in enumerate(batch["id"].tolist()):
            assert batch["boxes"][row].tolist() == [[i, i]] * (i % 4)
            assert bytes(batch["blob"][row].tolist())[: lengths[row]] == bytes([i % 251]) * (i % 11)
            assert bytes(batch["text"][row].tolist()).decode() == f"text {i}"


def test_objects_stay_on_the_host_beside_tensors_on_the_device(tmp_path, eager):
    schema = {"id": "int64", "j": "json", "s": pa.struct([("a", pa.int64())]), "x": "float32?"}
    with tc.Writer(tmp_path / "data", schema=schema) as writer:
        for i in range(40):
            writer.write({"id": i, "j": {"n": [i]}, "s": {"a": 3 * i}, "x": None if i % 3 else i})
    for batch in loader_of(tmp_path / "data"):
        ids = batch["id"].tolist()
        assert batch["j"] == [{"n": [i]} for i in ids]
        assert batch["s"] == [{"a": 3 * i} for i in ids]
        assert batch["x.valid"].tolist() == [i % 3 == 0 for i in ids]
        assert list(batch) == ["id", "j", "s", "x", "x.valid"]
    assert eager[0].n_copies == 5


def test_a_batch_that_outgrows_its_slot_is_right_and_the_next_epochs_slots_are_larger(tmp_path, eager):
    with tc.Writer(tmp_path / "data", schema={"id": "int64", "x": tc.Ragged("float32", (None,))}) as writer:
        for i in range(160):
            writer.write({"id": i, "x": np.full(i % 3 if i != 77 else 40_000, i, np.float32)})
    loader = loader_of(tc.Dataset(tmp_path / "data", layouts={"x": "buffer"}), memory_bytes=1)

    def read() -> None:
        for batch in loader:
            for i, x in zip(batch["id"].tolist(), batch["x"], strict=True):
                assert x.tolist() == [i] * (i % 3 if i != 77 else 40_000)

    read()
    assert loader.stats()["unpinned"] == 1
    read()
    read()
    assert loader.stats()["unpinned"] == 1
    [device] = eager
    # to pack the large batch and the next ones, then larger slots
    assert len([n for n in device.pinned_bytes if n > 100_000]) == loader._engine._device.pinned.n_held + 1


def test_a_change_of_one_column_is_no_change_of_another_for_autograd(make_dataset, eager):
    batch = next(iter(loader_of(fixed_columns(make_dataset(N)))))
    weight = torch.ones(6, requires_grad=True)
    loss = (batch["tokens"].float() * weight).sum() + (batch["id"].double() @ weight[:1].double().expand(8))
    batch["flag"].logical_not_()
    loss.backward()
    assert weight.grad is not None


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


def test_any_batch_of_a_transform_is_packed_into_one_copy():
    image = torch.arange(48.0).view(1, 3, 4, 4).to(memory_format=torch.channels_last)
    jagged = torch.nested.nested_tensor_from_jagged(torch.arange(5.0), torch.tensor([0, 2, 5]))
    batch = {
        "image": image,
        "pair": Pair(torch.tensor([True, False]), [torch.zeros(0, 3), "text", torch.tensor(7, dtype=torch.int8)]),
        "buffer": Buffer(torch.arange(3, dtype=torch.uint8), torch.tensor([0, 1, 3])),
        "strided": torch.arange(12).view(3, 4)[:, ::2],
        "jagged": jagged,
        "half": (torch.ones(3, dtype=torch.bfloat16), None, 3.5),
        "sparse": torch.eye(2).to_sparse(),
    }
    pipeline, device = pipeline_of([batch])
    got = pipeline.take()
    assert device.n_copies == 1
    assert torch.equal(got["image"], image)
    assert got["image"].is_contiguous(memory_format=torch.channels_last)
    assert isinstance(got["pair"], Pair)
    assert got["pair"].left.tolist() == [True, False]
    assert got["pair"].right[0].shape == (0, 3)
    assert got["pair"].right[1] == "text"
    assert got["pair"].right[2].item() == 7
    assert [value.tolist() for value in got["buffer"]] == [[0], [1, 2]]
    assert torch.equal(got["strided"], batch["strided"])
    assert [part.tolist() for part in got["jagged"].unbind()] == [[0, 1], [2, 3, 4]]
    assert got["half"][0].tolist() == [1, 1, 1]
    assert got["half"][1:] == (None, 3.5)
    assert torch.equal(got["sparse"].to_dense(), torch.eye(2))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (got["image"], got["strided"], got["buffer"].values))
    pipeline.close()


@pytest.mark.parametrize(("n_bytes", "n_copies"), [(1 << 10, 1), (1 << 20, 2)])
def test_what_lies_in_a_slot_is_packed_with_the_rest_only_if_it_is_small(n_bytes, n_copies):
    on = batch_device()
    lent, _ = on.pinned.lend_arena(n_bytes, 1)
    slot = torch.from_numpy(lent)
    slot[:] = torch.arange(n_bytes) % 251
    pipeline, device = pipeline_over(Stage([{"slot": slot[64:], "made": torch.arange(3)}]), on)
    got = pipeline.take()
    assert device.n_copies == n_copies
    assert torch.equal(got["slot"], slot[64:])
    assert got["made"].tolist() == [0, 1, 2]
    pipeline.close()


def test_a_batch_without_tensors_is_served_as_it_is():
    pipeline, device = pipeline_of([["a", "b"], {"name": ["c"]}])
    assert pipeline.take() == ["a", "b"]
    assert pipeline.take() == {"name": ["c"]}
    assert pipeline.take() is None
    assert device.n_copies == 0


def test_copies_are_issued_ahead_but_no_more_than_asked():
    pipeline, device = pipeline_of([batch_of(i) for i in range(8)], n_copied=3)
    for i in range(8):
        assert pipeline.take()["x"].tolist() == [i] * 4
        device.wait_for_copies(min(i + 1 + 3, 8))
        assert device.n_copies <= i + 1 + 3
    assert pipeline.take() is None


def test_the_copy_of_a_batch_is_issued_when_it_is_ready_although_the_consumer_asks_for_none():
    is_ready = threading.Event()
    late = lambda: is_ready.wait(60) and batch_of(1)  # noqa: E731
    pipeline, device = pipeline_of([batch_of(0), late, batch_of(2), batch_of(3)])
    assert pipeline.take()["name"] == ["batch 0"]  # batch 1 was not ready, and was not awaited
    assert device.n_copies == 1
    is_ready.set()
    device.wait_for_copies(3)
    assert [pipeline.take()["name"] for _ in range(3)] == [["batch 1"], ["batch 2"], ["batch 3"]]
    pipeline.close()


def test_copies_are_issued_while_a_graph_is_captured_and_do_not_break_it():
    is_ready = threading.Event()
    sizes = [4000, 4000, 4000, 3000, 2500, 3500]
    batches = [{"x": torch.full((n,), i), "y": torch.full((2, 2), i)} for i, n in enumerate(sizes)]
    late = lambda: is_ready.wait(60) and batches[3]  # noqa: E731
    pipeline, device = pipeline_of([*batches[:3], late, *batches[4:]], n_copied=1, is_eager=False)
    for _ in range(3):
        pipeline.take()
        device.run_all()
    n_copies = device.n_copies
    with device.capture():
        is_ready.set()
        device.wait_for_copies(n_copies + 1)
        watcher = threading.Thread(target=pipeline._device.exposed_waits)  # as stats() in another thread
        watcher.start()
        watcher.join()
    for i in range(3, 6):
        batch = pipeline.take()
        device.run_all()
        assert batch["x"].tolist() == [i] * sizes[i]
        with device.capture():
            device.wait_for_copies(n_copies + min(i - 1, 3))
    pipeline.close()


class CopiesHere(TorchDispatchMode):
    """Counts the bytes that this thread copies into existing tensors."""

    n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.n_bytes += args[0].nbytes
        return function(*args, **(kwargs or {}))


IMAGES = 96


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "data"
    with tc.Writer(path, schema={"image": tc.Tensor("uint8", (3, 64, 64)), "label": "int64"}) as writer:
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 64, 64), np.uint8)
        writer.write_batch({"image": pixels, "label": np.arange(IMAGES) % 10})
    return path


def to_float(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "image": batch["image"].float()}


TRANSFORMS = {"none": None, "mixup": tc.MixUp(0.4, n_classes=10), "cutmix": tc.CutMix(1.0, n_classes=10)}


@pytest.mark.parametrize("name", [*TRANSFORMS, "function", "workers"])
def test_after_the_first_batches_nothing_is_copied_in_the_training_thread_or_breaks_a_capture(images, lazy, name):
    function = TRANSFORMS.get(name, to_float)
    given = {"num_workers": 2, "multiprocessing_context": "fork"} if name == "workers" else {}

    def loader_on(device: str | None) -> tc.DataLoader[Any]:
        options = tc.LoaderOptions(seed=3, device=device, threads=2, batch_transform=function)
        return tc.DataLoader(tc.Dataset(images), 8, shuffle=True, options=options, **given)

    n_ahead = 1 if name == "function" else 2  # beyond the batch that was handed out
    loader, found = loader_on(FAKE), []
    for number, batch in enumerate(loader):
        [device] = lazy
        device.run_all()
        found.append({name: value.clone() for name, value in batch.items()})
        n_copies, n_pinned = device.n_copies // 2, len(device.pinned_bytes)  # labels take a copy of their own
        if number >= 2:
            with device.capture():
                device.wait_for_copies(2 * min(number + 1 + n_ahead, len(loader)))
        if number == 2:
            first = CopiesHere().__enter__(), n_pinned
    counted, n_pinned = first
    counted.__exit__(None, None, None)
    assert counted.n_bytes == 0
    assert len(device.pinned_bytes) == n_pinned
    for batch, other in zip(found, loader_on(None), strict=True):
        assert all(torch.equal(batch[name], value) for name, value in other.items())
    assert loader.stats()["unpinned"] == (len(loader) if function is to_float else 0)
    assert len(found) == len(loader) == n_copies


def test_a_tensor_that_a_transform_returns_on_the_device_is_ordered_against_the_transforms_stream():
    on = batch_device(is_eager=False)
    device: Any = on.backend
    seen: list[list[int]] = []

    def make(number: int) -> dict[str, Any]:
        x = device.allocate(64)
        there = device.raw(x)
        device.current.submit(lambda: there.fill(number))
        return {"x": x}

    pipeline, _ = pipeline_over(Stage([partial(make, i) for i in range(2)], runs_in_caller=True), on)
    pipeline.take()
    of_transform, device.current = device.current, device.new_stream()
    device.choose = lambda streams: streams[-1]  # the consumer's new stream goes on as far as it can
    batch = pipeline.take()  # of the stream before, where it was made ahead
    there = device.raw(batch["x"])
    device.current.submit(lambda: seen.append(there.tolist()))
    del batch
    device.current = of_transform
    device.choose = lambda streams: streams[0]
    block = device.raw(device.allocate(64))  # not the memory that the other stream reads
    of_transform.submit(lambda: block.fill(7))
    device.run_all()
    assert seen == [[1] * 64]
    assert device.n_copies == 0
    pipeline.close()


def test_a_function_in_the_training_thread_draws_in_a_fixed_order_and_its_error_comes_in_its_place(images, eager):
    def fail_at_5(batch: dict[str, Any]) -> dict[str, Any]:
        threads.append(threading.current_thread())
        if len(threads) % 6 == 0:
            raise OSError("the sixth batch")
        return {**batch, "draw": torch.rand(())}

    rounds, threads = [], []
    for _ in range(2):
        torch.manual_seed(4)
        draws: list[float] = []
        options = tc.LoaderOptions(seed=3, device=FAKE, batch_transform=fail_at_5)
        loader = tc.DataLoader(tc.Dataset(images), 8, options=options)
        with pytest.raises(OSError, match="the sixth batch") as caught:
            draws.extend(draw for batch in loader for draw in (batch["draw"].item(), torch.rand(()).item()))
        assert caught.traceback[-1].name == "fail_at_5"
        assert loader.state_dict()["offset"] == 40
        rounds.append(draws)
    assert len(rounds[0]) == 10
    assert rounds[0] == rounds[1]
    assert set(threads) == {threading.current_thread()}


def test_ctrl_c_in_a_transform_that_is_ahead_loses_no_batch(images, eager):
    def interrupt(batch: dict[str, Any]) -> dict[str, Any]:
        made.append(batch)
        if len(made) == 4:
            raise KeyboardInterrupt
        return dict(batch)

    made: list[Any] = []
    options = tc.LoaderOptions(seed=3, device=FAKE, batch_transform=interrupt)
    loader = tc.DataLoader(tc.Dataset(images), 8, options=options)
    iterator = iter(loader)
    assert [next(iterator)["label"][0].item() for _ in range(2)] == [0, 8]
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    state = loader.state_dict()
    assert next(iterator)["label"][0].item() == 16 % 10
    with pytest.raises(RuntimeError, match="closed"):
        next(iterator)
    loader.load_state_dict(state)
    assert next(iter(loader))["label"].tolist() == [i % 10 for i in range(16, 24)]


def test_the_consumers_stream_waits_for_the_copy_and_the_host_does_not():
    pipeline, device = pipeline_of([batch_of(0)], is_eager=False)
    x = pipeline.take()["x"]
    seen: list[list[int]] = []
    there = device.raw(x)
    device.current.submit(lambda: seen.append(there.tolist()))
    device.choose = lambda streams: streams[0]  # the consumer's stream goes on as far as it can
    device.run_all()
    assert seen == [[0, 0, 0, 0]]
    assert device.n_synchronised == 0
    pipeline.close()


def test_a_host_that_runs_ahead_waits_for_copies_before_it_needs_more_memory():
    pipeline, device = pipeline_of([batch_of(i) for i in range(9)], n_copied=2, is_eager=False)
    for i in range(9):
        assert pipeline.take()["name"] == [f"batch {i}"]
        assert len(pipeline._copies._copying) <= 3
    assert device.n_synchronised
    assert len(device.pinned_bytes) <= 4
    pipeline.close()


def test_memory_of_a_copy_that_was_issued_again_is_not_lent_before_that_copy_is_done():
    pipeline, device = pipeline_of([batch_of(0), batch_of(1)], is_eager=False)
    pipeline.take()
    device.wait_for_copies(2)
    first = device.current
    device.current = device.new_stream()
    pipeline.take()
    device.current = first
    blocks = [device.allocate(64) for _ in range(8)]  # the user's; not the memory of the first copy of batch 1
    there = [device.raw(block) for block in blocks]
    first.submit(lambda: [one.fill(7) for one in there])
    device.run_all()  # the first stream goes on as far as it can, before the copies
    assert {value for one in there for value in one.tolist()} == {7}
    pipeline.close()


def test_an_error_comes_in_its_place():
    pipeline, _ = pipeline_of([batch_of(0), batch_of(1), OSError("lost"), batch_of(2)], n_copied=8)
    assert [pipeline.take()["name"] for _ in range(2)] == [["batch 0"], ["batch 1"]]
    with pytest.raises(OSError, match="lost"):
        pipeline.take()
    assert pipeline._before.is_closed


def test_an_error_of_the_device_in_the_stages_thread_comes_in_its_place():
    is_ready = threading.Event()
    pipeline, device = pipeline_of([batch_of(0), lambda: is_ready.wait(60) and batch_of(1)])
    assert pipeline.take()["name"] == ["batch 0"]
    device.fail_copy = True
    is_ready.set()
    with pytest.raises(RuntimeError, match="the device failed"):
        pipeline.take()
    assert pipeline._before.is_closed


def test_corrupt_data_is_an_error_in_its_place_and_can_be_replaced(make_dataset, eager):
    path = make_dataset(N)
    dataset = tc.Dataset(path)
    strike(dataset, path, 0, 2, "tokens")
    plain, served = [], []
    for device, into in ((None, plain), (FAKE, served)):
        with pytest.raises(tc.CorruptShard):
            into.extend(check_batch(batch) for batch in loader_of(path, device=device, device_batches=4))
        with pytest.warns(RuntimeWarning, match="CRC-32C"):
            into += ids_of(loader_of(path, device=device, device_batches=4, on_corrupt="previous"))
    assert served == plain


def test_no_memory_on_the_device_is_an_error_that_loses_no_batch():
    on = batch_device()
    on.backend.fail_allocation = True
    pipeline, device = pipeline_over(Stage([batch_of(0), batch_of(1)]), on)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            pipeline.take()
    device.fail_allocation = False
    assert [pipeline.take()["name"] for _ in range(2)] == [["batch 0"], ["batch 1"]]


def test_close_waits_for_the_copies_that_are_running(make_dataset, lazy):
    loader = loader_of(make_dataset(N), device_batches=4)
    iterator = iter(loader)
    next(iterator)
    [device] = lazy
    side = device.streams[1]
    assert side.operations
    iterator.close()
    assert not side.operations
    with pytest.raises(RuntimeError, match="closed"):
        next(iterator)


def test_iterators_that_overlap_have_memory_of_their_own(make_dataset, lazy):
    path = make_dataset(N)
    loader = loader_of(fixed_columns(path))
    rounds = [iter(loader), iter(loader)]
    for one, two in zip(*rounds, strict=True):
        for batch in (one, two):
            lazy[0].run_all()
            ids = batch["id"].tolist()
            assert batch["tokens"][:, 0].tolist() == [i * 7 for i in ids]
    assert len(lazy[0].pinned_bytes) == 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("device") / "data"
    with tc.Writer(path, schema={"id": "int64", "row": tc.Tensor("int32", (40,)), "text": "str"}) as writer:
        for i in range(160):
            writer.write({"id": i, "row": np.arange(40, dtype=np.int32) * i, "text": "x" * (i % 30)})
    return path


@cache
def epochs_of(path: Path, seed: int) -> list[list[list[int]]]:
    """The ids of the batches of two epochs."""
    loader = loader_of(path, drop_last=True, seed=seed, device=None)
    return [[batch["id"].tolist() for batch in loader] for _ in range(2)]


def kernel(device: FakeDevice, batch: dict[str, Any], seen: list[list[int]]) -> None:
    """Queue what reads a batch on the consumer's stream; the batch may be dropped before that runs."""
    ids, rows = device.raw(batch["id"]), device.raw(batch["row"])

    def run() -> None:
        assert np.array_equal(rows, np.arange(40) * ids[:, None]), "a batch was seen before its copy was done"
        seen.append(ids.tolist())

    device.current.submit(run)


@given(
    seed=st.integers(0, 2**32),
    n_copied=st.integers(1, 5),
    buffers=st.sampled_from(["new", "fixed"]),
    n_streams=st.integers(1, 3),
    stop=st.integers(1, 22),
)
def test_no_slot_is_rewritten_and_no_batch_is_seen_before_its_copy_is_done(
    packed, seed, n_copied, buffers, n_streams, stop
):
    """Whatever stream comes first. The fake device checks the slots; the kernel checks the batches."""
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        made = install(patch)
        order = {"batch_size": 8, "drop_last": True, "seed": seed % 7, "memory_bytes": 1}
        options = {"device_batches": n_copied, "device_buffers": buffers}
        seen: list[list[int]] = []
        loader = loader_of(packed, **order, **options)
        for _ in range(2):
            iterator = iter(loader)
            [device] = made
            device.choose = rng.choice
            streams = [device.current, *(device.new_stream() for _ in range(n_streams - 1))]
            for number, batch in enumerate(iterator):
                kernel(device, batch, seen)
                del batch
                for _ in range(rng.randrange(8)):
                    device.run_one()
                if rng.random() < 0.2:
                    device.current = rng.choice(streams)
                if number + 1 == stop:
                    break
            iterator.close()
        device.run_all()
    expected = [ids for epoch in epochs_of(packed, seed % 7) for ids in epoch[:stop]]
    assert sorted(seen) == sorted(expected)
    if n_streams == 1:
        assert seen == expected


def test_fixed_buffers_have_the_same_addresses_in_every_epoch_and_nothing_is_pending(make_dataset, lazy):
    loader = loader_of(fixed_columns(make_dataset(N)), drop_last=True, device_buffers="fixed")
    addresses = set()
    for _ in range(2):
        for batch in loader:
            [device] = lazy
            device.run_all()
            ids = batch["id"].tolist()
            assert batch["tokens"][:, 0].tolist() == [i * 7 for i in ids]
            addresses.add(tuple(batch[name].data_ptr() for name in ("id", "tokens", "flag")))
    assert len(addresses) == 1


def test_fixed_buffers_wait_on_the_host_for_each_copy():
    pipeline, device = pipeline_of([batch_of(i) for i in range(3)], is_fixed=True, is_eager=False)
    for i in range(3):
        before = device.n_synchronised
        x = pipeline.take()["x"]
        assert device.n_synchronised > before
        device.run_all()
        assert x.tolist() == [i] * 4
    pipeline.close()


def test_fixed_buffers_need_full_batches(make_dataset, eager):
    loader = loader_of(fixed_columns(make_dataset(N)), device_buffers="fixed")
    with pytest.raises(ValueError, match="ends with a batch of 3 records instead of 8: give drop_last=True"):
        iter(loader)
    even = fixed_columns(make_dataset(40, "even"))
    assert len(list(loader_of(even, device_buffers="fixed"))) == 5
    options = tc.LoaderOptions(device=FAKE, device_buffers="fixed")
    assert len(list(tc.DataLoader(even, 8, sampler=range(16), options=options))) == 2
    with pytest.raises(ValueError, match="give drop_last=True"):
        next(iter(tc.DataLoader(even, 8, sampler=range(20), options=options)))


def test_fixed_buffers_that_inference_mode_made_serve_training_too():
    pipeline, _ = pipeline_of([batch_of(0), batch_of(1)], is_fixed=True)
    with torch.inference_mode():
        assert pipeline.take()["x"].tolist() == [0] * 4
    x = pipeline.take()["x"]
    assert x.tolist() == [1] * 4
    weight = torch.ones(4, requires_grad=True)
    (x * weight).sum().backward()
    pipeline.close()


def test_fixed_buffers_name_the_column_of_another_layout():
    for other, message in (
        ({"x": torch.zeros(3), "y": torch.zeros(2)}, r"column 'x' as torch.float32\[4\].*'x' as torch.float32\[3\]"),
        ({"x": torch.zeros(4), "y": torch.zeros(2).double()}, r"column 'y' as torch.float32\[2\].*torch.float64\[2\]"),
        ({"x": torch.zeros(4)}, r"column 'y' as torch.float32\[2\], and this one has no tensor"),
    ):
        pipeline, _ = pipeline_of([{"x": torch.zeros(4), "y": torch.zeros(2)}, other], is_fixed=True)
        pipeline.take()
        with pytest.raises(ValueError, match=message):
            pipeline.take()
        pipeline.close()
    pipeline, _ = pipeline_of([{"x": torch.eye(2).to_sparse()}], is_fixed=True)
    with pytest.raises(ValueError, match=r"column 'x' is a Tensor of layout torch\.sparse_coo"):
        pipeline.take()
    pipeline.close()


def test_a_device_that_cannot_serve_is_refused_with_a_way_out(make_dataset):
    path = make_dataset(20)
    with pytest.raises(ValueError, match="device='mps': MPS has no streams"):
        loader_of(path, device="mps")
    with pytest.raises(ValueError, match="device='nowhere' names no device of torch"):
        loader_of(path, device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device='cuda' needs an accelerator, and torch .* finds none here"):
            loader_of(path, device="cuda")


def test_wrong_options_are_refused():
    for options, error, message in (
        ({"device_batches": 0}, ValueError, "device_batches must be 1 or more, got 0"),
        ({"device_batches": -3}, ValueError, "device_batches: a size cannot be negative"),
        ({"device_buffers": "same"}, ValueError, "device_buffers must be 'new' or 'fixed', got 'same'"),
        ({"device_batches": "two"}, TypeError, "device_batches must be an integer"),
    ):
        with pytest.raises(error, match=message):
            tc.LoaderOptions(device=FAKE, **options)


def test_torchs_path_refuses_a_device(make_dataset, eager):
    dataset = tc.Dataset(make_dataset(20))
    options = tc.LoaderOptions(device=FAKE)
    with pytest.raises(ValueError, match=r"single records: remove device=, give pin_memory=True, and move each"):
        tc.DataLoader(dataset, None, options=options)
    with pytest.raises(ValueError, match=r"here the sampler, a list, is neither .*: remove device="):
        tc.DataLoader(dataset, batch_sampler=[[1, 2], [3]], options=options)


def test_pin_memory_is_allowed_and_adds_no_copy(make_dataset, eager):
    dataset = fixed_columns(make_dataset(40))
    loader = tc.DataLoader(dataset, 8, pin_memory=True, options=tc.LoaderOptions(device=FAKE))
    assert len(list(loader)) == 5
    assert eager[0].n_copies == 5


def test_exposed_wait_is_the_time_in_which_the_consumers_stream_had_nothing_to_do():
    pipeline, device = pipeline_of([batch_of(0), batch_of(1)], is_eager=False)
    pipeline.take()
    device.choose = lambda streams: streams[-1]  # copies first
    device.run_all()
    waits = pipeline._device.exposed_waits()
    assert waits.n_waits == 1
    assert waits.total_s > 0
    pipeline.close()


def test_stats_tell_the_exposed_wait_and_the_slowest_rank(make_dataset, eager):
    path = make_dataset(N)
    for device in (None, FAKE):
        loader = loader_of(path, device=device)
        for _ in loader:
            pass
        stats = loader.stats(across_ranks=True)
        exposed = stats["exposed_wait_s"]
        assert exposed.keys() == {"total", "mean", "p99", "slowest_rank"}
        # without a device, the request that finds the end of the epoch is a wait too
        assert exposed["total"] / exposed["mean"] == pytest.approx(len(loader) + (device is None))
        assert exposed["slowest_rank"] == {"rank": 0, **{key: exposed[key] for key in ("total", "mean", "p99")}}
        words = ("store", "disk", "plan", "decode", "transform", "copy", "consumer")
        assert stats["bottleneck"].split()[0] in words
