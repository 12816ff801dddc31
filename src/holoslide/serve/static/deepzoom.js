// A picture of any size on a canvas: tiles are fetched where they are seen, at the level that fits the screen.
//
// Frames: "picture" is pixels of the slide's finest level, "screen" is CSS pixels of the canvas. The view is the
// picture point in the canvas's middle, and the scale, screen pixels per picture pixel.

import { ask } from "./ask.js";

const FETCHES = 8; // at once
const KEPT_TILES = 400;
export const RETRY_MS = 2000; // after a first failure; then twice as long each time
export const LONGEST_RETRY_MS = 60_000;
const ZOOM_MS = 140;
const MAX_SCALE = 4;
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");

export class DeepZoom extends EventTarget {
  constructor(canvas, tilePx) {
    super();
    this.canvas = canvas;
    this.tilePx = tilePx;
    this.picture = null;
    this.view = { x: 0, y: 0, scale: 1 };
    this.overlays = []; // functions of (context, viewer), drawn over the picture
    this.tiles = new Map(); // "z/y/x" -> ImageBitmap, the least recently used first
    this.loading = new Map(); // "z/y/x" -> AbortController
    this.failed = new Map(); // "z/y/x" -> { why, pause, until }
    this.fault = ""; // why a tile in sight is not there
    this.wanted = [];
    this.pointers = new Map();
    this.zooming = null;
    this.frame = 0;
    new ResizeObserver(() => this.resize()).observe(canvas);
    this.listen();
  }

  // --- What is shown -----------------------------------------------------------------------------------------------

  open(picture, urlOf) {
    for (const controller of this.loading.values()) controller.abort();
    for (const bitmap of this.tiles.values()) bitmap.close();
    this.tiles.clear();
    this.loading.clear();
    this.failed.clear();
    this.fault = "";
    this.zooming = null;
    this.picture = picture;
    this.urlOf = urlOf;
    this.resize();
    this.fit({ quiet: true });
  }

  get size() {
    return { width: this.canvas.clientWidth || 1, height: this.canvas.clientHeight || 1 };
  }

  fitScale() {
    const { width, height } = this.size;
    return 0.94 * Math.min(width / this.picture.width, height / this.picture.height);
  }

  fit(how = {}) {
    if (!this.picture) return;
    this.show({ x: this.picture.width / 2, y: this.picture.height / 2, scale: this.fitScale() }, how);
  }

  show(view, { quiet = false } = {}) {
    if (!this.picture) return;
    const least = Math.min(this.fitScale() / 2, MAX_SCALE);
    this.view = {
      x: clamp(view.x, 0, this.picture.width),
      y: clamp(view.y, 0, this.picture.height),
      scale: clamp(view.scale, least, MAX_SCALE),
    };
    this.draw();
    if (!quiet) this.dispatchEvent(new Event("view"));
  }

  toPicture(screen) {
    const { width, height } = this.size;
    const { x, y, scale } = this.view;
    return { x: x + (screen.x - width / 2) / scale, y: y + (screen.y - height / 2) / scale };
  }

  toScreen(point) {
    const { width, height } = this.size;
    const { x, y, scale } = this.view;
    return { x: (point.x - x) * scale + width / 2, y: (point.y - y) * scale + height / 2 };
  }

  pan(dx, dy) {
    this.zooming = null;
    this.show({ ...this.view, x: this.view.x - dx / this.view.scale, y: this.view.y - dy / this.view.scale });
  }

  // Zoom so that what lies under a screen point stays there.
  zoom(factor, at = null, { smooth = true } = {}) {
    if (!this.picture) return;
    const screen = at ?? { x: this.size.width / 2, y: this.size.height / 2 };
    const before = this.zooming?.to ?? this.view.scale;
    const to = clamp(before * factor, Math.min(this.fitScale() / 2, MAX_SCALE), MAX_SCALE);
    const step = { screen, point: this.toPicture(screen), from: this.view.scale, to, since: performance.now() };
    if (!smooth || calm.matches) return this.holdAt(step, to);
    this.zooming = step;
    this.draw();
  }

  holdAt({ screen, point }, scale) {
    const { width, height } = this.size;
    this.show({ x: point.x - (screen.x - width / 2) / scale, y: point.y - (screen.y - height / 2) / scale, scale });
  }

  // --- Drawing -----------------------------------------------------------------------------------------------------

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const { width, height } = this.size;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.draw();
  }

  draw() {
    if (!this.frame) this.frame = requestAnimationFrame((now) => this.render(now));
  }

  render(now) {
    this.frame = 0;
    if (this.zooming) {
      const { from, to, since } = this.zooming;
      const done = Math.min(1, Math.max(0, (now - since) / ZOOM_MS));
      const step = this.zooming;
      if (done >= 1) this.zooming = null;
      this.holdAt(step, from * (to / from) ** (1 - (1 - done) ** 2));
      if (this.zooming) this.draw();
    }
    const context = this.canvas.getContext("2d");
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.size.width, this.size.height);
    if (!this.picture) return;
    this.drawTiles(context, ratio);
    for (const overlay of this.overlays) overlay(context, this);
    this.fetchWanted();
    this.canvas.dataset.ready = this.wanted.length ? "no" : "yes";
  }

  level(ratio) {
    const fitting = Math.floor(Math.log2(1 / (this.view.scale * ratio)) + 0.35);
    return clamp(fitting, 0, this.picture.levels - 1);
  }

  drawTiles(context, ratio) {
    const top = `${this.picture.levels - 1}/0/0`;
    const z = this.level(ratio);
    const side = this.tilePx * 2 ** z; // of a tile, in picture pixels
    const { width, height } = this.size;
    const first = this.toPicture({ x: 0, y: 0 });
    const last = this.toPicture({ x: width, y: height });
    const rows = [Math.max(0, Math.floor(first.y / side)), Math.min(Math.ceil(this.picture.height / side), Math.ceil(last.y / side))];
    const columns = [Math.max(0, Math.floor(first.x / side)), Math.min(Math.ceil(this.picture.width / side), Math.ceil(last.x / side))];
    this.wanted = this.tiles.has(top) || this.isFailed(top) ? [] : [{ key: top, distance: -1 }];
    let fault = this.failed.get(top)?.why ?? "";
    context.imageSmoothingEnabled = this.view.scale * ratio < 2;
    context.imageSmoothingQuality = "high";
    for (let y = rows[0]; y < rows[1]; y++) {
      for (let x = columns[0]; x < columns[1]; x++) {
        const key = `${z}/${y}/${x}`;
        this.drawTile(context, z, y, x, side);
        fault ||= this.failed.get(key)?.why ?? "";
        if (this.tiles.has(key) || this.isFailed(key) || key === top) continue;
        const distance = Math.hypot((x + 0.5) * side - this.view.x, (y + 0.5) * side - this.view.y);
        this.wanted.push({ key, distance });
      }
    }
    this.wanted.sort((a, b) => a.distance - b.distance);
    this.tellFault(fault);
  }

  tellFault(fault) {
    if (fault === this.fault) return;
    this.fault = fault;
    this.dispatchEvent(new CustomEvent("fault", { detail: fault }));
  }

  // The tile, or as long as it is not there, its part of the nearest coarser one that is.
  drawTile(context, z, y, x, side) {
    for (let up = 0; z + up < this.picture.levels; up++) {
      const key = `${z + up}/${y >> up}/${x >> up}`;
      const bitmap = this.tiles.get(key);
      if (!bitmap) continue;
      this.tiles.delete(key); // now the most recently used
      this.tiles.set(key, bitmap);
      const part = this.tilePx / 2 ** up;
      const sx = (x - ((x >> up) << up)) * part;
      const sy = (y - ((y >> up) << up)) * part;
      const sw = Math.min(part, bitmap.width - sx);
      const sh = Math.min(part, bitmap.height - sy);
      if (sw <= 0 || sh <= 0) return;
      const from = this.toScreen({ x: x * side, y: y * side });
      const to = this.toScreen({ x: x * side + (sw / part) * side, y: y * side + (sh / part) * side });
      // Whole device pixels, so that neighbours leave no seam.
      const ratio = window.devicePixelRatio || 1;
      const snap = (value) => Math.round(value * ratio) / ratio;
      const [left, upper] = [snap(from.x), snap(from.y)];
      context.drawImage(bitmap, sx, sy, sw, sh, left, upper, snap(to.x) - left, snap(to.y) - upper);
      return;
    }
  }

  // --- Tiles -------------------------------------------------------------------------------------------------------

  isFailed(key) {
    return performance.now() < (this.failed.get(key)?.until ?? -Infinity);
  }

  fetchWanted() {
    const keys = new Set(this.wanted.map((tile) => tile.key));
    for (const [key, controller] of this.loading) if (!keys.has(key)) controller.abort();
    for (const { key } of this.wanted) {
      if (this.loading.size >= FETCHES) return;
      if (!this.loading.has(key)) this.fetchTile(key);
    }
  }

  async fetchTile(key) {
    const controller = new AbortController();
    this.loading.set(key, controller);
    try {
      const answer = await ask(this.urlOf(key), { signal: controller.signal });
      const bitmap = await createImageBitmap(await answer.blob());
      if (controller.signal.aborted) return bitmap.close();
      this.tiles.set(key, bitmap);
      this.failed.delete(key);
      while (this.tiles.size > KEPT_TILES) this.forget();
    } catch (error) {
      if (!controller.signal.aborted) this.fail(key, error.message);
    } finally {
      if (this.loading.get(key) === controller) this.loading.delete(key);
      this.draw();
    }
  }

  fail(key, why) {
    const pause = Math.min(LONGEST_RETRY_MS, 2 * (this.failed.get(key)?.pause ?? RETRY_MS / 2));
    this.failed.set(key, { why, pause, until: performance.now() + pause });
    setTimeout(() => this.draw(), pause + 1);
  }

  forget() {
    const top = `${this.picture.levels - 1}/0/0`;
    const [key] = [...this.tiles.keys()].filter((each) => each !== top);
    this.tiles.get(key).close();
    this.tiles.delete(key);
  }

  // --- Hands -------------------------------------------------------------------------------------------------------

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, this.place(event));
    });
    canvas.addEventListener("pointermove", (event) => this.moved(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("dblclick", (event) => this.zoom(event.shiftKey ? 0.5 : 2, this.place(event)));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? 400 : 1;
      const strength = event.ctrlKey ? 0.01 : 0.002; // a trackpad's pinch comes as small steps with ctrl
      this.zoom(Math.exp(-clamp(event.deltaY * lines, -400, 400) * strength), this.place(event));
    }, { passive: false });
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  moved(event) {
    const now = this.place(event);
    const before = this.pointers.get(event.pointerId);
    if (!before) return this.point(now);
    const others = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    this.pointers.set(event.pointerId, now);
    if (!others.length) return this.pan(now.x - before.x, now.y - before.y);
    const [other] = others;
    const factor = Math.hypot(now.x - other.x, now.y - other.y) / Math.max(1, Math.hypot(before.x - other.x, before.y - other.y));
    this.zoom(factor, { x: (before.x + other.x) / 2, y: (before.y + other.y) / 2 }, { smooth: false });
    this.pan((now.x - before.x) / 2, (now.y - before.y) / 2);
  }

  point(screen) {
    const detail = screen && this.picture ? this.toPicture(screen) : null;
    this.dispatchEvent(new CustomEvent("point", { detail }));
  }
}

export function clamp(value, low, high) {
  return Math.min(high, Math.max(low, value));
}
