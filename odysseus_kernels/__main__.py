"""``python -m odysseus_kernels``."""

import sys

from odysseus_kernels.cli import main

sys.exit(main())
