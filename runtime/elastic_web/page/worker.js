// The thread that draws, so that the page stays awake. It hears {id, kind, ...} and answers {id, kind: "done" | "failed" | others, ...}.

import {draw, pictureSeconds} from "./drawing.js";
import {pixels, values} from "./pictures.js";
import {clock, open} from "./runtime.js";

let model = null, cancelled = null;

// A turn of the event loop, in which a cancellation is heard; timers would wait four milliseconds.
const turns = new MessageChannel(), waiting = [];
turns.port1.onmessage = () => waiting.shift()();
const turn = () => new Promise(resolve => { waiting.push(resolve); turns.port2.postMessage(null); });

const described = () => {
  const {where, notes, proven, name, times} = model;
  return {where, notes, proven, name, kept: times.kept, measured: times.measured.size > 0};
};

const TASKS = {
  async open({facts, provider, kept}, say) {
    await model?.close();
    model = null;
    model = await open(facts, provider, kept, (what, share) => say({kind: "progress", what, share}));
    return described();
  },

  async measure(_, say) {
    const {denoiser, times, facts} = model, nothing = new Float64Array(denoiser.size);
    const run = (budget, rows) => denoiser.predict(nothing, 0.5, Array(rows).fill(0), budget);
    const rows = facts.batch > 1 && facts.model.num_classes ? [1, 2] : [1];
    await times.measure(async (budget, size) => { await run(budget, size); await turn(); }, rows, clock,
      (done, all) => say({kind: "progress", what: "Measuring this device", share: done / all}));
    for (let round = 0; round < 2; round++) {
      const begun = clock();
      pixels(await values(nothing, facts.model, model.decode));
      times.finish = clock() - begun;
    }
    return described();
  },

  async predict({request}) {
    return {seconds: model.facts.budgets.map(({budget}) => pictureSeconds(model, request, budget))};
  },

  async draw({id, request}, say) {
    const begun = clock(), drawing = draw(model, request, clock);
    for (;;) {
      const {done, value} = await drawing.next();
      if (done) {
        const shown = await values(value.latents, model.facts.model, model.decode), seconds = clock() - begun;
        const {latents, records, seed, deadline} = value, late = deadline === null ? null : Math.max(seconds - deadline, 0);
        return {picture: pixels(shown), latents, records, seed, seconds, late, ...described()};
      }
      const preview = model.decode ? null : pixels(await values(value.denoised, model.facts.model, null));
      say({kind: "step", record: value.record, share: value.share, preview});
      await turn();
      if (cancelled === id) { await drawing.return(); return {cancelled: true}; }
    }
  },
};

let latest = Promise.resolve();  // a session runs one thing at a time

onmessage = ({data}) => {
  if (data.kind === "cancel") { cancelled = data.of; return; }
  const say = message => postMessage({id: data.id, ...message});
  latest = latest.then(async () => {
    try {
      if (!model && data.kind !== "open") throw new Error("No model is open.");
      say({kind: "done", ...await TASKS[data.kind](data, say)});
    } catch (error) { say({kind: "failed", message: error.message, name: error.name}); }
  });
};
