"""The oracle of the tier tests finds each kind of fault in pictures of tiers."""

import pytest
from tests.support.tier_oracle import DAY_S, Group, Oracle, Seen

OLD, NEW = (
    Group(f"c/{n}", (f"c/{n}/a", f"c/{n}/b", f"c/{n}/last"), f"c/{n}/last", "c", n, 30 * DAY_S, 1) for n in (1, 2)
)
FILE = Group("f", ("f",))
LOST = "lie nowhere any more"


def data(key, seed=0):
    return f"{key} {seed}".encode()


def objects(*groups, **how):
    return {key: Seen(data(key), **how) for group in groups for key in group.keys}


def picture(hot=None, cold=None):
    return {"hot": objects(OLD, NEW, FILE) if hot is None else hot, "cold": cold or {}}


CHECKPOINTS, PARTS = objects(OLD, NEW), {key: Seen(data(key)) for key in OLD.keys[:2]}
COPIED, MOVED = picture(cold=objects(FILE)), picture(CHECKPOINTS, objects(FILE))
NEW_FILE = {"f": Seen(data("f", 1))}


@pytest.fixture
def oracle():
    """Two checkpoints and a file, all in hot, written on day 0; day 1 begins."""
    oracle = Oracle(DAY_S, 600.0)
    oracle.before = {"hot": {}, "cold": {}}
    for group in (OLD, NEW, FILE):
        oracle.knows(group)
        for key in group.keys:
            oracle.wrote("hot", key, data(key), 0.0)
    oracle.begins(picture(), DAY_S)
    return oracle


def found(oracle, now, day=1.0):
    return "; ".join(oracle.look(now, day * DAY_S))


FAULTS = {  # what lies there, on which day, and what is said
    "nothing has changed": (picture(), 1, ""),
    "the file is lost": (picture(CHECKPOINTS), 1, LOST),
    "a checkpoint is deleted too early": (picture(objects(NEW, FILE)), 1, "1.0 days old"),
    "the newest checkpoint is lost, whatever its age": (
        picture(objects(OLD, FILE)), 31, "newest complete checkpoint",
    ),
    "torn bytes": (picture(cold={"f": Seen(b"torn")}), 1, "that nobody wrote"),
    "an unknown name": (picture(cold={"f.tmp": Seen(data("f"))}), 1, "nobody wrote an object of that name"),
    "a checkpoint looks complete": (
        picture(cold={key: Seen(data(key)) for key in OLD.keys[1:]}), 1, "looks complete and lacks c/1/a",
    ),
    "a half copied checkpoint is no fault yet": (picture(cold=PARTS), 1, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_a_picture(oracle, name):
    now, day, said = FAULTS[name]
    assert (said in found(oracle, now, day)) if said else found(oracle, now, day) == ""


def test_a_copy_that_is_deleted_before_grace_is_over_is_found(oracle):
    assert found(oracle, COPIED) == ""
    assert "grace" in found(oracle, MOVED, day=1.5)


def test_the_newest_checkpoint_must_be_whole_and_readable_in_one_place(oracle):
    oracle.asked([NEW.name], 0.0)
    said = "no place has it whole and readable"
    archived = objects(NEW, storage_class="GLACIER", readable=False)
    assert said in found(oracle, picture(objects(OLD, FILE) | archived))
    half = {key: seen for key, seen in objects(NEW).items() if not key.endswith("/a")}
    oracle.first_seen_s = {("cold", "c/2/a", data("c/2/a")): 0.0}
    assert said in found(oracle, picture(objects(OLD, FILE) | half, {"c/2/a": Seen(data("c/2/a"))}))


def test_a_checkpoint_in_parts_is_wrong_at_rest_unless_a_user_took_it_apart_or_it_cannot_be_copied(oracle):
    left = "2 of its 3 objects were left"
    half = picture(cold=PARTS)
    assert left in oracle.at_rest(half)[0]
    assert left in oracle.at_rest(half, {"c/2"})[0]
    assert oracle.at_rest(half, {"c/1"}) == []
    oracle.rotted("hot", "c/1/last", b"rot")
    hot = picture()["hot"] | {"c/1/last": Seen(b"rot")}
    assert oracle.at_rest(picture(hot, PARTS)) == []
    assert oracle.at_rest({**picture(hot, PARTS), "warm": objects(OLD)}) != []
    oracle.rotted("cold", "c/1/a", b"rot")
    assert oracle.at_rest(picture(cold={"c/1/a": Seen(b"rot")})) == []
    assert oracle.at_rest(picture(cold={"c/1/a": Seen(data("c/1/a"))})) != []


def test_a_pinned_copy_that_vanishes_or_changes_its_class_is_found(oracle):
    assert found(oracle, COPIED) == ""
    oracle.pinned = {"f"}
    assert "its class is" in found(oracle, picture(CHECKPOINTS | objects(FILE, storage_class="IA"), objects(FILE)))
    assert "is pinned, and gone" in found(oracle, MOVED, day=9)


def test_an_unannounced_archive_class_is_found(oracle):
    oracle.asked(["f"], 0.9 * DAY_S)
    now = picture(CHECKPOINTS | objects(FILE, storage_class="GLACIER", readable=False))
    assert "became unreadable" in found(oracle, now, day=1.5)


def test_two_contents_that_users_wrote_in_two_tiers_must_both_stay(oracle):
    oracle.wrote("cold", "f", data("f", 1), DAY_S)
    both = picture(cold=NEW_FILE)
    oracle.begins(both, DAY_S)
    assert found(oracle, both) == ""
    assert LOST in found(oracle, COPIED)


@pytest.mark.parametrize("is_copied", [True, False])
def test_an_object_that_users_removed_in_one_tier_must_stay_in_the_other(oracle, is_copied):
    assert found(oracle, COPIED if is_copied else picture()) == ""
    oracle.removed("hot", "f")
    oracle.begins(MOVED if is_copied else picture(CHECKPOINTS), DAY_S)
    assert (LOST in found(oracle, picture(CHECKPOINTS))) == is_copied


# -- while a batch of deletions is decided and made --------------------------------------------------------------------


def test_what_a_user_wrote_during_deletions_and_is_still_there_afterwards_stays(oracle):
    oracle.decides(is_decided=True)
    oracle.wrote("hot", "f", data("f", 1), DAY_S)
    oracle.begins(picture(CHECKPOINTS | NEW_FILE), DAY_S)
    oracle.decides(is_decided=False)
    assert LOST in found(oracle, picture(CHECKPOINTS))
