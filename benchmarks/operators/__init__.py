"""The operators alone, fused and unfused, beside their products."""
