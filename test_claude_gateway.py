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


# ==== Models ==========================================================================================

ALL_MODELS = list(BUILT_IN_MODELS)
OLD_MODELS = ("claude-opus-4-5-20251101", "claude-haiku-4-5-20251001", "claude-sonnet-4-5-20250929")
UNFORCED = ("claude-fable-5-2", "claude-mythos-5-2", "claude-sonnet-5-5", "claude-opus-5-5", "claude-fable-5-1",
            "claude-mythos-5-1")                    # refuse tool_choice any and tool


def live_model(model_id: str, **fields) -> dict:
    """An entry of Claude's model list that says nothing about capabilities."""
    return dict({"id": model_id, "type": "model", "display_name": model_id, "created_at": "2026-10-01T00:00:00Z",
                 "lifecycle": "active", "max_input_tokens": 1_000_000, "max_tokens": 128_000, "capabilities": None},
                **fields)


class RequestTestCase(GatewayTestCase):
    """What chat completion requests become; `prompt` shows it without the cache marks."""

    def prompt(self, **fields) -> dict:
        return bare(self.sent(**fields))

    def turns(self, *messages: dict, **fields) -> list:
        """The messages that chat messages become."""
        return self.prompt(messages=list(messages), **fields)["messages"]

    def refused(self, status: int = 400, **fields) -> dict:
        """The error that a request gets; nothing of it may reach Claude."""
        count = len(self.claude.messages)
        answer = self.chat(**fields)
        self.assertEqual(answer.status, status, answer.raw)
        self.assertEqual(len(self.claude.messages), count, "it went to Claude all the same")
        return answer.error

    def chosen(self, request: dict):
        """The tool choice of a request; None where it is Claude's default."""
        choice = request.get("tool_choice")
        return None if choice == {"type": "auto"} else choice

    def changes(self, **fields) -> str:
        """What the gateway says it changed."""
        answer = self.chat(**fields)
        self.assertEqual(answer.status, 200, answer.raw)
        return answer.headers.get("x-claude-gateway-changes", "")


class ModelNameTests(RequestTestCase):
    def resolved(self, name: str, *aliases, models=()) -> str:
        return claude_gateway.Catalog(models, aliases).resolve(name).id

    def test_every_spelling_of_an_id_goes_to_the_id_it_means(self):
        for model_id in ALL_MODELS:
            self.assertEqual(self.resolved(model_id), model_id)
        for name, expected in (
            ("claude-sonnet-4-5", "claude-sonnet-4-5-20250929"), ("claude-haiku-4-5", "claude-haiku-4-5-20251001"),
            ("claude-opus-4-5", "claude-opus-4-5-20251101"), ("CLAUDE-Opus-5-5", "claude-opus-5-5"),
            (" claude-opus-5-5 ", "claude-opus-5-5"), ("anthropic/claude-sonnet-4.5", "claude-sonnet-4-5-20250929"),
            ("openai/claude-opus-4-8", "claude-opus-4-8"), ("claude-sonnet-4.6", "claude-sonnet-4-6"),
            ("openrouter/anthropic/claude-opus-4.8:online", "claude-opus-4-8"),
            ("claude-opus-5-5:thinking", "claude-opus-5-5"), ("claude-opus-4-6-thinking", "claude-opus-4-6"),
            ("claude-sonnet-5-5-20260928", "claude-sonnet-5-5"), ("claude-haiku-4-5-latest", OLD_MODELS[1]),
            ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "claude-sonnet-4-5-20250929"),
            ("anthropic.claude-haiku-4-5-20251001-v1:0", "claude-haiku-4-5-20251001"),
            ("bedrock/eu.anthropic.claude-opus-5-5", "claude-opus-5-5"),
            ("vertex_ai/claude-haiku-4-5@20251001", "claude-haiku-4-5-20251001"),
            ("claude-4.5-sonnet", "claude-sonnet-4-5-20250929"), ("claude_opus_5_5", "claude-opus-5-5"),
            ("claude-sonnet-4-5[1m]", "claude-sonnet-4-5-20250929"),
        ):
            with self.subTest(name=name):
                self.assertEqual(self.resolved(name), expected)

    def test_a_short_name_is_the_newest_of_its_line(self):
        for name, expected in (("opus", "claude-opus-5-5"), ("sonnet", "claude-sonnet-5-5"),
                               ("haiku", "claude-haiku-5-5"), ("fable", "claude-fable-5-2"),
                               ("mythos", "claude-mythos-5-2"), ("Opus", "claude-opus-5-5"),
                               ("claude-sonnet", "claude-sonnet-5-5"), ("claude-opus-latest", "claude-opus-5-5"),
                               ("anthropic/sonnet", "claude-sonnet-5-5")):
            with self.subTest(name=name):
                self.assertEqual(self.resolved(name), expected)

    def test_names_of_openai_go_by_their_tier(self):
        for expected, names in (
            ("claude-haiku-5-5",
             "gpt-4o-mini gpt-5-nano gpt-3.5-turbo o3-mini o4-mini-2025-04-16 gpt-5-mini GPT-4o-Mini "
                                 "openai/gpt-4.1-nano"),
            ("claude-opus-5-5", "o1 o3 o4 o3-2025-04-16 gpt-5-pro o1-pro o3-deep-research"),
            ("claude-sonnet-5-5", "gpt-4 gpt-4o gpt-4.1 gpt-5 gpt-5.1 gpt-5-codex chatgpt-4o-latest openai/gpt-4o "
                                  "gpt-4o-2024-08-06 gpt-4-turbo"),
        ):
            for name in names.split():
                with self.subTest(name=name):
                    self.assertEqual(self.resolved(name), expected)

    def test_limited_access_lines_stand_in_for_nobody(self):
        models = [claude_gateway.Model("claude-mythos-9"), claude_gateway.Model("claude-fable-9"),
                  BUILT_IN_MODELS["claude-haiku-4-5-20251001"]]
        self.assertEqual(self.resolved("gpt-4o-mini", models=models), "claude-haiku-4-5-20251001")
        for name in ("gpt-5", "o3", "opus"):
            with self.subTest(name=name), self.assertRaises(claude_gateway.ModelNotFound):
                self.resolved(name, models=models)

    def test_retired_and_unknown_names_are_404_with_names_that_work(self):
        for name, nearest in (
            ("claude-3-opus-20240229", "claude-opus-5-5"), ("claude-3-5-sonnet-20241022", "claude-sonnet-5-5"),
            ("claude-3-5-sonnet-latest", "claude-sonnet-5-5"),
            ("anthropic/claude-3.7-sonnet:thinking", "claude-sonnet-5-5"),
            ("claude-3-7-sonnet-20250219", "claude-sonnet-5-5"), ("claude-3.5-haiku", "claude-haiku-5-5"),
            ("anthropic.claude-3-haiku-20240307-v1:0", "claude-haiku-5-5"), ("claude-2.1", ""),
            ("claude-instant-1.2", ""),
            ("claude-opus-4-20250514", "claude-opus-5-5"), ("claude-opus-4-1-20250805", "claude-opus-5-5"),
            ("claude-sonnet-4", "claude-sonnet-5-5"), ("claude-sonnet-4-0", "claude-sonnet-5-5"),
            ("claude-4-sonnet", "claude-sonnet-5-5"), ("claude-mythos-preview", "claude-mythos-5-2"),
            ("claude-foo", ""), ("claude", ""), ("gemini-2.5-pro", ""), ("llama-3", ""), ("gpt-4o-audio-preview", ""),
            ("gpt-image-1", ""), ("text-embedding-3-small", ""), ("gpt-4o-realtime-preview", ""), ("whisper-1", ""),
            ("gpt-4o-mini-tts", ""), ("gpt-4o-transcribe", ""), ("dall-e-3", ""), ("omni-moderation-latest", ""),
        ):
            with self.subTest(name=name):
                error = self.refused(404, model=name)
                self.assertEqual((error["code"], error["param"], error["type"]),
                                 ("model_not_found", "model", "invalid_request_error"))
                self.assertIn(nearest, error["message"])
                self.assertRegex(error["message"], r"claude-\w+-\d.*--alias '\*=MODEL'")

    def test_an_id_newer_than_this_program_is_left_to_claude(self):
        self.assertEqual(self.resolved("claude-sonnet-6"), "claude-sonnet-6")
        self.assertEqual(self.resolved("anthropic/claude-opus-6.1"), "claude-opus-6-1")

    def test_a_missing_model_is_400_unless_there_is_a_fallback(self):
        for model in (None, ""):
            with self.subTest(model=model):
                error = self.refused(model=model)
                self.assertEqual((error["param"], error["code"]), ("model", "missing_required_parameter"))
                self.assertIn("--alias", error["message"])
        self.assertEqual(self.refused(model=7)["param"], "model")

    def test_aliases_win_and_the_star_catches_the_rest(self):
        self.start(alias=(("gpt-4o", "claude-opus-4-8"), ("Fast", "haiku"), ("*", "sonnet")))
        for name, expected in (("gpt-4o", "claude-opus-4-8"), ("fast", "claude-haiku-5-5"),
                               ("FAST", "claude-haiku-5-5"), ("gemini-2.5-pro", "claude-sonnet-5-5"),
                               ("claude-3-opus-20240229", "claude-sonnet-5-5"), (None, "claude-sonnet-5-5"),
                               ("gpt-image-1", "claude-sonnet-5-5"), ("gpt-5-mini", "claude-haiku-5-5"),
                               ("claude-opus-5", "claude-opus-5")):
            with self.subTest(name=name):
                self.assertEqual(self.sent(model=name)["model"], expected)

    def test_the_answer_names_the_model_that_answered(self):
        self.assertEqual(self.chat(model="gpt-4o-mini").json["model"], "claude-haiku-5-5")
        chunks = self.chat(model="gpt-4o-mini", stream=True).chunks
        self.assertEqual({chunk["model"] for chunk in chunks}, {"claude-haiku-5-5"})


class LiveModelListTests(RequestTestCase):
    def listed(self, *models: dict) -> None:
        """A gateway whose upstream tells these models."""
        self.claude.models = list(models)
        self.start()

    def test_the_newest_active_one_counts_and_no_date_does(self):
        self.listed(live_model("claude-opus-7", lifecycle="deprecated", created_at="2027-01-01T00:00:00Z"),
                    live_model("claude-opus-6", created_at="2026-11-01T00:00:00Z", retires_at="2026-01-01T00:00:00Z"),
                    live_model("claude-opus-5-5", created_at="2026-12-24T00:00:00Z"))
        self.assertEqual(self.sent(model="opus")["model"], "claude-opus-6")
        self.assertEqual(self.sent(model="gpt-5-pro")["model"], "claude-opus-6")

    def test_a_deprecated_one_serves_where_it_is_the_last(self):
        self.listed(live_model("claude-opus-5", lifecycle="deprecated"),
                    live_model("claude-opus-6", lifecycle="retired"))
        self.assertEqual(self.sent(model="opus")["model"], "claude-opus-5")

    def test_the_list_is_complete(self):
        self.listed(live_model("claude-opus-5-5"), live_model("claude-sonnet-4-6", lifecycle="retired"))
        self.assertEqual(self.refused(404, model="claude-opus-6")["code"], "model_not_found")
        self.assertEqual(self.refused(404, model="claude-haiku-5-5")["code"], "model_not_found")
        for name in ("claude-sonnet-4-6", "claude-sonnet-4-7"):
            nearest = self.refused(404, model=name)["message"].partition("Nearest")[2]
            self.assertNotIn("claude-sonnet-4-6", nearest)

    def test_what_the_list_says_wins_over_the_table(self):
        self.listed(live_model("claude-opus-5-5", max_tokens=32_000, capabilities={
            "effort": {"supported": True, **{name: {"supported": name != "max"} for name in FIVE.split()}},
            "thinking": {"supported": True, "types": {"adaptive": {"supported": True},
                                                      "disabled": {"supported": True}}}}))
        request = self.sent(model="opus", reasoning_effort="max")
        self.assertEqual((request["max_tokens"], request["output_config"]), (32_000, {"effort": "high"}))
        self.claude.strict = False                  # the fake goes by the table
        self.addCleanup(setattr, self.claude, "strict", True)
        self.assertEqual(self.sent(model="opus", reasoning_effort="none")["thinking"], {"type": "disabled"})

    def test_where_the_list_is_silent_the_table_speaks(self):
        self.listed(live_model("claude-sonnet-4-6"))
        self.assertEqual(self.sent(model="sonnet", temperature=0.5)["temperature"], 0.5)

    def test_a_model_without_a_row_is_treated_like_the_newest_generation(self):
        self.listed(live_model("claude-sonnet-6"))
        request = self.prompt(model="sonnet", temperature=0.2, tools=[a_tool("f"), a_tool("g")], tool_choice="required")
        self.assertNotIn("temperature", request)
        self.assertIsNone(self.chosen(request))
        self.assertEqual(request["thinking"], {"type": "adaptive", "display": "summarized"})

    def test_a_list_that_makes_no_sense_leaves_the_table(self):
        self.listed({"id": 5}, {"id": None, "type": "model"})
        self.assertEqual(self.sent(model="opus")["model"], "claude-opus-5-5")

    def test_odd_entries_do_no_harm(self):
        self.listed(live_model("claude-opus-5-5", capabilities=[], max_tokens=None, created_at=None, retires_at=None,
                               lifecycle=None), live_model("claude-sonnet-5-5", created_at=""))
        self.assertEqual(self.sent(model="opus")["max_tokens"], 128_000)

    def test_the_models_on_offer_have_the_shape_of_openai(self):
        self.start(alias=(("my/model", "haiku"), ("*", "opus")))
        body = self.ask("GET", "/v1/models").json
        self.assertEqual(body["object"], "list")
        entries = {entry["id"]: entry for entry in body["data"]}
        self.assertEqual(len(entries), len(body["data"]))
        self.assertLessEqual(set(ALL_MODELS) | {"opus", "sonnet", "haiku", "fable", "mythos", "my/model"}, set(entries))
        self.assertNotIn("*", entries)
        for entry in entries.values():
            with self.subTest(id=entry["id"]):
                self.assertEqual((entry["object"], entry["owned_by"]), ("model", "anthropic"))
                self.assertIsInstance(entry["created"], int)
                self.assertIsInstance(entry["context_length"], int)
        self.assertEqual(entries["claude-sonnet-4-5-20250929"]["shutdown_date"], "2026-11-30")
        self.assertEqual(entries["claude-opus-5-5"]["created"], 1_790_035_200)
        self.assertEqual(entries["claude-mythos-5-2"]["created"], 0)        # no date known
        self.assertEqual(self.ask("GET", "/v1/models/anthropic%2Fclaude-opus-5-5").json["object"], "model")

    def test_one_model_is_found_in_any_spelling_or_404(self):
        for name, expected in (("opus", 200), ("anthropic%2Fclaude-sonnet-4.5", 200), ("gpt-4o-mini", 200),
                               ("claude-3-opus-20240229", 404), ("gpt-4o-mini-tts", 404)):
            with self.subTest(name=name):
                answer = self.ask("GET", "/v1/models/" + name)
                self.assertEqual(answer.status, expected)
                if expected == 404:
                    self.assertEqual(answer.error["code"], "model_not_found")

    def test_retired_models_are_not_on_offer(self):
        self.listed(live_model("claude-opus-5-5"), live_model("claude-opus-4", lifecycle="retired"))
        names = [entry["id"] for entry in self.ask("GET", "/v1/models").json["data"]]
        self.assertEqual(names, ["claude-opus-5-5", "opus"])


class ModelLessonTests(RequestTestCase):
    def setUp(self):
        super().setUp()
        self.start()                                # lessons outlive a request, not a gateway

    def is_free(self, request: dict) -> bool:
        return self.chosen(request) is None

    def refuse_once(self, words: str) -> None:
        self.claude.play(Reply(400, body=error_body("invalid_request_error", words)))

    def test_a_400_that_names_a_parameter_is_learnt_from(self):
        prefill = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One,"}]
        for model, words, fields, gone in (
            ("claude-sonnet-4-6", "`temperature` is deprecated for this model.", {"temperature": 0.3},
             lambda request: "temperature" not in request),
            ("claude-opus-4-8", 'tool_choice: type "tool" and "any" are not supported for this model.',
             {"tools": [a_tool("f"), a_tool("g")], "tool_choice": "required"}, self.is_free),
            ("claude-opus-4-5", "This model does not support the effort parameter.", {"reasoning_effort": "low"},
             lambda request: "output_config" not in request),
            ("claude-haiku-4-5",
             "This model does not support assistant message prefill. The conversation must end with "
             "a user message.", {"messages": prefill}, lambda request: request["messages"][-1]["role"] == "user"),
            ("claude-haiku-5-5", '"thinking.type.disabled" is not supported for this model.',
             {"reasoning_effort": "none"}, lambda request: request.get("thinking", {}).get("type") != "disabled"),
            ("claude-fable-5", "role 'system' is not supported on this model",
             {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
             lambda request: [turn["role"] for turn in request["messages"]] == ["user"]),
        ):
            with self.subTest(words=words):
                self.refuse_once(words)
                self.assertEqual(self.chat(model=model, **fields).status, 200)
                self.assertFalse(gone(self.claude.messages[-2].body))
                self.assertTrue(gone(self.claude.messages[-1].body))
                self.assertTrue(gone(self.sent(model=model, **fields)), "not remembered")

    def test_a_lower_output_limit_is_learnt(self):
        self.refuse_once("max_tokens: 128000 > 96000, which is the maximum allowed number of output tokens for x")
        self.chat(model="claude-opus-5-5")
        self.assertEqual(self.sent(model="claude-opus-5-5")["max_tokens"], 96_000)

    def test_a_lesson_whose_retry_fails_is_forgotten(self):
        self.refuse_once("`temperature` is deprecated for this model.")
        self.refuse_once("something else is wrong")
        self.assertEqual(self.chat(model="claude-opus-4-6", temperature=0.3).status, 400)
        self.assertEqual(len(self.claude.messages), 2)
        self.assertEqual(self.sent(model="claude-opus-4-6", temperature=0.3)["temperature"], 0.3)

    def test_a_lesson_about_one_model_is_none_about_another(self):
        self.refuse_once("`temperature` is deprecated for this model.")
        self.chat(model="claude-sonnet-4-6", temperature=0.3)
        self.assertEqual(self.sent(model="claude-opus-4-6", temperature=0.3)["temperature"], 0.3)

    def test_a_400_about_something_else_is_handed_on(self):
        self.refuse_once("messages.0.content.0.image.source: could not process image")
        answer = self.chat(model="claude-opus-4-6", temperature=0.3)
        self.assertEqual((answer.status, len(self.claude.messages)), (400, 1))
        self.assertIn("could not process image", answer.error["message"])

    def test_an_error_about_a_tool_names_the_tool(self):
        self.refuse_once("tools.1.custom.input_schema: JSON schema is invalid")
        error = self.chat(tools=[a_tool("first"), a_tool("my.tool")]).error
        self.assertIn("my.tool", error["message"])


# ==== Requests ========================================================================================

def a_tool(name: str, parameters=None, **fields) -> dict:
    """A function tool of OpenAI's."""
    return {"type": "function", "function": dict({"name": name, "parameters": parameters or {
        "type": "object", "properties": {"x": {"type": "integer"}}}}, **fields)}


def a_call(call_id, name: str = "f", arguments='{"x":1}') -> dict:
    """An entry of `tool_calls`."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*tool_calls: dict, content=None) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(tool_calls)}


def result(call_id, content="ok", **fields) -> dict:
    return dict({"role": "tool", "tool_call_id": call_id, "content": content}, **fields)


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def system(content) -> dict:
    return {"role": "system", "content": content}


def said(role: str, *words: str) -> dict:
    """A message of the Messages API that holds these texts."""
    return {"role": role, "content": [text(each) for each in words]}


ASKED = user("Hi")


class RequestDoorTests(RequestTestCase):
    def test_a_wrong_type_is_400_and_named_by_its_path(self):
        function = {"type": "function", "function": {"name": "f"}}
        for path, fields in (
            ("messages", {"messages": "Hi"}), ("messages", {"messages": []}), ("messages", {"messages": {}}),
            ("messages", {"messages": None}), ("messages[0]", {"messages": ["Hi"]}),
            ("messages[1]", {"messages": [ASKED, None]}), ("messages[0].role", {"messages": [{"content": "x"}]}),
            ("messages[0].role", {"messages": [{"role": 1, "content": "x"}]}),
            ("messages[0].role", {"messages": [{"role": "robot", "content": "x"}]}),
            ("messages[0].content", {"messages": [user(5)]}), ("messages[0].content", {"messages": [user({"a": 1})]}),
            ("messages[0].content[1]", {"messages": [user(["a", 7])]}),
            ("messages[0].content[0].text", {"messages": [user([{"type": "text", "text": 5}])]}),
            ("messages[0].content[0].text", {"messages": [user([{"type": "text"}])]}),
            ("messages[0].content[0].image_url", {"messages": [user([{"type": "image_url"}])]}),
            ("messages[0].content[0].image_url.url",
             {"messages": [user([{"type": "image_url", "image_url": {"url": 5}}])]}),
            ("messages[1].tool_calls", {"messages": [ASKED, {"role": "assistant", "tool_calls": {}}]}),
            ("messages[1].tool_calls[0]", {"messages": [ASKED, {"role": "assistant", "tool_calls": [None]}]}),
            ("messages[1].tool_calls[0].function", {"messages": [ASKED, calls({"id": "a"})]}),
            ("messages[1].tool_calls[0].function.name", {"messages": [ASKED, calls({"id": "a", "function": {}})]}),
            ("messages[1].tool_calls[0].function.arguments", {"messages": [ASKED, calls(a_call("a", "f", 5))]}),
            ("messages[1].tool_calls[0].id", {"messages": [ASKED, calls(a_call(5))]}),
            ("messages[2].tool_call_id", {"messages": [ASKED, calls(a_call("a")), result(5)]}),
            ("messages[1].function_call", {"messages": [ASKED, {"role": "assistant", "function_call": "f"}]}),
            ("tools", {"tools": {}}), ("tools[0]", {"tools": ["f"]}), ("tools[1]", {"tools": [function, None]}),
            ("tools[0].function", {"tools": [{"type": "function", "function": "f"}]}),
            ("tools[0].function.name", {"tools": [{"type": "function", "function": {}}]}),
            ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": " "}}]}),
            ("tools[0].function.description", {"tools": [a_tool("f", description=5)]}),
            ("tools[0].function.parameters", {"tools": [a_tool("f", "x: int")]}),
            ("tools[0].function.parameters.type", {"tools": [a_tool("f", {"type": "string"})]}),
            ("tools[0].function.parameters.properties", {"tools": [a_tool("f", {"type": "object", "properties": []})]}),
            ("functions", {"functions": {}}), ("functions[0].name", {"functions": [{}]}),
            ("tool_choice", {"tools": [function], "tool_choice": 5}),
            ("tool_choice", {"tools": [function], "tool_choice": "sometimes"}),
            ("tool_choice", {"tools": [function], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
            ("tool_choice.function.name", {"tools": [function], "tool_choice": {"type": "function", "function": {}}}),
            ("max_tokens", {"max_tokens": "many"}), ("max_tokens", {"max_tokens": True}),
            ("max_tokens", {"max_tokens": []}),
            ("max_completion_tokens", {"max_completion_tokens": {}}), ("temperature", {"temperature": []}),
            ("temperature", {"temperature": True}), ("temperature", {"temperature": "1e999"}), ("top_p", {"top_p": {}}),
            ("n", {"n": 2}), ("n", {"n": "two"}), ("logprobs", {"logprobs": True}), ("logprobs", {"logprobs": 1}),
            ("stop", {"stop": 5}), ("stop[1]", {"stop": ["a", 5]}), ("stream", {"stream": 1}),
            ("stream_options", {"stream": True, "stream_options": []}),
            ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
            ("user", {"user": 5}), ("response_format", {"response_format": "json"}),
            ("response_format.type", {"response_format": {"type": "xml"}}),
            ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
            ("response_format.json_schema.schema",
             {"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}}),
            ("reasoning_effort", {"reasoning_effort": "huge"}), ("reasoning_effort", {"reasoning_effort": 3}),
            ("reasoning.effort", {"reasoning": {"effort": "huge"}}), ("reasoning", {"reasoning": "high"}),
            ("thinking", {"thinking": "on"}), ("thinking.type", {"thinking": {"type": "deep"}}),
            ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": "lots"}}),
            ("web_search_options", {"web_search_options": True}),
            ("web_search_options.search_context_size", {"web_search_options": {"search_context_size": "giant"}}),
            ("parallel_tool_calls", {"parallel_tool_calls": "perhaps"}), ("service_tier", {"service_tier": 1}),
        ):
            with self.subTest(path=path, fields=fields):
                error = self.refused(**fields)
                self.assertEqual((error["param"], error["type"]), (path, "invalid_request_error"))
                self.assertIn(path.split(".")[-1].split("[")[0], error["message"])

    def test_what_clients_get_wrong_is_repaired(self):
        for fields, expected in (
            ({"max_tokens": 4096.0}, {"max_tokens": 4096}), ({"max_tokens": "4096"}, {"max_tokens": 4096}),
            ({"max_tokens": 4096.4}, {"max_tokens": 4096}),
            ({"max_tokens": 0}, {"max_tokens": 128_000}), ({"max_tokens": -1}, {"max_tokens": 128_000}),
            ({"max_completion_tokens": None, "max_tokens": 5000}, {"max_tokens": 5000}),
            ({"temperature": "0.7"}, {"temperature": 0.7}), ({"temperature": None}, {"temperature": None}),
            ({"stop": None}, {"stop_sequences": None}), ({"stop": ""}, {"stop_sequences": None}),
            ({"stop": []}, {"stop_sequences": None}), ({"stop": ["\n"]}, {"stop_sequences": None}),
            ({"stop": ["END", None, ""]}, {"stop_sequences": ["END"]}),
            ({"tools": []}, {"tools": None}), ({"tools": None, "tool_choice": "auto"},
                                               {"tools": None, "tool_choice": None}),
            ({"tool_choice": "required"}, {"tool_choice": None}), ({"tool_choice": ""}, {"tool_choice": None}),
            ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": []}, {"tool_choice": None}),
            ({"n": None}, {}), ({"n": 1}, {}), ({"n": "1"}, {}), ({"user": None}, {"metadata": None}),
            ({"stream": "false"}, {"stream": True}), ({"response_format": None}, {"output_config": None}),
            ({"reasoning_effort": None}, {"output_config": None}), ({"reasoning_effort": ""}, {"output_config": None}),
            ({"functions": None, "function_call": None}, {"tools": None}),
            ({"parallel_tool_calls": None}, {"tool_choice": None}),
        ):
            with self.subTest(fields=fields):
                request = self.sent(model="claude-sonnet-4-6", **fields)
                self.assertEqual({name: request.get(name) for name in expected}, expected)

    def test_a_null_is_the_same_as_nothing_for_every_field(self):
        nothing = self.sent()
        for name in claude_gateway.CHAT_FIELDS:
            if name not in ("model", "messages"):
                with self.subTest(name=name):
                    self.assertEqual(self.sent(**{name: None}), nothing)

    def test_a_stream_wish_may_be_a_string(self):
        self.assertEqual(self.chat(stream="true").events[-1], "[DONE]")

    def test_unknown_fields_are_no_error(self):
        request = self.sent(min_p=0.1, keep_alive="5m", options={"num_ctx": 1}, whatever=[1])
        self.assertEqual(set(request) - {"model", "max_tokens", "stream", "thinking", "messages"}, set())

    def test_lone_surrogates_become_replacement_characters(self):
        # inside `arguments` they are escaped twice, so the door for bodies does not see them
        for body, where in ((r'"Hi \ud83d"', lambda turns: turns[-1]["content"][0]["text"]),):
            raw = '{"model": "opus", "messages": [{"role": "user", "content": %s}]}' % body
            answer = self.ask("POST", "/v1/chat/completions", raw.encode("ascii"))
            self.assertEqual(answer.status, 200, answer.raw)
            self.assertEqual(where(self.claude.messages[-1].body["messages"]), "Hi \ufffd")
            self.assertIn("lone_surrogates", answer.headers["x-claude-gateway-changes"])
        turns = self.turns(ASKED, calls(a_call("a", "f", '{"x": "\\ud83d"}')), result("a"), tools=[a_tool("f")])
        self.assertEqual(turns[1]["content"][0]["input"], {"x": "\ufffd"})

    def test_translation_leaves_its_arguments_alone(self):
        chat = {"model": "opus", "tools": [a_tool("a.b", {"type": "object", "properties": {"y": {"minimum": 1}}},
                                                  strict=True)],
                "messages": [system("S"), user([{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]),
                             calls(a_call("a", "a.b", {"y": 1})), result("a", [{"type": "text", "text": "r"}]),
                             system("T")],
                "response_format": {"type": "json_object"}, "tool_choice": "required"}
        before = json.dumps(chat)
        for model in BUILT_IN_MODELS.values():
            claude_gateway.messages_request_from_chat(chat, model, [{"type": "text", "text": "P"}])
        self.assertEqual(json.dumps(chat), before)

    def test_hostile_values_are_told_and_never_break_the_gateway(self):
        for fields in (
            {"messages": [ASKED, dict(assistant("x"), thinking_blocks=5)]},
            {"messages": [ASKED, dict(assistant("x"), reasoning_details=True)]},
            {"messages": [ASKED, dict(assistant("x"), thinking_blocks={"a": 1}, reasoning_content=[1])]},
            {"messages": [ASKED, dict(assistant("x"), refusal=None, audio={"id": "x"}, annotations=5)]},
            {"messages": [ASKED, calls(a_call("a", "f", '{"x": 1e999}')), result("a")]},
            {"messages": [ASKED, calls(a_call("a", "f", '{"x": NaN}')), result("a")]},
            {"messages": [ASKED, calls(a_call("a", "f", "9" * 5_000)), result("a")]},
            {"messages": [dict(ASKED, cache_control=5)]}, {"cache_control": "x"}, {"prompt_cache_options": {"ttl": []}},
            {"messages": [user([{"type": [], "text": "x"}])]}, {"messages": [user([{"type": "text", "text": "x",
                                                                              "cache_control": {"type": []}}])]},
            {"messages": [user([{"type": "image", "source": {"type": "base64", "data": PIXEL, "media_type": 5}}])]},
            {"tools": [{"type": 5, "function": {"name": "f"}}]}, {"tools": [{"type": {"a": 1}}]},
            {"tools": [a_tool("f")], "tool_choice": {"type": ["function"], "name": "f"}},
            {"user": "u" * 300}, {"user": ""}, {"metadata": {"a": "b" * 9000}}, {"seed": 2 ** 70}, {"top_k": -5},
            {"verbosity": "extreme"}, {"speed": "warp"}, {"service_tier": "flex"}, {"logit_bias": {"50256": -100}},
            {"text": 5}, {"text": {"verbosity": []}}, {"max_output_tokens": "x"},
        ):
            with self.subTest(fields=str(fields)[:120]):
                answer = self.chat(**fields)
                self.assertIn(answer.status, (200, 400), answer.raw)

    def test_every_schema_however_broken_is_answered(self):
        broken_schemas = (
            {"type": "object", "properties": {"a": 1}}, {"type": "object", "properties": {"a": {"enum": 5}}},
            {"type": "object", "properties": {"a": {"anyOf": 5}}}, {"type": "object", "required": 5},
            {"type": "object", "required": [["a"]], "properties": {"a": {}}}, {"anyOf": [{"properties": []}]},
            {"anyOf": [{"required": 5}, {"required": [{}]}]}, {"anyOf": [{"$ref": "#/$defs/B"}], "$defs": {"B": {
                "properties": [1]}}}, {"allOf": [5]}, {"allOf": [{"type": "object"}, None]},
            {"type": "object", "properties": {"a": {"allOf": [5]}}}, {"type": "object", "description": 5, "minimum": 1},
            {"type": "object", "properties": {"a": {"type": {"b": 1}}}}, {"$ref": 5}, {"$ref": "#/nowhere"},
            {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}, {"type": "object", "$defs": {"a": 5}},
            {"type": "object", "properties": {"a": {"items": 5}}}, {"type": 5}, {"oneOf": []}, {"type": []},
            {"type": "object", "properties": {"a": {"type": "string", "description": ["x"], "maxLength": 3}}},
            {"type": "object", "properties": {"a": {"type": "object", "properties": [1]}}},
        )
        self.claude.strict = False                  # such schemas are the client's own affair; a 500 would be ours
        self.addCleanup(setattr, self.claude, "strict", True)
        for schema in broken_schemas:
            for fields in ({"tools": [a_tool("f", schema)]}, {"tools": [a_tool("f", schema, strict=True)]},
                           {"tools": [a_tool("f", schema)], "tool_choice": "required"},
                           {"response_format": {"type": "json_schema",
                                                "json_schema": {"name": "n", "schema": schema}}}):
                with self.subTest(fields=fields):
                    answer = self.chat(**fields)
                    self.assertIn(answer.status, (200, 400), answer.raw)


class ParameterTests(RequestTestCase):
    def test_the_output_limit_is_the_clients_up_to_the_models(self):
        for model, fields, expected in (
            ("opus", {}, 128_000), ("claude-haiku-4-5", {}, 64_000), ("opus", {"max_tokens": 5000}, 5000),
            ("opus", {"max_completion_tokens": 2000, "max_tokens": 5000}, 2000),
            ("opus", {"max_tokens": 200_000}, 128_000), ("claude-haiku-4-5", {"max_completion_tokens": 100_000},
                                                         64_000),
        ):
            with self.subTest(model=model, fields=fields):
                self.assertEqual(self.sent(model=model, **fields)["max_tokens"], expected)
        self.assertEqual(self.changes(max_tokens=200_000), "clamped=max_tokens")

    def test_sampling_goes_to_the_models_that_take_it(self):
        for model in ALL_MODELS:
            takes = model in OLD_MODELS + ("claude-sonnet-4-6", "claude-opus-4-6")
            with self.subTest(model=model):
                request = self.sent(model=model, temperature=0.5, top_k=7)
                self.assertEqual({name: request.get(name) for name in ("temperature", "top_k")},
                                 {"temperature": 0.5, "top_k": 7} if takes else {"temperature": None, "top_k": None})
                self.assertEqual(self.changes(model=model, temperature=0.5), "" if takes else "dropped=temperature")
                self.assertEqual(self.changes(model=model, temperature=1, top_p=1), "")

    def test_sampling_is_brought_into_claudes_range(self):
        for fields, expected, told in (
            ({"temperature": 1.7}, {"temperature": 1}, "clamped=temperature"),
            ({"temperature": -1}, {"temperature": 0}, "clamped=temperature"),
            ({"temperature": 0}, {"temperature": 0}, ""), ({"top_p": 0.9}, {"top_p": 0.9}, ""),
            ({"temperature": 0.2, "top_p": 0.9}, {"temperature": 0.2}, "dropped=top_p"),
            ({"temperature": 1, "top_p": 0.9}, {"top_p": 0.9}, ""),
            ({"temperature": 0.2, "top_p": 1}, {"temperature": 0.2}, ""),
        ):
            with self.subTest(fields=fields):
                answer = self.chat(model="claude-sonnet-4-6", **fields)
                request = self.claude.messages[-1].body
                self.assertEqual({name: request[name] for name in ("temperature", "top_p") if name in request},
                                 expected)
                self.assertEqual(answer.headers.get("x-claude-gateway-changes", ""), told)

    def test_stop_sequences_are_filtered_and_keep_their_order(self):
        self.assertEqual(self.sent(stop="END")["stop_sequences"], ["END"])
        self.assertEqual(self.sent(stop=["b", " ", "a", "", "\n\n"])["stop_sequences"], ["b", "a"])
        self.assertEqual(self.sent(stop=["1", "2", "3", "4", "5"])["stop_sequences"], ["1", "2", "3", "4", "5"])
        self.assertEqual(self.changes(stop=["\n"]), "dropped=stop")

    def test_an_opaque_user_id_is_handed_on_and_no_address(self):
        for fields, expected in (({"user": "u-123"}, {"user_id": "u-123"}),
                                 ({"safety_identifier": "s"}, {"user_id": "s"}),
                                 ({"user": "u", "safety_identifier": "s"}, {"user_id": "s"}),
                                 ({"user": "ann@example.com"}, None), ({"user": "+49 170 1234567"}, None),
                                 ({"user": "u" * 257}, None), ({"user": "u" * 256}, {"user_id": "u" * 256}),
                                 ({"user": ""}, None)):
            with self.subTest(fields=fields):
                self.assertEqual(self.sent(**fields).get("metadata"), expected)
        self.assertEqual(self.changes(user="ann@example.com"), "dropped=user")

    def test_service_tiers_are_mapped_to_their_twins(self):
        for tier, expected in (("auto", {}), ("default", {"service_tier": "standard_only"}), ("priority", {}),
                               ("fast", {"speed": "fast"}), ("flex", {})):
            with self.subTest(tier=tier):
                request = self.sent(model="claude-opus-5-5", service_tier=tier)
                self.assertEqual({name: request[name] for name in ("service_tier", "speed") if name in request},
                                 expected)
        self.assertEqual(self.changes(service_tier="flex"), "dropped=service_tier")
        self.assertEqual(self.changes(service_tier="auto"), "")
        self.assertEqual(self.sent(speed="fast")["speed"], "fast")
        self.assertIn("fast-mode-2026-02-01", self.claude.messages[-1].headers["anthropic-beta"])

    def test_a_field_that_says_the_default_is_no_change(self):
        self.assertEqual(self.changes(
            n=1, logprobs=False, top_logprobs=0, presence_penalty=0, frequency_penalty=0.0, logit_bias={},
            temperature=1, top_p=1.0, modalities=["text"], parallel_tool_calls=True, response_format={"type": "text"},
            stop=None, verbosity="medium", service_tier="auto", stream=False,
            stream_options={"include_obfuscation": False}), "")

    def test_what_has_no_effect_on_answers_is_not_reported_and_not_refused(self):
        self.start(strict=True)
        fields = {"store": True, "metadata": {"a": "b"}, "prompt_cache_key": "k", "prompt_cache_retention": "24h",
                  "user": "u-1", "prompt_cache_options": {"mode": "implicit"},
                  "messages": [user([{"type": "image_url", "image_url": {
                      "url": "data:image/png;base64," + PIXEL, "detail": "high"}}])]}
        self.assertEqual(self.changes(**fields), "")

    def test_what_has_no_counterpart_is_dropped_and_told(self):
        for name, value in (("seed", 0), ("presence_penalty", 0.5), ("frequency_penalty", -1), ("logit_bias", {"1": 2}),
                            ("prediction", {"type": "content", "content": "x"}), ("audio", {"voice": "x"}),
                            ("modalities", ["text", "audio"]), ("top_logprobs", 3), ("min_p", 0.1)):
            with self.subTest(name=name):
                self.assertEqual(self.changes(**{name: value}), "dropped=" + name)

    def test_nothing_that_is_dropped_is_dropped_in_silence(self):
        for name, value in (("verbosity", "extreme"), ("speed", "warp"), ("service_tier", "scale")):
            with self.subTest(name=name):
                answer = self.chat(**{name: value})
                self.assertTrue(answer.status == 400 or name in answer.headers.get("x-claude-gateway-changes", ""))


class ConversationTests(RequestTestCase):
    def test_neighbours_of_one_role_become_one_turn(self):
        self.assertEqual(self.turns(user("a"), user("b"), assistant("c"), assistant("d"), user("e")),
                         [said("user", "a", "b"), said("assistant", "c", "d"), said("user", "e")])

    def test_empty_texts_and_turns_fall_away(self):
        for messages, expected in (
            ([user([{"type": "text", "text": " "}, {"type": "text", "text": "a"}])], [said("user", "a")]),
            ([user("a"), assistant(""), user("b")], [said("user", "a", "b")]),
            ([user("a"), assistant(None), user("b")], [said("user", "a", "b")]),
            ([user("a"), {"role": "assistant"}, user("b")], [said("user", "a", "b")]),
            ([user("a"), assistant([]), user("\n"), user("b")], [said("user", "a", "b")]),
            ([user("a"), assistant("b"), user(" "), assistant("c"), user("d")],
             [said("user", "a"), said("assistant", "b", "c"), said("user", "d")]),
            ([user("a"), dict(assistant("b"), tool_calls=[]), user("c")],
             [said("user", "a"), said("assistant", "b"), said("user", "c")]),
            ([user("a"), dict(assistant("b"), tool_calls=None, function_call=None), user("c")],
             [said("user", "a"), said("assistant", "b"), said("user", "c")]),
        ):
            with self.subTest(messages=messages):
                self.assertEqual(self.turns(*messages), expected)

    def test_a_conversation_without_a_word_of_the_user_gets_one(self):
        for messages in ([system("Name this chat.")], [user("")], [user(" ")], [user([])], [user(None)],
                         [system("S"), assistant("Hello, I am Al.")], [assistant("Hello")]):
            with self.subTest(messages=messages):
                turn = self.turns(*messages)[0]
                self.assertEqual(turn["role"], "user")
                self.assertTrue(turn["content"][0]["text"].strip())

    def test_an_assistant_that_speaks_first_keeps_its_words(self):
        turns = self.turns(assistant("Hello, I am Al."), user("Hi Al"))
        self.assertEqual([turn["role"] for turn in turns], ["user", "assistant", "user"])
        self.assertEqual(turns[1:], [said("assistant", "Hello, I am Al."), said("user", "Hi Al")])

    def test_the_last_word_of_the_assistant_is_a_prefill_where_that_is_possible(self):
        for model in ALL_MODELS:
            with self.subTest(model=model):
                turns = self.turns(user("Count"), assistant("One, two, \n"), model=model)
                if model in OLD_MODELS:
                    self.assertEqual(turns, [said("user", "Count"), said("assistant", "One, two,")])
                else:
                    self.assertEqual([turn["role"] for turn in turns], ["user", "assistant", "user"])
                    self.assertEqual(turns[1]["content"][0]["text"].strip(), "One, two,")

    def test_a_prefill_wins_over_thinking_and_an_effort_leaves_both_alone(self):
        for model in OLD_MODELS:
            with self.subTest(model=model):
                request = self.prompt(model=model, reasoning_effort="high", messages=[user("Count"), assistant("One,")])
                self.assertEqual(request["messages"][-1], said("assistant", "One,"))
                self.assertNotIn("thinking", request)

    def test_a_prefill_gives_way_to_an_answer_format(self):
        request = self.prompt(model="claude-haiku-4-5", messages=[user("Count"), assistant("{")],
                              response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": POINT}})
        self.assertEqual(request["messages"][-1]["role"], "user")

    def test_names_and_refusals_do_not_get_lost_or_in_the_way(self):
        self.assertEqual(self.turns(dict(user("a"), name="ann"), dict(assistant(None), refusal="I will not."),
                                    user("b")),
                         [said("user", "a"), said("assistant", "I will not."), said("user", "b")])
        self.assertEqual(self.turns(user("a"), assistant([{"type": "refusal", "refusal": "No."}]), user("b"))[1],
                         said("assistant", "No."))

    def test_what_sdks_add_to_messages_is_ignored(self):
        extra = {"refusal": None, "annotations": [], "audio": None, "reasoning_content": "I thought", "reasoning": "so",
                 "provider_specific_fields": {}, "parsed": None, "id": "x", "timestamp": 1, "images": []}
        self.assertEqual(self.turns(ASKED, dict(assistant("b"), **extra), user("c"))[1], said("assistant", "b"))

    def test_unsigned_reasoning_never_becomes_thinking_and_signed_does(self):
        for extra, expected in (
            ({"reasoning_content": "hm"}, []), ({"thinking_blocks": [{"type": "thinking", "thinking": "hm"}]}, []),
            ({"reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}, []),
            ({"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s1"}]}, [thinking("hm", "s1")]),
            ({"reasoning_details": [{"type": "reasoning.text", "text": "hm", "signature": "s1", "index": 0}]},
             [thinking("hm", "s1")]),
            ({"thinking_blocks": [{"type": "redacted_thinking", "data": "d"}]},
             [{"type": "redacted_thinking", "data": "d"}]),
            ({"content": [{"type": "thinking", "thinking": "hm", "signature": "s1"}, {"type": "text", "text": "b"}]},
             [thinking("hm", "s1")]),
        ):
            with self.subTest(extra=extra):
                turns = self.turns(ASKED, dict(assistant("b"), **extra), user("c"))
                self.assertEqual(turns[1]["content"], expected + [text("b")])


class AnyHistoryTests(unittest.TestCase):
    def test_any_order_of_messages_makes_a_valid_request_that_keeps_every_word(self):
        kinds = [user("USER"), user(" "), assistant("SAID"), assistant(""), system("NOTE"), calls(a_call("a")),
                 calls(a_call("a", "g"), a_call("b:1", "f", ""), content="CALLS"), result("a", "RESULT"),
                 result("b:1", None),
                 {"role": "tool", "content": "NAMELESS"}, {"role": "function", "name": "g", "content": "FUNCTION"}]
        histories = [[one, two, three] for one in kinds for two in kinds for three in kinds]
        histories += [[user("USER"), calls(a_call("a"), a_call("a")), *history] for history in histories[::7]]
        words = ("USER", "SAID", "NOTE", "CALLS", "NAMELESS")
        for at, messages in enumerate(histories):
            model = ("claude-opus-5-5", "claude-sonnet-5", "claude-sonnet-4-6", "claude-haiku-4-5-20251001")[at % 4]
            with self.subTest(model=model, messages=messages):
                request = claude_gateway.messages_request_from_chat(
                    {"messages": messages, "tools": [a_tool("f"), a_tool("g")]}, BUILT_IN_MODELS[model]).request
                self.assertEqual(violations(request, GOOD_HEADERS), [])
                whole, given = json.dumps(request), json.dumps(messages)
                # of two results of one call the last counts, so the nameless one is sure of its place only alone
                alone = sum(map(given.count, ('"role": "tool"', '"role": "function"'))) == 1
                for word in words if alone else words[:-1]:
                    self.assertEqual(whole.count(word), given.count(word))


class SystemMessageTests(RequestTestCase):
    def test_leading_ones_become_blocks_of_their_own(self):
        request = self.prompt(messages=[system("A"), {"role": "developer", "content": "B"},
                                        system([{"type": "text", "text": "C"},
                                                {"type": "text", "text": " "}]), system(None), ASKED])
        self.assertEqual(request["system"], [text("A"), text("B"), text("C")])
        self.assertEqual(request["messages"], [said("user", "Hi")])
        self.assertNotIn("system", self.sent(messages=[system(""), ASKED]))

    def test_later_ones_stay_in_place_only_where_the_model_and_the_order_allow_it(self):
        placed = set(ALL_MODELS) - {"claude-sonnet-5", "claude-opus-4-7", "claude-sonnet-4-6", "claude-opus-4-6"} \
            - set(OLD_MODELS)
        for model in ALL_MODELS:
            stays = model in placed
            for name, messages, roles in (
                ("last", [user("a"), system("NOTE")], ["user", "system"]),
                ("before the assistant", [user("a"), system("NOTE"), assistant("b"), user("c")],
                 ["user", "system", "assistant", "user"]),
                ("after results", [user("a"), calls(a_call("1")), result("1"), system("NOTE")],
                 ["user", "assistant", "user", "system"]),
                ("before a user", [user("a"), assistant("b"), user("c"), system("NOTE"), user("d")],
                 ["user", "assistant", "user"]),
                ("after the assistant", [user("a"), assistant("b"), system("NOTE"), user("c")],
                 ["user", "assistant", "user"]),
                ("last after the assistant", [user("a"), assistant("b"), system("NOTE")],
                 ["user", "assistant", "user"]),
                ("between call and result", [user("a"), calls(a_call("1")), system("NOTE"), result("1"), user("b")],
                 ["user", "assistant", "user"]),
                ("developer, twice", [user("a"), {"role": "developer", "content": "NOTE"}, system("NOTE 2")],
                 ["user", "system"]),
            ):
                with self.subTest(model=model, name=name):
                    turns = self.turns(*messages, model=model, tools=[a_tool("f")])
                    self.assertEqual([turn["role"] for turn in turns],
                                     roles if stays else [role for role in roles if role != "system"])
                    self.assertIn("NOTE", json.dumps(turns))

    def test_one_that_cannot_stay_is_marked_as_what_it_is(self):
        turns = self.turns(user("a"), system("Be brief."), user("b"), model="claude-sonnet-5")
        self.assertEqual([turn["role"] for turn in turns], ["user"])
        words = [block["text"] for block in turns[0]["content"]]
        self.assertEqual((words[0], words[2]), ("a", "b"))
        self.assertRegex(words[1], r"(?s)system.*Be brief\..*system")

    def test_it_is_never_hoisted(self):
        for model in ALL_MODELS:
            with self.subTest(model=model):
                request = self.prompt(model=model, messages=[system("A"), ASKED, assistant("b"), system("LATE"),
                                                             user("c")])
                self.assertEqual(request["system"], [text("A")])

    def test_it_takes_text_only(self):
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}}
        self.assertEqual(self.refused(messages=[system([image]), ASKED])["param"], "messages[0].content")


class ToolHistoryTests(RequestTestCase):
    """Calls and results of the history, however a client tells them."""

    def told(self, *messages: dict, **fields) -> list:
        return self.turns(*messages, tools=fields.pop("tools", [a_tool("f"), a_tool("g")]), **fields)

    def pairs(self, turns: list) -> list:
        """(id, content) of every result, in order."""
        return [(block["tool_use_id"], block.get("content")) for turn in turns for block in turn["content"]
                if block["type"] == "tool_result"]

    def test_text_comes_before_the_calls_and_results_before_text(self):
        self.assertEqual(
            self.told(ASKED, calls(a_call("a"), a_call("b", "g", "{}"), content="Two calls."), result("b", "2"),
                      result("a", "1"), user("And now?")),
            [said("user", "Hi"),
             {"role": "assistant", "content": [text("Two calls."), tool_use("a", "f", {"x": 1}),
                                               tool_use("b", "g", {})]},
             {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "1"},
                                          {"type": "tool_result", "tool_use_id": "b", "content": "2"},
                                          text("And now?")]}])

    def test_a_late_result_moves_up_to_its_call(self):
        for name, messages in (
            ("behind the user", [ASKED, calls(a_call("a")), user("wait"), result("a", "R")]),
            ("behind another turn", [ASKED, calls(a_call("a")), user("wait"), assistant("Waiting."), result("a", "R")]),
            ("behind an empty turn", [ASKED, calls(a_call("a"), a_call("b")), result("b"), assistant(""),
                                      result("a", "R")]),
            ("behind a system note", [ASKED, calls(a_call("a")), system("note"), result("a", "R"), user("go on")]),
        ):
            with self.subTest(name=name):
                turns = self.told(*messages)
                self.assertEqual(turns[2]["content"][0], {"type": "tool_result", "tool_use_id": "a", "content": "R"})
                self.assertNotIn("no result", json.dumps(turns))

    def test_a_result_that_moved_is_told(self):
        self.assertNotEqual(self.changes(tools=[a_tool("f")], messages=[
            ASKED, calls(a_call("a")), user("wait"), assistant("Waiting."), result("a", "R"), user("So?")]), "")

    def test_a_call_without_a_result_gets_one_that_says_so(self):
        for messages in ([ASKED, calls(a_call("a"), a_call("b")), result("a"), user("Go on")],
                         [ASKED, calls(a_call("b")), user("Go on")], [ASKED, calls(a_call("b"))],
                         [ASKED, calls(a_call("b")), assistant("Never mind."), user("Go on")]):
            with self.subTest(messages=messages):
                turns = self.told(*messages)
                missing = [block for block in turns[2]["content"] if block.get("tool_use_id") == "b"]
                self.assertEqual(len(missing), 1)
                self.assertTrue(missing[0]["is_error"])
        self.assertIn("repaired=", self.changes(messages=[ASKED, calls(a_call("a")), user("x")], tools=[a_tool("f")]))

    def test_a_result_without_its_call_stays_as_text(self):
        for messages in ([ASKED, result("ghost", "It is 5 o'clock.")], [result("ghost", "It is 5 o'clock."), ASKED],
                         [ASKED, calls(a_call("a")), result("a"), result("ghost", "It is 5 o'clock.")]):
            with self.subTest(messages=messages):
                turns = self.told(*messages)
                words = " ".join(block.get("text", "") for block in turns[-1]["content"])
                self.assertIn("It is 5 o'clock.", words)
                self.assertIn("ghost", words)
        self.assertIn("repaired=messages[1]", self.changes(messages=[ASKED, result("ghost")]))

    def test_of_two_results_of_one_call_the_last_counts(self):
        turns = self.told(ASKED, calls(a_call("a")), result("a", "old"), result("a", "new"))
        self.assertEqual(self.pairs(turns), [("a", "new")])
        self.assertIn("repaired=", self.changes(messages=[ASKED, calls(a_call("a")), result("a"), result("a")]))

    def test_an_id_that_comes_again_is_told_apart_with_its_result(self):
        turns = self.told(ASKED, calls(a_call("a")), result("a", "1"), calls(a_call("a")), result("a", "2"),
                          calls(a_call("a")), result("a", "3"))
        pairs = self.pairs(turns)
        self.assertEqual([content for _, content in pairs], ["1", "2", "3"])
        self.assertEqual(len({call_id for call_id, _ in pairs}), 3)

    def test_an_id_twice_in_one_turn_pairs_call_by_call(self):
        pairs = self.pairs(self.told(ASKED, calls(a_call("a"), a_call("a", "g")), result("a", "1"), result("a", "2")))
        self.assertEqual([content for _, content in pairs], ["1", "2"])

    def test_ids_that_claude_refuses_are_mapped_and_never_collide(self):
        raw_ids = ["call:1/x", "call_1_x", "call 1 x", "ü", "é", "x" * 300, "a", "A-1_b"]
        turns = self.told(ASKED, calls(*[a_call(raw) for raw in raw_ids]), *[result(raw, raw) for raw in raw_ids])
        used = [block["id"] for block in turns[1]["content"]]
        self.assertEqual(len(set(used)), len(raw_ids))
        self.assertEqual(self.pairs(turns), list(zip(used, raw_ids)))
        self.assertEqual((used[1], used[6], used[7]), ("call_1_x", "a", "A-1_b"))

    def test_calls_and_results_without_ids_pair_in_their_order(self):
        turns = self.told(ASKED, calls(a_call(None), a_call("", "g")), result(None, "1"),
                          {"role": "tool", "content": "2"})
        self.assertEqual([content for _, content in self.pairs(turns)], ["1", "2"])
        turns = self.told(ASKED, calls(a_call(None), a_call(None, "g")), {"role": "tool", "name": "g", "content": "G"},
                          {"role": "tool", "name": "f", "content": "F"})
        self.assertEqual([content for _, content in self.pairs(turns)], ["F", "G"])

    def test_the_same_history_gives_the_same_ids_however_long_it_grows(self):
        history = [ASKED, calls(a_call("a:1")), result("a:1"), calls(a_call("a:1"), a_call(None)), result("a:1"),
                   result(None)]
        short = self.told(*history)
        long = self.told(*history, assistant("x"), user("y"), calls(a_call("a:1")), result("a:1"))
        self.assertEqual(long[:len(short)], short)

    def test_any_content_of_a_result_is_kept(self):
        for content, expected in (("text", "text"), (None, None), ("", None), (7, "7"), (1.5, "1.5"), (True, "true"),
                                  ({"a": 1}, '{"a": 1}'), ([], None), ([{"type": "text", "text": "t"}], [text("t")]),
                                  (["a", "b"], [text("a"), text("b")]), ([{"type": "text", "text": " "}], None)):
            with self.subTest(content=content):
                self.assertEqual(self.pairs(self.told(ASKED, calls(a_call("a")), result("a", content))),
                                 [("a", expected)])
        missing = {"role": "tool", "tool_call_id": "a"}
        self.assertEqual(self.pairs(self.told(ASKED, calls(a_call("a")), missing)), [("a", None)])

    def test_images_in_results_are_images(self):
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
        for part in ({"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}},
                     {"type": "input_image", "image_url": "data:image/png;base64," + PIXEL}, image):
            with self.subTest(type=part["type"]):
                turns = self.told(ASKED, calls(a_call("a")), result("a", [{"type": "text", "text": "See"}, part]))
                self.assertEqual(self.pairs(turns), [("a", [text("See"), image])])

    def test_arguments_become_an_object_whatever_they_are(self):
        for arguments, expected in (
            ('{"a": 1}', {"a": 1}), ("", {}), (" ", {}), (None, {}), ("null", {}), ({"a": 1}, {"a": 1}), ("{}", {}),
            ("[1]", {"value": [1]}), ('"s"', {"value": "s"}), ("5", {"value": 5}), ("false", {"value": False}),
            ('{"a": "b', {"a": "b"}), ('{"a": [1, {"b": 2', {"a": [1, {"b": 2}]}), ('{"a": 1', {"a": 1}),
            ('{"a":1}{"b":2}', {"_raw": '{"a":1}{"b":2}'}), ("not json", {"_raw": "not json"}),
            ('{"a": ', {"_raw": '{"a": '}), ('{"a": NaN}', {"_raw": '{"a": NaN}'}), ('{"a": "}', {"a": "}"}),
            ("9" * 5_000, {"_raw": "9" * 5_000}), ('{"a": 1e999}', {"_raw": '{"a": 1e999}'}),
            ('{"a": 1, "a": 2}', {"a": 2}), ('{"a": "\\"', {"a": '"'}),
        ):
            with self.subTest(arguments=arguments):
                turns = self.told(ASKED, calls(a_call("a", "f", arguments)), result("a"))
                self.assertEqual(turns[1]["content"][0]["input"], expected)
        self.assertIn("repaired=messages[1].tool_calls[0].function.arguments", self.changes(
            messages=[ASKED, calls(a_call("a", "f", "oops")), result("a")], tools=[a_tool("f")]))

    def test_arguments_that_are_nested_too_deep_stay_text(self):
        # a body like that is refused before it is parsed; inside a string it must not get through either
        for depth in (300, 900, 5_000):
            with self.subTest(depth=depth):
                arguments = "[" * depth + "]" * depth
                turns = self.told(ASKED, calls(a_call("a", "f", arguments)), result("a"))
                self.assertEqual(turns[1]["content"][0]["input"], {"_raw": arguments})

    def test_leftovers_of_stream_deltas_do_no_harm(self):
        call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
        self.assertEqual(self.told(ASKED, calls(call), result("a"))[1]["content"], [tool_use("a", "f", {})])

    def test_calls_of_neighbouring_messages_belong_to_one_turn(self):
        turns = self.told(ASKED, calls(a_call("a")), calls(a_call("b")), result("a", "1"), result("b", "2"))
        self.assertEqual([turn["role"] for turn in turns], ["user", "assistant", "user"])
        self.assertEqual(self.pairs(turns), [("a", "1"), ("b", "2")])

    def test_a_history_with_tools_needs_no_tools_in_the_request(self):
        for fields in ({}, {"tools": []}, {"tool_choice": "none"}):
            with self.subTest(fields=fields):
                request = self.prompt(messages=[ASKED, calls(a_call("a", "my.tool"), a_call("b")), result("a"),
                                                result("b")],
                                      **fields)
                self.assertEqual([tool["name"] for tool in request["tools"]], ["my_tool", "f"])
                self.assertEqual(request["tool_choice"], {"type": "none"})

    def test_legacy_function_messages_pair_by_name_and_order(self):
        functions = [{"name": "f", "parameters": {"type": "object", "properties": {}}}, {"name": "g"}]
        request = self.prompt(functions=functions, messages=[
            ASKED, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "F"},
            {"role": "assistant", "content": None, "function_call": {"name": "g", "arguments": '{"y":1}'}},
            {"role": "function", "name": "g", "content": None}])
        turns = request["messages"]
        self.assertEqual([turn["role"] for turn in turns], ["user", "assistant", "user", "assistant", "user"])
        self.assertEqual([content for _, content in self.pairs(turns)], ["F", None])
        self.assertEqual([tool["name"] for tool in request["tools"]], ["f", "g"])

    def test_custom_calls_come_back_as_the_string_they_were(self):
        tool = {"type": "custom", "custom": {"name": "patch", "description": "Edits"}}
        request = self.prompt(tools=[tool], messages=[
            ASKED, calls({"id": "a", "type": "custom", "custom": {"name": "patch", "input": "*** x"}}), result("a")])
        self.assertEqual(request["messages"][1]["content"], [tool_use("a", "patch", {"input": "*** x"})])

    def test_tool_names_are_mapped_everywhere_and_back(self):
        long = "n" * 140
        names = ["a.b", "a_b", "a/b", "mcp:x y", "名前", long, "x" * 64]
        self.claude.play(lambda recorded: message(
            *[tool_use("c%d" % at, tool["name"], {}) for at, tool in enumerate(recorded.body["tools"])]))
        answer = self.chat(tools=[a_tool(name) for name in names], messages=[
            ASKED, calls(a_call("1", "a.b"), a_call("2", long), a_call("3", "gone.tool")), result("1"), result("2"),
            result("3")])
        self.assertEqual(answer.status, 200, answer.raw)
        request = self.claude.messages[-1].body
        sent_names = [tool["name"] for tool in request["tools"]]
        self.assertEqual((sent_names[1], sent_names[6]), ("a_b", "x" * 64))
        self.assertEqual(len(set(sent_names)), len(names))
        used = [block["name"] for block in request["messages"][1]["content"]]
        self.assertEqual(used[:2], [sent_names[0], sent_names[5]])
        self.assertNotIn(used[2], sent_names)
        self.assertEqual([call["function"]["name"] for call in answer.message["tool_calls"]], names)
        self.assertIn("changed=", answer.headers["x-claude-gateway-changes"])

    def test_mapped_names_are_mapped_back_in_streams(self):
        self.claude.play(lambda recorded: message(tool_use("c", recorded.body["tools"][0]["name"], {})))
        chunks = self.chat(tools=[a_tool("ns.do it")], stream=True).chunks
        self.assertEqual(completion_from_chunks(chunks)["message"]["tool_calls"][0]["function"]["name"], "ns.do it")


# ---- content parts

def png(width: int, height: int) -> str:
    """The beginning of a PNG of this size, in base64: as much of it as the gateway looks at."""
    return base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height)
                            + b"\x08\x06\0\0\0").decode()


def jpeg(width: int, height: int) -> str:
    """The same of a JPEG, with a segment before the frame header."""
    return base64.b64encode(b"\xff\xd8\xff\xe0\x00\x10" + b"JFIF\0" + bytes(9) + b"\xff\xc0\x00\x11\x08"
                            + struct.pack(">HH", height, width) + bytes(12)).decode()


def gif(width: int, height: int) -> str:
    return base64.b64encode(b"GIF89a" + struct.pack("<HH", width, height) + bytes(10)).decode()


def webp(width: int, height: int) -> str:
    return base64.b64encode(b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + struct.pack("<I", width - 1)[:3]
                            + struct.pack("<I", height - 1)[:3] + bytes(8)).decode()


PDF = base64.b64encode(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF\n").decode()


def image_block(data: str, media_type: str = "image/png") -> dict:
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


def pdf_block(**fields) -> dict:
    return dict({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}},
                **fields)


def text_file(words: str, **fields) -> dict:
    return dict({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": words}}, **fields)


def image_url(url) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


class ContentPartTests(RequestTestCase):
    def block(self, part: dict, **fields) -> dict:
        """The content block that a part of a user message becomes."""
        blocks = self.turns(user([{"type": "text", "text": "See:"}, part]), **fields)[0]["content"]
        self.assertEqual((len(blocks), blocks[0]), (2, text("See:")))
        return blocks[1]

    def refused_part(self, part: dict) -> dict:
        return self.refused(messages=[user([{"type": "text", "text": "See:"}, part])])

    def test_an_image_is_understood_in_all_its_spellings(self):
        url_safe = PIXEL.replace("+", "-").replace("/", "_").rstrip("=")
        spaced = "\r\n ".join(PIXEL[start:start + 20] for start in range(0, len(PIXEL), 20))
        for name, part in (
            ("url object", image_url("data:image/png;base64," + PIXEL)),
            ("bare string", {"type": "image_url", "image_url": "data:image/png;base64," + PIXEL}),
            ("with detail", {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL,
                                                                "detail": "low"}}),
            ("bare base64", image_url(PIXEL)), ("no media type", image_url("data:;base64," + PIXEL)),
            ("wrong media type", image_url("data:image/jpeg;base64," + PIXEL)),
            ("octet-stream", image_url("data:application/octet-stream;base64," + PIXEL)),
            ("upper case", image_url("DATA:IMAGE/PNG;BASE64," + PIXEL)),
            ("parameters", image_url("data:image/png;charset=utf-8;base64," + PIXEL)),
            ("line breaks", image_url("data:image/png;base64," + spaced)), ("no padding", image_url(
                "data:image/png;base64," + PIXEL.rstrip("="))),
                ("url-safe", image_url("data:image/png;base64," + url_safe)),
            ("percent signs", image_url("data:image/png;base64," + urllib.parse.quote(PIXEL, safe=""))),
            ("input_image", {"type": "input_image", "image_url": "data:image/png;base64," + PIXEL}),
            ("anthropic", image_block(PIXEL)), ("anthropic, wrong type", image_block(PIXEL, "image/webp")),
            ("file", {"type": "file", "file": {"file_data": "data:image/png;base64," + PIXEL, "filename": "a.png"}}),
        ):
            with self.subTest(name=name):
                self.assertEqual(self.block(part), image_block(PIXEL))

    def test_the_bytes_say_what_an_image_is(self):
        for data, media_type in ((png(5, 5), "image/png"), (jpeg(5, 5), "image/jpeg"), (gif(5, 5), "image/gif"),
                                 (webp(5, 5), "image/webp")):
            with self.subTest(media_type=media_type):
                self.assertEqual(self.block(image_url("data:image/jpg;base64," + data)), image_block(data, media_type))
        self.assertEqual(self.changes(messages=[user([image_url("data:image/jpg;base64," + jpeg(5, 5))])])[:9],
                         "repaired=")

    def test_a_web_address_is_left_to_claude(self):
        for part in (image_url("https://example.com/a.png"),
                     {"type": "image_url", "image_url": "https://example.com/a.png"},
                     {"type": "input_image", "image_url": "https://example.com/a.png"},
                     {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}):
            with self.subTest(part=part):
                self.assertEqual(self.block(part), {"type": "image", "source": {
                    "type": "url", "url": "https://example.com/a.png"}})

    def test_addresses_that_are_not_public_are_refused_by_name(self):
        for url in ("file:///etc/passwd", "ftp://example.com/a.png", "http://127.0.0.1/a.png",
                    "https://localhost/a.png",
                    "https://a.localhost/a.png", "http://10.0.0.1/", "http://192.168.1.1/",
                    "http://169.254.169.254/latest",
                    "http://[::1]/", "http://[fe80::1]/", "https://0.0.0.0/", "http://[::ffff:127.0.0.1]/",
                    "http:///a.png",
                    "https://exa mple.com/", "javascript:alert(1)", "a.png", "", "http://[bad/"):
            with self.subTest(url=url):
                error = self.refused_part(image_url(url))
                self.assertEqual(error["param"], "messages[0].content[1].image_url.url")
                self.assertIn(url, error["message"])

    def test_bad_image_data_is_refused_by_path(self):
        svg = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()
        bmp = base64.b64encode(b"BM" + bytes(60)).decode()
        for url, words in (("data:image/png;base64,", "base64"), ("data:image/png;base64,@@@@", "base64"),
                           ("data:image/png;base64," + PIXEL[:41], "base64"), ("data:image/png;base64", "comma"),
                           ("data:image/svg+xml;base64," + svg, "JPEG, PNG, GIF and WebP"),
                           ("data:image/bmp;base64," + bmp, "JPEG, PNG, GIF and WebP")):
            with self.subTest(url=url):
                error = self.refused_part(image_url(url))
                self.assertEqual(error["param"], "messages[0].content[1].image_url.url")
                self.assertIn(words, error["message"])

    def test_an_image_that_is_too_large_is_refused_with_the_limit(self):
        for data in (png(8001, 10), png(10, 8001), jpeg(9000, 20), gif(8001, 1), webp(1, 8001)):
            with self.subTest(data=data[:8]):
                error = self.refused_part(image_url(data if len(data) > 40 else "data:image/x;base64," + data))
                self.assertIn("8000 x 8000", error["message"])
        self.assertEqual(self.block(image_url("data:;base64," + png(8000, 8000)))["type"], "image")
        heavy = base64.b64encode(base64.b64decode(PIXEL) + bytes(7_600_000)).decode()
        self.assertIn("10 MB", self.refused_part(image_url("data:image/png;base64," + heavy))["message"])

    def test_the_number_of_images_has_a_limit(self):
        for model, most in (("claude-haiku-4-5", 100), ("claude-opus-5-5", 600)):
            with self.subTest(model=model):
                images = [image_url("data:image/png;base64," + PIXEL)] * (most + 1)
                self.assertEqual(self.chat(model=model, messages=[user(images[1:])]).status, 200)
                error = self.refused(model=model, messages=[user(images)])
                self.assertIn(str(most), error["message"])
                self.assertEqual(error["param"], "messages[0].content[%d].image_url.url" % most)

    def test_a_pdf_is_a_document_wherever_it_hides(self):
        for name, part, expected in (
            ("file", {"type": "file", "file": {"file_data": "data:application/pdf;base64," + PDF, "filename": "a.pdf"}},
             pdf_block(title="a.pdf")),
            ("bare", {"type": "file", "file": {"file_data": PDF, "filename": "a.pdf"}}, pdf_block(title="a.pdf")),
            ("no name", {"type": "file", "file": {"file_data": "data:application/pdf;base64," + PDF}}, pdf_block()),
            ("wrong type", {"type": "file", "file": {"file_data": "data:text/plain;base64," + PDF}}, pdf_block()),
            ("image_url", image_url("data:application/pdf;base64," + PDF), pdf_block()),
            ("input_file", {"type": "input_file", "file_data": PDF, "filename": "b.pdf"}, pdf_block(title="b.pdf")),
            ("anthropic", pdf_block(title="c"), pdf_block(title="c")),
        ):
            with self.subTest(name=name):
                self.assertEqual(self.block(part), expected)

    def test_text_files_are_text_documents(self):
        encoded = base64.b64encode("Grüße".encode("utf-8")).decode()
        for name, part, expected in (
            ("file", {"type": "file", "file": {"file_data": "data:text/csv;base64," + encoded, "filename": "a.csv"}},
             text_file("Grüße", title="a.csv")),
            ("bare", {"type": "file", "file": {"file_data": encoded, "filename": "notes.MD"}},
             text_file("Grüße", title="notes.MD")),
            ("image_url", image_url("data:text/plain;base64," + encoded), text_file("Grüße")),
            ("json", {"type": "file", "file": {"file_data": "data:application/json;base64," + encoded}},
             text_file("Grüße")),
            ("percent", image_url("data:text/plain,Hello%20there"), text_file("Hello there")),
            ("anthropic", text_file("x", title="t"), text_file("x", title="t")),
        ):
            with self.subTest(name=name):
                self.assertEqual(self.block(part), expected)

    def test_what_claude_cannot_take_is_refused_by_path_and_reason(self):
        word = base64.b64encode(b"PK\x03\x04" + bytes(40)).decode()
        latin = base64.b64encode(b"Gr\xfc\xdfe").decode()
        part = "messages[0].content[1]"
        for given, param, words in (
            ({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}, part, "sound"),
            ({"type": "video_url", "video_url": {"url": "https://x.example/v.mp4"}}, part, "video"),
            ({"type": "file", "file": {"file_id": "file-1"}}, part + ".file.file_id", "file"),
            ({"type": "file", "file": {"filename": "a.pdf"}}, part + ".file", "file_data"),
            ({"type": "file", "file": {"file_data": word, "filename": "a.docx"}}, part + ".file.file_data", "PDF"),
            ({"type": "file", "file": {"file_data": "data:text/plain;base64," + latin}}, part + ".file.file_data",
             "UTF-8"),
            ({"type": "file", "file": "a.pdf"}, part + ".file", "object"),
            ({"type": "file"}, part, "file_data"), ({"type": "input_image", "file_id": "f"}, part + ".file_id", "file"),
        ):
            with self.subTest(given=given):
                error = self.refused_part(given)
                self.assertEqual(error["param"], param)
                self.assertIn(words, error["message"])

    def test_parts_of_other_apis_are_read(self):
        for part in ({"type": "input_text", "text": "x"}, {"type": "output_text", "text": "x"}, {"text": "x"}, "x"):
            with self.subTest(part=part):
                self.assertEqual(self.block(part), text("x"))

    def test_an_unknown_part_is_passed_on_as_text_and_told(self):
        part = {"type": "hologram", "depth": 3}
        self.assertEqual(json.loads(self.block(part)["text"]), part)
        self.assertEqual(self.changes(messages=[user(["a", part])]), "changed=messages[0].content[1]")

    def test_an_image_of_the_assistant_is_named_not_sent(self):
        turns = self.turns(ASKED, assistant([{"type": "text", "text": "Here:"},
                                             image_url("data:image/png;base64," + PIXEL)]),
                           user("Thanks"))
        self.assertEqual([block["type"] for block in turns[1]["content"]], ["text", "text"])


# ---- tools

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
NO_PARAMETERS = {"type": "object", "properties": {}}


class ToolTests(RequestTestCase):
    def tools(self, *tools: dict, **fields) -> list:
        return self.prompt(tools=list(tools), **fields)["tools"]

    def schema(self, parameters, **fields) -> dict:
        return self.tools({"type": "function", "function": dict({"name": "f", "parameters": parameters}, **fields)})[0][
            "input_schema"]

    def test_a_tool_is_understood_in_all_its_spellings(self):
        expected = {"name": "f", "description": "Does it", "input_schema": POINT}
        inner = {"name": "f", "description": "Does it", "parameters": POINT}
        for tool in ({"type": "function", "function": inner}, {"function": inner}, dict(inner, type="function"), inner,
                     {"name": "f", "description": "Does it", "input_schema": POINT},
                     {"type": "custom", "name": "f", "description": "Does it", "input_schema": POINT},
                     {"type": "function", "function": dict(inner, strict=False)},
                     {"type": "function", "function": dict(inner, strict=None)}):
            with self.subTest(tool=tool):
                self.assertEqual(self.tools(tool), [expected])
        self.assertEqual(self.prompt(functions=[inner])["tools"], [expected])

    def test_empty_descriptions_and_parameters_are_made_whole(self):
        for function in ({"name": "f"}, {"name": "f", "description": "", "parameters": None},
                         {"name": "f", "description": None, "parameters": {}},
                         {"name": "f", "parameters": {"type": "object"}},
                         {"name": "f", "parameters": {"type": "object", "properties": None, "required": None}}):
            with self.subTest(function=function):
                self.assertEqual(self.tools({"type": "function", "function": function}),
                                 [{"name": "f", "input_schema": NO_PARAMETERS}])

    def test_of_two_tools_with_one_name_the_first_stays(self):
        tools = self.tools(a_tool("f", description="one"), a_tool("g"), a_tool("f", description="two"))
        self.assertEqual([(tool["name"], tool.get("description")) for tool in tools], [("f", "one"), ("g", None)])
        self.assertIn("dropped=tools[1]", self.changes(tools=[a_tool("f"), a_tool("f")]))

    def test_tools_that_claude_does_not_have_are_dropped_and_told(self):
        self.assertEqual([tool["name"] for tool in self.tools({"type": "code_interpreter"}, a_tool("f"))], ["f"])
        self.assertEqual(self.changes(tools=[{"type": "code_interpreter"}, a_tool("f")]), "dropped=tools[0]")
        self.assertNotIn("tools", self.sent(tools=[{"type": "code_interpreter"}], tool_choice="required"))

    def test_a_custom_tool_takes_one_string_and_tells_its_grammar(self):
        tool = self.tools({"type": "custom", "custom": {"name": "calc", "description": "Computes", "format": {
            "type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /[0-9+]+/"}}}})[0]
        self.assertEqual(tool["input_schema"]["properties"], {"input": {"type": "string"}})
        self.assertEqual(tool["input_schema"]["required"], ["input"])
        self.assertRegex(tool["description"], r"(?s)Computes.*lark.*start: /\[0-9\+\]\+/")
        self.claude.play(message(tool_use("c", "calc", {"input": "1+1"})))
        answer = self.chat(tools=[{"type": "custom", "custom": {"name": "calc"}}])
        self.assertEqual(answer.message["tool_calls"], [{"id": "c", "type": "custom", "custom": {
            "name": "calc", "input": "1+1"}}])

    def test_web_search_becomes_claudes(self):
        request = self.prompt(web_search_options={"search_context_size": "low", "user_location": {
            "type": "approximate", "approximate": {"city": "Paris", "country": "FR", "region": None}}},
            tools=[a_tool("f")])
        self.assertEqual([tool["name"] for tool in request["tools"]], ["f", "web_search"])
        search = request["tools"][1]
        self.assertEqual(search["user_location"], {"type": "approximate", "city": "Paris", "country": "FR"})
        few, usual, many = (self.sent(web_search_options=options)["tools"][0]["max_uses"] for options in (
            {"search_context_size": "low"}, {}, {"search_context_size": "high"}))
        self.assertLess(few, usual)
        self.assertLess(usual, many)
        for model in ALL_MODELS:
            with self.subTest(model=model):
                self.assertEqual(self.sent(model=model, web_search_options={})["tools"][0]["name"], "web_search")

    def test_a_clients_own_web_search_tool_can_stand_beside_claudes(self):
        self.claude.play(lambda recorded: message(tool_use("c", recorded.body["tools"][0]["name"], {})))
        answer = self.chat(web_search_options={}, tools=[a_tool("web_search")])
        self.assertEqual(answer.status, 200, answer.raw)
        self.assertEqual(answer.message["tool_calls"][0]["function"]["name"], "web_search")

    def test_a_root_becomes_an_object_without_composition(self):
        a, b = {"a": {"type": "string"}}, {"b": {"type": "integer"}}
        one = {"type": "object", "properties": a, "required": ["a"]}
        two = {"type": "object", "properties": b, "required": ["b"]}
        for name, parameters, properties, required in (
            ("anyOf", {"anyOf": [one, two]}, {**a, **b}, None), ("oneOf", {"oneOf": [one, two]}, {**a, **b}, None),
            ("allOf", {"allOf": [one, two]}, {**a, **b}, ["a", "b"]),
            ("beside", {"type": "object", "properties": a, "required": ["a"], "anyOf": [two, two]}, {**a, **b},
             ["a", "b"]),
            ("shared", {"anyOf": [one, {"properties": {**a, **b}, "required": ["b", "a"]}]}, {**a, **b}, ["a"]),
            ("$ref", {"$ref": "#/$defs/One", "$defs": {"One": one}}, a, ["a"]),
            ("refs", {"anyOf": [{"$ref": "#/$defs/One"}, {"$ref": "#/$defs/Two"}], "$defs": {"One": one, "Two": two}},
             {**a, **b}, None),
            ("null", {"anyOf": [one, {"type": "null"}]}, a, ["a"]),
            ("type list", dict(one, type=["object", "null"]), a, ["a"]),
            ("no type", {"properties": a, "required": ["a"]}, a, ["a"]),
        ):
            with self.subTest(name=name):
                schema = self.schema(parameters)
                self.assertEqual((schema["type"], schema["properties"], schema.get("required")),
                                 ("object", properties, required))

    def test_the_rest_of_a_schema_stays_as_it_is(self):
        parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"type": "array", "items": {
            "type": "number", "minimum": 2}}}, "$defs": {"A": {"enum": [1, "x"]}}, "title": "T",
            "additionalProperties": True}
        self.assertEqual(self.schema(dict(parameters, **{"$schema": "http://json-schema.org/draft-07/schema#"})),
                         parameters)

    def test_schemas_of_older_drafts_are_brought_up_to_date(self):
        # zod's tuples and Pydantic 1 bounds, as MCP servers still hand them out; Claude wants draft 2020-12
        for name, given, expected in (
            ("tuple", {"type": "array", "items": [{"type": "string"}, {"type": "number"}]},
             {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]}),
            ("bound", {"type": "number", "minimum": 0, "exclusiveMinimum": True},
             {"type": "number", "exclusiveMinimum": 0}),
            ("twice", {"type": "object", "properties": {"x": {}}, "required": ["x", "x"]},
             {"type": "object", "properties": {"x": {}}, "required": ["x"]}),
        ):
            with self.subTest(name=name):
                schema = self.schema({"type": "object", "properties": {"a": given}})
                self.assertEqual({key: schema["properties"]["a"].get(key) for key in expected}, expected)
        self.assertEqual(self.schema({"type": "object", "properties": {"x": {}}, "required": ["x", "x"]})["required"],
                         ["x"])

    def test_strict_stays_where_the_schema_allows_it(self):
        tool = self.tools(a_tool("f", POINT, strict=True))[0]
        self.assertEqual((tool["strict"], tool["input_schema"]), (True, POINT))
        for name, parameters in (
            ("bounds", {"type": "object", "properties": {"x": {"type": "integer", "minimum": 1}}, "required": ["x"]}),
            ("free keys", {"type": "object", "properties": {"x": {"type": "object", "additionalProperties": True}}}),
            ("recursion", {"type": "object", "properties": {"x": {"$ref": "#/$defs/N"}}, "$defs": {"N": {
                "type": "object", "properties": {"next": {"$ref": "#/$defs/N"}}}}}),
        ):
            with self.subTest(name=name):
                tool = self.tools(a_tool("f", parameters, strict=True))[0]
                self.assertNotIn("strict", tool)
                self.assertEqual(tool["input_schema"], parameters)
                self.assertEqual(self.changes(tools=[a_tool("f", parameters, strict=True)]),
                                 "dropped=tools[0].function.strict")

    def test_at_most_twenty_tools_are_strict(self):
        tools = self.tools(*[a_tool("f%d" % at, POINT, strict=True) for at in range(25)])
        self.assertEqual([bool(tool.get("strict")) for tool in tools], [True] * 20 + [False] * 5)


class SchemaSubsetTests(RequestTestCase):
    """`response_format` of type json_schema: the schema in what Claude compiles, or the schema in words."""

    def format(self, schema, **fields):
        """The schema that Claude is held to, None where it is only asked for."""
        request = self.prompt(response_format={"type": "json_schema", "json_schema": {
            "name": "n", "strict": True, "description": "d", "schema": schema}}, **fields)
        self.assertEqual("JSON Schema" in json.dumps(request["messages"]),
                         "format" not in request.get("output_config", {}))
        answer_format = request.get("output_config", {}).get("format")
        self.assertIn(set(answer_format or ()), (set(), {"type", "schema"}))
        return answer_format and answer_format["schema"]

    def test_a_schema_in_the_subset_stays_as_it_is(self):
        schema = {"type": "object", "title": "T", "description": "D", "required": ["a", "b"],
                  "additionalProperties": False,
                  "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"anyOf": [{"type": "string", "format": "date"},
                                                                            {"type": "null"}]}},
                  "$defs": {"A": {"type": "array", "items": {"enum": ["x", 1, None]}, "minItems": 1}}}
        self.assertEqual(self.format(schema), schema)

    def test_what_is_outside_goes_into_the_description(self):
        schema = self.format({"type": "object", "properties": {
            "a": {"type": "integer", "minimum": 3, "description": "Age"}, "b": {"type": "string", "maxLength": 9},
            "c": {"type": "array", "items": {"type": "string"}, "minItems": 2, "uniqueItems": True},
            "d": {"type": "string", "pattern": "^(?=x)", "format": "color"}}, "required": ["a", "b", "c", "d"]})
        self.assertEqual(schema["additionalProperties"], False)
        for name, left, words in (("a", {"type"}, ("Age", "minimum", "3")), ("b", {"type"}, ("maxLength", "9")),
                                  ("c", {"type", "items"}, ("minItems", "2", "uniqueItems")),
                                  ("d", {"type"}, ("pattern", "(?=x)", "color"))):
            with self.subTest(name=name):
                self.assertEqual(set(schema["properties"][name]), left | {"description"})
                for word in words:
                    self.assertIn(word, schema["properties"][name]["description"])
        self.assertIn("response_format.minimum", self.changes(response_format={"type": "json_schema", "json_schema": {
            "name": "n", "schema": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}}}}))

    def test_unions_and_references_are_brought_over(self):
        one, two = {"type": "string"}, {"type": "integer"}
        schema = self.format({"type": "object", "properties": {
            "a": {"oneOf": [one, two]}, "b": {"allOf": [one]}, "c": {"$ref": "#/$defs/C", "description": "Words"}},
            "required": ["a", "b", "c"], "$defs": {"C": {"type": "boolean"}}})
        self.assertEqual(schema["properties"]["a"], {"anyOf": [one, two]})
        self.assertEqual(schema["properties"]["b"]["type"], "string")
        self.assertEqual(schema["properties"]["c"], {"type": "boolean", "description": "Words"})

    def test_a_schema_that_cannot_be_brought_over_is_asked_for_in_words(self):
        recursive = {"type": "object", "properties": {"next": {"$ref": "#"}}}
        for name, schema in (
            ("recursion", recursive), ("free keys", {"type": "object", "additionalProperties": {"type": "string"}}),
            ("any object", {"type": "object"}), ("external", {"type": "object", "properties": {"a": {
                "$ref": "https://example.com/a.json"}}}),
            ("nowhere", {"type": "object", "properties": {"a": {"$ref": "#/$defs/Nope"}}}),
            ("optional", {"type": "object", "properties": {"p%d" % at: {"type": "string"} for at in range(25)}}),
            ("unions", {"type": "object", "properties": {"p%d" % at: {"type": ["string", "null"]} for at in range(17)},
                        "required": ["p%d" % at for at in range(17)]}),
        ):
            with self.subTest(name=name):
                self.assertIsNone(self.format(schema))
                self.assertEqual(self.changes(response_format={"type": "json_schema", "json_schema": {
                    "name": "n", "schema": schema}}), "changed=response_format")

    def test_the_limits_of_complexity_count_each_part_once(self):
        optional = {"p%d" % at: {"type": "string"} for at in range(24)}
        unions = {"p%d" % at: {"anyOf": [{"type": "string"}, {"type": "null"}]} for at in range(16)}
        for name, inner in (("optional", {"type": "object", "properties": optional}),
                            ("unions", {"type": "object", "properties": unions, "required": list(unions)})):
            with self.subTest(name=name):
                nested = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"$ref": "#/$defs/A"}},
                          "required": ["a", "b"], "$defs": {"A": inner}}
                self.assertIsNotNone(self.format(inner))
                self.assertIsNotNone(self.format(nested))

    def test_definitions_that_use_each_other_cost_what_they_are_long(self):
        # every level names the next one twice: whoever writes that out never comes back
        levels = {"L%d" % at: {"type": "object",
                               "properties": {name: {"$ref": "#/$defs/L%d" % (at + 1)} for name in "ab"},
                               "required": ["a", "b"]} for at in range(12)}
        levels["L12"] = {"type": "object", "properties": {"a": {"type": "string"}}}     # one optional property in all
        schema = {"type": "object", "properties": {"root": {"$ref": "#/$defs/L0"}}, "required": ["root"],
                  "$defs": levels}
        self.assertIsNotNone(self.format(schema))

    def test_a_long_chain_of_definitions_is_no_stack_overflow(self):
        levels = {"L%d" % at: {"type": "object", "properties": {"next": {"$ref": "#/$defs/L%d" % (at + 1)}}}
                  for at in range(400)}
        levels["L400"] = {"type": "string"}
        schema = {"type": "object", "properties": {"root": {"$ref": "#/$defs/L0"}}, "$defs": levels}
        self.assertIsNone(self.format(schema))

    def test_no_schema_is_a_wish_for_any_object(self):
        request = self.prompt(response_format={"type": "json_schema", "json_schema": {"name": "n"}})
        self.assertNotIn("output_config", request)
        self.assertIn("JSON", request["messages"][-1]["content"][-1]["text"])

    def test_every_model_takes_it_whatever_else_is_asked(self):
        for model in ALL_MODELS:
            with self.subTest(model=model):
                self.assertEqual(self.format(POINT, model=model, tools=[a_tool("f")], reasoning_effort="low"), POINT)

    def test_it_is_asked_for_in_words_beside_web_search(self):
        self.assertIsNone(self.format(POINT, web_search_options={}))

    def test_json_object_is_asked_for_in_words(self):
        request = self.prompt(response_format={"type": "json_object"})
        self.assertNotIn("output_config", request)
        self.assertEqual([len(turn["content"]) for turn in request["messages"]], [2])
        self.assertIn("JSON", request["messages"][0]["content"][1]["text"])
        self.assertNotIn("system", request)

    def test_plain_text_needs_nothing(self):
        self.assertEqual(self.sent(response_format={"type": "text"}), self.sent())


class ToolChoiceTests(RequestTestCase):
    TOOLS = [a_tool("f", POINT), a_tool("my.tool", POINT)]

    def choice(self, wish, model="claude-opus-5", tools=None, **fields):
        return self.chosen(self.prompt(model=model, tools=tools or self.TOOLS, tool_choice=wish, **fields))

    def test_every_form_is_understood(self):
        f, other = {"type": "tool", "name": "f"}, {"type": "tool", "name": "my_tool"}
        for wish, expected in (
            (None, None), ("auto", None), ("none", {"type": "none"}), ("required", {"type": "any"}),
            ("any", {"type": "any"}),
            ({"type": "function", "function": {"name": "f"}}, f), ({"type": "function", "name": "f"}, f),
            ({"type": "tool", "name": "my.tool"}, other), ({"type": "custom", "custom": {"name": "f"}}, f),
            ({"function": {"name": "my.tool"}}, other), ({"type": "auto"}, None), ({"type": "any"}, {"type": "any"}),
            ({"type": "none"}, {"type": "none"}), ({"type": "required"}, {"type": "any"}), ("", None),
        ):
            with self.subTest(wish=wish):
                self.assertEqual(self.choice(wish), expected)

    def test_parallel_calls_can_be_switched_off(self):
        alone = {"disable_parallel_tool_use": True}
        for wish, expected in ((None, dict(alone, type="auto")), ("auto", dict(alone, type="auto")),
                               ("required", dict(alone, type="any")), ("none", {"type": "none"}),
                               ({"type": "function", "function": {"name": "f"}}, dict(alone, type="tool", name="f"))):
            with self.subTest(wish=wish):
                self.assertEqual(self.choice(wish, parallel_tool_calls=False), expected)
        self.assertNotIn("tool_choice", self.sent(parallel_tool_calls=False))
        self.assertIsNone(self.choice("auto", parallel_tool_calls=True))

    def test_a_legacy_function_call_is_a_choice_too(self):
        functions = [{"name": "f", "parameters": POINT}]
        for wish, expected in (("none", "none"), ("auto", "auto"), ({"name": "f"}, "tool"), (None, "auto")):
            with self.subTest(wish=wish):
                request = self.sent(model="claude-opus-5", functions=functions, function_call=wish)
                self.assertEqual(request["tool_choice"]["type"], expected)
                # their answer has room for one call
                self.assertEqual(request["tool_choice"].get("disable_parallel_tool_use", False), expected != "none")

    def test_allowed_tools_shorten_the_list(self):
        for model in ALL_MODELS:
            for mode, forced in (("auto", None), ("required", {"type": "any"})):
                with self.subTest(model=model, mode=mode):
                    request = self.prompt(model=model, tools=self.TOOLS + [a_tool("h", POINT)], tool_choice={
                        "type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [
                            {"type": "function", "function": {"name": "my.tool"}}, {"type": "function", "name": "f"}]}})
                    self.assertEqual([tool["name"] for tool in request["tools"]], ["f", "my_tool"])
                    self.assertEqual(self.chosen(request), None if model in UNFORCED else forced)

    def test_a_choice_of_a_tool_that_claude_does_not_have_is_dropped(self):
        self.assertIsNone(self.choice({"type": "web_search_preview"}))
        self.assertIn("dropped=tool_choice", self.changes(tools=self.TOOLS, tool_choice={"type": "code_interpreter"}))

    def test_models_that_can_be_forced_are(self):
        for model in set(ALL_MODELS) - set(UNFORCED):
            with self.subTest(model=model):
                self.assertEqual(self.choice("required", model), {"type": "any"})
                self.assertEqual(self.choice({"type": "function", "function": {"name": "f"}}, model),
                                 {"type": "tool", "name": "f"})

    def test_elsewhere_the_tools_schema_becomes_the_answer_format(self):
        for model in UNFORCED:
            for wish, tools in (({"type": "function", "function": {"name": "my.tool"}}, self.TOOLS),
                                ("required", [a_tool("my.tool", POINT)])):
                for stream in (False, True):
                    with self.subTest(model=model, wish=wish, stream=stream):
                        self.claude.play(message(text('{"x": 5}')))
                        answer = self.chat(model=model, tools=tools, tool_choice=wish, stream=stream)
                        request = self.claude.messages[-1].body
                        self.assertEqual(request["output_config"]["format"], {"type": "json_schema", "schema": POINT})
                        self.assertEqual(request["tool_choice"], {"type": "none"})
                        self.assertIn("tool_choice", answer.headers["x-claude-gateway-changes"])
                        whole = completion_from_chunks(answer.chunks) if stream else answer.json["choices"][0]
                        call = whole["message"]["tool_calls"][0]
                        self.assertEqual((call["type"], call["function"]["name"],
                                          json.loads(call["function"]["arguments"])),
                                         ("function", "my.tool", {"x": 5}))
                        self.assertFalse(whole["message"]["content"])
                        self.assertEqual(whole["finish_reason"], "tool_calls")

    def test_a_forced_legacy_function_or_custom_tool_comes_back_in_its_own_shape(self):
        self.claude.play(message(text('{"x": 5}')), message(text('{"input": "1+1"}')))
        answer = self.chat(functions=[{"name": "f", "parameters": POINT}], function_call={"name": "f"})
        self.assertEqual(answer.json["choices"][0]["finish_reason"], "function_call")
        self.assertEqual(answer.message["function_call"]["name"], "f")
        self.assertEqual(json.loads(answer.message["function_call"]["arguments"]), {"x": 5})
        answer = self.chat(tools=[{"type": "custom", "custom": {"name": "calc"}}], tool_choice="required")
        self.assertEqual(answer.message["tool_calls"][0].get("custom"), {"name": "calc", "input": "1+1"})
        self.claude.play(message(text('{"input": "1+1"}')))
        chunks = self.chat(tools=[{"type": "custom", "custom": {"name": "calc"}}], tool_choice="required",
                           stream=True).chunks
        deltas = [call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls",
                                                                                                          ())]
        self.assertEqual([(call["index"], call.get("type"), call.get("custom")) for call in deltas],
                         [(0, "custom", {"name": "calc", "input": "1+1"})])

    def test_where_that_cannot_be_it_is_asked_for_in_words(self):
        free = a_tool("free", {"type": "object", "additionalProperties": True})
        for model in UNFORCED:
            for name, wish, tools in (("several", "required", self.TOOLS), ("schema", "required", [free]),
                                      ("named", {"type": "function", "function": {"name": "free"}},
                                       [free, *self.TOOLS])):
                with self.subTest(model=model, name=name):
                    request = self.prompt(model=model, tools=tools, tool_choice=wish, messages=[system("S"), ASKED])
                    self.assertIsNone(self.chosen(request))
                    self.assertNotIn("format", request.get("output_config", {}))
                    self.assertEqual(request["system"], [text("S")])
                    words = request["messages"][-1]["content"][-1]["text"]
                    self.assertIn("free" if name == "named" else "tool" if name == "several" else "", words)
                    self.assertNotEqual(words, "Hi")
        request = self.prompt(tools=self.TOOLS, tool_choice="required", parallel_tool_calls=False)
        self.assertEqual(request["tool_choice"], {"type": "auto", "disable_parallel_tool_use": True})

    def test_a_forced_tool_works_in_the_middle_of_a_loop(self):
        history = [ASKED, calls(a_call("a")), result("a"), assistant("Done."), user("Again")]
        for model in ALL_MODELS:
            with self.subTest(model=model):
                self.assertEqual(self.chat(model=model, messages=history, tools=self.TOOLS, tool_choice="required",
                                           reasoning_effort="high").status, 200)


# ---- thinking

EFFORT_WISHES = (None, "none", "minimal", "low", "medium", "high", "xhigh", "max")
GOOD_HEADERS = {"anthropic-version": "2023-06-01", "content-type": "application/json", "x-api-key": "k",
                "user-agent": "claude-gateway/0"}
SHOWN = {"type": "adaptive", "display": "summarized"}


class ThinkingTests(RequestTestCase):
    def thought(self, model: str, **fields) -> tuple:
        """(thinking, effort) of the request."""
        request = self.sent(model=model, **fields)
        return request.get("thinking"), request.get("output_config", {}).get("effort")

    def test_claude_takes_every_model_with_every_effort_and_every_companion(self):
        loop = [ASKED, calls(a_call("a")), result("a")]
        signed = [ASKED, dict(calls(a_call("a")), thinking_blocks=[thinking("hm", "sig")]), result("a")]
        named = {"type": "function", "function": {"name": "f"}}
        companions = {
            "nothing": {}, "a tool": {"tools": [a_tool("f")]},
            "a forced tool": {"tools": [a_tool("f")], "tool_choice": named},
            "required": {"tools": [a_tool("f"), a_tool("g")], "tool_choice": "required"},
            "a temperature": {"temperature": 0.3}, "top_p": {"top_p": 0.5}, "top_k": {"top_k": 3},
            "one token": {"max_tokens": 1}, "few tokens": {"max_tokens": 100}, "a thousand": {"max_tokens": 1023},
            "some tokens": {"max_tokens": 3000}, "too many tokens": {"max_tokens": 500_000},
            "a prefill": {"messages": [ASKED, assistant("Well, ")]}, "a tool loop": {"messages": loop},
            "a loop with thinking": {"messages": signed, "tools": [a_tool("f")]},
            "a format": {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": POINT}}},
            "a format and a prefill": {"messages": [ASKED, assistant("{")], "response_format": {
                "type": "json_schema", "json_schema": {"name": "n", "schema": POINT}}},
            "all at once": {"messages": loop + [assistant("So")], "temperature": 0.1, "max_tokens": 50, "top_p": 0.2,
                            "tools": [a_tool("f")], "tool_choice": named},
            "a budget": {"thinking": {"type": "enabled", "budget_tokens": 2000}},
            "a small budget": {"thinking": {"type": "enabled", "budget_tokens": 10}, "max_tokens": 900},
            "a huge budget": {"thinking": {"type": "enabled", "budget_tokens": 900_000}},
            "thinking off": {"thinking": {"type": "disabled"}},
            "between tools": {"thinking": {"type": "between_tools"}},
            "adaptive": {"thinking": {"type": "adaptive", "display": "omitted"}},
            "OpenRouter": {"reasoning": {"effort": "max", "exclude": True}},
            "tokens": {"reasoning": {"max_tokens": 3000}},
            "enabled": {"reasoning": {"enabled": True}}, "off": {"reasoning": {"enabled": False}},
        }
        for model in BUILT_IN_MODELS.values():
            for effort in EFFORT_WISHES:
                for name, fields in companions.items():
                    with self.subTest(model=model.id, effort=effort, companion=name):
                        chat = dict({"messages": [ASKED]}, **dict(fields, reasoning_effort=effort))
                        request = claude_gateway.messages_request_from_chat(chat, model).request
                        self.assertEqual(violations(json.loads(json.dumps(request)), GOOD_HEADERS), [])

    def test_the_same_holds_on_the_wire(self):
        for model in ALL_MODELS:
            for effort in EFFORT_WISHES:
                with self.subTest(model=model, effort=effort):
                    self.assertEqual(self.chat(model=model, reasoning_effort=effort, max_tokens=400, temperature=0.5,
                                               tools=[a_tool("f")], tool_choice="required").status, 200)

    def test_thinking_is_shown_where_the_model_thinks_and_not_asked_for_elsewhere(self):
        for model in ALL_MODELS:
            by_default = not re.search(r"-4-\d", model)
            with self.subTest(model=model):
                self.assertEqual(self.thought(model), (SHOWN, None) if by_default else (None, None))

    def test_an_effort_is_what_each_generation_makes_of_it(self):
        five = dict(zip(EFFORT_WISHES[2:], ("low", "low", "medium", "high", "xhigh", "max")))
        four = dict(five, xhigh="high")
        three = dict(five, xhigh="high", max="high")
        for model, efforts in ((("claude-opus-5-5"), five), ("claude-haiku-5-5", five), ("claude-sonnet-5", five),
                               ("claude-opus-4-8", five), ("claude-opus-4-7", five), ("claude-sonnet-4-6", four),
                               ("claude-opus-4-6", four), ("claude-opus-4-5", three)):
            for wish, effort in efforts.items():
                with self.subTest(model=model, wish=wish):
                    thinking_sent, effort_sent = self.thought(model, reasoning_effort=wish)
                    self.assertEqual(effort_sent, effort)
                    self.assertEqual(thinking_sent["type"], "enabled" if model == "claude-opus-4-5" else "adaptive")
                    told = self.changes(model=model, reasoning_effort=wish)
                    self.assertEqual(told, "" if wish == effort else "changed=reasoning_effort")

    def test_models_that_want_a_budget_get_one_below_the_limit(self):
        budgets = []
        for wish in EFFORT_WISHES[3:]:
            request = self.sent(model="claude-haiku-4-5", reasoning_effort=wish)
            self.assertEqual((request["thinking"]["type"], request["max_tokens"]), ("enabled", 64_000))
            budgets.append(request["thinking"]["budget_tokens"])
        self.assertEqual(budgets, sorted(set(budgets)))
        self.assertGreaterEqual(budgets[0], 1024)

    def test_the_output_limit_is_raised_for_a_budget_only_when_needed(self):
        request = self.sent(model="claude-haiku-4-5", reasoning_effort="low", max_tokens=32_000)
        self.assertEqual(request["max_tokens"], 32_000)
        request = self.sent(model="claude-haiku-4-5", thinking={"type": "enabled", "budget_tokens": 8000},
                            max_tokens=16_000)
        self.assertEqual((request["max_tokens"], request["thinking"]["budget_tokens"]), (16_000, 8000))
        request = self.sent(model="claude-haiku-4-5", reasoning_effort="high", max_tokens=500)
        self.assertGreaterEqual(request["max_tokens"] - request["thinking"]["budget_tokens"], 500)
        self.assertIn("changed=max_tokens", self.changes(model="claude-haiku-4-5", reasoning_effort="high",
                                                         max_tokens=500))

    def test_no_reasoning_is_off_where_it_can_be_and_least_elsewhere(self):
        off, least = ({"type": "disabled"}, None), (None, "low")
        for model, expected in (
            ("claude-haiku-5-5", off), ("claude-opus-5", off), ("claude-sonnet-5", off), ("claude-opus-5-5", least),
            ("claude-sonnet-5-5", ({"type": "between_tools"}, "low")), ("claude-fable-5-2", least),
            ("claude-mythos-5", least), ("claude-fable-5", least),
            ("claude-opus-4-8", (None, None)), ("claude-opus-4-6", (None, None)), ("claude-haiku-4-5", (None, None)),
        ):
            for fields in ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}},
                           {"reasoning": {"enabled": False}},
                           {"reasoning": {"effort": "none"}}, {"reasoning_effort": {"effort": "none"}}):
                with self.subTest(model=model, fields=fields):
                    self.assertEqual(self.thought(model, **fields), expected)

    def test_a_small_output_limit_leaves_room_for_an_answer(self):
        for model in ALL_MODELS:
            for fields in ({}, {"reasoning_effort": "none"}):
                with self.subTest(model=model, fields=fields):
                    request = self.sent(model=model, max_tokens=100, **fields)
                    can_stop = {"type": "disabled"} == request.get("thinking") or re.search(r"-4-\d", model)
                    self.assertEqual(request["max_tokens"], 100 if can_stop else 1124)
                    if not re.search(r"-4-\d", model) and not fields:
                        self.assertEqual(request["output_config"]["effort"], "low")
                        self.assertNotEqual(self.changes(model=model, max_tokens=100), "")
        self.assertEqual(self.sent(max_tokens=1024)["max_tokens"], 1024)
        self.assertEqual(self.sent(max_tokens=1023)["max_tokens"], 2047)

    def test_a_small_limit_with_an_effort_asked_for_still_thinks(self):
        for model in ("claude-opus-5-5", "claude-haiku-5-5", "claude-opus-4-8"):
            with self.subTest(model=model):
                request = self.sent(model=model, max_tokens=100, reasoning_effort="high")
                self.assertEqual((request["max_tokens"], request["thinking"], request["output_config"]),
                                 (1124, SHOWN, {"effort": "high"}))

    def test_what_the_client_says_in_so_many_words_wins_over_thinking(self):
        named = {"tools": [a_tool("f")], "tool_choice": {"type": "function", "function": {"name": "f"}}}
        for model in ("claude-haiku-4-5", "claude-opus-4-5", "claude-sonnet-4-6", "claude-opus-4-6"):
            for fields, kept in ((named, "tool_choice"), ({"temperature": 0.3}, "temperature"),
                                 ({"top_k": 5}, "top_k")):
                with self.subTest(model=model, kept=kept):
                    answer = self.chat(model=model, reasoning_effort="high", **fields)
                    request = self.claude.messages[-1].body
                    self.assertIn(kept, request)
                    self.assertNotIn("thinking", request)
                    self.assertIn("reasoning_effort", answer.headers["x-claude-gateway-changes"])

    def test_a_loop_that_began_without_thinking_goes_on_without(self):
        request = self.sent(model="claude-haiku-4-5", reasoning_effort="high", tools=[a_tool("f")],
                            messages=[ASKED, calls(a_call("a")), result("a")])
        self.assertNotIn("thinking", request)

    def test_claudes_own_words_are_honoured(self):
        enabled = {"type": "enabled", "budget_tokens": 6000}
        self.assertEqual(self.thought("claude-haiku-4-5", thinking=enabled), (enabled, None))
        self.assertEqual(self.thought("claude-opus-5-5", thinking={"type": "adaptive", "display": "omitted"}),
                         ({"type": "adaptive", "display": "omitted"}, None))
        self.assertEqual(self.thought("claude-opus-4-8", thinking={"type": "adaptive"}), (SHOWN, None))
        self.assertEqual(self.thought("claude-opus-5-5", thinking={"type": "adaptive"}, reasoning_effort="low"),
                         (SHOWN, "low"))
        for model in ("claude-opus-5-5", "claude-opus-4-8"):
            with self.subTest(model=model):
                thinking_sent, effort = self.thought(model, thinking=enabled)
                self.assertEqual((thinking_sent, effort), (SHOWN, "medium"))
                # a budget that became an effort is a change
                self.assertIn("thinking", self.changes(model=model, thinking=enabled))

    def test_openrouters_words_are_honoured(self):
        for reasoning, expected in (({"effort": "high"}, (SHOWN, "high")), ({"enabled": True}, (SHOWN, None)),
                                    ({"max_tokens": 4000}, (SHOWN, "low")), ({}, (None, None)), (None, (None, None)),
                                    ({"effort": "low", "exclude": True},
                                     ({"type": "adaptive", "display": "omitted"}, "low"))):
            with self.subTest(reasoning=reasoning):
                self.assertEqual(self.thought("claude-opus-4-8", reasoning=reasoning), expected)
        self.assertEqual(self.thought("claude-opus-4-8", reasoning_effort={"effort": "high", "summary": "auto"}),
                         (SHOWN, "high"))

    def test_verbosity_is_said_behind_the_cache(self):
        for verbosity, count in (("low", 2), ("medium", 1), ("high", 2)):
            with self.subTest(verbosity=verbosity):
                self.assertEqual(len(self.sent(verbosity=verbosity)["messages"][0]["content"]), count)


# ---- cache breakpoints

MARK, LONG_MARK = {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}


def marks_of(request: dict) -> list:
    """(path, ttl) of every cache mark, in the order of the prompt."""
    places = [("tools.%d" % at, tool) for at, tool in enumerate(request.get("tools", []))]
    places += [("system.%d" % at, block) for at, block in enumerate(request.get("system", []))]
    places += [(path.replace(".content.", ".", 1), block) for path, block in all_blocks(request["messages"])]
    return [(path, place["cache_control"].get("ttl", "5m")) for path, place in places if "cache_control" in place]


class CacheMarkTests(RequestTestCase):
    HISTORY = [system("S"), ASKED, assistant("a"), user("b"), assistant("c"), user("d")]
    ALL_OURS = [("tools.1", "5m"), ("system.0", "5m"), ("messages.2.0", "5m"), ("messages.4.0", "5m")]

    def marks(self, **fields) -> list:
        request = self.sent(**dict({"messages": self.HISTORY, "tools": [a_tool("f"), a_tool("g")]}, **fields))
        marks = marks_of(request)
        self.assertLessEqual(len(marks), 4)
        return marks

    def marked_history(self, *places: int, mark=None) -> list:
        return [dict(each, cache_control=mark or MARK) if at in places else each
                for at, each in enumerate(self.HISTORY)]

    def test_ours_end_the_tools_the_system_text_and_the_last_turns(self):
        for model in ALL_MODELS:
            with self.subTest(model=model):
                self.assertEqual(self.marks(model=model), self.ALL_OURS)
        self.assertEqual(self.marks(messages=[ASKED], tools=None), [("messages.0.0", "5m")])

    def test_a_clients_mark_is_found_wherever_it_is(self):
        text_part = {"type": "text", "text": "x", "cache_control": MARK}
        for name, fields, expected in (
            ("message", {"messages": [dict(ASKED, cache_control=MARK), assistant("a"), user("b")]}, "messages.0.0"),
            ("part", {"messages": [user([text_part, {"type": "text", "text": "y"}]), assistant("a"), user("b")]},
             "messages.0.0"),
            ("system", {"messages": [dict(system("A"), cache_control=MARK), system("B"), ASKED]}, "system.0"),
            ("system part", {"messages": [system([text_part, {"type": "text", "text": "y"}]), ASKED]}, "system.0"),
            ("assistant", {"messages": [ASKED, dict(assistant("a"), cache_control=MARK), user("b")]}, "messages.1.0"),
            ("call", {"messages": [ASKED, calls(dict(a_call("a"), cache_control=MARK), a_call("b")), result("a"),
                                   result("b")]}, "messages.1.0"),
            ("result", {"messages": [ASKED, calls(a_call("a"), a_call("b")), result("a", cache_control=MARK),
                                     result("b")]}, "messages.2.0"),
            ("in a result", {"messages": [ASKED, calls(a_call("a")), result("a", [text_part, {
                "type": "text", "text": "y"}])]}, "messages.2.0.content.0"),
            ("tool", {"tools": [dict(a_tool("f"), cache_control=MARK), a_tool("g")]}, "tools.0"),
            ("image", {"messages": [user([dict(image_url("data:image/png;base64," + PIXEL), cache_control=MARK),
                                          {"type": "text", "text": "y"}])]}, "messages.0.0"),
            ("OpenAI's", {"messages": [user([{"type": "text", "text": "x", "prompt_cache_breakpoint": {
                "mode": "explicit"}}, {"type": "text", "text": "y"}])]}, "messages.0.0"),
        ):
            with self.subTest(name=name):
                self.assertIn((expected, "5m"), self.marks(prompt_cache_options={"mode": "explicit"}, **fields))

    def test_ours_fill_the_free_slots_only(self):
        self.assertEqual(self.marks(messages=self.marked_history(1)),
                         [("system.0", "5m"), ("messages.0.0", "5m"), ("messages.2.0", "5m"), ("messages.4.0", "5m")])
        self.assertEqual(self.marks(messages=self.marked_history(1, 2, 3, 4)),
                         [("messages.%d.0" % at, "5m") for at in (0, 1, 2, 3)])
        self.assertEqual(self.marks(messages=self.marked_history(0, 3, 5),
                                    tools=[dict(a_tool("f"), cache_control=MARK)]),
                         [("tools.0", "5m")] + self.ALL_OURS[1:])

    def test_above_four_tools_system_and_the_newest_win(self):
        self.assertEqual(self.marks(messages=self.marked_history(0, 1, 2, 3, 4, 5)),
                         [("system.0", "5m")] + [("messages.%d.0" % at, "5m") for at in (2, 3, 4)])
        marked_tools = [dict(a_tool("f%d" % at), cache_control=MARK) for at in range(3)]
        self.assertEqual(self.marks(messages=self.marked_history(0, 3, 5), tools=marked_tools),
                         [("tools.0", "5m"), ("tools.1", "5m"), ("tools.2", "5m"), ("system.0", "5m")])
        self.assertIn("dropped=cache_control", self.changes(messages=self.marked_history(0, 1, 2, 3, 4)))
        self.assertEqual(self.changes(messages=self.marked_history(0, 1, 2, 3)), "")

    def test_a_long_mark_never_follows_a_short_one(self):
        for place in range(6):
            with self.subTest(place=place):
                marks = self.marks(messages=self.marked_history(place, mark=LONG_MARK))
                self.assertIn("1h", [ttl for _, ttl in marks])
                lifetimes = [ttl for _, ttl in marks]
                self.assertEqual(lifetimes, sorted(lifetimes))      # "1h" sorts before "5m"

    def test_wishes_for_a_lifetime_are_heard(self):
        for fields in ({"cache_control": LONG_MARK}, {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}}):
            with self.subTest(fields=fields):
                self.assertEqual(self.marks(**fields), [(path, "1h") for path, _ in self.ALL_OURS])
        part = {"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}}
        self.assertEqual(self.marks(messages=[user([part])], tools=None), [("messages.0.0", "1h")])

    def test_explicit_mode_means_none_of_ours(self):
        explicit = {"prompt_cache_options": {"mode": "explicit"}}
        self.assertEqual(self.marks(**explicit), [])
        self.assertEqual(self.marks(messages=self.marked_history(3), **explicit), [("messages.2.0", "5m")])

    def test_no_cache_means_none_of_ours(self):
        self.start(no_cache=True)
        self.assertEqual(self.marks(), [])
        self.assertEqual(self.marks(messages=self.marked_history(0)), [("system.0", "5m")])

    def test_thinking_is_never_marked(self):
        block = thinking("hm", "sig")
        marks = self.marks(messages=[ASKED, dict(assistant(None), thinking_blocks=[block], cache_control=MARK),
                                     user("b")])
        self.assertNotIn("messages.1.0", [path for path, _ in marks])

    def test_instructions_for_one_request_stand_behind_the_last_mark(self):
        wishes = ({"response_format": {"type": "json_object"}}, {"verbosity": "low"}, {"tool_choice": "required"},
                  {"response_format": {"type": "json_schema",
                                       "json_schema": {"name": "n", "schema": {"type": "object"}}}})
        for model in ("claude-opus-5-5", "claude-haiku-4-5"):
            for wish in wishes:
                for name, tail in (("plain", []), ("results", [calls(a_call("a")), result("a")]),
                                   ("a system note", [assistant("e"), user("f"), system("NOTE")]),
                                   ("a prefill", [assistant("e")])):
                    with self.subTest(model=model, wish=wish, name=name):
                        fields = {"model": model, "tools": [a_tool("f"), a_tool("g")], "messages": self.HISTORY + tail}
                        request, without = self.sent(**fields, **wish), self.sent(**fields)
                        if model == "claude-haiku-4-5" and "tool_choice" in wish:
                            continue                # it can be forced: no words needed
                        self.assertEqual(request["system"], without["system"])
                        last_user = max(at for at, turn in enumerate(request["messages"]) if turn["role"] == "user")
                        words = request["messages"][last_user]["content"][-1]
                        self.assertEqual(words["type"], "text")
                        self.assertNotIn("cache_control", words)
                        place = (last_user, len(request["messages"][last_user]["content"]) - 1)
                        marked = [tuple(map(int, path.split(".")[1:3])) for path, _ in marks_of(request)
                                  if path.startswith("messages.")]
                        self.assertTrue(marked)
                        self.assertLess(max(marked), place)


# ---- a long agent session

def note(number: int) -> str:
    return "It is now %d:%02d. " % divmod(600 + number, 60) + "Keep the user's rules in mind. " * 3


def agent_turn(number: int) -> list:
    """What one turn adds to an agent's history: calls (sometimes more than the cache looks back), results, notes."""
    count = 24 if number % 9 == 4 else number % 3 + 1
    ids = ["call_%d_%d" % (number, at) for at in range(count)]
    words = "Looking at part %d now. " % number
    added = [calls(*[a_call(call_id, "read.file", '{"path": "src/%s.py"}' % call_id) for call_id in ids],
                   content=words)]
    added += [result(call_id, "line of %s\n" % call_id * 20) for call_id in ids]
    if number % 7 == 3:
        added.append(system(note(number)))
    if number % 5 == 0:
        added += [assistant("Part %d is done." % number), user("Go on with part %d, please. " % (number + 1) * 4)]
    return added


AGENT_TOOLS = [a_tool("read.file", {"type": "object", "properties": {"path": {"type": "string"}}},
                      description="Reads " * 40),
               a_tool("write_file", description="Writes " * 40)]


def agent_requests(turns: int):
    """The chat completion requests of an agent session, one after the other."""
    history = [system("You are a careful engineer. " * 60), user("Refactor the project. " * 10)]
    for number in range(turns):
        yield {"messages": list(history), "tools": AGENT_TOOLS, "reasoning_effort": "medium"}
        history += agent_turn(number)


def prompt_blocks(request: dict) -> list:
    """(serialised block, whether it ends with a cache mark) in the order of the prompt."""
    places = [*request.get("tools", ()), *request.get("system", ())]
    places += [dict(block, role=message["role"]) for message in request["messages"] for block in message["content"]]
    return [(json.dumps(bare(block)), "cache_control" in block) for block in places]


class PromptCache:
    """The rules of the prompt cache: a mark writes what comes before it, and finds what was written there or up to
    19 blocks before."""

    def __init__(self, smallest: int) -> None:
        self.smallest, self.written = smallest, set()

    def read(self, request: dict) -> tuple:
        """(characters read from the cache, characters in all) of one request."""
        digests, lengths, digest, length = [], [], b"", 0
        blocks = prompt_blocks(request)
        for block, _ in blocks:
            digest = hashlib.sha256(digest + block.encode()).digest()
            length += len(block)
            digests.append(digest)
            lengths.append(length)
        ends = [at for at, (_, marked) in enumerate(blocks) if marked]
        found = [at for end in ends for at in range(max(0, end - 19), end + 1) if digests[at] in self.written]
        self.written |= {digests[end] for end in ends if lengths[end] >= self.smallest}
        return (lengths[max(found)] if found else 0), length


class AgentSessionTests(RequestTestCase):
    def test_at_least_98_percent_of_what_could_be_read_from_the_cache_is(self):
        for model in BUILT_IN_MODELS.values():
            with self.subTest(model=model.id):
                cache, read, readable, before = PromptCache(0), 0, 0, 0
                for chat in agent_requests(30):
                    request = claude_gateway.messages_request_from_chat(chat, model).request
                    hit, length = cache.read(request)
                    read, readable, before = read + hit, readable + before, length
                self.assertGreater(readable, 100_000)
                self.assertGreaterEqual(read / readable, 0.98)

    def test_so_it_is_with_instructions_for_each_request(self):
        for model in map(BUILT_IN_MODELS.get, ("claude-opus-5-5", "claude-sonnet-5", "claude-haiku-4-5-20251001")):
            for wish in ({"verbosity": "low"}, {"tool_choice": "required"}):
                with self.subTest(model=model.id, wish=wish):
                    cache, read, readable, before = PromptCache(0), 0, 0, 0
                    for chat in agent_requests(30):
                        request = claude_gateway.messages_request_from_chat(dict(chat, **wish), model).request
                        hit, length = cache.read(request)
                        read, readable, before = read + hit, readable + before, length
                    self.assertGreaterEqual(read / readable, 0.98)

    def test_each_request_begins_with_the_one_before_on_the_wire(self):
        for model in ALL_MODELS:
            earlier = None
            for chat in agent_requests(8):
                with self.subTest(model=model, length=len(chat["messages"])):
                    request = bare(self.sent(model=model, **chat))
                    whole = json.dumps([request["tools"], request["system"], request["messages"]])
                    if earlier is not None:
                        self.assertTrue(whole.startswith(earlier.rstrip("]")), "the prefix changed")
                    earlier = whole

    def test_parameters_in_front_do_not_change_from_turn_to_turn(self):
        for model in ALL_MODELS:
            with self.subTest(model=model):
                seen = set()
                for chat in agent_requests(6):
                    request = claude_gateway.messages_request_from_chat(chat, BUILT_IN_MODELS[model]).request
                    seen.add(json.dumps([request.get("thinking"), request.get("output_config"),
                                         request.get("tool_choice")]))
                if "adaptive" in BUILT_IN_MODELS[model].thinking:
                    self.assertEqual(len(seen), 1)

    def test_remembered_thinking_keeps_the_prefix(self):
        self.start()
        history, earlier = [system("S"), user("Go")], None
        for number in range(6):
            call = tool_use("toolu_%d" % number, "read_file", {"path": "ä/%d" % number, "b": [1.0, None]})
            self.claude.play(message(thinking("Hm %d" % number, "sig%d" % number), text("Reading."), call))
            answer = self.chat(model="claude-opus-5-5", messages=history, tools=[a_tool("read_file")])
            request = bare(self.claude.messages[-1].body)
            whole = json.dumps([request["tools"], request["system"], request["messages"]])
            if earlier is not None:
                self.assertTrue(whole.startswith(earlier.rstrip("]")), "the prefix changed")
                self.assertEqual([block["type"] for block in request["messages"][-2]["content"]],
                                 ["thinking", "text", "tool_use"])
            earlier = whole
            history = history + [answer.message, result("toolu_%d" % number, "content %d" % number)]

    def test_the_same_request_has_the_same_bytes(self):
        chat = list(agent_requests(4))[-1]
        self.chat(**chat)
        self.chat(**chat)
        self.assertEqual(self.claude.messages[-1].raw, self.claude.messages[-2].raw)


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


# ==== Credentials =====================================================================================

try:
    import resource
except ImportError:
    resource = None                                 # Windows

POSIX_ONLY = unittest.skipUnless(os.name == "posix", "file modes, symlinks and signals of POSIX")
OLD_ACCESS, OLD_REFRESH = "sk-ant-oat01-old-access", "sk-ant-ort01-old-refresh"
NEW_ACCESS, NEW_REFRESH = "sk-ant-oat01-new-access", "sk-ant-ort01-new-refresh"
CLAUDE_CODE_BLOCK = {"type": "text", "text": "You are Claude Code, Anthropic's official CLI for Claude."}
CLIENT_ID = "9d1c250a-e61b-44d9-88ed-5944d1962f5e"
REDIRECT_PAGE = "https://platform.claude.com/oauth/code/callback"
TOKEN_FIELDS = ["access_token", "expires_at", "refresh_token", "scope", "token_type"]


def token_answer(**fields) -> dict:
    """What the sign-in endpoint answers when all is well."""
    return dict({"token_type": "Bearer", "access_token": NEW_ACCESS, "expires_in": 28_800,
                 "refresh_token": NEW_REFRESH, "scope": "user:inference user:profile"}, **fields)


def stored_token(expires_in: float = 3_600, **fields) -> dict:
    """The token file of somebody who is signed in."""
    return dict({"token_type": "Bearer", "access_token": OLD_ACCESS, "refresh_token": OLD_REFRESH,
                 "expires_at": int(time.time() + expires_in), "scope": "user:inference user:profile"}, **fields)


def challenge_of(code_verifier: str) -> str:
    """PKCE's S256, written down once more."""
    return base64.urlsafe_b64encode(hashlib.sha256(code_verifier.encode()).digest()).decode().rstrip("=")


@contextlib.contextmanager
def no_room_on_disk():
    """Whatever is written to a file fails, as on a full disk; root ignores file modes, but not this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class CredentialChoiceTests(unittest.TestCase):
    def test_the_first_credential_of_the_order_is_used_within_what_auth_allows(self):
        everything = {"anthropic_api_key": "key-1", "anthropic_auth_token": "token-2", "claude_code_oauth_token": "t-3"}
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "tokens.json")
            claude_gateway.TokenFile(path).write(stored_token())
            cases = (
                ("auto", ("anthropic_api_key", "anthropic_auth_token", "claude_code_oauth_token"), "ANTHROPIC_API_KEY"),
                ("auto", ("anthropic_auth_token", "claude_code_oauth_token"), "ANTHROPIC_AUTH_TOKEN"),
                ("auto", ("claude_code_oauth_token",), "CLAUDE_CODE_OAUTH_TOKEN"),
                ("auto", (), path),
                ("api-key", ("anthropic_api_key", "anthropic_auth_token", "claude_code_oauth_token"),
                 "ANTHROPIC_API_KEY"),
                ("api-key", ("anthropic_auth_token", "claude_code_oauth_token"), "ANTHROPIC_AUTH_TOKEN"),
                ("api-key", ("claude_code_oauth_token",), None),
                ("oauth", ("anthropic_api_key", "anthropic_auth_token", "claude_code_oauth_token"),
                 "CLAUDE_CODE_OAUTH_TOKEN"),
                ("oauth", ("anthropic_api_key", "anthropic_auth_token"), path),
            )
            for auth, names, source in cases:
                with self.subTest(auth=auth, names=names):
                    config = Config(auth=auth, token_file=path, **{name: everything[name] for name in names})
                    credential = claude_gateway.credential_from_config(config, lambda *_: self.fail("no call"))
                    if source is None:
                        self.assertIsNone(credential)
                    else:
                        self.assertIn(source, credential.description)

    def test_without_any_there_is_none(self):
        for path in ("", os.path.join(tempfile.gettempdir(), "no-such-directory", "tokens.json")):
            with self.subTest(path=path):
                self.assertIsNone(claude_gateway.credential_from_config(Config(token_file=path), None))


class CredentialHeaderTests(GatewayTestCase):
    """What arrives upstream for each kind of credential."""

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.token_path = os.path.join(directory.name, "claude-gateway", "oauth-tokens.json")

    def headers_and_system(self, settings, **chat):
        self.start(**dict({"anthropic_api_key": "", "token_file": self.token_path}, **settings))
        body = self.sent(**chat)
        headers = self.claude.messages[-1].headers
        return ({name: headers.get(name) for name in ("x-api-key", "authorization", "anthropic-beta")},
                bare(body.get("system")))

    def test_each_kind_has_its_headers_and_only_subscription_tokens_the_system_block(self):
        claude_gateway.TokenFile(self.token_path).write(stored_token())
        ours = {"type": "text", "text": "Be brief."}
        cases = (
            ("API key", {"anthropic_api_key": "sk-ant-api03-k"}, ("sk-ant-api03-k", None, None), [ours]),
            ("bearer", {"anthropic_auth_token": "plain-token"}, (None, "Bearer plain-token", None), [ours]),
            ("bearer of OAuth", {"anthropic_auth_token": "sk-ant-oat01-b"},
             (None, "Bearer sk-ant-oat01-b", "oauth-2025-04-20"), [ours]),
            ("Claude Code's token", {"claude_code_oauth_token": "sk-ant-oat01-c"},
             (None, "Bearer sk-ant-oat01-c", "oauth-2025-04-20"), [CLAUDE_CODE_BLOCK, ours]),
            ("login", {}, (None, "Bearer " + OLD_ACCESS, "oauth-2025-04-20"), [CLAUDE_CODE_BLOCK, ours]),
        )
        for name, settings, headers, system in cases:
            with self.subTest(name):
                sent_headers, sent_system = self.headers_and_system(settings, messages=[
                    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
                self.assertEqual(tuple(sent_headers.values()), headers)
                self.assertEqual(sent_system, system)

    def test_the_block_comes_also_where_the_client_has_no_system_text(self):
        _, system = self.headers_and_system({"claude_code_oauth_token": "sk-ant-oat01-c"})
        self.assertEqual(system, [CLAUDE_CODE_BLOCK])

    def test_a_key_of_the_client_never_goes_upstream(self):
        self.start(anthropic_api_key="sk-ant-api03-k")
        self.chat(headers={"authorization": "Bearer sk-ant-from-client", "x-api-key": "sk-ant-from-client"})
        self.assertNotIn("from-client", json.dumps(self.claude.messages[-1].headers))
        self.assertEqual(self.claude.messages[-1].headers["x-api-key"], "sk-ant-api03-k")

    def test_the_model_list_is_asked_for_with_the_same_headers(self):
        self.claude.models = [{"type": "model", "id": "claude-sonnet-5-5", "display_name": "Claude Sonnet 5.5",
                               "created_at": "2026-06-01T00:00:00Z"}]
        gateway = Gateway(Config(base_url=self.claude.url, claude_code_oauth_token="sk-ant-oat01-c"))
        self.addCleanup(gateway.close)
        gateway.upstream.models()
        headers = self.claude.requests[-1].headers
        self.assertEqual((headers.get("authorization"), headers.get("anthropic-beta"), headers.get("x-api-key")),
                         ("Bearer sk-ant-oat01-c", "oauth-2025-04-20", None))

    def test_a_rejected_key_or_static_token_is_not_tried_again(self):
        for settings in ({"anthropic_api_key": "sk-ant-api03-k"}, {"claude_code_oauth_token": "sk-ant-oat01-c"},
                         {"anthropic_auth_token": "plain-token"}):
            with self.subTest(settings):
                self.claude.reset()
                self.start(**dict({"anthropic_api_key": ""}, **settings))
                self.claude.play(Reply(401, body=error_body("authentication_error", "invalid x-api-key")))
                answer = self.chat()
                self.assertEqual((answer.status, answer.error["code"], answer.headers["x-should-retry"]),
                                 (401, "upstream_authentication", "false"))
                self.assertEqual(len(self.claude.messages), 1)


class SignInTests(unittest.TestCase):
    """The address to visit, and what is made of the paste."""

    def test_the_address_asks_for_what_the_sheet_lists(self):
        place, _, query = claude_gateway.Login().url.partition("?")
        fields = {name: values[0] for name, values in parse_qs(query, strict_parsing=True).items()}
        self.assertEqual(place, "https://claude.ai/oauth/authorize")
        self.assertRegex(fields.pop("state"), r"\A[A-Za-z0-9_-]{32,}\Z")
        self.assertRegex(fields.pop("code_challenge"), r"\A[A-Za-z0-9_-]{43}\Z")
        self.assertEqual(fields, {
            "code": "true", "client_id": CLIENT_ID, "response_type": "code", "redirect_uri": REDIRECT_PAGE,
            "scope": "user:inference user:profile", "code_challenge_method": "S256"})

    def test_no_two_sign_ins_share_a_state_or_a_challenge(self):
        queries = [parse_qs(claude_gateway.Login().url.partition("?")[2]) for _ in range(20)]
        for name in ("state", "code_challenge"):
            self.assertEqual(len({query[name][0] for query in queries}), 20)

    def test_a_code_is_found_in_everything_that_people_paste(self):
        login = claude_gateway.Login()
        state = parse_qs(login.url.partition("?")[2])["state"][0]
        cases = (
            ("the-code#" + state, True), ("  the-code#%s \r\n" % state, True),
            ("%s?code=the-code&state=%s" % (REDIRECT_PAGE, state), True),
            ("http://localhost:54545/callback?state=%s&code=the-code" % state, True),
            ("the-code", False), ("the-code#", False), (REDIRECT_PAGE + "?code=the-code", False),
        )
        for pasted, checked in cases:
            with self.subTest(pasted):
                self.assertEqual(login.parse(pasted), ("the-code", checked))

    def test_a_paste_without_a_code_or_with_a_foreign_state_is_refused(self):
        login = claude_gateway.Login()
        for pasted in ("the-code#another-state", "the-code#" + claude_gateway.Login().url[-43:], "the-code#\u20ac",
                       REDIRECT_PAGE + "?code=the-code&state=another", REDIRECT_PAGE + "?error=access_denied",
                       "", "#", "#state", "https://[broken", REDIRECT_PAGE):
            with self.subTest(pasted), self.assertRaises(claude_gateway.GatewayError):
                login.parse(pasted)


class LoginStoreTestCase(GatewayTestCase):
    """A token file in a directory of its own, and the fake's sign-in endpoint."""

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = os.path.join(directory.name, "claude-gateway")
        self.token_path = os.path.join(self.directory, "oauth-tokens.json")
        self.file = claude_gateway.TokenFile(self.token_path)
        self.token_url = self.claude.url + "/v1/oauth/token"

    def stored(self) -> dict:
        with open(self.token_path, "rb") as file:
            return json.loads(file.read().decode())

    def token_requests(self) -> list:
        return [request for request in self.claude.requests if request.path.endswith("/oauth/token")]

    def login(self, token_url: str = "") -> "claude_gateway.StoredLogin":
        """The login in the file, as the gateway uses it."""
        upstream = claude_gateway.Upstream(Config(base_url=self.claude.url), "test")
        self.addCleanup(upstream.close)
        return claude_gateway.StoredLogin(self.file, token_url or self.token_url, upstream.post_json)

    def serve_login(self, **settings):
        """The gateway with the login in the file."""
        return self.start(**dict({"anthropic_api_key": "", "token_file": self.token_path,
                                  "token_url": self.token_url}, **settings))


class RefreshTests(LoginStoreTestCase):
    def test_a_token_is_renewed_five_minutes_before_it_expires(self):
        for left, requests in ((290, 1), (315, 0), (-10, 1), (28_800, 0)):
            with self.subTest(left=left):
                self.claude.reset()
                self.file.write(stored_token(left))
                self.claude.token_replies.append(token_answer())
                self.assertEqual(self.login().access_token(), NEW_ACCESS if requests else OLD_ACCESS)
                self.assertEqual(len(self.token_requests()), requests)

    def test_the_request_for_new_tokens_is_json_with_three_fields(self):
        self.file.write(stored_token(0))
        self.claude.token_replies.append(token_answer())
        self.login().access_token()
        request, = self.token_requests()
        self.assertEqual(request.body, {"grant_type": "refresh_token", "refresh_token": OLD_REFRESH,
                                        "client_id": CLIENT_ID})
        self.assertEqual(request.headers["content-type"], "application/json")
        self.assertNotIn("authorization", request.headers)
        self.assertTrue(request.headers["user-agent"].startswith("claude-gateway/"))

    def test_the_new_tokens_are_stored_before_they_are_used(self):
        self.file.write(stored_token(0))
        self.serve_login()
        self.claude.token_replies.append(token_answer())
        seen = []
        self.claude.play(lambda recorded: seen.append(self.stored()) or message(text("Hi")))
        self.assertEqual(self.chat().status, 200)
        self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer " + NEW_ACCESS)
        self.assertEqual((seen[0]["access_token"], seen[0]["refresh_token"]), (NEW_ACCESS, NEW_REFRESH))
        self.assertAlmostEqual(seen[0]["expires_at"], time.time() + 28_800, delta=60)

    def test_an_answer_without_a_refresh_token_leaves_the_old_one(self):
        for missing in ({}, {"refresh_token": None}, {"refresh_token": ""}):
            with self.subTest(missing):
                self.file.write(stored_token(0))
                answer = token_answer()
                del answer["refresh_token"]
                self.claude.token_replies.append(dict(answer, **missing))
                self.login().access_token()
                self.assertEqual((self.stored()["access_token"], self.stored()["refresh_token"]),
                                 (NEW_ACCESS, OLD_REFRESH))

    def test_an_answer_without_a_lifetime_counts_for_an_hour(self):
        self.file.write(stored_token(0))
        self.claude.token_replies.append({"access_token": NEW_ACCESS})
        self.login().access_token()
        self.assertAlmostEqual(self.stored()["expires_at"], time.time() + 3_600, delta=60)

    def test_rotation_goes_on_with_the_refresh_token_that_came_last(self):
        self.file.write(stored_token(0))
        for turn in (1, 2, 3):
            self.claude.token_replies.append(token_answer(access_token="a-%d" % turn, refresh_token="r-%d" % turn))
        login = self.login()
        token = login.access_token()
        token = login.access_token(rejected=token)
        login.access_token(rejected=token)
        self.assertEqual([request.body["refresh_token"] for request in self.token_requests()],
                         [OLD_REFRESH, "r-1", "r-2"])

    def test_keys_that_others_put_into_the_file_are_kept(self):
        self.file.write(stored_token(0, note="mine", nested={"a": [1]}, account={"email_address": "me@example.org"}))
        self.claude.token_replies.append(token_answer())
        self.login().access_token()
        kept = self.stored()
        self.assertEqual((kept["note"], kept["nested"], kept["account"], kept["access_token"]),
                         ("mine", {"a": [1]}, {"email_address": "me@example.org"}, NEW_ACCESS))

    def test_a_401_is_answered_by_one_renewal_and_one_more_try(self):
        self.file.write(stored_token())
        self.serve_login()
        self.claude.token_replies.append(token_answer())
        self.claude.play(Reply(401, body=error_body("authentication_error", "OAuth token has expired.")))
        self.assertEqual(self.chat().status, 200)
        self.assertEqual([request.headers["authorization"] for request in self.claude.messages],
                         ["Bearer " + OLD_ACCESS, "Bearer " + NEW_ACCESS])
        self.assertEqual(len(self.token_requests()), 1)

    def test_a_second_401_goes_to_the_client(self):
        self.file.write(stored_token())
        self.serve_login()
        self.claude.token_replies += [token_answer(), token_answer(access_token="third")]
        self.claude.play(*[Reply(401, body=error_body("authentication_error", "Invalid bearer token"))] * 3)
        answer = self.chat()
        self.assertEqual((answer.status, answer.error["code"], answer.headers["x-should-retry"]),
                         (401, "upstream_authentication", "false"))
        self.assertIn("Invalid bearer token", answer.error["message"])
        self.assertEqual((len(self.claude.messages), len(self.token_requests())), (2, 1))

    def test_a_401_to_the_model_list_is_answered_by_a_renewal_too(self):
        self.file.write(stored_token())
        self.claude.token_replies.append(token_answer())
        listed = Reply(body={"data": [{"type": "model", "id": "claude-sonnet-5-5"}], "has_more": False})
        refused = Reply(401, body=error_body("authentication_error", "OAuth token has expired."))
        fake = FakeClaude()                                     # one whose model list can refuse
        fake.reply_to = lambda recorded: listed if NEW_ACCESS in recorded.headers["authorization"] else refused
        with fake:
            gateway = Gateway(Config(base_url=fake.url, token_file=self.token_path, token_url=self.token_url))
            self.addCleanup(gateway.close)
            self.assertEqual([entry["id"] for entry in gateway.upstream.models()], ["claude-sonnet-5-5"])

    def test_a_revoked_token_is_not_renewed(self):
        self.file.write(stored_token())
        self.serve_login()
        self.claude.token_replies.append(token_answer())
        self.claude.play(Reply(403, body=error_body("permission_error", "OAuth token has been revoked.")))
        answer = self.chat()
        self.assertEqual((answer.status, len(self.claude.messages), len(self.token_requests())), (401, 1, 0))
        self.assertIn("OAuth token has been revoked.", answer.error["message"])
        self.assertIn("login", answer.error["message"])

    def test_a_dead_refresh_token_is_told_and_never_sent_again(self):
        self.file.write(stored_token(-10))
        self.serve_login()
        for _ in range(3):
            answer = self.chat()
            self.assertEqual((answer.status, answer.error["code"], answer.headers["x-should-retry"]),
                             (401, "upstream_authentication", "false"))
            self.assertIn("claude-gateway login", answer.error["message"])
        self.assertEqual((len(self.token_requests()), len(self.claude.messages)), (1, 0))

    def test_a_new_login_ends_that_without_a_restart(self):
        self.file.write(stored_token(-10))
        self.serve_login()
        self.assertEqual(self.chat().status, 401)
        self.file.write(stored_token(access_token="from-a-new-login", refresh_token="another"))
        self.assertEqual(self.chat().status, 200)
        self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer from-a-new-login")

    def test_who_loses_a_race_uses_what_the_winner_stored(self):
        # on a file system without locks both ask; the loser must read the file again, not log out
        self.file.write(stored_token(0))

        def lost(recorded):
            self.file.write(stored_token(access_token="of-the-winner", refresh_token="of-the-winner-too"))
            return Reply(400, body={"error": "invalid_grant"})
        self.claude.token_replies.append(lost)
        self.assertEqual(self.login().access_token(), "of-the-winner")

    def test_tokens_that_another_process_stored_are_taken_over(self):
        self.file.write(stored_token())
        login = self.login()
        self.assertEqual(login.access_token(), OLD_ACCESS)
        self.file.write(stored_token(access_token="from-elsewhere"))
        self.assertEqual(login.access_token(), "from-elsewhere")
        self.assertEqual(login.access_token(rejected=OLD_ACCESS), "from-elsewhere")
        self.assertEqual(self.token_requests(), [])

    def test_after_a_logout_the_client_is_told_to_sign_in(self):
        self.file.write(stored_token())
        self.serve_login()
        self.assertEqual(self.chat().status, 200)
        self.file.remove()
        answer = self.chat()
        self.assertEqual((answer.status, answer.error["code"]), (401, "upstream_authentication"))
        self.assertIn("claude-gateway login", answer.error["message"])

    def test_a_failing_endpoint_does_not_matter_while_the_token_is_good(self):
        failures = (None, Reply(500, body=b"oops"), Reply(429, body=error_body("rate_limit_error", "Slow down")),
                    Reply(404, body=b"<html>"), Reply(200, body=b"not JSON"), Reply(None),
                    Reply(302, {"location": "https://example.org/"}))
        for failure in failures:
            with self.subTest(failure):
                self.claude.reset()
                self.file.write(stored_token(200))
                self.claude.token_replies.append(failure)
                with self.assertLogs("claude_gateway", "WARNING") as logged:
                    login = self.login("http://127.0.0.1:9/v1/oauth/token" if failure is None else "")
                    self.assertEqual([login.access_token() for _ in range(3)], [OLD_ACCESS] * 3)
                self.assertIn("could not be renewed", logged.output[0])
                self.assertLessEqual(len(self.token_requests()), 1, "no pause between attempts")

    def test_a_failing_endpoint_with_a_dead_token_is_a_fault_that_names_the_variable(self):
        self.file.write(stored_token(-10))
        self.serve_login()
        self.claude.token_replies.append(Reply(500, body=b"oops"))
        answer = self.chat()
        self.assertGreaterEqual(answer.status, 500)
        self.assertIn("CLAUDE_GATEWAY_TOKEN_URL", answer.error["message"])
        self.assertEqual(self.chat().status, answer.status)
        self.assertEqual((len(self.token_requests()), len(self.claude.messages)), (1, 0))

    def test_other_refusals_are_no_reason_to_sign_in_again(self):
        # 8.3 of the sheet: only invalid_grant in OAuth's shape means that the login is over
        for status, body in ((400, {"error": "invalid_request"}), (401, error_body("authentication_error", "no")),
                             (403, b"<html>blocked</html>"), (404, error_body("not_found_error", "Not found"))):
            with self.subTest(status=status, body=body):
                self.file.write(stored_token(-10))
                self.claude.token_replies.append(Reply(status, body=body))
                with self.assertRaises(claude_gateway.UpstreamFault):
                    self.login().access_token()

    def test_twenty_requests_at_once_make_one_renewal(self):
        self.file.write(stored_token(0))
        self.serve_login()
        self.claude.token_replies.append(lambda _: Reply(body=token_answer(), hold=[0.05]))
        self.all_at_once(20)
        self.assertEqual(len(self.token_requests()), 1)
        self.assertEqual({request.headers["authorization"] for request in self.claude.messages},
                         {"Bearer " + NEW_ACCESS})

    def test_twenty_rejections_at_once_make_one_renewal(self):
        self.file.write(stored_token())
        self.serve_login()
        self.claude.token_replies.append(lambda _: Reply(body=token_answer(), hold=[0.05]))

        def reject_the_old(recorded):
            if OLD_ACCESS in recorded.headers["authorization"]:
                return Reply(401, body=error_body("authentication_error", "OAuth token has expired."))
            return message(text("Hi"), model="claude-sonnet-5-5")
        self.claude.play(*[reject_the_old] * 40)
        self.all_at_once(20)
        self.assertEqual(len(self.token_requests()), 1)

    def all_at_once(self, count):
        statuses, barrier = [], threading.Barrier(count)

        def one():
            barrier.wait(10)
            statuses.append(self.chat().status)
        threads = [threading.Thread(target=one) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        self.assertEqual(statuses, [200] * count)


REFRESHING_CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from claude_gateway import Config, StoredLogin, TokenFile, Upstream
login = StoredLogin(TokenFile(sys.argv[2]), sys.argv[3], Upstream(Config(), "child").post_json)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[4])):
    login.access_token(rejected=login.access_token())
print("done", flush=True)
"""


class ProcessRaceTests(LoginStoreTestCase):
    def test_processes_never_use_a_refresh_token_twice(self):
        self.file.write(stored_token(refresh_token="r-0"))
        valid, twice, lock = ["r-0"], [], threading.Lock()

        def rotate(recorded):
            with lock:
                if recorded.body["refresh_token"] != valid[0]:
                    twice.append(recorded.body["refresh_token"])
                    return Reply(400, body={"error": "invalid_grant"})
                number = len(self.token_requests())
                valid[0] = "r-%d" % number
                return token_answer(access_token="a-%d" % number, refresh_token=valid[0], expires_in=1)
        self.claude.token_replies += [rotate] * 500
        children = [subprocess.Popen([sys.executable, "-c", REFRESHING_CHILD, HERE, self.token_path, self.token_url,
                                      "20"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                    for _ in range(2)]
        self.addCleanup(lambda: [child.kill() for child in children])
        for child in children:
            self.assertEqual(child.stdout.readline().strip(), b"ready")
        for child in children:                                  # both at once
            child.stdin.write(b"go\n")
            child.stdin.flush()
        for child in children:
            out, err = child.communicate(timeout=30)
            self.assertEqual((out.strip(), err, child.returncode), (b"done", b"", 0))
        self.assertEqual(twice, [])
        self.assertGreaterEqual(len(self.token_requests()), 40)
        self.assertEqual(self.stored()["refresh_token"], valid[0])


class TokenFileTests(LoginStoreTestCase):
    def test_where_there_is_no_file_nobody_is_signed_in(self):
        self.assertIsNone(self.file.read())
        self.assertFalse(os.path.exists(self.directory), "asking made a directory")

    @POSIX_ONLY
    def test_the_file_is_for_its_owner_alone_whatever_the_umask(self):
        for umask in (0o000, 0o022, 0o077):
            with self.subTest(umask=oct(umask)):
                shutil.rmtree(self.directory, ignore_errors=True)
                self.addCleanup(os.umask, os.umask(umask))
                self.file.write(stored_token())
                with self.file.lock():
                    modes = {name: oct(os.stat(os.path.join(self.directory, name)).st_mode & 0o777)
                             for name in os.listdir(self.directory)}
                self.assertEqual(oct(os.stat(self.directory).st_mode & 0o777), "0o700")
                self.assertEqual(set(modes.values()), {"0o600"}, modes)

    @POSIX_ONLY
    def test_a_loose_file_mode_is_repaired_and_told(self):
        self.file.write(stored_token())
        os.chmod(self.token_path, 0o644)
        with self.assertLogs("claude_gateway", "WARNING") as logged:
            claude_gateway.credential_from_config(Config(token_file=self.token_path), None)
        self.assertIn(self.token_path, logged.output[0])
        self.assertEqual(oct(os.stat(self.token_path).st_mode & 0o777), "0o600")

    @POSIX_ONLY
    def test_writing_over_a_file_with_a_loose_mode_tightens_it(self):
        os.makedirs(self.directory, 0o755)
        with open(self.token_path, "w", encoding="utf-8") as file:
            json.dump(stored_token(), file)
        os.chmod(self.token_path, 0o666)
        self.file.write(stored_token())
        self.assertEqual(oct(os.stat(self.token_path).st_mode & 0o777), "0o600")

    @POSIX_ONLY
    def test_the_directory_of_its_own_is_closed_to_others_too(self):
        os.makedirs(self.directory)
        os.chmod(self.directory, 0o755)
        self.file.write(stored_token())
        self.assertEqual(oct(os.stat(self.directory).st_mode & 0o777), "0o700")

    @POSIX_ONLY
    def test_a_symlink_stays_one(self):
        os.makedirs(self.directory)
        target = os.path.join(os.path.dirname(self.directory), "elsewhere.json")
        for name, content in (("good", json.dumps(stored_token())), ("damaged", "{")):
            with self.subTest(name):
                with open(target, "w", encoding="utf-8") as file:
                    file.write(content)
                if not os.path.islink(self.token_path):
                    os.symlink(target, self.token_path)
                self.file.write(stored_token(access_token="through-the-link"))
                self.assertTrue(os.path.islink(self.token_path))
                self.assertFalse(os.path.islink(target))
                with open(target, encoding="utf-8") as file:
                    self.assertEqual(json.load(file)["access_token"], "through-the-link")

    def test_a_damaged_file_is_reported_by_name_and_kept_aside(self):
        os.makedirs(self.directory)
        for content in (b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe{}", b"{}", b'{"access_token": 5}',
                        b'{"access_token": ""}', b'{"access_token": "a"', b"[" * 100_000):
            with self.subTest(content[:40]):
                with open(self.token_path, "wb") as file:
                    file.write(content)
                with self.assertRaises(claude_gateway.TokenFileDamaged) as raised:
                    self.file.read()
                self.assertIn(self.token_path, str(raised.exception))
                with open(self.token_path, "rb") as file:
                    self.assertEqual(file.read(), content, "reading it changed it")
                self.file.write(stored_token())
                aside, = set(os.listdir(self.directory)) - {"oauth-tokens.json"}
                with open(os.path.join(self.directory, aside), "rb") as file:
                    self.assertEqual(file.read(), content)
                self.assertEqual(self.stored()["access_token"], OLD_ACCESS)
                os.unlink(os.path.join(self.directory, aside))

    def test_two_damaged_files_in_one_second_are_both_kept(self):
        os.makedirs(self.directory)
        for content in (b"first {", b"second {"):
            with open(self.token_path, "wb") as file:
                file.write(content)
            self.file.write(stored_token())
        kept = set()
        for name in set(os.listdir(self.directory)) - {"oauth-tokens.json"}:
            with open(os.path.join(self.directory, name), "rb") as file:
                kept.add(file.read())
        self.assertEqual(kept, {b"first {", b"second {"})

    def test_a_directory_in_its_place_is_left_alone(self):
        os.makedirs(os.path.join(self.token_path, "inside"))
        with self.assertRaises((OSError, claude_gateway.GatewayError)):
            self.file.write(stored_token())
        self.assertEqual(os.listdir(self.token_path), ["inside"])

    def test_odd_values_in_the_file_break_nothing(self):
        odd = ({"account": "me"}, {"account": ["me"]}, {"organization": 5}, {"expires_at": "soon"},
               {"expires_at": 1e300}, {"expires_at": -1e300}, {"expires_at": None}, {"scope": ["a"]},
               {"refresh_token": ["r"]}, {"refresh_token": None}, {"expires_at": True})
        for fields in odd:
            with self.subTest(fields):
                self.file.write(stored_token(**fields))
                login = self.login()
                self.assertEqual(login.facts()["kind"], "oauth")
                self.assertIn(self.token_path, login.description)
                with contextlib.suppress(claude_gateway.GatewayError):
                    login.access_token(rejected=OLD_ACCESS)

    @unittest.skipUnless(resource and os.name == "posix", "needs a limit on file sizes")
    def test_a_full_disk_leaves_the_old_file_whole(self):
        self.file.write(stored_token())
        with no_room_on_disk(), self.assertRaises(OSError):
            self.file.write(stored_token(access_token="too-much"))
        self.assertEqual(self.stored()["access_token"], OLD_ACCESS)
        self.assertEqual(os.listdir(self.directory), ["oauth-tokens.json"])

    @unittest.skipUnless(resource and os.name == "posix", "needs a limit on file sizes")
    def test_tokens_that_cannot_be_stored_serve_on_and_are_stored_later(self):
        self.file.write(stored_token(0))
        login = self.login()
        self.claude.token_replies.append(token_answer())
        with no_room_on_disk(), self.assertLogs("claude_gateway", "WARNING") as logged:
            self.assertEqual([login.access_token() for _ in range(3)], [NEW_ACCESS] * 3)
        self.assertIn(self.token_path, logged.output[0])
        self.assertEqual(len(self.token_requests()), 1)
        self.assertEqual(self.stored()["refresh_token"], OLD_REFRESH)
        login.access_token()
        self.assertEqual(self.stored()["refresh_token"], NEW_REFRESH, "a restart would find the spent one")

    def test_a_directory_that_goes_and_comes_back_does_not_bring_old_tokens_back(self):
        # a home that is unmounted for a while; a file stands where the directory should be, which stops root as well
        self.file.write(stored_token())
        login = self.login()
        self.assertEqual(login.access_token(), OLD_ACCESS)
        os.rename(self.directory, self.directory + ".away")
        with open(self.directory, "w", encoding="utf-8"):
            pass
        self.claude.token_replies += [token_answer(), token_answer(access_token="third", refresh_token="third-r")]
        with self.assertLogs("claude_gateway", "WARNING"):
            self.assertEqual(login.access_token(rejected=OLD_ACCESS), NEW_ACCESS)
            self.assertEqual(login.access_token(), NEW_ACCESS)
            os.unlink(self.directory)
            os.rename(self.directory + ".away", self.directory)
            self.assertEqual(login.access_token(), NEW_ACCESS)
            login.access_token(rejected=NEW_ACCESS)
        self.assertEqual([request.body["refresh_token"] for request in self.token_requests()],
                         [OLD_REFRESH, NEW_REFRESH])

    def test_a_file_damaged_while_the_gateway_runs_does_not_stop_it(self):
        self.file.write(stored_token())
        login = self.login()
        login.access_token()
        with open(self.token_path, "wb") as file:
            file.write(b"{ torn")
        self.claude.token_replies.append(token_answer())
        with self.assertLogs("claude_gateway", "WARNING"):
            self.assertEqual(login.access_token(), OLD_ACCESS)
            self.assertEqual(login.access_token(rejected=OLD_ACCESS), NEW_ACCESS)
        self.assertEqual(self.stored()["access_token"], NEW_ACCESS)
        kept, = [name for name in os.listdir(self.directory) if "damaged" in name]
        with open(os.path.join(self.directory, kept), "rb") as file:
            self.assertEqual(file.read(), b"{ torn")

    @POSIX_ONLY
    def test_a_kill_at_any_moment_leaves_a_whole_file(self):
        code = ("import sys; sys.path.insert(0, sys.argv[1]); from claude_gateway import TokenFile\n"
                "file = TokenFile(sys.argv[2]); number = 0\n"
                "while True:\n"
                "    number += 1; file.write({'access_token': 'a' * 20_000, 'number': number})\n"
                "    if number == 5: print('going', flush=True)\n")
        for _ in range(3):
            child = subprocess.Popen([sys.executable, "-c", code, HERE, self.token_path], stdout=subprocess.PIPE)
            try:
                self.assertEqual(child.stdout.readline().strip(), b"going")
            finally:
                child.kill()
                child.wait(10)
                child.stdout.close()
            self.assertEqual(self.stored()["access_token"], "a" * 20_000)
            with self.file.lock():                              # the dead process holds nothing
                self.file.write(stored_token())


# ==== Simulated upstream and command line =============================================================

def outcome_of(arguments, environment, typed) -> SimpleNamespace:
    """What `main` does: code, out and err.  In this process, as each process of its own costs 0.15 s."""
    log, out, err = claude_gateway.LOG, io.StringIO(), io.StringIO()
    kept = dict(os.environ), sys.stdin, log.handlers[:], log.level, log.propagate
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = io.StringIO(typed)
    watchdog = threading.Timer(20, os.kill, (os.getpid(), signal.SIGTERM))  # a `start` that should not have started
    watchdog.start()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = claude_gateway.main(arguments)
    except SystemExit as end:                               # argparse
        code = end.code
    except Exception as failure:
        code = 1
        err.write("Traceback: %r" % failure)
    finally:
        watchdog.cancel()
        os.environ.clear()
        os.environ.update(kept[0])
        sys.stdin, log.handlers[:] = kept[1:3]
        log.setLevel(kept[3])
        log.propagate = kept[4]
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


class Child:
    """A command under way: what it has said so far, and ways to wait."""

    def __init__(self, arguments, environment, directory, stdin=subprocess.PIPE) -> None:
        self.process = subprocess.Popen([sys.executable, PROGRAM] + list(arguments), env=environment, cwd=directory,
                                        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._said = {"out": b"", "err": b""}
        self._news = threading.Condition()
        self._readers = [threading.Thread(target=self._collect, args=pair, daemon=True)
                         for pair in (("out", self.process.stdout), ("err", self.process.stderr))]
        for reader in self._readers:
            reader.start()

    def _collect(self, name, pipe):
        for piece in iter(lambda: os.read(pipe.fileno(), 65_536), b""):
            with self._news:
                self._said[name] += piece
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def out(self) -> str:
        return self._said["out"].decode("utf-8", "replace")

    @property
    def err(self) -> str:
        return self._said["err"].decode("utf-8", "replace")

    def wait_for(self, pattern, name="err"):
        """The first match in what was said."""
        def found():
            return re.search(pattern, getattr(self, name))
        with self._news:
            self._news.wait_for(lambda: found() or self.process.poll() is not None, 20)
        for reader in self._readers if not found() and self.process.poll() is not None else ():
            reader.join(5)
        if not found():
            raise AssertionError("no %r in %r; on stderr: %s" % (pattern, getattr(self, name), self.err))
        return found()

    @property
    def port(self) -> int:
        return int(self.wait_for(r"(?m)^.* on http://127\.0\.0\.1:(\d+)/v1$", "out").group(1))

    def type(self, words: str) -> None:
        self.process.stdin.write(words.encode())
        self.process.stdin.flush()

    def end(self, number=None) -> int:
        """The exit code, after this signal if there is one."""
        if number is not None:
            self.process.send_signal(number)
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        for reader in self._readers:                            # they end with the process
            reader.join(20)
        return self.process.wait(1)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end()
        self.process.stdout.close()
        self.process.stderr.close()


class CommandTestCase(GatewayTestCase):
    """Commands in processes of their own, with a home and a working directory that are empty, and no variables."""

    @classmethod
    def _service(cls, settings: dict) -> SimpleNamespace:
        return SimpleNamespace(port=0, close=lambda grace: None)        # no gateway in this process

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.home = os.path.join(directory.name, "home")
        self.working_directory = os.path.join(directory.name, "work")
        os.mkdir(self.home)
        os.mkdir(self.working_directory)
        self.token_path = os.path.join(self.home, ".config", "claude-gateway", "oauth-tokens.json")
        if os.name == "nt":
            self.token_path = os.path.join(self.home, "claude-gateway", "oauth-tokens.json")
        self.token_url = self.claude.url + "/v1/oauth/token"

    def environment(self, variables) -> dict:
        kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "TEMP", "TMP") if name in os.environ}
        # port 9: `status` shall find no gateway that happens to run on this machine
        usual = {"HOME": self.home, "APPDATA": self.home, "PYTHONDONTWRITEBYTECODE": "1", "CLAUDE_GATEWAY_PORT": "9"}
        return {name: value for name, value in dict(kept, **dict(usual, **variables)).items() if value is not None}

    def child(self, *arguments, stdin=subprocess.PIPE, **variables) -> Child:
        child = Child(arguments, self.environment(variables), self.working_directory, stdin)
        self.addCleanup(child.close)
        return child

    def commands(self, *cases) -> list:
        """The outcome of each case: arguments, variables, and what is typed if anything is."""
        here = os.getcwd()
        os.chdir(self.working_directory)
        try:
            results = [outcome_of(case[0], self.environment(case[1]), case[2] if len(case) > 2 else "")
                       for case in cases]
        finally:
            os.chdir(here)
        for case, result in zip(cases, results):
            with self.subTest(case):
                self.assertNotIn("Traceback", result.err)
        return results

    def command(self, *arguments, typed="", **variables) -> SimpleNamespace:
        """One of these."""
        return self.commands((arguments, variables, typed))[0]

    def serve(self, *arguments, host=(), **variables) -> Child:
        """`start` on a free port, in front of the fake; `ask` and `chat` go to it."""
        usual = {"ANTHROPIC_API_KEY": SECRET, "ANTHROPIC_BASE_URL": self.claude.url}
        # one address to listen on, as each takes 0.1 s to close
        child = self.child("start", "--port", "0", *(host or ("--host", "127.0.0.1")), *arguments,
                           **dict(usual, **variables))
        self.service = SimpleNamespace(port=child.port)
        self.assertEqual(self.ask("GET", "/health").status, 200)
        return child

    def sign_in(self, **fields) -> None:
        claude_gateway.TokenFile(self.token_path).write(stored_token(**fields))

    def slow_answer(self) -> threading.Event:
        """Claude's next answer waits until this is set; returns once the request is there (see `in_flight`)."""
        release = threading.Event()
        self.claude.play(Reply(pieces=[release, sse(events_of(message(text("At last"), model="claude-sonnet-5-5")))]))
        self.addCleanup(release.set)
        return release

    def in_flight(self):
        """A chat request on its way in a thread; returns the thread and the list that its answer will be in."""
        answers, arrived = [], len(self.claude.messages)

        def ask():
            with contextlib.suppress(OSError, http.client.HTTPException):   # it may be cut off
                answers.append(self.chat())
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        for _ in range(1_000):
            if len(self.claude.messages) > arrived:
                return thread, answers
            thread.join(0.01)
        raise AssertionError("the request never arrived upstream")


@POSIX_ONLY
class DemoTests(CommandTestCase):
    """`start --demo`: one process for all tests, with every credential there is, none of which may be used."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        home = tempfile.TemporaryDirectory()
        cls.addClassCleanup(home.cleanup)
        cls.demo = Child(["start", "--demo", "-p", "0"], {
            "PATH": os.environ["PATH"], "HOME": home.name, "ANTHROPIC_API_KEY": SECRET, "ANTHROPIC_AUTH_TOKEN": SECRET,
            "ANTHROPIC_BASE_URL": cls.claude.url, "HTTPS_PROXY": cls.claude.url}, home.name)
        cls.addClassCleanup(cls.demo.close)

    def setUp(self):
        super().setUp()
        self.service = SimpleNamespace(port=self.demo.port)

    def tearDown(self):
        self.assertEqual(self.claude.requests, [], "the demo asked a real address")
        super().tearDown()

    def test_it_says_at_the_start_that_it_is_a_demo(self):
        self.demo.wait_for("(?i)demo.*simulated")

    def test_a_plain_answer_says_that_it_is_simulated(self):
        answer = self.chat("What is up?")
        self.assertEqual(answer.status, 200)
        self.assertIn("simulated", answer.message["content"])
        self.assertIn("What is up?", answer.message["content"])
        self.assertIn("simulated", answer.headers["x-request-id"])

    def test_a_stream_comes_in_pieces_and_adds_up_to_the_same_kind_of_answer(self):
        answer = self.chat("Hi", stream=True, stream_options={"include_usage": True})
        whole = completion_from_chunks(answer.chunks)
        self.assertIn("simulated", whole["message"]["content"])
        self.assertEqual((whole["finish_reason"], answer.events[-1]), ("stop", "[DONE]"))
        self.assertGreater(sum(1 for chunk in answer.chunks if chunk["choices"]), 5)
        self.assertGreater(whole["usage"]["total_tokens"], 0)

    def test_a_tool_is_called_and_its_result_is_taken(self):
        tool = {"type": "function", "function": {"name": "get_weather", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"]}}}
        for stream in (False, True):
            with self.subTest(stream=stream):
                answer = self.chat("Weather?", tools=[tool], stream=stream)
                whole = completion_from_chunks(answer.chunks) if stream else completion_parts(answer.json)
                call, = whole["message"]["tool_calls"]
                self.assertEqual((call["function"]["name"], json.loads(call["function"]["arguments"])),
                                 ("get_weather", {"city": "simulated", "days": 1}))
                self.assertEqual(whole["finish_reason"], "tool_calls")
        said = self.chat(tools=[tool], messages=[
            {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}])
        self.assertEqual(said.json["choices"][0]["finish_reason"], "stop")
        self.assertIn("sunny", said.message["content"])
        self.assertIn("simulated", said.message["content"])

    def test_an_image_is_noticed(self):
        answer = self.chat([{"type": "text", "text": "What is this?"},
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}}])
        self.assertIn("image/png", answer.message["content"])
        self.assertIn("simulated", answer.message["content"])

    def test_a_structured_answer_fits_its_schema(self):
        schema = {"type": "object", "additionalProperties": False, "required": ["name", "size", "kind", "tags"],
                  "properties": {"name": {"type": "string"}, "size": {"type": "number"},
                                 "kind": {"enum": ["a", "b"]}, "tags": {"type": "array", "items": {"type": "string"}}}}
        answer = self.chat(response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}})
        self.assertEqual(json.loads(answer.message["content"]),
                         {"name": "simulated", "size": 1.5, "kind": "a", "tags": ["simulated"]})

    def test_no_request_is_too_odd_for_it(self):
        node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                                                 "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
                "required": ["next", "children"], "additionalProperties": False}
        recursive = {"type": "object", "properties": {"root": {"$ref": "#/$defs/node"}}, "required": ["root"],
                     "$defs": {"node": node}, "additionalProperties": False}
        cases = (
            ("a recursive tool", {"tools": [{"type": "function", "function": {"name": "tree",
                                                                               "parameters": recursive}}]}),
            ("a recursive answer", {"response_format": {"type": "json_schema",
                                                        "json_schema": {"name": "tree", "schema": recursive}}}),
            ("a JSON object", {"response_format": {"type": "json_object"}}),
            ("only a system message", {"messages": [{"role": "system", "content": "Be brief."}]}),
            ("an answer begun", {"messages": [{"role": "user", "content": "Hi"},
                                              {"role": "assistant", "content": "I was"}]}),
            ("a late system message", {"messages": [{"role": "user", "content": "Hi"},
                                                    {"role": "assistant", "content": "Hello"},
                                                    {"role": "user", "content": "Well?"},
                                                    {"role": "system", "content": "Be kind."}]}),
            ("reasoning", {"reasoning_effort": "high"}),
            ("a tool without parameters", {"tools": [{"type": "function", "function": {"name": "now"}}]}),
        )
        for name, fields in cases:
            with self.subTest(name):
                answer = self.chat(**fields)
                self.assertEqual(answer.status, 200, answer.raw[:300])

    def test_an_address_that_would_be_refused_does_not_stop_it(self):
        child = self.child("start", "--demo", "-p", "0", ANTHROPIC_BASE_URL="http://example.com")
        self.assertGreater(child.port, 0)

    def test_it_has_models(self):
        ids = [entry["id"] for entry in self.ask("GET", "/v1/models").json["data"]]
        self.assertIn("claude-sonnet-5-5", ids)


@POSIX_ONLY
class StartTests(CommandTestCase):
    def test_the_address_is_the_one_line_on_standard_output(self):
        child = self.serve(host=("--host", "localhost"))
        self.chat()
        self.assertEqual(child.end(signal.SIGTERM), 0)
        self.assertRegex(child.out, r"\Aclaude-gateway \d+\.\d+\.\d+ on http://127\.0\.0\.1:%d/v1\n\Z"
                         % self.service.port)
        self.assertIn("ANTHROPIC_API_KEY", child.err)
        self.assertIn(self.claude.url, child.err)
        self.assertIn("POST /v1/chat/completions", child.err)

    def test_an_interrupt_is_exit_130_without_a_traceback(self):
        child = self.serve()
        idle = self.connect()                                   # kept alive by a client that says nothing
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertIn(b"200", idle.recv(100))
        self.assertEqual(child.end(signal.SIGINT), 130)
        self.assertNotIn("Traceback", child.err)

    def test_a_signal_may_come_as_soon_as_the_address_is_out(self):
        child = self.child("start", "-p", "0", "--host", "127.0.0.1", ANTHROPIC_API_KEY=SECRET,
                           ANTHROPIC_BASE_URL=self.claude.url)
        child.wait_for("on http://", "out")
        self.assertEqual(child.end(signal.SIGTERM), 0)

    def test_a_running_request_finishes_first(self):
        child, release = self.serve(), self.slow_answer()
        thread, answers = self.in_flight()
        child.process.send_signal(signal.SIGTERM)
        child.wait_for("(?i)stopping")
        with self.assertRaises(OSError):                        # nothing new is accepted
            self.ask("GET", "/health")
        release.set()
        thread.join(20)
        self.assertEqual((answers[0].status, answers[0].message["content"]), (200, "At last"))
        self.assertEqual(child.end(), 0)

    def test_a_second_signal_ends_it_at_once(self):
        for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
            with self.subTest(number):
                child = self.serve()
                self.slow_answer()
                self.in_flight()
                child.process.send_signal(number)
                child.wait_for("(?i)stopping")
                self.assertEqual(child.end(number), code)
                self.assertNotIn("Traceback", child.err)

    def test_it_can_be_restarted_on_the_same_port_at_once(self):
        first = self.serve()
        connection = self.connect()
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv(100)
        port = str(self.service.port)
        self.assertEqual(first.end(signal.SIGTERM), 0)
        second = self.child("start", "--port", port, ANTHROPIC_API_KEY=SECRET, ANTHROPIC_BASE_URL=self.claude.url)
        self.assertEqual(str(second.port), port)

    def test_a_port_in_use_is_exit_4_and_named(self):
        port = str(urlsplit(self.claude.url).port)
        child = self.command("start", "--port", port, ANTHROPIC_API_KEY=SECRET)
        self.assertEqual((child.code, child.out), (4, ""))
        self.assertIn(port, child.err)
        self.assertIn("--port", child.err)

    def test_what_cannot_be_started_says_why_with_its_exit_code(self):
        key = {"ANTHROPIC_API_KEY": SECRET}
        cases = (
            (["start"], {}, 3, "ANTHROPIC_API_KEY.*login|login.*ANTHROPIC_API_KEY"),
            (["start", "--auth", "oauth"], key, 3, "login"),
            (["start", "--auth", "api-key"], {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-x"}, 3, "ANTHROPIC_API_KEY"),
            (["start", "--host", "0.0.0.0"], key, 2, "CLAUDE_GATEWAY_API_KEY"),
            (["start", "--host", "::"], key, 2, "CLAUDE_GATEWAY_API_KEY"),
            (["start", "--host", "192.0.2.7"], key, 2, "CLAUDE_GATEWAY_API_KEY"),
            (["start", "--host", "0.0.0.0", "--demo"], {}, 2, "CLAUDE_GATEWAY_API_KEY"),
            (["start", "--cors-origin", "*"], key, 2, "cors-origin"),
            (["start"], dict(key, CLAUDE_GATEWAY_PORT="", ANTHROPIC_BASE_URL="http://localhost:45554"), 2,
             "(?i)own address"),
            (["start", "-p", "5123"], dict(key, ANTHROPIC_BASE_URL="http://127.0.0.1:5123/v1"), 2, "(?i)own address"),
            (["start", "-p", "5123"], dict(key, ANTHROPIC_BASE_URL="http://[::1]:5123"), 2, "(?i)own address"),
            (["start"], dict(key, ANTHROPIC_BASE_URL="http://example.com"), 2, "ANTHROPIC_BASE_URL"),
            (["start"], dict(key, ANTHROPIC_BASE_URL="ftp://localhost"), 2, "ANTHROPIC_BASE_URL"),
            (["start"], dict(key, ANTHROPIC_BASE_URL="api.anthropic.com"), 2, "ANTHROPIC_BASE_URL"),
            (["start"], dict(key, CLAUDE_GATEWAY_TOKEN_URL="http://example.com/token"), 2, "CLAUDE_GATEWAY_TOKEN_URL"),
            (["start", "--api-key", ""], key, 2, "(?i)empty"),
            (["start", "--api-key", " "], key, 2, "(?i)empty"),
            (["start"], dict(key, CLAUDE_GATEWAY_API_KEY="good,,"), 2, "(?i)empty"),
            (["start", "--port", "abc"], key, 2, "port"),
            (["start", "--port", "65536"], key, 2, "port"),
            (["start", "--port=-1"], key, 2, "port"),
            (["start", "--no-such-option"], key, 2, "no-such-option"),
            (["start", "--token-file", os.path.join(PROGRAM, "tokens.json")], {}, 3, re.escape(PROGRAM)),
            (["start"], dict(key, HTTPS_PROXY="socks5://127.0.0.1:1080"), 2, "(?i)socks"),
            (["bake"], {}, 2, "bake"),
            ([], {}, 2, "start"),
        )
        done = self.commands(*[(arguments, variables) for arguments, variables, _, _ in cases])
        for child, (arguments, variables, code, words) in zip(done, cases):
            with self.subTest(arguments=arguments, variables=variables):
                self.assertEqual(child.code, code, child.err)
                self.assertRegex(child.err.replace("\n", " "), words)
                self.assertEqual(child.out, "")
                self.assertNotIn(SECRET, child.err)

    def test_an_upstream_that_is_down_does_not_keep_it_from_starting(self):
        self.serve(ANTHROPIC_BASE_URL="http://127.0.0.1:9")
        self.assertEqual(self.chat(headers={"x-stainless-retry-count": "1"}).status, 502)

    def test_a_damaged_token_file_is_named_and_left_as_it_is(self):
        os.makedirs(os.path.dirname(self.token_path))
        with open(self.token_path, "wb") as file:
            file.write(b"{ torn")
        for child in self.commands((["start"], {}), (["status"], {}), (["status", "--json"], {})):
            with self.subTest(child):
                self.assertIn(child.code, (1, 3))
                self.assertIn(self.token_path, child.err)
        with open(self.token_path, "rb") as file:
            self.assertEqual(file.read(), b"{ torn")
        self.assertEqual(os.listdir(os.path.dirname(self.token_path)), ["oauth-tokens.json"])

    def test_keys_of_clients_are_taken_from_both_places_and_one_draws_a_warning(self):
        child = self.serve("--api-key", "first-client-key", "--api-key", "second-client-key")
        for key, status in (("first-client-key", 200), ("second-client-key", 200), ("third", 401)):
            self.assertEqual(self.chat(headers={"authorization": "Bearer " + key}).status, status)
        child.end(signal.SIGTERM)
        self.assertEqual(len([line for line in child.err.split("\n") if "CLAUDE_GATEWAY_API_KEY" in line]), 1)
        self.assertNotIn("client-key", child.err)
    def test_quiet_says_nothing_but_the_address(self):
        child, release = self.serve("-q"), self.slow_answer()
        self.chat(nonsense=1, headers={"x-api-key": "k"}, messages="none")
        thread, _ = self.in_flight()
        child.process.send_signal(signal.SIGTERM)
        for _ in range(1_000):                                  # it is stopping when it accepts nothing more
            try:
                socket.create_connection(("127.0.0.1", self.service.port), 5).close()
            except OSError:
                break
            thread.join(0.01)
        release.set()
        self.assertEqual((child.end(), child.err), (0, ""))
        self.assertIn("http://127.0.0.1:", child.out)

    def test_each_level_logs_what_it_promises(self):
        levels = ((), ("-m",), ("-V",), ("--log-format", "json"))
        children = [self.child("start", "-p", "0", "--host", "127.0.0.1", *level, ANTHROPIC_API_KEY=SECRET,
                               ANTHROPIC_BASE_URL=self.claude.url) for level in levels]
        for child in children:
            self.service = SimpleNamespace(port=child.port)
            self.claude.play(message(text("Words of the answer"), model="claude-sonnet-5-5"))
            self.chat("Words of the request", seed=5)
            child.process.send_signal(signal.SIGTERM)
        for level, child in zip(levels, children):
            with self.subTest(level):
                child.end()
                lines = child.err.strip().split("\n")
                about = [number for number, line in enumerate(lines) if "/v1/chat/completions" in line]
                self.assertEqual("Words of the request" in child.err, level == ("-V",))
                self.assertEqual("Words of the answer" in child.err, level == ("-V",))
                if level == ():
                    self.assertEqual(len(about), 1)
                    self.assertRegex(lines[about[0]],
                                     r"POST /v1/chat/completions 200 .*claude-sonnet-5-5.* in 12 .*req_")
                    self.assertIn("seed", lines[about[0] + 1])
                    self.assertNotRegex("".join(lines[about[0] + 2:]), r"\A\d\d:")
                elif level == ("-m",):
                    self.assertRegex(lines[about[0]], r"POST /v1/chat/completions 200 \d+ ms\Z")
                    self.assertNotIn("seed", child.err)
                elif level == ("--log-format", "json"):
                    entry = json.loads(lines[about[0]])
                    self.assertEqual((entry["level"], entry["status"], entry["path"]),
                                     ("info", 200, "/v1/chat/completions"))

    def test_without_a_home_keys_work_and_logins_say_what_is_missing(self):
        # a home that is no absolute path is what a process without a home looks like
        child = self.serve(HOME="nowhere", APPDATA=None)
        self.assertEqual(self.chat().status, 200)
        child.end(signal.SIGTERM)
        homeless = {"HOME": "nowhere", "APPDATA": None}
        login, status, start, logout = self.commands(*[(arguments, homeless) for arguments in (
            ["login", "--no-browser"], ["status"], ["start"], ["logout"])])
        self.assertEqual((login.code, status.code, start.code), (2, 3, 3))
        self.assertIn("--token-file", login.err)
        self.assertIn(logout.code, (0, 2))
        self.assertEqual(os.listdir(self.working_directory), [])

    def test_nothing_is_read_from_the_working_directory(self):
        for name in ("oauth-tokens.json", ".oauth-tokens.json", "claude-gateway/oauth-tokens.json",
                     ".config/claude-gateway/oauth-tokens.json"):
            claude_gateway.TokenFile(os.path.join(self.working_directory, name)).write(stored_token())
        for name in (".env", "claude-gateway.env", ".claude-gateway"):
            with open(os.path.join(self.working_directory, name), "w", encoding="utf-8") as file:
                file.write("ANTHROPIC_API_KEY=sk-ant-api03-x\n")
        for name in ("ssl.py", "json.py", "webbrowser.py"):
            with open(os.path.join(self.working_directory, name), "w", encoding="utf-8") as file:
                file.write("raise SystemExit(99)\n")
        child = self.child("status")
        self.assertEqual(child.end(), 3, child.err)

    def test_a_login_is_used_and_named(self):
        self.sign_in(account={"email_address": "me@example.org"})
        child = self.serve(ANTHROPIC_API_KEY="")                # empty counts as unset
        self.assertEqual(self.chat().status, 200)
        self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer " + OLD_ACCESS)
        child.wait_for("me@example.org")
        child.wait_for("(?i)terms")

    def test_on_a_terminal_a_first_start_signs_in_first(self):
        try:
            import pty
        except ImportError:
            self.skipTest("no pseudo terminals here")
        self.claude.token_replies.append(token_answer())
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        child = self.child("start", "--port", "0", stdin=slave, BROWSER="true", ANTHROPIC_BASE_URL=self.claude.url,
                           CLAUDE_GATEWAY_TOKEN_URL=self.token_url)
        os.close(slave)
        state = parse_qs(child.wait_for(r"https://claude\.ai/oauth/authorize\?(\S+)").group(1))["state"][0]
        child.wait_for("2026-08-22")
        child.wait_for("Code: ")
        os.write(master, ("the-code#%s\n" % state).encode())
        self.service = SimpleNamespace(port=child.port)
        self.assertEqual(self.chat().status, 200)
        self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer " + NEW_ACCESS)
        self.assertEqual(child.end(signal.SIGTERM), 0)
        self.assertEqual(len(child.out.strip().split("\n")), 1)


def config_of(*arguments: str, **variables: str) -> Config:
    """What `start` makes of flags and variables."""
    return claude_gateway.config_from(claude_gateway.argument_parser().parse_args(["start"] + list(arguments)),
                                      dict({"HOME": "/home/me", "APPDATA": "C:\\Users\\me"}, **variables))


class OptionTests(unittest.TestCase):
    CASES = (                                       # flags, variable, its value, field, by flag, by variable, default
        (("--port", "1"), "PORT", "2", "port", 1, 2, 45554), (("-p", "0"), "PORT", "2", "port", 0, 2, 45554),
        (("--host", "::1"), "HOST", "127.0.0.2", "host", "::1", "127.0.0.2", "localhost"),
        (("--api-key", "a", "--api-key", "b"), "API_KEY", "c, d", "api_key", ("a", "b"), ("c", "d"), ()),
        (("--verbose",), "VERBOSE", "1", "verbose", True, True, False),
        (("-V",), "VERBOSE", "yes", "verbose", True, True, False),
        (("--minimal",), "MINIMAL", "true", "minimal", True, True, False),
        (("-m",), "MINIMAL", "TRUE", "minimal", True, True, False),
        (("--quiet",), "QUIET", "on", "quiet", True, True, False), (("-q",), "QUIET", "On", "quiet", True, True, False),
        (("--log-format", "text"), "LOG_FORMAT", "json", "log_format", "text", "json", "text"),
        (("--auth", "oauth"), "AUTH", "api-key", "auth", "oauth", "api-key", "auto"),
        (("--token-file", "/a"), "TOKEN_FILE", "/b", "token_file", "/a", "/b", None),
        (("--alias", "x=opus", "--alias", "*=haiku"), "ALIAS", "y=sonnet,z=a=b", "alias",
         (("x", "opus"), ("*", "haiku")), (("y", "sonnet"), ("z", "a=b")), ()),
        (("--allow-host", "a", "--allow-host", "b"), "ALLOW_HOST", "c,d", "allow_host", ("a", "b"), ("c", "d"), ()),
        (("--cors-origin", "app://x"), "CORS_ORIGIN", "null,https://y", "cors_origin", ("app://x",),
         ("null", "https://y"), ()),
        (("--relax-x509",), "RELAX_X509", "1", "relax_x509", True, True, False),
        (("--no-cache",), "NO_CACHE", "1", "no_cache", True, True, False),
        (("--strict",), "STRICT", "1", "strict", True, True, False),
        (("--demo",), "DEMO", "1", "demo", True, True, False),
    )

    def test_flag_over_environment_over_default(self):
        for flags, name, value, field_name, by_flag, by_variable, default in self.CASES:
            variable = "CLAUDE_GATEWAY_" + name
            with self.subTest(variable):
                if default is not None:
                    self.assertEqual(getattr(config_of(), field_name), default)
                self.assertEqual(getattr(config_of(*flags), field_name), by_flag)
                self.assertEqual(getattr(config_of(**{variable: value}), field_name), by_variable)
                self.assertEqual(getattr(config_of(*flags, **{variable: value}), field_name), by_flag)

    def test_an_empty_variable_counts_as_unset(self):
        for _, name, _, _, _, _, _ in self.CASES:
            for empty in ("", " "):
                with self.subTest(name=name, empty=empty):
                    self.assertEqual(config_of(**{"CLAUDE_GATEWAY_" + name: empty}), config_of())
        for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_BASE_URL",
                     "CLAUDE_GATEWAY_TOKEN_URL", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "SSL_CERT_FILE",
                     "XDG_CONFIG_HOME"):
            with self.subTest(name):
                self.assertEqual(config_of(**{name: ""}), config_of())

    def test_a_switch_in_the_environment_can_be_off(self):
        for word in ("0", "false", "no", "off", "OFF"):
            self.assertIs(config_of(CLAUDE_GATEWAY_DEMO=word).demo, False)

    def test_values_that_make_no_sense_are_usage_errors_that_name_them(self):
        cases = (({"CLAUDE_GATEWAY_PORT": "x"}, "(?i)port"), ({"CLAUDE_GATEWAY_PORT": "70000"}, "(?i)port"),
                 ({"CLAUDE_GATEWAY_AUTH": "x"}, "AUTH"), ({"CLAUDE_GATEWAY_LOG_FORMAT": "xml"}, "LOG_FORMAT"),
                 ({"CLAUDE_GATEWAY_DEMO": "maybe"}, "DEMO"), ({"CLAUDE_GATEWAY_ALIAS": "opus"}, "(?i)alias"),
                 ({"CLAUDE_GATEWAY_ALIAS": "=opus"}, "(?i)alias"), ({"CLAUDE_GATEWAY_ALIAS": "x="}, "(?i)alias"),
                 ({"CLAUDE_GATEWAY_API_KEY": ","}, "(?i)key"),
                 ({"ANTHROPIC_BASE_URL": "https://user:word@example.com"}, "ANTHROPIC_BASE_URL"),
                 ({"ANTHROPIC_BASE_URL": "http://[::1"}, "ANTHROPIC_BASE_URL"),
                 ({"ANTHROPIC_BASE_URL": "http://localhost:99999"}, "ANTHROPIC_BASE_URL"),
                 ({"HTTPS_PROXY": "socks5h://127.0.0.1:1"}, "(?i)proxy"),
                 ({"HTTPS_PROXY": "http:/user:word@proxy"}, "(?i)proxy"),
                 ({"HTTPS_PROXY": "http://[::1"}, "(?i)proxy"), ({"HTTPS_PROXY": "http://proxy:port"}, "(?i)proxy"),
                 ({"ANTHROPIC_API_KEY": "two\nlines"}, "ANTHROPIC_API_KEY"),
                 ({"ANTHROPIC_AUTH_TOKEN": "\u043a\u043b\u044e\u0447"}, "ANTHROPIC_AUTH_TOKEN"))
        for variables, words in cases:
            with self.subTest(variables):
                with self.assertRaisesRegex(claude_gateway.UsageError, words) as raised:
                    config_of(**variables)
                self.assertNotIn("user:word", str(raised.exception))

    def test_blanks_around_a_credential_do_not_count(self):
        config = config_of(ANTHROPIC_API_KEY=" sk-ant-k\n", ANTHROPIC_AUTH_TOKEN="t \r\n",
                           CLAUDE_CODE_OAUTH_TOKEN="\to")
        self.assertEqual((config.anthropic_api_key, config.anthropic_auth_token, config.claude_code_oauth_token),
                         ("sk-ant-k", "t", "o"))

    def test_the_environment_names_are_those_that_people_have_already(self):
        config = config_of(ANTHROPIC_API_KEY="k", ANTHROPIC_AUTH_TOKEN="t", CLAUDE_CODE_OAUTH_TOKEN="o",
                           ANTHROPIC_BASE_URL="https://proxy.example.com/anthropic", HTTPS_PROXY="http://p:1",
                           CLAUDE_GATEWAY_TOKEN_URL="https://api.anthropic.com/v1/oauth/token", NO_PROXY="a,b",
                           REQUESTS_CA_BUNDLE="/ca.pem")
        self.assertEqual((config.anthropic_api_key, config.anthropic_auth_token, config.claude_code_oauth_token,
                          config.base_url, config.https_proxy, config.token_url, config.no_proxy, config.ca_file),
                         ("k", "t", "o", "https://proxy.example.com/anthropic", "http://p:1",
                          "https://api.anthropic.com/v1/oauth/token", "a,b", "/ca.pem"))
        self.assertEqual((config_of().base_url, config_of().token_url),
                         ("https://api.anthropic.com", "https://platform.claude.com/v1/oauth/token"))

    @POSIX_ONLY
    def test_the_token_file_lies_in_the_users_configuration_directory(self):
        usual = os.path.join(os.path.expanduser("~"), ".config/claude-gateway/oauth-tokens.json")
        for variables, path in (({}, usual),
                                ({"XDG_CONFIG_HOME": "/x"}, "/x/claude-gateway/oauth-tokens.json"),
                                # XDG: "All paths must be absolute. If [...] relative [...] ignore it."
                                ({"XDG_CONFIG_HOME": "x"}, usual),
                                ({"CLAUDE_GATEWAY_TOKEN_FILE": "/t.json"}, "/t.json")):
            with self.subTest(variables):
                self.assertEqual(config_of(**variables).token_file, path)

    def test_a_key_opens_every_address(self):
        for host in ("0.0.0.0", "::", "192.0.2.7", "gateway.example.com"):
            claude_gateway.check_exposure(config_of("--host", host, CLAUDE_GATEWAY_API_KEY="k"))
        for host in ("localhost", "127.0.0.1", "::1", "127.1.2.3", "gateway.localhost"):
            claude_gateway.check_exposure(config_of("--host", host))

    def test_a_config_does_not_show_its_secrets(self):
        shown = repr(config_of(ANTHROPIC_API_KEY="secret-1", ANTHROPIC_AUTH_TOKEN="secret-2",
                               CLAUDE_CODE_OAUTH_TOKEN="secret-3", CLAUDE_GATEWAY_API_KEY="secret-4",
                               HTTPS_PROXY="http://user:secret-5@proxy:1"))
        self.assertNotIn("secret", shown)


@POSIX_ONLY
class LoginCommandTests(CommandTestCase):
    def begin(self, *arguments, **variables):
        """A login that waits for its code, and the query of the address it shows."""
        child = self.child("login", "--no-browser", *arguments, CLAUDE_GATEWAY_TOKEN_URL=self.token_url, **variables)
        address = child.wait_for(r"https://claude\.ai/oauth/authorize\?(\S+)")
        return child, {name: values[0] for name, values in parse_qs(address.group(1)).items()}

    def test_the_code_is_exchanged_with_the_verifier_of_the_challenge(self):
        self.claude.token_replies.append(token_answer(account={"email_address": "me@example.org"}))
        child, query = self.begin()
        child.type("the-code#%s\n" % query["state"])
        self.assertEqual(child.end(), 0, child.err)
        request, = self.claude.requests
        code_verifier = request.body.pop("code_verifier")
        self.assertEqual(request.body, {"grant_type": "authorization_code", "code": "the-code", "state": query["state"],
                                        "client_id": CLIENT_ID, "redirect_uri": REDIRECT_PAGE})
        self.assertEqual(request.headers["content-type"], "application/json")
        self.assertRegex(code_verifier, r"\A[A-Za-z0-9._~-]{43,128}\Z")
        self.assertEqual(query["code_challenge"], challenge_of(code_verifier))
        self.assertEqual(query["redirect_uri"], REDIRECT_PAGE)
        self.assertEqual(len({query["state"], query["code_challenge"], code_verifier}), 3, "the state is no secret")
        with open(self.token_path, encoding="utf-8") as file:
            stored = json.load(file)
        self.assertEqual(sorted(set(stored) - {"account"}), TOKEN_FIELDS)
        self.assertEqual((stored["access_token"], stored["refresh_token"], stored["token_type"]),
                         (NEW_ACCESS, NEW_REFRESH, "Bearer"))
        self.assertAlmostEqual(stored["expires_at"], time.time() + 28_800, delta=60)
        self.assertEqual([oct(os.stat(path).st_mode & 0o777) for path in
                          (self.token_path, os.path.dirname(self.token_path))], ["0o600", "0o700"])
        self.assertIn("me@example.org", child.err)
        self.assertIn(self.token_path, child.err)
        self.assertEqual(child.out, "")
        for secret in (code_verifier, NEW_ACCESS, NEW_REFRESH):
            self.assertNotIn(secret, child.err)

    def test_the_terms_are_told_with_dates_before_anything_is_asked(self):
        helped = self.command("login", "--help")
        child = self.command("login", "--no-browser")
        for said in (child.err, helped.out):
            for words in ("2026-08-22", "2026-09-14", "terms", "API key", "always fine", "client id", "redirect page",
                          "system block"):
                self.assertIn(words, said)
        self.assertLess(child.err.index("2026-08-22"), child.err.index("https://claude.ai/oauth/authorize"))

    def test_a_callback_address_is_taken_and_a_bare_code_is_warned_about(self):
        for paste, warned in (("%s?code=the-code&state={state}" % REDIRECT_PAGE, False), ("the-code", True)):
            with self.subTest(paste):
                self.claude.reset()
                self.claude.token_replies.append(token_answer())
                child, query = self.begin()
                child.type(paste.format(**query) + "\n")
                self.assertEqual(child.end(), 0, child.err)
                self.assertEqual("Warning" in child.err, warned)
                self.assertEqual((self.claude.requests[0].body["code"], self.claude.requests[0].body["state"]),
                                 ("the-code", query["state"]))

    def test_a_paste_that_cannot_be_right_never_reaches_the_endpoint(self):
        cases = (("the-code#of-another-sign-in\n", 1), ("\n", 3), ("", 3), ("https://[broken\n", 1),
                 ("%s?error=access_denied\n" % REDIRECT_PAGE, 1))
        done = self.commands(*[(["login", "--no-browser"], {"CLAUDE_GATEWAY_TOKEN_URL": self.token_url}, paste)
                               for paste, _ in cases])
        for child, (paste, code) in zip(done, cases):
            with self.subTest(paste):
                self.assertEqual(child.code, code, child.err)
        self.assertEqual(self.claude.requests, [])
        self.assertFalse(os.path.exists(self.token_path))

    def test_a_refusal_is_told_in_the_endpoints_words_and_stores_nothing(self):
        cases = ((Reply(400, body={"error": "invalid_grant", "error_description": "Code expired"}), "Code expired"),
                 (Reply(429, body=error_body("rate_limit_error", "Slow down, please")), "Slow down, please"),
                 (Reply(403, body=b"<html>blocked</html>"), "403"), (Reply(200, body=b"<html>"), "200"))
        self.claude.token_replies += [reply for reply, _ in cases]
        done = self.commands(*[(["login", "--no-browser"], {"CLAUDE_GATEWAY_TOKEN_URL": self.token_url}, "the-code\n")
                               for _ in cases])
        for child, (_, words) in zip(done, cases):
            with self.subTest(words):
                self.assertIn(child.code, (1, 3, 5))
                self.assertIn(words, child.err)
        self.assertFalse(os.path.exists(self.token_path))

    def test_an_endpoint_that_cannot_be_reached_is_exit_5(self):
        child = self.command("login", "--no-browser", typed="the-code\n",
                             CLAUDE_GATEWAY_TOKEN_URL="http://127.0.0.1:9/token")
        self.assertEqual(child.code, 5)
        self.assertNotIn("the-code", child.err)

    def test_a_redirect_of_the_endpoint_is_not_followed(self):
        with FakeClaude() as elsewhere:
            self.claude.token_replies.append(Reply(307, {"location": elsewhere.url + "/v1/oauth/token"}))
            child = self.command("login", "--no-browser", typed="the-code\n", CLAUDE_GATEWAY_TOKEN_URL=self.token_url)
            self.assertNotEqual(child.code, 0)
            self.assertEqual(elsewhere.requests, [])

    def test_a_place_that_cannot_be_written_is_named(self):
        self.claude.token_replies.append(token_answer())
        child = self.command("login", "--no-browser", "--token-file", os.path.join(PROGRAM, "tokens.json"),
                             typed="the-code\n", CLAUDE_GATEWAY_TOKEN_URL=self.token_url)
        self.assertEqual(child.code, 1)
        self.assertIn(os.path.join(PROGRAM, "tokens.json"), child.err)

    def test_an_interrupt_at_the_prompt_is_exit_130_without_a_traceback(self):
        child, _ = self.begin()
        child.wait_for("Code: ")
        child.process.send_signal(signal.SIGINT)
        self.assertEqual(child.process.wait(20), 130)
        self.assertNotIn("Traceback", child.err)

    def test_a_damaged_file_is_kept_aside_by_a_new_login(self):
        os.makedirs(os.path.dirname(self.token_path))
        with open(self.token_path, "wb") as file:
            file.write(b"{ torn")
        self.claude.token_replies.append(token_answer())
        child = self.command("login", "--no-browser", typed="the-code\n", CLAUDE_GATEWAY_TOKEN_URL=self.token_url)
        self.assertEqual(child.code, 0, child.err)
        directory = os.path.dirname(self.token_path)
        kept, = [name for name in os.listdir(directory) if "damaged" in name]
        with open(os.path.join(directory, kept), "rb") as file:
            self.assertEqual(file.read(), b"{ torn")
        self.assertIn(kept, child.err)


@POSIX_ONLY
class OtherCommandTests(CommandTestCase):
    def test_logout_forgets_and_says_so(self):
        self.sign_in()
        twice = self.commands((["logout"], {}), (["logout"], {}))
        for child, words in zip(twice, (self.token_path, "no stored login")):
            self.assertEqual((child.code, child.out), (0, ""))
            self.assertIn(words, child.err)
        self.assertFalse(os.path.exists(self.token_path))

    def test_logout_from_an_impossible_place_is_no_traceback(self):
        for child in self.commands((["logout", "--token-file", self.home], {}),
                                   (["logout", "--token-file", os.path.join(PROGRAM, "tokens.json")], {})):
            self.assertIn(child.code, (0, 1))
        self.assertTrue(os.path.isdir(self.home))

    def test_status_tells_which_credential_and_whose(self):
        none, key, bearer = self.commands((["status"], {}), (["status"], {"ANTHROPIC_API_KEY": SECRET}),
                                          (["status"], {"CLAUDE_CODE_OAUTH_TOKEN": SECRET}))
        self.assertEqual((none.code, key.code, bearer.code), (3, 0, 0))
        self.assertIn("login", none.out + none.err)
        self.assertIn("ANTHROPIC_API_KEY", key.out)
        self.assertIn("CLAUDE_CODE_OAUTH_TOKEN", bearer.out)
        self.sign_in(account={"email_address": "me@example.org"}, organization={"name": "Example Ltd"})
        login = self.command("status")
        self.assertEqual(login.code, 0)
        for words in ("me@example.org", "Example Ltd", self.token_path, "59 minutes"):
            self.assertIn(words, login.out)
        self.assertEqual(self.claude.requests, [])

    def test_status_as_json_is_one_object(self):
        none, key = self.commands((["status", "--json"], {}), (["status", "--json"], {"ANTHROPIC_API_KEY": SECRET}))
        self.assertEqual((none.code, json.loads(none.out)["kind"]), (3, None))
        self.assertEqual((key.code, json.loads(key.out)["kind"]), (0, "api_key"))
        self.sign_in(account={"email_address": "me@example.org"})
        login = self.command("status", "--json")
        told = json.loads(login.out)
        self.assertEqual((login.code, told["kind"], told["account"], told["refreshable"]),
                         (0, "oauth", "me@example.org", True))
        self.assertAlmostEqual(told["expires_at"], time.time() + 3_600, delta=60)

    def test_status_survives_odd_values_in_the_file(self):
        cases = ({"account": "me"}, {"expires_at": "soon"}, {"expires_at": 1e300}, {"organization": ["x"]},
                 {"expires_at": int(time.time() * 1000)})
        paths = []
        for number, fields in enumerate(cases):
            paths.append(os.path.join(self.home, "%d.json" % number))
            claude_gateway.TokenFile(paths[-1]).write(stored_token(**fields))
        for child, fields in zip(self.commands(*[(["status", "--token-file", path], {}) for path in paths]), cases):
            with self.subTest(fields):
                self.assertIn(child.code, (0, 1, 3))

    def test_models_lists_names_and_aliases(self):
        self.claude.models = [{"type": "model", "id": "claude-sonnet-5-5", "display_name": "Claude Sonnet 5.5",
                               "created_at": "2026-06-01T00:00:00Z"}]
        live = {"ANTHROPIC_API_KEY": SECRET, "ANTHROPIC_BASE_URL": self.claude.url}
        plain, as_json, built_in, down = self.commands(
            (["models", "--alias", "mine=claude-sonnet-5-5"], live), (["models", "--json"], live),
            (["models", "--json"], {}),
            (["models"], {"ANTHROPIC_API_KEY": SECRET, "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}))
        self.assertEqual([child.code for child in (plain, as_json, built_in, down)], [0] * 4)
        self.assertRegex(plain.out, r"(?m)^claude-sonnet-5-5 ")
        self.assertRegex(plain.out, r"(?m)^mine +-> claude-sonnet-5-5$")
        self.assertNotIn("claude-opus-4-8", plain.out)
        entries = json.loads(as_json.out)
        self.assertEqual({entry["object"] for entry in entries}, {"model"})
        self.assertIn("claude-sonnet-5-5", [entry["id"] for entry in entries])
        self.assertIn("claude-opus-5-5", [entry["id"] for entry in json.loads(built_in.out)])
        self.assertIn("claude-opus-5-5", down.out)
        self.assertIn("built-in", down.err)

    def test_a_reader_that_goes_away_is_no_traceback(self):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = subprocess.run([sys.executable, PROGRAM, "models"], env=self.environment({}), stdout=writing,
                                  stderr=subprocess.PIPE, cwd=self.working_directory, timeout=20, check=False)
        finally:
            os.close(writing)
        self.assertEqual(done.stderr, b"")

    def test_the_version_and_the_help(self):
        version, general, start, nothing, narrow = self.commands(
            (["--version"], {}), (["--help"], {}), (["start", "-h"], {}), ([], {}),
            (["start", "--help"], {"COLUMNS": "20"}))
        self.assertEqual([child.code for child in (version, general, start, nothing, narrow)], [0, 0, 0, 2, 0])
        real = self.child("--version")                          # once through the script itself
        self.assertEqual((real.end(), real.err), (0, ""))
        for out in (version.out, real.out):
            self.assertRegex(out, r"\Aclaude-gateway \d+\.\d+\.\d+\n\Z")
            self.assertEqual(out.split()[1], claude_gateway.VERSION)
        for command in ("start", "login", "logout", "status", "models"):
            self.assertRegex(general.out, r"(?m)^ +%s " % command)
        for option in ("-p", "--port", "--host", "--api-key", "-V", "--verbose", "-m", "--minimal", "-q", "--quiet",
                       "--log-format", "--auth", "--token-file", "--alias", "--allow-host", "--cors-origin",
                       "--relax-x509", "--no-cache", "--strict", "--demo"):
            self.assertRegex(start.out, r"(?m)^ +(-\w,? ?\S* ?,? )?%s\b" % re.escape(option))
        self.assertIn("CLAUDE_GATEWAY_PORT", start.out)
        self.assertIn("usage:", nothing.err)
        for child in self.commands(*[([name, "--help"], {}) for name in ("login", "logout", "status", "models")]):
            self.assertEqual(child.code, 0)
            self.assertIn("--token-file", child.out)

    def test_a_terminal_that_knows_only_ascii_stops_nothing(self):
        self.sign_in(account={"email_address": "j\u00fcrgen@example.org"}, organization={"name": "Fuchs \U0001f98a"})
        ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"}
        for child in (self.child("status", **ascii_only), self.child("start", "--help", **ascii_only)):
            self.assertEqual((child.end(), child.err), (0, ""))
        child = self.serve("-V", "--alias", "f\u00fcchse=sonnet", **ascii_only)
        self.assertEqual(self.chat("\U0001f98a\u2028\u00fc").status, 200)
        self.assertEqual(child.end(signal.SIGTERM), 0)
        self.assertNotIn("Traceback", child.err)
        self.assertNotIn("Error", child.err)


def forms_of(secret: str) -> set:
    """How a secret can lie in a text: as it is, in an address, and inside base64 at any of three offsets."""
    forms = {secret, urllib.parse.quote(secret, safe="")}
    for offset in range(3):
        inside = base64.b64encode(b"\0" * offset + secret.encode()).decode()[4 if offset else 0:]
        forms.add(inside[:len(inside) // 4 * 4 - 4])
    return forms


@POSIX_ONLY
class SecrecyTests(CommandTestCase):
    def assert_hidden(self, text, secrets, where):
        for secret in secrets:
            for form in forms_of(secret):
                self.assertNotIn(form, text, "%s shows %s" % (where, secret))

    def test_no_secret_is_in_any_log_or_answer(self):
        planted = ["sk-ant-oat01-planted-old", "sk-ant-ort01-planted-old", "sk-ant-oat01-planted-new",
                   "sk-ant-ort01-planted-new", "planted-client-key-1", "planted-client-key-2", "planted-proxy-word"]
        variants = [(), ("-m",), ("-q",), ("-V",), ("-V", "--log-format", "json")]

        def renew_once(recorded):
            if recorded.body["refresh_token"] == planted[1]:
                return token_answer(access_token=planted[2], refresh_token=planted[3])
            return Reply(400, body={"error": "invalid_grant"})
        self.claude.token_replies += [renew_once] * 50
        children = []
        for number, variant in enumerate(variants):
            path = os.path.join(self.home, "tokens-%d.json" % number)
            claude_gateway.TokenFile(path).write(stored_token(-10, access_token=planted[0], refresh_token=planted[1]))
            children.append(self.child(
                "start", "-p", "0", "--host", "127.0.0.1", "--token-file", path, *variant,
                CLAUDE_GATEWAY_API_KEY=",".join(planted[4:6]), ANTHROPIC_BASE_URL=self.claude.url,
                CLAUDE_GATEWAY_TOKEN_URL=self.token_url,
                HTTPS_PROXY="http://planted-user:planted-proxy-word@127.0.0.1:9"))
        for variant, child in zip(variants, children):
            with self.subTest(variant):
                self.service = SimpleNamespace(port=child.port)
                answers = []
                right, wrong = {"authorization": "Bearer " + planted[4]}, {"x-api-key": planted[4] + "x"}
                answers += [self.chat(headers=right), self.chat(headers=right, stream=True, seed=1),
                            self.chat(headers=wrong), self.ask("GET", "/v1/models", headers=right),
                            self.ask("GET", "/health"), self.ask("GET", "/"),
                            self.ask("GET", "/nothing", headers=right),
                            self.chat(headers={"api-key": planted[5]}, model=planted[5])]
                self.claude.play(Reply(401, body=error_body("authentication_error", "OAuth token has expired.")),
                                 Reply(400, body=error_body("invalid_request_error", "No.")))
                answers += [self.chat(headers=right), self.chat(headers=right)]     # 401: a renewal that is refused
                self.assertEqual({answer.status for answer in answers} & {200, 401, 404, 400}, {200, 401, 404, 400})
                child.process.send_signal(signal.SIGTERM)
                heard = "".join("%s %s" % (answer.headers, answer.raw.decode()) for answer in answers
                                if planted[5].encode() not in answer.raw)       # a model name is handed back
                self.assert_hidden(heard, planted, "an answer")
        for variant, child in zip(variants, children):
            with self.subTest(variant):
                self.assertEqual(child.end(), 0)
                self.assert_hidden(child.out, planted, "standard output")
                self.assert_hidden(child.err, planted, "the log")
                self.assertNotIn("CLAUDE_GATEWAY_API_KEY", child.err)           # it is where it should be

    def test_a_client_key_in_a_prompt_is_masked_in_the_log(self):
        child = self.serve("-V", CLAUDE_GATEWAY_API_KEY="planted-client-key")
        self.chat("My keys are planted-client-key and sk-ant-api03-planted-elsewhere.",
                  headers={"authorization": "Bearer planted-client-key"})
        child.end(signal.SIGTERM)
        self.assertIn("My keys are", child.err)
        self.assert_hidden(child.err, ["planted-client-key", "sk-ant-api03-planted-elsewhere"], "the log")

    def test_a_proxy_that_refuses_learns_its_word_and_nobody_else(self):
        heads = []
        with socket.socket() as proxy:
            proxy.bind(("127.0.0.1", 0))
            proxy.listen(5)

            def refuse():
                with contextlib.suppress(OSError):
                    while True:
                        connection = proxy.accept()[0]
                        heads.append("")
                        while not heads[-1].endswith("\r\n\r\n"):
                            heads[-1] += connection.recv(65_536).decode("latin-1")
                        connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                        connection.close()
            threading.Thread(target=refuse, daemon=True).start()
            child = self.serve("-V", ANTHROPIC_BASE_URL="https://upstream.invalid",
                               HTTPS_PROXY="http://planted-user:planted-word@127.0.0.1:%d" % proxy.getsockname()[1])
            answer = self.chat(headers={"x-stainless-retry-count": "1"})
            child.end(signal.SIGTERM)
            proxy.shutdown(socket.SHUT_RDWR)
        self.assertEqual(answer.status, 502)
        self.assertIn(base64.b64encode(b"planted-user:planted-word").decode(), heads[0])
        self.assertNotIn(SECRET, "".join(heads))
        self.assert_hidden(answer.raw.decode() + child.out + child.err, ["planted-word", "planted-user:planted-word",
                                                                         SECRET], "the gateway")

    def test_status_and_models_show_no_secret(self):
        cases = [{name: "planted-%s-secret" % name.lower()} for name in
                 ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN")]
        self.sign_in(access_token="planted-access", refresh_token="planted-refresh")
        secrets = [value for case in cases for value in case.values()] + ["planted-access", "planted-refresh"]
        for child in self.commands(*[(arguments, dict(case, ANTHROPIC_BASE_URL="http://127.0.0.1:9"))
                                     for arguments in (["status"], ["status", "--json"], ["models"])
                                     for case in cases + [{}]]):
            self.assertEqual(child.code, 0)
            self.assert_hidden(child.out + child.err, secrets, "a command")

    def test_a_key_that_no_header_can_carry_is_not_shown(self):
        keys = ("planted-secret\nkey", "planted-secret-\u043a\u043b\u044e\u0447")
        for child in self.commands(*[(["models"], {"ANTHROPIC_API_KEY": key, "ANTHROPIC_BASE_URL": self.claude.url})
                                     for key in keys]):
            self.assertNotIn("planted-secret", child.out + child.err)


IMPORT_PROBE = """
import os, signal, sys, threading
seen = []
def watch(event, arguments):
    if event.startswith(("socket.__new__", "socket.bind", "socket.connect", "socket.getaddrinfo", "subprocess.",
                         "os.mkdir", "os.remove", "os.rename", "os.system", "os.putenv")):
        seen.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append("open %s" % arguments[0])
sys.addaudithook(watch)
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
sys.path.insert(0, sys.argv[1])
import claude_gateway
import logging
assert not seen, seen
assert threading.active_count() == 1
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
assert not logging.getLogger().handlers and os.listdir(".") == []
"""


class ImportTests(CommandTestCase):
    def test_an_import_does_nothing(self):
        done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT_PROBE, HERE], cwd=self.working_directory,
                              env=self.environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20,
                              check=False)
        self.assertEqual((done.stdout, done.stderr, done.returncode), (b"", b"", 0))

    @POSIX_ONLY
    def test_a_python_that_is_too_old_shows_the_remedy(self):
        found, versions = 0, os.path.expanduser("~/.pyenv/versions")
        installed = sorted(os.listdir(versions)) if os.path.isdir(versions) else []
        for version in ("3.6", "3.7"):
            places = [shutil.which("python" + version)] + [os.path.join(versions, name, "bin", "python")
                                                           for name in installed if name.startswith(version + ".")]
            for place in places:
                if not place or subprocess.run([place, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                               check=False).returncode:
                    continue
                found += 1
                with self.subTest(place):
                    done = subprocess.run([place, PROGRAM, "--version"], env=self.environment({}), timeout=20,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False,
                                          cwd=self.working_directory)
                    self.assertNotEqual(done.returncode, 0)
                    self.assertRegex(done.stderr.decode(), r"3\.8")
                    self.assertRegex(done.stderr.decode(), r"python3\.\d+")
        if not found:
            self.skipTest("no such interpreter here")


# ==== Status page =====================================================================================

class StatusTests(GatewayTestCase):
    def setUp(self):
        super().setUp()
        self.start()                                # counts from zero

    def status(self, **headers) -> dict:
        return self.ask("GET", "/", headers=dict({"accept": "application/json"}, **headers)).json

    def test_requests_tokens_cache_and_errors_are_counted(self):
        usage = {"input_tokens": 100, "cache_read_input_tokens": 800, "cache_creation_input_tokens": 100,
                 "output_tokens": 50}
        self.claude.play(message(text("A"), usage=usage), message(text("B"), usage=usage))
        self.chat()
        self.chat(stream=True)
        self.chat(model="no-such-model")
        data = self.status()
        self.assertEqual(data["requests"], {"total": 3, "running": 1})
        self.assertEqual(data["tokens"], {"input": 200, "cache_read": 1600, "cache_write": 200, "output": 100})
        self.assertEqual(data["errors"], {"model_not_found": 1})
        # sonnet 5.5: $2 fresh, $0.10 read; 1600 reads save 1.90 each, 200 writes cost 0.50 more each, per million
        self.assertEqual(data["cache"], {"share_percent": 80, "saved_usd": round((1600 * 1.9 - 200 * 0.5) / 1e6, 4)})

    def test_plan_windows_and_rate_limits_come_from_the_latest_answer(self):
        reset = int(time.time()) + 3600
        self.claude.play(Reply(body=message(text("A")), headers={
            "anthropic-ratelimit-unified-5h-utilization": "0.42", "anthropic-ratelimit-unified-5h-reset": str(reset),
            "anthropic-ratelimit-unified-5h-status": "allowed",
            "anthropic-ratelimit-requests-limit": "50", "anthropic-ratelimit-requests-remaining": "40",
            "anthropic-ratelimit-requests-reset": "2031-01-01T00:00:00Z"}))
        self.chat()
        windows = {limit["window"]: limit for limit in self.status()["limits"]}
        self.assertEqual(windows["5h"], {"window": "5h", "title": "5 hours", "used": 0.42, "resets_at": reset,
                                         "over": False, "status": "allowed"})
        self.assertEqual((windows["requests"]["used"], windows["requests"]["resets_at"]), (0.2, 1924992000))

    def test_odd_limit_headers_do_no_harm(self):
        self.claude.play(Reply(body=message(text("A")), headers={
            "anthropic-ratelimit-unified-5h-utilization": "nan", "anthropic-ratelimit-unified-7d-utilization": "1.04",
            "anthropic-ratelimit-unified-7d-reset": "soon", "anthropic-ratelimit-tokens-limit": "0",
            "anthropic-ratelimit-tokens-remaining": "0"}))
        self.chat()
        self.assertEqual([(limit["window"], limit["used"]) for limit in self.status()["limits"]], [("7d", 1.04)])

    def test_a_browser_gets_a_page_that_loads_nothing_from_elsewhere(self):
        answer = self.ask("GET", "/", headers={"accept": "text/html,application/xhtml+xml"})
        page = answer.raw.decode()
        self.assertTrue(answer.headers["content-type"].startswith("text/html"))
        self.assertIn("default-src 'none'", answer.headers["content-security-policy"])
        nonce = re.search(r"script-src 'nonce-([\w-]+)'", answer.headers["content-security-policy"]).group(1)
        self.assertIn('<script nonce="%s">' % nonce, page)
        self.assertNotIn("NONCE", page)
        self.assertEqual(re.findall(r"(?:src|href)=|https?://|@import", page), [])

    def test_with_a_client_key_the_numbers_need_it_and_the_page_does_not(self):
        self.start(api_key=("the-client-key",))
        self.assertEqual(self.ask("GET", "/", headers={"accept": "text/html"}).status, 200)
        self.assertEqual(set(self.status()), {"status", "version", "key_needed"})
        self.assertIn("tokens", self.status(authorization="Bearer the-client-key"))
        self.assertEqual(self.ask("GET", "/metrics").status, 401)
        self.assertEqual(self.ask("GET", "/metrics", headers={"x-api-key": "the-client-key"}).status, 200)

    def test_metrics_keep_to_prometheus_text_format(self):
        self.chat()
        answer = self.ask("GET", "/metrics")
        self.assertTrue(answer.headers["content-type"].startswith("text/plain; version=0.0.4"))
        families = {}
        for line in answer.raw.decode().splitlines():
            with self.subTest(line=line):
                if line.startswith("# TYPE"):
                    families[line.split()[2]] = line.split()[3]
                elif not line.startswith("#"):
                    match = re.match(r'([a-z_]+)(\{([a-z_]+="(\\.|[^"\\])*",?)*\})? -?[\d.e+-]+$', line)
                    self.assertTrue(match)
                    self.assertIn(match.group(1), families)
        self.assertEqual({kind for name, kind in families.items() if name.endswith("_total")}, {"counter"})
        self.assertIn('claude_gateway_requests_total{route="/chat/completions",status="200"} 1', answer.raw.decode())
        self.assertIn('claude_gateway_tokens_total{model="claude-sonnet-5-5",kind="output"} 7', answer.raw.decode())

    def test_no_secret_is_in_any_of_it(self):
        self.chat()
        for path in ("/", "/metrics"):
            self.assertNotIn(SECRET, self.ask("GET", path).raw.decode())

    def test_labels_are_bounded(self):
        for at in range(5):
            self.ask("GET", "/no/such/place/%d" % at)
        self.assertIn('route="other",status="404"} 5', self.ask("GET", "/metrics").raw.decode())


# ==== Commands of every day ===========================================================================

def run_command(*arguments, given=b"", **variables):
    """A command in a process of its own with a bare environment: (exit code, standard output, standard error)."""
    with tempfile.TemporaryDirectory() as home:
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT", "TEMP")}
        environment.update(HOME=home, PYTHONDONTWRITEBYTECODE="1", **variables)
        ended = subprocess.run([sys.executable, PROGRAM, *arguments], input=given, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment, cwd=home, timeout=60)
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


class DailyCommandTests(GatewayTestCase):
    def free_port(self) -> str:
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            return str(probe.getsockname()[1])

    def test_status_asks_the_running_gateway(self):
        self.start()
        self.chat()
        code, said, _ = run_command("status", "--port", str(self.service.port))
        self.assertEqual(code, 0)
        self.assertIn("is running.", said)
        self.assertIn("Requests:    1, 0 running", said)
        code, said, _ = run_command("status", "--json", CLAUDE_GATEWAY_PORT=str(self.service.port))
        self.assertEqual((code, json.loads(said)["requests"]["total"]), (0, 1))

    def test_doctor_finds_nothing_wrong_on_a_healthy_machine(self):
        self.claude.models = [{"id": "claude-haiku-5-5", "type": "model", "lifecycle": "active"}]
        code, said, _ = run_command("doctor", "--port", self.free_port(), "--live", ANTHROPIC_BASE_URL=self.claude.url,
                                    ANTHROPIC_API_KEY=SECRET)
        self.assertEqual(code, 0, said)
        for name in ("Python", "File", "Port", "Proxy", "Certificates", "DNS", "Upstream", "Clock", "Credential",
                     "Live call"):
            self.assertRegex(said, r"(?m)^ok +%s " % name)
        with open(PROGRAM, "rb") as file:
            self.assertIn(hashlib.sha256(file.read()).hexdigest(), said)
        self.assertIn("To paste into a bug report", said)
        self.assertNotIn(SECRET, said)

    def test_doctor_names_the_step_for_what_fails(self):
        taken = self.connect().getpeername()[1]     # the class's own gateway: told apart from a stranger
        with contextlib.closing(socket.socket()) as stranger:
            stranger.bind(("127.0.0.1", 0))
            stranger.listen(1)
            cases = (
                ({"ANTHROPIC_BASE_URL": self.claude.url}, ["--port", str(taken)], 3, "Credential", "login"),
                ({"ANTHROPIC_BASE_URL": "http://127.0.0.1:1", "ANTHROPIC_API_KEY": "k"}, ["--port", str(taken)], 5,
                 "Upstream", "Check the network"),
                ({"ANTHROPIC_BASE_URL": self.claude.url, "ANTHROPIC_API_KEY": "k"},
                 ["--port", str(stranger.getsockname()[1])], 4, "Port", "start --port"))
            for variables, arguments, wanted, name, step in cases:
                with self.subTest(name=name):
                    code, said, _ = run_command("doctor", "--json", *arguments, **variables)
                    finding = next(each for each in json.loads(said) if each["level"] == "failed")
                    self.assertEqual((code, finding["name"]), (wanted, name), said)
                    self.assertIn(step, finding["step"])

    def test_doctor_masks_the_proxys_credentials(self):
        code, said, _ = run_command("doctor", "--port", self.free_port(),
                                    HTTPS_PROXY="http://someone:proxy-password@127.0.0.1:1")
        self.assertIn("***@127.0.0.1:1", said)
        self.assertNotIn("proxy-password", said)

    def test_selftest_passes_without_network_and_credential(self):
        code, said, _ = run_command("selftest", HTTPS_PROXY="http://127.0.0.1:1")
        self.assertEqual((code, re.findall(r"(?m)^ok +(\w+)", said)),
                         (0, ["plain", "streaming", "tools", "image", "error", "cancel"]))

    def test_translate_shows_the_request_and_sends_nothing(self):
        chat = {"model": "gpt-4o", "seed": 1, "messages": [{"role": "user", "content": "Hi"}]}
        code, said, changes = run_command("translate", given=json.dumps(chat).encode())
        self.assertEqual((code, json.loads(said)["model"]), (0, "claude-sonnet-5-5"))
        self.assertIn("dropped seed", changes)
        code, said, _ = run_command("translate", given=b'{"model": "opus", "input": "Hi"}')
        self.assertEqual(json.loads(said)["messages"][0]["content"][0]["text"], "Hi")
        self.assertEqual(run_command("translate", given=b"{")[0], 1)
        self.assertEqual(run_command("translate", "/no/such/file")[0], 2)

    def test_translate_reads_a_saved_answer_backwards(self):
        whole = message(text("Hi"))
        for saved in (json.dumps(whole).encode(), json.dumps(whole, indent=2).encode(), sse(events_of(whole))):
            code, said, _ = run_command("translate", given=saved)
            self.assertEqual((code, json.loads(said)["choices"][0]["message"]["content"]), (0, "Hi"))

    def test_setup_prints_settings_for_every_tool_and_writes_nothing(self):
        for name in [*claude_gateway.TOOL_SETTINGS, *claude_gateway.SERVICE_FILES]:
            with self.subTest(name=name):
                said = claude_gateway.setup_text(name, Config(port=45999))
                for placeholder in ("BASE", "ORIGIN", "KEY", "MODEL", "PYTHON", "FILE"):
                    self.assertNotRegex(said, r"(?<![A-Z_-])%s(?![A-Z_-])" % placeholder)
                if name not in ("cursor", "systemd", "launchd", "windows", "docker"):
                    self.assertIn("45999", said)
        code, said, _ = run_command("setup", "codex", "--port", "45999")
        self.assertEqual(code, 0)
        self.assertIn('base_url = "http://localhost:45999/v1"', said)
        self.assertIn("cannot reach", claude_gateway.setup_text("cursor", Config()))

    def test_service_files_name_this_python_and_this_file(self):
        for name in ("systemd", "launchd", "windows"):
            said = claude_gateway.setup_text(name, Config())
            self.assertIn(os.path.abspath(claude_gateway.__file__), said)
        __import__("xml.dom.minidom").dom.minidom.parseString(claude_gateway.setup_text("launchd", Config()).split(
            "?>", 1)[1].split("-->", 1)[1].strip().split("\n", 1)[1])

    def test_completion_knows_every_command_and_option(self):
        for shell in ("bash", "zsh", "fish", "powershell"):
            with self.subTest(shell=shell):
                code, said, _ = run_command("completion", shell)
                self.assertEqual(code, 0)
                for name in claude_gateway.COMMANDS:
                    self.assertIn(name, said)
                for option in claude_gateway.OPTIONS:
                    self.assertIn(option.name, said)

    @unittest.skipUnless(shutil.which("bash"), "no bash here")
    def test_the_bash_completion_completes(self):
        script = run_command("completion", "bash")[1]
        ask = 'COMP_WORDS=(claude-gateway %s); COMP_CWORD=%d; _claude_gateway; echo "${COMPREPLY[@]}"\n'
        ended = subprocess.run(["bash", "-c", script + "\n" + ask % ("do", 1) + ask % ("start --log", 2)],
                               stdout=subprocess.PIPE, timeout=20)
        self.assertEqual(ended.stdout.decode().splitlines(), ["doctor", "--log-format"])

    def test_unknown_words_are_answered_with_the_nearest(self):
        for arguments, nearest in ((["stat"], "start"), (["start", "--prot", "1"], "--port"), (["docter"], "doctor"),
                                   (["setup", "open-webi"], "")):
            with self.subTest(arguments=arguments):
                code, _, said = run_command(*arguments)
                self.assertEqual(code, 2)
                self.assertIn("Did you mean %s?" % nearest if nearest else "invalid choice", said)

    def test_a_port_in_use_says_by_whom_and_what_to_do(self):
        code, _, said = run_command("start", "--port", str(self.service.port), ANTHROPIC_API_KEY="k")
        self.assertEqual(code, 4)
        self.assertIn("in use by another claude-gateway. Another one: claude-gateway start --port", said)


# ==== As a library ====================================================================================

class LibraryTests(GatewayTestCase):
    def test_requests_and_replies_translate_without_a_server(self):
        chat = {"messages": [{"role": "user", "content": "Hi"}], "seed": 5}
        translation = claude_gateway.messages_request_from_chat(chat, BUILT_IN_MODELS["claude-opus-5-5"])
        self.assertEqual(translation.request["model"], "claude-opus-5-5")
        self.assertEqual(translation.changes.header(), "dropped=seed")
        completion = claude_gateway.chat_completion_from_message(
            message(text("Hi")), {"id": "chatcmpl-1", "created": 1}, translation.plan)
        self.assertEqual(completion["choices"][0]["message"]["content"], "Hi")

    def test_arguments_are_left_as_they_were(self):
        chat = {"model": "opus", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": [
            {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}
        before = json.dumps(chat)
        claude_gateway.messages_request_from_chat(chat, BUILT_IN_MODELS["claude-opus-5-5"],
                                                  [claude_gateway.OAUTH_SYSTEM_BLOCK])
        self.assertEqual(json.dumps(chat), before)
        self.assertEqual(set(claude_gateway.OAUTH_SYSTEM_BLOCK), {"type", "text"})


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
                if "openai" not in block:
                    continue
                with self.subTest(block=block[:200]):
                    code = block.replace("http://localhost:45554/v1", self.service.url)
                    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, stdin=subprocess.DEVNULL,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
                    self.assertEqual(ended.returncode, 0, ended.stderr.decode())
                    self.assertIn("simulated", ended.stdout.decode())

    def test_the_library_example_runs_as_printed(self):
        block = next(block for block in readme_blocks("python") if "from claude_gateway import" in block)
        ended = subprocess.run([sys.executable, "-c", block], cwd=HERE, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        self.assertEqual((ended.returncode, ended.stderr.decode()), (0, ""))
        self.assertIn("dropped=seed", ended.stdout.decode())

    def test_the_tool_table_is_that_of_setup(self):
        rows = ["| %s | `%s` | %s |" % (tool.title, name, tool.where)
                for name, tool in claude_gateway.TOOL_SETTINGS.items()]
        table = README.split("<!-- tools -->")[1].split("<!-- /tools -->")[0].strip().split("\n")[2:]
        self.assertEqual(table, rows)

    def test_its_pictures_are_there(self):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
            self.assertTrue(os.path.isfile(os.path.join(HERE, picture)))

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
