"use strict";

const { runs, grids } = JSON.parse(document.getElementById("data").textContent);
const [WIDTH, HEIGHT] = [460, 200];
const PLOT = { left: 48, right: WIDTH - 8, top: 8, bottom: HEIGHT - 22 };
const hidden = new Set();

function svg(name, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

const colour = (run) => `var(--run${run % 8})`;

/* a scale maps values to pixels, and has ticks */
function scale(values, from, to, logarithmic) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (logarithmic) {
    const map = scale([Math.log10(low), Math.log10(high)], from, to, false);
    const decades = [];
    for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k++) {
      decades.push(10 ** k, 2 * 10 ** k, 5 * 10 ** k);
    }
    const inside = decades.filter((tick) => tick >= low && tick <= high);
    // across many decades, only their beginnings have room
    const ticks = inside.length > 6 ? inside.filter((tick) => Number.isInteger(Math.log10(tick))) : inside;
    return Object.assign((value) => map(Math.log10(value)), { ticks: ticks.length ? ticks : [low, high] });
  }
  // a constant is a line in the middle, but a share of 0 is no reason to show less than 0
  if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 2, low + Math.abs(low) / 2];
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(k * step);
  return Object.assign((value) => from + ((value - low) / (high - low)) * (to - from), { ticks });
}

const format = (value) =>
  value === 0 ? "0" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));

function makeChart(figure) {
  const { metric, scale: kind } = figure.dataset;
  const title = figure.querySelector("figcaption").textContent;
  const output = document.createElement("output");
  figure.querySelector("figcaption").append(output);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0 }, figure);
  let points = [];
  let x, y, cross;

  function render() {
    picture.replaceChildren();
    output.textContent = "";
    points = runs.map(({ curves }, run) =>
      hidden.has(run) || !curves[metric]
        ? []
        : curves.step
            .map((step, i) => [step, curves[metric][i]])
            .filter(([, value]) => value !== null && (kind !== "log" || value > 0)),
    );
    const all = points.flat();
    if (!all.length) return;
    x = scale(all.map(([step]) => step), PLOT.left, PLOT.right, false);
    y = scale(all.map(([, value]) => value), PLOT.bottom, PLOT.top, kind === "log");
    for (const tick of y.ticks) {
      svg("line", { class: "rule", x1: PLOT.left, x2: PLOT.right, y1: y(tick), y2: y(tick) }, picture);
      svg("text", { x: PLOT.left - 6, y: y(tick) + 4, "text-anchor": "end" }, picture).textContent = format(tick);
    }
    for (const tick of x.ticks) {
      svg("text", { x: x(tick), y: HEIGHT - 6, "text-anchor": "middle" }, picture).textContent = format(tick);
    }
    points.forEach((line, run) => {
      const d = line.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("L");
      if (line.length > 1) svg("path", { d: `M${d}`, stroke: colour(run) }, picture);
      else if (line.length) svg("circle", { cx: x(line[0][0]), cy: y(line[0][1]), r: 3, fill: colour(run) }, picture);
    });
    cross = svg("g", { visibility: "hidden" }, picture);
    const ends = points.flatMap((line, run) => (line.length ? `${format(line.at(-1)[1])} at the end of ${runs[run].name}` : []));
    picture.setAttribute("aria-label", `${title}: ${ends.join(", ")}. The arrow keys go through the steps.`);
  }

  /* the values at the step nearest to a place between 0 and 1 */
  function point(share) {
    const all = points.flat();
    if (!all.length) return;
    const at = PLOT.left + share * (PLOT.right - PLOT.left);
    const nearest = (line) => line.reduce((best, p) => (Math.abs(x(p[0]) - at) < Math.abs(x(best[0]) - at) ? p : best));
    const step = nearest(all)[0];
    cross.replaceChildren();
    cross.setAttribute("visibility", "visible");
    svg("line", { class: "cross", x1: x(step), x2: x(step), y1: PLOT.top, y2: PLOT.bottom }, cross);
    const values = [];
    points.forEach((line, run) => {
      if (!line.length) return;
      const [own, value] = nearest(line);
      svg("circle", { cx: x(own), cy: y(value), r: 3.5, fill: colour(run) }, cross);
      values.push(format(value));
    });
    output.textContent = `step ${format(step)}: ${values.join(" · ")}`;
  }

  const leave = () => {
    cross?.setAttribute("visibility", "hidden");
    output.textContent = "";
  };
  let share = 1;
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    share = Math.min(1, Math.max(0, (at - PLOT.left) / (PLOT.right - PLOT.left)));
    point(share);
  });
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("blur", leave);
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
    if (!move) return;
    event.preventDefault();
    share = Math.min(1, Math.max(0, share + move));
    point(share);
  });
  render();
  return render;
}

const charts = [...document.querySelectorAll(".chart")].map(makeChart);

/* which runs the curves show */
if (runs.length > 1) {
  const legend = document.createElement("div");
  legend.className = "legend";
  runs.forEach(({ name }, run) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
    const line = document.createElement("i");
    line.style.background = colour(run);
    input.addEventListener("change", () => {
      if (input.checked) hidden.delete(run);
      else hidden.add(run);
      for (const render of charts) render();
    });
    label.append(input, line, name);
    legend.append(label);
  });
  document.querySelector(".charts").before(legend);
}

/* grids: a row of images is one picture */
for (const article of document.querySelectorAll(".grid")) {
  const { pictures, frames } = grids[article.dataset.run];
  const rows = article.querySelector(".rows");
  const slider = article.querySelector("input");
  const shown = [
    ["Input", "input"],
    ["Reconstruction", "reconstruction"],
    ["Difference", "input", "reconstruction"],
    ["Input with hole", "masked input"],
    ["Its reconstruction", "its reconstruction"],
    ["Difference from input", "input", "its reconstruction"],
  ].filter(([, ...names]) => names.every((name) => name in frames.at(-1).rows));
  const images = shown.map(([title, ...names]) => {
    const label = Object.assign(document.createElement("span"), { textContent: title });
    const row = Object.assign(document.createElement("div"), { className: "row" });
    if (names.length > 1) row.classList.add("difference");
    const made = names.map((name, i) => {
      const image = document.createElement("img");
      row.append(image);
      // of two pictures that make a difference, the first one speaks for both
      return { image, name, alt: i ? "" : title };
    });
    rows.append(label, row);
    return made;
  });
  const show = () => {
    const { step, rows: numbers } = frames[slider.value];
    for (const { image, name, alt } of images.flat()) {
      image.src = pictures[numbers[name]];
      image.alt = alt && `${alt}, a row of images at step ${format(step)}`;
    }
    article.querySelector("output").textContent = format(step);
  };
  Object.assign(slider, { min: 0, max: frames.length - 1, step: 1 });
  slider.value = frames.length - 1;
  slider.addEventListener("input", show);
  show();
}
