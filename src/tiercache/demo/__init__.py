"""`tiercache demo`: `story` is the verb, `train` its training processes, `s3_server` the object store."""
