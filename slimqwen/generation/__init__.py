"""Text from a checkpoint: plain decoding, and speculative decoding with the checkpoint's own MTP module."""
