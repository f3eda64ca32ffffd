"""Sizes of a model, from a configuration of transformers, read as plain JSON, or from a bundled one by name."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from odysseus_kernels.planner.formulas import LayerShape

__all__ = ["ModelSizes", "bundled_models", "model_sizes"]

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "starcoder2", "mixtral", "qwen3_moe")
_HEAD_NORMS = ("qwen3", "qwen3_moe")


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What a prediction needs of a causal language model.

    Attributes:
        name: for tables.
        layer: of one decoder layer; with experts, ``intermediate`` is one expert's.
        layers: decoder layers.
        vocabulary: rows of embedding and head.
        tied: whether the head's weight is the embedding's.
        window: tokens that a query sees, where all layers have a sliding window; else None.
        experts: experts of each layer; 0 for a dense model.
        used_experts: those of a token.
    """

    name: str
    layer: LayerShape
    layers: int
    vocabulary: int
    tied: bool = False
    window: int | None = None
    experts: int = 0
    used_experts: int = 0

    @property
    def attention_parameters(self) -> int:
        """Weights of the four projections of one layer."""
        shape = self.layer
        return 2 * shape.hidden * (shape.query + shape.key_value)

    @property
    def feed_forward_parameters(self) -> int:
        """Weights of the feed-forward network of one layer, all experts included."""
        shape = self.layer
        return (shape.inner + 1) * shape.hidden * shape.intermediate * max(1, self.experts)

    @property
    def parameters(self) -> int:
        """All weights; biases, norms and routers, a thousandth of the rest, are left out."""
        ends = self.vocabulary * self.layer.hidden * (1 if self.tied else 2)
        return self.layers * (self.attention_parameters + self.feed_forward_parameters) + ends


@functools.cache
def bundled_models() -> Mapping[str, Mapping[str, Any]]:
    """Configurations by name, each with its source."""
    file = importlib.resources.files("odysseus_kernels.planner.planning") / "models.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def model_sizes(model: Any) -> ModelSizes:
    """Sizes of ``model``.

    Args:
        model: a bundled name; the path of a ``config.json``, or of the folder that holds it; its contents as a
            dictionary; or an object with ``to_dict()``, as configurations of transformers have.

    Raises:
        ValueError: for an unknown name, a file that is no configuration, a family that the package does not
            parallelize, or sizes that are missing or not positive.
    """
    if isinstance(model, ModelSizes):
        return model
    if isinstance(model, Mapping):
        return _read(model, str(model.get("_name_or_path") or model.get("model_type") or "model"))
    if hasattr(model, "to_dict"):
        return _read(model.to_dict(), type(model).__name__)
    if not isinstance(model, (str, Path)):
        raise ValueError(
            f"model: expected a name, the path of a config.json, a dictionary or a configuration, got "
            f"{type(model).__name__}"
        )
    known = bundled_models()
    if str(model).lower() in known:
        return _read(known[str(model).lower()], str(model).lower())
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(f"model: expected one of {', '.join(known)}, or the path of a config.json, got {str(model)!r}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a configuration in JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected a JSON object with a model's configuration, got {type(document).__name__}")
    return _read(document, path.parent.name or path.name)


def _read(config: Mapping[str, Any], name: str) -> ModelSizes:
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"{name}: expected a model_type among {', '.join(_FAMILIES)}, got {family!r}")

    def size(key: str, default: Any = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected {key}, a whole number above 0, got {value!r}")
        return value

    experts = 0
    if family in ("mixtral", "qwen3_moe"):
        experts = size("num_local_experts" if family == "mixtral" else "num_experts", config.get("num_local_experts"))
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    starcoder2 = family == "starcoder2"
    biased = starcoder2 and config.get("use_bias", True)
    layer = LayerShape(
        hidden=hidden,
        intermediate=size("moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        gated=not starcoder2,
        qkv_bias=biased or family == "qwen2" or bool(config.get("attention_bias", False)),
        out_bias=biased or bool(config.get("attention_bias", False)),
        mlp_bias=biased or bool(config.get("mlp_bias", False)),
        norm_bias=starcoder2,
        qk_norm=family in _HEAD_NORMS,
    )
    windowed = config.get("sliding_window") and config.get("use_sliding_window", not family.startswith("qwen"))
    kinds = config.get("layer_types")
    if kinds and any(kind != "sliding_attention" for kind in kinds):
        windowed = False  # layers that see all of the sequence take the time
    return ModelSizes(
        name=name,
        layer=layer,
        layers=size("num_hidden_layers"),
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", starcoder2)),  # transformers' default of the family
        window=size("sliding_window") if windowed else None,
        experts=experts,
        used_experts=size("num_experts_per_tok", 2) if experts else 0,
    )
