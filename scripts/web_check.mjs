// Runs .bin files in MediaPipe's web runtime in a headless Chromium: for web_check.py, which gives the job as JSON on
// stdin and reads the answers as JSON from stdout.  Imports from node_modules of the current directory.

import { createRequire } from "node:module";
import { createServer } from "node:http";
import { createReadStream, statSync, readFileSync } from "node:fs";
import path from "node:path";

const job = JSON.parse(readFileSync(0, "utf8")); // {chromium, files: {name: path}, prompts, maxTokens}
const modules = path.join(process.cwd(), "node_modules");
const { chromium } = createRequire(path.join(modules, "x"))("playwright-core");

const TYPES = { ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm", ".html": "text/html" };
const server = createServer((request, response) => {
  const name = decodeURIComponent(request.url.slice(1));
  if (name === "page.html") {
    response.writeHead(200, { "Content-Type": "text/html" });
    response.end("<!doctype html><title>web_check</title>");
    return;
  }
  const file = job.files[name] ?? path.join(modules, "@mediapipe/tasks-genai", path.normalize("/" + name));
  try {
    const headers = { "Content-Type": TYPES[path.extname(file)] ?? "application/octet-stream" };
    response.writeHead(200, { ...headers, "Content-Length": statSync(file).size });
    createReadStream(file).pipe(response);
  } catch {
    response.writeHead(404);
    response.end();
  }
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const origin = `http://127.0.0.1:${server.address().port}`;

// WebGPU on the processor: SwiftShader is part of Chromium.
const browser = await chromium.launch({
  executablePath: job.chromium,
  args: ["--headless=new", "--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"],
});
const answers = {};
try {
  for (const name of Object.keys(job.files)) {
    const page = await browser.newPage();
    const log = [];
    page.on("console", (message) => log.push(message.text()));
    page.on("pageerror", (error) => log.push(String(error)));
    await page.goto(`${origin}/page.html`);
    try {
      answers[name] = await page.evaluate(
        async ({ name, prompts, maxTokens }) => {
          const { FilesetResolver, LlmInference } = await import("/genai_bundle.mjs");
          const files = await FilesetResolver.forGenAiTasks("/wasm");
          const model = await LlmInference.createFromOptions(files, {
            baseOptions: { modelAssetPath: `/${name}` },
            maxTokens,
            topK: 1,
            randomSeed: 0,
            forceF32: true, // SwiftShader has no float16
          });
          const found = {};
          for (const prompt of prompts) {
            found[prompt] = { tokens: model.sizeInTokens(prompt), text: await model.generateResponse(prompt) };
          }
          model.close();
          return found;
        },
        { name, prompts: job.prompts, maxTokens: job.maxTokens },
      );
    } catch (error) {
      answers[name] = { error: [String(error), ...log.slice(-5)].join("\n") };
    }
    await page.close();
  }
} finally {
  await browser.close();
  server.close();
}
console.log(JSON.stringify(answers));
