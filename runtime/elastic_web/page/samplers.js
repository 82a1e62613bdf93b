// Denoising loops as async generators, as `elastic_runtime/sampling/{flow,multistep,diffusion}.py` has them. The state is Float64Array.
// `predict(x, time)` gives the model's prediction; each step yields {index, time, nextTime, sample, denoised}, where `denoised` is the
// picture that the model saw in the state before.

/** one * x + other * y, element by element. */
const sum = (one, x, other, y) => x.map((value, i) => one * value + other * y[i]);

async function* each(start, times, advance) {
  let x = Float64Array.from(start);
  for (let index = 0; index < times.length - 1; index++) {
    const time = times[index], nextTime = times[index + 1];
    const {sample, denoised} = await advance(x, time, nextTime, index);
    x = sample;
    yield {index, time, nextTime, sample, denoised};
  }
}

const euler = ({predict, start, times}) => each(start, times, async (x, time, next) => {
  const velocity = await predict(x, time);
  return {sample: sum(1, x, next - time, velocity), denoised: sum(1, x, -time, velocity)};
});

const heun = ({predict, start, times}) => each(start, times, async (x, time, next, index) => {
  const velocity = await predict(x, time);
  let sample = sum(1, x, next - time, velocity);
  if (index < times.length - 2) {
    const ahead = await predict(sample, next);
    sample = sum(1, x, (next - time) * 0.5, sum(1, velocity, 1, ahead));
  }
  return {sample, denoised: sum(1, x, -time, velocity)};
});

// Weights of values at `places` in the integral from `low` to `high` of the polynomial through them (Adams-Bashforth), by Gauss.
function weights(places, low, high) {
  const scale = high - low, count = places.length;
  const rows = places.map((_, power) => [...places.map(place => ((place - low) / scale) ** power), 1 / (power + 1)]);
  for (let pivot = 0; pivot < count; pivot++) {
    const best = rows.slice(pivot).reduce((top, row, i) => Math.abs(row[pivot]) > Math.abs(rows[top][pivot]) ? pivot + i : top, pivot);
    [rows[pivot], rows[best]] = [rows[best], rows[pivot]];
    for (let row = 0; row < count; row++) {
      if (row === pivot) continue;
      const factor = rows[row][pivot] / rows[pivot][pivot];
      rows[row] = rows[row].map((value, i) => value - factor * rows[pivot][i]);
    }
  }
  return rows.map((row, i) => row[count] / row[i] * scale);
}

const adams = order => ({predict, start, times}) => {
  const known = [];
  return each(start, times, async (x, time, next) => {
    const velocity = await predict(x, time);
    known.push([time, velocity]);
    if (known.length > order) known.shift();
    const shares = weights(known.map(([place]) => place), time, next);
    const sample = known.reduce((state, [, answer], i) => sum(1, state, shares[i], answer), x);
    return {sample, denoised: sum(1, x, -time, velocity)};
  });
};

// The predicted picture, from the state, the model's output, alpha and sigma.
const PICTURES = {
  v: (x, v, alpha, sigma) => sum(alpha, x, -sigma, v),
  epsilon: (x, noise, alpha, sigma) => sum(1 / alpha, x, -sigma / alpha, noise),
  velocity: (x, velocity, alpha, sigma) => sum(1 / (alpha + sigma), x, -sigma / (alpha + sigma), velocity),
};

async function split({predict, schedule, prediction, limit}, x, time) {
  const [alpha, sigma] = schedule.alphaSigma(time);
  let picture = PICTURES[prediction](x, await predict(x, time), alpha, sigma);
  if (limit !== null) picture = picture.map(value => Math.min(Math.max(value, -limit), limit));
  return {alpha, sigma, picture, noise: sum(1 / sigma, x, -alpha / sigma, picture)};
}

const ddim = run => each(run.start, run.times, async (x, time, next) => {
  const {picture, noise} = await split(run, x, time), [alpha, sigma] = run.schedule.alphaSigma(next);
  return {sample: sum(alpha, picture, sigma, noise), denoised: picture};
});

const ddpm = run => each(run.start, run.times, async (x, time, next, index) => {
  const {alpha, sigma, picture, noise} = await split(run, x, time), [alphaNext, sigmaNext] = run.schedule.alphaSigma(next);
  let sample = sum(alphaNext, picture, sigmaNext ** 2 / sigma * alpha / alphaNext, noise);
  if (index < run.times.length - 2) {
    const beta = 1 - (alpha / alphaNext) ** 2;  // of the whole way from one time to the next
    sample = sum(1, sample, Math.sqrt(Math.max(beta * (sigmaNext / sigma) ** 2, 0)), run.source.normals(x.length));
  }
  return {sample, denoised: picture};
});

/** By name: run({predict, start, times, source, schedule, prediction, limit}) -> async generator of steps. */
export const SAMPLERS = {euler, heun, ab2: adams(2), ab3: adams(3), ddim, ddpm};

/** Times at which a step evaluates the model. */
export const evaluations = (sampler, times, index) =>
  sampler === "heun" && index < times.length - 2 ? [times[index], times[index + 1]] : [times[index]];
