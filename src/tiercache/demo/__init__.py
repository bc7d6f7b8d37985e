"""The story of `tiercache demo`: an S3 server, two data sets, two small models and three tiers on one machine."""
