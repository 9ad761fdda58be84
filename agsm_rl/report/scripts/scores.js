// ---- charts -------------------------------------------------------------------------------------------------------

/** Differences with their intervals, one row per variant: name, interval and figures side by side, or stacked where narrow. */
function forest(rows, { width, domain, label, zero }) {
  const wide = width > 600;
  const left = wide ? Math.min(0.34 * width, 24 + 7.6 * Math.max(...rows.map((row) => row.name.length + row.at.length))) : 6;
  const down = wide ? 0 : 11, up = wide ? 0 : -9;
  const ticks = rows.flatMap((row) => (row.seeds.length > 1 ? row.seeds.map((value) => ({ name: row.name, value, model: row.model })) : []));
  const text = { y: "name", dy: up, fontSize: 13, fill: "currentColor", stroke: "var(--card)", strokeWidth: 4 };
  const figures = (row) => `${head([row.value, row.low, row.high], inChange)}  ${interval([0, row.low, row.high], inChange)}`;
  const right = wide ? Math.max(168, 24 + 7.2 * Math.max(...rows.map((row) => figures(row).length))) : 6;
  const letters = Math.floor((wide ? left - 12 : width - 180) / 7.8);
  const tick = (value) => (value === 0 ? "0" : inChange(value).replace(/\.0$/, ""));
  return plot({
    width,
    height: rows.length * (wide ? 32 : 48) + (wide ? 64 : 74),
    marginLeft: left, marginRight: right, marginTop: wide ? 24 : 32, marginBottom: 38,
    ariaLabel: label,
    x: { domain, label: score().share ? "points" : "difference", labelAnchor: "right", tickFormat: tick, grid: true, ticks: Math.max(3, Math.floor((width - left - right) / 90)) },
    y: { type: "point", domain: rows.map((row) => row.name), axis: null, padding: 0.5 },
    marks: [
      Plot.ruleX([0], { stroke: "var(--ink)", strokeOpacity: 0.6 }),
      Plot.text([zero], { x: () => 0, frameAnchor: "top", dy: wide ? -14 : -24, fill: "var(--soft)", fontSize: 12, stroke: "var(--card)", strokeWidth: 4 }),
      Plot.ruleY(rows, { x1: "low", x2: "high", y: "name", stroke: (row) => colour(row.model), strokeWidth: 3.5, strokeLinecap: "round", dy: down }),
      Plot.text(ticks, { x: "value", y: "name", text: () => "|", fontSize: 15, fill: (row) => colour(row.model), fillOpacity: 0.8, dy: down }),
      Plot.dot(rows, { x: "value", y: "name", fill: (row) => colour(row.model), symbol: { value: (row) => symbol(row.model), scale: null }, r: 6, stroke: "var(--card)", strokeWidth: 1.5, dy: down }),
      Plot.text(rows, { ...text, frameAnchor: "left", textAnchor: "start", dx: wide ? 4 - left : 0, text: (row) => cut(row.name + row.at, letters), fontWeight: 600 }),
      Plot.text(rows, { ...text, frameAnchor: "right", textAnchor: "end", dx: wide ? right - 4 : 0, text: figures }),
      Plot.tip(rows, Plot.pointerY({ x: "value", y: "name", title: (row) => `${row.name}${row.at}\n${figures(row)}${points()}${row.seeds.length > 1 ? `\nby seed: ${row.seeds.map((value) => inChange(value, decimalsOf([0, row.low, row.high]))).join(", ")}` : ""}` })),
    ],
  });
}

function forestRows(minus, viewKey, tag) {
  const at = viewNamed(viewKey);
  return visible().filter((model) => model !== minus).flatMap((model) => {
    const found = differenceOf(model, minus, viewKey);
    if (!found) return [];
    const [value, low, high] = partOf(found, tag);
    return [{ name: model.name, model, value, low, high, at: viewKey === "own" ? ` @ ${guidanceIn(model, at)}` : "", seeds: tag === MEAN ? found.by_seed : [] }];
  });
}

function extent(rows) {
  const low = Math.min(0, ...rows.flatMap((row) => [row.low, ...row.seeds])), high = Math.max(0, ...rows.flatMap((row) => [row.high, ...row.seeds]));
  const room = 0.06 * (high - low || 0.1);
  return [low - room, high + room];
}

const overWhat = () => (!score().share ? `mean ${score().label}` : `share of images ${score().label}${tags().length > 1 ? ", mean over tags" : ""}`);

function drawPicture() {
  const views = suite().views;
  place("picture").hidden = missing(views[0].guidance.base);
  if (place("picture").hidden) return;
  const shown = views[0].key === "own" ? [views[0]] : views;
  const parts = shown.map((one) => ({ one, rows: forestRows(BASE, one.key, MEAN) }));
  const domain = extent(parts.flatMap((part) => part.rows));
  const box = el("div", { class: "views" });
  fill("picture", el("h2", {}, `Minus base, ${overWhat()}, 95 % intervals${shown[0].key === "own" ? ", each model @ its own guidance" : ""}`), box);
  const cells = parts.map(({ one }) => el("div", {}, shown.length > 1 ? el("p", { class: "note" }, one.label) : null));
  box.append(...cells);
  for (const [index, { one, rows }] of parts.entries()) {
    const cell = cells[index];
    if (rows.length) cell.append(forest(rows, { width: widthOf(cell), domain, label: `Differences from the base, ${one.label}`, zero: "base" }));
  }
}

/** The range of a score's axis: all of what a share can be; of numbers, what there is, and the same in every chart. */
function scale() {
  if (score().share) return { domain: [0, 1], tickFormat: (value) => `${Math.round(100 * value)}`, label: "%" };
  const parts = visible().flatMap((model) => tags().map((tag) => partOf(scoreOf(model), tag)));
  const values = parts.flat().filter((value) => !missing(value));
  const low = d3.min(values), high = d3.max(values), room = 0.06 * (high - low || Math.abs(high) || 1);
  return { domain: [low - room, high + room], tickFormat: short, label: "" };
}

function drawScores() {
  place("scores-note").textContent = score().share
    ? `Share of images that are right, in %, with 95 % intervals${tags().length > 1 ? "; mean is the mean over tags" : ""}.`
    : `Mean ${score().label} over prompts, in its own unit, with 95 % intervals.`;
  const box = place("scores-charts");
  box.replaceChildren();
  for (const tag of tags()) {
    const rows = visible().map((model) => {
      const [value, low, high] = partOf(scoreOf(model), tag);
      return { model, name: model.name, value, low, high };
    });
    const total = tag === MEAN ? "" : `, ${suite().tags[tag]} images`;
    const cell = el("figure", {}, el("h3", {}, tag, el("span", { class: "note" }, total)));
    box.append(cell);
    const width = widthOf(cell);
    const left = Math.min(0.42 * width, 12 + 7 * Math.max(...rows.map((row) => row.name.length)));
    cell.append(plot({
      width, height: rows.length * 24 + 40, marginLeft: left, marginRight: 14, marginTop: 6, marginBottom: 34,
      ariaLabel: `Scores, ${tag}`,
      x: { ...scale(), percent: false, labelAnchor: "right", grid: true, ticks: 5 },
      y: { type: "point", padding: 0.5, domain: rows.map((row, index) => index), label: null, tickSize: 0, tickFormat: (index) => cut(rows[index].name, Math.floor(left / 6.6)) },
      marks: [
        Plot.ruleY(rows, { x1: "low", x2: "high", y: (row, index) => index, stroke: (row) => colour(row.model), strokeWidth: 3, strokeLinecap: "round" }),
        Plot.dot(rows, { x: "value", y: (row, index) => index, fill: (row) => colour(row.model), symbol: { value: (row) => symbol(row.model), scale: null }, r: 4.5, stroke: "var(--card)" }),
        Plot.tip(rows, Plot.pointerY({ x: "value", y: (row, index) => index, title: (row) => `${row.name}, ${tag}\n${head([row.value, row.low, row.high], inValue)}${unit()} ${interval([0, row.low, row.high], inValue)}` })),
      ],
    }));
  }
  const cell = (part) => ({ main: head(part, inValue), small: interval(part, inValue) });
  const told = (guidance) => (guidance < 0 ? "–" : String(guidance));
  fill("scores-table", table(
    ["model", "guidance", "seeds", ...tags()],
    visible().map((model) => {
      const found = scoreOf(model);
      return [key(model), told(guidanceOf(model)), model.base ? "–" : String(found.by_seed.length), ...tags().map((tag) => cell(partOf(found, tag)))];
    }),
  ));
}

function drawDifferences() {
  const minus = models[state.minus];
  place("differences").hidden = !measured().some((model) => model !== minus && differenceOf(model, minus));
  if (place("differences").hidden) return;
  const rows = forestRows(minus, state.view, state.tag);
  const box = place("differences-chart");
  if (rows.length) box.replaceChildren(forest(rows, { width: widthOf(box), domain: extent(rows), label: `Differences from ${minus.name}`, zero: cut(minus.name, 30) }));
  else box.replaceChildren(empty("Nothing to compare: the variants have no seed in common."));
  const wins = visible().some((model) => model !== minus && differenceOf(model, minus)?.wins);
  fill("differences-table", table(
    [`minus ${minus.name}`, "seeds", ...tags(), ...(wins ? ["wins, %"] : []), "by seed (mean)"],
    visible().filter((model) => model !== minus).map((model) => {
      const found = differenceOf(model, minus);
      if (!found) return [key(model), "none in common", ...tags().map(() => null), ...(wins ? [null] : []), null];
      const parts = tags().map((tag) => partOf(found, tag));
      const cells = parts.map((part) => ({ main: head(part, inChange), small: interval(part, inChange), clear: clear(part) }));
      return [key(model), String(found.by_seed.length), ...cells, ...(wins ? [found.wins && { main: percent(found.wins[0]), small: interval(found.wins, percent) }] : []), { seeds: found.by_seed.map((value) => inChange(value, decimalsOf(found.overall))).join(", ") }];
    }),
  ));
}

function drawGuidance() {
  const rows = visible().flatMap((model) =>
    suite().estimates
      .filter((one) => one.score === state.score && one.base === model.base && one.model === model.name)
      .map((one) => ({ model, name: model.name, guidance: one.guidance, value: one.overall[0], low: one.overall[1], high: one.overall[2] })),
  );
  const values = [...new Set(rows.map((row) => row.guidance))].sort((one, other) => one - other);
  place("guidance").hidden = values.length < 2 || values.some((value) => value < 0);
  if (place("guidance").hidden) return;
  const box = place("guidance-chart");
  const order = visible();
  // Side by side, so that intervals at one guidance do not cover each other, but all near their guidance.
  const [range, nearest] = values.length > 1 ? [values[values.length - 1] - values[0], d3.min(d3.pairs(values), ([one, next]) => next - one)] : [1.6, 1];
  const spread = Math.min(0.012 * range, (0.35 * nearest) / order.length);
  for (const row of rows) row.x = row.guidance + (order.indexOf(row.model) - (order.length - 1) / 2) * spread;
  const own = viewNamed("own");
  const best = own ? rows.filter((row) => row.guidance === guidanceIn(row.model, own)) : [];
  const lines = d3.sort(rows, (row) => row.guidance);
  const width = widthOf(box);
  box.replaceChildren(
    plot({
      width, height: Math.min(420, Math.max(280, width * 0.45)), marginLeft: 44, marginBottom: 40,
      ariaLabel: "Score against guidance scale",
      x: { label: "guidance scale", ticks: values, tickFormat: (value) => String(value), inset: 18 },
      y: { label: score().share ? `% right${tags().length > 1 ? ", mean over tags" : ""}` : score().label, tickFormat: score().share ? (value) => `${Math.round(100 * value)}` : short, grid: true, nice: true },
      marks: [
        Plot.ruleX(rows, { x: "x", y1: "low", y2: "high", stroke: (row) => colour(row.model), strokeWidth: 2, strokeOpacity: 0.55 }),
        ...order.map((model) => Plot.line(lines.filter((row) => row.model === model), { x: "x", y: "value", stroke: colour(model), strokeWidth: 2, strokeDasharray: dash(model) || undefined })),
        Plot.dot(rows, { x: "x", y: "value", fill: (row) => colour(row.model), symbol: { value: (row) => symbol(row.model), scale: null }, r: 5, stroke: "var(--card)" }),
        Plot.dot(best, { x: "x", y: "value", stroke: (row) => colour(row.model), r: 10, strokeWidth: 1.5 }),
        Plot.tip(rows, Plot.pointer({ x: "x", y: "value", title: (row) => `${row.name} at guidance ${row.guidance}\n${head([row.value, row.low, row.high], inValue)}${unit()} ${interval([0, row.low, row.high], inValue)}` })),
      ],
    }),
    legend([...order.map((model) => key(model)), ...(best.length ? [el("span", {}, "◯ chosen on validation prompts")] : [])]),
  );
}

