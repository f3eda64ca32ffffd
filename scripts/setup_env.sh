# Sourced by run_tests.sh and run_example.sh: makes .venv beside them with the pinned requirements and this package, and
# activates it.  Does nothing but activate it where nothing that it was made from has changed.
#
# ODYSSEUS_PYTHON names the interpreter to use instead of python3.11 or the first newer one found.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${ODYSSEUS_PYTHON:-python3.11 python3 python3.12 python3.13 python3.14}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "setup: expected Python 3.11 or newer, found none; install python3.11 or set ODYSSEUS_PYTHON" >&2
  return 1
}

fingerprint() {
  {
    .venv/bin/python -c 'import platform, sys; print(sys.version, platform.machine())'
    sha256sum requirements.txt pyproject.toml setup.py scripts/setup_env.sh
    find csrc -type f | LC_ALL=C sort | xargs sha256sum
    echo "${ODYSSEUS_BUILD_CUDA:-}" "${CUDA_HOME:-}" "$PWD"
  } | sha256sum
}

# The registry's default build of torch for Linux brings gigabytes of CUDA libraries; without a GPU, prefer the CPU build.
cpu_torch_index() {
  local index=https://download.pytorch.org/whl/cpu
  if command -v nvidia-smi >/dev/null || [[ $(uname -m) != x86_64 ]]; then return; fi
  # Only where it answers: pip would retry an index that is out of reach for minutes.
  if .venv/bin/python - "$index/torch/" <<'PYTHON'
import sys, urllib.request
try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=10).close()
except OSError:
    sys.exit(1)
PYTHON
  then
    echo "--extra-index-url $index"
  fi
}

install_all() {
  local pip=(.venv/bin/python -m pip --disable-pip-version-check)
  if ! command -v "${CXX:-g++}" >/dev/null; then
    echo "setup: expected a C++17 compiler (${CXX:-g++}), found none; install g++ 9 or newer" >&2
    return 1
  fi
  echo "setup: installing requirements.txt into .venv (minutes the first time)"
  # Word splitting is wanted: the option and its value, or nothing.
  # shellcheck disable=SC2046
  "${pip[@]}" install --quiet $(cpu_torch_index) -r requirements.txt
  # Built against what was just installed: quicker than an isolated build, and the versions are the tested ones.
  "${pip[@]}" install --quiet --no-build-isolation --no-deps --editable .
}

if [[ ! -x .venv/bin/python ]]; then
  python=$(find_python)
  echo "setup: making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
if [[ ! -f .venv/fingerprint || $(fingerprint) != "$(cat .venv/fingerprint)" ]]; then
  rm -f .venv/fingerprint
  install_all
  fingerprint >.venv/fingerprint
fi
# shellcheck disable=SC1091
source .venv/bin/activate
