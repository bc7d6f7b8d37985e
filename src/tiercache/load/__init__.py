"""The loaders of batches. A module imports only modules of lines above its own.

loader_options   what the user sets, and what follows: the rank of this process, its threads and memory
batch            memory of batches; how a slot of the ring becomes a dict of arrays
pieces           the rows that a rank serves, and the blocks that they need; pure functions
windows          blocks in memory: loading, reading pages ahead, the memory limit
corrupt          corrupt records, and how the record before replaces them
epoch            position and share of a run, and the reading plan that the cache gets
planner          thread that loads windows and pushes their rows to the ring; the start of the next epoch
pipeline         the batches of one epoch; what stages have in common
decode, transform    stages after the gathering: images, and the user's functions in the thread of next()
collate          torch's collate functions, MixUp and CutMix
transform_workers, device    stages that need torch: the user's functions in processes, and copies to a device
engine           the epochs of one loader, one after the other; iterators and figures
samplers         samplers of torch as orders, and tiercache's order as a sampler
loader, numpy_loader    the public classes
"""
