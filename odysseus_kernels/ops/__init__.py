"""The fused operators, one file each, and their unfused twins in :mod:`~odysseus_kernels.ops.reference`.

Names say what is done, in order: ``linear_all_to_all`` multiplies and then exchanges tokens for heads (Ulysses' query,
key and value projections), ``all_to_all_linear`` exchanges heads for tokens and then multiplies (its output
projection).
"""

from odysseus_kernels.ops.all_gather_linear import all_gather_linear
from odysseus_kernels.ops.all_to_all_linear import all_to_all_linear
from odysseus_kernels.ops.column_parallel_linear import column_parallel_linear
from odysseus_kernels.ops.linear_all_reduce import linear_all_reduce
from odysseus_kernels.ops.linear_all_to_all import linear_all_to_all
from odysseus_kernels.ops.linear_log_probs import LogProbs, linear_log_probs
from odysseus_kernels.ops.linear_reduce_scatter import linear_reduce_scatter
from odysseus_kernels.ops.pipelined_attention import pipelined_attention
from odysseus_kernels.ops.pipelined_ulysses import pipelined_ulysses
from odysseus_kernels.ops.ulysses_attention import ulysses_attention
from odysseus_kernels.ops.vocab_parallel_linear_cross_entropy import vocab_parallel_linear_cross_entropy
from odysseus_kernels.ops.zero3_experts import zero3_experts
from odysseus_kernels.ops.zero3_linear import zero3_linear
from odysseus_kernels.ops.zero3_linear_cross_entropy import zero3_linear_cross_entropy

__all__ = [
    "LogProbs",
    "all_gather_linear",
    "all_to_all_linear",
    "column_parallel_linear",
    "linear_all_reduce",
    "linear_all_to_all",
    "linear_log_probs",
    "linear_reduce_scatter",
    "pipelined_attention",
    "pipelined_ulysses",
    "ulysses_attention",
    "vocab_parallel_linear_cross_entropy",
    "zero3_experts",
    "zero3_linear",
    "zero3_linear_cross_entropy",
]
