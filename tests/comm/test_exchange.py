"""Exchanges on both transports: exact, in ring order, counted, and with errors that say who and what."""

from __future__ import annotations

import exchange_cases as cases
import pytest

from odysseus_kernels.testing.spawn import RankPools

TRANSPORTS = ("symmetric", "collective")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", (1, 2, 3, 4))
def test_all_that_is_given_and_made_arrives(ranks: RankPools, world: int, transport: str) -> None:
    ranks(world).run(cases.all_cases, transport)
