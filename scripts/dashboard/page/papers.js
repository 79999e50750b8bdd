// The papers of a run, a tab each: answers, data, config, log, report.

import { get, request } from "./api.js";
import { h, put, say } from "./dom.js";
import { count, figure } from "./format.js";
import { render } from "./markdown.js";

export class Papers {
  constructor(path) {
    this.path = path;
    this.details = {}; // what the server says of the run besides its series
    this.pictures = [];
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
    this.element = h("section", { class: "papers panel" }, list, [...this.tabs.values()].map((each) => each.panel));
  }

  open(name) {
    this.tabName = name;
    for (const [each, { tab, panel }] of this.tabs) {
      panel.hidden = each !== name;
      tab.setAttribute("aria-selected", String(each === name));
      tab.tabIndex = each === name ? 0 : -1;
    }
    this.fill(name).catch(() => {}); // the link says that the server is away
  }

  /** What the run has said; the rest of the papers is asked for when its tab is open. */
  update(data) {
    this.showSamples(data);
  }

  showConfig(config) {
    put(this.commandText, (config.command ?? "").split(" ").flatMap((word) => [h("span", {}, word), " "]));
    say(this.yaml, config.yaml ?? "No configuration yet.");
    this.copy.hidden = !config.command;
  }

  remove() {
    for (const url of this.pictures) URL.revokeObjectURL(url);
  }

  showSamples({ samples }) {
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

  async fill(name = this.tabName) {
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
  const words = (each) => (typeof each === "number" ? figure(each) : String(each));
  return h(
    "div", { class: "ledger" },
    plain.length ? h("dl", {}, plain.flatMap(([name, each]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, words(each))])) : null,
    nested.map(([name, each]) => h("details", { open: depth < 1 }, h("summary", {}, name.replaceAll("_", " ")),
      Array.isArray(each) ? h("ul", {}, each.slice(0, 50).map((item) => h("li", {}, typeof item === "object" ? JSON.stringify(item) : String(item)))) : ledger(each, depth + 1))),
  );
}
