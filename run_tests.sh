#!/usr/bin/env bash
# Checks and tests.  Makes .venv first, if need be.
#   bash run_tests.sh                  everything
#   bash run_tests.sh tests/test_ext.py -k reduce      only pytest, with these arguments
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"

if (($# > 0)); then
  exec python -m pytest "$@"
fi
ruff check .
lint-imports --no-logo
mypy
# Two processes: tests with ranks in the one, long tests without ranks in the other (tests/conftest.py).
exec python -m pytest -n 2 --dist loadgroup
