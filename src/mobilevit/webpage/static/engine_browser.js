// Runs the model in this browser, with ONNX Runtime: images do not leave the device.

import { classify, detect, labelMap, shares } from "./postprocessing.js";
import { prepare, rgbOf } from "./preprocessing.js";
import { colorOf, sizeOfCanvas } from "./results.js";

const HERE = new URL("./", import.meta.url);
const STRIP_PIXELS = 2 ** 22;

export const name = "browser";
export const devices = [{ name: "wasm", label: "processor" }];

let ort, session, model, weights, device;

export async function open(say) {
  if (navigator.gpu && (await navigator.gpu.requestAdapter().catch(() => null))) devices.push({ name: "webgpu", label: "graphics card" });
  await cacheForOffline();
  const described = await fetch(new URL("model.json", HERE));
  if (!described.ok) throw new Error("model.json is missing beside this page; copy the whole folder.");
  model = await described.json();
  weights = await download(new URL(model.file, HERE), say);
  await useDevice("wasm");
  return [{
    name: model.name,
    task: model.task,
    classes: model.classes,
    scoreThreshold: model.score_threshold ?? 0.3,
    explains: false,
    about: `${model.name}, ${model.task}, ${model.classes.length} classes, on this device`,
  }];
}

export async function useDevice(wanted) {
  const runtime = await import(`./runtime/ort.${wanted}.min.mjs`);
  runtime.env.wasm.wasmPaths = new URL("runtime/", HERE).href;
  runtime.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  runtime.env.wasm.proxy = wanted === "wasm"; // in a worker, so that the page does not freeze
  runtime.env.logLevel = "error";
  // A copy, as the buffer is transferred to the worker.
  const opened = await runtime.InferenceSession.create(weights.slice(), { executionProviders: [wanted] });
  [ort, session, device] = [runtime, opened, wanted]; // last: if opening fails, the previous device stays in use
}

export function currentDevice() {
  return device;
}

export function footer() {
  const threads = ort.env.wasm.numThreads;
  const how = device === "webgpu" ? "on the graphics card" : `on ${threads} thread${threads === 1 ? "" : "s"}`;
  return `Runs in this browser, ${how}; images do not leave this device.`;
}

export async function predict(_, file, bitmap) {
  const options = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const image = file ? await createImageBitmap(file, options) : bitmap;
  const { width, height } = image;
  const rgb = rgbOfImage(image);
  if (image !== bitmap) image.close();
  return answer(rgb, height, width);
}

// In strips, as phones read only zeros from a canvas that is too large for them.
function rgbOfImage(image) {
  const { width, height } = image;
  const rows = Math.min(height, Math.max(1, Math.floor(STRIP_PIXELS / width)));
  const pen = new OffscreenCanvas(width, rows).getContext("2d", { willReadFrequently: true });
  const rgb = new Uint8Array(3 * width * height);
  for (let top = 0; top < height; top += rows) {
    const count = Math.min(rows, height - top);
    pen.clearRect(0, 0, width, rows);
    pen.drawImage(image, 0, top, width, count, 0, 0, width, count);
    rgb.set(rgbOf(pen.getImageData(0, 0, width, count).data), 3 * width * top);
  }
  return rgb;
}

// RGB bytes (rows x columns x 3) -> a result; see results.js.
export async function answer(rgb, rows, columns) {
  const { pixels, place } = prepare(model.preprocessing, rgb, rows, columns);
  const [height, width] = place.size;
  const outputs = await session.run({ [session.inputNames[0]]: new ort.Tensor("uint8", pixels, [1, height, width, 3]) });
  return { task: model.task, ...DECODERS[model.task](outputs, model.classes, place) };
}

const DECODERS = {
  classification: ({ logits }, classes) => ({ item: classify(logits.data, classes) }),
  detection: ({ boxes_xyxy: boxes, scores, selected }, classes, place) => ({
    item: detect(boxes.data, scores.data, selected.data, classes, place),
  }),
  segmentation: ({ logits }, classes, place) => {
    const labels = labelMap(logits.data, classes.length, place), [rows, columns] = place.image;
    const item = { width: columns, height: rows, shares: shares(labels, classes) };
    return { item, labels, mask: paint(labels, rows, columns, classes.length) };
  },
};

function paint(labels, rows, columns, numClasses) {
  const colors = Array.from({ length: numClasses }, (_, n) => model.colors?.[n] ?? colorOf(n));
  const [width, height] = sizeOfCanvas(columns, rows);
  const canvas = new OffscreenCanvas(width, height);
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(width, height);
  const parts = colors.map((color) => new Uint8Array([...color.match(/\d+/g).map(Number), 255]));
  const words = Uint32Array.from(parts, (part) => new Uint32Array(part.buffer)[0]); // one write per pixel
  const pixels = new Uint32Array(image.data.buffer);
  const across = Uint32Array.from({ length: width }, (_, x) => Math.floor((x * columns) / width));
  for (let y = 0, at = 0; y < height; y++) {
    const line = columns * Math.floor((y * rows) / height);
    for (let x = 0; x < width; x++, at++) pixels[at] = words[labels[line + across[x]]];
  }
  pen.putImageData(image, 0, 0);
  return { canvas, colors };
}

async function download(url, say) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${model.file} is missing beside this page; copy the whole folder.`);
  const parts = [];
  let done = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done: ended, value } = await reader.read();
    if (ended) break;
    parts.push(value);
    done += value.length;
    say(`Loading the model ... ${Math.min(100, Math.round((100 * done) / model.bytes))} %`);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

// The service worker caches the files for offline use, and adds the headers that browsers require for threads.
async function cacheForOffline() {
  if (!("serviceWorker" in navigator)) return;
  try {
    const { installing } = await navigator.serviceWorker.register(new URL("service_worker.js", HERE));
    await Promise.race([navigator.serviceWorker.ready, ...(installing ? [failureOf(installing)] : [])]);
  } catch {
    return; // a private window, a full disk, a missing file: everything works, but not offline
  }
  if (!self.crossOriginIsolated && !sessionStorage.getItem("reloaded")) {
    sessionStorage.setItem("reloaded", "true"); // once: now the worker adds its headers
    location.reload();
    await new Promise(() => {});
  }
}

// Rejects if a worker cannot cache the files; `ready` alone would never settle.
function failureOf(worker) {
  return new Promise((_, reject) => {
    const look = () => { if (worker.state === "redundant") reject(new Error("the files cannot be cached")); };
    worker.addEventListener("statechange", look);
    look();
  });
}
