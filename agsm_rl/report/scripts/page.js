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
  for (const part of [...(state.view ? ofEvaluations : []), drawTraining, drawGradients]) part();
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
