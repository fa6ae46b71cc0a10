#!/usr/bin/env bash
# The gateway from a zipapp, where __file__ names no file: it serves, and `selftest` and `doctor` find nothing wrong.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
gateway=
finish() { [ -z "$gateway" ] || kill "$gateway" 2>/dev/null || true; rm -rf "$work"; }
trap finish EXIT

mkdir "$work/tree"
cp "$here/../claude_gateway.py" "$work/tree/"
"$python" -m zipapp "$work/tree" --main claude_gateway:main --output "$work/gateway.pyz"
cd "$work" # away from the file itself
"$python" gateway.pyz selftest
"$python" gateway.pyz start --demo --port 0 --quiet > address &
gateway=$!
for _ in $(seq 100); do [ -s address ] && break; sleep 0.1; done
base=$(sed -n 's#.* on \(http.*\)/v1#\1#p' address)
# the demo stands for Claude, and for the gateway that runs on the port
HOME=$work ANTHROPIC_BASE_URL=$base ANTHROPIC_API_KEY=demo "$python" gateway.pyz doctor --port "${base##*:}"
