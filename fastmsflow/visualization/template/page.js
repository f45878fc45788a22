// The page: threshold, counts, curves, gallery. All text goes in as text, never as markup.

const page = JSON.parse(document.getElementById("data").textContent);
const rows = page.rows;
const OUTCOMES = {
  missed: "missed", alarm: "false alarm", hit: "hit", correct: "correct good", flagged: "above", passed: "below",
};
const byId = (id) => document.getElementById(id);

function element(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

// Threshold ---------------------------------------------------------------------------------------------------------

const scoresOf = (label) => rows.filter((row) => row.label === label).map((row) => row.score);
const good = scoresOf(0), defective = scoresOf(1), unknown = scoresOf(null);
const labelled = good.length + defective.length > 0;
const scale = scoreScale(rows.map((row) => row.score));
const roc = good.length && defective.length ? rocPoints(good, defective) : null;
const start = page.threshold ?? median(rows.map((row) => row.score));
let threshold = start;
// As many decimals for all scores as give the largest one four digits.
const largest = rows.reduce((most, { score }) => Math.max(most, Math.abs(score)), 1e-6);
const decimals = Math.max(0, 3 - Math.floor(Math.log10(largest)));

function median(values) {
  const sorted = Float64Array.from(values).sort(), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

function outcome(row) {
  const above = row.score > threshold;
  if (row.label === null) return above ? "flagged" : "passed";
  return row.label ? (above ? "hit" : "missed") : (above ? "alarm" : "correct");
}

function counted() {
  const counts = Object.fromEntries(Object.keys(OUTCOMES).map((key) => [key, 0]));
  for (const row of rows) counts[outcome(row)]++;
  return counts;
}

function share(part, whole) {
  return whole ? `${(100 * part / whole).toFixed(1)}%` : "–";
}

/** A count that shows its images when pressed. */
function countButton(key, count) {
  const button = element(
    "button", { type: "button", className: `count ${key}`, title: "Show these images" },
    element("b", { textContent: count }), element("span", { textContent: OUTCOMES[key] }));
  button.dataset.outcome = key;
  button.addEventListener("click", () => {
    byId("verdict").value = key;
    arrange();
    byId("gallery-title").scrollIntoView({ behavior: "smooth" });
  });
  return button;
}

function buildOutcome() {
  const host = byId("outcome");
  const cell = (key) => element("td", {}, countButton(key, 0));
  const head = (text, scope) => element("th", { scope, textContent: text });
  if (labelled) {
    host.append(
      element("table", { className: "confusion" },
        element("caption", { textContent: "Images by truth and decision" }),
        element("thead", {}, element("tr", {}, element("td", {}), head("above", "col"), head("below", "col"))),
        element("tbody", {},
          element("tr", {}, head(`defective (${defective.length})`, "row"), cell("hit"), cell("missed")),
          element("tr", {}, head(`good (${good.length})`, "row"), cell("alarm"), cell("correct")))),
      element("dl", { className: "rates" }, ...[
        ["false-alarm-rate", "False-alarm rate"], ["recall", "Recall"], ["precision", "Precision"], ["f1", "F1"],
      ].map(([id, text]) => element("div", {}, element("dt", { textContent: text }), element("dd", { id })))));
  }
  if (unknown.length) {
    host.append(element("div", { className: "plain-counts" }, countButton("flagged", 0), countButton("passed", 0)));
  }
}

function showThreshold() {
  const counts = counted();
  for (const button of document.querySelectorAll(".count")) {
    button.firstChild.textContent = counts[button.dataset.outcome];
  }
  const { hit, missed, alarm, correct, flagged } = counts;
  if (labelled) {
    byId("false-alarm-rate").textContent = share(alarm, alarm + correct);
    byId("recall").textContent = share(hit, hit + missed);
    byId("precision").textContent = share(hit, hit + alarm);
    byId("f1").textContent = share(2 * hit, 2 * hit + alarm + missed);
  }
  byId("slider").value = Math.round(scale.place(threshold) * 1000);
  byId("slider").setAttribute("aria-valuetext", `${shortNumber(threshold)} nats: `
    + (labelled ? `${alarm} false alarms, ${missed} missed` : `${flagged} above`));
  byId("reset").disabled = threshold === start;
  drawCharts();
  showOutcomes();
}

function drawCharts() {
  const groups = [["good", good], ["defective", defective], ["unknown", unknown]]
    .filter(([, scores]) => scores.length).map(([name, scores]) => ({ name, scores }));
  drawHistogram(byId("histogram"), groups, scale, threshold);
  if (roc) {
    const above = (scores) => scores.filter((score) => score > threshold).length / scores.length;
    drawCurve(byId("roc"), "ROC", roc, 1, "false-alarm rate", "recall", [above(good), above(defective)]);
  }
  if (page.pro) {
    const points = page.pro[0].map((fpr, i) => [fpr, page.pro[1][i]]);
    drawCurve(byId("pro"), "PRO curve", points, points.at(-1)[0], "false-positive rate of pixels", "PRO", null);
  }
}

function setThreshold(value, typed) {
  threshold = value;
  if (!typed) byId("threshold").value = shortNumber(value, 6);
  showThreshold();
}

// Gallery -----------------------------------------------------------------------------------------------------------

const cards = rows.map(card);
const names = new Intl.Collator(undefined, { numeric: true });
const shownRows = [];
let opened = -1;

const nearby = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      nearby.unobserve(entry.target);
      fillPanes(entry.target.querySelector(".panes"), Number(entry.target.dataset.index), false);
    }
  }
}, { rootMargin: "800px" });

function card(row, index) {
  const panes = element("span", { className: "panes" });
  panes.style.setProperty("--ratio", row.ratio);
  for (let i = 0; i < 3; i++) panes.append(element("span", { className: "pane" }));
  const tag = element("span", { className: "tag" });
  const button = element(
    "button", { type: "button", className: "card" }, panes,
    element("span", { className: "caption" },
      element("span", { className: "name", textContent: row.name, title: row.name }),
      element("span", { className: "score", textContent: row.score.toFixed(decimals) })),
    element("span", { className: "caption" }, element("span", { className: "kind", textContent: row.kind }), tag));
  button.addEventListener("click", () => enlarge(index));
  const item = element("li", {}, button);
  item.dataset.index = index;
  return { item, button, tag, outcome: "" };
}

function picture(data, className, alt) {
  return element("img", { className, alt, decoding: "async", draggable: false, src: `data:image/webp;base64,${data}` });
}

function outlines({ box, mask, region }) {
  const node = svg("svg", { class: "outlines", viewBox: box, preserveAspectRatio: "none", "aria-hidden": "true" });
  for (const [name, d] of [["region", region], ["mask", mask]]) {
    if (d) node.append(svg("path", { class: `${name} halo`, d }), svg("path", { class: name, d }));
  }
  return node;
}

/** Image, heat map and overlay of row `index` into the three panes; `named`: with names of their own. */
function fillPanes(panes, index, named) {
  const data = JSON.parse(byId(`pictures-${index}`).textContent);
  const alt = (what) => named ? `${what} of ${rows[index].name}` : "";
  panes.children[0].replaceChildren(picture(data.image, "", alt("image")));
  panes.children[1].replaceChildren(picture(data.heat, "heat", alt("heat map")), outlines(data));
  panes.children[2].replaceChildren(
    picture(data.image, "", alt("overlay")), picture(data.heat, "veil", ""), outlines(data));
}

function showOutcomes() {
  rows.forEach((row, i) => {
    const now = outcome(row), entry = cards[i];
    if (entry.outcome !== now) {
      entry.outcome = now;
      entry.tag.textContent = OUTCOMES[now];
      entry.tag.className = `tag ${now}`;
      entry.button.setAttribute("aria-label", [
        row.name, row.kind, `score ${row.score.toFixed(decimals)}`, OUTCOMES[now],
      ].filter(Boolean).join(", "));
    }
  });
  if (byId("verdict").value) arrange();
}

/** The cards that the filters let through, in the chosen order. */
function arrange() {
  const kind = byId("kind").value, verdict = byId("verdict").value, part = byId("search").value.trim().toLowerCase();
  const order = {
    high: (a, b) => rows[b].score - rows[a].score,
    low: (a, b) => rows[a].score - rows[b].score,
    name: (a, b) => names.compare(rows[a].name, rows[b].name),
  }[byId("sort").value];
  const chosen = rows.map((_, i) => i).filter((i) =>
    (!kind || rows[i].kind === kind) && (!verdict || cards[i].outcome === verdict)
    && (!part || rows[i].name.toLowerCase().includes(part))).sort(order);
  byId("shown").textContent = `${chosen.length} of ${rows.length} images`;
  if (chosen.length === shownRows.length && chosen.every((row, i) => row === shownRows[i])) return;
  shownRows.splice(0, shownRows.length, ...chosen);
  byId("gallery").replaceChildren(...chosen.map((i) => cards[i].item));
}

function enlarge(index) {
  const row = rows[index], panes = byId("enlarged-panes");
  opened = index;
  byId("enlarged-name").textContent = row.name;
  byId("enlarged-facts").textContent = [
    row.kind, `score ${shortNumber(row.score, 6)} nats`, OUTCOMES[outcome(row)],
  ].filter(Boolean).join(" · ");
  panes.style.setProperty("--ratio", row.ratio);
  panes.replaceChildren(...["", "", ""].map(() => element("span", { className: "pane" })));
  fillPanes(panes, index, true);
  const at = shownRows.indexOf(index);
  byId("previous").disabled = at <= 0;
  byId("next").disabled = at < 0 || at === shownRows.length - 1;
  if (!byId("enlarged").open) byId("enlarged").showModal();
}

function turn(by) {
  const to = shownRows[shownRows.indexOf(opened) + by];
  if (to !== undefined) enlarge(to);
}

// The rest ----------------------------------------------------------------------------------------------------------

function legendEntry(className, text) {
  return element("span", { className: "entry" }, element("i", { className }), text);
}

function shownValue(value) {
  if (value !== null && typeof value === "object") return nested(value);
  return value === null ? "–" : String(value);
}

function nested(values) {
  const list = element("dl", { className: "nested" });
  for (const [key, value] of Object.entries(values)) {
    const flat = Array.isArray(value) && value.every((v) => v === null || typeof v !== "object");
    list.append(
      element("dt", { textContent: key }), element("dd", {}, flat ? value.join(", ") : shownValue(value)));
  }
  return list;
}

/** A table of `values`: column -> metric -> value. */
function metricsTable(values) {
  const kinds = Object.keys(values);
  const metrics = [...new Set(kinds.flatMap((kind) => Object.keys(values[kind])))];
  // Rates of false pixels are small, and get more digits.
  const value = (v) => typeof v === "number" ? v.toFixed(v > 0 && v < 0.001 ? 6 : 4) : "–";
  return element("table", { className: "metrics" },
    element("thead", {}, element("tr", {}, element("td", {}),
      ...kinds.map((kind) => element("th", { scope: "col", textContent: kind })))),
    element("tbody", {}, ...metrics.map((metric) => element("tr", {},
      element("th", { scope: "row", textContent: metric }),
      ...kinds.map((kind) => element("td", { textContent: value(values[kind][metric]) }))))));
}

/** Fills the section `id` with a table of each checkpoint of `tables`: checkpoint -> column -> metric -> value. */
function showTables(id, title, tables) {
  Object.entries(tables).forEach(([checkpoint, values], number) => {
    byId(id).hidden = false;
    byId(id).append(element(
      "details", { open: number === 0 }, element("summary", { textContent: checkpoint }),
      element("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: `${title}, ${checkpoint}` },
        metricsTable(values))));
  });
}

function describe() {
  const parts = [[defective, "defective"], [good, "good"], [unknown, "not labelled"]]
    .filter(([scores]) => scores.length).map(([scores, name]) => `${scores.length} ${name}`);
  byId("summary").textContent = `${rows.length} images: ${parts.join(", ")}`;
  byId("score-legend").append(...[[good, "good"], [defective, "defective"]]
    .filter(([scores]) => scores.length).map(([, name]) => legendEntry(`swatch ${name}`, name)));
  byId("note").textContent = [
    page.threshold === null ? "No threshold is calibrated, so it starts at the median score" : "", page.note,
  ].filter(Boolean).join(": ");
  byId("reset").textContent = page.threshold === null ? "Back to the median" : "Back to the calibrated one";
  const kinds = new Map();
  for (const { kind } of rows) kinds.set(kind, (kinds.get(kind) ?? 0) + 1);
  byId("kind").parentElement.hidden = kinds.size < 2;
  byId("kind").append(...[...kinds].filter(([kind]) => kind).sort(([a], [b]) => names.compare(a, b))
    .map(([kind, count]) => element("option", { value: kind, textContent: `${kind} (${count})` })));
  byId("verdict").append(...Object.entries(OUTCOMES)
    .filter(([key]) => ["flagged", "passed"].includes(key) ? unknown.length : labelled)
    .map(([key, text]) => element("option", { value: key, textContent: text })));
  if (roc) {
    byId("roc-figure").hidden = false;
    byId("roc-caption").textContent = `ROC of the images, area ${area(roc).toFixed(4)}`;
  }
  if (page.pro) {
    byId("pro-figure").hidden = false;
    byId("pro-caption").textContent = "PRO curve of the maps";
  }
  if (Object.keys(page.metrics).length) {
    byId("metrics-figure").hidden = false;
    byId("metrics").append(metricsTable(page.metrics));
    byId("pixel-note").textContent = page.pixel_note;
  }
  showTables("kinds", "Kinds of defect", page.kinds);
  showTables("corruption", "Changed light", page.corruption);
  byId("settings").append(nested(page.settings));
  byId("versions").append(nested({ ...page.versions, "data fingerprint": page.fingerprint }));
  byId("licence").textContent = page.licence;
}

function describeHeat() {
  const hex = (colour) => `rgb(${colour.map((v) => Math.round(v * 255)).join(" ")})`;
  const bar = element("i", { className: "colour-bar" });
  bar.style.backgroundImage = `linear-gradient(to right, ${page.colours.map(hex).join(", ")})`;
  byId("heat-legend").append(element(
    "span", { className: "entry" }, shortNumber(page.scale[0]), bar, shortNumber(page.scale[1]),
    element("span", { textContent: page.caption })));
  if (page.region !== null) {
    byId("heat-legend").append(legendEntry("line region", `found: above ${shortNumber(page.region)}`));
  }
  if (rows.some((row) => row.masked)) {
    byId("heat-legend").append(legendEntry("line mask", "true defect"));
  }
  ["R", "G", "B"].forEach((channel, i) => {
    for (const table of document.querySelectorAll(`.filters feFunc${channel}`)) {
      table.setAttribute("tableValues", page.colours.map((colour) => colour[i]).join(" "));
    }
  });
}

function listen() {
  byId("slider").addEventListener("input", (event) => {
    setThreshold(Number(shortNumber(scale.score(event.target.value / 1000), 6)), false);
  });
  byId("threshold").addEventListener("input", (event) => {
    const value = event.target.valueAsNumber;
    if (Number.isFinite(value)) setThreshold(value, true);
  });
  byId("reset").addEventListener("click", () => setThreshold(start, false));
  for (const id of ["sort", "kind", "verdict"]) byId(id).addEventListener("change", arrange);
  byId("search").addEventListener("input", arrange);
  const sliders = document.querySelectorAll(".opacity");
  for (const slider of sliders) {
    slider.addEventListener("input", () => {
      for (const other of sliders) other.value = slider.value;
      document.body.style.setProperty("--heat", slider.value / 100);
    });
  }
  const dialog = byId("enlarged");
  byId("close").addEventListener("click", () => dialog.close());
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.target.type === "range") return;
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  dialog.addEventListener("close", () => cards[opened].button.focus());
  new ResizeObserver(drawCharts).observe(document.querySelector("main"));
}

describe();
describeHeat();
buildOutcome();
listen();
setThreshold(start, false);
arrange();
for (const { item } of cards) nearby.observe(item);
