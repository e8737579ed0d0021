"""ChatGLM-6B in one file: what a layer computes, the model, and generation.

Source: THUDM/chatglm-6b, modeling_chatglm.py (revision 8b7d335); Du et al., GLM, arXiv:2103.10360.
Shapes: hidden states are `(batch, seq, hidden)`, queries, keys and values `(batch, heads, seq, head_dim)`.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatglm_tuning.kernels import gelu
from chatglm_tuning.model.configuration import ChatGLMConfig
from chatglm_tuning.model.frozen_linear import FrozenLinear
from chatglm_tuning.model.loss import summed_cross_entropy
from chatglm_tuning.model.masks import build_position_ids, build_prefix_lm_mask
from chatglm_tuning.model.padding_free import PackedBatch, SharedPrefix, is_blockwise, pack_batch, packed_attention
from chatglm_tuning.model.prefix import PrefixEncoder
from chatglm_tuning.model.rotary import rotary_angles, rotate
from chatglm_tuning.quantization.decode import few_rows_of_head
from chatglm_tuning.quantization.linear import QuantizedLinear

_MASKED_SCORE = -10000.0
IGNORED_LABEL = -100


def _make_linear(config: ChatGLMConfig, in_features: int, out_features: int) -> nn.Module:
    if config.quantization_bit:
        return QuantizedLinear(in_features, out_features, config.quantization_bit)
    return FrozenLinear(in_features, out_features)


def eager_attention(
    module: "ChatGLMAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as the released model computes it; returns the context `(batch, seq, heads, head_dim)` and the weights.

    Scores are divided by the layer's number before the product and multiplied back in fp32: exact, but for fp16,
    where it prevents an overflow. Where `attention_mask` (bool, True = may be seen) is False a score is −10000, so a
    row that sees nothing is uniform.
    """
    guard = module.layer_index + 1.0
    scores = (query / (math.sqrt(module.head_dim) * guard)) @ key.transpose(-1, -2)  # (batch, heads, query, key)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, _MASKED_SCORE)
    weights = functional.softmax(scores.float() * guard, dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class ChatGLMAttention(nn.Module):
    """Self-attention with a fused `query_key_value`, laid out per head as query, key, value."""

    is_causal = False  # sdpa would add a causal mask of its own where it is given none

    def __init__(self, config: ChatGLMConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.scaling = 1 / math.sqrt(config.head_dim)
        self.query_key_value = _make_linear(config, config.hidden_size, 3 * config.hidden_size)
        self.dense = _make_linear(config, config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        *,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        past_key_values: Cache | None,
        packed: PackedBatch | None,
    ) -> tuple[Tensor, Tensor | None]:
        batch, seq, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(batch, seq, self.heads, 3 * self.head_dim)
        if packed is not None:
            context = self._attend_packed(fused, prefix_key, prefix_value, attention_mask, rotary, packed)
            return self.dense(context), None
        query, key, value = fused.chunk(3, dim=-1)
        query = rotate(query, *rotary).transpose(1, 2)
        key = rotate(key, *rotary).transpose(1, 2)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_index)
        if prefix_key is not None and prefix_value is not None:
            key = torch.cat([prefix_key, key], dim=2)
            value = torch.cat([prefix_value, value], dim=2)
        context, weights = self._attend(query, key, value, attention_mask)
        return self.dense(context.reshape(batch, seq, -1)), weights

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        return attend(self, query, key, value, mask, scaling=self.scaling)

    def _attend_packed(
        self,
        fused: Tensor,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        packed: PackedBatch,
    ) -> Tensor:
        """Attention of a packed row `(1, tokens, heads, 3 · head_dim)`; only here it may be padded again."""
        prefix = None
        if prefix_key is not None and prefix_value is not None:
            prefix = SharedPrefix(prefix_key, prefix_value, self.config.prefix_dropout if self.training else 0.0)
        if is_blockwise(fused):
            return packed_attention(fused, rotary, prefix, packed)
        query, key, value = fused.chunk(3, dim=-1)
        states = [rotate(query, *rotary), rotate(key, *rotary), value]
        query, key, value = (packed.unpack(part).transpose(1, 2) for part in states)
        if prefix is not None:
            key, value = (
                torch.cat([part.to(own.dtype).transpose(0, 1).expand(len(own), -1, -1, -1), own], dim=2)
                for part, own in zip(prefix.with_dropout(), (key, value), strict=True)
            )
        context, _ = self._attend(query, key, value, attention_mask)
        return packed.pack(context.flatten(2))


class ChatGLMMLP(nn.Module):
    """Two linears around a tanh-form GELU, without a gate."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.dense_h_to_4h = _make_linear(config, config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = _make_linear(config, config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.dense_h_to_4h(hidden_states)
        if self.config._attn_implementation == "eager":
            return self.dense_4h_to_h(_gelu_step_by_step(inner))
        return self.dense_4h_to_h(gelu(inner))


def _gelu_step_by_step(x: Tensor) -> Tensor:
    # The released code's order of operations: with eager attention, fp16 equals it bit for bit.
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))


class ChatGLMBlock(GradientCheckpointingLayer):
    """One layer; both residuals are the normalised inputs, scaled by `config.residual_scale`."""

    def __init__(self, config: ChatGLMConfig, layer_index: int) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_index)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)
        self.recomputes_mlp = False

    def forward(
        self,
        hidden_states: Tensor,
        prefix_key: Tensor | None = None,
        prefix_value: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        packed: PackedBatch | None = None,
    ) -> Tensor:
        """Map hidden states to hidden states.

        prefix_key and prefix_value: `(batch, heads, prefix, head_dim)`, or for a packed row, whose samples share them,
            `(prefix, heads, head_dim)`, before dropout.
        Tensors that may need a gradient are positional: reentrant checkpointing follows no others.
        """
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.attention(
            normed,
            prefix_key,
            prefix_value,
            attention_mask=attention_mask,
            rotary=rotary,
            past_key_values=past_key_values,
            packed=packed,
        )
        hidden_states = normed * self.residual_scale + attended
        if self.recomputes_mlp and self.training and torch.is_grad_enabled():
            # From the hidden states on, which LayerNorm keeps anyway, to the input of the activation, which is the
            # largest tensor of a layer; the product after it keeps nothing, so that it is not repeated.
            return checkpoint(self._second_half, hidden_states, use_reentrant=False)
        return self._second_half(hidden_states)

    def _second_half(self, hidden_states: Tensor) -> Tensor:
        normed = self.post_attention_layernorm(hidden_states)
        return normed * self.residual_scale + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers must know of the architecture."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False  # its path ignores mask functions: prefix-LM would silently become causal
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # stored, never used: recomputed

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers recompute their activations; peft 0.21 asks under this name, which transformers deprecated."""
        return self.is_activation_checkpointing

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            std = 1.0 if isinstance(module, nn.Embedding) and self._is_prefix(module) else 0.02
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def _is_prefix(self, module: nn.Module) -> bool:
        # The released model leaves the prefix at torch's own N(0, 1).
        encoder = getattr(self, "prefix_encoder", None) or getattr(self.base_model, "prefix_encoder", None)
        return encoder is not None and module is encoder.embedding


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embeddings, layers and the final LayerNorm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, index) for index in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.prefix_encoder = PrefixEncoder(config) if config.pre_seq_len is not None else None
        self.gradient_checkpointing = False
        self.is_padding_free = True
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Run the layers.

        input_ids: `(batch, seq)`, long; or inputs_embeds `(batch, seq, hidden)` with position_ids.
        attention_mask: `(batch, past + seq)`, 1 = a real token; or `(batch, 1, seq, past + seq)`, bool, True = may be
            seen, which replaces the prefix-LM mask; None = no padding. Prefix key/values are seen by every token.
        position_ids: `(batch, 2, seq)`, long; row 0 position, row 1 block position (0 in the prompt). Derived from
            input_ids where None, which needs whole sequences.
        While `is_padding_free` (and there is neither a cache nor a mask of four dimensions), padding is not computed.
        Returns the states after the final LayerNorm; where padding was left out, they are 0 there.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and only one of them")
        hidden_states = inputs_embeds if inputs_embeds is not None else self.word_embeddings(input_ids)
        batch = len(hidden_states)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = self.build_position_ids(None if past_length else input_ids, attention_mask)
        mask = attention_mask
        if mask is None or mask.dim() == 2:
            mask = build_prefix_lm_mask(position_ids, attention_mask, past_length)
        packed = None if past_key_values is not None else self._pack(position_ids, attention_mask)
        if packed is not None:
            hidden_states = packed.pack(hidden_states)
            position_ids = packed.pack(position_ids.transpose(1, 2)).transpose(1, 2)
        prefix = self._prefix(batch, hidden_states.dtype, is_shared=packed is not None)
        if mask is not None and self.prefix_encoder is not None:
            mask = functional.pad(mask, (self.config.pre_seq_len, 0), value=True)
        rotary = rotary_angles(position_ids, self.config.head_dim, hidden_states.dtype)
        keywords = {"attention_mask": mask, "rotary": rotary, "past_key_values": past_key_values, "packed": packed}
        all_hidden_states = [hidden_states]
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, prefix[2 * index], prefix[2 * index + 1], **keywords)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
        all_hidden_states[-1] = self.final_layernorm(hidden_states)
        if packed is not None:
            all_hidden_states = [packed.unpack(states) for states in all_hidden_states]
        return BaseModelOutputWithPast(
            last_hidden_state=all_hidden_states[-1],
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )

    def _prefix(self, batch: int, dtype: torch.dtype, *, is_shared: bool) -> Sequence[Tensor | None]:
        """Return the key and the value of every layer's prefix in turn, once for all samples or for each; or Nones."""
        if self.prefix_encoder is None:
            return [None] * (2 * len(self.layers))
        return self.prefix_encoder.shared() if is_shared else self.prefix_encoder(batch, dtype)

    def _pack(self, position_ids: Tensor, attention_mask: Tensor | None) -> PackedBatch | None:
        """Return how to leave out the padding; None where that is switched off or cannot be.

        Eager attention, which repeats the released model bit for bit, keeps its padding.
        """
        is_given = attention_mask is not None and attention_mask.dim() != 2
        if is_given or not self.is_padding_free or self.config._attn_implementation in (None, "eager"):
            return None
        return pack_batch(position_ids, attention_mask)

    def build_position_ids(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Return the two rows of position ids of whole sequences; see `masks.build_position_ids`."""
        if input_ids is None:
            raise ValueError("position_ids can only be derived from the input_ids of whole sequences")
        return build_position_ids(
            input_ids,
            attention_mask if attention_mask is None or attention_mask.dim() == 2 else None,
            bos_token_id=self.config.bos_token_id,
            gmask_token_id=self.config.gmask_token_id,
            mask_token_id=self.config.mask_token_id,
        )


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its language-model head, tied to the word embeddings unless the config says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_activation_checkpointing(self, mode: Literal["off", "mlp", "on"]) -> None:
        """Choose what the backward pass recomputes: nothing, the inner states of every MLP, or all of every layer.

        off keeps 9 hidden sizes of numbers for each token and layer, mlp 5 and on 1.
        """
        for layer in self.transformer.layers:
            cast("ChatGLMBlock", layer).recomputes_mlp = mode == "mlp"
        if mode == "on":
            self.activation_checkpointing_enable({"use_reentrant": False})
        elif self.is_activation_checkpointing:
            self.activation_checkpointing_disable()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_logits: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        label_smoothing: float = 0.0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; the first arguments are `ChatGLMModel.forward`'s.

        labels: `(batch, seq)`, long, −100 = no loss; not shifted: position t predicts label t + 1.
        logits_to_keep: compute logits for that many last positions, 0 = all.
        return_logits: False leaves the logits out, so that with labels only the labelled positions meet the head.
        num_items_in_batch: what the summed loss is divided by; None = the labels counted here (their mean).
        label_smoothing: share of the target that is spread over the whole vocabulary.
        Returns the loss (fp32) where there are labels, and logits `(batch, seq, vocab)` in the model's dtype.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        hidden_states = outputs.last_hidden_state
        loss = None
        if labels is not None:
            total, count = self._summed_loss(hidden_states, labels, label_smoothing)
            loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        logits = self._logits(hidden_states[:, -logits_to_keep:]) if return_logits else None
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _logits(self, hidden_states: Tensor) -> Tensor:
        head = self.lm_head
        logits = few_rows_of_head(hidden_states, head.weight) if type(head) is nn.Linear else None
        # Of the last positions of several samples, which do not lie in one piece, torch would make a product for each
        # sample, and in bf16 on a CPU a copy of the head for each.
        return head(hidden_states.contiguous()) if logits is None else logits

    def _summed_loss(self, hidden_states: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
        targets = labels[:, 1:]
        labelled = targets != IGNORED_LABEL
        # A model spread over several devices has its head, tied to the embeddings, on the first: where the labels are.
        states = hidden_states[:, :-1].to(labels.device)[labelled]  # (labels, hidden)
        total = summed_cross_entropy(states, self.lm_head.get_parameter("weight"), targets[labelled], label_smoothing)
        return total, labelled.sum()

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        return self.transformer.build_position_ids(inputs_tensor, model_kwargs.get("attention_mask"))

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        # transformers takes three-dimensional position ids for (rows, batch, seq); ours are (batch, rows, seq).
        position_ids = model_kwargs.pop("position_ids", None)
        # The mixin wants attributes of every model it is mixed into, which the type checker cannot see here.
        expand: Any = super()._expand_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        input_ids, model_kwargs = expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        if position_ids is not None:
            model_kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=0)
        return input_ids, model_kwargs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        # A new token stays at the mask token's position; only its block position grows.
        position_ids = model_kwargs.pop("position_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        steps = torch.arange(1, num_new_tokens + 1, device=position_ids.device)
        new = position_ids[..., -1:].repeat(1, 1, num_new_tokens)
        new[:, 1] += steps
        model_kwargs["position_ids"] = torch.cat([position_ids, new], dim=-1)
        return model_kwargs
