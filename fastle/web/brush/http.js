/* The model behind fastle's server. */

import { answer, imageLength, latentLength } from "./backend.js";

export function open(facts) {
  return {
    encode: (images) => ask("encode", images, Float32Array, latentLength(facts)),
    decode: (latents) => ask("decode", latents, Uint8Array, imageLength(facts)),
    reconstruct: (images) => ask("reconstruct", images, Uint8Array, imageLength(facts)),
  };

  async function ask(path, items, Kind, length) {
    const made = [];
    for (let start = 0; start < items.length; start += facts.batch) {
      const body = new Blob(items.slice(start, start + facts.batch));
      const values = new Kind(await (await answer(path, { method: "POST", body })).arrayBuffer());
      for (let at = 0; at < values.length; at += length) made.push(values.subarray(at, at + length));
    }
    return made;
  }
}
