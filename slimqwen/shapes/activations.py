"""Activation memory per token and block, from the axis table: the bytes that autograd saves for the backward pass.

Counted operation by operation after what PyTorch saves of Transformers' layers (5.23); tests/test_training_memory.py
compares the sums with the tensors that are actually alive.
"""

from collections.abc import Collection
from dataclasses import dataclass

from slimqwen.families.axes import Axis, Read, Sizes, Term, size
from slimqwen.families.family import Block, ExpertTable, Table

FLOAT32 = 4
CHUNK_TOKENS = 64  # of the chunked delta rule, in Transformers' reference and in flash-linear-attention


@dataclass(frozen=True)
class Precision:
    """The arithmetic of a device.

    compute_bytes: per element of a matrix product's operands. casts: each product copies its input to that dtype (autocast
    over a float32 residual stream); otherwise the products of one input share it. fused_deltanet: the delta rule runs
    in flash-linear-attention's kernels, which save their inputs, not in the reference, which saves float32 chunks.
    """

    compute_bytes: int
    casts: bool
    fused_deltanet: bool


CPU = Precision(compute_bytes=4, casts=False, fused_deltanet=False)
GPU = Precision(compute_bytes=2, casts=True, fused_deltanet=True)
SHARDED_GPU = Precision(compute_bytes=2, casts=False, fused_deltanet=True)  # weights and residual stream in bfloat16


def saved_bytes(
    block: Block,
    sizes: Sizes,
    hidden: Axis,
    num_experts_per_tok: int,
    precision: Precision,
    frozen: Collection[str] = (),
) -> int:
    """Return the bytes that a block saves per token for its backward pass: the sum over its parts.

    norms over the residual stream: input and normalised input in float32; output once, or cast for each matrix that reads it
    the token mixer: `_attention` or `_deltanet`
    the MTP module's projection: its input
    SwiGLU networks: outputs of gate and up, the activated gate, the product
    router: a score per expert in float32; per chosen expert the indices that sort tokens to experts and back (40 bytes)
    routed experts, per chosen one: the token itself, what a SwiGLU network keeps, the output; where they are `frozen`, no input
    of a matrix
    """
    h, c = sizes[hidden], precision.compute_bytes
    tables = block.tables
    norms = sum(dims == (hidden,) for dims in tables.get("norm", {}).values())
    readers = sum(_reads(dims[-1]) for table in tables.values() for dims in table.values())
    total = norms * 2 * h * FLOAT32 + (readers if precision.casts else norms) * h * c
    if "attention" in tables:
        total += _attention(block, sizes, precision)
    if "deltanet" in tables:
        total += _deltanet(block, sizes, precision)
    total += c * sum(size(dims[1], sizes) for dims in tables.get("mtp_projection", {}).values() if len(dims) == 2)
    for part in ("dense_mlp", "shared_experts"):
        total += c * _swiglu(tables.get(part, {}), sizes, hidden)
    if any(dims[0] == 1 for dims in tables.get("shared_experts", {}).values()):
        total += c * h  # the shared expert's output, before its gate
    if block.experts is not None:
        total += FLOAT32 * sizes[block.experts.axis] + 40 * num_experts_per_tok
        total += c * num_experts_per_tok * _expert(block.experts, sizes, hidden, "routed_experts" in frozen)
    return total


def exchanged_bytes(
    block: Block,
    sizes: Sizes,
    hidden: Axis,
    num_experts_per_tok: int,
    precision: Precision,
    frozen: Collection[str],
    imbalance: float,
) -> int:
    """Return the bytes per token that a block saves beyond `saved_bytes` where ranks share its routed experts.

    Per chosen expert the output once more, as it comes back; and what the experts save, (imbalance - 1) times: the busiest rank gets
    so many times the mean.
    """
    if block.experts is None:
        return 0
    own = _expert(block.experts, sizes, hidden, "routed_experts" in frozen)
    return round(precision.compute_bytes * num_experts_per_tok * (sizes[hidden] + (imbalance - 1) * own))


def _expert(experts: ExpertTable, sizes: Sizes, hidden: Axis, is_frozen: bool) -> int:
    """Count the elements that one routed expert saves of a token."""
    inputs = sizes[hidden] + sum(size(dims[1], sizes) for dims in experts.per_expert.values() if dims[0] == hidden)
    total = 2 * sizes[hidden] + _swiglu(experts.per_expert, sizes, hidden)
    return total - inputs if is_frozen else total


def _reads(columns: Term) -> bool:
    """Return whether a matrix with these columns reads the residual stream through a norm."""
    return isinstance(columns, Read)


def _swiglu(table: Table, sizes: Sizes, hidden: Axis) -> int:
    """Count elements: rows of the matrices that read the residual stream, twice the columns of the one that writes to it."""
    reads = sum(size(dims[0], sizes) for dims in table.values() if _reads(dims[-1]))
    writes = sum(size(dims[1], sizes) for dims in table.values() if len(dims) == 2 and dims[0] == hidden)
    return reads + 2 * writes


def _attention(block: Block, sizes: Sizes, precision: Precision) -> int:
    """Return the bytes saved by attention: queries, keys, values, output.

    With norms per head also their input and normalised input, in float32; with an output gate (more rows in q_proj than
    queries) the gate and the gated output.
    """
    assert block.recall is not None
    table, c = block.tables["attention"], precision.compute_bytes
    queries = size(block.recall.read["scores"], sizes)
    keys = size(block.recall.cached["keys"], sizes)
    projected = size(table["self_attn.q_proj.weight"][0], sizes)
    total = c * (2 * queries + 2 * keys)
    if "self_attn.q_norm.weight" in table:
        normed = queries if precision.casts else projected  # a cast copies the queries alone
        total += FLOAT32 * (normed + queries + 2 * keys)
    if projected > queries:
        total += c * 3 * queries
    return total


def _deltanet(block: Block, sizes: Sizes, precision: Precision) -> int:
    """Return the bytes saved by DeltaNet: the convolution's input and output, the delta rule, and the gated norm's five stages.

    With H value heads, K and V elements of all heads' keys and values, and chunks of C tokens, the reference saves in float32,
    per token: 12 K (queries and keys: raw, normalised, scaled, decayed, solved), 3 V, 5 C x C matrices per head and
    chunk (5 C H), one state per chunk. The fused kernel saves normalised queries and keys, values, and one C x C matrix.
    """
    assert block.recall is not None
    heads, key_dim, value_dim = (size(term, sizes) for term in block.recall.state["recurrent"])
    convolved = size(block.recall.state["convolution"][0], sizes)
    c, keys, values = precision.compute_bytes, heads * key_dim, heads * value_dim
    norm = FLOAT32 * 4 * values + c * 2 * values
    if precision.fused_deltanet:
        return c * (2 * convolved + convolved + CHUNK_TOKENS * heads) + FLOAT32 * 6 * heads + norm
    states = heads * key_dim * value_dim // CHUNK_TOKENS
    rule = 12 * keys + 3 * values + (5 * CHUNK_TOKENS + 10) * heads + states
    return c * 2 * convolved + FLOAT32 * rule + norm
