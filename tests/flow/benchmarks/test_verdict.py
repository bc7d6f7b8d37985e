"""What the comparison's rows say: the verdict on them, and the forms that pictures and columns are compared in."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any


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


def test_every_requirement_names_a_contender_that_runs_it(bench: Callable[[str], ModuleType]) -> None:
    peers, workloads = bench("peers.catalogue").PEERS, bench("workloads").WORKLOADS
    for required in bench("peers.verdict").TABLE:
        peer, workload = peers[required.against], workloads[required.workload]
        assert required.workload in peer.workloads
        assert required.shuffle in peer.shuffles
        forms = bench("peers.compare").forms(peer, workload)
        assert required.form in [replace(images_job(bench, form), workload=workload).shown_form for form in forms]
