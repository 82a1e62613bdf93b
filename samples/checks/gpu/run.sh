#!/usr/bin/env bash
# On the GPU machine, in the repository's root: unpack what has come to build/gpu-kit, then run each check once, the most valuable first.
#
#   SECONDS_IN_ALL=280 bash samples/checks/gpu/run.sh [CHECK...]
#
# Checks: machine, fill, samples, large, originals, plans, pictures, verify, bench, compiled. Each has a time limit of its own, none is begun
# that the time in all has no room for, and everything so far is packed into $OUT/results.tar.gz. CHECK_DEVICE=cpu tries them without a GPU.
set -uo pipefail
KIT=$(cd "$(dirname "$0")" && pwd)
PY=${PY:-python3}
SITE=${SITE:-/tmp/gpu-kit/site}    # where packages go
WORK=${WORK:-/tmp/gpu-kit/work}    # where bundles and results go
OUT=${OUT:-build/gpu-kit}
ALL=${SECONDS_IN_ALL:-280}
export RESULTS=$WORK/results
export HF_HUB_OFFLINE=1 ATEN_CPU_CAPABILITY=avx2 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
SAMPLES="elit-mnist dcdit-mnist elt-mnist elt-mnist-masked ralu-digits"
LARGE=${LARGE:-elit-sit-xl-256 elit-sit-xl-512}
MORE="elit-uvit-s-256 elit-hdit-s-256"

unpack() {
  mkdir -p "$SITE" "$WORK/parts" "$RESULTS"
  cp build/gpu-kit/[0-9]*/* "$WORK/parts/" 2>/dev/null # a later transfer may take them away
  local name size parts digest archive
  for name in bundles base ort diffusers; do
    [ -e "$WORK/$name.done" ] || [ ! -e "$WORK/parts/$name.sum" ] && continue
    read -r size parts digest <"$WORK/parts/$name.sum"
    archive=$WORK/$name.tar.xz
    cat "$WORK/parts/$name.tar.xz".* >"$archive" 2>/dev/null
    [ "$(sha256sum "$archive" | cut -d' ' -f1)" = "$digest" ] || { echo "$name: not all of its $parts parts are here yet" && continue; }
    [ $name = bundles ] && "$PY" -m tarfile -e "$archive" "$WORK" || "$PY" -m tarfile -e "$archive" "$SITE"
    rm "$archive" && touch "$WORK/$name.done"
  done
  # The product runs from its sources, and asks for its own version.
  mkdir -p "$SITE/elastic_export-0.1.0.dist-info"
  printf 'Metadata-Version: 2.1\nName: elastic-export\nVersion: 0.1.0\n' >"$SITE/elastic_export-0.1.0.dist-info/METADATA"
}

cli() { "$PY" -c 'from elastic_export.cli import main; main()' "$@"; }
folders() { for name in "$@"; do [ -e "$WORK/bundles/$name/filled" ] && printf '%s\n' "$WORK/bundles/$name"; done; }

machine() { "$PY" "$KIT/machine.py"; cli doctor; }
fill() { # all bundles at once: each is one core's work
  for path in "$WORK"/bundles/*/; do ("$PY" "$KIT/hollow.py" fill "$path" && touch "$path/filled") & done
  wait
}
samples() { TABLE=sessions-samples "$PY" "$KIT/sessions.py" $(folders $SAMPLES $MORE); }
large() { TABLE=sessions-large "$PY" "$KIT/sessions.py" $(folders $LARGE); }
originals() { "$PY" "$KIT/originals.py" $LARGE; }
compiled() { "$PY" "$KIT/originals.py" --compiled $LARGE; }
plans() { "$PY" "$KIT/plans.py"; }
pictures() { # as a user draws them
  for latents in 16 64 256; do cli generate "$WORK/bundles/elit-mnist" -o "$RESULTS/digits-$latents.png" --latents $latents --overwrite; done
  cli generate "$WORK/bundles/elit-mnist" -o "$RESULTS/digits-20ms.png" --classes 7 --target-ms 20 --overwrite
  cli generate "$WORK/bundles/ralu-digits" -o "$RESULTS/ralu.png" --classes 0-3 --plan 4x --overwrite
  cli generate "$WORK/bundles/dcdit-mnist" -o "$RESULTS/dcdit.png" --classes 0-9 --tokens 64 --overwrite
}
verify() { for path in $(folders $SAMPLES); do cli verify "$path" --quiet || echo "$path: FAILS"; done; }
bench() {
  cli bench $(folders elit-sit-xl-256) --runtimes onnxruntime-cuda --duration 0.5 --json "$RESULTS/bench-large.json" --overwrite
  cli bench $(folders elit-mnist) --runtimes onnxruntime-cuda --duration 0.5 --json "$RESULTS/bench.json" --overwrite
}

check() { # name, seconds at most, what must have come
  local name=$1 limit=$2 begun=$SECONDS left need code
  shift 2
  [ -e "$WORK/checked.$name" ] && return
  [ -n "$ONLY" ] && [[ " $ONLY " != *" $name "* ]] && return
  for need in "$@"; do [ -e "$WORK/$need.done" ] || { echo "-- $name waits for $need"; return; }; done
  left=$((ALL - SECONDS))
  ((left >= 20)) || { echo "-- $name: only $left s are left"; return; }
  ((limit < left - 5)) || limit=$((left - 5))
  echo "== $name, at most $limit s"
  export LIMIT_S=$((limit - 5))
  (set -m; "$name" & pid=$!
    (sleep "$limit"; kill -TERM -- -$pid 2>/dev/null; sleep 3; kill -KILL -- -$pid 2>/dev/null) & timer=$!
    wait $pid; code=$?; kill -- -$timer 2>/dev/null; exit $code) >"$RESULTS/$name.log" 2>&1
  code=$?
  touch "$WORK/checked.$name"
  mkdir -p "$OUT" && tar -C "$WORK" -czf "$OUT/results.tar.gz" results
  case $name in samples | large) "$PY" "$KIT/summary.py" sessions-$name ;; originals | plans) "$PY" "$KIT/summary.py" $name ;;
    compiled) "$PY" "$KIT/summary.py" originals-compiled ;; *) tail -n 30 "$RESULTS/$name.log" | cut -c1-200 ;; esac
  ((code == 0)) || tail -n 5 "$RESULTS/$name.log" | cut -c1-300
  echo "== $name: code $code, $((SECONDS - begun)) s"
}

unpack
export PYTHONPATH="$SITE:$PWD:$PWD/runtime:$PWD/targets"
# The CUDA libraries of the torch that is installed: ONNX Runtime finds them here without torch.
LD_LIBRARY_PATH="$("$PY" -c 'import glob, sysconfig; print(":".join(sorted(glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib")) + glob.glob("/usr/local/cuda/lib64")))')${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export LD_LIBRARY_PATH
ONLY="$*"
SECONDS=0
check machine 40 base
check fill 120 bundles base
check samples 120 ort bundles base
check large 120 ort bundles base
check originals 60 bundles base
check plans 110 diffusers base
check pictures 40 ort bundles base
check verify 50 ort bundles base
check bench 70 ort bundles base
check compiled 160 bundles base
echo "== all: $SECONDS s; everything is in $OUT/results.tar.gz"
