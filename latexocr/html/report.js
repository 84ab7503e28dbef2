// The report of an evaluation: figures, charts, and a gallery that the charts filter.

const PAGE_ROWS = 20;
const rows = data.rows;
const numRows = rows.id.length;
const has = (name) => name in rows;
const isBleu = (name) => name.startsWith("bleu"); // 0 to 100; all other metrics are shares

const LABELS = {
  exact_match: "exact match", token_errors: "token errors", edit_distance: "edit distance", bleu_sentence: "sentence BLEU",
  glyph_f1: "glyph F1", picture_match: "picture match", picture_match_spacing: "picture match up to spacing",
  renders: "renders", runaway: "runaway", length: "length", num_tokens: "tokens generated", exprate_1: "at most 1 error",
  exprate_2: "at most 2 errors", exprate_3: "at most 3 errors", bleu: "BLEU", bleu_chars: "BLEU of characters",
  confidence: "confidence", gain: "gain over the baseline",
};
const label = (name) => LABELS[name] ?? name.replaceAll("_", " ").replace(/^bleu/, "BLEU");
const capital = (text) => text[0].toUpperCase() + text.slice(1);

// --- what is chosen ---------------------------------------------------------------------------------------

const state = { show: "all", slice: "", errors: "", confusion: "", search: "", sort: "worst", page: 0 };
let found = [];
let opened = new Set();

const SHOW = [
  ["all", "All rows", () => true],
  ["wrong", "Wrong", (i) => !rows.exact_match[i]],
  ["right", "Right", (i) => rows.exact_match[i]],
  ["silent", "Wrong, same picture", (i) => !rows.exact_match[i] && rows.picture_match[i], "picture_match"],
  ["refused", "Does not render", (i) => !rows.renders[i], "renders"],
  ["runaway", "Runaway", (i) => rows.runaway[i], "runaway"],
  ["won", "Better than the baseline", (i) => rows.gain[i] > 1e-9, "gain"],
  ["lost", "Worse than the baseline", (i) => rows.gain[i] < -1e-9, "gain"],
].filter(([, , , needs]) => !needs || has(needs));

// name, label, column, 1 for ascending
const SORT = [
  ["worst", "Worst first", null, 1],
  ["best", "Best first", null, -1],
  ["errors", "Most token errors", "token_errors", -1],
  ["glyphs", "Lowest glyph F1", "glyph_f1", 1],
  ["long", "Longest first", "length", -1],
  ["short", "Shortest first", "length", 1],
  ["unsure", "Least confident first", "confidence", 1],
  ["sure", "Most confident first", "confidence", -1],
  ["gain", "Largest gain first", "gain", -1],
  ["loss", "Largest loss first", "gain", 1],
].filter(([, , column]) => !column || has(column));

// A search is for LaTeX: blanks do not count. Built when first needed.
let haystack = null;
const squeezed = (text) => text.replace(/\s+/g, "");

function select() {
  const tests = [];
  const { show, slice, errors, confusion, search, sort } = state;
  if (show !== "all") tests.push(SHOW.find(([name]) => name === show)[2]);
  if (slice !== "") tests.push((i) => rows.slices[i].includes(Number(slice)));
  if (confusion !== "") tests.push((i) => rows.confusions[i].includes(Number(confusion)));
  if (errors !== "") {
    const bucket = data.errors.buckets[Number(errors)];
    tests.push((i) => rows.token_errors[i] >= bucket.from && rows.token_errors[i] <= (bucket.to ?? Infinity));
  }
  if (search.trim()) {
    haystack ??= rows.id.map((id, i) => squeezed(`${id}\n${rows.prediction[i]}\n${rows.reference[i]}`));
    const needle = squeezed(search);
    tests.push((i) => haystack[i].includes(needle));
  }
  found = Array.from({ length: numRows }, (_, i) => i).filter((i) => tests.every((test) => test(i)));
  const [, , column, direction] = SORT.find(([name]) => name === sort);
  const value = (i) => rows[column][i] ?? direction * Infinity; // a row without one comes last
  if (column) found.sort((a, b) => direction * (value(a) - value(b)) || a - b);
  else if (direction < 0) found.reverse();
  state.page = Math.min(state.page, Math.max(0, Math.ceil(found.length / PAGE_ROWS) - 1));
}

function change(values, { scroll = false } = {}) {
  Object.assign(state, { page: 0 }, values);
  select();
  const parts = Object.entries(state).filter(([name, value]) => value !== "" && value !== DEFAULTS[name]);
  try { // the address names the view, so that it can be kept as a bookmark
    history.replaceState(null, "", `#${new URLSearchParams(parts.map(([name, value]) => [name, String(value)]))}`);
  } catch { /* some browsers refuse this for files */ }
  drawTools();
  drawRows();
  drawCharts();
  if (scroll) document.getElementById("rows").scrollIntoView({ block: "start" });
}

const DEFAULTS = { ...state };

function readAddress() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (name in state) state[name] = name === "page" ? Math.max(0, Number.parseInt(value) || 0) : value;
  }
  const known = { show: SHOW, sort: SORT };
  for (const [name, table] of Object.entries(known)) if (!table.some(([key]) => key === state[name])) state[name] = DEFAULTS[name];
  const sizes = { slice: data.slices, errors: data.errors.buckets, confusion: data.confusions };
  for (const [name, list] of Object.entries(sizes)) if (!(Number(state[name]) < list.length)) state[name] = "";
}

// --- figures ----------------------------------------------------------------------------------------------

function headline() {
  return make("div", { class: "figures" }, data.headline.map((figure) => {
    const unit = figure.share ? "%" : "";
    const top = figure.share ? 1 : 100;
    const x = (value) => Math.min(100, (100 * value) / top);
    const from = figure.from ?? figure.value;
    const to = figure.to ?? figure.value;
    return make("div", { class: "figure", title: `${figure.name}: ${figure.what}` },
      make("div", { class: "name" }, figure.label, figure.better === "lower" ? make("span", { title: "less is better", "aria-label": ", less is better" }, " ↓") : null),
      make("div", { class: "value" }, shown(figure.value, figure.share), make("span", { class: "unit" }, unit)),
      draw("svg", { viewBox: "0 0 100 9", preserveAspectRatio: "none", "aria-hidden": "true" },
        draw("rect", { class: "grid", x: 0, y: 4, width: 100, height: 0.5, "vector-effect": "non-scaling-stroke" }),
        draw("rect", { class: "bar", x: x(from), y: 2, width: Math.max(1.5, x(to) - x(from)), height: 5, rx: 1 })),
      make("small", {}, figure.from === null ? "no interval" : `${shown(figure.from, figure.share)}–${shown(figure.to, figure.share)}`),
      make("small", {}, figure.what));
  }));
}

function allFigures() {
  return make("details", { class: "all" }, make("summary", {}, `All ${data.metrics.length} figures`),
    make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, ["metric", "what it is", "value", "95% from", "to"].map((name, i) => make("th", { class: i > 1 ? "number" : null, scope: "col" }, name)))),
      make("tbody", {}, data.metrics.map((metric) => make("tr", {}, make("td", {}, make("code", {}, metric.name)), make("td", { class: "soft" }, metric.what),
        [metric.value, metric.from, metric.to].map((value) => make("td", { class: "number" }, exact(value)))))))));
}

const exact = (value) => (value === null || value === undefined ? "" : Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(4));

function comparison() {
  if (!data.comparison) return null;
  const head = new Set(data.headline.map((figure) => figure.name));
  const [first, others] = [data.comparison.filter((entry) => head.has(entry.metric)), data.comparison.filter((entry) => !head.has(entry.metric))];
  return make("section", { "aria-label": "Comparison" },
    make("h2", {}, "Against the baseline"),
    make("p", { class: "soft" }, "The same rows of both files, paired. Where an interval does not touch the middle line, another sample of rows would show the difference too."),
    differences(first),
    others.length ? make("details", {}, make("summary", {}, `${others.length} more`), differences(others)) : null);
}

const HEAD = ["metric", "this", "baseline", "difference", "95% from", "to", "", "rows won", "lost"];
const signed = (value) => (value > 0 ? `+${exact(value)}` : exact(value).replace("-", "−"));

/** A line for each metric; all intervals to one scale, BLEU's hundred as one. */
function differences(entries) {
  const scale = (entry) => (isBleu(entry.metric) ? 100 : 1);
  const top = Math.max(1e-9, ...entries.map((entry) => Math.max(Math.abs(entry.low), Math.abs(entry.high)) / scale(entry)));
  const x = (entry, value) => 100 + (95 * value) / scale(entry) / top;
  const verdict = (entry) => {
    if (entry.low <= 0 && entry.high >= 0) return "";
    return entry.low > 0 === (entry.better === "higher") ? " won" : " lost";
  };
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, HEAD.map((name, i) => make("th", { class: i && i !== 6 ? "number" : null, scope: "col" }, name)))),
    make("tbody", {}, entries.map((entry) => make("tr", {}, make("td", {}, capital(label(entry.metric))),
      [exact(entry.a), exact(entry.b), signed(entry.difference), signed(entry.low), signed(entry.high)].map((text) => make("td", { class: "number" }, text)),
      make("td", { class: `chart${verdict(entry)}` }, draw("svg", { viewBox: "0 0 200 14", width: 200, "aria-hidden": "true" },
        draw("line", { class: "grid", x1: 100, x2: 100, y1: 0, y2: 14 }),
        draw("line", { class: "whisker", x1: x(entry, entry.low), x2: x(entry, entry.high), y1: 7, y2: 7 }),
        draw("circle", { class: "dot", cx: x(entry, entry.difference), cy: 7, r: 3.5 }))),
      [entry.won, entry.lost].map((value) => make("td", { class: "number" }, exact(value))))))));
}

const CONFIDENCE_HEAD = ["answers", "confidence from", "to", "mean", "right"];

/** Whether the answers are right as often as they claim. */
function confidence() {
  if (!data.confidence) return null;
  const { bins, calibration_error, min_confidence, wrong_found } = data.confidence;
  const [size, margin] = [230, 44];
  const at = (value) => margin + (size - margin - 6) * value;
  const up = (value) => size - at(value);
  const warned = min_confidence === null ? "Too few answers are right to say from where on to warn."
    : `A warning below ${percentage(min_confidence)} strikes 5% of the right answers${wrong_found === null ? "" : ` and finds ${percentage(wrong_found)} of the wrong ones`}.`;
  return make("section", { "aria-label": "Confidence" },
    make("h2", {}, "Does it know when it is wrong?"),
    make("p", { class: "soft" }, `Answers sorted by confidence, in bins of equally many. On the line they are right (up to spacing and style) as often as they claim; the mean distance is ${percentage(calibration_error)}. ${warned}`),
    make("div", { class: "charts" },
      make("div", { class: "chart reliability" },
        draw("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": "Share right by confidence" },
          [0, 0.5, 1].map((part) => [
            draw("line", { class: "grid", x1: margin, x2: size - 6, y1: up(part), y2: up(part) }),
            draw("text", { x: margin - 6, y: up(part) + 4, "text-anchor": "end" }, `${100 * part}${part === 1 ? "%" : ""}`),
            draw("text", { x: at(part), y: size - margin + 18, "text-anchor": part === 1 ? "end" : "middle" }, `${100 * part}${part === 1 ? "% sure" : ""}`)]),
          draw("line", { class: "grid", x1: at(0), y1: up(0), x2: at(1), y2: up(1) }),
          draw("polyline", { class: "curve", points: bins.map((bin) => `${at(bin.confidence)},${up(bin.right)}`).join(" ") }),
          bins.map((bin) => draw("circle", { class: "dot", cx: at(bin.confidence), cy: up(bin.right), r: 4 })))),
      make("div", { class: "scroll" }, make("table", {},
        make("thead", {}, make("tr", {}, CONFIDENCE_HEAD.map((name) => make("th", { class: "number", scope: "col" }, name)))),
        make("tbody", {}, bins.map((bin) => make("tr", {}, make("td", { class: "number" }, exact(bin.num_rows)),
          [bin.low, bin.high, bin.confidence, bin.right].map((value) => make("td", { class: "number" }, percentage(value))))))))));
}

const percentage = (value) => `${shown(value, true)}%`;

// --- charts -----------------------------------------------------------------------------------------------

const sliceMetrics = [...new Set(data.slices.flatMap((entry) => Object.keys(entry.metrics)))];
let metric = sliceMetrics.includes("exact_match") ? "exact_match" : sliceMetrics[0];
const charts = make("div", { class: "charts" });
const groups = make("div", { class: "groups" });
const GROUPS = [
  ["Read as another", ([reference, prediction]) => reference && prediction],
  ["Left out", ([, prediction]) => !prediction],
  ["Made up", ([reference]) => !reference],
];

function drawCharts() {
  const focused = document.activeElement?.closest?.(".pick")?.getAttribute("aria-label");
  const kinds = [...new Set(data.slices.map((entry) => entry.by))];
  const others = kinds.filter((by) => by !== "length");
  charts.replaceChildren(...(kinds.includes("length") ? [curve("length")] : []), histogram(), ...others.map(dots));
  groups.replaceChildren(...GROUPS.map(([caption, test]) => make("div", {}, make("h3", {}, caption),
    make("div", { class: "pairs" }, data.confusions.map((entry, i) => (test(entry) ? pair(entry, i) : null))))));
  if (focused) for (const group of charts.querySelectorAll(".pick")) if (group.getAttribute("aria-label") === focused) group.focus();
}

function ofSlices(by) {
  return data.slices.map((entry, number) => ({ ...entry, number, values: entry.metrics[metric] ?? [null, null, null] }))
    .filter((entry) => entry.by === by && entry.values[0] !== null);
}

const share = () => !isBleu(metric);
const topValue = () => (share() ? 1 : 100);
const percent = (value) => shown(value, share()) + (share() ? "%" : "");
const sliceLabel = (entry) => `${capital(label(entry.by))} ${entry.slice}: ${label(metric)} ${percent(entry.values[0])}` +
  (entry.values[1] === null ? "" : `, ${percent(entry.values[1])} to ${percent(entry.values[2])}`) + `, ${count(entry.num_rows, "row")}`;

function toggle(name, number) {
  change({ [name]: state[name] === String(number) ? "" : String(number) }, { scroll: false });
}

/** Score by length: slices in their order, the interval as a band. */
function curve(by) {
  const entries = ofSlices(by);
  const [width, height, left, bottom] = [520, 230, 40, 40];
  const step = (width - left) / Math.max(1, entries.length);
  const x = (i) => left + step * (i + 0.5);
  const top = topValue();
  const y = (value) => 8 + (height - bottom - 8) * (1 - value / top);
  const line = (end) => entries.map((entry, i) => `${x(i)},${y(entry.values[end] ?? entry.values[0])}`);
  return make("div", { class: "chart" }, make("h3", {}, `${capital(label(metric))} by ${label(by)} in tokens`),
    draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${label(metric)} by ${label(by)}` },
      [0, 0.25, 0.5, 0.75, 1].map((part) => [
        draw("line", { class: "grid", x1: left, x2: width, y1: y(part * top), y2: y(part * top) }),
        draw("text", { x: left - 8, y: y(part * top) + 4, "text-anchor": "end" }, `${100 * part}${share() && part === 1 ? "%" : ""}`)]),
      draw("polygon", { class: "band", points: [...line(1), ...line(2).reverse()].join(" ") }),
      draw("polyline", { class: "curve", points: line(0).join(" ") }),
      entries.map((entry, i) => pick(sliceLabel(entry), state.slice === String(entry.number), () => toggle("slice", entry.number),
        draw("rect", { class: "hit", x: x(i) - step / 2 + 2, y: 0, width: step - 4, height, rx: 4 }),
        draw("circle", { class: "dot", cx: x(i), cy: y(entry.values[0]), r: 4 }),
        draw("text", { class: "strong", x: x(i), y: height - bottom + 18, "text-anchor": "middle" }, entry.slice),
        draw("text", { x: x(i), y: height - bottom + 34, "text-anchor": "middle" }, entry.num_rows.toLocaleString("en"))))));
}

/** A line for each slice: point and interval. */
function dots(by) {
  const entries = ofSlices(by);
  const [width, left, right, step] = [520, 150, 110, 26];
  const x = (value) => left + (width - left - right) * (value / topValue());
  return make("div", { class: "chart" }, make("h3", {}, `${capital(label(metric))} by ${label(by)}`),
    draw("svg", { viewBox: `0 0 ${width} ${entries.length * step + 6}`, role: "group", "aria-label": `${label(metric)} by ${label(by)}` },
      entries.map((entry, i) => {
        const y = step * (i + 0.5);
        const [value, low, high] = entry.values;
        return pick(sliceLabel(entry), state.slice === String(entry.number), () => toggle("slice", entry.number),
          draw("rect", { class: "hit", x: 0, y: y - step / 2 + 1, width, height: step - 2, rx: 4 }),
          draw("text", { class: "strong", x: 6, y: y + 4 }, entry.slice.length > 22 ? `${entry.slice.slice(0, 21)}…` : entry.slice),
          draw("line", { class: "grid", x1: x(0), x2: x(topValue()), y1: y, y2: y }),
          low === null ? null : draw("line", { class: "whisker", x1: x(low), x2: x(high), y1: y, y2: y }),
          draw("circle", { class: "dot", cx: x(value), cy: y, r: 4 }),
          draw("text", { class: "strong", x: width - right + 52, y: y + 4, "text-anchor": "end" }, percent(value)),
          draw("text", { x: width - 6, y: y + 4, "text-anchor": "end" }, entry.num_rows.toLocaleString("en")));
      })));
}

function histogram() {
  const { without, buckets } = data.errors;
  const [width, height, bottom] = [520, 230, 24];
  const step = width / buckets.length;
  const most = Math.max(1, ...buckets.map((bucket) => bucket.num_rows));
  return make("div", { class: "chart" },
    make("h3", {}, `Wrong rows by number of token errors (${without.toLocaleString("en")} of ${data.num_rows.toLocaleString("en")} have none)`),
    draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "Rows by token errors" },
      draw("line", { class: "grid", x1: 0, x2: width, y1: height - bottom, y2: height - bottom }),
      buckets.map((bucket, i) => {
        const bar = ((height - bottom - 22) * bucket.num_rows) / most;
        return pick(`${bucket.name} token errors: ${count(bucket.num_rows, "row")}`, state.errors === String(i), () => toggle("errors", i),
          draw("rect", { class: "hit", x: i * step + 2, y: 0, width: step - 4, height, rx: 4 }),
          draw("rect", { class: "bar", x: i * step + step * 0.18, y: height - bottom - bar, width: step * 0.64, height: bar, rx: 2 }),
          draw("text", { x: (i + 0.5) * step, y: height - bottom - bar - 7, "text-anchor": "middle" }, bucket.num_rows.toLocaleString("en")),
          draw("text", { class: "strong", x: (i + 0.5) * step, y: height - 6, "text-anchor": "middle" }, bucket.name));
      })));
}

function pair([reference, prediction, number], i) {
  return make("button", { class: "pair", type: "button", "aria-pressed": String(state.confusion === String(i)), click: () => toggle("confusion", i) },
    [reference, prediction].filter(Boolean).map((token, side) => [
      side ? make("span", { class: "soft", "aria-label": "read as" }, "→") : null, make("code", {}, token)]),
    make("span", { class: "count" }, number.toLocaleString("en")));
}

// --- gallery ----------------------------------------------------------------------------------------------

const tools = make("div", { class: "tools", role: "search" });
const list = make("div", { id: "list" });
const search = make("input", {
  type: "search", placeholder: "Search LaTeX or id", "aria-label": "Search LaTeX or id", title: "Search (/)",
  input: () => { clearTimeout(search.waiting); search.waiting = setTimeout(() => change({ search: search.value }), 150); },
});

function choice(name, label, options) {
  return make("select", { "aria-label": label, id: `choose-${name}`, change: (event) => change({ [name]: event.target.value }) }, options);
}

const option = (name, value, text) => make("option", { value, selected: state[name] === String(value) }, text);

const sliceChoice = () => choice("slice", "Slice", [
  option("slice", "", "All slices"),
  ...[...new Set(data.slices.map((entry) => entry.by))].map((by) => make("optgroup", { label: capital(label(by)) },
    data.slices.map((entry, i) => (entry.by === by ? option("slice", i, `${entry.slice} (${entry.num_rows.toLocaleString("en")})`) : null)))),
]);

function chip(name, text) {
  return make("button", { class: "chip", type: "button", title: "Show them all again", click: () => change({ [name]: "" }) }, text, " ×");
}

function drawTools() {
  const focused = document.activeElement?.id;
  const pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
  const turn = (by) => () => change({ page: state.page + by }, { scroll: true });
  const first = found.length ? state.page * PAGE_ROWS + 1 : 0;
  const last = Math.min(found.length, (state.page + 1) * PAGE_ROWS);
  const confused = data.confusions[Number(state.confusion)];
  for (const old of [...tools.children]) if (old !== search) old.remove();
  tools.append(
    choice("show", "Which rows", SHOW.map(([name, text]) => option("show", name, text))),
    ...(data.slices.length ? [sliceChoice()] : []),
    choice("sort", "Order", SORT.map(([name, text]) => option("sort", name, text))),
    make("div", { class: "pager" },
      make("button", { type: "button", id: "previous", "aria-label": "Previous page", title: "Previous page (p)", disabled: state.page === 0, click: turn(-1) }, "‹"),
      make("span", { role: "status", "aria-live": "polite" }, `${first.toLocaleString("en")}–${last.toLocaleString("en")} of ${found.length.toLocaleString("en")}`),
      make("button", { type: "button", id: "next", "aria-label": "Next page", title: "Next page (n)", disabled: state.page >= pages - 1, click: turn(1) }, "›")),
    ...(state.confusion === "" ? [] : [chip("confusion", !confused[1] ? `${confused[0]} left out` : !confused[0] ? `${confused[1]} made up` : `${confused[0]} → ${confused[1]}`)]),
    ...(state.errors === "" ? [] : [chip("errors", `${data.errors.buckets[Number(state.errors)].name} token errors`)]));
  if (document.activeElement !== search) search.value = state.search;
  if (focused) document.getElementById(focused)?.focus();
}

function drawRows() {
  const start = state.page * PAGE_ROWS;
  const shownRows = found.slice(start, start + PAGE_ROWS);
  list.replaceChildren(...shownRows.map(row));
  if (!shownRows.length) list.append(make("p", { class: "nothing" }, "No row is like this."));
}

function row(i) {
  const article = make("article", { class: opened.has(i) ? "row open" : "row", tabindex: -1, "data-row": i, "aria-label": `Row ${rows.id[i]}` },
    make("header", {}, make("b", {}, rows.id[i]), verdict(i), facts(i).map((text) => make("span", {}, text)),
      make("button", { class: "plain", type: "button", "aria-expanded": String(opened.has(i)), click: () => open(i) }, "Details")),
    pictures(i), diff(i));
  if (opened.has(i)) article.append(more(i));
  return article;
}

function verdict(i) {
  const errors = rows.token_errors[i];
  const found = [make("span", { class: rows.exact_match[i] ? "fine" : "bad" }, rows.exact_match[i] ? "right" : count(errors, "token error"))];
  if (!rows.exact_match[i] && rows.picture_match?.[i]) found.push(make("span", { class: "fine" }, "prints the same"));
  if (rows.runaway?.[i]) found.push(make("span", { class: "bad" }, "runaway"));
  return found;
}

function facts(i) {
  return [
    rows.exact_match[i] ? null : `edit distance ${shown(rows.edit_distance[i], true)}%`,
    rows.glyph_f1 && !rows.exact_match[i] ? `glyph F1 ${shown(rows.glyph_f1[i], true)}%` : null,
    rows.length ? count(rows.length[i], "token") : null,
    (rows.confidence?.[i] ?? null) === null ? null : `confidence ${percentage(rows.confidence[i])}`,
    has("gain") && rows.gain[i] ? `${rows.gain[i] > 0 ? "better" : "worse"} than the baseline by ${percentage(Math.abs(rows.gain[i]))}` : null,
  ].filter(Boolean);
}

function pictures(i) {
  const drawn = (name, caption) => {
    if (!has(`${name}_drawn`)) return null;
    const place = rows[`${name}_drawn`][i];
    return make("figure", {}, make("figcaption", {}, caption), place === null ? make("span", { class: "refused" }, "does not render")
      : picture(place, "drawn", `${caption}: ${rows[name][i]}`));
  };
  const photo = has("picture") ? make("figure", {}, make("figcaption", {}, "Picture"), rows.picture[i] === null
    ? make("span", { class: "soft" }, "not found") : picture(rows.picture[i], "photo", "What the model was given")) : null;
  const figures = [photo, drawn("prediction", "Prediction"), drawn("reference", "Reference"), drawn("baseline_prediction", "Baseline")].filter(Boolean);
  return figures.length ? make("div", { class: "pictures" }, figures) : null;
}

function diff(i) {
  const pieces = rows.pieces[i];
  const line = (side, tag) => make("dd", { class: "tokens" }, pieces.flatMap(([same, ours, theirs]) => {
    const text = same ? ours : [ours, theirs][side];
    return text ? [same ? text : make(tag, {}, text), " "] : [];
  }));
  if (pieces.every(([same]) => same)) return make("dl", { class: "diff" }, make("dt", {}, "Both"), line(0));
  return make("dl", { class: "diff" }, make("dt", {}, "Prediction"), line(0, "del"), make("dt", {}, "Reference"), line(1, "ins"));
}

function more(i) {
  const text = (name, caption) => make("div", { class: "text" }, make("small", {}, caption), make("pre", {}, rows[name][i] || "(empty)"),
    make("button", { class: "plain", type: "button", click: (event) => copy(rows[name][i], event.target) }, "Copy"));
  const values = Object.keys(LABELS).filter((name) => has(name) && rows[name][i] !== null);
  const places = rows.slices[i].map((number) => `${label(data.slices[number].by)} ${data.slices[number].slice}`);
  return make("div", { class: "more" }, text("prediction", "Prediction as it came"), text("reference", "Reference as it came"),
    has("baseline_prediction") ? text("baseline_prediction", "Baseline's prediction as it came") : null,
    make("dl", {}, values.map((name) => make("div", {}, make("dt", {}, label(name)), make("dd", {}, exact(rows[name][i])))),
      places.length ? make("div", {}, make("dt", {}, "slices"), make("dd", {}, places.join(", "))) : null));
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select it by hand";
  }
}

function open(i) {
  opened.has(i) ? opened.delete(i) : opened.add(i);
  const old = list.querySelector(`[data-row="${i}"]`);
  const button = old.contains(document.activeElement) && document.activeElement !== old;
  const fresh = row(i);
  old.replaceWith(fresh);
  (button ? fresh.querySelector("header button") : fresh).focus({ preventScroll: true });
}

// --- keys -------------------------------------------------------------------------------------------------

/** The next row or the one before, over the edges of the page. */
function step(by) {
  const all = [...list.querySelectorAll(".row")];
  if (!all.length) return;
  const at = all.indexOf(document.activeElement?.closest?.(".row"));
  let next = at < 0 ? 0 : at + by;
  if (next < 0 || next >= all.length) {
    const page = state.page + by;
    if (page < 0 || page * PAGE_ROWS >= found.length) return;
    change({ page });
    next = by > 0 ? 0 : PAGE_ROWS - 1;
  }
  const target = list.querySelectorAll(".row")[next];
  target.focus({ preventScroll: true });
  target.scrollIntoView({ block: "nearest" });
}

const KEYS = {
  j: () => step(1), k: () => step(-1),
  n: () => document.getElementById("next").click(), p: () => document.getElementById("previous").click(),
  "/": () => search.focus(),
  t: () => document.querySelector(".theme").click(),
  Enter: () => { const at = document.activeElement?.dataset?.row; if (at) open(Number(at)); },
  Escape: () => change({ ...DEFAULTS, sort: state.sort }),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  const typing = event.target.matches("input, select");
  if (typing && event.key !== "Escape") return;
  if (event.key === "Enter" && !event.target.matches(".row")) return;
  if (typing) { event.target.value = ""; event.target.blur(); }
  event.preventDefault();
  KEYS[event.key]();
});

// --- the page ---------------------------------------------------------------------------------------------

const ENGINES = { latex: "pictures compared as LaTeX prints them", mathtext: "pictures compared as matplotlib's mathtext draws them: no LaTeX here" };
const someOf = data.num_rows > numRows ? ` The worst ${numRows.toLocaleString("en")} of ${data.num_rows.toLocaleString("en")} rows are here.` : "";

readAddress();
startPage(
  make("header", { class: "page" },
    make("div", {}, make("h1", {}, data.title),
      make("p", { class: "soft" }, `${count(data.num_rows, "formula")}, ${ENGINES[data.engine] ?? "pictures not compared"}. Ranges are 95% bootstrap intervals.`)),
    themeButton()),
  headline(),
  make("section", {}, allFigures()),
  comparison(),
  confidence(),
  make("section", { "aria-label": "Where it fails" },
    make("div", { class: "heading" }, make("div", {}, make("h2", {}, "Where it fails"), make("p", { class: "soft" }, "Press a part of a chart to see its rows below. The grey numbers are rows.")),
      sliceMetrics.length ? make("label", {}, make("small", {}, "Metric "), make("select", { id: "choose-metric", change: (event) => { metric = event.target.value; drawCharts(); } },
        sliceMetrics.map((name) => make("option", { value: name, selected: name === metric }, capital(label(name)))))) : null),
    charts),
  data.confusions.length ? make("section", { "aria-label": "Most confused symbols" }, make("h2", {}, "Most confused symbols"),
    make("p", { class: "soft" }, "Token of the reference → token of the prediction, and in how many rows. Braces are not counted."), groups) : null,
  make("section", { id: "rows", "aria-label": "Rows" }, make("h2", {}, "Rows"),
    make("p", { class: "soft" }, make("del", {}, "Prediction only"), " and ", make("ins", {}, "reference only"), `, in canonical tokens.${someOf}`),
    tools, list),
  make("div", { class: "keys" }, [["j", "next row"], ["k", "row before"], ["Enter", "details"], ["n", "next page"], ["p", "page before"], ["/", "search"], ["Esc", "clear"], ["t", "light or dark"]]
    .map(([key, what]) => make("span", {}, make("kbd", {}, key), ` ${what}`))),
);
tools.append(search);
search.value = state.search;
select();
drawTools();
drawRows();
drawCharts();
