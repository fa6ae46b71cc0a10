"""Tests of claude_gateway.py: `python3 -m unittest`, with nothing installed.

They talk to the real server over real sockets.  Upstream stands a fake Claude (at the end of this file) that refuses
what the real one refuses, so a request that breaks a rule of the Messages API fails its test.  Where the `openai`
package is installed the same server is driven with it; where recorded traffic lies beside the project it is used.

In the order of the gateway's rooms; then real tools and recorded traffic; then the fake Claude.
"""
from __future__ import annotations

import ast
import base64
import collections
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import urllib.error
import urllib.parse
import urllib.request
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, takewhile
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import claude_gateway
from claude_gateway import BUILT_IN_MODELS, Config, Gateway, Service

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "claude_gateway.py")
RECORDED = os.path.join(HERE, "..", "shared", "recorded")
SECRET = "sk-ant-api03-the-upstream-key"
PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


class Answer:
    """What the gateway answered: status, headers (lower case), body."""

    def __init__(self, status: int, headers: dict, raw: bytes) -> None:
        self.status, self.headers, self.raw = status, headers, raw

    @property
    def json(self) -> dict:
        return json.loads(self.raw.decode("utf-8"))

    @property
    def error(self) -> dict:
        return self.json["error"]

    @property
    def message(self) -> dict:
        """The message of a chat completion."""
        return self.json["choices"][0]["message"]

    @property
    def events(self) -> list[str]:
        """The data of each event of a stream, the closing [DONE] included."""
        return [line[len("data: "):] for line in self.raw.decode("utf-8").split("\n") if line.startswith("data: ")]

    @property
    def chunks(self) -> list[dict]:
        return [json.loads(data) for data in self.events if data != "[DONE]"]


def completion_from_chunks(chunks: list[dict]) -> dict:
    """What a client makes of a stream: the parts of the chat completion that the chunks add up to."""
    message: dict = {"role": None, "content": ""}
    whole = {"message": message, "finish_reason": None, "usage": None, "models": sorted({c["model"] for c in chunks})}
    for chunk in chunks:
        whole["usage"] = chunk.get("usage") or whole["usage"]
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["role"] = delta.get("role") or message["role"]
            for name in ("content", "reasoning_content", "refusal"):
                if delta.get(name):
                    message[name] = message.get(name, "") + delta[name]
            if "annotations" in delta:
                message["annotations"] = delta["annotations"]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({name: value for name, value in call.items() if name != "index"})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            if "function_call" in delta:
                call = message.setdefault("function_call", {"name": "", "arguments": ""})
                for name, value in delta["function_call"].items():
                    call[name] += value
            if choice["finish_reason"]:
                assert whole["finish_reason"] is None, "two finish reasons"
                whole["finish_reason"] = choice["finish_reason"]
    return whole


def completion_parts(completion: dict) -> dict:
    """The same parts of a whole chat completion."""
    choice = completion["choices"][0]
    message = {name: value for name, value in choice["message"].items() if value is not None or name == "content"}
    message["content"] = message["content"] or ""
    return {"message": message, "finish_reason": choice["finish_reason"], "usage": completion["usage"],
            "models": [completion["model"]]}


class GatewayTestCase(unittest.TestCase):
    """A gateway in front of a fake Claude, one pair per class; `start` makes another gateway for special settings."""
    config: dict = {}                               # what a class wants different from the usual

    @classmethod
    def setUpClass(cls) -> None:
        cls.claude = FakeClaude()
        cls.claude.__enter__()
        cls.addClassCleanup(cls.claude.__exit__)
        cls.service = cls._service(cls.config)
        cls.addClassCleanup(cls.service.close, 1)

    @classmethod
    def _service(cls, settings: dict) -> Service:
        usual = {"base_url": cls.claude.url, "anthropic_api_key": SECRET, "host": "127.0.0.1", "port": 0}
        service = Service(Gateway(Config(**dict(usual, **settings))))
        service.start()
        return service

    def setUp(self) -> None:
        self.claude.reset()

    def tearDown(self) -> None:
        self.assertEqual(self.claude.violations, [], "the gateway sent what Claude refuses")

    def start(self, **settings) -> Service:
        """Another gateway; it becomes the one that `ask` and `chat` talk to, until the end of the test."""
        service = self._service(settings)
        self.addCleanup(service.close, 1)
        self.addCleanup(setattr, self, "service", self.service)
        self.service = service
        return service

    def ask(self, method: str, path: str, body=None, headers: dict | None = None) -> Answer:
        """One HTTP request to the gateway."""
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=20)
        try:
            data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
            connection.request(method, path, data, dict({"content-type": "application/json"} if data else {},
                                                        **(headers or {})))
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()},
                          response.read())
        finally:
            connection.close()

    def chat(self, content=None, headers: dict | None = None, **fields) -> Answer:
        """POST /v1/chat/completions; `content` is that of one user message, unless `messages` are given."""
        body = {"model": "claude-sonnet-5-5", "messages": [{"role": "user", "content": content or "Hello"}]}
        return self.ask("POST", "/v1/chat/completions", dict(body, **fields), headers)

    def sent(self, **fields) -> dict:
        """The Messages request that a chat completion request becomes on the wire."""
        count = len(self.claude.messages)
        answer = self.chat(**fields)
        self.assertEqual(answer.status, 200, answer.raw)
        self.assertEqual(len(self.claude.messages), count + 1)
        return self.claude.messages[-1].body

    def connect(self) -> socket.socket:
        """A bare connection to the gateway, for what no HTTP client would send."""
        connection = socket.create_connection(("127.0.0.1", self.service.port), timeout=20)
        self.addCleanup(connection.close)
        return connection

    def raw(self, data: bytes) -> bytes:
        """All that comes back for these bytes until the gateway closes the connection (or 20 s have passed)."""
        connection = self.connect()
        connection.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while True:
                piece = connection.recv(65_536)
                if not piece:
                    break
                received += piece
        return received


def bare(blocks):
    """Content blocks, messages or tools without their cache marks, which have tests of their own."""
    if isinstance(blocks, list):
        return [bare(block) for block in blocks]
    if isinstance(blocks, dict):
        return {name: bare(value) for name, value in blocks.items() if name != "cache_control"}
    return blocks


# ==== Responses API ===================================================================================

NAMESPACE = {"type": "namespace", "name": "agents", "description": "Helpers", "tools": [
    {"type": "function", "name": "close", "parameters": {"type": "object", "properties": {"id": {"type": "string"}}}}]}
PATCH_TOOL = {"type": "custom", "name": "apply_patch", "description": "Edits files",
              "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}}


class ResponsesTestCase(GatewayTestCase):
    def respond(self, given="Hello", **fields) -> Answer:
        return self.ask("POST", "/v1/responses", dict({"model": "claude-opus-5-5", "input": given}, **fields))

    def became(self, given="Hello", **fields) -> dict:
        """The Messages request that a Responses request becomes."""
        answer = self.respond(given, **fields)
        self.assertEqual(answer.status, 200, answer.raw)
        return bare(self.claude.messages[-1].body)


class ResponsesRequestTests(ResponsesTestCase):
    def test_instructions_and_leading_system_items_become_the_system_text(self):
        request = self.became([{"role": "developer", "content": "B"}, {"role": "user", "content": "Hi"}],
                              instructions="A")
        self.assertEqual(request["system"], [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}])
        self.assertEqual(request["messages"], [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])

    def test_calls_and_outputs_pair_by_call_id_and_group_into_turns(self):
        request = self.became([
            {"role": "user", "content": "Go"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Two calls"}]},
            {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "f", "arguments": "{\"x\": 1}"},
            {"type": "function_call", "id": "fc_2", "call_id": "b", "name": "f", "arguments": ""},
            {"type": "function_call_output", "call_id": "b", "output": "2"},
            {"type": "function_call_output", "call_id": "a", "output": [
                {"type": "input_text", "text": "see"},
                {"type": "input_image", "image_url": "data:image/png;base64," + PIXEL, "detail": "high"}]},
        ], tools=[{"type": "function", "name": "f", "parameters": None, "strict": None}])
        self.assertEqual([turn["role"] for turn in request["messages"]], ["user", "assistant", "user"])
        self.assertEqual([block["type"] for block in request["messages"][1]["content"]], ["text", "tool_use", "tool_use"])
        results = request["messages"][2]["content"]
        self.assertEqual([block["tool_use_id"] for block in results], ["a", "b"])
        self.assertEqual([block["type"] for block in results[0]["content"]], ["text", "image"])

    def test_parameters_find_their_place(self):
        request = self.became(max_output_tokens=5000, reasoning={"effort": "high", "summary": "auto"},
                              user="u-1", parallel_tool_calls=False, tools=[{"type": "function", "name": "f"}],
                              tool_choice="auto", store=False, metadata={"a": "b"}, truncation="disabled")
        self.assertEqual(request["max_tokens"], 5000)
        self.assertEqual(request["output_config"], {"effort": "high"})
        self.assertEqual(request["thinking"], {"type": "adaptive", "display": "summarized"})
        self.assertEqual(request["metadata"], {"user_id": "u-1"})
        self.assertEqual(request["tool_choice"], {"type": "auto", "disable_parallel_tool_use": True})

    def test_a_flat_json_schema_format_is_enforced(self):
        schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
        request = self.became(text={"format": {"type": "json_schema", "name": "p", "schema": schema, "strict": True}})
        self.assertEqual(request["output_config"]["format"],
                         {"type": "json_schema", "schema": dict(schema, additionalProperties=False)})

    def test_namespaces_are_flattened_and_come_back_split(self):
        self.claude.play(lambda recorded: message(tool_use("toolu_1", recorded.body["tools"][0]["name"], {"id": "7"})))
        answer = self.respond(tools=[NAMESPACE])
        call = answer.json["output"][0]
        self.assertEqual((call["type"], call["namespace"], call["name"]), ("function_call", "agents", "close"))
        # and the history finds the same tool again
        request = self.became([{"role": "user", "content": "Go"}, dict(call), {
            "type": "function_call_output", "call_id": "toolu_1", "output": "closed"}], tools=[NAMESPACE])
        self.assertEqual(request["messages"][1]["content"][0]["name"], request["tools"][0]["name"])

    def test_custom_tools_take_and_give_bare_strings(self):
        self.claude.play(message(tool_use("toolu_1", "apply_patch", {"input": "*** Begin"})))
        answer = self.respond(tools=[PATCH_TOOL])
        call = answer.json["output"][0]
        self.assertEqual((call["type"], call["input"]), ("custom_tool_call", "*** Begin"))
        request = self.became([{"role": "user", "content": "Go"}, call, {
            "type": "custom_tool_call_output", "call_id": "toolu_1", "output": "done"}], tools=[PATCH_TOOL])
        self.assertEqual(request["messages"][1]["content"][0]["input"], {"input": "*** Begin"})
        self.assertIn("lark grammar", request["tools"][0]["description"])

    def test_additional_tools_items_carry_tools(self):
        request = self.became([{"type": "additional_tools", "role": "developer", "tools": [NAMESPACE, PATCH_TOOL]},
                               {"role": "user", "content": "Go"}])
        self.assertEqual([tool["name"] for tool in request["tools"]], ["agents_close", "apply_patch"])

    def test_web_search_becomes_claudes_and_other_hosted_tools_are_reported(self):
        answer = self.respond(tools=[{"type": "web_search", "external_web_access": True}, {"type": "code_interpreter"}])
        self.assertEqual([tool["name"] for tool in self.claude.messages[-1].body["tools"]], ["web_search"])
        self.assertIn("dropped=tools[1]", answer.headers["x-claude-gateway-changes"])

    def test_what_has_no_counterpart_is_a_400_that_names_it(self):
        for fields in ({"conversation": "conv_1"}, {"prompt": {"id": "p"}}, {"background": True},
                       {"previous_response_id": "resp_unknown"}, {"input": 5}, {"input": [{"type": 5}]},
                       {"tools": {}}, {"reasoning": "high"}, {"max_output_tokens": "many"}, {"include": "x"},
                       {"text": {"format": {"type": "xml"}}}):
            with self.subTest(fields=fields):
                answer = self.respond(**dict({"given": "x"}, **fields)) if "input" not in fields else \
                    self.respond(fields["input"])
                self.assertEqual(answer.status, 400, answer.raw)
                self.assertTrue(answer.error["param"].startswith(list(fields)[0]), answer.raw)

    def test_a_wrong_item_is_named_by_its_path(self):
        for item, path in (({"type": "function_call", "call_id": 5, "name": "f"}, "input[1].call_id"),
                           ({"type": "function_call", "call_id": "a"}, "input[1].name"),
                           ({"role": "user", "content": [{"type": "input_text", "text": 5}]}, "input[1].content[0].text"),
                           ({"role": "nobody", "content": "x"}, "input[1].role"), ("text", "input[1]")):
            with self.subTest(path=path):
                answer = self.respond([{"role": "user", "content": "Hi"}, item])
                self.assertEqual((answer.status, answer.error["param"]), (400, path))


class ResponsesReplyTests(ResponsesTestCase):
    def test_a_response_is_complete(self):
        self.claude.play(message(text("Hi"), usage={"cache_read_input_tokens": 5}))
        response = self.respond(instructions="Be short", metadata={"a": "b"}).json
        self.assertEqual((response["object"], response["status"]), ("response", "completed"))
        self.assertEqual((response["instructions"], response["metadata"]), ("Be short", {"a": "b"}))
        self.assertEqual(response["output"][0]["content"],
                         [{"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}])
        self.assertEqual(response["usage"], {
            "input_tokens": 17, "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
            "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 24})
        for name in ("error", "incomplete_details", "parallel_tool_calls", "tool_choice", "tools", "temperature",
                     "top_p", "text", "reasoning", "previous_response_id", "store", "truncation", "created_at"):
            self.assertIn(name, response)

    def test_the_event_sequence_of_a_whole_answer(self):
        self.claude.play(message(thinking("hm", "c2ln"), text("Hi"), tool_use("toolu_1", "f", {"a": 1})))
        events = self.respond(stream=True, tools=[{"type": "function", "name": "f"}]).chunks
        kinds = [event["type"][len("response."):] for event in events if not event["type"].endswith(".delta")]
        self.assertEqual(kinds, [
            "created", "in_progress",
            "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.done",
            "reasoning_summary_part.done", "output_item.done",
            "output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done",
            "output_item.added", "function_call_arguments.done", "output_item.done", "completed"])
        self.assertEqual(len({event["response"]["id"] for event in events if "response" in event}), 1)

    def test_events_have_their_names_and_no_done_marker(self):
        raw = self.respond(stream=True).raw.decode()
        self.assertTrue(raw.startswith("event: response.created\ndata: {"))
        self.assertNotIn("[DONE]", raw)

    def test_an_answer_cut_short_is_incomplete(self):
        for stop_reason, reason in (("max_tokens", "max_output_tokens"), ("refusal", "content_filter")):
            with self.subTest(stop_reason=stop_reason):
                self.claude.play(*[message(text("Half"), stop_reason=stop_reason)] * 2)
                response = self.respond().json
                self.assertEqual((response["status"], response["incomplete_details"]), ("incomplete", {"reason": reason}))
                self.assertEqual(self.respond(stream=True).chunks[-1]["type"], "response.incomplete")

    def test_a_refusal_that_explains_itself_is_a_refusal_part(self):
        self.claude.play(message(stop_reason="refusal", stop_details={
            "type": "refusal", "category": "cyber", "explanation": "Not that."}))
        response = self.respond().json
        self.assertEqual(response["output"][-1]["content"], [{"type": "refusal", "refusal": "Not that."}])

    def test_a_failure_amid_the_stream_has_the_code_that_clients_act_on(self):
        for kind, words, code in (("overloaded_error", "Overloaded", "server_is_overloaded"),
                                  ("rate_limit_error", "Slow down", "rate_limit_exceeded"),
                                  ("invalid_request_error", "Output blocked by content filtering policy", "invalid_prompt"),
                                  ("api_error", "Oops", "server_error")):
            with self.subTest(kind=kind):
                start = sse(events_of(message(text("Hello there")))[:4])
                self.claude.play(Reply(pieces=[start, sse([dict(error_body(kind, words))])]))
                last = self.respond(stream=True).chunks[-1]
                self.assertEqual((last["type"], last["response"]["error"]["code"]), ("response.failed", code))
                self.assertEqual(last["response"]["error"]["message"], words)

    def test_encrypted_reasoning_goes_out_and_comes_back_as_it_was(self):
        asked = {"include": ["reasoning.encrypted_content"], "store": False, "tools": [{"type": "function", "name": "f"}]}
        self.claude.play(message(thinking("", "c2lnbmVk"), tool_use("toolu_1", "f", {})))
        output = self.respond(**asked).json["output"]
        self.assertEqual([item["type"] for item in output], ["reasoning", "function_call"])
        reasoning = dict(output[0], content=None)
        request = self.became([{"role": "user", "content": "Hello"}, reasoning, output[1], {
            "type": "function_call_output", "call_id": "toolu_1", "output": "ok"}], **asked)
        self.assertEqual(request["messages"][1]["content"][0],
                         {"type": "thinking", "thinking": "", "signature": "c2lnbmVk"})

    def test_foreign_and_damaged_reasoning_is_left_out(self):
        for content in ("gAAAAABforeign", "claude-gateway-1.!!!", "claude-gateway-1.bm90IGpzb24=", None):
            with self.subTest(content=content):
                request = self.became([{"role": "user", "content": "Hello"},
                                       {"type": "reasoning", "summary": [], "encrypted_content": content},
                                       {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "More"}])
                self.assertEqual(request["messages"][1], {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]})

    def test_a_responses_body_at_the_chat_door_is_answered_as_a_chat_completion(self):
        answer = self.ask("POST", "/v1/chat/completions", {"model": "opus", "input": "Hello", "instructions": "Short"})
        self.assertEqual(answer.message["content"], "Hello!")
        stream = self.ask("POST", "/v1/chat/completions", {"model": "opus", "input": "Hello", "stream": True})
        self.assertEqual(stream.events[-1], "[DONE]")

    def test_a_chat_body_at_the_responses_door_is_answered_as_a_response(self):
        answer = self.ask("POST", "/v1/responses", {"model": "opus", "messages": [{"role": "user", "content": "Hi"}]})
        self.assertEqual(answer.json["output"][0]["content"][0]["text"], "Hello!")


class ResponsesStateTests(ResponsesTestCase):
    def test_a_response_is_continued_by_its_id(self):
        self.claude.play(message(text("One")), message(text("Two")))
        first = self.respond("First").json
        second = self.respond("Second", previous_response_id=first["id"]).json
        request = self.became("Third", previous_response_id=second["id"])
        told = [(turn["role"], turn["content"][0]["text"]) for turn in request["messages"]]
        self.assertEqual(told, [("user", "First"), ("assistant", "One"), ("user", "Second"), ("assistant", "Two"),
                                ("user", "Third")])

    def test_it_can_be_fetched_listed_and_deleted(self):
        response = self.respond("First").json
        path = "/v1/responses/" + response["id"]
        self.assertEqual(self.ask("GET", path).json, response)
        items = self.ask("GET", path + "/input_items").json
        self.assertEqual([item["content"] for item in items["data"]], ["First"])
        self.assertEqual(self.ask("DELETE", path).json["deleted"], True)
        self.assertEqual((self.ask("GET", path).status, self.ask("DELETE", path).status), (404, 404))

    def test_a_streamed_response_is_there_before_its_end_is_told(self):
        events = self.respond(stream=True).chunks
        self.assertEqual(self.ask("GET", "/v1/responses/" + events[-1]["response"]["id"]).status, 200)

    def test_store_false_keeps_nothing(self):
        response = self.respond(store=False).json
        self.assertEqual(self.ask("GET", "/v1/responses/" + response["id"]).status, 404)

    def test_another_clients_key_finds_nothing(self):
        self.start(api_key=("first-key", "second-key"))
        body = {"model": "opus", "input": "Hello"}
        mine = self.ask("POST", "/v1/responses", body, {"authorization": "Bearer first-key"}).json
        continued = dict(body, previous_response_id=mine["id"])
        self.assertEqual(self.ask("POST", "/v1/responses", continued, {"authorization": "Bearer first-key"}).status, 200)
        other = self.ask("POST", "/v1/responses", continued, {"authorization": "Bearer second-key"})
        self.assertEqual((other.status, other.error["code"]), (400, "previous_response_not_found"))

    def test_the_oldest_goes_when_there_are_too_many(self):
        stored = claude_gateway.StoredResponses()
        for at in range(1_001):
            stored.put("", {"id": "resp_%d" % at}, [])
        self.assertIsNone(stored.get("", "resp_0"))
        self.assertIsNotNone(stored.get("", "resp_1000"))

    def test_input_tokens_are_counted_by_claude(self):
        answer = self.ask("POST", "/v1/responses/input_tokens", {"model": "opus", "input": "Hello", "instructions": "Hi"})
        self.assertEqual(answer.json, {"object": "response.input_tokens", "input_tokens": 11})
        counted = self.claude.requests[-1].body
        self.assertEqual(set(counted), {"model", "messages", "system", "thinking"})

    def test_unimplemented_neighbours_are_404_in_json(self):
        for method, path in (("POST", "/v1/responses/compact"), ("POST", "/v1/responses/resp_1/cancel")):
            with self.subTest(path=path):
                self.assertIn(self.ask(method, path, {}).status, (404, 405))


# ==== Legacy completions ==============================================================================

class LegacyCompletionTests(GatewayTestCase):
    def complete(self, **fields) -> Answer:
        return self.ask("POST", "/v1/completions", dict({"model": "claude-haiku-5-5", "prompt": "Once upon"}, **fields))

    def test_a_prompt_is_continued(self):
        self.claude.play(message(text(" a time")))
        completion = self.complete(max_tokens=2000, stop=["\n\n", "END"]).json
        self.assertEqual(completion["object"], "text_completion")
        self.assertTrue(completion["id"].startswith("cmpl-"))
        self.assertEqual(completion["choices"], [{"text": " a time", "index": 0, "logprobs": None,
                                                  "finish_reason": "stop"}])
        self.assertEqual(completion["usage"]["total_tokens"], 19)
        request = self.claude.messages[-1].body
        self.assertEqual((request["max_tokens"], request["stop_sequences"]), (2000, ["END"]))
        self.assertEqual(request["messages"][0]["content"][0]["text"], "Once upon")

    def test_without_a_limit_the_model_has_its_maximum(self):
        self.complete()
        self.assertEqual(self.claude.messages[-1].body["max_tokens"], 128000)

    def test_the_stream_has_the_same_shape_and_ends_with_done(self):
        self.claude.play(message(text(" a time, long ago")))
        answer = self.complete(stream=True, stream_options={"include_usage": True})
        self.assertEqual("".join(choice["text"] for chunk in answer.chunks for choice in chunk["choices"]),
                         " a time, long ago")
        self.assertEqual([choice["finish_reason"] for chunk in answer.chunks for choice in chunk["choices"]
                          if choice["finish_reason"]], ["stop"])
        self.assertEqual({chunk["object"] for chunk in answer.chunks}, {"text_completion"})
        self.assertEqual(answer.chunks[-1]["usage"]["total_tokens"], 19)
        self.assertEqual(answer.events[-1], "[DONE]")

    def test_several_prompts_give_as_many_choices(self):
        for stream in (False, True):
            with self.subTest(stream=stream):
                self.claude.play(message(text("A")), message(text("B")))
                answer = self.complete(prompt=["one", "two"], stream=stream)
                texts = {0: "", 1: ""}
                for choice in (choice for chunk in (answer.chunks if stream else [answer.json])
                               for choice in chunk["choices"]):
                    texts[choice["index"]] += choice["text"]
                self.assertEqual(texts, {0: "A", 1: "B"})

    def test_echo_and_suffix(self):
        self.claude.play(message(text(" a time")), message(text("x = 1")))
        self.assertEqual(self.complete(echo=True).json["choices"][0]["text"], "Once upon a time")
        self.complete(prompt="def f():\n    ", suffix="\n    return x")
        self.assertIn("<gap/>", self.claude.messages[-1].body["messages"][0]["content"][0]["text"])

    def test_what_cannot_be_is_a_400_that_names_it(self):
        for fields, param in (({"prompt": None}, "prompt"), ({"prompt": [1, 2]}, "prompt[0]"), ({"prompt": 5}, "prompt"),
                              ({"n": 2}, "n"), ({"best_of": 2}, "best_of"), ({"logprobs": 3}, "logprobs"),
                              ({"suffix": 3}, "suffix")):
            with self.subTest(fields=fields):
                answer = self.complete(**fields)
                self.assertEqual((answer.status, answer.error["param"]), (400, param))

    def test_an_upstream_refusal_is_an_http_status_also_for_streams(self):
        self.claude.play(Reply(429, body=error_body("rate_limit_error", "no"), headers={"retry-after": "30"}))
        answer = self.complete(stream=True)
        self.assertEqual((answer.status, answer.headers["retry-after"]), (429, "30"))


# ==== The native door =================================================================================

class NativeTests(GatewayTestCase):
    BODY = {"model": "claude-opus-5-5", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}

    def native(self, headers=None, path="/v1/messages", **fields) -> Answer:
        return self.ask("POST", path, dict(self.BODY, **fields), headers)

    def test_an_answer_passes_byte_for_byte(self):
        whole = message(text("Hi \u2028 there"))
        body = json.dumps(whole, indent=3).encode()
        self.claude.play(Reply(body=body))
        self.assertEqual(self.native().raw, body)
        stream = sse(events_of(whole))
        self.claude.play(Reply(headers={"content-type": "text/event-stream"}, body=stream))
        answer = self.native(stream=True)
        self.assertEqual((answer.raw, answer.headers["content-type"]), (stream, "text/event-stream"))

    def test_the_gateways_credential_replaces_the_clients(self):
        self.native({"x-api-key": "sk-ant-api03-the-clients-own", "anthropic-version": "2023-01-01",
                     "anthropic-beta": "files-api-2025-04-14,oauth-2025-04-20"}, path="/v1/messages?beta=true")
        sent = self.claude.requests[-1]
        self.assertEqual(sent.headers["x-api-key"], SECRET)
        self.assertEqual(sent.headers["anthropic-version"], "2023-01-01")
        self.assertEqual(sent.headers["anthropic-beta"], "files-api-2025-04-14")
        self.assertEqual(sent.path, "/v1/messages?beta=true")

    def test_short_names_resolve(self):
        self.native(model="haiku")
        self.assertEqual(self.claude.messages[-1].body["model"], "claude-haiku-5-5")

    def test_caching_is_added_only_where_the_client_set_no_mark(self):
        self.native()
        self.assertEqual(self.claude.messages[-1].body["cache_control"], {"type": "ephemeral"})
        marked_turn = {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}
        self.native(messages=[marked_turn])
        self.assertNotIn("cache_control", self.claude.messages[-1].body)
        self.start(no_cache=True)
        self.native()
        self.assertNotIn("cache_control", self.claude.messages[-1].body)

    def test_the_system_block_of_a_subscription_token_is_there_once(self):
        self.start(anthropic_api_key="", claude_code_oauth_token="sk-ant-oat01-x")
        block = claude_gateway.OAUTH_SYSTEM_BLOCK
        for system, wanted in ((None, [block]), ("Hi", [block, {"type": "text", "text": "Hi"}]),
                               ([block, {"type": "text", "text": "Hi"}], [block, {"type": "text", "text": "Hi"}])):
            with self.subTest(system=system):
                self.native(**({"system": system} if system else {}))
                self.assertEqual(self.claude.messages[-1].body["system"], wanted)

    def test_errors_are_in_anthropics_envelope(self):
        self.claude.play(Reply(429, body=error_body("rate_limit_error", "Slow"), headers={"retry-after": "60"}))
        answer = self.native()
        self.assertEqual((answer.status, answer.headers["retry-after"]), (429, "60"))
        self.assertEqual(answer.json["type"], "error")
        self.assertEqual(answer.error, {"type": "rate_limit_error", "message": "Slow"})
        answer = self.native(model="no-such-model")
        self.assertEqual((answer.status, answer.error["type"]), (404, "not_found_error"))

    def test_count_tokens_passes(self):
        answer = self.ask("POST", "/v1/messages/count_tokens", {"model": "opus", "messages": self.BODY["messages"]})
        self.assertEqual(answer.json, {"input_tokens": 11})

    def test_the_model_list_has_the_keys_of_both_apis(self):
        listed = self.ask("GET", "/v1/models").json
        entry = listed["data"][0]
        for name in ("id", "object", "created", "owned_by", "type", "display_name", "created_at"):
            self.assertIn(name, entry)
        self.assertEqual((listed["object"], listed["has_more"], listed["first_id"]), ("list", False, entry["id"]))

    def test_the_anthropic_sdk_streams_with_a_dummy_key(self):
        try:
            import anthropic
        except ImportError:
            self.skipTest("the anthropic package is not installed (it is in the dev group of pyproject.toml)")
        client = anthropic.Anthropic(base_url="http://127.0.0.1:%d" % self.service.port, api_key="dummy", max_retries=0)
        self.addCleanup(client.close)
        self.claude.play(message(text("Hi there")), message(text("Hi again")))
        with client.messages.stream(**self.BODY) as stream:
            self.assertEqual("".join(stream.text_stream), "Hi there")
        self.assertEqual(client.messages.create(**self.BODY).content[0].text, "Hi again")


# ==== Real tools ======================================================================================

try:
    import openai
except ImportError:
    openai = None                                   # the tests below say that they are skipped
SDK_MISSING = "the openai package is not installed (it is in the dev group of pyproject.toml)"


class SdkPresenceTests(unittest.TestCase):
    @unittest.skipUnless(os.environ.get("CLAUDE_GATEWAY_TEST_SDK") == "required", "only where .ci/run demands the SDK")
    def test_the_sdk_is_here_where_it_must_be(self):
        self.assertIsNotNone(openai, SDK_MISSING)


WEATHER_TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}


@unittest.skipUnless(openai, SDK_MISSING)
class OpenAiSdkTests(GatewayTestCase):
    """The real SDK against the gateway."""

    def setUp(self):
        super().setUp()
        self.client = openai.OpenAI(base_url=self.service.url, api_key="not-looked-at", max_retries=0)
        self.addCleanup(self.client.close)
        self.asked = {"model": "claude-opus-5-5", "messages": [{"role": "user", "content": "Hello"}]}

    def test_a_plain_completion(self):
        self.claude.play(message(thinking("hm", "c2ln"), text("Hi there")))
        completion = self.client.chat.completions.create(**self.asked)
        self.assertEqual(completion.choices[0].message.content, "Hi there")
        self.assertEqual(completion.choices[0].message.reasoning_content, "hm")
        self.assertEqual(completion.choices[0].finish_reason, "stop")
        self.assertEqual(completion.usage.total_tokens, 19)
        self.assertTrue(completion._request_id.startswith("req_fake_"))

    def test_the_stream_helper_accumulates_thinking_text_and_two_tool_calls(self):
        answer = message(thinking("let me see", "c2ln"), text("Both:"), tool_use("toolu_1", "get_weather", {"city": "Rom"}),
                         tool_use("toolu_2", "get_weather", {}))
        self.claude.play(answer)
        with self.client.chat.completions.stream(**self.asked, tools=[WEATHER_TOOL],
                                                 stream_options={"include_usage": True}) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        self.assertIn("tool_calls.function.arguments.done", kinds)
        chat_message = final.choices[0].message
        self.assertEqual(chat_message.content, "Both:")
        self.assertEqual([(call.id, call.function.name, json.loads(call.function.arguments))
                          for call in chat_message.tool_calls],
                         [("toolu_1", "get_weather", {"city": "Rom"}), ("toolu_2", "get_weather", {})])
        self.assertEqual(final.choices[0].finish_reason, "tool_calls")
        self.assertEqual(final.usage.prompt_tokens, 12)

    def test_errors_become_the_exceptions_of_their_status(self):
        cases = ((400, "invalid_request_error", openai.BadRequestError),
                 (401, "authentication_error", openai.AuthenticationError),
                 (403, "permission_error", openai.PermissionDeniedError),
                 (404, "not_found_error", openai.NotFoundError),
                 (429, "rate_limit_error", openai.RateLimitError),
                 (500, "api_error", openai.InternalServerError), (529, "overloaded_error", openai.InternalServerError))
        for status, kind, exception in cases:
            for stream in (False, True):
                with self.subTest(status=status, stream=stream):
                    reply = Reply(status, body=error_body(kind, "no"), headers={"retry-after": "60"})
                    self.claude.play(reply)
                    with self.assertRaises(exception) as caught:
                        self.client.chat.completions.create(**self.asked, stream=stream)
                    self.assertIn("no", str(caught.exception))

    def test_an_error_amid_a_stream_is_raised_and_not_taken_for_an_end(self):
        events = events_of(message(text("Hello there")))[:4]
        error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
        self.claude.play(Reply(pieces=[sse(events + [error])]))
        with self.assertRaises(openai.APIError) as caught:
            for _ in self.client.chat.completions.create(**self.asked, stream=True):
                pass
        self.assertEqual(caught.exception.message, "Overloaded")
        self.assertEqual(caught.exception.code, "overloaded")

    def test_a_refusal_that_no_retry_mends_costs_one_call(self):
        client = self.client.with_options(max_retries=2)
        body = error_body("invalid_request_error", "Your credit balance is too low to access the Anthropic API.")
        self.claude.play(*[Reply(400, body=body)] * 3)
        with self.assertRaises(openai.RateLimitError) as caught:
            client.chat.completions.create(**self.asked)
        self.assertEqual(caught.exception.code, "insufficient_quota")
        self.assertEqual(len(self.claude.messages), 1)

    def test_leaving_a_stream_stops_the_call_upstream(self):
        never = threading.Event()
        self.claude.play(Reply(pieces=[sse(events_of(message(text("Hello there")))[:4]), never]))
        stream = self.client.chat.completions.create(**self.asked, stream=True)
        next(iter(stream))
        stream.close()
        self.assertTrue(self.claude.wait_closed(5))

    def test_parse_returns_the_model_of_a_json_schema(self):
        pydantic = __import__("pydantic")
        point = pydantic.create_model("Point", x=(int, ...), label=(str, "none"))
        for model in ("claude-opus-5-5", "claude-haiku-4-5"):
            with self.subTest(model=model):
                self.claude.play(message(text('{"x": 3, "label": "a"}'), model=model))
                completion = self.client.chat.completions.parse(model=model, messages=self.asked["messages"],
                                                                response_format=point)
                self.assertEqual(completion.choices[0].message.parsed.x, 3)
                self.assertEqual(self.claude.messages[-1].body["output_config"]["format"]["type"], "json_schema")

    def test_a_forced_tool_comes_back_as_its_call_where_the_model_cannot_be_forced(self):
        named = {"type": "function", "function": {"name": "get_weather"}}
        for stream in (False, True):
            with self.subTest(stream=stream):
                self.claude.play(message(text('{"city": "Rom"}'), model="claude-opus-5-5"))
                asked = dict(self.asked, tools=[WEATHER_TOOL], tool_choice=named)
                if stream:
                    with self.client.chat.completions.stream(**asked) as events:
                        completion = events.get_final_completion()
                else:
                    completion = self.client.chat.completions.create(**asked)
                call = completion.choices[0].message.tool_calls[0]
                self.assertEqual((call.function.name, json.loads(call.function.arguments)),
                                 ("get_weather", {"city": "Rom"}))
                self.assertEqual(completion.choices[0].finish_reason, "tool_calls")

    def test_a_tool_loop_of_four_turns_keeps_its_thinking_and_its_prefix(self):
        """Thinking, parallel calls and an image among the results; what Claude saw before stays as it was."""
        for model in ("claude-opus-5-5", "claude-sonnet-5", "claude-opus-4-8", "claude-sonnet-4-6", "claude-haiku-4-5"):
            with self.subTest(model=model):
                self._tool_loop(model)

    def _tool_loop(self, model):
        self.claude.reset()
        chat_messages = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "Weather in two towns?"}]
        answers = [[thinking("turn %d" % turn, "c2ln%d" % turn), text("Turn %d." % turn),
                    tool_use("toolu_%da" % turn, "get_weather", {"city": "A"}),
                    tool_use("toolu_%db" % turn, "get_weather", {"city": "B"})] for turn in range(3)]
        full = [model for model in BUILT_IN_MODELS if model.startswith(self.asked["model"])]
        for blocks in answers + [[text("Sunny in both.")]]:
            self.claude.play(message(*blocks, model={"claude-haiku-4-5": "claude-haiku-4-5-20251001"}.get(model, model)))
            reply = self.client.chat.completions.create(model=model, messages=chat_messages, tools=[WEATHER_TOOL],
                                                        reasoning_effort="medium")
            chat_message = reply.choices[0].message
            chat_messages.append(chat_message.model_dump(exclude_none=True))
            for call in chat_message.tool_calls or ():
                image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}}
                chat_messages.append({"role": "tool", "tool_call_id": call.id,
                                      "content": [{"type": "text", "text": "sunny"}, image]})
        self.assertTrue(full)
        self.assertEqual(chat_messages[-1]["content"], "Sunny in both.")
        requests = [bare(request.body) for request in self.claude.messages]
        for turn, (earlier, later) in enumerate(zip(requests, requests[1:])):
            self.assertEqual(earlier["tools"], later["tools"])
            self.assertEqual(earlier["system"], later["system"])
            self.assertEqual(earlier["messages"], later["messages"][:len(earlier["messages"])])
            self.assertEqual(later["messages"][-2]["content"], answers[turn], "the answer goes back as it came")
            self.assertEqual([block["content"][1]["type"] for block in later["messages"][-1]["content"]],
                             ["image", "image"])

    def test_the_model_list_and_one_model(self):
        ids = [model.id for model in self.client.models.list()]
        self.assertIn("claude-opus-5-5", ids)
        self.assertEqual(self.client.models.retrieve("anthropic/claude-opus-5.5").object, "model")
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("claude-2")


# ==== Recorded traffic ================================================================================


def recorded_lines(name):
    with open(os.path.join(RECORDED, name), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def recorded_answers():
    """(id, content type, body) of every recorded answer of /v1/messages with status 200, two-call captures split."""
    for case in recorded_lines("anthropic.jsonl"):
        answer = case["response"]
        path = (case["request"] or {}).get("path", "/v1/messages")
        if answer["status"] != 200 or not re.match(r"/v1/messages(\?|$)", path):
            continue
        kind = answer["headers"].get("content-type")
        body = answer["body"]
        starts = [match.start() for match in re.finditer(r"(?m)^event: message_start$|^data: *\{\"type\": ?\"message_start\"",
                                                         body)] if "message_start" in body else []
        starts = [at for at in starts if body[at:].startswith("event:")] or starts
        cuts = starts[1:] if "sse:two-message-starts" in case["kind"] else []
        for start, end in zip([0] + cuts, cuts + [len(body)]):
            yield case["id"], kind, body[start:end].encode("utf-8")


def is_whole(body):
    """Whether a recorded stream has its end; hand-made fixtures of broken ones are there too."""
    return body.lstrip()[:1] == b"{" or b"message_stop" in body


@unittest.skipUnless(os.path.isdir(RECORDED), "no recorded traffic beside the project")
class RecordedAnswerTests(GatewayTestCase):
    def test_a_stream_adds_up_to_the_full_reply_for_every_answer(self):
        count = 0
        for case, kind, body in recorded_answers():
            with self.subTest(case=case):
                reply = Reply(headers={"content-type": kind}, body=body)
                self.claude.play(reply, reply)
                plain = self.chat()
                stream = self.chat(stream=True, stream_options={"include_usage": True})
                if not is_whole(body):
                    self.assertEqual((plain.status, "error" in json.loads(stream.events[-1])), (502, True))
                    continue
                self.assertEqual(plain.status, 200, plain.raw)
                self.assertEqual(stream.events[-1], "[DONE]")
                self.assertEqual(completion_from_chunks(stream.chunks), completion_parts(plain.json))
                for call in plain.message.get("tool_calls", ()):
                    if plain.json["choices"][0]["finish_reason"] != "length":
                        self.assertIsInstance(json.loads(call["function"]["arguments"]), dict)
                count += 1
        self.assertGreater(count, 450)

    def test_no_thinking_and_no_server_tool_shows_in_what_clients_act_on(self):
        for case, kind, body in recorded_answers():
            if not is_whole(body):
                continue
            with self.subTest(case=case):
                self.claude.play(Reply(headers={"content-type": kind}, body=body))
                answer = self.chat()
                for call in answer.message.get("tool_calls", ()):
                    self.assertFalse(call["id"].startswith("srvtoolu_"))
                self.assertNotIn("reasoning_content", [name for name, value in answer.message.items() if not value])

    def test_any_cut_of_a_recorded_stream_gives_the_same_chunks(self):
        plan = claude_gateway.ReplyPlan(claude_gateway.ToolNames())
        for case, kind, body in recorded_answers():
            if not (kind or "").startswith("text/event-stream") or not is_whole(body):
                continue
            with self.subTest(case=case):
                wholes = []
                for size in (1, 7, 1000, len(body)):
                    decoder, assembler = claude_gateway.EventDecoder(), claude_gateway.MessageAssembler()
                    stream = claude_gateway.ChatStream({"id": "chatcmpl-1", "created": 1}, plan, assembler, True)
                    events = [event for at in range(0, len(body), size) for event in decoder.feed(body[at:at + size])]
                    chunks = []
                    for event in events + decoder.close():
                        assembler.feed(event)
                        chunks += stream.feed(event)
                    wholes.append(chunks + stream.finish())
                self.assertTrue(all(whole == wholes[0] for whole in wholes[1:]))

    def test_every_recorded_refusal_reaches_the_client_as_an_error_of_its_kind(self):
        cases = recorded_lines("anthropic.jsonl") + recorded_lines("reported_errors.jsonl")
        for case in cases:
            answer = case["response"]
            if answer["status"] == 200:
                continue
            with self.subTest(case=case["id"]):
                reply = Reply(answer["status"], headers=dict(answer["headers"], **{"retry-after": "60"}),
                              body=answer["body"].encode("utf-8"))
                self.claude.play(reply)
                result = self.chat()
                self.assertGreaterEqual(result.status, 400)
                self.assertLess(result.status, 504)
                words = (json.loads(answer["body"]).get("error") or {}).get("message", "")
                self.assertIn(words, result.error["message"])
                self.assertTrue(result.error["type"])

    def test_every_reported_error_amid_a_stream_is_told_as_one(self):
        for case in recorded_lines("reported_errors.jsonl"):
            if case["response"]["status"] != 200:
                continue
            for stream in (False, True):
                with self.subTest(case=case["id"], stream=stream):
                    start = sse(events_of(message(text("Hello there")))[:4])
                    self.claude.play(Reply(pieces=[start, case["response"]["body"].encode("utf-8")]))
                    answer = self.chat(stream=stream)
                    error = json.loads(answer.events[-1])["error"] if stream else answer.error
                    self.assertIn(error["message"], case["response"]["body"])

    @unittest.skipUnless(openai, SDK_MISSING)
    def test_the_real_sdk_takes_every_answer_and_its_stream(self):
        client = openai.OpenAI(base_url=self.service.url, api_key="x", max_retries=0)
        self.addCleanup(client.close)
        asked = {"model": "claude-opus-5-5", "messages": [{"role": "user", "content": "Hello"}]}
        for case, kind, body in recorded_answers():
            if not is_whole(body):
                continue
            with self.subTest(case=case):
                reply = Reply(headers={"content-type": kind}, body=body)
                self.claude.play(reply, reply)
                plain = client.chat.completions.create(**asked)
                with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
                    with contextlib.suppress(openai.LengthFinishReasonError, openai.ContentFilterFinishReasonError):
                        stream.until_done()         # raises these two by design, after it has read all
                    final = stream.current_completion_snapshot
                one, other = plain.choices[0], final.choices[0]
                self.assertEqual(one.finish_reason, other.finish_reason)
                self.assertEqual(one.message.content or "", other.message.content or "")
                self.assertEqual([call.function.arguments for call in one.message.tool_calls or ()],
                                 [call.function.arguments for call in other.message.tool_calls or ()])
                self.assertEqual(plain.usage, final.usage)


    def test_the_events_of_a_response_add_up_to_the_plain_one_for_every_answer(self):
        asked = {"model": "claude-opus-5-5", "input": "Hello", "include": ["reasoning.encrypted_content"]}
        for case, kind, body in recorded_answers():
            if not is_whole(body):
                continue
            with self.subTest(case=case):
                reply = Reply(headers={"content-type": kind}, body=body)
                self.claude.play(reply, reply)
                plain = self.ask("POST", "/v1/responses", asked)
                events = self.ask("POST", "/v1/responses", dict(asked, stream=True)).chunks
                self.assertEqual(plain.status, 200, plain.raw)
                self.assertEqual([event["sequence_number"] for event in events], list(range(len(events))))
                self.assertEqual(without_ids(events[-1]["response"]), without_ids(plain.json))
                self.assertEqual(output_from_events(events), events[-1]["response"]["output"])

    @unittest.skipUnless(openai, SDK_MISSING)
    def test_the_real_sdk_takes_every_response_and_its_stream(self):
        client = openai.OpenAI(base_url=self.service.url, api_key="x", max_retries=0)
        self.addCleanup(client.close)
        for case, kind, body in recorded_answers():
            if not is_whole(body):
                continue
            with self.subTest(case=case):
                reply = Reply(headers={"content-type": kind}, body=body)
                self.claude.play(reply, reply)
                plain = client.responses.create(model="opus", input="Hello")
                with client.responses.stream(model="opus", input="Hello") as stream:
                    events = list(stream)
                self.assertEqual(events[-1].response.output_text, plain.output_text)
                self.assertEqual(plain.usage, events[-1].response.usage)


def without_ids(value):
    """A response without what differs from one to the next."""
    if isinstance(value, dict):
        return {name: without_ids(entry) for name, entry in value.items() if name not in ("id", "created_at")}
    return [without_ids(entry) for entry in value] if isinstance(value, list) else value


def output_from_events(events):
    """The items that a client puts together from the deltas alone."""
    items, texts = {}, {}
    for event in events:
        kind, at = event["type"], event.get("output_index")
        if kind == "response.output_item.added":
            assert at == len(items), "items come in order"
            items[at], texts[at] = event["item"], ""
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[at]["id"]
            texts[at] += event["delta"]
        elif kind == "response.output_item.done":
            item = event["item"]
            assert item["id"] == items[at]["id"]
            shown = {"message": lambda: item["content"][0].get("text", item["content"][0].get("refusal")),
                     "reasoning": lambda: "".join(part["text"] for part in item["summary"]),
                     "function_call": lambda: item["arguments"], "custom_tool_call": lambda: item["input"],
                     "web_search_call": lambda: ""}[item["type"]]()
            assert shown == texts[at], (shown, texts[at])
            items[at] = item
    return [items[at] for at in sorted(items)]


def without_earlier(body):
    """A body that does not continue a response which this gateway never gave."""
    return {name: value for name, value in body.items() if name != "previous_response_id"}


@unittest.skipUnless(os.path.isdir(RECORDED), "no recorded traffic beside the project")
class RecordedRequestTests(GatewayTestCase):
    """Every recorded chat request becomes a valid Messages request, or a 400 that names the field."""
    config = {"alias": (("*", "sonnet"),)}
    # what Claude has no counterpart for at all
    REFUSED = {"n", "logprobs", "input_audio", "video_url", "file_id"}

    def _check(self, path, model=None):
        refused = collections.Counter()
        for case in recorded_lines("openai_requests.jsonl"):
            if case["request"]["path"] != path:
                continue
            body = dict(case["request"]["body"])
            body.update({"model": model} if model else {})
            with self.subTest(case=case["id"], model=model):
                answer = self.ask("POST", path, without_earlier(body))
                if answer.status != 200:
                    self.assertEqual(answer.status, 400, answer.raw)
                    self.assertTrue(answer.error["param"], answer.raw)
                    refused[answer.error["param"]] += 1
        return refused

    def test_with_the_fallback_alias(self):
        refused = self._check("/v1/chat/completions")
        self.assertLess(sum(refused.values()), 20, refused)

    def test_responses_with_the_fallback_alias(self):
        refused = self._check("/v1/responses")
        self.assertLess(sum(refused.values()), 30, refused)

    def test_for_a_model_of_every_generation(self):
        for model in ("claude-opus-5-5", "claude-haiku-5-5", "claude-sonnet-5", "claude-opus-4-7", "claude-sonnet-4-6",
                      "claude-haiku-4-5"):
            for path in ("/v1/chat/completions", "/v1/responses"):
                self._check(path, model)


# ==== The README ======================================================================================

with open(os.path.join(HERE, "README.md"), encoding="utf-8") as readme_file:
    README = readme_file.read()


def readme_blocks(language):
    return re.findall(r"^```%s\n(.*?)^```$" % language, README, re.M | re.S)


class ReadmeTests(unittest.TestCase):
    """What the README shows is what happens: its commands and examples run as printed, on a free port."""

    @classmethod
    def setUpClass(cls):
        upstream = claude_gateway.SimulatedUpstream()
        cls.addClassCleanup(upstream.server_close)
        cls.addClassCleanup(upstream.shutdown)
        config = claude_gateway.demo_config(Config(host="127.0.0.1", port=0), upstream.url)
        cls.service = Service(Gateway(config))
        cls.service.start()
        cls.addClassCleanup(cls.service.close, 1)

    def test_the_option_table_is_that_of_the_parser(self):
        rows = ["| `%s%s%s` | %s |" % ("-%s, " % option.short if option.short else "", "--" + option.name,
                                      " " + option.metavar if option.metavar else "", option.help)
                for option in claude_gateway.OPTIONS]
        table = README.split("<!-- options -->")[1].split("<!-- /options -->")[0].strip().split("\n")[2:]
        self.assertEqual(table, rows)
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), self.assertRaises(SystemExit):
            claude_gateway.main(["start", "--help"])
        words = " ".join(shown.getvalue().split())
        for option in claude_gateway.OPTIONS:
            self.assertIn("--" + option.name, words)
            self.assertIn(" ".join(option.help.split()).replace("- ", "-")[:30], words.replace("- ", "-"))

    def test_every_command_that_it_names_is_there(self):
        for name in re.findall(r"`python3 claude_gateway.py (\w+)", README):
            self.assertIn(name, claude_gateway.COMMANDS)
        named = README.split("Commands: ")[1].split(", each")[0]
        self.assertEqual(set(re.findall(r"`(\w+)`", named)), set(claude_gateway.COMMANDS))

    def test_every_route_that_it_names_is_served(self):
        for method, path in re.findall(r"`(GET|POST) /v1(/[^`]*)`", README.split("## Endpoints")[1]):
            self.assertIn(method, claude_gateway.ROUTES[path])

    def test_every_error_of_its_troubleshooting_table_is_one_of_ours(self):
        with open(PROGRAM, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        said = " ".join(node.value for node in ast.walk(tree)
                        if isinstance(node, ast.Constant) and isinstance(node.value, str))
        said += "SyntaxError: future feature annotations is not defined"          # Python's own words
        said += "This credential is only authorized for use with Claude Code"     # Claude's own words
        said += "Host ."                                                          # %s between
        for row in re.findall(r"^\| (`.*?) \| ", README.split("## Troubleshooting")[1], re.M):
            for quoted in re.findall(r"`([^`]+)`", row):
                for fragment in quoted.replace("45554", "...").split("..."):
                    words = fragment.strip(" (.")
                    with self.subTest(words=words):
                        self.assertTrue(words in said, "no message says so")

    @unittest.skipUnless(shutil.which("bash") and shutil.which("curl"), "no bash and curl here")
    def test_the_shell_commands_run_as_printed(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
            free.close()
            os.symlink(sys.executable, os.path.join(folder, "python3"))
            environment = {"PATH": folder + os.pathsep + os.environ["PATH"], "HOME": folder,
                           "CLAUDE_GATEWAY_PORT": port, "PYTHONDONTWRITEBYTECODE": "1"}
            commands = [block.replace("45554", port) for block in readme_blocks("sh") if "unittest" not in block]
            # the gateway is started in the background by the first block; its own shell ends it
            script = "trap 'kill $(jobs -p); wait' EXIT\n" + "\necho; echo ----\n".join(commands)
            ended = subprocess.run(["bash", "-ec", script], cwd=HERE, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30)
        said = ended.stdout.decode()
        self.assertEqual(ended.returncode, 0, ended.stderr.decode())
        plain, streamed = said.split("----")
        self.assertIn("127.0.0.1:" + port, plain)
        self.assertIn("This is a simulated answer", plain)
        self.assertIn("data: [DONE]", streamed)

    @unittest.skipUnless(openai, SDK_MISSING)
    def test_the_python_examples_run_as_printed(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "picture.png"), "wb") as picture:
                picture.write(base64.b64decode(PIXEL))
            for block in readme_blocks("python"):
                with self.subTest(block=block[:200]):
                    code = block.replace("http://localhost:45554/v1", self.service.url)
                    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, stdin=subprocess.DEVNULL,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
                    self.assertEqual(ended.returncode, 0, ended.stderr.decode())
                    self.assertIn("simulated", ended.stdout.decode())

    def test_it_speaks_of_the_project_alone(self):
        for word in ("/work", "../shared", "/root", "pypi.org", "npmjs", "session"):
            self.assertNotIn(word, README)


class FileTests(unittest.TestCase):
    """Promises about the file itself."""
    with open(PROGRAM, encoding="utf-8") as program_file:
        SOURCE = program_file.read()
    ROOMS = dict(re.findall(r"^# ---- ([A-Z][\w ]*?) -+\n(.*?)(?=^# ---- [A-Z]|\Z)", SOURCE, re.M | re.S))

    def test_translation_touches_nothing_outside(self):
        outside = {"open", "print", "os", "sys", "time", "secrets", "socket", "select", "threading", "http", "LOG", "ssl"}
        for room in ("Models", "Requests", "Replies", "Streams"):
            with self.subTest(room=room):
                names = {node.id for node in ast.walk(ast.parse(self.ROOMS[room])) if isinstance(node, ast.Name)}
                self.assertEqual(names & outside - ({"time"} if room == "Models" else set()), set())

    def test_the_map_in_the_docstring_names_the_rooms_in_their_order(self):
        named = re.search(r"Rooms, in order, each using only those above it: (.*?)\.", " ".join(
            claude_gateway.__doc__.split())).group(1)
        self.assertEqual(named.split(", "), list(self.ROOMS))

    def test_a_room_uses_only_the_rooms_above_it(self):
        rooms = list(self.ROOMS)
        home = {}
        for room in rooms:
            for node in ast.parse(self.ROOMS[room]).body:
                names = [node.name] if hasattr(node, "name") else [
                    target.id for target in getattr(node, "targets", [getattr(node, "target", None)])
                    if isinstance(target, ast.Name)]
                home.update({name: room for name in names})
        for room in rooms:
            for node in ast.walk(ast.parse("from __future__ import annotations\n" + self.ROOMS[room])):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in home:
                    with self.subTest(room=room, name=node.id):
                        self.assertLessEqual(rooms.index(home[node.id]), rooms.index(room))

    def test_nothing_is_imported_but_the_standard_library(self):
        imported = {(node.module if isinstance(node, ast.ImportFrom) else name.name).split(".")[0]
                    for node in ast.walk(ast.parse(self.SOURCE)) if isinstance(node, (ast.Import, ast.ImportFrom))
                    for name in node.names}
        known = getattr(sys, "stdlib_module_names", None)
        if known is None:
            self.skipTest("this Python has no list of its standard library")
        self.assertEqual(imported - set(known) - {"compression"}, set())

# ==== The fake Claude =================================================================================
#
#   violations(request, headers)      every rule that a POST /v1/messages breaks, one sentence each
#   FakeClaude, Reply                 a server on 127.0.0.1 that plays queued replies and keeps what it was sent
#   message, text, tool_use, ...      what Claude says; events_of and sse say it as a stream
#
# Shapes look at one value at a time, Rules at how values go together; these are asked only about requests that
# have the right shape.

MIB = 1024 * 1024
OAUTH_BETA = "oauth-2025-04-20"

# ---- Models -------------------------------------------------------------------------------------

Model = collections.namedtuple("Model", "max_tokens images efforts thinking accepts")

# thinking: the accepted types, `*` = not with effort xhigh or max
# accepts:  sampling parameters, forced tool_choice, prefill, system messages in mid-conversation
FIVE, FOUR, THREE = "low medium high xhigh max", "low medium high max", "low medium high"
NEWEST = Model(128000, 600, FIVE, "adaptive", "system")
MODELS = {
    "claude-fable-5-2":           NEWEST,
    "claude-mythos-5-2":          NEWEST,
    "claude-haiku-5-5":           Model(128000, 600, FIVE, "adaptive disabled*", "forced system"),
    "claude-sonnet-5-5":          Model(128000, 600, FIVE, "adaptive between_tools*", "system"),
    "claude-opus-5-5":            NEWEST,
    "claude-fable-5-1":           NEWEST,
    "claude-mythos-5-1":          NEWEST,
    "claude-opus-5":              Model(128000, 600, FIVE, "adaptive disabled*", "forced system"),
    "claude-sonnet-5":            Model(128000, 600, FIVE, "adaptive disabled", "forced"),
    "claude-fable-5":             Model(128000, 600, FIVE, "adaptive", "forced system"),
    "claude-mythos-5":            Model(128000, 600, FIVE, "adaptive", "forced system"),
    "claude-opus-4-8":            Model(128000, 600, FIVE, "adaptive disabled", "forced system"),
    "claude-opus-4-7":            Model(128000, 600, FIVE, "adaptive disabled", "forced"),
    "claude-sonnet-4-6":          Model(128000, 600, FOUR, "adaptive enabled disabled", "sampling forced"),
    "claude-opus-4-6":            Model(128000, 600, FOUR, "adaptive enabled disabled", "sampling forced"),
    "claude-opus-4-5-20251101":   Model(64000, 100, THREE, "enabled disabled", "sampling forced prefill"),
    "claude-haiku-4-5-20251001":  Model(64000, 100, "", "enabled disabled", "sampling forced prefill"),
    "claude-sonnet-4-5-20250929": Model(64000, 100, "", "enabled disabled", "sampling forced prefill"),
}
MODELS.update({name[:-len("-20250929")]: MODELS[name] for name in list(MODELS) if re.search(r"-\d{8}$", name)})


# ---- Shapes -------------------------------------------------------------------------------------
# A shape is a function (value, path) -> the sentences about what is wrong with the value.

def at(path: str, name) -> str:
    """The path of a member."""
    return f"{path}.{name}" if path else str(name)


def kind(label: str, *types):
    """A value of one of these types; true and false are no numbers."""
    def shape(value, path):
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            yield f"{path}: Input should be a valid {label}"
    return shape


STRING, BOOLEAN, INTEGER = kind("string", str), kind("boolean", bool), kind("integer", int)
NUMBER, OBJECT, ANYTHING = kind("number", int, float), kind("dictionary", dict), kind("value", object, bool)


def limited(inner, allowed, complaint: str):
    """What `inner` accepts, as far as `allowed` says yes to it."""
    def shape(value, path):
        problems = list(inner(value, path))
        yield from problems
        if not problems and not allowed(value):
            yield f"{path}: {complaint}"
    return shape


def one_of(*words: str):
    """One of these strings."""
    return limited(STRING, words.__contains__, f"Input should be one of {', '.join(words)}")


def matching(pattern: str):
    """A string that the pattern matches from end to end."""
    return limited(STRING, re.compile(pattern).fullmatch, f"String should match pattern '^{pattern}$'")


def list_of(inner):
    """A list with members of one shape."""
    def shape(value, path):
        if not isinstance(value, list):
            yield f"{path}: Input should be a valid list"
            return
        for position, member in enumerate(value):
            yield from inner(member, at(path, position))
    return shape


def map_of(inner):
    """An object with any names and members of one shape."""
    def shape(value, path):
        yield from OBJECT(value, path)
        for name, member in value.items() if isinstance(value, dict) else ():
            yield from inner(member, at(path, name))
    return shape


def string_or(other, string=STRING):
    """A string, or else the other shape."""
    return lambda value, path: (string if isinstance(value, str) else other)(value, path)


def record(fields: dict):
    """An object with these fields and no others: `name!` is required, `name?` may be null."""
    shapes = {name.rstrip("!?"): shape for name, shape in fields.items()}
    required = [name[:-1] for name in fields if name.endswith("!")]
    nullable = {name[:-1] for name in fields if name.endswith("?")}

    def shape(value, path):
        if not isinstance(value, dict):
            yield from OBJECT(value, path)
            return
        for name in required:
            if name not in value:
                yield f"{at(path, name)}: Field required"
        for name, member in value.items():
            if name not in shapes:
                yield f"{at(path, name)}: Extra inputs are not permitted"
            elif member is not None or name not in nullable:
                yield from shapes[name](member, at(path, name))
    return shape


def tagged(variants: dict, tag: str = "type"):
    """A record whose fields depend on its tag."""
    records = {name: record(dict(fields, **{tag + "!": STRING})) for name, fields in variants.items()}

    def shape(value, path):
        name = value.get(tag) if isinstance(value, dict) else None
        if not isinstance(value, dict):
            yield from OBJECT(value, path)
        elif not isinstance(name, str) or name not in records:
            yield f"{at(path, tag)}: Input tag {name!r} does not match any of the expected tags: {', '.join(records)}"
        else:
            yield from records[name](value, path)
    return shape


def decodable(data: str) -> bool:
    """Whether this is base64 of something."""
    try:
        return bool(base64.b64decode(data, validate=True))
    except ValueError:
        return False


MAGIC = {                                               # media type -> how its bytes begin
    "image/png": rb"\x89PNG\r\n\x1a\n", "image/jpeg": rb"\xff\xd8\xff", "image/gif": rb"GIF8[79]a",
    "image/webp": rb"(?s)RIFF....WEBP", "application/pdf": rb"(?s).{0,1024}%PDF-",
}


def as_labelled(source: dict) -> bool:
    """Whether the bytes of a base64 source are of the media type it names."""
    return source["type"] != "base64" or bool(re.match(MAGIC[source["media_type"]], base64.b64decode(source["data"])))


UNIT = limited(NUMBER, lambda number: 0 <= number <= 1, "Input should be between 0 and 1")
NATURAL = limited(INTEGER, lambda number: number >= 0, "Input should be greater than or equal to 0")
FILLED = limited(limited(STRING, len, "text content blocks must be non-empty"), str.strip,
                 "text content blocks must contain non-whitespace text")
TOOL_NAME, TOOL_ID = matching("[a-zA-Z0-9_-]{1,64}"), matching("[a-zA-Z0-9_-]+")
BASE64 = limited(STRING, decodable, "invalid base64 data")
IMAGE_DATA = limited(BASE64, lambda data: len(data) <= 10 * MIB, "image exceeds 10 MB maximum")
HTTPS = limited(STRING, re.compile(r"https://[^/\s]+\S*").fullmatch, "Only HTTPS URLs are supported")
CACHE = tagged({"ephemeral": {"ttl": one_of("5m", "1h")}})
CITATIONS = record({"enabled": BOOLEAN})
CALLER = map_of(STRING)

URL, FILE = {"url!": HTTPS}, {"file_id!": STRING}
IMAGE_SOURCE = limited(tagged({
    "base64": {"media_type!": one_of(*[name for name in MAGIC if name.startswith("image/")]), "data!": IMAGE_DATA},
    "url": URL, "file": FILE,
}), as_labelled, "Image does not match the provided media type")

TEXT = {"text": {"text!": FILLED, "cache_control?": CACHE, "citations?": list_of(OBJECT)}}
IMAGE = {"image": {"source!": IMAGE_SOURCE, "cache_control?": CACHE, "transformations?": ANYTHING}}
DOCUMENT_SOURCE = limited(tagged({
    "base64": {"media_type!": one_of("application/pdf"), "data!": BASE64},
    "text": {"media_type!": one_of("text/plain"), "data!": STRING},
    "content": {"content!": string_or(list_of(tagged({**TEXT, **IMAGE})))},
    "url": URL, "file": FILE,
}), as_labelled, "The PDF specified was not valid")
DOCUMENT = {"document": {"source!": DOCUMENT_SOURCE, "title?": STRING, "context?": STRING, "citations?": CITATIONS,
                         "cache_control?": CACHE}}
SEARCH_RESULT = {"search_result": {"source!": STRING, "title!": STRING, "content!": list_of(tagged(TEXT)),
                                   "citations?": CITATIONS, "cache_control?": CACHE}}
TOOL_REFERENCE = {"tool_reference": {"tool_name!": TOOL_NAME, "cache_control?": CACHE}}
UPLOAD = {"container_upload": {"file_id!": STRING, "cache_control?": CACHE}}

NESTED_BLOCKS = {**TEXT, **IMAGE, **DOCUMENT, **SEARCH_RESULT, **TOOL_REFERENCE}
USER_BLOCKS = {
    **TEXT, **IMAGE, **DOCUMENT, **SEARCH_RESULT, **UPLOAD,
    "tool_result": {"tool_use_id!": TOOL_ID, "content?": string_or(list_of(tagged(NESTED_BLOCKS))),
                    "is_error?": BOOLEAN, "cache_control?": CACHE},
}
SERVER_USES = ("server_tool_use", "mcp_tool_use")
SERVER_RESULTS = [name + "_tool_result" for name in (
    "web_search", "web_fetch", "code_execution", "bash_code_execution", "text_editor_code_execution", "tool_search",
    "advisor", "mcp")]
CALL = {"name!": TOOL_NAME, "input!": OBJECT, "caller?": CALLER, "cache_control?": CACHE}
ASSISTANT_BLOCKS = {
    **TEXT, **DOCUMENT, **UPLOAD,
    "thinking": {"thinking!": STRING, "signature!": limited(STRING, len, "Invalid `signature` in `thinking` block")},
    "redacted_thinking": {"data!": limited(STRING, len, "Invalid `data` in `redacted_thinking` block")},
    "tool_use": dict(CALL, **{"id!": TOOL_ID}),
    "server_tool_use": dict(CALL, **{"id!": matching("srvtoolu_[a-zA-Z0-9_]+")}),
    "mcp_tool_use": dict(CALL, **{"id!": TOOL_ID, "server_name!": STRING}),
    **{name: {"tool_use_id!": TOOL_ID, "content!": kind("result", dict, list, str), "caller?": CALLER,
              "is_error?": BOOLEAN, "cache_control?": CACHE} for name in SERVER_RESULTS},
}
MESSAGE = tagged({role: {"content!": string_or(list_of(tagged(blocks)))} for role, blocks in (
    ("user", USER_BLOCKS), ("assistant", ASSISTANT_BLOCKS), ("system", TEXT))}, tag="role")

# ---- Schemas ------------------------------------------------------------------------------------
# JSON Schema 2020-12: where a schema holds others, and what its other keywords must look like.

MAPS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
SINGLES = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
TYPE_NAME = one_of("object", "array", "string", "number", "integer", "boolean", "null")


def json_schema(value, path: str):
    """A schema that is well formed, all through."""
    if isinstance(value, bool):
        return
    yield from OBJECT(value, path)
    for keyword, member in value.items() if isinstance(value, dict) else ():
        yield from KEYWORDS.get(keyword, ANYTHING)(member, at(path, keyword))


UNIQUE_NAMES = limited(list_of(STRING), lambda names: len(set(names)) == len(names), "items should be unique")
KEYWORDS = {
    **dict.fromkeys(MAPS, map_of(json_schema)),
    **dict.fromkeys(LISTS, limited(list_of(json_schema), len, "List should have at least 1 item")),
    **dict.fromkeys(SINGLES, json_schema),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), NUMBER),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), NATURAL),
    **dict.fromkeys(("$ref", "$schema", "title", "description", "pattern", "format"), STRING),
    "type": string_or(limited(list_of(TYPE_NAME), len, "List should have at least 1 item"), TYPE_NAME),
    "enum": list_of(ANYTHING), "required": UNIQUE_NAMES, "uniqueItems": BOOLEAN,
}
TOOL_SCHEMA = limited(limited(json_schema, lambda schema: isinstance(schema, dict) and schema.get("type") == "object",
                              'type: Input should be "object"'),
                      lambda schema: not {"oneOf", "allOf", "anyOf"} & set(schema),
                      "input_schema does not support oneOf, allOf, or anyOf at the top level")

# what strict tools and output_config.format may use of it
SUBSET = {"type", "enum", "const", "anyOf", "allOf", "$ref", "$defs", "definitions", "default", "format", "minItems",
          "pattern", "items", "properties", "required", "additionalProperties", "title", "description", "$schema"}
FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"}
BAD_REGEX = re.compile(r"\(\?<?[=!]|\\[1-9bBk]|\(\?P=")           # lookaround, back references, word boundaries


def schemas_in(schema, path: str):
    """(path, schema) for a schema and every one inside it; true and false are left out."""
    if isinstance(schema, bool):
        return
    yield path, schema
    for keyword, member in schema.items():
        inner = (member.items() if keyword in MAPS else enumerate(member) if keyword in LISTS
                 else [("", member)] if keyword in SINGLES else ())
        for name, child in inner:
            yield from schemas_in(child, at(path, keyword) + (f".{name}" if name != "" else ""))


def is_union(schema: dict) -> bool:
    """Whether the schema leaves a choice of types."""
    return "anyOf" in schema or (isinstance(schema.get("type"), list) and len(schema["type"]) > 1)


def outside_subset(schema: dict, path: str):
    """What one schema uses that structured outputs do not offer."""
    types = schema.get("type", "object" if "properties" in schema else "")
    yield from (f"{path}: property '{keyword}' is not supported" for keyword in schema if keyword not in SUBSET)
    yield from broken({
        f"{path}: For 'object' type, 'additionalProperties' must be explicitly set to false":
            ("additionalProperties" in schema or "object" in types) and schema.get("additionalProperties") is not False,
        f"{path}: For 'array' type, 'minItems' values other than 0 or 1 are not supported":
            schema.get("minItems", 0) > 1,
        f"{path}: format '{schema.get('format')}' is not supported": schema.get("format", "date") not in FORMATS,
        f"{path}: enum may only contain scalars":
            any(isinstance(word, (dict, list)) for word in schema.get("enum", ())),
        f"{path}: pattern uses a regex feature that is not supported": BAD_REGEX.search(schema.get("pattern", "")),
        f"{path}: allOf with $ref is not supported": any("$ref" in part for part in schema.get("allOf", ())
                                                         if isinstance(part, dict)),
    })


def pointed_at(root: dict, reference: str):
    """The schema a local reference leads to, or None."""
    place = root
    for step in reference.split("/")[1:]:
        place = place.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place


def bad_references(root: dict, schema, path: str, trail: tuple = ("#",)):
    """References that lead out of the schema, nowhere, or back to where they came from."""
    for _, part in schemas_in(schema, path):
        reference = part.get("$ref")
        target = pointed_at(root, reference) if reference else None
        yield from broken({
            f"{path}: external $ref '{reference}' is not supported": reference and not reference.startswith("#"),
            f"{path}: $ref '{reference}' cannot be resolved": reference and reference[0] == "#" and target is None,
            f"{path}: recursive schemas are not supported ('{reference}')": reference in trail,
        })
        if target is not None and reference[0] == "#" and reference not in trail:
            yield from bad_references(root, target, path, trail + (reference,))


# ---- Requests -----------------------------------------------------------------------------------

DOMAINS = {"allowed_domains?": list_of(STRING), "blocked_domains?": list_of(STRING)}
ON_ANY_TOOL = {"cache_control?": CACHE, "strict?": BOOLEAN, "defer_loading?": BOOLEAN,
               "allowed_callers?": list_of(STRING)}
WEB_SEARCH = {**ON_ANY_TOOL, **DOMAINS, "type!": STRING, "name!": one_of("web_search"), "max_uses?": INTEGER,
              "user_location?": tagged({"approximate": {"city?": STRING, "region?": STRING, "country?": STRING,
                                                        "timezone?": STRING}})}
WEB_FETCH = {**ON_ANY_TOOL, **DOMAINS, "type!": STRING, "name!": one_of("web_fetch"), "max_uses?": INTEGER,
             "citations?": CITATIONS, "max_content_tokens?": INTEGER, "use_cache?": BOOLEAN}
TOOLS = {                                               # pattern of the type -> shape of the tool
    r"custom": record({
        **ON_ANY_TOOL, "name!": TOOL_NAME, "description?": STRING, "input_schema!": TOOL_SCHEMA, "type?": STRING,
        "eager_input_streaming?": BOOLEAN, "input_examples?": list_of(OBJECT)}),
    r"web_search_(20250305|20260209)": record(WEB_SEARCH),
    r"web_search_20260318": record({**WEB_SEARCH, "response_inclusion?": STRING}),
    r"web_fetch_(20250910|20260209|20260309|20260318)": record(WEB_FETCH),
    r"(code_execution|tool_search_tool_(bm25|regex)|computer|bash|text_editor|memory|advisor)_\d{8}": OBJECT,
}


def tool(value, path: str):
    """A tool of any type; a tool without a type is a custom one."""
    type_name = str(value.get("type") or "custom") if isinstance(value, dict) else "custom"
    shapes = [shape for pattern, shape in TOOLS.items() if re.fullmatch(pattern, type_name)]
    if shapes:
        yield from shapes[0](value, path)
    else:
        yield f"{path}.type: Input tag '{type_name}' does not match any of the expected tags"


PARALLEL = {"disable_parallel_tool_use": BOOLEAN}
DISPLAY = {"display?": one_of("summarized", "omitted", "updates")}
BETA_FIELDS = ("context_management", "mcp_servers", "fallbacks", "fallback_credit_token", "compaction", "thread",
               "billing_policy", "output_format", "thinking.block_binding", "output_config.task_budget")
REQUEST = record({
    "model!": STRING, "max_tokens!": INTEGER, "stream": BOOLEAN,
    "messages!": limited(list_of(MESSAGE), len, "at least one message is required"),
    "system": limited(string_or(list_of(tagged(TEXT)), FILLED), len, "leave it out when it is empty"),
    "stop_sequences": list_of(limited(STRING, str.strip, "each stop sequence must contain non-whitespace")),
    "temperature": UNIT, "top_p": UNIT, "top_k": NATURAL,
    "tools": list_of(tool),
    "tool_choice": tagged({"auto": PARALLEL, "any": PARALLEL, "tool": {"name!": TOOL_NAME, **PARALLEL}, "none": {}}),
    "thinking": tagged({"adaptive": {**DISPLAY, "block_binding?": OBJECT}, "disabled": {}, "between_tools": {},
                        "enabled": {"budget_tokens!": INTEGER, **DISPLAY}}),
    "output_config": record({"effort?": one_of(*FIVE.split()), "task_budget?": OBJECT,
                             "format?": tagged({"json_schema": {"schema!": limited(json_schema, bool, "empty")}})}),
    "metadata": record({"user_id?": limited(STRING, lambda text: len(text) <= 256,
                                            "String should have at most 256 characters")}),
    "service_tier": one_of("auto", "standard_only"), "speed": one_of("standard", "fast"),
    "cache_control?": CACHE, "inference_geo?": STRING, "container?": kind("container", str, dict),
    "diagnostics?": record({"previous_message_id?": STRING}),
    **{name: ANYTHING for name in BETA_FIELDS if "." not in name},
})


# ---- Rules --------------------------------------------------------------------------------------
# A rule is a function of what `understood` makes of a request: -> the sentences about how it breaks the rule.

def broken(conditions: dict) -> list:
    """The sentences whose condition holds."""
    return [sentence for sentence, holds in conditions.items() if holds]


def blocks_of(message: dict) -> list:
    """The content blocks of a message; a string counts as one text block."""
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []


def all_blocks(messages: list):
    """(path, block) for every content block, those inside a tool result before the result itself."""
    for position, message in enumerate(messages):
        for place, block in enumerate(blocks_of(message)):
            path = f"messages.{position}.content.{place}"
            nested = block.get("content") if block["type"] == "tool_result" else None
            for inner_place, inner in enumerate(nested if isinstance(nested, list) else ()):
                yield f"{path}.content.{inner_place}", inner
            yield path, block


def betas_of(headers: dict) -> list:
    """The beta features a request asks for."""
    return [name.strip() for name in headers.get("anthropic-beta", "").split(",") if name.strip()]


def understood(request: dict, headers: dict) -> SimpleNamespace:
    """A request of the right shape, with what several rules want to know of it."""
    messages, tools = request["messages"], request.get("tools", [])
    choice, thinking = request.get("tool_choice", {}), request.get("thinking", {})
    config = request.get("output_config", {})
    paused = any(block["type"] in SERVER_USES for block in blocks_of(messages[-1]))
    schemas = [(f"tools.{n}.input_schema", tool["input_schema"]) for n, tool in enumerate(tools)
               if tool.get("strict") and "input_schema" in tool]
    schemas += [("output_config.format.schema", config["format"]["schema"])] if config.get("format") else []
    return SimpleNamespace(
        request=request, messages=messages, blocks=list(all_blocks(messages)), tools=tools, choice=choice,
        model=MODELS.get(request["model"], NEWEST), betas=set(betas_of(headers)) - {OAUTH_BETA}, schemas=schemas,
        thinking=thinking, manual=thinking.get("type") == "enabled", effort=config.get("effort"),
        format=config.get("format"), forced=choice.get("type") in ("any", "tool"),
        prefill=messages[-1]["role"] == "assistant" and not paused)      # a paused turn is handed back, not prefilled


def limits(asked):
    """Numbers, and fields that only a beta header opens."""
    request, model = asked.request, asked.model
    images = sum(block["type"] == "image" for _, block in asked.blocks)
    yield from broken({
        f"max_tokens: {request['max_tokens']} is not between 1 and {model.max_tokens}, which is the maximum allowed "
        f"number of output tokens for {request['model']}": not 1 <= request["max_tokens"] <= model.max_tokens,
        "messages: List should have at most 100000 items": len(asked.messages) > 100000,
        f"messages: {images} images are more than the {model.images} allowed": images > model.images,
        "thinking.display: updates needs a beta header": asked.thinking.get("display") == "updates" and not asked.betas,
    })
    for name in BETA_FIELDS if not asked.betas else ():
        parent, _, last = name.rpartition(".")
        if last in (request.get(parent, {}) if parent else request):
            yield f"{name}: Extra inputs are not permitted"


def sampling(asked):
    """Temperature and its like: temperature or top_p on older models, nothing but the default on newer ones."""
    request = asked.request
    changed = [name for name in ("temperature", "top_p", "top_k") if request.get(name, 1) != 1 or
               (name in request and name != "temperature")]
    yield from (f"{name}: `{name}` is deprecated for this model." for name in changed
                if "sampling" not in asked.model.accepts)
    if {"temperature", "top_p"} <= set(request):
        yield "temperature: `temperature` and `top_p` cannot both be specified for this model. Please use only one."


def thinking_rules(asked):
    """Thinking types and efforts per model, and what manual thinking rules out."""
    request, manual, model, effort = asked.request, asked.manual, asked.model, asked.effort
    name, types, budget = asked.thinking.get("type"), model.thinking.split(), asked.thinking.get("budget_tokens", 0)
    yield from broken({
        f"output_config.effort: This model does not support the effort parameter with the value {effort}.":
            effort and effort not in model.efforts.split(),
        f'thinking.type: "thinking.type.{name}" is not supported for this model. Use one of {model.thinking} and '
        '"output_config.effort" to control thinking behavior.': name and not {name, name + "*"} & set(types),
        f'thinking.type: "{name}" cannot be used with effort {effort}':
            name and name + "*" in types and effort in ("xhigh", "max"),
        "thinking.budget_tokens: Input should be greater than or equal to 1024": manual and budget < 1024,
        "thinking.budget_tokens: `max_tokens` must be greater than `thinking.budget_tokens`":
            manual and budget >= request["max_tokens"] and "interleaved-thinking-2025-05-14" not in asked.betas,
        "temperature: may only be set to 1 when thinking is enabled": manual and request.get("temperature", 1) != 1,
        "top_p: must be between 0.95 and 1 when thinking is enabled": manual and request.get("top_p", 1) < 0.95,
        "top_k: must be unset when thinking is enabled": manual and "top_k" in request,
        "tool_choice: Thinking may not be enabled when tool_choice forces tool use.": manual and asked.forced,
        "messages: prefilling is not possible when thinking is enabled": manual and asked.prefill,
    })


def thinking_first(asked):
    """Manual thinking: a turn that is in the middle of its tool calls begins with a thinking block."""
    calling = list(takewhile(lambda message: any(block["type"] in ("tool_use", "tool_result")
                                                 for block in blocks_of(message)), reversed(asked.messages)))
    turn = [message for message in reversed(calling) if message["role"] == "assistant"]
    first = blocks_of(turn[0])[0]["type"] if asked.manual and turn else "thinking"
    if first not in ("thinking", "redacted_thinking"):
        yield (f"messages.{asked.messages.index(turn[0])}.content.0.type: Expected `thinking` or `redacted_thinking`, "
               f"but found `{first}`. When `thinking` is enabled, a final `assistant` message must start with a "
               "thinking block.")


def tool_rules(asked):
    """Tools among each other, and the choice among them."""
    tools, choice, names = asked.tools, asked.choice, [tool.get("name") for tool in asked.tools]
    yield from broken({
        "tools: Tool names must be unique.": len(set(names)) < len(names),
        "tools: At most 20 tools can be strict.": sum(bool(tool.get("strict")) for tool in tools) > 20,
        "tools: Requests which include `tool_use` or `tool_result` blocks must define tools.":
            not tools and any(block["type"] in ("tool_use", "tool_result") for _, block in asked.blocks),
        "tool_choice: tool_choice may only be specified while providing tools.": choice and not tools,
        'tool_choice: type "tool" and "any" are not supported for this model.':
            asked.forced and "forced" not in asked.model.accepts,
        f"tool_choice.name: Tool '{choice.get('name')}' not found in provided tools":
            tools and "name" in choice and choice["name"] not in names,
    })
    for position, tool in enumerate(tools):
        newer = re.fullmatch(r"web_(search|fetch)_2026\d{4}", tool.get("type") or "")
        yield from broken({
            f"tools.{position}: only one of allowed_domains and blocked_domains can be given":
                tool.get("allowed_domains") and tool.get("blocked_domains"),
            f'tools.{position}.allowed_callers: this model needs ["direct"]':
                newer and "prefill" in asked.model.accepts and tool.get("allowed_callers") != ["direct"],
        })


def structured_output(asked):
    """The schemas that Claude is held to, one by one and all together."""
    for path, schema in asked.schemas:
        yield from chain.from_iterable(outside_subset(part, place) for place, part in schemas_in(schema, path))
        yield from sorted(set(bad_references(schema, schema, path)))
    parts = [part for path, schema in asked.schemas for _, part in schemas_in(schema, path)]
    optional = sum(len(set(part.get("properties", ())) - set(part.get("required", ()))) for part in parts)
    last, unions = asked.schemas[-1][0] if asked.schemas else "tools", sum(map(is_union, parts))
    cited = any(block["type"] in ("document", "search_result") and (block.get("citations") or {}).get("enabled")
                for _, block in asked.blocks)
    yield from broken({
        f"{last}: Schema is too complex for compilation. ({optional} optional parameters)": optional > 24,
        f"{last}: Schema is too complex for compilation. ({unions} union types)": unions > 16,
        "output_config.format: cannot be combined with citations": asked.format and cited,
        "output_config.format: cannot be combined with prefill": asked.format and asked.prefill,
    })


def contents(asked):
    """Everybody says something, and the last word may be Claude's only where prefill is possible."""
    messages, last = asked.messages, len(asked.messages) - 1
    final = blocks_of(messages[last])[-1:] if messages[last]["role"] == "assistant" else []
    for position, message in enumerate(messages):
        content, is_final = message["content"], position == last and message["role"] == "assistant"
        yield from broken({
            f"messages.{position}: all messages must have non-empty content except for the optional final assistant "
            "message": not content and not is_final,
            f"messages.{position}.content: text content blocks must contain non-whitespace text":
                isinstance(content, str) and content.isspace(),
        })
    yield from broken({
        f"messages.{last}: This model does not support assistant message prefill. The conversation must end with a "
        "user message.": asked.prefill and "prefill" not in asked.model.accepts,
        f"messages.{last}: final assistant content cannot end with trailing whitespace":
            any(block["type"] == "text" and block["text"][-1:].isspace() for block in final),
    })


def order_of_roles(asked):
    """A user begins; a system message follows a user's turn or a server tool's result, and precedes Claude's turn."""
    if asked.messages[0]["role"] != "user":
        yield 'messages.0: first message must use the "user" role'
    for position in [n for n, message in enumerate(asked.messages) if n and message["role"] == "system"]:
        before = [message for message in asked.messages[:position] if message["role"] != "system"][-1:]
        after = [message for message in asked.messages[position:] if message["role"] != "system"][:1]
        served = before and any(block["type"] in SERVER_RESULTS for block in blocks_of(before[0])[-1:])
        yield from broken({
            f"messages.{position}: role 'system' is not supported on this model": "system" not in asked.model.accepts,
            f"messages.{position}: role 'system' must follow a user turn or a server tool result":
                before and before[0]["role"] == "assistant" and not served,
            f"messages.{position}: role 'system' must be last or be followed by an assistant turn":
                after and after[0]["role"] != "assistant",
        })


def tool_pairs(asked):
    """Each `tool_use` is answered in the very next message, ahead of everything else there."""
    called = []                                         # the ids that the message before calls with
    for position, message in enumerate(asked.messages + [{"content": []}]):
        blocks = blocks_of(message)
        results = takewhile(lambda block: block["type"] == "tool_result", blocks)
        missing = sorted(set(called) - {block["tool_use_id"] for block in results})
        if missing:
            yield (f"messages.{position - 1}: `tool_use` ids were found without `tool_result` blocks immediately "
                   f"after: {', '.join(missing)}. Each `tool_use` block must have a corresponding `tool_result` block "
                   "in the next message.")
        for place, block in enumerate(blocks):
            if block["type"] == "tool_result" and block["tool_use_id"] not in called:
                yield (f"messages.{position}.content.{place}: unexpected `tool_use_id` found in `tool_result` blocks: "
                       f"{block['tool_use_id']}. Each `tool_result` block must have a corresponding `tool_use` block "
                       "in the previous message.")
        called = [block["id"] for block in blocks if block["type"] == "tool_use"]


def tool_ids(asked):
    """A call has its own id, a call has one result, and a server tool's result comes after its call."""
    seen = set()
    for path, block in asked.blocks:
        name = block["type"]
        mark = (name, block.get("id") or block.get("tool_use_id"))
        served = any((use, mark[1]) in seen for use in SERVER_USES)
        yield from broken({
            f"{path}: `tool_use` ids must be unique": name == "tool_use" and mark in seen,
            f"{path}: each tool_use must have a single result. Found multiple `tool_result` blocks with id: {mark[1]}":
                name == "tool_result" and mark in seen,
            f"{path}: unexpected `tool_use_id` found in `{name}` blocks: {mark[1]}. Each `{name}` block must have a "
            "corresponding `server_tool_use` block before it.": name in SERVER_RESULTS and not served,
        })
        seen.add(mark)


def cache_rules(asked):
    """At most four cache marks, the long ones first; the top-level one stands for the last block."""
    system = asked.request.get("system", [])
    places = chain(((f"tools.{n}", tool) for n, tool in enumerate(asked.tools)),
                   ((f"system.{n}", block) for n, block in enumerate(system if isinstance(system, list) else [])),
                   asked.blocks, [("", asked.request)])
    marks = [(at(path, "cache_control"), place["cache_control"].get("ttl", "5m"))
             for path, place in places if place.get("cache_control")]
    if len(marks) > 4:
        yield f"{marks[4][0]}: A maximum of 4 blocks with cache_control may be provided. Found {len(marks)}."
    for (_, ttl), (path, next_ttl) in zip(marks, marks[1:]):
        if (ttl, next_ttl) == ("5m", "1h"):
            yield f"{path}.ttl: a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block"
    ttls = {place["cache_control"].get("ttl", "5m") for place in (asked.request, *[b for _, b in asked.blocks[-1:]])
            if place.get("cache_control")}
    if len(ttls) > 1:
        yield "cache_control.ttl: differs from the ttl of the last block"


RULES = (limits, sampling, thinking_rules, tool_rules, structured_output, contents, order_of_roles, tool_pairs,
         tool_ids, thinking_first, cache_rules)


def unsendable(value, path: str = ""):
    """Lone surrogates and numbers that JSON does not have, wherever they are."""
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        yield f"{path}: string is not valid Unicode (lone surrogate)"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path}: {value} is not a JSON number"
    elif isinstance(value, (dict, list)):
        for name, member in value.items() if isinstance(value, dict) else enumerate(value):
            yield from chain(unsendable(name, at(path, ascii(name))), unsendable(member, at(path, name)))


VERSIONS = ("2023-01-01", "2023-06-01", "2026-10-21")    # the gateway's own requests all have the second


def header_rules(headers: dict) -> list:
    """What the API and our own manners ask of the headers."""
    bearer = re.fullmatch(r"Bearer (\S+)", headers.get("authorization", ""))
    return broken({
        "headers.anthropic-version: must be one of Anthropic's": headers.get("anthropic-version") not in VERSIONS,
        "headers.content-type: must be application/json":
            headers.get("content-type", "").split(";")[0].strip() != "application/json",
        "headers.x-api-key: exactly one of x-api-key and authorization is required":
            bool(headers.get("x-api-key")) == ("authorization" in headers),
        "headers.authorization: must be a bearer token": "authorization" in headers and not bearer,
        f"headers.anthropic-beta: OAuth authentication needs {OAUTH_BETA}":
            bearer and bearer.group(1).startswith("sk-ant-oat") and OAUTH_BETA not in betas_of(headers),
        "headers.user-agent: must begin with claude-gateway/":
            not headers.get("user-agent", "").startswith("claude-gateway/"),
    })


def violations(request: dict, headers: dict) -> list[str]:
    """Every rule that a POST /v1/messages breaks; how fields go together is asked once each field is right."""
    found = list(chain(header_rules(headers), unsendable(request), REQUEST(request, "")))
    if found:
        return found
    asked = understood(request, headers)
    return [sentence for rule in RULES for sentence in rule(asked)]


# ---- Builders -----------------------------------------------------------------------------------

USAGE = {"input_tokens": 12, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 7}
ONLY_AT_START = {"cache_creation", "service_tier", "speed", "inference_geo"}
MODEL = "claude-sonnet-5-5"


def text(words: str) -> dict:
    """A text block."""
    return {"type": "text", "text": words}


def tool_use(id: str, name: str, input: dict) -> dict:
    """A tool call."""
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def thinking(text: str, signature: str) -> dict:
    """A thinking block."""
    return {"type": "thinking", "thinking": text, "signature": signature}


def message(*blocks: dict, stop_reason: str | None = None, model: str = MODEL, usage: dict | None = None,
            **fields) -> dict:
    """What Claude answers; the stop reason follows from the blocks, `usage` and `fields` are laid over the usual."""
    called = any(block["type"] == "tool_use" for block in blocks)
    return dict({"id": "msg_fake", "type": "message", "role": "assistant", "model": model, "content": list(blocks),
                 "stop_reason": stop_reason or ("tool_use" if called else "end_turn"), "stop_sequence": None,
                 "stop_details": None, "usage": dict(USAGE, **usage or {})}, **fields)


def error_body(type: str, message: str) -> dict:
    """The envelope of an error, also the event of one in mid-stream."""
    return {"type": "error", "error": {"type": type, "message": message}, "request_id": "req_fake"}


def cut_up(words: str, size: int) -> list[str]:
    """A string in pieces of one size."""
    return [words[start:start + size] for start in range(0, len(words), size)]


def text_deltas(block: dict, size: int):
    """A text block: its pieces, then its citations."""
    citations = block.get("citations") or []
    yield dict(block, text="", **({"citations": []} if citations else {}))
    yield from ({"type": "text_delta", "text": piece} for piece in cut_up(block["text"], size))
    yield from ({"type": "citations_delta", "citation": citation} for citation in citations)


def thinking_deltas(block: dict, size: int):
    """A thinking block: its pieces, if it shows any, then its signature."""
    yield dict(block, thinking="", signature="")
    yield from ({"type": "thinking_delta", "thinking": piece} for piece in cut_up(block["thinking"], size))
    yield {"type": "signature_delta", "signature": block["signature"]}


def input_deltas(block: dict, size: int):
    """A tool call: an empty fragment first, and nothing more when there are no arguments."""
    yield dict(block, input={})
    arguments = json.dumps(block["input"]) if block["input"] else ""
    yield from ({"type": "input_json_delta", "partial_json": piece} for piece in [""] + cut_up(arguments, size))


DELTAS = {"text": text_deltas, "thinking": thinking_deltas, "tool_use": input_deltas, "server_tool_use": input_deltas,
          "mcp_tool_use": input_deltas}


def events_of(message: dict, size: int = 7) -> list[dict]:
    """The events that add up to a message; blocks that know no deltas arrive whole."""
    usage = message["usage"]
    opening = dict(message, content=[], stop_reason=None, stop_sequence=None, stop_details=None,
                   usage=dict(usage, output_tokens=min(1, usage["output_tokens"])))
    events = [{"type": "message_start", "message": opening}]
    for index, block in enumerate(message["content"]):
        start, *deltas = DELTAS.get(block["type"], lambda whole, size: [whole])(block, size)
        events.append({"type": "content_block_start", "index": index, "content_block": start})
        events += [{"type": "ping"}] if index == 0 else []
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    closing = {name: message[name] for name in ("stop_reason", "stop_sequence", "stop_details", "container")
               if name in message}
    counted = {name: count for name, count in usage.items() if name not in ONLY_AT_START}
    return events + [{"type": "message_delta", "delta": closing, "usage": counted}, {"type": "message_stop"}]


def sse(events: list[dict]) -> bytes:
    """Events as the API writes them, down to the spaces before the last brace."""
    lines = []
    for event in events:
        data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        padding = "" if event["type"] == "ping" else " " * (len(data) % 16)
        lines.append(f"event: {event['type']}\ndata: {data[:-1]}{padding}}}\n\n")
    return "".join(lines).encode("utf-8")


# ---- Server -------------------------------------------------------------------------------------

@dataclass
class Reply:
    """An answer down to its bytes.  Without `pieces` it is `body` with a Content-Length."""
    status: int | None = 200                            # None: hang up without a status line
    headers: dict = field(default_factory=dict)         # laid over ours; None leaves a header out
    body: bytes | dict = b""                            # a dict goes out as JSON
    pieces: list = field(default_factory=list)          # bytes, seconds to pause, or Events to wait for
    chunked: bool = True                                # pieces only; False: the end of the connection is the end
    cut: bool = False                                   # reset the connection where the end should be
    hold: list = field(default_factory=list)            # seconds or Events before the status line


@dataclass
class Recorded:
    """A request as it came."""
    method: str
    path: str
    headers: dict                                       # lower-case names
    raw: bytes
    body: dict | None                                   # None: not a JSON object


class PeerGone(Exception):
    """The gateway closed the connection before its reply ended."""


def parsed(raw: bytes):
    """The JSON object in these bytes, or None."""
    try:
        body = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


class Handler(BaseHTTPRequestHandler):
    """One connection of the gateway."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.fake = self.server.fake
        self.fake.connections.add(self.connection)

    def finish(self) -> None:
        self.fake.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Record the request, find its route, send the reply."""
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        recorded = Recorded(self.command, self.path, headers, raw, parsed(raw))
        self.fake.requests.append(recorded)
        try:
            self._send(self.fake.reply_to(recorded))
        except (PeerGone, ConnectionError):
            self.close_connection = True
            self.fake.closed.set()

    do_GET = do_DELETE = do_PUT = do_POST

    def _send(self, reply: Reply) -> None:
        """One reply, as abruptly as it asks for."""
        self._wait_for(reply.hold)
        if reply.status is not None:
            body = json.dumps(reply.body).encode("utf-8") if isinstance(reply.body, dict) else reply.body
            self._send_head(reply, len(body) + reply.cut)
            for piece in reply.pieces or [body]:
                self._send_piece(reply, piece)
            if reply.pieces and reply.chunked and not reply.cut:
                self.wfile.write(b"0\r\n\r\n")
        if reply.cut or reply.status is None or (reply.pieces and not reply.chunked):
            self._hang_up(reset=reply.cut)

    def _send_head(self, reply: Reply, length: int) -> None:
        """Status line and headers."""
        framing = {"Content-Length": str(length)}
        if reply.pieces:
            framing = {"Transfer-Encoding": "chunked"} if reply.chunked else {"Connection": "close"}
        usual = {"content-type": "text/event-stream; charset=utf-8" if reply.pieces else "application/json",
                 "request-id": f"req_fake_{len(self.fake.requests)}"}
        usual.update({name.lower(): value for name, value in reply.headers.items()})
        self.send_response(reply.status)
        for name, value in chain(framing.items(), usual.items()):
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def _send_piece(self, reply: Reply, piece) -> None:
        """Bytes, or a wait."""
        if not isinstance(piece, bytes):
            self._wait_for([piece])
        elif piece:
            chunked = reply.pieces and reply.chunked
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)

    def _wait_for(self, waits: list) -> None:
        """Seconds or Events, as long as the gateway is there."""
        for wait in waits:
            if not isinstance(wait, threading.Event):
                self._watch(wait)
                continue
            interval = 0.002
            while not wait.is_set():
                self._watch(interval)
                interval = min(interval * 2, 0.1)       # quick for a short wait, cheap for thousands of long ones

    def _watch(self, seconds: float) -> None:
        """Let time pass, and notice when the gateway, or the test, has gone."""
        self.connection.settimeout(seconds)             # select.select would end at descriptor 1024
        try:
            gone = not self.connection.recv(1, socket.MSG_PEEK)
        except (socket.timeout, BlockingIOError):
            return
        finally:
            self.connection.settimeout(None)
        if gone or self.fake.stopped.wait(seconds):     # not gone: its next request is here already
            raise PeerGone

    def _hang_up(self, reset: bool) -> None:
        """End the connection, in good order or with a reset."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                       struct.pack("hh" if os.name == "nt" else "ii", 1, 0))
            self.rfile.close()
            self.connection.close()


class Server(ThreadingHTTPServer):
    """Threads that nobody waits for, and no word about connections that break."""
    daemon_threads = True
    request_queue_size = 1024                           # at 128 a burst of 500 waits seconds for lost SYNs

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class FakeClaude:
    """Claude's place on the network.  A refused request does not use up a queued reply."""

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.requests: list[Recorded] = []
        self.violations: list[str] = []
        self.models: list[dict] | None = None           # None: no such endpoint
        self.token_replies: list = []
        self.input_tokens = 11                          # what count_tokens says
        self.closed, self.stopped = threading.Event(), threading.Event()
        self.connections: set = set()
        self._replies: list = []

    def __enter__(self) -> FakeClaude:
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.fake = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:                             # it ended by itself
                pass
        self._thread.join()

    def reset(self) -> None:
        """Forget what was sent and what was to be played."""
        for records in (self.requests, self.violations, self.token_replies, self._replies):
            records.clear()
        self.models = None
        self.closed.clear()

    @property
    def messages(self) -> list[Recorded]:
        """The requests to /v1/messages."""
        return [request for request in self.requests if urlsplit(request.path).path == "/v1/messages"]

    def play(self, *replies) -> None:
        """Queue replies for the next messages: a message, a Reply, or a function of the recorded request."""
        self._replies.extend(replies)

    def wait_closed(self, timeout: float) -> bool:
        """Whether, in this time, the gateway closes a connection whose reply has not ended."""
        return self.closed.wait(timeout)

    def reply_to(self, recorded: Recorded) -> Reply:
        """What to say to a request."""
        path = urlsplit(recorded.path).path
        for method, pattern, answer in self._ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == recorded.method:
                return answer(self, recorded, *match.groups())
        return Reply(404, body=error_body("not_found_error", f"Not found: {path}"))

    def _message(self, recorded: Recorded) -> Reply:
        """The next reply in the queue, if the request is flawless."""
        if len(recorded.raw) > 32 * MIB:
            return Reply(413, body=error_body("request_too_large", "Request exceeds the maximum size"))
        found = self._violations(recorded) if self.strict else []
        self.violations.extend(found)
        if found:
            return Reply(400, body=error_body("invalid_request_error", found[0]))
        asked = recorded.body or {}
        reply = self._next(self._replies, recorded) or message(text("Hello!"), model=asked.get("model", MODEL))
        if isinstance(reply, dict) and asked.get("stream"):
            return Reply(pieces=[sse([event]) for event in events_of(reply)])
        return reply if isinstance(reply, Reply) else Reply(body=reply)

    @staticmethod
    def _next(queue: list, recorded: Recorded):
        """The next reply of a queue, or None; functions are asked for theirs."""
        try:
            reply = queue.pop(0)
        except IndexError:
            return None
        while callable(reply):
            reply = reply(recorded)
        return reply

    def _violations(self, recorded: Recorded) -> list[str]:
        """What is wrong with a request, its bytes included."""
        if recorded.body is None:
            return ["body: the request body is not a valid JSON object"]
        return violations(recorded.body, recorded.headers)

    def _count(self, recorded: Recorded) -> Reply:
        """As many tokens as the test likes."""
        return Reply(body={"input_tokens": self.input_tokens})

    def _token(self, recorded: Recorded) -> Reply:
        """The next token reply, or a refusal in OAuth's shape."""
        reply = self._next(self.token_replies, recorded) or Reply(400, body={
            "error": "invalid_grant", "error_description": "Refresh token not found or invalid"})
        return reply if isinstance(reply, Reply) else Reply(body=reply)

    def _model_list(self, recorded: Recorded) -> Reply:
        """One page of the models."""
        if self.models is None:
            return Reply(404, body=error_body("not_found_error", "Not found"))
        query = parse_qs(urlsplit(recorded.path).query)
        ids = [model["id"] for model in self.models]
        start = ids.index(query["after_id"][0]) + 1 if query.get("after_id", [""])[0] in ids else 0
        end = start + int(query.get("limit", ["20"])[0])
        page = self.models[start:end]
        return Reply(body={"data": page, "has_more": end < len(ids), "first_id": page[0]["id"] if page else None,
                           "last_id": page[-1]["id"] if page else None})

    def _model(self, recorded: Recorded, name: str) -> Reply:
        """One model."""
        found = [model for model in self.models or [] if model["id"] == name]
        return Reply(body=found[0]) if found else Reply(404, body=error_body("not_found_error", f"model: {name}"))

    _ROUTES = (
        ("POST", r"/v1/messages", _message),
        ("POST", r"/v1/messages/count_tokens", _count),
        ("POST", r".*/oauth/token", _token),
        ("GET", r"/v1/models", _model_list),
        ("GET", r"/v1/models/(.+)", _model),
    )


if __name__ == "__main__":
    unittest.main()
