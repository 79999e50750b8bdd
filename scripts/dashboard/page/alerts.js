// What the rules have found in a run: errors first, then the newest.

import { levelOf } from "./charts.js";
import { h, put } from "./dom.js";
import { count, figure, isNumber } from "./format.js";

const SHOWN = 60;

export class Alerts {
  constructor() {
    this.element = h("section", { class: "alerts", "aria-label": "Alerts", hidden: true });
  }

  update({ alerts }) {
    this.element.hidden = alerts.length === 0;
    if (!alerts.length || this.shown === alerts) return;
    this.shown = alerts;
    const newest = [...alerts].reverse();
    const isError = (alert) => levelOf(alert) === "error";
    const [first, ...rest] = [...newest.filter(isError), ...newest.filter((alert) => !isError(alert))];
    const wasOpen = this.element.querySelector("details")?.open;
    const others = h("details", { open: wasOpen }, h("summary", {}, `${rest.length} more`), rest.slice(0, SHOWN - 1).map(line));
    put(this.element, line(first), rest.length ? others : null);
  }
}

function line(alert) {
  const numbers = Object.entries(alert.numbers ?? {}).map(([name, value]) => `${name.replaceAll("_", " ")} ${isNumber(value) ? figure(value) : value}`);
  return h(
    "div", { class: `alert ${levelOf(alert)}` },
    h("span", { class: "level" }, String(alert.level ?? "").toUpperCase()), h("strong", {}, String(alert.rule ?? "").replaceAll("_", " ")),
    h("span", { class: "at" }, isNumber(alert.step) ? `step ${count(alert.step)}` : ""),
    h("p", {}, String(alert.advice ?? "")), h("span", { class: "numbers" }, numbers.join(" · ")),
  );
}
