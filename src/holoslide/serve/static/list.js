// The list of slides: found by text, narrowed by label, prediction, part and state, in any order.

import { LONGEST_RETRY_MS, RETRY_MS } from "./deepzoom.js";
import { add } from "./pane.js";
import { labelsOf, latest } from "./review.js";

const byId = (id) => document.getElementById(id);

export class SlideList extends EventTarget {
  constructor(run) {
    super();
    this.run = run;
    this.slides = run.slides.map((slide, number) => ({ ...slide, number, confidence: slide.p ? Math.max(...slide.p) : null }));
    this.rising = true;
    this.current = null;
    this.items = new Map(this.slides.map((slide) => [slide.id, this.item(slide)]));
    this.leftOut = run.left_out.map((slide) => ({ ...slide, item: leftOutItem(slide) }));
    choices(byId("by-label"), "any label", this.slides.map((slide) => slide.label));
    choices(byId("by-prediction"), "any prediction", this.slides.map((slide) => slide.prediction));
    choices(byId("by-split"), "any part", this.slides.map((slide) => slide.split));
    byId("search").addEventListener("input", () => this.draw());
    for (const id of ["by-label", "by-prediction", "by-split", "by-state", "sort"]) byId(id).addEventListener("change", () => this.draw());
    byId("direction").addEventListener("click", () => {
      this.rising = !this.rising;
      byId("direction").textContent = this.rising ? "↑" : "↓";
      this.draw();
    });
    this.draw();
  }

  item(slide) {
    const item = document.createElement("li");
    const button = add(item, "button", "slide");
    const picture = add(button, "img", "thumb");
    picture.alt = "";
    picture.loading = "lazy";
    picture.dataset.id = slide.id;
    const words = add(button, "span", "words");
    const first = add(words, "span", "first");
    add(first, "b", "", slide.id);
    slide.mark = add(first, "span", "mark");
    const second = add(words, "span", "second");
    add(second, "span", "", slide.label ?? "no label");
    if (slide.prediction !== null) {
      add(second, "span", "arrow", "→");
      add(second, "span", isWrong(slide) ? "wrong" : "", slide.prediction + (isWrong(slide) ? " ✕" : ""));
      const bar = add(words, "span", "bar");
      add(bar, "i", "").style.width = `${100 * slide.confidence}%`;
      add(second, "span", "confidence", percent(slide.confidence));
    } else {
      add(second, "span", "quiet", "· not scored");
    }
    this.mark(slide);
    button.addEventListener("click", () => this.dispatchEvent(new CustomEvent("choose", { detail: slide.id })));
    return item;
  }

  // The thumbnail is the top of the slide's pyramid; it is asked for when it comes into sight.
  thumbnails() {
    this.seen ??= new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting && !target.src) this.show(target);
      }
    }, { root: byId("slides"), rootMargin: "100px" });
    for (const item of this.items.values()) this.seen.observe(item.querySelector("img"));
  }

  show(picture) {
    let pause = RETRY_MS;
    const address = `/api/slides/${encodeURIComponent(picture.dataset.id)}/thumbnail.jpg?run=${this.run.state}`;
    picture.addEventListener("load", () => picture.classList.remove("missing"));
    picture.addEventListener("error", () => {
      picture.classList.add("missing");
      setTimeout(() => (picture.src = address), pause);
      pause = Math.min(LONGEST_RETRY_MS, 2 * pause);
    });
    picture.src = address;
  }

  mark(slide) {
    const labels = labelsOf(slide.reviews);
    const words = isDisputed(slide) || isCorrected(slide) ? ` ${labels.join(" / ")}` : "";
    slide.mark.textContent = slide.reviews.length ? `${isDisputed(slide) ? "≠" : "✎"}${words}` : "";
    slide.mark.classList.toggle("wrong", isDisputed(slide));
    slide.mark.title = slide.reviews.map(({ reviewer, label, note }) => `${reviewer}: ${[label, note].filter(Boolean).join("; ")}`).join("\n");
  }

  reviewed(id, review) {
    const slide = this.slides.find((each) => each.id === id);
    slide.reviews = latest([...slide.reviews, review]);
    this.mark(slide);
    this.draw();
  }

  draw() {
    const words = byId("search").value.trim().toLowerCase();
    const [label, prediction, split] = ["by-label", "by-prediction", "by-split"].map((id) => byId(id).value);
    const state = byId("by-state").value;
    this.shown = this.slides.filter((slide) =>
      (!words || slide.id.toLowerCase().includes(words) || slide.patient.toLowerCase().includes(words)) &&
      (!label || slide.label === label) &&
      (!prediction || slide.prediction === prediction) &&
      (!split || slide.split === split) &&
      (!state || isIn(slide, state)));
    const key = byId("sort").value;
    this.shown.sort((a, b) => order(a, b, key, this.rising ? 1 : -1));
    const narrowed = label || prediction || split || (state && state !== "left-out");
    const gone = narrowed ? [] : this.leftOut.filter((slide) => !words || slide.id.toLowerCase().includes(words));
    byId("slides").replaceChildren(...this.shown.map((slide) => this.items.get(slide.id)), ...gone.map((slide) => slide.item));
    this.items.get(this.current)?.scrollIntoView({ block: "nearest" });
    const count = this.shown.length === this.slides.length ? `${this.slides.length} slides` : `${this.shown.length} of ${this.slides.length} slides`;
    byId("count").textContent = gone.length ? `${count}, ${gone.length} left out` : count;
  }

  select(id) {
    this.current = id;
    for (const [each, item] of this.items) item.firstChild.toggleAttribute("aria-current", each === id);
    this.items.get(id)?.scrollIntoView({ block: "nearest" });
  }

  next(step) {
    const at = this.shown.findIndex((slide) => slide.id === this.current);
    const slide = this.shown[at < 0 ? 0 : at + step];
    if (slide) this.dispatchEvent(new CustomEvent("choose", { detail: slide.id }));
  }
}

function isWrong(slide) {
  return slide.prediction !== null && slide.label !== null && slide.prediction !== slide.label;
}

function isDisputed(slide) {
  return labelsOf(slide.reviews).length > 1;
}

function isCorrected(slide) {
  const labels = labelsOf(slide.reviews);
  return labels.length === 1 && labels[0] !== slide.label;
}

// Greyed, and not to be opened: training had no use for it.
function leftOutItem({ id, reason }) {
  const item = document.createElement("li");
  item.className = "left-out";
  add(item, "b", "", id);
  add(item, "span", "", `left out: ${reason}`);
  return item;
}

function isIn(slide, state) {
  if (state === "left-out") return false;
  if (state === "corrected") return isCorrected(slide);
  if (state === "disputed") return isDisputed(slide);
  if (state === "scored") return slide.prediction !== null;
  if (state === "wrong") return isWrong(slide);
  if (state === "right") return slide.prediction !== null && slide.label !== null && !isWrong(slide);
  return (state === "reviewed") === slide.reviews.length > 0;
}

// What is not known comes last, whichever way the order goes.
function order(a, b, key, way) {
  const inTable = way * (a.number - b.number);
  if (key === "table") return inTable;
  const [one, other] = [a[key], b[key]];
  if (one === null || other === null) return (one === null) - (other === null) || inTable;
  const difference = typeof one === "number" ? one - other : one.localeCompare(other, undefined, { numeric: true });
  return way * difference || inTable;
}

// Never 1.000 or 0.000: a network is never that sure.
export function probability(p) {
  if (p >= 0.9995) return "> 0.999";
  return p < 0.0005 ? "< 0.001" : p.toFixed(3);
}

function percent(p) {
  return p >= 0.995 ? "> 99 %" : `${Math.round(100 * p)} %`;
}

export function choices(select, all, values) {
  select.replaceChildren(new Option(all, ""));
  for (const value of [...new Set(values.filter((each) => each !== null))].sort()) select.append(new Option(value, value));
}
