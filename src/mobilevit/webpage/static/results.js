// Show a result as rows beside the image, and draw it on the image.
//
// A result is {task, item, mask?}: `item` is that of the service's JSON; `mask` is {canvas, colors} of a segmentation:
// the pixels in the colors of their classes, and the color of each class.

// Colors that people with any kind of color vision can tell apart (Okabe and Ito, 2008), then evenly spread hues.
const FIRST = ["#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#f0e442"];

// iPhones show nothing of a larger canvas, without an error.
const MAX_PIXELS = 2 ** 24;

// The size of a canvas for an image: the same, except for the largest photographs.
export function sizeOfCanvas(width, height) {
  const scale = Math.min(1, Math.sqrt(MAX_PIXELS / (width * height)));
  return [Math.max(1, Math.floor(width * scale)), Math.max(1, Math.floor(height * scale))];
}

export function colorOf(number) {
  return FIRST[number] ?? `hsl(${Math.round(number * 137.5) % 360} 65% 50%)`;
}

export function showRows(place, answer, classes, minScore) {
  place.replaceChildren(ROWS[answer.task](answer, classes, minScore));
}

const ROWS = {
  classification: ({ item }) => list("ol", item.top.map(({ label, probability }) => row(label, percent(probability), probability))),
  detection: ({ item }, classes, minScore) => {
    const found = item.detections.filter(({ score }) => score >= minScore);
    if (!found.length) return nothing("No object has this score; move the slider to the left to see less certain ones.");
    return list("ol", found.map(({ label, score }) => row(label, percent(score), score, colorOf(classes.indexOf(label)))));
  },
  segmentation: ({ item, mask }, classes) => {
    const shares = Object.entries(item.shares);
    return list("ul", shares.map(([label, share]) => row(label, percent(share), share, mask.colors[classes.indexOf(label)])));
  },
};

function list(kind, rows) {
  const made = document.createElement(kind);
  made.append(...rows);
  return made;
}

function row(name, value, share, color) {
  const made = document.createElement("li");
  made.className = "row";
  const fill = document.createElement("div");
  fill.className = "fill";
  fill.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  const words = document.createElement("span");
  words.className = "name";
  if (color) {
    const swatch = document.createElement("i");
    swatch.className = "swatch";
    swatch.style.background = color;
    words.append(swatch);
  }
  words.append(name);
  const number = document.createElement("span");
  number.className = "value";
  number.textContent = value;
  made.append(fill, words, number);
  return made;
}

function nothing(text) {
  const made = document.createElement("p");
  made.className = "nothing";
  made.textContent = text;
  return made;
}

export function percent(share) {
  return `${(100 * share).toFixed(share >= 0.1 ? 1 : 2)} %`;
}

// Remove the color of the class named background, if there is one, as the package does.
export function withoutBackground(mask, classes) {
  const { canvas, colors } = mask;
  classes.forEach((name, number) => {
    if (name.replace(/^_+|_+$/g, "").toLowerCase() !== "background" || !colors[number]) return;
    const [red, green, blue] = colors[number].match(/\d+/g).map(Number);
    const pen = canvas.getContext("2d");
    const image = pen.getImageData(0, 0, canvas.width, canvas.height), { data } = image;
    for (let at = 0; at < data.length; at += 4) {
      if (data[at] === red && data[at + 1] === green && data[at + 2] === blue) data[at + 3] = 0;
    }
    pen.putImageData(image, 0, 0);
    colors[number] = undefined;
  });
  return mask;
}

// Draw an image and its result. `image` is anything a canvas can draw, width by height pixels.
export function draw(canvas, image, width, height, answer, classes, { minScore, opacity, mark }) {
  [canvas.width, canvas.height] = sizeOfCanvas(width, height);
  const across = canvas.width / width, down = canvas.height / height;
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  const unit = Math.max(canvas.width, canvas.height) / 500;
  if (answer?.mask) {
    pen.globalAlpha = opacity;
    pen.imageSmoothingEnabled = false;
    pen.drawImage(answer.mask.canvas, 0, 0, canvas.width, canvas.height);
    pen.globalAlpha = 1;
  }
  if (answer?.item.detections) {
    const visible = answer.item.detections.filter(({ score }) => score >= minScore);
    const moved = visible.map((found) => ({ ...found, box_xyxy: found.box_xyxy.map((edge, n) => edge * (n % 2 ? down : across)) }));
    drawBoxes(pen, moved, classes, unit);
  }
  if (mark) drawMark(pen, [mark[0] * across, mark[1] * down], unit);
}

// Labels are drawn after all boxes; those with the highest scores get the best places and are on top, as in Python.
function drawBoxes(pen, detections, classes, unit) {
  const size = Math.max(11, 13 * unit), labels = [];
  pen.font = `600 ${size}px system-ui, sans-serif`;
  for (const { label, score, box_xyxy: box } of detections) {
    const text = `${label} ${percent(score)}`, color = colorOf(classes.indexOf(label));
    const place = placeLabel(box, pen.measureText(text).width + 0.8 * size, 1.4 * size, pen.canvas, labels);
    labels.push({ box, text, color, place });
  }
  labels.reverse();
  pen.lineWidth = Math.max(1.5, 2 * unit);
  for (const { box: [left, top, right, bottom], color } of labels) {
    pen.strokeStyle = color;
    pen.strokeRect(left, top, right - left, bottom - top);
  }
  for (const { text, color, place: [left, top, right, bottom] } of labels) {
    pen.fillStyle = color;
    pen.fillRect(left, top, right - left, bottom - top);
    pen.fillStyle = isLight(pen, color) ? "#111" : "#fff";
    pen.fillText(text, left + 0.4 * size, top + 1.05 * size);
  }
}

// The first place at the box where the label hides no other, or the one where it hides least.
function placeLabel([left, top, right, bottom], width, height, canvas, labels) {
  let best = [0, 0, width, height], least = Infinity;
  for (const y of [top - height, top, bottom, bottom - height]) {
    if (y < 0 || y > canvas.height - height) continue;
    for (const edge of [left, right - width]) {
      const x = Math.max(0, Math.min(edge, canvas.width - width)), place = [x, y, x + width, y + height];
      const hidden = labels.reduce((sum, other) => sum + overlap(place, other.place), 0);
      if (hidden < least) [best, least] = [place, hidden];
    }
  }
  return best;
}

function overlap(a, b) {
  return Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
}

function drawMark(pen, [x, y], unit) {
  for (const [width, color] of [[5, "#000"], [2.5, "#00c8ff"]]) {
    pen.lineWidth = width * Math.max(0.7, unit);
    pen.strokeStyle = color;
    pen.beginPath();
    pen.arc(x, y, 9 * Math.max(0.7, unit), 0, 2 * Math.PI);
    pen.stroke();
  }
}

function isLight(pen, color) {
  pen.fillStyle = color;
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(pen.fillStyle.slice(at, at + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 150;
}
