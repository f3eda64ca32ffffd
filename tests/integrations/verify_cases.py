"""What ranks run to verify tiny models, as they are or with a fault that is put in on purpose."""

from __future__ import annotations

from typing import Any

import torch
from family_cases import Case, make_mesh

from odysseus_kernels.integrations.verify import verify


def sound(rank: int, world_size: int, case: Case, strategy: str, ring: int, settings: dict[str, Any]) -> str:
    """The report of a model that is right."""
    model = case.model()
    if settings.pop("checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return verify(model, case.whole_batch(), make_mesh(world_size, ring), strategy, **settings).to_json()
