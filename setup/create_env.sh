#!/usr/bin/env bash
# Makes the Python environment: .venv in the project's root, or a conda environment.
#
#   bash setup/create_env.sh                      # .venv with the tested versions
#   bash setup/create_env.sh --conda lingua       # a conda environment of that name
#   bash setup/create_env.sh --extras dev,eval    # what to install beside the core (default: dev)
#   PYTHON=/path/to/python3.12 bash setup/create_env.sh
#   sbatch setup/create_env.sh                    # the same as a SLURM job, from the project's root
#
# Run again it does nothing, unless pyproject.toml, setup/constraints.txt or the extras changed.
#SBATCH --job-name=create_env
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00
#SBATCH --output=create_env.%j.log
set -euo pipefail

# sbatch runs a copy of this file from its spool folder, so the path of the script says nothing there.
if [ -n "${SLURM_JOB_ID:-}" ] && [ -f "${SLURM_SUBMIT_DIR:-/nonexistent}/setup/create_env.sh" ]; then
  root=$SLURM_SUBMIT_DIR
else
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fi
cd "$root"
fail() { echo "create_env: $*" >&2; exit 1; }
[ -f pyproject.toml ] || fail "no pyproject.toml in $root; submit from the project's root"

conda_name="" extras=dev
while [ $# -gt 0 ]; do
  case $1 in
    --conda) [ $# -ge 2 ] || fail "--conda wants the environment's name"; conda_name=$2; shift 2 ;;
    --extras) [ $# -ge 2 ] || fail "--extras wants a list such as dev,eval"; extras=$2; shift 2 ;;
    -h|--help) sed -n '2,10s/^# \{0,1\}//p' "$root/setup/create_env.sh"; exit 0 ;;
    *) fail "unknown argument '$1'; see --help" ;;
  esac
done

if [ -n "$conda_name" ]; then
  command -v conda >/dev/null || fail "--conda was asked for, but there is no conda on the PATH"
  if ! conda run -n "$conda_name" python -c '' 2>/dev/null; then
    conda create -y -n "$conda_name" python=3.11
  fi
  prefix=$(conda run -n "$conda_name" python -c 'import sys; print(sys.prefix)')
  how="conda activate $conda_name"
else
  prefix=$root/.venv
  how="source .venv/bin/activate"
fi

stamp=$prefix/.lingua-installed
wanted=$( { echo "$extras $root"; cat pyproject.toml setup/constraints.txt; } | cksum)
if [ -x "$prefix/bin/python" ] && "$prefix/bin/python" -c '' 2>/dev/null && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  echo "environment: $prefix is up to date"
  exit 0
fi

if [ -z "$conda_name" ]; then
  python=${PYTHON:-}
  if [ -z "$python" ]; then
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
      if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        python=$candidate
        break
      fi
    done
  fi
  [ -n "$python" ] || fail "no Python 3.10 to 3.13 on the PATH; name one with PYTHON=/path/to/python3"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || fail "'$python' is not a Python 3.10 or newer"
  # --clear only where what lies there is not a working environment (moved, or cut off while it was made).
  if ! "$prefix/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "environment: making $prefix with $("$python" --version)"
    "$python" -m venv --clear "$prefix" || fail "python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
  fi
fi

echo "environment: installing the packages of setup/constraints.txt (a minute or several)"
rm -f "$stamp"
# pip does not know how long it will take; a line every few packages shows that it moves.
"$prefix/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c setup/constraints.txt -e ".[$extras]" |
  awk '
    /^Collecting/ { if (++found % 20 == 0) { print "environment: " found " packages found"; fflush() } }
    /^Installing collected/ { print "environment: unpacking " NF - 3 " packages"; fflush() }'
echo "$wanted" > "$stamp"
echo "environment: ready; $how"
