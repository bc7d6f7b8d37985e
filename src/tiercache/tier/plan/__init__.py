"""Planning: a pure function from an inventory and a rule file to a plan of moves.

``proposals`` evaluates rules and proposes moves, ``policy`` rejects those that a constraint forbids and adds moves for
watermarks, ``costs`` computes dollars, ``tables`` holds decisions and moves as columns, ``plan`` makes a plan and reads
and writes its file.
"""
