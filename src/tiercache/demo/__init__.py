"""`tiercache demo`: `story` is the verb, `train` its training processes."""
