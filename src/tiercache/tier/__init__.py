"""Placement, rules, plans and the mover: what lies where, what should, and how it gets there; nothing is ever lost."""
