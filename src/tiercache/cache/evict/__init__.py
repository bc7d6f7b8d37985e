"""Eviction: the policies, the reading plans of all jobs on the machine, and the evictor, which makes room."""
