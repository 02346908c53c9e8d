#!/usr/bin/env bash
# Runs tests under the Python of Debian 12, 3.11.2, in a container: scripts/test-debian.sh [arguments of pytest]
# The packages are those of .venv, whose Python must be of the same minor version, 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
engine=${ENGINE:-$(if docker info >/dev/null 2>&1; then echo docker; else echo podman; fi)}
export CONTAINERS_CONF=${CONTAINERS_CONF:-${XDG_CACHE_HOME:-$HOME/.cache}/optserve/containers/containers.conf}
[ $# -gt 0 ] || set -- -n 2 --dist loadgroup --ignore tests/numerics/test_device.py -m "not mnist and not containers and not quiet and not node" \
    tests/durability tests/golden tests/transaction tests/numerics tests/service tests/client

# Where scripts/podman.sh has made the base image, its Python is Debian's.
image=$(sed -n 's/^ARG BASE=//p' Dockerfile)
if ! "$engine" run --rm --entrypoint sh "$image" -c 'test -x /usr/bin/python3' >/dev/null 2>&1; then
    image=optserve-debian
    "$engine" build --quiet --tag "$image" - >/dev/null <<END
FROM docker.io/library/debian:bookworm-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
END
fi
packages=$(.venv/bin/python -c 'import pathlib, pytest; print(pathlib.Path(pytest.__file__).parents[1])')
minor=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# A virtual environment within the container, whose packages are borrowed, so that programs find each other as usual.
# shellcheck disable=SC2016 # for the shell in the container
"$engine" run --rm --interactive --volume "$PWD:/src:ro" --volume "$packages:/packages:ro" --volume /tmp --workdir /src \
    --entrypoint sh "$image" -c '
    set -eu
    /usr/bin/python3 -m venv --without-pip /tmp/venv
    printf "%s\n" /src/client/python /src/server /packages >"$(echo /tmp/venv/lib/python*/site-packages)/borrowed.pth"
    printf "#!/tmp/venv/bin/python\nfrom optserve_command import main\nmain()\n" >/tmp/venv/bin/optserve
    chmod +x /tmp/venv/bin/optserve
    minor=$1; shift
    /tmp/venv/bin/python -c "import sys; print(\"Python\", sys.version)"
    /tmp/venv/bin/python -c "import sys; sys.exit(\"%d.%d\" % sys.version_info[:2] != \"$minor\")" ||
        { echo "test-debian: .venv is of Python $minor; make it with PYTHON=python3.11" >&2; exit 1; }
    export PYTHONDONTWRITEBYTECODE=1 PYTHONUTF8=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
    # Those of the simulated device need a C compiler, which the image lacks, and say nothing of the Python.
    exec /tmp/venv/bin/python -m pytest -p no:cacheprovider -k "not simulated" "$@"
' sh "$minor" "$@"
