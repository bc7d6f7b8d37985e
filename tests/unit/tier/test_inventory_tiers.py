"""How tiers are listed for an inventory, and how metrics that rules use are found in it."""

import numpy as np
import pytest
from tests.support.faults import Fault, FaultStore
from tests.support.scripted_tiers import NOW_S
from tests.support.stores import CountingStore

from tiercache.errors import StoreError
from tiercache.tier.listing import list_tiers
from tiercache.tier.rules import load_rule_file
from tiercache.tier.stores import Stores

# -- metrics ----------------------------------------------------------------------------------------------------------

BEST = '[[rules]]\nmatch = "**"\nkeep_hot = { best = "val_loss:2" }\nthen = "archive"\n'


def test_a_metric_is_read_from_a_readable_copy(tiers):
    tiers.rules = BEST
    tiers.hot.add("step-1/metrics.json", storage_class="GLACIER")
    tiers.archive.text("step-1/metrics.json", {"val_loss": 1.5})
    assert tiers.take().snapshot.metrics["val_loss"].tolist() == [1.5]


def test_a_metric_that_cannot_be_read_now_is_an_error_and_one_that_cannot_be_read_at_all_is_unread(tiers):
    tiers.rules = BEST
    tiers.hot.text("step-1/metrics.json", {"val_loss": 1.5})
    with pytest.raises(StoreError, match="metrics"):
        tiers.take(hot=FaultStore(tiers.hot, [Fault("read_tail")]))
    fault = Fault("read_tail", retryable=False, status=403)
    assert tiers.take(hot=FaultStore(tiers.hot, [fault])).of("step-1", "unread")


def test_orbax_metrics_are_read(tiers):
    """CheckpointManager writes <step>/metrics/metrics, JSON without an ending."""
    tiers.rules = f'{BEST}\ncheckpoint = "{{step}}/"'
    for step in (100, 200):
        tiers.hot.add(f"run/{step}/_CHECKPOINT_METADATA")
        tiers.hot.add(f"run/{step}/default/manifest.ocdbt")
        tiers.hot.text(f"run/{step}/metrics/metrics", {"val_loss": step / 100, "train": {"acc": 0.5}})
    by_name = tiers.take()
    assert [by_name.snapshot.metrics["val_loss"][by_name.group(f"run/{step}")] for step in (100, 200)] == [1.0, 2.0]


def test_a_checkpoint_whose_name_has_the_metric_is_not_read(tiers):
    tiers.rules = BEST
    tiers.hot.add("c/epoch=1-step=10-val_loss=0.5.ckpt")
    counting = CountingStore(tiers.hot)
    assert tiers.take(hot=counting).snapshot.metrics["val_loss"].tolist() == [0.5]
    assert counting.n_calls() == counting.n_calls("list")


def test_unreadable_metrics_count_as_unread_unless_the_mover_has_archived_the_checkpoint(tiers):
    """A mover archives what was not among the best when it could be read."""
    tiers.rules = BEST
    for name in ("by-hand", "by-mover"):
        for file in ("metrics.json", "a.pt"):
            tiers.archive.add(f"{name}/step-1/{file}", storage_class="GLACIER")
    for file in ("metrics.json", "a.pt"):
        tiers.catalog.verify(tiers.archive, f"by-mover/step-1/{file}")
    by_name = tiers.take()
    assert [by_name.of(f"{name}/step-1", "unread") for name in ("by-hand", "by-mover")] == [True, False]
    assert np.isnan(by_name.snapshot.metrics["val_loss"]).all()


# -- tiers ------------------------------------------------------------------------------------------------------------


def test_a_tier_that_cannot_be_listed_is_an_error(tiers):
    tiers.hot.add("x")
    faulty = FaultStore(tiers.archive, [Fault("list", times=2)])
    with pytest.raises(StoreError, match="archive"):
        tiers.take(archive=faulty)


def test_tiers_with_one_url_have_the_objects_of_their_storage_class(tiers):
    tiers.tables = (
        '[tiers.hot]\nurl = "memory://h"\n[tiers.standard]\nurl = "memory://s"\n[tiers.archive]\nurl = "memory://s"\n'
    )
    tiers.tables += 'storage_class = "GLACIER"\n'
    tiers.standard.add("x", storage_class="STANDARD")
    tiers.standard.add("y", storage_class="GLACIER")
    tiers.stores["archive"] = tiers.standard
    by_name = tiers.take()
    assert [(by_name.paths[g], t) for g, t in zip(by_name.snapshot.group, by_name.snapshot.tier, strict=True)] == [
        ("x", 1),
        ("y", 2),
    ]


def test_a_folder_that_does_not_exist_is_an_empty_tier(tmp_path):
    path = tmp_path / "tiercache.toml"
    path.write_text(f'[tiers.hot]\nurl = "{tmp_path}/hot"\n[tiers.standard]\nurl = "{tmp_path}/standard"\n')
    file = load_rule_file(path)
    with Stores(file) as stores:
        assert len(list_tiers(file, stores, now_s=NOW_S)) == 0
