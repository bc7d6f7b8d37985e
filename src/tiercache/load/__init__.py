"""The loaders of tiercache: from shards to batches.

`loader` has torch's interface, and `numpy_loader` serves NumPy arrays without torch; the two differ in their array
library (`array_library`, `torch_library`). Behind them an engine produces the epochs: `engine` for tiercache's own
order on the native path, `sampler_engines` for a known sampler on the native path, and for tiercache's order on torch's
path. `ranks` says which share of an epoch this process is served, and lets all processes agree on the order.
A rank's share of an epoch (`epoch`) is cut into pieces; the planner thread (`planner`) loads their windows
(`prefetch`), and the ring of `pipeline` gathers the batches, which `batch` assembles. `decode` decodes their images,
`transform` applies the user's functions, and `device_pipeline` copies batches to a device (`device`). `corrupt`
replaces corrupt records. `reading_plan` tells the cache when each shard is read.

Only the modules of torch's interface (`loader`, `samplers`, `sampler_engines`, `torch_rng`, `torch_library` and
`collate`), of transforms and of devices import torch.
"""
