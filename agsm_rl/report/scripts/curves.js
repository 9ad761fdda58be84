const MOST_POINTS = 400;
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

/** A line's height over x, straight between its points; null before its first and after its last. */
function heightAt(points, x) {
  const next = d3.bisector((point) => point.x).left(points, x);
  if (next === points.length) return null;
  const after = points[next];
  if (after.x === x) return after.y;
  if (!next) return null;
  const before = points[next - 1];
  return before.y + ((after.y - before.y) * (x - before.x)) / (after.x - before.x);
}

/** Several runs' lines as one: at each x the mean of the runs that have it, the lowest and the highest of them. */
function together(lines) {
  const kept = lines.filter((points) => points.length);
  if (kept.length < 2) return kept[0] ?? [];
  const all = [...new Set(kept.flatMap((points) => points.map((point) => point.x)))].sort(d3.ascending);
  const every = Math.ceil(all.length / MOST_POINTS);
  return all.filter((x, index) => index % every === 0 || index === all.length - 1).map((x) => {
    const ys = kept.map((points) => heightAt(points, x)).filter((y) => y !== null);
    return { x, y: d3.mean(ys), low: d3.min(ys), high: d3.max(ys), runs: ys.length };
  });
}

function lineChart(series, { width, height = 300, x, y, label = y, log = false, rules = [], zero = false }) {
  const all = series.flatMap((one) => one.points.map((point) => ({ ...point, series: one })));
  const told = (point) => (point.runs ? ` [${short(point.low)}, ${short(point.high)}] of ${point.runs} runs` : "");
  return plot({
    width, height, marginLeft: 52, marginBottom: 38, ariaLabel: label,
    x: { label: x, nice: false },
    y: { label: y || null, type: log ? "log" : "linear", grid: true, nice: true, zero, tickFormat: log ? "~g" : undefined, ticks: log ? decades(all) : 6 },
    marks: [
      Plot.ruleY(rules, { stroke: "var(--ink)", strokeOpacity: 0.5 }),
      ...series.filter((one) => one.points.some((point) => point.runs > 1)).map((one) => Plot.areaY(one.points, { x: "x", y1: "low", y2: "high", fill: one.colour, fillOpacity: 0.16 })),
      ...series.map((one) => Plot.line(one.points, { x: "x", y: "y", stroke: one.colour, strokeWidth: 1.8, strokeOpacity: 0.9, strokeDasharray: one.dash || undefined })),
      Plot.dot(all.filter((point) => point.series.dots), { x: "x", y: "y", fill: (point) => point.series.colour, symbol: { value: (point) => point.series.symbol ?? SYMBOLS[0], scale: null }, r: 3.5 }),
      Plot.tip(all, Plot.pointer({ x: "x", y: "y", title: (point) => `${point.series.name}\n${x} ${short(point.x)}\n${short(point.y)}${told(point)}` })),
    ],
  });
}

function shownRuns() {
  return data.runs.filter((run) => !state.hidden.has(run.variant));
}

function drawTraining() {
  const box = place("training-chart");
  const runs = shownRuns();
  const lines = runs.map((run) => ({ run, points: curve(run, state.metric, state.axis) })).filter((one) => one.points.length);
  const left = runs.length - lines.length;
  place("training-note").textContent = !left ? "" : state.axis === "images"
    ? `${left} of ${runs.length} runs draw no images of their own in training, or do not have this metric: they have no place on this axis.`
    : `${left} of ${runs.length} runs do not have this metric.`;
  if (!lines.length) return box.replaceChildren(empty("None of the runs shown has this metric over this axis."));
  const look = (name) => ({ colour: colour(modelNamed(name)), dash: dash(modelNamed(name)) });
  const shown = [...new Set(lines.map((one) => one.run.variant))];
  const series = state.lines === "runs"
    ? lines.map(({ run, points }) => ({ name: run.name, ...look(run.variant), points }))
    : shown.map((name) => ({ name, ...look(name), points: together(lines.filter((one) => one.run.variant === name).map((one) => one.points)) }));
  const width = widthOf(box), x = AXES[state.axis];
  box.replaceChildren(
    lineChart(series, { width, height: Math.min(400, Math.max(260, width * 0.42)), x, y: state.metric }),
    legend(shown.map((name) => key(modelNamed(name)))), figuresOf(series, x),
  );
}

/** Rewards that a run was trained on, in its recipe's order, each with the first metric that holds it. */
function trainedRewards(run) {
  const metrics = Object.keys(run.curves.metrics);
  const named = Object.keys(run.rewards).map((reward) => [reward, metrics.find((metric) => metric.endsWith(`/reward/${reward}`))]);
  return Object.fromEntries(named.filter(([, metric]) => metric));
}

/** What the page opens with: a reward that is trained on, by itself; rewards' weighted sum says little. */
function openingMetric(metrics) {
  const rewards = data.runs.flatMap((run) => Object.values(trainedRewards(run)));
  return rewards[0] ?? metrics.find((name) => name.endsWith("/reward")) ?? metrics.find((name) => name === "loss") ?? metrics[0] ?? "";
}

/** What evaluations gave over the steps; of a reward, by the suite that is looked at or else by another. */
function heldOut(run, guidance, read) {
  const of = (name) => (run.evaluations[name] ?? []).filter((row) => row.guidance === guidance).map((row) => ({ x: row.step, y: read(row) })).filter((point) => !missing(point.y));
  return [suite().key, ...Object.keys(run.evaluations)].map(of).find((found) => found.length) ?? [];
}

function drawGap() {
  const box = place("gap-charts");
  place("over-optimisation").hidden = false;
  box.replaceChildren();
  const rows = [], drawn = [];
  // Beside variants that learn from a reward, the others have nothing to show here.
  const learns = (model) => data.runs.some((run) => run.variant === model.name && Object.keys(trainedRewards(run)).length);
  const some = variants().filter(learns);
  const judge = score().share ? "judge" : score().label;
  for (const model of some.length ? some : variants()) {
    const runs = data.runs.filter((run) => run.variant === model.name);
    const guidance = guidanceOf(model);
    const rewards = [...new Set(runs.flatMap((run) => Object.keys(trainedRewards(run))))];
    for (const reward of rewards.length ? rewards : [null]) {
      const line = (kind, look, read) => ({ name: `${model.name}: ${kind}`, kind, ...look, points: together(runs.map(read)) });
      const judged = line(`${judge}, held-out`, { colour: "var(--v2)", dots: true, symbol: d3.symbolTriangle }, (run) => heldOut(run, guidance, (row) => row[state.score]));
      // One picture where the reward is the judge's own share; otherwise the units differ, and so do the pictures.
      const same = (reward === "shapes" && score().share) || reward === null;
      const series = [
        reward && line("trained reward", { colour: "var(--v1)" }, (run) => curve(run, trainedRewards(run)[reward], "step")),
        reward && line("held-out reward", { colour: "var(--v0)", dots: true, symbol: d3.symbolSquare, dash: "5,3" }, (run) => heldOut(run, guidance, (row) => row.rewards[reward])),
        same && judged,
      ].filter((one) => one && one.points.length);
      drawn.push(judged.points);
      if (reward) rows.push(gapRow(model, runs, reward, guidance));
      addMultiple(box, `${model.name}${reward ? ` · ${reward}` : ""}`, series, same && score().share);
      if (!same && reward !== state.score) addMultiple(box, `${model.name} · ${judge}`, [judged], score().share);
    }
  }
  const note = "Trained: from the mean of the first tenth of the steps to that of the last. Held-out: from the base to the trained model, at the guidance chosen above. Means over seeds.";
  fill("gap-table", rows.length
    ? el("div", {}, table(["model", "reward", "trained", "held-out, same reward", `held-out, ${judge}${score().share ? " (points)" : ""}`, "gap"], rows), el("p", { class: "note" }, note))
    : empty("None of the runs shown learns from a reward, so none can be over-optimised: the lines are the held-out scores alone."));
  place("over-optimisation").hidden = !rows.length && !drawn.some((points) => points.length > 1);
}

function addMultiple(box, title, series, zero) {
  const shown = series.filter((one) => one.points.length);
  if (!shown.length) return;
  const cell = el("figure", {}, el("h3", {}, title));
  box.append(cell);
  const kinds = [...new Map(shown.map((one) => [one.kind, one])).values()];
  const swatch = (one) => el("span", { class: "key" }, drawnMark(one.symbol ?? SYMBOLS[0], one.colour), one.kind);
  cell.append(lineChart(shown, { width: widthOf(cell), height: 210, x: "steps", y: "", label: title, zero }), legend(kinds.map(swatch)));
}

function gapRow(model, runs, reward, guidance) {
  const mean = (values) => (values.length ? d3.mean(values) : null);
  const trained = runs.map((run) => run.rewards[reward]).filter(Boolean);
  const ends = (read) => runs.map((run) => heldOut(run, guidance, read)).filter((points) => points.length > 1).map((points) => [points[0].y, points[points.length - 1].y]);
  const same = ends((row) => row.rewards[reward]), judge = ends((row) => row[state.score]);
  const told = (pairs) => (pairs.length ? `${short(mean(pairs.map((pair) => pair[0])))} → ${short(mean(pairs.map((pair) => pair[1])))}` : "not measured");
  const gain = (pairs) => (pairs.length ? mean(pairs.map((pair) => pair[1] - pair[0])) : null);
  const gap = same.length && trained.length ? short(gain(trained) - gain(same)) : "–";
  const points = judge.length ? `${inValue(mean(judge.map((pair) => pair[0])))} → ${inValue(mean(judge.map((pair) => pair[1])))}` : "–";
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
  if (norms.length) box.replaceChildren(el("h3", {}, "Gradient norm by term"), lineChart(positive, { width: widthOf(box), x: "steps", y: "norm (log)", label: "Gradient norm by term", log: true }), keys(norms), figuresOf(norms, "steps"));
  else box.replaceChildren(empty("This run logged no gradient norms."));
  const found = series(cosines, (name) => name.slice("cosine/".length).replace("/", " and "));
  if (found.length) other.replaceChildren(el("h3", {}, "Cosine between terms"), lineChart(found, { width: widthOf(other), x: "steps", y: "cosine", label: "Cosine between terms", rules: [0] }), keys(found), figuresOf(found, "steps"));
  else other.replaceChildren(empty("This run has no two terms in a step, so there is no cosine between them."));
}

