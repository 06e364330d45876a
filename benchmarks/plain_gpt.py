"""A decoder in plain torch, as one writes it in an afternoon: what the engines have to beat."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_lm.config import ModelConfig
from distributed_lm.model.alibi import alibi_slopes


class PlainLayer(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        hidden, heads = model.hidden_size, model.num_attention_heads
        self.heads = heads
        self.norm_1 = nn.LayerNorm(hidden, bias=False)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.projection = nn.Linear(hidden, hidden, bias=False)
        self.norm_2 = nn.LayerNorm(hidden, bias=False)
        self.up = nn.Linear(hidden, model.ffn_size, bias=False)
        self.down = nn.Linear(model.ffn_size, hidden, bias=False)

    def forward(self, hidden_BSD: Tensor, bias_1NSS: Tensor) -> Tensor:
        batch, length, width = hidden_BSD.shape
        qkv = self.qkv(self.norm_1(hidden_BSD)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_1NSS)
        context = context.transpose(1, 2).reshape(batch, length, width)
        hidden_BSD = hidden_BSD + self.projection(context)
        return hidden_BSD + self.down(F.gelu(self.up(self.norm_2(hidden_BSD))))


class PlainGPT(nn.Module):
    """Pre-norm, no biases, exact GELU, tied embedding: transformers' MPT, with fused attention."""

    bias_1NSS: Tensor

    def __init__(self, model: ModelConfig, vocab_size: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(model) for _ in range(model.num_layers))
        self.norm = nn.LayerNorm(model.hidden_size, bias=False)
        positions = torch.arange(length)
        distances = (positions[:, None] - positions[None, :]).float()
        slopes = torch.tensor(alibi_slopes(model.num_attention_heads))
        bias = -slopes[:, None, None] * distances
        bias = bias.masked_fill(distances < 0, float("-inf"))
        self.register_buffer("bias_1NSS", bias[None], persistent=False)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Mean loss in nats."""
        hidden = self.embedding(tokens_BS)
        for layer in self.layers:
            hidden = layer(hidden, self.bias_1NSS)
        logits = self.norm(hidden) @ self.embedding.weight.T
        return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), labels_BS.view(-1))
