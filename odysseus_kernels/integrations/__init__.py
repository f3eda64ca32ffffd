"""Models and batches of other libraries; ``transformers`` is imported nowhere else."""

from odysseus_kernels.floors import require

require("transformers")
