"""The oracle of the tier tests finds each kind of fault in pictures of tiers."""

import pytest
from tests.tier.oracle import DAY_S, Group, Oracle, Seen

GRACE_S = DAY_S
OLD, NEW = (
    Group(f"c/{n}", (f"c/{n}/a", f"c/{n}/b", f"c/{n}/last"), f"c/{n}/last", "c", n, 30 * DAY_S, 1) for n in (1, 2)
)
FILE = Group("f", ("f",))


def data(key, seed=0):
    return f"{key} {seed}".encode()


@pytest.fixture
def oracle():
    """Two checkpoints and a file, all in hot, written on day 0; day 1 begins."""
    oracle = Oracle(GRACE_S, 600.0)
    oracle.before = {"hot": {}, "cold": {}}
    for group in (OLD, NEW, FILE):
        oracle.knows(group)
        for key in group.keys:
            oracle.wrote("hot", key, data(key), 0.0)
    oracle.begins(picture(), DAY_S)
    return oracle


def objects(*groups, **how):
    return {key: Seen(data(key), **how) for group in groups for key in group.keys}


def picture(hot=None, cold=None):
    return {"hot": objects(OLD, NEW, FILE) if hot is None else hot, "cold": cold or {}}


def found(oracle, now, day=1.0):
    return "; ".join(oracle.look(now, day * DAY_S))


def test_the_oracle_finds_no_fault_in_unchanged_tiers(oracle):
    assert found(oracle, picture()) == ""


def test_a_copy_that_is_deleted_after_grace_is_right(oracle):
    assert found(oracle, picture(cold=objects(FILE))) == ""
    assert found(oracle, picture(objects(OLD, NEW), objects(FILE)), day=2.1) == ""


def test_a_copy_that_is_deleted_before_grace_is_over_is_found(oracle):
    assert found(oracle, picture(cold=objects(FILE))) == ""
    assert "grace" in found(oracle, picture(objects(OLD, NEW), objects(FILE)), day=1.5)


def test_a_copy_of_corrupt_bytes_may_be_removed_at_once(oracle):
    oracle.rotted("hot", "f", b"rot")
    hot = objects(OLD, NEW) | {"f": Seen(b"rot")}
    assert found(oracle, picture(hot, {"f": Seen(b"rot")})) == ""
    assert found(oracle, picture(hot)) == ""


def test_a_part_of_a_copy_may_be_withdrawn_at_once(oracle):
    parts = {key: seen for key, seen in objects(OLD).items() if key != OLD.last}
    assert found(oracle, picture(cold=parts)) == ""
    assert found(oracle, picture(), day=1.1) == ""


def test_a_complete_copy_may_be_withdrawn_unless_another_tier_has_got_one_since(oracle):
    assert found(oracle, picture(cold=objects(FILE))) == ""
    assert found(oracle, picture(), day=1.1) == ""
    assert found(oracle, picture(cold=objects(FILE)), day=1.2) == ""
    warm = {"warm": objects(FILE)}
    assert found(oracle, picture(cold=objects(FILE)) | warm, day=1.3) == ""
    oracle.wrote("hot", "f", data("f", 1), 1.4 * DAY_S)
    oracle.wrote("hot", "f", data("f"), 1.4 * DAY_S)
    oracle.first_seen_s["hot", "f", data("f")] = 1.3 * DAY_S
    assert "grace" in found(oracle, picture() | warm, day=1.4)


def test_a_pin_may_end_an_interrupted_copy_and_keeps_what_users_wrote(oracle):
    parts = {key: seen for key, seen in objects(OLD).items() if key != OLD.last}
    assert found(oracle, picture(cold=parts)) == ""
    oracle.pins(OLD.keys)
    assert found(oracle, picture(), day=1.1) == ""
    assert "is pinned, and gone from there" in found(oracle, picture(objects(NEW, FILE)), day=31)


def test_a_part_that_a_user_wrote_is_not_withdrawn(oracle):
    oracle.wrote("cold", "c/1/a", data("c/1/a"), DAY_S)
    part = picture(cold={"c/1/a": Seen(data("c/1/a"))})
    oracle.begins(part, DAY_S)
    assert "grace" in found(oracle, picture(), day=1.1)


def test_a_copy_of_bytes_that_a_user_has_replaced_may_be_withdrawn(oracle):
    assert found(oracle, picture(cold=objects(FILE))) == ""
    hot = objects(OLD, NEW) | {"f": Seen(data("f", 1))}
    oracle.wrote("hot", "f", data("f", 1), DAY_S)
    oracle.begins(picture(hot, objects(FILE)), DAY_S)
    assert found(oracle, picture(hot), day=1.1) == ""
    assert "lie nowhere any more" in found(oracle, picture(objects(OLD, NEW)), day=1.1)


@pytest.fixture
def removed(oracle):
    """The file lay in cold for a day, and was removed from there."""
    assert found(oracle, picture(cold=objects(FILE))) == ""
    oracle.removed("cold", "f")
    oracle.begins(picture(), 2.1 * DAY_S)
    return oracle


def test_a_copy_that_is_made_again_starts_a_new_grace_period(removed):
    assert "grace" in found(removed, picture(objects(OLD, NEW), objects(FILE)), day=2.1)


def test_a_copy_that_a_user_puts_back_keeps_its_grace_period(removed):
    removed.wrote("cold", "f", data("f"), 2.1 * DAY_S)
    assert found(removed, picture(objects(OLD, NEW), objects(FILE)), day=2.1) == ""


def test_a_lost_object_is_found(oracle):
    assert "lie nowhere any more" in found(oracle, picture(objects(OLD, NEW)))


def test_an_old_object_may_be_deleted_by_its_rule(oracle):
    assert "1.0 days old" in found(oracle, picture(objects(NEW, FILE)))
    oracle.begins(picture(), 31 * DAY_S)
    assert found(oracle, picture(objects(NEW, FILE)), day=31) == ""


def test_a_lost_newest_checkpoint_is_found_at_any_age(oracle):
    assert "newest complete checkpoint" in found(oracle, picture(objects(OLD, FILE)), day=31)


def test_the_newest_checkpoint_must_be_readable_somewhere(oracle):
    oracle.asked([NEW.name], 0.0)
    now = picture(objects(OLD, FILE) | objects(NEW, storage_class="GLACIER", readable=False))
    assert "no place has it whole and readable" in found(oracle, now)


def test_the_newest_checkpoint_must_be_whole_in_one_place(oracle):
    half = {key: seen for key, seen in objects(NEW).items() if not key.endswith("/a")}
    oracle.first_seen_s = {("cold", "c/2/a", data("c/2/a")): 0.0}
    now = picture(objects(OLD, FILE) | half, {"c/2/a": Seen(data("c/2/a"))})
    assert "no place has it whole and readable" in found(oracle, now)


def test_wrong_bytes_are_found(oracle):
    assert "that nobody wrote" in found(oracle, picture(cold={"f": Seen(b"torn")}))


def test_an_unknown_name_is_found(oracle):
    assert "nobody wrote an object of that name" in found(oracle, picture(cold={"f.tmp": Seen(data("f"))}))


def test_a_checkpoint_that_looks_complete_and_is_not_is_found(oracle):
    assert "looks complete and lacks c/1/a" in found(oracle, picture(cold={k: Seen(data(k)) for k in OLD.keys[1:]}))


HALF = {k: Seen(data(k)) for k in OLD.keys[:2]}


def test_a_half_copied_checkpoint_is_found_at_the_end_only(oracle):
    assert found(oracle, picture(cold=HALF)) == ""
    assert "2 of its 3 objects were left" in oracle.at_rest(picture(cold=HALF))[0]


def test_a_spoilt_part_of_a_copy_may_stay(oracle):
    oracle.rotted("cold", "c/1/a", b"rot")
    assert oracle.at_rest(picture(cold={"c/1/a": Seen(b"rot")})) == []
    assert oracle.at_rest(picture(cold={"c/1/a": Seen(data("c/1/a"))})) != []


def test_a_checkpoint_with_an_object_that_is_corrupt_everywhere_may_stay_half_copied(oracle):
    oracle.rotted("hot", "c/1/last", b"rot")
    hot = objects(OLD, NEW, FILE) | {"c/1/last": Seen(b"rot")}
    assert oracle.at_rest(picture(hot, HALF)) == []
    assert oracle.at_rest({**picture(hot, HALF), "warm": objects(OLD)}) != []


@pytest.mark.parametrize("is_last_look", [True, False])
def test_what_somebody_writes_during_the_last_look_may_be_deleted_by_a_server_that_ignores_etags(oracle, is_last_look):
    assert found(oracle, picture(cold=objects(FILE))) == ""
    if is_last_look:
        oracle.looks_for_the_last_time()
    oracle.wrote("hot", "f", data("f", 1), 2.1 * DAY_S)
    oracle.decides(is_decided=True)
    missed = found(oracle, picture(objects(OLD, NEW), objects(FILE)), day=2.1)
    assert ("lie nowhere any more" in missed) == (not is_last_look)


def test_a_half_deleted_checkpoint_is_found(oracle):
    assert found(oracle, picture(cold=objects(OLD))) == ""
    assert "2 of its 3 objects were left" in oracle.at_rest(picture(cold=HALF))[0]


def test_a_checkpoint_that_users_changed_by_hand_is_ignored(oracle):
    assert oracle.at_rest(picture(cold=HALF), {"c/1"}) == []
    assert "2 of its 3 objects were left" in oracle.at_rest(picture(cold=HALF), {"c/2"})[0]


def test_a_pinned_checkpoint_may_stay_half_copied(oracle):
    assert found(oracle, picture(cold=objects(OLD))) == ""
    oracle.pins(["c/1/a"])
    assert oracle.at_rest(picture(cold=HALF)) == []
    oracle.pins(["c/2/a"])
    assert "2 of its 3 objects were left" in oracle.at_rest(picture(cold=HALF))[0]


def test_a_pinned_copy_that_vanishes_is_found(oracle):
    assert found(oracle, picture(cold=objects(FILE))) == ""
    oracle.pinned = {"f"}
    assert "is pinned, and gone" in found(oracle, picture(objects(OLD, NEW), objects(FILE)), day=9)


def test_a_pin_during_a_batch_of_deletions_is_too_late_for_that_batch_only(oracle):
    assert found(oracle, picture(cold=objects(FILE, OLD))) == ""
    oracle.decides(is_decided=True)
    oracle.pins(["f", *OLD.keys])
    assert found(oracle, picture(objects(OLD, NEW), objects(FILE, OLD)), day=9) == ""
    oracle.decides(is_decided=False)
    assert "c/1/a is pinned, and gone" in found(oracle, picture(objects(NEW), objects(FILE, OLD)), day=9)


def test_a_user_who_removes_the_other_copy_during_a_deletion_loses_both(oracle):
    hot, cold = objects(OLD, NEW), objects(FILE)
    assert found(oracle, picture(objects(OLD, NEW, FILE), cold)) == ""
    oracle.begins(picture(objects(OLD, NEW, FILE), cold), 2 * DAY_S)
    oracle.removed("cold", "f")
    assert "lie nowhere any more" in found(oracle, picture(hot), day=2)
    oracle.wrote("hot", "f", data("f"), 0.0)
    oracle.wrote("cold", "f", data("f"), 0.0)
    oracle.begins(picture(objects(OLD, NEW, FILE), cold), 2 * DAY_S)
    oracle.decides(is_decided=True)
    oracle.removed("cold", "f")
    assert "lie nowhere any more" not in found(oracle, picture(hot), day=2)


@pytest.mark.parametrize("is_decided", [True, False])
@pytest.mark.parametrize("place", ["hot", "cold"])
def test_a_user_who_replaces_an_object_during_its_deletion_loses_it(oracle, place, is_decided):
    oracle.begins(picture(cold=objects(FILE)), 2 * DAY_S)
    oracle.decides(is_decided=is_decided)
    new = {"f": Seen(data("f", 1))}
    oracle.wrote(place, "f", data("f", 1), 2 * DAY_S)
    hot, cold = (objects(FILE), new) if place == "cold" else (new, objects(FILE))
    oracle.begins(picture(objects(OLD, NEW) | hot, cold), 2 * DAY_S)
    assert ("lie nowhere any more" in found(oracle, picture(objects(OLD, NEW), cold), day=2.1)) == (not is_decided)


def test_what_a_user_wrote_during_deletions_and_is_still_there_afterwards_stays(oracle):
    oracle.decides(is_decided=True)
    oracle.wrote("hot", "f", data("f", 1), DAY_S)
    hot = objects(OLD, NEW) | {"f": Seen(data("f", 1))}
    oracle.begins(picture(hot), DAY_S)
    oracle.decides(is_decided=False)
    assert "lie nowhere any more" in found(oracle, picture(objects(OLD, NEW)))


@pytest.mark.parametrize("how", ["removed", "rotted"])
def test_a_newest_checkpoint_that_users_took_during_a_batch_of_deletions_is_not_missed_afterwards(oracle, how):
    without = {key: seen for key, seen in objects(OLD, NEW, FILE).items() if key != "c/2/a"}
    oracle.decides(is_decided=True)
    if how == "removed":
        oracle.removed("hot", "c/2/a")
    else:
        oracle.rotted("hot", "c/2/a", b"rot")
        without["c/2/a"] = Seen(b"rot")
    oracle.begins(picture(without), DAY_S)
    assert found(oracle, picture(without)) == ""
    oracle.decides(is_decided=False)
    assert found(oracle, picture(without)) == ""


@pytest.mark.parametrize("is_decided", [True, False])
def test_a_user_who_removes_the_newer_checkpoint_during_a_deletion_is_too_late(oracle, is_decided):
    whole = objects(OLD, NEW, FILE)
    oracle.begins(picture(whole), 31 * DAY_S)
    oracle.decides(is_decided=is_decided)
    without = {key: seen for key, seen in whole.items() if key != "c/2/last"}
    oracle.removed("hot", "c/2/last")
    oracle.begins(picture(without), 31 * DAY_S)
    left = {key: seen for key, seen in without.items() if key not in OLD.keys}
    assert ("lie nowhere any more" in found(oracle, picture(left), day=31)) == (not is_decided)


def test_a_pin_before_a_batch_of_deletions_counts(oracle):
    assert found(oracle, picture(cold=objects(FILE))) == ""
    oracle.pins(["f"])
    oracle.decides(is_decided=True)
    oracle.pins(["f", "c/1/a"])
    assert "is pinned, and gone" in found(oracle, picture(objects(OLD, NEW), objects(FILE)), day=9)


def test_a_pinned_copy_of_another_class_is_found(oracle):
    oracle.pinned = {"f"}
    assert "its class is" in found(oracle, picture(objects(OLD, NEW) | objects(FILE, storage_class="IA")))


def test_an_unannounced_archive_class_is_found(oracle):
    now = picture(objects(OLD, NEW) | objects(FILE, storage_class="GLACIER", readable=False))
    oracle.asked(["f"], 0.9 * DAY_S)
    assert "became unreadable" in found(oracle, now, day=1.5)


def test_two_contents_that_users_wrote_in_two_tiers_must_both_stay(oracle):
    oracle.wrote("cold", "f", data("f", 1), DAY_S)
    both = picture(cold={"f": Seen(data("f", 1))})
    oracle.begins(both, DAY_S)
    assert found(oracle, both) == ""
    assert "lie nowhere any more" in found(oracle, picture(cold=objects(FILE)))


def test_a_rewritten_object_supersedes_the_copies_of_the_old_one(oracle):
    assert found(oracle, picture(cold=objects(FILE))) == ""
    oracle.wrote("hot", "f", data("f", 1), DAY_S)
    oracle.begins(picture(objects(OLD, NEW) | {"f": Seen(data("f", 1))}, objects(FILE)), DAY_S)
    assert found(oracle, picture(objects(OLD, NEW) | {"f": Seen(data("f", 1))}, {"f": Seen(data("f", 1))})) == ""


def test_an_object_that_users_removed_everywhere_is_not_missed(oracle):
    oracle.removed("hot", "f")
    oracle.begins(picture(objects(OLD, NEW)), DAY_S)
    assert found(oracle, picture(objects(OLD, NEW))) == ""


def test_an_object_that_users_removed_in_one_tier_must_stay_in_the_other(oracle):
    assert found(oracle, picture(cold=objects(FILE))) == ""
    oracle.removed("hot", "f")
    oracle.begins(picture(objects(OLD, NEW), objects(FILE)), DAY_S)
    assert "lie nowhere any more" in found(oracle, picture(objects(OLD, NEW)))
