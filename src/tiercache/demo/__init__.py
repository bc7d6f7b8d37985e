"""The story of `tiercache demo`: an S3 server, two data sets, two small models and three tiers on one machine.

`story` tells it, `train` is its training process, and `results` holds what that process returns and the claims.
"""
