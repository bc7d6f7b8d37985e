"""Layouts: which keys form a checkpoint, at which step, of which run, and whether its names show it complete."""

import itertools

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.tier.checkpoint_names import (
    COMPLETING,
    LACKS,
    MEMBER,
    NO_GROUP,
    KeyGroups,
    UserLayout,
    group_keys,
    layout_pattern,
)
from tiercache.tier.snapshot import NO_RUN, NO_STEP


def layout_of(*keys: str) -> KeyGroups:
    return group_keys(pa.array(keys, pa.large_string()))


def groups(layout: KeyGroups, keys) -> dict[str, set[str]]:
    """Path -> its keys."""
    paths = layout.paths.to_pylist()
    found = {path: set() for path in paths}
    for key, group in zip(keys, layout.group.tolist(), strict=True):
        if group != NO_GROUP:
            found[paths[group]].add(key)
    return found


def steps(*keys: str) -> dict[str, int]:
    """Step of each checkpoint among the groups."""
    layout = layout_of(*keys)
    return {
        path: step
        for path, step, is_one in zip(layout.paths.to_pylist(), layout.step.tolist(), layout.checkpoint, strict=True)
        if is_one
    }


def lacks(*keys: str) -> dict[str, str]:
    layout = layout_of(*keys)
    return dict(zip(layout.paths.to_pylist(), [LACKS[n] for n in layout.lacks.tolist()], strict=True))


# -- the layouts of libraries ------------------------------------------------------------------------------------------

LAYOUTS = {  # keys, and the step of each checkpoint
    "torch.distributed.checkpoint": (
        "run/step-1000/.metadata run/step-1000/__0_0.distcp run/step-1000/__1_0.distcp", {"run/step-1000": 1000},
    ),
    "Trainer": (
        ("out/checkpoint-500/config.json out/checkpoint-500/model-00001-of-00002.safetensors "
        "out/checkpoint-500/model-00002-of-00002.safetensors out/checkpoint-500/model.safetensors.index.json "
        "out/checkpoint-500/optimizer.pt out/checkpoint-500/rng_state_0.pth out/checkpoint-500/trainer_state.json "
        "out/checkpoint-500/training_args.bin"), {"out/checkpoint-500": 500},
    ),
    "Trainer with DeepSpeed": (
        ("out/checkpoint-500/global_step500/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt "
        "out/checkpoint-500/global_step500/mp_rank_00_model_states.pt out/checkpoint-500/latest "
        "out/checkpoint-500/trainer_state.json out/checkpoint-500/zero_to_fp32.py"), {"out/checkpoint-500": 500},
    ),
    "Trainer with FSDP": (
        ("out/checkpoint-5/optimizer_0/.metadata out/checkpoint-5/optimizer_0/__0_0.distcp "
        "out/checkpoint-5/pytorch_model_fsdp_0/.metadata out/checkpoint-5/pytorch_model_fsdp_0/__0_0.distcp "
        "out/checkpoint-5/trainer_state.json"), {"out/checkpoint-5": 5},
    ),
    "Lightning": (
        "logs/version_0/checkpoints/epoch=2-step=300-val_loss=0.32.ckpt logs/version_0/hparams.yaml",
        {"logs/version_0/checkpoints/epoch=2-step=300-val_loss=0.32.ckpt": 300},
    ),
    "Lightning, a name that was taken": ("c/epoch=2-step=300-v1.ckpt", {"c/epoch=2-step=300-v1.ckpt": 300}),
    "Lightning, a prefix": ("c/a-mnist-epoch=02-loss=0.32.ckpt", {"c/a-mnist-epoch=02-loss=0.32.ckpt": 2}),
    "Lightning without '='": ("c/a-mnist-epoch02-loss0.32.ckpt", {"c/a-mnist-epoch02-loss0.32.ckpt": 2}),
    "Lightning with FSDP": (
        "c/epoch=0-step=10.ckpt/.metadata c/epoch=0-step=10.ckpt/__0_0.distcp c/epoch=0-step=10.ckpt/meta.pt",
        {"c/epoch=0-step=10.ckpt": 10},
    ),
    "Megatron-LM": (
        ("gpt/iter_0001000/mp_rank_00/distrib_optim.pt gpt/iter_0001000/mp_rank_00/model_optim_rng.pt "
        "gpt/iter_0001000/mp_rank_01_000/model_optim_rng.pt gpt/latest_checkpointed_iteration.txt"),
        {"gpt/iter_0001000": 1000},
    ),
    "Megatron-LM with torch_dist": (
        ("gpt/iter_0001000/.metadata gpt/iter_0001000/__0_0.distcp gpt/iter_0001000/common.pt "
        "gpt/iter_0001000/metadata.json"), {"gpt/iter_0001000": 1000},
    ),
    "DeepSpeed": (
        ("ds/global_step1000/mp_rank_00_model_states.pt ds/latest ds/zero_to_fp32.py "
        "ds/global_step1000/zero_pp_rank_0_mp_rank_00_optim_states.pt"), {"ds/global_step1000": 1000},
    ),
    "OLMo": (
        ("o/step1000-unsharded/model.pt o/step2000/model_and_optim/.metadata "
        "o/step2000/model_and_optim/__0_0.distcp o/step2000/train/rank0.pt"),
        {"o/step1000-unsharded": 1000, "o/step2000": 2000},
    ),
    **{name: (f"a/{name}", {f"a/{name}": step}) for name, step in {
        "step-10.pt": 10, "step_20.pth": 20, "ckpt-30.safetensors": 30, "checkpoint_40.pth.tar": 40, "iter_50.npz": 50,
        "epoch-6.bin": 6, "model_step_70.tar": 70, "global_step80.pt": 80, "ckpt_epoch_3_step_700.pt": 700,
    }.items()},
    "a metric without '='": (
        "a/checkpoint-230500-loss-1.2531/model.safetensors", {"a/checkpoint-230500-loss-1.2531": 230500},
    ),
}  # fmt: skip


def test_a_checkpoint_is_found_with_its_step_and_all_keys_in_its_folder_and_is_complete():
    for name, (text, expected) in LAYOUTS.items():
        keys = text.split()
        assert steps(*keys) == expected, name
        found = groups(layout_of(*keys), keys)
        for path in expected:
            assert found[path] == {key for key in keys if key == path or key.startswith(f"{path}/")}, name
        assert set(lacks(*keys).values()) == {""}, name


NO_CHECKPOINTS = (
    "run/last.ckpt", "run/latest", "run/best.pt", "run/final/model.pt", "run/step-10.txt", "run/step-10-model.pt",
    "run/pytorch_model-00001-of-00003.bin", "run/multistep5/x.pt", "run/version_0/hparams.yaml", "run/stage-1/x.pt",
    "run/release/mp_rank_00/model_optim_rng.pt", "train/shard-000001.tar", "train/n01440764/image_12.jpg",
    "run/steps-10/x.pt", "run/step-/x.pt", "run/step-0000000000000000001/x.pt", "iteration", "epoch.pt",
)  # fmt: skip


def test_keys_that_name_no_checkpoint_are_single_files():
    for key in NO_CHECKPOINTS:
        found = layout_of(key)
        assert (found.paths.to_pylist(), found.checkpoint.tolist(), found.step.tolist()) == ([key], [False], [NO_STEP])


def test_folders_named_by_a_number_alone_are_checkpoints_if_orbax_or_a_rule_says_so_and_the_outermost_of_nested_ones():
    orbax = ("a/1000/state/manifest.ocdbt", "a/1000/_CHECKPOINT_METADATA", "a/1000/d/0/_CHECKPOINT_METADATA")
    others = ("a/2000/0/model.pt", "a/2000/1/model.pt", "train/0/a.jpg")
    assert steps(*orbax, *others) == {"a/1000": 1000}
    assert groups(layout_of(*orbax, *others), (*orbax, *others))["a/1000"] == {*orbax}
    layout = group_keys(pa.array((*orbax, *others[:2])), [UserLayout("{step}/")])
    assert layout.paths.to_pylist() == ["a/1000", "a/2000"]
    assert (layout.step.tolist(), layout.run.tolist()) == ([1000, 2000], [0, 0])


# -- folders of runs that are named like a checkpoint ----------------------------------------------------------------


UNCERTAIN = "whether it is one checkpoint or a folder of checkpoints"


def test_a_folder_named_like_a_checkpoint_that_contains_checkpoints_is_left_alone_until_a_rule_names_them():
    for folder in ("finetune_from_step_5000", "dpo/iter_1", "iter_2/rlhf/epoch-3/x", "step_1/step_2"):
        names = ("model.safetensors", "optimizer.pt", "trainer_state.json")
        keys = [f"{folder}/checkpoint-{n}/{name}" for n in (100, 200, 300) for name in names]
        keys += [f"{folder}/{name}" for name in ("trainer_state.json", "model.safetensors")]
        (outer,) = [path for path, lack in lacks(*keys).items() if UNCERTAIN in lack]
        assert f"{folder}/".startswith(f"{outer}/")
        layout = group_keys(pa.array(keys), [UserLayout("checkpoint-{step}/")])
        found = zip(layout.paths.to_pylist(), layout.step.tolist(), layout.lacks.tolist(), strict=True)
        complete = {path: step for path, step, one in found if not one}
        assert complete == {f"{folder}/checkpoint-{n}": n for n in (100, 200, 300)}


PARTS = (
    "a/step-500/trainer_state.json a/step-500/global_step499/mp_rank_00_model_states.pt",
    "a/step-500/.metadata a/step-500/__0_0.distcp a/step-500/ckpt_0/x.pt a/step-500/ckpt_1/x.pt",
    "a/step-500/model_epoch_3.pt a/step-500/optimizer.pt",
    "a/step-500/model.pt a/step-500/step_500/x.pt a/step-500/500/x.pt",
)
PARTS_OR_CHECKPOINTS = (
    "a/step-500/ckpt_0/model.pt a/step-500/ckpt_1/model.pt",
    "a/step-500/checkpoint-100/model.pt",
    "a/step-500/ckpt_0.pt a/step-500/ckpt_1.pt",
    "a/step-500/trainer_state.json a/step-500/checkpoint-100/trainer_state.json",
    "a/step-500/100/_CHECKPOINT_METADATA a/step-500/100/model.msgpack",
    "a/step-500/epoch=0-step=100.ckpt a/step-500/epoch=1-step=200.ckpt",
)


def test_parts_whose_names_contain_other_numbers_belong_to_the_checkpoint_unless_they_may_be_checkpoints():
    for text in (*PARTS, *PARTS_OR_CHECKPOINTS):
        keys = text.split()
        assert list(steps(*keys)) == ["a/step-500"], text
        assert (UNCERTAIN in lacks(*keys)["a/step-500"]) == (text in PARTS_OR_CHECKPOINTS), text


# -- runs ----------------------------------------------------------------------------------------------------------


def runs_of(*keys: str) -> dict[str, int]:
    layout = layout_of(*keys)
    return dict(zip(layout.paths.to_pylist(), layout.run.tolist(), strict=True))


ONE_RUN = (
    ("r/step-9.pt", "r/step-10.pt"),
    ("c/epoch=1-step=10-val_loss=0.5.ckpt", "c/epoch=2-step=20-val_loss=-1.9e-05-v1.ckpt"),
    ("c/val_loss=0.5-epoch=1.ckpt", "c/val_loss=0.25-epoch=12.ckpt"),
    ("c/m-epoch02-acc0.32.ckpt", "c/m-epoch03-acc0.5.ckpt"),
    ("o/checkpoint-5/model.safetensors", "o/checkpoint-10/model.safetensors"),
)
TWO_RUNS = (
    ("a/step-1.pt", "b/step-1.pt"),
    ("a/model_step_1.pt", "a/optim_step_1.pt"),
    ("a/step-1.pt", "a/step-1.safetensors"),
    ("a/epoch-1.pt", "a/step-1.pt"),
    ("a/step1000/x.pt", "a/step1000-unsharded/x.pt"),
)


def test_names_that_differ_only_in_numbers_are_one_run():
    for pair in ONE_RUN:
        first, second = runs_of(*pair).values()
        assert first == second != NO_RUN, pair
    for pair in TWO_RUNS:
        assert len(set(runs_of(*pair).values())) == 2, pair


COUNTED = "some of the shards that their names count"

# -- whole or not -----------------------------------------------------------------------------------------------------


LACKING = (
    (("s/step-1/__0_0.distcp",), "a .metadata beside each .distcp"),
    (("s/step-1/m/.metadata", "s/step-1/m/__0_0.distcp", "s/step-1/o/__0_0.distcp"), "a .metadata beside each .distcp"),
    (
        ("s/step-1/.metadata", "s/step-1/.metadata.tmp", "s/step-1/__0_0.distcp"),
        "the end of a save: there is a .metadata.tmp",
    ),
    (("s/checkpoint-1/model.safetensors", "s/checkpoint-1/training_args.bin"), "trainer_state.json"),
    (("s/checkpoint-1/optimizer.pt", "s/checkpoint-1/trainer_state.json"), "weights"),
    (("s/step-1/.metadata", "s/step-1/rng.json"), "weights"),
    (("s/step-1/m-00001-of-00003.bin", "s/step-1/m-00003-of-00003.bin"), COUNTED),
)


def test_a_checkpoint_lacks_what_its_names_promise():
    for keys, missing in LACKING:
        assert set(lacks(*keys).values()) == {missing}, keys


def test_trainer_state_is_required_of_all_checkpoints_of_a_trainer_run():
    found = lacks("o/checkpoint-1/trainer_state.json", "o/checkpoint-1/model.bin", "o/checkpoint-2/model.bin")
    assert found == {"o/checkpoint-1": "", "o/checkpoint-2": "trainer_state.json"}


PARTIAL = "files that other checkpoints of its run have"


def partial(files: dict[int, list[str]]) -> set[int]:
    """Steps of the checkpoints r/step-N, with these files, that lack files which their neighbours have."""
    found = lacks(*[f"r/step-{step}/{name}" for step, names in files.items() for name in names])
    assert set(found.values()) <= {"", PARTIAL}
    return {step for step in files if found[f"r/step-{step}"]}


ABC = ["a.bin", "b.bin", "c.bin"]


def test_a_checkpoint_without_a_file_that_its_neighbours_have_is_a_partial_copy():
    for missing, n, is_first in itertools.product(ABC, (2, 3, 9), (True, False)):
        broken = 1 if is_first else n
        files = dict.fromkeys(range(1, n + 1), ABC) | {broken: [name for name in ABC if name != missing]}
        assert partial(files) == {broken}


def test_partial_copies_are_found_although_several_lack_files():
    assert partial({1: ABC, 2: ABC, 3: ABC[:2], 4: ABC[:1]}) == {3, 4}
    assert partial({1: ABC, 2: ABC[:2], 3: ABC[:1]}) == {2, 3}


def test_a_checkpoint_that_lacks_the_file_of_a_rank_is_a_partial_copy():
    for name in ("model_{n}.bin", "rank-{n}/model.bin", "model_{n}/part_0.bin"):
        ranks = [name.format(n=n) for n in range(8)]
        for broken in (ranks[:-1], ranks[1:], ranks[:1]):
            assert partial({1: ranks, 2: ranks, 3: broken}) == {3}
            assert partial({1: ranks, 2: broken, 3: broken}) == {2, 3}


def test_steps_in_the_names_of_files_do_not_count():
    assert partial({step: [f"model_{step}.bin", f"optim-{step}.bin"] for step in (9, 10, 1000)}) == set()
    assert partial({9: ["model_9.bin", "optim-9.bin"], 10: ["model_10.bin"]}) == {10}


def test_a_job_that_changes_its_number_of_ranks_writes_complete_checkpoints():
    eight, four = ([f"model_world_{n}_rank_{rank}.bin" for rank in range(n)] for n in (8, 4))
    assert partial(dict.fromkeys((1, 2, 3, 4), eight) | dict.fromkeys((5, 6, 7), four)) == set()
    assert partial(dict.fromkeys((1, 2, 3), four) | dict.fromkeys((4, 5, 6, 7), eight)) == set()
    # The first two after the change might as well be partial copies.
    assert partial(dict.fromkeys((1, 2, 3, 4), eight) | dict.fromkeys((5, 6), four)) == {5, 6}


def test_files_that_only_some_checkpoints_have_are_not_required_of_the_others():
    assert partial({1: ABC, 2: ABC, 3: ABC, 4: [*ABC, "ema.bin"]}) == set()
    assert partial({1: [*ABC, "eval.json"], 2: ABC}) == set()
    assert partial({1: [*ABC, "metrics.json"], 2: [*ABC, "metrics.json"], 3: ABC}) == set()
    assert partial({1: [*ABC, "notes.txt"], 2: [*ABC, "notes.txt"], 3: ABC, 4: ABC}) == set()
    hashes = ["".join(c * 16 for c in pair) for pair in ("a1", "b2", "c3")]
    assert partial({n: ["m.bin", *[f"d/{one}" for one in hashes[:n]]] for n in (1, 2, 3)}) == set()


def test_a_description_that_all_others_have_is_required():
    assert partial({1: ["m.bin", "config.json"], 2: ["m.bin", "config.json"], 3: ["m.bin"]}) == {3}


def test_incomplete_checkpoints_and_those_of_another_run_set_no_standard():
    keys = ["s/step-1/m-00001-of-00003.bin", "s/step-1/m-00002-of-00003.bin", "s/step-2/m-00001-of-00001.bin"]
    assert lacks(*keys) == {"s/step-1": COUNTED, "s/step-2": ""}
    assert set(lacks("a/step-1/a.bin", "a/step-1/b.bin", "b/step-2/a.bin", "a/epoch-2/a.bin").values()) == {""}


def test_unfinished_objects_belong_to_no_group_unless_they_lie_in_a_checkpoint():
    for key in (
        *("a/x.tmp", "a/x.part", "a/.tiercache-tmp-12", "out/tmp-checkpoint-5/model.bin", "a/x.incomplete"),
        *("x/1000.orbax-checkpoint-tmp-1/m", "s/step-5.tmp/model.pt", "s/step-5-tmp/model.pt"),
    ):
        layout = layout_of(key)
        assert (layout.group.tolist(), len(layout.paths), layout.unfinished.tolist()) == ([NO_GROUP], 0, [True])
    keys = ("s/step-1/model.pt", "s/step-1/optim.pt.tmp")
    layout = layout_of(*keys)
    assert groups(layout, keys) == {"s/step-1": set(keys)}
    assert layout.unfinished.tolist() == [False, True]


def test_an_object_with_the_name_of_a_checkpoint_folder_belongs_to_it():
    keys = ("s/step-1", "s/step-1/model.pt")
    assert groups(layout_of(*keys), keys) == {"s/step-1": set(keys)}


# -- against a plain one --------------------------------------------------------------------------------------------

# Segment -> step of the checkpoint that it names, None: none. The oracle knows them by heart.
FOLDERS = {
    "data": None, "step-1": 1, "step_20": 20, "checkpoint-10": 10, "iter_0000300": 300, "global_step7": 7,
    "epoch=1-step=5-val_loss=0.5.ckpt": 5, "Epoch_3": 3, "step1000-unsharded": 1000, "run-v2": None, "stage-1": None,
    "steps": None, "step-x": None, "v0": None,
}  # fmt: skip
NAMES = {
    "x.jpg": None, "model.pt": None, "step-3.pt": 3, "epoch_2.ckpt": 2, ".metadata": None, "__0_0.distcp": None,
    "last.ckpt": None, "a-epoch=2-loss=1.5.ckpt": 2, "step-3": None, "step-3.txt": None, "ckpt-8.pth.tar": 8,
}  # fmt: skip
KEYS = st.lists(
    st.tuples(st.lists(st.sampled_from(sorted(FOLDERS)), max_size=3), st.sampled_from(sorted(NAMES))).map(
        lambda parts: "/".join([*parts[0], parts[1]])
    ),
    unique=True,
    max_size=25,
)


def plain_group(key: str) -> tuple[str, int | None]:
    """Path of a key's group, and its step."""
    *folders, name = key.split("/")
    for n, folder in enumerate(folders, start=1):
        path = "/".join(folders[:n])
        if FOLDERS[folder] is not None:
            return path, FOLDERS[folder]
    return key, NAMES[name]


@given(KEYS)
def test_groups_are_those_that_a_plain_loop_over_the_keys_finds(keys):
    layout = layout_of(*keys)
    expected = {}
    for key in keys:
        path, step = plain_group(key)
        expected[path] = max(expected.get(path, NO_STEP), NO_STEP if step is None else step)
    # An object that is called like a folder beside it belongs to what the folder is.
    assert dict(zip(layout.paths.to_pylist(), layout.step.tolist(), strict=True)) == expected
    assert [layout.paths[group].as_py() for group in layout.group.tolist()] == [plain_group(key)[0] for key in keys]


@given(KEYS, st.randoms(use_true_random=False))
def test_the_order_of_keys_changes_nothing(keys, random):
    mixed = keys[:]
    random.shuffle(mixed)
    one, other = layout_of(*keys), layout_of(*mixed)
    assert one.paths.equals(other.paths)
    for name in ("checkpoint", "step", "lacks"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    assert len(set(zip(one.run.tolist(), other.run.tolist(), strict=True))) == len(set(one.run.tolist()))


@given(st.lists(st.text(alphabet="ab1/-_.=\\stepmtd\x00é", min_size=1, max_size=12), unique=True, max_size=20))
def test_every_key_is_in_at_most_one_group_and_paths_are_unique(keys):
    layout = layout_of(*keys)
    paths = layout.paths.to_pylist()
    assert paths == sorted(paths, key=lambda path: path.encode())
    assert len(set(paths)) == len(paths)
    for key, group in zip(keys, layout.group.tolist(), strict=True):
        assert group == NO_GROUP or key == paths[group] or key.startswith(f"{paths[group]}/")


# -- our own checkpoints, and layouts of users -------------------------------------------------------

OWN = "runs/7/step-000000000100.20261129T193324123Z-7f3a9c"


def test_one_of_our_own_checkpoints_is_complete_with_its_manifest_which_is_its_final_object():
    tensors = f"{OWN}/tensors-00001-of-00004.safetensors", f"{OWN}/state.json"
    assert lacks(*tensors) == {OWN: "checkpoint.json"}
    assert lacks(*tensors, f"{OWN}/checkpoint.json") == {OWN: ""}
    keys = [f"{OWN}/checkpoint.json", f"{OWN}/state.json", f"{OWN}/trainer_state.json", "step-1/checkpoint.json"]
    assert layout_of(*keys).rank.tolist() == [COMPLETING, MEMBER, MEMBER, MEMBER]


def test_our_own_checkpoints_of_a_folder_are_a_run_with_steps_and_times():
    other = "runs/7/step-000000000040.20261130T000000000Z-000000"
    layout = layout_of(f"{OWN}/checkpoint.json", f"{other}/checkpoint.json")
    assert layout.paths.to_pylist() == [other, OWN]
    assert (layout.step.tolist(), len(set(layout.run.tolist()))) == ([40, 100], 1)
    assert layout.written_s[0] - layout.written_s[1] == pytest.approx(4 * 3600 + 26 * 60 + 35.877, abs=1e-3)


USERS = {  # layout, and the step and the number of the run of each path
    "files": (
        UserLayout("model_{step}.pt", ("r/**",)), "r/model_5.pt r/model_10.pt r/model_best.pt other/model_5.pt",
        {"r/model_5.pt": (5, 0), "r/model_10.pt": (10, 0), "r/model_best.pt": None, "other/model_5.pt": None},
    ),
    "folders": (
        UserLayout("w{step}.d/", ("r/*",)), "r/w5.d/a.bin r/w5.d/x/b.bin r/w10.d/a.bin r/w5.d.txt",
        {"r/w5.d": (5, 0), "r/w10.d": (10, 0), "r/w5.d.txt": None},
    ),
    "a star tells runs apart": (
        UserLayout("*-net{step}.pt"), "r/a-net5.pt r/a-net6.pt r/b-net5.pt",
        {"r/a-net5.pt": (5, 0), "r/a-net6.pt": (6, 0), "r/b-net5.pt": (5, 1)},
    ),
    "before those of libraries": (
        UserLayout("step-7-part-{step}.pt"), "r/step-7-part-3.pt", {"r/step-7-part-3.pt": (3, 0)},
    ),
}  # fmt: skip


def test_each_file_or_folder_of_a_users_layout_is_a_checkpoint():
    for name, (one, text, expected) in USERS.items():
        layout = group_keys(pa.array(text.split()), [one])
        found = zip(layout.paths.to_pylist(), layout.step.tolist(), layout.run.tolist(), strict=True)
        numbers: dict[int, int] = {}
        given = {path: None if run == NO_RUN else (step, numbers.setdefault(run, len(numbers)))
                 for path, step, run in sorted(found)}  # fmt: skip
        assert given == expected, name


def test_a_users_layout_has_one_number_in_one_name():
    for pattern in ("model.pt", "{step}/{step}.pt", "a/{step}.pt", "{stop}.pt", "{step}{step}"):
        with pytest.raises(ValueError, match="expected a name with"):
            layout_pattern(pattern)
