"""Pictures: what to make of them, which part to cut out, and decoding into the caller's memory."""
