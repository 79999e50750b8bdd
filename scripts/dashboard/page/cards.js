// The figures of a run, one card each.

import { h, say } from "./dom.js";
import { ago, bytes, count, isNumber, number, percent, short } from "./format.js";
import { smooth } from "./series.js";

const CARDS = ["loss", "eval", "lr", "norm", "speed", "tokens", "mfu", "memory", "checkpoint", "early-stop"];

export class Cards {
  constructor() {
    this.cards = new Map();
    this.details = {}; // what the server says of the run besides its series
    this.config = {};
    this.element = h("section", { class: "cards", "aria-label": "Figures" });
  }

  card(name, label, value, detail = "") {
    let card = this.cards.get(name);
    if (!card) {
      const [valueText, detailText] = [h("span", { class: "value" }), h("span", { class: "detail" })];
      card = { box: h("div", { class: "card panel", "data-testid": `card-${name}` }, h("span", { class: "label" }, label), valueText, detailText), valueText, detailText };
      this.cards.set(name, card);
      const later = CARDS.slice(CARDS.indexOf(name) + 1).map((each) => this.cards.get(each)?.box).find(Boolean);
      this.element.insertBefore(card.box, later ?? null);
      this.element.className = `cards in-${Math.ceil(this.cards.size / Math.ceil(this.cards.size / 6))}`;
    }
    say(card.valueText, value);
    say(card.detailText, detail);
  }

  update(data) {
    this.data = data;
    const { details } = this;
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
}
