"""Axes and pieces of tables that several families share."""

from slimqwen.families.axes import Axis, Term, each
from slimqwen.families.family import ExpertTable, Recall, Table

VOCAB = Axis("vocab")
HIDDEN = Axis("hidden")
EXPERT = Axis("expert", scope="block")
EXPERT_NEURON = Axis("expert_neuron", scope="expert")
SHARED_NEURON = Axis("shared_neuron", scope="block")
DENSE_NEURON = Axis("dense_neuron", scope="block")  # of a layer without experts
KV_HEAD = Axis("kv_head", scope="block")
QUERY_HEAD = Axis("query_head", scope="block")  # within one KV head's group: the checkpoint's layout is rectangular
HEAD_DIM = Axis("head_dim")

QUERIES = each(KV_HEAD, each(QUERY_HEAD, HEAD_DIM))
KEYS = each(KV_HEAD, HEAD_DIM)

LAYER_NORMS: Table = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}

# One past token costs each query head a score with its key and a share of its value.
ATTENTION_RECALL = Recall(
    cached={"keys": KEYS, "values": KEYS}, read={"scores": QUERIES, "weighted_values": QUERIES}, state={}
)


def attention(queries: Term = QUERIES, biases: bool = False, norms: Table | None = None) -> Table:
    """Grouped-query attention. `queries` are the rows of q_proj, where they are more than the queries (a gate)."""
    table: dict[str, tuple[Term, ...]] = {}
    for name, rows in (("q_proj", queries), ("k_proj", KEYS), ("v_proj", KEYS)):
        table[f"self_attn.{name}.weight"] = (rows, HIDDEN)
        if biases:
            table[f"self_attn.{name}.bias"] = (rows,)
    return table | dict(norms or {}) | {"self_attn.o_proj.weight": (HIDDEN, QUERIES)}


PER_HEAD_NORMS: Table = {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}


def gated_mlp(prefix: str, neurons: Axis) -> Table:
    """down(act(gate(x)) * up(x)), the tensors of one SwiGLU network."""
    return {
        f"{prefix}gate_proj.weight": (neurons, HIDDEN),
        f"{prefix}up_proj.weight": (neurons, HIDDEN),
        f"{prefix}down_proj.weight": (HIDDEN, neurons),
    }


def routed_experts(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> ExpertTable:
    """SwiGLU experts, one tensor each below `prefix{expert}.` or stacked as Transformers' modules hold them."""
    gate, up, down = (f"{prefix}{{expert}}.{name}.weight" for name in (gate, up, down))
    return ExpertTable(
        axis=EXPERT,
        per_expert={gate: (EXPERT_NEURON, HIDDEN), up: (EXPERT_NEURON, HIDDEN), down: (HIDDEN, EXPERT_NEURON)},
        fused={f"{prefix}gate_up_proj": (gate, up), f"{prefix}down_proj": (down,)},
    )
