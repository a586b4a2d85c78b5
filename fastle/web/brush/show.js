/* What the panels share: canvases, the newest request, the frame time, and squares over a canvas. */

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
 * Makes a function of which one call runs at a time. Of the calls that come meanwhile only the newest runs afterwards:
 * a picture that nobody will see is not computed.
 *
 * @param {function(...): Promise} run
 * @param {function(Error)} failed is told what goes wrong
 */
export function newestOnly(run, failed) {
  let running = false;
  let waiting = null;
  return async (...values) => {
    waiting = values;
    if (running) return;
    running = true;
    try {
      while (waiting) {
        const next = waiting;
        waiting = null;
        await run(...next);
      }
    } catch (error) {
      waiting = null;
      failed(error);
    } finally {
      running = false;
    }
  };
}

const FRAMES = 60;

/** Shows how long the last frames took, from the movement to the picture on its canvas. */
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
 * @param {object} on grid() is [rows, columns]; extent() is the side of the square, in cells; press(place), drag(place)
 *   and release() follow the pointer, and key(event, place) the keyboard. A place is [row, column] of the cell below
 *   the pointer; places may lie outside the grid.
 * @returns {{place: function(): number[], show: function(number[])}}
 */
export function followSquares(stage, { grid, extent, press, drag, release, key }) {
  const canvas = stage.querySelector("canvas");
  const square = stage.querySelector(".square");
  let place = [0, 0];
  let pressed = false;

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
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    pressed = true;
    show(below(event));
    press(place);
  });
  canvas.addEventListener("pointermove", (event) => {
    show(below(event));
    if (pressed) drag(place);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => {
      if (pressed) release();
      pressed = false;
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
