// A row for each model on the scale from 1 to 5: mean, interval, and the paper's mean where it has one.
const SVG = "http://www.w3.org/2000/svg";
const [LOWEST, HIGHEST, WIDTH, HEIGHT, MIDDLE] = [1, 5, 400, 24, 12];
const across = (mark) => 8 + ((WIDTH - 16) * (mark - LOWEST)) / (HIGHEST - LOWEST);

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function line(entry, paper) {
  const [low, high] = entry.interval;
  const drawing = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "forest", "aria-hidden": "true" });
  for (let mark = LOWEST; mark <= HIGHEST; mark++)
    drawing.append(shape("line", { x1: across(mark), x2: across(mark), y1: 0, y2: HEIGHT, class: "grid" }));
  drawing.append(shape("line", { x1: across(low), x2: across(high), y1: MIDDLE, y2: MIDDLE, class: "interval" }));
  drawing.append(shape("circle", { cx: across(entry.mean), cy: MIDDLE, r: 5, class: "mean" }));
  if (paper !== undefined)
    drawing.append(shape("rect", { x: across(paper) - 2, y: 2, width: 4, height: HEIGHT - 4, class: "paper" }));
  return drawing;
}

function show() {
  const part = data.parts[Number(by("part").value)];
  const criterion = by("criterion").value;
  // The paper has one figure a model: of the average, over all prompts.
  const papers = criterion === "average" && part === data.parts[0] ? data.paper : {};
  by("forest").replaceChildren(
    ...Object.entries(part.means).map(([model, means]) => {
      const row = element("tr");
      const name = element("th", model);
      name.scope = "row";
      const picture = element("td");
      picture.append(line(means[criterion], Object.hasOwn(papers, model) ? papers[model] : undefined));
      const [low, high] = means[criterion].interval.map((end) => end.toFixed(2));
      row.append(name, picture, element("td", `${means[criterion].mean.toFixed(2)} [${low}, ${high}]`));
      return row;
    }),
  );
  by("legend").textContent =
    "Scale from 1 to 5. Dot: mean; line: 95 % interval" + (Object.keys(papers).length ? "; bar: the paper's mean." : ".");
}

for (const name of ["part", "criterion"]) by(name).addEventListener("change", show);
show();
