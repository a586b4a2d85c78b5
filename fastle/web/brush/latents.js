/* What can be done with latents, without a model: edits, random numbers, principal directions and colours. */

/** NumPy's RandomState, whose stream never changes: the Python that the page shows draws the same numbers. */
export class RandomState {
  #words = new Uint32Array(624);
  #at = 624;
  #kept = null;

  constructor(seed) {
    this.#words[0] = seed;
    for (let i = 1; i < 624; i++) {
      const before = this.#words[i - 1];
      this.#words[i] = Math.imul(1812433253, before ^ (before >>> 30)) + i;
    }
  }

  /** A draw of the standard Gaussian, by Marsaglia's polar method. */
  normal() {
    if (this.#kept !== null) {
      const kept = this.#kept;
      this.#kept = null;
      return kept;
    }
    let x, y, square;
    do {
      x = 2 * this.#uniform() - 1;
      y = 2 * this.#uniform() - 1;
      square = x * x + y * y;
    } while (square >= 1 || square === 0);
    const scale = Math.sqrt((-2 * Math.log(square)) / square);
    this.#kept = scale * x;
    return scale * y;
  }

  #uniform() {
    const [high, low] = [this.#word() >>> 5, this.#word() >>> 6];
    return (high * 67108864 + low) / 9007199254740992;
  }

  #word() {
    if (this.#at === 624) this.#twist();
    let word = this.#words[this.#at++];
    word ^= word >>> 11;
    word ^= (word << 7) & 0x9d2c5680;
    word ^= (word << 15) & 0xefc60000;
    return (word ^ (word >>> 18)) >>> 0;
  }

  #twist() {
    const words = this.#words;
    for (let i = 0; i < 624; i++) {
      const word = (words[i] & 0x80000000) | (words[(i + 1) % 624] & 0x7fffffff);
      words[i] = words[(i + 397) % 624] ^ (word >>> 1) ^ (word & 1 ? 0x9908b0df : 0);
    }
    this.#at = 0;
  }
}

/** The states of an edited latent. A state is a latent and the strokes that led to it, and is never changed. */
export class History {
  #states;
  #at = 0;

  constructor(latent) {
    this.#states = [{ latent, strokes: [] }];
  }

  get current() {
    return this.#states[this.#at];
  }

  get first() {
    return this.#states[0];
  }

  get canUndo() {
    return this.#at > 0;
  }

  get canRedo() {
    return this.#at + 1 < this.#states.length;
  }

  push(latent, strokes) {
    this.#states.splice(this.#at + 1, Infinity, { latent, strokes });
    this.#at++;
  }

  undo() {
    if (this.canUndo) this.#at--;
  }

  redo() {
    if (this.canRedo) this.#at++;
  }
}

/**
 * A stroke of the brush over the cells of a spatial latent. Each cell is changed once, however often it is touched.
 *
 * tool: "paint" takes the cells of `source`; "scale" multiplies by `factor`; "mean" is the mean over all cells;
 * "sample" draws from the standard Gaussian, which SIGReg makes latents resemble; "restore" takes those of `original`.
 */
export class Stroke {
  #before;
  #touched = new Set();
  #random;
  #mean;

  constructor(tool, before, { shape, source, factor, original, seed }) {
    Object.assign(this, { tool, source, factor, seed });
    this.rows = [];
    this.columns = [];
    this.latent = before.slice();
    this.#before = before;
    this.shape = shape;
    this.original = original;
    if (tool === "sample") this.#random = new RandomState(seed);
    if (tool === "mean") this.#mean = cellMean(before, shape);
  }

  /** Changes a cell, unless it was changed before. */
  touch(row, column) {
    const [channels, height, width] = this.shape;
    if (row < 0 || column < 0 || row >= height || column >= width) return;
    if (this.#touched.has(row * width + column)) return;
    this.#touched.add(row * width + column);
    this.rows.push(row);
    this.columns.push(column);
    for (let c = 0; c < channels; c++) {
      const at = (c * height + row) * width + column;
      this.latent[at] = this.#value(at, c);
    }
  }

  #value(at, channel) {
    switch (this.tool) {
      case "paint":
        return this.source.latent[at];
      case "scale":
        return this.factor * this.#before[at];
      case "mean":
        return this.#mean[channel];
      case "sample":
        return this.#random.normal();
      case "restore":
        return this.original[at];
    }
  }
}

function cellMean(latent, [channels, height, width]) {
  const cells = height * width;
  return Float32Array.from({ length: channels }, (_, c) => {
    let sum = 0;
    for (let i = 0; i < cells; i++) sum += latent[c * cells + i];
    return sum / cells;
  });
}

/** (1 - share) * from + share * to. */
export function between(from, to, share) {
  return from.map((value, i) => (1 - share) * value + share * to[i]);
}

/**
 * The principal directions of samples, by the eigenvectors of their Gram matrix: exact, and quick for few samples.
 *
 * @param {Float32Array[]} samples
 * @param {number} most directions; there are fewer if there are few samples
 * @returns {{mean: Float64Array, directions: {vector: Float64Array, deviation: number}[]}} unit vectors, whose largest
 *   component is positive, and the standard deviation of the samples along each
 */
export function principalDirections(samples, most) {
  const length = samples[0].length;
  const mean = new Float64Array(length);
  for (const sample of samples) sample.forEach((value, i) => (mean[i] += value / samples.length));
  const centred = samples.map((sample) => Float64Array.from(sample, (value, i) => value - mean[i]));
  const gram = centred.map((a) => centred.map((b) => dot(a, b)));
  const { values, vectors } = symmetricEigen(gram);
  const order = values.map((_, i) => i).sort((i, j) => values[j] - values[i]);
  const directions = [];
  for (const k of order.slice(0, Math.min(most, samples.length - 1))) {
    if (values[k] <= 1e-9 * values[order[0]] || values[k] <= 0) break;
    const vector = new Float64Array(length);
    centred.forEach((sample, i) => sample.forEach((value, d) => (vector[d] += vectors[i][k] * value)));
    const largest = vector.reduce((best, value) => (Math.abs(value) > Math.abs(best) ? value : best), 0);
    const norm = Math.sign(largest) * Math.sqrt(values[k]);
    directions.push({ vector: vector.map((v) => v / norm), deviation: Math.sqrt(values[k] / (samples.length - 1)) });
  }
  return { mean, directions };
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

/** Eigenvalues and eigenvectors (in columns) of a symmetric matrix, by Jacobi's rotations. */
function symmetricEigen(matrix) {
  const n = matrix.length;
  const a = matrix.map((row) => Float64Array.from(row));
  const vectors = a.map((_, i) => Float64Array.from({ length: n }, (_, j) => (i === j ? 1 : 0)));
  const size = Math.sqrt(a.reduce((sum, row) => sum + dot(row, row), 0));
  for (let sweep = 0; sweep < 30; sweep++) {
    let off = 0;
    for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) off += a[p][q] ** 2;
    if (Math.sqrt(off) <= 1e-14 * size) break;
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) if (a[p][q] !== 0) rotate(p, q);
    }
  }
  return { values: Array.from(a, (row, i) => row[i]), vectors };

  function rotate(p, q) {
    const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
    const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.hypot(theta, 1));
    const c = 1 / Math.hypot(t, 1);
    const s = t * c;
    for (let k = 0; k < n; k++) [a[k][p], a[k][q]] = [c * a[k][p] - s * a[k][q], s * a[k][p] + c * a[k][q]];
    for (let k = 0; k < n; k++) [a[p][k], a[q][k]] = [c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]];
    for (const row of vectors) [row[p], row[q]] = [c * row[p] - s * row[q], s * row[p] + c * row[q]];
  }
}

const SAMPLED_CELLS = 96; // of all latents, for the colours
const WIDE = 2.5; // standard deviations from grey to a full colour

/** What colours the cells of spatial latents: their first three principal directions are red, green and blue. */
export function colouring(latents, [channels, height, width]) {
  const cells = height * width;
  const all = latents.length * cells;
  const count = Math.min(SAMPLED_CELLS, all);
  const samples = Array.from({ length: count }, (_, i) => {
    const at = Math.floor(((i + 0.5) * all) / count);
    return cell(latents[Math.floor(at / cells)], at % cells);
  });
  const { mean, directions } = principalDirections(samples, 3);
  return (latent) => {
    const rgba = new Uint8ClampedArray(4 * cells).fill(128);
    // plain loops: this runs at each move of the pointer
    directions.forEach(({ vector, deviation }, k) => {
      for (let i = 0; i < cells; i++) {
        let along = 0;
        for (let c = 0; c < channels; c++) along += (latent[c * cells + i] - mean[c]) * vector[c];
        rgba[4 * i + k] = 128 + (127 * along) / deviation / WIDE;
      }
    });
    for (let i = 0; i < cells; i++) rgba[4 * i + 3] = 255;
    return new ImageData(rgba, width, height);
  };

  function cell(latent, i) {
    return Float64Array.from({ length: channels }, (_, c) => latent[c * cells + i]);
  }
}

const [LOW, MIDDLE, HIGH] = [[33, 102, 172], [228, 228, 224], [178, 60, 43]];

/** A picture of the features of a pooled latent, row by row: blue is negative, red is positive. */
export function featurePicture(latent) {
  const width = Math.ceil(Math.sqrt(latent.length));
  const height = Math.ceil(latent.length / width);
  const rgba = new Uint8ClampedArray(4 * width * height);
  latent.forEach((value, i) => {
    const share = Math.min(1, Math.abs(value) / WIDE);
    const end = value < 0 ? LOW : HIGH;
    rgba.set([...MIDDLE.map((middle, c) => middle + share * (end[c] - middle)), 255], 4 * i);
  });
  return new ImageData(rgba, width, height);
}
