/* The Python that makes the same picture as the page. */

const LOAD = (size, channels) => `def load(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("${channels === 3 ? "RGB" : "L"}")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((${size}, ${size}), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(square).reshape(${size}, ${size}, ${channels})).permute(2, 0, 1)[None]`;

/**
 * A program that encodes pictures, makes a latent `z` and saves its picture.
 *
 * @param {object} facts of the model
 * @param {object[]} pictures that it needs; the first one's latent is z0, and its pixels are x0
 * @param {function(Map): string[]} body gives the lines that make z, from a Map of the pictures' latents' names
 * @param {string[]} imports from fastle, besides Autoencoder
 */
export function program(facts, pictures, body, imports = []) {
  const used = [...new Set(pictures)];
  const names = new Map(used.map((picture, i) => [picture, `z${i}`]));
  const files = used.some(({ python }) => python.import === null);
  const lines = body(names);
  const needsNumpy = files || lines.some((line) => line.includes("np."));
  const ours = [...new Set(used.map(({ python }) => python.import))].filter((line) => line !== null);
  const weights = facts.weights === "model" ? [] : [`weights=${quoted(facts.weights)}`];
  return [
    ...(needsNumpy ? ["import numpy as np"] : []),
    "import torch",
    `from PIL import Image${files ? ", ImageOps" : ""}`,
    "",
    `from fastle import ${["Autoencoder", ...imports].join(", ")}`,
    ...ours,
    "",
    ...(files ? ["", LOAD(facts.size, facts.channels), "", ""] : []),
    `model = Autoencoder.from_pretrained(${[quoted(facts.name), ...weights].join(", ")})`,
    "torch.set_grad_enabled(False)",
    ...used.flatMap(({ python }, i) => [`x${i} = ${python.code}`, `z${i} = model.encode(x${i})`]),
    ...lines,
    "picture = (255 * model.decode(z)[0]).round().byte().permute(1, 2, 0).numpy()",
    'Image.fromarray(picture.squeeze()).save("picture.png")',
    "",
  ].join("\n");
}

/** The Python of a picture that came from a file. */
export function pythonOfFile(name) {
  return { import: null, code: `load(${quoted(name)})` };
}

// a string of JSON is one of Python too, but for characters beyond the basic plane, which need no escape
const quoted = (text) => JSON.stringify(text);
