// ---- choices ------------------------------------------------------------------------------------------------------

function choose(id, label, options, current, change) {
  if (options.length < 2) return fill(id);
  const select = el("select", { id: `${id}-select`, onchange: (event) => { change(event.target.value); draw(); } },
    ...options.map(([value, text]) => el("option", { value, selected: value === current }, text)));
  fill(id, el("label", { for: `${id}-select` }, label), select);
}

/** What can be chosen of a suite; a choice that another suite has too is kept. */
function offerScores() {
  const kept = (options, current) => (options.some(([value]) => value === current) ? current : options[0][0]);
  const scores = Object.entries(suite().scores).map(([name, one]) => [name, one.label]);
  state.score = kept(scores, state.score);
  choose("choose-score", "score", scores, state.score, (value) => { state.score = value; });
  const views = suite().views.map((one) => [one.key, one.label]);
  state.view = kept(views, state.view);
  choose("choose-view", "compare at", views, state.view, (value) => { state.view = value; });
  const minus = measured().map((model) => [String(models.indexOf(model)), model.name]);
  state.minus = Number(kept(minus, String(state.minus)));
  choose("choose-minus", "minus", minus.length > 2 || !measured()[0].base ? minus : [], String(state.minus), (value) => { state.minus = Number(value); });
  const listed = tags().map((tag) => [tag, tag]);
  state.tag = kept(listed, state.tag);
  choose("choose-tag", "tag", listed, state.tag, (value) => { state.tag = value; });
}

function offerChoices() {
  choose("choose-suite", "suite", data.suites.map((one, index) => [String(index), one.name]), "0", (value) => { state.suite = Number(value); offerScores(); });
  if (suite()) offerScores();
  const metrics = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves.metrics)))].sort();
  state.metric = openingMetric(metrics);
  choose("choose-metric", "metric", metrics.map((name) => [name, name]), state.metric, (value) => { state.metric = value; });
  const axes = Object.entries(AXES).filter(([axis]) => data.runs.some((run) => run.curves[axis]));
  choose("choose-axis", "over", axes, state.axis, (value) => { state.axis = value; });
  const several = data.variants.some((one) => one.seeds.length > 1);
  choose("choose-lines", "shown as", several ? [["variants", "mean and range of the runs"], ["runs", "a line for each run"]] : [], state.lines, (value) => { state.lines = value; });
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
  const ofTraining = data.runs.some((run) => run.curves.step.length) ? [drawTraining, drawGradients] : [];
  for (const part of [...(suite() ? ofEvaluations : []), ...ofTraining]) part();
  for (const id of ["training", "gradients"]) place(id).hidden = !ofTraining.length;
  makeScrollable();
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
