"""How much of the vocabulary's arithmetic is in memory at one time. No torch, so that a prediction of memory can import it."""

# Elements of a chunk that go through softmax, divergence and gradient at one time. On a CPU the tensors of a block then come
# from the caches. One row (2^18) at a time was another tenth faster on one thread, but each of a row's twenty parallel
# steps waits for the slowest thread: with a third process on two cores it took ten times as long as 2^21. On a GPU blocks
# only bound the memory, to 0.3 GiB, and must be large enough to outlast the launch of their kernels.
CPU_BLOCK_ELEMENTS = 2**21
GPU_BLOCK_ELEMENTS = 2**24

BLOCKS = 6
"""Tensors of a block's size: a log-softmax and a softmax of each model, a scratch tensor of each head."""


def block_rows(vocab: int, chunk_rows: int, *, on_cpu: bool) -> int:
    """Return how many rows of a chunk, at most `chunk_rows`, are worked on at one time."""
    elements = CPU_BLOCK_ELEMENTS if on_cpu else GPU_BLOCK_ELEMENTS
    return min(max(elements // vocab, 1), chunk_rows)
