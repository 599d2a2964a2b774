// The inspector's page. All that comes from elsewhere (file names, messages) is set as text, never as markup.

const $ = (id) => document.getElementById(id);
const CHUNK = 4; // photos of one request: the first verdicts come soon, and one request holds few bytes
const POLL_SECONDS = 10; // between looks at whether the detector was changed
const SUFFIXES = /\.(png|jpe?g|jfif|bmp|tiff?|webp|jp2|p[bgnp]m)$/i;
const MAP_STRENGTH = 0.75;

const state = {
  token: "", categories: [], palette: [], paletteTop: 3, limits: { images: 64, image_bytes: Infinity },
  category: null, threshold: 0, isOwnThreshold: false, results: [], current: -1, isSending: false, number: 0,
};

// ---- the server

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { Authorization: `Bearer ${state.token}` } }).catch(() => null);
  if (answer === null) throw Object.assign(new Error("The server does not answer."), { status: 0, details: [] });
  const document = await answer.json().catch(() => ({}));
  if (answer.ok) return document;
  if (answer.status === 401) $("ask-token").open || $("ask-token").showModal();
  const error = document.error ?? { message: `The server answered ${answer.status}.`, details: [] };
  throw Object.assign(new Error(error.message), { status: answer.status, details: error.details });
}

function say(text) { $("status").textContent = text; }

async function loadCategories() {
  const found = await ask("categories");
  Object.assign(state, { categories: found.categories, palette: found.palette, paletteTop: found.palette_top, limits: found.limits });
  drawScale();
  const before = state.category;
  const chosen = found.categories.find((each) => each.name === before?.name) ?? found.categories[0];
  $("category").replaceChildren(...found.categories.map((each) => new Option(each.name, each.name)));
  if (chosen) chooseCategory(chosen, before);
}

function chooseCategory(category, before) {
  const isSame = before?.name === category.name;
  const isNewVersion = isSame && before.detector_version !== category.detector_version;
  state.category = category;
  $("category").value = category.name;
  $("version").textContent = `detector ${category.detector_version}`;
  $("note").textContent = category.note;
  $("note").hidden = !category.note;
  const rates = category.thresholds.map((each) => new Option(rateText(each), each.value));
  if (!category.thresholds.some((each) => each.value === category.threshold.value)) rates.push(new Option(rateText(category.threshold), category.threshold.value));
  $("rates").replaceChildren(new Option("own threshold", ""), ...rates);
  if (!isSame || (isNewVersion && !state.isOwnThreshold)) setThreshold(category.threshold.value, false);
  if (isNewVersion) {
    say(`The detector was changed: its threshold was ${short(before.threshold.value)}, and is ${short(category.threshold.value)}. The photos are judged anew.`);
    for (const result of state.results) result.isWaiting = !result.isTooLarge;
    send();
  }
  render();
}

function rateText(limit) { return `${Number((100 * limit.false_alarm_rate).toPrecision(2))} % false alarms`; }

async function send() {
  if (state.isSending) return;
  state.isSending = true;
  try {
    for (;;) {
      const waiting = state.results.filter((result) => result.isWaiting).slice(0, Math.min(CHUNK, state.limits.images));
      if (waiting.length === 0) break;
      await inspect(waiting);
      render();
    }
  } catch (error) {
    say(error.message);
  } finally {
    state.isSending = false;
    render();
  }
}

async function inspect(waiting) {
  const category = state.category;
  const form = new FormData();
  for (const result of waiting) form.append("images", result.file, result.name);
  let rows;
  try {
    rows = (await ask(`inspect/${encodeURIComponent(category.name)}?maps=true&threshold=${state.threshold}`, { method: "POST", body: form })).predictions;
  } catch (error) {
    if (error.status === 429 || error.status === 503) { // the server is busy: the same photos again, a little later
      say(error.message);
      await new Promise((go) => setTimeout(go, 3000));
      return;
    }
    if (error.status === 0 || error.status === 401) throw error;
    if (waiting.length > 1 && error.details.length !== waiting.length) {
      for (const result of waiting) await inspect([result]); // one of them is at fault
      return;
    }
    rows = waiting.map((_, index) => ({ verdict: "unreadable", score: null, error: error.details[index] ?? error.message }));
  }
  waiting.forEach((result, index) => {
    if (category.name !== state.category.name || !state.results.includes(result)) return;
    result.isWaiting = false;
    result.answer = rows[index];
    result.grey = null;
    if (rows[index].picture) result.url = rows[index].picture;
  });
  const said = rows.find((row) => row.detector_version);
  if (said && said.detector_version !== state.category.detector_version) await loadCategories();
}

async function judge(judged) {
  const result = state.results[state.current];
  if (!result?.answer || result.answer.score === null) return;
  const form = new FormData();
  form.append("images", result.file, result.name);
  try {
    await ask(`feedback/${encodeURIComponent(state.category.name)}?judged=${judged}`, { method: "POST", body: form });
    result.judged = judged;
    say(`${result.name}: kept as ${judged}, in quarantine until someone approves it.`);
  } catch (error) {
    say(error.message);
  }
  render();
}

// ---- photos

function add(files) {
  const before = state.results.length;
  let others = 0;
  for (const file of files) {
    if (!file.type.startsWith("image/") && !SUFFIXES.test(file.name)) { others += 1; continue; }
    const isTooLarge = file.size > state.limits.image_bytes;
    state.results.push({
      key: state.number++, file, name: file.webkitRelativePath || file.name || "photo", url: URL.createObjectURL(file), isWaiting: !isTooLarge, isTooLarge, judged: "", grey: null,
      answer: isTooLarge ? { verdict: "unreadable", score: null, error: `${file.name} has more than ${state.limits.image_bytes / 2 ** 20} MiB.` } : null,
    });
  }
  if (state.results.length > before && state.current < 0) state.current = before;
  say(others ? `${others} files that are no images were left out.` : "");
  render();
  send();
}

async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (entries.length === 0) return [...transfer.files];
  const found = [];
  const visit = async (entry) => {
    if (entry.isFile) found.push(await new Promise((done, fail) => entry.file(done, fail)));
    if (entry.isDirectory) {
      const reader = entry.createReader();
      for (;;) { // a reader gives at most 100 at a time
        const some = await new Promise((done, fail) => reader.readEntries(done, fail));
        if (some.length === 0) break;
        for (const each of some) await visit(each);
      }
    }
  };
  for (const entry of entries) await visit(entry);
  return found.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
}

async function openCamera() {
  if (!navigator.mediaDevices?.getUserMedia) { $("capture").click(); return; }
  try {
    $("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
  } catch {
    say("There is no camera here, or it may not be used.");
    return;
  }
  $("camera-view").showModal();
  await $("video").play();
}

function closeCamera() {
  $("video").srcObject?.getTracks().forEach((track) => track.stop());
  $("video").srcObject = null;
  $("camera-view").close();
}

function takePhoto() {
  const video = $("video");
  const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => add([new File([blob], `camera-${stamp()}.png`, { type: "image/png" })]), "image/png");
}

function stamp() { return new Date().toISOString().replace(/[:.]/g, "-").slice(0, 19); }

// ---- verdicts at the threshold of the page

function verdictOf(result) {
  if (!result.answer) return "";
  if (result.answer.score === null) return "unreadable";
  return result.answer.score > state.threshold ? "anomalous" : "good";
}

function pValueOf(score) {
  const normals = state.category.normal_scores;
  return normals.length ? (1 + normals.filter((each) => each >= score).length) / (normals.length + 1) : null;
}

/** A result in the words of `dskd predict`, judged at the page's threshold. */
function rowOf(result) {
  const { map, picture, ...row } = result.answer;
  if (row.score === null) return row;
  const isAnomalous = row.score > state.threshold;
  const isAsked = row.threshold === state.threshold; // outlines belong to the threshold that they were drawn at
  return {
    ...row, verdict: verdictOf(result), threshold: state.threshold, relative_score: state.threshold > 0 ? row.score / state.threshold : null,
    p_value: pValueOf(row.score), is_anomalous: isAnomalous, regions: isAnomalous ? (isAsked ? row.regions : null) : [], judged: result.judged || null,
  };
}

function setThreshold(value, isOwn) {
  if (!Number.isFinite(value) || value < 0) return;
  state.threshold = value;
  state.isOwnThreshold = isOwn;
  render();
}

// ---- drawing

function short(number) { return number === null || number === undefined ? "–" : Number(number.toPrecision(4)).toString(); }

function render() {
  renderList();
  renderViewer();
  renderScores();
}

function renderList() {
  const list = $("list");
  const items = new Map([...list.children].map((item) => [Number(item.dataset.key), item]));
  const wanted = state.results.map((result, index) => {
    const item = items.get(result.key) ?? newItem(result);
    const verdict = verdictOf(result);
    const button = item.firstChild;
    button.setAttribute("aria-current", String(index === state.current));
    const thumb = button.querySelector("img");
    if (thumb.getAttribute("src") !== result.url) thumb.src = result.url;
    const said = button.querySelector(".verdict");
    said.textContent = (verdict || "…") + (result.judged ? ` · judged ${result.judged}` : "");
    said.className = `verdict verdict-${verdict}`;
    return item;
  });
  if (wanted.length !== list.children.length || wanted.some((item, index) => item !== list.children[index])) list.replaceChildren(...wanted);
  const counts = { good: 0, anomalous: 0, unreadable: 0, "": 0 };
  for (const result of state.results) counts[verdictOf(result)] += 1;
  $("counts").textContent = state.results.length
    ? `${state.results.length} photos: ${counts.anomalous} anomalous, ${counts.good} good` + (counts.unreadable ? `, ${counts.unreadable} unreadable` : "") + (counts[""] ? `, ${counts[""]} waiting` : "")
    : "";
  for (const id of ["csv", "jsonl", "clear"]) $(id).disabled = !state.results.some((result) => result.answer);
}

function newItem(result) {
  const item = document.createElement("li");
  item.dataset.key = result.key;
  const button = Object.assign(document.createElement("button"), { type: "button" });
  const thumb = Object.assign(document.createElement("img"), { className: "thumb", alt: "" });
  const said = Object.assign(document.createElement("span"), { className: "said" });
  said.append(Object.assign(document.createElement("span"), { className: "file", textContent: result.name, title: result.name }), document.createElement("span"));
  said.lastChild.className = "verdict";
  button.append(thumb, said);
  button.addEventListener("click", () => choose(state.results.indexOf(result)));
  item.append(button);
  return item;
}

function choose(index) {
  if (index < 0 || index >= state.results.length) return;
  state.current = index;
  render();
  $("list").children[index]?.scrollIntoView({ block: "nearest", inline: "nearest" });
}

function renderViewer() {
  const result = state.results[state.current];
  $("empty").hidden = Boolean(result);
  $("shown").hidden = !result;
  $("judge").hidden = !result?.answer || result.answer.score === null;
  if (!result) return;
  const verdict = verdictOf(result);
  $("verdict").textContent = verdict ? verdict.toUpperCase() : "…";
  $("verdict").className = `verdict-${verdict}`;
  $("name").textContent = result.name;
  $("fault").textContent = result.answer?.error ?? "";
  $("fault").hidden = !result.answer?.error;
  $("before").disabled = state.current === 0;
  $("after").disabled = state.current === state.results.length - 1;
  const photo = $("photo");
  if (photo.getAttribute("src") !== result.url) photo.src = result.url;
  photo.alt = result.name;
  if (result.answer?.width) fitStage(result.answer.width, result.answer.height);
  $("stage").hidden = result.answer?.score === null;
  for (const judged of ["good", "defect"]) $(judged).setAttribute("aria-pressed", String(result.judged === judged));
  $("judged").textContent = result.judged ? `Judged ${result.judged}: in quarantine until someone approves it.` : "Kept in quarantine until someone approves it.";
  drawMap(result);
}

function fitStage(width, height) {
  $("stage").style.aspectRatio = `${width} / ${height}`;
  $("stage").style.width = `min(100%, calc(65vh * ${width / height}))`;
}

async function drawMap(result) {
  const canvas = $("map");
  canvas.hidden = !$("with-map").checked || !result.answer?.map;
  if (canvas.hidden) return;
  if (!result.grey) {
    const image = new Image();
    image.src = result.answer.map.png;
    await image.decode();
    const reading = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height }).getContext("2d", { willReadFrequently: true });
    reading.drawImage(image, 0, 0);
    result.grey = reading.getImageData(0, 0, image.width, image.height);
  }
  if (result !== state.results[state.current]) return;
  const { grey } = result;
  const colours = new ImageData(grey.width, grey.height);
  const scale = result.answer.map.highest / 255 / Math.max(state.threshold, 1e-12); // grey level to multiples of the threshold
  const floor = Math.min(1, (result.answer.map.floor ?? state.threshold) / Math.max(state.threshold, 1e-12));
  for (let at = 0; at < grey.data.length; at += 4) {
    const share = grey.data[at] * scale;
    if (share <= floor) continue; // few good images exceed it: nothing to be seen
    colours.data.set(state.palette[Math.min(255, Math.round((255 * share) / state.paletteTop))], at);
    colours.data[at + 3] = 255 * MAP_STRENGTH;
  }
  Object.assign(canvas, { width: grey.width, height: grey.height });
  canvas.getContext("2d").putImageData(colours, 0, 0);
}

/** The colours of the map, from 0 to the palette's end. */
function drawScale() {
  const canvas = Object.assign($("scale"), { width: state.palette.length, height: 1 });
  const colours = new ImageData(canvas.width, 1);
  state.palette.forEach((colour, index) => colours.data.set([...colour, 255], 4 * index));
  canvas.getContext("2d").putImageData(colours, 0, 0);
  $("scale-top").textContent = `${state.paletteTop} ×`;
}

// The histogram's own units, of its viewBox.
const PLOT = { left: 8, right: 312, top: 6, bottom: 112, ticks: 128, text: 146 };

/** Where the axis of scores ends: one glaring defect must not press the good images into a corner. */
function scoreRange() {
  const scores = state.results.map((result) => result.answer?.score ?? 0);
  const usual = Math.max(...state.category.normal_scores, state.category.threshold.value, 1e-9);
  return 1.08 * Math.max(Math.min(Math.max(...scores, usual), 3 * usual), state.threshold);
}

function renderScores() {
  if (!state.category) return;
  const top = scoreRange();
  const result = state.results[state.current];
  const score = result?.answer?.score ?? null;
  const p = score === null ? null : pValueOf(score);
  const figures = { Score: short(score), Threshold: short(state.threshold), "p-value": p === null ? "–" : p === state.category.lowest_p_value ? `≤ ${short(p)}` : short(p) };
  $("figures").replaceChildren(...Object.entries(figures).flatMap(([name, text]) => [
    Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: text }),
  ]));
  drawHistogram(top, score);
  $("slider").value = Math.round((1000 * state.threshold) / top);
  $("slider").setAttribute("aria-valuetext", short(state.threshold));
  if (document.activeElement !== $("threshold")) $("threshold").value = Number(state.threshold.toPrecision(6));
  $("rates").value = [...$("rates").options].find((option) => option.value !== "" && Number(option.value) === state.threshold)?.value ?? "";
  const normals = state.category.normal_scores;
  const above = normals.filter((each) => each > state.threshold).length;
  $("expected").textContent = normals.length
    ? `${above} of ${normals.length} good images lie above it: about ${Number(((100 * (above + 1)) / (normals.length + 1)).toPrecision(2))} % false alarms are to be expected.`
    : "This older detector keeps no scores of good images.";
}

function drawHistogram(top, chosen) {
  const svg = $("histogram");
  const make = (name, attributes, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text;
    return node;
  };
  const x = (score) => PLOT.left + ((PLOT.right - PLOT.left) * Math.min(score, top)) / top;
  const normals = state.category.normal_scores;
  const bins = new Array(40).fill(0);
  for (const each of normals) bins[Math.min(bins.length - 1, Math.floor((bins.length * each) / top))] += 1;
  const width = (PLOT.right - PLOT.left) / bins.length;
  const nodes = [];
  bins.forEach((count, index) => {
    const height = ((PLOT.bottom - PLOT.top) * count) / Math.max(...bins, 1);
    if (count) nodes.push(make("rect", { class: "bar", x: PLOT.left + index * width, y: PLOT.bottom - height, width: width - 0.5, height }));
  });
  nodes.push(make("line", { class: "axis", x1: PLOT.left, x2: PLOT.right, y1: PLOT.bottom, y2: PLOT.bottom }));
  for (const result of state.results) {
    const score = result.answer?.score ?? null;
    if (score === null) continue;
    const kind = score > state.threshold ? "bad" : "good";
    nodes.push(make("line", { class: `tick ${kind}${score === chosen ? " chosen" : ""}`, x1: x(score), x2: x(score), y1: PLOT.bottom + 1, y2: PLOT.ticks }));
  }
  const numBeyond = state.results.filter((result) => (result.answer?.score ?? 0) > top).length;
  if (numBeyond) nodes.push(make("text", { x: PLOT.right, y: PLOT.bottom - 6, "text-anchor": "end" }, `${numBeyond} beyond →`));
  nodes.push(make("line", { class: "limit", x1: x(state.threshold), x2: x(state.threshold), y1: 0, y2: PLOT.ticks }));
  nodes.push(make("text", { x: PLOT.left, y: PLOT.text }, "0"), make("text", { x: PLOT.right, y: PLOT.text, "text-anchor": "end" }, short(top)));
  svg.replaceChildren(...nodes);
}

// ---- downloads

function download(name, type, text) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function cell(value) {
  if (value === null || value === undefined) return "";
  let text = String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`; // a spreadsheet would compute it
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const COLUMNS = ["image", "verdict", "score", "threshold", "relative_score", "p_value", "is_anomalous", "width", "height", "num_clipped", "category", "detector_version", "teacher", "error", "judged"];

function rows() { return state.results.filter((result) => result.answer).map((result) => ({ image: result.name, ...rowOf(result) })); }

// ---- what people do

$("files").addEventListener("change", (event) => { add([...event.target.files]); event.target.value = ""; });
$("folder").addEventListener("change", (event) => { add([...event.target.files]); event.target.value = ""; });
$("capture").addEventListener("change", (event) => { add([...event.target.files]); event.target.value = ""; });
$("camera").addEventListener("click", openCamera);
$("take").addEventListener("click", takePhoto);
$("leave-camera").addEventListener("click", closeCamera);
$("camera-view").addEventListener("cancel", closeCamera);
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].map((file) => (file.name && file.name !== "image.png" ? file : new File([file], `pasted-${stamp()}.png`, { type: file.type })));
  if (files.length) add(files);
});
for (const name of ["dragenter", "dragover"]) document.addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => $("drop").classList.remove("over"));
document.addEventListener("drop", async (event) => { event.preventDefault(); add(await filesOf(event.dataTransfer)); });

$("category").addEventListener("change", (event) => {
  const before = state.category;
  chooseCategory(state.categories.find((each) => each.name === event.target.value), before);
  for (const result of state.results) Object.assign(result, { answer: result.isTooLarge ? result.answer : null, isWaiting: !result.isTooLarge, judged: "" });
  render();
  send();
});
$("slider").addEventListener("input", (event) => setThreshold((Number(event.target.value) * scoreRange()) / 1000, true));
$("threshold").addEventListener("input", (event) => event.target.value !== "" && setThreshold(Number(event.target.value), true));
$("rates").addEventListener("change", (event) => event.target.value !== "" && setThreshold(Number(event.target.value), Number(event.target.value) !== state.category.threshold.value));
$("histogram").addEventListener("pointerdown", (event) => { event.target.ownerSVGElement?.setPointerCapture?.(event.pointerId); moveThreshold(event); });
$("histogram").addEventListener("pointermove", (event) => event.buttons && moveThreshold(event));
function moveThreshold(event) {
  if (!state.category) return;
  const box = $("histogram").getBoundingClientRect();
  const at = ((event.clientX - box.left) / box.width) * 320;
  setThreshold((scoreRange() * Math.min(Math.max(at - PLOT.left, 0), PLOT.right - PLOT.left)) / (PLOT.right - PLOT.left), true);
}
$("with-map").addEventListener("change", render);
$("before").addEventListener("click", () => choose(state.current - 1));
$("after").addEventListener("click", () => choose(state.current + 1));
$("good").addEventListener("click", () => judge("good"));
$("defect").addEventListener("click", () => judge("defect"));
$("csv").addEventListener("click", () => download("predictions.csv", "text/csv", [COLUMNS, ...rows().map((row) => COLUMNS.map((name) => row[name]))].map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n"));
$("jsonl").addEventListener("click", () => download("predictions.jsonl", "application/jsonl", rows().map((row) => JSON.stringify(row) + "\n").join("")));
$("clear").addEventListener("click", () => {
  for (const result of state.results) if (result.url.startsWith("blob:")) URL.revokeObjectURL(result.url);
  Object.assign(state, { results: [], current: -1 });
  say("");
  render();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") || event.target.matches("select, input:not([type=checkbox])")) return;
  const act = { ArrowLeft: () => choose(state.current - 1), ArrowUp: () => choose(state.current - 1), ArrowRight: () => choose(state.current + 1), ArrowDown: () => choose(state.current + 1), g: () => judge("good"), d: () => judge("defect"), m: () => $("with-map").click() }[event.key];
  if (act) { event.preventDefault(); act(); }
});
$("ask-token").addEventListener("close", () => { keepToken($("token").value); start(); });

// ---- the beginning

function keepToken(token) {
  state.token = token.trim();
  try { sessionStorage.setItem("dskd-token", state.token); } catch { /* then it is asked for again */ }
}

function start() {
  loadCategories().then(() => state.results.length && send(), (error) => say(error.message));
}

const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  keepToken(given);
  history.replaceState(null, "", location.pathname); // out of the address, which people copy
} else {
  try { state.token = sessionStorage.getItem("dskd-token") ?? ""; } catch { /* asked for */ }
}
start();
setInterval(() => document.hidden || document.querySelector("dialog[open]") || loadCategories().catch(() => {}), 1000 * POLL_SECONDS);
