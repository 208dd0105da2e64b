// From the pixels of an image to the input of a model, as `mobilevit.imaging.preprocessing` does in Python.
//
// Resampling is that of Pillow: antialiased, horizontal and then vertical, with 22-bit weights, rounded to bytes after
// each pass. The result is equal byte for byte, except for some tall images: Pillow resamples them vertically first,
// from version 13 on, to save work, so that rounding differs a little.

const BITS = 22;

const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    at: (x) => {
      x = Math.abs(x);
      if (x < 1) return ((1.5 * x - 2.5) * x) * x + 1;
      return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
    },
  },
  lanczos: {
    support: 3,
    at: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0),
  },
};

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

// Python's round(): halves go to the even number.
export function round(value) {
  const down = Math.floor(value), rest = value - down;
  return rest < 0.5 || (rest === 0.5 && down % 2 === 0) ? down : down + 1;
}

// Where an image goes in the input: {region: [left, top, right, bottom], filled: [height, width], size, image}.
export function placement({ size: [height, width], resize_mode, crop_fraction }, rows, columns) {
  let region = [0, 0, columns, rows], filled = [height, width];
  if (resize_mode === "crop") {
    const scale = Math.min(columns / width, rows / height) * crop_fraction;
    const left = (columns - width * scale) / 2, top = (rows - height * scale) / 2;
    region = [Math.max(left, 0), Math.max(top, 0), Math.min(left + width * scale, columns), Math.min(top + height * scale, rows)];
  } else if (resize_mode === "pad") {
    const scale = Math.min(width / columns, height / rows);
    filled = [Math.max(1, round(rows * scale)), Math.max(1, round(columns * scale))];
  }
  return { region, filled, size: [height, width], image: [rows, columns] };
}

// RGBA of a canvas -> RGB; transparent pixels are laid over white.
export function rgbOf(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    const alpha = rgba[from + 3];
    for (let channel = 0; channel < 3; channel++) {
      const value = rgba[from + channel];
      rgb[to + channel] = alpha === 255 ? value : Math.round((value * alpha + 255 * (255 - alpha)) / 255);
    }
  }
  return rgb;
}

// RGB (rows x columns x 3) -> the bytes of the input (height x width x 3), and where the image is in it.
export function prepare(preprocessing, rgb, rows, columns) {
  const place = placement(preprocessing, rows, columns);
  const [height, width] = place.size, [filledRows, filledColumns] = place.filled;
  const resized = resize(rgb, rows, columns, place.region, filledRows, filledColumns, preprocessing.interpolation);
  if (filledRows === height && filledColumns === width) return { pixels: resized, place };
  const pixels = new Uint8Array(height * width * 3);
  for (let row = 0; row < filledRows; row++) {
    pixels.set(resized.subarray(3 * row * filledColumns, 3 * (row + 1) * filledColumns), 3 * row * width);
  }
  return { pixels, place };
}

export function resize(rgb, rows, columns, region, height, width, interpolation) {
  const [left, top, right, bottom] = region.map(Math.fround); // float32, as in Pillow
  if (interpolation === "nearest") return nearest(rgb, columns, [left, top, right, bottom], height, width);
  const filter = FILTERS[interpolation];
  const across = width === columns && left === 0 && right === columns ? null : weights(columns, left, right, width, filter);
  const down = height === rows && top === 0 && bottom === rows ? null : weights(rows, top, bottom, height, filter);
  let found = rgb;
  if (across) found = horizontally(found, rows, columns, width, across);
  if (down) found = vertically(found, width, height, down);
  return found;
}

// For each output pixel: the first source pixel, and the weights from there on, as integers.
function weights(inSize, from, to, outSize, { support, at }) {
  const scale = Math.fround(to - from) / outSize, stretch = Math.max(scale, 1), reach = support * stretch;
  const found = [];
  for (let out = 0; out < outSize; out++) {
    const center = from + (out + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const count = Math.min(inSize, Math.trunc(center + reach + 0.5)) - first;
    const share = new Float64Array(count);
    let sum = 0;
    for (let n = 0; n < count; n++) sum += share[n] = at((n + first - center + 0.5) * (1 / stretch));
    for (let n = 0; n < count; n++) {
      const scaled = (sum ? share[n] / sum : share[n]) * 2 ** BITS;
      share[n] = Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    found.push([first, share]);
  }
  return found;
}

function byte(sum) {
  const value = Math.floor(sum / 2 ** BITS);
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

function horizontally(rgb, rows, columns, width, table) {
  const found = new Uint8Array(rows * width * 3);
  for (let row = 0; row < rows; row++) {
    for (let out = 0; out < width; out++) {
      const [first, share] = table[out];
      let red = 2 ** (BITS - 1), green = red, blue = red;
      for (let n = 0, at = 3 * (row * columns + first); n < share.length; n++, at += 3) {
        red += rgb[at] * share[n];
        green += rgb[at + 1] * share[n];
        blue += rgb[at + 2] * share[n];
      }
      const to = 3 * (row * width + out);
      found[to] = byte(red);
      found[to + 1] = byte(green);
      found[to + 2] = byte(blue);
    }
  }
  return found;
}

function vertically(rgb, width, height, table) {
  const found = new Uint8Array(height * width * 3), line = 3 * width;
  for (let out = 0; out < height; out++) {
    const [first, share] = table[out];
    for (let at = 0; at < line; at++) {
      let sum = 2 ** (BITS - 1);
      for (let n = 0; n < share.length; n++) sum += rgb[(first + n) * line + at] * share[n];
      found[out * line + at] = byte(sum);
    }
  }
  return found;
}

function nearest(rgb, columns, [left, top, right, bottom], height, width) {
  const found = new Uint8Array(height * width * 3);
  const across = places(left, right, width), down = places(top, bottom, height);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const from = 3 * (down[row] * columns + across[column]);
      found.set(rgb.subarray(from, from + 3), 3 * (row * width + column));
    }
  }
  return found;
}

function places(from, to, count) {
  const step = Math.fround(to - from) / count, found = [];
  for (let n = 0, at = from + step * 0.5; n < count; n++, at += step) found.push(Math.floor(at)); // summed up, as in Pillow
  return found;
}
