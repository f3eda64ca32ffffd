"""Attention over a sequence that is cut over ranks.  Only here is flash_attn imported, and only when it is used."""

from odysseus_kernels.attention.local import check_attention_kernel
from odysseus_kernels.attention.ring import ring_attention

__all__ = ["check_attention_kernel", "ring_attention"]
