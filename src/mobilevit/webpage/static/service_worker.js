// Caches the files of the page for offline use, and adds the headers that threads need.

const HERE = new URL("./", self.location);

// The export replaces this by the hash of all files: browsers install a new worker only if its own bytes differ.
const VERSION = "unknown";

const RUNTIME = new URL("runtime/", HERE).href;

// Caches belong to the whole site, which may have other pages of this kind in other folders.
const MINE = `mobilevit ${HERE.href} `;
const CACHE = MINE + VERSION;

self.addEventListener("install", (event) => event.waitUntil(keepAll()));
self.addEventListener("activate", (event) => event.waitUntil(dropOthers().then(() => self.clients.claim())));
self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && event.request.url.startsWith(HERE.href)) event.respondWith(answer(event.request));
});

async function keepAll() {
  const response = await fetch(new URL("files.json", HERE), { cache: "no-store" });
  const { version, files } = await response.json();
  if (version !== VERSION) throw new Error("the folder is being replaced"); // the browser tries again at the next visit
  const cache = await caches.open(CACHE);
  await cache.addAll(files.map((name) => new Request(new URL(name, HERE), { cache: "reload" })));
  await self.skipWaiting();
}

async function dropOthers() {
  for (const name of await caches.keys()) if (name.startsWith(MINE) && name !== CACHE) await caches.delete(name);
}

async function answer(request) {
  const kept = await (await caches.open(CACHE)).match(request, { ignoreSearch: true });
  if (!kept && !request.url.startsWith(RUNTIME)) return fetch(request); // it belongs to another page below this one
  const response = kept ?? (await fetchAndKeep(request));
  if (response.type === "opaque" || response.status === 0) return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

// Files that are not needed at once, such as the runtime for graphics cards, are cached at their first use.
async function fetchAndKeep(request) {
  const response = await fetch(request);
  if (response.ok) {
    const copy = response.clone();
    await caches.open(CACHE).then((cache) => cache.put(request, copy)).catch(() => {}); // no room: it works, but not offline
  }
  return response;
}
