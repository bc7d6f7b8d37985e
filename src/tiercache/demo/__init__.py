"""The story of `tiercache demo`: an S3 server, two data sets, two small models and three tiers on one machine.

`story` tells it, `train` and `killed` are its training processes, and `results` holds what these return and the claims.
"""
