#!/usr/bin/env bash
# Generates the Python stubs from the contract into client/python (or the folder given).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-client/python}
bin=$(dirname "${PYTHON:-.venv/bin/python}")
PATH="$bin:$PATH" "$bin/python" -m grpc_tools.protoc -Iproto \
    --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" \
    proto/optserve/v1/*.proto
# Files without a service have no gRPC code.
find "$out/optserve/v1" -name '*_pb2_grpc.py*' ! -name 'service_pb2_grpc.py*' -delete
touch "$out/optserve/v1/__init__.py"
