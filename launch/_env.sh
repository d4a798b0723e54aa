# Sourced by the launchers: finds or makes the Python environment.
#
#   geokr_python              sets PY: $PYTHON, else .venv/bin/python, else python3; installs nothing
#   geokr_env EXTRA...        sets PY to a Python that has geokr with these extras (of pyproject.toml)
#
# geokr_env makes .venv in the repository's root with Python 3.11 or newer and pip, and nothing of the system's. It
# installs when pyproject.toml changed since it last did, else it takes milliseconds. An install that was cut short is
# repaired by the next run; two at once wait for each other. With PYTHON set it uses that one as it is.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMPS=$VENV/geokr-installed # one file an extra, holding the hash of the pyproject.toml it was installed from
UNFINISHED=$VENV/geokr-unfinished # there while pip works

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# Python 3.11 or newer that runs (a shim of a version manager may not).
recent_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

geokr_python() {
  if [ -n "${PYTHON:-}" ]; then
    PY=$PYTHON
  elif [ -x "$VENV/bin/python" ]; then
    PY=$VENV/bin/python
  else
    PY=python3
  fi
  case $PY in
    /*) ;;
    */*) PY=$PWD/$PY ;; # the launchers go to other folders
  esac
  recent_python "$PY" || die "'$PY' is not a Python of version 3.11 or newer that runs:" \
    "set PYTHON to one, or make .venv with: bash launch/quickstart.sh"
}

# The first Python of the system that will do.
system_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if recent_python "$name"; then
      printf '%s' "$name"
      return
    fi
  done
  die "geokr needs Python 3.11 or newer, found: $(python3 --version 2>&1 || true)." \
    "Install one (python.org, your distribution, uv, conda), or set PYTHON to it"
}

# Makes an empty .venv with pip in it, also where ensurepip is missing, as in Debian without python3-venv.
make_venv() {
  local base site
  base=$(system_python)
  say "making .venv with $("$base" --version 2>&1)"
  if "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 && "$base" -m venv --clear "$VENV" >/dev/null 2>&1; then
    return
  fi
  "$base" -m venv --clear --without-pip "$VENV" || die "cannot make a virtual environment in $VENV"
  site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$base" -m pip --disable-pip-version-check --no-input install -q --target "$site" pip </dev/null ||
    die "$base has no pip to begin with: install pip for it, or set PYTHON to a Python that has it"
}

# What pip says, cut down to the packages that take a while and the end.
show_progress() {
  awk '/^ *Downloading .*\(([0-9.]+ GB|[0-9][0-9][0-9][0-9.]* MB)\)/ { print "  downloading " $2 " " $3 " " $4 }
       /^Installing collected packages/ { print "  unpacking " NF - 3 " packages" }
       { fflush() }' >&2
}

pip_install() {
  local log=$1
  shift
  # what the user's own settings say about where to install does not hold for .venv
  env -u PIP_USER -u PIP_TARGET -u PIP_PREFIX -u PIP_REQUIRE_VIRTUALENV -u PYTHONPATH -u PYTHONHOME \
    "$VENV/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off "$@" \
    </dev/null 2>&1 | tee "$log" | show_progress
}

hash_of_project() {
  "$VENV/bin/python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version.split()[0])' "$ROOT/pyproject.toml"
}

# Whether .venv has all these extras as pyproject.toml now wants them.
is_installed() {
  local extra hash
  [ -x "$VENV/bin/python" ] && [ ! -e "$UNFINISHED" ] && hash=$(hash_of_project 2>/dev/null) || return 1
  for extra in "$@"; do
    [ "$(cat "$STAMPS/$extra" 2>/dev/null)" = "$hash" ] || return 1
  done
}

# The modules of these extras, and how to tell whether they are there: find says which are missing without loading
# them, import loads them and so finds half-written ones.
check_modules() {
  local python=$1 how=$2 extra modules="numpy pydantic yaml"
  shift 2
  for extra in "$@"; do
    case $extra in
      pack) modules="$modules rasterio numba google_crc32c simplejpeg lz4 pyarrow pystac tqdm" ;;
      train) modules="$modules torch torchvision timm safetensors tensorboard matplotlib numba lz4 tqdm torchmetrics simplejpeg google_crc32c" ;;
      dev) modules="$modules pytest hypothesis tfrecord distributed geopandas selenium onnxruntime" ;;
    esac
  done
  # shellcheck disable=SC2086  # a list of words
  (cd "$ROOT" && "$python" -c 'import importlib, importlib.util, sys
how, *names = sys.argv[1:]
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("missing: " + ", ".join(missing))
if how == "import":
    if "torch" in names and importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        names.append("nvidia.dali")
    for name in names:
        importlib.import_module(name)' "$how" $modules)
}

install() {
  local extra log list failed=0 started=$SECONDS
  log=$ROOT/.cache/pip.log
  list=$(IFS=,; printf '%s' "$*")
  if [ -e "$UNFINISHED" ]; then
    say "the last install was cut short: beginning afresh (what was downloaded is kept)"
    make_venv
  elif ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    make_venv
  fi
  : >"$UNFINISHED"
  say "installing geokr[$list]: the first time about 7 GB of packages, a minute or several (log: $log)"
  pip_install "$log" -e "${ROOT}[$list]" || failed=$?
  if [ "$failed" -ne 0 ]; then
    [ "$failed" -gt 128 ] || rm -f "$UNFINISHED" # pip gave up in order, it was not killed: nothing is half-written
    tail -n 20 "$log" >&2
    die "pip could not install geokr[$list]; its last lines are above, all of them in $log"
  fi
  check_modules "$VENV/bin/python" import "$@" ||
    die "everything was installed but does not load (above); remove $VENV and run again"
  mkdir -p "$STAMPS"
  for extra in "$@"; do
    hash_of_project >"$STAMPS/$extra"
  done
  rm -f "$UNFINISHED"
  say "environment ready after $((SECONDS - started)) s"
}

geokr_env() {
  if [ -n "${PYTHON:-}" ]; then
    geokr_python
    check_modules "$PY" find "$@" ||
      die "PYTHON=$PYTHON lacks packages (above): $PYTHON -m pip install -e '${ROOT}[$(IFS=,; printf '%s' "$*")]'" \
        "(drivers before 580: train-cuda12 in place of train, docs/cluster.md), or unset PYTHON to have .venv made"
    return
  fi
  PY=$VENV/bin/python
  is_installed "$@" && return
  mkdir -p "$ROOT/.cache"
  exec 9>"$ROOT/.cache/env.lock"
  if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
    say "another run is installing; waiting for it"
    flock 9
  fi
  is_installed "$@" || install "$@"
  exec 9>&-
}
