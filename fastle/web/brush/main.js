/* The page: its model, its pictures, its tabs, and what leaves it. */

import { openBackend } from "./backend.js";
import { readImage } from "./images.js";
import { colouring, featurePicture } from "./latents.js";
import { FrameTime, showImage, showPicture } from "./show.js";
import { pythonOfFile } from "./python.js";
import { brushPanel } from "./brush.js";
import { directionsPanel } from "./directions.js";
import { holePanel } from "./hole.js";
import { morphPanel } from "./morph.js";

const MOST_PICTURES = 64;
const TIMES = "\u00a0×\u00a0"; // without a line break
const SECONDS_SHOWN = 6; // of a message

const byId = (id) => document.getElementById(id);

/*
 * What the panels know. A picture has a name, its pixels, latent and reconstruction, the Python that makes its pixels,
 * and, once it was edited, a history.
 */
const page = {
  backend: null,
  facts: null,
  pictures: [],
  edited: null,
  source: null,
  frames: new FrameTime(byId("frame-time")),
  latentPicture: null,
  say,
  // for those who do not see where the brush is
  tell: (text) => (byId("place").textContent = text),
  failed: (error) => {
    say(error.message);
    // what is not a message for people is a fault of the page
    if (error.constructor !== Error) throw error;
  },
  pythonChanged: () => {
    if (byId("python").open) showPython();
  },
};
const panels = new Map();

async function start() {
  page.backend = await openBackend();
  const { facts } = page.backend;
  page.facts = facts;
  const count = (extents) => extents.reduce((product, extent) => product * extent, 1).toLocaleString("en");
  const image = [facts.channels, facts.size, facts.size];
  const extents = spatial() ? `${facts.latent.join(TIMES)} = ` : "";
  byId("facts").textContent =
    `${facts.name}: an image of ${image.join(TIMES)} = ${count(image)} values becomes a ` +
    `${spatial() ? "spatial" : "pooled"} latent of ${extents}${count(facts.latent)}.`;
  byId("images-note").textContent =
    "Each image, its reconstruction and its latent" +
    (spatial() ? ", coloured by its three principal directions. " : ". ") +
    `Drop images anywhere: their centre is cut to a square of ${facts.size} px. They stay on this computer.`;
  // whole multiples of the pixels
  const edge = facts.size * Math.max(1, Math.round(420 / facts.size));
  document.documentElement.style.setProperty("--edge", `${Math.min(edge, 512)}px`);
  await addFiles(
    await Promise.all(
      facts.pictures.map(async ({ name, file, python }) => ({ name, python, blob: await (await fetch(file)).blob() })),
    ),
  );
  page.edited = page.pictures[0];
  page.source = page.pictures[1] ?? page.pictures[0];
  const offered = {
    brush: spatial() && brushPanel,
    directions: !spatial() && directionsPanel,
    morph: morphPanel,
    hole: facts.hole !== null && holePanel,
  };
  for (const [name, make] of Object.entries(offered)) {
    byId(`tab-${name}`).hidden = !make;
    if (make) panels.set(name, make(page));
  }
  markChosen();
  byId("bench").hidden = false;
  await choosePanel([...panels.keys()][0]);
}

const spatial = () => page.facts.latent.length === 3;

/* pictures */

async function addFiles(files) {
  const { facts } = page;
  const added = [];
  const faults = [];
  for (const { name, blob, python } of files) {
    if (page.pictures.length + added.length >= MOST_PICTURES) {
      faults.push(`The page holds ${MOST_PICTURES} images: ${name} and later ones were left out.`);
      break;
    }
    try {
      const { pixels, enlarged } = await readImage(blob, name, facts.size, facts.channels);
      if (enlarged) faults.push(`${name} was smaller than ${facts.size} px and has been enlarged.`);
      added.push({ name, python, pixels });
    } catch (error) {
      if (error.constructor !== Error) throw error;
      faults.push(error.message);
    }
  }
  if (faults.length) say(faults.length === 1 ? faults[0] : `${faults[0]} (${faults.length - 1} more such messages)`);
  if (!added.length) return;
  const latents = await page.backend.encode(added.map(({ pixels }) => pixels));
  const reconstructions = await page.backend.decode(latents);
  added.forEach((picture, i) => Object.assign(picture, { latent: latents[i], reconstruction: reconstructions[i] }));
  page.pictures.push(...added);
  const all = page.pictures.map(({ latent }) => latent);
  page.latentPicture = spatial() ? colouring(all, facts.latent) : featurePicture;
  byId("images").append(...added.map(card));
  // the principal directions are those of all pictures
  for (const picture of page.pictures) showPicture(picture.tiles[2], page.latentPicture(picture.latent));
}

function card(picture) {
  const item = byId("card").content.cloneNode(true).firstElementChild;
  picture.tiles = item.querySelectorAll("canvas");
  showImage(picture.tiles[0], picture.pixels, page.facts);
  showImage(picture.tiles[1], picture.reconstruction, page.facts);
  const titles = [picture.name, `Reconstruction of ${picture.name}`, `Latent of ${picture.name}`];
  titles.forEach((title, i) => picture.tiles[i].setAttribute("aria-label", title));
  item.querySelector(".name").textContent = picture.name;
  item.querySelector(".name").title = picture.name;
  item.querySelector(".note").textContent = `PSNR ${psnr(picture).toFixed(1)} dB`;
  for (const role of ["edited", "source"]) {
    const input = item.querySelector(`input[name=${role}]`);
    input.setAttribute("aria-label", `${picture.name} is ${role === "edited" ? "A, which is edited" : "B"}`);
    input.addEventListener("change", () => {
      page[role] = picture;
      refresh();
    });
    picture[`${role}Input`] = input;
  }
  return item;
}

function markChosen() {
  page.edited.editedInput.checked = true;
  page.source.sourceInput.checked = true;
}

function psnr({ pixels, reconstruction }) {
  const error = pixels.reduce((sum, value, i) => sum + ((value - reconstruction[i]) / 255) ** 2, 0) / pixels.length;
  return -10 * Math.log10(Math.max(error, 1e-10));
}

async function addChosen(files) {
  if (!page.edited || !files.length) return;
  const before = page.pictures.length;
  await addFiles(files.map((file) => ({ name: file.name, blob: file, python: pythonOfFile(file.name) })));
  if (page.pictures.length === before) return;
  page.edited = page.pictures[before];
  markChosen();
  page.edited.editedInput.closest("li").scrollIntoView({ block: "nearest" });
  await refresh();
}

// one after the other, and after the page's own; a list of files is emptied when its event is over
function adding(files) {
  const list = [...files];
  queue = queue.then(() => addChosen(list)).catch(page.failed);
}

byId("choose").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", (event) => {
  adding(event.target.files);
  event.target.value = "";
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) byId("drop").hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").hidden = true;
  adding(event.dataTransfer.files);
});
addEventListener("paste", (event) => adding(event.clipboardData.files));

/* tabs */

let chosen = null;
const refresh = () => panels.get(chosen).refresh();
const tabs = [...document.querySelectorAll("[role=tab]")];

async function choosePanel(name) {
  chosen = name;
  for (const tab of tabs) {
    const selected = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !selected;
  }
  await refresh();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => choosePanel(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const shown = tabs.filter(({ hidden }) => !hidden);
    const next = shown[(shown.indexOf(tab) + step + shown.length) % shown.length];
    next.focus();
    next.click();
  });
}

/* what leaves the page */

byId("save").addEventListener("click", () => {
  panels
    .get(chosen)
    .picture()
    .toBlob((blob) => {
      const link = Object.assign(document.createElement("a"), {
        href: URL.createObjectURL(blob),
        download: `${page.edited.name.replace(/\.\w+$/, "").replace(/\W+/g, "-")}-${chosen}.png`,
      });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
});

function showPython() {
  byId("python").querySelector("code").textContent = panels.get(chosen).python();
}

byId("python").addEventListener("toggle", page.pythonChanged);
byId("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(panels.get(chosen).python());
    say("Copied.");
  } catch {
    // the browser does not let the page write to the clipboard
    byId("python").open = true;
    showPython();
    getSelection().selectAllChildren(byId("python").querySelector("code"));
    say("Selected below: copy it with Ctrl C.");
  }
});

let hiding;

/** Shows a message for a while. */
function say(text) {
  byId("status").textContent = text;
  clearTimeout(hiding);
  hiding = setTimeout(() => (byId("status").textContent = ""), 1000 * SECONDS_SHOWN);
}

let queue = start().catch((error) => {
  byId("facts").textContent = error.message;
  if (error.constructor !== Error) throw error;
});
