// ---- looks --------------------------------------------------------------------------------------------------------

const colour = (model) => (model.base ? "var(--base)" : `var(--v${model.index % COLOURS})`);
const symbol = (model) => (model.base ? SYMBOLS[0] : SYMBOLS[model.index % SYMBOLS.length]);
const dash = (model) => (model.base ? "3,3" : DASHES[Math.floor(model.index / COLOURS) % DASHES.length]);
const modelNamed = (name) => models.find((model) => !model.base && model.name === name);

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const mark = (model) => drawnMark(symbol(model), colour(model));

function drawnMark(symbol, colour) {
  const svg = d3.create("svg").attr("width", 14).attr("height", 14).attr("viewBox", "-7 -7 14 14").attr("aria-hidden", "true");
  svg.append("path").attr("d", d3.symbol(symbol, 70)()).style("fill", colour);
  return svg.node();
}

const key = (model, text = model.name) => el("span", { class: "key" }, mark(model), text);
const cut = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
const place = (id) => document.getElementById(id);
const fill = (id, ...children) => place(id).replaceChildren(...children.filter(Boolean));
const widthOf = (node) => Math.max(240, node.clientWidth - parseFloat(getComputedStyle(node).paddingLeft) - parseFloat(getComputedStyle(node).paddingRight));
const empty = (text) => el("p", { class: "note" }, text);
const legend = (entries) => el("div", { class: "legend" }, ...entries);

function plot(options) {
  const made = Plot.plot({ style: { fontSize: "12px", background: "none" }, ...options });
  made.classList.add("plot");
  made.setAttribute("role", "img");
  // Plot names the groups inside, which a reader of the whole picture by its name never meets.
  for (const group of made.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label");
  return made;
}

function table(head, rows) {
  const cell = (content, tag) => {
    const scope = tag === "th" ? { scope: "row" } : {};
    if (content === null || content === undefined) return el(tag, scope, "–");
    if (typeof content === "string" || content instanceof Node) return el(tag, scope, content);
    if (content.seeds) return el(tag, { class: "seeds" }, content.seeds);
    return el(tag, content.clear ? { class: "clear" } : {}, content.main, el("small", {}, content.small));
  };
  return el(
    "table", {},
    el("thead", {}, el("tr", {}, ...head.map((one) => el("th", { scope: "col" }, one)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((one, index) => cell(one, index ? "td" : "th"))))),
  );
}


/** What scrolls can be reached and scrolled with the keyboard; what does not is skipped by the Tab key. */
function makeScrollable() {
  for (const box of document.querySelectorAll(".scroll, .toolbar, pre")) {
    const scrolls = box.scrollWidth > box.clientWidth || (box.matches(".toolbar") && box.scrollHeight > box.clientHeight);
    if (scrolls) box.setAttribute("tabindex", "0");
    else box.removeAttribute("tabindex");
  }
}

/** The figures of a chart's lines, for those who cannot point at them. */
function figuresOf(series, x) {
  const rows = series.filter((one) => one.points.length).map((one) => {
    const ys = one.points.map((point) => point.y), last = one.points[one.points.length - 1];
    return [one.name, short(ys[0]), short(last.y), short(d3.min(ys)), short(d3.max(ys)), short(last.x)];
  });
  const made = el("details", {}, el("summary", {}, "In figures"), el("div", { class: "scroll" }, table(["line", "first", "last", "lowest", "highest", `${x} at its end`], rows)));
  made.addEventListener("toggle", makeScrollable);
  return made;
}
