"""How an MTP module shares lm_head and the final norm's output with a rotated backbone.

The backbone's coordinates are x' = Q'x, and lm_head becomes W diag(g_final) Q. Two places of an MTP module meet that: its
last norm feeds the same lm_head with a gain of its own, and one of its first norms reads the backbone's final norm, after the
gain. Both are right if coordinates are stretched first, x' = Q'(t * x), with a t per channel:

    t = g_last / g_final   for the module's own stream:  lm_head' Q'(t * z) = W (g_final * t * z) = W (g_last * z)
    t = 1 / g_final        for what it reads of the backbone:  Q'(t * g_final * z) = Q'z

and readers of a stretched stream are divided by t. A norm of t * z divides by another root mean square than one of z. That
factor differs from token to token, and a constant stands for it (`Basis.scales`): so the backbone's logits are exact, and
the module's are up to a factor per norm and token, which is none where the two gains are the same for all channels. On the
built-in teacher, whose t lies between 0.93 and 1.12, that costs the MTP head 0.0006 nats of KL.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimqwen.checkpoint.reader import Checkpoint
from slimqwen.core.errors import UserError
from slimqwen.families.axes import Axis, Cat, Each, Read, Stack, Term
from slimqwen.families.family import Block, TensorSpec


@dataclass(frozen=True)
class Stretches:
    """The t [hidden], float64, of each norm's input, by the norm's full name, and of what the MTP module's layer writes."""

    norms: Mapping[str, Tensor]
    mtp_stream: Tensor


def norm_of(block: Block, read: Read) -> str:
    """Return the full name of the norm whose output a dimension of one of the block's tensors reads."""
    return (block.prefix if read.norm in block.tables.get("norm", {}) else "") + read.norm


def gain(source: Checkpoint, norm: str) -> Tensor:
    """Return what a norm over the residual stream multiplies by, [hidden] float64."""
    return source.read(norm).double() + source.family.norm_offset


def stretches(source: Checkpoint) -> Stretches:
    """Compute every t of a checkpoint; all are 1 where it has no MTP module.

    Raises UserError where a gain is 0 that would have to be divided by, and where lm_head is tied to the embedding: the
    final norm's gain can be folded into the one and not into the other.
    """
    if source.config["tie_word_embeddings"]:
        raise UserError(
            f"{source.folder}: a rotation folds the final norm's gain into lm_head, which is tied to the embedding here "
            "(tie_word_embeddings): set pruning.width: norm_activation."
        )
    norms = source.family.residual_norms(source.config)
    ones = torch.ones(source.config["hidden_size"], dtype=torch.float64)
    own = [name for block, name in norms if block.is_mtp]
    if not own:
        return Stretches({name: ones for _, name in norms}, ones)
    specs = [spec for spec in source.specs.values() if spec.expert is None]
    final = next(norm for spec in specs if spec.part == "embedding" for norm in _read_by(spec))
    (projection,) = (spec for spec in specs if spec.part == "mtp_projection")
    of_embedding, of_hidden = _read_by(projection)
    read = {norm for spec in source.specs.values() if spec.block.is_mtp for norm in _read_by(spec)}
    (last,) = (norm for norm in own if norm not in read)
    for norm in (final, last):
        if (gain(source, norm) == 0).any():
            raise UserError(
                f"{source.folder}: '{norm}' multiplies a channel by 0, and a rotation with an MTP module divides by it: "
                "set pruning.width: norm_activation."
            )
    mtp_stream = gain(source, last) / gain(source, final)
    exceptions = {of_embedding: ones, of_hidden: 1 / gain(source, final)}
    return Stretches({name: mtp_stream if b.is_mtp else ones for b, name in norms} | exceptions, mtp_stream)


def _read_by(spec: TensorSpec) -> list[str]:
    """Return the norms whose output a tensor's columns read, in order."""
    return [norm_of(spec.block, read) for term in spec.dims for read in _reads(term)]


def _reads(term: Term) -> list[Read]:
    match term:
        case Read():
            return [term]
        case Cat(parts):
            return [read for _, part in parts for read in _reads(part)]
        case Each(_, inner):
            return _reads(inner)
        case int() | Axis() | Stack():
            return []
