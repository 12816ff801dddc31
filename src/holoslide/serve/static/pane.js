// One slide on the stage: the picture, the layer over it, the tissue's outline, scale bar and coordinates.

import { ask } from "./ask.js";
import { DeepZoom } from "./deepzoom.js";

const BAR_PX = 140; // about the longest that a scale bar may get
const UM_AT_ONE = 10; // per pixel at 1x, as scanners count: 0.25 is 40x

export class Pane extends EventTarget {
  constructor(run) {
    super();
    this.run = run;
    this.slide = null; // as /api/slides/<id> tells
    this.layer = null; // its facts, with `image` and `values`
    this.fade = 60;
    this.hidden = false;
    this.outlined = false;
    this.rings = [];
    this.told = {}; // what is wrong, by what it is about
    this.element = document.createElement("div");
    this.element.className = "pane";
    this.canvas = add(this.element, "canvas", "");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("aria-label", "Slide: drag to move, wheel to zoom");
    this.title = add(this.element, "div", "pane-title");
    this.buttons = add(this.element, "div", "zoom");
    for (const [sign, words, act] of [["+", "Zoom in (+)", () => this.zoom.zoom(2)], ["−", "Zoom out (−)", () => this.zoom.zoom(0.5)], ["⤢", "Whole slide (f)", () => this.zoom.fit()]]) {
      const button = add(this.buttons, "button", "", sign);
      button.title = words;
      button.setAttribute("aria-label", words);
      button.addEventListener("click", act);
    }
    this.message = add(this.element, "p", "pane-message");
    this.readout = add(this.element, "div", "readout");
    const bar = add(this.element, "div", "scalebar");
    this.barLabel = add(bar, "span", "");
    this.power = add(bar, "small", "");
    this.bar = add(bar, "i", "");
    bar.hidden = true; // until there is a picture
    this.zoom = new DeepZoom(this.canvas, run.tile_px);
    this.zoom.overlays.push((context) => this.drawLayer(context), (context) => this.drawOutline(context));
    this.zoom.addEventListener("view", () => {
      this.drawBar();
      this.dispatchEvent(new Event("view"));
    });
    this.zoom.addEventListener("point", (event) => this.showPoint(event.detail));
    this.zoom.addEventListener("fault", (event) => this.say("tiles", event.detail));
    this.element.addEventListener("pointerdown", () => this.dispatchEvent(new Event("chosen")), true);
  }

  // The server refuses what is asked of another run than the one that it serves by now.
  url(rest = "", id = this.slide.id) {
    return `/api/slides/${encodeURIComponent(id)}${rest}?run=${this.run.state}`;
  }

  async open(id) {
    this.wantedSlide = id;
    this.canvas.dataset.ready = "no";
    let slide;
    try {
      slide = await (await ask(this.url("", id))).json();
    } catch (error) {
      if (this.wantedSlide === id) this.say("slide", error.message);
      return false;
    }
    if (this.wantedSlide !== id) return false; // another was chosen meanwhile
    this.slide = slide;
    this.layer = null;
    this.rings = [];
    this.told = {};
    this.say("slide", slide.error);
    this.zoom.open(slide.picture, (key) => this.url(`/tiles/${key}.jpg`));
    this.drawBar();
    if (this.outlined) this.setOutline(true);
    return true;
  }

  close() {
    this.wantedSlide = null; // what is on its way is not wanted any more
    this.element.remove();
    this.zoom.open(null, null);
  }

  say(about, text) {
    this.told[about] = text;
    this.message.textContent = Object.values(this.told).filter(Boolean).join("\n");
  }

  // --- The view, in level-0 pixels and um per screen pixel: the same for every screen -------------------------------

  get place() {
    const picture = this.slide?.picture;
    if (!picture) return null;
    const [perY, perX] = picture.px_per_l0;
    const { x, y, scale } = this.zoom.view;
    return { x: x / perX, y: y / perY, mpp: picture.mpp / scale };
  }

  set place({ x, y, mpp }) {
    const picture = this.slide?.picture;
    if (!picture || ![x, y, mpp].every(Number.isFinite) || mpp <= 0) return;
    const [perY, perX] = picture.px_per_l0;
    this.zoom.show({ x: x * perX, y: y * perY, scale: picture.mpp / mpp }, { quiet: true });
    this.drawBar();
  }

  drawBar() {
    const picture = this.slide?.picture;
    this.bar.parentElement.hidden = !picture;
    if (!picture) return;
    const umPerPx = picture.mpp / this.zoom.view.scale;
    const most = BAR_PX * umPerPx;
    const power = 10 ** Math.floor(Math.log10(most));
    const um = [5, 2, 1].map((n) => n * power).find((n) => n <= most) ?? power;
    this.bar.style.width = `${um / umPerPx}px`;
    this.barLabel.textContent = um >= 1000 ? `${um / 1000} mm` : `${um} µm`;
    this.power.textContent = `${Number((UM_AT_ONE / umPerPx).toPrecision(2))}×`;
  }

  showPoint(point) {
    if (!point) {
      this.readout.textContent = "";
      return;
    }
    const [perY, perX] = this.slide.picture.px_per_l0;
    const at = { x: point.x / perX, y: point.y / perY };
    const um = (value) => `${(value * this.slide.picture.mpp / 1000).toFixed(3)}`;
    const value = this.valueAt(at);
    const shown = value === null ? "" : `   ${inWords(value, this.layer, this.run)}`;
    this.readout.textContent = `x ${Math.floor(at.x)}  y ${Math.floor(at.y)} px   (${um(point.x)}, ${um(point.y)} mm)${shown}`;
  }

  // --- Layers ------------------------------------------------------------------------------------------------------

  async setLayer(name) {
    this.wantedLayer = name;
    const facts = this.slide?.layers.find((layer) => layer.name === name);
    if (!facts) {
      this.layer = null;
      this.zoom.draw();
      this.dispatchEvent(new Event("layer"));
      return;
    }
    let got;
    try {
      got = await Promise.all([
        ask(this.url(`/layers/${facts.name}.png`)).then((answer) => answer.blob()).then(createImageBitmap),
        ask(this.url(`/layers/${facts.name}.f32`)).then((answer) => answer.arrayBuffer()),
      ]);
    } catch (error) {
      if (this.wantedLayer === name) this.say("layer", error.message);
      return;
    }
    if (this.wantedLayer !== name || !this.slide.layers.includes(facts)) return;
    this.say("layer", "");
    const [picture, raw] = got;
    this.layer = { ...facts, picture, values: new Float32Array(raw) };
    this.hidden = false;
    this.zoom.draw();
    this.dispatchEvent(new Event("layer"));
  }

  setFade(percent) {
    this.fade = percent;
    this.zoom.draw();
  }

  drawLayer(context) {
    const shown = this.layer && !this.hidden;
    this.title.textContent = [this.slide.id, shown && this.slide.run, shown && this.layer.title].filter(Boolean).join(" · ");
    this.canvas.dataset.layer = this.layer && !this.hidden ? this.layer.name : "";
    if (!this.layer || this.hidden || this.fade === 0) return;
    const [top, left, bottom, right] = this.layer.box_l0;
    const from = this.onScreen(left, top);
    const to = this.onScreen(right, bottom);
    context.save();
    context.imageSmoothingEnabled = false; // a cell is a square, not a cloud
    context.globalAlpha = this.fade / 100;
    context.drawImage(this.layer.picture, from.x, from.y, to.x - from.x, to.y - from.y);
    context.restore();
  }

  valueAt({ x, y }) {
    if (!this.layer || this.hidden) return null;
    const [top, left, bottom, right] = this.layer.box_l0;
    const row = Math.floor(((y - top) / (bottom - top)) * this.layer.rows);
    const column = Math.floor(((x - left) / (right - left)) * this.layer.columns);
    if (row < 0 || column < 0 || row >= this.layer.rows || column >= this.layer.columns) return null;
    const value = this.layer.values[row * this.layer.columns + column];
    return Number.isFinite(value) ? value : null;
  }

  // --- Tissue ------------------------------------------------------------------------------------------------------

  async setOutline(on) {
    this.outlined = on;
    const { slide } = this;
    if (on && slide && !this.rings.length) {
      try {
        const pieces = await (await ask(this.url("/outline"))).json();
        if (this.slide === slide) this.rings = pieces.flat();
      } catch (error) {
        if (this.slide === slide) this.say("outline", error.message);
      }
    }
    this.zoom.draw();
  }

  drawOutline(context) {
    if (!this.outlined || !this.slide?.picture) return;
    const path = new Path2D();
    for (const ring of this.rings) {
      ring.forEach(([x, y], number) => {
        const at = this.onScreen(x, y);
        if (number) path.lineTo(at.x, at.y);
        else path.moveTo(at.x, at.y);
      });
      path.closePath();
    }
    context.lineJoin = "round";
    for (const [colour, width] of [["rgba(0, 0, 0, 0.55)", 3.5], ["#ffd166", 1.6]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.stroke(path);
    }
  }

  onScreen(x, y) {
    const [perY, perX] = this.slide.picture.px_per_l0;
    return this.zoom.toScreen({ x: x * perX, y: y * perY });
  }
}

// The class that a layer speaks for; none of the attention.
export function classOf(layer, run) {
  return layer.name.startsWith("attention") ? null : run.classes[Number(layer.name.split("-").at(-1))];
}

function inWords(value, layer, run) {
  const name = classOf(layer, run);
  const number = value.toPrecision(3).replace("-", "−");
  return name === null ? `attention ${number} × average` : `evidence for ${name} above others ${number}`;
}

export function add(parent, tag, className, text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text; // never as HTML: names and notes come from others
  parent.append(element);
  return element;
}
