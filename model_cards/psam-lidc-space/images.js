// Image files of the visitor: PNG (8 and 16 bits), JPEG and DICOM to grey values, and grey values to PNG.
// Sizes are checked before anything is decoded. What is not read is refused in one line.

const MAX_FILE_BYTES = 64 * 2 ** 20;
export const MAX_PIXELS = 2 ** 24;
const MAX_SIDE = 2 ** 14;
const DICOM_SECONDS = 30;
const ACCEPTED = "accepted: a PNG, a JPEG or one DICOM slice, of at most 64 MB and 16 million pixels";
const PNG_CHANNELS = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 };

/** Image `{name, width, height, channels, data, spacing, level, span}`; `data` is (channels, H, W), spacing in mm. */
export async function readImage(file) {
  if (file.size > MAX_FILE_BYTES) throw refusal(file.name, `has ${Math.round(file.size / 2 ** 20)} MB`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  try {
    const image = await decode(bytes);
    return { name: file.name, spacing: null, ...image };
  } catch (error) {
    throw refusal(file.name, error.message || "cannot be decoded");
  }
}

function refusal(name, problem) {
  return new Error(`${name} ${problem.replace(/\s+/g, " ").slice(0, 200)}; ${ACCEPTED}`);
}

async function decode(bytes) {
  const starts = (...signature) => signature.every((byte, index) => bytes[index] === byte);
  if (starts(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a)) return decodePng(bytes);
  if (starts(0xff, 0xd8, 0xff)) {
    const { width, height, channels } = jpegFrame(bytes);
    checkSize(width, height);
    return decodeByBrowser(bytes, "image/jpeg", channels === 1 ? 1 : 3);
  }
  if (String.fromCharCode(...bytes.subarray(128, 132)) === "DICM") return decodeDicom(bytes);
  throw new Error("is not an image of a known kind");
}

export function checkSize(width, height) {
  if (width < 1 || height < 1 || width > MAX_SIDE || height > MAX_SIDE || width * height > MAX_PIXELS) {
    throw new Error(`has ${width} x ${height} pixels`);
  }
}

/** Decode 8 bits per channel with the browser: (channels, H, W). */
async function decodeByBrowser(bytes, type, channels) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(new Blob([bytes], { type }), options).catch(() => {
    throw new Error("is damaged");
  });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, width, height).data;
  const data = new Float32Array(channels * width * height);
  for (let index = 0; index < width * height; index++) {
    for (let channel = 0; channel < channels; channel++) data[channel * width * height + index] = pixels[4 * index + channel];
  }
  return { width, height, channels, data };
}

/**
 * Width, height, channels and bits in the first frame header of a JPEG, JPEG Lossless or JPEG-LS stream that has an end;
 * browsers decode a truncated one without an error.
 */
export function jpegFrame(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let place = 2;
  while (place + 10 < bytes.length && bytes[place] === 0xff) {
    const code = bytes[place + 1];
    const isFrame = (code >= 0xc0 && code <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(code)) || code === 0xf7;
    if (isFrame) {
      const [height, width] = [view.getUint16(place + 5), view.getUint16(place + 7)];
      let end = bytes.lastIndexOf(0xd9);
      while (end > place && bytes[end - 1] !== 0xff) end = bytes.lastIndexOf(0xd9, end - 1);
      if (end <= place) throw new Error("is a truncated JPEG");
      return { width, height, channels: bytes[place + 9], bits: bytes[place + 4] };
    }
    place += code === 0xff ? 1 : 2 + view.getUint16(place + 2);
  }
  throw new Error("is a damaged JPEG");
}

// ---------------------------------------------------------------------------------------------------------------- PNG

/** PNG: grey of any depth, colours of 8 bits; palettes become RGB and transparency is dropped, as by Pillow. */
async function decodePng(bytes) {
  const view = new DataView(bytes.buffer);
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  const [depth, colour, interlaced] = [bytes[24], bytes[25], bytes[28]];
  checkSize(width, height);
  if (!(colour in PNG_CHANNELS) || ![1, 2, 4, 8, 16].includes(depth)) throw new Error("is a damaged PNG");
  const [parts, chunks] = [[], {}];
  for (let place = 8; place + 12 <= bytes.length; ) {
    const length = view.getUint32(place);
    const type = String.fromCharCode(...bytes.subarray(place + 4, place + 8));
    const content = bytes.subarray(place + 8, place + 8 + length);
    if (type === "IDAT") parts.push(content);
    else chunks[type] = content;
    place += 12 + length;
  }
  if ("acTL" in chunks) throw new Error("holds several frames");
  if ("eXIf" in chunks && isTurned(chunks.eXIf)) throw new Error("is turned or mirrored by its EXIF orientation");
  if (depth === 16 && colour !== 0) throw new Error("has more than 8 bits per channel in colour or with transparency");
  if (interlaced && depth === 16) throw new Error("is an interlaced PNG of 16 bits");
  if (interlaced) return decodeByBrowser(bytes, "image/png", colour === 0 || colour === 4 ? 1 : 3);

  const rowBytes = Math.ceil((width * PNG_CHANNELS[colour] * depth) / 8);
  const rows = await inflate(parts, (rowBytes + 1) * height);
  unfilter(rows, rowBytes, height, Math.max(1, (PNG_CHANNELS[colour] * depth) / 8));
  const value = (row, index) => {
    const start = row * (rowBytes + 1) + 1;
    if (depth === 16) return (rows[start + 2 * index] << 8) | rows[start + 2 * index + 1];
    if (depth === 8) return rows[start + index];
    const bits = (rows[start + ((index * depth) >> 3)] >> (8 - depth - ((index * depth) & 7))) & (2 ** depth - 1);
    return colour === 3 ? bits : (bits * 255) / (2 ** depth - 1);
  };
  const channels = colour === 0 || colour === 4 ? 1 : 3;
  const data = new Float32Array(channels * width * height);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      for (let channel = 0; channel < channels; channel++) {
        data[(channel * height + row) * width + column] = colour === 3
          ? (chunks.PLTE?.[3 * value(row, column) + channel] ?? 0)
          : value(row, column * PNG_CHANNELS[colour] + channel);
      }
    }
  }
  return { width, height, channels, data };
}

/** Whether EXIF data (TIFF) has an orientation other than upright, tag 0x112. */
function isTurned(exif) {
  const view = new DataView(exif.buffer, exif.byteOffset, exif.byteLength);
  try {
    const little = view.getUint16(0) === 0x4949;
    const start = view.getUint32(4, little);
    for (let place = start + 2; place < start + 2 + 12 * view.getUint16(start, little); place += 12) {
      if (view.getUint16(place, little) === 0x112) return view.getUint16(place + 8, little) > 1;
    }
  } catch {
    throw new Error("has damaged EXIF data");
  }
  return false;
}

/** Inflate zlib data to exactly `size` bytes; more is never unpacked. */
async function inflate(parts, size) {
  const reader = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const output = new Uint8Array(size);
  let filled = 0;
  try {
    for (let { done, value } = await reader.read(); !done && filled < size; { done, value } = await reader.read()) {
      output.set(value.subarray(0, size - filled), filled);
      filled += value.length;
    }
  } catch {
    throw new Error("is a damaged PNG");
  }
  reader.cancel().catch(() => {});
  if (filled < size) throw new Error("is a truncated PNG");
  return output;
}

/** Undo PNG's filters in place: each row of `rowBytes` follows the number of its filter. */
function unfilter(rows, rowBytes, height, step) {
  for (let row = 0; row < height; row++) {
    const start = row * (rowBytes + 1) + 1;
    const filter = rows[start - 1];
    for (let index = 0; index < rowBytes; index++) {
      const left = index >= step ? rows[start + index - step] : 0;
      const up = row ? rows[start + index - rowBytes - 1] : 0;
      const corner = row && index >= step ? rows[start + index - step - rowBytes - 1] : 0;
      if (filter === 1) rows[start + index] += left;
      else if (filter === 2) rows[start + index] += up;
      else if (filter === 3) rows[start + index] += (left + up) >> 1;
      else if (filter === 4) rows[start + index] += paeth(left, up, corner);
      else if (filter !== 0) throw new Error("is a damaged PNG");
    }
  }
}

function paeth(left, up, corner) {
  const [a, b, c] = [left, up, corner].map((value) => Math.abs(left + up - corner - value));
  return a <= b && a <= c ? left : b <= c ? up : corner;
}

/** Values from 0 to 1 as a grey PNG of 8 or 16 bits, where the largest number means 1. */
export async function encodePng(values, width, height, depth) {
  const step = depth / 8;
  const rows = new Uint8Array(height * (width * step + 1));
  const view = new DataView(rows.buffer);
  values.forEach((value, index) => {
    const place = Math.floor(index / width) * (width * step + 1) + 1 + (index % width) * step;
    if (depth === 8) view.setUint8(place, Math.round(value * 255));
    else view.setUint16(place, Math.round(value * 65535));
  });
  const packed = await new Response(new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"))).arrayBuffer();
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, depth);
  const signature = new Uint8Array([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
  const chunks = [["IHDR", header.buffer], ["IDAT", packed], ["IEND", new ArrayBuffer(0)]].map(pngChunk);
  return new Blob([signature, ...chunks], { type: "image/png" });
}

function pngChunk([type, content]) {
  const chunk = new Uint8Array(12 + content.byteLength);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, content.byteLength);
  chunk.set([...type].map((letter) => letter.charCodeAt(0)), 4);
  chunk.set(new Uint8Array(content), 8);
  let crc = ~0;
  for (const byte of chunk.subarray(4, -4)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  view.setUint32(8 + content.byteLength, ~crc >>> 0);
  return chunk;
}

// -------------------------------------------------------------------------------------------------------------- DICOM

/** Decode a DICOM slice in a worker of its own, which is ended when a damaged file takes too long. */
function decodeDicom(bytes) {
  const worker = startWorker(new URL("dicom-worker.js", import.meta.url), "classic");
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error("takes too long to decode")), DICOM_SECONDS * 1000);
    worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve(data.image));
    worker.onerror = () => reject(new Error("cannot be read, because the DICOM reader does not start"));
    worker.postMessage(bytes, [bytes.buffer]);
    worker.addEventListener("message", () => clearTimeout(timer));
  }).finally(() => worker.terminate());
}

/**
 * Start a worker that obeys the page's content security policy. A worker that is loaded from a URL has only the policy
 * of its own response, and a static host sends none; one that is loaded from a blob inherits the policy of the page.
 */
export function startWorker(url, type) {
  const code = type === "module" ? `import ${JSON.stringify(url.href)};` : `importScripts(${JSON.stringify(url.href)});`;
  const blob = URL.createObjectURL(new Blob([`self.base = ${JSON.stringify(new URL("./", url).href)};${code}`], { type: "text/javascript" }));
  const worker = new Worker(blob, { type });
  worker.addEventListener("message", () => URL.revokeObjectURL(blob), { once: true });
  return worker;
}
