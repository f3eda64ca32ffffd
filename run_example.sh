#!/usr/bin/env bash
# The tour on a machine without a GPU: measures the operators and a small layer on 2 ranks, then trains a small Llama on 1
# process and under every strategy on 2 and 4 ranks, and draws all loss curves on one another.  Makes .venv first, if need be.
#   bash run_example.sh [output folder, default outputs]
set -euo pipefail
output=$(realpath -m "${1:-outputs}")
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"
mkdir -p "$output"

# Ranks share the cores: more threads than cores would slow every rank down.
export OMP_NUM_THREADS=1

echo "== operators: benchmarks/overlap.py, 2 ranks"
python benchmarks/overlap.py --ranks 2 --quick --output "$output"

echo "== a layer under every strategy, beside torch's own parallelism"
python benchmarks/overlap.py --ranks 2 --level layer --quick --output "$output"

# ---- training: the flags of examples/train.py belong here --------------------------------------------------------------
echo "== training: examples/train.py, 1 process"
python examples/train.py --steps 50 --output "$output"
for strategy in tp tp_sp ulysses odysseus tsp; do
  echo "== training: $strategy on 2 ranks, and across 2 ring ranks on 4"
  torchrun --standalone --nproc-per-node 2 examples/train.py --steps 50 --strategy "$strategy" --output "$output"
  torchrun --standalone --nproc-per-node 4 examples/train.py --steps 50 --strategy "$strategy" --ring 2 \
    --output "$output" --plot
done
# ------------------------------------------------------------------------------------------------------------------------

echo "== plots and figures in $output:"
find "$output" -type f \( -name '*.png' -o -name '*.json' \) | sort
