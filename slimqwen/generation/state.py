"""The cached state of a backbone for one sequence, and its rollback by the newest tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

MOST_RECOMPUTED_TOKENS = 16  # 4, 8, 16 and 32 are equally fast on the built-in teacher


class CachedBackbone:
    """A backbone that reads one sequence piece by piece with Transformers' cache, and can roll back the end of a piece.

    Attention layers cache keys and values per token, so the newest are cropped. A DeltaNet layer has one recurrent and
    one convolution state, which each piece overwrites. Transformers 5.23 continues both correctly with a piece of any
    length (the convolution state is prepended to the new inputs, and the chunked delta rule starts from the recurrent
    state), but has no rollback: `_RecurrentLayer` adds it.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        self._decoder = backbone.get_decoder()
        self.cache = DynamicCache(config=self._decoder.config)
        self._recurrent = [
            _RecurrentLayer(layer, self.cache, state)
            for layer, state in zip(self._decoder.layers, self.cache.layers, strict=True)
            if isinstance(state, LinearAttentionCacheLayerMixin)
        ]

    def read(self, tokens: Tensor) -> Tensor:
        """Return the final hidden states of the next tokens, int64 [1, seq] -> [1, seq, hidden], without rollback.

        Not allowed after `read_revocably`, whose state may be behind.
        """
        return self._decoder(input_ids=tokens, past_key_values=self.cache, use_cache=True).last_hidden_state

    def read_revocably(self, tokens: Tensor) -> Tensor:
        """Like `read`, but must be followed by `forget`. Not for the first piece: it requires an existing state."""
        with _hooks(self._recurrent):
            return self.read(tokens)

    def forget(self, count: int) -> None:
        """Roll back the last `count` tokens of the piece that `read_revocably` read: 0 or more, but not all of them."""
        for state in self.cache.layers:
            if not isinstance(state, LinearAttentionCacheLayerMixin):
                state.crop(-count)
        for layer in self._recurrent:
            layer.forget(count)


class _RecurrentLayer:
    """A DeltaNet mixer whose state may be some tokens behind: these are recomputed together with the next piece.

    The cache's state after a piece that ended in rejected tokens is useless. So a copy from before the piece is
    restored, and the inputs of the accepted tokens are prepended to the next piece. They do not depend on the rejected
    ones, so the outputs are exact. In the same call they cost almost nothing: the delta rule works on chunks of 64
    tokens. A separate call for them after each rejection makes decoding 11 % slower (built-in teacher, CPU).
    """

    def __init__(self, layer: nn.Module, cache: DynamicCache, state: Any) -> None:
        self.mixer = _mixer(layer)
        self._layer = layer
        self._cache = cache
        self._state = state
        self._before: list[Tensor] = []  # copy of the state before `_again`
        self._again: Tensor | None = None  # inputs to recompute, [1, seq, hidden]; None: the cache is up to date
        self._inputs = torch.empty(0)  # of the last call, recomputed ones first
        self._new = 0

    def before_forward(self, _mixer: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> Any:
        """Prepend the inputs that are recomputed, as a forward pre-hook of the mixer."""
        inputs = kwargs["hidden_states"]
        self._new = inputs.shape[1]
        if self._again is None:
            self._before = [tensor.clone() for tensor in self._tensors()]  # the cache is updated in place
        else:
            self._restore()
            inputs = torch.cat([self._again, inputs], dim=1)
        self._inputs = inputs
        return args, {**kwargs, "hidden_states": inputs}

    def after_forward(self, _mixer: nn.Module, _args: tuple[()], outputs: Tensor) -> Tensor:
        """Drop the outputs of the recomputed inputs, as a forward hook of the mixer."""
        return outputs[:, -self._new :]

    def forget(self, count: int) -> None:
        """Roll back the last `count` tokens; the others since the copied state are recomputed later, or now if many."""
        self._again = self._inputs[:, :-count] if count else None
        if self._again is not None and self._again.shape[1] > MOST_RECOMPUTED_TOKENS:
            self._restore()
            with _gathered(self._layer):
                self.mixer(hidden_states=self._again, cache_params=self._cache)
            self._again = None

    def _tensors(self) -> list[Tensor]:
        return [*self._state.conv_states.values(), *self._state.recurrent_states.values()]

    def _restore(self) -> None:
        for tensor, before in zip(self._tensors(), self._before, strict=True):
            tensor.copy_(before)


def _mixer(layer: nn.Module) -> nn.Module:
    """Return the child of a decoder layer that uses the cache: the only one with a `layer_idx`."""
    (mixer,) = (child for child in layer.children() if hasattr(child, "layer_idx"))
    return mixer


@contextmanager
def _gathered(layer: nn.Module) -> Iterator[None]:
    """Have the weights of a layer that is sharded over ranks while it is open, for a part of it that is called alone."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    yield
    layer.reshard()


@contextmanager
def _hooks(layers: list[_RecurrentLayer]) -> Iterator[None]:
    hooks = []
    for layer in layers:
        hooks.append(layer.mixer.register_forward_pre_hook(layer.before_forward, with_kwargs=True))
        hooks.append(layer.mixer.register_forward_hook(layer.after_forward))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
