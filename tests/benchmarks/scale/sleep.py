"""A rank that says that it is up and waits."""

import time

print("up", flush=True)
time.sleep(60)
