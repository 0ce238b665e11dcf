# Sourced by demo.sh and test.sh: a virtual environment with the project in it, made once and again only when pyproject.toml changes.
#   source launchers/setup.sh EXTRAS     EXTRAS such as "demo" or "test,demo,kernels"
# DALLE_DS_VENV names another folder than .venv; PYTHON another interpreter.
# shellcheck shell=bash

TORCH_PIN="torch==2.13.0" # on a machine with CUDA the same pin is the CUDA build

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_venv=${DALLE_DS_VENV:-$_root/.venv}

_find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found; name one: PYTHON=/path/to/python3.11 bash $0" >&2
  return 1
}

_setup() {
  local extras=$1 wanted extra missing=""
  wanted="$TORCH_PIN $(cksum <"$_root/pyproject.toml")"
  for extra in ${extras//,/ }; do # one mark an extra: what the tests installed serves the demo too
    [ "$(cat "$_venv/.installed-$extra" 2>/dev/null)" = "$wanted" ] || missing=yes
  done
  if [ -x "$_venv/bin/python" ] && [ -z "$missing" ]; then
    return
  fi
  local python
  python=$(_find_python)
  echo "setting up $_venv ($extras); a few minutes the first time" >&2
  [ -x "$_venv/bin/python" ] || "$python" -m venv "$_venv"
  # pip would compile on one core; what only other versions of Python can compile stays as it is
  local compile=("$_venv/bin/python" -m compileall -qq -j 0 "$_venv"/lib/python3*/site-packages)
  local pip=("$_venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
  "${pip[@]}" --upgrade pip # Python's own copy may be years old, and takes a minute more to choose versions
  # torch first and alone: with none installed, a looser requirement of another package fetches gigabytes
  "$_venv/bin/python" -c "import torch" 2>/dev/null || "${pip[@]}" "$TORCH_PIN" "numpy>=2.0"
  "${compile[@]}" & # while pip looks for the others
  if ! "${pip[@]}" -e "$_root[$extras]"; then
    [[ $extras == *,kernels* ]] || return 1
    "${pip[@]}" -e "$_root[${extras/,kernels/}]"
    echo "could not install triton: tests of kernels for GPUs are skipped" >&2
  fi
  case ",$extras," in
    # the reference dVAE, and FID's Inception: what they are used for here needs none of their own requirements
    *,test,*) "${pip[@]}" --no-deps "dall-e==0.1" "torch-fidelity>=0.4,<0.5" ;;
  esac
  wait $! || true
  "${compile[@]}" || true
  for extra in ${extras//,/ }; do
    echo "$wanted" >"$_venv/.installed-$extra"
  done
}

_setup "$1"
export PATH="$_venv/bin:$PATH"
