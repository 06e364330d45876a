"""From a run's config to this rank's stages of the decoder, assembled from Megatron-core's blocks.

Shapes: S sequence, B batch, D hidden, V vocabulary of this tensor-parallel rank.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from distributed_lm import platform
from distributed_lm.config import ModelConfig, RunConfig
from distributed_lm.layout import pipeline_layout
from distributed_lm.model.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from distributed_lm.model.backend_choice import choose_backend
from distributed_lm.model.compilation import compile_stages, wants_compilation
from distributed_lm.model.core_attention import CoreAttention
from distributed_lm.model.dropout import RowParallelLinear, replicated_dropout
from distributed_lm.model.loss import OutputLayer, TokenLosses
from distributed_lm.model.norms import NORMS
from distributed_lm.model.positions import HeadSlice, PositionMethod, build_position
from distributed_lm.model.positions.lending import LentPosition
from distributed_lm.process_groups import ProcessGroups

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
}


class GPTStage(MegatronModule):
    """One pipeline stage: embedding (first), decoder layers, output projection and loss (last)."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        vocab_size: int,
        block: TransformerBlockSubmodules,
        position: LentPosition,
        groups: ProcessGroups,
        vp_stage: int | None,
        pre_process: bool,
        post_process: bool,
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = vp_stage
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = model.tie_embeddings
        self.position = position.owner
        self.lent_position = position  # no submodule: its weights are the owner's
        self.tensor_rank = groups.coordinates.tensor
        self.is_adaptive = model.adaptive is not None
        # fairseq scales the word embeddings of every position method's model, the paper's too.
        self.embedding_scale = (
            math.sqrt(model.hidden_size) if self.is_adaptive else self.position.embedding_scale
        )
        self.embedding: Any = None
        self.output_layer: Any = None
        if pre_process and self.is_adaptive:
            self.embedding = AdaptiveEmbedding(config, model, vocab_size, groups)
        elif pre_process:
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                vocab_size,
                model.hidden_size,
                init_method=config.init_method,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
                tp_group=groups.tensor,
            )
        self.decoder = TransformerBlock(
            config,
            block,
            pre_process=pre_process,
            post_process=post_process,
            post_layer_norm=model.final_norm,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        if post_process and self.is_adaptive:
            tied = self.embedding if pre_process else None
            self.output_layer = AdaptiveSoftmax(config, model, vocab_size, groups, tied)
        elif post_process:
            self.output_layer = OutputLayer(
                model.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=model.tie_embeddings and pre_process,
                tp_group=groups.tensor,
            )

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by Megatron's schedule with what came from the previous stage."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(tensors[0])

    def tied_weights(self) -> list[Any]:
        """What the first and the last stage both hold, in the same order on each."""
        if not self.share_embeddings_and_output_weights:
            return []
        if isinstance(self.embedding, AdaptiveEmbedding):
            return self.embedding.tied_weights()
        if isinstance(self.output_layer, AdaptiveSoftmax):
            return self.output_layer.tables.tied_weights()
        weight = self.shared_embedding_or_output_weight()
        return [] if weight is None else [weight]

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight as this stage holds it, if it does and there is one alone."""
        if self.is_adaptive:
            return None
        if self.pre_process:
            return self.embedding.weight
        return self.output_layer.weight if self.post_process else None

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        mask_BS: Tensor | None = None,
    ) -> Tensor | TokenLosses:
        """Hidden states [S, B, D] (not the last stage), losses (last stage with labels), or this
        rank's logits [S, B, V] (last stage without; an adaptive softmax gives the log probabilities
        of the whole vocabulary)."""
        hidden = self._embed(tokens_BS) if self.pre_process else self.decoder.input_tensor
        hidden = self.lent_position.lend(hidden)
        if not self.pre_process:  # then the decoder takes it from there only
            self.decoder.set_input_tensor(hidden)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None)
        if not self.post_process:
            return hidden
        if self.is_adaptive:
            return self.output_layer(hidden, labels_BS, mask_BS)
        tied = self.share_embeddings_and_output_weights and self.pre_process
        weight = self.embedding.weight if tied else None
        return self.output_layer(hidden, labels_BS, mask_BS, weight=weight)

    def _embed(self, tokens_BS: Tensor) -> Tensor:
        """[S, B, D], or with sequence parallelism this rank's slice of S."""
        hidden = self.embedding(tokens_BS)
        first_position = 0
        if self.config.sequence_parallel:  # Megatron has transposed it already
            first_position = self.tensor_rank * hidden.size(0)
        else:
            hidden = hidden.transpose(0, 1).contiguous()
        if self.embedding_scale != 1.0:
            hidden = hidden * self.embedding_scale
        hidden = self.position.embed(hidden, first_position)
        return replicated_dropout(hidden, self.config.hidden_dropout, self.training, self.config)


def build_stages(config: RunConfig, vocab_size: int, groups: ProcessGroups) -> list[GPTStage]:
    """This rank's model chunks, uninitialised: one, or one per virtual pipeline stage.

    Args:
        vocab_size: rows of the embedding over all tensor-parallel ranks.

    Raises:
        ConfigError: if the position method or the attention backend cannot be used.
    """
    heads = HeadSlice.of(
        config.model.num_attention_heads, groups.coordinates.tensor, groups.layout.tensor
    )
    position = build_position(config.model, heads)
    if position.embeds_only and groups.coordinates.pipeline > 0:
        position.drop_weights()
    lent = LentPosition(position, groups.device)
    dtype = platform.DTYPES[config.precision]
    backend = choose_backend(
        config.attention.backend, position, groups.device, dtype, config.model.dropout.attention
    )
    transformer = transformer_config(config)
    layer = _layer_spec(config, lent.copy, backend)
    norm = NORMS[config.model.normalization]
    chunks = groups.layout.virtual_pipeline
    stages = []
    for chunk in range(chunks):
        vp_stage = chunk if chunks > 1 else None
        count = get_num_layers_to_build(transformer, vp_stage, groups.coordinates.pipeline)
        last_pipeline = groups.coordinates.pipeline == groups.layout.pipeline - 1
        stages.append(
            GPTStage(
                transformer,
                config.model,
                vocab_size,
                TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm),
                lent,
                groups,
                vp_stage,
                pre_process=groups.coordinates.pipeline == 0 and chunk == 0,
                post_process=last_pipeline and chunk == chunks - 1,
            )
        )
    stages = [stage.to(device=groups.device, dtype=dtype) for stage in stages]
    if wants_compilation(config, groups.device):
        compile_stages(stages, is_asked_for=config.train.compile is True)
    return stages


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Megatron's view of the run. Megatron-core 0.16 to 0.19 take the same fields here."""
    model, parallel = config.model, config.parallel
    dtype = platform.DTYPES[config.precision]
    stages = parallel.pipeline * parallel.virtual_pipeline
    recompute_choices: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.key_value_heads,
        ffn_hidden_size=model.ffn_size,
        activation_func=ACTIVATIONS[model.activation],
        gated_linear_unit=model.activation == "swiglu",
        add_bias_linear=model.bias,
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=model.dropout.hidden,
        attention_dropout=model.dropout.attention,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        pipeline_model_parallel_layout=pipeline_layout(model.num_layers, stages),
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        # Weights are ours to initialise, by global name: see parameters.py.
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        # Batched, gloo confuses the two neighbours of an interleaved PP=2 (they are one rank), and
        # Megatron-LM itself refuses that combination on NCCL.
        batch_p2p_comm=False,
        **recompute_choices[config.train.recompute],
    )


def _layer_spec(config: RunConfig, position: PositionMethod, backend: str) -> ModuleSpec:
    """One pre-norm decoder layer; Megatron builds it once per layer of the stage."""
    norm = NORMS[config.model.normalization]
    attention = SelfAttentionSubmodules(
        linear_qkv=tensor_parallel.ColumnParallelLinear,
        core_attention=functools.partial(
            CoreAttention,
            position=position,
            backend=backend,
            dropout=config.model.dropout.attention,
        ),
        linear_proj=RowParallelLinear,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=tensor_parallel.ColumnParallelLinear,
                    linear_fc2=ModuleSpec(
                        module=RowParallelLinear,
                        params={"dropout": config.model.dropout.activation},
                    ),
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
