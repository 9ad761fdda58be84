"use strict";
// The page's charts (Observable Plot) and tables, drawn from the JSON beside this script. Text goes in as text, never
// as HTML: names and prompts are other people's.

const data = JSON.parse(document.getElementById("data").textContent);
const MEAN = "mean";
const BASE = { name: "base", base: true };
const COLOURS = 6;
const SYMBOLS = [d3.symbolCircle, d3.symbolTriangle, d3.symbolSquare, d3.symbolDiamond, d3.symbolStar, d3.symbolWye, d3.symbolCross];
const DASHES = ["", "6,3", "2,3"];

const models = [BASE, ...data.variants.map((variant, index) => ({ ...variant, base: false, index }))];
const state = {
  view: data.views[0]?.key, // none where nothing was evaluated
  verdict: Object.keys(data.verdicts)[0],
  hidden: new Set(),
  minus: -1,
  tag: MEAN,
  metric: "",
  axis: "step",
  run: 0,
};

// ---- figures ------------------------------------------------------------------------------------------------------

const percent = (value) => (100 * value).toFixed(1);
const signed = (value) => (value <= -0.0005 ? "−" : "+") + Math.abs(100 * value).toFixed(1);
const short = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString().replace("-", "−"));
const interval = (part, format) => `[${format(part[1])}, ${format(part[2])}]`;
const clear = (part) => part[1] > 0 || part[2] < 0;

const view = () => data.views.find((one) => one.key === state.view);
const guidanceOf = (model) => (model.base ? view().guidance.base : view().guidance.variants[model.name]);
const visible = () => models.filter((model) => model.base || !state.hidden.has(model.name));
const variants = () => visible().filter((model) => !model.base);
const partOf = (estimate, tag) => (tag === MEAN ? estimate.overall : estimate.tags[tag]);

function scoreOf(model, guidance = guidanceOf(model)) {
  return data.scores.find(
    (one) => one.verdict === state.verdict && one.base === model.base && one.model === model.name && one.guidance === guidance,
  );
}

/** The estimate of `model` minus `other`; each pair is kept in one direction only. */
function differenceOf(model, other, key = state.view) {
  const at = data.views.find((one) => one.key === key).guidance;
  const place = (one) => (one.base ? at.base : at.variants[one.name]);
  const find = (first, second) =>
    data.differences.find(
      (one) =>
        one.verdict === state.verdict && !first.base && one.model === first.name && one.base === second.base &&
        one.minus === second.name && one.guidance === place(first) && one.minus_guidance === place(second),
    );
  const found = find(model, other);
  if (found) return found;
  const back = find(other, model);
  if (!back) return undefined;
  const turn = ([value, low, high]) => [-value, -high, -low];
  return {
    overall: turn(back.overall),
    tags: Object.fromEntries(Object.entries(back.tags).map(([tag, part]) => [tag, turn(part)])),
    by_seed: back.by_seed.map((value) => -value),
  };
}

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
  return made;
}

function table(head, rows) {
  const cell = (content, tag) => {
    if (content === null || content === undefined) return el(tag, {}, "–");
    if (typeof content === "string" || content instanceof Node) return el(tag, {}, content);
    return el(tag, content.clear ? { class: "clear" } : {}, content.main, el("small", {}, content.small));
  };
  return el(
    "table", {},
    el("thead", {}, el("tr", {}, ...head.map((one) => el("th", { scope: "col" }, one)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((one, index) => cell(one, index ? "td" : "th"))))),
  );
}

// ---- charts -------------------------------------------------------------------------------------------------------

/** Differences with their intervals, a row a variant: name, interval and figures side by side, or stacked where narrow. */
function forest(rows, { width, domain, label, zero }) {
  const wide = width > 600;
  const left = wide ? Math.min(0.34 * width, 24 + 7.6 * Math.max(...rows.map((row) => row.name.length + row.at.length))) : 6;
  const right = wide ? 168 : 6;
  const letters = Math.floor((wide ? left - 12 : width - 180) / 7.8);
  const down = wide ? 0 : 11, up = wide ? 0 : -9;
  const ticks = rows.flatMap((row) => (row.seeds.length > 1 ? row.seeds.map((value) => ({ name: row.name, value, model: row.model })) : []));
  const text = { y: "name", dy: up, fontSize: 13, fill: "currentColor", stroke: "var(--card)", strokeWidth: 4 };
  const figures = (row) => `${signed(row.value)}  ${interval([0, row.low, row.high], signed)}`;
  return plot({
    width,
    height: rows.length * (wide ? 32 : 48) + (wide ? 64 : 74),
    marginLeft: left, marginRight: right, marginTop: wide ? 24 : 32, marginBottom: 38,
    ariaLabel: label,
    x: { domain, label: "points", labelAnchor: "right", tickFormat: (value) => (value === 0 ? "0" : signed(value).replace(/\.0$/, "")), grid: true, ticks: Math.max(3, Math.floor((width - left - right) / 90)) },
    y: { type: "point", domain: rows.map((row) => row.name), axis: null, padding: 0.5 },
    marks: [
      Plot.ruleX([0], { stroke: "var(--ink)", strokeOpacity: 0.6 }),
      Plot.text([zero], { x: () => 0, frameAnchor: "top", dy: wide ? -14 : -24, fill: "var(--soft)", fontSize: 12, stroke: "var(--card)", strokeWidth: 4 }),
      Plot.ruleY(rows, { x1: "low", x2: "high", y: "name", stroke: (row) => colour(row.model), strokeWidth: 3.5, strokeLinecap: "round", dy: down }),
      Plot.text(ticks, { x: "value", y: "name", text: () => "|", fontSize: 15, fill: (row) => colour(row.model), fillOpacity: 0.8, dy: down }),
      Plot.dot(rows, { x: "value", y: "name", fill: (row) => colour(row.model), symbol: { value: (row) => symbol(row.model), scale: null }, r: 6, stroke: "var(--card)", strokeWidth: 1.5, dy: down }),
      Plot.text(rows, { ...text, frameAnchor: "left", textAnchor: "start", dx: wide ? 4 - left : 0, text: (row) => cut(row.name + row.at, letters), fontWeight: 600 }),
      Plot.text(rows, { ...text, frameAnchor: "right", textAnchor: "end", dx: wide ? right - 4 : 0, text: figures }),
      Plot.tip(rows, Plot.pointerY({ x: "value", y: "name", title: (row) => `${row.name}${row.at}\n${figures(row)} points${row.seeds.length > 1 ? `\nby seed: ${row.seeds.map(signed).join(", ")}` : ""}` })),
    ],
  });
}

function forestRows(minus, viewKey, tag) {
  const at = data.views.find((one) => one.key === viewKey);
  return visible().filter((model) => model !== minus).flatMap((model) => {
    const found = differenceOf(model, minus, viewKey);
    if (!found) return [];
    const [value, low, high] = partOf(found, tag);
    const guidance = model.base ? at.guidance.base : at.guidance.variants[model.name];
    return [{ name: model.name, model, value, low, high, at: viewKey === "own" ? ` @ ${guidance}` : "", seeds: tag === MEAN ? found.by_seed : [] }];
  });
}

function extent(rows) {
  const low = Math.min(0, ...rows.flatMap((row) => [row.low, ...row.seeds])), high = Math.max(0, ...rows.flatMap((row) => [row.high, ...row.seeds]));
  const room = 0.06 * (high - low || 0.1);
  return [low - room, high + room];
}

function drawPicture() {
  const shown = data.views[0].key === "own" ? [data.views[0]] : data.views;
  const parts = shown.map((one) => ({ one, rows: forestRows(BASE, one.key, MEAN) }));
  const domain = extent(parts.flatMap((part) => part.rows));
  const box = el("div", { class: "views" });
  fill("picture", el("h3", {}, `Minus base, share of images ${data.verdicts[state.verdict]}, mean over tags, 95 % intervals${shown[0].key === "own" ? ", each model @ its own guidance" : ""}`), box);
  const cells = parts.map(({ one }) => el("div", {}, shown.length > 1 ? el("p", { class: "note" }, one.label) : null));
  box.append(...cells);
  for (const [index, { one, rows }] of parts.entries()) {
    const cell = cells[index];
    if (rows.length) cell.append(forest(rows, { width: widthOf(cell), domain, label: `Differences from the base, ${one.label}`, zero: "base" }));
  }
}

function drawScores() {
  const tags = [MEAN, ...Object.keys(data.tags)];
  const box = place("scores-charts");
  box.replaceChildren();
  for (const tag of tags) {
    const rows = visible().map((model) => {
      const found = scoreOf(model);
      const [value, low, high] = partOf(found, tag);
      return { model, name: model.name, value, low, high };
    });
    const total = tag === MEAN ? "" : `, ${data.tags[tag]} prompts`;
    const cell = el("figure", {}, el("h3", {}, tag, el("span", { class: "note" }, total)));
    box.append(cell);
    const width = widthOf(cell);
    const left = Math.min(0.42 * width, 12 + 7 * Math.max(...rows.map((row) => row.name.length)));
    cell.append(plot({
      width, height: rows.length * 24 + 40, marginLeft: left, marginRight: 14, marginTop: 6, marginBottom: 34,
      ariaLabel: `Scores, ${tag}`,
      x: { domain: [0, 1], percent: false, tickFormat: (value) => `${Math.round(100 * value)}`, label: "%", labelAnchor: "right", grid: true, ticks: 5 },
      y: { domain: rows.map((row, index) => index), label: null, tickSize: 0, tickFormat: (index) => cut(rows[index].name, Math.floor(left / 6.6)) },
      marks: [
        Plot.ruleY(rows, { x1: "low", x2: "high", y: (row, index) => index, stroke: (row) => colour(row.model), strokeWidth: 3, strokeLinecap: "round" }),
        Plot.dot(rows, { x: "value", y: (row, index) => index, fill: (row) => colour(row.model), symbol: { value: (row) => symbol(row.model), scale: null }, r: 4.5, stroke: "var(--card)" }),
        Plot.tip(rows, Plot.pointerY({ x: "value", y: (row, index) => index, title: (row) => `${row.name}, ${tag}\n${percent(row.value)} % ${interval([0, row.low, row.high], percent)}` })),
      ],
    }));
  }
  const cell = (part) => ({ main: percent(part[0]), small: interval(part, percent) });
  fill("scores-table", table(
    ["", "guidance", "seeds", ...tags],
    visible().map((model) => {
      const found = scoreOf(model);
      return [key(model), String(guidanceOf(model)), model.base ? "–" : String(model.seeds.length), ...tags.map((tag) => cell(partOf(found, tag)))];
    }),
  ));
}

function drawDifferences() {
  const minus = state.minus < 0 ? BASE : models[state.minus + 1];
  const rows = forestRows(minus, state.view, state.tag);
  const box = place("differences-chart");
  if (rows.length) box.replaceChildren(forest(rows, { width: widthOf(box), domain: extent(rows), label: `Differences from ${minus.name}`, zero: cut(minus.name, 30) }));
  else box.replaceChildren(empty("Nothing to compare: the variants have no seed in common."));
  const tags = [MEAN, ...Object.keys(data.tags)];
  fill("differences-table", table(
    [`minus ${minus.name}`, "seeds", ...tags, "by seed (mean)"],
    visible().filter((model) => model !== minus).map((model) => {
      const found = differenceOf(model, minus);
      if (!found) return [key(model), "none in common", ...tags.map(() => null), null];
      const parts = tags.map((tag) => partOf(found, tag));
      return [key(model), String(found.by_seed.length), ...parts.map((part) => ({ main: signed(part[0]), small: interval(part, signed), clear: clear(part) })), found.by_seed.map(signed).join(", ")];
    }),
  ));
}

function drawGuidance() {
  const rows = visible().flatMap((model) =>
    data.scores
      .filter((one) => one.verdict === state.verdict && one.base === model.base && one.model === model.name)
      .map((one) => ({ model, name: model.name, guidance: one.guidance, value: one.overall[0], low: one.overall[1], high: one.overall[2] })),
  );
  const values = [...new Set(rows.map((row) => row.guidance))].sort((one, other) => one - other);
  const box = place("guidance-chart");
  const order = visible();
  // Side by side, so that intervals at one guidance do not cover each other, but all near their guidance.
  const [range, nearest] = values.length > 1 ? [values[values.length - 1] - values[0], d3.min(d3.pairs(values), ([one, next]) => next - one)] : [1.6, 1];
  const spread = Math.min(0.012 * range, (0.35 * nearest) / order.length);
  for (const row of rows) row.x = row.guidance + (order.indexOf(row.model) - (order.length - 1) / 2) * spread;
  const own = data.views.find((one) => one.key === "own");
  const best = own ? rows.filter((row) => row.guidance === (row.model.base ? own.guidance.base : own.guidance.variants[row.name])) : [];
  const lines = d3.sort(rows, (row) => row.guidance);
  const width = widthOf(box);
  box.replaceChildren(
    plot({
      width, height: Math.min(420, Math.max(280, width * 0.45)), marginLeft: 44, marginBottom: 40,
      ariaLabel: "Score against guidance scale",
      x: { label: "guidance scale", ticks: values, tickFormat: (value) => String(value), inset: 18 },
      y: { label: "% right, mean over tags", tickFormat: (value) => `${Math.round(100 * value)}`, grid: true, nice: true },
      marks: [
        Plot.ruleX(rows, { x: "x", y1: "low", y2: "high", stroke: (row) => colour(row.model), strokeWidth: 2, strokeOpacity: 0.55 }),
        ...order.map((model) => Plot.line(lines.filter((row) => row.model === model), { x: "x", y: "value", stroke: colour(model), strokeWidth: 2, strokeDasharray: dash(model) || undefined })),
        Plot.dot(rows, { x: "x", y: "value", fill: (row) => colour(row.model), symbol: { value: (row) => symbol(row.model), scale: null }, r: 5, stroke: "var(--card)" }),
        Plot.dot(best, { x: "x", y: "value", stroke: (row) => colour(row.model), r: 10, strokeWidth: 1.5 }),
        Plot.tip(rows, Plot.pointer({ x: "x", y: "value", title: (row) => `${row.name} at guidance ${row.guidance}\n${percent(row.value)} % ${interval([0, row.low, row.high], percent)}` })),
      ],
    }),
    legend([...order.map((model) => key(model)), ...(best.length ? [el("span", {}, "◯ chosen on validation prompts")] : [])]),
  );
}

const AXES = { step: "steps", images: "images sampled", seconds: "seconds of training" };

/** The points of a run's metric over an axis; none if the run does not have them. */
function curve(run, metric, axis) {
  const xs = run.curves[axis], ys = run.curves.metrics[metric];
  if (!xs || !ys) return [];
  return xs.map((x, index) => ({ x, y: ys[index], run })).filter((point) => point.y !== null);
}

/** The powers of ten that the points reach. */
function decades(points) {
  const values = points.map((point) => point.y).filter((value) => value > 0);
  if (!values.length) return [1];
  const low = Math.floor(Math.log10(d3.min(values))), high = Math.ceil(Math.log10(d3.max(values)));
  return d3.range(low, high + 1).map((power) => 10 ** power);
}

function lineChart(series, { width, height = 300, x, y, log = false, rules = [], zero = false, points = [] }) {
  const all = series.flatMap((one) => one.points.map((point) => ({ ...point, series: one })));
  return plot({
    width, height, marginLeft: 52, marginBottom: 38, ariaLabel: y,
    x: { label: x, nice: false },
    y: { label: y || null, type: log ? "log" : "linear", grid: true, nice: true, zero, tickFormat: log ? "~g" : undefined, ticks: log ? decades(all) : 6 },
    marks: [
      Plot.ruleY(rules, { stroke: "var(--ink)", strokeOpacity: 0.5 }),
      ...series.map((one) => Plot.line(one.points, { x: "x", y: "y", stroke: one.colour, strokeWidth: 1.8, strokeOpacity: one.opacity ?? 0.9, strokeDasharray: one.dash || undefined })),
      Plot.dot([...points, ...series.filter((one) => one.dots).flatMap((one) => one.points.map((point) => ({ ...point, series: one })))], { x: "x", y: "y", fill: (point) => point.series.colour, symbol: { value: (point) => point.series.symbol ?? SYMBOLS[0], scale: null }, r: 3.5 }),
      Plot.tip(all, Plot.pointer({ x: "x", y: "y", title: (point) => `${point.series.name}\n${x} ${short(point.x)}\n${short(point.y)}` })),
    ],
  });
}

function shownRuns() {
  return data.runs.filter((run) => !state.hidden.has(run.variant));
}

function drawTraining() {
  const box = place("training-chart");
  const runs = shownRuns();
  const series = runs.map((run) => {
    const model = modelNamed(run.variant);
    return { name: run.name, model, colour: colour(model), dash: dash(model), points: curve(run, state.metric, state.axis) };
  }).filter((one) => one.points.length);
  const left = runs.length - series.length;
  place("training-note").textContent = !left ? "" : state.axis === "images"
    ? `${left} of ${runs.length} runs draw no images of their own in training, or do not have this metric: they have no place on this axis.`
    : `${left} of ${runs.length} runs do not have this metric.`;
  if (!series.length) return box.replaceChildren(empty("None of the runs shown has this metric over this axis."));
  const shown = [...new Set(series.map((one) => one.model))];
  const width = widthOf(box);
  box.replaceChildren(lineChart(series, { width, height: Math.min(400, Math.max(260, width * 0.42)), x: AXES[state.axis], y: state.metric }), legend(shown.map((model) => key(model))));
}

/** Rewards that a run was trained on, each by the first metric that holds it. */
function trainedRewards(run) {
  const found = {};
  for (const metric of Object.keys(run.curves.metrics)) {
    const at = metric.indexOf("/reward/");
    if (at > 0) found[metric.slice(at + "/reward/".length)] ??= metric;
  }
  return found;
}

function heldOut(run, guidance, read) {
  return run.evaluations.filter((row) => row.guidance === guidance).map((row) => ({ x: row.step, y: read(row) })).filter((point) => point.y !== null && point.y !== undefined);
}

function drawGap() {
  const box = place("gap-charts");
  box.replaceChildren();
  const rows = [];
  // Beside variants that learn from a reward, the others have nothing to show here.
  const learns = (model) => data.runs.some((run) => run.variant === model.name && Object.keys(trainedRewards(run)).length);
  const some = variants().filter(learns);
  for (const model of some.length ? some : variants()) {
    const runs = data.runs.filter((run) => run.variant === model.name);
    const guidance = guidanceOf(model);
    const judge = (run) => heldOut(run, guidance, (row) => row[state.verdict]);
    const rewards = [...new Set(runs.flatMap((run) => Object.keys(trainedRewards(run))))];
    for (const reward of rewards.length ? rewards : [null]) {
      // One picture where the reward is the judge's own share; otherwise the units differ, and so do the pictures.
      const same = reward === "shapes" || reward === null;
      const series = runs.flatMap((run) => [
        reward && { name: `${run.name}: trained reward`, kind: "trained", colour: "var(--v1)", points: curve(run, trainedRewards(run)[reward], "step") },
        reward && { name: `${run.name}: held-out reward`, kind: "held-out reward", colour: "var(--v0)", dots: true, symbol: d3.symbolSquare, dash: "5,3", points: heldOut(run, guidance, (row) => row.rewards[reward]) },
        same && { name: `${run.name}: judge, held-out`, kind: "judge, held-out", colour: "var(--v2)", dots: true, symbol: d3.symbolTriangle, points: judge(run) },
      ]).filter((one) => one && one.points.length);
      if (reward) rows.push(gapRow(model, runs, reward, guidance));
      addMultiple(box, `${model.name}${reward ? ` · ${reward}` : ""}`, series, same);
      if (!same) addMultiple(box, `${model.name} · judge`, runs.map((run) => ({ name: run.name, kind: "judge, held-out", colour: "var(--v2)", dots: true, symbol: d3.symbolTriangle, points: judge(run) })), true);
    }
  }
  const note = "Trained: from the mean of the first tenth of the steps to that of the last. Held-out: from the base to the trained model, at the guidance chosen above. Means over seeds.";
  fill("gap-table", rows.length
    ? el("div", {}, table(["", "reward", "trained", "held-out, same reward", "held-out, judge (points)", "gap"], rows), el("p", { class: "note" }, note))
    : empty("None of the runs shown learns from a reward, so none can be over-optimised: the lines are the judge's alone."));
}

function addMultiple(box, title, series, zero) {
  const shown = series.filter((one) => one.points.length);
  if (!shown.length) return;
  const cell = el("figure", {}, el("h3", {}, title));
  box.append(cell);
  const kinds = [...new Map(shown.map((one) => [one.kind, one])).values()];
  const swatch = (one) => el("span", { class: "key" }, drawnMark(one.symbol ?? SYMBOLS[0], one.colour), one.kind);
  cell.append(lineChart(shown, { width: widthOf(cell), height: 210, x: "steps", y: "", zero }), legend(kinds.map(swatch)));
}

function gapRow(model, runs, reward, guidance) {
  const mean = (values) => (values.length ? d3.mean(values) : null);
  const trained = runs.map((run) => run.rewards[reward]).filter(Boolean);
  const ends = (read) => runs.map((run) => heldOut(run, guidance, read)).filter((points) => points.length > 1).map((points) => [points[0].y, points[points.length - 1].y]);
  const same = ends((row) => row.rewards[reward]), judge = ends((row) => row[state.verdict]);
  const told = (pairs) => (pairs.length ? `${short(mean(pairs.map((pair) => pair[0])))} → ${short(mean(pairs.map((pair) => pair[1])))}` : "not measured");
  const gain = (pairs) => (pairs.length ? mean(pairs.map((pair) => pair[1] - pair[0])) : null);
  const gap = same.length && trained.length ? short(gain(trained) - gain(same)) : "–";
  const points = judge.length ? `${percent(mean(judge.map((pair) => pair[0])))} → ${percent(mean(judge.map((pair) => pair[1])))}` : "–";
  return [key(model), reward, told(trained), told(same), points, gap];
}

function drawGradients() {
  const run = data.runs[state.run];
  const metrics = Object.keys(run.curves.metrics);
  const terms = metrics.filter((name) => name.endsWith("/grad_norm"));
  const cosines = metrics.filter((name) => name.startsWith("cosine/"));
  const series = (names, title) => names.map((name, index) => ({ name: title(name), index, colour: `var(--v${index % COLOURS})`, dash: DASHES[Math.floor(index / COLOURS) % DASHES.length], points: curve(run, name, "step") }));
  const keys = (found) => legend(found.map((one) => el("span", { class: "key" }, mark({ index: one.index }), one.name)));
  const norms = series(terms, (name) => name.slice(0, -"/grad_norm".length));
  const positive = norms.map((one) => ({ ...one, points: one.points.filter((point) => point.y > 0) }));
  const box = place("norms-chart"), other = place("cosines-chart");
  if (norms.length) box.replaceChildren(el("h3", {}, "Gradient norm by term"), lineChart(positive, { width: widthOf(box), x: "steps", y: "norm (log)", log: true }), keys(norms));
  else box.replaceChildren(empty("This run logged no gradient norms."));
  const found = series(cosines, (name) => name.slice("cosine/".length).replace("/", " and "));
  if (found.length) other.replaceChildren(el("h3", {}, "Cosine between terms"), lineChart(found, { width: widthOf(other), x: "steps", y: "cosine", rules: [0] }), keys(found));
  else other.replaceChildren(empty("This run has no two terms in a step, so there is no cosine between them."));
}

function drawPictures() {
  const only = place("only-different").checked;
  const shown = visible().map((model) => {
    const at = data.pictures.shown[String(guidanceOf(model))];
    return { model, rows: at && (model.base ? at.base : at.variants[model.name]) };
  });
  const kept = shown.filter((one) => one.rows);
  if (!kept.length) return fill("pictures-grid", empty("The runs shown kept no single images at this guidance (in their folders: samples/eval, or where eval.json says)."));
  const cards = data.pictures.prompts.flatMap((prompt, number) => {
    const shots = kept.map((one) => ({ model: one.model, shot: one.rows[number] })).filter((one) => one.shot);
    const marks = new Set(shots.map((one) => one.shot[state.verdict]));
    if (!shots.length || (only && marks.size < 2)) return [];
    return [el("div", { class: "prompt" }, el("p", {}, prompt.prompt, el("span", {}, prompt.tag)), el("div", { class: "shots" }, ...shots.map(picture)))];
  });
  // Two prompts a row where a row holds them.
  place("pictures-grid").style.setProperty("--card-width", `${Math.max(320, kept.length * 116)}px`);
  fill("pictures-grid", ...(cards.length ? cards : [empty("All verdicts are alike on the prompts shown.")]));
}

function picture({ model, shot }) {
  const right = shot[state.verdict];
  const image = el("img", { src: data.pictures.images[shot.image], alt: `${model.name}: ${right ? "right" : "wrong"}` });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 96));
  const reason = shot.reason && !right ? `: ${shot.reason}` : "";
  return el("figure", { class: right ? "right" : "wrong", title: shot.reason || "right" }, image,
    el("figcaption", {}, el("b", {}, mark(model), model.name), el("span", { class: "verdict" }, right ? "✓ right" : "✗ wrong"), cut(reason, 80)));
}

// ---- choices ------------------------------------------------------------------------------------------------------

function choose(id, label, options, current, change) {
  if (options.length < 2) return;
  const select = el("select", { id: `${id}-select`, onchange: (event) => { change(event.target.value); draw(); } },
    ...options.map(([value, text]) => el("option", { value, selected: value === current }, text)));
  fill(id, el("label", { for: `${id}-select` }, label), select);
}

function offerChoices() {
  choose("choose-view", "compare at", data.views.map((one) => [one.key, one.label]), state.view, (value) => { state.view = value; });
  choose("choose-verdict", "verdict", Object.entries(data.verdicts), state.verdict, (value) => { state.verdict = value; });
  choose("choose-minus", "minus", [["-1", "base"], ...(data.variants.length > 1 ? data.variants.map((one, index) => [String(index), one.name]) : [])], "-1", (value) => { state.minus = Number(value); });
  choose("choose-tag", "tag", [MEAN, ...Object.keys(data.tags)].map((tag) => [tag, tag]), MEAN, (value) => { state.tag = value; });
  const metrics = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves.metrics)))].sort();
  state.metric = metrics.find((name) => name.endsWith("/reward")) ?? metrics.find((name) => name === "loss") ?? metrics[0] ?? "";
  choose("choose-metric", "metric", metrics.map((name) => [name, name]), state.metric, (value) => { state.metric = value; });
  const axes = Object.entries(AXES).filter(([axis]) => data.runs.some((run) => run.curves[axis]));
  choose("choose-axis", "over", axes, state.axis, (value) => { state.axis = value; });
  const terms = (run) => Object.keys(run.curves.metrics).filter((name) => name.endsWith("/grad_norm")).length;
  state.run = Math.max(0, data.runs.findIndex((run) => terms(run) > 1));
  choose("choose-run", "run", data.runs.map((run, index) => [String(index), run.name]), String(state.run), (value) => { state.run = Number(value); });
  place("only-different").addEventListener("change", drawPictures);
  if (data.variants.length > 1) fill("chips", ...models.filter((model) => !model.base).map(chip));
}

function chip(model) {
  const made = el("button", { class: "chip", type: "button", "aria-pressed": "true", onclick: () => {
    if (!state.hidden.delete(model.name)) state.hidden.add(model.name);
    made.setAttribute("aria-pressed", String(!state.hidden.has(model.name)));
    draw();
  } }, mark(model), model.name);
  return made;
}

function draw() {
  const ofEvaluations = [drawPicture, drawScores, drawDifferences, drawGuidance, drawGap, drawPictures];
  for (const part of [...(state.view ? ofEvaluations : []), drawTraining, drawGradients]) part();
}

/** Paper is narrower than a screen: draw for it, then for the screen again. */
function drawFor(width) {
  document.body.style.width = width;
  draw();
}
addEventListener("beforeprint", () => drawFor("740px"));
addEventListener("afterprint", () => drawFor(""));

offerChoices();
draw();
let width = document.body.clientWidth, waiting = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth === width || waiting) return;
  waiting = requestAnimationFrame(() => { waiting = 0; width = document.body.clientWidth; draw(); });
}).observe(document.body);
