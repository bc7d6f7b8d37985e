"""`app` has the entry point and the list of verbs, `common` what they share; other modules have the verbs."""
