// The head of a run: what it does, how far it is, and the commands that it takes.

import { h, say } from "./dom.js";
import { count, duration, isNumber, percent } from "./format.js";
import { bar, pill, setBar, setPill } from "./list.js";

const ENDED = ["completed", "stopped", "crashed", "failed", "unknown"];
const ASKED_MS = 20000; // that the buttons wait for the run to answer
const SAVE_MS = 1500;

export class Head {
  /** `send(name)` asks the run for a command. */
  constructor(id, send) {
    this.send = send;
    this.asked = null;
    this.status = pill("unknown");
    this.status.setAttribute("role", "status");
    this.reason = h("span", { class: "reason" });
    this.bar = bar(0, "progress");
    this.where = h("span", { "data-testid": "where" });
    this.when = h("span", { "data-testid": "when" });
    const command = (name, text, kind = "") =>
      h("button", { class: `button ${kind}`, "data-command": name, onclick: () => this.command(name) }, text);
    this.buttons = {
      pause: command("pause", "Pause"), resume: command("resume", "Resume", "primary"), save: command("save", "Save now"),
      stop: h("button", { class: "button danger", "data-command": "stop", onclick: () => this.askToStop() }, "Stop"),
    };
    for (const button of Object.values(this.buttons)) button.hidden = true;
    this.consequence = h("p", {});
    this.confirm = h("button", { class: "button danger", "data-testid": "confirm-stop", onclick: () => {
      this.dialog.close();
      this.command("stop");
    } });
    this.keep = h("button", { class: "button", autofocus: true, onclick: () => this.dialog.close() });
    this.dialog = h(
      "dialog", { class: "panel", "aria-labelledby": "stop-title" },
      h("h2", { id: "stop-title" }, "Stop this run?"), this.consequence, h("div", { class: "actions" }, this.keep, this.confirm),
    );
    this.element = h("section", { class: "head panel" },
      h("div", { class: "name" }, h("h1", {}, id), this.status, this.reason),
      h("div", { class: "actions" }, Object.values(this.buttons)),
      this.bar, h("div", { class: "way-text" }, this.where, this.when), this.dialog);
  }

  askToStop() {
    const trains = this.data.state.status !== "pending";
    say(this.consequence, trains
      ? "The trainer finishes its step, saves a checkpoint and ends, which frees the devices. Resume goes on from there."
      : "It has not begun to train: it ends without a checkpoint.");
    say(this.confirm, trains ? "Save and stop" : "Stop");
    say(this.keep, trains ? "Keep training" : "Keep it");
    this.dialog.showModal();
  }

  async command(name) {
    this.asked = { name, status: this.data.state.status, at: Date.now() };
    this.update(this.data);
    if (!(await this.send(name))) this.asked = null;
    this.update(this.data);
  }

  /** A new state has come: whoever asked for a command has his answer. */
  answered() {
    if (this.asked && this.data.state.status !== this.asked.status) this.asked = null;
  }

  update(data) {
    this.data = data;
    const state = data.state, status = state.status;
    if (!status) return;
    setPill(this.status, status);
    say(this.reason, state.exit_reason && ENDED.includes(status) ? String(state.exit_reason) : "");
    this.showButtons(state.accepts ?? []);
    const { step, total_steps: total } = state;
    const share = isNumber(step) && isNumber(total) && total > 0 ? Math.min(1, step / total) : 0;
    setBar(this.bar, share);
    this.bar.className = `bar ${status}`;
    const epoch = data.last("train/epoch");
    const parts = [isNumber(step) ? `step ${count(step)}${isNumber(total) ? ` / ${count(total)}` : ""}` : "not begun", isNumber(step) ? percent(share) : ""];
    if (isNumber(epoch)) parts.push(`epoch ${epoch.toFixed(2)}`);
    say(this.where, parts.filter(Boolean).join(" · "));
    const elapsed = elapsedSeconds(state), eta = data.last("eta_seconds");
    const since = status === "running" && data.heard ? (Date.now() - data.heard) / 1000 : 0;
    const left = status === "running" && isNumber(eta) ? ` · ${duration(eta)} left` : "";
    say(this.when, isNumber(elapsed) ? `${duration(elapsed + since)}${left}` : "");
  }

  showButtons(accepts) {
    const ago = this.asked ? Date.now() - this.asked.at : Infinity;
    const waits = ago < ASKED_MS && this.asked.name !== "save" ? this.asked.name : null;
    for (const [name, button] of Object.entries(this.buttons)) {
      button.hidden = !accepts.includes(name) && waits !== name;
      button.disabled = (waits !== null && (name === waits || name !== "stop")) || (name === "save" && this.asked?.name === name && ago < SAVE_MS);
      button.classList.toggle("waits", waits === name);
    }
  }
}

// Over all starts of the run; one that does not say so, since its last start.
function elapsedSeconds(state) {
  if (isNumber(state.seconds)) return state.seconds;
  return isNumber(state.started_at) && isNumber(state.updated_at) ? state.updated_at - state.started_at : undefined;
}
