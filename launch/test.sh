#!/usr/bin/env bash
# Every test, on a fresh machine too: makes .venv if need be, then runs pytest. Arguments go to pytest:
#
#   bash launch/test.sh -k demo -x
#
# Files of tests run side by side, in as many processes as there are cores, four at most, with one thread each; -n says
# otherwise, and -n0, -s and --pdb run them one after the other.
set -euo pipefail
# shellcheck source=launch/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

geokr_env pack train dev
cd "$ROOT"
cores=$("$PY" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
beside=(-n "$((cores < 4 ? cores : 4))")
for argument in "$@"; do
  case $argument in
    -n* | --numprocesses* | --dist*) beside=() ;;
    -s | --capture=no | --pdb) beside=(-n0) ;;
  esac
done
if [ "$cores" -gt 1 ] && [[ " ${beside[*]} $* " != *" -n0 "* ]]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
exec "$PY" -m pytest ${beside[@]+"${beside[@]}"} --dist loadfile --no-loadscope-reorder "$@"
