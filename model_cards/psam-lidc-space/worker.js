// Loads the ONNX graphs of the model and samples masks, away from the page's own thread.
// WebGPU where the browser has it, otherwise WebAssembly with threads (cross-origin isolated pages) or one thread.
//
// Messages in: {type: "sample", id, repository, useGpu, image, prompt, numSamples, seed, noise}, {type: "cancel", id},
//              {type: "prefetch", repository}
// Messages out: {type: "progress", id, text, done, total}, {type: "result", id, ...}, {type: "error", id, message},
//               {type: "cancelled", id}

import { pixelValues, promptInWindow, spreadNoise, summarise, windowOf } from "./processing.js";

const VENDOR = new URL("vendor/", import.meta.url).href;
const SAMPLES_PER_CALL = 4; // progress and cancelling happen between calls of the decoder
const MAX_MASK_VALUES = 2 ** 28; // samples x pixels of the window
const MAX_THREADS = 4;
const PROGRESS_MS = 100; // between two reports of a download; each lets messages in, which takes a browser some 5 ms

const cancelled = new Set();
let encoded = null; // {key, image_embeddings} of the last window
const loaded = new Map(); // promises of "settings", "runtime" and the sessions, by name

class Cancelled extends Error {}

onmessage = ({ data }) => {
  if (data.type === "cancel") cancelled.add(data.id);
  else if (data.type === "prefetch") prefetch(data.repository);
  else sample(data);
};

async function sample(request) {
  const { id } = request;
  const progress = (text, done, total) => postMessage({ type: "progress", id, text, done, total });
  try {
    postMessage({ type: "result", id, ...(await run(request, progress)) });
  } catch (error) {
    if (error instanceof Cancelled) postMessage({ type: "cancelled", id });
    else postMessage({ type: "error", id, message: await explain(error) });
  } finally {
    cancelled.delete(id);
  }
}

/** One line about an error; a graphics driver may fail where WebAssembly works. */
async function explain(error) {
  const { provider } = (await loaded.get("runtime")?.catch(() => null)) ?? {};
  const advice = provider === "webgpu" ? "; to sample without WebGPU, add ?device=wasm to the address of the page" : "";
  return `${error.message ?? error}`.split("\n")[0] + advice;
}

async function run({ id, repository, useGpu, image, prompt, numSamples, seed, noise }, progress) {
  const check = async () => {
    await new Promise((resolve) => setTimeout(resolve)); // lets a "cancel" message in
    if (cancelled.has(id)) throw new Cancelled();
  };
  const config = await once("settings", () => loadSettings(repository));
  const window = windowOf(prompt, image, config.crop_size);
  if (numSamples * window.side ** 2 > MAX_MASK_VALUES) {
    const most = Math.floor(MAX_MASK_VALUES / window.side ** 2);
    throw new Error(`${numSamples} samples of a window of ${window.side} pixels need too much memory; accepted: up to ${most}`);
  }
  const { ort, device } = await once("runtime", () => loadRuntime(useGpu, progress, check));
  const encoder = await session("vision_encoder", repository, progress, check);
  const decoder = await session(prompt.box ? "box_decoder" : "point_decoder", repository, progress, check);
  await check();

  const started = performance.now();
  progress("Encoding the window", 0, numSamples);
  const size = config.image_size;
  const key = [image.id, window.x, window.y, window.side].join();
  if (encoded?.key !== key) {
    const pixels = new ort.Tensor("float32", pixelValues(image, window, config), [1, 3, size, size]);
    encoded = { key, ...(await encoder.run({ pixel_values: pixels })) };
  }
  const ready = performance.now();

  const latent = config.latent_dim;
  const values = noise ?? spreadNoise(numSamples, latent, seed);
  const shared = { image_embeddings: encoded.image_embeddings, ...promptTensors(ort, promptInWindow(prompt, window, size)) };
  const [masks, outlines] = [[], []]; // logits of the samples, and of the same samples given presence
  let presence;
  for (let first = 0; first < numSamples; first += SAMPLES_PER_CALL) {
    await check();
    progress("Sampling", first, numSamples);
    const count = Math.min(SAMPLES_PER_CALL, numSamples - first);
    const part = values.slice(first * latent, (first + count) * latent);
    const output = await decoder.run({ ...shared, noise: new ort.Tensor("float32", part, [1, 1, count, latent]) });
    masks.push(...perSample(await output.pred_masks.getData(), count));
    outlines.push(...perSample(await output.outline_masks.getData(), count));
    [presence] = await output.presence.getData();
  }
  if (![...masks, ...outlines, [presence]].every((sample) => sample.every(Number.isFinite))) throw new Error("the model's logits are not finite");
  const seconds = { encoder: (ready - started) / 1000, samples: (performance.now() - ready) / 1000 };
  return { ...summarise(masks, outlines, presence, window, image), window, presence, noise: values, seconds, device };
}

/** Copies of the parts of an output, one per sample. */
function perSample(values, count) {
  const length = values.length / count;
  return Array.from({ length: count }, (_, index) => values.slice(index * length, (index + 1) * length));
}

/** Tensors of a prompt in pixels of the model's input. */
function promptTensors(ort, { box, points, labels }) {
  if (box) return { input_boxes: new ort.Tensor("float32", Float32Array.from(box), [1, 1, 4]) };
  return {
    input_points: new ort.Tensor("float32", Float32Array.from(points.flat()), [1, 1, points.length, 2]),
    input_labels: new ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [1, 1, labels.length]),
  };
}

// ------------------------------------------------------------------------------------------------------------ loading

/** Value of a loader that runs once; a failed or cancelled one runs again at the next request. */
function once(name, load) {
  if (!loaded.has(name)) {
    const value = load();
    loaded.set(name, value);
    value.catch(() => loaded.delete(name));
  }
  return loaded.get(name);
}

/** Settings of the processor and the size of the noise, from the model's repository. */
async function loadSettings(repository) {
  const names = ["processor_config.json", "config.json"];
  const [processor, model] = await Promise.all(names.map(async (name) => (await request(repository + name)).json()));
  return { ...processor, latent_dim: model.latent_dim };
}

/** onnxruntime-web for WebGPU if it is wanted and the browser offers an adapter, otherwise for WebAssembly. */
async function loadRuntime(useGpu, progress, check) {
  const adapter = useGpu ? await navigator.gpu?.requestAdapter().catch(() => null) : null;
  const [script, wasm] = adapter
    ? ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"]
    : ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.wasm"];
  const ort = await import(VENDOR + script);
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
  ort.env.wasm.wasmPaths = VENDOR;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmBinary = await download(VENDOR + wasm, "the runtime", progress, check);
  const half = adapter?.features.has("shader-f16");
  const device = adapter ? `WebGPU, ${half ? "16" : "32"} bits` : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  return { ort, device, provider: adapter ? "webgpu" : "wasm", suffix: half ? "_fp16" : "" };
}

function session(name, repository, progress, check) {
  return once(name, async () => {
    const { ort, provider, suffix } = await loaded.get("runtime");
    const graph = await download(`${repository}onnx/${name}${suffix}.onnx`, name.replace("_", " "), progress, check);
    progress(`Starting the ${name.replace("_", " ")}`);
    return ort.InferenceSession.create(graph, { executionProviders: [provider] });
  });
}

/** Let the service worker keep the decoder of the other kind of prompt, so that it works offline too. */
async function prefetch(repository) {
  const { suffix } = await loaded.get("runtime");
  for (const name of ["box_decoder", "point_decoder"]) {
    if (!loaded.has(name)) await fetch(`${repository}onnx/${name}${suffix}.onnx`).then((answer) => answer.arrayBuffer()).catch(() => {});
  }
}

async function request(url) {
  const answer = await fetch(url).catch(() => {
    throw new Error(`${url} cannot be loaded; accepted: a connection to the model's repository, needed once`);
  });
  if (!answer.ok) throw new Error(`${url} cannot be loaded (status ${answer.status})`);
  return answer;
}

/** Bytes of a file, with progress in MB and `check` between parts. */
async function download(url, title, progress, check) {
  const answer = await request(url);
  const total = Number(answer.headers.get("content-length")) || undefined;
  const parts = [];
  let [done, reported] = [0, 0];
  const reader = answer.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    done += part.value.length;
    if (performance.now() - reported < PROGRESS_MS) continue;
    progress(`Loading ${title}`, done, total);
    await check();
    reported = performance.now();
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
