// All runs: status, curve, progress, last loss.

import { get, runPath } from "./api.js";
import { loadPlotly } from "./charts.js";
import { h, put, say, svg } from "./dom.js";
import { ago, count, duration, number, percent } from "./format.js";

const EVERY_MS = 2000;

export function pill(status) {
  return h("span", { class: `pill ${status}`, "data-status": status }, status);
}

export function setPill(element, status) {
  if (element.dataset.status === status) return;
  element.className = `pill ${status}`;
  element.dataset.status = status;
  element.textContent = status;
}

export function sparkline(points, width = 132, height = 34) {
  const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "spark", "aria-hidden": "true", preserveAspectRatio: "none" });
  if (points.length < 2) return image;
  const values = points.map(([, value]) => value), steps = points.map(([step]) => step);
  const low = Math.min(...values), high = Math.max(...values), span = high - low || 1;
  const first = steps[0], length = steps[steps.length - 1] - first || 1;
  const place = ([step, value]) =>
    `${(((step - first) / length) * (width - 4) + 2).toFixed(1)},${(height - 3 - ((value - low) / span) * (height - 6)).toFixed(1)}`;
  image.append(svg("polyline", { points: points.map(place).join(" ") }));
  return image;
}

export function bar(share, label) {
  const fill = svg("svg", { viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { width: 100, height: 1, class: "track" }), svg("rect", { width: (100 * (share ?? 0)).toFixed(2), height: 1, class: "fill" }));
  return h("div", {
    class: "bar", role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100,
    "aria-valuenow": Math.round(100 * (share ?? 0)),
  }, fill);
}

export function setBar(element, share) {
  element.setAttribute("aria-valuenow", Math.round(100 * (share ?? 0)));
  element.querySelector(".fill").setAttribute("width", (100 * (share ?? 0)).toFixed(2));
}

function row(run) {
  const where = run.total_steps ? `${count(run.step)} / ${count(run.total_steps)}` : count(run.step);
  const time = run.status === "running" ? `${duration(run.eta_seconds)} left` : ago(run.updated_at);
  return h(
    "li", { class: "run panel", "data-testid": "run" },
    h("a", { class: "cover", href: `#/run/${encodeURIComponent(run.id)}`, "aria-label": `${run.id}, ${run.status}` }),
    h("div", { class: "who" }, h("strong", {}, run.id), pill(run.status)),
    sparkline(run.sparkline),
    h("div", { class: "loss" }, h("span", { class: "label" }, "loss"), h("span", { class: "value" }, number(run.train_loss))),
    h("div", { class: "loss" }, h("span", { class: "label" }, "held out"), h("span", { class: "value" }, number(run.eval_loss))),
    h("div", { class: "way" }, bar(run.share, `progress of ${run.id}`),
      h("div", { class: "way-text" }, h("span", {}, `${where} · ${percent(run.share)}`), h("span", {}, time))),
  );
}

function nothing(runsDir) {
  return h(
    "div", { class: "panel empty" },
    svg("svg", { viewBox: "0 0 120 50", "aria-hidden": "true" }, svg("path", { d: "M4 6c18 0 22 30 46 34s40 4 66 4" })),
    h("h1", {}, "No runs yet"),
    h("p", {}, "Train the built-in demo first: a small model, no download, a few minutes on two CPU cores."),
    h("div", { class: "actions" },
      h("a", { class: "button primary", href: "#/new" , onclick: () => sessionStorage.setItem("preset", "demo") }, "Start the demo run"),
      h("a", { class: "button", href: "#/new" }, "Set up a run")),
    h("p", { class: "faint" }, `Runs that a terminal starts into ${runsDir} show up here as well.`),
  );
}

export function showRuns(main) {
  let timer, gone = false;
  const list = h("ul", { class: "runs" });
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const heading = h("h1", { class: "sr" }, "Runs");
  put(main, heading, problem, list);
  let before = "";
  async function refresh() {
    try {
      const found = await get("/runs");
      if (gone) return;
      problem.hidden = true;
      const now = JSON.stringify(found);
      if (now !== before) {
        before = now;
        const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
        if (found.runs.length) put(list, found.runs.map(row));
        else put(list, h("li", {}, nothing(found.runs_dir)));
        if (focused) [...list.querySelectorAll("a")].find((each) => each.getAttribute("href") === focused)?.focus();
      }
      window.__dashboard.runs = found.runs;
    } catch (error) {
      if (gone || error.status === 401) return;
      problem.hidden = false;
      say(problem, "The server does not answer; trying again.");
    }
    if (!gone) timer = setTimeout(refresh, document.hidden ? 4 * EVERY_MS : EVERY_MS);
  }
  refresh().then(() => loadPlotly()).catch(() => {}); // a run that is opened next finds the charts there
  return () => {
    gone = true;
    clearTimeout(timer);
  };
}

export { runPath };
