"""Axes and pieces of tables that several families share."""

from collections.abc import Mapping

from slimqwen.families.axes import Axis, Read, Term, each
from slimqwen.families.family import Block, Config, ExpertTable, Part, Recall, Table

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

# Of a stack whose every layer attends in full and routes to experts; families add to it.
ATTENTION_FIELDS = {
    "vocab_size": (VOCAB,),
    "hidden_size": (HIDDEN,),
    "num_experts": (EXPERT,),
    "moe_intermediate_size": (EXPERT_NEURON,),
    "num_key_value_heads": (KV_HEAD,),
    "num_attention_heads": (KV_HEAD, QUERY_HEAD),
    "head_dim": (HEAD_DIM,),
}

LAYER_NORMS: Table = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
MIXER_INPUT = Read(HIDDEN, "input_layernorm.weight")
MLP_INPUT = Read(HIDDEN, "post_attention_layernorm.weight")

# One past token costs each query head a score with its key and a share of its value.
ATTENTION_RECALL = Recall(
    cached={"keys": KEYS, "values": KEYS}, read={"scores": QUERIES, "weighted_values": QUERIES}, state={}
)


def attention(queries: Term = QUERIES, biases: bool = False, norms: Table | None = None) -> Table:
    """Return the table of grouped-query attention. `queries` are the rows of q_proj, where they are more than the queries (a gate)."""
    table: dict[str, tuple[Term, ...]] = {}
    for name, rows in (("q_proj", queries), ("k_proj", KEYS), ("v_proj", KEYS)):
        table[f"self_attn.{name}.weight"] = (rows, MIXER_INPUT)
        if biases:
            table[f"self_attn.{name}.bias"] = (rows,)
    return table | dict(norms or {}) | {"self_attn.o_proj.weight": (HIDDEN, QUERIES)}


PER_HEAD_NORMS: Table = {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}


def gated_mlp(prefix: str, neurons: Axis) -> Table:
    """Return the tensors of one SwiGLU network, down(act(gate(x)) * up(x))."""
    return {
        f"{prefix}gate_proj.weight": (neurons, MLP_INPUT),
        f"{prefix}up_proj.weight": (neurons, MLP_INPUT),
        f"{prefix}down_proj.weight": (HIDDEN, neurons),
    }


def routed_experts(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> ExpertTable:
    """Return the table of SwiGLU experts, one tensor each below `prefix{expert}.` or stacked as Transformers' modules hold them."""
    gate, up, down = (f"{prefix}{{expert}}.{name}.weight" for name in (gate, up, down))
    return ExpertTable(
        axis=EXPERT,
        per_expert={gate: (EXPERT_NEURON, MLP_INPUT), up: (EXPERT_NEURON, MLP_INPUT), down: (HIDDEN, EXPERT_NEURON)},
        fused={f"{prefix}gate_up_proj": (gate, up), f"{prefix}down_proj": (down,)},
    )


def decoder_layer(layer: int, attention: Table, mlp: Mapping[Part, Table], experts: ExpertTable | None = None) -> Block:
    """Return a layer of full attention; `mlp` is a dense network, or what there is beside the routed experts."""
    tables: dict[Part, Table] = {"norm": LAYER_NORMS, "attention": attention, **mlp}
    return Block(f"model.layers.{layer}.", tables, experts, layer, recall=ATTENTION_RECALL)


def around_the_layers(config: Config, root: str = "model.") -> list[Block]:
    """Return the embedding, the final norm and, unless it is tied to the embedding, lm_head."""
    embeddings: Table = {f"{root}embed_tokens.weight": (VOCAB, HIDDEN)}
    if not config["tie_word_embeddings"]:
        embeddings = {**embeddings, "lm_head.weight": (VOCAB, Read(HIDDEN, f"{root}norm.weight"))}
    return [Block("", {"embedding": embeddings, "norm": {f"{root}norm.weight": (HIDDEN,)}})]
