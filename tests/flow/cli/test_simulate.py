"""The verb simulate."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiercache.cli.warm import Training, simulate_case, training_reads

N, SIZE = 40, 1000


def accesses(training, nodes=1, epochs=5):
    return training_reads(np.full(N, 10), np.full(N, SIZE), training, nodes=nodes, epochs=epochs)


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

    def test_ranks_that_nodes_cannot_share_evenly_are_an_error(self):
        with pytest.raises(ValueError, match="3 ranks cannot be divided evenly among 2 nodes"):
            accesses(Training(1, world_size=3), 2, 1)


class TestCases:
    def test_one_scan_per_epoch_saves_the_cached_share(self):
        found = accesses(Training(3), epochs=4)
        for share in (0.25, 0.5, 0.75):
            case = simulate_case(found, "plan", int(share * N * SIZE))
            assert case["first_bytes"] == N * SIZE
            assert case["epoch_bytes"] == pytest.approx((1 - share) * N * SIZE, rel=0.05)
            assert case["byte_hit_ratio"] == pytest.approx(share, abs=0.04)

    def test_a_cache_that_holds_everything_fetches_it_once(self):
        everything = simulate_case(accesses(Training(3), epochs=2), "lru", N * SIZE)
        assert [everything[name] for name in ("first_bytes", "epoch_bytes", "byte_hit_ratio")] == [N * SIZE, 0, 1.0]


class TestVerb:
    def test_each_policy_is_combined_with_each_size(self, tiercache, data_set):
        done = tiercache("simulate", data_set, "--json", "--epochs", "2")
        *cases, summary = done.events
        assert {c["policy"] for c in cases} == {"plan", "lru"}
        assert len(cases) == summary["cases"] == 10
        assert not {"hit_ratio", "accesses"} & {*summary, *cases[0]}, "they would be taken for requests"
        whole = [c for c in cases if c["share"] == 1.0]
        assert {c["epoch_bytes"] for c in whole} == {0}
        assert {c["first_bytes"] for c in cases} == {summary["data_bytes"]}


def test_neither_simulate_nor_warm_needs_torch():
    code = "import sys; import tiercache.cli.warm, tiercache.cli.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
