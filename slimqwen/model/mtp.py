"""The multi-token-prediction module, which Transformers drops on load and on save.

It is built from the backbone's own classes, so that whatever the family's decoder layer is, MTP's is the same, and
its state dict has the checkpoint's names below `mtp.`: `pre_fc_norm_embedding`, `pre_fc_norm_hidden`, `fc`,
`layers.0.*`, `norm`. Embedding, rotary table and lm_head are the backbone's and are not part of it.
"""

from copy import deepcopy

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from slimqwen.families import Family
from slimqwen.model.internals import initialise

MTP_PREFIX = "mtp."  # of the module's tensors in a checkpoint


class MtpModule(nn.Module):
    """h'_i = layer(fc([norm_e(Emb(t_{i+1})) ; norm_h(h_i)])), then a norm; predicts t_{i+2} (DeepSeek-V3, eq. 21-25).

    `h_i` is the backbone's last hidden state after its final norm. The order of the concatenation, embedding first,
    is the checkpoint's.
    """

    def __init__(self, backbone: PreTrainedModel, family: Family) -> None:
        super().__init__()
        decoder = backbone.get_decoder()
        layer_class, norm_class = type(decoder.layers[0]), type(decoder.norm)
        self.config = deepcopy(backbone.config)
        for key, value in family.mtp_config.items():
            setattr(self.config, key, value)
        hidden_size, eps = self.config.hidden_size, self.config.rms_norm_eps
        self.pre_fc_norm_embedding = norm_class(hidden_size, eps=eps)
        self.pre_fc_norm_hidden = norm_class(hidden_size, eps=eps)
        self.fc = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layers = nn.ModuleList([layer_class(self.config, 0)])
        self.norm = norm_class(hidden_size, eps=eps)
        for module in self.modules():
            initialise(backbone, module)

    def forward(
        self,
        hidden: torch.Tensor,
        next_embeddings: torch.Tensor,
        rotary: nn.Module,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Compute one prediction step for every position.

        Args:
            hidden: backbone output h_i (or this module's own output, to draft one token further), [batch, seq, hidden].
            next_embeddings: Emb(t_{i+1}), [batch, seq, hidden].
            rotary: the backbone's rotary embedding.
            attention_mask: 1 for real tokens, [batch, seq]; None where there is no padding.
            past_key_values: this module's own cache of the positions before these, which gets these too; None: no such.
        Returns:
            Hidden state for lm_head that predicts t_{i+2}, [batch, seq, hidden].
        """
        joined = torch.cat([self.pre_fc_norm_embedding(next_embeddings), self.pre_fc_norm_hidden(hidden)], dim=-1)
        x = self.fc(joined)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        for layer in self.layers:
            x = layer(
                x,
                position_embeddings=rotary(x, _positions_by_axis(rotary, position_ids)),
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
            )
        return self.norm(x)


def _positions_by_axis(rotary: nn.Module, position_ids: torch.Tensor) -> torch.Tensor:
    """Return positions [1, seq] as this rotary table takes them: [3, 1, seq] where it has the axes time, height and width.

    In text the three are equal. Newer releases of Transformers repeat them themselves, 5.17 does not.
    """
    return position_ids.expand(3, -1, -1) if hasattr(rotary, "mrope_section") else position_ids
