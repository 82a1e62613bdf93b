// From final latents to pixels, as `elastic_runtime/denoising/pictures.py` has it.

/** Values in about [-1, 1] of latents: through the decoder where there is one; {data, shape: [channels, height, width]}. */
export async function values(latents, {sample_shape: [channels, height, width], vae}, decode) {
  if (!vae) return {data: latents, shape: [channels, height, width]};
  const scaled = Float32Array.from(latents, value => value / vae.scaling_factor + vae.shift_factor);
  const data = await decode(scaled, [1, channels, height, width]);
  if (!data.every(Number.isFinite)) throw new Error("The decoder gave values that are not finite: write the site with --precision fp32.");
  const sides = [height * vae.upscale, width * vae.upscale];
  return {data, shape: [data.length / (sides[0] * sides[1]), ...sides]};
}

/** Pixels of values in [-1, 1]: {rgba, width, height}, grey where there is one channel. */
export function pixels({data, shape: [channels, height, width]}) {
  const area = height * width, rgba = new Uint8ClampedArray(4 * area).fill(255);
  for (let i = 0; i < area; i++)
    for (let channel = 0; channel < 3; channel++)
      rgba[4 * i + channel] = Math.round(255 * Math.min(Math.max(data[(channels === 1 ? 0 : channel) * area + i] / 2 + 0.5, 0), 1));
  return {rgba, width, height};
}
