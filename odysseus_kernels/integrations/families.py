"""Model families: where their parts are.  A family is one row; nothing else in the package knows these names."""

from __future__ import annotations

import dataclasses
from typing import Literal

from odysseus_kernels.nn.mlp import MLPSpec

__all__ = ["FAMILIES", "AttentionNames", "ExpertNames", "Family"]

_GATED = MLPSpec(gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn")


@dataclasses.dataclass(frozen=True)
class AttentionNames:
    """Names within a family's attention module.

    Attributes:
        query, key, value, output: the projections.
        rotary: function of the modeling module that rotates queries and keys.
        eager: attention function of the modeling module that serves ``attn_implementation="eager"``.
        query_norm, key_norm: norms over the width of a head, or None.
        window: which layers have the configuration's sliding window: none, all (where it is set), or those that its
            ``layer_types`` name.
        output_dropout: attribute with the probability of a dropout after the output projection, or None.
    """

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    rotary: str = "apply_rotary_pos_emb"
    eager: str = "eager_attention_forward"
    query_norm: str | None = None
    key_norm: str | None = None
    window: Literal["none", "config", "layer_types"] = "none"
    output_dropout: str | None = None


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """Names within a mixture of experts.

    Attributes:
        block_class: class of the feed-forward module that holds router and experts.
        router: attribute of the block with the router.
        router_class: its class.
        experts: attribute of the block with the experts.
        experts_class: its class, with the parameters ``gate_up_proj`` and ``down_proj`` of all experts.
        count: name of the number of experts in the configuration.
    """

    block_class: str
    router_class: str
    experts_class: str
    count: str
    router: str = "gate"
    experts: str = "experts"


@dataclasses.dataclass(frozen=True)
class Family:
    """Where the parts of a causal language model are.

    Attributes:
        modeling: module of transformers that defines the family.
        causal_model: class of the model with a head; its base model is found through ``base_model_prefix``.
        attention_class: class of the attention modules.
        mlp_class: class of the feed-forward modules, or None where all are mixtures of experts.
        layers: attribute of the base model with the decoder layers.
        attention: attribute of a decoder layer with its attention.
        mlp: attribute of a decoder layer with its feed-forward network.
        norms: attributes of a decoder layer with its norms.
        final_norm: attribute of the base model with the norm after the last layer.
        attention_names: names within the attention.
        mlp_names: names within the feed-forward network.
        expert_names: names within a mixture of experts, or None.
    """

    modeling: str
    causal_model: str
    attention_class: str
    mlp_class: str | None
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: str = "norm"
    attention_names: AttentionNames = AttentionNames()
    mlp_names: MLPSpec = _GATED
    expert_names: ExpertNames | None = None


_HEAD_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}

FAMILIES: tuple[Family, ...] = (
    Family("transformers.models.llama.modeling_llama", "LlamaForCausalLM", "LlamaAttention", "LlamaMLP"),
    Family(
        "transformers.models.mistral.modeling_mistral",
        "MistralForCausalLM",
        "MistralAttention",
        "MistralMLP",
        attention_names=AttentionNames(window="config"),
    ),
    Family(
        "transformers.models.qwen2.modeling_qwen2",
        "Qwen2ForCausalLM",
        "Qwen2Attention",
        "Qwen2MLP",
        attention_names=AttentionNames(window="layer_types"),
    ),
    Family(
        "transformers.models.qwen3.modeling_qwen3",
        "Qwen3ForCausalLM",
        "Qwen3Attention",
        "Qwen3MLP",
        attention_names=AttentionNames(window="layer_types", **_HEAD_NORMS),
    ),
    Family(
        "transformers.models.starcoder2.modeling_starcoder2",
        "Starcoder2ForCausalLM",
        "Starcoder2Attention",
        "Starcoder2MLP",
        attention_names=AttentionNames(window="config", output_dropout="residual_dropout"),
        mlp_names=MLPSpec(gate=None, up="c_fc", down="c_proj", activation="act", dropout="residual_dropout"),
    ),
    Family(
        "transformers.models.mixtral.modeling_mixtral",
        "MixtralForCausalLM",
        "MixtralAttention",
        None,
        attention_names=AttentionNames(window="config"),
        expert_names=ExpertNames(
            "MixtralSparseMoeBlock", "MixtralTopKRouter", "MixtralExperts", count="num_local_experts"
        ),
    ),
    Family(
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeAttention",
        "Qwen3MoeMLP",
        attention_names=AttentionNames(window="config", **_HEAD_NORMS),
        expert_names=ExpertNames(
            "Qwen3MoeSparseMoeBlock", "Qwen3MoeTopKRouter", "Qwen3MoeExperts", count="num_experts"
        ),
    ),
)
