"""Packing of a source (a folder of images, Parquet files, JSON lines) into a data set.

`files` lists a source and has the interface of a kind of source; `images` and `tables` read the kinds; `sources`
decides the kind; `pack` plans a packing and runs it. `tables` also exports a data set to Parquet.
"""
