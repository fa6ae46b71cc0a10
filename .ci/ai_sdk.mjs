// The AI SDK against `start --demo`: its default (Responses API) and its chat model; text, stream, tools, objects.
// Usage: node ai_sdk.mjs BASE_URL   (with `ai`, `@ai-sdk/openai` and `zod` installed beside it)
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const openai = createOpenAI({ baseURL: process.argv[2], apiKey: "none" });
const weather = tool({
  description: "The weather of a city", inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => "8 degrees in " + city,
});

for (const model of [openai("claude-sonnet-5-5"), openai.chat("claude-sonnet-5-5")]) {
  const plain = await generateText({ model, prompt: "Hello", maxRetries: 0 });
  assert.match(plain.text, /simulated answer/);
  assert.equal(plain.finishReason, "stop");

  const stream = streamText({ model, prompt: "Hello", maxRetries: 0, onError: ({ error }) => { throw error; } });
  let streamed = "";
  for await (const text of stream.textStream) streamed += text;
  assert.equal(streamed, plain.text);
  assert.equal(await stream.finishReason, "stop");

  const looped = await generateText({ model, prompt: "Weather?", tools: { weather }, stopWhen: stepCountIs(3), maxRetries: 0 });
  assert.match(looped.text, /8 degrees/);
  assert.equal(looped.steps.length, 2);

  const city = await generateText({ model, prompt: "A city", maxRetries: 0,
    output: Output.object({ schema: z.object({ name: z.string(), people: z.number() }) }) });
  assert.equal(typeof city.output.people, "number");
}

// A conversation of three turns with a tool loop; the Responses model names every earlier answer by its id.
for (const model of [openai("claude-sonnet-5-5"), openai.chat("claude-sonnet-5-5")]) {
  for (const streamed of [false, true]) {
    const messages = [];
    for (const content of ["Weather?", "And tomorrow?", "Thanks"]) {
      messages.push({ role: "user", content });
      const call = { model, messages, tools: { weather }, stopWhen: stepCountIs(3), maxRetries: 0 };
      const result = streamed ? streamText({ ...call, onError: ({ error }) => { throw error; } }) : await generateText(call);
      if (streamed) await result.consumeStream();
      const { messages: answered } = await result.response;
      assert.match(JSON.stringify(answered), /8 degrees/);
      messages.push(...answered);
    }
    assert.equal(messages.filter(({ role }) => role === "tool").length, 3);
  }
}
console.log("node: the AI SDK's Responses and chat models take text, streams, tools and objects");
