"""The torch DataLoader of tiercache: from shards to batches.

`loader` has torch's interface. Behind it an engine produces the epochs: `engine` for tiercache's own order on the
native path, `sampler_engines` for a known sampler on the native path, and for tiercache's order on torch's path. A
rank's share of an epoch (`epoch`) is cut into pieces; the planner thread (`planner`) loads their windows (`prefetch`),
and the ring of `pipeline` gathers the batches, which `batch` assembles. `decode` decodes their images, and `corrupt`
replaces corrupt records. `reading_plan` tells the cache when each shard is read.

The modules import torch; this file does not.
"""
