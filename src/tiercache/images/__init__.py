"""Image decoding: options, crop planning, and decoding into the caller's memory.

`options` holds `DecodeImage`; `decoder` plans the crop, decodes, and decodes columns of records that are read by index.
"""
