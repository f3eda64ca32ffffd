#!/usr/bin/env bash
# Checks and tests.  Makes .venv first, if need be.
#   bash run_tests.sh                  everything, of large products every pair of values
#   bash run_tests.sh --complete       all of their combinations, too
#   bash run_tests.sh tests/test_ext.py -k reduce      only pytest, with these arguments
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"

if (($# > 0)) && [[ $* != --complete ]]; then
  exec python -m pytest "$@"
fi
ruff check .
lint-imports --no-logo

# The documentation is built on the core that mypy leaves.
documentation=
if python -c 'import furo, myst_parser, sphinx' 2>/dev/null; then
  python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs &
  documentation=$!
  trap 'kill "$documentation" 2>/dev/null || true' EXIT
else
  echo "run_tests.sh: the documentation is not built: sphinx, myst-parser or furo is missing" >&2
fi
mypy
[[ -z $documentation ]] || wait "$documentation"

# Long tests that do not use the shared ranks run beside all others: either half leaves cores idle, and they end alike.
log=$(mktemp)
# Without a cache: the two would write one file.  Nicer: ranks wait for one another, and for a core again each time, if
# the others, which compute without a break, give none up before their slice of time has passed.
nice -n 5 python -m pytest -p no:cacheprovider -m without_ranks "$@" >"$log" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true; rm -f "$log"' EXIT
trap 'exit 130' INT  # pytest makes a summary of Ctrl-C; nobody wants to wait for the others then
status=0
python -m pytest -m "not without_ranks" "$@" || status=$?
wait "$beside" || status=$?
echo "Beside them: tests without the shared ranks"
cat "$log"
exit "$status"
