"""Generation of text: plain decoding, and speculative decoding with the checkpoint's own MTP module."""

DEFAULT_DRAFT = 3  # tokens drafted per verification by default
