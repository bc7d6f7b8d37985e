"""Planning: a pure function from an inventory and a rule file to a plan of moves.

``selection`` assigns rules, pins and keep lists to groups, ``proposals`` evaluates rules and proposes moves, ``policy``
refuses those that a constraint forbids and adds moves for watermarks; the last two pass model.MoveColumns on. ``plan``
makes a plan of the result, whose moves and refusals are created on access, and ``plan_file`` reads and writes it.
``deletion_limit`` says whether it deletes so much that a person must confirm it. ``explanations`` says why a checkpoint
is kept. tier/costs.py computes dollars.
"""
