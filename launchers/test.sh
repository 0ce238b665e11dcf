#!/usr/bin/env bash
# Set up what the tests need and run them all: style, import rules, pytest. Twenty to thirty-five minutes on two cores, by their speed.
#   bash launchers/test.sh [PYTEST OPTIONS]     e.g. tests/ops, or -k masks, or -m "not launch"
set -euo pipefail
case ${1:-} in
  -h | --help) sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/setup.sh test,demo,kernels
# many small matrix products beside several ranks: more threads only get in each other's way
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same files
export PYTHONPATH=$PWD/tests/launched${PYTHONPATH:+:$PYTHONPATH} # and need not import what DeepSpeed alone asks for
ruff check .
ruff format --check .
lint-imports
# in the order of tests/conftest.py, the longest first
status=0
python -m pytest -n 4 --dist loadfile --no-loadscope-reorder "$@" || status=$?
[ $status = 1 ] || exit $status
# A machine that is busy with other things breaks a time limit now and then: up to three failed tests run once more, alone. What is
# wrong with the code fails again.
failed=$(python -m pytest --last-failed --collect-only -q "$@" | grep "::")
[ "$(wc -l <<<"$failed")" -le 3 ] || exit 1
printf '\n=== failed beside other tests; now alone:\n%s\n' "$failed"
python -m pytest --last-failed "$@"
printf '\n=== passed alone, but failed beside other tests; please report them with the output above:\n%s\n' "$failed"
