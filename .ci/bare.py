#!/usr/bin/env python3
"""The least that translates between the two APIs: the yardstick of bench.py.

    python3 .ci/bare.py PORT UPSTREAM            a thread for each connection
    python3 .ci/bare.py PORT UPSTREAM --loop     the same, with one event loop for all streams

It trusts everybody: nothing is checked, logged, counted or ended early, and it knows text only.  What a gateway costs
beyond this is the price of what it does beyond this.
"""
from __future__ import annotations

import json
import re
import selectors
import signal
import socket
import sys
import threading
import urllib.parse

TEXT_DELTA = re.compile(rb'"text_delta", ?"text": ?("[^"\\]*(?:\\.[^"\\]*)*")')
STOP_REASON = re.compile(rb'"stop_reason": ?"(\w+)"')
OUTPUT_TOKENS = re.compile(rb'"output_tokens": ?(\d+)')
LENGTH = re.compile(rb"(?i)\ncontent-length: *(\d+)")
FINISH_REASONS = {b"end_turn": "stop", b"stop_sequence": "stop", b"max_tokens": "length"}
REQUEST = (b"POST /v1/messages HTTP/1.1\r\nhost: upstream\r\ncontent-type: application/json\r\nx-api-key: x\r\n"
           b"anthropic-version: 2023-06-01\r\ncontent-length: %d\r\n\r\n%s")
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
SELECTOR = selectors.DefaultSelector()


def completion(chat: dict, kind: str, **choice) -> dict:
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": chat["model"],
            "choices": [dict({"index": 0, "finish_reason": None}, **choice)]}


class Answer:
    """What the upstream sends for one request, on its way to the client."""

    def __init__(self, chat: dict, client: socket.socket, upstream: socket.socket) -> None:
        self.chat, self.client, self.upstream = chat, client, upstream
        self.unread, self.events, self.over = b"", b"", False       # less than a chunk; less than an event
        self.head_is_read = False
        self.ended = threading.Event()              # for the thread that has left it to the event loop

    def move(self) -> None:
        """Hands on what the upstream has sent."""
        data = self.unread + self.upstream.recv(65_536)
        if not self.head_is_read:
            self.head_is_read, data = True, data.partition(b"\r\n\r\n")[2]
        self.events += self.from_chunks(data)
        if self.over and not self.chat.get("stream"):
            self.client.sendall(self.whole())
        elif self.chat.get("stream"):
            *events, self.events = self.events.split(b"\n\n")
            out = b"".join([self.translated(event) for event in events])
            if out:                                 # an empty chunk would be the last one
                self.client.sendall(b"%x\r\n%s\r\n%s" % (len(out), out, b"0\r\n\r\n" if self.over else b""))

    def from_chunks(self, data: bytes) -> bytes:
        pieces = []
        while not self.over:
            size, found, rest = data.partition(b"\r\n")
            length = int(size, 16) if found else len(rest)
            if len(rest) < length + 2:
                break
            pieces.append(rest[:length])
            self.over, data = not length, rest[length + 2:]
        self.unread = data
        return b"".join(pieces)

    def translated(self, event: bytes) -> bytes:
        """A text stays as it is written: its JSON is the same in both APIs."""
        text = TEXT_DELTA.search(event)
        if text:
            return self.text_chunk % text.group(1)
        if event.startswith(b"event: message_start"):
            before, after = self.chunk(delta={"content": "*"}).replace(b"%", b"%%").split(b'"*"')
            self.text_chunk = before + b"%s" + after
            return self.chunk(delta={"role": "assistant", "content": ""})
        if event.startswith(b"event: message_delta"):
            return self.chunk(delta={}, finish_reason=finish_reason(event))
        return b"data: [DONE]\n\n" if event.startswith(b"event: message_stop") else b""

    def chunk(self, **choice) -> bytes:
        return b"data: %s\n\n" % json.dumps(completion(self.chat, "chat.completion.chunk", **choice)).encode()

    def whole(self) -> bytes:
        text = "".join(map(json.loads, TEXT_DELTA.findall(self.events)))
        reply = completion(self.chat, "chat.completion", message={"role": "assistant", "content": text},
                           finish_reason=finish_reason(self.events))
        body = json.dumps(dict(reply, usage={"completion_tokens": int(OUTPUT_TOKENS.findall(self.events)[-1])}))
        return WHOLE % (len(body), body.encode())


def finish_reason(events: bytes) -> str:
    return FINISH_REASONS.get(STOP_REASON.search(events).group(1), "stop")


def serve(client: socket.socket) -> None:
    """One client connection, with an upstream connection of its own."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client, socket.create_connection(UPSTREAM) as upstream:
        data = client.recv(65_536)
        while data:
            head, _, body = data.partition(b"\r\n\r\n")
            pieces, missing = [body], int(LENGTH.search(head).group(1)) - len(body)
            while missing > 0:
                pieces.append(client.recv(1 << 20))
                missing -= len(pieces[-1])
            chat = json.loads(b"".join(pieces))
            answer = Answer(chat, client, upstream)
            request = json.dumps({"model": chat["model"], "max_tokens": chat.get("max_tokens", 4096), "stream": True,
                                  "messages": chat["messages"]}).encode()
            upstream.sendall(REQUEST % (len(request), request))
            if chat.get("stream"):
                client.sendall(STREAM)
                if IN_LOOP:
                    SELECTOR.register(upstream, selectors.EVENT_READ, answer)
                    answer.ended.wait()
            while not answer.over:
                answer.move()
            data = client.recv(65_536)


def loop() -> None:
    while True:
        for key, _ in SELECTOR.select():
            key.data.move()
            if key.data.over:
                SELECTOR.unregister(key.fileobj)
                key.data.ended.set()


PORT, URL, IN_LOOP = int(sys.argv[1]), urllib.parse.urlsplit(sys.argv[2]), "--loop" in sys.argv
UPSTREAM = (URL.hostname, URL.port or 80)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
threading.Thread(target=loop, daemon=True).start()
listener = socket.create_server(("127.0.0.1", PORT), backlog=2048)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
