// Asks the HTTP service that this page came from.

import { KeyNeeded } from "./engine_errors.js";
import { sizeOfCanvas } from "./results.js";

const ROOT = new URL("../v1/", import.meta.url);

export const name = "server";

export async function open() {
  const { models } = await ask("models");
  return models.map((model) => ({
    name: model.name,
    task: model.task,
    classes: model.classes,
    scoreThreshold: model.score_threshold ?? 0.3,
    explains: model.explain,
    about: `${model.architecture}, ${model.task}, ${model.classes.length} classes, ${model.engine}`,
  }));
}

export const devices = [];

// An image as a file or blob -> a result; see results.js.
export async function predict(model, file) {
  const query = { model: model.name, top: 5, ...QUERIES[model.task] };
  const { task, results } = await ask("predict", query, file);
  const [item] = results;
  return item.mask_png ? { task, item, mask: await readMask(item.mask_png) } : { task, item };
}

// The page's slider hides objects, so it asks for nearly all of them.
const QUERIES = { detection: { min_score: 0.05 } };


export async function explain(model, file, [x, y]) {
  const found = await ask("explain", { model: model.name, x, y }, file);
  return { url: `data:image/png;base64,${found.image_png}`, label: found.label, score: found.score };
}

async function ask(path, query = {}, file = undefined) {
  const url = new URL(path, ROOT);
  for (const [key, value] of Object.entries(query)) url.searchParams.set(key, value);
  const headers = {};
  const key = sessionStorage.getItem("key");
  if (key && !/^[!-~]+$/.test(key)) throw new KeyNeeded("An API key has ASCII letters, digits and punctuation, but no spaces.");
  if (key) headers["X-API-Key"] = key;
  if (file) headers["Content-Type"] = file.type || "application/octet-stream";
  for (let attempt = 0; ; attempt++) {
    let response;
    try {
      response = await fetch(url, { method: file ? "POST" : "GET", headers, body: file });
    } catch {
      throw new Error("The service does not answer; is it still running?");
    }
    if (response.status === 503 && attempt < 4) {
      const seconds = Math.min(10, Number(response.headers.get("Retry-After")) || 1);
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
      continue;
    }
    const value = await response.json().catch(() => ({ error: `The service answered with status ${response.status}.` }));
    if (response.status === 401) throw new KeyNeeded(value.error);
    if (!response.ok) throw new Error(value.error);
    return value;
  }
}

async function readMask(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const canvas = new OffscreenCanvas(...sizeOfCanvas(image.width, image.height));
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = false; // a mix of two colors belongs to no class
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  image.close();
  return { canvas, colors: paletteOf(bytes) };
}

// The colors of a palette PNG, by index: its PLTE chunk.
function paletteOf(bytes) {
  const view = new DataView(bytes.buffer);
  for (let at = 8; at < bytes.length; at += 12 + view.getUint32(at)) {
    if (String.fromCharCode(...bytes.subarray(at + 4, at + 8)) !== "PLTE") continue;
    const palette = bytes.subarray(at + 8, at + 8 + view.getUint32(at));
    return Array.from({ length: palette.length / 3 }, (_, n) => `rgb(${palette.slice(3 * n, 3 * n + 3).join(" ")})`);
  }
  return [];
}
