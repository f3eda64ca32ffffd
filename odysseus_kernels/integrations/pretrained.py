"""Hugging Face directories of parallelized models: written and read one parameter at a time, never a whole model.

``save_pretrained`` collects each parameter on every rank, for as long as the first rank needs to take it over; that
rank holds at most one file's worth of parameters. ``load_pretrained`` reads on each rank the slices that it holds. Only
safetensors files are read and written; nothing is unpickled. Weights whose layout in files differs from that in the
model (merged experts) go through transformers' own conversions, parameter by parameter.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from odysseus_kernels.integrations.alike import note_loaded
from odysseus_kernels.integrations.checkpoint import join_names, model_tensors
from odysseus_kernels.integrations.peft import has_adapters, is_peft_model, load_adapter, save_adapters
from odysseus_kernels.integrations.saving import SavingRanks

__all__ = ["load_pretrained", "save_pretrained"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OF_A_SAVE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|model\.part\d+\.safetensors")


@torch.inference_mode(False)
@torch.no_grad()
def save_pretrained(
    model: PreTrainedModel, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes a directory that ``from_pretrained`` loads to the bit.  Every rank of the model's mesh calls it.

    For a stock model every rank of the default process group does.

    The directory has the stock configuration, generation configuration and weights in files of bounded size; tied
    weights are saved once. Other files in the folder, such as a tokenizer's, are left alone; earlier weights are
    replaced at the end.

    Of a PEFT model it writes PEFT's directory: the adapters and their configuration, which
    ``PeftModel.from_pretrained`` loads.

    Args:
        model: parallelized or stock, or a PEFT model around one.
        folder: made with its parents on the first rank, which alone writes.
        max_shard_bytes: size of a weights file, and memory that the first rank needs for it; a larger parameter gets
            a file of its own.

    Raises:
        ValueError: if ``folder`` is a file, or ``max_shard_bytes`` is not positive.
        CommunicationError: if ranks make other calls, save other tensors or elsewhere, or do not come within the
            ``timeout_s`` that the model was parallelized with.
        RuntimeError: on every rank but the first, if the first could not write; the first raises what went wrong.

    Example:
        >>> model = ody.parallelize(model, mesh)
        >>> ody.save_pretrained(model, folder / "export")
        >>> from transformers import AutoModelForCausalLM
        >>> type(AutoModelForCausalLM.from_pretrained(folder / "export")).__name__
        'LlamaForCausalLM'
    """
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"folder: expected a directory, got the file {target}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected bytes above 0, got {max_shard_bytes}")
    if is_peft_model(model):
        save_adapters(model, target)
        return
    if has_adapters(model):
        raise ValueError(
            "model: expected a PEFT model, whose adapters are saved, or one without adapters, got a model with "
            "adapters in it: give what get_peft_model returned, or merge them by merge_and_unload() first"
        )
    ignored = set(model._keys_to_ignore_on_save or ())
    ranks = SavingRanks(model)
    first = ranks.first
    ranks.come_together("save_pretrained", target.absolute(), model_tensors(model))
    files, failure = _Files(target, max_shard_bytes), None
    # Whatever goes wrong on the first rank is raised at the end: the others wait for its part in every gather.
    for name, tensor in model_tensors(model).items():
        if name in ignored:
            continue
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        if first and failure is None:
            try:
                files.add(revert_weight_conversion(model, {name: whole.cpu().contiguous()}))
            except Exception as error:  # noqa: BLE001
                failure = error
    if first and failure is None:
        try:
            files.finish(model)
        except Exception as error:  # noqa: BLE001
            failure = error
    failed = ranks.anywhere(failure is not None, "save_pretrained")
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"save_pretrained: the first rank could not write {target}; its error says why")


@torch.inference_mode(False)
@torch.no_grad()
def load_pretrained(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Loads a Hugging Face directory into a model that may be parallelized already; nothing is sent.

    Each rank reads the slices of its parameters. Values are converted to the model's dtype, as ``from_pretrained``
    with that dtype does.  Of a PEFT model it loads the active adapter, from PEFT's directory.

    Args:
        model: a model of the directory's architecture and sizes, or a PEFT model.
        folder: a local directory with ``model.safetensors``, or with several files and their index.

    Raises:
        ValueError: if there are no safetensors files, or their names or shapes are not the model's. The message lists
            them; nothing was loaded.

    Example:
        >>> ody.save_pretrained(model, folder / "export")  # a stock model
        >>> model = ody.parallelize(model, mesh, "tp")
        >>> ody.load_pretrained(model, folder / "export")
    """
    if is_peft_model(model):
        load_adapter(model, folder)
        return
    source = Path(folder)
    headers = _Headers(source)
    plan = _plan(model, headers)
    tensors = model_tensors(model)
    with torch.no_grad():
        for name, converter, sources in plan:
            _load(tensors[name].detach(), name, converter, sources, headers, model)
    note_loaded(model)


class _Files:
    """Weights on their way into files: collected up to a size, written under temporary names, renamed at the end."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._pending: dict[str, torch.Tensor] = {}
        self._written: list[list[str]] = []
        self._bytes = self._total = self._parameters = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if self._pending and self._bytes + tensor.nbytes > self._limit:
                self._flush()
            self._pending[name] = tensor.contiguous()
            self._bytes += tensor.nbytes
            self._total += tensor.nbytes
            self._parameters += tensor.numel()

    def finish(self, model: PreTrainedModel) -> None:
        self._flush()
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = str(model.dtype).removeprefix("torch.")
        config.save_pretrained(self._folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(self._folder)
        count, parts = len(self._written), {self._part(i).name for i in range(len(self._written))}
        for path in list(self._folder.iterdir()):
            if _OF_A_SAVE.fullmatch(path.name) and path.name not in parts:
                path.unlink()
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [_SINGLE]
        for i, name in enumerate(names):
            self._part(i).rename(self._folder / name)
        if count > 1:
            index = {
                "metadata": {"total_parameters": self._parameters, "total_size": self._total},
                "weight_map": {key: name for keys, name in zip(self._written, names, strict=True) for key in keys},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / _INDEX).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file(self._pending, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"model.part{number}.safetensors"


class _Headers:
    """Names and shapes in a directory's safetensors files, and slices of them."""

    def __init__(self, folder: Path) -> None:
        index = folder / _INDEX
        if (folder / _SINGLE).is_file():
            files = [folder / _SINGLE]
        elif index.is_file():
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [folder / Path(name).name for name in named]
        else:
            raise ValueError(f"folder: expected {_SINGLE} or {_INDEX} in {folder}, found neither")
        self._files: dict[str, Any] = {}
        for path in files:
            if not path.is_file():
                raise ValueError(f"{index}: expected the file {path.name} beside it, which does not exist")
            opened = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(opened.keys(), opened)

    def names(self) -> list[str]:
        return list(self._files)

    def slice(self, name: str) -> Any:
        return self._files[name].get_slice(name)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.slice(name).get_shape())


# A parameter's name, how transformers makes it from what files hold, and the files' names with the pattern of each.
_Step = tuple[str, WeightConverter | None, list[tuple[str, str | None]]]


def _plan(model: PreTrainedModel, headers: _Headers) -> list[_Step]:
    """What makes each parameter; refuses what does not fit before anything is loaded."""
    expected, aliases = model_tensors(model), model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, list[tuple[str, str | None]]] = {}
    unknown = []
    for name in sorted(headers.names(), key=_natural):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, aliases)
        if renamed not in aliases and name in aliases:
            renamed, pattern = name, None
        if renamed in expected:
            sources.setdefault(renamed, []).append((name, pattern))
        elif renamed not in aliases and not _ignored(model, renamed):
            unknown.append(name)
    problems = []
    if set(expected) - set(sources):
        problems.append(f"missing in the files, expected by the model: {join_names(set(expected) - set(sources))}")
    if unknown:
        problems.append(f"in the files, unknown to the model: {join_names(unknown)}")
    plan: list[_Step] = []
    for target, found in sources.items():
        converter = by_pattern[found[0][1]] if found[0][1] is not None else None
        shape: Any
        if converter is None:
            shape = headers.shape(found[0][0])
        else:
            try:
                outlines = {name: torch.empty(headers.shape(name), device="meta") for name, _ in found}
                shape = _converted(target, converter, found, outlines, model).shape
            except (RuntimeError, ValueError, KeyError) as error:
                problems.append(f"{target}: expected parts that transformers can put together: {error}")
                continue
        if shape != expected[target].shape:
            problems.append(f"{target}: expected {list(expected[target].shape)}, got {list(shape)}")
        plan.append((target, converter, found))
    if problems:
        raise ValueError("the files do not fit, nothing was loaded:\n" + "\n".join(problems))
    return plan


def _load(
    target: torch.Tensor,
    name: str,
    converter: WeightConverter | None,
    sources: list[tuple[str, str | None]],
    headers: _Headers,
    model: PreTrainedModel,
) -> None:
    local, shape, offsets = target, target.shape, (0,) * target.ndim
    if isinstance(target, DTensor):
        local = target.to_local()
        found = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        shape, offsets = torch.Size(found[0]), found[1]
    if local.numel() == 0:
        return  # more ranks than rows
    window = tuple(slice(start, start + length) for start, length in zip(offsets, shape, strict=True))
    if converter is None:
        local.copy_(headers.slice(sources[0][0])[window or ...])
        return
    whole = {source: headers.slice(source)[...] for source, _ in sources}
    local.copy_(_converted(name, converter, sources, whole, model)[window])


def _converted(
    target: str,
    converter: WeightConverter,
    sources: Iterable[tuple[str, str | None]],
    tensors: dict[str, torch.Tensor],
    model: PreTrainedModel,
) -> torch.Tensor:
    """The parameter that transformers makes of its sources."""
    own = copy.deepcopy(converter)  # collects tensors
    for name, pattern in sources:
        own.add_tensor(target, name, pattern, tensors[name])
    value = own.convert(target, model=model, config=model.config)[target]
    return value[0] if isinstance(value, list) else value


def _ignored(model: PreTrainedModel, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts layers and experts by number: their order is their place in a merged parameter."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
