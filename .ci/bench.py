#!/usr/bin/env python3
"""How fast the gateway is.  It measures and prints; it never passes or fails.

    python3 .ci/bench.py                     all scenarios, against the gateway and directly
    python3 .ci/bench.py --quick             under a minute
    python3 .ci/bench.py --tls               the upstream speaks TLS (needs the openssl command)
    python3 .ci/bench.py --against URL       any other OpenAI-compatible server, in front of an upstream of its own
    python3 .ci/bench.py --nginx             nginx as a plain proxy beside them (needs the nginx command)
    python3 .ci/bench.py --json
    python3 .ci/bench.py --growth            what twice the work costs: time and memory of the translations

The load generator, the fake upstream and the gateway are processes of their own.  "direct" is the same load sent
straight to the fake upstream, in the Messages API's own format, so that a column can be read as a ratio: times move
with the machine, ratios and CPU per request less so.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
GATEWAY = os.path.join(HERE, "..", "claude_gateway.py")
WORDS = "The quick brown fox jumps over the lazy dog and runs on. "


# ---- the fake upstream

def event(kind: str, **fields) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), json.dumps(dict({"type": kind}, **fields)).encode())


START = event("message_start", message={
    "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-5-5", "content": [],
    "stop_reason": None, "usage": {"input_tokens": 10, "output_tokens": 1}}) + \
    event("content_block_start", index=0, content_block={"type": "text", "text": ""})
DELTA = event("content_block_delta", index=0, delta={"type": "text_delta", "text": WORDS})
END = event("content_block_stop", index=0) + event(
    "message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 9}) + \
    event("message_stop")


async def upstream(certificate: str | None) -> None:
    """Answers by the first word of the user's text: plain, burst N, drip N SECONDS, hold, silent; and with a fault:
    refuse STATUS, junk, cut."""
    closed: list[float] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length.group(1))) if length else b""
                if head.startswith(b"GET /closed"):
                    data = json.dumps(closed).encode()
                    closed.clear()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))
                elif head.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}")
                else:
                    await answer(body, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        orders = re.findall(rb"bench:(\w+) ?(\d*) ?([\d.]*)", body)
        kind, count, pause = orders[-1] if orders else (b"plain", b"", b"")

        def chunk(data: bytes) -> bytes:
            return b"%x\r\n%s\r\n" % (len(data), data)

        async def left() -> None:
            await reader.read(1)
            closed.append(time.time())
            raise ConnectionResetError

        if kind == b"silent":
            await left()
        if kind == b"refuse":
            writer.write(b"HTTP/1.1 %s Refused\r\ncontent-length: 2\r\n\r\n{}" % count)
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(chunk(START))
        if kind == b"hold":
            await writer.drain()
            await left()
        if kind in (b"junk", b"cut"):
            writer.write(chunk(DELTA + b"data: {nonsense\n\n" * (kind == b"junk")))
            await writer.drain()
            raise ConnectionResetError
        if kind == b"drip":
            for _ in range(int(count)):
                writer.write(chunk(DELTA))
                await writer.drain()
                await asyncio.sleep(float(pause))
        elif kind == b"burst":
            for _ in range(int(count) // 50):
                writer.write(chunk(DELTA * 50))
                await writer.drain()
        else:
            writer.write(chunk(DELTA))
        writer.write(chunk(END) + b"0\r\n\r\n")

    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context, backlog=2048, limit=1 << 26)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


# ---- the load generator

class Target:
    """Where the load goes: the gateway (or a peer) with chat completions, or the upstream itself with messages."""

    def __init__(self, url: str, native: bool, context: ssl.SSLContext | None = None) -> None:
        match = re.match(r"(https?)://([^:/]+):(\d+)(.*)", url)
        self.host, self.port, self.context = match.group(2), int(match.group(3)), context
        self.path = match.group(4) + ("/v1/messages" if native else "/chat/completions")
        self.native = native

    def request(self, order: str, stream: bool, padding: str = "") -> bytes:
        body = json.dumps({"model": "claude-sonnet-5-5", "max_tokens": 4096, "stream": stream or self.native,
                           "messages": [{"role": "user", "content": padding + order}]}).encode()
        return (b"POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nauthorization: Bearer x\r\n"
                b"x-api-key: x\r\nanthropic-version: 2023-06-01\r\ncontent-length: %d\r\n\r\n%s" %
                (self.path.encode(), len(body), body))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port, ssl=self.context, limit=1 << 26)


async def read_answer(reader: asyncio.StreamReader, on_piece=None) -> bytes:
    """One HTTP answer to its end; `on_piece` hears of each piece of a chunked one."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    if length:
        body = await reader.readexactly(int(length.group(1)))
    else:
        body = b""
        while True:
            size = int(await reader.readline(), 16)
            piece = await reader.readexactly(size + 2)
            if not size:
                break
            body += piece[:-2]
            if on_piece:
                on_piece(piece)
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise RuntimeError((head + body)[:500].decode("utf-8", "replace"))
    return body


async def one_by_one(target: Target, order: str, stream: bool, count: int, padding: str = "") -> dict:
    """Seconds to the first token and to the end, one client on one connection."""
    reader, writer = await target.connect()
    firsts, totals = [], []
    for _ in range(count):
        first: list[float] = []

        def on_piece(piece: bytes, first: list = first) -> None:
            if not first and b"quick" in piece:
                first.append(time.perf_counter())
        data = target.request(order, stream, padding)
        started = time.perf_counter()
        writer.write(data)
        await read_answer(reader, on_piece)
        totals.append(time.perf_counter() - started)
        firsts.append(first[0] - started if first else totals[-1])
    writer.close()
    return {"first": statistics.median(firsts), "total": statistics.median(totals)}


async def together(target: Target, clients: int, seconds: float) -> float:
    """Plain requests per second from several clients."""
    done, until = [0], time.perf_counter() + seconds

    async def client() -> None:
        reader, writer = await target.connect()
        while time.perf_counter() < until:
            writer.write(target.request("bench:plain", False))
            await read_answer(reader)
            done[0] += 1
        writer.close()
    await asyncio.gather(*(client() for _ in range(clients)))
    return done[0] / seconds


async def many_streams(target: Target, count: int, events: int, pause: float) -> dict:
    """Streams at the same time: how many arrived whole, how late their events came, how long the first took."""
    delays, firsts, whole = [], [], [0]

    async def client() -> None:
        times: list[float] = []
        try:
            reader, writer = await target.connect()
            started = time.perf_counter()
            writer.write(target.request("bench:drip %d %g" % (events, pause), True))
            body = await read_answer(
                reader, lambda piece: times.append(time.perf_counter()) if b"quick" in piece else None)
            writer.close()
        except (OSError, RuntimeError, ValueError, asyncio.IncompleteReadError):
            return
        if body.count(b"quick") == events:
            whole[0] += 1
        firsts.append(times[0] - started)
        delays.extend(max(0.0, later - earlier - pause) for earlier, later in zip(times, times[1:]))
    await asyncio.gather(*(client() for _ in range(count)))
    return {"whole": whole[0], "p99_delay": percentile(delays, 99), "first_p99": percentile(firsts, 99)}


async def drops(target: Target, upstream_port: int, context: ssl.SSLContext | None) -> dict:
    """Seconds from a client's leaving to the end of its call upstream, in the three places where it can leave."""
    results = {}
    for name, order, stream in (("streaming", "bench:hold", True), ("before first token", "bench:silent", True),
                                ("plain", "bench:silent", False)):
        times = []
        for _ in range(5):
            reader, writer = await target.connect()
            writer.write(target.request(order, stream))
            await (reader.readuntil(b"assistant") if order == "bench:hold" else asyncio.sleep(0.2))
            left = time.time()
            writer.transport.abort()
            for _ in range(200):
                await asyncio.sleep(0.005)
                scheme = "https" if context else "http"
                with urllib.request.urlopen("%s://127.0.0.1:%d/closed" % (scheme, upstream_port),
                                            context=context) as answer:
                    closed = json.load(answer)
                if closed:
                    times.append(max(0.0, closed[-1] - left))
                    break
        results[name] = statistics.median(times) if times else None
    return results


def percentile(values: list[float], share: float) -> float | None:
    return sorted(values)[min(len(values) - 1, int(len(values) * share / 100))] if values else None


# ---- processes

def cpu_seconds(pid: int) -> float:
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status_of(pid: int, name: str) -> int:
    with open("/proc/%d/status" % pid) as file:
        return int(re.search(r"%s:\s+(\d+)" % name, file.read()).group(1))


def start_upstream(certificate: str | None) -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--upstream", certificate or ""],
                               stdout=subprocess.PIPE)
    return process, int(process.stdout.readline())


def start_gateway(upstream_url: str, certificate: str | None) -> tuple[subprocess.Popen, str, float]:
    environment = dict(os.environ, ANTHROPIC_API_KEY="sk-ant-bench", ANTHROPIC_BASE_URL=upstream_url)
    environment.update({"SSL_CERT_FILE": certificate} if certificate else {})
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, GATEWAY, "start", "--port", "0"], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env=environment)
    url = re.search(r"http\S+", process.stdout.readline().decode()).group()
    return process, url, time.perf_counter() - started


NGINX = """daemon off; pid %(folder)s/pid; error_log stderr crit; worker_processes 1; worker_rlimit_nofile 8192;
events { worker_connections 4096; }
http { access_log off; client_body_temp_path %(folder)s/body; proxy_temp_path %(folder)s/proxy;
  fastcgi_temp_path %(folder)s/f; uwsgi_temp_path %(folder)s/u; scgi_temp_path %(folder)s/s;
  client_max_body_size 50m; client_body_buffer_size 16m; keepalive_requests 1000000;
  upstream claude { server 127.0.0.1:%(upstream)d; keepalive 64; keepalive_requests 1000000; }
  server { listen 127.0.0.1:%(port)d backlog=2048;
    location / {
      proxy_pass http://claude; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; } } }
"""


def start_nginx(upstream: int, folder: str) -> tuple[subprocess.Popen, str, int]:
    """nginx in front of the upstream: the process, its URL, and the worker whose figures count."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = os.path.join(folder, "nginx.conf")
    with open(place, "w") as file:
        file.write(NGINX % {"folder": folder, "upstream": upstream, "port": port})
    process = subprocess.Popen(["nginx", "-e", "stderr", "-c", place])
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    with open("/proc/%d/task/%d/children" % (process.pid, process.pid)) as file:
        worker = int(file.read().split()[0])
    return process, "http://127.0.0.1:%d" % port, worker


def json_seconds(text: str) -> float:
    """What nobody can do without who looks into a body with this text."""
    body = json.dumps({"content": text})
    return min(timeit.repeat(lambda: json.dumps(json.loads(body)), number=1, repeat=5))


def measure(target: Target, pid: int | None, upstream_port: int, context, quick: bool) -> dict:
    """All scenarios against one target; CPU, memory and threads where its process is ours."""
    run = asyncio.run
    results: dict = {}
    rounds = 200 if quick else 1000
    if pid:
        results["idle_mb"] = status_of(pid, "VmRSS") / 1024
    run(one_by_one(target, "bench:plain", False, 50))           # warm-up
    results["plain_p50"] = run(one_by_one(target, "bench:plain", False, rounds))["total"]
    results["first_p50"] = run(one_by_one(target, "bench:plain", True, rounds))["first"]
    before = cpu_seconds(pid) if pid else 0
    seconds = 3 if quick else 8
    results["requests_per_second"] = run(together(target, 32, seconds))
    if pid:
        results["cpu_per_request"] = (cpu_seconds(pid) - before) / (results["requests_per_second"] * seconds)
    streams, ticks = (300, 20) if quick else (1000, 100)
    before, threads = cpu_seconds(pid) if pid else 0, [0]
    amid = threading.Timer(ticks * 0.06, lambda: threads.append(status_of(pid, "Threads") if pid else 0))
    amid.start()
    results["streams"] = run(many_streams(target, streams, ticks, 0.1))
    amid.join()
    if pid:
        results["streams"].update(cpu_per_event=(cpu_seconds(pid) - before) / (streams * ticks), threads=threads[-1],
                                  peak_mb=status_of(pid, "VmHWM") / 1024)
    events = 20_000 if quick else 100_000
    before = cpu_seconds(pid) if pid else 0
    run(one_by_one(target, "bench:burst %d" % events, True, 1))
    if pid:
        results["cpu_per_burst_event"] = (cpu_seconds(pid) - before) / events
    with open(__file__, encoding="utf-8") as file:
        code = file.read()
    for name, text, size in (("1mb", WORDS, 1_000_000), ("8mb", WORDS, 8_000_000), ("code", code, 8_000_000)):
        padding = (text * (size // len(text) + 1))[:size]
        results["chat_" + name] = run(one_by_one(target, "bench:plain", False, 10, padding))["total"]
        if target.native and not pid:
            results["json_" + name] = json_seconds(padding)
    if not target.native:
        results["drops"] = run(drops(target, upstream_port, context))
    return results


# ---- growth

def growth_cases(gateway):
    """Name, size, and a function that does work of that size: each should cost twice as much at twice the size."""
    model = gateway.BUILT_IN_MODELS["claude-opus-5-5"]
    tool = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}

    def chat(**fields):
        translation = gateway.messages_request_from_chat(dict({"messages": [{"role": "user", "content": "Hi"}]},
                                                              **fields), model)
        gateway.messages_request_json(translation.request)

    def turns(count):
        chat(messages=[{"role": ("user", "assistant")[at % 2], "content": "Word %d" % at} for at in range(count)])

    def calls(count):
        chat(messages=[{"role": "user", "content": "Go"}] + [each for at in range(count) for each in (
            {"role": "assistant", "tool_calls": [{"id": "call_%d" % at, "type": "function", "function": {
                "name": "f", "arguments": '{"a": "b"}'}}]},
            {"role": "tool", "tool_call_id": "call_%d" % at, "content": "done"})])

    def tools(count):
        chat(tools=[{"type": "function", "function": {"name": "tool %d" % at, "parameters": tool, "strict": True}}
                    for at in range(count)])

    def arguments(size):
        chat(messages=[{"role": "user", "content": "Go"}, {"role": "assistant", "tool_calls": [{
            "id": "call_1", "type": "function", "function": {
                "name": "f", "arguments": json.dumps({"a": "b" * size})}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "done"}])

    def items(count):
        gateway.messages_request_from_responses({"input": [{"type": "message", "role": "user", "content": "Word"}
                                                           for _ in range(count)]}, model)

    def stream(kind, block, delta):
        def run(count):
            events = START.replace(b'{"type": "text", "text": ""}', json.dumps(block).encode())
            events += event("content_block_delta", index=0, delta=delta) * count + END
            assembler = gateway.MessageAssembler()
            plan = gateway.ReplyPlan(gateway.ToolNames())
            chunks = kind({"id": "x", "created": 1}, plan, assembler, False)
            for at in range(0, len(events), 60_000):
                for each in decoder.feed(events[at:at + 60_000]):
                    assembler.feed(each)
                    chunks.feed(each)
            chunks.finish()
        decoder = gateway.EventDecoder()
        return run

    text = ({"type": "text", "text": ""}, {"type": "text_delta", "text": "word "})
    call = ({"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}},
            {"type": "input_json_delta", "partial_json": " "})
    yield "messages", 2_000, turns
    yield "tool calls and results", 1_000, calls
    yield "tools", 500, tools
    yield "bytes of one call's arguments", 4_000_000, arguments
    yield "items of a Responses request", 2_000, items
    yield "text events, chat", 20_000, stream(gateway.ChatStream, *text)
    yield "text events, Responses", 20_000, stream(gateway.ResponseStream, *text)
    yield "fragments of arguments, chat", 20_000, stream(gateway.ChatStream, *call)
    yield "fragments of arguments, Responses", 20_000, stream(gateway.ResponseStream, *call)


def growth_table() -> str:
    """Time and peak memory at a size and at twice that size."""
    import tracemalloc
    sys.path.insert(0, os.path.dirname(GATEWAY))
    import claude_gateway
    lines = ["%-36s %10s %10s %10s %7s %10s %7s" % ("what", "size", "time", "twice", "ratio", "memory", "ratio")]
    for name, size, work in growth_cases(claude_gateway):
        seconds, peaks = [], []
        for count in (size, 2 * size):
            work(count)
            seconds.append(min(timed(work, count) for _ in range(5)))
            tracemalloc.start()
            work(count)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        lines.append("%-36s %10d %7.1f ms %7.1f ms %7.2f %7.1f MB %7.2f" % (
            name, size, seconds[0] * 1e3, seconds[1] * 1e3, seconds[1] / seconds[0], peaks[0] / 1e6,
            peaks[1] / peaks[0]))
    return "\n".join(lines)


def timed(work, count: int) -> float:
    started = time.process_time()
    work(count)
    return time.process_time() - started


# ---- the table

ROWS = (("plain reply p50, 1 client", "plain_p50", "ms"), ("first token p50, 1 client", "first_p50", "ms"),
        ("requests/s, 32 clients", "requests_per_second", ""), ("CPU per request", "cpu_per_request", "us"),
        ("streams whole", "streams.whole", ""),
        ("streams: p99 delay", "streams.p99_delay", "ms"), ("streams: first token p99", "streams.first_p99", "ms"),
        ("streams: CPU per event", "streams.cpu_per_event", "us"), ("streams: memory", "streams.peak_mb", "MB"),
        ("streams: threads", "streams.threads", ""), ("CPU per event in bursts", "cpu_per_burst_event", "us"),
        ("1 MB chat", "chat_1mb", "ms"), ("  json.loads + dumps of it", "json_1mb", "ms"),
        ("8 MB chat", "chat_8mb", "ms"), ("  json.loads + dumps of it", "json_8mb", "ms"),
        ("8 MB chat about code", "chat_code", "ms"), ("  json.loads + dumps of it", "json_code", "ms"),
        ("ready after", "ready", "ms"),
        ("idle memory", "idle_mb", "MB"), ("upstream closed: streaming", "drops.streaming", "ms"),
        ("upstream closed: before first token", "drops.before first token", "ms"),
        ("upstream closed: plain", "drops.plain", "ms"))
SCALES = {"ms": 1e3, "us": 1e6}


def value_at(results: dict, path: str):
    for name in path.split("."):
        results = (results or {}).get(name)
    return results


def table(columns: dict[str, dict]) -> str:
    names = list(columns)
    lines = ["%-38s" % "" + "".join("%16s" % name for name in names) + "%12s" % "last/first"]
    for title, path, unit in ROWS:
        values = [value_at(columns[name], path) for name in names]
        cells = ["-" if value is None else "%.4g %s" % (value * SCALES.get(unit, 1), unit) for value in values]
        ratio = "%.2f" % (values[-1] / values[0]) if len(values) > 1 and values[0] and values[-1] else ""
        lines.append("%-38s" % title + "".join("%16s" % cell for cell in cells) + "%12s" % ratio)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--nginx", action="store_true")
    parser.add_argument("--against", metavar="URL")
    parser.add_argument("--upstream", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.upstream is not None:
        asyncio.run(upstream(parsed.upstream or None))
        return
    if parsed.growth:
        print("Python %s\n%s" % (sys.version.split()[0], growth_table()))
        return
    with tempfile.TemporaryDirectory() as folder:
        certificate = context = None
        if parsed.tls:
            certificate = os.path.join(folder, "certificate.pem")
            subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", certificate, "-out",
                            certificate + ".crt", "-days", "2", "-subj", "/CN=localhost", "-addext",
                            "subjectAltName=IP:127.0.0.1"], check=True, stderr=subprocess.DEVNULL)
            with open(certificate + ".crt") as source, open(certificate, "a") as target_file:
                target_file.write(source.read())
            context = ssl.create_default_context(cafile=certificate)
        fake, port = start_upstream(certificate)
        base = "%s://127.0.0.1:%d" % ("https" if certificate else "http", port)
        gateway = nginx = None
        try:
            columns = {"direct": measure(Target(base, True, context), None, port, context, parsed.quick)}
            if parsed.nginx:
                nginx, url, worker = start_nginx(port, folder)
                columns["nginx"] = measure(Target(url, True), worker, port, context, parsed.quick)
            if parsed.against:
                columns["other"] = measure(Target(parsed.against.rstrip("/"), False), None, port, context, parsed.quick)
            else:
                gateway, url, ready = start_gateway(base, certificate)
                time.sleep(0.5)
                columns["gateway"] = dict(measure(Target(url, False), gateway.pid, port, context, parsed.quick),
                                          ready=ready)
        finally:
            for process in filter(None, (gateway, nginx, fake)):
                process.send_signal(signal.SIGTERM)
                process.wait(10)
    print(json.dumps(columns, indent=1) if parsed.json else "Python %s\n%s" % (sys.version.split()[0], table(columns)))


if __name__ == "__main__":
    main()
