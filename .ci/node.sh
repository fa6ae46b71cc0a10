#!/usr/bin/env bash
# Tools from npm against the gateway: OpenAI's package, the README's JavaScript example and the AI SDK against
# `start --demo`, Codex CLI against a scripted Claude.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
gateway=
finish() { [ -z "$gateway" ] || kill "$gateway" 2>/dev/null || true; rm -rf "$work"; }
trap finish EXIT

cp "$here"/*.mjs "$work/"
(cd "$work" && echo '{"private": true}' > package.json &&
  npm install --silent --no-fund --no-audit openai ai @ai-sdk/openai zod @openai/codex)

"$python" "$here/../claude_gateway.py" start --demo --port 0 --quiet > "$work/address" 2> "$work/log" &
gateway=$!
for _ in $(seq 100); do
  [ -s "$work/address" ] && break
  kill -0 "$gateway" 2>/dev/null || { cat "$work/log"; exit 1; }
  sleep 0.1
done
base=$(sed -n 's/.* on \(http.*\)/\1/p' "$work/address")

node "$work/node_sdk.mjs" "$base"
awk '/^```js$/ {inside = 1; next} /^```$/ {inside = 0} inside' "$here/../README.md" |
  sed "s#http://localhost:45554/v1#$base#" > "$work/readme.mjs"
node "$work/readme.mjs" | grep -q "simulated answer"
echo "node: the README's example runs as printed"
node "$work/ai_sdk.mjs" "$base"
"$python" "$here/codex.py" "$work/node_modules/.bin/codex"
