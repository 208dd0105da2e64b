// The page: takes images, asks the engine, and shows the prediction beside the image and on it.

import * as engine from "./engine.js";
import { KeyNeeded } from "./engine_errors.js";
import { draw, showRows, withoutBackground } from "./results.js";

const at = (id) => document.getElementById(id);
const GALLERY = ["cat", "coffee", "rocket", "astronaut"];

const state = {
  models: [], model: null,
  images: [],            // {file, bitmap, thumb, url} of each image that was dropped, pasted or chosen
  wanted: null,          // the image that was chosen last, perhaps not decoded yet
  shown: null,           // {file, bitmap} of the visible image; the others have no bitmap, to save memory
  answer: null,
  mark: null,            // [x, y] of the pixel to explain
  camera: null,          // {stream, facing} while it runs; no stream while the browser asks for permission
  turn: 0,               // counts requests, so that a late answer is not shown for another image
};

// -- start -----------------------------------------------------------------------------------------------------------

start();

async function start() {
  for (const name of GALLERY) {
    at("gallery").append(thumbnail(`gallery/${name}.jpg`, `Use the image ${name}`, async () => {
      const response = await fetch(`gallery/${name}.jpg`);
      take([new File([await response.blob()], `${name}.jpg`, { type: "image/jpeg" })]);
    }));
  }
  listen();
  await openEngine();
}

async function openEngine() {
  try {
    say("Loading the model ...");
    state.models = await engine.open(say);
    chooseModel(0);
    at("model-choice").hidden = state.models.length < 2;
    at("model").replaceChildren(...state.models.map((model, number) => new Option(model.name, number)));
    at("device-choice").hidden = engine.devices.length < 2;
    at("device").replaceChildren(...engine.devices.map((device) => new Option(device.label, device.name)));
    if (engine.footer) at("footer").textContent = engine.footer();
    say("");
    document.documentElement.dataset.ready = "true";
    if (state.shown) await answer();
  } catch (error) {
    fail(error);
  }
}

function chooseModel(number) {
  state.model = state.models[number];
  at("about").textContent = state.model.about;
  at("score").value = state.model.scoreThreshold;
}

function listen() {
  at("file").addEventListener("change", (event) => { take([...event.target.files]); event.target.value = ""; });
  at("model").addEventListener("change", async (event) => { chooseModel(Number(event.target.value)); await answer(); });
  at("device").addEventListener("change", async (event) => {
    try {
      say("Loading ...");
      await engine.useDevice(event.target.value);
      say("");
      complain("");
      at("footer").textContent = engine.footer();
      await answer();
    } catch (error) {
      event.target.value = engine.currentDevice();
      fail(error);
    }
  });
  for (const id of ["score", "opacity"]) at(id).addEventListener("input", show);
  at("camera").addEventListener("click", () => (state.camera ? stopCamera() : startCamera("environment")));
  at("turn").addEventListener("click", () => startCamera(state.camera?.facing === "user" ? "environment" : "user"));
  at("another").addEventListener("click", startOver);
  at("save-image").addEventListener("click", () => at("canvas").toBlob((blob) => save(blob, `${stem()}-answer.png`)));
  at("save-json").addEventListener("click", () => {
    const { mask_png: _, ...item } = state.answer.item;
    save(new Blob([JSON.stringify({ model: state.model.name, task: state.answer.task, ...item }, null, 2)]), `${stem()}.json`);
  });
  at("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    sessionStorage.setItem("key", at("key").value.trim());
    at("key-form").hidden = true;
    complain("");
    await (state.model ? answer() : openEngine());
  });
  at("canvas").addEventListener("click", (event) => {
    const box = at("canvas").getBoundingClientRect();
    const { width, height } = state.shown.bitmap;
    lookFrom([(event.clientX - box.left) * width / box.width, (event.clientY - box.top) * height / box.height], true);
  });
  at("canvas").addEventListener("keydown", moveByKey);
  window.addEventListener("paste", (event) => take([...event.clipboardData.files]));
  window.addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
  window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) at("drop").classList.remove("over"); });
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    take([...event.dataTransfer.files]);
  });
}

// -- images ----------------------------------------------------------------------------------------------------------

async function take(files) {
  if (!files.length) return;
  stopCamera();
  const read = [];
  let unread = "";
  for (const file of files) {
    try {
      const bitmap = await decode(file);
      if (read.length) bitmap.close(); // it can be read; it is decoded again when it is shown
      read.push({ file, bitmap: read.length ? null : bitmap });
    } catch {
      unread = `${file.name || "This file"} is not an image that this browser can read.`;
      complain(unread);
    }
  }
  if (!read.length) return;
  for (const { url } of state.images) URL.revokeObjectURL(url);
  state.images = read;
  at("strip").hidden = read.length < 2;
  at("strip").replaceChildren(...read.map((image, number) => {
    image.url = URL.createObjectURL(image.file);
    image.thumb = thumbnail(image.url, `Image ${number + 1}: ${image.file.name}`, () => look(image));
    return image.thumb;
  }));
  await look(read[0]);
  if (unread && state.wanted === read[0] && !at("error").textContent) complain(unread); // the answer cleared it
}

function decode(file) {
  return createImageBitmap(file, { imageOrientation: "from-image" });
}

async function look(image) {
  state.wanted = image;
  stopCamera();
  try {
    const bitmap = image.bitmap ?? (await decode(image.file));
    if (state.wanted !== image) return bitmap.close();
    image.bitmap = bitmap;
  } catch {
    return complain(`${image.file.name || "The image"} can no longer be read.`);
  }
  putInFront(image);
  for (const { thumb } of state.images) thumb?.setAttribute("aria-pressed", String(thumb === image.thumb));
  state.answer = state.mark = null;
  at("explanation").hidden = true;
  at("invitation").hidden = true;
  at("drop").classList.add("full");
  at("canvas").hidden = false;
  at("another").hidden = false;
  show();
  await answer();
}

// Browsers are slow to free decoded images, and a camera makes many.
function putInFront(shown) {
  if (state.shown && state.shown !== shown) {
    state.shown.bitmap.close();
    state.shown.bitmap = null;
  }
  state.shown = shown;
}

function startOver() {
  stopCamera();
  for (const { url } of state.images) URL.revokeObjectURL(url);
  putInFront(null);
  Object.assign(state, { images: [], wanted: null, answer: null, mark: null, turn: state.turn + 1 });
  for (const id of ["canvas", "strip", "another", "controls", "downloads", "explanation", "hint"]) at(id).hidden = true;
  at("invitation").hidden = at("waiting").hidden = false;
  at("drop").classList.remove("full");
  at("results").replaceChildren();
  say("");
  complain("");
  at("gallery").querySelector("button")?.focus();
}

function thumbnail(url, label, choose) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "thumb";
  button.setAttribute("aria-label", label);
  const image = document.createElement("img");
  image.src = url;
  image.alt = "";
  button.append(image);
  button.addEventListener("click", choose);
  return button;
}

// -- answers ---------------------------------------------------------------------------------------------------------

async function ask(file, bitmap) {
  const { classes } = state.model;
  const found = await engine.predict(state.model, file, bitmap);
  if (found.mask) withoutBackground(found.mask, classes);
  return found;
}

async function answer() {
  if (!state.shown || !state.model) return;
  const turn = ++state.turn;
  state.mark = null;
  at("explanation").hidden = true; // it belongs to another image or model
  say("Computing ...");
  const begun = performance.now();
  try {
    const found = await ask(state.shown.file, state.shown.bitmap);
    if (turn !== state.turn) return;
    state.answer = found;
    complain("");
    say(`${Math.round(performance.now() - begun)} ms`);
    show();
  } catch (error) {
    if (turn === state.turn) fail(error);
  }
}

function show() {
  if (!state.shown) return;
  const { answer: found, model } = state;
  const minScore = Number(at("score").value), opacity = Number(at("opacity").value);
  const { bitmap } = state.shown;
  const classes = model?.classes ?? [];
  draw(at("canvas"), bitmap, bitmap.width, bitmap.height, found, classes, { minScore, opacity, mark: state.mark });
  at("score-control").hidden = !found?.item.detections;
  at("opacity-control").hidden = !found?.mask;
  at("controls").hidden = at("score-control").hidden && at("opacity-control").hidden;
  at("score-value").textContent = `${Math.round(100 * minScore)} %`;
  at("opacity-value").textContent = `${Math.round(100 * opacity)} %`;
  at("downloads").hidden = !found;
  at("waiting").hidden = true;
  const explains = Boolean(found && model.explains && !state.camera);
  at("hint").hidden = !explains;
  at("hint").textContent = "Click a pixel to see what it attends to. With the keyboard: go to the image, move with the arrow keys, press Enter.";
  at("canvas").classList.toggle("clickable", explains);
  at("canvas").tabIndex = explains ? 0 : -1;
  at("canvas").setAttribute("role", "img");
  at("canvas").setAttribute("aria-label", found ? "Your image with the prediction" : "Your image");
  if (found) showRows(at("results"), found, classes, minScore); else at("results").replaceChildren();
}

// -- explanations ----------------------------------------------------------------------------------------------------

async function lookFrom(point, now) {
  if (!state.answer || !state.model.explains || state.camera) return;
  const { width, height } = state.shown.bitmap;
  state.mark = [Math.min(width - 1, Math.max(0, Math.floor(point[0]))), Math.min(height - 1, Math.max(0, Math.floor(point[1])))];
  show();
  if (!now) return;
  const { turn } = state;
  say("Computing what this pixel attends to ...");
  try {
    const found = await engine.explain(state.model, state.shown.file, state.mark);
    if (turn !== state.turn) return;
    at("explanation-image").src = found.url;
    at("explanation-image").alt = `Attention of pixel ${state.mark.join(", ")} in every block, layer and head`;
    at("explanation-caption").textContent = `Attention of pixel ${state.mark.join(", ")}, and the parts of the image that speak for ${found.label}.`;
    at("explanation").hidden = false;
    complain("");
    say("");
  } catch (error) {
    if (turn === state.turn) fail(error);
  }
}

function moveByKey(event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!state.shown) return;
  const { width, height } = state.shown.bitmap;
  const point = state.mark ?? [width / 2, height / 2];
  if (event.key === "Enter") return void lookFrom(point, true);
  const step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  lookFrom([point[0] + step[0] * width / 40, point[1] + step[1] * height / 40], false);
}

// -- camera ----------------------------------------------------------------------------------------------------------

async function startCamera(facing) {
  stopCamera();
  complain("");
  state.wanted = null;
  state.turn++; // a late answer does not belong to the camera's image
  if (!navigator.mediaDevices?.getUserMedia) return complain("Browsers allow cameras only on pages served by https or from localhost.");
  const camera = { stream: null, facing };
  state.camera = camera;
  try {
    camera.stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: facing, width: { ideal: 640 } } });
    if (state.camera !== camera) return stopStream(camera); // stopped or restarted before permission was given
    at("video").srcObject = camera.stream;
    await at("video").play();
    if (state.camera !== camera) return;
    at("camera").setAttribute("aria-pressed", "true");
    at("turn").hidden = false;
    at("strip").hidden = true;
    at("explanation").hidden = true;
    at("invitation").hidden = true;
    at("drop").classList.add("full");
    at("canvas").hidden = false;
    at("another").hidden = false;
    await watch(camera);
  } catch (error) {
    if (state.camera !== camera) return;
    complain(error.name === "NotAllowedError" ? "The camera needs your permission." : `No camera: ${error.message}`);
    stopCamera();
  }
}

async function watch(camera) {
  const video = at("video");
  let smoothed = 0;
  while (state.camera === camera) {
    const begun = performance.now();
    const frame = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    frame.getContext("2d").drawImage(video, 0, 0);
    const bitmap = await createImageBitmap(frame);
    const file = engine.name === "server" ? await frame.convertToBlob({ type: "image/jpeg", quality: 0.9 }) : null;
    state.mark = null;
    try {
      const found = await ask(file, bitmap);
      if (state.camera !== camera) return bitmap.close();
      putInFront({ file, bitmap });
      state.answer = found;
      show();
    } catch (error) {
      if (state.shown?.bitmap !== bitmap) bitmap.close();
      if (state.camera !== camera) return;
      stopCamera();
      return fail(error);
    }
    const seconds = (performance.now() - begun) / 1000;
    smoothed = smoothed ? 0.8 * smoothed + 0.2 * seconds : seconds;
    say(`${(1 / smoothed).toFixed(1)} images a second`);
    await new Promise(requestAnimationFrame);
  }
}

function stopCamera() {
  if (state.camera) stopStream(state.camera);
  state.camera = null;
  at("camera").setAttribute("aria-pressed", "false");
  at("turn").hidden = true;
}

function stopStream({ stream }) {
  stream?.getTracks().forEach((track) => track.stop());
}

// -- messages --------------------------------------------------------------------------------------------------------

function say(text) { at("status").textContent = text; }

function complain(text) { at("error").textContent = text; }

function fail(error) {
  say("");
  if (error instanceof KeyNeeded) {
    at("key-form").hidden = false;
    at("key").focus();
  }
  complain(error.message || String(error));
}

function stem() { return (state.shown?.file?.name ?? "camera").replace(/\.[^.]*$/, ""); }

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
