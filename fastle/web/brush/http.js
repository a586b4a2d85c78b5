/* The model behind fastle's server. */

import { answer, volume } from "./backend.js";

export function open(facts) {
  const image = [facts.size, facts.size, facts.channels];
  const scale = facts.size / facts.latent[1];
  return {
    encode: (images) => ask("encode", images, Float32Array, facts.latent),
    decode: (latents, part) => {
      if (!part) return ask("decode", latents, Uint8Array, image);
      const [, rows, columns] = part;
      return ask(`decode?cells=${rows},${columns}`, latents, Uint8Array, [scale * rows, scale * columns, facts.channels]);
    },
    reconstruct: (images) => ask("reconstruct", images, Uint8Array, image),
  };

  async function ask(path, items, Kind, shape) {
    const length = volume(shape);
    const made = [];
    for (let start = 0; start < items.length; start += facts.batch) {
      const body = new Blob(items.slice(start, start + facts.batch));
      const values = new Kind(await (await answer(path, { method: "POST", body })).arrayBuffer());
      for (let at = 0; at < values.length; at += length) made.push(values.subarray(at, at + length));
    }
    return made;
  }
}
