/*
 * The model, wherever it runs: behind fastle's server (http.js), or in the browser (onnx.js).
 *
 * An image is a Uint8Array of size * size * channels values, row by row, the channels of a pixel together. A latent is
 * a Float32Array: channels, rows and columns of a spatial one, or the features of a pooled one.
 */

/**
 * Opens the model of this page.
 *
 * @returns {Promise<{facts: object, encode: function, decode: function, reconstruct: function}>} what the page must know
 *   of the model (see `manifest` in fastle/web/demo.py); the latents of images; the images of latents; and the
 *   reconstructions of images, as `encode` and then `decode` make them. Each takes a list and promises a list. `decode`
 *   takes the shape of the latents too, where they are parts of spatial ones.
 */
export async function openBackend() {
  const facts = await (await answer("model.json")).json();
  const { open } = await import(`./${facts.backend}.js`);
  return { facts, ...(await open(facts)) };
}

/** What the host of this page answers; an Error for people if it does not. */
export async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The model does not answer: is the server of this page still running?");
  }
  if (!response.ok) throw new Error((await response.text()).trim());
  return response;
}

/** How many values a latent of a shape has. */
export const volume = (shape) => shape.reduce((product, extent) => product * extent, 1);
