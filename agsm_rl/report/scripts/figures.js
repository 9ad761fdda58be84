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
  suite: 0,
  score: "",
  view: "",
  hidden: new Set(),
  minus: 0, // of models
  tag: MEAN,
  metric: "",
  axis: "step",
  lines: "variants",
  pictures: "first",
  run: 0,
};

// ---- figures ------------------------------------------------------------------------------------------------------

const missing = (value) => value === null || value === undefined;
const percent = (value) => (missing(value) ? "–" : (100 * value).toFixed(1));
const signed = (value) => (missing(value) ? "–" : (value <= -0.0005 ? "−" : "+") + Math.abs(100 * value).toFixed(1));
const short = (value) => (missing(value) ? "–" : Number(value.toPrecision(4)).toString().replace("-", "−"));
/** So many decimals that an interval's width has two digits; undefined where there is no width to go by. */
const decimalsOf = ([, low, high]) => (missing(low) || high <= low ? undefined : Math.min(12, Math.max(0, 1 - Math.floor(Math.log10(high - low)))));
const fixed = (value, decimals) => (missing(value) || decimals === undefined ? short(value) : value.toFixed(decimals).replace(/^-(0\.?0*)$/, "$1").replace("-", "−"));
const signedNumber = (value, decimals) => (missing(value) ? "–" : (value < 0 ? "−" : "+") + fixed(Math.abs(value), decimals));
const interval = (part, format) => (missing(part[1]) ? "" : `[${format(part[1], decimalsOf(part))}, ${format(part[2], decimalsOf(part))}]`);
const clear = (part) => part[1] > 0 || part[2] < 0;

const suite = () => data.suites[state.suite]; // none where no image was measured
const score = () => suite().scores[state.score];
const inValue = (value, decimals) => (score().share ? percent(value) : fixed(value, decimals));
const inChange = (value, decimals) => (score().share ? signed(value) : signedNumber(value, decimals));
/** The first figure of a part, with the decimals of its interval. */
const head = (part, format) => format(part[0], decimalsOf(part));
const unit = () => (score().share ? " %" : "");
const points = () => (score().share ? " points" : "");
const tags = () => (Object.keys(suite().tags).length > 1 ? [MEAN, ...Object.keys(suite().tags)] : [MEAN]);

const viewNamed = (key) => suite().views.find((one) => one.key === key);
const view = () => viewNamed(state.view);
const guidanceIn = (model, at) => (model.base ? at.guidance.base : at.guidance.variants[model.name]);
const guidanceOf = (model) => guidanceIn(model, view());
const measured = () => models.filter((model) => !missing(guidanceOf(model)));
const visible = () => measured().filter((model) => model.base || !state.hidden.has(model.name));
const variants = () => visible().filter((model) => !model.base);
const partOf = (estimate, tag) => (tag === MEAN ? estimate.overall : estimate.tags[tag]);

function scoreOf(model, guidance = guidanceOf(model)) {
  return suite().estimates.find(
    (one) => one.score === state.score && one.base === model.base && one.model === model.name && one.guidance === guidance,
  );
}

/** The estimate of `model` minus `other`; each pair is kept in one direction only. */
function differenceOf(model, other, key = state.view) {
  const at = viewNamed(key);
  const find = (first, second) =>
    suite().differences.find(
      (one) =>
        one.score === state.score && !first.base && one.model === first.name && one.base === second.base &&
        one.minus === second.name && one.guidance === guidanceIn(first, at) && one.minus_guidance === guidanceIn(second, at),
    );
  const found = find(model, other);
  if (found) return found;
  const back = find(other, model);
  if (!back) return undefined;
  const turned = (value) => (missing(value) ? null : -value);
  const turn = ([value, low, high]) => [turned(value), turned(high), turned(low)];
  return {
    overall: turn(back.overall),
    tags: Object.fromEntries(Object.entries(back.tags).map(([tag, part]) => [tag, turn(part)])),
    by_seed: back.by_seed.map(turned),
    wins: back.wins && [1 - back.wins[0], 1 - back.wins[2], 1 - back.wins[1]],
  };
}
