"""Tests of claude_gateway.py: `python3 -m unittest`, with nothing installed.

They talk to the real server over real sockets.  Upstream stands a fake Claude that refuses what the real one
refuses, so a request that breaks a rule of the Messages API fails its test.  Where the `openai`
package is installed the same server is driven with it; where recorded traffic lies beside the project it is used.

First the fake Claude and the test cases that others build on; then tests in the order of the gateway's rooms, under
the same banners; then library, real SDK, recorded traffic, README and the file itself.

To add a test, go to its room and derive from `GatewayTestCase`, or from `RequestTestCase` for what a request becomes:

    def test_a_stop_sequence_that_was_met_ends_the_answer(self):
        self.claude.play(message(text("One"), stop_reason="stop_sequence"))     # the next answer of Claude
        answer = self.chat("Count", stop=["Two"])                               # over a real socket
        self.assertEqual(answer.json["choices"][0]["finish_reason"], "stop")    # what the client gets
        self.assertEqual(self.claude.messages[-1].body["stop_sequences"], ["Two"])      # what Claude was sent
"""
from __future__ import annotations

import ast
import atexit
import base64
import builtins
import collections
import contextlib
import errno
import functools
import gzip
import hashlib
import hmac
import http.client
import io
import json
import logging
import marshal
import math
import os
import pathlib
import plistlib
import re
import select
import shlex
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
import unittest
import urllib.error
import urllib.parse
import urllib.request
import zipapp
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat, takewhile
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

try:
    import resource
except ImportError:
    resource = None                                 # Windows

import claude_gateway
from claude_gateway import BUILT_IN_MODELS, Config, Gateway, Limits, Service

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "claude_gateway.py")
RECORDED = os.path.join(HERE, "..", "shared", "recorded")
SECRET = "sk-ant-api03-the-upstream-key"
PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")

# ==== The fake Claude =================================================================================
#
#   violations(request, headers)      every rule that a POST /v1/messages breaks, one sentence each
#   FakeClaude, FakeReply             a server on 127.0.0.1 that plays queued replies and keeps what it was sent
#   message, text, tool_use, ...      what Claude says; events_of and sse say it as a stream
#
# Shapes look at one value at a time, rules at how values go together; these are asked only about requests that
# have the right shape.

MIB = 1024 * 1024
OAUTH_BETA = "oauth-2025-04-20"

# ---- Claude's models ---------------------------------------------------------------------------------

ModelRules = collections.namedtuple("Model", "max_tokens images efforts thinking accepts")

# thinking: the accepted types, `*` = not with effort xhigh or max
# accepts:  sampling parameters, forced tool_choice, prefill, system messages in mid-conversation
FIVE, FOUR, THREE = "low medium high xhigh max", "low medium high max", "low medium high"
NEWEST = ModelRules(128000, 600, FIVE, "adaptive", "system")
MODELS = {
    "claude-fable-5-2":           NEWEST,
    "claude-mythos-5-2":          NEWEST,
    "claude-haiku-5-5":           ModelRules(128000, 600, FIVE, "adaptive disabled*", "forced system"),
    "claude-sonnet-5-5":          ModelRules(128000, 600, FIVE, "adaptive between_tools*", "system"),
    "claude-opus-5-5":            NEWEST,
    "claude-fable-5-1":           NEWEST,
    "claude-mythos-5-1":          NEWEST,
    "claude-opus-5":              ModelRules(128000, 600, FIVE, "adaptive disabled*", "forced system"),
    "claude-sonnet-5":            ModelRules(128000, 600, FIVE, "adaptive disabled", "forced"),
    "claude-fable-5":             ModelRules(128000, 600, FIVE, "adaptive", "forced system"),
    "claude-mythos-5":            ModelRules(128000, 600, FIVE, "adaptive", "forced system"),
    "claude-opus-4-8":            ModelRules(128000, 600, FIVE, "adaptive disabled", "forced system"),
    "claude-opus-4-7":            ModelRules(128000, 600, FIVE, "adaptive disabled", "forced"),
    "claude-sonnet-4-6":          ModelRules(128000, 600, FOUR, "adaptive enabled disabled", "sampling forced"),
    "claude-opus-4-6":            ModelRules(128000, 600, FOUR, "adaptive enabled disabled", "sampling forced"),
    "claude-opus-4-5-20251101":   ModelRules(64000, 100, THREE, "enabled disabled", "sampling forced prefill"),
    "claude-haiku-4-5-20251001":  ModelRules(64000, 100, "", "enabled disabled", "sampling forced prefill"),
    "claude-sonnet-4-5-20250929": ModelRules(64000, 100, "", "enabled disabled", "sampling forced prefill"),
}
MODELS.update({name[:-len("-20250929")]: MODELS[name] for name in list(MODELS) if re.search(r"-\d{8}$", name)})


# ---- Claude's shapes ---------------------------------------------------------------------------------
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


def word_of(*words: str):
    """One of these strings."""
    return limited(STRING, words.__contains__, f"Input should be one of {', '.join(words)}")


def matching(pattern: str):
    """A string that the pattern matches from end to end."""
    return limited(STRING, re.compile(pattern).fullmatch, f"String should match pattern '^{pattern}$'")


def array_of(inner):
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


def object_with(fields: dict):
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
    records = {name: object_with(dict(fields, **{tag + "!": STRING})) for name, fields in variants.items()}

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
CACHE = tagged({"ephemeral": {"ttl": word_of("5m", "1h")}})
CITATIONS = object_with({"enabled": BOOLEAN})
CALLER = map_of(STRING)

URL, FILE = {"url!": HTTPS}, {"file_id!": STRING}
IMAGE_SOURCE = limited(tagged({
    "base64": {"media_type!": word_of(*[name for name in MAGIC if name.startswith("image/")]), "data!": IMAGE_DATA},
    "url": URL, "file": FILE,
}), as_labelled, "Image does not match the provided media type")

TEXT = {"text": {"text!": FILLED, "cache_control?": CACHE, "citations?": array_of(OBJECT)}}
IMAGE = {"image": {"source!": IMAGE_SOURCE, "cache_control?": CACHE, "transformations?": ANYTHING}}
DOCUMENT_SOURCE = limited(tagged({
    "base64": {"media_type!": word_of("application/pdf"), "data!": BASE64},
    "text": {"media_type!": word_of("text/plain"), "data!": STRING},
    "content": {"content!": string_or(array_of(tagged({**TEXT, **IMAGE})))},
    "url": URL, "file": FILE,
}), as_labelled, "The PDF specified was not valid")
DOCUMENT = {"document": {"source!": DOCUMENT_SOURCE, "title?": STRING, "context?": STRING, "citations?": CITATIONS,
                         "cache_control?": CACHE}}
SEARCH_RESULT = {"search_result": {"source!": STRING, "title!": STRING, "content!": array_of(tagged(TEXT)),
                                   "citations?": CITATIONS, "cache_control?": CACHE}}
TOOL_REFERENCE = {"tool_reference": {"tool_name!": TOOL_NAME, "cache_control?": CACHE}}
UPLOAD = {"container_upload": {"file_id!": STRING, "cache_control?": CACHE}}

NESTED_BLOCKS = {**TEXT, **IMAGE, **DOCUMENT, **SEARCH_RESULT, **TOOL_REFERENCE}
USER_BLOCKS = {
    **TEXT, **IMAGE, **DOCUMENT, **SEARCH_RESULT, **UPLOAD,
    "tool_result": {"tool_use_id!": TOOL_ID, "content?": string_or(array_of(tagged(NESTED_BLOCKS))),
                    "is_error?": BOOLEAN, "cache_control?": CACHE},
}
SERVER_USES = ("server_tool_use", "mcp_tool_use")
SERVER_RESULTS = [name + "_tool_result" for name in (
    "web_search", "web_fetch", "code_execution", "bash_code_execution", "text_editor_code_execution", "tool_search",
    "advisor", "mcp")]
CALL_FIELDS = {"name!": TOOL_NAME, "input!": OBJECT, "caller?": CALLER, "cache_control?": CACHE}
ASSISTANT_BLOCKS = {
    **TEXT, **DOCUMENT, **UPLOAD,
    "thinking": {"thinking!": STRING, "signature!": limited(STRING, len, "Invalid `signature` in `thinking` block")},
    "redacted_thinking": {"data!": limited(STRING, lambda data: data and not data.startswith("gAAAA"),      # OpenAI's
                                           "Invalid `data` in `redacted_thinking` block")},
    "compaction": {"content?": limited(STRING, len, "empty"), "encrypted_content?": STRING, "signature?": STRING,
                   "tool_changes?": array_of(OBJECT), "cache_control?": CACHE},
    "tool_use": dict(CALL_FIELDS, **{"id!": TOOL_ID}),
    "server_tool_use": dict(CALL_FIELDS, **{"id!": matching("srvtoolu_[a-zA-Z0-9_]+")}),
    "mcp_tool_use": dict(CALL_FIELDS, **{"id!": TOOL_ID, "server_name!": STRING}),
    **{name: {"tool_use_id!": TOOL_ID, "content!": kind("result", dict, list, str), "caller?": CALLER,
              "is_error?": BOOLEAN, "cache_control?": CACHE} for name in SERVER_RESULTS},
}
MESSAGE = tagged({role: {"content!": string_or(array_of(tagged(blocks)))} for role, blocks in (
    ("user", USER_BLOCKS), ("assistant", ASSISTANT_BLOCKS), ("system", TEXT))}, tag="role")

# ---- Claude's schemas --------------------------------------------------------------------------------
# JSON Schema 2020-12: where a schema holds others, and what its other keywords must look like.

MAPS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
SINGLES = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
TYPE_NAME = word_of("object", "array", "string", "number", "integer", "boolean", "null")


def json_schema(value, path: str):
    """A schema that is well formed, all through."""
    if isinstance(value, bool):
        return
    yield from OBJECT(value, path)
    for keyword, member in value.items() if isinstance(value, dict) else ():
        yield from KEYWORDS.get(keyword, ANYTHING)(member, at(path, keyword))


UNIQUE_NAMES = limited(array_of(STRING), lambda names: len(set(names)) == len(names), "items should be unique")
KEYWORDS = {
    **dict.fromkeys(MAPS, map_of(json_schema)),
    **dict.fromkeys(LISTS, limited(array_of(json_schema), len, "List should have at least 1 item")),
    **dict.fromkeys(SINGLES, json_schema),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), NUMBER),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), NATURAL),
    **dict.fromkeys(("$ref", "$schema", "title", "description", "pattern", "format"), STRING),
    "type": string_or(limited(array_of(TYPE_NAME), len, "List should have at least 1 item"), TYPE_NAME),
    "enum": array_of(ANYTHING), "required": UNIQUE_NAMES, "uniqueItems": BOOLEAN,
}
PROPERTY_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}\Z")
AN_OBJECT = limited(json_schema, lambda schema: isinstance(schema, dict) and schema.get("type") == "object",
                    'type: Input should be "object"')
WELL_NAMED = limited(AN_OBJECT, lambda schema: all(map(PROPERTY_NAME.match, schema.get("properties", {}))),
                     "properties: Property keys should match pattern '^[a-zA-Z0-9_.-]{1,64}$'")
TOOL_SCHEMA = limited(WELL_NAMED, lambda schema: not {"oneOf", "allOf", "anyOf"} & set(schema),
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


# ---- Claude's requests -------------------------------------------------------------------------------

DOMAINS = {"allowed_domains?": array_of(STRING), "blocked_domains?": array_of(STRING)}
ON_ANY_TOOL = {"cache_control?": CACHE, "strict?": BOOLEAN, "defer_loading?": BOOLEAN,
               "allowed_callers?": array_of(STRING)}
WEB_SEARCH_SHAPE = {**ON_ANY_TOOL, **DOMAINS, "type!": STRING, "name!": word_of("web_search"), "max_uses?": INTEGER,
                   "user_location?": tagged({"approximate": {"city?": STRING, "region?": STRING, "country?": STRING,
                                                             "timezone?": STRING}})}
WEB_FETCH_SHAPE = {**ON_ANY_TOOL, **DOMAINS, "type!": STRING, "name!": word_of("web_fetch"), "max_uses?": INTEGER,
                  "citations?": CITATIONS, "max_content_tokens?": INTEGER, "use_cache?": BOOLEAN}
TOOLS = {                                               # pattern of the type -> shape of the tool
    r"custom": object_with({
        **ON_ANY_TOOL, "name!": TOOL_NAME, "description?": STRING, "input_schema!": TOOL_SCHEMA, "type?": STRING,
        "eager_input_streaming?": BOOLEAN, "input_examples?": array_of(OBJECT)}),
    r"web_search_(20250305|20260209)": object_with(WEB_SEARCH_SHAPE),
    r"web_search_20260318": object_with({**WEB_SEARCH_SHAPE, "response_inclusion?": STRING}),
    r"web_fetch_(20250910|20260209|20260309|20260318)": object_with(WEB_FETCH_SHAPE),
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
DISPLAY = {"display?": word_of("summarized", "omitted", "updates")}
BETAS = {"compaction": "compact-2026-09-04", "fallbacks": "server-side-fallback-2026-07-01"}
BETA_FIELDS = ("context_management", "mcp_servers", "fallbacks", "fallback_credit_token", "compaction", "thread",
               "billing_policy", "output_format", "thinking.block_binding", "output_config.task_budget")
REQUEST = object_with({
    "model!": STRING, "max_tokens!": INTEGER, "stream": BOOLEAN,
    "messages!": limited(array_of(MESSAGE), len, "at least one message is required"),
    "system": limited(string_or(array_of(tagged(TEXT)), FILLED), len, "leave it out when it is empty"),
    "stop_sequences": array_of(limited(STRING, str.strip, "each stop sequence must contain non-whitespace")),
    "temperature": UNIT, "top_p": UNIT, "top_k": NATURAL,
    "tools": array_of(tool),
    "tool_choice": tagged({"auto": PARALLEL, "any": PARALLEL, "tool": {"name!": TOOL_NAME, **PARALLEL}, "none": {}}),
    "thinking": tagged({"adaptive": {**DISPLAY, "block_binding?": OBJECT}, "disabled": {}, "between_tools": {},
                        "enabled": {"budget_tokens!": INTEGER, **DISPLAY}}),
    "output_config": object_with({"effort?": word_of(*FIVE.split()), "task_budget?": OBJECT,
                                  "format?": tagged({"json_schema": {
                                      "schema!": limited(json_schema, bool, "empty")}})}),
    "metadata": object_with({"user_id?": limited(STRING, lambda text: len(text) <= 256,
                                                 "String should have at most 256 characters")}),
    "service_tier": word_of("auto", "standard_only"), "speed": word_of("standard", "fast"),
    "cache_control?": CACHE, "inference_geo?": STRING, "container?": kind("container", str, dict),
    "diagnostics?": object_with({"previous_message_id?": STRING}),
    **{name: ANYTHING for name in BETA_FIELDS if "." not in name},
    "compaction": tagged({"summarize": {"instructions?": STRING}}),
    "fallbacks": string_or(limited(array_of(object_with({"model!": STRING})), len, "empty"), word_of("default")),
})


# ---- Claude's rules ----------------------------------------------------------------------------------
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
        # a paused turn is handed back, not prefilled; a summary may be wanted of any end
        prefill=messages[-1]["role"] == "assistant" and not paused and "compaction" not in request)


def limit_rules(asked):
    """Numbers, and fields that only a beta header opens."""
    request, model = asked.request, asked.model
    images = sum(block["type"] == "image" for _, block in asked.blocks)
    yield from broken({
        f"max_tokens: {request['max_tokens']} is not between 1 and {model.max_tokens}, which is the maximum allowed "
        f"number of output tokens for {request['model']}":
            not (0 if warms_the_cache(asked) else 1) <= request["max_tokens"] <= model.max_tokens,
        "messages: List should have at most 100000 items": len(asked.messages) > 100000,
        f"messages: {images} images are more than the {model.images} allowed": images > model.images,
        "thinking.display: updates needs a beta header": asked.thinking.get("display") == "updates" and not asked.betas,
    })
    for name in BETA_FIELDS:
        parent, _, last = name.rpartition(".")
        missing = BETAS[name] not in asked.betas if name in BETAS else not asked.betas
        if missing and last in (request.get(parent, {}) if parent else request):
            yield f"{name}: Extra inputs are not permitted"


def warms_the_cache(asked) -> bool:
    """Whether a request may have no output at all."""
    return not (asked.request.get("stream") or asked.format or asked.forced or asked.manual)


def signature_of(summary: str, model: str) -> str:
    """What the fake signs a summary with: it holds for one line of models."""
    return hashlib.sha256((summary + model.split("-")[1]).encode()).hexdigest()


def compactions(asked):
    """The block of a compaction: one, alone, in front, as it was given out; the beta header with each request."""
    request, blocks = asked.request, [(path, block) for path, block in asked.blocks if block["type"] == "compaction"]
    yield from broken({
        "compaction: This model does not support compaction.":
            ("compaction" in request or blocks) and "prefill" in asked.model.accepts,
        "compaction: cannot be combined with context_management": {"compaction", "context_management"} <= set(request),
        "messages: compaction blocks need a beta header": blocks and BETAS["compaction"] not in asked.betas,
        "compaction_block_ambiguous": sum(bool(block.get("content")) for _, block in blocks) > 1,
        "compaction_block_misplaced": any(path != "messages.0.content.0" for path, _ in blocks)
        or blocks and len(blocks_of(asked.messages[0])) > 1,
        "compaction_block_signature_invalid": any(
            block.get("signature") != signature_of(block["content"], request["model"])
            for _, block in blocks if block.get("content")),
        "compaction_nothing_to_summarize": "compaction" in request and blocks and len(asked.messages) == 1,
    })


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
    failed = [block for _, block in asked.blocks if block["type"] == "tool_result" and block.get("is_error")]
    yield from broken({
        "messages: all content must be type 'text' if 'is_error' is true":
            any(inner["type"] != "text" for block in failed for inner in block.get("content", ())
                if isinstance(inner, dict)),
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
    if asked.messages[0]["role"] != "user" and blocks_of(asked.messages[0])[0]["type"] != "compaction":
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


RULES = (limit_rules, sampling, thinking_rules, tool_rules, structured_output, contents, order_of_roles, tool_pairs,
         tool_ids, thinking_first, cache_rules, compactions)


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


# ---- Claude's messages and events --------------------------------------------------------------------

USUAL_USAGE = {"input_tokens": 12, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 7}
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
                 "stop_details": None, "usage": dict(USUAL_USAGE, **usage or {})}, **fields)


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


def compaction_deltas(block: dict, size: int):
    """A summary: nothing at first, then the whole of it."""
    yield dict(block, content=None)
    yield {"type": "compaction_delta", "content": block["content"]}


def compaction(summary: str, model: str = MODEL) -> dict:
    """A summary that the fake has signed."""
    return {"type": "compaction", "content": summary, "signature": signature_of(summary, model)}


def compacted(summary: str, model: str = MODEL) -> dict:
    """The answer to a request for a summary; its totals leave out what that took."""
    return message(compaction(summary, model), stop_reason="compaction", model=model, usage={
        "input_tokens": 0, "output_tokens": 0, "iterations": [
            {"type": "compaction", "model": model, "input_tokens": 900, "output_tokens": 40}]})


DELTAS = {"compaction": compaction_deltas, "text": text_deltas,
          "thinking": thinking_deltas, "tool_use": input_deltas, "server_tool_use": input_deltas,
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


# ---- Claude's server ---------------------------------------------------------------------------------

@dataclass
class FakeReply:
    """An answer down to its bytes.  Without `pieces` it is `body` with a Content-Length."""
    status: int | None = 200                            # None: hang up without a status line
    headers: dict = field(default_factory=dict)         # laid over ours; None leaves a header out
    body: bytes | dict = b""                            # a dict goes out as JSON
    pieces: list = field(default_factory=list)          # bytes, seconds to pause, or Events to wait for
    chunked: bool = True                                # pieces only; False: the end of the connection is the end
    cut: bool = False                                   # reset the connection where the end should be
    hold: list = field(default_factory=list)            # seconds or Events before the status line


@dataclass
class SentRequest:
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


class FakeHandler(BaseHTTPRequestHandler):
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
        recorded = SentRequest(self.command, self.path, headers, raw, parsed(raw))
        self.fake.requests.append(recorded)
        try:
            self._send(self.fake.reply_to(recorded))
        except (PeerGone, ConnectionError):
            self.close_connection = True
            self.fake.closed.set()

    do_GET = do_DELETE = do_PUT = do_POST

    def _send(self, reply: FakeReply) -> None:
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

    def _send_head(self, reply: FakeReply, length: int) -> None:
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

    def _send_piece(self, reply: FakeReply, piece) -> None:
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


class FakeServer(ThreadingHTTPServer):
    """Threads that nobody waits for, and no word about connections that break."""
    daemon_threads = True
    request_queue_size = 1024                           # at 128 a burst of 500 waits seconds for lost SYNs

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class FakeClaude:
    """Claude's place on the network.  A refused request does not use up a queued reply."""

    def __init__(self) -> None:
        self.strict = True                              # False: requests may break rules
        self.requests: list[SentRequest] = []
        self.violations: list[str] = []
        self.models: list[dict] | None = None           # None: no such endpoint
        self.token_replies: list = []
        self.input_tokens = 11                          # what count_tokens says
        self.identity_linked = False                    # keys are, so that calls must name a workspace
        self.revoked: set = set()                       # bearer tokens and keys
        self.closed, self.stopped = threading.Event(), threading.Event()
        self.connections: set = set()
        self._replies: list = []

    def __enter__(self) -> FakeClaude:
        self._server = FakeServer(("127.0.0.1", 0), FakeHandler)
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
        for records in (self.requests, self.violations, self.token_replies, self._replies, self.revoked):
            records.clear()
        self.models, self.identity_linked = None, False
        self.closed.clear()

    @property
    def messages(self) -> list[SentRequest]:
        """The requests to /v1/messages."""
        return [request for request in self.requests if urlsplit(request.path).path == "/v1/messages"]

    def play(self, *replies) -> None:
        """Queue replies for the next messages: a message, a FakeReply, or a function of the recorded request."""
        self._replies.extend(replies)

    def wait_closed(self, timeout: float) -> bool:
        """Whether, in this time, the gateway closes a connection whose reply has not ended."""
        return self.closed.wait(timeout)

    def reply_to(self, recorded: SentRequest) -> FakeReply:
        """What to say to a request."""
        path = urlsplit(recorded.path).path
        for method, pattern, answer in self._ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == recorded.method:
                return answer(self, recorded, *match.groups())
        return FakeReply(404, body=error_body("not_found_error", f"Not found: {path}"))

    def _refusal(self, recorded: SentRequest) -> FakeReply | None:
        """What Claude says against the credential or its workspace."""
        headers = recorded.headers
        if {headers.get("x-api-key"), headers.get("authorization", "").replace("Bearer ", "")} & self.revoked:
            return FakeReply(401, body=error_body("authentication_error", "Invalid bearer token"
                                                  if "authorization" in headers else "invalid x-api-key"))
        workspace = headers.get("anthropic-workspace-id")
        message = "" if workspace is None or workspace.startswith("wrkspc_") else \
            "anthropic-workspace-id header must be a valid workspace ID"
        if self.identity_linked and workspace is None:
            message = ("anthropic-workspace-id is required when authenticating with an identity-linked API key; send "
                       "the id of the workspace this request acts in.")
        return FakeReply(400, body=error_body("invalid_request_error", message)) if message else None

    def _message(self, recorded: SentRequest) -> FakeReply:
        """The next reply in the queue, if the request is flawless."""
        refusal = self._refusal(recorded)
        if refusal:
            return refusal
        if len(recorded.raw) > 32 * MIB:
            return FakeReply(413, body=error_body("request_too_large", "Request exceeds the maximum size"))
        asked = recorded.body or {}
        found = violations(asked, recorded.headers) if self.strict else []
        self.violations.extend(found)
        if found:
            return FakeReply(400, body=error_body("invalid_request_error", found[0]))
        model = asked.get("model", MODEL)
        usual = message(text("Hello!"), model=model)
        if "compaction" in asked:
            usual = compacted(f"{len(asked['messages'])} messages before this.", model)
        elif asked.get("max_tokens") == 0:
            usual = message(stop_reason="max_tokens", model=model)
        reply = self._next(self._replies, recorded) or usual
        if isinstance(reply, dict) and asked.get("stream"):
            return FakeReply(pieces=[sse([event]) for event in events_of(reply)])
        return reply if isinstance(reply, FakeReply) else FakeReply(body=reply)

    @staticmethod
    def _next(queue: list, recorded: SentRequest):
        """The next reply of a queue, or None; functions are asked for theirs."""
        try:
            reply = queue.pop(0)
        except IndexError:
            return None
        while callable(reply):
            reply = reply(recorded)
        return reply

    def _count(self, recorded: SentRequest) -> FakeReply:
        """As many tokens as the test likes."""
        return FakeReply(body={"input_tokens": self.input_tokens})

    def _token(self, recorded: SentRequest) -> FakeReply:
        """The next token reply, or a refusal in OAuth's shape."""
        reply = self._next(self.token_replies, recorded) or FakeReply(400, body={
            "error": "invalid_grant", "error_description": "Refresh token not found or invalid"})
        return reply if isinstance(reply, FakeReply) else FakeReply(body=reply)

    def _model_list(self, recorded: SentRequest) -> FakeReply:
        """One page of the models."""
        refusal = self._refusal(recorded)
        if refusal:
            return refusal
        if self.models is None:
            return FakeReply(404, body=error_body("not_found_error", "Not found"))
        query = parse_qs(urlsplit(recorded.path).query)
        ids = [model["id"] for model in self.models]
        start = ids.index(query["after_id"][0]) + 1 if query.get("after_id", [""])[0] in ids else 0
        end = start + int(query.get("limit", ["20"])[0])
        page = self.models[start:end]
        return FakeReply(body={"data": page, "has_more": end < len(ids), "first_id": page[0]["id"] if page else None,
                               "last_id": page[-1]["id"] if page else None})

    def _model(self, recorded: SentRequest, name: str) -> FakeReply:
        """One model."""
        found = [model for model in self.models or [] if model["id"] == name]
        missing = FakeReply(404, body=error_body("not_found_error", f"model: {name}"))
        return FakeReply(body=found[0]) if found else missing

    _ROUTES = (
        ("POST", r"/v1/messages", _message),
        ("POST", r"/v1/messages/count_tokens", _count),
        ("POST", r".*/oauth/token", _token),
        ("GET", r"/v1/models", _model_list),
        ("GET", r"/v1/models/(.+)", _model),
    )


# ==== The test case ===================================================================================

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
        self.claude.strict = True

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


ALL_MODELS = list(BUILT_IN_MODELS)
OLD_MODELS = ("claude-opus-4-5-20251101", "claude-haiku-4-5-20251001", "claude-sonnet-4-5-20250929")


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


def without_keys(mapping: dict, *names: str) -> dict:
    return {name: value for name, value in mapping.items() if name not in names}


def said(role: str, *words: str) -> dict:
    """A message of the Messages API that holds these texts."""
    return {"role": role, "content": [text(each) for each in words]}


ASKED = user("Hi")
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def one_by_one(*events: dict, **reply) -> FakeReply:
    """An event stream that arrives event by event."""
    return FakeReply(pieces=[sse([event]) for event in events], **reply)


def refusal_of_claude(status: int, kind: str, words: str, headers=None, **details) -> FakeReply:
    """A refusal that names no reason to wait."""
    body = error_body(kind, words)
    if details:
        body["error"]["details"] = details
    return FakeReply(status, body=body, headers=dict({"retry-after": "60"}, **(headers or {})))


POSIX_ONLY = unittest.skipUnless(os.name == "posix", "file modes, symlinks, shells and terminals of POSIX")
CHAT_BODY = b'{"model":"claude-sonnet-5-5","messages":[{"role":"user","content":"Hello"}]}'
NEXT_REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
NO_RETRY = {"x-stainless-retry-count": "1"}             # the client retries by itself, so the gateway does not


def request_bytes(line: str, *headers, body: bytes = b"") -> bytes:
    """A request as it goes over the wire; headers are strings, or bytes for what no string should hold."""
    lines = [line.encode("latin-1")] + [head if isinstance(head, bytes) else head.encode("latin-1")
                                        for head in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chat_bytes(*headers, body: bytes = CHAT_BODY, version: str = "1.1") -> bytes:
    """A chat request with a Content-Length."""
    return request_bytes("POST /v1/chat/completions HTTP/" + version, "Host: localhost",
                         "Content-Length: %d" % len(body), *headers, body=body)


def in_chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces + (b"",))


def chunks_in(data: bytes):
    """The chunks of a chunked body, and the bytes behind it."""
    chunks = []
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        assert data[length:length + 2] == b"\r\n", data[:200]
        chunk, data = data[:length], data[length + 2:]
        if not length:
            return chunks, data
        chunks.append(chunk)


def answers_in(data: bytes, without_body=()) -> list:
    """Every answer in what came over a connection; `without_body`: positions of the answers to HEAD."""
    answers: list = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end and head.startswith(b"HTTP/1.1 "), "not an answer: %r" % head[:200]
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers: dict = {}
        for line in lines:
            name, _, value = line.partition(": ")
            assert name not in headers, "the header %s came twice" % name
            headers[name.lower()] = value
        status, body = int(status_line.split(" ")[1]), b""
        if status not in (100, 204) and len(answers) not in without_body:
            if headers.get("transfer-encoding") == "chunked":
                chunks, data = chunks_in(data)
                body = b"".join(chunks)
            else:
                length = int(headers.get("content-length", len(data)))
                assert len(data) >= length, "a body is cut short"
                body, data = data[:length], data[length:]
        answers.append(Answer(status, headers, body))
    return answers


def received_until(connection: socket.socket, mark: bytes) -> bytes:
    """What arrives, up to and including the mark; less if the other side ends the connection."""
    received = b""
    while mark not in received:
        piece = connection.recv(65_536)
        if not piece:
            break
        received += piece
    return received


def eventually(condition, seconds: float = 30) -> bool:
    """Whether the condition comes true in time; for what announces itself by no event."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


class HttpTestCase(GatewayTestCase):
    def exchanged(self, data: bytes, without_body=(), ends: bool = False) -> list:
        """The answers to these bytes; the gateway has to close the connection (`ends`: we stop sending first)."""
        connection = self.connect()
        connection.settimeout(30)
        received, self.was_reset = b"", False
        try:
            connection.sendall(data)
            if ends:
                connection.shutdown(socket.SHUT_WR)
        except ConnectionError:
            self.was_reset = True
        try:
            piece = connection.recv(65_536)
            while piece:
                received += piece
                piece = connection.recv(65_536)
        except ConnectionError:
            self.was_reset = True
        self.connection = connection
        return answers_in(received, without_body)

    def assert_refused(self, data: bytes, *statuses: int) -> Answer:
        """One answer with one of these statuses in OpenAI's envelope, then the end, whatever else was sent."""
        answers = self.exchanged(data + NEXT_REQUEST)
        self.assertEqual(len(answers), 1, [answer.raw for answer in answers])
        answer = answers[0]
        self.assertIn(answer.status, statuses)
        self.assert_envelope(answer)
        self.assertEqual(answer.headers["connection"], "close")
        self.assertEqual(self.claude.messages, [])
        return answer

    def assert_not_reset(self) -> None:
        """A reset behind an answer would make many a client throw the answer away."""
        self.assertFalse(self.was_reset or eventually(
            lambda: self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), 0.1))

    def assert_envelope(self, answer: Answer) -> None:
        self.assertEqual(set(answer.json), {"error"})
        self.assertEqual(set(answer.error), {"message", "type", "param", "code"})
        self.assertTrue(answer.error["message"])
        self.assertNotIn("Traceback", answer.raw.decode())
        self.assertEqual(answer.headers["content-type"], "application/json")

    def held_chat(self, **fields):
        """A request that waits at Claude: the client's connection, and the event that lets Claude answer."""
        arrived, release = threading.Event(), threading.Event()
        self.addCleanup(release.set)
        reply = FakeReply(pieces=[sse(events_of(message(text("Hello!"))))], hold=[release])
        self.claude.play(lambda recorded: arrived.set() or reply)
        connection = self.connect()
        connection.sendall(chat_bytes(body=json.dumps(dict(json.loads(CHAT_BODY.decode()), **fields)).encode()))
        self.assertTrue(arrived.wait(30))
        return connection, release


@functools.lru_cache(None)
def shared_folder() -> str:
    """For files between this process and its children, until this one ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, True)
    return folder


@functools.lru_cache(None)
def imported() -> str:
    """What a child runs first.  The compiled program is kept: compiling takes longer than most of what children do."""
    path = os.path.join(shared_folder(), "program")
    code = compile(pathlib.Path(PROGRAM).read_bytes(), PROGRAM, "exec", dont_inherit=True)
    pathlib.Path(path).write_bytes(marshal.dumps(code))
    return ("import sys; sys.path[0] = %r; import marshal, types\n"
            "claude_gateway = sys.modules['claude_gateway'] = types.ModuleType('claude_gateway')\n"
            "claude_gateway.__file__ = %r\n"
            "with open(%r, 'rb') as file: exec(marshal.load(file), vars(claude_gateway))\n" % (HERE, PROGRAM, path))


# ==== The rooms of the gateway ======================================================================

# ---- Configuration -----------------------------------------------------------------------------------

def config_of(*arguments: str, **variables: str) -> Config:
    """What `start` makes of flags and variables."""
    return claude_gateway.config_from(claude_gateway.argument_parser().parse_args(["start"] + list(arguments)),
                                      dict({"HOME": "/home/me", "APPDATA": "C:\\Users\\me"}, **variables))


class ConfigTests(unittest.TestCase):
    def test_a_proxys_password_is_known_for_redaction_also_without_a_scheme(self):
        for address in ("http://me:planted@proxy.example:8080", "me:planted@proxy.example:8080"):
            self.assertIn("planted", Config(https_proxy=address).secrets())

    def test_a_config_does_not_show_its_secrets(self):
        shown = repr(config_of(ANTHROPIC_API_KEY="secret-1", ANTHROPIC_AUTH_TOKEN="secret-2",
                               CLAUDE_CODE_OAUTH_TOKEN="secret-3", CLAUDE_GATEWAY_API_KEY="secret-4",
                               HTTPS_PROXY="http://user:secret-5@proxy:1"))
        self.assertNotIn("secret", shown)


# ---- Errors ------------------------------------------------------------------------------------------

class ClaudeErrorTests(GatewayTestCase):
    """Refusals of Claude in OpenAI's envelope, in the provider's words."""

    def refused(self, reply: FakeReply, **fields) -> Answer:
        count = len(self.claude.messages)
        self.claude.play(reply)
        answer = self.chat(**fields)
        self.assertEqual(len(self.claude.messages), count + 1, "refused once, asked once")
        self.assertEqual(sorted(answer.error), ["code", "message", "param", "type"])
        return answer

    def test_an_error_that_repeats_the_key_reaches_nobody_with_it(self):
        for ask in (self.chat, lambda **headers: self.ask("POST", "/v1/messages", {
                "model": "opus", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}, **headers)):
            self.claude.play(FakeReply(403, body=error_body("permission_error", "The key %s may not." % SECRET)))
            answer = ask(headers=NO_RETRY)
            self.assertEqual(answer.error["message"], "The key *** may not.")

    def test_every_status_has_its_place(self):
        for status, kind, ours, our_kind in (
            (404, "not_found_error", 404, "invalid_request_error"), (409, "conflict_error", 409, "server_error"),
            (500, "api_error", 500, "server_error"), (501, "api_error", 501, "server_error"),
            (503, "api_error", 503, "server_error"), (503, "overloaded_error", 503, "server_error"),
            (418, "new_error", 418, None), (520, "new_error", 520, "server_error"),
            (422, "invalid_request_error", 400, "invalid_request_error"),
        ):
            for stream in (False, True):
                with self.subTest(status=status, kind=kind, stream=stream):
                    answer = self.refused(refusal_of_claude(status, kind, "No."), stream=stream)
                    self.assertEqual(answer.status, ours)
                    self.assertEqual(answer.error["type"], our_kind or answer.error["type"])
                    self.assertEqual(answer.headers["content-type"], "application/json")

    def test_a_status_without_claudes_words_says_what_it_can(self):
        page = b"<html><body>" + b"x" * 5000
        for status, ours, code in ((400, 400, None), (401, 401, "upstream_authentication"), (403, 403, None),
                                   (404, 404, None), (408, 504, "timeout"), (413, 413, "request_too_large"),
                                   (429, 429, "rate_limit_exceeded"), (500, 500, None), (502, 502, None),
                                   (503, 503, None), (504, 504, "timeout"), (529, 503, "overloaded")):
            for body in (page, b"", b"[]", b'{"error": "x"}', b'{"error": {"message": null}}'):
                with self.subTest(status=status, body=body[:20]):
                    answer = self.refused(FakeReply(status, {"content-type": "text/html", "retry-after": "60"}, body))
                    self.assertEqual((answer.status, answer.error["code"]), (ours, code))
                    self.assertNotIn("<html", answer.error["message"])
                    self.assertIn(str(status), answer.error["message"])

    # the rejections of subscription tokens, as people reported them: words, our status, our code
    REJECTIONS = (
        (400, "invalid_request_error", "This credential is only authorized for use with Claude Code and cannot be used "
         "for other API requests.", 400, "upstream_refused"),
        (400, "invalid_request_error", "system: This credential is only authorized for use with Claude Code and cannot "
         "be used for other API requests.", 400, "upstream_refused"),
        (400, "invalid_request_error", "Third-party apps now draw from your extra usage, not your plan limits. Add "
         "more at claude.ai/settings/usage and keep going.", 429, "insufficient_quota"),
        (400, "invalid_request_error", "You're out of extra usage. Add more at claude.ai/settings/usage and keep "
         "going.", 429, "insufficient_quota"),
        (401, "authentication_error", "OAuth authentication is currently not supported.", 401,
         "upstream_authentication"),
        (401, "authentication_error", "OAuth token has expired. Please obtain a new token or refresh your existing "
         "token.", 401, "upstream_authentication"),
        (401, "authentication_error", "Invalid bearer token", 401, "upstream_authentication"),
        (403, "permission_error", "OAuth token has been revoked. Please obtain a new token.", 401,
         "upstream_authentication"),
    )

    def test_rejected_credentials_are_told_in_the_providers_words_with_one_hint_and_not_retried(self):
        image = [{"type": "image_url", "image_url": {"url": "https://images.example.org/a.png"}}]
        for status, kind, words, ours, code in self.REJECTIONS:
            for stream, content in ((False, "Hello"), (True, "Hello"), (False, image)):
                with self.subTest(words=words, stream=stream):
                    answer = self.refused(refusal_of_claude(status, kind, words), stream=stream, content=content)
                    self.assertEqual((answer.status, answer.error["code"]), (ours, code))
                    self.assertEqual(answer.headers["x-should-retry"], "false")
                    self.assertIn(words.rstrip(".") + ". Hint: ", answer.error["message"])
                    self.assertEqual(answer.error["message"].count("Hint:"), 1)

    def test_the_rarer_rejections_have_their_hint_too(self):
        for reply in (
            refusal_of_claude(403, "permission_error", "OAuth token does not meet scope requirement: user:profile"),
            refusal_of_claude(400, "invalid_request_error", "Please update.", error_code="claude_code_version_too_old"),
            refusal_of_claude(429, "rate_limit_error", "This request would exceed your account's rate limit. Please "
                              "try again later.", {"anthropic-ratelimit-unified-status": "rejected"}),
        ):
            words = reply.body["error"]["message"]
            with self.subTest(words=words):
                answer = self.refused(reply)
                self.assertIn(words.rstrip(".") + ". Hint: ", answer.error["message"])
                self.assertEqual(answer.headers.get("x-should-retry"), "false")

    def test_a_rejection_amid_a_stream_has_the_same_words(self):
        words = self.REJECTIONS[3][2]
        self.claude.play(one_by_one(error_body("invalid_request_error", words)))
        error = json.loads(self.chat(stream=True).events[-1])["error"]
        self.assertEqual(error["code"], "insufficient_quota")
        self.assertIn(words.rstrip(".") + ". Hint: ", error["message"])

    def test_spent_money_is_no_reason_to_retry(self):
        for status, kind, words in (
            (400, "invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
            (400, "invalid_request_error", "You have reached your specified API usage limits. You will regain access "
                                           "on 2026-12-01 at 00:00 UTC."),
            (402, "billing_error", "Payment required."),
            (429, "rate_limit_error", "Extra usage is required for long context requests."),
        ):
            with self.subTest(words=words):
                answer = self.refused(refusal_of_claude(status, kind, words, {"retry-after": "1"}))
                self.assertEqual((answer.status, answer.error["type"], answer.error["code"],
                                  answer.headers["x-should-retry"]),
                                 (429, "insufficient_quota", "insufficient_quota", "false"))

    def test_an_ordinary_refusal_leaves_retrying_to_the_client(self):
        for status, kind in ((429, "rate_limit_error"), (529, "overloaded_error"), (500, "api_error")):
            headers = self.refused(refusal_of_claude(status, kind, "No.")).headers
            self.assertEqual((headers.get("x-should-retry"), headers["retry-after"]), (None, "60"))

    def test_a_prompt_that_is_too_long_is_told_as_such(self):
        for words in ("prompt is too long: 1250000 tokens > 1000000 maximum",
                      "input length and `max_tokens` exceed context limit: 190000 + 64000 > 200000"):
            for stream in (False, True):
                answer = self.refused(refusal_of_claude(400, "invalid_request_error", words), stream=stream)
                self.assertEqual((answer.status, answer.error["type"], answer.error["code"], answer.error["message"]),
                                 (400, "invalid_request_error", "context_length_exceeded", words))

    def test_a_model_that_claude_lacks_comes_with_the_nearest(self):
        for stream in (False, True):
            answer = self.refused(refusal_of_claude(404, "not_found_error", "model: claude-opus-5-5"), stream=stream,
                                  model="claude-opus-5-5")
            self.assertEqual((answer.status, answer.error["code"], answer.error["param"]),
                             (404, "model_not_found", "model"))
            self.assertIn("claude-opus-5", answer.error["message"])
        answer = self.chat(model="claude-opus-3")
        self.assertEqual((answer.status, answer.error["code"]), (404, "model_not_found"))
        self.assertRegex(answer.error["message"], r"claude-opus-5-5.*--alias '\*=MODEL'")

    def test_an_error_about_a_tool_names_it_as_the_client_does(self):
        tools = [{"type": "function", "function": {"name": name}} for name in ("first", "my.second")]
        for words in ("tools.1.custom.input_schema: invalid", "tools.1.input_schema.type: Field required"):
            answer = self.refused(refusal_of_claude(400, "invalid_request_error", words), tools=tools)
            self.assertIn("my.second", answer.error["message"])
            self.assertIn(words, answer.error["message"])
        answer = self.refused(refusal_of_claude(400, "invalid_request_error", "tools.9.name: odd"), tools=tools)
        self.assertEqual(answer.error["message"], "tools.9.name: odd")

    def test_headers_of_a_refusal_are_passed_on(self):
        headers = {"request-id": "req_1", "retry-after": "7", "retry-after-ms": "7000", "x-should-retry": "true",
                   "anthropic-ratelimit-requests-limit": "50", "anthropic-ratelimit-requests-remaining": "0",
                   "anthropic-ratelimit-tokens-limit": "1000", "anthropic-ratelimit-tokens-remaining": "10",
                   "anthropic-ratelimit-tokens-reset": "2020-01-01T00:00:00Z", "set-cookie": "a=b",
                   "anthropic-organization-id": "org"}
        told = self.refused(refusal_of_claude(429, "rate_limit_error", "No.", headers)).headers
        wanted = {"x-request-id": "req_1", "retry-after": "7", "retry-after-ms": "7000", "x-should-retry": "true",
                  "x-ratelimit-limit-requests": "50", "x-ratelimit-remaining-requests": "0",
                  "x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "10",
                  "x-ratelimit-reset-tokens": "0s"}
        self.assertEqual({name: told.get(name) for name in wanted}, wanted)
        for name in ("set-cookie", "anthropic-organization-id"):
            self.assertNotIn(name, told)

    def test_headers_of_an_answer_are_passed_on_in_streams_too(self):
        headers = {"request-id": "req_2", "anthropic-ratelimit-requests-remaining": "3"}
        for stream in (False, True):
            whole = message(text("Hi"))
            self.claude.play(one_by_one(*events_of(whole), headers=headers))
            told = self.chat(stream=stream).headers
            self.assertEqual((told["x-request-id"], told["x-ratelimit-remaining-requests"]), ("req_2", "3"))

    def test_resets_are_told_as_a_time_from_now(self):
        for seconds, form in ((0, r"0s"), (45, r"(3\d|4[0-6])s"), (90, r"1m([12]\d|3[01])s"), (7200, r"1(19|20)m\d+s")):
            moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
            for suffix in (moment, moment[:-1] + ".123456+00:00"):
                told = claude_gateway.headers_from_claude({"anthropic-ratelimit-requests-reset": suffix})
                self.assertRegex(told["x-ratelimit-reset-requests"], "^%s$" % form)

    def test_a_reset_that_is_no_time_does_no_harm(self):
        for moment in ("2026-99-99T99:99:99Z", "soon", "1790000000", "0000-00-00T00:00:00Z"):
            with self.subTest(moment=moment):
                self.claude.play(FakeReply(body=message(text("Hi")),
                                           headers={"anthropic-ratelimit-requests-reset": moment}))
                self.assertEqual(self.chat().status, 200)


# ---- JSON --------------------------------------------------------------------------------------------

MANY_BRACKETS = b'{"messages":[' + b"[]," * 1_000_000 + b"1]}"


def depth_of(value) -> int:
    """How deep lists and objects nest."""
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, (dict, list)) + max(map(depth_of, members), default=0)


class JsonDoorTests(HttpTestCase):
    def ask_chat(self, body: bytes) -> Answer:
        return self.ask("POST", "/v1/chat/completions", body)

    def with_number(self, number: bytes) -> Answer:
        return self.ask_chat(CHAT_BODY[:-1] + b',"seed":' + number + b"}")

    def test_what_is_not_a_json_object_in_utf_8_is_refused(self):
        for name, body, words in (
                ("empty", b"", "JSON"), ("cut", b'{"model":', "JSON"), ("list", b"[]", "not a JSON object"),
                ("string", b'"hello"', "not a JSON object"), ("null", b"null", "not a JSON object"),
                ("number", b"5", "not a JSON object"), ("two objects", b"{}{}", "JSON"), ("form", b"a=b", "JSON"),
                ("Latin-1", CHAT_BODY.replace(b"Hello", b"Gr\xfc\xdfe"), "not UTF-8 (byte"),
                ("UTF-16", CHAT_BODY.decode().encode("utf-16"), "not UTF-8"),
                ("UTF-16 without mark", CHAT_BODY.decode().encode("utf-16-le"), "JSON"),
                ("encoded surrogate", CHAT_BODY.replace(b"Hello", b"\xed\xa0\x80"), "not UTF-8"),
                ("overlong", CHAT_BODY.replace(b"Hello", b"\xc0\xaf"), "not UTF-8"),
                ("NUL", CHAT_BODY + b"\0", "JSON"), ("raw line end", CHAT_BODY.replace(b"Hello", b"a\nb"), "JSON"),
                ("comment", b"{/* */}", "JSON"), ("single quotes", b"{'model':'x'}", "JSON")):
            with self.subTest(name):
                answer = self.ask_chat(body)
                self.assertEqual((answer.status, answer.error["code"]), (400, "invalid_json"))
                self.assertIn(words, answer.error["message"])
                self.assert_envelope(answer)

    def test_numbers_that_json_does_not_know_are_refused(self):
        for number in (b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1" * 401, b"-" + b"9" * 100_000,
                       b"01", b"+1", b".5", b"0x10", b"1_000"):
            with self.subTest(number=number[:20]):
                answer = self.with_number(number)
                self.assertEqual((answer.status, answer.error["code"]), (400, "invalid_json"))

    def test_numbers_too_large_for_a_float_are_no_defect(self):
        for name in ("temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "n", "seed",
                     "presence_penalty", "frequency_penalty", "top_logprobs", "thinking_budget", "logit_bias"):
            for sign in (b"", b"-"):
                with self.subTest(name=name, sign=sign):
                    answer = self.ask_chat(CHAT_BODY[:-1] + b',"%s":%s1%s}' % (name.encode(), sign, b"0" * 350))
                    self.assertIn(answer.status, (200, 400))

    def test_a_byte_order_mark_is_skipped(self):
        self.assertEqual(self.ask_chat(b"\xef\xbb\xbf" + CHAT_BODY).status, 200)

    def test_of_duplicate_keys_the_last_wins(self):
        self.assertEqual(self.ask_chat(b'{"messages":[],"model":"nothing",' + CHAT_BODY[1:]).status, 200)
        self.assertEqual(self.claude.messages[-1].body["model"], "claude-sonnet-5-5")

    def test_deep_nesting_and_masses_of_brackets_are_refused_before_parsing(self):
        for name, body, words in (
                ("100,000 lists", b"[" * 100_000, "nested"), ("closed", b"[" * 100_000 + b"]" * 100_000, "nested"),
                ("objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested"),
                ("201", b"[" * 201 + b"]" * 201, "nested"),
                ("201 inside", CHAT_BODY[:-1] + b',"metadata":{"a":' + b"[" * 200 + b"]" * 200 + b"}}", "nested"),
                ("hidden behind quotes", b'{"a\\"[[":"\\\\","b":' + b"[" * 300 + b"]" * 300 + b"}", "nested"),
                ("a million flat ones", MANY_BRACKETS, "1000000 brackets"),
                ("nothing but brackets", b"[" * 5_000_000, "brackets")):
            with self.subTest(name):
                answer = self.ask_chat(body)
                self.assertEqual((answer.status, answer.error["code"]), (400, "invalid_json"))
                self.assertIn(words, answer.error["message"])

    def test_depth_is_the_same_of_a_value_and_of_its_text(self):
        """The text is looked at, as the parser may go too deep for the stack."""
        for name, value in (("nothing", None), ("a string", '[[[["{{'), ("a list", [1, [], [2, [3, []]], "["]),
                            ("objects", {"a\\": {"[": {"\"{": []}}}), ("both", [{"a": [{"b": {}}, "]]]"]}, {}]),
                            ("ends of strings", ["\\", "\\\"", "\"\\", {"\\\"[": [[]]}])):
            with self.subTest(name):
                text = json.dumps(value).encode()
                deeper = [depth_of(value) > limit for limit in range(9)]
                self.assertEqual([claude_gateway.nests_deeper(text, limit) for limit in range(9)], deeper)
        self.assertEqual([claude_gateway.nests_deeper(b"[[]]", limit) for limit in (0, 1, 2)], [True, True, False])

    def test_no_depth_is_too_much_for_a_small_stack(self):
        """A thread has 128 KB of it on Alpine Linux; the parsers of all versions recurse further than that."""
        done = subprocess.run([sys.executable, "-c", imported() + "import threading\n"
                               "def parse():\n"
                               "    for text in '[', '{\"a\":', '[{\"a\":':\n"
                               "        try:\n"
                               "            claude_gateway.json_within_bounds(text * 100000)\n"
                               "        except ValueError as refusal:\n"
                               "            print(refusal)\n"
                               "        for event in True, False:\n"
                               "            try:\n"
                               "                claude_gateway.json_object_from(text.encode() * 100000, event)\n"
                               "            except claude_gateway.UpstreamFault as fault:\n"
                               "                print(fault.code)\n"
                               "threading.stack_size(128 << 10)\n"
                               "threading.Thread(target=parse).start()"],
                              stdout=subprocess.PIPE, timeout=60, check=False)
        self.assertEqual(done.stdout.decode().splitlines(), ["nested more than 200 deep", *["upstream_error"] * 2] * 3)

    def test_numbers_of_the_upstream_that_are_not_finite_are_unknown_and_end_nothing(self):
        for number in ("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "9" * 400, "9" * 100_000):
            with self.subTest(number[:20]):
                self.assertEqual(claude_gateway.json_object_from(b'{"type":"a","n":%s}' % number.encode()),
                                 {"type": "a", "n": None})
        self.assertEqual(claude_gateway.json_object_from(b'{"a":[1,-2,0.5,1e3,-0]}'), {"a": [1, -2, 0.5, 1000.0, 0]})

    def test_half_a_surrogate_pair_of_the_upstream_does_not_leave_as_one(self):
        for stream in (False, True):
            half = sse(events_of(message(text("a? \U0001f600")))).replace(b"?", b"\\ud800b")
            self.claude.play(FakeReply(pieces=[half]))
            answer = self.chat(stream=stream)
            self.assertEqual(answer.status, 200, answer.raw)
            self.assertNotIn(b"\\ud800", answer.raw)
            self.assertIn('"content":"a\ufffdb \U0001f600"'.encode(), answer.raw)

    def test_nesting_within_reason_and_brackets_in_strings_are_no_matter(self):
        for name, content in (("brackets", "[" * 5_000), ("escaped quotes", '\\"[{' * 1_000), ("braces", "{" * 5_000),
                              ("backslashes", "\\" * 999 + '"' + "[" * 300), ("code", "f([{1: 2}])" * 5_000)):
            with self.subTest(name):
                request = self.sent(content=content)
                self.assertEqual(bare(request["messages"][0]["content"]), [{"type": "text", "text": content}])
        schema: dict = {"type": "string"}
        for _ in range(60):
            schema = {"type": "object", "properties": {"a": schema}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        self.assertEqual(self.sent(tools=tools)["tools"][0]["input_schema"], schema)

    def test_lone_surrogates_are_replaced_and_reported(self):
        answer = self.ask_chat(CHAT_BODY.replace(b"Hello", b"a\\ud800b\\uDFFFc\\ud83d\\ude00\\udc00\\ud800"))
        self.assertEqual(answer.status, 200, answer.raw)
        self.assertEqual(bare(self.claude.messages[-1].body["messages"][0]["content"]),
                         [{"type": "text", "text": "a\ufffdb\ufffdc\U0001f600\ufffd\ufffd"}])
        self.assertIn("lone_surrogates", answer.headers["x-claude-gateway-changes"])

    def test_lone_surrogates_in_names_and_tool_schemas_are_replaced_too(self):
        body = CHAT_BODY[:-1] + (b',"tools":[{"type":"function","function":{"name":"f","description":"\\ud800",'
                                 b'"parameters":{"type":"object","properties":{"\\udfff":{"type":"string"}}}}}]}')
        self.assertEqual(self.ask_chat(body).status, 200)
        sent = self.claude.messages[-1].body["tools"][0]
        self.assertEqual((sent["description"], sent["input_schema"]["properties"]),
                         ("\ufffd", {"_": {"type": "string", "description": "\ufffd"}}))

    def test_whole_surrogate_pairs_are_not_reported(self):
        answer = self.ask_chat(CHAT_BODY.replace(b"Hello", b"\\ud83d\\ude00 \\\\ud800"))
        self.assertNotIn("x-claude-gateway-changes", answer.headers)
        self.assertEqual(bare(self.claude.messages[-1].body["messages"][0]["content"]),
                         [{"type": "text", "text": "\U0001f600 \\ud800"}])


# ---- Models ------------------------------------------------------------------------------------------

class ModelNameTests(RequestTestCase):
    def resolved(self, name: str, *aliases, entries=()) -> str:
        return claude_gateway.Catalog(entries, aliases).resolve(name).id

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
        entries = [live_model(name) for name in ("claude-mythos-9", "claude-fable-9", "claude-haiku-4-5-20251001")]
        self.assertEqual(self.resolved("gpt-4o-mini", entries=entries), "claude-haiku-4-5-20251001")
        for name in ("gpt-5", "o3", "opus"):
            with self.subTest(name=name), self.assertRaises(claude_gateway.Refused):
                self.resolved(name, entries=entries)

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
                self.assertRegex(error["message"], r"(claude-\w+-\d|sonnet, opus, haiku).*--alias '\*=MODEL'")

    def test_the_nearest_name_is_spelt_alike_or_else_a_tier(self):
        for name, nearest in (("sonet", ["sonnet", "opus", "haiku"]), ("hiaku", ["haiku", "sonnet", "opus"]),
                              ("llama3", ["sonnet", "opus", "haiku"]), ("", ["sonnet", "opus", "haiku"]),
                              ("claude-sonet-5-5", ["claude-sonnet-5-5", "claude-sonnet-5", "claude-sonnet-4-6"])):
            with self.subTest(name=name):
                self.assertEqual(claude_gateway.Catalog().nearest(name), nearest)
        self.assertEqual(claude_gateway.Catalog(aliases=[("my-model", "opus")]).nearest("my-modell")[0], "my-model")

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

    def test_a_long_name_of_a_model_is_no_trap(self):
        self.assertEqual(self.chat(model=":" * 400_000 + "\nx").status, 404)

    def test_digits_that_are_none_make_no_version(self):
        answer = self.chat(model="claude-opus-\u00b2")
        self.assertEqual((answer.status, answer.error["code"]), (404, "model_not_found"))


def live_model(model_id: str, **fields) -> dict:
    """An entry of Claude's model list that says nothing about capabilities."""
    return dict({"id": model_id, "type": "model", "display_name": model_id, "created_at": "2026-10-01T00:00:00Z",
                 "lifecycle": "active", "max_input_tokens": 1_000_000, "max_tokens": 128_000, "capabilities": None},
                **fields)


class ThinkingSuffixTests(RequestTestCase):
    config = {"alias": (("deep", "claude-opus-4-8:thinking"),)}

    def test_a_suffix_switches_thinking_on_where_it_is_optional(self):
        for name, expected in (("claude-opus-4-8", None), ("claude-opus-4-8-thinking", "adaptive"),
                               ("deep", "adaptive"), ("anthropic/claude-opus-4.8:thinking", "adaptive"),
                               ("claude-haiku-4-5-thinking", "enabled"), ("sonnet-thinking", "adaptive")):
            with self.subTest(name=name):
                self.assertEqual(self.sent(model=name).get("thinking", {}).get("type"), expected)
        for fields in ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}},
                       {"reasoning": {"enabled": False}}):
            with self.subTest(fields=fields):
                self.assertIsNone(self.sent(model="claude-opus-4-8-thinking", **fields).get("thinking"))


class LiveModelListTests(RequestTestCase):
    def listed(self, *models: dict) -> None:
        """A gateway whose upstream tells these models."""
        self.claude.models = list(models)
        self.start()

    def test_an_id_is_known_with_and_without_its_date(self):
        self.listed(live_model("claude-haiku-4-5", max_tokens=64_000), live_model("claude-sonnet-5-5-20260928"))
        for name, model_id, rules in (("claude-haiku-4-5", "claude-haiku-4-5", "claude-haiku-4-5-20251001"),
                                      ("claude-haiku-4-5-20251001", "claude-haiku-4-5", "claude-haiku-4-5-20251001"),
                                      ("claude-sonnet-5-5", "claude-sonnet-5-5-20260928", "claude-sonnet-5-5")):
            with self.subTest(name=name):
                model = self.service.gateway.models.catalog().resolve(name)
                known = BUILT_IN_MODELS[rules]
                self.assertEqual((model.id, model.sampling, model.prefill, model.price),
                                 (model_id, known.sampling, known.prefill, known.price))
        self.assertEqual(self.sent(model="claude-haiku-4-5", temperature=0.5)["temperature"], 0.5)

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
        good = live_model("claude-opus-7", max_tokens=32_000)
        for odd in ({"retires_at": 5}, {"created_at": ["2026"]}, {"max_tokens": "128000"}, {"max_tokens": True},
                    {"max_tokens": 0}, {"max_input_tokens": {}}, {"lifecycle": 5}, {"lifecycle": []},
                    {"display_name": {"a": 1}}, {"capabilities": {"thinking": {"types": {"adaptive": 5}}, "effort": 5}},
                    {"id": "claude-opus-\u00b2"}, {"id": "claude opus 9"}, {"id": ["x"]}, {"id": ""}):
            with self.subTest(odd=odd):
                catalog = claude_gateway.Catalog([live_model("claude-opus-5-5", **odd), good])
                self.assertEqual(catalog.newest("opus").id, "claude-opus-7")
                for name, model in catalog.names():
                    entry = claude_gateway.model_entry(name, model)
                    self.assertEqual({key: type(value) for key, value in entry.items() if key in (
                        "context_length", "max_output_tokens", "display_name", "created", "created_at")},
                        {"context_length": int, "max_output_tokens": int, "display_name": str, "created": int,
                         "created_at": str})
                    self.assertGreater(model.max_output, 0)

    def test_the_models_on_offer_have_the_shape_of_openai(self):
        self.start(alias=(("my/model", "opus"), ("*", "opus"), ("broken", "claude-opus-1")))
        body = self.ask("GET", "/v1/models").json
        self.assertEqual(body["object"], "list")
        entries = {entry["id"]: entry for entry in body["data"]}
        self.assertEqual(len(entries), len(body["data"]))
        self.assertLessEqual(set(ALL_MODELS) | {"opus", "sonnet", "haiku", "fable", "mythos", "my/model"}, set(entries))
        self.assertNotIn("*", entries)
        self.assertEqual(entries["my/model"]["alias_of"], "claude-opus-5-5")
        self.assertEqual(self.ask("GET", "/v1/models/my%2Fmodel").json["id"], "my/model")
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


# ---- Shapes ------------------------------------------------------------------------------------------

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
            ("n", {"n": 2}), ("n", {"n": "two"}), ("logprobs", {"logprobs": 1}),
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
        for name in claude_gateway.PARAMETERS:
            if name not in ("model", "messages"):
                with self.subTest(name=name):
                    self.assertEqual(self.sent(**{name: None}), nothing)

    def test_a_stream_wish_may_be_a_string(self):
        self.assertEqual(self.chat(stream="true").events[-1], "[DONE]")

    def test_unknown_fields_are_no_error(self):
        request = self.sent(min_p=0.1, keep_alive="5m", options={"num_ctx": 1}, whatever=[1])
        self.assertEqual(set(request) - {"model", "max_tokens", "stream", "thinking", "messages"}, set())

    def test_lone_surrogates_in_arguments_become_replacement_characters(self):
        # they are escaped twice there, so whoever reads the body does not see them
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
            claude_gateway.messages_request_from_chat(chat, model, [claude_gateway.OAUTH_SYSTEM_BLOCK])
        self.assertEqual(json.dumps(chat), before)
        self.assertEqual(set(claude_gateway.OAUTH_SYSTEM_BLOCK), {"type", "text"})

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
        for schema in broken_schemas:
            for fields in ({"tools": [a_tool("f", schema)]}, {"tools": [a_tool("f", schema, strict=True)]},
                           {"tools": [a_tool("f", schema)], "tool_choice": "required"},
                           {"response_format": {"type": "json_schema",
                                                "json_schema": {"name": "n", "schema": schema}}}):
                with self.subTest(fields=fields):
                    answer = self.chat(**fields)
                    self.assertIn(answer.status, (200, 400), answer.raw)

    def test_long_names_in_a_schema_do_not_pile_up_in_its_paths(self):
        schema: dict = {"type": "wrong"}
        for _ in range(80):
            schema = {"type": "object", "properties": {"x" * 10_000: schema}}
        error = self.refused(tools=[a_tool("f", schema)])
        self.assertRegex(error["param"], r"x\.type$")
        self.assertLess(len(error["param"]), 1_000)
        error = self.refused(tools=[a_tool("f", {"properties": {"a": {"items": {"properties": {"b": {"type": 1}}}}}})])
        self.assertEqual(error["param"], "tools[0].function.parameters.properties.a.items.properties.b.type")


# ---- Cache breakpoints -------------------------------------------------------------------------------

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


# ---- Content -----------------------------------------------------------------------------------------

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

    def test_prewarming_fills_the_cache_and_asks_for_no_answer(self):
        """On a model of each generation: without what Claude refuses where there is no output."""
        schema = {"type": "json_schema", "json_schema": {"name": "p", "schema": POINT}}
        for model in ("claude-opus-5-5", "claude-sonnet-5", "claude-haiku-4-5"):
            for fields in ({}, {"response_format": schema}, {"reasoning_effort": "high"},
                           {"tools": [a_tool("f")], "tool_choice": "required"}, {"stream": True}):
                with self.subTest(model=model, fields=fields):
                    answer = self.chat(model=model, prompt_cache_options={"prewarm": True}, **fields)
                    self.assertEqual(answer.status, 200, answer.raw)
                    sent = self.claude.messages[-1].body
                    self.assertEqual((sent["max_tokens"], sent.get("stream")), (0, None))
                    self.assertIn("cache_control", json.dumps(sent["messages"]))
                    choice = (answer.chunks[-1] if "stream" in fields else answer.json)["choices"][0]
                    self.assertEqual(choice["finish_reason"], "stop")
        for stream in (False, True):
            answer = self.ask("POST", "/v1/responses", {"model": "opus", "input": "Hi", "stream": stream,
                                                        "prompt_cache_options": {"prewarm": True}})
            response = answer.chunks[-1]["response"] if stream else answer.json
            self.assertEqual((response["status"], response["output"]), ("completed", []))


class ContentPartTests(RequestTestCase):
    def block(self, part: dict, **fields) -> dict:
        """The content block that a part of a user message becomes."""
        blocks = self.turns(user([{"type": "text", "text": "See:"}, part]), **fields)[0]["content"]
        self.assertEqual((len(blocks), blocks[0]), (2, text("See:")))
        return blocks[1]

    def refused_part(self, part: dict) -> dict:
        return self.refused(messages=[user([{"type": "text", "text": "See:"}, part])])

    def test_an_image_that_is_none_is_told_what_it_claimed_to_be(self):
        for declared, words in (("image/png", "this is declared image/png, but its bytes are none of these."),
                                ("image/bmp", "this is image/bmp."), ("text/plain", "this is declared text/plain, "),
                                ("application/pdf", "is declared application/pdf, ")):
            with self.subTest(declared), self.assertRaises(claude_gateway.InvalidRequest) as raised:
                claude_gateway.blocks_from_base64("AAAA", declared, "", "image", None)
            self.assertIn(words, str(raised.exception))

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
        for declared, data, told in (("image/png", jpeg(5, 5), "repaired="), ("image/jpg", png(5, 5), "repaired="),
                                     ("image/jpg", jpeg(5, 5), ""), ("IMAGE/JPG", jpeg(5, 5), "")):
            with self.subTest(declared=declared):
                url = "data:%s;base64,%s" % (declared, data)
                self.assertEqual(self.changes(messages=[user([image_url(url)])])[:9], told)

    def test_a_web_address_is_left_to_claude(self):
        for part in (image_url("https://example.com/a.png"), {"type": "image", "title": "t", "source": {
                         "type": "url", "url": "https://example.com/a.png"}},
                     {"type": "image_url", "image_url": "https://example.com/a.png"},
                     {"type": "input_image", "image_url": "https://example.com/a.png"},
                     {"type": "input_image", "source": {"type": "url", "url": "https://example.com/a.png"}},
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
        bmp = base64.b64encode(b"BM" + bytes(60)).decode()
        for url, words in (("data:image/png;base64,", "base64"), ("data:image/png;base64,@@@@", "base64"),
                           ("data:image/png;base64," + PIXEL[:41], "base64"), ("data:image/png;base64", "comma"),
                           ("data:image/bmp;base64," + bmp, "JPEG, PNG, GIF and WebP")):
            with self.subTest(url=url):
                error = self.refused_part(image_url(url))
                self.assertEqual(error["param"], "messages[0].content[1].image_url.url")
                self.assertIn(words, error["message"])

    def test_size_and_number_of_images_are_left_to_claude(self):
        self.assertEqual(self.block(image_url("data:;base64," + png(9000, 9000)))["type"], "image")
        answer = self.chat(messages=[user([image_url("data:image/png;base64," + PIXEL)] * 601)])
        self.assertEqual(answer.error["message"], "messages: 601 images are more than the 600 allowed")
        self.claude.violations.clear()                  # that refusal was the point

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

    def test_a_file_is_text_if_its_bytes_are(self):
        encoded = base64.b64encode("# Grüße".encode("utf-8")).decode()
        for label in ("application/octet-stream", "application/yaml", "text/javascript", "application/toml",
                      "application/jsonl", "application/ld+json", "application/x-sh", "application/sql",
                      "image/svg+xml", "", "image/png"):
            for part in ({"type": "file", "file": {"filename": "notes", "file_data": "data:%s;base64,%s" % (label,
                                                                                                          encoded)}},
                         {"type": "input_file", "filename": "notes", "file_data": encoded}):
                with self.subTest(label=label, kind=part["type"]):
                    self.assertEqual(self.block(part), text_file("# Grüße", title="notes"))
        svg = image_url("data:image/svg+xml;base64," + encoded)
        self.assertEqual(self.block(svg), text_file("# Grüße"))
        self.assertEqual(self.changes(messages=[user([svg])]), "changed=messages[0].content[0].image_url.url")
        for data in (b"a\0b", "Grüße".encode("latin-1")):
            with self.subTest(data=data):
                error = self.refused_part({"type": "file", "file": {"file_data": base64.b64encode(data).decode()}})
                self.assertEqual(error["code"], "unsupported_file")

    def test_an_image_of_the_model_context_protocol_is_one(self):
        self.assertEqual(self.block({"type": "image", "data": PIXEL, "mimeType": "image/png"}), image_block(PIXEL))
        document = {"type": "document", "source": {"type": "content", "content": [image_block(PIXEL)]}}
        self.assertEqual(self.block(document), image_block(PIXEL))

    def test_an_image_of_the_assistant_is_named_not_sent(self):
        turns = self.turns(ASKED, assistant([{"type": "text", "text": "Here:"},
                                             image_url("data:image/png;base64," + PIXEL)]),
                           user("Thanks"))
        self.assertEqual([block["type"] for block in turns[1]["content"]], ["text", "text"])


HEIC = base64.b64encode(b"\0\0\0\x18ftypheic" + bytes(20)).decode()
SOUND = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
NOTE = text("[A file that Claude does not accept was left out here.]")


class EarlierMediaTests(RequestTestCase):
    """What nobody can take back any more must not end a conversation; in the newest turn it is a 400."""
    BAD = (image_url("data:image/heic;base64," + HEIC), SOUND, image_url("data:image/png;base64,@@"),
           {"type": "file", "file": {"file_id": "file-1"}}, image_url("http://127.0.0.1/a.png"),
           {"type": "image", "source": {"type": "file", "file_id": "file-1"}},
           {"type": "image", "data": HEIC, "mimeType": "image/heic"})

    def test_in_an_earlier_turn_it_becomes_a_note_and_is_reported(self):
        for part in self.BAD:
            with self.subTest(part=part):
                turns = [user([{"type": "text", "text": "See"}, part]), assistant("I do not see it."), user("Go on.")]
                self.assertEqual(self.turns(*turns)[0]["content"], [text("See"), NOTE])
                self.assertEqual(self.changes(messages=turns), "changed=messages[0].content[1]")
                self.refused(messages=turns[:1])
                self.refused(messages=[*turns[:2], turns[0]])

    def test_in_a_tool_result_too_however_new_it_is(self):
        for part in self.BAD:
            for more in ([], [user("Go on.")]):
                with self.subTest(part=part, more=more):
                    given = result("a", [{"type": "text", "text": "done"}, image_url("data:;base64," + PIXEL), part])
                    turns = self.turns(ASKED, calls(a_call("a")), given, *more, tools=[a_tool("f")])
                    self.assertEqual(turns[2]["content"][0]["content"], [text("done"), image_block(PIXEL), NOTE])

    def test_in_responses_too(self):
        part = {"type": "input_image", "image_url": "data:image/heic;base64," + HEIC}
        turn = {"role": "user", "content": [part, {"type": "input_text", "text": "See"}]}
        call = [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "a", "output": [part]}]
        for items, status in (([turn, {"role": "assistant", "content": "No."}, user("Go on.")], 200), ([turn], 400),
                              ([user("Go"), *call], 200), ([turn, *call], 200), ([user("Go"), *call, turn], 400)):
            with self.subTest(items=items):
                answer = self.ask("POST", "/v1/responses", {"model": MODEL, "input": items,
                                                            "tools": [{"type": "function", "name": "f"}]})
                self.assertEqual(answer.status, status, answer.raw)

    def test_a_part_of_a_wrong_shape_is_an_error_everywhere(self):
        for part in (image_url(5), {"type": "file"}):
            self.refused(messages=[user([part]), assistant("x"), user("y")])

    def damaged(self, path: str, *messages: dict, **fields) -> list:
        """What is sent at last where Claude refuses the block at a path once."""
        self.claude.play(refusal_of_claude(400, "invalid_request_error", path + ": Could not process image"))
        answer = self.chat(messages=list(messages), tools=[a_tool("f")], **fields)
        self.assertEqual((answer.status, len(self.claude.messages)), (200, 2), answer.raw)
        self.assertIn("changed=messages.", answer.headers["x-claude-gateway-changes"])
        return bare(self.claude.messages[-1].body["messages"])

    def test_where_only_claude_knows_the_block_it_names_is_left_out(self):
        image, big = image_url("data:;base64," + PIXEL), image_url("data:;base64," + png(9000, 9000))
        old = [user([image, big]), assistant("x"), user("y")]
        returned = [ASKED, calls(a_call("a")), result("a", [image, big])]
        for stream in (False, True):
            with self.subTest(stream=stream):
                turns = self.damaged("messages.0.content.1.image.source.base64.data", *old, stream=stream)
                self.assertEqual(turns[0]["content"], [image_block(PIXEL), NOTE])
                self.claude.reset()
                turns = self.damaged("messages.2.content.0.tool_result.content.1.image.source", *returned,
                                     stream=stream)
                self.assertEqual(turns[2]["content"][0]["content"], [image_block(PIXEL), NOTE])
                self.claude.reset()

    def test_a_second_refusal_and_one_about_the_newest_turn_are_handed_on(self):
        image = image_url("data:;base64," + PIXEL)
        old = [user([image]), assistant("x"), user([image])]
        for words, count in (("messages.0.content.0.image.source: no", 2), ("messages.2.content.0.image.source: no", 1),
                             ("messages.1.content.0.text: no", 1), ("messages.9.content.9: no", 1)):
            with self.subTest(words=words):
                self.claude.reset()
                self.claude.play(*[refusal_of_claude(400, "invalid_request_error", words)] * 2)
                self.assertEqual(self.chat(messages=old).status, 400)
                self.assertEqual(len(self.claude.messages), count)


# ---- Tools -------------------------------------------------------------------------------------------

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

    def search(self, tool: dict, **fields) -> dict:
        return without_keys(self.tools(dict({"type": "web_search"}, **tool), **fields)[0], "type", "name")

    def test_a_web_search_keeps_what_the_client_said(self):
        paris, usual = {"type": "approximate", "city": "Paris"}, {"max_uses": 5}
        for tool, expected in (
            ({"filters": {"allowed_domains": ["who.int", "https://sec.gov/"]}},
             dict(usual, allowed_domains=["who.int", "sec.gov"])),
            ({"filters": {"blocked_domains": ["x.example"]}}, dict(usual, blocked_domains=["x.example"])),
            ({"filters": {"allowed_domains": None}}, usual),
            ({"filters": None, "search_context_size": "medium"}, usual),
            ({"type": "web_search_20250305", "name": "web_search", "allowed_domains": ["a.example"], "max_uses": 2,
              "user_location": paris}, {"max_uses": 2, "allowed_domains": ["a.example"], "user_location": paris}),
            ({"user_location": {"type": "approximate", "approximate": {"city": "Paris"}}},
             dict(usual, user_location=paris)),
        ):
            with self.subTest(tool=tool):
                self.assertEqual(self.search(tool), expected)
        both = {"type": "web_search", "filters": {"allowed_domains": ["a.example"], "blocked_domains": ["b.example"]}}
        self.assertEqual(self.changes(tools=[both]), "dropped=tools[0].filters.blocked_domains")
        for domain, report in (("https://sec.gov/", "changed=tools[0].filters.allowed_domains"), ("sec.gov", "")):
            search = {"type": "web_search", "filters": {"allowed_domains": [domain]}}
            self.assertEqual(self.changes(tools=[search]), report)
        self.assertEqual(self.refused(tools=[{"type": "web_search", "filters": {"allowed_domains": [5]}}])["param"],
                         "tools[0].filters.allowed_domains[0]")

    def test_a_search_without_web_access_is_left_out_and_reported(self):
        offline = {"type": "web_search", "external_web_access": False}
        self.assertEqual([tool["name"] for tool in self.tools(offline, a_tool("f"))], ["f"])
        self.assertEqual(self.changes(tools=[offline, a_tool("f")]), "dropped=tools[0]")

    def test_a_client_can_force_the_search_where_the_model_allows(self):
        for kind in ("web_search", "web_search_preview"):
            request = self.prompt(model="claude-opus-5", tools=[{"type": kind}], tool_choice={"type": kind})
            self.assertEqual(request["tool_choice"], {"type": "tool", "name": "web_search"})
        request = self.prompt(tools=[{"type": "web_search"}], tool_choice={"type": "web_search"})
        self.assertNotIn("tool_choice", request)
        self.assertIn("web_search", request["messages"][-1]["content"][-1]["text"])
        allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}
        request = self.prompt(tools=[{"type": "web_search"}, a_tool("f")], tool_choice=allowed)
        self.assertEqual([tool["name"] for tool in request["tools"]], ["web_search"])

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

    def test_a_nullable_branch_of_a_root_union_keeps_its_properties(self):
        schema = {"anyOf": [{"type": ["object", "null"], "properties": {"a": {"type": "string"}}, "required": ["a"]},
                            {"type": "object", "properties": {"b": {"type": "string"}}}]}
        request = self.sent(tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}])
        self.assertEqual(sorted(request["tools"][0]["input_schema"]["properties"]), ["a", "b"])

    def test_hosted_tools_are_left_out_for_the_reason_that_is_true(self):
        for tool, reason in (({"type": "mcp", "server_label": "s"}, "not translated here"),
                             ({"type": "code_interpreter"}, "not translated here"),
                             ({"type": "web_fetch_20250910", "name": "web_fetch"}, "not translated here"),
                             ({"type": "image_generation"}, "Claude has no tool of type"),
                             ({"googleSearch": {}}, "Claude has no tool of type")):
            with self.subTest(tool=tool):
                changes = claude_gateway.messages_request_from_chat({"messages": [ASKED], "tools": [tool]},
                                                                    BUILT_IN_MODELS[MODEL]).changes
                self.assertIn(reason, str(changes))
                self.assertEqual(self.changes(tools=[tool, a_tool("f")]), "dropped=tools[0]")

    def test_a_name_without_latin_letters_leads_the_description(self):
        self.claude.play(lambda recorded: message(tool_use("c", recorded.body["tool_choice"]["name"], {"x": 1})))
        answer = self.chat(model="claude-opus-4-8", tool_choice={"type": "function", "function": {"name": "高德地图"}},
                           tools=[a_tool("天气查询", description="d"), a_tool("高德地图", description="d")])
        self.assertEqual(answer.status, 200, answer.raw)
        tools = bare(self.claude.messages[-1].body["tools"])
        self.assertEqual([tool["description"] for tool in tools], ["天气查询: d", "高德地图: d"])
        self.assertEqual(answer.message["tool_calls"][0]["function"]["name"], "高德地图")
        self.assertEqual(self.tools({"type": "function", "function": {"name": "天气"}})[0]["description"], "天气")


ODD_NAMES = {"filter[name]": "filter_name_", "$top": "_top", "Account Number": "Account_Number", "größe": "gr__e",
             "k" * 70: "k" * 58, "plain.name-1": "plain.name-1"}         # a client's name -> Claude's
ODD_SCHEMA = {"type": "object", "properties": {name: {"type": "string"} for name in ODD_NAMES},
              "required": ["filter[name]"]}
CLIENT_INPUT = {name: "v%d" % at for at, name in enumerate(ODD_NAMES)}
CLAUDE_INPUT = dict(zip(ODD_NAMES.values(), CLIENT_INPUT.values()))


class PropertyNameTests(RequestTestCase):
    """Claude accepts [a-zA-Z0-9_.-]{1,64} at the top of a tool's schema; clients never learn of it."""
    def setUp(self):
        super().setUp()
        self.list_apps = a_tool("list_apps", ODD_SCHEMA)

    def called(self, *answer: dict, **fields) -> list:
        """(name, arguments) of the calls that a client gets, plain and streamed the same."""
        replies = []
        for stream in (False, True):
            self.claude.play(*answer)
            got = self.chat(stream=stream, **dict({"tools": [self.list_apps]}, **fields))
            self.assertEqual(got.status, 200, got.raw)
            reply = completion_from_chunks(got.chunks)["message"] if stream else got.message
            replies.append([(call["function"]["name"], call["function"]["arguments"])
                            for call in reply["tool_calls"]])
        self.assertEqual(replies[0], replies[1])
        return [(name, json.loads(arguments)) for name, arguments in replies[0]]

    def test_they_are_mapped_with_their_requirements_and_led_by_their_own_name(self):
        schema = self.prompt(tools=[self.list_apps])["tools"][0]["input_schema"]
        self.assertEqual(list(schema["properties"]), list(ODD_NAMES.values()))
        self.assertEqual(schema["required"], ["filter_name_"])
        self.assertEqual(schema["properties"]["_top"], {"type": "string", "description": "$top"})
        self.assertEqual(schema["properties"]["plain.name-1"], {"type": "string"})
        self.assertEqual(self.changes(tools=[self.list_apps]), "changed=tools[0].function.parameters")

    def test_names_that_would_fall_together_stay_apart(self):
        names = ["a b", "a_b", "a$b", "a_b_2", "天", "地", ""]
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        fitted = self.prompt(tools=[a_tool("f", schema)])["tools"][0]["input_schema"]["properties"]
        self.assertEqual((len(fitted), fitted["a_b"]), (7, {"type": "string"}))
        self.claude.play(message(tool_use("c", "f", dict(zip(fitted, names)))))
        call = self.chat(tools=[a_tool("f", schema)]).message["tool_calls"][0]
        self.assertEqual(json.loads(call["function"]["arguments"]), {name: name for name in names})

    def test_nested_names_stay(self):
        nested = {"type": "object", "properties": {"a": {"type": "object", "properties": {"$in": {}}}}}
        self.assertEqual(self.prompt(tools=[a_tool("f", nested)])["tools"][0]["input_schema"], nested)

    def test_arguments_come_back_with_the_clients_names(self):
        two = message(text("I look."), tool_use("c1", "list_apps", CLAUDE_INPUT), tool_use("c2", "f", {"x": 1}),
                      tool_use("c3", "list_apps", {"_top": 5, "nested": {"_top": 1}, "größe": "own"}))
        self.assertEqual(self.called(two, tools=[self.list_apps, a_tool("f")]), [
            ("list_apps", CLIENT_INPUT), ("f", {"x": 1}),
            ("list_apps", {"$top": 5, "nested": {"_top": 1}, "größe": "own"})])
        self.assertEqual(self.called(message(tool_use("c", "list_apps", {}))), [("list_apps", {})])

    def test_a_forced_tool_has_them_too(self):
        required = dict(ODD_SCHEMA, required=list(ODD_NAMES))
        for model in ("claude-opus-4-8", "claude-sonnet-5-5"):
            forced = model in UNFORCED
            answer = message(text(json.dumps(CLAUDE_INPUT)) if forced else tool_use("c", "list_apps", CLAUDE_INPUT))
            with self.subTest(model=model):
                self.assertEqual(self.called(answer, model=model, tools=[a_tool("list_apps", required)],
                                             tool_choice="required"), [("list_apps", CLIENT_INPUT)])

    def test_a_call_cut_by_the_output_limit_keeps_what_came(self):
        cut = events_of(message(tool_use("c", "list_apps", CLAUDE_INPUT), stop_reason="max_tokens"))
        stops = [at for at, event in enumerate(cut) if event["type"] == "content_block_stop"]
        cut[stops[0] - 1:stops[0]] = []             # the last fragment
        for events in (cut, [event for event in cut if event["type"] != "content_block_stop"]):
            ((name, arguments),) = self.called(one_by_one(*events), one_by_one(*events))
            self.assertEqual((name, arguments["$top"], "k" * 58 in arguments), ("list_apps", "v1", False))
            self.claude.reset()

    def test_histories_are_mapped_and_the_way_there_is_the_same_as_before(self):
        self.claude.play(message(thinking("hm", "c2ln"), tool_use("c1", "list_apps", CLAUDE_INPUT)))
        first = self.chat(tools=[self.list_apps], messages=[ASKED]).message
        turns = self.turns(ASKED, first, result("c1"), tools=[self.list_apps])
        self.assertEqual(turns[1]["content"], [thinking("hm", "c2ln"), tool_use("c1", "list_apps", CLAUDE_INPUT)])

    def test_responses_have_them_too(self):
        tool = {"type": "function", "name": "list_apps", "parameters": ODD_SCHEMA}
        for stream in (False, True):
            self.claude.play(message(tool_use("c1", "list_apps", CLAUDE_INPUT)))
            answer = self.ask("POST", "/v1/responses", {"model": MODEL, "input": "Go", "tools": [tool],
                                                        "stream": stream})
            item = answer.chunks[-1]["response"]["output"][0] if stream else answer.json["output"][0]
            self.assertEqual(json.loads(item["arguments"]), CLIENT_INPUT)

    def test_five_hundred_of_them_cost_what_they_are_long(self):
        schema = {"type": "object", "properties": {"größe %d" % at: {"type": "string"} for at in range(500)}}
        self.assertEqual(len(self.prompt(tools=[a_tool("f", schema)])["tools"][0]["input_schema"]["properties"]), 500)


class SchemaSubsetTests(RequestTestCase):
    def test_a_schema_that_says_nothing_is_asked_for_in_words(self):
        for schema in ({"allOf": [{}]}, {"$comment": "x"}, {"allOf": [{"allOf": [{"$defs": {}}]}]}):
            with self.subTest(schema=schema):
                request = self.sent(response_format={"type": "json_schema",
                                                     "json_schema": {"name": "x", "schema": schema}})
                self.assertNotIn("format", request.get("output_config", {}))

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

    def test_a_schema_counts_wherever_it_stands(self):
        for given in ({"type": "json_object", "schema": POINT}, {"type": "json_schema", "schema": POINT},
                      {"type": "json_schema", "json_schema": {"name": "n", "schema": POINT}}):
            with self.subTest(given=given):
                request = self.prompt(response_format=given)
                self.assertEqual(request["output_config"], {"format": {"type": "json_schema", "schema": POINT}})
        error = self.refused(response_format={"type": "json_object", "schema": {"type": "thing"}})
        self.assertEqual(error["param"], "response_format.schema.type")

    def test_plain_text_needs_nothing(self):
        self.assertEqual(self.sent(response_format={"type": "text"}), self.sent())


# ---- Conversation ------------------------------------------------------------------------------------

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


GOOD_HEADERS = {"anthropic-version": "2023-06-01", "content-type": "application/json", "x-api-key": "k",
                "user-agent": "claude-gateway/0"}


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

    def test_that_it_could_not_stay_is_told(self):
        history = [user("a"), system("Be brief."), user("b")]
        self.assertIn("changed=", self.changes(messages=history, model="claude-sonnet-5"))
        self.assertEqual(self.changes(messages=history[:2], model="claude-opus-5-5"), "")

    def test_it_is_never_hoisted(self):
        for model in ALL_MODELS:
            with self.subTest(model=model):
                request = self.prompt(model=model, messages=[system("A"), ASKED, assistant("b"), system("LATE"),
                                                             user("c")])
                self.assertEqual(request["system"], [text("A")])

    def test_it_takes_text_only(self):
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}}
        self.assertEqual(self.refused(messages=[system([image]), ASKED])["param"], "messages[0].content")


def tool_result(call_id: str, content="ok", **fields) -> dict:
    """A result in Claude's own shape."""
    return dict({"type": "tool_result", "tool_use_id": call_id, "content": content}, **fields)


class ClaudeShapeTests(RequestTestCase):
    """Claude's own blocks on OpenAI's routes, as agents that speak a mixture of both send them."""
    TOOLS = [{"name": name, "description": "Read", "input_schema": POINT} for name in ("f", "g")]

    def became(self, *messages: dict, **fields) -> list:
        turns = self.turns(*messages, tools=self.TOOLS, **fields)
        self.assertNotIn("tool_use_id", json.dumps([block.get("text") for turn in turns for block in turn["content"]]))
        return turns

    def test_calls_and_results_are_what_they_are(self):
        said_so = [text("Reading."), tool_use("toolu_1", "f", {"x": 1}), tool_use("toolu_2", "g", {})]
        results = [tool_result("toolu_1", [text("BODY")]), tool_result("toolu_2", "no such file", is_error=True)]
        asked = [ASKED, assistant(said_so), user([*results, {"type": "text", "text": "Go on."}])]
        self.assertEqual(self.became(*asked, tool_choice={"type": "auto"}),
                         [said("user", "Hi"), assistant(said_so), user([*results, text("Go on.")])])
        self.assertEqual(self.changes(messages=asked, tools=self.TOOLS), "")

    def test_results_in_another_order_and_place_find_their_calls(self):
        both = assistant([tool_use("toolu_1", "f", {"x": 1}), tool_use("toolu_2", "f", {"x": 2})])
        turns = self.became(ASKED, both, user([text("Both:"), tool_result("toolu_2", "2")]),
                            result("toolu_1", "1"))
        self.assertEqual(turns[2]["content"], [tool_result("toolu_1", "1"), tool_result("toolu_2", "2"), text("Both:")])

    def test_images_documents_and_errors_in_results(self):
        call = assistant([tool_use("toolu_1", "f", {"x": 1})])
        for content, expected in (
            ([image_block(PIXEL)], {"content": [image_block(PIXEL)]}),
            ([pdf_block(title="t")], {"content": [pdf_block(title="t")]}),
            ([{"type": "image", "data": PIXEL, "mimeType": "image/png"}], {"content": [image_block(PIXEL)]}),
            (None, {}), ("", {}), ([], {}),
        ):
            with self.subTest(content=content):
                block = self.became(ASKED, call, user([tool_result("toolu_1", content)]))[2]["content"][0]
                self.assertEqual(block, dict({"type": "tool_result", "tool_use_id": "toolu_1"}, **expected))
        # Claude accepts an error with text only
        self.became(ASKED, call, user([tool_result("toolu_1", [text("no"), image_block(PIXEL)], is_error=True)]))
        self.assertEqual(self.became(ASKED, call, result("toolu_1", "no", is_error=True))[2]["content"][0]["is_error"],
                         True)

    def test_thinking_keeps_its_place_and_unsigned_thinking_goes(self):
        blocks = [thinking("a", "c2ln"), text("I look."), tool_use("toolu_1", "f", {"x": 1}), thinking("b", "c2l2"),
                  {"type": "redacted_thinking", "data": "ZGF0"}, tool_use("toolu_2", "g", {})]
        answers = user([tool_result("toolu_1"), tool_result("toolu_2")])
        self.assertEqual(self.became(ASKED, assistant(blocks), answers)[1]["content"], blocks)
        twice = dict(assistant(blocks[:3]), thinking_blocks=blocks[:1])         # beside the content and in it
        self.assertEqual(self.became(ASKED, twice, answers)[1]["content"], blocks[:3])
        unsigned = {"type": "thinking", "thinking": "hm"}
        self.assertEqual(self.became(ASKED, assistant([unsigned, *blocks[1:3]]), answers)[1]["content"], blocks[1:3])
        self.assertEqual(self.became(user([thinking("a", "c2ln"), text("Hi")])), [said("user", "Hi")])

    def test_cache_marks_on_them_stay(self):
        mark = {"type": "ephemeral"}
        request = self.sent(tools=self.TOOLS, messages=[
            ASKED, assistant([tool_use("toolu_1", "f", {"x": 1})]),
            user([tool_result("toolu_1", cache_control=mark)]), assistant("Well."), user("Go on.")])
        self.assertEqual(request["messages"][2]["content"][0]["cache_control"], mark)

    def test_a_system_text_beside_the_messages_is_one(self):
        for given in ("Be brief.", [text("Be brief.")]):
            self.assertEqual(self.prompt(system=given, messages=[system("Really."), ASKED])["system"],
                             [text("Be brief."), text("Really.")])

    def test_a_tool_choice_in_its_shape(self):
        request = self.prompt(model="claude-opus-5", tools=self.TOOLS,
                              tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True})
        self.assertEqual(request["tool_choice"], {"type": "tool", "name": "f", "disable_parallel_tool_use": True})

    def test_parts_that_a_tool_wrote_into_a_string_are_read(self):
        image = {"type": "image", "data": PIXEL, "mimeType": "image/png"}
        for words, expected in (
            (json.dumps([{"type": "text", "text": "ok"}, image]), [text("ok"), image_block(PIXEL)]),
            (json.dumps([image_url("data:;base64," + PIXEL)], indent=1), [image_block(PIXEL)]),
            (json.dumps([image_block(PIXEL), dict(image, data=HEIC)]), [image_block(PIXEL), NOTE]),
            (json.dumps([{"type": "text", "text": "\ud83d!"}, image]), [text("\ufffd!"), image_block(PIXEL)]),
        ):
            with self.subTest(words=words[:60]):
                self.assertEqual(self.became(ASKED, calls(a_call("a")), result("a", words))[2]["content"][0]["content"],
                                 expected)
        for words in (json.dumps([{"type": "text", "text": "ok"}]), json.dumps([image, "and"]), json.dumps(image), "[{",
                      json.dumps([{"type": "image", "path": "a.png"}]), json.dumps([image, {"type": "hologram"}]),
                      json.dumps([{"type": "file", "name": "a.py"}]), '[{"type": "image", "data": "%s"' % PIXEL, "[]"):
            with self.subTest(words=words[:60]):
                self.assertEqual(self.became(ASKED, calls(a_call("a")), result("a", words))[2]["content"][0]["content"],
                                 words)

    def test_a_refusal_that_comes_twice_is_sent_once(self):
        part = {"type": "refusal", "refusal": "I will not."}
        for message_ in (dict(assistant([part]), refusal="I will not."), assistant([part]),
                         dict(assistant(None), refusal="I will not.")):
            self.assertEqual(self.became(ASKED, message_, user("Why?"))[1], said("assistant", "I will not."))

    def test_an_agent_loop_in_these_shapes_runs_through(self):
        """As an editor drives it: every turn of Claude's goes back as blocks, every result as a user's block."""
        for stream in (False, True):
            with self.subTest(stream=stream):
                self.start()
                history, sent = [system("You are an agent"), user([{"type": "text", "text": "Fix it."}])], []
                for step in range(4):
                    self.claude.play(message(thinking("t", "c2ln"), text("Step %d." % step), *(
                        [tool_use("toolu_%d" % at, "f", {"x": at}) for at in (2 * step, 2 * step + 1)] * (step < 3))))
                    answer = self.chat(messages=history, tools=self.TOOLS, stream=stream, tool_choice={"type": "auto"})
                    self.assertEqual(answer.status, 200, answer.raw)
                    reply = completion_from_chunks(answer.chunks)["message"] if stream else answer.message
                    sent.append(json.dumps(bare(self.claude.messages[-1].body["messages"]))[:-1])
                    uses = [tool_use(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
                            for call in reply.get("tool_calls", ())]
                    history += [assistant([{"type": "text", "text": reply["content"]}, *uses]), user(
                        [tool_result(use["id"], [{"type": "text", "text": "BODY"}]) for use in uses] or "Thanks.")]
                self.assertEqual(reply["content"], "Step 3.")
                for earlier, later in zip(sent, sent[1:]):
                    self.assertTrue(later.startswith(earlier), "the cache would be lost")
                self.assertIn("thinking", sent[-1])


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

    def test_legacy_calls_have_no_ids_and_that_is_no_change(self):
        self.assertEqual(self.changes(functions=[{"name": "f"}], messages=[
            ASKED, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "F"}]), "")

    def test_thousands_of_calls_that_cannot_be_told_apart_are_no_trap(self):
        # looked up one by one they would cost hours: `ask` gives up after 20 seconds
        for call_id in ("same", None):
            with self.subTest(call_id=call_id):
                turns = self.told(ASKED, calls(*[a_call(call_id, "f", "{}")] * 5_000), *[result(call_id, "r")] * 5_000)
                self.assertEqual(len(self.pairs(turns)), 5_000)
                self.assertNotIn("no result", json.dumps(turns))

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


# ---- Parameters --------------------------------------------------------------------------------------

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

    def test_a_number_beyond_floats_is_refused_by_name(self):
        answer = self.chat(model="claude-sonnet-4-6", temperature=10 ** 350)
        self.assertEqual((answer.status, answer.error["param"]), (400, "temperature"))


EFFORT_WISHES = (None, "none", "minimal", "low", "medium", "high", "xhigh", "max")
SHOWN = {"type": "adaptive", "display": "summarized"}


class ReportedFieldTests(RequestTestCase):
    """What Claude has no counterpart for is reported by its name, and refused under --strict."""
    FIELDS = (("logprobs", {"logprobs": True}), ("logprobs", {"logprobs": True, "top_logprobs": 5}),
              ("moderation", {"moderation": {"mode": "strict"}}), ("reasoning.mode", {"reasoning": {"mode": "deep"}}),
              ("stream_options.extra", {"stream_options": {"extra": 1}}),
              ("web_search_options.depth", {"web_search_options": {"depth": 3}}))

    def test_it_is_dropped_and_reported(self):
        for name, fields in self.FIELDS:
            with self.subTest(fields=fields):
                self.assertIn(name, self.changes(**fields))
        self.assertIsNone(self.chat(logprobs=True).json["choices"][0]["logprobs"])

    def test_under_strict_it_is_refused(self):
        self.start(strict=True)
        for _, fields in self.FIELDS:
            with self.subTest(fields=fields):
                self.assertEqual(self.refused(**fields)["code"], "strict")
        for fields in ({"reasoning": {"effort": "low", "summary": "auto"}}, {"logprobs": False}, {"moderation": None}):
            self.assertEqual(self.chat(model="claude-opus-4-8", **fields).status, 200)

    def test_what_is_reported_of_effort_and_temperature_is_what_happened(self):
        for model, sent_effort, header in (("claude-opus-4-6", "low", "changed=reasoning_effort"),
                                           ("claude-opus-4-5", "low", "changed=reasoning_effort"),
                                           ("claude-haiku-4-5", None, "dropped=reasoning_effort"),
                                           ("claude-opus-4-8", "low", "dropped=temperature")):
            with self.subTest(model=model):
                request = self.sent(model=model, reasoning_effort="low", temperature=0.3)
                self.assertEqual((request.get("output_config", {}).get("effort"), "temperature" in request),
                                 (sent_effort, "temperature" not in header))
                self.assertEqual(self.changes(model=model, reasoning_effort="low", temperature=0.3), header)


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

    def test_verbosity_holds_beside_a_forced_tool_too(self):
        for model in ("claude-opus-5-5", "claude-haiku-5-5"):       # one that cannot be forced, one that can
            with self.subTest(model=model):
                request = self.sent(model=model, verbosity="low", tools=[a_tool("f")], tool_choice="required")
                self.assertIn("Keep the answer short.", request["messages"][0]["content"][-1]["text"])

    def test_hidden_reasoning_stays_hidden_whatever_the_limit(self):
        for limit in (100, 2_000):
            with self.subTest(limit=limit):
                request = self.sent(model="claude-opus-5-5", max_tokens=limit, reasoning={"exclude": True})
                self.assertEqual(request["thinking"]["display"], "omitted")


# ---- Tool choice and answer format -------------------------------------------------------------------

UNFORCED = ("claude-fable-5-2", "claude-mythos-5-2", "claude-sonnet-5-5", "claude-opus-5-5", "claude-fable-5-1",
            "claude-mythos-5-1")                    # refuse tool_choice any and tool


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


# ---- Messages request --------------------------------------------------------------------------------

class ChangesHeaderTests(GatewayTestCase):
    """x-claude-gateway-changes: what was dropped, clamped, changed or repaired."""

    def test_it_groups_names_by_what_was_done(self):
        changes = claude_gateway.Changes()
        for verb, name in (("dropped", "temperature"), ("changed", "tool_choice"), ("dropped", "seed"),
                           ("dropped", "temperature")):
            changes.add(verb, name, "because")
        self.assertEqual(changes.header(), "dropped=temperature,seed; changed=tool_choice")

    def test_nothing_changed_means_no_header(self):
        for stream in (False, True):
            self.assertNotIn("x-claude-gateway-changes", self.chat(stream=stream, n=1, store=True).headers)

    def test_it_comes_with_replies_and_streams(self):
        for stream in (False, True):
            told = self.chat(stream=stream, seed=1, logit_bias={"1": 2}).headers["x-claude-gateway-changes"]
            self.assertEqual(told, "dropped=seed,logit_bias")

    def test_it_is_ascii_of_1_kb_at_most_and_counts_the_rest(self):
        for names in (["field_%03d" % at for at in range(300)], ["x" * 500 + str(at) for at in range(50)],
                      ["\u00e9\u2028, ;=\r\n" + str(at) for at in range(300)]):
            told = self.chat(**dict.fromkeys(names, 1)).headers["x-claude-gateway-changes"]
            self.assertLessEqual(len(told), 1024)
            self.assertRegex(told, r"\Adropped=[A-Za-z0-9_.\[\]-]+(,[A-Za-z0-9_.\[\]-]+)*; \+\d+ more\Z")
            shown = len(told.split(";")[0].split(","))
            self.assertEqual(shown + int(re.search(r"\+(\d+) more", told).group(1)), len(names))

    def test_the_log_has_the_full_list_with_reasons(self):
        self.start()
        names = ["field_%03d" % at for at in range(300)]
        with self.assertLogs("claude_gateway", "INFO") as logged:
            self.chat(**dict.fromkeys(names, 1))
            self.service.close(5)                   # the log line comes after the answer
        told = [line for line in logged.output if "field_000" in line]
        self.assertEqual(len(told), 1)
        self.assertTrue(all(name in told[0] for name in names))

    def test_strict_mode_lists_what_would_be_lost_and_sends_nothing(self):
        self.start(strict=True)
        answer = self.chat(seed=1, temperature=0.5)
        self.assertEqual((answer.status, answer.error["code"], len(self.claude.messages)), (400, "strict", 0))
        self.assertIn("dropped seed", answer.error["message"])
        self.assertEqual(self.chat(store=True, metadata={"a": "b"}, n=1).status, 200)

    def test_the_report_is_ascii_and_short(self):
        fields = {"unknown_%d\u00e9" % at: 1 for at in range(200)}
        report = self.chat(**fields).headers["x-claude-gateway-changes"]
        self.assertLess(len(report), 1100)
        self.assertRegex(report, r"^dropped=unknown_0_,.*; \+\d+ more$")


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


class AgentSessionTests(RequestTestCase):
    def test_at_least_98_percent_of_what_could_be_read_from_the_cache_is(self):
        kinds = {str(claude_gateway.replace(model, id="", released="", price=None, lifecycle="", retires="")): model
                 for model in BUILT_IN_MODELS.values()}     # a model of each kind, whatever its name and price
        for model in kinds.values():
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


# ---- Events ------------------------------------------------------------------------------------------

def bytes_to_events(data: bytes, size: int) -> list:
    decoder = claude_gateway.EventDecoder()
    events = [event for at in range(0, len(data), size) for event in decoder.feed(data[at:at + size])]
    return [*events, *decoder.close()]


def events_until_fault(decoder, data: bytes) -> tuple:
    """The events in these bytes, and whether the upstream was at fault after them."""
    events = []
    try:
        for event in decoder.feed(data):
            events.append(event)
    except claude_gateway.UpstreamFault:
        return events, True
    return events, False


class EventDecoderTests(unittest.TestCase):
    """Section 9.2 of the HTML standard, as far as a server may go."""
    CASES = (
        ("LF", b'data: {"type":"a"}\n\ndata: {"type":"b"}\n\n', "a b"),
        ("CR", b'data: {"type":"a"}\r\rdata: {"type":"b"}\r\r', "a b"),
        ("CRLF", b'data: {"type":"a"}\r\n\r\ndata: {"type":"b"}\r\n\r\n', "a b"),
        ("mixed", b'data: {"type":"a"}\r\n\rdata: {"type":"b"}\n\r\n', "a b"),
        ("CR and CRLF make two", b'data: {"type":\rdata: "a"}\r\n\n', "a"),
        ("no space", b'data:{"type":"a"}\n\n', "a"), ("two spaces", b'data:  {"type":"a"}\n\n', "a"),
        ("a mark", b'\xef\xbb\xbfdata: {"type":"a"}\n\n', "a"),
        ("a mark and a comment", b'\xef\xbb\xbf: hello\n\ndata: {"type":"a"}\n\n', "a"),
        ("comments", b': x\n:\ndata: {"type":"a"}\n: y\n\n:\n\n', "a"),
        ("other fields", b'event: a\nid: 1\nretry: 10\ndata: {"type":"a"}\nunknown\nnonsense: 1\n\n', "a"),
        ("the name after the data", b'data: {"type":"a"}\nevent: a\n\n', "a"),
        ("several lines", b'data: {\ndata: "type":\ndata: "a"\ndata: }\n\n', "a"),
        ("several lines in CRLF", b'data: {\r\ndata: "type":\r\ndata: "a"}\r\n\r\n', "a"),
        ("no data", b"event: ping\n\nevent: x\nid: 3\n\n", ""),
        ("blank lines", b'\n\n\r\n\rdata: {"type":"a"}\n\n\n\n', "a"),
        ("no blank line at the end", b'data: {"type":"a"}\n\ndata: {"type":"b"}\n', "a b"),
        ("no end of line at the end", b'data: {"type":"a"}\n\ndata: {"type":"b"}', "a b"),
        ("CR at the end", b'data: {"type":"a"}\r', "a"),
        ("half an event at the end", b'data: {"type":"a"}\n\ndata: {"type":"b', "a"),
        ("half a line at the end", b'data: {"type":"a"}\n\ndat', "a"),
        ("nothing", b"", ""),
    )

    def test_every_cut_of_every_form_gives_the_same_events(self):
        for name, data, types_of in self.CASES:
            for size in range(1, len(data) + 1):
                with self.subTest(name, size=size):
                    self.assertEqual(" ".join(event["type"] for event in bytes_to_events(data, size)), types_of)

    def test_only_cr_and_lf_end_lines(self):
        odd = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e\u00e9\U0001f600"
        data = ('data: {"type":"a","text":%s}\n\n' % json.dumps("x", ensure_ascii=False)).encode()
        data = data.replace(b'"x"', b'"%s"' % odd.encode()).replace(b"\x0b\x0c\x1c\x1d\x1e", b"")
        wanted = odd.replace("\x0b\x0c\x1c\x1d\x1e", "")
        for size in range(1, len(data) + 1):
            self.assertEqual(bytes_to_events(data, size), [{"type": "a", "text": wanted}])

    def test_an_event_is_there_with_its_last_byte(self):
        events = events_of(message(text("Hello"), text("there")), 2)
        for joining in (False, True):
            for end in (b"\n", b"\r\n", b"\r"):
                data = sse(events).replace(b"\n", end)
                for cut in range(len(data)):
                    decoder = claude_gateway.EventDecoder(joining)
                    found = [event for piece in (data[:cut], data[cut:]) for event in decoder.feed(piece)]
                    with self.subTest(joining=joining, end=end, cut=cut):
                        self.assertEqual(found[-1], events[-1])
                        self.assertTrue(joining or found == events)

    def test_only_a_text_delta_is_taken_for_one(self):
        for data in (b'\n: hello"}}\n\n', b'\nid: 1"} }\n\n', b'\n"}}\n\n'):
            with self.subTest(data):
                self.assertEqual(list(claude_gateway.EventDecoder(joining=True).feed(data)), [])

    def test_empty_pieces_change_nothing(self):
        decoder = claude_gateway.EventDecoder()
        pieces = (b"", b'data: {"type":"a"}\r', b"", b"\n", b"", b"\r", b"", b"\n")
        self.assertEqual([event["type"] for piece in pieces for event in decoder.feed(piece)], ["a"])

    def test_what_is_no_event_of_the_api_is_the_upstreams_fault(self):
        for data in (b"data: {oops\n\n", b"data: []\n\n", b'data: {"a": 1}\n\n', b'data: {"type": 1}\n\n',
                     b'data: "\xff"\n\n', b"data:\n\n"):
            with self.subTest(data=data):
                decoder = claude_gateway.EventDecoder()
                good = b'data: {"type":"a"}\n\n'
                self.assertEqual(events_until_fault(decoder, good + data + good), ([{"type": "a"}], True))

    def test_an_event_without_end_is_a_fault_of_the_upstream(self):
        much = b"x" * 999_990
        for name, piece in (("a line", much), ("data lines", b"data: " + much + b"\n"),
                            ("comments", b": " + much + b"\n\n"), ("fields", b"id: 1\n\n" + much)):
            with self.subTest(name):
                decoder = claude_gateway.EventDecoder()
                self.assertEqual(len(list(decoder.feed(b'data: {"type":"a"}\n\n' * 3))), 3)
                with self.assertRaisesRegex(claude_gateway.UpstreamFault, "more than 32000000 bytes"):
                    for _ in range(40):
                        self.assertEqual(list(decoder.feed(piece)), [])

    def test_events_may_be_large_and_many_together(self):
        decoder = claude_gateway.EventDecoder()
        large = b'data: {"type":"a","x":"%s"}\n\n' % (b"x" * 20_000_000)
        for _ in range(2):
            for at in range(0, len(large), 4_000_000):
                events = list(decoder.feed(large[at:at + 4_000_000]))
            self.assertEqual([event["type"] for event in events], ["a"])

    def test_an_event_nested_without_end_is_a_fault_of_the_upstream(self):
        with self.assertRaises(claude_gateway.UpstreamFault):
            claude_gateway.json_object_from(b"[" * 200_000, event=True)


class BareJsonTests(GatewayTestCase):
    """A JSON object alone, cut out of whatever Claude puts around it."""
    CASES = (
        ('{"a": 1}', '{"a": 1}'), ('  {"a": 1}\n', '{"a": 1}'), ("```json\n{}\n```", "{}"),
        ('Sure: {"a": {"b": [1, {"c": 2}]}} {"d": 3}', '{"a": {"b": [1, {"c": 2}]}}'),
        ('{"a": "}"}x', '{"a": "}"}'), ('{"a": "\\"}"}x', '{"a": "\\"}"}'), ('{"a": "\\\\"}x', '{"a": "\\\\"}'),
        ('{"a": "\\\\\\"}"} x', '{"a": "\\\\\\"}"}'), ('{"{": "["}]', '{"{": "["}'),
        ('x {"a": [1, 2', '{"a": [1, 2'), ("no object [1]", "no object [1]"), ("", ""), ("{", "{"),
        ('"quoted" {"a": 1}', '{"a": 1}'), ("it's {\n}", "{\n}"),
    )

    def test_any_cut_into_three_gives_the_same_object(self):
        for said_text, wanted in self.CASES:
            for first in range(len(said_text) + 1):
                for second in range(first, len(said_text) + 1):
                    with self.subTest(said=said_text, first=first, second=second):
                        cut = claude_gateway.BareJson()
                        pieces = [cut.feed(said_text[:first]), cut.feed(said_text[first:second]),
                                  cut.feed(said_text[second:])]
                        self.assertEqual("".join(pieces) + cut.close(), wanted)

    def test_a_brace_amid_the_talk_is_no_object(self):
        for size in (1, 2, 100):
            cut = claude_gateway.BareJson()
            said_text = 'As {name} asked, {so to say}: {"a": 1} bye'
            pieces = [cut.feed(said_text[at:at + size]) for at in range(0, len(said_text), size)]
            self.assertEqual("".join(pieces) + cut.close(), '{"a": 1}')

    def test_what_belongs_to_the_object_is_sent_at_once(self):
        cut = claude_gateway.BareJson()
        self.assertEqual([cut.feed(piece) for piece in ('x {"a"', ": 1", "}", "y")], ['{"a"', ": 1", "}", ""])

    def test_json_mode_gives_it_in_messages_and_streams(self):
        for said_text, wanted in (('Here you are:\n```json\n{"a": "}"}\n```', '{"a": "}"}'), ("I won't.", "I won't.")):
            whole = message(thinking("{", "c2ln"), text(said_text))
            self.claude.play(whole, whole)
            plain = self.chat(response_format={"type": "json_object"})
            self.assertEqual((plain.message["content"], plain.message["reasoning_content"]), (wanted, "{"))
            streamed = self.chat(stream=True, response_format={"type": "json_object"})
            self.assertEqual(completion_from_chunks(streamed.chunks)["message"]["content"], wanted)
            self.claude.play(whole)
            response = self.ask("POST", "/v1/responses", {"model": "opus", "input": "Hi", "text": {
                "format": {"type": "json_object"}}}).json
            self.assertEqual(response["output"][-1]["content"][0]["text"], wanted)

    def test_an_object_that_a_pause_interrupts_is_cut_out_whole(self):
        for stream in (False, True):
            self.claude.play(message(text('Well: {"a'), WEB_FIND, WEB_FOUND, stop_reason="pause_turn"),
                             message(text('": 1} bye')))
            answer = self.chat(stream=stream, response_format={"type": "json_object"}, web_search_options={},
                               stream_options={"include_usage": True})
            parts = completion_from_chunks(answer.chunks) if stream else completion_parts(answer.json)
            self.assertEqual(parts["message"]["content"], '{"a": 1}')
            self.assertEqual(parts["usage"]["prompt_tokens"], 2 * message()["usage"]["input_tokens"])

    def test_without_json_mode_nothing_is_cut(self):
        self.claude.play(message(text('Here: {"a": 1} bye')))
        self.assertEqual(self.chat().message["content"], 'Here: {"a": 1} bye')


# ---- Replies -----------------------------------------------------------------------------------------

WEB_FIND = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "sky"}}
WEB_FOUND = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [
    {"type": "web_search_result", "url": "https://example.org", "title": "T", "encrypted_content": "e",
     "page_age": None}]}


def web_citation(url: str, title="A page") -> dict:
    return {"type": "web_search_result_location", "url": url, "title": title, "cited_text": "c", "encrypted_index": "i"}


def cited_text(words: str, *citations: dict) -> dict:
    return {"type": "text", "text": words, "citations": list(citations)}


def url_note(start: int, end: int, url: str, title: str = "A page") -> dict:
    """An annotation of a chat message."""
    return {"type": "url_citation", "url_citation": {"start_index": start, "end_index": end, "url": url,
                                                     "title": title}}


class ReplyShapeTests(GatewayTestCase):
    """What a chat completion and its stream look like."""

    def both(self, whole: dict, **fields) -> list:
        """The same answer as a completion and as a stream, each reduced to its parts."""
        self.claude.play(whole, whole)
        plain = self.chat(**fields)
        streamed = self.chat(stream=True, stream_options={"include_usage": True}, **fields)
        self.assertEqual((plain.status, streamed.status, streamed.events[-1]), (200, 200, "[DONE]"), plain.raw)
        return [completion_parts(plain.json), completion_from_chunks(streamed.chunks)]

    def test_a_completion_has_the_documented_keys_and_no_others(self):
        completion = self.chat().json
        self.assertEqual(sorted(completion), ["choices", "created", "id", "model", "object", "usage"])
        self.assertEqual(sorted(completion["choices"][0]), ["finish_reason", "index", "logprobs", "message"])
        self.assertEqual(sorted(completion["choices"][0]["message"]), ["content", "refusal", "role"])
        self.assertLess(abs(completion["created"] - time.time()), 60)
        self.assertNotEqual(completion["id"], self.chat().json["id"])

    def test_calls_decide_the_finish_reason_unless_the_answer_was_cut_or_refused(self):
        call = tool_use("toolu_1", "f", {})
        for blocks, stop_reason, reason in (
            ([call], "tool_use", "tool_calls"), ([call], "end_turn", "tool_calls"),
            ([call], "stop_sequence", "tool_calls"), ([call], "something_new", "tool_calls"),
            ([call], "max_tokens", "length"), ([call], "model_context_window_exceeded", "length"),
            ([call], "refusal", "content_filter"), ([text("x")], "tool_use", "stop"), ([], "end_turn", "stop"),
            ([text("x")], "compaction", "stop"), ([text("x"), call], "end_turn", "tool_calls"),
        ):
            with self.subTest(stop_reason=stop_reason, blocks=blocks):
                for parts in self.both(message(*blocks, stop_reason=stop_reason)):
                    self.assertEqual(parts["finish_reason"], reason)

    def test_blocks_that_no_client_knows_stay_invisible(self):
        hidden = [{"type": "redacted_thinking", "data": "ZGF0YQ"}, WEB_FIND, WEB_FOUND,
                  {"type": "something_new", "text": "secret", "input": {}}, thinking("", "c2ln")]
        for parts in self.both(message(*hidden, text("Hi"))):
            self.assertEqual(parts["message"], {"role": "assistant", "content": "Hi"})
            self.assertEqual(parts["finish_reason"], "stop")

    def test_thinking_goes_into_reasoning_content_and_never_into_content(self):
        for parts in self.both(message(thinking("First. ", "c2ln"), text("A"), thinking("Then.", "c2l2"), text("B"))):
            self.assertEqual(parts["message"], {"role": "assistant", "content": "AB",
                                                "reasoning_content": "First. Then."})

    def test_a_call_without_arguments_has_an_empty_object(self):
        whole = message(tool_use("toolu_1", "f", {}))
        bare_call = [event for event in events_of(whole) if event["type"] != "content_block_delta"]
        for name, reply in (("no delta", one_by_one(*bare_call)), ("an empty delta", whole)):
            with self.subTest(name):
                for parts in self.both(reply):
                    self.assertEqual(parts["message"]["tool_calls"][0]["function"]["arguments"], "{}")

    def test_input_that_comes_whole_with_its_block_is_not_lost(self):
        blocks = [tool_use("toolu_1", "f", {"a": "\u00e9"}), text("Hi"), thinking("hm", "c2ln")]
        events = [dict(event, content_block=blocks[event["index"]]) if event["type"] == "content_block_start" else event
                  for event in events_of(message(*blocks)) if event["type"] != "content_block_delta"]
        for parts in self.both(one_by_one(*events)):
            self.assertEqual(json.loads(parts["message"]["tool_calls"][0]["function"]["arguments"]), {"a": "\u00e9"})
            self.assertEqual((parts["message"]["content"], parts["message"]["reasoning_content"]), ("Hi", "hm"))

    def test_usage_adds_up_and_holds_no_null(self):
        nothing = {"input_tokens": 0, "output_tokens": 0, "cache_read_input_tokens": None,
                   "cache_creation_input_tokens": None, "output_tokens_details": None, "server_tool_use": None}
        for usage, counts in (
            ({}, (12, 7, 19, 0, 0, 0)), (nothing, (0, 0, 0, 0, 0, 0)),
            ({"cache_read_input_tokens": 900, "cache_creation_input_tokens": 40, "output_tokens": 61,
              "output_tokens_details": {"thinking_tokens": 30}}, (952, 61, 1013, 900, 40, 30)),
            ({"output_tokens_details": {"thinking_tokens": None}}, (12, 7, 19, 0, 0, 0)),
        ):
            with self.subTest(usage=usage):
                prompt, completion, total, read, written, thought = counts
                for parts in self.both(message(text("Hi"), usage=usage)):
                    self.assertEqual(parts["usage"], {
                        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total,
                        "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
                        "completion_tokens_details": {"reasoning_tokens": thought},
                        "cache_read_input_tokens": read, "cache_creation_input_tokens": written})

    def test_later_counts_replace_earlier_ones_and_missing_ones_do_not(self):
        start = message(usage={"input_tokens": 5, "cache_read_input_tokens": 70, "output_tokens": 1})
        whole = one_by_one(
            {"type": "message_start", "message": start},
            {"type": "content_block_start", "index": 0, "content_block": text("")},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": None}, "usage": {"output_tokens": 20}},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"},
             "usage": {"output_tokens": 30, "input_tokens": 8, "cache_read_input_tokens": None}},
            {"type": "message_stop"})
        for parts in self.both(whole):
            self.assertEqual([parts["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")],
                             [78, 30, 108])
            self.assertEqual(parts["finish_reason"], "stop")

    def test_the_service_tier_is_told_in_openais_words_where_it_is_known(self):
        for theirs, ours in (("standard", "default"), ("priority", "priority"), (None, None), ("new", None)):
            with self.subTest(tier=theirs):
                whole = message(text("Hi"), usage={"service_tier": theirs})
                self.claude.play(whole, whole)
                self.assertEqual(self.chat().json.get("service_tier"), ours)
                self.assertEqual({chunk.get("service_tier") for chunk in self.chat(stream=True).chunks}, {ours})

    def test_annotations_stand_at_their_place_in_the_text_each_once(self):
        one, two = web_citation("https://a.example"), web_citation("https://b.example", None)
        paper = {"type": "page_location", "cited_text": "x", "document_index": 0, "document_title": "D",
                 "start_page_number": 1, "end_page_number": 2}
        whole = message(text("\U0001f600: "), cited_text("Blue", one, one, two), cited_text("!", paper),
                        cited_text("?", one))
        for parts in self.both(whole):
            self.assertEqual(parts["message"]["annotations"],
                             [url_note(3, 7, "https://a.example"),
                              url_note(3, 7, "https://b.example", "https://b.example"),
                              url_note(8, 9, "https://a.example")])

    def test_no_annotations_means_no_such_key(self):
        for parts in self.both(message(cited_text("x", {"type": "char_location", "cited_text": "x"}))):
            self.assertNotIn("annotations", parts["message"])

    def test_annotations_of_a_cut_out_object_stand_at_their_place_in_it(self):
        whole = message(text("Look: "), cited_text('{"a": 1}', web_citation("https://a.example")))
        for parts in self.both(whole, response_format={"type": "json_object"}):
            self.assertEqual(parts["message"]["content"], '{"a": 1}')
            self.assertEqual(parts["message"]["annotations"], [url_note(0, 8, "https://a.example")])

    def test_a_refusal_keeps_what_was_said_and_says_why(self):
        details = {"type": "refusal", "category": "cyber", "explanation": "I will not."}
        for parts in self.both(message(text("Well"), stop_reason="refusal", stop_details=details)):
            self.assertEqual(parts["message"], {"role": "assistant", "content": "Well", "refusal": "I will not."})
            self.assertEqual(parts["finish_reason"], "content_filter")
        for silent in (None, {"type": "refusal", "explanation": None}):
            for parts in self.both(message(stop_reason="refusal", stop_details=silent)):
                self.assertNotIn("refusal", parts["message"])

    def test_a_legacy_client_that_gets_two_calls_sees_the_first_one_whole(self):
        whole = message(tool_use("toolu_1", "f", {"a": 1}), tool_use("toolu_2", "g", {"b": 2}))
        functions = [{"name": name, "parameters": {"type": "object", "properties": {}}} for name in ("f", "g")]
        for parts in self.both(whole, functions=functions):
            self.assertEqual(parts["message"]["function_call"]["name"], "f")
            self.assertEqual(json.loads(parts["message"]["function_call"]["arguments"]), {"a": 1})
            self.assertEqual(parts["finish_reason"], "function_call")
            self.assertNotIn("tool_calls", parts["message"])
        self.claude.play(whole)
        deltas = [choice["delta"] for chunk in self.chat(functions=functions, stream=True).chunks
                  for choice in chunk["choices"] if not choice["finish_reason"]]
        self.assertNotIn({}, deltas)                    # nothing is told of the second call

    def test_a_forced_tool_of_a_model_that_refuses_force_is_handed_back_as_its_call(self):
        tool = {"type": "function", "function": {"name": "my.tool", "parameters": {
            "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}
        whole = message(thinking("hm", "c2ln"), text('{"a": 1}'))
        for choice in ("required", {"type": "function", "function": {"name": "my.tool"}}):
            with self.subTest(choice=choice):
                for parts in self.both(whole, tools=[tool], tool_choice=choice):
                    call = parts["message"]["tool_calls"][0]
                    self.assertEqual((call["type"], call["function"]),
                                     ("function", {"name": "my.tool", "arguments": '{"a": 1}'}))
                    self.assertTrue(call["id"])
                    self.assertEqual((parts["message"]["content"], parts["message"]["reasoning_content"],
                                      parts["finish_reason"]), ("", "hm", "tool_calls"))
        history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                   {"role": "tool", "tool_call_id": call["id"], "content": "done"}]
        sent = self.sent(messages=history, tools=[tool])
        self.assertEqual(bare(sent["messages"][2]["content"][0])["tool_use_id"], call["id"])

    def test_a_forced_custom_tool_is_handed_back_with_its_bare_string(self):
        tool = {"type": "custom", "custom": {"name": "shell"}}
        for parts in self.both(message(text('{"input": "ls -l"}')), tools=[tool], tool_choice="required"):
            call = parts["message"]["tool_calls"][0]
            self.assertEqual((call["type"], call["custom"]), ("custom", {"name": "shell", "input": "ls -l"}))
            self.assertNotIn("function", call)
            self.assertEqual(parts["finish_reason"], "tool_calls")

    def test_a_forced_legacy_function_is_handed_back_as_a_function_call(self):
        functions = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
        for parts in self.both(message(text('{"a": 1}')), functions=functions, function_call={"name": "f"}):
            self.assertEqual(parts["message"]["function_call"], {"name": "f", "arguments": '{"a": 1}'})
            self.assertEqual(parts["finish_reason"], "function_call")

    def test_a_forced_tool_that_claude_refuses_to_call_is_a_refusal_and_no_call(self):
        tool = {"type": "function", "function": {"name": "f"}}
        details = {"type": "refusal", "category": None, "explanation": "No."}
        for parts in self.both(message(stop_reason="refusal", stop_details=details), tools=[tool],
                               tool_choice="required"):
            self.assertNotIn("tool_calls", parts["message"])
            self.assertEqual((parts["finish_reason"], parts["message"]["refusal"]), ("content_filter", "No."))

    def test_custom_calls_beside_functions_keep_their_order_and_index(self):
        tools = [{"type": "custom", "custom": {"name": "c"}}, {"type": "function", "function": {"name": "f"}}]
        whole = message(text("x"), tool_use("toolu_1", "f", {"a": 1}), tool_use("toolu_2", "c", {"input": "s"}),
                        tool_use("toolu_3", "f", {}))
        for parts in self.both(whole, tools=tools):
            self.assertEqual([call["id"] for call in parts["message"]["tool_calls"]],
                             ["toolu_1", "toolu_2", "toolu_3"])
            self.assertEqual([call["type"] for call in parts["message"]["tool_calls"]],
                             ["function", "custom", "function"])

    def test_a_function_whose_name_a_custom_tool_could_have_is_none(self):
        whole = message(tool_use("toolu_1", "c", {"input": "s"}))
        for parts in self.both(whole, tools=[{"type": "function", "function": {"name": "c"}}]):
            self.assertEqual(parts["message"]["tool_calls"][0]["type"], "function")

    def test_functions_beside_tools_are_answered_as_tools(self):
        fields = {"functions": [{"name": "f", "parameters": {"type": "object"}}],
                  "tools": [{"type": "custom", "custom": {"name": "g"}}]}
        for parts in self.both(message(tool_use("toolu_1", "g", {"input": "x"})), **fields):
            self.assertEqual(parts["message"]["tool_calls"][0]["custom"], {"name": "g", "input": "x"})
            self.assertEqual(parts["finish_reason"], "tool_calls")


# ---- Streams -----------------------------------------------------------------------------------------

ENVELOPE_OF_TESTS = {"id": "chatcmpl-1", "created": 1}


def plan_with(**settings) -> claude_gateway.ReplyPlan:
    """A plan for the way back whose tools keep their names, but for one."""
    return claude_gateway.ReplyPlan(claude_gateway.ToolNames(["f", "my.tool"]), **settings)


def whole_and_chunks(events: list, plan, include_usage: bool = True) -> tuple:
    """The chat completion and the chunks that the same events make."""
    assembler, chunks = claude_gateway.MessageAssembler(), []
    planned = claude_gateway.PlannedEvents(plan, assembler)
    stream = claude_gateway.ChatStream(ENVELOPE_OF_TESTS, plan, planned.assembler, include_usage)
    feed = planned.then(stream.feed)
    for event in events:
        assembler.feed(event)
        chunks += feed(event)
    chunks += planned.finish(stream.feed) + stream.finish()
    completion = claude_gateway.chat_completion_from_message(planned.assembler.whole(), ENVELOPE_OF_TESTS, plan)
    return json.loads(json.dumps(completion)), json.loads(json.dumps(chunks))


# name -> message, plan: what Claude may say and how it was asked
ODD_TEXT = "caf\u00e9 \U0001f600 a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\r\nh\ti \\ \" {}"
SAYINGS = {
    "text": (message(text("Hello there")), plan_with()),
    "odd text": (message(text(ODD_TEXT)), plan_with()),
    "nothing": (message(), plan_with()),
    "two texts": (message(text("a"), text("b")), plan_with()),
    "thinking, text, calls": (message(thinking("hm\u2028", "c2ln"), text("A"),
                                      tool_use("toolu_1", "f", {"\u2029": "\u00e9"}),
                                      tool_use("toolu_2", "my_tool", {})), plan_with()),
    "hidden and interleaved thinking": (message(thinking("", "c2ln"), tool_use("toolu_1", "f", {"a": [1, 2.5, None]}),
                                                thinking("more", "c2l2"), tool_use("toolu_2", "f", {})), plan_with()),
    "redacted": (message({"type": "redacted_thinking", "data": "ZGF0YQ"}, text("B")), plan_with()),
    "search": (message(text("I look. "), WEB_FIND, WEB_FOUND, cited_text("Blue.", web_citation("https://a.example")),
                       text(" And "), cited_text("far.", web_citation("https://b.example", None))), plan_with()),
    "refusal": (message(text("Par"), stop_reason="refusal",
                        stop_details={"type": "refusal", "category": None, "explanation": "Not that."}), plan_with()),
    "refusal without words": (message(stop_reason="refusal", stop_details=None), plan_with()),
    "cut call": (message(tool_use("toolu_1", "f", {"a": "long"}), stop_reason="max_tokens"), plan_with()),
    "custom": (message(text("x"), tool_use("toolu_1", "c", {"input": "1 + \"1\"\n"}), tool_use("toolu_2", "f", {})),
               plan_with(custom_tools={"c"})),
    "custom, odd input": (message(tool_use("toolu_1", "c", {"text": "1"}), tool_use("toolu_2", "c", {})),
                          plan_with(custom_tools={"c"})),
    "legacy": (message(text("x"), tool_use("toolu_1", "my_tool", {"a": 1})), plan_with(legacy_functions=True)),
    "legacy, no arguments": (message(tool_use("toolu_1", "f", {})), plan_with(legacy_functions=True)),
    "forced": (message(thinking("hm", "c2ln"), text('{"a": "\u2028"}')), plan_with(forced_tool="my.tool")),
    "forced, cut": (message(text('{"a": '), stop_reason="max_tokens"), plan_with(forced_tool="f")),
    "forced, refused": (message(stop_reason="refusal", stop_details={"type": "refusal", "explanation": "No."}),
                        plan_with(forced_tool="f")),
    "forced custom": (message(text('{"input": "ls"}')), plan_with(forced_tool="c", custom_tools={"c"})),
    "forced legacy": (message(text('{"a": 1}')), plan_with(forced_tool="f", legacy_functions=True)),
    "JSON": (message(thinking("{}", "c2ln"), text('Here:\n```json\n{"a": "}\\""}\n```\nDone. {}')),
             plan_with(bare_json=True)),
    "JSON in two texts": (message(text("Here: "), text('{"a": [{}, "{"]} and more')), plan_with(bare_json=True)),
    "no JSON": (message(text("I would rather not.")), plan_with(bare_json=True)),
    "JSON and a call": (message(text("I look."), tool_use("toolu_1", "f", {})), plan_with(bare_json=True)),
}


class StreamShapeTests(GatewayTestCase):
    """The chunks one by one, as the strictest stream helpers want them."""

    def test_the_stream_adds_up_to_the_full_reply_for_every_cut_of_every_saying(self):
        for name, (whole, plan) in SAYINGS.items():
            for size in range(1, 1 + max([len(block.get("text", "")) for block in whole["content"]] + [8])):
                with self.subTest(name, size=size):
                    completion, chunks = whole_and_chunks(events_of(whole, size), plan)
                    self.assertEqual(completion_from_chunks(chunks), completion_parts(completion))

    def test_every_cut_of_the_bytes_gives_the_same_events(self):
        for name, (whole, _) in SAYINGS.items():
            data, events = sse(events_of(whole)), events_of(whole)
            for size in chain(range(1, 60), range(60, len(data), 97), [len(data)]):
                with self.subTest(name, size=size):
                    self.assertEqual(bytes_to_events(data, size), json.loads(json.dumps(events)))

    def test_a_block_that_the_end_cuts_short_is_the_same_in_a_stream(self):
        # max_tokens may end an answer inside a block, which then has no content_block_stop
        uses = (("f", tool_use("toolu_1", "f", {"a": 1})), ("no arguments", tool_use("toolu_1", "f", {})),
                ("custom", tool_use("toolu_1", "c", {"input": "s"})),
                ("cited", cited_text("Blue", web_citation("https://a.example"))))
        for name, block in uses:
            for plan in (plan_with(custom_tools={"c"}), plan_with(custom_tools={"c"}, legacy_functions=True)):
                if plan.legacy_functions and name == "custom":
                    continue                        # legacy clients have no custom tools
                with self.subTest(name, legacy=plan.legacy_functions):
                    events = [event for event in events_of(message(block, stop_reason="max_tokens"))
                              if event["type"] != "content_block_stop"]
                    completion, chunks = whole_and_chunks(events, plan)
                    self.assertEqual(completion_from_chunks(chunks), completion_parts(completion))

    def test_the_server_streams_what_the_translation_says(self):
        for name in ("odd text", "thinking, text, calls", "search", "refusal", "cut call"):
            whole = SAYINGS[name][0]
            data = sse(events_of(whole))
            for size in (1, 7, 64, len(data)):
                with self.subTest(name, size=size):
                    self.claude.play(FakeReply(pieces=[data[at:at + size] for at in range(0, len(data), size)]), whole)
                    streamed = completion_from_chunks(
                        self.chat(stream=True, stream_options={"include_usage": True}).chunks)
                    self.assertEqual(streamed, completion_parts(self.chat().json))

    def test_the_role_comes_first_and_once(self):
        for name, (whole, plan) in SAYINGS.items():
            with self.subTest(name):
                deltas = [choice["delta"] for chunk in whole_and_chunks(events_of(whole), plan)[1]
                          for choice in chunk["choices"]]
                self.assertEqual(deltas[0], {"role": "assistant", "content": ""})
                self.assertFalse([delta for delta in deltas[1:] if "role" in delta])

    def test_there_is_one_finish_chunk_and_it_is_empty_and_last(self):
        for name, (whole, plan) in SAYINGS.items():
            with self.subTest(name):
                chunks = whole_and_chunks(events_of(whole), plan, include_usage=False)[1]
                reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
                self.assertEqual([reason for reason in reasons[:-1] if reason is not None], [])
                self.assertTrue(reasons[-1])
                self.assertEqual(chunks[-1]["choices"][0]["delta"], {})

    def test_every_chunk_has_the_same_envelope(self):
        for name, (whole, plan) in SAYINGS.items():
            with self.subTest(name):
                for chunk in whole_and_chunks(events_of(whole), plan)[1]:
                    self.assertEqual((chunk["id"], chunk["object"], chunk["created"], chunk["model"]),
                                     ("chatcmpl-1", "chat.completion.chunk", 1, "claude-sonnet-5-5"))
                    self.assertIsInstance(chunk["choices"], list)
                    self.assertNotIn("error", chunk)

    def test_calls_are_counted_from_0_and_named_once(self):
        whole = message(thinking("hm", "c2ln"), text("x"), WEB_FIND, WEB_FOUND, tool_use("toolu_1", "f", {"a": 1}),
                        thinking("", "c2ln"), tool_use("toolu_2", "f", {"b": 2}))
        deltas = [choice["delta"]["tool_calls"][0] for chunk in whole_and_chunks(events_of(whole, 3), plan_with())[1]
                  for choice in chunk["choices"] if "tool_calls" in choice["delta"]]
        for position, call_id in enumerate(("toolu_1", "toolu_2")):
            first, *more = [delta for delta in deltas if delta["index"] == position]
            self.assertEqual(first, {"index": position, "id": call_id, "type": "function",
                                     "function": {"name": "f", "arguments": ""}})
            for delta in more:
                self.assertEqual((sorted(delta), list(delta["function"])), (["function", "index"], ["arguments"]))
        self.assertEqual({delta["index"] for delta in deltas}, {0, 1})

    def test_lists_in_deltas_come_in_one_chunk(self):
        # a second list of entries without an index is a RuntimeError in openai-python
        whole = SAYINGS["search"][0]
        chunks = whole_and_chunks(events_of(whole), plan_with())[1]
        holding = [chunk for chunk in chunks for choice in chunk["choices"] if "annotations" in choice["delta"]]
        self.assertEqual(len(holding), 1)

    def test_nothing_empty_is_sent_and_no_usage_but_the_one_asked_for(self):
        for name, (whole, plan) in SAYINGS.items():
            with self.subTest(name):
                chunks = whole_and_chunks(events_of(whole), plan, include_usage=False)[1]
                self.assertFalse([chunk for chunk in chunks if chunk.get("usage") or not chunk["choices"]])
                for chunk in chunks[1:]:
                    delta = chunk["choices"][0]["delta"]
                    for field_name in ("content", "reasoning_content", "refusal", "annotations"):
                        self.assertNotIn(delta.get(field_name, "absent"), ("", None, []))

    def test_the_usage_chunk_is_the_last_and_has_no_choice(self):
        answer = self.chat(stream=True, stream_options={"include_usage": True})
        self.assertEqual(answer.events[-1], "[DONE]")
        self.assertEqual((answer.chunks[-1]["choices"], answer.chunks[-1]["usage"]["total_tokens"]), ([], 19))
        for options in ({"include_usage": False}, {}, None, {"include_usage": None}):
            with self.subTest(options=options):
                self.assertNotIn(b'"total_tokens"', self.chat(stream=True, stream_options=options).raw)

    def test_a_whole_reply_is_no_stream_whatever_its_options_say(self):
        answer = self.chat(stream=False, stream_options={"include_usage": True})
        self.assertEqual((answer.json["object"], answer.headers["content-type"]), ("chat.completion",
                                                                                   "application/json"))

    def test_pings_do_not_reach_the_client(self):
        events = events_of(message(text("Hi")))
        pinged = [event for each in events for event in ({"type": "ping"}, each)]
        self.claude.play(one_by_one(*pinged))
        answer = self.chat(stream=True)
        self.assertNotIn(b"ping", answer.raw)
        self.assertEqual(completion_from_chunks(answer.chunks)["message"]["content"], "Hi")
        for line in answer.raw.decode().split("\n"):
            self.assertTrue(line == "" or line.startswith("data: "), line)

    def test_a_stream_says_that_it_is_one(self):
        headers = self.chat(stream=True).headers
        self.assertEqual(
            [headers.get(name) for name in ("content-type", "cache-control", "x-accel-buffering", "content-length",
                                            "transfer-encoding", "content-encoding")],
            ["text/event-stream; charset=utf-8", "no-cache", "no", None, "chunked", None])

    def test_the_upstream_is_always_asked_for_a_stream(self):
        for stream in (False, True, None):
            self.assertIs(self.sent(stream=stream)["stream"], True)

    def test_custom_calls_come_in_one_delta(self):
        whole, plan = SAYINGS["custom"]
        for size in (1, 5, 100):
            deltas = [choice["delta"]["tool_calls"] for chunk in whole_and_chunks(events_of(whole, size), plan)[1]
                      for choice in chunk["choices"] if "tool_calls" in choice["delta"]]
            self.assertEqual(deltas[0], [{"index": 0, "id": "toolu_1", "type": "custom",
                                          "custom": {"name": "c", "input": '1 + "1"\n'}}])
            self.assertEqual([delta[0]["index"] for delta in deltas[1:]], [1] * (len(deltas) - 1))

    def test_with_usage_the_other_chunks_have_none(self):
        self.claude.play(message(thinking("hm", "c2ln"), text("Hi"), tool_use("toolu_1", "f", {"a": 1})))
        chat = self.chat(stream=True, stream_options={"include_usage": True}, tools=[a_tool("f")])
        legacy = self.ask("POST", "/v1/completions", {"model": "opus", "prompt": "Once", "stream": True,
                                                      "stream_options": {"include_usage": True}})
        for chunks in (chat.chunks, legacy.chunks):
            self.assertEqual([chunk["usage"] for chunk in chunks[:-1]], [None] * (len(chunks) - 1))
            self.assertGreater(chunks[-1]["usage"]["total_tokens"], 0)
        self.assertFalse([chunk for chunk in self.chat(stream=True).chunks if "usage" in chunk])


class HotPathTests(unittest.TestCase):
    """What is done in a quicker way for nearly every event gives what the plain way gives."""
    TEXTS = ("", " ", "Hello", "Gr\u00fc\u00dfe \U0001f600", 'a "quoted" word', "back\\slash", "two\nlines\t",
             "\u2028\u2029\x85", "\ud800", "\x00\x1f\x7f", "}", '"}]', "\\u0041", "</script>", "x" * 10_000)

    def test_text_deltas_are_read_as_any_json(self):
        for words in self.TEXTS:
            event = {"type": "content_block_delta", "index": 3, "delta": {"type": "text_delta", "text": words}}
            for data in (json.dumps(event), json.dumps(event, separators=(",", ":")),
                         json.dumps(event, separators=(",", ":"))[:-1] + "      }",
                         json.dumps(event, ensure_ascii=False)):
                with self.subTest(data=data[:100]):
                    data = data.encode("utf-8", "surrogatepass")
                    try:
                        wanted = json.loads(data.decode("utf-8"))
                    except ValueError:
                        self.assertRaises(claude_gateway.UpstreamFault, claude_gateway.json_object_from, data)
                        continue
                    self.assertEqual(claude_gateway.json_object_from(data, event=True), wanted)

    def test_text_deltas_that_come_together_are_one_event_with_all_of_their_text(self):
        deltas = [{"type": "content_block_delta", "index": 3, "delta": {"type": "text_delta", "text": words}}
                  for words in self.TEXTS]
        stop = {"type": "content_block_stop", "index": 3}
        for as_ascii, padding in ((True, ""), (False, ""), (True, "   ")):
            frames = [b"event: content_block_delta\ndata: %s\n\n" % (json.dumps(event, ensure_ascii=as_ascii)[:-1] +
                      padding + "}").encode("utf-8", "replace") for event in deltas]
            wanted = "".join(json.loads(frame.split(b"data: ")[1].decode())["delta"]["text"] for frame in frames)
            data = b"".join(frames)
            for size in (1, 30, 100, 1_000, len(data) - 1, len(data)):
                with self.subTest(as_ascii=as_ascii, padding=padding, size=size):
                    decoder = claude_gateway.EventDecoder(joining=True)
                    self.assertEqual(list(decoder.feed(sse([{"type": "ping"}]))), [{"type": "ping"}])
                    events = [event for at in range(0, len(data), size) for event in decoder.feed(data[at:at + size])]
                    self.assertEqual({(event["type"], event["index"]) for event in events}, {(deltas[0]["type"], 3)})
                    self.assertEqual("".join(event["delta"]["text"] for event in events), wanted)
                    self.assertEqual(len(events) == 1, size == len(data))
                    self.assertEqual([*decoder.feed(sse([stop])), *decoder.close()], [stop])
            decoder = claude_gateway.EventDecoder(joining=True)         # also amid a read
            events = decoder.feed(sse([{"type": "ping"}]) + data + sse([stop]))
            self.assertEqual([event["type"] for event in events], ["ping", "content_block_delta", stop["type"]])

    def test_only_text_deltas_of_one_block_with_nothing_between_them_are_joined(self):
        def delta(words: str, block_index: int = 0) -> bytes:
            return sse([{"type": "content_block_delta", "index": block_index,
                         "delta": {"type": "text_delta", "text": words}}])
        thought = {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "b"}}
        for name, data, count in (("alone", delta("a") + delta("b"), 1), ("two blocks", delta("a") + delta("b", 1), 2),
                                  ("a ping", delta("a") + sse([{"type": "ping"}]) + delta("b"), 3),
                                  ("another kind", delta("a") + sse([thought]), 2),
                                  ("a comment", delta("a") + b": x\n\n" + delta("b"), 2),
                                  ("in CRLF", (delta("a") + delta("b")).replace(b"\n", b"\r\n"), 2),
                                  ("a number that is none", delta("a") + delta("b").replace(b":0,", b":00,"), 1),
                                  ("no JSON", delta("a") + delta("b").replace(b'"b"', b'"\\x"'), 1)):
            with self.subTest(name):
                plain, joining = claude_gateway.EventDecoder(), claude_gateway.EventDecoder(joining=True)
                self.assertEqual(list(joining.feed(b": the first read\n\n")), [])
                one_by_one, (events, faulty) = events_until_fault(plain, data), events_until_fault(joining, data)
                self.assertEqual(len(events), count)
                self.assertEqual(faulty, name in ("a number that is none", "no JSON"))
                if count > 1 or faulty:
                    self.assertEqual((events, faulty), one_by_one)

    def test_a_long_answer_of_joined_text_deltas_is_no_long_event(self):
        decoder = claude_gateway.EventDecoder(joining=True)
        data = sse([{"type": "content_block_delta", "index": 0,
                     "delta": {"type": "text_delta", "text": "x" * (claude_gateway.MAX_UPSTREAM_BODY // 4)}}])
        for half, count in [(data[:-9], 0), (data[-9:], 1)] * 6:
            self.assertEqual(len(list(decoder.feed(half))), count)

    def test_text_deltas_that_are_no_json_are_refused(self):
        good = b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}'
        for data in (good[:-1], good + b"}", good.replace(b"Hi", b"H\x01i"), good.replace(b"Hi", b'H"i'),
                     good.replace(b"Hi", b"H\\i"), good.replace(b"Hi", b"\xff"), good.replace(b":0,", b":,")):
            with self.subTest(data), self.assertRaises(claude_gateway.UpstreamFault):
                claude_gateway.json_object_from(data, event=True)

    def test_chunks_of_text_are_written_as_any_json(self):
        assembler = claude_gateway.MessageAssembler()
        for model in ("claude-sonnet-5-5", "", '"content":""'):
            stream = claude_gateway.ChatStream({"id": 'chatcmpl-"1"', "created": 5}, claude_gateway.ReplyPlan(
                claude_gateway.ToolNames()), assembler, True)
            start = events_of(message(text("x"), model=model))[0]
            assembler.feed(start)
            chunks = stream.feed(start)
            for words in self.TEXTS:
                chunks += stream.feed({"type": "content_block_start", "index": 0,
                                       "content_block": {"type": "text", "text": words}})
            chunks += [dict(chunks[0], choices=[], usage={}), dict(chunks[0], choices=[
                {"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}])]
            for chunk in chunks:
                with self.subTest(model=model, chunk=str(chunk)[:300]):
                    self.assertEqual(stream.event_bytes(chunk), claude_gateway.data_event(chunk))


def work_of(work) -> int:
    """How many functions, Python's own included, are called by some work: no clock, so the same each time."""
    count = [0]

    def on_call(frame, event, argument):
        count[0] += event in ("call", "c_call")
    sys.setprofile(on_call)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count[0]


class GrowthTests(unittest.TestCase):
    """Twice the work takes twice the steps, and memory goes by what is kept."""
    MODEL = BUILT_IN_MODELS["claude-opus-5-5"]

    def assert_linear(self, work, size: int = 60) -> None:
        work(size)                                      # what is made once is made now
        once, twice = work_of(lambda: work(size)), work_of(lambda: work(2 * size))
        self.assertGreater(once, size)
        self.assertLess(twice, 2.1 * once + 50)

    def chat(self, **fields) -> None:
        translation = claude_gateway.messages_request_from_chat(dict({"messages": [ASKED]}, **fields), self.MODEL)
        claude_gateway.messages_request_json(translation.request)

    def test_requests(self):
        def calls(count, **ids):
            return [{"id": ids.get("same", "call_%d" % at), "type": "function",
                     "function": {"name": "f %d" % at, "arguments": '{"a": 1'}} for at in range(count)]
        kinds = {
            "messages": lambda count: self.chat(messages=[ASKED, {"role": "assistant", "content": "Hm"}] * count),
            "system messages": lambda count: self.chat(messages=[ASKED, {"role": "system", "content": "Hm"}] * count),
            "calls of one turn": lambda count: self.chat(messages=[ASKED, {
                "role": "assistant", "tool_calls": calls(count)}]),
            "calls of one id": lambda count: self.chat(messages=[ASKED, {
                "role": "assistant", "tool_calls": calls(count, same="x")}] + [
                    {"role": "tool", "tool_call_id": "x", "content": "y"}] * count),
            "results without calls": lambda count: self.chat(messages=[ASKED] + [
                {"role": "tool", "tool_call_id": "x%d" % at, "content": "y"} for at in range(count)]),
            "turns with calls": lambda count: self.chat(messages=[ASKED] + [each for at in range(count) for each in (
                {"role": "assistant", "tool_calls": [dict(call, id="%d" % at) for call in calls(1)]},
                {"role": "tool", "tool_call_id": str(at), "content": "y"})]),
            "parts": lambda count: self.chat(messages=[{"role": "user", "content": [
                {"type": "text", "text": "Hm"}, {"type": "new", "x": 1}] * count}]),
            "tools": lambda count: self.chat(tools=[{"type": "function", "function": {
                "name": "f %d" % at, "strict": True, "parameters": {"type": "object"}}} for at in range(count)]),
            "properties": lambda count: self.chat(response_format={"type": "json_schema", "json_schema": {
                "name": "x", "schema": {"type": "object", "properties": {
                    "p%d" % at: {"type": "string", "minLength": 1} for at in range(count)}}}}),
            "unknown fields": lambda count: self.chat(**{"field_%d" % at: 1 for at in range(count)}),
            "items": lambda count: claude_gateway.messages_request_from_responses({"input": [
                {"type": "message", "role": "user", "content": "Hm"},
                {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"}] * count}, self.MODEL),
        }
        for name, work in kinds.items():
            with self.subTest(name):
                self.assert_linear(work)

    def test_the_citations_of_a_block_are_all_kept_in_their_order(self):
        cited = [{"type": "web_search_result_location", "url": "https://%d.example" % at} for at in range(5)]
        for first in ({}, {"citations": None}, {"citations": cited[:2]}):
            with self.subTest(first):
                assembler = claude_gateway.MessageAssembler()
                given = dict({"type": "text", "text": ""}, **first)
                untouched = json.loads(json.dumps(given))
                for event in ({"type": "message_start", "message": {}},
                              {"type": "content_block_start", "index": 0, "content_block": given},
                              *({"type": "content_block_delta", "index": 0, "delta": {
                                  "type": "citations_delta", "citation": each}}
                                for each in cited[len(first.get("citations") or ()):]),
                              {"type": "content_block_stop", "index": 0}):
                    assembler.feed(event)
                self.assertEqual(assembler.message["content"][0]["citations"], cited)
                self.assertEqual(given, untouched)
        for odd in (5, "abc", {"a": 1}, True):
            with self.subTest(odd):
                assembler = claude_gateway.MessageAssembler()
                assembler.feed({"type": "message_start", "message": {}})
                self.assertRaises(claude_gateway.UpstreamFault, assembler.feed, {
                    "type": "content_block_start", "index": 0, "content_block": {
                        "type": "text", "text": "", "citations": odd}})

    def test_streams(self):
        def streamed(kind, content, plan):
            def work(count):
                assembler = claude_gateway.MessageAssembler()
                planned = claude_gateway.PlannedEvents(plan, assembler)
                stream = kind({"id": "x", "created": 1}, plan, planned.assembler, False)
                decoder, feed = claude_gateway.EventDecoder(), planned.then(stream.feed)
                for event in events_of(message(*content(count)), 1):
                    for each in decoder.feed(sse([event])):
                        assembler.feed(each)
                        feed(each)
                planned.finish(stream.feed)
                stream.finish()
            return work
        contents = {"text": lambda count: [text("x" * count)], "blocks": lambda count: [text("x")] * count,
                    "arguments": lambda count: [tool_use("toolu_1", "f", {"a": "x" * count})],
                    "calls": lambda count: [tool_use("toolu_%d" % at, "f", {"a": 1}) for at in range(count)]}
        for kind in (claude_gateway.ChatStream, claude_gateway.ResponseStream):
            for name, content in contents.items():
                for plan in (claude_gateway.ReplyPlan(claude_gateway.ToolNames()), plan_with(bare_json=True)):
                    with self.subTest(kind=kind.__name__, content=name, plan=plan):
                        self.assert_linear(streamed(kind, content, plan))


# ---- Responses API -----------------------------------------------------------------------------------

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
        self.assertEqual([block["type"] for block in request["messages"][1]["content"]],
                         ["text", "tool_use", "tool_use"])
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

    def test_a_limit_of_tool_calls_is_one_of_searches(self):
        for fields, uses in (({"max_tool_calls": 2}, 2), ({"max_tool_calls": 20}, 20), ({}, 5)):
            request = self.became(tools=[{"type": "web_search"}], **fields)
            self.assertEqual(request["tools"][0]["max_uses"], uses)
        for tools in ([{"type": "function", "name": "f"}], []):
            answer = self.respond(tools=tools, max_tool_calls=2)
            self.assertEqual(answer.headers["x-claude-gateway-changes"], "dropped=max_tool_calls")

    def test_the_sources_of_a_search_come_where_they_are_asked_for(self):
        for include, sources in ((["web_search_call.action.sources"], True), (None, None)):
            for stream in (False, True):
                with self.subTest(include=include, stream=stream):
                    self.claude.play(message(text("I look."), WEB_FIND, WEB_FOUND, text("Blue.")))
                    answer = self.respond(tools=[{"type": "web_search"}], include=include, stream=stream)
                    output = answer.chunks[-1]["response"]["output"] if stream else answer.json["output"]
                    self.assertEqual([item["type"] for item in output], ["message", "web_search_call", "message"])
                    self.assertEqual(output[1]["action"].get("sources"), sources and [
                        {"type": "url", "url": found["url"]} for found in WEB_FOUND["content"]])
                    self.assertEqual(output[1]["status"], "completed")

    def test_calls_that_the_output_limit_cut_are_incomplete(self):
        tools = [{"type": "function", "name": "f"}, PATCH_TOOL]
        for name, whole, cut_at, field_name, expected in (
            ("f", '{"path": "a.txt", "n": 1}', 14, "arguments", '{"path": "a.tx'),
            ("apply_patch", '{"input": "*** Begin\\nok \\u00e9!"}', 25, "input", "*** Begin\nok "),
            ("apply_patch", '{"input": "*** Begin\\nok \\u00e9!"}', 28, "input", "*** Begin\nok "),
            ("apply_patch", '{"input": "*** Begin\\nok \\u00e9!"}', 31, "input", "*** Begin\nok \u00e9"),
        ):
            start = {"type": "tool_use", "id": "toolu_1", "name": name, "input": {}}
            events = [*events_of(message())[:1], {"type": "content_block_start", "index": 0, "content_block": start},
                      {"type": "content_block_delta", "index": 0,
                       "delta": {"type": "input_json_delta", "partial_json": whole[:cut_at]}},
                      {"type": "content_block_stop", "index": 0},
                      *events_of(message(stop_reason="max_tokens"))[-2:]]
            for stream in (False, True):
                for stopped in (events, events[:3] + events[4:]):
                    with self.subTest(name=name, cut_at=cut_at, stream=stream, count=len(stopped)):
                        self.claude.play(one_by_one(*stopped))
                        answer = self.respond(tools=tools, stream=stream)
                        item = (answer.chunks[-1]["response"] if stream else answer.json)["output"][0]
                        self.assertEqual((item["status"], item[field_name]), ("incomplete", expected))
        self.claude.play(message(tool_use("toolu_1", "f", {})))
        self.assertEqual(self.respond(tools=tools).json["output"][0]["status"], "completed")

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

    def test_every_field_of_every_wrong_type_is_a_400_that_names_it(self):
        """Or is taken for what it plainly means, as a number in a string is; never anything else."""
        for name in sorted(set(claude_gateway.PARAMETERS) - {"model", "input", "messages"}):
            for value in (5, -1.5, "text", True, [], [1], {}, {"a": [1]}, [[]]):
                with self.subTest(name=name, value=value):
                    answer = self.respond(**{name: value})
                    if answer.status != 200:
                        self.assertEqual(answer.status, 400, answer.raw)
                        self.assertTrue(answer.error["param"].startswith(name), answer.raw)

    def test_a_wrong_item_is_named_by_its_path(self):
        for item, path in (({"type": "function_call", "call_id": 5, "name": "f"}, "input[1].call_id"),
                           ({"type": "function_call", "call_id": "a"}, "input[1].name"),
                           ({"role": "user", "content": [{"type": "input_text", "text": 5}]},
                            "input[1].content[0].text"),
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
                self.assertEqual((response["status"], response["incomplete_details"]),
                                 ("incomplete", {"reason": reason}))
                self.assertEqual(self.respond(stream=True).chunks[-1]["type"], "response.incomplete")

    def test_a_refusal_that_explains_itself_is_a_refusal_part(self):
        self.claude.play(message(stop_reason="refusal", stop_details={
            "type": "refusal", "category": "cyber", "explanation": "Not that."}))
        response = self.respond().json
        self.assertEqual(response["output"][-1]["content"], [{"type": "refusal", "refusal": "Not that."}])

    def test_a_failure_amid_the_stream_has_the_code_that_clients_act_on(self):
        for kind, words, code in (("overloaded_error", "Overloaded", "server_is_overloaded"),
                                  ("rate_limit_error", "Slow down", "rate_limit_exceeded"),
                                  ("invalid_request_error", "Output blocked by content filtering policy",
                                   "invalid_prompt"),
                                  ("api_error", "Oops", "server_error")):
            with self.subTest(kind=kind):
                start = sse(events_of(message(text("Hello there")))[:4])
                self.claude.play(FakeReply(pieces=[start, sse([dict(error_body(kind, words))])]))
                last = self.respond(stream=True).chunks[-1]
                self.assertEqual((last["type"], last["response"]["error"]["code"]), ("response.failed", code))
                self.assertEqual(last["response"]["error"]["message"], words)

    def test_encrypted_reasoning_goes_out_and_comes_back_as_it_was(self):
        asked = {"include": ["reasoning.encrypted_content"], "store": False,
                 "tools": [{"type": "function", "name": "f"}]}
        self.claude.play(message(thinking("", "c2lnbmVk"), tool_use("toolu_1", "f", {})))
        output = self.respond(**asked).json["output"]
        self.assertEqual([item["type"] for item in output], ["reasoning", "function_call"])
        reasoning = dict(output[0], content=None)
        request = self.became([{"role": "user", "content": "Hello"}, reasoning, output[1], {
            "type": "function_call_output", "call_id": "toolu_1", "output": "ok"}], **asked)
        self.assertEqual(request["messages"][1]["content"][0],
                         {"type": "thinking", "thinking": "", "signature": "c2lnbmVk"})

    def test_foreign_and_damaged_reasoning_is_left_out(self):
        made_up = [claude_gateway.OUR_ENCODING + base64.urlsafe_b64encode(words).decode() for words in (
            b"[" * 200_000, b"[1]", b'{"thinking": 5, "signature": "c2ln"}', b"1" * 5_000, b"\xed\xa0\x80", b"{")]
        for content in ("gAAAAABforeign", "claude-gateway-1.!!!", "claude-gateway-1.bm90IGpzb24=", None, *made_up):
            with self.subTest(content=str(content)[:50]):
                request = self.became([{"role": "user", "content": "Hello"},
                                       {"type": "reasoning", "summary": [], "encrypted_content": content},
                                       {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "More"}])
                self.assertEqual(request["messages"][1],
                                 {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]})

    def test_a_responses_body_at_the_chat_door_is_answered_as_a_chat_completion(self):
        answer = self.ask("POST", "/v1/chat/completions", {"model": "opus", "input": "Hello", "instructions": "Short"})
        self.assertEqual(answer.message["content"], "Hello!")
        stream = self.ask("POST", "/v1/chat/completions", {"model": "opus", "input": "Hello", "stream": True})
        self.assertEqual(stream.events[-1], "[DONE]")

    def test_a_chat_body_at_the_responses_door_is_answered_as_a_response(self):
        answer = self.ask("POST", "/v1/responses", {"model": "opus", "messages": [{"role": "user", "content": "Hi"}]})
        self.assertEqual(answer.json["output"][0]["content"][0]["text"], "Hello!")

    def test_half_a_character_in_packed_thinking_is_replaced(self):
        packed = base64.urlsafe_b64encode(b'{"thinking": "\\ud800", "signature": "c2ln"}').decode()
        self.assertEqual(claude_gateway.value_from_encrypted(claude_gateway.OUR_ENCODING + packed),
                         {"thinking": "\ufffd", "signature": "c2ln"})


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
        item, = items["data"]
        self.assertEqual({name: item[name] for name in ("type", "role", "content")}, {
            "type": "message", "role": "user", "content": [{"type": "input_text", "text": "First"}]})
        self.assertTrue(item["id"].startswith("msg_"))
        self.assertEqual((items["first_id"], items["last_id"]), (item["id"], item["id"]))
        self.assertEqual(self.ask("DELETE", path).json["deleted"], True)
        self.assertEqual((self.ask("GET", path).status, self.ask("DELETE", path).status), (404, 404))

    def test_listed_items_have_types_ids_and_content_parts(self):
        given = [{"role": "user", "content": "A", "id": None}, {"role": "assistant", "content": "B"},
                 {"type": "message", "id": "msg_mine", "role": "user",
                  "content": [{"type": "input_text", "text": "C"}]}]
        response = self.ask("POST", "/v1/responses", {"model": "sonnet", "input": given}).json
        listed = self.ask("GET", "/v1/responses/%s/input_items" % response["id"]).json["data"]
        self.assertEqual([item["type"] for item in listed], ["message"] * 3)
        self.assertEqual([item["content"][0] for item in listed], [
            {"type": "input_text", "text": "C"},
            {"type": "output_text", "text": "B", "annotations": [], "logprobs": []},
            {"type": "input_text", "text": "A"}])
        self.assertEqual(len({item["id"] for item in listed}), 3)
        self.assertTrue(all(item["id"].startswith("msg_") for item in listed), listed)
        self.assertEqual(listed[0]["id"], "msg_mine")

    def test_a_streamed_response_is_there_before_its_end_is_told(self):
        events = self.respond(stream=True).chunks
        self.assertEqual(self.ask("GET", "/v1/responses/" + events[-1]["response"]["id"]).status, 200)

    def test_store_false_keeps_nothing(self):
        for store, status in ((False, 404), ("false", 404), ("False", 404), ("true", 200), (True, 200), (None, 200)):
            with self.subTest(store=store):
                response = self.respond(store=store).json
                self.assertEqual(self.ask("GET", "/v1/responses/" + response["id"]).status, status)

    def test_what_is_stored_takes_the_room_of_its_utf_8(self):
        stored = claude_gateway.StoredResponses()
        stored.put("", {"id": "resp_1"}, [{"content": "\U0001f600" * 6_000_000}])     # 24 MB; 72 MB as escapes
        self.assertIsNotNone(stored.get("", "resp_1"))
        odd = [{"content": "half a pair: \ud83d, caf\u00e9, \u2028"}]
        stored.put("", {"id": "resp_2"}, odd)
        self.assertEqual(stored.get("", "resp_2"), ({"id": "resp_2"}, odd, []))

    def test_another_clients_key_finds_nothing(self):
        self.start(api_key=("first-key", "second-key"))
        body = {"model": "opus", "input": "Hello"}
        mine = self.ask("POST", "/v1/responses", body, {"authorization": "Bearer first-key"}).json
        continued = dict(body, previous_response_id=mine["id"])
        same = self.ask("POST", "/v1/responses", continued, {"authorization": "Bearer first-key"})
        self.assertEqual(same.status, 200)
        other = self.ask("POST", "/v1/responses", continued, {"authorization": "Bearer second-key"})
        self.assertEqual((other.status, other.error["code"]), (400, "previous_response_not_found"))

    def test_the_oldest_goes_when_there_are_too_many(self):
        stored = claude_gateway.StoredResponses()
        for at in range(1_001):
            stored.put("", {"id": "resp_%d" % at}, [])
        self.assertIsNone(stored.get("", "resp_0"))
        self.assertIsNotNone(stored.get("", "resp_1000"))

    def test_input_tokens_are_counted_by_claude(self):
        answer = self.ask("POST", "/v1/responses/input_tokens",
                          {"model": "opus", "input": "Hello", "instructions": "Hi"})
        self.assertEqual(answer.json, {"object": "response.input_tokens", "input_tokens": 11})
        counted = self.claude.requests[-1].body
        self.assertEqual(set(counted), {"model", "messages", "system", "thinking"})

    def test_cancelling_is_refused_with_the_reason(self):
        response = self.respond("Hello").json
        answer = self.ask("POST", "/v1/responses/%s/cancel" % response["id"], {})
        self.assertEqual(answer.status, 400)
        self.assertIn("background", answer.error["message"])
        self.assertEqual(self.ask("POST", "/v1/responses/resp_1/cancel", {}).status, 404)

    def test_without_input_the_error_names_input(self):
        for path in ("/v1/responses", "/v1/responses/compact", "/v1/responses/input_tokens"):
            for body in ({"model": "opus"}, {"model": "opus", "input": None}):
                with self.subTest(path=path, body=body):
                    answer = self.ask("POST", path, body)
                    self.assertEqual((answer.status, answer.error["param"]), (400, "input"), answer.raw)

    def test_a_responses_body_at_the_other_door_keeps_what_it_continues(self):
        first = self.ask("POST", "/v1/responses", {"model": "opus", "input": "I am Bob"}).json
        asked = {"model": "opus", "input": "Who am I?", "previous_response_id": first["id"]}
        self.assertEqual(self.ask("POST", "/v1/chat/completions", asked).status, 200)
        self.assertIn("I am Bob", json.dumps(self.claude.messages[-1].body))
        answer = self.ask("POST", "/v1/chat/completions", dict(asked, previous_response_id="resp_none"))
        self.assertEqual((answer.status, answer.error["code"]), (400, "previous_response_not_found"))


class ItemReferenceTests(ResponsesTestCase):
    """`item_reference` stands for an item of a stored response: the AI SDK names every earlier answer so."""

    def answered(self, stream=False, **fields) -> list[dict]:
        """The output items of a response."""
        answer = self.respond(stream=stream, **fields)
        self.assertEqual(answer.status, 200, answer.raw)
        return answer.chunks[-1]["response"]["output"] if stream else answer.json["output"]

    def test_an_earlier_answer_named_by_its_id_is_a_turn_of_the_assistant(self):
        for stream in (False, True):
            for kind in ({"type": "item_reference"}, {}, {"type": None}):
                with self.subTest(stream=stream, kind=kind):
                    self.claude.play(message(text("Noted.")))
                    item, = self.answered(stream, given="Remember 4711.")
                    request = self.became([{"role": "user", "content": "Remember 4711."}, dict(kind, id=item["id"]),
                                           {"role": "user", "content": "Which number?"}])
                    self.assertEqual(request["messages"], [said("user", "Remember 4711."), said("assistant", "Noted."),
                                                           said("user", "Which number?")])

    def test_what_is_named_many_times_counts_like_a_body(self):
        self.start(limits=Limits(max_bodies=3_000_000))
        self.answered(given=[{"role": "user", "content": "x" * 50_000, "id": "msg_large"}])
        twice = [{"type": "item_reference", "id": "msg_large"}] * 2
        for given, status in ((twice, 200), (twice * 50, 503), (twice, 200)):
            self.assertTrue(self.service.gateway.running.wait_until_idle(30))
            self.assertEqual(self.respond(given).status, status)
        self.assertEqual(len(self.claude.messages), 3)
        self.assertTrue(self.service.gateway.running.wait_until_idle(30))
        self.assertTrue(self.service.gateway.body_budget.take(3_000_000), "all is given back")

    def test_in_a_tool_loop_signed_thinking_and_calls_come_back(self):
        tools = [{"type": "function", "name": "f"}]
        for stream in (False, True):
            with self.subTest(stream=stream):
                self.claude.play(message(thinking("hm", "c2ln"), text("I look."), tool_use("toolu_1", "f", {"a": 1})))
                output = self.answered(stream, given="Go", tools=tools)
                self.assertEqual([item["type"] for item in output], ["reasoning", "message", "function_call"])
                self.assertNotIn("encrypted_content", output[0])
                history = [{"role": "user", "content": "Go"}, *({"type": "item_reference", "id": item["id"]}
                                                                 for item in output)]
                request = self.became([*history, {"type": "function_call_output", "call_id": "toolu_1",
                                                  "output": "ok"}], tools=tools)
                self.assertEqual(request["messages"][1]["content"], [
                    thinking("hm", "c2ln"), text("I look."), tool_use("toolu_1", "f", {"a": 1})])

    def test_a_response_that_is_continued_keeps_its_signed_thinking(self):
        self.claude.play(message(thinking("hm", "c2ln"), text("Hi")))
        first = self.respond("One").json
        request = self.became("Two", previous_response_id=first["id"])
        self.assertEqual(request["messages"][1]["content"], [thinking("hm", "c2ln"), text("Hi")])
        self.assertNotIn("encrypted_content", json.dumps(self.ask("GET", "/v1/responses/" + first["id"]).json))

    def test_an_id_that_is_not_stored_here_is_a_400_that_names_it(self):
        for odd in ({"type": "item_reference"}, {"type": "item_reference", "id": 5}):
            self.assertEqual(self.respond([odd]).error["param"], "input[0].id")
        self.start(api_key=("first-key", "second-key"))
        body = {"model": "opus", "input": "Hello"}
        item = self.ask("POST", "/v1/responses", body, {"authorization": "Bearer first-key"}).json["output"][0]
        unstored = self.ask("POST", "/v1/responses", dict(body, store=False),
                            {"authorization": "Bearer first-key"}).json["output"][0]
        for key, item_id, status in (("first-key", item["id"], 200), ("second-key", item["id"], 400),
                                     ("first-key", unstored["id"], 400), ("first-key", "msg_nowhere", 400)):
            with self.subTest(key=key, item_id=item_id):
                answer = self.ask("POST", "/v1/responses", dict(body, input=[
                    {"role": "user", "content": "Hello"}, {"type": "item_reference", "id": item_id}, user("And?")]),
                    {"authorization": "Bearer " + key})
                self.assertEqual(answer.status, status, answer.raw)
                if status == 400:
                    self.assertEqual((answer.error["code"], answer.error["param"]), ("item_not_found", "input[1].id"))

    def test_an_item_that_a_client_named_itself_is_found(self):
        self.respond([{"type": "message", "id": "msg_mine", "role": "user", "content": "I am Bob."}])
        request = self.became([{"type": "item_reference", "id": "msg_mine"}, user("Who am I?")])
        self.assertEqual(request["messages"], [said("user", "I am Bob.", "Who am I?")])

    def test_the_items_of_a_deleted_response_are_gone_and_those_of_others_stay(self):
        mine = {"type": "message", "id": "msg_first", "role": "user", "content": "I am Bob."}
        first = self.respond([mine, {"role": "user", "content": "Hello"}]).json
        named = [{"type": "item_reference", "id": item["id"]} for item in (mine, *first["output"])]
        second = self.respond([*named, user("Who am I?")]).json
        for deleted, gone in ((second["id"], second["output"]), (first["id"], [mine, *first["output"]])):
            self.assertEqual(self.respond(named).status, 200)
            self.assertEqual(self.ask("DELETE", "/v1/responses/" + deleted).status, 200)
            for item in gone:
                answer = self.respond([{"type": "item_reference", "id": item["id"]}])
                self.assertEqual((answer.status, answer.error["code"]), (400, "item_not_found"))

    def test_what_continued_a_deleted_response_can_be_continued(self):
        first = self.respond("I am Bob.").json
        second = self.respond("Who am I?", previous_response_id=first["id"]).json
        self.assertEqual(self.ask("DELETE", "/v1/responses/" + first["id"]).status, 200)
        request = self.became("And?", previous_response_id=second["id"])
        self.assertEqual(request["messages"][0], said("user", "I am Bob."))


class InputItemListTests(ResponsesTestCase):
    def setUp(self):
        super().setUp()
        given = [{"type": "message", "id": "msg_%d" % at, "role": "user", "content": "Word"} for at in range(30)]
        self.path = "/v1/responses/%s/input_items" % self.respond(given).json["id"]

    def page(self, query: str) -> tuple:
        answer = self.ask("GET", self.path + "?" + query).json
        ids = [int(item["id"][len("msg_"):]) for item in answer["data"]]
        self.assertEqual((answer["first_id"], answer["last_id"]),
                         ("msg_%d" % ids[0], "msg_%d" % ids[-1]) if ids else ("", ""))
        return ids, answer["has_more"]

    def test_pages_go_by_order_limit_and_after(self):
        down = list(range(29, -1, -1))
        for query, page in (("", (down[:20], True)), ("limit=100", (down, False)), ("limit=30", (down, False)),
                            ("order=asc&limit=3", ([0, 1, 2], True)),
                            ("order=asc&limit=3&after=msg_2", ([3, 4, 5], True)),
                            ("after=msg_10", (down[20:], False)), ("after=msg_0", ([], False))):
            with self.subTest(query=query):
                self.assertEqual(self.page(query), page)

    def test_bad_values_are_a_400_that_names_them(self):
        for name, values in (("order", ("up", "")), ("limit", ("0", "101", "-1", "x", "1.5")),
                             ("include", ("reasoning",)), ("after", ("msg_none",))):
            for value in values:
                with self.subTest(name=name, value=value):
                    answer = self.ask("GET", "%s?%s=%s" % (self.path, name, value))
                    if value:
                        self.assertEqual((answer.status, answer.error["param"]), (400, name), answer.raw)

    def test_reasoning_shows_what_it_encrypts_only_where_that_is_included(self):
        self.claude.play(message(thinking("hm", "c2ln"), text("Hi")))
        first = self.respond("One").json
        second = self.respond("Two", previous_response_id=first["id"]).json
        for query, shown in (("", False), ("?include=reasoning.encrypted_content", True),
                             ("?include[]=reasoning.encrypted_content", True)):
            with self.subTest(query=query):
                items = self.ask("GET", "/v1/responses/%s/input_items%s" % (second["id"], query)).json["data"]
                reasoning, = [item for item in items if item["type"] == "reasoning"]
                self.assertEqual("encrypted_content" in reasoning, shown)


# What OpenAI's published schema requires of each object; `or_null` for what may be null.

def or_null(shape):
    """What the shape accepts, and null."""
    return lambda value, path: () if value is None else shape(value, path)


STATUS = word_of("in_progress", "completed", "incomplete", "failed", "searching")
URL_CITATION = tagged({"url_citation": {"url!": STRING, "title!": STRING, "start_index!": NATURAL,
                                        "end_index!": NATURAL}})
OUTPUT_TEXT = {"output_text": {"text!": STRING, "annotations!": array_of(URL_CITATION), "logprobs!": array_of(OBJECT)}}
REFUSAL_PART = {"refusal": {"refusal!": STRING}}
SUMMARY_PART = tagged({"summary_text": {"text!": STRING}})
CALLED = {"id!": STRING, "call_id!": STRING, "name!": STRING, "namespace": STRING}
OUTPUT_ITEMS = {
    "message": {"id!": STRING, "role!": word_of("assistant"), "status!": STATUS,
                "content!": array_of(tagged({**OUTPUT_TEXT, **REFUSAL_PART}))},
    "reasoning": {"id!": STRING, "summary!": array_of(SUMMARY_PART), "encrypted_content": STRING},
    "function_call": {**CALLED, "arguments!": STRING, "status!": STATUS},
    "custom_tool_call": {**CALLED, "input!": STRING},
    "web_search_call": {"id!": STRING, "status!": STATUS, "action!": OBJECT},
    "compaction": {"id!": STRING, "encrypted_content!": STRING},
}
COUNTS = {name + "!": NATURAL for name in ("input_tokens", "output_tokens", "total_tokens")}
USAGE_COUNTS = object_with({**COUNTS, "input_tokens_details!": object_with({"cached_tokens!": NATURAL,
                                                                     "cache_write_tokens!": NATURAL}),
                     "output_tokens_details!": object_with({"reasoning_tokens!": NATURAL})})


def echoed_tool(value, path):
    """A tool in a response; functions have all of their fields."""
    if value.get("type") == "function":
        yield from tagged({"function": {"name!": STRING, "description!": or_null(STRING), "strict!": or_null(BOOLEAN),
                                        "parameters!": or_null(OBJECT)}})(value, path)


RESPONSE = object_with({
    "id!": STRING, "object!": word_of("response"), "created_at!": INTEGER, "completed_at!": or_null(INTEGER),
    "status!": word_of("in_progress", "completed", "incomplete", "failed"),
    "incomplete_details!": or_null(object_with({"reason!": word_of("max_output_tokens", "content_filter")})),
    "error!": or_null(object_with({"code!": STRING, "message!": STRING})), "model!": STRING,
    "previous_response_id!": or_null(STRING), "instructions!": or_null(string_or(array_of(OBJECT))),
    "output!": array_of(tagged(OUTPUT_ITEMS)), "tools!": array_of(echoed_tool), "tool_choice!": string_or(OBJECT),
    "truncation!": word_of("auto", "disabled"), "parallel_tool_calls!": BOOLEAN, "text!": object_with({
        "format!": OBJECT, "verbosity": STRING}), "top_p!": NUMBER, "presence_penalty!": NUMBER,
    "frequency_penalty!": NUMBER, "top_logprobs!": INTEGER, "temperature!": NUMBER,
    "reasoning!": object_with({"effort!": or_null(STRING), "summary!": or_null(STRING)}),
    "usage!": or_null(USAGE_COUNTS),
    "max_output_tokens!": or_null(INTEGER), "max_tool_calls!": or_null(INTEGER), "store!": BOOLEAN,
    "background!": BOOLEAN, "service_tier!": STRING, "metadata!": map_of(STRING), "user!": or_null(STRING),
    "safety_identifier!": or_null(STRING), "prompt_cache_key!": or_null(STRING)})
IN_ITEM = {"sequence_number!": NATURAL, "output_index!": NATURAL, "item_id!": STRING}
IN_PART, IN_SUMMARY = {**IN_ITEM, "content_index!": NATURAL}, {**IN_ITEM, "summary_index!": NATURAL}
ITEM_EVENT = {"sequence_number!": NATURAL, "output_index!": NATURAL, "item!": tagged(OUTPUT_ITEMS)}
PART_EVENT = {**IN_PART, "part!": tagged({**OUTPUT_TEXT, **REFUSAL_PART})}
RESPONSE_EVENTS = tagged({"response." + name: fields for name, fields in {
    **dict.fromkeys(("created", "in_progress", "completed", "incomplete", "failed"),
                    {"sequence_number!": NATURAL, "response!": RESPONSE}),
    "output_item.added": ITEM_EVENT, "output_item.done": ITEM_EVENT,
    "content_part.added": PART_EVENT, "content_part.done": PART_EVENT,
    "output_text.delta": {**IN_PART, "delta!": STRING, "logprobs!": array_of(OBJECT)},
    "output_text.done": {**IN_PART, "text!": STRING, "logprobs!": array_of(OBJECT)},
    "output_text.annotation.added": {**IN_PART, "annotation_index!": NATURAL, "annotation!": URL_CITATION},
    "refusal.delta": {**IN_PART, "delta!": STRING}, "refusal.done": {**IN_PART, "refusal!": STRING},
    "reasoning_summary_part.added": {**IN_SUMMARY, "part!": SUMMARY_PART},
    "reasoning_summary_part.done": {**IN_SUMMARY, "part!": SUMMARY_PART},
    "reasoning_summary_text.delta": {**IN_SUMMARY, "delta!": STRING},
    "reasoning_summary_text.done": {**IN_SUMMARY, "text!": STRING},
    "function_call_arguments.delta": {**IN_ITEM, "delta!": STRING},
    "function_call_arguments.done": {**IN_ITEM, "arguments!": STRING, "name!": STRING},
    "custom_tool_call_input.delta": {**IN_ITEM, "delta!": STRING},
    "custom_tool_call_input.done": {**IN_ITEM, "input!": STRING},
    **dict.fromkeys(("web_search_call.in_progress", "web_search_call.searching", "web_search_call.completed",
                     "compaction.compacting"), IN_ITEM)}.items()})
LISTED_TEXT = {"input_text": {"text!": STRING}, "input_image": {"detail!": STRING, "image_url!": STRING},
               "input_file": {"file_data": STRING, "filename": STRING}}
LISTED_ITEM = tagged({
    **OUTPUT_ITEMS, "custom_tool_call": {**CALLED, "input!": STRING, "status!": STATUS},
    "message": {"id!": STRING, "role!": STRING, "status!": STATUS,
                "content!": array_of(tagged({**OUTPUT_TEXT, **REFUSAL_PART, **LISTED_TEXT}))},
    **dict.fromkeys(("function_call_output", "custom_tool_call_output"), {
        "id!": STRING, "call_id!": STRING, "status!": STATUS, "output!": string_or(array_of(tagged(LISTED_TEXT)))})})


def goes_on_from_a_compaction(messages: list) -> bool:
    return messages[0]["content"][0]["type"] == "compaction"


def response_problems(answer: Answer) -> list[str]:
    """What of a response, or of its events, is not as OpenAI's schema says."""
    if answer.raw.startswith(b"event:"):
        return [sentence for event in answer.chunks for sentence in RESPONSE_EVENTS(event, event["type"])]
    return list(RESPONSE(answer.json, ""))


class ResponseSchemaTests(ResponsesTestCase):
    SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "news"}}
    FOUND = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}

    def test_every_field_is_there_in_replies_and_events(self):
        patch = {"tools": [PATCH_TOOL]}
        function = {"tools": [{"type": "function", "name": "f", "parameters": None}, NAMESPACE]}
        for name, reply, fields in (
            ("text", message(text("Hi")), {}),
            ("cut text", message(text("Hi"), stop_reason="max_tokens"), {}),
            ("reasoning", message(thinking("hm", "c2ln"), text("Hi")), {"include": ["reasoning.encrypted_content"]}),
            ("hidden reasoning", message(thinking("", "c2ln"), text("Hi")),
             {"include": ["reasoning.encrypted_content"]}),
            ("call", message(tool_use("toolu_1", "f", {"a": 1})), function),
            ("custom call", message(tool_use("toolu_1", "apply_patch", {"input": "x"})), patch),
            ("search", message(self.SEARCH, self.FOUND, {"type": "text", "text": "See", "citations": [
                {"type": "web_search_result_location", "url": "https://a.example", "title": None}]}),
             {"tools": [{"type": "web_search"}]}),
            ("refusal", message(stop_reason="refusal", stop_details={"type": "refusal", "explanation": "No."}), {}),
            ("sent fields", message(text("Hi")), {
                "temperature": 1, "reasoning": {"effort": "low"}, "text": {"verbosity": "low"}, "user": "u",
                "metadata": {"a": "b"}, "instructions": "Be short"}),
        ):
            for stream in (False, True):
                with self.subTest(name, stream=stream):
                    self.claude.play(reply)
                    answer = self.respond("Hello", stream=stream, **fields)
                    self.assertEqual(answer.status, 200, answer.raw)
                    self.assertEqual(response_problems(answer), [])
        error = sse([error_body("overloaded_error", "Overloaded")])
        self.claude.play(FakeReply(pieces=[sse(events_of(message(text("Hello there")))[:4]), error]))
        self.assertEqual(response_problems(self.respond(stream=True)), [])

    def test_what_was_sent_comes_back(self):
        sent = {"prompt_cache_key": "k", "safety_identifier": "s", "max_tool_calls": 2, "presence_penalty": 0.5,
                "frequency_penalty": 0.25, "top_logprobs": 3, "max_output_tokens": 5000, "service_tier": "auto",
                "tool_choice": "auto", "parallel_tool_calls": False, "truncation": "auto", "store": False,
                "metadata": {"a": "b"}, "user": "u"}
        response = self.respond("Go on.", **sent, reasoning={"effort": "low"}, text={"verbosity": "low"}, tools=[
            {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}},
            {"type": "function", "name": "g", "strict": True, "description": "G"}]).json
        self.assertEqual({name: response[name] for name in sent}, sent)
        self.assertEqual(response["reasoning"], {"effort": "low", "summary": None})
        self.assertEqual(response["text"], {"format": {"type": "text"}, "verbosity": "low"})
        self.assertEqual([(tool["strict"], tool["description"]) for tool in response["tools"]],
                         [(False, None), (True, "G")])
        self.assertGreaterEqual(response["completed_at"], response["created_at"])

    def test_only_a_completed_response_has_the_time_of_its_end(self):
        self.claude.play(message(text("Half"), stop_reason="max_tokens"))
        self.assertIsNone(self.respond().json["completed_at"])
        events = self.respond(stream=True).chunks
        self.assertIsNone(events[0]["response"]["completed_at"])
        self.assertIsNotNone(events[-1]["response"]["completed_at"])

    def test_a_call_that_the_limit_cut_is_incomplete_and_shows_what_there_is(self):
        for tools, kind, name, shown in (
            ([{"type": "function", "name": "apply_patch"}], "function_call", "arguments", '{"input": "*** Be\\'),
            ([PATCH_TOOL], "custom_tool_call", "input", "*** Be"),
        ):
            for stopped in (True, False):
                with self.subTest(kind, stopped=stopped):
                    events = events_of(message(tool_use("toolu_1", "apply_patch", {}), stop_reason="max_tokens"))
                    start = next(at for at, event in enumerate(events) if event["type"] == "content_block_delta")
                    events[start]["delta"]["partial_json"] = '{"input": "*** Be\\'
                    if not stopped:
                        events = [event for event in events if event["type"] != "content_block_stop"]
                    self.claude.play(one_by_one(*events))
                    item, = self.respond(tools=tools).json["output"]
                    self.assertEqual((item["type"], item[name]), (kind, shown))
                    self.assertEqual(item.get("status", "incomplete"), "incomplete")

    def test_listed_input_items_have_every_field(self):
        image = {"type": "input_image", "image_url": "data:image/png;base64," + PIXEL}
        self.claude.play(message(thinking("hm", "c2ln"), text("Hi"), tool_use("toolu_1", "f", {})))
        fields = {"tools": [{"type": "function", "name": "f"}, PATCH_TOOL]}
        first = self.respond([{"role": "user", "content": [{"type": "input_text", "text": "A"}, image]}], **fields).json
        second = self.respond([
            {"type": "function_call_output", "call_id": "toolu_1", "output": [image]},
            {"role": "assistant", "content": "B"},
            {"type": "custom_tool_call", "call_id": "toolu_2", "name": "apply_patch", "input": "x"},
            {"type": "custom_tool_call_output", "call_id": "toolu_2", "output": "done"}, user("C"),
        ], previous_response_id=first["id"], **fields).json
        items = self.ask("GET", "/v1/responses/%s/input_items" % second["id"]).json["data"]
        self.assertEqual(len(items), 9)
        self.assertEqual([sentence for item in items for sentence in LISTED_ITEM(item, item["type"])], [])


class CompactionTests(ResponsesTestCase):
    """A conversation becomes one opaque item, on Claude's own compaction, and goes on from it."""
    TRIGGER = {"type": "compaction_trigger"}
    TOOLS = {"tools": [{"type": "function", "name": "f"}]}
    HISTORY = [{"role": "developer", "content": "Be exact."}, user("Find it."),
               {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
               {"type": "function_call_output", "call_id": "a", "output": "found"}, assistant("Here.")]
    SUMMARY_BLOCK = compaction("4 messages before this.", "claude-opus-5-5")

    def item(self, *history, **fields) -> dict:
        """The compaction item of a history."""
        answer = self.respond([*(history or self.HISTORY), self.TRIGGER], **fields)
        self.assertEqual(answer.status, 200, answer.raw)
        self.assertEqual(response_problems(answer), [])
        item, = answer.json["output"]
        return item

    def blocks(self, *given, **fields) -> list:
        """The types of the blocks that items become."""
        return [[block["type"] for block in turn["content"]] for turn in self.became(list(given), **fields)["messages"]]

    def test_a_trigger_is_answered_with_one_signed_item(self):
        for stream in (False, True):
            with self.subTest(stream=stream):
                answer = self.respond([*self.HISTORY, self.TRIGGER], stream=stream, **self.TOOLS)
                self.assertEqual(response_problems(answer), [])
                sent = self.claude.messages[-1]
                self.assertEqual(sent.body["compaction"], {"type": "summarize"})
                self.assertEqual(sent.headers["anthropic-beta"], "compact-2026-09-04")
                self.assertEqual([turn["role"] for turn in sent.body["messages"]],
                                 ["user", "assistant", "user", "assistant"])
                response = answer.chunks[-1]["response"] if stream else answer.json
                self.assertEqual([item["type"] for item in response["output"]], ["compaction"])
                self.assertEqual((response["usage"]["input_tokens"], response["usage"]["output_tokens"]), (900, 40))
                if stream:
                    self.assertEqual([event["type"][len("response."):] for event in answer.chunks], [
                        "created", "in_progress", "output_item.added", "compaction.compacting", "output_item.done",
                        "completed"])
                    self.assertEqual(answer.chunks[-2]["item"], response["output"][0])

    def test_no_mark_ends_what_ends_in_thinking(self):
        signed = {"type": "reasoning", "summary": [], "encrypted_content": claude_gateway.encrypted_from(
            thinking("hm", "sig"))}
        self.item(user("Find it."), signed)
        self.assertEqual(marks_of(self.claude.messages[-1].body), [("messages.0.0", "5m")])

    def test_the_item_replaces_what_came_before_it_on_any_instance(self):
        item = self.item(**self.TOOLS)
        self.start()                                # which has not made it
        before = [{"type": "item_reference", "id": "msg_of_another_instance"}, user("Before")]
        for given in ([item, user("Next")], [*self.HISTORY, item, user("Next")], [*before, item, user("Next")],
                      [dict(item, type="compaction_summary"), user("Next")]):
            with self.subTest(given=len(given)):
                request = self.became(given, **self.TOOLS)
                self.assertEqual(request["messages"], [
                    {"role": "assistant", "content": [self.SUMMARY_BLOCK]}, said("user", "Next")])
                self.assertEqual(self.claude.messages[-1].headers["anthropic-beta"], "compact-2026-09-04")
        request = self.became([*self.HISTORY, item, user("Next")], **self.TOOLS)
        self.assertEqual(request["system"], [text("Be exact.")])

    def test_tools_and_system_text_stay_in_front(self):
        tools = {"type": "additional_tools", "role": "developer", "tools": [PATCH_TOOL]}
        item = self.item(tools, *self.HISTORY)
        for given in ([tools, *self.HISTORY, item, user("Next")],
                      [item, self.HISTORY[0], tools, user("Next")]):
            request = self.became(given)
            self.assertEqual([tool["name"] for tool in request["tools"]], ["apply_patch"])
            self.assertEqual(request["system"], [text("Be exact.")])
            self.assertEqual(request["messages"][1:], [said("user", "Next")])

    def test_with_nothing_after_it_claude_is_asked_to_go_on(self):
        item = self.item(**self.TOOLS)
        self.assertEqual(self.blocks(user("Find it."), item), [["compaction"], ["text"]])
        self.assertEqual(self.blocks(item, assistant("Hm."), user("Next")),
                         [["compaction"], ["text"], ["text"], ["text"]])

    def test_of_several_the_newest_counts_and_can_be_compacted_again(self):
        first = self.item(**self.TOOLS)
        second = self.item(first, user("More"), assistant("Done."))
        self.assertEqual(self.blocks(first, user("More"), second, user("Next")), [["compaction"], ["text"]])
        self.assertIn("3 messages before", json.dumps(self.claude.messages[-1].body))

    def test_foreign_and_damaged_items_give_their_text_or_are_reported(self):
        broken_item = {"type": "compaction", "id": "cmp_1", "encrypted_content": "claude-gateway-1.!!!"}
        for item in ({"type": "compaction", "encrypted_content": "gAAAAforeign"}, broken_item,
                     {"type": "compaction"}, {"type": "compaction", "encrypted_content": 5},
                     dict(broken_item, encrypted_content=claude_gateway.encrypted_from({"block": {"type": "x"}})),
                     dict(broken_item, encrypted_content=claude_gateway.encrypted_from({"block": [1], "kept": 5}))):
            with self.subTest(item):
                answer = self.respond([user("Before"), item, user("Next")])
                self.assertEqual(answer.headers["x-claude-gateway-changes"], "dropped=input[1]")
                self.assertEqual(bare(self.claude.messages[-1].body)["messages"], [said("user", "Before", "Next")])
        request = self.became([user("Before"), dict(broken_item, content="What was said"), user("Next")])
        self.assertNotIn("Before", json.dumps(request))
        self.assertIn("What was said", request["messages"][0]["content"][0]["text"])

    def test_a_block_of_another_line_of_models_goes_as_text(self):
        item = self.item(**self.TOOLS)
        answer = self.respond([item, user("Next")], model="claude-sonnet-5-5")
        self.assertEqual(answer.headers["x-claude-gateway-changes"], "changed=input[0]")
        turn, = bare(self.claude.messages[-1].body)["messages"]
        self.assertIn("4 messages before this.", turn["content"][0]["text"])
        self.assertEqual(turn["content"][1], text("Next"))

    def test_a_block_that_claude_refuses_goes_as_text_and_nothing_is_learnt_of_it(self):
        item = self.item(**self.TOOLS)
        for code in ("compaction_block_signature_invalid", "compaction_block_content_mismatch",
                     "compaction_block_tool_changes_mismatch"):
            with self.subTest(code=code):
                self.claude.play(refusal_of_claude(400, "invalid_request_error", "No.", error_code=code))
                answer = self.respond([item, user("Next")])
                self.assertEqual((answer.status, answer.headers["x-claude-gateway-changes"]), (200, "changed=input[0]"))
                self.assertNotIn("anthropic-beta", self.claude.messages[-1].headers)
                self.assertEqual(self.blocks(item, user("Next")), [["compaction"], ["text"]])

    def test_without_claudes_compaction_an_ordinary_call_summarizes(self):
        refusal = refusal_of_claude(400, "invalid_request_error", "compaction: Extra inputs are not permitted")
        failed = message({"type": "compaction", "content": None}, stop_reason="compaction", model="claude-opus-5-5")
        nothing = refusal_of_claude(400, "invalid_request_error", "No.", error_code="compaction_nothing_to_summarize")
        for name, model, replies in (("model without it", "claude-haiku-4-5", []), ("upstream without it", "opus",
                                     [refusal]), ("a failed one", "opus", [failed]), ("nothing", "opus", [nothing])):
            for stream in (False, True):
                with self.subTest(name, stream=stream):
                    self.start()
                    self.claude.play(*replies, message(text("It was found.")))
                    answer = self.respond([*self.HISTORY, self.TRIGGER], model=model, stream=stream, **self.TOOLS)
                    self.assertEqual(response_problems(answer), [], answer.raw)
                    item, = (answer.chunks[-1]["response"] if stream else answer.json)["output"]
                    sent = self.claude.messages[-1].body
                    self.assertNotIn("compaction", sent)
                    self.assertEqual(sent["tool_choice"], {"type": "none"})
                    self.assertIn("Summarize this conversation", sent["messages"][-1]["content"][-1]["text"])
                    turn, = self.became([item, user("Next")], model=model)["messages"]
                    self.assertIn("It was found.", turn["content"][0]["text"])

    def test_a_summary_that_is_none_is_an_error(self):
        for stream in (False, True):
            with self.subTest(stream=stream):
                self.claude.play(message(stop_reason="refusal"))
                answer = self.respond([user("Hi"), self.TRIGGER], model="claude-haiku-4-5", stream=stream)
                if stream:
                    self.assertEqual(answer.chunks[-1]["type"], "response.failed")
                else:
                    self.assertEqual(answer.status, 502)

    def test_a_conversation_by_id_goes_on_from_its_compaction(self):
        first = self.respond(self.HISTORY, **self.TOOLS).json
        second = self.respond([self.TRIGGER], previous_response_id=first["id"], **self.TOOLS).json
        request = self.became("Next", previous_response_id=second["id"], **self.TOOLS)
        self.assertEqual([[block["type"] for block in turn["content"]] for turn in request["messages"]],
                         [["compaction"], ["text"]])
        items = self.ask("GET", "/v1/responses/%s/input_items" % second["id"]).json["data"]
        self.assertNotIn("compaction_trigger", [item["type"] for item in items])

    def test_the_compact_endpoint_gives_the_users_messages_and_the_item(self):
        body = {"model": "claude-opus-5-5", "input": self.HISTORY, "instructions": "Be exact."}
        answer = self.ask("POST", "/v1/responses/compact", body)
        self.assertEqual(list(object_with({
            "id!": STRING, "object!": word_of("response.compaction"), "created_at!": INTEGER, "usage!": USAGE_COUNTS,
            "output!": array_of(LISTED_ITEM)})(answer.json, "")), [])
        self.assertEqual([item["type"] for item in answer.json["output"]], ["message", "compaction"])
        self.assertEqual(answer.json["usage"]["input_tokens"], 900)
        self.assertEqual(self.blocks(*answer.json["output"], user("Next")), [["compaction"], ["text"]])
        first = self.respond("I am Bob.").json
        answer = self.ask("POST", "/v1/responses/compact", {"model": "opus", "previous_response_id": first["id"]})
        self.assertEqual(answer.json["output"][0]["content"], [{"type": "input_text", "text": "I am Bob."}])

    def test_a_history_over_the_threshold_is_compacted_before_the_answer(self):
        long = [user("Find it. " * 400), assistant("Here. " * 400), user("Thanks. And now?")]
        management = {"context_management": [{"type": "compaction", "compact_threshold": 1_000}]}
        for stream in (False, True):
            with self.subTest(stream=stream):
                self.claude.reset()
                self.claude.input_tokens = 1_500
                answer = self.respond(long, stream=stream, **management)
                self.assertEqual(response_problems(answer), [])
                response = answer.chunks[-1]["response"] if stream else answer.json
                self.assertEqual([item["type"] for item in response["output"]], ["compaction", "message"])
                counted, summary, asked = [request.body for request in self.claude.requests[-3:]]
                self.assertEqual([turn["role"] for turn in summary["messages"]], ["user", "assistant"])
                self.assertEqual(bare(asked)["messages"][1:], [said("user", "Thanks. And now?")])
                again = self.became([*long, *response["output"], user("More")])
                self.assertEqual(again["messages"][:2], bare(asked)["messages"])
                self.assertEqual(again["messages"][2:], [said("assistant", "Hello!"), said("user", "More")])
                request = self.became("More", previous_response_id=response["id"])
                self.assertEqual(request["messages"], again["messages"])

    def test_tokens_are_counted_only_where_they_may_exceed_the_threshold(self):
        def counts(threshold, **fields):
            self.claude.requests.clear()
            answer = self.respond(**dict({"given": [user("a " * 500), assistant("b"), user("c")]}, **fields),
                                  context_management=[{"type": "compaction", "compact_threshold": threshold}])
            self.assertEqual(answer.status, 200, answer.raw)
            paths = [urlsplit(request.path).path for request in self.claude.requests]
            return paths.count("/v1/messages/count_tokens"), len(answer.json["output"])
        self.claude.input_tokens = 300
        self.addCleanup(setattr, self.claude, "input_tokens", 11)
        self.assertEqual(counts(100_000), (0, 1))
        self.assertEqual(counts(400), (1, 1))
        self.claude.play(message(text("Hi"), usage={"input_tokens": 5_000}))
        first = self.respond("Long ago").json
        self.assertEqual(counts(4_000, given="Next", previous_response_id=first["id"]), (0, 2))
        self.assertEqual(counts(6_000, given="Next", previous_response_id=first["id"]), (0, 1))
        item = self.item(user("Long ago"), assistant("Done."))
        self.assertEqual(counts(10, given=[item, user("Next " * 100)]), (0, 1), "a summary is not summarized")

    def test_a_damaged_cache_mark_in_a_summary_is_not_sent(self):
        carried = claude_gateway.value_from_encrypted(self.item()["encrypted_content"])
        carried["block"]["cache_control"] = 5
        item = {"type": "compaction", "encrypted_content": claude_gateway.encrypted_from(carried)}
        self.assertEqual(bare(self.became([item, user("Go on")])["messages"][0]["content"]), [self.SUMMARY_BLOCK])

    def test_a_wrong_context_management_is_named(self):
        for value, path in (([{"type": "clear"}], "context_management[0].type"), ([5], "context_management[0]"),
                            ([{"type": "compaction", "compact_threshold": "x"}],
                             "context_management[0].compact_threshold")):
            answer = self.respond(context_management=value)
            self.assertEqual((answer.status, answer.error["param"]), (400, path))

    def test_a_context_management_in_claudes_shape_is_dropped_and_reported(self):
        for stream in (False, True):
            answer = self.respond(context_management={"edits": [{"type": "clear_thinking_20251015"}]}, stream=stream)
            self.assertEqual(answer.status, 200, answer.raw)
            self.assertEqual(answer.headers["x-claude-gateway-changes"], "dropped=context_management.edits")

    def test_claudes_own_compaction_passes_the_native_route(self):
        body = {"model": "claude-opus-5-5", "max_tokens": 100, "compaction": {"type": "summarize"},
                "messages": [{"role": "user", "content": "Hi"}]}
        answer = self.ask("POST", "/v1/messages", body, {"anthropic-beta": "compact-2026-09-04"})
        block = answer.json["content"][0]
        self.assertEqual(block["type"], "compaction")
        self.assertEqual(self.claude.messages[-1].headers["anthropic-beta"], "compact-2026-09-04")
        asked = dict(body, messages=[{"role": "assistant", "content": [block]}, said("user", "Go on")])
        del asked["compaction"]
        again = self.ask("POST", "/v1/messages", asked, {"anthropic-beta": "compact-2026-09-04"})
        self.assertEqual(again.status, 200, again.raw)

    def test_a_session_of_200_turns_keeps_what_came_after_its_last_compaction_in_bounded_memory(self):
        self.start()
        previous, since, before = {}, [], []        # the response to continue; what was said since the compaction
        for turn in range(200):
            since.append("Turn %d " % turn + "x" * 2_000)
            self.claude.play(message(thinking("hm", "c2ln%d" % turn), text("Noted."), model="claude-opus-5-5",
                                     usage={"cache_read_input_tokens": 8}))
            answer = self.respond(since[-1], **previous, **self.TOOLS).json
            messages = bare(self.claude.messages[-1].body)["messages"]
            self.assertEqual(since, [block["text"] for each in messages if each["role"] == "user"
                                     for block in each["content"]])
            self.assertEqual(goes_on_from_a_compaction(messages), turn >= 40)
            self.assertEqual(messages[:len(before)], before, "the cache holds what came before")
            self.assertEqual([block["signature"] for each in messages[-2:-1] for block in each["content"]
                              if block["type"] == "thinking"], ["c2ln%d" % (turn - 1)] if turn % 40 else [])
            before = messages
            if turn % 40 == 39:
                answer = self.respond([self.TRIGGER], previous_response_id=answer["id"], **self.TOOLS).json
                since, before = [], []
            previous = {"previous_response_id": answer["id"]}
        responses = self.service.gateway.responses
        self.assertLess(sum(table._used for table in vars(responses).values()), 2_500_000)
        tokens = self.service.gateway.counters.totals()["tokens"]
        self.assertEqual((tokens["input"], tokens["cache_read"]), (200 * 12 + 5 * 900, 200 * 8))


# ---- Memory ------------------------------------------------------------------------------------------

class MemoryTests(unittest.TestCase):
    def test_many_small_items_do_not_pile_up(self):
        responses = claude_gateway.StoredResponses()
        responses.put("", {"id": "r"}, [{"id": "i%d" % number} for number in range(50_001)])
        self.assertEqual([responses.item("", "i0"), responses.item("", "i50000")], [None, {"id": "i50000"}])

    def test_an_entry_too_large_to_keep_pushes_nothing_out(self):
        table = claude_gateway.Bounded(9, 100)
        table.put("small", ["x"])
        table.put("large", "x" * 99)                    # with its quotes 101 bytes
        self.assertEqual((table.get("small"), table.get("large")), (["x"], None))


# ---- Credentials -------------------------------------------------------------------------------------

OLD_ACCESS, OLD_REFRESH = "sk-ant-oat01-old-access", "sk-ant-ort01-old-refresh"


def stored_token(expires_in: float = 3_600, **fields) -> dict:
    """The token file of somebody who is signed in."""
    return dict({"token_type": "Bearer", "access_token": OLD_ACCESS, "refresh_token": OLD_REFRESH,
                 "expires_at": int(time.time() + expires_in), "scope": "user:inference user:profile"}, **fields)


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
                ("oauth", (), path),
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

    def test_a_stored_key_comes_before_the_login_beside_it(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "oauth-tokens.json")
            claude_gateway.TokenFile(path).write(stored_token())
            stored_key = claude_gateway.key_file(Config(token_file=path))
            stored_key.write({"api_key": "sk-ant-stored"})
            for settings, kind in (({}, "api_key"), ({"auth": "oauth"}, "oauth"), ({"auth": "api-key"}, "api_key"),
                                   ({"claude_code_oauth_token": "t"}, "bearer_token")):
                config = Config(token_file=path, **settings)
                self.assertEqual(claude_gateway.credential_from_config(config, None).facts()["kind"], kind)
            self.assertEqual(claude_gateway.credential_from_config(Config(token_file=path), None).headers(),
                             {"x-api-key": "sk-ant-stored"})
            pathlib.Path(stored_key.path).write_text('{"api_key": "a\\nb"}', "utf-8")
            with self.assertRaisesRegex(claude_gateway.FileDamaged, "no header can carry"):
                claude_gateway.credential_from_config(Config(token_file=path), None)

    def test_without_any_there_is_none(self):
        for path in ("", os.path.join(tempfile.gettempdir(), "no-such-directory", "tokens.json")):
            with self.subTest(path=path):
                self.assertIsNone(claude_gateway.credential_from_config(Config(token_file=path), None))


CLAUDE_CODE_BLOCK = {"type": "text", "text": "You are Claude Code, Anthropic's official CLI for Claude."}


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
                self.claude.play(FakeReply(401, body=error_body("authentication_error", "invalid x-api-key")))
                answer = self.chat()
                self.assertEqual((answer.status, answer.error["code"], answer.headers["x-should-retry"]),
                                 (401, "upstream_authentication", "false"))
                self.assertEqual(len(self.claude.messages), 1)


class ProfileTests(GatewayTestCase):
    """The sign-in of Anthropic's own tools: `configs/NAME.json` and `credentials/NAME.json`."""

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.folder = directory.name

    def profile(self, name="default", expires_in=3_600, tokens=None, **settings) -> str:
        """Writes a profile; the path of its tokens."""
        settings = dict({"authentication": {"type": "user_oauth", "client_id": "of-ant"}, "organization_id": "org",
                         "base_url": self.claude.url, "workspace_id": "wrkspc_p", "note": 1}, **settings)
        tokens = dict({"version": "1.0", "type": "oauth_token", "access_token": OLD_ACCESS, "note": 2,
                       "refresh_token": OLD_REFRESH, "expires_at": int(time.time()) + expires_in}, **(tokens or {}))
        for kind, content in (("configs", settings), ("credentials", tokens)):
            path = os.path.join(self.folder, kind, name + ".json")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                json.dump(content, file)
        return path

    def serve(self, **settings) -> None:
        self.start(**dict({"anthropic_api_key": "", "profile_folder": self.folder}, **settings))

    def test_the_profile_pays_with_its_token_and_workspace_and_without_the_system_block(self):
        self.profile()
        self.serve()
        self.assertEqual([self.chat().status, self.chat(stream=True).status], [200, 200])
        for sent in self.claude.messages:
            self.assertEqual([sent.headers.get(name) for name in ("authorization", "anthropic-beta", "x-api-key",
                                                                  "anthropic-workspace-id")],
                             ["Bearer " + OLD_ACCESS, "oauth-2025-04-20", None, "wrkspc_p"])
            self.assertNotIn("system", sent.body)
        facts = self.ask("GET", "/", headers={"accept": "application/json"}).json["credential"]
        self.assertEqual((facts["kind"], facts["description"]),
                         ("profile", "profile default of `ant auth login`, workspace wrkspc_p"))

    def test_an_expired_token_is_renewed_and_the_rest_of_the_file_stays(self):
        path = self.profile(expires_in=-10)
        self.serve()
        answer = token_answer()
        del answer["refresh_token"], answer["scope"]
        self.claude.token_replies.append(answer)
        self.assertEqual(self.chat().status, 200)
        request, = [request for request in self.claude.requests if request.path == "/v1/oauth/token"]
        self.assertEqual((request.body, request.headers["anthropic-beta"]), (
            {"grant_type": "refresh_token", "refresh_token": OLD_REFRESH, "client_id": "of-ant"}, "oauth-2025-04-20"))
        with open(path, encoding="utf-8") as file:
            stored = json.load(file)
        self.assertEqual((stored["access_token"], stored["refresh_token"], stored["note"], stored["type"],
                          stored["version"], "scope" in stored),
                         (NEW_ACCESS, OLD_REFRESH, 2, "oauth_token", "1.0", False))
        self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer " + NEW_ACCESS)

    def test_without_a_client_id_somebody_else_renews_the_file(self):
        settings = {"authentication": {"type": "user_oauth"}}
        self.profile(expires_in=100, **settings)
        self.serve()
        self.assertEqual([self.chat().status, self.chat().status], [200, 200])
        self.profile(tokens={"access_token": "rotated"}, **settings)
        self.assertEqual(self.chat().status, 200)
        self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer rotated")
        self.claude.revoked.add("rotated")
        self.assertIn("Invalid bearer token", self.chat().error["message"])
        self.profile(expires_in=-10, **settings)
        answer = self.chat()
        self.assertEqual(answer.status, 401)
        self.assertIn("ant auth login", answer.error["message"])
        self.assertEqual([request for request in self.claude.requests if "oauth" in request.path], [])

    def test_which_profile_is_used(self):
        self.profile(tokens={"access_token": "of-default"})
        self.profile("work", tokens={"access_token": "of-work"})
        self.profile("named", tokens={"access_token": "of-named"})
        pathlib.Path(self.folder, "tokens.json").write_text(json.dumps(stored_token()), "utf-8")
        for settings, pointer, token in (({}, "", "of-default"), ({}, "work\n", "of-work"),
                                         ({"profile": "named"}, "work", "of-named"),
                                         ({"token_file": os.path.join(self.folder, "tokens.json")}, "", OLD_ACCESS),
                                         ({"token_file": os.path.join(self.folder, "tokens.json"), "profile": "named"},
                                          "", "of-named")):
            with self.subTest(settings=settings, pointer=pointer):
                pathlib.Path(self.folder, "active_config").write_text(pointer, "utf-8")
                self.serve(**settings)
                self.assertEqual(self.chat().status, 200)
                self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer " + token)

    def test_what_cannot_be_used_is_refused_by_name(self):
        path = self.profile()
        self.profile("federated", authentication={"type": "oidc_federation"})
        self.profile("elsewhere", base_url="http://example.org")
        self.profile("empty")
        os.unlink(os.path.join(self.folder, "credentials", "empty.json"))
        cases = [("federated", "signing in by oidc_federation is not supported"), ("../x", "Invalid profile name"),
                 (".hidden", "Invalid profile name"), ("a\0b", "Invalid profile name"), ("none", "no profile none"),
                 ("elsewhere", "must be an https URL"), ("empty", "run `ant auth login`")]
        if os.name == "posix":
            config = os.path.join(self.folder, "configs", "default.json")
            cases += [("default", "others may use it"), ("default", "others may use it"), ("default", "no plain file")]
            steps = iter((lambda: os.chmod(path, 0o640), lambda: (os.chmod(path, 0o600), os.chmod(config, 0o664)),
                          lambda: (os.chmod(config, 0o644), os.rename(path, path + ".real"),
                                   os.symlink(path + ".real", path))))
        for name, words in cases:
            if name == "default":
                next(steps)()
            with self.subTest(name=name, words=words), self.assertRaisesRegex(claude_gateway.GatewayError, words):
                claude_gateway.credential_from_config(Config(profile=name, profile_folder=self.folder), None)

    def test_an_address_that_is_no_place_is_refused(self):
        for url in ("https://[", "https://", "https://h:99999", "http://127.0.0.1:x", "https://user:secret@h",
                    "https://h?x"):
            with self.subTest(url=url):
                self.profile(base_url=url)
                with self.assertRaisesRegex(claude_gateway.GatewayError, "its base_url must be an https URL") as raised:
                    claude_gateway.credential_from_config(Config(profile_folder=self.folder), None)
                self.assertNotIn("secret", str(raised.exception))

    @POSIX_ONLY
    def test_a_pointer_that_is_no_plain_file_is_not_waited_for(self):
        self.profile()
        os.mkfifo(os.path.join(self.folder, "active_config"))
        self.assertIsNotNone(claude_gateway.credential_from_config(Config(profile_folder=self.folder), None))

    def test_without_any_profile_there_is_no_credential(self):
        self.assertIsNone(claude_gateway.credential_from_config(Config(profile_folder=self.folder), None))


class SpendLimitTests(GatewayTestCase):
    def test_a_spend_limit_of_the_console_is_no_reason_to_retry(self):
        for code in ("enforced_spend_limit_reached", "contract_spend_limit_reached"):
            for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
                with self.subTest(code=code, path=path):
                    body = error_body("rate_limit_error", "You have reached your spend limit.")
                    body["error"]["details"] = {"error_code": code}
                    self.claude.reset()
                    self.claude.play(FakeReply(429, body=body))
                    answer = self.ask("POST", path, {"model": "sonnet", "input": "Hi"} if path == "/v1/responses" else {
                        "model": "sonnet", "max_tokens": 2_000, "messages": [{"role": "user", "content": "Hi"}]})
                    self.assertEqual((answer.status, answer.headers["x-should-retry"], len(self.claude.messages)),
                                     (429, "false", 1))
                    self.assertIn("Hint: only a higher spend limit", answer.error["message"])
                    if path != "/v1/messages":
                        self.assertEqual(answer.error["code"], "insufficient_quota")


class WorkspaceTests(GatewayTestCase):
    """`anthropic-workspace-id`, and other headers that the environment names."""

    def test_a_key_that_needs_a_workspace_says_which_variable_to_set(self):
        self.claude.identity_linked = True
        for path, body in (("/v1/chat/completions", {}), ("/v1/messages", {"max_tokens": 9})):
            for stream in (False, True):
                with self.subTest(path=path, stream=stream):
                    answer = self.ask("POST", path, dict(body, model="claude-sonnet-5-5", stream=stream, messages=[
                        {"role": "user", "content": "Hello"}]))
                    self.assertEqual((answer.status, answer.headers["x-should-retry"]), (400, "false"))
                    self.assertIn("is required when authenticating with an identity-linked", answer.error["message"])
                    self.assertIn("Hint: set ANTHROPIC_WORKSPACE_ID", answer.error["message"])

    def test_the_workspace_and_custom_headers_go_with_every_call(self):
        self.claude.identity_linked, self.claude.models = True, [{"id": "claude-sonnet-5-5"}]
        service = self.start(workspace_id="wrkspc_1", custom_headers=(
            ("x-team", "blue"), ("anthropic-beta", "a-beta"), ("anthropic-version", "1999-01-01")))
        self.assertEqual([self.chat().status, self.chat(stream=True).status], [200, 200])
        self.assertEqual(self.ask("POST", "/v1/messages", {"model": "sonnet", "max_tokens": 9, "messages": [
            {"role": "user", "content": "Hi"}]}, {"anthropic-beta": "b-beta"}).status, 200)
        service.gateway.upstream.models()
        for request in self.claude.requests:
            self.assertEqual((request.headers["anthropic-workspace-id"], request.headers["x-team"],
                              request.headers["anthropic-version"], request.headers["x-api-key"]),
                             ("wrkspc_1", "blue", "2023-06-01", SECRET))
        self.assertEqual(self.claude.messages[-1].headers["anthropic-beta"], "a-beta,b-beta")

    def test_a_native_client_names_its_own_workspace(self):
        self.start(workspace_id="wrkspc_1")
        body = {"model": "sonnet", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
        for headers, workspace in (({"anthropic-workspace-id": "wrkspc_2"}, "wrkspc_2"), ({}, "wrkspc_1"),
                                   ({"anthropic-workspace-id": ""}, "wrkspc_1")):
            with self.subTest(headers=headers):
                self.assertEqual(self.ask("POST", "/v1/messages", body, headers).status, 200)
                self.assertEqual(self.claude.messages[-1].headers["anthropic-workspace-id"], workspace)

    def test_what_the_environment_names_is_read_and_checked(self):
        def config(**variables):
            return claude_gateway.config_from(claude_gateway.argument_parser().parse_args(["start"]), variables)
        named = config(ANTHROPIC_WORKSPACE_ID=" wrkspc_1 ", ANTHROPIC_CUSTOM_HEADERS="X-Team: blue\n\nHost: evil\r\n"
                                                                                     "Authorization: x\nx-b:c:d\n")
        self.assertEqual((named.workspace_id, named.custom_headers),
                         ("wrkspc_1", (("x-team", "blue"), ("x-b", "c:d"))))
        self.assertIn("blue", named.secrets())
        self.assertEqual((config(ANTHROPIC_WORKSPACE_ID="").workspace_id, config().custom_headers), ("", ()))
        for lines in ("no colon", "Name:", "Na me: x", "Name: \u20ac"):
            with self.subTest(lines), self.assertRaises(claude_gateway.UsageError):
                config(ANTHROPIC_CUSTOM_HEADERS=lines)
        for url, base in (("https://h.test/v1", "https://h.test"), ("https://h.test/v1/", "https://h.test"),
                          ("https://h.test/anthropic/", "https://h.test/anthropic"),
                          ("https://h.test/anthropic/v1", "https://h.test/anthropic")):
            self.assertEqual(config(ANTHROPIC_BASE_URL=url).base_url, base)
        for url in ("http://evil.test%2f.localhost", "http://evil.test%23.localhost/", "https://:secret@h.test",
                    "http://127.0.0.1\\.evil.test", "http://evil.test\\.localhost"):
            with self.subTest(url), self.assertRaises(claude_gateway.UsageError) as refused:
                config(ANTHROPIC_BASE_URL=url)
            self.assertNotIn("secret", str(refused.exception))

    def test_a_base_address_may_have_a_path(self):
        self.start(base_url=self.claude.url + "/anthropic")
        self.assertIn("Not found: /anthropic/v1/messages", self.chat().error["message"])

    def test_doctor_names_the_variable(self):
        self.claude.identity_linked = True
        upstream = claude_gateway.Upstream(Config(base_url=self.claude.url), "")
        self.addCleanup(upstream.close)
        upstream.credential = claude_gateway.ApiKey("k", "ANTHROPIC_API_KEY")
        finding = claude_gateway.acceptance_finding(upstream)
        self.assertEqual((finding.level, finding.step), ("failed", "export ANTHROPIC_WORKSPACE_ID=wrkspc_..."))


CLIENT_ID = "9d1c250a-e61b-44d9-88ed-5944d1962f5e"
REDIRECT_PAGE = "https://platform.claude.com/oauth/code/callback"


class SignInTests(unittest.TestCase):
    """The address to visit, and what is made of the paste."""

    def test_the_address_asks_for_what_the_sheet_lists(self):
        place, _, query = claude_gateway.Login().url.partition("?")
        fields = {name: values[0] for name, values in parse_qs(query, strict_parsing=True).items()}
        self.assertEqual(place, "https://claude.com/cai/oauth/authorize")
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


NEW_ACCESS, NEW_REFRESH = "sk-ant-oat01-new-access", "sk-ant-ort01-new-refresh"


def token_answer(**fields) -> dict:
    """What the sign-in endpoint answers when all is well."""
    return dict({"token_type": "Bearer", "access_token": NEW_ACCESS, "expires_in": 28_800,
                 "refresh_token": NEW_REFRESH, "scope": "user:inference user:profile"}, **fields)


class LoginStoreTestCase(GatewayTestCase):
    """A token file in a directory of its own, and the fake's sign-in endpoint."""

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = os.path.join(directory.name, "claude-gateway")
        self.token_path = os.path.join(self.directory, "oauth-tokens.json")
        self.file = claude_gateway.TokenFile(self.token_path)
        self.limits = Limits()
        self.token_url = self.claude.url + "/v1/oauth/token"

    def stored(self) -> dict:
        return json.loads(pathlib.Path(self.token_path).read_bytes())

    def token_requests(self) -> list:
        return [request for request in self.claude.requests if request.path.endswith("/oauth/token")]

    def login(self, token_url: str = "") -> "claude_gateway.StoredLogin":
        """The login in the file, as the gateway uses it."""
        upstream = claude_gateway.Upstream(Config(base_url=self.claude.url), "test")
        self.addCleanup(upstream.close)
        return claude_gateway.StoredLogin(self.file, token_url or self.token_url, upstream.post_json)

    @staticmethod
    def accept(login, token: str) -> str:
        """Claude answers a call with this token; the token."""
        login.accepted({"authorization": "Bearer " + token})
        return token

    def serve_login(self, **settings):
        """The gateway with the login in the file."""
        return self.start(**dict({"anthropic_api_key": "", "token_file": self.token_path,
                                  "token_url": self.token_url, "limits": self.limits}, **settings))


class RefreshTests(LoginStoreTestCase):
    def test_a_token_is_renewed_five_minutes_before_it_expires(self):
        for left, requests in ((290, 1), (315, 0), (-10, 1), (28_800, 0)):
            with self.subTest(left=left):
                self.claude.reset()
                self.file.write(stored_token(left))
                self.claude.token_replies.append(token_answer())
                login = self.login()
                login.access_token()
                login.close()
                self.assertEqual(login.access_token(), NEW_ACCESS if requests else OLD_ACCESS)
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
        token = self.accept(login, login.access_token())
        token = self.accept(login, login.access_token(rejected=token))
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
        self.claude.play(FakeReply(401, body=error_body("authentication_error", "OAuth token has expired.")))
        self.assertEqual(self.chat().status, 200)
        self.assertEqual([request.headers["authorization"] for request in self.claude.messages],
                         ["Bearer " + OLD_ACCESS, "Bearer " + NEW_ACCESS])
        self.assertEqual(len(self.token_requests()), 1)

    def test_a_second_401_goes_to_the_client(self):
        self.file.write(stored_token())
        self.serve_login()
        self.claude.token_replies += [token_answer(), token_answer(access_token="third")]
        self.claude.play(*[FakeReply(401, body=error_body("authentication_error", "Invalid bearer token"))] * 3)
        answer = self.chat()
        self.assertEqual((answer.status, answer.error["code"], answer.headers["x-should-retry"]),
                         (401, "upstream_authentication", "false"))
        self.assertIn("Invalid bearer token", answer.error["message"])
        self.assertEqual((len(self.claude.messages), len(self.token_requests())), (2, 1))

    def test_an_account_that_is_refused_is_not_helped_by_ever_more_tokens(self):
        self.file.write(stored_token())
        self.serve_login()
        self.claude.token_replies += [token_answer(access_token="a-%d" % turn, refresh_token="r-%d" % turn)
                                      for turn in range(5)]
        self.claude.play(*[FakeReply(401, body=error_body("authentication_error", "This account is on hold."))] * 5)
        for _ in range(4):
            answer = self.chat()
            self.assertEqual((answer.status, answer.error["code"]), (401, "upstream_authentication"))
            self.assertIn("This account is on hold.", answer.error["message"])
        self.assertEqual((len(self.claude.messages), len(self.token_requests())), (5, 1))
        self.file.write(stored_token(access_token="of-another-account", refresh_token="another"))
        self.claude.play(message(text("Hi")))
        self.assertEqual(self.chat().status, 200, "a new login helps at once")
        self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer of-another-account")

    def test_a_401_to_the_model_list_is_answered_by_a_renewal_too(self):
        self.file.write(stored_token())
        self.claude.token_replies.append(token_answer())
        listed = FakeReply(body={"data": [{"type": "model", "id": "claude-sonnet-5-5"}], "has_more": False})
        refused = FakeReply(401, body=error_body("authentication_error", "OAuth token has expired."))
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
        self.claude.play(FakeReply(403, body=error_body("permission_error", "OAuth token has been revoked.")))
        answer = self.chat()
        self.assertEqual((answer.status, len(self.claude.messages), len(self.token_requests())), (401, 1, 0))
        self.assertIn("OAuth token has been revoked.", answer.error["message"])
        self.assertIn("login", answer.error["message"])

    def test_a_dead_refresh_token_is_told_and_never_sent_again_until_a_new_login(self):
        self.file.write(stored_token(-10))
        self.serve_login()
        for _ in range(3):
            answer = self.chat()
            self.assertEqual((answer.status, answer.error["code"], answer.headers["x-should-retry"]),
                             (401, "upstream_authentication", "false"))
            self.assertIn("claude-gateway login", answer.error["message"])
        self.assertEqual((len(self.token_requests()), len(self.claude.messages)), (1, 0))
        self.file.write(stored_token(access_token="from-a-new-login", refresh_token="another"))
        self.assertEqual(self.chat().status, 200, "a new login helps without a restart")
        self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer from-a-new-login")

    def test_who_loses_a_race_uses_what_the_winner_stored(self):
        # on a file system without locks both ask; the loser must read the file again, not log out
        self.file.write(stored_token(0))

        def lost(recorded):
            self.file.write(stored_token(access_token="of-the-winner", refresh_token="of-the-winner-too"))
            return FakeReply(400, body={"error": "invalid_grant"})
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

    def test_a_logout_amid_a_call_is_no_defect(self):
        self.file.write(stored_token())
        login = self.login()
        login.access_token()
        clock = time.time

        def log_out():                              # while the call asks whether its token is still good
            claude_gateway.time.time = clock
            self.file.remove()
            with self.assertRaises(claude_gateway.CredentialNeeded):
                login.access_token()
            return clock()
        self.addCleanup(setattr, claude_gateway.time, "time", clock)
        claude_gateway.time.time = log_out
        self.assertEqual(login.access_token(), OLD_ACCESS)
        with self.assertRaises(claude_gateway.CredentialNeeded):
            login.access_token()

    def test_a_failing_endpoint_does_not_matter_while_the_token_is_good(self):
        failures = (None, FakeReply(500, body=b"oops"), FakeReply(404, body=b"<html>"), FakeReply(None),
                    FakeReply(429, body=error_body("rate_limit_error", "Slow down")), FakeReply(200, body=b"not JSON"),
                    FakeReply(302, {"location": "https://example.org/"}))
        for failure in failures:
            with self.subTest(failure):
                self.claude.reset()
                self.file.write(stored_token(200))
                self.claude.token_replies.append(failure)
                with self.assertLogs("claude_gateway", "WARNING") as logged:
                    login = self.login("http://127.0.0.1:9/v1/oauth/token" if failure is None else "")
                    self.assertEqual([login.access_token() for _ in range(3)], [OLD_ACCESS] * 3)
                    login.close()
                self.assertIn("could not be renewed", logged.output[0])
                self.assertLessEqual(len(self.token_requests()), 1, "no pause between attempts")

    def test_a_failing_endpoint_with_a_dead_token_is_a_fault_that_names_the_variable(self):
        self.file.write(stored_token(-10))
        self.serve_login()
        self.claude.token_replies.append(FakeReply(500, body=b"oops"))
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
                self.claude.token_replies.append(FakeReply(status, body=body))
                with self.assertRaises(claude_gateway.UpstreamFault):
                    self.login().access_token()

    def test_twenty_requests_at_once_make_one_renewal(self):
        self.file.write(stored_token(0))
        self.serve_login()
        self.claude.token_replies.append(lambda _: FakeReply(body=token_answer(), hold=[0.05]))
        self.all_at_once(20)
        self.assertEqual(len(self.token_requests()), 1)
        self.assertEqual({request.headers["authorization"] for request in self.claude.messages},
                         {"Bearer " + NEW_ACCESS})

    def test_twenty_rejections_at_once_make_one_renewal(self):
        self.file.write(stored_token())
        self.serve_login()
        self.claude.token_replies.append(lambda _: FakeReply(body=token_answer(), hold=[0.05]))

        def reject_the_old(recorded):
            if OLD_ACCESS in recorded.headers["authorization"]:
                return FakeReply(401, body=error_body("authentication_error", "OAuth token has expired."))
            return message(text("Hi"), model="claude-sonnet-5-5")
        self.claude.play(*[reject_the_old] * 40)
        self.all_at_once(20)
        self.assertEqual(len(self.token_requests()), 1)

    def all_at_once(self, count):
        statuses, barrier = [], threading.Barrier(count)

        def one():
            barrier.wait(30)
            statuses.append(self.chat().status)
        threads = [threading.Thread(target=one) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        self.assertEqual(statuses, [200] * count)


class RenewalTests(LoginStoreTestCase):
    """Renewal while work goes on."""
    all_at_once = RefreshTests.all_at_once

    def test_nobody_waits_for_the_renewal_of_a_token_that_is_still_valid(self):
        self.file.write(stored_token(200))
        service, answer = self.serve_login(), threading.Event()
        self.addCleanup(answer.set)
        self.claude.token_replies.append(FakeReply(body=token_answer(), hold=[answer]))
        self.all_at_once(5)
        self.assertEqual([self.chat(stream=True).status, self.chat().status], [200, 200])
        self.assertEqual({request.headers["authorization"] for request in self.claude.messages},
                         {"Bearer " + OLD_ACCESS})
        answer.set()
        service.gateway.upstream.credential.close()             # waits for the renewal
        self.assertEqual((self.stored()["refresh_token"], len(self.token_requests())), (NEW_REFRESH, 1))
        self.chat()
        self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer " + NEW_ACCESS)

    def test_nor_does_the_one_that_starts_it(self):
        self.file.write(stored_token(200))
        login, answer = self.login(), threading.Event()
        self.addCleanup(answer.set)
        self.claude.token_replies.append(FakeReply(body=token_answer(), hold=[answer]))
        self.assertEqual(login.access_token(), OLD_ACCESS)      # which would fail in the end if it waited
        answer.set()
        login.close()
        self.assertEqual(self.stored()["access_token"], NEW_ACCESS)

    def test_a_program_that_ends_waits_for_the_tokens_on_their_way(self):
        self.file.write(stored_token(200))
        self.claude.token_replies.append(FakeReply(body=token_answer(), hold=[0.3]))
        code = REFRESHING_CHILD.replace("for _", "login.access_token(); login.access_token()\nfor _")
        child = subprocess.run([sys.executable, "-c", imported() + code, self.token_path, self.token_url, "0"],
                               input=b"\n", stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        self.assertEqual((child.returncode, child.stderr), (0, b""))
        self.assertEqual(self.stored()["refresh_token"], NEW_REFRESH)

    def test_a_call_to_the_endpoint_has_a_deadline_however_it_trickles(self):
        self.limits = Limits(token_timeout=0.3)
        trickle = FakeReply(pieces=[piece for _ in range(100) for piece in (b" ", 0.05)])
        for name, reply in (("silent", FakeReply(hold=[threading.Event()])), ("trickling", trickle)):
            with self.subTest(name):
                self.file.write(stored_token(-10))
                self.serve_login()
                self.claude.token_replies.append(reply)
                answer = self.chat()
                self.assertEqual(answer.status, 502)
                self.assertIn("not answered within 0.3 seconds", answer.error["message"])
                self.assertIn("CLAUDE_GATEWAY_TOKEN_URL", answer.error["message"])
                self.assertEqual(self.status()["trouble"]["message"], answer.error["message"])

    def status(self) -> dict:
        return self.ask("GET", "/", headers={"accept": "application/json"}).json

    def test_a_token_that_was_accepted_is_renewed_whatever_its_age(self):
        self.file.write(stored_token(-10))
        self.serve_login()
        self.claude.token_replies += [token_answer(), token_answer(access_token="third", refresh_token="third-r")]
        self.assertEqual(self.chat().status, 200)
        self.claude.revoked.add(NEW_ACCESS)                     # within its first second
        self.all_at_once(20)
        self.assertEqual(len(self.token_requests()), 2)

    def test_a_token_of_a_few_seconds_is_used_for_half_of_them(self):
        self.file.write(stored_token(-10))
        service = self.serve_login()
        self.claude.token_replies.append(token_answer(expires_in=60))
        self.assertEqual([self.chat().status for _ in range(3)], [200] * 3)
        service.gateway.upstream.credential.close()
        self.assertEqual(len(self.token_requests()), 1)
        self.file.write(dict(self.stored(), expires_at=time.time() + 29))
        self.claude.token_replies.append(token_answer(access_token="third"))
        self.assertEqual(self.chat().status, 200)
        service.gateway.upstream.credential.close()
        self.assertEqual((len(self.token_requests()), self.stored()["access_token"]), (2, "third"))

    ABSURD = ("9" * 400, "1e999", "-1e999", "NaN", "-5", '"soon"', "true", "null")

    def test_an_absurd_expiry_is_unknown(self):
        for value in self.ABSURD:
            with self.subTest(value[:10]):
                self.claude.reset()
                self.file.write(stored_token())
                text = json.dumps(dict(self.stored(), expires_at="?")).replace('"?"', value)
                pathlib.Path(self.token_path).write_text(text, "utf-8")
                service = self.serve_login()
                self.assertEqual((self.chat().status, self.token_requests()), (200, []))
                self.assertIsNone(service.gateway.upstream.credential.facts()["expires_at"])

    def test_new_tokens_are_not_lost_over_an_absurd_lifetime(self):
        for value in self.ABSURD:
            with self.subTest(value[:10]):
                self.claude.reset()
                self.file.write(stored_token(-10))
                self.claude.token_replies.append(FakeReply(
                    body=json.dumps(token_answer(expires_in="?")).replace('"?"', value).encode()))
                self.serve_login()
                self.assertEqual([self.chat().status, self.chat().status], [200, 200])
                self.assertEqual((len(self.token_requests()), self.stored()["refresh_token"]), (1, NEW_REFRESH))

    def test_a_token_that_no_header_can_carry_is_refused_by_name(self):
        for token in ("a\r\nx-evil: 1", "t\u00f6ken", "a b"):
            with self.subTest(token):
                self.file.write(stored_token())
                self.serve_login()
                pathlib.Path(self.token_path).write_text(json.dumps(stored_token(access_token=token)), "utf-8")
                answer = self.chat()
                self.assertEqual((answer.status, answer.error["code"]), (401, "upstream_authentication"))
                self.assertIn("claude-gateway login", answer.error["message"])
                self.file.write(stored_token(-10))
                self.claude.token_replies.append(token_answer(access_token=token))
                with self.assertRaises(claude_gateway.UpstreamFault):
                    self.login().access_token()

    @POSIX_ONLY
    def test_a_token_file_that_is_no_plain_file_is_refused_without_waiting(self):
        os.makedirs(self.directory)
        os.mkfifo(self.token_path)
        with self.assertRaisesRegex(claude_gateway.FileDamaged, "it is no plain file"):
            self.file.read()
        for replaces in (lambda: self.file.write(stored_token()), self.file.remove):
            with self.assertRaisesRegex(OSError, "is no plain file"):
                replaces()
        self.assertEqual(os.listdir(self.directory), [os.path.basename(self.token_path)])

    @POSIX_ONLY
    def test_a_logout_while_tokens_are_unsaved_stays_one(self):
        self.file.write(stored_token(-10))
        self.serve_login()
        self.claude.token_replies.append(token_answer())
        with no_room_on_disk():
            self.assertEqual(self.chat().status, 200)
            self.file.remove()
        self.assertEqual(self.chat().status, 401)
        self.service.gateway.close()
        self.assertFalse(os.path.exists(self.token_path))

    @POSIX_ONLY
    def test_unsaved_tokens_are_tried_again_when_the_gateway_stops(self):
        self.file.write(stored_token(-10))
        service = self.serve_login()
        self.claude.token_replies.append(token_answer())
        with no_room_on_disk():
            self.assertEqual(self.chat().status, 200)
        self.assertEqual(self.stored()["refresh_token"], OLD_REFRESH)
        service.close(1)
        self.assertEqual(self.stored()["refresh_token"], NEW_REFRESH)

    def test_an_endpoint_that_goes_on_failing_is_asked_less_and_less(self):
        clock = SimpleNamespace(ahead=0.0, time=time.time, sleep=time.sleep)
        clock.monotonic = lambda began=time.monotonic(): began + clock.ahead
        self.addCleanup(setattr, claude_gateway, "time", claude_gateway.time)
        self.file.write(stored_token(-10))
        self.claude.token_replies += [FakeReply(500, body=b"oops")] * 20
        login, asked = self.login(), []
        claude_gateway.time = clock
        for _ in range(130):
            with self.assertRaises(claude_gateway.UpstreamFault):
                login.access_token()
            asked.append(len(self.token_requests()))
            clock.ahead += 1
        self.assertEqual([asked.index(count) for count in range(1, asked[-1] + 1)], [0, 2, 6, 14, 30, 62, 122])


class HealthTests(LoginStoreTestCase):
    """The last refusal is shown until a call succeeds."""

    def trouble(self) -> tuple:
        metric = re.search(r"(?m)^claude_gateway_credential_ok (\d)", self.ask("GET", "/metrics").raw.decode()).group(1)
        return self.ask("GET", "/", headers={"accept": "application/json"}).json["trouble"], metric

    def test_a_refusal_is_shown_with_its_hint_until_a_call_succeeds(self):
        self.start()
        self.assertEqual(self.trouble(), (None, "1"))
        self.claude.revoked.add(SECRET)
        self.chat(stream=True)
        trouble, metric = self.trouble()
        self.assertEqual((trouble["message"], metric),
                         ("invalid x-api-key. Hint: check the API key of the gateway (ANTHROPIC_API_KEY, or "
                          "`claude-gateway login --api-key`).", "0"))
        self.assertAlmostEqual(trouble["at"], time.time(), delta=60)
        self.chat(model="no-such-model")
        self.assertEqual(self.trouble()[1], "0")
        self.claude.revoked.clear()
        self.claude.play(FakeReply(400, body=error_body("invalid_request_error", "Odd")))
        self.chat()
        self.assertEqual(self.trouble()[1], "0")
        self.chat()
        self.assertEqual(self.trouble(), (None, "1"))

    def test_a_callers_own_key_says_nothing_about_ours(self):
        self.start()
        self.claude.revoked.add("sk-ant-callers")
        self.ask("GET", "/v1/models", headers={"x-api-key": "sk-ant-callers"})
        self.assertEqual(self.trouble(), (None, "1"))

    def test_a_renewal_that_fails_is_shown_while_calls_go_on(self):
        self.file.write(stored_token(200))
        service = self.serve_login()
        self.claude.token_replies.append(FakeReply(500, body=b"oops"))
        with self.assertLogs("claude_gateway", "WARNING"):
            self.assertEqual(self.chat().status, 200)
            service.gateway.upstream.credential.close()
        self.assertEqual(self.chat().status, 200)
        trouble, metric = self.trouble()
        self.assertIn("could not be renewed: status 500", trouble["message"])
        self.assertEqual(metric, "0")

    def test_status_begins_with_it_and_an_expired_token_is_not_said_to_be_renewed(self):
        self.file.write(stored_token(-3_600))
        self.serve_login()
        self.chat()
        running = self.ask("GET", "/", headers={"accept": "application/json"}).json
        lines = claude_gateway.status_text(running, "").split("\n")
        self.assertRegex(lines[0], r"\AThe credential does not work, since \d{4}-.*: The login has expired .*login")
        self.assertRegex("\n".join(lines), r"Token: +\d{4}-\d\d-\d\d [\d:]+ \(expired\)")

    def test_a_refusal_at_the_model_list_is_no_missing_list(self):
        self.claude.models = []
        self.claude.revoked.add(SECRET)
        service = self.start()
        with self.assertLogs("claude_gateway", "WARNING") as logged:
            service.gateway.models.catalog()
        self.assertIn("Claude refuses this credential: invalid x-api-key", logged.output[0])

    @unittest.skipUnless(shutil.which("node"), "no node here")
    def test_the_page_shows_it_in_red(self):
        self.start()
        self.claude.revoked.add(SECRET)
        self.chat()
        data = self.ask("GET", "/", headers={"accept": "application/json"}).json
        data["credential"].update(expires_at=1_700_000_000, refreshable=True)
        shown = StatusTests.page(self, [(200, json.dumps(data), "")])[1]
        self.assertRegex(shown["trouble"], r"does not work, since .*: invalid x-api-key. Hint: check the API key")
        self.assertNotIn("trouble", shown["hidden"])
        self.assertIn("Token expired|", shown["credential"])
        data["trouble"] = None
        self.assertIn("trouble", StatusTests.page(self, [(200, json.dumps(data), "")])[1]["hidden"])


REFRESHING_CHILD = """
from claude_gateway import Config, StoredLogin, TokenFile, Upstream
login = StoredLogin(TokenFile(sys.argv[1]), sys.argv[2], Upstream(Config(), "child").post_json)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    token = login.access_token()
    login.accepted({"authorization": "Bearer " + token})
    login.access_token(rejected=token)
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
                    return FakeReply(400, body={"error": "invalid_grant"})
                number = len(self.token_requests())
                valid[0] = "r-%d" % number
                return token_answer(access_token="a-%d" % number, refresh_token=valid[0], expires_in=1)
        self.claude.token_replies += [rotate] * 1_000
        children = [subprocess.Popen([sys.executable, "-c", imported() + REFRESHING_CHILD, self.token_path,
                                      self.token_url, "100"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE)
                    for _ in range(2)]
        self.addCleanup(lambda: [child.kill() for child in children])
        for child in children:
            self.assertEqual(child.stdout.readline().strip(), b"ready")
        for child in children:                                  # both at once
            child.stdin.write(b"go\n")
            child.stdin.flush()
        for child in children:
            out, err = child.communicate(timeout=120)
            self.assertEqual((out.strip(), err, child.returncode), (b"done", b"", 0))
        self.assertEqual(twice, [])
        self.assertGreaterEqual(len(self.token_requests()), 100)
        self.assertEqual(self.stored()["refresh_token"], valid[0])


@contextlib.contextmanager
def no_room_on_disk():
    """Whatever is written to a file fails, as on a full disk; root ignores file modes, but not this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TokenFileTests(LoginStoreTestCase):
    @POSIX_ONLY
    def test_tokens_that_could_not_be_saved_are_saved_under_the_lock(self):
        self.file = claude_gateway.TokenFile(self.token_path, Limits(lock_patience=0.05))
        self.file.write(stored_token(-10))
        login = self.login()
        self.claude.token_replies += [token_answer()]
        with no_room_on_disk():
            self.assertEqual(login.access_token(), NEW_ACCESS)
        with self.file.lock(), self.assertRaises(claude_gateway.UpstreamFault):
            login.access_token()                        # somebody else may be writing
        self.assertEqual(login.access_token(), NEW_ACCESS)
        self.assertEqual(self.file.read()["access_token"], NEW_ACCESS)

    @POSIX_ONLY
    def test_there_is_one_lock_by_whatever_name_the_file_is_known(self):
        self.file.write(stored_token())
        link = os.path.join(self.directory, "link.json")
        os.symlink(self.file.path, link)
        linked = claude_gateway.TokenFile(link, Limits(lock_patience=0.05))
        with self.file.lock(), self.assertRaises(claude_gateway.UpstreamFault), linked.lock():
            pass

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
        pathlib.Path(self.token_path).write_text(json.dumps(stored_token()), "utf-8")
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
    def test_the_new_content_is_on_the_disk_before_it_gets_the_name(self):
        steps = []

        def recorded(name, real):
            return lambda *args, **options: (steps.append(name), real(*args, **options))[1]
        for name in ("fsync", "replace"):
            real = getattr(os, name)
            self.addCleanup(setattr, os, name, real)
            setattr(os, name, recorded(name, real))
        self.file.write(stored_token())
        self.assertEqual(steps[:2], ["fsync", "replace"])

    @POSIX_ONLY
    def test_a_symlink_stays_one(self):
        os.makedirs(self.directory)
        target = os.path.join(os.path.dirname(self.directory), "elsewhere.json")
        for name, content in (("good", json.dumps(stored_token())), ("damaged", "{")):
            with self.subTest(name):
                pathlib.Path(target).write_text(content, "utf-8")
                if not os.path.islink(self.token_path):
                    os.symlink(target, self.token_path)
                self.file.write(stored_token(access_token="through-the-link"))
                self.assertTrue(os.path.islink(self.token_path))
                self.assertFalse(os.path.islink(target))
                self.assertEqual(json.loads(pathlib.Path(target).read_bytes())["access_token"], "through-the-link")

    def test_a_damaged_file_is_reported_by_name_and_kept_aside(self):
        os.makedirs(self.directory)
        for content in (b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe{}", b"{}", b'{"access_token": 5}',
                        b'{"access_token": ""}', b'{"access_token": "a"', b"[" * 100_000):
            with self.subTest(content[:40]):
                pathlib.Path(self.token_path).write_bytes(content)
                with self.assertRaises(claude_gateway.FileDamaged) as raised:
                    self.file.read()
                self.assertIn(self.token_path, str(raised.exception))
                self.assertEqual(pathlib.Path(self.token_path).read_bytes(), content, "reading it changed it")
                self.file.write(stored_token())
                aside, = set(os.listdir(self.directory)) - {"oauth-tokens.json"}
                self.assertEqual(pathlib.Path(self.directory, aside).read_bytes(), content)
                self.assertEqual(self.stored()["access_token"], OLD_ACCESS)
                os.unlink(os.path.join(self.directory, aside))

    def held_by_another(self, owner, name: str, times: int):
        """Until the end of the test: what Windows says while another program has a file open, so many times."""
        real, left = getattr(owner, name), [times]

        def held(*arguments, **options):
            if str(arguments[0]).startswith(self.directory) and left[0]:
                left[0] -= 1
                fault = PermissionError(13, "The process cannot access the file")
                fault.winerror = 32
                raise fault
            return real(*arguments, **options)
        self.addCleanup(setattr, owner, name, real)
        setattr(owner, name, held)

    def time_that_passes_by_waiting(self) -> None:
        clock = [0.0]
        self.addCleanup(setattr, claude_gateway, "time", time)
        claude_gateway.time = SimpleNamespace(time=time.time, monotonic=lambda: clock[0], strftime=time.strftime,
                                              sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def test_a_file_that_another_program_has_open_is_replaced_a_moment_later(self):
        self.file.write(stored_token())
        self.time_that_passes_by_waiting()
        for times, written in ((5, True), (-1, False)):
            with self.subTest(times=times):
                self.held_by_another(os, "replace", times)
                if written:
                    self.file.write(stored_token(access_token="newer"))
                else:
                    self.assertRaises(PermissionError, self.file.write, stored_token(access_token="newest"))
                self.assertEqual(self.stored()["access_token"], "newer")
                self.assertEqual(os.listdir(self.directory), ["oauth-tokens.json"])

    def test_a_file_that_another_program_has_open_is_not_damaged(self):
        content = stored_token()
        self.file.write(content)
        self.time_that_passes_by_waiting()
        self.held_by_another(builtins, "open", 5)
        self.assertEqual(self.file.read(), content)
        self.held_by_another(builtins, "open", -1)
        self.assertRaises(claude_gateway.FileDamaged, self.file.read)
        self.file.write(stored_token(access_token="newer"))
        self.assertEqual(os.listdir(self.directory), ["oauth-tokens.json"])

    def test_two_damaged_files_in_one_second_are_both_kept(self):
        os.makedirs(self.directory)
        for content in (b"first {", b"second {"):
            pathlib.Path(self.token_path).write_bytes(content)
            self.file.write(stored_token())
        kept = sorted(path.read_bytes() for path in pathlib.Path(self.directory).glob("*damaged*"))
        self.assertEqual(kept, [b"first {", b"second {"])

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

    @unittest.skipUnless(resource and os.name == "posix", "needs a limit on file sizes")
    def test_unsaved_tokens_whose_refresh_token_stays_are_used_and_told_of_once(self):
        self.file.write(stored_token(0))
        login = self.login()
        answers = [token_answer(access_token="a-%d" % turn, refresh_token=OLD_REFRESH) for turn in (1, 2, 3)]
        self.claude.token_replies += answers
        with self.assertLogs("claude_gateway", "WARNING") as logged:
            with no_room_on_disk():
                self.assertEqual([login.access_token() for _ in range(3)], ["a-1"] * 3)
                self.accept(login, "a-1")
                self.assertEqual([login.access_token(rejected="a-1"), login.access_token()], ["a-2"] * 2)
            self.assertEqual((len(self.token_requests()), len(logged.output)), (2, 1), logged.output)
            self.assertEqual((login.access_token(), self.stored()["access_token"]), ("a-2", "a-2"))
            with no_room_on_disk():
                self.accept(login, "a-2")
                self.assertEqual([login.access_token(rejected="a-2"), login.access_token()], ["a-3"] * 2)
            self.assertEqual((len(self.token_requests()), len(logged.output)), (3, 2), logged.output)

    @unittest.skipUnless(resource and os.name == "posix", "needs a limit on file sizes")
    def test_tokens_older_than_the_unsaved_ones_do_not_come_back(self):
        for refresh_token, old_access in ((OLD_REFRESH, OLD_ACCESS), (NEW_REFRESH, "from-an-even-older-copy")):
            with self.subTest(refresh_token=refresh_token), self.assertLogs("claude_gateway", "WARNING"):
                self.claude.reset()
                self.file.write(stored_token())
                login = self.login()
                self.claude.token_replies += [token_answer(access_token="a-%d" % turn, refresh_token=refresh_token)
                                              for turn in (1, 2)]
                with no_room_on_disk():
                    self.assertEqual(login.access_token(rejected=login.access_token()), "a-1")
                    self.accept(login, "a-1")
                    self.assertEqual(login.access_token(rejected="a-1"), "a-2")
                self.file.write(stored_token(access_token=old_access))
                self.assertEqual((login.access_token(), self.stored()["access_token"]), ("a-2", "a-2"))

    @POSIX_ONLY                                     # on Windows a path below a file does not exist: a logout
    def test_a_directory_that_goes_and_comes_back_does_not_bring_old_tokens_back(self):
        # a home that is unmounted for a while; a file stands where the directory should be, which stops root as well
        self.file.write(stored_token())
        login = self.login()
        self.assertEqual(login.access_token(), OLD_ACCESS)
        os.rename(self.directory, self.directory + ".away")
        pathlib.Path(self.directory).touch()
        self.claude.token_replies += [token_answer(), token_answer(access_token="third", refresh_token="third-r")]
        with self.assertLogs("claude_gateway", "WARNING"):
            self.assertEqual(login.access_token(rejected=OLD_ACCESS), NEW_ACCESS)
            self.assertEqual(self.accept(login, login.access_token()), NEW_ACCESS)
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
        pathlib.Path(self.token_path).write_bytes(b"{ torn")
        self.claude.token_replies.append(token_answer())
        with self.assertLogs("claude_gateway", "WARNING"):
            self.assertEqual(login.access_token(), OLD_ACCESS)
            self.assertEqual(login.access_token(rejected=OLD_ACCESS), NEW_ACCESS)
        self.assertEqual(self.stored()["access_token"], NEW_ACCESS)
        kept, = [name for name in os.listdir(self.directory) if "damaged" in name]
        self.assertEqual(pathlib.Path(self.directory, kept).read_bytes(), b"{ torn")

    @POSIX_ONLY
    def test_a_kill_at_any_moment_leaves_a_whole_file(self):
        code = ("file = claude_gateway.TokenFile(sys.argv[1]); number = 0\n"
                "while True:\n"
                "    number += 1; file.write({'access_token': 'a' * 20_000, 'number': number})\n"
                "    if number == 5: print('going', flush=True)\n")
        for _ in range(3):
            child = subprocess.Popen([sys.executable, "-c", imported() + code, self.token_path], stdout=subprocess.PIPE)
            try:
                self.assertEqual(child.stdout.readline().strip(), b"going")
            finally:
                child.kill()
                child.wait(10)
                child.stdout.close()
            self.assertEqual(self.stored()["access_token"], "a" * 20_000)
            with self.file.lock():                              # the dead process holds nothing
                self.file.write(stored_token())


# ---- Usage -------------------------------------------------------------------------------------------

MILLION = {"input_tokens": 1_000_000, "output_tokens": 100_000}     # 3 dollars of Sonnet 5.5


def wait_for_a_day_that_lasts() -> None:
    """For tests in which it has to be the same day at the end as at the beginning."""
    now = time.localtime()
    left = 86_400 - (now.tm_hour * 3_600 + now.tm_min * 60 + now.tm_sec)
    if left < 30:
        time.sleep(left + 1)


class UsageTestCase(GatewayTestCase):
    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, "usage.json")
        wait_for_a_day_that_lasts()

    def count(self, **settings) -> Service:
        """A gateway that counts usage by day."""
        return self.start(**dict({"usage_file": self.path}, **settings))

    def rows(self, service=None) -> list:
        """What the file holds after a write of what is counted."""
        gateway = (service or self.service).gateway
        gateway.running.wait_until_idle(30)
        gateway.usage.write()
        with open(self.path, encoding="utf-8") as file:
            return json.load(file)["rows"]

    def expensive(self, count=1) -> None:
        self.claude.play(*[message(text("A"), usage=MILLION)] * count)


class UsageTests(UsageTestCase):
    def test_absurd_counts_of_an_answer_are_unknown(self):
        iteration = {"type": "compaction", "input_tokens": 5, "cache_creation": {"ephemeral_1h_input_tokens": 4}}
        usage = {"input_tokens": "x", "cache_creation": {"ephemeral_1h_input_tokens": []}, "iterations": [iteration]}
        for stream in (False, True):
            events = events_of(message(text("A"), stop_reason="end_turn"))
            events[0]["message"]["usage"] = events[-2]["usage"] = usage
            self.claude.play(FakeReply(pieces=[sse(events)]))
            answer = self.chat(stream=stream)
            self.assertEqual((answer.status, b"error" in answer.raw), (200, False), answer.raw)

    def test_requests_are_counted_by_day_tool_model_and_key(self):
        self.count(api_key=("first-key", "second-key"))
        for key, agent, fields in (("first-key", "aider/1", {}), ("first-key", "aider/1", {"stream": True}),
                                   ("second-key", "zed/2", {})):
            self.claude.play(message(text("A"), usage={"input_tokens": 100, "cache_read_input_tokens": 50,
                                                       "cache_creation_input_tokens": 10, "output_tokens": 7}))
            self.chat("a secret of mine", headers={"authorization": "Bearer " + key, "user-agent": agent}, **fields)
        headers = {"authorization": "Bearer first-key", "user-agent": "aider/1"}
        self.chat(headers=headers, model="none")    # no model, no row
        for stream in (False, True):
            self.claude.play(message(text("A"), usage={"input_tokens": 1, "output_tokens": 1}))
            self.ask("POST", "/v1/messages", {"model": "haiku", "max_tokens": 9, "stream": stream, "messages": [
                {"role": "user", "content": "Hi"}]}, headers)
        self.claude.play(FakeReply(400, body=error_body("invalid_request_error", "Odd")))
        self.chat(headers=headers)
        self.claude.reset()
        rows = {(row["tool"], row["model"]): row for row in self.rows()}
        first, second = rows["aider", "claude-sonnet-5-5"], rows["zed", "claude-sonnet-5-5"]
        self.assertEqual({row["day"] for row in rows.values()}, {time.strftime("%Y-%m-%d")})
        self.assertEqual([second[name] for name in ("requests", "input", "cache_read", "cache_write", "output")],
                         [1, 100, 50, 10, 7])
        self.assertEqual((first["requests"], first["errors"], first["input"]), (3, 1, 200))
        self.assertEqual(round(second["usd"], 9), (100 * 2 + 50 * 0.1 + 10 * 2.5 + 7 * 10) / 1e6)
        self.assertEqual(rows["aider", "claude-haiku-5-5"]["requests"], 2)
        self.assertEqual((first["key"], second["key"]),
                         tuple(hashlib.sha256(key).hexdigest()[:12] for key in (b"first-key", b"second-key")))
        text_of_file = pathlib.Path(self.path).read_text("utf-8")
        for secret in ("secret of mine", "first-key", SECRET):
            self.assertNotIn(secret, text_of_file)

    def test_gateways_add_to_one_file(self):
        services = [self.count(), self.count()]
        for service in services:
            self.service = service
            self.expensive()
            self.chat()
        for _ in range(2):
            for service in services:
                row, = self.rows(service)
        self.assertEqual((row["requests"], row["input"], round(row["usd"], 9)), (2, 2_000_000, 6))
        for service in services:
            (counted,) = service.gateway.usage.rows().values()
            self.assertEqual(counted["requests"], 2)

    def test_processes_that_write_at_once_lose_nothing(self):
        code = ("usage = claude_gateway.Usage(sys.argv[1])\n"
                "for turn in range(50): usage.add('tool', 'model', '', {'requests': 1}); usage.write()\n")
        children = [subprocess.Popen([sys.executable, "-c", imported() + code, self.path]) for _ in range(3)]
        self.assertEqual([child.wait(120) for child in children], [0] * 3)
        row, = claude_gateway.Usage(self.path).rows().values()
        self.assertEqual(row["requests"], 150)

    def test_it_is_written_within_a_minute_and_at_the_end(self):
        service = self.count()
        self.chat()
        service.gateway.running.wait_until_idle(30)
        self.assertTrue(eventually(lambda: os.path.exists(self.path)))
        self.chat()
        service.close(1)
        with open(self.path, encoding="utf-8") as file:
            row, = json.load(file)["rows"]
        self.assertEqual((row["requests"], row["output"]), (2, 14))
        if os.name == "posix":
            self.assertEqual(oct(os.stat(self.path).st_mode & 0o777), "0o600")

    def test_the_end_waits_for_a_write_that_is_under_way(self):
        began, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        class SlowUsage(claude_gateway.Usage):
            def _read(self):
                began.set()
                go_on.wait(10)
                return super()._read()

        usage = SlowUsage(self.path)
        usage.add("tool", "model", "", {"requests": 1})
        self.assertTrue(began.wait(30))
        closing = threading.Thread(target=usage.close)
        closing.start()
        closing.join(0.1)
        self.assertTrue(closing.is_alive())
        go_on.set()
        closing.join(30)
        self.assertTrue(os.path.exists(self.path))

    def test_the_newest_400_days_are_kept_though_the_clock_is_years_ahead_of_them(self):
        days = [time.strftime("%Y-%m-%d", time.gmtime(number * 86_400)) for number in range(400)]
        rows = [{"day": day, "tool": "t", "model": "m", "key": "", "requests": 1} for day in days]
        pathlib.Path(self.path).write_text(json.dumps({"rows": rows}), "utf-8")
        self.count()
        self.assertEqual(self.rows(), rows)
        self.chat()
        for _ in range(2):
            self.assertEqual([row["day"] for row in self.rows()], [*days[1:], time.strftime("%Y-%m-%d")])

    def test_a_damaged_file_is_kept_aside(self):
        new = {"day": time.strftime("%Y-%m-%d"), "tool": "t", "model": "m", "key": "", "requests": 1}
        self.count()
        for content in ("{", "[]", '{"rows": 5}', '{"rows": [5]}', json.dumps({"rows": [dict(new, usd="x")]}),
                        json.dumps({"rows": [dict(new, usd=float("nan"))]}), json.dumps({"rows": [dict(new, usd=-1)]}),
                        json.dumps({"rows": [dict(new, usd="?")]}).replace('"?"', "1e999")):
            with self.subTest(content):
                pathlib.Path(self.path).write_text(content, "utf-8")
                with self.assertLogs("claude_gateway", "WARNING"):
                    self.assertEqual(self.chat().status, 200)
                    self.assertEqual(len(self.rows()), 1)
        kept = [name for name in os.listdir(os.path.dirname(self.path)) if "damaged" in name]
        self.assertEqual(len(kept), 8)

    def test_nobody_waits_for_a_process_that_holds_the_file(self):
        usage = self.count(budget=((9.0, "day"),)).gateway.usage
        with claude_gateway.UsageFile(self.path).lock():
            writer = threading.Thread(target=usage.write)
            writer.start()
            self.assertTrue(eventually(lambda: usage._next_write))
            self.assertEqual([self.chat().status, self.ask("GET", "/").status], [200, 200])
            self.assertTrue(writer.is_alive())
        writer.join(20)
        self.assertFalse(writer.is_alive())

    def test_tools_that_a_client_makes_up_do_not_fill_the_file(self):
        rows = [{"day": claude_gateway.day_of(time.time()), "tool": str(number), "model": "m", "key": "", "requests": 1}
                for number in range(claude_gateway.USAGE_ROWS)]
        pathlib.Path(self.path).write_text(json.dumps({"rows": rows}), "utf-8")
        usage = self.count().gateway.usage
        usage.write()
        for number in range(9):
            usage.add("made-up-%d" % number, "m", "", {"requests": 1})
        self.assertEqual(len(self.rows()), claude_gateway.USAGE_ROWS + 1)

    def test_a_place_that_cannot_be_written_ends_nothing(self):
        self.path = os.path.join(PROGRAM, "usage.json")
        service = self.count()
        with self.assertLogs("claude_gateway", "WARNING") as logged:
            for _ in range(2):
                self.assertEqual(self.chat().status, 200)
                service.gateway.running.wait_until_idle(30)
                service.gateway.usage.write()
        self.assertEqual(len([line for line in logged.output if "could not be written" in line]), 1)
        self.assertEqual(self.chat().status, 200)

    def test_the_page_has_the_last_thirty_days(self):
        self.assertEqual(self.ask("GET", "/", headers={"accept": "application/json"}).json["days"], [])
        self.count()
        self.expensive()
        self.chat()
        self.rows()
        data = self.ask("GET", "/", headers={"accept": "application/json"}).json
        self.assertEqual((len(data["days"]), data["days"][-1]),
                         (30, {"day": time.strftime("%Y-%m-%d"), "usd": 3, "requests": 1}))
        if shutil.which("node"):
            data["days"][0]["usd"] = 1.5
            shown = StatusTests.page(self, [(200, json.dumps(data), "")])[1]
            self.assertEqual((shown["week"], shown["month"]), ("$3.00", "in 7 days; $4.50 in 30 days, requests: 1"))

    def test_periods_begin_and_end_where_a_calendar_says(self):
        def at(*date):
            return time.mktime((*date, 12, 0, 0, 0, 0, -1))
        for date, period, first, last in (
                ((2026, 11, 29), "day", "2026-11-29", "2026-11-30"),
                ((2026, 12, 31), "day", "2026-12-31", "2027-01-01"),
                ((2026, 11, 29), "week", "2026-11-23", "2026-11-30"),
                ((2027, 1, 1), "week", "2026-12-28", "2027-01-04"),
                ((2026, 12, 31), "month", "2026-12-01", "2027-01-01")):
            with self.subTest(date=date, period=period):
                begin, end = claude_gateway.period_of(period, at(*date))
                self.assertEqual((begin, time.strftime("%Y-%m-%d %H:%M", time.localtime(end))),
                                 (first, last + " 00:00"))


class BudgetTests(UsageTestCase):
    def test_a_budget_refuses_once_it_is_used_up(self):
        self.count(budget=((5.0, "week"), (100.0, "month")))
        self.expensive(2)
        self.assertEqual([self.chat().status, self.chat(stream=True).status], [200, 200])
        for path, body in (("/v1/chat/completions", {}), ("/v1/messages", {"max_tokens": 9}),
                           ("/v1/chat/completions", {"stream": True})):
            answer = self.ask("POST", path, dict(body, model="sonnet", messages=[{"role": "user", "content": "Hi"}]))
            self.assertEqual((answer.status, answer.headers["x-should-retry"]), (429, "false"))
            self.assertRegex(answer.error["message"],
                             r"budget of \$5 a week is used up: it is \$6.00. It is reset at \d{4}-\d\d-\d\d 00:00.")
        self.assertEqual((answer.error["code"], answer.error["type"]), ("insufficient_quota", "insufficient_quota"))
        self.assertEqual(len(self.claude.messages), 2)
        count = self.ask("POST", "/v1/messages/count_tokens", {"model": "sonnet", "messages": [
            {"role": "user", "content": "Hi"}]})
        self.assertEqual(count.status, 200, "counting costs nothing")

    def test_each_client_key_has_its_own(self):
        self.count(budget=((1.0, "day"),), api_key=("one", "two"))
        self.expensive()
        asked = [self.chat(headers={"authorization": "Bearer " + key}).status for key in ("one", "one", "two")]
        self.assertEqual(asked, [200, 429, 200])

    def test_what_another_gateway_spent_counts_and_what_was_spent_before(self):
        services = [self.count(budget=((1.0, "month"),)) for _ in range(2)]
        self.service = services[0]
        self.expensive()
        self.chat()
        self.rows()
        self.service = services[1]
        self.assertEqual(self.chat().status, 429)

    def test_what_running_requests_have_cost_so_far_counts(self):
        self.count(budget=((1.0, "day"),))
        begin, release = threading.Event(), threading.Event()
        for event in (begin, release):
            self.addCleanup(event.set)
        whole = events_of(message(text("A"), usage=MILLION))
        self.claude.play(*[FakeReply(hold=[begin], pieces=[sse(whole[:1]), release, sse(whole[1:])])
                           for _ in range(20)])
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(self.chat().status)) for _ in range(20)]
        for thread in threads:
            thread.start()
        self.assertTrue(eventually(lambda: len(self.claude.messages) == 20))
        begin.set()
        self.assertTrue(eventually(lambda: self.chat().status == 429), "the first events have come")
        release.set()
        for thread in threads:
            thread.join(20)
        self.assertEqual(statuses, [200] * 20, "what runs may finish")
        self.assertEqual(self.chat().status, 429)

    def test_a_budget_that_cannot_be_counted_refuses(self):
        self.count(budget=((1.0, "day"),))
        for model, speed in (("claude-mythos-5-2", None), ("claude-fable-5-2", "fast")):
            answer = self.chat(model=model, **({"speed": speed} if speed else {}))
            self.assertEqual(answer.status, 429)
            self.assertIn("the price of %s is not known" % model, answer.error["message"])
        self.assertEqual(self.chat().status, 200)
        self.assertTrue(self.service.gateway.running.wait_until_idle(30))
        self.service.gateway.usage.close()              # nothing is written over what follows
        pathlib.Path(self.path).write_text("{ torn", "utf-8")
        answer = self.chat()
        self.assertEqual(answer.status, 429)
        self.assertIn(self.path, answer.error["message"])
        self.service.gateway.usage.write()
        self.assertEqual(pathlib.Path(self.path).read_text("utf-8"), "{ torn")
        self.start(usage_file="", budget=((1.0, "day"),))
        self.assertIn("usage is not counted here", self.chat().error["message"])
        self.assertEqual(len(self.claude.messages), 1)

    def test_an_absurd_reset_is_unknown(self):
        for reset in ("1e308", "1e18", "-5", "nan"):
            with self.subTest(reset=reset):
                self.start(plan_only=True)
                self.claude.play(FakeReply(body=message(text("A")), headers={
                    "anthropic-ratelimit-unified-5h-utilization": "1.0",
                    "anthropic-ratelimit-unified-5h-reset": reset}))
                self.assertEqual([self.chat().status, self.chat().status], [200, 200])
                limit, = self.ask("GET", "/").json["limits"]
                self.assertIsNone(limit["resets_at"])

    def test_plan_only_does_not_spill_into_extra_usage(self):
        for reset, status in ((time.time() + 3_600, 429), (time.time() - 10, 200)):
            for path in ("/v1/chat/completions", "/v1/messages"):
                with self.subTest(reset=reset, path=path):
                    self.start(plan_only=True, claude_code_oauth_token="sk-ant-oat01-c", anthropic_api_key="")
                    self.claude.play(FakeReply(body=message(text("A")), headers={
                        "anthropic-ratelimit-unified-5h-utilization": "1.0",
                        "anthropic-ratelimit-unified-5h-reset": str(int(reset)),
                        "anthropic-ratelimit-tokens-limit": "10", "anthropic-ratelimit-tokens-remaining": "0",
                        "anthropic-ratelimit-tokens-reset": "2031-01-01T00:00:00Z"}))
                    self.assertEqual(self.chat().status, 200)
                    answer = self.ask("POST", path, {"model": "sonnet", "max_tokens": 2_000, "messages": [
                        {"role": "user", "content": "Hi"}]})
                    self.assertEqual(answer.status, status)
                    if status == 429:
                        self.assertIn("the plan's window of 5 hours is used up. It is reset at",
                                      answer.error["message"])


# ---- HTTP/1.1 ----------------------------------------------------------------------------------------

def chunked_chat_bytes(body: bytes, *headers) -> bytes:
    """A chat request with Transfer-Encoding: chunked, whose body is framed already."""
    return request_bytes("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked",
                         *headers, body=body)


class FramingTests(HttpTestCase):
    """Every one of these is followed by a request that must not be answered, or smuggling would work."""

    def test_a_request_whose_length_is_in_doubt_is_refused(self):
        for headers, statuses in (
                (["Content-Length: 5", "Transfer-Encoding: chunked"], [400]),
                (["Transfer-Encoding: chunked", "Content-Length: 5"], [400]),
                (["Content-Length: 5", "Content-Length: 5"], [400]),
                (["Content-Length: 5", "Content-Length: 6"], [400]),
                (["Content-Length: 5, 5"], [400]), (["Content-Length: +5"], [400]), (["Content-Length: -1"], [400]),
                (["Content-Length: 1_0"], [400]), (["Content-Length: 0x5"], [400]), (["Content-Length:"], [400]),
                (["Content-Length: 5 5"], [400]), (["Content-Length: 5.0"], [400]), ([b"Content-Length: \xb2"], [400]),
                (["Content-Length: 5\x0b"], [400]), (["Content-Length : 5"], [400]), (["Content-Length: five"], [400]),
                (["Content-Length: " + "9" * 30], [400, 413]),
                (["Transfer-Encoding: gzip"], [400, 501]), (["Transfer-Encoding: identity"], [400, 501]),
                (["Transfer-Encoding: chunked, gzip"], [400, 501]), (["Transfer-Encoding: gzip, chunked"], [400, 501]),
                (["Transfer-Encoding: chunked, chunked"], [400, 501]), (["Transfer-Encoding: xchunked"], [400, 501]),
                (["Transfer-Encoding:"], [400, 501]), (["Transfer-Encoding: \x0bchunked"], [400]),
                (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], [400]),
                (["Transfer-Encoding : chunked"], [400])):
            for line in ("POST /v1/chat/completions HTTP/1.1", "GET /health HTTP/1.1", "OPTIONS / HTTP/1.1"):
                with self.subTest(line=line, headers=headers):
                    self.assert_refused(request_bytes(line, "Host: localhost", *headers, body=b"0\r\n\r\n"), *statuses)

    def test_chunked_bodies_are_not_for_http_1_0(self):
        self.assert_refused(request_bytes("POST /v1/chat/completions HTTP/1.0", "Transfer-Encoding: chunked",
                                          "Connection: keep-alive", body=in_chunks(CHAT_BODY)), 400)

    def test_malformed_headers_are_refused(self):
        for name, header in (
                ("blank before the colon", "X-Test : 1"), ("no colon", "X-Test"), ("no name", ": 1"),
                ("folded", "X-Test: 1\r\n folded"), ("folded with a tab", "X-Test: 1\r\n\tfolded"),
                ("bare CR", "X-Test: 1\rX-Evil: 2"), ("CR at the end", "X-Test: 1\r"), ("NUL", "X-Test: a\0b"),
                ("NUL in the name", "X-T\0est: 1"), ("blank in the name", "X Test: 1"), ("DEL", "X-Test: \x7f"),
                ("escape", "X-Test: \x1b[2J"), ("name beyond ASCII", b"X-T\xe9st: 1"), ("bracket", "X-[Test]: 1")):
            with self.subTest(name):
                self.assert_refused(request_bytes("GET /health HTTP/1.1", "Host: localhost", header), 400)

    def test_blank_lines_before_a_request_are_skipped_and_count_towards_its_size(self):
        for blank in (b"\r\n", b"\n", b"\r\n" * 1_000):
            answers = self.exchanged(blank + request_bytes("GET /health HTTP/1.1", "Host: localhost",
                                                           "Connection: close"))
            self.assertEqual([answer.status for answer in answers], [200])
        for blank in (b"\r\n" * 40_000, b"\n" * 70_000):
            answers = self.exchanged(blank)
            self.assertEqual([(answer.status, answer.error["code"]) for answer in answers],
                             [(431, "request_header_fields_too_large")])

    def test_methods_are_told_apart_by_their_case(self):
        for method in ("get", "Get", "options", "HeaD"):
            with self.subTest(method):
                answer, = self.exchanged(request_bytes(method + " /health HTTP/1.1", "Host: localhost",
                                                       "Connection: close"))
                self.assertEqual((answer.status, answer.error["code"]), (405, "method_not_allowed"))

    def test_twice_as_long_a_head_takes_no_more_than_twice_the_work(self):
        """Whoever has no key must not be able to keep the interpreter busy."""
        def cost(size: int) -> float:
            line, headers = (part.replace("...", (unit * size)[:size // len(unit) * len(unit)]) for part in (
                "GET %s HTTP/1.1" % target, header))
            started = time.process_time()
            self.exchanged(request_bytes(line, *(["Host: localhost"] if "Host" not in header else []),
                                         headers.encode("latin-1"), "Connection: close"))
            return time.process_time() - started
        targets = [("/%s..." % path, "X-A: 1", unit) for path, unit in (
            ("chat/completions", "/chat/completions"), ("", "/chat/completions"), ("", "v1/"), ("v1", "/v1"), ("", "/"),
            ("models/", "claude-"), ("models/", "gpt-"), ("models/", "%"), ("responses/", "/x/input_items"),
            ("", "?"), ("", "#"), ("?", "a=1&"), ("", "../"))]
        values = [("/v1/models/x", "%s: ...!" % name, unit) for name, unit in (
            ("Host", "a."), ("Host", "[::"), ("Origin", "http://a."), ("Origin", "localhost."), ("Origin", "127.0.0."),
            ("Authorization", "Bearer "), ("Authorization", "\t"), ("User-Agent", "Async"), ("User-Agent", "OpenAI/"),
            ("Connection", "close,"), ("X-Claude-Gateway-Hop", "a,"), ("Content-Length", "1"), ("X-A", "\xe9"))]
        for target, header, unit in [*targets, ("http://localhost...", "X-A: 1", "/v1"), *values]:
            target += "x" if "..." in target else ""
            with self.subTest(target=target, header=header, unit=unit):
                once, twice = (min(cost(size) for _ in range(2)) for size in (30_000, 60_000))
                self.assertLess(twice, 2.5 * once + 0.03)

    def test_a_blank_before_the_first_header_is_refused(self):
        self.assert_refused(request_bytes("GET /health HTTP/1.1", " Host: localhost"), 400)

    def test_http_1_1_needs_one_well_formed_host(self):
        for headers in ([], ["Host: localhost", "Host: localhost"], ["Host: localhost", "Host: evil.example"],
                        ["Host:"], ["Host: a b"], ["Host: localhost/x"], ["Host: u@localhost"], ["Host: localhost:x"],
                        ["Host: localhost:1:2"], ["Host: [::1"], ["Host: localhost, evil.example"],
                        ["Host: local\\host"], [b"Host: l\xf6calhost"], ["Host: localhost#"], ["Host: local%68ost"]):
            with self.subTest(headers=headers):
                answers = self.exchanged(request_bytes("GET /health HTTP/1.1", "Connection: close", *headers))
                self.assertEqual([answer.status for answer in answers], [400])
                self.assert_envelope(answers[0])

    def test_headers_that_decide_about_access_must_not_come_twice(self):
        for name in ("Authorization", "X-Api-Key", "Api-Key", "Origin", "Expect", "Content-Type", "Content-Encoding"):
            with self.subTest(name):
                self.assert_refused(request_bytes("GET /health HTTP/1.1", "Host: localhost", name + ": a",
                                                  name + ": b"), 400)

    def test_request_lines_that_are_not_http_1_are_refused(self):
        for line in ("GET  /health HTTP/1.1", "GET /health  HTTP/1.1", "GET\t/health\tHTTP/1.1",
                     " GET /health HTTP/1.1",
                     "GET /health HTTP/1.1 ", "GET /he alth HTTP/1.1", "GET /health http/1.1", "GET /health HTTP/1.10",
                     "GET /health HTTP/1.2", "GET /health HTTP/3.0", "GET /health HTTP/1", "GET /health XTTP/1.1",
                     "/health HTTP/1.1", "GET /h\0 HTTP/1.1", "GET /h\xe9 HTTP/1.1", "GET /h\r HTTP/1.1",
                     "G\0T /health HTTP/1.1", "G(T /health HTTP/1.1", "GET health HTTP/1.1", "GET * HTTP/1.1",
                     "GET ?x HTTP/1.1", "CONNECT api.example:443 HTTP/1.1", "GET localhost/health HTTP/1.1",
                     "\x16\x03\x01\x02"):
            with self.subTest(line=line):
                answers = self.exchanged(request_bytes(line, "Host: localhost", "Connection: close"))
                self.assertEqual(len(answers), 1)
                self.assertIn(answers[0].status, (400, 505))
                self.assert_envelope(answers[0])

    def test_the_http_2_preface_is_refused(self):
        self.assert_refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 400, 505)

    def test_http_0_9_is_refused_at_once(self):
        # such a client sends no blank line and waits, so waiting for one would keep it until the timeout
        answers = self.exchanged(b"GET /health\r\n")
        self.assertEqual(len(answers), 1)
        self.assertIn(answers[0].status, (400, 505))

    def test_heads_beyond_the_bounds_are_431_and_the_client_sees_it(self):
        for name, data in (
                ("long target", request_bytes("GET /%s HTTP/1.1" % ("a" * 70_000), "Host: localhost")),
                ("long header", request_bytes("GET /health HTTP/1.1", "Host: localhost", "X-Test: " + "a" * 70_000)),
                ("many headers", request_bytes("GET /health HTTP/1.1", "Host: localhost", *["X-Test: 1"] * 200)),
                ("a megabyte in one line", request_bytes("GET /health HTTP/1.1", "Host: localhost",
                                                         "X-Test: " + "a" * 1_000_000)),
                ("a megabyte in lines", request_bytes("GET /health HTTP/1.1", "Host: localhost",
                                                      *["X-Test: %s" % ("a" * 900)] * 1_100)),
                ("no line end at all", b"a" * 200_000)):
            with self.subTest(name):
                self.assert_refused(data, 400, 414, 431)
                if name == "a megabyte in one line":
                    self.assert_not_reset()

    def test_a_head_of_ordinary_size_is_taken(self):
        answer, = self.exchanged(request_bytes("GET /health HTTP/1.1", "Host: localhost", "Connection: close",
                                               "Cookie: " + "a" * 30_000, *["X-Test-%d: 1" % n for n in range(80)]))
        self.assertEqual(answer.status, 200)

    def test_a_head_without_end_is_refused_before_it_ends(self):
        for data in (b"GET /health HTTP/1.1\r\nX-Test: " + b"a" * 70_000, b"a" * 70_000):
            with self.subTest(data[:20]):
                connection = self.connect()
                connection.sendall(data)
                self.assertEqual(answers_in(received_until(connection, b"never"))[0].status, 431)

    def test_too_many_header_lines_are_refused_before_their_end(self):
        connection = self.connect()
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-Test: 1\r\n" * 102)
        self.assertEqual(answers_in(received_until(connection, b"never"))[0].status, 431)

    def test_a_head_is_the_same_however_it_is_cut(self):
        head = b"\r\n\nGET /health HTTP/1.1\r\nHost: localhost\nX-Test: 1\r\n\r\nrest"
        for cut in range(len(head)):
            for twice in range(cut, len(head), 7):
                received, lines = bytearray(), []
                reader = claude_gateway.HeadReader(received, claude_gateway.request_line, ValueError)
                for piece in (head[:cut], head[cut:twice], head[twice:]):
                    received += piece
                    blank = claude_gateway.BLANK_LINES.match(received)
                    del received[:blank.end() if blank else 0]
                    lines = lines or reader.lines()
                self.assertEqual((lines, bytes(received)), ([
                    "GET /health HTTP/1.1", "Host: localhost", "X-Test: 1"], b"rest"))

    def test_a_hundred_header_lines_are_taken_and_no_more(self):
        for count, status in ((100, 200), (101, 431)):
            with self.subTest(count):
                answer, = self.exchanged(request_bytes("GET /health HTTP/1.1", "Host: localhost", "Connection: close",
                                                       *["X-Test: 1"] * (count - 2)))
                self.assertEqual(answer.status, status)

    def test_a_refused_head_with_a_big_body_behind_it_is_answered_without_a_reset(self):
        answers = self.exchanged(request_bytes("POST /v1/chat/completions HTTP/1.1", "Host: localhost",
                                               "Content-Length: 2000000", "Content-Length: 2000000",
                                               body=b"a" * 2_000_000))
        self.assertEqual([answer.status for answer in answers], [400])
        self.assert_not_reset()

    def test_bad_chunks_are_refused(self):
        for name, body in (
                ("negative", b"-5\r\nhello\r\n0\r\n\r\n"), ("plus", b"+5\r\nhello\r\n0\r\n\r\n"),
                ("prefix", b"0x5\r\nhello\r\n0\r\n\r\n"), ("underscore", b"1_0\r\nhello\r\n0\r\n\r\n"),
                ("no digits", b"\r\nhello\r\n0\r\n\r\n"), ("letters", b"zz\r\nhello\r\n0\r\n\r\n"),
                ("two sizes", b"5 5\r\nhello\r\n0\r\n\r\n"), ("blank first", b" 5\r\nhello\r\n0\r\n\r\n"),
                ("bare LF", b"5\nhello\r\n0\r\n\r\n"), ("too long", b"5\r\nhello!\r\n0\r\n\r\n"),
                ("too short", b"5\r\nhell\r\n0\r\n\r\n"), ("nine digits", b"000000005\r\nhello\r\n0\r\n\r\n"),
                ("only an extension", b";x\r\nhello\r\n0\r\n\r\n"), ("NUL", b"5\0\r\nhello\r\n0\r\n\r\n"),
                ("endless extension", b"5;" + b"x" * 5_000 + b"\r\nhello\r\n0\r\n\r\n"),
                ("endless trailers", b"0\r\n" + b"X-Test: 1\r\n" * 1_000 + b"\r\n"),
                ("endless trailer", b"0\r\nX-Test: " + b"a" * 5_000 + b"\r\n\r\n"),
                ("bare CR in an extension", b"5;a\rb\r\nhello\r\n0\r\n\r\n")):
            with self.subTest(name):
                self.assert_refused(chunked_chat_bytes(body), 400)

    def test_pipelined_requests_are_answered_in_order(self):
        self.claude.play(message(text("one")), message(text("two")))
        answers = self.exchanged(b"".join([
            chat_bytes(), b"\r\n\r\n", request_bytes("GET /nowhere HTTP/1.1", "Host: localhost"),
            chunked_chat_bytes(in_chunks(CHAT_BODY)), request_bytes("GET /health HTTP/1.1", "Host: localhost"),
            request_bytes("POST /v1/models HTTP/1.1", "Host: localhost", "Content-Length: 4", body=b"GET "),
            NEXT_REQUEST]))
        self.assertEqual([answer.status for answer in answers], [200, 404, 200, 200, 405, 200])
        self.assertEqual([answers[at].message["content"] for at in (0, 2)], ["one", "two"])

    def test_a_stream_is_followed_by_the_next_answer_on_the_same_connection(self):
        body = CHAT_BODY[:-1] + b',"stream":true}'
        answers = self.exchanged(chat_bytes(body=body) + NEXT_REQUEST)
        self.assertEqual([answer.status for answer in answers], [200, 200])
        self.assertEqual(answers[0].events[-1], "[DONE]")

    def test_a_small_body_of_an_early_refusal_is_not_taken_for_a_request(self):
        smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answers = self.exchanged(request_bytes("POST /nowhere HTTP/1.1", "Host: localhost",
                                               "Content-Length: %d" % len(smuggled), body=smuggled) + NEXT_REQUEST)
        self.assertEqual([answer.status for answer in answers], [404, 200])

    def test_a_big_or_unframed_body_of_an_early_refusal_ends_the_connection(self):
        big = b"a" * 3_000_000
        self.assert_refused(request_bytes("POST /nowhere HTTP/1.1", "Host: localhost",
                                          "Content-Length: %d" % len(big), body=big), 404)
        self.assert_not_reset()
        self.assert_refused(request_bytes("POST /nowhere HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked",
                                          body=in_chunks(b"hello")), 404)

    def test_a_get_with_a_body_is_answered_once(self):
        answers = self.exchanged(request_bytes("GET /health HTTP/1.1", "Host: localhost", "Content-Length: 18",
                                               body=b"GET / HTTP/1.1\r\n\r\n") + NEXT_REQUEST)
        self.assertEqual([answer.status for answer in answers], [200, 200])

    def test_a_client_that_stops_in_the_middle_is_let_go(self):
        for name, data in (("head", b"GET /health HTT"), ("headers", b"GET /health HTTP/1.1\r\nHost: local"),
                           ("body", chat_bytes()[:-5]), ("chunk", chunked_chat_bytes(b"ff\r\nhello")),
                           ("chunk size", chunked_chat_bytes(b"f")), ("trailers", chunked_chat_bytes(b"0\r\nX: 1\r\n")),
                           ("nothing", b"")):
            with self.subTest(name):
                answers = self.exchanged(data, ends=True)
                self.assertLessEqual(len(answers), 1)
                self.assertEqual([answer.status for answer in answers if not 400 <= answer.status < 500], [])
        self.assertEqual(self.claude.messages, [])

    def test_http_1_0_needs_no_host_and_closes(self):
        answer, = self.exchanged(b"GET /health HTTP/1.0\r\n\r\n")
        self.assertEqual((answer.status, answer.headers["connection"]), (200, "close"))

    def test_http_1_0_may_ask_for_keep_alive(self):
        answers = self.exchanged(b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + NEXT_REQUEST)
        self.assertEqual([answer.headers["connection"] for answer in answers], ["keep-alive", "close"])

    def test_line_feeds_alone_end_lines_too(self):
        answer, = self.exchanged(b"\n\nGET /health HTTP/1.1\nHost: localhost\nConnection: close\n\n")
        self.assertEqual(answer.status, 200)

    def test_every_answer_has_a_date_and_a_request_id(self):
        answers = self.exchanged(request_bytes("GET /nowhere HTTP/1.1", "Host: localhost") + chat_bytes() +
                                 request_bytes("GARBAGE"))
        for answer in answers:
            with self.subTest(status=answer.status):
                self.assertRegex(answer.headers["date"], r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\Z")
                self.assertTrue(answer.headers["x-request-id"])
                self.assertNotIn("Python", answer.headers["server"])
        self.assertRegex(answers[1].headers["x-request-id"], r"\Areq_fake_\d+\Z")     # Claude's own

    def test_random_damage_never_brings_a_second_answer_a_500_or_a_dead_server(self):
        # a good request with 1 to 4 random changes, 300 times; always the same ones
        good = [chat_bytes("X-Test: 1"), chunked_chat_bytes(in_chunks(CHAT_BODY[:9], CHAT_BODY[9:])),
                chat_bytes("Content-Encoding: gzip", body=gzip.compress(CHAT_BODY, mtime=0)),
                request_bytes("GET /v1/models HTTP/1.1", "Host: localhost")]
        rolled = [0]

        def dice(sides: int) -> int:
            rolled[0] += 1
            return int.from_bytes(hashlib.sha256(b"seed %d" % rolled[0]).digest()[:4], "big") % sides

        spice = [b"\r", b"\n", b"\0", b" ", b":", b"\r\n", b"\xff", b"\r\n\r\n", b"0", b"-1", b"chunked", b"[", b'"',
                 b"%", b"HTTP/1.1", b"\r\n ", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"\\ud800",
                 b"1e999"]
        for number in range(300):
            data = good[number % len(good)]
            for _ in range(1 + dice(4)):
                place, kind_of_damage = dice(len(data)), dice(4)
                if kind_of_damage == 0:
                    data = data[:place] + spice[dice(len(spice))] + data[place:]
                elif kind_of_damage == 1:
                    data = data[:place] + data[place + 1 + dice(8):]
                elif kind_of_damage == 2:
                    data = data[:place] + bytes([dice(256)]) + data[place + 1:]
                else:
                    other = dice(len(data))
                    data = data[:place] + data[other:other + 20] + data[place:]
            with self.subTest(number=number, data=data):
                answers = [answer for answer in self.exchanged(data, ends=True) if answer.status != 100]
                self.assertLessEqual(len(answers), 2)   # two only where the damage made two requests of one
                for answer in answers:
                    self.assertIn(answer.status, (200, 204, 400, 403, 404, 405, 408, 413, 415, 426, 431, 501, 505))
        self.assertEqual(self.ask("GET", "/health").status, 200)
        self.claude.violations.clear()                  # damaged JSON that is still JSON: judged by other tests


class BodyTests(HttpTestCase):
    def test_chunked_bodies_are_put_together(self):
        for name, body in (
                ("one chunk", in_chunks(CHAT_BODY)), ("single bytes", in_chunks(*(CHAT_BODY[at:at + 1]
                                                                                for at in range(len(CHAT_BODY))))),
                ("extension", b"%X;name=\"value\";x\r\n%s\r\n0;last\r\n\r\n" % (len(CHAT_BODY), CHAT_BODY)),
                ("trailers", in_chunks(CHAT_BODY)[:-2] + b"X-Check: 1\r\nX-Sum: 2\r\n\r\n"),
                ("leading zeros", b"0000%x \r\n%s\r\n000\r\n\r\n" % (len(CHAT_BODY), CHAT_BODY))):
            with self.subTest(name):
                answers = self.exchanged(chunked_chat_bytes(body) + NEXT_REQUEST)
                self.assertEqual([answer.status for answer in answers], [200, 200], answers[0].raw)

    def test_compressed_bodies_are_unpacked(self):
        raw_deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        for coding, body in (("gzip", gzip.compress(CHAT_BODY)), ("GZIP", gzip.compress(CHAT_BODY)),
                             ("x-gzip", gzip.compress(CHAT_BODY)), ("deflate", zlib.compress(CHAT_BODY)),
                             ("deflate", raw_deflate.compress(CHAT_BODY) + raw_deflate.flush()),
                             ("identity", CHAT_BODY)):
            with self.subTest(coding):
                self.assertEqual(self.ask("POST", "/v1/chat/completions", body, {"content-encoding": coding}).status,
                                 200)
        answer, = self.exchanged(chunked_chat_bytes(in_chunks(gzip.compress(CHAT_BODY)), "Content-Encoding: gzip",
                                                    "Connection: close"))
        self.assertEqual(answer.status, 200)

    def test_unknown_codings_are_415(self):
        for coding in ("br", "compress", "gzip, gzip", "aes128gcm", "gzip;q=1", "\xe9") + (
                ("zstd",) if sys.version_info < (3, 14) else ()):
            with self.subTest(coding):
                answer = self.ask("POST", "/v1/chat/completions", b"\x28\xb5\x2f\xfd", {"content-encoding": coding})
                self.assertEqual(answer.status, 415)
                self.assert_envelope(answer)
                self.assertIn("enable_request_compression = false", answer.error["message"])

    def test_damaged_compression_is_400(self):
        packed = gzip.compress(CHAT_BODY)
        for name, body in (("cut", packed[:-9]), ("wrong sum", packed[:-8] + bytes(8)), ("plain", CHAT_BODY),
                           ("empty", b" "), ("junk", b"\x1f\x8b\x08" + b"junk" * 9)):
            with self.subTest(name):
                answer = self.ask("POST", "/v1/chat/completions", body, {"content-encoding": "gzip"})
                self.assertEqual(answer.status, 400)
                self.assert_envelope(answer)

    def test_a_bomb_is_413(self):
        # behind the limit it is damaged, which shows in the answer if more than the limit is unpacked
        for coding, window in (("gzip", 31), ("deflate", 15)):
            with self.subTest(coding):
                packer = zlib.compressobj(1, zlib.DEFLATED, window)
                bomb = packer.compress(bytes(41_000_000)) + packer.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 9
                answer = self.ask("POST", "/v1/chat/completions", bomb, {"content-encoding": coding})
                self.assertEqual((answer.status, answer.error["code"]), (413, "request_too_large"))
                self.assertIn("40 MB", answer.error["message"])

    def test_a_body_beyond_40_mb_is_413_before_it_is_read(self):
        self.assert_refused(request_bytes("POST /v1/chat/completions HTTP/1.1", "Host: localhost",
                                          "Content-Length: 40000001"), 413)
        self.assert_refused(chunked_chat_bytes(b"2625A01\r\n"), 413)
        self.assert_refused(chunked_chat_bytes(b"1\r\n{\r\n2625A00\r\n"), 413)

    def test_what_would_be_more_than_32_mb_for_claude_is_413(self):
        body = CHAT_BODY.replace(b"Hello", b"a" * 33_000_000)
        answer = self.ask("POST", "/v1/chat/completions", gzip.compress(body, 1), {"content-encoding": "gzip"})
        self.assertEqual((answer.status, answer.error["code"]), (413, "request_too_large"))
        self.assertIn("32 MB", answer.error["message"])
        self.assertEqual(self.claude.messages, [])

    def test_that_limit_holds_on_the_native_door_and_for_counts_too(self):
        self.addCleanup(setattr, claude_gateway, "MAX_UPSTREAM_BODY", claude_gateway.MAX_UPSTREAM_BODY)
        claude_gateway.MAX_UPSTREAM_BODY, words = 300_000, "a" * 300_000       # 32 MB take their time
        for path, fields in (("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": words}]}),
                             ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": words}]}),
                             ("/v1/responses/input_tokens", {"input": words})):
            with self.subTest(path=path):
                answer = self.ask("POST", path, dict(fields, model="claude-opus-5-5"))
                self.assertEqual(answer.status, 413)
                self.assertIn("32 MB", answer.error["message"])
        self.assertEqual(self.claude.requests, [request for request in self.claude.requests if request.method == "GET"])

    def test_expect_is_answered_with_continue_before_the_body(self):
        connection = self.connect()
        head, _, body = chat_bytes("Expect: 100-Continue", "Connection: close").partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        self.assertEqual(received_until(connection, b"\r\n\r\n"), b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.sendall(body)
        self.assertEqual(answers_in(received_until(connection, b"never"))[0].status, 200)

    def test_a_refusal_comes_instead_of_continue(self):
        for line, headers, status in (
                ("POST /nowhere HTTP/1.1", ["Content-Length: 50"], 404),
                ("POST /v1/models HTTP/1.1", ["Content-Length: 50"], 405),
                ("POST /v1/chat/completions HTTP/1.1", ["Content-Length: 50000000"], 413),
                ("POST /v1/chat/completions HTTP/1.1", ["Content-Length: 50", "Origin: http://evil.example"], 403)):
            with self.subTest(status=status):
                self.assert_refused(request_bytes(line, "Host: localhost", "Expect: 100-continue", *headers), status)

    def test_http_1_0_gets_no_continue(self):
        answer, = self.exchanged(chat_bytes("Expect: 100-continue", version="1.0"))
        self.assertEqual(answer.status, 200)

    def test_bodies_in_flight_share_a_budget(self):
        service = self.start()
        service.gateway.body_budget = claude_gateway.Capacity(1_000)
        answer = self.chat("a" * 2_000)
        self.assertEqual((answer.status, answer.error["code"]), (503, "gateway_busy"))
        self.assertGreaterEqual(int(answer.headers["retry-after"]), 1)
        for _ in range(3):                              # what was taken is given back, just after the answer
            self.assertTrue(eventually(lambda: self.chat("a" * 600).status == 200))

    def test_an_early_refusal_is_told_although_there_is_no_room_for_its_body(self):
        service = self.start()
        service.gateway.body_budget = claude_gateway.Capacity(10)
        answer, = self.exchanged(request_bytes("POST /nowhere HTTP/1.1", "Host: localhost", "Content-Length: 50",
                                               body=b"a" * 50))
        self.assertEqual((answer.status, answer.headers["connection"]), (404, "close"))

    def test_a_body_that_found_no_room_is_not_read_twice(self):
        """It was read in part, or whole: bytes of the next request would be taken for its own."""
        service, refusals = self.start(), [False]
        service.gateway.body_budget = SimpleNamespace(give=lambda amount: None, take=lambda amount: not refusals or
                                                      refusals.pop())
        following = request_bytes("GET /health HTTP/1.1", "X-Test: " + "a" * 2_000, "Host: localhost") * 80
        answer, = self.exchanged(chat_bytes(body=CHAT_BODY + b" " * 90_000) + following, ends=True)
        self.assertEqual((answer.status, answer.headers["connection"]), (503, "close"))

    def test_who_only_promises_a_large_body_takes_no_room_from_others(self):
        for framing in ("Content-Length: 900000", "Transfer-Encoding: chunked"):
            with self.subTest(framing):
                service = self.start()
                service.gateway.body_budget = claude_gateway.Capacity(1_000_000)
                for _ in range(5):
                    waiting = self.connect()
                    waiting.sendall(request_bytes("POST /v1/chat/completions HTTP/1.1", "Host: localhost", framing,
                                                  body=b"dbba0\r\n{" if "chunked" in framing else b"{"))
                self.assertTrue(eventually(lambda service=service: service.gateway.running.count == 5))
                self.assertEqual(self.chat("a" * 100_000).status, 200)

    def test_bodies_count_while_they_arrive(self):
        for framing, body in (("Content-Length: 950000", b"x" * 900_000),
                              ("Transfer-Encoding: chunked", b"e7ef0\r\n" + b"x" * 900_000)):
            with self.subTest(framing):
                service = self.start()
                service.gateway.body_budget = claude_gateway.Capacity(1_000_000)
                waiting = self.connect()
                waiting.sendall(request_bytes("POST /v1/chat/completions HTTP/1.1", "Host: localhost", framing,
                                              body=body))
                budget = service.gateway.body_budget
                self.assertTrue(eventually(lambda budget=budget: budget.count == 900_000))
                self.assertEqual(self.chat("a" * 150_000).status, 503)

    def test_a_body_counts_as_what_it_becomes_once_parsed(self):
        service = self.start()
        members = json.dumps({"k%d" % number: 1 for number in range(200)})
        for name, room, usual, costly in (
                ("small members", 10_000, "a" * 3_000, {"metadata": json.loads(members)}),
                ("one wide character", 20_000_000, "a" * 5_000_000, {"user": "a" * 5_000_000 + "\U0001f600"}),
                ("an escaped one", 20_000_000, "a" * 5_000_000, {"user": "a" * 5_000_000 + "\\ud83d\\ude00"})):
            with self.subTest(name):
                service.gateway.body_budget = claude_gateway.Capacity(room)
                self.assertEqual(self.chat(usual).status, 200)
                self.assertTrue(eventually(lambda: service.gateway.body_budget.count == 0))
                answer = self.chat(**costly)
                self.assertEqual((answer.status, answer.error["code"]), (503, "gateway_busy"))
                self.assertTrue(eventually(lambda: service.gateway.body_budget.count == 0))

    def test_an_unpacked_body_counts_against_the_budget_with_its_real_size(self):
        service = self.start()
        service.gateway.body_budget = claude_gateway.Capacity(1_000_000)
        body = CHAT_BODY.replace(b"Hello", b"a" * 2_000_000)
        answer = self.ask("POST", "/v1/chat/completions", gzip.compress(body), {"content-encoding": "gzip"})
        self.assertEqual(answer.status, 503)

    def test_a_packed_body_is_unpacked_only_where_the_budget_has_room_for_what_it_may_become(self):
        service = self.start()
        service.gateway.body_budget = claude_gateway.Capacity(Limits.max_body + 1_000)
        packed, headers = gzip.compress(CHAT_BODY), {"content-encoding": "gzip"}
        for _ in range(2):                              # the room is given back
            self.assertEqual(self.ask("POST", "/v1/chat/completions", packed, headers).status, 200)
            service.gateway.running.wait_until_idle(30)
        service.gateway.body_budget.take(2_000)
        self.assertEqual(self.ask("POST", "/v1/chat/completions", packed, headers).status, 503)

    def test_a_small_body_takes_no_more_of_the_budget_than_it_needs_while_claude_thinks(self):
        packed = gzip.compress(CHAT_BODY)
        for name, asked, room in (
                ("chunked", chunked_chat_bytes(in_chunks(CHAT_BODY), "Connection: close"), 1_000),
                ("packed", chat_bytes("Content-Encoding: gzip", "Connection: close", body=packed),
                 Limits.max_body + 1_000)):
            with self.subTest(name):
                service = self.start()
                service.gateway.body_budget = claude_gateway.Capacity(room)
                arrived, release = threading.Event(), threading.Event()
                self.addCleanup(release.set)
                reply = FakeReply(pieces=[sse(events_of(message(text("late"))))], hold=[release])
                self.claude.play(lambda recorded, arrived=arrived, reply=reply: arrived.set() or reply)
                first = self.connect()
                first.sendall(asked)
                self.assertTrue(arrived.wait(30))
                answer, = self.exchanged(asked)
                self.assertEqual(answer.status, 200, answer.raw)
                release.set()
                self.assertEqual(answers_in(received_until(first, b"never"))[0].status, 200)

    def test_a_body_may_come_in_many_pieces(self):
        connection = self.connect()
        for byte in chat_bytes("Connection: close"):
            connection.sendall(bytes([byte]))
        self.assertEqual(answers_in(received_until(connection, b"never"))[0].status, 200)


class SlowClientTests(HttpTestCase):
    """Whoever dawdles costs one thread for a bounded time, here a short one."""

    def limit(self, name: str, seconds: float) -> socket.socket:
        """A connection to a gateway whose limit of this name is short."""
        self.start(limits=Limits(**{name: seconds}))
        connection = self.connect()
        connection.settimeout(30)
        return connection

    def assert_ended(self, connection: socket.socket, status: bytes) -> None:
        """The answer of this status, and then the end."""
        connection.settimeout(30)
        received = b"".join(iter(lambda: connection.recv(65_536), b""))
        self.assertEqual(received[9:12], status)

    def test_a_connection_that_says_nothing_is_closed(self):
        self.assert_ended(self.limit("idle_timeout", 0.2), b"")

    def test_a_head_has_so_much_time_in_all_however_steadily_it_comes(self):
        connection = self.limit("head_timeout", 0.3)
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        connection.settimeout(0.02)
        for _ in range(100):
            connection.sendall(b"y")
            with contextlib.suppress(socket.timeout):
                connection.recv(1, socket.MSG_PEEK)
                break
        self.assert_ended(connection, b"408")

    def test_a_body_that_stops_is_given_up(self):
        connection = self.limit("body_timeout", 0.2)
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        self.assert_ended(connection, b"408")

    def test_a_body_has_so_much_time_in_all_however_steadily_it_comes(self):
        connection = self.limit("body_timeout", 0.3)
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n")
        connection.settimeout(0.02)
        for _ in range(90):
            connection.sendall(b" ")
            with contextlib.suppress(socket.timeout):
                connection.recv(1, socket.MSG_PEEK)
                break
        else:
            self.fail("nearly all of it was waited for")
        self.assert_ended(connection, b"408")

    def test_a_client_that_does_not_read_its_answer_is_given_up(self):
        connection = self.limit("write_timeout", 0.2)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        self.claude.play(FakeReply(body=message(text("x" * 20_000_000))))
        connection.sendall(chat_bytes())
        self.assertTrue(eventually(lambda: self.claude.messages))
        self.assertTrue(self.service.gateway.running.wait_until_idle(30))


class BodyFramingTests(unittest.TestCase):
    CHUNKED = b"5;x=y\r\nHello\r\n7\r\n, world\r\n0\r\nX-Sum: 1\r\n\r\n"

    def fed(self, chunked, length, data: bytes, size: int):
        framing = claude_gateway.BodyFraming(chunked, length)
        body = b"".join(framing.feed(data[at:at + size]) for at in range(0, len(data), size))
        return body, framing.done, framing.surplus

    def test_any_cut_of_the_bytes_gives_the_same_body(self):
        for size in range(1, len(self.CHUNKED) + 1):
            self.assertEqual(self.fed(True, None, self.CHUNKED, size), (b"Hello, world", True, False))
            self.assertEqual(self.fed(True, None, self.CHUNKED[:-1], size), (b"Hello, world", False, False))
            self.assertEqual(self.fed(False, 5, b"Hello", size), (b"Hello", True, False))
            self.assertEqual(self.fed(False, None, b"Hello", size), (b"Hello", False, False))

    def test_what_comes_behind_the_body_is_told(self):
        self.assertEqual(self.fed(True, None, self.CHUNKED + b"HTTP", 100), (b"Hello, world", True, True))
        self.assertEqual(self.fed(False, 5, b"Hello, world", 100), (b"Hello", True, True))

    def test_chunks_that_do_not_hold_together_are_faults(self):
        for data in (b"zz\r\n", b"\r\n", b"-1\r\n", b"5\r\nHelloX\r\n", b"11111111111111111\r\n", b"0x5\r\nHello",
                     b"5 5\r\nHello", b"1" * 70_000):
            with self.subTest(data[:20]), self.assertRaises(claude_gateway.UpstreamFault):
                self.fed(True, None, data, 100_000)

    def test_only_a_body_without_any_length_may_end_with_the_connection(self):
        framing = claude_gateway.BodyFraming(False, None)
        framing.end()
        self.assertTrue(framing.done)
        for chunked, length in ((True, None), (False, 5)):
            with self.assertRaises(claude_gateway.UpstreamFault):
                claude_gateway.BodyFraming(chunked, length).end()


# ---- Upstream ----------------------------------------------------------------------------------------

MESSAGE_JSON = json.dumps(message(text("Hello!"))).encode()
MESSAGE_EVENTS = sse(events_of(message(text("Hello!"))))
OUR_HEADERS = {"host", "user-agent", "accept-encoding", "anthropic-version", "x-api-key", "content-type",
               "content-length", "x-claude-gateway-hop"}


def upstream_bytes(body: bytes, *headers, status: str = "200 OK", length: bool = True) -> bytes:
    """An answer of the upstream, in JSON unless the headers say otherwise."""
    kinds = [] if any(header.lower().startswith("content-type") for header in headers) else [
        "content-type: application/json"]
    lengths = ["content-length: %d" % len(body)] if length else []
    return request_bytes("HTTP/1.1 " + status, *kinds, *headers, *lengths, body=body)


class LoopbackServer:
    """A server on a port of its own: each connection is handed to `serve`, in a thread."""

    def __init__(self, serve) -> None:
        self._serve_one = serve
        self.stopped = threading.Event()
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(20)
        self.port = self._listener.getsockname()[1]

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        with contextlib.suppress(OSError):              # wakes accept
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                threading.Thread(target=self._serve_and_close, args=(connection,), daemon=True).start()

    def _serve_and_close(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.closing(connection):
            self._serve_one(connection)


class RawUpstream(LoopbackServer):
    """An upstream down to its bytes.  Each connection plays the next script: a list with one entry per POST, which is
    bytes, or a list of bytes, Events to wait for and functions to call.  A script that is over ends the connection."""

    def __init__(self, *scripts, context: ssl.SSLContext = None, banner: bytes = b"") -> None:
        super().__init__(self._serve)
        self.scripts, self.posts, self.connections, self.context = list(scripts), [], 0, context
        self._banner = banner                           # said at once on every connection, which then ends
        self.closed = threading.Event()
        self.url = "%s://127.0.0.1:%d" % ("https" if context else "http", self.port)

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(30)
        with contextlib.ExitStack() as stack:
            if self._banner:
                connection.sendall(self._banner)
                connection.recv(65_536)
                return
            if self.context:
                connection = stack.enter_context(self.context.wrap_socket(connection, server_side=True))
            reader = stack.enter_context(connection.makefile("rb"))
            script = None
            while script is None or script:
                head = list(takewhile(lambda line: line not in (b"", b"\r\n"), iter(reader.readline, None)))
                if not head:
                    return
                if head[0].startswith(b"GET"):          # the model list: there is none
                    connection.sendall(upstream_bytes(b"{}", "connection: close", status="404 Not Found"))
                    return
                length = next(int(line.split(b":")[1]) for line in head if line.lower().startswith(b"content-length"))
                self.posts.append((b"".join(head), reader.read(length)))
                if script is None:
                    self.connections += 1
                    script = self.scripts.pop(0)
                self._play(connection, script[0])
                script = script[1:]

    def _play(self, connection: socket.socket, entry) -> None:
        for piece in entry if isinstance(entry, list) else [entry]:
            if isinstance(piece, bytes):
                connection.sendall(piece)
            elif callable(piece):
                piece()
            else:
                self._wait(connection, piece)

    def _wait(self, connection: socket.socket, event: threading.Event) -> None:
        """Waits for the event; sets `closed` when the gateway leaves meanwhile."""
        connection.settimeout(0.02)
        while not event.is_set() and not self.stopped.is_set():
            try:
                gone = not connection.recv(1)
            except socket.timeout:
                continue
            except OSError:
                gone = True
            if gone:
                self.closed.set()
                raise ConnectionError
        connection.settimeout(30)


class UpstreamTestCase(HttpTestCase):
    def start_before(self, *scripts, **settings) -> RawUpstream:
        """A raw upstream with a gateway in front of it."""
        raw = RawUpstream(*scripts, context=settings.pop("context", None))
        raw.__enter__()
        self.addCleanup(raw.__exit__)
        self.start(**dict({"base_url": raw.url}, **settings))
        return raw


class UpstreamRequestTests(UpstreamTestCase):
    def test_only_our_own_headers_go_upstream(self):
        self.chat(headers={"Authorization": "Bearer sk-client", "OpenAI-Organization": "org", "OpenAI-Beta": "x=1",
                           "X-Stainless-OS": "Linux", "User-Agent": "OpenAI/Python 3", "Accept-Encoding": "gzip, br",
                           "Cookie": "a=b", "Origin": "http://localhost:1", "anthropic-beta": "something",
                           "anthropic-version": "2026-10-21", "X-Forwarded-For": "1.2.3.4", "Accept": "x/y",
                           "content-type": "text/plain", "Connection": "close", "HTTP-Referer": "https://a.example",
                           "x-request-id": "mine", "traceparent": "00-1-2-01", "Idempotency-Key": "k"})
        headers = self.claude.messages[-1].headers
        self.assertEqual(set(headers), OUR_HEADERS)
        self.assertEqual({name: headers[name] for name in OUR_HEADERS - {"content-length", "host"}}, {
            "user-agent": "claude-gateway/" + claude_gateway.VERSION, "accept-encoding": "identity",
            "anthropic-version": "2023-06-01", "x-api-key": SECRET, "content-type": "application/json",
            "x-claude-gateway-hop": self.service.gateway.instance_id})

    def test_the_body_is_utf_8_and_not_escaped(self):
        self.chat("Gr\u00fc\u00dfe \U0001f600 \u2028")
        raw = self.claude.messages[-1].raw
        self.assertIn("Gr\u00fc\u00dfe \U0001f600 \u2028".encode("utf-8"), raw)
        self.assertNotIn(b"\\u", raw)

    def test_what_a_header_cannot_carry_is_told_without_its_value(self):
        for value in ("sk-ant-two\nlines", "sk-ant-\u20ac", "sk-ant-\x00"):
            with self.subTest(value):
                self.start(anthropic_api_key=value)
                answer = self.chat(headers=NO_RETRY)
                self.assertEqual(answer.status, 502)
                self.assertIn("x-api-key", answer.error["message"].lower())
                self.assertNotIn("sk-ant", answer.error["message"])
        for path in ("/a b", "/\u00fc", "/a\x00"):
            with self.subTest(path):
                self.start(base_url=self.claude.url + path)
                self.assertIn("is an invalid URL", self.chat(headers=NO_RETRY).error["message"])

    def test_large_and_small_requests_arrive_whole(self):
        for size in (1, 60_000, 70_000, 3_000_000):
            with self.subTest(size):
                self.chat("x" * size)
                self.assertEqual(self.claude.messages[-1].body["messages"][0]["content"][0]["text"], "x" * size)

    def test_the_path_of_the_base_url_stays(self):
        self.start(base_url=self.claude.url + "/proxy/claude/")
        answer = self.chat(headers=NO_RETRY)
        self.assertEqual(self.claude.requests[-1].path, "/proxy/claude/v1/messages")
        self.assertEqual(answer.status, 404)

    def test_two_requests_share_one_connection(self):
        for name, answer in (
                ("length", upstream_bytes(MESSAGE_JSON)),
                ("chunks", upstream_bytes(in_chunks(MESSAGE_JSON), "transfer-encoding: chunked", length=False)),
                ("stream", upstream_bytes(in_chunks(MESSAGE_EVENTS), "transfer-encoding: chunked",
                                          "content-type: text/event-stream", length=False))):
            with self.subTest(name):
                raw = self.start_before([answer] * 3, [answer])
                self.assertEqual([self.chat().status for _ in range(3)], [200] * 3)
                self.assertEqual((raw.connections, len(raw.posts)), (1, 3))

    def test_refusals_leave_the_connection_usable(self):
        refusal = upstream_bytes(json.dumps(error_body("invalid_request_error", "No")).encode(), status="400 Bad")
        raw = self.start_before([refusal, upstream_bytes(MESSAGE_JSON)], [upstream_bytes(MESSAGE_JSON)])
        self.assertEqual([self.chat().status for _ in range(2)], [400, 200])
        self.assertEqual(raw.connections, 1)

    def test_a_connection_that_says_more_than_its_answer_is_not_used_again(self):
        for name, answer in (("length", upstream_bytes(MESSAGE_JSON)),
                             ("chunks", upstream_bytes(in_chunks(MESSAGE_JSON), "transfer-encoding: chunked",
                                                       length=False))):
            with self.subTest(name):
                raw = self.start_before([answer + b"HTTP/1.1 200 OK\r\n", answer], [answer])
                self.assertEqual([self.chat().status for _ in range(2)], [200] * 2)
                self.assertEqual(raw.connections, 2)

    SMALL_BODY = b'{"model": "claude-opus-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}'

    def test_an_answer_has_a_largest_size(self):
        self.claude.play(FakeReply(body=message(text("x" * 2_000_000))))
        reply = self.service.gateway.upstream.messages(self.SMALL_BODY, claude_gateway.UpstreamCall())
        self.addCleanup(reply.close)
        with self.assertRaisesRegex(claude_gateway.UpstreamFault, "larger than 1000000 bytes"):
            reply.read(1_000_000)

    def test_an_answer_that_is_closed_twice_gives_its_connection_back_once(self):
        upstream, body = self.service.gateway.upstream, self.SMALL_BODY
        reply = upstream.messages(body, claude_gateway.UpstreamCall())
        reply.read()
        reply.close()
        reply.close()
        # two that are under way at the same time
        two = [upstream.messages(body, claude_gateway.UpstreamCall()) for _ in range(2)]
        self.assertEqual([json.loads(reply.read().decode())["type"] for reply in two], ["message"] * 2)
        for reply in two:
            reply.close()

    def test_an_idle_connection_that_is_too_old_is_closed_without_another_request(self):
        service = self.start()
        self.assertEqual(self.chat().status, 200)
        pool = service.gateway.upstream.pool
        self.assertTrue(eventually(lambda: any(pool._idle.values())))
        kept = [connection for connections in pool._idle.values() for connection in connections]
        self.assertEqual(len(kept), 1)
        pool.close_old()
        self.assertNotIn(-1, [connection.sock.fileno() for connection in kept])
        for connection in kept:
            connection.last_used -= claude_gateway.POOL_AGE
        self.assertTrue(eventually(lambda: {connection.sock.fileno() for connection in kept} == {-1}))
        self.assertEqual(self.chat().status, 200)

    def test_a_connection_that_comes_back_after_the_end_is_closed(self):
        ours, theirs = socket.socketpair()
        pool, connection = claude_gateway.ConnectionPool(), claude_gateway.Peer(ours)
        pool.close()
        pool.give("key", connection)
        with theirs:
            self.assertEqual(theirs.recv(1), b"")
        self.assertIsNone(pool.take("key"))

    def test_a_connection_whose_answer_was_not_read_to_its_end_is_not_used_again(self):
        events = events_of(message(text("Hello, world")))
        never = threading.Event()
        self.addCleanup(never.set)
        head = upstream_bytes(b"", "transfer-encoding: chunked", "content-type: text/event-stream", length=False)
        raw = self.start_before([[head + in_chunks(sse(events[:5]))[:-5], never], b""], [upstream_bytes(MESSAGE_JSON)])
        connection = self.connect()
        connection.sendall(chat_bytes(body=CHAT_BODY[:-1] + b',"stream":true}'))
        received_until(connection, b"Hello")
        connection.close()
        self.assertTrue(raw.closed.wait(30))
        self.assertEqual(self.chat().status, 200)
        self.assertEqual(raw.connections, 2)

    def test_an_answer_nobody_waits_for_is_not_taken_for_the_next_one(self):
        foreign = upstream_bytes(json.dumps(message(text("for somebody else"))).encode())
        for name, first in (("behind an empty one", upstream_bytes(b"", status="400 Bad") + foreign),
                            ("behind a whole one", upstream_bytes(MESSAGE_JSON) + foreign),
                            ("behind an interim one", b"HTTP/1.1 101 Switching\r\n\r\n" + foreign)):
            with self.subTest(name):
                raw = self.start_before([first, foreign], [upstream_bytes(MESSAGE_JSON)])
                self.chat(headers=NO_RETRY)
                self.assertEqual(self.chat(headers=NO_RETRY).message["content"], "Hello!")
                self.assertEqual(raw.connections, 2)

    def test_an_answer_that_comes_before_the_request_was_read_is_the_answer(self):
        refusal = upstream_bytes(json.dumps(error_body("request_too_large", "Too much")).encode(),
                                 "connection: close", status="413 Too Large")

        def refuse(connection: socket.socket) -> None:  # and close it with most of the request unread: a reset
            asked = connection.recv(1_000)
            connection.sendall(refusal if asked.startswith(b"POST") else upstream_bytes(
                b"{}", "connection: close", status="404 Not Found"))

        with LoopbackServer(refuse) as server:
            self.start(base_url="http://127.0.0.1:%d" % server.port)
            answer = self.chat("x" * 20_000_000, headers=NO_RETRY)
        self.assertEqual((answer.status, answer.error["message"]), (413, "Too much"))

    def test_an_upstream_that_goes_on_after_the_end_does_not_hold_up_the_client(self):
        told, never = [], threading.Event()
        self.addCleanup(never.set)

        def trickle():
            told.append(never.wait(0.02))
        head = upstream_bytes(b"", "transfer-encoding: chunked", "content-type: text/event-stream", length=False)
        self.start_before([[head + in_chunks(MESSAGE_EVENTS)[:-5]] + [trickle, b"2\r\n:\n\r\n"] * 300])
        connection = self.connect()
        connection.sendall(chat_bytes() + NEXT_REQUEST)
        answers = answers_in(received_until(connection, b"never"))
        self.assertEqual([answer.status for answer in answers], [200, 200])
        self.assertLess(len(told), 200)

    def test_a_pooled_connection_that_died_meanwhile_is_replaced(self):
        # the upstream ends the first one right behind its answer, without having announced it
        raw = self.start_before([upstream_bytes(MESSAGE_JSON)], [upstream_bytes(MESSAGE_JSON)])
        self.assertEqual([self.chat(headers=NO_RETRY).status for _ in range(2)], [200, 200])
        self.assertEqual((raw.connections, len(raw.posts)), (2, 2))

    def test_what_an_idle_connection_says_by_itself_is_not_taken_for_an_answer(self):
        farewell, said = threading.Event(), threading.Event()
        timeout = upstream_bytes(b"{}", status="408 Request Timeout")
        raw = self.start_before([[upstream_bytes(MESSAGE_JSON), farewell, timeout, said.set], b""],
                                [upstream_bytes(MESSAGE_JSON)])
        self.assertEqual(self.chat(headers=NO_RETRY).status, 200)
        farewell.set()
        self.assertTrue(said.wait(30))
        self.assertEqual(self.chat(headers=NO_RETRY).status, 200)
        self.assertEqual((raw.connections, len(raw.posts)), (2, 2))

    def test_a_reused_connection_that_dies_is_replaced_once(self):
        raw = self.start_before([upstream_bytes(MESSAGE_JSON), b""], [upstream_bytes(MESSAGE_JSON)])
        self.assertEqual([self.chat(headers=NO_RETRY).status for _ in range(2)], [200, 200])
        self.assertEqual((raw.connections, len(raw.posts)), (2, 3))
        raw = self.start_before([upstream_bytes(MESSAGE_JSON), b""], [b""], [upstream_bytes(MESSAGE_JSON)])
        self.assertEqual([self.chat(headers=NO_RETRY).status for _ in range(2)], [200, 502])
        self.assertEqual((raw.connections, len(raw.posts)), (2, 3))

    def test_replacing_it_was_the_one_retry(self):
        body = json.dumps(error_body("overloaded_error", "Later")).encode()
        overloaded = upstream_bytes(body, status="529 Overloaded")
        raw = self.start_before([upstream_bytes(MESSAGE_JSON), b""], [overloaded, upstream_bytes(MESSAGE_JSON)])
        self.assertEqual([self.chat().status for _ in range(2)], [200, 503])
        self.assertEqual(len(raw.posts), 3)

    def test_a_fresh_connection_that_dies_is_retried_once_unless_the_client_retries(self):
        raw = self.start_before([b""], [upstream_bytes(MESSAGE_JSON)], [b""])
        self.assertEqual(self.chat().status, 200)
        self.assertEqual(len(raw.posts), 2)
        answer = self.chat(headers=NO_RETRY)
        self.assertEqual((answer.status, answer.error["code"], len(raw.posts)), (502, "upstream_error", 3))

    def test_an_upstream_that_keeps_dying_is_asked_twice_and_no_more(self):
        raw = self.start_before([b""], [b""], [b""], [b""])
        self.assertEqual(self.chat().status, 502)
        self.assertEqual(len(raw.posts), 2)


class UpstreamAnswerTests(UpstreamTestCase):
    def test_an_answer_is_read_in_every_framing(self):
        stream = "content-type: text/event-stream"
        cases = {
            "length": upstream_bytes(MESSAGE_JSON),
            "charset": upstream_bytes(MESSAGE_JSON, "content-type: application/json; charset=utf-8"),
            "to the end of the connection": upstream_bytes(MESSAGE_JSON, length=False),
            "HTTP/1.0": upstream_bytes(MESSAGE_JSON, length=False).replace(b"HTTP/1.1", b"HTTP/1.0", 1),
            "chunks of one byte": upstream_bytes(in_chunks(*(MESSAGE_JSON[at:at + 1] for at in range(len(
                MESSAGE_JSON)))), "transfer-encoding: chunked", length=False),
            "chunk extensions and trailers": upstream_bytes(
                b"%x;a=b\r\n%s\r\n0\r\nX-End: 1\r\n\r\n" % (len(MESSAGE_JSON), MESSAGE_JSON),
                "transfer-encoding: chunked", length=False),
            "gzip": upstream_bytes(gzip.compress(MESSAGE_JSON), "content-encoding: gzip"),
            "gzip in chunks": upstream_bytes(in_chunks(gzip.compress(MESSAGE_JSON)), "content-encoding: gzip",
                                             "transfer-encoding: chunked", length=False),
            "identity": upstream_bytes(MESSAGE_JSON, "content-encoding: identity"),
            "continue first": b"HTTP/1.1 100 Continue\r\n\r\n" + upstream_bytes(MESSAGE_JSON),
            "bare line ends": upstream_bytes(MESSAGE_JSON).replace(b"\r\n", b"\n"),
            "status without words": upstream_bytes(MESSAGE_JSON, status="200"),
            "two blanks in the status line": upstream_bytes(MESSAGE_JSON, status=" 200  OK"),
            "a tab in the status line": upstream_bytes(MESSAGE_JSON, status="200\tOK"),
            "HTTP/1.2": upstream_bytes(MESSAGE_JSON).replace(b"HTTP/1.1", b"HTTP/1.2", 1),
            "length with many zeros": upstream_bytes(MESSAGE_JSON, "content-length: %030d" % len(MESSAGE_JSON),
                                                     length=False),
            "folded header": upstream_bytes(MESSAGE_JSON, "x-note: one,", "  content-encoding: br"),
            "space before a colon": upstream_bytes(MESSAGE_JSON, "content-encoding : br"),
            "the first of two": upstream_bytes(MESSAGE_JSON, "content-encoding: identity", "Content-Encoding: br"),
            "a line that is no header": upstream_bytes(MESSAGE_JSON, "this is none"),
            "hints first": b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 2 + upstream_bytes(MESSAGE_JSON),
            "stream": upstream_bytes(in_chunks(MESSAGE_EVENTS), stream, "transfer-encoding: chunked", length=False),
            "stream with a length": upstream_bytes(MESSAGE_EVENTS, stream),
            "stream to the end": upstream_bytes(MESSAGE_EVENTS, stream, length=False),
            "stream without its last line": upstream_bytes(MESSAGE_EVENTS.rstrip(b"\n"), stream, length=False),
            "stream in gzip": upstream_bytes(in_chunks(gzip.compress(MESSAGE_EVENTS)), stream, "content-encoding: gzip",
                                             "transfer-encoding: chunked", length=False),
        }
        slow = [[bytes([byte]) for byte in upstream_bytes(MESSAGE_JSON)]]
        self.start_before(*([answer] for answer in cases.values()), slow)
        for name in [*cases, "byte by byte"]:
            with self.subTest(name):
                answer = self.chat(headers=NO_RETRY)
                self.assertEqual(answer.status, 200, answer.raw)
                self.assertEqual(answer.message["content"], "Hello!")

    def test_every_fault_of_the_upstream_is_502_in_the_envelope(self):
        stream, chunked = "content-type: text/event-stream", "transfer-encoding: chunked"
        packed = gzip.compress(MESSAGE_JSON)
        cases = {
            "nothing": b"", "garbage": b"\0\xff\0\r\n\r\n", "another protocol": b"SSH-2.0-OpenSSH_9.9\r\n",
            "endless head": b"HTTP/1.1 200 OK\r\nx-test: " + b"a" * 70_000,
            "half a head": b"HTTP/1.1 200 OK\r\ncontent-",
            "cut at a length": upstream_bytes(MESSAGE_JSON)[:-9],
            "cut in a chunk": upstream_bytes(in_chunks(MESSAGE_JSON)[:-20], chunked, length=False),
            "cut before the last chunk": upstream_bytes(in_chunks(MESSAGE_JSON)[:-5], chunked, length=False),
            "trailers without end": upstream_bytes(in_chunks(MESSAGE_JSON)[:-2] + b"x: 1\r\n" * 200 + b"\r\n", chunked,
                                                   length=False),
            "interim answers without end": b"HTTP/1.1 103 Hi\r\n\r\n" * 4_000 + upstream_bytes(MESSAGE_JSON),
            "bad chunk size": upstream_bytes(b"zz\r\n" + MESSAGE_JSON, chunked, length=False),
            "cut gzip": upstream_bytes(packed[:-12], "content-encoding: gzip"),
            "no gzip": upstream_bytes(MESSAGE_JSON, "content-encoding: gzip"),
            "brotli": upstream_bytes(MESSAGE_JSON, "content-encoding: br"),
            "HTML": upstream_bytes(b"<html>Sign in</html>", "content-type: text/html"),
            "HTML for JSON": upstream_bytes(b"<html>Sign in</html>"), "empty": upstream_bytes(b""),
            "list": upstream_bytes(b"[]"), "null": upstream_bytes(b"null"),
            "no message": upstream_bytes(b'{"hello":1}'),
            "not UTF-8": upstream_bytes(b'{"\xff":1}'), "nested": upstream_bytes(b"[" * 100_000),
            "HTML with 502": upstream_bytes(b"<html>Bad Gateway</html>", "content-type: text/html",
                                            status="502 Bad Gateway"),
            "many headers": upstream_bytes(MESSAGE_JSON, *["x-test-%d: 1" % number for number in range(300)]),
            "long header": upstream_bytes(MESSAGE_JSON, "x-test: " + "a" * 70_000),
            "empty stream": upstream_bytes(b"", stream), "stream of junk": upstream_bytes(b"junk\n\n" * 9, stream),
            "no message_stop": upstream_bytes(sse(events_of(message(text("Hello!")))[:-1]), stream),
            "bad event": upstream_bytes(b"event: message_start\ndata: {nonsense\n\n", stream),
            "event that is no object": upstream_bytes(b"event: message_start\ndata: [1]\n\n", stream),
            "HTML as a stream": upstream_bytes(b"<html></html>", stream, length=False),
        }
        self.start_before(*([answer] for answer in cases.values()))
        for name in cases:
            with self.subTest(name):
                answer = self.chat(headers=NO_RETRY)
                self.assertEqual(answer.status, 502, answer.raw)
                self.assert_envelope(answer)
                self.assertNotIn("<html>", answer.error["message"])
        self.assertEqual(self.ask("GET", "/health").status, 200)

    def test_an_answer_is_one_of_http_1(self):
        for status_line in (b"HTTP/2.0 200 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 abc OK", b"HTTP/1.1 20"):
            with self.subTest(status_line):
                self.start_before([upstream_bytes(MESSAGE_JSON).replace(b"HTTP/1.1 200 OK", status_line)])
                self.assertEqual(self.chat(headers=NO_RETRY).status, 502)

    def test_a_hundred_header_lines_of_an_answer_are_taken_and_no_more(self):
        for count, status in ((100, 200), (101, 502)):
            with self.subTest(count):
                extra = count - upstream_bytes(MESSAGE_JSON).partition(b"\r\n\r\n")[0].count(b"\r\n")
                self.start_before([upstream_bytes(MESSAGE_JSON, *["x-test: 1"] * extra)])
                self.assertEqual(self.chat(headers=NO_RETRY).status, status)

    def test_an_answer_that_has_no_body_is_not_waited_for(self):
        for status, *more in (["204 No Content"], ["304 Not Modified", "content-length: 9"], ["101 Switching"],
                              ["204 No Content", "transfer-encoding: chunked"]):
            with self.subTest(status, more=more):
                never = threading.Event()
                self.addCleanup(never.set)
                self.start_before([[upstream_bytes(b"", *more, status=status, length=False), never]])
                self.assertEqual(self.chat(headers=NO_RETRY).status, 502)
                head = claude_gateway.UpstreamHead("1.1", int(status[:3]), "", {"content-length": "9"})
                self.assertTrue(head.framing().done)

    def test_a_status_that_the_api_does_not_use_is_502(self):
        codes = (101, 201, 202, 204, 206, 299, 304, 600, 700, 999)
        self.start_before(*[[upstream_bytes(MESSAGE_JSON, "connection: close", status="%d Odd" % code)]
                            for code in codes for _ in range(3)])
        native = {"model": "claude-opus-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
        for code in codes:
            with self.subTest(code):
                answers = [*(self.chat(headers=NO_RETRY, stream=stream) for stream in (False, True)),
                           self.ask("POST", "/v1/messages", native, NO_RETRY)]
                self.assertEqual([answer.status for answer in answers], [502, 502, 502])
                self.assertIn(str(code), answers[0].error["message"])

    def test_gzip_is_unpacked_bit_by_bit(self):
        stream = ["content-type: text/event-stream", "content-encoding: gzip", "connection: close"]
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        bomb = packer.compress(sse(self.EVENTS_BEFORE) + b"data: ")
        bomb += b"".join(packer.compress(b"x" * 1_000_000) for _ in range(100)) + packer.flush()
        self.start_before(*[[upstream_bytes(bomb, *stream)] for _ in range(2)])
        answer = self.chat(headers=NO_RETRY)
        self.assertEqual((answer.status, answer.error["code"]), (502, "upstream_error"))
        self.assertIn("more than 32000000 bytes", answer.error["message"])
        answer = self.chat(headers=NO_RETRY, stream=True)
        self.assertIn("more than 32000000 bytes", json.loads(answer.events[-1])["error"]["message"])

    EVENTS_BEFORE = events_of(message(text("Hello!")))[:-2]

    def test_a_client_that_leaves_ends_the_unpacking(self):
        ours, upstream = socket.socketpair()
        peer, user = socket.socketpair()
        self.addCleanup(user.close)
        self.addCleanup(peer.close)
        packed = gzip.compress(bytes(5_000_000))
        upstream.sendall(packed)
        call = claude_gateway.UpstreamCall(claude_gateway.Client(claude_gateway.Peer(peer)))
        head = claude_gateway.UpstreamHead("1.1", 200, "OK", {"content-encoding": "gzip",
                                                              "content-length": str(len(packed))})
        reply = claude_gateway.UpstreamReply(claude_gateway.Peer(ours), head, call, None)
        self.addCleanup(reply.close)
        with upstream:
            pieces = call.client.waited(reply.pieces())
            self.assertEqual([len(next(pieces)) for _ in range(3)], [0] + [claude_gateway.READ_SIZE] * 2)
            user.shutdown(socket.SHUT_WR)
            with self.assertRaises(claude_gateway.ClientGone):
                for _ in range(2):
                    next(pieces)

    def gzip_reply(self, packed: bytes):
        """An answer of unknown length that begins with these bytes, its client, its connection and who sends it."""
        (ours, upstream), (peer, user) = socket.socketpair(), socket.socketpair()
        for end in (ours, upstream, peer, user):
            self.addCleanup(end.close)
        call = claude_gateway.UpstreamCall(claude_gateway.Client(claude_gateway.Peer(peer)))
        head = claude_gateway.UpstreamHead("1.1", 200, "OK", {"content-encoding": "gzip"})
        upstream.sendall(packed)
        return claude_gateway.UpstreamReply(claude_gateway.Peer(ours), head, call, None), user, ours, upstream

    def test_a_client_that_leaves_with_its_answer_leaves_no_connection_behind(self):
        reply, user, ours, _ = self.gzip_reply(gzip.compress(b"x"))
        user.close()
        reply.close(answered=True)
        self.assertEqual(ours.fileno(), -1)

    def test_others_get_their_turn_whatever_follows_gzip(self):
        reply, _, _, upstream = self.gzip_reply(gzip.compress(b"x"))
        self.addCleanup(reply.close)
        pieces = reply.pieces()
        self.assertEqual([next(pieces)[0] for _ in range(2)], [b"", b"x"])
        for _ in range(3):
            upstream.sendall(b"y")
            self.assertEqual(next(pieces), (b"", None))

    def test_what_follows_gzip_is_dropped(self):
        packed = gzip.compress(MESSAGE_JSON)
        self.start_before([upstream_bytes(packed + b"x" * 200_000)])
        answer = self.chat(headers=NO_RETRY)
        self.assertEqual((answer.status, answer.error["code"]), (502, "upstream_error"))

    def test_an_encoding_that_nobody_asked_for_ends_the_connection(self):
        never = threading.Event()
        self.addCleanup(never.set)
        raw = self.start_before([[upstream_bytes(MESSAGE_JSON, "content-encoding: br"), never]])
        self.assertEqual(self.chat(headers=NO_RETRY).status, 502)
        self.assertTrue(raw.closed.wait(30))

    def test_a_head_without_end_is_not_read_for_ever(self):
        never = threading.Event()
        self.start_before([[b"HTTP/1.1 200 OK\r\nx-test: " + b"a" * 70_000, never]])
        self.addCleanup(never.set)
        self.assertIn("more than 65536 bytes", self.chat(headers=NO_RETRY).error["message"])

    def test_what_cannot_become_an_answer_is_not_waited_for(self):
        for begin, words in ((b"SSH-2.0-OpenSSH_9.9", "SSH-2.0"), (b"HTTP/1.1 2000 OK\r\n", "2000"),
                             (b"HTTP/2 200\r\nx-test: 1\r\n", "HTTP/2"),
                             (b"HTTP/1.1 200 OK\r\n" + b"x-test: 1\r\n" * 102, "100 header lines"),
                             *((upstream_bytes(MESSAGE_JSON, "content-length:" + length, length=False), "-Length")
                               for length in (" +2", " -1", " 2, 2", " 0x2", "\r\n 2", " " + "9" * 50))):
            with self.subTest(begin[:40]):
                never = threading.Event()
                self.addCleanup(never.set)
                self.start_before([[begin, never]])
                answer = self.chat(headers=NO_RETRY)
                self.assertEqual(answer.status, 502)
                self.assertIn(words, answer.error["message"])

    def test_what_has_begun_to_answer_is_not_asked_again(self):
        for begin in (b"HTTP/1.1 200 OK\r\nrequest-id: r\r\n", b"HTTP/1.1 2", b"HTTP/1.1 100 Continue\r\n\r\n",
                      b"HTTP/1.1 500 Oh\r\nx-should-retry: false\r\n", b"SSH-2.0-OpenSSH_9.9\r\n"):
            with self.subTest(begin):
                raw = self.start_before([upstream_bytes(MESSAGE_JSON), begin], [upstream_bytes(MESSAGE_JSON)])
                self.assertEqual([self.chat().status for _ in range(2)], [200, 502])
                self.assertEqual(len(raw.posts), 2)

    def test_tls_has_words_of_its_own_for_a_connection_that_has_ended(self):
        connection = claude_gateway.UpstreamConnection
        for name in ("ask", "answer"):
            for failure in (ConnectionResetError(), ssl.SSLEOFError(8, "EOF"), ssl.SSLZeroReturnError(6, "closed")):
                with self.subTest(name, failure=failure):
                    raw = self.start_before(*[[upstream_bytes(MESSAGE_JSON)] * 3] * 2)
                    self.assertEqual(self.chat().status, 200)
                    original = getattr(connection, name)

                    def failing(*arguments, name=name, original=original, failure=failure):
                        setattr(connection, name, original)
                        original(*arguments)
                        raise failure
                    setattr(connection, name, failing)
                    self.addCleanup(setattr, connection, name, original)
                    self.assertEqual(self.chat().status, 200)   # by the answer it gave before, or on another connection
                    self.assertEqual(self.chat().status, 200)
                    self.assertEqual(raw.connections, 2)

    def test_what_an_answer_says_of_its_connection_holds(self):
        """RFC 9112, 9.3: version 1.1 stays unless it says close, version 1.0 ends unless it says keep-alive."""
        old = upstream_bytes(MESSAGE_JSON, "connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        new = upstream_bytes(MESSAGE_JSON)
        raw = self.start_before([old, upstream_bytes(MESSAGE_JSON, "Connection: Close"), new],
                                [new.replace(b"HTTP/1.1", b"HTTP/1.0", 1), new], [new])
        self.assertEqual([self.chat().status for _ in range(4)], [200] * 4)
        self.assertEqual((raw.connections, len(raw.posts)), (3, 4))

    def test_the_same_faults_after_the_first_byte_end_a_stream_with_an_error(self):
        begun = sse(events_of(message(text("Hello, world")))[:5])
        stream, chunked = "content-type: text/event-stream", "transfer-encoding: chunked"
        cases = {
            "cut in a chunk": upstream_bytes(in_chunks(begun)[:-5] + b"ff\r\nabc", stream, chunked, length=False),
            "bad chunk size": upstream_bytes(in_chunks(begun)[:-5] + b"zz\r\n", stream, chunked, length=False),
            "end of the connection": upstream_bytes(begun, stream, length=False),
            "bad event": upstream_bytes(begun + b"data: {nonsense\n\n", stream),
            "cut gzip": upstream_bytes(gzip.compress(begun)[:-4], stream, "content-encoding: gzip", length=False),
        }
        self.start_before(*([answer] for answer in cases.values()))
        for name in cases:
            with self.subTest(name):
                answer = self.chat(stream=True)
                self.assertEqual(answer.status, 200)
                self.assertEqual(set(json.loads(answer.events[-1])), {"error"})
                self.assertNotIn("[DONE]", answer.events)

    def test_a_native_answer_that_broke_off_does_not_look_whole_to_the_client(self):
        cases = {"length": upstream_bytes(MESSAGE_JSON + b" " * 9)[:-5],
                 "gzip": upstream_bytes(gzip.compress(MESSAGE_JSON)[:-8], "content-encoding: gzip"),
                 "chunks": upstream_bytes(in_chunks(MESSAGE_JSON)[:-5], "transfer-encoding: chunked", length=False)}
        self.start_before(*([answer] for answer in cases.values()))
        body = json.dumps(dict(json.loads(CHAT_BODY.decode()), max_tokens=9)).encode()
        for name in cases:
            with self.subTest(name):
                connection = self.connect()
                connection.sendall(request_bytes("POST /v1/messages HTTP/1.1", "Host: localhost",
                                                 "Content-Length: %d" % len(body), body=body))
                received = received_until(connection, b"never")
                self.assertIn(b"Hello!", received)
                self.assertFalse(received.endswith(b"0\r\n\r\n"))

    def test_redirects_are_refused_and_the_credential_stays_here(self):
        elsewhere = RawUpstream([upstream_bytes(MESSAGE_JSON)] * 9)
        with elsewhere:
            codes, location = (301, 302, 303, 307, 308), "location: %s/v1/messages" % elsewhere.url
            self.start_before(*([upstream_bytes(b"", location, status="%d Moved" % code)] for code in codes))
            for code in codes:
                with self.subTest(code=code):
                    answer = self.chat(headers=NO_RETRY)
                    self.assertEqual(answer.status, 502)
                    self.assertIn("redirect", answer.error["message"])
            self.assertEqual((elsewhere.connections, elsewhere.posts), (0, []))

    def test_a_refused_connection_is_502_that_says_so(self):
        with contextlib.closing(socket.socket()) as unused:
            unused.bind(("127.0.0.1", 0))               # bound but not listening: connections are refused
            self.start(base_url="http://127.0.0.1:%d" % unused.getsockname()[1])
            answer = self.chat(headers=NO_RETRY)
        self.assertEqual((answer.status, answer.error["code"]), (502, "upstream_error"))
        self.assertIn("refused", answer.error["message"].lower())
        self.assertEqual(self.ask("GET", "/v1/models").status, 200)         # the built-in table

    def test_an_upstream_that_never_answers_is_given_up(self):
        with contextlib.closing(socket.socket()) as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(5)                            # connects, as the system does that, and then nothing
            gateway = Gateway(Config(base_url="http://127.0.0.1:%d" % silent.getsockname()[1],
                                     anthropic_api_key=SECRET))
            with self.assertRaises(claude_gateway.UpstreamTimeout):
                gateway.upstream.get("/v1/models", timeout=0.05)
            with self.assertRaises(claude_gateway.UpstreamTimeout):
                gateway.upstream.messages(b"{}", claude_gateway.UpstreamCall(patience=0.05))
            gateway.close()


EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8"}


class UpstreamBodyTests(GatewayTestCase):
    """Answers of the upstream that are not as they should be: told as failures, never as a normal end."""
    EVENTS = events_of(message(text("Hello there")), size=100)

    def failure(self, reply, stream: bool) -> tuple:
        """Status and error of a failure, once the reply has been played; a stream must end with it."""
        self.claude.play(reply)
        answer = self.chat(stream=stream)
        if answer.status == 200 and stream:
            self.assertNotIn("[DONE]", answer.events)
            self.assertFalse([chunk for chunk in answer.chunks if chunk.get("choices")
                              and chunk["choices"][0]["finish_reason"]])
        last = json.loads(answer.events[-1]) if stream and answer.status == 200 else answer.json
        self.assertEqual(sorted(last["error"]), ["code", "message", "param", "type"])
        return answer, last["error"]

    def test_both_kinds_of_body_serve_both_kinds_of_client(self):
        whole = message(thinking("hm", "c2ln"), cited_text("Hi", web_citation("https://a.example")),
                        tool_use("toolu_1", "f", {"a": 1}))
        for name, reply in (
            ("stream", FakeReply(headers=EVENT_STREAM, body=sse(events_of(whole)))), ("JSON", FakeReply(body=whole)),
            ("a stream that says nothing", FakeReply(headers={"content-type": None}, body=sse(events_of(whole)))),
            ("JSON that says nothing", FakeReply(headers={"content-type": None}, body=whole)),
            ("JSON with a charset", FakeReply(headers={"content-type": "application/json; charset=utf-8"}, body=whole)),
            ("a stream in capitals",
             FakeReply(headers={"content-type": "Text/Event-Stream"}, body=sse(events_of(whole)))),
            ("a stream that begins with a comment",
             FakeReply(headers={"content-type": None}, body=b": hi\n\n" + sse(events_of(whole)))),
            ("a stream with a mark", FakeReply(headers=EVENT_STREAM, body=b"\xef\xbb\xbf" + sse(events_of(whole)))),
        ):
            with self.subTest(name):
                self.claude.reset()
                self.claude.play(reply, reply)
                plain = self.chat()
                self.assertEqual(plain.status, 200, plain.raw)
                streamed = completion_from_chunks(self.chat(stream=True, stream_options={"include_usage": True}).chunks)
                parts = completion_parts(plain.json)
                for each in (parts, streamed):
                    call = each["message"]["tool_calls"][0]["function"]
                    call["arguments"] = json.loads(call["arguments"])
                self.assertEqual(parts, streamed)
                self.assertEqual(parts["message"]["annotations"], [url_note(0, 2, "https://a.example")])

    def test_a_stream_in_capitals_is_still_handed_on_event_by_event(self):
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        self.claude.play(FakeReply(headers={"content-type": "TEXT/EVENT-STREAM"},
                                   pieces=[sse(self.EVENTS[:3]), go_on, sse(self.EVENTS[3:])]))
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=2)
        self.addCleanup(connection.close)
        connection.request("POST", "/v1/chat/completions", json.dumps(
            {"model": "claude-sonnet-5-5", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}))
        self.assertIn(b"assistant", connection.getresponse().readline())

    def test_an_answer_without_its_end_is_502(self):
        events = self.EVENTS
        open_stop = dict(events[-2], delta={"stop_reason": None})
        for name, reply in (
            ("no message_stop", one_by_one(*events[:-1])), ("only the start", one_by_one(*events[:1])),
            ("nothing", FakeReply(headers=EVENT_STREAM, body=b"")),
            ("only pings", one_by_one({"type": "ping"}, {"type": "ping"})),
            ("a null stop reason", one_by_one(*events[:-2], open_stop, events[-1])),
            ("no message_delta", one_by_one(*events[:-2], events[-1])),
            ("reset in the middle", one_by_one(*events[:4], cut=True)),
            ("ended in the middle", one_by_one(*events[:4], chunked=False)),
            ("too short for its length", FakeReply(headers=dict(EVENT_STREAM, **{"content-length": "9000"}),
                                                   body=sse(events[:4]))),
            ("a JSON answer without a stop reason", FakeReply(body=dict(message(text("Hi")), stop_reason=None))),
            ("half of a JSON answer", FakeReply(body=json.dumps(message(text("Hi"))).encode()[:-9])),
            ("JSON that is no message", FakeReply(body={"hello": "world"})), ("an empty body", FakeReply(body=b"")),
            ("a web page", FakeReply(headers={"content-type": "text/html"}, body=b"<html>login here</html>")),
            ("JSON under the name of a stream", FakeReply(headers=EVENT_STREAM, body=message(text("Hi")))),
            ("no event", FakeReply(headers=EVENT_STREAM, body=b"data: {oops\n\n")),
            ("delta before start", one_by_one(events[-2], events[-1])),
            ("no block in a block start", one_by_one(events[0], {"type": "content_block_start", "index": 0})),
            ("no text in a text delta", one_by_one(events[0], events[1], {"type": "content_block_delta", "index": 0,
                                                                          "delta": {"type": "text_delta"}})),
            ("null in a text delta", one_by_one(events[0], events[1], {
                "type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": None}},
                *events[-3:])),
            ("a call without a name", one_by_one(events[0], {
                "type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "id": "toolu_1"}},
                {"type": "content_block_stop", "index": 0}, *events[-2:])),
            ("a delta outside of a block", one_by_one(events[0], {
                "type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta",
                                                                     "partial_json": "{}"}}, *events[-2:])),
            ("a stop outside of a block", one_by_one(events[0], {"type": "content_block_stop", "index": 0},
                                                     {"type": "content_block_start"})),
        ):
            for stream in (False, True):
                with self.subTest(name, stream=stream):
                    if name == "too short for its length":
                        reply = FakeReply(headers=EVENT_STREAM, pieces=[sse(events[:4])], chunked=False)
                    answer, error = self.failure(reply, stream)
                    self.assertIn(answer.status, (200, 502) if stream else (502,))
                    self.assertEqual((error["type"], error["code"]), ("server_error", "upstream_error"), error)
                    self.assertNotIn("login here", error["message"])

    def test_a_plain_reply_that_broke_off_is_not_asked_for_again(self):
        self.claude.play(one_by_one(*self.EVENTS[:4], cut=True))
        self.assertEqual((self.chat().status, len(self.claude.messages)), (502, 1))

    def test_what_was_said_before_a_fault_reaches_the_client(self):
        for name, pieces in (
            ("pieces of their own", [sse(self.EVENTS[:4]), b"data: {oops\n\n"]),
            ("one piece", [sse(self.EVENTS[:4]) + b"data: {oops\n\n"]),
            ("an error in the same piece", [sse(self.EVENTS[:4] + [error_body("api_error", "x")])]),
        ):
            with self.subTest(name):
                answer, _ = self.failure(FakeReply(pieces=pieces), stream=True)
                self.assertIn(b"Hello there", answer.raw)

    def test_half_a_character_in_thinking_and_a_text_that_is_none_are_no_defect(self):
        whole = message(thinking("h\ud83dm", "c2ln\ud83d"), text(None), text("Hello"),
                        tool_use("toolu_1", "f", {"a": 1}))
        body = {"model": "sonnet", "input": "Hi", "include": ["reasoning.encrypted_content"]}
        for name, ask in (("chat", self.chat), ("responses", lambda: self.ask("POST", "/v1/responses", body))):
            with self.subTest(name):
                self.claude.play(FakeReply(body=whole))
                answer = ask()
                self.assertEqual(answer.status, 200, answer.raw)
                self.assertIn(b"Hello", answer.raw)

    def test_what_comes_after_the_end_does_not_matter(self):
        for tail in (b"data: [DONE]\n\n", b"data: {oops\n\n", sse([error_body("api_error", "x")])):
            for pieces in ([sse(self.EVENTS) + tail], [sse(self.EVENTS), tail]):
                with self.subTest(tail=tail, pieces=len(pieces)):
                    self.claude.reset()
                    self.claude.play(FakeReply(pieces=pieces), FakeReply(pieces=pieces))
                    self.assertEqual(self.chat().status, 200)
                    self.assertEqual(self.chat(stream=True).events[-1], "[DONE]")

    def test_a_last_event_without_its_blank_line_counts(self):
        data = sse(self.EVENTS)
        for cut in (1, 2):
            for framing in (FakeReply(headers=EVENT_STREAM, body=data[:-cut]), FakeReply(pieces=[data[:-cut]]),
                            FakeReply(pieces=[data[:-cut]], chunked=False)):
                self.claude.play(framing, framing)
                self.assertEqual(self.chat().message["content"], "Hello there")
                self.assertEqual(self.chat(stream=True).events[-1], "[DONE]")

    def test_counts_that_are_none_cost_nobody_his_answer(self):
        self.start()
        odd = {"input_tokens": "ten", "output_tokens": None, "cache_read_input_tokens": [1], "server_tool_use": 5,
               "cache_creation_input_tokens": -4, "output_tokens_details": {"thinking_tokens": "many"}}
        whole = dict(message(text("Hi")), usage=odd)
        events = [{"type": "message_start", "message": dict(whole, content=[], stop_reason=None)}] + \
            events_of(message(text("Hi")))[1:-2] + [{"type": "message_delta", "delta": {"stop_reason": "end_turn"},
                                                     "usage": odd}, {"type": "message_stop"}]
        native = {"model": "opus", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
        for reply in (FakeReply(body=whole), FakeReply(headers=EVENT_STREAM, body=sse(events))):
            for stream in (False, True):
                with self.subTest(reply=reply.headers, stream=stream):
                    self.claude.play(reply, reply, reply)
                    answers = [self.chat(stream=stream),
                               self.ask("POST", "/v1/responses", {"model": "opus", "input": "Hi", "stream": stream}),
                               self.ask("POST", "/v1/messages", dict(native, stream=stream))]
                    self.assertEqual([answer.status for answer in answers], [200] * 3, answers[0].raw)
                    self.assertTrue(self.service.gateway.running.wait_until_idle(30))
                    if not stream:
                        self.assertEqual(answers[0].json["usage"]["total_tokens"], 0)

    def test_unknown_events_blocks_and_deltas_are_skipped(self):
        start, block, *rest = self.EVENTS
        new_block = {"type": "content_block_start", "index": 9, "content_block": {"type": "new"}}
        new_delta = {"type": "content_block_delta", "index": 9, "delta": {"type": "new_delta", "text": "x"}}
        counted = {"type": "content_block_delta", "index": 0, "delta": {"type": "compaction_delta", "content": "x"}}
        events = [{"type": "new"}, {"type": "ping"}, start, new_block, new_delta,
                  {"type": "content_block_stop", "index": 9}, block, counted, {"type": "new", "delta": 1}, *rest]
        self.claude.play(one_by_one(*events), one_by_one(*events))
        self.assertEqual(self.chat().message["content"], "Hello there")
        self.assertEqual(completion_from_chunks(self.chat(stream=True).chunks)["message"]["content"], "Hello there")

    def test_an_error_event_is_a_status_for_plain_clients_and_an_event_for_streams(self):
        for kind, status, our_kind, code in (
            ("overloaded_error", 503, "server_error", "overloaded"),
            ("rate_limit_error", 429, "rate_limit_error", "rate_limit_exceeded"),
            ("api_error", 500, "server_error", None),
            ("timeout_error", 504, "server_error", "timeout"),
            ("invalid_request_error", 400, "invalid_request_error", None),
        ):
            for place in (0, 1, 4):
                events = self.EVENTS[:place] + [error_body(kind, "Sorry.")]
                with self.subTest(kind=kind, place=place):
                    answer, error = self.failure(one_by_one(*events), stream=False)
                    self.assertEqual((answer.status, error["type"], error["code"]), (status, our_kind, code))
                    self.assertTrue(error["message"].startswith("Sorry."))
                    answer, error = self.failure(one_by_one(*events), stream=True)
                    self.assertEqual((answer.status, error["type"], error["code"]), (200, our_kind, code))
                    self.assertEqual(b"Hello there" in answer.raw, place == 4)
        self.assertEqual(len(self.claude.messages), 30, "none of them is retried")

    def test_an_error_event_of_an_unknown_kind_is_the_upstreams_fault(self):
        answer, error = self.failure(one_by_one(*self.EVENTS[:3], error_body("new_error", "Sorry.")), stream=False)
        self.assertGreaterEqual(answer.status, 500)
        self.assertEqual(error["type"], "server_error")

    def test_an_error_under_status_200_is_an_error(self):
        for stream in (False, True):
            answer, error = self.failure(FakeReply(body=error_body("overloaded_error", "Sorry.")), stream)
            self.assertEqual((answer.status, error["code"]), (200 if stream else 503, "overloaded"))

    def test_a_malformed_error_event_is_an_error_too(self):
        for event in ({"type": "error"}, {"type": "error", "error": "x"}, {"type": "error", "error": None},
                      {"type": "error", "error": {}}):
            for stream in (False, True):
                with self.subTest(event=event, stream=stream):
                    self.failure(one_by_one(self.EVENTS[0], event), stream)

    def test_the_connection_serves_the_next_request_after_a_failed_stream(self):
        self.failure(one_by_one(*self.EVENTS[:3], error_body("api_error", "x")), stream=True)
        self.assertEqual(self.chat().status, 200)


class OwnRetryTests(GatewayTestCase):
    """At most one of our own, before anything was sent."""
    AT_ONCE = {"retry-after": "0"}

    def calls_for(self, *replies, stream: bool = False, headers=None) -> tuple:
        self.claude.reset()
        self.claude.play(*replies)
        answer = self.chat(stream=stream, headers=headers)
        return answer.status, len(self.claude.messages)

    def test_what_may_pass_is_asked_once_more(self):
        for status, kind in ((500, "api_error"), (503, "api_error"), (504, "timeout_error"), (529, "overloaded_error"),
                             (429, "rate_limit_error")):
            for stream in (False, True):
                with self.subTest(status=status, stream=stream):
                    reply = FakeReply(status, body=error_body(kind, "x"), headers=self.AT_ONCE)
                    self.assertEqual(self.calls_for(reply, stream=stream), (200, 2))
                    self.assertEqual(self.calls_for(reply, reply, stream=stream)[1], 2)

    def test_what_cannot_pass_is_not(self):
        for status, kind in ((400, "invalid_request_error"), (401, "authentication_error"), (402, "billing_error"),
                             (403, "permission_error"), (404, "not_found_error"), (413, "request_too_large")):
            with self.subTest(status=status):
                reply = FakeReply(status, body=error_body(kind, "x"), headers=self.AT_ONCE)
                self.assertEqual(self.calls_for(reply)[1], 1)

    def test_five_seconds_is_the_longest_wait(self):
        later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
        past = "Wed, 21 Oct 2015 07:28:00 GMT"
        for value, calls_made in (("5.5", 1), ("6", 1), ("100000", 1), (later, 1), ("soon", 1), ("-1", 1), (None, 1),
                                  (past.replace("2015", "9" * 30), 1), (past.replace("GMT", "+" + "9" * 30), 1),
                                  (past, 2), ("0", 2), ("0.01", 2)):
            with self.subTest(value=value):
                reply = FakeReply(429, body=error_body("rate_limit_error", "x"), headers={"retry-after": value})
                self.assertEqual(self.calls_for(reply), (429 if calls_made == 1 else 200, calls_made))
        for status, kind in ((503, "api_error"), (529, "overloaded_error")):
            with self.subTest(status=status):
                reply = FakeReply(status, body=error_body(kind, "x"), headers={"retry-after": "5.5"})
                self.assertEqual(self.calls_for(reply)[1], 1)

    def test_a_client_that_retries_by_itself_is_left_to_it(self):
        for value, calls_made in (("0", 2), ("1", 1), ("2", 1)):
            with self.subTest(value=value):
                reply = FakeReply(529, body=error_body("overloaded_error", "x"), headers=self.AT_ONCE)
                self.assertEqual(self.calls_for(reply, headers={"x-stainless-retry-count": value})[1], calls_made)

    def test_claudes_veto_holds(self):
        reply = FakeReply(529, body=error_body("overloaded_error", "x"), headers=dict(self.AT_ONCE,
                                                                                      **{"x-should-retry": "false"}))
        self.assertEqual(self.calls_for(reply), (503, 1))

    def test_a_failure_after_the_status_is_not_retried(self):
        events = events_of(message(text("Hello there")))
        for name, reply in (("error first", one_by_one(error_body("overloaded_error", "x"))),
                            ("error later", one_by_one(*events[:4], error_body("overloaded_error", "x"))),
                            ("reset", one_by_one(*events[:4], cut=True)),
                            ("JSON", FakeReply(body=error_body("overloaded_error", "x")))):
            for stream in (False, True):
                with self.subTest(name, stream=stream):
                    self.assertEqual(self.calls_for(reply, stream=stream)[1], 1)

    def test_a_correction_is_not_the_occasion_for_a_second_retry(self):
        self.start()
        overloaded = FakeReply(529, body=error_body("overloaded_error", "x"), headers=self.AT_ONCE)
        deprecated = FakeReply(400, body=error_body("invalid_request_error",
                                                    "`temperature` is deprecated for this model."))
        self.claude.play(overloaded, deprecated, overloaded)
        answer = self.chat(model="claude-sonnet-4-6", temperature=0.5)
        self.assertEqual((answer.status, len(self.claude.messages)), (503, 3))


class ClientTests(unittest.TestCase):
    """The client of a request while the upstream is waited for: `claude` and `user` are the far ends of both."""

    def setUp(self) -> None:
        self.upstream, self.claude = socket.socketpair()
        ours, self.user = socket.socketpair()
        for end in (self.upstream, self.claude, ours, self.user):
            self.addCleanup(end.close)
        self.peer = claude_gateway.Peer(ours)
        self.client = claude_gateway.Client(self.peer)

    def wait(self, seconds: float, client=None, writing: bool = False) -> None:
        wait = claude_gateway.UpstreamCall(patience=seconds).wait_for(self.upstream)
        (client or self.client).wait(wait, writing)

    @unittest.skipUnless(hasattr(select, "poll"), "select.poll is not here")
    def test_a_poll_object_is_made_once_for_the_same_sockets_and_few_are_kept(self):
        polls = claude_gateway.Polls()
        first = polls[(self.upstream,), ()]
        self.assertIs(polls[(self.upstream,), ()], first)
        for end in (self.upstream, self.claude, self.peer.sock, self.user):
            self.assertEqual(polls.ready((end,), 0), [])
            self.assertEqual(polls.ready((), 0, (end,)), [end.fileno()])
        self.assertLessEqual(len(polls), 4)

    def test_a_silent_stream_gets_a_sign_of_life_and_goes_on(self):
        self.client.idle_comment = b": on"
        self.client.last_sent = time.monotonic() - Limits.keepalive_interval - 1

        def answer() -> None:
            received_until(self.user, b": on")
            self.claude.sendall(b"event")
        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        self.wait(5)
        answering.join(30)
        self.assertGreater(self.client.last_sent, time.monotonic() - 5)
        self.assertEqual(Limits.keepalive_interval, 10)

    def test_a_stream_that_is_not_silent_gets_none(self):
        self.client.idle_comment = b": on"
        self.claude.sendall(b"event")
        self.wait(5)
        self.user.setblocking(False)
        self.assertRaises(BlockingIOError, self.user.recv, 9)

    def test_an_upstream_that_does_not_read_is_given_up(self):
        self.upstream.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.upstream.send(b"x" * 65_536)
        with self.assertRaises(claude_gateway.UpstreamTimeout) as caught:
            self.wait(0.01, writing=True)
        self.assertIn("read nothing", str(caught.exception))
        self.claude.settimeout(0.1)
        with contextlib.suppress(socket.timeout):
            while self.claude.recv(1_000_000):          # on Windows less than all of it comes at once
                pass
        self.wait(30, writing=True)

    def test_a_silent_upstream_is_given_up(self):
        for client in (self.client, claude_gateway.Client()):
            with self.assertRaises(claude_gateway.UpstreamTimeout) as caught:
                self.wait(0.01, client)
            self.assertEqual((caught.exception.status, caught.exception.code), (504, "timeout"))

    def test_a_client_that_ends_its_side_is_gone(self):
        self.user.shutdown(socket.SHUT_WR)
        for wait in (lambda: self.wait(5), lambda: self.client.pause(5)):
            self.assertRaises(claude_gateway.ClientGone, wait)

    def test_a_client_that_sends_its_next_request_early_is_not_gone(self):
        self.user.sendall(NEXT_REQUEST)
        self.claude.sendall(b"event")
        self.wait(5)
        self.client.pause(0.01)
        self.assertEqual(self.peer.read(), NEXT_REQUEST)


class PictureServer:
    """A web server on loopback: path -> (status, headers, body); `seen` has the requests."""

    def __init__(self, pictures: dict) -> None:
        seen = self.seen = []

        class Pictures(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                status, headers, body = pictures.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):      # who refuses a large one hangs up
                    self.wfile.write(body)

            def log_message(self, *_) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
        self.server.daemon_threads = True
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        # the gateway refuses 127.0.0.1 by its spelling, so a public name leads there
        self.name = "http://pictures.example.org:%d" % self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def names_that_resolve(test: unittest.TestCase, names: dict) -> None:
    """Until the end of the test these names have these addresses; no other name asks the network."""
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *more, **options):
        if host in names:
            return [entry for address in names[host] for entry in real(address, port, type=socket.SOCK_STREAM)]
        return real(host, port, *more, **options)

    socket.getaddrinfo = getaddrinfo
    test.addCleanup(setattr, socket, "getaddrinfo", real)


def make_certificate(path: str, key: str) -> None:
    """A certificate for upstream.test that is its own authority."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-keyout", key, "-out", path, "-days", "2", "-subj", "/CN=upstream.test", "-addext",
               "subjectAltName=DNS:upstream.test,IP:127.0.0.1", "-addext", "keyUsage=digitalSignature,keyCertSign"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)


class TlsTestCase(UpstreamTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, folder)
        cls.certificate, key = os.path.join(folder, "certificate.pem"), os.path.join(folder, "key.pem")
        try:
            make_certificate(cls.certificate, key)
        except (OSError, subprocess.SubprocessError):
            raise unittest.SkipTest("no openssl command that makes certificates") from None
        cls.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.context.load_cert_chain(cls.certificate, key)


class TlsTests(TlsTestCase):
    def test_an_unknown_authority_is_refused_with_its_cause(self):
        raw = self.start_before([upstream_bytes(MESSAGE_JSON)], context=self.context)
        answer = self.chat(headers=NO_RETRY)
        self.assertEqual(answer.status, 502)
        self.assertIn("SSL_CERT_FILE", answer.error["message"])
        self.assertRegex(answer.error["message"], "CERTIFICATE_VERIFY_FAILED")
        self.assertEqual(raw.posts, [])

    def test_a_named_authority_is_accepted_and_the_connection_kept(self):
        raw = self.start_before([upstream_bytes(MESSAGE_JSON)] * 2, context=self.context, ca_file=self.certificate)
        for _ in range(2):
            answer = self.chat(headers=NO_RETRY)
            self.assertEqual(answer.status, 200, answer.raw)
        self.assertEqual(raw.connections, 1)

    def test_streams_come_through_tls_event_by_event(self):
        events = events_of(message(text("Hello!")))
        release = threading.Event()
        self.addCleanup(release.set)
        head = upstream_bytes(b"", "content-type: text/event-stream", length=False)
        self.start_before([[head, sse(events[:4]), release, sse(events[4:])]], context=self.context,
                          ca_file=self.certificate)
        connection = self.connect()
        connection.sendall(chat_bytes("Connection: close", body=CHAT_BODY[:-1] + b',"stream":true}'))
        self.assertIn(b'"content":"Hello!"', received_until(connection, b'"content":"Hello!"'))
        release.set()
        self.assertIn(b"[DONE]", received_until(connection, b"[DONE]"))

    def test_a_large_request_goes_out_over_tls_whole(self):
        words = "word " * 2_000_000
        raw = self.start_before([upstream_bytes(MESSAGE_JSON)], context=self.context, ca_file=self.certificate)
        self.assertEqual(self.chat(words, headers=NO_RETRY).status, 200)
        self.assertEqual(json.loads(raw.posts[0][1])["messages"][0]["content"][0]["text"], words)

    def test_a_burst_after_a_pause_comes_through_tls_whole(self):
        words = "word " * 50_000                        # many records, of which TLS holds what nobody asked for yet
        events = events_of(message(text(words)), 50)
        release = threading.Event()
        self.addCleanup(release.set)
        head = upstream_bytes(b"", "content-type: text/event-stream", "transfer-encoding: chunked", length=False)
        self.start_before([[head, in_chunks(sse(events[:2]))[:-5], release, in_chunks(sse(events[2:]))]],
                          context=self.context, ca_file=self.certificate)
        connection = self.connect()
        connection.sendall(chat_bytes("Connection: close", body=CHAT_BODY[:-1] + b',"stream":true}'))
        received = received_until(connection, b"assistant")
        release.set()
        answer, = answers_in(received + received_until(connection, b"never"))
        self.assertEqual(completion_from_chunks(answer.chunks)["message"]["content"], words)

    def test_every_framing_works_over_tls_and_with_answers_larger_than_a_record(self):
        words = "word " * 20_000
        whole = json.dumps(message(text(words))).encode()
        cases = {"length": upstream_bytes(whole), "close": upstream_bytes(whole, "connection: close"),
                 "end": upstream_bytes(whole, length=False),
                 "chunks": upstream_bytes(in_chunks(whole), "transfer-encoding: chunked", length=False)}
        self.start_before(*([answer] for answer in cases.values()), context=self.context, ca_file=self.certificate)
        for name in cases:
            with self.subTest(name):
                answer = self.chat(headers=NO_RETRY)
                self.assertEqual(answer.status, 200, answer.raw)
                self.assertEqual(answer.message["content"], words)

    def test_another_name_in_the_certificate_is_refused_also_when_x509_is_relaxed(self):
        raw = RawUpstream([upstream_bytes(MESSAGE_JSON)], context=self.context)
        with raw:
            for relaxed in (False, True):
                with self.subTest(relaxed=relaxed):
                    self.start(base_url="https://localhost:%d" % raw.port, ca_file=self.certificate,
                               relax_x509=relaxed)
                    answer = self.chat(headers=NO_RETRY)
                    self.assertEqual(answer.status, 502)
                    self.assertIn("another host name", answer.error["message"])
        self.assertEqual(raw.posts, [])

    def test_an_image_comes_over_tls_from_the_name_that_was_asked_for(self):
        server = PictureServer({"/a.png": (200, {}, base64.b64decode(PIXEL))})
        self.addCleanup(server.close)
        server.server.socket = self.context.wrap_socket(server.server.socket, server_side=True)
        names_that_resolve(self, {"upstream.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]})
        fetcher = claude_gateway.ImageFetcher(Config(ca_file=self.certificate), lambda address: True)
        address = ":%d/a.png" % server.server.server_address[1]
        fetched = fetcher.fetch("https://upstream.test" + address, claude_gateway.Client())
        self.assertEqual(fetched, ("image/png", PIXEL))
        with self.assertRaisesRegex(claude_gateway.InvalidRequest, "could not be fetched.*CERTIFICATE_VERIFY_FAILED"):
            fetcher.fetch("https://other.test" + address, claude_gateway.Client())

    def test_a_client_that_leaves_ends_the_fetch_of_an_image_over_tls(self):
        listener, arrived, ended = socket.create_server(("127.0.0.1", 0)), threading.Event(), threading.Event()
        peer, user = socket.socketpair()
        for sock in (listener, peer, user):
            self.addCleanup(sock.close)

        def answer():
            with contextlib.suppress(OSError), listener.accept()[0] as plain, \
                    self.context.wrap_socket(plain, server_side=True) as there:
                there.recv(65_536)
                arrived.set()
                there.settimeout(30)
                if not there.recv(1):
                    ended.set()
        for work in (answer, lambda: arrived.wait(5) and user.close()):
            threading.Thread(target=work, daemon=True).start()
        names_that_resolve(self, {"upstream.test": ["127.0.0.1"]})
        config = Config(ca_file=self.certificate, limits=Limits(fetch_timeout=300))     # which ends nothing here
        fetcher = claude_gateway.ImageFetcher(config, lambda address: True)
        with self.assertRaises(claude_gateway.ClientGone):
            fetcher.fetch("https://upstream.test:%d/a.png" % listener.getsockname()[1],
                          claude_gateway.Client(claude_gateway.Peer(peer)))
        self.assertTrue(ended.wait(30), "the connection to the image goes on")

    def test_plain_http_where_tls_was_expected_is_502(self):
        with RawUpstream(banner=b"HTTP/1.1 400 Bad Request\r\n\r\n") as raw:
            self.start(base_url=raw.url.replace("http:", "https:"), ca_file=self.certificate)
            answer = self.chat(headers=NO_RETRY)
        self.assertEqual(answer.status, 502)
        self.assertIn("TLS", answer.error["message"])

    def test_relaxing_x509_clears_that_flag_alone(self):
        strict = getattr(ssl, "VERIFY_X509_STRICT", 0)
        plain, relaxed = (claude_gateway.tls_context(self.certificate, relax) for relax in (False, True))
        self.assertEqual(relaxed.verify_flags, plain.verify_flags & ~strict)
        for context in (plain, relaxed):
            self.assertEqual((context.verify_mode, context.check_hostname), (ssl.CERT_REQUIRED, True))

    def test_a_named_authority_is_added_to_those_of_the_system(self):
        real = ssl.get_default_verify_paths
        self.addCleanup(setattr, ssl, "get_default_verify_paths", real)
        ssl.get_default_verify_paths = lambda: real()._replace(openssl_cafile=self.certificate, openssl_capath="/none")
        named = self.certificate + ".named"
        make_certificate(named, self.certificate + ".key")
        self.addCleanup(os.environ.pop, "SSL_CERT_FILE", None)
        for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            with self.subTest(variable):
                os.environ.pop("SSL_CERT_FILE", None)
                if variable == "SSL_CERT_FILE":
                    os.environ["SSL_CERT_FILE"] = named             # OpenSSL itself reads it, instead of the system's
                serials = {each["serialNumber"] for each in claude_gateway.tls_context(named, False).get_ca_certs()}
                for path in (named, self.certificate):
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                    context.load_verify_locations(path)
                    self.assertIn(context.get_ca_certs()[0]["serialNumber"], serials)
        os.environ["SSL_CERT_FILE"] = named
        finding = claude_gateway.authorities_finding(Config(ca_file=named, ca_variable="SSL_CERT_FILE"))
        self.assertIn("2 authorities, with those of %s (SSL_CERT_FILE)" % named, finding.detail)
        ssl.get_default_verify_paths = lambda: real()._replace(openssl_cafile="/none", openssl_capath="/none")
        self.assertTrue(claude_gateway.authorities_finding(Config(ca_file=named)).detail.startswith("1 authority, "))

    def test_a_missing_file_of_authorities_is_named(self):
        self.start(base_url="https://127.0.0.1:1", ca_file=self.certificate + ".missing")
        answer = self.chat(headers=NO_RETRY)
        self.assertEqual(answer.status, 502)
        self.assertIn(self.certificate + ".missing", answer.error["message"])

    def test_the_deadline_holds_although_tls_has_bytes_of_its_own(self):
        # TLS 1.3 sends session tickets behind the handshake: something to read, and no answer yet
        never = threading.Event()
        self.addCleanup(never.set)
        with RawUpstream([[never]], context=self.context) as raw:
            gateway = Gateway(Config(base_url=raw.url, anthropic_api_key=SECRET, ca_file=self.certificate))
            self.addCleanup(gateway.close)
            threading.Timer(3, never.set).start()       # where the deadline does not hold, the test ends all the same
            with self.assertRaises(claude_gateway.UpstreamTimeout):
                gateway.upstream.messages(b"{}", claude_gateway.UpstreamCall(patience=0.1, may_retry=False))

    def test_a_client_that_leaves_before_the_first_token_stops_claude_over_tls_too(self):
        never = threading.Event()
        self.addCleanup(never.set)
        raw = self.start_before([[never]], context=self.context, ca_file=self.certificate)
        connection = self.connect()
        connection.sendall(chat_bytes())
        self.assertTrue(eventually(lambda: raw.posts))
        connection.close()
        self.assertTrue(raw.closed.wait(30))


class TinyProxy(LoopbackServer):
    """An HTTP proxy that knows CONNECT, and leads everything to one port."""

    def __init__(self, target_port: int, refusal: bytes, greeting: bytes) -> None:
        super().__init__(self._serve)
        self.heads, self.after = [], []                 # what a CONNECT said; the first bytes inside each tunnel
        self._target, self._refusal, self._greeting = target_port, refusal, greeting

    def _serve(self, client: socket.socket) -> None:
        self.heads.append(received_until(client, b"\r\n\r\n"))
        if self._refusal:
            client.sendall(self._refusal)
            return
        with contextlib.closing(socket.create_connection(("127.0.0.1", self._target))) as server:
            client.sendall(self._greeting)
            threading.Thread(target=self._copy, args=(server, client), daemon=True).start()
            self._copy(client, server, self.after)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket, seen: list = None) -> None:
        with contextlib.suppress(OSError):
            piece = source.recv(65_536)
            while piece:
                if seen is not None:
                    seen.append(piece)
                target.sendall(piece)
                piece = source.recv(65_536)
            target.shutdown(socket.SHUT_RDWR)


class ProxyTests(TlsTestCase):
    def start_behind_proxy(self, *scripts, refusal: bytes = b"", address: str = "http://user:pass%%20word@127.0.0.1:%d",
                           greeting: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n", **settings):
        raw = RawUpstream(*scripts, context=self.context)
        raw.__enter__()
        self.addCleanup(raw.__exit__)
        proxy = TinyProxy(raw.port, refusal, greeting)
        proxy.__enter__()
        self.addCleanup(proxy.__exit__)
        self.start(**dict({"base_url": "https://upstream.test:8443", "https_proxy": address % proxy.port,
                           "ca_file": self.certificate}, **settings))
        return raw, proxy

    def test_an_https_upstream_is_reached_through_the_proxy_which_alone_sees_its_credentials(self):
        raw, proxy = self.start_behind_proxy([upstream_bytes(MESSAGE_JSON)] * 2)
        for _ in range(2):
            answer = self.chat(headers=NO_RETRY)
            self.assertEqual(answer.status, 200, answer.raw)
        self.assertEqual(raw.connections, 1)            # a tunnel is kept as well
        for head in proxy.heads:
            self.assertTrue(head.startswith(b"CONNECT upstream.test:8443 HTTP/1."), head)
            self.assertIn(b"\r\nProxy-authorization: Basic " + base64.b64encode(b"user:pass word"), head)
            self.assertNotIn(SECRET.encode(), head)
        head = raw.posts[0][0].lower()
        self.assertIn(b"host: upstream.test:8443", head)
        self.assertIn(SECRET.encode(), head)
        self.assertNotIn(b"proxy-", head)
        self.assertNotIn(SECRET.encode(), b"".join(proxy.after))

    def test_a_proxy_without_credentials_or_scheme_gets_none(self):
        for address in ("http://127.0.0.1:%d", "127.0.0.1:%d"):
            with self.subTest(address=address):
                _, proxy = self.start_behind_proxy([upstream_bytes(MESSAGE_JSON)], address=address)
                self.assertEqual(self.chat(headers=NO_RETRY).status, 200)
                self.assertNotIn(b"authorization", proxy.heads[0].lower())

    def test_a_refusal_of_the_proxy_is_502_with_its_reason_and_without_its_password(self):
        raw, _ = self.start_behind_proxy(refusal=b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        answer = self.chat(headers=NO_RETRY)
        self.assertEqual(answer.status, 502)
        self.assertIn("407", answer.error["message"])
        self.assertNotIn("pass", answer.error["message"])
        self.assertEqual(raw.posts, [])

    def test_a_client_that_leaves_while_the_proxy_thinks_ends_the_call(self):
        for begin in (b"", b"HTTP/1.1 2", b"HTTP/1.1 103 Early Hints\r\n\r\n"):
            with self.subTest(begin), contextlib.closing(socket.socket()) as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen(5)
                self.start(base_url="https://upstream.test",
                           https_proxy="http://127.0.0.1:%d" % listener.getsockname()[1])
                client = self.connect()
                client.sendall(chat_bytes())
                listener.accept()[0].close()            # that was for the model list
                with contextlib.closing(listener.accept()[0]) as proxy:
                    proxy.settimeout(30)
                    received_until(proxy, b"\r\n\r\n")
                    proxy.sendall(begin)
                    client.close()
                    with contextlib.suppress(ConnectionResetError):     # that is gone, too
                        self.assertEqual(proxy.recv(1), b"")

    def test_a_proxy_cannot_answer_in_place_of_the_upstream(self):
        forged = upstream_bytes(json.dumps(message(text("forged"))).encode())
        raw, _ = self.start_behind_proxy([upstream_bytes(MESSAGE_JSON)],
                                         greeting=b"HTTP/1.1 200 OK\r\n\r\n" + forged)
        self.assertEqual(self.chat(headers=NO_RETRY).message["content"], "Hello!")
        self.assertEqual(len(raw.posts), 1)

    def test_a_proxy_may_say_more_before_and_in_its_answer(self):
        for greeting in (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nvia: x\r\n\r\nHTTP/1.0 200 OK\r\n\r\n",
                         b"HTTP/1.1 200 Fine\r\nvia: 1.1 proxy\r\ncontent-length: 0\r\n\r\n"):
            with self.subTest(greeting):
                raw, _ = self.start_behind_proxy([upstream_bytes(MESSAGE_JSON)], greeting=greeting)
                self.assertEqual(self.chat(headers=NO_RETRY).status, 200)
                self.assertEqual(len(raw.posts), 1)

    def test_an_ipv6_address_keeps_its_brackets_on_the_way_through_a_proxy(self):
        for base, target in (("https://[2001:db8::1]", b"[2001:db8::1]:443"),
                             ("https://[2001:db8::1]:8443", b"[2001:db8::1]:8443")):
            with self.subTest(base):
                _, proxy = self.start_behind_proxy(refusal=b"HTTP/1.1 403 No\r\n\r\n", base_url=base)
                self.assertEqual(self.chat(headers=NO_RETRY).status, 502)
                self.assertTrue(proxy.heads[0].startswith(b"CONNECT %s HTTP/1.1\r\nhost: %s\r\n" % (target, target)))

    def test_a_proxy_that_is_not_there_is_502(self):
        with contextlib.closing(socket.socket()) as unused:
            unused.bind(("127.0.0.1", 0))
            self.start(base_url="https://upstream.test", https_proxy="http://u:pw-secret@127.0.0.1:%d" %
                       unused.getsockname()[1])
            answer = self.chat(headers=NO_RETRY)
        self.assertEqual(answer.status, 502)
        self.assertNotIn("pw-secret", answer.error["message"])

    def test_who_could_not_be_reached_is_said_plainly(self):
        refused, unknown = ConnectionRefusedError(111, "Connection refused"), socket.gaierror(-2, "Name or service")
        for fault, tunnel, words in (
                (refused, None, "The upstream could not be reached at proxy.test:1: "),
                (refused, "upstream.test", "The proxy proxy.test:1 could not be reached: "),
                (OSError("Tunnel connection failed: 407 No"), "upstream.test",
                 "The upstream could not be reached through the proxy proxy.test:1: Tunnel connection failed: 407 No."),
                (unknown, "upstream.test", "The proxy proxy.test:1 could not be reached, as its host name proxy.test "
                                           "is not known here (`claude-gateway doctor` checks the way there): "),
                (unknown, None, "The upstream could not be reached, as its host name proxy.test is not known here")):
            with self.subTest(words):
                request = SimpleNamespace(host="proxy.test:1", _tunnel_host=tunnel)
                self.assertIn(words, str(claude_gateway.fault_before_answer(fault, request)))

    def test_loopback_is_never_proxied(self):
        raw, proxy = self.start_behind_proxy([upstream_bytes(MESSAGE_JSON)])
        self.start(base_url=raw.url, https_proxy="http://127.0.0.1:%d" % proxy.port, ca_file=self.certificate)
        self.assertEqual(self.chat(headers=NO_RETRY).status, 200)
        self.assertEqual(proxy.heads, [])

    def test_no_proxy_names_what_goes_direct(self):
        for no_proxy in ("other.example, upstream.test", ".test", "*"):
            with self.subTest(no_proxy=no_proxy):
                _, proxy = self.start_behind_proxy(no_proxy=no_proxy)
                answer = self.chat(headers=NO_RETRY)    # the reserved name .test never resolves
                self.assertEqual(answer.status, 502)
                self.assertEqual(proxy.heads, [])
        _, proxy = self.start_behind_proxy([upstream_bytes(MESSAGE_JSON)], no_proxy="stream.test,other.example")
        self.assertEqual(self.chat(headers=NO_RETRY).status, 200)
        self.assertNotEqual(proxy.heads, [])


# ---- Event loop --------------------------------------------------------------------------------------

class EventLoopTests(unittest.TestCase):
    """The event loop between two socket pairs: Claude speaks to `upstream`, the user reads from `client`."""

    def setUp(self):
        self.loop = claude_gateway.EventLoop()
        self.upstream, self.claude = socket.socketpair()
        self.client, self.user = socket.socketpair()
        for end in (self.upstream, self.claude, self.client, self.user):
            end.settimeout(30)
            self.addCleanup(end.close)
        self.addCleanup(self.loop.close)
        self.ended, self.failures = threading.Event(), []

    def another(self, steps):
        """A stream of these steps to a client of its own; what went wrong with it, once `failed` is set."""
        ours, user = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(user.close)
        failures, failed = [], threading.Event()
        stream = claude_gateway.RunningStream(
            claude_gateway.Client(claude_gateway.Peer(ours)), steps,
            lambda over, failure: failures.append(failure) or failed.set())
        return stream, failures, failed

    def wait_for_upstream(self, patience: float = 60):
        return claude_gateway.UpstreamCall(patience=patience).wait_for(self.upstream)

    def stream(self, patience: float = 60, keep_alive: bytes = b": on\n\n", limits: Limits = Limits(), steps=None):
        """A stream that hands on what Claude says until it says a full stop."""
        self.upstream.settimeout(0)

        def words():
            while True:
                try:
                    heard = self.upstream.recv(1_000_000)
                except BlockingIOError:
                    yield b"", self.wait_for_upstream(patience)
                    continue
                yield heard, None
                if heard.endswith(b"."):
                    return

        def end(over, failure):
            self.failures.append(failure)
            self.ended.set()
        self.peer = claude_gateway.Peer(self.client)
        client = claude_gateway.Client(self.peer, limits)
        client.idle_comment = keep_alive
        return claude_gateway.RunningStream(client, steps or words(), end)

    def test_the_loop_goes_on_after_a_stream_that_never_waits(self):
        """It is never due, and the selector of Python takes no infinite time."""
        busy, failures, failed = self.another(repeat((b"x", None), 100))
        self.loop._streams.add(busy)
        self.loop._check()
        self.loop._streams.clear()
        self.assertLess(self.loop._check_at, time.monotonic() + 61)
        self.loop.add(busy)
        self.assertTrue(failed.wait(30))
        self.assertEqual(failures, [None])
        again, failures, failed = self.another(iter([(b"x", None)]))
        self.loop.add(again)
        self.assertTrue(failed.wait(30), "the loop has died")

    def test_what_claude_says_reaches_the_client_until_the_end(self):
        self.loop.add(self.stream())
        for words in (b"Hello", b", world", b"."):
            self.claude.sendall(words)
            self.assertEqual(received_until(self.user, words), words)
        self.assertTrue(self.ended.wait(30))
        self.assertEqual(self.failures, [None])

    def test_a_client_that_ends_its_side_ends_the_stream(self):
        self.loop.add(self.stream())
        self.user.shutdown(socket.SHUT_WR)
        self.assertTrue(self.ended.wait(30))
        self.assertIsInstance(self.failures[0], claude_gateway.ClientGone)

    def test_a_client_that_sends_its_next_request_early_is_not_gone(self):
        self.user.sendall(NEXT_REQUEST)
        self.loop.add(self.stream())
        self.claude.sendall(b"Hello.")
        self.assertEqual(received_until(self.user, b"."), b"Hello.")
        self.assertTrue(self.ended.wait(30))
        self.assertEqual((self.failures, self.peer.read_within(5)), ([None], NEXT_REQUEST))

    def test_a_silent_upstream_is_given_up(self):
        self.loop.add(self.stream(patience=0.05))
        self.assertTrue(self.ended.wait(30))
        self.assertIsInstance(self.failures[0], claude_gateway.UpstreamTimeout)

    def test_a_silent_stream_gets_signs_of_life_where_it_may_have_them(self):
        self.loop.add(self.stream(limits=Limits(keepalive_interval=0.02)))
        self.assertEqual(received_until(self.user, b": on\n\n: on\n\n")[:12], b": on\n\n: on\n\n")
        self.loop.close()
        self.loop = claude_gateway.EventLoop()
        self.addCleanup(self.loop.close)
        self.ended.clear()
        self.user.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.user.recv(1_000)
        self.user.settimeout(30)
        self.loop.add(self.stream(patience=0.1, keep_alive=b""))
        self.assertTrue(self.ended.wait(30))
        self.user.setblocking(False)
        self.assertRaises(BlockingIOError, self.user.recv, 100)

    def test_a_client_that_does_not_read_is_waited_for_and_then_gets_everything(self):
        much = b"x" * 5_000_000 + b"."
        self.loop.add(self.stream())
        talking = threading.Thread(target=self.claude.sendall, args=(much,), daemon=True)
        talking.start()
        self.assertFalse(self.ended.wait(0.1))
        self.assertEqual(received_until(self.user, b"."), much)
        self.assertTrue(self.ended.wait(30))

    def test_while_the_client_does_not_read_the_upstream_is_not_waited_for(self):
        much = b"x" * 5_000_000

        def steps():
            yield much, self.wait_for_upstream(0.05)
            yield self.upstream.recv(10), None
        self.loop.add(self.stream(steps=steps()))
        self.assertFalse(self.ended.wait(0.1))
        self.claude.sendall(b".")
        self.assertEqual(received_until(self.user, b"."), much + b".")
        self.assertTrue(self.ended.wait(10))
        self.assertEqual(self.failures, [None])

    def test_a_client_that_never_reads_is_given_up(self):
        self.claude.settimeout(None)
        self.loop.add(self.stream(limits=Limits(write_timeout=0.05)))

        def talk():
            with contextlib.suppress(OSError):
                self.claude.sendall(b"x" * 10_000_000)
        talking = threading.Thread(target=talk, daemon=True)
        talking.start()
        self.assertTrue(self.ended.wait(30))
        self.assertIsInstance(self.failures[0], claude_gateway.ClientGone)
        self.upstream.close()                           # lets the talker go
        talking.join(30)

    def test_a_failure_in_one_stream_is_told_to_that_stream_only(self):
        def failing():
            raise RuntimeError("broken")
            yield b"", None
        self.loop.add(self.stream())
        stream, failures, failed = self.another(failing())
        self.loop.add(stream)
        self.assertTrue(failed.wait(30))
        self.assertEqual([type(failure) for failure in failures], [RuntimeError])
        self.claude.sendall(b"Hello.")
        self.assertEqual(received_until(self.user, b"."), b"Hello.")

    def test_a_stream_that_never_pauses_lets_others_have_their_turn(self):
        endless = threading.Event()

        def always():
            while not endless.is_set():
                yield b"", None
        self.addCleanup(endless.set)
        self.loop.add(self.another(always())[0])
        self.loop.add(self.stream())
        self.claude.sendall(b"Hello.")
        self.assertEqual(received_until(self.user, b"."), b"Hello.")
        endless.set()

    def test_a_stream_that_is_due_for_a_sign_of_life_between_two_turns_gets_it_and_goes_on(self):
        registered, stop = [], threading.Event()

        def steps():
            yield b"", self.wait_for_upstream()
            while not stop.is_set():
                registered.append(len(stream.registered))
                yield b"", None
            yield b".", None
        stream = self.stream(limits=Limits(keepalive_interval=0.01), steps=steps())
        self.loop.add(stream)
        self.claude.sendall(b"!")
        received_until(self.user, b": on\n\n: on\n\n: on\n\n")
        stop.set()
        self.assertTrue(self.ended.wait(30))
        # in its later turns it waits for no socket: that of the upstream may be another stream's by then
        self.assertEqual((self.failures, set(registered[claude_gateway.LOOP_STEPS:])), ([None], {0}))

    def test_a_stream_whose_sockets_cannot_be_watched_leaves_nothing_behind(self):
        self.loop.add(self.stream())                    # its upstream is registered ...
        # ... so that this stream cannot have it, too
        stream, failures, failed = self.another(repeat((b"", self.wait_for_upstream())))
        self.loop.add(stream)
        self.assertTrue(failed.wait(30))
        self.assertIsInstance(failures[0], KeyError)
        self.assertEqual(len(self.loop._selector.get_map()), 3)         # the bell, and the first stream's two

    @unittest.skipUnless(resource, "limits of POSIX")
    def test_where_there_is_no_descriptor_for_it_a_stream_is_refused_and_a_later_one_served(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        stream = self.stream()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            self.loop.add(stream)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.assertEqual(self.failures[0].code, "gateway_busy")
        self.ended.clear()
        self.loop.add(self.stream())
        self.claude.sendall(b"Hello.")
        self.assertEqual(received_until(self.user, b"."), b"Hello.")

    def test_its_end_puts_no_error_amid_what_a_slow_client_has_not_read_yet(self):
        stream = self.stream(steps=iter([(b"x" * 10_000_000, None), (b"y", None)]))
        self.loop.add(stream)
        self.assertTrue(eventually(lambda: stream.unsent))
        self.loop.close()
        self.assertIsInstance(self.failures[0], claude_gateway.ClientGone)

    def test_its_end_ends_every_stream(self):
        self.loop.add(self.stream())
        self.loop.close()
        self.assertTrue(self.ended.is_set())
        self.assertEqual(self.failures[0].code, "gateway_busy")
        self.ended.clear()
        self.loop.add(self.stream())                    # and of one that comes too late
        self.assertTrue(self.ended.is_set())


class InEventLoop:
    """Every stream goes through the event loop, as they do where many run at once."""

    @classmethod
    def _service(cls, settings):
        return super()._service(dict({"limits": Limits(event_loop_from=0)}, **settings))


class RunningStreamTests(InEventLoop, UpstreamTestCase):
    STREAM = CHAT_BODY[:-1] + b',"stream":true}'

    def setUp(self):
        super().setUp()
        self.release = threading.Event()
        self.addCleanup(self.release.set)

    def held(self, words: str = "Hello there") -> FakeReply:
        events = events_of(message(text(words)), 100)
        return FakeReply(pieces=[sse(events[:2]), self.release, sse(events[2:])])

    def test_streams_that_wait_share_one_thread(self):
        self.start()
        self.claude.play(*[self.held() for _ in range(40)])
        connections = [self.connect() for _ in range(40)]
        loops = [thread.name for thread in threading.enumerate()].count("event loop")
        before = threading.active_count()               # Claude's own threads come on top, one a stream
        for connection in connections:
            connection.sendall(chat_bytes(body=self.STREAM))
        for connection in connections:
            received_until(connection, b"assistant")
        names = lambda: [thread.name for thread in threading.enumerate()]  # noqa: E731
        self.assertTrue(eventually(lambda: threading.active_count() <= before + 40 + 2), names())
        self.assertEqual(names().count("event loop"), loops + 1)
        self.release.set()
        for connection in connections:
            received = received_until(connection, b"0\r\n\r\n")
            self.assertIn(b"Hello there", received)
            self.assertIn(b"[DONE]", received)

    def test_few_streams_stay_in_their_threads(self):
        loops = [thread.name for thread in threading.enumerate()].count("event loop")
        self.start(limits=Limits(event_loop_from=5))
        self.claude.play(self.held())
        connection = self.connect()
        connection.sendall(chat_bytes(body=self.STREAM))
        received_until(connection, b"assistant")
        self.assertEqual([thread.name for thread in threading.enumerate()].count("event loop"), loops)
        self.release.set()
        self.assertIn(b"[DONE]", received_until(connection, b"0\r\n\r\n"))

    def test_the_next_request_on_the_connection_is_served_after_a_stream(self):
        for early in (True, False):
            with self.subTest(early=early):
                self.release.clear()
                self.claude.play(self.held())
                connection = self.connect()
                connection.sendall(chat_bytes(body=self.STREAM) + (NEXT_REQUEST[:20] if early else b""))
                received = received_until(connection, b"assistant")
                if early:                               # the rest of it, while the stream is in the event loop
                    connection.sendall(NEXT_REQUEST[20:])
                self.release.set()
                received += received_until(connection, b"0\r\n\r\n")
                if not early:
                    connection.sendall(NEXT_REQUEST)
                answers = answers_in(received + received_until(connection, b"never"))
                self.assertEqual([answer.status for answer in answers], [200, 200])
                self.assertEqual(answers[0].events[-1], "[DONE]")

    def test_a_failure_in_mid_stream_is_told_as_in_a_thread(self):
        events = events_of(message(text("Hello there")))
        for name, rest in (("cut", b""), ("error event", sse([error_body("overloaded_error", "Busy")])),
                           ("junk", b"data: {nonsense\n\n")):
            with self.subTest(name):
                self.release.clear()
                self.claude.play(FakeReply(pieces=[sse(events[:3]), self.release, rest], cut=not rest))
                connection = self.connect()
                connection.sendall(chat_bytes(body=self.STREAM))
                received = received_until(connection, b"assistant")
                self.release.set()
                answer, = answers_in(received + received_until(connection, b"never"))
                self.assertEqual(set(json.loads(answer.events[-1])), {"error"})

    def test_the_bytes_are_those_that_a_thread_would_send(self):
        def bare_bytes(raw: bytes) -> bytes:
            return re.sub(rb'"(id|created)":("[^"]*"|\d+)', b"", raw)
        reply = message(thinking("Hm", "c2ln"), text("Gr\u00fc\u00dfe \u2028 \"so\" \\ \n"),
                        tool_use("toolu_1", "f", {"a": 1}))
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
        raw = []
        for most in (0, 1_000):
            self.start(limits=Limits(event_loop_from=most))
            self.claude.play(FakeReply(pieces=[sse([event]) for event in events_of(reply, 3)]))
            options = {"include_usage": True, "include_obfuscation": True}      # or chunks go by how the reads fall
            raw.append(bare_bytes(self.chat(stream=True, tools=tools, stream_options=options).raw))
        self.assertEqual(raw[0], raw[1])

    def test_requests_in_the_event_loop_count_as_running_and_get_their_grace(self):
        service = self.start()
        self.claude.play(self.held())
        connection = self.connect()
        connection.sendall(chat_bytes(body=self.STREAM))
        received_until(connection, b"assistant")
        self.assertEqual(service.gateway.running.count, 1)
        closing = threading.Thread(target=service.close, args=(10,), daemon=True)
        closing.start()
        self.assertTrue(eventually(lambda: service.gateway.running.draining))
        self.release.set()
        self.assertIn(b"[DONE]", received_until(connection, b"0\r\n\r\n"))
        closing.join(30)
        self.assertEqual(service.gateway.running.count, 0)

    def test_where_no_thread_is_to_be_had_a_stream_ends_all_the_same(self):
        start = threading.Thread.start

        def start_no_more(thread):
            if thread.name == "connection":
                raise RuntimeError("can't start new thread")
            start(thread)
        self.addCleanup(setattr, threading.Thread, "start", start)
        paused = events_of(message(text("I look. "), WEB_FIND, WEB_FOUND, stop_reason="pause_turn"))
        for name, reply, last in (("whole", self.held(), "[DONE]"),
                                  ("to be continued", FakeReply(pieces=[
                                      sse(paused[:2]), self.release, sse(paused[2:])]), "gateway_busy")):
            with self.subTest(name):
                self.release.clear()
                self.claude.play(reply)
                connection = self.connect()
                connection.sendall(chat_bytes(body=self.STREAM[:-1] + b',"web_search_options":{}}'))
                received = received_until(connection, b"assistant")
                threading.Thread.start = start_no_more
                self.release.set()
                received += received_until(connection, b"never")
                threading.Thread.start = start
                self.assertTrue(self.service.gateway.running.wait_until_idle(30))
                answer, = answers_in(received)
                self.assertIn(last, answer.events[-1])
                self.assertTrue(received.endswith(b"0\r\n\r\n"))

    def test_what_runs_beyond_the_grace_is_told_so(self):
        service = self.start()
        self.claude.play(self.held())
        connection = self.connect()
        connection.sendall(chat_bytes(body=self.STREAM))
        received = received_until(connection, b"assistant")
        self.assertTrue(eventually(lambda: service.gateway.event_loop._streams))    # it has moved there
        service.close(0)
        answer, = answers_in(received + received_until(connection, b"never"))
        self.assertEqual(json.loads(answer.events[-1])["error"]["code"], "gateway_busy")
        self.assertTrue(self.claude.wait_closed(30))


class EventLoopStreamShapeTests(InEventLoop, StreamShapeTests):
    pass


class EventLoopTlsTests(InEventLoop, TlsTests):
    pass


# ---- Image fetching ----------------------------------------------------------------------------------

class PictureFetchTests(GatewayTestCase):
    """Images by address: Claude fetches https itself; what it cannot is fetched here, under strict rules."""
    SECURE = "https://pictures.example.org/a.png"
    REFUSED = "Unable to download the file. Please verify the URL and try again."

    def setUp(self):
        super().setUp()
        self.start()
        self.fetcher = self.service.gateway.images

    def serve(self, **pictures) -> PictureServer:
        server = PictureServer({"/" + path.replace("_", "."): answer for path, answer in pictures.items()})
        self.addCleanup(server.close)
        names_that_resolve(self, {"pictures.example.org": ["127.0.0.1"], "private.example.org": ["127.0.0.1"]})
        self.fetcher.permit = lambda address: address == "127.0.0.1"
        return server

    def look(self, *urls: str, **fields) -> Answer:
        return self.chat([{"type": "image_url", "image_url": {"url": url}} for url in urls], **fields)

    def sources(self) -> list:
        return [block["source"] for block in self.claude.messages[-1].body["messages"][0]["content"]]

    def test_an_https_address_is_handed_on_as_it_is(self):
        for url in (self.SECURE, "https://pictures.example.org/a%20b.png?x=1&y=%2F#part", "HTTPS://Example.ORG/A.png",
                    "https://8.8.8.8/a.png", "https://[2606:4700::1111]/a.png", "https://example.org:8443/a"):
            with self.subTest(url=url):
                self.assertEqual(self.look(url, detail="high").status, 200)
                self.assertEqual(self.sources()[0]["type"], "url")
                self.assertEqual(self.sources()[0]["url"][5:], url[5:])

    def test_what_claude_cannot_fetch_is_fetched_once_and_sent_as_bytes(self):
        for stream in (False, True):
            with self.subTest(stream=stream):
                fetched = []
                self.fetcher.fetch = lambda url, client: fetched.append(url) or ("image/png", PIXEL)
                self.claude.play(refusal_of_claude(400, "invalid_request_error", self.REFUSED))
                count = len(self.claude.messages)
                answer = self.look(self.SECURE, "https://pictures.example.org/b.png", self.SECURE, stream=stream)
                self.assertEqual((answer.status, len(self.claude.messages)), (200, count + 2))
                self.assertEqual(self.sources(), [{"type": "base64", "media_type": "image/png", "data": PIXEL}] * 3)
                self.assertEqual(fetched, [self.SECURE, "https://pictures.example.org/b.png"])

    def test_a_second_refusal_is_handed_on(self):
        self.fetcher.fetch = lambda url, client: ("image/png", PIXEL)
        self.claude.play(*[refusal_of_claude(400, "invalid_request_error", self.REFUSED)] * 2)
        answer = self.look(self.SECURE)
        self.assertEqual((answer.status, answer.error["message"], len(self.claude.messages)), (400, self.REFUSED, 2))

    def test_claudes_words_are_not_lost_where_the_gateway_cannot_fetch_it_either(self):
        def fetch(url, client):
            raise claude_gateway.InvalidRequest("The image is not there.", "image_url", "invalid_image_url")
        self.fetcher.fetch = fetch
        self.claude.play(refusal_of_claude(400, "invalid_request_error", self.REFUSED))
        answer = self.look(self.SECURE)
        self.assertEqual((answer.status, answer.error["param"], answer.error["code"]),
                         (400, "image_url", "invalid_image_url"))
        self.assertTrue(answer.error["message"].startswith("The image is not there. "))
        self.assertTrue(answer.error["message"].endswith(self.REFUSED))

    def test_an_image_of_an_earlier_turn_that_is_gone_ends_no_conversation(self):
        def fetch(url, client):
            raise claude_gateway.InvalidRequest("The image is not there.", "image_url", "invalid_image_url")
        self.fetcher.fetch = fetch
        for url, refusals in ((self.SECURE, 1), ("http://pictures.example.org/a.png", 0)):
            with self.subTest(url=url):
                self.claude.play(*[refusal_of_claude(400, "invalid_request_error", self.REFUSED)] * refusals)
                answer = self.chat(messages=[user([image_url(url)]), assistant("I see."), user("Go on.")])
                self.assertEqual((answer.status, answer.headers["x-claude-gateway-changes"]),
                                 (200, "changed=messages.0.content.0"))
                self.assertEqual(bare(self.claude.messages[-1].body["messages"][0]["content"]), [NOTE])

    def test_a_refusal_of_another_status_fetches_nothing(self):
        self.fetcher.fetch = lambda url, client: self.fail("fetched")
        self.claude.play(refusal_of_claude(403, "permission_error", self.REFUSED))
        self.assertEqual((self.look(self.SECURE).status, len(self.claude.messages)), (403, 1))

    def test_an_image_inside_a_tool_result_is_fetched_too(self):
        self.fetcher.fetch = lambda url, client: ("image/png", PIXEL)
        call = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]},
                   {"role": "tool", "tool_call_id": "toolu_1", "content": [
                       {"type": "image_url", "image_url": {"url": "http://pictures.example.org/a.png"}}]}]
        sent = self.sent(messages=history, tools=[{"type": "function", "function": {"name": "f"}}])
        self.assertEqual(sent["messages"][2]["content"][0]["content"][0]["source"]["type"], "base64")

    def test_plain_http_is_fetched_at_once(self):
        server = self.serve(a_png=(200, {"content-type": "text/plain"}, base64.b64decode(PIXEL)))
        self.assertEqual(self.look(server.name + "/a.png", server.name + "/a.png").status, 200)
        self.assertEqual(len(self.claude.messages), 1)
        self.assertEqual(self.sources(), [{"type": "base64", "media_type": "image/png", "data": PIXEL}] * 2)
        self.assertEqual([path for path, _ in server.seen], ["/a.png"])

    def test_whoever_serves_the_image_learns_nothing_of_us(self):
        server = self.serve(a_png=(200, {}, base64.b64decode(PIXEL)))
        self.look(server.name + "/a.png", headers={"authorization": "Bearer mine", "cookie": "a=b"})
        headers = server.seen[0][1]
        self.assertEqual(sorted(headers), ["accept", "accept-encoding", "connection", "host", "user-agent"])
        self.assertNotIn(SECRET, str(headers))

    def test_the_query_is_asked_for_and_the_fragment_is_not(self):
        server = self.serve(**{"a.png?x=1&y=%2F": (200, {}, base64.b64decode(PIXEL)),
                               "?x": (200, {}, base64.b64decode(PIXEL))})
        for rest in ("/a.png?x=1&y=%2F#part", "?x"):
            self.assertEqual(self.look(server.name + rest).status, 200)
        self.assertEqual([path for path, _ in server.seen], ["/a.png?x=1&y=%2F", "/?x"])

    def test_what_is_no_fitting_image_is_400_by_url_and_rule(self):
        png_bytes = base64.b64decode(PIXEL)
        server = self.serve(
            page=(200, {"content-type": "image/png"}, b"<html>"), empty=(200, {}, b""),
            svg=(200, {"content-type": "image/svg+xml"}, b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
            big=(200, {}, png_bytes + bytes(8_000_000)), gone=(410, {}, b""), partial=(206, {}, png_bytes),
            loop=(302, {"location": "/loop"}, b""), nowhere=(302, {}, b""),
            pdf=(200, {}, b"%PDF-1.7\n"), file=(301, {"location": "file:///etc/passwd"}, b""),
            data=(301, {"location": "data:image/png;base64," + PIXEL}, b""),
            user=(301, {"location": "http://me:secret@pictures.example.org/a.png"}, b""),
            ftp=(301, {"location": "ftp://pictures.example.org/a.png"}, b""),
            bracket=(302, {"location": "http://["}, b""))
        for path, rule in (
            ("page", "not a JPEG, PNG, GIF or WebP"), ("empty", "not a JPEG"), ("svg", "not a JPEG"),
            ("pdf", "not a JPEG"), ("big", r"larger than 7\.\d MB"), ("gone", "status 410"), ("none", "status 404"),
            ("partial", "status 206"), ("loop", "redirects more than"), ("nowhere", "status 302"),
            ("file", "not a web address"), ("data", "not a web address"), ("ftp", "not a web address"),
            ("user", "user information"), ("bracket", "could not be fetched"),
        ):
            with self.subTest(path=path):
                url = "%s/%s" % (server.name, path)
                answer = self.look(url)
                self.assertEqual((answer.status, answer.error["code"]), (400, "invalid_image_url"), answer.raw)
                self.assertIn(url, answer.error["message"])
                self.assertRegex(answer.error["message"], rule)
        self.assertEqual(self.claude.messages, [])

    def trickle(self, start: bytes, piece: bytes) -> str:
        """The address, without its scheme, of a server that says `start` and then `piece` over and over.

        Who listens for more than six seconds makes `patient` true.
        """
        listener, over = socket.create_server(("127.0.0.1", 0)), threading.Event()
        self.addCleanup(listener.close)
        self.addCleanup(over.set)
        self.serve()
        self.patient = False

        def answer():
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.sendall(start)
                for _ in range(300):
                    over.wait(0.02)
                    connection.sendall(piece)
                self.patient = True
        self.trickling = threading.Thread(target=answer, daemon=True)
        self.trickling.start()
        return "://pictures.example.org:%d/a.png" % listener.getsockname()[1]

    def test_a_server_that_trickles_is_given_up_whatever_it_trickles(self):
        self.fetcher = claude_gateway.ImageFetcher(Config(limits=Limits(fetch_timeout=0.1)))
        picture = base64.b64decode(PIXEL)
        for name, scheme, start, piece in (
            ("a header", "http", b"HTTP/1.1 200 OK\r\nX: ", b"y"),
            ("headers", "http", b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
            ("a body", "http", b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + picture, b"y"),
            ("a body without an end", "http", b"HTTP/1.1 200 OK\r\n\r\n" + picture, b"y"),
            ("chunks", "http", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\ny\r\n"),
            ("a handshake", "https", b"\x16\x03\x03\x3f\xff\x02", b"y"),
        ):
            with self.subTest(name=name):
                url = scheme + self.trickle(start, piece)
                with self.assertRaisesRegex(claude_gateway.InvalidRequest, "took longer than 0.1 seconds"):
                    self.fetcher.fetch(url, claude_gateway.Client())
                self.trickling.join(30)
                self.assertFalse(self.patient, "it waited for the end")

    def leave_while_fetching(self, url: str, arrived: threading.Event) -> None:
        """A client asks for an image and leaves once that is on its way; the request must end by itself."""
        part = {"type": "image_url", "image_url": {"url": url}}
        body = json.dumps({"model": "opus", "messages": [{"role": "user", "content": [part]}]}).encode()
        client = self.connect()
        client.sendall(chat_bytes(body=body))
        self.assertTrue(arrived.wait(30))
        client.close()
        self.assertTrue(self.service.gateway.running.wait_until_idle(30), "the request goes on")
        self.assertEqual(self.claude.messages, [])

    def test_a_client_that_leaves_ends_the_fetch_at_once(self):
        listener, arrived, ended = socket.create_server(("127.0.0.1", 0)), threading.Event(), threading.Event()
        self.addCleanup(listener.close)
        self.serve()

        def answer():
            connection = listener.accept()[0]
            with contextlib.suppress(OSError), contextlib.closing(connection):
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                arrived.set()
                connection.settimeout(30)
                if not connection.recv(1):
                    ended.set()
        threading.Thread(target=answer, daemon=True).start()
        self.leave_while_fetching("http://pictures.example.org:%d/a.png" % listener.getsockname()[1], arrived)
        self.assertTrue(ended.wait(30), "the connection to the image goes on")

    def slow_look_up(self) -> tuple:
        """A name that is found only once the second event is set; the first says that it was asked for."""
        asked, found, real = threading.Event(), threading.Event(), socket.getaddrinfo

        def getaddrinfo(host, *more, **options):
            if host == "slow.example.org":
                asked.set()
                found.wait(10)
            return real("127.0.0.1" if host == "slow.example.org" else host, *more, **options)
        self.addCleanup(setattr, socket, "getaddrinfo", real)
        self.addCleanup(found.set)
        socket.getaddrinfo = getaddrinfo
        return asked, found

    def test_looking_up_a_name_counts_towards_the_time_of_an_image(self):
        self.slow_look_up()
        fetcher = claude_gateway.ImageFetcher(Config(limits=Limits(fetch_timeout=0.1)))
        with self.assertRaisesRegex(claude_gateway.InvalidRequest, "took longer than 0.1 seconds"):
            fetcher.fetch("http://slow.example.org/a.png", claude_gateway.Client())

    def test_a_client_may_leave_while_a_name_is_looked_up(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        listener.settimeout(30)
        self.fetcher.permit = lambda address: True
        asked, found = self.slow_look_up()
        self.leave_while_fetching("http://slow.example.org:%d/a.png" % listener.getsockname()[1], asked)
        found.set()
        with listener.accept()[0] as connection:
            self.assertEqual(connection.recv(100), b"", "the image is asked for")

    def test_an_image_that_broke_off_is_not_taken_for_whole(self):
        server = self.serve(a_png=(200, {"content-length": "1000"}, base64.b64decode(PIXEL)))
        answer = self.look(server.name + "/a.png")
        self.assertEqual((answer.status, answer.error["code"]), (400, "invalid_image_url"))
        self.assertIn("broke off", answer.error["message"])

    def test_images_are_fetched_only_as_far_as_one_request_can_hold_them(self):
        fetched = []
        self.fetcher.fetch = lambda url, client: fetched.append(url) or ("image/png", "A" * 10_000_000)
        for urls, calls in ((["http://pictures.example.org/%d.png" % at for at in range(10)], 4),
                            (["http://pictures.example.org/same.png"] * 10, 1)):
            with self.subTest(calls=calls):
                fetched.clear()
                answer = self.look(*urls)
                self.assertEqual((answer.status, answer.error["code"]), (413, "request_too_large"))
                self.assertEqual(len(fetched), calls)

    def test_nothing_is_fetched_for_a_client_that_has_left(self):
        fetched = []
        client = self.connect()

        def fetch(url, waiting):
            fetched.append(url)
            client.close()
            return "image/png", PIXEL
        self.fetcher.fetch = fetch
        parts = [{"type": "image_url", "image_url": {"url": "http://pictures.example.org/%d.png" % at}}
                 for at in range(3)]
        body = json.dumps({"model": "opus", "messages": [{"role": "user", "content": parts}]}).encode()
        with self.assertLogs("claude_gateway", "INFO") as logged:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" %
                           (len(body), body))
            self.assertTrue(eventually(lambda: "client gone" in str(logged.output)))
        self.assertEqual((len(fetched), self.claude.messages), (1, []))

    def test_three_redirects_are_followed_and_no_fourth(self):
        hops = {"r%d" % number: (status, {"location": "/r%d" % (number - 1)}, b"")
                for number, status in ((1, 301), (2, 303), (3, 307), (4, 308))}
        server = self.serve(r0=(200, {}, base64.b64decode(PIXEL)), **hops)
        self.assertEqual(self.look(server.name + "/r3").status, 200)
        self.assertEqual(self.look(server.name + "/r4").status, 400)

    def test_a_redirect_is_judged_like_a_first_address(self):
        server = self.serve()
        port = server.server.server_address[1]
        self.fetcher.permit = lambda address: address == "127.0.0.1"
        for target in ("http://127.0.0.2:%d/" % port, "http://10.0.0.1/", "http://169.254.169.254/",
                       "http://[::1]:%d/" % port):
            with self.subTest(target=target):
                other = self.serve(a=(302, {"location": target}, b""))
                answer = self.look(other.name + "/a")
                self.assertEqual(answer.status, 400)
                self.assertIn("private network", answer.error["message"])
        self.assertEqual(server.seen, [])

    # spellings of loopback, private and link-local addresses
    PRIVATE_HOSTS = (
        "127.0.0.1", "localhost", "LOCALHOST", "localhost.", "a.localhost", "127.0.0.1.", "10.0.0.1", "10.0.0.1.",
        "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "0", "255.255.255.255", "224.0.0.1",
        "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "0x0a.1",
        "3232235521", "2852039166", "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[ff02::1]", "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]", "[::ffff:a00:1]", "[64:ff9b::7f00:1]", "[64:ff9b::10.0.0.1]", "[2002:7f00:1::]",
        "[2002:a00:1::1]", "me@127.0.0.1", "me:secret@10.0.0.1", "example.org@127.0.0.1", "127.0.0.1:80",
        "[0:0:0:0:0:0:0:1]", "[fe80::1%25eth0]", "[::7f00:1]", "[::ffff:0:7f00:1]", "[64:ff9b:1::7f00:1]", "[fec0::1]",
    )

    def test_addresses_of_the_public_internet_are_taken(self):
        for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"):
            with self.subTest(address=address):
                self.assertTrue(claude_gateway.is_public(address))

    def test_no_spelling_of_a_private_address_is_taken(self):
        self.fetcher.fetch = claude_gateway.ImageFetcher(Config()).fetch
        for host in self.PRIVATE_HOSTS:
            for scheme in ("http", "https"):
                with self.subTest(host=host, scheme=scheme):
                    url = "%s://%s/a.png" % (scheme, host)
                    answer = self.look(url)
                    self.assertEqual((answer.status, answer.error["code"]), (400, "invalid_image_url"), answer.raw)
                    self.assertIn(url, answer.error["message"])
        self.assertEqual(self.claude.messages, [])

    def test_the_fetcher_by_itself_refuses_them_too(self):
        fetcher = claude_gateway.ImageFetcher(Config())
        for host in self.PRIVATE_HOSTS:
            with self.subTest(host=host), self.assertRaises(claude_gateway.InvalidRequest):
                fetcher.fetch("http://%s/a.png" % host, claude_gateway.Client())

    def test_other_schemes_and_broken_addresses_are_refused(self):
        for url in ("file:///etc/passwd", "ftp://example.org/a.png", "gopher://example.org/", "javascript:alert(1)",
                    "http://", "https://", "https:///a.png", "http:a.png", "https://[::1/a.png", "https://[x]/a.png",
                    "https://exa mple.org/", "https://example.org\\@127.0.0.1/", "//example.org/a.png",
                    "https://example.org/\r\nHost: x", "blob:https://example.org/1"):
            with self.subTest(url=url):
                answer = self.look(url)
                self.assertEqual(answer.status, 400, answer.raw)
                self.assertIn("image", answer.error["message"])
        self.assertEqual(self.claude.messages, [])

    def test_a_name_with_one_private_address_is_refused_whatever_its_others_are(self):
        names_that_resolve(self, {"mixed.example.org": ["8.8.8.8", "10.0.0.1"], "inside.example.org": ["192.168.1.5"],
                                  "mapped.example.org": ["::ffff:127.0.0.1"], "nat.example.org": ["64:ff9b::7f00:1"]})
        for name in ("mixed", "inside", "mapped", "nat"):
            with self.subTest(name=name):
                answer = self.look("http://%s.example.org/a.png" % name)
                self.assertEqual((answer.status, answer.error["code"]), (400, "invalid_image_url"))
                self.assertIn("private network", answer.error["message"])

    def test_the_connection_goes_to_the_address_that_was_checked(self):
        server = self.serve(a_png=(200, {}, base64.b64decode(PIXEL)))
        asked = []
        real = socket.getaddrinfo

        def once(host, port, *more, **options):
            if host == "pictures.example.org":
                asked.append(host)
                # a second question would be answered otherwise, as a rebinding attacker does
                return real("127.0.0.1" if len(asked) == 1 else "127.0.0.3", port, type=socket.SOCK_STREAM)
            return real(host, port, *more, **options)

        socket.getaddrinfo = once                   # `serve` puts the real one back
        self.assertEqual(self.look(server.name + "/a.png").status, 200)
        self.assertEqual((len(asked), server.seen[0][1]["host"]), (1, server.name[len("http://"):]))

    def test_an_unreachable_server_is_400_that_names_the_url(self):
        server = self.serve()
        server.server.server_close()
        answer = self.look(server.name + "/a.png")
        self.assertEqual((answer.status, answer.error["code"]), (400, "invalid_image_url"))
        self.assertIn(server.name + "/a.png", answer.error["message"])

    def test_where_only_a_proxy_leads_out_the_400_says_so(self):
        names_that_resolve(self, {"closed.example.org": ["127.0.0.1"]})
        fetcher = claude_gateway.ImageFetcher(Config(https_proxy="http://proxy.example.org:3128"), lambda address: True)
        with self.assertRaisesRegex(claude_gateway.InvalidRequest, "proxy"):
            fetcher.fetch("http://closed.example.org:1/a.png", claude_gateway.Client())


# ---- Exchange ----------------------------------------------------------------------------------------

class LessonTests(RequestTestCase):
    """A 400 teaches something about a model, if what it taught then works."""

    def setUp(self):
        super().setUp()
        self.start()                                # lessons outlive a request, not a gateway

    def is_free(self, request: dict) -> bool:
        return self.chosen(request) is None

    def refuse(self, words: str) -> None:
        self.claude.play(refusal_of_claude(400, "invalid_request_error", words))

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
                self.refuse(words)
                self.assertEqual(self.chat(model=model, **fields).status, 200)
                self.assertFalse(gone(self.claude.messages[-2].body))
                self.assertTrue(gone(self.claude.messages[-1].body))
                self.assertTrue(gone(self.sent(model=model, **fields)), "not remembered")

    def test_a_lower_output_limit_is_learnt(self):
        self.refuse("max_tokens: 128000 > 96000, which is the maximum allowed number of output tokens for x")
        self.chat(model="claude-opus-5-5")
        self.assertEqual(self.sent(model="claude-opus-5-5")["max_tokens"], 96_000)

    def test_a_lesson_about_one_model_is_none_about_another(self):
        self.refuse("`temperature` is deprecated for this model.")
        self.chat(model="claude-sonnet-4-6", temperature=0.3)
        self.assertEqual(self.sent(model="claude-opus-4-6", temperature=0.3)["temperature"], 0.3)

    def test_thinking_is_learnt_in_both_directions(self):
        self.claude.strict = False                  # its models are as documented; these have changed their mind
        for model, words, before, after in (
            ("claude-opus-4-6", "adaptive thinking is not supported on this model", "adaptive", "enabled"),
            ("claude-haiku-4-5", '"thinking.type.enabled" is not supported for this model. Use '
             '"thinking.type.adaptive" and "output_config.effort" to control thinking behavior.',
             "enabled", "adaptive"),
        ):
            with self.subTest(model=model):
                self.refuse(words)
                self.assertEqual(self.chat(model=model, reasoning_effort="high").status, 200)
                self.assertEqual([sent.body["thinking"]["type"] for sent in self.claude.messages[-2:]], [before, after])
                count = len(self.claude.messages)
                self.assertEqual(self.sent(model=model, reasoning_effort="high")["thinking"]["type"], after)
                self.assertEqual(len(self.claude.messages), count + 1)

    def test_a_lesson_that_did_not_help_is_forgotten(self):
        first = refusal_of_claude(400, "invalid_request_error", "`temperature` is deprecated for this model.")
        for second in (first, refusal_of_claude(400, "invalid_request_error", "something else is wrong"),
                       refusal_of_claude(529, "overloaded_error", "x"), FakeReply(None)):
            with self.subTest(second=second):
                self.claude.play(first)
                self.claude.play(second, *([second] if second.status is None else []))
                self.assertGreaterEqual(self.chat(model="claude-opus-4-6", temperature=0.3).status, 400)
                self.assertEqual(self.sent(model="claude-opus-4-6", temperature=0.3)["temperature"], 0.3)

    def test_a_lesson_is_logged_once(self):
        self.refuse("`temperature` is deprecated for this model.")
        with self.assertLogs("claude_gateway", "WARNING") as logged:
            for _ in range(3):
                self.chat(model="claude-sonnet-4-6", temperature=0.3)
        self.assertEqual(len([line for line in logged.output if "learnt about claude-sonnet-4-6" in line]), 1)
        self.assertEqual(len(self.claude.messages), 4)

    def test_what_a_lesson_takes_away_is_reported(self):
        self.refuse("`temperature` is deprecated for this model.")
        for _ in range(2):
            answer = self.chat(model="claude-sonnet-4-6", temperature=0.3)
            self.assertIn("temperature", answer.headers["x-claude-gateway-changes"])

    def test_words_that_are_not_about_the_request_teach_nothing(self):
        for words, fields in (
            ("tools.0.custom.input_schema.properties.speed: this type is not supported", {"speed": "fast"}),
            ("messages.0: the speed of light is not supported.", {"speed": "fast"}),
            ("`speed` is not supported for this model.", {}),
            ("`temperature` is deprecated for this model.", {}),
            ("This model does not support the effort parameter.", {}),
            ("role 'system' is not supported on this model", {}),
            ("messages.0.content.0.image.source: could not process image", {"temperature": 0.3}),
            ("max_tokens: 200000 > 64000, which is the maximum", {"max_tokens": 2_000}),
        ):
            with self.subTest(words=words):
                self.claude.reset()
                self.refuse(words)
                answer = self.chat(model="claude-opus-4-6", tools=[{"type": "function", "function": {"name": "f"}}],
                                   **fields)
                self.assertEqual((answer.status, len(self.claude.messages)), (400, 1))
                self.assertIn(words, answer.error["message"])
        sent = self.sent(model="claude-opus-4-6", speed="fast", temperature=0.3)
        self.assertEqual((sent["speed"], sent["temperature"], sent["max_tokens"]), ("fast", 0.3, 128_000))

    def test_a_model_without_a_fast_mode_is_learnt_about(self):
        for model, words in (("claude-opus-4-6", "`speed` is not supported for this model."),
                             ("claude-opus-4-7", "This model does not support the `speed` parameter."),
                             ("claude-opus-4-8", "speed: Fast mode is not available"),
                             ("claude-opus-5", "Fast mode is not available for this model")):
            with self.subTest(words=words):
                self.refuse(words)
                answer = self.chat(model=model, speed="fast")
                self.assertEqual((answer.status, answer.headers["x-claude-gateway-changes"]), (200, "dropped=speed"))
                self.assertNotIn("speed", self.sent(model=model, speed="fast"))

    def test_the_same_words_under_another_status_teach_nothing(self):
        self.claude.play(refusal_of_claude(403, "permission_error", "`temperature` is deprecated for this model."))
        self.assertEqual(self.chat(model="claude-sonnet-4-6", temperature=0.3).status, 403)
        self.assertEqual(self.sent(model="claude-sonnet-4-6", temperature=0.3)["temperature"], 0.3)


class RefusedSchemaTests(RequestTestCase):
    """Schemas that Claude cannot compile: once without, reported, and nothing is learnt of it."""
    WORDS = ("The compiled grammar is too large, which would cause performance issues. Simplify your tool schemas.",
             "tools.0.custom: Schema is too complex for compilation. (31 optional parameters)",
             "Too many strict tools: 21", "tools: At most 20 tools can be strict.", "too many unions in the schemas")
    STRICT = {"tools": [a_tool("f", POINT, strict=True)]}
    FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": POINT}}}

    def after(self, *refusals: str, **fields) -> tuple:
        """Whether tools are strict and a format is enforced in each request that is sent, and the last answer."""
        self.claude.reset()
        self.claude.play(*[refusal_of_claude(400, "invalid_request_error", words) for words in refusals])
        answer = self.chat(**fields)
        return [(bool(sent.body.get("tools", [{}])[0].get("strict")), "format" in sent.body.get("output_config", {}))
                for sent in self.claude.messages], answer

    def test_strict_tools_go_without_and_a_format_in_words(self):
        for words in self.WORDS:
            for fields, sent, header in (
                (self.STRICT, [(True, False), (False, False)], "dropped=tools[0].function.strict"),
                (self.FORMAT, [(False, True), (False, False)], "changed=response_format"),
                (dict(self.STRICT, tool_choice="required"), [(True, True), (False, True)],
                 "dropped=tools[0].function.strict; changed=tool_choice"),
            ):
                for stream in (False, True):
                    with self.subTest(words=words, fields=list(fields), stream=stream):
                        found, answer = self.after(words, stream=stream, **fields)
                        self.assertEqual((answer.status, found), (200, sent))
                        self.assertEqual(answer.headers["x-claude-gateway-changes"], header)

    def test_both_where_the_first_does_not_help_and_then_no_more(self):
        both = dict(self.STRICT, **self.FORMAT)
        self.assertEqual(self.after(self.WORDS[0], **both)[0], [(True, True), (False, True)])
        self.assertEqual(self.after(*self.WORDS[:2], **both)[0], [(True, True), (False, True), (False, False)])
        found, answer = self.after(*self.WORDS[:3], **both)
        self.assertEqual((answer.status, len(found)), (400, 3))

    def test_the_answer_in_words_is_cut_out_and_the_next_request_tries_again(self):
        self.claude.play(refusal_of_claude(400, "invalid_request_error", self.WORDS[0]),
                         message(text('Here: ```{"x": 1}```')))
        self.assertEqual(self.chat(**self.FORMAT).message["content"], '{"x": 1}')
        self.assertEqual(self.after(**self.FORMAT)[0], [(False, True)])

    def test_where_there_is_nothing_to_leave_out_the_refusal_is_handed_on(self):
        found, answer = self.after(self.WORDS[0], tools=[a_tool("f", POINT)])
        self.assertEqual((answer.status, len(found)), (400, 1))
class FallbackTests(ResponsesTestCase):
    """--fallback lets other models answer what the requested one refuses."""
    config = {"fallback": ("sonnet", "claude-opus-4-8", "opus")}
    HOP = {"type": "fallback", "from": {"model": "claude-opus-5-5"}, "to": {"model": "claude-opus-4-8"}}

    def test_the_models_go_along_with_the_beta_header(self):
        for model, fallbacks in (("opus", ["claude-sonnet-5-5", "claude-opus-4-8"]),
                                 ("sonnet", ["claude-opus-4-8", "claude-opus-5-5"])):
            self.assertEqual(self.sent_by(model), [{"model": each} for each in fallbacks])
        self.start(fallback=("default",))
        self.assertEqual(self.sent_by("opus"), "default")
        self.assertIn("server-side-fallback-2026-07-01", self.claude.messages[-1].headers["anthropic-beta"])
        self.start(fallback=("opus",))
        self.assertIsNone(self.sent_by("opus"))

    def sent_by(self, model: str):
        self.assertEqual(self.chat(model=model).status, 200)
        return self.claude.messages[-1].body.get("fallbacks")

    def test_without_the_option_nothing_is_sent(self):
        self.start(fallback=())
        self.assertIsNone(self.sent_by("opus"))
        self.assertNotIn("anthropic-beta", self.claude.messages[-1].headers)

    def test_the_model_that_answered_is_reported(self):
        self.start(**self.config)
        answers = [message(self.HOP, text("Hi"), model="claude-opus-5-5"), message(text("Hi"), model="claude-opus-4-8")]
        for hop in answers:
            for stream in (False, True):
                with self.subTest(hop=hop, stream=stream):
                    self.claude.play(hop, hop)
                    with self.assertLogs("claude_gateway", "INFO") as logged:
                        chat = self.chat(model="opus", stream=stream)
                        response = self.respond(stream=stream)
                        self.service.gateway.running.wait_until_idle(30)    # it is told just after the answer
                    last = response.chunks[-1]["response"] if stream else response.json
                    chat_model = chat.chunks[-1]["model"] if stream else chat.json["model"]
                    self.assertEqual((chat_model, last["model"]), ("claude-opus-4-8",) * 2)
                    self.assertEqual({chunk["model"] for chunk in chat.chunks if chunk["choices"][0]["delta"].get(
                        "content")} if stream else {chat_model}, {"claude-opus-4-8"})
                    self.assertIn("answered by claude-opus-4-8", "".join(logged.output))
                    if not stream:
                        self.assertEqual(chat.headers["x-claude-gateway-changes"], "changed=model")
        self.assertEqual(set(self.service.gateway.counters.totals()["models"]), {"claude-opus-4-8"})

    def test_a_model_without_support_answers_as_without_and_that_is_learnt(self):
        for words in ("fallbacks: Extra inputs are not permitted", "This model does not support fallbacks."):
            self.start(fallback=("opus",))
            self.claude.play(refusal_of_claude(400, "invalid_request_error", words))
            self.assertIsNone(self.sent_by("sonnet"))
            count = len(self.claude.messages)
            self.assertIsNone(self.sent_by("sonnet"))
            self.assertEqual(len(self.claude.messages), count + 1)

    def test_an_answer_of_two_models_is_not_replayed(self):
        tools = [a_tool("f")]
        self.claude.play(message(thinking("no", "c2ln"), self.HOP, tool_use("toolu_1", "f", {}),
                                 model="claude-opus-5-5"))
        self.chat(model="opus", tools=tools)
        self.chat(model="opus", tools=tools, messages=[ASKED, calls(a_call("toolu_1", arguments="{}")),
                                                       result("toolu_1")])
        self.assertEqual(bare(self.claude.messages[-1].body)["messages"][1]["content"],
                         [tool_use("toolu_1", "f", {})])


class ThinkingReplayTests(GatewayTestCase):
    """Signed thinking goes back inside a tool loop as it came, or not at all."""
    LOOP_TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    UNBOUND = ("messages.1.content.0: Invalid `signature` in `thinking` block. The block is bound to a different "
               "conversation.")

    def turn(self, *blocks: dict, history=None, headers=None, stream: bool = False, **fields) -> list:
        """One answer of Claude's; the history with it, and with results for its calls, as a client would hold it."""
        history = history or [{"role": "user", "content": "Hello %s" % self.id()}]
        self.claude.play(message(*blocks))
        answer = self.chat(messages=history, tools=self.LOOP_TOOLS, headers=headers, stream=stream, **fields)
        self.assertEqual(answer.status, 200, answer.raw)
        reply = completion_from_chunks(answer.chunks)["message"] if stream else answer.message
        return history + [reply] + [{"role": "tool", "tool_call_id": call["id"], "content": "ok"}
                                    for call in reply.get("tool_calls", ())]

    def replayed(self, history: list, headers=None, **fields) -> list:
        """The assistant's turns of the request that this history becomes."""
        answer = self.chat(messages=history, tools=self.LOOP_TOOLS, headers=headers, **fields)
        self.assertEqual(answer.status, 200, answer.raw)
        return [bare(turn["content"]) for turn in self.claude.messages[-1].body["messages"]
                if turn["role"] == "assistant"]

    def test_blocks_go_back_to_the_byte(self):
        for name, blocks in (
            ("plain", [thinking("hm", "c2ln"), tool_use("toolu_a", "f", {"a": 1})]),
            ("hidden", [thinking("", "c2ln"), text("I look."), tool_use("toolu_b", "f", {})]),
            ("redacted", [{"type": "redacted_thinking", "data": "ZGF0"}, tool_use("toolu_c", "f", {})]),
            ("odd", [thinking(ODD_TEXT, "c2ln"), tool_use("toolu_d", "f", {"k": ODD_TEXT})]),
            ("interleaved", [thinking("a", "c2ln"), tool_use("toolu_e", "f", {}), thinking("b", "c2l2"),
                             tool_use("toolu_f", "g", {"b": [1.5, None, True]})]),
            ("several", [thinking("a", "c2ln"), thinking("b", "c2l2"), text("x"), tool_use("toolu_g", "f", {})]),
        ):
            for stream in (False, True):
                with self.subTest(name, stream=stream):
                    self.assertEqual(self.replayed(self.turn(*blocks, stream=stream)), [blocks])

    def test_every_turn_of_a_loop_keeps_its_own(self):
        history, wanted = None, []
        for number in range(3):
            blocks = [thinking("t%d" % number, "c2ln"), tool_use("toolu_t%d" % number, "f", {"n": number})]
            history = self.turn(*blocks, history=history)
            wanted.append(blocks)
        self.assertEqual(self.replayed(history), wanted)

    def test_what_clients_do_to_a_turn_on_its_way_back_does_not_matter(self):
        blocks = [thinking("hm", "c2ln"), text("I look."), tool_use("toolu_1", "f", {"a": 1, "b": "\u00e9"})]
        for name, change in (
            ("spaces in arguments", lambda reply: reply["tool_calls"][0]["function"].update(
                arguments='{ "b":"\\u00e9",\n"a": 1 }')),
            ("parts", lambda reply: reply.update(content=[{"type": "text", "text": "I look."}])),
            ("no reasoning", lambda reply: reply.pop("reasoning_content")),
            ("other reasoning", lambda reply: reply.update(reasoning_content="something else")),
            ("what SDKs add", lambda reply: reply.update(audio=None, function_call=None, annotations=[], name="x")),
            ("an index", lambda reply: reply["tool_calls"][0].update(index=0)),
            ("space around", lambda reply: reply.update(content="I look. ")),
        ):
            with self.subTest(name):
                history = self.turn(*blocks)
                change(history[1])
                self.assertEqual(self.replayed(history), [blocks])

    def test_an_edited_turn_goes_without_and_stays_as_edited(self):
        blocks = [thinking("hm", "c2ln"), text("I look."), tool_use("toolu_1", "f", {"a": 1})]
        for name, change, wanted in (
            ("text", lambda reply: reply.update(content="I saw."), [text("I saw."), blocks[2]]),
            ("no text", lambda reply: reply.update(content=None), [blocks[2]]),
            ("arguments", lambda reply: reply["tool_calls"][0]["function"].update(arguments='{"a": 2}'),
             [blocks[1], tool_use("toolu_1", "f", {"a": 2})]),
            ("name", lambda reply: reply["tool_calls"][0]["function"].update(name="g"),
             [blocks[1], tool_use("toolu_1", "g", {"a": 1})]),
        ):
            with self.subTest(name):
                history = self.turn(*blocks)
                change(history[1])
                self.assertEqual(self.replayed(history), [wanted])

    def test_a_cold_start_goes_without_on_every_generation(self):
        history = self.turn(thinking("hm", "c2ln"), tool_use("toolu_1", "f", {}))
        for model in ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-opus-4-8",
                      "claude-sonnet-4-6", "claude-haiku-4-5"):
            with self.subTest(model=model):
                self.start()
                self.assertEqual(self.replayed(history, model=model, reasoning_effort="high"),
                                 [[tool_use("toolu_1", "f", {})]])

    def test_clients_with_different_keys_share_no_memory(self):
        self.start(api_key=("key-one", "key-two"))
        blocks = [thinking("hm", "c2ln"), tool_use("toolu_1", "f", {})]
        history = self.turn(*blocks, headers={"authorization": "Bearer key-one"})
        self.assertEqual(self.replayed(history, headers={"api-key": "key-two"}), [blocks[1:]])
        self.assertEqual(self.replayed(history, headers={"x-api-key": "key-one"}), [blocks])

    def test_an_unsigned_text_never_becomes_thinking(self):
        call = {"id": "toolu_x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        for extra in ({"reasoning_content": "hm"}, {"reasoning": "hm"}, {"thinking_blocks": [
                {"type": "thinking", "thinking": "hm"}]}, {"reasoning_details": [{"type": "reasoning.text",
                                                                                  "text": "hm"}]},
                      {"thinking_blocks": [thinking("hm", "")]}, {"thinking_blocks": "x", "reasoning_details": {}}):
            with self.subTest(extra=extra):
                turn = dict({"role": "assistant", "content": None, "tool_calls": [call]}, **extra)
                self.assertEqual(self.replayed([{"role": "user", "content": "Hi"}, turn, {
                    "role": "tool", "tool_call_id": "toolu_x", "content": "ok"}]), [[tool_use("toolu_x", "f", {})]])

    def test_blocks_that_the_client_kept_win_over_the_memory(self):
        history = self.turn(thinking("hm", "c2ln"), tool_use("toolu_1", "f", {}))
        for extra, blocks in (
            ({"thinking_blocks": [thinking("own", "b3du")]}, [thinking("own", "b3du")]),
            ({"reasoning_details": [{"type": "reasoning.text", "text": "own", "signature": "b3du", "index": 0},
                                    {"type": "reasoning.encrypted", "data": "ZGF0", "index": 1}]},
             [thinking("own", "b3du"), {"type": "redacted_thinking", "data": "ZGF0"}]),
        ):
            kept = [history[0], dict(history[1], **extra), history[2]]
            self.assertEqual(self.replayed(kept), [blocks + [tool_use("toolu_1", "f", {})]])

    def test_a_conversation_whose_blocks_do_not_hold_goes_on_without_for_ever(self):
        self.start()
        for stream in (False, True):
            with self.subTest(stream=stream):
                self.start()
                first = [{"role": "user", "content": "Begin %s" % stream}]
                history = self.turn(thinking("hm", "c2ln"), tool_use("toolu_1", "f", {}), history=first)
                self.claude.play(refusal_of_claude(400, "invalid_request_error", self.UNBOUND))
                count = len(self.claude.messages)
                self.assertEqual(self.replayed(history, stream=stream), [[tool_use("toolu_1", "f", {})]])
                self.assertEqual(len(self.claude.messages), count + 2, "one retry")
                history = self.turn(thinking("more", "c2l2"), tool_use("toolu_2", "g", {}), history=history)
                count = len(self.claude.messages)
                self.assertEqual(self.replayed(history), [[tool_use("toolu_1", "f", {})], [
                    thinking("more", "c2l2"), tool_use("toolu_2", "g", {})]])
                self.assertEqual(len(self.claude.messages), count + 1, "the refused block is not tried again")

    def test_thinking_that_was_refused_is_reported_also_where_strict(self):
        for strict in (False, True):
            for stream in (False, True):
                with self.subTest(strict=strict, stream=stream):
                    self.start(strict=strict)
                    history = self.turn(thinking("hm", "c2ln"), tool_use("toolu_1", "f", {}))
                    self.claude.play(refusal_of_claude(400, "invalid_request_error", self.UNBOUND))
                    answer = self.chat(messages=history, tools=[a_tool("f")], stream=stream)
                    self.assertEqual((answer.status, answer.headers["x-claude-gateway-changes"]),
                                     (200, "dropped=thinking"))

    def test_only_the_blocks_that_were_refused_are_left_out(self):
        # many tools open every session with the same words; a block is known by its signature and its calls
        self.start()
        opening = [{"role": "user", "content": "The folder is /home/me."}]
        for words in (self.UNBOUND, "messages.1.content.0: Invalid `data` in `redacted_thinking` block"):
            refused = [{"type": "redacted_thinking", "data": words[-9:]}, tool_use("toolu_1", "f", {})]
            self.claude.play(refusal_of_claude(400, "invalid_request_error", words))
            history = opening + [{"role": "assistant", "content": refused}, user([{
                "type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"}])]
            with self.subTest(words):
                self.assertEqual(self.replayed(history), [[tool_use("toolu_1", "f", {})]])
                for blocks in ([thinking("hm", "c2l2"), tool_use("toolu_1", "f", {})],
                               [refused[0], tool_use("toolu_2", "f", {})]):
                    self.assertEqual(self.replayed(self.turn(*blocks, history=opening)), [blocks])

    def test_a_request_that_leaves_out_its_tools_gets_those_of_its_conversation(self):
        self.start()
        tools = [a_tool("g", POINT), a_tool("f", {"type": "object", "properties": {"$a": {"type": "string"}}})]
        self.claude.play(message(thinking("hm", "c2ln"), tool_use("toolu_1", "f", {"_a": "x"})))
        first = self.chat(tools=tools, messages=[ASKED])
        self.assertEqual(json.loads(first.message["tool_calls"][0]["function"]["arguments"]), {"$a": "x"})
        sent = bare(self.claude.messages[-1].body)
        self.chat(messages=[ASKED, first.message, result("toolu_1")])
        again = bare(self.claude.messages[-1].body)
        self.assertEqual((again["tools"], again["tool_choice"]), (sent["tools"], {"type": "none"}))
        self.start()
        self.chat(messages=[ASKED, first.message, result("toolu_1")])
        self.assertEqual(bare(self.claude.messages[-1].body)["tools"], [{"name": "f", "input_schema": NO_PARAMETERS}])
        # a reflection upon the results, without tools, amid turns with them: nothing of the prefix changes
        blocks = [thinking("hm", "c2ln"), tool_use("toolu_2", "f", {})]
        history = self.turn(*blocks)
        self.chat(messages=history)
        reflection = bare(self.claude.messages[-1].body)
        self.assertEqual(self.replayed(history), [blocks])
        again = bare(self.claude.messages[-1].body)
        self.assertEqual([reflection[name] for name in ("tools", "messages")], [again["tools"], again["messages"]])

    def test_pieces_of_one_kept_block_are_joined_and_those_of_other_providers_stay_behind(self):
        anthropic = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0}
        history = self.turn(thinking("hm", "c2ln"), tool_use("toolu_1", "f", {}))
        for details, kept in (
            ([dict(anthropic, text="a"), dict(anthropic, text="b"), dict(anthropic, signature="b3du")],
             [thinking("ab", "b3du")]),
            ([dict(anthropic, text="a", signature="eA=="), dict(anthropic, index=1, text="b", signature="eQ==")],
             [thinking("a", "eA=="), thinking("b", "eQ==")]),
            ([{"type": "reasoning.encrypted", "format": "openai-responses-v1", "data": "gAAAAABo", "index": 0},
              dict(anthropic, index=1, text="b", signature="eQ==")], [thinking("b", "eQ==")]),
            ([{"type": "reasoning.encrypted", "format": "google-gemini-v1", "data": "CiQ"}], [thinking("hm", "c2ln")]),
            ([{"type": "reasoning.encrypted", "format": "unknown", "data": "ZGF0"}],
             [{"type": "redacted_thinking", "data": "ZGF0"}]),
        ):
            with self.subTest(details=details):
                turns = [history[0], dict(history[1], reasoning_details=details), history[2]]
                with self.assertLogs("claude_gateway", "DEBUG") as logged:
                    self.assertEqual(self.replayed(turns), [kept + [tool_use("toolu_1", "f", {})]])
                self.assertEqual("without effect on the answer: messages[1].reasoning_details" in "\n".join(
                    logged.output), kept == [thinking("hm", "c2ln")])

    def test_blocks_that_the_client_kept_are_left_out_too_once_they_did_not_hold(self):
        for model in ("claude-opus-5-5", "claude-haiku-4-5"):   # one decides by itself, one insists on its block
            with self.subTest(model=model):
                self.start()
                turn = {"role": "assistant", "content": None, "thinking_blocks": [thinking("own", "b3du")],
                        "tool_calls": [{"id": "toolu_1", "type": "function", "function": {"name": "f",
                                                                                          "arguments": "{}"}}]}
                history = [{"role": "user", "content": "Hello"}, turn, {"role": "tool", "tool_call_id": "toolu_1",
                                                                        "content": "ok"}]
                self.claude.play(refusal_of_claude(400, "invalid_request_error", "messages.1.content.0: Invalid "
                                                   "`signature` in `thinking` block"))
                self.assertEqual(self.replayed(history, model=model, reasoning_effort="high"),
                                 [[tool_use("toolu_1", "f", {})]])
                self.assertEqual(len(self.claude.messages), 2)
                self.claude.reset()

    def test_every_wording_about_the_blocks_leads_to_one_retry(self):
        for words in ("messages.1.content.0: Invalid `signature` in `thinking` block",
                      "`thinking` or `redacted_thinking` blocks in the latest assistant message cannot be modified.",
                      "messages.1.content.0.thinking: each thinking block must contain thinking"):
            with self.subTest(words=words):
                self.start()
                history = self.turn(thinking("hm", "c2ln"), tool_use("toolu_1", "f", {}))
                self.claude.play(*[refusal_of_claude(400, "invalid_request_error", words)] * 2)
                count = len(self.claude.messages)
                answer = self.chat(messages=history, tools=self.LOOP_TOOLS)
                self.assertEqual((answer.status, len(self.claude.messages)), (400, count + 2))
                self.claude.reset()

    def test_without_blocks_such_a_refusal_is_handed_on(self):
        self.start()
        self.claude.play(refusal_of_claude(400, "invalid_request_error", self.UNBOUND))
        answer = self.chat()
        self.assertEqual((answer.status, len(self.claude.messages)), (400, 1))

    def test_an_answer_without_thinking_needs_no_memory(self):
        blocks = [text("I look."), tool_use("toolu_1", "f", {})]
        self.assertEqual(self.replayed(self.turn(*blocks)), [blocks])


class PausedAnswerTests(GatewayTestCase):
    """pause_turn: Claude is sent its own words and goes on, which no OpenAI client could do."""

    def paused(self, *blocks: dict, **fields) -> dict:
        return message(*blocks, WEB_FIND, WEB_FOUND, stop_reason="pause_turn", **fields)

    def both_kinds(self, *answers):
        """Each kind of client asks once; gives its parts."""
        for stream in (False, True):
            with self.subTest(stream=stream):
                self.claude.reset()
                self.claude.play(*answers)
                answer = self.chat(stream=stream, web_search_options={}, stream_options={"include_usage": True})
                self.assertEqual(answer.status, 200, answer.raw)
                yield completion_from_chunks(answer.chunks) if stream else completion_parts(answer.json)

    def test_texts_counts_and_places_go_on_where_they_were(self):
        usage = {"cache_read_input_tokens": 100, "output_tokens": 5, "output_tokens_details": {"thinking_tokens": 2}}
        second = message(thinking("b", "c2l2"), cited_text("Blue.", web_citation("https://a.example")), usage=usage)
        for parts in self.both_kinds(self.paused(thinking("a", "c2ln"), text("I look. "), usage=usage), second):
            self.assertEqual(parts["message"], {
                "role": "assistant", "content": "I look. Blue.", "reasoning_content": "ab",
                "annotations": [url_note(8, 13, "https://a.example")]})
            self.assertEqual(parts["finish_reason"], "stop")
            self.assertEqual((parts["usage"]["prompt_tokens"], parts["usage"]["completion_tokens"],
                              parts["usage"]["total_tokens"]), (224, 10, 234))
            self.assertEqual((parts["usage"]["prompt_tokens_details"]["cached_tokens"],
                              parts["usage"]["completion_tokens_details"]["reasoning_tokens"]), (200, 4))

    def test_claude_gets_its_words_back_unchanged_and_the_rest_of_the_request_too(self):
        blocks = [thinking("", "c2ln"), text("I look. ")]
        for _ in self.both_kinds(self.paused(*blocks), message(text("Blue."))):
            first, second = [request.body for request in self.claude.messages]
            self.assertEqual(second["messages"][:-1], first["messages"])
            self.assertEqual(second["messages"][-1], {"role": "assistant", "content": blocks + [WEB_FIND, WEB_FOUND]})
            for name in set(first) - {"messages"}:
                self.assertEqual(second[name], first[name])
            self.assertEqual(set(first), set(second))

    def test_two_pauses_make_one_answer(self):
        again = dict(WEB_FIND, id="srvtoolu_2"), dict(WEB_FOUND, tool_use_id="srvtoolu_2")
        for parts in self.both_kinds(self.paused(text("A")), message(text("B"), *again, stop_reason="pause_turn"),
                                     message(text("C"), tool_use("toolu_1", "f", {}))):
            self.assertEqual((parts["message"]["content"], parts["finish_reason"]), ("ABC", "tool_calls"))
            self.assertEqual(parts["usage"]["total_tokens"], 57)
            last = self.claude.messages[2].body["messages"]
            self.assertEqual([turn["role"] for turn in last], ["user", "assistant"])
            self.assertEqual([block["type"] for block in last[1]["content"]],
                             ["text", "server_tool_use", "web_search_tool_result"] * 2)

    def test_an_empty_text_is_not_sent_back(self):
        # Claude may open a text block and say nothing in it, but takes no such block back
        for empty in ("", "\n\n"):
            for parts in self.both_kinds(self.paused(text(empty), text("A")), message(text("B"))):
                self.assertEqual(parts["message"]["content"], empty + "AB")

    def test_the_stream_looks_like_one(self):
        self.claude.play(self.paused(text("A")), message(text("B"), id="msg_other"))
        chunks = self.chat(stream=True, web_search_options={}).chunks
        self.assertEqual(len({chunk["id"] for chunk in chunks}), 1)
        self.assertEqual(sum("role" in chunk["choices"][0]["delta"] for chunk in chunks), 1)
        self.assertEqual([chunk["choices"][0]["finish_reason"] for chunk in chunks if
                          chunk["choices"][0]["finish_reason"]], ["stop"])

    def test_a_refused_continuation_is_an_error(self):
        for stream in (False, True):
            with self.subTest(stream=stream):
                self.claude.play(self.paused(text("A")), refusal_of_claude(429, "rate_limit_error", "Slow down."))
                answer = self.chat(stream=stream, web_search_options={})
                error = json.loads(answer.events[-1])["error"] if stream else answer.error
                self.assertEqual((answer.status, error["code"]), (200 if stream else 429, "rate_limit_exceeded"))
                self.assertNotIn("[DONE]", answer.events)

    def test_nothing_is_retried_once_a_stream_has_begun(self):
        self.claude.play(self.paused(text("A")), FakeReply(529, body=error_body("overloaded_error", "x"),
                                                           headers={"retry-after": "0"}))
        answer = self.chat(stream=True, web_search_options={})
        self.assertEqual(len(self.claude.messages), 2)
        self.assertEqual(json.loads(answer.events[-1])["error"]["code"], "overloaded")

    def test_there_is_an_end_to_it_in_streams_too(self):
        self.claude.strict = False                  # the same search again and again is not what Claude would say
        self.claude.play(*[message(text("A"), WEB_FIND, stop_reason="pause_turn")] * 20)
        answer = self.chat(stream=True, web_search_options={})
        self.assertEqual((answer.events[-1], len(self.claude.messages)), ("[DONE]", 9))
        self.assertEqual(completion_from_chunks(answer.chunks)["finish_reason"], "stop")


class EventLoopPausedAnswerTests(InEventLoop, PausedAnswerTests):
    pass


class LeavingClientTests(HttpTestCase):
    """Nobody pays for words that nobody reads: a client that leaves ends the call upstream."""

    def setUp(self):
        super().setUp()
        self.held = threading.Event()
        self.addCleanup(self.held.set)

    def leave_after(self, *replies, wanted: bytes = b"", leave=socket.socket.close, **fields) -> None:
        """Sends a request, waits until Claude is at the last reply and `wanted` has come back, and leaves."""
        self.claude.reset()
        arrived = threading.Event()
        self.claude.play(*replies[:-1], lambda recorded: arrived.set() or replies[-1])
        connection = self.connect()
        connection.sendall(chat_bytes(body=json.dumps(dict(json.loads(CHAT_BODY), **fields)).encode()))
        self.assertTrue(arrived.wait(30))
        self.assertIn(wanted, received_until(connection, wanted))
        self.assertFalse(self.claude.closed.is_set())
        leave(connection)
        self.assertTrue(self.claude.wait_closed(30), "the call upstream goes on")
        self.assertEqual(len(self.claude.messages), len(replies))

    def test_at_any_moment(self):
        events = events_of(message(text("Hello there")), size=100)
        no_status = FakeReply(body=message(text("Hi")), hold=[self.held])
        no_token, midway = (FakeReply(pieces=[sse(events[:at]), self.held, sse(events[at:])]) for at in (1, 4))
        for moment, reply, wanted, stream in (
            ("before the status", no_status, b"", False), ("before the status of a stream", no_status, b"", True),
            ("before the first token", no_token, b"assistant", True), ("amid a stream", midway, b"Hello there", True),
            ("amid a plain request", midway, b"", False),
            ("before the first event", FakeReply(pieces=[self.held, sse(events)]), b"", False),
        ):
            for way, leave in (("closes", socket.socket.close),
                               ("half-closes", lambda connection: connection.shutdown(socket.SHUT_WR))):
                with self.subTest(moment, way=way):
                    self.leave_after(reply, wanted=wanted, leave=leave, stream=stream)

    def test_while_the_request_goes_out_to_an_upstream_that_does_not_read(self):
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        listener.settimeout(30)
        self.start(base_url="http://127.0.0.1:%d" % listener.getsockname()[1])
        self.service.gateway.models._first.set()        # the model list is of no interest here
        body = json.dumps({"model": "opus", "messages": [{"role": "user", "content": "x" * 20_000_000}]}).encode()
        connection = self.connect()
        connection.sendall(chat_bytes(body=body))
        while True:
            upstream = listener.accept()[0]
            self.addCleanup(upstream.close)
            upstream.settimeout(30)
            if upstream.recv(4).startswith(b"POST"):
                break
        connection.close()
        self.assertTrue(self.service.gateway.running.wait_until_idle(30), "the request goes on")

    def test_what_was_read_until_then_is_counted(self):
        self.start()
        events = events_of(message(text("Hello there"), usage={"input_tokens": 40, "output_tokens": 9}), size=100)
        self.leave_after(FakeReply(pieces=[sse(events[:4]), self.held]), wanted=b"Hello there", stream=True)
        self.service.gateway.running.wait_until_idle(30)
        self.assertEqual(self.service.gateway.counters.totals()["tokens"]["input"], 40)

    def test_before_the_head_of_its_answer_could_be_written(self):
        arrived = threading.Event()
        events = events_of(message(text("Hello there")))
        self.claude.play(lambda recorded: arrived.set() or FakeReply(
            hold=[self.held], pieces=[sse(events[:1]), threading.Event(), b""]))
        connection = self.connect()
        connection.sendall(chat_bytes(body=CHAT_BODY[:-1] + b',"stream":true}') + b"POST" * 100_000)
        self.assertTrue(arrived.wait(30))
        # with so much sent early it cannot be watched any more, so that only the writing tells
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        self.held.set()
        self.assertTrue(self.claude.wait_closed(30), "the call upstream goes on")

    def test_after_bytes_that_nobody_asked_for(self):
        for path in ("/v1/chat/completions", "/v1/messages"):
            for stream in (b"false", b"true"):
                with self.subTest(path=path, stream=stream):
                    self.claude.reset()
                    arrived = threading.Event()
                    self.claude.play(lambda recorded, arrived=arrived: arrived.set() or FakeReply(
                        body=message(text("Hi")), hold=[self.held]))
                    body = CHAT_BODY[:-1] + b',"max_tokens":9,"stream":%s}' % stream
                    connection = self.connect()
                    connection.sendall(request_bytes("POST %s HTTP/1.1" % path, "Host: localhost",
                                                     "Content-Length: %d" % len(body), body=body))
                    self.assertTrue(arrived.wait(30))
                    connection.sendall(b"\r\n")
                    connection.sendall(b"GET")
                    connection.close()
                    self.assertTrue(self.claude.wait_closed(30), "the call upstream goes on")

    def test_while_claude_goes_on_after_a_pause(self):
        self.leave_after(message(text("I look. "), WEB_FIND, WEB_FOUND, stop_reason="pause_turn"),
                         FakeReply(body=message(text("Hi")), hold=[self.held]), stream=True, web_search_options={})

    def test_others_go_on(self):
        start = sse(events_of(message(text("Hello there")))[:2])
        self.leave_after(FakeReply(pieces=[start, self.held]), wanted=b"assistant", stream=True)
        self.assertEqual(self.chat().status, 200)


class EventLoopLeavingClientTests(InEventLoop, LeavingClientTests):
    pass


# ---- Endpoints ---------------------------------------------------------------------------------------

class RouteTests(HttpTestCase):
    def test_every_route_answers_with_v1_without_it_and_doubled(self):
        for path in ("/models", "/v1/models", "/v1/v1/models", "//models", "//v1//models", "/v1/models/", "/models//",
                     "/v1/models?limit=5", "/v1/models/?beta=true&x=/health", "/v1/models#top"):
            with self.subTest(path=path):
                answer = self.exchanged(request_bytes("GET %s HTTP/1.1" % path, "Host: localhost",
                                                      "Connection: close"))[0]
                self.assertEqual((answer.status, answer.json["object"]), (200, "list"))
        for path in ("/chat/completions", "/v1/chat/completions", "/v1/v1/chat/completions", "//v1/chat//completions",
                     "/v1/chat/completions/", "/v1/chat/completions/chat/completions",
                     "/chat/completions?api-version=1"):
            with self.subTest(path=path):
                self.assertEqual(self.ask("POST", path, CHAT_BODY).json["object"], "chat.completion")

    def test_every_get_route_answers(self):
        for path, mark in (("/health", b'"status":"ok"'), ("/v1", b'"version"'), ("/", b'"version"'),
                           ("/v1/", b'"version"'), ("/metrics", b"# HELP"), ("/v1/metrics", b"# HELP"),
                           ("/v1/health", b'"status":"ok"'), ("/v1/models/claude-opus-5-5", b'"id":"claude-opus-5-5"')):
            with self.subTest(path=path):
                answer = self.ask("GET", path)
                self.assertEqual(answer.status, 200)
                self.assertIn(mark, answer.raw)

    def test_a_model_is_found_by_its_percent_encoded_name(self):
        answer = self.ask("GET", "/v1/models/anthropic%2Fclaude-opus-5-5")
        self.assertEqual((answer.status, answer.json["object"]), (200, "model"))

    def test_head_answers_like_get_without_the_body(self):
        for path in ("/health", "/v1/models", "/v1", "/metrics", "/v1/models/claude-opus-5-5", "/nowhere",
                     "/v1/responses/resp_unknown"):
            with self.subTest(path=path):
                head, get, after = self.exchanged(b"".join(
                    [request_bytes("HEAD %s HTTP/1.1" % path, "Host: localhost"),
                     request_bytes("GET %s HTTP/1.1" % path, "Host: localhost"), NEXT_REQUEST]), without_body=(0,))
                self.assertEqual((head.status, head.headers["content-type"]), (get.status, get.headers["content-type"]))
                if path not in ("/v1", "/metrics", "/nowhere"):     # those tell of the method, or count requests
                    self.assertEqual(head.headers["content-length"], get.headers["content-length"])
                self.assertEqual(after.status, 200)

    def test_what_claude_has_none_of_is_a_404_that_says_so(self):
        for path, words in (("/v1/embeddings", "no embeddings"), ("/v1/images/generations", "no images"),
                            ("/v1/audio/speech", "no audio"), ("/audio/transcriptions", "no audio"),
                            ("/v1/moderations", "no moderations"), ("/v1/images/edits?x=1", "no images")):
            with self.subTest(path=path):
                answer = self.ask("POST", path, {"model": "text-embedding-3-small", "input": "x"})
                self.assertEqual((answer.status, answer.error["code"]), (404, "unknown_url"))
                self.assertIn("Claude has " + words, answer.error["message"])
        self.assertNotIn("Claude has", self.ask("POST", "/v1/imagesque", {}).error["message"])

    def test_unknown_paths_are_404_in_the_envelope(self):
        for path in ("/nowhere", "/api/tags", "/v1/chat", "/v2/models", "/v1x/models", "/favicon.ico", "/../etc/passwd",
                     "/v1/models/", "/%00", "/v1/chat/completions/x"):
            with self.subTest(path=path):
                answer = self.ask("GET", path)
                if path == "/v1/models/":
                    self.assertEqual(answer.status, 200)
                    continue
                self.assertEqual((answer.status, answer.error["code"]), (404, "unknown_url"))
                self.assertIn("served are /chat/completions, /responses,", answer.error["message"])
                self.assert_envelope(answer)

    def test_a_wrong_method_is_405_with_allow(self):
        for method, path, allowed in (
                ("GET", "/v1/chat/completions", "POST, OPTIONS"), ("PUT", "/v1/responses", "POST, OPTIONS"),
                ("HEAD", "/v1/messages", "POST, OPTIONS"), ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
                ("DELETE", "/health", "GET, HEAD, OPTIONS"), ("BREW", "/health", "GET, HEAD, OPTIONS"),
                ("PATCH", "/v1/responses/resp_1", "GET, DELETE, HEAD, OPTIONS"), ("TRACE", "/", "GET, HEAD, OPTIONS"),
                ("GET", "/v1/responses/input_tokens", "POST, OPTIONS")):
            with self.subTest(method=method, path=path):
                answer = self.ask(method, path)
                self.assertEqual((answer.status, answer.headers["allow"]), (405, allowed))
                if method != "HEAD":
                    self.assert_envelope(answer)

    def test_a_websocket_upgrade_is_426(self):
        for path in ("/v1/responses", "/v1/realtime", "/"):
            with self.subTest(path=path):
                answer = self.ask("GET", path, headers={"Upgrade": "websocket", "Connection": "Upgrade",
                                                        "Sec-WebSocket-Key": "eA==", "Sec-WebSocket-Version": "13"})
                self.assertEqual((answer.status, answer.headers["upgrade"]), (426, "HTTP/1.1"))
                self.assert_envelope(answer)

    def test_options_is_answered_on_every_path_and_on_the_star(self):
        for target in ("/v1/chat/completions", "/nowhere", "*"):
            with self.subTest(target=target):
                answer, = self.exchanged(request_bytes("OPTIONS %s HTTP/1.1" % target, "Host: localhost",
                                                       "Connection: close"))
                self.assertEqual((answer.status, answer.raw), (204, b""))
                self.assertEqual(answer.headers["allow"], "GET, POST, DELETE, HEAD, OPTIONS")
                self.assertNotIn("content-length", answer.headers)

    def test_an_absolute_target_is_taken_like_its_path(self):
        for target in ("http://localhost:45554/health", "HTTP://127.0.0.1/v1/health?x=1", "http://localhost"):
            with self.subTest(target=target):
                answer, = self.exchanged(request_bytes("GET %s HTTP/1.1" % target, "Host: localhost",
                                                       "Connection: close"))
                self.assertEqual(answer.status, 200, answer.raw)

    def test_the_authority_of_an_absolute_target_wins_over_host(self):
        answer, = self.exchanged(request_bytes("GET http://evil.example/health HTTP/1.1", "Host: localhost",
                                               "Connection: close"))
        self.assertEqual((answer.status, answer.error["code"]), (403, "host_not_allowed"))
        answer, = self.exchanged(request_bytes("GET http://localhost/health HTTP/1.1", "Host: evil.example",
                                               "Connection: close"))
        self.assertEqual(answer.status, 200)

    def test_odd_targets_are_refused_and_never_a_defect(self):
        for target in ("http://[::1/health", "//[::1/health", "//[/v1/models", "http://user@localhost/health",
                       "http:///health", "http://localhost:port/health", "http://127.0.0.1\\@localhost/health",
                       "http://", "ftp://localhost\\/health", "//]/", "/v1/models/%ff%fe", "/v1/models/%0d%0aX-Evil:1",
                       "/" + "%5b" * 1000, "/v1/responses/[", "/v1/models/" + "a" * 20_000, "/" + "/v1" * 5_000):
            with self.subTest(target=target[:60]):
                answer, = self.exchanged(request_bytes("GET %s HTTP/1.1" % target, "Host: localhost",
                                                       "Connection: close"))
                self.assertIn(answer.status, (200, 400, 403, 404))
                self.assertNotIn("x-evil", answer.headers)
        self.assertEqual(self.ask("GET", "/health").status, 200)


class ModelListTests(GatewayTestCase):
    """GET /v1/models: Claude's list, kept for an hour; the built-in table where there is none."""

    @staticmethod
    def entry(model_id: str, **fields) -> dict:
        return dict({"id": model_id, "type": "model", "display_name": model_id.title(), "lifecycle": "active",
                     "created_at": "2026-09-22T00:00:00Z", "max_input_tokens": 500_000, "max_tokens": 64_000}, **fields)

    def lists(self) -> list:
        return [request for request in self.claude.requests if request.path.startswith("/v1/models")]

    def ids(self, headers=None) -> list:
        answer = self.ask("GET", "/v1/models", headers=headers)
        self.assertEqual((answer.status, answer.json["object"]), (200, "list"))
        return [entry["id"] for entry in answer.json["data"]]

    def test_it_is_fetched_once_and_kept(self):
        self.claude.models = [self.entry("claude-opus-7")]
        self.start()
        for _ in range(3):
            self.assertEqual(self.ids(), ["claude-opus-7", "opus"])
        self.assertEqual(self.chat(model="opus").status, 200)
        self.assertEqual(self.claude.messages[0].body["model"], "claude-opus-7")
        self.assertEqual(len(self.lists()), 1)
        self.assertEqual(self.lists()[0].headers["x-api-key"], SECRET)

    def test_all_its_pages_are_read(self):
        self.claude.models = [self.entry("claude-new-%d" % number) for number in range(1_001)]
        self.start()
        self.assertEqual(len([name for name in self.ids() if name.startswith("claude-new-")]), 1_001)
        self.assertEqual(len(self.lists()), 2)

    def test_an_entry_has_openais_keys(self):
        self.claude.models = [self.entry("claude-opus-7")]
        self.start()
        entry = self.ask("GET", "/v1/models").json["data"][0]
        self.assertEqual({name: entry[name] for name in ("id", "object", "created", "owned_by", "context_length",
                                                         "max_output_tokens", "display_name")},
                         {"id": "claude-opus-7", "object": "model", "created": 1790035200, "owned_by": "anthropic",
                          "context_length": 500_000, "max_output_tokens": 64_000, "display_name": "Claude-Opus-7"})
        self.assertEqual(self.ask("GET", "/v1/models/claude-opus-7").json, entry)

    def test_without_a_list_the_built_in_table_serves(self):
        for status, body in ((404, error_body("not_found_error", "Not found")), (500, b"<html>"), (200, b"{}"),
                             (200, {"data": "x"}), (200, {"data": []}), (200, {"data": [1, {}, {"id": 5}]}),
                             (200, {"data": [None, [], "claude-opus-7"], "has_more": True, "last_id": 5})):
            with self.subTest(status=status, body=body):
                route = ("GET", r"/v1/models", lambda fake, recorded, reply=FakeReply(status, body=body): reply)
                self.claude._ROUTES = (route,) + FakeClaude._ROUTES
                self.addCleanup(self.claude.__dict__.pop, "_ROUTES", None)
                self.start()
                ids = self.ids()
                self.assertTrue({"claude-opus-5-5", "claude-haiku-4-5-20251001", "opus", "sonnet"} <= set(ids))
                self.assertEqual(self.chat(model="sonnet").status, 200)

    def test_whatever_happens_to_the_fetch_it_is_one_line_of_the_log_and_the_table_serves(self):
        def fetch():
            raise TypeError("no such thing")
        models, torn = claude_gateway.ModelList(fetch, ()), []
        self.addCleanup(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = torn.append
        with self.assertLogs("claude_gateway", "WARNING") as logged:
            self.assertEqual(models.catalog().resolve("opus").id, "claude-opus-5-5")
            models.catalog()
            for thread in threading.enumerate():
                if thread.name == "models":
                    thread.join(30)
        self.assertEqual((torn, len(logged.output)), ([], 1))
        self.assertIn("TypeError: no such thing", logged.output[0])

    def test_a_callers_own_key_asks_for_its_own_list_each_time(self):
        self.claude.models = [self.entry("claude-opus-7")]
        self.start()
        self.ids()
        self.claude.models = [self.entry("claude-fable-9")]
        for _ in range(2):
            self.assertEqual(self.ids({"x-api-key": "sk-ant-api03-mine"}), ["claude-fable-9", "fable"])
        self.assertEqual(self.ids(), ["claude-opus-7", "opus"], "not shared")
        self.assertEqual([request.headers["x-api-key"] for request in self.lists()],
                         [SECRET, "sk-ant-api03-mine", "sk-ant-api03-mine"])
        self.assertEqual(self.ask("GET", "/v1/models/claude-fable-9",
                                  headers={"x-api-key": "sk-ant-api03-mine"}).json["id"], "claude-fable-9")

    def test_no_other_key_of_a_caller_goes_upstream(self):
        self.claude.models = [self.entry("claude-opus-7")]
        self.start()
        for headers in ({"x-api-key": "something"}, {"authorization": "Bearer sk-ant-api03-mine"},
                        {"api-key": "sk-ant-api03-mine"}):
            self.ids(headers)
        self.chat(headers={"x-api-key": "sk-ant-api03-mine"})
        self.assertEqual({request.headers["x-api-key"] for request in self.claude.requests}, {SECRET})

    def test_it_needs_no_key_of_the_gateway_and_health_neither(self):
        self.start(api_key=("the-key",))
        self.assertTrue(self.ids())
        self.assertEqual(self.ask("GET", "/v1/models/opus").status, 200)
        answer = self.ask("GET", "/health")
        self.assertEqual((answer.status, answer.json), (200, {"status": "ok", "version": claude_gateway.VERSION}))
        self.assertEqual(self.chat().status, 401)

    def test_an_unknown_one_is_404_with_the_nearest(self):
        answer = self.ask("GET", "/v1/models/claude-oqus-5-5")
        self.assertEqual((answer.status, answer.error["code"]), (404, "model_not_found"))
        self.assertIn("claude-opus-5-5", answer.error["message"])

    def test_an_alias_of_a_short_name_is_listed_once_and_means_what_it_says(self):
        self.start(alias=(("sonnet", "claude-sonnet-4-6"),))
        listed = [entry for entry in self.ask("GET", "/v1/models").json["data"] if entry["id"] == "sonnet"]
        self.assertEqual([entry["alias_of"] for entry in listed], ["claude-sonnet-4-6"])


# ---- Legacy completions ------------------------------------------------------------------------------

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
        for fields, param in (({"prompt": None}, "prompt"), ({"prompt": [1, 2]}, "prompt[0]"),
                              ({"prompt": 5}, "prompt"), ({"prompt": ["x"] * 129}, "prompt"),
                              ({"n": 2}, "n"), ({"best_of": 2}, "best_of"), ({"logprobs": 3}, "logprobs"),
                              ({"suffix": 3}, "suffix")):
            with self.subTest(fields=fields):
                answer = self.complete(**fields)
                self.assertEqual((answer.status, answer.error["param"]), (400, param))

    def test_the_number_of_prompts_has_a_limit_which_is_told(self):
        self.assertIn("128", self.complete(prompt=["x"] * 129).error["message"])
        self.assertEqual(self.claude.messages, [])
        self.assertEqual(len(self.complete(prompt=["x"] * 128).json["choices"]), 128)

    def test_an_upstream_refusal_is_an_http_status_also_for_streams(self):
        self.claude.play(FakeReply(429, body=error_body("rate_limit_error", "no"), headers={"retry-after": "30"}))
        answer = self.complete(stream=True)
        self.assertEqual((answer.status, answer.headers["retry-after"]), (429, "30"))


class EventLoopCompletionTests(InEventLoop, LegacyCompletionTests):
    pass


# ---- Native pass-through -----------------------------------------------------------------------------

class NativeTests(GatewayTestCase):
    BODY = {"model": "claude-opus-5-5", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}

    def native(self, headers=None, path="/v1/messages", **fields) -> Answer:
        return self.ask("POST", path, dict(self.BODY, **fields), headers)

    def test_an_answer_passes_byte_for_byte(self):
        whole = message(text("Hi \u2028 there"))
        body = json.dumps(whole, indent=3).encode()
        self.claude.play(FakeReply(body=body))
        self.assertEqual(self.native().raw, body)
        stream = sse(events_of(whole))
        self.claude.play(FakeReply(headers={"content-type": "text/event-stream"}, body=stream))
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

    def test_caching_is_added_only_where_the_client_set_no_mark(self):
        self.native()
        self.assertEqual(self.claude.messages[-1].body["cache_control"], {"type": "ephemeral"})
        self.native(messages=[user([dict(text("x"), cache_control={"type": "ephemeral"})])])
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
        self.claude.play(refusal_of_claude(429, "rate_limit_error", "Slow"))
        answer = self.native()
        self.assertEqual((answer.status, answer.headers["retry-after"], answer.json["type"]), (429, "60", "error"))
        self.assertEqual(answer.error, {"type": "rate_limit_error", "message": "Slow"})
        answer = self.native(model="no-such-model")
        self.assertEqual((answer.status, answer.error["type"]), (404, "not_found_error"))

    def test_an_error_keeps_claudes_status_and_headers(self):
        told = {"anthropic-ratelimit-requests-remaining": "0", "anthropic-organization-id": "org-1"}
        for status, kind in ((529, "overloaded_error"), (402, "billing_error"), (400, "invalid_request_error")):
            with self.subTest(status=status):
                self.claude.play(FakeReply(status, body=error_body(kind, "No"), headers=told))
                answer = self.native(NO_RETRY)
                self.assertEqual((answer.status, answer.error["type"]), (status, kind))
                self.assertEqual({name: answer.headers.get(name) for name in told}, told)
                self.assertTrue(answer.headers["request-id"])

    def test_short_names_resolve_and_tokens_are_counted(self):
        self.start()
        usage = {"input_tokens": 5, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 0, "output_tokens": 3}
        for stream in (False, True):
            self.claude.play(message(text("Hi"), usage=usage))
            self.native(stream=stream, model="haiku")
            self.assertEqual(self.claude.messages[-1].body["model"], "claude-haiku-5-5")
            self.service.gateway.running.wait_until_idle(30)
        self.assertEqual(self.service.gateway.counters.totals()["tokens"],
                         {"input": 10, "cache_read": 40, "cache_write": 0, "output": 6})

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

    def test_the_gateways_own_refusals_have_the_type_of_their_status_on_the_native_door(self):
        for method, headers, body, status in (("PUT", {}, b"{}", 405),
                                              ("POST", {"content-encoding": "br"}, b"{}", 415),
                                              ("POST", {"upgrade": "websocket"}, b"", 426),
                                              ("POST", {"authorization": "x"}, b"{", 400)):
            with self.subTest(status=status):
                answer = self.ask(method, "/v1/messages", body, headers)
                self.assertEqual((answer.status, answer.error["type"]), (status, "invalid_request_error"))


class EventLoopNativeTests(InEventLoop, NativeTests):
    pass


# ---- Tool settings ----------------------------------------------------------------------------------

class SetupTests(unittest.TestCase):
    def test_settings_name_their_variables_as_the_tools_do(self):
        config = Config(port=45_554)
        texts = "\n".join(claude_gateway.setup_text(name, config) for name in claude_gateway.TOOL_SETTINGS)
        for line in ("export OPENAI_BASE_URL=http://localhost:45554/v1 OPENAI_API_KEY=none\n",
                     "export GOOSE_PROVIDER=openai GOOSE_MODEL=sonnet\n", "GATEWAY_API_KEY=none"):
            self.assertIn(line, texts)
        self.assertNotRegex(texts, r"\w_(http|none|sonnet)|\bBASE\b|\bORIGIN\b")

    def test_setup_prints_settings_for_every_tool_and_writes_nothing(self):
        for name in [*claude_gateway.TOOL_SETTINGS, *claude_gateway.SERVICE_FILES]:
            with self.subTest(name=name):
                said = claude_gateway.setup_text(name, Config(port=45999))
                for placeholder in ("BASE", "ORIGIN", "KEY", "MODEL", "PYTHON", "FILE", "START", "CONTAINER", "ENV_KEY",
                                    "PORT", "HOME"):
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
            self.assertIn(os.path.abspath(claude_gateway.__file__), said.replace(r"\\", "\\"))   # systemd escapes them
        plist = plistlib.loads(claude_gateway.setup_text("launchd", Config()).encode())
        self.assertEqual(plist["ProgramArguments"], [sys.executable, os.path.abspath(claude_gateway.__file__), "start"])
        self.assertEqual(plist["StandardErrorPath"], os.path.expanduser("~/Library/Logs/claude-gateway.log"))

    def test_service_files_carry_the_port(self):
        config = Config(port=45999, api_key=("the-client-key",))
        systemd, launchd, windows, docker = (claude_gateway.setup_text(name, config)
                                             for name in ("systemd", "launchd", "windows", "docker"))
        self.assertRegex(systemd, r'(?m)^ExecStart=".*" ".*" start --port 45999$')
        self.assertEqual(plistlib.loads(launchd.encode())["ProgramArguments"][2:], ["start", "--port", "45999"])
        self.assertIn("claude_gateway.py\" start --port 45999'", windows)
        for words in ('CMD ["start", "--port", "45999"]', "EXPOSE 45999\n", "127.0.0.1:45999/health",
                      "-p 127.0.0.1:45999:45999", 'cp "%s" .' % os.path.abspath(claude_gateway.__file__)):
            self.assertIn(words, docker)
        for said in (systemd, launchd, windows, docker):
            self.assertIn("CLAUDE_GATEWAY_API_KEY", said)
            self.assertNotIn("the-client-key", said)
        self.assertIn("RestartPreventExitStatus=2 3\n", systemd)

    def test_paths_are_written_as_each_service_file_takes_them(self):
        kept = sys.executable
        self.addCleanup(setattr, sys, "executable", kept)
        sys.executable = '/a "b"/100% $PORT & <c>/python'
        self.assertIn(r'ExecStart="/a \"b\"/100%% $$PORT & <c>/python" "',
                      claude_gateway.setup_text("systemd", Config()))
        self.assertEqual(plistlib.loads(claude_gateway.setup_text("launchd", Config()).encode())["ProgramArguments"][0],
                         sys.executable)
        sys.executable = "C:\\O'Neil\\python.exe"
        self.assertIn("-Execute 'C:\\O''Neil\\pythonw.exe' -Argument '\"",
                      claude_gateway.setup_text("windows", Config()))

    def test_variables_are_set_as_powershell_does_it_on_windows(self):
        for text, typed in (("Run A_B=... claude-gateway start", 'Run $env:A_B = "..."; claude-gateway start'),
                            ("export A_B=http://x/v1 E=f\nexport C=d",
                             '$env:A_B = "http://x/v1"; $env:E = "f"\n$env:C = "d"'),
                            ("ANTHROPIC_API_KEY=... in a file", "ANTHROPIC_API_KEY=... in a file")):
            with self.subTest(text):
                self.assertEqual(claude_gateway.as_typed(text, True), typed)
                self.assertEqual(claude_gateway.as_typed(text, False), text)

    def test_windows_starts_it_for_this_user_without_a_time_limit_and_on_battery(self):
        said = claude_gateway.setup_text("windows", Config())
        for words in ('-AtLogOn -User "$env:USERDOMAIN\\$env:USERNAME"', "-ExecutionTimeLimit 0",
                      "-AllowStartIfOnBatteries -DontStopIfGoingOnBatteries", "GetFolderPath('Startup')",
                      "$link.Arguments = '\"%s\" start'" % os.path.abspath(claude_gateway.__file__)):
            self.assertIn(words, said)

    def test_settings_fit_the_gateway_that_they_are_for(self):
        plain, keyed = Config(port=45999), Config(port=45999, api_key=("the-client-key",))
        for name in claude_gateway.TOOL_SETTINGS:
            self.assertNotIn("the-client-key", claude_gateway.setup_text(name, keyed))
        self.assertNotIn("env_key", claude_gateway.setup_text("codex", plain))
        self.assertTrue(claude_gateway.setup_text("codex", keyed).endswith(
            '\n# in the environment: OPENAI_API_KEY=YOUR-GATEWAY-KEY\n'
            'model_providers.gateway.env_key = "OPENAI_API_KEY"'))
        for words in ("URL: http://ADDRESS-OF-THIS-MACHINE:45999/v1\nAPI key: YOUR-GATEWAY-KEY\n",
                      "CLAUDE_GATEWAY_API_KEY=YOUR-GATEWAY-KEY claude-gateway start --port 45999 --host 0.0.0.0\n"):
            self.assertIn(words, claude_gateway.setup_text("home-assistant", plain))
        for name in ("open-webui", "n8n", "librechat"):
            said = claude_gateway.setup_text(name, plain)
            for words in ("http://host.docker.internal:45999/v1", "--add-host=host.docker.internal:host-gateway",
                          "_API_KEY=YOUR-GATEWAY-KEY claude-gateway start --port 45999 --host localhost --host 172."):
                self.assertIn(words, said)
        for line in said.split("\n")[:3]:           # librechat's settings are a file
            self.assertTrue(line.startswith("# "))
        self.assertTrue(claude_gateway.setup_text("continue", plain).startswith("name: "))
        self.assertIn("\nversion: 1.0.0\nschema: v1\nmodels:\n", claude_gateway.setup_text("continue", plain))

    def test_setup_says_where_they_go_and_prints_what_can_be_pasted(self):
        done = outcome_of(["setup", "codex"], {}, "")
        self.assertEqual((done.code, done.err), (0, "Codex CLI, ~/.codex/config.toml:\n"))
        self.assertTrue(done.out.startswith('model = "claude-opus-5-5"\n'))
        self.assertIn("a PowerShell window:", outcome_of(["setup", "windows"], {}, "").err)
        listed = outcome_of(["setup"], {}, "").out
        self.assertTrue(listed.endswith("\n\nclaude-gateway setup NAME prints its settings.\n"))
        self.assertRegex(listed, r"(?m)^systemd +Linux: a service of your account$")
        self.assertEqual(re.findall(r"(?m)^([A-Z][a-z ]+)\n\n(\S+)", listed), [
            ("Libraries", "openai"), ("Terminals", "aider"), ("Editors", "cline"), ("Apps", "open-webui"),
            ("Service files", "systemd")])

    def test_tools_that_know_models_by_their_full_names_get_one(self):
        for name in ("aider", "autogen", "crewai", "dspy", "openhands", "qwen-code"):
            self.assertIn("claude-sonnet-5-5", claude_gateway.setup_text(name, Config()))
        self.assertIn('"url": "http://localhost:45554/v1/chat/completions"',
                      claude_gateway.setup_text("vscode", Config()))
        self.assertIn("--edit-format diff", claude_gateway.setup_text("aider", Config()))
        for name in ("vscode", "pi", "opencode", "kilo-code"):
            json.loads(claude_gateway.setup_text(name, Config()))
        for name in ("openai-agents", "crewai", "dspy", "smolagents", "autogen", "agno", "browser-use"):
            compile(re.sub("(?m)^export .*", "", claude_gateway.setup_text(name, Config())), name, "exec")

    def test_setup_takes_names_and_titles_in_any_case_and_lists_them(self):
        for given, name in (("Aider", "aider"), ("Open WebUI", "open-webui"), ("JetBrains AI Assistant", "jetbrains"),
                            ("DOCKER", "docker"), ("roo_code", "roo-code")):
            with self.subTest(given=given):
                self.assertEqual(outcome_of(["setup", given], {}, "").out, outcome_of(["setup", name], {}, "").out)
        code, said, _ = run_command("setup")
        self.assertEqual(code, 0)
        for name, tool in claude_gateway.TOOL_SETTINGS.items():
            self.assertRegex(said, r"(?m)^%s +%s$" % (name, re.escape(tool.title)))
        for name in claude_gateway.SERVICE_FILES:
            self.assertRegex(said, r"(?m)^%s " % name)


# ---- Status page -------------------------------------------------------------------------------------

# The page's script in front of a document and a server that are made up: each step is a status, a body, and
# what is typed into the form before (if anything is).
PAGE_HARNESS = r"""
const steps = %s, told = [], elements = {};
function element() {
  return { hidden: true, style: {}, listeners: {}, children: [], dataset: {},
           append(...more) { this.children.push(...more); }, replaceChildren(...all) { this.children = all; },
           get all() { return (this.textContent ?? "") + this.children.map((one) => one.all ?? one).join("|"); },
           addEventListener(name, on) { this.listeners[name] = on; } };
}
const buttons = [Object.assign(element(), { dataset: { copy: "base" } })];
const cards = ["errors", "used", "limits", "recent"].map((card) => Object.assign(element(), { dataset: { card } }));
globalThis.document = { getElementById: (id) => elements[id] ??= element(), createElement: element,
                        querySelectorAll: (what) => what === "[data-card]" ? cards : buttons };
let copied, later;
Object.defineProperty(globalThis, "navigator", {
  value: { clipboard: { writeText: async (text) => { copied = text; } } } });
globalThis.setTimeout = (call) => { later = call; };
globalThis.location = { origin: "http://localhost:1234", host: "localhost:1234", port: "1234" };
let tick, sent, shown;
globalThis.setInterval = (update) => { tick = update; };
globalThis.fetch = async (path, { headers }) => {
  const [status, body] = steps[told.length];
  sent = headers.authorization ?? null;
  if (!status) throw new TypeError("refused");
  return { status, ok: status === 200, json: async () => JSON.parse(body) };
};
async function run() {
  for (let at = 0; at < steps.length; at += 1) {
    const typed = steps[at][2], form = elements.key;
    if (typed) {
      document.getElementById("secret").value = typed;
      form.listeners.submit({ preventDefault() {} });
    } else if (at) tick();
    await new Promise((next) => setImmediate(next));
    const [ask, wrong, data, state] = ["ask", "wrong", "data", "state"].map(document.getElementById);
    shown = Object.fromEntries(Object.entries(elements).map(([id, one]) => [id, one.all]));
    shown.hidden = Object.keys(elements).filter((id) => elements[id].hidden);
    shown.cards = cards.filter((card) => !card.hidden).map((card) => card.dataset.card);
    told.push([!ask.hidden, !wrong.hidden, !data.hidden, state.textContent, sent]);
  }
  const [button] = buttons;
  await button.listeners.click();
  shown.copying = [copied, button.textContent];
  later();
  shown.copying.push(button.textContent);
  console.log(JSON.stringify([told, shown]));
}
run();
%s
"""


class StatusTests(GatewayTestCase):
    def setUp(self):
        super().setUp()
        self.start()                                # counts from zero

    def status(self, **headers) -> dict:
        self.settle()
        return self.ask("GET", "/", headers=dict({"accept": "application/json"}, **headers)).json

    def settle(self) -> None:
        """Waits until nothing runs: a request is counted just after its answer is out."""
        self.service.gateway.running.wait_until_idle(30)

    def test_requests_tokens_cache_and_errors_are_counted(self):
        usage = {"input_tokens": 100, "cache_read_input_tokens": 800, "cache_creation_input_tokens": 100,
                 "output_tokens": 50}
        self.claude.play(message(text("A"), usage=usage), message(text("B"), usage=usage))
        self.chat()
        self.chat(stream=True)
        self.chat(model="no-such-model")
        data = self.status()
        self.assertEqual(data["requests"], {"total": 3, "running": 0})      # besides the one that asks
        self.assertEqual(data["tokens"], {"input": 200, "cache_read": 1600, "cache_write": 200, "output": 100})
        self.assertEqual(data["errors"], {"model_not_found": 1})
        # sonnet 5.5: $2 fresh, $0.10 read; 1600 reads save 1.90 each, 200 writes cost 0.50 more each, per million
        self.assertEqual(data["cache"], {"share_percent": 80, "saved_usd": round((1600 * 1.9 - 200 * 0.5) / 1e6, 4)})
        # and $10 out: 200 fresh, 200 written for a quarter more, 1600 read, 100 out
        self.assertEqual(data["cost"], {"usd": round((200 * 2 + 200 * 2.5 + 1600 * 0.1 + 100 * 10) / 1e6, 4),
                                        "without_price": []})
        self.settle()
        told = self.ask("GET", "/metrics").raw.decode()
        self.assertIn('claude_gateway_cost_usd_total{model="claude-sonnet-5-5"} 0.00206\n', told)
        self.assertIn('claude_gateway_cache_saved_usd{model="claude-sonnet-5-5"} 0.00294\n', told)
        self.assertIn('claude_gateway_requests_running 0\n', told)

    def test_the_last_requests_and_totals_by_tool_and_model_are_kept_without_a_word_of_them(self):
        usage = {"input_tokens": 100, "cache_read_input_tokens": 900, "output_tokens": 50}
        self.claude.play(message(text("a private answer"), usage=usage), message(text("another"), usage=usage),
                         FakeReply(status=401, body={"type": "error", "error": {
                             "type": "authentication_error", "message": "invalid key %s" % SECRET}}))
        self.chat("a private question", headers={"user-agent": "aider/0.86"}, model="sonnet", seed=5)
        self.settle()
        self.chat("a private question", headers={"user-agent": "aider/0.86"}, stream=True)
        self.settle()
        self.chat("a private question", headers={"user-agent": "curl/8"}, model="haiku")
        data = self.status()
        failed, streamed, first = data["recent"]
        self.assertEqual(set(first), {"time", "row", "tool", "path", "status", "asked", "used", "stream",
                                      "first_byte_ms", "total_ms", "input_tokens", "cached_tokens", "output_tokens",
                                      "request_id", "changes", "error", "error_code", "cost_usd"})
        for name, value in (("tool", "aider"), ("asked", "sonnet"), ("used", "claude-sonnet-5-5"), ("status", 200),
                            ("stream", False), ("input_tokens", 1000), ("cached_tokens", 900), ("output_tokens", 50),
                            ("changes", "dropped seed (no counterpart)"), ("error", ""),
                            ("cost_usd", (100 * 2 + 900 * 0.1 + 50 * 10) / 1e6)):
            self.assertEqual(first[name], value, name)
        self.assertIs(streamed["stream"], True)
        self.assertAlmostEqual(first["time"], time.time(), delta=30)
        self.assertEqual((failed["status"], failed["tool"], failed["cost_usd"]), (401, "curl", None))
        self.assertIn("invalid key ***", failed["error"])
        self.assertEqual(data["error_texts"], {"upstream_authentication": failed["error"]})
        self.assertEqual(data["by_tool"]["aider"], {
            "requests": 2, "failed": 0, "input_tokens": 2000, "output_tokens": 100, "cached_tokens": 1800,
            "cost_usd": 2 * first["cost_usd"]})
        self.assertEqual((data["by_tool"]["curl"]["failed"], list(data["by_model"])),
                         (1, ["claude-sonnet-5-5", "claude-haiku-5-5"]))
        self.assertNotIn("private", json.dumps(data))
        self.assertNotIn(SECRET, json.dumps(data))

    def test_of_many_requests_the_last_fifty_are_kept_and_looking_is_none_of_them(self):
        for number in range(55):
            self.ask("GET", "/v1/nothing-%d" % number, headers={"user-agent": "tool%d/1" % number})
            self.settle()
        self.ask("GET", "/metrics")
        data = self.status()
        self.assertEqual([each["path"] for each in data["recent"]],
                         ["/v1/nothing-%d" % number for number in range(54, 4, -1)])
        self.assertEqual(len(data["by_tool"]), 55)
        self.assertEqual(data["by_model"], {})
        self.ask("POST", "/", {})
        self.settle()
        self.assertEqual(list(self.status()["error_texts"]), [*self.status()["errors"]])    # its text is kept, too

    def test_totals_of_any_number_of_tools_and_errors_stay_bounded(self):
        counters = claude_gateway.Counters()
        for number in range(500):
            record = claude_gateway.Record(tool="tool%d" % number, status=400, error="x", error_code="code%d" % number)
            counters.add_request(vars(record), [])
        data = counters.totals()
        self.assertEqual((len(data["by_tool"]), data["by_tool"]["other"]["requests"]), (201, 300))
        self.assertEqual((len(data["error_texts"]), len(data["recent"])), (200, 50))

    def test_aliases_and_the_start_of_the_count_are_shown(self):
        self.start(alias=(("fast", "haiku"),))
        data = self.status()
        self.assertEqual(data["aliases"], {"fast": "haiku"})
        self.assertAlmostEqual(data["started_at"], time.time(), delta=30)

    def test_the_page_gets_the_settings_of_every_tool_for_the_port_it_was_opened_at(self):
        self.assertEqual(self.ask("GET", "/?setup", headers={"host": "localhost:99999"}).status, 200)
        texts = self.ask("GET", "/?setup", headers={"host": "localhost:8123"}).json
        self.assertEqual(set(texts), set(claude_gateway.TOOL_SETTINGS))
        self.assertIn("http://localhost:8123/v1", texts["aider"])
        texts = self.ask("GET", "/?setup", headers={"host": "127.0.0.1:8123"}).json
        self.assertIn("http://127.0.0.1:8123/v1", texts["aider"])
        self.start(api_key=("the-client-key",))
        self.assertEqual(set(self.ask("GET", "/?setup").json), {"status", "version", "key_needed"})

    def test_list_prices_are_those_of_november_2026(self):
        # US dollars per million tokens: in, in from the cache, out; no price of mythos 5.2 is known
        prices = {"fable-5-2": (8, 0.2, 40), "mythos-5-2": None, "haiku-5-5": (0.1, 0.01, 0.5),
                  "sonnet-5-5": (2, 0.1, 10), "opus-5-5": (4, 0.2, 20), "fable-5-1": (10, 0.25, 50),
                  "mythos-5-1": (10, 0.25, 50), "opus-5": (5, 0.5, 25), "sonnet-5": (2, 0.2, 10),
                  "fable-5": (10, 1, 50), "mythos-5": (10, 1, 50), "opus-4-8": (5, 0.5, 25), "opus-4-7": (5, 0.5, 25),
                  "sonnet-4-6": (3, 0.3, 15), "opus-4-6": (5, 0.5, 25), "opus-4-5-20251101": (5, 0.5, 25),
                  "haiku-4-5-20251001": (1, 0.1, 5), "sonnet-4-5-20250929": (3, 0.3, 15)}
        self.assertEqual({model.id[len("claude-"):]: model.price for model in BUILT_IN_MODELS.values()}, prices)
        self.assertEqual({model.id: (model.long_price, model.fast_price) for model in BUILT_IN_MODELS.values()
                          if model.long_price or model.fast_price},
                         {"claude-haiku-5-5": ((0.5, 0.05, 2.5), None), "claude-opus-5-5": (None, (8, 0.4, 40))})

    def test_an_answer_costs_what_its_tier_says(self):
        million = {"input_tokens": 1_000_000, "output_tokens": 1_000_000}
        long = {"input_tokens": 50_000, "cache_read_input_tokens": 50_001, "output_tokens": 1_000_000}
        short = {"input_tokens": 50_000, "cache_read_input_tokens": 50_000, "output_tokens": 1_000_000}
        cases = (
            ("haiku-5-5", short, 0.05 * 0.1 + 0.05 * 0.01 + 0.5),
            ("haiku-5-5", long, 0.05 * 0.5 + 0.050001 * 0.05 + 2.5),
            ("opus-5-5", million, 24), ("opus-5-5", dict(million, speed="standard"), 24),
            ("opus-5-5", dict(million, speed="fast"), 48), ("fable-5-2", dict(million, speed="fast"), None),
            ("opus-5-5", dict(million, service_tier="batch"), 12), ("mythos-5-2", million, None),
            ("opus-5-5", dict(million, server_tool_use={"web_search_requests": 3}), 24.03),
            ("opus-5-5", dict(million, server_tool_use={"web_search_requests": 10**400}, speed=None), 24),
            ("opus-5-5", {"cache_creation_input_tokens": 1_000_000, "cache_creation": {
                "ephemeral_1h_input_tokens": 600_000, "ephemeral_5m_input_tokens": 400_000}}, 6.8))
        for name, usage, cost in cases:
            with self.subTest(name=name, usage=str(usage)[:200]):
                found = claude_gateway.cost_of(BUILT_IN_MODELS["claude-" + name], usage)
                self.assertEqual(found and round(found[0], 9), cost and round(cost, 9))

    def test_each_answer_is_priced_by_itself_plain_and_streamed(self):
        usage = {"input_tokens": 60_000, "output_tokens": 10}
        self.claude.play(*[message(text("A"), model="claude-haiku-5-5", usage=usage)] * 2)
        self.chat(model="haiku")
        self.chat(model="haiku", stream=True)          # 120,000 together, and each a short prompt
        self.assertEqual(self.status()["cost"]["usd"], round(2 * (60_000 * 0.1 + 10 * 0.5) / 1e6, 4))
        self.claude.play(message(text("B"), model="claude-fable-5-2", usage=dict(usage, speed="fast")))
        self.chat(model="claude-fable-5-2")
        self.assertEqual(self.status()["cost"]["without_price"], ["claude-fable-5-2"])

    def test_a_model_without_a_price_is_named(self):
        self.claude.play(message(text("A"), model="claude-mythos-5-2"))
        self.chat(model="claude-mythos-5-2")
        self.assertEqual(self.status()["cost"], {"usd": 0, "without_price": ["claude-mythos-5-2"]})

    def test_a_window_that_is_new_goes_by_its_own_name(self):
        self.claude.play(FakeReply(body=message(text("A")), headers={
            "anthropic-ratelimit-unified-30d-utilization": "0.1", "anthropic-ratelimit-unified-5h-utilization": "0.2"}))
        self.chat()
        self.assertEqual([(limit["title"], limit["used"]) for limit in self.status()["limits"]],
                         [("5 hours", 0.2), ("30d", 0.1)])

    def test_the_names_begin_with_the_one_to_take(self):
        self.assertEqual(list(self.status()["models"]), ["sonnet", "opus", "haiku", "fable", "mythos"])

    def test_what_is_written_for_an_hour_costs_as_much_again(self):
        self.claude.play(message(text("A"), usage={
            "input_tokens": 0, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 1_000_000,
            "cache_creation": {"ephemeral_5m_input_tokens": 400_000, "ephemeral_1h_input_tokens": 600_000},
            "output_tokens": 1}))
        self.chat()
        data = self.status()
        self.assertEqual(data["tokens"]["cache_write"], 1_000_000)
        # sonnet 5.5: $2 a million; 0.4 million cost 25 % more, 0.6 million 100 %
        self.assertEqual(data["cache"]["saved_usd"], -(0.4 * 0.5 + 0.6 * 2))

    def test_plan_windows_and_rate_limits_come_from_the_latest_answer(self):
        reset = int(time.time()) + 3600
        self.claude.play(FakeReply(body=message(text("A")), headers={
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
        self.claude.play(FakeReply(body=message(text("A")), headers={
            "anthropic-ratelimit-unified-5h-utilization": "nan", "anthropic-ratelimit-unified-7d-utilization": "1.04",
            "anthropic-ratelimit-unified-7d-reset": "soon", "anthropic-ratelimit-tokens-limit": "0",
            "anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-requests-limit": "1e-300",
            "anthropic-ratelimit-requests-remaining": "-1e300"}))
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

    def page(self, steps) -> list:
        """What the page's script did at each step, and what it showed in the end."""
        script = re.search(r"<script[^>]*>(.*)</script>", claude_gateway.PAGE, re.S).group(1)
        ended = subprocess.run(["node", "-e", PAGE_HARNESS % (json.dumps(steps), script)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, timeout=60, env=dict(os.environ, TZ="UTC"))
        self.assertEqual(ended.stderr.decode(), "")
        return json.loads(ended.stdout.decode())

    @unittest.skipUnless(shutil.which("node"), "no node here")
    def test_the_page_shows_what_it_cost_and_until_when_things_last(self):
        data = self.status()
        data.update(upstream="simulated", uptime_seconds=97_200, cost={"usd": 1.234, "without_price": ["x"]})
        data["cache"]["saved_usd"] = -0.5
        data["credential"] = {"description": "login", "expires_at": 1_893_456_000, "refreshable": True}
        data["limits"] = [{"title": "5 hours", "used": 0.5, "resets_at": time.time() + 28_770}]
        shown = self.page([(200, json.dumps(data), "")])[1]
        self.assertEqual((shown["cost"], shown["saved"]),
                         ("$1.23", "by list prices; caching cost $0.50; without x"))
        self.assertRegex(shown["running"], r"\A0 running; all since \d+ \w+ 20\d\d, \d\d:\d\d\Z")
        self.assertEqual(shown["cards"], ["limits"])            # there is nothing to show in the others
        self.assertRegex(shown["limits"], r"50 %, reset \d+ \w+ 20\d\d, \d\d:\d\d")
        self.assertRegex(shown["credential"], r"Token renews\|1 Jan 2030, 00:00")
        self.assertTrue(shown["names"].startswith("sonnet = claude-sonnet-5-5, "), shown["names"])
        data["cache"]["saved_usd"], data["cost"]["usd"] = -0.0, 0.0042
        shown = self.page([(200, json.dumps(data), "")])[1]
        self.assertEqual((shown["cost"], shown["saved"]), ("$0.0042", "by list prices; caching saved $0.00; without x"))
        self.assertEqual(shown["copying"], ["http://localhost:1234/v1", "copied", "copy"])
        self.assertNotIn("demo", shown["hidden"])
        data["upstream"] = "https://api.anthropic.com"
        self.assertIn("demo", self.page([(200, json.dumps(data), "")])[1]["hidden"])

    @unittest.skipUnless(shutil.which("node"), "no node here")
    def test_the_page_shows_requests_errors_and_totals(self):
        self.claude.play(message(text("A"), usage={"input_tokens": 1000, "cache_read_input_tokens": 500,
                                                   "output_tokens": 20}))
        self.chat("Hi", headers={"user-agent": "aider/1"}, model="opus", seed=1)
        self.settle()
        self.chat(model="no-such-model")
        data = self.status()
        shown = self.page([(200, json.dumps(data), "")])[1]
        self.assertEqual(shown["cards"], ["errors", "used", "recent"])      # Claude has reported no limits
        self.assertRegex(shown["errors"], r"\A1 \u00d7 model_not_found\|The model \"no-such-model\" does not exist")
        self.assertIn("New in the prompt|1,000|Read from the cache|500|Stored in the cache|0|Answers|20|Total|1,520",
                      shown["tokens"])
        self.assertIn("tool|requests|errors|tokens in|cached|tokens out|cost|aider|1|0|1,500|33%|20|$0.0045|",
                      shown["totals"])
        newest, older = shown["recent"].index("no-such-model"), shown["recent"].index("opus -> claude-opus-5-5")
        self.assertLess(newest, older)
        for words in ("1,500|33%|20|$0.0045", "dropped seed (no counterpart)", "does not exist here"):
            self.assertIn(words, shown["recent"])

    @unittest.skipUnless(shutil.which("node"), "no node here")
    def test_the_page_asks_for_the_key_and_says_when_it_is_wrong(self):
        data = json.dumps(self.status())
        needed = json.dumps({"status": "ok", "version": "1", "key_needed": True})
        refused = json.dumps({"error": {"message": "wrong", "code": "invalid_api_key"}})
        steps = ((200, needed, ""), (401, refused, "wrong"), (200, needed, ""), (200, needed, "older"),
                 (200, data, "right"), (200, data, ""), (503, "{}", ""), (0, "", ""))
        self.assertEqual(self.page(steps)[0], [    # form, "not right", numbers, state, the key sent
            [True, False, False, "running", None], [True, True, False, "running", "Bearer wrong"],
            [True, True, False, "running", None], [True, True, False, "running", "Bearer older"],
            [False, False, True, "running", "Bearer right"], [False, False, True, "running", "Bearer right"],
            [False, False, True, "not reachable", "Bearer right"],
            [False, False, True, "not reachable", "Bearer right"]])

    def test_metrics_keep_to_prometheus_text_format(self):
        self.chat()
        self.settle()
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

    def test_a_line_of_a_failure_has_its_columns(self):
        with self.assertLogs(claude_gateway.LOG, "DEBUG") as logged:
            self.chat(model="no-such-model", headers={"user-agent": "aider/1"})
            self.ask("POST", "/v1/messages", {"model": "none-either", "messages": []})
            self.ask("GET", "/v1/no-such-route")
            self.settle()
        lines = {record.fields["asked"]: record for record in logged.records if hasattr(record, "fields")}
        self.assertEqual({(asked, record.levelname) for asked, record in lines.items()},
                         {("no-such-model", "WARNING"), ("none-either", "WARNING"), ("", "WARNING")})
        self.assertRegex(lines["no-such-model"].getMessage(), r" 404  aider {10}no-such-model -> - {27}\d+/\d+ ms")
        self.assertRegex(lines[""].getMessage(), r" 404  - {14}- {44}\d+/\d+ ms")
        said = [record.args for record in logged.records if str(record.msg).startswith("to the client")]
        self.assertEqual([body.get("error", {}).get("code") for body in said][::2], ["model_not_found", "unknown_url"])

    def test_no_secret_is_in_any_of_it(self):
        self.chat()
        for path in ("/", "/metrics"):
            self.assertNotIn(SECRET, self.ask("GET", path).raw.decode())

    def test_labels_are_bounded(self):
        for at in range(5):
            self.ask("GET", "/no/such/place/%d" % at)
        self.settle()
        self.assertIn('route="other",status="404"} 5', self.ask("GET", "/metrics").raw.decode())

    def test_a_refused_continuation_counts_what_came_before_it_once(self):
        self.start()
        paused = message(text("a"), WEB_FIND, WEB_FOUND, stop_reason="pause_turn",
                         usage={"input_tokens": 100, "output_tokens": 10})
        self.claude.play(paused, FakeReply(400, body=error_body("invalid_request_error", "No")))
        self.chat(stream=True, web_search_options={})
        self.service.gateway.running.wait_until_idle(30)
        tokens = self.service.gateway.counters.totals()["tokens"]
        self.assertEqual((tokens["input"], tokens["output"]), (100, 10))


# ---- HTTP server -------------------------------------------------------------------------------------

class ToolLabelTests(unittest.TestCase):
    def test_the_log_names_the_product_where_the_request_does(self):
        for label, headers in (
            ("QwenCode", {"user-agent": "QwenCode/0.14.1 (linux; x64)"}), ("OpenAI/JS", {"user-agent": "ls/JS 5.13.1"}),
            ("OpenAI/JS", {"user-agent": "OpenAI/JS 6.1.0"}), ("OpenAI/Python", {"user-agent": "OpenAI/Python 3.1"}),
            ("AsyncOpenAI/Py", {"user-agent": "AsyncOpenAI/Python 3.1"}), ("pi", {"user-agent": "pi/0.50.1"}),
            ("Cline", {"user-agent": "OpenAI/JS 5.1", "x-title": "Cline"}), ("Roo-Code", {"x-title": "Roo Code"}),
            ("promptfoo", {"user-agent": "node", "x-promptfoo-version": "0.119.0", "x-api-version": "2"}),
            ("python-httpx", {"user-agent": "python-httpx/0.28.1"}), ("browser", {"user-agent": "Mozilla/5.0 (X11)"}),
            ("-", {}), ("-", {"user-agent": "()"}),
        ):
            with self.subTest(label=label, headers=headers):
                self.assertEqual(claude_gateway.tool_of(headers.get("user-agent", ""), headers.get("x-title", ""),
                                                        " ".join(headers)), label)


class AccessTests(HttpTestCase):
    config = {"allow_host": ("My-Box.example", "box"), "cors_origin": ("https://app.example", "app://obsidian.md",
                                                                      "null")}

    def test_known_hosts_are_accepted(self):
        for host in ("localhost", "LOCALHOST:1", "localhost.", "a.localhost:80", "127.0.0.1", "127.9.9.9:1", "[::1]:5",
                     "192.168.1.20:45554", "10.0.0.1", "[fe80::1]", "8.8.8.8", "host.docker.internal:45554",
                     "my-box.example", "MY-BOX.EXAMPLE:443", "box"):
            with self.subTest(host=host):
                self.assertEqual(self.ask("GET", "/health", headers={"host": host}).status, 200)

    def test_other_hosts_are_403_on_every_route_with_the_option_that_would_help(self):
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil-localhost", "my-box",
                     "box.example", "0x7f000001", "127.1", "2130706433"):
            for method, path in (("GET", "/health"), ("POST", "/v1/chat/completions"), ("OPTIONS", "/"),
                                 ("GET", "/nowhere"), ("GET", "/")):
                with self.subTest(host=host, path=path):
                    answer = self.ask(method, path, headers={"host": host + ":45554"})
                    self.assertEqual((answer.status, answer.error["code"]), (403, "host_not_allowed"))
                    self.assertIn("--allow-host " + host, answer.error["message"])
                    self.assert_envelope(answer)

    def test_a_path_that_is_not_served_is_named_as_it_was_typed(self):
        for path in ("/v1/embedding", "/nowhere"):
            answer = self.ask("GET", path)
            self.assertTrue(answer.error["message"].startswith("There is nothing at GET %s; served are" % path))
        for path in ("/v1", "/"):
            self.assertEqual(self.ask("POST", path, {}).error["message"],
                             path + " does not support POST; a chat completion is POST /v1/chat/completions.")
        self.assertEqual(self.ask("GET", "/v1/responses").error["message"], "/v1/responses does not support GET.")

    def test_json_ends_with_a_newline_for_terminals(self):
        for answer in (self.ask("GET", "/health"), self.ask("GET", "/nowhere"), self.chat()):
            self.assertTrue(answer.raw.endswith(b"}\n"))
            self.assertEqual(int(answer.headers["content-length"]), len(answer.raw))

    def test_tls_spoken_to_the_port_is_said_once_in_the_log(self):
        self.start()
        with self.assertLogs(claude_gateway.LOG, "WARNING") as logged:
            for _ in range(3):
                context = ssl.create_default_context()
                with self.assertRaises((OSError, ssl.SSLError)), contextlib.closing(self.connect()) as connection:
                    context.wrap_socket(connection, server_hostname="localhost")
        self.assertEqual(len(logged.output), 1)
        self.assertIn("has to begin with http://, not https://", logged.output[0])

    def test_the_bound_name_is_accepted(self):
        # a name of this machine that is neither an address nor localhost; nothing is bound to it
        gateway = self.service.gateway
        self.addCleanup(setattr, gateway, "names", gateway.names)
        gateway.names = Gateway(claude_gateway.replace(gateway.config, host="Workstation.lan")).names
        self.assertEqual(self.ask("GET", "/health", headers={"host": "workstation.lan:45554"}).status, 200)

    def test_loopback_and_chosen_origins_get_cors_headers_on_success_error_and_stream(self):
        for origin in ("http://localhost:3000", "https://localhost", "http://127.0.0.1:8080", "http://[::1]:5173",
                       "http://app.localhost:1", "https://app.example", "app://obsidian.md", "null"):
            for name, fields in (("success", {}), ("error", {"n": 2}), ("stream", {"stream": True})):
                with self.subTest(origin=origin, name=name):
                    headers = self.chat(headers={"origin": origin}, **fields).headers
                    self.assertEqual(headers["access-control-allow-origin"], origin)
                    self.assertEqual(headers["vary"].lower(), "origin")
                    self.assertIn("x-request-id", headers["access-control-expose-headers"])
                    self.assertNotIn("access-control-allow-credentials", headers)
        for path, status in (("/nowhere", 404), ("/v1/chat/completions", 405), ("/v1/models/none", 404)):
            with self.subTest(path=path):
                answer = self.ask("GET", path, headers={"origin": "http://localhost:3000"})
                self.assertEqual((answer.status, answer.headers["access-control-allow-origin"]),
                                 (status, "http://localhost:3000"))

    def test_other_origins_are_403_on_every_route_and_get_no_cors_headers(self):
        for origin in ("http://evil.example", "https://localhost.evil.example", "http://localhost:3000.evil.example",
                       "http://127.0.0.1.evil.example", "http://evil.example:127.0.0.1", "https://app.example:444",
                       "http://app.example", "app://other", "file://", "chrome-extension://abc", "http://192.168.1.2",
                       "localhost", "", "http://localhost:3000 http://evil.example", "http://user@localhost",
                       "http://notlocalhost"):
            for method, path in (("POST", "/v1/chat/completions"), ("OPTIONS", "/v1/chat/completions"),
                                 ("GET", "/health"), ("GET", "/v1/models")):
                with self.subTest(origin=origin, method=method, path=path):
                    answer = self.ask(method, path, CHAT_BODY if method == "POST" else None, {"origin": origin})
                    self.assertEqual((answer.status, answer.error["code"]), (403, "origin_not_allowed"))
                    self.assertIn("--cors-origin", answer.error["message"])
                    self.assertEqual([name for name in answer.headers if name.startswith("access-control")], [])
        self.assertEqual(self.claude.messages, [])

    def test_pages_of_other_sites_are_refused_where_they_send_no_origin(self):
        navigation = {"sec-fetch-mode": "navigate"}
        for method, path, headers, status in (
                ("POST", "/v1/chat/completions", {}, 403), ("GET", "/v1/models", {}, 403), ("GET", "/health", {}, 403),
                ("GET", "/", {}, 403), ("GET", "/", navigation, 200), ("GET", "/metrics", navigation, 403),
                ("POST", "/", navigation, 403), ("OPTIONS", "/v1/models", {}, 204), ("DELETE", "/nowhere", {}, 403),
                ("POST", "/v1/chat/completions", {"origin": "https://app.example"}, 200),
                ("POST", "/v1/chat/completions", {"origin": "https://evil.example"}, 403)):
            for site in ("cross-site", "same-site"):
                with self.subTest(method=method, path=path, headers=headers, site=site):
                    answer = self.ask(method, path, CHAT_BODY if method == "POST" else None,
                                      dict(headers, **{"sec-fetch-site": site}))
                    self.assertEqual(answer.status, status, answer.raw)
                    if status == 403:
                        self.assertEqual(answer.error["code"], "origin_not_allowed")
                        self.assertIn("--cors-origin", answer.error["message"])
        for site in ("same-origin", "none"):
            self.assertEqual(self.ask("GET", "/health", None, {"sec-fetch-site": site}).status, 200)

    def test_without_an_origin_there_are_no_cors_headers(self):
        self.assertEqual([name for name in self.chat().headers if name.startswith("access-control")], [])

    def test_a_star_lets_every_origin_in(self):
        self.start(cors_origin=("*",), api_key=("key",))
        answer = self.chat(headers={"origin": "https://anywhere.example", "authorization": "Bearer key"})
        self.assertEqual((answer.status, answer.headers["access-control-allow-origin"]),
                         (200, "https://anywhere.example"))

    def test_a_preflight_may_ask_for_any_headers_and_for_the_private_network(self):
        wanted = "authorization, content-type, x-stainless-os, x-my-own-header"
        answer = self.ask("OPTIONS", "/v1/chat/completions", headers={
            "origin": "http://localhost:3000", "access-control-request-method": "POST",
            "access-control-request-headers": wanted, "access-control-request-private-network": "true"})
        self.assertEqual(answer.status, 204)
        self.assertEqual(answer.headers["access-control-allow-headers"], wanted)
        self.assertEqual(answer.headers["access-control-allow-private-network"], "true")
        self.assertEqual(answer.headers["access-control-allow-origin"], "http://localhost:3000")
        self.assertEqual(set(answer.headers["access-control-allow-methods"].split(", ")),
                         {"GET", "POST", "DELETE", "HEAD", "OPTIONS"})
        plain = self.ask("OPTIONS", "/", headers={"origin": "null"})
        self.assertNotIn("access-control-allow-private-network", plain.headers)

    def test_a_request_that_comes_back_to_its_own_gateway_is_508(self):
        instance_id = self.service.gateway.instance_id
        for hops in (instance_id, "other-gateway,%s" % instance_id, "%s, other-gateway" % instance_id):
            with self.subTest(hops=hops):
                answer = self.chat(headers={"x-claude-gateway-hop": hops})
                self.assertEqual((answer.status, answer.error["code"]), (508, "loop_detected"))
        self.assertEqual(self.claude.messages, [])

    def test_the_hops_of_other_gateways_are_passed_on(self):
        self.chat(headers={"x-claude-gateway-hop": "other-gateway"})
        self.assertEqual(self.claude.messages[-1].headers["x-claude-gateway-hop"],
                         "other-gateway," + self.service.gateway.instance_id)

    def test_two_gateways_that_point_at_each_other_answer_508(self):
        with contextlib.closing(socket.socket()) as reserved:
            reserved.bind(("127.0.0.1", 0))
            port = reserved.getsockname()[1]
        first = self.start(base_url="http://127.0.0.1:%d" % port)
        second = self.start(base_url="http://127.0.0.1:%d" % first.port, port=port)
        for service in (first, second):                 # each would wait for the model list of the other
            service.gateway.models._first.set()
            service.gateway.models._next_fetch = float("inf")
        answer = self.chat()
        self.assertEqual(answer.status, 508, answer.raw)
        self.assertEqual(answer.headers["x-should-retry"], "false")


class ClientKeyTests(HttpTestCase):
    config = {"api_key": ("first-key", "zweiter-schlüssel")}

    def setUp(self) -> None:
        super().setUp()
        self.service.gateway.failed_keys = claude_gateway.FailedKeys()     # earlier tests must not slow this one

    def test_a_key_is_taken_in_all_four_forms(self):
        for key in ("first-key", "zweiter-schlüssel"):
            for name, value in (("authorization", "Bearer " + key), ("authorization", "bearer   " + key),
                                ("authorization", key), ("x-api-key", key), ("api-key", key)):
                with self.subTest(name=name, value=value):
                    answer = self.chat(headers={name: value.encode("utf-8")})
                    self.assertEqual(answer.status, 200, answer.raw)

    def test_one_right_key_is_enough(self):
        self.assertEqual(self.chat(headers={"authorization": "Bearer sk-dummy", "x-api-key": "first-key"}).status, 200)

    def test_wrong_keys_are_401_in_one_shape_that_does_not_repeat_them(self):
        shapes = set()
        for headers in ({"authorization": "Bearer first-ke"}, {"authorization": "Bearer first-key2"},
                        {"x-api-key": "First-key"}, {"api-key": "not-a-key"},
                        {"authorization": "Basic Zmlyc3Qta2V5"}, {"authorization": "Bearer first-key,zweiter"},
                        {"authorization": b"Bearer \xff\xfe"}, {"authorization": "Bearer " + "x" * 10_000}):
            with self.subTest(headers=headers):
                self.service.gateway.failed_keys = claude_gateway.FailedKeys()
                answer = self.chat(headers=headers)
                self.assertEqual((answer.status, answer.error["code"]), (401, "invalid_api_key"))
                self.assertEqual(answer.headers["www-authenticate"], "Bearer")
                self.assert_envelope(answer)
                shapes.add((answer.raw, tuple(name for name in answer.headers)))
        self.assertEqual(len(shapes), 1)
        self.assertEqual(self.claude.messages, [])

    def test_no_key_is_401_too(self):
        for headers in ({}, {"authorization": "Bearer "}, {"authorization": ""}, {"x-api-key": ""},
                        {"cookie": "key=first-key"}):
            with self.subTest(headers=headers):
                self.service.gateway.failed_keys = claude_gateway.FailedKeys()
                answer = self.chat(headers=headers)
                self.assertEqual((answer.status, answer.error["code"]), (401, "invalid_api_key"))

    def test_every_route_needs_the_key_but_the_few_of_the_contract(self):
        for method, path, status in (
                ("GET", "/health", 200), ("HEAD", "/v1/health", 200), ("GET", "/v1/models", 200), ("GET", "/", 200),
                ("GET", "/v1/models/claude-opus-5-5", 200), ("OPTIONS", "/v1/chat/completions", 204),
                ("GET", "/metrics", 401), ("HEAD", "/metrics", 401), ("POST", "/v1/chat/completions", 401),
                ("POST", "/v1/responses", 401), ("GET", "/v1/responses/resp_1", 401),
                ("DELETE", "/v1/responses/resp_1", 401), ("GET", "/v1/responses/resp_1/input_items", 401),
                ("POST", "/v1/responses/input_tokens", 401), ("POST", "/v1/completions", 401),
                ("POST", "/v1/models", 401), ("DELETE", "/v1/models/claude-opus-5-5", 401), ("POST", "/", 401),
                ("POST", "//v1//chat/completions/", 401), ("POST", "/v1/v1/chat/completions", 401),
                ("POST", "/v1/messages/count_tokens", 401), ("POST", "/v1/messages", 401), ("GET", "/nowhere", 401),
                ("POST", "/v1/chat/completions/chat/completions", 401)):
            with self.subTest(method=method, path=path):
                self.service.gateway.failed_keys = claude_gateway.FailedKeys()
                self.assertEqual(self.ask(method, path, CHAT_BODY if method == "POST" else None).status, status)
        self.assertEqual(self.claude.messages, [])

    def test_the_data_of_the_status_page_needs_the_key(self):
        self.assertEqual(self.ask("GET", "/").json, {"status": "ok", "version": claude_gateway.VERSION,
                                                     "key_needed": True})
        self.assertIn("requests", json.dumps(self.ask("GET", "/", headers={"x-api-key": "first-key"}).json))

    def test_a_wrong_key_is_refused_at_the_status_page_too_and_slowed(self):
        # its numbers would show at once whether a guess is right
        for headers in ({"authorization": "Bearer no"}, {"x-api-key": "no"}):
            answer = self.ask("GET", "/", headers=headers)
            self.assertEqual((answer.status, answer.error["code"]), (401, "invalid_api_key"))
        self.assertGreater(self.service.gateway.failed_keys.penalty("127.0.0.1"), 0.05)

    def test_an_absolute_target_does_not_get_around_the_key(self):
        answer, = self.exchanged(request_bytes("POST http://localhost/v1/chat/completions HTTP/1.1", "Host: localhost",
                                               "Content-Length: %d" % len(CHAT_BODY), "Connection: close",
                                               body=CHAT_BODY))
        self.assertEqual(answer.status, 401)

    def test_every_key_is_compared_as_a_digest_in_constant_time(self):
        compare, compared = hmac.compare_digest, []
        self.addCleanup(setattr, hmac, "compare_digest", compare)
        hmac.compare_digest = lambda one, other: compared.append((len(one), len(other))) or compare(one, other)
        for key in ("first-key", "zweiter-schl\u00fcssel", "x", "y" * 500):
            compared.clear()
            self.ask("GET", "/metrics", headers={"x-api-key": key.encode("utf-8")})
            self.assertEqual(compared, [(32, 32)] * 2, "no key ends the search early")

    def test_failures_are_slowed_per_address_and_bounded(self):
        failed = claude_gateway.FailedKeys()
        self.assertEqual([failed.penalty("10.0.0.1") for _ in range(8)], [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0])
        self.assertEqual({failed.penalty("10.0.0.1") for _ in range(2_000)}, {2.0}, "however often")
        self.assertEqual(failed.penalty("10.0.0.2"), 0.0)
        for number in range(10_000):
            failed.penalty("10.1.%d.%d" % divmod(number, 250))
        self.assertEqual(failed.penalty("10.0.0.1"), 0.0, "no more than 10,000 addresses are kept in mind")

    def test_a_refusal_waits_and_a_success_does_not(self):
        sleep, slept = time.sleep, []
        self.addCleanup(setattr, time, "sleep", sleep)
        time.sleep = slept.append
        for key in ("no", "no", "first-key", "no", "first-key"):
            self.chat(headers={"x-api-key": key})
        self.assertEqual(slept, [0.0, 0.05, 0.1])

    def test_a_slowed_refusal_takes_no_place_from_a_correct_key(self):
        service = self.start(api_key=("first-key",))
        service.gateway.running = claude_gateway.Capacity(1)
        for _ in range(9):
            service.gateway.failed_keys.penalty("127.0.0.1")
        wrong = self.connect()
        wrong.sendall(chat_bytes("Authorization: Bearer no"))
        eventually(lambda: service.gateway.running.count, 0.2)
        self.assertEqual(self.chat(headers={"authorization": "Bearer first-key"}).status, 200)

    def test_the_clients_key_does_not_go_upstream(self):
        for name, value in (("authorization", "Bearer first-key"), ("x-api-key", "first-key"),
                            ("api-key", "first-key")):
            with self.subTest(name=name):
                self.assertEqual(self.chat(headers={name: value}).status, 200)
                recorded = self.claude.messages[-1]
                self.assertNotIn("first-key", json.dumps(recorded.headers) + recorded.raw.decode())
                self.assertEqual(recorded.headers["x-api-key"], SECRET)
                self.assertNotIn("authorization", recorded.headers)

    def test_the_wrong_key_is_refused_before_the_body_is_read(self):
        connection = self.connect()
        connection.sendall(request_bytes("POST /v1/chat/completions HTTP/1.1", "Host: localhost",
                                         "Content-Length: 1000000", "Expect: 100-continue",
                                         "Authorization: Bearer no"))
        self.assertIn(b"HTTP/1.1 401 ", received_until(connection, b"\r\n\r\n"))


class AnyKeyTests(HttpTestCase):
    def test_without_a_configured_key_any_or_none_is_accepted_and_none_goes_upstream(self):
        for headers in ({}, {"authorization": "Bearer sk-dummy"}, {"authorization": "EMPTY"}, {"authorization": ""},
                        {"authorization": "Bearer "}, {"x-api-key": "sk-ant-mine"}, {"api-key": "azure"},
                        {"authorization": b"Bearer \xc3\xa9"}):
            with self.subTest(headers=headers):
                self.assertEqual(self.chat(headers=headers).status, 200)
                self.assertEqual(self.claude.messages[-1].headers["x-api-key"], SECRET)
                self.assertNotIn("authorization", self.claude.messages[-1].headers)


class ConnectionTests(HttpTestCase):
    def test_an_answer_amid_the_shutdown_ends_its_connection(self):
        service = self.start()
        connection, release = self.held_chat()
        closing = threading.Thread(target=service.close, args=(10,))
        closing.start()
        self.assertTrue(eventually(lambda: service.gateway.running.draining))
        release.set()
        answer, = answers_in(b"".join(iter(lambda: connection.recv(65_536), b"")))
        closing.join(30)
        self.assertEqual((answer.status, answer.headers["connection"]), (200, "close"))

    def test_a_port_that_is_taken_on_one_of_both_addresses_is_not_used_on_the_other(self):
        """Windows denies access to a port that another program has for itself."""
        real, tried = claude_gateway.Listener.server_bind, []

        def server_bind(listener) -> None:
            if listener.address_family == socket.AF_INET6 and len(tried) < 3:
                tried.append(listener.server_address)
                raise PermissionError(errno.EACCES, "forbidden by its access permissions")
            if listener.address_family == socket.AF_INET:
                real(listener)
        self.addCleanup(setattr, claude_gateway.Listener, "server_bind", real)
        self.addCleanup(setattr, claude_gateway, "IN_USE", claude_gateway.IN_USE)
        claude_gateway.Listener.server_bind = server_bind
        claude_gateway.IN_USE = (errno.EADDRINUSE, errno.EACCES)
        gateway = Gateway(Config(port=0, anthropic_api_key="k"))
        self.addCleanup(gateway.close)
        for listener in claude_gateway.listeners_for(gateway):
            listener.server_close()
        self.assertEqual(len(tried), 3)
        tried.clear()
        gateway.config = claude_gateway.replace(gateway.config, port=int(free_port()))
        self.assertRaises(PermissionError, claude_gateway.listeners_for, gateway)

    def test_requests_beyond_the_cap_are_503_and_later_ones_are_served(self):
        service = self.start()
        service.gateway.running = claude_gateway.Capacity(1)
        connection, release = self.held_chat()
        for method, path, body in (("POST", "/v1/chat/completions", CHAT_BODY), ("GET", "/v1/models", None)):
            answer = self.ask(method, path, body)
            self.assertEqual((answer.status, answer.error["code"]), (503, "gateway_busy"))
            self.assertGreaterEqual(int(answer.headers["retry-after"]), 1)
            self.assert_envelope(answer)
        release.set()
        self.assertIn(b"HTTP/1.1 200 ", received_until(connection, b"\r\n\r\n"))
        self.assertTrue(eventually(lambda: service.gateway.running.count == 0))
        self.assertEqual(self.chat().status, 200)

    def test_idle_and_stalled_connections_do_not_delay_a_working_one(self):
        if resource:                                    # both ends of each are ours
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4_096)), hard))
        idle = [self.connect() for _ in range(500)]
        for connection in idle[:50]:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n")
        self.assertEqual(self.chat().status, 200)
        idle[0].sendall(b"\r\n" + b" " * 50)            # and each of them still works
        self.assertIn(b"HTTP/1.1 400 ", received_until(idle[0], b"\r\n\r\n"))
        idle[499].sendall(NEXT_REQUEST)
        self.assertIn(b"HTTP/1.1 200 ", received_until(idle[499], b"\r\n\r\n"))
        for connection in idle:                         # before the limit is what it was
            connection.close()
        self.assertTrue(eventually(lambda: threading.active_count() < 400))

    def test_connections_beyond_the_cap_are_told_so(self):
        service = self.start()
        service.listeners[0]._connections = claude_gateway.Capacity(1)
        first = self.connect()
        first.sendall(request_bytes("GET /health HTTP/1.1", "Host: localhost"))
        self.assertIn(b"HTTP/1.1 200 ", received_until(first, b"\r\n\r\n"))
        answer, = self.exchanged(b"")
        self.assertEqual((answer.status, answer.headers["connection"]), (503, "close"))
        self.assertGreaterEqual(int(answer.headers["retry-after"]), 1)
        self.assert_envelope(answer)
        first.close()
        self.assertTrue(eventually(lambda: self.exchanged(NEXT_REQUEST)[0].status == 200))

    def test_a_connection_for_which_no_thread_starts_gives_its_place_back(self):
        def no_thread(request, address):
            raise RuntimeError("can't start new thread")

        listener = self.start().listeners[0]
        listener._connections = claude_gateway.Capacity(1)
        with self.assertLogs(claude_gateway.LOG, "ERROR"):
            listener.process_request = no_thread
            self.assertEqual(received_until(self.connect(), b"\r\n\r\n"), b"")
            del listener.process_request
        self.assertEqual(self.exchanged(NEXT_REQUEST)[0].status, 200)

    def test_threads_and_descriptors_return_to_the_baseline(self):
        def descriptors() -> int:
            return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

        def settled() -> bool:                          # the pool of upstream connections is emptied on purpose
            self.service.gateway.upstream.close()
            return threading.active_count() <= threads and descriptors() <= files

        self.chat()
        events, release = events_of(message(text("Hello"))), threading.Event()
        self.claude.play(FakeReply(pieces=[sse(events[:2]), release, sse(events[2:])]))
        connection = self.connect()
        connection.sendall(chat_bytes("Connection: close", body=CHAT_BODY[:-1] + b',"stream":true}'))
        received_until(connection, b"assistant")        # if there is an event loop it runs now, and stays
        release.set()
        received_until(connection, b"never")
        connection.close()
        threads, files = 0, 0
        eventually(settled, 0.3)
        threads, files = threading.active_count(), descriptors()
        body = CHAT_BODY[:-1] + b',"stream":true}'
        for number in range(25):
            self.assertEqual(self.chat(stream=bool(number % 2)).status, 200)
            self.assertEqual(self.ask("GET", "/nowhere").status, 404)
            for data in (chat_bytes(body=body), chat_bytes()[:-4]):     # gone without waiting, gone in mid-body
                with contextlib.closing(socket.create_connection(("127.0.0.1", self.service.port))) as connection:
                    connection.sendall(data)
        self.assertTrue(eventually(settled), (threads, threading.active_count(), files, descriptors()))

    def test_a_peer_is_waited_for_within_both_limits(self):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        peer = claude_gateway.Peer(ours)
        theirs.sendall(b"early")
        # the time in all is used up, although there is something to read
        self.assertRaises(socket.timeout, peer.read_within, 60, time.monotonic())
        self.assertEqual(peer.read_within(5, time.monotonic() + 5), b"early")
        # silence for longer than a pause
        self.assertRaises(socket.timeout, peer.read_within, 0.01, time.monotonic() + 60)

    def test_a_peer_gives_its_bytes_in_order_however_they_came(self):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        peer = claude_gateway.Peer(ours)
        with theirs:
            theirs.sendall(b"one")
            self.assertEqual([peer.read(), peer.drained, peer.read()], [b"one", True, None])
            theirs.sendall(b"three")
            peer.unread += b"two"
            self.assertEqual([peer.read_within(5), peer.read_within(5)], [b"two", b"three"])
        self.assertEqual([peer.read_within(5), peer.read_within(5)], [b"", b""])

    def test_no_wait_for_a_client_is_without_an_end(self):
        for name, most in (("idle_timeout", 120), ("head_timeout", 60), ("body_timeout", 60), ("write_timeout", 120)):
            with self.subTest(name):
                self.assertLessEqual(getattr(Limits, name), most)
        # a server that closes an idle connection earlier than clients expect loses their next request
        self.assertGreaterEqual(Limits.idle_timeout, 60)

    def test_what_a_request_holds_is_given_back_whatever_goes_wrong(self):
        gateway = self.start().gateway

        def broken(*_):
            raise ZeroDivisionError
        gateway.counters.add_request = broken
        self.claude.play(FakeReply(body=message(text("Hi"))))
        connection = self.connect()
        with self.assertLogs(claude_gateway.LOG, "ERROR"):
            connection.sendall(chat_bytes())
            self.assertIn(b" 200 ", received_until(connection, b"never"))
        self.assertTrue(gateway.running.wait_until_idle(30))
        self.assertEqual((gateway.body_budget.count, gateway.usage.running), (0, {}))

    def test_all_are_closed_though_one_of_them_fails(self):
        closed: list = []

        def broken() -> None:
            raise ZeroDivisionError
        closers = [lambda: closed.append("first"), broken, lambda: closed.append("last")]
        self.assertRaises(ZeroDivisionError, claude_gateway.close_all, closers)
        self.assertEqual((closed, closers), (["last", "first"], []))

    def test_a_gateway_that_stops_takes_no_request_on_an_open_connection(self):
        service = self.start()
        connection = self.connect()
        connection.sendall(request_bytes("GET /health HTTP/1.1", "Host: localhost"))
        self.assertIn(b" 200 ", received_until(connection, b"}"))
        service.stop_accepting()
        connection.sendall(chat_bytes())
        answer, = answers_in(received_until(connection, b"never"))
        self.assertEqual((answer.status, answer.error["code"], answer.headers["connection"]),
                         (503, "gateway_busy", "close"))
        self.assertEqual(self.claude.messages, [])


class EventLoopConnectionTests(InEventLoop, ConnectionTests):
    pass


class StreamFramingTests(HttpTestCase):
    def streamed(self, pieces, version: str = "1.1", **fields) -> bytes:
        """All bytes of a streamed answer to these upstream pieces."""
        self.claude.play(FakeReply(pieces=pieces))
        connection = self.connect()
        body = json.dumps(dict(json.loads(CHAT_BODY.decode()), stream=True, **fields)).encode()
        connection.sendall(chat_bytes("Connection: close", body=body, version=version))
        return received_until(connection, b"never")

    def test_each_event_is_on_its_way_before_the_next_arrives(self):
        events = events_of(message(text("one two")), 4)
        starts = [at for at, event in enumerate(events) if event["type"] == "content_block_delta"]
        first, second = threading.Event(), threading.Event()
        self.addCleanup(first.set)
        self.addCleanup(second.set)
        self.claude.play(FakeReply(pieces=[sse(events[:1]), first, sse(events[1:starts[1]]), second,
                                           sse(events[starts[1]:])]))
        connection = self.connect()
        connection.sendall(chat_bytes("Connection: close", body=CHAT_BODY[:-1] + b',"stream":true}'))
        self.assertIn(b'"role":"assistant"', received_until(connection, b'"role":"assistant"'))
        first.set()
        self.assertIn(b'"content":"one "', received_until(connection, b'"content":"one "'))
        second.set()
        self.assertIn(b"data: [DONE]\n\n\r\n0\r\n\r\n", received_until(connection, b"0\r\n\r\n"))

    def test_junk_in_mid_stream_is_told_at_once_though_the_upstream_stays(self):
        never = threading.Event()
        self.addCleanup(never.set)
        begun = sse(events_of(message(text("Hello")))[:4])
        answer, = answers_in(self.streamed([begun + b"data: {junk\n\n", never]))
        self.assertEqual(set(json.loads(answer.events[-1])), {"error"})
        self.assertIn("Hello", completion_from_chunks(answer.chunks[:-1])["message"]["content"])

    def test_events_that_tell_the_client_nothing_do_not_put_off_its_sign_of_life(self):
        self.start(limits=Limits(keepalive_interval=0.3))
        events, ping, told = events_of(message(text("Hello"))), sse([{"type": "ping"}]), threading.Event()
        self.addCleanup(told.set)

        def pings():                                    # much more often than a sign of life is due
            yield sse(events[:1])
            while not told.wait(0.02):
                yield ping
            yield sse(events[1:])
        self.claude.play(FakeReply(pieces=pings()))
        connection = self.connect()
        connection.settimeout(30)
        connection.sendall(chat_bytes("Connection: close", body=CHAT_BODY[:-1] + b',"stream":true}'))
        self.assertIn(b": keep-alive", received_until(connection, b": keep-alive\n\n"))
        told.set()
        self.assertIn(b"[DONE]", received_until(connection, b"never"))

    def test_http_1_1_gets_chunks_and_http_1_0_the_end_of_the_connection(self):
        pieces = [sse(events_of(message(text("Hello"))))]
        new, old = answers_in(self.streamed(pieces))[0], answers_in(self.streamed(pieces, version="1.0"))[0]
        self.assertEqual(new.headers["transfer-encoding"], "chunked")
        self.assertNotIn("transfer-encoding", old.headers)
        self.assertEqual(old.headers["connection"], "close")
        for answer in (new, old):
            self.assertNotIn("content-length", answer.headers)
            self.assertEqual(answer.headers["content-type"], "text/event-stream; charset=utf-8")
            self.assertEqual(answer.headers["cache-control"], "no-cache")
            self.assertEqual(answer.headers["x-accel-buffering"], "no")
            self.assertEqual(answer.events[-1], "[DONE]")
            self.assertEqual(completion_from_chunks(answer.chunks)["message"]["content"], "Hello")

    def test_events_that_arrive_together_leave_together(self):
        head, _, body = self.streamed([sse(events_of(message(text("one two three")), 4))]).partition(b"\r\n\r\n")
        chunks, rest = chunks_in(body)
        self.assertEqual(rest, b"")
        self.assertLessEqual(len(chunks), 3)            # everything; what the end adds; [DONE]
        self.assertEqual(chunks[0].count(b"data: "), 2)     # the role, all of the text

    def test_text_that_arrives_together_is_one_chunk_unless_the_client_asks_for_obfuscation(self):
        for asked, count in ((None, 1), (False, 1), (True, 4)):
            with self.subTest(asked=asked):
                self.claude.play(FakeReply(pieces=[sse(events_of(message(text("one two three")), 4))]))
                answer = self.chat(stream=True, stream_options={"include_obfuscation": asked})
                texts = [chunk["choices"][0]["delta"].get("content") for chunk in answer.chunks]
                self.assertEqual("".join(filter(None, texts)), "one two three")
                self.assertEqual(len(list(filter(None, texts))), count)

    def test_line_separators_inside_text_reach_the_client_escaped(self):
        words = "a\u2028b\u2029c\x85d"
        for stream in (False, True):
            with self.subTest(stream=stream):
                self.claude.play(message(text(words)))
                answer = self.chat(stream=stream)
                told = completion_from_chunks(answer.chunks)["message"] if stream else answer.message
                self.assertEqual(told["content"], words)
                for character in "\u2028\u2029\x85":
                    self.assertNotIn(character.encode("utf-8"), answer.raw)

    def test_a_failure_in_mid_stream_is_an_error_event_a_proper_end_and_no_done(self):
        events = events_of(message(text("Hello, world")))
        refused = sse(events[:5] + [error_body("overloaded_error", "Busy")])
        for name, reply in (("broken off", FakeReply(pieces=[sse(events[:5])], cut=True)),
                            ("no message_stop", FakeReply(pieces=[sse(events[:-1])])),
                            ("error event", FakeReply(pieces=[refused]))):
            with self.subTest(name):
                self.claude.play(reply)
                connection = self.connect()
                connection.sendall(chat_bytes(body=CHAT_BODY[:-1] + b',"stream":true}') + NEXT_REQUEST)
                answer, = answers_in(received_until(connection, b"never"))
                self.assertEqual(answer.status, 200)
                self.assertEqual(set(json.loads(answer.events[-1])), {"error"})
                self.assertNotIn("[DONE]", answer.events)

    def test_headers_of_claude_cannot_inject_headers_or_a_body(self):
        for name in ("request-id", "retry-after", "anthropic-ratelimit-requests-limit",
                     "anthropic-ratelimit-requests-reset"):
            for value in ("a\r\n x-evil: 1", "a\r\n\tx-evil: 1\r\n \r\n <html>", "a\rx-evil: 1", "a\nx-evil: 1", "a\0b",
                          "\xe9\x85", "a" * 5_000):
                for status in (200, 429):
                    with self.subTest(name=name, value=value[:20], status=status):
                        self.claude.play(FakeReply(status, {name: value}, message(text("Hi")) if status == 200
                                                   else error_body("rate_limit_error", "Slow down")))
                        answers = self.exchanged(chat_bytes("Connection: close", "x-stainless-retry-count: 1"))
                        self.assertEqual([answer.status for answer in answers], [status])
                        self.assertNotIn("x-evil", answers[0].headers)
                        self.assertLess(max(len(value) for value in answers[0].headers.values()), 1_000)

    def test_no_header_of_an_answer_can_inject_another(self):
        self.addCleanup(claude_gateway.ROUTES["/health"].update, dict(claude_gateway.ROUTES["/health"]))
        claude_gateway.ROUTES["/health"]["GET"] = lambda *_: claude_gateway.Reply({}, {"x-odd": "a\r\nx-evil: b\0"})
        answer = self.ask("GET", "/health")
        self.assertEqual((answer.status, answer.headers["x-odd"]), (200, "a  x-evil: b "))
        self.assertNotIn("x-evil", answer.headers)

    def test_the_clients_request_id_and_path_cannot_inject_headers(self):
        answer = self.ask("GET", "/v1/models/x%0d%0aX-Evil:%201", headers={"x-request-id": "mine"})
        self.assertEqual(answer.status, 404)
        self.assertNotIn("x-evil", answer.headers)


# ---- Simulated upstream -----------------------------------------------------------------------------

def outcome_of(arguments, environment, typed) -> SimpleNamespace:
    """What `main` does: code, out and err.  In this process, as each process of its own costs 0.15 s."""
    log, out, err = claude_gateway.LOG, io.StringIO(), io.StringIO()
    kept = dict(os.environ), sys.stdin, log.handlers[:], log.level, log.propagate
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = io.TextIOWrapper(io.BytesIO(typed.encode()), "utf-8")
    watchdog = threading.Timer(60, os.kill, (os.getpid(), signal.SIGTERM))  # a `start` that should not have started
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


def run_command(*arguments, given=b"", **variables):
    """A command with a bare environment: (exit code, standard output, standard error)."""
    with tempfile.TemporaryDirectory() as home:
        done = outcome_of(arguments, bare_environment(home, variables), given.decode())
    return done.code, done.out, done.err


# how a user starts it: Python compiles it every time; on Windows it could not be sent a signal
BY_PATH = (sys.executable, PROGRAM) if os.name == "posix" else None
# No process can send another one a signal there: the child looks for a file with the number and sends it to itself.
SIGNALS_BY_FILE = """
import os, signal, threading, time
def watch(path):
    while True:
        time.sleep(0.05)
        if os.path.exists(path):
            with open(path) as file: number = int(file.read())
            os.remove(path)
            signal.raise_signal(number)
threading.Thread(target=watch, args=(%r + str(os.getpid()),), daemon=True).start()
"""


def compiled() -> tuple:
    """How to start the program, as if by its path."""
    signals = SIGNALS_BY_FILE % os.path.join(shared_folder(), "") if os.name == "nt" else ""
    return (sys.executable, "-c", imported() + signals + "sys.argv.pop(0)\nsys.exit(claude_gateway.main())", PROGRAM)


def run_process(*arguments, **variables):
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as home:
        ended = subprocess.run([*compiled(), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=bare_environment(home, variables), cwd=home, timeout=120)
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


def bare_environment(home: str, variables: dict) -> dict:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT", "TEMP")}
    return dict(kept, HOME=home, PYTHONDONTWRITEBYTECODE="1", **variables)


def free_port() -> str:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Child:
    """A command under way: what it has said so far, and ways to wait."""

    def __init__(self, program, arguments, environment, directory, stdin=subprocess.PIPE) -> None:
        self.process = subprocess.Popen([*program, *arguments], env=environment, cwd=directory,
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
        return self._said["out"].decode("utf-8", "replace").replace("\r\n", "\n")

    @property
    def err(self) -> str:
        return self._said["err"].decode("utf-8", "replace").replace("\r\n", "\n")

    def wait_for(self, pattern, name="err"):
        """The first match in what was said."""
        def found():
            return re.search(pattern, getattr(self, name))
        with self._news:
            self._news.wait_for(lambda: found() or self.process.poll() is not None, 20)
        for reader in self._readers if not found() and self.process.poll() is not None else ():
            reader.join(30)
        if not found():
            raise AssertionError("no %r in %r; on stderr: %s" % (pattern, getattr(self, name), self.err))
        return found()

    @property
    def port(self) -> int:
        return int(self.wait_for(r"(?m)^.* on http://(?:127\.0\.0\.1|localhost):(\d+)/v1$", "out").group(1))

    def type(self, words: str) -> None:
        self.process.stdin.write(words.encode())
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        if os.name == "posix":
            self.process.send_signal(number)
            return
        path = os.path.join(shared_folder(), str(self.process.pid))
        pathlib.Path(path + ".new").write_text(str(int(number)), "utf-8")
        os.replace(path + ".new", path)

    def end(self, number=None) -> int:
        """The exit code, after this signal if there is one."""
        if number is not None:
            self.signal(number)
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        for reader in self._readers:                            # they end with the process
            reader.join(20)
        return self.process.wait(20)

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
        bound = socket.socket()                     # and never listens, so nobody else does
        self.addCleanup(bound.close)
        bound.bind(("127.0.0.1", 0))
        self.closed_port = bound.getsockname()[1]

    def environment(self, variables) -> dict:
        kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "TEMP", "TMP") if name in os.environ}
        # `status` shall find no gateway that happens to run on this machine
        usual = {"HOME": self.home, "APPDATA": self.home, "PYTHONDONTWRITEBYTECODE": "1",
                 "CLAUDE_GATEWAY_PORT": str(self.closed_port)}
        return {name: value for name, value in dict(kept, **dict(usual, **variables)).items() if value is not None}

    def child(self, *arguments, stdin=subprocess.PIPE, program=None, **variables) -> Child:
        child = Child(program or compiled(), arguments, self.environment(variables), self.working_directory, stdin)
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
        self.claude.play(FakeReply(pieces=[release, sse(events_of(message(text("At last"))))]))
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
        self.assertTrue(eventually(lambda: len(self.claude.messages) > arrived), "the request never arrived upstream")
        return thread, answers


class DemoTests(CommandTestCase):
    """`start --demo`: one process for all tests, with every credential there is, none of which may be used."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        home = tempfile.TemporaryDirectory()
        cls.addClassCleanup(home.cleanup)
        cls.demo = Child(compiled(), ["start", "--demo", "-p", "0"], bare_environment(home.name, {
            "ANTHROPIC_API_KEY": SECRET, "ANTHROPIC_AUTH_TOKEN": SECRET, "ANTHROPIC_BASE_URL": cls.claude.url,
            "HTTPS_PROXY": cls.claude.url}), home.name)
        cls.addClassCleanup(cls.demo.close)

    def setUp(self):
        super().setUp()
        self.service = SimpleNamespace(port=self.demo.port)

    def tearDown(self):
        self.assertEqual(self.claude.requests, [], "the demo asked a real address")
        super().tearDown()

    def test_it_has_limits_and_cached_tokens_to_show(self):
        turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user",
                                                                                          "content": "C"}]
        self.chat(messages=turns[:1])
        usage = self.chat(messages=turns).json["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.assertTrue(0 < cached < usage["prompt_tokens"], usage)
        data = self.ask("GET", "/", headers={"accept": "application/json"}).json
        self.assertEqual((data["upstream"], [limit["window"] for limit in data["limits"]]), ("simulated", ["5h", "7d"]))
        for limit in data["limits"]:
            self.assertGreater(limit["resets_at"], time.time() - 60)
        self.assertIn("Demo: answers, tokens, costs and limits are simulated", self.demo.err)

    def test_a_long_prompt_that_comes_again_is_read_from_the_cache(self):
        usages = [self.chat(messages=[{"role": "system", "content": "A long text. " * 500},
                                      {"role": "user", "content": question}]).json["usage"]
                  for question in ("First?", "Second?", "Second?")]
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
        self.assertEqual(cached[0], 0)
        self.assertGreater(cached[1], 1_500)
        self.assertEqual(cached[2], usages[2]["prompt_tokens"])

    def test_it_says_at_the_start_that_it_is_a_demo(self):
        self.demo.wait_for("(?i)demo.*simulated")

    def test_a_plain_answer_says_that_it_is_simulated(self):
        answer = self.chat("What is up?")
        self.assertEqual(answer.status, 200)
        self.assertIn("simulated", answer.message["content"])
        self.assertIn("What is up?", answer.message["content"])
        self.assertIn("simulated", answer.headers["x-request-id"])

    def test_a_stream_comes_in_pieces_and_adds_up_to_the_same_kind_of_answer(self):
        answer = self.chat("Hi", stream=True, stream_options={"include_usage": True, "include_obfuscation": True})
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

    def test_a_json_object_asked_for_in_words_is_bare(self):
        for fields in ({}, {"verbosity": "low"}, {"stream": True}):
            with self.subTest(fields=fields):
                answer = self.chat("Answer in JSON", response_format={"type": "json_object"}, **fields)
                whole = completion_from_chunks(answer.chunks) if "stream" in fields else completion_parts(answer.json)
                said = json.loads(whole["message"]["content"])
                self.assertIs(said["simulated"], True)
                self.assertIn("Answer in JSON", said["answer"])

    def test_a_schema_given_in_words_is_kept_to(self):
        schema = {"type": "object", "required": ["size"], "properties": {"size": {"type": "integer"}}}
        answer = self.chat(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
                           web_search_options={}, verbosity="low")          # a search excludes answer formats
        self.assertEqual(json.loads(answer.message["content"]), {"size": 1})

    def test_a_fault_of_the_simulation_is_one_line(self):
        upstream = claude_gateway.SimulatedUpstream()
        self.addCleanup(upstream.server_close)
        self.addCleanup(upstream.shutdown)
        host, port = upstream.server_address[:2]
        shown = io.StringIO()
        with self.assertLogs(claude_gateway.LOG, "ERROR") as logged, contextlib.redirect_stderr(shown), \
                contextlib.closing(socket.create_connection((host, port), 5)) as connection:
            connection.sendall(b"POST /v1/messages HTTP/1.1\r\n\r\n")    # no length: its handler crashes
            self.assertEqual(connection.recv(100), b"")
            self.assertTrue(eventually(lambda: logged.records))     # it hangs up just before it tells
        self.assertEqual((len(logged.output), shown.getvalue()), (1, ""))
        self.assertIn("the simulation failed: TypeError", logged.output[0])

    def test_the_native_door_is_answered_too(self):
        request = {"model": "sonnet", "max_tokens": 99, "messages": [{"role": "user", "content": "Hi there"}]}
        plain = self.ask("POST", "/v1/messages", request)
        self.assertEqual((plain.status, plain.json["type"], plain.json["stop_reason"]), (200, "message", "end_turn"))
        self.assertIn("You wrote: Hi there", plain.json["content"][-1]["text"])
        stream = self.ask("POST", "/v1/messages", dict(request, stream=True))
        kinds = [json.loads(event)["type"] for event in stream.events]
        self.assertEqual((stream.status, kinds[0], kinds[-1]), (200, "message_start", "message_stop"))
        counted = self.ask("POST", "/v1/messages/count_tokens", {name: request[name] for name in ("model", "messages")})
        self.assertEqual((counted.status, list(counted.json)), (200, ["input_tokens"]))
        self.assertGreater(counted.json["input_tokens"], 5)
        of_response = self.ask("POST", "/v1/responses/input_tokens", {"model": "sonnet", "input": "Hi there"})
        self.assertEqual(of_response.status, 200)
        self.assertGreater(of_response.json["input_tokens"], 5)

    def test_what_it_cannot_read_is_refused_not_dropped(self):
        for messages in ([], "Hi", [{"role": "user"}], [{"role": "user", "content": [1]}], [1]):
            with self.subTest(messages=messages):
                answer = self.ask("POST", "/v1/messages", {"model": "sonnet", "max_tokens": 9, "messages": messages})
                self.assertEqual((answer.status, answer.json["error"]["type"]), (400, "invalid_request_error"))

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

    def test_its_status_says_what_it_is(self):
        said = self.command("status", "--port", str(self.demo.port)).out
        self.assertIn("Upstream:    the built-in simulation\n", said)

    def test_it_has_models(self):
        ids = [entry["id"] for entry in self.ask("GET", "/v1/models").json["data"]]
        self.assertIn("claude-sonnet-5-5", ids)


# ---- Log --------------------------------------------------------------------------------------------

class LogTests(GatewayTestCase):
    def test_the_log_adds_up_a_compaction_and_the_answer_behind_it(self):
        usage = {"input_tokens": 5, "cache_read_input_tokens": 20, "output_tokens": 3}
        self.claude.play(*[message(text("x"), usage=usage) for _ in range(2)])
        self.claude.input_tokens = 1_500
        history = [{"role": role, "content": "x " * 1_000} for role in ("user", "assistant", "user")]
        with self.assertLogs(claude_gateway.LOG, "INFO") as caught:
            self.ask("POST", "/v1/responses", {"model": "opus", "input": history, "context_management": [
                {"type": "compaction", "compact_threshold": 1_000}]})
            self.service.gateway.running.wait_until_idle(30)
        fields = next(record.fields for record in caught.records
                      if getattr(record, "fields", {}).get("path") == "/v1/responses")
        self.assertEqual([fields[name] for name in ("input_tokens", "cached_tokens", "output_tokens")], [50, 40, 6])

    def formatted(self, work) -> str:
        """The log in text that some work leaves behind."""
        shown, log = io.StringIO(), claude_gateway.LOG
        handler = logging.StreamHandler(shown)
        handler.setFormatter(claude_gateway.LogFormatter(list, False))
        for undo in ((log.removeHandler, handler), (log.setLevel, log.level)):
            self.addCleanup(*undo)
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        work()
        log.removeHandler(handler)
        return shown.getvalue()

    FORGED = "a\n00:00:00 POST /forged 200 \x1b[2J\r\x07\x7f\x9b31m \u202e \u2066 \u200f \u2028 \x85 \ud800"

    def test_no_line_of_the_log_is_forged_and_none_controls_a_terminal(self):
        def everywhere():
            self.claude.play(refusal_of_claude(400, "invalid_request_error", self.FORGED + " temperature"))
            self.claude.strict = False
            self.chat(self.FORGED.replace("\ud800", ""), temperature=0.5)
            self.claude.play(FakeReply(body=message(text(self.FORGED)), headers={"request-id": "req\x1b[2J\x9b31m"}))
            self.ask("POST", "/v1/messages", {"model": "claude-opus-5-5", "max_tokens": 9, "messages": [
                {"role": "user", "content": "Hi"}]})
            self.service.gateway.running.wait_until_idle(30)
            claude_gateway.LOG.warning("somebody says %s", self.FORGED)
            try:
                raise ValueError(self.FORGED)
            except ValueError as fault:
                claude_gateway.unexpected(fault)
        shown = self.formatted(everywhere)
        self.assertIn("/forged", shown)
        self.assertNotRegex(shown, "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200f\u2028\u202e\u2066\ud800]")
        self.assertNotRegex(shown, "(?m)^00:00:00")
        self.assertIn("a\\n00:00:00 POST /forged 200 \\x1b[2J\\r\\x07\\x7f\\x9b31m \\u202e", shown)
        self.assertIn("\n    Traceback", shown)

    def test_what_commands_say_controls_no_terminal_either(self):
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            claude_gateway.say("Warning: %s" % self.FORGED.replace("\n", ""))
        self.assertNotRegex(shown.getvalue(), "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200f\u2028\u202e\u2066\ud800]")
    def test_a_narrow_terminal_gets_one_line_a_request(self):
        record = claude_gateway.Record(
            "POST", "/v1/chat/completions", tool="aider", status=200, asked="opus", used="claude-opus-5-5", stream=True,
            first_byte_ms=521, total_ms=1682, input_tokens=118918, cached_tokens=118010, cached_percent_of_all=48,
            output_tokens=388, request_id="req_011CV")
        with self.assertLogs(claude_gateway.LOG, "INFO") as logged:
            for each in (record, claude_gateway.Record("GET", "/v1/models", tool="-", status=404,
                                                       error="Not here: --allow-host x")):
                claude_gateway.log_request_record(each, Config())
        for columns, lines in ((80, ["200 chat/completions aider opus-5-5 118918>388 99% 1.7s",
                                     "404 GET models - 0.0s  Not here: --allow-host x"]),
                               (150, ["200 chat/completions ", "404 GET models "]),     # all of them look the same
                               (200, ["POST /v1/chat/completions 200  aider          opus -> ", "GET  /v1/models"]),
                               (0, ["POST /v1/chat/completions 200  aider          opus -> ", "GET  /v1/models"])):
            formatter = claude_gateway.LogFormatter(list, False, columns=lambda: columns)
            for entry, line in zip(logged.records, lines):
                shown = formatter.format(entry)
                self.assertTrue(shown[9:].startswith(line), shown)
                self.assertTrue(columns != 80 or len(shown) <= 80, shown)
        self.assertIn("opus -> claude-opus-5-5", claude_gateway.LogFormatter(
            list, True, columns=lambda: 80).format(logged.records[0]))       # JSON is for programs

    def test_the_width_is_that_of_the_terminal(self):
        try:
            import fcntl
            import pty
            import termios
        except ImportError:
            self.skipTest("no pseudo terminals here")
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\0\x48\0\0\0\0\0")
        log = claude_gateway.LOG
        self.addCleanup(log.setLevel, log.level)
        for name in ("handlers", "propagate"):
            self.addCleanup(setattr, log, name, getattr(log, name))
        with os.fdopen(slave, "w") as terminal, contextlib.redirect_stderr(terminal):
            self.assertEqual(claude_gateway.columns_of_terminal(), 72)
            for minimal, line in ((True, b" GET  /v1/models           200 3 ms"), (False, b" 200 GET models ")):
                claude_gateway.set_up_log(Config(minimal=minimal))
                claude_gateway.log_request_record(claude_gateway.Record("GET", "/v1/models", status=200, total_ms=3),
                                                  Config(minimal=minimal))
                self.assertIn(line, os.read(master, 1_000))
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(claude_gateway.columns_of_terminal(), 0)

    def test_the_debug_log_shows_both_sides_of_a_stream_too(self):
        log = claude_gateway.LOG
        self.addCleanup(log.setLevel, log.level)
        with self.assertLogs(log, "DEBUG") as caught:
            self.claude.play(message(text("Wie immer")))
            self.chat("Guten Tag", stream=True)
            self.ask("GET", "/health")
            self.ask("GET", "/", headers={"accept": "text/html"})
            self.service.gateway.running.wait_until_idle(30)
        told = {entry.msg.split(":")[0]: entry.args for entry in caught.records if isinstance(entry.args, dict)}
        self.assertIn("Guten Tag", json.dumps(told["from the client"]))
        self.assertIn("Guten Tag", json.dumps(told["to Claude"]))
        self.assertIn("Wie immer", json.dumps(told["from Claude"]))
        self.assertEqual(told["to the client"]["status"], "ok")     # of the page there is nothing to show


class LogLevelTests(CommandTestCase):
    def test_every_line_of_a_request_has_its_id_and_invalid_json_is_shown(self):
        child = self.serve("-V")
        for question in ("One", "Two"):
            self.claude.play(message(text(question)))
            self.chat(question)
        self.ask("POST", "/v1/chat/completions", b'{"model": "sonnet", oops')
        child.end(signal.SIGTERM)
        ids = {words: set(re.findall(r"\[([0-9a-f]{4})\] .*%s" % words, child.err)) for words in ("One", "Two", "oops")}
        self.assertEqual([len(found) for found in ids.values()], [1, 1, 1])
        self.assertEqual(len(set.union(*ids.values())), 3)
        self.assertRegex(child.err, r"\[%s\] from the client, invalid: b'.*oops'" % ids["oops"].pop())
        self.assertRegex(child.err, r"\[%s\] POST /v1/chat/completions 200 " % ids["One"].pop())

    def test_quiet_says_nothing_but_the_address(self):
        child, release = self.serve("-q"), self.slow_answer()
        self.chat(nonsense=1, headers={"x-api-key": "k"}, messages="none")
        thread, _ = self.in_flight()
        child.signal(signal.SIGTERM)
        for _ in range(1_000):                                  # it is stopping when it accepts nothing more
            try:
                socket.create_connection(("127.0.0.1", self.service.port), 5).close()
            except OSError:
                break
            thread.join(0.01)
        release.set()
        self.assertEqual((child.end(), child.err), (0, ""))
        self.assertIn("http://127.0.0.1:", child.out)

    def test_looking_at_the_gateway_is_logged_in_full_only(self):
        for level in ((), ("-m",), ("-V",)):
            with self.subTest(level=level):
                child = self.serve(*level)
                for path in ("/", "/metrics", "/health?why=not", "/nowhere"):
                    self.ask("GET", path)
                self.ask("POST", "/", {})
                child.end(signal.SIGTERM)
                self.assertEqual(bool(re.search(r"GET +/(metrics)? +200|GET +/health +200", child.err)),
                                 level == ("-V",))
                self.assertRegex(child.err, r"GET +/nowhere +404")
                self.assertRegex(child.err, r"POST +/ +405")        # what was refused is told

    def test_each_level_logs_what_it_promises(self):
        levels = ((), ("-m",), ("-V",), ("--log-format", "json", "--alias", "foo=sonet"))
        children = [self.child("start", "-p", "0", "--host", "127.0.0.1", *level, ANTHROPIC_API_KEY=SECRET,
                               ANTHROPIC_BASE_URL=self.claude.url) for level in levels]
        for child in children:
            self.service = SimpleNamespace(port=child.port)
            self.claude.play(message(text("Words of the answer"), model="claude-sonnet-5-5"))
            self.chat("Words of the request", seed=5)
            child.signal(signal.SIGTERM)
        for level, child in zip(levels, children):
            with self.subTest(level):
                child.end()
                lines = [line for line in child.err.strip().split("\n") if "Stopping" not in line]  # may come between
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
                elif "json" in level:
                    entry = json.loads(lines[about[0]])
                    self.assertEqual((entry["level"], entry["status"], entry["path"]),
                                     ("info", 200, "/v1/chat/completions"))
                    entries = [json.loads(line) for line in child.err.strip().split("\n")]     # all of them
                    self.assertEqual(sum("seed" in json.dumps(entry) for entry in entries), 1)
                    self.assertEqual([entry["level"] for entry in entries if "foo=" in entry["message"]], ["warning"])
                    self.assertTrue(any(entry["message"].startswith("Paste into your tool") for entry in entries))


def forms_of(secret: str) -> set:
    """How a secret can lie in a text: as it is, in an address, and inside base64 at any of three offsets."""
    forms = {secret, urllib.parse.quote(secret, safe="")}
    for offset in range(3):
        inside = base64.b64encode(b"\0" * offset + secret.encode()).decode()[4 if offset else 0:]
        forms.add(inside[:len(inside) // 4 * 4 - 4])
    return forms


class SecrecyTests(CommandTestCase):
    def assert_hidden(self, text, secrets, where):
        for secret in secrets:
            for form in forms_of(secret):
                self.assertNotIn(form, text, "%s shows %s" % (where, secret))

    def test_a_secret_is_masked_before_anything_is_cut_and_in_every_spelling(self):
        secrets = ["long" * 200, 'quo"te\\d', "schl\u00fcssel"]
        for as_json in (False, True):
            formatter = claude_gateway.LogFormatter(lambda: secrets, as_json)
            record = claude_gateway.LOG.makeRecord("x", 10, "x", 1, "to Claude: %s", (
                {"a": "long" * 200, "b": 'quo"te\\d', "c": "schl\u00fcssel", "d": "A" * 500},), None)
            told = formatter.format(record)
            for part in ("longlong", "quo", "schl"):
                self.assertNotIn(part, told)
            self.assertIn("A" * 60 + "...", told)
        record = claude_gateway.LOG.makeRecord("x", 20, "x", 1, "a line", (), None)
        record.fields = {"error": 'it said quo"te\\d', "status": 500}
        self.assertEqual(json.loads(formatter.format(record))["error"], "it said ***")

    def test_no_secret_is_in_any_log_or_answer(self):
        planted = ["sk-ant-oat01-planted-old", "sk-ant-ort01-planted-old", "sk-ant-oat01-planted-new",
                   "sk-ant-ort01-planted-new", "planted-client-key-1", "planted-client-key-2", "planted-proxy-word"]
        variants = [(), ("-m",), ("-q",), ("-V",), ("-V", "--log-format", "json")]

        def renew_once(recorded):
            if recorded.body["refresh_token"] == planted[1]:
                return token_answer(access_token=planted[2], refresh_token=planted[3])
            return FakeReply(400, body={"error": "invalid_grant"})
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
                self.claude.play(FakeReply(401, body=error_body("authentication_error", "OAuth token has expired.")),
                                 FakeReply(400, body=error_body("invalid_request_error", "No.")))
                answers += [self.chat(headers=right), self.chat(headers=right)]     # 401: a renewal that is refused
                self.assertEqual({answer.status for answer in answers} & {200, 401, 404, 400}, {200, 401, 404, 400})
                child.signal(signal.SIGTERM)
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
            with contextlib.suppress(OSError):      # on Windows it is enough to close it
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


# ---- Terminal ---------------------------------------------------------------------------------------

class TerminalTests(unittest.TestCase):
    def test_commands_are_named_as_they_can_be_typed(self):
        kept = sys.argv
        self.addCleanup(setattr, sys, "argv", kept)
        python = os.path.basename(sys.executable)
        for script, typed in (("/usr/bin/claude-gateway", "claude-gateway start"),
                              ("claude_gateway.py", python + " claude_gateway.py start"),
                              ("/my files/claude_gateway.py", python + ' "/my files/claude_gateway.py" start'),
                              ("other.py", "claude-gateway start"), ("", "claude-gateway start")):
            with self.subTest(script=script):
                sys.argv = [script]
                self.assertEqual(claude_gateway.as_typed("`claude-gateway start`, the claude-gateway"),
                                 "`%s`, the claude-gateway" % typed)

    def test_colours_can_be_switched_off_by_force(self):
        kept = dict(os.environ)
        self.addCleanup(os.environ.update, kept)
        for value, wanted in (("1", True), ("true", True), ("0", False), ("false", False), ("", False)):
            os.environ["FORCE_COLOR"] = value
            self.addCleanup(os.environ.pop, "FORCE_COLOR", None)
            self.assertIs(claude_gateway.wants_colour(io.StringIO()), wanted)


# ---- Options ----------------------------------------------------------------------------------------

class OptionTests(unittest.TestCase):
    CASES = (                                       # flags, variable, its value, field, by flag, by variable, default
        (("--port", "1"), "PORT", "2", "port", 1, 2, 45554), (("-p", "0"), "PORT", "2", "port", 0, 2, 45554),
        (("--host", "::1"), "HOST", "127.0.0.2", "host", "::1", "127.0.0.2", "localhost"),
        (("--host", "a", "--host", "b"), "HOST", "c,d", "hosts", ["a", "b"], ["c", "d"], ["localhost"]),
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
                 ({"ANTHROPIC_BASE_URL": "http://example.com"}, "ANTHROPIC_BASE_URL"),
                 ({"CLAUDE_GATEWAY_TOKEN_URL": "http://example.com/token"}, "CLAUDE_GATEWAY_TOKEN_URL"),
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

    def test_an_origin_is_what_a_browser_sends_or_a_usage_error(self):
        self.assertEqual(config_of("--cors-origin", "https://App.example.org/", "--cors-origin", "app://obsidian.md",
                                   "--cors-origin", "null", "--cors-origin", "*").cors_origin,
                         ("https://app.example.org", "app://obsidian.md", "null", "*"))
        for wrong in ("foo", "app.example.org", "https://a.example/page", "https://u@a.example", ""):
            with self.subTest(wrong), self.assertRaisesRegex(
                    claude_gateway.UsageError, "--cors-origin: expected an origin like https://app.example.com"):
                config_of("--cors-origin", wrong)

    def test_settings_that_have_no_effect_are_named(self):
        def ignored(**variables):
            return [re.sub(" is set, and is ignored.$", "", problem) for problem, _ in
                    claude_gateway.doubtful_settings(variables, config_of(**variables))]
        self.assertEqual(ignored(CLAUDE_GATEWAY_PORTS="1", CLAUDE_GATEWAY_PORT="1", ALL_PROXY="socks5://h",
                                 CLAUDE_GATEWAY_TOKEN_URL="https://x", HTTP_PROXY="http://h:1"),
                         ["CLAUDE_GATEWAY_PORTS", "ALL_PROXY", "HTTP_PROXY"])
        self.assertEqual(ignored(http_proxy="http://h:1"), ["HTTP_PROXY"])
        self.assertEqual(ignored(HTTP_PROXY="http://h:1", HTTPS_PROXY="http://h:1"), [])
        (_, advice), = claude_gateway.doubtful_settings({"CLAUDE_GATEWAY_PROT": "1"}, Config())
        self.assertEqual(advice, "Did you mean CLAUDE_GATEWAY_PORT?")
        self.addCleanup(setattr, claude_gateway.urllib.request, "getproxies", claude_gateway.urllib.request.getproxies)
        claude_gateway.urllib.request.getproxies = lambda: {"https": "http://u:word@of-the-system:1"}  # macOS
        self.assertEqual(ignored(), ["the system's proxy http://***@of-the-system:1"])
        self.assertEqual(ignored(all_proxy="socks5://h", http_proxy="http://h:1"),
                         ["ALL_PROXY", "HTTP_PROXY", "the system's proxy http://***@of-the-system:1"])

    def test_the_log_has_one_loudness(self):
        for flags, variables in ((("-V", "-q"), {}), (("-m", "-V"), {}), (("-q", "-m"), {}),
                                 ((), {"CLAUDE_GATEWAY_VERBOSE": "1", "CLAUDE_GATEWAY_QUIET": "1"})):
            with self.subTest(flags=flags):
                with self.assertRaisesRegex(claude_gateway.UsageError, r"--\w+ and --\w+ exclude each other"):
                    config_of(*flags, **variables)
        config = config_of("-q", CLAUDE_GATEWAY_VERBOSE="1")               # a flag wins over a variable
        self.assertEqual((config.quiet, config.verbose), (True, False))

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

    def test_without_a_key_only_this_machine_can_be_listened_to(self):
        for flags in (("--host", "0.0.0.0"), ("--host", "::"), ("--host", "192.0.2.7"),
                      ("--host", "gateway.example.com"), ("--cors-origin", "*")):
            with self.subTest(flags), self.assertRaisesRegex(claude_gateway.UsageError, "CLAUDE_GATEWAY_API_KEY"):
                claude_gateway.check_exposure(config_of(*flags))

    def test_its_own_address_is_known_in_every_spelling(self):
        for url, own in (("http://127.0.0.1:5123/v1", True), ("http://[::1]:5123", True),
                         ("http://localhost:5123", True), ("http://127.0.0.1:5124", False),
                         ("https://example.com:5123", False)):
            with self.subTest(url):
                self.assertEqual(claude_gateway.is_own_address(config_of("-p", "5123", ANTHROPIC_BASE_URL=url)), own)


# ---- Diagnosis --------------------------------------------------------------------------------------

class DoctorTests(GatewayTestCase):
    def test_doctor_finds_nothing_wrong_on_a_healthy_machine(self):
        self.claude.models = [{"id": "claude-haiku-5-5", "type": "model", "lifecycle": "active"}]
        code, said, _ = run_process("doctor", "--port", free_port(), "--live", ANTHROPIC_BASE_URL=self.claude.url,
                                    ANTHROPIC_API_KEY=SECRET)
        self.assertEqual(code, 0, said)
        for name in ("Python", "File", "Port", "Proxy", "Certificates", "DNS", "Upstream", "Clock", "Credential",
                     "Accepted", "Live call"):
            self.assertRegex(said, r"(?m)^ok +%s " % name)
        with open(PROGRAM, "rb") as file:
            self.assertIn(hashlib.sha256(file.read()).hexdigest(), said)
        self.assertIn("To paste into a bug report", said)
        self.assertNotIn(SECRET, said)

    def test_doctor_names_the_step_for_what_fails(self):
        taken = self.connect().getpeername()[1]     # the class's own gateway: told apart from a stranger
        stranger = str(urlsplit(self.claude.url).port)
        cases = (
            ({"ANTHROPIC_BASE_URL": self.claude.url}, ["--port", str(taken)], 3, "Credential", "login"),
            ({"ANTHROPIC_BASE_URL": "http://127.0.0.1:1", "ANTHROPIC_API_KEY": "k"}, ["--port", str(taken)], 5,
             "Upstream", "Check the network"),
            ({"ANTHROPIC_BASE_URL": self.claude.url, "ANTHROPIC_API_KEY": "k"}, ["--port", stranger], 4, "Port",
             "start --port"))
        for variables, arguments, wanted, name, step in cases:
            with self.subTest(name=name):
                code, said, _ = run_command("doctor", "--json", *arguments, **variables)
                finding = next(each for each in json.loads(said) if each["level"] == "failed")
                self.assertEqual((code, finding["name"]), (wanted, name), said)
                self.assertIn(step, finding["step"])
                self.assertNotIn(" (while ", finding["detail"])

    def test_doctor_goes_on_without_the_network(self):
        with contextlib.closing(socket.socket()) as unused, tempfile.TemporaryDirectory() as folder:
            unused.bind(("127.0.0.1", 0))           # bound, and nobody listens
            port = unused.getsockname()[1]
            path = os.path.join(folder, "tokens.json")
            expiry = int(time.time()) + 600
            claude_gateway.TokenFile(path).write(stored_token(expires_at=expiry, account={"email_address": "me@x.org"}))
            code, said, _ = run_command("doctor", "--json", "--live", "--port", free_port(), "--token-file", path,
                                        ANTHROPIC_BASE_URL="http://127.0.0.1:%d" % port)
        found = {finding["name"]: finding for finding in json.loads(said)}
        self.assertEqual(code, 5)
        self.assertIn("127.0.0.1 port %d: " % port, found["Upstream"]["detail"])
        self.assertEqual(found["Credential"]["level"], "ok")
        for words in (path, "renewed automatically", time.strftime("%Y-%m-%d %H:%M", time.localtime(expiry))):
            self.assertIn(words, found["Credential"]["detail"])
        self.assertNotIn("me@x.org", said)
        self.assertEqual((found["Skipped"]["level"], found["Skipped"]["detail"]),
                         ("warning", "the clock, whether Claude accepts the credential, the live calls"))
        for finding in found.values():
            self.assertEqual(bool(finding["step"]), finding["level"] != "ok", finding)
            self.assertEqual(bool(finding["code"]), finding["level"] == "failed", finding)

    def test_doctor_tells_a_login_that_is_over(self):
        for token, level, code in (({"refresh_token": ""}, "failed", 3), ({}, "ok", 0)):
            with self.subTest(token=token), tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "tokens.json")
                claude_gateway.TokenFile(path).write(stored_token(expires_at=1_700_000_000, **token))
                config = Config(token_file=path)
                finding = next(claude_gateway.credential_findings(config, SimpleNamespace(post_json=None)))
                self.assertEqual((finding.level, finding.code), (level, code))

    def doctor(self, **variables):
        """The findings of `doctor --json`, by name, and the exit code; nothing of it leaves this machine."""
        done = outcome_of(["doctor", "--json", "-p", free_port()], dict({
            "HOME": "/nowhere", "ANTHROPIC_BASE_URL": "http://127.0.0.1:1"}, **variables), "")
        return {finding["name"]: finding for finding in json.loads(done.out)}, done.code

    def test_doctor_goes_on_with_settings_that_are_wrong(self):
        found, code = self.doctor(CLAUDE_GATEWAY_PORT="", CLAUDE_GATEWAY_AUTH="x", HTTPS_PROXY="socks5://u:word@h:1")
        self.assertEqual((code, found["Settings"]["level"], found["Upstream"]["level"]), (2, "failed", "failed"))
        for variables, words in (({"HTTPS_PROXY": "socks5://u:word@h:1"}, "HTTPS_PROXY: SOCKS proxies"),
                                 ({"https_proxy": "http://u:word@h:x"}, "https_proxy: expected a URL"),
                                 ({"CLAUDE_GATEWAY_AUTH": "x"}, "CLAUDE_GATEWAY_AUTH: expected one of auto, api-key, "
                                                                "oauth, got 'x'."),
                                 ({"CLAUDE_GATEWAY_ALIAS": "a=b,c"}, "CLAUDE_GATEWAY_ALIAS: expected NAME=MODEL, got "
                                                                     "'c'."),
                                 ({"CLAUDE_GATEWAY_MINIMAL": "1", "CLAUDE_GATEWAY_QUIET": "1"}, "exclude each other")):
            with self.subTest(variables):
                parsed = claude_gateway.argument_parser().parse_args(["doctor"])
                config, wrong = claude_gateway.usable_config(parsed, variables)
                self.assertEqual([finding.level for finding in wrong], ["failed"])
                self.assertIn(words, wrong[0].detail)
                self.assertNotIn("word", wrong[0].detail.replace("password", ""))
        parsed = claude_gateway.argument_parser().parse_args(["doctor", "--port", "x"])
        self.assertEqual(claude_gateway.usable_config(parsed, {})[0].port, 45554)
        _, wrong = claude_gateway.usable_config(parsed, {"ALL_PROXY": "socks5://u:word@h:1"})
        self.assertEqual([(finding.level, finding.detail) for finding in wrong],
                         [("warning", "ALL_PROXY is set, and is ignored.")])

    def test_doctor_says_what_to_do_with_a_refused_credential(self):
        def refuse():
            raise claude_gateway.ClaudeError(401, {"type": "authentication_error", "message": "invalid x-api-key"})
        for credential, step in ((claude_gateway.ApiKey("k", "ANTHROPIC_API_KEY"), "Check ANTHROPIC_API_KEY at https"),
                                 (claude_gateway.BearerToken("t", "X", True), "Renew the token")):
            finding = claude_gateway.acceptance_finding(SimpleNamespace(credential=credential, models=refuse))
            self.assertTrue(finding.step.startswith(step), finding)
            self.assertIn("invalid x-api-key. Hint:", finding.detail)

    def test_keys_that_cannot_work_are_named(self):
        cases = (({"ANTHROPIC_API_KEY": "sk-proj-abc"}, "ANTHROPIC_API_KEY looks like a key of OpenAI"),
                 ({"ANTHROPIC_API_KEY": "sk-ant-oat01-x"}, "is an OAuth token: set CLAUDE_CODE_OAUTH_TOKEN"),
                 ({"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-api03-x"}, "is an API key: set ANTHROPIC_API_KEY"),
                 ({"ANTHROPIC_AUTH_TOKEN": "'abc'"}, "ANTHROPIC_AUTH_TOKEN begins or ends with a quotation mark"),
                 ({"ANTHROPIC_API_KEY": "  "}, "ANTHROPIC_API_KEY is set but empty"))
        for variables, words in cases:
            with self.subTest(variables):
                found = claude_gateway.doubtful_credentials(variables)
                self.assertEqual(len(found), 1)
                self.assertIn(words, found[0])
                parsed = claude_gateway.argument_parser().parse_args(["doctor"])
                self.assertIn(("warning", found[0]), [(finding.level, finding.detail) for finding in
                                                      claude_gateway.usable_config(parsed, variables)[1]])
        self.assertEqual(claude_gateway.doubtful_credentials({
            "ANTHROPIC_API_KEY": "sk-ant-api03-x", "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-x"}), [])

    def test_doctor_masks_the_proxys_credentials(self):
        code, said, _ = run_command("doctor", "--port", free_port(),
                                    HTTPS_PROXY="http://someone:proxy-password@127.0.0.1:1")
        self.assertIn("***@127.0.0.1:1", said)
        self.assertNotIn("proxy-password", said)
        for proxy, shown in (("someone:proxy-password@127.0.0.1:1", "http://***@127.0.0.1:1"),
                             ("http://proxy.test:1", "http://proxy.test:1, but not for the upstream: it is in")):
            config = Config(port=0, https_proxy=proxy, no_proxy="api.anthropic.com" if "test" in proxy else "")
            found = {finding.name: finding.detail for finding in claude_gateway.machine_findings(config)}
            self.assertIn(shown, found["Proxy"])

    def replaced(self, owner, name: str, value) -> None:
        self.addCleanup(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def test_doctor_warns_where_there_are_no_certificate_authorities(self):
        def none_at_all():
            raise FileNotFoundError(2, "No such file or directory")
        for name, context, level in (("none", lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "warning"),
                                     ("not even a place for them", none_at_all, "failed")):
            with self.subTest(name):
                self.replaced(ssl, "create_default_context", context)
                self.replaced(ssl, "get_default_verify_paths", lambda: SimpleNamespace(
                    capath=None, openssl_cafile="", openssl_capath=""))
                finding = claude_gateway.authorities_finding(Config())
                self.assertEqual((finding.level, bool(finding.code)), (level, level == "failed"))
                self.assertRegex(finding.step, "Install Certificates.command" if sys.platform == "darwin" else
                                 "ca-certificates.*SSL_CERT_FILE")

    def test_it_works_without_a_file_of_its_own(self):
        """From an archive, from standard input, and packed into a program."""
        with tempfile.TemporaryDirectory() as folder:
            source, archive = pathlib.Path(folder, "source"), os.path.join(folder, "gateway.pyz")
            source.mkdir()
            shutil.copy(PROGRAM, str(source))
            zipapp.create_archive(source, archive, main="claude_gateway:main")
            script = pathlib.Path(PROGRAM).read_bytes()
            nowhere = bare_environment(folder, {"ANTHROPIC_BASE_URL": "http://127.0.0.1:1"})
            for name, begin, given, path, hashed in (
                    ("archive", [archive], b"", ' "%s"' % archive, True),
                    ("standard input", ["-"], script, ' "/path/to/claude_gateway.py"', False),
                    ("frozen", ["-c", "import sys; sys.frozen = True\n" + compiled()[2], PROGRAM], b"", "", False)):
                with self.subTest(name):
                    def run(*arguments, begin=begin, given=given):
                        done = subprocess.run([sys.executable, *begin, *arguments], input=given, timeout=60,
                                              check=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder,
                                              env=nowhere)
                        self.assertNotIn(b"Traceback", done.stderr)
                        return done.stdout.decode()
                    found = {finding["name"]: finding for finding in json.loads(run("doctor", "--json", "-p",
                                                                                    free_port()))}
                    self.assertEqual(found["File"]["level"], "ok")
                    self.assertEqual("sha256" in found["File"]["detail"], hashed)
                    self.assertIn('"%s start' % path, run("setup", "systemd").replace(r"\\", "\\"))

    def test_doctor_notices_a_gateway_upstream(self):
        config = Config(base_url="http://127.0.0.1:%d" % self.service.port)
        upstream = claude_gateway.Upstream(config, "")
        self.addCleanup(upstream.close)
        found = {finding.name: finding for finding in claude_gateway.network_findings(config, upstream)}
        self.assertEqual((found["Upstream"].level, found["Clock"].level), ("warning", "ok"))
        self.assertIn("is a claude-gateway itself", found["Upstream"].detail)


class UntrustedUpstreamTests(TlsTestCase):
    def test_doctor_names_who_issued_a_certificate_that_is_not_trusted(self):
        with RawUpstream(context=self.context) as upstream:
            code, said, _ = run_command("doctor", "--port", free_port(), ANTHROPIC_BASE_URL=upstream.url)
        self.assertEqual(code, 5)
        self.assertIn("The certificate was issued by upstream.test.", said)
        self.assertRegex(said, r"-> SSL_CERT_FILE=/path/to/the/company-ca.pem claude-gateway doctor")
        self.assertEqual(claude_gateway.issuer_of("127.0.0.1", 9), "")     # nobody there


# ---- Selftest ---------------------------------------------------------------------------------------

class SelftestTests(unittest.TestCase):
    def test_selftest_passes_without_network_and_credential(self):
        code, said, _ = run_command("selftest", HTTPS_PROXY="http://127.0.0.1:1")
        self.assertEqual((code, re.findall(r"(?m)^ok +(\w+)", said)),
                         (0, ["plain", "streaming", "tools", "image", "error", "cancel"]))
        self.assertTrue(said.endswith("\nAll 6 checks passed.\n"))
        self.assertNotRegex(said, r"(?m) $")


# ---- Signing in -------------------------------------------------------------------------------------

TOKEN_FIELDS = ["access_token", "expires_at", "expires_in", "refresh_token", "scope", "token_type"]


def challenge_of(code_verifier: str) -> str:
    """PKCE's S256, written down once more."""
    return base64.urlsafe_b64encode(hashlib.sha256(code_verifier.encode()).digest()).decode().rstrip("=")


class LoginCommandTests(CommandTestCase):
    def begin(self, *arguments, **variables):
        """A login that waits for its code, and the query of the address it shows."""
        child = self.child("login", "--no-browser", *arguments, CLAUDE_GATEWAY_TOKEN_URL=self.token_url, **variables)
        address = child.wait_for(r"https://claude\.com/cai/oauth/authorize\?(\S+)")
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
        if os.name == "posix":
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
            for words in ("2026-10-01", "intermediate", "unmodified", "terms", "API key", "always fine", "client id",
                          "redirect page", "system block"):
                self.assertIn(words, said)
        self.assertLess(child.err.index("2026-10-01"), child.err.index("https://claude.com/cai/oauth/authorize"))

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
        cases = (("the-code#of-another-sign-in\n", 3), ("\n", 3), ("", 3), ("https://[broken\n" * 3, 1),
                 (("%s?error=access_denied\n" % REDIRECT_PAGE) * 4, 1))
        done = self.commands(*[(["login", "--no-browser"], {"CLAUDE_GATEWAY_TOKEN_URL": self.token_url}, paste)
                               for paste, _ in cases])
        for child, (paste, code) in zip(done, cases):
            with self.subTest(paste):
                self.assertEqual(child.code, code, child.err)
        self.assertEqual(self.claude.requests, [])
        self.assertFalse(os.path.exists(self.token_path))

    def test_a_wrong_or_refused_code_may_be_entered_again(self):
        self.claude.token_replies += [FakeReply(400, body={"error": "invalid_grant"}), token_answer()]
        child, query = self.begin()
        child.type("the-code#of-another\n")
        child.wait_for("belongs to another sign-in")
        child.type("'old-code#%s'\n" % query["state"])
        child.wait_for("refused the code .*invalid_grant. Open the URL again")
        child.type('"the-code#%s"\n' % query["state"])
        self.assertEqual(child.end(), 0, child.err)
        self.assertEqual([request.body["code"] for request in self.claude.requests], ["old-code", "the-code"])
        self.assertRegex(child.err, r"Next: .*claude_gateway\.py start")
        done = self.command("login", "--no-browser", typed="a#b\nc#d\ne#f\nthe-code\n",
                            CLAUDE_GATEWAY_TOKEN_URL=self.token_url)
        self.assertEqual((done.code, len(self.claude.requests)), (1, 2))

    def test_the_address_and_the_scopes_can_follow_a_change(self):
        child = self.command("login", "--no-browser", CLAUDE_GATEWAY_AUTHORIZE_URL="https://new.test/authorize",
                             CLAUDE_GATEWAY_OAUTH_SCOPES="a b")
        self.assertRegex(child.err, r"https://new\.test/authorize\?\S*&scope=a\+b&")

    def test_an_api_key_is_checked_and_stored_and_forgotten(self):
        self.claude.models = [{"id": "claude-sonnet-5-5"}]
        key_path = self.token_path.replace(".json", "-api-key.json")
        self.claude.revoked.add("sk-ant-api03-wrong")
        for typed, code, words in (("\n", 3, "No API key"), ("sk-ant-api03-wrong\n", 1, "invalid x-api-key")):
            done = self.command("login", "--api-key", typed=typed, ANTHROPIC_BASE_URL=self.claude.url)
            self.assertEqual(done.code, code, done.err)
            self.assertIn(words, done.err)
            self.assertFalse(os.path.exists(key_path))
        done = self.command("login", "--api-key", typed='"%s"\n' % SECRET, ANTHROPIC_BASE_URL=self.claude.url)
        self.assertEqual(done.code, 0, done.err)
        self.assertRegex(done.err, "(?s)Claude accepts this key. Stored in .*Next: claude-gateway start|Next: ")
        self.assertNotIn(SECRET, done.err)
        if os.name == "posix":
            self.assertEqual(oct(os.stat(key_path).st_mode & 0o777), "0o600")
        self.assertEqual({request.path for request in self.claude.requests}, {"/v1/models?limit=1"})
        self.serve(ANTHROPIC_API_KEY=None)
        self.assertEqual(self.chat().status, 200)
        self.assertEqual(self.claude.messages[-1].headers["x-api-key"], SECRET)
        self.assertIn(key_path, self.command("status").out)
        self.sign_in()
        done = self.command("logout")
        self.assertEqual((done.code, os.path.exists(key_path), os.path.exists(self.token_path)), (0, False, False))

    def test_a_credential_of_the_environment_that_wins_is_named(self):
        self.claude.token_replies.append(token_answer())
        child = self.command("login", "--no-browser", typed="the-code\n", CLAUDE_GATEWAY_TOKEN_URL=self.token_url,
                             ANTHROPIC_API_KEY=SECRET)
        self.assertIn("Warning: API key from ANTHROPIC_API_KEY comes first; unset it", child.err)

    def test_a_refusal_is_told_in_the_endpoints_words_and_stores_nothing(self):
        cases = ((FakeReply(400, body={"error": "invalid_grant", "error_description": "Code expired"}), "Code expired"),
                 (FakeReply(429, body=error_body("rate_limit_error", "Slow down, please")), "Slow down, please"),
                 (FakeReply(403, body=b"<html>blocked</html>"), "403"), (FakeReply(200, body=b"<html>"), "200"))
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
            self.claude.token_replies.append(FakeReply(307, {"location": elsewhere.url + "/v1/oauth/token"}))
            child = self.command("login", "--no-browser", typed="the-code\n", CLAUDE_GATEWAY_TOKEN_URL=self.token_url)
            self.assertNotEqual(child.code, 0)
            self.assertEqual(elsewhere.requests, [])

    def test_a_place_that_cannot_be_written_is_named(self):
        self.claude.token_replies.append(token_answer())
        child = self.command("login", "--no-browser", "--token-file", os.path.join(PROGRAM, "tokens.json"),
                             typed="the-code\n", CLAUDE_GATEWAY_TOKEN_URL=self.token_url)
        self.assertEqual(child.code, 1)
        self.assertIn(os.path.join(PROGRAM, "tokens.json"), child.err)

    @POSIX_ONLY                                     # on Windows only a console interrupts a read
    def test_an_interrupt_at_the_prompt_is_exit_130_without_a_traceback(self):
        child, _ = self.begin()
        child.wait_for("Code: ")
        child.signal(signal.SIGINT)
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


# ---- Start ------------------------------------------------------------------------------------------

class StartTests(CommandTestCase):
    def test_the_address_is_the_one_line_on_standard_output(self):
        child = self.serve(host=("--host", "localhost"), program=BY_PATH)
        self.chat()
        self.assertEqual(child.end(signal.SIGTERM), 0)
        self.assertRegex(child.out, r"\Aclaude-gateway \d+\.\d+\.\d+ on http://localhost:%d/v1\n\Z"
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
        child.signal(signal.SIGTERM)
        child.wait_for("Stopping: waiting up to 30 seconds for 1 running request; a second Ctrl-C stops at once")
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
                thread, answers = self.in_flight()
                child.signal(number)
                child.wait_for("(?i)stopping")
                child.signal(number)
                thread.join(10)                     # it would wait for its answer twice as long
                self.assertEqual((thread.is_alive(), answers, child.end()), (False, [], code))
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

    @POSIX_ONLY
    def test_it_runs_without_standard_output_and_error(self):
        ended = subprocess.Popen(["sh", "-c", 'exec "$0" "$1" start --demo -p "$2" --host 127.0.0.1 >&- 2>&-',
                                  sys.executable, PROGRAM, str(self.free_port())], env=self.environment({}))
        self.addCleanup(ended.kill)

        def answers() -> bool:
            self.assertIsNone(ended.poll())
            with contextlib.suppress(OSError):
                return self.ask("GET", "/health").status == 200
            return False
        self.assertTrue(eventually(answers))
        ended.send_signal(signal.SIGTERM)
        self.assertEqual(ended.wait(20), 0)

    def free_port(self) -> int:
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.service = SimpleNamespace(port=probe.getsockname()[1])
        return self.service.port

    def test_on_all_addresses_the_pasted_one_is_no_address_of_this_page(self):
        for flags, pasted, named in (((), "ADDRESS-OF-THIS-MACHINE", True),
                                     (("--allow-host", "gateway.lan"), "gateway.lan", False)):
            with self.subTest(flags):
                child = self.child("start", "--demo", "-p", "0", "--host", "0.0.0.0", *flags,
                                   CLAUDE_GATEWAY_API_KEY="k")
                port = child.wait_for(r"on http://0\.0\.0\.0:(\d+)/v1", "out").group(1)
                child.wait_for("base URL http://%s:%s/v1 " % (pasted, port))
                self.assertEqual(child.end(signal.SIGTERM), 0)
                self.assertIn("Clients: an API key is required\n", child.err)
                self.assertEqual("--allow-host NAME" in child.err, named)

    def test_the_proxy_in_use_is_named_without_its_credentials(self):
        child = self.serve(ANTHROPIC_BASE_URL="https://upstream.test",
                           HTTPS_PROXY="http://someone:proxy-password@127.0.0.1:9")
        answer = self.chat(headers={"x-stainless-retry-count": "1"})
        child.end(signal.SIGTERM)
        self.assertIn("Proxy: http://***@127.0.0.1:9\n", child.err)
        self.assertIn("The proxy 127.0.0.1:9 could not be reached: ", answer.error["message"])
        self.assertNotIn("proxy-password", child.err)

    def test_on_a_terminal_a_first_start_asks_first(self):
        try:
            import pty
        except ImportError:
            self.skipTest("no pseudo terminals here")
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        child = self.child("start", "--port", "0", stdin=slave)
        os.close(slave)
        child.wait_for(r"No credential\. Sign in with a Claude account now\? \[y/N\] ")
        os.write(master, b"\n")
        self.assertEqual(child.end(), 3)
        self.assertRegex(child.err, r"No credential\. Set ANTHROPIC_API_KEY, or run")
        self.assertNotIn("claude.ai", child.err)

    def test_several_hosts_share_one_port(self):
        child = self.serve(host=("--host", "localhost", "--host", "127.0.0.2"), CLAUDE_GATEWAY_CORS_ORIGINS="x")
        for address in ("127.0.0.1", "127.0.0.2"):
            with contextlib.closing(http.client.HTTPConnection(address, child.port, timeout=10)) as connection:
                connection.request("GET", "/health")
                self.assertEqual(connection.getresponse().status, 200)
        self.assertIn("Warning: CLAUDE_GATEWAY_CORS_ORIGINS is set, and is ignored. Did you mean "
                      "CLAUDE_GATEWAY_CORS_ORIGIN?", child.err)
        self.assertIn("No gateway answers", self.command("status", "--host", "127.0.0.3", "-p", str(child.port)).out)
        self.assertIn("is running.", self.command("status", "--host", "127.0.0.2", "-p", str(child.port)).out)
        second = self.command("start", "--demo", "--host", "127.0.0.3", "--host", "127.0.0.2", "-p", str(child.port))
        self.assertEqual(second.code, 4)
        exposed = self.command("start", "--demo", "--host", "localhost", "--host", "192.0.2.7")
        self.assertEqual(exposed.code, 2)
        self.assertIn("--host 192.0.2.7 can be reached from other machines", exposed.err)

    def test_messages_name_the_program_as_it_was_typed(self):
        child = self.serve("-V", ANTHROPIC_API_KEY=None, CLAUDE_CODE_OAUTH_TOKEN=None, CLAUDE_GATEWAY_PORT=None,
                           CLAUDE_GATEWAY_TOKEN_FILE=self.expired_login(), program=BY_PATH)
        typed = "%s %s login" % (os.path.basename(sys.executable), PROGRAM)
        self.assertIn("run `%s`" % typed, self.chat().error["message"])
        status = self.ask("GET", "/", headers={"accept": "application/json"}).json
        self.assertIn("run `%s`" % typed, status["trouble"]["message"])
        self.assertEqual(child.end(signal.SIGTERM), 0)
        self.assertIn("run `%s`" % typed, child.err)
        self.assertNotIn("claude-gateway login", child.err)

    def test_help_names_the_program_as_it_was_typed(self):
        code, said, _ = run_process("login", "--help")
        typed = "%s %s login" % (os.path.basename(sys.executable), PROGRAM)
        self.assertEqual((code, said[:len(typed) + 7]), (0, "usage: " + typed))
        self.assertIn("`%s --api-key`" % typed, said)
        self.assertNotIn("claude-gateway login", said)

    def expired_login(self) -> str:
        claude_gateway.TokenFile(self.token_path).write(stored_token(expires_at=1, refresh_token=""))
        return self.token_path

    def test_an_alias_for_nothing_known_draws_a_warning(self):
        child = self.child("start", "-p", "0", "--host", "127.0.0.1", "--alias", "foo=sonet", "--alias",
                           "bar=opus", "--alias", "*=gpt-4o", ANTHROPIC_API_KEY="k",
                           ANTHROPIC_BASE_URL=self.claude.url, REQUESTS_CA_BUNDLE="/nowhere.pem")
        child.wait_for("Paste into your tool")
        self.assertEqual(re.findall("Warning: (.*?):", child.err), ["--alias foo=sonet"])
        self.assertIn("Warning: REQUESTS_CA_BUNDLE names /nowhere.pem, which does not exist", child.err)
        self.assertIn("Nearest: sonnet,", child.err)
        self.assertIn("\nAliases: foo = sonet, bar = opus, * = gpt-4o\n", child.err)

    def test_a_port_in_use_is_exit_4_and_another_one_is_named(self):
        other = Service(Gateway(Config(host="127.0.0.1", port=0, anthropic_api_key="k", base_url=self.claude.url)))
        self.addCleanup(other.close, 0)
        other.start()
        for port, holder in ((urlsplit(self.claude.url).port, ""), (other.port, " by another claude-gateway")):
            with self.subTest(holder=holder):
                child = self.command("start", "--port", str(port), ANTHROPIC_API_KEY=SECRET)
                self.assertEqual((child.code, child.out), (4, ""))
                self.assertIn("Port %d is in use%s. Another port: claude-gateway start --port %d\n" % (
                    port, holder, port % 65_535 + 1), child.err)

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
            (["start", "--token-file", os.path.join(PROGRAM, "tokens.json")], {}, 3,
             re.escape(PROGRAM) if os.name == "posix" else "No credential"),     # nothing can be below a file there
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

    @POSIX_ONLY
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
        child = self.child("status", program=BY_PATH)
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
        child.wait_for(r"\[y/N\]")
        os.write(master, b"y\n")
        state = parse_qs(child.wait_for(r"https://claude\.com/cai/oauth/authorize\?(\S+)").group(1))["state"][0]
        child.wait_for("2026-10-01")
        child.wait_for("Code: ")
        os.write(master, ("the-code#%s\n" % state).encode())
        self.service = SimpleNamespace(port=child.port)
        self.assertEqual(self.chat().status, 200)
        self.assertEqual(self.claude.messages[-1].headers["authorization"], "Bearer " + NEW_ACCESS)
        self.assertEqual(child.end(signal.SIGTERM), 0)
        self.assertEqual(len(child.out.strip().split("\n")), 1)


# ---- Asking and running -----------------------------------------------------------------------------

FAKE_TOOL = """#!%s
import json, os, signal, sys
if sys.argv[-1] == "wait":
    def end(number, frame):
        os.write(1, b"got %%d" %% number)           # not print, which may have been interrupted
        os._exit(9)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    print("waiting", flush=True)
    signal.pause()
print(json.dumps([sys.argv[1:], {name: value for name, value in os.environ.items()
                                 if name.startswith(("OPENAI", "ANTHROPIC", "OPENCODE", "LD_"))}]))
sys.exit(7)
""" % sys.executable


@POSIX_ONLY
class AskTests(CommandTestCase):
    def test_an_answer_comes_from_a_gateway_of_its_own(self):
        self.claude.play(message(text("Hello, you!")))
        done = self.command("ask", "Say", "hello", ANTHROPIC_API_KEY=SECRET, ANTHROPIC_BASE_URL=self.claude.url)
        self.assertEqual((done.code, done.out, done.err), (0, "Hello, you!\n", ""))
        sent = self.claude.messages[-1].body
        self.assertEqual((sent["model"], bare(sent["messages"])), ("claude-sonnet-5-5", [
            {"role": "user", "content": [{"type": "text", "text": "Say hello"}]}]))

    def test_a_budget_holds_over_several_gateways_of_its_own(self):
        usage = {"input_tokens": 1_000_000}
        for client in ({}, {"CLAUDE_GATEWAY_API_KEY": "client-key"}):
            self.claude.play(message(text("Once"), usage=usage), message(text("Twice"), usage=usage))
            variables = dict(client, ANTHROPIC_API_KEY=SECRET, ANTHROPIC_BASE_URL=self.claude.url,
                             CLAUDE_GATEWAY_BUDGET="1/day", CLAUDE_GATEWAY_PORT=free_port())
            first, second = (self.command("ask", "Hello", **variables) for _ in range(2))
            self.assertEqual((first.code, first.out, second.code, second.out), (0, "Once\n", 1, ""))
            self.assertIn("The budget of $1 a day is used up", second.err)
            self.claude.reset()

    def test_an_answer_comes_from_the_gateway_that_runs(self):
        child = self.serve("--alias", "quick=haiku", CLAUDE_GATEWAY_API_KEY="client-key")
        self.claude.play(message(text("Again")))
        variables = {"CLAUDE_GATEWAY_PORT": str(child.port), "CLAUDE_GATEWAY_API_KEY": "client-key"}
        done = self.command("ask", "--model", "quick", typed="Hello?\n", **variables)
        self.assertEqual((done.code, done.out, done.err), (0, "Again\n", ""))
        self.assertEqual(self.claude.messages[-1].body["model"], "claude-haiku-5-5")
        self.assertRegex(self.command("models", **variables).out, "(?m)^quick ")
        recent = json.loads(self.command("status", "--json", **variables).out)["recent"]
        self.assertEqual([each["tool"] for each in recent], ["claude-gateway", "ask"])
        self.claude.play(message(text("{}")))
        whole = self.command("ask", "--json", "Hello", **variables)
        self.assertEqual(json.loads(whole.out)["choices"][0]["message"]["content"], "{}")
        refused = self.command("ask", "Hello", **dict(variables, CLAUDE_GATEWAY_API_KEY="wrong"))
        self.assertEqual((refused.code, refused.out, refused.err), (1, "", "claude-gateway: Invalid API key.\n"))

    def test_an_image_goes_along(self):
        path = os.path.join(self.working_directory, "pixel.png")
        with open(path, "wb") as file:
            file.write(base64.b64decode(PIXEL))
        done = self.command("ask", "--demo", "--image", path, "What is this?")
        self.assertEqual(done.code, 0)
        self.assertIn("You sent 1 image(s), the first one image/png.", done.out)

    def test_a_gateway_that_dies_amid_its_answer_is_no_traceback(self):
        def serve(connection):
            if connection.recv(65_536).startswith(b"GET"):
                data = b'{"status": "ok", "version": "1"}'
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))
            else:
                chunk = b'data: {"choices": [{"delta": {"content": "Half"}}]}\n\n'
                connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (
                    len(chunk), chunk))
        with LoopbackServer(serve) as dying:
            done = self.command("ask", "Hello", CLAUDE_GATEWAY_PORT=str(dying.port))
        self.assertEqual((done.code, done.out), (5, "Half"))
        self.assertRegex(done.err, r"\Aclaude-gateway: The gateway broke off its answer: .*\.\n\Z")

    def test_what_goes_wrong_is_told_as_the_gateway_tells_it(self):
        self.claude.play(*[FakeReply(pieces=[sse(events_of(message(text("Half")))[:4] + [
            {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}])])])
        broken, unreachable, unknown, empty, nobody = self.commands(
            (["ask", "Hello"], {"ANTHROPIC_API_KEY": SECRET, "ANTHROPIC_BASE_URL": self.claude.url}),
            (["ask", "Hello"], {"ANTHROPIC_API_KEY": SECRET, "ANTHROPIC_BASE_URL": "http://127.0.0.1:1"}),
            (["ask", "--demo", "--model", "nope", "Hello"], {}), (["ask", "--demo"], {}), (["ask", "Hello"], {}))
        self.assertEqual((broken.code, broken.out), (1, "Half"))
        self.assertIn("Overloaded", broken.err)
        self.assertEqual((unreachable.code, unreachable.out), (5, ""))
        self.assertIn("could not be reached at 127.0.0.1:1", unreachable.err)
        self.assertEqual(unknown.code, 1)
        self.assertIn('claude-gateway: The model "nope" does not exist here.', unknown.err)
        self.assertEqual((empty.code, empty.err),
                         (2, "claude-gateway: Standard input is empty; for example: claude-gateway ask Hello\n"))
        self.assertEqual((nobody.code, nobody.out), (3, ""))
        self.assertRegex(nobody.err, "No credential. Set ANTHROPIC_API_KEY.* `claude-gateway ask --demo` needs ne")

    @POSIX_ONLY
    def test_an_answer_cannot_control_the_terminal(self):
        import pty

        answer = "\x1b]0;title\x07Over\rHello,\n\tyou\u202e!"
        self.claude.play(*[message(text(answer))] * 3)
        variables = {"ANTHROPIC_API_KEY": SECRET, "ANTHROPIC_BASE_URL": self.claude.url, "PYTHONIOENCODING": "utf-8"}
        self.assertEqual(self.command("ask", "Hello", **variables).out, answer + "\n")      # into a file or a pipe
        whole = self.command("ask", "--json", "Hello", **variables).out
        self.assertNotRegex(whole, "[\x07\u202e]")
        self.assertEqual(json.loads(whole)["choices"][0]["message"]["content"], answer)
        reading, terminal = pty.openpty()
        self.addCleanup(os.close, reading)
        subprocess.run([sys.executable, PROGRAM, "ask", "Hello"], stdin=subprocess.DEVNULL, stdout=terminal,
                       env=self.environment(variables), cwd=self.working_directory, timeout=20, check=True)
        os.close(terminal)
        self.assertEqual(os.read(reading, 1_000), br"\x1b]0;title\x07Over\rHello," b"\r\n\tyou" br"\u202e!" b"\r\n")


@POSIX_ONLY
class RunTests(CommandTestCase):
    def setUp(self):
        super().setUp()
        for name in ("anytool", "aider"):
            path = os.path.join(self.working_directory, name)
            with open(path, "w", encoding="utf-8") as file:
                file.write(FAKE_TOOL)
            os.chmod(path, 0o755)
        self.path = {"PATH": self.working_directory + os.pathsep + os.environ["PATH"]}

    def run_of(self, *arguments, **variables) -> tuple:
        """The arguments and the variables that a tool got."""
        child = self.child("run", *arguments, **dict(self.path, **variables))
        self.assertEqual((child.end(), child.err), (7, ""))
        return json.loads(child.out)

    def test_a_tool_is_pointed_at_a_gateway_of_its_own(self):
        arguments, variables = self.run_of("--demo", "--", "anytool", "--help", "-p", "a b", ANTHROPIC_API_KEY=SECRET)
        base = re.match(r"http://localhost:\d+/v1\Z", variables["OPENAI_BASE_URL"]).group()
        self.assertEqual((arguments, variables["OPENAI_API_BASE"]), (["--help", "-p", "a b"], base))
        self.assertGreater(len(variables["OPENAI_API_KEY"]), 15)            # nobody else on this machine may use it
        self.assertEqual(os.listdir(self.home), [])

    def test_a_tool_gets_no_libraries_of_a_packed_program(self):
        packed = (sys.executable, "-c", "import sys; sys.frozen = True\n" + compiled()[2], PROGRAM)
        for before in ({}, {"LD_LIBRARY_PATH_ORIG": "/lib/mine"}):
            with self.subTest(before):
                child = self.child("run", "--demo", "anytool", program=packed, LD_LIBRARY_PATH="/tmp/unpacked",
                                   **dict(self.path, **before))
                self.assertEqual((child.end(), child.err), (7, ""))
                self.assertEqual(json.loads(child.out)[1].get("LD_LIBRARY_PATH", ""), "".join(before.values()))

    def test_a_tool_is_pointed_at_the_gateway_that_runs(self):
        child = self.serve(CLAUDE_GATEWAY_API_KEY="client-key")
        arguments, variables = self.run_of("aider", "mine", CLAUDE_GATEWAY_PORT=str(child.port),
                                           CLAUDE_GATEWAY_API_KEY="client-key")
        self.assertEqual((arguments[:2], arguments[-1]), (
            ["--openai-api-base", "http://localhost:%d/v1" % child.port], "mine"))
        self.assertNotIn("client-key", arguments, "everybody on this machine can read arguments")
        self.assertEqual((variables["OPENAI_BASE_URL"], variables["OPENAI_API_KEY"]),
                         ("http://localhost:%d/v1" % child.port, "client-key"))
        self.assertEqual(child.end(signal.SIGTERM), 0)

    def test_known_tools_get_the_options_that_setup_prints(self):
        config = Config(port=45_999)
        base = "http://localhost:45999/v1"
        for tool, options, added in (
                ("aider", ["--openai-api-base", base, "--model", "openai/claude-sonnet-5-5", "--edit-format", "diff",
                           "--weak-model", "openai/haiku", "--no-show-model-warnings"], {}),
                ("codex", ["-c", 'model="claude-opus-5-5"', "-c", 'model_provider="gateway"',
                           "-c", 'model_providers.gateway.name="gateway"',
                           "-c", 'model_providers.gateway.base_url="%s"' % base,
                           "-c", 'model_providers.gateway.wire_api="responses"'], {}),
                ("qwen", ["--auth-type", "openai"], {"OPENAI_MODEL": "claude-sonnet-5-5"}),
                ("claude", [], {"ANTHROPIC_BASE_URL": base[:-3], "ANTHROPIC_AUTH_TOKEN": "none"}),
                ("goose", [], {"OPENAI_HOST": base[:-3]}), ("mini", ["-m", "openai/sonnet"], {})):
            with self.subTest(tool):
                variables, arguments = claude_gateway.ready_made(tool, config)
                self.assertEqual(arguments, options)
                self.assertLessEqual(set(added.items()), set(variables.items()))
        variables, arguments = claude_gateway.ready_made("codex", Config(api_key=("the-key",)))
        self.assertEqual((variables["OPENAI_API_KEY"], arguments[-1], len(arguments)),
                         ("the-key", 'model_providers.gateway.env_key="OPENAI_API_KEY"', 12))
        settings = json.loads(claude_gateway.ready_made("opencode", config)[0]["OPENCODE_CONFIG_CONTENT"])
        self.assertEqual(settings["provider"]["gateway"]["options"], {"baseURL": base, "apiKey": "none"})

    def test_signals_pass_to_the_tool_and_its_exit_status_comes_back(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            child = self.child("run", "--demo", "anytool", "wait", **self.path)
            child.wait_for("waiting", "out")
            self.assertEqual(child.end(number), 9)
            self.assertIn("got %d" % number, child.out)
        killed = self.child("run", "--demo", "sh", "-c", "kill -9 $$", **self.path)
        self.assertEqual(killed.end(), 137)

    def test_a_program_that_the_system_cannot_start_is_no_traceback(self):
        for start, words in (("no program", "Exec format error"), ("#!/no/such/interpreter\n", "No such file")):
            path = os.path.join(self.working_directory, "broken")
            pathlib.Path(path).write_text(start, "utf-8")
            os.chmod(path, 0o755)
            done = self.command("run", "--demo", path)
            self.assertEqual((done.code, done.out), (2, ""))
            self.assertRegex(done.err, r"\Aclaude-gateway: \S+ cannot be started: .*%s.*\n\Z" % words)

    def test_what_cannot_be_started_is_said(self):
        missing, nothing = self.commands((["run", "no-such-tool"], {}), (["run"], {}))
        self.assertEqual((missing.code, missing.err),
                         (2, "claude-gateway: run needs a program to start; there is no no-such-tool.\n"))
        self.assertEqual(nothing.code, 2)
        self.assertIn("for example: claude-gateway run aider", nothing.err)
        self.assertIn("`claude-gateway run --demo` needs neither", self.command("run", "sh").err)


# ---- Commands ---------------------------------------------------------------------------------------

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

    def test_logout_without_a_login_writes_nothing(self):
        self.assertIn("no stored login", self.command("logout").err)
        self.assertEqual(os.listdir(self.home), [])

    def test_a_place_that_cannot_hold_a_login_is_told_before_the_sign_in(self):
        child = self.command("login", "--no-browser", "--token-file", os.path.join(PROGRAM, "tokens.json"))
        self.assertEqual(child.code, 1)
        self.assertIn("A login cannot be stored in %s: " % os.path.join(PROGRAM, "tokens.json"), child.err)
        self.assertNotIn("Visit", child.err)

    def test_an_empty_home_is_none(self):
        child = self.command("login", "--no-browser", HOME="", APPDATA="")
        self.assertEqual(child.code, 2)
        self.assertIn("There is no home directory", child.err)

    def test_status_tells_which_credential_and_whose(self):
        none, key, bearer = self.commands((["status"], {}), (["status"], {"ANTHROPIC_API_KEY": SECRET}),
                                          (["status"], {"CLAUDE_CODE_OAUTH_TOKEN": SECRET}))
        self.assertEqual((none.code, key.code, bearer.code), (3, 0, 0))
        nobody = "No gateway answers on port %d.\n" % self.closed_port
        self.assertEqual(none.out, nobody + "No credential. Set ANTHROPIC_API_KEY, or run "
                         "`claude-gateway login`; `claude-gateway start --demo` needs neither.\n")
        self.assertIn(nobody + "`start` would use: API key from ANTHROPIC_API_KEY\n", key.out)
        self.assertIn("CLAUDE_CODE_OAUTH_TOKEN", bearer.out)
        self.sign_in(account={"email_address": "me@example.org"}, organization={"name": "Example\x1b[2J Ltd"})
        login = self.command("status")
        self.assertEqual(login.code, 0)
        for words in ("me@example.org", "Example\\x1b[2J Ltd", self.token_path, "in 59 min)"):
            self.assertIn(words, login.out)
        self.assertEqual(self.claude.requests, [])

    def test_status_as_json_is_one_object(self):
        none, key = self.commands((["status", "--json"], {}), (["status", "--json"], {"ANTHROPIC_API_KEY": SECRET}))
        self.assertEqual((none.code, json.loads(none.out)),
                         (3, {"running": False, "port": self.closed_port, "credential": None}))
        self.assertEqual((key.code, json.loads(key.out)["credential"]["kind"]), (0, "api_key"))
        self.sign_in(account={"email_address": "me@example.org"})
        login = self.command("status", "--json")
        told = json.loads(login.out)["credential"]
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

    @POSIX_ONLY
    def test_the_block_for_a_bug_report_does_not_tell_who_the_user_is(self):
        self.sign_in(account={"email_address": "me@example.org"})
        above, block = self.command("doctor", ANTHROPIC_BASE_URL="http://127.0.0.1:9").out.split("```")[:2]
        self.assertIn("login from %s," % self.token_path, above)
        self.assertIn("login from ~/.config/claude-gateway/oauth-tokens.json,", block)
        for words in (self.home, "me@example.org"):
            self.assertNotIn(words, block)

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
        self.assertRegex(plain.out, r"\Asonnet +-> claude-sonnet-5-5 +\w")
        self.assertEqual(re.findall(r"(?m)^(\w+) +->", down.out), ["sonnet", "opus", "haiku", "fable", "mythos"])
        self.assertGreater(down.out.index("\nclaude-opus-5-5 "), down.out.index("\nmythos "))
        self.assertNotIn("claude-opus-4-8", plain.out)
        entries = json.loads(as_json.out)
        self.assertEqual({entry["object"] for entry in entries}, {"model"})
        self.assertIn("claude-sonnet-5-5", [entry["id"] for entry in entries])
        self.assertIn("claude-opus-5-5", [entry["id"] for entry in json.loads(built_in.out)])
        self.assertIn("claude-opus-5-5", down.out)
        self.assertIn("built-in", down.err)


class UsageCommandTests(CommandTestCase):
    def test_usage_is_counted_beside_the_login_and_shown_by_day_tool_or_model(self):
        wait_for_a_day_that_lasts()
        path = os.path.join(os.path.dirname(self.token_path), "usage.json")
        child = self.serve()
        self.claude.play(message(text("A"), usage={"input_tokens": 500_000, "output_tokens": 50_000}))
        self.chat(headers={"user-agent": "aider/1"})
        self.claude.play(message(text("A"), model="claude-mythos-5-2"))
        self.chat(model="claude-mythos-5-2")
        self.assertEqual(child.end(signal.SIGTERM), 0, child.err)
        old = {"day": time.strftime("%Y-%m-%d", time.localtime(time.time() - 864_000)), "tool": "old", "model": "m",
               "key": "", "requests": 1_000, "usd": 5}
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)["rows"]
        pathlib.Path(path).write_text(json.dumps({"rows": rows + [old]}), "utf-8")
        day, tool, key, all_days, wrong, nobody, no_key = self.commands(
            (["usage"], {}), (["usage", "--by", "tool"], {}), (["usage", "--json", "--by", "model"], {}),
            (["usage", "--days", "30"], {}), (["usage", "--days", "0"], {}),
            (["usage", "--token-file", os.path.join(self.home, "none.json")], {"ANTHROPIC_BASE_URL": "nonsense"}),
            (["usage", "--by", "key"], {}))
        self.assertRegex(no_key.out, "(?m)^- +2 ")
        self.assertRegex(day.out, "(?m)^" + time.strftime("%Y-%m-%d") +
                         r" +2 +0 +[\d,]+ +0% +[\d,]+ +\$1.50  \+ unknown$")
        self.assertRegex(tool.out, r"(?m)^aider +1 +0 +500,000 +0% +50,000 +\$1.50$")
        self.assertRegex(all_days.out, r"(?m)^total +1,002 +0 .* \$6.50  \+ unknown$")
        self.assertEqual({row["model"]: row["usd"] for row in json.loads(key.out)},
                         {"claude-mythos-5-2": 0, "claude-sonnet-5-5": 1.5})
        self.assertEqual((wrong.code, nobody.code), (2, 0))
        self.assertRegex(nobody.out, r"(?m)^total +0 ")

    def test_no_usage_and_the_demo_write_nothing(self):
        for arguments in (["--no-usage"], ["--demo"]):
            child = self.serve(*arguments)
            self.chat()
            child.end(signal.SIGTERM)
        self.assertFalse(os.path.exists(os.path.join(self.home, ".config", "claude-gateway", "usage.json")))

    def test_a_budget_that_cannot_be_counted_stops_the_start(self):
        for arguments, words in ((["--budget", "5"], "expected USD/day"), (["--budget", "5/day", "--no-usage"],
                                                                           "cannot be counted")):
            done = self.command("start", *arguments, ANTHROPIC_API_KEY=SECRET, ANTHROPIC_BASE_URL=self.claude.url)
            self.assertEqual(done.code, 2)
            self.assertIn(words, done.err)


class DailyCommandTests(GatewayTestCase):
    def test_status_asks_the_running_gateway(self):
        self.start()
        self.chat()
        self.service.gateway.running.wait_until_idle(30)
        code, said, _ = run_command("status", "--port", str(self.service.port))
        self.assertEqual(code, 0)
        self.assertIn("is running.", said)
        self.assertRegex(said, r"\nUp for: +\d+ s\nModels: +sonnet = claude-sonnet-5-5, opus = ")
        self.assertIn("\nRequests:    1, 0 running\n", said)
        self.assertIn("\nCost:        $0.0001 by list prices\n", said)
        code, said, _ = run_command("status", "--json", CLAUDE_GATEWAY_PORT=str(self.service.port))
        told = json.loads(said)
        self.assertEqual((code, told["requests"]["total"], told["running"], told["credential"]["kind"]),
                         (0, 1, True, "api_key"))

    def test_models_are_those_of_the_gateway_that_runs(self):
        self.start(alias=(("fast", "haiku"),), api_key=("the-client-key",))
        self.claude.models = []
        port = str(self.service.port)
        code, said, complaint = run_command("models", "-p", port)
        self.assertEqual((code, "built-in" in complaint), (0, False))
        self.assertRegex(said, r"(?m)^fast +-> claude-haiku-5-5$")
        self.assertEqual({entry["id"]: entry.get("alias_of") for entry in json.loads(
            run_command("models", "--json", "-p", port)[1])}["fast"], "claude-haiku-5-5")
        said = run_command("models", "-p", port, "--alias", "mine=opus")[1]        # what would be, not what is
        self.assertRegex(said, r"(?m)^mine +-> claude-opus-5-5$")
        self.assertNotIn("fast", said)

    def test_caching_saves_or_costs(self):
        running = self.ask("GET", "/", headers={"accept": "application/json"}).json
        for saved, words in ((0.5, "saved $0.50"), (-0.0001, "cost $0.0001"), (-0.0, "saved $0.00")):
            running["cache"] = {"share_percent": 7, "saved_usd": saved}
            self.assertIn("\nCache:       7 %% of all input, which %s\n" % words,
                          claude_gateway.status_text(running, "") + "\n")

    def test_status_lists_the_last_requests_and_totals(self):
        self.start(alias=(("fast", "haiku"),))
        self.claude.play(message(text("A"), usage={"input_tokens": 1000, "output_tokens": 20}))
        self.chat(headers={"user-agent": "aider/1"}, model="claude-opus-5-5", seed=1)
        self.service.gateway.running.wait_until_idle(30)
        self.chat(headers={"user-agent": "curl/8"}, model="no-such-model")
        self.service.gateway.running.wait_until_idle(30)
        code, said, _ = run_command("status", "--requests", "--port", str(self.service.port))
        self.assertEqual(code, 0)
        self.assertIn("\nAliases:     fast = haiku\n", said)
        _, by_tool, by_model, last = said.split("\n\n")
        self.assertEqual(by_tool.split("\n")[:2], ["tool   requests  errors  tokens in  cached  tokens out     cost",
                                                   "aider         1       0      1,000      0%          20  $0.0044"])
        self.assertRegex(by_model, r"\nclaude-opus-5-5 +1 +0 +1,000 ")
        heads, failed, error, answered, changes = last.rstrip("\n").split("\n")
        self.assertRegex(failed, r"\A[\d:]{8}  curl   no-such-model    404 +\d+ / \d+ ms\Z")
        self.assertRegex(error, r"\A {10}The model ")
        self.assertRegex(answered, r"\A[\d:]{8}  aider  claude-opus-5-5  200 +1,000 +0% +20  \$0\.0044 +"
                                   r"\d+ / \d+ ms\Z")
        self.assertRegex(changes, r"\A {10}dropped seed")
        self.assertEqual({heads.index("status"), failed.index("404"), answered.index("200")}, {failed.index("404")})
        self.assertNotIn("1 requests", said)
        self.chat(model="no\x1b[2J\u202e-model")
        self.service.gateway.running.wait_until_idle(10)
        for flag in ("--requests", "--json"):
            said = run_command("status", flag, "-p", str(self.service.port))[1]
            self.assertRegex(said, r"no\\(x|u00)1b\[2J\\u202e-model")
            self.assertNotRegex(said, "[\x1b\u202e]")
        said = run_command("status", "--json", "-p", str(self.service.port))[1]
        self.assertEqual(json.loads(said)["recent"][0]["status"], 404)

    def test_the_last_requests_fit_a_narrow_terminal(self):
        self.chat(headers={"user-agent": "an-extraordinary-tool/1"}, model="claude-sonnet-4-5-20250929", stream=True,
                  seed=1, logit_bias={"1": 1}, user="u", n=1, presence_penalty=1, frequency_penalty=1)
        self.ask("POST", "/v1/embeddings", {})
        self.service.gateway.running.wait_until_idle(10)
        running = self.ask("GET", "/", headers={"accept": "application/json"}).json
        said = claude_gateway.requests_text(running["recent"], 80)
        self.assertEqual([line for line in said.split("\n") if len(line) > 80], [])
        self.assertRegex(said, r"\Atime +tool +model +status  tokens in  cached +cost\n")
        self.assertRegex(said, r"\n[\d:]{8}  -  +embeddings +404\n {10}Claude has no embeddings")
        self.assertRegex(said, r"\n[\d:]{8}  an-extraordina  sonnet-4-5  200 +[\d,]+ +\d+%  \$[\d.]+\n {10}dropped ")
        status = claude_gateway.lines_within(claude_gateway.status_text(running, ""), 80)
        self.assertEqual([line for line in status.split("\n") if len(line) > 80], [])
        self.assertRegex(status, r"\nModels: .*\n {13}claude-")

    def test_another_program_on_the_port_is_said_to_be_one(self):
        with contextlib.closing(socket.socket()) as silent, LoopbackServer(
                lambda connection: connection.sendall(b"SSH-2.0-server\r\n")) as other:
            silent.bind(("127.0.0.1", 0))
            for port, words in ((other.port, "Another program uses port %d; no gateway answers there.\n"),
                                (urlsplit(self.claude.url).port, "Another program uses port %d"),
                                (silent.getsockname()[1], "No gateway answers on port %d.\n")):
                self.assertIn(words % port, outcome_of(["status", "-p", str(port)], {}, "").out)

    def test_amounts_have_no_needless_sign(self):
        for amount, shown in ((0, "$0.00"), (-0.00001, "$0.00"), (-0.004, "-$0.004"), (0.0042, "$0.0042"),
                              (1.5, "$1.50"), (-0.5, "-$0.50")):
            self.assertEqual(claude_gateway.dollars(amount), shown)

    def test_status_of_a_gateway_with_keys(self):
        self.start(api_key=("the-client-key",))
        port = str(self.service.port)
        for key, words in (("", "set CLAUDE_GATEWAY_API_KEY"), ("the-client-key", "Requests:"),
                           ("wrong", "The API key in CLAUDE_GATEWAY_API_KEY is invalid.")):
            with self.subTest(key=key):
                code, said, _ = run_command("status", "--port", port, CLAUDE_GATEWAY_API_KEY=key)
                self.assertEqual(code, 0)
                self.assertIn("is running.", said)
                self.assertIn(words, said)
        self.assertIn("The API key given with --api-key is invalid.",
                      outcome_of(["status", "--port", port, "--api-key", "wrong"], {}, "").out)
        told = json.loads(run_command("status", "--json", "--port", port)[1])
        self.assertEqual((told["running"], told["key_needed"], told["credential"]), (True, True, None))

    def test_commands_that_call_nobody_are_not_stopped_by_the_way_out(self):
        bad = {"HTTPS_PROXY": "socks5://h:1", "ANTHROPIC_BASE_URL": "x", "CLAUDE_GATEWAY_LOG_FORMAT": "xml",
               "HOME": "/nowhere"}
        for arguments in (["setup", "codex"], ["translate"], ["logout"], ["completion", "bash"]):
            with self.subTest(arguments):
                done = outcome_of(arguments, bad, "")
                self.assertNotIn("socks", done.err.lower() + done.out.lower().replace("bash", ""))
                self.assertNotIn("expected", done.err)

    def test_what_is_missing_depends_on_what_auth_allows(self):
        key = {"ANTHROPIC_API_KEY": SECRET, "CLAUDE_CODE_OAUTH_TOKEN": ""}
        for auth, variables, words, not_this in (
                ("oauth", key, "No credential that --auth oauth allows. Run `claude-gateway login`", "Set ANTH"),
                ("api-key", {"CLAUDE_CODE_OAUTH_TOKEN": "t"}, "that --auth api-key allows. Set ANTHROPIC_API_KEY",
                 "login`")):
            for command in (["start"], ["status", "-p", free_port()]):
                with self.subTest(auth=auth, command=command):
                    done = outcome_of([*command, "--auth", auth], dict({"HOME": "/nowhere"}, **variables), "")
                    self.assertEqual(done.code, 3)
                    self.assertRegex(done.err + done.out, words)
                    self.assertNotIn(not_this, done.err + done.out)

    def test_a_token_that_is_over_is_renewed_at_the_next_request(self):
        self.assertRegex(claude_gateway.expiry_text(1_700_000_000, True), "expired; it is renewed at the next request")
        self.assertTrue(claude_gateway.expiry_text(1_700_000_000, False).endswith("(expired)"))
        for seconds, words in ((30, "30 s"), (28_799, "7 h 59 min"), (7_200, "2 h"), (200_000, "2 d 7 h"),
                               (90, "1 min")):
            self.assertEqual(claude_gateway.duration_text(seconds), words)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "tokens.json")
            with open(path, "wb") as file:
                file.write(b"{ torn")
            done = outcome_of(["status", "-p", free_port(), "--token-file", path], {}, "")
        self.assertRegex(done.err, "login` replaces it.*logout` deletes it")

    def test_translate_prints_valid_json_in_any_locale(self):
        chat = json.dumps({"model": "opus", "messages": [{"role": "user", "content": "\U0001f98a\u00fc"}]}).encode()
        for encoding, shown in (("ascii", False), ("utf-8", True)):
            with self.subTest(encoding), tempfile.TemporaryDirectory() as directory:
                path = pathlib.Path(directory, "request.json")
                path.write_bytes(chat)
                raw = io.BytesIO()
                with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding)) as out, \
                        contextlib.redirect_stderr(io.StringIO()):
                    self.assertEqual(claude_gateway.main(["translate", str(path)]), 0)
                    out.flush()
                told = raw.getvalue().decode(encoding)
                self.assertEqual(json.loads(told)["messages"][0]["content"][0]["text"], "\U0001f98a\u00fc")
                self.assertEqual("\U0001f98a" in told, shown)

    def test_a_hint_keeps_the_users_own_port(self):
        port = free_port()
        done = outcome_of(["status", "-p", port, "--auth", "api-key"], {"ANTHROPIC_API_KEY": "k"}, "")
        self.assertIn("Start one: claude-gateway start --port %s\n" % port, done.out)

    def test_translate_shows_the_request_and_sends_nothing(self):
        chat = {"model": "gpt-4o", "seed": 1, "messages": [{"role": "user", "content": "Hi"}]}
        code, said, changes = run_command("translate", given=json.dumps(chat).encode())
        self.assertEqual((code, json.loads(said)["model"]), (0, "claude-sonnet-5-5"))
        self.assertIn("dropped seed", changes)
        code, said, _ = run_command("translate", given=b'{"model": "opus", "input": "Hi"}')
        self.assertEqual(json.loads(said)["messages"][0]["content"][0]["text"], "Hi")
        self.assertEqual(run_command("translate", given=b"{")[0], 1)
        self.assertEqual(run_command("translate", "/no/such/file")[0], 2)

    @POSIX_ONLY
    def test_translate_of_nothing_is_wrong_usage(self):
        with tempfile.NamedTemporaryFile() as empty:
            for redirection, words in (("<&-", "Standard input is closed"), ("</dev/null", "Standard input is empty"),
                                       (empty.name, "%s is empty" % empty.name)):
                with self.subTest(redirection=redirection):
                    ended = subprocess.run(["sh", "-c", '"$@" translate ' + redirection, "sh", *compiled()],
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
                    self.assertEqual((ended.returncode, ended.stdout), (2, b""))
                    self.assertIn("claude-gateway: %s; for example: " % words, ended.stderr.decode())
                    self.assertEqual(ended.stderr.decode().count("\n"), 1)

    def test_translate_reads_a_saved_answer_backwards(self):
        whole = message(text("Hi"))
        for saved in (json.dumps(whole).encode(), json.dumps(whole, indent=2).encode(), sse(events_of(whole))):
            code, said, _ = run_command("translate", given=saved)
            self.assertEqual((code, json.loads(said)["choices"][0]["message"]["content"]), (0, "Hi"))

    def test_translate_says_that_a_saved_stream_has_no_message(self):
        for saved in (b"event: ping\n\n", b"data: {cut", b"event: message_start\n"):
            with self.subTest(saved=saved):
                code, said, hint = run_command("translate", given=saved)
                self.assertEqual((code, said), (claude_gateway.UNREACHABLE, ""))
                self.assertIn("claude-gateway: There is no message in this stream.", hint)

    def test_a_dash_means_standard_input(self):
        stdin = SimpleNamespace(buffer=io.BytesIO(b'{"model": "opus", "input": "Hi"}'), isatty=lambda: False)
        self.addCleanup(setattr, sys, "stdin", sys.stdin)
        sys.stdin = stdin
        self.assertIn(b"opus", claude_gateway.given_to("-", ""))


# ---- Completion -------------------------------------------------------------------------------------

class CompletionTests(unittest.TestCase):
    CANDIDATES = (("do", "doctor"), ("-", "--help --version"), ("--v", "--version"), ("start --log", "--log-format"),
                  ("start --auth ", "auto api-key oauth"), ("start --log-format j", "json"), ("start --port ", ""),
                  ("start --demo --st", "--strict"),
                  ("setup open", "openai openai-agents opencode openhands open-webui"),
                  ("setup --j", ""), ("completion z", "zsh"), ("translate ", ""), ("logout ", "--help --token-file"),
                  ("selftest --", "--help"), ("nonsense do", "doctor"))

    def test_the_program_itself_knows_what_may_follow(self):
        for typed, candidates in self.CANDIDATES:
            with self.subTest(typed=typed):
                done = outcome_of(["completion", "zsh", "claude-gateway", *typed.split(" ")], {}, "")
                self.assertEqual((done.code, done.out.split(), done.err), (0, candidates.split(), ""))
        powershell = outcome_of(["completion", "powershell", "claude-gateway", "setup", " "], {}, "")
        self.assertIn("open-webui\n", powershell.out)
        everything = outcome_of(["completion", "bash", "claude-gateway", ""], {}, "")
        self.assertEqual(everything.out.split(), [*claude_gateway.COMMANDS])

    def test_each_shell_has_a_script_that_says_how_to_load_it(self):
        for shell in ("bash", "zsh", "fish", "PowerShell"):
            with self.subTest(shell=shell):
                done = outcome_of(["completion", shell], {}, "")
                self.assertEqual((done.code, done.err), (0, ""))
                self.assertRegex(done.out, r"\A# It .* not python.*\n# To load it.*: .*claude-gateway completion %s" %
                                 shell.lower())
                self.assertIn("claude-gateway completion %s " % shell.lower(), done.out.split("\n", 2)[2])
        self.assertTrue(outcome_of(["completion"], {}, "").err.endswith(" are required: SHELL\n"))

    @POSIX_ONLY
    @unittest.skipUnless(shutil.which("bash"), "no bash here")
    def test_the_bash_script_completes(self):
        script = 'claude-gateway() { %s "$@"; }\n' % " ".join(map(shlex.quote, compiled()))
        script += outcome_of(["completion", "bash"], {}, "").out
        cases = (("start --auth ''", "auto api-key oauth"), ("start --", "--help --port"), ("translate ''", ""))
        for typed, _ in cases:
            script += ("COMP_WORDS=(claude-gateway %s); COMP_CWORD=%d; COMPREPLY=(); _claude_gateway; "
                       'echo "${COMPREPLY[*]}"\n' % (typed, len(typed.split(" "))))
        ended = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, timeout=60, check=True)
        for line, (typed, candidates) in zip(ended.stdout.decode().split("\n"), cases):
            with self.subTest(typed=typed):
                self.assertEqual(line[:len(candidates) or None], candidates)


# ---- Command line -----------------------------------------------------------------------------------

class CommandLineTests(CommandTestCase):
    def test_the_version_and_the_help(self):
        version, general, start, nothing, narrow = self.commands(
            (["--version"], {}), (["--help"], {}), (["start", "-h"], {}), ([], {}),
            (["start", "--help"], {"COLUMNS": "20"}))
        self.assertEqual([child.code for child in (version, general, start, nothing, narrow)], [0, 0, 0, 2, 0])
        real = self.child("--version", program=BY_PATH)                          # once through the script itself
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
        for command, (_, words, _) in claude_gateway.COMMANDS.items():      # also the long names share a line with it
            self.assertRegex(general.out, r"(?m)^    %s +%s$" % (command, re.escape(words)))
        self.assertLess(max(map(len, general.out.splitlines())), 80)
        for child in self.commands(*[([name, "--help"], {}) for name in ("login", "logout", "status", "models")]):
            self.assertEqual(child.code, 0)
            self.assertIn("--token-file", child.out)
        self.assertIn("0: any free one", start.out)
        for child in self.commands(*[([name, "--help"], {}) for name in ("ask", "run", "status", "doctor", "models")]):
            words = " ".join(child.out.split())
            for described in ("PORT port of the gateway (default: 45554)", "--host ADDRESS address of the gateway"):
                self.assertIn(described, words)
            self.assertNotIn("any free one", words)

    def test_unknown_words_are_answered_with_the_nearest_if_one_is_near(self):
        for arguments, nearest, usage in (
                (["stat"], "start", ""), (["start", "--prot", "1"], "--port", "start "), (["docter"], "doctor", ""),
                (["setup", "open-webi"], "open-webui", "setup "), (["start", "--bogus"], "", "start "),
                (["status", "--jsn"], "--json", "status "), (["status", "--demoo"], "", "status "),
                (["what"], "", ""), (["completion", "basch"], "", "completion "), (["help"], "--help", ""),
                (["start", "hello"], "", "start "),
                (["version"], "--version", "")):
            with self.subTest(arguments=arguments):
                done = outcome_of(arguments, {}, "")
                said = done.err
                self.assertEqual(done.code, 2)
                self.assertTrue(said.startswith("usage: claude-gateway %s[-h]" % usage), said)
                self.assertEqual(re.findall(r"Did you mean (\S+)\?", said), [nearest] if nearest else [])
                self.assertIn("unknown: %s." % arguments[-1] if arguments[-1].startswith("--") else "error: ", said)
                self.assertFalse(said.endswith(" \n"), said)
                self.assertEqual("The commands are start, ask, run, login, " in said, arguments == ["what"])

    def test_an_option_before_its_command_is_told_where_it_belongs(self):
        for arguments in (["--demo"], ["-p", "1"], ["--port=1", "status"], ["--live", "doctor"],
                          ["--api-key=secret"], ["--api-key", "secret"], ["--bogus"]):
            with self.subTest(arguments):
                done = outcome_of(arguments, {}, "")
                self.assertEqual(done.code, 2)
                self.assertTrue(done.err.endswith(
                    "error: %s: options follow their command, for example: claude-gateway start --demo\n" %
                    arguments[0].split("=")[0]), done.err)
                self.assertNotIn("secret", done.err)

    def test_a_reader_that_goes_away_is_no_traceback(self):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = subprocess.run([sys.executable, PROGRAM, "models"], env=self.environment({}), stdout=writing,
                                  stderr=subprocess.PIPE, cwd=self.working_directory, timeout=60, check=False)
        finally:
            os.close(writing)
        self.assertEqual(done.stderr.decode(), "")

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
                              env=self.environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
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
                    done = subprocess.run([place, PROGRAM, "--version"], env=self.environment({}), timeout=60,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False,
                                          cwd=self.working_directory)
                    self.assertNotEqual(done.returncode, 0)
                    self.assertRegex(done.stderr.decode(), r"3\.8")
                    self.assertRegex(done.stderr.decode(), r"python3\.\d+")
        if not found:
            self.skipTest("no such interpreter here")


# ==== All together ==================================================================================

# ---- Library -----------------------------------------------------------------------------------------

class LibraryTests(GatewayTestCase):
    def test_requests_and_replies_translate_without_a_server(self):
        chat = {"messages": [{"role": "user", "content": "Hi"}], "seed": 5}
        translation = claude_gateway.messages_request_from_chat(chat, BUILT_IN_MODELS["claude-opus-5-5"])
        self.assertEqual(translation.request["model"], "claude-opus-5-5")
        self.assertEqual(translation.changes.header(), "dropped=seed")
        completion = claude_gateway.chat_completion_from_message(
            message(text("Hi")), {"id": "chatcmpl-1", "created": 1}, translation.plan)
        self.assertEqual(completion["choices"][0]["message"]["content"], "Hi")

    def test_a_service_that_was_never_started_closes_at_once(self):
        service = Service(Gateway(Config(base_url=self.claude.url, anthropic_api_key=SECRET, host="127.0.0.1", port=0)))
        closing = threading.Thread(target=service.close, args=(0,), daemon=True)
        closing.start()
        closing.join(30)
        self.assertFalse(closing.is_alive())


# ---- Real SDK ----------------------------------------------------------------------------------------

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
        answer = message(thinking("let me see", "c2ln"), text("Both:"),
                         tool_use("toolu_1", "get_weather", {"city": "Rom"}),
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
                    reply = FakeReply(status, body=error_body(kind, "no"), headers={"retry-after": "60"})
                    self.claude.play(reply)
                    with self.assertRaises(exception) as caught:
                        self.client.chat.completions.create(**self.asked, stream=stream)
                    self.assertIn("no", str(caught.exception))

    def test_an_error_amid_a_stream_is_raised_and_not_taken_for_an_end(self):
        events = events_of(message(text("Hello there")))[:4]
        error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
        self.claude.play(FakeReply(pieces=[sse(events + [error])]))
        with self.assertRaises(openai.APIError) as caught:
            for _ in self.client.chat.completions.create(**self.asked, stream=True):
                pass
        self.assertEqual(caught.exception.message, "Overloaded")
        self.assertEqual(caught.exception.code, "overloaded")

    def test_a_refusal_that_no_retry_mends_costs_one_call(self):
        client = self.client.with_options(max_retries=2)
        body = error_body("invalid_request_error", "Your credit balance is too low to access the Anthropic API.")
        self.claude.play(*[FakeReply(400, body=body)] * 3)
        with self.assertRaises(openai.RateLimitError) as caught:
            client.chat.completions.create(**self.asked)
        self.assertEqual(caught.exception.code, "insufficient_quota")
        self.assertEqual(len(self.claude.messages), 1)

    def test_leaving_a_stream_stops_the_call_upstream(self):
        never = threading.Event()
        self.claude.play(FakeReply(pieces=[sse(events_of(message(text("Hello there")))[:4]), never]))
        stream = self.client.chat.completions.create(**self.asked, stream=True)
        next(iter(stream))
        stream.close()
        self.assertTrue(self.claude.wait_closed(30))

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
        chat_messages = [{"role": "system", "content": "Be exact."},
                         {"role": "user", "content": "Weather in two towns?"}]
        answers = [[thinking("turn %d" % turn, "c2ln%d" % turn), text("Turn %d." % turn),
                    tool_use("toolu_%da" % turn, "get_weather", {"city": "A"}),
                    tool_use("toolu_%db" % turn, "get_weather", {"city": "B"})] for turn in range(3)]
        full_id = {"claude-haiku-4-5": "claude-haiku-4-5-20251001"}.get(model, model)
        for blocks in answers + [[text("Sunny in both.")]]:
            self.claude.play(message(*blocks, model=full_id))
            reply = self.client.chat.completions.create(model=model, messages=chat_messages, tools=[WEATHER_TOOL],
                                                        reasoning_effort="medium")
            chat_message = reply.choices[0].message
            chat_messages.append(chat_message.model_dump(exclude_none=True))
            for call in chat_message.tool_calls or ():
                image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}}
                chat_messages.append({"role": "tool", "tool_call_id": call.id,
                                      "content": [{"type": "text", "text": "sunny"}, image]})
        self.assertEqual(chat_messages[-1]["content"], "Sunny in both.")
        requests = [bare(request.body) for request in self.claude.messages]
        for turn, (earlier, later) in enumerate(zip(requests, requests[1:])):
            self.assertEqual(earlier["tools"], later["tools"])
            self.assertEqual(earlier["system"], later["system"])
            self.assertEqual(earlier["messages"], later["messages"][:len(earlier["messages"])])
            self.assertEqual(later["messages"][-2]["content"], answers[turn], "the answer goes back as it came")
            self.assertEqual([block["content"][1]["type"] for block in later["messages"][-1]["content"]],
                             ["image", "image"])

    def test_responses_are_created_streamed_parsed_and_continued(self):
        pydantic = __import__("pydantic")
        point = pydantic.create_model("Point", x=(int, ...))
        self.claude.play(message(text("One")), message(thinking("hm", "c2ln"), text("Two")),
                         message(text('{"x": 3}'), model="claude-opus-5-5"))
        first = self.client.responses.create(model="opus", input="Hello")
        with self.client.responses.stream(model="opus", input="More", previous_response_id=first.id) as stream:
            kinds = {event.type for event in stream}
            second = stream.get_final_response()
        parsed = self.client.responses.parse(model="opus", input="A point", text_format=point)
        self.assertEqual((first.output_text, second.output_text, parsed.output_parsed.x), ("One", "Two", 3))
        self.assertIn("response.reasoning_summary_text.done", kinds)
        self.assertEqual((first.status, first.temperature, first.text.format.type), ("completed", 1, "text"))

    def test_input_items_are_listed_page_by_page(self):
        given = [{"role": "user", "content": "Word %d" % at} for at in range(50)]
        response = self.client.responses.create(model="opus", input=given)
        for order in ("asc", "desc"):
            listed = [item.content[0].text for item in self.client.responses.input_items.list(
                response.id, order=order, limit=20)]
            self.assertEqual(listed, [each["content"] for each in given][::1 if order == "asc" else -1])

    def test_a_conversation_is_compacted_and_goes_on(self):
        history = [{"role": "user", "content": "Find it."}, {"role": "assistant", "content": "Found."}]
        compacted = self.client.responses.compact(model="opus", input=history)
        self.assertEqual([item.type for item in compacted.output], ["message", "compaction"])
        for streamed in (False, True):
            asked = {"model": "opus", "input": [*compacted.output, {"role": "user", "content": "Next"}]}
            if streamed:
                with self.client.responses.stream(**asked) as stream:
                    response = stream.get_final_response()
            else:
                response = self.client.responses.create(**asked)
            self.assertEqual(response.output_text, "Hello!")
            self.assertEqual([turn["content"][0]["type"] for turn in self.claude.messages[-1].body["messages"]],
                             ["compaction", "text"])
        with self.client.responses.stream(model="opus", input=[*history, {"type": "compaction_trigger"}]) as stream:
            item, = stream.get_final_response().output
        self.assertEqual(item.type, "compaction")

    def test_the_model_list_and_one_model(self):
        ids = [model.id for model in self.client.models.list()]
        self.assertIn("claude-opus-5-5", ids)
        self.assertEqual(self.client.models.retrieve("anthropic/claude-opus-5.5").object, "model")
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("claude-2")


# ---- Recorded traffic --------------------------------------------------------------------------------

# Of all that was recorded each version of Python takes a quarter, the next version the next one; with "all" every one.
QUARTERS = slice(None) if os.environ.get("CLAUDE_GATEWAY_TEST_RECORDED") == "all" else \
    slice(sys.version_info.minor % 4, None, 4)


@functools.lru_cache(None)
def recorded_lines(name, whole=False):
    with open(os.path.join(RECORDED, name), encoding="utf-8") as file:
        return [json.loads(line) for line in (list(file) if whole else list(file)[QUARTERS])]


@functools.lru_cache(None)
def recorded_answers():
    """(id, content type, body) of the recorded answers of /v1/messages with status 200, two-call captures split."""
    return list(split_answers())


def split_answers():
    for case in recorded_lines("anthropic.jsonl"):
        answer = case["response"]
        path = (case["request"] or {}).get("path", "/v1/messages")
        if answer["status"] != 200 or not re.match(r"/v1/messages(\?|$)", path):
            continue
        kind = answer["headers"].get("content-type")
        body = answer["body"]
        start = r"(?m)^event: message_start$|^data: *\{\"type\": ?\"message_start\""
        starts = [match.start() for match in re.finditer(start, body)]
        starts = [at for at in starts if body[at:].startswith("event:")] or starts
        cuts = starts[1:] if "sse:two-message-starts" in case["kind"] else []
        for begin, end in zip([0] + cuts, cuts + [len(body)]):
            yield case["id"], kind, body[begin:end].encode("utf-8")


def is_whole(body):
    """Whether a recorded stream has its end; hand-made fixtures of broken ones are there too."""
    return body.lstrip()[:1] == b"{" or b"message_stop" in body


def without_ids(value):
    """A response without what differs from one to the next."""
    if isinstance(value, dict):
        return {name: without_ids(entry) for name, entry in value.items()
                if name not in ("id", "created_at", "completed_at")}
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


@unittest.skipUnless(os.path.isdir(RECORDED), "no recorded traffic beside the project")
class RecordedAnswerTests(GatewayTestCase):
    def test_a_stream_adds_up_to_the_full_reply_for_every_answer(self):
        count = 0
        for case, kind, body in recorded_answers():
            with self.subTest(case=case):
                reply = FakeReply(headers={"content-type": kind}, body=body)
                self.claude.play(reply, reply)
                plain = self.chat()
                stream = self.chat(stream=True, stream_options={"include_usage": True})
                if not is_whole(body):
                    self.assertEqual((plain.status, "error" in json.loads(stream.events[-1])), (502, True))
                    continue
                self.assertEqual(plain.status, 200, plain.raw)
                self.assertEqual(stream.events[-1], "[DONE]")
                parts = completion_from_chunks(stream.chunks)
                if b'"type":"fallback"' in body:     # the first chunk cannot know who will answer
                    parts["models"] = [stream.chunks[-1]["model"]]
                self.assertEqual(parts, completion_parts(plain.json))
                self.assertNotIn("reasoning_content", [name for name, value in plain.message.items() if not value])
                for call in plain.message.get("tool_calls", ()):
                    self.assertFalse(call["id"].startswith("srvtoolu_"))
                    if plain.json["choices"][0]["finish_reason"] != "length":
                        self.assertIsInstance(json.loads(call["function"]["arguments"]), dict)
                count += 1
        self.assertGreater(count, 450 if QUARTERS.step is None else 100)

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
                    for event in [*events, *decoder.close()]:
                        assembler.feed(event)
                        chunks += stream.feed(event)
                    wholes.append(chunks + stream.finish())
                self.assertTrue(all(whole == wholes[0] for whole in wholes[1:]))

    def test_every_recorded_refusal_reaches_the_client_as_an_error_of_its_kind(self):
        cases = recorded_lines("anthropic.jsonl", whole=True) + recorded_lines("reported_errors.jsonl", whole=True)
        for case in cases:
            answer = case["response"]
            if answer["status"] == 200:
                continue
            with self.subTest(case=case["id"]):
                reply = FakeReply(answer["status"], headers=dict(answer["headers"], **{"retry-after": "60"}),
                                  body=answer["body"].encode("utf-8"))
                self.claude.play(reply)
                result = self.chat()
                self.assertGreaterEqual(result.status, 400)
                self.assertLess(result.status, 504)
                words = (json.loads(answer["body"]).get("error") or {}).get("message", "")
                self.assertIn(words, result.error["message"])
                self.assertTrue(result.error["type"])

    def test_every_reported_error_amid_a_stream_is_told_as_one(self):
        for case in recorded_lines("reported_errors.jsonl", whole=True):
            if case["response"]["status"] != 200:
                continue
            for stream in (False, True):
                with self.subTest(case=case["id"], stream=stream):
                    start = sse(events_of(message(text("Hello there")))[:4])
                    self.claude.play(FakeReply(pieces=[start, case["response"]["body"].encode("utf-8")]))
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
                reply = FakeReply(headers={"content-type": kind}, body=body)
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
                reply = FakeReply(headers={"content-type": kind}, body=body)
                self.claude.play(reply, reply)
                plain = self.ask("POST", "/v1/responses", asked)
                events = self.ask("POST", "/v1/responses", dict(asked, stream=True)).chunks
                self.assertEqual(plain.status, 200, plain.raw)
                problems = [sentence for event in events for sentence in RESPONSE_EVENTS(event, event["type"])]
                self.assertEqual(problems + response_problems(plain), [])
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
                reply = FakeReply(headers={"content-type": kind}, body=body)
                self.claude.play(reply, reply)
                plain = client.responses.create(model="opus", input="Hello")
                with client.responses.stream(model="opus", input="Hello") as stream:
                    events = list(stream)
                self.assertEqual(events[-1].response.output_text, plain.output_text)
                self.assertEqual(plain.usage, events[-1].response.usage)


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
        """Through the translators alone, as twelve thousand requests over sockets would take their time."""
        headers = {"anthropic-version": "2023-06-01", "content-type": "application/json", "x-api-key": "k",
                   "user-agent": "claude-gateway/0"}
        for model in ("claude-opus-5-5", "claude-sonnet-5", "claude-opus-4-7", "claude-sonnet-4-6",
                      "claude-haiku-4-5-20251001"):
            for case in recorded_lines("openai_requests.jsonl"):
                body = case["request"]["body"]
                translate = claude_gateway.messages_request_from_responses if "input" in body else \
                    claude_gateway.messages_request_from_chat
                with self.subTest(case=case["id"], model=model):
                    try:
                        request = translate(body, BUILT_IN_MODELS[model]).request
                    except claude_gateway.InvalidRequest as refusal:
                        self.assertTrue(refusal.param)
                        continue
                    sent = json.loads(claude_gateway.upstream_json(request).decode())
                    self.assertEqual(violations(sent, headers), [])


# ---- README ------------------------------------------------------------------------------------------

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
                                      " " + option.metavar if option.metavar else "",
                                      option.help + ("; repeatable" if option.repeatable else ""))
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
            self.assertIn("`kill %1`", README)      # how the gateway that the first block starts is to be stopped
            script = "trap 'kill %1; wait' EXIT\n" + "\necho; echo ----\n".join(commands)
            ended = subprocess.run(["bash", "-ec", script], cwd=HERE, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        said = ended.stdout.decode()
        self.assertEqual(ended.returncode, 0, ended.stderr.decode())
        plain, streamed = said.split("----")
        self.assertIn("This is a simulated answer", plain)
        self.assertIn("localhost:" + port, streamed)
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

    def test_the_list_of_tools_is_that_of_setup(self):
        listed = README.split("<!-- tools -->")[1].split("<!-- /tools -->")[0]
        self.assertEqual(re.findall(r"`([\w-]+)`", listed), list(claude_gateway.TOOL_SETTINGS))
        self.assertEqual(re.findall(r"(?m)^- (\w+): `([\w-]+)`", listed),
                         [(title, name) for name, title in claude_gateway.TOOL_GROUPS.items() if name != "systemd"])

    def test_its_line_of_the_log_is_one_of_ours(self):
        shown = next(block for block in readme_blocks("text") if " cached (" in block).strip().split(" ", 1)[1]
        record = claude_gateway.Record(
            "POST", "/v1/chat/completions", tool="aider", status=200, asked="opus", used="claude-opus-5-5", stream=True,
            first_byte_ms=521, total_ms=1682, input_tokens=18918, cached_tokens=18010, cached_percent_of_all=48,
            output_tokens=388, request_id="req_011CV...")
        with self.assertLogs(claude_gateway.LOG, "INFO") as logged:
            claude_gateway.log_request_record(record, Config())
        self.assertEqual(logged.records[0].getMessage(), shown)

    def test_every_variable_that_it_names_is_read(self):
        with open(PROGRAM, encoding="utf-8") as file:
            source = file.read()
        twins = {option.variable for option in claude_gateway.OPTIONS}
        for name in set(re.findall(r"`(?:\$env:)?([A-Z]+_[A-Z_]+)\b", README)) - twins - {"HTTP_PROXY"}:
            with self.subTest(name):
                self.assertIn('"%s"' % name, source)

    def test_its_pictures_are_there(self):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
            self.assertTrue(os.path.isfile(os.path.join(HERE, picture)))

    def test_it_speaks_of_the_project_alone(self):
        for word in ("/work", "../shared", "/root", "pypi.org", "npmjs", "session"):
            self.assertNotIn(word, README)


# ---- The file ----------------------------------------------------------------------------------------

def dotted(node) -> str:
    """A name as it is written, `socket.create_connection`; behind what is no name, `.connect`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def rooms_in(source: str) -> dict:
    """The line of each banner -> its room."""
    banners = (re.match(r"# ---- (.+?)[ -]*$", line) for line in source.split("\n"))
    return {number: banner.group(1) for number, banner in enumerate(banners, 1) if banner}


def names_in(tree: ast.Module) -> dict:
    """Top-level name -> the statement that defines it."""
    return {name: statement for statement in tree.body
            for name in [getattr(statement, "name", None), *(
                node.id for target in getattr(statement, "targets", [getattr(statement, "target", None)]) if target
                for node in ast.walk(target) if isinstance(node, ast.Name))] if name}


def running(node):
    """What runs of a statement: its nodes without the annotations."""
    yield node
    for field_name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field_name not in ("annotation", "returns"):
                yield from running(child)


class FileTests(unittest.TestCase):
    """Promises about the file itself; those of its docstring are read from there."""
    maxDiff = None
    SOURCE, TESTS = pathlib.Path(PROGRAM).read_text("utf-8"), pathlib.Path(__file__).read_text("utf-8")
    ROOMS = list(rooms_in(SOURCE).values())
    BANNERS = list(rooms_in(SOURCE))
    TREE = ast.parse(SOURCE)
    NAMES = names_in(TREE)
    OUTSIDE = re.compile(r"(open|print|input|os|time|datetime|random|secrets|uuid|socket|select|selectors|threading|"
                         r"http|ssl|subprocess|tempfile|logging|LOG|urllib\.request|sys\.(std.*|argv))\Z")
    CONNECTING = re.compile(r"socket\.create_connection|http\.client\.HTTPS?Connection|.*\.connect(_ex)?|"
                            r"urllib\.request\.(urlopen|urlretrieve|build_opener|OpenerDirector)")
    WRITING = re.compile(r"os\.(open|replace|renames?|unlink|remove(dirs)?|rmdir|mkdir|makedirs|f?chmod|link|symlink|"
                         r"f?truncate)|(tempfile|shutil(?!\.which)|pathlib)\..*")
    STARTING = re.compile(r"subprocess\..*|os\.(system|popen|exec.*|spawn.*|posix_spawn.*|fork|startfile)")

    def promised(self, beginning: str) -> list:
        """What the docstring lists behind these words."""
        docstring = " ".join(ast.get_docstring(self.TREE).split())
        listed = re.search(re.escape(beginning) + r" (.+?)\.( |$)", docstring)
        self.assertIsNotNone(listed, f"the docstring does not say: {beginning} ...")
        return listed.group(1).split(", ")

    def room_of(self, name: str) -> int:
        """The number of the room that defines a name; -1 above the first."""
        return sum(line < self.NAMES[name].lineno for line in self.BANNERS) - 1

    def used_by(self, name: str) -> set:
        return {node.id for node in ast.walk(self.NAMES[name])
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}

    def places(self, concerned) -> list:
        """The top-level names whose statements contain such a thing, in their order."""
        return [name for name, statement in self.NAMES.items() if any(map(concerned, ast.walk(statement)))]

    def test_the_map_in_the_docstring_names_the_rooms_in_their_order(self):
        self.assertEqual(self.promised("Rooms, in order, each using only those above it:"), self.ROOMS)

    def test_a_room_uses_only_the_rooms_above_it(self):
        rooms = {name: self.room_of(name) for name in self.NAMES}
        self.assertEqual([(name, used) for name in rooms for used in sorted(self.used_by(name) & set(rooms))
                          if rooms[used] > rooms[name]], [])

    def test_translation_and_what_it_calls_touch_nothing_outside(self):
        first, last = self.promised("Without socket, file, clock, randomness or log: the rooms from")[0].split(" to ")
        self.assertEqual((first, last), ("JSON", "Responses API"))
        rooms = range(self.ROOMS.index(first), self.ROOMS.index(last) + 1)
        reached = [name for name in self.NAMES if self.room_of(name) in rooms]
        errors = {name for name in self.NAMES if isinstance(getattr(claude_gateway, name), type)
                  and issubclass(getattr(claude_gateway, name), Exception)}     # raised, these may look at the clock
        for name in reached:                            # a list that grows on the way
            used = {dotted(node) for node in running(self.NAMES[name])}
            with self.subTest(name):
                self.assertEqual(list(filter(self.OUTSIDE.match, used)), [])
            reached += (used & set(self.NAMES)) - errors - set(reached)

    def test_every_place_that_connects_is_in_the_docstring(self):
        self.assertEqual(self.promised("Places that connect:"), self.places(
            lambda node: isinstance(node, ast.Attribute) and self.CONNECTING.fullmatch(dotted(node))))

    def test_every_place_that_writes_is_in_the_docstring(self):
        def writes(node) -> bool:
            if not isinstance(node, ast.Call) or any(dotted(value) == "os.devnull" for value in node.args):
                return False
            modes = node.args[1:2] + [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
            return bool(self.WRITING.fullmatch(dotted(node.func))) or dotted(node.func) in ("open", "io.open") and any(
                not isinstance(mode, ast.Constant) or set("wax+") & set(mode.value) for mode in modes)
        self.assertEqual(self.promised("Places that write:"), self.places(writes))

    def test_every_place_that_starts_a_program_is_in_the_docstring(self):
        self.assertEqual(self.promised("Places that start another program:"), self.places(
            lambda node: isinstance(node, ast.Attribute) and self.STARTING.fullmatch(dotted(node))))

    def test_every_room_that_connects_writes_or_starts_a_program_is_among_those_to_read(self):
        to_read = self.promised("What to read before trusting it with a credential:")
        for what in ("Places that connect:", "Places that write:", "Places that start another program:"):
            for name in self.promised(what):
                with self.subTest(name):
                    self.assertIn(self.ROOMS[self.room_of(name)], to_read)

    def test_tests_stand_in_the_order_of_the_rooms(self):
        tested = [room for room in rooms_in(self.TESTS).values() if room in self.ROOMS]
        self.assertEqual(tested, sorted(tested, key=self.ROOMS.index))

    def test_no_name_of_a_test_means_something_else_in_the_program(self):
        for name in set(names_in(ast.parse(self.TESTS))) & set(self.NAMES):
            self.assertEqual(globals()[name], getattr(claude_gateway, name), name)

    def test_nothing_is_imported_but_the_standard_library(self):
        imported = {(node.module if isinstance(node, ast.ImportFrom) else name.name).split(".")[0]
                    for node in ast.walk(self.TREE) if isinstance(node, (ast.Import, ast.ImportFrom))
                    for name in node.names}
        known = getattr(sys, "stdlib_module_names", None)
        if known is None:
            self.skipTest("this Python has no list of its standard library")
        self.assertEqual(imported - set(known) - {"compression"}, set())


if __name__ == "__main__":
    unittest.main()
