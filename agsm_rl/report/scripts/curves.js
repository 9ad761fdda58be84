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

