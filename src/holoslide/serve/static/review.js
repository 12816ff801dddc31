// Notes and corrected labels. What is typed is kept in the browser until the server has said that it is saved.

import { add } from "./pane.js";

const byId = (id) => document.getElementById(id);
const draftOf = (run, id) => `holoslide draft ${run} ${id}`;

export class ReviewForm extends EventTarget {
  constructor(run) {
    super();
    this.run = run;
    this.id = null;
    const corrected = byId("corrected");
    corrected.append(new Option("as in the table", ""));
    for (const name of run.classes) corrected.append(new Option(name, name));
    byId("reviewer").value = localStorage.getItem("holoslide reviewer") ?? "";
    byId("reviewer").addEventListener("change", (event) => localStorage.setItem("holoslide reviewer", event.target.value));
    for (const id of ["note", "corrected"]) byId(id).addEventListener("input", () => this.keepDraft());
    byId("review").addEventListener("submit", (event) => {
      event.preventDefault();
      this.save();
    });
  }

  open(slide) {
    this.id = slide.id;
    const last = slide.reviews.at(-1);
    let draft = null;
    try {
      draft = JSON.parse(localStorage.getItem(draftOf(this.run.name, slide.id)));
    } catch {
      draft = null;
    }
    byId("corrected").value = draft?.label ?? last?.label ?? "";
    byId("note").value = draft?.note ?? last?.note ?? "";
    byId("saved").textContent = draft ? "not saved yet" : "";
    this.history(slide.reviews);
  }

  keepDraft() {
    const draft = { label: byId("corrected").value, note: byId("note").value };
    localStorage.setItem(draftOf(this.run.name, this.id), JSON.stringify(draft));
    byId("saved").textContent = "not saved yet";
  }

  async save() {
    const { id } = this;
    if (!id) return;
    const sent = { reviewer: byId("reviewer").value, label: byId("corrected").value, note: byId("note").value };
    byId("saved").textContent = "saving …";
    let answer;
    let told;
    try {
      answer = await fetch(`/api/slides/${encodeURIComponent(id)}/reviews`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify(sent),
      });
      told = await answer.json();
    } catch {
      byId("saved").textContent = "not saved: the viewer does not answer; what you wrote is kept here";
      return;
    }
    if (!answer.ok) {
      byId("saved").textContent = `not saved: ${told.error}`;
      return;
    }
    const draft = localStorage.getItem(draftOf(this.run.name, id));
    if (draft === JSON.stringify({ label: sent.label, note: sent.note })) localStorage.removeItem(draftOf(this.run.name, id));
    this.dispatchEvent(new CustomEvent("saved", { detail: told }));
    if (this.id === id) byId("saved").textContent = `saved ${shownTime(told.time)}`;
  }

  history(reviews) {
    byId("history").replaceChildren();
    for (const review of [...reviews].reverse()) {
      const item = add(byId("history"), "li", "");
      add(item, "span", "quiet", `${shownTime(review.time)}, ${review.reviewer}`);
      if (review.label) add(item, "b", "", review.label);
      if (review.note) add(item, "p", "", review.note);
    }
  }
}

function shownTime(time) {
  return new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}
