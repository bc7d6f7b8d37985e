"""Planning: a pure function from an inventory and a rule file to a plan of moves.

``proposals`` evaluates rules and proposes moves, ``policy`` refuses those that a constraint forbids and adds moves for
watermarks; both pass model.MoveColumns on. ``plan`` makes a plan of the result, whose moves and refusals are created on
access, and ``plan_file`` reads and writes it. tier/costs.py computes dollars.
"""
