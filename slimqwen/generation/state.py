"""What a backbone remembers of one sequence, and how the newest tokens are forgotten again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

MOST_TOKENS_AGAIN = 16  # 4, 8, 16 and 32 are equally fast on the built-in teacher


class Reader:
    """Reads one sequence piece by piece, with Transformers' cache; the end of a piece can be taken back.

    Attention layers cache keys and values per token: the newest are cut off. A DeltaNet layer has one recurrent and
    one convolution state, which each piece overwrites. Transformers 5.23 continues both correctly from a piece of any
    length (the convolution state is put before the new inputs, and the chunked delta rule starts from the recurrent
    state), but cannot take tokens back: `_RecurrentLayer` does.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        self._decoder = backbone.get_decoder()
        self.cache = DynamicCache(config=self._decoder.config)
        self._recurrent = [
            _RecurrentLayer(_mixer(layer), self.cache, state)
            for layer, state in zip(self._decoder.layers, self.cache.layers, strict=True)
            if isinstance(state, LinearAttentionCacheLayerMixin)
        ]

    def read(self, tokens: Tensor) -> Tensor:
        """Hidden states for lm_head of the next tokens, int64 [1, seq] -> [1, seq, hidden], for good.

        Not after `read_revocably`: what that has left open must stay so.
        """
        return self._decoder(input_ids=tokens, past_key_values=self.cache, use_cache=True).last_hidden_state

    def read_revocably(self, tokens: Tensor) -> Tensor:
        """The same, where `forget` follows. Not for the first piece: there must be a state to return to."""
        with _hooks(self._recurrent):
            return self.read(tokens)

    def forget(self, count: int) -> None:
        """Take back the last `count` tokens of the piece that `read_revocably` read: 0, or more, but not all of them."""
        for state in self.cache.layers:
            if not isinstance(state, LinearAttentionCacheLayerMixin):
                state.crop(-count)
        for layer in self._recurrent:
            layer.forget(count)


class _RecurrentLayer:
    """A DeltaNet mixer whose state may stay behind what was read: it reads the tokens since then again with the next.

    The cache's state after a piece that ended in rejected tokens is of no use. So a copy from before the piece is put
    back, and the inputs of the tokens that were kept go in front of the next piece. They do not depend on what was
    forgotten, so the outputs are exact. In the same call they cost next to nothing: the delta rule works on 64 tokens
    at a time. A call of its own for them after each rejection makes decoding 11 % slower (built-in teacher, CPU).
    """

    def __init__(self, mixer: nn.Module, cache: DynamicCache, state: Any) -> None:
        self.mixer = mixer
        self._cache = cache
        self._state = state
        self._before: list[Tensor] = []  # copy of the state that `_again` continues
        self._again: Tensor | None = None  # inputs, [1, seq, hidden]; None: the cache's state is up to date
        self._inputs = torch.empty(0)  # of the last call, those read again first
        self._new = 0

    def before_forward(self, _mixer: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> Any:
        inputs = kwargs["hidden_states"]
        self._new = inputs.shape[1]
        if self._again is None:
            self._before = [tensor.clone() for tensor in self._tensors()]  # the cache is written in place
        else:
            self._put_back()
            inputs = torch.cat([self._again, inputs], dim=1)
        self._inputs = inputs
        return args, {**kwargs, "hidden_states": inputs}

    def after_forward(self, _mixer: nn.Module, _args: tuple[()], outputs: Tensor) -> Tensor:
        return outputs[:, -self._new :]

    def forget(self, count: int) -> None:
        self._again = self._inputs[:, :-count] if count else None
        if self._again is not None and self._again.shape[1] > MOST_TOKENS_AGAIN:
            self._put_back()
            self.mixer(hidden_states=self._again, cache_params=self._cache)
            self._again = None

    def _tensors(self) -> list[Tensor]:
        return [*self._state.conv_states.values(), *self._state.recurrent_states.values()]

    def _put_back(self) -> None:
        for tensor, before in zip(self._tensors(), self._before, strict=True):
            tensor.copy_(before)


def _mixer(layer: nn.Module) -> nn.Module:
    """The child of a decoder layer that uses the cache: it, and nothing else in the layer, knows the layer's number."""
    (mixer,) = (child for child in layer.children() if hasattr(child, "layer_idx"))
    return mixer


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
