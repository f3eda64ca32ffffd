"""What ``mode="auto"`` means: ranks time or predict the modes of a call and choose alike."""
