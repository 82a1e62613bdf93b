// From a session to a guided prediction at a budget, as `elastic_runtime/denoising/{denoiser,guidance}.py` has it, for one picture.

/** A budget's name, `latents=64`; the same for budgets that are the same. */
export const key = budget => Object.entries(budget).sort().map(pair => pair.join("=")).join(",") || "fixed";

const int64 = values => BigInt64Array.from(values, BigInt);

/** The inputs that carry a budget, by name: {data, dims}. */
function axisFeeds(axes, budget) {
  return Object.fromEntries(axes.map(({name, input, carrier, unit}) => {
    if (carrier === "value") return [input, {data: int64([budget[name]]), dims: []}];
    const length = Math.floor(budget[name] / unit);
    return [input, {data: int64(Array(length).keys()), dims: [length]}];
  }));
}

export class Denoiser {
  /** `run(feeds, budget, rows) -> Float32Array`, the prediction of so many rows. */
  constructor(run, facts) {
    Object.assign(this, {run, facts, sizes: new Set()});
    this.shape = facts.model.sample_shape;
    this.size = this.shape.reduce((one, other) => one * other);
  }

  /** Whether so many rows were run at a budget before: the first run of a size plans its memory, and tells nothing of the others. */
  ran(budget, rows) { return this.sizes.has(`${rows} ${key(budget)}`); }

  /** Budgets and rows of the runs that one evaluation takes. */
  runs(budget, weak, guided) {
    if (!guided) return [[budget, 1]];
    return key(budget) === key(weak) && this.facts.batch > 1 ? [[budget, 2]] : [[budget, 1], [weak, 1]];
  }

  /** The prediction for state `x` at `time`, led away from no label where guidance acts; Float64Array. */
  async guided(x, time, label, guidance, budget, weak) {
    const {scale, active} = guidance, none = this.facts.model.null_label;
    if (!active(time)) return this.predict(x, time, [label], budget);
    let strong, low;
    if (this.runs(budget, weak, true).length === 1) {
      const both = await this.predict(x, time, [label, none], budget);
      [strong, low] = [both.slice(0, this.size), both.slice(this.size)];
    } else {
      strong = await this.predict(x, time, [label], budget);
      low = await this.predict(x, time, [none], weak);
    }
    const [channels, ...sides] = this.shape, led = (this.facts.model.guided_channels ?? channels) * sides[0] * sides[1];
    return strong.map((value, i) => i < led ? low[i] + scale * (value - low[i]) : value);
  }

  async predict(x, time, labels, budget) {
    const rows = labels.length, sample = new Float32Array(rows * this.size);
    for (let row = 0; row < rows; row++) sample.set(x, row * this.size);
    const feeds = {
      sample: {data: sample, dims: [rows, ...this.shape]},
      timestep: {data: new Float32Array(rows).fill(time), dims: [rows]},
      ...(this.facts.inputs.includes("class_labels") ? {class_labels: {data: int64(labels), dims: [rows]}} : {}),
      ...axisFeeds(this.facts.axes, budget),
    };
    const answer = await this.run(feeds, budget, rows);
    this.sizes.add(`${rows} ${key(budget)}`);
    return Float64Array.from(answer);
  }
}
