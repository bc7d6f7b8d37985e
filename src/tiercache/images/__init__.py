"""Image decoding: `decode_image` holds the options and what follows from them, `decoder` decodes into given memory."""
