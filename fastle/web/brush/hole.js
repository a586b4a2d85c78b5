/* The hole: what a masked model makes of picture A with a square cut out. */

import { followSquares, liveImage, showImage } from "./show.js";
import { program } from "./python.js";

export function holePanel(page) {
  const panel = document.getElementById("hole");
  const [input, picture] = panel.querySelectorAll("canvas");
  const { size, channels, hole: side } = page.facts;
  let corner = [0, 0];

  const show = liveImage(page, picture, page.backend.reconstruct);

  function refresh(since) {
    const pixels = cutHole(page.edited.pixels, corner, side, { size, channels });
    showImage(input, pixels, page.facts);
    const place = `at row ${corner[0] + 1}, column ${corner[1] + 1}`;
    input.setAttribute("aria-label", `${page.edited.name} with a hole ${place}. The arrow keys move the hole.`);
    picture.setAttribute("aria-label", `Reconstruction of ${page.edited.name} with a hole ${place}`);
    page.pythonChanged();
    return show(pixels, since);
  }

  // the hole stays inside, with its centre as near to the pointer as it can be
  const before = Math.floor((side - 1) / 2);
  const inside = (place) => place.map((at) => Math.min(size - side, Math.max(0, at - before)));
  function move(place, since) {
    corner = inside(place);
    stage.show(corner.map((at) => at + before));
    page.tell(`Row ${corner[0] + 1}, column ${corner[1] + 1}`);
    refresh(since);
  }

  const stage = followSquares(panel.querySelector("#hole-input"), {
    grid: () => [size, size],
    extent: () => side,
    press: move,
    drag: move,
    release: () => {},
    key: (event, place) => {
      if (event.key.startsWith("Arrow")) move(place, event.timeStamp);
    },
  });
  // a pointer that only passes leaves the hole where it is
  input.addEventListener("pointermove", () => stage.show(corner.map((at) => at + before)));
  corner = inside([size >> 1, size >> 1]);
  stage.show(corner.map((at) => at + before));

  return {
    refresh: () => refresh(),
    picture: () => picture,
    python: () =>
      program(
        page.facts,
        [page.edited],
        () => [
          `top, left = torch.tensor([${corner[0]}]), torch.tensor([${corner[1]}])`,
          `z = model.encode(mask_fill(x0, top, left, ${side}, ${side}))`,
        ],
        ["mask_fill"],
      ),
  };
}

/** An image with a square filled with the mean of each channel, as `mask_fill` fills it. */
function cutHole(pixels, [top, left], side, { size, channels }) {
  const cut = pixels.slice();
  for (let c = 0; c < channels; c++) {
    let sum = 0;
    for (let p = c; p < pixels.length; p += channels) sum += pixels[p];
    const mean = Math.round(sum / (size * size));
    for (let row = top; row < top + side; row++) {
      for (let column = left; column < left + side; column++) cut[channels * (row * size + column) + c] = mean;
    }
  }
  return cut;
}
