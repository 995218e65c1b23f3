// Reads one expert at a time: the cell under the pointer, or the one the arrow keys are on, in all maps of a checkpoint.
const checkpoints = JSON.parse(document.getElementById("mopeq-data").textContent).checkpoints;
(() => {
  "use strict";
  const maps = [...document.querySelectorAll(".map")];
  const svgOf = (map) => map.querySelector("svg");
  const shape = (map) => Object.fromEntries(["x", "y", "w", "h", "rows", "columns"].map((k) => [k, Number(svgOf(map).dataset[k])]));
  const named = (panel, text) => (panel === "all" ? text : panel + " " + text);
  const shown = (v) => (v === null ? "none" : Number.isInteger(v) ? v.toLocaleString("en") : Number(v.toPrecision(4)).toString());

  function words(c, chosen, row, column) {
    const parts = ["layer " + c.layers[row] + ", expert " + column];
    if (column >= c.experts[row]) return parts[0] + ": this layer has no such expert";
    if (chosen.map) parts.push(Object.entries(chosen.map).map(([p, rows]) => named(p, chosen.formats[parseInt(rows[row][column], 36)])).join(", "));
    if (c.sensitivity) parts.push("sensitivity " + Object.entries(c.sensitivity.values).map(([p, v]) => named(p, shown(v[row][column]))).join(", "));
    for (const [name, v] of Object.entries(c.tokens || {})) parts.push(shown(v[row][column]) + (name === "tokens" ? " tokens" : " " + name + " tokens"));
    return parts.join(" · ");
  }

  function point(map, row, column) {
    for (const other of maps) {
      if (other.dataset.checkpoint !== map.dataset.checkpoint) continue;
      const cursor = svgOf(other).querySelector(".cur"), s = shape(other);
      cursor.setAttribute("visibility", row === null ? "hidden" : "visible");
      if (row === null) continue;
      cursor.setAttribute("transform", `translate(${s.x + column * s.w} ${s.y + row * s.h})`);
    }
    if (row === null) return;
    const c = checkpoints[map.dataset.checkpoint], chosen = map.closest(".explorer") && c.explored ? c.explored : c;
    map.closest("figure").querySelector(".read").textContent = words(c, chosen, row, column);
  }

  for (const map of maps) {
    const svg = svgOf(map), s = shape(map);
    const at = [0, 0];
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const column = Math.floor(((event.clientX - box.left) * scale - s.x) / s.w);
      const row = Math.floor(((event.clientY - box.top) * scale - s.y) / s.h);
      if (column >= 0 && column < s.columns && row >= 0 && row < s.rows) point(map, (at[0] = row), (at[1] = column));
    });
    svg.addEventListener("pointerleave", () => point(map, null));
    map.addEventListener("focus", () => point(map, ...at));
    map.addEventListener("blur", () => point(map, null));
    map.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      at[0] = Math.min(s.rows - 1, Math.max(0, at[0] + step[0]));
      at[1] = Math.min(s.columns - 1, Math.max(0, at[1] + step[1]));
      point(map, ...at);
    });
  }
  for (const read of document.querySelectorAll(".read")) read.textContent = "Point at a cell, or focus a map and use the arrow keys.";
})();
