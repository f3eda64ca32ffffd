"""Bytes that the kernel counts on the loopback interface while ranks train, beside what the recorder counts.

A program, because it moves into a network namespace of its own, where no other process' traffic is: ``loopback_run.py
RANKS STRATEGY...`` prints JSON, {strategy: [bytes on the interface, bytes that all ranks recorded]}, or ends with
status 77 and the reason where no namespace can be had.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import odysseus_kernels as ody
from odysseus_kernels.testing.spawn import RankPool

NOT_POSSIBLE = 77
_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1
TOKENS, HIDDEN, INTERMEDIATE, HEADS = 1536, 192, 384, 12


def enter_namespace() -> None:
    """Moves this process to an empty network namespace, and switches its loopback interface on."""
    flags = _NEW_NETWORK if os.geteuid() == 0 else _NEW_NETWORK | _NEW_USER
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        request = struct.pack("16sh14x", b"lo", 0)
        now = struct.unpack("16sh14x", fcntl.ioctl(connection, _GET_FLAGS, request))[1]
        fcntl.ioctl(connection, _SET_FLAGS, struct.pack("16sh14x", b"lo", now | _UP))


def loopback_bytes() -> int:
    """Bytes that the loopback interface has sent since it is up."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError("/proc/self/net/dev: no interface lo")


def settled_bytes() -> int:
    """The same once nothing is under way any more."""
    before = -1
    while (now := loopback_bytes()) != before:
        before = now
        time.sleep(0.05)
    return now


def count(rank: int, world_size: int, strategy: str) -> list[int]:
    """[bytes on the interface (rank 0 looks), bytes that this rank recorded] of one step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=TOKENS,
    )
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("seq",))
    settings = ody.OverlapConfig(mode="fused", transport="collective", timeout_s=60)
    model = ody.parallelize(LlamaForCausalLM(config), mesh, strategy=strategy, config=settings)
    batch = ody.shard_sequence({"input_ids": torch.arange(TOKENS)[None]}, mesh, strategy)
    x = torch.randn(*batch["input_ids"].shape, HIDDEN, requires_grad=True)

    def step() -> None:
        model.model(inputs_embeds=x, sequence_cut=batch["sequence_cut"]).last_hidden_state.sum().backward()

    step()  # connections are made at the first use
    dist.barrier()
    before = settled_bytes() if rank == 0 else 0
    dist.barrier()
    with ody.CommRecorder() as record:
        step()
    dist.barrier()
    after = settled_bytes() if rank == 0 else 0
    dist.barrier()
    return [after - before, record.bytes()]


def main() -> int:
    """The program."""
    ranks, strategies = int(sys.argv[1]), sys.argv[2:]
    try:
        enter_namespace()
    except OSError as error:
        print(f"no network namespace: {error}")
        return NOT_POSSIBLE
    found = {}
    with RankPool(ranks) as pool:
        for strategy in strategies:
            counted = pool.run(count, strategy)
            found[strategy] = [counted[0][0], sum(recorded for _, recorded in counted)]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
