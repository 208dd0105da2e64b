// From the outputs of a model to results, as `mobilevit.results` does in Python; see results.js.

const MAX_DETECTIONS = 200;

export function classify(logits, classes, count = 5) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const shares = Array.from(logits, (value) => Math.exp(value - most));
  const sum = shares.reduce((a, b) => a + b, 0);
  const order = shares.map((_, n) => n).sort((a, b) => shares[b] - shares[a] || a - b);
  const top = order.slice(0, count).map((n) => ({ label: classes[n], probability: shares[n] / sum }));
  return { label: top[0].label, probability: top[0].probability, top };
}

// boxes (A x 4) in 0..1 of the input, scores (A x K), selected (M x 3): image, class and anchor of each box.
export function detect(boxes, scores, selected, classes, place) {
  const found = [];
  for (let n = 0; n < selected.length; n += 3) {
    const number = Number(selected[n + 1]), anchor = Number(selected[n + 2]);
    found.push({ number, anchor, score: scores[anchor * classes.length + number] });
  }
  found.sort((a, b) => b.score - a.score);
  const [rows, columns] = place.image;
  const detections = found.slice(0, MAX_DETECTIONS).map(({ number, anchor, score }) => ({
    label: classes[number],
    score,
    box_xyxy: toImage(boxes.subarray(4 * anchor, 4 * anchor + 4), place),
  }));
  return { width: columns, height: rows, detections };
}

function toImage(box, { region: [left, top, right, bottom], size: [height, width], filled, image: [rows, columns] }) {
  const across = (width / filled[1]) * (right - left), down = (height / filled[0]) * (bottom - top);
  const limits = [columns, rows, columns, rows];
  return Array.from(box, (value, n) => {
    const place = n % 2 ? value * down + top : value * across + left;
    return Math.min(limits[n], Math.max(0, place));
  });
}

// logits (K x height x width) of the input -> the class of every pixel of the image: the best class after bilinear
// interpolation.
export function labelMap(logits, numClasses, place) {
  const [, width] = place.size, [filledRows, filledColumns] = place.filled, [rows, columns] = place.image;
  const plane = place.size[0] * width;
  const down = line(rows, filledRows), across = line(columns, filledColumns);
  const found = new Uint8Array(rows * columns);
  const mixed = new Float32Array(numClasses * filledColumns);
  for (let row = 0; row < rows; row++) {
    const [upper, lower, weight] = down[row];
    for (let k = 0; k < numClasses; k++) {
      for (let x = 0; x < filledColumns; x++) {
        const a = logits[k * plane + upper * width + x], b = logits[k * plane + lower * width + x];
        mixed[k * filledColumns + x] = a + weight * (b - a);
      }
    }
    for (let column = 0; column < columns; column++) {
      const [left, right, share] = across[column];
      let best = -Infinity;
      for (let k = 0; k < numClasses; k++) {
        const a = mixed[k * filledColumns + left], b = mixed[k * filledColumns + right];
        const value = a + share * (b - a);
        if (value > best) {
          best = value;
          found[row * columns + column] = k;
        }
      }
    }
  }
  return found;
}

function line(outSize, inSize) {
  return Array.from({ length: outSize }, (_, out) => {
    const place = Math.min(inSize - 1, Math.max(0, (out + 0.5) * (inSize / outSize) - 0.5));
    const below = Math.floor(place);
    return [below, Math.min(inSize - 1, below + 1), place - below];
  });
}

export function shares(labels, classes) {
  const counts = new Array(classes.length).fill(0);
  for (const label of labels) counts[label]++;
  const order = counts.map((_, n) => n).filter((n) => counts[n]).sort((a, b) => counts[b] - counts[a] || a - b);
  return Object.fromEntries(order.map((n) => [classes[n], counts[n] / labels.length]));
}
