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

# Two halves side by side: alone, either leaves cores idle half of the time.  Faults, whose times count, are in the first.
log=$(mktemp)
# Without a cache: the two would write one file.
{
  half=0
  trap 'kill $(jobs -p) 2>/dev/null || true; exit 1' TERM
  for chosen in "-m without_ranks" "-m not\ without_ranks tests/ops"; do
    eval "nice python -m pytest -p no:cacheprovider $chosen" &
    wait "$!" || half=$?
  done
  exit "$half"
} >"$log" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true; rm -f "$log"' EXIT
trap 'exit 130' INT  # pytest makes a summary of Ctrl-C; nobody wants to wait for the others then
status=0
python -m pytest -m "not without_ranks" --ignore=tests/ops || status=$?
wait "$beside" || status=$?
echo "The other half: long tests without ranks, and those of operators"
cat "$log"
exit "$status"
