// The page: which view is shown, and who may see it.

import { setToken, takeToken, whenUnknown } from "./api.js";
import { h, put, say } from "./dom.js";
import { showForm } from "./form.js";
import { showRuns } from "./list.js";
import { showRun } from "./run.js";

const main = document.getElementById("main");
const crumbs = document.getElementById("crumbs");
const link = document.getElementById("link");
let leave = () => {};

window.__dashboard = { view: "", series: () => null };

export function showLink(status) {
  link.hidden = status === null;
  link.className = `link ${status}`;
  say(link, status ?? "");
}

function askForToken() {
  leave();
  leave = () => {};
  showLink(null);
  put(crumbs);
  const field = h("input", { id: "token", type: "password", autocomplete: "off", required: true, spellcheck: "false" });
  const form = h(
    "form", { class: "panel gate", onsubmit: (event) => {
      event.preventDefault();
      setToken(field.value);
      route();
    } },
    h("h1", {}, "Token needed"),
    h("p", {}, "Open the address that the server printed when it started, or paste the part behind #token= here."),
    h("label", { for: "token" }, "Token"), field, h("button", { class: "button primary" }, "Open"),
  );
  put(main, form);
}

function route() {
  leave();
  leave = () => {};
  showLink(null);
  main.classList.remove("arrive");
  const [, view, id] = /^#\/(?:(run)\/(.+)|new)?$/.exec(location.hash) || [];
  window.__dashboard = { view: view || (location.hash === "#/new" ? "new" : "runs"), series: () => null };
  document.getElementById("new-run").hidden = location.hash === "#/new";
  put(crumbs);
  const crumb = (text) => put(crumbs, h("a", { href: "#/" }, "Runs"), h("span", { "aria-hidden": "true" }, "/"), h("span", {}, text));
  if (view === "run") {
    let name;
    try {
      name = decodeURIComponent(id);
    } catch {
      name = id;
    }
    crumb(name);
    document.title = `${name} · Runs`;
    leave = showRun(main, name, showLink);
  } else if (location.hash === "#/new") {
    crumb("New run");
    document.title = "New run";
    leave = showForm(main);
  } else {
    document.title = "Runs";
    leave = showRuns(main);
  }
  window.scrollTo(0, 0);
}

const known = takeToken();
whenUnknown(askForToken);
window.addEventListener("hashchange", () => {
  if (location.hash.startsWith("#token=")) takeToken();
  route();
});
if (known) route();
else askForToken();
