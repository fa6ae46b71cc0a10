#!/usr/bin/env python3
"""Random input for everything that reads what strangers send (needs the hypothesis package).

    python3 .ci/fuzz.py [SECONDS]        default 20

The request head, the framing of answers, the event-stream decoder, both reply streams and both request translators.
A translator may refuse, naming a field, or give a request that breaks none of Claude's rules; a stream may call the
upstream faulty; anything else is a finding, and ends the run with the input.
"""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as some

import claude_gateway as gateway
from test_claude_gateway import PIXEL, depth_of, events_of, message, sse, text, thinking, tool_use, violations

HEADERS = {"anthropic-version": "2023-06-01", "content-type": "application/json", "x-api-key": "k",
           "user-agent": "claude-gateway/0"}
WORDS = some.sampled_from(["", " ", "a", "Hello", "call:1/x", "f", "get.weather", "user", "\u00e9\U0001f600", "auto",
                           "none", "required", "data:image/png;base64," + PIXEL, "https://example.org/a.png",
                           "{\"a\": 1}",
                           "{\"a\": ", "high", "x" * 70, "object", "string", "json_schema"])
IMAGES = some.sampled_from(["data:image/png;base64," + PIXEL, "https://example.org/a.png", PIXEL])
SCALARS = some.one_of(some.none(), some.booleans(), some.integers(-5, 5000), some.floats(-3, 3), WORDS)
JUNK = some.recursive(SCALARS, lambda inner: some.one_of(
    some.lists(inner, max_size=3), some.dictionaries(WORDS, inner, max_size=3)), max_leaves=6)


def mostly(right):
    """The right thing, but now and then junk."""
    return some.integers(0, 49).flatmap(lambda dice: right if dice else JUNK)


def objects(always=(), **fields):
    """Objects that have each field now and then, those in `always` nearly always."""
    return some.fixed_dictionaries({name: mostly(fields[name]) for name in always}, optional={
        name: mostly(value) for name, value in fields.items() if name not in always})


SCHEMAS = some.recursive(
    objects(type=some.sampled_from(["string", "integer", "array", "object", ["string", "null"]]),
            enum=some.lists(WORDS),
            description=WORDS, minimum=some.integers(0, 9), pattern=WORDS, format=WORDS),
    lambda inner: objects(type=some.just("object"), properties=some.dictionaries(WORDS, inner, max_size=3),
                          required=some.lists(WORDS, max_size=2), items=inner, anyOf=some.lists(inner, max_size=2),
                          allOf=some.lists(inner, max_size=2), additionalProperties=some.booleans(),
                          **{"$defs": some.dictionaries(WORDS, inner, max_size=2),
                             "$ref": some.sampled_from(["#/$defs/a", "#/$defs/f", "#"])}), max_leaves=5)
PARTS = some.one_of(
    objects(("type", "text"), type=some.sampled_from(["text", "input_text", "output_text"]), text=WORDS),
    objects(("type", "image_url"), type=some.sampled_from(["image_url", "input_image"]),
            image_url=some.one_of(IMAGES, objects(("url",), url=IMAGES))),
    objects(("type", "file"), type=some.just("file"),
            file=objects(("file_data",), file_data=IMAGES, filename=WORDS)),
    objects(type=WORDS, text=WORDS, cache_control=some.just({"type": "ephemeral"})))
CONTENT = some.one_of(WORDS, some.none(), some.lists(mostly(PARTS), max_size=3))
NAMES = some.sampled_from(["f", "get.weather", "x" * 70, "\u00e9", "web_search"])
IDS = some.sampled_from(["a", "b", "call:1/x", "", None])
CALLS = some.one_of(objects(("function",), id=IDS, type=some.just("function"),
                            function=objects(("name", "arguments"), name=WORDS, arguments=WORDS)),
                    objects(("custom",), id=IDS, custom=objects(("name",), name=WORDS, input=WORDS)))
CHAT_MESSAGES = some.one_of(
    objects(("role", "content"), role=some.sampled_from(["user", "user", "system", "developer"]), content=CONTENT,
            name=WORDS),
    objects(("role",), role=some.just("assistant"), content=CONTENT, tool_calls=some.lists(mostly(CALLS), max_size=3),
            refusal=WORDS, reasoning_content=WORDS, thinking_blocks=JUNK),
    objects(("role",), role=some.sampled_from(["tool", "function"]), tool_call_id=IDS, name=WORDS, content=CONTENT))
FUNCTIONS = objects(("name",), name=NAMES, description=WORDS, parameters=SCHEMAS, strict=some.booleans())
TOOLS = some.one_of(objects(("type", "function"), type=some.just("function"), function=FUNCTIONS),
                    objects(("type", "custom"), type=some.just("custom"), custom=objects(("name",), name=NAMES)),
                    FUNCTIONS,
                    objects(("type",), type=some.sampled_from(["web_search", "mcp"]), name=WORDS),
                    objects(("type", "name", "tools"), type=some.just("namespace"), name=NAMES,
                            tools=some.lists(FUNCTIONS, max_size=2)))
CHOICES = some.one_of(some.sampled_from(["auto", "none", "required", "any"]),
                      objects(("type", "name"), type=some.just("function"), name=NAMES))
EFFORTS = some.sampled_from(["none", "minimal", "low", "medium", "high", "xhigh", "max"])
COMMON = {"temperature": some.floats(-1, 3), "top_p": some.floats(0, 1), "tools": some.lists(mostly(TOOLS), max_size=4),
          "tool_choice": CHOICES, "parallel_tool_calls": some.booleans(), "user": WORDS, "service_tier": WORDS,
          "seed": some.integers()}
CHATS = objects(("messages",), messages=some.lists(mostly(CHAT_MESSAGES), min_size=1, max_size=6),
                max_tokens=some.integers(-1, 5000),
                reasoning_effort=EFFORTS, stop=some.one_of(WORDS, some.lists(WORDS)), n=some.just(1),
                response_format=objects(("type", "json_schema"),
                                        type=some.sampled_from(["text", "json_object", "json_schema"]),
                                        json_schema=objects(name=WORDS, schema=SCHEMAS)),
                thinking=objects(("type",), type=some.sampled_from(["enabled", "adaptive", "disabled"]),
                                 budget_tokens=some.integers(0, 9000)),
                verbosity=some.sampled_from(["low", "high"]), web_search_options=objects(),
                functions=some.lists(FUNCTIONS, max_size=2), function_call=CHOICES, **COMMON)
ITEMS = some.one_of(
    objects(("type", "role", "content"), type=some.just("message"),
            role=some.sampled_from(["user", "assistant", "system"]), content=CONTENT),
    objects(("role", "content"), role=some.sampled_from(["user", "assistant", "developer"]), content=CONTENT),
    objects(("type", "name"), type=some.sampled_from(["function_call", "custom_tool_call"]), call_id=IDS, name=NAMES,
            arguments=WORDS, input=WORDS, namespace=NAMES),
    objects(("type",), type=some.sampled_from(["function_call_output", "custom_tool_call_output"]), call_id=IDS,
            output=CONTENT),
    objects(("type",), type=some.just("reasoning"), encrypted_content=WORDS, summary=JUNK),
    objects(("type",), type=some.sampled_from(["local_shell_call", "local_shell_call_output", "item_reference", "x"]),
            call_id=IDS))
RESPONSES = objects(("input",), input=some.one_of(WORDS, some.lists(mostly(ITEMS), max_size=6)), instructions=WORDS,
                    max_output_tokens=some.integers(-1, 5000), reasoning=objects(effort=EFFORTS, summary=WORDS),
                    text=objects(format=objects(("type",), type=some.sampled_from(["text", "json_schema"]),
                                                schema=SCHEMAS)),
                    include=some.lists(WORDS), **COMMON)
MODELS = some.sampled_from(sorted(gateway.BUILT_IN_MODELS))


def check(translate, body: dict, model: str) -> None:
    try:
        request = translate(body, gateway.BUILT_IN_MODELS[model]).request
    except gateway.InvalidRequest as refusal:
        assert refusal.param, "a refusal that names no field: %s" % refusal
        return
    data = json.loads(gateway.upstream_json(request).decode())
    if len(json.dumps(data["messages"])) < 1_000_000:
        found = violations(data, HEADERS)
        assert not found, found


def chats(body, model):
    check(gateway.messages_request_from_chat, body, model)


def responses(body, model):
    check(gateway.messages_request_from_responses, body, model)


def heads(lines):
    try:
        head = gateway.head_from_lines([line.decode("latin-1") for line in lines])
        gateway.body_length(head)
        gateway.route_of(head.target)
    except gateway.GatewayError:
        pass


def upstream_heads(lines):
    ours, upstream = socket.socketpair()
    with ours, contextlib.suppress(gateway.GatewayError, http.client.BadStatusLine):
        with upstream:
            upstream.sendall(b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"", b""]))
        connection = gateway.UpstreamConnection.__new__(gateway.UpstreamConnection)
        gateway.Peer.__init__(connection, ours)
        head = connection.answer(gateway.UpstreamCall())
        head.framing()
        gateway.ends_connection(head.version, head.headers)


def depths(value, limit):
    text = json.dumps(value).encode()
    assert gateway.nests_deeper(text, limit) == (depth_of(value) > limit)


ANSWER = sse(events_of(message(thinking("hm", "c2ln"), text("Hello \u2028 there"), tool_use("toolu_1", "f", {"a": 1}))))
EVENTS = list(gateway.EventDecoder().feed(ANSWER))


def streams(cuts, noise):
    decoder, at, events = gateway.EventDecoder(), 0, []
    for cut in sorted(cuts) + [len(ANSWER)]:
        events += decoder.feed(ANSWER[at:cut])
        at = cut
    assert events == EVENTS
    broken, assembler = gateway.EventDecoder(), gateway.MessageAssembler()
    try:
        for event in [*broken.feed(noise), *broken.close()]:
            assembler.feed(event)
    except gateway.GatewayError:
        pass


def answers(events, planned):
    """Events in an order that Claude would not use, some of them damaged, through both kinds of stream."""
    plan = gateway.ReplyPlan(gateway.ToolNames(), bare_json=planned == "JSON", forced_tool="f" * (planned == "tool"))
    for kind, wants in ((gateway.ChatStream, True), (gateway.ResponseStream, ["reasoning.encrypted_content"])):
        assembler = gateway.MessageAssembler()
        planned_events = gateway.PlannedEvents(plan, assembler)
        stream = kind({"id": "x_1", "created": 1}, plan, planned_events.assembler, wants)
        feed, told = planned_events.then(stream.feed), []
        try:
            for event in events:
                assembler.feed(event)
                told += feed(event)
                if assembler.done:
                    told += planned_events.finish(stream.feed) + stream.finish()
                    gateway.responses_usage(assembler.whole()["usage"])
                    break
        except gateway.GatewayError:
            pass
        encode = getattr(stream, "event_bytes", gateway.data_event)
        for event in told:
            assert encode(event) == gateway.data_event(event)


def framings(chunks, cuts, noise):
    body = b"".join(chunks)
    wire = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks if chunk) + b"0\r\n\r\n"
    for framing in (gateway.BodyFraming(True, None), gateway.RequestFraming(None, 1_000)):
        at, read = 0, b""
        for cut in sorted(min(cut, len(wire)) for cut in cuts) + [len(wire)]:
            read += framing.feed(wire[at:cut])
            at = cut
        assert read == body and framing.done and not framing.surplus
    for framing in (gateway.BodyFraming(True, None), gateway.RequestFraming(None, 1_000)):
        with contextlib.suppress(gateway.GatewayError):
            framing.feed(noise)


def damaged(event):
    """An event, or one with some field replaced by junk."""
    return some.one_of(some.just(event), some.tuples(some.sampled_from(sorted(event)), JUNK).map(
        lambda change: event if change[0] == "type" else dict(event, **{change[0]: change[1]})))


TARGETS = (
    (answers, (some.lists(some.sampled_from(EVENTS).flatmap(damaged), max_size=12).map(
        lambda events: EVENTS[:1] + events + EVENTS[-2:]), some.sampled_from(["", "JSON", "tool"]))),
    (framings, (some.lists(some.binary(max_size=20), max_size=6), some.lists(some.integers(0, 60), max_size=6),
                some.one_of(some.binary(), some.text("0123456789abcdefx;\r\n ", max_size=40).map(str.encode)))),
    (chats, (CHATS, MODELS)), (responses, (RESPONSES, MODELS)),
    (heads, (some.lists(some.one_of(some.binary(max_size=40), some.sampled_from([
        b"GET /v1/models HTTP/1.1", b"Host: a", b"Content-Length: 5", b"Transfer-Encoding: chunked"])), min_size=1),)),
    (upstream_heads, (some.lists(some.one_of(some.binary(max_size=40), some.sampled_from([
        b"Content-Length: 5", b"content-length: -1", b"Transfer-Encoding: chunked", b"Connection: close",
        b" folded"]))),)),
    (depths, (JUNK, some.integers(0, 5))),
    (streams, (some.lists(some.integers(0, len(ANSWER)), max_size=8), some.one_of(some.binary(), some.builds(
        lambda event: b"data: " + json.dumps(event).encode() + b"\n\n", objects(
            type=some.sampled_from(["message_start", "content_block_start", "content_block_delta", "message_delta",
                                    "content_block_stop", "message_stop", "error"]),
            message=JUNK, content_block=JUNK, delta=JUNK, usage=JUNK, error=JUNK, index=JUNK))))),
)


def counting(target, count: list):
    """A test of one argument, as hypothesis wants it."""
    def run(arguments):
        count[0] += 1
        target(*arguments)
    return run


def main() -> None:
    until = time.monotonic() + float(sys.argv[1] if len(sys.argv) > 1 else 20)
    count, rounds = [0], 0
    while time.monotonic() < until:
        for target, strategies in TARGETS:
            run = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                           phases=(Phase.generate, Phase.shrink))(given(some.tuples(*strategies))(
                               counting(target, count)))
            seed(random.SystemRandom().getrandbits(32))(run)()
        rounds += 1
    print("fuzz: %d inputs in %d rounds, nothing found" % (count[0], rounds))


if __name__ == "__main__":
    main()
