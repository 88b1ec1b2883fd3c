const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const [LOWEST, HIGHEST, START] = [1, 5, 3];
const KEPT = `hps-study/${data.study}/${data.rater}/`;
const KEEPS_NOTHING = "This browser keeps nothing: export before you close the page.";

// What was typed, by mark, as it was typed: a text that is not a mark stays until it is corrected.
const typed = new Map();
const marks = data.items.flatMap((item, place) =>
  item.answers.flatMap((_, answer) =>
    data.criteria.map((criterion) => ({ name: `${item.id}/${answer}/${criterion}`, place, item, answer, criterion })),
  ),
);
const names = new Set(marks.map((mark) => mark.name));
const shown = new Map(); // of each mark on the page its field and the message below it
let place = 0;
let keeps = true;
let unsaved = false; // something was typed that no file has

// 3, 3.5, 3,50: one digit, and up to two behind a point or a comma. Null is not a mark.
function parse(text) {
  const value = /^[1-5]([.,]\d{0,2})?$/.test(text.trim()) ? Number(text.trim().replace(",", ".")) : null;
  return value !== null && value <= HIGHEST ? value : null;
}

const text = (mark) => typed.get(mark.name) ?? "";
const missing = (mark) => parse(text(mark)) === null;
const wrong = (mark) => text(mark).trim() !== "" && missing(mark);

// An entry for each mark, not one for all: two tabs of this page never write over each other's marks. An emptied field
// is kept as an empty text, so that the other tab hears of it.
function keep(mark, value) {
  typed.set(mark.name, value);
  unsaved = true;
  try {
    localStorage.setItem(KEPT + mark.name, value);
  } catch {
    losing();
  }
}

function losing() {
  keeps = false;
  by("storage").textContent = KEEPS_NOTHING;
}

// The texts that are kept, another tab's among them. Where keeping has failed, what was typed here is newer.
function recall() {
  if (!keeps) return;
  try {
    for (const name of names) {
      const kept = localStorage.getItem(KEPT + name);
      if (kept !== null) typed.set(name, kept);
    }
  } catch {
    losing();
  }
}

function progress() {
  const left = marks.filter(missing).length;
  const bad = marks.filter(wrong).length;
  by("done").value = 1 - left / marks.length;
  by("progress-text").textContent =
    `prompt ${place + 1} of ${data.items.length}; ${marks.length - left} of ${marks.length} marks` +
    (bad ? `, ${bad} to correct` : "");
  by("previous").disabled = place === 0;
  by("next").disabled = place === data.items.length - 1;
}

function judge(mark, input, problem) {
  const bad = wrong(mark);
  input.setAttribute("aria-invalid", String(bad));
  problem.textContent = bad ? "Give a number from 1.00 to 5.00." : "";
}

// Up and down by 0.1, with Shift by 1; an empty field, or one with something else in it, starts in the middle.
function stepped(value, event) {
  const step = (event.shiftKey ? 1 : 0.1) * (event.key === "ArrowUp" ? 1 : -1);
  const moved = value === null ? START : Math.min(HIGHEST, Math.max(LOWEST, value + step));
  return moved.toFixed(2);
}

// A text field: a number field changes under the mouse wheel, and has no text while its content is not a number.
function field(mark) {
  const id = `mark-${mark.answer}-${mark.criterion}`;
  const input = element("input");
  const problem = element("span", "", "problem");
  problem.id = `problem-${mark.answer}-${mark.criterion}`;
  problem.setAttribute("aria-live", "polite");
  Object.assign(input, { type: "text", inputMode: "decimal", autocomplete: "off", id, value: text(mark) });
  input.setAttribute("aria-describedby", problem.id);
  const changed = () => {
    keep(mark, input.value);
    judge(mark, input, problem);
    progress();
  };
  input.addEventListener("input", changed);
  input.addEventListener("keydown", (event) => {
    if (!["ArrowUp", "ArrowDown"].includes(event.key) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    input.value = stepped(parse(input.value), event);
    changed();
  });
  const label = element("label", mark.criterion);
  label.htmlFor = id;
  const both = element("div");
  both.append(label, input, problem);
  judge(mark, input, problem);
  shown.set(mark, [input, problem]);
  return both;
}

function show() {
  const item = data.items[place];
  const section = by("item");
  section.replaceChildren();
  shown.clear();
  const earlier = item.prompt.slice(0, -1);
  if (earlier.length) section.append(element("h2", "Conversation so far"));
  for (const message of earlier) {
    const role = message.role[0].toUpperCase() + message.role.slice(1);
    section.append(element("h3", role), element("p", message.content, "text"));
  }
  section.append(element("h2", "Prompt"), element("p", item.prompt.at(-1).content, "text"));
  const list = element("ol", undefined, "answers");
  item.answers.forEach((answer, number) => {
    const box = element("li", undefined, "item");
    const fields = element("fieldset", undefined, "marks");
    fields.append(element("legend", `Marks for answer ${LETTERS[number]}`));
    fields.append(...marks.filter((mark) => mark.item === item && mark.answer === number).map(field));
    box.append(element("h3", `Answer ${LETTERS[number]}`), element("p", answer || "(an empty answer)", "text"), fields);
    list.append(box);
  });
  section.append(list);
  progress();
}

// Marks may have come from another tab or a file; a field that holds its text already keeps its cursor.
function refresh() {
  for (const [mark, [input, problem]] of shown) {
    if (input.value !== text(mark)) input.value = text(mark);
    judge(mark, input, problem);
  }
  progress();
}

// The cursor goes to the first mark, but the prompt is what one sees: it is read first. On a touch screen a field would
// raise the keyboard over it, so the prompt itself takes the focus.
function go(to) {
  if (to < 0 || to >= data.items.length) return;
  place = to;
  show();
  const touch = matchMedia("(pointer: coarse)").matches;
  (touch ? by("item") : by(`mark-0-${data.criteria[0]}`)).focus({ preventScroll: true });
  by("item").scrollIntoView();
}

// The controls are the end of a long page: what a button answers must be in the window.
function say(message) {
  by("said").textContent = message;
  by("said").scrollIntoView({ block: "nearest" });
}

function goMissing() {
  const mark = marks.find(missing);
  if (!mark) {
    say("No mark is missing.");
    return;
  }
  place = mark.place;
  show();
  by(`mark-${mark.answer}-${mark.criterion}`).focus();
}

function save() {
  recall(); // another tab's marks are in the file too
  const lines = marks
    .filter((mark) => !missing(mark))
    .map((mark) => ({ prompt_id: mark.item.id, answer: mark.answer, criterion: mark.criterion, value: parse(text(mark)) }));
  const file = JSON.stringify({ study: data.study, rater: data.rater, ratings: lines }, null, 1);
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([file], { type: "application/json" }));
  link.download = `ratings-${data.rater}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // some browsers read it only after the click
  unsaved = false;
  refresh();
  const left = marks.length - lines.length;
  say(
    left
      ? `Exported to ${link.download}; marks still missing: ${left}. The file can be loaded again.`
      : `Exported to ${link.download}: all marks are there. Thank you.`,
  );
}

// What an exported file says about each mark, or the reason why it is none of this page.
function readFile(content) {
  let given;
  try {
    given = JSON.parse(content);
  } catch {
    throw new Error("it is not JSON");
  }
  if (given?.study !== data.study) throw new Error("it belongs to another study");
  if (given.rater !== data.rater) throw new Error(`it belongs to another rater, this page to rater ${data.rater}`);
  if (!Array.isArray(given.ratings)) throw new Error("it has no ratings");
  const known = new Map(marks.map((mark) => [mark.name, mark]));
  return given.ratings.map((line, number) => {
    const mark = known.get(`${line?.prompt_id}/${line?.answer}/${line?.criterion}`);
    const good = mark && typeof line.value === "number" && parse(String(line.value)) !== null;
    if (!good) throw new Error(`its rating ${number + 1} is none of this page`);
    return [mark, line.value.toFixed(2)];
  });
}

async function load(file) {
  let found;
  try {
    found = readFile(await file.text());
  } catch (error) {
    say(`${file.name} was not loaded: ${error.message}.`);
    return;
  }
  const replaced = found.filter(([mark, value]) => !missing(mark) && parse(text(mark)) !== parse(value)).length;
  const before = unsaved;
  for (const [mark, value] of found) keep(mark, value);
  unsaved = before; // these are in a file
  refresh();
  const other = replaced ? `; ${counted(replaced, "field")} had another mark.` : ".";
  say(`Loaded ${counted(found.length, "mark")} from ${file.name}${other}`);
}

// On a Mac, Alt with a letter types another one: there the key on the keyboard counts.
function letter(event) {
  return /^[a-z]$/i.test(event.key) ? event.key.toLowerCase() : event.code.replace("Key", "").toLowerCase();
}

by("previous").addEventListener("click", () => go(place - 1));
by("next").addEventListener("click", () => go(place + 1));
by("missing").addEventListener("click", goMissing);
by("export").addEventListener("click", save);
by("load").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (file) await load(file);
  event.target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("keydown", (event) => {
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  const step = { n: 1, p: -1 }[letter(event)];
  if (step === undefined) return;
  event.preventDefault();
  go(place + step);
});
window.addEventListener("storage", (event) => {
  const name = event.key?.startsWith(KEPT) ? event.key.slice(KEPT.length) : null;
  if (event.newValue === null || !names.has(name)) return;
  typed.set(name, event.newValue);
  refresh();
});
window.addEventListener("beforeunload", (event) => {
  if (!keeps && unsaved) event.preventDefault();
});

try {
  localStorage.setItem(KEPT, ""); // a browser that keeps nothing may still let one read
} catch {
  losing();
}
recall();
by("instructions").open = typed.size === 0;
place = marks.find(missing)?.place ?? 0;
show();
