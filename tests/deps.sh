#!/usr/bin/env bash
# Installs the packages of apt.txt that are missing when run as root; otherwise names them and goes on, since the tests
# that need them skip by name. Takes the Python to probe in $PYTHON.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
missing=()
while read -r package probe; do
    [[ -z $package || $package == \#* ]] && continue
    bash -c "$probe" >/dev/null 2>&1 </dev/null || missing+=("$package")
done <"$here/apt.txt"
if [[ ${#missing[@]} -eq 0 ]]; then
    exit 0
fi
if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null; then
    echo "make deps: missing and not installed (needs root and apt-get): ${missing[*]}" >&2
    exit 0
fi
echo "make deps: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get -qq update && apt-get -qq install -y --no-install-recommends "${missing[@]}"; }; then
    echo "make deps: apt-get could not install: ${missing[*]}; the tests that need them will be skipped" >&2
fi
