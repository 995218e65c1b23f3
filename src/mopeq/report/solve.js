// The exact allocation under a budget of bytes, as `mopeq map --fit` solves it: the same steps in the same order as
// mopeq/alloc (choose, reach, knapsack, hull, core, ways, split: the reasons stand there), for one level of cost. Both
// sides compute in float64, so the maps are the same, ties included.
const MopeqSolver = (() => {
  "use strict";
  const DEAR = 0.01, WORK_LIMIT = 10_000_000, FIRST_TRY = 200_000, MOST_PARTS = 8, WIDEST_SHARED = 512;
  const MOST_CELLS = 2_000_000, MOST_PASSES = 100, MOST_SHARINGS = 20_000_000, MOST_STEPS = 50_000_000, MOST_TRIALS = 2_000;
  const MOST_BITS = 2 ** 27; // of the set of reachable sums; the browser's integers end at 2^30
  class TooWide extends Error {}
  const tooOdd = () => new Error("these shapes and widths have too little in common for an exact allocation");

  const gcd = (a, b) => { while (b) [a, b] = [b, a % b]; return a; };
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const range = (n) => Array.from({ length: n }, (_, i) => i);

  /** The exactly rounded sum (Shewchuk 1997), as Python's math.fsum. */
  function fsum(values) {
    const partials = [];
    for (let x of values) {
      let kept = 0;
      for (let y of partials) {
        if (Math.abs(x) < Math.abs(y)) [x, y] = [y, x];
        const high = x + y, low = y - (high - x);
        if (low) partials[kept++] = low;
        x = high;
      }
      partials.length = kept;
      partials.push(x);
    }
    let n = partials.length, high = n ? partials[--n] : 0, low = 0;
    while (n && !low) {
      const x = high, y = partials[--n];
      high = x + y;
      low = y - (high - x);
    }
    if (n && low && Math.sign(low) === Math.sign(partials[n - 1])) {
      const twice = 2 * low, x = high + twice;
      if (twice === x - high) high = x;
    }
    return high;
  }

  /** How many values of an ascending list are <= x. */
  function upTo(list, x) {
    let low = 0, high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] <= x) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // ------------------------------------------------------------------------------------------------- reach.py

  /** The reachable totals: floor + unit * u where text, read from its end, has a "1" at u. */
  function reachable(weights) {
    const lows = weights.map((row) => Math.min(...row)), floor = sum(lows);
    const offsets = weights.map((row, i) => row.map((w) => w - lows[i]));
    const unit = offsets.flat().reduce(gcd, 0) || 1, classes = new Map();
    for (const row of offsets) {
      const key = [...new Set(row)].filter(Boolean).sort((a, b) => a - b).map((w) => w / unit).join();
      if (key) classes.set(key, (classes.get(key) || 0) + 1);
    }
    const most = sum(offsets.map((row) => Math.max(...row))) / unit;
    if (most > MOST_BITS) throw tooOdd();
    let bits = 1n;
    const later = [];
    for (const [key, count] of classes) {
      const units = key.split(",").map(Number), top = units[units.length - 1];
      const few = Math.min(count, top / units.reduce(gcd, 0) - 1);
      for (let i = 0; i < few; i++) bits = units.reduce((all, u) => all | (bits << BigInt(u)), bits);
      later.push([top, count - few]);
    }
    for (const [step, times] of later)
      for (let have = 0, more; have < times; have += more) {
        more = Math.min(have + 1, times - have);
        bits |= bits << BigInt(step * more);
      }
    return { floor, unit, text: bits.toString(2) };
  }

  /** The largest reachable total <= limit, or null. */
  function largestTotal({ floor, unit, text }, limit) {
    if (limit < floor) return null;
    const top = text.length - 1, room = Math.min(top, Math.floor((limit - floor) / unit));
    return floor + unit * (top - text.indexOf("1", top - room));
  }

  // -------------------------------------------------------------------------------------------------- hull.py

  /** Items: cost, units and allowed are lists of rows, a row an item, a column a format. Of equal units the cheapest. */
  function makeItems(units, costs) {
    const allowed = costs.map((row) => row.map((c) => c < Infinity));
    const cost = costs.map((row) => row.map((c) => (c < Infinity ? c : 0)));
    units.forEach((row, i) => {
      for (let f = 0; f < row.length; f++)
        for (let g = f + 1; g < row.length; g++)
          if (allowed[i][f] && allowed[i][g] && row[f] === row[g]) allowed[i][cost[i][g] < cost[i][f] ? f : g] = false;
    });
    return { units, cost, allowed };
  }

  const part = (items, of) => ({ units: of.map((i) => items.units[i]), cost: of.map((i) => items.cost[i]), allowed: of.map((i) => items.allowed[i]) });

  /** Every item's hull edges, best bargain first. */
  function hullEdges(items) {
    const edges = [], start = items.units.map((row, i) => {
      let least = -1;
      row.forEach((u, f) => { if (items.allowed[i][f] && (least < 0 || u < row[least])) least = f; });
      return Math.max(least, 0);
    });
    start.forEach((at, item) => {
      for (let turn = 0, was = Infinity; ; turn++) {
        const next = nextVertex(items.units[item], items.cost[item], items.allowed[item], at);
        if (next.to < 0) break;
        was = Math.min(next.bargain, was); // keep rounding from letting a later edge overtake an earlier one
        edges.push({ item, turn, to: next.to, units: next.rise, bargain: was });
        at = next.to;
      }
    });
    edges.sort((a, b) => b.bargain - a.bargain || a.item - b.item || a.turn - b.turn);
    let all = 0;
    return { start, list: edges, reach: Float64Array.from(edges, (e) => (all += e.units)) };
  }

  function nextVertex(units, cost, allowed, at) {
    let to = -1, rise = 0, bargain = -Infinity;
    for (let f = 0; f < units.length; f++) {
      const more = units[f] - units[at];
      if (!allowed[f] || more <= 0) continue;
      const price = (cost[at] - cost[f]) / more;
      if (price > bargain || (price === bargain && more < rise)) [to, rise, bargain] = [f, more, price];
    }
    return { to, rise, bargain };
  }

  // -------------------------------------------------------------------------------------------------- core.py

  /** The choice of least cost whose units sum to k, null if there is none, and its gap. */
  function cheapest(items, edges, k, workLimit = WORK_LIMIT) {
    const taken = upTo(edges.reach, k), base = edges.start.slice(), last = edges.list.length;
    for (let j = 0; j < taken; j++) base[edges.list[j].item] = edges.list[j].to;
    const need = k - (taken ? edges.reach[taken - 1] : 0);
    if (need === 0) return { choice: base, gap: 0 };
    if (need < 0 || taken === last) return { choice: null, gap: 0 };
    const found = repair(reduced(items, base, edges.list[taken].bargain), need, workLimit);
    if (!found) return { choice: null, gap: 0 };
    for (const m of found.made) base[found.moves.item[m]] = found.moves.to[m];
    return { choice: base, gap: found.gap };
  }

  /** All moves away from the base, with reduced costs for the multiplier. */
  function reduced(items, base, multiplier) {
    const room = base.length * items.units[0].length;
    const item = new Int32Array(room), to = new Int32Array(room), units = new Float64Array(room), cost = new Float64Array(room);
    let n = 0;
    for (let i = 0; i < base.length; i++) {
      const unitsF = items.units[i], costF = items.cost[i], allowedF = items.allowed[i], from = base[i];
      for (let f = 0; f < unitsF.length; f++) {
        const d = unitsF[f] - unitsF[from];
        if (!allowedF[f] || d === 0) continue;
        item[n] = i;
        to[n] = f;
        units[n] = d;
        cost[n++] = Math.max(costF[f] - costF[from] + multiplier * d, 0);
      }
    }
    return { item: item.subarray(0, n), to: to.subarray(0, n), units: units.subarray(0, n), cost: cost.subarray(0, n) };
  }

  /** Of the moves those that can matter, items in order of their cheapest move, and where each item begins. */
  function core(moves, need, most) {
    const { item, to, units, cost } = moves, groups = new Map(), rank = new Map();
    const before = (a, b) => cost[a] - cost[b] || item[a] - item[b] || a - b;
    for (let m = 0; m < units.length; m++) {
      const group = groups.get(units[m]);
      if (group) group.push(m);
      else groups.set(units[m], [m]);
    }
    for (const [d, members] of groups) groups.set(d, smallest(members, most, before));
    const single = (groups.get(need) || [])[0];
    for (const members of groups.values())
      members.forEach((m, r) => { if (single === undefined || before(m, single) <= 0) rank.set(m, r); });
    const order = [...rank.keys()].sort((a, b) => cost[a] - cost[b] || rank.get(a) - rank.get(b) || item[a] - item[b] || a - b);
    const byItem = new Map();
    for (const m of order) byItem.has(item[m]) ? byItem.get(item[m]).push(m) : byItem.set(item[m], [m]);
    const kept = [...byItem.values()].flat(), begin = [0];
    for (const members of byItem.values()) begin.push(begin[begin.length - 1] + members.length);
    const pick = (list) => kept.map((m) => list[m]);
    return { moves: { item: pick(item), to: pick(to), units: pick(units), cost: pick(cost) }, begin };
  }

  /** The `most` first of a list in their order. */
  function smallest(list, most, before) {
    if (most > 32) return list.sort(before).slice(0, most);
    const best = [];
    for (const m of list) {
      if (best.length === most && before(m, best[most - 1]) > 0) continue;
      let at = best.length;
      while (at > 0 && before(m, best[at - 1]) < 0) at--;
      best.splice(at, 0, m);
      best.length = Math.min(best.length, most);
    }
    return best;
  }

  /** The moves, at most one an item, of least reduced cost whose units sum to `need`, and the gap; null if none do. */
  function repair(all, need, workLimit) {
    const widest = all.units.reduce((most, d) => Math.max(most, Math.abs(d)), 1);
    const { moves, begin } = core(all, need, Math.max(1, 2 * widest - 2));
    const ways = leastWays(moves, need), least = bound(ways, 0), trail = [];
    let { best, made } = follow(moves, ways, need), bestAt = null;
    let states = { units: [0], cost: [0] }, work = 0, gap = 0;
    for (let step = 0; step + 1 < begin.length; step++) {
      const first = moves.cost[begin[step]], keep = [];
      states.units.forEach((u, s) => {
        const lacking = Math.min(Math.ceil(Math.abs(need - u) / widest), 1000), spent = states.cost[s];
        if (spent + bound(ways, u) < best && spent + lacking * first < best) keep.push(s);
      });
      if (best <= Math.max(least, first) || !keep.length) break;
      if (work > workLimit) {
        if (best === Infinity) throw new TooWide();
        gap = best - least;
        break;
      }
      const { place, next } = onward(states, keep, moves, begin[step], begin[step + 1]);
      states = next;
      trail.push({ from: Int32Array.from(next.from), move: Int32Array.from(next.move) });
      work += next.units.length;
      const at = place.get(need);
      if (at !== undefined && next.cost[at] < best) [best, bestAt] = [next.cost[at], { steps: trail.length, at }];
    }
    if (bestAt) made = wayBack(trail.slice(0, bestAt.steps), bestAt.at);
    return best < Infinity ? { made, moves, gap } : null;
  }

  /** From each state kept: the item left alone, or one of its moves a … b-1; of equal sums the cheapest, the earliest. */
  function onward(states, keep, moves, a, b) {
    const place = new Map(), next = { units: [], cost: [], from: [], move: [] };
    for (let m = a - 1; m < b; m++)
      for (const s of keep) {
        const u = states.units[s] + (m < a ? 0 : moves.units[m]), cost = states.cost[s] + (m < a ? 0 : moves.cost[m]);
        let at = place.get(u);
        if (at !== undefined && !(cost < next.cost[at])) continue;
        if (at === undefined) place.set(u, (at = next.units.length));
        next.units[at] = u;
        next.cost[at] = cost;
        next.from[at] = s;
        next.move[at] = m < a ? -1 : m;
      }
    return { place, next };
  }

  function wayBack(trail, at) {
    const made = [];
    for (let step = trail.length - 1; step >= 0; step--) {
      if (trail[step].move[at] >= 0) made.push(trail[step].move[at]);
      at = trail[step].from[at];
    }
    return made;
  }

  /** The least way made with real moves, each of another item; else the cheapest single move; else nothing. */
  function follow(moves, ways, need) {
    const order = range(moves.item.length).sort((a, b) => moves.cost[a] - moves.cost[b] || a - b);
    const way = path(ways, 0, need), used = new Set(), queues = new Map();
    for (const d of new Set(way)) queues.set(d, order.filter((m) => moves.units[m] === d).values());
    let made = [];
    for (const d of way) {
      let m;
      do m = queues.get(d).next().value; while (m !== undefined && used.has(moves.item[m]));
      if (m === undefined) break;
      used.add(moves.item[m]);
      made.push(m);
    }
    if (!way.length || made.length < way.length) made = order.filter((m) => moves.units[m] === need).slice(0, 1);
    return { best: made.length ? made.reduceRight((cost, m) => cost + moves.cost[m], 0) : Infinity, made };
  }

  // -------------------------------------------------------------------------------------------------- ways.py

  /** For each sum low, low + 1, …: the least cost of a way to the aim and its first change. */
  function leastWays(moves, aim) {
    const cheap = new Map();
    moves.units.forEach((d, m) => { if (!(cheap.get(d) <= moves.cost[m])) cheap.set(d, moves.cost[m]); });
    const changes = [...cheap].sort((a, b) => a[0] - b[0]), nothing = { low: 0, cost: [0], change: [0] };
    const span = 3 * Math.max(...changes.map(([d]) => Math.abs(d))) + 1, size = 2 * span + 1;
    if (size * changes.length > MOST_CELLS) return nothing;
    const cost = new Float64Array(size).fill(Infinity), change = new Float64Array(size);
    cost[span] = 0;
    for (let pass = 0; pass < MOST_PASSES; pass++) {
      let moved = false;
      for (const [d, price] of changes)
        for (let n = 0; n < size - Math.abs(d); n++) {
          const here = d > 0 ? n : size - 1 - n, found = cost[here + d] + price; // what is read is not yet written
          if (found < cost[here]) [cost[here], change[here], moved] = [found, d, true];
        }
      if (moved) continue;
      cost[0] = cost[size - 1] = 0;
      return { low: aim - span, cost, change };
    }
    return nothing;
  }

  const bound = (ways, u) => ways.cost[Math.min(Math.max(u - ways.low, 0), ways.cost.length - 1)];

  function path(ways, u, aim) {
    const changes = [];
    while (u !== aim && u - ways.low > 0 && u - ways.low < ways.cost.length - 1 && ways.change[u - ways.low]) {
      changes.push(ways.change[u - ways.low]);
      u += ways.change[u - ways.low];
    }
    return u === aim ? changes : [];
  }

  // ------------------------------------------------------------------------------------------------- split.py

  /** Items grouped by the greatest common divisor of their units; those that cannot change go with the first. */
  function byStep(items) {
    const step = items.units.map((row, i) => row.reduce((g, u, f) => gcd(g, items.allowed[i][f] ? u : 0), 0));
    const steps = [...new Set(step)].filter(Boolean).sort((a, b) => a - b);
    if (!steps.length) steps.push(1);
    return steps.map((s) => {
      const of = range(step.length).filter((i) => (step[i] || steps[0]) === s), mine = part(items, of);
      mine.units = mine.units.map((row) => row.map((u) => Math.floor(u / s)));
      return { of, step: s, items: mine, edges: hullEdges(mine) };
    });
  }

  function cheapestSplit(items, edges, parts, need) {
    const bounds = boundsOf(edges, parts, need), choice = items.units.map(() => 0);
    const found = bounds && search(bounds, need);
    if (!found || !found.ks) return { choice: null, gap: 0 };
    bounds.forEach((b, p) => {
      cheapest(b.part.items, b.part.edges, found.ks[p]).choice.forEach((f, i) => { choice[b.part.of[i]] = f; });
    });
    return { choice, gap: found.gap };
  }

  function boundsOf(edges, parts, need) {
    const all = edges.reach.length ? edges.reach[edges.reach.length - 1] : 0;
    if (need < 0 || need > all) return null;
    if (sum(parts.map((p) => sum(p.items.units.map((row) => Math.max(...row))))) > MOST_STEPS) throw new TooWide();
    const multiplier = edges.list[Math.min(upTo(edges.reach, need), edges.list.length - 1)].bargain;
    const bounds = parts.map((part) => {
      const each = multiplier * part.step, excess = hullCosts(part.edges);
      for (let k = 0; k < excess.length; k++) excess[k] += each * k;
      const floor = excess.reduce((a, b) => Math.min(a, b));
      return { part, multiplier: each, floor, excess: excess.map((x) => x - floor) };
    });
    return bounds.sort((a, b) => a.excess.length - b.excess.length);
  }

  /** The hull's cost at every number of steps, by straight lines between its corners. */
  function hullCosts(edges) {
    const found = new Float64Array(1 + sum(edges.list.map((e) => e.units)));
    let at = 0, cost = 0;
    for (const e of edges.list) {
      const next = cost + -e.bargain * e.units, slope = (next - cost) / e.units;
      for (let k = 1; k < e.units; k++) found[at + k] = slope * k + cost;
      found[(at += e.units)] = cost = next;
    }
    return found;
  }

  function evaluate(b, k) {
    const { items, edges } = b.part, { choice, gap } = cheapest(items, edges, k);
    if (!choice) return [Infinity, 0];
    const costs = choice.map((f, i) => items.cost[i][f] - items.cost[i][edges.start[i]]);
    return [fsum([...costs, b.multiplier * k, -b.floor]), gap];
  }

  function search(bounds, need) {
    const known = new Map();
    let best = Infinity, ks = null, proven = Infinity;
    for (const [found, least] of byRisingBound(bounds, need)) {
      if (least >= best) break;
      if (!found || known.size >= MOST_TRIALS) {
        proven = Math.min(proven, least);
        break;
      }
      const values = found.map((k, p) => {
        const key = p + ":" + k;
        if (!known.has(key)) known.set(key, evaluate(bounds[p], k));
        return known.get(key);
      });
      const total = fsum(values.map((v) => v[0])), gap = fsum(values.map((v) => v[1]));
      proven = Math.min(proven, total - gap);
      if (total < best) [best, ks] = [total, found];
    }
    if (!ks && proven < Infinity) throw new TooWide();
    return { ks, gap: ks ? best - Math.min(best, proven) : 0 };
  }

  function* byRisingBound(bounds, need) {
    const everything = fsum(bounds.map((b) => b.excess.reduce((a, c) => Math.max(a, c))));
    let done = -1, limit = firstLimit(bounds);
    while (done <= everything) {
      const listed = sharings(bounds, need, limit);
      if (!listed) {
        yield [null, Math.max(done, 0)];
        return;
      }
      for (const s of listed.sort((a, b) => a.excess - b.excess)) if (s.excess > done) yield [s.ks, s.excess];
      [done, limit] = [limit, 4 * limit];
    }
  }

  function firstLimit(bounds) {
    const near = bounds.map(({ excess }) => {
      const from = Math.max(0, excess.indexOf(excess.reduce((a, b) => Math.min(a, b))) - 1);
      return excess.subarray(from, from + 3).reduce((a, b) => Math.max(a, b));
    });
    const positive = ({ excess }) => excess.reduce((a, x) => (x > 0 && x < a ? x : a), Infinity);
    return Math.max(...near) || Math.min(...bounds.map(positive));
  }

  function sharings(bounds, need, limit) {
    let states = [{ ks: [], spent: 0, excess: 0 }];
    for (const b of bounds.slice(0, -1)) {
      const ks = range(b.excess.length).filter((k) => b.excess[k] <= limit), next = [];
      if (states.length * ks.length > MOST_SHARINGS) return null;
      for (const s of states)
        for (const k of ks) {
          const excess = s.excess + b.excess[k], spent = s.spent + b.part.step * k;
          if (excess <= limit && spent <= need) next.push({ ks: [...s.ks, k], spent, excess });
        }
      states = next;
    }
    const last = bounds[bounds.length - 1], found = [];
    for (const s of states) {
      const left = need - s.spent, k = left / last.part.step;
      if (left % last.part.step || k >= last.excess.length) continue;
      const excess = s.excess + last.excess[k];
      if (excess <= limit) found.push({ ks: [...s.ks, k], excess });
    }
    return found;
  }

  // --------------------------------------------------------------------------------- knapsack.py and choose.py

  /** Everything that does not depend on the total: items in units above each one's least, and their hulls. */
  function prepare(costs, weights) {
    const lows = weights.map((row, i) => row.reduce((low, w, f) => (costs[i][f] < Infinity ? Math.min(low, w) : low), Infinity));
    if (lows.includes(Infinity)) throw new Error("an item is allowed no format");
    const offsets = weights.map((row, i) => row.map((w, f) => (costs[i][f] < Infinity ? w - lows[i] : 0)));
    const unit = offsets.flat().reduce(gcd, 0) || 1;
    const items = makeItems(offsets.map((row) => row.map((w) => w / unit)), costs);
    return { items, edges: hullEdges(items), parts: byStep(items), low: sum(lows), unit, costs };
  }

  /** The cheapest choice that weighs exactly `total`, its exactly rounded cost and its gap. */
  function meet({ items, edges, parts, low, unit, costs }, total) {
    const need = (total - low) / unit;
    const found = Number.isInteger(need) ? spend(items, edges, parts, need) : { choice: null };
    if (!found.choice) throw new Error("no choice of the allowed formats weighs exactly " + total);
    return { choice: found.choice, cost: fsum(found.choice.map((f, i) => costs[i][f])), gap: found.gap };
  }

  /** All shapes together, or if that grows too wide, by shares; last together again with all the work allowed. */
  function spend(items, edges, parts, need) {
    let best = null;
    const wide = parts.some((p) => p.items.units.some((row) => row.some((u) => u > WIDEST_SHARED)));
    if (parts.length < 2 || parts.length > MOST_PARTS || wide) best = attempt(() => cheapest(items, edges, need));
    else
      for (const way of [
        () => cheapest(items, edges, need, FIRST_TRY),
        () => cheapestSplit(items, edges, parts, need),
        () => cheapest(items, edges, need),
      ]) {
        const found = attempt(way);
        if (found && found.gap === 0) return found;
        if (found && (!best || found.gap < best.gap)) best = found;
      }
    if (!best) throw tooOdd();
    return best;
  }

  function attempt(way) {
    try {
      return way();
    } catch (problem) {
      if (!(problem instanceof TooWide)) throw problem;
      return null;
    }
  }

  /** Items without cost whose weights make up any multiple of the unit up to `slack`. */
  function unspent(weights, slack) {
    const formats = weights[0].length, rows = [];
    if (formats < 2) return rows;
    const unit = weights.reduce((g, row) => row.reduce((h, w) => gcd(h, w - Math.min(...row)), g), 0) || 1;
    for (let left = Math.floor(slack / unit), size = 1; left > 0; ) {
      const step = Math.min(size, Math.ceil(left / (formats - 1)));
      const row = range(formats).map((f) => Math.min(step * f, left));
      rows.push(row.map((u) => unit * u));
      left -= row[formats - 1];
      size += row[formats - 1];
    }
    return rows;
  }

  /**
   * A solver for items of these costs (rows of numbers, a column a format) and weights in bytes. `solve(limit)` gives
   * {choice, cost, bytes, total, gap}: `total` is the largest that can be reached, `total - bytes` is padding; null
   * where even the least exceeds the limit. `curve()`: [bytes, cost] along the hull, of which no map is below.
   */
  return (costs, weights) => {
    const reach = reachable(weights), exact = prepare(costs, weights), loose = new Map();
    const steps = weights.flatMap((row) => [...row].sort((a, b) => a - b).map((w, f, all) => (f ? w - all[f - 1] : 0)));
    const least = steps.reduce((a, b) => (b > 0 && b < a ? b : a), Infinity);
    return {
      least: reach.floor,
      most: reach.floor + reach.unit * (reach.text.length - 1),
      solve(limit) {
        const total = largestTotal(reach, limit), slack = Math.min(total, least) - 1;
        if (total === null) return null;
        let found = null, refused = null;
        try {
          found = meet(exact, total);
        } catch (problem) {
          refused = problem;
        }
        if (!loose.has(slack)) {
          const rows = unspent(weights, slack), free = rows.map((row) => row.map(() => 0));
          loose.set(slack, rows.length ? prepare([...costs, ...free], [...weights, ...rows]) : null);
        }
        if (loose.get(slack)) {
          const near = meet(loose.get(slack), total);
          if (!found || near.cost < found.cost - DEAR * Math.abs(found.cost)) found = near;
        }
        if (!found) throw refused;
        const choice = found.choice.slice(0, weights.length);
        return { choice, cost: found.cost, gap: found.gap, bytes: sum(choice.map((f, i) => weights[i][f])), total };
      },
      curve() {
        const { start, list } = exact.edges;
        let bytes = exact.low, cost = sum(start.map((f, i) => costs[i][f]));
        return [[bytes, cost], ...list.map((e) => [(bytes += e.units * exact.unit), (cost -= e.bargain * e.units)])];
      },
    };
  };
})();
