"""The oracle by name finds each kind of damage, and nothing else."""

import pytest
from tests.support.named_checkpoints import LAYOUTS, KeepRule, NamedCheckpoints

NOW_S = 1_000_000.0
HOUR_S = 3600.0
RULE = KeepRule(("hot", "standard", "archive"), (1, 3))
TIER_OF = {1: "archive", 2: "archive", 3: "standard", 4: "standard", 5: "hot"}


def saved(layout="plain", rule=RULE):
    """Return an oracle that knows five saves, and the tiers as the rule wants them."""
    oracle, picture = NamedCheckpoints(rule), {tier: {} for tier in rule.tiers}
    names = LAYOUTS[layout]
    for step in TIER_OF:
        files = names.files(step)
        oracle.saved(f"{names.run}/{names.checkpoint(step)}", names.run, files, NOW_S - (10 - step) * HOUR_S)
        oracle.beside |= names.files_beside(step)
        picture[TIER_OF[step]] |= files
    picture["hot"] |= oracle.beside
    return oracle, picture


def problems(oracle, picture, now_s=NOW_S):
    return oracle.problems_now(picture, now_s), oracle.problems_at_rest(picture, now_s)


def path(step, part="b.bin"):
    return f"checkpoints/plain/step-{step}/{part}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_wrong_where_the_rule_wants_it(layout):
    assert problems(*saved(layout)) == ([], [])


def test_the_files_of_two_checkpoints_differ():
    files = [data for layout in LAYOUTS.values() for step in (1, 2) for data in layout.files(step).values()]
    assert len(set(files)) == len(files)


def test_a_file_that_exists_nowhere_is_a_loss():
    oracle, picture = saved()
    del picture["standard"][path(3)]
    now, at_rest = problems(oracle, picture)
    assert now == ["checkpoints/plain/step-3 is complete in no tier: 2 of 3 files in standard"]
    assert at_rest == ["checkpoints/plain/step-3 is torn in standard: 2 of 3 files in standard"]


def test_a_checkpoint_in_parts_that_lie_in_two_tiers_is_a_loss():
    oracle, picture = saved()
    picture["archive"][path(3)] = picture["standard"].pop(path(3))
    now, _ = problems(oracle, picture)
    assert now == ["checkpoints/plain/step-3 is complete in no tier: 2 of 3 files in standard, 1 of 3 files in archive"]


def test_bytes_of_another_checkpoint_under_a_name_are_foreign():
    oracle, picture = saved()
    picture["hot"][path(3)] = picture["standard"][path(4)]
    now, at_rest = problems(oracle, picture)
    assert now == [f"hot has other bytes than were saved under {path(3)}"]
    assert at_rest == [
        "checkpoints/plain/step-3 is torn in hot: 1 of 3 files in hot, 3 of 3 files in standard",
    ]


def test_a_dated_name_is_wrong_at_rest():
    oracle, picture = saved()
    dated = path(3).replace("step-3", "step-3.20261101T120000Z")
    picture["archive"][dated] = picture["standard"][path(3)]
    assert problems(oracle, picture) == ([], [f"archive has names that nobody saved: {dated}"])


def test_a_part_of_a_copy_is_wrong_at_rest():
    oracle, picture = saved()
    picture["archive"][path(3)] = picture["standard"][path(3)]
    now, at_rest = problems(oracle, picture)
    assert now == []
    assert at_rest == ["checkpoints/plain/step-3 is torn in archive: 3 of 3 files in standard, 1 of 3 files in archive"]


def test_a_whole_copy_in_a_second_tier_is_wrong_at_rest():
    oracle, picture = saved()
    picture["archive"] |= LAYOUTS["plain"].files(3)
    now, at_rest = problems(oracle, picture)
    assert now == []
    assert at_rest == [
        "checkpoints/plain/step-3 should be in standard alone: 3 of 3 files in standard, 3 of 3 files in archive"
    ]


@pytest.mark.parametrize(("step", "tier"), [(5, "standard"), (4, "archive"), (1, "standard")])
def test_a_checkpoint_in_another_tier_than_the_rule_says_is_wrong_at_rest(step, tier):
    oracle, picture = saved()
    for key in LAYOUTS["plain"].files(step):
        picture[tier][key] = picture[TIER_OF[step]].pop(key)
    now, at_rest = problems(oracle, picture)
    assert now == []
    assert at_rest == [f"checkpoints/plain/step-{step} should be in {TIER_OF[step]} alone: 3 of 3 files in {tier}"]


def test_a_file_beside_checkpoints_must_stay():
    oracle, picture = saved("deepspeed")
    picture["archive"]["checkpoints/deepspeed/latest"] = picture["hot"].pop("checkpoints/deepspeed/latest")
    now, at_rest = problems(oracle, picture)
    assert now == ["checkpoints/deepspeed/latest is not in hot"]
    assert at_rest == ["archive has checkpoints/deepspeed/latest, which no rule moves"]


# -- deletions ------------------------------------------------------------------------------------------------------


def test_only_a_checkpoint_that_no_list_keeps_and_that_is_old_may_be_gone():
    oracle, picture = saved(rule=KeepRule(RULE.tiers, RULE.keep_last, delete_after_s=8.5 * HOUR_S))
    for step in (1, 2, 3):
        for key in LAYOUTS["plain"].files(step):
            picture[TIER_OF[step]].pop(key)
    now, at_rest = problems(oracle, picture)
    assert [text.partition(" is ")[0] for text in now] == [f"checkpoints/plain/step-{n}" for n in (2, 3)]
    assert at_rest == [f"checkpoints/plain/step-{n} is nowhere: no file left" for n in (2, 3)]


def test_a_part_of_a_deleted_checkpoint_must_not_stay():
    oracle, picture = saved(rule=KeepRule(RULE.tiers, RULE.keep_last, delete_after_s=8.5 * HOUR_S))
    del picture["archive"][path(1)]
    now, at_rest = problems(oracle, picture)
    assert now == []
    assert at_rest == ["checkpoints/plain/step-1 is torn in archive: 2 of 3 files in archive"]


def test_an_old_checkpoint_that_was_not_deleted_is_wrong_at_rest():
    oracle, picture = saved(rule=KeepRule(RULE.tiers, RULE.keep_last, delete_after_s=8.5 * HOUR_S))
    now, at_rest = problems(oracle, picture)
    assert now == []
    assert at_rest == ["checkpoints/plain/step-1 should have been deleted: 3 of 3 files in archive"]


# -- recalls --------------------------------------------------------------------------------------------------------


def test_a_recalled_checkpoint_is_in_the_fastest_tier_as_long_as_it_is_held():
    oracle, picture = saved()
    oracle.held("checkpoints/plain/step-1", NOW_S + 10 * HOUR_S, is_certain=True)
    assert problems(oracle, picture) == (
        [],
        ["checkpoints/plain/step-1 was recalled and is held, but is not in hot: 3 of 3 files in archive"],
    )
    picture["hot"] |= LAYOUTS["plain"].files(1)
    assert problems(oracle, picture) == ([], [])
    del picture["hot"][path(1)]
    assert problems(oracle, picture)[1] != []


def test_a_recalled_checkpoint_leaves_the_fastest_tier_after_its_hold():
    oracle, picture = saved()
    oracle.held("checkpoints/plain/step-1", NOW_S - HOUR_S, is_certain=True)
    picture["hot"] |= LAYOUTS["plain"].files(1)
    assert problems(oracle, picture)[1] == [
        "checkpoints/plain/step-1 should be in archive alone: 3 of 3 files in hot, 3 of 3 files in archive"
    ]


def test_after_an_interrupted_recall_a_checkpoint_may_be_in_the_fastest_tier_but_not_in_parts():
    oracle, picture = saved()
    oracle.held("checkpoints/plain/step-1", NOW_S + 10 * HOUR_S, is_certain=False)
    assert problems(oracle, picture) == ([], [])
    picture["hot"] |= LAYOUTS["plain"].files(1)
    assert problems(oracle, picture) == ([], [])
    del picture["hot"][path(1)]
    assert problems(oracle, picture)[1] != []


def test_an_interrupted_recall_does_not_keep_a_checkpoint_that_the_rule_deletes():
    oracle, picture = saved(rule=KeepRule(RULE.tiers, RULE.keep_last, delete_after_s=8.5 * HOUR_S))
    oracle.held("checkpoints/plain/step-1", NOW_S + 10 * HOUR_S, is_certain=False)
    for key in LAYOUTS["plain"].files(1):
        del picture["archive"][key]
    assert problems(oracle, picture) == ([], [])
    oracle.held("checkpoints/plain/step-1", NOW_S + 10 * HOUR_S, is_certain=True)
    assert problems(oracle, picture)[0] == ["checkpoints/plain/step-1 is complete in no tier: no file left"]
