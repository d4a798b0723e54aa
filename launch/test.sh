#!/usr/bin/env bash
# Every test, on a fresh machine too: makes .venv if need be, then runs pytest. Arguments go to pytest:
#
#   bash launch/test.sh -k demo -x
set -euo pipefail
# shellcheck source=launch/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

geokr_env pack train dev
cd "$ROOT"
exec "$PY" -m pytest "$@"
