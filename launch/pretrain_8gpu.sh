#!/usr/bin/env bash
# Pretrains on every GPU of this machine:
#
#   bash launch/pretrain_8gpu.sh [--config FILE] [key=value ...]
#
# Without --config it takes configs/geokr_resnet50.yaml. NGPU sets the number of processes (8; fewer where there are
# fewer GPUs). Without a GPU it trains on the CPU: NGPU processes that talk over gloo. data.global_batch is what an
# optimizer step sees whatever NGPU is. RESTARTS (1) is how often torchrun starts all processes again from the last
# checkpoint after one of them died.
set -euo pipefail
# shellcheck source=launch/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

case " $* " in
  *" -h "* | *" --help "*)
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  *" --config "* | *" --config="*) ;;
  *) set -- --config "$ROOT/configs/geokr_resnet50.yaml" "$@" ;;
esac
[[ ${NGPU:-8} =~ ^[1-9][0-9]*$ ]] || die "NGPU='$NGPU': expected a number of processes, 1 or more"

geokr_python
# the project need not be installed: a folder with a PYTHON that has the packages will do
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
check_modules "$PY" find || die "$PY cannot run geokr (above): make .venv with bash launch/quickstart.sh, or set PYTHON"
"$PY" "$ROOT/launch/preflight.py" "$@"
check_modules "$PY" find train ||
  die "$PY cannot train (above): $PY -m pip install -e '${ROOT}[train]' (drivers before 580: [train-cuda12]," \
    "docs/cluster.md), or bash launch/quickstart.sh"

read -r gpus cores < <("$PY" -c 'import os, torch
affinity = getattr(os, "sched_getaffinity", None)
print(torch.cuda.device_count(), len(affinity(0)) if affinity else os.cpu_count())')
processes=${NGPU:-8}
if [ "$gpus" -eq 0 ]; then
  [ -n "${NGPU:-}" ] || processes=$((cores < 8 ? cores : 8))
  say "no GPU here: training on the CPU with $processes process(es) over gloo, which is slow"
elif [ "$processes" -gt "$gpus" ]; then
  [ -z "${NGPU:-}" ] || die "NGPU=$NGPU, but this machine shows $gpus GPU(s): give NGPU=$gpus or fewer"
  processes=$gpus
  say "$gpus GPU(s) here: training with $processes process(es)"
fi

fitting=$("$PY" "$ROOT/launch/preflight.py" --fit "$processes" "$@")
if [ "$fitting" -ne "$processes" ]; then
  [ -z "${NGPU:-}" ] || die "NGPU=$NGPU: data.global_batch cannot be cut into as many parts; NGPU=$fitting could, or another batch"
  processes=$fitting
  say "data.global_batch cannot be cut into more equal parts: training with $processes process(es)"
fi

share=$((cores / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
# torchrun's own store outlives a restart, and new processes would find the addresses of dead ones in it: they hang or
# fail (pytorch/pytorch#135712). With a store of their own a killed process costs one restart.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# --standalone: a rendezvous of its own on a free port of this machine, so that several runs do not meet.
# supervise.py: a stop ends in a checkpoint, a torchrun that hangs or dies leaves no process behind.
exec "$PY" "$ROOT/launch/supervise.py" -- "$PY" -m torch.distributed.run --standalone --nproc-per-node "$processes" --max-restarts "${RESTARTS:-1}" \
  -m geokr.pretrain "$@"
