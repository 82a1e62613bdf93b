// The page: what is asked of the worker, and what is shown of its answers.

import {Client} from "./client.js";
import {key} from "./denoiser.js";

const at = id => document.getElementById(id);
const named = (tag, attributes = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
};
const drawn = (tag, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
};
const SHOWN = 24, STORE = "elastic-export-times", MOST_RADIOS = 100;
const site = JSON.parse(at("site").textContent), client = new Client(), canvas = document.createElement("canvas");
const worded = budget => Object.entries(budget).map(pair => pair.join(" ")).join(", ") || "fixed";
const milliseconds = seconds => seconds === undefined ? "" : (1e3 * seconds).toFixed(seconds < 0.01 ? 1 : 0);
const percent = share => share === null ? "" : `${(100 * share).toFixed(1)} %`;
let opened = null, drawing = null, pictures = [], last = null;

function say(words, wrong = false) {
  if (at("status").textContent !== words) at("status").textContent = words;  // which a screen reader says once
  at("status").classList.toggle("wrong", wrong);
}

function progress({what, share}) {
  say(`${what} …`);
  if (share === null) at("progress").removeAttribute("value"); else at("progress").value = share;
}

// Times of this browser, by model and by what runs it; a browser that keeps nothing measures at every visit.
function kept() { try { return JSON.parse(localStorage.getItem(STORE)) ?? {}; } catch { return {}; } }
function keep({name, kept: table}) {
  try { localStorage.setItem(STORE, JSON.stringify({...kept(), [name]: table})); } catch { /* a private window */ }
}

/** Do what takes the worker's time, with the buttons locked meanwhile. */
async function busily(task) {
  busy(true);
  try { await task(); } catch (error) { say(error.message, true); }
  at("progress").value = 0;
  busy(false);
}

function busy(is) {
  at("draw").disabled = at("measure").disabled = is || !opened;
  at("provider").disabled = is;
  at("cancel").disabled = !drawing;
}

async function open() {
  opened = null;
  const model = await client.call("open", {facts: site, provider: at("provider").value, kept: kept()}, progress);
  at("where").textContent = `${site.precision}, ${model.where}`;
  at("proof").textContent = proof(model);
  opened = model.measured ? model : await client.call("measure", {}, progress);
  keep(opened);
  await predicted();
  say("Ready.");
}

function proof({proven, notes}) {
  const words = {
    denoiser: ({answers, largest}) => `at ${answers} budgets: the largest difference is ${largest.toExponential(1)}`,
    decoder: ({largest}) => `as the picture of a latent: the largest difference is ${largest.toExponential(1)}`,
  };
  const compared = proven
    ? `Compared with what the original answered ${Object.entries(proven).map(([graph, found]) => words[graph](found)).join("; and ")}.`
    : "The bundle holds no answers of the original to compare with.";
  return [...notes, compared, `${site.library}. Nothing leaves this browser.`].join(" ");
}

async function measure() {
  opened = await client.call("measure", {}, progress);
  keep(opened);
  await predicted();
  say("Measured.");
}

function asked() {
  const number = id => at(id).value === "" ? undefined : Number(at(id).value);
  const request = {
    num_inference_steps: number("steps"), sampler: at("sampler").value, guidance_scale: site.model.num_classes ? number("guidance") : 1,
    seeds: at("seed").value === "" ? undefined : at("seed").value,
  };
  if (site.model.num_classes) request.class_labels = Number((at("label") ?? document.querySelector("input[name=class]:checked")).value);
  if (at("weak").value === "least" && request.guidance_scale > 1) request.guidance_budget = site.budgets[0].budget;
  if (at("keep").checked) request.deadline_ms = number("deadline"); else request.budget = site.budgets[at("budget").value].budget;
  return Object.fromEntries(Object.entries(request).filter(([, value]) => value !== undefined));
}

async function predicted() {
  const request = asked();
  delete request.deadline_ms;
  try { pictures = (await client.call("predict", {request})).seconds; } catch { pictures = []; }  // of a form half filled in
  const {finish = 0} = opened.kept, steps = request.num_inference_steps ?? 1;
  at("table").replaceChildren(...site.budgets.map((row, i) => named("tr", {},
    named("th", {scope: "row", textContent: worded(row.budget)}),
    named("td", {textContent: milliseconds(pictures[i] && (pictures[i] - finish) / steps)}),
    named("td", {textContent: milliseconds(pictures[i])}), named("td", {textContent: percent(row.quality) || "not graded"}))));
  budgeted();
}

function budgeted() {
  const chosen = Number(at("budget").value), row = site.budgets[chosen], quality = percent(row.quality);
  const words = [worded(row.budget), pictures[chosen] ? `about ${milliseconds(pictures[chosen])} ms` : "", quality];
  at("budgetis").value = at("keep").checked ? "as the deadline allows" : words.filter(Boolean).join(", ");
  at("budget").setAttribute("aria-valuetext", at("budgetis").value);
  at("deadline").disabled = !at("keep").checked;
  for (const [i, line] of [...at("table").children].entries())
    if (i === chosen && !at("keep").checked) line.setAttribute("aria-current", "true"); else line.removeAttribute("aria-current");
}

/** Ask for a picture: a promise of {picture, latents, records, seed, seconds, late}. For scripts as `elastic.draw`. */
function draw(request, heard = () => {}) {
  return client.call("draw", {request}, heard);
}

async function show() {
  const request = asked(), what = site.model.num_classes ? `Class ${request.class_labels}` : "A picture";
  const records = [];
  at("progress").value = 0;
  say("Drawing …");
  drawing = draw(request, ({record, preview, share}) => {
    records.push(record);
    at("progress").value = share;
    if (preview) paint(preview, what);
    chart(records);
  });
  busy(true);
  try {
    const done = await drawing;
    if (done.cancelled) { say("Cancelled."); return; }
    opened = done;
    last = done;
    keep(done);
    chart(done.records);
    at("progress").value = 1;
    const used = [...new Set(done.records.map(record => worded(record.budget)))];
    const budgets = used.length > 3 ? `${used.length} budgets` : used.join(", ");
    const late = done.late === null ? "" : done.late > 0 ? `, late by ${milliseconds(done.late)} ms` : ", in time";
    const words = `${what}: ${milliseconds(done.seconds)} ms, seed ${done.seed}, ${budgets}${late}`;
    say(words);
    remember(paint(done.picture, what), what, words);
  } catch (error) { say(error.message, true); } finally {
    drawing = null;
    busy(false);
    await predicted();
  }
}

function paint({rgba, width, height}, what) {
  Object.assign(canvas, {width, height});
  canvas.getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
  const source = canvas.toDataURL();
  Object.assign(at("picture"), {src: source, alt: what});
  at("picture").classList.toggle("small", width < 200);
  return source;
}

function chart(records) {
  at("chosen").hidden = false;
  const places = new Map(site.budgets.map((row, i) => [key(row.budget), (i + 1) / site.budgets.length])), width = 480 / records.length;
  const title = `Budgets by step: ${records.map(record => worded(record.budget)).join("; ")}`;
  at("steps-chart").replaceChildren(drawn("title", {id: "steps-title"}, title), ...records.map((record, i) => {
    const height = 84 * (places.get(key(record.budget)) ?? 1), reason = record.reason && `; ${record.reason}`;
    const bar = drawn("rect", {x: i * width, y: 88 - height, width: Math.max(width - 2, 1), height});
    bar.append(drawn("title", {}, `step ${i + 1}: ${worded(record.budget)}, ${milliseconds(record.seconds)} ms${reason}`));
    return bar;
  }));
}

function remember(source, what, words) {
  at("past").hidden = false;
  const button = named("button", {type: "button", title: words, ariaLabel: words}, named("img", {src: source, alt: ""}));
  button.addEventListener("click", () => { Object.assign(at("picture"), {src: source, alt: what}); say(words); });
  at("history").prepend(named("li", {}, button));
  while (at("history").children.length > SHOWN) at("history").lastChild.remove();
}

function fill() {
  const {name, num_classes: classes} = site.model, usual = site.axes.map(axis => axis.default);
  document.title = at("name").textContent = name;
  at("byclass").hidden = !classes;
  at("guidance").parentElement.hidden = at("weak").parentElement.hidden = !classes;
  at("classes").replaceChildren(...(classes > MOST_RADIOS
    ? [named("input", {type: "number", id: "label", min: 0, max: classes - 1, value: 0, ariaLabel: `Class, 0 to ${classes - 1}`})]
    : Array.from({length: classes}, (_, label) => named("label", {},
        named("input", {type: "radio", name: "class", value: label, checked: label === 0}), named("span", {textContent: label})))));
  at("sampler").replaceChildren(...site.samplers.map(each => named("option", {value: each, textContent: each})));
  at("budget").max = site.budgets.length - 1;
  at("budget").value = Math.max(site.budgets.findIndex(row => Object.values(row.budget).every((value, i) => value === usual[i])), 0);
  at("bybudget").hidden = site.budgets.length < 2;
  at("provider").querySelector("[value=webgpu]").disabled = !navigator.gpu;
  budgeted();
}

at("form").addEventListener("submit", event => { event.preventDefault(); if (opened && !drawing) show(); });
at("cancel").addEventListener("click", () => { if (drawing) client.cancel(drawing.id); });
at("measure").addEventListener("click", () => busily(measure));
at("provider").addEventListener("change", () => busily(open));
at("budget").addEventListener("input", () => { at("keep").checked = false; budgeted(); });
at("keep").addEventListener("input", budgeted);
for (const id of ["steps", "guidance", "sampler", "weak"]) at(id).addEventListener("input", () => { if (opened) predicted(); });
fill();
busily(open);
window.elastic = {site, draw, get last() { return last; }};
