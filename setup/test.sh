#!/usr/bin/env bash
# Lint and the whole test suite; makes the environment where there is none. Four test processes, a file each at a time:
# many tests keep less than a core busy, and those on SLURM wait.
#
#   bash setup/test.sh                 # everything
#   bash setup/test.sh -k golden       # arguments for pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash setup/create_env.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
