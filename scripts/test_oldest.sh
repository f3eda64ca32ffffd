#!/usr/bin/env bash
# Runs the tests of integrations with the oldest versions of transformers, accelerate, peft and trl that pyproject.toml
# allows: its floors, each to the letter.
#
#   bash scripts/test_oldest.sh                                   the tests below
#   bash scripts/test_oldest.sh tests/integrations/test_sft.py    only pytest, with these arguments
#
# Makes .venv-oldest, or ODYSSEUS_OLDEST_VENV, on top of the environment that is active (.venv if none is): torch and the
# rest come from there.  It is made anew when a floor has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${VIRTUAL_ENV:-} ]]; then
  source scripts/setup_env.sh
fi
base=$VIRTUAL_ENV
venv=${ODYSSEUS_OLDEST_VENV:-$PWD/.venv-oldest}

floors=$("$base/bin/python" - <<'PYTHON'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
wanted = ("transformers", "accelerate", "peft", "trl")
found = dict(re.findall(r"^([a-z]+)>=([0-9.]+)$", "\n".join(sum(extras.values(), [])), re.MULTILINE))
print(*(f"{name}=={found[name]}" for name in wanted))
PYTHON
)
if [[ $(cat "$venv/floors" 2>/dev/null) != "$floors" ]]; then
  echo "test_oldest: making $venv with $floors"
  "$base/bin/python" -m venv --clear "$venv"
  # What is not installed here is found there.
  "$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet $floors
  echo "$floors" >"$venv/floors"
fi
"$venv/bin/python" -c 'import accelerate, peft, transformers, trl; print(*(f"{one.__name__} {one.__version__}" for one in (transformers, accelerate, peft, trl)))'
if (($# == 0)); then
  set -- tests/integrations tests/examples/test_trainer_example.py tests/test_docstrings.py -m "not slow"
fi
exec "$venv/bin/python" -m pytest -p no:cacheprovider "$@"
