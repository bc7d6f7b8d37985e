"""What the comparison's rows say: the verdict on them, and the forms that pictures and columns are compared in."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


def rates(peer: str, shuffle: str, form: str, rate: float, **others: Any) -> dict[str, Any]:
    figures = {"samples_per_s": rate, "cpu_s_per_million": 1.0}
    timed = {f"{name}.{read}": {"median": value} for name, value in figures.items() for read in ("every", "first")}
    memory = {name: {"median": 1e8} for name in ("peak_private_bytes", "idle_private_bytes")}
    row = {"benchmark": "load", "peer": peer, "title": peer, "workload": {"name": "tokens"}, "shuffle": shuffle}
    return {**row, "form": form, **timed, **memory, **others}


def images_job(bench: Callable[[str], ModuleType], form: str, folder: Path = Path()) -> Any:
    """A job of eight pictures. folder: of the generated and the packed ones."""
    images = replace(bench("workloads").IMAGES, batch_size=4, n_records=8)
    place = {"source_folder": str(folder / "data"), "folder": str(folder / "packed"), "library_folder": str(folder)}
    return bench("peers.job").Job(task="measure", peer="tiercache", workload=images, **place, form=form)


def test_the_verdict_compares_with_the_floor_and_the_best_library(bench: Callable[[str], ModuleType]) -> None:
    module = bench("peers.verdict")
    ours = rates("tiercache", "full", "", 1400.0, peak_private_bytes={"median": 1.6e8})
    floor, library = rates("c_floor", "full", "", 1000.0), rates("lit", "full", "", 9.0)
    own = rates("wds", "default", "", 1500.0, **{"cpu_s_per_million.every": {"median": 2.0}})
    packed = {"benchmark": "pack", "workload": {"name": "tokens"}}
    packs = [
        {**packed, "peer": "tiercache", "title": "tiercache", "records_per_s": 9e5, "one_by_one_records_per_s": 3e5},
        {**packed, "peer": "hf", "title": "hf", "records_per_s": 1e5},
        {**packed, "peer": "spdl_threads", "title": "has no format", "records_per_s": 9e5},
    ]
    lines = {(line.what, line.required): line for line in module.verdict([ours, floor, library, own, *packs])}
    assert lines["tokens, shuffled", "1.3 x C floor"].met
    assert lines["tokens, shuffled", "1.3 x C floor"].measured == "1.40"
    assert lines["tokens, in the stored order", "0.6 x C floor"].met is None
    beaten = lines["tokens, shuffled", "ahead of every library"]
    assert not beaten.met
    assert "wds" in beaten.figures
    assert lines["tokens, shuffled", "CPU seconds per million: the least"].met
    assert not lines["tokens, shuffled", "peak private memory: 1.5 x the least"].met
    assert lines["tokens, packed one by one", "2 x the fastest library"].measured == "3.00"


def test_the_verdict_compares_images_of_the_same_dct(bench: Callable[[str], ModuleType]) -> None:
    images = {"workload": {"name": "images"}}
    usual = [
        rates(peer, "full", "", rate, **images) for peer, rate in (("tiercache", 9.0), ("beton", 5.0), ("lit", 6.0))
    ]
    fast = [rates(peer, "full", "fast DCT", rate, **images) for peer, rate in (("tiercache", 10.0), ("beton", 4.0))]
    lines = {(line.what, line.required): line for line in bench("peers.verdict").verdict([*usual, *fast])}
    assert lines["images, shuffled", "2 x FFCV"].measured == "1.80"
    assert lines["images, shuffled", "ahead of every library"].measured == "1.50"
    assert lines["images, shuffled, by fast DCT", "2 x FFCV"].measured == "2.50"
    assert lines["images, shuffled, by fast DCT", "ahead of every library"].measured == "2.50"
    assert lines["images, shuffled, by fast DCT", "0.9 x decoder and resize alone"].met is None


def test_every_requirement_names_a_contender_that_runs_it(bench: Callable[[str], ModuleType]) -> None:
    peers, workloads = bench("peers.catalogue").PEERS, bench("workloads").WORKLOADS
    for required in bench("peers.verdict").TABLE:
        peer, workload = peers[required.against], workloads[required.workload]
        assert required.workload in peer.workloads
        assert required.shuffle in peer.shuffles
        forms = bench("peers.compare").forms(peer, workload)
        assert required.form in [replace(images_job(bench, form), workload=workload).shown_form for form in forms]


def test_only_contenders_with_the_fast_dct_are_also_run_with_it(bench: Callable[[str], ModuleType]) -> None:
    peers, workloads, forms = bench("peers.catalogue").PEERS, bench("workloads").WORKLOADS, bench("peers.compare").forms
    ways = ("list", "fast DCT")
    several = {name for name, peer in peers.items() if forms(peer, workloads["images"]) == ways}
    assert several == {"tiercache", "decoder_alone", "transforms_alone", "beton"}
    assert all(forms(peer, workloads["images"]) == ("list",) for name, peer in peers.items() if name not in several)
    assert {forms(peer, workloads["tokens"]) for peer in peers.values()} == {("list",)}
    assert forms(peers["beton"], workloads["rows"]) == ("list", "buffer")


def augmented_job(bench: Callable[[str], ModuleType], folder: Path) -> Any:
    job = images_job(bench, "list", folder)
    workload = replace(bench("workloads").AUGMENTED, batch_size=4, n_records=8)
    return replace(job, workload=workload, shuffle="full")


@pytest.mark.parametrize(
    "adapter", ["tiercache", "transforms_alone", pytest.param("torch_map", marks=pytest.mark.stress)]
)
def test_contenders_serve_every_picture_augmented(
    adapter: str, bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module, job = bench(f"peers.adapters.{adapter}"), augmented_job(bench, tmp_path)
    bench("generate").generate(job.workload, job.source.folder)
    if adapter == "tiercache":
        module.pack(job.source, job.path)
    with module.opened(job) as opened:
        assert bench("consumer").Consumer(job.source).check_records(opened.epoch())
        one, two = (
            {int(k): p for batch in opened.epoch() for k, p in zip(batch["label"], batch["image"], strict=True)}
            for _ in range(2)
        )
    if adapter != "transforms_alone":  # its draws are those of one epoch
        assert all(not np.array_equal(one[key], two[key]) for key in range(8))


def test_pictures_that_are_not_augmented_are_found(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    job, consumer = augmented_job(bench, tmp_path), bench("consumer")
    bench("generate").generate(job.workload, job.source.folder)
    (_field,) = job.workload.fields
    rng = np.random.default_rng(0)
    good = ((rng.random((8, 224, 224, 3)) - 0.45) / 0.226 * 0.9).astype(np.float16)
    for wrong in (good.astype(np.float32), good[:, :100], good * 2, good * 0, good * np.float16(np.nan)):
        batches = [{"image": wrong[at : at + 4], "label": np.arange(at, at + 4)} for at in (0, 4)]
        with pytest.raises(consumer.WrongBatchesError, match="contents of 'image'"):
            consumer.Consumer(job.source).check_records(batches)
    assert consumer.Consumer(job.source)._are_normalised(good)


@pytest.mark.parametrize("adapter", ["tiercache", "decoder_alone"])
def test_images_by_the_fast_transform_differ_slightly(
    adapter: str, bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module, served = bench(f"peers.adapters.{adapter}"), []
    for way in ("list", "fast DCT"):
        job = images_job(bench, way, tmp_path)
        bench("generate").generate(job.workload, job.source.folder)
        if adapter == "tiercache" and not job.path.exists():
            module.pack(job.source, job.path)
        with module.opened(job) as opened:
            served.append(np.concatenate([np.asarray(batch["image"]) for batch in opened.epoch()]).astype(int))
    assert 0.3 < np.abs(served[0] - served[1]).mean() < 4
