"""The command ``tiercache``: each verb parses its arguments, calls the library and prints the result.

`app` has the entry point. `commands` and `tier_commands` have the signatures and help texts of the verbs; their bodies
import the modules that implement them (`data_sets`, `cache_verbs`, `simulate`, `tier_verbs`, `demo`).
"""
