"""Moves: carrying out a plan without losing data.

``mover`` is the entry (open_mover, run_once) and describes the steps and their races; ``executor`` takes the moves of a
plan up to their grace period; ``deletions`` makes what waits; ``checks`` compares objects with the plan and the
catalog; ``placement_updates`` tells readers; ``transfer`` moves bytes; ``lock`` admits one process.
"""
