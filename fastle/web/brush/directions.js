/* Sliders that move the pooled latent of picture A along the principal directions of all pictures on the page. */

import { principalDirections } from "./latents.js";
import { liveImage } from "./show.js";
import { program } from "./python.js";

const MOST = 8;

export function directionsPanel(page) {
  const panel = document.getElementById("directions");
  const picture = panel.querySelector("canvas");
  const list = panel.querySelector("#sliders");
  let directions = [];
  let known = 0;

  const show = liveImage(page, picture, page.backend.decode);

  const shifts = () => [...list.querySelectorAll("input")].map((input) => Number(input.value));

  function moved() {
    const latent = Float64Array.from(page.edited.latent);
    shifts().forEach((shift, k) => {
      const { vector, deviation } = directions[k];
      if (shift) vector.forEach((value, i) => (latent[i] += shift * deviation * value));
    });
    return Float32Array.from(latent);
  }

  function refresh(since) {
    if (known !== page.pictures.length) {
      known = page.pictures.length;
      directions = principalDirections(page.pictures.map(({ latent }) => latent), MOST).directions;
      list.replaceChildren(...directions.map(slider));
    }
    for (const input of list.querySelectorAll("input")) {
      const shift = Number(input.value);
      input.nextElementSibling.textContent = `${shift > 0 ? "+" : ""}${shift.toFixed(1)} σ`;
    }
    picture.setAttribute("aria-label", `${page.edited.name}, its latent moved by the sliders`);
    page.pythonChanged();
    return show(moved(), since);
  }

  function slider(_, k) {
    const label = document.createElement("label");
    label.className = "slider";
    const name = Object.assign(document.createElement("span"), { textContent: `Direction ${k + 1}` });
    const input = Object.assign(document.createElement("input"), { type: "range", min: -4, max: 4, step: 0.1, value: 0 });
    label.append(name, input, document.createElement("output"));
    return label;
  }

  list.addEventListener("input", (event) => refresh(event.timeStamp));
  panel.querySelector("#centre").addEventListener("click", (event) => {
    for (const input of list.querySelectorAll("input")) input.value = 0;
    refresh(event.timeStamp);
  });

  return {
    refresh: () => refresh(),
    picture: () => picture,
    python: () =>
      program(page.facts, page.pictures, () => [
        `latents = torch.cat([${page.pictures.map((_, i) => `z${i}`).join(", ")}])`,
        "_, scales, vectors = torch.linalg.svd((latents - latents.mean(0)).double(), full_matrices=False)",
        "# a direction points to where its largest component is positive",
        "signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()",
        `shifts = torch.tensor([${shifts().join(", ")}]).double()`,
        "steps = shifts * scales[: len(shifts)] / (len(latents) - 1) ** 0.5",
        `z = (z${page.pictures.indexOf(page.edited)} + steps @ (signs * vectors)[: len(shifts)]).float()`,
      ]),
  };
}
