const rows = [...document.querySelectorAll("tr.row")];

function show() {
  const words = by("search").value.toLowerCase();
  let count = 0;
  for (const row of rows) {
    row.hidden = !row.querySelector("th").textContent.toLowerCase().includes(words);
    count += !row.hidden;
  }
  by("found").textContent = `${count} of ${counted(rows.length, "row")} in all tables`;
}

by("search").addEventListener("input", show);
show();
