#!/usr/bin/env bash
# Installs the project for another Python, or another torch, and runs tests of each of its parts: minutes, not all of them.
#
#   bash scripts/test_python.sh python3.13                   with the pinned requirements
#   bash scripts/test_python.sh python3.11 2.10.0            with that torch in place of the pinned one
#   bash scripts/test_python.sh python3.13 2.13.0 tests/ops  only pytest, with these arguments
#
# Makes .venv-<Python>-torch<version> beside it; delete it when it is no longer wanted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:?"usage: bash scripts/test_python.sh PYTHON [TORCH [PYTEST ARGUMENTS]]"}
pinned=$(sed -n 's/^torch==//p' requirements.txt)
torch=${2:-$pinned}
shift $(($# > 1 ? 2 : 1))

version=$("$python" -c 'import platform; print(platform.python_version())')
venv=$PWD/.venv-$version-torch$torch
if [[ ! -e $venv/complete ]]; then
  echo "test_python: making $venv"
  "$python" -m venv --clear "$venv"
  pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
  # Stock models, the tests, and what the extension is built with; not what checks and documents the sources.
  wanted='^(numpy|rich|matplotlib|triton|transformers|safetensors|accelerate|peft|pytest|pytest-timeout|hypothesis|setuptools|pybind11|ninja)=='
  # Every torch asks for a triton, and some for a setuptools, of their own: those pinned go with the pinned one.
  # Older setuptools than 70.1 makes no wheel by itself.
  if [[ $torch == "$pinned" ]]; then pins='s/ *#.*//'; else pins='s/ *#.*//; s/^triton==.*/triton/; s/^setuptools==.*/setuptools>=70.1/'; fi
  # shellcheck disable=SC2046
  "${pip[@]}" "torch==$torch" $(grep -E "$wanted" requirements.txt | sed -E "$pins")
  "${pip[@]}" --no-build-isolation --no-deps --editable .
  touch "$venv/complete"
fi
"$venv/bin/python" -c 'import platform, torch, transformers; print("Python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__)'
if (($# == 0)); then
  set -- tests/test_ext.py tests/test_docstrings.py tests/ops/test_operators.py tests/ops/test_pipelined_attention.py \
    tests/comm/test_links.py tests/integrations/test_families.py -k "not test_variant and not (family and not llama)"
fi
exec "$venv/bin/python" -m pytest -p no:cacheprovider "$@"
