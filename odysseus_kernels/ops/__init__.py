"""The fused operators, one file each, and their unfused twins in :mod:`~odysseus_kernels.ops.reference`."""

from .all_gather_linear import all_gather_linear
from .linear_reduce_scatter import linear_reduce_scatter
from .vocab_parallel_linear_cross_entropy import vocab_parallel_linear_cross_entropy
from .zero3_linear import zero3_linear
from .zero3_linear_cross_entropy import zero3_linear_cross_entropy

__all__ = [
    "all_gather_linear",
    "linear_reduce_scatter",
    "vocab_parallel_linear_cross_entropy",
    "zero3_linear",
    "zero3_linear_cross_entropy",
]
