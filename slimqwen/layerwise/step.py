"""A model's layers apart: each with the blocks that it needs and the way through it, by Transformers' own forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimqwen.families.family import Block
from slimqwen.model.model import MtpCausalLM
from slimqwen.model.patching import overridden, with_children


@dataclass(frozen=True)
class Step:
    """One layer.

    blocks: whose weights it needs. run: takes hidden states [rows, seq, hidden] and the rows' tokens [rows, seq + 1] through
    the layer. moe: the module in it that adds the experts' outputs, if there is one. norm: what follows the last layer. number:
    the decoder layer's; None for the MTP module.
    """

    blocks: list[Block]
    run: Callable[[Tensor, Tensor], Tensor]
    moe: nn.Module | None
    norm: nn.Module | None
    number: int | None

    def through(self, hidden: Tensor, tokens: Tensor, rows_per_pass: int) -> Tensor:
        """Return the layer's output for a chunk of rows, [rows, seq, hidden], without the norm that may follow.

        In two strides: the token mixer a few rows at a time, for its activations are large; then the experts on all rows
        at once, for each must be read from the checkpoint. It is the same sum: the experts' outputs are the
        last that a layer adds to the residual stream, so the first stride leaves them out and records their inputs.
        """
        passes = zip(hidden.split(rows_per_pass), tokens.split(rows_per_pass), strict=True)
        if self.moe is None:
            return torch.cat([self.run(*rows) for rows in passes])
        with _left_out(self.moe) as recorded:
            result = torch.cat([self.run(*rows) for rows in passes])
        inputs = torch.cat(recorded)
        recorded.clear()
        return result.add_(self.moe(inputs))


def steps_of(model: MtpCausalLM) -> list[Step]:
    """Return the decoder layers, the last with the final norm, and the MTP module, in the order of the forward pass."""
    decoder, blocks = model.backbone.get_decoder(), model.family.blocks(model.config)
    around = [block for block in blocks if block.layer is None and not block.is_mtp]
    layers = [block for block in blocks if block.layer is not None]
    steps = []
    for number, block in enumerate(layers):
        needed, norm = ([block, *around], decoder.norm) if block is layers[-1] else ([block], None)
        steps.append(
            Step(needed, partial(_decode, _decoder_with_only(decoder, number)), _moe(model, [block]), norm, number)
        )
    if model.mtp is not None:
        mtp = [block for block in blocks if block.is_mtp]
        run = partial(_draft, model, with_children(model.mtp, norm=nn.Identity()))
        steps.append(Step(mtp, run, _moe(model, mtp), model.mtp.norm, None))
    return steps


def embed_tokens(model: MtpCausalLM, tokens: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the embeddings of tokens, [rows, seq, hidden], looked up where the table lies."""
    found: Tensor = model.backbone.get_decoder().embed_tokens(tokens)
    return found.to(device, dtype)


def _decode(decoder: nn.Module, hidden: Tensor, _tokens: Tensor) -> Tensor:
    result: Tensor = decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state
    return result


def _draft(model: MtpCausalLM, mtp: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    following = embed_tokens(model, tokens[:, 1:], hidden.dtype, hidden.device)
    result: Tensor = mtp(hidden, following, model.backbone.get_decoder().rotary_emb)
    return result


def _decoder_with_only(decoder: Any, number: int) -> nn.Module:
    """Return the backbone with one of its layers and no final norm: its own forward makes positions and masks, in any family."""
    layers = [layer if i == number else _Identity() for i, layer in enumerate(decoder.layers)]
    return with_children(decoder, layers=nn.ModuleList(layers), norm=nn.Identity())


class _Identity(nn.Module):
    """Identity, in the place of a layer that is left out."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def _moe(model: MtpCausalLM, blocks: list[Block]) -> nn.Module | None:
    """Return the module that owns the router of these blocks, if one of them has experts."""
    routers = [block.prefix + model.family.router for block in blocks if block.experts is not None]
    return model.module_of(routers[0].rpartition(".")[0]) if routers else None


@contextmanager
def _left_out(moe: nn.Module) -> Iterator[list[Tensor]]:
    """Let `moe` add nothing while it is open, and record its inputs in the list, [rows, seq, hidden] each."""
    recorded: list[Tensor] = []

    def record(hidden_states: Tensor) -> Tensor:
        recorded.append(hidden_states)
        return torch.zeros_like(hidden_states)

    with overridden(moe, forward=record):
        yield recorded
