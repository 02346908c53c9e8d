#!/usr/bin/env bash
# Collects the wheels of the server image in dist/wheels, for image builds without a package index.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
grep -v '^-e' requirements/run.txt >dist-constraints.txt
trap 'rm -f dist-constraints.txt' EXIT
mkdir -p dist/wheels
"$PYTHON" -m pip download -q -d dist/wheels -c dist-constraints.txt ".[server,numba]" "hatchling>=1.27"
rm -f dist/wheels/optserve-*
