// Notes and corrected labels. What is typed is kept in the browser until the server has said that it is saved.
//
// The form holds what the reviewer who is named in it typed or wrote last, never what another did: it would be saved
// under the wrong name. A draft belongs to a run, a slide and a reviewer.

import { add } from "./pane.js";

const byId = (id) => document.getElementById(id);

export class ReviewForm extends EventTarget {
  constructor(run) {
    super();
    this.run = run;
    this.slide = null;
    const corrected = byId("corrected");
    corrected.append(new Option("as in the table", ""));
    for (const name of run.classes) corrected.append(new Option(name, name));
    this.reviewer = localStorage.getItem("holoslide reviewer") ?? "";
    byId("reviewer").value = this.reviewer;
    byId("reviewer").addEventListener("change", (event) => this.named(event.target.value.trim()));
    for (const id of ["note", "corrected"]) byId(id).addEventListener("input", () => this.keepDraft());
    byId("review").addEventListener("submit", (event) => {
      event.preventDefault();
      this.save();
    });
  }

  open(slide) {
    this.slide = slide;
    this.fill();
    this.history(slide.reviews);
  }

  fill() {
    const draft = this.draft();
    const own = this.slide.reviews.findLast((review) => review.reviewer === this.reviewer);
    byId("corrected").value = draft?.label ?? own?.label ?? "";
    byId("note").value = draft?.note ?? own?.note ?? "";
    byId("saved").textContent = draft ? "not saved yet" : "";
    this.typed = false; // since the form was filled
  }

  // Who has just typed and then puts the name right keeps the text; any other name begins with what is its own.
  named(name) {
    const before = this.draftKey();
    const keeps = this.typed || (!this.reviewer && this.draft() !== null);
    this.reviewer = name;
    localStorage.setItem("holoslide reviewer", name);
    if (keeps) {
      localStorage.removeItem(before);
      this.keepDraft();
    } else if (this.slide) {
      this.fill();
    }
  }

  // --- Drafts ------------------------------------------------------------------------------------------------------

  draftKey() {
    return `holoslide draft ${JSON.stringify([this.run.key, this.slide?.id, this.reviewer])}`;
  }

  draft() {
    try {
      return JSON.parse(localStorage.getItem(this.draftKey()));
    } catch {
      return null;
    }
  }

  written() {
    return { label: byId("corrected").value, note: byId("note").value };
  }

  keepDraft() {
    localStorage.setItem(this.draftKey(), JSON.stringify(this.written()));
    byId("saved").textContent = "not saved yet";
    this.typed = true;
  }

  // --- Saving ------------------------------------------------------------------------------------------------------

  async save() {
    const { slide } = this;
    if (!slide) return;
    const [key, written] = [this.draftKey(), this.written()];
    byId("saved").textContent = "saving …";
    let answer;
    let told;
    try {
      answer = await fetch(`/api/slides/${encodeURIComponent(slide.id)}/reviews`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ reviewer: this.reviewer, ...written }),
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
    if (localStorage.getItem(key) === JSON.stringify(written)) localStorage.removeItem(key);
    this.dispatchEvent(new CustomEvent("saved", { detail: told }));
    if (this.slide.id !== slide.id) return;
    byId("saved").textContent = `saved ${shownTime(told.time)}`;
    if (JSON.stringify(this.written()) === JSON.stringify(written)) this.typed = false;
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
