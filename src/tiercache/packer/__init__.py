"""Packing of a source (files, data of other libraries, Python objects) into a data set.

`files` lists a source and has the interface of a kind of source; `folders`, `tables`, `tokens`, `arrays`, `tfrecords`,
`litdata`, `layouts` and `objects` read the kinds; `sources` decides the kind; `images` checks and recodes images;
`transform` changes and selects records, and `rearrange` sorts, shuffles and deduplicates them; `plan` plans a packing,
and `pack` runs it, by `workers`. `export` writes a data set as files of other libraries, and `export_formats` has a
writer for each format.
"""
