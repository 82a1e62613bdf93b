// What runs take here: seconds by budget and rows, measured and learning from every run; between measured budgets a straight line in FLOPs.

import {key} from "./denoiser.js";

const WEIGHT = 0.3;  // of the latest run
const PLACES = 5;  // budgets that are measured
const PATIENCE = 0.5;  // seconds: a run that takes longer is timed once
const REPEATS = 3;

export class Times {
  /** `budgets` are rows {budget, flops}, cheapest first; `kept` is what `kept` gave, here or in an earlier visit. */
  constructor(budgets, kept = {}) {
    this.flops = new Map(budgets.map(row => [key(row.budget), row.flops]));
    this.rows = budgets;
    const {finish = 0, ...measured} = kept;
    this.measured = new Map(Object.entries(measured).filter(([, seconds]) => seconds > 0));
    this.finish = finish;
  }

  get kept() { return {...Object.fromEntries(this.measured), finish: this.finish}; }

  observe(budget, rows, seconds) {
    const name = `${rows} ${key(budget)}`, before = this.measured.get(name);
    this.measured.set(name, before === undefined ? seconds : before + WEIGHT * (seconds - before));
  }

  /** Predicted seconds of one run. */
  seconds(budget, rows) {
    const exact = this.measured.get(`${rows} ${key(budget)}`);
    if (exact !== undefined) return exact;
    const times = this.rows.map(row => [row.flops, this.measured.get(`${rows} ${key(row.budget)}`)]);
    const points = times.filter(([, time]) => time !== undefined);
    if (points.length === 0) return rows > 1 ? rows * this.seconds(budget, 1) : 0;
    const at = this.flops.get(key(budget)) ?? points.at(-1)[0];
    const above = points.findIndex(([flops]) => flops >= at);
    if (above <= 0) return points.at(above)[1];
    const [[low, before], [high, after]] = points.slice(above - 1, above + 1);
    return before + (after - before) * (at - low) / (high - low);
  }

  /** Measure evenly chosen budgets: `run(budget, rows)` does one, `said(done, all)` hears of the progress. */
  async measure(run, rows, clock, said) {
    const last = this.rows.length - 1, count = Math.min(PLACES, this.rows.length);
    const chosen = Array.from({length: count}, (_, i) => this.rows[count > 1 ? Math.round(i * last / (count - 1)) : last].budget);
    const points = rows.flatMap(size => chosen.map(budget => [budget, size])), seconds = points.map(() => []);
    for (let round = 0; round <= REPEATS; round++)
      for (const [i, [budget, size]] of points.entries()) {
        if (round > 1 && seconds[i].at(-1) > PATIENCE) continue;
        const begun = clock();
        await run(budget, size);
        seconds[i].push(clock() - begun);
        said(round * points.length + i + 1, (REPEATS + 1) * points.length);
      }
    // The first run of a size plans its memory, and tells nothing where there are others.
    for (const [i, [budget, size]] of points.entries()) {
      const sorted = (seconds[i].length > 1 ? seconds[i].slice(1) : seconds[i]).sort((one, other) => one - other);
      this.measured.set(`${size} ${key(budget)}`, sorted[sorted.length >> 1]);
    }
  }
}
