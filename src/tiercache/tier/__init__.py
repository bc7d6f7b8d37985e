"""Tiering: moves shards, checkpoints and files between hot, standard and archive storage by rules.

A run (``mover``) takes the ``inventory`` of all tiers, applies the ``policy`` to it, writes a plan with every object
(``plans``), makes its moves (``moves``), and deletes sources after their grace period (``deletions``). ``listing`` and
``checkpoint_names`` tell which objects form which copies. ``context`` has the checks of moves, and the placements that
lead readers to moved objects; ``transfer`` moves bytes; ``lock`` admits one mover. ``rules`` reads the rule file, and
``findings`` are its warnings. ``stores`` opens the stores of the tiers, and ``journal`` is this machine's catalog and
journal. ``recall`` brings groups back, also from archives. ``snapshot`` has the values that all exchange.

A move from src to dst has these steps. Each step is journaled before the next one, and each is harmless when repeated.
MoveExecutor._run_batch() calls steps 1 to 7, and DeferredDeletions._run_batch() steps 8 to 10, for a batch of moves::

    1. check     src has the planned objects, and no pin or hold protects them (_check_sources, _check_pins)
    2. begin     the journal records the move: src, dst, size and date of every object, and which of them dst lacks. It
                 cancels earlier moves of the path (_begin, CopyMaker.note_absent_objects)
    3. copy      copies the objects that dst lacks, one group after another, the completing object last; verifies each
                 copy; removes the parts of a group that cannot be completed (_make, CopyMaker.copy)
    4. record    the catalog of this machine records the verified copies in src and dst, by size, ETag and CRC-32C, as
                 soon as a group is complete (CopyMaker.copy)
    5. check     checks src again: an object that changed during the copy is not what dst has (_check_sources)
    6. place     confirms the copies in dst, journals that they stay, and commits the placement, which tells every
                 reader where the objects are from now on (_commit_placements)
    7. wait      waits for the grace period: readers that do not know the new placement yet still read src (_end)
    8. re-check  dst is complete and as it was verified; src is as it was copied; nobody reads src; no pin
                 protects it; the placement leads to dst; src and dst are two locations; files in dst are read from disk
                 (_check, _postpone_overlaps, _read_back, _check_pins)
    9. drop      checks src, dst and the pins once more; deletes from src, first the completing object, then the
                 rest (_carry_out)
    10. done     the journal and the catalog record that everything is over (_end)

What can happen between two steps:

    2-6  The process is killed: the row stays in the state "begun". Until it is finished, no copy in its dst counts as
         whole. The next run finishes the copy, or removes its parts, before it lists the tiers (finish_copies()).
         Applying the same plan again continues it, too.
    3-4  The process is killed: copies exist that the catalog does not know. The journal does: they are compared with
         src, and are not copied again.
    3-4  The network fails for longer than requests are repeated: the row stays "begun", and the next run continues. Any
         other failure (a full disk, a lost permission) withdraws the copy, and stops this move only.
    3-7  A copy in dst was lost, and is made again: _begin_anew resets the row first, so a kill at any point starts the
         grace period again.
    4-5  src is replaced: step 5 sees another ETag and stops. The copy in dst stays: the two are a conflict for the next
         plan.
    5-6  src is replaced in this instant: readers are led to the old object. Step 8 notices and reverts the placement.
    6-7  The process is killed: readers know the placement, but no deletion waits. Applying the same plan again starts
         the grace period; another plan asks for a drop.
    7-8  src is replaced: step 8 cancels the deletion and reverts the placement. The two objects under one name are a
         conflict for the next plan (listing.find_conflicts): a person decides which one is wanted.
    7-8  The copy in dst is lost, damaged, or restored and moved by somebody: step 8 compares, and stops. No store
         reports that a file has rotted; only reading the file shows it.
    7-8  Another process with another journal moves the object back: its placement leads to src, and step 8 reads that.
    8-9  src is replaced: the mover checks src again after all slow checks, and the delete request to S3 names the ETag.
         Other stores have no such request: the time that the announcement takes remains as a window.
    8-9  Somebody removes or replaces the copy in dst: the mover checks dst again, as it does src. If that happens while
         the deletion from src is announced and made, what the copy had is lost: no store deletes one object only if
         another object exists and is unchanged.
    8-9  The object is pinned: the mover reads the rule file again after all slow checks. From tier_drop.decided on,
         while one batch of deletions is announced and made, a pin is too late for that batch; it protects the rest.
    8-9  The lock was lost while this process slept: the mover checks the lock after everything that step 8 checks,
         directly before the deletion. lock.py describes a process that sleeps just after that check.
    9-9  The process is killed between deletions: the row says "dropping", and the rest is deleted when dst is confirmed
         once more, whatever rules, pins and holds say then: what is left in src is of no use.
    any  The catalog is lost or old: what it does not know is verified again, or stops the move; what it says is
         compared with the stores by ETag. The worst request of an old journal is a drop that step 8 refuses.
    any  The answer of a store is lost: a copy exists or not, deletions are repeated, the placement is read back.
    any  The clock jumps: the grace period gets shorter or longer. Only the convenience of readers depends on it.

A `drop` is a move whose copy was made earlier: nothing is copied, but the copy must be verified. A `delete` removes
last copies: it waits too, and is made only if a new plan still asks for it. A `reclass` into a class from
which objects must be restored before they can be read is announced and waits; a `reclass` into any other class is made
at once.
"""
