// What ProbabilisticSamProcessor does before and after the model (processing_probabilistic_sam.py), for one window:
// cut, stretch, resize, normalise; and logits back to masks at the size of the image. Also noise and outlines.

const IMAGENET_MEAN = [123.675, 116.28, 103.53];
const IMAGENET_STD = [58.395, 57.12, 57.375];
const PROMPT_SHARE = 0.75; // largest extent of a prompt relative to the side of its window
const PADDING_LABEL = -10; // of points that the model ignores
const MIN_PRESENCE = 0.01; // below it, the model cannot have learnt what so few readers would outline
const QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95];
export const MAX_POINTS = 32;

// ------------------------------------------------------------------------------------------------------------ window

/** Check a prompt `{box: [x1, y1, x2, y2]}` or `{points: [[x, y], ...], labels: [1 or 0, ...]}` in image pixels. */
export function checkPrompt(prompt, { width, height }) {
  const inside = (x, y) => x >= 0 && y >= 0 && x <= width && y <= height;
  if (prompt.box) {
    const [x1, y1, x2, y2] = prompt.box;
    if (prompt.box.length !== 4 || !(x1 < x2 && y1 < y2)) throw new Error("the box has no area; accepted: x1 < x2 and y1 < y2");
    if (!inside(x1, y1) || !inside(x2, y2)) throw new Error(`the box reaches outside the image of ${width} x ${height} pixels`);
    return;
  }
  if (!prompt.points?.length) throw new Error("no prompt yet; accepted: a box, or at least one point inside the lesion");
  if (prompt.points.length > MAX_POINTS) throw new Error(`${prompt.points.length} points; accepted: up to ${MAX_POINTS}`);
  if (!prompt.points.every(([x, y]) => inside(x, y))) throw new Error(`a point lies outside the image of ${width} x ${height} pixels`);
  if (!prompt.labels.includes(1)) throw new Error("negative points only refine a prompt; accepted: at least one point inside the lesion");
}

/** Window `{x, y, side}` around a checked prompt, in image pixels. */
export function windowOf(prompt, { width, height }, cropSize) {
  if (cropSize === null) return { x: 0, y: 0, side: Math.max(width, height) };
  const corners = prompt.box
    ? [prompt.box.slice(0, 2), prompt.box.slice(2)]
    : prompt.points.filter((_, index) => prompt.labels[index] === 1);
  const [low, high] = [Math.min, Math.max].map((of) =>
    [0, 1].map((axis) => Math.fround(of(...corners.map((corner) => corner[axis])))));
  const extent = Math.max(...[0, 1].map((axis) => Math.fround(high[axis] - low[axis])));
  const side = Math.max(cropSize, Math.ceil(extent / PROMPT_SHARE));
  const [x, y] = [0, 1].map((axis) => roundHalfEven(Math.fround(low[axis] + high[axis]) / 2 - side / 2));
  return { x, y, side };
}

/** Round as Python does: halves to the even neighbour. */
function roundHalfEven(value) {
  const rounded = Math.round(value);
  return rounded - value === 0.5 && rounded % 2 !== 0 ? rounded - 1 : rounded;
}

/** Part of a window inside the image: `{left, top, width, height}`. */
export function regionOf({ x, y, side }, { width, height }) {
  const [left, top] = [Math.max(x, 0), Math.max(y, 0)];
  return { left, top, width: Math.min(x + side, width) - left, height: Math.min(y + side, height) - top };
}

/** Model input (3, size, size) from the window of an image `{width, height, channels, data}` (channels, H, W). */
export function pixelValues(image, window, { image_size: size, stretch_percentiles: percentiles }) {
  const { left, top, width, height } = regionOf(window, image);
  const planes = Array.from({ length: image.channels }, (_, channel) => {
    const plane = new Float32Array(width * height);
    for (let row = 0; row < height; row++) {
      const start = (channel * image.height + top + row) * image.width + left;
      plane.set(image.data.subarray(start, start + width), row * width);
    }
    return plane;
  });
  const inside = new Float32Array(planes.length * width * height);
  planes.forEach((plane, channel) => inside.set(plane, channel * plane.length));
  inside.sort();
  const [low, high] = percentiles.map((percentile) => quantile(inside, percentile / 100));
  const range = Math.max(high - low, 1e-6);
  const stretch = (value) => Math.min(Math.max((value - low) / range, 0), 1) * 255;
  const resized = planes.map((plane) => {
    const crop = new Float32Array(window.side ** 2).fill(stretch(inside[0])); // the darkest value outside the image
    for (let row = 0; row < height; row++) {
      const target = (top - window.y + row) * window.side + left - window.x;
      for (let column = 0; column < width; column++) crop[target + column] = stretch(plane[row * width + column]);
    }
    return resize(crop, window.side, size);
  });
  const values = new Float32Array(3 * size * size);
  for (let channel = 0; channel < 3; channel++) {
    const plane = resized[channel % resized.length];
    plane.forEach((value, index) => {
      values[channel * plane.length + index] = (value - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel];
    });
  }
  return values;
}

/** A checked prompt in pixels of the model's input; negative points outside the window become padding. */
export function promptInWindow(prompt, window, size) {
  const scale = size / window.side;
  const place = ([x, y]) => [(x - window.x) * scale, (y - window.y) * scale];
  if (prompt.box) return { box: [...place(prompt.box.slice(0, 2)), ...place(prompt.box.slice(2))] };
  const points = prompt.points.map(place);
  const used = points.map((point) => point.every((value) => value >= 0 && value <= size));
  return {
    points: points.map((point, index) => (used[index] ? point : [PADDING_LABEL, PADDING_LABEL])),
    labels: prompt.labels.map((label, index) => (used[index] ? label : PADDING_LABEL)),
  };
}

/**
 * Resize a square plane bilinearly, as torch's `interpolate(mode="bilinear")`: pixel centres at halves, and with
 * `antialias=True` where it shrinks.
 */
export function resize(plane, from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1);
  const taps = Array.from({ length: to }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const last = Math.min(Math.trunc(centre + support + 0.5), from);
    const weights = [];
    for (let k = first; k < last; k++) weights.push(Math.max(1 - Math.abs(k + 0.5 - centre) / support, 0));
    const sum = weights.reduce((a, b) => a + b);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
  const rows = new Float32Array(from * to);
  for (let y = 0; y < from; y++) {
    taps.forEach(({ first, weights }, x) => {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * plane[y * from + first + k];
      rows[y * to + x] = sum;
    });
  }
  const resized = new Float32Array(to * to);
  taps.forEach(({ first, weights }, y) => {
    for (let k = 0; k < weights.length; k++) {
      for (let x = 0; x < to; x++) resized[y * to + x] += weights[k] * rows[(first + k) * to + x];
    }
  });
  return resized;
}

/** Quantile of ascending values, interpolated linearly between neighbours. */
export function quantile(sorted, level) {
  const place = level * (sorted.length - 1);
  const below = Math.floor(place);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (place - below);
}

// ------------------------------------------------------------------------------------------------------------ results

/**
 * Masks and summaries in the region of a window inside the image.
 *
 * @param maskLogits one Float32Array (h, h) per sample
 * @param outlineLogits the same samples given presence
 * @param presence share of readers who annotate
 * @returns `{region, masks, outlines, mean, meanOutline, entropy, areas, areasGivenPresence}`: `masks` of 0 and 1 and
 *   the maps in the region, areas in pixels, outlines as segments `[x1, y1, x2, y2, ...]` in image pixels.
 *   `areasGivenPresence` is empty if the presence is less than 1 %
 */
export function summarise(maskLogits, outlineLogits, presence, window, image) {
  const region = regionOf(window, image);
  const count = region.width * region.height;
  const mean = new Float32Array(count);
  const areaOf = (field) => field.reduce((sum, value) => sum + (value > 0), 0);
  const fields = maskLogits.map((values) => inRegion(values, window, region));
  for (const field of fields) {
    field.forEach((value, index) => { mean[index] += 1 / (1 + Math.exp(-value)) / fields.length; });
  }
  const areasGivenPresence = presence < MIN_PRESENCE ? [] : outlineLogits.map((values) => areaOf(inRegion(values, window, region)));
  const entropy = mean.map((p) => (p <= 0 || p >= 1 ? 0 : -(p * Math.log2(p) + (1 - p) * Math.log2(1 - p))));
  return {
    region,
    masks: fields.map((field) => Uint8Array.from(field, (value) => Number(value > 0))),
    outlines: fields.map((field) => outline(field, region, 0)),
    mean,
    meanOutline: outline(mean, region, 0.5),
    entropy,
    areas: fields.map(areaOf),
    areasGivenPresence,
  };
}

/** Logits (h, h) resized to their window, the part in a region. */
function inRegion(logits, window, region) {
  const resized = resize(logits, Math.sqrt(logits.length), window.side);
  const field = new Float32Array(region.width * region.height);
  for (let row = 0; row < region.height; row++) {
    const start = (region.top - window.y + row) * window.side + region.left - window.x;
    field.set(resized.subarray(start, start + region.width), row * region.width);
  }
  return field;
}

/** Quantiles of areas by level, rounded as in result.json of the package. */
export function areaQuantiles(areas, scale = 1) {
  const sorted = Float64Array.from(areas, (area) => area * scale).sort();
  return Object.fromEntries(QUANTILES.map((level) => [String(level), shortened(quantile(sorted, level))]));
}

/** A number with four decimals, or four significant digits if it is small, such as mm² under a microscope. */
function shortened(value) {
  return Number(value >= 0.1 ? value.toFixed(4) : value.toPrecision(4));
}

/** Segments of the contour line at `level` of a field in a region (marching squares), in image pixels. */
function outline(field, { left, top, width, height }, level) {
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? -1e-3 : field[y * width + x] - level);
  const segments = [];
  for (let y = -1; y < height; y++) {
    for (let x = -1; x < width; x++) {
      const corners = [[x, y, at(x, y)], [x + 1, y, at(x + 1, y)], [x + 1, y + 1, at(x + 1, y + 1)], [x, y + 1, at(x, y + 1)]];
      const crossings = [];
      for (let side = 0; side < 4; side++) {
        const [[ax, ay, a], [bx, by, b]] = [corners[side], corners[(side + 1) % 4]];
        if (a > 0 === b > 0) continue;
        const share = a / (a - b);
        crossings.push(left + 0.5 + ax + share * (bx - ax), top + 0.5 + ay + share * (by - ay));
      }
      segments.push(...crossings); // two or four points: one or two segments
    }
  }
  return Float32Array.from(segments);
}

// -------------------------------------------------------------------------------------------------------------- noise

/**
 * Standard normal noise (samples, size) with evenly spread samples, as `spread_noise` of the package: in each
 * coordinate one sample lies in each of `samples` intervals of equal probability (Latin hypercube sampling).
 * The generator is mulberry32, so a seed gives other noise than in Python.
 */
export function spreadNoise(samples, size, seed) {
  const random = mulberry32(seed);
  const noise = new Float32Array(samples * size);
  for (let coordinate = 0; coordinate < size; coordinate++) {
    const order = Array.from({ length: samples }, (_, index) => [random(), index]).sort((a, b) => a[0] - b[0]);
    order.forEach(([, place], sample) => {
      const level = Math.min(Math.max((place + random()) / samples, 1e-9), 1 - 1e-9);
      noise[sample * size + coordinate] = normalQuantile(level);
    });
  }
  return noise;
}

function mulberry32(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Inverse of the normal distribution function: P. J. Acklam's rational approximation, relative error below 1.2e-9. */
function normalQuantile(p) {
  const a = [-3.969683028665376e1, 2.209460984245205e2, -2.759285104469687e2, 1.38357751867269e2, -3.066479806614716e1, 2.506628277459239];
  const b = [-5.447609879822406e1, 1.615858368580409e2, -1.556989798598866e2, 6.680131188771972e1, -1.328068155288572e1, 1];
  const c = [-7.784894002430293e-3, -3.223964580411365e-1, -2.400758277161838, -2.549732539343734, 4.374664141464968, 2.938163982698783];
  const d = [7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416, 1];
  const polynomial = (coefficients, x) => coefficients.reduce((sum, coefficient) => sum * x + coefficient);
  if (p > 0.5) return -normalQuantile(1 - p);
  if (p < 0.02425) {
    const q = Math.sqrt(-2 * Math.log(p));
    return polynomial(c, q) / polynomial(d, q);
  }
  const q = p - 0.5;
  return (q * polynomial(a, q * q)) / polynomial(b, q * q);
}
