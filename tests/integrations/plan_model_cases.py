"""What a parallelized model really is on a rank: its elements, its bytes and its padding."""

from __future__ import annotations

from typing import Any

from family_cases import Case, make_mesh, parallel_model
from torch.distributed.tensor import DTensor

from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.integrations.verify.traffic import is_beside
from odysseus_kernels.nn.cut import KEY
from odysseus_kernels.nn.sequence import shard_sequence


def model_on_a_rank(rank: int, world_size: int, cases: list[Case], strategy: str, ring: int) -> list[dict[str, Any]]:
    """For each case its configuration, this rank's elements, the bytes of a step by collective, and padded lengths.

    Of a model that the strategy refuses, the configuration and the error's text alone.
    """
    mesh, found = make_mesh(world_size, ring), []
    for case in cases:
        try:
            model = parallel_model(case, strategy, mesh)
        except ValueError as error:
            found.append({"refused": str(error), "config": case.model().config.to_dict()})
            continue
        batch = shard_sequence(case.whole_batch(), model)
        with CommRecorder() as record:
            model(**batch).loss.backward()
        sent: dict[str, int] = {}
        for row in record.rows():
            if not is_beside(row["operator"]):
                sent[row["collective"]] = sent.get(row["collective"], 0) + row["bytes"]
        own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        padded = shard_sequence({"input_ids": case.whole_batch()["input_ids"]}, model)[KEY]
        found.append(
            {
                "refused": "",
                "config": model.config.to_dict(),
                "elements": own,
                "sent": {name: count for name, count in sent.items() if count},
                "cut": padded[0].tolist(),
            }
        )
    return found
