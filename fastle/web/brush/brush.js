/* The brush: paints cells of the spatial latent of picture A. */

import { History, Stroke } from "./latents.js";
import { regionDecoder } from "./region.js";
import { followSquares, liveImage, showImage, showPicture } from "./show.js";
import { program } from "./python.js";

const TOOLS = {
  paint: "Cells of A become those of B at the same place.",
  scale: "Cells are multiplied by the factor: 0 empties them, above 1 they exaggerate.",
  mean: "Cells become the mean over all cells of A.",
  sample: "Cells become random numbers from the standard Gaussian, which SIGReg makes latents resemble.",
  restore: "Cells become again what the encoder made of A.",
};

export function brushPanel(page) {
  const panel = document.getElementById("brush");
  const find = (selector) => panel.querySelector(selector);
  const [picture, map] = [find("#brush-picture canvas"), find("#brush-map canvas")];
  const source = find("#brush-source");
  const size = find("#brush-size");
  const factor = find("#brush-factor");
  const shape = page.facts.latent;
  const grid = () => shape.slice(1);
  let stroke = null;
  let last = null;
  let comparing = false;
  let seed = 0;

  size.max = Math.max(...grid());
  size.value = Math.max(1, Math.round(size.max / 8));

  const history = () => (page.edited.history ??= new History(page.edited.latent));
  const tool = () => find("input[name=tool]:checked").value;
  const latent = () => (comparing ? history().first : (stroke ?? history().current)).latent;

  const show = liveImage(page, picture, regionDecoder(page.backend));

  function refresh(since) {
    // first, so that the model computes while the rest is drawn
    const shown = show(latent(), since);
    showPicture(map, page.latentPicture(latent()));
    find("#undo").disabled = !history().canUndo;
    find("#redo").disabled = !history().canRedo;
    find("#reset").disabled = history().current.strokes.length === 0;
    const title = `${page.edited.name}, ${comparing ? "as reconstructed" : "as edited"}`;
    picture.setAttribute("aria-label", `${title}. The arrow keys move the brush, the space bar paints.`);
    map.setAttribute("aria-label", `The latent of ${title}, which can be painted too`);
    page.pythonChanged();
    return shown;
  }

  function begin(place, since) {
    comparing = false;
    find("#compare").setAttribute("aria-pressed", "false");
    stroke = new Stroke(tool(), history().current.latent, {
      shape,
      source: page.source,
      factor: Number(factor.value),
      original: page.edited.latent,
      seed: ++seed,
    });
    last = place;
    touch(place, since);
  }

  function touch(place, since) {
    // another image may have been chosen meanwhile
    if (!stroke) return;
    // the pointer may have jumped over cells
    const steps = Math.max(1, Math.abs(place[0] - last[0]), Math.abs(place[1] - last[1]));
    const side = Number(size.value);
    const before = Math.floor((side - 1) / 2);
    for (let step = 1; step <= steps; step++) {
      const [row, column] = last.map((from, axis) => Math.round(from + ((place[axis] - from) * step) / steps));
      for (let i = 0; i < side; i++) for (let j = 0; j < side; j++) stroke.touch(row - before + i, column - before + j);
    }
    last = place;
    refresh(since);
  }

  function end() {
    if (!stroke) return;
    if (stroke.rows.length) history().push(stroke.latent, [...history().current.strokes, stroke]);
    stroke = null;
    refresh();
  }

  const stages = ["#brush-picture", "#brush-map"].map((stage) =>
    followSquares(find(stage), {
      grid,
      extent: () => Number(size.value),
      press: begin,
      drag: touch,
      release: end,
      key: pressKey,
    }),
  );
  for (const [i, stage] of ["#brush-picture", "#brush-map"].entries()) {
    find(stage).addEventListener("pointermove", () => stages[1 - i].show(stages[i].place()));
  }
  stages.forEach((stage) => stage.show(grid().map((extent) => extent >> 1)));

  function pressKey(event, place) {
    if (event.key === " " || event.key === "Enter") {
      event.preventDefault();
      begin(place, event.timeStamp);
      end();
    } else if (event.key === "[" || event.key === "]") {
      size.value = Number(size.value) + (event.key === "]" ? 1 : -1);
      resized();
    } else if (event.key.startsWith("Arrow")) {
      stages.forEach((stage) => stage.show(place));
      page.tell(`Row ${place[0] + 1}, column ${place[1] + 1}`);
    }
  }

  function resized() {
    find("#brush-size-value").textContent = `${size.value} × ${size.value} cells`;
    stages.forEach((stage) => stage.show(stage.place()));
  }

  function chosen() {
    find("#tool-help").textContent = TOOLS[tool()];
    find("#factor-row").hidden = tool() !== "scale";
  }

  const change = (edit) => (event) => {
    // a stroke is not finished yet, and goes on from the state that it began with
    if (stroke) return;
    edit();
    refresh(event.timeStamp);
  };
  const [undo, redo] = [change(() => history().undo()), change(() => history().redo())];
  size.addEventListener("input", resized);
  factor.addEventListener("input", () => (find("#brush-factor-value").textContent = `× ${Number(factor.value).toFixed(1)}`));
  find("#tools").addEventListener("change", chosen);
  find("#undo").addEventListener("click", undo);
  find("#redo").addEventListener("click", redo);
  find("#reset").addEventListener("click", change(() => history().push(page.edited.latent, [])));
  find("#compare").addEventListener("click", (event) => {
    comparing = !comparing;
    event.currentTarget.setAttribute("aria-pressed", String(comparing));
    refresh();
  });
  document.addEventListener("keydown", (event) => {
    if (panel.hidden || !(event.ctrlKey || event.metaKey)) return;
    const again = event.key === "y" || (event.key.toLowerCase() === "z" && event.shiftKey);
    if (!again && event.key !== "z") return;
    event.preventDefault();
    (again ? redo : undo)(event);
  });
  resized();
  chosen();

  return {
    refresh: () => {
      stroke = null;
      showImage(source, page.source.reconstruction, page.facts);
      source.setAttribute("aria-label", `B: the reconstruction of ${page.source.name}`);
      return refresh();
    },
    picture: () => picture,
    python: () => {
      const { strokes } = history().current;
      const sources = strokes.filter(({ tool }) => tool === "paint").map(({ source }) => source);
      return program(page.facts, [page.edited, ...sources], (names) => [
        "z = z0.clone()",
        ...strokes.flatMap((made) => [
          `rows, columns = ${list(made.rows)}, ${list(made.columns)}`,
          `z[..., rows, columns] ${assignment(made, names)}`,
        ]),
      ]);
    },
  };
}

const list = (numbers) => `[${numbers.join(", ")}]`;

function assignment({ tool, source, factor, seed, rows, shape }, names) {
  switch (tool) {
    case "paint":
      return `= ${names.get(source)}[..., rows, columns]`;
    case "scale":
      return `*= ${factor}`;
    case "mean":
      return "= z.mean((2, 3))[..., None]";
    case "sample":
      return `= torch.tensor(np.random.RandomState(${seed}).standard_normal((${rows.length}, ${shape[0]})).T).float()`;
    case "restore":
      return "= z0[..., rows, columns]";
  }
}
