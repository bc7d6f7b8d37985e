"""Tiering: moves shards, checkpoints and files between hot, standard and archive storage by rules.

A run takes an inventory of all tiers (listing, layouts, copies, metrics, usage), applies the policy to it, writes a
plan with every object, executes the plan, and records placements that lead readers to the moved objects. Each copy is
verified before its source is deleted, and a move never deletes the last verified copy of an object unless a
rule with `delete_after` asks for it.

The packages ``inventory``, ``plan`` and ``move`` are the steps of a run; readers follow the placements of
store/placement. ``rules`` reads the rule file. ``stores`` opens the stores of the
tiers, and ``journal`` is this machine's catalog and journal. ``model`` has the values that all exchange,
``text_columns`` works on columns of strings, and ``costs`` computes dollars. ``findings`` are warnings of rules.
``recall`` brings groups back, also from archives, and ``holds`` protect what was brought back.
"""
