"""Models and batches of other libraries; ``transformers`` is imported nowhere else."""
