#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command, in at most eight minutes on one GPU with nothing compiled before.
#   bash tests/run_gpu.sh                          all parts; results in benchmarks/results/<machine>
#   bash tests/run_gpu.sh /tmp/h200                results elsewhere
#   bash tests/run_gpu.sh /tmp/h200 --only links   one part again
# Needs no network and makes no environment: ODYSSEUS_PYTHON (default python3) has torch, pybind11, ninja, setuptools and
# pytest already.  ODYSSEUS_GPU_SECONDS (default 480) makes all limits longer or shorter.
#
# A part is made of steps.  One that fails, hangs or runs out of time stops no other: its log stays, what it measured so
# far too, and the summary names what was not run.  Exit status: 0 if all passed, 2 if nothing could be run, else that of
# the first part that did not pass, below.
set -uo pipefail

# name : limit in seconds : exit status : 1 if it runs beside the part before it.  The limits of parts that follow one
# another add up to at most 470 (tests/test_run_gpu.py), and are about 1.3 times what an H100 with 16 cores took.
PARTS=(
  build:50:10:0
  warm:80:11:0      # compiles: the benchmark's kernels, and those of the kernels' tests, which this runs
  native:40:12:0    # kernels of csrc/cuda by themselves; copies by engines and by multiprocessors
  full:20:13:0      # waits, signals and copies while every multiprocessor spins
  cublas:40:14:0    # kernels against the library
  virtual:35:15:0   # several ranks in one process
  processes:75:16:0 # ranks as processes: most of their time is starting, on cores of their own, and none is timed
  graphs:75:17:1
  faults:75:18:1
  links:110:19:0    # one rank of eight over emulated links: paced:80 and pcie first
  sanitize:20:20:0
)
ALL_S=480

usage() {
  local names=("${PARTS[@]%%:*}")
  echo "usage: bash tests/run_gpu.sh [folder of the results] [--only $(IFS='|' && echo "${names[*]}")]" >&2
  exit 2
}

folder=""
only=""
while (($# > 0)); do
  case "$1" in
    --only)
      only="${2:-}"
      [[ -n "$only" && " ${PARTS[*]%%:*} " == *" $only "* ]] || usage
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
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# Why nothing can be run, else the machine, the commit and the number of GPUs, a line each.
mapfile -t found < <("$PYTHON" -c '
try:
    import torch
except ImportError as error:
    print(f"no torch: {error}")
else:
    print("" if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is false")
    if torch.cuda.is_available():
        from benchmarks.common import machine
        print(machine.machine_tag("cuda"), machine.commit(), torch.cuda.device_count(), sep="\n")
' 2>/dev/null)
((${#found[@]} > 0)) || found=("no torch: $PYTHON cannot import it")
if [[ -n "${found[0]}" ]]; then
  echo "${found[0]}" >&2
  exit 2
fi
if ((${#found[@]} < 4)); then
  echo "the machine cannot be described: run $PYTHON -c 'from benchmarks.common import machine' to see why" >&2
  exit 2
fi
export GPUS="${found[3]}"
if [[ -z "$folder" ]]; then
  folder="$PWD/benchmarks/results/${found[1]}"
  mkdir -p "$folder" || exit 2
fi
export OUT="$folder"
# What earlier runs measured for mode="auto", or compiled, must not decide here.
ODYSSEUS_CACHE_DIR="$(mktemp -d)"
export ODYSSEUS_CACHE_DIR TRITON_CACHE_DIR="$ODYSSEUS_CACHE_DIR/triton"
trap 'rm -rf "$ODYSSEUS_CACHE_DIR"' EXIT

NOT_RUN=77 # exit status of a step whose tool is not installed
GRACE_S=3  # of each limit, for what does not end when it is told to

now_ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }
scaled_ms() { echo $(($1 * ${ODYSSEUS_GPU_SECONDS:-$ALL_S} * 1000 / ALL_S)); }
as_seconds() { printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)); }

# limited step|part MILLISECONDS COMMAND...: ends it within that time; status 124 or 137 if it had to.  A part leads a
# process group, which is ended with it; a step stays in its part's.
limited() {
  local grace left group=()
  if [[ "$1" == step ]]; then group=(--foreground); fi
  grace=$(scaled_ms $GRACE_S)
  left=$(($2 > 2 * grace ? $2 - grace : $2 / 2))
  # What a shell starts beside itself ignores interrupts, by which a benchmark knows that it is to write what it has.
  env --default-signal=INT timeout "${group[@]}" --signal=INT --kill-after="$(as_seconds "$grace")" \
    "$(as_seconds "$left")" "${@:3}"
}

# step NAME SECONDS COMMAND...: runs it within its limit and what the part has left.  Its log is $OUT/NAME.log, how it
# ended a line of $OUT/outcomes.  Where steps are only listed, it prints its name.
step() {
  local name="$1" limit begin status result
  if [[ -n "${LISTING:-}" ]]; then
    echo "$name"
    return
  fi
  begin=$(now_ms) limit=$(scaled_ms "$2")
  ((limit <= PART_END - begin)) || limit=$((PART_END - begin))
  if ((limit < $(scaled_ms 2))); then
    status=124 result="not run: no time left"
  else
    : >"$OUT/$name.log"
    LEFT_S=$((limit / 1000)) limited step "$limit" "${@:3}" </dev/null >"$OUT/$name.log" 2>&1
    status=$?
    # pytest's 5: all tests were skipped before they were collected; whether any passed is asked at the end.
    if ((status == 5)) && [[ "${*:3}" == *" -m pytest "* ]]; then status=0; fi
    case $status in
      0) result="passed" ;;
      "$NOT_RUN") result="not run: $(tail -n 1 "$OUT/$name.log")" ;;
      124 | 137) result="timed out after $(as_seconds "$limit") s" ;;
      *) result="failed with status $status" ;;
    esac
  fi
  printf '%s\t%s\t%s\t%d\n' "$PART" "$name" "$result" $((($(now_ms) - begin) / 1000)) >>"$OUT/outcomes"
  ((status == 0 || status == NOT_RUN))
}

# tests NAME SECONDS ARGUMENTS...: a step that runs pytest; its report is $OUT/NAME.xml.
tests() {
  local sanitized="tests/gpu/test_native_cuda_data.py::test_all_kernels_by_themselves"
  local options=(-p no:cacheprovider -o addopts= -o faulthandler_timeout=40 -ra --durations=15 -m gpu --maxfail=5)
  options+=(--continue-on-collection-errors "--deselect=$sanitized[memcheck]" "--deselect=$sanitized[racecheck]")
  step "$1" "$2" "$PYTHON" -m pytest "${options[@]}" "--junitxml=$OUT/$1.xml" "${@:3}"
}

versions() {
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
}

install() {
  if ! "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --disable-pip-version-check -e .; then
    echo "pip could not install the package; building the extension in place"
    "$PYTHON" setup.py build_ext --inplace || return 1
  fi
  "$PYTHON" -c '
import sys
import torch
from odysseus_kernels import _ext

reason = _ext.why_no_cuda() or _ext.load().cuda.why_unavailable()
print(reason or f"built for {torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
sys.exit(bool(reason))
'
}

part_build() {
  step versions 10 bash -c versions
  step install 48 bash -c install
}

# The kernels' tests in shards side by side, because compiling takes the time, and one core.  Between some 50 configurations
# of one architecture (benchmarks/results/compile.md) and some three times as many layouts of operands are compiled.
part_warm() {
  local shard rest="" number=0 pid pids=() status=0 file=tests/kernels/test_gpu_kernels.py
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
    "(come_late or never_comes) and (cooperative or pingpong)"
    "weight_gradient and torch.float16"
    "(test_gather_matmul or test_matmul_scatter) and torch.float16 and not three"
  )
  for shard in "${shards[@]}"; do rest="${rest:+$rest and }not ($shard)"; done
  step compile 78 "$PYTHON" -m benchmarks.device.warm &
  pids+=($!)
  for shard in "${shards[@]}" "$rest"; do
    number=$((number + 1))
    tests "kernels-$number" 78 "$file" -k "$shard" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  return $status
}

part_native() {
  local status=0
  step native_check 12 "$PYTHON" tests/gpu/native_check.py || status=1
  step copies 12 "$PYTHON" -m benchmarks.device.copies --output "$OUT/copies.json" || status=1
  tests native_cuda 10 tests/gpu/test_native_cuda.py || status=1
  tests choice_timer 8 tests/gpu/test_choice_timer.py || status=1
  tests native_cuda_data 28 tests/gpu/test_native_cuda_data.py || status=1
  return $status
}

part_full() { tests full_device 20 tests/gpu/test_full_device.py; }

# bench KIND ROW_SECONDS ARGUMENTS...: a row at a time, each with a limit of its own and written as it ends; none begins
# that the part has no time for.
bench() {
  # As many hardware queues as there are: with few, streams wait for one another.
  export CUDA_DEVICE_MAX_CONNECTIONS=32
  # A row that hangs costs itself: here they may be timed before anybody has seen them run.
  export ODYSSEUS_SPECIALIZED_TILES=1
  rm -f "$OUT/$1"-2*.{json,md,png}
  exec "$PYTHON" benchmarks/overlap.py --device cuda --output "$OUT" --row-limit "$2" \
    --budget $((LEFT_S > $2 + 4 ? LEFT_S - $2 : 4)) "${@:3}"
}

part_cublas() { step cublas 40 bash -c 'bench library 20 --measure kernels'; }

part_virtual() { tests virtual_ranks 35 tests/gpu/test_virtual_ranks.py; }

part_processes() {
  local file name pid pids=() status=0
  tests cuda_operators 73 tests/gpu/test_cuda_operators.py &
  pids+=($!)
  tests nccl 73 tests/gpu/test_nccl.py &
  pids+=($!)
  # Whatever no part names.
  while read -r file; do
    if ! grep -qF "${file#tests/}" tests/run_gpu.sh; then
      name="$(basename "$file" .py)"
      tests "${name#test_}" 30 "$file" &
      pids+=($!)
    fi
  done < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests | sort)
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  return $status
}

part_graphs() { tests cuda_graphs 73 tests/gpu/test_cuda_graphs.py; }

part_faults() { tests cuda_faults 73 tests/gpu/test_cuda_faults.py; }

part_links() {
  local status=0
  if ((GPUS > 1)); then
    step links 75 bash -c 'bench overlap 30 --dtype bfloat16 --quick --ranks "$GPUS" --measure links' || status=1
  else
    step links 75 bash -c 'bench emulated 20 --measure links' || status=1
  fi
  tests emulated_links 40 tests/gpu/test_emulated_links.py || status=1
  return $status
}

part_sanitize() {
  local tool status=0
  for tool in memcheck racecheck; do
    step "$tool" 12 bash -c "sanitize $tool" || status=1
  done
  return $status
}

sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: memory and races of the kernels were not checked"
    return "$NOT_RUN"
  fi
  exec compute-sanitizer --tool "$1" --error-exitcode 9 "$PYTHON" tests/gpu/native_check.py
}

for part in "${PARTS[@]}"; do export -f "part_${part%%:*}"; done
export -f now_ms scaled_ms as_seconds limited step tests versions install bench sanitize
export NOT_RUN GRACE_S ALL_S

# run_part NAME SECONDS: runs a part within its limit, and notes how it ended, and what of it did not run.
run_part() {
  local name="$1" limit status result begin group="$ODYSSEUS_CACHE_DIR/group.$1"
  begin=$(now_ms) limit=$(scaled_ms "$2")
  # Steps of an earlier run must not be taken for this one's.
  while read -r planned; do rm -f "$OUT/$planned.log" "$OUT/$planned.xml"; done < <(LISTING=1 "part_$name")
  echo "$name: running, at most $(as_seconds "$limit") s"
  export PART="$name" PART_END=$((begin + limit - $(scaled_ms $((GRACE_S + 1)))))
  limited part "$limit" bash -c 'echo $PPID >"$1"; "$2"' bash "$group" "part_$name" </dev/null >"$OUT/$name.part" 2>&1
  status=$?
  # timeout leads a process group: whatever a part left behind in it would keep the GPU busy for the next one.
  kill -KILL -- "-$(cat "$group")" 2>/dev/null
  while read -r planned; do
    if ! cut -f 2 "$OUT/outcomes" | grep -qxF "$planned"; then
      result="not run: its part was stopped before it"
      if [[ -e "$OUT/$planned.log" ]]; then result="stopped with its part"; fi
      printf '%s\t%s\t%s\t\n' "$name" "$planned" "$result" >>"$OUT/outcomes"
      status=124
    fi
  done < <(LISTING=1 "part_$name")
  case $status in
    0) result="passed" ;;
    124 | 137) result="timed out" ;;
    *) result="failed" ;;
  esac
  # A part whose steps ran out of time, and did nothing worse.
  if [[ "$result" == failed ]] && ! grep "^$name"$'\t' "$OUT/outcomes" | cut -f 3 | grep -q '^failed'; then
    result="timed out"
  fi
  if [[ "$result" == passed ]] && ! grep "^$name"$'\t' "$OUT/outcomes" | cut -f 3 | grep -qv '^not run'; then
    result="not run"
  fi
  printf '%s\t%d\t%s\t%s\n' "$result" $((($(now_ms) - begin) / 1000)) "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$COMMIT" \
    >"$OUT/$name.status"
  echo "$name: $result ($((($(now_ms) - begin) / 1000)) s)"
  while IFS=$'\t' read -r _ planned result _; do
    if [[ "$result" =~ ^(failed|timed|stopped) && -e "$OUT/$planned.log" ]]; then
      echo "  $planned: $result; the end of $planned.log:"
      tail -n 15 "$OUT/$planned.log" | sed 's/^/    /'
    fi
  done < <(grep "^$name"$'\t' "$OUT/outcomes")
}

export COMMIT="${found[2]}"
touch "$OUT/outcomes"
for entry in "${PARTS[@]}"; do
  name="${entry%%:*}"
  [[ -z "$only" || "$only" == "$name" ]] || continue
  sed -i "/^$name\t/d" "$OUT/outcomes"
  rm -f "$OUT/$name.status"
done
pids=()
stopped=""
# Whoever stops this gets a summary of what there is.
trap 'stopped=1; for group in "$ODYSSEUS_CACHE_DIR"/group.*; do kill -KILL -- "-$(cat "$group")"; done 2>/dev/null' INT TERM
for entry in "${PARTS[@]}"; do
  IFS=: read -r name limit _ beside <<<"$entry"
  [[ -z "$only" || "$only" == "$name" ]] || continue
  if ((!beside)); then
    for pid in "${pids[@]}"; do wait "$pid"; done
    pids=()
  fi
  [[ -z "$stopped" ]] || break
  run_part "$name" "$limit" &
  pids+=($!)
done
wait
[[ -z "$stopped" ]] || wait # the signal ended the first one

PARTS="${PARTS[*]}" ONLY="$only" "$PYTHON" tests/gpu/summary.py
