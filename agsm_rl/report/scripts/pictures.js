// ---- pictures -----------------------------------------------------------------------------------------------------

const MOST_SHOWN = 16;

/** What the pictures can be: the suite's first ones, or those that a variant changed most. */
function offerPictures() {
  const changed = missing(view().guidance.base) ? [] : variants().flatMap((model) => [
    [`gains ${model.index}`, `${model.name}: largest gains`],
    [`losses ${model.index}`, `${model.name}: largest losses`],
  ]);
  const options = [["first", "the suite's first prompts"], ...changed];
  if (!options.some(([value]) => value === state.pictures)) state.pictures = "first";
  choose("choose-pictures", "shown", options, state.pictures, (value) => { state.pictures = value; });
}

const figureOf = (shot) => Number(shot[state.score]);

/** The places of the prompts to show, and the variant that ranks them, if one does. */
function ranked(rowsOf) {
  const all = suite().pictures.prompts.map((prompt, place) => place);
  const [kind, index] = state.pictures.split(" ");
  if (kind === "first") return { places: all.filter((at) => suite().pictures.prompts[at].first) };
  const model = models[Number(index) + 1];
  const base = rowsOf(BASE), trained = rowsOf(model);
  if (!base || !trained) return { places: [], model };
  const change = (at) => (figureOf(trained[at]) - figureOf(base[at])) * (kind === "gains" ? 1 : -1);
  const places = all.filter((at) => base[at] && trained[at] && change(at) > 0).sort((one, other) => change(other) - change(one));
  return { places: places.slice(0, MOST_SHOWN), model };
}

function drawPictures() {
  offerPictures();
  const { kept, total, prompts, shown } = suite().pictures;
  const rowsOf = (model) => {
    const at = shown[String(guidanceOf(model))];
    return at && (model.base ? at.base : at.variants[model.name]);
  };
  const only = place("only-different").checked && score().share;
  place("only-different").parentElement.hidden = !score().share;
  const models = visible().filter((model) => rowsOf(model));
  const under = score().share ? "The judge's verdict stands under each image, with its reason where something is wrong." : `Under each image stands its ${score().label}, and what that is minus the base's.`;
  const { places, model } = ranked(rowsOf);
  const which = model
    ? `The ${state.pictures.startsWith("gains") ? "largest gains" : "largest losses"} of ${model.name} over the base among the ${kept} of ${total} images whose pictures the run kept: chosen, and so no sample of what it draws.`
    : "The suite's first prompts, not chosen ones, each variant by its first seed.";
  place("pictures-note").textContent = `${which} ${under}`;
  if (!models.length) return fill("pictures-grid", empty("The runs shown kept no single images at this guidance (in their folders: samples/eval, or where eval.json says)."));
  const cards = places.flatMap((at) => {
    const shots = models.map((one) => ({ model: one, shot: rowsOf(one)[at] })).filter((one) => one.shot);
    if (!shots.length || (only && new Set(shots.map((one) => one.shot[state.score])).size < 2)) return [];
    const base = shots.find((one) => one.model.base)?.shot;
    const { prompt, tag } = prompts[at];
    return [el("div", { class: "prompt" }, el("p", {}, prompt, el("span", {}, tag)), el("div", { class: "shots" }, ...shots.map((one) => picture(one, base))))];
  });
  // Two prompts a row where a row holds them.
  place("pictures-grid").style.setProperty("--card-width", `${Math.max(320, models.length * 116)}px`);
  fill("pictures-grid", ...(cards.length ? cards : [empty(model ? "None among the pictures that were kept." : "All verdicts are alike on the prompts shown.")]));
}

function picture({ model, shot }, base) {
  const right = shot[state.score];
  const change = base && !model.base ? ` (${inChange(figureOf(shot) - figureOf(base))})` : "";
  const verdict = score().share ? (right ? "✓ right" : "✗ wrong") : `${short(figureOf(shot))}${change}`;
  const image = el("img", { src: suite().pictures.images[shot.image], alt: `${model.name}: ${score().share ? (right ? "right" : "wrong") : verdict}` });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 96));
  const reason = score().share && shot.reason && !right ? `: ${shot.reason}` : "";
  return el("figure", { class: score().share ? (right ? "right" : "wrong") : "number", title: shot.reason || undefined }, image,
    el("figcaption", {}, el("b", {}, mark(model), model.name), el("span", { class: "verdict" }, verdict), cut(reason, 80)));
}
