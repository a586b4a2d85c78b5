/*
 * The model, and the only file that knows where it runs: here, behind fastle's server. A page without a server brings
 * another file of this name with the same functions.
 *
 * An image is a Uint8Array of size * size * channels values, row by row, the channels of a pixel together. A latent is
 * a Float32Array: channels, rows and columns of a spatial one, or the features of a pooled one.
 */

let facts;

/** What the page must know of the model: see `manifest` in fastle/web/server.py. */
export async function open() {
  facts = await (await answer("model.json")).json();
  return facts;
}

/** The latents of images. */
export function encode(images) {
  return ask("encode", images, Float32Array, latentLength());
}

/** The images of latents. */
export function decode(latents) {
  return ask("decode", latents, Uint8Array, imageLength());
}

/** The reconstructions of images, as `encode` and then `decode` make them. */
export function reconstruct(images) {
  return ask("reconstruct", images, Uint8Array, imageLength());
}

const imageLength = () => facts.size * facts.size * facts.channels;
const latentLength = () => facts.latent.reduce((product, extent) => product * extent, 1);

async function ask(path, items, Kind, length) {
  const made = [];
  for (let start = 0; start < items.length; start += facts.batch) {
    const body = new Blob(items.slice(start, start + facts.batch));
    const values = new Kind(await (await answer(path, { method: "POST", body })).arrayBuffer());
    for (let at = 0; at < values.length; at += length) made.push(values.subarray(at, at + length));
  }
  return made;
}

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The model does not answer: is fastle brush still running?");
  }
  if (!response.ok) throw new Error((await response.text()).trim());
  return response;
}
