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
  lines: "variants",
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

