"""Placement: where the objects of a home are now, and how readers follow them.

``log`` is the format and the protocol of placements beside a data set; ``resolver`` finds the current location of a
key; ``redirecting_store`` is the home as a store that follows the placement, joined with the use counts of one opened
data set; ``uses`` are the machines' reports of use; ``locations`` finds where files and checkpoints are, from
any path or URL under which they once lay.
"""
