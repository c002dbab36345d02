// Costs of a shape, from the formulas in the page: the same sums as slimqwen/shapes/footprint.py and families/count.py.
"use strict";
const model = JSON.parse(document.getElementById("model").textContent);
const start = JSON.parse(document.getElementById("start").textContent);
const inputs = Object.fromEntries([...document.querySelectorAll("input[data-field]")].map((input) => [input.dataset.field, input]));
const asItIs = Object.fromEntries(Object.keys(inputs).map((field) => [field, model.source[field]]));
const context = document.getElementById("context");
const sequences = document.getElementById("sequences");

function value(formula, sizes) {
  return formula.reduce((sum, [axes, coefficient]) => sum + axes.reduce((product, axis) => product * sizes[axis], coefficient), 0);
}

function costs(shape, contextLength, sequenceCount) {
  const sizes = { ...model.sizes };
  for (const field in shape) if (field in model.axis_of) sizes[model.axis_of[field]] = shape[field];
  const topK = shape.num_experts_per_tok;
  const main = [...model.around, ...model.layers.slice(0, shape.num_hidden_layers)];
  const sum = (kinds, quantity) => kinds.reduce((total, kind) => total + value(model.blocks[kind][quantity], sizes), 0);
  const chosen = (kinds, quantity) => (sum(kinds, quantity) / sizes[model.expert]) * topK;
  const dense = sum(main, "dense");
  const lookedUp = model.tied ? 0 : sizes[model.vocab] * sizes[model.hidden];
  const mtp = ["routed", "dense"].reduce((total, quantity) => total + sum(model.mtp, quantity), 0);
  const total = dense + sum(main, "routed") + sum(main, "vision");
  const met = sum(main, "dense_matrices") + chosen(main, "routed_matrices") - lookedUp;
  const bytes = model.bytes_per_element;
  const cache = sum(main, "cached") * contextLength * bytes;
  const state = sum(main, "recurrent") * 4 + sum(main, "state") * bytes;
  const checkpoint = (total + mtp) * bytes;
  return {
    total_parameters: total,
    active_parameters: dense + chosen(main, "routed"),
    mtp_parameters: mtp,
    checkpoint_bytes: checkpoint,
    kv_cache_bytes: cache,
    state_bytes: state,
    forward_flops_per_token: 2 * met + sum(main, "read") * contextLength + 8 * sum(main, "recurrent"),
    serving_bytes: checkpoint + (cache + state) * sequenceCount,
  };
}

function words(number, units) {
  const [unit, size] = units.find(([, size]) => number >= size) || units[units.length - 1];
  const amount = number / size;
  return `${size === 1 ? amount.toLocaleString("en") : amount.toFixed(amount >= 100 ? 0 : 2)} ${unit}`.trim();
}
const PARAMETERS = [["B", 1e9], ["M", 1e6], ["K", 1e3], ["", 1]];
const BYTES = [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["B", 1]];
const FLOPS = [["TFLOP", 1e12], ["GFLOP", 1e9], ["MFLOP", 1e6], ["kFLOP", 1e3], ["FLOP", 1]];
const UNITS = { total_parameters: PARAMETERS, active_parameters: PARAMETERS, mtp_parameters: PARAMETERS, forward_flops_per_token: FLOPS };

function shown() {
  return Object.fromEntries(Object.entries(inputs).map(([field, input]) => [field, Number(input.value)]));
}

function yaml(shape) {
  const changed = Object.entries(shape).filter(([field, size]) => size !== model.source[field]);
  return changed.length ? changed.map(([field, size]) => `${field}: ${size}\n`).join("") : "{} # the model as it is\n";
}

function gpusFor(bytes, memory) {
  return Math.ceil(bytes / (0.9 * memory * 1e9));
}

function update() {
  const shape = shown();
  const experts = inputs.num_experts, topK = inputs.num_experts_per_tok;
  if (Number(topK.value) > Number(experts.value)) {
    topK.value = experts.value;
    shape.num_experts_per_tok = Number(topK.value);
  }
  const contextLength = Math.max(1, Number(context.value) || 1), sequenceCount = Math.max(1, Number(sequences.value) || 1);
  const now = costs(shape, contextLength, sequenceCount);
  const before = costs(asItIs, contextLength, sequenceCount);
  for (const field in shape) document.getElementById(`${field}-value`).textContent = shape[field].toLocaleString("en");
  for (const name in now) {
    const row = document.getElementById(name), units = UNITS[name] || BYTES;
    if (!row) continue; // what this model does not have has no row
    row.dataset.value = now[name];
    row.dataset.before = before[name];
    row.children[1].textContent = words(before[name], units);
    row.children[2].textContent = words(now[name], units);
    row.children[3].textContent = before[name] ? `${((100 * now[name]) / before[name]).toFixed(1)} %` : "";
  }
  for (const [name, memory] of Object.entries(model.gpus)) {
    const row = document.querySelector(`tr[data-gpu="${name}"]`);
    const needed = [before, now].map((cost) => gpusFor(cost.serving_bytes, memory));
    needed.forEach((count, index) => { row.children[2 + index].textContent = count === 1 ? "fits on one" : `${count.toLocaleString("en")} GPUs`; });
    row.children[3].className = needed[1] === 1 ? "fits" : "";
  }
  document.getElementById("yaml").textContent = yaml(shape);
  const hash = new URLSearchParams({ ...shape, context: contextLength, sequences: sequenceCount }).toString();
  history.replaceState(null, "", `#${hash}`);
}

function put(shape) {
  for (const field in inputs) if (field in shape) inputs[field].value = shape[field];
}

async function copy(event) {
  const text = document.getElementById("yaml").textContent, button = event.currentTarget;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Pages opened from a file may not write to the clipboard in some browsers: select it for the reader.
    getSelection().selectAllChildren(document.getElementById("yaml"));
    button.textContent = "Selected: press Ctrl-C";
  }
  setTimeout(() => { button.textContent = "Copy target YAML"; }, 2500);
}

put(start);
const asked = new URLSearchParams(location.hash.slice(1));
put(Object.fromEntries(asked));
if (asked.has("context")) context.value = asked.get("context");
if (asked.has("sequences")) sequences.value = asked.get("sequences");
for (const input of [...Object.values(inputs), context, sequences]) input.addEventListener("input", update);
document.getElementById("copy").addEventListener("click", copy);
document.getElementById("reset").addEventListener("click", () => { put(asItIs); update(); });
update();
