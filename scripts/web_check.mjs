// Runs .bin files in MediaPipe's web runtime in a headless Chromium: for web_check.py, which gives the job as JSON on
// stdin and reads the answers as JSON from stdout.  What it is doing goes to stderr.  Imports from node_modules of the
// current directory.

import { createRequire } from "node:module";
import { createServer } from "node:http";
import { createReadStream, statSync, readFileSync } from "node:fs";
import path from "node:path";

// {chromium, files: {name: {model, loras: {name: path}, rank}}, prompts, maxTokens, limits: {step: seconds}}
const job = JSON.parse(readFileSync(0, "utf8"));
const modules = path.join(process.cwd(), "node_modules");
const { chromium } = createRequire(path.join(modules, "x"))("playwright-core");

const TYPES = { ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm", ".html": "text/html" };
const served = {};
for (const [name, { model, loras }] of Object.entries(job.files)) {
  served[`${name}/model`] = model;
  for (const [lora, file] of Object.entries(loras)) served[`${name}/${lora}`] = file;
}
const server = createServer((request, response) => {
  const name = decodeURIComponent(request.url.slice(1));
  if (name === "page.html") {
    response.writeHead(200, { "Content-Type": "text/html" });
    response.end("<!doctype html><title>web_check</title>");
    return;
  }
  const file = served[name] ?? path.join(modules, "@mediapipe/tasks-genai", path.normalize("/" + name));
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

// WebGPU on the processor: SwiftShader is part of Chromium.  It can take seconds for what the watchdog of the graphics
// process allows less for, and nothing outside of 127.0.0.1 is to be waited for.
const ARGS = [
  "--headless=new",
  "--no-sandbox",
  "--enable-unsafe-webgpu",
  "--use-webgpu-adapter=swiftshader",
  "--use-angle=swiftshader",
  "--ignore-gpu-blocklist",
  "--disable-gpu-watchdog",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--no-first-run",
  "--no-proxy-server",
];

// Does one step of a file, within its limit; `log` is what the browser said so far.
async function step(name, what, log, work) {
  const seconds = job.limits[what];
  console.error(`${name}: ${what} ...`);
  let timer;
  const limit = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no answer within ${seconds} s`)), 1000 * seconds);
  });
  try {
    return await Promise.race([work(), limit]);
  } catch (error) {
    const said = log.length ? log.slice(-10) : ["(the browser said nothing)"];
    throw new Error([`${what}: ${error.message}`, ...said].join("\n"));
  } finally {
    clearTimeout(timer);
  }
}

// All answers of one file, in a browser of its own: what one leaves behind cannot hurt the next.
async function answersOf(name, { loras, rank }) {
  const log = [];
  const run = (what, work) => step(name, what, log, work); // the one limit there is
  const browser = await run("browser", () => chromium.launch({ executablePath: job.chromium, args: ARGS, timeout: 0 }));
  try {
    const page = await run("page", async () => {
      const page = await browser.newPage();
      page.on("console", (message) => log.push(message.text()));
      page.on("pageerror", (error) => log.push(String(error)));
      page.on("crash", () => log.push("the page crashed"));
      page.on("requestfailed", (request) => log.push(`${request.url()}: ${request.failure()?.errorText}`));
      browser.on("disconnected", () => log.push("the browser ended"));
      await page.goto(`${origin}/page.html`);
      return page;
    });
    await run("adapter", () =>
      page.evaluate(async () => {
        const adapter = await navigator.gpu?.requestAdapter();
        if (!adapter) throw new Error("the browser has no WebGPU adapter");
        const { vendor, architecture, description } = adapter.info;
        console.log(`WebGPU adapter: ${vendor} ${architecture} ${description}`);
        const request = GPUAdapter.prototype.requestDevice;
        GPUAdapter.prototype.requestDevice = async function (...args) {
          const device = await request.apply(this, args);
          device.lost.then(({ reason, message }) => console.error(`WebGPU device lost: ${reason} ${message}`));
          device.addEventListener("uncapturederror", ({ error }) => console.error(`WebGPU: ${error.message}`));
          return device;
        };
      }),
    );
    await run("model", () =>
      page.evaluate(
        async ({ url, rank, maxTokens }) => {
          const { FilesetResolver, LlmInference } = await import("/genai_bundle.mjs");
          const files = await FilesetResolver.forGenAiTasks("/wasm");
          window.model = await LlmInference.createFromOptions(files, {
            baseOptions: { modelAssetPath: url },
            maxTokens,
            topK: 1,
            randomSeed: 0,
            forceF32: true, // SwiftShader has no float16
            ...(rank && { loraRanks: [rank] }),
          });
        },
        { url: `/${name}/model`, rank, maxTokens: job.maxTokens },
      ),
    );
    const answers = {};
    for (const lora of [null, ...Object.keys(loras)]) {
      const url = lora && `/${name}/${lora}`;
      if (url) {
        await run("lora", () => page.evaluate(async (url) => void (window.lora = await model.loadLoraModel(url)), url));
      }
      const found = (answers[lora ?? ""] = {});
      for (const prompt of job.prompts) {
        found[prompt] = await run("prompt", () =>
          page.evaluate(
            async ({ prompt, url }) => ({
              tokens: model.sizeInTokens(prompt),
              text: await (url ? model.generateResponse(prompt, window.lora) : model.generateResponse(prompt)),
            }),
            { prompt, url },
          ),
        );
      }
    }
    return answers;
  } finally {
    // It may not answer any more; it ends with this process at the latest.
    await run("close", () => browser.close()).catch(() => {});
  }
}

const answers = {};
for (const [name, file] of Object.entries(job.files)) {
  try {
    answers[name] = await answersOf(name, file);
  } catch (error) {
    answers[name] = { error: error.message };
  }
}
process.stdout.write(JSON.stringify(answers) + "\n", () => process.exit(0));
