"""Checkpoints: saved without stopping training, committed by a manifest, kept by rules, loaded from the nearest copy.

layout.py defines names and the manifest. A save goes from state_tree.py (which values are tensors) over staging.py (the
copy to host memory, the only part that blocks training) to writer.py (files, upload, verification, commit) in a thread.
"""
