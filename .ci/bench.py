#!/usr/bin/env python3
"""How fast the gateway is.  It measures and prints; it never passes or fails.

    python3 .ci/bench.py                     all scenarios, against the gateway and directly
    python3 .ci/bench.py --quick             under a minute
    python3 .ci/bench.py --tls               the upstream speaks TLS (needs the openssl command)
    python3 .ci/bench.py --gateway FILE      another copy of claude_gateway.py
    python3 .ci/bench.py --against X ...     others beside it: each a copy of claude_gateway.py, a command such as
                                             "python3 .ci/bare.py {port} {upstream} --loop", or the URL of a server
                                             in front of an upstream of its own
    python3 .ci/bench.py --nginx             nginx as a plain proxy beside them (needs the nginx command)
    python3 .ci/bench.py --json
    python3 .ci/bench.py --growth            what twice the work costs: time and memory of the translations
    python3 .ci/bench.py --instructions      what a request and an event cost, beside .ci/bare.py (needs valgrind)

The load generator, the fake upstream and the gateway are processes of their own.  "direct" is the same load sent
straight to the fake upstream, in the Messages API's own format.  Times move with the machine, so all columns take turns
in one run, and beside each stands the ratio of the gateway's value to it.  Instructions hardly move at all.
"""
from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import importlib
import itertools
import json
import math
import os
import py_compile
import re
import shlex
import shutil
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
from collections.abc import Sequence

HERE = os.path.dirname(os.path.abspath(__file__))
GATEWAY = os.path.join(HERE, "..", "claude_gateway.py")
BARE = shlex.join([sys.executable, os.path.join(HERE, "bare.py")]) + " {port} {upstream}"
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

WHOLE = json.dumps({
    "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-5-5", "stop_reason": "end_turn",
    "stop_sequence": None, "content": [{"type": "text", "text": WORDS}],
    "usage": {"input_tokens": 10, "output_tokens": 9}}).encode()


async def upstream(certificate: str | None) -> None:
    """Answers by the first word of the user's text: plain, burst N (SIZE), drip N SECONDS, hold, silent; and with a
    fault: refuse STATUS, junk, cut."""
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
        if not re.search(rb'"stream": ?true', body):    # the gateway itself always asks for a stream, others may not
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" %
                         (len(WHOLE), WHOLE))
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
            size = int(pause or 50)
            for _ in range(int(count) // size):
                writer.write(chunk(DELTA * size))
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
        body = bytearray()
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Returns when the process accepts connections."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.002)
    raise RuntimeError("%s ended with %d" % (shlex.join(process.args), process.returncode))


def start_gateway(upstream_url: str, certificate: str | None, what: str = GATEWAY,
                  under: tuple = ()) -> tuple[subprocess.Popen, str, float]:
    """Starts a copy of claude_gateway.py or a command: the process, its URL, the seconds until it accepts.

    CPU, memory and threads are read from this process: a command should not leave the work to a child.
    """
    port = free_port()
    command = what if "{port}" in what else shlex.join([sys.executable, what, "start", "--port", "{port}"])
    words = [word.replace("{port}", str(port)).replace("{upstream}", upstream_url) for word in shlex.split(command)]
    own = os.path.join(tempfile.gettempdir(), "claude-gateway-bench-%d" % os.getuid(), "tokens.json")
    environment = dict(os.environ, PYTHONHASHSEED="0", ANTHROPIC_API_KEY="sk-ant-bench",
                       ANTHROPIC_BASE_URL=upstream_url, CLAUDE_GATEWAY_TOKEN_FILE=own)   # its usage is nobody's usage
    environment.update({"SSL_CERT_FILE": certificate} if certificate else {})
    started = time.perf_counter()
    process = subprocess.Popen([*under, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    wait_for(port, process)
    return process, "http://127.0.0.1:%d/v1" % port, time.perf_counter() - started


def stop(processes: list) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait(60)


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
    port = free_port()
    place = os.path.join(folder, "nginx.conf")
    with open(place, "w") as file:
        file.write(NGINX % {"folder": folder, "upstream": upstream, "port": port})
    process = subprocess.Popen(["nginx", "-e", "stderr", "-c", place])
    wait_for(port, process)
    with open("/proc/%d/task/%d/children" % (process.pid, process.pid)) as file:
        worker = int(file.read().split()[0])
    return process, "http://127.0.0.1:%d" % port, worker


# ---- seconds

class Column:
    """One of those that are measured side by side; `pid`: its process, where that is ours to look at."""

    def __init__(self, name: str, target: Target, pid: int | None = None, ready: float | None = None) -> None:
        self.name, self.target, self.pid = name, target, pid
        self.values: dict[str, list] = {"ready": [ready]} if ready else {}

    def cpu(self) -> float:
        return cpu_seconds(self.pid) if self.pid else math.nan

    def status(self, name: str) -> float:
        return status_of(self.pid, name) if self.pid else math.nan

    def results(self) -> dict[str, float]:
        """Of several rounds the one in the middle; of streams that arrived whole the worst."""
        return {name: (min if name == "streams whole" else statistics.median)(values)
                for name, values in self.values.items() if values[0] == values[0]}


def json_seconds(text: str) -> float:
    """What nobody can do without who looks into a body with this text."""
    body = json.dumps({"content": text})
    return min(timeit.repeat(lambda: json.dumps(json.loads(body)), number=1, repeat=5))


def one_client(column: Column, quick: bool) -> dict:
    count = 200 if quick else 400
    asyncio.run(one_by_one(column.target, "bench:plain", False, 50))        # warm-up
    return {"plain reply p50": asyncio.run(one_by_one(column.target, "bench:plain", False, count))["total"],
            "first token p50": asyncio.run(one_by_one(column.target, "bench:plain", True, count))["first"]}


def many_clients(column: Column, quick: bool) -> dict:
    before, seconds = column.cpu(), 3 if quick else 4
    rate = asyncio.run(together(column.target, 32, seconds))
    return {"requests/s": rate, "CPU per request": (column.cpu() - before) / (rate * seconds)}


def streams(column: Column, quick: bool) -> dict:
    count, ticks = (300, 20) if quick else (1000, 100)
    before, threads = column.cpu(), []
    amid = threading.Timer(ticks * 0.06, lambda: threads.append(column.status("Threads")))
    amid.start()
    results = asyncio.run(many_streams(column.target, count, ticks, 0.1))
    amid.join()
    return {"streams whole": results["whole"], "streams: p99 delay": results["p99_delay"],
            "streams: first token p99": results["first_p99"],
            "streams: CPU per event": (column.cpu() - before) / (count * ticks), "streams: threads": threads[0],
            "streams: memory": column.status("VmHWM") / 1024}


def bursts(column: Column, quick: bool) -> dict:
    before, events = column.cpu(), 20_000 if quick else 50_000
    asyncio.run(one_by_one(column.target, "bench:burst %d" % events, True, 1))
    return {"CPU per event in bursts": (column.cpu() - before) / events}


def big_chats(column: Column, quick: bool) -> dict:
    results = {}
    with open(__file__, encoding="utf-8") as file:
        code = file.read()
    for name, text, size in (("1 MB chat", WORDS, 1_000_000), ("8 MB chat", WORDS, 8_000_000),
                             ("8 MB chat about code", code, 8_000_000)):
        padding = (text * (size // len(text) + 1))[:size]
        results[name] = asyncio.run(one_by_one(column.target, "bench:plain", False, 5, padding))["total"]
        if column.name == "direct":
            results["  json.loads + dumps of " + name] = json_seconds(padding)
    return results


SCENARIOS = (one_client, many_clients, streams, bursts, big_chats)      # memory of streams before what bursts leave


def measure(columns: list[Column], upstream_port: int, context, quick: bool) -> None:
    """All scenarios, one after the other, in each of them all columns in turn."""
    for column in columns:
        column.values["idle memory"] = [column.status("VmRSS") / 1024]
    for scenario in SCENARIOS:
        for _ in range(1 if quick else 3):
            for column in columns:
                for name, value in scenario(column, quick).items():
                    column.values.setdefault(name, []).append(value)
    for column in columns:
        if not column.target.native:
            for name, value in asyncio.run(drops(column.target, upstream_port, context)).items():
                column.values["upstream closed: " + name] = [value]


# ---- instructions

async def two_bursts(target: Target, count: int) -> None:
    await asyncio.gather(*(one_by_one(target, "bench:burst %d 16" % count, True, 1) for _ in range(2)))


# what, its load, a small and a large amount of it, how many are measured by each
LOADS = (("plain reply", lambda target, count: one_by_one(target, "bench:plain", False, count), 50, 250, 1),
         ("stream of 20 events, each in its own write",
          lambda target, count: one_by_one(target, "bench:drip 20 0", True, count), 50, 250, 1),
         ("text delta in a burst, 16 to a write", two_bursts, 1_008, 4_000, 2),
         ("event of 40 slow streams", lambda target, count: many_streams(target, 40, count, 1.2), 10, 40, 40))


def instructions(what: str, upstream_url: str, folder: str) -> dict[str, float]:
    """Instructions of each load: what the large amount takes beyond the small one, for one of them."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        if "{port}" not in what:                    # compiling is slow there
            what = py_compile.compile(what, os.path.join(place, "gateway.pyc"), doraise=True)
        process, url, _ = start_gateway(upstream_url, None, what, (
            "valgrind", "-q", "--tool=callgrind", "--callgrind-out-file=%s/counts" % place))
        target, parts, results = Target(url, False), itertools.count(1), {}

        def counted(load, amount: int) -> int:
            asyncio.run(load(target, amount))
            subprocess.run(["callgrind_control", "--dump", str(process.pid)], check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
            with open("%s/counts.%d" % (place, next(parts))) as file:
                return int(re.search(r"(?m)^totals: (\d+)", file.read()).group(1))
        try:
            counted(LOADS[0][1], 20)                # warm-up, and what the start took
            for name, load, small, large, each in LOADS:
                before = counted(load, small)
                results[name] = (counted(load, large) - before) / (large - small) / each
        finally:
            stop([process])
    return results


def instructions_table(gateways: dict[str, str], as_json: bool) -> str:
    """All gateways at the same time: instructions do not mind, and most of the time goes into waiting."""
    if not shutil.which("callgrind_control"):
        return "skipped: no valgrind here"
    fake, port = start_upstream(None)
    try:
        with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor() as pool:
            columns = dict(zip(gateways, pool.map(
                lambda what: instructions(what, "http://127.0.0.1:%d" % port, folder), gateways.values())))
    finally:
        stop([fake])
    return printed(columns, [(name, 1e-3, "k") for name, *_ in LOADS], as_json)


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


def growth_table(path: str) -> str:
    """Time and peak memory at a size and at twice that size."""
    import tracemalloc
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    gateway = importlib.import_module(os.path.basename(path)[:-3])
    lines = ["%-36s %10s %10s %10s %7s %10s %7s" % ("what", "size", "time", "twice", "ratio", "memory", "ratio")]
    for name, size, work in growth_cases(gateway):
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

MS, US, MB = (1e3, "ms"), (1e6, "us"), (1, "MB")
ROWS = (("plain reply p50", *MS), ("first token p50", *MS), ("requests/s", 1, ""), ("CPU per request", *US),
        ("streams whole", 1, ""), ("streams: p99 delay", *MS), ("streams: first token p99", *MS),
        ("streams: CPU per event", *US), ("streams: memory", *MB), ("streams: threads", 1, ""),
        ("CPU per event in bursts", *US), ("1 MB chat", *MS), ("  json.loads + dumps of 1 MB chat", *MS),
        ("8 MB chat", *MS), ("  json.loads + dumps of 8 MB chat", *MS), ("8 MB chat about code", *MS),
        ("  json.loads + dumps of 8 MB chat about code", *MS), ("ready", *MS), ("idle memory", *MB),
        ("upstream closed: streaming", *MS), ("upstream closed: before first token", *MS),
        ("upstream closed: plain", *MS))


def printed(columns: dict[str, dict], rows: Sequence[tuple[str, float, str]], as_json: bool) -> str:
    """A table; beside each column but the first, the ratio of the first one's value to this one's."""
    if as_json:
        return json.dumps(columns, indent=1)
    first, *others = columns
    names = [re.sub(r" *{\w+}", "", name)[-21:] for name in others]
    lines = ["Python %s" % sys.version.split()[0],
             "%-46s%12s" % ("", first) + "".join("%22s%8s" % (name, "ratio") for name in names)]
    for title, scale, unit in rows:
        values = [columns[name].get(title) for name in columns]
        cells = ["-" if value is None else "%.4g %s" % (value * scale, unit) for value in values]
        ratios = ["%.2f" % (values[0] / value) if values[0] and value else "" for value in values[1:]]
        lines.append("%-46s%12s" % (title, cells[0]) + "".join("%22s%8s" % pair for pair in zip(cells[1:], ratios)))
    return "\n".join(lines)


def started(parsed: argparse.Namespace, folder: str, port: int, certificate: str | None, context,
            processes: list) -> list[Column]:
    """The gateway, the upstream itself and the others, each ready for its load."""
    base, columns = "%s://127.0.0.1:%d" % ("https" if certificate else "http", port), []
    for name, what in {"gateway": parsed.gateway, **{what: what for what in parsed.against}}.items():
        if re.match("https?://", what):
            columns.append(Column(name, Target(what.rstrip("/"), False)))
            continue
        process, url, ready = start_gateway(base, certificate, what)
        processes.append(process)
        columns.append(Column(name, Target(url, False), process.pid, ready))
    columns.insert(1, Column("direct", Target(base, True, context)))
    if parsed.nginx:
        process, url, worker = start_nginx(port, folder)
        processes.append(process)
        columns.insert(2, Column("nginx", Target(url, True), worker))
    time.sleep(0.5)
    return columns


def certificate_in(folder: str) -> str:
    path = os.path.join(folder, "certificate.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path, "-out", path + ".crt",
                    "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True,
                   stderr=subprocess.DEVNULL)
    with open(path + ".crt") as source, open(path, "a") as target:
        target.write(source.read())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("quick", "tls", "json", "growth", "instructions", "nginx"):
        parser.add_argument("--" + name, action="store_true")
    parser.add_argument("--gateway", metavar="FILE", default=GATEWAY)
    parser.add_argument("--against", metavar="X", nargs="+", default=[])
    parser.add_argument("--upstream", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.upstream is not None:
        asyncio.run(upstream(parsed.upstream or None))
    elif parsed.growth:
        print("Python %s\n%s" % (sys.version.split()[0], growth_table(parsed.gateway)))
    elif parsed.instructions:
        gateways = {"gateway": parsed.gateway, "bare": BARE, "bare --loop": BARE + " --loop",
                    **{what: what for what in parsed.against}}
        print(instructions_table(gateways, parsed.json))
    else:
        with tempfile.TemporaryDirectory() as folder:
            certificate = certificate_in(folder) if parsed.tls else None
            context = ssl.create_default_context(cafile=certificate + ".crt") if certificate else None
            fake, port = start_upstream(certificate)
            processes = [fake]
            try:
                columns = started(parsed, folder, port, certificate, context, processes)
                measure(columns, port, context, parsed.quick)
            finally:
                stop(processes)
        print(printed({column.name: column.results() for column in columns}, ROWS, parsed.json))


if __name__ == "__main__":
    main()
