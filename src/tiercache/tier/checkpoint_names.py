"""What names tell of checkpoints: which keys belong together, to which run and step, and with which metrics.

Also tells whether the names show that a checkpoint is complete. All functions are pure. The layouts are those of the
libraries' sources (torch filesystem.py, Lightning model_checkpoint.py and fabric/strategies/fsdp.py, Megatron-LM
training/checkpointing.py, DeepSpeed engine.py, transformers trainer.py)::

    step-100/{__0_0.distcp, .metadata}                    torch.distributed.checkpoint; .metadata is renamed last
    checkpoint-100/{model.safetensors, trainer_state.json}  Hugging Face Trainer; trainer_state.json is written late
    checkpoint-100/pytorch_model_fsdp_0/.metadata         the same with FSDP: a torch.distributed.checkpoint in it
    epoch=1-step=100-val_loss=0.3.ckpt                    Lightning; a folder with FSDP or DeepSpeed
    iter_0000100/mp_rank_00/model_optim_rng.pt            Megatron-LM; with torch_dist .metadata, then metadata.json
    global_step100/mp_rank_00_model_states.pt             DeepSpeed
    step-000000000100.20261129T193324123Z-7f3a9c/checkpoint.json  our own (checkpoint/format.py); it is put last

A rule may describe further names (UserLayout). Our own names contain the time of writing. The outermost folder with
such a name is the checkpoint: global_step100 inside checkpoint-100 is a part of it. A folder of a run may have such a
name too: finetune_from_step_5000 is left alone if it contains checkpoint-100 and checkpoint-200 (see _find_nesting()).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.store.local import TEMP_PREFIX
from tiercache.tier.snapshot import NO_RUN, NO_STEP
from tiercache.tier.text_columns import (
    ROWS_AT_A_TIME,
    as_numpy,
    first_match,
    index_in,
    inverse,
    joined_codes,
    match_regex,
    sort_order,
    split_keys,
    take_rows,
)

NO_GROUP = -1

# Copy order of a group's objects: the completing object, which its writer writes last, comes last.
MEMBER, INDEX, COMPLETING = range(3)

# What a checkpoint lacks to be complete, judged by names.
NOTHING, METADATA, TRAINER_STATE, WEIGHTS, SHARDS, END_OF_SAVE, MANIFEST, FILES, NESTING = range(9)
LACKS = (
    "",
    "a .metadata beside each .distcp",
    "trainer_state.json",
    "weights",
    "some of the shards that their names count",
    "the end of a save: there is a .metadata.tmp",
    "checkpoint.json",
    "files that other checkpoints of its run have",
    "a sign whether it is one checkpoint or a folder of checkpoints: name these by `checkpoint =` of a rule",
)

# -- patterns of names -----------------------------------------------------------------------------------------------

NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?|nan|inf)"
DECIMAL = r"[-+]?[0-9]+\.[0-9]+(?:e[-+]?[0-9]+)?"
WORD = r"global[-_]?step|step|iter(?:ation)?|ckpt|checkpoint|epoch"
_METRIC = rf"[a-z][\w@.]*?(?:={NUMBER}|[-_]?{DECIMAL})"
# The end of our own names (checkpoint/format.py): the time of writing, UTC, and six random hex digits.
OWN_TIME = r"[.][0-9]{8}T[0-9]{9}Z-[0-9a-f]{6}"
# After the number: other counters, metrics, and Lightning's -v1, which it adds if the name exists already.
_REST = rf"(?:[-_]v[0-9]+|[-_](?:{WORD})[-_=]?[0-9]+|[-_]{_METRIC})*"
_HEAD = rf"(?P<prefix>(?:[^/]*?[-_.])??)(?P<word>{WORD})[-_=]?(?P<number>[0-9]{{1,18}})"
SUFFIXES = r"(?:\.(?:pt|pth|ckpt|bin|safetensors|tar|npz))"
_FILE_NAME = rf"(?i)^{_HEAD}(?P<rest>{_REST})(?P<suffix>{SUFFIXES}+)$"
_IN_FOLDER = (
    rf"(?i)^(?P<parent>(?:[^/]+/)*?)(?P<name>{_HEAD}"
    rf"(?P<rest>{_REST}(?:[-_][a-z][^/]*?)?|{OWN_TIME})(?P<suffix>{SUFFIXES}*))/"
)
_STEP_IN_REST = r"(?i)[-_](?P<word>(?:global[-_]?)?step|iter(?:ation)?)[-_=]?(?P<number>[0-9]{1,18})"
# The parts of a name that differ between the checkpoints of one run.
_VARYING = rf"(?i)(^|[-_])(?:v[0-9]+|(?:{WORD})[-_=]?[0-9]+|{_METRIC})|{OWN_TIME}"
# Our own checkpoints.
_OWN_NAME = rf"step-[0-9]{{12,18}}{OWN_TIME}"
_OWN = rf"^(?:.*/)?{_OWN_NAME}$"
_WRITTEN = r"[.](?P<time>[0-9]{8}T[0-9]{6})(?P<ms>[0-9]{3})Z-[0-9a-f]{6}$"
_OWN_MANIFEST = "checkpoint.json"

# Names of unfinished writes. The last: Orbax writes to such a folder and renames it.
_TEMPORARY = (
    rf"(?:^|/)(?:{TEMP_PREFIX.replace('.', '[.]')}|tmp-checkpoint-)"
    r"|\.(?:tmp|part|partial|incomplete)(?:/|$)|[-_]tmp/|\.orbax-checkpoint-tmp"
)
_NO_KEY = r"^/|/$|//|(?:^|/)\.\.?(?:/|$)|\\|\x00|://|^$"

_WEIGHTS = r"(?i)\.(?:pt|pth|ckpt|bin|safetensors|distcp|msgpack|h5)$"
_NO_WEIGHTS = r"^(?:optimizer|scheduler|scaler|sampler|rng_state|random_states|training_args)[^/]*$"
_COUNTED = r"(?i)^(?P<stem>.*)-(?P<number>[0-9]{3,6})-of-(?P<total>[0-9]{3,6})(?P<suffix>\.(?:bin|safetensors|pt|pth))$"
# Objects in a folder that prove that the folder itself is a checkpoint, whatever the name of the folder above.
_PROOFS = (".metadata", "trainer_state.json", "_CHECKPOINT_METADATA", "checkpoint.json")
_ORBAX_PROOF, _ORBAX_NAME = "_CHECKPOINT_METADATA", re.compile(r"(?<![^/])[0-9]{1,18}/")
# Files that a checkpoint need not have although others of its run have them: results, logs and pictures. Of the
# descriptions, those that all others have are required.
_RESULT = re.compile(
    r"(?i)(?:metric|eval|result|score|sample)[^/]*$|\.(?:log|png|jpg|html|out|err|csv|tsv)$|(?:^|/)events\.out\.[^/]*$"
)
_DESCRIPTION = re.compile(r"(?i)\.(?:jsonl?|txt|md|ya?ml|toml|jinja|py|sh)$|(?:^|/)_[A-Z_]+$")
_HASH = r"[0-9a-f-]{16,}"  # of content, as in Orbax, or an UUID
_RANK_METADATA = r"^__[0-9]+\.metadata$"
_METADATA_TMP = r"^(?:__[0-9]+)?\.metadata\.tmp$"
_INDEX = r"\.index\.json$|^meta\.pt$|^metadata\.json$"

_PLACEHOLDER = re.compile(r"\{(?:step|epoch)\}")


@dataclass(frozen=True, slots=True)
class UserLayout:
    pattern: str
    match: tuple[str, ...] = ("**",)
    exclude: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        return self.pattern.endswith("/")


def layout_pattern(pattern: str) -> str:
    """Return the expression that a pattern such as "model_{step}.pt" stands for, with the groups head, number and tail.

    Raises ValueError unless the pattern is a name with {step} or {epoch} once; `*` stands for any characters in a name.
    """
    name = pattern.removesuffix("/")
    parts = _PLACEHOLDER.split(name)
    if len(parts) != 2 or "/" in name or any(sign in part for part in parts for sign in "{}\\"):
        raise ValueError(
            f"expected a name with {{step}} or {{epoch}} once, such as 'model_{{step}}.pt', or 'model_{{step}}/' for "
            f"folders, got {pattern!r}"
        )
    head, tail = (re.escape(part).replace(r"\*", "[^/]*?") for part in parts)
    return rf"(?P<head>{head})(?P<number>[0-9]{{1,18}})(?P<tail>{tail})"


def _written_in_own_names(paths: pa.Array) -> NDArray[np.float64]:
    parts = pc.extract_regex(paths, _WRITTEN)
    texts, ms = pc.struct_field(parts, "time"), pc.struct_field(parts, "ms")
    times = pc.strptime(texts, format="%Y%m%dT%H%M%S", unit="s", error_is_null=True).cast(pa.int64())
    found = pc.add(times.cast(pa.float64()), pc.divide(ms.cast(pa.float64()), 1000.0)).fill_null(np.nan)
    return as_numpy(found, np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class KeyGroups:
    paths: pa.Array  # large_string, sorted, unique
    checkpoint: NDArray[np.bool_]  # whether the group is a checkpoint; the other groups are files
    step: NDArray[np.int64]  # NO_STEP for files
    run: NDArray[np.int32]  # equal for the checkpoints that one run writes under one name; NO_RUN for files
    own: NDArray[np.bool_]  # whether the group is one of our own checkpoints (checkpoint/format.py)
    written_s: NDArray[np.float64]  # time of writing in one of our own names, in seconds since the epoch; or NaN
    lacks: NDArray[np.uint8]  # indices of LACKS
    # Columns of keys.
    group: NDArray[np.int32]  # NO_GROUP for unfinished objects and for names that are not valid keys
    rank: NDArray[np.uint8]  # MEMBER, INDEX or COMPLETING
    unfinished: NDArray[np.bool_]  # by the name
    on_top: NDArray[np.bool_]  # whether the object lies directly in the folder of its group


def group_keys(keys: pa.Array, layouts: Sequence[UserLayout] = ()) -> KeyGroups:
    """Return the groups that unique keys form. layouts: Layouts of users, which have precedence."""
    keys = keys.cast(pa.large_string())
    folders, folder, names = split_keys(keys)
    in_folders, folder_row, uncertain = _checkpoint_folders(
        folders, folder, names, [one for one in layouts if one.is_folder]
    )
    row = folder_row[folder] if len(keys) else np.empty(0, np.int64)
    unfinished, no_key = match_regex(keys, _TEMPORARY), match_regex(keys, _NO_KEY)
    rest = np.flatnonzero((row < 0) & ~unfinished & ~no_key)
    group, paths, position = _numbered(keys, row, in_folders["path"], rest, no_key)
    in_files, file_rows = _checkpoint_files(folders, folder, names, rest, [one for one in layouts if not one.is_folder])
    # Folders come last and overwrite: a file and a folder with one name count as the folder.
    used = np.flatnonzero(position[: len(in_folders)] >= 0)
    of_group = position[np.concatenate([len(in_folders) + file_rows, used])]
    checkpoints = pa.concat_tables([in_files, in_folders.drop_columns(["path"]).take(pa.array(used))])
    step, run = np.full(len(paths), NO_STEP, np.int64), np.full(len(paths), NO_RUN, np.int32)
    step[of_group] = as_numpy(checkpoints["step"], np.int64)
    run[of_group] = joined_codes(checkpoints["run"].chunks, pa.large_string())[0]
    checkpoint = run != NO_RUN
    run[checkpoint] = _in_order(run[checkpoint])
    on_top = _on_top(folders, folder, paths, group)
    is_own = match_regex(paths, _OWN) & checkpoint
    members = _Members(names, folder, group, len(folders), checkpoint, is_own, on_top)
    written_s = np.full(len(paths), np.nan)
    written_s[is_own] = _written_in_own_names(paths.filter(pa.array(is_own)))
    lacks = np.where(checkpoint, _lacking(members, run), NOTHING).astype(np.uint8)
    compared = (lacks == NOTHING) & checkpoint & ~is_own
    lacks[_fewer_files_than_neighbours(members, folders, paths, run, step, compared)] = FILES
    # A folder that has only names that are not valid keys is no group.
    lacks[index_in(paths, pa.array(sorted(uncertain), pa.large_string())) >= 0] = NESTING
    return KeyGroups(
        paths=paths,
        checkpoint=checkpoint,
        step=step,
        run=run,
        own=is_own,
        written_s=written_s,
        lacks=lacks,
        group=group,
        rank=members.ranks(),
        unfinished=unfinished,
        on_top=on_top,
    )


# -- checkpoints -----------------------------------------------------------------------------------------------------

_NAME_PARTS = ("parent", "prefix", "word", "rest", "suffix")
_STEP_AND_RUN = pa.schema([("step", pa.int64()), ("run", pa.dictionary(pa.int32(), pa.large_string()))])


def _checkpoint_folders(
    folders: pa.Array, folder: NDArray[np.int64], names: pa.Array, layouts: Sequence[UserLayout]
) -> tuple[pa.Table, NDArray[np.int64], set[str]]:
    """Return step, run and path of the checkpoints that are folders, the row of each folder, and uncertain paths."""
    parts = pc.extract_regex(folders, _IN_FOLDER)
    # A temporary folder is still being written; the writer renames it at the end.
    is_named = _as_flags(pc.is_valid(parts)) & ~match_regex(folders, _TEMPORARY)
    uncertain = _find_nesting(folders, folder, names, np.flatnonzero(is_named), parts)
    user_row, users = _user_folders(folders, np.flatnonzero(~match_regex(folders, _TEMPORARY)), layouts)
    uncertain -= {*users["path"].to_pylist()}
    is_named[user_row] = False
    by_name = np.flatnonzero(is_named)
    columns = _name_columns(parts.take(pa.array(by_name)))
    path = _joined([columns["parent"], columns["name"]], "")
    is_named[user_row] = True
    orbax_row, orbax = _orbax_folders(folders, folder, names, np.flatnonzero(~is_named))
    table = pa.concat_tables(
        [users.drop_columns(["path"]), _step_and_series(columns), orbax.drop_columns(["path"])]
    ).unify_dictionaries()
    paths = pa.concat_arrays([_one(users["path"]), path, _one(orbax["path"])]).dictionary_encode()
    number = as_numpy(paths.indices, np.int64)
    first = np.unique(number, return_index=True)[1]
    table = table.append_column("path", paths.cast(pa.large_string())).take(pa.array(first))
    row = np.full(len(folders), -1, np.int64)
    row[np.concatenate([user_row, by_name, orbax_row])] = number
    return table.combine_chunks(), row, uncertain


def _name_columns(parts: pa.StructArray) -> dict[str, pa.Array]:
    return {name: pc.struct_field(parts, name) for name in (*_NAME_PARTS, "name", "number")}


def _as_flags(column: pa.Array) -> NDArray[np.bool_]:
    return np.asarray(column.to_numpy(zero_copy_only=False), np.bool_)


def _find_nesting(
    folders: pa.Array, folder: NDArray[np.int64], names: pa.Array, rows: NDArray[np.int64], parts: pa.StructArray
) -> set[str]:
    """Return the folders with the name of a checkpoint of which it is not certain that they are one.

    A checkpoint may have parts whose names look like checkpoints (global_step100 in checkpoint-100, ckpt_0 and ckpt_1
    of two ranks), and a run may have a folder whose name looks like one (finetune_from_step_5000, dpo/iter_1). A folder
    with an object of _PROOFS is a checkpoint, unless a part of another step has one too; any other folder is one unless
    it has folders, or several files, of other steps.

    rows: Folders in or below folders with the name of a checkpoint. parts: Groups of _IN_FOLDER, of all folders.
    """
    columns = _name_columns(parts.take(pa.array(rows)))
    path = _joined([columns["parent"], columns["name"]], "").dictionary_encode()
    number, step = as_numpy(path.indices, np.int64), as_numpy(_step_and_series(columns)["step"], np.int64)
    below = pc.replace_substring_regex(folders.take(pa.array(rows)), _IN_FOLDER, "", max_replacements=1)
    inner = pc.extract_regex(below, _IN_FOLDER)
    is_other = _as_flags(inner.is_valid())
    inner_step = _step_and_series(_name_columns(inner.filter(pa.array(is_other))))["step"]
    is_other[is_other] = as_numpy(inner_step, np.int64) != step[is_other]
    proven = np.zeros(len(folders), np.bool_)
    proven[folder[_as_flags(pc.is_in(names, value_set=pa.array(_PROOFS, pa.large_string())))]] = True
    # Orbax names folders by their number alone.
    is_proven_part = (is_other & match_regex(below, f"{_IN_FOLDER}$")) | match_regex(below, r"^(?:.*/)?[0-9]{1,18}/$")
    is_proven_part &= proven[rows]
    is_proven = proven[rows] & _as_flags(pc.equal(below, ""))
    at = np.full(len(folders), -1, np.int64)
    at[rows] = np.arange(len(rows))
    files = np.flatnonzero(at[folder] >= 0)
    files = files[match_regex(names.take(pa.array(files)), _FILE_NAME)]
    of_file = at[folder[files]]
    file_step = as_numpy(_step_and_series(_file_columns(names.take(pa.array(files))))["step"], np.int64)
    pairs = np.unique(np.stack([number[of_file], file_step])[:, file_step != step[of_file]], axis=1)
    n_steps = np.bincount(pairs[0], minlength=len(path.dictionary))
    has_part, has_other, has_proof = (np.zeros(len(path.dictionary), np.bool_) for _ in range(3))
    has_part[number[is_proven_part]] = has_other[number[is_other]] = has_proof[number[is_proven]] = True
    uncertain = has_part | (~has_proof & (has_other | (n_steps > 1)))
    return {*path.dictionary.filter(pa.array(uncertain)).to_pylist()}


def _file_columns(names: pa.Array) -> dict[str, pa.Array]:
    parts = pc.extract_regex(names, _FILE_NAME)
    columns = {name: pc.struct_field(parts, name) for name in (*_NAME_PARTS[1:], "number")}
    return columns | {"parent": pa.array([""] * len(names), pa.large_string())}


_STEP_RUN_PATH = pa.schema([*_STEP_AND_RUN, ("path", pa.large_string())])


def _user_folders(
    folders: pa.Array, rows: NDArray[np.int64], layouts: Sequence[UserLayout]
) -> tuple[NDArray[np.int64], pa.Table]:
    found, tables = [np.empty(0, np.int64)], [_STEP_RUN_PATH.empty_table()]
    for layout in layouts:
        pattern = rf"^(?P<parent>(?:[^/]+/)*?)(?P<name>{layout_pattern(layout.pattern[:-1])})/"
        here = rows[match_regex(folders.take(pa.array(rows)), pattern)]
        parts = pc.extract_regex(folders.take(pa.array(here)), pattern)
        path = _joined([pc.struct_field(parts, "parent"), pc.struct_field(parts, "name")], "")
        fits = np.flatnonzero(first_match(path, [(layout.match, layout.exclude)]) >= 0)
        table = _of_user(parts, pc.struct_field(parts, "parent"), layout)
        tables.append(table.append_column("path", path).take(pa.array(fits)))
        found.append(here[fits])
        rows = np.setdiff1d(rows, here[fits], assume_unique=True)
    return np.concatenate(found), pa.concat_tables(tables).unify_dictionaries()


def _orbax_folders(
    folders: pa.Array, folder: NDArray[np.int64], names: pa.Array, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], pa.Table]:
    """Return those of the rows that lie in folders of Orbax, whose names are numbers; and these folders, row by row."""
    proven = np.unique(folder[_as_flags(pc.equal(names, _ORBAX_PROOF))])
    roots = {path for path in folders.take(pa.array(proven)).to_pylist() if _ORBAX_NAME.search(path)}
    found: list[tuple[int, str]] = []
    for row, path in zip(rows.tolist(), folders.take(pa.array(rows)).to_pylist() if roots else (), strict=False):
        found += [(row, one) for end in _ORBAX_NAME.finditer(path) if (one := path[: end.end()]) in roots][:1]
    parts = [path[:-1].rpartition("/") for _, path in found]
    run = pa.array([f"{parent}\n" for parent, _, _ in parts], pa.large_string()).dictionary_encode()
    columns = ([int(number) for _, _, number in parts], run, [path[:-1] for _, path in found])
    return np.array([row for row, _ in found], np.int64), pa.table([*columns], schema=_STEP_RUN_PATH)


def _of_user(parts: pa.StructArray, parent: pa.Array, layout: UserLayout) -> pa.Table:
    step = pc.struct_field(parts, "number").cast(pa.int64())
    pattern = pa.array([layout.pattern] * len(parts), pa.large_string())
    run = _joined([parent, pc.struct_field(parts, "head"), pc.struct_field(parts, "tail"), pattern], "\n")
    return pa.Table.from_arrays([step, run.dictionary_encode()], schema=_STEP_AND_RUN)


def _checkpoint_files(
    folders: pa.Array,
    folder: NDArray[np.int64],
    names: pa.Array,
    rest: NDArray[np.int64],
    layouts: Sequence[UserLayout],
) -> tuple[pa.Table, NDArray[np.int64]]:
    tables, rows = [_STEP_AND_RUN.empty_table()], [np.empty(0, np.int64)]
    for start in range(0, len(rest), ROWS_AT_A_TIME):
        some = rest[start : start + ROWS_AT_A_TIME]
        is_free = np.ones(len(some), np.bool_)
        for layout in layouts:
            pattern = f"^{layout_pattern(layout.pattern)}$"
            of_some = names.take(pa.array(some))
            mine = np.flatnonzero(is_free & match_regex(of_some, pattern))
            keys = _joined([folders.take(pa.array(folder[some[mine]])), of_some.take(pa.array(mine))], "")
            mine = mine[first_match(keys, [(layout.match, layout.exclude)]) >= 0]
            parts = pc.extract_regex(of_some.take(pa.array(mine)), pattern)
            tables.append(_of_user(parts, folders.take(pa.array(folder[some[mine]])), layout))
            rows.append(start + mine)
            is_free[mine] = False
        is_one = np.flatnonzero(is_free & match_regex(names.take(pa.array(some)), _FILE_NAME))
        columns = _file_columns(names.take(pa.array(some[is_one])))
        tables.append(_step_and_series(columns | {"parent": folders.take(pa.array(folder[some[is_one]]))}))
        rows.append(start + is_one)
    return pa.concat_tables(tables), np.concatenate(rows)


def _step_and_series(columns: dict[str, pa.Array]) -> pa.Table:
    """Return step and run of checkpoints from the parts of their names: _NAME_PARTS and number.

    A step in the rest of the name has precedence over an epoch before it. The run is the part of the name that is
    equal for all checkpoints of a run.
    """
    rest, word = columns["rest"], pc.utf8_lower(columns["word"])
    inner = pc.extract_regex(rest, _STEP_IN_REST)
    is_better = pc.and_(pc.is_valid(inner), pc.invert(pc.match_substring_regex(word, "step|iter")))
    step = pc.if_else(is_better, pc.struct_field(inner, "number"), columns["number"]).cast(pa.int64())
    word = pc.if_else(is_better, pc.utf8_lower(pc.struct_field(inner, "word")), word)
    prefix, rest = (pc.replace_substring_regex(part, _VARYING, "") for part in (columns["prefix"], rest))
    run = _joined([columns["parent"], prefix, word, rest, columns["suffix"]], "\n")
    return pa.Table.from_arrays([step, run.dictionary_encode()], schema=_STEP_AND_RUN)


def _in_order(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first, number = np.unique(codes, return_index=True, return_inverse=True)
    return np.asarray(inverse(np.argsort(first))[number], np.int64)


def _numbered(
    keys: pa.Array, row: NDArray[np.int64], folders: pa.ChunkedArray, rest: NDArray[np.int64], no_key: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], pa.Array, NDArray[np.int64]]:
    """Return the group of each key, the sorted paths of groups, and the group of each folder, then of each of rest."""
    inside, n_folders = np.flatnonzero((row >= 0) & ~no_key), len(folders)
    is_used = np.zeros(n_folders + 1, np.bool_)  # index -1 (no folder) is the last entry
    is_used[row[inside]] = True
    used = np.flatnonzero(is_used)
    of_folders, of_keys = _one(folders), take_rows(keys, rest)
    # A key with the name of a checkpoint folder belongs to that folder's group, even if the folder is otherwise empty.
    same = index_in(of_keys, of_folders)
    alone, to_folder = np.flatnonzero(~is_used[same]), np.flatnonzero(is_used[same])
    paths = take_rows(of_keys, alone)
    paths = pa.concat_arrays([of_folders.take(pa.array(used)), paths]) if len(used) else paths
    order = sort_order(paths)
    of_path = inverse(order)
    position = np.full(n_folders + len(rest), -1, np.int64)
    position[used] = of_path[: len(used)]
    position[n_folders + alone] = of_path[len(used) :]
    named = np.flatnonzero(same >= 0)
    position[n_folders + to_folder] = position[same[to_folder]]
    position[same[named]] = position[n_folders + named]
    group = np.full(len(keys), NO_GROUP, np.int32)
    group[inside] = position[row[inside]]
    group[rest] = position[n_folders:]
    return group, take_rows(paths, order), position


def _on_top(
    folders: pa.Array, folder: NDArray[np.int64], paths: pa.Array, group: NDArray[np.int32]
) -> NDArray[np.bool_]:
    group_bytes = np.append(as_numpy(pc.binary_length(paths), np.int64), NO_GROUP)  # entry -1 matches no length
    folder_bytes = as_numpy(pc.binary_length(folders), np.int64)
    return np.asarray((group != NO_GROUP) & (folder_bytes[folder] == group_bytes[group] + 1), np.bool_)


def _joined(columns: list[pa.Array], separator: str) -> pa.Array:
    return pc.binary_join_element_wise(*columns, pa.scalar(separator, pa.large_string()))


def _one(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


# -- completeness ----------------------------------------------------------------------------------------------------


class _Members:
    def __init__(
        self,
        names: pa.Array,
        folder: NDArray[np.int64],
        group: NDArray[np.int32],
        n_folders: int,
        checkpoint: NDArray[np.bool_],
        is_own: NDArray[np.bool_],
        on_top: NDArray[np.bool_],
    ) -> None:
        self.names, self.folder, self.group = names, folder, group
        self._n_folders, self._n_groups = n_folders, len(checkpoint)
        self._is_in = np.asarray(group != NO_GROUP, np.bool_)
        of_checkpoint = self._is_in.copy()
        of_checkpoint[self._is_in] = checkpoint[group[self._is_in]]
        self._rows = np.flatnonzero(of_checkpoint)
        self._names = take_rows(names, self._rows)
        self.metadata, self.trainer_state = self.called(".metadata"), self.called("trainer_state.json")
        self.is_own = is_own
        self.manifest = self.called(_OWN_MANIFEST) & on_top
        self.manifest[self._is_in] &= is_own[group[self._is_in]]

    def called(self, name: str) -> NDArray[np.bool_]:
        return np.asarray(pc.equal(self.names, name).to_numpy(zero_copy_only=False), np.bool_) & self._is_in

    def named(self, pattern: str) -> NDArray[np.bool_]:
        found = np.zeros(len(self.names), np.bool_)
        found[self._rows[match_regex(self._names, pattern)]] = True
        return found

    def groups_with(self, members: NDArray[np.bool_]) -> NDArray[np.bool_]:
        has = np.zeros(self._n_groups, np.bool_)
        has[self.group[members]] = True
        return has

    def beside(self, members: NDArray[np.bool_]) -> NDArray[np.bool_]:
        has = np.zeros(self._n_folders, np.bool_)
        has[self.folder[members]] = True
        return has

    def are_completing(self) -> NDArray[np.bool_]:
        of_others = self.metadata | self.trainer_state
        of_others[self._is_in] &= ~self.is_own[self.group[self._is_in]]
        return of_others | self.manifest

    def ranks(self) -> NDArray[np.uint8]:
        rank = np.where(match_regex(self.names, _INDEX) & self._is_in, INDEX, MEMBER).astype(np.uint8)
        rank[self.are_completing()] = COMPLETING
        return rank

    def count_wrong(self) -> NDArray[np.bool_]:
        at = np.flatnonzero(self.named(_COUNTED))
        found = pc.extract_regex(self.names.take(pa.array(at)), _COUNTED)
        columns = {name: pc.struct_field(found, name) for name in ("stem", "total", "suffix", "number")}
        table = pa.table(columns | {"folder": self.folder[at], "group": self.group[at]})
        sets = table.group_by(["group", "folder", "stem", "total", "suffix"]).aggregate([("number", "count_distinct")])
        wrong = np.zeros(self._n_groups, np.bool_)
        short = as_numpy(sets["number_count_distinct"], np.int64) < as_numpy(sets["total"].cast(pa.int64()), np.int64)
        wrong[as_numpy(sets["group"], np.int64)[short]] = True
        return wrong


def _lacking(members: _Members, run: NDArray[np.int32]) -> NDArray[np.uint8]:
    lacks = np.full(len(run), NOTHING, np.uint8)
    weights = members.named(_WEIGHTS) & ~members.named(_NO_WEIGHTS)
    # Either of two files in any checkpoint of the run identifies Trainer: other libraries write checkpoint-N too.
    trainer = members.groups_with(members.trainer_state)
    trainers = np.unique(run[trainer | members.groups_with(members.named(r"^training_args\.bin$"))])
    is_trainer = np.isin(run, trainers[trainers != NO_RUN])
    lacks[members.count_wrong()] = SHARDS
    # A lone .metadata, whose .distcp files were deleted by hand, must not count as the newest complete checkpoint.
    lacks[members.groups_with(members.metadata & ~members.beside(weights)[members.folder])] = WEIGHTS
    lacks[is_trainer & ~members.groups_with(weights)] = WEIGHTS
    lacks[is_trainer & ~trainer] = TRAINER_STATE
    parts = members.named(r"^__[0-9]+_[0-9]+\.distcp$")
    closed = members.beside(members.metadata | members.named(_RANK_METADATA))
    lacks[members.groups_with(parts & ~closed[members.folder])] = METADATA
    lacks[members.groups_with(members.named(_METADATA_TMP))] = END_OF_SAVE
    # The manifest commits one of our own checkpoints: without it there is none, and with it there is nothing to guess.
    lacks[members.is_own] = np.where(members.groups_with(members.manifest)[members.is_own], NOTHING, MANIFEST)
    return lacks


# Number of checkpoints in a row with equally many files that show that a job changed its number of ranks.
_RESIZED = 3


def _fewer_files_than_neighbours(
    members: _Members,
    folders: pa.Array,
    paths: pa.Array,
    run: NDArray[np.int32],
    step: NDArray[np.int64],
    compared: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Return the checkpoints that have fewer files of a name than others of their run; bool[n_groups].

    A killed copy leaves a folder that may look complete by its own names. Numbers and hashes in names do not count, so
    that the files of all ranks have one name. docs/reference/tiers.md defines the rule. compared: Checkpoints that lack
    nothing by their own names.
    """
    found = np.zeros(len(run), np.bool_)
    folder_bytes, path_bytes = (as_numpy(pc.binary_length(texts), np.int64) for texts in (folders, paths))
    rows = np.flatnonzero(members.group != NO_GROUP)
    rows = rows[compared[members.group[rows]]]
    rows = rows[folder_bytes[members.folder[rows]] > path_bytes[members.group[rows]]]  # not checkpoints that are files
    n_neighbours = np.bincount(run[np.unique(members.group[rows])], minlength=1)
    rows = rows[n_neighbours[run[members.group[rows]]] > 1]
    if not len(rows):
        return found
    code, names = _plain_names(members, rows, folders, path_bytes)
    (group, code), n_files = np.unique(np.stack([members.group[rows], code]), axis=1, return_counts=True)
    facts = pa.table({"run": run[group], "name": code, "n": n_files}).group_by(["run", "name"])
    facts = facts.aggregate([("n", "min"), ("n", "max"), ("n", "count")])
    least, most, n_with, of_run = (as_numpy(facts[name], np.int64) for name in ("n_min", "n_max", "n_count", "run"))
    # Most runs have equally many files per name in each checkpoint, and need no closer look.
    at = np.flatnonzero(np.isin(run[group], of_run[(least != most) | (n_with < n_neighbours[of_run])]))
    by_run: dict[int, dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for one, name, n in zip(group[at].tolist(), code[at].tolist(), n_files[at].tolist(), strict=True):
        by_run[int(run[one])][one][name] = n
    for counts in by_run.values():
        by_step = {one: counts[one] for one in sorted(counts, key=lambda one: (int(step[one]), one))}
        found[_partial_copies(by_step, names)] = True
    return found


def _plain_names(
    members: _Members, rows: NDArray[np.int64], folders: pa.Array, path_bytes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[str]]:
    inner, folder = np.unique(members.folder[rows], return_inverse=True)
    group = np.zeros(len(inner), np.int64)
    group[folder] = members.group[rows]
    below = [
        text.encode()[n_bytes + 1 :].decode()
        for text, n_bytes in zip(folders.take(pa.array(inner)).to_pylist(), path_bytes[group].tolist(), strict=True)
    ]
    parts, codes = [], []
    for texts, of_row in ((pa.array(below, pa.large_string()), folder), (take_rows(members.names, rows), None)):
        encoded = texts.dictionary_encode()
        plain = pc.replace_substring_regex(encoded.dictionary, _HASH, "*")
        plain = pc.replace_substring_regex(plain, "[0-9]+", "#").dictionary_encode()
        numbers = as_numpy(plain.indices, np.int64)[as_numpy(encoded.indices, np.int64)]
        codes.append(numbers if of_row is None else numbers[of_row])
        parts.append(plain.dictionary.to_pylist())
    used, code = np.unique(codes[0] * len(parts[1]) + codes[1], return_inverse=True)
    return code, [parts[0][number // len(parts[1])] + parts[1][number % len(parts[1])] for number in used.tolist()]


def _partial_copies(counts: dict[int, dict[int, int]], names: Sequence[str]) -> list[int]:
    """Return the checkpoints of a run that have fewer files of a name than at least half of the others.

    counts: Number of files by name of each checkpoint, in order of steps.
    """
    n_others = len(counts) - 1
    of_name: dict[int, list[int]] = defaultdict(list)
    for files in counts.values():
        for name, n in files.items():
            of_name[name].append(n)
    common = {
        name: sorted(numbers)
        for name, numbers in of_name.items()
        if 2 * len(numbers) >= n_others and not _RESULT.search(names[name])
    }
    is_description = {name: _DESCRIPTION.search(names[name]) is not None for name in common}
    found = []
    for files, stretch in groupby(counts.items(), key=lambda item: item[1]):
        some = [one for one, _ in stretch]
        for name, numbers in common.items():
            n = files.get(name, 0)
            n_more = len(numbers) - bisect_right(numbers, n)
            is_resized = n > 0 and "#" in names[name] and len(some) >= _RESIZED
            if is_resized or (n > 0 and "*" in names[name]):
                continue
            if (n == 0 and n_more == n_others > 1) if is_description[name] else (n_more > 0 and 2 * n_more >= n_others):
                found += some
                break
    return found


_COUNTER = re.compile(rf"(?i)(?:^|[-_])(?:{WORD})[-_=]?[0-9]+(?=$|[-_])")
_NAME_AND_VALUE = re.compile(
    rf"(?i)(?:^|(?<=[-_]))(?P<name>[a-z][\w@.]*?)(?:=(?P<number>{NUMBER})|[-_]?(?P<decimal>{DECIMAL}))(?=$|[-_])"
)
_SUFFIX = re.compile(rf"(?i){SUFFIXES}+$")
_OWN_TIME = re.compile(rf"{OWN_TIME}$")


def metrics_in_name(name: str) -> dict[str, float]:
    """Return the metrics in the name of a file or folder: "val_loss=1.9", "val_loss-1.9", "val_loss1.9".

    Counters (epoch, step and similar) are not metrics. Without "=", a value must have a decimal point.
    """
    found: dict[str, float] = {}
    for part in _COUNTER.split(_OWN_TIME.sub("", _SUFFIX.sub("", name))):
        for match in _NAME_AND_VALUE.finditer(part):
            found |= finite_metric(match["name"], float(match["number"] or match["decimal"]))
    return found


def finite_metric(name: str, value: float) -> dict[str, float]:
    try:
        number = float(value)
    except OverflowError:
        return {}
    return {name: number} if math.isfinite(number) else {}


def metrics_in_names(names: pa.Array, metrics: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    found = {name: np.full(len(names), np.nan) for name in metrics}
    rows = np.flatnonzero(match_regex(names, "|".join(map(re.escape, metrics))))
    for row, name in zip(rows.tolist(), names.take(pa.array(rows)).to_pylist(), strict=True):
        for metric, value in metrics_in_name(name).items():
            if metric in found:
                found[metric][row] = value
    return found
