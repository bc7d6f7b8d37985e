"""Tiering: moves shards, checkpoints and files between hot, standard and archive storage by rules.

A run takes an inventory of all tiers (listing, layouts, copies, metrics, usage), applies the policy to it, writes a
plan with every object, executes the plan, and records placements that lead readers to the moved objects. Each copy is
verified before its source is deleted, and a move never deletes the last verified copy of an object unless a
rule with `delete_after` asks for it.
"""
