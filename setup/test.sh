#!/usr/bin/env bash
# Lint and the whole test suite; makes the environment where there is none. Three test processes, a file each at a time:
# those on SLURM wait, but four of them on two cores disturb each other more than that saves.
#
#   bash setup/test.sh                 # everything
#   bash setup/test.sh -k golden       # arguments for pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash setup/create_env.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
