#!/usr/bin/env bash
# Compares the contract with what users have: the main branch, or, on main itself, the last change of the contract
# with what was there before it.
set -euo pipefail
cd "$(dirname "$0")/.."
buf=${BUF:-.venv/bin/buf}
main=$(git rev-parse --verify --quiet main || git rev-parse --verify --quiet origin/main || true)
if [ -z "$main" ]; then
    echo "breaking: this clone has no main branch to compare the contract with; fetch it" >&2
    exit 1
fi
base=$main
if [ "$(git rev-parse HEAD)" = "$main" ] && git diff --quiet HEAD -- proto; then
    last=$(git rev-list -1 HEAD -- proto)
    base=$(git rev-parse --verify --quiet "$last^" || true)
fi
if [ -z "$base" ] || ! git cat-file -e "$base:proto" 2>/dev/null; then
    echo "breaking: there is no earlier contract to compare with"
    exit 0
fi
"$buf" breaking --against ".git#ref=$base"
