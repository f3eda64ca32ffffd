"""The fused operators, one file each, and their unfused twins in :mod:`~odysseus_kernels.ops.reference`."""

from .all_gather_linear import all_gather_linear
from .linear_reduce_scatter import linear_reduce_scatter
from .zero3_experts import zero3_experts
from .zero3_linear import zero3_linear

__all__ = ["all_gather_linear", "linear_reduce_scatter", "zero3_experts", "zero3_linear"]
