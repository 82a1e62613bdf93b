// Noise schedules: the times that a run visits and how much picture (alpha) and noise (sigma) a sample holds at each, as
// `elastic_runtime/contract/schedule.py` has them.

const LEAST_LOGSNR = -15;

/** `count` numbers from `first` to `last`, as numpy's linspace makes them. */
export function line(first, last, count) {
  const step = (last - first) / (count - 1);
  return Array.from({length: count}, (_, i) => i === count - 1 ? last : i * step + first);
}

class RectifiedFlow {
  constructor({shift = 1, terminal = null}) { Object.assign(this, {shift, terminal}); }

  times(steps) {
    const {shift, terminal} = this;
    const visited = line(1, 0, steps + 1).map(time => shift * time / (1 + (shift - 1) * time));
    if (terminal === null || steps === 1) return visited;
    const stretch = (1 - terminal) / (1 - visited[steps - 1]);
    return visited.map((time, i) => i === steps ? time : 1 - (1 - time) * stretch);
  }

  alphaSigma(time) { return [1 - time, time]; }
}

class ShiftedCosine {
  constructor({shift}) { this.shift = shift; }

  times(steps) { return line(1, 0, steps + 1); }

  alphaSigma(time) {
    const noise = Math.sin(Math.PI * time / 2);
    const picture = Math.max(Math.exp(this.shift / 2) * Math.cos(Math.PI * time / 2), Math.exp(LEAST_LOGSNR / 2) * noise);
    const length = Math.hypot(picture, noise);
    return [picture / length, noise / length];
  }
}

const KINDS = {rectified_flow: RectifiedFlow, shifted_cosine: ShiftedCosine};

/** The schedule of a manifest's record. Times count from 1, noise, to 0, the picture. */
export function schedule(record) { return new KINDS[record.kind](record); }
