// One run: its head, alerts, figures, charts and papers, and the link that brings what is new.

import { get, Link, post, runPath } from "./api.js";
import { Alerts } from "./alerts.js";
import { Cards } from "./cards.js";
import { Charts } from "./charts.js";
import { h, put, say } from "./dom.js";
import { bytes, percent, short } from "./format.js";
import { Head } from "./head.js";
import { Papers } from "./papers.js";
import { RunData } from "./series.js";

const DRAW_MS = 400;

const CHARTS = [
  {
    id: "loss", title: "Loss", wide: true, smooth: true,
    series: [{ name: "train/loss", label: "training" }, { name: "eval/loss", label: "held out", points: true }, { name: "eval/ema/loss", label: "held out, average", points: true }],
  },
  { id: "learning-rate", title: "Learning rate", series: [{ name: "train/learning_rate", label: "learning rate", colour: 2 }], tick: "~e" },
  { id: "grad-norm", title: "Gradient norm", smooth: true, series: [{ name: "train/grad_norm", label: "before clipping", colour: 3 }] },
  { id: "speed", title: "Tokens per second", smooth: true, format: short, tick: "~s", series: [{ name: "train/tokens_per_second", label: "tokens/s", colour: 4 }] },
  {
    id: "accuracy", title: "Token accuracy", smooth: true, format: percent, tick: ".0%",
    series: [{ name: "train/token_accuracy", label: "training" }, { name: "eval/token_accuracy", label: "held out", points: true }, { name: "eval/exact_match", label: "exact answers", points: true, colour: 5 }],
  },
  { id: "mfu", title: "Model FLOP/s utilisation", smooth: true, format: percent, tick: ".1%", series: [{ name: "train/mfu", label: "MFU", colour: 5 }] },
  {
    id: "memory", title: "Memory, GiB",
    series: [{ name: "system/ram_used_gib", label: "RAM" }, ...[0, 1, 2, 3].map((gpu) => ({ name: `system/gpu${gpu}/memory_used_gib`, label: `GPU ${gpu}`, colour: gpu + 1 }))],
  },
  {
    id: "busy", title: "Utilisation, %",
    series: [{ name: "system/cpu_percent", label: "CPU" }, ...[0, 1, 2, 3].map((gpu) => ({ name: `system/gpu${gpu}/utilization`, label: `GPU ${gpu}`, colour: gpu + 1 }))],
  },
];

export function showRun(main, id, showLink) {
  const view = new RunView(id, showLink);
  put(main, view.element);
  view.start();
  return () => view.stop();
}

class RunView {
  constructor(id, showLink) {
    this.id = id;
    this.showLink = showLink;
    this.path = runPath(id);
    this.data = new RunData();
    this.messages = 0;
    this.head = new Head(id, (name) => this.command(name));
    this.alerts = new Alerts();
    this.cards = new Cards();
    this.charts = new Charts(CHARTS);
    this.papers = new Papers(this.path);
    this.note = h("p", { class: "problem", role: "alert", hidden: true });
    this.machine = h("p", { class: "machine faint" });
    this.element = h(
      "div", { class: "run-view" },
      this.head.element, this.note, this.alerts.element, this.cards.element, this.controls(), this.charts.element, this.papers.element, this.machine,
    );
  }

  controls() {
    const options = this.charts.options;
    const redraw = () => this.draw();
    const value = h("output", { for: "smoothing" }, options.weight.toFixed(2));
    const smoothing = h("input", { id: "smoothing", type: "range", min: 0, max: 0.99, step: 0.01, value: options.weight, oninput: () => {
      options.weight = Number(smoothing.value);
      say(value, options.weight.toFixed(2));
      redraw();
    } });
    const log = h("input", { id: "log", type: "checkbox", onchange: () => {
      options.log = log.checked;
      redraw();
    } });
    const by = h("select", { id: "by", onchange: () => {
      options.by = by.value;
      this.charts.range = null;
      this.reset.hidden = true;
      redraw();
    } }, ["step", "tokens", "time"].map((each) => h("option", { value: each }, each)));
    this.compare = h("select", { id: "compare", onchange: () => this.overlay(this.compare.value) }, h("option", { value: "" }, "nothing"));
    this.reset = h("button", { class: "button small", hidden: true, onclick: () => this.charts.resetZoom() }, "Show all");
    this.charts.onzoom = (zoomed) => {
      this.reset.hidden = !zoomed;
    };
    return h(
      "section", { class: "controls", "aria-label": "Charts" },
      h("label", { for: "smoothing" }, "Smoothing", smoothing, value), h("label", { for: "log" }, log, "Log scale"),
      h("label", { for: "by" }, "x axis", by), h("label", { for: "compare" }, "Compare with", this.compare), this.reset,
      h("span", { class: "legend faint", "aria-hidden": "true" }, h("i", { class: "key saved" }), "checkpoint", h("i", { class: "key alarm" }), "alert", h("i", { class: "key part" }), "stage"),
    );
  }

  start() {
    window.__dashboard.series = (name) => this.data.series.get(name) ?? null;
    window.__dashboard.data = this.data;
    window.__dashboard.drawn = 0;
    this.charts.ondrawn = () => {
      window.__dashboard.drawn += 1;
    };
    this.link = new Link(this.id, {
      message: (message) => this.hear(message),
      status: (status) => {
        window.__dashboard.link = status;
        this.showLink(status);
        if (status === "reconnecting") this.check();
      },
    });
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.recolour = () => this.draw();
    this.dark.addEventListener("change", this.recolour);
    this.slow = setInterval(() => this.refresh(), 3000);
    this.second = setInterval(() => this.head.update(this.data), 1000);
    this.refresh();
    this.listOthers();
  }

  stop() {
    this.gone = true;
    this.link.close();
    this.charts.remove();
    this.papers.remove();
    this.dark.removeEventListener("change", this.recolour);
    for (const timer of [this.slow, this.second]) clearInterval(timer);
    clearTimeout(this.drawing);
  }

  async check() {
    try {
      await get(`${this.path}/progress`);
    } catch (error) {
      if (error.status === 404 && !this.gone) this.tell("There is no such run.");
    }
  }

  hear(message) {
    this.messages += 1;
    const before = this.data.state.status;
    this.data.apply(message);
    this.data.heard = Date.now();
    window.__dashboard.messages = this.messages;
    window.__dashboard.state = this.data.state;
    this.head.update(this.data);
    if (message.type === "state" && before !== message.state.status) {
      this.head.answered();
      this.head.update(this.data);
      this.refresh(true);
    }
    this.draw();
  }

  draw() {
    this.stale = true;
    if (this.drawing) return;
    const wait = Math.max(0, DRAW_MS - (performance.now() - (this.drawnAt ?? -DRAW_MS)));
    this.drawing = setTimeout(async () => {
      this.stale = false;
      for (const part of [this.cards, this.alerts, this.papers]) part.update(this.data);
      try {
        await this.charts.draw(this.data, this.other, this.otherName);
      } catch (error) {
        this.tell(error.message);
      }
      this.drawnAt = performance.now();
      this.drawing = null;
      if (this.gone) return;
      if (this.stale) this.draw();
    }, wait);
  }

  tell(text) {
    this.note.hidden = !text;
    say(this.note, text);
  }

  /** Ask the run for a command; returns whether it has been asked. */
  async command(name) {
    this.tell("");
    try {
      await post(`${this.path}/${name}`);
    } catch (error) {
      this.tell(error.message);
      return false;
    }
    if (name === "save") setTimeout(() => this.refresh(true), 1500);
    return true;
  }

  async listOthers() {
    try {
      const { runs } = await get("/runs");
      for (const run of runs) if (run.id !== this.id) this.compare.append(h("option", { value: run.id }, run.id));
      this.compare.disabled = runs.length < 2;
    } catch {
      this.compare.disabled = true;
    }
  }

  async overlay(id) {
    this.otherName = id;
    if (!id) this.other = null;
    else {
      const found = await get(`${runPath(id)}/metrics`);
      this.other = new RunData();
      this.other.restore(found);
    }
    window.__dashboard.compared = id;
    this.draw();
  }

  async refresh(all = false) {
    if (document.hidden && !all) return;
    try {
      const [details, system] = await Promise.all([get(this.path), get("/system")]);
      if (this.gone) return;
      this.cards.details = this.papers.details = details;
      this.showMachine(system);
      this.cards.update(this.data);
      if (details.has_config && (!this.cards.config.values || all)) {
        this.cards.config = await get(`${this.path}/config`).catch(() => ({}));
        this.papers.showConfig(this.cards.config);
      }
      await this.papers.fill();
    } catch (error) {
      if (error instanceof TypeError || this.gone) return; // the link says that the server is away
      if (error.status === 404) this.tell("There is no such run.");
    }
  }

  showMachine(system) {
    const parts = [
      `CPU ${Math.round(system.cpu_percent)} % of ${system.cores} cores`, `RAM ${bytes(system.memory_used_bytes)} of ${bytes(system.memory_total_bytes)}`,
      `disk ${bytes(system.disk_free_bytes)} free`,
      ...system.gpus.map((gpu, place) => `GPU ${place} ${gpu.percent ?? "–"} %, ${bytes(gpu.memory_used_bytes)} of ${bytes(gpu.memory_total_bytes)}`),
    ];
    say(this.machine, parts.join("  ·  "));
  }
}
