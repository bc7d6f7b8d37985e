"""Packing of a source (a folder of images or other files, tables) into a data set.

`files` lists a source and has the interface of a kind of source; `folders` and `tables` read the kinds, `images` checks
images; `sources` decides the kind; `pack` plans a packing and runs it. `export` writes a data set as files of
other libraries, and `export_formats` has a writer for each format.
"""
