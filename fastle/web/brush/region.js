/* Decodes the part of a picture that changed. */

// cells of the latent, in each direction, that a square of the picture depends on. a test in tests/web finds it
const REACH = 2;
const WORTH = 0.75; // share of the cells above which all of them take as long

/**
 * Makes a function like a backend's `decode`, for one spatial latent at a time, that remembers the last picture. Where
 * the next latent differs in a few cells only, the model decodes these and what is around them: the decoder sees no
 * further, so the picture is the same, up to rounding.
 *
 * @param {object} backend
 * @returns {function(Float32Array[]): Promise<Uint8Array[]>}
 */
export function regionDecoder({ facts, decode }) {
  const [channels, height, width] = facts.latent;
  const scale = facts.size / height;
  let known = null;

  return async ([given]) => {
    // a stroke that goes on changes its latent
    const latent = given.slice();
    const changed = known && changedCells(known.latent, latent);
    const wanted = changed && grown(changed, REACH);
    const seen = wanted && grown(wanted, REACH);
    if (changed === undefined) {
      // nothing changed
    } else if (changed && area(seen) < WORTH * height * width) {
      const [part] = await decode([cut(latent, seen)], [channels, seen.bottom - seen.top, seen.right - seen.left]);
      known = { latent, pixels: paste(known.pixels, part, wanted, seen) };
    } else {
      known = { latent, pixels: (await decode([latent]))[0] };
    }
    return [known.pixels];
  };

  /** The box of the cells that differ; undefined if none does. */
  function changedCells(a, b) {
    let box;
    for (let i = 0; i < a.length; i++) {
      if (a[i] === b[i]) continue;
      const [row, column] = [Math.floor(i / width) % height, i % width];
      box ??= { top: row, left: column, bottom: row + 1, right: column + 1 };
      box.top = Math.min(box.top, row);
      box.left = Math.min(box.left, column);
      box.bottom = Math.max(box.bottom, row + 1);
      box.right = Math.max(box.right, column + 1);
    }
    return box;
  }

  function grown({ top, left, bottom, right }, by) {
    return {
      top: Math.max(0, top - by),
      left: Math.max(0, left - by),
      bottom: Math.min(height, bottom + by),
      right: Math.min(width, right + by),
    };
  }

  function cut(latent, { top, left, bottom, right }) {
    const cells = new Float32Array(channels * (bottom - top) * (right - left));
    let at = 0;
    for (let c = 0; c < channels; c++) {
      for (let row = top; row < bottom; row++) {
        const start = (c * height + row) * width;
        cells.set(latent.subarray(start + left, start + right), at);
        at += right - left;
      }
    }
    return cells;
  }

  /** A copy of a picture, with what a part that begins at the cells `seen` has at the cells `wanted`. */
  function paste(pixels, part, wanted, seen) {
    const pasted = pixels.slice();
    const each = facts.channels * scale; // values of a line of a cell
    const line = each * (seen.right - seen.left);
    for (let y = scale * wanted.top; y < scale * wanted.bottom; y++) {
      const from = (y - scale * seen.top) * line - each * seen.left;
      pasted.set(part.subarray(from + each * wanted.left, from + each * wanted.right), each * (y * width + wanted.left));
    }
    return pasted;
  }
}

const area = ({ top, left, bottom, right }) => (bottom - top) * (right - left);
