"""The torch DataLoader of tiercache: from shards to batches.

`loader` holds torch's interface. Behind it an engine produces the epochs: `run` for tiercache's own order, `sampled`
for a user's sampler, `indexed` for torch's workers. A rank's share of an epoch (`epochs`, `share`, `plan`) is cut into
pieces; the planner thread (`planner`) loads their windows (`window`), and the ring of `pipeline` gathers the batches
(`assemble`), which `iterator` hands out.

The modules import torch; this file does not.
"""
