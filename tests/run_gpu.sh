#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: build, tests, benchmark, sanitizer.  Under ten minutes on one GPU.
#   bash tests/run_gpu.sh                           all parts; results in benchmarks/results/<machine>
#   bash tests/run_gpu.sh /tmp/h200                 results elsewhere
#   bash tests/run_gpu.sh /tmp/h200 --only bench    one part again: build, tests, bench or sanitize
# Needs no network and makes no environment: ODYSSEUS_PYTHON (default python3) has torch, pybind11, ninja, setuptools and
# pytest already.  ODYSSEUS_GPU_SECONDS limits the whole run (default 480).  A part that fails or runs out of time does
# not stop the others.  Exit status: 0 if all parts passed, 1 if one did not, 2 if nothing could be run.
set -uo pipefail

usage() {
  echo "usage: bash tests/run_gpu.sh [folder of the results] [--only build|tests|bench|sanitize]" >&2
  exit 2
}

folder=""
only=""
while (($# > 0)); do
  case "$1" in
    --only)
      only="${2:-}"
      [[ "$only" =~ ^(build|tests|bench|sanitize)$ ]] || usage
      shift 2
      ;;
    -*) usage ;;
    *)
      [[ -z "$folder" ]] || usage
      folder="$1"
      shift
      ;;
  esac
done

export PYTHON="${ODYSSEUS_PYTHON:-python3}"
if ! command -v "$PYTHON" >/dev/null; then
  echo "no Python: $PYTHON is not a program; set ODYSSEUS_PYTHON" >&2
  exit 2
fi
if [[ -n "$folder" ]]; then
  mkdir -p "$folder" && folder="$(cd "$folder" && pwd)" || exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
# Tools of the toolkit, behind whatever is on the path already.
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHONUNBUFFERED=1

why=$("$PYTHON" -c '
try:
    import torch
except ImportError as error:
    print(f"no torch: {error}")
else:
    print("" if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is false")
' 2>/dev/null) || why="no torch: $PYTHON cannot import it"
if [[ -n "$why" ]]; then
  echo "$why" >&2
  exit 2
fi
if [[ -z "$folder" ]]; then
  folder="$PWD/benchmarks/results/$("$PYTHON" -c 'from benchmarks import machine; print(machine.machine_tag("cuda"))')"
  mkdir -p "$folder" || exit 2
fi
export OUT="$folder"
# What earlier runs measured for mode="auto" must not decide here.
ODYSSEUS_CACHE_DIR="$(mktemp -d)"
GROUP_FILE="$ODYSSEUS_CACHE_DIR/group"
export ODYSSEUS_CACHE_DIR GROUP_FILE
trap 'rm -rf "$ODYSSEUS_CACHE_DIR"' EXIT

NOT_RUN=77 # a part's exit status when its tool is not installed

part_build() {
  "$PYTHON" - <<'PY'
import importlib.metadata, platform, shutil, subprocess

print(f"python {platform.python_version()} on {platform.platform()}")
needed = ("torch", "triton", "numpy", "pybind11", "ninja", "setuptools", "pip", "pytest")
optional = ("transformers", "safetensors", "rich", "matplotlib", "hypothesis", "pytest-timeout", "flash-attn")
for name in (*needed, *optional):
    try:
        print(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        print(f"{name} is not installed" + (" (needed)" if name in needed else ""))
for command in (("nvcc", "--version"), ("ninja", "--version"), ("compute-sanitizer", "--version"), ("c++", "--version")):
    found = shutil.which(command[0])
    said = subprocess.run(command, capture_output=True, text=True).stdout.splitlines() if found else []
    print(f"{found}: {said[-1 if command[0] == 'nvcc' else 0]}" if said else f"{command[0]}: not found")
PY
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv 2>/dev/null ||
    echo "nvidia-smi: not found or failed"
  if ! "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --disable-pip-version-check -e .; then
    echo "pip could not install the package; building the extension in place"
    "$PYTHON" setup.py build_ext --inplace || return 1
  fi
  "$PYTHON" - <<'PY'
import sys
import torch
from odysseus_kernels import _ext

reason = _ext.why_no_cuda() or _ext.load().cuda.why_unavailable()
print(reason or f"built for {torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
sys.exit(bool(reason))
PY
}

# test_file NAME SECONDS ARGUMENTS...: pytest within its limit and what the part has left.  Its report, log and outcome
# are $OUT/tests-NAME.xml, .log and a line of tests.outcomes.
test_file() {
  local name="$1" limit="$2" left=$((PART_SECONDS - SECONDS - 8)) begin=$SECONDS status=1 result
  shift 2
  ((limit <= left)) || limit=$left
  if ((limit < 10)); then
    result="no time left"
  else
    timeout --foreground --signal=INT --kill-after=5 "$limit" "$PYTHON" -m pytest "${options[@]}" \
      "--junitxml=$OUT/tests-$name.xml" "$@" </dev/null >"$OUT/tests-$name.log" 2>&1
    status=$?
    case $status in
      0) result="passed" ;;
      5) result="no tests here" ;; # all skipped before they were collected; whether any test passed is asked at the end
      124 | 137) result="timed out after $limit s" ;;
      *) result="failed" ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - begin))" >>"$OUT/tests.outcomes"
  echo "== $name: $result ($((SECONDS - begin)) s)"
  if [[ -e "$OUT/tests-$name.log" ]]; then cat "$OUT/tests-$name.log"; fi
  ((status == 0 || status == 5))
}

# test_kernels FILE SECONDS: the file in shards side by side, because compiling takes the time, and one core.
test_kernels() {
  local shard rest="" pids=() number=0 status=0
  local shards=(
    "weight_gradient and torch.bfloat16 and written-straight"
    "weight_gradient and torch.bfloat16 and written-swapped"
    "weight_gradient and torch.bfloat16 and added-straight"
    "weight_gradient and torch.bfloat16 and added-swapped"
    "test_gather_matmul and torch.bfloat16 and (small or padded)"
    "test_gather_matmul and torch.bfloat16 and (deep or exact-out)"
    "test_gather_matmul and torch.bfloat16 and (one-row or one-rank or unaligned)"
    "test_matmul_scatter and torch.bfloat16 and (small or padded)"
    "test_matmul_scatter and torch.bfloat16 and (deep or exact-out)"
    "test_matmul_scatter and torch.bfloat16 and (one-row or one-rank or unaligned)"
    "gather_matmul_of_three and torch.bfloat16"
    "gather_matmul_of_three and not torch.bfloat16"
    "matmul_scatter_of_three"
    "weight_gradient and torch.float16"
    "(test_gather_matmul or test_matmul_scatter) and torch.float16 and not three"
  )
  for shard in "${shards[@]}"; do rest="${rest:+$rest and }not ($shard)"; done
  for shard in "${shards[@]}" "$rest"; do
    number=$((number + 1))
    test_file "kernels-$number" "$2" "$1" -k "$shard" &
    pids+=($!)
  done
  for shard in "${pids[@]}"; do wait "$shard" || status=1; done
  return $status
}

part_tests() {
  local file name status=0 sanitized="tests/gpu/test_native_cuda_data.py::test_all_kernels_by_themselves"
  local options=(-p no:cacheprovider -o addopts= -o faulthandler_timeout=40 -ra --durations=15 -m gpu --maxfail=5)
  options+=(--continue-on-collection-errors "--deselect=$sanitized[memcheck]" "--deselect=$sanitized[racecheck]")
  # Not installed everywhere; without it, only the whole file has a limit.
  if "$PYTHON" -c 'import pytest_timeout' 2>/dev/null; then options+=(--timeout=100); fi
  rm -f "$OUT"/tests-*.xml "$OUT"/tests-*.log "$OUT/tests.outcomes"
  # The most telling first, and alone on the GPU; limits are about twice what they took on an H100.
  local plan=(
    tests/gpu/test_native_cuda.py:15
    tests/gpu/test_native_cuda_data.py:40
    tests/gpu/test_emulated_links.py:45
    tests/gpu/test_choice_timer.py:15
    tests/gpu/test_virtual_ranks.py:45
    tests/kernels/test_gpu_kernels.py:110
  )
  # Ranks as processes take most of their time to start, on cores of their own; none of these measures time.
  local beside=(
    tests/gpu/test_cuda_operators.py:150
    tests/gpu/test_cuda_graphs.py:80
    tests/gpu/test_cuda_faults.py:130
    tests/gpu/test_nccl.py:100
  )
  while read -r file; do
    if [[ " ${plan[*]} ${beside[*]}" != *" $file:"* ]]; then plan+=("$file:30"); fi
  done < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests | sort)
  for file in "${plan[@]}"; do
    name="$(basename "${file%%:*}" .py)"
    if [[ "$name" == test_gpu_kernels ]]; then
      test_kernels "${file%%:*}" "${file##*:}" || status=1
    else
      test_file "${name#test_}" "${file##*:}" "${file%%:*}" || status=1
    fi
  done
  local pids=()
  for file in "${beside[@]}"; do
    name="$(basename "${file%%:*}" .py)"
    test_file "${name#test_}" "${file##*:}" "${file%%:*}" &
    pids+=($!)
  done
  for file in "${pids[@]}"; do wait "$file" || status=1; done
  echo "== all"
  cat "$OUT/tests.outcomes"
  "$PYTHON" - <<'PY' || status=1 # tests that were all skipped have shown nothing
import glob, os, sys
import xml.etree.ElementTree as xml

passed = 0
for path in glob.glob(os.path.join(glob.escape(os.environ["OUT"]), "tests-*.xml")):
    suite = xml.parse(path).getroot().find("testsuite")
    passed += int(suite.get("tests")) - sum(int(suite.get(name)) for name in ("errors", "failures", "skipped"))
print(f"{passed} passed")
sys.exit(passed <= 0)
PY
  return $status
}

part_bench() {
  local gpus
  rm -f "$OUT"/emulated-*.json "$OUT"/emulated-*.md "$OUT"/emulated-*.png
  gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
  if ((gpus > 1)); then
    "$PYTHON" benchmarks/overlap.py --device cuda --dtype bfloat16 --quick --ranks "$gpus" --output "$OUT"
  else
    # As many hardware queues as there are: with few, streams wait for one another.
    export CUDA_DEVICE_MAX_CONNECTIONS=32
    "$PYTHON" benchmarks/overlap.py --device cuda --budget "$BENCH_BUDGET" --output "$OUT"
  fi
}

part_sanitize() {
  local tool status=0
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: memory and races of the kernels were not checked"
    return "$NOT_RUN"
  fi
  for tool in memcheck racecheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tests/gpu/native_check.py || status=1
  done
  return $status
}
export -f part_build test_file test_kernels part_tests part_bench part_sanitize
export NOT_RUN

commit=$("$PYTHON" -c 'from benchmarks import machine; print(machine.commit())')
# SECONDS counts from the start of this script; at the end, something is left to stop the last part and to sum up.
deadline=$((${ODYSSEUS_GPU_SECONDS:-480} - 10))
failed=0

# run_part NAME RESERVED: runs a part within what is left of the whole run's time but for RESERVED seconds, which later
# parts need, and notes how it ended.
run_part() {
  local name="$1" limit=$((deadline - SECONDS - $2)) begin=$SECONDS status result
  if ((limit < 15)); then
    result="not run: no time left"
    failed=1
  else
    echo "$name: running, at most $limit s; log in $OUT/$name.log"
    export PART_SECONDS=$limit BENCH_BUDGET=$((limit > 40 ? limit - 25 : limit / 2))
    timeout --signal=INT --kill-after=5 "$limit" bash -c 'echo $PPID >"$GROUP_FILE"; "$@"' bash "part_$name" \
      </dev/null >"$OUT/$name.log" 2>&1
    status=$?
    # timeout leads a process group: whatever a part left behind in it would keep the GPU busy for the next one.
    kill -KILL -- "-$(cat "$GROUP_FILE")" 2>/dev/null
    case $status in
      0) result="passed" ;;
      "$NOT_RUN") result="not run: $(tail -n 1 "$OUT/$name.log")" ;;
      124 | 137) result="timed out after $limit s" ;;
      *) result="failed" ;;
    esac
    ((status == 0 || status == NOT_RUN)) || failed=1
  fi
  printf '%s\t%s\t%s\t%s\n' "$result" "$((SECONDS - begin))" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$commit" >"$OUT/$name.status"
  echo "$name: $result ($((SECONDS - begin)) s)"
  if [[ "$result" == failed || "$result" == timed* ]]; then
    tail -n 30 "$OUT/$name.log" | sed 's/^/    /'
  fi
}

# Each part and what is kept for later ones, of 470 s: 70 for build, 265 for tests, 110 for bench, 25 for sanitize.
# What a part does not need, the next one has.
for part in build:400 tests:135 bench:25 sanitize:0; do
  if [[ -z "$only" ]]; then
    run_part "${part%%:*}" $((${part##*:} * deadline / 470))
  elif [[ "$only" == "${part%%:*}" ]]; then
    run_part "$only" 0
  fi
done

"$PYTHON" - <<'PY'
import json, os
from pathlib import Path
import xml.etree.ElementTree as xml

out = Path(os.environ["OUT"])
lines = ["| part | outcome | seconds | when | commit |", "| --- | --- | ---: | --- | --- |"]
for part in ("build", "tests", "bench", "sanitize"):
    path = out / f"{part}.status"
    fields = path.read_text().strip().split("\t") if path.exists() else ["never run", "", "", ""]
    lines.append(f"| {part} | " + " | ".join(fields) + " |")
suites = [xml.parse(report).getroot().find("testsuite") for report in sorted(out.glob("tests-*.xml"))]
if suites:
    names = ("tests", "failures", "errors", "skipped")
    counts = {name: sum(int(suite.get(name)) for suite in suites) for name in names}
    lines += ["", "Tests: " + ", ".join(f"{count} {name}" for name, count in counts.items())]
outcomes = out / "tests.outcomes"
if outcomes.exists():
    for name, result, _ in (line.split("\t") for line in outcomes.read_text().splitlines()):
        if result != "passed":
            lines.append(f"- {name}: {result}")
results = sorted(out.glob("emulated-*.json"))
if results:
    document = json.loads(results[-1].read_text())
    lines += ["", f"Benchmark, links EMULATED, {document['date']}, commit {document['commit']}: {results[-1].name}"]
    for target in document["targets"]:
        measured = "no figure" if target["measured"] is None else f"{target['measured']:.3f}"
        outcome = "reached" if target["reached"] else f"missed in {target['rows_missed']} of {target['rows']} rows"
        lines.append(f"- {target['what']}: {measured} ({target['relation']} {target['limit']}), {outcome}")
    for name, what in (("failed", "rows failed"), ("not_run", "rows were not run for lack of time")):
        if document[name]:
            lines.append(f"- {len(document[name])} {what}")
text = "\n".join(lines) + "\n"
(out / "summary.md").write_text(text)
print(text, end="")
print(f"\nwrote {out / 'summary.md'}")
PY
exit $failed
