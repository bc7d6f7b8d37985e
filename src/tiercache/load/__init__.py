"""The torch DataLoader of tiercache: from shards to batches.

`loader` holds torch's interface. Behind it an engine produces the epochs: `engine` for tiercache's own order,
`sampler_engines` for a known sampler and for torch's workers. A rank's share of an epoch (`epoch`) is cut into pieces;
the planner thread (`planner`) loads their windows (`prefetch`), and the ring of `pipeline` gathers the batches, which
`batch` assembles.

The modules import torch; this file does not.
"""
