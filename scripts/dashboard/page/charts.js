// The charts of a run: one Plotly figure each, with one cursor and one zoom for all.

import { h } from "./dom.js";
import { isNumber, number } from "./format.js";
import { abscissa, position, smooth } from "./series.js";

const AXIS_NAMES = { step: "step", tokens: "million tokens", time: "minutes" };
const MARKS = 120; // vertical lines in a chart at most

let loading;
export function loadPlotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/plotly.min.js";
    script.onload = () => resolve(window.Plotly || window.moduleName);
    script.onerror = () => reject(new Error("The charts could not be loaded."));
    document.head.append(script);
  });
  return loading;
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return {
    text: of("--soft"), ink: of("--ink"), grid: of("--grid"), panel: of("--panel"), line: of("--line"),
    lines: [of("--c1"), of("--c2"), of("--c3"), of("--c4"), of("--c5"), of("--c6")],
    family: style.fontFamily, other: of("--other"), bad: of("--bad"), warn: of("--warn"), mark: of("--mark"), stage: of("--stage"),
  };
}

export class Charts {
  // `specs`: [{id, title, wide, log, format, series: [{name, label, dash, points}]}]; empty ones hide themselves.
  constructor(specs) {
    this.element = h("div", { class: "charts" });
    this.specs = specs;
    this.figures = new Map();
    this.range = null;
    this.options = { weight: 0.6, log: false, by: "step" };
    this.hovering = false;
    for (const spec of specs) {
      const plot = h("div", { class: "plot" });
      const note = h("span", { class: "note" });
      const box = h(
        "figure",
        { class: `chart panel${spec.wide ? " wide" : ""}`, "data-testid": `chart-${spec.id}`, hidden: true },
        h("figcaption", {}, h("span", {}, spec.title), note), plot,
      );
      this.figures.set(spec.id, { spec, box, plot, note, drawn: false, near: false, waits: null });
      this.element.append(box);
    }
    // Only what is on the screen, or nearly, is drawn; the rest when it gets there.
    this.watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const figure = [...this.figures.values()].find((each) => each.box === entry.target);
        figure.near = entry.isIntersecting;
        if (figure.near && figure.waits) this.render(figure);
      }
    }, { rootMargin: "500px 0px" });
    for (const { box } of this.figures.values()) this.watcher.observe(box);
  }

  async draw(data, other, otherName) {
    this.plotly = await loadPlotly();
    const palette = colours();
    for (const figure of this.figures.values()) {
      if (this.gone) return;
      const there = [data, other].some((each) => each && figure.spec.series.some(({ name }) => each.series.get(name)?.value.some(isNumber)));
      figure.box.hidden = !there;
      if (!there) continue;
      const main = figure.spec.series.map((each) => data.lastFinite(each.name)).find(isNumber);
      figure.note.textContent = isNumber(main) ? (figure.spec.format ?? number)(main) : "";
      figure.plot.setAttribute("role", "img");
      figure.plot.setAttribute("aria-label", `${figure.spec.title}, last value ${figure.note.textContent || "none"}`);
      figure.waits = () => {
        const traces = this.traces(figure.spec, data, other, otherName, palette);
        return [traces, this.layout(figure.spec, data, palette, traces)];
      };
      if (figure.near || figure.spec.wide) {
        this.render(figure);
        this.ondrawn?.();
        await new Promise((resolve) => setTimeout(resolve)); // the browser shows it before the next one
      }
    }
  }

  render(figure) {
    const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
    this.plotly.react(figure.plot, ...figure.waits(), config);
    figure.waits = null;
    if (!figure.drawn) {
      figure.drawn = true;
      this.listen(this.plotly, figure);
    }
  }

  traces(spec, data, other, otherName, palette) {
    const { weight, by } = this.options;
    const traces = [];
    const template = `%{y:.5g}<extra></extra>`;
    spec.series.forEach((each, place) => {
      for (const [source, foreign] of [[data, false], [other, true]]) {
        const series = source?.series.get(each.name);
        if (!series || !series.value.some(isNumber)) continue;
        const scale = each.scale ?? 1;
        const x = abscissa(source, series, by);
        const y = series.value.map((value) => (isNumber(value) ? value * scale : null));
        const colour = foreign ? palette.other : palette.lines[(each.colour ?? place) % palette.lines.length];
        const name = foreign ? `${each.label} · ${plain(otherName)}` : each.label;
        const line = { color: colour, width: foreign ? 1.5 : 2, dash: foreign ? "dot" : each.dash };
        const smoothed = spec.smooth && !each.points && weight > 0 && y.length > 2;
        if (smoothed) {
          traces.push({
            x, y, name, mode: "lines", line: { color: colour, width: 1 }, opacity: foreign ? 0.18 : 0.28,
            hoverinfo: "skip", showlegend: false,
          });
        }
        traces.push({
          x, y: smoothed ? smooth(y, weight) : y, name, mode: each.points || y.length < 3 ? "lines+markers" : "lines", line,
          marker: { size: each.points ? 6 : 4, color: colour }, hovertemplate: template, connectgaps: Boolean(each.points),
        });
        const gaps = gapMarks(x, y);
        if (gaps.x.length) {
          traces.push({
            ...gaps, name: "not finite", mode: "markers", hovertemplate: "not finite<extra></extra>", showlegend: false,
            marker: { symbol: "x", size: 8, color: palette.bad },
          });
        }
      }
    });
    return traces;
  }

  layout(spec, data, palette, traces) {
    const { by, log } = this.options;
    const axis = {
      gridcolor: palette.grid, zeroline: false, linecolor: palette.line, tickfont: { color: palette.text, size: 11 },
      automargin: true, fixedrange: false, ticks: "",
    };
    const named = new Set(traces.filter((trace) => trace.showlegend !== false).map((trace) => trace.name));
    return {
      autosize: true, margin: { l: 8, r: 12, t: named.size > 1 ? 28 : 10, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", font: { family: palette.family, color: palette.text, size: 11 }, hovermode: "x unified",
      hoverlabel: { bgcolor: palette.panel, bordercolor: palette.line, font: { color: palette.ink, size: 12 } },
      dragmode: "zoom", showlegend: named.size > 1, uirevision: by,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11, color: palette.text } },
      xaxis: {
        ...axis, showgrid: false, title: { text: AXIS_NAMES[by], font: { size: 11, color: palette.text }, standoff: 6 },
        showspikes: true, spikemode: "across", spikethickness: 1, spikedash: "solid", spikecolor: palette.mark,
        spikesnap: "hovered data", hoverformat: by === "step" ? ",d" : ".4g", unifiedhovertitle: { text: `${AXIS_NAMES[by]} %{x}` },
        ...(this.range ? { range: this.range, autorange: false } : { autorange: true }),
      },
      yaxis: {
        ...axis, fixedrange: true, type: log || spec.log ? "log" : "linear", nticks: 5, tickformat: spec.tick,
        exponentformat: "e",
      },
      ...this.marks(data, palette, spec.wide),
    };
  }

  marks(data, palette, named) {
    const { by } = this.options;
    const shapes = [], annotations = [];
    const line = (step, colour, dash, width = 1) => {
      const x = position(data, step, by);
      if (x === null) return;
      shapes.push({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", layer: "below", line: { color: colour, dash, width } });
      return x;
    };
    const events = data.events.slice(-2 * MARKS);
    const stages = events.filter((event) => event.event === "stage");
    for (const event of events.filter((each) => each.event !== "stage").slice(-MARKS)) {
      if (event.event === "checkpoint") line(event.step, palette.mark, "dot");
      else if (event.event === "pause") line(event.step, palette.warn, "dash");
      else if (event.event === "non_finite_gradient") line(event.step, palette.bad, "dot");
      else line(event.step, palette.stage, "dash");
    }
    for (const stage of stages.slice(0, 24)) {
      const x = line(stage.step, palette.stage, "solid", 1.5);
      if (named && x !== undefined && x !== null) {
        annotations.push({
          x, y: 1, yref: "paper", yanchor: "top", xanchor: "left", xshift: 3, showarrow: false, font: { size: 10, color: palette.stage },
          text: plain(stage.name),
        });
      }
    }
    for (const alert of data.alerts.slice(-40)) {
      line(alert.step, levelOf(alert) === "error" ? palette.bad : palette.warn, "solid");
    }
    return { shapes, annotations };
  }

  listen(plotly, figure) {
    const others = () => [...this.figures.values()].filter((each) => each !== figure && each.drawn && !each.box.hidden);
    figure.plot.on("plotly_relayout", (change) => {
      const begin = change["xaxis.range[0]"] ?? change["xaxis.range"]?.[0];
      const end = change["xaxis.range[1]"] ?? change["xaxis.range"]?.[1];
      if (begin !== undefined && end !== undefined) this.zoom(plotly, [begin, end], figure);
    });
    figure.plot.on("plotly_doubleclick", () => this.zoom(plotly, null, null));
    figure.plot.on("plotly_hover", (event) => {
      if (this.hovering || !event.points?.length) return;
      this.hovering = true;
      const x = event.xvals?.[0] ?? event.points[0].x;
      for (const each of others()) hoverAt(plotly, each.plot, x);
      this.hovering = false;
    });
    figure.plot.on("plotly_unhover", () => {
      if (this.hovering) return;
      this.hovering = true;
      for (const each of others()) plotly.Fx.unhover(each.plot);
      this.hovering = false;
    });
  }

  async zoom(plotly, range, source) {
    if (this.zooming) return;
    this.zooming = true;
    this.range = range;
    const change = range ? { "xaxis.range": range, "xaxis.autorange": false } : { "xaxis.autorange": true };
    const drawn = [...this.figures.values()].filter((each) => each !== source && each.drawn && !each.box.hidden);
    await Promise.all(drawn.map((each) => plotly.relayout(each.plot, change)));
    this.zooming = false;
    this.onzoom?.(range !== null);
  }

  async resetZoom() {
    await this.zoom(await loadPlotly(), null, null);
  }

  remove() {
    this.gone = true;
    this.watcher.disconnect();
    for (const { plot, drawn } of this.figures.values()) if (drawn) (window.Plotly || window.moduleName).purge(plot);
  }
}

// Labels are a small markup of their own to Plotly.
function plain(text) {
  return String(text).replace(/[<>&]/g, " ").slice(0, 40);
}

function hoverAt(plotly, plot, x) {
  try {
    plotly.Fx.hover(plot, { xval: x }, "xy");
  } catch {
    // a chart without a point there shows nothing
  }
}

// Crosses where values are missing, at the height of the last one before.
function gapMarks(x, y) {
  const marks = { x: [], y: [] };
  let height = y.find(isNumber);
  y.forEach((value, place) => {
    if (isNumber(value)) height = value;
    else {
      marks.x.push(x[place]);
      marks.y.push(height);
    }
  });
  return marks;
}

export function levelOf(alert) {
  const level = String(alert.level ?? "").toLowerCase();
  return level.startsWith("err") || level.startsWith("crit") ? "error" : level.startsWith("warn") ? "warn" : "info";
}
