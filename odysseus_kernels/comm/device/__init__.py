"""The symmetric transport of GPUs: schedules lowered to copies, waits, signals and sums."""
