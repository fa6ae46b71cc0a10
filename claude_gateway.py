#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the Claude Gateway authors
"""Claude for every tool that speaks OpenAI.  One file, standard library only.

    python3 claude_gateway.py start      serve http://localhost:45554/v1
    python3 claude_gateway.py login      sign in with a Claude account, once
    python3 claude_gateway.py --help     everything else

One request on its way:

    Connection                             bytes -> the head of a request
      RequestCycle                           checks it, reads its body, looks up the endpoint
        chat_completions                       the endpoint: the only place that sees both APIs
          Exchange                               one request to Claude, with corrections, pauses and counting
            messages_request_from_chat             chat completion request -> Messages request  (pure)
            Upstream.messages                      the one call to Claude, always asked for as a stream
            EventDecoder.feed                      event-stream bytes -> events                 (pure)
            MessageAssembler.feed                  events -> the message so far                 (pure)
          PlannedEvents                          events -> events as the client asked for them (pure)
          ChatStream.feed                        events -> chunks                             (pure)
          chat_completion_from_message           or: the whole message -> chat completion     (pure)
        StreamedReply                          chunks -> bytes, which go out in the request's thread, or
      EventLoop                                in one for all streams, where many run
      RequestCycle._send_failure             any error, in OpenAI's shape

Rooms, in order, each using only those above it: Configuration, Small tools, Errors, JSON, Models, Shapes,
Translation, Cache breakpoints, Content, Tool schemas, Tools, Conversation, Parameters, Tool choice and answer format,
Messages request, Events, Replies, Streams, Responses API, Memory, Credentials, Usage, HTTP/1.1, Upstream, Event loop,
Image fetching, Exchange, Endpoints, Legacy completions, Native pass-through, Tool settings, Status page, Routes, HTTP
server, Service, Simulated upstream, Log, Terminal, Options, Diagnosis, Selftest, Signing in, Start, Asking and
running, Commands, Completion, Command line.

What to read before trusting it with a credential: Credentials, Usage, HTTP/1.1, Upstream, Image fetching, Routes,
HTTP server, Log, Diagnosis, Signing in, Asking and running.
Places that connect: UpstreamConnection, Download, local_answer, issuer_of.
Places that write: StoredFile, check_writable.  Places that start another program: run_tool.
Without socket, file, clock, randomness or log: the rooms from JSON to Responses API.
"""
from __future__ import annotations  # a SyntaxError here: this Python is too old; use 3.8 or newer, e.g. python3.9

import argparse
import base64
import calendar
import collections
import dataclasses
import difflib
import email.utils
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import re
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
import urllib.request
import zlib
from argparse import Namespace
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

# ---- Configuration -----------------------------------------------------------------------------------
# Fixed addresses, versions and limits.  A number stands here with the reason for it, or not at all.

VERSION = "1.0.0"
USER_AGENT = "claude-gateway/" + VERSION
LOG = logging.getLogger("claude_gateway")
LOG.addHandler(logging.NullHandler())           # as a library: silent until the program asks

DEFAULT_PORT = 45554
DEFAULT_BASE_URL = "https://api.anthropic.com"
ANTHROPIC_VERSION = "2023-06-01"                # on purpose: 2026-10-21 refuses temperature on every model

# The sign-in with a Claude account.  Other programs cannot register, so this is Claude Code's public client id,
# with the page that shows its code.  The README and `login` say so, and what Anthropic's terms think of it.
OAUTH_CLIENT_ID = "9d1c250a-e61b-44d9-88ed-5944d1962f5e"
OAUTH_AUTHORIZE_URL = "https://claude.com/cai/oauth/authorize"
OAUTH_TOKEN_URL = "https://platform.claude.com/v1/oauth/token"
OAUTH_REDIRECT_URI = "https://platform.claude.com/oauth/code/callback"
OAUTH_SCOPES = "user:inference user:profile"
FAST_MODE_BETA = "fast-mode-2026-02-01"         # sent with `speed`; some models take the field only with it
COMPACTION_BETA = "compact-2026-09-04"          # with `compaction`, and with every later request that has its block
FALLBACK_BETA = "server-side-fallback-2026-07-01"
OAUTH_BETA = "oauth-2025-04-20"                 # the API accepts OAuth tokens with this header only
# Tokens of a subscription are known to be refused unless the system prompt begins with this sentence, in a block
# of its own.  It is sent with them only, the one thing we say that is not the client's.
OAUTH_SYSTEM_BLOCK = {"type": "text", "text": "You are Claude Code, Anthropic's official CLI for Claude."}

REFRESH_EARLY = 300                             # seconds: a token is renewed this long before it expires
REFRESH_BACKOFF, LONGEST_BACKOFF = 2, 60        # seconds until the next attempt, doubled each time that it fails

MAX_UPSTREAM_BODY = 32_000_000                  # bytes: what the Messages API accepts
MAX_BRACKETS = 1_000_000                        # a body of nothing but brackets costs 60 times its size
MAX_NESTING = 200                               # below the recursion limit of every Python, with room to spare
MAX_HEAD = 65_536                               # bytes of request line and headers together
MAX_HEADERS = 100                               # header lines
READ_SIZE = 65_536                              # bytes that one read of a socket may bring
BACKLOG = 1_024                                 # connections the system queues while we accept; the default is 5

SLOWEST_BODY = 50_000                           # bytes a second of a whole body, beyond the first `body_timeout`
SHUTDOWN_GRACE = 30                             # seconds that running requests get to finish
CONNECT_TIMEOUT = 10                            # seconds
LONGEST_RETRY_AFTER = 5                         # seconds: a longer wait is left to the client
RETRY_PAUSE = 0.5                               # seconds before our one retry when nobody names a time
POOL_SIZE = 32                                  # idle upstream connections that are kept
POOL_AGE = 50                                   # seconds: servers and middleboxes drop idle ones at 60
MODELS_TIMEOUT = 10                             # seconds for the upstream's model list
MODELS_LIFETIME = 3_600                         # seconds that a fetched model list stays good
MODELS_PATIENCE = 3                             # seconds that a first request waits for that list
REQUEST_ID_HEADER = "x-request-id"
CHANGES_HEADER = "x-claude-gateway-changes"
HOP_HEADER = "x-claude-gateway-hop"             # carries the ids of the gateways a request went through


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one gateway accepts, and how long it waits (in seconds)."""
    max_body: int = 40_000_000                      # bytes, raw and decoded: Claude's 32 MB plus JSON overhead
    max_bodies: int = 400_000_000                   # bytes of all request bodies in flight; each takes three in memory
    max_requests: int = 2_000                       # at once; beyond: 503
    max_connections: int = 4_000                    # at once, idle ones included; most of them hold a thread
    event_loop_from: int = 32                       # requests at once; fewer are quicker in their own threads
    idle_timeout: float = 75                        # that a kept-alive connection may stay silent
    head_timeout: float = 30                        # for a whole request head
    body_timeout: float = 60                        # between two reads of a body
    write_timeout: float = 60                       # that a client may refuse to read
    keepalive_interval: float = 10                  # of silence before a stream gets a comment line
    upstream_silence: float = 300                   # without a byte from Claude (its pings count)
    token_timeout: float = 30                       # for a whole call to the sign-in endpoint
    fetch_timeout: float = 20                       # for one image, redirects included
    lock_patience: float = 60                       # for another process to refresh; one call may take 40


@dataclasses.dataclass(frozen=True, repr=False)         # as it has secrets
class Config:
    """Everything that is set from outside; `config_from` reads it from flags and environment."""
    host: str = "localhost"
    more_hosts: Tuple[str, ...] = ()                # to listen on, too
    port: int = DEFAULT_PORT
    api_key: Tuple[str, ...] = ()
    verbose: bool = False
    minimal: bool = False
    quiet: bool = False
    log_format: str = "text"
    auth: str = "auto"
    token_file: str = ""
    alias: Tuple[Tuple[str, str], ...] = ()
    allow_host: Tuple[str, ...] = ()
    cors_origin: Tuple[str, ...] = ()
    relax_x509: bool = False
    no_cache: bool = False
    strict: bool = False
    fallback: Tuple[str, ...] = ()                  # models that answer what the requested one refuses, or "default"
    demo: bool = False
    budget: Tuple[Tuple[float, str], ...] = ()      # US dollars, period
    passing_key: bool = False                       # `api_key` is new at every start: counted as if there were none
    plan_only: bool = False
    no_usage: bool = False
    usage_file: str = ""                            # "": usage is not counted by day
    base_url: str = DEFAULT_BASE_URL
    token_url: str = OAUTH_TOKEN_URL
    authorize_url: str = OAUTH_AUTHORIZE_URL
    oauth_scopes: str = OAUTH_SCOPES
    workspace_id: str = ""
    custom_headers: Tuple[Tuple[str, str], ...] = ()
    profile: str = ""                               # of Anthropic's own sign-in; "": the active one
    profile_folder: str = ""                        # "": none is looked for
    anthropic_api_key: str = ""
    anthropic_auth_token: str = ""
    claude_code_oauth_token: str = ""
    https_proxy: str = ""
    no_proxy: str = ""
    ca_file: str = ""
    ca_variable: str = ""                           # where that comes from
    limits: Limits = Limits()

    @property
    def hosts(self) -> list[str]:
        return [self.host, *self.more_hosts]

    def secrets(self) -> list[str]:
        """Every secret in here, for the log's redaction."""
        return [*self.api_key, self.anthropic_api_key, self.anthropic_auth_token, self.claude_code_oauth_token,
                self.proxy.password or "", *(value for _, value in self.custom_headers)]

    @property
    def proxy(self) -> urllib.parse.SplitResult:
        """The parts of the proxy's address, which may come without its scheme."""
        return urllib.parse.urlsplit(self.https_proxy if "://" in self.https_proxy else "http://" + self.https_proxy)


# ---- Small tools -------------------------------------------------------------------------------------
# What several rooms need and none of them owns.


def without(mapping: dict, *names: str) -> dict:
    """A copy of a dict without some of its keys."""
    return {name: value for name, value in mapping.items() if name not in names}


def listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def percent(part: int, whole: int) -> int:
    return round(100 * part / whole) if whole else 0


def close_all(closers: list[Callable[[], Any]]) -> None:
    """Calls and removes all of them, the last one first, whatever goes wrong in another."""
    try:
        while closers:
            closers.pop()()
    finally:
        if closers:
            close_all(closers)


def value_in(value: Any, *path: str) -> Any:
    """The value at a path of keys, None where there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def text_in(value: Any, *path: str) -> str | None:
    """The string at a path of keys, None where there is none."""
    found = value_in(value, *path)
    return found if isinstance(found, str) else None


def count_of(value: Any) -> int:
    """A count, 0 for what is none, or none that can be true."""
    return value if type(value) is int and 0 < value < 10 ** 12 else 0


def count_in(value: Any, *path: str) -> int:
    """The count at a path of keys, 0 where there is none."""
    return count_of(value_in(value, *path))


# control characters, line ends of Unicode, marks that turn the direction of text, halves of surrogate pairs
UNSAFE_IN_LOG = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(value: str, limit: int = 200) -> str:
    """Text that may stand in a header: printable ASCII, of bounded length."""
    return (value if value.isascii() and value.isprintable() else re.sub(r"[^\x20-\x7e]", "?", value))[:limit]


def visible(text: str) -> str:
    """Text with escapes for what could forge a line of the log or control a terminal."""
    return text if text.isprintable() else UNSAFE_IN_LOG.sub(lambda match: ascii(match.group())[1:-1], text)


SAME_IN_JSON = re.compile(r"[ !#-\[\]-~]+\Z")
SECRET_SHAPES = re.compile(r"sk-ant-[A-Za-z0-9_-]{8,}|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}")


def masked(text: str, secrets_known: Iterable[str]) -> str:
    """Text without any known secret, as it is or in JSON, and without what looks like a credential."""
    for secret in secrets_known:
        if len(secret) >= 4:
            text = text.replace(secret, "***")
            if "\\" in text and not SAME_IN_JSON.match(secret):
                for form in (json.dumps(secret), json.dumps(secret, ensure_ascii=False)):
                    text = text.replace(form[1:-1], "***")
    return SECRET_SHAPES.sub("***", text) if "sk-ant-" in text or "earer " in text else text


def own_file() -> str:
    """The file that this program is in, or the archive around it; "" where it came from neither."""
    path = "" if getattr(sys, "frozen", False) else os.path.abspath(globals().get("__file__") or "")
    while not os.path.isfile(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path if os.path.isfile(path) else ""


def as_typed(text: str, powershell: bool = os.name == "nt") -> str:
    """A text with every command of ours as it can be typed here: the script's path where it is not installed.
    A lower-case word behind `claude-gateway` is a command: no prose puts one there."""
    if powershell:
        text = re.sub(r"\bexport((?: \w+=\S+)+)", lambda line: re.sub(
            r" (\w+)=(\S+)", r'; $env:\1 = "\2"', line.group(1))[2:], text)
        text = re.sub(r"\b([A-Z_]+)=(\S+)(?= claude-gateway )", r'$env:\1 = "\2";', text)
    script = sys.argv[0] if sys.argv else ""
    if not script or "claude-gateway " not in text or os.path.basename(script) != os.path.basename(own_file()):
        return text
    script = '"%s"' % script if " " in script else script
    typed = "%s %s " % (os.path.basename(sys.executable or "") or "python3", script)
    return re.sub(r"\bclaude-gateway (?=[a-z])", lambda match: typed, text)


def dollars(amount: float) -> str:
    """An amount in cents, or finer where it is less than one; never a zero with a sign."""
    text = "%.2f" % abs(amount) if abs(amount) >= 0.01 else ("%.4f" % abs(amount)).rstrip("0")
    return "$0.00" if not text.strip("0.") else ("-$" if amount < 0 else "$") + text


@functools.lru_cache(maxsize=64)
def unix_time(moment: str) -> int | None:
    """The seconds of an RFC 3339 time or date in UTC, None where it is none."""
    match = re.match(r"(\d{4})-(\d\d)-(\d\d)(?:T(\d\d):(\d\d):(\d\d))?", moment)
    try:
        return calendar.timegm(tuple(map(int, match.groups("0")))) if match else None
    except ValueError:
        return None


@functools.lru_cache(maxsize=64)
def is_address(name: str) -> bool:
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False


def is_loopback_host(host: str) -> bool:
    """Whether a host name or address literal means this machine."""
    host = host.strip("[]").rstrip(".").lower()
    if is_address(host):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def host_in(url: str) -> str:
    """The host of an http or https URL; "" where it is none, or has more than a place, as a password."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and (parts.port or 1)
    except ValueError:
        return ""
    # who connects would undo a %, and might find another host
    plain = not (re.search(r"[@%\\]", parts.netloc) or parts.query or parts.fragment)
    return parts.hostname or "" if usable and plain else ""


GLOBAL_UNICAST, NAT64 = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an address is public, also the IPv4 address that an IPv6 one may hide."""
    ip: Any = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 4:
        return ip.is_global and not ip.is_multicast
    hidden = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in NAT64:
        hidden.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    if not all(is_public(str(each)) for each in hidden if each):
        return False
    return bool(ip.ipv4_mapped) or ip in NAT64 or ip in GLOBAL_UNICAST and ip.is_global


# ---- Errors ------------------------------------------------------------------------------------------
# Raised anywhere, rendered once (RequestCycle._send_failure).  Each class carries what the client should learn.


class GatewayError(Exception):
    """An error that the client should learn of, in OpenAI's terms."""
    status: int = 500
    kind: str = "server_error"
    code: Optional[str] = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.code
        self.headers = dict(headers or {})
        if self.code in FINAL_CODES:
            self.headers["x-should-retry"] = "false"

    def reworded(self, message: str, **changes: str) -> GatewayError:
        """The same error with another message, and other `changes`."""
        copy: GatewayError = type(self).__new__(type(self), message)      # which sets what str() shows
        vars(copy).update(vars(self), **changes)
        return copy

    def body(self) -> dict:
        """The error envelope of OpenAI's API reference."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def for_anthropic(self) -> tuple[int, dict[str, str], dict]:
        """Status, headers and body for clients that speak Anthropic's API."""
        kind = {429: "billing_error", 503: "overloaded_error"}.get(self.status) or type_of_status(self.status)
        error = {"type": kind, "message": str(self)}
        return self.status, self.headers, {"type": "error", "error": error, "request_id": None}


class InvalidRequest(GatewayError):
    status, kind = 400, "invalid_request_error"


class Refused(GatewayError):
    """A request that is refused with a status and code of its own."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(message, param, code, headers)
        self.status = status
        self.kind = {403: "permission_error", 429: "insufficient_quota", 503: "server_error", 508: "server_error"}.get(
            status, "invalid_request_error")


def busy(message: str) -> Refused:
    return Refused(503, "gateway_busy", message, headers={"retry-after": "1"})


class CredentialNeeded(GatewayError):
    """The gateway's own credential is missing or dead: only its owner can fix that."""
    status, kind, code = 401, "authentication_error", "upstream_authentication"


class UpstreamFault(GatewayError):
    """Claude's API could not be reached, broke off, or broke its protocol."""
    status, kind, code = 502, "server_error", "upstream_error"
    may_pass = False                            # whether a second attempt may succeed


class UpstreamTimeout(UpstreamFault):
    status, code = 504, "timeout"


class ClientGone(Exception):
    """The client closed its connection; nobody is left to tell."""


QUOTA = (429, "insufficient_quota", "insufficient_quota")
# An error of the Messages API -> its statuses, for a body that is not the API's own; OpenAI's (status, type, code)
CLAUDE_ERRORS = {
    "invalid_request_error": ((400,), (400, "invalid_request_error", None)),
    "authentication_error": ((401,), (401, "authentication_error", "upstream_authentication")),
    "billing_error": ((402,), QUOTA),
    "permission_error": ((403,), (403, "permission_error", None)),
    "not_found_error": ((404,), (404, "invalid_request_error", None)),
    "conflict_error": ((409,), (409, "server_error", None)),
    "request_too_large": ((413,), (413, "invalid_request_error", "request_too_large")),
    "rate_limit_error": ((429,), (429, "rate_limit_error", "rate_limit_exceeded")),
    "api_error": ((500,), (500, "server_error", None)),
    "timeout_error": ((408, 504), (504, "server_error", "timeout")),
    "overloaded_error": ((529,), (503, "server_error", "overloaded")),
}


def type_of_status(status: int) -> str:
    """The type of an error of which only the status is known."""
    return next((name for name, (statuses, _) in CLAUDE_ERRORS.items() if status in statuses),
                "invalid_request_error" if status // 100 == 4 else "api_error")


class Verdict(NamedTuple):
    """What the message of a refusal says beyond its type; None leaves what the type says."""
    words: str                                  # a pattern
    status: int | None = None
    kind: str | None = None
    code: str | None = None
    hint: str = ""


KEY_HINT = "an API key (ANTHROPIC_API_KEY) is always fine; a subscription token is not for every use."
WORKSPACE_HINT = "set ANTHROPIC_WORKSPACE_ID to the id (wrkspc_...) in the Console under Settings, Workspaces."
PLAN_HINT = "the plan is used up until its window ends; an API key (ANTHROPIC_API_KEY) has no such window."
# What the message of a refusal (lower case) means for the client; the first match wins.  What they say about the
# request is read by LESSONS and the patterns beside it.  Else only `explained` looks for a word of Claude's.
VERDICTS = (
    Verdict("anthropic-workspace-id", 400, code="upstream_refused", hint=WORKSPACE_HINT),
    Verdict("prompt is too long|exceed context limit", 400, code="context_length_exceeded"),
    Verdict("only authorized for use with claude code|scope requirement|claude_code_version_too_old",
            code="upstream_refused", hint=KEY_HINT),
    Verdict("extra usage is required for long context", *QUOTA,
            hint="this account may not send prompts this long without extra usage."),
    Verdict("extra usage", *QUOTA, hint=KEY_HINT),
    Verdict("credit balance is too low|specified api usage limits", *QUOTA),
    Verdict("(enforced|contract)_spend_limit_reached", *QUOTA,
            hint="only a higher spend limit in the Console helps before it is reset."),
    Verdict("output blocked by content filtering", 400, code="content_filter"),
    Verdict("token has been revoked", 401, "authentication_error", "upstream_authentication",
            "run `claude-gateway login` again."),
    Verdict("oauth authentication is currently not supported", 401, hint=KEY_HINT),
    Verdict("oauth token has expired|invalid bearer token", 401,
            hint="run `claude-gateway login` again, or renew the token."),
    Verdict("invalid x-api-key", 401,
            hint="check the API key of the gateway (ANTHROPIC_API_KEY, or `claude-gateway login --api-key`)."),
)
FINAL_CODES = {"insufficient_quota", "upstream_authentication", "upstream_refused"}   # no retry can help these
# What a refusal is about, by its message, where a correction or an explanation needs to know.
ABOUT_TOOL = re.compile(r"tools\.(\d+)\.")
ABOUT_COMPACTION = re.compile(r"compaction_(?!unavailable)|(?=.*compaction).*(block|signature|summar)", re.S)
ABOUT_LIMIT = re.compile(r"max_tokens: \d+ > (\d+)")
ABOUT_THINKING = re.compile(r"(?=.*thinking).*(signature|invalid `?data`? in|bound to a different conversation|"
                            r"cannot be modified|must contain thinking)", re.S | re.I)
ABOUT_BLOCK = re.compile(r"messages\.\d+\.content\.\d+((\.tool_result)?\.content\.\d+)?")
ABOUT_COMPILING = re.compile(r"grammar[^.]* too large|too complex for compilation|too many (strict|optional|union)|"
                             r"tools can be strict", re.I)
# What a 400 teaches about a model: the pattern of its message, and what is changed in the model's row.  Only what
# changes the refused request, and then a corrected retry that succeeded, makes a lesson (Lessons.learn).
LESSONS: Any = (
    (r"`?(temperature|top_p|top_k)`? (is|are) (deprecated|not supported)", {"sampling": False}),
    (r"not support(ed)?[^.]*prefill|must end with a user message", {"prefill": False}),
    (r"tool_choice.*(not supported|not compatible)|tool_choice forces tool use", {"forced_tools": False}),
    (r"does not support the effort|output_config.*effort.*not supported", {"efforts": ()}),
    (r"(?i)^`?speed\b|not support[^.]*(`speed`|speed parameter|fast mode)|fast mode[^.]* not ", {"fast": False}),
    (r"role 'system' is not supported", {"late_system": False}),
    (r"does not support (structured|output)|output_config.*format.*not supported", {"structured_outputs": False}),
    (r"compaction|compact-2026", {"compaction": False}),
    (r"fallback", {"fallbacks": False}),
)
# ... and the type of thinking that it does not support, with the one that stands in for it.
THINKING_LESSONS = (("thinking.type.enabled", "enabled", "adaptive"),
                    ("thinking.type.disabled|between_tools", "disabled", ""),
                    ("adaptive thinking is not supported", "adaptive", "enabled"))


class ClaudeError(GatewayError):
    """The Messages API refused, by a status or by an `error` event amid a stream."""

    def __init__(self, upstream_status: int, error: dict, headers: dict[str, str] | None = None) -> None:
        self.upstream_status = upstream_status
        self.claude_type = str(error.get("type") or type_of_status(upstream_status))
        message = str(error.get("message") or "The upstream answered %d without a message." % upstream_status)
        unknown = (), (upstream_status if upstream_status >= 400 else 502, "server_error", None)
        _, (self.status, self.kind, code) = CLAUDE_ERRORS.get(self.claude_type, unknown)
        if self.claude_type == "api_error" and 500 <= upstream_status <= 511:
            self.status = upstream_status
        self.error_code = text_in(error, "details", "error_code") or ""
        words = "%s %s" % (message.lower(), self.error_code)
        verdict = next((verdict for verdict in VERDICTS if re.search(verdict.words, words)), Verdict(""))
        self.status, self.kind = verdict.status or self.status, verdict.kind or self.kind
        code, hint = verdict.code or code, verdict.hint
        if (headers or {}).get("anthropic-ratelimit-unified-status") == "rejected" and self.status == 429:
            self.kind = code = "insufficient_quota"          # the plan's window is used up: hours, not seconds
            hint = hint or PLAN_HINT
        if hint:
            message += "%s Hint: %s" % ("" if message.endswith((".", "!", "?")) else ".", hint)
        super().__init__(message, code=code, headers=headers_from_claude(headers or {}))
        self._anthropic_headers = headers_for_anthropic(headers or {})

    def for_anthropic(self) -> tuple[int, dict[str, str], dict]:
        error = {"type": self.claude_type, "message": str(self)}
        return (self.upstream_status if self.upstream_status >= 400 else self.status,
                dict(self.headers, **self._anthropic_headers),
                {"type": "error", "error": error, "request_id": self.headers.get(REQUEST_ID_HEADER)})


# Claude's header -> OpenAI's
OPENAI_HEADERS = {
    "retry-after": "retry-after", "retry-after-ms": "retry-after-ms", "x-should-retry": "x-should-retry",
    "request-id": REQUEST_ID_HEADER,
    **{"anthropic-ratelimit-%s-%s" % (kind, figure): "x-ratelimit-%s-%s" % (figure, kind)
       for kind in ("requests", "tokens") for figure in ("limit", "remaining", "reset")}}


def headers_from_claude(headers: dict[str, str]) -> dict[str, str]:
    """The headers of Claude's answer as OpenAI writes them: resets as "1m30s"."""
    known = {}
    for theirs in filter(headers.get, OPENAI_HEADERS):
        value = headers[theirs]
        then = unix_time(value) if theirs.endswith("reset") else None
        if then is not None:
            seconds = max(0, round(then - time.time()))
            value = "%dm%ds" % divmod(seconds, 60) if seconds >= 60 else "%ds" % seconds
        known[OPENAI_HEADERS[theirs]] = printable(value)
    return known


def headers_for_anthropic(headers: dict[str, str]) -> dict[str, str]:
    """The headers of Claude's answer that a client of Anthropic's own API reads."""
    return {name: printable(value, 1_000) for name, value in headers.items()
            if name in ("request-id", "retry-after", "x-should-retry") or name.startswith("anthropic-")}


# ---- JSON --------------------------------------------------------------------------------------------
# One place for both directions and both sides: decoded within bounds, written the way its reader needs it.

NOT_BRACKETS = bytes(set(range(256)) - set(b'{}[]"'))
BRACKET_KINDS = bytes.maketrans(b"[]", b"{}")
NOT_MEMBERS = bytes(set(range(256)) - set(b",:"))
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")     # half of a surrogate pair; a search, as `in` takes twice as long


def finite_number(digits: str) -> Any:
    """json's hook for numbers, NaN and Infinity.  Raises ValueError for what is not finite, as 1e400."""
    if len(digits) <= 400 and digits.lstrip("-").isdigit():     # longer ones cost much: the time of int() is quadratic
        return int(digits)
    if not math.isfinite(float(digits)):
        raise ValueError("%s is not a finite number" % digits[:20])
    return float(digits)


def lenient_number(digits: str) -> Any:
    """The same hook for the upstream's numbers: one that is not finite is unknown, and ends no request."""
    return finite_number(digits) if math.isfinite(float(digits)) else None


BOUNDED_JSON, LENIENT_JSON = (json.JSONDecoder(parse_constant=hook, parse_float=hook, parse_int=hook)
                              for hook in (finite_number, lenient_number))


def json_within_bounds(text: str, decoder: json.JSONDecoder = BOUNDED_JSON) -> Any:
    """JSON text as a value.  Raises ValueError for what is not JSON, and for what would cost too much: also for depth
    that the parsers of some Pythons would end the process at, where a thread's stack is small (as on Alpine Linux)."""
    brackets = text.count("[") + text.count("{") if len(text) > MAX_NESTING else 0
    if brackets > MAX_BRACKETS:
        raise ValueError("more than %d brackets" % MAX_BRACKETS)
    if brackets > MAX_NESTING and nests_deeper(text.encode("utf-8", "surrogatepass"), MAX_NESTING):
        raise ValueError("nested more than %d deep" % MAX_NESTING)
    if text[:1] == "{":                             # as nearly always; `decode` looks for white space around it
        value, end = decoder.raw_decode(text)
        if end == len(text):
            return value
    return decoder.decode(text)


def nests_deeper(data: bytes, limit: int) -> bool:
    """Whether lists and objects in JSON text nest more than `limit` deep.  A few passes in C, no scan in Python."""
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(BRACKET_KINDS, NOT_BRACKETS)
    brackets = b"".join(plain.split(b'"')[::2])
    for _ in range(limit):
        inner = brackets.replace(b"{}", b"")
        if len(inner) == len(brackets):
            break
        brackets = inner
    return brackets.count(b"{") > limit or b"{}" in brackets


def without_lone_surrogates(value: Any) -> Any:
    """A JSON value with every half of a surrogate pair replaced by U+FFFD, as UTF-8 has no form for it."""
    if isinstance(value, str):
        return value if value.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [without_lone_surrogates(entry) for entry in value]
    if isinstance(value, dict):
        return {without_lone_surrogates(name): without_lone_surrogates(entry) for name, entry in value.items()}
    return value


def json_from_body(body: bytes) -> tuple[dict, bool]:
    """A request body as an object, and whether lone surrogates in it were replaced.  Raises InvalidRequest."""
    try:
        value = json_within_bounds(body.decode("utf-8-sig"))
    except UnicodeDecodeError as fault:
        raise InvalidRequest("The body is not UTF-8 (byte %d)." % fault.start, code="invalid_json") from fault
    except ValueError as fault:
        raise InvalidRequest("The body is not valid JSON: %s." % str(fault)[:200], code="invalid_json") from fault
    if not isinstance(value, dict):
        raise InvalidRequest("The body is not a JSON object.", code="invalid_json")
    if not HALF_PAIR.search(body):
        return value, False
    whole = without_lone_surrogates(value)
    return whole, whole != value


# LENIENT_JSON for a body in which no number is long: without its hook for whole numbers, of which events have many.
SHORT_JSON = json.JSONDecoder(parse_constant=lenient_number, parse_float=lenient_number)
LONG_NUMBER = re.compile(rb"\d{300}")


def json_object_from(body: bytes, event: bool = False) -> dict:
    """A body of the upstream, or an event of its stream, as an object.  Raises UpstreamFault."""
    try:
        decoder = LENIENT_JSON if len(body) > 300 and LONG_NUMBER.search(body) else SHORT_JSON
        value = json_within_bounds(body.decode("utf-8"), decoder)
    except ValueError:
        value = None
    if not isinstance(value, dict) or event and not isinstance(value.get("type"), str):
        raise UpstreamFault("The upstream sent an event that is not JSON of the Messages API." if event else
                            "The upstream answered with something that is not a JSON object.")
    return value


COMPACT_JSON = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"), allow_nan=False)


def client_json(value: Any) -> bytes:
    """JSON for clients: UTF-8, but with escapes for the characters that some line readers split at."""
    text = COMPACT_JSON.encode(value)
    if text.isascii():
        return text.encode("ascii")
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:                      # from the upstream; what clients send is replaced at the door
        return client_json(without_lone_surrogates(value))


def upstream_json(value: Any) -> bytes:
    """JSON for Claude: UTF-8 as it is, and the same bytes for the same value."""
    try:
        return COMPACT_JSON.encode(value).encode("utf-8")
    except ValueError as fault:
        raise InvalidRequest("The request contains something that JSON cannot represent: %s" % fault) from fault


def messages_request_json(request: dict) -> bytes:
    """A Messages request for Claude.  Message by message: one emoji in a chat would cost four times its size."""
    head = dict(request)
    messages = b",".join(map(upstream_json, head.pop("messages")))
    return b"".join([upstream_json(head)[:-1], b',"messages":[', messages, b"]}"])


# ---- Models ------------------------------------------------------------------------------------------
# What each Claude model can do, in one table.  What the live model list says of a model wins over its row;
# the list says nothing about sampling parameters, forced tool choice, prefill or system messages, so the
# table must.  A model that has no row is treated like the newest generation, which refuses most.

EFFORTS = ("low", "medium", "high", "xhigh", "max")
TIERS = ("opus", "sonnet", "haiku", "fable", "mythos")
Price = Tuple[float, float, float]              # US dollars per million tokens: in, in from the cache, out
LONG_PROMPT = 100_000                           # tokens
SEARCH_PRICE = 0.01                             # US dollars for one web search


@dataclasses.dataclass(frozen=True)
class Model:
    """One Claude model.  `thinking`: the types that its `thinking` parameter accepts."""
    id: str
    released: str = ""                          # YYYY-MM-DD, "" when not known
    context: int = 1_000_000                    # tokens
    max_output: int = 128_000                   # tokens
    lifecycle: str = "active"
    retires: str = ""
    sampling: bool = False                      # accepts temperature, top_p, top_k
    forced_tools: bool = False                  # accepts tool_choice any / tool
    prefill: bool = False                       # lets the last message be the assistant's
    late_system: bool = True                    # accepts role "system" amid the messages
    thinking: Tuple[str, ...] = ("adaptive",)
    thinks_by_default: bool = True
    efforts: Tuple[str, ...] = EFFORTS          # () = no effort parameter
    structured_outputs: bool = True
    strict_tools: bool = True                   # compiles the schemas of tools
    web_search: bool = True
    price: Optional[Price] = None
    long_price: Optional[Price] = None          # of requests beyond LONG_PROMPT
    fast_price: Optional[Price] = None          # with `speed` "fast"
    fast: bool = True                           # whether `speed` may be "fast": assumed until a refusal says no
    compaction: bool = True                     # summarizes on request, and takes the block of its summary
    fallbacks: bool = True                      # whether another model may answer what this one refuses: as `fast`
    display_name: str = ""

    @property
    def line(self) -> str:
        """opus, sonnet, haiku ..., or "" for a name of no known line."""
        return next((tier for tier in TIERS if tier in self.id.split("-")), "")

    @property
    def version(self) -> tuple[int, ...]:
        """(5, 5) for claude-opus-5-5; a date is not part of it."""
        return tuple(int(part) for part in self.id.split("-") if re.match(r"[0-9]{1,2}\Z", part))


def _models() -> Iterator[Model]:
    """The built-in table, newest first (facts of November 2026)."""
    can_disable = ("adaptive", "disabled")
    yield Model("claude-fable-5-2", "2026-11-09", price=(8, 0.2, 40))
    yield Model("claude-mythos-5-2")
    yield Model("claude-haiku-5-5", "2026-10-07", price=(0.1, 0.01, 0.5), long_price=(0.5, 0.05, 2.5),
                forced_tools=True, thinking=can_disable)
    yield Model("claude-sonnet-5-5", "2026-09-28", price=(2, 0.1, 10), thinking=("adaptive", "between_tools"))
    yield Model("claude-opus-5-5", "2026-09-22", price=(4, 0.2, 20), fast_price=(8, 0.4, 40))
    yield Model("claude-fable-5-1", "2026-09-01", price=(10, 0.25, 50))
    yield Model("claude-mythos-5-1", price=(10, 0.25, 50))
    yield Model("claude-opus-5", "2026-07-24", price=(5, 0.5, 25), forced_tools=True, thinking=can_disable)
    yield Model("claude-sonnet-5", "2026-06-30", price=(2, 0.2, 10), forced_tools=True, thinking=can_disable,
                late_system=False)
    yield Model("claude-fable-5", "2026-06-09", price=(10, 1, 50), forced_tools=True)
    yield Model("claude-mythos-5", "2026-06-09", price=(10, 1, 50), forced_tools=True)
    quiet = Model("", price=(5, 0.5, 25), forced_tools=True, thinks_by_default=False, thinking=can_disable)
    yield replace(quiet, id="claude-opus-4-8", released="2026-05-28")
    yield replace(quiet, id="claude-opus-4-7", released="2026-04-16", late_system=False)
    both = replace(quiet, sampling=True, late_system=False, thinking=("adaptive", "enabled", "disabled"),
                   efforts=("low", "medium", "high", "max"))
    yield replace(both, id="claude-sonnet-4-6", released="2026-02-17", price=(3, 0.3, 15))
    yield replace(both, id="claude-opus-4-6", released="2026-02-05")
    budgets = replace(both, context=200_000, max_output=64_000, prefill=True, thinking=("enabled", "disabled"),
                      efforts=(), compaction=False)
    yield replace(budgets, id="claude-opus-4-5-20251101", released="2025-11-24", efforts=("low", "medium", "high"),
                  lifecycle="deprecated", retires="2027-01-22")
    yield replace(budgets, id="claude-haiku-4-5-20251001", released="2025-10-15", price=(1, 0.1, 5))
    yield replace(budgets, id="claude-sonnet-4-5-20250929", released="2025-09-29", price=(3, 0.3, 15),
                  lifecycle="deprecated", retires="2026-11-30")


def cost_of(model: Model, usage: dict) -> tuple[float, float] | None:
    """US dollars by list prices: what an answer cost, and what caching saved of it.  None: the price is not known.
    Tokens written to the cache cost a quarter more than others, and those that stay for an hour twice as much."""
    fresh, read, written, output = map(count_of, map(usage.get, (
        "input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")))
    price = model.price
    if fresh + read + written > LONG_PROMPT:
        price = model.long_price or price
    if usage.get("speed") == "fast":
        price = model.fast_price
    if price is None:
        return None
    hour = written and min(written, count_in(usage, "cache_creation", "ephemeral_1h_input_tokens"))
    prompt = (fresh + written * 1.25 + hour * (2 - 1.25)) * price[0] + read * price[1]
    saved = (fresh + read + written) * price[0] - prompt
    tokens = (prompt + output * price[2]) / (2 if usage.get("service_tier") == "batch" else 1)
    searches = count_in(usage, "server_tool_use", "web_search_requests") if "server_tool_use" in usage else 0
    return tokens / 1e6 + searches * SEARCH_PRICE, saved / 1e6


BUILT_IN_MODELS = {model.id: model for model in _models()}
OLDEST_LIVING = (4, 5)                              # every older version is retired
# What stands in for a name of OpenAI's, none for the models of others and for what does not chat; the first one found.
OPENAI_TIERS = ((re.compile(r"^(?!(gpt|chatgpt|codex|o\d+)([-.:]|\d|$))"), ""),
                (re.compile(r"audio|image|embed|realtime|transcri|tts|whisper|dall-e|moderation|sora"), ""),
                (re.compile(r"mini|nano|gpt-3\.5"), "haiku"), (re.compile(r"^o\d|-pro\b"), "opus"),
                (re.compile(r""), "sonnet"))


def undated(model_id: str) -> str:
    return re.sub(r"-\d{8}$", "", model_id)


def same_model(model_id: str, models: Iterable[Model]) -> Model | None:
    """The model of this id, with or without its date on either side."""
    named = [model for model in models if undated(model.id) == undated(model_id)]
    return next((model for model in named if model.id == model_id), named[0] if named else None)


def model_from_info(info: dict) -> Model | None:
    """A `data` entry of Claude's model list over what the table says of that model."""
    model_id = info.get("id")
    if not isinstance(model_id, str) or not re.match(r"[\x21-\x7e]{1,200}\Z", model_id):
        return None
    known = replace(same_model(model_id, BUILT_IN_MODELS.values()) or Model(""), id=model_id)

    def supported(*path: str, otherwise: bool | None = None) -> bool | None:
        value = value_in(info, "capabilities", *path, "supported")
        return value if isinstance(value, bool) else otherwise

    def names(path: tuple[str, ...], known_names: tuple[str, ...], all_names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in all_names if supported(*path, name, otherwise=name in known_names))

    def text(name: str, limit: int = 200) -> str | None:
        return (text_in(info, name) or "")[:limit] or None

    released = text("created_at", 10)
    says: dict[str, Any] = {
        "context": count_of(info.get("max_input_tokens")) or None,
        "max_output": count_of(info.get("max_tokens")) or None,
        "lifecycle": text("lifecycle"), "retires": text("retires_at", 10),
        "released": released if released != "1970-01-01" else None, "display_name": text("display_name"),
        "structured_outputs": supported("structured_outputs"), "web_search": supported("server_tools", "web_search"),
        "compaction": supported("compaction", "summarize"),
        "thinking": names(("thinking", "types"), known.thinking, ("adaptive", "enabled", "disabled", "between_tools")),
        "efforts": names(("effort",), known.efforts, EFFORTS) if supported("effort") is not False else (),
    }
    return replace(known, **{name: value for name, value in says.items() if value is not None})


class Catalog:
    """The models on offer, of Claude's list or else of the built-in table, and the names they go by."""

    def __init__(self, entries: Iterable[dict] = (), aliases: Iterable[tuple[str, str]] = ()) -> None:
        live = [model for model in map(model_from_info, entries) if model]
        self.models = {model.id: model for model in live or BUILT_IN_MODELS.values() if model.lifecycle != "retired"}
        self.aliases = {name.lower(): target.lower() for name, target in aliases}
        self.live = bool(live)                      # the list is complete
        self._model_by_name = functools.lru_cache(maxsize=1_000)(self._model_of)

    def resolve(self, name: str | None) -> Model:
        """The model that a client means by `name`; a refusal names the nearest ones."""
        plain = (name or "").strip().lower()[:200]      # the patterns are not made for more
        asked = self.aliases.get(plain, plain)
        for target in (asked, self.aliases.get("*", asked)):
            model = self._model_by_name(target)
            if model is not None:
                return model
        if not name:
            raise InvalidRequest("model is required; --alias '*=MODEL' would choose one for requests without it.",
                                 "model", "missing_required_parameter")
        raise Refused(404, "model_not_found", "The model %s does not exist here. Nearest: %s. (--alias '*=MODEL' makes "
                      "MODEL answer for every other name.)" % (
                          json.dumps(target[:100]), ", ".join(self.nearest(target[:100]))), "model")

    def thinks(self, name: str) -> bool:
        """Whether a model's name asks for thinking: claude-opus-4-8-thinking, opus:thinking."""
        plain = name.strip().lower()
        return self.aliases.get(plain, plain).endswith(("-thinking", ":thinking"))

    def newest(self, line: str) -> Model | None:
        """The newest active model of a line; a deprecated one only where nothing else is left."""
        models = [model for model in self.models.values() if line and model.line == line]
        return max(models, key=lambda model: (model.lifecycle == "active", model.version), default=None)

    def nearest(self, name: str) -> list[str]:
        """Three names worth trying instead of `name`: the newest of its line, what is spelt alike, or the tiers."""
        newest = self.newest(next((tier for tier in TIERS if tier in name), ""))
        short = [tier for tier in ("sonnet", "opus", "haiku") if self.newest(tier)]
        names = [newest.id] if newest else []
        names += difflib.get_close_matches(name, [*short, *self.aliases], n=1, cutoff=0.7)
        names += difflib.get_close_matches(name, list(self.models), n=3, cutoff=0.6)
        return list(dict.fromkeys(names + short))[:3] or list(self.models)[:3]

    def names(self) -> Iterator[tuple[str, Model]]:
        """Every listed name once, with its model: ids, short names, then the user's aliases, which win."""
        named = dict(self.models)
        named.update((tier, newest) for tier in TIERS for newest in [self.newest(tier)] if newest)
        for alias in without(self.aliases, "*"):
            with suppress(GatewayError):
                named[alias] = self.resolve(alias)
        yield from named.items()

    def _model_of(self, name: str) -> Model | None:
        """The model of a Claude id in any spelling (prefixes, dots, suffixes, dates), or for a name of OpenAI's."""
        if name in self.models:
            return self.models[name]
        plain = re.sub(r"^.*[/~]", "", name)                       # openrouter/anthropic/claude-...
        plain = re.sub(r"^([a-z]+\.)?anthropic\.|^databricks-", "", plain)   # us.anthropic.claude-...
        plain = re.sub(r"-v\d+$", "", re.sub(r"(\[.*\]|[:@].*)$", "", plain)).replace(".", "-").replace("_", "-")
        plain = re.sub(r"-(latest|thinking|beta|fast)$", "", plain)
        plain = re.sub(r"^claude-(\d+(?:-\d+)?)-(opus|sonnet|haiku|fable|mythos)", r"claude-\2-\1", plain)
        tier = undated(plain)[len("claude-"):] if plain.startswith("claude-") else plain
        if tier in TIERS:
            return self.newest(tier)
        if tier == plain:
            name = name.rsplit("/", 1)[-1]
            return self.newest(next(tier for pattern, tier in OPENAI_TIERS if pattern.search(name)))
        unknown = Model(plain)                      # newer than this file: Claude will judge
        judged_here = self.live or not unknown.line or unknown.version < OLDEST_LIVING
        return same_model(plain, self.models.values()) or (None if judged_here else unknown)


def model_entry(name: str, model: Model) -> dict:
    """One entry of the model list, with OpenAI's keys, Anthropic's, and the limits that some tools read."""
    entry = {"id": name, "object": "model", "created": unix_time(model.released) or 0, "owned_by": "anthropic",
             "type": "model", "display_name": model.display_name or model.id,
             "created_at": (model.released or "1970-01-01") + "T00:00:00Z",
             "context_length": model.context, "max_output_tokens": model.max_output}
    if model.retires:
        entry["shutdown_date"] = model.retires
    if name != model.id:
        entry["alias_of"] = model.id
    return entry


def lesson_from_refusal(model: Model, refusal: ClaudeError) -> dict | None:
    """What in the model's row a 400 contradicts, as changes for `dataclasses.replace`; None if nothing."""
    if refusal.upstream_status != 400:
        return None
    message = str(refusal)
    match = ABOUT_LIMIT.search(message)
    lesson: dict = {"max_output": int(match.group(1))} if match else {}
    for pattern, change in LESSONS:
        if re.search(pattern, message):
            lesson.update(change)
    for pattern, refused, instead in THINKING_LESSONS:
        if re.search(pattern, message):
            kinds = [*model.thinking, *([instead] if instead else [])]
            lesson["thinking"] = tuple(dict.fromkeys(kind for kind in kinds if kind != refused)) or ("adaptive",)
    return {name: value for name, value in lesson.items() if getattr(model, name) != value} or None


# ---- Shapes ------------------------------------------------------------------------------------------
# What a request of OpenAI's APIs looks like: one table of all parameters, and the checks.  A wrong shape is an
# InvalidRequest that names its path.  What cannot be translated is reported in `Changes`.


def invalid(path: str, problem: str, code: str = "invalid_value") -> InvalidRequest:
    """The error for what stands at a path of the request."""
    return InvalidRequest("%s: %s" % (path, problem), path, code)


def wrong(path: str, wanted: str, value: Any) -> InvalidRequest:
    """The error for a value of the wrong type."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    got = kinds.get(type(value), "a number")
    return invalid(path, "expected %s, got %s." % (wanted, got), "invalid_type")


def optional(check: Callable[[Any, str], Any], value: Any, path: str, otherwise: Any = None) -> Any:
    """A checked value, or `otherwise` where there is none: null is the same as leaving it out."""
    return otherwise if value is None else check(value, path)


def of_type(kind: type, wanted: str) -> Callable[[Any, str], Any]:
    """The check for a value of one type."""
    def check(value: Any, path: str) -> Any:
        if not isinstance(value, kind):
            raise wrong(path, wanted, value)
        return value
    return check


text_of: Callable[[Any, str], str] = of_type(str, "a string")
object_of: Callable[[Any, str], dict] = of_type(dict, "an object")
list_of: Callable[[Any, str], list] = of_type(list, "an array")


def nested_in(part: dict, name: str, path: str) -> tuple[dict, str]:
    """The object that a part has under a name, or else the part itself, which is the flat spelling; and its path."""
    if part.get(name) is None:
        return part, path
    return object_of(part[name], "%s.%s" % (path, name)), "%s.%s" % (path, name)


def text_at(mapping: dict, name: str, path: str, otherwise: str | None = None) -> str:
    """A string in an object, which may be missing where there is an `otherwise`."""
    value = mapping.get(name)
    return otherwise if value is None and otherwise is not None else text_of(value, "%s.%s" % (path, name))


def entries_of(value: Any, path: str, check: Callable[[Any, str], Any] = object_of) -> list[tuple[str, Any]]:
    """The entries of an array, checked, each with its path."""
    return [(where, check(entry, where)) for at, entry in enumerate(list_of(value, path))
            for where in ["%s[%d]" % (path, at)]]


def anything(value: Any, path: str) -> Any:
    return value


def number_of(value: Any, path: str) -> float:
    """A number, also one that a client wrote as a string."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong(path, "a number", value)
    if not abs(value) < 1e300:
        raise invalid(path, "this number is out of range.")
    return value


def integer_of(value: Any, path: str) -> int:
    number = number_of(value, path)
    if number != int(number):
        raise invalid(path, "expected a whole number.", "invalid_type")
    return int(number)


def rounded_of(value: Any, path: str) -> int:
    return round(number_of(value, path))


def boolean_of(value: Any, path: str) -> bool:
    """A boolean, also one that a client wrote as a string."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise wrong(path, "a boolean", value)
    return value


def stop_of(value: Any, path: str) -> list[str]:
    values = [value] if isinstance(value, str) else list_of(value, path)
    return [text_of(entry, "%s[%d]" % (path, at)) for at, entry in enumerate(values) if entry is not None]


def one_of(*values: str) -> Callable[[Any, str], str]:
    """The check for a field that accepts a few values."""
    def check(value: Any, path: str) -> str:
        if text_of(value, path) not in values:
            raise invalid(path, "expected one of %s." % ", ".join(values))
        return value
    return check


def effort_of(value: Any, path: str) -> str | None:
    """An effort: one of Claude's five, "minimal" or "none"; None where the client leaves it to the model."""
    if isinstance(value, dict):                     # {"effort": ..., "summary": ...}, as bridges send it
        return optional(effort_of, value.get("effort"), path + ".effort")
    effort = text_of(value, path).lower()
    if effort not in EFFORTS + ("none", "minimal", "default", "auto", ""):
        raise invalid(path, "expected none, minimal, low, medium, high, xhigh or max.")
    return None if effort in ("default", "auto", "") else effort


@dataclasses.dataclass
class Changes:
    """What a translation dropped, clamped, changed or repaired: in order, each thing once, with its reason."""
    reported: Dict[Tuple[str, str], str] = dataclasses.field(default_factory=dict)
    ignored: List[str] = dataclasses.field(default_factory=list)    # without effect on the answer: debug log only

    def add(self, verb: str, name: str, why: str = "") -> None:
        """`verb` is dropped, clamped, changed or repaired; `name` the field or thing."""
        self.reported.setdefault((verb, name), why)

    def header(self) -> str:
        """`dropped=seed,logit_bias; changed=tool_choice`: printable ASCII, at most about 1 KB."""
        grouped: Dict[str, List[str]] = {}
        size, more = 0, ""
        for at, (verb, name) in enumerate(self.reported):
            token = re.sub(r"[^A-Za-z0-9_.\[\]-]", "_", name)[:80]
            size += len(token) + len(verb) + 3
            if size > 1_000:
                more = "; +%d more" % (len(self.reported) - at)
                break
            grouped.setdefault(verb, []).append(token)
        return "; ".join("%s=%s" % (verb, ",".join(names)) for verb, names in grouped.items()) + more

    def __str__(self) -> str:
        return "; ".join(["%s %s%s" % (verb, name, " (%s)" % why if why else "")
                          for (verb, name), why in self.reported.items()])


READ, IGNORED, DROPPED, REFUSED = "read", "ignored", "dropped", "refused"
CHAT, RESPONSES = "chat", "responses"


class Parameter(NamedTuple):
    """One parameter of OpenAI's APIs: its shape, and what becomes of it.
    READ: translated further down.  IGNORED: without effect on the answer, named in the debug log only.
    DROPPED and REFUSED: Claude has no counterpart, unless the value is the `default`, which changes nothing."""
    check: Callable[[Any, str], Any] = anything
    fate: str = READ
    default: Any = None
    why: str = "no counterpart"
    api: str = ""                               # the only one that knows it; "" where both do


verbosity_of = one_of("low", "medium", "high")
# Every parameter of both APIs.  `null` is the same as leaving one out.
PARAMETERS = {
    "model": Parameter(text_of), "messages": Parameter(list_of, api=CHAT), "input": Parameter(api=RESPONSES),
    "instructions": Parameter(api=RESPONSES), "previous_response_id": Parameter(text_of, api=RESPONSES),
    "include": Parameter(list_of, api=RESPONSES), "context_management": Parameter(api=RESPONSES),
    "stream": Parameter(boolean_of), "stream_options": Parameter(object_of),
    "max_completion_tokens": Parameter(rounded_of), "max_tokens": Parameter(rounded_of),
    "max_output_tokens": Parameter(rounded_of), "stop": Parameter(stop_of),
    "tools": Parameter(list_of), "functions": Parameter(list_of), "web_search_options": Parameter(object_of),
    "tool_choice": Parameter(), "function_call": Parameter(), "parallel_tool_calls": Parameter(boolean_of),
    "max_tool_calls": Parameter(integer_of, api=RESPONSES),
    "response_format": Parameter(object_of), "text": Parameter(object_of), "verbosity": Parameter(verbosity_of),
    "reasoning_effort": Parameter(effort_of), "reasoning": Parameter(),
    "temperature": Parameter(number_of), "top_p": Parameter(number_of), "top_k": Parameter(integer_of),
    "n": Parameter(integer_of, REFUSED, 1, "Claude gives one answer per request; send the request several times", CHAT),
    "seed": Parameter(integer_of, DROPPED), "prediction": Parameter(object_of, DROPPED),
    "audio": Parameter(object_of, DROPPED), "modalities": Parameter(list_of, DROPPED, ["text"]),
    "logit_bias": Parameter(object_of, DROPPED, {}), "top_logprobs": Parameter(integer_of, DROPPED, 0),
    "logprobs": Parameter(boolean_of, DROPPED, False, "Claude does not return log probabilities", CHAT),
    "frequency_penalty": Parameter(number_of, DROPPED, 0), "presence_penalty": Parameter(number_of, DROPPED, 0),
    "truncation": Parameter(text_of, DROPPED, "disabled", api=RESPONSES), "moderation": Parameter(anything, DROPPED),
    "background": Parameter(boolean_of, REFUSED, False, "there are no background responses here", RESPONSES),
    "conversation": Parameter(anything, REFUSED, "", "conversations are not stored here; send the items in input",
                              RESPONSES),
    "prompt": Parameter(anything, REFUSED, {}, "prompt templates are stored at OpenAI; send their text in input",
                        RESPONSES),
    "store": Parameter(boolean_of, IGNORED), "metadata": Parameter(object_of, IGNORED),
    "service_tier": Parameter(text_of), "user": Parameter(text_of), "safety_identifier": Parameter(text_of),
    "prompt_cache_key": Parameter(text_of, IGNORED), "prompt_cache_retention": Parameter(text_of, IGNORED),
    "prompt_cache_options": Parameter(object_of),
    # not OpenAI's, but sent on purpose by tools that know Claude
    "system": Parameter(api=CHAT), "thinking": Parameter(), "cache_control": Parameter(),
    "speed": Parameter(one_of("standard", "fast")),
    # of other providers and tools
    **dict.fromkeys(("usage", "provider", "client_metadata", "chat_id", "session_id", "transforms",
                     "include_reasoning"), Parameter(anything, IGNORED)),
}
UNKNOWN = Parameter(anything, DROPPED)
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
# Those that ask nothing of the answer but its length.
PLAIN = {"model", "messages", "input", "instructions", "previous_response_id", "include", "stream", "stream_options",
         *OUTPUT_LIMITS}
# The fields inside of a parameter that mean something here; every other one is reported.
INSIDE = {"reasoning": ("effort", "max_tokens", "enabled", "exclude", "summary", "generate_summary", "context"),
          "text": ("format", "verbosity"), "stream_options": ("include_usage", "include_obfuscation"),
          "web_search_options": ("search_context_size", "user_location", "filters", "max_uses", "allowed_domains",
                                 "blocked_domains", "external_web_access"),
          "context_management": ()}                 # an object is Claude's own shape


def read_parameters(body: dict, api: str, changes: Changes) -> dict:
    """The parameters of a request that are translated, checked and without nulls; the others are reported."""
    fields = {}
    for name, value in body.items():
        if value is None:
            continue
        parameter = PARAMETERS.get(name, UNKNOWN)
        if parameter.api not in ("", api):
            parameter = UNKNOWN._replace(default=parameter.default)
        value = parameter.check(value, name)
        if parameter.fate == READ:
            fields[name] = value
            for inner in value if name in INSIDE and isinstance(value, dict) else ():
                if inner not in INSIDE[name] and value[inner]:
                    changes.add("dropped", "%s.%s" % (name, inner), UNKNOWN.why)
        elif parameter.fate == IGNORED:
            changes.ignored.append(name)
        elif parameter.fate == REFUSED and value != parameter.default:
            raise invalid(name, parameter.why + ".", "unsupported_value")
        elif value != parameter.default:
            changes.add("dropped", name, parameter.why)
    return fields


# ---- Translation -------------------------------------------------------------------------------------
# What all parts of a request's translation share.  Pure, as the rooms down to Responses API are: dicts in, dicts out.


def numbered(wanted: str, counts: dict[str, int]) -> str:
    """A name that is not used yet: the wanted one, or that with a number.  `counts`: how often each was wanted."""
    name, count = wanted, counts.get(wanted, 1)
    while name in counts:
        count += 1
        name = "%s_%d" % (wanted, count)
    counts[wanted] = count
    counts.setdefault(name, 1)
    return name


# what a name may have beyond letters, digits, "_" and "-" -> a name that fits, and a character that does not
FITTING = {more: (re.compile(r"[A-Za-z0-9_%s-]{1,64}\Z" % more), re.compile(r"[^A-Za-z0-9_%s-]" % more))
           for more in ("", ".")}


class ToolNames:
    """Names of tools or of properties, there and back: some get one that Claude accepts.  `more`: a key of FITTING."""

    def __init__(self, declared: Sequence[str] = (), taken: Sequence[str] = (), more: str = "") -> None:
        self._fit, self._unfit = FITTING[more]
        self._there: Dict[str, str] = {}
        self._back = dict(zip(taken, taken))
        self._counts = dict.fromkeys(taken, 1)
        for name in declared:
            if self._fit.match(name) and name not in taken:
                self.there(name)                    # as it is, whatever the others become
        for name in declared:
            self.there(name)

    def there(self, name: str) -> str:
        """The name that Claude gets for a client's tool; the same one throughout a request."""
        if name not in self._there:
            fitted = name if self._fit.match(name) else (self._unfit.sub("_", name)[:58] or "tool")
            self._there[name] = fitted = numbered(fitted, self._counts)
            self._back[fitted] = name
        return self._there[name]

    def back(self, name: str) -> str:
        """The client's name of a tool that Claude calls."""
        return self._back.get(name, name)

    def same(self) -> bool:
        """Whether every tool goes by one name on both sides."""
        return list(self._back) == list(self._back.values())

    def renamed(self, mapping: dict) -> dict:
        """An object with the names that Claude gets; a name that was not declared stays."""
        return {self._there.get(name, name): value for name, value in mapping.items()}

    def restored(self, mapping: dict) -> dict:
        """An object of Claude's with the client's names."""
        return {self.back(name): value for name, value in mapping.items()}


def led_by_name(name: str, description: Any) -> str:
    """A description that begins with the name which it stood beside, where Claude gets another one."""
    return "%s: %s" % (name, description) if description and isinstance(description, str) else name


def full_tool_name(namespace: str, name: str) -> str:
    return namespace + "." + name if namespace else name


class Declared(NamedTuple):
    """One tool of the request, whichever of its spellings it came in."""
    path: str
    name: str
    description: str
    parameters: Any
    strict: bool
    custom: bool
    part: dict
    namespace: str = ""                             # of the Responses API: a group of tools with a name

    @property
    def full_name(self) -> str:
        return full_tool_name(self.namespace, self.name)


class Recall(NamedTuple):
    """Looks up what is remembered of earlier requests; by default there is nothing."""
    # the content blocks, thinking and all, of an earlier answer, by its tool call ids
    answer: Callable[[Sequence[str]], Optional[List[dict]]] = lambda call_ids: None
    # the tools that the request had whose answer made one of these calls, as Claude got them
    tools: Callable[[Sequence[str]], List[dict]] = lambda call_ids: []
    refused: Callable[[str], bool] = lambda mark: False     # whether Claude refused a thinking block, by its mark


@dataclasses.dataclass
class ReplyPlan:
    """What the way back has to know of the way there.  Tools are meant by the client's names."""
    names: ToolNames = dataclasses.field(default_factory=ToolNames)
    custom_tools: Sequence[str] = ()                # tools whose input is a bare string
    namespaces: Dict[str, Tuple[str, str]] = dataclasses.field(default_factory=dict)    # full name -> group, name
    properties: Dict[str, ToolNames] = dataclasses.field(default_factory=dict)  # tool -> their names, if mapped
    legacy_functions: bool = False                  # the client uses `functions`: answer in `function_call`
    forced_tool: str = ""                           # the text of the reply is the arguments of this tool
    bare_json: bool = False                         # cut the reply's text down to the JSON object in it
    prewarm: bool = False                           # the cache is filled; there is no answer, and that is no failure


@dataclasses.dataclass
class Draft:
    """A request in the making: what the functions below share while they translate one conversation."""
    model: Model
    changes: Changes
    recall: Callable[[], Recall]
    plan: ReplyPlan = dataclasses.field(default_factory=ReplyPlan)
    declared: Sequence[Declared] = ()               # the client's tools
    search: Sequence[dict] = ()                     # Claude's web search, if it is wanted
    tools: Sequence[dict] = ()                      # of the Messages request
    lenient: bool = False                           # media that Claude refuses become a note: nobody can take them back
    instructions: List[str] = dataclasses.field(default_factory=list)   # for this request only: after the last mark
    compact: bool = False                           # a summary of the conversation is wanted, not an answer


class Translation(NamedTuple):
    """A Messages request, what was changed on the way to it, and the plan for the way back."""
    request: dict
    changes: Changes
    plan: ReplyPlan


# ---- Cache breakpoints -------------------------------------------------------------------------------
# The marks up to which Claude caches a prompt: the client's, and ours.

MOST_BREAKPOINTS = 4
THINKING = ("thinking", "redacted_thinking")        # types of blocks that carry no mark
MARK, MARK_OF_AN_HOUR = {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}
ABOUT_AN_HOUR = ("30m", "1h", "12h", "24h")         # OpenAI's lifetimes that are nearest to Claude's 1h


def mark_from(part: dict) -> dict:
    """The cache mark on a part, message, tool or call: Anthropic's `cache_control` or OpenAI's breakpoint."""
    mark, breakpoint_ = part.get("cache_control"), part.get("prompt_cache_breakpoint")
    if isinstance(mark, dict) and mark.get("type") == "ephemeral":
        return MARK_OF_AN_HOUR if mark.get("ttl") == "1h" else MARK
    if isinstance(breakpoint_, dict):
        return MARK_OF_AN_HOUR if breakpoint_.get("ttl") in ABOUT_AN_HOUR else MARK
    return {}


def marked(blocks: list[dict], part: dict) -> list[dict]:
    """The blocks, the last of them with the mark that its part carries (thinking cannot carry one)."""
    mark = mark_from(part)
    if mark and blocks and blocks[-1].get("type") not in THINKING:
        blocks[-1]["cache_control"] = dict(mark)
    return blocks


def place_breakpoints(request: dict, fields: dict, ours: bool, draft: Draft) -> None:
    """At most four cache marks: the client's own, and ours in the free slots.  Ours end the last turn, the turn that
    the request before this one ended with (so that its cache is found even when a long agent turn lies between: Claude
    looks back only 20 blocks), the system text and the tools."""
    in_front, in_turns = marked_blocks(request)
    free = MOST_BREAKPOINTS - len(in_front) - len(in_turns)
    if free < 0:
        for block in (in_turns + in_front)[:-free]:
            del block["cache_control"]
        draft.changes.add("dropped", "cache_control", "more than four marks: the oldest %d" % -free)
    options = fields.get("prompt_cache_options") or {}
    if ours and options.get("mode") != "explicit":
        mark = "cache_control" in fields and mark_from(fields) or MARK
        mark = MARK_OF_AN_HOUR if options.get("ttl") in ABOUT_AN_HOUR else mark
        for block in our_breakpoints(request, bool(draft.instructions)):
            if free > 0 and not ("cache_control" in block or block.get("type") in THINKING):
                block["cache_control"] = dict(mark)
                free -= 1
    if in_front or in_turns:                        # ours alone share one lifetime
        mark = MARK
        for block in reversed(sum(marked_blocks(request), [])):     # one of 1h may not follow one of 5m
            mark = MARK_OF_AN_HOUR if "ttl" in block["cache_control"] else mark
            block["cache_control"] = dict(mark)


def our_breakpoints(request: dict, instructed: bool) -> list[dict]:
    """The blocks worth a mark, the most useful first."""
    messages = request["messages"]
    last = len(messages) - 1
    while instructed and messages[last]["role"] != "user":
        last -= 1                                   # the instruction goes in front of system text and prefill
    asked = last - 1                                # the end of the request before this one
    while asked >= 0 and messages[asked + 1]["role"] != "assistant":
        asked -= 1
    ends = [messages[at]["content"][-1] for at in (last, asked) if at >= 0]
    return ends + request.get("system", [])[-1:] + request.get("tools", [])[-1:]


def marked_blocks(request: dict) -> tuple[list[dict], list[dict]]:
    """The blocks with a mark, in the order of the prompt: of tools and system text, and of the turns."""
    in_front = request.get("tools", []) + request.get("system", [])
    turns: list[dict] = []
    for message in request["messages"]:
        for block in message["content"]:
            if block["type"] == "tool_result":
                turns += [inner for inner in listed(block.get("content")) if "cache_control" in inner]
            if "cache_control" in block:
                turns.append(block)
    return [block for block in in_front if "cache_control" in block], turns


# ---- Content -----------------------------------------------------------------------------------------
# The parts of a message as content blocks.

IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
HTTP_URL = re.compile(r"https?://[^\s\\\x00-\x20\x7f]+\Z", re.I)


def text_blocks(text: str) -> list[dict]:
    """One text block, or none: Claude refuses texts of nothing but white space."""
    return [{"type": "text", "text": text}] if text.strip() else []


# What a file begins with -> its type
MAGIC_BYTES = ((rb"\xff\xd8\xff", "image/jpeg"), (rb"\x89PNG\r\n\x1a\n", "image/png"), (rb"GIF8[79]a", "image/gif"),
               (rb"(?s)RIFF....WEBP", "image/webp"), (rb"(?s).{0,1019}%PDF-", "application/pdf"))


def media_type_of(start: bytes) -> str:
    """What the first bytes of a file say it is: one of the types that Claude accepts, or ""."""
    return next((media_type for magic, media_type in MAGIC_BYTES if re.match(magic, start)), "")


def document(source: dict, title: str) -> list[dict]:
    block = {"type": "document", "source": source}
    return [dict(block, title=title[:500]) if title.strip() else block]


def text_document(text: str, title: str) -> list[dict]:
    return document({"type": "text", "media_type": "text/plain", "data": text}, title) if text.strip() else []


def private_literal(host: str) -> bool:
    """Whether a host is an address literal outside the public internet (names are judged when they resolve)."""
    host = host.rstrip(".").split("%")[0]
    if is_address(host):
        return not is_public(host)
    parts = host.split(".")                         # 127.1, 0x7f.1, 0177.0.0.1, 2130706433: as resolvers read them
    if len(parts) > 4 or not all(re.match(r"(0x[0-9a-f]*|\d+)\Z", part, re.I) for part in parts):
        return False
    try:
        numbers = [int(part or "0", 0) if not re.match(r"0\d", part) else int(part, 8) for part in parts]
        whole = sum(number << 8 * (3 - at) for at, number in enumerate(numbers[:-1])) + numbers[-1]
        return not is_public(str(ipaddress.IPv4Address(whole)))
    except ValueError:
        return True                                 # an address that is none


def checked_url(url: str, path: str) -> str:
    """A web address that may be handed on: http or https, and not of this machine or network by its spelling."""
    if not HTTP_URL.match(url):
        raise invalid(path, "%r: expected an http or https address or a data URL." % url[:200], "invalid_image_url")
    host = ""
    with suppress(ValueError):
        host = urllib.parse.urlsplit(url).hostname or ""
    in_brackets = "[" in url.partition("//")[2].partition("/")[0]
    if not host or in_brackets and ":" not in host or is_loopback_host(host) or private_literal(host):
        raise invalid(path, "%r: addresses of this machine or a private network are not fetched." % url[:200],
                      "invalid_image_url")
    scheme, colon, rest = url.partition(":")
    return scheme.lower() + colon + rest


def blocks_from_base64(data: str, declared: str, title: str, path: str, draft: Draft) -> list[dict]:
    """Base64 as an image or document block, by what the bytes are, whatever type they are declared to be."""
    data = re.sub(r"\s+", "", data).replace("-", "+").replace("_", "/").rstrip("=")
    data += "=" * (-len(data) % 4)
    if not re.match(r"[A-Za-z0-9+/]+={0,2}\Z", data) or len(data.rstrip("=")) % 4 == 1:
        raise invalid(path, "not valid base64.", "invalid_base64")
    found = media_type_of(base64.b64decode(data[:2_000]))
    declared = {"image/jpg": "image/jpeg"}.get(declared, declared)      # a common spelling, not a mistake
    source = {"type": "base64", "media_type": found, "data": data}
    if found == "application/pdf":
        return document(source, title)
    if found:
        if declared not in ("", found):
            draft.changes.add("repaired", path, "%s is %s by its bytes" % (declared, found))
        return [{"type": "image", "source": source}]
    with suppress(UnicodeDecodeError):
        text = base64.b64decode(data).decode("utf-8-sig")
        if "\0" not in text:
            if declared.startswith("image/"):       # SVG
                draft.changes.add("changed", path, "%s to text" % declared)
            return text_document(text, title)
    known = declared in ("application/pdf", *IMAGE_TYPES) or declared.startswith("text/")
    found = "declared %s, but its bytes are none of these" % declared if known else declared or "none of them"
    raise invalid(path, "Claude accepts JPEG, PNG, GIF and WebP images, PDF files and UTF-8 text; this is %s." % found,
                  "unsupported_file")


def blocks_from_url(url: str, title: str, path: str, draft: Draft, kind: str = "image") -> list[dict]:
    """A data URL or bare base64 as what it holds, a web address as a source that Claude fetches."""
    if url[:5].lower() == "data:":
        head, comma, data = url[5:].partition(",")
        if not comma:
            raise invalid(path, "a data URL needs a comma before its data.")
        data = urllib.parse.unquote(data) if "%" in data else data
        if head.lower().endswith(";base64"):
            return blocks_from_base64(data, head.split(";")[0].strip().lower(), title, path, draft)
        return text_document(data, title)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url) or not re.match(r"[A-Za-z0-9+/_=\s-]{40,}\Z", url):
        source = {"type": "url", "url": checked_url(url, path)}
        return document(source, title) if kind == "document" else [{"type": kind, "source": source}]
    return blocks_from_base64(url, "", title, path, draft)


def no_stored_files(path: str) -> InvalidRequest:
    return invalid(path + ".file_id", "no files are stored here; send the file itself.", "unsupported_value")


def source_part(part: dict, path: str, draft: Draft) -> list[dict]:
    """An image or document of the Messages API, as far as a gateway can check it."""
    source, path = object_of(part["source"], path + ".source"), path + ".source"
    kind, title = source.get("type"), text_in(part, "title") or ""
    if kind == "content":
        return blocks_from_content(source.get("content"), path + ".content", draft)
    if kind == "text":
        return text_document(text_at(source, "data", path), title)
    if kind == "base64":
        declared = text_in(source, "media_type") or ""
        return blocks_from_base64(text_at(source, "data", path), declared, title, path + ".data", draft)
    if kind == "file":
        raise no_stored_files(path)
    kind = "image" if "image" in part["type"] else "document"
    return blocks_from_url(text_at(source, "url", path), title, path + ".url", draft, kind)


def image_part(part: dict, path: str, draft: Draft) -> list[dict]:
    """`image_url` in its three spellings, or an image of the Model Context Protocol."""
    if part.get("data") is not None:
        declared = text_in(part, "mimeType") or ""
        return blocks_from_base64(text_at(part, "data", path), declared, "", path + ".data", draft)
    image = part.get("image_url")
    if image is None and part.get("file_id") is not None:
        raise no_stored_files(path)
    path += ".image_url"
    if isinstance(image, dict):
        image, path = image.get("url"), path + ".url"
    return blocks_from_url(text_of(image, path), "", path, draft)


def file_part(part: dict, path: str, draft: Draft) -> list[dict]:
    """`file` with its data inside, or a document.  There is no store of uploaded files here."""
    file, path = nested_in(part, "file", path)
    title = text_at(file, "filename", path, "")
    if file.get("file_data") is not None:
        data, path = text_of(file["file_data"], path + ".file_data"), path + ".file_data"
        if data.startswith("data:"):
            return blocks_from_url(data, title, path, draft)
        return blocks_from_base64(data, "", title, path, draft)
    for name in ("file_url", "document_url"):
        if file.get(name) is not None:
            return blocks_from_url(text_at(file, name, path), title, path + "." + name, draft, "document")
    if file.get("file_id") is not None:
        raise no_stored_files(path)
    raise invalid(path, "expected file_data.", "missing_required_parameter")


def refused_part(part: dict, path: str, draft: Draft) -> list[dict]:
    kind = "video" if part["type"] == "video_url" else "sound"
    raise invalid(path, "Claude does not accept %s; send its transcript or frames instead." % kind, "unsupported_value")


def thinking_block(block: Any, text: str = "thinking") -> list[dict]:
    """A thinking block as Claude signed it; text without a signature never becomes thinking."""
    thinking, signature, data = (value_in(block, name) for name in (text, "signature", "data"))
    if signature and isinstance(signature, str) and isinstance(thinking or "", str):
        return [{"type": "thinking", "thinking": thinking or "", "signature": signature}]
    if data and isinstance(data, str):
        return [{"type": "redacted_thinking", "data": data}]
    return []


PARTS: Dict[str, Callable[[dict, str, Draft], List[dict]]] = {
    **dict.fromkeys(("text", "input_text", "output_text", "refusal"), lambda part, path, draft: text_blocks(
        text_at(part, "refusal" if part.get("type") == "refusal" else "text", path))),
    **dict.fromkeys(("image_url", "input_image", "image"), image_part),
    **dict.fromkeys(("file", "input_file", "document", "document_url"), file_part),
    **dict.fromkeys(("input_audio", "audio", "video_url"), refused_part),
    **dict.fromkeys(THINKING, lambda part, path, draft: thinking_block(part)),
    **dict.fromkeys(("reasoning", "reasoning_text"), lambda part, path, draft: []),     # it is not Claude's
}
MEDIA = {kind for kind, translate in PARTS.items() if translate in (image_part, file_part)}
LEFT_OUT = "[A file that Claude does not accept was left out here.]"
MALFORMED = ("invalid_type", "missing_required_parameter")      # codes of a part that is no medium at all


def content_parts(content: Any, path: str) -> list[tuple[str, dict]]:
    """The parts of a message's content that is no string, each with its path."""
    return [(where, {"type": "text", "text": part} if isinstance(part, str) else object_of(part, where))
            for where, part in entries_of([] if content is None else content, path, anything)]


def blocks_from_content(content: Any, path: str, draft: Draft) -> list[dict]:
    """The content of a message as content blocks without empty texts."""
    if isinstance(content, str):
        return text_blocks(content)
    return [block for where, part in content_parts(content, path) for block in blocks_from_part(part, where, draft)]


def blocks_from_part(part: dict, path: str, draft: Draft, assistant: bool = False) -> list[dict]:
    """One content part.  Media that Claude refuses are an error only where the client can still take them back."""
    translate = PARTS.get(str(part.get("type", "text" if "text" in part else "")))
    if translate in (image_part, file_part) and part.get("source") is not None:
        translate = source_part
    if translate is None:
        draft.changes.add("changed", path, "a part of unknown type, passed on as text")
        return marked(text_blocks(json.dumps(part, ensure_ascii=False)), part)
    try:
        found = translate(part, path, draft)
    except InvalidRequest as fault:
        if not draft.lenient or fault.code in MALFORMED:
            raise
        draft.changes.add("changed", path, "to a note: %s" % fault)
        found = text_blocks(LEFT_OUT)
    if not assistant:
        found = [block for block in found if block["type"] not in THINKING]
    elif any(block["type"] not in ("text", *THINKING) for block in found):
        draft.changes.add("dropped", path, "Claude accepts only text from the assistant")
        found = text_blocks("[%s]" % found[0]["type"])
    return marked(found, part)


def parts_in_text(text: str) -> list:
    """The content parts that a tool wrote as JSON into its result; [] where it is a text like any other."""
    if not re.match(r"\s*\[\s*\{", text) or not any('"%s"' % kind in text for kind in MEDIA):
        return []
    try:
        parts = without_lone_surrogates(json_within_bounds(text))
    except ValueError:
        return []
    kinds = {text_in(part, "type") for part in parts}
    return parts if kinds <= set(PARTS) and MEDIA & kinds else []


def content_of_result(content: Any, path: str, draft: Draft) -> Any:
    """The content of a tool's result: a string or blocks.  No client can take back what a tool returned."""
    lenient, draft.lenient = draft.lenient, True
    if isinstance(content, list):
        content = blocks_from_content(content, path, draft)
    elif isinstance(content, str):
        parts = parts_in_text(content)
        with suppress(InvalidRequest):   # it only looked like parts
            content = blocks_from_content(parts, path, draft) if parts else content
    else:
        content = "" if content is None else json.dumps(content, ensure_ascii=False)
    draft.lenient = lenient
    return content


# ---- Tool schemas ------------------------------------------------------------------------------------
# JSON Schema as Claude accepts it, and the subset of it that Claude compiles.

schema_type_of = one_of("object", "array", "string", "number", "integer", "boolean", "null")


def path_in_schema(path: str, name: str) -> str:
    """The path of a member, cut to what people read: with long names inside long names it would be quadratic."""
    return "%s.%s" % (path[-500:], name[:100])


def checked_schema(schema: Any, path: str) -> Any:
    """A schema with the shapes of JSON Schema 2020-12, older drafts' spellings brought up to date, nulls left out."""
    if isinstance(schema, bool):
        return schema
    schema = {key: value for key, value in object_of(schema, path).items()
              if key in ("const", "default") or value is not None and not (value == [] and key in MAY_BE_EMPTY)}
    if isinstance(schema.get("items"), list):       # draft 4's tuples
        schema["prefixItems"] = schema.pop("items")
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(exclusive), bool):     # draft 4's flags
            if schema.pop(exclusive) and bound in schema:
                schema[exclusive] = schema.pop(bound)
    return {key: SCHEMA_CHECKS.get(key, anything)(value, path_in_schema(path, key)) for key, value in schema.items()}


def map_of_schemas(value: Any, path: str) -> dict:
    return {name: checked_schema(schema, path_in_schema(path, name)) for name, schema in object_of(value, path).items()}


def required_of(value: Any, path: str) -> list[str]:
    names = [] if isinstance(value, bool) else list_of(value, path)         # draft 3's flags
    return list(dict.fromkeys(text_of(name, path) for name in names))


LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
MAY_BE_EMPTY = (*LISTS_OF_SCHEMAS, "type", "enum", "items")     # an empty value: as if left out
# keyword -> the shape of its value
SCHEMA_CHECKS: Dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"), map_of_schemas),
    **dict.fromkeys(LISTS_OF_SCHEMAS, lambda value, path: [
        schema for _, schema in entries_of(value, path, checked_schema)]),
    **dict.fromkeys(("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else"),
                    checked_schema),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength",
                     "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), number_of),
    **dict.fromkeys(("$ref", "description", "title", "pattern", "format"), text_of),
    "required": required_of, "enum": list_of,
    "type": lambda value, path: [schema_type_of(kind, path) for kind in value] if isinstance(value, list)
    else schema_type_of(value, path)}


def resolved(reference: str, root: dict) -> dict:
    """The part of a schema that a local `$ref` names ({} where there is none); RFC 6901 pointers."""
    steps = [urllib.parse.unquote(step) for step in reference.lstrip("#").split("/")[1:]]
    value = value_in(root, *[step.replace("~1", "/").replace("~0", "~") for step in steps])
    return value if isinstance(value, dict) else {}


def merged_root(schema: dict, composition: str) -> dict:
    """A root union as one object: every branch's properties; required is what all branches (allOf: any) require."""
    branches = [resolved(branch["$ref"], schema) if "$ref" in branch else branch
                for branch in schema[composition] if isinstance(branch, dict)]
    objects = [branch for branch in branches if "object" in (branch.get("type", "object"), *listed(branch.get("type")))]
    properties, required = dict(schema.get("properties", {})), list(schema.get("required", ()))
    for branch in objects:
        for name, value in branch.get("properties", {}).items():
            properties.setdefault(name, value)
    demands = [set(branch.get("required", ())) for branch in objects] or [set()]
    shared = set.union(*demands) if composition == "allOf" else set.intersection(*demands)
    rooted = dict(without(schema, composition), type="object", properties=properties,
                  required=required + sorted(shared - set(required)))
    if composition != "allOf":
        shapes = [{"properties": list(branch.get("properties", {})), "required": branch.get("required", [])}
                  for branch in objects]
        note = "%s of these shapes: %s" % ("Exactly one" if composition == "oneOf" else "One", json.dumps(shapes))
        rooted["description"] = (schema.get("description", "") + "\n" + note).strip()
    return rooted


def root_schema(parameters: Any, path: str, name: str, draft: Draft) -> dict:
    """A tool's schema with the root that Claude requires: an object, without composition, `$schema` left out."""
    if parameters is None:
        return {"type": "object", "properties": {}}
    schema = without(checked_schema(object_of(parameters, path), path), "$schema")
    if isinstance(schema.get("$ref"), str):
        schema = dict(resolved(schema["$ref"], schema), **without(schema, "$ref"))
    for composition in ("allOf", "anyOf", "oneOf"):
        if isinstance(schema.get(composition), list):
            draft.changes.add("repaired", path, "%s at the root of the schema of %s" % (composition, name))
            schema = merged_root(schema, composition)
    if "object" not in (schema.get("type", "object"), *listed(schema.get("type"))):
        raise invalid(path + ".type", "the parameters of tool %s must be an object." % name)
    schema = dict(schema, type="object",
                  properties=optional(object_of, schema.get("properties"), path + ".properties", {}))
    return schema if listed(schema.get("required")) else without(schema, "required")


class Unsupported(Exception):
    """A schema that has no equivalent in the subset that Claude compiles."""


# Keywords of JSON Schema that Claude compiles; every other one that means something goes into the description.
KEPT_KEYWORDS = {"type", "properties", "required", "items", "enum", "const", "anyOf", "allOf", "default", "description",
                 "title", "additionalProperties", "$ref"}
MEANINGLESS_KEYWORDS = {"$defs", "definitions",     # those in use are gathered at the root
                        "$schema", "$id", "$comment", "examples", "deprecated", "readOnly", "writeOnly", "nullable"}
KEPT_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"}
MOST_STRICT_TOOLS, MOST_OPTIONAL, MOST_UNIONS = 20, 24, 16


class Subset:
    """Brings one schema into the subset that Claude compiles; counts what it limits.  Raises Unsupported."""
    DEFINITION = re.compile(r"#/(\$defs|definitions)/([\w.-]+)\Z")

    def __init__(self, root: dict, others: Sequence[Subset] = ()) -> None:
        self.root = root
        self._others = others                       # that Claude compiles together with this one
        self.optional = self.unions = 0
        self.moved: Dict[str, None] = {}            # keywords that went into a description
        self._definitions: Dict[str, dict] = {}     # those in use, by their reference
        self._written_out = 0

    def whole(self, as_it_is: bool = False) -> dict:
        """The converted schema, with the definitions that it uses.  `as_it_is`: nothing may go into a description."""
        try:
            converted = self.schema(without(self.root, "$defs", "definitions"))
        except RecursionError:
            raise Unsupported("a chain of references that is too long") from None
        if not converted:
            raise Unsupported("a schema without any keyword")
        for reference, definition in self._definitions.items():
            group, name = reference[2:].split("/", 1)
            converted.setdefault(group, {})[name] = definition
        if as_it_is and self.moved:
            raise Unsupported(", ".join(self.moved))
        together = [*self._others, self]
        if len(together) > MOST_STRICT_TOOLS or sum(each.optional for each in together) > MOST_OPTIONAL or \
                sum(each.unions for each in together) > MOST_UNIONS:
            raise Unsupported("more than Claude compiles in one request")
        return converted

    def schema(self, schema: Any, inside: tuple[str, ...] = ()) -> dict:
        """The schema of one value.  `inside`: the references that led here, to find recursion."""
        if not isinstance(schema, dict):
            raise Unsupported("a schema that is no object")
        if schema.get("$ref") is not None:
            return self.reference(schema, schema["$ref"], inside)
        if len(listed(schema.get("allOf"))) == 1:
            return self.schema(dict(schema["allOf"][0], **without(schema, "allOf")), inside)
        kept = {key: value for key, value in schema.items() if key in KEPT_KEYWORDS}
        notes = [self.keyword(key, value, kept) for key, value in schema.items() if key not in KEPT_KEYWORDS]
        if "enum" in kept and not all(isinstance(value, (str, int, float, bool, type(None))) for value in kept["enum"]):
            notes.append("one of " + json.dumps(kept.pop("enum")))
        description = ". ".join(filter(None, [kept.get("description"), *notes]))
        if description:
            kept["description"] = description
        self.branches(schema, kept, inside)
        types = schema.get("type")
        if {"properties", "additionalProperties"} & set(schema) or "object" in (types, *listed(types)):
            self.object(schema, kept, inside)
        if "items" in schema:
            kept["items"] = self.schema(schema["items"], inside)
        return kept

    def branches(self, schema: dict, kept: dict, inside: tuple[str, ...]) -> None:
        self.unions += len(listed(schema.get("type"))) > 1
        for composition in ("anyOf", "oneOf", "allOf"):
            if composition in schema:
                branches = [self.schema(branch, inside) for branch in schema[composition]]
                if composition == "allOf" and any("$ref" in branch for branch in branches):
                    raise Unsupported("allOf with a reference")
                kept["anyOf" if composition == "oneOf" else composition] = branches
                self.unions += composition != "allOf"

    def object(self, schema: dict, kept: dict, inside: tuple[str, ...]) -> None:
        """Every object must be closed; one whose point is to be open has no equivalent."""
        properties = schema.get("properties") or {}
        more = schema.get("additionalProperties")
        if more is not False and not (more is None and properties):
            raise Unsupported("an object with free keys")
        kept["properties"] = {name: self.schema(value, inside) for name, value in properties.items()}
        kept["additionalProperties"] = False
        kept["required"] = [name for name in schema.get("required") or () if name in properties]
        self.optional += len(properties) - len(kept["required"])

    def reference(self, schema: dict, reference: Any, inside: tuple[str, ...]) -> dict:
        """A reference to a definition stays; any other, or one with keywords beside it, is written out."""
        if not isinstance(reference, str) or not reference.startswith("#") or reference in inside:
            raise Unsupported("a recursive or external reference")
        target, beside = resolved(reference, self.root), without(schema, "$ref")
        if not target:
            raise Unsupported("a reference to nothing")
        if beside or not self.DEFINITION.match(reference):
            self._written_out += 1
            if self._written_out > 200:             # definitions that use each other twice grow without end
                raise Unsupported("too many references to write out")
            return self.schema(dict(target, **beside), inside + (reference,))
        if reference not in self._definitions:
            self._definitions[reference] = self.schema(target, inside + (reference,))
        return {"$ref": reference}

    def keyword(self, key: str, value: Any, kept: dict) -> str:
        """What to do with a keyword out of the common set: keep it, or describe it."""
        if key in MEANINGLESS_KEYWORDS or key == "oneOf":
            return ""
        if key == "format" and value in KEPT_FORMATS or key == "minItems" and value in (0, 1) or \
                key == "pattern" and isinstance(value, str) and not re.search(r"\(\?|\\[1-9bB]", value):
            kept[key] = value
            return ""
        self.moved[key] = None
        return "%s: %s" % (key, json.dumps(value, ensure_ascii=False))


# ---- Tools -------------------------------------------------------------------------------------------
# The tools of a request in all their spellings, and Claude's web search.

WEB_SEARCH = "web_search"
WEB_SEARCH_USES = {"low": 3, "medium": 5, "high": 10}     # searches per answer for OpenAI's search_context_size
WEB_SEARCH_TYPES = re.compile("(openrouter:)?web_search")       # of the tools that ask for it
# Types of hosted tools for which Claude has one of its own.
CLAUDE_HOSTED = re.compile("web_fetch|code_|mcp|tool_search|computer|bash|(local_)?shell|text_editor|memory|advisor")


def why_no_tool(kind: Any) -> str:
    """Why a hosted tool is left out."""
    if CLAUDE_HOSTED.match(str(kind)):
        return "tools of type %s are not translated here" % json.dumps(kind)
    return "Claude has no tool of type %s" % json.dumps(kind)


def declared_function(tool: dict, path: str, namespace: str) -> Declared:
    """A function tool: OpenAI's nested shape, the flat one of the Responses API, or Anthropic's own."""
    function, path = nested_in(tool, "function", path)
    name = text_at(function, "name", path)
    if not name.strip():
        raise invalid(path + ".name", "must not be empty.")
    strict = optional(boolean_of, function.get("strict", tool.get("strict")), path + ".strict", False)
    schema = function.get("parameters", function.get("input_schema"))
    return Declared(path, name, text_at(function, "description", path, ""), schema, strict, False, tool, namespace)


def declared_custom(tool: dict, path: str, namespace: str) -> Declared:
    """The input of a custom tool is a bare string; its grammar can only be described to Claude, not enforced."""
    custom, path = nested_in(tool, "custom", path)
    name = text_at(custom, "name", path)
    description = text_at(custom, "description", path, "")
    shape = optional(object_of, custom.get("format"), path + ".format", {})
    grammar = shape.get("grammar", shape) if shape.get("type") == "grammar" else {}
    if isinstance(grammar, dict) and grammar.get("definition"):
        description += "\n\nThe input must follow this %s grammar:\n%s" % (grammar.get("syntax"), grammar["definition"])
    parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
                  "additionalProperties": False}
    return Declared(path, name, description.strip(), parameters, False, True, tool, namespace)


def tools_from_entry(path: str, tool: dict, changes: Changes, namespace: str) -> list[Declared]:
    """One entry of a tool list: a function or custom tool, a namespace of them, or what Claude has no tool for."""
    kind = tool.get("type") or "function"
    if len(tool) == 1 and not {"type", "name", "function", "custom"} & set(tool):
        kind = next(iter(tool))                     # {"googleSearch": {}}
    if kind == "namespace" and not namespace:
        return declared_tools(entries_of(tool.get("tools"), path + ".tools"), changes, text_at(tool, "name", path))
    if tool.get("custom") is not None or kind == "custom" and "input_schema" not in tool:
        return [declared_custom(tool, path, namespace)]
    if kind in ("function", "custom"):
        return [declared_function(tool, path, namespace)]
    if not WEB_SEARCH_TYPES.match(str(kind)):
        changes.add("dropped", path, why_no_tool(kind))
    return []


def declared_tools(entries: Iterable[tuple[str, dict]], changes: Changes, namespace: str = "") -> list[Declared]:
    """The client's own tools; of two with one name the first."""
    first: dict[str, Declared] = {}
    for path, tool in entries:
        for declared in tools_from_entry(path, tool, changes, namespace):
            if declared.full_name in first:
                changes.add("dropped", declared.path, "a second tool named %s" % declared.name)
            first.setdefault(declared.full_name, declared)
    return list(first.values())


def add_strictness(tool: dict, others: list[Subset], declared: Declared, draft: Draft) -> None:
    """`strict` stays where the schema is in the subset as it is, so that nothing of it is lost."""
    try:
        if not draft.model.strict_tools:
            raise Unsupported("Claude could not compile the schemas of this request")
        subset = Subset(tool["input_schema"], others)
        tool.update(input_schema=subset.whole(as_it_is=True), strict=True)
        others.append(subset)
    except Unsupported as reason:
        draft.changes.add("dropped", declared.path + ".strict", str(reason))


def with_fitting_names(schema: dict, tool: Declared, draft: Draft) -> dict:
    """A tool's schema with names of properties that Claude accepts; it looks at those of the root only."""
    names = ToolNames(list(schema["properties"]), more=".")
    if names.same():
        return schema
    draft.plan.properties[tool.full_name] = names
    draft.changes.add("changed", tool.path + ".parameters", "names of properties, and back")
    described = dict(schema["properties"])
    for name, value in schema["properties"].items():
        if isinstance(value, dict) and names.there(name) != name:
            described[name] = dict(value, description=led_by_name(name, value.get("description")))
    required = {"required": [names.there(name) for name in schema["required"]]} if "required" in schema else {}
    return dict(schema, properties=names.renamed(described), **required)


def tools_from_declared(draft: Draft) -> list[dict]:
    """The client's tools as `tools` of the Messages request, in its order."""
    tools: list[dict] = []
    strict: list[Subset] = []
    for entry in draft.declared:
        name = draft.plan.names.there(entry.full_name)
        if name != entry.full_name and not entry.namespace:
            draft.changes.add("changed", entry.path + ".name", "%s to %s, and back" % (entry.name, name))
        schema = root_schema(entry.parameters, entry.path + ".parameters", entry.name, draft)
        schema = with_fitting_names(schema, entry, draft)
        # of a name that is not ASCII little or nothing is left
        description = entry.description if entry.name.isascii() else led_by_name(entry.name, entry.description)
        tool = dict({"name": name, "description": description} if description else {"name": name}, input_schema=schema)
        if entry.strict:
            add_strictness(tool, strict, entry, draft)
        tools += marked([tool], entry.part)
    return tools


def web_search_tool(fields: dict, entries: list[tuple[str, dict]], model: Model, changes: Changes) -> list[dict]:
    """Claude's web search for `web_search_options` or a web search tool of another API."""
    path, options, most = "web_search_options", fields.get("web_search_options"), fields.get("max_tool_calls")
    for where, tool in entries:
        if options is None and WEB_SEARCH_TYPES.match(str(tool.get("type"))):
            path, options = where, tool
    if options is None:
        if most is not None:
            changes.add("dropped", "max_tool_calls", "only web searches can be limited")
        return []
    obstacle = ("%s has no web search" % model.id if not model.web_search else
                "Claude has no cached index" if options.get("external_web_access") is False else
                "max_tool_calls allows none" if most is not None and most < 1 else "")
    if obstacle:
        changes.add("dropped", path, obstacle)
        return []
    size = one_of(*WEB_SEARCH_USES)(options.get("search_context_size") or "medium", path + ".search_context_size")
    uses = optional(integer_of, options.get("max_uses"), path + ".max_uses", most or WEB_SEARCH_USES[size])
    tool = {"type": "web_search_20250305", "name": WEB_SEARCH, "max_uses": max(1, min(uses, most or uses))}
    tool.update(search_domains(options, path, changes))
    location, path = nested_in(optional(object_of, options.get("user_location"), path + ".user_location", {}),
                               "approximate", path + ".user_location")
    place = {key: text_of(location[key], "%s.%s" % (path, key))
             for key in ("city", "region", "country", "timezone") if location.get(key)}
    if place:
        tool["user_location"] = dict({"type": "approximate"}, **place)
    return [tool]


def search_domains(options: dict, path: str, changes: Changes) -> dict:
    """The domains that a web search is restricted to, in OpenAI's shape or Claude's, which accepts one list."""
    options, path = nested_in(options, "filters", path)
    lists: dict[str, list] = {}
    for name in ("allowed_domains", "blocked_domains"):
        domains = entries_of(options.get(name) or [], "%s.%s" % (path, name), text_of)
        if domains and lists:
            changes.add("dropped", "%s.%s" % (path, name), "Claude accepts either allowed or blocked domains")
        elif domains:
            lists[name] = [re.sub(r"^https?://", "", domain).rstrip("/") for _, domain in domains]
            if lists[name] != [domain for _, domain in domains]:
                changes.add("changed", "%s.%s" % (path, name), "without scheme and slash at the end")
    return lists


def read_tools(fields: dict, draft: Draft, more: Iterable[tuple[str, dict]] = ()) -> None:
    """Reads the tools of `tools` and the legacy `functions`, and more tools, into the draft of a request."""
    entries = [entry for name in ("tools", "functions") if name in fields for entry in entries_of(fields[name], name)]
    entries += more
    draft.declared = declared = declared_tools(entries, draft.changes)
    draft.search = web_search_tool(fields, entries, draft.model, draft.changes)
    names = ToolNames([tool.full_name for tool in declared], [tool["name"] for tool in draft.search])
    draft.plan = ReplyPlan(names, [tool.full_name for tool in declared if tool.custom],
                           {tool.full_name: (tool.namespace, tool.name) for tool in declared if tool.namespace})
    draft.plan.legacy_functions = bool(fields.get("functions")) and not fields.get("tools")
    draft.tools = [*tools_from_declared(draft), *draft.search]


def tools_from_history(messages: list[dict], draft: Draft) -> list[dict]:
    """The tools that a history uses, where the request defines none: Claude insists.  They are as this conversation had
    them last, for thinking is signed and cached with them, or else bare."""
    calls = [block for message in messages for block in message["content"] if block["type"] == "tool_use"]
    if not calls:
        return []
    draft.changes.add("repaired", "tools", "the history uses tools that the request does not define")
    tools = draft.recall().tools([call["id"] for call in calls])
    known = {tool["name"] for tool in tools}
    return tools + [{"name": name, "input_schema": {"type": "object", "properties": {}}}
                    for name in dict.fromkeys(call["name"] for call in calls) if name not in known]


# ---- Conversation ------------------------------------------------------------------------------------
# The history: thinking, calls and results paired, ordered and merged as the Messages API demands.

START = "(The conversation starts here.)"            # a user turn where Claude needs one and the client has none
CONTINUE = "Continue."                              # ... after an assistant turn that the model may not prefill
NO_RESULT = "(no result available)"
chat_role_of = one_of("system", "developer", "user", "assistant", "tool", "function")


@dataclasses.dataclass
class Call:
    """One tool call of the history, with its result: one that says there is none until it is answered."""
    raw_id: str
    turn: Turn
    result: dict
    answered: bool = False


@dataclasses.dataclass
class Turn:
    """One turn in the making: neighbours of the same role become one."""
    role: str
    blocks: List[Any] = dataclasses.field(default_factory=list)     # of the user: LateSystem too, but no tool results
    calls: List[Call] = dataclasses.field(default_factory=list)


def closed(fragment: str) -> str:
    """Truncated JSON with its open string and brackets closed, which often makes it whole."""
    closers: List[str] = []
    in_string = False
    for token in re.findall(r'\\.?|[{}\[\]"]', fragment, re.S):
        if token == '"':
            in_string = not in_string
        elif token in "{[" and not in_string:
            closers.append("}" if token == "{" else "]")
        elif token in "}]" and not in_string and closers:
            closers.pop()
    if in_string:
        fragment = re.sub(r'(?<!\\)((?:\\\\)*)\\(u[0-9a-fA-F]{0,3})?\Z', r"\1", fragment) + '"'      # a cut escape goes
    return fragment + "".join(reversed(closers))


def json_in(text: str) -> tuple[Any, bool]:
    """JSON text as a value, as far as it goes where it is cut, and whether it is.  Raises ValueError."""
    with suppress(ValueError):
        return json_within_bounds(text), False
    return json_within_bounds(closed(text)), True


def object_in(text: str) -> dict | None:
    """The JSON object in a text, as far as it goes; None where there is none."""
    with suppress(ValueError):
        value, _ = json_in(text)
        return value if isinstance(value, dict) else None
    return None


def input_from_arguments(arguments: Any, path: str, draft: Draft) -> dict:
    """The arguments string of a tool call as the object that Claude requires; what does not parse is kept as text."""
    if arguments is None or isinstance(arguments, dict):
        return arguments or {}
    if not text_of(arguments, path).strip():
        return {}
    try:
        value, cut = json_in(arguments)
    except ValueError:
        draft.changes.add("repaired", path, "not JSON: passed on as text")
        return {"_raw": arguments}
    if cut:
        draft.changes.add("repaired", path, "brackets closed")
    whole = without_lone_surrogates(value) if "\\ud" in arguments.lower() else value
    if whole != value:                              # halves of pairs can hide in a string inside a string
        draft.changes.add("repaired", path, "lone surrogates replaced by U+FFFD")
    if isinstance(whole, dict):
        return whole
    return {} if whole is None else {"value": whole}


def gist_of(blocks: list[dict]) -> tuple:
    """The text and calls of an answer: where a client sends them back as they were, it may be replayed."""
    return ("".join(block["text"] for block in blocks if block["type"] == "text").strip(),
            [(block["id"], block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"])


def blocks_for_claude(content: list[dict], *unwanted: str) -> list[dict]:
    """The blocks of an answer as Claude accepts them back: without empty texts and what MessageAssembler adds."""
    return [without(block, "partial_json", *unwanted) for block in content
            if block["type"] != "text" or (block.get("text") or "").strip()]


def lost_blocks(content: list[dict]) -> list[dict]:
    """All blocks of an answer of which OpenAI's messages would lose some, in order to replay it; else []."""
    lost = any(block["type"] not in ("text", "tool_use") for block in content)
    return blocks_for_claude(content, "caller") if lost else []


def add_turn(messages: list[dict], role: str, blocks: list[dict]) -> None:
    """Adds a message, or its blocks to the last one where that has the same role; an empty one is left out."""
    if blocks and messages and messages[-1]["role"] == role:
        messages[-1]["content"] += blocks
    elif blocks:
        messages.append({"role": role, "content": blocks})


def fitting_call_id(raw: str) -> str:
    """A tool call's id in Claude's alphabet; the same history gives the same ids, so a longer one keeps its prefix."""
    plain = re.sub(r"[^a-zA-Z0-9_-]", "_", raw)
    if plain == raw:
        return plain
    return "%s_%s" % (plain[:48], hashlib.sha256(raw.encode("utf-8", "replace")).hexdigest()[:8])


class LateSystem(NamedTuple):
    """A system text amid the messages, until it is known whether it may stay one."""
    block: dict


class Conversation:
    """A history in the making: messages, calls and results as a client sends them go in; they come out paired,
    ordered and merged as the Messages API demands.  A `path` says where in the request something stands."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._turns: List[Turn] = []
        # by the client's id, by name, and all by no name: the calls of the latest turn with one such
        self._calls: Dict[Tuple[str, str], Deque[Call]] = {}
        self.call_ids: Dict[str, int] = {}          # how often each was wanted
        self.system: List[dict] = []
        self.summary: List[dict] = []               # stands for all that came before: a compaction block, or text

    def add(self, role: str, blocks: list[dict]) -> None:
        """Blocks of the user or the assistant, or system text: leading system text is kept apart."""
        if role == "system" and not self._turns:
            self.system += blocks
        elif role == "system":
            self._turn("user").blocks += map(LateSystem, blocks)
        else:
            self._turn(role).blocks += blocks

    def call(self, raw_id: str, function: Any, path: str) -> dict:
        """A tool call of the assistant: `function` has its name and arguments.  Returns its tool_use block."""
        function = object_of(function, path)
        name = self._draft.plan.names.there(text_at(function, "name", path))
        turn, call_id = self._turn("assistant"), numbered(fitting_call_id(raw_id or "call_" + path), self.call_ids)
        arguments = input_from_arguments(function.get("arguments"), path + ".arguments", self._draft)
        properties = self._draft.plan.properties.get(function["name"])
        arguments = properties.renamed(arguments) if properties else arguments
        tool_use = {"type": "tool_use", "id": call_id, "name": name, "input": arguments}
        turn.blocks.append(tool_use)
        missing = {"type": "tool_result", "tool_use_id": call_id, "content": NO_RESULT, "is_error": True}
        call = Call(raw_id, turn, missing)
        turn.calls.append(call)
        for key in (("id", raw_id), ("name", name), ("name", "")):
            if not self._calls.get(key) or self._calls[key][0].turn is not turn:
                self._calls[key] = collections.deque()
            self._calls[key].append(call)
        return tool_use

    def result(self, raw_id: str, name: Any, content: Any, path: str, given: dict) -> None:
        """A tool's result: to the call it answers, or as text where there is none.  `given`: the message, item or part,
        for its cache mark and what else it says of the result."""
        latest = next((turn for turn in reversed(self._turns) if turn.role == "assistant"), None)
        call = self._answered(raw_id, name, latest)
        if call and call.turn is not latest:
            self._draft.changes.add("repaired", path, "a late result moved up to its call")
        user = self._turn("user")
        content = content_of_result(content, path + ".content", self._draft)
        if call is None:
            self._draft.changes.add("repaired", path, "a result without its call, kept as text")
            user.blocks += text_blocks("[result of tool call %s]" % (raw_id or "without id"))
            user.blocks += text_blocks(content) if isinstance(content, str) else content
            return
        if call.answered:
            self._draft.changes.add("repaired", path, "a second result of one call replaces the first")
        call.answered, call.result = True, without(call.result, "content", "is_error", "cache_control")
        if content.strip() if isinstance(content, str) else content:
            call.result["content"] = content
        if given.get("is_error") is True and all(block["type"] == "text" for block in listed(content)):
            call.result["is_error"] = True          # which Claude accepts with text only
        marked([call.result], given)

    def messages(self) -> list[dict]:
        """The messages: results first and complete, system text in its place, a user turn at the front."""
        turns = [turn for turn in self._turns if turn.blocks or turn.role == "user"]
        compacted = bool(self.summary) and self.summary[0]["type"] == "compaction"
        messages: list[dict] = [{"role": "assistant", "content": self.summary}] if compacted else []
        if turns and turns[0].role == "assistant" and not self.summary:
            self._draft.changes.add("repaired", "messages[0]", "a user turn added before the assistant's")
        if not turns or turns[0].role == "assistant":
            turns.insert(0, Turn("user"))
        if turns[-1].calls:
            turns.append(Turn("user"))              # for the results, which are all missing
        recall: Optional[Recall] = None
        for at, turn in enumerate(turns):
            if turn.role == "assistant":
                recall = recall or self._draft.recall()
                add_turn(messages, "assistant", self._replayed(turn, recall))
                continue
            calls = turns[at - 1].calls if at else []
            blocks, late = turn.blocks, []          # type: List[dict], List[dict]
            if calls or LateSystem in map(type, blocks):
                before_assistant = at + 1 == len(turns) or turns[at + 1].role == "assistant"
                blocks, late = self._of_user(blocks, calls, before_assistant)
            if at == 0:
                blocks = blocks if compacted else self.summary + blocks
                blocks = blocks or text_blocks(CONTINUE if compacted else START)
            add_turn(messages, "user", blocks)
            add_turn(messages, "system", late)
        return messages

    def _turn(self, role: str) -> Turn:
        """The turn that something of this role belongs to: the last one, or a new one."""
        if not self._turns or self._turns[-1].role != role:
            self._turns.append(Turn(role))
        return self._turns[-1]

    def _answered(self, raw_id: str, name: Any, latest: Turn | None) -> Call | None:
        """The call of this id (several in one turn are answered one after the other, the last one again and again);
        without an id the first open one of this name in the latest turn, else the first open one there."""
        if raw_id:
            calls = self._calls.get(("id", raw_id))
            return (calls.popleft() if len(calls) > 1 else calls[0]) if calls else None
        for key in (self._draft.plan.names.there(name) if isinstance(name, str) else "", ""):
            calls = self._calls.get(("name", key))
            while calls and calls[0].answered:
                calls.popleft()
            if calls and calls[0].turn is latest:
                return calls[0]
        return None

    def _replayed(self, turn: Turn, recall: Recall) -> list[dict]:
        """An assistant turn, as Claude sent it if that is known and not edited; without thinking that it refused."""
        blocks = turn.blocks
        earlier = recall.answer([call.raw_id for call in turn.calls]) if turn.calls else None
        if earlier and not any(block["type"] in THINKING for block in blocks) and gist_of(earlier) == gist_of(blocks):
            searched = any(block["type"] not in ("text", "tool_use", *THINKING) for block in earlier)
            blocks = blocks if searched and not self._draft.search else marked(earlier, blocks[-1])
        return [block for block, mark in zip(blocks, thinking_marks(blocks)) if not mark or not recall.refused(mark)]

    def _of_user(self, blocks: list[Any], calls: list[Call], before_assistant: bool) -> tuple[list[dict], list[dict]]:
        """The blocks of a user turn, results first, and the system blocks at its end that may stay a system message, by
        the API's rules: behind a user turn that is not empty, and last or before an assistant turn."""
        if False in [call.answered for call in calls]:
            self._draft.changes.add("repaired", "messages", "a call without a result got one that says so")
        end = len(blocks)
        while end and isinstance(blocks[end - 1], LateSystem):
            end -= 1
        if not (self._draft.model.late_system and before_assistant and (calls or end)):
            end = len(blocks)
        found = [call.result for call in calls] + blocks[:end]
        if LateSystem in map(type, found):
            self._draft.changes.add("changed", "system", "a later message, to marked text of the user")
            found = [dict(block.block, text="<system>\n%s\n</system>" % block.block["text"])
                     if isinstance(block, LateSystem) else block for block in found]
        return found, [late.block for late in blocks[end:]]


def thinking_marks(content: list[dict]) -> list[str]:
    """What identifies each thinking block of a turn ("" for other blocks): its signature, and the calls it led to."""
    call_ids = " ".join(block["id"] for block in content if block["type"] == "tool_use")

    def mark(block: dict) -> str:
        signed = "%s %s" % (block.get("signature") or block.get("data"), call_ids)
        return hashlib.sha256(signed.encode("utf-8", "replace")).hexdigest()
    return [mark(block) if block["type"] in THINKING else "" for block in content]


def signed_thinking(chat_message: dict) -> list[dict]:
    """The thinking blocks that a client kept beside the content, with their signatures: `thinking_blocks`, or what of
    `reasoning_details` may be Claude's, the pieces of one block (same `index`) joined."""
    blocks = [block for each in listed(chat_message.get("thinking_blocks")) for block in thinking_block(each)]
    joined: dict[Any, dict] = {}
    for at, detail in enumerate(listed(chat_message.get("reasoning_details"))):
        if not isinstance(detail, dict) or not re.match(r"anthropic|unknown|\Z", str(detail.get("format") or "")):
            continue
        index = detail.get("index")
        block = joined.setdefault((detail.get("type"), index) if isinstance(index, int) else -1 - at, {})
        for name in ("text", "signature", "data"):
            if detail.get(name) and isinstance(detail[name], str):
                block[name] = block.get(name, "") + detail[name]
    return blocks or [block for detail in joined.values() for block in thinking_block(detail, "text")]


def add_content(conversation: Conversation, role: str, message: dict, path: str, draft: Draft,
                kept: Sequence[dict] = ()) -> list[dict]:
    """Adds a message's content, also what is in Claude's shape, behind the thinking `kept`; returns the blocks."""
    content = message.get("content")
    added = [*kept, *text_blocks(content)] if isinstance(content, str) else list(kept)
    conversation.add(role, added)
    for where, part in [] if isinstance(content, str) else content_parts(content, path + ".content"):
        kind = part.get("type")
        if kind == "tool_result" and role == "user":
            conversation.result(text_at(part, "tool_use_id", where, ""), None, part.get("content"), where, part)
        elif kind == "tool_use" and role == "assistant":
            function = {"name": part.get("name"), "arguments": part.get("input")}
            added += marked([conversation.call(text_at(part, "id", where, ""), function, where)], part)
        else:
            blocks = blocks_from_part(part, where, draft, role == "assistant")
            blocks = [block for block in blocks if not kept or block["type"] not in THINKING]
            conversation.add(role, blocks)
            added += blocks
    return added


def add_message(conversation: Conversation, role: str, chat_message: dict, path: str, draft: Draft) -> None:
    """A message of the user, or of the system or developer, which may only be text."""
    role = "user" if role == "user" else "system"
    blocks = add_content(conversation, role, chat_message, path, draft)
    if role == "system" and any(block["type"] != "text" for block in blocks):
        raise InvalidRequest("%s.content: a system message may contain text only." % path, path + ".content")
    if len(chat_message) > 2:                       # what has only a role and content has no mark
        marked(blocks, chat_message)


def add_assistant_message(conversation: Conversation, chat_message: dict, path: str, draft: Draft) -> None:
    """An assistant message: thinking, then text, then tool calls, as Claude once sent them."""
    kept = signed_thinking(chat_message)
    if chat_message.get("reasoning_details") and not kept:
        draft.changes.ignored.append(path + ".reasoning_details")
    blocks = add_content(conversation, "assistant", chat_message, path, draft, kept)
    refusal = text_blocks(text_at(chat_message, "refusal", path, ""))
    if refusal and refusal[0] not in blocks:        # it may be a part of the content as well
        conversation.add("assistant", refusal)
        blocks += refusal
    for where, chat_call in optional(entries_of, chat_message.get("tool_calls"), path + ".tool_calls", ()):
        raw_id = text_at(chat_call, "id", where, "")
        kind = "function" if chat_call.get("custom") is None else "custom"
        function, where = chat_call.get(kind), "%s.%s" % (where, kind)
        if kind == "custom":                        # the input is a bare string
            given = text_of(object_of(function, where).get("input", ""), where + ".input")
            function = {"name": chat_call["custom"].get("name"), "arguments": {"input": given}}
        if not raw_id:                              # legacy calls have none by right
            draft.changes.add("repaired", where, "a call without an id")
        blocks += marked([conversation.call(raw_id, function, where)], chat_call)
    if chat_message.get("function_call") is not None:
        blocks.append(conversation.call("", chat_message["function_call"], path + ".function_call"))
    marked(blocks, chat_message)


def newest_turn(entries: Sequence[tuple[str, dict]]) -> int:
    """Where the newest turn of the user begins: behind all that comes from the assistant or a tool."""
    newest = len(entries)
    while newest and entries[newest - 1][1].get("role") in ("user", "system", "developer"):
        newest -= 1
    return newest


def add_chat_messages(conversation: Conversation, chat_messages: list, draft: Draft) -> None:
    """Adds the messages of a chat completion request."""
    entries = entries_of(chat_messages, "messages")
    newest = newest_turn(entries)
    for at, (path, chat_message) in enumerate(entries):
        draft.lenient = at < newest
        role = chat_message.get("role")
        if role == "assistant":
            add_assistant_message(conversation, chat_message, path, draft)
        elif role in ("tool", "function"):
            raw_id = text_at(chat_message, "tool_call_id", path, "")
            conversation.result(raw_id, chat_message.get("name"), chat_message.get("content"), path, chat_message)
        else:
            role = role if role == "user" else chat_role_of(role, path + ".role")
            add_message(conversation, role, chat_message, path, draft)


def end_turn(messages: list[dict], request: dict, draft: Draft) -> None:
    """After a last turn of the assistant: a prefill where the model allows one, else another turn of the user's."""
    thinking = request.get("thinking", {}).get("type", "disabled")
    if draft.model.prefill and thinking == "disabled" and "format" not in request.get("output_config", {}):
        last = messages[-1]["content"][-1]
        if last["type"] == "text":
            last["text"] = last["text"].rstrip()
            return
    draft.changes.add("changed", "messages", "the last one is the assistant's: asked to continue")
    messages.append({"role": "user", "content": text_blocks(CONTINUE)})


# ---- Parameters --------------------------------------------------------------------------------------
# The plain parameters, and thinking.


def limit_from_chat(fields: dict, draft: Draft) -> int:
    """The client's own output limit, 0 where it gave none that means something (-1 means none)."""
    for name in OUTPUT_LIMITS:
        if name in fields:
            limit, most = fields[name], draft.model.max_output
            if limit > most:
                draft.changes.add("clamped", name, "%d to the model's maximum of %d" % (limit, most))
            return max(limit, 0)
    return 0


def sampling_from_chat(fields: dict, draft: Draft) -> Iterator[tuple[str, float]]:
    """temperature, top_p and top_k where the model supports them: in Claude's range, temperature before top_p."""
    for name in ("temperature", "top_p", "top_k"):
        value = fields.get(name)
        if value is None or (value == 1 and name != "top_k"):       # 1 is the default of both APIs
            continue
        if not draft.model.sampling:
            draft.changes.add("dropped", name, "%s supports no sampling parameters" % draft.model.id)
        elif name == "top_p" and fields.get("temperature", 1) != 1:
            draft.changes.add("dropped", name, "Claude accepts either temperature or top_p")
        elif name == "top_k":
            yield name, max(0, value)
        else:
            if not 0 <= value <= 1:
                draft.changes.add("clamped", name, "%g to 0..1" % value)
            yield name, min(1, max(0, value))


# OpenAI's service tiers -> Claude's; "" is its default
CLAUDE_TIERS = {"auto": "", "default": "standard_only", "standard_only": "standard_only", "priority": "", "fast": ""}


def parameters_from_chat(fields: dict, draft: Draft) -> dict:
    """Sampling, stop sequences, service tier, `speed` of clients that know Claude, and user id."""
    request: dict[str, Any] = dict(sampling_from_chat(fields, draft))
    stops = [stop for stop in fields.get("stop", ()) if stop.strip()]
    if stops:
        request["stop_sequences"] = stops
    if any(map(str.isspace, fields.get("stop", ()))):
        draft.changes.add("dropped", "stop", "Claude accepts no stop sequence of white space only")
    tier = fields.get("service_tier", "auto")
    if tier not in CLAUDE_TIERS:
        draft.changes.add("dropped", "service_tier", "Claude has no such tier")
    elif tier == "priority":
        draft.changes.add("changed", "service_tier", "to auto, which uses a priority tier where there is one")
    elif CLAUDE_TIERS[tier]:
        request["service_tier"] = CLAUDE_TIERS[tier]
    if "fast" in (tier, fields.get("speed")) and draft.model.fast:
        request["speed"] = "fast"
    elif "fast" in (tier, fields.get("speed")):
        draft.changes.add("dropped", "speed" if "speed" in fields else "service_tier",
                          "%s has no fast mode" % draft.model.id)
    for name in ("safety_identifier", "user"):
        user_id = fields.get(name)
        if user_id and re.match(r"[^@]{1,256}\Z", user_id) and not re.match(r"[+\d][\d\s().-]{5,}\Z", user_id):
            request["metadata"] = {"user_id": user_id}
            break
        if user_id:
            draft.changes.add("dropped", name, "Claude accepts opaque ids of up to 256 characters, no addresses")
    return request


class Reasoning(NamedTuple):
    """What a client asks of reasoning.  effort "none": there should be none; None: that is left to the model."""
    effort: str | None = None
    budget: int | None = None                       # tokens of thinking, for models that take such a number
    display: str | None = None
    field: str = "reasoning_effort"


NOTHING_ASKED = Reasoning()
thinking_type_of = one_of("adaptive", "enabled", "disabled", "between_tools")
LEAST_BUDGET = 1_024                                # tokens: Claude accepts no smaller budget for thinking
# Tokens of thinking for an effort, on models that want a budget.
BUDGETS = {"low": 4_096, "medium": 10_000, "high": 20_000, "xhigh": 32_000, "max": 48_000}


def effort_from_budget(budget: int) -> str:
    """The effort that comes nearest to a number of thinking tokens."""
    return next((effort for effort, tokens in BUDGETS.items() if budget <= tokens), "max")


def reasoning_from_chat(fields: dict) -> Reasoning:
    """What is asked in `thinking` (Claude's own parameter), `reasoning` (OpenRouter's) or `reasoning_effort`."""
    if "thinking" in fields:
        thinking = object_of(fields["thinking"], "thinking")
        budget = optional(integer_of, thinking.get("budget_tokens"), "thinking.budget_tokens")
        display = optional(one_of("summarized", "omitted"), thinking.get("display"), "thinking.display")
        kind = optional(thinking_type_of, thinking.get("type"), "thinking.type")
        if kind in ("disabled", "between_tools"):
            return Reasoning("none", field="thinking")
        if kind:
            effort = fields.get("reasoning_effort") or (effort_from_budget(budget) if budget else "")
            return Reasoning(effort, budget, display, "thinking")
    reasoning = object_of(fields.get("reasoning", {}), "reasoning")
    if not reasoning:
        return Reasoning(fields.get("reasoning_effort"))
    budget = optional(integer_of, reasoning.get("max_tokens"), "reasoning.max_tokens")
    effort = optional(effort_of, reasoning.get("effort"), "reasoning.effort")
    if reasoning.get("enabled") is False:
        effort = "none"
    elif effort is None:
        effort = effort_from_budget(budget) if budget else "" if reasoning.get("enabled") else None
    return Reasoning(effort, budget, "omitted" if reasoning.get("exclude") is True else None, "reasoning")


def obstacle_to_thinking(request: dict, messages: list[dict], model: Model) -> str:
    """What excludes the thinking that a client asks for; "" for nothing."""
    forced = request.get("tool_choice", {}).get("type") in ("any", "tool")
    if "adaptive" in model.thinking:
        if forced and not model.thinks_by_default:
            return "a forced tool excludes thinking"
        return "a temperature excludes thinking" if {"temperature", "top_p", "top_k"} & set(request) else ""
    if "enabled" not in model.thinking:
        return "%s does not think" % model.id
    calls: list = next((message["content"] for message in reversed(messages) if message["role"] == "assistant"), [])
    unthought = calls and calls[0]["type"] not in THINKING and \
        "tool_result" in [block["type"] for block in messages[-1]["content"]]
    obstacles = {"a forced tool": forced, "a temperature": {"temperature", "top_k"} & set(request),
                 "a prefill": model.prefill and messages[-1]["role"] == "assistant",
                 "a tool loop without its thinking": unthought}
    return next((obstacle + " excludes thinking" for obstacle, is_there in obstacles.items() if is_there), "")


def think_little(request: dict, asked: Reasoning, draft: Draft) -> None:
    """No thinking where the model can do without, else as little as it can: as asked, or for want of room."""
    model, unwanted = draft.model, asked.effort == "none"
    can_stop = "disabled" in model.thinking
    if model.efforts and not (can_stop and unwanted):
        request.setdefault("output_config", {})["effort"] = model.efforts[0]
    if can_stop:
        request["thinking"] = {"type": "disabled"}
        if not unwanted:
            draft.changes.add("changed", "thinking", "off, as max_tokens leaves it no room")
    elif unwanted:
        if "between_tools" in model.thinking:
            request["thinking"] = {"type": "between_tools"}
        draft.changes.add("changed", asked.field, "%s cannot stop thinking: lowest effort" % model.id)
    else:
        request["thinking"] = {"type": "adaptive", "display": asked.display or "summarized"}


def add_room_for_thinking(request: dict, limit: int, draft: Draft) -> None:
    request["max_tokens"] = min(limit + LEAST_BUDGET, draft.model.max_output)
    draft.changes.add("changed", "max_tokens", "1,024 added for thinking, which counts as output")


def think_within_budget(request: dict, asked: Reasoning, limit: int, draft: Draft) -> None:
    """Thinking with a budget: at least 1,024 tokens, less than max_tokens, which is raised to make room."""
    budget = max(LEAST_BUDGET, asked.budget or BUDGETS.get(asked.effort or "medium", LEAST_BUDGET))
    if 0 < limit < budget + LEAST_BUDGET:
        request["max_tokens"] = min(draft.model.max_output, limit + budget)
        draft.changes.add("changed", "max_tokens", "%d added for thinking, which counts as output" % budget)
    budget = min(budget, request["max_tokens"] - 1)
    if request.get("top_p") is not None:
        del request["top_p"]
        draft.changes.add("dropped", "top_p", "thinking excludes it")
    request["thinking"] = {"type": "enabled", "budget_tokens": budget}
    if asked.display:
        request["thinking"]["display"] = asked.display


def think(request: dict, asked: Reasoning, limit: int, messages: list[dict], draft: Draft) -> None:
    """Adds `thinking` and the effort to a request, by what the client asks for and the model supports.  What excludes
    thinking (a forced tool, a temperature, a prefill) wins: the client asked for it explicitly."""
    model, tight = draft.model, 0 < limit < LEAST_BUDGET
    if asked.effort == "none" or asked.effort is None and tight:
        if model.thinks_by_default:
            think_little(request, asked, draft)
            if tight and "disabled" not in model.thinking:
                add_room_for_thinking(request, limit, draft)
        return
    if asked.effort and model.efforts:
        nearest = asked.effort if asked.effort in model.efforts else "low" if asked.effort == "minimal" else "high"
        if nearest != asked.effort:
            draft.changes.add("changed", asked.field, "%s to %s" % (asked.effort, nearest))
        request.setdefault("output_config", {})["effort"] = nearest
    obstacle = obstacle_to_thinking(request, messages, model) if asked.effort is not None else ""
    if obstacle and "effort" in request.get("output_config", {}):       # an effort can go without thinking
        draft.changes.add("changed", asked.field, "sent as effort, without thinking: " + obstacle)
    elif obstacle:
        draft.changes.add("dropped", asked.field, obstacle)
    thinks = asked.effort is not None and not obstacle
    if "adaptive" in model.thinking:
        if thinks or model.thinks_by_default:
            request["thinking"] = {"type": "adaptive", "display": asked.display or "summarized"}
        if asked.budget:
            draft.changes.add("changed", asked.field, "a budget of %d to effort %s" % (asked.budget, asked.effort))
        if thinks and tight:
            add_room_for_thinking(request, limit, draft)
    elif thinks:
        think_within_budget(request, asked, limit, draft)


# ---- Tool choice and answer format -------------------------------------------------------------------
# The choice among the tools, and the format of the answer, which may stand in for a forced tool.

JSON_ONLY = "Answer with one JSON object only"      # how a request asks for JSON where no answer format enforces it
MODES = {"auto": "auto", "none": "none", "required": "any", "any": "any"}       # of a choice -> Claude's type of one
FUNCTION_TYPES = (None, "function", "custom", "tool")       # of a choice that names one of the client's tools


def choice_name(choice: Any, path: str) -> str:
    """The name in a tool choice: nested under function or custom, or flat."""
    for key in ("function", "custom"):
        choice, path = nested_in(object_of(choice, path), key, path)
    return text_at(choice, "name", path)


def asked_choice(fields: dict, changes: Changes) -> dict:
    """`tool_choice` or `function_call` in any spelling of any API as Claude's, but with the client's names: of a tool,
    or of those that are `allowed`; its type is `web_search` where that is chosen."""
    path = "tool_choice" if "tool_choice" in fields else "function_call"
    choice = fields.get(path)
    if choice is None or choice == "":
        return {"type": "auto"}
    if isinstance(choice, str):
        return {"type": MODES[one_of(*MODES)(choice, path)]}
    kind = object_of(choice, path).get("type")
    if choice.get("disable_parallel_tool_use") is True:             # Claude's spelling
        fields["parallel_tool_calls"] = False
    if str(kind) in MODES:
        return {"type": MODES[str(kind)]}
    if WEB_SEARCH_TYPES.match(str(kind)):
        return {"type": WEB_SEARCH}
    if kind == "allowed_tools":
        allowed = object_of(choice.get("allowed_tools", choice), path + ".allowed_tools")
        tools = entries_of(allowed.get("tools"), path + ".allowed_tools.tools")
        return {"type": MODES.get(str(allowed.get("mode")), "auto"),
                "allowed": [choice_name(tool, where) for where, tool in tools
                            if tool.get("type") in FUNCTION_TYPES or "name" in tool]}
    if kind not in FUNCTION_TYPES and "name" not in choice:
        changes.add("dropped", path, why_no_tool(kind))
        return {"type": "auto"}
    name = choice_name(choice, path)
    return {"type": "tool", "name": name} if name else {"type": "any"}


def add_tools(request: dict, fields: dict, messages: list[dict], draft: Draft) -> dict:
    """Adds the tools that the client's choice leaves; returns the choice among them as Claude's."""
    choice, tools = asked_choice(fields, draft.changes), draft.tools
    if "allowed" in choice:
        allowed = {draft.plan.names.there(name) for name in choice.pop("allowed")}
        tools = [tool for tool in tools if tool["name"] in allowed or tool.get("type")]     # web search stays
        if draft.tools and not tools:
            raise invalid("tool_choice", "none of the allowed tools is among the tools.")
    tools = tools or tools_from_history(messages, draft)
    if tools:
        request["tools"] = tools
    if not draft.tools:                             # stand-ins for a history's are not to be called
        return {"type": "none" if tools else "auto"}
    return tool_choice(choice, fields, draft)


def tool_choice(choice: dict, fields: dict, draft: Draft) -> dict:
    """A choice among the tools with Claude's names."""
    if choice["type"] == WEB_SEARCH and draft.search:
        choice = {"type": "tool", "name": WEB_SEARCH}
    elif choice["type"] == WEB_SEARCH:
        draft.changes.add("dropped", "tool_choice", "there is no web search in this request")
        choice = {"type": "auto"}
    elif "name" in choice:
        named = next((tool for tool in draft.declared if choice["name"] in (tool.name, tool.full_name)), None)
        if named is None:
            raise invalid("tool_choice", "there is no tool named %s among the tools." % json.dumps(choice["name"]))
        choice["name"] = draft.plan.names.there(named.full_name)
    if choice["type"] != "none" and (fields.get("parallel_tool_calls") is False or draft.plan.legacy_functions):
        choice["disable_parallel_tool_use"] = True
    return choice


def asked_format(fields: dict) -> tuple[str, dict, str]:
    """Kind and schema of `response_format` or, flat, of the Responses API's `text.format`; and which of them it is."""
    field, asked = "response_format", fields.get("response_format")
    if asked is None and fields.get("text") is not None:
        field, asked = "text.format", fields["text"].get("format")
    if asked is None:
        return "text", {}, field
    kind = one_of("text", "json_object", "json_schema")(object_of(asked, field).get("type", "text"), field + ".type")
    path = field
    if field == "response_format" and kind == "json_schema" and "schema" not in asked:
        path = "response_format.json_schema"
        asked = object_of(asked.get("json_schema"), path)
    schema, path = asked.get("schema"), path + ".schema"
    if kind == "text" or schema is None:
        return kind, {}, field
    return "json_schema", checked_schema(object_of(schema, path), path), field


def force_by_format(request: dict, name: str | None, choice: dict, draft: Draft) -> dict:
    """A forced tool without forcing: its schema as the answer format, of which a call is made, or an instruction."""
    tool = next((tool for tool in request["tools"] if tool["name"] == name), None)
    if tool and "input_schema" in tool and draft.model.structured_outputs:
        with suppress(Unsupported):
            schema = Subset(tool["input_schema"]).whole()
            request.setdefault("output_config", {})["format"] = {"type": "json_schema", "schema": schema}
            draft.plan.forced_tool = draft.plan.names.back(tool["name"])
            draft.instructions.append("Call the tool %s now: answer with its arguments as JSON only." % name)
            draft.changes.add("changed", "tool_choice", "%s cannot be forced: its arguments as answer format" %
                              draft.model.id)
            return {"type": "none"}
    draft.instructions.append("Answer with a call of %s." % ("the tool " + name if name else "one of the tools"))
    draft.changes.add("changed", "tool_choice", "%s cannot be forced: asked for in the prompt" % draft.model.id)
    return dict(without(choice, "name"), type="auto")


def add_schema_format(request: dict, schema: dict, field: str, draft: Draft) -> None:
    """`json_schema`: enforced by Claude where the schema allows it, else asked for and cut out of the answer."""
    try:
        if not without(schema, "$defs", "definitions"):
            raise Unsupported("there is no schema")
        if not draft.model.structured_outputs or draft.search:
            raise Unsupported("web search excludes it" if draft.search else "%s does not compile it" % draft.model.id)
        subset = Subset(schema)
        converted = subset.whole()
    except Unsupported as reason:
        draft.changes.add("changed", field, "asked for in the prompt: %s" % reason)
        draft.plan.bare_json = True
        draft.instructions.append(JSON_ONLY + ", no other text, that follows this JSON Schema:\n" +
                                  json.dumps(schema, ensure_ascii=False))
        return
    for keyword in subset.moved:
        draft.changes.add("changed", "%s.%s" % (field, keyword), "moved into the description")
    request.setdefault("output_config", {})["format"] = {"type": "json_schema", "schema": converted}


VERBOSITIES = {"low": "Keep the answer short.", "high": "Answer at length and in detail."}


def answer_format(request: dict, fields: dict, choice: dict, draft: Draft) -> dict:
    """Adds what makes Claude answer in the format asked for; returns the tool choice that goes with it."""
    tools = request.get("tools", [])
    kind, schema, field = asked_format(fields)
    if choice["type"] in ("any", "tool") and not draft.model.forced_tools:
        named = choice.get("name") or (tools[0]["name"] if len(tools) == 1 and not tools[0].get("type") else None)
        if kind != "text":
            draft.changes.add("dropped", field, "a forced tool excludes it")
        choice = force_by_format(request, named, choice, draft)
    elif kind == "json_schema":
        add_schema_format(request, schema, field, draft)
    elif kind == "json_object":
        draft.plan.bare_json = True
        draft.instructions.append(JSON_ONLY + ": no other text, no code fence.")
    verbosity = fields.get("verbosity") or fields.get("text", {}).get("verbosity")
    if verbosity is not None and verbosity_of(verbosity, "text.verbosity") in VERBOSITIES:
        draft.instructions.append(VERBOSITIES[verbosity])
    return choice


# ---- Messages request --------------------------------------------------------------------------------
# The whole: a chat completion request as a Messages request.

ABOUT_THE_ANSWER = ("text", "response_format", "tool_choice", "function_call", "parallel_tool_calls", "stop",
                    "verbosity", *OUTPUT_LIMITS)


def messages_request(fields: dict, draft: Draft, conversation: Conversation, preamble: Sequence[dict],
                     cache: bool) -> Translation:
    """The Messages request of either of OpenAI's APIs, by its parameters and the conversation that it continues."""
    draft.plan.prewarm = prewarm = fields.get("prompt_cache_options", {}).get("prewarm") is True
    if draft.compact or prewarm:
        fields = without(fields, *ABOUT_THE_ANSWER)
    messages, most, limit = conversation.messages(), draft.model.max_output, limit_from_chat(fields, draft)
    request: dict = {"model": draft.model.id, "max_tokens": min(limit or most, most), "stream": True}
    asked = NOTHING_ASKED
    if draft.tools or conversation.call_ids or not fields.keys() <= PLAIN:
        request.update(parameters_from_chat(fields, draft))
        choice = answer_format(request, fields, add_tools(request, fields, messages, draft), draft)
        if choice != {"type": "auto"}:
            request["tool_choice"] = choice
        asked = reasoning_from_chat(fields)
    think(request, asked, limit, messages, draft)
    if draft.compact:
        ask_for_summary(messages, request, draft)
    elif messages[-1]["role"] == "assistant":
        end_turn(messages, request, draft)
    if preamble or conversation.system:
        request["system"] = [*map(dict, preamble), *conversation.system]
    request["messages"] = messages
    place_breakpoints(request, fields, cache, draft)
    if prewarm:                                     # Claude refuses these where there is no output
        budget = request.get("thinking", {}).get("type") == "enabled"
        request = dict(without(request, "stream", "thinking" if budget else ""), max_tokens=0)
    if draft.instructions:
        last_user = next(message for message in reversed(messages) if message["role"] == "user")
        last_user["content"].append({"type": "text", "text": "\n\n".join(draft.instructions)})
    return Translation(request, draft.changes, draft.plan)


SUMMARIZE = ("Summarize this conversation so that you can go on from the summary alone: what was asked, decided, done "
             "and found, with names, paths, numbers and code that will be needed, and what is still to do. Answer "
             "with the summary only.")


def ask_for_summary(messages: list[dict], request: dict, draft: Draft) -> None:
    """A summary in place of an answer: by Claude's compaction, or by an instruction where the model has none."""
    if draft.model.compaction:
        request["compaction"] = {"type": "summarize"}
        last = messages[-1]["content"][-1]
        if last["type"] == "text":                  # of the assistant, it may not end in blanks
            last["text"] = last["text"].rstrip()
        return
    if messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": text_blocks(CONTINUE)})
    draft.instructions.append(SUMMARIZE)
    if "tools" in request:
        request["tool_choice"] = {"type": "none"}


def messages_request_from_chat(chat: dict, model: Model, preamble: Sequence[dict] = (), cache: bool = True,
                               recall: Callable[[], Recall] = Recall) -> Translation:
    """A chat completion request as a Messages request.  `preamble`: system blocks that go before the client's."""
    changes = Changes()
    fields = read_parameters(chat, CHAT, changes)
    if "messages" not in fields:
        raise InvalidRequest("messages is required.", "messages", "missing_required_parameter")
    if not fields["messages"]:
        raise invalid("messages", "at least one message is required.")
    draft = Draft(model, changes, recall)
    if not fields.keys() <= PLAIN:
        read_tools(fields, draft)
    conversation = Conversation(draft)
    if "system" in fields:
        conversation.add("system", blocks_from_content(fields["system"], "system", draft))
    add_chat_messages(conversation, fields["messages"], draft)
    return messages_request(fields, draft, conversation, preamble, cache)


# ---- Events ------------------------------------------------------------------------------------------
# Event-stream bytes -> events -> one message, and events as the request's plan wants them.  No I/O: feed what came,
# get what follows from it.

# How nearly every event begins, up to its text, with the index of its block; and how it ends behind that.
TEXT_DELTA = re.compile(r'event: content_block_delta\ndata: \{"type": ?"content_block_delta", ?"index": ?'
                        r'(0|[1-9][0-9]{0,8}), ?"delta": ?\{"type": ?"text_delta", ?"text": ?"')
DELTA_END = re.compile(r"\} *\}\n\n")
scan_string = json.decoder.scanstring               # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def short_event(data: bytes) -> dict:
    """An event from its data, of which nearly every stream has the same: ends, pings.  Nobody changes events."""
    return json_object_from(data, event=True)


class EventDecoder:
    """Bytes of a Messages API event stream in, events out (WHATWG HTML, section 9.2, "server-sent events").

    Lines end in CR, LF or CRLF only.  The `event:` line repeats the `type` inside the data, so it is not needed.
    `joining`: text deltas of one block that stand side by side in a read are one event.
    """

    def __init__(self, joining: bool = False) -> None:
        self._joining = joining
        self._rest: List[bytes] = []                # the pieces of an unfinished line or event
        self._data: List[bytes] = []                # data lines of the event so far
        self._skip_newline = False                  # the last byte was CR: a LF right after it ends no line
        self._at_start = True                       # until a byte order mark has been looked for
        self._held = 0                              # bytes since the last whole event
        # of the last text delta: what comes before its text (at first what UTF-8 has no bytes for), and its block
        self._text_begins, self._index = "\ud800", 0

    def feed(self, piece: bytes) -> Iterator[dict]:
        """The events that `piece` completes.  Raises UpstreamFault for data that is not JSON."""
        while piece:
            event, piece = self._joined(piece)
            if event:
                yield event
                continue
            # line by line up to the next text, where there are several of them
            first, last = (piece.find(b'"text_delta"'), piece.rfind(b'"text_delta"')) if self._joining else (0, 0)
            cut = piece.rfind(b"\n\n", 0, first) + 2 if first < last else 0
            part, piece = (piece[:cut], piece[cut:]) if cut > 1 else (piece, b"")
            if self._held > MAX_UPSTREAM_BODY:
                raise UpstreamFault("The upstream sent an event of more than %d bytes." % MAX_UPSTREAM_BODY)
            self._held += len(part)
            if self._skip_newline:
                part, self._skip_newline = (part[1:] if part[:1] == b"\n" else part), False
            self._rest.append(part)
            # nothing ends here; what begins here stays whole, as it could be joined with the next
            if b"\r" not in part and (b"\n" if self._data or self._held > len(part) else b"\n\n") not in part:
                return
            text = b"".join(self._rest)
            if self._at_start:
                text, self._at_start = (text[3:] if text[:3] == b"\xef\xbb\xbf" else text), False
            self._skip_newline = text[-1:] == b"\r"
            lines = re.split(rb"\r\n|\n|\r", text) if b"\r" in text else text.split(b"\n")
            self._rest = [lines.pop()]
            for line in lines:
                if line[:5] == b"data:":
                    self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                elif not line and self._data:
                    data, self._data, self._held = b"\n".join(self._data), [], len(self._rest[0])
                    yield short_event(data) if len(data) < 60 else json_object_from(data, event=True)

    def close(self) -> Iterator[dict]:
        """At a clean end: a complete last event counts without its blank line, an incomplete one does not."""
        with suppress(UpstreamFault):
            yield from self.feed(b"\n\n")

    def _joined(self, piece: bytes) -> tuple[dict | None, bytes]:
        """The text deltas of one block that come next, as one event, and what follows them in `piece`."""
        if not self._joining or self._at_start or self._data or self._held and b"\n\n" not in piece:
            return None, piece
        texts, at = [], 0                           # type: List[str], int
        try:
            text = (b"".join([*self._rest, piece]) if self._held else piece).decode()
            if not text.startswith(self._text_begins):
                begin = TEXT_DELTA.match(text)
                if not begin:
                    return None, piece
                self._text_begins, self._index = begin.group(), int(begin.group(1))
            begins, size = self._text_begins, len(self._text_begins)
            while text[at:at + size] == begins:
                words, end = scan_string(text, at + size)
                delta_end = DELTA_END.match(text, end)
                if not delta_end:
                    break
                texts.append(words)
                at = delta_end.end()
        except ValueError:                          # it is cut or at fault
            pass
        if not texts:
            return None, piece
        self._rest, self._held = [], 0
        event = {"type": "content_block_delta", "index": self._index,
                 "delta": {"type": "text_delta", "text": "".join(texts)}}
        return event, text[at:].encode() if at < len(text) else b""


def events_from_message(message: dict) -> list[dict]:
    """A whole message as the events that would have streamed it, for an upstream that answers in JSON."""
    events: list[dict] = [{"type": "message_start", "message": dict(message, content=[], stop_reason=None)}]
    for block_index, block in enumerate(message["content"]):
        events.append({"type": "content_block_start", "index": block_index, "content_block": block})
        events.append({"type": "content_block_stop", "index": block_index})
    delta = {name: message.get(name) for name in ("stop_reason", "stop_sequence", "stop_details")}
    events.append({"type": "message_delta", "delta": delta, "usage": message.get("usage") or {}})
    return events + [{"type": "message_stop"}]


def added_usage(total: dict, usage: dict) -> dict:
    """The counts of two calls together, for answers that took several (pause_turn)."""
    added = dict(total)
    for name, value in usage.items():
        earlier = added.get(name)
        if isinstance(value, dict):
            added[name] = added_usage(earlier if isinstance(earlier, dict) else {}, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            added[name] = value + (earlier if isinstance(earlier, (int, float)) else 0)
        elif value is not None:
            added[name] = value
    return added


BLOCK_STOP = {"type": "content_block_stop"}


class MessageAssembler:
    """Events in, one message out: `message`, whole once `done`.  Several streams in a row (pause_turn) add up."""

    def __init__(self) -> None:
        self.message: dict = {}
        self.done = False
        self._block: dict = {}
        self._grown: Dict[str, io.StringIO] = collections.defaultdict(io.StringIO)
        self._citations: List[Any] = []
        self._content: List[dict] = []
        self._earlier_usage: dict = {}

    def feed(self, event: dict) -> None:
        """Raises ClaudeError for an `error` event, UpstreamFault for a message that does not hold together."""
        handler = self._HANDLERS.get(event["type"])
        if handler:
            try:
                handler(self, event)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as fault:
                raise UpstreamFault("The upstream sent a malformed %s event." % event["type"]) from fault

    def resume(self) -> None:
        """Another stream follows, which continues this message."""
        self._content, self._earlier_usage = self.message["content"], self.whole()["usage"]
        self.message = dict(self.message, usage={})     # its tokens are counted, also if no other stream comes
        self.done = False

    def whole(self) -> dict:
        """The message with the counts of all its streams, and of compactions, which an answer's totals leave out."""
        usage = self.message.get("usage") or {}
        for iteration in listed(usage.get("iterations")):
            if text_in(iteration, "type") == "compaction":
                usage = added_usage(usage, without(iteration, "type", "model"))
        return dict(self.message, usage=added_usage(self._earlier_usage, usage) if self._earlier_usage else usage)

    def _message_start(self, event: dict) -> None:
        message = event["message"]
        self.message = dict(message, content=self._content, usage=dict(message.get("usage") or {}),
                            model=str(message.get("model", "")))

    def _block_start(self, event: dict) -> None:
        if self._block:
            self._block_stop(BLOCK_STOP)
        block = self._block = dict(event["content_block"])
        texts = ["type", "id", "name"] if block["type"] == "tool_use" else ["type"]
        for field in texts + [field for field in ("text", "thinking") if block.get(field) is not None]:
            if not isinstance(block[field], str):
                raise TypeError("a field of a block is no string")
        if block["type"] == "text":
            block["text"] = block.get("text") or ""
        if not isinstance(block.get("citations") or [], list):
            raise TypeError("the citations of a block are no list")
        self.message["content"].append(block)
        if block["type"] == "fallback":             # from here on another model answers
            self.message["model"] = text_in(block, "to", "model") or self.message["model"]

    def _block_delta(self, event: dict) -> None:
        if not self._block:
            raise ValueError("a delta outside of a block")
        delta = event["delta"]
        field = self._DELTA_FIELDS.get(delta["type"])
        if field:
            self._grown[field].write(delta[field])
        elif delta["type"] == "citations_delta":
            self._citations.append(delta["citation"])
        elif delta["type"] == "compaction_delta":
            self._block.update({name: value for name, value in delta.items() if name != "type" and value is not None})

    def _block_stop(self, event: dict) -> None:
        block, self._block = self._block, {}
        if not block:
            raise ValueError("the end of a block that has not begun")
        for field, text in self._grown.items():
            block[field] = (block.get(field) or "") + text.getvalue()
        if self._citations:
            block["citations"] = [*(block.get("citations") or ()), *self._citations]
        if block.get("partial_json"):
            with suppress(ValueError):   # cut by max_tokens: the text stays
                block["input"] = json_within_bounds(block["partial_json"], LENIENT_JSON)
        self._grown.clear()
        self._citations = []

    def _message_delta(self, event: dict) -> None:
        self.message.update({name: value for name, value in event["delta"].items() if value is not None})
        for name, value in (event.get("usage") or {}).items():
            if value is not None:                   # cumulative, and without what did not change
                self.message["usage"][name] = value

    def _message_stop(self, event: dict) -> None:
        if self._block:                             # max_tokens can cut an answer inside one
            self._block_stop(BLOCK_STOP)
        reason = self.message.get("stop_reason")
        if not reason or not isinstance(reason, str):
            raise UpstreamFault("The upstream ended its answer without a stop reason.")
        self.done = True

    def _error(self, event: dict) -> None:
        raise ClaudeError(200, event["error"], {"request-id": str(event.get("request_id") or "")})

    _DELTA_FIELDS = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature",
                     "input_json_delta": "partial_json"}
    _HANDLERS: Dict[str, Callable[[MessageAssembler, dict], None]] = {
        "message_start": _message_start, "content_block_start": _block_start, "content_block_delta": _block_delta,
        "content_block_stop": _block_stop, "message_delta": _message_delta, "message_stop": _message_stop,
        "error": _error}


class BareJson:
    """Cuts the one JSON object out of a text that comes in pieces: fences and talk around it go.
    A text without any object is handed on whole, at the end: the client should see what Claude answered instead."""
    START = re.compile(r'\{\s*(["}]|\Z)')           # a brace amid the talk is no object; at the end it may be one
    TOKEN = re.compile(r'\\.?|[{}\[\]"]', re.S)     # an escape, maybe cut, or what opens and closes

    def __init__(self) -> None:
        self._held: List[str] = []                  # the text before the object
        self._tail = ""                             # the end of it, where an object may have begun
        self._depth = 0
        self._in_string = self._escaped = self._started = self._done = False

    def feed(self, text: str) -> str:
        """The part of `text` that belongs to the object."""
        if self._done:
            return ""
        if not self._started:
            text = self._tail + text
            start = self.START.search(text)
            if not start or not start.group(1):
                cut = start.start() if start else len(text)
                self._held.append(text[:cut])
                self._tail = text[cut:]
                return ""
            text, self._started = text[start.start():], True
        return text[:self._end(text)]

    def close(self) -> str:
        """What is left at the end."""
        return "" if self._started else "".join(self._held) + self._tail

    def _end(self, text: str) -> int:
        """The index behind the object's last bracket, or behind the text."""
        begin, self._escaped = int(self._escaped), self._escaped and not text
        for match in self.TOKEN.finditer(text, begin):
            token = match.group()
            self._escaped = token == "\\"
            if token == '"':
                self._in_string = not self._in_string
            elif not self._in_string and token in "{}[]":
                self._depth += 1 if token in "{[" else -1
                if self._depth == 0:
                    self._done = True
                    return match.end()
        return len(text)


# an event of Claude's -> what the client gets for it; None where it gets nothing until the end
Render = Optional[Callable[[dict], List[dict]]]


def arguments_delta(fragment: str) -> dict:
    return {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": fragment}}


class PlannedEvents:
    """Claude's events as the request's plan wants them: tools by the client's names, the forced tool called, text
    cut down to its JSON.  Stands between a MessageAssembler and a renderer; a plan that asks for nothing costs nothing.
    `assembler` is the one that has seen the planned events: a renderer reads there what is known only at the end."""

    def __init__(self, plan: ReplyPlan, assembler: MessageAssembler) -> None:
        self._plan = plan
        self._idle = not plan.forced_tool and not plan.bare_json and plan.names.same() and not plan.properties
        self.assembler = assembler if self._idle else MessageAssembler()
        self._bare_json = BareJson() if plan.bare_json else None
        self._kind = ""                             # of the open block, as Claude began it
        self._calling = False                       # whether the forced tool's block is open
        self._properties: Optional[ToolNames] = None        # of the tool being called, where they have other names
        self._held = io.StringIO()                  # its arguments, until they are whole

    def then(self, render: Render) -> Render:
        """A function from Claude's event to what `render` makes of the planned ones."""
        def planned(event: dict) -> list[dict]:
            if event["type"] == "message_start" and self.assembler.done:        # a continued answer (pause_turn)
                self.assembler.resume()
            handler = self._HANDLERS.get(event["type"])
            return self._rendered(handler(self, event) if handler else [event], render)
        return render if self._idle else planned

    def finish(self, render: Render) -> list[dict]:
        """What `render` makes of the text that was held back to the end."""
        rest = self._bare_json.close() if self._bare_json else ""
        if not rest:
            return []
        start = {"type": "content_block_start", "content_block": {"type": "text", "text": rest}}
        return self._rendered([*([BLOCK_STOP] if self._kind else ()), start, BLOCK_STOP], render)

    def _rendered(self, events: list[dict], render: Render) -> list[dict]:
        rendered: list[dict] = []
        for event in events:
            self.assembler.feed(event)
            rendered += render(event) if render else ()
        return rendered

    def _block_start(self, event: dict) -> list[dict]:
        block = event["content_block"]
        self._kind = block["type"]
        if self._kind == "text":
            return self._text(block.get("text") or "", lambda text: dict(event, content_block=dict(block, text=text)))
        events = self._with_held(BLOCK_STOP) if self._calling else []
        self._calling = False
        if self._kind == "tool_use":
            event = self._call(event, dict(block, name=self._plan.names.back(block["name"])))
        return [*events, event]

    def _block_delta(self, event: dict) -> list[dict]:
        delta = event["delta"]
        if delta["type"] == "text_delta":
            return self._text(delta["text"], lambda text: dict(event, delta=dict(delta, text=text)))
        if delta["type"] == "input_json_delta":
            return self._arguments(event)
        return [] if self._plan.forced_tool and self._kind == "text" else [event]

    def _block_stop(self, event: dict) -> list[dict]:
        kind, self._kind = self._kind, ""
        return [] if self._plan.forced_tool and kind == "text" else self._with_held(event)

    def _with_held(self, event: dict) -> list[dict]:
        """The end of a call, or of a message that was cut inside one, with the arguments that were held back."""
        held, names = self._held.getvalue(), self._properties
        self._held, self._properties = io.StringIO(), None
        arguments = object_in(held) if names else None
        if names and arguments:
            held = json.dumps(names.restored(arguments), ensure_ascii=False)
        return [*([arguments_delta(held)] if held else ()), event]

    def _text(self, text: str, event_with: Callable[[str], dict]) -> list[dict]:
        if not self._plan.forced_tool:
            return [event_with(self._bare_json.feed(text) if self._bare_json else text)]
        if not text:
            return []
        start = [] if self._calling else [self._call({"type": "content_block_start"}, {
            "type": "tool_use", "name": self._plan.forced_tool, "input": {},
            "id": "call_" + re.sub(r"[^a-zA-Z0-9_-]", "_", str(self.assembler.message.get("id") or "0"))})]
        self._calling = True
        return start + self._arguments(arguments_delta(text))

    def _call(self, event: dict, block: dict) -> dict:
        """The beginning of a call, of a tool by the client's name."""
        self._properties = names = self._plan.properties.get(block["name"])
        if names:
            block = dict(block, input=names.restored(block.get("input") or {}))
        return dict(event, content_block=block)

    def _arguments(self, event: dict) -> list[dict]:
        """A piece of a call's arguments; where names in it have to be restored, it waits for the others."""
        if not self._properties:
            return [event]
        self._held.write(event["delta"]["partial_json"])
        return []

    _HANDLERS: Dict[str, Callable[[PlannedEvents, dict], List[dict]]] = {
        "content_block_start": _block_start, "content_block_delta": _block_delta, "content_block_stop": _block_stop,
        "message_delta": _with_held}


# ---- Replies -----------------------------------------------------------------------------------------
# Message -> chat completion.  The stream below shares these helpers, so that it adds up to the full reply.

# Claude's stop reasons -> OpenAI's; every other one is "stop"
FINISH_REASONS = {"max_tokens": "length", "model_context_window_exceeded": "length", "refusal": "content_filter"}
SERVICE_TIERS = {"standard": "default", "priority": "priority", "batch": "batch"}


def usage_from_message(usage: dict) -> dict:
    """Claude's counts as OpenAI's: there, the prompt includes what was read from and written to the cache."""
    read, written, uncached, completion = map(count_of, map(usage.get, (
        "cache_read_input_tokens", "cache_creation_input_tokens", "input_tokens", "output_tokens")))
    details = usage.get("output_tokens_details")
    prompt, thinking = uncached + read + written, count_in(details, "thinking_tokens") if details else 0
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
            "completion_tokens_details": {"reasoning_tokens": thinking},
            "cache_read_input_tokens": read, "cache_creation_input_tokens": written}


def with_service_tier(reply: dict, usage: dict) -> dict:
    tier = SERVICE_TIERS.get(str(usage.get("service_tier")))
    return dict(reply, service_tier=tier) if tier else reply


def refusal_text(message: dict) -> str | None:
    """Why Claude refused, where it says so."""
    return text_in(message, "stop_details", "explanation") if message.get("stop_reason") == "refusal" else None


def finish_reason(stop_reason: str | None, has_tool_calls: bool, plan: ReplyPlan) -> str:
    """OpenAI's finish reason.  Tool calls are always reported, for clients act on nothing else."""
    reason = "stop" if plan.prewarm else FINISH_REASONS.get(stop_reason or "", "stop")
    if has_tool_calls and reason == "stop":
        return "function_call" if plan.legacy_functions else "tool_calls"
    return reason


def annotations_of(block: dict, start: int, length: int) -> list[dict]:
    """The citations of a text block of which `length` characters stand at index `start` of the whole text."""
    annotations: list[dict] = []
    for citation in block.get("citations") or ():
        if isinstance(citation, dict) and citation.get("url"):
            place = {"start_index": start, "end_index": start + length, "url": citation["url"],
                     "title": citation.get("title") or citation["url"]}
            annotation = {"type": "url_citation", "url_citation": place}
            if annotation not in annotations:
                annotations.append(annotation)
    return annotations


def text_and_annotations(content: list[dict]) -> tuple[str, list[dict]]:
    """The text of all text blocks, and their web citations with their places in it."""
    text, annotations = "", []                      # type: str, List[dict]
    for block in content:
        if block["type"] == "text":
            added = block.get("text") or ""
            annotations += annotations_of(block, len(text), len(added)) if block.get("citations") else ()
            text += added
    return text, annotations


def arguments_of(block: dict) -> str:
    """The arguments of a tool_use as the JSON text that Claude wrote, or would have written."""
    return block.get("partial_json") or json.dumps(block.get("input") or {}, ensure_ascii=False)


def input_of_custom(arguments: str) -> str:
    """The string in `{"input": ...}`, as far as it goes; whatever else Claude made of it, as it is."""
    value = text_in(object_in(arguments), "input")
    return arguments if value is None else value


def tool_call_from_tool_use(block: dict, plan: ReplyPlan) -> dict:
    """A tool call as the request declares its tool: a custom tool's input is a bare string."""
    name, arguments = block["name"], arguments_of(block)
    if name in plan.custom_tools:
        return {"id": block["id"], "type": "custom", "custom": {"name": name, "input": input_of_custom(arguments)}}
    return {"id": block["id"], "type": "function", "function": {"name": name, "arguments": arguments}}


def chat_completion_from_message(message: dict, envelope: dict, plan: ReplyPlan) -> dict:
    """A whole message, planned, as a chat completion.  `envelope`: its id and created."""
    content, annotations = text_and_annotations(message["content"])
    tool_calls = [tool_call_from_tool_use(block, plan) for block in message["content"] if block["type"] == "tool_use"]
    reason = finish_reason(message.get("stop_reason"), bool(tool_calls), plan)
    chat_message: dict = {"role": "assistant", "content": content if content or not tool_calls else None,
                          "refusal": refusal_text(message) if reason == "content_filter" else None}
    reasoning = "".join([block.get("thinking") or "" for block in message["content"] if block["type"] == "thinking"])
    if reasoning:
        chat_message["reasoning_content"] = reasoning
    if annotations:
        chat_message["annotations"] = annotations
    if tool_calls and plan.legacy_functions:
        chat_message["function_call"] = tool_calls[0]["function"]
    elif tool_calls:
        chat_message["tool_calls"] = tool_calls
    choice = {"index": 0, "message": chat_message, "logprobs": None, "finish_reason": reason}
    completion = {"id": envelope["id"], "object": "chat.completion", "created": envelope["created"],
                  "model": message["model"], "choices": [choice], "usage": usage_from_message(message["usage"])}
    return with_service_tier(completion, message["usage"])


# ---- Streams -----------------------------------------------------------------------------------------
# Events -> chunks of a chat completion.


def data_event(event: dict) -> bytes:
    """A server-sent event, as chat completions have them."""
    return b"data: %s\n\n" % client_json(event)


def named_event(event: dict) -> bytes:
    """A server-sent event with its type, as the Responses API and Claude's own have them."""
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), client_json(event))


class Renderer:
    """Claude's events in, what the client gets for each out: no event of its API, one or several.
    `assembler` has seen the same events, planned (PlannedEvents): what is known only at the end is read there."""

    def __init__(self, plan: ReplyPlan, assembler: MessageAssembler) -> None:
        self._plan, self._assembler = plan, assembler
        self._block: dict = {}                      # the open one, as it began
        self._started = False

    def feed(self, event: dict) -> list[dict]:
        kind = event["type"]
        if kind == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "text_delta":
                return self._text(delta["text"])
            if delta["type"] == "thinking_delta":
                return self._thinking(delta["thinking"])
            if delta["type"] == "input_json_delta" and self._block["type"] == "tool_use" and delta["partial_json"]:
                return self._arguments(delta["partial_json"])
            return []
        if kind == "content_block_start":
            self._block = block = event["content_block"]
            add = {"text": self._text, "thinking": self._thinking}.get(block["type"])
            return self._block_start(block) + (add(block.get(block["type"]) or "") if add else [])
        if kind == "content_block_stop":
            self._block = {}
            return self._block_stop(self._assembler.message["content"][-1])
        if kind != "message_start" or self._started:        # a second one continues the answer (pause_turn)
            return []
        self._started = True
        return self._start()

    # what a subclass makes of each
    _start: Callable[[], List[dict]]
    _block_start: Callable[[dict], List[dict]]
    _text: Callable[[str], List[dict]]
    _thinking: Callable[[str], List[dict]]
    _arguments: Callable[[str], List[dict]]
    _block_stop: Callable[[dict], List[dict]]


FIRST_DELTA = {"role": "assistant", "content": ""}


class ChatStream(Renderer):
    """Messages API events in, chat completion chunks out.  One instance per request."""

    def __init__(self, envelope: dict, plan: ReplyPlan, assembler: MessageAssembler, include_usage: bool) -> None:
        super().__init__(plan, assembler)
        self._envelope = {"id": envelope["id"], "object": "chat.completion.chunk",      # the same in every chunk
                          "created": envelope["created"], "model": "",
                          **({"usage": None} if include_usage else {})}
        self._include_usage = include_usage
        self._tool_position = -1                    # of the tool call that is being sent; counts calls, not blocks
        self._around_text: List[bytes] = []         # the event of a chunk with text, before and behind that
        self._around_model = ""                     # which it names

    def event_bytes(self, chunk: dict) -> bytes:
        """`data_event` of a chunk of this stream; of one with text only, that text between what all of them share."""
        choice = (chunk.get("choices") or [{"delta": {}}])[0]
        delta = choice["delta"]
        if "content" not in delta or len(delta) > 1 or choice["finish_reason"] or chunk["model"] != self._around_model:
            data = data_event(chunk)
            if delta == FIRST_DELTA:                # a quote inside a string would be escaped
                before, after = data.split(b'"role":"assistant","content":""')
                self._around_text, self._around_model = [before + b'"content":', after], chunk["model"]
            return data
        return client_json(delta["content"]).join(self._around_text)

    def finish(self) -> list[dict]:
        """The last chunks: citations, a refusal, the finish reason, usage if it was asked for."""
        message = self._assembler.whole()
        chunks = self.feed(BLOCK_STOP) if self._block else []       # max_tokens can cut a block before its stop event
        _, annotations = text_and_annotations(message["content"])
        if annotations:
            chunks.append(self._chunk({"annotations": annotations}))
        refusal = refusal_text(message)
        if refusal:
            chunks.append(self._chunk({"refusal": refusal}))
        reason = finish_reason(message["stop_reason"], self._tool_position >= 0, self._plan)
        chunks.append(self._chunk({}, reason))
        if self._include_usage:
            chunks.append(dict(self._envelope, choices=[], usage=usage_from_message(message["usage"])))
        return chunks

    def _start(self) -> list[dict]:
        self._envelope["model"] = self._assembler.message["model"]
        self._envelope = with_service_tier(self._envelope, self._assembler.message["usage"])
        return [self._chunk(FIRST_DELTA)]

    def _block_start(self, block: dict) -> list[dict]:
        if block["type"] == "fallback":
            self._envelope = dict(self._envelope, model=self._assembler.message["model"])
        if block["type"] == "tool_use" and block["name"] not in self._plan.custom_tools:
            self._tool_position += 1
            return self._call_delta({"name": block["name"], "arguments": ""}, id=block["id"], type="function")
        return []

    def _text(self, text: str) -> list[dict]:
        return [self._chunk({"content": text})] if text else []

    def _thinking(self, thinking: str) -> list[dict]:
        return [self._chunk({"reasoning_content": thinking})] if thinking else []

    def _arguments(self, fragment: str) -> list[dict]:
        if self._block["name"] in self._plan.custom_tools:
            return []                               # in one delta: clients parse it only so
        return self._call_delta({"arguments": fragment})

    def _block_stop(self, block: dict) -> list[dict]:
        if block["type"] != "tool_use":
            return []
        if block["name"] in self._plan.custom_tools:
            self._tool_position += 1
            call = tool_call_from_tool_use(block, self._plan)
            return [self._chunk({"tool_calls": [dict({"index": self._tool_position}, **call)]})]
        return [] if block.get("partial_json") else self._call_delta({"arguments": arguments_of(block)})

    def _call_delta(self, function: dict, **head: str) -> list[dict]:
        """A piece of a tool call.  `head`: what only the first one has."""
        if not self._plan.legacy_functions:
            return [self._chunk({"tool_calls": [dict({"index": self._tool_position}, **head, function=function)]})]
        if self._tool_position:                     # there is room for one call; the full reply shows the first one too
            return []
        return [self._chunk({"function_call": function})]

    def _chunk(self, delta: dict, reason: str | None = None) -> dict:
        return dict(self._envelope, choices=[{"index": 0, "delta": delta, "finish_reason": reason}])


# ---- Responses API -----------------------------------------------------------------------------------
# The same for /v1/responses: items become a conversation, events response events, which add up to the response.

ENCRYPTED_REASONING, SEARCH_SOURCES = "reasoning.encrypted_content", "web_search_call.action.sources"   # `include`
OUR_ENCODING = "claude-gateway-1."              # begins our encrypted_content; another version gets another number
COMPACTIONS = ("compaction", "compaction_summary")
SUMMARY = "Summary of the conversation so far, from which to go on:\n\n"


def encrypted_from(value: dict) -> str:
    """A signed block, or a compaction, as `encrypted_content`: opaque to clients."""
    return OUR_ENCODING + base64.urlsafe_b64encode(client_json(value)).decode()


def value_from_encrypted(encrypted: Any) -> dict:
    """The object in our `encrypted_content`; {} for a foreign or damaged one."""
    if not isinstance(encrypted, str) or not encrypted.startswith(OUR_ENCODING):
        return {}
    try:
        value = json_within_bounds(base64.urlsafe_b64decode(encrypted[len(OUR_ENCODING):]).decode())
    except ValueError:
        return {}
    return without_lone_surrogates(value) if isinstance(value, dict) else {}


def summary_in(block: Any) -> str:
    """The text of a compaction block, or of a text block in its place; else ""."""
    field = {"compaction": "content", "text": "text"}.get(text_in(block, "type") or "", "")
    return (text_in(block, field) or "").strip()


def compaction_item(item_id: str, message: dict, kept: Sequence[dict] = ()) -> dict:
    """The item that stands for what Claude has summarized.  `kept`: the items after that."""
    block = next((block for block in reversed(message["content"]) if summary_in(block)), None)
    if block is None:
        raise UpstreamFault("The upstream returned no summary of the conversation.")
    carried = {"block": block, "line": Model(message["model"]).line, "kept": list(kept)}
    return {"id": item_id, "type": "compaction", "encrypted_content": encrypted_from(carried)}


def carried_by(item: dict) -> dict:
    """What a compaction item carries; {} for an unreadable one without text."""
    carried = value_from_encrypted(item.get("encrypted_content"))
    plain = {"type": "text", "text": text_in(item, "content") or text_in(item, "summary")}
    if summary_in(carried.get("block")):
        return carried
    return {"block": plain} if summary_in(plain) else {}


def since_compaction(entries: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The items from the newest compaction on, behind the first system texts and tools."""
    for at, (_, item) in reversed(list(enumerate(entries))):
        if item.get("type") in COMPACTIONS and carried_by(item):
            return [*itertools.takewhile(lambda entry: is_setting(entry[1]), entries[:at]), *entries[at:]]
    return entries


def is_setting(item: dict) -> bool:
    """Whether an item is a system text, or has tools."""
    return item.get("type") == "additional_tools" or item.get("role") in ("system", "developer")


item_role_of = one_of("user", "assistant", "system", "developer")


def add_message_item(conversation: Conversation, item: dict, path: str, draft: Draft) -> None:
    role = item_role_of(item.get("role"), path + ".role")
    add = add_content if role == "assistant" else add_message
    add(conversation, role, item, path, draft)


def add_call_item(conversation: Conversation, item: dict, path: str, draft: Draft) -> None:
    """A function_call, or a custom_tool_call, whose input is text."""
    name = full_tool_name(text_at(item, "namespace", path, ""), text_at(item, "name", path))
    arguments = item.get("arguments")
    if item.get("type") == "custom_tool_call":
        arguments = {"input": text_of(item.get("input", ""), path + ".input")}
    conversation.call(text_at(item, "call_id", path, ""), {"name": name, "arguments": arguments}, path)


def add_output_item(conversation: Conversation, item: dict, path: str, draft: Draft) -> None:
    output = item.get("output")
    if output is None and item.get("type") != "function_call_output":
        output = without(item, "type", "id", "call_id", "status") or None
    conversation.result(text_at(item, "call_id", path, ""), None, output, path, item)


def add_reasoning_item(conversation: Conversation, item: dict, path: str, draft: Draft) -> None:
    """Signed thinking that we gave out; anything else in a reasoning item is not Claude's."""
    blocks = thinking_block(value_from_encrypted(item.get("encrypted_content")))
    if blocks:
        conversation.add("assistant", blocks)
    elif item.get("encrypted_content"):
        draft.changes.ignored.append(path + ".encrypted_content")


def add_compaction_item(conversation: Conversation, item: dict, path: str, draft: Draft) -> None:
    """The block as Claude gave it out; its text where the block would not hold."""
    carried = carried_by(item)
    block = carried.get("block", {})
    if not carried:
        draft.changes.add("dropped", path, "a compaction that cannot be read here")
    elif block["type"] == "compaction" and draft.model.compaction and carried.get("line") == draft.model.line:
        conversation.summary = [without(block, "cache_control")]
    else:
        conversation.summary = text_blocks(SUMMARY + summary_in(block))
        if block["type"] == "compaction":
            draft.changes.add("changed", path, "a compaction for another model, to its text")
    for where, kept in entries_of(list(listed(carried.get("kept"))), path + ".encrypted_content"):
        add_item(conversation, kept, where, draft)


LEFT_OUT_ITEMS = ("additional_tools", "web_search_call")        # the tools have been read before
ITEMS: Dict[str, Callable[[Conversation, dict, str, Draft], None]] = {
    "message": add_message_item, "function_call": add_call_item, "custom_tool_call": add_call_item,
    "function_call_output": add_output_item, "custom_tool_call_output": add_output_item,
    "reasoning": add_reasoning_item, **dict.fromkeys(COMPACTIONS, add_compaction_item)}


def add_item(conversation: Conversation, item: dict, path: str, draft: Draft) -> None:
    """Adds one input item; kinds that Claude has no use for are reported and left out."""
    kind = text_of(item.get("type") or ("message" if "role" in item else None), path + ".type")
    if kind == "item_reference":                    # one that could not be resolved
        raise InvalidRequest("%s: no item %s is stored here (they are kept in memory only)." % (
            path, json.dumps(text_at(item, "id", path))), path + ".id", "item_not_found")
    if kind in ITEMS:
        ITEMS[kind](conversation, item, path, draft)
    elif kind.endswith("_call_output") or kind.endswith("_output") and "call_id" in item:
        add_output_item(conversation, item, path, draft)
    elif kind.endswith("_call") and "call_id" in item:
        function = {"name": kind[:-len("_call")], "arguments": without(item, "type", "id", "call_id", "status")}
        conversation.call(text_at(item, "call_id", path, ""), function, path)
    elif kind not in LEFT_OUT_ITEMS:
        draft.changes.add("dropped", path, "an item of type %s" % kind)


def items_from_input(given: Any) -> list[dict]:
    """`input` as items: a string is one user message."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    return [item for _, item in entries_of([] if given is None else given, "input")]


def resolved_items(given: Any, find: Callable[[str], Optional[dict]]) -> list[dict]:
    """The items of `input`; what only names another one is replaced by that, if it is known."""
    items = items_from_input(given)
    for at, item in enumerate(items):
        if item.get("type") == "item_reference" or [name for name in item if item[name] is not None] == ["id"]:
            items[at] = find(str(item.get("id"))) or dict(item, type="item_reference")
    return items


def messages_request_from_responses(body: dict, model: Model, preamble: Sequence[dict] = (), cache: bool = True,
                                    recall: Callable[[], Recall] = Recall, earlier: Sequence[dict] = (),
                                    compact: bool = False) -> Translation:
    """A Responses request as a Messages request.  `earlier`: the items that it continues.  `compact`: ask for a summary
    instead of an answer."""
    changes = Changes()
    fields = read_parameters(body, RESPONSES, changes)
    if "input" not in fields and "instructions" not in fields and not earlier:
        raise InvalidRequest("input is required.", "input", "missing_required_parameter")
    items = entries_of(list(earlier), "previous_response_id")
    items = since_compaction(items + entries_of(items_from_input(fields.get("input")), "input"))
    draft = Draft(model, changes, recall)
    read_tools(fields, draft, [
        entry for path, item in items if item.get("type") == "additional_tools"
        for entry in entries_of(item.get("tools"), path + ".tools")])
    draft.compact = compact
    conversation = Conversation(draft)
    instructions = fields.get("instructions")
    if isinstance(instructions, list):
        items = entries_of(instructions, "instructions") + items
    else:
        conversation.add("system", blocks_from_content(instructions, "instructions", draft))
    newest = newest_turn(items)
    for at, (path, item) in enumerate(items):
        draft.lenient = at < newest
        add_item(conversation, item, path, draft)
    return messages_request(fields, draft, conversation, preamble, cache)


# What a response repeats of its request, and what stands there where the request says nothing.
RESPONSE_ECHOES: dict = {
    "instructions": None, "metadata": {}, "temperature": 1, "top_p": 1, "tools": [], "tool_choice": "auto",
    "parallel_tool_calls": True, "max_output_tokens": None, "previous_response_id": None, "store": True,
    "truncation": "disabled", "user": None, "reasoning": {"effort": None, "summary": None},
    "text": {"format": {"type": "text"}}, "presence_penalty": 0, "frequency_penalty": 0, "top_logprobs": 0,
    "max_tool_calls": None, "safety_identifier": None, "prompt_cache_key": None, "service_tier": "default"}
ECHOED_TOOL: dict = {"description": None, "parameters": None, "strict": False}


def response_envelope(response_id: str, created: int, body: dict) -> dict:
    """What is the same in every event of a response: its id, its time, the request's fields."""
    echoes: dict = {}
    for name, default in RESPONSE_ECHOES.items():
        echo = default if body.get(name) is None else PARAMETERS[name].check(body[name], name)
        echoes[name] = dict(default, **echo) if isinstance(default, dict) and isinstance(echo, dict) else echo
    echoes["tools"] = [dict(ECHOED_TOOL, **{name: value for name, value in tool.items() if value is not None})
                       if tool.get("type") == "function" and "function" not in tool else tool
                       for tool in echoes["tools"]]
    return dict({"id": response_id, "object": "response", "created_at": created, "completed_at": None,
                 "background": False}, **echoes)


def responses_usage(usage: dict) -> dict:
    counts = usage_from_message(usage)
    return {"input_tokens": counts["prompt_tokens"], "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": counts["completion_tokens_details"], "total_tokens": counts["total_tokens"]}


# What a failure is called inside a response; clients stop or retry by these names and no others.
RESPONSE_FAILURES = {"context_length_exceeded": "context_length_exceeded", "insufficient_quota": "insufficient_quota",
                     "rate_limit_exceeded": "rate_limit_exceeded", "overloaded": "server_is_overloaded"}
ITEM_IDS = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc",
            "web_search_call": "ws", "compaction": "cmp"}      # type of an output item -> how its id begins
EMPTY_TEXT: dict = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


class ResponseStream(Renderer):
    """Messages API events in, response events out; `response`: the state so far, `first`: items before the answer."""

    def __init__(self, envelope: dict, plan: ReplyPlan, assembler: MessageAssembler, include: Sequence[Any],
                 first: Sequence[dict] = ()) -> None:
        super().__init__(plan, assembler)
        self.response = dict(envelope, status="in_progress", model="", error=None, incomplete_details=None, output=[],
                             usage=None)
        self.to_store: List[dict] = []              # the output items, with signed thinking that they do not show
        self._first, self._include = first, include
        self._sequence = -1
        self._item: dict = {}                       # the output item that is being sent
        self._written = io.StringIO()               # of the open item: text, thinking or arguments
        self._annotations: List[dict] = []

    def finish(self, now: int = 0) -> list[dict]:
        """The last events: the open item's end, a refusal, and the response as it ended."""
        message = self._assembler.whole()
        is_call = self._block.get("type") == "tool_use"
        events = self.feed(BLOCK_STOP) if self._block and not is_call else []   # max_tokens can cut a block short
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(
            finish_reason(message["stop_reason"], False, self._plan))
        refusal = refusal_text(message)
        events += self._close_item("incomplete" if reason and not refusal else "completed")
        if refusal:                                 # a message of its own
            events += [*self._open_message({"type": "refusal", "refusal": ""}),
                       self._in_item("refusal.delta", content_index=0, delta=refusal),
                       self._in_item("refusal.done", content_index=0, refusal=refusal),
                       *self._end_part({"type": "refusal", "refusal": refusal}, "completed")]
        return [*events, self._end(message["usage"], now, reason)]

    def _end(self, usage: dict, now: int, reason: str | None = None) -> dict:
        status = "incomplete" if reason else "completed"
        self.response.update(status=status, usage=responses_usage(usage), completed_at=None if reason else now,
                             incomplete_details={"reason": reason} if reason else None)
        self.response = with_service_tier(self.response, usage)
        return self._event(status, response=self.response)

    def fail(self, failure: GatewayError) -> list[dict]:
        """The event that reports a failure once the stream has begun."""
        code = RESPONSE_FAILURES.get(failure.code or "", "invalid_prompt" if failure.status == 400 else "server_error")
        message = str(failure)
        if code == "rate_limit_exceeded" and failure.headers.get("retry-after"):
            message += " Please try again in %ss." % failure.headers["retry-after"]
        self.response.update(status="failed", error={"code": code, "message": message})
        return [self._event("failed", response=self.response)]

    def _start(self) -> list[dict]:
        self.response["model"] = self._assembler.message["model"]
        events = [self._event(kind, response=dict(self.response)) for kind in ("created", "in_progress")]
        for item in self._first:
            events += [self._open(item), self._done(item)]
        return events

    def _block_start(self, block: dict) -> list[dict]:
        if block["type"] == "fallback":
            self.response["model"] = self._assembler.message["model"]
        closed = self._close_item() if block["type"] in ("thinking", "tool_use") else []
        if block["type"] != "tool_use":
            return closed
        name, custom = block["name"], block["name"] in self._plan.custom_tools
        item = {"type": "custom_tool_call" if custom else "function_call", "call_id": block["id"], "name": name}
        if name in self._plan.namespaces:
            item["namespace"], item["name"] = self._plan.namespaces[name]
        item.update({"input": ""} if custom else {"arguments": "", "status": "in_progress"})
        return [*closed, self._open(item)]

    def _block_stop(self, block: dict) -> list[dict]:
        kind = block["type"]
        if kind == "text":
            return self._annotate(block)
        if kind in THINKING:
            return self._end_thinking(block)
        if kind == "tool_use":
            return self._close_item()
        if kind == "server_tool_use" and block.get("name") == WEB_SEARCH:
            return self._close_item() + self._open_search(block)
        if kind == "web_search_tool_result" and self._is_open("web_search_call"):
            return self._end_search(listed(block.get("content")))
        return []

    # -- items

    def _is_open(self, kind: str) -> bool:
        return self._item.get("type") == kind

    def _open(self, item: dict) -> dict:
        """Begins an output item, which gets an id if it has none."""
        index = len(self.response["output"])
        item_id = "%s_%s_%d" % (ITEM_IDS[item["type"]], self.response["id"].split("_", 1)[-1], index)
        self._item = dict({"id": item_id}, **item)
        self._written, self._annotations = io.StringIO(), []
        return self._event("output_item.added", output_index=index, item=dict(self._item))

    def _done(self, item: dict, to_store: dict | None = None) -> dict:
        output_index = len(self.response["output"])
        self.response["output"] = [*self.response["output"], item]
        self.to_store.append(to_store or item)
        self._item = {}
        return self._event("output_item.done", output_index=output_index, item=item)

    def _close_item(self, status: str = "completed") -> list[dict]:
        """Ends the open item, whatever it is."""
        kind = self._item.get("type")
        if kind == "message":
            text = self._written.getvalue()
            part = dict(EMPTY_TEXT, text=text, annotations=self._annotations)
            return [self._in_item("output_text.done", content_index=0, text=text, logprobs=[]),
                    *self._end_part(part, status)]
        if kind == "reasoning":
            return self._end_thinking({})
        if kind == "web_search_call":
            return self._end_search(())
        return self._end_call(status) if kind else []

    def _in_item(self, kind: str, **fields: Any) -> dict:
        """An event about the open item."""
        return self._event(kind, item_id=self._item["id"], output_index=len(self.response["output"]), **fields)

    def _event(self, kind: str, **fields: Any) -> dict:
        self._sequence += 1
        return dict({"type": "response." + kind, "sequence_number": self._sequence}, **fields)

    # -- text

    def _text(self, text: str) -> list[dict]:
        if not text:
            return []
        events = [] if self._is_open("message") else self._close_item() + self._open_message(EMPTY_TEXT)
        self._written.write(text)
        return events + [self._in_item("output_text.delta", content_index=0, delta=text, logprobs=[])]

    def _open_message(self, part: dict) -> list[dict]:
        return [self._open({"type": "message", "role": "assistant", "status": "in_progress", "content": []}),
                self._in_item("content_part.added", content_index=0, part=part)]

    def _annotate(self, block: dict) -> list[dict]:
        """The citations of a text block, placed in the text of its whole item."""
        if not block.get("citations") or not self._is_open("message"):
            return []
        length = self._written.tell()
        start = max(0, length - len(block["text"]))
        events = []
        for annotation in annotations_of(block, start, length - start):
            flat = dict({"type": "url_citation"}, **annotation["url_citation"])
            events.append(self._in_item("output_text.annotation.added", content_index=0,
                                        annotation_index=len(self._annotations), annotation=flat))
            self._annotations.append(flat)
        return events

    def _end_part(self, part: dict, status: str) -> list[dict]:
        return [self._in_item("content_part.done", content_index=0, part=part),
                self._done(dict(self._item, status=status, content=[part]))]

    # -- thinking

    def _thinking(self, thinking: str) -> list[dict]:
        """A reasoning item is opened only when there is something to see."""
        if not thinking:
            return []
        events = [] if self._is_open("reasoning") else [
            self._open({"type": "reasoning", "summary": []}),
            self._in_item("reasoning_summary_part.added", summary_index=0,
                          part={"type": "summary_text", "text": ""})]
        self._written.write(thinking)
        return events + [self._in_item("reasoning_summary_text.delta", summary_index=0, delta=thinking)]

    def _end_thinking(self, block: dict) -> list[dict]:
        encrypted = encrypted_from(block) if block else None
        shown = ENCRYPTED_REASONING in self._include
        events = []
        if not self._is_open("reasoning"):
            if not encrypted or not shown:
                return []
            events = [*self._close_item(), self._open({"type": "reasoning", "summary": []})]
        text = self._written.getvalue()
        part = {"type": "summary_text", "text": text}
        if text:
            events += [self._in_item("reasoning_summary_text.done", summary_index=0, text=text),
                       self._in_item("reasoning_summary_part.done", summary_index=0, part=part)]
        item = dict(self._item, summary=[part] if text else [])
        signed = dict(item, encrypted_content=encrypted) if encrypted else item
        return events + [self._done(signed if shown else item, signed)]

    # -- calls

    def _arguments(self, fragment: str) -> list[dict]:
        self._written.write(fragment)
        if self._is_open("custom_tool_call"):
            return []                               # its string is known only at the end
        return [self._in_item("function_call_arguments.delta", delta=fragment)]

    def _end_call(self, status: str) -> list[dict]:
        item = dict(self._item)
        streamed = self._written.getvalue()
        block = self._assembler.message["content"][-1]
        arguments = streamed or arguments_of(block)
        if not block.get("input") and "".join((block.get("partial_json") or "{}").split()) != "{}":
            status = "incomplete"                       # the output limit cut the arguments
        if item["type"] == "custom_tool_call":
            item.update({} if status == "completed" else {"status": status}, input=input_of_custom(arguments))
            return [self._in_item("custom_tool_call_input.delta", delta=item["input"]),
                    self._in_item("custom_tool_call_input.done", input=item["input"]), self._done(item)]
        events = [] if streamed else [self._in_item("function_call_arguments.delta", delta=arguments)]
        item.update(arguments=arguments, status=status)
        return events + [self._in_item("function_call_arguments.done", arguments=arguments,
                                       name=item["name"]), self._done(item)]

    def _open_search(self, block: dict) -> list[dict]:
        """A web search of Claude's own; its results are the next block."""
        action = {"type": "search", "query": (block.get("input") or {}).get("query", "")}
        item = {"type": "web_search_call", "status": "in_progress", "action": action}
        return [self._open(item), self._in_item("web_search_call.in_progress"),
                self._in_item("web_search_call.searching")]

    def _end_search(self, results: Sequence[Any]) -> list[dict]:
        item = dict(self._item, status="completed")
        if SEARCH_SOURCES in self._include:
            urls = [text_in(found, "url") for found in results]
            item["action"] = dict(item["action"], sources=[{"type": "url", "url": url} for url in urls if url])
        return [self._in_item("web_search_call.completed"), self._done(item)]


class CompactionStream(ResponseStream):
    """The response to a compaction_trigger: exactly one item, the compaction."""

    def feed(self, event: dict) -> list[dict]:
        return super().feed(event) if event["type"] == "message_start" else []

    def _start(self) -> list[dict]:
        return [*super()._start(), self._open({"type": "compaction", "encrypted_content": ""}),
                self._in_item("compaction.compacting")]

    def finish(self, now: int = 0) -> list[dict]:
        message = self._assembler.whole()
        return [self._done(compaction_item(self._item["id"], message)), self._end(message["usage"], now)]


# What a listed item or content part has besides what a client must send.
LISTED_PARTS: dict = {"input_image": {"detail": "auto"}, "output_text": {"annotations": [], "logprobs": []}}
LISTED_ITEMS: dict = {"reasoning": {"summary": []}, "compaction": {}, "additional_tools": {"role": "developer"}}


def listed_item(item: dict, include: Sequence[str] = ()) -> dict:
    """An input item as OpenAI lists it: with every required field, text as a content part."""
    kind = item.get("type") or "message"
    whole = dict(LISTED_ITEMS.get(kind, {"status": "completed"}), type=kind)
    whole.update({name: value for name, value in item.items() if value is not None})
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        whole["content"] = [{"type": part, "text": item["content"]}]
    for name in ("content", "output"):
        if isinstance(whole.get(name), list):
            whole[name] = [dict(LISTED_PARTS.get(str(part.get("type")), {}), **part) if isinstance(part, dict) else part
                           for part in whole[name]]
    is_hidden = kind == "reasoning" and ENCRYPTED_REASONING not in include
    return without(whole, "encrypted_content") if is_hidden else whole


# ---- Memory ------------------------------------------------------------------------------------------
# The few things that outlive a request.  Each is bounded and locked, none is needed: after a restart every
# request works all the same, at worst a little worse.


class Bounded:
    """A table of JSON values that forgets what was not used for longest.  Bounded in entries and bytes."""

    def __init__(self, entries: int, size: int = 1 << 62) -> None:
        self._entries, self._size = entries, size
        self._table: collections.OrderedDict = collections.OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def put(self, key: Any, value: Any) -> None:
        value = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if len(value) > self._size:                 # it would push out everything else, and then itself
            self.remove(key)
            return
        with self._lock:
            self._used += len(value) - len(self._table.pop(key, b""))
            self._table[key] = value
            while len(self._table) > self._entries or self._used > self._size:
                self._used -= len(self._table.popitem(last=False)[1])

    def remove(self, key: Any) -> None:
        with self._lock:
            self._used -= len(self._table.pop(key, b""))

    def get(self, key: Any) -> Any:
        with self._lock:
            if key not in self._table:
                return None
            self._table.move_to_end(key)
            stored = self._table[key]
        return json.loads(stored.decode("utf-8", "surrogatepass"))


class Answers:
    """Answers with tool calls, by (client, model, id of the first call): Claude requires their signed thinking back
    inside a tool loop, for which OpenAI clients have no place."""

    def __init__(self) -> None:
        self._answers = Bounded(20_000, 64_000_000)
        self._tools = Bounded(2_000, 32_000_000)    # the tools of requests, by their digest
        self._tools_of = Bounded(20_000)            # that digest, by a call that was made with them
        self._refused = Bounded(20_000)             # marks of thinking blocks that Claude refused

    def remember(self, owner: str, model_id: str, call_ids: Sequence[str], tools: Sequence[dict],
                 blocks: Sequence[dict]) -> None:
        """Keeps the tools of an answer with these calls, and its blocks, if there is a reason to give some."""
        tools = [without(tool, "cache_control") for tool in tools]
        digest = hashlib.sha256(json.dumps(tools).encode()).hexdigest()
        self._tools.put(digest, tools)
        self._tools_of.put((owner, call_ids[-1]), digest)
        if blocks:
            self._answers.put((owner, model_id, call_ids[0]), blocks)

    def recall(self, owner: str, model_id: str) -> Recall:
        """The look-up for `messages_request_from_chat`."""
        def tools(call_ids: Sequence[str]) -> list[dict]:
            digests = (self._tools_of.get((owner, call_id)) for call_id in reversed(call_ids))
            return self._tools.get(next(filter(None, digests), "")) or []
        return Recall(lambda call_ids: self._answers.get((owner, model_id, call_ids[0])), tools,
                      lambda mark: self._refused.get((owner, mark)) is not None)

    def refuse(self, owner: str, marks: Iterable[str]) -> None:
        """From now on these thinking blocks are not sent."""
        for mark in marks:
            self._refused.put((owner, mark), True)


class StoredResponses:
    """Responses that clients may continue by their id, and their items, each stored once, which clients may name."""

    def __init__(self) -> None:
        self._responses = Bounded(1_000, 24_000_000)
        self._items = Bounded(50_000, 40_000_000)           # by the digest of their content
        self._names = Bounded(50_000)                       # id -> digest, and the response that first had the item

    def put(self, owner: str, response: dict, items: Sequence[dict], output: Sequence[dict] = ()) -> None:
        """Keeps a response with the items that led to it and its own."""
        digests = [[self._put_item(owner, response["id"], item) for item in each] for each in (items, output)]
        self._responses.put((owner, response["id"]), [response, *digests])

    def get(self, owner: str, response_id: str) -> tuple[dict, list[dict], list[dict]] | None:
        """A response, its input and its output items; None where it is not known, or somebody else's."""
        stored = self._responses.get((owner, response_id))
        if stored is None:
            return None
        response, *digests = stored
        items, output = ([self._items.get(digest) for digest in each] for each in digests)
        return None if None in items or None in output else (response, items, output)

    def item(self, owner: str, item_id: str) -> dict | None:
        """The item of this id, as it was last stored."""
        named = self._names.get((owner, item_id))
        return named and self._items.get(named[0])

    def remove(self, owner: str, response_id: str) -> None:
        """Forgets a response; the items that it was the first to have can no longer be named."""
        stored = self.get(owner, response_id)
        self._responses.remove((owner, response_id))
        for item in [*stored[1], *stored[2]] if stored else ():
            name = owner, text_in(item, "id")
            if response_id in (self._names.get(name) or ()):
                self._names.remove(name)

    def _put_item(self, owner: str, response_id: str, item: dict) -> str:
        text = json.dumps(item, ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self._items.put(digest, item)
        if len(text_in(item, "id") or "") in range(1, 200):
            name = owner, item["id"]
            if digest not in (self._names.get(name) or ()):
                self._names.put(name, (digest, response_id))
        return digest


class Lessons:
    """What refusals taught about models.  A lesson is kept only after the corrected request succeeded."""

    def __init__(self) -> None:
        self._lessons: Dict[str, dict] = {}
        self._lock = threading.Lock()

    def apply(self, model: Model) -> Model:
        lesson = self._lessons.get(model.id)
        return replace(model, **lesson) if lesson else model

    def learn(self, model: Model, lesson: dict) -> None:
        with self._lock:
            if len(self._lessons) < 200:            # model ids; more would be an attack, not a catalogue
                self._lessons[model.id] = dict(self._lessons.get(model.id, {}), **lesson)       # others may read it
        LOG.warning("learnt about %s: %s", model.id, ", ".join("%s is %s" % pair for pair in lesson.items()))


class ModelList:
    """The catalog, fetched from Claude in the background and kept for an hour; until then the built-in table."""

    def __init__(self, fetch: Callable[[], Optional[List[dict]]], aliases: Sequence[tuple[str, str]]) -> None:
        self._fetch, self._aliases = fetch, aliases
        self._catalog = Catalog(aliases=aliases)
        self._next_fetch = 0.0
        self._lock = threading.Lock()
        self._first = threading.Event()

    def catalog(self, patience: float = MODELS_PATIENCE) -> Catalog:
        """The models now; waits a moment for the very first list, so that names do not change under way."""
        if time.monotonic() >= self._next_fetch or not self._first.is_set():
            with self._lock:
                if time.monotonic() >= self._next_fetch:
                    self._next_fetch = time.monotonic() + 60    # if this one fails
                    threading.Thread(target=self._run, name="models", daemon=True).start()
            self._first.wait(patience)
        return self._catalog

    def _run(self) -> None:
        try:
            entries = self._fetch()
            if entries:
                self._catalog = Catalog(entries, self._aliases)
                self._next_fetch = time.monotonic() + MODELS_LIFETIME
        except GatewayError as fault:
            if fault.code in FINAL_CODES:
                LOG.warning("Claude refuses this credential: %s", fault)
            else:
                LOG.info("no model list from the upstream (%s): using the built-in table", fault)
        except Exception as failure:                # nobody above this thread would report it
            LOG.warning("the upstream's model list cannot be read (%s: %s)", type(failure).__name__, failure)
        finally:
            self._first.set()


class FailedKeys:
    """How often each address sent a wrong key lately, and how long its next refusal should be delayed."""

    def __init__(self) -> None:
        self._failures = Bounded(10_000)
        self._lock = threading.Lock()

    def penalty(self, address: str) -> float:
        """Seconds to wait before this refusal: nothing for a first slip, two seconds at most."""
        now = time.monotonic()
        with self._lock:
            count, when = self._failures.get(address) or (0, now)
            count = count + 1 if now - when < 60 else 1
            self._failures.put(address, (count, now))
        return min(2.0, 0.05 * 2 ** min(count - 2, 6)) if count > 1 else 0.0


class Capacity:
    """An amount that is shared: bytes of bodies, connections, or requests at once.  `count` is what is taken of it."""

    def __init__(self, amount: int) -> None:
        self._amount = amount
        self._lock, self._awaited = threading.Lock(), False
        self._changed = threading.Condition(self._lock)
        self.count = 0
        self.draining = False                       # the service stops: connections close after their answer

    def take(self, amount: int = 1) -> bool:
        with self._lock:
            if self.draining or self.count + amount > self._amount:
                return False
            self.count += amount
            return True

    def give(self, amount: int = 1) -> None:
        with self._lock:
            self.count -= amount
            if self._awaited:
                self._changed.notify_all()

    def wait_until_idle(self, seconds: float) -> bool:
        with self._lock:
            self._awaited = True
            return self._changed.wait_for(lambda: self.count == 0, seconds)


MONITORING = {"/", "/metrics", "/health"}       # monitoring routes: they are no work of the gateway
TOKEN_KINDS = {"input": "input_tokens", "cache_read": "cache_read_input_tokens",
               "cache_write": "cache_creation_input_tokens", "output": "output_tokens"}
# what the status page shows of a request's Record
SHOWN_TEXTS = ("path", "tool", "asked", "used", "request_id", "changes", "error", "error_code")
SHOWN_FIELDS = ("status", "stream", "first_byte_ms", "total_ms", "input_tokens", "cached_tokens", "output_tokens",
                "cost_usd", "time", *SHOWN_TEXTS)


def prompt_tokens(tokens: dict) -> int:
    return tokens["input"] + tokens["cache_read"] + tokens["cache_write"]


class Counters:
    """What has happened since the start, for the log, the status page and Prometheus: no prompt, answer or secret."""

    def __init__(self) -> None:
        self.started = time.time()
        self.limit_headers: Dict[str, str] = {}     # of Claude's latest answer
        self._lock = threading.Lock()
        self._requests: collections.Counter = collections.Counter()
        self._errors: collections.Counter = collections.Counter()
        self._error_texts: Dict[str, str] = {}      # code -> the latest message
        self._last: Deque[dict] = collections.deque(maxlen=50)
        # name -> figure -> amount (Counter.update would take twice as long)
        self._totals: Dict[str, Dict[str, dict]] = {
            field: collections.defaultdict(lambda: collections.defaultdict(int)) for field in ("tool", "used")}
        self._models: Dict[str, dict] = collections.defaultdict(lambda: collections.defaultdict(int))
        self._prompts, self._cached = 0, 0          # tokens of all models
        self.seconds = 0.0                          # spent on all requests

    def add_request(self, fields: dict, secrets_known: Iterable[str]) -> None:
        """Counts a request, and keeps the fields of its Record unless it was one for monitoring."""
        fields["time"] = round(time.time(), 3)
        whole = "\n".join([fields[name] for name in SHOWN_TEXTS])
        if len(whole) > 500 or masked(whole, secrets_known) != whole:
            fields.update({name: masked(fields[name], secrets_known)[:500] for name in SHOWN_TEXTS})
        counts = {name: fields[name] or 0 for name in ("input_tokens", "cached_tokens", "output_tokens", "cost_usd")}
        counts.update(requests=1, failed=int(fields["status"] >= 400))
        with self._lock:
            self._requests[fields["route"], fields["status"]] += 1
            self.seconds += fields["total_ms"] / 1000
            code = fields["error_code"]
            if code:
                self._errors[code] += 1
                if code in self._error_texts or len(self._error_texts) < 200:
                    self._error_texts[code] = fields["error"]
            if fields["route"] not in MONITORING:
                self._last.appendleft(fields)
                for field, totals in self._totals.items():
                    name = fields[field] if fields[field] in totals or len(totals) < 200 else "other"
                    total = totals[name or "-"]
                    for figure, amount in counts.items():
                        total[figure] += amount

    def add_tokens(self, model_id: str, figures: dict) -> int:
        """Counts one answer of Claude; the share of all prompts so far that came from the cache, in percent."""
        with self._lock:
            total = self._models[model_id if model_id in self._models or len(self._models) < 200 else "other"]
            for figure, amount in figures.items():
                total[figure] += amount
            self._prompts += prompt_tokens(figures)
            self._cached += figures["cache_read"]
            return percent(self._cached, self._prompts)

    def take_limits(self, headers: dict[str, str]) -> None:
        """Keeps what an answer's headers say of plan windows and rate limits."""
        limits = {name: value for name, value in headers.items() if "anthropic-ratelimit-" in name}
        if limits:
            with self._lock:
                self.limit_headers = dict(self.limit_headers, **limits)

    def totals(self) -> dict:
        """Everything counted: `models` has tokens and US dollars, `by_model` the requests that asked for one."""
        with self._lock:
            by_tool, by_model = ({name: dict(counts) for name, counts in totals.items()}
                                 for totals in self._totals.values())
            return {"requests": sum(count for (route, _), count in self._requests.items() if route not in MONITORING),
                    "routes": sorted(self._requests.items()), "errors": dict(self._errors.most_common()),
                    "tokens": {kind: sum([total[kind] for total in self._models.values()]) for kind in TOKEN_KINDS},
                    "models": {model: collections.Counter(figures) for model, figures in self._models.items()},
                    "recent": [{name: fields[name] for name in SHOWN_FIELDS} for fields in self._last],
                    "by_tool": by_tool, "by_model": without(by_model, "-"), "error_texts": dict(self._error_texts)}


WINDOWS = {"5h": "5 hours", "7d": "week", "7d_oi": "week, largest models", "requests": "requests a minute",
           "input-tokens": "input tokens a minute", "output-tokens": "output tokens a minute",
           "tokens": "tokens a minute"}
PER_MINUTE = {"requests", "input-tokens", "output-tokens", "tokens"}       # no windows of a plan


def limits_from_headers(headers: dict[str, str], now: float) -> list[dict]:
    """Plan windows and rate limits, as Claude last reported them; those without a title here keep Claude's name."""
    limits = []
    unified = (re.match(r"anthropic-ratelimit-unified-(.+)-utilization\Z", name) for name in sorted(headers))
    others = {match.group(1): match.group(1) for match in unified if match}
    for window, title in dict(WINDOWS, **without(others, *WINDOWS)).items():
        of_plan, plain = "anthropic-ratelimit-unified-%s-" % window, "anthropic-ratelimit-%s-" % window
        used = number_or_none(headers.get(of_plan + "utilization"))
        reset = headers.get(of_plan + "reset") or headers.get(plain + "reset") or ""     # Unix or RFC 3339 time
        moment = number_or_none(reset)
        resets_at = unix_time(reset) if moment is None else int(moment) if 0 < moment < 1e11 else None
        limit, left = (number_or_none(headers.get(plain + name)) for name in ("limit", "remaining"))
        if used is None and limit and limit >= 1 and left is not None:
            used = 1 - left / limit
        if used is not None:
            limits.append({"window": window, "title": title, "used": round(max(0.0, used), 4), "resets_at": resets_at,
                           "over": resets_at is not None and resets_at < now,
                           "status": headers.get(of_plan + "status")})
    return limits


def number_or_none(text: str | None) -> float | None:
    with suppress(ValueError):
        number = float(text or "")
        return number if math.isfinite(number) else None
    return None


# ---- Credentials -------------------------------------------------------------------------------------
# What a call is paid with: an API key, a token that somebody else renews, or a stored login that renews itself.

PRIVATE = 0o077                                     # what the mode of a file with secrets must not allow
NEVER = 1e11                                        # Unix seconds: so long lives a token that does not say
PostJson = Callable[[str, dict, Dict[str, str]], Tuple[int, dict]]
Credential = Any                                    # an ApiKey, in one of its kinds


class ApiKey:
    """An Anthropic API key, and what all kinds of credentials have."""
    kind, described = "api_key", "API key from %s"
    preamble: Sequence[dict] = ()
    base_url = ""                                   # where it is to be used; "": at the configured address
    trouble: Optional[dict] = None                  # a failed renewal: message, time

    def __init__(self, key: str, source: str) -> None:
        self._key = key
        self.description = self.described % source

    def headers(self, rejected: str | None = None) -> dict[str, str]:
        return {"x-api-key": self._key}

    def facts(self) -> dict:
        return {"kind": self.kind, "description": self.description}

    def secrets(self) -> list[str]:
        return [self._key]

    def accepted(self, headers: dict[str, str]) -> None:
        """Claude has accepted these headers."""

    def close(self) -> None:
        """The gateway stops."""


class BearerToken(ApiKey):
    """A token from the environment; those of a `subscription` need the system block."""
    kind, described = "bearer_token", "token from %s"

    def __init__(self, token: str, source: str, subscription: bool) -> None:
        super().__init__(token, source)
        self.preamble = (OAUTH_SYSTEM_BLOCK,) if subscription else ()
        self._beta = subscription or token.startswith("sk-ant-oat")

    def headers(self, rejected: str | None = None) -> dict[str, str]:
        headers = {"authorization": "Bearer " + self._key}
        return dict(headers, **{"anthropic-beta": OAUTH_BETA}) if self._beta else headers


class FileDamaged(GatewayError):
    """A file is there, but not what we, or whoever owns it, wrote."""


class StoredFile:
    """One JSON object in a file that is whole at every instant, mode 0600.  Ours is closed to others; another
    program's is refused where its mode has one of the bits in `closed`, or where it is a symlink and `closed` is
    PRIVATE.  `holds`: the field that has the secret."""
    kind = "file"

    def __init__(self, path: str, limits: Limits = Config.limits, closed: int = 0, holds: str = "access_token") -> None:
        self.path, self._limits, self._closed, self._holds = path, limits, closed, holds

    def read(self) -> Any:
        """The object, None where there is no file.  Raises FileDamaged."""
        content = cause = None
        try:
            mode = (os.lstat if self._closed == PRIVATE else os.stat)(self.path).st_mode
            loose = mode & (self._closed or PRIVATE) if os.name == "posix" else 0
            if not stat.S_ISREG(mode):              # a FIFO would be waited for
                reason = "it is no plain file"
            elif loose and self._closed:
                reason = "others may use it (mode %04o)" % stat.S_IMODE(mode)
            else:
                with suppress(OSError):
                    if loose:                       # ours
                        os.chmod(self.path, 0o600)
                        LOG.warning("others could read %s: its mode is 0600 now", self.path)
                with while_held(lambda: open(self.path, "rb")) as file:
                    content = json.loads(file.read(50_000_000).decode())
                reason = self.fault_in(content)
        except FileNotFoundError:                   # also without a path
            return None
        except OSError as fault:
            reason, cause = fault.strerror or str(fault), fault
        except (ValueError, RecursionError):
            reason = "it is not JSON"
        if reason:
            raise FileDamaged("The %s %s cannot be used: %s." % (self.kind, self.path, reason)) from cause
        return content

    def stamp(self) -> Any:
        """What changes whenever the file does; None where there is none."""
        with suppress(OSError):
            status = os.stat(self.path)
            return status.st_mtime_ns, status.st_size, status.st_ino
        return None

    def fault_in(self, content: Any) -> str:
        """What is wrong with the content, "" where nothing is."""
        return "" if isinstance(content, dict) else "it holds no JSON object"

    def write(self, content: dict) -> None:
        """Replaces the file at once; a damaged one is moved aside, a symlink followed.  Raises OSError."""
        if not self.path:
            raise OSError("there is no home directory to store tokens in; use --token-file PATH")
        target = self._target()
        directory = os.path.dirname(target)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if os.path.basename(directory) == "claude-gateway":     # ours alone, however it was made
            with suppress(OSError):
                os.chmod(directory, 0o700)
        try:
            self.read()
        except FileDamaged as damage:
            if not is_held(damage.__cause__):
                aside = "%s.damaged-%s" % (target, secrets.token_hex(4))
                os.replace(target, aside)
                LOG.warning("the damaged %s is kept as %s", self.kind, aside)
        temporary = target + ".tmp"                 # one name: what a kill leaves behind goes with the next write
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            while_held(lambda: os.replace(temporary, target))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        with ExitStack() as held, suppress(OSError):      # not every system can sync a directory
            descriptor = os.open(directory, os.O_RDONLY)
            held.callback(os.close, descriptor)
            os.fsync(descriptor)

    def remove(self) -> None:
        """Raises OSError, unless there is no file."""
        with suppress(FileNotFoundError):
            os.unlink(self._target())

    def _target(self) -> str:
        """The file itself, behind symlinks.  Raises OSError for what is no plain file, as a device: that stays."""
        target = os.path.realpath(self.path)
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError("%s is no plain file" % target)
        return target

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time, by a side file that is never deleted; without locks, all go on."""
        descriptor, patience = None, self._limits.lock_patience
        with ExitStack() as held:
            try:
                if self.path:
                    target = os.path.realpath(self.path)        # by whatever name a process knows the file: one lock
                    os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
                    descriptor = os.open(target + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
                    held.callback(os.close, descriptor)         # gives the lock back
                    while_held(functools.partial(lock_file, descriptor), patience)
            except OSError as fault:
                if descriptor is not None and is_held(fault):   # going on without it could cost the login
                    message = "Another process has held the lock of a file for %d seconds." % patience
                    raise UpstreamFault(message) from None
            yield


class TokenFile(StoredFile):
    """The tokens of a login, or an API key."""
    kind = "token file"

    def fault_in(self, content: Any) -> str:
        secret = text_in(content, self._holds)
        if not secret:
            return "it holds no " + self._holds
        return "" if is_sendable(secret) else "no header can carry the characters of its " + self._holds


def is_held(fault: Any) -> bool:
    """Whether another process has the lock of a file, or has it open, as an antivirus may."""
    return (isinstance(fault, BlockingIOError) or getattr(fault, "winerror", 0) in (5, 32, 33)
            or os.name == "nt" and getattr(fault, "errno", None) in (0, 13, 36))


def while_held(work: Callable[[], Any], seconds: float = 2) -> Any:
    """The result of work on a file, tried again while somebody else has it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return work()
        except OSError as fault:
            if not is_held(fault) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def lock_file(descriptor: int) -> None:
    """Takes an exclusive lock.  Raises OSError, also where there are no locks."""
    if os.name == "nt":
        import msvcrt
        os.read(descriptor, 0)                      # sets errno to 0; Wine's locking leaves there what was before
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)      # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class StoredLogin(ApiKey):
    """The login in the token file.  Renews its access token before it expires and after Claude rejected it.

        good --(its last minutes)--> due: a thread renews it, everybody else goes on
             --(expired, refused)--> dead: who asks waits for the renewal, or is asked to sign in

    One refresh at a time across threads and processes, since a refresh token works once: under the lock the file is
    read again; only if nobody else renewed it, new tokens are asked for, and stored before they are used."""
    preamble: Sequence[dict] = (OAUTH_SYSTEM_BLOCK,)
    client_id, remedy = OAUTH_CLIENT_ID, "run `claude-gateway login`"

    def __init__(self, file: TokenFile, token_url: str, post_json: PostJson) -> None:
        self._file, self._token_url, self._post_json = file, token_url, post_json
        self._lock = threading.Lock()
        self._token: dict = {}
        self._stamp: Any = None                     # of the file as it was when it was read
        self._outdated = ""                         # the access token in the file while newer ones cannot be stored
        self._used_refresh_tokens: set = set()      # by us, or by somebody else, as their refusal shows
        self._failures, self._retry_at = 0, 0.0
        self._unproven = ""                         # the access token of the last renewal, until Claude accepts it

    @property
    def description(self) -> str:                   # type: ignore[override]
        return "login of %s from %s" % (self.facts()["account"] or "a Claude account", self._file.path)

    def headers(self, rejected: str | None = None) -> dict[str, str]:
        """The headers of a call; `rejected`: the authorization that Claude has just refused."""
        token = self.access_token(rejected[len("Bearer "):] if rejected else None)
        return {"authorization": "Bearer " + token, "anthropic-beta": OAUTH_BETA}

    def access_token(self, rejected: str | None = None) -> str:
        """A token that is good now.  Raises CredentialNeeded, or UpstreamFault when it cannot be renewed now."""
        token = self._token                         # the attribute changes under the lock only: a logout may empty it
        lives = self._lives(token, rejected)
        current = lives and not self._outdated and self._stamp == self._file.stamp()
        if not current and self._lock.acquire(blocking=not lives):      # else another thread is at it
            try:
                token = self._renewed_if_dead(rejected)
            finally:
                self._lock.release()
        if self._due(token) and time.monotonic() >= self._retry_at and self._lock.acquire(blocking=False):
            try:                                    # in a thread of its own, for which a program that ends waits
                threading.Thread(target=self._renew_early, name="renewal").start()
            except RuntimeError:                    # out of threads, or the program ends
                self._lock.release()
        return str(token["access_token"])

    def _renewed_if_dead(self, rejected: str | None) -> dict:
        """The token, also a rejected one if it is so new that Claude must refuse the account."""
        self._read_if_changed()
        if self._outdated or not self._lives(self._token, rejected):
            with self._file.lock():                 # for the writing, too: another process may be at it
                self._catch_up()
                if not self._lives(self._token, rejected) and not (rejected and rejected == self._unproven):
                    self._renew(rejected)
        return self._token

    def accepted(self, headers: dict[str, str]) -> None:
        if headers["authorization"] == "Bearer " + self._unproven:
            self._unproven = ""

    def close(self) -> None:
        """Waits for a renewal under way; tokens that could not be stored get another try."""
        with self._lock, suppress(GatewayError):
            if self._outdated:
                with self._file.lock():
                    self._catch_up()

    def facts(self) -> dict:
        token = self._token
        with suppress(FileDamaged):
            token = token or self._file.read() or {}
        return {"kind": "oauth", "description": "login from %s" % self._file.path,
                "account": text_in(token, "account", "email_address"), "scope": text_in(token, "scope"),
                "organization": text_in(token, "organization", "name"),
                "expires_at": seconds_in(token, "expires_at", 0) or None, "refreshable": self._renewable(token)}

    def secrets(self) -> list[str]:
        return [text_in(self._token, name) or "" for name in ("access_token", "refresh_token")]

    @staticmethod
    def _lives(token: dict, rejected: str | None) -> bool:
        expires_at = seconds_in(token, "expires_at", NEVER)
        return bool(token) and token["access_token"] != rejected and expires_at > time.time()

    def _renewable(self, token: dict) -> bool:
        refresh_token = text_in(token, "refresh_token")
        return bool(self.client_id and refresh_token) and refresh_token not in self._used_refresh_tokens

    def _due(self, token: dict) -> bool:
        """Whether a token is in its last five minutes, or in the second half of a life under ten."""
        early = min(REFRESH_EARLY, seconds_in(token, "expires_in", NEVER) / 2)
        return seconds_in(token, "expires_at", NEVER) - time.time() < early and self._renewable(token)

    def _renew_early(self) -> None:
        try:
            with self._file.lock():
                self._catch_up()
                if self._due(self._token):
                    self._renew(None)
        except GatewayError as fault:
            self.trouble = trouble_of(fault)
        finally:
            self._lock.release()

    def _catch_up(self) -> None:
        """Under both locks: reads what another process stored, stores what we could not."""
        self._stamp = None
        self._read_if_changed()
        if self._outdated:
            self._save(self._outdated)

    def _read_if_changed(self) -> None:
        """Takes over what another process stored, unless it is what we have renewed."""
        stamp = self._file.stamp()
        if self._token and stamp and stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            token = self._file.read()
        except FileDamaged as fault:
            if not self._token:
                raise CredentialNeeded("%s Please %s; the file will be kept aside." % (fault, self.remedy)) from fault
            if not self._outdated:
                LOG.warning("%s Going on with the tokens in memory.", fault)
            return
        if token is None:                           # a logout, also of tokens that could not be stored
            self._token, self._outdated = {}, ""
        elif not self._outdated or (token["access_token"] != self._outdated
                                    and text_in(token, "refresh_token") not in self._used_refresh_tokens):
            self._token, self._outdated = token, ""

    def _renew(self, rejected: str | None) -> None:
        """Under both locks: asks the sign-in endpoint for new tokens."""
        refresh_token = text_in(self._token, "refresh_token")
        if not self._token:
            raise CredentialNeeded("Nobody is signed in: %s, or set ANTHROPIC_API_KEY." % self.remedy)
        if not self._renewable(self._token):
            if rejected:                            # Claude's own message says more
                return
            used = refresh_token in self._used_refresh_tokens
            raise CredentialNeeded(self.trouble["message"] if self.trouble and used else
                                   "The stored login has expired: %s." % self.remedy)
        if time.monotonic() < self._retry_at:
            raise UpstreamFault(self.trouble["message"] if self.trouble else "The sign-in endpoint has just failed.")
        body = {"grant_type": "refresh_token", "refresh_token": refresh_token, "client_id": self.client_id}
        try:
            status, answer = self._post_json(self._token_url, body, {"anthropic-beta": OAUTH_BETA})
            otherwise = "no reason given" if status != 200 else "no access token that can be used"
            reason = "status %d, %s" % (status, refusal_words(answer, otherwise))
        except UpstreamFault as fault:
            status, answer, reason = 0, {}, str(fault).rstrip(".")
        if status == 200 and is_sendable(answer.get("access_token")):
            in_file, self._token = self._token["access_token"], token_from_answer(answer, self._token)
            self._unproven, self._failures, self.trouble = self._token["access_token"], 0, None
            if self._token["refresh_token"] != refresh_token:
                self._used_refresh_tokens.add(refresh_token)
            self._save(in_file)
        elif status in (400, 401, 403) and "invalid_grant" in json.dumps(answer):
            self._used_refresh_tokens.add(refresh_token)
            self._stamp = None
            self._read_if_changed()                 # who else has used it has stored new tokens
            if text_in(self._token, "refresh_token") == refresh_token or not self._lives(self._token, rejected):
                self._put_off(CredentialNeeded("The login has expired or was used elsewhere (%s): %s." % (
                    refusal_words(answer, "invalid_grant"), self.remedy)), rejected)
        else:
            message = ("The token could not be renewed: %s (%s). If that address cannot be reached from here, set "
                       "CLAUDE_GATEWAY_TOKEN_URL." % (reason, self._token_url))
            self._put_off(UpstreamFault(message), rejected)

    def _put_off(self, failure: GatewayError, rejected: str | None) -> None:
        """A renewal failed: goes on with an access token in its last minutes, else raises."""
        self._retry_at = time.monotonic() + min(LONGEST_BACKOFF, REFRESH_BACKOFF * 2 ** min(self._failures, 10))
        self._failures += 1
        self.trouble = trouble_of(failure)
        if not self._lives(self._token, rejected):
            raise failure
        LOG.warning("%s", failure)

    def _save(self, in_file: str) -> None:
        """Stores the newest tokens in place of that access token; a failure is tried again with the next call."""
        try:
            self._file.write(self._token)
            self._outdated, self._stamp = "", self._file.stamp()
        except OSError as fault:
            level = logging.DEBUG if self._outdated else logging.WARNING        # once
            LOG.log(level, "the renewed tokens could not be stored in %s (%s): keeping them in memory",
                    self._file.path, fault.strerror or fault)
            self._outdated = self._outdated or in_file


def trouble_of(failure: GatewayError) -> dict:
    """A failure of the credential as it is shown until a call succeeds."""
    return {"message": str(failure), "at": int(time.time())}


def is_sendable(token: Any) -> bool:
    """Whether a header can carry it."""
    return isinstance(token, str) and re.match(r"[\x21-\x7e]+\Z", token) is not None


def seconds_in(token: dict, name: str, otherwise: float) -> float:
    """A number that a token's life can have: no infinity, no NaN, nothing absurd."""
    seconds: Any = token.get(name)
    return float(seconds) if type(seconds) in (int, float) and 0 < seconds < NEVER else otherwise


def token_from_answer(answer: dict, earlier: dict) -> dict:
    """The sign-in endpoint's answer as it is stored; what it leaves out stays as it was."""
    names = ("access_token", "refresh_token", "scope", "token_type", "organization", "account")
    token = {"refresh_token": "", **earlier, **{name: answer[name] for name in names if answer.get(name)}}
    token["expires_in"] = seconds_in(answer, "expires_in", 3600)
    return dict(token, expires_at=int(time.time() + token["expires_in"]))


def refusal_words(answer: dict, otherwise: str) -> str:
    """Why the sign-in endpoint refused, in the API's shape or OAuth's."""
    return (text_in(answer, "error", "message") or text_in(answer, "error", "type")
            or text_in(answer, "error_description") or text_in(answer, "error") or otherwise)


class Login:
    """An authorization with PKCE (RFC 7636, S256): the address to visit, and the exchange of its code."""

    def __init__(self, authorize_url: str = OAUTH_AUTHORIZE_URL, scopes: str = OAUTH_SCOPES) -> None:
        self._scopes = scopes
        self._code_verifier, self._state = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        digest = hashlib.sha256(self._code_verifier.encode()).digest()
        self.url = authorize_url + "?" + urllib.parse.urlencode({
            "code": "true", "client_id": OAUTH_CLIENT_ID, "response_type": "code", "redirect_uri": OAUTH_REDIRECT_URI,
            "scope": scopes, "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
            "code_challenge_method": "S256", "state": self._state})

    def parse(self, pasted: str) -> tuple[str, bool]:
        """The code of `code#state`, a callback URL or a bare code; whether it had our state."""
        pasted = pasted.strip(" \t\r\n\"'`")
        if "://" in pasted:
            query = urllib.parse.parse_qs(pasted.partition("?")[2].partition("#")[0])
            code, state = query.get("code", [""])[0], query.get("state", [""])[0]
        else:
            code, _, state = pasted.partition("#")
        if not code:
            raise InvalidRequest("There is no code in what was pasted.")
        if state and not hmac.compare_digest(state.encode(), self._state.encode()):
            raise InvalidRequest("The pasted code belongs to another sign-in (its state differs).")
        return code, bool(state)

    def exchange(self, code: str, token_url: str, post_json: PostJson) -> dict:
        """The tokens for an authorization code.  Raises CredentialNeeded in the endpoint's words."""
        status, answer = post_json(token_url, {
            "grant_type": "authorization_code", "code": code, "state": self._state, "client_id": OAUTH_CLIENT_ID,
            "redirect_uri": OAUTH_REDIRECT_URI, "code_verifier": self._code_verifier}, {})
        if status != 200 or not is_sendable(answer.get("access_token")):
            reason = refusal_words(answer, "no reason given")
            raise CredentialNeeded("The sign-in endpoint refused the code (status %d): %s" % (status, reason))
        return token_from_answer(answer, {"token_type": "Bearer", "scope": self._scopes})


class ProfileLogin(StoredLogin):
    """The login of a profile of Anthropic's own tools, which renew its tokens where it has no client id."""
    preamble = ()
    remedy = "run `ant auth login`"

    def __init__(self, name: str, settings: dict, file: TokenFile, base_url: str, post_json: PostJson) -> None:
        super().__init__(file, base_url + "/v1/oauth/token", post_json)
        self.client_id, self.base_url = text_in(settings, "authentication", "client_id") or "", base_url
        self._workspace, self._name = text_in(settings, "workspace_id") or "", name

    @property
    def description(self) -> str:                   # type: ignore[override]
        workspace = ", workspace " + self._workspace if self._workspace else ""
        return "profile %s of `ant auth login`%s" % (self._name, workspace)

    def headers(self, rejected: str | None = None) -> dict[str, str]:
        headers = super().headers(rejected)
        return dict(headers, **{"anthropic-workspace-id": self._workspace}) if self._workspace else headers

    def facts(self) -> dict:
        return dict(super().facts(), kind="profile", description=self.description)


def profile_from_config(config: Config, post_json: PostJson) -> ProfileLogin | None:
    """The profile that is named, or else active; None where there is none.  Raises GatewayError."""
    folder, name = config.profile_folder, config.profile
    if not folder:
        return None
    pointer = os.path.join(folder, "active_config")
    with suppress(OSError, ValueError):
        if os.path.isfile(pointer):                 # a FIFO would be waited for
            with open(pointer, encoding="utf-8") as file:
                name = name or file.read(1_000).strip()
    if re.search(r"^[.\s]|[/\\\0]|\s$", name):
        raise CredentialNeeded("Invalid profile name: %s." % json.dumps(name))
    path = os.path.join(folder, "configs", (name or "default") + ".json")
    settings = StoredFile(path, config.limits, closed=0o022).read()
    if settings is None:
        if name:
            raise CredentialNeeded("There is no profile %s in %s." % (name, folder))
        return None
    name = name or "default"
    kind = text_in(settings, "authentication", "type")
    if kind != "user_oauth":
        raise CredentialNeeded("Profile %s: signing in by %s is not supported; set ANTHROPIC_API_KEY, or choose "
                               "another profile with ANTHROPIC_PROFILE." % (name, kind))
    base_url = (text_in(settings, "base_url") or config.base_url).rstrip("/")
    host = host_in(base_url)
    if not host or not base_url.lower().startswith("https:") and not is_loopback_host(host):
        raise CredentialNeeded("Profile %s: its base_url must be an https URL." % name)
    usual = os.path.join(folder, "credentials", name + ".json")
    path = os.path.expanduser(text_in(settings, "authentication", "credentials_path") or usual)
    tokens = TokenFile(path, config.limits, closed=PRIVATE)
    if tokens.read() is None:
        raise CredentialNeeded("Profile %s is not signed in: run `ant auth login`." % name)
    return ProfileLogin(name, {"workspace_id": config.workspace_id, **settings}, tokens, base_url, post_json)


def key_file(config: Config) -> TokenFile:
    """Where `login --api-key` stores a key: beside the login."""
    path = os.path.splitext(config.token_file)[0]
    return TokenFile(path and path + "-api-key.json", config.limits, holds="api_key")


def credential_from_config(config: Config, post_json: PostJson) -> Credential | None:
    """The credential to use: the first that is there, in this order, within what `auth` allows."""
    keys, logins = config.auth != "oauth", config.auth != "api-key"
    if keys and config.anthropic_api_key:
        return ApiKey(config.anthropic_api_key, "the simulation" if config.demo else "ANTHROPIC_API_KEY")
    if keys and config.anthropic_auth_token:
        return BearerToken(config.anthropic_auth_token, "ANTHROPIC_AUTH_TOKEN", subscription=False)
    if logins and config.claude_code_oauth_token:
        return BearerToken(config.claude_code_oauth_token, "CLAUDE_CODE_OAUTH_TOKEN", subscription=True)
    if logins and config.profile:
        return profile_from_config(config, post_json)
    stored_key = key_file(config).read() if keys else None
    if stored_key:
        return ApiKey(stored_key["api_key"], key_file(config).path)
    if not logins:
        return None
    file = TokenFile(config.token_file, config.limits)
    if file.read() is not None:
        return StoredLogin(file, config.token_url, post_json)
    return profile_from_config(config, post_json)


# ---- Usage -------------------------------------------------------------------------------------------
# What was used, by day: figures in a file beside the login, which several gateways share.  Budgets count by it.

USAGE_PLACE = ("day", "tool", "model", "key")       # what a row is about; `key` begins the digest of a client's
USAGE_FIGURES = ("requests", "errors", *TOKEN_KINDS, "usd", "without_price")
USAGE_DAYS = 400                                    # with requests, which are kept however wrong the clock is
USAGE_ROWS = 20_000                                 # beyond them, tools that clients make up are not told apart
USAGE_INTERVAL = 60                                 # seconds between two writes
UsageRows = Dict[Any, Any]                          # place -> Counter of figures


class UsageFile(StoredFile):
    """Rows of usage."""
    kind = "usage file"

    def fault_in(self, content: Any) -> str:
        rows = value_in(content, "rows")
        sane = isinstance(rows, list) and all(
            isinstance(row, dict) and all(text_in(row, name) is not None for name in USAGE_PLACE) and all(
                isinstance(row.get(name, 0), (int, float)) and 0 <= row.get(name, 0) < 1e15 for name in USAGE_FIGURES)
            for row in rows)
        return "" if sane else "it holds no usage"


@functools.lru_cache(maxsize=64)
def day_of(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(moment))


def sum_of(*tables: UsageRows) -> UsageRows:
    total: UsageRows = collections.defaultdict(collections.Counter)
    for table in tables:
        for place, figures in table.items():
            total[place].update(figures)
    return total


def usage_by(rows: UsageRows, by: str, first_day: str = "") -> dict[str, Any]:
    """The sums of the rows since a day, by a part of their place."""
    at = USAGE_PLACE.index(by)
    return dict(sorted(sum_of(*({place[at]: figures} for place, figures in rows.items()
                                if place[0] >= first_day)).items()))


def period_of(period: str, now: float) -> tuple[str, int]:
    """The first day of this day, week or month, and when it ends."""
    year, month, day, _, _, _, weekday = time.localtime(now)[:7]
    first, last = {"day": ((month, day), (month, day + 1)), "month": ((month, 1), (month + 1, 1)),
                   "week": ((month, day - weekday), (month, day - weekday + 7))}[period]
    begin, end = (time.mktime((year, *date, 0, 0, 0, 0, 0, -1)) for date in (first, last))      # in any month
    return day_of(begin), int(end)


class Usage:
    """Counts by day, tool, model and client key; no text of any request.  Without a path it counts nothing."""

    def __init__(self, path: str, limits: Limits = Config.limits, budget: Sequence[tuple[float, str]] = ()) -> None:
        self._file, self._budget = UsageFile(path, limits), budget
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._stored: UsageRows = {}                # the file, as it was at this stamp
        self._stamp: Any = None
        self._new = sum_of()
        self._timer: Optional[threading.Timer] = None       # of the next write
        self._next_write = 0.0
        self.running: Dict[Callable[[], float], str] = {}   # what a request has cost so far -> its key
        self.fault = "" if path else "usage is not counted here"

    def add(self, tool: str, model: str, key: str, figures: dict) -> None:
        if not self._file.path:
            return
        with self._lock:
            crowded = len(self._new) >= 1_000 or len(self._stored) >= USAGE_ROWS
            today = day_of(time.time() // 900 * 900)        # no day begins within a quarter of an hour
            row = self._new[today, "other" if crowded else tool, model, key]
            for figure, amount in figures.items():
                row[figure] += amount
            if self._timer is None:
                self._timer = threading.Timer(max(0.0, self._next_write - time.monotonic()), self.write)
                self._timer.daemon = True
                self._timer.start()

    def write(self) -> None:
        """Adds what is new to the file; what cannot be written is tried again after the next request."""
        with self._lock:
            self._timer, self._next_write = None, time.monotonic() + USAGE_INTERVAL
        fault, new = "", {}
        try:
            with self._file.lock(), self._writing:  # in this order: who only reads waits for no other process
                with self._lock:
                    new, self._new = self._new, sum_of()
                total = sum_of(self._read(), new)
                days = sorted({day for day, *_ in total})[-USAGE_DAYS:]
                self._file.write({"rows": [dict(zip(USAGE_PLACE, place), **figures) for place, figures
                                           in sorted(total.items()) if place[0] >= days[0]]})
                self._stored, self._stamp = total, self._file.stamp()
                new = {}
        except (OSError, GatewayError) as failure:
            fault = str(failure)
        with self._lock:
            was, self.fault, self._new = self.fault, fault, sum_of(new, self._new)
        if fault != was:
            LOG.warning("usage %s", "could not be written: " + fault if fault else "is written again")

    def close(self) -> None:
        """Writes what is new, and waits for a write that is under way."""
        with self._lock:
            if self._timer:
                self._timer.cancel()
        if self._new or self._writing.locked():
            self.write()

    def rows(self) -> UsageRows:
        """All that was counted, here and by other gateways.  Raises FileDamaged where budgets count by the file."""
        with self._writing, self._lock:
            stamp = self._file.stamp()
            if stamp != self._stamp:
                self._stored, self._stamp = self._read(), stamp
            return sum_of(self._stored, self._new)

    def check(self, key: str, model: Model, speed: Any, usd: float, period: str) -> None:
        """Raises Refused where a budget of this key is used up, or cannot be counted."""
        first_day, resets_at = period_of(period, time.time())
        fault = self.fault if cost_of(model, {"speed": speed}) else "the price of %s is not known" % model.id
        try:
            spent = sum(figures["usd"] for (day, _, _, owner), figures in self.rows().items()
                        if day >= first_day and owner == key)
        except FileDamaged as damage:
            fault = str(damage)
        if fault:
            raise exhausted("The budget cannot be counted, so it refuses: %s." % fault.rstrip("."))
        spent += sum(cost() for cost, owner in list(self.running.items()) if owner == key)
        if spent >= usd:
            raise exhausted("The budget of $%g a %s is used up: it is $%.2f." % (usd, period, spent), resets_at)

    def _read(self) -> UsageRows:
        """The file's rows.  A damaged one counts for nothing, and is kept aside; not where budgets count by it."""
        try:
            rows = (self._file.read() or {"rows": []})["rows"]
        except FileDamaged:
            if self._budget:
                raise
            rows = []
        return sum_of(*({tuple(row[name] for name in USAGE_PLACE): {
            name: row[name] for name in USAGE_FIGURES if name in row}} for row in rows))


def exhausted(message: str, resets_at: int | None = None) -> Refused:
    reset = " It is reset at %s." % time.strftime("%Y-%m-%d %H:%M", time.localtime(resets_at)) if resets_at else ""
    return Refused(429, "insufficient_quota", message + reset)


# ---- HTTP/1.1 ----------------------------------------------------------------------------------------
# Sockets, heads and bodies (RFC 9110 and 9112), once for both sides: what clients send and what the upstream answers.
# A client is read more strictly, as another server in front of us might read an unclear message otherwise.

BROKE_OFF = "The upstream broke off in the middle of its answer."


class Polls(dict):
    """Waits for a few sockets; a poll object (by readers and writers) is kept, as making one costs more than a wait."""

    def __missing__(self, sockets: tuple[Any, Any]) -> Any:
        if len(self) == 4:                          # the others are mostly of connections that are no more
            self.clear()
        poll = self[sockets] = select.poll()
        for some, event in zip(sockets, (select.POLLIN, select.POLLOUT)):
            for sock in some:
                poll.register(sock, event)
        return poll

    def ready(self, readers: tuple, seconds: float, writers: tuple = ()) -> list[int]:
        """The descriptors of those that can be read or written to, or have ended; [] when the time is up."""
        for sock in readers:
            if isinstance(sock, ssl.SSLSocket) and sock.pending():
                return [sock.fileno()]
        seconds = max(0.0, seconds)
        if not hasattr(select, "poll"):             # Windows
            readable, writable, _ = select.select(readers, writers, [], seconds)
            return [sock.fileno() for sock in readable + writable]
        return list(dict(self[readers, writers].poll(seconds * 1000)))


class Peer:
    """The other end of a connection, by a socket that never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(0)                          # once; for every read it would be one more call of the system
        self.sock = sock
        self.polls = Polls()
        self.unread = bytearray()                   # has come, and nobody has asked for it yet
        self.drained = True                         # the last read brought all there was: better wait before the next

    def read(self) -> bytes | None:
        """What has come; b"" at the end of the connection; None where it has to be waited for first."""
        if self.unread:
            data = bytes(self.unread)
            self.unread.clear()
            return data
        try:
            data = self.sock.recv(READ_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError):     # TLS may have read something of its own
            return None
        self.drained = len(data) < READ_SIZE        # TLS gives one record at a time; the system still has the next
        return data

    def read_within(self, seconds: float, deadline: float = math.inf) -> bytes:
        """The same, waited for.  Raises socket.timeout after so many seconds of silence, or at the deadline."""
        while True:
            left = min(seconds, deadline - time.monotonic())
            data = self.read() if left > 0 and (self.unread or not self.drained) else None
            if data is not None:
                return data
            if left <= 0 or not self.polls.ready((self.sock,), left):
                raise socket.timeout("timed out")
            self.drained = False

    def send(self, data: bytes, wait: Callable[[bool], None]) -> None:
        """Sends all of it; `wait` returns when the socket can be written to (True) or, for TLS, read (False)."""
        sent = 0
        while sent < len(data):
            try:
                sent += self.sock.send(memoryview(data)[sent:] if sent else data)
            except ssl.SSLWantReadError:
                wait(False)
            except (BlockingIOError, ssl.SSLWantWriteError):
                wait(True)

    def close(self) -> None:
        self.sock.close()


class Wait(NamedTuple):
    """Until this socket can be read."""
    sock: socket.socket
    seconds: float                                  # without a byte: then the upstream is given up,
    latest: float = math.inf                        # as it is at this time.monotonic()


# What a stream yields, its steps: each is what there is to send, and what to wait for before the next one: None, a Wait
# or, with nothing to send, NEEDS_THREAD before work that takes time.
NEEDS_THREAD: Any = object()


def silence(wait: Wait, what: str = "sent") -> UpstreamTimeout:
    return UpstreamTimeout("The upstream has %s nothing for %g seconds." % (what, wait.seconds))


class Client:
    """The client of one request while the upstream is waited for; without a connection (as a library) none leaves."""

    def __init__(self, peer: Peer | None = None, limits: Limits = Config.limits) -> None:
        self.peer: Any = peer
        self._limits = limits
        self._polls = peer.polls if peer else Polls()
        self.watched = peer is not None
        self.idle_comment = b""                     # for one that has heard nothing; none before a stream
        self.last_sent = time.monotonic()

    @property
    def comment_due(self) -> float:
        return self.last_sent + self._limits.keepalive_interval if self.idle_comment else math.inf

    @property
    def write_deadline(self) -> float:
        return self.last_sent + self._limits.write_timeout

    def wait(self, wait: Wait, writing: bool = False) -> None:
        """Returns when the upstream can be read, or written to.  Raises ClientGone, or UpstreamTimeout."""
        now = time.monotonic()
        deadline = min(now + wait.seconds, wait.latest)
        while True:
            client = (self.peer.sock,) if self.watched else ()
            readers, writers = (client, (wait.sock,)) if writing else ((wait.sock, *client), ())
            due = min(deadline, self.comment_due) if self.idle_comment else deadline
            ready = self._polls.ready(readers, due - now, writers)
            if client and client[0].fileno() in ready:
                self.check()
            if wait.sock.fileno() in ready:
                return
            now = time.monotonic()
            if now >= deadline:
                raise silence(wait, "read" if writing else "sent")
            if now >= self.comment_due:
                self.send(self.idle_comment)

    def waited(self, steps: Iterator[Any]) -> Iterator[Any]:
        """What the steps of a stream have to send; their waits take place in this thread."""
        for data, wait in steps:
            yield data
            if isinstance(wait, Wait):
                self.wait(wait)

    def pause(self, seconds: float) -> None:
        """Sleeps, unless the client leaves meanwhile; 0 seconds just check that.  Raises ClientGone."""
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not self.watched:
                time.sleep(left)
            elif self._polls.ready((self.peer.sock,), left):
                self.check()
            if time.monotonic() >= deadline:
                return

    def check(self) -> None:
        """A client whose read side has ended is gone; one that sends early (pipelining) is not.  Early bytes are put
        aside; where they would be too many they stay, and the client is not watched any more."""
        keep = len(self.peer.unread) < READ_SIZE
        try:
            data = self.peer.sock.recv(4_096, 0 if keep else socket.MSG_PEEK)
        except BlockingIOError:                     # nothing after all
            return
        except OSError:
            data = b""
        if not data:
            raise ClientGone
        if keep:
            self.peer.unread += data
        else:
            self.watched = False

    def send(self, data: bytes) -> None:
        """Raises ClientGone, whatever the system calls it: nobody else is to blame for it."""
        def wait_until_it_reads(writing: bool) -> None:
            if not self._polls.ready((), self._limits.write_timeout, (self.peer.sock,)):
                raise ClientGone
        try:
            self.peer.send(data, wait_until_it_reads)
        except OSError:
            raise ClientGone from None
        self.last_sent = time.monotonic()


class HeadReader:
    """Finds the head of a message in the bytes that have come so far; for both sides the same bounds.  `check_first`
    gets the first line as soon as there is one; `too_large` makes the error of a head beyond the bounds."""
    END = re.compile(rb"\n\r?\n")

    def __init__(self, received: bytearray, check_first: Callable[[str], Any],
                 too_large: Callable[[str], GatewayError]) -> None:
        self._received, self._check_first, self._too_large = received, check_first, too_large
        self._searched = self._line_ends = self.skipped = 0         # skipped: bytes in front of it, which count as well

    def lines(self) -> list[str]:
        """Takes the head from the bytes that have come once it is whole, as its lines; [] until then."""
        received, before = self._received, self._line_ends
        end = self.END.search(received, max(0, self._searched - 2))
        size = end.end() if end else len(received)
        self._line_ends += received.count(b"\n", self._searched, size)
        self._searched = size
        if size + self.skipped > MAX_HEAD or self._line_ends > MAX_HEADERS + 2:
            raise self._too_large("has more than %d bytes or %d header lines." % (MAX_HEAD, MAX_HEADERS))
        if end:
            lines = received[:size].decode("latin-1").replace("\r\n", "\n").split("\n")
            del received[:size]
            self.skipped, self._searched, self._line_ends = self.skipped + size, 0, 0
            return lines[:-2]
        if self._line_ends and not before:
            self._check_first(received[:received.index(b"\n") + 1].decode("latin-1").replace("\r\n", "\n")[:-1])
        return []


REQUEST_LINE = re.compile(r"([A-Za-z]{1,20}) ([\x21-\x7e]+) HTTP/(1\.[01])\Z")
HEADER_LINES = re.compile(r"(\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*)*\Z")
BLANK_LINES = re.compile(rb"(?:\r?\n)+")
# Headers that must not come twice: they decide about framing, identity or access.
SINGLE_HEADERS = {"host", "content-length", "transfer-encoding", "content-type", "content-encoding", "authorization",
                  "x-api-key", "api-key", "origin", "expect"}
STATUS_LINE = re.compile(r"HTTP/(1\.[0-9])[ \t]+([1-9][0-9][0-9])(?:[ \t]+(.*))?\Z")
UNSENDABLE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")   # in a header (RFC 9110, 5.5)


class Head(NamedTuple):
    """A request line and its headers (names in lower case), checked."""
    method: str
    target: str
    version: str
    headers: Dict[str, str]


class UpstreamHead(NamedTuple):
    """Status line and headers (names in lower case; of two with the same name the first counts) of an answer."""
    version: str
    status: int
    reason: str
    headers: Dict[str, str]

    def framing(self) -> BodyFraming:
        """Where its body ends (RFC 9112, 6.3).  Raises UpstreamFault for an invalid Content-Length."""
        if self.status < 200 or self.status in (204, 304):
            return BodyFraming(False, 0)
        length = self.headers.get("content-length")
        chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if chunked or length is None:
            return BodyFraming(chunked, None)
        if not re.match(r"[0-9]{1,40}\Z", length):
            raise UpstreamFault("The upstream sent an invalid Content-Length: %s." % printable(length, 40))
        return BodyFraming(False, int(length))


def ends_connection(version: str, headers: dict[str, str]) -> bool:
    """Whether a connection ends with the message of this head (RFC 9112, 9.3)."""
    connection = headers.get("connection", "").lower()
    return "close" in connection or version == "1.0" and "keep-alive" not in connection


@functools.lru_cache(maxsize=16)
def request_line(line: str) -> tuple[str, str, str]:
    """Method, target and version of a request line.  Raises InvalidRequest."""
    match = REQUEST_LINE.match(line)
    if not match:
        raise InvalidRequest("The request line is not one of HTTP/1.1.", code="bad_request_line")
    return match.group(1), match.group(2), match.group(3)


def head_from_lines(lines: list[str]) -> Head:
    """Request line and header lines, without their line ends, as a Head.  Raises InvalidRequest."""
    method, target, version = request_line(lines[0])
    headers: dict[str, str] = {}
    if not HEADER_LINES.match("\n".join(["", *lines[1:]])):
        raise InvalidRequest("A header line is malformed.", code="bad_header")
    for line in lines[1:]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers and name in SINGLE_HEADERS:
            raise InvalidRequest("The header %s came twice." % name, code="bad_header")
        headers[name] = headers[name] + ", " + value if name in headers else value
    if version == "1.1" and "host" not in headers:
        raise InvalidRequest("HTTP/1.1 needs a Host header.", code="bad_header")
    return Head(method, target, version, headers)


def status_line(line: str) -> tuple[str, int, str]:
    """Version, status and reason of a status line.  Raises BadStatusLine."""
    match = STATUS_LINE.match(line)
    if not match:
        raise http.client.BadStatusLine("it does not answer in HTTP/1.1 (%s)" % printable(line.strip()))
    return match.group(1), int(match.group(2)), match.group(3) or ""


def body_length(head: Head) -> int | None:
    """The length that frames a request body, None for a chunked one.  Whatever is ambiguous is refused."""
    coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
    if coding is not None:
        if length is not None or head.version == "1.0":
            raise InvalidRequest("Transfer-Encoding does not go with Content-Length or HTTP/1.0.", code="bad_framing")
        if coding.lower() != "chunked":
            raise Refused(501, "unsupported_transfer_encoding", "Transfer-Encoding: only chunked is supported.")
        return None
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise InvalidRequest("Content-Length is not a number.", code="bad_framing")
    return int(length)


class BodyFraming:
    """Where the body of an answer ends (RFC 9112, 6.3): bytes of the connection in, bytes of the body out."""
    SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(;.*)?\Z")
    LONGEST_LINE = 65_536
    COUNTING = False                                # whether each chunk is counted

    def __init__(self, chunked: bool, length: int | None) -> None:
        self._chunked = chunked
        self._left = 0 if chunked else length       # bytes of the chunk or body; None: until the connection ends
        self._in_chunk, self._in_trailers, self._trailers = not chunked, False, 0      # a length makes one chunk
        self.done = length == 0 and not chunked
        self.rest = b""                             # a line that has only begun; behind the end, what is not the body's
        self.surplus = self.done                    # more came than the body, or might have where nothing is read

    def feed(self, data: bytes) -> bytes:
        """The part of `data` that is body, however the bytes were cut; extensions and trailers of chunks are ignored.
        Raises UpstreamFault for a chunk that does not hold together (RFC 9112, 7.1)."""
        if self._left is None:
            return data
        data, at = self.rest + data if self.rest else data, 0
        pieces: list[bytes] = []
        # most reads bring whole chunks without CRLF in them, at last the empty one without trailers
        lines = iter(() if self._in_chunk or self._in_trailers or self.COUNTING else data.split(b"\r\n"))
        for size, piece in zip(lines, lines):
            end = at + len(size) + len(piece) + 4
            if size != b"%x" % len(piece) or end > len(data):
                break
            pieces.append(piece)
            self.done, at = not piece, end
            if self.done:
                break
        while at < len(data) and not self.done:
            if self._left:
                piece = data[at:at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                self.done = not self._chunked and not self._left
                continue
            end = data.find(b"\n", at) + 1
            if not end or end - at > self.LONGEST_LINE:
                break
            self._line(data[at:end])
            at = end
        self.rest = data[at:]
        self.surplus = self.done and bool(self.rest)
        if not self.done and len(self.rest) > self.LONGEST_LINE:
            raise self._fault("a chunk size without end")
        return b"".join(pieces)

    def end(self) -> None:
        """The connection has ended.  Raises UpstreamFault where that cuts the body short."""
        if self._left is not None:
            raise UpstreamFault(BROKE_OFF)
        self.done = self.surplus = True             # nothing can follow on this connection

    def _line(self, line: bytes) -> None:
        """A line of the coding: the end of a chunk, the size of the next one, or a trailer."""
        line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
        if self._in_trailers:
            self.done, self._trailers = not line, self._trailers + 1
            if self._trailers == MAX_HEADERS and line:
                raise self._fault("too many trailers")
        elif self._in_chunk:
            if line:
                raise self._fault("a chunk that is longer than its size")
            self._in_chunk = False
        else:
            match = self.SIZE.match(line)
            if not match:
                raise self._fault("a chunk without a size")
            self._begin_chunk(int(match.group(1), 16))

    def _begin_chunk(self, size: int) -> None:
        self._left = size
        self._in_chunk, self._in_trailers = size > 0, size == 0

    def _fault(self, what: str) -> GatewayError:
        return UpstreamFault("The upstream sent %s." % what)


class RequestFraming(BodyFraming):
    """The same for the body of a request, which is bounded, and may be written in one way only."""
    SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?\Z")
    COUNTING = True
    LONGEST_LINE = 1_025

    def __init__(self, length: int | None, limit: int) -> None:
        super().__init__(length is None, length)
        self._limit, self._room = limit, limit
        if length is not None and length > limit:
            raise self._too_large()

    def end(self) -> None:
        """The connection has ended.  Raises ConnectionResetError, or InvalidRequest in the middle of a line."""
        raise self._fault("a chunk line without its end") if self.rest else ConnectionResetError()

    def _line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n"):
            raise self._fault("a chunk line that does not end in CRLF")
        super()._line(line)

    def _begin_chunk(self, size: int) -> None:
        super()._begin_chunk(size)
        self._room -= size
        if self._room < 0:
            raise self._too_large()

    def _fault(self, what: str) -> GatewayError:
        return InvalidRequest("The body has %s." % what, code="bad_framing")

    def _too_large(self) -> GatewayError:
        return Refused(413, "request_too_large", "The body has more than %d MB." % (self._limit // 1_000_000))


# ---- Upstream ----------------------------------------------------------------------------------------
# One authenticated call to the Messages API: connections, headers, timeouts, one retry.  Knows nothing of the
# body.  Foreign exceptions end here: what comes out is a GatewayError, or ClientGone.


@dataclasses.dataclass
class UpstreamCall:
    """A request on its way upstream: for whom, through which gateways, with what patience."""
    client: Client = dataclasses.field(default_factory=Client)
    hops: str = ""
    patience: float = Limits.upstream_silence       # seconds without a byte from the upstream
    may_retry: bool = True                          # our one retry is still to be had
    deadline: float = math.inf                      # of time.monotonic(), for all of it

    def wait_for(self, sock: socket.socket) -> Wait:
        return Wait(sock, self.patience, self.deadline)


LOST = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)      # a connection that the other side has ended


class UpstreamConnection(Peer):
    """A kept-alive connection to the upstream, where need be through a proxy."""
    last_used = 0.0

    def __init__(self, way: Any, tls: Callable[[], ssl.SSLContext], call: UpstreamCall) -> None:
        """Connects; `way` (way_to) names the proxy as its host where there is a tunnel to another one."""
        tunnel, context = way._tunnel_host, tls() if way.type == "https" else None
        sock = socket.create_connection(address_of(way.host, 443 if context and not tunnel else 80), CONNECT_TIMEOUT)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            super().__init__(sock)
            if tunnel:
                target = tunnel if re.search(r":\d+\Z", tunnel) else tunnel + ":443"
                call = replace(call, patience=CONNECT_TIMEOUT)
                self.ask("CONNECT", target, dict({"host": target}, **way.headers), b"", call)   # with the proxy's key
                head = self.answer(call)
                if head.status != 200:
                    raise OSError("Tunnel connection failed: %d %s" % (head.status, head.reason.strip()))
            if context:
                sock.settimeout(CONNECT_TIMEOUT)
                name = address_of(tunnel or way.host, 443)[0]
                # read from here on: what a proxy said before TLS could otherwise be taken for an answer
                super().__init__(context.wrap_socket(sock, server_hostname=name))
        except BaseException:
            sock.close()
            raise

    def ask(self, method: str, target: str, headers: dict[str, str], body: bytes, call: UpstreamCall) -> None:
        """Sends a request, for as long as the client waits for the answer and the upstream goes on reading."""
        if UNSENDABLE.search("".join(headers.values())):
            raise UpstreamFault("HTTP cannot carry the value of this header to the upstream: %s." % ", ".join(
                name for name, value in headers.items() if UNSENDABLE.search(value)))
        if not (target.isascii() and target.isprintable()) or " " in target:
            raise UpstreamFault("The upstream's address is an invalid URL: %s" % printable(target))
        lines = ["%s %s HTTP/1.1" % (method, target), *map(": ".join, headers.items()), "\r\n"]
        head = "\r\n".join(lines).encode("latin-1")
        # one of usual size in a single piece; to copy more would cost more than a second call
        for data in ([head + body] if len(body) <= READ_SIZE else [head, body]):
            self.send(data, lambda writing: call.client.wait(call.wait_for(self.sock), writing))

    def answer(self, call: UpstreamCall) -> UpstreamHead:
        """The head of the answer; interim ones before it are passed over (RFC 9110, 15.2).  Raises BadStatusLine."""
        received, head = bytearray(), None
        reader = HeadReader(received, status_line,
                            lambda words: UpstreamFault("The head of the upstream's answer " + words))
        while head is None or head.status < 200 and head.status != 101:
            first, *lines = self._head_lines(reader, received, call, begun=head is not None)
            headers: dict[str, str] = {}
            for line in lines:
                name, colon, value = line.partition(":")
                if colon:                           # a folded line makes a name that nobody asks for
                    headers.setdefault(name.lower(), value.strip())
            head = UpstreamHead(*status_line(first), headers)
        self.unread = received
        return head

    def _head_lines(self, reader: HeadReader, received: bytearray, call: UpstreamCall, begun: bool) -> list[str]:
        """Takes the lines of a head.  Without `begun` the connection may turn out to have died before the request."""
        while True:
            lines = reader.lines() if received else []
            if lines:
                return lines
            begun = begun or bool(received)
            if not b"HTTP/".startswith(received[:5]):
                status_line(received.decode("latin-1"))
            data = None
            try:
                while data is None:
                    call.client.wait(call.wait_for(self.sock))
                    data = self.read()
            except OSError:
                if not begun:
                    raise
            if not data:
                raise UpstreamFault(BROKE_OFF) if begun else http.client.RemoteDisconnected(
                    "it ended the connection instead of an answer")
            received += data


def address_of(netloc: str, default_port: int) -> tuple[str, int]:
    """Host and port of the part of a URL that names them."""
    parts = urllib.parse.urlsplit("//" + netloc)
    return parts.hostname or "", parts.port or default_port


class ConnectionPool:
    """Idle upstream connections by destination.  A connection that the other side has closed is never handed out."""

    def __init__(self) -> None:
        self._idle: Dict[Any, List[UpstreamConnection]] = collections.defaultdict(list)
        self._size = POOL_SIZE                      # for each destination
        self._lock = threading.Lock()

    def take(self, key: Any) -> UpstreamConnection | None:
        while True:
            with self._lock:
                if not self._idle[key]:
                    return None
                connection = self._idle[key].pop()
            # an idle connection with something to read has been closed, or speaks out of turn
            age = time.monotonic() - connection.last_used
            if age < POOL_AGE and not connection.polls.ready((connection.sock,), 0):
                return connection
            connection.close()

    def give(self, key: Any, connection: UpstreamConnection) -> None:
        connection.last_used = time.monotonic()
        with self._lock:
            self._idle[key].append(connection)
            surplus = self._idle[key].pop(0) if len(self._idle[key]) > self._size else None
        if surplus:
            surplus.close()

    def close_old(self, age: float = POOL_AGE) -> None:
        """Closes what nobody has used for that long."""
        with self._lock:
            for connections in self._idle.values():
                while connections and time.monotonic() - connections[0].last_used >= age:
                    connections.pop(0).close()

    def close(self) -> None:
        """Closes all; one that is given back later is closed, too."""
        self._size = 0
        self.close_old(0)


def way_to(config: Config, url: str) -> Any:
    """A request of urllib to an address; through a proxy its host is the proxy's, and it names that of the tunnel."""
    way: Any = urllib.request.Request(url)
    if way.type == "https" and is_proxied(config, way.host):
        urllib.request.ProxyHandler({}).proxy_open(way, config.https_proxy, "https")
    return way


class UpstreamReply:
    """An answer of the upstream; `give_back` keeps its connection for another request, None where none can follow."""

    def __init__(self, connection: UpstreamConnection, head: UpstreamHead, call: UpstreamCall,
                 give_back: Callable[[], None] | None) -> None:
        self._connection, self._call, self._give_back = connection, call, give_back
        self.framing = head.framing()
        self._closed = False
        self.status, self.headers = head.status, head.headers
        self.is_stream = self.headers.get("content-type", "").lower().startswith("text/event-stream")
        encoding = self.headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip"):    # the opener closes the connection
            raise UpstreamFault("The upstream answered in an encoding that nobody asked for: %s." % encoding)
        self._inflate = zlib.decompressobj(31) if encoding == "gzip" else None

    def pieces(self) -> Iterator[Any]:
        """The body as it arrives, in the steps of a stream.  Raises UpstreamFault when it breaks off."""
        framing, connection, wait = self.framing, self._connection, self._call.wait_for(self._connection.sock)
        try:
            while not framing.done:
                data = connection.read()
                if data is None:
                    yield b"", wait
                    continue
                if not data:
                    framing.end()
                piece = framing.feed(data)
                yield (b"", None) if self._inflate else (
                    piece, wait if connection.drained and not framing.done else None)
                # bit by bit, as gzip can hold a thousand times its size; a client that has left ends it
                while self._inflate and piece and not self._inflate.eof:
                    yield self._inflate.decompress(piece, READ_SIZE), None
                    piece = self._inflate.unconsumed_tail
                    self._call.client.pause(0)
        except (OSError, http.client.HTTPException, zlib.error) as fault:
            raise fault_from(fault, "broke off in the middle of its answer") from fault
        if self._inflate and not self._inflate.eof:
            raise UpstreamFault(BROKE_OFF)

    def read(self, limit: int = 64_000_000) -> bytes:
        """The whole body, waited for in this thread."""
        body = bytearray()
        for piece in self._call.client.waited(self.pieces()):
            body += piece
            if len(body) > limit:
                raise UpstreamFault("The upstream's answer is larger than %d bytes." % limit)
        return bytes(body)

    def close(self, answered: bool = False) -> None:
        """Gives the connection back after the end of the body, which `answered` waits for; else closes it."""
        if self._closed:                            # given back twice, it would serve two requests at once
            return
        self._closed = True
        if answered and not self.framing.done:
            deadline = time.monotonic() + 0.2
            with suppress(GatewayError, ClientGone):
                for _, wait in self.pieces():
                    left = deadline - time.monotonic()
                    if left <= 0 or wait and not self._connection.polls.ready((wait.sock,), left):
                        break
        if self._give_back and self.framing.done and not self.framing.surplus:
            self._give_back()
        else:
            self._connection.close()


class Upstream:
    """The way to Claude: base URL, credential, proxy, certificates, retries."""

    def __init__(self, config: Config, instance_id: str) -> None:
        self._config = config
        self._refusal: Optional[dict] = None        # what Claude last said against the credential
        self._instance_id = instance_id
        workspace = {"anthropic-workspace-id": config.workspace_id} if config.workspace_id else {}
        self._custom = {**dict(config.custom_headers), **workspace, "anthropic-version": ANTHROPIC_VERSION}
        self.pool = ConnectionPool()
        self._way_to = functools.lru_cache(maxsize=16)(functools.partial(way_to, config))
        # made on first use: it costs 20 ms
        self._tls = functools.lru_cache(maxsize=1)(functools.partial(tls_context, config.ca_file, config.relax_x509))
        self.credential: Optional[Credential] = None
        self.on_headers: Callable[[Dict[str, str]], None] = lambda headers: None

    @property
    def base_url(self) -> str:
        return (self.credential and self.credential.base_url or self._config.base_url).rstrip("/")

    @property
    def trouble(self) -> dict | None:
        """The last refusal of the credential or failed renewal, with its time, until one succeeds."""
        return self._refusal or (self.credential.trouble if self.credential else None)

    def messages(self, body: bytes, call: UpstreamCall, beta: Sequence[str] = (), path: str = "/v1/messages",
                 native: dict[str, str] | None = None) -> UpstreamReply:
        """POST /v1/messages, once more after a failure that may pass.  Raises GatewayError unless the status is 200."""
        headers = {"content-type": "application/json", **(native or {})}
        if len(body) > MAX_UPSTREAM_BODY:
            raise Refused(413, "request_too_large", "The request has %.1f MB as Claude would get it; Claude accepts "
                          "up to 32 MB." % (len(body) / 1e6))
        while True:
            try:
                return self._ask("POST", path, body, headers, call, beta)
            except (ClaudeError, UpstreamFault) as failure:
                delay = retry_delay(failure) if call.may_retry else None
                if delay is None:
                    raise
                LOG.info("retrying once in %g s: %s", delay, failure if isinstance(failure, ClaudeError) else
                         "the connection failed")
                call.client.pause(delay)
                call.may_retry = False

    def get(self, path: str, key: str | None = None, timeout: float = MODELS_TIMEOUT) -> dict:
        """GET a JSON object, with the gateway's credential or with an API key that the caller brought."""
        call = UpstreamCall(patience=timeout)
        with closing(self._ask("GET", path, None, {}, call, key=key)) as reply:
            return json_object_from(reply.read())

    def models(self, key: str | None = None) -> list[dict] | None:
        """Claude's model list, all of its pages; None where there is no credential to ask with."""
        if not key and self.credential is None:
            return None
        entries: list[dict] = []
        after = ""
        for _ in range(10):                         # pages of 1,000
            page = self.get("/v1/models?limit=1000" + after, key)
            data = page.get("data")
            if not isinstance(data, list):
                raise UpstreamFault("The upstream's model list has no data.")
            entries += [entry for entry in data if isinstance(entry, dict)]
            if not page.get("has_more") or not page.get("last_id"):
                break
            after = "&after_id=" + urllib.parse.quote(str(page["last_id"]))
        return entries

    def probe(self) -> dict[str, str]:
        """Asks the upstream for anything at all, without a credential; the headers of what it answers."""
        reply = self._open("GET", self.base_url, "/", None, {}, UpstreamCall(patience=MODELS_TIMEOUT))
        reply.close()
        return reply.headers

    def post_json(self, url: str, body: dict, headers: dict[str, str]) -> tuple[int, dict]:
        """POST to the sign-in endpoint: the status and the JSON object it answers with ({} if it is none)."""
        data, patience = json.dumps(body).encode(), self._config.limits.token_timeout
        call = UpstreamCall(patience=patience, deadline=time.monotonic() + patience)
        try:
            reply = self._open("POST", url, "", data, dict(headers, **{"content-type": "application/json"}), call)
            with closing(reply):
                body_read = reply.read(1_000_000)
        except UpstreamTimeout as fault:
            raise UpstreamTimeout("It has not answered within %g seconds." % patience) from fault
        with suppress(UpstreamFault):
            return reply.status, json_object_from(body_read)
        return reply.status, {}

    def close(self) -> None:
        self.pool.close()

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str], call: UpstreamCall,
             beta: Sequence[str] = (), key: str | None = None) -> UpstreamReply:
        """A call with a caller's key or the gateway's credential.  Raises GatewayError unless the status is 200."""
        if key:
            return self._asked(ApiKey(key, "the caller"), method, path, body, headers, call, beta)
        try:
            if self.credential is None:
                raise CredentialNeeded("The gateway has no credential: set ANTHROPIC_API_KEY, or run "
                                       "`claude-gateway login`.")
            reply = self._asked(self.credential, method, path, body, headers, call, beta)
        except GatewayError as failure:
            if failure.code in FINAL_CODES:
                self._refusal = trouble_of(failure)
            raise
        self._refusal = None
        return reply

    def _asked(self, credential: Credential, method: str, path: str, body: bytes | None, headers: dict[str, str],
               call: UpstreamCall, beta: Sequence[str]) -> UpstreamReply:
        """A call with this credential.  Claude's 401 to a login is answered by one renewal of its token."""
        custom, hops = self._custom, ",".join(filter(None, [call.hops, self._instance_id]))
        paid, renewable = credential.headers(), True
        while True:
            betas = dict.fromkeys(filter(None, [custom.get("anthropic-beta"), paid.get("anthropic-beta"), *beta]))
            whole = {**custom, **paid, **headers, HOP_HEADER: hops}
            if betas:
                whole["anthropic-beta"] = ",".join(betas)
            reply = self._open(method, self.base_url, path, body, whole, call)
            if body is not None:
                self.on_headers(reply.headers)
            if reply.status in (200, 400, 429):
                credential.accepted(paid)
            if reply.status == 200:
                return reply
            refusal = error_from_reply(reply)
            renewed = credential.headers(paid.get("authorization")) if renewable and reply.status == 401 else paid
            if renewed == paid:                     # there is no better token: Claude's message goes to the client
                raise refusal
            paid, renewable = renewed, False

    def _open(self, method: str, base: str, path: str, body: bytes | None, headers: dict[str, str],
              call: UpstreamCall) -> UpstreamReply:
        """The answer to a request.  Redirects are not followed, as they would carry the credential along."""
        way = self._way_to(base)
        headers = {**headers, "host": way._tunnel_host or way.host, "user-agent": USER_AGENT,
                   "accept-encoding": "identity"}
        if body is not None:
            headers["content-length"] = str(len(body))
        try:
            reply = self._answer(way, call, (method, way.selector + path or "/", headers, body or b""))
        except (OSError, http.client.HTTPException) as fault:
            raise fault_before_answer(fault, way) from fault
        if reply.status != 200 and not 400 <= reply.status < 600:
            reply.close()
            raise UpstreamFault("The upstream answered with a redirect (%d), which is not followed: it would take the "
                                "credential elsewhere." % reply.status if 300 <= reply.status < 400 else
                                "The upstream answered with status %d, which its API does not use." % reply.status)
        return reply

    def _answer(self, way: Any, call: UpstreamCall, request: tuple[str, str, dict[str, str], bytes]) -> UpstreamReply:
        """The answer on a connection that was kept, as a TLS handshake costs 0.1 s, or on a new one."""
        key = way.type, way.host, way._tunnel_host
        connection, replaced = self.pool.take(key), False
        while True:
            reused = connection is not None
            try:
                connection = connection or UpstreamConnection(way, self._tls, call)
                try:
                    connection.ask(*request, call)
                    sent = True
                except LOST:
                    sent = False
                head = connection.answer(call)      # there may be one before all of the request was read
                return UpstreamReply(connection, head, call, functools.partial(self.pool.give, key, connection)
                                     if sent and not ends_connection(head.version, head.headers) else None)
            except BaseException as fault:
                if connection:
                    connection.close()
                if not isinstance(fault, LOST) or not (reused or replaced):
                    raise
                if replaced:                        # that was our one retry: may_pass stays False
                    raise UpstreamFault("The upstream ended two connections in a row.") from None
                connection, replaced = None, True   # it died of age: the request was not accepted
                call.may_retry = False


def shown_proxy(config: Config) -> str:
    """The proxy's address without its credentials."""
    proxy = config.proxy
    return "%s://%s%s" % (proxy.scheme, "***@" if proxy.username else "", re.sub(r".*@", "", proxy.netloc))


def is_proxied(config: Config, host: str) -> bool:
    """Whether a host, with or without its port, is asked by the proxy; loopback never is, nor what NO_PROXY names."""
    if not config.https_proxy or is_loopback_host(re.sub(r":\d+$", "", host)):
        return False
    bypassed: Any = urllib.request.proxy_bypass_environment     # type: ignore[attr-defined]
    return not (config.no_proxy and bypassed(host, {"no": config.no_proxy}))


def tls_context(ca_file: str, relax_x509: bool) -> ssl.SSLContext:
    """Verifying TLS, with more certificate authorities where the environment names some."""
    context = ssl.create_default_context()
    if ca_file:
        usual = ssl.get_default_verify_paths()      # OpenSSL uses $SSL_CERT_FILE instead of these, not as well
        for kind, path in (("cafile", usual.openssl_cafile), ("capath", usual.openssl_capath)):
            with suppress(OSError):
                context.load_verify_locations(**{kind: path})
        place = {"capath": ca_file} if os.path.isdir(ca_file) else {"cafile": ca_file}
        try:
            context.load_verify_locations(**place)
        except (OSError, ssl.SSLError) as fault:
            raise UpstreamFault("The certificate authorities in %s cannot be read: %s" % (ca_file, fault)) from fault
    if relax_x509:
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context


def error_from_reply(reply: UpstreamReply) -> ClaudeError:
    """The error in an answer whose status is not 200, also where a proxy wrote the body."""
    try:
        error = json_object_from(reply.read(1_000_000)).get("error")
    except UpstreamFault:
        error = None
    finally:
        reply.close()
    if not isinstance(error, dict):
        kind = reply.headers.get("content-type", "no content").split(";")[0]
        error = {"message": "The upstream answered %d with %s instead of its JSON error." % (reply.status, kind)}
    return ClaudeError(reply.status, error, reply.headers)


def retry_delay(failure: ClaudeError | UpstreamFault) -> float | None:
    """Seconds until one retry makes sense; None where it makes none or is better left to the client."""
    if isinstance(failure, UpstreamFault):
        return RETRY_PAUSE if failure.may_pass else None
    if failure.headers.get("x-should-retry") == "false":
        return None
    delay = retry_after(failure.headers)
    if delay is None and failure.upstream_status >= 500:
        delay = RETRY_PAUSE
    passes = failure.upstream_status == 429 or failure.upstream_status >= 500
    return delay if passes and delay is not None and delay <= LONGEST_RETRY_AFTER else None


def retry_after(headers: dict[str, str]) -> float | None:
    """The seconds of a Retry-After header (RFC 9110, 10.2.3), given as a number or a date."""
    value = headers.get("retry-after", "")
    if re.match(r"\d+(\.\d+)?\Z", value):
        return float(value)
    with suppress(TypeError, ValueError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


TLS_CAUSES = (
    ("missing authority key id|does not include key usage|basic constraints",
     "the certificate breaks a strict rule of Python 3.13+; --relax-x509 clears that rule alone"),
    ("self.signed|unable to get|unknown ca",
     "its authority is unknown here (a company's inspection, perhaps): name its file in SSL_CERT_FILE"),
    ("expired|not yet valid", "its dates do not fit this machine's clock"),
    ("mismatch|doesn't match", "it is for another host name"),
)


def fault_before_answer(fault: Exception, way: Any) -> GatewayError:
    """A call that failed before there was an answer: who could not be reached, the upstream or the proxy."""
    who, what, unknown = "The upstream", "could not be reached", isinstance(fault, socket.gaierror)
    if way._tunnel_host and (unknown or isinstance(fault, ConnectionRefusedError)):
        who = "The proxy " + way.host
    elif way._tunnel_host:
        what += " through the proxy " + way.host
    elif not unknown:
        what += " at " + way.host
    if unknown:
        what += ", as its host name %s is not known here (`claude-gateway doctor` checks the way there)" % re.sub(
            r":\d+\Z", "", way.host)
    return fault_from(fault, what, who)


def fault_from(fault: Exception, what: str, who: str = "The upstream") -> GatewayError:
    """Any exception of sockets, TLS or http.client as an UpstreamFault whose message names the cause."""
    if isinstance(fault, (socket.timeout, TimeoutError)):
        return UpstreamTimeout("%s %s: no answer in time." % (who, what))
    message = str(fault) or type(fault).__name__
    if isinstance(fault, ssl.SSLError):
        cause = next((advice for pattern, advice in TLS_CAUSES if "CERTIFICATE_VERIFY_FAILED" in message
                      and re.search(pattern, message, re.I)), "")
        return UpstreamFault("%s %s: TLS failed (%s)%s." % (who, what, message, ": " + cause if cause else ""))
    failure = UpstreamFault("%s %s: %s." % (who, what, message))
    failure.may_pass = isinstance(fault, OSError)   # who has answered nonsense would do it again
    return failure


# ---- Event loop --------------------------------------------------------------------------------------
# One thread that moves every stream which waits for Claude.  With a thread for each, the interpreter lock changes
# hands at every event: with 1,000 streams that costs several times the work on the event, and they come late
# (.ci/bench.py measures it).  Reading requests, translating them, calling Claude and ending a stream stay in threads.

LOOP_SIZE = 200 if os.name == "nt" else 20_000      # streams; Windows selects among 512 sockets at most
LOOP_STEPS = 32                                     # of one stream in a row: the others wait, too


class RunningStream:
    """A stream on its way: what its steps yield goes to its client, whenever what it waits for is there.  `ended` is
    called once: whether the stream is over, or else needs a thread, and what went wrong or None."""

    def __init__(self, client: Client, steps: Iterator[Any],
                 ended: Callable[[bool, Optional[BaseException]], None]) -> None:
        self.client, self.sock, self.steps, self.ended = client, client.peer.sock, steps, ended
        self.wait: Optional[Wait] = None            # None between two turns
        self.since = 0.0                            # when that began
        self.unsent = b""                           # what the client has not accepted yet; nothing is read meanwhile
        self.registered: Dict[socket.socket, int] = {}      # with the selector: socket -> events

    def due_at(self) -> float:
        """When there is something to do even if nothing happens."""
        if self.unsent:
            return self.client.write_deadline
        return min(self.given_up_at, self.client.comment_due)

    @property
    def given_up_at(self) -> float:
        return min(self.since + self.wait.seconds, self.wait.latest) if self.wait else math.inf


class EventLoop:
    """Waits for the sockets of all its streams at once, and moves those that can."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: Deque[RunningStream] = collections.deque()
        self._streams: set = set()
        self._ready: List[RunningStream] = []       # had more to say than one turn allows
        self._thread: Optional[threading.Thread] = None
        self._closing = False
        self._now = self._check_at = 0.0            # of time.monotonic(): when this turn began, and the next check

    @property
    def full(self) -> bool:
        return self._closing or len(self._streams) + len(self._new) >= LOOP_SIZE

    def add(self, stream: RunningStream) -> None:
        """Takes a stream over; from here on it belongs to the loop's thread."""
        reason = "The gateway stops."
        with self._lock:
            try:
                if not self._closing:
                    if self._thread is None:
                        self._start()
                    self._new.append(stream)
                    if len(self._new) == 1:         # else it has been rung
                        self._ring()
                    return
            except (OSError, RuntimeError) as fault:
                reason = "The gateway is out of threads or descriptors: %s." % fault
        stream.ended(False, busy(reason))

    def close(self) -> None:
        """Stops; streams that still run fail."""
        with self._lock:
            self._closing = True
            thread, self._thread = self._thread, None
            if thread is None:
                return
            self._ring()
        thread.join()
        for each in (self._selector, self._bell, self._button):
            each.close()

    def _start(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._bell, self._button = socket.socketpair()
        self._button.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        thread = threading.Thread(target=self._run, name="event loop", daemon=True)
        thread.start()
        self._thread = thread                       # now that there is one

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # then it has been rung often enough
            self._button.send(b"!")

    def _run(self) -> None:
        while not self._closing:
            ready, self._ready = self._ready, []
            for stream in ready:
                self._with(stream, self._move)
            happened = self._selector.select(0.0 if self._ready else self._check_at - self._now)
            self._now = time.monotonic()
            for key, _ in happened:
                if key.data is None:
                    self._bell.recv(4_096)
                else:
                    self._with(key.data, self._look_after_client if key.fileobj is key.data.sock else self._move)
            while self._new:
                stream = self._new.popleft()
                self._streams.add(stream)
                self._with(stream, self._move)
            if self._now >= self._check_at:
                self._check()
        for stream in [*self._streams, *self._new]:
            self._end(stream, False, busy("The gateway stops."))

    def _with(self, stream: RunningStream, work: Callable[[RunningStream], None]) -> None:
        """Works on a stream; whatever goes wrong is reported to its client and to no other."""
        if stream not in self._streams:             # ended by what happened a moment ago
            return
        try:
            work(stream)
        except BaseException as failure:
            self._end(stream, False, failure)

    def _move(self, stream: RunningStream) -> None:
        """Hands on what there is, as far as its turn and the client allow."""
        for _ in range(LOOP_STEPS):
            step = next(stream.steps, None)
            if step is None or step[1] is NEEDS_THREAD:
                self._end(stream, step is None, None)
                return
            data, stream.wait = step
            if data:
                self._send(stream, data)
            if stream.wait or stream.unsent:
                stream.since = self._now
                if stream.unsent or stream.wait.sock not in stream.registered:
                    self._register(stream)
                return
        self._register(stream)                      # by its next turn the upstream's socket may be another's
        self._ready.append(stream)

    def _send(self, stream: RunningStream, data: bytes) -> None:
        """Sends what the client accepts now."""
        stream.client.last_sent = self._now
        try:
            stream.unsent = data[stream.sock.send(data):]
        except BlockingIOError:
            stream.unsent = data
        except OSError:
            raise ClientGone from None

    def _look_after_client(self, stream: RunningStream) -> None:
        """The client reads again, or has sent something, or has gone."""
        if stream.client.watched:
            stream.client.check()
        if stream.unsent:
            self._send(stream, stream.unsent)
            stream.since = self._now                # nothing was read meanwhile
        if stream.unsent or stream.wait:
            self._register(stream)
        else:
            self._move(stream)

    def _register(self, stream: RunningStream) -> None:
        """Registers the sockets that a stream waits for now, and no others; none between two turns."""
        wanted: Dict[socket.socket, int] = {}
        if stream.unsent or stream.wait and stream.client.watched:
            wanted[stream.sock] = (selectors.EVENT_READ if stream.client.watched else 0) | (
                selectors.EVENT_WRITE if stream.unsent else 0)
        if stream.wait and not stream.unsent:
            wanted[stream.wait.sock] = selectors.EVENT_READ
        for sock in set(stream.registered) - set(wanted):
            del stream.registered[sock]
            self._selector.unregister(sock)
        for sock, events in wanted.items():
            if stream.registered.get(sock) != events:
                change = self._selector.modify if sock in stream.registered else self._selector.register
                change(sock, events, stream)
                stream.registered[sock] = events    # one by one: what has failed here may not stay behind
        self._check_at = min(self._check_at, stream.due_at())

    def _check(self) -> None:
        """Looks after streams for which nothing has happened for too long."""
        for stream in list(self._streams):
            if self._now >= stream.due_at():
                self._with(stream, self._look_after_silence)
        # one that has more to say is due by itself, which may be never: no selector waits for ever
        self._check_at = min([self._now + 60, *(stream.due_at() for stream in self._streams)])

    def _look_after_silence(self, stream: RunningStream) -> None:
        if stream.unsent:
            raise ClientGone                        # it does not read
        if stream.wait and self._now >= stream.given_up_at:
            raise silence(stream.wait)
        self._send(stream, stream.client.idle_comment)
        self._register(stream)

    def _end(self, stream: RunningStream, over: bool, failure: BaseException | None) -> None:
        """Gives a stream back to a thread."""
        self._streams.discard(stream)
        if stream.unsent:                           # no error may follow half of something
            over, failure = False, ClientGone()
        stream.wait, stream.unsent = None, b""
        with suppress(OSError, ValueError, KeyError):
            self._register(stream)
        stream.ended(over, failure)


# ---- Image fetching ----------------------------------------------------------------------------------
# Images that Claude cannot fetch for itself.  As a URL could point the gateway at its own network, every address of
# the host must be public, the connection goes to the address that was checked, and each redirect starts over.

FETCH_REDIRECTS = 3
MAX_FETCHED = 7_500_000                             # bytes: as base64 the 10 MB that Claude accepts


class Download(threading.Thread):
    """One image on its way, in a thread of its own: a slow name look-up cannot be ended, only left."""

    def __init__(self, url: str, config: Config, permit: Callable[[str], bool]) -> None:
        super().__init__(name="image", daemon=True)
        self._url, self._config, self._permit = url, config, permit
        self.ended, self._bell = socket.socketpair()        # the first ends with the work
        self._sockets, self._given_up = [self._bell], False
        self.outcome: Any = None                    # media type and base64, or what went wrong

    def run(self) -> None:
        try:
            self.outcome = self._fetched()
        except Exception as fault:
            self.outcome = fault
        self._bell.close()

    def give_up(self) -> None:
        self._given_up = True
        for sock in self._sockets:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def refusal(self, what: str) -> InvalidRequest:
        return InvalidRequest("The image %r %s." % (self._url[:200], what), "image_url", "invalid_image_url")

    def _uses(self, sock: socket.socket) -> None:
        """From here on this socket ends with the download."""
        self._sockets.append(sock)
        if self._given_up:
            self.give_up()

    def _fetched(self) -> tuple[str, str]:
        here = self._url
        for _ in range(FETCH_REDIRECTS + 1):
            try:
                status, location, body = self._get(here)
                here = urllib.parse.urljoin(here, location or "")
            except (OSError, http.client.HTTPException, ValueError) as fault:
                hint = " (images are fetched directly, but here only a proxy may lead out)"
                hint = hint if self._config.https_proxy else ""
                raise self.refusal("could not be fetched: %s%s" % (fault, hint)) from fault
            if status in (301, 302, 303, 307, 308) and location:
                continue
            if status != 200:
                raise self.refusal("answered with status %d" % status)
            media_type = media_type_of(body)
            if media_type not in IMAGE_TYPES:
                raise self.refusal("is not a JPEG, PNG, GIF or WebP image")
            return media_type, base64.b64encode(body).decode()
        raise self.refusal("redirects more than %d times" % FETCH_REDIRECTS)

    def _get(self, here: str) -> tuple[int, str | None, bytes]:
        """One hop: status, Location, and the body if the status is 200."""
        if not HTTP_URL.match(here):
            raise self.refusal("leads to something that is not a web address")
        parts = urllib.parse.urlsplit(here)
        host, secure = parts.hostname or "", parts.scheme.lower() == "https"
        port = parts.port or (443 if secure else 80)
        if parts.username or parts.password or not host:
            raise self.refusal("has user information or no host in it")
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not found or not all(map(self._permit, found)):
            raise self.refusal("leads to an address of this machine or a private network, which is not fetched")
        connection = http.client.HTTPConnection(host, port)
        sock = socket.create_connection((found[0], port), CONNECT_TIMEOUT)
        try:
            sock.settimeout(self._config.limits.fetch_timeout)
            self._uses(sock)
            if secure:
                context = tls_context(self._config.ca_file, self._config.relax_x509)
                sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
                self._uses(sock)
                sock.do_handshake()
            connection.sock = sock
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request("GET", urllib.parse.quote(target, safe="/%?=&;:@!$'()*+,~"), headers={
                "User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"})
            with connection.getresponse() as response:
                body = response.read(MAX_FETCHED + 1) if response.status == 200 else b""
                if len(body) > MAX_FETCHED:
                    raise self.refusal("is larger than %.1f MB" % (MAX_FETCHED / 1e6))
                if body and response.length:
                    raise self.refusal("broke off in the middle")
                return response.status, response.getheader("Location"), body
        finally:
            connection.close()
            sock.close()


class ImageFetcher:
    """Fetches images for the client.  `permit` judges addresses; tests may replace it."""

    def __init__(self, config: Config, permit: Callable[[str], bool] = is_public) -> None:
        self._config, self.permit = config, permit

    def fetch(self, url: str, client: Client) -> tuple[str, str]:
        """Media type and base64 of the image at `url`.  Raises InvalidRequest, ClientGone."""
        download, timeout = Download(url, self._config, self.permit), self._config.limits.fetch_timeout
        try:
            download.start()
            client.wait(Wait(download.ended, timeout))
        except UpstreamTimeout:
            raise download.refusal("took longer than %g seconds" % timeout) from None
        finally:
            download.give_up()
            download.ended.close()
        if isinstance(download.outcome, Exception):
            raise download.outcome
        return download.outcome


# ---- Exchange ----------------------------------------------------------------------------------------
# One request to Claude and its answer, with corrections, pauses and counting; and the gateway that it belongs to.

MOST_PAUSES = 8                                     # streams of one answer that Claude interrupts (pause_turn)


@dataclasses.dataclass
class Record:
    """What the log shows of one request."""
    method: str = ""
    path: str = ""
    client: str = ""
    tool: str = "-"
    started: float = dataclasses.field(default_factory=time.monotonic)
    status: int = 0
    asked: str = ""
    used: str = ""
    stream: bool = False
    first_byte_ms: Optional[int] = None
    total_ms: int = 0
    input_tokens: Optional[int] = None
    cached_tokens: int = 0
    cached_percent_of_all: int = 0                  # of all requests since the start
    output_tokens: int = 0
    request_id: str = ""
    changes: str = ""
    error: str = ""
    error_code: str = ""
    route: str = "other"
    owner: str = ""                                 # the beginning of the digest of the client's key
    cost_usd: Optional[float] = None                # by list prices, where the model has one
    time: float = 0.0                               # of its end


@dataclasses.dataclass
class Incoming:
    """A request as an endpoint sees it: checked by the HTTP server, its body parsed."""
    body: dict
    argument: str = ""                              # what stands behind /models/
    owner: str = ""                                 # digest of the client's key: memories are not shared
    call: UpstreamCall = dataclasses.field(default_factory=UpstreamCall)
    held: List[Callable[[], Any]] = dataclasses.field(default_factory=list)     # called when all is over
    record: Record = dataclasses.field(default_factory=Record)
    surrogates_replaced: bool = False
    headers: Dict[str, str] = dataclasses.field(default_factory=dict)      # for the native pass-through
    query: str = ""


@dataclasses.dataclass
class Reply:
    """What an endpoint answers: a body, or the steps of a stream."""
    body: Any = None
    headers: Dict[str, str] = dataclasses.field(default_factory=dict)
    steps: Optional[Iterator[Any]] = None           # with lists of events that arrived together, or Claude's own bytes
    event_bytes: Callable[[dict], bytes] = data_event
    closing: bytes = b""                            # ends a stream that did not fail
    failure: Callable[[GatewayError], List[dict]] = lambda failure: [failure.body()]
    idle_comments: bool = True                      # may go in between: Claude's own bytes stay as they are
    raw: Optional[bytes] = None                     # a body that is not JSON


class Gateway:
    """One gateway: its configuration, the way to Claude, and all that it remembers.
    `Gateway(Config(anthropic_api_key="..."))` is enough; `Service(gateway)` puts it on a port."""

    def __init__(self, config: Config, credential: Credential | None = None) -> None:
        self.config, self._configured_secrets = config, list(filter(None, config.secrets()))
        self.names = tuple(map(str.lower, ("host.docker.internal", *config.hosts, *config.allow_host)))
        self.instance_id = secrets.token_hex(8)
        self.upstream = Upstream(config, self.instance_id)
        self.upstream.credential = credential or credential_from_config(config, self.upstream.post_json)
        self.images = ImageFetcher(config)
        self.models = ModelList(self.upstream.models, config.alias)
        self.lessons = Lessons()
        self.answers = Answers()
        self.responses = StoredResponses()
        self.counters = Counters()
        self.usage = Usage(config.usage_file, config.limits, config.budget)
        self.tls_reported = threading.Event()
        self.upstream.on_headers = self.counters.take_limits
        self.failed_keys = FailedKeys()
        self.body_budget = Capacity(config.limits.max_bodies)
        self.running = Capacity(config.limits.max_requests)
        self.event_loop = EventLoop()

    def secrets(self) -> list[str]:
        """Every secret known now, for redaction."""
        credential = self.upstream.credential
        return [*self._configured_secrets, *(credential.secrets() if credential else ())]

    def check_spending(self, key: str, model: Model, speed: Any) -> None:
        """Raises Refused where a budget of this client key, or the plan, is used up."""
        for usd, period in self.config.budget:
            self.usage.check(key, model, speed, usd, period)
        for limit in limits_from_headers(self.counters.limit_headers, time.time()) if self.config.plan_only else ():
            if limit["used"] >= 1 and not limit["over"] and limit["resets_at"] and limit["window"] not in PER_MINUTE:
                raise exhausted("--plan-only: the plan's window of %s is used up." % limit["title"], limit["resets_at"])

    def close(self) -> None:
        self.event_loop.close()
        self.usage.close()
        if self.upstream.credential:
            self.upstream.credential.close()
        self.upstream.close()


Translate = Callable[[Model, Sequence[dict], bool, Callable[[], Recall]], Translation]


class Exchange:
    """One request to Claude and the answer.  A refused request is corrected and sent again when the refusal says how
    (`_corrected`), for each reason once."""

    def __init__(self, gateway: Gateway, incoming: Incoming, model: Model, translate: Translate) -> None:
        self._gateway, self._incoming, self.call = gateway, incoming, incoming.call
        self._translate_body = translate
        self._known = gateway.lessons.apply(model)
        self._lesson: Optional[dict] = None
        self._thinking_refused = False
        self._for_once: Dict[str, bool] = {}        # what the model cannot do of this one request
        self._left_out = ""                         # the path of a file that Claude refused
        self._images: Dict[str, Tuple[str, str]] = {}
        self._inline = ""                           # Claude's message, once images by address have been refused
        self._reply: Optional[UpstreamReply] = None
        self._headers: Dict[str, str] = {}
        self._counted = False                       # the tokens of this answer
        self.assembler = MessageAssembler()
        self.translation: Translation
        self.events: PlannedEvents                  # of the accepted request
        gateway.usage.running[self._cost_so_far] = incoming.record.owner
        incoming.held += [functools.partial(gateway.usage.running.pop, self._cost_so_far), self.close]

    def open(self) -> None:
        """Sends the request until Claude accepts it; returns when the answer begins.  Raises GatewayError."""
        while True:
            self.translation = self.translate()
            request, changes = self.translation.request, self.translation.changes
            if self._gateway.config.strict and changes.reported:
                raise InvalidRequest("--strict: not everything can be passed on as it is: %s." % changes,
                                     next(iter(changes.reported))[1], "strict")
            self._gateway.check_spending(self._incoming.record.owner, self._known, request.get("speed"))
            try:
                self._send(request)
            except ClaudeError as refusal:
                if not self._corrected(refusal):
                    raise explained(refusal, self.translation, self._gateway.models.catalog()) from None
                LOG.info("corrected and sent again after: %s", refusal)
                continue
            if self._lesson:
                self._gateway.lessons.learn(self._known, self._lesson)
            self.events = PlannedEvents(self.translation.plan, self.assembler)
            if self._thinking_refused:              # nothing that --strict could prevent
                changes.add("dropped", "thinking", "Claude refused it")
            self._incoming.record.changes = str(changes) if changes.reported else ""
            if changes.ignored:
                LOG.debug("without effect on the answer: %s", ", ".join(changes.ignored))
            return

    def headers(self) -> dict[str, str]:
        """The headers of the reply: what Claude's answer and the translation have to tell."""
        headers, changes = headers_from_claude(self._headers), self.translation.changes
        return dict(headers, **{CHANGES_HEADER: changes.header()}) if changes.reported else headers

    def batches(self, render: Render) -> Iterator[Any]:
        """Steps with what `render` makes of the events that arrived together; `assembler` sees them first.  An
        answer that Claude interrupts (pause_turn) is continued, as no OpenAI client could."""
        for pause in range(MOST_PAUSES + 1):
            yield from self._batches_of_stream(render)
            message = self.assembler.message
            no_summary = message["stop_reason"] == "compaction" and not any(
                block.get("content") for block in message["content"])
            if not no_summary and message["stop_reason"] != "pause_turn" or pause == MOST_PAUSES:
                break
            yield [], NEEDS_THREAD
            self._continue()
        self._count_tokens()
        model_id = message["model"]
        if "fallbacks" in self.translation.request and model_id != self._known.id:
            self.translation.changes.add("changed", "model", "refused by %s, answered by %s" % (
                self._known.id, model_id))
            self._incoming.record.used, self._incoming.record.changes = model_id, str(self.translation.changes)
        call_ids = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
        if call_ids:
            self._gateway.answers.remember(self._incoming.owner, self._known.id, call_ids,
                                           self.translation.request.get("tools", ()), lost_blocks(message["content"]))
        if self._reply and self._reply.framing.done:    # its connection is free before the client can want another
            self.close()

    def close(self) -> None:
        """Ends the upstream call, whether it was over or not."""
        reply, self._reply = self._reply, None
        if reply:
            reply.close(answered=self.assembler.done)
        self._count_tokens()                        # also of an answer that nobody waited for

    def translate(self) -> Translation:
        """The request as it would be sent now."""
        translation = self._translated(self._lesson or {})
        media = media_in(translation.request["messages"])
        for path, block, _ in media if self._left_out else ():
            if path == self._left_out:
                translation.changes.add("changed", path, "to a note: Claude refused the file")
                become_note(block)
        if media:
            self._inline_images(media, translation.changes)
        return translation

    def _translated(self, lesson: dict) -> Translation:
        """The request for the model as known with a lesson, images by address still by their address."""
        credential = self._gateway.upstream.credential
        lesson = dict(lesson, **self._for_once)
        model = replace(self._known, **lesson) if lesson else self._known
        recall = functools.partial(self._gateway.answers.recall, self._incoming.owner, self._known.id)
        translation = self._translate_body(model, credential.preamble if credential else (),
                                           not self._gateway.config.no_cache, recall)
        names = self._gateway.config.fallback
        fallbacks = fallbacks_for(model, names, self._gateway.models.catalog()) if names else None
        if fallbacks and translation.request["max_tokens"] and "compaction" not in translation.request:
            translation.request["fallbacks"] = fallbacks
        if self._incoming.surrogates_replaced:
            translation.changes.add("repaired", "lone_surrogates", "replaced by U+FFFD")
        return translation

    def _inline_images(self, media: list[tuple[str, dict, bool]], changes: Changes) -> None:
        """Fetches the images that Claude cannot, as long as they fit into a request and the client is there."""
        size = 0
        for path, block, old in media:
            if has_address(block) and (self._inline or block["source"]["url"].lower().startswith("http:")):
                self.call.client.pause(0)           # a client that has left wants no more of them
                try:
                    block["source"] = self._image_by_bytes(block["source"]["url"])
                    size += len(block["source"]["data"])
                except InvalidRequest as failure:
                    if not old:
                        raise
                    changes.add("changed", path, "to a note: %s" % failure)
                    become_note(block)
                if size > MAX_UPSTREAM_BODY:
                    raise Refused(413, "request_too_large", "The images by address have more than 32 MB together; "
                                  "Claude accepts up to 32 MB in one request.")

    def _image_by_bytes(self, url: str) -> dict:
        """The source of an image, by its bytes instead of its address."""
        try:
            if url not in self._images:
                self._images[url] = self._gateway.images.fetch(url, self.call.client)
        except InvalidRequest as failure:
            why = " It was fetched here because Claude had answered: " + self._inline if self._inline else ""
            raise failure.reworded(str(failure) + why) from failure
        media_type, data = self._images[url]
        return {"type": "base64", "media_type": media_type, "data": data}

    def _send(self, request: dict) -> None:
        body = messages_request_json(request)
        LOG.debug("to Claude: %s", request)
        self._reply = self._gateway.upstream.messages(body, self.call, betas_for(request))
        self._headers = self._reply.headers
        self._incoming.record.request_id = self._headers.get("request-id", "")

    def _corrected(self, refusal: ClaudeError) -> bool:
        """Whether something about the request was changed that the refusal names."""
        if refusal.upstream_status != 400 or refusal.code in FINAL_CODES | {"context_length_exceeded"}:
            return False
        message, messages = str(refusal), self.translation.request["messages"]
        marks = [mark for each in messages for mark in thinking_marks(each["content"]) if mark]
        if ABOUT_THINKING.match(message) and marks:
            self._gateway.answers.refuse(self._incoming.owner, marks)
            self._thinking_refused = True
            return True
        for ability in ("strict_tools", "structured_outputs") if ABOUT_COMPILING.search(message) else ():
            if ability not in self._for_once and self._matters({ability: False}):
                self._for_once[ability] = False
                return True
        if "compaction" not in self._for_once and COMPACTION_BETA in betas_for(self.translation.request) and \
                ABOUT_COMPACTION.search("%s %s" % (refusal.error_code, refusal)):
            self._for_once["compaction"] = False
            return True
        lesson = lesson_from_refusal(self._known, refusal) if self._lesson is None else None
        if lesson and self._matters(lesson):
            self._lesson = lesson
            return True
        media = media_in(messages)
        if not self._inline and any(has_address(block) for _, block, _ in media):
            self._inline = message
            return True
        named = ABOUT_BLOCK.search(message)
        path = named.group().replace(".tool_result", "") if named else ""
        if not self._left_out and any(path == of_block and old for of_block, _, old in media):
            self._left_out = path
            return True
        return False

    def _matters(self, lesson: dict) -> bool:
        """Whether a lesson would make another request of this one; if not, the refusal means something else."""
        return self._translated(lesson).request != self._translated({}).request

    def _cost_so_far(self) -> float:
        cost = None if self._counted else cost_of(self._known, self.assembler.message.get("usage") or {})
        return cost[0] if cost else 0.0

    def _count_tokens(self) -> None:
        if self.assembler.message and not self._counted:
            self._counted = True
            message = self.assembler.whole()
            LOG.debug("from Claude: %s", message)
            model = self._known
            if "fallbacks" in self.translation.request:
                model = self._gateway.models.catalog().models.get(message["model"]) or Model(message["model"])
            record_usage(self._gateway, self._incoming.record, model, message["usage"])

    def _batches_of_stream(self, render: Render) -> Iterator[Any]:
        for events, wait in self._event_batches():
            rendered: List[dict] = []
            try:
                for event in events:
                    self.assembler.feed(event)
                    rendered += render(event) if render else ()
                    if self.assembler.done:
                        break
            except GatewayError:
                yield rendered, None                # what came before the failure is the client's
                raise
            yield rendered, None if self.assembler.done else wait
            if self.assembler.done:
                return
        raise UpstreamFault("The upstream ended its answer without message_stop.")

    def _event_batches(self) -> Iterator[Any]:
        """Events as they arrive, also when the upstream answers in JSON."""
        assert self._reply
        if not self._reply.is_stream:
            yield [], NEEDS_THREAD
            yield events_from_body(self._reply.read()), None
            return
        # who asks for obfuscation wants to see every delta
        decoder = EventDecoder(value_in(self._incoming.body, "stream_options", "include_obfuscation") is not True)
        for piece, wait in self._reply.pieces():
            yield decoder.feed(piece), wait
        yield decoder.close(), None

    def _continue(self) -> None:
        """Sends an interrupted answer back unchanged, for Claude to go on with; or asks again for a summary."""
        request = self.translation.request
        content = blocks_for_claude(self.assembler.message["content"])
        messages = request["messages"] + [{"role": "assistant", "content": content}]
        if self.assembler.message["stop_reason"] == "compaction":
            self._for_once["compaction"] = False
            request = self.translate().request
            messages = request["messages"]
        if self._reply:
            self._reply.close(answered=True)
        self.assembler.resume()
        if self._incoming.record.stream:
            self.call.may_retry = False             # the client has begun to read
        self._send(dict(request, messages=messages))


def betas_for(request: dict) -> list[str]:
    """The beta features that a request makes use of."""
    compacts = "compaction" in request or request["messages"][0]["content"][0]["type"] == "compaction"
    features = ((FAST_MODE_BETA, "speed" in request), (FALLBACK_BETA, "fallbacks" in request),
                (COMPACTION_BETA, compacts))
    return [beta for beta, used in features if used]


def fallbacks_for(model: Model, names: Sequence[str], catalog: Catalog) -> Any:
    """`fallbacks` of a request, as --fallback says; None where the model does not have them."""
    if not model.fallbacks:
        return None
    if names[0] == "default":
        return "default"
    ids = dict.fromkeys(catalog.resolve(name).id for name in names)
    return [{"model": model_id} for model_id in ids if model_id != model.id] or None


def record_usage(gateway: Gateway, record: Record, model: Model, usage: dict) -> None:
    """Puts the tokens of one answer into the log, the status page and the metrics."""
    counts = {kind: count_of(usage.get(name)) for kind, name in TOKEN_KINDS.items()}
    cost = cost_of(model, usage)
    figures: dict = dict(counts, usd=cost[0]) if cost else dict(counts, without_price=1)
    gateway.usage.add(record.tool, model.id, record.owner, dict(figures, requests=int(record.input_tokens is None)))
    record.input_tokens = (record.input_tokens or 0) + prompt_tokens(counts)
    record.cached_tokens += counts["cache_read"]
    record.output_tokens += counts["output"]            # a legacy completion of several prompts has several answers
    if cost:
        figures["saved_usd"], record.cost_usd = cost[1], round((record.cost_usd or 0) + cost[0], 6)
    record.cached_percent_of_all = gateway.counters.add_tokens(model.id, figures)


def media_in(messages: list[dict]) -> list[tuple[str, dict, bool]]:
    """Every image and document: its path as Claude names it, its block, and whether it stands in a tool result or an
    earlier turn, where the client cannot take it back."""
    newest = max([at for at, message in enumerate(messages) if message["role"] == "user"])
    blocks: list[tuple[str, dict, bool]] = []
    for at, message in enumerate(messages):
        for place, block in enumerate(message["content"]):
            if block["type"] != "text":
                path, inner = "messages.%d.content.%d" % (at, place), listed(block.get("content"))
                blocks.append((path, block, at < newest))
                blocks += [("%s.content.%d" % (path, within), each, True) for within, each in enumerate(inner)]
    return [entry for entry in blocks if entry[1]["type"] in ("image", "document")]


def has_address(block: dict) -> bool:
    """Whether this is an image that is given by its address."""
    return block["type"] == "image" and block["source"]["type"] == "url"


def become_note(block: dict) -> None:
    """Turns a block into a note that says what stood there."""
    for name in set(block) - {"cache_control"}:
        del block[name]
    block.update(type="text", text=LEFT_OUT)


def events_from_body(body: bytes) -> list[dict]:
    """The events of an answer that came without saying that it is a stream: JSON, or a stream after all."""
    if re.match(rb"(\xef\xbb\xbf)?\s*(event|data|id|retry)?:", body):
        decoder = EventDecoder()
        return [*decoder.feed(body), *decoder.close()]
    message = json_object_from(body)
    if message.get("type") == "error" and isinstance(message.get("error"), dict):
        raise ClaudeError(200, message["error"])    # in a 200, but an error like any other
    if not isinstance(message.get("content"), list):
        raise UpstreamFault("The upstream answered with JSON that is not a message.")
    return events_from_message(message)


def explained(refusal: ClaudeError, translation: Translation, catalog: Catalog) -> GatewayError:
    """A refusal in terms of what the client sent: tools by their names, models with the nearest ones."""
    message, request = str(refusal), translation.request
    match = ABOUT_TOOL.search(message)
    if match and int(match.group(1)) < len(request.get("tools", ())):
        name = translation.plan.names.back(request["tools"][int(match.group(1))]["name"])
        return refusal.reworded("Tool %s: %s" % (json.dumps(name), message), param="tools")
    if refusal.claude_type == "not_found_error" and "model" in message:
        nearest = ", ".join(catalog.nearest(request["model"]))
        return refusal.reworded("%s (nearest: %s)" % (message, nearest), param="model", code="model_not_found")
    return refusal


# ---- Endpoints ---------------------------------------------------------------------------------------
# One short function per route: translate, call, translate back.  The only place that sees both sides.


def chat_completions(gateway: Gateway, incoming: Incoming) -> Reply:
    """POST /v1/chat/completions: a chat completion, or its stream."""
    options = optional(object_of, incoming.body.get("stream_options"), "stream_options", {})
    include_usage = optional(boolean_of, options.get("include_usage"), "stream_options.include_usage", False)
    history = with_history(gateway, incoming) if is_responses_body(incoming.body) else History(incoming)
    exchange = exchange_for(gateway, history.incoming, history.earlier)
    envelope = {"id": "chatcmpl-" + secrets.token_hex(12), "created": int(time.time())}
    if not incoming.record.stream:
        completion = chat_completion_from_message(whole_message(exchange), envelope, exchange.translation.plan)
        return Reply(completion, exchange.headers())
    exchange.open()
    stream = ChatStream(envelope, exchange.translation.plan, exchange.events.assembler, include_usage)
    return Reply(headers=exchange.headers(), steps=stream_steps(exchange, stream), event_bytes=stream.event_bytes,
                 closing=b"data: [DONE]\n\n")


def exchange_for(gateway: Gateway, incoming: Incoming, earlier: Sequence[dict] = (), compact: bool = False) -> Exchange:
    """The exchange for a body in either of OpenAI's shapes: some tools post one to the path of the other."""
    body, record = incoming.body, incoming.record
    asked, catalog = optional(text_of, body.get("model"), "model"), gateway.models.catalog()
    record.asked, record.stream = asked or "", optional(boolean_of, body.get("stream"), "stream", False)
    model = catalog.resolve(asked)
    record.used = model.id
    if asked and catalog.thinks(asked) and not {"thinking", "reasoning"} & set(body):
        body = dict(body, thinking={"type": "enabled"})
    translate = functools.partial(messages_request_from_responses, body, earlier=earlier, compact=compact) \
        if is_responses_body(body) else functools.partial(messages_request_from_chat, body)
    return Exchange(gateway, incoming, model, translate)


def is_responses_body(body: dict) -> bool:
    return "messages" not in body and ("input" in body or "instructions" in body)


def stream_steps(exchange: Exchange, stream: ChatStream) -> Iterator[Any]:
    """The steps of a stream, its last events included."""
    yield from exchange.batches(exchange.events.then(stream.feed))
    yield exchange.events.finish(stream.feed) + stream.finish(), None


def whole_message(exchange: Exchange) -> dict:
    """The whole answer: the request is sent, and what comes read to its end."""
    exchange.open()
    for _ in exchange.call.client.waited(exchange.batches(exchange.events.then(None))):
        pass
    exchange.events.finish(None)
    return exchange.events.assembler.whole()


class History(NamedTuple):
    """A request with the items that it means: those of the response it continues, and its own."""
    incoming: Incoming
    earlier: List[dict] = []
    given: List[dict] = []
    compact: bool = False                           # a compaction_trigger, which is no item itself, ended them
    tokens: int = 0                                 # of all that the last response read and wrote


def within_budget(gateway: Gateway, incoming: Incoming, stored: Any) -> Any:
    """What a request names, counted in the budget of all bodies: a few bytes can name megabytes, many times."""
    weight = 6 * len(client_json(stored))           # in memory
    if not gateway.body_budget.take(weight):
        raise busy("The gateway holds too many large requests at the moment.")
    incoming.held.append(functools.partial(gateway.body_budget.give, weight))
    return stored


def with_history(gateway: Gateway, incoming: Incoming) -> History:
    """The items that a Responses request names by `previous_response_id` and by references, in place of the names."""
    body, owner = incoming.body, incoming.owner
    if "messages" in body:
        return History(incoming)
    given = resolved_items(body.get("input"), lambda item_id: within_budget(
        gateway, incoming, gateway.responses.item(owner, item_id)))
    compact = bool(given) and given[-1].get("type") == "compaction_trigger"
    if compact:
        given.pop()
    for at, item in enumerate(given):
        kind = "msg" if "role" in item else "item"
        given[at] = dict(item, id=item.get("id") or "%s_%s" % (kind, secrets.token_hex(16)))
    incoming = replace(incoming, body=dict(body, input=given if body.get("input") is not None else None))
    response_id = body.get("previous_response_id")
    if response_id is None:
        return History(incoming, [], given, compact)
    stored = gateway.responses.get(owner, text_of(response_id, "previous_response_id"))
    if stored is None:
        raise invalid("previous_response_id", "no response %s is stored here (they are kept in memory only)." %
                      json.dumps(response_id), "previous_response_not_found")
    earlier = within_budget(gateway, incoming, [*stored[1], *stored[2]])
    return History(incoming, earlier, given, compact, count_in(stored[0], "usage", "total_tokens"))


def create_response(gateway: Gateway, incoming: Incoming) -> Reply:
    """POST /v1/responses: a response, or its stream of events."""
    history = with_history(gateway, incoming)
    incoming, body = history.incoming, history.incoming.body
    compact, name = history.compact, secrets.token_hex(16)
    first = [] if compact else compacted_first(gateway, history, "cmp_%s_0" % name)
    asked = replace(incoming, body=dict(body, input=[*history.given, *first])) if first else incoming
    exchange = exchange_for(gateway, asked, history.earlier, compact)
    exchange.open()
    envelope = response_envelope("resp_" + name, int(time.time()), body)
    stream = (CompactionStream if compact else ResponseStream)(
        envelope, exchange.translation.plan, exchange.events.assembler, listed(body.get("include")), first)
    steps = response_steps(gateway, history, exchange, stream)
    if incoming.record.stream:
        return Reply(headers=exchange.headers(), steps=steps, event_bytes=named_event, failure=stream.fail)
    for _ in incoming.call.client.waited(steps):
        pass
    return Reply(stream.response, exchange.headers())


def response_steps(gateway: Gateway, history: History, exchange: Exchange, stream: ResponseStream) -> Iterator[Any]:
    """The steps of a response, which is stored before its end is sent: a client may continue it at once."""
    body = history.incoming.body
    yield from exchange.batches(exchange.events.then(stream.feed))
    last_events = exchange.events.finish(stream.feed) + stream.finish(int(time.time()))
    if optional(boolean_of, body.get("store"), "store", True) and is_responses_body(body):
        yield [], NEEDS_THREAD                      # a long history takes a while to write down
        entries = since_compaction([("", item) for item in [*history.earlier, *history.given]])
        gateway.responses.put(history.incoming.owner, stream.response, [item for _, item in entries], stream.to_store)
    yield last_events, None


def compacted_first(gateway: Gateway, history: History, item_id: str) -> list[dict]:
    """The compaction item of a history longer than `context_management` allows; the last user messages stay."""
    body = history.incoming.body
    threshold = compaction_threshold(body)
    items = [*history.earlier, *history.given]
    kept = list(itertools.takewhile(lambda item: item.get("role") == "user", reversed(items)))[::-1]
    items = items[:len(items) - len(kept)]
    if not threshold or all(map(is_setting, items)) or items[-1].get("type") in COMPACTIONS:
        return []                                   # there is nothing to summarize
    # by the last response's usage, and about four bytes a token; else as Claude counts
    size = history.tokens and history.tokens + len(client_json(history.given)) // 4
    if not size and len(client_json(body)) // 2 > threshold:
        size = tokens_of_request(gateway, history)
    if size <= threshold:
        return []
    exchange = exchange_for(gateway, replace(history.incoming, body=dict(body, input=items)), compact=True)
    return [compaction_item(item_id, whole_message(exchange), kept)]


def compaction_threshold(body: dict) -> int:
    """`compact_threshold`, 0 where none is set."""
    management = body.get("context_management") or []
    for path, entry in () if isinstance(management, dict) else entries_of(management, "context_management"):
        one_of("compaction")(entry.get("type"), path + ".type")
        return optional(integer_of, entry.get("compact_threshold"), path + ".compact_threshold", 0)
    return 0


def compact_response(gateway: Gateway, incoming: Incoming) -> Reply:
    """POST /v1/responses/compact: the user's messages, and a compaction item that stands for them and all else."""
    history = with_history(gateway, incoming)
    exchange = exchange_for(gateway, history.incoming, history.earlier, compact=True)
    message = whole_message(exchange)
    name = secrets.token_hex(16)
    output = [listed_item(item) for item in [*history.earlier, *history.given] if item.get("role") == "user"]
    output.append(compaction_item("cmp_" + name, message))
    return Reply({"id": "resp_" + name, "object": "response.compaction", "created_at": int(time.time()),
                  "output": output, "usage": responses_usage(message["usage"])}, exchange.headers())


def stored_response(gateway: Gateway, incoming: Incoming) -> tuple[dict, list[dict], list[dict]]:
    stored = gateway.responses.get(incoming.owner, incoming.argument)
    if stored is None:
        raise Refused(404, "response_not_found", "No response %s is stored here." % json.dumps(incoming.argument))
    return stored


def get_response(gateway: Gateway, incoming: Incoming) -> Reply:
    return Reply(stored_response(gateway, incoming)[0])


def delete_response(gateway: Gateway, incoming: Incoming) -> Reply:
    stored_response(gateway, incoming)
    gateway.responses.remove(incoming.owner, incoming.argument)
    return Reply({"id": incoming.argument, "object": "response", "deleted": True})


def cancel_response(gateway: Gateway, incoming: Incoming) -> Reply:
    stored_response(gateway, incoming)
    raise InvalidRequest("Only a response created with background=true can be cancelled; there are none here.",
                         code="unsupported_value")


# What a list of input items may include, by OpenAI's reference; most of it is never here
INCLUDABLE = (ENCRYPTED_REASONING, SEARCH_SOURCES, "web_search_call.results", "file_search_call.results",
              "message.input_image.image_url", "computer_call_output.output.image_url",
              "code_interpreter_call.outputs", "message.output_text.logprobs")


def response_input_items(gateway: Gateway, incoming: Incoming) -> Reply:
    """GET /v1/responses/{id}/input_items, newest first unless `order` says otherwise."""
    query = urllib.parse.parse_qs(incoming.query)
    include = [one_of(*INCLUDABLE)(name, "include") for name in query.get("include", []) + query.get("include[]", [])]
    items = [listed_item(item, include) for item in stored_response(gateway, incoming)[1]]
    if one_of("asc", "desc")(query.get("order", ["desc"])[0], "order") == "desc":
        items.reverse()
    limit = integer_of(query.get("limit", ["20"])[0], "limit")
    if not 1 <= limit <= 100:
        raise invalid("limit", "expected 1 to 100.")
    ids, after = [item["id"] for item in items], query.get("after", [""])[0]
    if after and after not in ids:
        raise invalid("after", "no item %s is in this list." % json.dumps(after))
    start = ids.index(after) + 1 if after else 0
    page = items[start:start + limit]
    return Reply({"object": "list", "data": page, "first_id": page[0]["id"] if page else "",
                  "last_id": page[-1]["id"] if page else "", "has_more": start + limit < len(items)})


def count_input_tokens(gateway: Gateway, incoming: Incoming) -> Reply:
    """POST /v1/responses/input_tokens, by Claude's own count."""
    history = with_history(gateway, incoming)
    return Reply({"object": "response.input_tokens", "input_tokens": tokens_of_request(gateway, history)})


def tokens_of_request(gateway: Gateway, history: History) -> int:
    """The tokens of a request as Claude counts them."""
    incoming = history.incoming
    request = without(exchange_for(gateway, incoming, history.earlier).translate().request, "max_tokens", "stream",
                      "temperature", "top_p", "top_k", "stop_sequences", "metadata", "service_tier", "speed",
                      "fallbacks")
    reply = gateway.upstream.messages(messages_request_json(request), incoming.call, betas_for(request),
                                      "/v1/messages/count_tokens")
    incoming.held.append(reply.close)
    return count_in(json_object_from(reply.read()), "input_tokens")


def list_models(gateway: Gateway, incoming: Incoming) -> Reply:
    """GET /v1/models: every id and alias that a request may name."""
    entries = [model_entry(name, model) for name, model in catalog_for(gateway, incoming).names()]
    return Reply({"object": "list", "data": entries, "has_more": False,         # the last three are Anthropic's
                  "first_id": entries[0]["id"], "last_id": entries[-1]["id"]})


def one_model(gateway: Gateway, incoming: Incoming) -> Reply:
    """GET /v1/models/{id}, in any spelling that a request may use."""
    return Reply(model_entry(incoming.argument, catalog_for(gateway, incoming).resolve(incoming.argument)))


def catalog_for(gateway: Gateway, incoming: Incoming) -> Catalog:
    """The models that a caller may use: its own list where it brought an Anthropic key for this one call."""
    key = incoming.headers.get("x-api-key", "")
    if re.match(r"sk-ant-[\x21-\x7e]+\Z", key):
        try:
            return Catalog(gateway.upstream.models(key) or (), gateway.config.alias)
        except GatewayError as fault:
            LOG.info("no model list for the caller's key (%s): using the gateway's", fault)
    return gateway.models.catalog()


def health(gateway: Gateway, incoming: Incoming) -> Reply:
    """GET /health: no secrets, no key needed."""
    return Reply({"status": "ok", "version": VERSION})


# ---- Legacy completions ------------------------------------------------------------------------------
# OpenAI's older API, of a text that is continued: it becomes a chat turn that asks for it.

COMPLETION_SYSTEM = "Continue the text that the user sends, exactly from where it ends. Answer with the continuation"
INFILL_SYSTEM = "The user sends a text with a gap, marked <gap/>. Answer with what belongs into the gap"
ONLY_TEXT = " only: no comment, no repetition of the text, no code fence."


def completions(gateway: Gateway, incoming: Incoming) -> Reply:
    """POST /v1/completions: one or several texts continued, or the stream of that."""
    prompts = prompts_of(incoming.body)
    echoes = prompts if incoming.body.get("echo") else [""] * len(prompts)
    suffix = optional(text_of, incoming.body.get("suffix"), "suffix", "")
    chat = without(incoming.body, "prompt", "suffix", "echo", "best_of", "logprobs")
    system = {"role": "system", "content": (INFILL_SYSTEM if suffix else COMPLETION_SYSTEM) + ONLY_TEXT}
    texts = [prompt + "<gap/>" + suffix if suffix else prompt for prompt in prompts]
    replies = (chat_completions(gateway, replace(incoming, body=dict(
        chat, messages=[system, {"role": "user", "content": text}]))) for text in texts)
    first = next(replies)
    if first.steps is not None:
        return replace(first, event_bytes=data_event, steps=text_steps(itertools.chain([first], replies), echoes))
    whole = text_completion(first.body, echoes[0], 0)
    for at, reply in enumerate(replies, 1):
        whole["choices"] += text_completion(reply.body, echoes[at], at)["choices"]
        whole["usage"] = added_usage(whole["usage"], reply.body["usage"])
    return replace(first, body=whole)


def prompts_of(body: dict) -> list[str]:
    """`prompt`, a string or a list of them, not of token ids."""
    prompt = body.get("prompt")
    if prompt is None or prompt == []:
        raise InvalidRequest("prompt is required.", "prompt", "missing_required_parameter")
    prompts = [prompt] if isinstance(prompt, str) else list_of(prompt, "prompt")
    if len(prompts) > 128:                          # OpenAI accepts 2,048
        raise invalid("prompt", "at most 128 of them, as each is a call to Claude.")
    for name, most in (("best_of", 1), ("logprobs", 0)):
        if optional(integer_of, body.get(name), name, 0) > most:
            raise InvalidRequest("%s: Claude gives one answer, without log probabilities." % name, name,
                                 "unsupported_value")
    return [text_of(each, "prompt[%d]" % at) for at, each in enumerate(prompts)]


def text_steps(replies: Iterable[Reply], echoes: Sequence[str]) -> Iterator[Any]:
    """The steps of all answers, prompt by prompt; their usage is added up for the last chunk."""
    same: dict = {}                                 # id and time of the first chunk
    usage: dict = {}
    for at, reply in enumerate(replies):
        for step, wait in reply.steps or ():
            chunks = []
            for chunk in step:
                same = same or {"id": chunk["id"], "created": chunk["created"]}
                is_shown = any(choice["finish_reason"] or "content" in choice["delta"] for choice in chunk["choices"])
                if not chunk["choices"]:
                    usage = chunk["usage"] = added_usage(usage, chunk["usage"])
                    is_shown = at == len(echoes) - 1
                if is_shown:
                    chunks.append(text_completion(dict(chunk, **same), echoes[at], at))
            yield chunks, wait
        yield [], NEEDS_THREAD                      # for the call of the next prompt


def text_completion(chat: dict, echo: str, index: int) -> dict:
    """A chat completion, or a chunk of one, as a legacy completion; the prompt stands before its text."""
    choices = []
    for choice in chat["choices"]:
        part = choice.get("message") or choice["delta"]
        text = (echo if "role" in part else "") + (part.get("content") or "")
        choices.append({"text": text, "index": index, "logprobs": None, "finish_reason": choice["finish_reason"]})
    return dict(chat, id=re.sub("^chat", "", chat["id"]), object="text_completion", choices=choices)


# ---- Native pass-through -----------------------------------------------------------------------------
# Anthropic's own API for clients that speak it: with the gateway's credential, otherwise as it is.


def native_body(gateway: Gateway, incoming: Incoming) -> dict:
    """The client's body with its model's id and, where missing, the credential's system block and a cache mark."""
    body, record = dict(incoming.body), incoming.record
    record.asked, record.stream = text_of(body.get("model"), "model"), body.get("stream") is True
    record.used = body["model"] = gateway.models.catalog().resolve(record.asked).id
    credential = gateway.upstream.credential
    preamble = list(credential.preamble) if credential else []
    if preamble:
        system = body.get("system") or []
        blocks = [{"type": "text", "text": system}] if isinstance(system, str) else list_of(system, "system")
        is_there = text_in((blocks or [None])[0], "text") == preamble[0]["text"]
        body["system"] = blocks if is_there else preamble + blocks
    if record.route == "/messages" and not gateway.config.no_cache and not has_marks(body):
        body["cache_control"] = {"type": "ephemeral"}
    return body


def has_marks(value: Any) -> bool:
    """Whether a client set cache marks itself."""
    if isinstance(value, list):
        return any(map(has_marks, value))
    return isinstance(value, dict) and (isinstance(value.get("cache_control"), dict) or any(
        has_marks(value.get(name)) for name in ("tools", "system", "messages", "content")))


def native_call(gateway: Gateway, incoming: Incoming) -> Reply:
    """POST /v1/messages and /v1/messages/count_tokens: with the client's version and betas."""
    body, path = native_body(gateway, incoming), "/v1" + incoming.record.route
    betas = re.findall(r"(?:^|[\s,])(?!oauth-)([^\s,]+)", incoming.headers.get("anthropic-beta", ""))
    data = upstream_json(body)
    model = gateway.models.catalog().resolve(body["model"])
    if path == "/v1/messages":
        gateway.check_spending(incoming.record.owner, model, body.get("speed"))
    LOG.debug("to Claude: %s", body)
    beta_query = "?beta=true" if re.search(r"(^|&)beta=true(&|$)", incoming.query) else ""
    reply = gateway.upstream.messages(data, incoming.call, betas, path + beta_query, {
        name: incoming.headers[name] for name in ("anthropic-version", "anthropic-workspace-id")
        if incoming.headers.get(name)})
    incoming.record.request_id = reply.headers.get("request-id", "")
    headers = headers_for_anthropic(reply.headers)
    headers["content-type"] = printable(reply.headers.get("content-type", "application/json"))
    passing = PassingUsage(reply.is_stream)

    def cost_so_far() -> float:
        cost = cost_of(model, passing.usage())
        return cost[0] if cost else 0.0

    def finish() -> None:
        reply.close()
        usage = passing.usage()
        if usage:
            record_usage(gateway, incoming.record, model, usage)
    gateway.usage.running[cost_so_far] = incoming.record.owner
    incoming.held += [functools.partial(gateway.usage.running.pop, cost_so_far), finish]
    return Reply(headers=headers, steps=passing.steps(reply.pieces()), idle_comments=False, event_bytes=named_event,
                 failure=lambda failure: [failure.for_anthropic()[2]])


class PassingUsage:
    """Reads the token counts of a native answer from the bytes that pass by, as far as it can."""

    def __init__(self, is_stream: bool) -> None:
        self._decoder = EventDecoder(joining=True) if is_stream else None
        self._usage: dict = {}
        self._body = bytearray()

    def steps(self, steps: Iterator[Any]) -> Iterator[Any]:
        """The same steps, whose bytes are read in passing."""
        for step in steps:
            if self._decoder:
                with suppress(UpstreamFault):
                    self._note(self._decoder.feed(step[0]))
            else:
                self._body += step[0][:MAX_UPSTREAM_BODY - len(self._body)]
            yield step

    def _note(self, events: Iterable[dict]) -> None:
        for event in events:
            for usage in (value_in(event, "message", "usage"), event.get("usage")):
                if isinstance(usage, dict):
                    self._usage.update({name: value for name, value in usage.items() if value is not None})

    def usage(self) -> dict:
        """What was counted so far, {} for an answer without any."""
        if self._body:
            with suppress(ValueError):
                self._note([{"usage": value_in(json_within_bounds(self._body.decode(), LENIENT_JSON), "usage")}])
        return self._usage


# ---- Tool settings -----------------------------------------------------------------------------------
# What to write into which tool: printed by `setup NAME`, shown by the page, passed on by `run`, never written by us.

FORM = "Base URL: BASE\nAPI key:  KEY\nModel:    MODEL"


class Setup(NamedTuple):
    """`where`: where they go; `text`: the settings themselves, with the placeholders of `filled`."""
    title: str
    where: str
    text: str = FORM
    path_form: Callable[[str], str] = str           # how a path is written there
    between: str = " "                              # two arguments of START


def library(title: str, name: str, address: str, others: str, model: str = 'model="MODEL"') -> Setup:
    """The settings of a library, which gets the base URL as its argument `address`."""
    module, _, name = name.rpartition(".")
    return Setup(title, "%s(%s=...)" % (name, address), 'from %s import %s\nllm = %s(%s, %s="BASE", '
                        'api_key="KEY"%s)' % (module, name, name, model, address, others))


CONTAINER = """\
In a container the base URL is http://host.docker.internal:PORT/v1. On Linux that name requires
docker run --add-host=host.docker.internal:host-gateway, and a gateway that containers can reach:
CLAUDE_GATEWAY_API_KEY=YOUR-GATEWAY-KEY claude-gateway START --host localhost --host 172.17.0.1"""
IN_CONTAINER = "%s\n\n%s" % (FORM, CONTAINER)
OPENCODE = """\
{ "model": "gateway/MODEL", "provider": { "gateway": { "npm": "@ai-sdk/openai-compatible", "name": "Claude Gateway",
    "options": { "baseURL": "BASE", "apiKey": "KEY" },
    "models": { "MODEL": { "name": "Claude", "limit": { "context": 1000000, "output": 128000 } } } } } }"""

TOOL_SETTINGS: Dict[str, Setup] = {
    "openai": Setup("OpenAI SDKs", "base_url / baseURL, or OPENAI_BASE_URL", """\
export OPENAI_BASE_URL=BASE OPENAI_API_KEY=KEY
# or in code: OpenAI(base_url="BASE", api_key="KEY") / new OpenAI({ baseURL: "BASE", apiKey: "KEY" }); model: MODEL"""),
    "langchain": library("LangChain", "langchain_openai.ChatOpenAI", "base_url", ", stream_usage=True"),
    "llamaindex": library("LlamaIndex", "llama_index.llms.openai_like.OpenAILike", "api_base",
                          ",\n    is_chat_model=True, is_function_calling_model=True, context_window=1000000"),
    "ai-sdk": Setup("Vercel AI SDK", "createOpenAI({ baseURL })", """\
import { createOpenAI } from "@ai-sdk/openai";
const openai = createOpenAI({ baseURL: "BASE", apiKey: "KEY" });
// openai("MODEL") uses the Responses API, openai.chat("MODEL") chat completions; both work"""),
    "openai-agents": Setup("OpenAI Agents SDK", "OPENAI_BASE_URL", """\
export OPENAI_BASE_URL=BASE OPENAI_API_KEY=KEY OPENAI_AGENTS_DISABLE_TRACING=1
# Python: Agent(name="agent", model="MODEL") / JavaScript: new Agent({ name: "agent", model: "MODEL" })"""),
    "crewai": library("CrewAI", "crewai.LLM", "base_url", "", 'model="openai/MODEL_ID"'),
    "dspy": library("DSPy", "dspy.LM", "api_base", "", '"openai/MODEL_ID"'),
    "smolagents": library("smolagents", "smolagents.OpenAIServerModel", "api_base", "", 'model_id="MODEL"'),
    "autogen": library("AutoGen", "autogen_ext.models.openai.OpenAIChatCompletionClient", "base_url",
                       ',\n    model_info={"vision": True, "function_calling": True, "json_output": True,'
                       '\n                "structured_output": True, "family": "unknown"}', 'model="MODEL_ID"'),
    "agno": library("Agno", "agno.models.openai.like.OpenAILike", "base_url", "", 'id="MODEL"'),
    "mastra": Setup("Mastra", "in an Agent", 'model: { id: "gateway/MODEL", url: "BASE", apiKey: "KEY" }'),
    "browser-use": library("browser-use", "browser_use.ChatOpenAI", "base_url", ""),
    "promptfoo": Setup("promptfoo", "promptfooconfig.yaml", """\
providers: [{ id: "openai:chat:MODEL", config: { apiBaseUrl: BASE, apiKey: KEY } }]"""),
    "aider": Setup("Aider", "--openai-api-base, model openai/...", """\
export OPENAI_API_KEY=KEY
aider --openai-api-base BASE --model openai/MODEL_ID --edit-format diff \\
  --weak-model openai/haiku --no-show-model-warnings"""),
    "claude-code": Setup("Claude Code", "ANTHROPIC_BASE_URL (Anthropic's own API)",
                         "export ANTHROPIC_BASE_URL=ORIGIN ANTHROPIC_AUTH_TOKEN=KEY\nclaude"),
    "codex": Setup("Codex CLI", "~/.codex/config.toml", """\
model = "claude-opus-5-5"
model_provider = "gateway"
model_providers.gateway.name = "gateway"
model_providers.gateway.base_url = "BASE"
model_providers.gateway.wire_api = "responses"
ENV_KEY"""),
    "opencode": Setup("opencode", "opencode.json", OPENCODE),
    "goose": Setup("Goose", "OPENAI_HOST and OPENAI_BASE_PATH", """\
export GOOSE_PROVIDER=openai GOOSE_MODEL=MODEL
export OPENAI_HOST=ORIGIN OPENAI_BASE_PATH=v1/chat/completions OPENAI_API_KEY=KEY"""),
    "qwen-code": Setup("Qwen Code", "OPENAI_BASE_URL and OPENAI_MODEL", """\
export OPENAI_BASE_URL=BASE OPENAI_API_KEY=KEY OPENAI_MODEL=MODEL_ID
qwen --auth-type openai"""),
    "pi": Setup("pi", "~/.pi/agent/models.json", """\
{ "providers": { "gateway": { "baseUrl": "BASE", "api": "openai-completions", "apiKey": "KEY",
    "models": [{ "id": "MODEL", "reasoning": true, "input": ["text", "image"], "contextWindow": 1000000,
                 "maxTokens": 128000 }] } } }"""),
    "cline-cli": Setup("Cline CLI", "a shell", "cline auth openai --apikey KEY --baseurl BASE --modelid MODEL"),
    "openhands": Setup("OpenHands", "custom model, base URL", FORM.replace("MODEL", "openai/MODEL_ID")),
    "mini-swe-agent": Setup("mini-swe-agent", "OPENAI_API_BASE, -m openai/...", """\
export OPENAI_API_BASE=BASE OPENAI_API_KEY=KEY MSWEA_COST_TRACKING=ignore_errors MSWEA_CONFIGURED=true
mini -m openai/MODEL"""),
    "llm": Setup("llm", "extra-openai-models.yaml", """\
# this file is in the folder that this prints: dirname "$(llm logs path)"
- { model_id: claude, model_name: MODEL, api_base: BASE, supports_tools: true, supports_schema: true, vision: true }
# and the key, in a shell: llm keys set openai --value KEY"""),
    "cline": Setup("Cline", "API provider: OpenAI Compatible"),
    "roo-code": Setup("Roo Code", "API provider: OpenAI Compatible"),
    "kilo-code": Setup("Kilo Code", "kilo.json; in an editor, API provider: OpenAI Compatible", OPENCODE),
    "continue": Setup("Continue, Continue CLI (cn)", "~/.continue/config.yaml", """\
name: Claude Gateway
version: 1.0.0
schema: v1
models:
  - { name: Claude, provider: openai, model: MODEL, apiBase: BASE, apiKey: KEY,
      capabilities: [tool_use, image_input] }"""),
    "vscode": Setup("VS Code", "Custom Endpoint, chatLanguageModels.json", """\
[{ "name": "Claude Gateway", "vendor": "customendpoint", "apiKey": "KEY", "apiType": "chat-completions",
   "models": [{ "id": "MODEL", "name": "Claude", "url": "BASE/chat/completions", "toolCalling": true, "vision": true,
     "maxInputTokens": 1000000, "maxOutputTokens": 128000 }] }]"""),
    "xcode": Setup("Xcode", "Settings, Intelligence, Add a Model Provider", """\
Locally Hosted, port PORT; with a key: Internet Hosted, URL ORIGIN, API key header Authorization: Bearer KEY"""),
    "zed": Setup("Zed", "settings.json, language_models", """\
{ "language_models": { "openai_compatible": { "Gateway": { "api_url": "BASE", "available_models": [
    { "name": "MODEL", "max_tokens": 1000000, "max_output_tokens": 128000,
      "capabilities": { "tools": true, "images": true, "parallel_tool_calls": true } }] } } } }
// the key goes into the environment: GATEWAY_API_KEY=KEY"""),
    "jetbrains": Setup("JetBrains AI Assistant", "Settings, AI Assistant, OpenAI-compatible provider"),
    "cursor": Setup("Cursor", "cannot work with a local address", """\
Cursor sends its requests from its own servers, which cannot reach this machine. It would need a public https address
in front of the gateway, with a key (CLAUDE_GATEWAY_API_KEY); think twice before opening your credential so."""),
    "open-webui": Setup("Open WebUI", "Admin settings, Connections, OpenAI API, add a connection", IN_CONTAINER),
    "librechat": Setup("LibreChat", "librechat.yaml", re.sub("(?m)^", "# ", CONTAINER) + """
endpoints: { custom: [{ name: Claude, apiKey: KEY, baseURL: BASE, models: { default: [MODEL], fetch: true },
                        titleConvo: true, titleModel: haiku }] }"""),
    "n8n": Setup("n8n", "Credentials, OpenAI; the model by its id in the OpenAI Chat Model node", IN_CONTAINER),
    "home-assistant": Setup("Home Assistant", "Settings, Devices & services, Add integration, LiteLLM", """\
URL: http://ADDRESS-OF-THIS-MACHINE:PORT/v1
API key: YOUR-GATEWAY-KEY
and a gateway that Home Assistant (2026.6 or newer) can reach:
CLAUDE_GATEWAY_API_KEY=YOUR-GATEWAY-KEY claude-gateway START --host 0.0.0.0
The integration "OpenAI Conversation" has no setting for the address and cannot be used."""),
    "obsidian": Setup("Obsidian plugins", "provider: OpenAI compatible, or custom", FORM + """
If the plugin reports a network or CORS error: claude-gateway START --cors-origin app://obsidian.md"""),
}
# Name -> the heading above it, where a list is grouped
TOOL_GROUPS = {"openai": "Libraries", "aider": "Terminals", "cline": "Editors", "open-webui": "Apps",
               "systemd": "Service files"}

SERVICE_FILES = {
    "systemd": Setup("Linux: a service of your account", "~/.config/systemd/user/claude-gateway.service", """\
# then: systemctl --user daemon-reload && systemctl --user enable --now claude-gateway && loginctl enable-linger
[Unit]
Description=Claude Gateway
[Service]
ExecStart="PYTHON" "FILE" START
# keys go into this file, mode 600: ANTHROPIC_API_KEY=... if no login is stored, CLAUDE_GATEWAY_API_KEY=... for clients
EnvironmentFile=-%h/.config/claude-gateway/environment
Restart=on-failure
RestartPreventExitStatus=2 3
TimeoutStopSec=35
NoNewPrivileges=yes
PrivateTmp=yes
[Install]
WantedBy=default.target""", lambda path: re.sub(r'[\\"]', r"\\\g<0>", path).replace("%", "%%").replace("$", "$$")),
    "launchd": Setup("macOS: an agent of your account", "~/Library/LaunchAgents/local.claude-gateway.plist", """\
<?xml version="1.0" encoding="UTF-8"?>
<!-- then: launchctl bootstrap gui/$(id -u) ~/Library/LaunchAgents/local.claude-gateway.plist
     to stop it: launchctl bootout gui/$(id -u)/local.claude-gateway -->
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict>
  <key>Label</key><string>local.claude-gateway</string>
  <key>ProgramArguments</key>
  <array><string>PYTHON</string><string>FILE</string><string>START</string></array>
  <!-- keys, if no login is stored or clients need one; then: chmod 600 this file
  <key>EnvironmentVariables</key>
  <dict><key>ANTHROPIC_API_KEY</key><string>...</string><key>CLAUDE_GATEWAY_API_KEY</key><string>...</string></dict> -->
  <key>RunAtLoad</key><true/>
  <key>KeepAlive</key><dict><key>SuccessfulExit</key><false/></dict>
  <key>ThrottleInterval</key><integer>60</integer>
  <key>StandardErrorPath</key><string>HOME/Library/Logs/claude-gateway.log</string>
</dict></plist>""", lambda path: path.replace("&", "&amp;").replace("<", "&lt;"), "</string><string>"),
    "windows": Setup("Windows: a task that runs when you sign in", "a PowerShell window", """\
# keys, if no login is stored or clients need one: setx ANTHROPIC_API_KEY ..., setx CLAUDE_GATEWAY_API_KEY ...
$action = New-ScheduledTaskAction -Execute 'PYTHONW' -Argument '"FILE" START'
$trigger = New-ScheduledTaskTrigger -AtLogOn -User "$env:USERDOMAIN\\$env:USERNAME"
$settings = New-ScheduledTaskSettingsSet -ExecutionTimeLimit 0 -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries
Register-ScheduledTask 'Claude Gateway' -Action $action -Trigger $trigger -Settings $settings
Start-ScheduledTask 'Claude Gateway'
# where that is denied: a shortcut in the start-up folder does the same
# $link = (New-Object -ComObject WScript.Shell).CreateShortcut("$([Environment]::GetFolderPath('Startup'))\\claude.lnk")
# $link.TargetPath = 'PYTHONW'; $link.Arguments = '"FILE" START'; $link.Save()""",
                     lambda path: path.replace("'", "''")),
    "docker": Setup("a Dockerfile", "Dockerfile", """\
# cp "FILE" . && docker build -t claude-gateway .
# docker run -p 127.0.0.1:PORT:PORT -e ANTHROPIC_API_KEY -e CLAUDE_GATEWAY_API_KEY claude-gateway
# In a container the gateway listens on all addresses, so it requires an API key (CLAUDE_GATEWAY_API_KEY).
FROM python:3-slim
COPY claude_gateway.py /
USER nobody
ENV CLAUDE_GATEWAY_HOST=0.0.0.0
EXPOSE PORT
HEALTHCHECK CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:PORT/health')"]
ENTRYPOINT ["python3", "/claude_gateway.py"]
CMD ["START"]""", between='", "'),
}

SETTINGS = dict(TOOL_SETTINGS, **SERVICE_FILES)


def setup_name(text: str) -> str:
    """The entry of a name or title: "Open WebUI" is open-webui.  Raises ArgumentTypeError."""
    plain = re.sub(r"[ _]+", "-", text.strip().lower())
    names = {tool.title.lower().replace(" ", "-"): name for name, tool in TOOL_SETTINGS.items()}
    names.update({name: name for name in SETTINGS})
    if plain in names:
        return names[plain]
    nearest = difflib.get_close_matches(plain, names, n=1)
    hint = "Did you mean %s? " % names[nearest[0]] if nearest else ""
    raise argparse.ArgumentTypeError("no settings for %s. %s`claude-gateway setup` lists all names." % (text, hint))


def filled(config: Config, path_form: Callable[[str], str] = str, between: str = " ") -> dict[str, str]:
    """The placeholders of the settings -> their values here."""
    python = sys.executable if own_file() or getattr(sys, "frozen", False) else "python3"
    origin = "http://localhost:%d" % config.port
    arguments = ["start"] if config.port == DEFAULT_PORT else ["start", "--port", str(config.port)]
    return {"BASE": origin + "/v1", "ORIGIN": origin, "PORT": str(config.port), "MODEL": "sonnet",
            "MODEL_ID": "claude-sonnet-5-5",        # for tools that look up its abilities
            "KEY": "YOUR-GATEWAY-KEY" if config.api_key else "none",
            "ENV_KEY": '# in the environment: OPENAI_API_KEY=YOUR-GATEWAY-KEY\n'
                       'model_providers.gateway.env_key = "OPENAI_API_KEY"' if config.api_key else "",
            "START": between.join(arguments), "PYTHON": path_form(python),
            "PYTHONW": path_form(re.sub(r"python(\.exe)?$", r"pythonw\1", python)),
            "FILE": path_form(own_file() or "/path/to/claude_gateway.py"), "HOME": path_form(os.path.expanduser("~"))}


def setup_text(name: str, config: Config) -> str:
    """The settings for a tool, or a service file for this installation."""
    settings = SETTINGS[name]
    text = settings.text
    if getattr(sys, "frozen", False):               # the program is its own interpreter
        text = re.sub(r'"FILE" (?=START)|<string>FILE</string>', "", text)
    return with_values(text, filled(config, settings.path_form, settings.between)).rstrip()


def with_values(text: str, values: dict[str, str]) -> str:
    return re.sub(r"(?<![\w-])(%s)\b" % "|".join(values), lambda word: values[word.group()], text)


# ---- Status page -------------------------------------------------------------------------------------
# What the gateway is doing: as JSON for programs, as a page for people, as text for Prometheus.

USAGE_COLUMNS = ("requests", "errors", "tokens in", "cached", "tokens out", "cost")
REQUEST_COLUMNS = ("time", "tool", "model", "status", *USAGE_COLUMNS[2:], "first byte, all")


def token_cells(figures: dict) -> list[str]:
    """Texts for the last four of USAGE_COLUMNS."""
    read, cost = percent(figures["cached_tokens"], figures["input_tokens"]), figures["cost_usd"]
    return [format(figures["input_tokens"], ","), "%d%%" % read, format(figures["output_tokens"], ","),
            "" if cost is None else dollars(cost)]


def usage_row(figures: dict) -> list[str]:
    """Texts for USAGE_COLUMNS."""
    return [format(figures["requests"], ","), format(figures["failed"], ","), *token_cells(figures)]


def request_row(each: dict) -> list[str]:
    """Texts for REQUEST_COLUMNS."""
    moment = time.strftime("%H:%M:%S", time.localtime(each["time"]))
    models = " -> ".join(dict.fromkeys(filter(None, (each["asked"], each["used"])))) or each["path"]
    status = "%d%s" % (each["status"], " stream" if each["stream"] else "")
    tokens = [""] * 4 if each["input_tokens"] is None else token_cells(each)
    times = "%s / %s ms" % (each["first_byte_ms"], each["total_ms"])
    return [moment, each["tool"], models, status, *tokens, times]


def status_data(gateway: Gateway) -> dict:
    """Everything that the page shows; it contains no secrets."""
    counters, credential = gateway.counters, gateway.upstream.credential
    totals = counters.totals()
    models, tokens = totals["models"], totals["tokens"]
    tiers = {tier: model.id for tier, model in gateway.models.catalog().names() if tier in TIERS}
    trouble = gateway.upstream.trouble              # Anthropic's message may repeat what it refuses
    return {
        "status": "ok", "version": VERSION, "uptime_seconds": round(time.time() - counters.started),
        "started_at": round(counters.started), "aliases": dict(gateway.config.alias),
        "upstream": "simulated" if gateway.config.demo else gateway.upstream.base_url,
        "credential": credential.facts() if credential else None,
        "trouble": trouble and dict(trouble, message=masked(as_typed(trouble["message"]), gateway.secrets())),
        "models": dict(sorted(tiers.items(), key=lambda item: item[0] != "sonnet")),    # the one to use when in doubt
        "requests": {"total": totals["requests"], "running": max(0, gateway.running.count - 1)},    # without this one
        "errors": totals["errors"], "tokens": tokens,
        "cache": {"share_percent": percent(tokens["cache_read"], prompt_tokens(tokens)),
                  "saved_usd": round(sum(figures["saved_usd"] for figures in models.values()), 4)},
        "cost": {"usd": round(sum(figures["usd"] for figures in models.values()), 4),
                 "without_price": sorted(model for model, figures in models.items() if figures["without_price"])},
        "limits": limits_from_headers(counters.limit_headers, time.time()), "days": last_days(gateway.usage),
        **{name: totals[name] for name in ("by_tool", "by_model", "error_texts")}, "columns": REQUEST_COLUMNS,
        "recent": [dict(each, row=request_row(each)) for each in totals["recent"]],
        "totals": [[[by, *USAGE_COLUMNS], *([name, *usage_row(sums)] for name, sums in totals["by_" + by].items())]
                   for by in ("tool", "model")]}


def last_days(usage: Usage) -> list[dict]:
    """Costs and requests of the last thirty days, [] where they are not counted."""
    days: dict = {}
    with suppress(FileDamaged):
        days = usage_by(usage.rows(), "day") if not usage.fault else {}
    shown = [day_of(time.time() - 86_400 * back) for back in range(29, -1, -1)] if days else []
    return [{"day": day, "usd": value_in(days, day, "usd") or 0, "requests": value_in(days, day, "requests") or 0}
            for day in shown]


def status_page(gateway: Gateway, incoming: Incoming) -> Reply:
    """GET /: a page for browsers, JSON for others.  The data requires an API key where clients need one."""
    if "text/html" in incoming.headers.get("accept", ""):
        nonce = secrets.token_urlsafe(12)
        policy = ("default-src 'none'; connect-src 'self'; style-src 'nonce-%s'; script-src 'nonce-%s'; "
                  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'" % (nonce, nonce))
        return Reply(raw=PAGE.replace("NONCE", nonce).encode(), headers={
            "content-type": "text/html; charset=utf-8", "content-security-policy": policy, "cache-control": "no-store",
            "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"})
    if gateway.config.api_key and not incoming.owner:
        return Reply({"status": "ok", "version": VERSION, "key_needed": True})
    if incoming.query == "setup":                   # for the page, at the address that the browser used
        host = incoming.headers.get("host") or "localhost"
        port = re.search(r":(\d+)\Z", host)
        config = replace(gateway.config, port=int(port.group(1)) if port else 80)
        return Reply({name: as_typed(setup_text(name, config)).replace("localhost:%d" % config.port, host)
                      for name in TOOL_SETTINGS})
    return Reply(status_data(gateway))


def metrics(gateway: Gateway, incoming: Incoming) -> Reply:
    """GET /metrics, in Prometheus' text format 0.0.4."""
    data, counters, totals = status_data(gateway), gateway.counters, gateway.counters.totals()
    models = totals["models"]
    priced = {model: figures for model, figures in models.items() if "usd" in figures}
    lines: list[str] = []

    def family(name: str, help_text: str, samples: Iterable[tuple[dict, float]]) -> None:
        kind = "counter" if name.endswith("_total") else "gauge"
        lines.append("# HELP claude_gateway_%s %s\n# TYPE claude_gateway_%s %s" % (name, help_text, name, kind))
        for labels, value in samples:
            labelled = ",".join('%s="%s"' % (label, re.sub(r'(["\\])', r"\\\1", str(text)))
                                for label, text in labels.items())
            lines.append("claude_gateway_%s%s %s" % (name, "{%s}" % labelled if labelled else "", value))

    family("info", "The running version.", [({"version": VERSION}, 1)])
    family("start_time_seconds", "Unix time of the start.", [({}, round(counters.started, 3))])
    family("credential_ok", "0 from a refusal of the credential or a failed renewal to the next success.",
           [({}, int(data["trouble"] is None))])
    family("requests_total", "Requests answered, by route and status.",
           [({"route": route, "status": code}, count) for (route, code), count in totals["routes"]])
    family("requests_running", "Requests that run now.", [({}, data["requests"]["running"])])
    family("request_duration_seconds_total", "Time spent on all requests.", [({}, round(counters.seconds, 3))])
    family("errors_total", "Requests that failed, by code.",
           [({"code": code}, count) for code, count in data["errors"].items()])
    family("tokens_total", "Tokens, by model and kind; the prompt is input, cache_read and cache_write.",
           [({"model": model, "kind": kind}, models[model][kind]) for model in models for kind in TOKEN_KINDS])
    family("cost_usd_total", "US dollars by list prices, by model.",
           [({"model": model}, round(figures["usd"], 6)) for model, figures in priced.items()])
    family("cache_saved_usd", "US dollars that caching saved; negative while it is only written.",
           [({"model": model}, round(figures["saved_usd"], 6)) for model, figures in priced.items()])
    family("limit_used_ratio", "Used share of plan windows and rate limits, as Claude last reported.",
           [({"window": limit["window"]}, limit["used"]) for limit in data["limits"]])
    family("limit_reset_timestamp_seconds", "When they are reset, in Unix time.",
           [({"window": limit["window"]}, limit["resets_at"]) for limit in data["limits"] if limit["resets_at"]])
    return Reply(raw=("\n".join(lines) + "\n").encode(), headers={
        "content-type": "text/plain; version=0.0.4; charset=utf-8"})


PAGE = """<!doctype html>
<html lang="en">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Claude Gateway</title>
<style nonce="NONCE">
  :root { color-scheme: light dark; --back: light-dark(#faf9f6, #1b1a18); --card: light-dark(#fff, #262421);
          --ink: light-dark(#22201c, #eeebe4); --soft: light-dark(#6b665c, #a39d91);
          --line: light-dark(#e4e0d6, #3a3732); --accent: light-dark(#b5532d, #e08a63);
          --good: light-dark(#2f7d4f, #6cc090); --bad: light-dark(#b3261e, #f2857c); }
  * { box-sizing: border-box; } [hidden] { display: none !important; }
  body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
  main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; font-variant-numeric: tabular-nums; }
  h1 { font-size: 1.3rem; margin: 0; }
  h2 { font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; margin: 0 0 .6rem; font-weight: 600; }
  h2, dt, th, p, .note, #version { color: var(--soft); } .up { color: var(--good); }
  .down, #errors dt, #trouble { color: var(--bad); } #state::before { content: "\\25cf"; margin-right: .35em; }
  header, form, .row { display: flex; gap: .5rem .75rem; align-items: baseline; flex-wrap: wrap; }
  .row { justify-content: space-between; }
  .grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); margin-top: 1.2rem; }
  section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; min-width: 0; }
  .wide { grid-column: 1 / -1; overflow-x: auto; } #demo, #trouble, #ask { margin-top: 1rem; }
  #trouble { border-color: var(--bad); } #demo { border-color: var(--accent); } #demo b { color: var(--accent); }
  dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .25rem 1rem; margin: 0; }
  dt, th, td { white-space: nowrap; } dd { margin: 0; overflow-wrap: break-word; } #tokens dd { text-align: right; }
  #credential, #errors { display: block; } #credential dt, #names, p, .note, td, th { font-size: .88rem; }
  td, th { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top; font-weight: 400; }
  table { border-spacing: 0; width: 100%; }
  tr.detail span { display: inline-block; max-width: calc(100vw - 4.5rem); white-space: normal; margin-right: .5rem; }
  code, pre { font: 13px/1.5 ui-monospace, monospace; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0 0; }
  .grid b { display: block; font-size: 2rem; font-weight: 600; line-height: 1.2; } p { margin: 0; }
  progress { width: 100%; height: .9rem; accent-color: var(--accent); }
  #bars { display: flex; align-items: flex-end; gap: 2px; height: 4rem; margin-top: .6rem; }
  #bars i { flex: 1; min-height: 1px; background: var(--line); }
  #bars i:nth-last-child(-n + 7) { background: var(--accent); }
  input, button, select { font: inherit; padding: .4rem .7rem; border-radius: 6px; border: 1px solid var(--line);
                  background: var(--back); color: var(--ink); }
  dd button { padding: 0 .5rem; margin-left: .5rem; font-size: .8rem; } summary, select { cursor: pointer; }
</style>
<main>
  <header><h1>Claude Gateway</h1><span id="version"></span><span id="state" role="status">connecting</span></header>
  <section id="demo" hidden><b>DEMO</b> Nothing goes to Claude: answers, tokens, costs, limits are simulated.</section>
  <section id="trouble" role="alert" hidden></section>
  <section id="ask" hidden><h2>API key required</h2>
    <form id="key"><input type="password" id="secret" aria-label="API key of this gateway" autocomplete="off"
      placeholder="API key of this gateway"><button>Show the numbers</button>
      <span class="down" id="wrong" role="alert" hidden>Invalid API key.</span></form></section>
  <div class="grid" id="data" hidden>
    <section class="wide"><h2>Paste into your tool</h2>
      <dl><dt>Base URL</dt><dd><code id="base"></code><button data-copy="base">copy</button></dd>
          <dt>API key</dt><dd><code id="keyhint"></code><button data-copy="keyhint">copy</button></dd>
          <dt>Model</dt><dd><code id="model">sonnet</code><button data-copy="model">copy</button></dd>
          <dt>Names</dt><dd id="names"></dd></dl>
      <details id="setup"><summary class="note">Settings for a tool</summary>
        <select id="tool" aria-label="Tool"></select> <button data-copy="settings">copy</button>
        <pre id="settings"></pre></details></section>
    <section class="wide" data-card="errors"><h2>Errors</h2><dl id="errors"></dl></section>
    <section><h2>Requests</h2><b id="requests"></b><p id="running"></p></section>
    <section data-card="used"><h2>Cost</h2><b id="cost"></b><p id="saved"></p></section>
    <section data-card="used"><h2>Cache</h2><b id="share"></b><p>of all input was read from Claude's cache</p></section>
    <section data-card="used"><h2>Tokens</h2><dl id="tokens"></dl></section>
    <section data-card="days"><h2>7 and 30 days</h2><b id="week"></b><p id="month"></p>
      <div id="bars" aria-hidden="true"></div></section>
    <section data-card="limits"><h2>Limits</h2><div id="limits"></div></section>
    <section><h2>Credential</h2><dl id="credential"></dl></section>
    <section class="wide" data-card="used"><h2>By tool and model</h2><table id="totals"></table></section>
    <section class="wide" data-card="recent"><h2>Last requests</h2>
      <label class="note"><input type="checkbox" id="failed"> only errors</label><table id="recent"></table></section>
  </div>
</main>
<script nonce="NONCE">
  "use strict";
  const at = (id) => document.getElementById(id);
  const number = (value) => value.toLocaleString("en");
  const dollars = (usd) => "$" + (usd < 0.01 ? Number(usd.toFixed(4)) || "0.00" : usd.toFixed(2));
  const dates = { dateStyle: "medium", timeStyle: "short" };
  const moment = (seconds) => new Date(seconds * 1000).toLocaleString("en-GB", dates);
  let key = "", listed;

  function make(kind, content = "", properties = {}) {
    const made = Object.assign(document.createElement(kind), properties);
    made.append(...[content].flat());
    return made;
  }

  const fill = (id, children) => at(id).replaceChildren(...children);
  const pairs = (id, entries) => fill(id, entries.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
  const row = (cells, kind = "td") => make("tr", cells.map((cell) => make(kind, cell)));

  function limitBar(limit) {
    const reset = limit.resets_at * 1000 > Date.now() ? ", reset " + moment(limit.resets_at) : "";
    const share = make("span", Math.round(limit.used * 100) + " %" + reset, { className: "note" });
    const row = make("div", [make("span", limit.title), share], { className: "row" });
    return [row, make("progress", "", { value: limit.used })];
  }

  function dayBars(days) {
    const most = Math.max(...days.map((day) => day.usd), 0.01);
    const sum = (some, name) => some.reduce((total, day) => total + day[name], 0);
    at("week").textContent = dollars(sum(days.slice(-7), "usd"));
    at("month").textContent = "in 7 days; " + dollars(sum(days, "usd")) + " in 30 days, requests: " +
      number(sum(days, "requests"));
    fill("bars", days.map((day) => make("i", "", { title: day.day + " " + dollars(day.usd),
      style: "height: " + 100 * day.usd / most + "%" })));
  }

  function tables(data) {
    fill("totals", data.totals.flatMap((table) => table.map((cells, at) => row(cells, at ? "td" : "th"))));
    const shown = data.recent.filter((each) => !at("failed").checked || each.status >= 400 || each.error);
    const news = JSON.stringify(shown);
    if (news === listed) return;                    // a selection in the table stays
    listed = news;
    fill("recent", [row(data.columns, "th"), ...shown.flatMap((each) => {
      if (!each.error && !each.changes) return [row(each.row)];
      const texts = [make("span", each.error, { className: "down" }), make("span", each.changes)];
      const detail = make("td", texts, { className: "note", colSpan: data.columns.length });
      return [row(each.row), make("tr", detail, { className: "detail" })];
    })]);
  }

  function show(data) {
    at("version").textContent = data.version ?? "";
    at("ask").hidden = !data.key_needed;
    at("data").hidden = !!data.key_needed;
    if (data.key_needed) return;
    const tokens = data.tokens, facts = data.credential ?? {}, saved = data.cache.saved_usd;
    const texts = {
      trouble: data.trouble ? "The credential does not work, since " + moment(data.trouble.at) + ": " +
        data.trouble.message : "",
      base: location.origin + "/v1", keyhint: key ? "your key" : "none",
      names: Object.entries({ ...data.models, ...data.aliases }).map((pair) => pair.join(" = ")).join(", "),
      requests: number(data.requests.total), share: data.cache.share_percent + " %", cost: dollars(data.cost.usd),
      running: data.requests.running + " running; all since " + moment(data.started_at),
      saved: "by list prices; caching " + (saved < 0 ? "cost " : "saved ") + dollars(Math.abs(saved)) +
        data.cost.without_price.map((model) => "; without " + model).join("") };
    for (const [id, text] of Object.entries(texts)) at(id).textContent = text;
    at("trouble").hidden = !data.trouble;
    at("demo").hidden = data.upstream !== "simulated";
    pairs("errors", Object.entries(data.errors).map(([code, count]) =>
      [number(count) + " \u00d7 " + code, data.error_texts[code] ?? ""]));
    const kinds = [["New in the prompt", tokens.input], ["Read from the cache", tokens.cache_read],
      ["Stored in the cache", tokens.cache_write], ["Answers", tokens.output]];
    const sum = kinds.reduce((all, [, count]) => all + count, 0);
    pairs("tokens", [...kinds, ["Total", sum]].map(([name, count]) => [name, number(count)]));
    const over = facts.expires_at * 1000 < Date.now();
    pairs("credential", [["Kind", facts.description ?? "none"], ["Account", facts.account], ["Upstream", data.upstream],
      [over ? "Token expired" : facts.refreshable ? "Token renews" : "Token expires",
        facts.expires_at && moment(facts.expires_at)]].filter(([, value]) => value));
    fill("limits", data.limits.flatMap(limitBar));
    dayBars(data.days);
    tables(data);
    const cards = { errors: Object.keys(data.errors).length, used: sum, limits: data.limits.length,
      days: data.days.length, recent: data.recent.length };
    for (const card of document.querySelectorAll("[data-card]")) card.hidden = !cards[card.dataset.card];
  }

  const ask = (path, sent) => fetch(path, { headers: { accept: "application/json",
    ...(sent && { authorization: "Bearer " + sent }) } });

  async function update() {
    const sent = key;
    let state = "running";
    try {
      const answer = await ask("/", sent);
      if (!answer.ok && answer.status !== 401) throw new Error(answer.status);
      const data = answer.ok ? await answer.json() : { key_needed: true };
      if (sent !== key) return;
      if (sent && data.key_needed) { key = ""; at("wrong").hidden = false; }
      show(data);
    } catch (problem) {
      state = "not reachable";
    }
    at("state").textContent = state;
    at("state").className = state === "running" ? "up" : "down";
  }

  at("key").addEventListener("submit", (event) => {
    event.preventDefault();
    key = at("secret").value.trim();
    at("wrong").hidden = true;
    update();
  });
  at("setup").addEventListener("toggle", async () => {
    const texts = await (await ask("/?setup", key)).json(), chosen = at("tool");
    const show = () => { at("settings").textContent = texts[chosen.value]; };
    fill("tool", Object.keys(texts).map((name) => make("option", name)));
    chosen.addEventListener("change", show);
    show();
  }, { once: true });
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.hidden = !navigator.clipboard;           // browsers have it on localhost and https only
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(at(button.dataset.copy).textContent);
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 2000);
    });
  }
  at("failed").addEventListener("change", update);
  update();
  setInterval(update, 2000);
</script>
"""


# ---- Routes ------------------------------------------------------------------------------------------
# What is served where, and to whom: foreign hosts, foreign origins and wrong keys are refused, because whoever
# reaches this port spends the owner's money.

Endpoint = Callable[[Gateway, Incoming], Reply]
# path (without /v1) -> method -> endpoint
ROUTES: Dict[str, Dict[str, Endpoint]] = {
    "/chat/completions": {"POST": chat_completions},
    "/responses": {"POST": create_response},
    "/responses/input_tokens": {"POST": count_input_tokens},
    "/responses/compact": {"POST": compact_response},
    "/responses/{id}/cancel": {"POST": cancel_response},
    "/responses/{id}": {"GET": get_response, "DELETE": delete_response},
    "/responses/{id}/input_items": {"GET": response_input_items},
    "/completions": {"POST": completions},
    "/messages": {"POST": native_call},
    "/messages/count_tokens": {"POST": native_call},
    "/models": {"GET": list_models},
    "/models/{id}": {"GET": one_model},
    "/health": {"GET": health},
    "/metrics": {"GET": metrics},
    "/": {"GET": status_page},
}
# the routes with an argument; the name of a model may have slashes
PATTERNS = [(re.compile(route.replace("{id}", "(.+)" if route == "/models/{id}" else "([^/]+)")), route)
            for route in ROUTES if "{id}" in route]
WITHOUT_KEY = {"/models", "/models/{id}", "/health", "/"}       # for every other path a configured key is needed
NATIVE = {"/messages", "/messages/count_tokens"}                # whose errors are in Anthropic's shape
LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|([a-z0-9-]+\.)+localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?\Z")


@functools.lru_cache(maxsize=64)
def route_of(target: str) -> tuple[str, str]:
    """The path that decides, and the argument behind it; /v1, also doubled, // and a last / do not matter."""
    path = re.sub(r"/{2,}", "/", re.sub(r"[?#].*", "", target))
    path = re.sub(r"^(/v1)+(?=/|$)", "", path).rstrip("/") or "/"
    path = re.sub(r"^(/chat/completions)+$", "/chat/completions", path)     # from the start only: it stays linear
    for pattern, route in PATTERNS if path not in ROUTES else ():
        match = pattern.fullmatch(path)
        if match:
            return route, urllib.parse.unquote(match.group(1))
    return path, ""


def not_served(method: str, path: str, typed: str) -> NoReturn:
    """Refuses a path without an endpoint for this method; `typed` is how the client wrote it."""
    if path not in ROUTES:
        foreign = re.match(r"/(embeddings|images|audio|moderations)(/|$)", path)
        if foreign:
            raise Refused(404, "unknown_url", "Claude has no %s: %s can only be served by another provider." % (
                foreign.group(1), printable(path)))
        served = ", ".join(route for route in ROUTES if "{" not in route)
        raise Refused(404, "unknown_url", "There is nothing at %s %s; served are %s." % (
            method, printable(typed), served))
    names = [*ROUTES[path], *(["HEAD"] if "GET" in ROUTES[path] else []), "OPTIONS"]
    hint = "; a chat completion is POST /v1/chat/completions" if path == "/" else ""
    raise Refused(405, "method_not_allowed", "%s does not support %s%s." % (printable(typed), method, hint),
                  headers={"allow": ", ".join(names)})


@functools.lru_cache(maxsize=16)
def allowed_host(host: str, ours: tuple[str, ...]) -> tuple[str, bool]:
    """The name in a Host header, and whether it may be this gateway's; a web page's own may not (DNS rebinding)."""
    match = re.match(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{0,5})?\Z", host)
    if not match:
        raise InvalidRequest("The Host header is malformed.", code="bad_header")
    name = match.group(1).strip("[]").rstrip(".").lower()
    return name, is_address(name) or is_loopback_host(name) or name in ours


def origin_allowed(origin: str, config: Config) -> bool:
    """Against web pages that spend the owner's quota."""
    return LOOPBACK_ORIGIN.match(origin) is not None or origin in config.cors_origin or "*" in config.cors_origin


# ---- HTTP server -------------------------------------------------------------------------------------
# Bytes to checked requests, replies to bytes; knows no field of either API.  Every wait and every size is bounded.

CONTROLS = re.compile(r"[\x00-\x1f\x7f]")          # none of them leaves in a header
EXPOSED_HEADERS = ", ".join([CHANGES_HEADER, *OPENAI_HEADERS.values()])
# in place of a malformed head: whatever follows it is not a request
NO_HEAD = Head("", "", "1.1", {"connection": "close", "content-length": "?"})
IDLE_COMMENT = b": keep-alive\n\n"                  # clients read on
LAST_CHUNK = b"0\r\n\r\n"
LOG_NAME = "request "
http_date = functools.lru_cache(maxsize=1)(functools.partial(email.utils.formatdate, usegmt=True))


def inflated(body: bytes, encoding: str, limit: int) -> bytes:
    """A compressed body, as far as this Python can undo it; never more than `limit` bytes."""
    inflate: Any
    if encoding in ("gzip", "x-gzip", "deflate"):
        raw_deflate = encoding == "deflate" and (body[:1] or b"\0")[0] & 15 != 8
        inflate, invalid = zlib.decompressobj(-15 if raw_deflate else 47), zlib.error
    elif encoding == "zstd" and sys.version_info >= (3, 14):
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]

        inflate, invalid = zstd.ZstdDecompressor(), zstd.ZstdError
    else:
        raise Refused(415, "unsupported_encoding", "Content-Encoding %s is not supported here; send the body plain or "
                      "as gzip. (Codex: [features] enable_request_compression = false)" % printable(encoding, 40))
    try:
        plain: bytes = inflate.decompress(body, limit + 1)
    except invalid as fault:
        raise InvalidRequest("The body is not %s: %s." % (encoding, fault), code="invalid_encoding") from fault
    if not inflate.eof and len(plain) <= limit:
        raise InvalidRequest("The %s body is cut short." % encoding, code="invalid_encoding")
    if len(plain) > limit:
        raise Refused(413, "request_too_large", "The body has more than %d MB when unpacked." % (limit // 1_000_000))
    return plain


def parsed_weight(body: bytes) -> int:
    """What a body counts in the budget beyond its size: small members have up to 18 times their size once parsed, and
    a character beyond the basic plane gives all others of its string four bytes, too."""
    wide = len(body) > 4_000_000 and (                     # two searches, as one for both reads each byte slowly
        HALF_PAIR.search(body) or not body.isascii() and re.search(rb"[\xf0-\xf4]", body))
    return 5 * len(body) if wide else min(25 * len(body.translate(None, NOT_MEMBERS)), 5 * len(body))


def preflight_headers(head: Head) -> dict[str, str]:
    headers = {"access-control-allow-methods": "GET, POST, DELETE, HEAD, OPTIONS", "access-control-max-age": "600",
               "allow": "GET, POST, DELETE, HEAD, OPTIONS"}
    wanted = head.headers.get("access-control-request-headers")
    if wanted:
        headers["access-control-allow-headers"] = printable(wanted, 2_000)
    if head.headers.get("access-control-request-private-network") == "true":
        headers["access-control-allow-private-network"] = "true"
    return headers


class StreamedReply:
    """A reply in pieces as it goes over the wire."""

    def __init__(self, reply: Reply, chunked: bool) -> None:
        self._reply, self._chunked = reply, chunked
        self.headers = dict({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                             "x-accel-buffering": "no"}, **reply.headers)
        if chunked:
            self.headers["transfer-encoding"] = "chunked"
        self.idle_comment = self._wire(IDLE_COMMENT) if reply.idle_comments else b""

    def steps(self, head: bytes) -> Iterator[Any]:
        """The same steps with bytes to send, head and end included.  What has nothing to wait for leaves together."""
        ready = head
        try:
            for data, wait in self._reply.steps or ():
                if isinstance(data, list):
                    data = b"".join(map(self._reply.event_bytes, data))
                ready += self._wire(data)
                if wait or len(ready) > READ_SIZE:
                    yield ready, None if wait is NEEDS_THREAD else wait
                    ready = b""
                if wait is NEEDS_THREAD:
                    yield b"", wait
        except Exception:                           # whatever it is: what came before it is the client's
            yield ready, None
            raise
        yield ready + self._wire(self._reply.closing) + (LAST_CHUNK if self._chunked else b""), None

    def failure(self, failure: GatewayError) -> bytes:
        """An event that SDKs raise, and the end; a body of another kind is cut, so that nobody takes it for whole."""
        if not self.headers["content-type"].startswith("text/event-stream"):
            return b""
        data = b"".join(map(self._reply.event_bytes, self._reply.failure(failure)))
        return self._wire(data) + (LAST_CHUNK if self._chunked else b"")

    def _wire(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data) if self._chunked and data else data


class RequestCycle:
    """One request and its reply: born when the head has come, gone when the reply is out."""

    def __init__(self, gateway: Gateway, peer: Peer, address: str, head: Head, started: float) -> None:
        # what came in
        self._gateway, self._config, self._limits = gateway, gateway.config, gateway.config.limits
        self._peer, self._address, self._head, headers = peer, address, head, head.headers
        self._body_unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        self._body_begun = False
        # what has gone out
        self.client = Client(peer, self._limits)
        self.keep_alive = not ends_connection(head.version, headers)        # whether the connection may go on
        self.steps: Iterator[Any] = iter(())        # of a stream, once its head has gone out
        self._stream: Optional[StreamedReply] = None
        self._native = False
        tool = tool_of(headers.get("user-agent", ""), headers.get("x-title", ""), " ".join(headers))
        self._record = Record(head.method, head.target.partition("?")[0].partition("#")[0], address, tool, started)
        self._log_name = LOG_NAME + os.urandom(2).hex()         # of the thread, so that its log entries show it
        # what has to be given back, whatever happens
        self._reserved = 0                          # bytes of the budget of all bodies
        self._held = [self._end]                    # the last one first

    def run(self, failure: BaseException | None = None) -> Wait | None:
        """Answers the request, or goes on with its stream in a thread again; the catch-all of the program is here.
        Returns what a stream waits for that is better left to the event loop; None when the request is over."""
        wait = None
        threading.current_thread().name = self._log_name
        try:
            if failure:
                raise failure
            wait = self._go_on() if self._stream else self._answer()
        except (ConnectionError, ClientGone, socket.timeout):
            self.keep_alive = False                 # nobody left to tell
            self._record.error = self._record.error or "client gone"
            self._record.error_code = self._record.error_code or "client_gone"
            self._record.status = self._record.status or 499
        except Exception as fault:
            self._send_failure(fault if isinstance(fault, GatewayError) else unexpected(fault))
        finally:
            if not wait:
                close_all(self._held)
        return wait

    def _end(self) -> None:
        """Gives back what the body took, and puts the request into the log and the counts."""
        record = self._record
        self._gateway.body_budget.give(self._reserved)
        record.total_ms = int((time.monotonic() - record.started) * 1000)
        if record.method:
            log_request_record(record, self._config)
            figures = {"requests": int(record.input_tokens is None), "errors": int(record.status >= 400)}
            if record.used and any(figures.values()):           # most requests are counted with their tokens
                self._gateway.usage.add(record.tool, record.used, record.owner, figures)
            self._gateway.counters.add_request(vars(record), self._gateway.secrets())

    def _answer(self) -> Wait | None:
        """Checks a request from the outside in, and sends what its endpoint answers."""
        if not self._gateway.running.take():
            raise busy("The gateway stops." if self._gateway.running.draining else
                       "The gateway is busy with as many requests as it accepts.")
        self._held.insert(0, self._gateway.running.give)    # last: who waits for this finds everything counted
        length = body_length(self._head)
        head = self._head = self._checked_head()
        path, argument = route_of(head.target)
        self._native, self._record.route = path in NATIVE, path if path in ROUTES else "other"
        if head.method == "OPTIONS":
            self._send(204, b"", preflight_headers(head))
            return None
        if "websocket" in head.headers.get("upgrade", "").lower():
            raise Refused(426, "upgrade_required", "WebSockets are not supported here; send plain requests.",
                          headers={"upgrade": "HTTP/1.1"})
        owner = self._owner(path) if self._config.api_key else ""
        endpoint = ROUTES.get(path, {}).get("GET" if head.method == "HEAD" else head.method) or not_served(
            head.method, path, self._record.path)
        hops = head.headers.get(HOP_HEADER, "")
        if self._gateway.instance_id in hops:
            raise Refused(508, "loop_detected", "This request came from this very gateway: its upstream address leads "
                          "back to it.", headers={"x-should-retry": "false"})
        call = UpstreamCall(self.client, hops, self._limits.upstream_silence,
                            may_retry=head.headers.get("x-stainless-retry-count", "0") == "0")
        incoming = Incoming({}, argument, owner, call, self._held, self._record, headers=head.headers,
                            query=head.target.partition("?")[2])
        body = self._read_body(length) if self._body_unread else b""
        if head.method == "POST":
            self._reserve(parsed_weight(body))
            try:
                incoming.body, incoming.surrogates_replaced = json_from_body(body)
            except InvalidRequest:
                LOG.debug("from the client, invalid: %r", body[:2_000])
                raise
            LOG.debug("from the client: %s", incoming.body)
        del body                                    # a large one need not wait for Claude's answer
        return self._send_reply(endpoint(self._gateway, incoming))

    def _checked_head(self) -> Head:
        """The head with a path as its target.  Raises GatewayError for a foreign host or origin."""
        head, host = self._head, self._head.headers.get("host")         # HTTP/1.0 may leave it out
        absolute = None if head.target.startswith("/") else re.match(r"https?://([^/?#]*)", head.target, re.I)
        if absolute:                                # its authority wins over Host (RFC 9112, 3.2.2)
            host, path = absolute.group(1), head.target[absolute.end():]
            head = head._replace(target=path if path.startswith("/") else "/" + path)
        elif not head.target.startswith("/") and not (head.target == "*" and head.method == "OPTIONS"):
            raise InvalidRequest("The request target is not a path.", code="bad_request_line")
        name, allowed = allowed_host(host, self._gateway.names) if host is not None else ("", True)
        if not allowed:
            self.keep_alive = False
            raise Refused(403, "host_not_allowed", "Host %s is not one of this gateway's names. If it should be: "
                          "--allow-host %s" % (name, name))
        origin = head.headers.get("origin")
        if origin is not None and not origin_allowed(origin, self._config):
            origin = printable(origin)
            raise Refused(403, "origin_not_allowed", "Origin %s may not call this gateway. If it should: "
                          "--cors-origin %s" % (origin, origin))
        request = head.method, head.target, head.headers.get("sec-fetch-mode")
        if head.headers.get("sec-fetch-site") in ("cross-site", "same-site") and origin is None \
                and head.method != "OPTIONS" and request != ("GET", "/", "navigate"):
            raise Refused(403, "origin_not_allowed", "A web page of another site may not call this gateway. If it "
                          "should: let it send its Origin, and add --cors-origin with it.")
        return head

    def _owner(self, path: str) -> str:
        """The owner of what this request leaves behind: a digest of the key.  A wrong key is refused after a pause."""
        sent = [re.sub(r"^bearer\s+", "", self._head.headers.get("authorization", ""), flags=re.I),
                self._head.headers.get("x-api-key", ""), self._head.headers.get("api-key", "")]
        # as digests neither length nor content shows in the time it takes to compare them
        digests = [hashlib.sha256(key.strip().encode("latin-1", "replace")).digest() for key in sent if key]
        known = [hashlib.sha256(key.encode("utf-8")).digest() for key in self._config.api_key]
        owners = [key.hex() for key in known for digest in digests if hmac.compare_digest(key, digest)]
        owner = owners[-1] if owners else ""
        guessed = bool(digests) and path == "/"     # whose numbers would show at once whether a guess is right
        if owner or path in WITHOUT_KEY and self._head.method in ("GET", "HEAD") and not guessed:
            self._record.owner = "" if self._config.passing_key else owner[:12]
            return owner
        self._held.pop(0)()                         # a slowed refusal takes nobody's place
        time.sleep(self._gateway.failed_keys.penalty(self._address))
        raise Refused(401, "invalid_api_key", "Invalid API key." if digests else
                      "A key of this gateway is needed (Authorization: Bearer KEY).",
                      headers={"www-authenticate": "Bearer"})

    def _read_body(self, length: int | None) -> bytes:
        """The body: framed, bounded, counted against the budget, unpacked."""
        limits, headers = self._limits, self._head.headers
        framing = RequestFraming(length, limits.max_body)
        if headers.get("expect", "").lower() == "100-continue" and self._head.version == "1.1":
            self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            body = self._received(framing, limits.body_timeout,
                                  limits.body_timeout + (length or limits.max_body) / SLOWEST_BODY)
        except socket.timeout:
            raise Refused(408, "request_timeout", "The body stopped for more than %d seconds, or came slower than %d "
                          "bytes a second." % (limits.body_timeout, SLOWEST_BODY)) from None
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            self._reserve(limits.max_body)          # what it may become
            body = inflated(body, encoding, limits.max_body)
            self._reserve(len(body) - self._reserved)
        return body

    def _received(self, framing: RequestFraming, pause: float, total: float) -> bytes:
        """A body, counted as it arrives: a client that only promises megabytes takes no room from others."""
        self._body_begun, deadline = True, time.monotonic() + total
        pieces: list[bytes] = []
        while not framing.done:
            data = self._peer.read_within(pause, deadline)
            if not data:
                framing.end()
            pieces.append(framing.feed(data))
            self._reserve(len(pieces[-1]))
        self._peer.unread += framing.rest
        self._body_unread = False
        return b"".join(pieces)

    def _reserve(self, amount: int) -> None:
        """Takes more from the budget of all bodies, or gives back what is not needed."""
        if not self._gateway.body_budget.take(amount):
            raise busy("The gateway holds too many large requests at the moment.")
        self._reserved += amount

    def _drain_body(self) -> None:
        """Before an early answer: a small body is read, so that it is not taken for the next request."""
        headers = self._head.headers
        length = headers.get("content-length", "")
        if self.keep_alive and not self._body_begun and re.match(r"[0-9]{1,5}\Z", length) \
                and "expect" not in headers and "transfer-encoding" not in headers:
            with suppress(OSError, GatewayError):
                self._received(RequestFraming(int(length), self._limits.max_body), 2, 2)
        if self._body_unread:                       # or part of it: what follows is out of step
            self.keep_alive = False

    def _send_reply(self, reply: Reply) -> Wait | None:
        if reply.steps is not None:
            chunked = self._head.version == "1.1"
            stream, self.keep_alive = StreamedReply(reply, chunked), self.keep_alive and chunked
            self._stream, self.client.idle_comment = stream, stream.idle_comment
            self.steps = stream.steps(self._head_bytes(200, stream.headers))
            return self._go_on()
        if reply.raw is None:
            LOG.debug("to the client: %s", reply.body)
        body = client_json(reply.body) + b"\n" if reply.raw is None else reply.raw     # curl leaves the line to us
        self._send(200, body, {"content-type": "application/json", **reply.headers})
        return None

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """A whole answer in one write."""
        if self._body_unread:
            self._drain_body()
        headers = headers if status == 204 else {**headers, "content-length": str(len(body))}
        self.client.send(self._head_bytes(status, headers) + (b"" if self._head.method == "HEAD" else body))
        if self._body_unread:                       # reads on for a moment, so that the client sees this and no reset
            deadline = time.monotonic() + 2
            with suppress(OSError):
                self._peer.sock.shutdown(socket.SHUT_WR)
                while self._peer.read_within(2, deadline):
                    pass

    def _head_bytes(self, status: int, headers: dict[str, str]) -> bytes:
        self._record.status = status
        self._record.first_byte_ms = int((time.monotonic() - self._record.started) * 1000)
        if self._gateway.running.draining:
            self.keep_alive = False
        lines = {"server": USER_AGENT, "date": http_date(int(time.time())), **headers}
        lines.setdefault(REQUEST_ID_HEADER, self._record.request_id or "gw_" + secrets.token_hex(10))
        self._record.request_id = lines[REQUEST_ID_HEADER]
        origin = self._head.headers.get("origin")
        if origin is not None and origin_allowed(origin, self._config):
            lines.update({"access-control-allow-origin": origin, "vary": "Origin",
                          "access-control-expose-headers": EXPOSED_HEADERS})
        lines["connection"] = "keep-alive" if self.keep_alive else "close"
        head = ["HTTP/1.1 %d %s" % (status, http.client.responses.get(status, "Unknown"))]
        head += [f"{name}: {value if value.isprintable() else CONTROLS.sub(' ', value)}"
                 for name, value in lines.items()]
        return ("\r\n".join(head) + "\r\n\r\n").encode("latin-1", "replace")

    def _go_on(self) -> Wait | None:
        """Sends a stream; where many run, one that has to be waited for is better left to the event loop."""
        for data, wait in self.steps:
            if data:
                self.client.send(data)
            if isinstance(wait, Wait):
                if self._gateway.running.count > self._limits.event_loop_from and not self._gateway.event_loop.full:
                    return wait
                self.client.wait(wait)
        return None

    def _send_failure(self, failure: GatewayError) -> None:
        """An error as a status and body or, once a stream has begun, as its last event."""
        failure = failure.reworded(masked(as_typed(str(failure)), self._gateway.secrets()))     # whoever wrote it
        self._record.error, self._record.error_code = str(failure), failure.code or failure.kind
        status, headers, body = failure.for_anthropic() if self._native else (
            failure.status, failure.headers, failure.body())
        try:
            if self._stream:
                self.keep_alive = False
                self._record.status = failure.status
                self.client.send(self._stream.failure(failure))
            else:
                LOG.debug("to the client: %s", body)
                self._send(status, client_json(body) + b"\n", dict(headers, **{"content-type": "application/json"}))
        except ClientGone:
            self.keep_alive = False


def unexpected(failure: Exception) -> GatewayError:
    """A defect of ours: the client learns its kind, the log where it happened."""
    LOG.error("a defect: %s", type(failure).__name__, exc_info=failure)
    return GatewayError("The gateway failed unexpectedly (%s). Its log says where." % type(failure).__name__,
                        code="internal_error")


@functools.lru_cache(maxsize=16)
def tool_of(agent: str, title: str, names: str) -> str:
    """The tool that a request's headers name, short enough for a column of the log."""
    named = title or "".join(re.findall(r"(?<!\S)x-(?!api-)([a-z]+)-version(?!\S)", names))
    if "/JS " in agent:                             # the SDK, its name minified
        agent = re.sub(r"^\w{1,3}(?=/JS )", "OpenAI", agent)
    match = re.match(r"(OpenAI/\w+|Async\w+/\w+|[\w.-]+)", re.sub(r"\s", "-", named) if named else agent)
    name = match.group(1) if match else "-"
    return {"Mozilla": "browser"}.get(name, name)[:14]


def log_request_record(record: Record, config: Config) -> None:
    """One line per request, in columns, and a second one for what was changed (as JSON: a field of the first)."""
    monitoring = record.route in MONITORING and record.status < 400      # an open page asks every other second
    level = logging.WARNING if record.status >= 400 else logging.DEBUG if monitoring else logging.INFO
    path = printable(record.path)
    if config.minimal:
        LOG.log(level, "%-4s %-20s %d %d ms", record.method, path, record.status, record.total_ms,
                extra={"fields": vars(record)})
        return
    models = "%s -> %s" % (printable(record.asked or "(none)"), record.used or "-")
    tokens = "" if record.input_tokens is None else "  in %-7d %3d%% cached (%d%% in all)  out %-6d" % (
        record.input_tokens, percent(record.cached_tokens, record.input_tokens), record.cached_percent_of_all,
        record.output_tokens)
    error = "  " + printable(record.error, 500) if record.error else ""
    LOG.log(level, "%-4s %-20s %d  %-14s %-36s %-6s%s  %s/%d ms  %s%s", record.method, path, record.status, record.tool,
            models if record.asked or record.used else "-", "stream" if record.stream else "", tokens,
            record.first_byte_ms, record.total_ms, record.request_id, error, extra={"fields": vars(record)})
    if record.changes and config.log_format != "json":
        LOG.info("  changes: %s", printable(record.changes, 100_000))


def short_line(fields: dict) -> str:
    """The line of a request for a narrow terminal, without padding and ids."""
    record = Record(**fields)
    path = re.sub(r"^(/v1)?/", "", printable(record.path)) or "/"
    words = ["%d" % record.status, path if record.method == "POST" else "%s %s" % (record.method, path),
             record.tool, re.sub(r"^claude-|-\d{8}$", "", record.used)]
    if record.input_tokens is not None:
        words.append("%d>%d %d%%" % (record.input_tokens, record.output_tokens,
                                     percent(record.cached_tokens, record.input_tokens)))
    words.append("%.1fs" % (record.total_ms / 1000))
    return " ".join(filter(None, words)) + ("  " + printable(record.error, 500) if record.error else "")


class Connection:
    """One client connection: reads heads, runs a cycle for each request, ends; `release` is called then."""

    def __init__(self, gateway: Gateway, sock: socket.socket, address: str, release: Callable[[], None]) -> None:
        self._gateway, self._limits = gateway, gateway.config.limits
        self._peer, self._address, self._release = Peer(sock), address, release

    def run(self, cycle: RequestCycle | None = None, failure: BaseException | None = None) -> None:
        """Requests in order, until the connection ends or a stream moves to the event loop; a cycle whose stream the
        event loop has given back goes on first."""
        wait = None
        try:
            cycle = cycle or self._next_cycle()
            while cycle:
                wait = cycle.run(failure)
                if wait or not cycle.keep_alive:
                    break
                cycle, failure = self._next_cycle(), None
        except Exception as defect:                 # it costs one connection, and nobody is above this thread
            log_lost_connection(defect)
        if cycle and wait:                          # from here on this thread may not touch it any more
            self._gateway.event_loop.add(RunningStream(cycle.client, cycle.steps,
                                                       functools.partial(self._resume, cycle)))
        else:
            self._release()

    def _resume(self, cycle: RequestCycle, over: bool, failure: BaseException | None) -> None:
        """Starts a thread for what the event loop gives back."""
        try:
            threading.Thread(target=self.run, args=(cycle, failure), name="connection", daemon=True).start()
        except RuntimeError:                        # no thread to be had: the event loop itself ends this one
            cycle.keep_alive = False
            self.run(cycle, failure or (None if over else busy("The gateway is out of threads.")))

    def _next_cycle(self) -> RequestCycle | None:
        """Waits for the next request and reads its head; None at the end of the connection."""
        peer = self._peer
        try:
            received = bytearray(peer.read_within(self._limits.idle_timeout))
            if received[:2] == b"\x16\x03":         # a TLS handshake
                if not self._gateway.tls_reported.is_set():
                    LOG.warning("a client speaks TLS to this port: its address has to begin with http://, not https://")
                self._gateway.tls_reported.set()
            started = time.monotonic()
            head = self._read_head(received, started + self._limits.head_timeout)
        except OSError:
            return None
        except GatewayError as refusal:
            RequestCycle(self._gateway, peer, self._address, NO_HEAD, started).run(refusal)
            return None
        return RequestCycle(self._gateway, peer, self._address, head, started) if head else None

    def _read_head(self, received: bytearray, deadline: float) -> Head | None:
        """Request line and headers; what cannot become a request is refused before all of it is there."""
        reader = HeadReader(received, request_line, lambda what: Refused(
            431, "request_header_fields_too_large", "The request head " + what))
        while True:
            blank = BLANK_LINES.match(received)     # dropped before a request (RFC 9112, 2.2)
            if blank:
                reader.skipped += blank.end()
                del received[:blank.end()]
            lines = reader.lines()
            if lines:
                self._peer.unread += received
                return head_from_lines(lines)
            try:
                more = self._peer.read_within(self._limits.head_timeout, deadline)
            except socket.timeout:
                raise Refused(408, "request_timeout", "The request head took more than %d seconds." %
                              self._limits.head_timeout) from None
            if not more:
                return None
            received += more


def log_lost_connection(failure: BaseException | None) -> None:
    if not isinstance(failure, OSError):
        LOG.error("a connection failed: %s", type(failure).__name__, exc_info=failure)


# ---- Service -----------------------------------------------------------------------------------------
# A gateway on its port: listening sockets, a thread per connection, the way to stop.

# Windows denies access to a port that another program has for itself
IN_USE = (errno.EADDRINUSE, errno.EACCES) if os.name == "nt" else (errno.EADDRINUSE,)
TOO_MANY_CONNECTIONS = client_json(busy("The gateway has too many connections.").body())


class Listener(socketserver.ThreadingTCPServer):
    """One listening socket; a thread per connection, within a bound."""
    daemon_threads = True
    request_queue_size = BACKLOG
    allow_reuse_address = os.name == "posix"        # on Windows it would let others take the port over

    def __init__(self, address: tuple[str, int], family: int, gateway: Gateway) -> None:
        self.address_family = family                # type: ignore[assignment,unused-ignore]
        self.gateway = gateway
        self._connections = Capacity(gateway.config.limits.max_connections)
        super().__init__(address, Connection)       # type: ignore[arg-type]  # only process_request_thread makes one

    def server_bind(self) -> None:
        if os.name == "nt":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)   # type: ignore[attr-defined]
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()

    def get_request(self) -> Any:
        try:
            sock, address = super().get_request()
        except OSError as fault:
            if fault.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)                    # asking again at once would not bring descriptors
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock, address

    def service_actions(self) -> None:              # called by the loop of the socket server every half second
        self.gateway.upstream.pool.close_old()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection."""
        if self._connections.take():
            return True
        with suppress(OSError):
            request.settimeout(1)
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
                            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" %
                            (len(TOO_MANY_CONNECTIONS), TOO_MANY_CONNECTIONS))
        return False

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In a thread of its own: a connection, until it ends or its stream moves to the event loop."""
        def release() -> None:
            self.shutdown_request(request)
            self._connections.give()
        Connection(self.gateway, request, client_address[0], release).run()

    def handle_error(self, request: Any, client_address: Any) -> None:      # no thread could be started
        self._connections.give()
        log_lost_connection(sys.exc_info()[1])


class Service:
    """A gateway on its port: listens on every address of the host, until `close`."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.listeners = listeners_for(gateway)
        self.port: int = self.listeners[0].server_address[1]
        self._started = False

    @property
    def url(self) -> str:
        """The base URL for an OpenAI client."""
        host = "localhost" if self.gateway.config.host == "localhost" else str(self.listeners[0].server_address[0])
        return "http://%s:%d/v1" % ("[%s]" % host if ":" in host else host, self.port)

    def start(self) -> None:
        self._started = True
        for listener in self.listeners:
            threading.Thread(target=listener.serve_forever, name="listener", daemon=True).start()

    def close(self, grace: float = SHUTDOWN_GRACE) -> bool:
        """Stops accepting, lets running requests finish for `grace` seconds; whether all of them did."""
        self.stop_accepting()
        finished = self.gateway.running.wait_until_idle(grace)
        self.gateway.close()
        return finished

    def stop_accepting(self) -> None:
        """The first half of `close`: no new connections, no new requests on those that are there."""
        self.gateway.running.draining = True
        for listener in self.listeners:
            with suppress(OSError):
                listener.socket.shutdown(socket.SHUT_RDWR)      # wakes its loop, where the system does so
            if self._started:
                listener.shutdown()                 # would wait for ever for a loop that never ran
            listener.server_close()


def listeners_for(gateway: Gateway) -> list[Listener]:
    """Sockets on the configured hosts, all on one port.  Raises OSError."""
    listeners: list[Listener] = []
    try:
        for host in gateway.config.hosts:
            port = listeners[0].server_address[1] if listeners else gateway.config.port
            listeners += listeners_on(host, port, gateway)
    except OSError:
        for listener in listeners:
            listener.server_close()
        raise
    return listeners


def listeners_on(host: str, port: int, gateway: Gateway) -> list[Listener]:
    """Sockets on one host; `localhost` is 127.0.0.1 and, where there is one, ::1.  Raises OSError."""
    if host != "localhost":
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return [Listener((host, port), family, gateway)]
    for _ in range(20):
        first = Listener(("127.0.0.1", port), socket.AF_INET, gateway)
        try:
            return [first, Listener(("::1", first.server_address[1]), socket.AF_INET6, gateway)]
        except OSError as fault:
            if fault.errno not in IN_USE:
                return [first]                      # no IPv6 here
            first.server_close()
            if port:
                raise
    raise OSError(errno.EADDRINUSE, "no port is free on both 127.0.0.1 and ::1")


# ---- Simulated upstream ------------------------------------------------------------------------------
# A small server on loopback that speaks the Messages API, for `start --demo`; it says what is simulated.

SIMULATED = "This is a simulated answer: the gateway runs in demo mode, and no model was asked. "
HOLD = "(simulation: begin an answer and never end it)"      # as the prompt of a request, for `selftest`
# Type of a block -> what of it is streamed, in deltas of which type, as which field of them
SIMULATED_DELTAS = {"text": ("text", "text_delta", "text"), "thinking": ("thinking", "thinking_delta", "thinking"),
                    "tool_use": ("input", "input_json_delta", "partial_json")}


def simulated_message(request: dict, usage: dict) -> dict:
    """A JSON sample, a tool call, or a sentence about what was sent."""
    last = [message["content"] for message in request["messages"] if message["role"] == "user"][-1]
    results = [block for block in last if block["type"] == "tool_result"]
    tools = [tool for tool in request.get("tools", ()) if "input_schema" in tool]
    choice = request.get("tool_choice", {})
    schema = value_in(request, "output_config", "format", "schema")
    asked = json_asked_for(last) if schema is None else schema
    thinking = {"type": "thinking", "thinking": "(simulated thinking)", "signature": "c2ltdWxhdGVk"}
    blocks: list[dict] = [thinking] * (value_in(request, "thinking", "display") == "summarized")
    calls = choice.get("type") in ("any", "tool") or not results and choice.get("type") != "none"
    if schema is None and tools and calls:
        tool = next((tool for tool in tools if tool["name"] == choice.get("name")), tools[0])
        blocks.append({"type": "tool_use", "id": "toolu_" + secrets.token_hex(8), "name": tool["name"],
                       "input": sample_of(tool["input_schema"], tool["input_schema"])})
    else:
        summary = summary_of(last, results)
        sample = sample_of(asked, asked) if asked else {"simulated": True, "answer": summary}
        blocks.append({"type": "text", "text": SIMULATED + summary if asked is None else json.dumps(sample)})
    return {"id": "msg_" + secrets.token_hex(8), "type": "message", "role": "assistant", "model": request["model"],
            "content": blocks, "stop_reason": "tool_use" if blocks[-1]["type"] == "tool_use" else "end_turn",
            "stop_sequence": None, "usage": dict(usage, output_tokens=about_tokens(blocks), service_tier="standard")}


def simulated_usage(request: dict, seen: Bounded) -> dict:
    """Made-up counts of a prompt: what was `seen` is as if read from the cache, if there are cache marks."""
    turns = [block for message in request["messages"] for block in message["content"]]
    prompt = [*request.get("tools", ()), *listed(request.get("system")), *turns]
    if "cache_control" not in json.dumps(request):
        return {"input_tokens": sum(map(about_tokens, prompt)), "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0}
    read, so_far, digest = 0, 0, hashlib.sha256(str(request["model"]).encode())
    for part in prompt:
        digest.update(json.dumps(without(part, "cache_control")).encode())
        so_far += about_tokens(part)
        read = so_far if seen.get(digest.hexdigest()) else read
        seen.put(digest.hexdigest(), True)
    return {"input_tokens": 0, "cache_creation_input_tokens": so_far - read, "cache_read_input_tokens": read}


def json_asked_for(content: list[dict]) -> dict | None:
    """The schema that a turn asks for in its text; {}: any object, None: no JSON."""
    texts = [block["text"] for block in content if block["type"] == "text"]
    if not texts or not texts[-1].startswith(JSON_ONLY):
        return None
    with suppress(ValueError, RecursionError):
        return dict(json.JSONDecoder().raw_decode(texts[-1], texts[-1].index("{"))[0])
    return {}


def about_tokens(value: Any) -> int:
    return len(json.dumps(value)) // 4 + 1


def summary_of(content: list[dict], results: list[dict]) -> str:
    """One sentence on what the last message contains."""
    if results:
        return "The tool's result arrived: %s" % json.dumps(results[-1].get("content", ""))[:200]
    images = [block["source"] for block in content if block["type"] == "image"]
    if images:
        return "You sent %d image(s), the first one %s." % (len(images), images[0].get("media_type", "by its address"))
    texts = [block["text"] for block in content if block["type"] == "text"]
    return "You wrote: %s" % (texts[0][:200] if texts else "(nothing)")


def sample_of(schema: Any, root: dict, depth: int = 0) -> Any:
    """A small value that fits a JSON schema, more or less."""
    if not isinstance(schema, dict) or depth > 20:
        return "simulated"
    given = [schema[key] for key in ("const", "default") if key in schema] or schema.get("enum")
    if given:
        return given[0]
    inner = [schema[key][0] for key in ("anyOf", "allOf") if schema.get(key)]
    if isinstance(schema.get("$ref"), str) or inner:
        return sample_of(inner[0] if inner else resolved(schema["$ref"], root), root, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        properties = schema.get("properties") or {}
        return {name: sample_of(value, root, depth + 1) for name, value in properties.items()
                if name in (schema.get("required") or properties)}
    if kind == "array":
        return [sample_of(schema.get("items"), root, depth + 1)]
    return {"integer": 1, "number": 1.5, "boolean": True, "null": None}.get(kind, "simulated")


def simulated_events(message: dict) -> Iterator[dict]:
    """The events that stream a message, its text word by word."""
    for event in events_from_message(message):
        block = event.get("content_block", {})
        if block.get("type") not in SIMULATED_DELTAS:
            yield event
            continue
        field, kind, name = SIMULATED_DELTAS[block["type"]]
        whole, nothing = (json.dumps(block["input"]), {}) if field == "input" else (block[field], "")
        yield dict(event, content_block=dict(block, **{field: nothing}))
        for piece in re.findall(r"\s*\S+|\s+", whole):
            yield {"type": "content_block_delta", "index": event["index"], "delta": {"type": kind, name: piece}}


class SimulatedHandler(http.server.BaseHTTPRequestHandler):
    """GET is /v1/models, an empty list, so that the built-in table holds; POST is /v1/messages or its count_tokens."""
    server: SimulatedUpstream
    protocol_version = "HTTP/1.1"
    wbufsize = -1                                   # head and body leave in one packet

    def do_GET(self) -> None:
        self._send("application/json", client_json({"data": [], "has_more": False, "last_id": None}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            request = json.loads(body.decode())
            for message in request["messages"]:
                if isinstance(message["content"], str):
                    message["content"] = [{"type": "text", "text": message["content"]}]
            usage = simulated_usage(request, self.server.seen)
            answer = simulated_message(request, usage)
        except (LookupError, TypeError, AttributeError, ValueError) as fault:
            refusal = InvalidRequest("The simulation cannot read this request: %s: %s" % (type(fault).__name__, fault))
            self._send("application/json", client_json(refusal.for_anthropic()[2]), 400)
            return
        if self.path.endswith("/count_tokens"):
            self._send("application/json", client_json({"input_tokens": sum(usage.values())}))
        elif not request.get("stream"):
            self._send("application/json", client_json(answer))
        elif any(block.get("text") == HOLD for block in request["messages"][-1]["content"]):
            self._send("text/event-stream", named_event(next(simulated_events(answer))), more=1_000)
            self.wfile.flush()
            with suppress(OSError):
                self.connection.recv(1)             # until the gateway closes the connection
            self.server.abandoned.set()
            self.close_connection = True
        else:
            self._send("text/event-stream", b"".join(map(named_event, simulated_events(answer))))

    def _send(self, kind: str, body: bytes, status: int = 200, more: int = 0) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body) + more))
        self.send_header("request-id", "req_simulated_" + secrets.token_hex(6))
        for window, seconds, used in (("5h", 18_000, "0.37"), ("7d", 604_800, "0.61")):     # of a made-up plan
            reset = "%d" % ((time.time() // seconds + 1) * seconds)
            for name, value in (("utilization", used), ("status", "allowed"), ("reset", reset)):
                self.send_header("anthropic-ratelimit-unified-%s-%s" % (window, name), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """The gateway logs for both."""


class SimulatedUpstream(socketserver.ThreadingTCPServer):
    """The server; `url` is what ANTHROPIC_BASE_URL would be."""
    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self) -> None:
        self.abandoned = threading.Event()          # the gateway closed the connection amid a reply
        self.seen = Bounded(10_000)                 # digests of all that prompts have begun with
        super().__init__(("127.0.0.1", 0), SimulatedHandler)
        self.url = "http://127.0.0.1:%d" % self.server_address[1]
        threading.Thread(target=self.serve_forever, name="simulated upstream", daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        failure = sys.exc_info()[1]
        if not isinstance(failure, OSError):        # one of the gateway, which closed the connection
            LOG.error("the simulation failed: %s: %s", type(failure).__name__, failure)


def demo_config(config: Config, url: str) -> Config:
    """The same gateway in front of the simulated upstream, without a real credential or address."""
    return replace(config, base_url=url, anthropic_api_key="no-key-needed", anthropic_auth_token="",
                   claude_code_oauth_token="", token_file="", auth="auto", https_proxy="")


# ---- Log ---------------------------------------------------------------------------------------------
# The log of the program, on standard error: as text or as JSON, without secrets.


def wants_colour(stream: Any) -> bool:
    """NO_COLOR and FORCE_COLOR win; else a terminal that is not dumb."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return os.environ["FORCE_COLOR"].lower() not in ("0", "false")
    return bool(getattr(stream, "isatty", bool)()) and os.environ.get("TERM") != "dumb" and os.name != "nt"


def columns_of_terminal(stream: Any = None) -> int:
    """The width of the terminal that a stream, or else standard error, is; 0 where it is none."""
    with suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size((stream or sys.stderr).fileno()).columns
    return 0


@functools.lru_cache(maxsize=1)
def clock_time(second: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(second))


WHOLE_LINE = 185                                    # columns of a request's line with Claude's request id


class LogFormatter(logging.Formatter):
    """One line per entry, as text or JSON; secrets are masked, long base64 in payloads is cut."""

    def __init__(self, secrets_known: Callable[[], list[str]], as_json: bool, colour: bool = False,
                 with_names: bool = False, columns: Callable[[], int] | None = None) -> None:
        super().__init__()
        self._secrets, self.as_json, self._colour, self._with_names = secrets_known, as_json, colour, with_names
        self._columns = columns                     # of the terminal, None where there is none

    def format(self, record: logging.LogRecord) -> str:
        fields: Any = getattr(record, "fields", None)       # of a request
        columns = self._columns() if fields and self._columns and not self.as_json else 0
        if 0 < columns < WHOLE_LINE:
            record = logging.makeLogRecord(dict(vars(record), msg="%s", args=(short_line(fields),)))
        if not isinstance(record.args, dict):
            message = masked(as_typed(super().format(record) if record.exc_info else record.getMessage()),
                             self._secrets())
        else:                                       # cut last: the beginning of a secret is not recognised
            message = str(record.msg).replace("%s", json.dumps(record.args, ensure_ascii=False))
            message = re.sub(r"[A-Za-z0-9+/=_-]{400,}", lambda match: match.group()[:60] + "...",
                             masked(message, self._secrets()))
        if not self.as_json:
            return self._text_line(record, message)
        entry = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": message}
        fields = {name: masked(value, self._secrets()) if isinstance(value, str) else value
                  for name, value in (fields or {}).items() if name not in ("started", "owner")}
        return json.dumps(dict(fields, **entry))

    def _text_line(self, record: logging.LogRecord, message: str) -> str:
        """Time and message, which only with a traceback has several lines; failures are red, refusals yellow."""
        if self._with_names and record.threadName and record.threadName.startswith(LOG_NAME):
            message = "[%s] %s" % (record.threadName[len(LOG_NAME):], message)
        moment = clock_time(int(record.created))
        message = "\n    ".join(map(visible, message.split("\n"))) if record.exc_info else visible(message)
        if not self._colour:
            return "%s %s" % (moment, message)
        status = getattr(record, "fields", {}).get("status", 0)
        if record.levelno >= logging.ERROR or status >= 500:
            message = "\x1b[31m%s\x1b[0m" % message
        elif record.levelno == logging.WARNING or status >= 400:
            message = "\x1b[33m%s\x1b[0m" % message
        return "\x1b[2m%s\x1b[0m %s" % (moment, message)


def set_up_log(config: Config, secrets: Callable[[], list[str]] | None = None) -> None:
    """Sends the log to standard error, at the level that the options ask for; without these secrets."""
    handler = logging.StreamHandler(sys.stderr)
    columns = columns_of_terminal if columns_of_terminal() and not config.minimal else None
    handler.setFormatter(LogFormatter(secrets or config.secrets, config.log_format == "json", wants_colour(sys.stderr),
                                      config.verbose, columns))
    LOG.handlers = [handler]
    LOG.propagate = False
    LOG.setLevel(logging.CRITICAL + 1 if config.quiet else logging.DEBUG if config.verbose else logging.INFO)


# ---- Terminal ----------------------------------------------------------------------------------------
# What commands print: data goes to standard output, messages for the user to standard error.

# exit codes
OK, FAILURE, USAGE, NO_CREDENTIAL, PORT_IN_USE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


class UsageError(Exception):
    """Invalid flags or environment.  `setting`: the flag or variable at fault, if it is one."""

    def __init__(self, message: str, setting: str = "") -> None:
        super().__init__("%s: %s" % (setting, message) if setting else message)
        self.setting = setting


def prepare_output() -> None:
    """Makes standard output and error accept whatever is printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:                          # closed by the parent process; pythonw on Windows has neither
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):        # a character that a terminal lacks must not stop a print
            stream.reconfigure(errors="backslashreplace")


def say(text: str, level: int = logging.INFO) -> None:
    """A message for the user, on standard error; where the log is JSON, an entry of it."""
    text = as_typed(text)
    level = logging.WARNING if text.startswith("Warning: ") else level
    for handler in LOG.handlers:
        if isinstance(handler.formatter, LogFormatter) and handler.formatter.as_json:
            handler.handle(LOG.makeRecord(LOG.name, level, "", 0, "%s", (text,), None))
            return
    print(for_terminal(text), file=sys.stderr, flush=True)


def for_terminal(text: str) -> str:
    """Text that cannot control a terminal, with its lines and tabs."""
    return re.sub(r"[^\n\t]+", lambda plain: visible(plain.group()), text)


def given_to(path: str | None, example: str) -> bytes:
    """The bytes of the file, or of standard input ("-").  Raises UsageError, with the example."""
    source = None if path in (None, "-") else path
    if not source and sys.stdin and sys.stdin.isatty():
        say("Reading from the terminal; Ctrl-D ends it (on Windows Ctrl-Z and Enter).")
    data = b""
    try:
        if source:
            with open(source, "rb") as file:
                data = file.read()
        elif sys.stdin:
            data = sys.stdin.buffer.read()
    except OSError as fault:
        raise UsageError("%s: %s" % (source or "standard input", fault.strerror or fault)) from fault
    if not data.strip():
        state = "empty" if source or sys.stdin else "closed"
        raise UsageError("%s is %s; for example: claude-gateway %s" % (source or "Standard input", state, example))
    return data


def print_json(value: Any) -> None:
    """As UTF-8 where the output is that, else escaped; valid JSON that controls no terminal."""
    text = json.dumps(value, indent=1, ensure_ascii="utf" not in str(sys.stdout.encoding).lower())
    print(re.sub("(?!\n)" + UNSAFE_IN_LOG.pattern, lambda unsafe: json.dumps(unsafe.group())[1:-1], text))


def lines_within(text: str, columns: int, indent: int = 13) -> str:
    """Lines broken between words to fit a terminal (0: none), which go on with an indent."""
    return "\n".join(textwrap.fill(line, columns, subsequent_indent=" " * indent, break_long_words=False,
                                   break_on_hyphens=False) if columns else line for line in text.split("\n"))


def in_columns(sides: str, rows: Iterable[Sequence[str]]) -> str:
    """A table; the texts of each column stand at its side "<" or ">"."""
    rows = [[*map(visible, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map("{:{}{}}".format, row, sides, widths)).rstrip() for row in rows)


def moment_text(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration_text(seconds: float) -> str:
    """Two units of a time: 2 d 3 h, 7 h 59 min, 4 min, 30 s."""
    days, hours, minutes = int(seconds // 86_400), int(seconds // 3_600 % 24), int(seconds // 60 % 60)
    units = [(days, "d"), (hours, "h")] if days else [(hours, "h"), (minutes, "min")]
    return " ".join("%d %s" % unit for unit in units if unit[0]) or "%d s" % seconds


def expiry_text(expires_at: float, refreshable: bool) -> str:
    """When a token expires, and whether it is renewed."""
    moment, left = moment_text(expires_at), expires_at - time.time()
    if left > 0:
        return "%s (in %s)%s" % (moment, duration_text(left), ", renewed automatically" * refreshable)
    return "%s (expired%s)" % (moment, "; it is renewed at the next request" * refreshable)


# ---- Options -----------------------------------------------------------------------------------------
# The options of `start`, each with its environment variable, and the Config that they make.


class Option(NamedTuple):
    """One option of `start`; its environment variable is CLAUDE_GATEWAY_ and its name."""
    name: str
    help: str
    short: str = ""
    metavar: str = ""                               # "" = a switch
    repeatable: bool = False
    choices: Sequence[str] = ()
    read: Callable[[Any, str], Any] = anything      # its value from a text; the second argument names the setting

    @property
    def field(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return "CLAUDE_GATEWAY_" + self.field.upper()


def value_reader(pattern: str, expected: str, value_of: Callable[[Any], Any] = lambda match: match.groups()) -> Any:
    """Reads a text as what `value_of` makes of the pattern's match."""
    def read(text: str, setting: str) -> Any:
        match = re.match(pattern, text.strip())
        if not match:
            raise UsageError("expected %s, got %r." % (expected, text), setting)
        return value_of(match)
    return read


def fallbacks_from(text: str, setting: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    try:
        for name in names if names != ("default",) else ():
            Catalog().resolve(name)
    except GatewayError as unknown:
        raise UsageError(str(unknown), setting) from unknown
    return names


def port_from(text: str, setting: str) -> int:
    if not re.match(r"\d{1,5}\Z", text.strip()) or int(text) > 65_535:
        raise UsageError("expected a number from 0 to 65535, got %r." % text, setting)
    return int(text)


OPTIONS = (
    Option("port", "port of the gateway; 0: any free one (default: %d)" % DEFAULT_PORT, "p", "PORT", read=port_from),
    Option("host", "address to listen on (default: localhost); others require an API key", "", "ADDRESS", True),
    Option("api-key", "API key that clients have to send; better set in the environment", "", "KEY", True,
           read=value_reader(r"(?s).+", "a key that is not empty", lambda match: match.group())),
    Option("verbose", "log requests and replies in full, secrets masked", "V"),
    Option("minimal", "log method, path, status and time only", "m"),
    Option("quiet", "log nothing", "q"),
    Option("log-format", "text or json (default: text)", "", "FORMAT", choices=("text", "json")),
    Option("auth", "auto, api-key or oauth (default: auto)", "", "KIND", choices=("auto", "api-key", "oauth")),
    Option("token-file", "file of the stored login (default: in the user's configuration directory)", "", "PATH"),
    Option("alias", "use MODEL where a request names NAME; '*' is every other name, or none", "", "NAME=MODEL", True,
           read=value_reader(r"([^=]*[^=\s])\s*=\s*(\S.*)", "NAME=MODEL")),
    Option("allow-host", "also accept this name in the Host header", "", "NAME", True),
    Option("cors-origin", "also accept web pages of this origin; '*' requires an API key", "", "ORIGIN", True,
           # as browsers send them, which is without a slash at the end
           read=value_reader(r"(?i)([a-z][a-z0-9+.-]*://[^/\s?#@]+|null|\*)/*\Z",
                             "an origin like https://app.example.com", lambda match: match.group(1).lower())),
    Option("relax-x509", "clear the strict X.509 flag of Python 3.13+; certificates are still verified"),
    Option("no-cache", "add no prompt cache breakpoints"),
    Option("strict", "answer 400 instead of dropping, clamping or changing anything"),
    Option("fallback", "models that answer what the requested one refuses, with commas, or `default`", "", "MODELS",
           read=fallbacks_from),
    Option("budget", "refuse a client key that has cost this; USD/day, USD/week or USD/month", "", "USD/PERIOD", True,
           read=value_reader(r"(\d{1,9}(?:\.\d+)?)/(day|week|month)\Z", "USD/day, USD/week or USD/month",
                             lambda match: (float(match.group(1)), match.group(2)))),
    Option("plan-only", "refuse requests while a window of the plan is used up, rather than pay extra usage"),
    Option("no-usage", "keep no file of the usage by day"),
    Option("demo", "answer from a built-in simulation: no account, no network"),
)


def checked_credential(text: str, variable: str) -> str:
    """A key, token or id without the blanks that pasting leaves; it must fit into a header."""
    if not is_sendable(text.strip()):
        raise UsageError("contains characters that are not allowed in a key or token.", variable)
    return text.strip()


SECRET_VARIABLES = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN")
# What cannot work, with the variable before it
DOUBTFUL = (
    (r"ANTHROPIC_API_KEY=sk-(?!ant-)", "looks like a key of OpenAI; Claude's keys begin with sk-ant-"),
    (r"ANTHROPIC_API_KEY=sk-ant-oat", "is an OAuth token: set CLAUDE_CODE_OAUTH_TOKEN instead"),
    (r"CLAUDE_CODE_OAUTH_TOKEN=sk-ant-api", "is an API key: set ANTHROPIC_API_KEY instead"),
    (r"\w+=(?=[\"'`]|.*[\"'`]$)", "begins or ends with a quotation mark, which is taken for a part of it"),
    (r"\w+=$", "is set but empty, and is ignored"))


def doubtful_credentials(environment: dict[str, str]) -> list[str]:
    """What looks wrong about the keys and tokens in the environment."""
    return ["%s %s." % (variable, problem) for variable in SECRET_VARIABLES for pattern, problem in DOUBTFUL
            if variable in environment and re.match(pattern, "%s=%s" % (variable, environment[variable].strip()))]


def headers_from(lines: str, variable: str) -> tuple[tuple[str, str], ...]:
    """Lines `Name: value`; those that authenticate or frame a request are ours."""
    headers = []
    for line in filter(None, map(str.strip, lines.split("\n"))):
        match = re.match(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(\S.*)\Z", line)
        if not match or UNSENDABLE.search(match.group(2)):
            raise UsageError("expected lines like Name: value.", variable)
        if match.group(1).lower() not in RESERVED_HEADERS:
            headers.append((match.group(1).lower(), match.group(2)))
    return tuple(headers)


RESERVED_HEADERS = {"authorization", "x-api-key", "host", "connection", "content-length", "transfer-encoding", "te",
                    "trailer", "upgrade", "expect", "content-type", "content-encoding", "accept-encoding"}


def checked_base_url(url: str, variable: str) -> str:
    """An https URL, or plain http on loopback: a credential is sent there."""
    host = host_in(url)
    if not host:
        shown = "" if "@" in url else ", got %r" % url.split("?")[0]       # not a password
        raise UsageError("expected an https URL%s." % shown, variable)
    if not url.lower().startswith("https:") and not is_loopback_host(host):
        raise UsageError("plain http would expose the credential; it is allowed on loopback only.", variable)
    return url


def checked_proxy(url: str, variable: str) -> str:
    """The URL of an HTTP proxy, maybe without its scheme.  Errors do not repeat it: it may contain a password."""
    if re.match(r"socks", url, re.I):
        raise UsageError("SOCKS proxies are not supported; use an HTTP proxy.", variable)
    match = re.match(r"(?i)(https?://)?([^/]*@)?(\[[0-9a-f:.]+\]|[^][/@:\s]+)(:\d{1,5})?(/\S*)?\Z", url)
    if url and (not match or int((match.group(4) or ":0")[1:]) > 65_535):
        raise UsageError("expected a URL like http://proxy.example.com:8080.", variable)
    return url


# A switch that is off is one that is not set
SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": None, "false": None, "no": None, "off": None}


def value_from_variable(option: Option, text: str) -> Any:
    """A variable's text as the option's value: lists have commas."""
    if option.repeatable:
        return [entry.strip() for entry in text.split(",")]
    values: dict = {choice: choice for choice in option.choices} if option.metavar else SWITCH
    if values and text.lower() not in values:
        raise UsageError("expected one of %s, got %r." % (", ".join(values), text), option.variable)
    return values.get(text.lower(), text)


def in_configuration(environment: dict[str, str], *names: str) -> str:
    """A path in the user's configuration directory; "" without a home directory."""
    home = os.path.expanduser("~") if os.environ.get("HOME", "?") else ""
    bases = [environment.get("APPDATA", "")] if os.name == "nt" else [
        environment.get("XDG_CONFIG_HOME", ""), os.path.join(home, ".config")]
    # relative ones are ignored (XDG base directory specification)
    return next((os.path.join(base, *names) for base in bases if os.path.isabs(base)), "")


# Variables that are no options -> the field of the Config, and what reads them
VARIABLES: Dict[str, Tuple[str, Callable[[str, str], Any]]] = {
    "ANTHROPIC_API_KEY": ("anthropic_api_key", checked_credential),
    "ANTHROPIC_AUTH_TOKEN": ("anthropic_auth_token", checked_credential),
    "CLAUDE_CODE_OAUTH_TOKEN": ("claude_code_oauth_token", checked_credential),
    "ANTHROPIC_WORKSPACE_ID": ("workspace_id", checked_credential),
    "ANTHROPIC_CUSTOM_HEADERS": ("custom_headers", headers_from),
    "ANTHROPIC_PROFILE": ("profile", anything),
    "ANTHROPIC_BASE_URL": ("base_url", lambda url, name: re.sub(r"(/v1)?/*\Z", "", checked_base_url(url, name))),
    "CLAUDE_GATEWAY_TOKEN_URL": ("token_url", checked_base_url),
    "CLAUDE_GATEWAY_AUTHORIZE_URL": ("authorize_url", checked_base_url),
    "CLAUDE_GATEWAY_OAUTH_SCOPES": ("oauth_scopes", anything),
}
LOG_LEVELS = ("verbose", "minimal", "quiet")          # one at most
LEVEL_VARIABLES = ["CLAUDE_GATEWAY_" + name.upper() for name in LOG_LEVELS]
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
OFFLINE = {"setup", "translate", "logout", "usage", "completion", "selftest"}      # commands that connect to nothing


def option_values(parsed: Namespace, given: Dict[str, str], offline: bool) -> dict:
    """The options that are set, by their fields: flags over variables; `offline`: only those of the command."""
    if any(getattr(parsed, name, None) for name in LOG_LEVELS):     # a flag for the level overrides each variable
        given = without(given, *LEVEL_VARIABLES)
    fields: dict = {}
    for option in OPTIONS:
        value, setting = getattr(parsed, option.field, None), "--" + option.name
        if value is None and option.variable in given and (hasattr(parsed, option.field) or not offline):
            setting = option.variable
            value = value_from_variable(option, given[setting])
        if value is not None and option.repeatable:
            fields[option.field] = tuple(option.read(text, setting) for text in value)
        elif value is not None:
            fields[option.field] = option.read(value, setting)
    return fields


def config_from(parsed: Namespace, environment: Dict[str, str]) -> Config:
    """Flags over environment over defaults; an offline command reads its own options only.  Raises UsageError."""
    given = {name: value for name, value in environment.items() if value.strip()}      # empty counts as unset
    offline = parsed.command in OFFLINE
    fields = option_values(parsed, given, offline)
    fields["host"], *more_hosts = dict.fromkeys(fields.get("host", ["localhost"]))
    fields["more_hosts"] = tuple(more_hosts)
    levels = [name for name in LOG_LEVELS if fields.get(name)]
    if len(levels) > 1:
        raise UsageError("--%s and --%s exclude each other." % tuple(levels[:2]))
    fields["token_file"] = os.path.expanduser(fields.get("token_file") or in_configuration(
        given, "claude-gateway", "oauth-tokens.json"))
    if fields["token_file"] and not fields.get("no_usage") and not fields.get("demo"):
        fields["usage_file"] = os.path.join(os.path.dirname(fields["token_file"]), "usage.json")
    if fields.get("demo") or offline:               # ignores credentials, addresses and proxies, also bad ones
        return Config(**fields)
    ca_variable = next((name for name in CA_VARIABLES if name in given), "")
    proxy_variable = next((name for name in ("https_proxy", "HTTPS_PROXY") if name in given), "")
    for variable, (field, reader) in VARIABLES.items():
        if variable in given:
            fields[field] = reader(given[variable], variable)
    fields.update(profile_folder=given.get("ANTHROPIC_CONFIG_DIR") or in_configuration(
                      without(given, "XDG_CONFIG_HOME"), "Anthropic" if os.name == "nt" else "anthropic"),
                  https_proxy=checked_proxy(given.get(proxy_variable, ""), proxy_variable),
                  no_proxy=given.get("no_proxy") or given.get("NO_PROXY", ""),
                  ca_file=given.get(ca_variable, ""), ca_variable=ca_variable)
    return Config(**fields)


def doubtful_settings(environment: dict[str, str], config: Config) -> Iterator[tuple[str, str]]:
    """What cannot work or has no effect -> what to do instead."""
    for problem in doubtful_credentials(environment):
        yield problem, "Correct or unset the variable."
    for name, target in config.alias:
        try:
            Catalog().resolve(target)
        except GatewayError:
            yield "--alias %s=%s: unknown model; requests for it will fail unless Claude's own list has it." % (
                name, target), "Nearest: %s." % ", ".join(Catalog().nearest(target.lower()))
    ignored, known = "%s is set, and is ignored.", [option.variable for option in OPTIONS] + list(VARIABLES)
    for name in sorted(environment):
        if name.startswith("CLAUDE_GATEWAY_") and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            yield ignored % name, "Did you mean %s?" % nearest[0] if nearest else "See claude-gateway start --help."
    if config.https_proxy or config.demo:
        return
    found = [name for name in ("ALL_PROXY", "HTTP_PROXY") if environment.get(name) or environment.get(name.lower())]
    system = urllib.request.getproxies().get("https")           # of macOS or Windows, where no variable is set
    if system and system not in os.environ.values():
        found.append("the system's proxy %s" % shown_proxy(replace(config, https_proxy=system)))
    for name in found:
        yield ignored % name, "For an HTTP proxy set HTTPS_PROXY; SOCKS proxies are not supported."


# ---- Diagnosis ---------------------------------------------------------------------------------------
# `doctor` checks the machine, the way to Claude and the credential.


class Finding(NamedTuple):
    """The result of a check; `step`: what to do where it is not ok; `code`: a failure's exit code."""
    name: str
    detail: str
    step: str = ""
    code: int = OK

    @property
    def level(self) -> str:
        return "failed" if self.code else "warning" if self.step else "ok"


@contextmanager
def local_answer(config: Config, body: dict | None = None, key: str = "", timeout: float = 5,
                 path: str = "/") -> Iterator[http.client.HTTPResponse]:
    """What this machine's port answers to GET, or to a chat completion request."""
    host = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    headers = {"accept": "application/json", "user-agent": "ask" if body else "claude-gateway"}
    if key:
        headers["authorization"] = "Bearer " + key
    with closing(http.client.HTTPConnection(host, config.port, timeout=timeout)) as connection:
        connection.request("POST" if body else "GET", "/v1/chat/completions" if body else path,
                           json.dumps(body) if body else None, headers)
        yield connection.getresponse()


def running_status(config: Config, key: str = "", path: str = "/") -> dict | None:
    """The status of the gateway on this machine's port, or its answer at `path`; None: no listener, {}: another."""
    try:
        with local_answer(config, key=key, path=path) as response:
            status = json.loads(response.read(1_000_000).decode())
    except (ConnectionRefusedError, socket.gaierror):
        return None
    except (OSError, ValueError, http.client.HTTPException):
        return {}
    is_ours = path != "/" or value_in(status, "status") == "ok" and value_in(status, "version")
    return status if isinstance(status, dict) and is_ours else {}


def port_finding(config: Config) -> Finding:
    """Whether the port is free; a gateway that is running there is fine, too."""
    if running_status(config):
        return Finding("Port", "%d: a gateway is running there" % config.port)
    host = "127.0.0.1" if config.host == "localhost" else config.host
    try:
        family = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, config.port), family=family).close()
    except OSError as fault:
        host = "" if config.host == "localhost" else " --host " + config.host
        return Finding("Port", "%d: %s" % (config.port, str(fault.strerror or fault).split(" (while ")[0]),
                       "claude-gateway start --port %d%s" % (config.port % 65_535 + 1, host), PORT_IN_USE)
    return Finding("Port", "%d is free" % config.port)


def authorities_finding(config: Config) -> Finding:
    """Whose certificates are trusted."""
    step = "Install the package ca-certificates, or name a file in SSL_CERT_FILE."
    if sys.platform == "darwin":
        step = 'Run "/Applications/Python %d.%d/Install Certificates.command".' % sys.version_info[:2]
    try:
        context = tls_context(config.ca_file, config.relax_x509)
    except (UpstreamFault, OSError) as fault:       # OSError: PyPy, where the system has no authorities
        step = "Correct the path in %s." % config.ca_variable if config.ca_variable else step
        return Finding("Certificates", str(fault), step, FAILURE)
    count = context.cert_store_stats()["x509_ca"]
    directory = ssl.get_default_verify_paths().capath       # those in there are read when they are needed
    if not count and not (directory and os.listdir(directory)):
        return Finding("Certificates", "no certificate authorities", step)
    detail = "1 authority" if count == 1 else "%d authorities" % count
    if config.ca_file:
        detail += ", with those of %s (%s)" % (config.ca_file, config.ca_variable)
    is_strict = context.verify_flags & getattr(ssl, "VERIFY_X509_STRICT", 0)
    return Finding("Certificates", detail + ", strict X.509 rules" * bool(is_strict))


def machine_findings(config: Config) -> Iterator[Finding]:
    """What can be checked without a network."""
    yield Finding("Python", "%s, %s, %s" % (sys.version.split()[0], ssl.OPENSSL_VERSION, sys.platform))
    origin = "not from a file of its own"
    if own_file():
        with open(own_file(), "rb") as file:
            origin = "sha256 " + hashlib.sha256(file.read()).hexdigest()
    yield Finding("File", "claude-gateway %s, %s" % (VERSION, origin))
    yield port_finding(config)
    proxy = shown_proxy(config) if config.https_proxy else "none"
    if config.https_proxy and not is_proxied(config, urllib.parse.urlsplit(config.base_url).netloc):
        proxy += ", but not for the upstream: it is in NO_PROXY, or on this machine"
    yield Finding("Proxy", proxy)
    yield authorities_finding(config)


def step_for_fault(message: str) -> str:
    """What to do next where the upstream could not be reached."""
    if "--relax-x509" in message:
        return "claude-gateway start --relax-x509"
    if "authority is unknown" in message:
        return "SSL_CERT_FILE=/path/to/the/company-ca.pem claude-gateway doctor"
    return "Check the network, HTTPS_PROXY and ANTHROPIC_BASE_URL."


def issuer_of(host: str, port: int) -> str:
    """Who issued a host's certificate; a second handshake trusts just that, as only then ssl parses it."""
    with suppress(OSError, ValueError):
        context = ssl.create_default_context(cadata=ssl.get_server_certificate((host, port)))
        context.check_hostname = False
        context.verify_flags = ssl.VerifyFlags(0x80000)             # VERIFY_X509_PARTIAL_CHAIN, named since 3.10
        with socket.create_connection((host, port), CONNECT_TIMEOUT) as plain, \
                context.wrap_socket(plain, server_hostname=host) as secured:
            certificate: dict = secured.getpeercert() or {}
            issuer = dict(name[0] for name in certificate["issuer"])
            return issuer.get("organizationName") or issuer.get("commonName", "")
    return ""


def clock_finding(date: str) -> Finding:
    """This machine's clock against the upstream's; tokens expire by it."""
    try:
        skew = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return Finding("Clock", "the upstream sent no Date header", "Check this machine's clock yourself.")
    if abs(skew) > 60:
        return Finding("Clock", "%+d seconds off the upstream's" % skew, "Set the clock by NTP.")
    return Finding("Clock", "within a minute of the upstream's")


def network_findings(config: Config, upstream: Upstream) -> Iterator[Finding]:
    """The way to Claude: name, connection, certificate, clock, up to the first that fails."""
    parts = urllib.parse.urlsplit(config.base_url)
    host, port = address_of(parts.netloc, 443 if parts.scheme == "https" else 80)
    proxied = is_proxied(config, parts.netloc)
    if not proxied:
        try:
            found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        except OSError as fault:
            yield Finding("DNS", "%s: %s" % (host, fault.strerror or fault),
                          "Check the network; if a proxy is required, set HTTPS_PROXY.", UNREACHABLE)
            return
        yield Finding("DNS", "%s is %s" % (host, ", ".join(sorted(map(str, found))[:3])))
    started = time.monotonic()
    try:
        headers = upstream.probe()
    except GatewayError as fault:
        detail = "%s port %d%s: %s" % (host, port, " by the proxy" * proxied, fault)
        issuer = "" if proxied or parts.scheme != "https" else issuer_of(host, port)
        if issuer:
            detail += " The certificate was issued by %s." % issuer
        yield Finding("Upstream", detail, step_for_fault(str(fault)), UNREACHABLE)
        return
    detail = "%s answered within %d ms" % (config.base_url, (time.monotonic() - started) * 1000)
    if headers.get("server", "").startswith("claude-gateway"):
        yield Finding("Upstream", detail + ", and is a claude-gateway itself",
                      "Unset ANTHROPIC_BASE_URL, unless one gateway is meant to call another.")
    else:
        yield Finding("Upstream", detail)
    yield clock_finding(headers.get("date", ""))


def credential_findings(config: Config, upstream: Upstream) -> Iterator[Finding]:
    """Which credential there is, as far as it is known without a request to Claude."""
    try:
        credential = upstream.credential = credential_from_config(config, upstream.post_json)
    except GatewayError as fault:
        yield Finding("Credential", str(fault), "claude-gateway login", NO_CREDENTIAL)
        return
    if credential is None:
        yield Finding("Credential", "none", "claude-gateway login --api-key", NO_CREDENTIAL)
        return
    facts = credential.facts()
    detail, expires_at, renewed = facts["description"], facts.get("expires_at"), bool(facts.get("refreshable"))
    if expires_at:
        detail += ", token expires: " + expiry_text(expires_at, renewed)
    if expires_at and expires_at < time.time() and not renewed:
        yield Finding("Credential", detail, "claude-gateway login", NO_CREDENTIAL)
        return
    yield Finding("Credential", detail)
    if credential.preamble:
        yield Finding("Terms", OWN_APPS_ONLY, "An API key is always fine.")


OWN_APPS_ONLY = "Anthropic's terms allow this kind of token in its own apps only"
REFUSED_STEPS = {"api_key": "Check ANTHROPIC_API_KEY at https://platform.claude.com",
                 "bearer_token": "Renew the token in the variable, or unset it.", "oauth": "claude-gateway login",
                 "profile": "ant auth login"}


def acceptance_finding(upstream: Upstream) -> Finding:
    """Whether Claude accepts the credential."""
    try:
        return Finding("Accepted", "Claude lists %d models for it" % len(upstream.models() or []))
    except GatewayError as fault:
        step, code = "Try again later." if isinstance(fault, ClaudeError) else step_for_fault(str(fault)), OK
        if WORKSPACE_HINT in str(fault):
            step, code = "export ANTHROPIC_WORKSPACE_ID=wrkspc_...", NO_CREDENTIAL
        elif fault.status in (401, 403) and upstream.credential:
            step, code = REFUSED_STEPS[upstream.credential.facts()["kind"]], NO_CREDENTIAL
        return Finding("Accepted", str(fault), step, code)


def live_findings(config: Config, credential: Credential) -> Iterator[Finding]:
    """Two equal prompts: a short reply, and whether the second one reads what the first wrote to the cache."""
    filler = "This sentence makes the prompt long enough to be cached. " * 550
    body = {"model": "haiku", "max_tokens": 16, "messages": [
        {"role": "system", "content": filler}, {"role": "user", "content": "Answer with the word ok."}]}
    answers: List[Any] = []
    with closing(Gateway(config, credential)) as gateway:
        try:
            for incoming in (Incoming(body), Incoming(body)):
                try:
                    answers.append(chat_completions(gateway, incoming).body)
                finally:
                    close_all(incoming.held)
        except GatewayError as fault:
            yield Finding("Live call", str(fault), "See Claude's message.", UNREACHABLE)
            return
    text, usage = answers[0]["choices"][0]["message"]["content"] or "", answers[1]["usage"]
    yield Finding("Live call", "%s answered %s" % (answers[0]["model"], json.dumps(text[:40])))
    read = usage["prompt_tokens_details"]["cached_tokens"]
    step = "" if read else "Run this again; if nothing is read then, the upstream does not cache."
    yield Finding("Cache", "%d of %d tokens read" % (read, usage["prompt_tokens"]), step)


# The checks that are skipped where one before them fails, as `doctor` then reports
LATER_CHECKS = {"Upstream": "the connection", "Clock": "the clock", "Accepted": "whether Claude accepts the credential",
                "Live call": "the live calls"}


def findings(config: Config, live: bool) -> Iterator[Finding]:
    """All checks of `doctor`, each building on those before it, and which ones were skipped."""
    levels: Dict[str, str] = {}

    def noted(found: Iterable[Finding]) -> Iterator[Finding]:
        for finding in found:
            levels[finding.name] = finding.level
            yield finding
    with closing(Upstream(config, "")) as upstream:
        yield from noted(machine_findings(config))
        yield from noted(network_findings(config, upstream))
        yield from noted(credential_findings(config, upstream))
        if levels.get("Upstream", "failed") != "failed" and levels["Credential"] != "failed":
            yield from noted([acceptance_finding(upstream)])
        if live and levels.get("Accepted") == "ok":
            yield from noted(live_findings(config, upstream.credential))
    skipped = [check for name, check in LATER_CHECKS.items() if name not in levels and (live or name != "Live call")]
    if skipped:
        yield Finding("Skipped", ", ".join(skipped), "Fix what failed above, then run this again.")


# ---- Selftest ----------------------------------------------------------------------------------------
# The gateway against its own simulation, without network and credential.


def selftest_findings() -> Iterator[Finding]:
    """Plain, streaming, tools, image, error, cancel: over real sockets on loopback."""
    simulated = SimulatedUpstream()
    service = Service(Gateway(demo_config(Config(host="127.0.0.1", port=0, quiet=True), simulated.url)))
    service.start()
    config = Config(host="127.0.0.1", port=service.port)
    hello = {"model": "sonnet", "messages": [{"role": "user", "content": "Hello"}]}
    tool = {"type": "function", "function": {"name": "look.up", "parameters": {
        "type": "object", "properties": {"word": {"type": "string"}}}}}
    picture = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="
    cases: Any = (                                  # name, request, status, what the answer contains
        ("plain", hello, 200, ["simulated answer"]),
        ("streaming", dict(hello, stream=True), 200, ['"finish_reason":"stop"', "data: [DONE]\n\n"]),
        ("tools", dict(hello, tools=[tool]), 200, ['"name":"look.up"', '"finish_reason":"tool_calls"']),
        ("image", dict(hello, messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": picture}}]}]), 200, ["image/gif"]),
        ("error", dict(hello, model="no-such-model"), 404, ["model_not_found"]))
    report = ("Please report this.", FAILURE)
    try:
        for name, body, expected, words in cases:
            with local_answer(config, body, timeout=10) as response:
                status, answer = response.status, response.read().decode()
            is_right = status == expected and all(word in answer for word in words)
            yield Finding(name, "") if is_right else Finding(name, "status %d: %s" % (status, answer[:300]), *report)
        with local_answer(config, dict(hello, messages=[{"role": "user", "content": HOLD}], stream=True)) as response:
            response.read(1)
            response.close()
        yield Finding("cancel", "") if simulated.abandoned.wait(5) else Finding(
            "cancel", "a client left, and its call upstream went on", *report)
    finally:
        service.close(0)
        simulated.shutdown()
        simulated.server_close()


# ---- Signing in --------------------------------------------------------------------------------------
# The sign-in with a Claude account at the terminal, for `login` and for a first `start`.

TERMS = """\
About signing in with a Claude account (Pro, Max, Team)

  Anthropic's published terms (code.claude.com, legal and compliance; page text
  of 2026-10-01) allow OAuth sign-in in Claude Code and Anthropic's other own
  apps only. Developers may not collect, store or intermediate Claude.ai
  credentials or session tokens; signing in to the unmodified Claude Code is
  left to users. Using such a token in another program, like this one, violates
  them: requests may be refused or billed as extra usage, and your account may
  be closed without notice. An API key from https://platform.claude.com is
  always fine: `claude-gateway login --api-key` stores it.

  What this program uses of Claude Code: its public OAuth client id, its
  redirect page, and one system block that such tokens are known to require.
  Its User-Agent is claude-gateway; nothing else is imitated."""

# --auth -> what to do where there is no credential that it allows
MISSING_CREDENTIAL = {
    "auto": "No credential. Set ANTHROPIC_API_KEY, or run `claude-gateway login`; `claude-gateway start --demo` needs "
            "neither.",
    "api-key": "No credential that --auth api-key allows. Set ANTHROPIC_API_KEY, or omit --auth.",
    "oauth": "No credential that --auth oauth allows. Run `claude-gateway login`, or omit --auth."}


def check_writable(path: str) -> None:
    """Reports before the sign-in that the login cannot be stored."""
    if not path:
        raise UsageError("There is no home directory to store a login in: use --token-file PATH.")
    directory = os.path.dirname(os.path.realpath(path))
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise OSError(errno.EACCES, "its directory is not writable")
    except OSError as fault:
        raise GatewayError("A login cannot be stored in %s: %s. Use another --token-file PATH." % (
            path, fault.strerror or fault)) from fault


def sign_in(config: Config, open_browser: bool) -> None:
    """The whole sign-in: terms, URL, pasted code, stored tokens."""
    check_writable(config.token_file)
    say(TERMS)
    login = Login(config.authorize_url, config.oauth_scopes)
    say("\nOpen this URL, sign in, and paste the code that the page shows:\n\n  %s\n" % login.url)
    graphical = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform in ("win32", "darwin")
    remote = os.environ.get("SSH_CONNECTION") or os.environ.get("SSH_TTY")
    if open_browser and graphical and not remote:   # there it would open elsewhere or occupy the terminal
        import webbrowser
        with suppress(Exception):
            webbrowser.open(login.url)
    with closing(Upstream(config, "")) as upstream:
        token = token_for_code(login, config, upstream)
    store(TokenFile(config.token_file), token)
    account = text_in(token, "account", "email_address")
    say("Signed in%s. Stored in %s" % (" as " + account if account else "", config.token_file))


def asked_for(prompt: str, hidden: bool = False) -> str:
    """A line of standard input, not shown on a terminal if it is a secret."""
    if hidden and sys.stdin and sys.stdin.isatty():
        import getpass
        return getpass.getpass(prompt).strip()
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline().strip() if sys.stdin else ""
    if not line:
        say("")
    return line


def token_for_code(login: Login, config: Config, upstream: Upstream, attempts: int = 3) -> dict:
    """The tokens for the pasted code; a wrong or refused one may be entered again."""
    pasted = asked_for("Code: ")
    if not pasted:
        raise CredentialNeeded("No code was entered; run `claude-gateway login` again.")
    try:
        code, checked = login.parse(pasted)
        if not checked:
            say("Warning: this code has no state, so it cannot be verified that it belongs to this sign-in.")
        return login.exchange(code, config.token_url, upstream.post_json)
    except (InvalidRequest, CredentialNeeded) as fault:
        if attempts == 1:
            raise
        say("%s. Open the URL again for a new code." % str(fault).rstrip("."))
    return token_for_code(login, config, upstream, attempts - 1)


def store(file: TokenFile, content: dict) -> None:
    with file.lock():
        try:
            file.write(content)
        except OSError as fault:
            raise GatewayError("Cannot store the login in %s: %s" % (file.path, fault.strerror or fault)) from fault


def store_key(config: Config) -> None:
    """Asks for an API key, checks it with a call that is free, and stores it."""
    check_writable(config.token_file)
    key = asked_for("API key (sk-ant-..., from https://platform.claude.com): ", hidden=True).strip("\"'`")
    if not is_sendable(key):
        raise CredentialNeeded("No API key was entered.")
    for problem in doubtful_credentials({"ANTHROPIC_API_KEY": key}):
        say("Warning: %s" % problem.replace("ANTHROPIC_API_KEY", "This"))
    with closing(Upstream(config, "")) as upstream:
        upstream.get("/v1/models?limit=1", key)
    store(key_file(config), {"api_key": key})
    say("Claude accepts this key. Stored in %s" % key_file(config).path)


# ---- Start -------------------------------------------------------------------------------------------
# The command `start`: what is checked before, what is printed, and how it ends.


def check_exposure(config: Config) -> None:
    """Refuses to listen to the network without a key: anybody could use the credential."""
    exposed = ["--host %s can be reached from other machines" % host for host in config.hosts
               if not is_loopback_host(host)]
    exposed += ["--cors-origin '*' allows every web page"] * ("*" in config.cors_origin)
    if exposed and not config.api_key:
        raise UsageError("%s: set an API key for clients in CLAUDE_GATEWAY_API_KEY first." % exposed[0])


def is_own_address(config: Config) -> bool:
    parts = urllib.parse.urlsplit(config.base_url)
    host, port = address_of(parts.netloc, 443 if parts.scheme == "https" else 80)
    return port == config.port and (is_loopback_host(host) or host in map(str.lower, config.hosts))


def gateway_with_credential(config: Config) -> Gateway:
    """A gateway that has a credential; without one it offers to sign in, or raises CredentialNeeded."""
    damage = ""
    try:
        gateway = Gateway(config)
        if gateway.upstream.credential:
            return gateway
    except FileDamaged as fault:
        damage = str(fault)
    question = "%s Sign in with a Claude account now? [y/N] " % (damage or "No credential.")
    may_ask = config.auth != "api-key" and sys.stdin and sys.stdin.isatty()
    if not may_ask or asked_for(question).lower() not in ("y", "yes"):
        raise CredentialNeeded(" ".join(filter(None, [damage, MISSING_CREDENTIAL[config.auth]])))
    sign_in(config, open_browser=True)
    return Gateway(config)


def raise_descriptor_limit() -> None:
    """Allows as many open connections as the system permits without privileges."""
    with suppress(ImportError, ValueError, OSError):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for wanted in (3 * Limits.max_connections, 10_240, 4_096):   # macOS reports no limit, and refuses 10,241
            wanted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
            if soft == resource.RLIM_INFINITY or soft >= wanted:
                return
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return


def report_port(config: Config, fault: OSError) -> int:
    """Says why the gateway cannot listen; the exit code."""
    if fault.errno in IN_USE:
        owner = " by another claude-gateway" if running_status(config) else ""
        say("Port %d is in use%s. Another port: claude-gateway start --port %d" % (
            config.port, owner, config.port % 65_535 + 1), logging.ERROR)
        return PORT_IN_USE
    say("Cannot listen on %s port %d: %s" % (config.host, config.port, fault.strerror or fault), logging.ERROR)
    return FAILURE


def aliases_text(aliases: Iterable[Tuple[str, str]]) -> str:
    return ", ".join("%s = %s" % pair for pair in aliases)


def print_start_lines(gateway: Gateway, service: Service) -> None:
    """The upstream and credential, who may call, what to paste."""
    config, credential = gateway.config, gateway.upstream.credential
    if config.demo:
        say("Demo: answers, tokens, costs and limits are simulated, nothing is sent anywhere.")
    else:
        described = credential.description if credential else "no credential"
        say("Upstream: %s with %s" % (gateway.upstream.base_url, described))
        if is_proxied(config, urllib.parse.urlsplit(config.base_url).netloc):
            say("Proxy: %s" % shown_proxy(config))
        if credential and credential.preamble:
            say("Note: %s; an API key is always fine. (See `claude-gateway login --help`.)" % OWN_APPS_ONLY)
    key = "one of %d API keys is" % len(config.api_key) if len(config.api_key) > 1 else "an API key is"
    say("Clients: " + (key + " required" if config.api_key else "no API key needed; any value is accepted"))
    if config.alias:
        say("Aliases: %s" % aliases_text(config.alias))
    url, everywhere = service.url, config.host in ("0.0.0.0", "::")     # which are no addresses to connect to
    if everywhere:
        name = config.allow_host[0] if config.allow_host else "ADDRESS-OF-THIS-MACHINE"
        url = "http://%s:%d/v1" % (name, service.port)
    say("Paste into your tool:  base URL %s   model sonnet" % url)
    if everywhere and not config.allow_host:
        say("To call this machine by a name, as %s, add --allow-host NAME" % printable(socket.gethostname()))


class StopSignals:
    """SIGINT and SIGTERM: the first lets running requests finish, a second one stops at once."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._codes: List[int] = []                 # to exit with, one for each signal
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._codes.append(INTERRUPTED if number == signal.SIGINT else OK)
        self._stop.set()
        if len(self._codes) > 1:
            os._exit(self._codes[0])

    def serve(self, service: Service) -> int:
        """Waits for the signal and for running requests; the exit code."""
        while not self._stop.wait(1):               # a signal just before a wait does not end it, nor any on Windows
            pass
        service.stop_accepting()
        running = service.gateway.running.count
        if running and not service.gateway.config.quiet:
            say("Stopping: waiting up to %d seconds for %d running request%s; a second Ctrl-C stops at once." % (
                SHUTDOWN_GRACE, running, "" if running == 1 else "s"))
        # on Windows no signal ends a wait
        any(service.gateway.running.wait_until_idle(1) for _ in range(SHUTDOWN_GRACE))
        service.close(0)
        return self._codes[0]


def start_command(parsed: Namespace, config: Config) -> int:
    check_exposure(config)
    if config.ca_file and not os.path.exists(config.ca_file):
        say("Warning: %s names %s, which does not exist, so no certificate can be verified." % (
            config.ca_variable, config.ca_file))
    for doubt in doubtful_settings(dict(os.environ), config):
        say("Warning: %s %s" % doubt)
    if parsed.api_key:
        say("Warning: --api-key is visible to other users of this machine; set CLAUDE_GATEWAY_API_KEY instead.")
    if config.demo:
        config = demo_config(config, SimulatedUpstream().url)
    elif is_own_address(config):
        raise UsageError("ANTHROPIC_BASE_URL is this gateway's own address.")
    gateway = gateway_with_credential(config)
    set_up_log(config, gateway.secrets)             # those of a login, too, also after it is renewed
    if config.budget:
        gateway.usage.write()
        if gateway.usage.fault:
            raise UsageError("it cannot be counted: %s" % gateway.usage.fault, "--budget")
    raise_descriptor_limit()
    stop = StopSignals()                            # before the address is printed: its reader may stop us at once
    try:
        service = Service(gateway)
    except OSError as fault:
        return report_port(config, fault)
    service.start()
    print("claude-gateway %s on %s" % (VERSION, service.url), flush=True)
    if not config.quiet:
        print_start_lines(gateway, service)
    if gateway.upstream.credential:
        gateway.models.catalog(patience=0)
    return stop.serve(service)


# ---- Asking and running ------------------------------------------------------------------------------
# `ask` and `run`: an answer, or a tool, through the gateway that runs on the port or one of their own.


@contextmanager
def gateway_at_hand(command: str, config: Config) -> Iterator[Config]:
    """The settings that reach the running gateway, or else one that lives as long as this block."""
    if not config.demo and running_status(config):
        yield config
        return
    config = replace(config, host="localhost", more_hosts=(), port=0, quiet=True, passing_key=not config.api_key,
                     api_key=config.api_key or (secrets.token_urlsafe(16),))
    config = demo_config(config, SimulatedUpstream().url) if config.demo else config
    set_up_log(config)
    try:
        service = Service(gateway_with_credential(config))
    except CredentialNeeded as missing:
        raise CredentialNeeded(str(missing).replace("start --demo", command + " --demo")) from missing
    service.start()
    try:
        yield replace(config, port=service.port)
    finally:
        service.close(2)                            # seconds: its last request is counted first


def ask_command(parsed: Namespace, config: Config) -> int:
    """Prints the answer as it arrives, or the whole completion as JSON."""
    text = " ".join(parsed.words).strip() or given_to(None, "ask Hello").decode("utf-8", "replace")
    images = [given_to(path, "ask --image FILE Hello") for path in parsed.image or ()]
    content = [*({"type": "image_url", "image_url": {"url": "data:%s;base64,%s" % (
        media_type_of(data), base64.b64encode(data).decode())}} for data in images), {"type": "text", "text": text}]
    body = {"model": parsed.model, "stream": not parsed.json, "messages": [{"role": "user", "content": content}]}
    with gateway_at_hand("ask", config) as at_hand:
        for chunk in chunks_of_answer(at_hand, body):
            if parsed.json:
                print_json(chunk)
                return OK
            for choice in chunk.get("choices", ()):
                text = choice["delta"].get("content") or ""
                print(for_terminal(text) if sys.stdout.isatty() else text, end="", flush=True)
    print()
    return OK


def chunks_of_answer(config: Config, body: dict) -> Iterator[dict]:
    """The chunks of a gateway's stream, or its whole completion.  Raises what it reports."""
    try:
        with local_answer(config, body, next(iter(config.api_key), ""), config.limits.upstream_silence) as response:
            done = not body["stream"]
            for line in response:
                done = done or line.startswith(b"data: [DONE]")
                line = re.sub(rb"^data: ", b"", line)
                chunk = json.loads(line.decode()) if line.startswith(b"{") else {}
                if "error" in chunk:
                    kind = UpstreamFault if text_in(chunk, "error", "code") == UpstreamFault.code else GatewayError
                    raise kind(text_in(chunk, "error", "message") or "The gateway refused the request.")
                yield chunk
            if not done:
                raise ConnectionError("it ended early")
    except (OSError, ValueError, http.client.HTTPException) as fault:
        raise UpstreamFault("The gateway broke off its answer: %s." % (str(fault) or type(fault).__name__)) from fault


# Program -> its entry in the settings, whose variables and options `run` passes on
PROGRAMS = {"aider": "aider", "codex": "codex", "opencode": "opencode", "goose": "goose", "qwen": "qwen-code",
            "claude": "claude-code", "mini": "mini-swe-agent"}


def ready_made(program: str, config: Config) -> tuple[dict[str, str], list[str]]:
    """The variables and options that point a program at a gateway."""
    values = dict(filled(config), KEY=next(iter(config.api_key), "none"))
    variables = {"OPENAI_BASE_URL": values["BASE"], "OPENAI_API_BASE": values["BASE"], "OPENAI_API_KEY": values["KEY"]}
    options: list[str] = []
    text = with_values(SETTINGS[PROGRAMS[program]].text, values) if program in PROGRAMS else ""
    if program == "opencode":                       # reads what is else its file from a variable
        return dict(variables, OPENCODE_CONFIG_CONTENT=text), []
    if program == "codex":                          # and this one each line of it as an option
        return variables, [word for line in re.findall(r"(?m)^\w.*", text) for word in ("-c", line.replace(" = ", "="))]
    for line in text.replace("\\\n", "").split("\n"):
        words = shlex.split(line)
        if words[:1] == ["export"]:
            variables.update((name, value) for name, _, value in (word.partition("=") for word in words[1:]))
        elif words[:1] == [program]:
            options = words[1:]
    return variables, options


def run_tool(parsed: Namespace, config: Config) -> int:
    """Runs a tool that is pointed at the gateway; its exit status.  Nothing is written."""
    name, *arguments = parsed.program[parsed.program[:1] == ["--"]:] or [""]
    path = shutil.which(name)
    if not path:
        raise UsageError("run needs a program to start; %s." % ("there is no %s" % name if name else "for example: "
                                                                "claude-gateway run aider"))
    with gateway_at_hand("run", config) as at_hand:
        variables, options = ready_made(re.sub(r"\.\w+$", "", os.path.basename(name)), at_hand)
        tool: Optional[subprocess.Popen] = None
        early: List[int] = []                       # signals that came before there was a tool

        def pass_on(number: int, frame: Any) -> None:
            if number != signal.SIGINT or not os.isatty(0):     # a terminal sends Ctrl-C to the tool by itself
                (tool.send_signal if tool else early.append)(number)
        for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if os.name == "posix" else [])):
            signal.signal(number, pass_on)
        environment = dict(os.environ, **variables)
        if getattr(sys, "frozen", False):           # what PyInstaller unpacked is not for other programs
            environment["LD_LIBRARY_PATH"] = environment.get("LD_LIBRARY_PATH_ORIG", "")
        try:
            tool = subprocess.Popen([path, *options, *arguments], env=environment)
        except (OSError, ValueError) as fault:      # no interpreter, too many arguments
            raise UsageError("%s cannot be started: %s." % (name, fault)) from fault
        for early_one in early:
            tool.send_signal(early_one)
        code = tool.wait()
    return code if code >= 0 else 128 - code


# ---- Commands ----------------------------------------------------------------------------------------
# The other commands, a function each.


def login_command(parsed: Namespace, config: Config) -> int:
    if parsed.store_key:
        store_key(config)
    else:
        sign_in(config, open_browser=not parsed.no_browser)
    credential = credential_from_config(config, Upstream(config, "").post_json)
    if credential and os.path.splitext(config.token_file)[0] not in credential.description:
        say("Warning: %s comes first; unset it to use what is stored." % credential.description)
    say("Next: claude-gateway start")
    return OK


def logout_command(parsed: Namespace, config: Config) -> int:
    found = [file for file in (TokenFile(config.token_file), key_file(config)) if os.path.lexists(file.path)]
    for file in found:
        try:
            with file.lock():                       # the lock file stays: another process may be waiting for it
                file.remove()
        except OSError as fault:
            raise GatewayError("Cannot remove the login in %s: %s" % (file.path, fault.strerror or fault)) from fault
        say("Deleted the login in %s" % file.path)
    if not found:
        say("There was no stored login.")
    return OK


def row_lines(rows: Iterable[tuple[str, Any]]) -> list[str]:
    return ["%-12s %s" % (name + ":", value) for name, value in rows if value]


def login_rows(facts: dict, renewable: bool = True) -> list[tuple[str, Any]]:
    """Whose login it is, and until when."""
    expires_at, renewable = facts.get("expires_at"), renewable and bool(facts.get("refreshable"))
    return [*((name.capitalize(), facts.get(name)) for name in ("account", "organization", "scope")),
            ("Token", expires_at and expiry_text(expires_at, renewable))]


def status_text(running: dict, key_source: str) -> str:
    """A running gateway's status for the terminal."""
    lines = ["claude-gateway %s is running." % running["version"]]
    trouble = running.get("trouble")
    if trouble:
        lines.insert(0, "The credential does not work, since %s: %s" % (moment_text(trouble["at"]), trouble["message"]))
    if running.get("key_needed"):
        return lines[0] + (" The API key %s is invalid." % key_source if key_source else
                           " Its statistics require an API key: set CLAUDE_GATEWAY_API_KEY.")
    facts, tokens, cache = running["credential"] or {}, running["tokens"], running["cache"]
    upstream = "%s with %s" % (running["upstream"], facts.get("description") or "no credential")
    saving = ("cost " if cache["saved_usd"] < 0 else "saved ") + dollars(abs(cache["saved_usd"]))
    lines += row_lines([
        ("Upstream", "the built-in simulation" if running["upstream"] == "simulated" else upstream),
        *login_rows(facts, renewable=not trouble),
        ("Up for", duration_text(running["uptime_seconds"])),
        ("Models", aliases_text(running["models"].items())),
        ("Aliases", aliases_text(running.get("aliases", {}).items())),
        ("Requests", "%d, %d running" % (running["requests"]["total"], running["requests"]["running"])),
        ("Tokens", "{:,} in, {:,} of them from the cache, {:,} out".format(
            prompt_tokens(tokens), tokens["cache_read"], tokens["output"])),
        ("Cost", ", without ".join([dollars(running["cost"]["usd"]) + " by list prices",
                                    *running["cost"]["without_price"]])),
        ("Cache", "%d %% of all input, which %s" % (cache["share_percent"], saving)),
        ("Errors", ", ".join("%d %s" % (count, code) for code, count in running["errors"].items()))])
    for limit in running["limits"]:
        bar, left = "#" * round(20 * min(1.0, limit["used"])), (limit["resets_at"] or 0) - time.time()
        lines.append("%-24s [%s] %d %%%s" % (limit["title"], bar.ljust(20, "."), round(100 * limit["used"]),
                                             ", reset in " + duration_text(left) if left > 0 else ""))
    return "\n".join(lines)


def requests_text(recent: list[dict], columns: int) -> str:
    """A table of requests, each with its error and changes below it; narrow on a narrow terminal."""
    rows, sides = [[*REQUEST_COLUMNS], *(each["row"] for each in recent)], "<<<<>>>>>"
    if 0 < columns < 120:
        needless = re.compile(r"^(.* -> )?(claude-|/v1/)?|-\d{8}$| stream$")
        rows = [[*row[:2], *(needless.sub("", cell)[:18] for cell in row[2:4]), *row[4:6], row[7]] for row in rows]
    shown, *lines = in_columns(sides[:len(rows[0])], rows).split("\n")
    for line, each in zip(lines, recent):
        note = for_terminal("; ".join(filter(None, [each["error"], each["changes"]])))
        shown += "\n" + lines_within(line + ("\n          " + note) * bool(note), columns, 10)
    return shown


def status_command(parsed: Namespace, config: Config) -> int:
    """The status of the running gateway, or else the credential that `start` would use."""
    running = running_status(config)
    if running and running.get("key_needed") and config.api_key:
        running = running_status(config, config.api_key[0]) or running
    if running and parsed.json:
        print_json(dict({"running": True, "credential": None}, **running))
        return OK
    if running:
        source = "given with --api-key" if parsed.api_key else "in CLAUDE_GATEWAY_API_KEY" if config.api_key else ""
        columns = columns_of_terminal(sys.stdout)
        print(lines_within(for_terminal(status_text(running, source)), columns))
        if parsed.requests and "totals" in running:
            print("", *(in_columns("<>>>>>>", table) + "\n" for table in running["totals"]),
                  requests_text(running["recent"], columns), sep="\n")
        return OK
    try:
        credential = credential_from_config(config, Upstream(config, "").post_json)
    except FileDamaged as fault:
        raise GatewayError("%s `claude-gateway login` replaces it and keeps a copy, `claude-gateway logout` deletes "
                           "it." % fault) from fault
    facts = credential.facts() if credential else None
    if parsed.json:
        print_json({"running": False, "port": config.port, "credential": facts})
        return OK if credential else NO_CREDENTIAL
    print(("No gateway answers on port %d." if running is None else
           "Another program uses port %d; no gateway answers there.") % config.port)
    if not credential or not facts:
        print(as_typed(MISSING_CREDENTIAL[config.auth]))
        return NO_CREDENTIAL
    print(for_terminal("\n".join(["`start` would use: " + facts["description"], *row_lines(login_rows(facts))])))
    if credential.preamble:
        print("Note: %s; an API key is always fine." % OWN_APPS_ONLY)
    port = " --port %d" % config.port if config.port != DEFAULT_PORT else ""
    print(as_typed("Start one: claude-gateway start" + port))
    return OK


def usage_command(parsed: Namespace, config: Config) -> int:
    """A table of the usage file; a running gateway writes it once a minute."""
    groups = usage_by(Usage(config.usage_file).rows(), parsed.by, day_of(time.time() - (parsed.days - 1) * 86_400))
    if parsed.json:
        print_json([dict({parsed.by: name}, **{figure: figures[figure] for figure in USAGE_FIGURES})
                    for name, figures in groups.items()])
        return OK
    total = sum_of({"total": collections.Counter()}, *({"total": figures} for figures in groups.values()))
    rows = [[parsed.by, *USAGE_COLUMNS, ""]]
    for name, figures in [*groups.items(), *total.items()]:
        row = usage_row({"requests": figures["requests"], "failed": figures["errors"], "cost_usd": figures["usd"],
                         "input_tokens": prompt_tokens(figures), "cached_tokens": figures["cache_read"],
                         "output_tokens": figures["output"]})
        rows.append([name or "-", *row, "+ unknown" * bool(figures["without_price"])])
    print(in_columns("<>>>>>><", rows))
    return OK


# In the order in which `models` lists them: the one to use when in doubt comes first
SHORT_NAMES = {"sonnet": "the newest Sonnet: when in doubt", "opus": "the newest Opus: for hard tasks",
               "haiku": "the newest Haiku: quick and cheap", "fable": "the newest Fable",
               "mythos": "the newest Mythos: limited access"}


def models_command(parsed: Namespace, config: Config) -> int:
    """The models of the running gateway, or else Claude's, or the built-in ones."""
    entries = None
    if not parsed.alias and running_status(config):
        entries = (running_status(config, path="/v1/models") or {}).get("data")
    if not entries:
        try:
            live = Gateway(config).upstream.models()
        except GatewayError as fault:
            say("The upstream returned no list, so this is the built-in one: %s" % fault)
            live = None
        entries = [model_entry(*named) for named in Catalog(live or (), config.alias).names()]
    if parsed.json:
        print_json(entries)
        return OK
    short = {entry["id"]: entry["alias_of"] for entry in entries if "alias_of" in entry}
    names = sorted(short, key=[*SHORT_NAMES, *short].index)
    print(in_columns("<<<", [(name, "-> " + short[name], SHORT_NAMES.get(name, "")) for name in names]))
    rows = [(entry["id"], "{context_length:,} tokens in, {max_output_tokens:,} out".format(**entry),
             "retires " + entry["shutdown_date"] if "shutdown_date" in entry else "")
            for entry in entries if entry["id"] not in short]
    print(in_columns("<>>", rows))
    return OK


def print_finding(finding: Finding) -> None:
    level = "%-8s" % finding.level
    if wants_colour(sys.stdout):
        level = "\x1b[%dm%s\x1b[0m" % ({"ok": 32, "warning": 33, "failed": 31}[finding.level], level)
    print(("%s %-13s %s" % (level, finding.name, finding.detail)).rstrip())
    if finding.step:
        print("%s-> %s" % (" " * 23, finding.step))
    sys.stdout.flush()


def usable_config(parsed: Namespace, environment: dict[str, str]) -> tuple[Config, list[Finding]]:
    """The settings, and a finding for each invalid one, whose default is used."""
    found: List[Finding] = []
    while True:
        try:
            config = config_from(parsed, environment)
            return config, found + [Finding("Settings", *doubt) for doubt in doubtful_settings(environment, config)]
        except UsageError as fault:
            found.append(Finding("Settings", str(fault), "Correct %s; the checks below use the default." % (
                fault.setting or "it"), USAGE))
            if not fault.setting:                   # two that exclude each other
                environment = without(environment, *LEVEL_VARIABLES)
            environment = without(environment, fault.setting)
            if fault.setting.startswith("--"):
                setattr(parsed, fault.setting[2:].replace("-", "_"), None)


def doctor_command(parsed: Namespace, config: Config) -> int:
    """Prints each finding, then a block to paste into a bug report."""
    config, doubts = usable_config(parsed, dict(os.environ))
    set_up_log(replace(config, quiet=True))
    home = os.path.expanduser("~")
    found = []
    for finding in itertools.chain(doubts, findings(config, parsed.live)):
        detail = visible(masked(finding.detail, config.secrets()))
        finding = finding._replace(detail=detail, step=as_typed(finding.step))
        found.append(finding)
        if not parsed.json:
            print_finding(finding)
    if parsed.json:
        print_json([dict(finding._asdict(), level=finding.level) for finding in found])
    else:
        block = "\n".join("%s: %s %s" % (finding.name, finding.level, finding.detail) for finding in found)
        block = block.replace(home, "~") if len(home) > 1 else block       # it contains the user's name
        print("\nTo paste into a bug report:\n\n```\n%s\n```" % block)
    return next((finding.code for finding in found if finding.code), OK)


def selftest_command(parsed: Namespace, config: Config) -> int:
    set_up_log(Config(quiet=True))
    found = list(selftest_findings())
    for finding in found:
        print_finding(finding)
    failed = [finding for finding in found if finding.code]
    print("%d of %d checks failed." % (len(failed), len(found)) if failed else "All %d checks passed." % len(found))
    return FAILURE if failed else OK


def setup_command(parsed: Namespace, config: Config) -> int:
    if parsed.name:
        say("%s, %s:" % SETTINGS[parsed.name][:2])  # on standard error, as it is not to be pasted
        print(as_typed(setup_text(parsed.name, config)))
        return OK
    for name, settings in SETTINGS.items():
        print("%s%-16s %s" % ("\n%s\n\n" % TOOL_GROUPS[name] if name in TOOL_GROUPS else "", name, settings.title))
    print(as_typed("\nclaude-gateway setup NAME prints its settings."))
    return OK


def translate_command(parsed: Namespace, config: Config) -> int:
    """Prints a request as a Messages request, a saved message as a chat completion."""
    data = given_to(parsed.file, "translate request.json")
    if re.match(rb"\s*(event|data):|\s*\{[^{\[]*\"type\"\s*:\s*\"message\"", data):
        assembler = MessageAssembler()
        for event in events_from_body(data):
            assembler.feed(event)
        if not assembler.message:
            raise UpstreamFault("There is no message in this stream.")
        print_json(chat_completion_from_message(assembler.whole(), {"id": "chatcmpl-0", "created": 0},
                                                ReplyPlan(ToolNames())))
        return OK
    body, _ = json_from_body(data)
    model = Catalog(aliases=config.alias).resolve(optional(text_of, body.get("model"), "model"))
    translator = messages_request_from_responses if is_responses_body(body) else messages_request_from_chat
    translation = translator(body, model, cache=not config.no_cache)
    print_json(translation.request)
    say("Changes: %s" % (translation.changes if translation.changes.reported else "none"))
    return OK


# ---- Completion --------------------------------------------------------------------------------------
# Scripts that have the shell ask the program itself: `completion SHELL WORD...`, with the words up to the cursor,
# prints what may stand in the place of the last one, nothing where that is a file or free text.

COMPLETIONS = {
    "bash": """\
# To load it, in ~/.bashrc: source <(claude-gateway completion bash)
_claude_gateway() {
  COMPREPLY=($(claude-gateway completion bash "${COMP_WORDS[@]:0:COMP_CWORD+1}" 2>/dev/null))
}
complete -o default -F _claude_gateway claude-gateway""",
    "zsh": """\
# To load it, in ~/.zshrc after compinit: source <(claude-gateway completion zsh)
_claude_gateway() {
  local -a found=(${(f)"$(claude-gateway completion zsh "${(@)words[1,CURRENT]}" 2>/dev/null)"})
  if (( $#found )); then compadd -a found; else _files; fi
}
compdef _claude_gateway claude-gateway""",
    "fish": """\
# To load it: claude-gateway completion fish > ~/.config/fish/completions/claude-gateway.fish
function __claude_gateway
  set -l word (commandline -ct)
  set -l found (claude-gateway completion fish (commandline -opc) "$word" 2>/dev/null)
  if set -q found[1]; printf '%s\\n' $found; else; __fish_complete_path "$word"; end
end
complete -c claude-gateway -f -a '(__claude_gateway)'""",
    "powershell": """\
# To load it, in $PROFILE: claude-gateway completion powershell | Out-String | Invoke-Expression
Register-ArgumentCompleter -Native -CommandName claude-gateway -ScriptBlock {
  param($word, $ast, $at)
  $typed = @($ast.CommandElements | ForEach-Object { $_.ToString() })
  if (-not $word) { $typed += ' ' }
  claude-gateway completion powershell @typed | ForEach-Object {
    [System.Management.Automation.CompletionResult]::new($_) }
}""",
}


def completion_command(parsed: Namespace, config: Config) -> int:
    if parsed.typed:
        for candidate in parsed.parser.candidates(parsed.typed[1:]):
            print(candidate)
    else:
        print("# It completes the command claude-gateway, not python3 claude_gateway.py.\n" + COMPLETIONS[parsed.shell])
    return OK


# ---- Command line ------------------------------------------------------------------------------------
# The commands with their arguments, the parser, and the program itself.

Command = Callable[[Namespace, Config], int]
AT_HAND = "port host api-key auth token-file"       # what finds a gateway, or else a credential
# name -> the function, its help, its arguments
COMMANDS: Dict[str, Tuple[Command, str, str]] = {
    "start": (start_command, "serve OpenAI's API until it is stopped", " ".join(option.name for option in OPTIONS)),
    "ask": (ask_command, "ask Claude, by the running gateway or one of its own",
            "words --model --image --json alias demo " + AT_HAND),
    "run": (run_tool, "run a tool that then uses the gateway", "alias demo program " + AT_HAND),
    "login": (login_command, "sign in with a Claude account, or store an API key", "--api-key --no-browser token-file"),
    "logout": (logout_command, "delete the stored login and API key", "token-file"),
    "status": (status_command, "show what the running gateway does", "--json --requests " + AT_HAND),
    "usage": (usage_command, "show what was used, by day, tool or model", "--days --by --json token-file"),
    "models": (models_command, "list the models and aliases", "--json port host alias auth token-file"),
    "doctor": (doctor_command, "check this machine, the way to Claude and the credential",
               "--json --live relax-x509 " + AT_HAND),
    "setup": (setup_command, "print the settings for a tool, or a service file", "name port api-key"),
    "translate": (translate_command, "print what a request would become, without sending it", "file alias no-cache"),
    "completion": (completion_command, "print shell completion", "shell typed"),
    "selftest": (selftest_command, "check the gateway against its own simulation", ""),
}


def days_from(text: str) -> int:
    if not re.match(r"[1-9]\d{0,2}\Z", text):
        raise argparse.ArgumentTypeError("expected a number of days from 1 to 999")
    return int(text)


# Arguments of other commands than `start`; they have no variables.
EXTRA_ARGUMENTS: dict = {
    "--api-key": {"action": "store_true", "dest": "store_key",
                  "help": "ask for an API key of the Claude Console (or read it from standard input), and store that"},
    "--no-browser": {"action": "store_true", "help": "only print the URL to open"},
    "--days": {"metavar": "N", "type": days_from, "default": 7, "help": "the last N days (default: 7)"},
    "--by": {"choices": ["day", "tool", "model", "key"], "default": "day", "help": "one line for each (default: day)"},
    "--json": {"action": "store_true", "help": "as JSON"},
    "--requests": {"action": "store_true", "help": "also list the last requests"},
    "--model": {"default": "sonnet", "help": "a model, or its alias (default: sonnet)"},
    "--image": {"action": "append", "metavar": "FILE", "help": "send this image, too; repeatable"},
    "words": {"nargs": "*", "metavar": "WORD", "help": "the question; default: standard input"},
    "program": {"nargs": argparse.REMAINDER, "metavar": "TOOL ARGUMENT", "help": "for example: aider --no-git"},
    "--live": {"action": "store_true", "help": "also make two small model calls, to check a reply and a cache hit"},
    "name": {"metavar": "NAME", "nargs": "?", "type": setup_name, "choices": [*SETTINGS],
             "help": "default: list all names, which are %s" % ", ".join(SETTINGS)},
    "file": {"metavar": "FILE", "nargs": "?", "help": "a request, or a saved message; default: standard input"},
    "shell": {"metavar": "SHELL", "type": str.lower, "choices": [*COMPLETIONS], "help": ", ".join(COMPLETIONS)},
    "typed": {"nargs": argparse.REMAINDER, "help": argparse.SUPPRESS},
}
# What options of `start` mean to other commands
ELSEWHERE = {"port": "port of the gateway (default: %d)" % DEFAULT_PORT, "api-key": "API key of the gateway",
             "host": "address of the gateway (default: localhost)"}
DESCRIPTION = """\
Lets any OpenAI-compatible tool use Claude: serves OpenAI's API on
http://localhost:%d/v1.

  # try it, without account and network:
  claude-gateway ask --demo Hello
  # with your API key:
  ANTHROPIC_API_KEY=... claude-gateway start""" % DEFAULT_PORT
# What the help of a command ends with
EPILOGS = {"login": TERMS, "usage": "The running gateway writes it once a minute.", "start": """\
Every option can also be set in the environment: CLAUDE_GATEWAY_PORT for --port,
and so on. A flag wins over its variable."""}


class Parser(argparse.ArgumentParser):
    """argparse, with shell completion, and the nearest match for an unknown word."""
    commands: Dict[str, Parser] = {}                # of the program's own parser

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        first = next(iter(sys.argv[1:] if args is None else args), "").split("=")[0]
        if first.startswith("-") and first not in self._option_string_actions:
            self.error("%s: options follow their command, for example: claude-gateway start --demo" % first)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.commands.get(parsed.command, self).error("unrecognized arguments: %s" % " ".join(unknown))
        return parsed

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)|argument COMMAND: invalid choice: '([^']+)'", message)
        if unknown:
            word = (unknown.group(1) or unknown.group(2)).split("=")[0]
            known = {name.lstrip("-"): name for name in [*self.commands, *self._option_string_actions]}
            nearest = difflib.get_close_matches(word.lstrip("-"), known, n=1, cutoff=0.7)
            hint = " The commands are %s." % ", ".join(self.commands) if self.commands else ""
            hint = " Did you mean %s?" % known[nearest[0]] if nearest else hint
            message = "unknown: %s.%s" % (word, hint)
        super().error(as_typed(message.replace("SHELL, typed", "SHELL")))     # the hidden one is not required

    def candidates(self, words: Sequence[str]) -> list[str]:
        """What may stand in the place of the last word; none for a file or free text."""
        *before, word = words or [""]
        if before and before[0] in self.commands:
            return self.commands[before[0]].candidates(words[1:])
        options = self._option_string_actions
        owner = options.get(before[-1]) if before else None
        place = next((action for action in self._actions if not action.option_strings), None)
        if owner and owner.nargs != 0:              # it is the value of this option
            found = owner.choices or ()
        elif place and not word.startswith("-"):
            found = place.choices or ()
        else:
            found = [flag for flag in options if flag.startswith("--")]
        return [each for each in found if each.startswith(word.strip())]     # PowerShell cannot pass an empty word


def argument_parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=as_typed("claude-gateway x")[:-2], description=as_typed(DESCRIPTION), formatter_class=raw)
    # the short form also makes the column of names wide enough for our longest command, which argparse miscounts
    parser.add_argument("-v", "--version", action="version", version="claude-gateway " + VERSION)
    parser.set_defaults(parser=parser)              # which `completion` asks
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (_, help_text, arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text, formatter_class=raw,
                                      epilog=as_typed(EPILOGS.get(name, "")))
        for option in OPTIONS:
            if option.name in arguments.split():
                kind: dict = {"action": "store_true", "default": None}
                if option.metavar:
                    kind = {"action": "append" if option.repeatable else "store", "metavar": option.metavar,
                            "choices": option.choices or None}
                text = option.help + "; repeatable" * option.repeatable
                text = text if name == "start" else ELSEWHERE.get(option.name, text)
                short = ["-" + option.short] if option.short else []
                command.add_argument(*short, "--" + option.name, **kind, help=text)
        for argument in arguments.split():
            if argument in EXTRA_ARGUMENTS:
                command.add_argument(argument, **EXTRA_ARGUMENTS[argument])
    parser.commands = commands.choices
    return parser


# What ends a command, the first that fits -> its exit code
EXIT_CODES = ((UsageError, USAGE), (CredentialNeeded, NO_CREDENTIAL), (UpstreamFault, UNREACHABLE),
              (GatewayError, FAILURE))


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    if sys.version_info < (3, 8):
        print("claude-gateway needs Python 3.8 or newer; this is %s. Try python3.9, python3.11 or python3.12." %
              sys.version.split()[0], file=sys.stderr)
        return USAGE
    prepare_output()
    parser = argument_parser()
    parsed = parser.parse_args(arguments)
    if not parsed.command:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        # `doctor` reads the settings itself, as it goes on where one is invalid
        config = Config() if parsed.command == "doctor" else config_from(parsed, dict(os.environ))
        set_up_log(config)
        code = COMMANDS[parsed.command][0](parsed, config)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except (UsageError, GatewayError) as fault:
        say("claude-gateway: %s" % fault, logging.ERROR)
        return next(code for kind, code in EXIT_CODES if isinstance(fault, kind))
    except OSError as fault:                        # the reader of our output has ended, `head` for instance
        if fault.errno != (errno.EINVAL if os.name == "nt" else errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


if __name__ == "__main__":
    sys.exit(main())
