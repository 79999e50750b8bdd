// A report as elements: headings, paragraphs, lists, tables, code, images. What is not known stays text.

import { h } from "./dom.js";

const FENCE = /^(`{3,})[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^\s*[-*]\s+/;
const ROW = /^\s*\|/;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"' };
const PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"; // what a backslash makes plain

export function render(text, image) {
  const blocks = [], lines = text.split("\n");
  let place = 0;
  const take = (test) => {
    const found = [];
    while (place < lines.length && test(lines[place])) found.push(lines[place++]);
    return found;
  };
  while (place < lines.length) {
    const line = lines[place];
    const heading = HEADING.exec(line), fence = FENCE.exec(line);
    if (!line.trim()) place += 1;
    else if (heading) {
      blocks.push(h(`h${Math.min(6, heading[1].length + 1)}`, {}, inline(heading[2], image)));
      place += 1;
    } else if (fence) {
      place += 1;
      blocks.push(h("pre", {}, take((each) => !closes(each, fence[1].length)).join("\n")));
      place += 1;
    } else if (ROW.test(line)) blocks.push(table(take((each) => ROW.test(each)), image));
    else if (ITEM.test(line)) {
      blocks.push(h("ul", {}, take((each) => ITEM.test(each)).map((each) => h("li", {}, inline(each.replace(ITEM, ""), image)))));
    } else {
      const paragraph = take((each) => each.trim() && ![FENCE, HEADING, ITEM, ROW].some((start) => start.test(each)));
      blocks.push(h("p", {}, inline(paragraph.join(" "), image)));
    }
  }
  return blocks;
}

// A fence ends with as many backticks as it began with, or more, and nothing else.
function closes(line, ticks) {
  const found = /^(`{3,})\s*$/.exec(line);
  return found !== null && found[1].length >= ticks;
}

function table(lines, image) {
  const isRule = (line) => /^[\s|:-]+$/.test(line);
  const ruled = lines.length > 1 && isRule(lines[1]);
  const rows = lines.filter((_, place) => !(ruled && place === 1)).map(cells);
  const head = ruled ? rows.shift() : null;
  return h("div", { class: "scroll" }, h("table", {},
    head ? h("thead", {}, h("tr", {}, head.map((cell) => h("th", {}, inline(cell, image))))) : null,
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, inline(cell, image))))))));
}

// The cells of a row, whose bars have no backslash before them.
function cells(line) {
  const text = line.trim().slice(1), found = [""];
  for (let place = 0; place < text.length; place += 1) {
    if (text[place] === "|") found.push("");
    else {
      found[found.length - 1] += text[place];
      if (text[place] === "\\" && place + 1 < text.length) found[found.length - 1] += text[++place];
    }
  }
  if (found.length > 1 && !found.at(-1).trim()) found.pop(); // behind the last bar
  return found.map((cell) => cell.trim());
}

// The parts of a line: text, code, strong text, images. `place` goes on from one to the next, once over the text.
function inline(text, image) {
  const parts = [], absent = new Set(); // ends that were looked for and are not there
  let plain = "", place = 0;
  const end = (mark, from) => {
    if (absent.has(mark)) return -1;
    const found = mark.startsWith("`") ? closingTicks(text, mark.length, from) : unescaped(text, mark, from);
    if (found < 0) absent.add(mark);
    return found;
  };
  const add = (part, next) => {
    parts.push(plain, part);
    plain = "";
    place = next;
  };
  while (place < text.length) {
    const here = text[place], ticks = here === "`" ? /`+/y : null;
    if (here === "\\" && PUNCTUATION.includes(text[place + 1] ?? " ")) {
      plain += text[place + 1];
      place += 2;
      continue;
    }
    const entity = here === "&" ? /&(amp|lt|gt|quot);/y : null;
    if (entity) {
      entity.lastIndex = place;
      const found = entity.exec(text);
      plain += found ? ENTITIES[found[1]] : here;
      place += found ? found[0].length : 1;
      continue;
    }
    if (ticks) {
      ticks.lastIndex = place;
      const mark = ticks.exec(text)[0], close = end(mark, place + mark.length);
      if (close >= 0) add(h("code", {}, text.slice(place + mark.length, close)), close + mark.length);
      else {
        plain += mark;
        place += mark.length;
      }
      continue;
    }
    if (text.startsWith("**", place)) {
      const close = end("**", place + 2);
      if (close > place + 2) {
        add(h("strong", {}, inline(text.slice(place + 2, close), image)), close + 2);
        continue;
      }
    } else if (text.startsWith("![", place)) {
      const middle = end("](", place + 2), close = middle < 0 ? -1 : end(")", middle + 2);
      if (close >= 0) {
        add(image(text.slice(middle + 2, close), plainText(text.slice(place + 2, middle))), close + 1);
        continue;
      }
    }
    plain += here;
    place += 1;
  }
  return [...parts, plain].filter((part) => part !== "");
}

function plainText(text) {
  return h("span", {}, inline(text, (_, title) => title)).textContent;
}

// The place of the next such mark that no backslash makes plain.
function unescaped(text, mark, from) {
  for (let place = from; place < text.length; place += text[place] === "\\" ? 2 : 1) if (text.startsWith(mark, place)) return place;
  return -1;
}

function closingTicks(text, length, from) {
  for (const found of text.slice(from).matchAll(/`+/g)) if (found[0].length === length) return from + found.index;
  return -1;
}
