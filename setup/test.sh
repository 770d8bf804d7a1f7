#!/usr/bin/env bash
# Lint and the test suite; makes the environment where there is none. How long each test took is left in
# build/tests.txt, and in build/tests.xml, as CI systems read it.
#
#   bash setup/test.sh                             # everything but the tests marked long
#   bash setup/test.sh --long                      # everything
#   bash setup/test.sh tests/lingua/test_data.py   # arguments for pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash setup/create_env.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Three processes on two cores: one of them waits for SLURM, and runs all tests on it. Which process runs what:
# tests/conftest.py (`OneQueue`).
WORKERS=3
.venv/bin/python -m pytest --numprocesses "$WORKERS" --dist loadscope --no-loadscope-reorder --junitxml build/tests.xml "$@"
