/* The morph: from the latent of picture A to that of picture B, beside a cross-fade of their pixels. */

import { between } from "./latents.js";
import { liveImage, showImage } from "./show.js";
import { program } from "./python.js";

export function morphPanel(page) {
  const panel = document.getElementById("morph");
  const slider = panel.querySelector("#morph-share");
  const [picture, fade] = panel.querySelectorAll("canvas");
  const share = () => Number(slider.value) / 100;

  const show = liveImage(page, picture, page.backend.decode);

  function refresh(since) {
    const { edited, source } = page;
    panel.querySelector("#morph-value").textContent = `${slider.value} % of B`;
    const mixed = edited.reconstruction.map((value, i) =>
      Math.round((1 - share()) * value + share() * source.reconstruction[i]),
    );
    showImage(fade, mixed, page.facts);
    const names = `${slider.value} % of the way from ${edited.name} to ${source.name}`;
    picture.setAttribute("aria-label", `Decoded ${names} in the latent`);
    fade.setAttribute("aria-label", `The pixels ${names}`);
    page.pythonChanged();
    return show(between(edited.latent, source.latent, share()), since);
  }

  slider.addEventListener("input", (event) => refresh(event.timeStamp));
  return {
    refresh: () => refresh(),
    picture: () => picture,
    python: () =>
      program(page.facts, [page.edited, page.source], (names) => [
        `z = torch.lerp(z0, ${names.get(page.source)}, ${share()})`,
      ]),
  };
}
