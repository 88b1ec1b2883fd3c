// Answers of evaluate.sh have scores; the few that run.sh writes have none.
const scored = data.answers.length > 0 && "score" in data.answers[0].after[0];
const best = (answers) => answers[0].score;
const FIRST = 10; // prompts that are shown before a reader asks for more
let everything = false;
const gain = (entry) => best(entry.after) - best(entry.before);

function column(title, answers) {
  const box = element("div");
  box.append(element("h4", title));
  const [first, ...others] = answers;
  const add = (parent, answer) => {
    const cut = answer.cut ? ", cut" : "";
    const proxy = "proxy" in answer ? ` (${fixed(answer.proxy, 3)} by the ranking model)` : "";
    if (scored) parent.append(element("p", `reward ${fixed(answer.score, 3)}${proxy}, ${counted(answer.tokens, "token")}${cut}`, "soft"));
    parent.append(element("p", answer.text || "(an empty answer)", "text"));
  };
  add(box, first);
  if (others.length) {
    const more = element("details");
    more.append(element("summary", `${others.length} more`));
    for (const answer of others) add(more, answer);
    box.append(more);
  }
  return box;
}

function card(entry) {
  const box = element("article", undefined, "item");
  box.dataset.id = entry.id;
  for (const message of entry.prompt) {
    box.append(element("h3", message.role), element("p", message.content, "text"));
  }
  if (scored) {
    const change = gain(entry);
    const kind = change > 0 ? "good" : change < 0 ? "bad" : "soft";
    box.append(element("p", `change of the best answer's reward: ${signed(change, 3)}`, kind));
  }
  const pair = element("div", undefined, "pair");
  pair.append(column("before training", entry.before), column("after training", entry.after));
  box.append(pair);
  return box;
}

function show() {
  const words = by("search").value.toLowerCase();
  const texts = (entry) => [...entry.prompt.map((m) => m.content), ...[...entry.before, ...entry.after].map((a) => a.text)];
  const which = scored ? by("filter").value : "all";
  const order = scored ? by("sort").value : "given";
  const found = data.answers
    .filter((entry) => texts(entry).some((text) => text.toLowerCase().includes(words)))
    .filter((entry) => which === "all" || (which === "better" ? gain(entry) > 0 : gain(entry) < 0));
  if (order !== "given") found.sort((a, b) => (order === "up" ? gain(b) - gain(a) : gain(a) - gain(b)));
  by("found").textContent = `${found.length} of ${counted(data.answers.length, "prompt")}`;
  by("list").replaceChildren(...found.slice(0, everything ? found.length : FIRST).map(card));
  by("all").hidden = everything || found.length <= FIRST;
  by("all").textContent = `Show all ${found.length}`;
}

if (data.answers.length) {
  for (const id of scored ? ["search", "filter", "sort"] : ["search"]) by(id).addEventListener("input", show);
  by("all").addEventListener("click", () => {
    everything = true;
    show();
    const next = by("list").children[FIRST]; // the button is gone: the focus goes on where it was asked to
    next.tabIndex = -1;
    next.focus();
  });
  show();
}
