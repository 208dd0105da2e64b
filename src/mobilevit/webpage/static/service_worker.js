// Keeps the page's files for offline use, and adds the headers that threads need.

const HERE = new URL("./", self.location);

// The export writes the hash of all files here: browsers look for a new worker only where its own bytes have changed.
const VERSION = "unknown";

// Caches belong to the whole site, where other pages of this kind may lie in other folders.
const MINE = `mobilevit ${HERE.href} `;
const CACHE = MINE + VERSION;

self.addEventListener("install", (event) => event.waitUntil(keepAll()));
self.addEventListener("activate", (event) => event.waitUntil(dropOthers().then(() => self.clients.claim())));
self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && event.request.url.startsWith(HERE.href)) event.respondWith(answer(event.request));
});

async function keepAll() {
  const response = await fetch(new URL("files.json", HERE), { cache: "no-store" });
  const { files } = await response.json();
  const cache = await caches.open(CACHE);
  await cache.addAll(files.map((name) => new Request(new URL(name, HERE), { cache: "reload" })));
  await self.skipWaiting();
}

async function dropOthers() {
  for (const name of await caches.keys()) if (name.startsWith(MINE) && name !== CACHE) await caches.delete(name);
}

async function answer(request) {
  const kept = await (await caches.open(CACHE)).match(request, { ignoreSearch: true });
  const response = kept ?? (await fetchAndKeep(request));
  if (response.type === "opaque" || response.status === 0) return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

// What is not needed at once, such as the runtime for graphics cards, is kept when it has been asked for.
async function fetchAndKeep(request) {
  const response = await fetch(request);
  if (response.ok && !request.url.endsWith("files.json")) {
    await (await caches.open(CACHE)).put(request, response.clone());
  }
  return response;
}
