// The page: a list of slides, one or two panes, and what is laid over them. The address says it all (see `address`).

import { ask } from "./ask.js";
import { Pane, add, classOf } from "./pane.js";
import { SlideList, probability } from "./list.js";
import { ReviewForm } from "./review.js";

const byId = (id) => document.getElementById(id);
let run;
let list;
let review;
let panes = [];
let active;
let told = ""; // the address as this page last wrote it, or began to follow it
let writing = 0;
let following = null; // the address that is being followed: what moves meanwhile is not the reviewer's doing

async function start() {
  run = await (await ask("/api/run")).json();
  document.title = `${run.name}: holoslide`;
  byId("run-name").textContent = run.name;
  byId("run-facts").textContent = [`${run.slides.length} slides`, run.classes.join(" / "), run.repeats].filter(Boolean).join(", ");
  list = new SlideList(run);
  list.addEventListener("choose", (event) => {
    choose(event.detail);
    document.body.classList.remove("show-list");
  });
  review = new ReviewForm(run);
  review.addEventListener("saved", (event) => saved(event.detail));
  newPane();
  activate(panes[0]);
  if (!(await follow())) await choose((list.slides.find((slide) => slide.prediction !== null) ?? list.slides[0]).id, { best: true });
  list.thumbnails();
  window.addEventListener("hashchange", () => location.hash.slice(1) !== told && follow());
}

// --- Panes ---------------------------------------------------------------------------------------------------------

function newPane() {
  const pane = new Pane(run);
  byId("stage").append(pane.element);
  pane.addEventListener("chosen", () => activate(pane));
  pane.addEventListener("view", () => moved(pane));
  pane.addEventListener("layer", () => pane === active && showSide());
  panes.push(pane);
  byId("stage").dataset.panes = panes.length;
  return pane;
}

function activate(pane) {
  if (active === pane) return;
  active = pane;
  for (const each of panes) each.element.classList.toggle("active", each === pane);
  if (pane.slide) showSlide();
}

// The other picture goes along, by um, as long as both show one slide or the reviewer wants it.
function moved(pane) {
  if (following) return;
  const other = panes.find((each) => each !== pane);
  if (other?.slide?.picture && byId("together").checked && pane.place) {
    const { mpp } = pane.place;
    const place = other.slide.id === pane.slide.id ? pane.place : along(pane, other);
    other.place = { ...place, mpp };
  }
  if (pane.place) pane.last = pane.place;
  for (const each of panes) each.last = each.place;
  writeAddress();
}

function along(pane, other) {
  const [before, now, there] = [pane.last ?? pane.place, pane.place, other.place];
  const um = (each) => each.slide.picture.px_per_l0.map((px) => each.slide.picture.mpp * px); // of a level-0 pixel
  const [[fromY, fromX], [toY, toX]] = [um(pane), um(other)];
  return { x: there.x + ((now.x - before.x) * fromX) / toX, y: there.y + ((now.y - before.y) * fromY) / toY };
}

async function compare(on) {
  if (on === panes.length > 1) return;
  byId("compare").setAttribute("aria-pressed", on);
  byId("together-row").hidden = !on;
  if (on) await openSecond();
  else closeSecond();
  writeAddress();
}

async function openSecond() {
  const [first, second] = [panes[0], newPane()];
  for (const pane of panes) pane.element.classList.toggle("active", pane === active);
  second.fade = first.fade;
  const id = first.wantedSlide; // which may be on its way
  if (!id || !(await second.open(id))) return; // closed meanwhile, or asked for another slide
  if (first.slide?.id === id) second.place = first.place ?? {};
  for (const pane of panes) pane.last = pane.place;
  second.setOutline(first.outlined);
}

function closeSecond() {
  panes.pop().close();
  byId("stage").dataset.panes = panes.length;
  activate(panes[0]);
}

async function choose(id, { best = false } = {}) {
  const pane = active;
  const before = pane.layer?.name ?? pane.wantedLayer;
  if (!(await pane.open(id))) return;
  const line = list.slides.find((slide) => slide.id === id);
  const target = run.classes.indexOf(line.prediction);
  const wanted = best && line.heatmap ? `evidence-${run.modules}-${Math.max(0, target)}` : before;
  await pane.setLayer(wanted);
  pane.last = pane.place;
  if (pane === active) showSlide();
  writeAddress();
}

// --- The side ------------------------------------------------------------------------------------------------------

function showSlide() {
  const { slide } = active;
  const line = list.slides.find((each) => each.id === slide.id);
  list.select(slide.id);
  byId("slide-title").textContent = slide.id;
  const facts = [`patient ${line.patient}`, line.label === null ? "no label" : `label ${line.label}`, line.split ?? "in no part"];
  const { picture } = slide;
  if (picture) facts.push(`${picture.width_l0} × ${picture.height_l0} px`, `${Number(picture.mpp.toPrecision(4))} µm/px`);
  byId("slide-facts").textContent = facts.join(" · ");
  byId("slide-source").textContent = slide.words ?? "";
  showProbabilities(slide, line);
  showLayers(slide);
  review.open(slide);
  showSide();
}

function showProbabilities(slide, line) {
  const box = byId("probabilities");
  box.replaceChildren();
  const answers = slide.modules.map(({ module, p }) => ({ words: headOf(slide, module), p, own: !slide.mean_of && module === run.modules }));
  if (line.p && (slide.mean_of || !answers.length)) answers.push({ words: `Mean of ${slide.mean_of} seeds, the answer`, p: line.p, own: true });
  for (const { words, p, own } of answers.reverse()) {
    if (answers.length > 1) add(box, "h4", "", words);
    run.classes.forEach((name, number) => {
      const row = add(box, "div", own ? "p own" : "p");
      add(row, "span", "", name);
      add(add(row, "span", "bar"), "i", "").style.width = `${100 * p[number]}%`;
      add(row, "span", "number", probability(p[number]));
    });
  }
}

function headOf(slide, module) {
  const whose = slide.run ? ` of ${slide.run}` : "";
  return `Module ${module}${whose}` + (module === run.modules ? (slide.mean_of ? ", its answer" : ", the model's answer") : "");
}

// The model's own layers first: in this order the keys 1 to 9 choose them.
function layersInOrder(slide) {
  return [...slide.layers].sort((a, b) => b.module - a.module);
}

function showLayers(slide) {
  const box = byId("layers");
  box.replaceChildren();
  for (const fault of slide.faults) add(box, "p", "wrong", fault);
  if (!slide.layers.length) {
    if (!slide.faults.length) add(box, "p", "quiet", `No heatmap of this slide: ${slide.advice}`);
    return;
  }
  const none = add(box, "button", "layer", "None");
  none.dataset.layer = "";
  let module = null;
  layersInOrder(slide).forEach((layer, number) => {
    if (layer.module !== module) {
      module = layer.module;
      add(box, "h4", "", `Module ${module}${slide.run ? ` of ${slide.run}` : ""}${module === run.modules ? ", the model's" : ""}`);
    }
    const button = add(box, "button", "layer", classOf(layer, run) ?? "Attention");
    button.dataset.layer = layer.name;
    button.title = number < 9 ? `${layer.title} (${number + 1})` : layer.title;
  });
  for (const button of box.querySelectorAll("button")) {
    button.addEventListener("click", () => setLayer(button.dataset.layer));
  }
}

async function setLayer(name) {
  await active.setLayer(name);
  writeAddress();
}

function showSide() {
  const { layer, hidden } = active;
  for (const button of byId("layers").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", button.dataset.layer === (layer?.name ?? ""));
  }
  byId("fade").value = active.fade;
  byId("fade-value").textContent = hidden ? "hidden" : `${active.fade} %`;
  byId("outline").checked = active.outlined;
  byId("legend").hidden = !layer;
  if (!layer) return;
  byId("legend-unit").textContent = layer.unit;
  byId("legend-sums").textContent = layer.sums;
  const source = active.url(`/legends/${layer.name}.png`);
  if (byId("legend-strip").getAttribute("src") !== source) byId("legend-strip").src = source;
  byId("legend-ticks").replaceChildren();
  layer.ticks.forEach(([place, text], number) => {
    const tick = add(byId("legend-ticks"), "span", "", text);
    tick.style.left = `${100 * place}%`;
    tick.dataset.end = number === 0 ? "low" : number === layer.ticks.length - 1 ? "high" : "";
  });
}

function setFade(percent) {
  active.hidden = false;
  for (const pane of byId("together").checked ? panes : [active]) pane.setFade(Math.min(100, Math.max(0, percent)));
  showSide();
  writeAddress();
}

function setOutline(on) {
  for (const pane of byId("together").checked ? panes : [active]) pane.setOutline(on);
  showSide();
  writeAddress();
}

function saved(written) {
  list.reviewed(written.slide_id, written);
  for (const pane of panes) if (pane.slide?.id === written.slide_id) pane.slide.reviews = [...pane.slide.reviews, written];
  if (active.slide?.id === written.slide_id) review.history(active.slide.reviews);
}

// --- The address: #slide=...&x=...&y=...&mpp=...&layer=...&fade=...&outline=1, and the second pane's with b. ---------

function address() {
  const words = new URLSearchParams();
  panes.forEach((pane, number) => {
    const put = (key, value) => words.set((number ? "b." : "") + key, value);
    if (!pane.slide) return;
    put("slide", pane.slide.id);
    const { place } = pane;
    if (place) {
      put("x", place.x.toFixed(1));
      put("y", place.y.toFixed(1));
      put("mpp", place.mpp.toPrecision(5));
    }
    if (pane.layer) put("layer", pane.layer.name);
    put("fade", pane.fade);
    if (pane.outlined) put("outline", 1);
  });
  return words.toString();
}

// Not at every frame of a movement: browsers forbid that.
function writeAddress() {
  if (following || !panes.some((pane) => pane.slide)) return; // a link that leads nowhere stays to be read
  clearTimeout(writing);
  writing = setTimeout(() => location.hash.slice(1) === told && tell(), 150); // else the page is about to hear of another
}

function tell() {
  history.replaceState(null, "", `#${address()}`);
  told = location.hash.slice(1);
}

// Whether the address names a slide, which then is shown or said to be missing.
async function follow() {
  told = location.hash.slice(1);
  const words = new URLSearchParams(told);
  if (!words.get("slide")) return false;
  following = words;
  try {
    await showAddress(words);
    if (following !== words) return true; // who followed another meanwhile does the rest
  } finally {
    if (following === words) following = null;
  }
  if (active.slide) showSlide();
  writeAddress();
  return true;
}

async function showAddress(words) {
  const overtaken = () => following !== words; // by another address, while this one waited
  await compare(words.has("b.slide"));
  for (const [number, pane] of panes.entries()) {
    if (overtaken()) return;
    const get = (key) => words.get((number ? "b." : "") + key);
    if (!list.items.has(get("slide"))) {
      pane.say("slide", `This run has no slide ${get("slide")}${leftOut(get("slide"))}. Choose one from the list.`);
      continue;
    }
    const shown = pane.slide?.id === get("slide") && pane.wantedSlide === get("slide"); // and no other on its way
    if (!shown && !(await pane.open(get("slide")))) continue;
    if (overtaken()) return;
    const fade = Number(get("fade") ?? 60);
    pane.fade = Number.isFinite(fade) ? Math.min(100, Math.max(0, fade)) : 60;
    await pane.setLayer(get("layer") ?? "");
    if (overtaken()) return;
    await pane.setOutline(get("outline") === "1");
    if (overtaken()) return;
    pane.place = { x: Number(get("x") ?? NaN), y: Number(get("y") ?? NaN), mpp: Number(get("mpp") ?? NaN) };
    pane.last = pane.place;
  }
}

function leftOut(id) {
  const gone = run.left_out.find((slide) => slide.id === id);
  return gone ? `: it was left out (${gone.reason})` : "";
}

async function copyLink() {
  tell();
  try {
    await navigator.clipboard.writeText(location.href);
    byId("link").textContent = "Copied";
  } catch {
    byId("link").textContent = "See the address bar";
  }
  setTimeout(() => (byId("link").textContent = "Copy link"), 1500);
}

// --- Buttons and keys ----------------------------------------------------------------------------------------------

const STEP_PX = 120;
const KEYS = {
  ArrowLeft: () => active.zoom.pan(STEP_PX, 0),
  ArrowRight: () => active.zoom.pan(-STEP_PX, 0),
  ArrowUp: () => active.zoom.pan(0, STEP_PX),
  ArrowDown: () => active.zoom.pan(0, -STEP_PX),
  "+": () => active.zoom.zoom(1.5),
  "=": () => active.zoom.zoom(1.5),
  "-": () => active.zoom.zoom(1 / 1.5),
  f: () => active.zoom.fit(),
  j: () => list.next(1),
  k: () => list.next(-1),
  h: () => {
    active.hidden = !active.hidden;
    active.zoom.draw();
    showSide();
  },
  "[": () => setFade(active.fade - 10),
  "]": () => setFade(active.fade + 10),
  t: () => setOutline(!active.outlined),
  c: () => compare(panes.length === 1),
  l: () => copyLink(),
  "/": () => byId("search").focus(),
  n: () => byId("note").focus(),
  "?": () => byId("keys").showModal(),
};

// Whether a key means something to the field that has the focus.
function isOwn(key, target) {
  if (target.closest("textarea, select, dialog")) return true;
  if (target.tagName !== "INPUT" || target.type === "checkbox") return false;
  return target.type !== "range" || /^(Arrow|Page|Home$|End$|Escape$)/.test(key);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !active) return;
  const { target, key } = event;
  if (isOwn(key, target)) {
    if (key === "Escape") target.blur();
    return;
  }
  if (/^[0-9]$/.test(key) && active.slide) {
    const layer = key === "0" ? { name: "" } : layersInOrder(active.slide)[Number(key) - 1];
    if (layer) setLayer(layer.name);
  } else if (KEYS[key]) {
    event.preventDefault();
    KEYS[key]();
  }
});

byId("fade").addEventListener("input", (event) => setFade(Number(event.target.value)));
byId("outline").addEventListener("change", (event) => setOutline(event.target.checked));
byId("compare").addEventListener("click", () => compare(panes.length === 1));
byId("link").addEventListener("click", copyLink);
byId("help").addEventListener("click", () => byId("keys").showModal());
// On small screens the list and the side lie over the picture, one at a time.
const DRAWERS = ["show-list", "show-side"];
for (const name of DRAWERS) {
  byId(name).addEventListener("click", () => {
    const open = !document.body.classList.contains(name);
    for (const each of DRAWERS) {
      document.body.classList.toggle(each, each === name && open);
      byId(each).setAttribute("aria-expanded", each === name && open);
    }
  });
}

start().catch((error) => {
  add(byId("stage"), "p", "pane-message", `The run cannot be shown: ${error.message}`);
});
