"""Text from a checkpoint: plain decoding, and speculative decoding with the checkpoint's own MTP module."""

DEFAULT_DRAFT = 3  # tokens drafted per verification, where nothing else is asked for
