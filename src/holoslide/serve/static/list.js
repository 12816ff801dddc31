// The list of slides: found by text, narrowed by label, prediction, part and state, in any order.

import { add } from "./pane.js";

const byId = (id) => document.getElementById(id);

export class SlideList extends EventTarget {
  constructor(run) {
    super();
    this.run = run;
    this.slides = run.slides.map((slide, number) => ({ ...slide, number, confidence: slide.p ? Math.max(...slide.p) : null }));
    this.rising = true;
    this.current = null;
    this.items = new Map(this.slides.map((slide) => [slide.id, this.item(slide)]));
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
        if (!isIntersecting || target.src) continue;
        target.src = `/api/slides/${encodeURIComponent(target.dataset.id)}/thumbnail.jpg`;
        target.addEventListener("error", () => target.classList.add("missing"));
      }
    }, { root: byId("slides"), rootMargin: "100px" });
    for (const item of this.items.values()) this.seen.observe(item.querySelector("img"));
  }

  mark(slide) {
    const written = slide.review;
    slide.mark.textContent = !written ? "" : written.label && written.label !== slide.label ? `✎ ${written.label}` : "✎";
    slide.mark.title = written ? `${written.reviewer}: ${written.note}` : "";
  }

  reviewed(id, review) {
    const slide = this.slides.find((each) => each.id === id);
    slide.review = review;
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
    byId("slides").replaceChildren(...this.shown.map((slide) => this.items.get(slide.id)));
    this.items.get(this.current)?.scrollIntoView({ block: "nearest" });
    byId("count").textContent = this.shown.length === this.slides.length ? `${this.slides.length} slides` : `${this.shown.length} of ${this.slides.length} slides`;
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

function isIn(slide, state) {
  if (state === "scored") return slide.prediction !== null;
  if (state === "wrong") return isWrong(slide);
  if (state === "right") return slide.prediction !== null && slide.label !== null && !isWrong(slide);
  return (state === "reviewed") === Boolean(slide.review);
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
