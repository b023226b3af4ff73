// Reads one DICOM slice: grey, one frame, uncompressed or JPEG, JPEG Lossless, JPEG-LS, JPEG 2000 or RLE.
// A classic worker, because the libraries are classic scripts; `base` is the folder of the page (see startWorker).
/* global base, dicomParser, OpenJPEGWASM, CharLSWASM */

importScripts(`${base}vendor/dicomParser.min.js`);

const UNCOMPRESSED = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"];
const BIG_ENDIAN = "1.2.840.10008.1.2.2";
const DECODERS = {
  "1.2.840.10008.1.2.4.50": decodeBaseline,
  "1.2.840.10008.1.2.4.57": decodeLossless,
  "1.2.840.10008.1.2.4.70": decodeLossless,
  "1.2.840.10008.1.2.4.80": decodeJpegLs,
  "1.2.840.10008.1.2.4.81": decodeJpegLs,
  "1.2.840.10008.1.2.4.90": decodeJpeg2000,
  "1.2.840.10008.1.2.4.91": decodeJpeg2000,
  "1.2.840.10008.1.2.5": decodeRle,
};
// Elements that change grey values in ways that are not read here
const REFUSED = { x00283000: "a modality table", x20500010: "a presentation table", x52009229: "an enhanced (multi-frame) image" };

onmessage = async ({ data }) => {
  try {
    const image = await read(data);
    postMessage({ image }, [image.data.buffer]);
  } catch (error) {
    postMessage({ error: `is DICOM that is not read: ${error.message ?? error.exception ?? "damaged"}` });
  }
};

async function read(bytes) {
  const { checkSize } = await import(`${base}images.js`);
  const file = dicomParser.parseDicom(bytes);
  const refused = Object.keys(REFUSED).find((tag) => file.elements[tag]);
  if (refused) throw new Error(REFUSED[refused]);
  const pixels = file.elements.x7fe00010;
  if (!pixels) throw new Error("no pixels");
  const number = (tag, missing) => file.uint16(tag) ?? missing;
  const layout = {
    height: number("x00280010"), width: number("x00280011"), allocated: number("x00280100"),
    stored: number("x00280101"), signed: number("x00280103", 0) === 1,
  };
  checkSize(layout.width, layout.height);
  const photometric = file.string("x00280004")?.trim();
  if (number("x00280002", 1) !== 1 || !["MONOCHROME1", "MONOCHROME2"].includes(photometric)) throw new Error(`colour (${photometric})`);
  if ((file.intString("x00280008") ?? 1) !== 1) throw new Error("several frames");
  if (![8, 16].includes(layout.allocated) || !(layout.stored >= 1 && layout.stored <= layout.allocated)) {
    throw new Error(`${layout.allocated} bits per pixel`);
  }
  if (number("x00280102", layout.stored - 1) !== layout.stored - 1) throw new Error("a high bit other than bits stored - 1");

  const stored = await storedValues(file, pixels, layout);
  const [slope, intercept] = [file.floatString("x00281053") ?? 1, file.floatString("x00281052") ?? 0];
  const shift = 32 - layout.stored; // drops overlays in unused bits, and extends the sign
  const data = Float32Array.from(stored, (value) => (layout.signed ? (value << shift) >> shift : (value << shift) >>> shift) * slope + intercept);
  if (!data.every(Number.isFinite)) throw new Error("grey values that are not finite");
  if (photometric === "MONOCHROME1" || file.string("x20500020")?.trim() === "INVERSE") {
    const [low, high] = data.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
    data.forEach((value, index) => { data[index] = high + low - value; });
  }
  const sides = [0, 1].map((index) => file.floatString("x00280030", index));
  const spacing = sides.every((side) => side > 0 && side <= 1000) ? Math.sqrt(sides[0] * sides[1]) : null;
  const [level, span] = photometric === "MONOCHROME2" ? [file.floatString("x00281050"), file.floatString("x00281051")] : [];
  return { width: layout.width, height: layout.height, channels: 1, data, spacing, level, span };
}

/** Stored values as integers, 8 or 16 bits each. */
async function storedValues(file, pixels, layout) {
  const syntax = file.string("x00020010");
  const count = layout.width * layout.height;
  if (UNCOMPRESSED.includes(syntax)) {
    if (pixels.encapsulatedPixelData) throw new Error("compressed pixels with an uncompressed transfer syntax");
    const size = (count * layout.allocated) / 8;
    if (pixels.length < size) throw new Error("truncated pixels");
    return integers(file.byteArray.slice(pixels.dataOffset, pixels.dataOffset + size), layout.allocated, syntax === BIG_ENDIAN);
  }
  if (!(syntax in DECODERS)) throw new Error(`transfer syntax ${syntax}`);
  if (!pixels.encapsulatedPixelData || !pixels.fragments?.length) throw new Error("no compressed pixels");
  const code = dicomParser.readEncapsulatedPixelDataFromFragments(file, pixels, 0, pixels.fragments.length);
  const values = await DECODERS[syntax](code, layout);
  if (values.length !== count) throw new Error("compressed pixels of another size than the header's");
  return values;
}

function integers(bytes, bits, bigEndian) {
  if (bits === 8) return bytes;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Uint16Array.from({ length: bytes.length >> 1 }, (_, index) => view.getUint16(2 * index, !bigEndian));
}

/** Refuse a compressed frame of another size than the header's before it is decoded. */
async function checkedFrame(code, layout) {
  const { jpegFrame } = await import(`${base}images.js`);
  const frame = jpegFrame(code);
  if (frame.width !== layout.width || frame.height !== layout.height || frame.channels !== 1) {
    throw new Error("compressed pixels of another size than the header's");
  }
  return frame;
}

async function decodeBaseline(code, layout) {
  const { bits } = await checkedFrame(code, layout);
  if (bits !== 8) throw new Error(`JPEG of ${bits} bits`);
  const bitmap = await createImageBitmap(new Blob([code], { type: "image/jpeg" }), { colorSpaceConversion: "none" });
  const context = new OffscreenCanvas(layout.width, layout.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, layout.width, layout.height);
  return Uint8Array.from({ length: data.length / 4 }, (_, index) => data[4 * index]);
}

async function decodeLossless(code, layout) {
  const { bits } = await checkedFrame(code, layout);
  const { Decoder } = await import(`${base}vendor/lossless-min.js`);
  const copy = code.slice();
  const decoded = new Uint8Array(new Decoder().decompress(copy.buffer));
  return integers(decoded, bits > 8 ? 16 : 8, false);
}

async function decodeJpegLs(code, layout) {
  await checkedFrame(code, layout);
  importScripts(`${base}vendor/charlswasm_decode.js`);
  return decodeWithWasm(CharLSWASM, "JpegLSDecoder", code);
}

async function decodeJpeg2000(code, layout) {
  const view = new DataView(code.buffer, code.byteOffset, code.byteLength);
  // Size marker, the first of a code stream: the size of the grid and its offset, as 32-bit numbers
  if (view.getUint16(0) !== 0xff4f || view.getUint16(2) !== 0xff51) throw new Error("JPEG 2000 that is damaged");
  const [width, height] = [8, 12].map((place) => view.getUint32(place) - view.getUint32(place + 8));
  if (width !== layout.width || height !== layout.height) throw new Error("compressed pixels of another size than the header's");
  importScripts(`${base}vendor/openjpegwasm_decode.js`);
  return decodeWithWasm(OpenJPEGWASM, "J2KDecoder", code);
}

/** Decode with one of the WebAssembly codecs, which share their interface. */
async function decodeWithWasm(start, name, code) {
  const codec = await start({ locateFile: (file) => `${base}vendor/${file}` });
  const decoder = new codec[name]();
  decoder.getEncodedBuffer(code.length).set(code);
  decoder.decode();
  const { bitsPerSample, componentCount } = decoder.getFrameInfo();
  if (componentCount !== 1) throw new Error("colour in compressed pixels");
  return integers(decoder.getDecodedBuffer().slice(), bitsPerSample > 8 ? 16 : 8, false);
}

/** RLE (PS3.5 G): one segment of PackBits per byte of a pixel, highest byte first. */
async function decodeRle(code, { width, height, allocated }) {
  const view = new DataView(code.buffer, code.byteOffset, code.byteLength);
  const [count, bytes] = [width * height, allocated / 8];
  if (view.getUint32(0, true) !== bytes) throw new Error("RLE with another number of segments than bytes per pixel");
  const values = bytes === 1 ? new Uint8Array(count) : new Uint16Array(count);
  for (let segment = 0; segment < bytes; segment++) {
    let place = view.getUint32(4 + 4 * segment, true);
    const shift = 8 * (bytes - 1 - segment);
    for (let filled = 0; filled < count; ) {
      if (place >= code.length) throw new Error("truncated RLE");
      const run = view.getInt8(place++);
      if (run === -128) continue;
      const length = Math.min(Math.abs(run) + 1, count - filled);
      for (let k = 0; k < length; k++) values[filled++] |= code[run < 0 ? place : place + k] << shift;
      place += run < 0 ? 1 : run + 1;
    }
  }
  return values;
}
