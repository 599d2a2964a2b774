// Draws the report from the JSON in the page. All text from outside enters as text nodes, never as markup.
"use strict";

(() => {
  const { report, colours, rule } = JSON.parse(document.getElementById("data").textContent);
  const LIGHTS = {
    ready: ["ready", "✓ ready"],
    "more images": ["more", "▲ needs more good images"],
    no: ["no", "✕ no"],
    untested: ["untested", "? not tested"],
  };
  const redraws = []; // functions that draw the charts anew, after the page has got another width

  // ---- elements -----------------------------------------------------------------------------------------------------

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
    }
    for (const child of children.flat()) {
      if (child !== null && child !== undefined) element.append(child);
    }
    return element;
  }

  const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  /** A box that holds what `draw(width)` gives, in pixels of its own width, and is redrawn when that changes. */
  function chart(draw) {
    const box = el("div", { class: "chart" });
    let drawn = 0;
    const redraw = () => {
      const width = Math.max(260, Math.floor(box.clientWidth));
      if (box.clientWidth && width !== drawn) {
        drawn = width;
        box.replaceChildren(draw(width));
      }
    };
    box.redraw = () => {
      drawn = 0;
      redraw();
    };
    redraws.push(redraw);
    return box;
  }

  function picture(width, height, label, ...children) {
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...children);
  }

  // ---- numbers ------------------------------------------------------------------------------------------------------

  const known = (value) => value !== null && value !== undefined;
  const fixed = (value, digits) => (known(value) ? value.toFixed(digits) : "–");
  const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  const short = (value) => (typeof value === "number" ? String(Number(value.toPrecision(3))) : String(value));
  const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
  const percent = (share) => `${Number((100 * share).toFixed(1))} %`;
  const times = (score, threshold) =>
    threshold > 0 ? `${(score / threshold).toFixed(2)} × threshold` : `score ${short(score)}`;

  function duration(seconds) {
    if (!known(seconds)) return "–";
    if (seconds < 90) return `${Math.round(seconds)} s`;
    return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
  }

  /** A scale from [low, high] to [from, to], straight or logarithmic, and back. */
  function scale(low, high, from, to, isLog = false) {
    const [way, back] = isLog ? [Math.log, Math.exp] : [(x) => x, (x) => x];
    const [start, end] = [way(low), way(high)];
    const spread = end - start || 1;
    const place = (value) => from + ((way(value) - start) / spread) * (to - from);
    place.invert = (position) => back(start + ((position - from) / (to - from)) * spread);
    return place;
  }

  function ticks(low, high, count) {
    const step = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(step));
    const size = [1, 2, 5, 10].find((factor) => factor * power >= step) * power;
    const found = [];
    for (let at = Math.ceil(low / size); at * size <= high + size / 1e6; at += 1) found.push(at * size);
    return found;
  }

  // ---- what a threshold does: as dskd.evaluate.Evaluation counts, a score above it is anomalous ---------------------

  function confusion(images, threshold) {
    const good = images.filter((image) => !image.is_defective);
    const defects = images.filter((image) => image.is_defective);
    return {
      good: good.length,
      flagged: good.filter((image) => image.score > threshold).length,
      defects: defects.length,
      missed: defects.filter((image) => !(image.score > threshold)).length,
    };
  }

  function recall(images, threshold) {
    const kinds = new Map();
    for (const image of images.filter((each) => each.is_defective)) {
      const [found, count] = kinds.get(image.defect) ?? [0, 0];
      kinds.set(image.defect, [found + (image.score > threshold), count + 1]);
    }
    return [...kinds].sort(([one], [other]) => (one < other ? -1 : 1));
  }

  function describe(counts) {
    const { missed, defects, flagged, good } = counts;
    return `misses ${missed} of ${defects} defects, flags ${flagged} of ${good} good images`;
  }

  // ---- the top ------------------------------------------------------------------------------------------------------

  function light(category) {
    const [name, text] = LIGHTS[category.light];
    return el("span", { class: `light ${name}` }, text);
  }

  function top() {
    const trials = report.categories.reduce((sum, category) => sum + category.trials.length, 0);
    const line = `${report.written.slice(0, 16).replace("T", " ")} UTC · data ${report.data} · ` +
      `${report.categories.length} categories, ${trials} trials of ${duration(report.trial_seconds)} together · ` +
      `this command took ${duration(report.seconds)}`;
    return [
      el("h1", {}, `Search ${report.name}`),
      el("p", { class: "soft" }, line),
      report.caveats.length
        ? el("div", { class: "caveats" }, el("strong", {}, "Before you rely on it"),
            el("ul", {}, report.caveats.map((text) => el("li", {}, text))))
        : null,
      el("ul", { class: "cards" }, report.categories.map((category, index) =>
        el("li", {},
          el("div", {}, el("a", { href: `#category-${index}` }, category.name), " ", light(category)),
          el("p", {}, category.sentence),
          el("p", { class: "soft" }, category.reason)))),
      el("details", {}, el("summary", {}, "When is a category ready?"), el("p", { class: "soft" }, rule)),
    ];
  }

  // ---- the table ----------------------------------------------------------------------------------------------------

  const share = (part, whole) => (known(part) && known(whole) ? `${part} of ${whole}` : "–");
  const COLUMNS = [
    ["category", (c) => c.name, (c) => c.name],
    ["validation", (c) => c.figures["val/objective"], (c) => fixed(c.figures["val/objective"], 4)],
    ["gain over the preset", (c) => c.figures["gain/objective"], (c) =>
      known(c.figures["gain/objective"])
        ? `${signed(c.figures["gain/objective"], 4)} ± ${fixed(c.figures["gain/error"], 4)}`
        : "–"],
    ["image AUROC", (c) => c.figures["test/image_auroc"], (c) => fixed(c.figures["test/image_auroc"], 4)],
    ["pixel AUROC", (c) => c.figures["test/pixel_auroc"], (c) => fixed(c.figures["test/pixel_auroc"], 4)],
    ["AUPRO", (c) => c.figures["test/aupro"], (c) => fixed(c.figures["test/aupro"], 4)],
    ["missed", (c) => c.figures["test/num_missed"], (c) =>
      share(c.figures["test/num_missed"], c.figures["test/num_defective"])],
    ["false alarms", (c) => c.figures["test/num_false_alarms"], (c) =>
      share(c.figures["test/num_false_alarms"], c.figures["test/num_good"])],
    ["false alarms at most", (c) => c.limit?.false_alarm_rate, (c) =>
      c.limit ? `${percent(c.limit.false_alarm_rate)}${c.limit.is_proven ? "" : " (expected)"}` : "–"],
    ["differs from the preset", (c) => c.changes, (c) => c.changes || "–"],
    ["time", (c) => c.seconds, (c) => duration(c.seconds)],
  ];
  const WORDS = new Set(["category", "differs from the preset"]);

  function table() {
    const body = el("tbody");
    let order = { column: 0, isRising: true };
    const heads = COLUMNS.map(([name], column) =>
      el("th", { scope: "col", class: WORDS.has(name) ? "" : "number", "aria-sort": "none" },
        el("button", { type: "button", onclick: () => sortBy(column) }, name)));

    function sortBy(column) {
      order = { column, isRising: order.column === column ? !order.isRising : WORDS.has(COLUMNS[column][0]) };
      show();
    }

    function show() {
      const value = COLUMNS[order.column][1];
      const sorted = [...report.categories].sort((one, other) => {
        const [a, b] = [value(one), value(other)];
        if (!known(a) || !known(b)) return known(b) - known(a); // what is unknown comes last, whatever the order
        return (a < b ? -1 : a > b ? 1 : 0) * (order.isRising ? 1 : -1);
      });
      heads.forEach((head, column) => {
        const direction = order.isRising ? "ascending" : "descending";
        head.setAttribute("aria-sort", column === order.column ? direction : "none");
      });
      body.replaceChildren(...sorted.map((category) =>
        el("tr", {}, COLUMNS.map(([name, , text]) =>
          el("td", { class: name === "category" ? "" : WORDS.has(name) ? "long" : "number", "data-label": name },
            name === "category"
              ? el("a", { href: `#category-${report.categories.indexOf(category)}` }, text(category))
              : el("span", {}, text(category)))))));
    }

    show();
    return [
      el("h2", { id: "table" }, "All categories"),
      el("p", { class: "soft" }, `Validation: ${report.objective}. Gain: on the folds that did not choose. ` +
        "AUROC, AUPRO and counts: on the labelled test images, looked at once."),
      el("div", { class: "scroll" }, el("table", { class: "blocks" }, el("thead", {}, el("tr", {}, heads)), body)),
    ];
  }

  // ---- one category -------------------------------------------------------------------------------------------------

  function section(category, index) {
    const parts = [
      el("h2", { id: `category-${index}` }, category.name, " ", light(category)),
      el("p", {}, category.sentence),
      el("p", { class: "soft" }, category.reason),
      category.decision ? el("p", { class: "soft" }, `Chosen: ${category.decision}. ${category.changes}.`) : null,
    ];
    const inspected = category.inspected;
    if (!category.error && !inspected) {
      parts.push(el("p", {}, "An earlier version evaluated this champion and kept no scores of single images; " +
        "a search under a new name keeps them."));
    }
    if (inspected) {
      if (inspected.test.length) parts.push(...explorer(category, inspected));
      parts.push(...galleries(category, inspected));
    }
    return el("section", { "aria-labelledby": `category-${index}` }, parts);
  }

  function explorer(category, inspected) {
    const images = inspected.test;
    const stored = inspected.threshold;
    const shown = [...images, ...inspected.validation].map((image) => image.score);
    const scores = [...shown, ...category.normal_scores, stored];
    const [least, most] = [Math.min(...scores), Math.max(...scores)];
    const isLog = least > 0 && most / least > 20;
    const margin = (most - least || 1) * 0.02;
    const [low, high] = isLog ? [least / 1.05, most * 1.05] : [least - margin, most + margin];
    const steps = scale(low, high, 0, 1000, isLog);
    let threshold = stored;

    const counts = el("output", { class: "counts", "aria-live": "polite" });
    const held = el("p", { class: "soft" });
    const kinds = el("tbody");
    const slider = el("input", {
      type: "range", min: 0, max: 1000, step: 1, "aria-label": `Threshold of ${category.name}`,
      oninput: () => set(steps.invert(Number(slider.value))),
    });
    const strip = chart((width) => drawStrip(width, category, inspected, low, high, isLog, threshold));
    const roc = chart((width) => drawRoc(width, images, threshold));
    const pro = inspected.pro.length ? chart((width) => drawPro(width, inspected.pro, threshold)) : null;

    function set(value) {
      threshold = value;
      const found = confusion(images, threshold);
      counts.dataset.threshold = String(threshold);
      counts.dataset.missed = String(found.missed);
      counts.dataset.flagged = String(found.flagged);
      const unit = stored > 0 ? ` (${(threshold / stored).toFixed(2)} × the stored one)` : "";
      counts.textContent = `At ${Number(threshold.toPrecision(4))}${unit}: ${describe(found)}.`;
      slider.setAttribute("aria-valuetext", counts.textContent);
      const normals = category.normal_scores;
      const above = normals.filter((score) => score > threshold).length;
      held.textContent = normals.length
        ? `Of the ${normals.length} held-out good images that the threshold rests on, ${above} lie above it.`
        : "";
      kinds.replaceChildren(...recall(images, threshold).map(([kind, [hits, count]]) =>
        el("tr", {}, el("td", {}, kind), el("td", { class: "number" }, `${hits} of ${count}`),
          el("td", { style: "width:50%" }, el("span", { class: "bar", style: `width:${(100 * hits) / count}%` })))));
      [strip, roc, pro].forEach((each) => each?.redraw());
    }

    slider.value = String(Math.round(steps(stored)));
    set(stored);
    return [
      el("h3", {}, "Scores of the images, by kind of defect"),
      strip,
      el("div", { class: "slider" }, el("span", {}, "Threshold"), slider,
        el("button", { class: "plain", type: "button", onclick: () => {
          slider.value = String(Math.round(steps(stored)));
          set(stored);
        } }, "Back to the stored one")),
      counts,
      held,
      el("p", { class: "soft" }, "Moving it shows what would have been; a threshold chosen by these test images is " +
        "no longer tested by them."),
      el("div", { class: "pair" },
        el("div", {}, el("h3", {}, "Found, by kind of defect"), el("table", {}, kinds)),
        el("div", {}, el("h3", {}, "ROC of the images"), roc),
        pro ? el("div", {}, el("h3", {}, "PRO of the defect regions"), pro) : null),
    ];
  }

  function drawStrip(width, category, inspected, low, high, isLog, threshold) {
    const stored = inspected.threshold;
    const rows = new Map([["good", { label: "good", items: [] }]]);
    for (const image of inspected.test) {
      const key = image.is_defective ? `defect ${image.defect}` : "good";
      if (!rows.has(key)) rows.set(key, { label: image.defect, isBad: true, items: [] });
      rows.get(key).items.push(image);
    }
    if (category.normal_scores.length) {
      rows.set("held out", { label: "good, held out",
        items: category.normal_scores.map((score) => ({ score, file: "held-out good image" })) });
    }
    const synthetic = inspected.validation.filter((image) => image.is_defective);
    if (synthetic.length) rows.set("synthetic", { label: "drawn defects", isBad: true, items: synthetic });

    const left = width < 560 ? 8 : 140;
    const [right, radius] = [width - 12, 4];
    const at = scale(low, high, left, right, isLog);
    const parts = [];
    let y = 8;
    for (const row of rows.values()) {
      if (left === 8) {
        parts.push(svg("text", { x: left, y: y + 12 }, row.label));
        y += 16;
      }
      // Points of nearly the same place are piled up, around the middle of the row.
      const piles = new Map();
      const placed = row.items.map((item) => {
        const bin = Math.round(at(item.score) / (2 * radius));
        const level = piles.get(bin) ?? 0;
        piles.set(bin, level + 1);
        return [item, level];
      });
      const deepest = Math.min(Math.max(1, ...piles.values()), 9);
      const height = Math.max(24, deepest * radius * 1.6 + 12);
      const middle = y + height / 2;
      parts.push(svg("line", { class: "axis", x1: left, x2: right, y1: middle, y2: middle }));
      if (left !== 8) parts.push(svg("text", { x: left - 10, y: middle + 4, "text-anchor": "end" }, cut(row.label, 20),
        svg("title", {}, row.label)));
      for (const [item, level] of placed) {
        const lift = Math.ceil((level % 9) / 2) * radius * 1.6 * (level % 2 ? -1 : 1);
        parts.push(svg("circle", { class: row.isBad ? "bad" : "good", cx: at(item.score).toFixed(1),
          cy: (middle + lift).toFixed(1), r: radius - 1, "fill-opacity": 0.75 },
        svg("title", {}, `${item.file}: ${times(item.score, stored)}`)));
      }
      y += height;
    }
    let last = -Infinity;
    const multiples = isLog ? [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100] : ticks(low / stored, high / stored, 6);
    for (const multiple of stored > 0 ? multiples : []) {
      const x = at(multiple * stored);
      if (multiple * stored >= low && x >= left + 14 && x <= right - 14 && x > last + 40) {
        last = x;
        parts.push(svg("text", { class: "soft", x, y: y + 16, "text-anchor": "middle" }, `${short(multiple)} ×`));
      }
    }
    parts.push(svg("line", { class: "stored", x1: at(stored), x2: at(stored), y1: 0, y2: y }));
    parts.push(svg("line", { class: "threshold", x1: at(threshold), x2: at(threshold), y1: 0, y2: y }));
    return picture(width, y + 22, `Scores of ${category.name} in multiples of the threshold`, ...parts);
  }

  function frame(width, height, limit, xLabel, yLabel) {
    const [left, bottom] = [44, height - 36];
    const x = scale(0, limit, left, width - 12);
    const y = scale(0, 1, bottom, 10);
    const parts = [svg("rect", { class: "axis", x: left, y: 10, width: width - 12 - left, height: bottom - 10 })];
    for (const tick of ticks(0, limit, 4)) {
      parts.push(svg("text", { class: "soft", x: x(tick), y: bottom + 15, "text-anchor": "middle" }, short(tick)));
    }
    for (const tick of [0, 0.5, 1]) {
      parts.push(svg("text", { class: "soft", x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    parts.push(svg("text", { class: "soft", x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, xLabel));
    parts.push(svg("text", { class: "soft", x: 12, y: (10 + bottom) / 2, "text-anchor": "middle",
      transform: `rotate(-90 12 ${(10 + bottom) / 2})` }, yLabel));
    return { x, y, parts };
  }

  const path = (points) => `M${points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;

  function drawRoc(width, images, threshold) {
    const height = Math.min(260, width);
    const { x, y, parts } = frame(width, height, 1, "good images flagged", "defects found");
    const points = [[0, 0]];
    const limits = [...new Set(images.map((image) => image.score))].sort((one, other) => other - one);
    for (const limit of [...limits, -Infinity]) {
      const found = confusion(images, limit);
      points.push([found.flagged / found.good, 1 - found.missed / found.defects]);
    }
    const here = confusion(images, threshold);
    const point = [here.flagged / here.good, 1 - here.missed / here.defects];
    parts.push(svg("path", { class: "curve", d: path(points.map(([fpr, hits]) => [x(fpr), y(hits)])) }));
    parts.push(svg("circle", { class: "bad", cx: x(point[0]), cy: y(point[1]), r: 6 },
      svg("title", {}, `flags ${percent(point[0])}, finds ${percent(point[1])}`)));
    return picture(width, height, `ROC: at the threshold ${percent(point[0])} flagged, ${percent(point[1])} found`,
      ...parts);
  }

  function drawPro(width, points, threshold) {
    const height = Math.min(260, width);
    const limit = 0.3;
    const { x, y, parts } = frame(width, height, limit, "normal pixels above the threshold", "mean share found");
    const inside = points.filter(([, fpr]) => fpr <= limit);
    const curve = [[0, 0], ...inside.map(([, fpr, pro]) => [fpr, pro])];
    parts.push(svg("path", { class: "curve", d: path(curve.map(([fpr, pro]) => [x(fpr), y(pro)])) }));
    const [, fpr, pro] = points.reduce((best, each) =>
      Math.abs(each[0] - threshold) < Math.abs(best[0] - threshold) ? each : best);
    parts.push(svg("circle", { class: "bad", cx: x(Math.min(fpr, limit)), cy: y(pro), r: 6 },
      svg("title", {}, `${percent(fpr)} of the normal pixels, ${percent(pro)} of a defect`)));
    return picture(width, height, `PRO: at the threshold ${percent(pro)} of a defect is found`, ...parts);
  }

  function galleries(category, inspected) {
    const threshold = inspected.threshold;
    const missed = inspected.weakest_defects.filter((each) => !(each.score > threshold));
    const flagged = inspected.strongest_good.filter((each) => each.score > threshold);
    const groups = [
      missed.length
        ? ["Worst misses", missed]
        : ["Nothing missed; the weakest finds", inspected.weakest_defects],
      flagged.length
        ? ["Worst false alarms", flagged]
        : ["No false alarm; the good images that come closest", inspected.strongest_good],
      ["Good images that look least like the others", inspected.suspects,
        "Training images, each scored by a detector that did not see it. Look for bad ones among them: --exclude " +
        "leaves them out. The maps are the champion's own, which has seen most of them."],
    ];
    const shown = groups.filter(([, pictures]) => pictures.length);
    return shown.length
      ? [scaleBar(), ...shown.flatMap(([title, pictures, note]) => [
          el("h3", {}, title),
          note ? el("p", { class: "soft" }, note) : null,
          el("div", { class: "gallery" }, pictures.map((each) => panel(each, threshold))),
        ])]
      : [];
  }

  function panel(each, threshold) {
    const isAbove = each.score > threshold;
    const isMistake = isAbove !== each.is_defective;
    const word = isMistake ? (isAbove ? "FALSE ALARM" : "MISS") : isAbove ? "found" : "good";
    const text = times(each.score, threshold);
    return el("figure", {},
      el("img", { src: `data:image/webp;base64,${each.webp}`, width: each.width, height: each.height, loading: "lazy",
        alt: `${each.file}, ${word}, ${text}: the image, and the image below its anomaly map` }),
      el("figcaption", {}, el("span", { class: `word ${isMistake ? "mistake" : ""}` }, word), " ",
        el("span", { class: "whole" }, text),
        el("br"), el("span", { class: "soft" }, each.file)));
  }

  /** The colours of all panels, which are the same in every picture. */
  function scaleBar() {
    const [left, width] = [4, 220];
    const last = colours[colours.length - 1][0];
    const id = `colours-${Math.random().toString(36).slice(2)}`;
    const marks = [1, 2, 3].map((multiple) => {
      const x = left + (multiple / last) * width;
      return svg("text", { class: "soft", x, y: 28, "text-anchor": multiple === 3 ? "end" : "middle" },
        multiple === 1 ? "threshold" : `${multiple} ×`);
    });
    return el("div", { class: "soft" },
      svg("svg", { width: left + width + 4, height: 34, role: "img", "aria-label": "Colours of the anomaly maps" },
        svg("defs", {}, svg("linearGradient", { id }, colours.map(([multiple, colour]) =>
          svg("stop", { offset: multiple / last, "stop-color": colour })))),
        svg("rect", { x: left, y: 4, width, height: 10, fill: `url(#${id})` }), marks),
      el("p", {}, "Pictures: the image, and the image below its map. Orange: decided; blue: the labelled defect. " +
        "What few good images reach is not coloured."));
  }

  // ---- the search ---------------------------------------------------------------------------------------------------

  function search() {
    const parts = [el("h2", { id: "search" }, "The search"),
      el("p", { class: "soft" }, "Filled: finished trials; hollow: pruned early, with the value that they had then; " +
        "dashed line: the best untuned preset; stepped line: best so far.")];
    const charts = report.categories.filter((category) => category.trials.length).map((category) =>
      el("div", {}, el("h3", {}, category.name), chart((width) => drawHistory(width, category)), importance(category)));
    parts.push(el("div", { class: "pair" }, charts), ...parallel());
    parts.push(...report.categories.filter((category) => category.trials.length).map(trialTable));
    return parts;
  }

  const untuned = (category) => {
    const found = category.trials.filter((trial) => trial.is_untuned && trial.state === "finished");
    return found.length ? Math.max(...found.map((trial) => trial.objective)) : null;
  };

  function drawHistory(width, category) {
    const height = 200;
    const trials = category.trials.filter((trial) => known(trial.objective));
    const values = trials.map((trial) => trial.objective);
    const preset = untuned(category);
    if (!values.length) {
      return picture(width, 30, "No trial has a value yet", svg("text", { x: 0, y: 20 }, "No trial has a value yet."));
    }
    const [least, most] = [Math.min(...values), Math.max(...values)];
    const margin = (most - least || 0.02) * 0.1;
    const last = Math.max(1, ...category.trials.map((trial) => trial.number));
    const x = scale(0, last, 56, width - 14);
    const y = scale(least - margin, most + margin, height - 34, 10);
    const parts = ticks(least - margin, most + margin, 3).flatMap((tick) => [
      svg("line", { class: "axis", x1: 48, x2: width - 8, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "soft", x: 44, y: y(tick) + 4, "text-anchor": "end" }, short(tick))]);
    const numbers = ticks(0, last, Math.min(last, 6)).filter((tick) => Number.isInteger(tick));
    parts.push(...numbers.map((tick) =>
      svg("text", { class: "soft", x: x(tick), y: height - 18, "text-anchor": "middle" }, short(tick + 1))));
    parts.push(svg("text", { class: "soft", x: width / 2, y: height - 3, "text-anchor": "middle" }, "trial"));
    if (known(preset)) {
      parts.push(svg("line", { class: "preset", x1: 48, x2: width - 8, y1: y(preset), y2: y(preset) },
        svg("title", {}, `untuned preset: ${fixed(preset, 4)}`)));
    }
    let best = -Infinity;
    const steps = [];
    for (const trial of category.trials.filter((each) => each.state === "finished")) {
      if (steps.length) steps.push([x(trial.number), y(best)]);
      best = Math.max(best, trial.objective);
      steps.push([x(trial.number), y(best)]);
    }
    if (steps.length) parts.push(svg("path", { class: "curve", d: path([...steps, [x(last), y(best)]]) }));
    for (const trial of trials) {
      parts.push(svg("circle", { class: trial.state === "finished" ? "good" : "hollow", cx: x(trial.number),
        cy: y(trial.objective), r: 4.5 },
      svg("title", {}, `trial ${trial.number + 1}, ${trial.state}: ${fixed(trial.objective, 4)}`)));
    }
    return picture(width, height, `Best so far of ${category.name}: ${fixed(best, 4)}`, ...parts);
  }

  function importance(category) {
    const shares = Object.entries(category.importance);
    if (!shares.length) {
      return el("p", { class: "soft" }, `Importance: ${category.importance_note || "too few trials to tell"}.`);
    }
    return el("table", {}, el("caption", { class: "soft" }, "Importance of the parameters"), el("tbody", {},
      shares.slice(0, 6).map(([name, part]) => el("tr", {},
        el("td", {}, name),
        el("td", { class: "number" }, percent(part)),
        el("td", { style: "width:40%" }, el("span", { class: "bar even", style: `width:${100 * part}%` }))))));
  }

  function trialTable(category) {
    const names = [...new Set(category.trials.flatMap((trial) => Object.keys(trial.params)))].filter((name) =>
      new Set(category.trials.map((trial) => JSON.stringify(trial.params[name]))).size > 1);
    return el("details", {}, el("summary", {}, `${category.name}: trials as a table`), el("div", { class: "scroll" },
      el("table", {}, el("thead", {}, el("tr", {}, ["trial", "state", "objective", "time", ...names].map((name) =>
        el("th", { scope: "col" }, name)))),
      el("tbody", {}, category.trials.map((trial) => el("tr", {},
        [trial.number + 1, trial.state + (trial.is_untuned ? ", untuned" : ""), fixed(trial.objective, 4),
          duration(trial.seconds), ...names.map((name) => (known(trial.params[name]) ? short(trial.params[name]) : ""))]
          .map((text) => el("td", {}, String(text)))))))));
  }

  /** The trials of all categories, each with its values and what it gained over its category's preset. */
  function comparedTrials() {
    const lines = report.categories.flatMap((category) => {
      const base = untuned(category);
      return category.trials.filter((trial) => known(trial.objective)).map((trial) => ({
        trial,
        category: category.name,
        base,
        values: { category: category.name, ...trial.params },
      }));
    });
    const isGain = lines.every((line) => known(line.base)); // objectives of two categories cannot be compared
    const outcome = isGain ? "gain over the preset" : "objective";
    for (const line of lines) line.values[outcome] = line.trial.objective - (isGain ? line.base : 0);
    return { lines, outcome };
  }

  /** The axes of what varied: category first, outcome last; each places a value between `lower` and `upper`. */
  function axesOf(lines, outcome, gap, upper, lower) {
    const varied = [...new Set(lines.flatMap((line) => Object.keys(line.values)))].filter((name) =>
      new Set(lines.map((line) => line.values[name])).size > 1);
    const ends = ["category", outcome];
    const between = varied.filter((name) => !ends.includes(name)).sort();
    const [first, last] = ends.map((end) => varied.filter((name) => name === end));
    const order = [...first, ...between, ...last];
    return order.map((name, index) => {
      const values = lines.map((line) => line.values[name]).filter(known);
      const x = 60 + index * gap;
      if (values.every((value) => typeof value === "number")) {
        const [low, high] = [Math.min(...values), Math.max(...values)];
        const y = scale(low, high, lower, upper, low > 0 && high / low > 30);
        return { name, x, y, marks: [[short(high), upper], [short(low), lower]] };
      }
      const kinds = [...new Set(values.map(String))].sort();
      const y = scale(0, Math.max(1, kinds.length - 1), lower, upper);
      const marks = kinds.map((kind, at) => [kind, y(at)]).slice(0, 12);
      return { name, x, y: (value) => y(kinds.indexOf(String(value))), marks };
    });
  }

  /** Parallel coordinates over all categories; each axis can be brushed by pointer or keys. */
  function parallel() {
    const { lines, outcome } = comparedTrials();
    if (lines.length < 2) return [];
    const [gap, upper, lower] = [104, 104, 360];
    const height = lower + 30;
    const axes = axesOf(lines, outcome, gap, upper, lower);
    const width = axes.length * gap + 120;
    const gains = lines.map((line) => line.values[outcome]);
    const strengthOf = scale(Math.min(...gains), Math.max(...gains), 0, 1);
    const brushes = new Map(); // by axis: its upper and lower end
    const said = el("p", { "aria-live": "polite" });
    const box = el("div", { class: "scroll" });

    function isIn(line) {
      return axes.every((axis) => {
        const brush = brushes.get(axis.name);
        const value = line.values[axis.name];
        return !brush || (known(value) && axis.y(value) >= brush[0] - 1e-6 && axis.y(value) <= brush[1] + 1e-6);
      });
    }

    function drawLine(line) {
      const { trial, values } = line;
      const points = axes.filter((axis) => known(values[axis.name])).map((axis) => [axis.x, axis.y(values[axis.name])]);
      const strength = strengthOf(values[outcome]);
      const colour = `color-mix(in oklab, var(--good) ${Math.round(100 * strength)}%, var(--rule))`;
      const kind = `trial ${trial.state === "finished" ? "" : "pruned"} ${isIn(line) ? "" : "out"}`;
      return svg("path", { class: kind, d: path(points), style: `stroke:${colour};stroke-width:${1 + 1.5 * strength}` },
        svg("title", {}, `${line.category}, trial ${trial.number + 1}, ${trial.state}: ${signed(values[outcome], 4)}`));
    }

    function drawAxis(axis) {
      const brush = brushes.get(axis.name);
      const [x, y] = [axis.x - 6, upper - 22];
      return svg("g", { tabindex: 0, role: "group", "data-axis": axis.name,
        "aria-label": `${axis.name}: arrow keys move a range, Escape clears it`,
        onkeydown: (event) => byKey(event, axis) },
      svg("line", { class: "axis", x1: axis.x, x2: axis.x, y1: upper, y2: lower, style: "stroke:var(--soft)" }),
      brush
        ? svg("rect", { class: "brush", x: axis.x - 9, y: brush[0], width: 18, height: brush[1] - brush[0] })
        : null,
      svg("text", { x, y, transform: `rotate(-24 ${x} ${y})` }, cut(axis.name, 26), svg("title", {}, axis.name)),
      axis.marks.map(([text, at]) => svg("text", { class: "soft", x: axis.x + 6,
        y: at + (at === upper ? -5 : at === lower ? 14 : 4) }, cut(text, 14))),
      svg("rect", { class: "hit", x: axis.x - 16, y: upper - 8, width: 32, height: lower - upper + 16,
        onpointerdown: (event) => byPointer(event, axis) }));
    }

    function draw(focused) {
      const rising = [...lines].sort((one, other) => one.values[outcome] - other.values[outcome]);
      const drawing = picture(width, height, "Parameters and outcome of all trials", ...rising.map(drawLine),
        ...axes.map(drawAxis));
      drawing.removeAttribute("role"); // it holds controls
      drawing.setAttribute("style", `display:block;width:${width}px`);
      box.replaceChildren(drawing);
      const chosen = rising.filter(isIn);
      const best = chosen[chosen.length - 1];
      const which = best
        ? `; best: ${best.category}, trial ${best.trial.number + 1}, ${outcome} ${signed(best.values[outcome], 4)}`
        : "";
      said.textContent = `${chosen.length} of ${lines.length} trials in the chosen ranges${which}.`;
      if (focused) box.querySelector(`[data-axis="${CSS.escape(focused)}"]`)?.focus();
    }

    function byPointer(event, axis) {
      const drawing = box.querySelector("svg");
      const area = drawing.getBoundingClientRect();
      const at = (each) => Math.min(lower, Math.max(upper, ((each.clientY - area.top) / area.height) * height));
      const start = at(event);
      brushes.delete(axis.name);
      const move = (each) => {
        const end = at(each);
        if (Math.abs(end - start) > 3) brushes.set(axis.name, [Math.min(start, end), Math.max(start, end)]);
        draw();
      };
      const done = () => {
        window.removeEventListener("pointermove", move);
        window.removeEventListener("pointerup", done);
      };
      window.addEventListener("pointermove", move);
      window.addEventListener("pointerup", done);
      event.preventDefault();
      draw();
    }

    function byKey(event, axis) {
      const steps = { ArrowUp: -20, ArrowDown: 20 };
      if (event.key === "Escape") brushes.delete(axis.name);
      else if (event.key in steps) {
        const size = (lower - upper) / 4;
        const [from] = brushes.get(axis.name) ?? [event.key === "ArrowUp" ? lower - size + 20 : upper - 20];
        const start = Math.min(lower - size, Math.max(upper, from + steps[event.key]));
        brushes.set(axis.name, [start, start + size]);
      } else return;
      event.preventDefault();
      draw(axis.name);
    }

    draw();
    return [
      el("h3", {}, "What varied, over all categories"),
      el("p", { class: "soft" }, "Each line is a trial, dashed if it was pruned; the stronger its colour, the better. " +
        "Drag along an axis to choose a range, click it to clear; by keyboard: Tab, arrow keys, Escape."),
      box,
      said,
    ];
  }

  // ---- trust --------------------------------------------------------------------------------------------------------

  function facts(rows) {
    return el("table", { class: "facts" }, el("tbody", {}, rows.map((fact) =>
      el("tr", {}, el("th", { scope: "row" }, fact.name), el("td", {}, fact.value)))));
  }

  function command({ what, command: text }) {
    const copy = navigator.clipboard
      ? el("button", { class: "plain", type: "button", onclick: async (event) => {
          const { target } = event;
          const done = await navigator.clipboard.writeText(text).then(() => true, () => false);
          target.textContent = done ? "Copied" : "Not allowed here: select the text";
        } }, "Copy")
      : null;
    return el("div", {}, el("p", {}, what, " ", copy), el("pre", { tabindex: 0 }, text));
  }

  function trust() {
    return [
      el("h2", { id: "trust" }, "Why to trust it, and how to repeat it"),
      facts(report.trust),
      el("h3", {}, "Commands"),
      report.commands.map(command),
      el("h3", {}, "Settings of the search"),
      facts(report.settings),
      report.categories.filter((category) => category.trust.length).map((category) =>
        el("details", {}, el("summary", {}, `${category.name}: hashes and versions`),
          category.link ? el("p", {}, el("a", { href: category.link }, "Its run in MLflow")) : null,
          facts(category.trust))),
    ].flat();
  }

  function navigation() {
    const links = [["table", "all categories"], ...report.categories.map((category, index) =>
      [`category-${index}`, category.name]), ["search", "the search"], ["trust", "trust and commands"]];
    return el("nav", { "aria-label": "Sections" }, el("ul", {}, links.map(([id, text]) =>
      el("li", {}, el("a", { href: `#${id}` }, text)))));
  }

  const main = document.getElementById("report");
  main.append(...[top(), navigation(), table(), report.categories.map(section), search(), trust()]
    .flat().filter(Boolean));
  const redrawAll = () => redraws.forEach((redraw) => redraw());
  redrawAll();
  new ResizeObserver(redrawAll).observe(main);
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    for (const image of document.querySelectorAll("img")) image.loading = "eager";
  });
})();
