"use strict";
// SVG charts, drawn at the size they are shown in, so that text and lines keep theirs.

function svg(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function shortNumber(value, digits = 4) {
  return String(Number(value.toPrecision(digits)));
}

/** Round values between low and high, about `count`. */
function linearTicks(low, high, count) {
  const least = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= least * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-9); i++) ticks.push(i * step);
  return ticks;
}

/** Round values between low and high on a logarithmic axis: the densest set of at most `count`. */
function logarithmicTicks(low, high, count) {
  for (const digits of [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5, 7], [1, 2, 5], [1]]) {
    const ticks = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
      ticks.push(...digits.map((d) => d * 10 ** e).filter((v) => v >= low && v <= high));
    }
    if (ticks.length <= count) return ticks;
  }
  return [low, high];
}

/** Scores to places in [0, 1] and back. Logarithmic where scores span a wide range; one place below the lowest. */
function scoreScale(scores) {
  let low = Infinity, high = -Infinity;
  for (const score of scores) {
    low = Math.min(low, score);
    high = Math.max(high, score);
  }
  const logarithmic = low > 0 && high / low > 4;
  const to = logarithmic ? Math.log : (v) => v;
  const from = logarithmic ? Math.exp : (v) => v;
  const margin = (to(high) - to(low)) * 0.02 || Math.max(Math.abs(to(high)) * 0.02, 1e-6);
  const first = to(low) - margin, span = to(high) + margin - first;
  return {
    place: (score) => logarithmic && score <= 0 ? 0 : Math.min(1, Math.max(0, (to(score) - first) / span)),
    score: (place) => from(first + place * span),
    ticks: (count) => (logarithmic ? logarithmicTicks : linearTicks)(from(first), from(first + span), count),
  };
}

/** A frame with axes -> {node, x, y}; x and y take places in [0, 1]. */
function frame(width, height, margin, name, xTicks, yTicks, xLabel, yLabel) {
  const x = (place) => margin.left + place * (width - margin.left - margin.right);
  const y = (place) => height - margin.bottom - place * (height - margin.top - margin.bottom);
  const node = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": name });
  for (const [place, text] of yTicks) {
    node.append(
      svg("line", { class: "grid", x1: x(0), x2: x(1), y1: y(place), y2: y(place) }),
      svg("text", { class: "tick", x: x(0) - 6, y: y(place) + 4, "text-anchor": "end" }, text));
  }
  for (const [place, text] of xTicks) {
    node.append(svg("text", { class: "tick", x: x(place), y: y(0) + 16, "text-anchor": "middle" }, text));
  }
  node.append(
    svg("line", { class: "axis", x1: x(0), x2: x(1), y1: y(0), y2: y(0) }),
    svg("text", { class: "axis-label", x: x(0.5), y: height - 4, "text-anchor": "middle" }, xLabel),
    svg("text", { class: "axis-label", x: 0, y: 11 }, yLabel));
  return { node, x, y };
}

/** Histogram of `groups` [{name, scores}] over each other, with the threshold. */
function drawHistogram(host, groups, scale, threshold) {
  const bins = 48, width = Math.max(host.clientWidth, 200), height = 220;
  const counts = groups.map(({ scores }) => {
    const heights = new Array(bins).fill(0);
    for (const score of scores) heights[Math.min(bins - 1, Math.floor(scale.place(score) * bins))]++;
    return heights;
  });
  const most = Math.max(...counts.flat());
  const { node, x, y } = frame(
    width, height, { left: 36, right: 12, top: 22, bottom: 38 }, "Histogram of the scores",
    scale.ticks(width < 500 ? 6 : 10).map((v) => [scale.place(v), shortNumber(v)]),
    linearTicks(0, most, 4).filter(Number.isInteger).map((v) => [v / most, String(v)]), "score, nats", "images");
  const at = x(scale.place(threshold));
  node.append(svg("rect", { class: "flagged-side", x: at, width: x(1) - at, y: y(1), height: y(0) - y(1) }));
  counts.forEach((heights, g) => heights.forEach((count, bin) => {
    if (count) {
      node.append(svg("rect", {
        class: `bar ${groups[g].name}`, x: x(bin / bins) + 0.5, width: x(1 / bins) - x(0) - 1,
        y: y(count / most), height: y(0) - y(count / most),
      }));
    }
  }));
  node.append(svg("line", { class: "threshold", x1: at, x2: at, y1: y(1), y2: y(0) + 5 }));
  host.replaceChildren(node);
}

/** A curve through `points` [[x, y], ...], x up to `limit`, y up to 1; `marker`: [x, y] or null. */
function drawCurve(host, name, points, limit, xLabel, yLabel, marker) {
  const width = Math.min(Math.max(host.clientWidth, 200), 420), height = 250;
  const { node, x, y } = frame(
    width, height, { left: 36, right: 12, top: 22, bottom: 38 }, name,
    linearTicks(0, limit, 5).map((v) => [v / limit, shortNumber(v)]),
    linearTicks(0, 1, 5).map((v) => [v, shortNumber(v)]), xLabel, yLabel);
  const path = points.map(([a, b]) => `${x(a / limit).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
  node.append(
    svg("polygon", { class: "area", points: `${x(0)},${y(0)} ${path} ${x(1)},${y(0)}` }),
    svg("polyline", { class: "curve", points: path }));
  if (marker) node.append(svg("circle", { class: "marker", cx: x(marker[0] / limit), cy: y(marker[1]), r: 5.5 }));
  host.replaceChildren(node);
}

/** Trapezoids under [[x, y], ...], x ascending. */
function area(points) {
  let sum = 0;
  for (let i = 1; i < points.length; i++) {
    sum += (points[i][0] - points[i - 1][0]) * (points[i][1] + points[i - 1][1]) / 2;
  }
  return sum;
}

/** Corners of the ROC: [false-positive rate, true-positive rate], one for each distinct score. */
function rocPoints(good, defective) {
  const all = [...good.map((s) => [s, 0]), ...defective.map((s) => [s, 1])].sort((a, b) => b[0] - a[0]);
  const points = [[0, 0]], passed = [0, 0];
  all.forEach(([score, label], i) => {
    passed[label]++;
    if (i + 1 === all.length || all[i + 1][0] !== score) {
      points.push([passed[0] / good.length, passed[1] / defective.length]);
    }
  });
  return points;
}
