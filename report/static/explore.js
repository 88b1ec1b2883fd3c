const CLAMP = 320; // characters of a response that show before it is opened

// q of Eq. 9 over the dispreferred rewards; the largest exponent is subtracted, so that none overflows.
function hardnessWeights(rewards, gamma) {
  const exponents = rewards.map((reward) => gamma * reward);
  const largest = exponents.reduce((a, b) => Math.max(a, b));
  const powers = exponents.map((exponent) => Math.exp(exponent - largest));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

// The rank that a uniform number u draws: the first whose cumulated weight is above it.
function rankDrawn(weights, u) {
  let sum = 0;
  const place = weights.findIndex((weight) => (sum += weight) > u);
  return place < 0 ? weights.length : place + 1; // rounding may leave the sum below u
}

// Mulberry32: the same seed gives the same draws.
let state = data.seed >>> 0;
function random() {
  state = (state + 0x6d2b79f5) >>> 0;
  let mixed = Math.imul(state ^ (state >>> 15), state | 1);
  mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
  return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
}

let shown = data.records;
let u = random();

function current() {
  return shown[Number(by("prompt").value)];
}

function facts(record, index) {
  const cut = record.truncated[index] ? ", cut" : "";
  return `${record.sources[index]}, ${counted(record.token_counts[index], "token")}${cut}, reward ${fixed(record.rewards[index], 3)}`;
}

function response(text) {
  if (text.length <= CLAMP) return element("p", text, "text");
  const box = element("details");
  box.append(element("summary", `${text.slice(0, CLAMP)} …`, "text"), element("p", text, "text"));
  return box;
}

function card(record, index) {
  const box = element("div", undefined, "item");
  box.dataset.index = index;
  box.id = `rank-${index}`;
  box.append(element("h3", index === 0 ? "y1, preferred" : `${index}. dispreferred`));
  if (index > 0) {
    const track = element("span", undefined, "track");
    track.setAttribute("aria-hidden", "true");
    track.append(element("span", undefined, "bar"));
    box.append(element("span", "", "weight"), " ", track);
  }
  box.append(element("p", facts(record, index), "soft"), response(record.responses[index]));
  return box;
}

// Another prompt: draw everything again.
function show() {
  const record = current();
  by("question").replaceChildren();
  by("item").replaceChildren();
  by("strip").replaceChildren();
  by("hardness").hidden = !record;
  by("draw").disabled = !record;
  if (!record) return;
  for (const message of record.prompt) {
    by("question").append(element("h2", message.role), element("p", message.content, "text"));
  }
  by("strip").append(...record.responses.slice(1).map(() => element("span")));
  by("item").append(...record.responses.map((_, index) => card(record, index)));
  update();
}

// Another gamma or another draw: weights, strip and the mark; what a reader has opened stays open.
function update() {
  const record = current();
  const weights = hardnessWeights(record.rewards.slice(1), Number(by("gamma").value));
  const drawn = rankDrawn(weights, u);
  const largest = weights.reduce((a, b) => Math.max(a, b));
  const size = 1 / weights.reduce((sum, weight) => sum + weight * weight, 0);
  weights.forEach((weight, place) => {
    const box = by(`rank-${place + 1}`);
    const value = box.querySelector(".weight");
    value.textContent = `q = ${weight.toFixed(4)}`;
    value.dataset.weight = weight;
    box.querySelector(".bar").style.width = `${100 * weight}%`;
    box.classList.toggle("drawn", place + 1 === drawn);
    box.querySelector("h3").textContent = `${place + 1}. dispreferred${place + 1 === drawn ? " (drawn)" : ""}`;
    const bar = by("strip").children[place];
    bar.style.height = `${(100 * weight) / largest}%`;
    bar.classList.toggle("mark", place + 1 === drawn);
  });
  const line = by("drawn");
  const link = element("a", `rank ${drawn} of ${weights.length}`);
  link.href = `#rank-${drawn}`;
  line.replaceChildren(`u = ${u.toFixed(3)} draws `, link, `, q = ${weights[drawn - 1].toFixed(4)}, reward ${fixed(record.rewards[drawn], 3)}; effective sample size of q: ${size.toFixed(2)}`);
  line.dataset.u = u;
  by("top").textContent = `highest q: ${largest.toFixed(3)}`;
  by("last").textContent = `${weights.length}: easiest`;
  by("strip").setAttribute("aria-label", `Weights q of ranks 1 (hardest) to ${weights.length} (easiest): the highest is ${largest.toFixed(3)} at rank ${weights.indexOf(largest) + 1}; drawn is rank ${drawn}.`);
}

function fill() {
  const words = by("search").value.toLowerCase();
  const texts = (record) => [...record.prompt.map((message) => message.content), ...record.responses];
  shown = data.records.filter((record) => texts(record).some((text) => text.toLowerCase().includes(words)));
  by("prompt").replaceChildren(
    ...shown.map((record, index) => {
      const text = record.prompt[record.prompt.length - 1].content;
      const option = element("option", text.length > 60 ? `${text.slice(0, 59)}…` : text);
      option.value = index;
      return option;
    }),
  );
  by("prompt").disabled = !shown.length;
  by("found").textContent = shown.length ? counted(shown.length, "prompt") : "No prompt contains these words.";
  show();
}

by("gamma").addEventListener("input", () => {
  by("gamma-value").textContent = Number(by("gamma").value).toFixed(1);
  update();
});
by("search").addEventListener("input", fill);
by("prompt").addEventListener("change", show);
by("draw").addEventListener("click", () => {
  u = random();
  update();
});
fill();
