// The budget explorer: a budget of bytes -> the exact allocation (solve.js) -> the map, the predicted loss, the bytes
// by part and the command, drawn again as the slider moves.
(() => {
  "use strict";
  const LAG = 60; // ms; where solving takes longer, it waits until the slider rests
  const MOST_DIGITS = 2500; // more, written on their cells, would lag
  const PALETTE = "0123456789abcdefghijklmnopqrstuvwxyz";
  const NS = "http://www.w3.org/2000/svg";
  const UNITS = { "": 1, b: 1 };
  ["k", "m", "g", "t"].forEach((p, i) => { UNITS[p + "b"] = 1000 ** (i + 1); UNITS[p + "ib"] = 1024 ** (i + 1); });
  const grouped = (n) => n.toLocaleString("en");
  const size = (n) => (n >= 0.1 * 2 ** 30 ? (n / 2 ** 30).toFixed(2) + " GiB" : (n / 2 ** 20).toFixed(2) + " MiB");
  const short = (x, digits = 4) => (x !== 0 && (Math.abs(x) < 1e-4 || Math.abs(x) >= 1e6) ? x.toExponential(digits - 1) : String(Number(x.toPrecision(digits))));

  /** "12GiB" -> bytes, as mopeq reads sizes; null if it is none. */
  function parseSize(text) {
    const found = /^\s*(\d{1,30})(?:\.(\d{1,30}))?\s*([a-z]*)\s*$/i.exec(text.replace(/,/g, "")), unit = found && UNITS[found[3].toLowerCase()];
    if (!unit) return null;
    const part = found[2] || "";
    return Number((BigInt(found[1] + part) * BigInt(unit)) / 10n ** BigInt(part.length));
  }

  function costsOf({ type, data }, columns) {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), view = new DataView(bytes.buffer);
    const width = type === "float32" ? 4 : 8, read = width === 4 ? "getFloat32" : "getFloat64";
    return Array.from({ length: bytes.length / width / columns }, (_, i) =>
      Array.from({ length: columns }, (_, f) => view[read](width * (columns * i + f), true)));
  }

  /** Codes, scales and zero points of one matrix [out, in] in a format, in bytes. */
  function bytesOf([out, n], { bits, group, scheme }) {
    const groups = Math.ceil(n / group);
    return [out * Math.ceil((n * bits) / 8), 2 * out * groups, scheme === "a" ? groups * Math.ceil((out * bits) / 8) : 0];
  }

  /** Every matrix with its item: those that `per` ties share one, numbered as they come. */
  function matricesOf({ per, layers, formats }) {
    const items = new Map(), found = [], known = new Map();
    const tie = { projection: (n, e, p) => n + "," + e + p, "gate-up": (n, e, p) => n + "," + e + (p === "down"), expert: (n, e) => n + "," + e, "layer-projection": (n, e, p) => n + p, layer: (n) => String(n) }[per];
    layers.forEach(([layer, experts, shapes], row) => {
      for (let expert = 0; expert < experts; expert++)
        for (const [projection, shape] of Object.entries(shapes)) {
          const key = tie(layer, expert, projection), where = String(shape);
          if (!items.has(key)) items.set(key, items.size);
          if (!known.has(where)) known.set(where, formats.map((f) => bytesOf(shape, f)));
          found.push({ row, expert, projection, shape, item: items.get(key), parts: known.get(where) });
        }
    });
    return found;
  }

  function make(name, attributes, text) {
    const e = document.createElementNS(NS, name);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (text) e.textContent = text;
    return e;
  }

  const total = (numbers) => numbers.reduce((a, b) => a + b, 0);

  class Explorer {
    constructor(section) {
      this.section = section;
      this.checkpoint = checkpoints[section.dataset.checkpoint];
      this.data = this.checkpoint.explorer;
      this.fixed = total(this.data.other.map(([, n]) => n));
      this.matrices = matricesOf(this.data);
      const weights = [];
      for (const m of this.matrices)
        weights[m.item] = m.parts.map((parts, f) => total(parts) + (weights[m.item] ? weights[m.item][f] : 0));
      this.costs = costsOf(this.data.costs, this.data.formats.length);
      this.solver = MopeqSolver(this.costs, weights);
      this.weights = weights;
      this.least = this.fixed + this.solver.least;
      this.most = this.fixed + this.solver.most;
      this.slider = section.querySelector("input[type=range]");
      this.field = section.querySelector("input[type=text]");
      this.took = 0;
      this.slider.addEventListener("input", () => this.ask(Math.floor(this.least + ((this.most - this.least) * this.slider.value) / this.slider.max)));
      this.field.addEventListener("change", () => this.typed());
      for (const input of [this.slider, this.field]) input.addEventListener("change", () => { this.speak = true; });
      section.querySelector("button").addEventListener("click", () => this.save());
      this.maps = [...section.querySelectorAll(".map svg")].map((svg) => this.prepareMap(svg));
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.repaint(false));
      addEventListener("beforeprint", () => this.repaint(true));
      addEventListener("afterprint", () => this.repaint(false));
      this.drawTrade();
      this.solve(this.data.start);
      section.classList.add("ready");
    }

    repaint(onPaper) {
      this.onPaper = onPaper;
      if (this.found) this.showMap(this.found.choice);
    }

    typed() {
      const bytes = parseSize(this.field.value);
      const problem = bytes === null ? "write it like 12GiB, 500MB or 1073741824" : bytes < this.least ? "the smallest map takes " + grouped(this.least) + " bytes" : "";
      this.say(problem);
      this.field.setAttribute("aria-invalid", String(problem !== ""));
      if (!problem) this.ask(bytes);
    }

    /** Words for the eyes too, or `unseen`: for a screen reader alone. */
    say(text, unseen = false) {
      const said = this.section.querySelector(".said");
      said.classList.toggle("unseen", unseen);
      said.textContent = text;
    }

    /** Solve for this budget: at the next frame, or where that lags when no other follows. */
    ask(bytes) {
      const asked = (this.asked = {});
      this.section.setAttribute("aria-busy", "true");
      const solve = () => { if (this.asked === asked) this.solve(bytes); };
      if (this.took < LAG) requestAnimationFrame(solve);
      else setTimeout(solve, 250);
    }

    solve(budget) {
      const started = performance.now();
      try {
        this.found = this.solver.solve(budget - this.fixed);
        this.took = performance.now() - started;
        this.show(budget);
        this.field.removeAttribute("aria-invalid");
      } catch (problem) {
        this.say(problem.message);
      }
      this.section.setAttribute("aria-busy", "false");
    }

    /** Everything that follows from the choice found. */
    show(budget) {
      const { choice, cost } = this.found, bytes = this.fixed + this.found.total;
      const parts = [0, 0, 0], counts = this.data.formats.map(() => 0);
      let code = 0, all = 0;
      for (const m of this.matrices) {
        const f = choice[m.item], of = m.parts[f], size = m.shape[0] * m.shape[1];
        for (let k = 0; k < 3; k++) parts[k] += of[k];
        counts[f]++;
        code += size * this.data.formats[f].bits;
        all += size;
      }
      const padding = this.found.total - this.found.bytes;
      this.map = { bytes_weights: bytes, padding, avg_expert_bits: code / all, cost };
      this.budget = budget;
      this.first = this.first || { bytes, cost, choice };
      if (document.activeElement !== this.slider) // under a hand it stays where it is put
        this.slider.value = Math.round((this.slider.max * (bytes - this.least)) / (this.most - this.least || 1));
      this.slider.setAttribute("aria-valuetext", `${size(bytes)}, ${(code / all).toFixed(2)} bits a weight, predicted loss ${short(cost, 3)}`);
      this.field.value = bytes;
      this.showNumbers(bytes, code / all, (8 * this.found.total) / all);
      this.showParts(parts, padding, bytes);
      this.showMap(choice);
      this.section.querySelectorAll(".legend .count").forEach((e, f) => { e.textContent = grouped(counts[f]); });
      this.section.querySelector(".command").textContent = this.data.command.join(String(bytes));
      this.markTrade(bytes, cost);
      this.say(this.speak ? this.slider.getAttribute("aria-valuetext") : "", true);
      this.speak = false;
    }

    showNumbers(bytes, code, effective) {
      const { cost, choice } = this.found, put = (name, text) => { this.section.querySelector(`[data-put=${name}]`).textContent = text; };
      const change = this.first.cost ? (100 * (cost / this.first.cost - 1)).toFixed(1) : "0.0";
      const moved = this.matrices.reduce((n, m) => n + (choice[m.item] !== this.first.choice[m.item]), 0);
      put("bytes", size(bytes));
      put("bytes-sub", grouped(bytes) + " bytes");
      put("bits", code.toFixed(3));
      put("bits-sub", effective.toFixed(3) + " with scales and zero points");
      put("cost", short(cost));
      put("cost-sub", this.data.unit + (bytes === this.first.bytes ? "" : `, ${change > 0 ? "+" : ""}${change.replace("-", "−")} % against this checkpoint`));
      put("moved", grouped(moved));
      put("moved-sub", `of ${grouped(this.matrices.length)} matrices change their width`);
    }

    showParts(parts, padding, bytes) {
      const rows = [...["codes", "scales", "zero points"].map((words, k) => [words, parts[k]]), ["padding", padding], ...this.data.other, ["all", bytes]];
      const body = this.section.querySelector(".parts tbody");
      body.replaceChildren(...rows.filter(([words, n], i) => n || i < 2).map(([words, n]) => {
        const row = document.createElement("tr"), head = document.createElement("th"), cell = document.createElement("td"), share = document.createElement("td");
        head.scope = "row";
        [head.textContent, cell.textContent, share.textContent] = [words, size(n), ((100 * n) / bytes).toFixed(1) + " %"];
        cell.title = n + " bytes";
        if (words === "all") row.className = "sum";
        row.append(head, cell, share);
        return row;
      }));
    }

    // --------------------------------------------------------------------------------------------- the map

    showMap(choice) {
      const names = [...new Set(this.matrices.map((m) => m.projection))], rows = {};
      for (const p of names) rows[p] = this.data.layers.map(([, experts]) => new Array(experts));
      for (const m of this.matrices) rows[m.projection][m.row][m.expert] = choice[m.item];
      this.rows = rows;
      const panels = this.maps.length === 1 ? ["all"] : names;
      this.checkpoint.explored = { formats: this.data.formats.map((f) => f.name), map: {} };
      panels.forEach((panel, i) => {
        const grid = rows[panel === "all" ? names[0] : panel];
        this.checkpoint.explored.map[panel] = grid.map((row) => row.map((f) => PALETTE[f]).join(""));
        this.drawMap(this.maps[i], grid);
      });
    }

    /** A heat map of heat.py with its cells made a canvas of one pixel a cell, which follows a slider; the rest stays. */
    prepareMap(svg) {
      const at = Object.fromEntries(["x", "y", "w", "h", "rows", "columns"].map((k) => [k, Number(svg.dataset[k])]));
      const { width, height } = svg.viewBox.baseVal, box = document.createElement("div"), canvas = document.createElement("canvas");
      box.className = "box";
      box.style.cssText = svg.style.cssText;
      svg.style.cssText = "";
      svg.replaceWith(box);
      box.append(canvas, svg);
      [canvas.width, canvas.height] = [at.columns, at.rows];
      const share = { left: at.x / width, top: at.y / height, width: (at.columns * at.w) / width, height: (at.rows * at.h) / height };
      for (const [side, of] of Object.entries(share)) canvas.style[side] = 100 * of + "%";
      const across = `h${at.columns * at.w}`, down = `v${at.rows * at.h}`, lines = [];
      for (let row = 1; row <= at.rows; row++) lines.push(`M${at.x} ${at.y + row * at.h - 0.5}${across}`);
      for (let e = 1; e <= at.columns; e++) lines.push(`M${at.x + e * at.w - 0.5} ${at.y}${down}`);
      svg.querySelector(".cells").replaceChildren(at.w > 4 ? make("path", { class: "lines", d: lines.join("") }) : "");
      const digits = svg.querySelector(".dg");
      if (digits && this.matrices.length > MOST_DIGITS) digits.remove();
      return { svg, canvas, at };
    }

    drawMap({ svg, canvas, at }, grid) {
      const { formats } = this.data, image = new ImageData(at.columns, at.rows), pixels = new Uint32Array(image.data.buffer);
      const dark = !this.onPaper && matchMedia("(prefers-color-scheme: dark)").matches;
      const colours = formats.map((f) => 0xff000000 + parseInt(f.colours[Number(dark)].slice(1).match(/../g).reverse().join(""), 16));
      grid.forEach((row, i) => row.forEach((f, e) => { pixels[i * at.columns + e] = colours[f]; }));
      canvas.getContext("2d").putImageData(image, 0, 0);
      svg.querySelectorAll(".mean").forEach((e) => {
        const row = grid[e.dataset.row];
        e.textContent = (total(row.map((f) => formats[f].bits)) / row.length).toFixed(2);
      });
      const digits = svg.querySelector(".dg");
      if (!digits) return;
      digits.replaceChildren(...grid.flatMap((row, i) => formats.map((format, f) => {
        const xs = row.flatMap((g, e) => (g === f ? [at.x + e * at.w + (at.w - 1) / 2] : []));
        const text = PALETTE[format.bits].repeat(xs.length);
        return make("text", { class: `w${format.shade}i`, y: at.y + (i + 0.5) * at.h, x: xs.join(" ") }, text);
      })));
    }

    // ------------------------------------------------------------------------------------------- the trade

    /** Predicted loss against bytes: the hull, below which no map lies, and the maps of one format. */
    drawTrade() {
      const { formats } = this.data, curve = this.solver.curve(), marks = formats.map((f, at) => ({
        words: formats.some((g) => g !== f && g.bits === f.bits) ? f.name : f.bits + " bits",
        bytes: this.fixed + total(this.weights.map((row) => row[at])),
        cost: total(this.costs.map((row) => row[at])),
      }));
      const ys = [...curve.map(([, cost]) => cost), ...marks.map((m) => m.cost)].filter(Number.isFinite);
      const top = Math.max(...ys.slice(0, 1), ...marks.map((m) => m.cost).filter(Number.isFinite)), low = ys.reduce((a, b) => Math.min(a, b));
      const log = low > 0 && top > 8 * low, scale = (v) => (log ? Math.log(Math.max(v, low)) : v);
      const svg = this.section.querySelector(".trade"), width = Math.max(320, Math.min(1000, svg.clientWidth || 1000));
      const box = { left: 66, right: width - 20, top: 18, bottom: 214 };
      svg.setAttribute("viewBox", `0 0 ${width} 252`);
      this.slider.style.marginLeft = `calc(${(100 * box.left) / width}% - 8px)`; // its thumb below the point
      this.slider.style.marginRight = `calc(${(100 * (width - box.right)) / width}% - 8px)`;
      this.at = (bytes, cost) => [
        box.left + ((box.right - box.left) * (bytes - this.least)) / (this.most - this.least || 1),
        box.bottom - ((box.bottom - box.top) * (scale(cost) - scale(low))) / (scale(top) - scale(low) || 1),
      ].map((v) => v.toFixed(1));
      const body = [], unit = this.most >= 0.1 * 2 ** 30 ? 2 ** 30 : 2 ** 20, words = unit === 2 ** 30 ? "GiB" : "MiB";
      for (const v of ticks(this.least / unit, this.most / unit, width / 140)) {
        const [x] = this.at(v * unit, low);
        body.push(`<path class="grid" d="M${x} ${box.top}V${box.bottom}"/><text class="ax c" x="${x}" y="${box.bottom + 17}">${short(v)}</text>`);
      }
      for (const v of log ? decades(low, top) : ticks(low, top, 4)) {
        const [, y] = this.at(this.least, v);
        body.push(`<path class="grid" d="M${box.left} ${y}H${box.right}"/><text class="ax e" x="${box.left - 8}" y="${Number(y) + 4}">${short(v, 2)}</text>`);
      }
      const points = [];
      for (const [bytes, cost] of curve) {
        const [x, y] = this.at(bytes + this.fixed, cost);
        if (!points.length || x - points[points.length - 1][0] >= 2 || bytes + this.fixed === this.most) points.push([x, y]);
      }
      body.push(`<path class="ci" d="M${points.map((p) => p.join(" ")).join("L")}"/>`);
      for (const m of marks.filter((m) => Number.isFinite(m.cost))) {
        const [x, y] = this.at(m.bytes, m.cost), end = Number(x) > box.right - 60;
        body.push(`<circle class="dot o" cx="${x}" cy="${y}" r="4.5"/><text class="nm ${end ? "e" : "s"}" x="${Number(x) + (end ? -9 : 9)}" y="${Number(y) - (end ? 14 : 6)}">all ${m.words}</text>`);
      }
      body.push(`<text class="ax c" x="${(box.left + box.right) / 2}" y="${box.bottom + 34}">weights, ${words}</text>`);
      body.push(`<text class="ax c" transform="translate(14 ${(box.top + box.bottom) / 2}) rotate(-90)">predicted loss</text>`);
      body.push(`<g class="here"><path class="grid" d=""/><circle class="dot" r="6"/></g>`);
      svg.innerHTML = body.join("");
      this.bottom = box.bottom;
    }

    markTrade(bytes, cost) {
      const [x, y] = this.at(bytes, cost), dot = this.section.querySelector(".here circle");
      dot.setAttribute("cx", x);
      dot.setAttribute("cy", y);
      this.section.querySelector(".here path").setAttribute("d", `M${x} ${y}V${this.bottom}`);
    }

    // ---------------------------------------------------------------------------------------- the map, kept

    /** What `mopeq quantize --map` takes. */
    json() {
      const used = [...new Set(Object.values(this.rows).flat(2))].sort((a, b) => a - b);
      const digit = new Map(used.map((f, i) => [f, PALETTE[i]])), experts = {}, layers = {};
      this.data.layers.forEach(([layer, , shapes], row) => {
        const prefix = (layers[layer] = this.data.prefixes[row]);
        experts[prefix] = Object.fromEntries(Object.keys(shapes).map((p) => [p, this.rows[p][row].map((f) => digit.get(f)).join("")]));
      });
      const body = { format_version: 1, formats: used.map((f) => this.data.formats[f].name), layers, experts };
      return this.map.padding ? { ...body, padding: this.map.padding } : body;
    }

    save() {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([JSON.stringify(this.json(), null, 1)], { type: "application/json" }));
      link.download = `map-${this.map.bytes_weights}.json`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
  }

  function ticks(low, high, wanted) {
    const raw = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999), found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9); i++) found.push(i * step);
    return found;
  }

  function decades(low, high) {
    const found = [], steps = high / low < 300 ? [1, 2, 5] : [1];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      for (const m of steps) if (m * 10 ** p >= low && m * 10 ** p <= high) found.push(m * 10 ** p);
    return found;
  }

  // once the page stands: a large model takes a moment
  for (const section of document.querySelectorAll(".explorer"))
    setTimeout(() => {
      try {
        section.explorer = new Explorer(section);
      } catch (problem) {
        section.querySelector(".said").textContent = "This browser cannot solve it: " + problem.message;
      }
    }, 0);
})();
