// Keeps the page, its runtime and the model's files, so that the page works offline after the first sampling.
// A kept file is used while its ETag on the server is unchanged, or while the server cannot be reached.

const KEPT = "psam";
const PAGE = [
  "./", "style.css", "app.js", "images.js", "processing.js", "worker.js", "dicom-worker.js", "examples/examples.json",
  "examples/phantom-1.png", "examples/phantom-2.png", "examples/phantom-3.png", "vendor/dicomParser.min.js",
  "vendor/lossless-min.js", "vendor/charlswasm_decode.js", "vendor/charlswasm_decode.wasm",
  "vendor/openjpegwasm_decode.js", "vendor/openjpegwasm_decode.wasm",
];

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(KEPT).then((cache) => cache.addAll(PAGE)).then(() => self.skipWaiting()));
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && event.request.url.startsWith("http")) event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(KEPT);
  const kept = await cache.match(request, { ignoreVary: true });
  if (kept) {
    const head = await fetch(request.url, { method: "HEAD" }).catch(() => null);
    const tag = head?.headers.get("etag");
    if (!head?.ok || (tag && tag === kept.headers.get("etag"))) return kept;
  }
  const fresh = await fetch(request);
  if (fresh.ok && fresh.type !== "opaque") cache.put(request, fresh.clone()).catch(() => {}); // storage may be full
  return fresh;
}
