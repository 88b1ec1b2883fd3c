// A row for each model on the scale from 1 to 5: mean, interval, and the paper's mean where it has one.
const SVG = "http://www.w3.org/2000/svg";
const [LOWEST, HIGHEST, WIDTH, HEIGHT, MIDDLE] = [1, 5, 400, 24, 12];
const across = (mark) => 8 + ((WIDTH - 16) * (mark - LOWEST)) / (HIGHEST - LOWEST);

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function canvas(lines) {
  const drawing = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "forest", "aria-hidden": "true" });
  for (let mark = LOWEST; mark <= HIGHEST; mark++) {
    if (lines) drawing.append(shape("line", { x1: across(mark), x2: across(mark), y1: 0, y2: HEIGHT, class: "grid" }));
    else drawing.append(shape("text", { x: across(mark), y: HEIGHT - 4, "text-anchor": "middle" }));
    if (!lines) drawing.lastChild.textContent = mark;
  }
  return drawing;
}

function line(entry, paper) {
  const [low, high] = entry.interval;
  const drawing = canvas(true);
  if (paper !== undefined)
    drawing.append(shape("rect", { x: across(paper) - 1.5, y: 1, width: 3, height: HEIGHT - 2, class: "paper" }));
  drawing.append(shape("line", { x1: across(low), x2: across(high), y1: MIDDLE, y2: MIDDLE, class: "interval" }));
  drawing.append(shape("circle", { cx: across(entry.mean), cy: MIDDLE, r: 5, class: "mean" }));
  return drawing;
}

function row(model, entry, paper) {
  const made = element("li");
  const [low, high] = entry.interval.map((end) => end.toFixed(2));
  const figure = `${entry.mean.toFixed(2)} [${low}, ${high}]` + (paper === undefined ? "" : `, paper ${paper.toFixed(2)}`);
  made.append(element("strong", model), line(entry, paper), element("span", figure));
  return made;
}

function show() {
  const part = data.parts[Number(by("part").value)];
  const criterion = by("criterion").value;
  // The paper has one figure a model: of the average, over all prompts.
  const papers = new Map(criterion === "average" && part === data.parts[0] ? Object.entries(data.paper) : []);
  const rows = Object.entries(part.means).map(([model, means]) => row(model, means[criterion], papers.get(model)));
  const scale = element("li", undefined, "scale-of-marks");
  scale.append(canvas(false));
  by("forest").replaceChildren(...rows, scale);
  by("legend").textContent = "Dot: mean; line: 95 % interval" + (papers.size ? "; upright bar: the paper's mean." : ".");
}

for (const name of ["part", "criterion"]) by(name).addEventListener("change", show);
show();
