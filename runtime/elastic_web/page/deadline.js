// A deadline that is kept by budgets: before each step the best one that all steps still to come could have in the time that is left, at
// the pace of the last steps (`elastic_runtime/choosing/deadline.py`, without its change of steps).

const MARGIN = 0.08;  // of the time, for what nothing predicts
const RECENT = 5;  // steps whose pace still counts
const CLIP = 8;  // a step this many times slower or faster tells of a hang or a clock, not of the pace

/** Of options {seconds, worth} those that are worth their time: each takes longer than the one before, and is better. */
export function improving(options) {
  const sorted = [...options].sort((one, other) => one.seconds - other.seconds || other.worth - one.worth);
  return sorted.filter((option, i) => sorted.slice(0, i).every(before => before.worth < option.worth));
}

const median = values => {
  const sorted = [...values].sort((one, other) => one - other), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};

export class Deadline {
  /** `options` are rows {budget, worth}, `step(budget, index)` predicts the seconds of a step of `steps`, `finish` of what follows them. */
  constructor(seconds, options, steps, step, finish) {
    Object.assign(this, {seconds, steps, step, finish, ratios: []});
    const ahead = budget => this.over(budget, 0);
    this.options = improving(options.map(row => ({budget: row.budget, worth: row.worth, seconds: ahead(row.budget)})));
    const least = this.options[0].seconds + finish;
    if (least > seconds)
      throw new RangeError(
        `No picture is done in ${Math.round(seconds * 1e3)} ms here: the nearest that is reachable is ${Math.ceil(least * 1e3)} ms, `
        + `${steps} steps at the cheapest budget. Allow that, or take fewer steps.`);
  }

  /** Predicted seconds of step `index` and all after it. */
  over(budget, index) {
    let seconds = 0;
    for (let each = index; each < this.steps; each++) seconds += this.step(budget, each);
    return seconds;
  }

  // A slower device is believed at once, since late is worse than poor; a faster one when most of the last steps were.
  get pace() { return this.ratios.length ? Math.max(median(this.ratios), this.ratios.at(-1)) : 1; }

  /** The budget of step `index`, `elapsed` seconds after the picture was asked for: {budget, predicted, reason}. */
  choose(index, elapsed) {
    const cheapest = this.options[0].budget;
    const hiccup = this.ratios.length ? (Math.max(...this.ratios) - this.pace) * this.step(cheapest, index) : 0;
    const left = this.seconds * (1 - MARGIN) - elapsed - this.finish * this.pace - hiccup;
    const fitting = this.options.filter(({budget}) => this.pace * this.over(budget, index) <= left);
    const {budget} = fitting.at(-1) ?? this.options[0];
    const reason = `${Math.round(Math.max(left, 0) * 1e3)} ms left for ${this.steps - index} steps at pace ${this.pace.toFixed(2)}`;
    return {budget, predicted: this.step(budget, index), reason: fitting.length ? reason : `${reason}: as fast as it goes`};
  }

  /** Take in what a step took. */
  measured(predicted, seconds) {
    const ratio = predicted > 0 && seconds >= 0 ? Math.min(Math.max(seconds / predicted, 1 / CLIP), CLIP) : 1;
    this.ratios = [...this.ratios, ratio].slice(-RECENT);
  }
}
