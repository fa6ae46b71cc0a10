#!/usr/bin/env bash
# The README's nginx configuration in front of two gateways: a stream arrives piece by piece, a big body passes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
pids=()
finish() { [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true; rm -rf "$work"; }
trap finish EXIT

ports=($("$python" -c '
import socket
sockets = [socket.socket() for _ in range(3)]
for each in sockets: each.bind(("127.0.0.1", 0))
print(*(each.getsockname()[1] for each in sockets))'))
for port in "${ports[0]}" "${ports[1]}"; do
  "$python" "$here/../claude_gateway.py" start --demo --port "$port" --quiet > "$work/address-$port" &
  pids+=($!)
done
# nginx would leave a gateway alone for ten seconds that it finds down once
for _ in $(seq 100); do
  [ -s "$work/address-${ports[0]}" ] && [ -s "$work/address-${ports[1]}" ] && break
  sleep 0.1
done
{
  echo "daemon off; pid $work/pid; error_log stderr; events {}"
  echo "http { access_log off; client_body_temp_path $work/body; proxy_temp_path $work/proxy;"
  echo "fastcgi_temp_path $work/f; uwsgi_temp_path $work/u; scgi_temp_path $work/s;"
  awk '/^```nginx$/ {inside = 1; next} /^```$/ {inside = 0} inside' "$here/../README.md" |
    sed "s/45554/${ports[0]}/; s/45555/${ports[1]}/; s/45550/${ports[2]}/"
  echo "}"
} > "$work/nginx.conf"
nginx -e stderr -c "$work/nginx.conf" &
pids+=($!)

"$python" - "${ports[2]}" <<'EOT'
import http.client, json, sys, time

def ask(body):
    for _ in range(100):                            # until all three are up
        connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=20)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            response = connection.getresponse()
            if response.status != 502:
                return response
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit("nginx or the gateways did not come up")

hello = [{"role": "user", "content": "Hello"}]
stream = ask({"model": "sonnet", "messages": hello, "stream": True})
assert stream.status == 200 and stream.read().decode().endswith("data: [DONE]\n\n")
held = ask({"model": "sonnet", "stream": True, "messages": [
    {"role": "user", "content": "(simulation: begin an answer and never end it)"}]})
assert held.read1(65536).startswith(b"data: "), "the first chunk must not wait for the last"
held.close()
big = ask({"model": "sonnet", "messages": [{"role": "user", "content": "x" * 20000000}]})
assert big.status == 200, big.read()[:300]
print("nginx: streams pass piece by piece, and so does a body of 20 MB")
EOT
