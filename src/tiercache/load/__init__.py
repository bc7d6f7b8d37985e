"""Batches from shards: the pipeline, batch assembly and the drop-in DataLoader.

Its modules, not this file, import torch.
"""
