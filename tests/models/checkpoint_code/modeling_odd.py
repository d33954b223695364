"""A decoder that neither Octavo nor transformers has: learned positions, sandwich norms, squared ReLU."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_odd import OddConfig


def eager(module, query, key, value, attention_mask, scaling=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(1, 2), None


class OddAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.size = config, layer_idx, config.width // config.heads
        self.is_causal = True
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.kv_heads * self.size)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x, **options):
        query = self.query(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        key, value = self.key_value(x).unflatten(-1, (-1, self.size)).transpose(1, 2).chunk(2, 1)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager)
        found, _ = attend(self, query, key, value, None, scaling=0.3, **options)
        return self.out(found.flatten(2))


class OddLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention = OddAttention(config, layer_idx)
        self.up, self.down = nn.Linear(config.width, 48), nn.Linear(48, config.width)
        self.before, self.after = nn.LayerNorm(config.width), nn.LayerNorm(config.width)

    def forward(self, x, **options):
        x = x + self.after(self.attention(self.before(x), **options))
        return x + self.down(torch.relu(self.up(x)).square())


class OddPreTrainedModel(PreTrainedModel):
    config_class = OddConfig
    base_model_prefix = "body"
    _supports_attention_backend = True
    _supports_sdpa = True


class OddModel(OddPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tokens, self.places = (
            nn.Embedding(config.vocab_size, config.width),
            nn.Embedding(config.span, config.width),
        )
        self.layers = nn.ModuleList([OddLayer(config, index) for index in range(config.depth)])
        self.post_init()

    def forward(self, input_ids=None, position_ids=None, use_cache=None, **options):
        x = self.tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = x + self.places(position_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutputWithPast(last_hidden_state=x)


class OddForCausalLM(OddPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.body = OddModel(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, inputs_embeds=None, **options):
        hidden = self.body(input_ids=input_ids, inputs_embeds=inputs_embeds, **options).last_hidden_state
        return CausalLMOutputWithPast(logits=self.head(hidden) * 0.7)
