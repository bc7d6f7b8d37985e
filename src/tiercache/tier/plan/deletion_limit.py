"""Decides whether a plan deletes so much for good that a person must confirm it.

A mistake in a rule file (a wrong duration, a glob that matches too much) shows as a deletion of most of what a rule
matches. A deletion counts in the run that plans it; when it becomes due after the grace period, nobody is asked again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from tiercache.model import parse_bytes
from tiercache.tier.model import CHECKPOINT, DELETE, ExceededLimit
from tiercache.tier.plan.selection import largest_copies, rules_of
from tiercache.tier.text_columns import index_in

if TYPE_CHECKING:
    from tiercache.tier.journal import JournalRow
    from tiercache.tier.model import Decisions, Snapshot
    from tiercache.tier.rules import RuleFile


def exceeded_limits(
    decisions: Decisions, snapshot: Snapshot, file: RuleFile, journal: Iterable[JournalRow]
) -> tuple[ExceededLimit, ...]:
    """Return the rules that delete more bytes than their `max_delete` allows.

    The bytes that a rule matches are those of the groups to which it applies, with keep lists only of checkpoints; of
    each group the largest copy. journal: Moves that wait in the journal. A deletion among them was accepted before.
    """
    deleted = decisions.moves.group[decisions.moves.action == DELETE]
    if not len(deleted):
        return ()
    rule_of, n_bytes = rules_of(snapshot, file), largest_copies(snapshot)
    accepted = [row.path for row in journal if row.action == "delete"]
    is_new = index_in(snapshot.paths.take(pa.array(deleted)), pa.array(accepted, pa.large_string())) < 0
    found = []
    for number, rule in enumerate(file.rules):
        new_bytes = int(n_bytes[deleted[is_new & (rule_of[deleted] == number)]].sum())
        if new_bytes == 0:
            continue
        applies = rule_of == number
        if rule.keep:
            applies &= snapshot.kind == CHECKPOINT
        matched_bytes = int(n_bytes[np.flatnonzero(applies)].sum())
        if new_bytes > parse_bytes(rule.max_delete, whole_bytes=matched_bytes):
            found.append(ExceededLimit(rule.name, new_bytes, matched_bytes, rule.max_delete))
    return tuple(found)
