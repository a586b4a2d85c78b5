/* The model in the browser, by ONNX Runtime Web, for a page without fastle's server. */

import { env, InferenceSession, Tensor } from "./runtime/ort.wasm.bundle.min.js";
import { answer } from "./backend.js";

// in a worker, so that the page answers while the model computes. the runtime takes several threads where the page's
// headers isolate it from other origins, and one elsewhere
env.wasm.proxy = true;

export async function open({ size, channels, latent }) {
  const [encoder, decoder] = await Promise.all(["encoder", "decoder"].map(load));

  async function load(part) {
    return InferenceSession.create(await (await answer(`model/${part}.onnx`)).arrayBuffer());
  }

  // one image at a time: a batch is no quicker, and takes more memory
  const each = (compute) => async (items, shape) => {
    const made = [];
    for (const item of items) made.push(await compute(item, shape));
    return made;
  };
  const encode = async (image) => run(encoder, "images", toPlanes(image), [channels, size, size]);
  // of a copy, since the runtime's worker takes what it is given
  const decode = async (z, shape = latent) => toPixels(await run(decoder, "latents", z.slice(), shape));
  return { encode: each(encode), decode: each(decode), reconstruct: each(async (image) => decode(await encode(image))) };

  /** (size, size, channels) in 0 to 255 becomes (channels, size, size) in 0 to 1. */
  function toPlanes(image) {
    const pixels = size * size;
    const planes = new Float32Array(image.length);
    for (let c = 0; c < channels; c++) {
      for (let p = 0; p < pixels; p++) planes[c * pixels + p] = image[channels * p + c] / 255;
    }
    return planes;
  }

  function toPixels(planes) {
    const pixels = planes.length / channels;
    const image = new Uint8Array(planes.length);
    for (let c = 0; c < channels; c++) {
      for (let p = 0; p < pixels; p++) image[channels * p + c] = Math.round(255 * planes[c * pixels + p]);
    }
    return image;
  }
}

async function run(session, name, values, shape) {
  const [output] = Object.values(await session.run({ [name]: new Tensor("float32", values, [1, ...shape]) }));
  return output.data;
}
