// The doctor's report: findings with their pictures, sizes, and what the image policy does.

function card(number, title) {
  const row = data.rows[number];
  return make("article", { class: "sample" }, title,
    make("small", {}, row.where),
    make("div", { class: "pictures" },
      row.picture === null ? null : make("figure", {}, picture(row.picture, "photo", row.where)),
      row.drawn === null ? null : make("figure", {}, make("figcaption", {}, "its text prints"), picture(row.drawn, "drawn", row.text))),
    make("code", { class: "tokens" }, row.text || "(no text)"));
}

/** Cases of one row side by side, cases of several below each other. */
function cases(found) {
  if (found.every(([rows]) => rows.length === 1)) {
    return make("div", { class: "case samples" }, found.map(([[row], , why]) => card(row, why ? make("p", {}, why) : null)));
  }
  return found.map(([rows, numRows, why]) => make("div", { class: "case" },
    why ? make("p", {}, why) : null,
    make("div", { class: "samples" }, rows.map((row) => card(row))),
    numRows > rows.length ? make("small", {}, `and ${count(numRows - rows.length, "more row")}`) : null));
}

function finding(entry) {
  const left = entry.num_cases - entry.cases.length;
  return make("details", { class: `finding ${entry.severity}` },
    make("summary", {}, make("b", {}, entry.title[0].toUpperCase() + entry.title.slice(1)),
      make("span", { class: "badge" }, entry.severity), make("span", { class: "soft" }, count(entry.num_rows, "row"))),
    make("p", { class: "soft" }, `What to do: ${entry.advice}.`),
    cases(entry.cases),
    left > 0 ? make("p", { class: "soft" }, `And ${left.toLocaleString("en")} more like these: --json lists all of them.`) : null);
}

function histogram([name, bars]) {
  const [width, height, bottom] = [520, 170, 24];
  const step = width / bars.length;
  const most = Math.max(...bars.map(([, , number]) => number));
  const every = Math.ceil(bars.length / 8);
  return make("div", { class: "chart" }, make("h3", {}, name[0].toUpperCase() + name.slice(1)),
    draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of ${name}` },
      draw("line", { class: "grid", x1: 0, x2: width, y1: height - bottom, y2: height - bottom }),
      bars.map(([from, to, number], i) => {
        const bar = ((height - bottom - 8) * number) / most;
        return draw("g", {}, draw("title", {}, `${from === to ? from : `${from} to ${to}`}: ${count(number, "row")}`),
          draw("rect", { class: "hit-area", x: i * step, y: 0, width: step, height: height - bottom }),
          draw("rect", { class: "bar", x: i * step + 1, y: height - bottom - bar, width: Math.max(1, step - 2), height: bar, rx: 1 }),
          i % every ? null : draw("text", { class: "strong", x: (i + 0.5) * step, y: height - 6, "text-anchor": "middle" },
            i === bars.length - 1 && to > from ? `${from}+` : from.toLocaleString("en")));
      })));
}

function sizes() {
  const names = Object.keys(Object.values(data.sizes)[0] ?? {});
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ["", ...names].map((name, i) => make("th", { class: i ? "number" : null, scope: "col" }, name)))),
    make("tbody", {}, Object.entries(data.sizes).map(([name, values]) => make("tr", {}, make("td", {}, name),
      Object.values(values).map((value) => make("td", { class: "number" }, value.toLocaleString("en"))))))));
}

const SEVERITIES = [["problem", "Problems"], ["warning", "Warnings"], ["note", "Notes"]];

startPage(
  make("header", { class: "page" },
    make("div", {}, make("h1", {}, data.title),
      make("p", { class: "soft" }, `${data.data.join(" and ")}: ${count(data.num_rows, "row")}, ${count(data.num_formulas, "formula")}.` +
        (data.has_latex ? "" : " LaTeX is not installed: no text was rendered."))),
    themeButton()),
  data.findings.length ? SEVERITIES.map(([severity, title]) => {
    const entries = data.findings.filter((entry) => entry.severity === severity);
    return entries.length ? make("section", { "aria-label": title }, make("h2", {}, title), entries.map(finding)) : null;
  }) : make("section", {}, make("p", {}, "Nothing found.")),
  make("section", { "aria-label": "Sizes" }, make("h2", {}, "Sizes"), make("p", { class: "soft" }, "The last bar holds everything above the 99% quantile."),
    make("div", { class: "charts" }, Object.entries(data.histograms).map(histogram)), sizes()),
  data.treatments.length ? make("section", { "aria-label": "Image policy" }, make("h2", {}, "What the image policy does to the extremes"),
    make("div", { class: "samples" }, data.treatments.map((one) => card(one.row, [make("h3", {}, one.which[0].toUpperCase() + one.which.slice(1)), make("p", {}, one.what)])))) : null,
);

document.addEventListener("keydown", (event) => {
  if (event.key === "t" && !event.ctrlKey && !event.metaKey && !event.altKey) document.querySelector(".theme").click();
});
