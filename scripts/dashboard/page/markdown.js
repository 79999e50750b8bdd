// A report as elements: headings, paragraphs, lists, tables, code, images. What is not known stays text.

import { h } from "./dom.js";

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
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (!line.trim()) place += 1;
    else if (heading) {
      blocks.push(h(`h${Math.min(6, heading[1].length + 1)}`, {}, inline(heading[2], image)));
      place += 1;
    } else if (line.startsWith("```")) {
      place += 1;
      blocks.push(h("pre", {}, take((each) => !each.startsWith("```")).join("\n")));
      place += 1;
    } else if (line.trim().startsWith("|")) blocks.push(table(take((each) => each.trim().startsWith("|")), image));
    else if (/^\s*[-*]\s+/.test(line)) {
      blocks.push(h("ul", {}, take((each) => /^\s*[-*]\s+/.test(each)).map((each) => h("li", {}, inline(each.replace(/^\s*[-*]\s+/, ""), image)))));
    } else {
      const paragraph = take((each) => each.trim() && !/^(#{1,6}\s|```|\||\s*[-*]\s)/.test(each));
      blocks.push(h("p", {}, inline((paragraph.length ? paragraph : [lines[place++]]).join(" "), image)));
    }
  }
  return blocks;
}

function table(lines, image) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const isRule = (line) => /^[\s|:-]+$/.test(line);
  const ruled = lines.length > 1 && isRule(lines[1]);
  const rows = lines.filter((line) => !isRule(line)).map(cells);
  const head = ruled ? rows.shift() : null;
  return h("div", { class: "scroll" }, h("table", {},
    head ? h("thead", {}, h("tr", {}, head.map((cell) => h("th", {}, inline(cell, image))))) : null,
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, inline(cell, image))))))));
}

function inline(text, image) {
  return text.split(/(!\[[^\]]*\]\([^)]*\)|`[^`]+`|\*\*[^*]+\*\*)/).map((part) => {
    const picture = /^!\[([^\]]*)\]\(([^)]*)\)$/.exec(part);
    if (picture) return image(picture[2], picture[1]);
    if (/^`[^`]+`$/.test(part)) return h("code", {}, part.slice(1, -1));
    if (/^\*\*[^*]+\*\*$/.test(part)) return h("strong", {}, part.slice(2, -2));
    return part;
  });
}
