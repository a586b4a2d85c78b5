/* Image files become square images of the model's size, as the Python that the page shows makes them. */

const LARGEST_FILE = 64e6; // bytes
const MOST_PIXELS = 50e6;
const STRIPE = 256; // rows of an image that are in memory at once

/**
 * Reads a JPEG, PNG or WebP: turned as its EXIF says, its centre cropped to a square and resized.
 *
 * @param {Blob} file
 * @param {string} name of the file, for errors
 * @param {number} size of the square, pixels
 * @param {number} channels 3 for RGB, 1 for grey
 * @returns {Promise<{pixels: Uint8Array, enlarged: boolean}>}
 */
export async function readImage(file, name, size, channels) {
  if (file.size > LARGEST_FILE) throw new Error(`${name} is larger than ${LARGEST_FILE / 1e6} MB.`);
  // a small file may hold a picture that fills the memory: its header is read before it is decoded
  const [width, height] = headerSize(new Uint8Array(await file.slice(0, 1 << 20).arrayBuffer())) ?? [0, 0];
  if (!width || !height) throw new Error(`${name} is not a JPEG, PNG or WebP image.`);
  if (width * height > MOST_PIXELS) {
    throw new Error(`${name} has ${width} × ${height} pixels; at most ${MOST_PIXELS / 1e6} million are taken.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error(`${name} is damaged: it does not decode.`);
  }
  const side = Math.min(bitmap.width, bitmap.height);
  const pixels = resizeSquare(bitmap, side, size, channels);
  bitmap.close();
  return { pixels, enlarged: side < size };
}

/** [width, height] that the header of a JPEG, PNG or WebP says, or null. */
function headerSize(bytes) {
  const view = new DataView(bytes.buffer);
  try {
    if (ascii(bytes, 1, 4) === "PNG" && bytes[0] === 0x89) return [view.getUint32(16), view.getUint32(20)];
    if (ascii(bytes, 0, 4) === "RIFF" && ascii(bytes, 8, 12) === "WEBP") return webpSize(bytes, view);
    if (bytes[0] === 0xff && bytes[1] === 0xd8) return jpegSize(view);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return null;
}

function webpSize(bytes, view) {
  switch (ascii(bytes, 12, 16)) {
    case "VP8 ":
      return [view.getUint16(26, true) & 0x3fff, view.getUint16(28, true) & 0x3fff];
    case "VP8L": {
      const bits = view.getUint32(21, true);
      return [(bits & 0x3fff) + 1, ((bits >>> 14) & 0x3fff) + 1];
    }
    case "VP8X":
      return [1 + (view.getUint32(24, true) & 0xffffff), 1 + (view.getUint32(26, true) >>> 8)];
    default:
      return null;
  }
}

function jpegSize(view) {
  let at = 2;
  while (view.getUint8(at) === 0xff) {
    const marker = view.getUint8(at + 1);
    // a start of frame; C4, C8 and CC are other segments
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      return [view.getUint16(at + 7), view.getUint16(at + 5)];
    }
    at += marker === 0xff ? 1 : 2 + view.getUint16(at + 2);
  }
  return null;
}

const ascii = (bytes, start, stop) => String.fromCharCode(...bytes.subarray(start, stop));

/** The centre of a bitmap, `side` pixels square, resized as Pillow's BILINEAR does: with antialiasing, x before y. */
function resizeSquare(bitmap, side, size, channels) {
  const left = Math.floor((bitmap.width - side) / 2);
  const top = Math.floor((bitmap.height - side) / 2);
  const taps = triangles(side, size);
  const narrow = new Uint8ClampedArray(side * size * channels);
  const canvas = new OffscreenCanvas(side, Math.min(STRIPE, side));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  for (let y = 0; y < side; y += STRIPE) {
    const rows = Math.min(STRIPE, side - y);
    context.clearRect(0, 0, side, rows);
    context.drawImage(bitmap, left, top + y, side, rows, 0, 0, side, rows);
    const stripe = toChannels(context.getImageData(0, 0, side, rows).data, channels);
    resample(stripe, narrow.subarray(y * size * channels), rows, side * channels, channels, taps, {
      next: size * channels,
      step: channels,
    });
  }
  const square = new Uint8ClampedArray(size * size * channels);
  // the columns of the narrow image are its lines now
  resample(narrow, square, size, channels, size * channels, taps, { next: channels, step: size * channels });
  return new Uint8Array(square.buffer);

  // lines of `from` begin `line` values apart, and their pixels are `pixel` values apart
  function resample(from, to, lines, line, pixel, filters, out) {
    for (let l = 0; l < lines; l++) {
      filters.forEach(({ first, weights }, x) => {
        for (let c = 0; c < channels; c++) {
          let sum = 0;
          for (let k = 0; k < weights.length; k++) sum += weights[k] * from[l * line + (first + k) * pixel + c];
          to[l * out.next + x * out.step + c] = Math.floor(sum + 0.5);
        }
      });
    }
  }
}

/** For each of `to` pixels, the first of `from` pixels that it is made of, and the weights of that one and the next. */
function triangles(from, to) {
  const scale = from / to;
  const reach = Math.max(scale, 1);
  return Array.from({ length: to }, (_, x) => {
    const centre = (x + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - reach + 0.5));
    const stop = Math.min(from, Math.floor(centre + reach + 0.5));
    const weights = Array.from({ length: stop - first }, (_, k) =>
      Math.max(0, 1 - Math.abs((first + k - centre + 0.5) / reach)),
    );
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: weights.map((weight) => weight / total) };
  });
}

/** RGBA becomes RGB, or luma as Pillow computes it. */
function toChannels(rgba, channels) {
  const pixels = rgba.length / 4;
  const values = new Uint8Array(pixels * channels);
  for (let p = 0; p < pixels; p++) {
    const [r, g, b] = [rgba[4 * p], rgba[4 * p + 1], rgba[4 * p + 2]];
    if (channels === 3) values.set([r, g, b], 3 * p);
    else values[p] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
  }
  return values;
}
