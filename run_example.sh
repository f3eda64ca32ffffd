#!/usr/bin/env bash
# The tour on a machine without a GPU: measures the operators on 2 ranks, then trains a small Llama on 1 rank and on 2 and
# draws both loss curves.  Makes .venv first, if need be.
#   bash run_example.sh [output folder, default outputs]
set -euo pipefail
output=$(realpath -m "${1:-outputs}")
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"
mkdir -p "$output"

# Ranks share the cores: more threads than cores would slow every rank down.
export OMP_NUM_THREADS=1

echo "== operators: benchmarks/overlap.py, 2 ranks"
python benchmarks/overlap.py --ranks 2 --quick --output "$output"

# ---- training: the flags of examples/train.py belong here --------------------------------------------------------------
echo "== training: examples/train.py, 1 rank, then 2 ranks with Odysseus"
python examples/train.py --steps 50 --output "$output"
torchrun --standalone --nproc-per-node 2 examples/train.py --steps 50 --strategy odysseus --output "$output" --plot
# ------------------------------------------------------------------------------------------------------------------------

echo "== plots and figures in $output:"
find "$output" -type f \( -name '*.png' -o -name '*.json' \) | sort
