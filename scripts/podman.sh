#!/usr/bin/env bash
# Makes containers possible for the tests on a machine without a Docker engine: podman from Debian, and the base
# image of the Dockerfile made with debootstrap where no registry answers. Does nothing where it is not needed.
# Needs root and Debian; elsewhere it says so and the tests report what is missing.
set -euo pipefail

folder=${XDG_CACHE_HOME:-$HOME/.cache}/optserve/containers
base=$(sed -n 's/^ARG BASE=//p' "$(dirname "$0")/../Dockerfile")
export CONTAINERS_CONF=$folder/containers.conf

if docker info >/dev/null 2>&1; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "containers: there is no Docker engine, and podman can be set up by root on Debian only" >&2
    exit 0
fi
# iptables is what netavark, podman's network, calls.
packages=(podman runc netavark aardvark-dns iptables debootstrap)
if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    echo "containers: installing ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi
mkdir -p "$folder"
# Within a sandbox the default limits can be above what is allowed.
cat >"$CONTAINERS_CONF" <<END
[engine]
runtime = "runc"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
END
if podman image exists "$base" || timeout 60 podman pull -q "$base" >/dev/null 2>&1; then
    exit 0
fi
echo "containers: no registry answers; making $base with debootstrap"
# This machine's own Debian mirror, if it names one.
mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true; } |
    sed -nE 's#^(URIs:|deb( \[[^]]*\])?) *(https?://[^ ]*/debian)/?( .*)?$#\3#p' | head -n 1)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" ${mirror:+"$mirror"} >"$folder/debootstrap.log"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar -C "$root" -c . | podman import - "$base" >/dev/null
