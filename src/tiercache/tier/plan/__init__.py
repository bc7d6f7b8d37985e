"""Planning: a pure function from an inventory and a rule file to a plan of moves.

``selection`` assigns rules and pins to groups, ``proposals`` evaluates rules and proposes moves, and says why a
checkpoint is kept; ``policy`` refuses moves that a constraint forbids, adds moves for full tiers, and says whether so
much is deleted that a person must confirm it. The last two pass model.MoveColumns on. ``plan`` makes a plan of the
result, whose moves and refusals are created on access, and ``plan_file`` reads and writes it. tier/costs.py computes
dollars.
"""
