"""Model families: where their parts are.  A family is one row; nothing else in the package knows these names."""

from __future__ import annotations

import dataclasses

from odysseus_kernels.nn.mlp import MLPSpec

__all__ = ["FAMILIES", "AttentionNames", "Family"]

_GATED = MLPSpec(gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn")


@dataclasses.dataclass(frozen=True)
class AttentionNames:
    """Names within a family's attention module.

    Attributes:
        query, key, value, output: the projections.
        rotary: function of the modeling module that rotates queries and keys.
        eager: attention function of the modeling module that serves ``attn_implementation="eager"``.
    """

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    rotary: str = "apply_rotary_pos_emb"
    eager: str = "eager_attention_forward"


@dataclasses.dataclass(frozen=True)
class Family:
    """Where the parts of a causal language model are.

    Attributes:
        modeling: module of transformers that defines the family.
        causal_model: class of the model with a head; its base model is found through ``base_model_prefix``.
        attention_class: class of the attention modules.
        mlp_class: class of the feed-forward modules.
        layers: attribute of the base model with the decoder layers.
        attention: attribute of a decoder layer with its attention.
        mlp: attribute of a decoder layer with its feed-forward network.
        norms: attributes of a decoder layer with its norms.
        final_norm: attribute of the base model with the norm after the last layer.
        attention_names: names within the attention.
        mlp_names: names within the feed-forward network.
    """

    modeling: str
    causal_model: str
    attention_class: str
    mlp_class: str
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: str = "norm"
    attention_names: AttentionNames = AttentionNames()
    mlp_names: MLPSpec = _GATED


FAMILIES: tuple[Family, ...] = (
    Family("transformers.models.llama.modeling_llama", "LlamaForCausalLM", "LlamaAttention", "LlamaMLP"),
)
