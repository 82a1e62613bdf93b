// One picture: a request, checked, becomes steps and then values. The words of a request are those of Python's `Request`.

import {Deadline} from "./deadline.js";
import {key} from "./denoiser.js";
import {Source} from "./noise.js";
import {SAMPLERS, evaluations} from "./samplers.js";
import {schedule} from "./schedules.js";

const STEPS = 20, MOST_STEPS = 1000;
const FIELDS = [
  "class_labels", "num_inference_steps", "guidance_scale", "guidance_interval", "sampler", "budget", "guidance_budget", "seeds", "noise",
  "deadline_ms",
];

const whole = (value, low, high) => Number.isInteger(value) && low <= value && value <= high;

/** A request with everything filled in. Throws RangeError for what the model does not take. */
export function checked(request, facts) {
  const {model, axes, samplers} = facts, size = model.sample_shape.reduce((one, other) => one * other);
  const given = name => (request[name] ?? null) !== null;
  const refuse = (name, wanted) => { throw new RangeError(`${name} must be ${wanted}, got ${JSON.stringify(request[name])}.`); };
  for (const name of Object.keys(request))
    if (!FIELDS.includes(name)) throw new RangeError(`There is no ${name} in a request; there are ${FIELDS.join(", ")}.`);
  const {
    class_labels = 0, num_inference_steps = STEPS, guidance_scale = 1, guidance_interval = [0, 1], sampler = samplers[0],
    seeds = crypto.getRandomValues(new Uint32Array(1))[0], noise = null, deadline_ms = null,
  } = request;
  if (!model.num_classes && given("class_labels"))
    throw new RangeError("The model has no classes: leave class_labels out.");
  if (!whole(class_labels, 0, Math.max(model.num_classes - 1, 0))) refuse("class_labels", `0 to ${Math.max(model.num_classes - 1, 0)}`);
  if (!whole(num_inference_steps, 1, MOST_STEPS)) refuse("num_inference_steps", `a whole number from 1 to ${MOST_STEPS}`);
  if (!(guidance_scale >= 1 && guidance_scale < Infinity)) refuse("guidance_scale", "1 (off) or more");
  if (guidance_scale > 1 && !model.num_classes) refuse("guidance_scale", "1: the model has no classes to lead away from");
  const [low, high, ...more] = Array.isArray(guidance_interval) ? guidance_interval : [];
  if (!(0 <= low && low <= high && high <= 1) || more.length) refuse("guidance_interval", "two times that rise, within 0 to 1");
  const idle = guidance_scale > 1 ? null : given("guidance_budget") ? "guidance_budget" : low > 0 || high < 1 ? "guidance_interval" : null;
  if (idle) throw new RangeError(`${idle} acts through guidance, which is off: give guidance_scale above 1.`);
  if (!samplers.includes(sampler)) refuse("sampler", samplers.join(", "));
  const digits = /^\d{1,19}$/.test(String(seeds)) && (typeof seeds === "string" || Number.isSafeInteger(seeds));
  if (!digits || BigInt(seeds) >= 2n ** 63n) refuse("seeds", "a whole number from 0 to 2^63 - 1, as a text where it is above 2^53");
  if (noise !== null && (noise.length !== size || !Array.from(noise).every(Number.isFinite))) refuse("noise", `${size} finite numbers`);
  if (deadline_ms !== null && !(deadline_ms > 0)) refuse("deadline_ms", "above 0");
  if (deadline_ms !== null && given("budget"))
    throw new RangeError("Give budget or deadline_ms, not both: a deadline chooses the budgets.");
  const budget = point(request.budget ?? {}, axes), weak = given("guidance_budget") ? point(request.guidance_budget, axes) : null;
  return {
    label: model.num_classes ? class_labels : 0, steps: num_inference_steps, sampler, seed: String(seeds), noise, budget, weak,
    deadline: deadline_ms === null ? null : deadline_ms / 1e3,
    guidance: {scale: guidance_scale, active: time => guidance_scale > 1 && low <= time && time <= high},
  };
}

/** A budget with every axis in it, checked. */
function point(budget, axes) {
  const strange = Object.keys(budget).find(name => !axes.some(axis => axis.name === name));
  if (strange) throw new RangeError(`The model has no axis ${strange}; it has ${axes.map(axis => axis.name).join(", ") || "none"}.`);
  return Object.fromEntries(axes.map(({name, min, max, step, default: usual}) => {
    const value = budget[name] ?? usual;
    if (!whole(value, min, max) || (value - min) % step)
      throw new RangeError(`${name} is ${min} to ${max} in steps of ${step}, got ${value}.`);
    return [name, value];
  }));
}

/** Budgets and rows of the runs that step `index` takes, at a budget and a weak branch's. */
function stepRuns(model, drawing, times, index, budget) {
  return evaluations(drawing.sampler, times, index).flatMap(
    time => model.denoiser.runs(budget, drawing.weak ?? budget, drawing.guidance.active(time)));
}

/** Seconds that they are predicted to take. */
function stepSeconds(model, drawing, times, index, budget) {
  let seconds = 0;
  for (const [each, rows] of stepRuns(model, drawing, times, index, budget)) seconds += model.times.seconds(each, rows);
  return seconds;
}

/** Predicted seconds of a whole picture at a budget. */
export function pictureSeconds(model, request, budget) {
  const drawing = checked(request, model.facts), times = schedule(model.facts.model.schedule).times(drawing.steps);
  let seconds = model.times.finish;
  for (let index = 0; index < drawing.steps; index++) seconds += stepSeconds(model, drawing, times, index, budget);
  return seconds;
}

/** Draw with what `runtime.js` opened: yields {record, denoised, share} after each step, and returns {latents, records, seed, deadline}. */
export async function* draw(model, request, clock) {
  const begun = clock(), {facts} = model, drawing = checked(request, facts), path = schedule(facts.model.schedule);
  const times = path.times(drawing.steps), source = new Source(drawing.seed);
  const start = drawing.noise ?? source.normals(model.denoiser.size);
  const predicted = (budget, index) => stepSeconds(model, drawing, times, index, budget);
  const policy = drawing.deadline === null ? null
    : new Deadline(drawing.deadline, atLeast(facts.budgets, drawing.weak), drawing.steps, predicted, model.times.finish);
  const fixed = {budget: drawing.budget, reason: ""};
  // A step with a run of a size that was never run tells nothing of the pace.
  const fresh = (budget, index) => stepRuns(model, drawing, times, index, budget).some(run => !model.denoiser.ran(...run));
  let choice = policy ? policy.choose(0, clock() - begun) : fixed, first = fresh(choice.budget, 0), before = clock();
  const predict = (x, time) =>
    model.denoiser.guided(x, time, drawing.label, drawing.guidance, choice.budget, drawing.weak ?? choice.budget);
  const limit = facts.model.pixels ? 1 : null;
  const records = [];
  let latents = start;
  const loop = {predict, start, times, source, schedule: path, prediction: facts.model.prediction, limit};
  for await (const step of SAMPLERS[drawing.sampler](loop)) {
    if (!step.sample.every(Number.isFinite))
      throw new Error(`Step ${step.index + 1} gave values that are not finite: take another sampler, or a site in float32.`);
    const now = clock(), led = evaluations(drawing.sampler, times, step.index).some(drawing.guidance.active);
    const record = {
      index: step.index, time: step.time, next_time: step.nextTime, budget: choice.budget,
      guidance_budget: led ? drawing.weak ?? choice.budget : null,
      seconds: now - before, predicted: choice.predicted ?? predicted(choice.budget, step.index), reason: choice.reason,
    };
    records.push(record);
    latents = step.sample;
    if (policy && !first) policy.measured(record.predicted, record.seconds);
    yield {record, denoised: step.denoised, share: records.length / drawing.steps};
    if (policy && step.index + 1 < drawing.steps) {
      choice = policy.choose(step.index + 1, clock() - begun);
      first = fresh(choice.budget, step.index + 1);
    }
    before = clock();
  }
  return {latents, records, seed: drawing.seed, deadline: drawing.deadline};
}

/** Budgets no smaller than the weak branch's. */
function atLeast(rows, weak) {
  if (!weak) return rows;
  const least = rows.find(row => key(row.budget) === key(weak))?.flops ?? 0;
  return rows.filter(row => row.flops >= least);
}
