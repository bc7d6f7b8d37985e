"""The inventory: everything that lies in the tiers, as groups and copies in columns.

``listing`` lists the tiers, ``datasets`` reads manifests and reported uses, ``layouts`` recognises checkpoints by name,
``groups`` builds groups, copies and the snapshot, ``conflicts`` finds different objects under one name,
``metrics`` reads the metrics of checkpoints, and ``pins`` the pins of our own.
"""
