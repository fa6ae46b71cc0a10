#!/usr/bin/env python3
"""Shows that every defence has a test: takes each out of a copy of the project and runs the tests that should notice.

    python3 .ci/mutants.py               all of them; takes some minutes
    python3 .ci/mutants.py framing key   those whose name contains one of these words

Prints `caught` or `SURVIVED` for each.  Exit code 1 if one survived, or if its text is not in the program any more.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATIENCE = 60                                       # seconds for one run of tests; a mutant that hangs is noticed too


class Mutant(NamedTuple):
    """A defence, the text that makes it, what stands there without it, and the tests that defend the defence."""
    name: str
    old: str
    new: str
    tests: str


MUTANTS = (
    # ---- HTTP framing
    Mutant("framing: HTTP/2 and 0.9 request lines", r'HTTP/(1\.[01])\Z")', r'HTTP/([0-9.]+)\Z")', "FramingTests"),
    Mutant("framing: control characters in headers", r":([^\x00-\x08\x0a-\x1f\x7f]*)\Z", r":(.*)\Z", "FramingTests"),
    Mutant("framing: blank before the colon", r"A-Za-z-]+):([^", r"A-Za-z-]+)[ \t]*:([^", "FramingTests"),
    Mutant("framing: folded headers", "found = HEADER_LINE.match(line)", "found = HEADER_LINE.match(line.strip())",
           "FramingTests"),
    Mutant("framing: headers that come twice", "if name in headers and name in SINGLE_HEADERS:", "if False:",
           "FramingTests"),
    Mutant("framing: HTTP/1.1 without Host", 'if version == "1.1" and "host" not in headers:', "if False:",
           "FramingTests"),
    Mutant("framing: Transfer-Encoding with Content-Length", 'if length is not None or head.version == "1.0":',
           'if head.version == "1.0":', "FramingTests"),
    Mutant("framing: Transfer-Encoding in HTTP/1.0", 'if length is not None or head.version == "1.0":',
           "if length is not None:", "FramingTests"),
    Mutant("framing: unknown transfer codings",
           'if coding.lower() != "chunked":', 'if "chunked" not in coding.lower():',
           "FramingTests"),
    Mutant("framing: malformed Content-Length", r'if not re.match(r"[0-9]{1,19}\Z", length):',
           r'if not re.match(r"[-+_0-9]{1,19}\Z", length):', "FramingTests"),
    Mutant("framing: endless Content-Length", r'if not re.match(r"[0-9]{1,19}\Z", length):',
           r'if not re.match(r"[0-9]+\Z", length):', "FramingTests"),
    Mutant("framing: malformed chunk sizes", r'rb"([0-9A-Fa-f]{1,8})[ \t]*(;', r'rb"([-+_0-9A-Fa-fxX]{1,9})[ \t]*(;',
           "FramingTests"),
    Mutant("framing: control characters in chunk extensions", r"(;[^\x00-\x08\x0a-\x1f\x7f]*)?\Z", r"(;.*)?\Z",
           "FramingTests"),
    Mutant("framing: chunks longer than their size",
           '            if line:\n                raise self._fault("a chunk that is longer',
           '            if False:\n                raise self._fault("a chunk that is longer', "FramingTests"),
    Mutant("framing: bare line feeds in chunks", r'if not line.endswith(b"\r\n"):', r'if not line.endswith(b"\n"):',
           "FramingTests"),
    Mutant("framing: endless trailers", "if self._trailers == MAX_HEADERS and not self.done:", "if False:",
           "FramingTests"),
    Mutant("framing: large heads", "if size > MAX_HEAD or self", "if self", "FramingTests"),
    Mutant("framing: endless heads", "size = end.end() if end else len(received)", "size = end.end() if end else 0",
           "FramingTests"),
    Mutant("framing: too many header lines", " or self._line_ends > MAX_HEADERS + 2:", ":", "FramingTests"),
    Mutant("framing: a body that found no room", "if self.keep_alive and not self._body_begun and re.match",
           "if self.keep_alive and re.match", "BodyTests"),
    Mutant("framing: cuts in the end of a head", "max(0, self._searched - 2)", "self._searched", "FramingTests"),
    Mutant("framing: exactly so many header lines", "> MAX_HEADERS + 2:", "> MAX_HEADERS + 3:", "FramingTests"),
    Mutant("framing: an early refusal without room for its body",
           "contextlib.suppress(OSError, GatewayError):\n                self._received",
           "contextlib.suppress(OSError):\n                self._received", "BodyTests"),
    Mutant("framing: targets that are no path", 'if not head.target.startswith("/") and not', "if False and not",
           "RouteTests FramingTests"),
    Mutant("framing: malformed Host", r'|[A-Za-z0-9._-]+)(:\d{0,5})?\Z", host)', r'|[A-Za-z0-9._-]+)", host)',
           "FramingTests AccessTests"),
    Mutant("framing: the end of the connection after a bad head",
           '"1.1", {"connection": "close", "content-length": "?"})', '"1.1", {"connection": "close"})',
           "FramingTests"),
    Mutant("framing: the end of the connection after an unread body", "            self._drain_body()\n",
           "            pass\n", "FramingTests"),
    Mutant("framing: reading on after a refusal", "            self._linger()\n", "            pass\n", "FramingTests"),
    Mutant("framing: line ends in response headers", 'CONTROLS.sub(" ", value)', "value", "StreamFramingTests"),
    Mutant("framing: a broken answer does not look whole",
           '        if not self.headers["content-type"].startswith("text/event-stream"):\n'
           '            return b""\n', '        if not self.headers["content-type"].startswith("text/event-stream"):\n'
           "            return LAST_CHUNK\n", "UpstreamAnswerTests"),
    # ---- bounds of requests
    Mutant("body: declared size", "if length is not None and length > limit:", "if False:", "BodyTests"),
    Mutant("body: size in chunks", "        if self._room < 0:", "        if False:",
           "BodyTests FramingTests"),
    Mutant("body: unpacked size", "inflate.decompress(body, limit + 1)", "inflate.decompress(body)", "BodyTests"),
    Mutant("body: compression that is cut short", "if not inflate.eof and len(plain) <= limit:", "if False:",
           "BodyTests"),
    Mutant("body: unknown codings", "    else:\n        raise Refused(415,",
           "    else:\n        plain = body\n    if False:\n        raise Refused(415,", "BodyTests"),
    Mutant("body: size as Claude would get it", "if len(body) > MAX_UPSTREAM_BODY:", "if False:", "BodyTests"),
    Mutant("body: budget of all bodies", "if not self._gateway.body_budget.take(amount):", "if False:", "BodyTests"),
    Mutant("body: budget counts what was unpacked", "            self._reserve(len(body) - self._reserved)\n", "",
           "BodyTests"),
    Mutant("body: budget is given back",
           "            self._gateway.body_budget.give(self._reserved)\n", "", "BodyTests"),
    Mutant("load: requests at once", "if self.draining or self.count >= self._most:", "if self.draining:",
           "ConnectionTests"),
    Mutant("load: connections at once", "if self._connections.take(1):", "if self._connections.take(0):",
           "ConnectionTests"),
    Mutant("load: connections are counted down", "            self._connections.give(1)\n        Connection(",
           "        Connection(", "ConnectionTests"),
    Mutant("slow client: the whole head", "self._peer.read_within(self._limits.head_timeout, deadline)",
           "self._peer.read_within(self._limits.head_timeout)", "SlowClientTests"),
    Mutant("slow client: an idle connection", "peer.read_within(self._limits.idle_timeout)", "peer.read_within(1e6)",
           "SlowClientTests"),
    Mutant("slow client: a body that stops", "body = self._received(framing, limits.body_timeout,\n"
           "                                  limits.body_timeout + (length or limits.max_body) / SLOWEST_BODY)",
           "body = self._received(framing, 1e6, 1e6)", "SlowClientTests"),
    Mutant("slow client: one that does not read", "wait_ready((), self._limits.write_timeout, [self.peer.sock])",
           "wait_ready((), 1e6, [self.peer.sock])", "SlowClientTests"),
    Mutant("slow client: one that does not read its stream", 'raise socket.timeout("the client does not read")',
           "return", "EventLoopTests"),
    Mutant("schema: paths that grow", '"%s.%s" % (path[-500:], name[:100])', '"%s.%s" % (path, name)',
           "RequestDoorTests"),
    Mutant("completions: number of prompts", "if len(prompts) > MOST_PROMPTS:", "if False:", "LegacyCompletionTests"),
    # ---- JSON
    Mutant("json: NaN and Infinity", "parse_constant=refuse_constant, ", "", "JsonDoorTests"),
    Mutant("json: numbers beyond floats", "parse_float=finite_float, ", "", "JsonDoorTests"),
    Mutant("json: digits", ", parse_int=bounded_int)", ")", "JsonDoorTests"),
    Mutant("json: brackets", "if brackets > MAX_BRACKETS:", "if False:", "JsonDoorTests"),
    Mutant("json: nesting", "    if brackets > MAX_NESTING and nests_deeper(value, MAX_NESTING):", "    if False:",
           "JsonDoorTests"),
    Mutant("json: nesting that the parser stops at", "    except RecursionError:\n        raise too_deep from None\n",
           "    except ZeroDivisionError:\n        raise\n", "JsonDoorTests"),
    Mutant("json: bytes that are not UTF-8", 'body.decode("utf-8-sig")', 'body.decode("utf-8-sig", "replace")',
           "JsonDoorTests"),
    Mutant("json: lone surrogates", r'if re.search(rb"\\u[dD][89a-fA-F]", body):', "if False:", "JsonDoorTests"),
    Mutant("json: numbers out of range", "if not abs(value) < 1e300:", "if False:",
           "ParameterTests JsonDoorTests"),
    # ---- browsers
    Mutant("browser: Host", "        if not allowed:\n", "        if False:\n", "AccessTests"),
    Mutant("browser: the authority of an absolute target", "host, path = absolute.group(1), head", "path = head",
           "RouteTests AccessTests"),
    Mutant("browser: Origin", "if origin is not None and not origin_allowed(origin, self._config):", "if False:",
           "AccessTests"),
    Mutant("browser: Origin to its end", r'\[::1\])(:\d+)?\Z")', r'\[::1\])(:\d+)?")', "AccessTests"),
    Mutant("browser: CORS headers for allowed origins only",
           "    if not origin_allowed(origin, config):\n        return {}\n", "", "AccessTests"),
    # ---- keys of clients
    Mutant("key: needed", 'if owner or path in WITHOUT_KEY and self._head.method in ("GET", "HEAD") and not guessed:',
           "if True:", "ClientKeyTests"),
    Mutant("key: needed for what is not a GET", ' and self._head.method in ("GET", "HEAD") and not guessed:',
           " and not guessed:", "ClientKeyTests"),
    Mutant("key: the status page does not tell whether a guess is right", " and not guessed:", ":", "ClientKeyTests"),
    Mutant("key: compared whole, in constant time", "if hmac.compare_digest(known, digest):", "if known == digest:",
           "ClientKeyTests"),
    Mutant("key: refusals are slowed", "        time.sleep(self._gateway.failed_keys.penalty(self._address))\n", "",
           "ClientKeyTests"),
    Mutant("key: slowed for a bounded time", "return min(2.0, 0.05 *", "return max(0.0, 0.05 *",
           "ClientKeyTests"),
    Mutant("key: slowed addresses are forgotten", "while len(self._failures) > 10_000:", "while False:",
           "ClientKeyTests"),
    Mutant("key: a slowed refusal takes no place", "        self._leave()                               # a slowed",
           "        # a slowed", "ClientKeyTests"),
    Mutant("key: memories belong to one", "owner = known.hex()", 'owner = "all"',
           "ThinkingReplayTests ResponsesStateTests"),
    Mutant("key: needed on other than loopback addresses",
           "if not is_loopback_host(config.host) and not config.api_key:", "if False:", "OptionTests"),
    Mutant("key: needed for every origin", 'if "*" in config.cors_origin and not config.api_key:', "if False:",
           "OptionTests"),
    Mutant("key: a caller's own key goes up only if it is Anthropic's",
           'if re.match(r"sk-ant-[\\x21-\\x7e]+\\Z", key):', "if key:", "ModelListTests"),
    # ---- the plan of a reply
    Mutant("plan: an answer that goes on", 'if event["type"] == "message_start" and self.assembler.done:', "if False:",
           "BareJsonTests"),
    Mutant("plan: text held back to the end", 'rest = self._bare_json.close() if self._bare_json else ""',
           'rest = ""', "BareJsonTests"),
    Mutant("plan: names back", 'name=self._plan.names.back(block["name"])', 'name=block["name"]',
           "StreamShapeTests ToolTests"),
    # ---- image fetching
    Mutant("image: every address of a name", "not all(self.permit(str(address)) for address in found)",
           "not any(self.permit(str(address)) for address in found)", "PictureFetchTests"),
    Mutant("image: the address that was checked", "socket.create_connection((address, port)",
           "socket.create_connection((host, port)", "PictureFetchTests"),
    Mutant("image: NAT64", "if ip in NAT64:", "if False:", "PictureFetchTests"),
    Mutant("image: IPv6 that maps IPv4", "[ip.ipv4_mapped, ip.sixtofour, ", "[ip.sixtofour, ", "PictureFetchTests"),
    *([Mutant("image: 6to4", "[ip.ipv4_mapped, ip.sixtofour, ", "[ip.ipv4_mapped, ", "PictureFetchTests")]
      if sys.version_info < (3, 13) else []),       # from there on Python itself knows that these are not global
    Mutant("image: IPv6 beyond global unicast", "or ip in GLOBAL_UNICAST and ip.is_global", "or ip.is_global",
           "PictureFetchTests"),
    Mutant("image: multicast", "return ip.is_global and not ip.is_multicast", "return ip.is_global",
           "PictureFetchTests"),
    Mutant("image: schemes of redirects", "if not HTTP_URL.match(here):", "if False:", "PictureFetchTests"),
    Mutant("image: user information", "if parts.username or parts.password or not host:", "if not host:",
           "PictureFetchTests"),
    Mutant("image: number of redirects", "for _ in range(FETCH_REDIRECTS + 1):", "for _ in range(100):",
           "PictureFetchTests"),
    Mutant("image: size", "if len(body) > MAX_FETCHED:", "if False:", "PictureFetchTests"),
    Mutant("image: type", "if media_type not in IMAGE_TYPES:", "if False:", "PictureFetchTests"),
    Mutant("image: status", '            if status != 200:\n                raise self._refusal(url, "answered',
           '            if False:\n                raise self._refusal(url, "answered', "PictureFetchTests"),
    Mutant("image: time in all", "        alarm.start()\n", "", "PictureFetchTests"),
    Mutant("image: whole", "if not piece and response.length:", "if False:", "PictureFetchTests"),
    Mutant("image: size of all", "                if size > MAX_UPSTREAM_BODY:", "                if False:",
           "PictureFetchTests"),
    Mutant("image: nothing for a client that has left", "                self.call.client.pause(0) ",
           "                pass ", "PictureFetchTests"),
    Mutant("image: other schemes", '    if not HTTP_URL.match(url):\n        raise InvalidRequest("%s: %r: expected',
           '    if False:\n        raise InvalidRequest("%s: %r: expected', "PictureFetchTests ContentPartTests"),
    Mutant("image: names of this machine", "is_loopback_host(host) or private_literal(host):", "private_literal(host):",
           "PictureFetchTests ContentPartTests"),
    Mutant("image: private addresses by their spelling", "is_loopback_host(host) or private_literal(host):",
           "is_loopback_host(host):", "PictureFetchTests ContentPartTests"),
    Mutant("image: decimal, octal and hexadecimal addresses", "if len(parts) > 4 or not all(", "if True or not all(",
           "PictureFetchTests ContentPartTests"),
    Mutant("image: dots behind a host", 'host = host.rstrip(".").split("%")[0]', 'host = host.split("%")[0]',
           "PictureFetchTests ContentPartTests"),
    # ---- the way upstream
    Mutant("upstream: redirects are not followed", "            opener.add_handler(self._handler)\n",
           "            opener.add_handler(self._handler)\n"
           "            opener.add_handler(urllib.request.HTTPErrorProcessor())\n"
           "            opener.add_handler(urllib.request.HTTPRedirectHandler())\n", "UpstreamAnswerTests"),
    Mutant("upstream: plain http on loopback only", 'if parts.scheme == "http" and not is_loopback_host(host):',
           "if False:", "OptionTests"),
    Mutant("upstream: not its own address", "return port == config.port and (", "return False and (", "OptionTests"),
    Mutant("upstream: loops", "        if self._gateway.instance_id in hops:", "        if False:", "AccessTests"),
    Mutant("upstream: certificates are verified", "context = ssl.create_default_context()",
           "context = ssl._create_unverified_context()", "TlsTests"),
    Mutant("upstream: names in certificates", "    if relax_x509:\n",
           "    context.check_hostname = False\n    if relax_x509:\n", "TlsTests"),
    Mutant("upstream: loopback is never proxied", r'return is_loopback_host(re.sub(r":\d+$", "", host)) or bool(',
           "return bool(", "ProxyTests"),
    Mutant("upstream: a dead idle connection is not used",
           "if time.monotonic() - connection.last_used < POOL_AGE and not wait_ready([connection.sock], 0):",
           "if time.monotonic() - connection.last_used < POOL_AGE:", "UpstreamRequestTests"),
    Mutant("upstream: a half-read connection is not used", "if self._give_back and self.framing.done and",
           "if self._give_back and",
           "UpstreamRequestTests LeavingClientTests"),
    Mutant("upstream: a connection out of step is not used", "self.framing.done and not self.framing.surplus:",
           "self.framing.done:", "UpstreamRequestTests UpstreamAnswerTests"),
    Mutant("upstream: given back once", "        if self._closed:                            # given",
           "        if False:                                   # given", "UpstreamRequestTests NativeTests"),
    Mutant("upstream: truncated gzip", "if self._inflate and not self._inflate.eof:", "if False:",
           "UpstreamAnswerTests"),
    Mutant("upstream: bodies shorter than their length", "        if self._left is not None:\n            raise",
           "        if False:\n            raise", "UpstreamAnswerTests"),
    Mutant("upstream: encodings that nobody asked for", 'if encoding not in ("identity", "gzip"):', "if False:",
           "UpstreamAnswerTests"),
    Mutant("upstream: size of an answer", "            if len(body) > limit:", "            if False:",
           "UpstreamRequestTests"),
    Mutant("upstream: missing message_stop",
           'raise UpstreamFault("The upstream ended its answer without message_stop.")', "self.assembler.done = True",
           "UpstreamBodyTests UpstreamAnswerTests"),
    Mutant("upstream: nothing after message_stop counts",
           "                    if self.assembler.done:\n                        break\n", "", "UpstreamBodyTests"),
    Mutant("upstream: silence", "            if time.monotonic() >= wait.deadline:\n                raise silence",
           "            if False:\n                raise silence", "ClientTests UpstreamAnswerTests"),
    Mutant("upstream: silence amid many streams", "raise silence(stream.wait)", "return", "EventLoopTests"),
    # ---- retries
    Mutant("retry: one in all", "                call.client.pause(delay)\n                call.may_retry = False\n",
           "                call.client.pause(delay)\n", "OwnRetryTests UpstreamRequestTests"),
    Mutant("retry: none after a replaced connection",
           "                connection, replaced = None, True   # it died of age: the request was not accepted\n"
           "                call.may_retry = False\n",
           "                connection, replaced = None, True   # it died of age: the request was not accepted\n",
           "UpstreamRequestTests"),
    Mutant("retry: none for clients that retry", 'may_retry=head.headers.get("x-stainless-retry-count", "0") == "0")',
           "may_retry=True)", "OwnRetryTests"),
    Mutant("retry: no long waits after 429",
           "return delay if passes and delay is not None and delay <= LONGEST_RETRY_AFTER else None",
           "return delay if passes else None", "OwnRetryTests"),
    Mutant("retry: no long waits after 5xx", "    if delay is None and failure.upstream_status >= 500:\n",
           "    if failure.upstream_status >= 500:\n", "OwnRetryTests"),
    Mutant("retry: Claude's veto", 'if failure.headers.get("x-should-retry") == "false":', "if False:",
           "OwnRetryTests"),
    Mutant("retry: none once a stream has begun", "self.call.may_retry = False", "pass", "PausedAnswerTests"),
    Mutant("retry: lessons that change nothing",
           ".request != self._translated(self._known).request:", ".request:", "LessonTests"),
    Mutant("retry: lessons that did not help", "            self._lesson = lesson  ",
           "            self._gateway.lessons.learn(self._known, lesson)\n            self._lesson = lesson  ",
           "LessonTests"),
    # ---- clients that leave
    Mutant("client: a client that leaves", "            if client and client[0] in ready:\n",
           "            if False:\n", "LeavingClientTests ClientTests ConnectionTests"),
    Mutant("client: a client that sends early stays", "        if not data:\n            raise ClientGone",
           "        if True:\n            raise ClientGone", "ClientTests FramingTests"),
    Mutant("client: a left stream ends the call", "            self._held.close()\n", "            pass\n",
           "LeavingClientTests ConnectionTests"),
    Mutant("client: one of many streams is left", "            stream.client.check()\n", "            pass\n",
           "EventLoopLeavingClientTests EventLoopTests"),
    Mutant("client: what breaks one of many streams breaks no other",
           "        except BaseException as failure:\n            self._end(stream, False, failure)",
           "        except GatewayError as failure:\n            self._end(stream, False, failure)", "EventLoopTests"),
    Mutant("client: signs of life", "                self.send(self.idle_comment)\n", "                pass\n",
           "ClientTests"),
    # ---- secrets
    Mutant("secret: known ones in the log", 'text = text.replace(secret, "***")', "pass", "SecrecyTests"),
    Mutant("secret: shapes in the log", 'return SECRET_SHAPES.sub("***", text)', "return text", "SecrecyTests"),
    Mutant("secret: fields of the JSON log",
           "{name: masked(value, self._secrets()) if isinstance(value, str) else value", "{name: value",
           "SecrecyTests"),
    Mutant("secret: keys in a shown config",
           "api_key: Tuple[str, ...] = dataclasses.field(default=(), repr=False)", "api_key: Tuple[str, ...] = ()",
           "OptionTests SecrecyTests"),
    Mutant("secret: a client's key does not go upstream", '        return {"x-api-key": self._key}',
           '        return {"x-api-key": self._key, "authorization": "Bearer client"}',
           "ClientKeyTests UpstreamRequestTests"),
    # ---- the stored login
    Mutant("login: state of the sign-in", "if state and not hmac.compare_digest(state.encode(), self._state.encode()):",
           "if False:", "SignInTests"),
    Mutant("token file: mode", 'getattr(os, "O_NOFOLLOW", 0), 0o600)', 'getattr(os, "O_NOFOLLOW", 0), 0o644)',
           "TokenFileTests"),
    Mutant("token file: mode of its directory", "os.makedirs(directory, mode=0o700, exist_ok=True)\n        if os.path",
           "os.makedirs(directory, exist_ok=True)\n        if False and os.path", "TokenFileTests"),
    Mutant("token file: loose modes are repaired", "if stat.S_IMODE(os.stat(self.path).st_mode) & 0o077:", "if False:",
           "TokenFileTests"),
    Mutant("token file: replaced in one step", 'temporary = target + ".tmp"', "temporary = target", "TokenFileTests"),
    Mutant("token file: synced before it replaces", "                os.fsync(file.fileno())\n", "", "TokenFileTests"),
    Mutant("token file: symlinks", "        target = os.path.realpath(self.path)\n        directory",
           "        target = self.path\n        directory", "TokenFileTests"),
    Mutant("token file: damaged ones are kept", "        self._keep_damaged(target)\n", "", "TokenFileTests"),
    Mutant("token file: what a failed write leaves", "            with contextlib.suppress(OSError):\n"
           "                os.unlink(temporary)\n            raise\n", "            raise\n", "TokenFileTests"),
    Mutant("refresh: locked across processes",
           "with self._file.lock():             # for the writing, too: another process may be at it",
           "with contextlib.suppress():", "ProcessRaceTests"),
    Mutant("refresh: reads again inside the lock",
           "                    self._stamp = None\n                    self._read_if_changed()\n", "",
           "ProcessRaceTests"),
    Mutant("refresh: a spent token is not sent again", "if not refresh_token or refresh_token in self._spent:",
           "if not refresh_token:", "RefreshTests"),
    Mutant("refresh: the loser of a race reads again",
           "        self._spent.add(refresh_token)\n        self._stamp = None\n        self._read_if_changed()\n",
           "        self._spent.add(refresh_token)\n", "RefreshTests"),
    Mutant("refresh: a pause after faults",
           "        if time.monotonic() < self._retry_at:\n            raise", "        if False:\n            raise",
           "RefreshTests"),
    Mutant("refresh: an account that is refused", "if not self._usable(rejected) and not self._just_renewed(rejected):",
           "if not self._usable(rejected):", "RefreshTests"),
    Mutant("refresh: unsaved tokens stay", 'token["access_token"] == self._outdated', "False", "TokenFileTests"),
    Mutant("refresh: unsaved tokens stay, rotated ones too", 'or text_in(token, "refresh_token") in self._spent)', ")",
           "TokenFileTests"),
    Mutant("refresh: unsaved tokens are saved later",
           "                    if self._unsaved:\n                        self._save()\n", "", "TokenFileTests"),
    Mutant("refresh: a logout amid a call", '            return token["access_token"]            # nobody',
           '            return self._token["access_token"]      # nobody', "RefreshTests"),
    # ---- the end
    Mutant("shutdown: running requests finish",
           "finished = self.gateway.running.wait_until_idle(grace)", "finished = True",
           "StartTests"),
    Mutant("shutdown: a second signal", "        if len(self._received) > 1:", "        if False:", "StartTests"),
    Mutant("shutdown: connections close after their answer",
           "        if self._gateway.running.draining:\n            self.keep",
           "        if False:\n            self.keep", "StartTests ConnectionTests"),
    Mutant("shutdown: the port is free at once",
           'allow_reuse_address = os.name == "posix"', "allow_reuse_address = False",
           "StartTests"),
    Mutant("client: a client that leaves while its request goes out",
           "call.client.wait(call.wait_for(self.sock), writing)", "wait_ready((), 60, [self.sock])",
           "LeavingClientTests"),
    # ---- the event loop, the upstream's oddities, early bytes
    Mutant("upstream: interim answers are skipped", "while head.status < 200 and head.status != 101:", "while False:",
           "UpstreamAnswerTests"),
    Mutant("upstream: a connection that ends is not kept",
           "if sent and not ends_connection(head.version, head.headers) else None)", "if sent else None)",
           "UpstreamAnswerTests"),
    Mutant("upstream: nor one of HTTP/1.0", """return "close" in connection or version == "1.0" and""",
           """return "close" in connection or False and""", "UpstreamAnswerTests"),
    Mutant("upstream: another version", r'= re.compile(r"HTTP/(1\.[0-9])', r'= re.compile(r"HTTP/(.\.[0-9])',
           "UpstreamAnswerTests"),
    Mutant("upstream: the first line is looked at at once", "        if self._line_ends and not before:",
           "        if False:", "UpstreamAnswerTests"),
    Mutant("upstream: lengths that are none", r'if not re.match(r"[0-9]{1,40}\Z", length):',
           r'if not re.match(r"[-+ ,0-9]+\Z", length):', "UpstreamAnswerTests"),
    Mutant("upstream: what has begun to answer is not asked again", "begun = begun or bool(received)", "begun = False",
           "UpstreamAnswerTests"),
    Mutant("upstream: a proxy cannot answer in its place",
           "super().__init__(context.wrap_socket(sock, server_hostname=name))",
           "self.sock = context.wrap_socket(sock, server_hostname=name)", "ProxyTests"),
    Mutant("upstream: nonsense is not asked for again", "failure.may_pass = isinstance(reason, OSError)",
           "failure.may_pass = True", "UpstreamAnswerTests"),
    Mutant("upstream: an interim answer is a beginning", "self._head_lines(received, call, begun=True)",
           "self._head_lines(received, call, begun=False)", "UpstreamAnswerTests"),
    Mutant("upstream: the end of a TLS connection", "LOST = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)",
           "LOST = (ConnectionError,)", "UpstreamAnswerTests"),
    Mutant("upstream: a status of three digits", r"[ \t]+([1-9][0-9][0-9])(?:", r"[ \t]+([1-9][0-9]+)(?:",
           "UpstreamAnswerTests"),
    Mutant("upstream: answers without a body", "if self.status < 200 or self.status in (204, 304):", "if False:",
           "UpstreamAnswerTests UpstreamRequestTests"),
    Mutant("upstream: another protocol", 'if not b"HTTP/".startswith(received[:5]):', "if False:",
           "UpstreamAnswerTests"),
    Mutant("upstream: what a header cannot carry", 'if UNSENDABLE.search("".join(headers.values())):', "if False:",
           "UpstreamRequestTests"),
    Mutant("upstream: what a request line cannot carry", r'if re.search(r"[^\x21-\x7e]", target):', "if False:",
           "UpstreamRequestTests"),
    Mutant("client: a client that leaves while a proxy thinks",
           "call = replace(request.call, patience=CONNECT_TIMEOUT)", "call = UpstreamCall(patience=CONNECT_TIMEOUT)",
           "ProxyTests"),
    Mutant("upstream: nor does an empty one", "        self.surplus = self.done\n", "        self.surplus = False\n",
           "UpstreamRequestTests"),
    Mutant("upstream: an early answer is read",
           "                with contextlib.suppress(*LOST):\n",
           "                with contextlib.suppress():\n", "UpstreamRequestTests"),
    Mutant("upstream: no endless end", "if left <= 0 or isinstance(step, Wait) and not wait_ready([step.sock], left):",
           "if isinstance(step, Wait) and not wait_ready([step.sock], 1):", "UpstreamRequestTests"),
    Mutant("upstream: odd counts",
           "return value if type(value) is int and value > 0 else 0", "return value or 0",
           "UpstreamBodyTests"),
    Mutant("event loop: a stream between two turns is registered for nothing",
           "        self._register(stream, {})                  # by its next", "        # by its next",
           "EventLoopTests"),
    Mutant("event loop: nothing half registered stays",
           "            stream.registered[sock] = events        # one by one", "            # one by one",
           "EventLoopTests"),
    Mutant("event loop: a sign of life between two turns",
           "        if stream.registered or stream.unsent:      # otherwise", "        if True:      # otherwise",
           "EventLoopTests"),
    Mutant("event loop: no descriptor for it",
           "            except (OSError, RuntimeError) as fault:\n                reason",
           "            except ZeroDivisionError as fault:\n                reason", "EventLoopTests"),
    Mutant("event loop: a client that does not read", '            raise socket.timeout("the client does not read")\n',
           "            return\n", "EventLoopTests"),
    Mutant("event loop: a silent upstream", "            raise silence(stream.wait)\n        self._send",
           "            return\n        self._send", "EventLoopTests"),
    Mutant("event loop: a client that leaves", "            stream.client.check()\n", "            pass\n",
           "EventLoopLeavingClientTests EventLoopTests"),
    Mutant("event loop: a failure stays with its stream",
           "        except BaseException as failure:\n            self._end(stream, False, failure)",
           "        except ZeroDivisionError as failure:\n"
           "            self._end(stream, False, failure)", "EventLoopTests"),
    Mutant("event loop: turns", "LOOP_STEPS = 32 ", "LOOP_STEPS = 10 ** 9 ", "EventLoopTests"),
    Mutant("body: counted as it arrives", "            self._reserve(len(pieces[-1]))\n", "", "BodyTests"),
    Mutant("body: a promise takes no room", "        pieces: list[bytes] = []\n"
           "        while not framing.done:\n"
           "            data = self._peer", "        pieces: list[bytes] = []\n"
           "        self._reserve(framing._left or 0)\n"
           "        while not framing.done:\n"
           "            data = self._peer", "BodyTests"),
    Mutant("body: room for what a packed one may become",
           "            self._reserve(limits.max_body)          # what it may become\n", "", "BodyTests"),
    Mutant("slow client: a body that trickles",
           "                                  limits.body_timeout + (length or limits.max_body) / SLOWEST_BODY)",
           "                                  1e6)", "SlowClientTests"),
    Mutant("token file: one lock by any name", "            target = os.path.realpath(self.path)    # by",
           "            target = os.path.abspath(self.path)    # by", "TokenFileTests"),
    Mutant("client: a client that leaves after early bytes", "        if keep:\n"
           "            self.peer.unread += data\n"
           "        else:\n"
           "            self.watched = False\n", "        self.watched = False\n", "LeavingClientTests"),
    Mutant("client: early bytes are not lost", "            self.peer.unread += data\n", "            pass\n",
           "RunningStreamTests ConnectionTests"),
    Mutant("slow client: a client that has ended", "            if not more:\n                return None\n", "",
           "ConnectionTests FramingTests"),
    Mutant("framing: a request line that is none is refused at once",
           "        if self._line_ends and not before:", "        if False:",
           "FramingTests ConnectionTests SlowClientTests"),
    Mutant("framing: blank lines before a request", "del received[:blank.end() if blank else 0]", "pass",
           "FramingTests"),
    Mutant("secret: as JSON tells it", "            if not SAME_IN_JSON.match(secret):\n", "            if False:\n",
           "SecrecyTests"),
    Mutant("secret: in errors of others",
           "failure.reworded(masked(str(failure), self._gateway.secrets()))", "failure", "ClaudeErrorTests"),
    Mutant("key: guesses at the status page", "and not guessed:", ":", "ClientKeyTests"),
    Mutant("stream: only what stands side by side is joined", " + sum(map(len, after)) < len(data):", " < 0:",
           "HotPathTests"),
    Mutant("stream: only deltas of one block are joined", "if len(set(before)) > 1 or ", "if ", "HotPathTests"),
    Mutant("stream: obfuscation keeps deltas apart", '"include_obfuscation") is not True)',
           '"include_obfuscation") or True)', "StreamFramingTests"),
    Mutant("shutdown: no request on an open connection", "if self.draining or self.count >= self._most:",
           "if self.count >= self._most:", "ConnectionTests"),
)


def main(words: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    with open(os.path.join(PROJECT, "claude_gateway.py"), encoding="utf-8", newline="") as file:
        program = file.read()
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        copy = os.path.join(directory, "project")
        shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "*_cache"))
        tests = sorted({test for mutant in chosen for test in mutant.tests.split()})
        if outcome_of(copy, program, tests, 600) != "SURVIVED":
            print("The tests fail as it is: %s" % " ".join(tests))
            return 1
        for mutant in chosen:
            started = time.monotonic()
            outcome = "DOES NOT APPLY: its text is there %d times" % program.count(mutant.old)
            if program.count(mutant.old) == 1:
                changed = program.replace(mutant.old, mutant.new)
                compile(changed, mutant.name, "exec")       # a syntax error would be caught by any test
                outcome = outcome_of(copy, changed, mutant.tests.split())
            failed += not outcome.startswith("caught")
            print("%-56s %s  %.1f s" % (mutant.name, outcome, time.monotonic() - started), flush=True)
    print("%d of %d caught" % (len(chosen) - failed, len(chosen)))
    return 1 if failed else 0


def outcome_of(copy: str, program: str, tests: list[str], patience: int = PATIENCE) -> str:
    """What these tests say of this program."""
    with open(os.path.join(copy, "claude_gateway.py"), "w", encoding="utf-8", newline="") as file:
        file.write(program)
    try:
        names = ["test_claude_gateway." + test for test in tests]
        run = subprocess.run([sys.executable, "-B", "-m", "unittest", "-f", *names], cwd=copy, timeout=patience,
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        return "caught (it hangs)"
    if not run.returncode:
        return "SURVIVED"
    failure = re.search(r"^(?:FAIL|ERROR): (test_\w+)", run.stderr.decode("utf-8", "replace"), re.M)
    return "caught by %s" % failure.group(1) if failure else "BROKEN: no test ran"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
