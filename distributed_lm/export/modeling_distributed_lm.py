"""A decoder trained with distributed_lm, for ``transformers``. Needs torch and transformers alone.

This file stands beside the weights (``auto_map`` in config.json) where no class of transformers
represents the model: ALiBi with ReLU or biases, for one. Load it with ``trust_remote_code=True``.

Shapes: B batch, Q queries, K keys, N query heads, G key/value heads, H head dim, D hidden,
V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda hidden: F.gelu(hidden, approximate="tanh"),
}
T5_BUCKETS, T5_MAX_DISTANCE = 32, 128


class DistributedLMConfig(PretrainedConfig):
    """The fields of distributed_lm's model config, under transformers' names where it has one."""

    model_type = "distributed_lm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size=51200,
        hidden_size=2048,
        num_hidden_layers=25,
        num_attention_heads=16,
        num_key_value_heads=None,
        intermediate_size=None,
        position="alibi",
        activation="relu",
        bias=True,
        normalization="layernorm",
        norm_epsilon=1e-5,
        max_position_embeddings=2048,
        initializer_range=0.02,
        tie_word_embeddings=True,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.position = position
        self.activation = activation
        self.bias = bias
        self.normalization = normalization
        self.norm_epsilon = norm_epsilon
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def alibi_slopes(num_heads):
    """[N] of "Train Short, Test Long" (Press, Smith and Lewis 2022) and its code, as floats."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def sinusoidal(positions_BQ, width):
    """[B, Q, D] fp32, as fairseq: sines, then cosines, counted from position 2."""
    half = width // 2
    step = math.log(10000.0) / (half - 1)
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float64, device=positions_BQ.device) * -step
    )
    angles = (positions_BQ.double() + 2)[..., None] * frequencies
    table = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    return F.pad(table, (0, width - 2 * half)).float()


def t5_buckets(distances):
    """T5's causal buckets: half are one distance each, the others widen as the logarithm does."""
    exact = T5_BUCKETS // 2
    ratio = torch.log(distances.clamp(min=1).float() / exact) / math.log(T5_MAX_DISTANCE / exact)
    wide = (exact + (ratio * (T5_BUCKETS - exact)).long()).clamp(max=T5_BUCKETS - 1)
    return torch.where(distances < exact, distances, wide)


def rotate(states_BNQH, positions_BQ):
    """Rotary embedding over the whole head, first half against second, base 10000."""
    width = states_BNQH.size(-1)
    # Angles in fp64: in fp32 they are off by 1e-3 rad at position 16,384.
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=states_BNQH.device) / width
    angles = positions_BQ.double()[:, None, :, None] * 10000.0**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    cosines, sines = angles.cos().float(), angles.sin().float()
    first, second = states_BNQH.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (states_BNQH.float() * cosines + turned * sines).to(states_BNQH.dtype)


def make_norm(config):
    if config.normalization == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon, bias=config.bias)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.is_rotary = config.position == "rotary"
        width = (self.heads + 2 * self.groups) * self.head_dim
        self.linear_qkv = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.linear_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden_BQD, bias_BNQK, positions_BQ, cache):
        batch, queries, _ = hidden_BQD.shape
        # Each group's queries, then its key, then its value.
        fused = self.linear_qkv(hidden_BQD).view(batch, queries, self.groups, -1, self.head_dim)
        query = fused[:, :, :, :-2].reshape(batch, queries, self.heads, self.head_dim)
        query, key, value = (
            part.transpose(1, 2) for part in (query, fused[:, :, :, -2], fused[:, :, :, -1])
        )
        if self.is_rotary:
            query, key = rotate(query, positions_BQ), rotate(key, positions_BQ)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        repeats = self.heads // self.groups
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        # The bias stays fp32: bf16 rounds distances past 256.
        scores_BNQK = (query @ key.transpose(-1, -2)).float() / math.sqrt(self.head_dim)
        weights_BNQK = torch.softmax(scores_BNQK + bias_BNQK, dim=-1).to(value.dtype)
        context_BQD = (weights_BNQK @ value).transpose(1, 2).reshape(batch, queries, -1)
        return self.linear_proj(context_BQD)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, ffn, bias = config.hidden_size, config.intermediate_size, config.bias
        self.activation = config.activation
        if self.activation == "swiglu":
            self.linear_fc1 = nn.ModuleDict(
                {half: nn.Linear(hidden, ffn, bias=bias) for half in ("gate", "up")}
            )
        else:
            self.linear_fc1 = nn.Linear(hidden, ffn, bias=bias)
        self.linear_fc2 = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, hidden_BQD):
        if self.activation == "swiglu":
            inner = F.silu(self.linear_fc1["gate"](hidden_BQD)) * self.linear_fc1["up"](hidden_BQD)
        else:
            inner = ACTIVATIONS[self.activation](self.linear_fc1(hidden_BQD))
        return self.linear_fc2(inner)


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attention = Attention(config, layer)
        self.pre_mlp_layernorm = make_norm(config)
        self.mlp = FeedForward(config)

    def forward(self, hidden_BQD, bias_BNQK, positions_BQ, cache):
        normed = self.input_layernorm(hidden_BQD)
        hidden_BQD = hidden_BQD + self.self_attention(normed, bias_BNQK, positions_BQ, cache)
        return hidden_BQD + self.mlp(self.pre_mlp_layernorm(hidden_BQD))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(
            [Layer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.final_layernorm = make_norm(config)


class DistributedLMForCausalLM(PreTrainedModel, GenerationMixin):
    """Tensors have the names of distributed_lm's checkpoints. A tied output projection is the
    embedding itself, not a second tensor."""

    config_class = DistributedLMConfig
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = Decoder(config)
        if not config.tie_word_embeddings:
            self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        tables = {
            "learned": (config.max_position_embeddings, config.hidden_size),
            "t5": (config.num_attention_heads, T5_BUCKETS),
        }
        if config.position in tables:
            table = nn.Parameter(torch.zeros(tables[config.position]))
            self.position = nn.ParameterDict({"table": table})
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def get_output_embeddings(self):
        return None if self.config.tie_word_embeddings else self.output_layer

    def set_output_embeddings(self, new_embeddings):
        self.output_layer = new_embeddings

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        return_dict=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """``attention_mask`` is [B, K] with zeros for padding, on either side, or None."""
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        queries = hidden.size(1)
        if attention_mask is not None:
            attention_mask = attention_mask[:, : past + queries]
        if position_ids is None:
            position_ids = self._positions(attention_mask, past, queries, hidden.device)
        hidden = self._embed(hidden, position_ids)
        bias = self._bias(attention_mask, past, queries, hidden.device)
        for layer in self.decoder.layers:
            hidden = layer(hidden, bias, position_ids, past_key_values)
        hidden = self.decoder.final_layernorm(hidden)
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        tied = self.config.tie_word_embeddings
        logits = F.linear(hidden, (self.embedding if tied else self.output_layer).weight)
        loss = None
        if labels is not None:
            targets = labels[:, 1:].reshape(-1).to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)
        if return_dict is False:
            outputs = (loss, logits, past_key_values if use_cache else None)
            return tuple(value for value in outputs if value is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _positions(self, attention_mask, past, queries, device):
        """[B, Q]: each sequence's first token that is not padding is at position 0."""
        if attention_mask is None:
            return torch.arange(past, past + queries, device=device)[None]
        counted = attention_mask.long().cumsum(-1) - 1
        return counted.clamp(min=0)[:, past : past + queries]

    def _embed(self, hidden_BQD, positions_BQ):
        if self.config.position == "sinusoidal":
            scaled = hidden_BQD * math.sqrt(self.config.hidden_size)
            return scaled + sinusoidal(positions_BQ, hidden_BQD.size(-1)).to(scaled.dtype)
        if self.config.position == "learned":
            return hidden_BQD + self.position["table"][positions_BQ]
        return hidden_BQD

    def _bias(self, attention_mask, past, queries, device):
        """[B or 1, N or 1, Q, K] fp32: the position method's bias, the causal mask, the padding.

        Relative, so padding on the left changes nothing. The mask is the lowest number, not
        -inf, so that the rows of padding itself stay finite.
        """
        keys = torch.arange(past + queries, device=device)
        distance_QK = torch.arange(past, past + queries, device=device)[:, None] - keys[None]
        bias = torch.zeros(1, 1, *distance_QK.shape, device=device)
        if self.config.position == "alibi":
            slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads), device=device)
            bias = -slopes[None, :, None, None] * distance_QK.float()
        elif self.config.position == "t5":
            buckets_QK = t5_buckets(distance_QK.clamp(min=0).cpu()).to(device)
            bias = self.position["table"].float()[:, buckets_QK][None]
        hidden = (distance_QK < 0)[None, None]
        if attention_mask is not None:
            hidden = hidden | (attention_mask == 0)[:, None, None, :].to(device)
        return bias.masked_fill(hidden, torch.finfo(torch.float32).min)
