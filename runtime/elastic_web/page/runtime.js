// Opens a site's graphs with onnxruntime-web, and proves them by what the original answered before anything is drawn.

import {Denoiser} from "./denoiser.js";
import {Times} from "./times.js";

const LIBRARIES = {wasm: "./onnxruntime-web/ort.wasm.min.mjs", webgpu: "./onnxruntime-web/ort.webgpu.min.mjs"};
const ON_GPU = ["fp32", "fp16"];  // precisions whose operators are all there; the others would go back and forth
const NUMBERS = {float32: Float32Array, int64: BigInt64Array};
export const clock = () => performance.now() / 1e3;

/** Whether there is a GPU that computes: an adapter in software would be slower than WebAssembly. */
async function gpu() {
  const adapter = await navigator.gpu?.requestAdapter();
  return Boolean(adapter) && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
}

/** The server's answer for a file of the site. */
async function asked(file) {
  let answer;
  try { answer = await fetch(new URL(file, import.meta.url)); } catch (error) {
    throw new Error(`${file} cannot be loaded: ${error.message}.`);
  }
  if (!answer.ok) throw new Error(`${file} is not there (${answer.status}): copy the whole site, or write it again.`);
  return answer;
}

/** The bytes of a file, Uint8Array, checked against its SHA-256; `said(share)` hears of the progress. */
async function fetched({file, bytes, sha256}, said) {
  const answer = await asked(file);
  const content = new Uint8Array(bytes);
  let length = 0;
  for (const reader = answer.body.getReader();;) {
    const {done, value} = await reader.read();
    if (done) break;
    if (length + value.length <= bytes) content.set(value, length);
    length += value.length;
    said(length / bytes);
  }
  let digest = sha256;
  if (crypto.subtle) {  // not over plain HTTP from another machine
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
    digest = Array.from(hash, byte => byte.toString(16).padStart(2, "0")).join("");
  }
  if (length !== bytes || digest !== sha256) throw new Error(`${file} is damaged: copy the whole site, or write it again.`);
  return content;
}

/** A model that draws: {facts, denoiser, times, decode, where, notes, proven, close}. `provider` is wasm, webgpu, or auto: a GPU if it
    answers as the original does, else WebAssembly. `kept` are times of earlier visits. */
export async function open(facts, provider, kept, said) {
  const files = {};
  for (const [graph, entry] of Object.entries(facts.models))
    files[graph] = await fetched(entry, share => said(`Loading the ${graph}`, share));
  const notes = [];
  if (provider === "webgpu" || (provider === "auto" && ON_GPU.includes(facts.precision) && await gpu())) {
    try { return await opened(facts, "webgpu", files, kept, said, notes); } catch (error) {
      if (provider === "webgpu") throw error;
      notes.push(`WebGPU is left aside: ${error.message}`);
    }
  }
  return opened(facts, "wasm", files, kept, said, notes);
}

async function opened(facts, provider, files, kept, said, notes) {
  said(`Starting ${provider === "wasm" ? "WebAssembly" : "WebGPU"}`, null);
  const ort = await import(LIBRARIES[provider]);
  ort.env.logLevel = "error";
  const sessions = {};
  for (const [graph, content] of Object.entries(files))
    sessions[graph] = await ort.InferenceSession.create(content, {executionProviders: [provider], logSeverityLevel: 3});
  const threads = provider === "wasm" && self.crossOriginIsolated ? ort.env.wasm.numThreads : 1;
  const where = provider === "wasm" ? `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}` : "WebGPU";
  const name = `${facts.models.denoiser.sha256} ${where}`, times = new Times(facts.budgets, kept[name]);
  const tensor = ({data, dims}) => new ort.Tensor(data instanceof BigInt64Array ? "int64" : "float32", data, dims);
  const run = async (session, feeds, output) => {
    const answers = await session.run(Object.fromEntries(Object.entries(feeds).map(([each, feed]) => [each, tensor(feed)])));
    const data = answers[output].data.slice();
    for (const answer of Object.values(answers)) answer.dispose();
    return data;
  };
  const denoiser = new Denoiser(async (feeds, budget, rows) => {
    const begun = clock(), answer = await run(sessions.denoiser, feeds, "prediction");
    if (denoiser.ran(budget, rows)) times.observe(budget, rows, clock() - begun);
    return answer;
  }, facts);
  const decode = sessions.decoder ? (data, dims) => run(sessions.decoder, {latent: {data, dims}}, "image") : null;
  const close = async () => { for (const session of Object.values(sessions)) await session.release(); };
  const model = {facts, name, denoiser, times, decode, where, notes, close, proven: null};
  if (facts.proof) {
    try { model.proven = await proven(facts, denoiser, decode, said); } catch (error) { await close(); throw error; }
  }
  return model;
}

/** How far the answers are from the original's, by graph: {answers, largest}; throws where one is off by more than it may. */
async function proven({proof, inputs, model}, denoiser, decode, said) {
  const content = await (await asked("reference.bin")).arrayBuffer();
  const numbers = ({offset, length, dtype}) =>
    new NUMBERS[dtype](content.slice(offset, offset + length * NUMBERS[dtype].BYTES_PER_ELEMENT));
  const answering = {
    denoiser({sample, timestep, class_labels}, {budget}) {
      const label = inputs.includes("class_labels") ? Number(numbers(class_labels)[0]) : model.null_label;
      return denoiser.predict(Float64Array.from(numbers(sample)), numbers(timestep)[0], [label], budget);
    },
    decoder: ({latent}) => decode(numbers(latent), latent.dims),
  };
  const found = {};
  for (const [graph, {feeds, answers}] of Object.entries(proof)) {
    let largest = 0;
    for (const [i, answer] of answers.entries()) {
      said("Comparing with the original", i / answers.length);
      const wanted = numbers(answer.output), given = await answering[graph](feeds, answer);
      const off = given.reduce((most, value, at) => Math.max(most, Math.abs(value - wanted[at])), 0);
      if (!(off <= answer.bound && given.length === wanted.length))
        throw new Error(`the ${graph} answers otherwise than the original, by ${off.toPrecision(2)} where ${answer.bound.toPrecision(2)} `
          + "is allowed.");
      largest = Math.max(largest, off);
    }
    found[graph] = {answers: answers.length, largest};
  }
  return found;
}
