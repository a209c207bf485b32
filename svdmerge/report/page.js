"use strict";
const grid = JSON.parse(document.getElementById("whatif-grid").textContent);
const slider = document.getElementById("k");
const fields = Object.keys(grid[0]).filter((name) => name !== "k" && name !== "kept");
const rows = Array.from(document.querySelectorAll("data.kept"));
function show() {
  const point = grid[Number(slider.value)];
  slider.setAttribute("aria-valuetext", point.k.text);
  document.getElementById("k-now").textContent = point.k.text;
  for (const name of fields) {
    const cell = document.getElementById("whatif-" + name);
    cell.value = point[name].value;
    cell.textContent = point[name].text;
  }
  const most = Math.max(1, ...point.kept);
  rows.forEach((cell, i) => {
    cell.value = cell.textContent = point.kept[i];
    cell.closest("tr").querySelector(".bar div").style.width = (100 * point.kept[i]) / most + "%";
  });
}
slider.addEventListener("input", show);
show();
