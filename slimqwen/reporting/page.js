// Unpack the plotting library, draw every chart, and make tables sortable and axes choosable.

const plots = [...document.querySelectorAll(".plot")];

async function unpackPlotly() {
  const bytes = Uint8Array.from(atob(compressedPlotly), (letter) => letter.charCodeAt(0));
  const text = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(text).text();
  document.head.append(script);
}

async function drawAll() {
  if (!plots.length) return;
  await unpackPlotly();
  for (const plot of plots) {
    const { spec, axes } = JSON.parse(plot.nextElementSibling.textContent);
    await Plotly.newPlot(plot, spec.data, spec.layout, { responsive: true, displayModeBar: false });
    plot.axes = axes;
  }
}

function drawAgainst(axis) {
  for (const plot of plots) {
    const chosen = plot.axes?.[axis];
    if (chosen) Plotly.react(plot, plot.data.map((trace, index) => ({ ...trace, x: chosen.x[index] })), chosen.layout);
  }
}

function sortBy(table, column, header) {
  const direction = header.ariaSort === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.ariaSort = "none";
  header.ariaSort = direction === 1 ? "ascending" : "descending";
  const body = table.tBodies[0];
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const isNumber = [...body.rows].every((row) => row.cells[column].dataset.value !== undefined);
  const rows = [...body.rows].sort((left, right) => {
    const [a, b] = [value(left), value(right)];
    if (!isNumber) return direction * a.localeCompare(b);
    if (a === "" || b === "") return (a === "") - (b === ""); // what was not measured is last either way
    return direction * (Number(a) - Number(b));
  });
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const [column, header] of [...table.tHead.rows[0].cells].entries()) {
    header.querySelector("button").addEventListener("click", () => sortBy(table, column, header));
  }
}

for (const choice of document.querySelectorAll(".axes input")) {
  choice.addEventListener("change", () => drawAgainst(choice.value));
}

// Paper has one column, and neither scrolls nor unfolds.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const plot of plots) if (plot.layout) Plotly.relayout(plot, { autosize: false, width: 640 });
});
addEventListener("afterprint", () => {
  for (const plot of plots) if (plot.layout) Plotly.relayout(plot, { autosize: true, width: null });
});

drawAll().then(
  () => { document.body.dataset.charts = "drawn"; },
  (error) => {
    document.getElementById("no-charts").hidden = false;
    console.error(error);
  },
);
