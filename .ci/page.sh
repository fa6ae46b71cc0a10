#!/usr/bin/env bash
# The status page in headless Chromium: its script runs under its own policy and fills in the numbers.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
gateway=
finish() { [ -z "$gateway" ] || kill "$gateway" 2>/dev/null || true; rm -rf "$work"; }
trap finish EXIT

"${PYTHON:-python3}" "$here/../claude_gateway.py" start --demo --port 0 --quiet > "$work/address" &
gateway=$!
for _ in $(seq 100); do [ -s "$work/address" ] && break; sleep 0.1; done
base=$(sed -n 's/.* on \(http.*\)\/v1/\1/p' "$work/address")
"${PYTHON:-python3}" -c '
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1][7:])
for name in ("sonnet", "sonnet", "no-such-model"):
    connection.request("POST", "/v1/chat/completions", json.dumps(
        {"model": name, "messages": [{"role": "user", "content": "Hello"}]}))
    connection.getresponse().read()' "$base"
timeout 60 chromium --headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$work/profile" --virtual-time-budget=4000 \
  --dump-dom "$base/" > "$work/page" 2> "$work/log"
for text in '<code id="base">'"$base"'/v1</code>' 'id="requests">3</b>' 'model_not_found' 'claude-sonnet-5-5' '>running</span>'; do
  grep -qF -- "$text" "$work/page" || { echo "the page does not show: $text"; head -c 3000 "$work/page"; exit 1; }
done
if grep -i 'content security policy' "$work/log"; then exit 1; fi
echo "page: its script runs under its policy and shows the numbers"
