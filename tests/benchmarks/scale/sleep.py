"""A rank that says that it is up and waits."""

import os
import time

os.write(1, b"up\n")  # at once: the other rank writes into the same pipe
time.sleep(60)
