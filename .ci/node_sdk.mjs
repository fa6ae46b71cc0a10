// OpenAI's package for JavaScript against `start --demo`: plain, streaming, the strict stream helper, tools, image.
// Usage: node node_sdk.mjs BASE_URL   (with `openai` installed beside it)
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const hello = { model: "sonnet", messages: [{ role: "user", content: "Hello" }] };
const tools = [{ type: "function", function: {
  name: "get.weather", parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] } } }];

const plain = await client.chat.completions.create(hello);
assert.match(plain.choices[0].message.content, /simulated answer/);
assert.equal(plain.choices[0].finish_reason, "stop");

let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...hello, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(streamed, plain.choices[0].message.content);

const helper = client.chat.completions.stream({ ...hello, tools, stream_options: { include_usage: true } });
const whole = await helper.finalChatCompletion();
const call = whole.choices[0].message.tool_calls[0];
assert.equal(call.function.name, "get.weather");
assert.equal(typeof JSON.parse(call.function.arguments).city, "string");
assert.equal(whole.choices[0].finish_reason, "tool_calls");
assert.ok(whole.usage.total_tokens > 0);

const answered = await client.chat.completions.create({ ...hello, tools, messages: [
  ...hello.messages, whole.choices[0].message, { role: "tool", tool_call_id: call.id, content: "8 degrees" }] });
assert.match(answered.choices[0].message.content, /8 degrees/);

const pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const seen = await client.chat.completions.create({ model: "opus", messages: [{ role: "user", content: [
  { type: "text", text: "What is this?" },
  { type: "image_url", image_url: { url: "data:image/jpeg;base64," + pixel } }] }] });
assert.match(seen.choices[0].message.content, /image\/png/);

await assert.rejects(client.chat.completions.create({ ...hello, model: "no-such-model" }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
await assert.rejects(client.chat.completions.create({ ...hello, n: 2 }), OpenAI.BadRequestError);

console.log("node: plain, streaming, tools, image and errors are as OpenAI's package wants them");
