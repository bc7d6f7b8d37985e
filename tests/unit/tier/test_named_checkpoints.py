"""The oracle by name finds each kind of damage, and nothing else."""

from tests.support.named_checkpoints import LAYOUTS, KeepRule, NamedCheckpoints

NOW_S = 1_000_000.0
HOUR_S = 3600.0
TIERS, KEPT = ("hot", "standard", "archive"), (1, 3)
TIER_OF = {1: "archive", 2: "archive", 3: "standard", 4: "standard", 5: "hot"}
STEP = "checkpoints/plain/step-"


def saved(layout="plain", delete_after_s=None):
    """Return an oracle that knows five saves, and the tiers as the rule wants them."""
    oracle, picture = NamedCheckpoints(KeepRule(TIERS, KEPT, delete_after_s)), {tier: {} for tier in TIERS}
    names = LAYOUTS[layout]
    for step in TIER_OF:
        files = names.files(step)
        oracle.saved(f"{names.run}/{names.checkpoint(step)}", names.run, files, NOW_S - (10 - step) * HOUR_S)
        oracle.beside |= names.files_beside(step)
        picture[TIER_OF[step]] |= files
    picture["hot"] |= oracle.beside
    return oracle, picture


def problems(oracle, picture):
    return oracle.problems_now(picture, NOW_S), oracle.problems_at_rest(picture, NOW_S)


def path(step, part="b.bin"):
    return f"{STEP}{step}/{part}"


def move(picture, step, src, dst):
    for key in LAYOUTS["plain"].files(step):
        picture[dst][key] = picture[src].pop(key)


def dated(picture):
    picture["archive"][path("3.20261101T120000Z")] = picture["standard"][path(3)]


def test_nothing_is_wrong_where_the_rule_wants_it_and_no_two_files_are_equal():
    for layout in LAYOUTS:
        assert problems(*saved(layout)) == ([], []), layout
    files = [data for layout in LAYOUTS.values() for step in (1, 2) for data in layout.files(step).values()]
    assert len(set(files)) == len(files)


DAMAGES = {  # what is done to the tiers, what is wrong at once, what is wrong at rest
    "a file is nowhere": (
        lambda picture: picture["standard"].pop(path(3)),
        [f"{STEP}3 is complete in no tier: 2 of 3 files in standard"],
        [f"{STEP}3 is torn in standard: 2 of 3 files in standard"],
    ),
    "parts in two tiers": (
        lambda picture: picture["archive"].update({path(3): picture["standard"].pop(path(3))}),
        [f"{STEP}3 is complete in no tier: 2 of 3 files in standard, 1 of 3 files in archive"],
        [f"{STEP}3 is torn in standard, archive: 2 of 3 files in standard, 1 of 3 files in archive"],
    ),
    "bytes of another checkpoint": (
        lambda picture: picture["hot"].update({path(3): picture["standard"][path(4)]}),
        [f"hot has other bytes than were saved under {path(3)}"],
        [f"{STEP}3 is torn in hot: 1 of 3 files in hot, 3 of 3 files in standard"],
    ),
    "a name that nobody saved": (
        dated, [], [f"archive has names that nobody saved: {path('3.20261101T120000Z')}"],
    ),
    "a part of a copy": (
        lambda picture: picture["archive"].update({path(3): picture["standard"][path(3)]}),
        [],
        [f"{STEP}3 is torn in archive: 3 of 3 files in standard, 1 of 3 files in archive"],
    ),
    "a copy in a second tier": (
        lambda picture: picture["archive"].update(LAYOUTS["plain"].files(3)),
        [],
        [f"{STEP}3 should be in standard alone: 3 of 3 files in standard, 3 of 3 files in archive"],
    ),
    "too warm": (
        lambda picture: move(picture, 1, "archive", "standard"),
        [],
        [f"{STEP}1 should be in archive alone: 3 of 3 files in standard"],
    ),
    "too cold": (
        lambda picture: move(picture, 5, "hot", "standard"),
        [],
        [f"{STEP}5 should be in hot alone: 3 of 3 files in standard"],
    ),
}  # fmt: skip


def test_each_damage_is_named():
    for name, (damage, now, at_rest) in DAMAGES.items():
        oracle, picture = saved()
        damage(picture)
        assert problems(oracle, picture) == (now, at_rest), name


def test_a_file_beside_checkpoints_must_stay():
    oracle, picture = saved("deepspeed")
    picture["archive"]["checkpoints/deepspeed/latest"] = picture["hot"].pop("checkpoints/deepspeed/latest")
    now, at_rest = problems(oracle, picture)
    assert now == ["checkpoints/deepspeed/latest is not in hot"]
    assert at_rest == ["archive has checkpoints/deepspeed/latest, which no rule moves"]


def test_only_an_old_checkpoint_that_no_list_keeps_is_deleted_and_as_a_whole():
    oracle, picture = saved(delete_after_s=8.5 * HOUR_S)
    assert problems(oracle, picture) == ([], [f"{STEP}1 should have been deleted: 3 of 3 files in archive"])
    del picture["archive"][path(1)]
    assert problems(oracle, picture) == ([], [f"{STEP}1 is torn in archive: 2 of 3 files in archive"])
    for tier, step in (("archive", 1), ("archive", 2), ("standard", 3)):
        for key in LAYOUTS["plain"].files(step):
            picture[tier].pop(key, None)
    now, at_rest = problems(oracle, picture)
    assert [text.partition(" is ")[0] for text in now] == [f"{STEP}{n}" for n in (2, 3)]
    assert at_rest == [f"{STEP}{n} is nowhere: no file left" for n in (2, 3)]
