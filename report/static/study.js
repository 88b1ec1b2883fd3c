const KEPT = `hps-study-${data.study}-${data.rater}`;
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

// "item/answer/criterion" to a number. A page that is opened again goes on with what was kept.
let ratings = {};
try {
  ratings = JSON.parse(localStorage.getItem(KEPT)) || {};
} catch {
  by("said").textContent = "This browser keeps nothing: export before you close the page.";
}
let place = 0;
const total = data.items.reduce((sum, item) => sum + item.answers.length, 0) * data.criteria.length;
const key = (item, answer, criterion) => `${data.items[item].id}/${answer}/${criterion}`;

function keep() {
  try {
    localStorage.setItem(KEPT, JSON.stringify(ratings));
  } catch {
    by("said").textContent = "This browser keeps nothing: export before you close the page.";
  }
}

function progress() {
  const done = Object.keys(ratings).length;
  by("done").value = done / total;
  by("progress-text").textContent = `prompt ${place + 1} of ${data.items.length}; ${done} of ${total} marks`;
  by("previous").disabled = place === 0;
  by("next").disabled = place === data.items.length - 1;
}

function mark(answer, criterion) {
  const name = key(place, answer, criterion);
  const input = element("input");
  input.type = "number";
  Object.assign(input, { min: "1", max: "5", step: "0.01", inputMode: "decimal", id: `mark-${answer}-${criterion}` });
  if (name in ratings) input.value = ratings[name].toFixed(2);
  input.addEventListener("input", () => {
    const value = Math.round(100 * Number(input.value)) / 100;
    const good = input.value !== "" && value >= 1 && value <= 5;
    if (good) ratings[name] = value;
    else delete ratings[name];
    input.setAttribute("aria-invalid", String(!good && input.value !== ""));
    by("said").textContent = good || input.value === "" ? "" : "A mark is a number from 1.00 to 5.00.";
    keep();
    progress();
  });
  const label = element("label", `${criterion} `);
  label.htmlFor = input.id;
  const both = element("span");
  both.append(label, input);
  return both;
}

function show() {
  const item = data.items[place];
  const section = by("item");
  section.replaceChildren();
  for (const message of item.prompt) {
    section.append(element("h2", message.role === "user" ? "Prompt" : message.role), element("p", message.content, "text"));
  }
  const list = element("ol", undefined, "answers");
  item.answers.forEach((text, answer) => {
    const box = element("li", undefined, "item");
    const marks = element("fieldset", undefined, "scale");
    marks.append(element("legend", `Marks for answer ${LETTERS[answer]}`));
    for (const criterion of data.criteria) marks.append(mark(answer, criterion));
    box.append(element("h3", `Answer ${LETTERS[answer]}`), element("p", text || "(an empty answer)", "text"), marks);
    list.append(box);
  });
  section.append(list);
  progress();
}

function go(to) {
  place = Math.min(Math.max(to, 0), data.items.length - 1);
  show();
  by("item").scrollIntoView();
}

function firstMissing() {
  for (let item = 0; item < data.items.length; item++)
    for (let answer = 0; answer < data.items[item].answers.length; answer++)
      for (const criterion of data.criteria) if (!(key(item, answer, criterion) in ratings)) return [item, answer, criterion];
  return null;
}

by("previous").addEventListener("click", () => go(place - 1));
by("next").addEventListener("click", () => go(place + 1));
by("missing").addEventListener("click", () => {
  const found = firstMissing();
  if (!found) {
    by("said").textContent = "No mark is missing.";
    return;
  }
  go(found[0]);
  by(`mark-${found[1]}-${found[2]}`).focus();
});
by("export").addEventListener("click", () => {
  const lines = [];
  data.items.forEach((item, number) =>
    item.answers.forEach((_, answer) =>
      data.criteria.forEach((criterion) => {
        const name = key(number, answer, criterion);
        if (name in ratings) lines.push({ prompt_id: item.id, answer, criterion, value: ratings[name] });
      }),
    ),
  );
  const text = JSON.stringify({ study: data.study, rater: data.rater, ratings: lines }, null, 1);
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `ratings-${data.rater}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
  const left = total - lines.length;
  by("said").textContent = left ? `Exported; ${left} marks are still missing.` : "Exported: all marks are there. Thank you.";
});
document.addEventListener("keydown", (event) => {
  if (event.altKey && event.key.toLowerCase() === "n") go(place + 1);
  if (event.altKey && event.key.toLowerCase() === "p") go(place - 1);
});
show();
