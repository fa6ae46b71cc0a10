#!/usr/bin/env python3
"""Codex CLI, driven against the gateway over a scripted Claude: it reads a file, edits it, runs a command, reports.

    python3 .ci/codex.py CODEX      CODEX: the program of the npm package @openai/codex

As a custom provider, and with Codex's built-in provider redirected, which tries a WebSocket first.  Then sessions of
both kinds with a small window, which Codex compacts again and again: by itself, or with a compaction_trigger.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

from claude_gateway import Config, Gateway, Service, setup_text
from test_claude_gateway import FakeClaude, message, text, thinking, tool_use

PATCH = """*** Begin Patch
*** Update File: greeting.txt
@@
-hello
+hello, gateway
*** End Patch"""


def shell_call(number: int, command: str):
    """A reply that calls Codex's own tool for commands, whatever it is called in this version."""
    def reply(recorded):
        names = [tool["name"] for tool in recorded.body["tools"]]
        name = next(name for name in ("exec_command", "shell_command", "shell") if name in names)
        schema = next(tool for tool in recorded.body["tools"] if tool["name"] == name)["input_schema"]["properties"]
        argument = "cmd" if "cmd" in schema else "command"
        value = ["bash", "-lc", command] if schema[argument].get("type") == "array" else command
        return message(thinking("step %d" % number, "c2ln%d" % number), text("Step %d." % number),
                       tool_use("toolu_%d" % number, name, {argument: value}), model=recorded.body["model"])
    return reply


def patch_call(number: int):
    """A reply that edits the file: with the custom tool apply_patch where Codex offers it, else by a command."""
    def reply(recorded):
        if any(tool["name"] == "apply_patch" for tool in recorded.body["tools"]):
            return message(thinking("edit", "c2lnZWRpdA"),
                           tool_use("toolu_%d" % number, "apply_patch", {"input": PATCH}), model=recorded.body["model"])
        return shell_call(number, "apply_patch <<'EOT'\n%s\nEOT" % PATCH)(recorded)
    return reply


def codex_session(codex: str, claude: FakeClaude, folder: str, configuration: str, prompt: str) -> str:
    """One `codex exec` against a gateway in front of the scripted Claude; what it printed."""
    with tempfile.TemporaryDirectory() as home:
        service = Service(Gateway(Config(base_url=claude.url, anthropic_api_key="sk-ant-api03-x", host="127.0.0.1",
                                         port=0, alias=(("gpt-5.5", "opus"),))))
        service.start()
        with open(os.path.join(home, "config.toml"), "w") as file:
            file.write(configuration.replace("BASE_URL", service.url))
        environment = dict(os.environ, CODEX_HOME=home, HOME=home, OPENAI_API_KEY="none")
        ended = subprocess.run(
            [codex, "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", prompt],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            timeout=120)
        service.close(1)
        said = ended.stdout.decode() + ended.stderr.decode()
        assert ended.returncode == 0, said
        assert "All done." in ended.stdout.decode(), said
        return said


def run_long(codex: str, title: str, configuration: str, triggers: bool) -> None:
    """Eight steps in a window that is full after every second one."""
    steps = iter(range(1, 100))

    def reply(recorded):
        asked = recorded.body
        if "compaction" in asked:
            return None                             # the fake's own summary
        if "CONTEXT CHECKPOINT" in json.dumps(asked["messages"][-1]):      # its own prompt for a summary
            return message(text("The steps so far went well."), model=asked["model"])
        step = next(steps)
        if step > 8:
            return message(text("All done."), model=asked["model"])
        answer = shell_call(step, "echo step %d" % step)(recorded)
        answer["usage"]["input_tokens"] = 30_000 if step % 2 == 0 else 100
        return answer

    with FakeClaude() as claude, tempfile.TemporaryDirectory() as folder:
        claude.play(*[reply] * 40)
        window = "model_context_window = 40000\nmodel_auto_compact_token_limit = 20000\n"
        said = codex_session(codex, claude, folder, window + configuration, "Make eight steps.")
        assert not claude.violations, claude.violations
        asked = [sent.body for sent in claude.messages]
        compacted = sum("compaction" in each for each in asked) if triggers else said.count("context compacted")
        assert compacted >= 2, said
        with_block = sum(each["messages"][0]["content"][0]["type"] == "compaction" for each in asked)
        assert (with_block > 0) == triggers, json.dumps(asked[-1])[:2000]
        print("codex, %s: eight steps, compacted %d times" % (title, compacted))


def run(codex: str, title: str, configuration: str) -> None:
    with FakeClaude() as claude, tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "greeting.txt"), "w") as file:
            file.write("hello\n")
        claude.play(shell_call(1, "cat greeting.txt"), patch_call(2), shell_call(3, "wc -c greeting.txt > size.txt"),
                    message(text("All done."), model="claude-opus-5-5"))
        said = codex_session(codex, claude, folder, configuration, "Greet the gateway in greeting.txt.")
        with open(os.path.join(folder, "greeting.txt")) as file:
            greeting = file.read()
        assert greeting == "hello, gateway\n", (greeting, said)
        assert os.path.exists(os.path.join(folder, "size.txt")), said
        assert not claude.violations, claude.violations
        last = claude.messages[-1].body["messages"]
        signatures = [block.get("signature") for turn in last for block in turn["content"]
                      if block["type"] == "thinking"]
        assert len(signatures) == 3, "the signed thinking comes back in every turn: %s" % json.dumps(last)[:2000]
        print("codex, %s: four turns, a command, an edit, a report; thinking came back %d times" %
              (title, len(signatures)))


def main() -> None:
    codex = sys.argv[1]
    recipe = setup_text("codex", Config()).replace("http://localhost:45554/v1", "BASE_URL") + "\n"
    run(codex, "the settings", recipe)
    run(codex, "a model name with custom tools", recipe.replace("claude-opus-5-5", "gpt-5.5"))
    built_in = 'model = "gpt-5.5"\nopenai_base_url = "BASE_URL"\n'
    run(codex, "built-in provider redirected", built_in)
    run_long(codex, "the settings", recipe, triggers=False)
    run_long(codex, "built-in provider redirected", built_in, triggers=True)


if __name__ == "__main__":
    main()
