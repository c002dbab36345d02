"""How much of the vocabulary's arithmetic is in memory at one time. No torch, so that a prediction of memory can import it."""

# Elements of a chunk that go through softmax, divergence and gradient at one time. On a CPU the tensors of a block then come
# from the caches. One row (2^18) at a time was another tenth faster on one thread, but each of a row's twenty parallel
# steps waits for the slowest thread: with a third process on two cores it took ten times as long as 2^21. On a GPU blocks
# only bound the memory, to 0.3 GiB, and must be large enough to outlast the launch of their kernels.
CPU_BLOCK_ELEMENTS = 2**21
GPU_BLOCK_ELEMENTS = 2**24

BLOCKS = 6
"""Tensors of a block's size that a prediction of memory counts: divergences other than the forward KL make about so many, which makes three."""


def block_rows(vocab: int, chunk_rows: int, *, on_cpu: bool) -> int:
    """Return how many rows of a chunk, at most `chunk_rows`, are worked on at one time."""
    elements = CPU_BLOCK_ELEMENTS if on_cpu else GPU_BLOCK_ELEMENTS
    return min(max(elements // vocab, 1), chunk_rows)


TILE = 128  # rows that a GPU multiplies at one time


def heads_together(device: str) -> bool:
    """Return whether a chunk's logits of all heads are in memory together, so that their gradient of the head is one product.

    Each product adds to a float32 matrix of the head's size, which a GPU reads and writes in almost the time of the product itself.
    A CPU is faster with more rows of one head in the same memory: a product of 170 rows took 1.13 times that of 256, per row, and
    adding one of 512 rows to the gradient as long as two of 256.
    """
    return device != "cpu"


def chunk_size(rows: int, models: int, rows_per_token: int) -> int:
    """Return how many tokens go through the vocabulary together.

    Args:
        rows: of logits of each model that may be in memory.
        models: with logits, the student and a teacher that runs.
        rows_per_token: of all these models and their heads.
    """
    tokens = rows * models // rows_per_token
    return max(tokens if tokens < TILE or tokens == rows else tokens - tokens % TILE, 1)
