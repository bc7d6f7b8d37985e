"""Reading order of an epoch, as pure functions: keyed permutations, streams, shard groups, windows, mixtures and ranks.

An order maps a position of the epoch to a record; a `RankPlan` maps a batch of a rank to positions. No module here
knows torch or does I/O, except through `DatasetSizes.blocks`, the caller's function that reads footers.
"""
