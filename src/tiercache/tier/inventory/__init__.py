"""The inventory: everything that lies in the tiers, as groups and copies in columns.

``listing`` lists the tiers, ``datasets`` reads manifests and reported uses, ``layouts`` recognises checkpoints by name,
``groups`` builds groups, copies and the snapshot, ``conflicts`` finds different objects under one name,
``metrics`` and ``tags`` read the metrics, and the tags and pins, of checkpoints.
"""
