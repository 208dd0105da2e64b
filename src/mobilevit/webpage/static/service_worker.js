// Keeps the page's files for offline use, and adds the headers that threads need. files.json names the version.

const HERE = new URL("./", self.location);

self.addEventListener("install", (event) => event.waitUntil(keepAll()));
self.addEventListener("activate", (event) => event.waitUntil(dropOthers().then(() => self.clients.claim())));
self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && event.request.url.startsWith(HERE.href)) event.respondWith(answer(event.request));
});

async function manifest() {
  const response = await fetch(new URL("files.json", HERE), { cache: "no-store" });
  return response.json();
}

async function keepAll() {
  const { version, files } = await manifest();
  const cache = await caches.open(version);
  await cache.addAll(files.map((name) => new Request(new URL(name, HERE), { cache: "reload" })));
  await self.skipWaiting();
}

async function dropOthers() {
  const { version } = await manifest().catch(() => ({}));
  if (!version) return;
  for (const name of await caches.keys()) if (name !== version) await caches.delete(name);
}

async function answer(request) {
  const kept = await caches.match(request, { ignoreSearch: true });
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
    const names = await caches.keys();
    if (names.length) await (await caches.open(names[0])).put(request, response.clone());
  }
  return response;
}
