"""The verb simulate: reads, costs, output and plots."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiercache.cache import Cache
from tiercache.cache.simulate import Trace, Tracer, simulate
from tiercache.cli import simulate as simulate_module
from tiercache.cli.selection import Training
from tiercache.cli.simulate import (
    NodeReads,
    SimulationCosts,
    SimulationResult,
    distinct_bytes,
    simulate_case,
    training_reads,
)
from tiercache.data.dataset import Dataset

N, SIZE = 40, 1000


def accesses(training, nodes=1, epochs=5):
    return training_reads(np.full(N, 10), np.full(N, SIZE), training, nodes=nodes, epochs=epochs)


def trace_reads(trace):
    return NodeReads(trace, np.zeros(len(trace), np.int64))


class TestTraces:
    @given(
        nodes=st.integers(1, 3),
        local_ranks=st.integers(1, 3),
        epochs=st.integers(1, 3),
        placement=st.sampled_from(["sticky", "global"]),
        seed=st.integers(0, 9),
    )
    @settings(max_examples=30)
    def test_each_epoch_reads_every_shard_on_some_node_in_the_order_of_clocks(
        self, nodes, local_ranks, epochs, placement, seed
    ):
        training = Training(seed, world_size=nodes * local_ranks, placement=placement)
        found = accesses(training, nodes, epochs)
        assert len(found) == nodes
        for epoch in range(epochs):
            read = np.concatenate([a.trace.names[a.epoch == epoch] for a in found])
            assert set(read.tolist()) == set(range(N))
        for node, access in enumerate(found):
            assert np.all(np.diff(access.epoch) >= 0)
            assert set(access.trace.job.tolist()) <= set(range(node * local_ranks, (node + 1) * local_ranks))
            for job in set(access.trace.job.tolist()):
                mine = access.trace.job == job
                clock, sizes = access.trace.clock[mine], access.trace.n_bytes[mine]
                assert clock.tolist() == (np.cumsum(sizes) - sizes).tolist()

    def test_a_sticky_node_reads_the_same_shards_in_every_epoch_and_a_global_one_does_not(self):
        for placement, same in (("sticky", True), ("global", False)):
            found = accesses(Training(1, world_size=2, placement=placement), 2, 2)[0]
            read = [set(found.trace.names[found.epoch == epoch].tolist()) for epoch in (0, 1)]
            assert (read[0] == read[1]) is same

    def test_ranks_that_nodes_cannot_share_evenly_are_an_error(self):
        with pytest.raises(ValueError, match="3 ranks cannot be divided evenly among 2 nodes"):
            accesses(Training(1, world_size=3), 2, 1)
        with pytest.raises(ValueError, match="--nodes and --epochs must be 1 or more"):
            accesses(Training(1), 0, 1)


class TestCases:
    @pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
    @pytest.mark.parametrize("policy", ["plan", "resident", "bound"])
    def test_one_scan_per_epoch_saves_the_cached_share(self, policy, share):
        found = accesses(Training(3), epochs=4)
        case = simulate_case(found, policy, int(share * N * SIZE), SimulationCosts())
        assert case.first_bytes == N * SIZE
        assert case.epoch_bytes == pytest.approx((1 - share) * N * SIZE, rel=0.05)
        assert case.byte_hit_ratio == pytest.approx(share, abs=0.04)

    def test_no_policy_beats_the_bound(self):
        found = accesses(Training(3, world_size=4, placement="global"), 2, 3)
        for size in (0, 5 * SIZE, 20 * SIZE):
            least = simulate_case(found, "bound", size, SimulationCosts()).epoch_bytes
            for policy in ("plan", "resident", "s3fifo", "lru"):
                assert simulate_case(found, policy, size, SimulationCosts()).epoch_bytes >= least
        everything = simulate_case(accesses(Training(3), epochs=2), "lru", N * SIZE, SimulationCosts())
        assert (everything.first_bytes, everything.epoch_bytes, everything.hit_ratio) == (N * SIZE, 0, 1.0)

    def test_dollars_are_bytes_and_requests_and_time_is_that_of_the_slowest_node(self):
        sizes = np.array([4_000_000_000, 1_000_000_000])
        nodes = [trace_reads(Trace.of(np.array([i]), sizes[i : i + 1])) for i in (0, 1)]
        question = SimulationCosts(egress=0.09, request=0.4, fetch_rate=1e9, read_rate=3e9)
        case = simulate_case(nodes, "lru", 0, question)
        n_requests = -(-4_000_000_000 // (8 << 20)) + -(-1_000_000_000 // (8 << 20))
        assert case.epoch_requests == n_requests
        assert case.dollars == pytest.approx(5e9 / 2**30 * 0.09 + n_requests / 1000 * 0.4)
        assert case.epoch_s == pytest.approx(4.0)
        held = simulate_case([trace_reads(Trace.of(np.zeros(3, int), 3_000_000_000))], "lru", 1 << 40, question)
        assert held.epoch_s == pytest.approx(3.0)  # two of three hits: what training reads takes as long
        assert SimulationCosts().epoch_s(1, 1) is None

    def test_a_trace_without_accesses_costs_nothing(self):
        nothing = trace_reads(Trace.of(np.empty(0, np.int64)))
        case = simulate_case([nothing], "lru", 10, SimulationCosts(1, 1, 1))
        assert (case.hit_ratio, case.byte_hit_ratio, case.epoch_bytes, case.dollars) == (0.0, 0.0, 0, 0)
        assert distinct_bytes([nothing]) == 0

    def test_a_case_agrees_with_the_simulator(self):
        trace = Trace.of(np.random.default_rng(1).integers(0, 30, 400), 7)
        case = simulate_case([NodeReads(trace, np.zeros(400, np.int64))], "s3fifo", 70, SimulationCosts())
        report = simulate(trace, "s3fifo", 70)
        assert (case.hit_ratio, case.epoch_bytes) == (report.hit_ratio, report.bytes_fetched)


class TestVerb:
    def test_each_policy_is_combined_with_each_size(self, tiercache, data_set):
        done = tiercache("simulate", data_set, "--json", "--epochs", "2")
        *cases, summary = done.events
        assert {c["policy"] for c in cases} == {"plan", "resident", "s3fifo", "lru", "bound"}
        assert len(cases) == summary["cases"] == 25
        assert (summary["shards"], summary["accesses"]) == (summary["accesses"] // 2, 2 * summary["shards"])
        whole = [c for c in cases if c["share"] == 1.0]
        assert {c["epoch_bytes"] for c in whole} == {0}
        assert {c["first_bytes"] for c in cases} == {summary["data_bytes"]}

    def test_the_table_has_the_requested_columns(self, tiercache, data_set):
        flags = "--policy", "plan", "--size", "50%", "--size", "1KB"
        text = tiercache("simulate", data_set, *flags).out.splitlines()
        assert text[0].split() == ["policy", "cache", "of", "data", "hits", "fetched", "per", "epoch"]
        assert [line.split()[0] for line in text[1:3]] == ["plan", "plan"]
        assert text[-1].startswith(f"{data_set}: ")
        assert text[-1].endswith(", read by 1 rank on 1 node in 5 epochs")
        more = "--egress", "0.09", "--rate", "1MB/s", "--train-rate", "100MB/s"
        head = tiercache("simulate", data_set, *flags, *more).out.splitlines()[0]
        assert head.split()[-2:] == ["dollars", "time"]

    def test_a_training_can_be_described(self, tiercache, data_set):
        flags = "--ranks", "4", "--nodes", "2", "--placement", "global", "--shuffle-group", "all", "--seed", "5"
        summary = tiercache("simulate", data_set, *flags, "--policy", "plan", "--json").events[-1]
        assert (summary["ranks"], summary["nodes"], summary["placement"], summary["seed"]) == (4, 2, "global", 5)
        summary = tiercache("simulate", data_set, "--no-shuffle", "--policy", "plan", "--json").events[-1]
        assert summary["seed"] is None

    def test_a_trace_is_replayed_as_one_epoch(self, tiercache, tmp_path):
        tracer = Tracer(tmp_path / "trace")
        for name in "abab":
            tracer.add(name * 40, 100, hit=False)
        tracer.close()
        flags = "--trace", tmp_path / "trace", "--policy", "lru", "--size", "100%", "--size", "50%"
        small, large, summary = tiercache("simulate", *flags, "--json").events
        assert (small["hit_ratio"], small["epoch_bytes"]) == (0.0, 400)
        assert (large["hit_ratio"], large["epoch_bytes"]) == (0.5, 200)
        assert (summary["accesses"], summary["data_bytes"]) == (4, 200)
        text = tiercache("simulate", *flags).out.splitlines()
        assert text[0].split()[-1] == "fetched"
        assert text[-1] == f"4 opens of 200 B, from {tmp_path}/trace"

    def test_a_trace_recorded_by_the_cache_can_be_replayed(self, tiercache, data_set, tmp_path, monkeypatch):
        monkeypatch.setenv("TIERCACHE_CACHE_TRACE", str(tmp_path / "trace"))
        with Cache(tmp_path / "cache", size="100MB") as cache:
            for _ in range(2):
                dataset = Dataset(str(data_set), cache=cache)
                dataset[list(range(20))]
                dataset.close()
        case, summary = tiercache(
            "simulate", "--trace", tmp_path / "trace", "--policy", "lru", "--size", "100%", "--json"
        ).events
        assert summary["accesses"] > 4
        assert case["epoch_bytes"] == case["first_bytes"] == summary["data_bytes"]
        assert case["hit_ratio"] >= 0.5

    def test_invalid_options_are_usage_errors(self, tiercache, data_set, tmp_path):
        (tmp_path / "trace").write_text("not a trace\n")
        for flags, message in (
            ([], "simulate takes a URL, or --trace FILE"),
            ([data_set, "--trace", "x"], "simulate takes a URL, or --trace FILE"),
            ([data_set, "--policy", "mru"], "--policy must be one of plan, resident, s3fifo, lru or bound, got 'mru'"),
            ([data_set, "--size", "big"], "--size: not a size"),
            ([data_set, "--egress", "-1"], "--egress and --request must be dollars"),
            ([data_set, "--rate", "0"], "--rate must be at least 1 byte per second"),
            ([data_set, "--ranks", "3", "--nodes", "2"], "cannot be divided evenly"),
            ([data_set, "--plot", "a.txt"], "ends in .svg, .png, .pdf, got 'a.txt'"),
            ([data_set, "--plot", "/gone/a.svg"], "--plot: the folder /gone does not exist"),
            (["--trace", tmp_path / "trace"], "line 1"),
        ):
            assert message in tiercache("simulate", *flags, code=2).err
        assert "No such file" in tiercache("simulate", "--trace", tmp_path / "gone", code=1).err


class TestPlot:
    @pytest.mark.parametrize(("name", "magic"), [("a.svg", b"<?xml"), ("a.PNG", b"\x89PNG")])
    def test_a_plot_is_drawn(self, tiercache, data_set, tmp_path, name, magic):
        done = tiercache("simulate", data_set, "--plot", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(magic)
        assert done.out.endswith(f"; drawn in {tmp_path / name}\n")

    def test_the_policies_and_axes_are_named(self, tmp_path):
        ends = ((0, 0.0, 3e9), (1 << 30, 1.0, 0.0))
        results = [
            SimulationResult(name, n, hits, hits, 0, fetched, 0, 0, None)
            for name in "abcdefg"
            for n, hits, fetched in ends
        ]
        simulate_module.draw(tmp_path / "a.svg", results, data_bytes=1 << 30, title="the title")
        assert (tmp_path / "a.svg").stat().st_size > 10_000

    def test_without_matplotlib_the_error_names_the_extra_before_anything_is_replayed(
        self, tiercache, data_set, tmp_path, monkeypatch
    ):
        def refuse(name):
            raise ImportError(f"No module named {name!r}")

        monkeypatch.setattr(simulate_module, "import_module", refuse)
        done = tiercache("simulate", data_set, "--plot", tmp_path / "a.svg", code=1)
        assert "pip install 'tiercache-data[plot]'" in done.err
        assert done.out == ""


def test_neither_simulate_nor_warm_needs_torch():
    code = "import sys; import tiercache.cli.simulate, tiercache.cli.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
