/* What the panels share: canvases, live images, the frame time, and squares over a canvas. */

/** Puts an image of the model onto a canvas, pixel by pixel. */
export function showImage(canvas, pixels, { size, channels }) {
  const rgba = new Uint8ClampedArray(4 * size * size).fill(255);
  for (let p = 0; p < size * size; p++) {
    for (let c = 0; c < 3; c++) rgba[4 * p + c] = pixels[channels * p + (channels === 3 ? c : 0)];
  }
  showPicture(canvas, new ImageData(rgba, size, size));
}

/** Puts an ImageData onto a canvas of its size. */
export function showPicture(canvas, picture) {
  if (canvas.width !== picture.width || canvas.height !== picture.height) {
    canvas.width = picture.width;
    canvas.height = picture.height;
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

/**
 * Makes a function that shows on a canvas what the model makes of an input. One computation runs at a time. Of the inputs
 * that come meanwhile only the newest is computed afterwards: nobody will see the pictures of the others.
 *
 * @param {object} page
 * @param {HTMLCanvasElement} canvas
 * @param {function(Array): Promise<Uint8Array[]>} compute is one of the backend's
 * @returns {function(*, number=): Promise} an input, and the time of the event that asks for it, if a frame is measured
 */
export function liveImage(page, canvas, compute) {
  let running = false;
  let waiting = null;
  return async (input, since) => {
    waiting = { input, since };
    if (running) return;
    running = true;
    canvas.setAttribute("aria-busy", "true");
    try {
      while (waiting) {
        const next = waiting;
        waiting = null;
        const [pixels] = await compute([next.input]);
        showImage(canvas, pixels, page.facts);
        if (next.since !== undefined) page.frames.add(performance.now() - next.since);
      }
    } catch (error) {
      waiting = null;
      page.failed(error);
    } finally {
      running = false;
      canvas.removeAttribute("aria-busy");
    }
  };
}

const FRAMES = 60;

/** Shows how long the last frames took, from the time of the event that asked for them to the picture on its canvas. */
export class FrameTime {
  #frames = [];

  constructor(output) {
    this.output = output;
  }

  add(milliseconds) {
    this.#frames = [...this.#frames, milliseconds].slice(-FRAMES);
    const sorted = [...this.#frames].sort((a, b) => a - b);
    const [median, slowest] = [sorted[sorted.length >> 1], sorted.at(-1)];
    this.output.textContent =
      `Frame time ${median.toFixed(0)} ms (median of ${sorted.length}, slowest ${slowest.toFixed(0)} ms)`;
  }
}

/**
 * Lets pointer and keyboard move over the squares of a canvas.
 *
 * @param {HTMLElement} stage holds a canvas, and an element of the class "square" that shows the place
 * @param {object} on grid() is [rows, columns]; extent() is the side of the square, in cells; press(place, since),
 *   drag(place, since) and release() follow the pointer since the time of its event, and key(event, place) the
 *   keyboard. A place is [row, column] of the cell below
 *   the pointer; places may lie outside the grid.
 * @returns {{place: function(): number[], show: function(number[])}}
 */
export function followSquares(stage, { grid, extent, press, drag, release, key }) {
  const canvas = stage.querySelector("canvas");
  const square = stage.querySelector(".square");
  let place = [0, 0];
  // the pointer that is pressed: a second finger does nothing
  let pressed = null;

  const show = (next) => {
    place = next;
    const [rows, columns] = grid();
    const before = Math.floor((extent() - 1) / 2);
    const style = { top: place[0] - before, left: place[1] - before, width: extent(), height: extent() };
    for (const [name, value] of Object.entries(style)) {
      square.style[name] = `${(100 * value) / (name === "top" || name === "height" ? rows : columns)}%`;
    }
  };
  const below = (event) => {
    const box = canvas.getBoundingClientRect();
    const [rows, columns] = grid();
    return [
      Math.floor(((event.clientY - box.top) / box.height) * rows),
      Math.floor(((event.clientX - box.left) / box.width) * columns),
    ];
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || pressed !== null) return;
    canvas.setPointerCapture(event.pointerId);
    pressed = event.pointerId;
    show(below(event));
    press(place, event.timeStamp);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (pressed !== null && pressed !== event.pointerId) return;
    show(below(event));
    if (pressed !== null) drag(place, event.timeStamp);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => {
      if (pressed !== event.pointerId) return;
      pressed = null;
      release();
    });
  }
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      const last = grid();
      show(place.map((at, axis) => Math.min(last[axis] - 1, Math.max(0, at + step[axis]))));
      event.preventDefault();
    }
    key(event, place);
  });
  return { place: () => place, show };
}
