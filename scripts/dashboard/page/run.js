// One run: where it stands, its commands, cards, charts and papers.

import { get, Link, post, request, runPath } from "./api.js";
import { Charts, levelOf } from "./charts.js";
import { h, put, say } from "./dom.js";
import { ago, bytes, count, duration, isNumber, number, percent, short } from "./format.js";
import { bar, pill, setBar, setPill } from "./list.js";
import { render } from "./markdown.js";
import { RunData, smooth } from "./series.js";

const DRAW_MS = 400;
const OPEN = ["pending", "running", "pausing", "paused", "stopping", "stalled"];
const RESUMABLE = ["paused", "pausing", "stopped", "crashed", "failed"];

const CARDS = ["loss", "eval", "lr", "norm", "speed", "tokens", "mfu", "memory", "checkpoint", "early-stop"];

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
    this.details = {};
    this.config = {};
    this.charts = new Charts(CHARTS);
    this.messages = 0;
    this.heard = 0;
    this.asked = null;
    this.cards = new Map();
    this.build();
  }

  build() {
    this.status = pill("unknown");
    this.status.setAttribute("role", "status");
    this.reason = h("span", { class: "reason" });
    this.bar = bar(0, "progress");
    this.where = h("span", { "data-testid": "where" });
    this.when = h("span", {});
    const command = (name, text, kind = "") =>
      h("button", { class: `button ${kind}`, "data-command": name, onclick: () => this.command(name) }, text);
    this.buttons = {
      pause: command("pause", "Pause"), resume: command("resume", "Resume", "primary"), save: command("save", "Save now"),
      stop: h("button", { class: "button danger", "data-command": "stop", onclick: () => this.dialog.showModal() }, "Stop"),
    };
    for (const button of Object.values(this.buttons)) button.hidden = true;
    this.note = h("p", { class: "problem", role: "alert", hidden: true });
    this.dialog = h(
      "dialog", { class: "panel", "aria-labelledby": "stop-title" },
      h("h2", { id: "stop-title" }, "Stop this run?"),
      h("p", {}, "The trainer finishes its step, saves a checkpoint and ends, which frees the devices. Resume goes on from there."),
      h("div", { class: "actions" },
        h("button", { class: "button", autofocus: true, onclick: () => this.dialog.close() }, "Keep training"),
        h("button", { class: "button danger", "data-testid": "confirm-stop", onclick: () => {
          this.dialog.close();
          this.command("stop");
        } }, "Save and stop")),
    );
    this.alertBox = h("section", { class: "alerts", "aria-label": "Alerts", hidden: true });
    this.cardBox = h("section", { class: "cards", "aria-label": "Figures" });
    this.machine = h("p", { class: "machine faint" });
    this.element = h(
      "div", { class: "run-view" },
      h("section", { class: "head panel" },
        h("div", { class: "name" }, h("h1", {}, this.id), this.status, this.reason),
        h("div", { class: "actions" }, this.buttons.pause, this.buttons.resume, this.buttons.save, this.buttons.stop),
        this.bar, h("div", { class: "way-text" }, this.where, this.when)),
      this.note, this.alertBox, this.cardBox, this.controls(), this.charts.element, this.papers(), this.machine, this.dialog,
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

  papers() {
    const parts = { samples: "Answers", data: "Data", config: "Config", log: "Log", report: "Report" };
    const list = h("div", { role: "tablist", "aria-label": "Papers" });
    this.tabs = new Map();
    for (const [name, title] of Object.entries(parts)) {
      const panel = h("div", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}`, tabindex: 0, hidden: true });
      const tab = h("button", { role: "tab", id: `tab-${name}`, "aria-controls": `panel-${name}`, onclick: () => this.open(name) }, title);
      list.append(tab);
      this.tabs.set(name, { tab, panel });
    }
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const names = [...this.tabs.keys()];
      const next = names[(names.indexOf(this.tabName) + step + names.length) % names.length];
      this.open(next);
      this.tabs.get(next).tab.focus();
    });
    this.copy = h("button", { class: "button small", onclick: () => this.copyCommand() }, "Copy");
    this.commandText = h("code", { "data-testid": "command" });
    this.yaml = h("pre", { class: "yaml" });
    put(this.tabs.get("config").panel, h("div", { class: "command" }, this.commandText, this.copy), this.yaml);
    this.log = h("pre", { class: "log", "data-testid": "log" });
    put(this.tabs.get("log").panel, this.log);
    this.open("samples");
    return h("section", { class: "papers panel" }, list, [...this.tabs.values()].map((each) => each.panel));
  }

  open(name) {
    this.tabName = name;
    for (const [each, { tab, panel }] of this.tabs) {
      panel.hidden = each !== name;
      tab.setAttribute("aria-selected", String(each === name));
      tab.tabIndex = each === name ? 0 : -1;
    }
    if (this.started) this.fill(name);
  }

  start() {
    this.started = true;
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
    this.second = setInterval(() => this.showHead(), 1000);
    this.refresh();
    this.listOthers();
  }

  stop() {
    this.gone = true;
    this.link.close();
    this.charts.remove();
    this.dark.removeEventListener("change", this.recolour);
    for (const timer of [this.slow, this.second]) clearInterval(timer);
    clearTimeout(this.drawing);
    for (const url of this.pictures ?? []) URL.revokeObjectURL(url);
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
    this.heard = Date.now();
    const before = this.data.state.status;
    this.data.apply(message);
    window.__dashboard.messages = this.messages;
    window.__dashboard.state = this.data.state;
    if (message.type === "state") {
      const status = message.state.status;
      if (this.asked && (status !== this.asked.status || Date.now() > this.asked.until)) this.asked = null;
      if (before !== status) {
        if (before === "paused" || status === "paused") this.data.events.push({ kind: "event", event: "pause", step: message.state.step ?? 0 });
        this.refresh(true);
      }
    }
    this.showHead();
    this.draw();
  }

  draw() {
    this.stale = true;
    if (this.drawing) return;
    const wait = Math.max(0, DRAW_MS - (performance.now() - (this.drawnAt ?? -DRAW_MS)));
    this.drawing = setTimeout(async () => {
      this.stale = false;
      this.showCards();
      this.showAlerts();
      this.showSamples();
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

  async command(name) {
    this.tell("");
    const status = this.data.state.status;
    this.asked = { name, status, until: Date.now() + 20000 };
    this.showHead();
    try {
      await post(`${this.path}/${name}`);
      if (name === "save") setTimeout(() => this.refresh(true), 1500);
    } catch (error) {
      this.asked = null;
      this.tell(error.message);
    }
    this.showHead();
  }

  showHead() {
    const state = this.data.state, status = state.status ?? "unknown";
    if (!state.status) return;
    setPill(this.status, status);
    const said = state.exit_reason && !OPEN.includes(status) ? String(state.exit_reason) : "";
    say(this.reason, said);
    const waits = this.asked && Date.now() < this.asked.until && this.asked.name !== "save" ? this.asked.name : null;
    const shown = {
      pause: status === "running", resume: RESUMABLE.includes(status),
      save: ["running", "pausing", "paused"].includes(status), stop: ["running", "pausing", "paused"].includes(status),
    };
    for (const [name, button] of Object.entries(this.buttons)) {
      button.hidden = !shown[name];
      button.disabled = waits !== null || (this.asked?.name === name && name === "save" && Date.now() < this.asked.until - 18500);
      button.classList.toggle("waits", waits === name);
    }
    const { step, total_steps: total } = state;
    const share = isNumber(step) && isNumber(total) && total > 0 ? Math.min(1, step / total) : 0;
    setBar(this.bar, share);
    this.bar.className = `bar ${status}`;
    const epoch = this.data.last("train/epoch");
    const parts = [isNumber(step) ? `step ${count(step)}${isNumber(total) ? ` / ${count(total)}` : ""}` : "not begun", isNumber(step) ? percent(share) : ""];
    if (isNumber(epoch)) parts.push(`epoch ${epoch.toFixed(2)}`);
    say(this.where, parts.filter(Boolean).join(" · "));
    const since = status === "running" && this.heard ? (Date.now() - this.heard) / 1000 : 0;
    const elapsed = isNumber(state.started_at) && isNumber(state.updated_at) ? state.updated_at - state.started_at + since : undefined;
    const eta = this.data.last("eta_seconds");
    const left = status === "running" && isNumber(eta) ? ` · ${duration(eta)} left` : "";
    say(this.when, isNumber(elapsed) ? `${duration(elapsed)}${left}` : "");
  }

  card(name, label, value, detail = "") {
    let card = this.cards.get(name);
    if (!card) {
      const [valueText, detailText] = [h("span", { class: "value" }), h("span", { class: "detail" })];
      card = { box: h("div", { class: "card panel", "data-testid": `card-${name}` }, h("span", { class: "label" }, label), valueText, detailText), valueText, detailText };
      this.cards.set(name, card);
      const later = CARDS.slice(CARDS.indexOf(name) + 1).map((each) => this.cards.get(each)?.box).find(Boolean);
      this.cardBox.insertBefore(card.box, later ?? null);
      this.cardBox.className = `cards in-${Math.ceil(this.cards.size / Math.ceil(this.cards.size / 6))}`;
    }
    say(card.valueText, value);
    say(card.detailText, detail);
  }

  showCards() {
    const { data, details } = this;
    const losses = data.series.get("train/loss")?.value ?? [];
    const recent = smooth(losses.slice(-400), 0.9).filter(isNumber);
    const [now, then] = [recent.at(-1), recent.at(-Math.min(recent.length, 50))];
    const trend = isNumber(now) && isNumber(then) && recent.length > 5 ? (now < then ? "↓" : now > then ? "↑" : "→") : "";
    const broken = losses.length > 0 && losses.at(-1) === null;
    this.card("loss", "Training loss", broken ? "not finite" : number(data.last("train/loss")), isNumber(now) ? `mean ${number(now)} ${trend}` : "");
    const best = data.best("eval/loss");
    if (best) this.card("eval", "Held-out loss", number(data.last("eval/loss")), `best ${number(best.value)} at step ${count(best.step)}`);
    const stage = data.events.filter((event) => event.event === "stage").at(-1);
    this.card("lr", "Learning rate", number(data.last("train/learning_rate"), 3), stage ? String(stage.name) : "");
    this.card("norm", "Gradient norm", number(data.last("train/grad_norm"), 3), isNumber(this.config.values?.grad_clip) ? `clipped at ${this.config.values.grad_clip}` : "");
    const seconds = data.last("train/seconds_per_step");
    this.card("speed", "Tokens/s", short(data.last("train/tokens_per_second")), isNumber(seconds) ? `${number(seconds, 3)} s a step` : "");
    if (isNumber(data.last("train/mfu"))) this.card("mfu", "MFU", percent(data.last("train/mfu")));
    const tokens = data.last("train/tokens");
    if (isNumber(tokens)) {
      const supervised = data.last("train/supervised_tokens");
      this.card("tokens", "Tokens seen", short(tokens), isNumber(supervised) ? `${short(supervised)} supervised` : "");
    }
    const gpu = [...data.series.keys()].filter((name) => /^system\/gpu\d+\/memory_used_gib$/.test(name)).map((name) => data.last(name)).filter(isNumber);
    const ram = data.last("system/ram_used_gib"), peak = data.epochs.at(-1)?.memory_usage;
    if (gpu.length) this.card("memory", "GPU memory", `${gpu.reduce((a, b) => a + b, 0).toFixed(1)} GiB`, gpu.length > 1 ? `${gpu.length} GPUs` : "");
    else if (isNumber(ram)) this.card("memory", "Memory", `${ram.toFixed(2)} GiB`, "RAM of the job");
    else if (isNumber(peak)) this.card("memory", "Memory", bytes(peak), "peak of a process");
    const saved = details.checkpoints?.at(-1);
    this.card("checkpoint", "Last checkpoint", saved ? `step ${count(saved.step)}` : "none yet", saved ? ago(saved.time) : "");
    const patience = this.config.values?.early_stopping_patience;
    if (isNumber(patience)) {
      const waited = this.evaluationsWithoutGain();
      this.card("early-stop", "Early stopping", `${waited} / ${patience}`, "evaluations without gain");
    }
  }

  /** As the trainer counts them: a gain is a change by more than --early_stopping_min_delta. */
  evaluationsWithoutGain() {
    const { monitor_metric: metric, monitor_mode: mode, early_stopping_min_delta: delta } = this.config.values;
    const evals = this.data.series.get(metric);
    let best = null, waited = 0;
    for (const value of evals?.value ?? []) {
      const gained = isNumber(value) && (best === null || (mode === "max" ? value > best + delta : value < best - delta));
      if (gained) [best, waited] = [value, 0];
      else waited += 1;
    }
    return waited;
  }

  showAlerts() {
    const { alerts } = this.data;
    this.alertBox.hidden = alerts.length === 0;
    if (!alerts.length || this.alertsShown === alerts) return;
    this.alertsShown = alerts;
    const line = (alert) => h(
      "div", { class: `alert ${levelOf(alert)}` },
      h("span", { class: "level" }, String(alert.level ?? "").toUpperCase()), h("strong", {}, String(alert.rule ?? "").replaceAll("_", " ")),
      h("span", { class: "at" }, isNumber(alert.step) ? `step ${count(alert.step)}` : ""),
      h("p", {}, String(alert.advice ?? "")),
      h("span", { class: "numbers" }, Object.entries(alert.numbers ?? {}).map(([name, value]) => `${name.replaceAll("_", " ")} ${isNumber(value) ? number(value) : value}`).join(" · ")),
    );
    const newest = [...alerts].reverse();
    const wasOpen = this.alertBox.querySelector("details")?.open;
    const rest = newest.length > 1 ? h("details", { open: wasOpen }, h("summary", {}, `${newest.length - 1} earlier`), newest.slice(1, 60).map(line)) : null;
    put(this.alertBox, line(newest[0]), rest);
  }

  showSamples() {
    const { samples } = this.data;
    const { panel } = this.tabs.get("samples");
    if (this.samplesShown === samples && samples.length) return;
    this.samplesShown = samples;
    if (!samples.length) {
      put(panel, h("p", { class: "faint" }, "No answers yet. With --eval_samples N the model answers N held-out prompts at each evaluation."));
      return;
    }
    put(panel, [...samples].reverse().map((sample) => h(
      "article", { class: `sample ${sample.exact ? "right" : "wrong"}` },
      h("header", {}, h("span", { class: "verdict" }, sample.exact ? "exact" : "different"), h("span", { class: "faint" }, `step ${count(sample.step)}`)),
      h("dl", {}, [["prompt", "Prompt"], ["expected", "Expected"], ["answer", "Answer"]].flatMap(([key, title]) => [h("dt", {}, title), h("dd", {}, String(sample[key] ?? ""))])),
    )));
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
      this.details = details;
      this.showMachine(system);
      this.showCards();
      if (details.has_config && (!this.config.values || all)) {
        this.config = await get(`${this.path}/config`).catch(() => ({}));
        put(this.commandText, (this.config.command ?? "").split(" ").flatMap((word) => [h("span", {}, word), " "]));
        say(this.yaml, this.config.yaml ?? "No configuration yet.");
        this.copy.hidden = !this.config.command;
      }
      await this.fill(this.tabName);
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

  async fill(name) {
    if (name === "log") await this.readLog();
    else if (name === "data") this.showLedger();
    else if (name === "report") await this.showReport();
  }

  async readLog() {
    if (this.reading) return;
    this.reading = true;
    try {
      const since = this.logPosition === undefined ? "" : `?since=${this.logPosition}`;
      const said = await get(`${this.path}/log${since}`);
      const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
      if (this.logPosition === undefined || said.reset) say(this.log, said.text || "No output yet. A run that a terminal has started writes it there.");
      else if (said.text) this.log.textContent = (this.log.textContent + said.text).slice(-200000);
      this.logPosition = said.position || undefined;
      if (atEnd) this.log.scrollTop = this.log.scrollHeight;
    } finally {
      this.reading = false;
    }
  }

  showLedger() {
    const report = this.details.data_report;
    const { panel } = this.tabs.get("data");
    if (!report) {
      put(panel, h("p", { class: "faint" }, "No ledger yet: it is written when the data has been prepared."));
      return;
    }
    const text = JSON.stringify(report);
    if (this.ledgerShown === text) return;
    this.ledgerShown = text;
    put(panel, ledger(report, 0));
  }

  async showReport() {
    const { panel } = this.tabs.get("report");
    if (!this.details.has_report) {
      put(panel, h("p", { class: "faint" }, "No report yet: it is written at the end of a run."));
      return;
    }
    const found = await get(`${this.path}/report`);
    if (this.reportShown === found.markdown) return;
    this.reportShown = found.markdown;
    this.pictures ??= [];
    const picture = (source, title) => {
      const name = source.replace(/^\.\//, "");
      if (!found.images.includes(name)) return `[${title}]`;
      const image = h("img", { alt: title || name, loading: "lazy" });
      request(`${this.path}/report/${encodeURIComponent(name)}`).then(async (answer) => {
        if (!answer.ok) return;
        image.src = URL.createObjectURL(await answer.blob());
        this.pictures.push(image.src);
      });
      return image;
    };
    const used = new Set([...found.markdown.matchAll(/\]\((?:\.\/)?([^)]+)\)/g)].map((match) => match[1]));
    put(panel, h("div", { class: "report" }, render(found.markdown, picture), found.images.filter((name) => !used.has(name)).map((name) => picture(name, name))));
  }

  async copyCommand() {
    try {
      await navigator.clipboard.writeText(this.commandText.textContent);
      say(this.copy, "Copied");
    } catch {
      getSelection().selectAllChildren(this.commandText);
      say(this.copy, "Selected");
    }
    setTimeout(() => say(this.copy, "Copy"), 1500);
  }
}

// A report of numbers in nested names, as rows; lists are told by their length and first entries.
function ledger(value, depth) {
  const plain = Object.entries(value).filter(([, each]) => each === null || typeof each !== "object");
  const nested = Object.entries(value).filter(([, each]) => each !== null && typeof each === "object" && Object.keys(each).length);
  const words = (each) => (typeof each === "number" ? (Number.isInteger(each) ? count(each) : number(each)) : String(each));
  return h(
    "div", { class: "ledger" },
    plain.length ? h("dl", {}, plain.flatMap(([name, each]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, words(each))])) : null,
    nested.map(([name, each]) => h("details", { open: depth < 1 }, h("summary", {}, name.replaceAll("_", " ")),
      Array.isArray(each) ? h("ul", {}, each.slice(0, 50).map((item) => h("li", {}, typeof item === "object" ? JSON.stringify(item) : String(item)))) : ledger(each, depth + 1))),
  );
}
