// A new run from a form, whose fields are the flags of the trainer.

import { get, post } from "./api.js";
import { h, put, say } from "./dom.js";

const COMMON = [
  "data_path", "val_fraction", "from_weight", "epochs", "max_steps", "batch_size", "learning_rate", "max_seq_len", "lr_schedule",
  "warmup_ratio", "device", "log_interval", "save_interval", "seed",
];
const LEFT_OUT = new Set(["save_dir", "config", "dry_run", "from_resume"]);
const TITLES = { data: "Data", model: "Model", training: "Training", hardware: "Hardware", run: "Run and records" };

function field(flag) {
  const id = `flag-${flag.name}`, describe = `${id}-help ${id}-error`;
  const shown = flag.kind === "bool" ? (flag.default ? "1" : "0") : flag.default === null ? "" : String(flag.default);
  const common = { id, name: flag.name, "aria-describedby": describe, "data-default": shown };
  let input;
  if (flag.choices.length || flag.kind === "bool") {
    const choices = flag.kind === "bool" ? ["1", "0"] : flag.choices;
    const words = { 1: "yes", 0: "no" };
    input = h("select", common, choices.map((choice) =>
      h("option", { value: choice }, flag.kind === "bool" ? words[choice] : choice)));
    input.value = shown;
  } else {
    input = h("input", {
      ...common, type: "text", autocomplete: "off", spellcheck: "false", placeholder: shown || (flag.optional ? "not set" : ""),
      inputmode: flag.kind === "int" ? "numeric" : flag.kind === "float" ? "decimal" : undefined,
    });
  }
  return h(
    "div", { class: "field", "data-flag": flag.name }, h("label", { for: id }, flag.name.replaceAll("_", " ")), input,
    h("p", { class: "help", id: `${id}-help` }, flag.help), h("p", { class: "error", id: `${id}-error`, hidden: true }),
  );
}

export function showForm(main) {
  let gone = false;
  put(main, h("p", { class: "faint" }, "Loading the flags."));
  Promise.all([fetch("/flags.json").then((answer) => answer.json()), get("/runs"), get("/system")])
    .then(([table, { runs_dir: runsDir, runs }, system]) => {
      if (!gone) build(main, table, runsDir, new Set(runs.map((run) => run.id)), system);
    })
    .catch((error) => {
      if (!gone && error.status !== 401) put(main, h("p", { class: "problem", role: "alert" }, "The form could not be loaded."));
    });
  return () => {
    gone = true;
  };
}

function freshName(taken, base) {
  for (let number = 1; ; number += 1) {
    const name = number === 1 ? base : `${base}-${number}`;
    if (!taken.has(name)) return name;
  }
}

function build(main, table, runsDir, taken, system) {
  const flags = new Map(table.flags.map((flag) => [flag.name, flag]));
  const common = COMMON.filter((name) => flags.has(name)).map((name) => field(flags.get(name)));
  const name = h("input", {
    id: "flag-save_dir", name: "save_dir", type: "text", required: true, autocomplete: "off", spellcheck: "false",
    "aria-describedby": "flag-save_dir-help flag-save_dir-error",
  });
  name.value = freshName(taken, "run");
  const processes = h("input", {
    id: "flag-processes", name: "processes", type: "text", inputmode: "numeric", autocomplete: "off",
    "aria-describedby": "flag-processes-help flag-processes-error",
  });
  processes.value = String(Math.max(1, system.gpus.length));
  const special = [
    h("div", { class: "field", "data-flag": "save_dir" }, h("label", { for: "flag-save_dir" }, "name"), name,
      h("p", { class: "help", id: "flag-save_dir-help" }, `a new directory in ${runsDir}`),
      h("p", { class: "error", id: "flag-save_dir-error", hidden: true })),
    h("div", { class: "field", "data-flag": "processes" }, h("label", { for: "flag-processes" }, "processes"), processes,
      h("p", { class: "help", id: "flag-processes-help" }, "one for each GPU; on a CPU one is a good start"),
      h("p", { class: "error", id: "flag-processes-error", hidden: true })),
  ];
  const groups = Object.keys(TITLES).map((group) => {
    const fields = table.flags.filter((flag) => flag.group === group && !COMMON.includes(flag.name) && !LEFT_OUT.has(flag.name)).map(field);
    return h("details", { class: "panel group" }, h("summary", {}, TITLES[group] ?? group, h("span", { class: "count" }, String(fields.length))),
      h("div", { class: "fields" }, fields));
  });
  const search = h("input", { type: "search", placeholder: "Find a flag", "aria-label": "Find a flag", class: "search" });
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const command = h("code", {});
  const submit = h("button", { class: "button primary", type: "submit" }, "Start training");
  const demo = h("button", { class: "button", type: "button" }, "Fill in the demo");
  const form = h(
    "form", { class: "setup", novalidate: true },
    h("div", { class: "title" }, h("h1", {}, "New run"), demo),
    problem,
    h("section", { class: "panel" }, h("h2", { class: "sr" }, "Common"), h("div", { class: "fields" }, special, common)),
    h("div", { class: "more" }, h("h2", {}, "All other flags"), search), groups,
    h("section", { class: "panel command" }, h("h2", {}, "What will be started"), command),
    h("div", { class: "bottom" }, submit, h("a", { class: "button", href: "#/" }, "Cancel")),
  );
  put(main, form);

  const inputs = () => [...form.elements].filter((each) => each.name);
  const values = () => {
    const found = {};
    for (const input of inputs()) {
      const text = input.value.trim();
      if (input.name === "save_dir") found.save_dir = `${runsDir}/${text}`;
      else if (text !== "" && (input.name === "processes" || text !== input.dataset.default)) found[input.name] = text;
    }
    found.data_path ??= "demo"; // without one the trainer takes the whole configuration of the demo
    return found;
  };
  const preview = () => {
    const { processes: number = "1", ...rest } = values();
    const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`);
    const words = Object.entries(rest).map(([flag, value]) => quoted(`--${flag}=${value}`));
    const line = ["torchrun", "--standalone", `--nproc_per_node=${number}`, "train_full_sft.py", ...words];
    put(command, line.flatMap((word) => [h("span", {}, word), " "]));
    for (const input of inputs()) input.closest(".field")?.classList.toggle("changed", "default" in input.dataset && input.value.trim() !== "" && input.value.trim() !== input.dataset.default);
  };
  const fill = () => {
    for (const input of inputs()) {
      const value = table.demo[input.name];
      if (value !== undefined) input.value = String(value);
    }
    name.value = freshName(taken, "demo");
    preview();
  };
  const showErrors = (errors) => {
    let first = null;
    for (const each of form.querySelectorAll(".field")) {
      const said = errors[each.dataset.flag];
      const place = each.querySelector(".error"), input = each.querySelector("input, select");
      place.hidden = !said;
      say(place, said ? said.join("\n") : "");
      each.classList.toggle("wrong", Boolean(said));
      if (said) {
        input.setAttribute("aria-invalid", "true");
        each.closest("details")?.setAttribute("open", "");
        first ??= input;
      } else input.removeAttribute("aria-invalid");
    }
    const rest = Object.entries(errors).filter(([flag]) => !form.querySelector(`[data-flag="${CSS.escape(flag)}"]`)).flatMap(([, said]) => said);
    problem.hidden = rest.length === 0;
    say(problem, rest.join("\n"));
    first?.focus();
  };
  demo.addEventListener("click", fill);
  form.addEventListener("input", (event) => {
    if (event.target !== search) preview();
  });
  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    for (const group of groups) {
      let hits = 0;
      for (const each of group.querySelectorAll(".field")) {
        const hit = !wanted || each.textContent.toLowerCase().includes(wanted) || each.dataset.flag.includes(wanted);
        each.hidden = !hit;
        hits += hit;
      }
      group.hidden = hits === 0;
      group.open = Boolean(wanted) && hits > 0;
    }
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    submit.disabled = true;
    showErrors({});
    try {
      const { id } = await post("/runs", values());
      location.hash = `#/run/${encodeURIComponent(id)}`;
    } catch (error) {
      if (error.status === 422) showErrors(error.body.errors);
      else showErrors({ "": [error.message] });
    } finally {
      submit.disabled = false;
    }
  });
  if (sessionStorage.getItem("preset") === "demo") {
    sessionStorage.removeItem("preset");
    fill();
  }
  preview();
  name.focus();
  name.select();
}
