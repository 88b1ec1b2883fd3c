const search = document.getElementById("search");
const rows = [...document.querySelectorAll("tr.row")];

function show() {
  const words = search.value.toLowerCase();
  let count = 0;
  for (const row of rows) {
    row.hidden = !row.querySelector("th").textContent.toLowerCase().includes(words);
    count += !row.hidden;
  }
  document.getElementById("found").textContent = `${count} of ${rows.length} rows`;
}

search.addEventListener("input", show);
show();
