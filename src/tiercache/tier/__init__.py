"""Data tiering: a rule file says where data should be, a plan lists the moves, and the mover makes them.

The data path of one `tier run` is inventory -> policy -> plan -> mover -> catalog and placement. Readers follow the
placement. A move never deletes the last verified copy of an object, unless a `delete` rule asks for that.
"""
