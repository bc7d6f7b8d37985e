"""Image decoding: options, crop planning, and decoding into the caller's memory.

`options` holds `DecodeImage`, `crop` plans the crop, `decoder` (with `planes`) decodes, `values` decodes columns of
records read by index.
"""
