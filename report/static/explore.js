// q of Eq. 9 over the dispreferred rewards; the largest exponent is subtracted, so that none overflows.
function hardnessWeights(rewards, gamma) {
  const exponents = rewards.map((reward) => gamma * reward);
  const largest = Math.max(...exponents);
  const powers = exponents.map((exponent) => Math.exp(exponent - largest));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
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
let drawn = null;

function current() {
  return shown[Number(by("prompt").value)];
}

function weightsOf(record) {
  return hardnessWeights(record.rewards.slice(1), Number(by("gamma").value));
}

function facts(record, index) {
  const cut = record.truncated[index] ? ", cut" : "";
  return `${record.sources[index]}, ${record.token_counts[index]} tokens${cut}, reward ${record.rewards[index].toFixed(3)}`;
}

function show() {
  const item = by("item");
  item.replaceChildren();
  const record = current();
  if (!record) return;
  for (const message of record.prompt) {
    item.append(element("h2", message.role), element("p", message.content, "text"));
  }
  const weights = weightsOf(record);
  record.responses.forEach((text, index) => {
    const box = element("div", undefined, "item");
    box.dataset.index = index;
    const head = element("h3", index === 0 ? "y1, preferred" : `${index}. dispreferred`);
    if (index > 0) {
      const weight = weights[index - 1];
      const track = element("span", undefined, "track");
      const bar = element("span", undefined, "bar");
      bar.style.width = `${100 * weight}%`;
      track.append(bar);
      track.setAttribute("aria-hidden", "true");
      const value = element("span", `q = ${weight.toFixed(4)}`, "weight");
      value.dataset.weight = weight;
      box.append(head, value, " ", track);
      if (drawn === index) {
        box.classList.add("drawn");
        head.append(" (drawn)");
      }
    } else {
      box.append(head);
    }
    box.append(element("p", facts(record, index), "soft"), element("p", text, "text"));
    item.append(box);
  });
  const size = 1 / weights.reduce((sum, weight) => sum + weight * weight, 0);
  by("found").textContent = `${shown.length} prompts; effective sample size of q: ${size.toFixed(2)} of ${weights.length}`;
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
  drawn = null;
  show();
  if (!shown.length) by("found").textContent = "No prompt holds these words.";
}

by("gamma").addEventListener("input", () => {
  by("gamma-value").textContent = Number(by("gamma").value).toFixed(1);
  drawn = null;
  show();
});
by("search").addEventListener("input", fill);
by("prompt").addEventListener("change", () => {
  drawn = null;
  show();
});
by("draw").addEventListener("click", () => {
  const weights = weightsOf(current());
  let rest = random();
  drawn = weights.findIndex((weight) => (rest -= weight) < 0) + 1 || weights.length;
  show();
  by("found").textContent = `Drawn: response ${drawn}, with q = ${weights[drawn - 1].toFixed(4)}`;
});
fill();
