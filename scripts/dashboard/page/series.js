// What is known of a run: its series and records, as the messages of the server tell it. Pure, no page in it.

import { isNumber } from "./format.js";

const KEEP = 6000; // points of a series; then it is thinned to half of that
const KEEP_SAMPLES = 60, KEEP_LIST = 1000;

export class RunData {
  constructor() {
    this.state = {};
    this.clear();
  }

  clear() {
    this.series = new Map();
    this.events = [];
    this.samples = [];
    this.epochs = [];
    this.alerts = [];
    this.version = 0;
  }

  apply(message) {
    this.version += 1;
    if (message.type === "reset") this.clear();
    else if (message.type === "snapshot") this.restore(message);
    else if (message.type === "state") this.state = message.state;
    else if (message.type === "metrics") for (const record of message.records) this.add(record);
    else if (message.type === "epoch_progress") {
      this.epochs.push({ ...message.metrics, time: message.timestamp });
      this.epochs = this.epochs.slice(-KEEP_LIST);
    } else if (message.type === "alert") this.alerts = [...this.alerts, message.alert].slice(-KEEP_LIST);
  }

  restore(message) {
    this.clear();
    for (const [name, series] of Object.entries(message.series)) this.series.set(name, series);
    this.events = message.events;
    this.samples = message.samples;
    this.epochs = message.epochs;
    this.alerts = message.alerts;
  }

  add(record) {
    if (record.kind === "event") {
      if (record.event === "sample") this.samples = [...this.samples, record].slice(-KEEP_SAMPLES);
      else this.events = [...this.events, record].slice(-KEEP_LIST);
      return;
    }
    for (const [name, value] of Object.entries(record)) {
      if (!name.includes("/") && !name.endsWith("_seconds")) continue;
      if (value !== null && typeof value !== "number") continue;
      let series = this.series.get(name);
      if (!series) this.series.set(name, (series = { step: [], time: [], value: [] }));
      series.step.push(record.step);
      series.time.push(record.time);
      series.value.push(value);
      if (series.step.length > KEEP) this.series.set(name, thin(series, KEEP / 2));
    }
  }

  last(name) {
    const series = this.series.get(name);
    return series && series.value.length ? series.value[series.value.length - 1] : undefined;
  }

  lastFinite(name) {
    const values = this.series.get(name)?.value ?? [];
    for (let place = values.length - 1; place >= 0; place -= 1) if (isNumber(values[place])) return values[place];
    return undefined;
  }

  best(name) {
    const series = this.series.get(name);
    let found;
    series?.value.forEach((value, place) => {
      if (isNumber(value) && (!found || value < found.value)) found = { value, step: series.step[place] };
    });
    return found;
  }
}

// The smallest and largest of each bucket, and a gap where it has one.
export function thin(series, points) {
  const size = Math.ceil((3 * series.step.length) / points);
  const kept = [];
  for (let begin = 0; begin < series.step.length; begin += size) {
    let low = -1, high = -1, gap = -1;
    for (let place = begin; place < Math.min(begin + size, series.step.length); place += 1) {
      const value = series.value[place];
      if (!isNumber(value)) gap = place;
      else {
        if (low < 0 || value < series.value[low]) low = place;
        if (high < 0 || value > series.value[high]) high = place;
      }
    }
    kept.push(...new Set([low, high, gap].filter((place) => place >= 0)));
  }
  kept.sort((a, b) => a - b);
  const pick = (column) => kept.map((place) => column[place]);
  return { step: pick(series.step), time: pick(series.time), value: pick(series.value) };
}

// Exponential moving average without the pull towards its start; gaps stay gaps.
export function smooth(values, weight) {
  if (!weight) return values;
  let mean = 0, scale = 1;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    mean = weight * mean + (1 - weight) * value;
    scale *= weight;
    return Number((mean / (1 - scale)).toPrecision(12)); // or a constant would wobble
  });
}

// The x of each point of a series: its step, the tokens trained until then (in millions), or minutes since the start.
export function abscissa(data, series, by) {
  if (by === "step") return series.step;
  if (by === "time") {
    const start = data.series.get("train/loss")?.time[0] ?? series.time[0];
    return series.time.map((time) => (isNumber(time) ? (time - start) / 60 : null));
  }
  return series.step.map((step) => position(data, step, by));
}

// The x of a step.
export function position(data, step, by) {
  if (by === "step") return step;
  const known = by === "time" ? data.series.get("train/loss") : data.series.get("train/tokens");
  if (!known || !known.step.length) return null;
  const start = by === "time" ? known.time[0] : 0;
  const at = (place) => (by === "time" ? (known.time[place] - start) / 60 : (known.value[place] ?? 0) / 1e6);
  let low = 0, high = known.step.length - 1;
  if (step <= known.step[low]) return by === "time" ? at(0) : (at(0) * step) / Math.max(1, known.step[0]);
  if (step >= known.step[high]) return at(high);
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (known.step[middle] <= step) low = middle;
    else high = middle;
  }
  const share = (step - known.step[low]) / (known.step[high] - known.step[low]);
  return at(low) + share * (at(high) - at(low));
}
