// The page: opens images, takes the prompt, asks worker.js for samples and shows them.

import { encodePng, readImage, startWorker } from "./images.js";
import { areaQuantiles, checkPrompt, MAX_POINTS, quantile } from "./processing.js";

const MAX_SAMPLES = 64;
const MAX_WAIT_MS = 5000; // for the service worker
const MAX_SEED = 2 ** 32 - 1;
const LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]"];
const MODEL = document.querySelector('meta[name="model"]').content;
// The only rule for the source of the weights: a page on this machine takes them from beside itself
const REPOSITORY = LOCAL_HOSTS.includes(location.hostname)
  ? new URL("./", location.href).href
  : `https://huggingface.co/${MODEL}/resolve/main/`;
const USE_GPU = new URLSearchParams(location.search).get("device") !== "wasm";
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const MAGMA = [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]];
const COLOURS = { sample: "#4cc9f0", shown: "#ff5d8f", half: "#ffd24d", prompt: "#ffffff", inside: "#7dff8a", outside: "#ff6b6b" };

const find = (id) => document.getElementById(id);
const canvas = find("canvas");

let image = null; // from readImage, with a number
let opened = 0; // images
let picture = null; // canvas with the grey values of the image at the chosen level and window
let view = null; // {x, y, side} of the square that is shown, in image pixels
let prompt = { points: [], labels: [] }; // or {box}
let dragged = null; // first corner of the box that is being made
let cursor = null; // [x, y] of the keyboard
let result = null; // of worker.js, with the request
let shown = null; // number of the sample under the pointer
let worker = null;
let requests = 0;
let pending = null; // {id, resolve, reject} of the sampling in progress

// -------------------------------------------------------------------------------------------------------------- image

/** Open a file, unless another image is chosen meanwhile; `id` is the number of this choice. */
async function open(file, example, id = ++opened) {
  showError("");
  let read;
  try {
    read = await readImage(file);
  } catch (error) {
    return id === opened && showError(error.message);
  }
  if (id !== opened) return;
  image = { id, ...read };
  forgetResult();
  find("spacing").value = example?.pixel_spacing_mm ?? image.spacing?.toFixed(4).replace(/0+$/, "") ?? "";
  find("name").textContent = `${image.name}, ${image.width} x ${image.height} px`;
  const sorted = image.data.slice(0, image.width * image.height).sort();
  const [low, high] = [quantile(sorted, 0.005), quantile(sorted, 0.995)];
  const [least, most] = [sorted[0], Math.max(sorted.at(-1), sorted[0] + 1)];
  setRange("level", least, most, image.level ?? (low + high) / 2);
  setRange("span", (most - least) / 1000, most - least, image.span ?? Math.max(high - low, (most - least) / 1000));
  cursor = view = null;
  paintPicture();
  showAll();
  setPrompt(example ? { box: example.box } : { points: [], labels: [] });
}

function setRange(id, low, high, value) {
  const input = find(id);
  [input.min, input.max, input.step] = [low, high, (high - low) / 500];
  input.value = value;
}

function paintPicture() {
  const [level, span] = [Number(find("level").value), Number(find("span").value)];
  const digits = span < 10 ? 2 : 0;
  find("level-value").textContent = level.toFixed(digits);
  find("span-value").textContent = span.toFixed(digits);
  picture = new OffscreenCanvas(image.width, image.height);
  const count = image.width * image.height;
  const pixels = new ImageData(image.width, image.height);
  for (let index = 0; index < count; index++) {
    for (let channel = 0; channel < 3; channel++) {
      const value = image.data[(channel % image.channels) * count + index];
      pixels.data[4 * index + channel] = ((value - level) / span + 0.5) * 255; // clamped by the array
    }
    pixels.data[4 * index + 3] = 255;
  }
  picture.getContext("2d").putImageData(pixels, 0, 0);
  paint();
  if (result) paintResult();
}

// --------------------------------------------------------------------------------------------------------------- view

function showAll() {
  const side = Math.max(image.width, image.height);
  view = { x: (image.width - side) / 2, y: (image.height - side) / 2, side };
  paint();
}

/** Zoom around the result's window, the prompt, or the centre of the view. */
function zoom(factor) {
  const largest = Math.max(image.width, image.height);
  const side = Math.min(Math.max(view.side * factor, 8), largest);
  if (side === largest) return showAll();
  const [x, y] = promptCentre() ?? cursor ?? [view.x + view.side / 2, view.y + view.side / 2];
  view = { x: x - side / 2, y: y - side / 2, side };
  paint();
}

function promptCentre() {
  const corners = prompt.box ? [prompt.box.slice(0, 2), prompt.box.slice(2)] : prompt.points;
  if (!corners.length) return null;
  return [0, 1].map((axis) => corners.reduce((sum, corner) => sum + corner[axis], 0) / corners.length);
}

/** Canvas context in image pixels of a square view, with the picture painted. */
function begin(target, { x, y, side }) {
  const size = Math.max(1, Math.round(target.clientWidth * devicePixelRatio));
  if (target.width !== size) target.width = target.height = size;
  const context = target.getContext("2d");
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.fillStyle = "#000";
  context.fillRect(0, 0, size, size);
  context.setTransform(size / side, 0, 0, size / side, (-x * size) / side, (-y * size) / side);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0);
  context.lineCap = "round";
  return { context, unit: (side / size) * devicePixelRatio }; // unit: one CSS pixel in image pixels
}

function strokeSegments(context, segments, colour, width) {
  context.beginPath();
  for (let k = 0; k < segments.length; k += 4) {
    context.moveTo(segments[k], segments[k + 1]);
    context.lineTo(segments[k + 2], segments[k + 3]);
  }
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.stroke();
}

function paint() {
  if (!view) return;
  const { context, unit } = begin(canvas, view);
  if (result) {
    context.globalAlpha = shown === null ? 0.75 : 0.2;
    for (const segments of result.outlines) strokeSegments(context, segments, COLOURS.sample, 1.2 * unit);
    context.globalAlpha = 1;
    if (shown === null) strokeSegments(context, result.meanOutline, COLOURS.half, 2.2 * unit);
    else strokeSegments(context, result.outlines[shown], COLOURS.shown, 3 * unit);
  }
  if (prompt.box) {
    const [x1, y1, x2, y2] = prompt.box;
    context.setLineDash([6 * unit, 4 * unit]);
    context.lineWidth = 1.5 * unit;
    context.strokeStyle = COLOURS.prompt;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    context.setLineDash([]);
  }
  prompt.points?.forEach(([x, y], index) => {
    context.beginPath();
    context.arc(x, y, 5 * unit, 0, 7);
    context.fillStyle = prompt.labels[index] ? COLOURS.inside : COLOURS.outside;
    context.fill();
    context.strokeStyle = "#000";
    context.lineWidth = 1.5 * unit;
    context.stroke();
  });
  if (cursor && document.activeElement === canvas) {
    const [x, y] = cursor;
    strokeSegments(context, [x - 10 * unit, y, x + 10 * unit, y, x, y - 10 * unit, x, y + 10 * unit], COLOURS.half, 1.5 * unit);
  }
}

// ------------------------------------------------------------------------------------------------------------- prompt

const mode = () => document.querySelector('input[name="mode"]:checked').value;

function setPrompt(value) {
  prompt = value;
  dragged = null;
  forgetResult();
  const round = (numbers) => numbers.map((number) => number.toFixed(1)).join(", ");
  const { points } = prompt;
  find("position").textContent = prompt.box
    ? `Box ${round(prompt.box)}`
    : points.length ? `${points.length} point${points.length > 1 ? "s" : ""}, last at ${round(points.at(-1))}` : "No prompt";
  paint();
}

function forgetResult() {
  result = shown = null;
  find("results").hidden = true;
}

const clamp = ([x, y]) => [Math.min(Math.max(x, 0), image.width), Math.min(Math.max(y, 0), image.height)].map((v) => Math.round(v * 10) / 10);

function place(event) {
  const box = canvas.getBoundingClientRect();
  return clamp([view.x + ((event.clientX - box.left) / box.width) * view.side, view.y + ((event.clientY - box.top) / box.height) * view.side]);
}

const boxBetween = ([ax, ay], [bx, by]) => [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)];

function addPoint(point) {
  const { points, labels } = prompt.box ? { points: [], labels: [] } : prompt;
  if (points.length >= MAX_POINTS) return showError(`accepted: up to ${MAX_POINTS} points`);
  setPrompt({ points: [...points, point], labels: [...labels, Number(mode())] });
}

function stretchBox(corner) {
  const first = dragged;
  const box = boxBetween(first, corner);
  if (box[2] - box[0] < 0.5 || box[3] - box[1] < 0.5) return;
  setPrompt({ box });
  dragged = first;
}

canvas.addEventListener("pointerdown", (event) => {
  if (!image || event.button) return;
  cursor = null;
  if (mode() !== "box") return addPoint(place(event));
  canvas.setPointerCapture(event.pointerId);
  dragged = place(event);
});
canvas.addEventListener("pointermove", (event) => {
  if (dragged && event.buttons) stretchBox(place(event));
});
canvas.addEventListener("pointerup", () => { dragged = null; });
canvas.addEventListener("focus", paint);
canvas.addEventListener("blur", paint);
canvas.addEventListener("keydown", (event) => {
  if (!image) return;
  const step = event.shiftKey ? 10 : 1;
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  if (event.key in moves) {
    cursor ??= (promptCentre() ?? [view.x + view.side / 2, view.y + view.side / 2]).map(Math.round);
    cursor = clamp(cursor.map((value, axis) => value + moves[event.key][axis]));
    if (dragged) stretchBox(cursor);
    if (!dragged || !prompt.box) find("position").textContent = `Cursor ${cursor.join(", ")}`;
    paint();
  } else if (event.key === "Enter" && cursor) {
    if (mode() !== "box") addPoint(cursor);
    else dragged = dragged ? null : cursor;
  } else if (event.key === "Escape") {
    setPrompt({ points: [], labels: [] });
  } else return;
  event.preventDefault();
});

// ----------------------------------------------------------------------------------------------------------- sampling

/** Start worker.js after the service worker, which keeps what it loads. */
async function startSampler() {
  if (worker) return;
  await registered;
  worker = startWorker(new URL("worker.js", location.href), "module");
  worker.onmessage = ({ data }) => {
    if (data.id !== pending?.id) return;
    if (data.type === "progress") showProgress(data);
    else if (data.type === "result") pending.resolve(data);
    else pending.reject(new Error(data.type === "cancelled" ? "" : data.message));
  };
  worker.onerror = () => pending?.reject(new Error("worker.js cannot be started; accepted: a current browser and a complete Space"));
}

/**
 * Sample the open image. The page calls it with its fields; `psam.sample` of the console is this function.
 *
 * @param box [x1, y1, x2, y2] in image pixels, or
 * @param points [[x, y], ...] with `labels`, 1 inside or 0 outside
 * @param noise one list of numbers per sample, standard normal; if it is missing,
 * @param numSamples and `seed` make it
 * @returns the result of `run` in worker.js
 */
async function sample({ box, points, labels, noise, numSamples = noise?.length ?? 16, seed = 0 }) {
  if (!image) throw new Error("no image is open");
  if (pending) throw new Error("a sampling is in progress");
  if (!(Number.isInteger(numSamples) && numSamples >= 1 && numSamples <= MAX_SAMPLES)) {
    throw new Error(`the number of samples must be a whole number from 1 to ${MAX_SAMPLES}`);
  }
  if (!(Number.isInteger(seed) && seed >= 0 && seed <= MAX_SEED)) throw new Error(`the seed must be a whole number from 0 to ${MAX_SEED}`);
  const asked = box ? { box } : { points: points ?? [], labels: labels ?? points?.map(() => 1) };
  checkPrompt(asked, image);
  await startSampler();
  const id = ++requests;
  const values = noise && Float32Array.from(noise.flat());
  try {
    return await new Promise((resolve, reject) => {
      pending = { id, resolve, reject };
      worker.postMessage({ type: "sample", id, repository: REPOSITORY, useGpu: USE_GPU, image, prompt: asked, numSamples, seed, noise: values });
    });
  } finally {
    pending = null;
  }
}

async function sampleFields() {
  showError("");
  const [numSamples, seed] = ["count", "seed"].map((id) => find(id).valueAsNumber);
  const asked = { prompt, numSamples, seed, image };
  setBusy(true);
  try {
    const answer = await sample({ ...prompt, numSamples, seed });
    if (asked.image !== image || asked.prompt !== prompt) return showProgress({ text: "The prompt has changed; sample again" });
    result = { ...answer, ...asked };
    const seconds = (answer.seconds.encoder + answer.seconds.samples).toFixed(1);
    showProgress({ text: `${numSamples} samples in ${seconds} s (${answer.device})` });
    showResult();
    worker.postMessage({ type: "prefetch", repository: REPOSITORY });
  } catch (error) {
    showProgress({ text: error.message ? "Not sampled" : "Cancelled" });
    if (error.message) showError(error.message);
  } finally {
    setBusy(false);
  }
}

function setBusy(busy) {
  find("sample").disabled = busy;
  find("cancel").hidden = find("progress").hidden = !busy;
  if (busy) showProgress({ text: "Starting" });
}

/** Progress of a download in bytes, or of samples. */
function showProgress({ text, done, total }) {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  let amount = "";
  if (text.startsWith("Loading")) amount = total ? `: ${megabytes(done)} of ${megabytes(total)} MB` : `: ${megabytes(done)} MB`;
  else if (total) amount = `: ${done} of ${total}`;
  find("status").textContent = text + amount;
  if (total) find("progress").value = done / total;
  else find("progress").removeAttribute("value");
}

function showError(message) {
  find("error").textContent = message;
  find("error").hidden = !message;
}

// ------------------------------------------------------------------------------------------------------------- result

const spacing = () => (find("spacing").valueAsNumber > 0 ? find("spacing").valueAsNumber : null);

function inWords(area) {
  return `${rounded(area)} ${unit()}`;
}

const unit = () => (spacing() ? "mm²" : "px");

function rounded(area) {
  const value = area * (spacing() ?? 1) ** 2;
  return value && value < 1 ? String(Number(value.toPrecision(2))) : value.toFixed(value && value < 100 ? 1 : 0);
}

function showResult() {
  find("results").hidden = false;
  const { window } = result;
  view = { ...window };
  find("gallery").replaceChildren(...result.masks.map((_, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(document.createElement("canvas"), document.createElement("span"));
    const show = (number) => () => {
      shown = number;
      paint();
      paintMean();
    };
    button.addEventListener("pointerenter", show(index));
    button.addEventListener("focus", show(index));
    button.addEventListener("pointerleave", show(null));
    button.addEventListener("blur", show(null));
    return button;
  }));
  paint();
  paintResult();
}

/** Numbers, maps and gallery; again when the pixel side, the level or the width of the page changes. */
function paintResult() {
  const { areas, areasGivenPresence, presence } = result;
  const rare = !areasGivenPresence.length;
  const quantiles = rare ? null : areaQuantiles(areasGivenPresence);
  find("presence").textContent = rare ? "below 1 %" : `${(presence * 100).toFixed(0)} %`;
  find("median").textContent = rare ? "unknown" : inWords(quantiles["0.5"]);
  find("quantiles").hidden = rare;
  find("empty").textContent = `${areas.filter((area) => !area).length} of ${areas.length}`;
  const cells = (kind, texts) => texts.map((text, index) => {
    const cell = document.createElement(index ? kind : "th");
    cell.scope = index && kind === "td" ? "" : index ? "col" : "row";
    cell.textContent = text;
    return cell;
  });
  if (!rare) {
    find("levels").replaceChildren(...cells("th", ["Quantile", ...Object.keys(quantiles).map((level) => `${level * 100} %`)]));
    find("areas").replaceChildren(...cells("td", [`Area, ${unit()}`, ...Object.values(quantiles).map(rounded)]));
  }
  paintMean();
  paintMap("entropy", result.entropy, MAGMA);
  [...find("gallery").children].forEach((button, index) => {
    const { context, unit } = begin(button.firstChild, result.window);
    strokeSegments(context, result.outlines[index], COLOURS.sample, 1.5 * unit);
    const words = areas[index] ? inWords(areas[index]) : "empty";
    button.lastChild.textContent = words;
    button.setAttribute("aria-label", `Sample ${index + 1}: ${words}`);
  });
}

/** Map of the mean with its .5 line, or with the sample under the pointer, which on a phone is out of sight otherwise. */
function paintMean() {
  const { context, unit } = paintMap("mean", result.mean, VIRIDIS);
  const [segments, colour] = shown === null ? [result.meanOutline, COLOURS.half] : [result.outlines[shown], COLOURS.shown];
  strokeSegments(context, segments, "#000", 4 * unit); // an edge, without which yellow is lost on yellow
  strokeSegments(context, segments, colour, 2 * unit);
}

function paintMap(id, values, colours) {
  const { region } = result;
  const map = new OffscreenCanvas(region.width, region.height);
  const pixels = new ImageData(region.width, region.height);
  values.forEach((value, index) => {
    const place = Math.min(Math.max(value, 0), 1) * (colours.length - 1);
    const below = Math.min(Math.floor(place), colours.length - 2);
    const mix = colours[below].map((colour, channel) => colour + (place - below) * (colours[below + 1][channel] - colour));
    pixels.data.set([...mix, 255], 4 * index);
  });
  map.getContext("2d").putImageData(pixels, 0, 0);
  const painted = begin(find(id), result.window);
  painted.context.drawImage(map, region.left, region.top);
  return painted;
}

// ---------------------------------------------------------------------------------------------------------- downloads

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

/** Values of the region as a PNG of the image's size. */
function savePng(values, depth, name) {
  const { left, top, width, height } = result.region;
  const whole = new Float32Array(image.width * image.height);
  for (let row = 0; row < height; row++) whole.set(values.subarray(row * width, (row + 1) * width), (top + row) * image.width + left);
  return encodePng(whole, image.width, image.height, depth).then((blob) => save(blob, name));
}

async function saveMasks() {
  for (const [index, mask] of result.masks.entries()) await savePng(mask, 8, `sample-${String(index).padStart(2, "0")}.png`);
}

/** The numbers, with the names of result.json of the package where they mean the same. */
function numbers() {
  const { areas, areasGivenPresence, presence, seconds, device, numSamples, seed, window } = result;
  const summary = (values, scale) => values.length ? ({
    mean: (values.reduce((a, b) => a + b, 0) / values.length) * scale, quantiles: areaQuantiles(values, scale), samples: values.map((area) => area * scale),
  }) : null;
  const pick = (label) => result.prompt.points.filter((_, index) => result.prompt.labels[index] === label);
  const content = {
    image: image.name,
    image_size: { width: image.width, height: image.height },
    prompt: result.prompt.box ? { box: result.prompt.box } : { points: pick(1), negative_points: pick(0) },
    window,
    model: MODEL,
    num_samples: numSamples,
    seed,
    threshold: 0.5,
    presence,
    empty_share: areas.filter((area) => !area).length / areas.length,
    area_px: summary(areas, 1),
    area_px_given_presence: summary(areasGivenPresence, 1),
  };
  if (spacing()) {
    const scale = spacing() ** 2;
    Object.assign(content, { pixel_spacing_mm: spacing(), area_mm2: summary(areas, scale), area_mm2_given_presence: summary(areasGivenPresence, scale) });
  }
  return { ...content, noise: "Latin hypercube, mulberry32", device, seconds };
}

// ------------------------------------------------------------------------------------------------------------- events

find("file").addEventListener("change", ({ target }) => {
  if (target.files.length) open(target.files[0]);
  target.value = ""; // so that the same file can be opened again
});
for (const id of ["level", "span"]) find(id).addEventListener("input", () => image && paintPicture());
find("spacing").addEventListener("input", () => result && paintResult());
find("clear").addEventListener("click", () => setPrompt({ points: [], labels: [] }));
find("zoom-in").addEventListener("click", () => image && zoom(1 / 1.5));
find("zoom-out").addEventListener("click", () => image && zoom(1.5));
find("zoom-all").addEventListener("click", () => image && showAll());
find("sample").addEventListener("click", sampleFields);
find("cancel").addEventListener("click", () => pending && worker.postMessage({ type: "cancel", id: pending.id }));
find("save-masks").addEventListener("click", saveMasks);
find("save-mean").addEventListener("click", () => savePng(result.mean, 16, "mean.png"));
find("save-json").addEventListener("click", () =>
  save(new Blob([JSON.stringify(numbers(), null, 1)], { type: "application/json" }), "result.json"));
addEventListener("resize", () => {
  paint();
  if (result) paintResult();
});

/** Buttons of the phantom examples; the first is opened. */
async function addExamples() {
  const { images } = await (await fetch("examples/examples.json")).json();
  const openExample = async (example) => {
    const id = ++opened;
    const blob = await (await fetch(`examples/${example.image}`)).blob();
    if (id === opened) await open(new File([blob], example.image), example, id);
  };
  find("examples").replaceChildren(...images.map((example, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `Phantom ${index + 1}`;
    button.addEventListener("click", () => openExample(example));
    return button;
  }));
  await openExample(images[0]);
}

/**
 * Register the service worker and, on a first visit, give it some seconds to take over the page. Without it (a private
 * window, an old browser, a hard reload, a file that did not arrive) the page works, but needs a connection.
 */
async function register() {
  try {
    const registration = await navigator.serviceWorker.register("service-worker.js");
    if (!navigator.serviceWorker.controller && !registration.active) {
      await new Promise((resolve) => {
        navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
        setTimeout(resolve, MAX_WAIT_MS);
      });
      if (!registration.active) throw new Error("not installed");
    }
  } catch {
    find("status").textContent = "The first sampling loads the model (about 60 MB). This browser does not keep it for offline use.";
  }
}

const registered = register();
addExamples().catch((error) => showError(`the examples cannot be loaded (${error.message})`));
window.psam = { sample };
