const best = (answers) => answers[0].score;
const gain = (entry) => best(entry.after) - best(entry.before);

function column(title, answers) {
  const box = element("div");
  box.append(element("h3", title));
  const [first, ...others] = answers;
  const add = (parent, answer) => {
    const cut = answer.cut ? ", cut" : "";
    parent.append(
      element("p", `score ${answer.score.toFixed(3)}, ${answer.tokens} tokens${cut}`, "soft"),
      element("p", answer.text, "text"),
    );
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
  for (const message of entry.prompt) {
    box.append(element("h3", message.role), element("p", message.content, "text"));
  }
  const change = gain(entry);
  const sign = change > 0 ? "+" : "";
  box.append(element("p", `best answer: ${sign}${change.toFixed(3)}`, change < 0 ? "bad" : "good"));
  const pair = element("div", undefined, "pair");
  pair.append(column("before training", entry.before), column("after training", entry.after));
  box.append(pair);
  return box;
}

function show() {
  const words = by("search").value.toLowerCase();
  const texts = (entry) => [...entry.prompt.map((m) => m.content), ...[...entry.before, ...entry.after].map((a) => a.text)];
  const which = by("filter").value;
  const order = by("sort").value;
  const found = data.answers
    .filter((entry) => texts(entry).some((text) => text.toLowerCase().includes(words)))
    .filter((entry) => which === "all" || (which === "better" ? gain(entry) > 0 : gain(entry) < 0));
  if (order !== "given") found.sort((a, b) => (order === "up" ? gain(b) - gain(a) : gain(a) - gain(b)));
  by("found").textContent = `${found.length} of ${data.answers.length} prompts`;
  by("list").replaceChildren(...found.map(card));
}

if (data.answers.length) {
  for (const id of ["search", "filter", "sort"]) by(id).addEventListener("input", show);
  show();
}
