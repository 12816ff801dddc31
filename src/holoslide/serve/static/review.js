// Notes and corrected labels. What is typed is kept in the browser until the server has said that it is saved.
//
// The form holds what the reviewer who is named in it typed or wrote last, never what another did: it would be saved
// under the wrong name. A draft belongs to a run, a slide and a reviewer.

import { ask } from "./ask.js";
import { add } from "./pane.js";

const byId = (id) => document.getElementById(id);

export class ReviewForm extends EventTarget {
  constructor(run) {
    super();
    this.run = run;
    this.slide = null;
    const corrected = byId("corrected");
    corrected.append(new Option("not corrected", ""));
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
    if (!slide) {
      byId("saved").textContent = "choose a slide first";
      return;
    }
    const [key, written] = [this.draftKey(), this.written()];
    byId("saved").textContent = "saving …";
    let told;
    try {
      const answer = await ask(`/api/slides/${encodeURIComponent(slide.id)}/reviews?run=${this.run.state}`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ reviewer: this.reviewer, ...written }),
      });
      told = await answer.json();
    } catch (error) {
      byId("saved").textContent = `not saved: ${error.message}; what you wrote is kept here`;
      return;
    }
    if (localStorage.getItem(key) === JSON.stringify(written)) localStorage.removeItem(key);
    this.dispatchEvent(new CustomEvent("saved", { detail: told }));
    if (this.slide.id !== slide.id) return;
    byId("saved").textContent = `saved ${shownTime(told.time)}`;
    if (JSON.stringify(this.written()) === JSON.stringify(written)) this.typed = false;
  }

  history(reviews) {
    const labels = labelsOf(reviews);
    byId("agreement").textContent = labels.length > 1 ? `Reviewers disagree: ${labels.join(" or ")}.` : "";
    byId("history").replaceChildren();
    for (const review of [...reviews].reverse()) {
      const item = add(byId("history"), "li", "");
      add(item, "span", "quiet", `${shownTime(review.time)}, ${review.reviewer}`);
      if (review.label) add(item, "b", "", review.label);
      if (review.note) add(item, "p", "", review.note);
    }
  }
}

// What holds is each reviewer's last word; who names no label says nothing of it, and corrects nobody.
export function latest(reviews) {
  return reviews.filter((review, number) => !reviews.slice(number + 1).some((later) => later.reviewer === review.reviewer));
}

// The labels that reviewers have given: none, one, or several where they disagree.
export function labelsOf(reviews) {
  return [...new Set(latest(reviews).map((review) => review.label).filter(Boolean))];
}

function shownTime(time) {
  return new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}
