"""Planning: a pure function from an inventory and a rule file to a plan of moves.

``proposals`` evaluates rules and proposes moves, ``policy`` rejects those that a constraint forbids and adds moves for
watermarks; both pass model.MoveColumns on. ``plan`` makes a plan of the result and reads and writes its file, and
``tables`` creates its moves and refusals on access. tier/costs.py computes dollars.
"""
